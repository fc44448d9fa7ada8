"""Cross-attention in blocks of the scores: text tokens i..j and vision tokens u..v that all of them see.

Text tokens after one frame see the vision tokens of this frame and of all before it. These scores are a staircase, and
a staircase is cut into blocks that need no mask (`cut_staircase`). Blocks with the same number below are disjoint in
text tokens and in vision tokens, so one call of a kernel computes them together:

                     vision tokens of frame
                     0   1   2   3   4
    text after   0   0                      f frames: f blocks of number 0, and f - 1 larger ones
    the frame    1   2   0                  with about log2(f) other numbers
                 2   1   1   0
                 3   1   1   3   0
                 4   1   1   3   ...

Each kernel call returns the log-sum-exp of every row of its scores. The outputs of all blocks of a row are averaged
with weights exp(log-sum-exp), which is the softmax over the whole row. The gradient of a block is that of
FlashAttention (Dao et al. 2022, algorithm 4) with the output and the log-sum-exp of whole rows, so blocks need no other
gradient.

Axes: T text tokens of the flattened batch, H query heads, K key/value heads, G = H / K heads of a group, R = T * G rows
of the scores (the heads of a group are folded into the rows), V packed vision tokens, d head size.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Optional

import torch
from torch.autograd.function import once_differentiable

from .vision_sequence import Span


NO_KEYS = -1e30  # log-sum-exp of a row of which no block was computed yet; finite, so that differences are defined
FLASH_HEAD_SIZE = 256  # largest head size of torch's flash-attention
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

Calls = tuple[tuple[Span, ...], ...]
Part = tuple[slice, torch.Tensor, torch.Tensor]  # rows, their output [K, rows, d], their log-sum-exp [K, rows]


# Planning, on integers


def plan_blocks(spans: list[Span]) -> Calls:
    """Blocks for all spans without `visible`, as kernel calls. The blocks of a call are disjoint and ascending, in text
    tokens and in vision tokens."""
    levels: list[list[Span]] = []
    for staircase in staircases(spans):
        cut_staircase(staircase, staircase[0].vision.start, 0, levels)
    return tuple(call for level in levels for call in ascending_calls(level))


def staircases(spans: list[Span]) -> list[list[Span]]:
    """Spans in groups: adjacent text tokens, whose vision tokens begin at the same token and end later and later."""
    groups: list[list[Span]] = []
    for span in spans:
        last = groups[-1][-1] if groups else None
        if (
            last is not None
            and last.text.stop == span.text.start
            and last.vision.start == span.vision.start
            and last.vision.stop < span.vision.stop
        ):
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups


def cut_staircase(steps: list[Span], start: int, level: int, levels: list[list[Span]]) -> None:
    """Adds the blocks of a staircase to `levels`. All text tokens of its upper half see the vision tokens of the lower
    half: this is one block. Both halves are staircases again.

    Args:
        start: the first vision token; the spans also see tokens before it, which belong to other blocks.
    """
    while len(levels) <= level + 1:
        levels.append([])
    if len(steps) == 1:
        levels[0].append(Span(steps[0].text, slice(start, steps[0].vision.stop)))
        return
    half = len(steps) // 2
    middle = steps[half - 1].vision.stop
    levels[level + 1].append(Span(slice(steps[half].text.start, steps[-1].text.stop), slice(start, middle)))
    cut_staircase(steps[:half], start, level + 1, levels)
    cut_staircase(steps[half:], middle, level + 1, levels)


def ascending_calls(blocks: list[Span]) -> list[tuple[Span, ...]]:
    """Blocks as few calls: only rows that share a sample, as beams do, need more than one."""
    calls: list[list[Span]] = []
    for block in sorted(blocks, key=lambda block: block.text.start):
        for call in calls:
            if call[-1].text.stop <= block.text.start and call[-1].vision.stop <= block.vision.start:
                call.append(block)
                break
        else:
            calls.append([block])
    return [tuple(call) for call in calls]


class Borders(NamedTuple):
    """The blocks of a call as sequences of a kernel for several lengths. Rows without keys, and keys without rows, are
    sequences of their own.

    Attributes:
        rows, keys: int32 [sequences + 1], where each sequence begins, and the end of the last one.
        most_rows, most_keys: of any sequence.
    """

    rows: torch.Tensor
    keys: torch.Tensor
    most_rows: int
    most_keys: int

    @classmethod
    def of(cls, blocks: tuple[Span, ...], rows: int, keys: int, device: torch.device) -> "Borders":
        """
        Args:
            blocks: `text` in rows of the scores.
            rows, keys: number of all rows and all keys.
        """
        corners = [(0, 0)]
        for block in (*blocks, Span(slice(rows, rows), slice(keys, keys))):
            for corner in (
                (block.text.start, corners[-1][1]),
                (block.text.start, block.vision.start),
                (block.text.stop, block.vision.stop),
            ):
                if corner != corners[-1]:
                    corners.append(corner)
        borders = torch.tensor(corners, dtype=torch.int32).T
        most_rows, most_keys = borders.diff().amax(1).tolist()
        borders = borders.contiguous().to(device)
        return cls(borders[0], borders[1], most_rows, most_keys)


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of a forward call, which all layers share.

    Attributes:
        calls: blocks in text tokens, see `plan_blocks`.
        group_size: G.
    """

    calls: Calls
    group_size: int
    _borders: dict = field(default_factory=dict, repr=False)

    def rows(self) -> list[tuple[Span, ...]]:
        """The calls with `text` in rows of the scores."""
        size = self.group_size
        return [
            tuple(Span(slice(text.start * size, text.stop * size), vision) for text, vision, _ in call)
            for call in self.calls
        ]

    def borders(self, rows: int, keys: int, device: torch.device) -> list[Borders]:
        """The calls as `Borders`, made at the first layer on each device."""
        at = (rows, keys, device)
        if at not in self._borders:
            self._borders[at] = [Borders.of(call, rows, keys, device) for call in self.rows()]
        return self._borders[at]


# Kernels


def blocks_can_run(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether one of the kernels below takes query [T, H, d] and key [1, K, V, d]: on CPUs, and on NVIDIA GPUs in half
    precision where torch has flash-attention and the caller did not turn it off."""
    if query.dtype != key.dtype or not torch.backends.cuda.flash_sdp_enabled():
        return False
    if query.device.type == "cpu":
        return True
    return (
        query.device.type == "cuda"
        and torch.version.hip is None
        and TORCH >= (2, 6)  # before, the log-sum-exp of several lengths was padded
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= FLASH_HEAD_SIZE
    )


def forward_parts(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: Blocks, scale: float):
    """Attends to each block: query [K, R, d], key and value [K, V, d] -> parts. A part of a GPU covers all rows."""
    if query.device.type == "cpu":
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        for rows, keys, _ in (block for call in blocks.rows() for block in call):
            out, lse = kernel(query[None, :, rows], key[None, :, keys], value[None, :, keys], scale=scale)
            yield rows, out[0], lse[0]
        return
    states = [part.transpose(0, 1) for part in (query, key, value)]
    for borders in blocks.borders(query.shape[1], key.shape[1], query.device):
        out, lse, *_ = torch.ops.aten._flash_attention_forward(*states, *borders, 0.0, False, False, scale=scale)
        yield slice(None), out.transpose(0, 1), lse.masked_fill(lse == torch.inf, -torch.inf)  # inf: without keys


def merge(parts: Iterator[Part], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and log-sum-exp of whole rows, from those of blocks. Rows in no block are 0.

    Args:
        like: query [K, R, d].

    Returns:
        [K, R, d] and [K, R], in float32 at least.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    out = torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)
    lse = torch.full(like.shape[:2], NO_KEYS, dtype=dtype, device=like.device)
    for rows, part, part_lse in parts:
        weight = (part_lse - lse[:, rows]).sigmoid_()  # exp(part_lse) / (exp(lse) + exp(part_lse))
        out[:, rows].lerp_(part.to(dtype), weight[..., None])
        lse[:, rows] = torch.logaddexp(lse[:, rows], part_lse)
    return out, lse


class BlockAttention(torch.autograd.Function):
    """query [K, R, d], key and value [K, V, d] -> [K, R, d]."""

    @staticmethod
    def forward(ctx, query, key, value, blocks: Blocks, scale: float):
        out, lse = merge(forward_parts(query, key, value, blocks, scale), query)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, out, lse = ctx.saved_tensors
        compute = block_gradients if query.device.type == "cpu" else varlen_gradients
        grads = compute(grad.contiguous(), query, key, value, out, lse, ctx.blocks, ctx.scale)
        return *grads, None, None


def block_gradients(grad, query, key, value, out, lse, blocks: Blocks, scale: float) -> tuple[torch.Tensor, ...]:
    """Gradients of query, key and value on a CPU, block by block."""
    grads = [torch.zeros_like(part) for part in (query, key, value)]
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    for rows, keys, _ in (block for call in blocks.rows() for block in call):
        of_rows = [part[None, :, rows] for part in (grad, query, out, lse)]
        of_keys = [part[None, :, keys] for part in (key, value)]
        parts = kernel(*of_rows[:2], *of_keys, *of_rows[2:], 0.0, False, scale=scale)
        for whole, part, where in zip(grads, parts, (rows, keys, keys), strict=True):
            whole[:, where] += part[0]
    return tuple(grads)


def varlen_gradients(grad, query, key, value, out, lse, blocks: Blocks, scale: float) -> tuple[torch.Tensor, ...]:
    """Gradients of query, key and value on a GPU, call by call."""
    grads: list[Optional[torch.Tensor]] = [None] * 3
    states = [part.transpose(0, 1) for part in (grad, query, key, value, out)]
    seed = torch.empty(2, dtype=torch.uint64, device=query.device)  # without dropout nothing reads it
    for borders in blocks.borders(query.shape[1], key.shape[1], query.device):
        parts = torch.ops.aten._flash_attention_backward(
            *states, lse, *borders, 0.0, False, seed, seed[0], scale=scale
        )
        grads = [part if whole is None else whole.add_(part) for whole, part in zip(grads, parts, strict=True)]
    return tuple(part.transpose(0, 1) for part in grads)


def attend_in_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: Blocks, scale: float
) -> torch.Tensor:
    """query [T, H, d], packed key and value [1, K, V, d] -> [T, H, d], 0 at tokens in no block."""
    (tokens, _, d), kv_heads = query.shape, key.shape[1]
    rows = query.unflatten(1, (kv_heads, -1)).transpose(0, 1).reshape(kv_heads, -1, d)  # [K, T * G, d]
    out = BlockAttention.apply(rows, key[0], value[0], blocks, scale)
    return out.unflatten(1, (tokens, -1)).transpose(0, 1).flatten(1, 2)
