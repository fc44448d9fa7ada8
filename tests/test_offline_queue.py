"""The queue of `offline_generate`: answers, errors, cancelling, stopping, sessions; and calls from several threads."""

import queue
import threading

import numpy as np
import pytest
from offline import (  # noqa: F401 - most are fixtures
    RECORD,
    SMALL,
    VIDEO,
    batch,
    emptied,
    model,
    pictures,
    processor,
    query_of,
    serve,
    start,
    text_of,
    user,
)


# answers


def test_the_server_answers_in_order(model, processor, pictures):
    queries = [
        query_of("Hi", generate=dict(max_new_tokens=30)),
        query_of("What?", images=pictures[0]),
        query_of("Hi", videos=VIDEO, use_template=False),
    ]
    alone = [text_of(model, processor, query) for query in queries]
    assert serve(model, processor, *queries) == [[text] for text in alone]
    for text, pieces in zip(
        alone, serve(model, processor, *({**query, "stream_output": True} for query in queries)), strict=True
    ):
        assert pieces[0] == "<|round_start|>" and "".join(pieces[1:]) == text


def test_an_error_is_put_out_and_the_next_query_answered(model, processor):
    good = query_of("Hi")
    rounds = serve(
        model, processor, {"promt": "Hi"}, "Hi", {**good, "images": ["nowhere.png"], "stream_output": True}, {}, good
    )
    assert rounds[0][0].startswith("[ERROR] query: unknown key 'promt'; did you mean 'prompt'")
    assert rounds[1] == ["[ERROR] query must be a dict, got str"]
    assert len(rounds[2]) == 1 and "nowhere.png" in rounds[2][0]
    assert rounds[3][0].startswith("[ERROR] a query needs")
    assert rounds[4] == [text_of(model, processor, good)]


@pytest.mark.parametrize("flag", ["cancel_current_generate", "stop_generation"])
def test_cancelling_ends_one_answer_and_loses_no_query(model, processor, flag):
    eos = processor.tokenizer.eos_token_id
    long = query_of("Hi", generate=dict(max_new_tokens=400, suppress_tokens=[eos]))
    first, second = query_of("a"), query_of("b")
    rounds = serve(model, processor, {flag: True}, {**long, "stream_output": True}, first, {**second, flag: True})
    one_token = text_of(model, processor, query_of("Hi", generate=dict(max_new_tokens=1, suppress_tokens=[eos])))
    assert rounds == [
        ["<|round_start|>", one_token],
        [text_of(model, processor, first)],
        [text_of(model, processor, second)],
    ] or (one_token == "" and rounds[0] == ["<|round_start|>"])


def test_cancelling_from_another_thread(model, processor):
    asked, said = queue.Queue(), queue.Queue()
    server = threading.Thread(target=model.offline_generate, args=(processor, asked, said), daemon=True)
    server.start()
    asked.put(
        {
            **query_of(
                "Hi", generate=dict(max_new_tokens=100_000, suppress_tokens=[processor.tokenizer.eos_token_id])
            ),
            "stream_output": True,
        }
    )
    assert said.get(timeout=60) == "<|round_start|>"
    pieces = [said.get(timeout=60)]
    asked.put({"stop_generation": True})
    while pieces[-1] != "<|round_end|>":
        pieces.append(said.get(timeout=60))
    assert not pieces[0].startswith("[ERROR]")
    asked.put(query_of("a"))
    assert said.get(timeout=60) == text_of(model, processor, query_of("a")) and said.get(timeout=60) == "<|round_end|>"
    asked.put({"stop_offline_generate": True})
    server.join(60)
    assert not server.is_alive() and said.empty()


def test_the_server_continues_what_it_was_told_to_keep(model, processor):
    state = batch(model, processor, query_of("one"))["session_states"][0]
    apart, joined = (
        text_of(model, processor, query_of("two")),
        text_of(model, processor, query_of("two"), session_states=[state]),
    )
    assert apart != joined
    assert serve(model, processor, query_of("one"), query_of("two"))[1] == [apart]
    rounds = serve(
        model,
        processor,
        query_of("one", persist_session=True),
        query_of("two"),
        {"promt": 1},
        query_of("two"),
        query_of("two", reset_session=True),
        query_of("two"),
    )
    assert [pieces[0] for pieces in rounds if not pieces[0].startswith("[ERROR]")][1:] == [
        joined,
        joined,
        apart,
        apart,
    ]


# threads


def test_two_threads_at_once(model, processor, pictures):
    queries = [
        query_of("Hi", images=pictures, media={"max_pixels": 4096}),
        query_of("Hi", images=pictures, media={"max_pixels": 25600}),
    ]
    alone = [text_of(model, processor, query) for query in queries]
    texts, failures = [[], []], []

    def ask(i):
        try:
            texts[i] += [text_of(model, processor, queries[i]) for _ in range(6)]
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and alone[0] != alone[1]
    assert texts == [[text] * 6 for text in alone]


class PlainQueue:
    """A queue without insides that could be reached."""

    def __init__(self):
        self._queue = queue.Queue()
        self.get, self.get_nowait, self.put, self.qsize = (
            getattr(self._queue, name) for name in ("get", "get_nowait", "put", "qsize")
        )


@pytest.mark.parametrize(
    "kind",
    [queue.Queue, queue.SimpleQueue, PlainQueue, lambda: queue.Queue(maxsize=5)],
    ids=["Queue", "SimpleQueue", "plain", "full"],
)
def test_nothing_that_comes_after_a_stop_is_lost(model, processor, kind):  # noqa: F811
    after = [query_of("b"), {"id": "odd"}, {"stop_offline_generate": True}]

    class Said(queue.Queue):
        def put(self, piece):
            super().put(piece)
            if piece == "<|round_end|>":
                asked.put(after[-1])  # comes in between the last token and the stop

    asked, said = kind(), Said()
    for query in (
        query_of("a"),
        {"stop_offline_generate": True},
        *after[:-1],
    ):  # all are there while the first is answered
        asked.put(query)
    start(model, processor, asked, said)()
    assert emptied(said) == [text_of(model, processor, query_of("a")), "<|round_end|>"]
    assert emptied(asked) == after


def test_a_server_goes_on_where_the_one_before_stopped(model, processor):  # noqa: F811
    asked, said = queue.Queue(), queue.Queue()
    texts = [text_of(model, processor, query_of(prompt)) for prompt in "abc"]
    for query in (
        query_of("a"),
        {"stop_offline_generate": True},
        query_of("b"),
        query_of("c"),
        {"stop_offline_generate": True},
    ):
        asked.put(query)
    start(model, processor, asked, said)()
    asked.put({"last": True})
    start(model, processor, asked, said)()
    assert emptied(said) == [piece for text in texts for piece in (text, "<|round_end|>")]
    assert emptied(asked) == [{"last": True}]


def test_an_interrupted_server_loses_only_what_it_was_answering(model, processor, monkeypatch):  # noqa: F811
    asked, said = queue.Queue(), queue.Queue()
    generate = model.generate

    def interrupted(**kwargs):
        generate(**kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "generate", interrupted)
    for prompt in "abc":
        asked.put(query_of(prompt))
    with pytest.raises(KeyboardInterrupt):
        start(model, processor, asked, said)()
    assert emptied(asked) == [query_of("b"), query_of("c")] and said.empty()


def test_a_cancel_after_a_stop_still_ends_the_answer(model, processor):  # noqa: F811
    asked, said = queue.Queue(), queue.Queue()
    endless = query_of("Hi", generate=dict(max_new_tokens=100_000, suppress_tokens=[processor.tokenizer.eos_token_id]))
    for query in (endless, {"stop_offline_generate": True}, {**query_of("b"), "cancel_current_generate": True}):
        asked.put(query)
    start(model, processor, asked, said)()
    assert emptied(said)[-1] == "<|round_end|>" and emptied(asked) == [query_of("b")]


@pytest.mark.parametrize("flag", ["cancel_current_generate", "stop_generation"])
def test_flags_that_are_false_or_none_say_nothing(model, processor, flag):  # noqa: F811
    texts = [text_of(model, processor, query_of(prompt)) for prompt in "abc"]
    no, none = {flag: False}, {flag: None}
    rounds = serve(
        model,
        processor,
        query_of("a"),
        no,
        {**query_of("b"), **no},
        {**query_of("c"), **none, "stop_offline_generate": False},
    )
    assert rounds == [[text] for text in texts]
    [[error], [text]] = serve(model, processor, {**query_of("a"), flag: "yes"}, query_of("a"))
    assert error == f"[ERROR] {flag} must be True or False, got 'yes'" and text == texts[0]


def test_persist_session_none_is_the_default(model, processor):  # noqa: F811
    alone = text_of(model, processor, query_of("two"))
    assert serve(model, processor, query_of("one", persist_session=None), query_of("two"))[1] == [alone]
    assert batch(model, processor, query_of("one", persist_session=None))["session_states"] != [None]


def test_two_servers_with_a_queue_each(model, processor, pictures):  # noqa: F811
    queries = [[query_of(f"{i}{k}", images=pictures[i], id=k) for k in range(4)] for i in range(2)]
    alone = [[text_of(model, processor, query) for query in each] for each in queries]
    queues = [(queue.Queue(), queue.Queue()) for _ in queries]
    for (asked, _), each in zip(queues, queries, strict=True):
        for query in (*each, {"stop_offline_generate": True}, {"i": 1}):
            asked.put(query)
    for join in [start(model, processor, *pair) for pair in queues]:
        join()
    for (asked, said), texts in zip(queues, alone, strict=True):
        assert emptied(said) == [piece for text in texts for piece in (text, "<|round_end|>")] and emptied(asked) == [
            {"i": 1}
        ]


def test_one_query_per_thread(model, processor, pictures):  # noqa: F811
    """As clients do: each thread has queues of its own, and sends one query and a stop. Nothing is said in a warning
    alone."""
    query = query_of(
        messages=user({"type": "image", "image_url": pictures[0]}, "What?"), images=[pictures[0]], **RECORD
    )
    query["media_kwargs"] = {**SMALL, "video_fps": 1.0, "max_frames": 256, "multi_image_max_pixels": 201326592}
    queues = [(queue.Queue(), queue.Queue()) for _ in range(3)]
    joins = []
    for asked, said in queues:
        joins.append(start(model, processor, asked, said))
        asked.put(query)
        asked.put({"stop_offline_generate": True})
    for join in joins:
        join()
    assert [emptied(said) for _, said in queues] == [[text_of(model, processor, query), "<|round_end|>"]] * 3


def test_an_array_is_no_cancel_flag(model, processor):  # noqa: F811
    """It neither ends the answer that is being generated nor breaks it; its own round is an error."""
    asked, said = queue.Queue(), queue.Queue()  # noqa: F811
    for query in (
        query_of("a"),
        {**query_of("b"), "stop_generation": np.ones(2)},
        query_of("c"),
        {"stop_offline_generate": True},
    ):
        asked.put(query)
    start(model, processor, asked, said)()
    texts = [text_of(model, processor, query_of(prompt)) for prompt in "ac"]
    error = "[ERROR] stop_generation must be True or False, got a ndarray"
    assert emptied(said) == [piece for text in (texts[0], error, texts[1]) for piece in (text, "<|round_end|>")]


@pytest.mark.parametrize("flag", [True, np.bool_(True), 1])
def test_flags_that_cancel(model, processor, flag):  # noqa: F811
    asked, said = queue.Queue(), queue.Queue()  # noqa: F811
    endless = query_of("Hi", generate=dict(max_new_tokens=100_000, suppress_tokens=[processor.tokenizer.eos_token_id]))
    for query in (endless, {"cancel_current_generate": flag}, {"stop_offline_generate": True}):
        asked.put(query)
    start(model, processor, asked, said)()
    assert emptied(said)[-1] == "<|round_end|>" and asked.empty()


def test_a_stack_of_queries_keeps_its_order(model, processor):  # noqa: F811
    asked, said = queue.LifoQueue(), queue.Queue()  # noqa: F811
    for query in ({"id": 1}, {"id": 2}, {"stop_offline_generate": True}, query_of("a")):
        asked.put(query)
    start(model, processor, asked, said)()
    assert emptied(asked) == [{"id": 2}, {"id": 1}]
