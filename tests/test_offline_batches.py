"""Batches of the offline methods: their limits, their memory, and what is computed and read once."""

import gc
import weakref

import pytest
import torch
from offline import (  # noqa: F401 - most are fixtures
    LONGER_VIDEO,
    SMALL,
    VIDEO,
    batch,
    calls,
    model,
    pictures,
    processor,
    query_of,
    text_of,
)
from transformers import TextIteratorStreamer

from moss_vl import generation_utils, video_files
from moss_vl.generation_streams import BatchStream
from moss_vl.processing_moss_vl import MossVLProcessor


def texts_of(model, processor, queries, **kwargs):
    return [item["text"] for item in batch(model, processor, *queries, **kwargs)["results"]]


def endless(processor, tokens, **rest):
    return dict(max_new_tokens=tokens, suppress_tokens=[processor.tokenizer.eos_token_id], **rest)


@pytest.fixture
def forwards(model, monkeypatch):
    """The shape of `input_ids` of every prefill, and the caches of every joint call."""
    prefills, joint, decode = [], [], model.decode_rows

    def record(module, args, kwargs):
        ids = kwargs.get("input_ids")
        if ids is not None and ids.shape[1] > 1:
            prefills.append(tuple(ids.shape))

    monkeypatch.setattr(
        model, "decode_rows", lambda tokens, caches: joint.append(list(caches)) or decode(tokens, caches)
    )
    hook = model.register_forward_pre_hook(record, with_kwargs=True)
    yield prefills, joint
    hook.remove()


@pytest.fixture
def media_come_first(monkeypatch):
    """No token is computed while the background thread prepares a query, so that rows do not depend on its speed."""
    advance = BatchStream._advance

    def waits(stream):
        with stream._changed:
            while stream._preparing:
                assert stream._changed.wait(60)
        return advance(stream)

    monkeypatch.setattr(BatchStream, "_advance", waits)


# what is computed


def test_prompts_of_a_batch_are_computed_without_padding(model, processor, pictures, forwards, media_come_first):
    queries = [
        query_of("Hi"),
        query_of("Describe the picture, please, in a few words.", images=pictures[0]),
        query_of("What happens?", videos=[VIDEO]),
        query_of("Sampled", generate=dict(do_sample=True)),
    ]
    needed = []
    for query in queries:
        text_of(model, processor, query)
        needed.append(forwards[0].pop())
    batch(model, processor, *queries)
    assert sorted(forwards[0]) == sorted(needed) and len({length for _, length in needed}) == 4
    assert max(len(caches) for caches in forwards[1]) == 4


def test_beams_share_a_call_that_has_little_padding(model, processor, calls):
    """Here the second prompt is too long for the others, and the others have the same options but for one."""
    beams = endless(processor, 4, num_beams=2)
    prompt = "Describe what moves, when it moves, and which way it moves"
    queries = [
        query_of(prompt, generate=beams),
        query_of(f"{prompt}. {prompt}, please, once more", generate=beams),
        query_of(f"{prompt}, and", generate=beams),
        query_of(prompt, generate={**beams, "length_penalty": 0.5}),
        query_of(f"{prompt}!", generate=beams),
    ]
    alone = [text_of(model, processor, query) for query in queries]
    calls.clear()
    assert texts_of(model, processor, queries) == alone
    whole = [call for call in calls if "custom_generate" not in call]
    assert [len(call["input_ids"]) for call in whole] == [3, 1, 1]
    for call in whole:
        assert call["attention_mask"].numel() <= 1.1 * call["attention_mask"].sum()
    calls.clear()
    assert texts_of(model, processor, queries, batch_size=2) == alone
    assert max(len(call["input_ids"]) for call in calls) == 2


def test_options_that_padding_would_change_share_a_call_at_equal_lengths_only(model, processor, calls):
    """no_repeat_ngram_size would count padding."""
    options = dict(num_beams=2, no_repeat_ngram_size=2)
    queries = [query_of(prompt, generate=options) for prompt in ("ab", "ab", "abc d", "ab")]
    texts = texts_of(model, processor, queries)
    assert texts == [text_of(model, processor, query) for query in queries]
    whole = [len(call["input_ids"]) for call in calls if "custom_generate" not in call]
    assert whole[:2] == [3, 1]


def test_a_repetition_penalty_ignores_the_padding(model, processor, calls):
    """The padding token is the one that the shorter query generates first: if padding were penalised, it would
    change."""
    options = endless(processor, 1)
    first = processor.tokenizer.convert_tokens_to_ids(
        processor.tokenizer.tokenize(text_of(model, processor, query_of("Hi", generate=options)))
    )[0]
    options.update(repetition_penalty=100.0, pad_token_id=first, num_beams=2)
    queries = [query_of(prompt, generate=options) for prompt in ("Hi", "Hi, a")]
    alone = [text_of(model, processor, query) for query in queries]
    assert alone[0] == processor.tokenizer.decode([first])
    calls.clear()
    assert texts_of(model, processor, queries) == alone
    last = calls[-1]
    assert len(last["input_ids"]) == 2 and not last["attention_mask"].all()


def test_a_failing_call_of_several_answers_ends_only_those_that_fail(model, processor, monkeypatch):
    beams = endless(processor, 3, num_beams=2)
    queries = [query_of(prompt, generate=beams) for prompt in ("a", "b", "c")]
    want, generate, shared = texts_of(model, processor, queries), model.generate, []

    def fails(**kwargs):
        if "custom_generate" not in kwargs and len(kwargs["input_ids"]) > 1:
            shared.append(len(kwargs["input_ids"]))
            raise MemoryError("too many")
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", fails)
    assert texts_of(model, processor, queries) == want and shared == [3]


def test_a_group_that_is_interrupted_can_be_written_again(model, processor, monkeypatch):
    beams = endless(processor, 3, num_beams=2)
    queries = [query_of(prompt, generate=beams) for prompt in ("a", "b", "c")]
    want, generate, interrupted = texts_of(model, processor, queries), model.generate, []

    def stops(**kwargs):
        if "custom_generate" not in kwargs and not interrupted:
            interrupted.append(len(kwargs["input_ids"]))
            raise KeyboardInterrupt
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", stops)
    stream = model.stream_batch(processor, queries)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert [item["text"] for item in stream.results()["results"]] == want and interrupted == [3]


def test_one_of_several_beams_that_share_a_call_can_be_cancelled(model, processor):
    beams = endless(processor, 12, num_beams=2)
    queries = [query_of(prompt, generate=beams) for prompt in ("a", "b")]
    want = texts_of(model, processor, queries)
    stream = model.stream_batch(processor, queries)
    decode, tokens = model.model.forward, []

    def cancels(*args, **kwargs):
        tokens.append(1)
        if len(tokens) == 5:
            stream.cancel(1)
        return decode(*args, **kwargs)

    model.model.forward = cancels
    try:
        ends = {event.index: event for event in stream if event.kind == "end"}
    finally:
        del model.model.forward
    assert ends[0].text == want[0] and ends[0].reason == "length"
    assert ends[1].reason == "cancelled"


def test_the_streamer_of_each_query_gets_its_own_answer(model, processor):
    streamers = [
        TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True) for _ in range(2)
    ]
    texts = texts_of(model, processor, [query_of("ab", generate=dict(streamer=streamer)) for streamer in streamers])
    assert ["".join(streamer) for streamer in streamers] == texts


# limits


def test_limits_bound_what_is_written_at_once(model, processor, pictures, forwards, media_come_first):
    """Rows, tokens of prompts and answers, vision tokens. An answer that exceeds a limit alone is written."""
    options = endless(processor, 6)
    texts = [query_of("a", generate=options) for _ in range(5)]
    images = [query_of("a", images=pictures[2], generate=options) for _ in range(5)]
    alone = {"text": texts_of(model, processor, texts), "image": texts_of(model, processor, images)}
    forwards[0].clear()
    texts_of(model, processor, texts[:1])
    [(_, length)] = forwards[0]
    per_image = (96 // 32) * (160 // 32) + 1
    for queries, name, limits, most in (
        (texts, "text", dict(batch_size=3), 3),
        (texts, "text", dict(max_text_tokens=2 * (length + 6)), 2),
        (texts, "text", dict(max_text_tokens=2 * (length + 6) - 1), 1),
        (images, "image", dict(max_vision_tokens=3 * per_image), 3),
        (images, "image", dict(max_vision_tokens=3 * per_image - 1), 2),
        (images, "image", dict(max_vision_tokens=1), 1),
        (images, "image", dict(prepared_bytes=0), 5),
    ):
        forwards[1].clear()
        assert texts_of(model, processor, queries, **limits) == alone[name]
        assert max(len(caches) for caches in forwards[1]) == most, limits


def test_wrong_limits_are_errors(model, processor):
    for name in ("batch_size", "max_text_tokens", "max_vision_tokens"):
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got 0"):
            batch(model, processor, query_of("a"), **{name: 0})
        with pytest.raises(ValueError, match=f"{name} must be"):
            model.stream_batch(processor, [query_of("a")], **{name: "many"})
    with pytest.raises(ValueError, match="prepared_bytes must be a number of bytes, got -1"):
        batch(model, processor, query_of("a"), prepared_bytes=-1)


def live_bytes() -> int:
    """Bytes of all tensors that can be reached."""
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def test_memory_does_not_grow_with_the_number_of_queries(model, processor, pictures, monkeypatch, media_come_first):
    """The most bytes of tensors at one of 12 joint calls of 2 rows, for 8, 80 and 800 queries."""
    decode, peaks, options = model.decode_rows, [], endless(processor, 3)
    for count in (8, 80, 800):
        held, left = [], [count]

        def spy(tokens, caches, held=held, left=left, every=max(1, count // 12)):
            left[0] -= 1
            if len(caches) == 2 and left[0] % every == 0:
                held.append(live_bytes())
            return decode(tokens, caches)

        monkeypatch.setattr(model, "decode_rows", spy)
        queries = [query_of("a", images=pictures[0], use_template=False, generate=options) for _ in range(count)]
        gc.collect()
        before = live_bytes()
        assert len(batch(model, processor, *queries, batch_size=2, prepared_bytes=1)["results"]) == count
        peaks.append(max(held) - before)
    assert min(peaks) > 0 and max(peaks) <= 1.1 * min(peaks), peaks


def test_a_result_keeps_no_tensors_alive(model, processor, pictures, monkeypatch):
    seen, process = [], MossVLProcessor.__call__

    def spy(*args, **kwargs):
        made = process(*args, **kwargs)
        seen.append(weakref.ref(made["pixel_values"]))
        return made

    monkeypatch.setattr(MossVLProcessor, "__call__", spy)
    out = batch(model, processor, *(query_of("a", images=picture) for picture in pictures))
    gc.collect()
    assert len(out["results"]) == 3 and [one() for one in seen] == [None] * 3


# the index of a video


@pytest.fixture
def scans(monkeypatch):
    """The name of each file whose packets were read for an index."""
    names, read = [], video_files.PacketScan.read

    def spy(av, container, stream, size, limits, name, problems):
        names.append(name.rsplit("/", 1)[-1])
        return read(av, container, stream, size, limits, name, problems)

    monkeypatch.setattr(video_files.PacketScan, "read", spy)
    return names


def test_the_index_of_a_video_is_read_once(model, processor, scans, monkeypatch):
    queries = [
        query_of("a", videos=[VIDEO]),
        query_of("b", videos=[LONGER_VIDEO, {"video_path": VIDEO, "segments": [[0.0, 0.3], [0.4]]}]),
        query_of("c"),
    ]
    alone = [text_of(model, processor, query) for query in queries]
    assert len(scans) == 3
    scans.clear()
    assert texts_of(model, processor, queries) == alone
    assert len(scans) == 3
    scans.clear()
    monkeypatch.setattr(generation_utils, "INDEX_BYTES", 0)  # too many videos to keep their indexes
    assert texts_of(model, processor, queries) == alone
    assert len(scans) == 6


def test_the_index_of_a_planned_video_has_few_bytes(processor):
    [clip] = processor.video_processor.plan(VIDEO)
    index = clip.video.index
    assert index.times.nbytes + index.stamps.nbytes < clip.video.index_bytes < 100 * len(index.stamps)
