"""Visible frames stay visible: masks of a later turn as a processor returns them, and rows with only padding in a
call.

A mask of T rows with as many columns as the call has frames covers the new frames, and padding in one call takes no
frame away.
"""

import copy

import pytest
import torch
from tiny import Sample, batch, close, make_model

from moss_vl.modeling_moss_vl import CACHE


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request):
    return make_model(request.param)


def whole(model, ids, media):
    real = [one for one in media if one.frames]
    visual = (
        {
            "pixel_values": torch.cat([one.pixel_values for one in real]),
            "grid_thw": torch.cat([one.grid_thw for one in real]),
        }
        if real
        else {}
    )
    with torch.no_grad():
        return model(ids[None], **visual, use_cache=False).logits[0]


def second_turn(model, first, second, side="left"):
    """Logits of each row's real tokens for a turn's inputs as a processor returns them, on the cache of the first
    turn."""
    start, more = batch(first, "left"), batch(second, side)
    cache = model(**start, use_cache=True)[CACHE]
    more["attention_mask"] = torch.cat([start["attention_mask"], more["attention_mask"]], dim=1)
    out = model(**more, **{CACHE: cache})
    for row, (one, other) in enumerate(zip(first, second, strict=True)):
        length = len(other.ids)
        real = slice(0, length) if side == "right" else slice(out.logits.shape[1] - length, None)
        expected = whole(model, torch.cat([one.ids, other.ids]), [one, other])[len(one.ids) :]
        yield row, out.logits[row, real], expected


@torch.no_grad()
def test_a_text_question_after_an_image(model):
    """Neither its blank medium nor its mask, which hides the one blank column, is about the image."""
    for _, got, expected in second_turn(model, [Sample("tFt", (1, 4, 4), seed=1)], [Sample("ttt", seed=2)]):
        close(got, expected)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_masks_whose_width_is_that_of_all_frames_of_another_row(model, side):
    """Row 0 had an image and now has text only, row 1 gets its first image: one column, and one frame in total, in
    both."""
    first = [Sample("tFt", (1, 4, 4), seed=3), Sample("ttt", seed=4)]
    second = [Sample("tt", seed=5), Sample("tFtt", (1, 4, 6), seed=6)]
    for row, got, expected in second_turn(model, first, second, side):
        close(got, expected, f"row {row}")


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_row_with_only_padding_in_a_call_keeps_its_frames(model, side):
    """Row 0 has only padding in the middle call; with a mask over the new frames and without one."""
    first = [Sample("tFt", (1, 4, 4), seed=7), Sample("Ftt", (1, 4, 6), seed=8)]
    start = batch(first, "left")
    cache = model(**start, use_cache=True)[CACHE]
    ids = torch.tensor([[0, 0], [11, 12]])
    mask = torch.cat([start["attention_mask"], torch.tensor([[0, 0], [1, 1]])], dim=1)
    cache = model(ids, attention_mask=mask, **{CACHE: copy.deepcopy(cache)})[CACHE]
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
    out = model(torch.tensor([[21], [22]]), attention_mask=mask, **{CACHE: cache}).logits
    close(out[0, 0], whole(model, torch.cat([first[0].ids, torch.tensor([21])]), [first[0]])[-1], "row 0")
    close(out[1, 0], whole(model, torch.cat([first[1].ids, torch.tensor([11, 12, 22])]), [first[1]])[-1], "row 1")


@torch.no_grad()
def test_a_right_padded_last_chunk_changes_no_visible_frames(model):
    """A right-padded batch in chunks: the short row's last chunks are padding alone, and a token after them sees its
    frame."""
    samples = [Sample("tFt", (1, 4, 4), seed=9), Sample("tFtttttt", (1, 4, 6), seed=10)]
    inputs = batch(samples, "right")
    ids, mask, frames = inputs["input_ids"], inputs["attention_mask"], inputs["cross_attention_mask"]
    visual = {name: inputs[name] for name in ("pixel_values", "grid_thw", "media_nums_per_sample")}
    for given in (True, False):
        cache = None
        for start in range(0, 8, 3):
            part = slice(start, min(start + 3, 8))
            extra = {"cross_attention_mask": frames[:, :, part]} if given else {}
            extra |= visual if start == 0 else {}
            out = model(ids[:, part], attention_mask=mask[:, : part.stop], **extra, **{CACHE: cache}, use_cache=True)
            cache = out[CACHE]
        longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        got = model(torch.tensor([[21], [22]]), attention_mask=longer, **{CACHE: cache}).logits
        for row, token in ((0, 21), (1, 22)):
            expected = whole(model, torch.cat([samples[row].ids, torch.tensor([token])]), [samples[row]])[-1]
            close(got[row, 0], expected, f"row {row}, mask {given}")


@torch.no_grad()
def test_all_black_frames_whose_text_comes_later_are_frames(model):
    """With a cache the text may place them in a later call: black pixels alone are not a blank medium."""
    sample = Sample("tttF", (1, 4, 4), seed=11)
    sample.pixel_values = torch.zeros_like(sample.pixel_values)
    first = model(sample.ids[None, :3], pixel_values=sample.pixel_values, grid_thw=sample.grid_thw, use_cache=True)
    got = model(sample.ids[None, 3:], **{CACHE: first[CACHE]}).logits[0]
    close(got, whole(model, sample.ids, [sample])[3:])
