"""Processor: text, images and videos to the inputs of the model. docs/processing.md describes the steps and all
tensors.

Axes: B samples, T tokens, N frames of the sample that has most, P patches, m merge size, D hidden size of the model.
"""

import os
from dataclasses import dataclass

import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .animations import AnimatedImage  # noqa: F401
from .checks import flag, tensor_format
from .clip_decoding import Encoder
from .coded_pictures import PictureReader  # noqa: F401
from .colours import tone_map_of  # noqa: F401
from .conversation import collect_media, for_template, read_messages
from .decord_video import open_decord  # noqa: F401
from .downloads import download  # noqa: F401
from .image_files import open_image  # noqa: F401
from .image_processing_moss_vl import (
    ImageOptions,
    MossVLImageProcessor,
    MossVLImageProcessorFast,
    to_format,
    wants_uint8,
)
from .image_reading import ProbedImage  # noqa: F401
from .options import FIXED, FIXED_TEMPLATE, FIXED_TEXT, REFUSED, drop_fixed
from .patches import join_patches
from .processor_keywords import (
    CALL_OPTIONS,
    NESTED_KWARGS,
    SortedOptions,
    check_template_variables,
    merge_once,
    read_device,
    read_grid_name,
    require_generation_tags,
    sort_options,
)
from .processor_loading import PROCESSOR_SETTINGS, is_in_pipeline, load_parts, make_tokenizer_portable
from .processor_settings import HUB_KEYS  # noqa: F401
from .resizing import fit_size  # noqa: F401
from .samples import Medium, Sample, assign_media, assign_rates, read_samples
from .signatures import image_kind  # noqa: F401
from .text_rows import (
    NO_PADDING,
    TEXT_OPTIONS,
    TextOptions,
    VisionTokens,
    frame_mask,
    read_text_options,
    strategy,
    token_rows,
)
from .threads import in_threads  # noqa: F401
from .video_files import Video  # noqa: F401
from .video_packets import FrameIndex  # noqa: F401
from .video_processing_moss_vl import MossVLVideoProcessor, are_planned
from .video_reading import open_video  # noqa: F401
from .video_sampling import ClipPlan  # noqa: F401


BLANK_SIDE = 128  # pixels of a side of the blank medium


class ProcessedBatch(BatchFeature):
    """The output of a call.

    Pipelines of transformers process samples one by one and join the outputs. Frame masks of different lengths cannot
    be joined: the mask is dropped once a pipeline adds its input as "text", and the model derives it from the tokens.
    """

    def __setitem__(self, name, value):
        if name == "text":
            self.data.pop("cross_attention_mask", None)
        super().__setitem__(name, value)


@dataclass(frozen=True)
class CallOptions:
    """The options of the call itself, checked and complete."""

    return_tensors: str | None  # "pt", "np" or None
    as_uint8: bool  # pixels stay uint8
    grid_name: str
    mask_wanted: bool  # whether `cross_attention_mask` is returned
    mask_requested: bool  # whether this call asked for it: then it must be possible, and stays in a pipeline
    return_metadata: bool
    blank_medium: bool
    device: torch.device | None


def _of_tokenizer(name: str) -> property:
    """An attribute of the processor that reads and writes one of its tokenizer."""

    def get(processor):
        return getattr(processor.tokenizer, name)

    def put(processor, value):
        if value != get(processor):
            setattr(processor.tokenizer, name, value)

    return property(get, put)


class MossVLProcessor(ProcessorMixin):
    """Image processor, video processor and tokenizer of MOSS-VL in one.

    Args:
        image_processor: MossVLImageProcessor.
        tokenizer: a fast tokenizer with the special tokens of MOSS-VL; ValueError if one is missing.
        video_processor: MossVLVideoProcessor.
        chat_template: a Jinja template; default the tokenizer's.
        return_cross_attention_mask: False leaves `cross_attention_mask` out of the output, for software that changes
            the tokens afterwards; the model then derives the mask from the tokens.
        grid_name: the name of the grids in the output, "grid_thw" or "image_grid_thw" (which TRL's GRPO expects). The
            model takes both.
        blank_medium: False gives a text without media no blank medium, for software that expects an `image_pad` for
            every frame, such as SGLang. The output of a batch without media is then that of its texts alone.

    The last three are also options of a call.
    """

    attributes = ["image_processor", "tokenizer", "video_processor"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"
    video_processor_class = "AutoVideoProcessor"
    _auto_class = "AutoProcessor"  # save_pretrained copies the code

    image_placeholder, video_placeholder = "<|image|>", "<|video|>"
    image_token, video_token = "<|image_pad|>", "<|video_pad|>"
    vision_start_token, vision_end_token = "<|vision_start|>", "<|vision_end|>"
    time_start_token, time_end_token = "<|time_start|>", "<|time_end|>"

    # Training software reads and writes these on whatever it trains with.
    padding_side = _of_tokenizer("padding_side")
    pad_token, pad_token_id = _of_tokenizer("pad_token"), _of_tokenizer("pad_token_id")
    eos_token, eos_token_id = _of_tokenizer("eos_token"), _of_tokenizer("eos_token_id")
    bos_token, bos_token_id = _of_tokenizer("bos_token"), _of_tokenizer("bos_token_id")

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        video_processor=None,
        chat_template=None,
        return_cross_attention_mask=True,
        grid_name="grid_thw",
        blank_medium=True,
    ):
        self.return_cross_attention_mask = flag("return_cross_attention_mask", return_cross_attention_mask)
        self.grid_name = read_grid_name(grid_name)
        self.blank_medium = flag("blank_medium", blank_medium)
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
        """Checks parts by their methods. transformers would look for their classes by name, and not find these."""
        if argument_name == "tokenizer":
            fits, expected = isinstance(argument, PreTrainedTokenizerBase), "a tokenizer"
        elif argument_name == "image_processor":
            fits, expected = hasattr(argument, "probe"), "a MossVLImageProcessor"
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
                f"tokenizer.add_special_tokens({{'additional_special_tokens': [{token!r}, ...]}}), or take the "
                "checkpoint's tokenizer"
            )
        return index

    @property
    def model_input_names(self) -> list[str]:
        mask = ["cross_attention_mask"] if self.return_cross_attention_mask else []
        return ["input_ids", "attention_mask", "pixel_values", self.grid_name, "media_nums_per_sample", *mask]

    # the call

    def __call__(
        self,
        text=None,
        images=None,
        videos=None,
        labels_spans=None,
        ignore_index=-100,
        encoder: Encoder | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Tokens, patches and the frame mask of a batch.

        Args:
            text: a string or a list of them. `<|image|>` stands for an image; `<|video|>` for a video, or for one
                segment of one.
            images, videos: in the order of their placeholders, one flat list over the batch or one list per sample; a
                single medium needs no list. `probe_image` says what an image may be, `MossVLVideoProcessor.plan` what
                a video may be.
            labels_spans: per sample the [start, end) character spans of `text` that are learned; for a single text the
                spans alone.
            ignore_index: the label of tokens that are not learned.
            encoder: a function of (uint8 pixels [P, values], grid [[frames, patch rows, patch columns]], mean, std)
                that returns features [P / m^2, D], as a model's `get_image_features`. It is called with some frames of
                a video while others are decoded. The result then has `image_features` instead of `pixel_values`.
            **kwargs: the options of text, images, videos and the call (options.py), flat or inside `text_kwargs`,
                `images_kwargs`, `videos_kwargs`, `common_kwargs`. They hold for this call alone. A medium may have its
                own options, as a dict: {"image": source, "max_pixels": ...}, {"video_path": source, "fps": ...}.
                `video_fps` may be a list with one entry per video.

        Returns:
            input_ids, attention_mask: [B, T].
            pixel_values: float32 [P, values], all media in the order of the text. With `do_normalize=False` uint8, a
                quarter of the bytes; the model normalises them by `image_mean` and `image_std`.
            grid_thw: [media, 3].
            media_nums_per_sample: a list of ints.
                Of a batch without media, these three and the mask are left out with `blank_medium=False`.
            cross_attention_mask: bool [B, 1, T, N], True = hidden; absent if it is switched off, or if the rows are
                lists of unequal lengths.
            labels: [B, T], with `labels_spans`.

        Raises:
            ValueError, FileNotFoundError: if possible before anything is decoded.
        """
        options = sort_options(kwargs, self.image_processor.option_names, self.video_processor.option_names)
        call = self._read_call_options(options.call, encoder)
        samples = read_samples(text, labels_spans)
        assign_media(samples, images, videos, options.videos.pop("video_metadata", None))
        assign_rates(samples, options.videos)
        text_options = read_text_options(options.text, self.tokenizer, with_spans=labels_spans is not None)
        image_options = self.image_processor.resolve(options.images, used=any(sample.images for sample in samples))
        self.video_processor.resolve(options.videos, used=any(sample.videos for sample in samples))

        self._probe_media(samples, options)
        for sample in samples:
            self._decode_media(sample, options, encoder)
        data = self._text_tensors(samples, text_options, call, ignore_index)
        numbers = [max(int(call.blank_medium), len(sample.media)) for sample in samples]
        if any(numbers):
            data |= self._vision_tensors(samples, image_options, call, encoder)
        data = {name: to_format(value, call.return_tensors) for name, value in data.items()}
        if any(numbers):
            data["media_nums_per_sample"] = numbers
        if call.return_metadata:
            data["video_metadata"] = [m.metadata for sample in samples for m in sample.media if m.metadata is not None]
        return (BatchFeature if call.mask_requested else ProcessedBatch)(data)

    def _read_call_options(self, options: dict, encoder: Encoder | None) -> CallOptions:
        return_tensors = tensor_format(options.get("return_tensors"))
        if encoder is not None and return_tensors != "pt":
            raise ValueError(
                f"an encoder gives tensors, and return_tensors is {return_tensors!r}; pass return_tensors='pt'"
            )
        device = read_device(options.get("device"))
        if device is not None and (return_tensors != "pt" or encoder is not None):
            why = "the encoder decides" if encoder is not None else f"return_tensors is {return_tensors!r}"
            raise ValueError(f"device={str(device)!r} is for pixels as tensors, but {why}; leave it out")
        mask = options.get("return_cross_attention_mask")
        requested = flag("return_cross_attention_mask", mask)
        return CallOptions(
            return_tensors=return_tensors,
            as_uint8=wants_uint8(options.get("do_normalize")),
            grid_name=read_grid_name(options.get("grid_name", self.grid_name)),
            mask_wanted=self.return_cross_attention_mask if mask is None else requested,
            mask_requested=requested,
            return_metadata=bool(options.get("return_metadata")),
            blank_medium=self.blank_medium
            if options.get("blank_medium") is None
            else flag("blank_medium", options["blank_medium"]),
            device=device,
        )

    # media

    def _probe_media(self, samples: list[Sample], options: SortedOptions) -> None:
        """Opens and checks all media of the batch, before the first is decoded."""
        for sample in samples:
            if sample.images:
                sample.images = self.image_processor.probe(sample.images, **options.images)
            if sample.videos and not are_planned(sample.videos):
                rates = {} if sample.video_fps is None else {"video_fps": sample.video_fps}
                sample.videos = self.video_processor.plan(
                    sample.videos, sample.video_metadata, **options.videos, **rates
                )

    def _decode_media(self, sample: Sample, options: SortedOptions, encoder: Encoder | None) -> None:
        """Decodes the media of one sample. Samples do not share pixel limits."""
        images, videos = [], []
        if sample.images:
            resolved = self.image_processor.resolve(options.images)
            for patches, grid in self.image_processor.extract(sample.images, **options.images):
                images.append(Medium(patches, grid, self.image_token, resolved.image_mean, resolved.image_std))
        if sample.videos:
            resolved = self.video_processor.resolve(options.videos)
            for clip in self.video_processor.extract(sample.videos, encoder=encoder):
                statistics = resolved.image_mean, resolved.image_std
                text = self._video_text(clip.timestamps)
                videos.append(Medium(clip.patches, clip.grid, text, *statistics, clip.metadata, clip.features))
        sample.images, sample.videos = [], []
        queues = {"image": iter(images), "video": iter(videos)}
        sample.media = [next(queues[placeholder.kind]) for placeholder in sample.placeholders]

    def _video_text(self, times: list[float]) -> str:
        frames = (f"{self.time_start_token}{t:.1f} seconds{self.time_end_token}{self.image_token}" for t in times)
        return self.vision_start_token + "".join(frames) + self.vision_end_token

    def _vision_tensors(
        self, samples: list[Sample], image_options: ImageOptions, call: CallOptions, encoder: Encoder | None
    ) -> dict:
        """`pixel_values`, or with an encoder `image_features`, and the grids of all media. Frees the patches of the
        media.

        A sample without media gets a blank medium, which is visible to no token, unless `call` wants none.
        """
        blank = self._make_blank_medium(samples, image_options)
        padding = [blank] if call.blank_medium else []
        media = [(medium, medium is blank) for sample in samples for medium in sample.media or padding]
        grids = torch.tensor([medium.grid for medium, _ in media])
        if encoder is not None:
            features = [self._encode(medium, encoder, is_blank) for medium, is_blank in media]
            features = torch.cat(features) if len(features) > 1 else features[0]
            return {"image_features": features, call.grid_name: grids}
        parts = [(medium.patches, medium.image_mean, medium.image_std) for medium, _ in media]
        for medium, _ in media:
            medium.patches = None
        pixels = join_patches(parts, call.as_uint8)
        if call.device is not None:
            pixels["pixel_values"] = pixels["pixel_values"].to(call.device)
        return {**pixels, call.grid_name: grids}

    def _make_blank_medium(self, samples: list[Sample], options: ImageOptions) -> Medium:
        """A medium of zeros.

        Raises:
            ValueError: if images and videos have patches of different sizes.
        """
        widths = {m.patches.shape[1] for sample in samples for m in sample.media if m.patches is not None}
        if len(widths) > 1:
            raise ValueError(
                f"images and videos have patches of {sorted(widths)} values; give both the same patch sizes"
            )
        width = widths.pop() if widths else 3 * options.temporal_patch_size * options.patch_size**2
        side = max(1, round(BLANK_SIDE / options.factor)) * options.merge_size
        patches = torch.zeros(side * side, width, dtype=torch.uint8)
        return Medium(patches, [1, side, side], text="", image_mean=(0.0,) * 3, image_std=(1.0,) * 3)

    def _encode(self, medium: Medium, encoder: Encoder, is_blank: bool) -> torch.Tensor:
        features = medium.features
        if features is None:
            features = encoder(medium.patches, [medium.grid], medium.image_mean, medium.image_std)
        if is_blank:
            features = torch.zeros_like(features)  # the model recognises a blank medium by its zeros
        else:
            medium.patches = medium.features = None
        return features

    # text

    def _text_tensors(self, samples: list[Sample], options: TextOptions, call: CallOptions, ignore_index: int) -> dict:
        """Rows of tokens, as tensors if the call returns tensors, and the frame mask."""
        tokens = VisionTokens(self.image_token_id, self.vision_start_token_id, self.vision_end_token_id)
        rows = token_rows(samples, self.tokenizer, options, tokens, ignore_index)
        lengths = {len(ids) for ids in rows["input_ids"]}
        if len(lengths) > 1 and (call.return_tensors is not None or call.mask_requested):
            what = "tensor" if call.return_tensors is not None else "cross_attention_mask"
            raise ValueError(
                f"texts of {min(lengths)} to {max(lengths)} tokens do not make one {what}; pass padding=True"
            )
        mask = {}
        is_useful = call.mask_requested or call.blank_medium or any(sample.media for sample in samples)
        if len(lengths) == 1 and call.mask_wanted and is_useful:
            frames = max(1, *(sample.frames for sample in samples))
            mask["cross_attention_mask"] = frame_mask(rows["input_ids"], rows["attention_mask"], tokens.image, frames)
        if not options.return_attention_mask:
            del rows["attention_mask"]
        if call.return_tensors is not None:
            rows = {name: torch.tensor(lists, dtype=torch.long) for name, lists in rows.items()}
        return {**rows, **mask}

    def _get_num_multimodal_tokens(self, image_sizes=None, video_sizes=None, **kwargs) -> MultiModalData:
        """The text tokens and patches of media of given sizes, each alone in its sample, without the media. vLLM calls
        it by this name.

        Args:
            image_sizes: (height, width) per image.
            video_sizes: (sampled frames, height, width) per video.
            **kwargs: options of a call.

        Returns:
            `num_image_tokens`, `num_video_tokens`: the `image_pad` tokens, one per frame: vision tokens are not part
            of the text. `num_image_patches`.
        """
        options = sort_options(kwargs, self.image_processor.option_names, self.video_processor.option_names)
        data = {}
        if image_sizes is not None:
            patches = self.image_processor.get_number_of_image_patches
            data["num_image_tokens"] = [1] * len(image_sizes)
            data["num_image_patches"] = [patches(*size, options.images) for size in image_sizes]
        if video_sizes is not None:
            data["num_video_tokens"] = [frames for frames, _, _ in video_sizes]
        return MultiModalData(**data)

    def _calculate_timestamps(
        self,
        frames_indices,
        total_num_frames=None,
        video_fps=None,
        duration=None,
        merge_size=1,
        actual_timestamps=None,
    ) -> list[float]:
        """Seconds of the frames of a clip, for software that drives the video processor by hand.

        `actual_timestamps` if given, else index / `video_fps`, else index * `duration` / `total_num_frames` (of the
        whole video); clamped to `duration`. `merge_size` consecutive frames count as one: the mean of the first and
        the last.
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
                    "video_fps must be above 0, or duration and total_num_frames be given; got "
                    f"video_fps={video_fps!r}"
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
        """Renders a conversation, or a list of them, as text; with `tokenize`, processes it with its media.

        `content` of a message is a string or a list of parts: strings, {"type": "text", "text"}, {"type": "image",
        "image"}, {"type": "video", "video"}. The medium may also be under "url", "path", "base64", "image_url",
        "video_url", and the part may hold options of this medium ("fps", "max_pixels", ...; see conversation.py and
        options.py). A part without a medium becomes a placeholder for `images=` or `videos=`.

        `processor_kwargs` and keywords that the processor takes go to the processor, and keywords that the template
        reads go to the template. With `add_generation_prompt` or `continue_final_message`, rows are padded on the
        left, as `generate` needs it, unless `padding_side` is given. The conversation is not changed.

        Returns:
            The text (a list for a list of conversations); with `tokenize` the `input_ids`; with `tokenize` and
            `return_dict` the whole output of the processor, with `assistant_masks` if `return_assistant_tokens_mask`.

        Raises:
            ValueError: for a keyword that neither takes, and as in a call.
        """
        template = self._find_template(chat_template)
        is_batch = _is_batch(conversation)
        conversations = [read_messages(messages) for messages in (conversation if is_batch else [conversation])]
        call, variables = self._split_template_kwargs(kwargs, processor_kwargs)
        template_arguments = {"tools": tools, "documents": documents}
        check_template_variables(template, variables, self._call_names(), template_arguments)
        if return_assistant_tokens_mask:
            require_generation_tags(template)
        if not tokenize:
            on_tokens = {"return_dict": return_dict, "return_tensors": return_tensors, **call}
            _refuse_without_tokens({**on_tokens, "return_assistant_tokens_mask": return_assistant_tokens_mask})
        texts, answer_spans = render_jinja_template(
            conversations=[for_template(messages) for messages in conversations],
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            **{**self.tokenizer.special_tokens_map, **variables, **template_arguments},
        )
        if not tokenize:
            return texts if is_batch else texts[0]
        call = _add_media(call, conversations)
        if (add_generation_prompt or continue_final_message) and _pads_on_default_side(call):
            call["padding_side"] = "left"
        if return_assistant_tokens_mask:
            out = self._with_assistant_masks(texts, answer_spans, return_tensors, call)
        else:
            out = self(text=list(texts), return_tensors=return_tensors, **call)
        return out if return_dict else out["input_ids"]

    def _find_template(self, name: str | None) -> str:
        templates = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        template = templates.get(name or "default", name)
        if template is None:
            raise ValueError(
                "this processor has no chat template; pass chat_template=, or add chat_template.jinja to the "
                "checkpoint"
            )
        return template

    def _call_names(self) -> set[str]:
        """The keyword arguments of a call."""
        arguments = ("images", "videos", "labels_spans", "ignore_index", "encoder")
        options = (*TEXT_OPTIONS, *FIXED_TEXT, *CALL_OPTIONS, *NESTED_KWARGS, *FIXED)
        return {*arguments, *options, *self.image_processor.option_names, *self.video_processor.option_names}

    def _split_template_kwargs(self, kwargs: dict, processor_kwargs: dict | None) -> tuple[dict, dict]:
        """(keyword arguments of the processor's call, variables of the template)."""
        kwargs, known = drop_fixed(kwargs, "apply_chat_template", FIXED_TEMPLATE), self._call_names()
        call = {name: value for name, value in kwargs.items() if name in known or (name in REFUSED and value is None)}
        variables = {name: value for name, value in kwargs.items() if name not in call}
        return merge_once(call, processor_kwargs or {}, "processor_kwargs"), variables

    def _with_assistant_masks(self, texts: list[str], answer_spans: list, return_tensors, call: dict) -> BatchFeature:
        """The output of a call with `assistant_masks`: 1 for tokens of the assistant, made from labels."""
        spans = {"labels_spans": [list(spans) for spans in answer_spans]}
        call = {**merge_once(call, spans, "return_assistant_tokens_mask"), "ignore_index": -1}
        out = self(text=list(texts), return_tensors=return_tensors, **call)
        labels = out.data.pop("labels")
        if isinstance(labels, list):
            out["assistant_masks"] = [[int(label >= 0) for label in row] for row in labels]
        else:
            out["assistant_masks"] = (labels >= 0) * 1
        return out

    # loading and saving

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        """The parts of a checkpoint folder, and in a pipeline the arguments that leave the frame mask out."""
        parts = load_parts(pretrained_model_name_or_path, kwargs)
        chat_template, return_cross_attention_mask = None, False
        return [*parts, chat_template, return_cross_attention_mask] if is_in_pipeline(kwargs) else [*parts]

    def to_dict(self, *args, **kwargs):
        """Without settings that have their default value, as in released folders."""
        out = super().to_dict(*args, **kwargs)
        defaults = PROCESSOR_SETTINGS
        return {name: value for name, value in out.items() if name not in defaults or value != defaults[name]}

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Writes settings, tokenizer, chat template and code files, for transformers 4.57 and 5."""
        hub = {
            name: kwargs.pop(name) for name in list(kwargs) if name not in ("save_jinja_files", "legacy_serialization")
        }
        files = super().save_pretrained(save_directory, **kwargs)
        for part in (self.image_processor, self.video_processor):
            files = [*files, *part.save_pretrained(save_directory)]
        make_tokenizer_portable(os.path.join(save_directory, "tokenizer_config.json"))
        if push_to_hub:
            self.push_to_hub(hub.pop("repo_id", os.path.basename(os.path.normpath(save_directory))), **hub)
        elif hub:
            raise ValueError(f"save_pretrained: {', '.join(hub)} act only with push_to_hub=True")
        return files


def _is_batch(conversation) -> bool:
    """Whether it is a list of conversations, and not a list of messages."""
    is_list = isinstance(conversation, (list, tuple)) and bool(conversation)
    return is_list and isinstance(conversation[0], (list, tuple))


def _refuse_without_tokens(arguments: dict) -> None:
    """Raises ValueError for arguments that have no effect if `apply_chat_template` returns text."""
    given = [name for name, value in arguments.items() if value is not None and value is not False]
    if given:
        raise ValueError(f"{', '.join(given)}: these act on tokens; pass tokenize=True")


def _add_media(call: dict, conversations: list[list[dict]]) -> dict:
    """The keyword arguments of a call with the media of the conversations, one list per conversation."""
    for kind in ("image", "video"):
        media = [collect_media(messages, kind) for messages in conversations]
        if any(media):
            call = merge_once(call, {f"{kind}s": media}, f"{kind}s in the parts of the conversation")
    return call


def _pads_on_default_side(call: dict) -> bool:
    """Whether a call pads, without saying on which side."""

    def given(name):
        levels = (call, *(call.get(nested) or {} for nested in ("text_kwargs", "common_kwargs")))
        return next((level[name] for level in levels if level.get(name) is not None), None)

    return strategy(given("padding")) not in NO_PADDING and given("padding_side") is None


def _merge_times(times: list[float], size: int) -> list[float]:
    """The mean of the first and the last of every `size` times; the last time is repeated to fill the last group."""
    times = [*times, *times[-1:] * (-len(times) % size)]
    return [(times[i] + times[i + size - 1]) / 2 for i in range(0, len(times), size)] if size > 1 else times


__all__ = ["MossVLImageProcessor", "MossVLImageProcessorFast", "MossVLProcessor", "MossVLVideoProcessor"]
