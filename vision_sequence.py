"""The vision sequence of a call: which frames come with it, and which text token sees which of their tokens.

Axes: B text rows, T text tokens of this call, S text tokens in all (cache included), F frames, V vision tokens (each frame's tokens
and its separator, all samples one after the other without padding).

A text token nearly always sees consecutive frames of its sample, so visibility is a short list of spans (rows i..j see tokens u..v)
and no T x V mask is ever built. All of it is host-side integers, planned once per call and shared by all layers. Text rows of one
sample (beams, several answers) share its vision sequence.

Five index spaces meet here, for example in a batch of two samples, `F` an `image_pad` and `_` padding:

    row 0:  _  a  F  b        sample 0: frame 0 (2 x 3 merged)
    row 1:  F  c  F  d        sample 1: frame 0 (1 x 2), frame 1 (2 x 2)

    packed vision tokens    0 1 2 3 4 5 6 | 7 8 9 | 10 11 12 13 14      (the last of each frame is its separator)
    sample                  0             | 1     | 1
    frame of the sample     0             | 0     | 1
    token of the sample     0 1 2 3 4 5 6 | 0 1 2 | 3  4  5  6  7

`starts` is [0, 7]. Text rows are counted through the batch, row * T + token: `F b` of row 0 are text rows 2..4 and see the vision
tokens 0..7; `F c` of row 1 are text rows 4..6 and see 7..10; `F d` are 6..8 and see 7..15.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple, Optional, Union

import numpy as np
import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)

# The frames that a token sees: consecutive ones, or any, as a bool array over the frames of its sample.
Visible = Union[range, np.ndarray]

NO_FRAMES = range(0)
PAST_CALLS = 128  # calls that a cache can be cropped back into


@dataclass(frozen=True)
class PastCall:
    """A call that changed what rows see or how they count, kept so that its tokens can be taken back.

    Attributes:
        start, end: text tokens in the cache before and after the call.
        before: the state before the call, without `waiting` and `past_calls`.
        rows: the row of the call for each row of the cache as it is now.
        is_token, is_frame: bool [B, T], as in `VisionRequest`.
        visible: for each row, (first token, end, frames) runs as `visible_rows` returns them.
        positions: long [B, T], the largest coordinate of each token, on the model's device.
        dropped: as in `VisionRequest`.
    """

    start: int
    end: int
    before: "VisionState"
    rows: list[int]
    is_token: np.ndarray
    is_frame: np.ndarray
    visible: list[list[tuple[int, int, Visible]]]
    positions: torch.Tensor
    dropped: Optional[torch.Tensor]


@dataclass(frozen=True)
class VisionState:
    """The vision side of a conversation; replaced at every call, never changed in place.

    Attributes:
        row_sample: the sample of each text row; samples are numbered by their first row.
        grids: merged (H, W) of every frame of each sample, in the order of the text.
        placed: how many frames of each sample the text has reached; only those have positions, keys and values.
        waiting: vision states of the frames not reached yet, [v, D] or None for each sample.
        seen: what the last token of each row saw; generated tokens see the same.
        rope_delta: long [B]; the token at cache index i has position i + rope_delta. None before the first call.
        length: text tokens in the cache.
        starts, stored: where each sample begins in the packed keys and values, and their length.
        unplaced: for each sample the media of zeros that came without an `image_pad`, as named rows, in their order. Each is the blank
            medium of a processor, or an image of zeros whose text has not come yet.
        last_ids: long [B], the last token of the cache; None if it is not known.
        tokens: long [B], how many tokens of the cache are no padding; None if none is.
        step: the plan of a call with one more generated token in every row, once there was one.
        past_calls: the latest calls that changed `seen`, `placed` or how positions count, oldest first.
        remembered: the text length from which on `past_calls` has every such call.
    """

    row_sample: list[int]
    grids: list[list[tuple[int, int]]]
    placed: list[int]
    waiting: list[Optional[torch.Tensor]]
    seen: list[Visible]
    rope_delta: Optional[torch.Tensor]
    length: int
    starts: list[int]
    stored: int
    unplaced: list[list[dict]]
    last_ids: Optional[torch.Tensor] = None
    tokens: Optional[torch.Tensor] = None
    step: Optional["VisionCall"] = None
    past_calls: tuple[PastCall, ...] = ()
    remembered: int = 0

    @classmethod
    def empty(cls, rows: int, rows_per_sample: int = 1) -> "VisionState":
        samples = rows // rows_per_sample
        return cls(
            row_sample=[row // rows_per_sample for row in range(rows)],
            grids=[[] for _ in range(samples)],
            placed=[0] * samples,
            waiting=[None] * samples,
            seen=[NO_FRAMES] * rows,
            rope_delta=None,
            length=0,
            starts=[0] * samples,
            stored=0,
            unplaced=[[]] * samples,
        )

    def first_rows(self) -> list[int]:
        """The first row of each sample."""
        return [self.row_sample.index(sample) for sample in range(len(self.grids))]

    def is_waiting(self) -> bool:
        return any(states is not None for states in self.waiting)

    def counters(self) -> torch.Tensor:
        """long [B]: the position of the next token of each row."""
        return self.rope_delta + self.length

    def _tokens_of(self, length: int) -> Optional[torch.Tensor]:
        """`tokens` after the last tokens, none of them padding, were taken back."""
        return None if self.tokens is None else self.tokens - (self.length - length)

    def select_rows(self, rows: list[int]) -> "VisionState":
        """The state after text rows were repeated, dropped or reordered. A sample without rows is forgotten."""
        samples = list(dict.fromkeys(self.row_sample[row] for row in rows))
        row_sample, seen = [samples.index(self.row_sample[row]) for row in rows], [self.seen[row] for row in rows]
        same_plan = (
            samples == list(range(len(self.grids)))
            and row_sample == self.row_sample
            and all(map(same_frames, seen, self.seen))
        )
        return replace(
            self,
            row_sample=row_sample,
            seen=seen,
            rope_delta=rows_of(self.rope_delta, rows),
            last_ids=rows_of(self.last_ids, rows),
            tokens=rows_of(self.tokens, rows),
            **{
                name: [getattr(self, name)[sample] for sample in samples]
                for name in ("grids", "placed", "waiting", "starts", "unplaced")
            },
            step=self.step if same_plan else None,
            past_calls=tuple(replace(call, rows=[call.rows[row] for row in rows]) for call in self.past_calls),
        )

    def cropped(self, length: int) -> "VisionState":
        """The state after all text but the first `length` tokens was taken back. Frames whose `image_pad` is among the tokens taken back
        are forgotten; so are those that wait, if the call that brought them is taken back.

        Raises:
            ValueError: if `length` lies before what the state remembers.
        """
        undone = [call for call in self.past_calls if call.end > length]
        if not undone:
            return replace(self, length=length, last_ids=None, tokens=self._tokens_of(length))
        if length < self.remembered:
            raise ValueError(
                f"The cache was cropped to {length} tokens; expected at least {self.remembered}, as only the last {PAST_CALLS} calls with "
                f"frames, padding or masks can be taken back. Start from an empty cache."
            )
        call, earlier = undone[0], self.past_calls[: -len(undone)]
        base, kept = call.before.select_rows(call.rows), max(0, length - call.start)
        placed, seen, rope_delta, tokens = (
            base.placed,
            base.seen,
            base.rope_delta,
            base._tokens_of(min(length, call.start)),
        )
        if kept:
            is_token, is_frame = call.is_token[call.rows, :kept], call.is_frame[call.rows, :kept]
            placed = [count + int(is_frame[row].sum()) for count, row in zip(placed, base.first_rows(), strict=True)]
            seen = [
                last_seen(runs, tokens, before)
                for runs, tokens, before in zip((call.visible[i] for i in call.rows), is_token, seen, strict=True)
            ]
            real = torch.from_numpy(is_token).to(call.positions.device)
            dropped = 0 if call.dropped is None else rows_of(call.dropped, call.rows)
            counters = torch.where(real, call.positions[call.rows, :kept] + 1, 0).amax(1)
            if rope_delta is not None:
                counters = torch.where(real.any(1), counters, base.counters() - dropped)
            rope_delta = counters - length
            tokens = real.sum(1) + (call.start if tokens is None else tokens) - dropped
            cut = replace(call, end=length, is_token=call.is_token[:, :kept], is_frame=call.is_frame[:, :kept])
            earlier = (*earlier, replace(cut, positions=call.positions[:, :kept]))
        whole = placed == self.placed and list(map(len, base.grids)) == list(map(len, self.grids))
        return replace(
            self,
            grids=self.grids if whole else [grids[:count] for grids, count in zip(self.grids, placed, strict=True)],
            placed=placed,
            waiting=self.waiting if whole else [None] * len(placed),
            unplaced=self.unplaced if whole else [[]] * len(placed),
            last_ids=None,
            seen=seen,
            rope_delta=rope_delta,
            tokens=tokens,
            length=length,
            step=None,
            past_calls=earlier,
        )


def rows_of(values: Optional[torch.Tensor], rows: list[int]) -> Optional[torch.Tensor]:
    return None if values is None else values[torch.tensor(rows, device=values.device)]


def same_frames(one: Visible, other: Visible) -> bool:
    return type(one) is type(other) and (one == other if isinstance(one, range) else np.array_equal(one, other))


def as_array(frames: Visible, count: int) -> np.ndarray:
    """bool over `count` frames, among which are all that are seen."""
    out = np.zeros(count, dtype=bool)
    if isinstance(frames, range):
        out[frames.start : frames.stop] = True
    else:
        out[: len(frames)] = frames[:count]  # frames that waited may be forgotten since
    return out


def as_visible(shown: np.ndarray) -> Visible:
    """A bool array over frames, as a range if they are consecutive."""
    frames = np.flatnonzero(shown)
    if not len(frames):
        return NO_FRAMES
    return range(int(frames[0]), int(frames[-1]) + 1) if len(frames) == frames[-1] - frames[0] + 1 else shown


def with_frames(frames: Visible, first: int, stop: int) -> Visible:
    """`frames` and the frames first..stop."""
    if first >= stop:
        return frames
    if isinstance(frames, range) and (not frames or frames.stop == first):
        return range(frames.start if frames else first, stop)
    out = as_array(frames, max(stop, frames.stop if isinstance(frames, range) else len(frames)))
    out[first:stop] = True
    return as_visible(out)


def last_seen(runs: list[tuple[int, int, Visible]], is_token: np.ndarray, before: Visible) -> Visible:
    """What the last token of a row sees; `before` if the row has only padding."""
    tokens = np.flatnonzero(is_token)
    return next(frames for first, end, frames in runs if first <= tokens[-1] < end) if len(tokens) else before


class Span(NamedTuple):
    """Text rows `rows` (a slice of all B * T) see the vision tokens `tokens`; bool `keep`, [tokens] or [rows, tokens], is False at
    those of them that are hidden."""

    rows: slice
    tokens: slice
    keep: Optional[torch.Tensor] = None


@dataclass(frozen=True)
class VisionCall:
    """What the cross-attention layers of one forward call need to know.

    Attributes:
        spans: who sees what, by rising rows.
        sees: [B, T, 1], 0 where a row sees nothing; None where every row sees something.
        length: of the packed keys and values.
        writes: where the new vision tokens go in the packed keys and values, (new, packed) slices.
        moves: where those cached before have to go, (old, new) slices; None if they stay where they are.
    """

    spans: list[Span]
    sees: Optional[torch.Tensor]
    length: int
    writes: tuple[tuple[slice, slice], ...] = ()
    moves: Optional[tuple[tuple[slice, slice], ...]] = None


GATHERED = 1 << 15  # rows x tokens, at most, of spans that are attended in one call


def gather(spans: list[Span], device) -> list[Span]:
    """Joins neighbouring spans whose tokens start at the same place, while rows x tokens stay small: one attention call with a mask
    costs less than many without."""
    joined: list[list[Span]] = []
    for span in spans:
        if joined:
            first, last = joined[-1][0], joined[-1][-1]
            size = (span.rows.stop - first.rows.start) * (span.tokens.stop - span.tokens.start)
            if (
                size <= GATHERED
                and first.keep is None is span.keep
                and (span.rows.start, span.tokens.start)
                == (
                    last.rows.stop,
                    first.tokens.start,
                )
                and span.tokens.stop >= last.tokens.stop
            ):
                joined[-1].append(span)
                continue
        joined.append([span])
    out = []
    for group in joined:
        if len(group) > 1:
            rows, tokens = slice(group[0].rows.start, group[-1].rows.stop), group[-1].tokens
            reach = np.repeat(
                [span.tokens.stop - tokens.start for span in group],
                [span.rows.stop - span.rows.start for span in group],
            )
            keep = torch.from_numpy(np.arange(tokens.stop - tokens.start) < reach[:, None]).to(device)
            group = [Span(rows, tokens, keep)]
        out += group
    return out


# Reading a call


class FrameMask(NamedTuple):
    """A caller's `cross_attention_mask` for the tokens of a call.

    Attributes:
        hidden: bool [B, m, F], True = hidden, for m tokens of the call; the text says what the others see.
        first: the first of these tokens.
        new_frames_only: whether the columns are the frames that come with the call; else all frames of the conversation.
    """

    hidden: np.ndarray
    first: int
    new_frames_only: bool

    @property
    def tokens(self) -> slice:
        return slice(self.first, self.first + self.hidden.shape[1])


@dataclass(frozen=True)
class VisionRequest:
    """What a call says about frames, read and checked.

    Attributes:
        state: before the call. past_length: text tokens in the cache.
        is_token, is_frame: bool [B, T], False at padding; True where an `image_pad` stands for a frame.
        padded, any_padded: whether padding is among the tokens of this call; among these or those of the cache.
        dropped: long [B], tokens of the cache that the caller's mask has as padding since, such as what was written to a row that had
            ended; None if there are none. The text counts on without them.
        tokens: as in `VisionState`, after the call.
        media: the call's media as named rows: `pixel_values` or `image_features`, `image_mean`, `image_std`; empty without any.
        grid: (frames, patch rows, patch columns) of the call's media. media_nums: how many of them each sample has.
        new: merged (H, W) of each sample's new frames; a blank medium counts as none.
        unplaced: as in `VisionState`, after the call.
        pads: frames of each sample that the text of this call places.
        mask: the caller's mask, or None.
    """

    state: VisionState
    past_length: int
    is_token: torch.Tensor
    is_frame: torch.Tensor
    padded: bool
    any_padded: bool
    dropped: Optional[torch.Tensor]
    tokens: Optional[torch.Tensor]
    media: dict
    grid: list[list[int]]
    media_nums: list[int]
    new: list[list[tuple[int, int]]]
    unplaced: list[list[dict]]
    pads: list[int]
    mask: Optional[FrameMask]

    def frames_placed(self, sample: int) -> list[tuple[int, int]]:
        """Merged grids of the frames that this call places."""
        placed = self.state.placed[sample]
        return (self.state.grids[sample] + self.new[sample])[placed : placed + self.pads[sample]]

    def tokens_placed(self, sample: int) -> int:
        return sum(h * w + 1 for h, w in self.frames_placed(sample))

    def changes_nothing(self) -> bool:
        """Whether the tokens only go on from the last: they see what it saw and count on."""
        return not (
            self.padded or any(self.pads) or any(self.new) or self.mask is not None or self.dropped is not None
        )


def read_request(
    config,
    state: Optional[VisionState],
    past_length: int,
    text: torch.Tensor,
    attention_mask: Optional[torch.Tensor] = None,
    pixel_values: Optional[torch.Tensor] = None,
    grid_thw=None,
    media_nums_per_sample=None,
    cross_attention_mask: Optional[torch.Tensor] = None,
    rows_per_sample: int = 1,
    prompt_length: Optional[int] = None,
    whole_prompt: bool = True,
    image_features: Optional[torch.Tensor] = None,
    image_mean=None,
    image_std=None,
    mask_at_end: bool = False,
) -> VisionRequest:
    """Reads and checks what a call says about frames, before anything heavy is done.

    Args:
        config: a `MossVLConfig`.
        text: `input_ids` [B, T], or `inputs_embeds` [B, T, D], in which no frame can be placed.
        prompt_length: tokens of the whole prompt, if the caller knows it: what comes after is text that the model wrote.
        whole_prompt: without `prompt_length`, whether every frame has to be placed in this call.
        mask_at_end: whether a mask of fewer rows than the call has tokens is about its last tokens; else about its first.

    Raises:
        ValueError: for shapes and counts that do not fit each other.
    """
    rows, length = text.shape[:2]
    if not rows or not length:
        raise ValueError(f"The text has shape [{rows}, {length}]; expected at least one row of at least one token.")
    if state is None:
        state = VisionState.empty(rows, rows_per_sample)
    if len(state.row_sample) != rows or rows % rows_per_sample:
        raise ValueError(f"The call has {rows} text rows; expected {len(state.row_sample)}, as many as the cache.")
    known = past_length + length
    if attention_mask is not None and attention_mask.ndim != 4 and tuple(attention_mask.shape) != (rows, known):
        raise ValueError(
            f"`attention_mask` has shape {list(attention_mask.shape)}; expected [{rows}, {known}]: the tokens of the cache and of "
            f"this call, 0 at padding."
        )
    is_token = torch.ones(rows, length, dtype=torch.bool, device=text.device)
    padded = any_padded = False
    dropped = tokens = None
    if attention_mask is not None and attention_mask.ndim == 2:
        is_real = attention_mask.to(text.device).bool()
        is_token, tokens = is_real[:, past_length:], is_real.sum(1)
        before = past_length if state.tokens is None else state.tokens.to(text.device)
        dropped = (before - is_real[:, :past_length].sum(1)).clamp(min=0)
        # One question to the device.
        answers = int(is_token.all() + 2 * is_real.all() + 4 * (dropped > 0).any())
        padded, any_padded, dropped = not answers & 1, not answers & 2, dropped if answers & 4 else None
        tokens = tokens if any_padded else None
    elif state.tokens is not None:  # the padding of the cache is not said again: its tokens stay what they were
        tokens = state.tokens + length
    if prompt_length is not None:
        whole_prompt = known >= prompt_length

    image_features = getattr(
        image_features, "pooler_output", image_features
    )  # or the whole output of `get_image_features`
    pixel_values, grid_thw, image_features = without_empty_media(pixel_values, grid_thw, image_features)
    is_frame = torch.zeros_like(is_token)
    in_prompt = length if prompt_length is None else min(length, max(prompt_length - past_length, 0))
    # If the cache waits for no frame, a single new token is text that the model wrote, whatever its id is.
    expects_frames = state.is_waiting() or any(state.unplaced)
    written = past_length > 0 and length == 1 and grid_thw is None and not expects_frames
    pads = [0] * len(state.grids)
    if text.ndim == 2 and in_prompt and not written:
        is_frame[:, :in_prompt] = (text == config.image_token_id)[:, :in_prompt] & is_token[:, :in_prompt]
        pads = pads_of_samples(state, is_frame.sum(1).tolist())

    grid, media, media_nums, new, unplaced = [], {}, [0] * len(pads), [[] for _ in pads], list(state.unplaced)
    if grid_thw is not None:
        if text.ndim != 2:
            raise ValueError(
                "`grid_thw` came with `inputs_embeds` alone; expected `input_ids` beside it, to place the frames."
            )
        grid = read_grid(pixel_values, grid_thw, config.vision_config, image_mean, image_std)
        if image_features is not None:
            check_features(image_features, grid, pixel_values, config.vision_config)
        media_nums = count_media(grid, media_nums_per_sample, pads)
        media = {
            "pixel_values": pixel_values,
            "image_features": image_features,
            "image_mean": image_mean,
            "image_std": image_std,
        }
        media = {name: rows for name, rows in media.items() if rows is not None}
    elif pixel_values is not None or image_features is not None:
        name = "pixel_values" if pixel_values is not None else "image_features"
        raise ValueError(f"`{name}` came without `grid_thw`; expected both, `grid_thw` as the processor returns it.")
    mask = None
    if cross_attention_mask is not None:
        frames = [sum(t for t, _, _ in own) for own in split_by(grid, media_nums)] if grid else None
        mask = read_frame_mask(cross_attention_mask, rows, past_length, length, frames, whole_prompt, mask_at_end)

    merge, number = config.vision_config.spatial_merge_size, 0
    recalled = {}
    for sample, own in enumerate(split_by(grid, media_nums)):
        new[sample] = [(h // merge, w // merge) for t, h, w in own for _ in range(t)]
        if pads[sample] == 0 and [t for t, _, _ in own] == [1]:  # the processor's blank medium stands for no frame
            medium = take_media(media, grid, [number], merge)
            hidden = mask is not None and mask.hidden[state.row_sample.index(sample)].all()
            if (whole_prompt and (hidden or "pixel_values" not in medium)) or is_blank(medium):
                new[sample] = []
                unplaced[sample] = [*unplaced[sample], kept_zeros(unplaced[sample], {**medium, "grid_thw": own})]
        elif pads[sample] and unplaced[sample]:
            found, unplaced[sample] = images_of_zeros(state, sample, pads[sample] - len(new[sample]), unplaced[sample])
            if found:
                recalled[sample] = found
                new[sample] = [(h // merge, w // merge) for medium in found for _, h, w in medium["grid_thw"]] + new[
                    sample
                ]
        number += len(own)
    if recalled:
        media, grid, media_nums = with_recalled(media, grid, media_nums, recalled, merge)

    for sample, wanted in enumerate(pads):
        there = len(state.grids[sample]) - state.placed[sample] + len(new[sample])
        if wanted > there or (whole_prompt and wanted != there):
            raise ValueError(
                f"The text of sample {sample} has {wanted} `image_pad` tokens, but its media have {there} frames; expected one "
                f"`image_pad` token per frame. Pass `input_ids`, `pixel_values`, `grid_thw` and `media_nums_per_sample` as one "
                f"processor call returned them, untruncated."
            )
    unplaced = [[] for _ in pads] if whole_prompt else unplaced
    return VisionRequest(
        state,
        past_length,
        is_token,
        is_frame,
        padded,
        any_padded,
        dropped,
        tokens,
        media,
        grid,
        media_nums,
        new,
        unplaced,
        pads,
        mask,
    )


def pads_of_samples(state: VisionState, of_rows: list[int]) -> list[int]:
    """How many `image_pad` tokens each sample has. Rows of one sample share its frames, so they need the same."""
    pads = [of_rows[row] for row in state.first_rows()]
    for row, (sample, count) in enumerate(zip(state.row_sample, of_rows, strict=True)):
        if count != pads[sample]:
            first = state.row_sample.index(sample)
            raise ValueError(
                f"Text rows {first} and {row} share the frames of sample {sample}, but have {pads[sample]} and {count} `image_pad` "
                f"tokens in this call; expected the same text. Give each conversation a cache of its own before new frames come."
            )
    return pads


def without_empty_media(pixel_values, grid_thw, image_features):
    """The arguments, None for all if there is no medium in them."""
    if (
        grid_thw is not None
        and len(grid_thw) == 0
        and all(rows is None or len(rows) == 0 for rows in (pixel_values, image_features))
    ):
        return None, None, None
    return pixel_values, grid_thw, image_features


def split_by(items: list, counts: list[int]) -> list[list]:
    ends = np.cumsum([0, *counts]).tolist()
    return [items[first:end] for first, end in pairwise(ends)]


def is_blank(medium: dict) -> bool:
    """Whether a medium is of zeros, once it is normalised or encoded."""
    values = medium["pixel_values"] if "pixel_values" in medium else medium["image_features"]
    return not (values.any() or any(number != 0 for number in medium.get("image_mean", [[]])[0]))


def kept_zeros(earlier: list[dict], medium: dict) -> dict:
    """A medium of zeros with memory of its own, as its call's media are let go; or an equal one of those kept already."""
    for other in earlier:
        if other.keys() == medium.keys() and other["grid_thw"] == medium["grid_thw"]:
            return other
    return {name: rows.clone() if isinstance(rows, torch.Tensor) else rows for name, rows in medium.items()}


def images_of_zeros(
    state: VisionState, sample: int, wanted: int, unplaced: list[dict]
) -> tuple[list[dict], list[dict]]:
    """Those media of zeros that a call's text places, and those that stay unplaced. If the other frames suffice, they were blank.

    Args:
        wanted: `image_pad` tokens of the call for which no medium comes with it.

    Raises:
        ValueError: if the text does not tell which of them are images.
    """
    waiting = len(state.grids[sample]) - state.placed[sample]
    missing = wanted - waiting
    if missing <= 0:
        return [], []
    sizes = {tuple(medium["grid_thw"][0]) for medium in unplaced}
    if waiting or (len(sizes) > 1 and missing != len(unplaced)):
        raise ValueError(
            f"Sample {sample} has {len(unplaced)} media of zeros that came before any `image_pad` for them: they may be images, or the "
            f"processor's blank medium of a text without any. Now its text asks for {wanted} frames that came before, of which {waiting} "
            f"wait. Leave blank media out, or give images with the text that places them."
        )
    return unplaced[:missing], unplaced[missing:]


def take_media(media: dict, grid: list[list[int]], numbers: list[int], merge_size: int) -> dict:
    """The media of these numbers, out of named rows of all media of `grid`."""
    out, patches = {}, [t * h * w for t, h, w in grid]
    for name, rows in media.items():
        if name in ("pixel_values", "image_features"):
            sizes = patches if name == "pixel_values" else [count // merge_size**2 for count in patches]
            parts = rows.split(sizes)
            out[name] = torch.cat([parts[number] for number in numbers]) if len(numbers) != 1 else parts[numbers[0]]
        else:
            out[name] = [rows[number] for number in numbers]
    return out


def with_recalled(
    media: dict, grid: list[list[int]], media_nums: list[int], recalled: dict[int, list[dict]], merge_size: int
):
    """Media, grid and numbers with the recalled media of a sample before its new ones."""
    parts, number = [], 0
    for sample, count in enumerate(media_nums):
        own = list(range(number, number + count))
        parts += recalled.get(sample, [])
        parts += [{**take_media(media, grid, own, merge_size), "grid_thw": [grid[i] for i in own]}] if own else []
        number += count
    names = parts[0].keys()
    if any(part.keys() != names for part in parts):
        raise ValueError(
            f"Media of one call come as {[sorted(part) for part in parts]}; expected all as pixels of one kind, or all encoded."
        )
    joined = {
        name: torch.cat([part[name] for part in parts])
        if isinstance(parts[0][name], torch.Tensor)
        else [row for part in parts for row in part[name]]
        for name in names
    }
    grid = joined.pop("grid_thw")
    return joined, grid, [count + len(recalled.get(sample, ())) for sample, count in enumerate(media_nums)]


def grid_of(grid_thw, image_grid_thw):
    """The grid that a caller gave by its name, or by the one that other models have."""
    if grid_thw is not None and image_grid_thw is not None:
        raise ValueError("The grid was given twice, as `grid_thw` and as `image_grid_thw`; expected one of them.")
    return image_grid_thw if grid_thw is None else grid_thw


def read_grid(
    pixel_values: Optional[torch.Tensor], grid_thw, config, image_mean=None, image_std=None
) -> list[list[int]]:
    """`grid_thw` as a list, once it fits the pixels (where they are given) and the vision config; and they the means and standard
    deviations, which levels (uint8) need, three numbers for each medium."""
    grid = grid_thw.tolist() if isinstance(grid_thw, torch.Tensor) else [[int(n) for n in row] for row in grid_thw]
    merge = config.spatial_merge_size
    for row in grid:
        if len(row) != 3 or min(row) < 1 or row[1] % merge or row[2] % merge:
            raise ValueError(
                f"`grid_thw` has the row {row}; expected (frames, patch rows, patch columns), frames >= 1 and patch rows and "
                f"columns that are positive multiples of the merge size {merge}."
            )
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    patches = sum(t * h * w for t, h, w in grid)
    if not grid or (pixel_values is not None and tuple(pixel_values.shape) != (patches, width)):
        got = None if pixel_values is None else list(pixel_values.shape)
        raise ValueError(
            f"`pixel_values` has shape {got}; expected [{patches}, {width}]: a row for each of the {patches} patches that "
            f"`grid_thw` counts, {width} values a patch of this model. Take both from one processor call."
        )
    for name, given in (("image_mean", image_mean), ("image_std", image_std)):
        raw = pixel_values is not None and pixel_values.dtype == torch.uint8
        shape = None if given is None else [len(given), *{len(row) for row in given}]
        if shape != ([len(grid), 3] if raw else None):
            wanted = (
                f"[{len(grid)}, 3]: `pixel_values` are levels (uint8), which have to be normalised"
                if raw
                else "none: `pixel_values` are not uint8"
            )
            raise ValueError(
                f"`{name}` has shape {shape}; expected {wanted}. Take all from one processor call with do_normalize=False."
            )
    return grid


def check_features(
    image_features: torch.Tensor, grid: list[list[int]], pixel_values: Optional[torch.Tensor], config
) -> None:
    """ValueError unless encoded media fit their grid and stand in place of the pixels."""
    tokens = sum(t * h * w for t, h, w in grid) // config.spatial_merge_size**2
    if pixel_values is not None:
        raise ValueError(
            "`image_features` came beside `pixel_values`; expected one of them: the media encoded, or their pixels."
        )
    if tuple(image_features.shape) != (tokens, config.out_hidden_size):
        raise ValueError(
            f"`image_features` has shape {list(image_features.shape)}; expected [{tokens}, {config.out_hidden_size}], what "
            f"`get_image_features` gives for media of this `grid_thw`."
        )


def read_frame_mask(
    mask: torch.Tensor,
    rows: int,
    past_length: int,
    length: int,
    new_frames: Optional[list[int]],
    whole_prompt: bool,
    at_end: bool,
) -> FrameMask:
    """`cross_attention_mask` [B, 1, M, F] as far as it is about the tokens of this call.

    A mask of as many rows as this call has tokens is about these; its columns are the frames that come with the call, if it has as many
    as these, else all frames of the conversation. A mask of more rows begins with the conversation. A mask that ends early (a completion
    was appended after the processor) leaves the rest to the text.

    Args:
        new_frames: frames of each sample that come with the call, a blank medium counted as one; None without media.
    """
    known = past_length + length
    if (
        mask.ndim != 4
        or mask.shape[:2] != (rows, 1)
        or mask.dtype != torch.bool
        or (whole_prompt and not past_length and mask.shape[2] > known)
    ):
        raise ValueError(
            f"`cross_attention_mask` has shape {list(mask.shape)} and dtype {mask.dtype}; expected bool [{rows}, 1, {length}, "
            f"frames], True = hidden, a row for each token of this call, or {known} rows with those of the cache."
        )
    of_call = past_length > 0 and mask.shape[2] <= length
    new_frames_only = of_call and new_frames is not None and mask.shape[3] == max([1, *new_frames])
    hidden = mask[:, 0, :length] if of_call else mask[:, 0, past_length:known]
    return FrameMask(hidden.cpu().numpy(), length - hidden.shape[1] if of_call and at_end else 0, new_frames_only)


def count_media(grid: list[list[int]], media_nums_per_sample, pads: list[int]) -> list[int]:
    """How many media each sample has. Where the caller does not say, each takes what its `image_pad` tokens ask for, and a text
    without any the processor's one blank frame, if there is one for each such text."""
    if media_nums_per_sample is not None:
        listed = (
            row if isinstance(row, (list, tuple)) else [row] for row in media_nums_per_sample
        )  # lists: as pipelines join calls
        nums = [int(n) for row in listed for n in row]
    elif len(pads) == 1:
        nums = [len(grid)]
    else:
        blank = int(sum(t for t, _, _ in grid) == sum(pads) + pads.count(0))
        nums, media = [], iter(grid)
        for wanted in pads:
            wanted, count = wanted or blank, 0
            while wanted > 0 and (medium := next(media, None)) is not None:
                wanted, count = wanted - medium[0], count + 1
            nums.append(count)
    if len(nums) != len(pads) or min(nums) < 0 or sum(nums) != len(grid):
        raise ValueError(
            f"`media_nums_per_sample` is {media_nums_per_sample}; expected {len(pads)} numbers, one per sample, that sum to the "
            f"{len(grid)} media of `grid_thw`, for texts with {pads} `image_pad` tokens. Pass on all that the processor returned."
        )
    return nums


# Planning a call


def visible_rows(
    request: VisionRequest, is_token: np.ndarray, is_frame: np.ndarray, text_index: Optional[np.ndarray] = None
) -> list[list[tuple[int, int, Visible]]]:
    """Runs of text tokens that see the same frames: for each row (first token, end, frames).

    Without a mask a token sees what was seen before it and every frame whose `image_pad` stands at or before it; padding sees nothing.

    Args:
        is_token, is_frame: bool [B, T].
        text_index: long [B, T], the packed text that each token belongs to; a token sees frames of its own text.

    Raises:
        ValueError: if the mask has too few columns, shows frames that are not there, or contradicts the text.
    """
    state, mask, runs = request.state, request.mask, []
    total = [len(grids) + len(new) for grids, new in zip(state.grids, request.new, strict=True)]
    for row, sample in enumerate(state.row_sample):
        placed, reached = (
            state.placed[sample],
            state.placed[sample] + is_frame[row].cumsum(),
        )  # frames placed up to each token
        first_seen = np.full(len(reached), placed)  # where the frames of the token's text begin
        if text_index is not None:
            starts = np.flatnonzero(np.diff(text_index[row], prepend=-1))
            before = np.concatenate([[placed], reached])[starts]
            first_seen = np.repeat(before, np.diff([*starts, len(reached)]))

        def by_text(seen: Visible, placed: int, tokens: slice) -> list[tuple[int, int, Visible]]:
            """Runs of tokens before which `placed` frames were placed, and of which a token saw `seen`."""
            codes, begins, out = np.where(is_token[row], reached, -1)[tokens], first_seen[tokens], []
            edges = [
                0,
                *(np.flatnonzero((codes[1:] != codes[:-1]) | (begins[1:] != begins[:-1])) + 1).tolist(),
                len(codes),
            ]
            for start, end in pairwise(edges):
                frames = NO_FRAMES
                if start < end and codes[start] >= 0:
                    frames = with_frames(
                        seen if text_index is None else NO_FRAMES, max(placed, int(begins[start])), int(codes[start])
                    )
                out.append((tokens.start + start, tokens.start + end, frames))
            return out if tokens.stop > tokens.start else []

        if mask is None:
            runs.append(by_text(state.seen[row], placed, slice(0, len(reached))))
            continue
        tokens = mask.tokens
        if text_index is not None and tokens != slice(0, len(reached)):
            raise ValueError(
                f"`cross_attention_mask` has {tokens.stop} rows for {len(reached)} tokens of packed texts; expected a row for each, or no mask."
            )
        shown = masked_frames(request, row, total, reached[tokens], first_seen[tokens], is_token[row, tokens])
        if shown is None:
            runs.append(by_text(state.seen[row], placed, slice(0, len(reached))))
            continue
        row_runs = by_text(state.seen[row], placed, slice(0, tokens.start))
        edges = [0, *(np.flatnonzero((shown[1:] != shown[:-1]).any(axis=1)) + 1).tolist(), len(shown)]
        row_runs += [
            (tokens.start + start, tokens.start + end, as_visible(shown[start]))
            for start, end in pairwise(edges)
            if end > start
        ]
        seen = last_seen(row_runs, is_token[row, : tokens.stop], state.seen[row])
        placed = int(reached[tokens.stop - 1]) if tokens.stop else placed
        runs.append(row_runs + by_text(seen, placed, slice(tokens.stop, len(reached))))
    return runs


def masked_frames(
    request: VisionRequest,
    row: int,
    total: list[int],
    reached: np.ndarray,
    first_seen: np.ndarray,
    is_token: np.ndarray,
) -> Optional[np.ndarray]:
    """bool [m, frames of the sample], True = seen, for the tokens of a row that the caller's mask is about; None if the mask is a
    processor's, but of other padding than the text has now: then the text says what is seen.

    Args:
        reached, first_seen: [m], frames placed up to each token, and where the frames of its text begin.

    Raises:
        ValueError: if the mask has too few columns, shows frames that are not there, or contradicts the text in another way.
    """
    state, mask, sample = request.state, request.mask, request.state.row_sample[row]
    count, hidden = total[sample], mask.hidden[row]
    first = len(state.grids[sample]) if mask.new_frames_only else 0
    if hidden.shape[1] < count - first or not hidden[:, count - first :].all():
        raise ValueError(
            f"`cross_attention_mask` has {hidden.shape[1]} frame columns and shows sample {sample} some that it does not have, or lacks "
            f"some of its {count - first}; expected [B, 1, T, {max(total)}], True = hidden."
        )
    given = ~hidden[:, : count - first]
    frame, real = np.arange(count), is_token[:, None]
    placed = (
        (frame >= np.where(first_seen > state.placed[sample], first_seen, 0)[:, None])
        & (frame < reached[:, None])
        & real
    )
    by_text = (as_array(state.seen[row], count) | (frame >= state.placed[sample])) & placed
    shown = by_text.copy()
    shown[:, first:] = given
    wrong = shown & ~placed
    is_short = len(shown) < request.is_token.shape[1]  # text was joined to it, and may have been moved
    if wrong.any() or (is_short and (shown != by_text).any()):
        if (mask.new_frames_only or not request.past_length) and is_of_processor(given):
            logger.warning_once(
                "`cross_attention_mask` is that of a text before it was padded, cut or joined anew, so the text says what is seen. "
                "Leave it out: load the processor with return_cross_attention_mask=False."
            )
            return None
    if wrong.any():
        token, frame = (int(x) for x in np.argwhere(wrong)[0])
        why = (
            "which is padding" if not is_token[token] else "before the frame's `image_pad`, or in another packed text"
        )
        raise ValueError(
            f"`cross_attention_mask` shows frame {frame} of sample {sample} to token {token} of this call, {why}: it does not belong to "
            f"these `input_ids`. Text that was padded, cut or joined after the processor needs a new mask; leave the mask out, and the "
            f"text says what is seen."
        )
    return shown


def is_of_processor(shown: np.ndarray) -> bool:
    """Whether bool [m, F], True = seen, is what a processor makes of some text with F frames: the frames so far, one more at each
    `image_pad`, in the end all of them; none at padding, which is on a side."""
    counts = shown.sum(axis=1)
    seeing = np.flatnonzero(counts)
    if not len(seeing) or len(seeing) <= seeing[-1] - seeing[0]:  # nothing is seen, or nothing in between
        return False
    steps = np.diff(counts[seeing], prepend=0)
    first_frames = (shown == (np.arange(shown.shape[1]) < counts[:, None])).all()
    return bool(first_frames and ((steps == 0) | (steps == 1)).all() and steps.sum() == shown.shape[1])


def whole_mask(request: VisionRequest) -> Optional[torch.Tensor]:
    """The caller's mask over all frames of the conversation, with rows from its first token on: bool [B, 1, cache + m, F]; so its parts
    need no media beside them. Rows of the cache hide all."""
    if request.mask is None:
        return None
    is_token, is_frame = request.is_token.cpu().numpy(), request.is_frame.cpu().numpy()
    total = [len(grids) + len(new) for grids, new in zip(request.state.grids, request.new, strict=True)]
    end = request.mask.tokens.stop
    hidden = np.ones((len(is_token), 1, request.past_length + end, max([1, *total])), dtype=bool)
    for row, runs in enumerate(visible_rows(request, is_token, is_frame)):
        count = total[request.state.row_sample[row]]
        for first, last, frames in runs:
            hidden[row, 0, request.past_length + first : request.past_length + min(last, end), :count] = ~as_array(
                frames, count
            )
    return torch.from_numpy(hidden)


def plan_call(
    request: VisionRequest,
    positions: torch.Tensor,
    rope_delta: torch.Tensor,
    own_positions: bool = False,
    text_index: Optional[np.ndarray] = None,
) -> tuple[VisionState, VisionCall]:
    """The state after a call, but for `waiting`, which the model fills in; and the call itself.

    Args:
        positions: long [B, T], the largest coordinate of each token. rope_delta: [B], after the call.
        own_positions: whether the caller gave the positions.
        text_index: as in `visible_rows`.

    Raises:
        ValueError: if the caller's mask does not fit the text.
    """
    state, new, pads, device = request.state, request.new, request.pads, request.is_token.device
    rows, length = request.is_token.shape
    end = request.past_length + length
    goes_on = request.changes_nothing() and text_index is None
    after = replace(state, rope_delta=rope_delta, length=end, unplaced=request.unplaced, tokens=request.tokens)
    if goes_on and length == 1 and state.step is not None:
        return remember(after, request, positions, None) if own_positions else after, state.step
    if goes_on:  # asks the device nothing
        is_token, is_frame = np.ones((rows, length), dtype=bool), np.zeros((rows, length), dtype=bool)
    else:
        is_token, is_frame = request.is_token.cpu().numpy(), request.is_frame.cpu().numpy()
    visible = visible_rows(request, is_token, is_frame, text_index)

    grids = [known + added for known, added in zip(state.grids, new, strict=True)]
    placed = [known + added for known, added in zip(state.placed, pads, strict=True)]
    ends = [np.cumsum([0] + [h * w + 1 for h, w in grid]).tolist() for grid in grids]  # frame -> token, in the sample
    starts, stored, writes, moves = state.starts, state.stored, [], None
    if any(pads):  # now there are keys to write; the frames that wait get their place, too
        *starts, stored = np.cumsum([0] + [end[-1] for end in ends]).tolist()
        writes = written_slices(request, ends, starts)
        old = [ends[sample][count] for sample, count in enumerate(state.placed)]
        if (starts, stored) != (state.starts, state.stored):
            moves = tuple(
                (slice(source, source + size), slice(target, target + size))
                for source, target, size in zip(state.starts, starts, old, strict=True)
                if size
            )
    spans = plan_spans(state, visible, starts, ends, length, device)
    sees = None
    if sum(span.rows.stop - span.rows.start for span in spans) < rows * length:
        seeing = np.zeros(rows * length, dtype=np.float32)
        for span in spans:
            seeing[span.rows] = 1.0
        sees = torch.from_numpy(seeing).view(rows, length, 1).to(device)
    call = VisionCall(gather(spans, device), sees, stored, tuple(writes), moves)
    if goes_on:
        after = replace(after, step=call if length == 1 else state.step)
    else:
        seen = [
            last_seen(runs, tokens, before) for runs, tokens, before in zip(visible, is_token, state.seen, strict=True)
        ]
        after = replace(after, grids=grids, placed=placed, seen=seen, starts=starts, stored=stored, step=None)
    if goes_on and not own_positions:
        return after, call
    return remember(after, request, positions, (is_token, is_frame, visible)), call


def remember(after: VisionState, request: VisionRequest, positions: torch.Tensor, plan) -> VisionState:
    """The state with this call among its `past_calls`. `plan`: what was planned of it; None if its tokens see what was seen before."""
    state, (rows, length) = request.state, request.is_token.shape
    if plan is None:
        runs = [[(0, length, seen)] for seen in state.seen]
        plan = np.ones((rows, length), dtype=bool), np.zeros((rows, length), dtype=bool), runs
    count = len(state.grids)
    before = replace(state, waiting=[None] * count, unplaced=[[]] * count, last_ids=None, step=None, past_calls=())
    calls = (
        *state.past_calls,
        PastCall(request.past_length, after.length, before, list(range(rows)), *plan, positions, request.dropped),
    )
    forgotten = calls[:-PAST_CALLS]
    return replace(
        after, past_calls=calls[-PAST_CALLS:], remembered=forgotten[-1].end if forgotten else state.remembered
    )


def written_slices(request: VisionRequest, ends: list[list[int]], starts: list[int]) -> list[tuple[slice, slice]]:
    """Where the tokens of the frames that are placed now go in the packed sequence."""
    writes, at = [], 0
    for sample, (count, more) in enumerate(zip(request.state.placed, request.pads, strict=True)):
        old, reached = ends[sample][count], ends[sample][count + more]
        source = slice(at, at + reached - old)
        destination = slice(starts[sample] + old, starts[sample] + reached)
        if writes and (writes[-1][0].stop, writes[-1][1].stop) == (source.start, destination.start):
            source, destination = (
                slice(writes[-1][0].start, source.stop),
                slice(writes.pop()[1].start, destination.stop),
            )
        if source.stop > source.start:
            writes.append((source, destination))
        at += reached - old
    return writes


def plan_spans(
    state: VisionState,
    visible: list[list[tuple[int, int, Visible]]],
    starts: list[int],
    ends: list[list[int]],
    length: int,
    device,
) -> list[Span]:
    """The runs of all rows as spans of text rows and packed vision tokens, equal neighbours joined."""
    spans: list[Span] = []
    for row, runs in enumerate(visible):
        sample = state.row_sample[row]
        of_frame = ends[sample]
        for first, end, frames in runs:
            keep = None
            if not isinstance(frames, range):
                shown = np.flatnonzero(frames)
                bounds = of_frame[shown[0] : shown[-1] + 2]
                keep = torch.from_numpy(np.repeat(frames[shown[0] : shown[-1] + 1], np.diff(bounds))).to(device)
                frames = range(int(shown[0]), int(shown[-1]) + 1)
            if not frames:
                continue
            tokens = slice(starts[sample] + of_frame[frames.start], starts[sample] + of_frame[frames.stop])
            rows = slice(row * length + first, row * length + end)
            if (
                spans
                and keep is None is spans[-1].keep
                and (spans[-1].tokens, spans[-1].rows.stop) == (tokens, rows.start)
            ):
                rows = slice(spans.pop().rows.start, rows.stop)
            spans.append(Span(rows, tokens, keep))
    return spans
