"""Loading and saving the parts of a processor: image processor, tokenizer and video processor of a checkpoint
folder."""

import inspect
import json

import transformers
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .checks import nearest_name
from .image_processing_moss_vl import MossVLImageProcessor, MossVLImageProcessorFast
from .options import FIXED, REFUSED, canonical
from .processor_keywords import CALL_OPTIONS
from .processor_settings import HUB_KEYS
from .text_rows import TEXT_OPTIONS
from .video_processing_moss_vl import MossVLVideoProcessor


IMAGE_CLASSES = {cls.__name__: cls for cls in (MossVLImageProcessor, MossVLImageProcessorFast)}
# Settings of the processor itself, with their defaults.
PROCESSOR_SETTINGS = {"return_cross_attention_mask": True, "grid_name": "grid_thw", "blank_medium": True}
# Keywords of `from_pretrained` that all tokenizers take, besides the arguments of the tokenizer's class.
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
# Keywords of `from_pretrained` that a tokenizer must not get. A part that is given ready replaces that of the folder.
NOT_FOR_TOKENIZER = {
    "image_processor",
    "tokenizer",
    "video_processor",
    "trust_remote_code",
    "code_revision",
    "use_fast",
    "backend",
    "chat_template",
    "return_unused_kwargs",
    "_commit_hash",
}


def load_parts(path, kwargs: dict) -> tuple[MossVLImageProcessor, PreTrainedTokenizerBase, MossVLVideoProcessor]:
    """The parts of a checkpoint folder or hub repository, without the Auto classes: AutoVideoProcessor requires
    torchvision.

    Settings of the image and the video processor among the keyword arguments override those of their files; arguments
    of the tokenizer go to the tokenizer. In a pipeline, the tokenizer pads on the left by default: a pipeline
    generates from the batch.

    Raises:
        ValueError: for any other keyword, except in a pipeline, which also passes keywords for the model.
    """
    hub = {name: value for name, value in kwargs.items() if name in HUB_KEYS}
    for_images = {
        name: value for name, value in kwargs.items() if name in (*MossVLImageProcessor.option_names, *FIXED)
    }
    for_videos = {
        name: value for name, value in kwargs.items() if name in (*MossVLVideoProcessor.option_names, *FIXED)
    }
    taken = {*hub, *for_images, *for_videos, *NOT_FOR_TOKENIZER, *PROCESSOR_SETTINGS}
    for_tokenizer = {name: value for name, value in kwargs.items() if name not in taken}
    in_pipeline = is_in_pipeline(kwargs)
    if in_pipeline:
        for_tokenizer.setdefault("padding_side", "left")
    settings, _ = MossVLImageProcessor.get_image_processor_dict(path, **hub)
    video_settings, _ = MossVLVideoProcessor.get_video_processor_dict(path, **hub)
    return (
        _image_class(settings).from_dict(settings, **for_images),
        load_tokenizer(path, hub, for_tokenizer, strict=not in_pipeline),
        MossVLVideoProcessor.from_dict(video_settings, **for_videos),
    )


def is_in_pipeline(kwargs: dict) -> bool:
    """Whether a transformers pipeline loads the processor."""
    return kwargs.get("_from_pipeline") is not None


def _image_class(settings: dict) -> type[MossVLImageProcessor]:
    named = settings.get("auto_map", {}).get("AutoImageProcessor", "").split(".")[-1]
    default = IMAGE_CLASSES.get(settings.get("image_processor_type"), MossVLImageProcessorFast)
    return IMAGE_CLASSES.get(named, default)


# the tokenizer


def load_tokenizer(path, hub: dict, kwargs: dict, strict: bool = True) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a folder, saved by any transformers version.

    Args:
        hub: keywords that say where the files are.
        strict: whether a keyword that the tokenizer does not take is an error; otherwise it is dropped.
    """
    config = get_tokenizer_config(path, **{name: value for name, value in hub.items() if not name.startswith("_")})
    name = (config.get("tokenizer_class") or "Qwen2Tokenizer").removesuffix("Fast")
    slow_class = getattr(transformers, name, transformers.Qwen2TokenizerFast)
    tokenizer_class = getattr(transformers, name + "Fast", None) or slow_class
    known = {*TOKENIZER_KEYS, *inspect.signature(tokenizer_class.__init__).parameters} - {"self", "args", "kwargs"}
    unknown = [name for name in kwargs if name not in known]
    if strict and unknown:
        _refuse_keyword(unknown[0], known)
    kwargs = {name: value for name, value in kwargs.items() if name in known}
    extra = config.get("extra_special_tokens")
    is_version_4 = not hasattr(transformers, "TokenizersBackend")
    if isinstance(extra, list) and is_version_4:  # transformers 5 writes a list, 4.57 expects a dict
        kwargs = {"extra_special_tokens": {}, "additional_special_tokens": extra, **kwargs}
    return tokenizer_class.from_pretrained(path, **hub, **kwargs)


def _refuse_keyword(name: str, tokenizer_keys: set[str]) -> None:
    """Raises ValueError for a keyword of `from_pretrained` that no part takes."""
    if canonical(name) in {*TEXT_OPTIONS, *CALL_OPTIONS}:
        raise ValueError(f"from_pretrained: {name} is an option of a call, not a setting; pass it to the call")
    if name in REFUSED:
        raise ValueError(f"from_pretrained: {name} is no option of MOSS-VL: {REFUSED[name]}")
    settings = {
        *MossVLImageProcessor.setting_names,
        *MossVLVideoProcessor.setting_names,
        *PROCESSOR_SETTINGS,
        "chat_template",
    }
    near = nearest_name(name, {*settings, *tokenizer_keys, *HUB_KEYS})
    names = ", ".join(sorted(settings))
    hint = f"did you mean {near!r}?" if near else f"known: {names}, and arguments of the tokenizer"
    raise ValueError(f"from_pretrained: unknown keyword {name!r}; {hint}")


def make_tokenizer_portable(config_file: str) -> None:
    """Rewrites the entries of a tokenizer's config that only transformers 5 reads, so that 4.57 reads them too."""
    with open(config_file, encoding="utf-8") as file:
        config = json.load(file)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "Qwen2Tokenizer"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    with open(config_file, "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2, ensure_ascii=False)
        file.write("\n")
