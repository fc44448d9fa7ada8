"""Drawn batches (lessons.py) as the padded tensors of one optimizer step of train_nano.py, made by the processes that
draw.

The padded axes have few different lengths, so that few different shapes occur (steps.py).

Axes: N pictures, P patches of the largest one, G grids, B rows, T text tokens, S vision tokens of the row with the
most.
"""

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import torch

from moss_vl.training.nano.facts import IGNORED
from moss_vl.xrope import grid_rotary


MERGED = 4  # patches of a vision token
INK_LEVELS = 100  # of the share that is covered
FAR = 1 << 30  # frame number of padding
LEAST = {"pictures": 16, "patches": 64, "grids": 16, "rows": 8, "text": 64, "vision": 64}  # lengths of padded axes


@dataclass(frozen=True)
class Sizes:
    """What collation needs to know of the model.

    Attributes:
        side: rows of the encoder's table of learned positions.
        head_dim: of the encoder.
        image_pad: id of the text token of a frame.
    """

    side: int
    head_dim: int
    image_pad: int

    @classmethod
    def of(cls, config) -> "Sizes":
        vision = config.vision_config
        side = round(vision.num_position_embeddings**0.5)
        return cls(side, vision.hidden_size // vision.num_heads, config.image_token_id)


def rounded(size: int, axis: str) -> int:
    """The length of a padded axis: a power of two, or 1.5 times one."""
    length = LEAST[axis]
    while length < size:
        length *= 2
    return length * 3 // 4 if size <= length * 3 // 4 and length > LEAST[axis] else length


def collate(batches: list[dict], sizes: Sizes) -> dict:
    """The tensors of a step from batches of one kind.

    Lists have their natural lengths: "pads" with "frame_facts", "learned" with what belongs to it, "answer_tasks", and
    the points of attention targets.
    """
    grids = [tuple(grid[1:]) for batch in batches for grid in batch["picture_grids"]]
    step = {"kind": batches[0]["kind"], **pictures(batches, grids, sizes)}
    if "token_facts" in batches[0]:
        step |= look_targets(batches, grids, *step["pixels"].shape[:2])
    if "input_ids" not in batches[0]:
        return step
    return step | texts(batches, grids, *step["pixels"].shape[:2], sizes.image_pad)


# pictures


def pictures(batches: list[dict], grids: list[tuple[int, int]], sizes: Sizes) -> dict:
    """Pixels; and of each grid the learned positions, as weights of the table, and rotary."""
    counts = np.array([h * w for h, w in grids])
    length, number = rounded(counts.max(), "patches"), rounded(len(grids), "pictures")
    distinct = list(dict.fromkeys(grids))
    index = {grid: place for place, grid in enumerate(distinct)}
    tables = [grid_tables(*grid, sizes.side, sizes.head_dim) for grid in distinct]
    kinds = rounded(len(distinct), "grids")
    pixels = torch.zeros(number, length, batches[0]["pixel_values"].shape[1], dtype=torch.uint8)
    begin = 0
    for batch in batches:
        patches = [h * w for _, h, w in batch["picture_grids"]]
        for part in batch["pixel_values"].split(patches):
            pixels[begin, : len(part)] = part
            begin += 1
    patches = np.full(number, length)
    patches[: len(counts)] = counts
    grid = np.zeros(number, np.int64)
    grid[: len(grids)] = [index[one] for one in grids]
    return {
        "pixels": pixels,
        "patches": torch.from_numpy(patches),
        "grid": torch.from_numpy(grid),
        **{
            name: pad_to([table[place] for table in tables], kinds, length)
            for place, name in enumerate(("interpolation", "patch_cos", "patch_sin"))
        },
    }


def pad_to(parts: list[torch.Tensor], number: int, length: int, fill=0) -> torch.Tensor:
    """Tensors [n, ...] as one [number, length, ...]."""
    out = parts[0].new_full((number, length, *parts[0].shape[1:]), fill)
    for row, part in zip(out, parts, strict=False):
        row[: len(part)] = part
    return out


@functools.lru_cache(maxsize=4096)
def grid_tables(rows: int, columns: int, side: int, head_dim: int):
    """Interpolation [P, side^2] of learned positions, and cosines and sines [P, d], in merge-block order."""
    y, x = torch.arange(rows).view(-1, 1, 2, 1), torch.arange(columns).view(1, -1, 1, 2)
    y, x = (part.flatten() for part in torch.broadcast_tensors(y, x))
    weights = (line_weights(rows, side)[y, :, None] * line_weights(columns, side)[x, None, :]).flatten(1)
    return weights, *grid_rotary(y, x, head_dim)


def line_weights(count: int, side: int) -> torch.Tensor:
    """[count, side]: weights of linear interpolation at `linspace(0, side - 1, count)`."""
    places = torch.linspace(0, side - 1, count)
    return (1 - (places[:, None] - torch.arange(side)).abs()).clamp(min=0)


def look_targets(batches: list[dict], grids, number: int, length: int) -> dict:
    """Targets of the encoder: token facts [N, P / 4, facts]; ink [N, P, 64] in levels, -1 at padding."""
    counts = [h * w for h, w in grids]
    facts = torch.cat([batch["token_facts"] for batch in batches]).split([count // MERGED for count in counts])
    ink = torch.cat([batch["ink"] for batch in batches])
    ink = (ink * INK_LEVELS).round().to(torch.int8).split(counts)
    return {
        "token_facts": pad_to(list(facts), number, length // MERGED, IGNORED),
        "ink": pad_to(list(ink), number, length, -1),
    }


# texts


def texts(batches: list[dict], grids, number: int, length: int, image_pad: int) -> dict:
    """Text, and which vision tokens each row sees."""
    joined = Rows(batches)
    ids, positions, parts = joined("input_ids", 0), joined("position_ids", 0), joined("parts", -1)
    pads = ids == image_pad
    seen = pads.cumsum(1)
    counts = np.array([h * w for h, w in grids])
    begins = np.cumsum(counts // MERGED) - counts // MERGED
    shown = shown_pictures(batches, begins)  # of each frame
    sides = np.array(grids)[shown] // 2
    out = {"ids": ids, "positions": positions, "parts": parts, "seen": seen, "pads": np.flatnonzero(pads)}
    out |= vision_rows(pads.sum(1), sides, positions[pads], shown, length // MERGED, number)
    out |= answers(joined("labels", IGNORED), joined("weights", 0.0), joined("tasks", -1), parts)
    out = {name: torch.from_numpy(array) for name, array in out.items()}
    out["frame_facts"] = torch.cat([batch["frame_facts"] for batch in batches])
    return out | joined_points(batches)


class Rows:
    """Joins tensors [B, T] of all batches, padded to the same number of rows and tokens."""

    def __init__(self, batches: list[dict]):
        shapes = [batch["input_ids"].shape for batch in batches]
        self.batches = batches
        self.shape = rounded(sum(b for b, _ in shapes), "rows"), rounded(max(t for _, t in shapes), "text")

    def __call__(self, name: str, fill) -> np.ndarray:
        parts = [batch[name].numpy() for batch in self.batches]
        out, begin = np.full(self.shape, fill, parts[0].dtype), 0
        for part in parts:
            out[begin : begin + len(part), : part.shape[1]] = part
            begin += len(part)
        return out


def shown_pictures(batches: list[dict], begins: np.ndarray) -> np.ndarray:
    """The index of the picture of each frame of all rows. `begins`: first vision token of each picture."""
    out, pictures = [], 0
    for batch in batches:
        own = begins[pictures : pictures + len(batch["picture_grids"])]
        tokens = np.array([h * w // MERGED for t, h, w in batch["grid_thw"] for _ in range(t)])
        first = batch["gather"].numpy()[np.cumsum(tokens) - tokens]
        out.append(pictures + np.searchsorted(own - own[0], first, side="right") - 1)
        pictures += len(own)
    return np.concatenate(out)


def vision_rows(counts, sides, places, shown, tokens: int, pictures: int) -> dict[str, np.ndarray]:
    """The vision tokens of each row: index in the encoder's output, number of their frame, and position.

    Args:
        counts: frames of each row.
        sides: merged rows and columns of each frame, row after row.
        places: position of the text token of each frame.
        shown: index of the picture of each frame.
        tokens, pictures: vision tokens of a padded picture, and the number of pictures. The separator comes after the
            tokens of all of them.
    """
    h, w = sides.T
    lengths = h * w + 1
    frame = np.repeat(np.arange(len(h)), lengths)
    offset = np.arange(len(frame)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    separator = offset == (h * w)[frame]
    y, x = offset // w[frame], offset % w[frame]
    far = np.maximum(h, w)[frame]
    origin = places[frame] - far
    position = np.where(separator, origin + far, np.stack([origin, origin + y, origin + x]))
    index = np.where(separator, pictures * tokens, shown[frame] * tokens + offset)
    row = np.repeat(np.arange(len(counts)), counts)  # of each frame
    row_lengths = np.bincount(row, weights=lengths, minlength=len(counts)).astype(np.int64)
    first_frame = np.cumsum(counts) - counts
    column = np.arange(len(frame)) - np.repeat(np.cumsum(row_lengths) - row_lengths, row_lengths)
    shape = len(counts), rounded(row_lengths.max(), "vision")
    out = {
        "vision_index": np.full(shape, pictures * tokens),
        "vision_frame": np.full(shape, FAR),
        "vision_positions": np.zeros((3, *shape), np.int64),
    }
    out["vision_index"][row[frame], column] = index
    out["vision_frame"][row[frame], column] = frame - first_frame[row[frame]]
    out["vision_positions"][:, row[frame], column] = position
    return out


def answers(labels, weights, tasks, parts) -> dict[str, np.ndarray]:
    """The tokens before those of answers (indices in the flattened rows), with targets, weights, and answers.

    Answers and tasks are numbered from 1 on: in longer lists 0 is for none.
    """
    rows, columns = np.nonzero(labels[:, 1:] != IGNORED)
    targets, weights, tasks, parts = (part[rows, columns + 1] for part in (labels, weights, tasks, parts))
    names, answer = np.unique((rows * (1 << 16) + parts) * (1 << 8) + tasks, return_inverse=True)
    return {
        "learned": rows * labels.shape[1] + columns,
        "targets": targets,
        "weights": weights,
        "answer": answer + 1,
        "answer_tasks": np.concatenate([[0], names % (1 << 8) + 1]),
    }


def joined_points(batches: list[dict]) -> dict[str, torch.Tensor]:
    """Of each attention target "points NAME", [5, points]: row, head, text token, target token, group; and "groups
    NAME", the number of groups, which are numbered from 1 on."""
    begins = [0, *itertools.accumulate(len(batch["input_ids"]) for batch in batches)]
    out = {}
    for name in dict.fromkeys(name for batch in batches for name in batch["attention"]):
        parts, groups = [], 1
        for batch, begin in zip(batches, begins, strict=False):
            if name in batch["attention"]:
                parts.append(batch["attention"][name] + torch.tensor([begin, 0, 0, 0, groups]))
                groups = int(parts[-1][-1, 4]) + 1
        out[f"points {name}"] = torch.cat(parts).T.contiguous()
        out[f"groups {name}"] = torch.tensor(groups - 1)
    return out


# between processes


def pack(step: dict) -> dict:
    """The step with all its tensors in one, uint8 "bytes", which crosses processes and reaches a device at once."""
    layout, parts, end = {}, [], 0
    for name, value in step.items():
        if isinstance(value, torch.Tensor):
            raw = value.contiguous().reshape(-1).view(torch.uint8)
            layout[name] = (end, value.dtype, tuple(value.shape))
            parts.append(torch.nn.functional.pad(raw, (0, -len(raw) % 16)))
            end += len(parts[-1])
    rest = {name: value for name, value in step.items() if not isinstance(value, torch.Tensor)}
    return rest | {"layout": layout, "bytes": torch.cat(parts)}


def unpack(packed: dict, device) -> dict:
    """The step of `pack`, its tensors on the device as views of one."""
    data = packed["bytes"].to(device, non_blocking=True)
    step = {name: value for name, value in packed.items() if name not in ("layout", "bytes")}
    for name, (begin, dtype, shape) in packed["layout"].items():
        size = torch.Size(shape).numel() * dtype.itemsize
        step[name] = data[begin : begin + size].view(dtype).view(shape)
    return step
