"""Text, images and videos to the tensors of the model: placeholders, timestamps, the frame mask, labels. No pixels here.

Axes: B samples, T tokens, F frames of the sample that has most, P patches.
"""

import inspect
import json
import os
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import transformers
from transformers import GenerationConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.processing_utils import ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

from .checks import flag, nearest_name, shorten
from .conversation import PLACEHOLDER, collect_media, count_placeholders, for_template, is_frames, read_messages
from .image_processing_moss_vl import (
    HUB_KEYS,
    MossVLImageProcessor,
    MossVLImageProcessorFast,
    check_return_tensors,
    split_array,
    to_format,
    wants_levels,
)
from .options import FIXED, FIXED_TEMPLATE, FIXED_TEXT, REFUSED, canonical, drop_fixed, names_of, read_options
from .patches import join_patches
from .video_processing_moss_vl import MossVLVideoProcessor
from .video_reading import is_pair


logger = logging.get_logger(__name__)

IMAGE_CLASSES = {cls.__name__: cls for cls in (MossVLImageProcessor, MossVLImageProcessorFast)}
BLANK_PIXELS = 128  # a side of the medium that a sample without media gets
PAD_VALUES = {"attention_mask": 0, "token_type_ids": 0, "mm_token_type_ids": 0, "offset_mapping": (0, 0)}
MM_TYPES = {"image": 1, "video": 2}  # as transformers numbers them
GRID_NAMES = ("grid_thw", "image_grid_thw")
TEXT_KNOBS, CALL_KNOBS = names_of("text"), names_of("call")
TEMPLATE_ARGUMENTS = (
    "chat_template",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "return_dict",
    "return_tensors",
    "return_assistant_tokens_mask",
    "processor_kwargs",
)
NESTED_KWARGS = ("text_kwargs", "images_kwargs", "videos_kwargs", "common_kwargs")
# What from_pretrained takes of all tokenizers, beside knobs and the arguments of the tokenizer's class.
TOKENIZER_KEYS = {
    "padding_side",
    "truncation_side",
    "model_max_length",
    "clean_up_tokenization_spaces",
    "split_special_tokens",
    "add_prefix_space",
    "add_bos_token",
    "add_eos_token",
    "additional_special_tokens",
    "extra_special_tokens",
    "model_specific_special_tokens",
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
    "legacy",
    "from_slow",
    "gguf_file",
    "fix_mistral_regex",
    "model_input_names",
    "tokenizer_object",
    "tokenizer_file",
    "vocab_file",
    "merges_file",
    "errors",
    "name_or_path",
}
OWN_SETTINGS = {
    "return_cross_attention_mask": True,
    "grid_name": "grid_thw",
}  # of the processor itself, and their defaults
PARTS = ("image_processor", "tokenizer", "video_processor")  # given ready, they take the place of the folder's
NOT_FOR_TOKENIZER = {
    *PARTS,
    "trust_remote_code",
    "code_revision",
    "use_fast",
    "backend",
    "chat_template",
    "return_unused_kwargs",
    "_commit_hash",
}


class ProcessedBatch(BatchFeature):
    """What a call returns.

    transformers' pipelines process samples one by one and join the outputs. A frame mask cannot be joined with one of another length, so it
    is left out once a pipeline adds its input as "text"; the model then tells the mask from the tokens.
    """

    def __setitem__(self, name, value):
        if name == "text":
            self.data.pop("cross_attention_mask", None)
        super().__setitem__(name, value)


@dataclass
class Medium:
    """One image, or one clip of a video, as it goes into the sample."""

    patches: torch.Tensor | None  # uint8 [P, 3 * t * p * p]; None where only features are there
    grid: list[int]  # frames, patch rows, patch columns
    text: str  # what takes the place of its placeholder
    image_mean: tuple
    image_std: tuple
    metadata: dict | None = None
    features: torch.Tensor | None = None  # [P / m^2, D], where an encoder was given


@dataclass
class Sample:
    """One text of the batch and what belongs to it."""

    text: str
    places: list[tuple[int, int, str]]  # placeholders: start, end, "image" or "video"
    images: list = field(default_factory=list)
    videos: list = field(default_factory=list)
    video_metadata: list | None = None
    spans: list[tuple[int, int]] | None = None
    media: list[Medium] = field(default_factory=list)

    def count(self, kind: str) -> int:
        return sum(place[2] == kind for place in self.places)

    @property
    def frames(self) -> int:
        return sum(medium.grid[0] for medium in self.media)


class MossVLProcessor(ProcessorMixin):
    """Image processor, video processor and tokenizer of MOSS-VL as one.

    Args:
        image_processor: MossVLImageProcessor.
        tokenizer: a fast tokenizer with the special tokens of MOSS-VL; ValueError where one is missing.
        video_processor: MossVLVideoProcessor.
        chat_template: a Jinja template; default the tokenizer's.
        return_cross_attention_mask: False leaves `cross_attention_mask` out of the output, for software that changes the tokens afterwards;
            the model tells it from the text.
        grid_name: the name of the grids in the output, "grid_thw" or "image_grid_thw" (as TRL's GRPO looks for it). The model takes either.

    The last two are also options of a call.
    """

    attributes = ["image_processor", "tokenizer", "video_processor"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"
    video_processor_class = "AutoVideoProcessor"
    _auto_class = "AutoProcessor"  # save_pretrained takes the code along

    image_placeholder, video_placeholder = "<|image|>", "<|video|>"
    image_token, video_token = "<|image_pad|>", "<|video_pad|>"
    vision_start_token, vision_end_token = "<|vision_start|>", "<|vision_end|>"
    time_start_token, time_end_token = "<|time_start|>", "<|time_end|>"

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        video_processor=None,
        chat_template=None,
        return_cross_attention_mask=True,
        grid_name="grid_thw",
    ):
        self.return_cross_attention_mask = flag("return_cross_attention_mask", return_cross_attention_mask)
        self.grid_name = _grid_name(grid_name)
        if chat_template is None:
            chat_template = getattr(tokenizer, "chat_template", None)
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template)
        self.image_token_id = self._special_id(self.image_token)
        self.video_token_id = self._special_id(self.video_token)
        self.vision_start_token_id = self._special_id(self.vision_start_token)
        self.vision_end_token_id = self._special_id(self.vision_end_token)
        self.time_start_token_id = self._special_id(self.time_start_token)
        self.time_end_token_id = self._special_id(self.time_end_token)

    def check_argument_for_proper_class(self, argument_name, argument):
        """By what a part can do: transformers' own check wants classes that it can find by name."""
        if argument_name == "tokenizer":
            fits, expected = isinstance(argument, PreTrainedTokenizerBase), "a tokenizer"
        elif argument_name == "image_processor":
            fits, expected = hasattr(argument, "see"), "a MossVLImageProcessor"
        else:
            fits, expected = hasattr(argument, "plan"), "a MossVLVideoProcessor"
        if not fits:
            raise TypeError(f"{argument_name} is a {type(argument).__name__}; expected {expected}")
        return type(argument)

    def _special_id(self, token: str) -> int:
        index = self.tokenizer.added_tokens_encoder.get(token)
        if index is None:
            raise ValueError(
                f"the tokenizer has no special token {token!r}; add it with "
                f"tokenizer.add_special_tokens({{'additional_special_tokens': [{token!r}, ...]}}), or take the checkpoint's own tokenizer"
            )
        return index

    @property
    def model_input_names(self) -> list[str]:
        mask = ["cross_attention_mask"] if self.return_cross_attention_mask else []
        return ["input_ids", "attention_mask", "pixel_values", self.grid_name, "media_nums_per_sample", *mask]

    # the call

    def __call__(
        self, text=None, images=None, videos=None, labels_spans=None, ignore_index=-100, encoder=None, **kwargs
    ) -> BatchFeature:
        """Tokens, patches and the frame mask of a batch (processing.md, section 2).

        Args:
            text: a string or a list of them. `<|image|>` stands for an image; `<|video|>` for a video, or for one segment of one.
            images, videos: in order of appearance, one flat list over the batch or one list a sample; a single one may be bare.
                What an image may be is said at `see_image`, what a video may be at `MossVLVideoProcessor`.
            labels_spans: per sample the [start, end) character spans of `text` that are learned; for a single text also bare.
            ignore_index: the label of every other token.
            encoder: a function of (levels uint8 [P, values], grid [[frames, patch rows, patch columns]], mean, std) that returns
                features [P / m^2, D], as a model's `get_image_features` gives them. It is called with some frames of a video while others
                are still decoded. The result then has `image_features` in place of `pixel_values`.
            **kwargs: the options of text, images, videos and the call (options.py), flat or inside `text_kwargs`, `images_kwargs`,
                `videos_kwargs`, `common_kwargs`. They act for this call alone. A medium may have options of its own, as a dict:
                {"image": source, "max_pixels": ...}, {"video_path": source, "fps": ...}. `video_fps` may be a list, one a video.

        Returns `input_ids` and `attention_mask` [B, T]; `pixel_values` float32 [P, 3 * t * p * p] and `grid_thw` [media, 3], all
        media in the order of the text; `media_nums_per_sample`, a list of ints; `cross_attention_mask` bool [B, 1, T, F], True =
        hidden, unless it is not wanted, or the rows are lists of unequal lengths; `labels` [B, T] where `labels_spans` was given. With
        `do_normalize=False` `pixel_values` are levels (uint8, a quarter of the bytes) beside `image_mean` and `image_std`, by which the model normalises them on its device.

        Raises ValueError or FileNotFoundError, before anything is decoded where the arguments show it.
        """
        text_knobs, image_knobs, video_knobs, call = self._sort_knobs(kwargs)
        call = {"return_cross_attention_mask": None, "grid_name": self.grid_name, **call}
        output = (
            BatchFeature if call["return_cross_attention_mask"] else ProcessedBatch
        )  # a mask that is asked for stays
        grid_name = _grid_name(call["grid_name"])
        return_tensors, raw = check_return_tensors(call.get("return_tensors")), wants_levels(call.get("do_normalize"))
        if encoder is not None and return_tensors != "pt":
            raise ValueError(
                f"an encoder gives tensors, and return_tensors is {return_tensors!r}; pass return_tensors='pt'"
            )
        samples = self._read_samples(text, labels_spans)
        self._deal_media(samples, images, videos, video_knobs.pop("video_metadata", None))
        rates = _deal_rates(samples, video_knobs)
        self._check_text_knobs(text_knobs, with_spans=labels_spans is not None)
        image = self.image_processor.resolve(image_knobs, used=any(sample.images for sample in samples))
        self.video_processor.resolve(video_knobs, used=any(sample.videos for sample in samples))
        self._look(samples, image_knobs, video_knobs, rates)
        for sample in samples:
            self._extract(sample, image_knobs, video_knobs, encoder)

        data = self._tokenise(
            samples, text_knobs, ignore_index, return_tensors is not None, call["return_cross_attention_mask"]
        )
        data |= self._pixels(samples, image, raw, encoder)
        if return_tensors is not None:
            ids = {
                name: rows
                for name, rows in data.items()
                if isinstance(rows, list) and name not in ("image_mean", "image_std")
            }
            data.update({name: torch.tensor(rows, dtype=torch.long) for name, rows in ids.items()})
        data = {grid_name if name == "grid_thw" else name: to_format(x, return_tensors) for name, x in data.items()}
        data["media_nums_per_sample"] = [max(1, len(sample.media)) for sample in samples]
        if call.get("return_metadata"):
            data["video_metadata"] = [m.metadata for sample in samples for m in sample.media if m.metadata is not None]
        return output(data)

    def _sort_knobs(self, kwargs: dict) -> tuple[dict, dict, dict, dict]:
        """Keyword arguments by who takes them: text, images, videos, the call. None stands for the default."""
        fixed = FIXED.keys() - set(CALL_KNOBS)
        takers = {
            "text_kwargs": (*TEXT_KNOBS, *FIXED_TEXT),
            "images_kwargs": (*self.image_processor.knobs, *fixed),
            "videos_kwargs": (*self.video_processor.knobs, *fixed),
            "call": CALL_KNOBS,
        }
        boxes = {name: kwargs.get(name) or {} for name in (*NESTED_KWARGS, "call")}
        for name, box in boxes.items():
            if not isinstance(box, Mapping):
                raise ValueError(f"{name} must be a dict of keyword arguments, got a {type(box).__name__}")
        flat = {name: value for name, value in kwargs.items() if name not in NESTED_KWARGS}
        known = {name for names in takers.values() for name in names}
        for name in flat:
            if name not in known and name not in REFUSED and (hint := _of_generate(name)):
                raise ValueError(f"MossVLProcessor: {hint}")
        flat = read_options(flat, {*known, *NESTED_KWARGS}, "MossVLProcessor")
        for name, value in read_options(boxes["common_kwargs"], known, "common_kwargs").items():
            _set_once(flat, name, value, "common_kwargs")

        sorted_knobs = {}
        for taker, names in takers.items():
            own = {name: value for name, value in flat.items() if name in names}
            nested = dict(boxes[taker])
            for name in [name for name in nested if name in CALL_KNOBS]:
                _set_once(flat, name, nested.pop(name), taker)
            for name, value in read_options(nested, names, taker).items():
                _set_once(own, name, value, taker)
            sorted_knobs[taker] = own
        sorted_knobs["text_kwargs"] = drop_fixed(sorted_knobs["text_kwargs"], "MossVLProcessor", FIXED_TEXT)
        return tuple(sorted_knobs.values())

    def _read_samples(self, text, labels_spans) -> list[Sample]:
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(t, str) for t in texts):
            raise ValueError(f"text must be a string or a list of strings with at least one, got {text!r:.200}")
        samples = [Sample(t, [(m.start(), m.end(), m[1]) for m in PLACEHOLDER.finditer(t)]) for t in texts]
        if labels_spans is not None:
            for sample, spans in zip(samples, _spans_per_sample(labels_spans, len(samples)), strict=True):
                sample.spans = _check_spans(spans, len(sample.text))
        return samples

    def _deal_media(self, samples: list[Sample], images, videos, video_metadata) -> None:
        """Gives each sample its media, in order of appearance. ValueError where a count does not match."""
        for sample, own in zip(
            samples, _deal("image", images, None, [s.count("image") for s in samples]), strict=True
        ):
            sample.images = [image for image, _ in own]
        for sample, own in zip(
            samples, _deal("video", videos, video_metadata, [s.count("video") for s in samples]), strict=True
        ):
            sample.videos = [video for video, _ in own]
            sample.video_metadata = None if video_metadata is None else [metadata for _, metadata in own]

    def _look(self, samples: list[Sample], image_knobs: dict, video_knobs: dict, rates: list[dict]) -> None:
        """Opens all media and checks them, before the first is decoded. `rates`: per sample, what is not the same for all videos."""
        for sample, rate in zip(samples, rates, strict=True):
            if sample.images:
                sample.images = self.image_processor.see(sample.images, **image_knobs)
            if sample.videos:
                sample.videos = self.video_processor.plan(sample.videos, sample.video_metadata, **video_knobs, **rate)

    def _extract(self, sample: Sample, image_knobs: dict, video_knobs: dict, encoder) -> None:
        """Decodes the media of one sample, on their own: what stands beside it in the batch changes nothing."""
        media = {"image": [], "video": []}
        if sample.images:
            use = self.image_processor.resolve(image_knobs)
            for patches, grid in self.image_processor.extract(sample.images, **image_knobs):
                media["image"].append(Medium(patches, grid, self.image_token, use.image_mean, use.image_std))
        if sample.videos:
            use = self.video_processor.resolve(video_knobs)
            for clip in self.video_processor.extract(sample.videos, encoder=encoder):
                text = self._video_text(clip.timestamps)
                media["video"].append(
                    Medium(clip.patches, clip.grid, text, use.image_mean, use.image_std, clip.metadata, clip.features)
                )
        sample.images, sample.videos = [], []
        queues = {kind: iter(found) for kind, found in media.items()}
        sample.media = [next(queues[kind]) for _, _, kind in sample.places]

    def _video_text(self, times: list[float]) -> str:
        frames = (f"{self.time_start_token}{t:.1f} seconds{self.time_end_token}{self.image_token}" for t in times)
        return self.vision_start_token + "".join(frames) + self.vision_end_token

    # the text

    def _check_text_knobs(self, knobs: dict, with_spans: bool) -> None:
        padding, truncation = _strategy(knobs.get("padding")), _strategy(knobs.get("truncation"))
        if padding not in (False, True, "longest", "max_length", "do_not_pad"):
            raise ValueError(f"padding must be True, False, 'longest', 'max_length' or 'do_not_pad', got {padding!r}")
        if truncation not in (False, True, "longest_first", "only_first", "do_not_truncate"):
            raise ValueError(
                f"truncation must be True, False, 'longest_first', 'only_first' or 'do_not_truncate', got {truncation!r}"
            )
        if knobs.get("padding_side", "right") not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', got {knobs['padding_side']!r}")
        for name in TEXT_KNOBS:
            if name == "add_special_tokens" or name.startswith("return_"):
                flag(name, knobs.get(name))
        for name in ("max_length", "pad_to_multiple_of"):
            if name in knobs and not (isinstance(knobs[name], (int, np.integer)) and knobs[name] > 0):
                raise ValueError(f"{name} must be a positive whole number, got {knobs[name]!r}")
        if padding in (False, "do_not_pad") and (
            idle := [name for name in ("padding_side", "pad_to_multiple_of") if name in knobs]
        ):
            raise ValueError(f"{', '.join(idle)}: no effect without padding; pass padding=True, or leave it out")
        if padding not in (False, "do_not_pad") and self.tokenizer.pad_token_id is None:
            raise ValueError("padding needs a tokenizer with a pad_token; set tokenizer.pad_token")
        if padding == "max_length" and "max_length" not in knobs and self.tokenizer.model_max_length > 1e20:
            raise ValueError("padding='max_length' needs max_length; the tokenizer has no longest length of its own")
        if (with_spans or knobs.get("return_offsets_mapping")) and not self.tokenizer.is_fast:
            raise ValueError(f"character offsets need a fast tokenizer, got {type(self.tokenizer).__name__}")

    def _tokenise(
        self, samples: list[Sample], knobs: dict, ignore_index: int, rectangular: bool, masked: bool | None
    ) -> dict:
        """Per-token rows of the batch, cut and padded, as lists; and the frame mask.

        `masked`: whether the call wants the mask; None leaves that to the processor's setting.

        Neither is left to the tokenizer: it would keep both as settings, which another thread's call would then obey.
        """
        with_spans = samples[0].spans is not None
        expanded = [_expand(sample) for sample in samples]
        encoded = self.tokenizer(
            [text for text, _ in expanded],
            add_special_tokens=knobs.get("add_special_tokens", True),
            padding=False,
            truncation=False,
            return_attention_mask=True,
            return_token_type_ids=bool(knobs.get("return_token_type_ids")),
            return_offsets_mapping=with_spans or bool(knobs.get("return_offsets_mapping")),
            verbose=False,
        )
        rows = {name: list(values) for name, values in encoded.items()}
        if knobs.get("return_mm_token_type_ids"):
            rows["mm_token_type_ids"] = [
                self._mm_types(sample, ids) for sample, ids in zip(samples, rows["input_ids"], strict=True)
            ]
        if with_spans:
            rows["labels"] = [
                self._labels(ids, offsets, [(move(start), move(end)) for start, end in sample.spans], ignore_index)
                for sample, (_, move), ids, offsets in zip(
                    samples, expanded, rows["input_ids"], rows["offset_mapping"], strict=True
                )
            ]
            if not knobs.get("return_offsets_mapping"):
                del rows["offset_mapping"]
        rows = self._cut(rows, knobs)
        for index, (sample, ids) in enumerate(zip(samples, rows["input_ids"], strict=True)):
            found = ids.count(self.image_token_id)
            if found != sample.frames:
                raise ValueError(
                    f"text {index} keeps {found} of the {sample.frames} {self.image_token} tokens of its frames after truncation to "
                    f"{len(ids)} tokens; raise max_length, or give fewer frames"
                )
        pad_values = {**PAD_VALUES, "input_ids": self.tokenizer.pad_token_id, "labels": ignore_index}
        rows = self._pad(rows, knobs, pad_values)
        lengths = {len(ids) for ids in rows["input_ids"]}
        if len(lengths) > 1 and (rectangular or masked):
            what = "tensor" if rectangular else "cross_attention_mask"
            raise ValueError(
                f"texts of {min(lengths)} to {max(lengths)} tokens do not make one {what}; pass padding=True"
            )
        if len(lengths) == 1 and (
            self.return_cross_attention_mask if masked is None else flag("return_cross_attention_mask", masked)
        ):
            frames = max(1, *(sample.frames for sample in samples))
            rows = {**rows, "cross_attention_mask": self._frame_mask(rows, frames)}
        if knobs.get("return_attention_mask") is False:
            rows.pop("attention_mask")
        return rows

    def _mm_types(self, sample: Sample, ids: list[int]) -> list[int]:
        """Per token 0, or what its frame belongs to: 1 an image, 2 a video."""
        kinds = iter(
            [
                MM_TYPES[kind]
                for (_, _, kind), medium in zip(sample.places, sample.media, strict=True)
                for _ in range(medium.grid[0])
            ]
        )
        return [next(kinds, 0) if token == self.image_token_id else 0 for token in ids]

    def _labels(self, ids: list[int], offsets: list, spans: list[tuple[int, int]], ignore_index: int) -> list[int]:
        """The tokens that overlap a span, without `image_pad` and all from `vision_start` to `vision_end`; else `ignore_index`."""
        tokens, ends = (
            np.array(ids, dtype=np.int64),
            np.array(offsets, dtype=np.int64).reshape(-1, 2),
        )  # [T], [T, (start, end)]
        learned = np.zeros(len(tokens), dtype=bool)
        for start, end in spans:
            learned |= (ends[:, 0] < end) & (ends[:, 1] > start)
        learned &= tokens != self.image_token_id
        closers = np.flatnonzero(tokens == self.vision_end_token_id)
        for opener in np.flatnonzero(tokens == self.vision_start_token_id):
            closer = np.searchsorted(closers, opener)
            learned[opener : closers[closer] + 1 if closer < len(closers) else opener + 1] = False
        return np.where(learned, tokens, ignore_index).tolist()

    def _cut(self, rows: dict, knobs: dict) -> dict:
        """Truncation as transformers reads its arguments: `max_length` with nothing else cuts, too."""
        truncation, padding, longest = (_strategy(knobs.get(name)) for name in ("truncation", "padding", "max_length"))
        if "truncation" not in knobs:
            truncation = bool(longest) and padding in (False, "do_not_pad")
        if truncation in (False, "do_not_truncate"):
            return rows
        longest = longest or self.tokenizer.model_max_length
        keep = slice(-longest, None) if self.tokenizer.truncation_side == "left" else slice(longest)
        return {name: [row[keep] if len(row) > longest else row for row in values] for name, values in rows.items()}

    def _pad(self, rows: dict, knobs: dict, pad_values: dict) -> dict:
        padding = _strategy(knobs.get("padding"))
        if padding in (False, "do_not_pad"):
            return rows
        length = max(len(ids) for ids in rows["input_ids"])
        if padding == "max_length":
            length = max(length, knobs.get("max_length") or self.tokenizer.model_max_length)
        multiple = knobs.get("pad_to_multiple_of", 1)
        length = -(-length // multiple) * multiple
        left = knobs.get("padding_side", self.tokenizer.padding_side) == "left"

        def fill(row, value):
            rest = [value] * (length - len(row))
            return rest + row if left else row + rest

        return {name: [fill(row, pad_values[name]) for row in values] for name, values in rows.items()}

    def _frame_mask(self, rows: dict, frames: int) -> torch.Tensor:
        """bool [B, 1, T, F], True = hidden: a row sees as many frames as `image_pad` tokens stand at or before it, padding none."""
        length = max(len(ids) for ids in rows["input_ids"])
        seen = torch.zeros(len(rows["input_ids"]), length, dtype=torch.long)
        for row, ids, attention in zip(seen, rows["input_ids"], rows["attention_mask"], strict=True):
            tokens = torch.tensor(ids, dtype=torch.long)
            row[: len(ids)] = (tokens == self.image_token_id).cumsum(0) * torch.tensor(attention, dtype=torch.long)
        return (torch.arange(frames) >= seen[:, :, None])[:, None]

    # the pixels

    def _pixels(self, samples: list[Sample], image, raw: bool, encoder) -> dict:
        """`pixel_values`, or with an encoder `image_features`, and `grid_thw` of all media; a sample without any gets a blank one of
        zeros, which no row sees.

        `image`: the knobs of the call, for the patch sizes of the blank; `raw`: as for `join_patches`. Empties the media on the way.
        """
        side = max(1, round(BLANK_PIXELS / (image.patch_size * image.merge_size))) * image.merge_size
        widths = {
            medium.patches.shape[1] for sample in samples for medium in sample.media if medium.patches is not None
        }
        if len(widths) > 1:
            raise ValueError(
                f"images and videos have patches of {sorted(widths)} values; give both the same patch sizes"
            )
        width = widths.pop() if widths else 3 * image.temporal_patch_size * image.patch_size**2
        blank = torch.zeros(side * side, width, dtype=torch.uint8)
        parts, grids, features = [], [], []
        for sample in samples:
            for medium in sample.media or [Medium(blank, [1, side, side], "", (0.0,) * 3, (1.0,) * 3)]:
                grids.append(medium.grid)
                if encoder is None:
                    parts.append((medium.patches, medium.image_mean, medium.image_std))
                elif medium.features is None:
                    encoded = encoder(medium.patches, [medium.grid], medium.image_mean, medium.image_std)
                    features.append(
                        encoded if sample.media else torch.zeros_like(encoded)
                    )  # the model knows a blank medium by its zeros
                else:
                    features.append(medium.features)
                medium.patches = medium.features = None
        grids = torch.tensor(grids)
        if encoder is not None:
            return {"image_features": torch.cat(features) if len(features) > 1 else features[0], "grid_thw": grids}
        return {**join_patches(parts, raw), "grid_thw": grids}

    # timestamps

    def _calculate_timestamps(
        self,
        frames_indices,
        total_num_frames=None,
        video_fps=None,
        duration=None,
        merge_size=1,
        actual_timestamps=None,
    ) -> list[float]:
        """Seconds of the frames of a clip.

        `actual_timestamps` where they are given, else index / `video_fps`, else index * `duration` / `total_num_frames` (frames
        of the whole video); none after `duration`. `merge_size` frames in a row make one: the mean of the first and the last.
        """
        if actual_timestamps is not None:
            times = [float(t) for t in actual_timestamps]
        elif frames_indices is None:
            raise ValueError("give frames_indices or actual_timestamps; both are None")
        else:
            if not video_fps and duration and total_num_frames:
                video_fps = total_num_frames / duration
            if not video_fps or not video_fps > 0:
                raise ValueError(
                    f"video_fps must be above 0, or duration and total_num_frames be given; got video_fps={video_fps!r}"
                )
            times = [float(i) / video_fps for i in frames_indices]
        if duration:
            times = [min(t, float(duration)) for t in times]
        return _merge_times(times, merge_size)

    # conversations

    def apply_chat_template(
        self,
        conversation,
        chat_template=None,
        tools=None,
        documents=None,
        add_generation_prompt=False,
        continue_final_message=False,
        tokenize=False,
        return_dict=False,
        return_tensors=None,
        return_assistant_tokens_mask=False,
        processor_kwargs=None,
        **kwargs,
    ):
        """A conversation, or a list of them, as text; with `tokenize` through the processor, media of the parts included.

        `content` of a message is a string or a list of parts: strings, {"type": "text", "text"}, {"type": "image", "image"},
        {"type": "video", "video"}, with the medium also under "url", "path", "base64", "image_url", "video_url", and with options for
        this medium alone ("fps", "max_pixels", ...; see conversation.py and options.py). A part without a medium leaves the placeholder,
        for `images=` or `videos=`.

        Returns the text (a list for a list); with `tokenize` the `input_ids`, with `return_dict` all that the processor gives, and
        `assistant_masks` for `return_assistant_tokens_mask`. `processor_kwargs` and keywords that the processor knows go to it, those
        that the template reads to the template; any other is a ValueError. With `add_generation_prompt` or `continue_final_message`
        padding goes to the left, where `generate` needs it, unless `padding_side` says otherwise. Nothing of the conversation is changed.
        """
        template = self._find_template(chat_template)
        batched = (
            isinstance(conversation, (list, tuple))
            and bool(conversation)
            and isinstance(conversation[0], (list, tuple))
        )
        conversations = [read_messages(messages) for messages in (conversation if batched else [conversation])]
        images, videos = ([collect_media(messages, kind) for messages in conversations] for kind in ("image", "video"))

        kwargs = drop_fixed(kwargs, "apply_chat_template", FIXED_TEMPLATE)
        known = {*self._knob_names(), "images", "videos", "labels_spans", "ignore_index", "encoder"}
        call = {name: value for name, value in kwargs.items() if name in known or (name in REFUSED and value is None)}
        for name, value in dict(processor_kwargs or {}).items():
            _set_once(call, name, value, "processor_kwargs")
        variables = {name: value for name, value in kwargs.items() if name not in call}
        _check_variables(template, variables, known, {"tools": tools, "documents": documents})
        if return_assistant_tokens_mask and not _GENERATION.search(template):
            raise ValueError(
                "return_assistant_tokens_mask needs a chat template that marks what the assistant says with {% generation %} and "
                "{% endgeneration %}; this one does not. Add the marks to chat_template.jinja, or pass chat_template="
            )
        on_tokens = {"return_dict": return_dict, "return_tensors": return_tensors, **call}
        on_tokens["return_assistant_tokens_mask"] = return_assistant_tokens_mask
        on_tokens = [name for name, value in on_tokens.items() if value is not None and value is not False]
        if on_tokens and not tokenize:
            raise ValueError(f"{', '.join(on_tokens)}: these act on tokens; pass tokenize=True")

        texts, answers = render_jinja_template(
            conversations=[for_template(messages) for messages in conversations],
            tools=tools,
            documents=documents,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            **{**self.tokenizer.special_tokens_map, **variables},
        )
        if not tokenize:
            return texts if batched else texts[0]
        for name, found in (("images", images), ("videos", videos)):
            if any(found):
                _set_once(call, name, found, f"{name} in the parts of the conversation")
        if return_assistant_tokens_mask:
            _set_once(call, "labels_spans", [list(spans) for spans in answers], "return_assistant_tokens_mask")
            call["ignore_index"] = -1
        boxes = [call, *(call.get(name) or {} for name in ("text_kwargs", "common_kwargs"))]
        said = {
            name: next((box[name] for box in boxes if box.get(name) is not None), None)
            for name in ("padding", "padding_side")
        }
        padded = _strategy(said["padding"]) not in (False, "do_not_pad")
        if padded and (add_generation_prompt or continue_final_message) and said["padding_side"] is None:
            call["padding_side"] = "left"
        out = self(text=list(texts), return_tensors=return_tensors, **call)
        if return_assistant_tokens_mask:
            labels = out.data.pop("labels")
            out["assistant_masks"] = (
                [[int(x >= 0) for x in row] for row in labels] if isinstance(labels, list) else (labels >= 0) * 1
            )
        return out if return_dict else out["input_ids"]

    def _find_template(self, name: str | None) -> str:
        templates = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        template = templates.get(name or "default", name)
        if template is None:
            raise ValueError(
                "this processor has no chat template; pass chat_template=, or add chat_template.jinja to the checkpoint"
            )
        return template

    def _knob_names(self) -> set[str]:
        own = (*TEXT_KNOBS, *FIXED_TEXT, *CALL_KNOBS, *NESTED_KWARGS, *FIXED)
        return {*own, *self.image_processor.knobs, *self.video_processor.knobs}

    # loading and saving

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        """The three parts of a checkpoint folder, without the Auto classes (AutoVideoProcessor wants torchvision).

        Keywords that are settings of the image or video processor become those, arguments of the tokenizer go to it; any other is a
        ValueError.
        Where a pipeline loads the folder, the tokenizer pads on the left and the frame mask is left out: pipelines pad and join what was
        processed one by one, and generate from it. They pass what is meant for the model, too.
        """
        path = pretrained_model_name_or_path
        hub = {name: value for name, value in kwargs.items() if name in HUB_KEYS}
        image_knobs = {name: value for name, value in kwargs.items() if name in (*MossVLImageProcessor.knobs, *FIXED)}
        video_knobs = {name: value for name, value in kwargs.items() if name in (*MossVLVideoProcessor.knobs, *FIXED)}
        others = {
            k: v
            for k, v in kwargs.items()
            if k not in {*hub, *image_knobs, *video_knobs, *NOT_FOR_TOKENIZER, *OWN_SETTINGS}
        }
        in_pipeline = hub.get("_from_pipeline") is not None
        if in_pipeline:
            others.setdefault("padding_side", "left")

        settings, _ = MossVLImageProcessor.get_image_processor_dict(path, **hub)
        named = settings.get("auto_map", {}).get("AutoImageProcessor", "").split(".")[-1]
        image_class = IMAGE_CLASSES.get(named) or IMAGE_CLASSES.get(
            settings.get("image_processor_type"), MossVLImageProcessorFast
        )
        video_settings, _ = MossVLVideoProcessor.get_video_processor_dict(path, **hub)
        parts = [
            image_class.from_dict(settings, **image_knobs),
            _load_tokenizer(path, hub, others, strict=not in_pipeline),
            MossVLVideoProcessor.from_dict(video_settings, **video_knobs),
        ]
        return [*parts, None, False] if in_pipeline else parts  # no template beside the folder's, no frame mask

    def to_dict(self, *args, **kwargs):
        """Without the settings that are at their default: folders look as released ones do."""
        out = super().to_dict(*args, **kwargs)
        return {name: value for name, value in out.items() if name not in OWN_SETTINGS or value != OWN_SETTINGS[name]}

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Writes a folder that transformers 4.57 and 5 load, code included: settings, tokenizer, chat template, .py files."""
        hub = {
            name: kwargs.pop(name) for name in list(kwargs) if name not in ("save_jinja_files", "legacy_serialization")
        }
        files = super().save_pretrained(save_directory, **kwargs)
        for part in (self.image_processor, self.video_processor):
            files = [*files, *part.save_pretrained(save_directory)]
        _make_tokenizer_portable(os.path.join(save_directory, "tokenizer_config.json"))
        if push_to_hub:
            self.push_to_hub(hub.pop("repo_id", os.path.basename(os.path.normpath(save_directory))), **hub)
        elif hub:
            raise ValueError(f"save_pretrained: {', '.join(hub)} act only with push_to_hub=True")
        return files


# dealing media to samples


def _is_one(kind: str, x) -> bool:
    """Whether `x` is one image or video rather than a list of them."""
    if kind == "image":
        return x is not None and not isinstance(x, (list, tuple)) and not (_is_array(x) and x.ndim == 4)
    return x is not None and (
        is_pair(x) or is_frames(x) if isinstance(x, (list, tuple)) else not (_is_array(x) and x.ndim == 5)
    )


def _listed(media) -> list:
    return split_array(media) if _is_array(media) else list(media)


def _is_array(x) -> bool:
    return isinstance(x, (np.ndarray, torch.Tensor))


def _deal(kind: str, media, metadata, wanted: list[int]) -> list[list[tuple]]:
    """Per sample its (medium, metadata), as many as its text has placeholders.

    `media`: None, one medium, a flat list over the batch, or lists by sample (None for none). `metadata`: None, or for each medium a
    dict or None. ValueError with both numbers where counts differ.
    """
    media = [] if media is None else [media] if _is_one(kind, media) else _listed(media)
    by_sample = any(not _is_one(kind, x) for x in media)
    groups = [[x] if _is_one(kind, x) else [] if x is None else _listed(x) for x in media] if by_sample else [media]
    if by_sample and len(groups) != len(wanted):
        raise ValueError(
            f"{kind}s come in {len(groups)} lists, but there are {len(wanted)} texts; give one list a text, or one flat list"
        )

    flat = [x for group in groups for x in group]
    for x in flat:
        if not _is_one(kind, x):
            raise ValueError(f"{kind}s are nested too deep: {shorten(x)}; give one list a text, or one flat list")
    if metadata is None:
        metadata = [None] * len(flat)
    elif isinstance(metadata, (list, tuple)):
        metadata = [m for x in metadata for m in (x if isinstance(x, (list, tuple)) else [x])]
    else:
        metadata = [metadata]
    if len(metadata) != len(flat):
        raise ValueError(
            f"{len(flat)} videos are given, but {len(metadata)} video_metadata; expected one for each, None where there is none"
        )

    paired = iter(zip(flat, metadata, strict=True))
    groups = [[next(paired) for _ in group] for group in groups]
    for index, (group, want) in enumerate(zip(groups, wanted if by_sample else [sum(wanted)], strict=True)):
        have = sum(count_placeholders(kind, x) for x, _ in group)
        if have != want:
            where = (
                f"text {index} has"
                if by_sample
                else "the text has"
                if len(wanted) == 1
                else f"the {len(wanted)} texts have"
            )
            of = " or segments of them" if kind == "video" else ""
            raise ValueError(f"{where} {want} <|{kind}|> placeholders, but {have} {kind}s{of} are given")
    return groups if by_sample else [_take(kind, groups[0], want) for want in wanted]


def _deal_rates(samples: list[Sample], video_knobs: dict) -> list[dict]:
    """Per sample {"video_fps": its videos' rates}, where the call has a list with one for each video of the batch, which is taken out of
    `video_knobs`; else empty."""
    rates = video_knobs.get("video_fps")
    if not isinstance(rates, (list, tuple, np.ndarray, torch.Tensor)):
        return [{}] * len(samples)
    del video_knobs["video_fps"]
    rates, total = (
        [float(rate) if rate is not None else None for rate in rates],
        sum(len(sample.videos) for sample in samples),
    )
    if len(rates) != total:
        raise ValueError(f"video_fps has {len(rates)} entries for {total} videos; give one number, or one a video")
    queue = iter(rates)
    return [{"video_fps": [next(queue) for _ in sample.videos]} for sample in samples]


def _take(kind: str, queue: list[tuple], want: int) -> list[tuple]:
    """Takes media for `want` placeholders off the queue; the segments of one video may go to two samples."""
    taken = []
    while want:
        (medium, metadata), have = queue[0], count_placeholders(kind, queue[0][0])
        if have <= want:
            taken.append(queue.pop(0))
        else:
            taken.append(({**medium, "segments": medium["segments"][:want]}, metadata))
            queue[0] = ({**medium, "segments": medium["segments"][want:]}, metadata)
        want -= min(have, want)
    return taken


# text, spans and times


def _expand(sample: Sample):
    """The text with its placeholders replaced, and a function that moves an offset of the original text along."""
    pieces, done, gained = [], 0, [0]  # gained: characters, after that many placeholders
    for (start, end, _), medium in zip(sample.places, sample.media, strict=True):
        pieces += [sample.text[done:start], medium.text]
        gained.append(gained[-1] + len(medium.text) - (end - start))
        done = end
    pieces.append(sample.text[done:])
    ends = [end for _, end, _ in sample.places]

    def move(offset: int) -> int:
        passed = bisect_right(ends, offset)
        if passed < len(ends):
            offset = min(offset, sample.places[passed][0])  # inside a placeholder, of which nothing is learned
        return offset + gained[passed]

    return "".join(pieces), move


def _spans_per_sample(labels_spans, samples: int) -> list:
    """One list of spans a sample; a single sample's may come bare."""
    spans = list(labels_spans)
    if samples == 1 and (not spans or _is_pair(spans[0])):
        return [spans]
    if len(spans) != samples:
        raise ValueError(
            f"labels_spans has {len(spans)} entries, but there are {samples} texts; expected a list of [start, end] for each"
        )
    return spans


def _is_pair(x) -> bool:
    return (
        isinstance(x, (list, tuple, np.ndarray)) and len(x) == 2 and all(isinstance(i, (int, np.integer)) for i in x)
    )


def _check_spans(spans, length: int) -> list[tuple[int, int]]:
    spans = list(spans if spans is not None else ())
    for span in spans:
        if not _is_pair(span) or not 0 <= span[0] <= span[1] <= length:
            raise ValueError(f"labels_spans: {span!r} is not a [start, end] of characters inside a text of {length}")
    return [(int(start), int(end)) for start, end in spans]


def _merge_times(times: list[float], size: int) -> list[float]:
    """The mean of the first and the last of every `size` times; the last time is repeated to fill the last group."""
    times = [*times, *times[-1:] * (-len(times) % size)]
    return [(times[i] + times[i + size - 1]) / 2 for i in range(0, len(times), size)] if size > 1 else times


def _strategy(value):
    """An enum's value, None as False."""
    value = getattr(value, "value", value)
    return False if value is None else value


def _set_once(names: dict, name: str, value, where: str) -> None:
    if value is not None and names.get(name) is not None:
        raise ValueError(f"{name} is given twice, the second time as {where}")
    names[name] = names.get(name) if value is None else value


# templates


_GENERATION = re.compile(
    r"\{%-?\s*(?:end)?generation\s*-?%\}"
)  # transformers' own tag, which plain Jinja does not know


def _check_variables(template: str, variables: dict, known, own: dict) -> None:
    """ValueError for a keyword that neither the processor nor the template reads; it names the nearest. `own`: arguments of
    `apply_chat_template` that only the template may use."""
    given = [*variables, *(name for name, value in own.items() if value)]
    if not given:
        return
    try:
        from jinja2 import Environment, meta
    except ImportError as error:
        raise ImportError("a chat template needs jinja2: pip install jinja2") from error
    plain = _GENERATION.sub("", template)
    read = meta.find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain))
    for name in given:
        if name in read:
            continue
        if name in own:
            raise ValueError(
                f"apply_chat_template: {name} is given, but the chat template does not read it; leave it out, or pass chat_template="
            )
        if name in REFUSED:
            raise ValueError(f"apply_chat_template: {name} is no option of MOSS-VL: {REFUSED[name]}")
        if hint := _of_generate(name):
            raise ValueError(f"apply_chat_template: {hint}")
        near = nearest_name(name, {*known, *TEMPLATE_ARGUMENTS, *read} - FIXED.keys())
        hint = f"did you mean {near!r}?" if near else "neither the processor nor the chat template reads it"
        raise ValueError(f"apply_chat_template: unknown keyword {name!r}; {hint}")


def _of_generate(name: str) -> str | None:
    """What is wrong with a keyword that `generate` takes."""
    if name not in vars(GenerationConfig()):
        return None
    return f"{name} is an argument of generate, not of the processor; a pipeline takes it as generate_kwargs={{{name!r}: ...}}"


def _grid_name(name) -> str:
    if name not in GRID_NAMES:
        raise ValueError(f"grid_name must be one of {', '.join(GRID_NAMES)}, got {shorten(name)}")
    return name


# tokenizers


def _load_tokenizer(path, hub: dict, kwargs: dict, strict: bool = True):
    """The fast tokenizer that the folder names, whichever transformers saved it. Keywords that it does not take are an error if `strict`,
    else left out."""
    config = get_tokenizer_config(path, **{name: value for name, value in hub.items() if not name.startswith("_")})
    name = (config.get("tokenizer_class") or "Qwen2Tokenizer").removesuffix("Fast")
    tokenizer_class = getattr(transformers, name + "Fast", None) or getattr(
        transformers, name, transformers.Qwen2TokenizerFast
    )
    known = {*TOKENIZER_KEYS, *inspect.signature(tokenizer_class.__init__).parameters} - {"self", "args", "kwargs"}
    for name in [name for name in kwargs if name not in known] if strict else ():
        _refuse_keyword(name, known)
    kwargs = {name: value for name, value in kwargs.items() if name in known}
    extra = config.get("extra_special_tokens")
    if isinstance(extra, list) and not hasattr(
        transformers, "TokenizersBackend"
    ):  # 5.x writes a list, 4.57 wants a dict
        kwargs = {"extra_special_tokens": {}, "additional_special_tokens": extra, **kwargs}
    return tokenizer_class.from_pretrained(path, **hub, **kwargs)


def _refuse_keyword(name: str, tokenizer_keys: set) -> None:
    """Raises ValueError for a keyword of `from_pretrained` that nobody takes."""
    if canonical(name) in {*TEXT_KNOBS, *CALL_KNOBS}:
        raise ValueError(f"from_pretrained: {name} is an option of a call, not a setting; pass it to the call")
    if name in REFUSED:
        raise ValueError(f"from_pretrained: {name} is no option of MOSS-VL: {REFUSED[name]}")
    settings = {*MossVLImageProcessor.settings, *MossVLVideoProcessor.settings, *OWN_SETTINGS, "chat_template"}
    near = nearest_name(name, {*settings, *tokenizer_keys, *HUB_KEYS})
    hint = (
        f"did you mean {near!r}?" if near else f"known: {', '.join(sorted(settings))}, and arguments of the tokenizer"
    )
    raise ValueError(f"from_pretrained: unknown keyword {name!r}; {hint}")


def _make_tokenizer_portable(config_file: str) -> None:
    """Rewrites what only transformers 5 reads in a tokenizer's config."""
    with open(config_file, encoding="utf-8") as file:
        config = json.load(file)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "Qwen2Tokenizer"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    with open(config_file, "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2, ensure_ascii=False)
        file.write("\n")


__all__ = ["MossVLImageProcessor", "MossVLImageProcessorFast", "MossVLProcessor", "MossVLVideoProcessor"]
