"""The two dicts of options of a query: `media_kwargs` for the processors, `generate_kwargs` for `generate`.

They are checked before anything is decoded, and completed with the defaults of the offline methods.
"""

import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from transformers import GenerationConfig

from .checks import check_number, name_hint, plain_number, shorten
from .int8_states import is_int8
from .options import REFUSED, layered, names_of, read_options, reject_unknown


# Defaults of the offline methods. A media option given as None takes the processor's setting.
MEDIA_DEFAULTS = {
    "min_pixels": 4096,
    "max_pixels": 16777216,
    "multi_image_max_pixels": 201326592,
    "video_max_pixels": 201326592,
    "video_fps": 1.0,
    "min_frames": 1,
    "max_frames": 256,
    "num_extract_threads": 4,
}
GENERATE_DEFAULTS = {
    "max_new_tokens": 1024,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "do_sample": False,
}
VISION_CHUNKED_LENGTH = 64


# media_kwargs

ONE_VIDEO_OPTIONS = {"segments", "video_metadata"}  # they belong to one video, in its dict
IMAGE_OPTIONS, VIDEO_OPTIONS = ({*names_of(kind)} - ONE_VIDEO_OPTIONS for kind in ("image", "video"))
MEDIA_OPTIONS = IMAGE_OPTIONS | VIDEO_OPTIONS
CALL_OPTIONS = {*names_of("text"), *names_of("call")}  # of a call of the processor; the offline methods set them
FRAME_COUNT_OPTIONS = {"video_fps", "num_frames", "do_sample_frames", "min_frames", "max_frames"}


def merge_media_kwargs(earlier: dict, given: Mapping) -> dict:
    """`media_kwargs` of earlier turns, overridden by those of this query, under the names of options.py. An option
    that is None stays: it stands for the processor's setting.

    Raises:
        ValueError: if an option is given under two names, or as a part of `size` and alone.
    """
    canonical, spelled = {}, {}
    for name, value in _without_size(given).items():
        if value is None and name in REFUSED:
            continue
        [option] = read_options({name: True}, MEDIA_OPTIONS, "media_kwargs")
        if value is not None and canonical.get(option) is not None:
            raise ValueError(
                f"{name} and {spelled[option]} are names of the same option, and both were given; give one of them"
            )
        if value is not None or option not in canonical:
            canonical[option], spelled[option] = plain_number(value), name
    return layered(earlier, canonical)


def _without_size(given: Mapping) -> dict:
    """Media options with `min_pixels` and `max_pixels` in place of `size`."""
    size = given.get("size")
    given = {name: value for name, value in given.items() if name != "size"}
    if size is None:
        return given
    if not isinstance(size, Mapping):
        raise ValueError(f"size must be {{'shortest_edge': pixels, 'longest_edge': pixels}}, got {shorten(size)}")
    reject_unknown(size, ("shortest_edge", "longest_edge"), "size")
    for edge, name in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        if size.get(edge) is None:
            continue
        if clash := next((other for other in (edge, name) if given.get(other) is not None), None):
            raise ValueError(f"size has {edge!r}, and {clash}, the same option, was given as well; give one of them")
        given[name] = size[edge]
    return given


def complete_media_kwargs(media_kwargs: dict) -> dict:
    """`media_kwargs` with defaults, without those that are None."""
    options = layered(defaults_beside(media_kwargs), media_kwargs)
    return {name: value for name, value in options.items() if value is not None}


def defaults_beside(given: Mapping) -> dict:
    """The `MEDIA_DEFAULTS` that do not contradict the given options.

    With `do_sample_frames=False` all frames are taken, and a default for their number would be an error. With
    `sample_fps` all frames are taken unless an option limits their number.
    """
    explicit = {name for name, value in given.items() if value is not None}
    contradicting = set()
    if given.get("do_sample_frames") is False:
        contradicting = FRAME_COUNT_OPTIONS
    elif "sample_fps" in explicit and "do_sample_frames" not in explicit:
        contradicting = {"video_fps"} if FRAME_COUNT_OPTIONS & explicit else FRAME_COUNT_OPTIONS
    return {name: value for name, value in MEDIA_DEFAULTS.items() if name not in contradicting}


# generate_kwargs


@dataclass(frozen=True)
class _NumberRule:
    """What a numeric option of `generate` must be."""

    convert: type  # int or float; transformers refuses an int for some options that are floats
    expected: str
    fits: Callable

    def check(self, name: str, value) -> None:
        check_number(name, value, numbers.Integral if self.convert is int else numbers.Real, self.expected, self.fits)


def _at_least(lowest: int) -> _NumberRule:
    return _NumberRule(int, f"a whole number of at least {lowest}", lambda x: x >= lowest)


REQUIRED_NUMBERS = {  # options that always have a value
    "max_new_tokens": _at_least(1),
    "vision_chunked_length": _at_least(1),
    "temperature": _NumberRule(float, "a number", lambda x: True),
    "top_p": _NumberRule(float, "above 0 and at most 1", lambda x: 0 < x <= 1),
    "top_k": _NumberRule(int, "a whole number, 0 for no limit", lambda x: x >= 0),
    "repetition_penalty": _NumberRule(float, "above 0", lambda x: x > 0),
}
OPTIONAL_NUMBERS = {
    "num_beams": _at_least(1),
    "num_beam_groups": _at_least(1),
    "max_length": _at_least(1),
    "min_length": _at_least(0),
    "min_new_tokens": _at_least(0),
    "no_repeat_ngram_size": _at_least(0),
    "prompt_lookup_num_tokens": _at_least(1),
}
# Greedy decoding, also if generation_config.json turns sampling on. transformers warns about other values.
GREEDY = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
OBJECT_LISTS = {"stopping_criteria", "logits_processor"}
OBJECTS = {"streamer", "prefix_allowed_tokens_fn", *OBJECT_LISTS}
# Fields of GenerationConfig for more outputs than the one text that the offline methods return.
NOT_TEXT = {
    "num_return_sequences",
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
}
CONFIG_FIELDS = {name for name in GenerationConfig().to_dict() if not name.startswith("_")} - {"transformers_version"}
CALL_ARGUMENTS = {"vision_chunked_length", "vision_cache_dtype"}  # of forward, as `generate` passes them
GENERATE_OPTIONS = (CONFIG_FIELDS | OBJECTS | CALL_ARGUMENTS | GENERATE_DEFAULTS.keys()) - NOT_TEXT


def generate_arguments(model, tokenizer, given, vision_chunked_length: int) -> dict:
    """All keyword arguments of `generate` apart from the inputs: `generate_kwargs` of a query, checked, with defaults.

    Raises:
        ValueError: for an unknown option, and for a value that `generate` would refuse at its start or later.
    """
    if isinstance(given, dict) and (refused := sorted(given.keys() & NOT_TEXT)):
        raise ValueError(
            f"generate_kwargs: {', '.join(refused)}: the offline methods return one text; call model.generate for more"
        )
    given = check_options("generate_kwargs", given, GENERATE_OPTIONS)
    given = {name: plain_number(value) for name, value in given.items()}
    arguments = {**GENERATE_DEFAULTS, "vision_chunked_length": vision_chunked_length, **given}
    for name, rule in REQUIRED_NUMBERS.items():
        rule.check(name, arguments[name])
        arguments[name] = rule.convert(arguments[name])
    if not isinstance(arguments["do_sample"], bool):
        raise ValueError(f"do_sample must be True or False, got {shorten(arguments['do_sample'])}")
    _check_optional(given)
    is_int8(given.get("vision_cache_dtype"))  # checks it

    if not arguments["do_sample"] or arguments["temperature"] <= 0:
        arguments |= {name: value for name, value in GREEDY.items() if name in CONFIG_FIELDS}
    if "max_length" in given and "max_new_tokens" not in given:
        del arguments["max_new_tokens"]
    arguments |= _tokens(model, tokenizer, given)
    GenerationConfig(**{name: value for name, value in arguments.items() if name in CONFIG_FIELDS})  # checks values
    return arguments


def check_option(name: str, value):
    """An option of `REQUIRED_NUMBERS` that is an argument of a method, converted. Raises ValueError."""
    REQUIRED_NUMBERS[name].check(name, value)
    return REQUIRED_NUMBERS[name].convert(value)


def _tokens(model, tokenizer, given: dict) -> dict:
    """The arguments of `generate` that come from the tokenizer unless they are given."""
    tokens = {}
    if given.get("eos_token_id") is None and model.generation_config.eos_token_id is None:
        tokens["eos_token_id"] = tokenizer.eos_token_id
    if given.get("pad_token_id") is None:
        tokens["pad_token_id"] = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if given.get("stop_strings") is not None:
        tokens["tokenizer"] = tokenizer
    return tokens


def _check_optional(given: dict) -> None:
    """Raises ValueError for values that `generate` would find wrong only after the media are encoded."""
    given = {name: value for name, value in given.items() if value is not None or name in OBJECT_LISTS}
    for name in given.keys() & OPTIONAL_NUMBERS.keys():
        OPTIONAL_NUMBERS[name].check(name, given[name])
    for name in given.keys() & {"eos_token_id", "pad_token_id"}:
        ids = given[name].tolist() if isinstance(given[name], (np.ndarray, torch.Tensor)) else given[name]
        for one in ids if isinstance(ids, (list, tuple)) and name == "eos_token_id" else [ids]:
            expected = "the id of a token (eos_token_id: or a list of ids)"
            check_number(name, one, numbers.Integral, expected, lambda x: True)
    strings = given.get("stop_strings", "")
    if not isinstance(strings, str) and not (
        isinstance(strings, (list, tuple)) and all(isinstance(one, str) for one in strings)
    ):
        raise ValueError(f"stop_strings must be a string or a list of strings, got {shorten(strings)}")
    for name in given.keys() & OBJECT_LISTS:
        if not isinstance(given[name], list) or not all(map(callable, given[name])):
            raise ValueError(f"{name} must be a list of functions, got {shorten(given[name])}")
    if "streamer" in given and not all(hasattr(given["streamer"], name) for name in ("put", "end")):
        raise ValueError(f"streamer must have put and end, as a TextStreamer has, got {shorten(given['streamer'])}")


# names of options

OPTION_DICTS = {"media_kwargs": MEDIA_OPTIONS, "generate_kwargs": GENERATE_OPTIONS}  # the dicts of a query


def check_options(what: str, value, known=None) -> dict:
    """`value`, or {} for None. Raises ValueError unless `value` is a dict and all keys are `known` (None: any key)."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be a dict, got {type(value).__name__}")
    for name in value if known is not None else ():
        if name not in known:
            # The methods for one medium take these options directly, so a hint at media_kwargs would mislead.
            is_option = name in MEDIA_OPTIONS | GENERATE_OPTIONS and what not in OPTION_DICTS
            hint = None if is_option else misplaced_hint(name, value[name])
            raise ValueError(f"{what}: {hint or f'unknown key {name!r}; {name_hint(name, known - REFUSED.keys())}'}")
    return value


def misplaced_hint(name, value) -> str | None:
    """A message that says where an option belongs; None if `name` is not an option."""
    if owner := next((owner for owner, options in OPTION_DICTS.items() if name in options), None):
        return f"{name!r} belongs into its {owner}; write {{{owner!r}: {{{name!r}: ...}}}}"
    if name in ONE_VIDEO_OPTIONS:
        example = f"{{'video_path': ..., {name!r}: {shorten(value)}}}"
        return f"{name!r} belongs to one video; write {example} in place of its path"
    if name in NOT_TEXT:
        return f"{name!r}: the offline methods return one text; call model.generate for more"
    if name in CALL_OPTIONS:
        return f"{name!r} is an option of the processor's call, which the offline methods make; leave it out"
    if name in REFUSED:
        return f"{name} is no option of MOSS-VL: {REFUSED[name]}"
    if name == "seed":
        return "'seed' is no option of generate; call torch.manual_seed before"
    return None
