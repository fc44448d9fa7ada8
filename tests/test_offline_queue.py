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


def test_an_error_is_reported_and_the_next_query_answered(model, processor):
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
    new_queries, output = queue.Queue(), queue.Queue()
    server = threading.Thread(target=model.offline_generate, args=(processor, new_queries, output), daemon=True)
    server.start()
    new_queries.put(
        {
            **query_of(
                "Hi", generate=dict(max_new_tokens=100_000, suppress_tokens=[processor.tokenizer.eos_token_id])
            ),
            "stream_output": True,
        }
    )
    assert output.get(timeout=60) == "<|round_start|>"
    pieces = [output.get(timeout=60)]
    new_queries.put({"stop_generation": True})
    while pieces[-1] != "<|round_end|>":
        pieces.append(output.get(timeout=60))
    assert not pieces[0].startswith("[ERROR]")
    new_queries.put(query_of("a"))
    assert (
        output.get(timeout=60) == text_of(model, processor, query_of("a"))
        and output.get(timeout=60) == "<|round_end|>"
    )
    new_queries.put({"stop_offline_generate": True})
    server.join(60)
    assert not server.is_alive() and output.empty()


def test_persist_session_continues_the_conversation(model, processor):
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


def test_two_threads_may_call_at_once(model, processor, pictures):
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
    """A queue that offers only `get`, `get_nowait`, `put` and `qsize`, as one between processes does."""

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
def test_queries_after_a_stop_stay_on_the_queue(model, processor, kind):
    after = [query_of("b"), {"id": "odd"}, {"stop_offline_generate": True}]

    class Output(queue.Queue):
        def put(self, piece):
            super().put(piece)
            if piece == "<|round_end|>":
                new_queries.put(after[-1])  # arrives between the last token and the stop

    new_queries, output = kind(), Output()
    for query in (
        query_of("a"),
        {"stop_offline_generate": True},
        *after[:-1],
    ):  # all are queued while the first is answered
        new_queries.put(query)
    start(model, processor, new_queries, output)()
    assert emptied(output) == [text_of(model, processor, query_of("a")), "<|round_end|>"]
    assert emptied(new_queries) == after


def test_a_second_server_continues_after_a_stop(model, processor):
    new_queries, output = queue.Queue(), queue.Queue()
    texts = [text_of(model, processor, query_of(prompt)) for prompt in "abc"]
    for query in (
        query_of("a"),
        {"stop_offline_generate": True},
        query_of("b"),
        query_of("c"),
        {"stop_offline_generate": True},
    ):
        new_queries.put(query)
    start(model, processor, new_queries, output)()
    new_queries.put({"last": True})
    start(model, processor, new_queries, output)()
    assert emptied(output) == [piece for text in texts for piece in (text, "<|round_end|>")]
    assert emptied(new_queries) == [{"last": True}]


def test_an_interrupted_server_loses_only_the_current_query(model, processor, monkeypatch):
    new_queries, output = queue.Queue(), queue.Queue()
    generate = model.generate

    def interrupted(**kwargs):
        generate(**kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "generate", interrupted)
    for prompt in "abc":
        new_queries.put(query_of(prompt))
    with pytest.raises(KeyboardInterrupt):
        start(model, processor, new_queries, output)()
    assert emptied(new_queries) == [query_of("b"), query_of("c")] and output.empty()


def test_a_cancel_after_a_stop_ends_the_current_answer(model, processor):
    new_queries, output = queue.Queue(), queue.Queue()
    endless = query_of("Hi", generate=dict(max_new_tokens=100_000, suppress_tokens=[processor.tokenizer.eos_token_id]))
    for query in (endless, {"stop_offline_generate": True}, {**query_of("b"), "cancel_current_generate": True}):
        new_queries.put(query)
    start(model, processor, new_queries, output)()
    assert emptied(output)[-1] == "<|round_end|>" and emptied(new_queries) == [query_of("b")]


@pytest.mark.parametrize("flag", ["cancel_current_generate", "stop_generation"])
def test_flags_that_are_false_or_none_have_no_effect(model, processor, flag):
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


def test_persist_session_none_is_the_default(model, processor):
    alone = text_of(model, processor, query_of("two"))
    assert serve(model, processor, query_of("one", persist_session=None), query_of("two"))[1] == [alone]
    assert batch(model, processor, query_of("one", persist_session=None))["session_states"] != [None]


def test_two_servers_run_at_once(model, processor, pictures):
    queries = [[query_of(f"{i}{k}", images=pictures[i], id=k) for k in range(4)] for i in range(2)]
    alone = [[text_of(model, processor, query) for query in each] for each in queries]
    queues = [(queue.Queue(), queue.Queue()) for _ in queries]
    for (new_queries, _), each in zip(queues, queries, strict=True):
        for query in (*each, {"stop_offline_generate": True}, {"i": 1}):
            new_queries.put(query)
    for join in [start(model, processor, *pair) for pair in queues]:
        join()
    for (new_queries, output), texts in zip(queues, alone, strict=True):
        assert emptied(output) == [piece for text in texts for piece in (text, "<|round_end|>")] and emptied(
            new_queries
        ) == [{"i": 1}]


def test_a_server_per_query_works(model, processor, pictures):
    """As clients do: each thread has two queues, and sends one query and a stop."""
    query = query_of(
        messages=user({"type": "image", "image_url": pictures[0]}, "What?"), images=[pictures[0]], **RECORD
    )
    query["media_kwargs"] = {**SMALL, "video_fps": 1.0, "max_frames": 256, "multi_image_max_pixels": 201326592}
    queues = [(queue.Queue(), queue.Queue()) for _ in range(3)]
    joins = []
    for new_queries, output in queues:
        joins.append(start(model, processor, new_queries, output))
        new_queries.put(query)
        new_queries.put({"stop_offline_generate": True})
    for join in joins:
        join()
    assert [emptied(output) for _, output in queues] == [[text_of(model, processor, query), "<|round_end|>"]] * 3


def test_an_array_as_cancel_flag_is_an_error_of_its_query(model, processor):
    """It does not affect the answer that is being generated; the round of its query is an error."""
    new_queries, output = queue.Queue(), queue.Queue()
    for query in (
        query_of("a"),
        {**query_of("b"), "stop_generation": np.ones(2)},
        query_of("c"),
        {"stop_offline_generate": True},
    ):
        new_queries.put(query)
    start(model, processor, new_queries, output)()
    texts = [text_of(model, processor, query_of(prompt)) for prompt in "ac"]
    error = "[ERROR] stop_generation must be True or False, got a ndarray"
    assert emptied(output) == [piece for text in (texts[0], error, texts[1]) for piece in (text, "<|round_end|>")]


@pytest.mark.parametrize("flag", [True, np.bool_(True), 1])
def test_flags_of_all_boolean_types_cancel(model, processor, flag):
    new_queries, output = queue.Queue(), queue.Queue()
    endless = query_of("Hi", generate=dict(max_new_tokens=100_000, suppress_tokens=[processor.tokenizer.eos_token_id]))
    for query in (endless, {"cancel_current_generate": flag}, {"stop_offline_generate": True}):
        new_queries.put(query)
    start(model, processor, new_queries, output)()
    assert emptied(output)[-1] == "<|round_end|>" and new_queries.empty()


def test_a_lifo_queue_keeps_its_order(model, processor):
    new_queries, output = queue.LifoQueue(), queue.Queue()
    for query in ({"id": 1}, {"id": 2}, {"stop_offline_generate": True}, query_of("a")):
        new_queries.put(query)
    start(model, processor, new_queries, output)()
    assert emptied(new_queries) == [{"id": 2}, {"id": 1}]
