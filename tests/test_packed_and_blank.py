"""Packed texts with frames from any first position, and uint8 pixels that are a blank medium."""

import pytest
import torch
from tiny import Sample, close, make_model


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request):
    return make_model(request.param)


TEXTS = {
    "words first": (Sample("tFtt", (1, 4, 6), seed=1), Sample("ttFt", (1, 4, 4), seed=2)),
    "a frame first": (Sample("tFtt", (1, 4, 6), seed=1), Sample("FtFt", (1, 2, 8), (1, 4, 4), seed=3)),
    "frames first in both": (Sample("FFt", (2, 4, 4), seed=4), Sample("Ftt", (1, 6, 4), seed=5)),
    "three, words alone between": (
        Sample("Ft", (1, 4, 4), seed=6),
        Sample("ttt", seed=7),
        Sample("tF", (1, 4, 8), seed=8),
    ),
}


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("name", TEXTS)
@torch.no_grad()
def test_packed_texts_equal_each_alone_from_any_first_position(model, name, shift):
    """Rotation is relative: a text that begins at 2 has the logits of one at 0, and its frames begin there too."""
    texts = TEXTS[name]
    positions = [
        model.get_rope_index(one.ids[None], *([one.grid_thw] if one.frames else []))[0][0, 0] + (shift if index else 0)
        for index, one in enumerate(texts)
    ]
    with_frames = [one for one in texts if one.frames]
    logits = model(
        torch.cat([one.ids for one in texts])[None],
        position_ids=torch.cat(positions)[None],
        pixel_values=torch.cat([one.pixel_values for one in with_frames]),
        grid_thw=torch.cat([one.grid_thw for one in with_frames]),
        use_cache=False,
    ).logits[0]
    for index, (one, got) in enumerate(zip(texts, logits.split([len(one.ids) for one in texts]), strict=True)):
        visual = {"pixel_values": one.pixel_values, "grid_thw": one.grid_thw} if one.frames else {}
        close(got, model(one.ids[None], **visual, use_cache=False).logits[0], f"text {index}")


@pytest.mark.parametrize("level, mean, blank", [(0, 0.0, True), (0, 0.5, False), (0, 1.0, False), (1, 0.0, False)])
@torch.no_grad()
def test_uint8_pixels_are_blank_if_they_normalise_to_zeros(model, level, mean, blank):
    """Pixels of 0 with a mean of 0.5 are a black image, -1 after they are normalised; with a mean of 0 they are 0, as
    in a blank medium."""
    ids = torch.tensor([[5, 6, 7]])
    inputs = {"pixel_values": torch.full((16, 48), level, dtype=torch.uint8), "grid_thw": torch.tensor([[1, 4, 4]])}
    inputs |= {"image_mean": [[mean] * 3], "image_std": [[0.5] * 3]}
    if blank:
        close(model(ids, **inputs).logits, model(ids).logits)
    else:
        with pytest.raises(ValueError, match="0 `image_pad` tokens, but its media have 1 frames"):
            model(ids, **inputs)
