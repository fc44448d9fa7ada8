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
FlashAttention (Dao et al. 2022, algorithm 4) with the output and the log-sum-exp of whole rows, so blocks need no
other gradient.

Axes: T text tokens of the flattened batch, H query heads, K key/value heads, G = H / K heads of a group, R = T * G
rows of the scores (the heads of a group are folded into the rows), V packed vision tokens, d head size.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Optional

import torch
from torch.autograd.function import once_differentiable

from .attention import flash_takes, prefers_blockwise
from .int8_states import Int8States
from .vision_sequence import Span


NO_KEYS = -1e30  # log-sum-exp of a row of which no block was computed yet; finite, so that differences are defined
MOST_SCORES = 1 << 22  # most scores in memory at once where no kernel of torch returns the log-sum-exp
CPU_PIECE, GPU_PIECE = 1 << 11, 1 << 14  # vision tokens in 8 bits that are converted at once

Calls = tuple[tuple[Span, ...], ...]
Part = tuple[slice, torch.Tensor, torch.Tensor]  # rows, their output [K, rows, d], their log-sum-exp [K, rows]


# Planning, on integers


def plan_blocks(spans: list[Span]) -> Calls:
    """Blocks for spans without `visible`, as kernel calls. The blocks of a call are disjoint and ascending, in text
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


def unmasked_calls(spans: Sequence[Span]) -> Calls:
    """The spans without a mask, as blocks."""
    return tuple(ascending_calls([span for span in spans if span.visible is None]))


class Borders(NamedTuple):
    """The blocks of a call as sequences of a kernel for several lengths. Rows without keys, and keys without rows, are
    sequences of their own.

    Attributes:
        of_rows, of_keys: int32 [sequences + 1], where each sequence begins, and the end of the last one.
        most_rows, most_keys: of any sequence.
    """

    of_rows: torch.Tensor
    of_keys: torch.Tensor
    most_rows: int
    most_keys: int

    @classmethod
    def of(cls, blocks: tuple[Span, ...], device: torch.device) -> "Borders":
        """
        Args:
            blocks: `text` in rows of the scores. The sequences begin with the first block and end with the last one.
        """
        corners = [(blocks[0].text.start, blocks[0].vision.start)]
        for text, vision, _ in blocks:
            corners += [(text.start, corners[-1][1]), (text.start, vision.start), (text.stop, vision.stop)]
        borders = torch.tensor([*dict.fromkeys(corners)], dtype=torch.int32).T.contiguous()
        most_rows, most_keys = borders.diff().amax(1).tolist()
        borders = (borders - borders[:, :1]).to(device)
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
    _rows: dict = field(default_factory=dict, repr=False)
    _borders: dict = field(default_factory=dict, repr=False)

    def __post_init__(self):
        # Hooks of compressed-tensors copy the blocks for each module, with plain tuples in place of named ones.
        object.__setattr__(self, "calls", tuple(tuple(map(Span._make, call)) for call in self.calls))
        self._rows.clear()
        self._borders.clear()

    def rows(self, keys: slice) -> Calls:
        """The calls with `text` in rows of the scores and `vision` in a piece of the keys, without blocks outside it.
        They are made at the first layer."""
        at = (keys.start, keys.stop)
        if at not in self._rows:
            calls = [[self._clipped(block, keys) for block in call] for call in self.calls]
            calls = [tuple(block for block in call if block.vision.start < block.vision.stop) for call in calls]
            self._rows[at] = tuple(call for call in calls if call)
        return self._rows[at]

    def _clipped(self, block: Span, keys: slice) -> Span:
        text, vision, size = block.text, block.vision, self.group_size
        start, stop = max(vision.start, keys.start), min(vision.stop, keys.stop)
        return Span(slice(text.start * size, text.stop * size), slice(start - keys.start, stop - keys.start))

    def borders(self, keys: slice, device: torch.device) -> list[tuple[slice, slice, Borders]]:
        """The same calls as `Borders`, each with the rows and keys from its first to its last block. They are made at
        the first layer on each device."""
        at = (keys.start, keys.stop, device)
        if at not in self._borders:
            self._borders[at] = [
                (
                    slice(call[0].text.start, call[-1].text.stop),
                    slice(call[0].vision.start, call[-1].vision.stop),
                    Borders.of(call, device),
                )
                for call in self.rows(keys)
            ]
        return self._borders[at]


# Kernels


def blocks_can_run(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether blocks are faster than spans and have gradients: on CPUs that `blockwise_attention_forward` is not for,
    and where `varlen_can_run`. The caller may have turned flash-attention off."""
    if query.dtype != key.dtype or not torch.backends.cuda.flash_sdp_enabled():
        return False
    if query.device.type == "cpu":
        return not prefers_blockwise(query[None], key, 0.0)
    return varlen_can_run(query)


def varlen_can_run(query: torch.Tensor) -> bool:
    """Whether torch's flash-attention for several lengths takes this query."""
    return flash_takes(query, query.dtype)


def varlen_forward(query, key, value, borders: Borders, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """query [R, K, d], key and value [V, K, d] -> [R, K, d] and log-sum-exp [K, R], -inf at rows without keys."""
    kernel = torch.ops.aten._flash_attention_forward
    out, lse, *_ = kernel(query, key, value, *borders, 0.0, False, False, scale=scale)
    return out, lse.masked_fill(lse == torch.inf, -torch.inf)


def varlen_backward(grad, query, key, value, out, lse, borders: Borders, scale: float) -> tuple[torch.Tensor, ...]:
    """The gradients of query, key and value."""
    seed = torch.empty(2, dtype=torch.uint64, device=query.device)  # without dropout nothing reads it
    kernel = torch.ops.aten._flash_attention_backward
    return kernel(grad, query, key, value, out, lse, *borders, 0.0, False, seed, seed[0], scale=scale)


def attend_to_block(query, key, value, scale: float, mask: Optional[torch.Tensor] = None):
    """Attention that returns the log-sum-exp, on any device; autograd does not record it.

    Args:
        query: [K, R, d].
        key, value: [K, S, d].
        mask: bool [R or 1, S], True = visible.

    Returns:
        [K, R, d], and the log-sum-exp [K, R], -inf at rows that see nothing.
    """
    states = query[None], key[None], value[None]
    if mask is None and query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*states, scale=scale)
        return out[0], lse[0]
    if mask is None and varlen_can_run(query):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*states, scale=scale)
        return out[0], lse[0]
    outs, log_sums, size = [], [], max(1, MOST_SCORES // (len(key) * key.shape[1]))
    for first in range(0, query.shape[1], size):
        rows = slice(first, first + size)
        scores = (query[:, rows] * scale).float() @ key.float().transpose(1, 2)
        if mask is not None:
            scores = scores.masked_fill(~(mask if len(mask) == 1 else mask[rows]), -torch.inf)
        log_sums.append(scores.logsumexp(-1))
        weights = (scores - log_sums[-1].clamp(min=NO_KEYS)[..., None]).exp()
        outs.append((weights @ value.float()).to(query.dtype))
    return torch.cat(outs, 1), torch.cat(log_sums, 1)


def parts_of(query, key, value, blocks: Blocks, keys: slice, scale: float) -> Iterator[Part]:
    """Attends to the blocks in a piece of the keys.

    Args:
        query: [K, R, d].
        key, value: [K, keys, d], the piece.
    """
    if not varlen_can_run(query):
        for rows, vision, _ in (block for call in blocks.rows(keys) for block in call):
            yield rows, *attend_to_block(query[:, rows], key[:, vision], value[:, vision], scale)
        return
    for call, (rows, vision, borders) in zip(blocks.rows(keys), blocks.borders(keys, query.device), strict=True):
        of_call = query[:, rows], key[:, vision], value[:, vision]
        if len(call) == 1:  # one block for few rows uses the whole GPU in this kernel
            yield rows, *attend_to_block(*of_call, scale)
        else:
            out, lse = varlen_forward(*(part.transpose(0, 1) for part in of_call), borders, scale)
            yield rows, out.transpose(0, 1), lse


def merge(parts: Iterable[Part], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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


# Keys and values in the dtype of the model


class BlockAttention(torch.autograd.Function):
    """query [K, R, d], key and value [K, V, d] -> [K, R, d]."""

    @staticmethod
    def forward(ctx, query, key, value, blocks: Blocks, scale: float):
        out, lse = merge(parts_of(query, key, value, blocks, slice(0, key.shape[1]), scale), query)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, out, lse = ctx.saved_tensors
        compute = varlen_gradients if varlen_can_run(query) else block_gradients
        grads = compute(grad.contiguous(), query, key, value, out, lse, ctx.blocks, ctx.scale)
        return *grads, None, None


def block_gradients(grad, query, key, value, out, lse, blocks: Blocks, scale: float) -> tuple[torch.Tensor, ...]:
    """Gradients of query, key and value on a CPU, block by block."""
    grads = [torch.zeros_like(part) for part in (query, key, value)]
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    for rows, keys, _ in (block for call in blocks.rows(slice(0, key.shape[1])) for block in call):
        of_rows = [part[None, :, rows] for part in (grad, query, out, lse)]
        of_keys = [part[None, :, keys] for part in (key, value)]
        parts = kernel(*of_rows[:2], *of_keys, *of_rows[2:], 0.0, False, scale=scale)
        for whole, part, where in zip(grads, parts, (rows, keys, keys), strict=True):
            whole[:, where] += part[0]
    return tuple(grads)


def varlen_gradients(grad, query, key, value, out, lse, blocks: Blocks, scale: float) -> tuple[torch.Tensor, ...]:
    """Gradients of query, key and value on a GPU, call by call."""
    grads = [torch.zeros_like(part) for part in (query, key, value)]
    for rows, keys, borders in blocks.borders(slice(0, key.shape[1]), query.device):
        of_rows = [part[:, rows].transpose(0, 1) for part in (grad, query, out)]
        of_keys = [part[:, keys].transpose(0, 1) for part in (key, value)]
        parts = varlen_backward(*of_rows[:2], *of_keys, of_rows[2], lse[:, rows].contiguous(), borders, scale)
        for whole, part, where in zip(grads, parts, (rows, keys, keys), strict=True):
            whole[:, where] += part.transpose(0, 1)
    return tuple(grads)


def attend_in_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: Blocks, scale: float
) -> torch.Tensor:
    """query [T, H, d], packed key and value [1, K, V, d] -> [T, H, d], 0 at tokens in no block."""
    out = BlockAttention.apply(fold_groups(query, key.shape[1]), key[0], value[0], blocks, scale)
    return unfold_groups(out, len(query))


def fold_groups(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[T, H, d] -> [K, T * G, d]"""
    return query.unflatten(1, (kv_heads, -1)).transpose(0, 1).reshape(kv_heads, -1, query.shape[-1])


def unfold_groups(out: torch.Tensor, tokens: int) -> torch.Tensor:
    """[K, T * G, d] -> [T, H, d]"""
    return out.unflatten(1, (tokens, -1)).transpose(0, 1).flatten(1, 2)


# Keys and values in 8 bits


def attend_to_int8(
    query: torch.Tensor, key: Int8States, value: Int8States, blocks: Blocks, masked: Sequence[Span], scale: float
) -> torch.Tensor:
    """`attend_in_blocks` without gradients, also to spans with a mask. One piece of the keys and values at a time is
    converted to the dtype of the query.

    Args:
        masked: spans with `visible`, which are not among the blocks.

    Raises:
        ValueError: if the query needs a gradient.
    """
    if torch.is_grad_enabled() and query.requires_grad:
        raise ValueError(
            "A vision cache in 8 bits was read with gradients, which rounding does not have; expected "
            "`torch.no_grad()` or `torch.inference_mode()`. Leave `vision_cache_dtype` out to train."
        )
    rows = fold_groups(query, key.numbers.shape[1])

    def parts() -> Iterator[Part]:
        for piece in pieces(key, [*(block for call in blocks.calls for block in call), *masked]):
            states = [part.read(piece, rows.dtype)[0] for part in (key, value)]
            yield from parts_of(rows, *states, blocks, piece, scale)
            for span in masked:
                yield from masked_parts(rows, *states, span, piece, blocks.group_size, scale)

    return unfold_groups(merge(parts(), rows)[0].to(query.dtype), len(query))


def pieces(key: Int8States, spans: Sequence[Span]) -> Iterator[slice]:
    """Pieces of the vision tokens that any of the spans reads."""
    size = CPU_PIECE if key.numbers.device.type == "cpu" else GPU_PIECE
    for first in range(0, key.numbers.shape[2], size):
        piece = slice(first, min(first + size, key.numbers.shape[2]))
        read = [span.vision for span in spans if span.vision.start < piece.stop and piece.start < span.vision.stop]
        if read:
            start, stop = min(vision.start for vision in read), max(vision.stop for vision in read)
            yield slice(max(start, piece.start), min(stop, piece.stop))


def masked_parts(rows, key, value, span: Span, piece: slice, group_size: int, scale: float) -> Iterator[Part]:
    """Attends to what a span with a mask sees of a piece."""
    start, stop = max(span.vision.start, piece.start), min(span.vision.stop, piece.stop)
    if start < stop:
        text = slice(span.text.start * group_size, span.text.stop * group_size)
        vision = slice(start - piece.start, stop - piece.start)
        mask = torch.atleast_2d(span.visible.to(rows.device))[:, start - span.vision.start : stop - span.vision.start]
        mask = mask if len(mask) == 1 else mask.repeat_interleave(group_size, 0)
        yield text, *attend_to_block(rows[:, text], key[:, vision], value[:, vision], scale, mask)
