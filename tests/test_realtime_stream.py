"""The synchronous stream: exact token ids, positions, logits, sampling, and what it reports."""

import gc
import queue
import random
import weakref

import numpy as np
import pytest
import torch
from oracle import Oracle
from PIL import Image
from realtime import (
    IM_END,
    RESPONSE,
    SILENCE,
    encode,
    make_processor,
    make_realtime_model,
    make_tokenizer,
    model,  # noqa: F401
    names,
    picture,
    processor,  # noqa: F401
    raw,
    run,
    stream,
)
from tiny import close
from transformers import RepetitionPenaltyLogitsProcessor
from transformers.cache_utils import DynamicCache

from moss_vl.realtime_protocol import SYSTEM_PROMPT, TextPieces
from moss_vl.realtime_sampling import SamplingOptions
from moss_vl.realtime_stream import RealtimeStream


OPENING = (
    "<|im_start|>system\nYou are a helpful AI assistant specializing in real-time video analysis. The video streams "
    "to you frame by frame. At every frame, you decide independently whether to respond or stay silent \u2014 output "
    "`<|silence|>` when nothing relevant has happened, and respond when the visual content warrants it.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


def frame(seconds: str) -> str:
    return f"<|vision_start|><|time_start|>{seconds} seconds<|time_end|><|image_pad|><|vision_end|>"


def prompt(text: str) -> str:
    return f"<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n<|silence|>"


# token ids

# What happens, and the text of the tokens at the end. F: a frame, P: a prompt, W: what the model writes next, S:
# steps. After the last one the stream runs until it parks. Without W the model is silent.
F, P, W, S = "frame", "prompt", "write", "steps"
MIXTURES = {
    "nothing": ([], SILENCE),
    "a prompt, then a frame": (
        [(P, "Go on."), (S, 1), (F, 1.0)],
        SILENCE + prompt("Go on.") + SILENCE + frame("1.0") + SILENCE,
    ),
    "a frame, then a prompt": (
        [(F, 0.04), (S, 1), (P, "Go on.")],
        SILENCE + frame("0.0") + SILENCE + prompt("Go on.") + SILENCE,
    ),
    "only a prompt": (
        [(P, "What?"), (W, RESPONSE, "red", SILENCE)],
        SILENCE + prompt("What?") + RESPONSE + "red" + SILENCE,
    ),
    "several frames at once": (
        [(F, 0), (F, 0.5), (F, 12.25), (W, RESPONSE, " star", SILENCE)],
        SILENCE + frame("0.0") + frame("0.5") + frame("12.2") + RESPONSE + " star" + SILENCE,
    ),
    "two prompts at once": ([(P, "One."), (P, "Two.")], SILENCE + prompt("One.") + prompt("Two.") + SILENCE),
    "prompts before frames": (
        [(F, 3), (P, "One."), (F, 4), (P, "")],
        SILENCE + prompt("One.") + prompt("") + frame("3.0") + frame("4.0") + SILENCE,
    ),
    "a frame with its prompt": (
        [(F, 3), (F, 4, "What?")],
        SILENCE + prompt("What?") + frame("3.0") + frame("4.0") + SILENCE,
    ),
    "a frame during a reply": (
        [(F, 1), (W, RESPONSE, "red", RESPONSE, " star", SILENCE), (S, 2), (F, 2)],
        SILENCE + frame("1.0") + RESPONSE + "red" + frame("2.0") + RESPONSE + " star" + SILENCE,
    ),
    "a frame that ends a reply": (
        [(F, 1), (W, RESPONSE, "red", SILENCE), (S, 2), (F, 2)],
        SILENCE + frame("1.0") + RESPONSE + "red" + frame("2.0") + SILENCE,
    ),
    "a prompt during a reply": (
        [(F, 1), (W, RESPONSE, "red", RESPONSE, "blue", SILENCE), (S, 2), (P, "And?")],
        SILENCE + frame("1.0") + RESPONSE + "red" + prompt("And?") + RESPONSE + "blue" + SILENCE,
    ),
    "the end of a turn within an open stream": (
        [(F, 1), (W, IM_END, "red", SILENCE), (S, 3), (F, 2)],
        SILENCE + frame("1.0") + IM_END + "red" + SILENCE + frame("2.0") + SILENCE,
    ),
    "times are rounded to tenths": ([(F, 90.06), (F, 3601.96)], SILENCE + frame("90.1") + frame("3602.0") + SILENCE),
}


def play(made, script, happenings):
    events = run(made)
    for kind, *values in happenings:
        if kind == F:
            made.push_frame(picture(int(values[0])), *values)
        elif kind == P:
            made.push_prompt(*values)
        elif kind == W:
            script.tokens += [token for word in values for token in script.encode(word)]
        else:
            for _ in range(values[0]):
                events += made.step()
    return events + run(made)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_tokens_are_those_of_the_protocol(model, processor, name):
    happenings, expected = MIXTURES[name]
    made, script = stream(model, processor)
    play(made, script, happenings)
    assert processor.tokenizer.decode(made.ids) == OPENING.format("") + expected
    assert made.ids == encode(processor, OPENING.format("") + expected)
    for ids, _ in script.seen:  # each step saw the tokens before the one that it chose
        assert ids == made.ids[: len(ids)]
    assert made.fed == len(made.ids) - 1 == made.cache.get_seq_length()


def test_the_prompts_of_the_opening(model, processor):
    made, _ = stream(model, processor, initial_prompt="Tell me when.")
    assert names(run(made)) == ["PromptTaken", "Silence", "Parked"]
    assert made.ids == encode(processor, OPENING.format("Tell me when.") + SILENCE)
    assert SYSTEM_PROMPT in OPENING
    made, _ = stream(model, processor, system_prompt="Look.")
    run(made)
    assert made.ids == encode(
        processor,
        f"<|im_start|>system\nLook.<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n{SILENCE}",
    )


def test_one_step_is_one_forward_and_parking_none(model, processor):
    calls = []
    handle = model.register_forward_pre_hook(lambda *args: calls.append(1))
    made, script = stream(model, processor)
    try:
        for _ in range(3):
            made.step()
        assert len(calls) == 1 and made.parked
        script.tokens += script.encode(RESPONSE + "red" + SILENCE)
        for seconds in range(3):
            made.push_frame(picture(seconds), seconds)
        made.push_prompt("What?")
        made.step()
        assert len(calls) == 2 and not made.parked
        for _ in range(5):
            made.step()
        assert len(calls) == 4 and made.parked
    finally:
        handle.remove()


# positions and logits


def walk(ids, grids, image_pad, start=0):
    """Positions of the tokens by the definition, and the next one."""
    positions, p, sizes = [], start, iter(grids)
    for token in ids:
        if token == image_pad:
            p += max(next(sizes))
        positions.append(p)
        p += 1
    return positions, p


def test_the_walk_of_this_file_is_that_of_the_specification():
    assert walk([1, 9, 1], [(2, 3)], 9, start=7) == ([7, 11, 12], 13)
    assert walk([1] * 7 + [9, 1], [(2, 2)], 9, start=100) == ([*range(100, 107), 109, 110], 111)


@pytest.mark.parametrize(
    "start, before, grid, expected",
    [(7, 1, (2, 3), [7, 11, 12, 13]), (100, 7, (2, 2), [*range(100, 107), 109, 110, 111])],
)
def test_positions_continue_those_of_the_cache(model, start, before, grid, expected):
    """The checks of the specification, on a cache that holds `start` tokens."""
    seen = []
    handle = model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    ids, cache = torch.tensor([[5] * before + [model.config.image_token_id, 6]]), DynamicCache()
    rows, columns = (2 * side for side in grid)
    try:
        with torch.no_grad():
            model(torch.full((1, start), 5), cache=cache, use_cache=True)
            model(
                ids,
                cache=cache,
                use_cache=True,
                pixel_values=torch.rand(rows * columns, 768),
                grid_thw=[[1, rows, columns]],
            )
            model(torch.tensor([[5]]), cache=cache, use_cache=True)
    finally:
        handle.remove()
    assert seen[1][0].tolist() + seen[2][0].tolist() == expected


def random_stream(model, processor, seed, **options):
    """A stream in which prompts, frames of several sizes and replies come in random order; its script."""
    rng = random.Random(seed)
    made, script = stream(model, processor, free=True, max_new_tokens=rng.choice([3, 6]), **options)
    frames, seconds = [], 0.0
    made.step()
    for _ in range(25):
        kind = rng.choice(["frame", "frame", "prompt", "step", "step", "silence", "interrupt"])
        if kind == "frame":
            image = picture(rng.randrange(1 << 30), rng.choice([64, 96]), rng.choice([64, 128]))
            seconds += rng.choice([0, 0.3, 1])
            made.push_frame(image, seconds)
            frames.append(image)
        elif kind == "prompt":
            made.push_prompt(rng.choice(["What color?", "", "One\n\ntwo"]))
        elif kind == "silence":
            script.tokens[:] = script.encode(SILENCE)
        elif kind == "interrupt":
            made.interrupt()
        else:
            made.step()
    made.step()
    made.step()
    return made, script, frames


def whole(model, processor, ids, frames):
    """Logits [T, W] of one forward over the same tokens and frames, and of a slow implementation in float64."""
    pixels = [processor.image_processor(image, return_tensors="pt") for image in frames]
    media = {}
    if frames:
        media["pixel_values"] = torch.cat([one["pixel_values"] for one in pixels])
        media["grid_thw"] = torch.cat([one["image_grid_thw"] for one in pixels])
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False, **media).logits[0]
    oracle = Oracle(model)
    encoded = []
    for one in pixels:
        _, rows, columns = one["image_grid_thw"][0].tolist()
        encoded.append((oracle.encode(one["pixel_values"], rows, columns), rows // 2, columns // 2))
    return logits, oracle.logits(ids, encoded)


@pytest.mark.parametrize("seed, dtype", [*((seed, torch.float32) for seed in range(4)), (4, torch.float64)])
def test_any_cutting_gives_the_logits_of_one_forward(processor, dtype, seed):
    model = make_realtime_model(processor, dtype)
    made, script, frames = random_stream(model, processor, seed)
    logits, slow = whole(model, processor, made.ids, frames)
    assert len(script.seen) > 5
    for ids, found in script.seen:
        assert ids == made.ids[: len(ids)]
        close(found, logits[len(ids) - 1].to(found.dtype), f"token {len(ids) - 1}")
        close(found.double(), slow[len(ids) - 1], f"token {len(ids) - 1} of the slow implementation")


@pytest.mark.parametrize("seed", range(3))
def test_positions_of_random_streams(model, processor, seed):
    seen = []
    handle = model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    try:
        made, _, frames = random_stream(model, processor, seed)
    finally:
        handle.remove()
    grids = [processor.image_processor(image)["image_grid_thw"][0].tolist() for image in frames]
    grids = [(rows // 2, columns // 2) for _, rows, columns in grids]
    positions, _ = walk(made.ids[: made.fed], grids, model.config.image_token_id)
    assert torch.cat([step[0] for step in seen]).tolist() == positions


# what is reported


def test_events_of_a_reply_over_two_frames(model, processor):
    made, script = stream(model, processor)
    happenings = [(F, 1, "What?"), (W, RESPONSE, "red", RESPONSE, " star", SILENCE), (S, 2), (F, 2.5)]
    events = play(made, script, happenings)
    assert names(events) == [
        "Silence", "Parked",
        "PromptTaken", "FrameTaken", "ResponseBegins", "Text", "FrameTaken", "ResponseBegins", "Text", "ReplyEnds",
        "Parked",
    ]  # fmt: skip
    assert [event.seconds for event in events[2:]] == [None, 1, 1, 1, 2.5, 2.5, 2.5, 2.5, 2.5]
    assert [event.continues for event in events if names([event]) == ["ResponseBegins"]] == [False, True]
    assert (events[-2].text, events[-2].reason) == ("red star", "silence")
    assert raw(events) == SILENCE + "<|round_start|>" + RESPONSE + "red" + RESPONSE + " star" + SILENCE
    assert events[3].vision_tokens == 5


@pytest.mark.parametrize(
    "last, reason, text", [(SILENCE, "silence", "red"), (IM_END, "im_end", "red"), (None, "max_new_tokens", "red" * 7)]
)
def test_after_the_end_of_the_source_the_reply_is_finished(model, processor, last, reason, text):
    made, script = stream(
        model, processor, SILENCE, RESPONSE, *["red"] * (1 if last else 20), *[last] * bool(last), max_new_tokens=8
    )
    run(made)
    made.push_frame(picture(1), 1.0)
    made.step()
    made.end()
    events = run(made)
    assert names(events)[-2:] == ["ReplyEnds", "Ended"] and (events[-2].reason, events[-2].text) == (reason, text)
    assert made.ended and made.cache is None and made.step() == []
    with pytest.raises(ValueError, match="has ended"):
        made.push_frame(picture(1), 2.0)


def test_the_source_ends_after_the_end_of_a_turn(model, processor):
    made, _ = stream(model, processor, SILENCE, RESPONSE, "red", IM_END)
    run(made)
    made.push_frame(picture(1), 1.0)
    events = [event for _ in range(3) for event in made.step()]
    made.end()
    events += made.step()
    assert names(events)[-3:] == ["SpecialToken", "ReplyEnds", "Ended"]
    assert events[-2].text == "red" and raw(events).endswith("red" + IM_END)


def test_the_end_of_the_source_loses_nothing_that_waits(model, processor):
    made, _ = stream(model, processor)
    made.push_frame(picture(1), 1.0)
    made.push_prompt("What?")
    made.end()
    assert names(run(made)) == ["Silence", "PromptTaken", "FrameTaken", "Silence", "Ended"]


def test_what_comes_just_before_the_end_is_not_lost(model, processor):
    """A frame and the end come from another thread while a step looks at the empty queue."""
    made, _ = stream(model, processor)
    run(made)
    take = made.inbox.take

    def take_and_then_push():
        made.inbox.take, taken = take, take()
        made.push_frame(picture(1), 1.0)
        made.end()
        return taken

    made.inbox.take = take_and_then_push
    events = made.step()
    while not made.ended:
        events += made.step()
    assert [name for name in names(events) if name != "Parked"] == ["FrameTaken", "Silence", "Ended"]


def test_new_tokens_are_counted_since_the_last_input(model, processor):
    made, script = stream(model, processor, SILENCE, *["red"] * 20, max_new_tokens=3)
    run(made)
    made.push_frame(picture(1), 1.0)
    events = run(made)
    assert [event.text for event in events if hasattr(event, "text")] == ["red"] * 3 + ["redredred"]
    assert names(events)[-2:] == ["ReplyEnds", "Parked"] and events[-2].reason == "max_new_tokens"
    made.push_frame(picture(2), 2.0)
    assert [event.text for event in run(made) if hasattr(event, "text")] == ["red"] * 3 + ["redredred"]
    expected = SILENCE + frame("1.0") + "redredred" + frame("2.0") + "redredred"
    assert processor.tokenizer.decode(made.ids) == OPENING.format("") + expected


def test_an_interruption_ends_the_reply_and_keeps_what_was_seen(model, processor):
    made, script = stream(model, processor, SILENCE, RESPONSE, "red", "blue")
    run(made)
    assert not made.interrupt()
    made.push_frame(picture(1), 1.0)
    for _ in range(2):
        made.step()
    script.tokens.clear()
    assert made.interrupt() and not made.interrupt()
    events = run(made)
    assert names(events) == ["ReplyEnds", "Parked"] and (events[0].text, events[0].reason) == ("red", "interrupted")
    made.push_prompt("And?")
    run(made)
    expected = SILENCE + frame("1.0") + RESPONSE + "red" + SILENCE + prompt("And?") + SILENCE
    assert made.ids == encode(processor, OPENING.format("") + expected)


def test_pieces_end_between_characters(processor):
    text = "a\u00e9\u4f60\U0001f600 \u00e9"
    tokens = encode(processor, text)
    pieces = TextPieces(processor.tokenizer)
    found = [pieces.add(token) for token in tokens]
    assert len(tokens) > len(text) and "".join(found) == text and "\ufffd" not in "".join(found)
    assert all(len(piece) <= 1 for piece in found)


def test_a_reply_that_ends_within_a_character_has_no_broken_one(model, processor):
    half = encode(processor, "\u4f60")[:2]
    made, script = stream(model, processor, SILENCE, RESPONSE, "red")
    script.tokens += [*half, *encode(processor, SILENCE + RESPONSE + "blue")]
    run(made)
    made.push_frame(picture(1), 1.0)
    first = run(made)
    assert first[-2].text == "red" and "\ufffd" not in raw(first)
    made.push_frame(picture(2), 2.0)
    assert run(made)[-2].text == "blue", "the next reply begins with a clean character"


def test_an_error_is_an_event_and_ends_the_stream(model, processor):
    def broken(input_ids, scores):
        raise RuntimeError("no luck")

    made = RealtimeStream(model, processor, logits_processor=[broken])
    [failed] = made.step()
    assert names([failed]) == ["Failed"] and failed.message == "no luck" and made.ended
    assert made.step() == []


def test_an_error_does_not_keep_the_cache(model, processor, monkeypatch):
    made, _ = stream(model, processor)
    run(made)
    cache = weakref.ref(made.cache)

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.model.language_model.norm, "forward", broken)
    made.push_frame(picture(1), 1.0)
    events = made.step()
    assert names(events) == ["FrameTaken", "Failed"]
    gc.collect()
    assert cache() is None and "out of memory" in str(events[-1].error)


# the queue


def test_a_full_queue_drops_the_oldest_frame_without_a_prompt(model, processor):
    made, _ = stream(model, processor, frame_queue_size=2)
    run(made)
    assert not made.push_frame(picture(1), 1, prompt="One.")
    assert not made.push_frame(picture(2), 2)
    assert made.push_frame(picture(3), 3)
    with pytest.raises(queue.Full, match="2 frames"):
        made.push_frame(picture(4), 4, drop_oldest=False)
    assert made.push_frame(picture(4), 4, prompt="Two.")
    events = run(made)
    dropped = [event.dropped for event in events if names([event]) == ["FrameDropped"]]
    taken = [event.seconds for event in events if names([event]) == ["FrameTaken"]]
    assert dropped == [2, 3] and taken == [1, 4]
    assert [event.text for event in events if names([event]) == ["PromptTaken"]] == ["One.", "Two."]


def test_if_all_waiting_frames_have_prompts_the_new_one_goes(model, processor):
    made, _ = stream(model, processor, frame_queue_size=1)
    made.push_frame(picture(1), 1, prompt="One.")
    assert made.push_frame(picture(2), 2)
    assert not made.push_frame(picture(3), 3, prompt="Two."), "prompts never go"
    assert [frame.seconds for frame in made.inbox.frames] == [1, 3]


def test_a_frame_is_read_when_it_is_pushed(model, processor):
    made, _ = stream(model, processor)
    image = picture(1)
    made.push_frame(image, 0)
    expected = processor.image_processor(picture(1), do_normalize=False)["pixel_values"]
    image[:] = 0
    assert torch.equal(made.inbox.frames[0].pixel_values, expected)


# bad input


@pytest.mark.parametrize("missing", [SILENCE, RESPONSE])
def test_a_checkpoint_without_the_tokens_is_no_realtime_one(model, missing):
    tokenizer = make_tokenizer([name for name in (SILENCE, RESPONSE) if name != missing])
    with pytest.raises(ValueError, match=f"no special token .*{missing[2:-2]}.*not a realtime checkpoint"):
        RealtimeStream(model, make_processor(tokenizer))


def test_tokens_that_are_not_marked_as_special_are_found_by_name(model):
    tokenizer = make_tokenizer(())
    tokenizer.add_tokens([SILENCE, RESPONSE])
    made, _ = stream(model, make_processor(tokenizer), SILENCE, RESPONSE, "red", SILENCE)
    made.push_frame(picture(1), 1)
    assert names(run(made))[-4:] == ["ResponseBegins", "Text", "ReplyEnds", "Parked"]


def test_a_processor_of_another_checkpoint(model):
    tokenizer = make_tokenizer(["<|a|>", "<|b|>", SILENCE, RESPONSE])
    with pytest.raises(ValueError, match="model has a vocabulary of 747"):
        RealtimeStream(model, make_processor(tokenizer))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_token": 3}, "did you mean 'max_new_tokens'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"top_p": 0}, "top_p must be"),
        ({"do_sample": "yes"}, "do_sample must be"),
        ({"logits_processor": [3]}, "logits_processor must be"),
        ({"repetition_penalty": 0}, "repetition_penalty must be"),
        ({"seed": 0.5}, "seed must be"),
        ({"num_beams": 2}, "no option 'num_beams'"),
        ({"frame_queue_size": 0}, "frame_queue_size must be"),
        ({"window_seconds": 0}, "window_seconds must be"),
        ({"window_frames": -1}, "window_frames must be"),
        ({"rollover_idle": 0}, "rollover_idle must be"),
        ({"initial_prompt": "a <|image|>"}, "initial_prompt holds '<.image.>'"),
        ({"initial_prompt": None}, "initial_prompt must be a string"),
        ({"system_prompt": 3}, "system_prompt must be a string"),
        ({"media_kwargs": {"max_pixel": 3}}, "max_pixels"),
        ({"media_kwargs": {"patch_size": 14}}, "patch_size is 14, but the model was trained with 16"),
    ],
)
def test_wrong_options(model, processor, options, message):
    with pytest.raises(ValueError, match=message):
        RealtimeStream(model, processor, **options)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((picture(1), 0.5), "0.5 seconds, before .* 1 seconds"),
        ((picture(1), -1), "at least 0"),
        ((picture(1), float("nan")), "timestamp must be a number"),
        ((picture(1), None), "timestamp must be a number"),
        (([picture(1), picture(2)], 2), "a frame is one image, got 2"),
        ((b"no image", 2), "not an image"),
        ((picture(1), 2, "<|video_pad|>"), "stands for a medium"),
        ((picture(1), 2, 5), "prompt must be a string"),
    ],
)
def test_wrong_frames_change_nothing(model, processor, arguments, message):
    made, _ = stream(model, processor)
    made.push_frame(picture(0), 1)
    with pytest.raises(ValueError, match=message):
        made.push_frame(*arguments)
    assert len(made.inbox) == 1
    assert not made.push_frame(picture(1), 1), "equal times do not fall"


# sampling


def test_the_penalty_spares_what_a_stream_repeats(model, processor):
    made, script = stream(model, processor, repetition_penalty=1.7, free=True)
    run_steps(made, 1)
    made.push_frame(picture(1), 12.0)
    run_steps(made, 3)
    ids, penalised = script.seen[-1]  # after the penalty, before the script
    plain, _ = whole(model, processor, ids, [picture(1)])
    changed = (penalised - plain[-1]).abs() > 1e-4
    tokens = processor.tokenizer
    spared = {token for token in ids if tokens.decode([token]) in (*"0123456789", " seconds")}
    spared |= {token for token in ids if tokens.decode([token]).startswith("<|")}
    assert {*encode(processor, SILENCE), *encode(processor, "12")} & set(ids) and len(spared) > 8
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([ids]), plain[-1][None].clone())[0]
    for token in range(len(plain[-1])):
        should = token in set(ids) - spared
        assert bool(changed[token]) == should, tokens.decode([token])
        if should:
            assert abs(penalised[token] - expected[token]) < 1e-4


def run_steps(made, count):
    return [event for _ in range(count) for event in made.step()]


def test_sampling_defaults_and_greedy():
    options = SamplingOptions.read({"do_sample": True})
    assert (options.temperature, options.top_k, options.top_p, options.max_new_tokens) == (0.7, 20, 0.8, 4096)
    assert not SamplingOptions.read({}).do_sample
    assert not SamplingOptions.read({"do_sample": True, "temperature": 0}).do_sample
    assert SamplingOptions.read({"top_k": None, "max_new_tokens": np.int64(5)}).max_new_tokens == 5


def test_sampling_follows_the_warped_distribution(model, processor):
    """With top_k and top_p; the frequencies of 600 draws."""
    made, script = stream(
        model, processor, free=True, do_sample=True, temperature=1.5, top_k=4, top_p=0.9, seed=3, max_new_tokens=10**6
    )
    work = made.take()
    logits = made.forward(work)
    made.fed = len(made.ids)
    draws = torch.tensor([made.sampler.choose(made._buffer[: made.fed], logits) for _ in range(600)])
    top = (logits / 1.5).topk(4)
    shares = top.values.softmax(-1)
    kept = int((shares.cumsum(0) < 0.9).sum()) + 1
    expected = shares[:kept] / shares[:kept].sum()
    assert set(draws.tolist()) <= set(top.indices[:kept].tolist())
    found = torch.tensor([(draws == token).float().mean() for token in top.indices[:kept]])
    assert (found - expected).abs().max() < 0.08


def test_a_seed_is_of_one_stream_and_leaves_the_generator_of_torch(model, processor):
    def written(seed):
        made, _ = stream(model, processor, free=True, do_sample=True, temperature=3.0, top_p=1.0, seed=seed)
        run_steps(made, 10)
        return made.ids

    before = torch.get_rng_state()
    assert written(1) == written(1) != written(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_model_never_writes_a_frame(model, processor):
    """A script that wants an `image_pad` does not get it; the frames that follow are placed as ever."""
    wanted = processor.image_token_id

    def prefer(input_ids, scores):
        scores = scores.clone()
        scores[:, wanted] = 1e4
        return scores

    made = RealtimeStream(model, processor, logits_processor=[prefer], max_new_tokens=4)
    run(made)
    made.push_frame(Image.fromarray(picture(1)), 1)
    run(made)
    assert made.ids.count(wanted) == 1 and not made.ended
