"""Positions of a call: XRoPE's, or the caller's `position_ids`. Packed texts are found here as well: each text starts
with new positions.

Axes: B rows, T text tokens of this call, N frames that the call places, v vision tokens of these frames.
"""

from dataclasses import dataclass, replace
from typing import Optional

import torch

from .media import frame_groups
from .vision_request import VisionRequest, count_vision_tokens
from .xrope import count_tokens, find_text_starts, frame_positions, walk_text


@dataclass(frozen=True)
class CallPositions:
    """Positions of the text and vision tokens of a call.

    Attributes:
        text: long [B, T], or [3, B, T] for (t, h, w).
        vision: long [3, v], of the vision tokens that the call places.
        rope_delta: long [B], after the call; the token at cache index i has position i + rope_delta.
        of_caller: whether `text` holds positions of the caller that are not XRoPE's.
        text_starts: bool [B, T], for packed rows True at the first token of each text; None if every row is one text.
        text_index: long [B, T], for packed rows the text of each token, counted from 1; else None.
    """

    text: torch.Tensor
    vision: torch.Tensor
    rope_delta: torch.Tensor
    of_caller: bool = False
    text_starts: Optional[torch.Tensor] = None
    text_index: Optional[torch.Tensor] = None

    def highest(self, shape) -> torch.Tensor:
        """The largest coordinate of each token, expanded to [B, T]."""
        return (self.text if self.text.ndim == 2 else self.text.amax(0)).expand(shape)


def read_positions(
    request: VisionRequest,
    position_ids: Optional[torch.Tensor],
    attention_mask: Optional[torch.Tensor],
    with_cache: bool,
) -> CallPositions:
    """The positions of a call. Generic code makes `position_ids` that only count the tokens of a row; these are
    replaced by XRoPE's.

    Args:
        with_cache: whether the caller gave a cache or asked for one: a cache continues one text per row.

    Raises:
        ValueError: for positions that do not fit, and for packed texts with a cache.
    """
    if position_ids is None:
        return walk_request(request)
    text_starts = None
    if not request.past_length:
        has_ready_mask = attention_mask is not None and attention_mask.ndim == 4
        text_starts = find_packed_texts(request, position_ids, has_ready_mask)
    if text_starts is not None and with_cache:
        raise ValueError(
            "`position_ids` start again within a row, so the row holds several texts, and a cache is used; expected "
            "use_cache=False and no cache: a cache continues one text per row."
        )
    first_positions = None if text_starts is None else first_axis(position_ids, request)
    walked = walk_request(request, text_starts, first_positions)
    return with_given_positions(request, walked, position_ids, attention_mask)


def first_axis(position_ids: torch.Tensor, request: VisionRequest) -> torch.Tensor:
    """The caller's positions, or those on the first of three axes, [B, T]."""
    is_token = request.text.is_token
    first = position_ids if position_ids.ndim == 2 else position_ids[0]
    return first.to(is_token.device).expand(is_token.shape)


def find_packed_texts(
    request: VisionRequest, position_ids: torch.Tensor, has_ready_mask: bool
) -> Optional[torch.Tensor]:
    """The first tokens of packed texts, bool [B, T]; None if the caller's `position_ids` do not start again within a
    row.

    A text begins at a token whose position is not above that of the previous token. The positions of a row either
    count its tokens, or are XRoPE's. In XRoPE an `image_pad` has a position after its frame, so the position at which
    the frame starts is compared. With a ready 4D mask, positions may also go back within one text, for a tree of
    continuations; then only a position of 0 begins another text.
    """
    is_token = request.text.is_token
    if position_ids.shape[-2:] not in (is_token.shape, (1, is_token.shape[1])):
        return None  # `with_given_positions` raises the error
    positions = first_axis(position_ids, request)
    begins, starts = positions, find_text_starts(positions, positions, is_token)
    if any(request.text.pads):
        # [B, 1], whether the positions of the row count its tokens, so that its frames take no space
        counts = ((count_tokens(is_token, starts, positions) == positions) | ~is_token).all(1, keepdim=True)
        begins = positions.clone()
        begins[request.text.is_frame] -= frame_extents(request)
        begins = torch.where(counts, positions, begins)
        starts = find_text_starts(positions, begins, is_token)
    if has_ready_mask and (begins[starts] != 0).any():
        return None
    return starts if (starts.sum(1) > 1).any() else None


def frame_extents(request: VisionRequest) -> torch.Tensor:
    """max(H, W) of each frame that a call places, in the order of the rows: long [N]."""
    extents = [max(grid) for sample in request.state.row_sample for grid in request.frames_placed(sample)]
    return torch.tensor(extents, dtype=torch.long, device=request.text.is_token.device)


def walk_request(
    request: VisionRequest,
    text_starts: Optional[torch.Tensor] = None,
    first_positions: Optional[torch.Tensor] = None,
) -> CallPositions:
    """XRoPE's positions of a call.

    Args:
        text_starts, first_positions: [B, T], for packed rows, as in `walk_text`.

    Raises:
        ValueError: if rows of one sample have its frames at different positions.
    """
    text, state = request.text, request.state
    start = counters_before(request)
    if text.length == 1 and not any(text.pads):
        positions = start[:, None].masked_fill(~text.is_token, 0)
        rope_delta = start + text.is_token[:, 0] - request.past_length - 1
        return CallPositions(positions, blank_positions(request), rope_delta)
    positions, origins, end = walk_text(
        text.is_token, text.is_frame, frame_extents(request), start, text_starts, first_positions
    )
    origins_of_rows = origins.split([text.pads[sample] for sample in state.row_sample])
    check_shared_origins(request, origins_of_rows)
    parts = []
    for sample, row in enumerate(state.first_rows()):
        groups = frame_groups((1, height, width) for height, width in request.frames_placed(sample))
        origins_of_groups = origins_of_rows[row].split([group.frames for group in groups])
        for group, group_origins in zip(groups, origins_of_groups, strict=True):
            parts.append(frame_positions(group_origins, group.rows, group.columns))
    return CallPositions(
        text=positions,
        vision=torch.cat(parts, dim=1) if parts else blank_positions(request),
        rope_delta=end - request.past_length - text.length,
        text_starts=text_starts,
        text_index=None if text_starts is None else text_starts.cumsum(1),
    )


def counters_before(request: VisionRequest) -> torch.Tensor:
    """The position of the first token of the call in each row, long [B]."""
    state, device = request.state, request.text.is_token.device
    start = torch.full((len(state.row_sample),), request.past_length, device=device)
    if state.rope_delta is not None:
        start = start + state.rope_delta.to(device)
    dropped = request.text.padding.dropped
    return start if dropped is None else start - dropped


def blank_positions(request: VisionRequest) -> torch.Tensor:
    """Positions of the vision tokens of a call that places no frame: long [3, v], 0 for blank media, else v = 0."""
    tokens = 0 if request.blank is None else count_vision_tokens(sum(request.blank.frames(), []))
    return torch.zeros(3, tokens, dtype=torch.long, device=request.text.is_token.device)


def check_shared_origins(request: VisionRequest, origins_of_rows: tuple[torch.Tensor, ...]) -> None:
    """Refuses rows of one sample that place its frames at different positions.

    Raises:
        ValueError: for the first such row.
    """
    first_rows = request.state.first_rows()
    for row, sample in enumerate(request.state.row_sample):
        first = first_rows[sample]
        shares = row != first and request.text.pads[sample]
        if shares and not torch.equal(origins_of_rows[row], origins_of_rows[first]):
            raise ValueError(
                f"Text rows {first} and {row} share the frames of sample {sample}, but place them at different "
                "positions; expected the same text. Give each conversation a separate cache before new frames come."
            )


def with_given_positions(
    request: VisionRequest,
    walked: CallPositions,
    position_ids: torch.Tensor,
    attention_mask: Optional[torch.Tensor],
) -> CallPositions:
    """XRoPE's positions (`walked`), replaced by the caller's in rows where these do more than count tokens.

    Raises:
        ValueError: for positions of another shape, and for packed rows with frames whose positions are neither counts
            nor XRoPE's.
    """
    is_token, given = request.text.is_token, position_ids.shape
    if given[-2:] not in (is_token.shape, (1, is_token.shape[1])) or given[:-2] not in ((), (3,)):
        raise ValueError(
            f"`position_ids` has shape {list(given)}; expected {list(is_token.shape)}, or the same after a leading 3 "
            "for (t, h, w): one position per token of this call."
        )
    position_ids = position_ids.to(is_token.device).expand(*given[:-2], *is_token.shape)
    axes = position_ids if position_ids.ndim == 3 else position_ids[None]
    counts = rows_that_count(request, walked, axes, attention_mask)
    if counts.all():
        return walked
    length = request.past_length + request.text.length
    highest = axes.amax(0).masked_fill(~is_token, torch.iinfo(axes.dtype).min).amax(1)
    rope_delta = torch.where(is_token.any(1), highest + 1 - length, walked.rope_delta)
    return replace(
        walked,
        text=torch.where(counts[:, None], walked.text, position_ids),
        rope_delta=torch.where(counts, walked.rope_delta, rope_delta),
        of_caller=True,
    )


def rows_that_count(
    request: VisionRequest, walked: CallPositions, axes: torch.Tensor, attention_mask: Optional[torch.Tensor]
) -> torch.Tensor:
    """The rows whose given positions `axes` [1 or 3, B, T] only count tokens, bool [B]. Packed rows with XRoPE's
    positions count as such rows.

    Raises:
        ValueError: if a packed row with frames is neither.
    """
    is_token, text_starts = request.text.is_token, walked.text_starts

    def equal(positions):  # [B]
        return ((axes == positions) | ~is_token).all(-1).all(0)

    counted = [torch.arange(request.past_length + request.text.length, device=is_token.device)[None]]
    if attention_mask is not None and attention_mask.ndim == 2:
        counted.append(attention_mask.to(is_token.device).cumsum(1) - 1)
    counts = torch.stack([equal(positions[:, request.past_length :]) for positions in counted]).any(0)
    if text_starts is not None:
        counts |= equal(walked.text) | equal(count_tokens(is_token, text_starts, axes[0]))
        if any(request.text.pads) and (~counts & (text_starts.sum(1) > 1)).any():
            raise ValueError(
                "`position_ids` start again within a row that has frames, but are neither token counts (0, 1, 2, ... "
                "in each text) nor XRoPE's positions; expected one of these, or a row per text."
            )
    return counts
