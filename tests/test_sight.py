"""Visible frames from call to call: late masks, unplaced frames, failed calls, media that do not fit the text.

The expectation is always the whole conversation in one forward pass with the mask written out, never another cached
call.
"""

import copy

import pytest
import torch
from tiny import IMAGE_PAD, Sample, batch, close, frame_mask, make_model
from transformers import DynamicCache

from moss_vl.attention import usable_implementation
from moss_vl.modeling_moss_vl import CACHE, MossVLForConditionalGeneration


NEW = 5


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request):
    return make_model(request.param)


def whole(model, ids, media, hidden=None):
    """Logits [T, vocab] of one conversation, all media at once. hidden: bool [T, F], True = hidden; default: a token
    sees the frames placed at or before it."""
    visual = {
        "pixel_values": torch.cat([one.pixel_values for one in media]),
        "grid_thw": torch.cat([one.grid_thw for one in media]),
    }
    mask = None if hidden is None else hidden[None, None]
    with torch.no_grad():
        return model(ids[None], **visual, cross_attention_mask=mask, use_cache=False).logits[0]


def text_mask(ids, frames):
    return frame_mask(ids[None], torch.ones_like(ids)[None], [frames])[0, 0]


def greedy(model, ids, media, steps=NEW):
    """Plain greedy decoding by whole passes; written tokens are text, whatever their ids."""
    new = []
    visual = {
        "pixel_values": torch.cat([one.pixel_values for one in media]),
        "grid_thw": torch.cat([one.grid_thw for one in media]),
    }
    for _ in range(steps):
        so_far = torch.cat([ids, torch.tensor(new, dtype=torch.long)])[None]
        with torch.no_grad():
            logits = model(so_far, **visual, prompt_length=len(ids), use_cache=False).logits
        new.append(int(logits[0, -1].argmax()))
    return new


# Masks of later calls


@torch.no_grad()
def test_a_later_mask_over_the_whole_conversation_hides_visible_frames(model):
    """Its rows cover the cache too, so its columns are all frames; one that was visible is hidden from then on."""
    sample, more = Sample("FtFtt", (1, 4, 4), (1, 4, 6), seed=1), Sample("tttt", seed=2)
    ids = torch.cat([sample.ids, more.ids])
    out = model(**sample.inputs(), use_cache=True)
    hidden = text_mask(ids, 2)
    hidden[5:, 0] = True
    expected = whole(model, ids, [sample], hidden)
    assert (expected[5:] - whole(model, ids, [sample])[5:]).abs().max() > 0.05, "the test needs a frame that matters"
    step = model(more.ids[None], **{CACHE: out[CACHE]}, cross_attention_mask=hidden[None, None])
    close(step.logits[0], expected[5:], "the call with the mask")
    token = torch.tensor([[17]])
    hidden = torch.cat([hidden, hidden[-1:]])
    after = model(token, **{CACHE: step[CACHE]})
    close(
        after.logits[0],
        whole(model, torch.cat([ids, token[0]]), [sample], hidden)[-1:],
        "a token after it sees the same",
    )


@torch.no_grad()
def test_a_later_text_turn_with_a_mask_over_the_whole_conversation(model):
    """As a processor returns it for the whole conversation: the frames stay visible, in `forward` and in
    `generate`."""
    first, second = Sample("tFFt", (1, 4, 4), (1, 2, 6), seed=3), Sample("tttt", seed=4)
    ids = torch.cat([first.ids, second.ids])
    mask = text_mask(ids, 2)[None, None]
    out = model(**first.inputs(), use_cache=True)
    cache = copy.deepcopy(out[CACHE])
    got = model(second.ids[None], **{CACHE: out[CACHE]}, cross_attention_mask=mask).logits[0]
    close(got, whole(model, ids, [first])[4:], "forward")
    inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], "cross_attention_mask": mask}
    got = model.generate(**inputs, **{CACHE: cache}, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    assert got[0, len(ids) :].tolist() == greedy(model, ids, [first])


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_second_turn_with_a_mask_over_its_new_frames(model, side):
    """Rows with one and three frames of before and turns of other lengths; a row's earlier frames stay visible to all
    of its tokens."""
    first = [Sample("tFt", (1, 4, 4), seed=5), Sample("FFtF", (2, 2, 4), (1, 4, 4), seed=6)]
    second = [Sample("tFttFt", (1, 4, 6), (1, 2, 4), seed=7), Sample("Ftt", (1, 6, 4), seed=8)]
    start, more = batch(first, "left"), batch(second, side)
    cache = model(**start, use_cache=True)[CACHE]
    more["attention_mask"] = torch.cat([start["attention_mask"], more["attention_mask"]], dim=1)
    for mask in (more.pop("cross_attention_mask"), None):
        out = model(**more, cross_attention_mask=mask, **{CACHE: copy.deepcopy(cache)})
        for row in range(2):
            ids = torch.cat([first[row].ids, second[row].ids])
            expected = whole(model, ids, [first[row], second[row]])[len(first[row].ids) :]
            length = len(second[row].ids)
            real = slice(0, length) if side == "right" else slice(out.logits.shape[1] - length, None)
            close(out.logits[row, real], expected, f"row {row}, mask {mask is not None}")


@torch.no_grad()
def test_a_mask_cannot_make_an_unplaced_frame_visible(model):
    """It has no keys. In the first call, and in a later one with waiting frames."""
    sample = Sample("FttFt", (1, 4, 4), (1, 4, 4), seed=9)
    visual = {"pixel_values": sample.pixel_values, "grid_thw": sample.grid_thw}
    all_visible = torch.zeros(1, 1, 3, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="makes frame 1 of sample 0 visible"):
        model(sample.ids[None, :3], **visual, cross_attention_mask=all_visible, use_cache=True)
    cache = model(sample.ids[None, :2], **visual, use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="makes frame 1 of sample 0 visible"):
        model(sample.ids[None, 2:3], **{CACHE: cache}, cross_attention_mask=torch.zeros(1, 1, 3, 2, dtype=torch.bool))
    mask = text_mask(sample.ids, 2)[None, None]
    got = model(sample.ids[None, 2:], **{CACHE: cache}, cross_attention_mask=mask).logits[0]
    close(got, whole(model, sample.ids, [sample])[2:], "the refused call changed nothing")


# Calls that fail


def test_a_cache_that_a_failed_call_half_filled_is_refused(model):
    """The first layers hold the text and no layer has its frames; to continue would be an answer without them."""
    sample, cache = Sample("FtFt", (1, 4, 4), (1, 4, 4), seed=10), DynamicCache()
    hook = model.model.language_model.layers[3].register_forward_pre_hook(lambda *args: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError):
            model(**sample.inputs(), **{CACHE: cache})
    finally:
        hook.remove()
    assert cache.get_seq_length() == 4
    with pytest.raises(ValueError, match="not their vision sequence"):
        model(torch.tensor([[5]]), **{CACHE: cache})


# Media that do not fit the text


@pytest.mark.parametrize(
    "row",
    [[0, 4, 4], [1, 0, 4], [1, 4, 0], [-1, 4, 4], [1, -4, -4], [1, 4], [1, 4, 4, 1], [1, 3, 4], [1, 4, 3], [1, 1, 16]],
)
@pytest.mark.parametrize("as_list", [False, True])
def test_malformed_grids_are_refused(model, row, as_list):
    patches = max(1, abs(int(torch.tensor(row).prod())))
    inputs = {"input_ids": torch.tensor([[5, IMAGE_PAD, 6]]), "pixel_values": torch.ones(patches, 48)}
    grid = [row] if as_list else torch.tensor([row])
    with pytest.raises(ValueError, match=r"`grid_thw` has the row .*expected \(frames, patch rows, patch columns\)"):
        model(**inputs, grid_thw=grid)


BLANK = [
    ([(1, 4, 4)], 0.0, True),  # the processor's blank medium, which is no frame
    ([(1, 4, 4)], 1.0, False),
    ([(2, 4, 4)], 0.0, False),
    ([(1, 4, 4), (1, 4, 4)], 0.0, False),
    ([(1, 4, 4), (1, 4, 6), (1, 4, 4)], 0.0, False),
]


@pytest.mark.parametrize("grids, level, blank", BLANK)
@torch.no_grad()
def test_one_black_frame_is_a_blank_medium_and_two_are_an_error(model, grids, level, blank):
    """In a text without `image_pad`: several black frames are a video that the text does not place."""
    ids, patches = torch.tensor([[5, 6, 7]]), sum(t * h * w for t, h, w in grids)
    inputs = {"input_ids": ids, "pixel_values": torch.full((patches, 48), level), "grid_thw": torch.tensor(grids)}
    if blank:
        close(model(**inputs).logits, model(ids).logits)
    else:
        count = sum(t for t, _, _ in grids)
        with pytest.raises(ValueError, match=f"0 `image_pad` tokens, but its media have {count} frames"):
            model(**inputs)


@torch.no_grad()
def test_a_frame_in_which_one_value_is_not_black_is_a_frame(model):
    pixels = torch.zeros(16, 48)
    pixels[15, 47] = 1e-3
    with pytest.raises(ValueError, match="0 `image_pad` tokens, but its media have 1 frames"):
        model(torch.tensor([[5, 6]]), pixel_values=pixels, grid_thw=torch.tensor([[1, 4, 4]]))


@torch.no_grad()
def test_placed_black_frames_are_frames(model):
    """They are read: the logits differ from those without frames, and from those with one frame."""
    ids = torch.tensor([[5, IMAGE_PAD, 6, IMAGE_PAD, 7]])
    out = model(ids, pixel_values=torch.zeros(32, 48), grid_thw=torch.tensor([[2, 4, 4]]), use_cache=True)
    assert out[CACHE].layers[1].keys.shape[-2] == 2 * 5
    assert (out.logits[0, -1] - model(torch.tensor([[5, 8, 6, 8, 7]])).logits[0, -1]).abs().max() > 1e-2


NUMBERS = [([2, 1], "[2, 1]"), ([1, 1, 0], "[1, 1, 0]"), ([3, -1], "[3, -1]"), ([0, 2], None), ([1, 1], None)]


@pytest.mark.parametrize("numbers, is_given", NUMBERS)
@torch.no_grad()
def test_numbers_of_media_that_do_not_fit(model, numbers, is_given):
    """Two samples with one image each: other numbers are refused, by sum, length, sign or the `image_pad` tokens."""
    samples = [Sample("Ftt", (1, 4, 4), seed=11), Sample("tFt", (1, 4, 4), seed=12)]
    inputs = batch(samples, "left") | {"cross_attention_mask": None, "media_nums_per_sample": numbers}
    if numbers == [1, 1]:
        for row, sample in enumerate(samples):
            close(model(**inputs).logits[row], model(**sample.inputs()).logits[0])
    else:
        match = "`media_nums_per_sample` is" if is_given else "1 `image_pad` tokens, but its media have 0 frames"
        with pytest.raises(ValueError, match=match):
            model(**inputs)


# Devices and dtypes without flash-attention


@pytest.mark.parametrize("device, dtype, expected", [
    ("cpu", torch.float32, "sdpa"),
    ("cpu", torch.bfloat16, "sdpa"),
    ("cpu", torch.float16, "sdpa"),
    ("meta", torch.float32, "sdpa"),
    ("meta", torch.float16, "flash_attention_2"),
    ("meta", torch.bfloat16, "flash_attention_2"),
])  # fmt: skip
def test_flash_attention_needs_the_device_and_the_dtype(device, dtype, expected):
    """One of them is not enough: a CPU has no kernel in any dtype, and no device has one for float32."""
    assert usable_implementation("flash_attention_2", torch.empty(1, 2, 64, device=device, dtype=dtype)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_model_that_asks_for_flash_attention_runs_on_a_cpu(dtype):
    flash, sdpa = (make_model("sdpa").to(dtype) for _ in range(2))
    flash.set_attn_implementation("flash_attention_2")
    assert isinstance(flash, MossVLForConditionalGeneration)
    inputs = Sample("tFt", (1, 4, 4), seed=13).inputs()
    assert torch.equal(flash(**inputs).logits, sdpa(**inputs).logits)
