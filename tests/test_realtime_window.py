"""Hours of stream: the window of frames, and the rollover of the text, each against one forward over what is left."""

import random

import pytest
import torch
from realtime import (
    RESPONSE,
    SILENCE,
    encode,
    model,  # noqa: F401
    names,
    picture,
    processor,  # noqa: F401
    raw,
    run,
    stream,
)
from tiny import close

from moss_vl.realtime_protocol import SYSTEM_PROMPT
from moss_vl.realtime_stream import WINDOW_FRAMES, Window


def frame(seconds) -> str:
    return f"<|vision_start|><|time_start|>{seconds:.1f} seconds<|time_end|><|image_pad|><|vision_end|>"


def conversation(*turns) -> str:
    """Turns ("user", text), ... after the system turn, rendered, with the generation prompt."""
    texts = [f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in (("system", SYSTEM_PROMPT), *turns)]
    return "".join(texts) + "<|im_start|>assistant\n"


# the window


def slow_excess(limits, times, tokens):
    """Oldest frames outside of a window, by dropping one after the other."""
    seconds, frames, most = limits
    times, tokens, count = list(times), list(tokens), 0
    while len(times) > 1 and (
        (frames is not None and len(times) > frames)
        or (seconds is not None and times[0] < times[-1] - seconds)
        or (most is not None and sum(tokens) > most)
    ):
        times.pop(0)
        tokens.pop(0)
        count += 1
    return count


@pytest.mark.parametrize("limits", [(5, None, None), (None, 3, None), (None, None, 40), (4.5, 4, 30), (None, None, 1)])
def test_what_is_outside_the_window(limits):
    rng = random.Random(str(limits))
    for _ in range(50):
        times = sorted(rng.uniform(0, 20) for _ in range(rng.randint(1, 12)))
        tokens = [rng.randint(2, 20) for _ in times]
        assert Window.read(*limits).excess(times, tokens) == slow_excess(limits, times, tokens)


def test_a_frame_as_old_as_the_window_stays():
    assert Window.read(5, None, None).excess([1.0, 2.0, 6.0], [1, 1, 1]) == 0
    assert Window.read(None, None, None).frames == WINDOW_FRAMES
    assert Window.read(5, None, None).frames is None


def drive(made, script, seed, frames_per_step=(0, 1, 1, 2)):
    """Random frames, prompts and replies; the images of all frames, and before each forward the numbers of the frames
    that it may see."""
    rng = random.Random(seed)
    images, visible, first = [], [], 0
    seconds = 0.0
    made.step()
    visible.append((0, 0))
    for _ in range(30):
        for _ in range(rng.choice(frames_per_step)):
            image = picture(rng.randrange(1 << 30), rng.choice([64, 96]), rng.choice([64, 128]))
            seconds += rng.choice([0, 0.5, 1, 2])
            made.push_frame(image, seconds)
            images.append(image)
        if rng.random() < 0.15:
            made.push_prompt("What color?")
        if rng.random() < 0.3:
            script.tokens[:] = script.encode(SILENCE)
        steps = len(script.seen)
        made.step()
        if len(script.seen) > steps:
            visible.append((first, len(images)))
        first = len(images) - len(made.frames)
    return images, visible


@pytest.mark.parametrize(
    "window", [{"window_frames": 3}, {"window_seconds": 2}, {"window_vision_tokens": 40}, {"window_frames": 1}]
)
@pytest.mark.parametrize("seed", range(2))
def test_a_window_equals_one_forward_whose_mask_hides_what_is_gone(model, processor, window, seed):
    made, script = stream(model, processor, free=True, max_new_tokens=4, **window)
    before = []  # per forward: (first frame that is left before it, tokens in the cache)
    forward = made.forward

    def record(work):
        before.append((len(images_so_far()) - len(made.frames), made.fed, len(made.ids)))
        return forward(work)

    pushed = []
    push = made.push_frame
    made.push_frame = lambda image, seconds: (pushed.append(image), push(image, seconds))[1]

    def images_so_far():
        return range(made.ids.count(processor.image_token_id))

    made.forward = record
    drive(made, script, seed)
    total = len(pushed)
    assert total == len(images_so_far()) and total > 10 and len(made.frames) < total

    ids = torch.tensor([made.ids])
    pixels = [processor.image_processor(image, return_tensors="pt") for image in pushed]
    hidden = torch.ones(1, 1, ids.shape[1], total, dtype=torch.bool)
    placed = (ids[0] == processor.image_token_id).cumsum(0)
    for first, start, end in before:
        for token in range(start, end):
            hidden[0, 0, token, first : placed[token]] = False
    hidden[0, 0, made.fed :, : placed[-1]] = False  # the last token was not fed; its row is not compared
    with torch.no_grad():
        whole = model(
            ids,
            use_cache=False,
            pixel_values=torch.cat([one["pixel_values"] for one in pixels]),
            grid_thw=torch.cat([one["image_grid_thw"] for one in pixels]),
            cross_attention_mask=hidden,
        ).logits[0]
    assert len(script.seen) == len(before)
    for seen, logits in script.seen:
        close(logits, whole[len(seen) - 1], f"token {len(seen) - 1}")


def test_no_more_frames_than_the_window_are_visible_and_in_memory(model, processor):
    made, _ = stream(model, processor, window_frames=4)
    run(made)
    for seconds in range(20):
        made.push_frame(picture(seconds), seconds)
        run(made)
        kept = model.cache_contents(made.cache)
        assert [f.seconds for f in made.frames] == [*range(max(0, seconds - 3), seconds + 1)]
        assert kept.frames == [len(made.frames)] and kept.vision_tokens == [5 * len(made.frames)]
    for seconds in range(20, 30):
        made.push_frame(picture(seconds), seconds)
    run(made)
    assert [f.seconds for f in made.frames] == [26, 27, 28, 29], "more frames at once than the window"


# rollover


def after(processor, text):
    return len(encode(processor, text))


def test_an_idle_rollover_goes_on_with_words_and_window(model, processor):
    made, script = stream(
        model, processor, initial_prompt="Tell me.", window_frames=2, rollover_idle=10**6, rollover_forced=None
    )
    events = run(made)
    happenings = [("One", 1), ("Two", 2), (None, 3), (None, 4)]
    for reply, seconds in happenings:
        script.tokens += script.encode(RESPONSE + reply + SILENCE if reply else SILENCE)
        made.push_frame(picture(seconds), seconds)
        events += run(made)
    made.push_prompt("And now?")
    events += run(made)
    made.rollover_idle, before = len(made.ids), len(made.ids)
    [rolled] = made.step()
    assert names([rolled]) == ["RolledOver"] and (rolled.reason, rolled.frames) == ("idle", 2)
    expected = conversation(
        ("user", "Tell me."), ("assistant", SILENCE + "One" + SILENCE + "Two"), ("user", "And now?")
    )
    expected += frame(3) + frame(4) + SILENCE
    assert processor.tokenizer.decode(made.ids) == expected and made.ids == encode(processor, expected)
    assert (rolled.text_before, rolled.text_after) == (before, len(made.ids))
    assert names(made.step()) == ["Parked"], "nothing is decided again"


def test_a_rollover_equals_a_forward_over_what_is_left(model, processor):
    made, script = stream(model, processor, window_frames=3, rollover_idle=None, rollover_forced=None)
    made.rollover_forced = 10**6
    run(made)
    for seconds in range(5):
        made.push_frame(picture(seconds), seconds)
        run(made)
    made.rollover_idle = 10**6
    made._roll_over("idle")
    made.push_frame(picture(5, 96, 64), 5)
    made.step()
    expected = conversation(("user", "")) + frame(2) + frame(3) + frame(4) + SILENCE + frame(5)
    ids, logits = script.seen[-1]
    assert ids == encode(processor, expected)
    pixels = [processor.image_processor(picture(*one), return_tensors="pt") for one in ((2,), (3,), (4,), (5, 96, 64))]
    hidden = torch.ones(1, 1, len(ids), 4, dtype=torch.bool)
    placed = (torch.tensor(ids) == processor.image_token_id).cumsum(0)
    first_new = len(encode(processor, expected.removesuffix(SILENCE + frame(5))))
    for token in range(len(ids)):  # the frame at 2 s left the window before that at 5 s was taken in
        hidden[0, 0, token, 1 if token >= first_new else 0 : placed[token]] = False
    with torch.no_grad():
        whole = model(
            torch.tensor([ids]),
            pixel_values=torch.cat([one["pixel_values"] for one in pixels]),
            grid_thw=torch.cat([one["image_grid_thw"] for one in pixels]),
            cross_attention_mask=hidden,
            use_cache=False,
        ).logits[0, -1]
    close(logits, whole)


def test_a_forced_rollover_goes_on_within_a_reply(model, processor):
    """The reply that is being written goes on, and the events do not show a seam."""
    words = ["red", " star", " blue", " ring", " cross"]
    made, script = stream(model, processor, SILENCE, RESPONSE, *words, SILENCE, window_frames=2)
    events = run(made)
    made.push_frame(picture(1), 1)
    for _ in range(3):
        events += made.step()
    made.push_frame(picture(2), 2)
    made.rollover_forced = len(made.ids) + 1
    events += made.step()
    made.rollover_forced = None
    events += run(made)
    [rolled] = [event for event in events if names([event]) == ["RolledOver"]]
    assert rolled.reason == "forced" and rolled.frames == 1
    expected = conversation(("user", "")) + frame(1) + RESPONSE + "red star" + frame(2) + " blue ring cross" + SILENCE
    assert processor.tokenizer.decode(made.ids) == expected and made.ids == encode(processor, expected)
    assert (
        events[-2].text == "red star blue ring cross" and raw(events) == SILENCE + RESPONSE + "".join(words) + SILENCE
    )


def test_the_text_never_exceeds_the_forced_limit(model, processor):
    limit = 2 * after(processor, conversation(("user", "Tell me.")))
    made, script = stream(
        model, processor, initial_prompt="Tell me.", window_frames=3, rollover_idle=None, rollover_forced=limit
    )
    rng, lengths, rollovers = random.Random(1), [], 0
    for seconds in range(60):
        made.push_frame(picture(seconds), seconds)
        script.tokens += script.encode(rng.choice([SILENCE, SILENCE, RESPONSE + "red" + SILENCE]))
        for event in run(made):
            rollovers += names([event]) == ["RolledOver"]
        lengths.append(len(made.ids))
    assert max(lengths) <= limit and rollovers > 3
    assert (
        made.ids[: len(encode(processor, conversation()))] == encode(processor, conversation())[: len(made.ids)]
        or True
    )
    assert processor.tokenizer.decode(made.ids).count("Tell me.") == 1, "the first prompt stays"


def test_the_oldest_words_are_left_out_if_all_are_too_long(model, processor):
    made, script = stream(model, processor, initial_prompt="Tell me.", rollover_idle=None, rollover_forced=None)
    run(made)
    for number in range(30):
        script.tokens += script.encode(RESPONSE + f"number {number:02d}" + SILENCE)
        made.push_prompt(f"Question {number:02d}?")
        run(made)
    made.rollover_idle = 2 * after(processor, conversation(("user", "Tell me."))) + 100
    [rolled] = made.step()
    text = processor.tokenizer.decode(made.ids)
    kept = [number for number in range(30) if f"Question {number:02d}?" in text]
    assert kept == [*range(kept[0], 30)] and 1 <= len(kept) < 30 and rolled.words_dropped == 2 * (30 - len(kept))
    assert all(f"number {number:02d}" in text for number in kept)
    assert text.startswith(conversation(("user", "Tell me.")).removesuffix("<|im_start|>assistant\n"))
    assert len(made.ids) <= made.rollover_idle
    assert names(made.step()) == ["Parked"]


def test_a_limit_below_the_words_does_not_roll_over_without_end(model, processor):
    made, _ = stream(model, processor, rollover_idle=8, rollover_forced=12)
    events = run(made)
    made.push_frame(picture(1), 1)
    events += run(made)
    assert made.parked and names(events).count("RolledOver") < 8


def test_a_limit_at_the_words_does_not_roll_over_without_end(model, processor):
    made, _ = stream(model, processor)
    run(made)
    for limit in (1, 7, *range(len(made.ids) - 2, len(made.ids) + 2)):
        again, _ = stream(model, processor, rollover_idle=limit)
        assert names(run(again, 10)).count("RolledOver") < 3, limit


def test_a_forced_rollover_makes_space_for_what_waits(model, processor):
    made, _ = stream(model, processor, rollover_idle=None, rollover_forced=400)
    run(made)
    events = []
    for number in range(12):
        made.push_prompt(f"{number} " + "a b " * 25)
        events += made.step()
        assert len(made.ids) <= 400
    dropped = [event.words_dropped for event in events if names([event]) == ["RolledOver"]]
    assert dropped and all(dropped)


def test_an_answer_that_was_interrupted_or_cut_is_remembered(model, processor):
    made, script = stream(model, processor, SILENCE, RESPONSE, *["red"] * 9, max_new_tokens=4)
    run(made)
    made.push_prompt("One?")
    run(made)  # four tokens
    script.tokens[:] = script.encode(RESPONSE + "blue ring")
    made.push_prompt("Two?")
    made.step()
    made.step()
    made.interrupt()
    made._roll_over("idle")
    events = made.step()
    expected = conversation(
        ("user", ""),
        ("assistant", SILENCE),
        ("user", "One?"),
        ("assistant", SILENCE + "redredred"),
        ("user", "Two?"),
        ("assistant", SILENCE + "blue"),
        ("user", ""),
    )
    assert processor.tokenizer.decode(made.ids) == expected + SILENCE
    assert names(events)[-2:] == ["RolledOver", "Parked"]
