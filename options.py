"""The options of text, images and videos: every name that a call, a part of a message, a medium or a settings file may use.

`OPTIONS` is the one table of them. An option has one name in this code; `also` holds the names that other software gives it. A value of
None stands for the default everywhere. No media, no tensors here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .checks import nearest_name, shorten


# checking arguments


def reject_unknown(given, known, what: str) -> None:
    """ValueError for the first name of `given` that is not in `known`; it says the nearest one."""
    for name in given:
        if name not in known:
            free = set(known) - FIXED.keys() - FIXED_TEXT.keys()  # no hint at what may not be changed
            near = nearest_name(name, free)
            hint = f"did you mean {near!r}?" if near else f"known: {', '.join(sorted(free))}"
            raise ValueError(f"{what}: unknown keyword {name!r}; {hint}")


# the table


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: its name in this code.
        takers: who takes it: "text", "image", "video", "call" (the processor itself).
        meaning: what it says, in one clause.
        also: other names of the same option.
        own: True if one medium may have it for itself, as a key of its part or of its dict.
        stored: True if it is also a setting of the image or video processor, which its file holds.
        trusted: True if `from_pretrained` and the constructors take it, and no file: what a checkpoint may not decide for its user.
    """

    name: str
    takers: tuple[str, ...]
    meaning: str
    also: tuple[str, ...] = ()
    own: bool = False
    stored: bool = False
    trusted: bool = False


BOTH = ("image", "video")
OPTIONS = (
    # ---- text
    Option("padding", ("text",), "True or 'longest', 'max_length', False or 'do_not_pad'"),
    Option("padding_side", ("text",), "'left' or 'right'"),
    Option("truncation", ("text",), "True, 'longest_first' or 'only_first'; False or 'do_not_truncate'"),
    Option("max_length", ("text",), "tokens after truncation, or after padding='max_length'"),
    Option("pad_to_multiple_of", ("text",), "padded lengths are multiples of it"),
    Option("add_special_tokens", ("text",), "whether the tokenizer adds its own"),
    Option("return_attention_mask", ("text",), "False leaves `attention_mask` out"),
    Option("return_token_type_ids", ("text",), "True adds `token_type_ids`, all 0"),
    Option(
        "return_mm_token_type_ids",
        ("text",),
        "True adds `mm_token_type_ids`: 0 text, 1 an image's frame token, 2 a video's",
    ),
    Option("return_offsets_mapping", ("text",), "True adds `offset_mapping`, of the text with placeholders replaced"),
    # ---- the call
    Option("return_tensors", ("call",), "'pt', 'np' or None: lists"),
    Option("return_metadata", ("call",), "True adds `video_metadata`"),
    Option("do_normalize", ("call",), "False leaves pixels as uint8 levels, which the model normalises"),
    Option("return_cross_attention_mask", ("call",), "False leaves `cross_attention_mask` out"),
    Option(
        "grid_name",
        ("call",),
        "the name of the grids in the output: 'grid_thw', or 'image_grid_thw' as TRL's GRPO expects it",
    ),
    # ---- images and videos
    Option("size", BOTH, "{'shortest_edge', 'longest_edge'}: least and most pixels", stored=True),
    Option("min_pixels", BOTH, "least pixels of a resized image or frame", ("shortest_edge",), own=True, stored=True),
    Option("max_pixels", BOTH, "most pixels of a resized image or frame", ("longest_edge",), own=True, stored=True),
    Option("resized_height", BOTH, "the height after the resize, rounded to the factor; with resized_width", own=True),
    Option("resized_width", BOTH, "the width after the resize, rounded to the factor; with resized_height", own=True),
    Option("patch_size", BOTH, "side of a patch, as the model has it", stored=True),
    Option("temporal_patch_size", BOTH, "frames of a patch, as the model has it", stored=True),
    Option("merge_size", BOTH, "patches that become one token, a side", stored=True),
    Option("image_mean", BOTH, "three numbers, of levels in 0..1", stored=True),
    Option("image_std", BOTH, "three numbers, of levels in 0..1", stored=True),
    Option("allow_http", BOTH, "True allows downloads from http(s) URLs", trusted=True),
    # ---- images
    Option("multi_image_max_pixels", ("image",), "most pixels of all images of a sample", own=True, stored=True),
    # ---- videos
    Option(
        "video_max_pixels",
        ("video",),
        "most pixels of all frames of a sample; as a video's own, of its frames",
        ("total_pixels",),
        own=True,
        stored=True,
    ),
    Option("video_fps", ("video",), "frames a second that are taken", ("fps",), own=True, stored=True),
    Option(
        "num_frames", ("video",), "how many frames are taken, in place of a rate", ("nframes",), own=True, stored=True
    ),
    Option("min_frames", ("video",), "fewest frames of a video", own=True, stored=True),
    Option(
        "max_frames",
        ("video",),
        "most frames of a sample's videos; as a video's own, of that video",
        own=True,
        stored=True,
    ),
    Option("do_sample_frames", ("video",), "False takes every frame of the video", own=True),
    Option(
        "sample_fps",
        ("video",),
        "frames a second of a list of frames that were sampled before: all are taken",
        own=True,
    ),
    Option("video_start", ("video",), "second at which the part of the video that is looked at begins", own=True),
    Option("video_end", ("video",), "second at which it ends", own=True),
    Option("segments", ("video",), "[[start, end], [time], ...] in seconds, a placeholder each", own=True),
    Option("video_metadata", ("video",), "of decoded frames: {'fps': ...} or {'timestamps': [...]}", own=True),
    Option(
        "num_extract_threads",
        ("video",),
        "threads that read and resize frames",
        ("frame_extract_num_threads",),
        stored=True,
    ),
    Option("video_backend", ("video",), "'pyav' or 'decord'", ("video_load_backend",), stored=True),
)

# Options of which a medium, or a level of settings, has one: the nearer level's choice replaces the other's as a whole.
ALTERNATIVES = (
    ("video_fps", "num_frames", "do_sample_frames"),
    ("video_start", "video_end", "segments"),
    ("sample_fps", "video_metadata"),
)
# A fixed size is one in place of limits, which are of no effect beside it.
FIXED_SIZE = ("resized_height", "resized_width")

# Steps that are always done, and arguments of transformers' tokenizers that a processor's text cannot have: name -> the one value. They may
# be named with it, not changed.
FIXED = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "do_center_crop": False,
    "do_pad": False,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "data_format": "channels_first",
}
FIXED_TEXT = {
    "stride": 0,
    "is_split_into_words": False,
    "return_overflowing_tokens": False,
    "return_special_tokens_mask": False,
    "return_length": False,
    "verbose": True,
}
# Arguments of transformers' `apply_chat_template` that ask for what is not there.
FIXED_TEMPLATE = {"load_audio_from_video": False, "sanitize_control_tokens": False}
# Names that other software uses for something that is not the same here, and what to write instead.
REFUSED = {
    "raw_fps": "times follow from sample_fps or video_metadata; leave it out",
    "max_num_frames": "write max_frames",
    "frames": "write num_frames to say how many are taken; a list of frames is {'video': frames, 'fps': the rate at which they were taken}",
    "resolution": "write max_pixels, or resized_height and resized_width",
    "image_size": "write max_pixels, or resized_height and resized_width",
    "crop_size": "nothing is cropped; leave it out",
    "audio": "MOSS-VL takes no audio; leave it out",
    "audios": "MOSS-VL takes no audio; leave it out",
}


def canonical(name: str) -> str:
    """The name of an option in this code."""
    return _NAMES.get(name, name)


def names_of(taker: str | None = None, **having: bool) -> tuple[str, ...]:
    """All names of the options of a taker (None: of any), other names included; with `own`, `stored` or `trusted` of those options only."""
    chosen = [
        o
        for o in OPTIONS
        if (taker is None or taker in o.takers) and all(getattr(o, name) for name, on in having.items() if on)
    ]
    return tuple(name for option in chosen for name in (option.name, *option.also))


_NAMES = {name: option.name for option in OPTIONS for name in (option.name, *option.also)}


def read_options(given: Mapping, known: Iterable[str], what: str) -> dict:
    """The options of `given` by the names that this code uses, without those that are None.

    `known`: the names that may stand there. Raises ValueError for another name, with the nearest, and for two names of one option that
    disagree.
    """
    out, spelled = {}, {}
    for name, value in given.items():
        if name not in known:
            if value is None and name in REFUSED:
                continue
            if name in REFUSED:
                raise ValueError(f"{what}: {name} is no option of MOSS-VL: {REFUSED[name]}")
            reject_unknown([name], known, what)
        if value is None:
            continue
        option = _NAMES.get(name, name)
        if option in out and not _same(out[option], value):
            raise ValueError(
                f"{what}: {spelled[option]}={shorten(out[option])} and {name}={shorten(value)} name the same option and disagree; "
                "give one of them"
            )
        out[option], spelled[option] = value, name
    return out


def layered(general: Mapping, own: Mapping) -> dict:
    """Options of a call under those of one medium. Where the medium's own choose between alternatives, the call's choice is gone."""
    general = dict(general)
    for group in ALTERNATIVES:
        if any(name in own for name in group if (name, own.get(name)) != ("do_sample_frames", True)):
            for name in group:
                general.pop(name, None)
    if any(name in own for name in ("min_pixels", "max_pixels")):
        for name in FIXED_SIZE:
            general.pop(name, None)
    if any(name in own for name in FIXED_SIZE):
        for name in ("min_pixels", "max_pixels", "size"):
            general.pop(name, None)
    return {**general, **own}


def drop_fixed(kwargs: Mapping, what: str, fixed: Mapping = FIXED) -> dict:
    """`kwargs` without the steps that are always done; ValueError if one of them is to be left out or done otherwise."""
    for name in fixed.keys() & kwargs.keys():
        value = getattr(kwargs[name], "value", kwargs[name])
        if value is not None and value != fixed[name]:
            raise ValueError(f"{what}: {name} is always {fixed[name]!r} for MOSS-VL, got {kwargs[name]!r}")
    return {name: value for name, value in kwargs.items() if name not in fixed}


def _same(a, b) -> bool:
    try:
        return bool(a == b)
    except (ValueError, TypeError):  # arrays
        return a is b
