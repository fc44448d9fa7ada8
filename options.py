"""The options of text, images and videos, in calls, parts of messages, media and settings files.

`OPTIONS` is the table of all options. An option has a canonical name, and aliases that other software uses. The value
None always means the default.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .checks import nearest_name, shorten


# checking arguments


def reject_unknown(given, known, what: str) -> None:
    """Raises ValueError for the first name of `given` that is not in `known`, with the nearest known name."""
    for name in given:
        if name not in known:
            changeable = set(known) - FIXED.keys() - FIXED_TEXT.keys()
            near = nearest_name(name, changeable)
            hint = f"did you mean {near!r}?" if near else f"known: {', '.join(sorted(changeable))}"
            raise ValueError(f"{what}: unknown keyword {name!r}; {hint}")


# the table


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: the canonical name.
        takers: who takes it: "text", "image", "video", or "call" (the processor itself).
        meaning: what the option does.
        aliases: other names of the same option, as other software calls it.
        per_medium: True if a single medium can have it, as a key of its dict or of its part of a message.
        stored: True if it is also a setting of the image or video processor, and so part of settings files.
        trusted: True if calls, constructors and `from_pretrained` take it, but settings files must not have it: a
            downloaded checkpoint must not decide it for its user.
    """

    name: str
    takers: tuple[str, ...]
    meaning: str
    aliases: tuple[str, ...] = ()
    per_medium: bool = False
    stored: bool = False
    trusted: bool = False


IMAGE_AND_VIDEO = ("image", "video")
OPTIONS = (
    # ---- text
    Option("padding", ("text",), "True or 'longest', 'max_length', False or 'do_not_pad'"),
    Option("padding_side", ("text",), "'left' or 'right'"),
    Option("truncation", ("text",), "True, 'longest_first' or 'only_first'; False or 'do_not_truncate'"),
    Option("max_length", ("text",), "tokens after truncation, or after padding='max_length'"),
    Option("pad_to_multiple_of", ("text",), "pads to a multiple of this length"),
    Option("add_special_tokens", ("text",), "whether the tokenizer adds its special tokens"),
    Option("return_attention_mask", ("text",), "False leaves `attention_mask` out"),
    Option("return_token_type_ids", ("text",), "True adds `token_type_ids`, all 0"),
    Option(
        "return_mm_token_type_ids",
        ("text",),
        "True adds `mm_token_type_ids`: 0 text, 1 frame token of an image, 2 frame token of a video",
    ),
    Option("return_offsets_mapping", ("text",), "True adds `offset_mapping`, of the text with placeholders replaced"),
    # ---- the call
    Option("return_tensors", ("call",), "'pt', 'np', or None for lists"),
    Option("return_metadata", ("call",), "True adds `video_metadata`"),
    Option("do_normalize", ("call",), "False returns uint8 pixels, which the model normalises"),
    Option("return_cross_attention_mask", ("call",), "False leaves `cross_attention_mask` out"),
    Option("blank_medium", ("call",), "False gives a text without media no blank medium, as SGLang expects it"),
    Option("device", ("call",), "where `pixel_values` lie in the output; the default is the CPU"),
    Option(
        "grid_name",
        ("call",),
        "name of the grids in the output: 'grid_thw', or 'image_grid_thw' as GRPO of TRL expects it",
    ),
    # ---- images and videos
    Option(
        "size", IMAGE_AND_VIDEO, "{'shortest_edge': least, 'longest_edge': most pixels after the resize}", stored=True
    ),
    Option(
        "min_pixels",
        IMAGE_AND_VIDEO,
        "least pixels of an image or frame after the resize",
        aliases=("shortest_edge",),
        per_medium=True,
        stored=True,
    ),
    Option(
        "max_pixels",
        IMAGE_AND_VIDEO,
        "most pixels of an image or frame after the resize",
        aliases=("longest_edge",),
        per_medium=True,
        stored=True,
    ),
    Option(
        "resized_height",
        IMAGE_AND_VIDEO,
        "height after the resize, rounded to a multiple of patch_size * merge_size; together with resized_width",
        per_medium=True,
    ),
    Option(
        "resized_width",
        IMAGE_AND_VIDEO,
        "width after the resize, rounded to a multiple of patch_size * merge_size; together with resized_height",
        per_medium=True,
    ),
    Option("patch_size", IMAGE_AND_VIDEO, "side of a patch in pixels, as in the model", stored=True),
    Option("temporal_patch_size", IMAGE_AND_VIDEO, "frames per patch, as in the model", stored=True),
    Option("merge_size", IMAGE_AND_VIDEO, "a vision token is merge_size x merge_size patches", stored=True),
    Option("image_mean", IMAGE_AND_VIDEO, "three numbers, for pixels in 0..1", stored=True),
    Option("image_std", IMAGE_AND_VIDEO, "three numbers, for pixels in 0..1", stored=True),
    Option("allow_http", IMAGE_AND_VIDEO, "True allows downloads from http(s) URLs", trusted=True),
    Option(
        "allow_private_hosts",
        IMAGE_AND_VIDEO,
        "True allows downloads from private, loopback, link-local and reserved addresses too",
        trusted=True,
    ),
    Option(
        "max_source_pixels",
        IMAGE_AND_VIDEO,
        "most pixels of an image before the resize, and of all images of a sample that are decoded at once; two "
        "thirds of it with a palette or transparency and for WebP, three eighths for a frame of a video file",
        trusted=True,
    ),
    # ---- images
    Option(
        "multi_image_max_pixels", ("image",), "most pixels of all images of a sample", per_medium=True, stored=True
    ),
    # ---- videos
    Option(
        "video_max_pixels",
        ("video",),
        "most pixels of all frames of a sample; per medium, of all frames of this video",
        aliases=("total_pixels",),
        per_medium=True,
        stored=True,
    ),
    Option(
        "video_fps",
        ("video",),
        "frames to take per second of video",
        aliases=("fps",),
        per_medium=True,
        stored=True,
    ),
    Option(
        "num_frames",
        ("video",),
        "number of frames to take, in place of a rate",
        aliases=("nframes",),
        per_medium=True,
        stored=True,
    ),
    Option("min_frames", ("video",), "fewest frames of a video", per_medium=True, stored=True),
    Option(
        "max_frames",
        ("video",),
        "most frames of all videos of a sample; per medium, of this video",
        per_medium=True,
        stored=True,
    ),
    Option("do_sample_frames", ("video",), "False takes every frame of the video", per_medium=True),
    Option(
        "sample_fps",
        ("video",),
        "rate at which a list of frames was sampled before: all frames are taken",
        per_medium=True,
    ),
    Option("video_start", ("video",), "start of the part of the video to take, in seconds", per_medium=True),
    Option("video_end", ("video",), "end of the part of the video to take, in seconds", per_medium=True),
    Option("segments", ("video",), "[[start, end], [time], ...] in seconds; one placeholder each", per_medium=True),
    Option("video_metadata", ("video",), "of decoded frames: {'fps': ...} or {'timestamps': [...]}", per_medium=True),
    Option(
        "num_extract_threads",
        ("video",),
        "number of threads that decode and resize frames",
        aliases=("frame_extract_num_threads",),
        stored=True,
    ),
    Option("max_video_packets", ("video",), "most packets of the video stream of a file", trusted=True),
    Option(
        "max_animation_canvas",
        ("video",),
        "most pixels of a frame of an animated GIF, PNG or WebP",
        trusted=True,
    ),
    Option(
        "max_animation_pixels",
        ("video",),
        "most pixels of all frames of an animated GIF, PNG or WebP, before the resize",
        trusted=True,
    ),
    Option("video_backend", ("video",), "'pyav' or 'decord'", aliases=("video_load_backend",), stored=True),
)

# Groups of options that exclude each other. If a more specific level (a medium, a call) sets an option of a group, all
# options of this group from a more general level (a call, a settings file) are dropped.
ALTERNATIVES = (
    ("video_fps", "num_frames", "do_sample_frames"),
    ("video_start", "video_end", "segments"),
    ("sample_fps", "video_metadata"),
)
# They replace the limits `min_pixels` and `max_pixels`.
FIXED_SIZE = ("resized_height", "resized_width")

# Arguments with only one allowed value, which a caller may give: steps of preprocessing that are always (or never)
# done, and arguments of transformers' tokenizers that do not fit a processor.
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
# Arguments of transformers' `apply_chat_template` for features that do not exist here.
FIXED_TEMPLATE = {"load_audio_from_video": False, "sanitize_control_tokens": False}
# Names of other software that are errors here, and what to write instead.
REFUSED = {
    "raw_fps": "times follow from sample_fps or video_metadata; leave it out",
    "max_num_frames": "write max_frames",
    "frames": (
        "write num_frames to say how many are taken; a list of frames is {'video': frames, 'fps': the rate at which "
        "they were taken}"
    ),
    "resolution": "write max_pixels, or resized_height and resized_width",
    "image_size": "write max_pixels, or resized_height and resized_width",
    "crop_size": "nothing is cropped; leave it out",
    "audio": "MOSS-VL takes no audio; leave it out",
    "audios": "MOSS-VL takes no audio; leave it out",
}


def canonical(name: str) -> str:
    """The canonical name of an option; an unknown name unchanged."""
    return _CANONICAL.get(name, name)


def names_of(taker: str | None = None, **having: bool) -> tuple[str, ...]:
    """All names, with aliases, of the options that `taker` takes (None: any taker).

    `per_medium=True`, `stored=True` or `trusted=True` selects the options with this attribute.
    """
    attributes = [name for name, wanted in having.items() if wanted]
    chosen = [
        option
        for option in OPTIONS
        if (taker is None or taker in option.takers) and all(getattr(option, name) for name in attributes)
    ]
    return tuple(name for option in chosen for name in (option.name, *option.aliases))


def options_of(taker: str, options: Mapping) -> dict:
    """Those of `options` that `taker` takes, under the names that they have there."""
    names = names_of(taker)
    return {name: value for name, value in options.items() if name in names}


_CANONICAL = {name: option.name for option in OPTIONS for name in (option.name, *option.aliases)}


def read_options(given: Mapping, known: Iterable[str], what: str) -> dict:
    """The options of `given` by their canonical names, without those that are None.

    Args:
        known: the names that are allowed.
        what: where the options were given, for error messages.

    Raises:
        ValueError: for any other name (with the nearest known one), and for two names of one option with different
            values.
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
        option = canonical(name)
        if option in out and not _same(out[option], value):
            raise ValueError(
                f"{what}: {spelled[option]}={shorten(out[option])} and {name}={shorten(value)} name the same option "
                "and disagree; give one of them"
            )
        out[option], spelled[option] = value, name
    return out


def layered(general: Mapping, specific: Mapping) -> dict:
    """Options of a general level (a call) overridden by those of a more specific level (a medium).

    An option of `specific` also removes the options of `general` that it excludes.
    """
    general = dict(general)
    for group in ALTERNATIVES:
        # do_sample_frames=True is the default, so it chooses nothing
        if any(name in specific for name in group if (name, specific.get(name)) != ("do_sample_frames", True)):
            for name in group:
                general.pop(name, None)
    if any(name in specific for name in ("min_pixels", "max_pixels")):
        for name in FIXED_SIZE:
            general.pop(name, None)
    if any(name in specific for name in FIXED_SIZE):
        for name in ("min_pixels", "max_pixels", "size"):
            general.pop(name, None)
    return {**general, **specific}


def drop_fixed(kwargs: Mapping, what: str, fixed: Mapping = FIXED) -> dict:
    """`kwargs` without the arguments of `fixed`. Raises ValueError if one of these has another value than allowed."""
    for name in fixed.keys() & kwargs.keys():
        value = getattr(kwargs[name], "value", kwargs[name])
        if value is not None and value != fixed[name]:
            raise ValueError(f"{what}: {name} is always {fixed[name]!r} for MOSS-VL, got {kwargs[name]!r}")
    return {name: value for name, value in kwargs.items() if name not in fixed}


def _same(a, b) -> bool:
    try:
        return bool(a == b)
    except (ValueError, TypeError):  # arrays compare element by element
        return a is b
