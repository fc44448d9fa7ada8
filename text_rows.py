"""Texts to rows of tokens: replaces placeholders, tokenises, labels, truncates and pads, and makes the frame mask.

Axes: B samples, T tokens, N frames of the sample that has most.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .checks import flag
from .options import names_of
from .samples import Sample


TEXT_OPTIONS = names_of("text")
PAD_VALUES = {"attention_mask": 0, "token_type_ids": 0, "mm_token_type_ids": 0, "offset_mapping": (0, 0)}
MM_TYPES = {"image": 1, "video": 2}  # as in transformers
PADDING = (False, True, "longest", "max_length", "do_not_pad")
NO_PADDING = (False, "do_not_pad")
TRUNCATION = (False, True, "longest_first", "only_first", "do_not_truncate")


@dataclass(frozen=True)
class VisionTokens:
    """Ids of the tokens that stand for media."""

    image: int  # one per frame
    vision_start: int
    vision_end: int


@dataclass(frozen=True)
class TextOptions:
    """The text options of a call, checked and complete."""

    pads: bool
    pad_left: bool
    least_length: int  # rows are padded to at least this length
    length_multiple: int  # lengths of padded rows are multiples of it
    max_length: int | None  # rows are truncated to this length; None: never
    truncate_left: bool
    add_special_tokens: bool
    return_attention_mask: bool
    return_token_type_ids: bool
    return_mm_token_type_ids: bool
    return_offsets_mapping: bool


def read_text_options(options: dict, tokenizer: PreTrainedTokenizerBase, with_spans: bool) -> TextOptions:
    """Text options as transformers reads them; None means not given.

    Args:
        with_spans: whether the call has `labels_spans`, which need character offsets.

    Raises:
        ValueError: for a wrong value, and for options that contradict each other or do not fit the tokenizer.
    """
    padding, truncation = strategy(options.get("padding")), strategy(options.get("truncation"))
    _check_strategies(padding, truncation, options)
    flags = {
        name: flag(name, options.get(name))
        for name in TEXT_OPTIONS
        if name == "add_special_tokens" or name.startswith("return_")
    }
    _check_lengths(padding, options, tokenizer)
    if (with_spans or flags["return_offsets_mapping"]) and not tokenizer.is_fast:
        raise ValueError(f"character offsets need a fast tokenizer, got {type(tokenizer).__name__}")
    pads, max_length = padding not in NO_PADDING, options.get("max_length")
    truncates = truncation not in (False, "do_not_truncate")
    if "truncation" not in options:  # max_length alone truncates, unless it is the length of padding
        truncates = max_length is not None and not pads
    longest = max_length if max_length is not None else tokenizer.model_max_length
    return TextOptions(
        pads=pads,
        pad_left=options.get("padding_side", tokenizer.padding_side) == "left",
        least_length=longest if padding == "max_length" else 0,
        length_multiple=options.get("pad_to_multiple_of", 1),
        max_length=longest if truncates else None,
        truncate_left=tokenizer.truncation_side == "left",
        **{
            **flags,
            "add_special_tokens": options.get("add_special_tokens", True),
            "return_attention_mask": options.get("return_attention_mask", True),
        },
    )


def strategy(value):
    """A padding or truncation strategy: the value of an enum member; None as False."""
    value = getattr(value, "value", value)
    return False if value is None else value


def _check_strategies(padding, truncation, options: dict) -> None:
    if padding not in PADDING:
        raise ValueError(f"padding must be True, False, 'longest', 'max_length' or 'do_not_pad', got {padding!r}")
    if truncation not in TRUNCATION:
        raise ValueError(
            f"truncation must be True, False, 'longest_first', 'only_first' or 'do_not_truncate', got {truncation!r}"
        )
    if options.get("padding_side", "right") not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', got {options['padding_side']!r}")


def _check_lengths(padding, options: dict, tokenizer: PreTrainedTokenizerBase) -> None:
    for name in ("max_length", "pad_to_multiple_of"):
        if name in options and not (isinstance(options[name], (int, np.integer)) and options[name] > 0):
            raise ValueError(f"{name} must be a positive whole number, got {options[name]!r}")
    if padding in NO_PADDING:
        without_effect = [name for name in ("padding_side", "pad_to_multiple_of") if name in options]
        if without_effect:
            names = ", ".join(without_effect)
            raise ValueError(f"{names}: no effect without padding; pass padding=True, or leave it out")
        return
    if tokenizer.pad_token_id is None:
        raise ValueError("padding needs a tokenizer with a pad_token; set tokenizer.pad_token")
    if padding == "max_length" and "max_length" not in options and tokenizer.model_max_length > 1e20:
        raise ValueError("padding='max_length' needs max_length; the tokenizer has no model_max_length")


# rows


def token_rows(
    samples: list[Sample],
    tokenizer: PreTrainedTokenizerBase,
    options: TextOptions,
    tokens: VisionTokens,
    ignore_index: int,
) -> dict[str, list]:
    """Tokenises the texts: name -> one list per sample, truncated and padded. The names are `input_ids`,
    `attention_mask`, ..., and `labels` if the samples have spans.

    The tokenizer does not truncate or pad: it would store both as settings, which a call in another thread would then
    obey.
    """
    with_spans = samples[0].label_spans is not None
    expanded = [expand_placeholders(sample) for sample in samples]
    encoded = tokenizer(
        [one.text for one in expanded],
        add_special_tokens=options.add_special_tokens,
        padding=False,
        truncation=False,
        return_attention_mask=True,
        return_token_type_ids=options.return_token_type_ids,
        return_offsets_mapping=with_spans or options.return_offsets_mapping,
        verbose=False,
    )
    rows = {name: list(values) for name, values in encoded.items()}
    if options.return_mm_token_type_ids:
        rows["mm_token_type_ids"] = [
            mm_token_types(sample, ids, tokens) for sample, ids in zip(samples, rows["input_ids"], strict=True)
        ]
    if with_spans:
        rows["labels"] = [
            label_row(
                ids,
                offsets,
                [(one.move(start), one.move(end)) for start, end in sample.label_spans],
                tokens,
                ignore_index,
            )
            for sample, one, ids, offsets in zip(
                samples, expanded, rows["input_ids"], rows["offset_mapping"], strict=True
            )
        ]
    if not options.return_offsets_mapping:
        rows.pop("offset_mapping", None)
    rows = _truncate(rows, options)
    _check_image_pads(samples, rows["input_ids"], tokens)
    return _pad(rows, options, {**PAD_VALUES, "input_ids": tokenizer.pad_token_id, "labels": ignore_index})


@dataclass(frozen=True)
class ExpandedText:
    """A text with its placeholders replaced."""

    text: str
    move: Callable[[int], int]  # an offset in the original text -> the offset in this text


def expand_placeholders(sample: Sample) -> ExpandedText:
    pieces, done, gained = [], 0, [0]  # gained: characters added by the first 0, 1, 2, ... placeholders
    for placeholder, medium in zip(sample.placeholders, sample.media, strict=True):
        pieces += [sample.text[done : placeholder.start], medium.text]
        gained.append(gained[-1] + len(medium.text) - (placeholder.end - placeholder.start))
        done = placeholder.end
    pieces.append(sample.text[done:])
    ends = [placeholder.end for placeholder in sample.placeholders]

    def move(offset: int) -> int:
        passed = bisect_right(ends, offset)
        if passed < len(ends):
            # An offset inside a placeholder moves to its start.
            offset = min(offset, sample.placeholders[passed].start)
        return offset + gained[passed]

    return ExpandedText("".join(pieces), move)


def mm_token_types(sample: Sample, ids: list[int], tokens: VisionTokens) -> list[int]:
    """Per token: 1 for the `image_pad` of an image, 2 for an `image_pad` of a video, else 0."""
    types = iter(
        [
            MM_TYPES[placeholder.kind]
            for placeholder, medium in zip(sample.placeholders, sample.media, strict=True)
            for _ in range(medium.grid[0])
        ]
    )
    return [next(types, 0) if token == tokens.image else 0 for token in ids]


def label_row(
    ids: list[int], offsets: list, spans: list[tuple[int, int]], tokens: VisionTokens, ignore_index: int
) -> list[int]:
    """The labels of a row: the id of each token that is learned, `ignore_index` for the others.

    A token is learned if it overlaps a span, except `image_pad` and everything from `vision_start` to `vision_end`.

    Args:
        offsets: the (start, end) characters of each token.
        spans: the (start, end) characters to learn, in the same text.
    """
    ids, offsets = np.array(ids, dtype=np.int64), np.array(offsets, dtype=np.int64).reshape(-1, 2)  # [T], [T, 2]
    learned = np.zeros(len(ids), dtype=bool)
    for start, end in spans:
        learned |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    learned &= ids != tokens.image
    ends = np.flatnonzero(ids == tokens.vision_end)
    for start in np.flatnonzero(ids == tokens.vision_start):
        end = np.searchsorted(ends, start)
        learned[start : ends[end] + 1 if end < len(ends) else start + 1] = False
    return np.where(learned, ids, ignore_index).tolist()


def _truncate(rows: dict[str, list], options: TextOptions) -> dict[str, list]:
    longest = options.max_length
    if longest is None:
        return rows
    kept = slice(-longest, None) if options.truncate_left else slice(longest)
    return {name: [row[kept] if len(row) > longest else row for row in values] for name, values in rows.items()}


def _check_image_pads(samples: list[Sample], input_ids: list[list[int]], tokens: VisionTokens) -> None:
    for index, (sample, ids) in enumerate(zip(samples, input_ids, strict=True)):
        found = ids.count(tokens.image)
        if found != sample.frames:
            raise ValueError(
                f"text {index} keeps {found} of the {sample.frames} <|image_pad|> tokens of its frames after "
                f"truncation to {len(ids)} tokens; raise max_length, or give fewer frames"
            )


def _pad(rows: dict[str, list], options: TextOptions, values: dict) -> dict[str, list]:
    """Pads all rows to one length. `values`: the padding of each kind of row."""
    if not options.pads:
        return rows
    length = max(options.least_length, *(len(ids) for ids in rows["input_ids"]))
    length = -(-length // options.length_multiple) * options.length_multiple

    def fill(row, value):
        padding = [value] * (length - len(row))
        return padding + row if options.pad_left else row + padding

    return {name: [fill(row, values[name]) for row in lists] for name, lists in rows.items()}


def frame_mask(
    input_ids: list[list[int]], attention_mask: list[list[int]], image_token: int, frames: int
) -> torch.Tensor:
    """`cross_attention_mask`, bool [B, 1, T, N], True = hidden, from rows of equal length.

    A token sees as many frames as there are `image_pad` tokens at or before it. Padding sees none.
    """
    ids, attended = torch.tensor(input_ids), torch.tensor(attention_mask)
    visible = (ids == image_token).cumsum(1) * attended  # [B, T], number of visible frames
    return (torch.arange(frames) >= visible[:, :, None])[:, None]
