"""Streams of many answers: each is the one that its query gets alone, in whatever order they are written."""

import asyncio
import gc
import threading
import weakref

import pytest
import torch
from offline import (  # noqa: F401 - most are fixtures
    LONGER_VIDEO,
    NEW,
    SMALL,
    VIDEO,
    batch,
    calls,
    model,
    nothing_is_encoded,
    pictures,
    processor,
    query_of,
    text_of,
    user,
)
from transformers import LogitsProcessor, StoppingCriteria

from moss_vl import generation_streams
from moss_vl.generation_rows import PieceStreamer, TokenBuffer
from moss_vl.processing_moss_vl import MossVLProcessor


def mixed(pictures):
    """Queries of text, images, videos, a conversation, and many options."""
    return [
        query_of("Hi", generate=dict(max_new_tokens=30)),
        query_of("What?", images=pictures[0], generate=dict(max_new_tokens=3)),
        query_of("And?", images=pictures, generate=dict(max_new_tokens=17, repetition_penalty=1.3)),
        query_of("When?", videos=VIDEO, generate=dict(max_new_tokens=9, no_repeat_ngram_size=2)),
        query_of("Where?", videos=[LONGER_VIDEO], media={**SMALL, "num_frames": 4}, id=7),
        query_of("Hi", use_template=False, generate=dict(max_new_tokens=1)),
        query_of(messages=user({"type": "image", "image": pictures[1]}, "Why?"), generate=dict(min_new_tokens=5)),
        query_of("Who?", system_prompt="Be brief.", generate=dict(max_new_tokens=12, suppress_tokens=[5, 6])),
    ]


def pieces_of(events):
    texts, ends = {}, {}
    for event in events:
        assert event.index not in ends, "an event after the end"
        if event.kind == "piece":
            assert event.text
            texts.setdefault(event.index, []).append(event.text)
        else:
            ends[event.index] = event
    return texts, ends


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_each_answer_is_the_one_that_the_query_gets_alone(model, processor, pictures, batch_size):
    queries = mixed(pictures)
    alone = [batch(model, processor, query) for query in queries]
    texts, ends = pieces_of(model.stream_batch(processor, queries, batch_size=batch_size))
    assert sorted(ends) == list(range(8))
    for index, (query, want) in enumerate(zip(queries, alone, strict=True)):
        end = ends[index]
        assert "".join(texts.get(index, [])) == end.text == want["results"][0]["text"], query
        assert end.result == {**want["results"][0], "index": index}
        assert end.session_state == want["session_states"][0]
    assert ends[0].reason in ("length", "stop") and ends[5].reason == "length"


def test_answers_are_written_beside_each_other(model, processor, monkeypatch):
    """While a long answer is written, short ones end and others take their rows, up to `batch_size`."""
    eos = processor.tokenizer.eos_token_id
    lengths = [40, 5, 6, 7, 8, 9]
    queries = [query_of(f"{n}", generate=dict(max_new_tokens=n, suppress_tokens=[eos])) for n in lengths]
    rows, decode = [], model.decode_rows
    monkeypatch.setattr(
        model, "decode_rows", lambda tokens, caches: rows.append(len(caches)) or decode(tokens, caches)
    )
    ends = [event.index for event in model.stream_batch(processor, queries, batch_size=3) if event.kind == "end"]
    assert ends[-1] == 0 and ends[:5] == [1, 2, 3, 4, 5]
    assert max(rows) == 3 and sum(rows) == sum(lengths) - len(lengths) and len(rows) < 45


def test_sessions_go_on(model, processor, pictures):
    first = batch(model, processor, query_of("What?", images=pictures[0]), query_of("Hi"))
    queries = [query_of("And now?"), query_of("a", reset_session=True)]
    want = batch(model, processor, *queries, session_states=first["session_states"])
    got = model.stream_batch(processor, queries, first["session_states"]).results()
    assert got == want


# options


def test_beams_and_other_methods_are_written_alone(model, processor, pictures, calls):
    queries = [
        query_of("Hi", images=pictures[0], generate=dict(num_beams=3)),
        query_of("Hi", generate=dict(prompt_lookup_num_tokens=2)),
        query_of("Hi", generate=dict(use_cache=False)),
        query_of("Hi", generate=dict(cache_implementation="static")),
        query_of("Hi"),
    ]
    texts, ends = pieces_of(model.stream_batch(processor, queries))
    for index, query in enumerate(queries):
        assert ends[index].text == text_of(model, processor, query)
    assert [len(texts[index]) for index in range(3)] == [1, 1, 1]


def test_stop_strings_criteria_and_processors_of_a_query(model, processor):
    whole = text_of(model, processor, query_of("Hi", generate=dict(max_new_tokens=30)))
    asked = []

    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            asked.append(input_ids)
            return torch.full((len(input_ids),), len(asked) == 4)

    class Only(LogitsProcessor):
        def __call__(self, input_ids, scores):
            kept = torch.full_like(scores, float("-inf"))
            kept[:, 40 + input_ids.shape[1] % 7] = 0
            return kept

    queries = [
        query_of("Hi", generate=dict(max_new_tokens=30, stop_strings=whole[5:7])),
        query_of("Hi", generate=dict(logits_processor=[Only()])),
        query_of("Hi", generate=dict(max_new_tokens=4, do_sample=False)),
    ]
    want = [text_of(model, processor, query) for query in queries]
    stops = query_of("Hi", generate=dict(max_new_tokens=30, stopping_criteria=[Stop()]))
    texts, ends = pieces_of(model.stream_batch(processor, [*queries, stops]))
    assert [ends[index].text for index in range(3)] == want
    assert whole[5:7] in ends[0].text and ends[0].reason == "stop"
    assert ends[3].text == want[2] and len(asked) == 4
    lengths = [ids.shape[1] for ids in asked]
    assert lengths == list(range(lengths[0], lengths[0] + 4))
    assert all(torch.equal(ids, asked[-1][:, : ids.shape[1]]) for ids in asked), "earlier tokens do not change"


def test_sampling_draws_as_generate_does(model, processor):
    query = query_of("Hi", generate=dict(do_sample=True, temperature=0.9, top_k=20, max_new_tokens=20))
    torch.manual_seed(3)
    want = text_of(model, processor, query)
    torch.manual_seed(3)
    assert model.stream_batch(processor, [query]).results()["results"][0]["text"] == want


def test_a_streamer_of_the_caller_gets_the_tokens(model, processor):
    class Streamer:
        def __init__(self):
            self.values = []

        def put(self, value):
            self.values.append(value)

        def end(self):
            self.values.append(None)

    alone, beside = Streamer(), Streamer()
    text_of(model, processor, query_of("Hi", generate=dict(streamer=alone)))
    query = query_of("Hi", generate=dict(streamer=beside))
    model.stream_batch(processor, [query_of("a"), query, query_of("b")]).results()
    assert len(beside.values) == len(alone.values) and beside.values[-1] is alone.values[-1] is None
    assert all(torch.equal(*pair) for pair in zip(alone.values[:-1], beside.values[:-1], strict=True))


# errors, cancelling, adding


def test_an_error_ends_its_query_only(model, processor, pictures):
    class Fails(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] % 4 == 0:
                raise RuntimeError("no idea")
            return scores

    good = [query_of("Hi"), query_of("What?", images=pictures[0])]
    bad = [
        {"promt": "Hi"},
        query_of("a", images=["nowhere.png"]),
        query_of("Hi", generate=dict(logits_processor=[Fails()])),
    ]
    texts, ends = pieces_of(model.stream_batch(processor, [good[0], *bad, good[1]]))
    assert [ends[index].text for index in (0, 4)] == [text_of(model, processor, query) for query in good]
    assert isinstance(ends[1].error, ValueError) and "query 1: query: unknown key 'promt'" in str(ends[1].error)
    assert isinstance(ends[2].error, FileNotFoundError) and "nowhere.png" in str(ends[2].error)
    assert isinstance(ends[3].error, RuntimeError)
    results = model.stream_batch(processor, [good[0], *bad]).results()
    assert results["results"][1].keys() == {"index", "error"} and results["session_states"][1] is None


class Panic(BaseException):
    """What a library in Rust raises."""


def test_an_error_at_the_end_of_an_answer_ends_its_query_only(model, processor, monkeypatch):
    """No memory to keep the cache of the first answer."""
    keep, failed = generation_streams.keep_cache_of, []

    def short_of_memory(*args):
        if not failed:
            failed.append(True)
            raise MemoryError("no memory")
        return keep(*args)

    queries = [query_of("Hi", generate=dict(max_new_tokens=2)), query_of("What?")]
    want = text_of(model, processor, queries[1])
    monkeypatch.setattr(generation_streams, "keep_cache_of", short_of_memory)
    stream = model.stream_batch(processor, queries, keep_cache=True)
    _, ends = pieces_of(stream)
    assert isinstance(ends[0].error, MemoryError) and ends[1].text == want
    assert not stream._rows and ends[1].session_state.has_cache


def test_a_panic_while_a_query_is_prepared_ends_it_only(model, processor, monkeypatch):
    prepare = generation_streams.prepare_turn

    def panic(model, processor, turn, alone):
        if "Bad" in turn.text:
            raise Panic("out of range")
        return prepare(model, processor, turn, alone)

    monkeypatch.setattr(generation_streams, "prepare_turn", panic)
    _, ends = pieces_of(model.stream_batch(processor, [query_of("Bad"), query_of("Hi")]))
    assert "Panic: out of range" in str(ends[0].error) and ends[1].text == text_of(model, processor, query_of("Hi"))


@pytest.mark.parametrize("options", [dict(num_beams=2), dict(use_cache=False), dict(prefill_chunk_size=3), {}])
def test_the_reason_of_an_answer_that_is_as_long_as_max_length(model, processor, options):
    width = len(processor.tokenizer(text_in(processor, "Hi"))["input_ids"])
    for limit in (dict(max_length=width + 4), dict(max_new_tokens=4)):
        query = {"prompt": "Hi", "generate_kwargs": {**limit, **options, "eos_token_id": [1]}}
        [end] = [event for event in model.stream_batch(processor, [query]) if event.kind == "end"]
        assert end.reason == "length", limit


def text_in(processor, prompt) -> str:
    message = {"role": "user", "content": prompt}
    return processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("with_media", [False, True])
def test_frames_of_kept_caches_count_for_the_limits(model, processor, pictures, monkeypatch, with_media):
    """Turns that continue a cache are written one after the other, as the whole conversations would be."""
    first = [query_of("Hi", images=pictures[0]), query_of("What?", images=pictures[1])]
    states = batch(model, processor, *first, keep_cache=True)["session_states"]
    queries = [query_of("And?", images=pictures[0] if with_media else None) for _ in states]
    want = batch(model, processor, *queries, session_states=states)["results"]
    rows, decode = [], model.decode_rows
    monkeypatch.setattr(
        model, "decode_rows", lambda tokens, caches: rows.append(len(caches)) or decode(tokens, caches)
    )
    for limit, most in ((1 << 17, 2), (8, 1)):
        rows.clear()
        got = batch(model, processor, *queries, session_states=states, max_vision_tokens=limit)["results"]
        assert [one["text"] for one in got] == [one["text"] for one in want] and max(rows) == most


def test_a_failing_joint_call_ends_only_the_rows_that_fail(model, processor, monkeypatch):
    queries = [query_of(prompt) for prompt in ("a", "b", "c")]
    want = [text_of(model, processor, query) for query in queries]
    decode, caches_seen, of_one_row = model.decode_rows, [], []

    def short_of_memory(tokens, caches):
        caches_seen.append(len(caches))
        fails = len(caches) == 1 and len(caches_seen) >= 8 and not of_one_row
        if len(caches) > 2 or fails:
            of_one_row.extend([True] * fails)
            raise MemoryError("too many")
        return decode(tokens, caches)

    monkeypatch.setattr(model, "decode_rows", short_of_memory)
    ends = pieces_of(model.stream_batch(processor, queries))[1]
    failed = [index for index, end in ends.items() if end.kind == "error"]
    assert len(failed) == 1 and isinstance(ends[failed[0]].error, MemoryError) and 3 in caches_seen
    assert all(ends[index].text == want[index] for index in range(3) if index not in failed)


def test_cancel_frees_a_row_and_keeps_what_was_written(model, processor):
    eos = processor.tokenizer.eos_token_id
    endless = query_of("Hi", generate=dict(max_new_tokens=100_000, suppress_tokens=[eos]))
    want = text_of(model, processor, query_of("a"))
    stream = model.stream_batch(processor, [endless, query_of("a"), query_of("b")], batch_size=1)
    pieces = [next(stream), next(stream)]
    assert stream.cancel(0) and stream.cancel(2)
    texts, ends = pieces_of([*pieces, *stream])
    assert ends[0].reason == ends[2].reason == "cancelled" and ends[1].text == want
    assert ends[0].text == "".join(texts[0]) and ends[0].result["messages"][-1]["content"][0]["text"] == ends[0].text
    assert ends[2].text == "" and ends[2].session_state is None
    whole = text_of(model, processor, query_of("Hi", generate=dict(max_new_tokens=40, suppress_tokens=[eos])))
    assert whole.startswith(ends[0].text)
    assert not stream.cancel(0)
    for index in (3, -1, "0"):
        with pytest.raises(ValueError, match="index must be that of one of the 3 queries"):
            stream.cancel(index)


def test_beams_can_be_cancelled_from_another_thread(model, processor):
    query = query_of(
        "Hi", generate=dict(num_beams=2, max_new_tokens=100_000, suppress_tokens=[processor.tokenizer.eos_token_id])
    )
    stream = model.stream_batch(processor, [query, query_of("a")])
    threading.Timer(0.5, stream.cancel, args=(0,)).start()
    ends = pieces_of(stream)[1]
    assert ends[0].reason == "cancelled" and ends[1].text == text_of(model, processor, query_of("a"))


def test_queries_are_added_while_it_runs_and_after(model, processor):
    stream = model.stream_batch(processor, [query_of("a", generate=dict(max_new_tokens=20))])
    next(stream)
    assert stream.add(query_of("b")) == 1
    state = batch(model, processor, query_of("one"))["session_states"][0]
    assert stream.add(query_of("two"), state) == 2
    ends = pieces_of(stream)[1]
    assert ends[1].text == text_of(model, processor, query_of("b"))
    assert ends[2].text == text_of(model, processor, query_of("two"), session_states=[state])
    assert next(stream, None) is None
    with pytest.raises(ValueError, match="events were taken from the stream"):
        stream.results()
    stream.add(query_of("c"))
    assert pieces_of(stream)[1][3].text == text_of(model, processor, query_of("c"))
    stream.close()
    with pytest.raises(ValueError, match="the stream is closed"):
        stream.add(query_of("d"))


def test_an_open_stream_waits_for_queries(model, processor):
    ends = {}
    with model.stream_batch(processor, open_ended=True) as stream:
        thread = threading.Thread(
            target=stream.for_each, args=(lambda event: ends.setdefault((event.kind, event.index), event),)
        )
        thread.start()
        for prompt in "abc":
            stream.add(query_of(prompt))
        stream.finish()
        thread.join(60)
        assert not thread.is_alive()
    for index, prompt in enumerate("abc"):
        assert ends["end", index].text == text_of(model, processor, query_of(prompt))


def test_closing_ends_the_iteration_and_frees_rows(model, processor):
    query = query_of("Hi", generate=dict(max_new_tokens=100_000, suppress_tokens=[processor.tokenizer.eos_token_id]))
    stream = model.stream_batch(processor, [query] * 3)
    for _, event in zip(range(5), stream, strict=False):
        assert event.kind == "piece"
    stream.close()
    assert list(stream) == [] and not stream._rows


@pytest.mark.parametrize("name", ["generate", "decode_rows"])
def test_an_interrupted_stream_goes_on(model, processor, pictures, monkeypatch, name):
    """Ctrl-C in a prefill or in a step loses no query and no token."""
    queries = mixed(pictures)[:3]
    want = [text_of(model, processor, query) for query in queries]
    whole, count = getattr(model, name), []

    def interrupted(*args, **kwargs):
        result = whole(*args, **kwargs) if len(count) != 1 or name == "generate" else None
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(model, name, interrupted)
    stream, events = model.stream_batch(processor, queries), []
    with pytest.raises(KeyboardInterrupt):
        for event in stream:
            events.append(event)
    texts, ends = pieces_of([*events, *stream])
    assert [ends[index].text for index in range(3)] == want


def test_an_error_keeps_no_tensors_alive(model, processor, pictures):
    class Fails(LogitsProcessor):
        def __call__(self, input_ids, scores):
            self.seen = weakref.ref(scores)
            raise RuntimeError("no idea")

    fails = Fails()
    query = query_of("a", images=pictures[2], generate=dict(logits_processor=[fails]))
    [event] = model.stream_batch(processor, [query])
    gc.collect()
    assert event.kind == "error" and event.error.__traceback__ is not None and fails.seen() is None


def test_an_error_of_a_query_keeps_no_pixels_alive(model, processor, pictures, monkeypatch):
    seen, process = [], MossVLProcessor.__call__

    def fails(*args, **kwargs):
        made = process(*args, **kwargs)
        seen.append(weakref.ref(made["pixel_values"]))
        raise ValueError("no idea")

    monkeypatch.setattr(MossVLProcessor, "__call__", fails)
    events = list(model.stream_batch(processor, [query_of("a", images=picture) for picture in pictures]))
    gc.collect()
    assert [event.kind for event in events] == ["error"] * 3 and [one() for one in seen] == [None] * 3


def test_async_iteration_loses_no_event_if_a_wait_is_cancelled(model, processor, pictures):
    queries = mixed(pictures)[:4]
    alone = [text_of(model, processor, query) for query in queries]

    async def collect():
        events, timeouts = [], 0
        stream = model.stream_batch(processor, queries)
        while True:
            try:
                events.append(await asyncio.wait_for(anext(stream), 0.001))
            except asyncio.TimeoutError:
                timeouts += 1
            except StopAsyncIteration:
                return events, timeouts

    events, timeouts = asyncio.run(collect())
    texts, ends = pieces_of(events)
    assert timeouts and [ends[index].text for index in range(4)] == alone

    async def whole():
        return [event async for event in model.stream_batch(processor, queries)]

    assert [pieces_of(asyncio.run(whole()))[1][index].text for index in range(4)] == alone


def test_async_readers_share_events_and_another_loop_goes_on(model, processor, pictures):
    queries = mixed(pictures)[:4]
    alone = [text_of(model, processor, query) for query in queries]
    events, stream = [], model.stream_batch(processor, queries)

    async def read():
        async for event in stream:
            events.append(event)

    async def leave():
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        waiting.cancel()

    async def read_twice():
        await asyncio.gather(read(), read())

    asyncio.run(leave())
    asyncio.run(read_twice())
    texts, ends = pieces_of(sorted(events, key=lambda event: event.kind == "end"))
    assert len({id(event) for event in events}) == len(events)
    assert [ends[index].text for index in range(4)] == alone
    assert ["".join(texts.get(index, [])) for index in range(4)] == alone


# the background thread


@pytest.mark.parametrize("budget, ahead", [(0, 1), (1, 1), (64 * 64 * 3 + 1, 2), (1 << 30, 5)])
def test_media_are_prepared_ahead_within_a_budget(model, processor, pictures, monkeypatch, budget, ahead):
    """One query is always prepared; others only while the waiting pixels, 64 x 64 x 3 bytes per query, are below the
    budget."""
    read, process = [], MossVLProcessor.__call__
    monkeypatch.setattr(MossVLProcessor, "__call__", lambda *a, **k: read.append(k) or process(*a, **k))
    queries = [query_of("a", images=pictures[0], generate=dict(max_new_tokens=50)) for _ in range(30)]
    with model.stream_batch(processor, queries, batch_size=5, prepared_bytes=budget) as stream:
        next(stream)
        with stream._changed:
            while stream._preparing:
                assert stream._changed.wait(30)
            assert len(read) == len(queries) - len(stream._to_start) + ahead


def test_wrong_arguments_are_errors_before_anything_runs(model, processor, nothing_is_encoded):
    for kwargs, message in (
        (dict(batch_size=0), "batch_size must be a whole number of at least 1"),
        (dict(prepared_bytes=-1), "prepared_bytes must be a number of bytes"),
        (dict(open_ended="yes"), "open_ended must be"),
        (dict(vision_chunked_length=0), "vision_chunked_length must be"),
        (dict(session_states=[None]), "session_states must be None or a list with one state per query"),
    ):
        with pytest.raises(ValueError, match=message):
            model.stream_batch(processor, [query_of("a"), query_of("b")], **kwargs)
    with pytest.raises(ValueError, match="queries must be a list of dicts, got dict"):
        model.stream_batch(processor, query_of("a"))
    with pytest.raises(ValueError, match="processor must be a MossVLProcessor"):
        model.stream_batch(processor.tokenizer, [query_of("a")])
    assert list(model.stream_batch(processor, [])) == []
    assert model.stream_batch(processor).results() == {"results": [], "session_states": []}


# parts


def test_pieces_are_never_broken_characters(processor):
    text = "Ein Stück — 一只猫在看 🐈‍⬛🐈\nnext line,  two spaces\n\n日本語とhangul 한국어 ไทย end"
    streamer = PieceStreamer(processor.tokenizer)
    pieces = []
    for token in processor.tokenizer(text)["input_ids"]:
        streamer.write(token)
        pieces.append(streamer.take())
    streamer.end()
    assert not any("\ufffd" in piece for piece in pieces) and len([piece for piece in pieces if piece]) > 10
    assert streamer.text == "".join(pieces) + streamer.take() == text


def test_a_token_buffer_keeps_earlier_results():
    given = torch.arange(600)[None]
    buffer, seen = TokenBuffer(given[:, :3]), []
    for token in range(3, 600):
        seen.append(buffer.append(torch.tensor([token])))
    assert all(torch.equal(ids, given[:, : ids.shape[1]]) for ids in seen) and torch.equal(
        given, torch.arange(600)[None]
    )
    assert len({ids.data_ptr() for ids in seen}) < 5
