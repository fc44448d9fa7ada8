"""Reads a call: its text, media and frame mask, checked against each other before anything heavy runs.

    read_text             padding, and the `image_pad` tokens that place frames
    read_frame_mask       the caller's `cross_attention_mask`, inverted
    match_media           new frames, without blank media; media of zeros that wait for their text
    check_frame_counts    as many frames as `image_pad` tokens

Axes: B rows, T text tokens of this call, S text tokens in all (cache included), D hidden size, N frames.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, Optional

import numpy as np
import torch

from .media import Grid, Media
from .vision_sequence import VisionState, count_vision_tokens


class Padding(NamedTuple):
    """Padding, as the caller's `attention_mask` has it.

    Attributes:
        in_call: whether any token of this call is padding.
        anywhere: whether any token of this call or of the cache is padding.
        dropped: long [B], number of tokens in the cache that were tokens in an earlier call and are padding now, such
            as those generated for a row that had ended; None if there are none. Positions do not count them.
        token_counts, cached: `token_counts` and `is_token` of `VisionState`, after the call.
    """

    in_call: bool = False
    anywhere: bool = False
    dropped: Optional[torch.Tensor] = None
    token_counts: Optional[torch.Tensor] = None
    cached: Optional[torch.Tensor] = None


@dataclass(frozen=True)
class TextRequest:
    """The text of a call.

    Attributes:
        is_token: bool [B, T], False at padding.
        is_frame: bool [B, T], True at each `image_pad` that places a frame.
        pads: for each sample, the number of these `image_pad` tokens: the frames that this call places.
    """

    is_token: torch.Tensor
    is_frame: torch.Tensor
    padding: Padding
    pads: list[int]

    @property
    def length(self) -> int:
        return self.is_token.shape[1]


class FrameMask(NamedTuple):
    """A caller's `cross_attention_mask` for the tokens of a call, inverted.

    Attributes:
        visible: bool [B, m, N], True = visible, for m consecutive tokens of the call. The other tokens see every
            frame placed at or before them.
        first: index in the call of the first of the m tokens.
        new_frames_only: True if the columns are the frames that come with the call; False if they are all frames of
            the conversation.
    """

    visible: np.ndarray
    first: int
    new_frames_only: bool

    @property
    def tokens(self) -> slice:
        return slice(self.first, self.first + self.visible.shape[1])


@dataclass(frozen=True)
class VisionRequest:
    """A call, read and checked: its text, its media, and the state before it.

    Attributes:
        state: the state before the call.
        past_length: text tokens in the cache.
        media: the media of the call, and unplaced media of earlier calls that its text places.
        new_frames: merged (H, W) of each sample's new frames; a blank medium has none.
        unplaced: as in `VisionState`, after the call.
        mask: the caller's mask, or None.
        blank: blank media of a training call without frames, or None; see `with_blank`.
    """

    state: VisionState
    past_length: int
    text: TextRequest
    media: Media
    new_frames: list[list[tuple[int, int]]]
    unplaced: list[list[Media]]
    mask: Optional[FrameMask]
    blank: Optional[Media] = None

    def grids(self) -> list[list[tuple[int, int]]]:
        """Merged grids of all frames of each sample, new ones included."""
        return [known + new for known, new in zip(self.state.grids, self.new_frames, strict=True)]

    def frames_placed(self, sample: int) -> list[tuple[int, int]]:
        """Merged grids of the frames that this call places."""
        placed = self.state.placed[sample]
        grids = self.state.grids[sample] + self.new_frames[sample]
        return grids[placed : placed + self.text.pads[sample]]

    def tokens_placed(self, sample: int) -> int:
        """Vision tokens of the frames that this call places."""
        return count_vision_tokens(self.frames_placed(sample))

    def only_continues(self) -> bool:
        """Whether the tokens of the call see the frames that the previous token saw, and take the next positions."""
        return not (
            self.text.padding.in_call
            or any(self.text.pads)
            or any(self.new_frames)
            or self.mask is not None
            or self.text.padding.dropped is not None
        )

    def with_blank(self, media: Media) -> "VisionRequest":
        """This request with media to which all tokens attend, and whose effect is multiplied by 0, so that every
        parameter of the vision side gets a gradient."""
        return replace(self, blank=media)


def read_request(
    image_token_id: int,
    state: Optional[VisionState],
    past_length: int,
    text: torch.Tensor,
    attention_mask: Optional[torch.Tensor],
    media: Media,
    cross_attention_mask: Optional[torch.Tensor] = None,
    rows_per_sample: int = 1,
    prompt_length: Optional[int] = None,
    whole_prompt: bool = True,
    mask_at_end: bool = False,
) -> VisionRequest:
    """Reads a call and checks it.

    Args:
        text: `input_ids` [B, T]; or `inputs_embeds` [B, T, D], in which no frame can be placed.
        prompt_length: tokens of the whole prompt, if it is known. The model generated later tokens.
        whole_prompt: without `prompt_length`, whether every frame has to be placed in this call.
        mask_at_end: whether a mask with fewer rows than the call has tokens covers the last tokens; otherwise it
            covers the first ones.

    Raises:
        ValueError: for shapes and counts that do not fit each other.
    """
    rows, length = text.shape[:2]
    if not rows or not length:
        raise ValueError(f"The text has shape [{rows}, {length}]; expected at least one row of at least one token.")
    state = VisionState.empty(rows, rows_per_sample) if state is None else state
    if len(state.row_sample) != rows or rows % rows_per_sample:
        raise ValueError(f"The call has {rows} text rows; expected {len(state.row_sample)}, as many as the cache.")
    if media and text.ndim != 2:
        raise ValueError(
            "`grid_thw` came with `inputs_embeds` alone; expected `input_ids` as well, to place the frames."
        )
    if prompt_length is not None:
        whole_prompt = past_length + length >= prompt_length
    request_text = read_text(image_token_id, state, past_length, text, attention_mask, bool(media), prompt_length)
    media = media.assign(request_text.pads)
    mask = None
    if cross_attention_mask is not None:
        mask = read_frame_mask(
            cross_attention_mask, rows, past_length, length, media, whole_prompt=whole_prompt, at_end=mask_at_end
        )
    request = match_media(state, past_length, request_text, media, mask, whole_prompt)
    check_frame_counts(request, whole_prompt)
    return request


# Text


def read_text(
    image_token_id: int,
    state: VisionState,
    past_length: int,
    text: torch.Tensor,
    attention_mask: Optional[torch.Tensor],
    has_media: bool,
    prompt_length: Optional[int],
) -> TextRequest:
    """Padding and `image_pad` tokens of a call. Arguments as in `read_request`."""
    rows, length = text.shape[:2]
    is_token, padding = read_padding(state, past_length, text, attention_mask)
    in_prompt = length if prompt_length is None else min(length, max(prompt_length - past_length, 0))
    # A single token on a filled cache is a generated one, which places no frame, unless a frame can still be placed.
    expects_frames = has_media or state.is_waiting() or any(state.unplaced)
    is_generated = past_length > 0 and length == 1 and not expects_frames
    is_frame, pads = torch.zeros_like(is_token), [0] * len(state.grids)
    if text.ndim == 2 and in_prompt and not is_generated:
        is_frame[:, :in_prompt] = (text == image_token_id)[:, :in_prompt] & is_token[:, :in_prompt]
        pads = pads_of_samples(state, is_frame.sum(1).tolist())
    return TextRequest(is_token, is_frame, padding, pads)


def read_padding(
    state: VisionState, past_length: int, text: torch.Tensor, attention_mask: Optional[torch.Tensor]
) -> tuple[torch.Tensor, Padding]:
    """Where the call has tokens, bool [B, T], False at padding; and the padding. A 4D mask does not mark padding.

    Raises:
        ValueError: if the mask is not [B, S].
    """
    rows, length = text.shape[:2]
    expected = (rows, past_length + length)
    if attention_mask is None or attention_mask.ndim == 4:
        # Without a mask the padding of the cache stays as it was.
        counts = None if state.token_counts is None else state.token_counts + length
        is_token = torch.ones(rows, length, dtype=torch.bool, device=text.device)
        return is_token, Padding(token_counts=counts, cached=state.is_token)
    if tuple(attention_mask.shape) != expected:
        raise ValueError(
            f"`attention_mask` has shape {list(attention_mask.shape)}; expected {list(expected)}: the tokens of the "
            "cache and of this call, 0 at padding."
        )
    is_real = attention_mask.to(text.device).bool()
    is_token = is_real[:, past_length:]
    before = past_length if state.token_counts is None else state.token_counts.to(text.device)
    dropped = (before - is_real[:, :past_length].sum(1)).clamp(min=0)
    # Three flags in one number, so that the host waits for the device once.
    bits = int(is_token.all() + 2 * is_real.all() + 4 * (dropped > 0).any())
    padding = Padding(
        in_call=not bits & 1,
        anywhere=not bits & 2,
        dropped=dropped if bits & 4 else None,
        token_counts=None if bits & 2 else is_real.sum(1),
        cached=None if bits & 2 else is_real,
    )
    return is_token, padding


def pads_of_samples(state: VisionState, pads_of_rows: list[int]) -> list[int]:
    """Number of `image_pad` tokens of each sample.

    Raises:
        ValueError: if rows of one sample, which share its frames, have different numbers.
    """
    pads = [pads_of_rows[row] for row in state.first_rows()]
    for row, (sample, count) in enumerate(zip(state.row_sample, pads_of_rows, strict=True)):
        if count != pads[sample]:
            first = state.row_sample.index(sample)
            raise ValueError(
                f"Text rows {first} and {row} share the frames of sample {sample}, but have {pads[sample]} and "
                f"{count} `image_pad` tokens in this call; expected the same text. Give each conversation a "
                "separate cache before new frames come."
            )
    return pads


# Frame mask


def read_frame_mask(
    mask: torch.Tensor, rows: int, past_length: int, length: int, media: Media, *, whole_prompt: bool, at_end: bool
) -> FrameMask:
    """The rows of `cross_attention_mask` [B, 1, M, N] for the tokens of this call, inverted to True = visible.

    On a filled cache, a mask of at most T rows covers tokens of this call. Its columns are the frames that come with
    the call if their numbers are equal, otherwise all frames of the conversation. A mask of more rows begins with the
    first token of the conversation. Tokens after the last row see every frame placed at or before them: a caller may
    append a completion after the processor made the mask.

    Raises:
        ValueError: if shape or dtype do not fit.
    """
    known = past_length + length
    if (
        mask.ndim != 4
        or mask.shape[:2] != (rows, 1)
        or mask.dtype != torch.bool
        or (whole_prompt and not past_length and mask.shape[2] > known)
    ):
        raise ValueError(
            f"`cross_attention_mask` has shape {list(mask.shape)} and dtype {mask.dtype}; expected bool [{rows}, 1, "
            f"{length}, frames], True = hidden, a row per token of this call; or {known} rows, with those of the "
            "cache."
        )
    of_call = past_length > 0 and mask.shape[2] <= length
    frames = max([1, *map(len, media.frames())])  # a blank medium counts as one frame
    of_rows = mask[:, 0, :length] if of_call else mask[:, 0, past_length:known]
    visible = ~of_rows.cpu().numpy()
    return FrameMask(
        visible,
        first=length - visible.shape[1] if of_call and at_end else 0,
        new_frames_only=of_call and bool(media) and mask.shape[3] == frames,
    )


# Media and text together


def match_media(
    state: VisionState,
    past_length: int,
    text: TextRequest,
    media: Media,
    mask: Optional[FrameMask],
    whole_prompt: bool,
) -> VisionRequest:
    """The request, with blank media removed from the new frames.

    A text without `image_pad` may come with one frame of zeros: the processor's blank medium, or an image of zeros
    whose text comes later. It is kept in `unplaced`. If a later text places more frames than come with it, unplaced
    media are used again.
    """
    frames, unplaced = media.frames(), list(state.unplaced)
    recalled: list[list[Media]] = [[] for _ in frames]
    for sample, (pads, numbers) in enumerate(zip(text.pads, media.numbers(), strict=True)):
        if pads == 0 and [media.grid[number][0] for number in numbers] == [1]:
            medium = media.take(numbers)
            is_masked = mask is not None and not mask.visible[state.row_sample.index(sample)].any()
            is_blank = whole_prompt and (is_masked or medium.pixel_values is None)
            if is_blank or medium.is_zero():
                frames[sample] = []
                unplaced[sample] = [*unplaced[sample], keep_medium(unplaced[sample], medium)]
        elif pads and unplaced[sample]:
            missing = pads - len(frames[sample])
            recalled[sample], unplaced[sample] = recall_media(state, sample, missing, unplaced[sample])
            frames[sample] = [frame for medium in recalled[sample] for frame in medium.frames()[0]] + frames[sample]
    if any(recalled):
        media = media.with_recalled(recalled)
    if whole_prompt:
        unplaced = [[] for _ in unplaced]
    return VisionRequest(state, past_length, text, media, frames, unplaced, mask)


def keep_medium(earlier: list[Media], medium: Media) -> Media:
    """The medium of zeros to keep: an earlier one with the same grid and fields if there is one, else a copy."""
    return next((other for other in earlier if other.has_form_of(medium)), None) or medium.clone()


def recall_media(
    state: VisionState, sample: int, missing: int, unplaced: list[Media]
) -> tuple[list[Media], list[Media]]:
    """Divides unplaced media of a sample into those that the text of a call places, and those that stay unplaced. If
    enough other frames are there, all unplaced media were blank, and none stays.

    Args:
        missing: number of `image_pad` tokens of the call beyond the frames that come with it.

    Raises:
        ValueError: if the text does not determine which of them it places.
    """
    waiting = len(state.grids[sample]) - state.placed[sample]
    if missing <= waiting:
        return [], []
    sizes = {medium.grid[0] for medium in unplaced}
    if waiting or (len(sizes) > 1 and missing != len(unplaced)):
        raise ValueError(
            f"Sample {sample} has {len(unplaced)} media of zeros that came without an `image_pad`: images, or blank "
            f"media of the processor. Its text now needs {missing} frames of earlier calls, of which {waiting} wait. "
            "Leave blank media out, or give images with the text that places them."
        )
    return unplaced[:missing], unplaced[missing:]


def check_frame_counts(request: VisionRequest, whole_prompt: bool) -> None:
    """Refuses a text with more `image_pad` tokens than frames, or a whole prompt with fewer.

    Raises:
        ValueError: for the first such sample.
    """
    for sample, (pads, grids) in enumerate(zip(request.text.pads, request.grids(), strict=True)):
        frames = len(grids) - request.state.placed[sample]
        if pads > frames or (whole_prompt and pads != frames):
            raise ValueError(
                f"The text of sample {sample} has {pads} `image_pad` tokens, but its media have {frames} frames; "
                "expected one `image_pad` token per frame. Pass `input_ids`, `pixel_values`, `grid_thw` and "
                "`media_nums_per_sample` as one processor call returned them, untruncated."
            )


def media_of_new_turn(state: VisionState, media: Media, pads: list[int]) -> Media:
    """The media that the cache does not hold yet. The caller may give the media of the whole conversation, or only
    those of the new turn.

    Args:
        pads: `image_pad` tokens of each sample in the text of the new turn.

    Raises:
        ValueError: if a sample's media are neither.
    """
    kept, counts = [], []
    for sample, (asked, numbers) in enumerate(zip(pads, media.numbers(), strict=True)):
        known, frames = state.dropped[sample] + len(state.grids[sample]), len(media.frames()[sample])
        missing = max(0, asked - (len(state.grids[sample]) - state.placed[sample]))
        if missing and frames not in (missing, known + missing):
            raise ValueError(
                f"The new text of sample {sample} places {missing} frames beyond the cache, but its media have "
                f"{frames}; expected {missing}, or {known + missing} with those of the earlier turns."
            )
        # The last media of the sample, until they have the missing frames.
        new = [number for number in numbers if sum(t for t, _, _ in media.grid[number + 1 : numbers.stop]) < missing]
        kept += new
        counts.append(len(new))
    if len(kept) == len(media):
        return media
    if not kept:
        return Media(Grid(()), media.merge_size)
    return replace(media.take(kept), per_sample=counts)
