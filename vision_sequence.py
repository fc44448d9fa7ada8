"""The vision sequence of a conversation: its frames, and which text tokens see which vision tokens.

Axes: B rows, T text tokens per row in this call, S text tokens per row in all (cache included), V vision tokens
(the tokens of each frame and its separator, all samples one after the other without padding).

A text token nearly always sees consecutive frames of its sample. So visibility is a short list of spans (text tokens
i..j see vision tokens u..v), and no T x V mask is built. A range i..j includes i and excludes j. Spans are integers on
the host. They are planned once per call, and all layers use them. Rows of one sample (beams, several answers) share
its vision sequence.

Five index spaces meet here. An example with two samples and three frames (I is an `image_pad`, _ is padding):

    input_ids [2, 4]     column  0   1   2   3
                  row 0          _   a   I   b      sample 0: frame 0, merged grid 2 x 3
                  row 1          I   c   I   d      sample 1: frame 0, merged grid 1 x 2; frame 1, 2 x 2

    text token                   0   1   2   3
     = row * 4 + column          4   5   6   7

    packed vision token    0  1  2  3  4  5  6  |  7  8  9  | 10 11 12 13 14      (6, 9 and 14 are separators)
    sample                 0                    |  1        |  1
    frame of the sample    0                    |  0        |  1
    token of the sample    0  1  2  3  4  5  6  |  0  1  2  |  3  4  5  6  7

Each sample begins at `starts` = [0, 7] and has the space up to `ends` = [7, 15]. If frames of a sample come in several
calls, the sample gets more space than it needs, so that most later frames are written without moving others. If its
oldest frames are dropped, the sample starts later, and the frames that remain are numbered from 0.

The text runs of the rows, and the spans that the plan makes of them:

    row   columns   frames        text tokens   vision tokens
    0     0..2      none          no span: these tokens pass the cross-attention layers unchanged
    0     2..4      0             2..4          0..7
    1     0..2      0             4..6          7..10
    1     2..4      0 and 1       6..8          7..15

The last two spans begin at the same vision token, so they are joined into one attention call with a mask: text tokens
4..8, vision tokens 7..15, where text tokens 4 and 5 see the first 3 of the 8 vision tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple, Optional

import numpy as np
import torch
import torch.nn.functional as F

from .media import Media


PAST_CALLS = 128  # calls that a cache can be cropped back into
VISION_BUFFER = 256  # least number of free tokens after the frames of a sample that came in several calls


def count_vision_tokens(grids: Sequence[tuple[int, int]]) -> int:
    """Vision tokens of frames with these merged grids, separators included."""
    return sum(height * width + 1 for height, width in grids)


@dataclass(frozen=True, eq=False)
class FrameSet:
    """Visible frames of a sample: first..stop, without those where bool `visible` [stop - first] is False."""

    first: int = 0
    stop: int = 0
    visible: Optional[np.ndarray] = None

    @classmethod
    def from_mask(cls, visible: np.ndarray) -> "FrameSet":
        """The frames at which a bool array over the sample's frames is True."""
        frames = np.flatnonzero(visible)
        if not len(frames):
            return cls()
        first, stop = int(frames[0]), int(frames[-1]) + 1
        return cls(first, stop, None if len(frames) == stop - first else visible[first:stop])

    def as_mask(self, count: int) -> np.ndarray:
        """bool [count], True at the visible ones of a sample's first `count` frames."""
        mask = np.zeros(max(count, self.stop), dtype=bool)
        mask[self.first : self.stop] = True if self.visible is None else self.visible
        return mask[:count]

    def with_frames(self, first: int, stop: int) -> "FrameSet":
        """These frames and first..stop."""
        if first >= stop:
            return self
        if not self:
            return FrameSet(first, stop)
        if self.visible is None and self.stop == first:
            return FrameSet(self.first, stop)
        mask = self.as_mask(max(stop, self.stop))
        mask[first:stop] = True
        return FrameSet.from_mask(mask)

    def without_first(self, count: int) -> "FrameSet":
        """The frames from number `count` on, numbered from 0."""
        if not count or not self:
            return self
        if self.visible is not None:
            return FrameSet.from_mask(self.as_mask(self.stop)[count:])
        return FrameSet(max(0, self.first - count), self.stop - count) if self.stop > count else FrameSet()

    def __bool__(self) -> bool:
        return self.stop > self.first

    def __eq__(self, other) -> bool:
        return (self.first, self.stop) == (other.first, other.stop) and np.array_equal(
            self.as_mask(self.stop), other.as_mask(self.stop)
        )


class TextRun(NamedTuple):
    """Tokens first..end of a row, which see the same frames."""

    first: int
    end: int
    frames: FrameSet


def last_visible(runs: list[TextRun], is_token: np.ndarray, before: FrameSet) -> FrameSet:
    """The frames that the last token of a row sees; `before` if the row has only padding.

    Args:
        is_token: bool [T], False at padding.
    """
    tokens = np.flatnonzero(is_token)
    return next(run.frames for run in runs if run.first <= tokens[-1] < run.end) if len(tokens) else before


class Span(NamedTuple):
    """Text tokens that see the same vision tokens, apart from those that `visible` excludes.

    Attributes:
        text: a slice of the flattened text tokens [B * T].
        vision: a slice of the packed vision tokens [V].
        visible: bool [vision] or [text, vision]; None if all are visible.
    """

    text: slice
    vision: slice
    visible: Optional[torch.Tensor] = None


@dataclass(frozen=True)
class VisionCall:
    """What the cross-attention layers of one forward call need to know.

    Attributes:
        spans: which text tokens see which vision tokens, in the order of the text tokens.
        has_visible: [B, T, 1], 0 at text tokens that see no vision token, else 1; None if every token sees one.
        length: length of the packed keys and values after the call, free space included.
        writes: (source, destination) slices: from the new vision tokens to the packed keys and values.
        moves: (source, destination) slices of cached vision tokens whose offset in the packed keys and values
            changes; None if all stay.
        blocks: the spans as blocks without masks, in calls of a kernel (block_attention.py); None if there are few
            spans, or one has a mask of its own.
    """

    spans: list[Span]
    has_visible: Optional[torch.Tensor]
    length: int
    writes: tuple[tuple[slice, slice], ...] = ()
    moves: Optional[tuple[tuple[slice, slice], ...]] = None
    blocks: Optional[tuple[tuple[Span, ...], ...]] = None

    def __post_init__(self):
        # Hooks of compressed-tensors copy a call for each module, with spans that are plain tuples.
        object.__setattr__(self, "spans", [Span._make(span) for span in self.spans])

    def shifts(self) -> bool:
        """Whether any cached vision token changes its index, so that a call that fails leaves layers that differ."""
        return any(source != destination for source, destination in self.moves or ())


class Spaces(NamedTuple):
    """The space of each sample in the packed keys and values.

    Attributes:
        starts: where each sample begins.
        ends: where its space ends. New frames are written before it.
        length: length of the packed keys and values.
    """

    starts: list[int]
    ends: list[int]
    length: int

    @classmethod
    def plan(cls, tokens: list[int], grows: list[bool]) -> "Spaces":
        """Spaces one after the other, for `tokens` per sample. A sample that `grows` gets an eighth more than that: so
        appending a token moves about eight others, however many there are."""
        sizes = [count + max(VISION_BUFFER, count // 8) * grown for count, grown in zip(tokens, grows, strict=True)]
        *starts, length = accumulate(sizes, initial=0)
        return cls(starts, [start + size for start, size in zip(starts, sizes, strict=True)], length)


def shifted(first: int, stop: int, offset: int) -> slice:
    return slice(first + offset, stop + offset)


@dataclass(frozen=True)
class PastCall:
    """A call that changed which frames are visible or how positions count. It is kept so that its tokens can be
    cropped from the cache later.

    Attributes:
        start, end: text tokens in the cache before and after the call.
        before: the state before the call, without `waiting`, `unplaced` and `past_calls`.
        rows: for each row that the cache has now, the row of the call that it came from.
        is_token, is_frame: bool [B, T], as in `TextRequest`.
        runs: for each row of the call, its text runs.
        positions: long [B, T], the largest coordinate of each token, on the model's device.
        dropped: as in `Padding`.
    """

    start: int
    end: int
    before: "VisionState"
    rows: list[int]
    is_token: np.ndarray
    is_frame: np.ndarray
    runs: list[list[TextRun]]
    positions: torch.Tensor
    dropped: Optional[torch.Tensor]

    def cut(self, length: int) -> "PastCall":
        """This call without the tokens from cache index `length` on."""
        kept = length - self.start
        is_token, is_frame, positions = (part[:, :kept] for part in (self.is_token, self.is_frame, self.positions))
        return replace(self, end=length, is_token=is_token, is_frame=is_frame, positions=positions)

    def after(self) -> "VisionState":
        """The state after this call, for the rows that the cache has now, with `before`'s grids and packed keys."""
        before = self.before.select_rows(self.rows)
        is_token, is_frame = self.is_token[self.rows], self.is_frame[self.rows]
        runs = [self.runs[row] for row in self.rows]
        real = torch.from_numpy(is_token).to(self.positions.device)
        dropped = 0 if self.dropped is None else take_rows(self.dropped, self.rows)
        counters = torch.where(real, self.positions[self.rows] + 1, 0).amax(1)
        if before.rope_delta is not None:
            counters = torch.where(real.any(1), counters, before.counters() - dropped)
        counted = self.start if before.token_counts is None else before.token_counts
        return replace(
            before,
            placed=[
                count + int(is_frame[row].sum()) for count, row in zip(before.placed, before.first_rows(), strict=True)
            ],
            last_visible=list(map(last_visible, runs, is_token, before.last_visible)),
            rope_delta=counters - self.end,
            token_counts=real.sum(1) + counted - dropped,
            length=self.end,
        )


@dataclass(frozen=True)
class VisionState:
    """The vision side of a conversation. Every call replaces it; nothing changes it in place.

    Attributes:
        row_sample: the sample of each row; samples are numbered by their first row.
        grids: merged (H, W) of every frame of each sample that was not dropped, in the order of the text.
        placed: number of these frames that are placed; only these have positions, keys and values.
        waiting: vision states [v, D] of the waiting frames of each sample, or None.
        last_visible: the frames that the last token of each row sees; generated tokens see the same.
        rope_delta: long [B]; the token at cache index i has position i + rope_delta. None before the first call.
        length: text tokens in the cache.
        starts: where the first frame of each sample begins in the packed keys and values.
        ends: where the space of each sample ends there.
        unplaced: for each sample, media of zeros that came without an `image_pad`. Each is a blank medium, or an image
            of zeros that a later text may place.
        dropped: number of frames of each sample that `drop_frames` dropped. Frame numbers do not count them.
        stored: length of the packed keys and values.
        last_ids: long [B], the last token of the cache; None if it is not known.
        token_counts: long [B], tokens of the cache without padding; None if there is no padding.
        is_token: bool [B, s], False at padding of the cache. Tokens from cache index s on are no padding. None if
            there is no padding.
        step: the plan of a decode step (one generated token per row). It is planned at the first step, and later steps
            use it again.
        past_calls: the latest calls that changed `last_visible`, `placed` or how positions count, oldest first.
        remembered: the least text length to which the cache can be cropped, as older calls are not in `past_calls`.
    """

    row_sample: list[int]
    grids: list[list[tuple[int, int]]]
    placed: list[int]
    waiting: list[Optional[torch.Tensor]]
    last_visible: list[FrameSet]
    starts: list[int]
    ends: list[int]
    unplaced: list[list[Media]]
    dropped: list[int]
    stored: int = 0
    length: int = 0
    rope_delta: Optional[torch.Tensor] = None
    last_ids: Optional[torch.Tensor] = None
    token_counts: Optional[torch.Tensor] = None
    is_token: Optional[torch.Tensor] = None
    step: Optional[VisionCall] = None
    past_calls: tuple[PastCall, ...] = field(default=(), repr=False)
    remembered: int = 0

    @classmethod
    def empty(cls, rows: int, rows_per_sample: int = 1) -> "VisionState":
        samples = rows // rows_per_sample
        return cls(
            row_sample=[row // rows_per_sample for row in range(rows)],
            grids=[[] for _ in range(samples)],
            placed=[0] * samples,
            waiting=[None] * samples,
            last_visible=[FrameSet()] * rows,
            starts=[0] * samples,
            ends=[0] * samples,
            unplaced=[[] for _ in range(samples)],
            dropped=[0] * samples,
        )

    def first_rows(self) -> list[int]:
        """The first row of each sample."""
        return [self.row_sample.index(sample) for sample in range(len(self.grids))]

    def is_waiting(self) -> bool:
        """Whether any frame waits for its `image_pad`."""
        return any(states is not None for states in self.waiting)

    def counters(self) -> torch.Tensor:
        """long [B]: the position of the next token of each row."""
        return self.rope_delta + self.length

    def known_mask(self, length: int) -> Optional[torch.Tensor]:
        """bool [B, length], False at padding: the padding of the cache, and tokens after it; None without padding."""
        if self.is_token is None:
            return None
        return F.pad(self.is_token, (0, length - self.is_token.shape[1]), value=True)

    def select_rows(self, rows: list[int]) -> "VisionState":
        """The state after rows were repeated, dropped or reordered. A sample without rows is dropped."""
        samples = list(dict.fromkeys(self.row_sample[row] for row in rows))
        row_sample = [samples.index(self.row_sample[row]) for row in rows]
        visible = [self.last_visible[row] for row in rows]
        same_samples = samples == list(range(len(self.grids))) and row_sample == self.row_sample
        return replace(
            self,
            row_sample=row_sample,
            grids=[self.grids[sample] for sample in samples],
            placed=[self.placed[sample] for sample in samples],
            waiting=[self.waiting[sample] for sample in samples],
            last_visible=visible,
            starts=[self.starts[sample] for sample in samples],
            ends=[self.ends[sample] for sample in samples],
            unplaced=[self.unplaced[sample] for sample in samples],
            dropped=[self.dropped[sample] for sample in samples],
            rope_delta=take_rows(self.rope_delta, rows),
            last_ids=take_rows(self.last_ids, rows),
            token_counts=take_rows(self.token_counts, rows),
            is_token=take_rows(self.is_token, rows),
            step=self.step if same_samples and visible == self.last_visible else None,
            past_calls=tuple(replace(call, rows=[call.rows[row] for row in rows]) for call in self.past_calls),
        )

    def without_first(self, counts: list[int]) -> "VisionState":
        """The state after the `counts` oldest placed frames of each sample were dropped. The tokens see what they saw
        except these frames. Positions stay."""
        return replace(
            self,
            grids=[grids[count:] for grids, count in zip(self.grids, counts, strict=True)],
            placed=[placed - count for placed, count in zip(self.placed, counts, strict=True)],
            starts=[
                start + count_vision_tokens(grids[:count])
                for start, grids, count in zip(self.starts, self.grids, counts, strict=True)
            ],
            dropped=[dropped + count for dropped, count in zip(self.dropped, counts, strict=True)],
            last_visible=[
                frames.without_first(counts[sample])
                for frames, sample in zip(self.last_visible, self.row_sample, strict=True)
            ],
            step=None,
        )

    def compacted(self) -> tuple["VisionState", VisionCall]:
        """The state after the space of dropped frames and samples is reclaimed, and the call that moves the tokens."""
        tokens = list(map(count_vision_tokens, self.grids))
        grows = [start + count < end for start, count, end in zip(self.starts, tokens, self.ends, strict=True)]
        spaces = Spaces.plan(tokens, grows)
        placed = [count_vision_tokens(grids[:count]) for grids, count in zip(self.grids, self.placed, strict=True)]
        call = VisionCall([], None, spaces.length, moves=self.moves_to(spaces, placed))
        state = replace(self, starts=spaces.starts, ends=spaces.ends, stored=spaces.length, step=None)
        return state, call

    def moves_to(self, spaces: Spaces, tokens: list[int]) -> tuple[tuple[slice, slice], ...]:
        """How the first `tokens` of each sample move to other spaces: (source, destination) slices."""
        return tuple(
            (shifted(0, count, start), shifted(0, count, to))
            for count, start, to in zip(tokens, self.starts, spaces.starts, strict=True)
            if count
        )

    def cropped(self, length: int) -> "VisionState":
        """The state after the text was cropped to its first `length` tokens.

        Frames whose `image_pad` is cropped are removed, and dropped frames stay dropped. Waiting frames are removed if
        the call that brought them is cropped.

        Raises:
            ValueError: if `length` is below what the state remembers.
        """
        undone = [call for call in self.past_calls if call.end > length]
        if not undone:
            return self._shortened(length)
        if length < self.remembered:
            raise ValueError(
                f"The cache was cropped to {length} tokens; expected at least {self.remembered}, as only the last "
                f"{PAST_CALLS} calls with frames, padding or masks can be cropped. Start from an empty cache."
            )
        first, past_calls = undone[0], self.past_calls[: -len(undone)]
        if length > first.start:  # the call loses only its last tokens
            first = first.cut(length)
            past_calls, restored = (*past_calls, first), first.after()
        else:
            restored = first.before.select_rows(first.rows)._shortened(length)
        # Of the frames that the earlier state had placed, those that were dropped since then.
        gone = [now - before for now, before in zip(self.dropped, restored.dropped, strict=True)]
        gone = [min(count, placed) for count, placed in zip(gone, restored.placed, strict=True)]
        restored = restored.without_first(gone)
        same_frames = restored.placed == self.placed and list(map(len, restored.grids)) == list(map(len, self.grids))
        kept = self if same_frames else self._without_waiting(restored.placed)
        return replace(
            kept,
            placed=restored.placed,
            dropped=restored.dropped,
            last_visible=restored.last_visible,
            rope_delta=restored.rope_delta,
            token_counts=restored.token_counts,
            is_token=None if self.is_token is None else self.is_token[:, :length],
            length=length,
            last_ids=None,
            step=None,
            past_calls=past_calls,
        )

    def _without_waiting(self, placed: list[int]) -> "VisionState":
        """The state with only the first `placed` frames of each sample."""
        grids = [grids[:count] for grids, count in zip(self.grids, placed, strict=True)]
        return replace(self, grids=grids, waiting=[None] * len(grids), unplaced=[[] for _ in grids])

    def _shortened(self, length: int) -> "VisionState":
        """The state after the last tokens, none of them padding, were cropped."""
        counts = None if self.token_counts is None else self.token_counts - (self.length - length)
        is_token = None if self.is_token is None else self.is_token[:, :length]
        return replace(self, length=length, last_ids=None, token_counts=counts, is_token=is_token)


def take_rows(values: Optional[torch.Tensor], rows: list[int]) -> Optional[torch.Tensor]:
    """The values [B] or [B, ...] of these rows; None for None."""
    return None if values is None else values[torch.tensor(rows, device=values.device)]
