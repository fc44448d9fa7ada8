"""Chat completions of tools/serve.py, by the openai client."""

import json
import os
import re
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import wraps
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from offline import SMALL, VIDEO, model, pictures, processor, text_of  # noqa: F401 - fixtures
from serving import (  # noqa: F401 - fixtures
    NAME,
    ask,
    client,
    data_url,
    folder,
    image,
    offline,
    openai,
    post,
    running,
    served,
    text_in,
    user,
    video,
)

from moss_vl import infer
from moss_vl.tools import serve, serve_http
from moss_vl.tools.serve_chat import ChatRequest, SeededSampling, StopFilter
from moss_vl.tools.serve_conversations import Conversations, MessageKeys


LONG = 400  # tokens: an answer that does not end before it is cancelled


# answers


def test_images_and_videos_in_all_forms(model, processor, pictures, folder, client):  # noqa: F811
    expected = offline(model, processor, "What?", images=[pictures[0]])
    for url in (data_url(pictures[0]), "picture.png", f"file://{folder}/picture.png", str(folder / "picture.png")):
        assert text_in(ask(client, user(image(url), "What?"))) == expected
    uploaded = client.files.create(file=open(pictures[0], "rb"), purpose="vision")
    file = {"type": "file", "file": {"file_id": uploaded.id}}
    inline = {"type": "file", "file": {"file_data": data_url(pictures[0]), "filename": "a.png"}}
    for part in (image(uploaded.id), file, inline):
        assert text_in(ask(client, user(part, "What?"))) == expected
    client.files.delete(uploaded.id)

    expected = offline(model, processor, "What?", videos=[VIDEO])
    uploaded = client.files.create(file=open(VIDEO, "rb"), purpose="user_data")
    file = {"type": "file", "file": {"file_id": uploaded.id}}
    for part in (video("deep/clip.mp4"), video(data_url(VIDEO, "video/mp4")), video(uploaded.id), file):
        assert text_in(ask(client, user(part, "What?"))) == expected
    client.files.delete(uploaded.id)


def test_a_conversation_with_options(model, processor, pictures, client):  # noqa: F811
    """System turn, earlier turns as the client returns them, options of one medium and of all."""
    first = ask(client, user(image(data_url(pictures[0])), "What?"))
    messages = [
        {"role": "developer", "content": "Be brief."},
        *user(image(data_url(pictures[0])), "What?"),
        first.choices[0].message.model_dump(),
        *user(video("deep/clip.mp4", fps=4), "And now?"),
    ]
    query = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            *user({"type": "image", "image": pictures[0]}, "What?"),
            {"role": "assistant", "content": text_in(first)},
            *user({"type": "video", "video": VIDEO, "fps": 4}, "And now?"),
        ],
        "media_kwargs": {**SMALL, "min_pixels": 8192},
        "generate_kwargs": {"max_new_tokens": 6, "repetition_penalty": 1.3},
    }
    more = {"media_kwargs": {"min_pixels": 8192}, "repetition_penalty": 1.3}
    got = client.chat.completions.create(model=NAME, messages=messages, max_completion_tokens=6, extra_body=more)
    assert text_in(got) == text_of(model, processor, query)


def test_usage_counts_text_tokens(model, processor, pictures, client):  # noqa: F811
    got = ask(client, user(image(data_url(pictures[0])), "What?"), new=5)
    prompt = "<|im_start|>user\n<|image_pad|>What?<|im_end|>\n<|im_start|>assistant\n"
    assert got.usage.prompt_tokens == len(processor.tokenizer(prompt)["input_ids"])
    assert got.choices[0].finish_reason == "length" and got.usage.completion_tokens == 5
    assert got.usage.total_tokens == got.usage.prompt_tokens + 5


def test_a_streamed_answer(model, processor, pictures, client):  # noqa: F811
    query = {
        "prompt": "What?",
        "images": [pictures[1]],
        "media_kwargs": SMALL,
        "generate_kwargs": {"max_new_tokens": 20},
    }
    expected = [event.text for event in model.stream_batch(processor, [query]) if event.kind == "piece"]
    messages = user(image(data_url(pictures[1])), "What?")
    chunks = list(ask(client, messages, 20, stream=True, stream_options={"include_usage": True}))
    assert len({(chunk.id, chunk.model, chunk.object) for chunk in chunks}) == 1
    *deltas, last = chunks
    assert last.choices == [] and last.usage.completion_tokens == 20
    assert deltas[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.content for chunk in deltas] == [*expected, None]
    assert [chunk.choices[0].finish_reason for chunk in deltas] == [None] * (len(deltas) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in ask(client, messages, stream=True))


def test_16_clients_at_once(model, processor, pictures, running):  # noqa: F811
    """Each gets the answer that it gets alone, whole or in pieces."""
    media = [{"images": [pictures[n % 3]]} if n % 4 else {"videos": [VIDEO]} for n in range(16)]
    expected = [offline(model, processor, f"What is {n}?", 12, **one) for n, one in enumerate(media)]
    uploaded = running.client().files.create(file=open(VIDEO, "rb"), purpose="vision")
    together = threading.Barrier(16)

    def work(n: int) -> str:
        part = image(data_url(media[n]["images"][0])) if n % 4 else video(uploaded.id)
        client, messages = running.client(), user(part, f"What is {n}?")
        together.wait(60)
        if n % 2:
            return text_in(ask(client, messages, 12))
        pieces = ask(client, messages, 12, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in pieces)

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(work, range(16))) == expected
    running.client().files.delete(uploaded.id)
    assert running.is_idle()


def test_stop_texts_end_an_answer(model, processor, client):  # noqa: F811
    whole = offline(model, processor, "Tell me.", 40)
    stop = whole[len(whole) // 2 :][:4]
    expected = whole[: whole.index(stop)]
    for stream in (False, True):
        got = ask(client, user("Tell me."), 40, stop=[stop, "no such text"], stream=stream)
        if stream:
            chunks = list(got)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
            assert chunks[-1].choices[0].finish_reason == "stop"
        else:
            assert text_in(got) == expected and got.choices[0].finish_reason == "stop"
            assert got.usage.completion_tokens < 40


@pytest.mark.parametrize("stops", [("ab",), ("aab", "b"), ("abab", "ba"), ("aaa",)])
def test_stop_texts_may_be_cut_anywhere(stops):
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        text = "".join("abc"[i] for i in torch.randint(0, 3, (12,), generator=generator))
        ends = [text.index(stop) for stop in stops if stop in text]
        found, parts = StopFilter(stops), []
        cut = int(torch.randint(1, 4, (1,), generator=generator))
        for start in range(0, len(text), cut):
            parts.append(found.add(text[start : start + cut]))
            if found.found:
                break
        # of several stop texts, the one that is complete first ends the text
        assert found.found == bool(ends), (text, stops)
        joined = "".join([*parts, found.end()])
        assert text.startswith(joined) and not any(stop in joined for stop in stops)
        if not ends:
            assert joined == text


def test_sampling_with_a_seed_repeats(client):
    def sampled(seed):
        return text_in(ask(client, user("Tell me."), 12, temperature=1.5, seed=seed, extra_body={"top_k": 50}))

    assert sampled(1) == sampled(1) and len({sampled(seed) for seed in range(4)}) > 1
    greedy = text_in(ask(client, user("Tell me."), 12))
    assert greedy == text_in(ask(client, user("Tell me."), 12, temperature=0, seed=5, top_p=0.5))
    assert text_in(ask(client, user("Tell me."), 12, temperature=1e-4, seed=5)) == greedy
    assert len({text_in(ask(client, user("Tell me."), 12, temperature=1.5)) for _ in range(4)}) > 1


def test_seeded_sampling_draws_from_the_distribution():
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
    drawn = SeededSampling(0, temperature=2.0, top_k=3, top_p=1.0)(None, scores.expand(20000, -1)).argmax(-1)
    shares = torch.bincount(drawn, minlength=5) / 20000
    expected = torch.tensor([1.0, 0.5, 0.0]).softmax(0)
    deviation = (expected * (1 - expected) / 20000).sqrt()
    assert ((shares[:3] - expected).abs() < 5 * deviation).all() and not shares[3:].any()
    only = SeededSampling(0, temperature=1.0, top_k=0, top_p=0.5)(None, scores.expand(100, -1)).argmax(-1)
    assert not only.any()  # the first has more than half


def test_the_example_of_the_documentation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    nano_processor, nano = infer.load(serve.parse(["--dtype", "float32"]))
    [example] = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/serving.md").read_text(), re.MULTILINE | re.DOTALL)
    with served(nano, nano_processor, tmp_path) as running:
        example = example.replace("127.0.0.1:8000", running.address)
        capsys.readouterr()
        exec(compile(example, "docs/serving.md", "exec"), {"__name__": "__main__"})
        assert capsys.readouterr().out.startswith("yellow\nat 0.0 seconds a large white ring at the top left")
        assert running.is_idle() and not running.service.store.list()


def test_the_limits_in_the_documentation():
    args = serve.parse([])
    text = (ROOT / "docs/serving.md").read_text()
    for option in ("--rows", "--waiting", "--max-new-tokens", "--max-prompt-tokens", "--request-mb", "--sessions"):
        value = getattr(args, option[2:].replace("-", "_"))
        assert re.search(rf"^\| {value:,} .*`{option}`", text, re.MULTILINE), option
    for words in (f"| {args.file_mb:,} MB of a file, {args.files_gb} GB", f"`--grace` seconds ({args.grace})"):
        assert words in text


# conversations


def test_a_conversation_is_continued_on_its_cache(model, processor, pictures, running, client, monkeypatch):  # noqa: F811
    """The later turns of a conversation are prefilled alone, with the answers of the whole one."""
    prefilled, forward = [], model.forward

    @wraps(forward)  # generate reads its signature
    def spy(*args, **kwargs):
        prefilled.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", spy)
    messages, cold = user(video("deep/clip.mp4"), "What?"), user({"type": "video", "video": VIDEO}, "What?")
    later = user(image(data_url(pictures[0])), "And now?"), user({"type": "image", "image": pictures[0]}, "And now?")
    for number in range(3):
        prefilled.clear()
        got = text_in(ask(client, messages))
        longest = max(prefilled, default=0)
        query = {"messages": cold, "media_kwargs": SMALL, "generate_kwargs": {"max_new_tokens": 8}}
        prefilled.clear()
        assert got == text_of(model, processor, query)
        assert (longest < max(prefilled)) == (number > 0)
        said = [{"role": "assistant", "content": got}]
        messages, cold = [*messages, *said, *later[0]], [*cold, *said, *later[1]]
    changed = [*messages[:1], {"role": "assistant", "content": "Something else."}, *messages[-1:]]
    keys = ChatRequest.read({"messages": changed}, running.service.media, running.service.limits).keys
    assert keys.earlier is not None and running.service.conversations.find(keys) is None
    keys = ChatRequest.read({"messages": messages}, running.service.media, running.service.limits).keys
    assert running.service.conversations.find(keys).has_cache


def test_what_makes_a_conversation_another_one(running, folder, pictures):  # noqa: F811
    def earlier(first="What?", path="deep/clip.mp4", answer="A ring.", **options):
        body = {"messages": [*user(video(path), first), {"role": "assistant", "content": answer}, *user("And?")]}
        keys = ChatRequest.read({**body, **options}, running.service.media, running.service.limits).keys
        assert keys.new == 2
        return keys.earlier

    same = earlier()
    assert same == earlier(temperature=1, stream=True) == earlier(path=f"file://{folder}/deep/clip.mp4")
    shutil.copy(VIDEO, folder / "same.mp4")
    others = [
        earlier("Where?"),
        earlier(answer="A ring"),
        earlier(path="same.mp4"),
        earlier(media_kwargs={"max_frames": 2}),
    ]
    os.utime(folder / "same.mp4", (1, 1))
    others.append(earlier(path="same.mp4"))
    assert len({same, *others}) == 6
    for messages in (user("Hello."), [*user("Hello."), {"role": "assistant", "content": "Yes"}]):
        keys = ChatRequest.read({"messages": messages}, running.service.media, running.service.limits).keys
        assert (keys.earlier, keys.new) == (None, 0)


def test_conversations_whose_caches_were_dropped_are_forgotten():
    kept, (first, second) = Conversations(), (MessageKeys.of(user(text), {}) for text in ("a", "b"))
    states = [SimpleNamespace(has_cache=True) for _ in range(2)]
    for keys, state in zip((first, second), states, strict=True):
        kept.keep(keys, "yes", state)
    continued = [*user("a"), {"role": "assistant", "content": "yes"}, *user("b")]
    assert kept.find(MessageKeys.of(continued, {})) is states[0]
    states[0].has_cache = False  # as the budget does
    assert kept.find(MessageKeys.of(continued, {})) is None
    kept.keep(second, "no", {"messages": []})  # a state without a cache
    assert [state for state, _ in kept.states.values()] == [states[1]]


# leaving


def test_an_answer_ends_with_its_reader(running):
    stream = ask(running.client(), user("Tell me more."), LONG, stream=True)
    next(iter(stream))
    assert running.service.writer.queues
    stream.close()
    assert running.is_idle()


def test_an_answer_ends_with_its_client(running):
    """Of a client that waits for the whole answer."""
    with pytest.raises(openai.APITimeoutError):
        ask(running.client(timeout=0.5), user(video("deep/clip.mp4"), "Tell me."), LONG * 10)
    assert running.is_idle()


def test_a_client_may_leave_while_it_waits_for_its_turn(running):
    streams = [ask(running.client(), user("Tell me more."), LONG * 10, stream=True) for _ in range(4)]
    for stream in (False, True):
        with pytest.raises(openai.APITimeoutError):
            ask(running.client(timeout=0.5), user("Me too?"), stream=stream)
    writer, end = running.service.writer, time.monotonic() + 60
    while len(writer.queues) > 4:
        assert time.monotonic() < end, "those that left still wait"
        time.sleep(0.01)
    for stream in streams:
        stream.close()
    assert running.is_idle()


def test_too_many_requests_are_refused(running):
    streams = [ask(running.client(), user("Tell me more."), LONG * 10, stream=True) for _ in range(4)]
    waiting = ThreadPoolExecutor(20)

    def wait(n):
        try:
            ask(running.client(), user(f"And {n}?"), 1)
            return None
        except openai.RateLimitError as error:
            return error

    answers = [waiting.submit(wait, n) for n in range(20)]
    while len(running.service.writer.queues) < 24:
        time.sleep(0.01)
    with pytest.raises(openai.RateLimitError) as refused:
        ask(running.client(), user("Me too?"), 1)
    assert refused.value.response.headers["Retry-After"] == "1"
    for stream in streams:
        stream.close()
    assert [one.result(120) for one in answers] == [None] * 20
    waiting.shutdown()
    assert running.is_idle()


# wrong requests


@pytest.mark.parametrize(
    "change, message",
    [
        ({"messages": []}, "at least one message"),
        ({"messages": "hello"}, "must be a list"),
        ({"messages": [7]}, "must be an object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "the role 'tool'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "the role ['user']"),
        ({"messages": [{"role": {"a": 1}, "content": "x"}]}, "the role {'a': 1}"),
        ({"messages": user("one, two, " * 20000)}, "at most 32768"),
        ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "'name'"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "type"),
        ({"messages": [{"role": "user", "content": "<|image|>"}]}, "placeholder"),
        ({"messages": user(image("picture.png", detail="high"))}, "detail"),
        ({"messages": user({"type": "file", "file": {}})}, "file_id"),
        ({"messages": user(image(7))}, "got 7"),
        ({"messages": user(image("data:image/png;base64,AAAA"))}, "not an image"),
        ({"messages": user(image("deep/clip.mp4"))}, "video"),
        ({"messages": user(image("picture.png", allow_http=True))}, "allow_http"),
        ({"messages": user(video("deep/clip.mp4", max_frames=65))}, "at most 64"),
        ({"messages": user(video("deep/clip.mp4", max_pixels=10**6))}, "at most 16384"),
        ({"messages": user(video("deep/clip.mp4", resized_height=320, resized_width=320))}, "at most 16384"),
        ({"messages": user(video("deep/clip.mp4", do_sample_frames=False))}, "takes all frames"),
        ({"messages": user(video("deep/clip.mp4", do_sample_frames=0))}, "takes all frames"),
        ({"messages": user(video("deep/clip.mp4", max_pixels="1000000"))}, "max_pixels"),
        ({"messages": user(video("deep/clip.mp4", segments=[[0.1]] * 65))}, "64"),
        ({"messages": user(video(["picture.png", "../other.png"], sample_fps=1))}, "media folder"),
        ({"media_kwargs": {"max_source_pixels": 10**9}}, "max_source_pixels"),
        ({"media_kwargs": {"allow_http": True}}, "allow_http"),
        ({"media_kwargs": {"num_extract_threads": 64}}, "num_extract_threads"),
        ({"media_kwargs": {"video_max_pixels": 10**12}}, "at most"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5000}, "at most 4096"),
        ({"max_tokens": 10**400}, "max_tokens"),
        ({"top_k": 10**400, "temperature": 1}, "top_k"),
        ({"repetition_penalty": 10**400}, "repetition_penalty"),
        ({"media_kwargs": {"min_frames": 10**400}}, "at most"),
        ({"media_kwargs": {"image_mean": [10**400, 0, 0]}}, "image_mean"),
        ({"messages": user(video("deep/clip.mp4", segments=[[0, 10**400]]))}, "segment"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "disagree"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 1, "top_p": 2}, "top_p"),
        ({"temperature": 1, "top_p": 2, "seed": 1}, "top_p"),
        ({"temperature": 1, "top_k": -1}, "top_k"),
        ({"temperature": 1, "seed": 1 << 70}, "64 bits"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"stop": ["a"] * 5}, "at most 4"),
        ({"stop": [""]}, "not empty"),
        ({"n": 2}, "n must be 1"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream=true"),
        ({"temprature": 1}, "temperature"),
    ],
)
def test_wrong_requests(client, change, message):
    body = {"messages": user("Hello."), "max_tokens": 2, **change}
    with pytest.raises(openai.BadRequestError) as raised:
        client.post("/chat/completions", body=body, cast_to=object)
    error = raised.value.body
    assert message in error["message"] and error["type"] == "invalid_request_error", error
    assert "query" not in error["message"]


def test_a_far_too_long_text_is_not_tokenised(running):
    limits = replace(running.service.limits, tokenizer=lambda *_, **__: pytest.fail("tokenised"), max_prompt_tokens=10)
    with pytest.raises(ValueError, match="messages: the text has far more than 10 tokens"):
        limits.check_texts("messages", ["a" * 400, "b" * 300])


@pytest.mark.parametrize("stream", [False, True])
def test_half_a_character_is_refused(running, stream):
    """JSON can say it by an escape; no tokenizer takes it."""
    for messages in (
        user(image("picture.png"), "half \ud83d"),
        [{"role": "system", "content": "\udc00"}, *user("x")],
    ):
        data = json.dumps({"messages": messages, "max_tokens": 2, "stream": stream}).encode()
        status, body = post(running, "/v1/chat/completions", data)
        assert status == 400 and "half of a character" in body["error"]["message"]


def test_bodies_that_are_no_json_and_paths_that_are_none(running):
    for data in (b"", b"{", b"\xff\xfe", b"[" * 10000):
        status, body = post(running, "/v1/chat/completions", data)
        assert status == 400 and "not JSON" in body["error"]["message"]
    assert post(running, "/v1/chat/completions", b"[1]")[0] == 400
    for path, status in (("/v1/nothing", 404), ("/v1/models", 405)):
        assert post(running, path, b"{}")[0] == status
    form = "multipart/form-data; boundary=x"
    for data in (
        b"",
        b"nonsense",
        b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nvision\r\n--x--\r\n',
    ):
        assert post(running, "/v1/files", data, **{"Content-Type": form})[0] == 400
    assert post(running, "/v1/files", b"{}")[0] == 400


def test_a_model_of_another_name(client):
    assert [one.id for one in client.models.list()] == [NAME] == [client.models.retrieve(NAME).id]
    for call in (
        lambda: client.models.retrieve("gpt"),
        lambda: client.chat.completions.create(model="gpt", messages=user("Hello.")),
    ):
        with pytest.raises(openai.NotFoundError) as raised:
            call()
        assert raised.value.body["code"] == "model_not_found"


def test_requests_over_the_limit(running, client):
    with pytest.raises(openai.APIStatusError) as raised:
        ask(client, user(image("data:image/png;base64," + "A" * 3_000_000)))
    assert raised.value.status_code == 413 and "2000000 bytes" in raised.value.body["message"]
    assert text_in(ask(client, user("Hello."), 2)) is not None  # the server goes on


def test_a_body_that_comes_too_slowly_is_refused(running, monkeypatch):
    """Such clients take all places of requests and of uploads; others get theirs after them."""
    monkeypatch.setattr(serve_http, "BODY_SECONDS", 0.5)
    host, port = running.address.split(":")
    clients = []
    for path in ["/v1/chat/completions"] * 24 + ["/v1/files"] * 5:
        clients.append(socket.create_connection((host, int(port)), 30))
        kind = b"Content-Type: multipart/form-data; boundary=x\r\n" if "files" in path else b""
        clients[-1].sendall(
            b"POST " + path.encode() + b" HTTP/1.1\r\nHost: localhost\r\n" + kind + b"Content-Length: 99\r\n\r\n--x"
        )
    answers = [one.makefile("rb").read() for one in clients]  # up to the end of the connection
    assert all(b" 408 " in answer and b"too slowly: 3 bytes" in answer for answer in answers)
    for one in clients:
        one.close()
    assert running.service.reading == 0
    assert text_in(ask(running.client(), user("Hello."), 2)) is not None


def test_a_body_that_never_ends_is_refused(running):
    """It says no length, and is sent in chunks."""
    host, port = running.address.split(":")
    with socket.create_connection((host, int(port)), 30) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        for _ in range(40):
            connection.sendall(chunk)
        connection.sendall(b"0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    assert running.is_idle()
