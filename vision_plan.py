"""Plans a call: the frames that each text token sees, as spans of text tokens and packed vision tokens.

    visible_runs    text runs of each row: the default visibility, or the caller's mask
    PackedLayout    offsets of the vision tokens in the packed keys and values, with those that are new or move
    plan_spans      text runs -> spans; `join_small_spans` joins those that one attention call does faster
    remember        keeps the call, so that the cache can be cropped back into it

Axes: B rows, T text tokens per row in this call, N frames. The drawing in vision_sequence.py shows all index spaces.
"""

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Optional

import numpy as np
import torch
from transformers.utils import logging

from .block_attention import plan_blocks, staircases
from .call_positions import CallPositions
from .vision_request import VisionRequest, count_vision_tokens
from .vision_sequence import (
    PAST_CALLS,
    FrameSet,
    PastCall,
    Spaces,
    Span,
    TextRun,
    VisionCall,
    VisionState,
    last_visible,
    shifted,
)


logger = logging.get_logger(__name__)

JOINED_SIZE = 1 << 15  # most text tokens x vision tokens of spans that are joined into one
LEAST_STEPS = 8  # spans of a staircase from which on blocks are faster


def plan_call(request: VisionRequest, positions: CallPositions) -> tuple[VisionState, VisionCall]:
    """Plans what the text tokens of a call see.

    Returns:
        The state after the call, except `waiting` and `last_ids`, which the model fills in; and the plan.

    Raises:
        ValueError: if the caller's mask does not fit the text.
    """
    state, length = request.state, request.text.length
    after = replace(
        state,
        rope_delta=positions.rope_delta,
        length=request.past_length + length,
        unplaced=request.unplaced,
        token_counts=request.text.padding.token_counts,
        is_token=request.text.padding.cached,
    )
    continues = request.only_continues() and positions.text_index is None
    if continues and length == 1 and state.step is not None:  # a decode step after the first: the plan is the same
        if positions.of_caller:
            after = remember(after, request, positions, None)
        return after, state.step
    text = host_text(request, continues, positions.text_index)
    runs = visible_runs(request, text)
    layout = PackedLayout.of(request)
    call = vision_call(request, runs, layout)
    if continues:
        after = replace(after, step=call if length == 1 else state.step)
    else:
        after = replace(
            after,
            grids=request.grids(),
            placed=[known + pads for known, pads in zip(state.placed, request.text.pads, strict=True)],
            last_visible=list(map(last_visible, runs, text.is_token, state.last_visible)),
            starts=layout.spaces.starts,
            ends=layout.spaces.ends,
            stored=layout.spaces.length,
            step=None,
        )
    if not continues or positions.of_caller:
        after = remember(after, request, positions, (text, runs))
    return after, call


def remember(
    after: VisionState,
    request: VisionRequest,
    positions: CallPositions,
    plan: Optional[tuple["HostText", list[list[TextRun]]]],
) -> VisionState:
    """The state with this call among its `past_calls`.

    Args:
        plan: text and text runs of the call; None if its tokens see the frames that the previous token saw.
    """
    state = request.state
    if plan is None:
        length = request.text.length
        runs = [[TextRun(0, length, frames)] for frames in state.last_visible]
        plan = host_text(request, continues=True, text_index=None), runs
    text, runs = plan
    samples = len(state.grids)
    call = PastCall(
        start=request.past_length,
        end=after.length,
        before=replace(
            state,
            waiting=[None] * samples,
            unplaced=[[] for _ in range(samples)],
            last_ids=None,
            step=None,
            past_calls=(),
        ),
        rows=list(range(len(state.row_sample))),
        is_token=text.is_token,
        is_frame=text.is_frame,
        runs=runs,
        positions=positions.highest(request.text.is_token.shape),
        dropped=request.text.padding.dropped,
    )
    calls = (*state.past_calls, call)
    forgotten = calls[:-PAST_CALLS]
    return replace(
        after, past_calls=calls[-PAST_CALLS:], remembered=forgotten[-1].end if forgotten else state.remembered
    )


# From text to text runs


@dataclass(frozen=True)
class HostText:
    """The text of a call on the host.

    Attributes:
        is_token, is_frame: bool [B, T], as in `TextRequest`.
        text_index: long [B, T], for packed rows the text that each token belongs to; else None.
    """

    is_token: np.ndarray
    is_frame: np.ndarray
    text_index: Optional[np.ndarray]


def host_text(request: VisionRequest, continues: bool, text_index: Optional[torch.Tensor]) -> HostText:
    """The text of a call on the host. If the call only continues, nothing is copied from the device."""
    if continues:
        shape = tuple(request.text.is_token.shape)
        return HostText(np.ones(shape, dtype=bool), np.zeros(shape, dtype=bool), None)
    text_index = None if text_index is None else text_index.cpu().numpy()
    return HostText(request.text.is_token.cpu().numpy(), request.text.is_frame.cpu().numpy(), text_index)


@dataclass(frozen=True)
class RowText:
    """One row of a call, and the frames that its tokens place.

    Attributes:
        number: index of the row.
        sample: index of its sample.
        is_token: bool [T], False at padding.
        reached: long [T], number of frames of the sample that are placed at or before each token.
        first_frame: long [T], the first frame of each token's packed text; 0 if the row is one text.
        placed: number of frames of the sample that were placed before the call.
        visible_before: the frames that the row's last token before the call saw.
    """

    number: int
    sample: int
    is_token: np.ndarray
    reached: np.ndarray
    first_frame: np.ndarray
    placed: int
    visible_before: FrameSet

    @classmethod
    def of(cls, request: VisionRequest, text: HostText, number: int) -> "RowText":
        state = request.state
        sample = state.row_sample[number]
        placed = state.placed[sample]
        reached = placed + text.is_frame[number].astype(np.int64).cumsum()
        first_frame = np.zeros(len(reached), dtype=reached.dtype)
        if text.text_index is not None:
            starts = np.flatnonzero(np.diff(text.text_index[number], prepend=-1))
            before = np.concatenate([[placed], reached])[starts]
            first_frame = np.repeat(before, np.diff([*starts, len(reached)]))
        visible_before = state.last_visible[number]
        return cls(number, sample, text.is_token[number], reached, first_frame, placed, visible_before)

    def runs(self, tokens: slice, placed: int, visible: FrameSet) -> list[TextRun]:
        """Text runs of `tokens` without a mask. A token sees `visible` and those frames of its text, from number
        `placed` on, that are placed at or before it. Padding sees nothing."""
        reached = np.where(self.is_token, self.reached, -1)[tokens]
        first_frame = self.first_frame[tokens]
        runs = []
        for start, end in equal_rows(np.stack([reached, first_frame], axis=1)):
            frames = FrameSet()
            if reached[start] >= 0:
                frames = visible.with_frames(max(placed, int(first_frame[start])), int(reached[start]))
            runs.append(TextRun(tokens.start + start, tokens.start + end, frames))
        return runs

    def placed_frames(self, tokens: slice, count: int) -> np.ndarray:
        """bool [m, count], True at frames that belong to the token's text and are placed at or before the token; False
        at padding."""
        frame = np.arange(count)
        is_placed = (frame >= self.first_frame[tokens, None]) & (frame < self.reached[tokens, None])
        return is_placed & self.is_token[tokens, None]


def equal_rows(values: np.ndarray) -> list[tuple[int, int]]:
    """Consecutive equal rows of an array [n, k], as (first, end)."""
    edges = np.flatnonzero((values[1:] != values[:-1]).any(axis=1)) + 1
    return list(pairwise([0, *edges.tolist(), len(values)])) if len(values) else []


def visible_runs(request: VisionRequest, text: HostText) -> list[list[TextRun]]:
    """Text runs of each row of a call.

    Without a mask, a token sees the frames that the last token before the call saw, and every frame of its text whose
    `image_pad` is at or before the token. Padding sees nothing.

    Raises:
        ValueError: if the mask has too few columns, makes missing frames visible, or contradicts the text.
    """
    rows = [RowText.of(request, text, number) for number in range(len(request.state.row_sample))]
    if request.mask is None:
        return [row.runs(slice(0, len(row.reached)), row.placed, row.visible_before) for row in rows]
    tokens, length = request.mask.tokens, request.text.length
    if text.text_index is not None and tokens != slice(0, length):
        raise ValueError(
            f"`cross_attention_mask` has {tokens.stop} rows for {length} tokens of packed texts; expected a row per "
            "token, or no mask."
        )
    return [masked_runs(request, row) for row in rows]


def masked_runs(request: VisionRequest, row: RowText) -> list[TextRun]:
    """Text runs of a row under the caller's mask. Tokens that the mask does not cover see every frame placed at or
    before them."""
    tokens, length = request.mask.tokens, len(row.reached)
    visible = masked_frames(request, row)
    if visible is None:
        return row.runs(slice(0, length), row.placed, row.visible_before)
    runs = row.runs(slice(0, tokens.start), row.placed, row.visible_before)
    runs += [
        TextRun(tokens.start + start, tokens.start + end, FrameSet.from_mask(visible[start]))
        for start, end in equal_rows(visible)
    ]
    placed = int(row.reached[tokens.stop - 1]) if tokens.stop else row.placed
    last = last_visible(runs, row.is_token[: tokens.stop], row.visible_before)
    return runs + row.runs(slice(tokens.stop, length), placed, last)


def masked_frames(request: VisionRequest, row: RowText) -> Optional[np.ndarray]:
    """The frames that the tokens of the caller's mask see: bool [m, frames of the sample].

    Returns:
        None if the mask is ignored: a processor made it, and the text was padded, cut or joined afterwards.

    Raises:
        ValueError: if the mask has too few columns, makes missing frames visible, or contradicts the text in
            another way.
    """
    state, mask = request.state, request.mask
    given, first = given_frames(request, row)
    count = first + given.shape[1]
    placed = row.placed_frames(mask.tokens, count)
    by_default = (row.visible_before.as_mask(count) | (np.arange(count) >= state.placed[row.sample])) & placed
    visible = by_default.copy()
    visible[:, first:] = given
    wrong = visible & ~placed
    is_short = len(visible) < request.text.length  # text was appended after the processor, and may be shifted
    if wrong.any() or (is_short and (visible != by_default).any()):
        if (mask.new_frames_only or not request.past_length) and is_of_processor(given):
            logger.warning_once(
                "`cross_attention_mask` is ignored: the text was padded, cut or joined after the processor made the "
                "mask. Every token sees the frames placed before it. Leave the mask out: load the processor with "
                "return_cross_attention_mask=False."
            )
            return None
    if wrong.any():
        token, frame = (int(index) for index in np.argwhere(wrong)[0])
        is_token = row.is_token[mask.tokens][token]
        why = "before the frame's `image_pad`, or in another packed text" if is_token else "which is padding"
        raise ValueError(
            f"`cross_attention_mask` makes frame {frame} of sample {row.sample} visible to token {token} of this "
            f"call, {why}: the mask does not belong to these `input_ids`. Text that was padded, cut or joined after "
            "the processor needs a new mask. Without a mask, every token sees the frames placed before it."
        )
    return visible


def given_frames(request: VisionRequest, row: RowText) -> tuple[np.ndarray, int]:
    """The caller's mask for a row.

    Returns:
        bool [m, frames], without columns beyond the sample's frames; and the frame number of the first column.

    Raises:
        ValueError: if the mask has too few columns, or makes missing frames visible.
    """
    totals = list(map(len, request.grids()))
    first = len(request.state.grids[row.sample]) if request.mask.new_frames_only else 0
    visible, count = request.mask.visible[row.number], totals[row.sample] - first
    if counts_dropped_frames(request, visible.shape[1], totals):
        visible = visible[:, request.state.dropped[row.sample] :]
    if visible.shape[1] < count or visible[:, count:].any():
        raise ValueError(
            f"`cross_attention_mask` has {visible.shape[1]} frame columns, and sample {row.sample} has {count} of "
            f"these frames; expected [B, 1, T, {max(totals)}], True = hidden, also at columns that a sample has no "
            "frame for."
        )
    return visible[:, :count], first


def counts_dropped_frames(request: VisionRequest, columns: int, totals: list[int]) -> bool:
    """Whether the `columns` of the caller's mask are the frames of the conversation from its beginning, those that the
    cache dropped included: their number is that of these frames, and not that of the frames that remain (`totals`)."""
    if request.mask.new_frames_only or not any(request.state.dropped):
        return False
    whole = [total + dropped for total, dropped in zip(totals, request.state.dropped, strict=True)]
    return columns == max(whole) != max([1, *totals])


def is_of_processor(visible: np.ndarray) -> bool:
    """Whether `visible` [m, N] (True = visible) is a mask that a processor can make for a text with N frames.

    In such a mask each `image_pad` makes one more frame visible, in order, and the last token sees all frames. Padding
    sees none, and is on one side.
    """
    counts = visible.sum(axis=1)
    tokens = np.flatnonzero(counts)  # those to which a frame is visible
    if not len(tokens) or len(tokens) <= tokens[-1] - tokens[0]:  # there is none, or there is a gap between them
        return False
    steps = np.diff(counts[tokens], prepend=0)
    first_frames = (visible == (np.arange(visible.shape[1]) < counts[:, None])).all()
    return bool(first_frames and ((steps == 0) | (steps == 1)).all() and steps.sum() == visible.shape[1])


def whole_mask(request: VisionRequest) -> torch.Tensor:
    """The mask of the caller for the whole conversation, bool [B, 1, cache + m, N], True = hidden, which later
    calls can pass without the media. The rows of tokens in the cache hide all frames, as no call reads them again."""
    text = host_text(request, continues=False, text_index=None)
    totals = list(map(len, request.grids()))
    end = request.mask.tokens.stop
    visible = np.zeros((len(text.is_token), 1, request.past_length + end, max([1, *totals])), dtype=bool)
    for row, runs in enumerate(visible_runs(request, text)):
        count = totals[request.state.row_sample[row]]
        for run in runs:
            tokens = slice(request.past_length + run.first, request.past_length + min(run.end, end))
            visible[row, 0, tokens, :count] = run.frames.as_mask(count)
    return torch.from_numpy(~visible)


# From text runs to spans


@dataclass(frozen=True)
class PackedLayout:
    """Where the vision tokens of all samples lie in the packed keys and values after a call.

    Attributes:
        spaces: the space of each sample.
        frame_starts: for each sample, the offset of each frame within the sample, and at the end the sample's length.
        writes, moves: as in `VisionCall`.
    """

    spaces: Spaces
    frame_starts: list[list[int]]
    writes: tuple[tuple[slice, slice], ...] = ()
    moves: Optional[tuple[tuple[slice, slice], ...]] = None

    @classmethod
    def of(cls, request: VisionRequest) -> "PackedLayout":
        state = request.state
        frame_starts = [
            list(accumulate((height * width + 1 for height, width in grids), initial=0)) for grids in request.grids()
        ]
        spaces = Spaces(state.starts, state.ends, state.stored)
        if not any(request.text.pads):  # no keys to write
            return cls(spaces, frame_starts)
        placed = [known + pads for known, pads in zip(state.placed, request.text.pads, strict=True)]
        old = [of_frames[count] for of_frames, count in zip(frame_starts, state.placed, strict=True)]
        new = [of_frames[count] for of_frames, count in zip(frame_starts, placed, strict=True)]
        moves = None
        if any(start + count > end for start, count, end in zip(spaces.starts, new, spaces.ends, strict=True)):
            spaces = cls.new_spaces(state, frame_starts, new)
            moves = state.moves_to(spaces, old)
        writes, offset = [], 0
        for start, first, stop in zip(spaces.starts, old, new, strict=True):
            if stop > first:
                writes.append((shifted(0, stop - first, offset), shifted(first, stop, start)))
            offset += stop - first
        return cls(spaces, frame_starts, tuple(join_slices(writes)), moves)

    @staticmethod
    def new_spaces(state: VisionState, frame_starts: list[list[int]], new: list[int]) -> Spaces:
        """Spaces for all frames of a call, those that wait included. Samples whose frames came in several calls get
        free space.

        Args:
            new: for each sample, tokens of its placed frames after the call.
        """
        tokens = [of_frames[-1] for of_frames in frame_starts]
        grows = [
            state.stored > 0 and (start + placed > end or start + count < end)
            for start, placed, count, end in zip(state.starts, new, tokens, state.ends, strict=True)
        ]
        return Spaces.plan(tokens, grows)

    def tokens(self, sample: int, first: int, stop: int) -> slice:
        """Packed tokens of the sample's frames first..stop."""
        of_frames = self.frame_starts[sample]
        return shifted(of_frames[first], of_frames[stop], self.spaces.starts[sample])


def join_slices(pairs: list[tuple[slice, slice]]) -> list[tuple[slice, slice]]:
    """Joins consecutive (source, destination) pairs whose sources and destinations both follow each other."""
    joined: list[tuple[slice, slice]] = []
    for source, destination in pairs:
        if joined and (joined[-1][0].stop, joined[-1][1].stop) == (source.start, destination.start):
            first_source, first_destination = joined.pop()
            source = slice(first_source.start, source.stop)
            destination = slice(first_destination.start, destination.stop)
        joined.append((source, destination))
    return joined


def vision_call(request: VisionRequest, runs: list[list[TextRun]], layout: PackedLayout) -> VisionCall:
    """The plan of a call from its text runs."""
    if request.blank is not None:
        return blank_call(request)
    rows, length, device = *request.text.is_token.shape, request.text.is_token.device
    spans = plan_spans(request, runs, layout)
    has_visible = None
    if sum(span.text.stop - span.text.start for span in spans) < rows * length:
        sees_vision = np.zeros(rows * length, dtype=np.float32)
        for span in spans:
            sees_vision[span.text] = 1.0
        has_visible = torch.from_numpy(sees_vision).view(rows, length, 1).to(device)
    joined, found = join_small_spans(spans, device), staircases(spans)
    in_blocks = (
        len(joined) > len(found)  # else one call with a small mask computes each staircase
        and max(map(len, found)) >= LEAST_STEPS
        and all(span.visible is None for span in spans)
    )
    return VisionCall(
        joined,
        has_visible,
        layout.spaces.length,
        layout.writes,
        layout.moves,
        blocks=plan_blocks(spans) if in_blocks else None,
    )


def blank_call(request: VisionRequest) -> VisionCall:
    """The plan of a call with blank media: all text tokens attend to them, and `has_visible` multiplies the result by
    0. Only for calls without a cache."""
    is_token = request.text.is_token
    tokens = count_vision_tokens(sum(request.blank.frames(), []))
    return VisionCall(
        spans=[Span(text=slice(0, is_token.numel()), vision=slice(0, tokens))],
        has_visible=torch.zeros_like(is_token, dtype=torch.float32)[..., None],
        length=tokens,
    )


def plan_spans(request: VisionRequest, runs: list[list[TextRun]], layout: PackedLayout) -> list[Span]:
    """The text runs of all rows as spans. Adjacent runs that see the same vision tokens become one span."""
    spans: list[Span] = []
    length, device = request.text.length, request.text.is_token.device
    for row, sample in enumerate(request.state.row_sample):
        for first, end, frames in runs[row]:
            if not frames:
                continue
            text, visible = shifted(first, end, row * length), None
            vision = layout.tokens(sample, frames.first, frames.stop)
            if frames.visible is not None:
                sizes = np.diff(layout.frame_starts[sample][frames.first : frames.stop + 1])
                visible = torch.from_numpy(np.repeat(frames.visible, sizes)).to(device)
            elif (
                spans and spans[-1].visible is None and (spans[-1].vision, spans[-1].text.stop) == (vision, text.start)
            ):
                text = slice(spans.pop().text.start, text.stop)
            spans.append(Span(text, vision, visible))
    return spans


def join_small_spans(spans: list[Span], device) -> list[Span]:
    """Joins adjacent spans that begin at the same vision token, up to `JOINED_SIZE`: for small spans, one attention
    call with a mask costs less than several without."""
    groups: list[list[Span]] = []
    for span in spans:
        if groups and can_join(groups[-1], span):
            groups[-1].append(span)
        else:
            groups.append([span])
    return [group[0] if len(group) == 1 else join_spans(group, device) for group in groups]


def can_join(group: list[Span], span: Span) -> bool:
    """Whether a span continues a group of spans: its text tokens follow theirs, and its vision tokens begin at the
    same token and end no earlier."""
    first, last = group[0], group[-1]
    size = (span.text.stop - first.text.start) * (span.vision.stop - span.vision.start)
    return (
        size <= JOINED_SIZE
        and first.visible is None
        and span.visible is None
        and span.text.start == last.text.stop
        and span.vision.start == first.vision.start
        and span.vision.stop >= last.vision.stop
    )


def join_spans(group: list[Span], device) -> Span:
    """One span for a group of spans, with `visible` [text, vision]."""
    text, vision = slice(group[0].text.start, group[-1].text.stop), group[-1].vision
    ends = [span.vision.stop - vision.start for span in group]
    ends_of_tokens = np.repeat(ends, [span.text.stop - span.text.start for span in group])
    visible = np.arange(vision.stop - vision.start) < ends_of_tokens[:, None]
    return Span(text, vision, torch.from_numpy(visible).to(device))
