"""The vision sequence of a call: which frames come with it, which text row sees which of their tokens, and where their keys and
values are kept.

Axes: B text rows, T text tokens of this call, F frames, K key/value heads, V vision tokens (each frame's tokens and its
separator, all samples one behind the other without padding), d head size.

What a text row sees is nearly always a prefix of its sample's frames, so visibility is a short list of spans (rows i..j see
tokens u..v) and no T x V mask is ever built. All of it is host-side integers, planned once a call and shared by all layers.
Text rows of one sample (beams, several answers) share its vision sequence.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, Optional

import numpy as np
import torch
from transformers.cache_utils import DynamicLayer


@dataclass(frozen=True)
class VisionState:
    """The vision side of a conversation; replaced at every call that changes it, never changed in place.

    Attributes:
        row_sample: the sample of each text row.
        grids: merged (H, W) of every frame of each sample, in the order of the text.
        placed: how many frames of each sample the text has reached; only those have positions, keys and values.
        waiting: vision states of the frames not reached yet, [v, D] or None for each sample.
        seen: what the last token of each row saw, a bool array over its sample's frames; generated tokens see the same.
        rope_delta: long [B]; the token at cache index i has position i + rope_delta. None before the first call.
        starts: where each sample begins in the packed keys and values, and last their length.
        step: the plan of a call with one more generated token in every row, once there was one.
    """

    row_sample: list[int]
    grids: list[list[tuple[int, int]]]
    placed: list[int]
    waiting: list[Optional[torch.Tensor]]
    seen: list[np.ndarray]
    rope_delta: Optional[torch.Tensor]
    starts: list[int]
    step: Optional["VisionCall"] = None

    @classmethod
    def empty(cls, rows: int, rows_per_sample: int = 1) -> "VisionState":
        samples = rows // rows_per_sample
        return cls(
            row_sample=[row // rows_per_sample for row in range(rows)],
            grids=[[] for _ in range(samples)],
            placed=[0] * samples,
            waiting=[None] * samples,
            seen=[np.zeros(0, dtype=bool)] * rows,
            rope_delta=None,
            starts=[0] * (samples + 1),
        )

    def of_samples(self, of_rows: list, otherwise) -> list:
        """What the first row of each sample has, out of what all rows have; `otherwise` where no row is left of a sample."""
        first = {sample: row for row, sample in reversed([*enumerate(self.row_sample)])}
        return [of_rows[first[sample]] if sample in first else otherwise for sample in range(len(self.grids))]

    def is_waiting(self) -> bool:
        return any(states is not None for states in self.waiting)

    def select_rows(self, rows: list[int]) -> "VisionState":
        """The state after the text rows were repeated, dropped or put in another order."""
        return replace(
            self,
            row_sample=[self.row_sample[row] for row in rows],
            seen=[self.seen[row] for row in rows],
            rope_delta=self.rope_delta[torch.tensor(rows, device=self.rope_delta.device)],
            step=None,
        )


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
        moves: where those cached before have to go since the packed sequence grew, (old, new) slices.
    """

    spans: list[Span]
    sees: Optional[torch.Tensor]
    length: int
    writes: tuple[tuple[slice, slice], ...] = ()
    moves: tuple[tuple[slice, slice], ...] = ()


GATHERED = 1 << 15  # rows x tokens, at most, of spans that are attended in one call


def gather(spans: list[Span], device) -> list[Span]:
    """Joins neighbouring spans whose prefixes start at the same token, while rows x tokens stay small: one attention call with a mask
    costs less than many without."""
    joined: list[list[Span]] = []
    for span in spans:
        if joined:
            first, last = joined[-1][0], joined[-1][-1]
            size = (span.rows.stop - first.rows.start) * (span.tokens.stop - span.tokens.start)
            if size <= GATHERED and first.keep is None is span.keep and (span.rows.start, span.tokens.start) == (
                last.rows.stop, first.tokens.start,
            ) and span.tokens.stop >= last.tokens.stop:  # fmt: skip
                joined[-1].append(span)
                continue
        joined.append([span])
    out = []
    for group in joined:
        if len(group) > 1:
            rows, tokens = slice(group[0].rows.start, group[-1].rows.stop), group[-1].tokens
            reach = np.repeat([span.tokens.stop - tokens.start for span in group], [span.rows.stop - span.rows.start for span in group])
            keep = torch.from_numpy(np.arange(tokens.stop - tokens.start) < reach[:, None]).to(device)
            group = [Span(rows, tokens, keep)]
        out += group
    return out


class VisionCacheLayer(DynamicLayer):
    """Keys and values [1, K, V, d] of the vision sequence at one cross-attention layer. The first such layer of a cache also
    holds the `VisionState`. What is done to the text's length leaves both alone."""

    def __init__(self):
        super().__init__()
        self.state: Optional[VisionState] = None

    def store(self, keys: Optional[torch.Tensor], values: Optional[torch.Tensor], call: VisionCall):
        """Takes in the keys and values of the new vision tokens, returns those of the whole packed sequence."""
        if call.writes:
            self.keys = write_packed(self.keys, keys, call)
            self.values = write_packed(self.values, values, call)
            self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True
        return self.keys, self.values

    def crop(self, *args, **kwargs) -> None:
        """Nothing: generated tokens that are taken back never added a vision token."""

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Nothing: beams change places among the rows of one sample, which share its vision sequence."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state = self.state.select_rows([row for row in range(len(self.state.seen)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.state is not None:
            self.state = self.state.select_rows(indices.tolist())

    def reset(self) -> None:
        self.keys = self.values = self.state = None
        self.is_initialized = False


def write_packed(old: Optional[torch.Tensor], new: torch.Tensor, call: VisionCall) -> torch.Tensor:
    """Puts new keys or values [1, K, v, d] into the packed ones; no copy where the new ones are all there is."""
    if call.writes == ((slice(0, call.length), slice(0, call.length)),):
        return new
    if old is None or old.shape[-2] != call.length:
        grown = new.new_empty(*new.shape[:-2], call.length, new.shape[-1])
        for source, destination in call.moves:
            grown[..., destination, :] = old[..., source, :]
        old = grown
    for source, destination in call.writes:
        old[..., destination, :] = new[..., source, :]
    return old


# ----------------------------------------------------------------------------------------------------------------------
# Reading a call


@dataclass(frozen=True)
class VisionRequest:
    """What a call says about frames, read and checked.

    Attributes:
        state: before the call. past_length: text tokens in the cache.
        is_token, is_frame: bool [B, T], False at padding; True where an `image_pad` stands for a frame.
        grid: (frames, patch rows, patch columns) of the call's media. media_nums: how many of them each sample has.
        new: merged (H, W) of each sample's new frames; a blank medium counts as none.
        pads: frames of each sample that the text of this call places.
        hidden: bool [B, T, F], the caller's mask for these rows, or None.
    """

    state: VisionState
    past_length: int
    is_token: torch.Tensor
    is_frame: torch.Tensor
    grid: list[list[int]]
    media_nums: list[int]
    new: list[list[tuple[int, int]]]
    pads: list[int]
    hidden: Optional[np.ndarray]

    def frames_placed(self, sample: int) -> list[tuple[int, int]]:
        """Merged grids of the frames that this call places."""
        placed = self.state.placed[sample]
        return (self.state.grids[sample] + self.new[sample])[placed : placed + self.pads[sample]]

    def tokens_placed(self, sample: int) -> int:
        return sum(h * w + 1 for h, w in self.frames_placed(sample))


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
) -> VisionRequest:
    """Reads and checks what a call says about frames, before anything heavy is done.

    Args:
        config: a `MossVLConfig`.
        text: `input_ids` [B, T], or `inputs_embeds` [B, T, D], in which no frame can be placed.
        prompt_length: tokens of the whole prompt where the caller knows it: what stands behind is text the model wrote.
        whole_prompt: without `prompt_length`, whether every frame has to be placed in this call.

    Raises:
        ValueError: for shapes and counts that do not fit each other.
    """
    rows, length = text.shape[:2]
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
    if attention_mask is not None and attention_mask.ndim == 2:
        is_token = attention_mask[:, past_length:].to(text.device).bool()
    if prompt_length is not None:
        whole_prompt = known >= prompt_length

    is_frame = torch.zeros_like(is_token)
    in_prompt = length if prompt_length is None else min(length, max(prompt_length - past_length, 0))
    # Of a cache that waits for no frame, a single new token is text that the model wrote, whatever its id is.
    written = past_length > 0 and length == 1 and grid_thw is None and not state.is_waiting()
    if text.ndim == 2 and in_prompt and not written:
        is_frame[:, :in_prompt] = (text == config.image_token_id)[:, :in_prompt] & is_token[:, :in_prompt]
    pads = state.of_samples(is_frame.sum(1).tolist() if in_prompt and not written else [0] * rows, 0)

    hidden = None
    if cross_attention_mask is not None:
        hidden = read_frame_mask(cross_attention_mask, rows, past_length, length)
    grid, media_nums, new = [], [0] * len(pads), [[] for _ in pads]
    if grid_thw is not None:
        if text.ndim != 2:
            raise ValueError("`grid_thw` came with `inputs_embeds` alone; expected `input_ids` beside it, to place the frames.")
        grid = read_grid(pixel_values, grid_thw, config.vision_config, image_mean, image_std)
        if image_features is not None:
            check_features(image_features, grid, pixel_values, config.vision_config)
        media_nums = count_media(grid, media_nums_per_sample, pads)
        unseen = state.of_samples([hidden is not None and whole_prompt and hidden[row].all() for row in range(rows)], True)
        media, merge, patch = iter(grid), config.vision_config.spatial_merge_size, 0
        for sample, count in enumerate(media_nums):
            own = [next(media) for _ in range(count)]
            patches = sum(t * h * w for t, h, w in own)
            blank = pads[sample] == 0 and [t for t, _, _ in own] == [1] and (
                unseen[sample] or pixel_values is None or not pixel_values[patch : patch + patches].any()
            )  # the processor's blank medium stands for none
            new[sample] = [] if blank else [(h // merge, w // merge) for t, h, w in own for _ in range(t)]
            patch += patches
    elif pixel_values is not None or image_features is not None:
        name = "pixel_values" if pixel_values is not None else "image_features"
        raise ValueError(f"`{name}` came without `grid_thw`; expected both, `grid_thw` as the processor returns it.")

    for sample, wanted in enumerate(pads):
        there = len(state.grids[sample]) - state.placed[sample] + len(new[sample])
        if wanted > there or (whole_prompt and wanted != there):
            raise ValueError(
                f"The text of sample {sample} has {wanted} `image_pad` tokens, but its media have {there} frames; expected one "
                f"`image_pad` token a frame. Pass `input_ids`, `pixel_values`, `grid_thw` and `media_nums_per_sample` as one "
                f"processor call returned them, untruncated."
            )
    return VisionRequest(state, past_length, is_token, is_frame, grid, media_nums, new, pads, hidden)


def read_grid(pixel_values: Optional[torch.Tensor], grid_thw, config, image_mean=None, image_std=None) -> list[list[int]]:
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
            wanted = f"[{len(grid)}, 3]: `pixel_values` are levels (uint8), which have to be normalised" if raw else "none: `pixel_values` are not uint8"
            raise ValueError(f"`{name}` has shape {shape}; expected {wanted}. Take all from one processor call with do_normalize=False.")
    return grid


def check_features(image_features: torch.Tensor, grid: list[list[int]], pixel_values: Optional[torch.Tensor], config) -> None:
    """ValueError unless encoded media fit their grid and stand in place of the pixels."""
    tokens = sum(t * h * w for t, h, w in grid) // config.spatial_merge_size**2
    if pixel_values is not None:
        raise ValueError("`image_features` came beside `pixel_values`; expected one of them: the media encoded, or their pixels.")
    if tuple(image_features.shape) != (tokens, config.out_hidden_size):
        raise ValueError(
            f"`image_features` has shape {list(image_features.shape)}; expected [{tokens}, {config.out_hidden_size}], what "
            f"`get_image_features` gives for media of this `grid_thw`."
        )


def read_frame_mask(mask: torch.Tensor, rows: int, past_length: int, length: int) -> np.ndarray:
    """`cross_attention_mask` [B, 1, T or S, F] -> bool [B, T, F] for the tokens of this call."""
    known = past_length + length
    fits = mask.ndim == 4 and mask.shape[:2] == (rows, 1) and mask.dtype == torch.bool
    if not fits or (mask.shape[2] != length and mask.shape[2] < known):
        raise ValueError(
            f"`cross_attention_mask` has shape {list(mask.shape)} and dtype {mask.dtype}; expected bool [{rows}, 1, {length}, "
            f"frames], True = hidden, a row for each token of this call, or {known} rows with those of the cache."
        )
    if mask.shape[2] != length:
        mask = mask[:, :, past_length:known]
    return mask[:, 0].cpu().numpy()


def count_media(grid: list[list[int]], media_nums_per_sample, pads: list[int]) -> list[int]:
    """How many media each sample has. Where the caller does not say, each takes what its `image_pad` tokens ask for, and a text
    without any the processor's one blank frame, if there is one for each such text."""
    if media_nums_per_sample is not None:
        listed = (row if isinstance(row, (list, tuple)) else [row] for row in media_nums_per_sample)  # lists: as pipelines join calls
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
            f"`media_nums_per_sample` is {media_nums_per_sample}; expected {len(pads)} numbers, one a sample, that sum to the "
            f"{len(grid)} media of `grid_thw`, for texts with {pads} `image_pad` tokens. Pass on all that the processor returned."
        )
    return nums


# ----------------------------------------------------------------------------------------------------------------------
# Planning a call


def visible_rows(
    state: VisionState, total: list[int], is_token: np.ndarray, is_frame: np.ndarray, mask: Optional[np.ndarray]
) -> list[list[tuple[int, int, np.ndarray]]]:
    """Runs of text tokens that see the same frames: for each row (first token, behind the last, bool array over the frames).

    Args:
        total: frames of each sample, with those of this call.
        is_token, is_frame: bool [B, T].
        mask: bool [B, T, F], True = hidden, over all frames or over those new in this call; None: a token sees what was seen
            before it and every frame whose `image_pad` stands at or before it; padding sees nothing.

    Raises:
        ValueError: if the mask has too few columns, or shows frames that are not there.
    """
    runs = []
    for row, sample in enumerate(state.row_sample):
        count, before = total[sample], np.zeros(total[sample], dtype=bool)
        before[: len(state.seen[row])] = state.seen[row]
        if mask is None:
            codes = np.where(is_token[row], is_frame[row].cumsum(), -1)  # frames that the token has reached in this call
            changes = codes[1:] != codes[:-1]
        else:
            shown = ~mask[row]  # [T, F]
            known = len(state.grids[sample]) if shown.shape[1] < max(total) else 0  # columns before those of the mask
            if shown.shape[1] < count - known or shown[:, count - known :].any():
                raise ValueError(
                    f"`cross_attention_mask` has {shown.shape[1]} frame columns and shows sample {sample} some that it does not "
                    f"have, or lacks some of its {count}; expected [B, 1, T, {max(total)}], True = hidden."
                )
            shown = shown[:, : count - known]
            changes = (shown[1:] != shown[:-1]).any(axis=1)
            if known:
                changes |= is_token[row, 1:] != is_token[row, :-1]
        edges = [0, *(np.flatnonzero(changes) + 1).tolist(), is_token.shape[1]]
        row_runs = []
        for first, behind in zip(edges, edges[1:]):
            pattern = before.copy() if is_token[row, first] else np.zeros_like(before)
            if mask is None:
                pattern[state.placed[sample] : state.placed[sample] + max(codes[first], 0)] = True
            else:
                pattern[known:] = shown[first]
            row_runs.append((first, behind, pattern))
        runs.append(row_runs)
    return runs


def plan_call(request: VisionRequest) -> tuple[VisionState, VisionCall]:
    """The state behind a call, but for `waiting` and `rope_delta`, which the model fills in; and the call itself.

    Raises:
        ValueError: if the caller's mask shows a frame that has no place in the text yet.
    """
    state, new, pads, device = request.state, request.new, request.pads, request.is_token.device
    is_step = not any(pads) and not any(new) and request.is_token.shape[1] == 1
    if is_step and request.hidden is None and state.step is not None:
        return state, state.step
    if is_step:  # asks the device nothing
        is_token, is_frame = np.ones(request.is_token.shape, dtype=bool), np.zeros(request.is_token.shape, dtype=bool)
    else:
        is_token, is_frame = request.is_token.cpu().numpy(), request.is_frame.cpu().numpy()
    samples = range(len(state.grids))
    grids = [known + added for known, added in zip(state.grids, new)]
    placed = [known + added for known, added in zip(state.placed, pads)]
    ends = [np.cumsum([0] + [h * w + 1 for h, w in grid]).tolist() for grid in grids]  # frame -> token, in the sample
    starts = np.cumsum([0] + [end[-1] for end in ends]).tolist()

    writes, moves, at = [], [], 0
    for sample in samples:
        old, reached = ends[sample][state.placed[sample]], ends[sample][placed[sample]]
        source = slice(at, at + reached - old)
        destination = slice(starts[sample] + old, starts[sample] + reached)
        if writes and (writes[-1][0].stop, writes[-1][1].stop) == (source.start, destination.start):
            source, destination = slice(writes[-1][0].start, source.stop), slice(writes.pop()[1].start, destination.stop)
        if source.stop > source.start:
            writes.append((source, destination))
        if old:
            moved = slice(state.starts[sample], state.starts[sample] + old)
            moves.append((moved, slice(starts[sample], starts[sample] + old)))
        at += reached - old

    length, seen, spans = is_token.shape[1], [], []
    for row, runs in enumerate(visible_rows(state, [len(grid) for grid in grids], is_token, is_frame, request.hidden)):
        sample = state.row_sample[row]
        tokens_of = np.flatnonzero(is_token[row])
        last = tokens_of[-1] if len(tokens_of) else length - 1
        for first, behind, pattern in runs:
            if first <= last < behind:
                seen.append(pattern)
            frames = np.flatnonzero(pattern)
            if not len(frames):
                continue
            if frames[-1] >= placed[sample]:
                raise ValueError(
                    f"`cross_attention_mask` shows frame {frames[-1]} of sample {sample} to a token, but the text up to here has "
                    f"only {placed[sample]} `image_pad` tokens; a frame has no position before its `image_pad`."
                )
            tokens = slice(starts[sample], starts[sample] + ends[sample][frames[-1] + 1])
            keep = None
            if len(frames) != frames[-1] + 1:
                keep = np.repeat(pattern[: frames[-1] + 1], np.diff(ends[sample][: frames[-1] + 2]))
                keep = torch.from_numpy(keep).to(device)
            rows = slice(row * length + first, row * length + behind)
            if spans and keep is None is spans[-1].keep and (spans[-1].tokens, spans[-1].rows.stop) == (tokens, rows.start):
                rows = slice(spans.pop().rows.start, rows.stop)
            spans.append(Span(rows, tokens, keep))

    sees = None
    if sum(span.rows.stop - span.rows.start for span in spans) < is_token.size:
        seeing = np.zeros(is_token.size, dtype=np.float32)
        for span in spans:
            seeing[span.rows] = 1.0
        sees = torch.from_numpy(seeing).view(*is_token.shape, 1).to(device)
    call = VisionCall(gather(spans, device), sees, starts[-1], tuple(writes), tuple(moves))
    step = call if is_step and request.hidden is None else None
    return replace(state, grids=grids, placed=placed, seen=seen, starts=starts, step=step), call
