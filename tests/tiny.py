"""A small random MOSS-VL and prompts for it. Ids follow the golden model: 190 is `image_pad`, 0 pads."""

import torch

from moss_vl.configuration_moss_vl import MossVLConfig
from moss_vl.modeling_moss_vl import MossVLForConditionalGeneration


IMAGE_PAD = 190
PATCH = 4

CONFIG = {
    "text_config": {
        "vocab_size": 200,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "cross_attention_layers": [1, 4],
        "rope_theta": 5_000_000.0,
        "rope_scaling": {"mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_type": "default"},
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
    },
    "vision_config": {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": PATCH,
        "out_hidden_size": 64,
        "deepstack_visual_indexes": [0, 1],
        "num_position_embeddings": 16,
    },
    "image_token_id": IMAGE_PAD,
    "video_token_id": 191,
    "vision_start_token_id": 192,
    "vision_end_token_id": 193,
}


def make_config(text=None, vision=None, **top) -> MossVLConfig:
    text_config, vision_config = CONFIG["text_config"] | (text or {}), CONFIG["vision_config"] | (vision or {})
    return MossVLConfig(**(CONFIG | top | {"text_config": text_config, "vision_config": vision_config}))


def make_model(attn_implementation="sdpa", seed=0, **config) -> MossVLForConditionalGeneration:
    """Weights large enough that every part changes the logits; open gates; norms that are not 1."""
    config = make_config(**config)
    config._attn_implementation = attn_implementation
    model = MossVLForConditionalGeneration._from_config(config, attn_implementation=attn_implementation)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif "gate" in name and parameter.numel() == 1:
                parameter.copy_(0.8 + 0.2 * noise)
            else:
                parameter.copy_(0.15 * noise)
    return model.eval()


def media(*grids, seed=0):
    """(t, h, w) patches of each medium -> pixel_values, grid_thw."""
    generator = torch.Generator().manual_seed(seed)
    patches = sum(t * h * w for t, h, w in grids)
    return torch.randn(patches, 3 * PATCH * PATCH, generator=generator), torch.tensor(grids)


def frame_mask(ids: torch.Tensor, attention_mask: torch.Tensor, frames: list[int]) -> torch.Tensor:
    """`cross_attention_mask` written out by its definition in the processors' specification."""
    mask = torch.ones(ids.shape[0], 1, ids.shape[1], max(frames), dtype=torch.bool)
    for b in range(ids.shape[0]):
        placed = 0
        for i in range(ids.shape[1]):
            placed += int(ids[b, i] == IMAGE_PAD and attention_mask[b, i] == 1)
            if attention_mask[b, i] == 1:
                mask[b, 0, i, : min(placed, frames[b])] = False
    return mask


class Sample:
    """A prompt: text ids in which "F" stands for an `image_pad`, and its media."""

    def __init__(self, text, *grids, seed=0):
        generator = torch.Generator().manual_seed(1000 + seed)
        ids = torch.randint(1, 180, (len(text),), generator=generator)
        ids[[i for i, letter in enumerate(text) if letter == "F"]] = IMAGE_PAD
        self.ids, self.grids = ids, list(grids)
        self.frames = sum(t for t, _, _ in grids)
        assert self.frames == text.count("F")
        self.pixel_values, self.grid_thw = media(*grids, seed=seed) if grids else media((1, 4, 4))
        if not grids:
            self.pixel_values = torch.zeros_like(self.pixel_values)  # the processor's blank medium

    def inputs(self) -> dict:
        ids = self.ids[None]
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": self.pixel_values,
            "grid_thw": self.grid_thw,
            "media_nums_per_sample": [len(self.grid_thw)],
            "cross_attention_mask": frame_mask(ids, torch.ones_like(ids), [max(self.frames, 1)]),
        }


def batch(samples, side) -> dict:
    """The processor's batch of several prompts, padded on `side`."""
    length = max(len(sample.ids) for sample in samples)
    ids = torch.zeros(len(samples), length, dtype=torch.long)
    attention_mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        where = slice(0, len(sample.ids)) if side == "right" else slice(length - len(sample.ids), length)
        ids[row, where], attention_mask[row, where] = sample.ids, 1
    return {
        "input_ids": ids,
        "attention_mask": attention_mask,
        "pixel_values": torch.cat([sample.pixel_values for sample in samples]),
        "grid_thw": torch.cat([sample.grid_thw for sample in samples]),
        "media_nums_per_sample": [len(sample.grid_thw) for sample in samples],
        "cross_attention_mask": frame_mask(ids, attention_mask, [max(sample.frames, 1) for sample in samples]),
    }


def assorted_samples() -> list[Sample]:
    """Text only, one image, a clip, several media of other grids, media first and last."""
    return [
        Sample("ttttttt", seed=1),
        Sample("ttFtttt", (1, 4, 6), seed=2),
        Sample("ttFFFttttt", (3, 4, 4), seed=3),
        Sample("FtFFtFttttF", (1, 2, 8), (2, 4, 4), (1, 8, 4), (1, 4, 4), seed=4),
        Sample("Ft", (1, 6, 4), seed=5),
    ]


def row_of(samples, row, side, length) -> slice:
    count = len(samples[row].ids)
    return slice(0, count) if side == "right" else slice(length - count, length)


def close(got, expected, what=""):
    """Fails unless two tensors of logits are equal up to float32 rounding."""
    off = (got - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert got.shape == expected.shape and off < 1e-5, f"{what}: off by {off:.2e}"
