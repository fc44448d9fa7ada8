"""Reads chat messages, their parts and their media, in all forms that callers write, into one plain form.

The processor, the offline methods, infer.py and the training records all use these functions, so that a message means
the same everywhere. Of files only the first bytes are read, to tell a list of frames from a list of videos. Only
`fill_placeholders` changes its arguments.

A part of a message is a string, or a dict with a `type`. A medium (an image or a video) is a source (a path, a URL,
bytes, pixels, ...), or a dict with a source under one of `SOURCE_KEYS` and options of this medium (`per_medium` in
options.py). A part of type image or video is also such a dict. The plain forms are

    part      {"type": "text", "text": text}, {"type": "image", "image": medium}, {"type": "video", "video": medium};
              without its medium, an image or video part is a placeholder: the medium is given elsewhere
    medium    the bare source; with options, or for a list of frames, a dict: {"image": source, **options} or
              {"video_path": source, **options}
"""

import base64
import os
import re
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from PIL import Image

from .checks import nearest_name, shorten
from .options import names_of, read_options
from .signatures import HEAD, image_kind, is_animated, read_head


PLACEHOLDER = re.compile(r"<\|(image|video)(?:_pad)?\|>")  # of a medium, in a text
PLACEHOLDERS = {"image": "<|image|>", "video": "<|video|>"}
KINDS = {  # `type` of a part -> kind
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "video": "video",
    "video_url": "video",
    "input_video": "video",
}
SOURCE_KEYS = {
    "image": ("image", "image_url", "url", "path", "base64", "bytes"),
    "video": ("video", "video_path", "video_url", "url", "path", "base64", "bytes"),
}
MOST_AXES = {"image": 3, "video": 4}  # of an array that is one medium
PLAIN_KEY = {"image": "image", "video": "video_path"}  # of the source, in a plain medium
MEDIUM_OPTIONS = {kind: names_of(kind, per_medium=True) for kind in SOURCE_KEYS}
SCHEMES = ("data", "file", "http", "https")
# Keys of a message in which other software puts media, outside the content. Ignoring them would lose the media, so
# they are errors.
MESSAGE_MEDIA = {
    "image": "image",
    "images": "image",
    "image_url": "image",
    "image_urls": "image",
    "image_path": "image",
    "video": "video",
    "videos": "video",
    "video_url": "video",
    "video_urls": "video",
    "video_path": "video",
    "media": "image",
    "audio": "audio",
    "audios": "audio",
}
EXIF_ORIENTATION = 0x0112
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".avif")
VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".ts", ".mpg", ".flv", ".mjpg", ".mjpeg")
ROLE_ALIASES = {"human": "user", "gpt": "assistant"}  # in `conversations` of training records


# sources


def scheme_of(source) -> str | None:
    """ "data", "file", "http" or "https" of a URL; None for a path and everything else."""
    if isinstance(source, str) and ":" in source[:6]:
        scheme = source[: source.index(":")].lower()
        return scheme if scheme in SCHEMES else None
    return None


def path_text(path: os.PathLike) -> str:
    """A path object as a string. Raises ValueError for one that gives anything but text or bytes."""
    try:
        return os.fsdecode(path)
    except TypeError as error:
        raise ValueError(f"a {type(path).__name__} is not a usable path: {error}") from error


def local_path(source):
    """The path of a source that is a `file:` URL or begins with `~`; any other source unchanged.

    Raises:
        ValueError: for a `file:` URL of another machine.
    """
    if isinstance(source, os.PathLike):
        source = path_text(source)
    if scheme_of(source) == "file":
        url = urllib.parse.urlsplit(source)
        if url.netloc not in ("", "localhost"):
            raise ValueError(
                f"{shorten(source)} is a file: URL of another machine, {url.netloc!r}; expected file:///path"
            )
        return urllib.request.url2pathname(url.path)
    if isinstance(source, str) and source.startswith("~") and not os.path.exists(source):
        return os.path.expanduser(source)
    return source


def same_source(a, b) -> bool:
    """Whether two sources are the same object, file, URL, bytes or pixels, or lists of such.

    Relative paths start at the working directory.
    """
    if a is b:
        return True
    a, b = (os.path.abspath(x) if isinstance(x, str) and scheme_of(x) is None else x for x in map(local_path, (a, b)))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same_source, a, b))
    if isinstance(a, Image.Image) and isinstance(b, Image.Image):
        return _same_image(a, b)  # before types are compared: the copy of a JpegImageFile is of another type
    if type(a) is not type(b):
        return False
    try:
        return bool(a == b)
    except (ValueError, TypeError, RuntimeError):  # arrays and tensors compare element by element
        return a.shape == b.shape and bool((a == b).all())


def _same_image(a: Image.Image, b: Image.Image) -> bool:
    """Whether two Pillow images have the same mode, colours, pixels and orientation."""
    if (a.mode, a.size) != (b.mode, b.size):
        return False
    orientation_a, orientation_b = (one.getexif().get(EXIF_ORIENTATION, 1) for one in (a, b))
    if orientation_a != orientation_b or a.info.get("transparency") != b.info.get("transparency"):
        return False
    return a.getpalette() == b.getpalette() and a.tobytes() == b.tobytes()


def _from_base64(text) -> str:
    """The data: URL of a base64 string."""
    text = text.decode("ascii", "replace") if isinstance(text, (bytes, bytearray)) else text
    if not isinstance(text, str):
        raise ValueError(f"base64 must be a string, got {shorten(text)}")
    return text if scheme_of(text) == "data" else f"data:;base64,{text}"


# media


def is_frames(x) -> bool:
    """Whether a list is one video (of decoded frames or still images in any form) rather than a list of videos.

    Animated images are videos. Files are told apart by their first bytes, unless they are named as videos; URLs by
    their suffix.
    """
    return len(x) > 0 and all(map(_is_frame, x))


def _is_frame(frame) -> bool:
    if isinstance(frame, Image.Image):
        return not is_animated(frame)
    if isinstance(frame, (np.ndarray, torch.Tensor)):
        return frame.ndim in (2, 3)
    if isinstance(frame, (str, os.PathLike)):
        return _is_frame_path(os.fspath(frame))
    is_file = isinstance(frame, (bytes, bytearray, memoryview)) or hasattr(frame, "read")
    return is_file and image_kind(read_head(frame)) == "still"


def _is_frame_path(path) -> bool:
    """Whether a path or URL is one of a still image."""
    if not isinstance(path, str):
        return False
    scheme = scheme_of(path)
    if scheme == "data":
        return _is_frame_url(path)
    if scheme in ("http", "https"):
        try:
            return urllib.parse.urlsplit(path).path.lower().endswith(FRAME_SUFFIXES)
        except ValueError:
            return False
    if path.lower().endswith(VIDEO_SUFFIXES):
        return False
    try:
        kind = image_kind(read_head(local_path(path)))
    except ValueError:  # a file: URL of another machine
        kind = None
    return kind == "still" or (kind is None and path.lower().endswith(FRAME_SUFFIXES))


def _is_frame_url(url: str) -> bool:
    """Whether a `data:` URL holds a still image."""
    head, _, body = url[: 2 * HEAD].partition(",")
    if head.lower().endswith(";base64"):
        text = "".join(body.split()).replace("-", "+").replace("_", "/").rstrip("=")
        try:
            data = base64.b64decode(text[: len(text) // 4 * 4])
        except ValueError:
            return False
    else:
        data = urllib.parse.unquote_to_bytes(body.encode("utf-8", "replace"))
    return image_kind(data) == "still"


def part_kind(name) -> str | None:
    """ "text", "image" or "video": the kind of a part whose `type` is `name`; None if no part has this type."""
    return KINDS.get(name) if isinstance(name, str) else None


def medium_kind(medium: Mapping) -> str | None:
    """ "image" or "video" by a key ("image_url", "video_path", ...) or the `type`; None if neither shows it."""
    for kind, keys in SOURCE_KEYS.items():
        if any(key in medium for key in keys if kind in key):
            return kind
    kind = part_kind(medium.get("type"))
    return kind if kind in SOURCE_KEYS else None


def read_medium(kind: str, given, what: str | None = None) -> tuple:
    """(source, options) of a medium. A bare source has no options. The source of a dict without one is None.

    If a dict has bytes and a path, the bytes are the source: `datasets` gives undecoded images so.

    Args:
        kind: "image" or "video".
        given: a source, or a dict with a source and options. A dict may have the `type` of a part, which must be of
            this kind.
        what: names the medium in messages.

    Raises:
        ValueError: for an unknown key (with the nearest known one), for two sources, for options that contradict each
            other.
    """
    if not isinstance(given, Mapping):
        return given, {}
    what = what or f"{'an' if kind == 'image' else 'a'} {kind} given as a dict"
    given = _without_type(kind, given, what)
    source, inner_options = _read_source(kind, given, what)
    options = {
        name: value
        for name, value in given.items()
        if name not in SOURCE_KEYS[kind] and not (kind == "image" and name == "detail")
    }
    options = read_options(options, (*SOURCE_KEYS[kind], *MEDIUM_OPTIONS[kind]), what)
    return source, _join_options(inner_options, options, what)


def _without_type(kind: str, given: Mapping, what: str) -> Mapping:
    """The dict of a medium without its `type`. Raises ValueError for keys of other software that mean nothing here."""
    if given.get("type") is not None and part_kind(given["type"]) != kind:
        raise ValueError(f"{what} is of type {shorten(given['type'])}; expected {kind}")
    if kind == "video" and isinstance(given.get("frames"), (list, tuple)):
        raise ValueError(
            f"{what}: a list of frames goes under 'video', as in {{'video': frames, 'fps': rate}}; got it under "
            "'frames'"
        )
    detail = given.get("detail")
    if kind == "image" and detail not in (None, "auto"):
        raise ValueError(f"{what}: detail={shorten(detail)} is no option of MOSS-VL; give max_pixels, or leave it out")
    return {key: value for key, value in given.items() if key != "type" or value is None}


def _read_source(kind: str, given: Mapping, what: str) -> tuple:
    """(source or None, options) under `SOURCE_KEYS`. The value of such a key may be a dict with source and options."""
    found_key, source, options = None, None, {}
    for key in SOURCE_KEYS[kind]:
        value = given.get(key)
        if value is None or (key == "path" and given.get("bytes") is not None):
            continue
        if key == "bytes" and not isinstance(value, (bytes, bytearray, memoryview)):
            raise ValueError(f"{what}: its 'bytes' must be bytes, got {shorten(value)}; a path goes under 'path'")
        if isinstance(value, Mapping):
            value, inner = read_medium(kind, value, f"{what}, its {key!r}")
            if value is None:
                got = shorten(given[key])
                raise ValueError(
                    f"{what}: its {key!r} holds no {kind}, got {got}; expected one of {SOURCE_KEYS[kind]}"
                )
            options = _join_options(options, inner, what)
        elif key == "base64":
            value = _from_base64(value)
        if found_key is not None and not same_source(source, value):
            raise ValueError(
                f"{what} holds one {kind}, got two: {found_key}={shorten(source)} and {key}={shorten(value)}"
            )
        if kind == "image" and isinstance(value, (list, tuple)):
            raise ValueError(f"{what} holds one image, got a list of {len(value)}; write one dict per image")
        found_key, source = key, value
    return source, options


def _join_options(options: dict, more: dict, what: str) -> dict:
    """The options of both dicts. Raises ValueError if they contradict each other."""
    for name in options.keys() & more.keys():
        if options[name] is not more[name] and options[name] != more[name]:
            raise ValueError(f"{what}: {name} is given twice, as {shorten(options[name])} and {shorten(more[name])}")
    return {**options, **more}


def plain_medium(kind: str, source, options: Mapping):
    """The plain form of a medium: the bare source, or a dict if it has options or is a list of frames."""
    return {PLAIN_KEY[kind]: source, **options} if options or isinstance(source, (list, tuple)) else source


def count_placeholders(kind: str, medium) -> int:
    """The number of placeholders of a medium: one, or one per segment of a video.

    Raises:
        ValueError: if `segments` is no list, or an empty one.
    """
    if kind != "video" or not isinstance(medium, Mapping) or medium.get("segments") is None:
        return 1
    segments = medium["segments"]
    if isinstance(segments, str) or not hasattr(segments, "__len__") or len(segments) == 0:
        name = next((shorten(medium[key]) for key in SOURCE_KEYS["video"] if medium.get(key) is not None), "a video")
        raise ValueError(
            f"segments of {name} must be a list with at least one [start, end] or [time], got {shorten(segments)}"
        )
    return len(segments)


def same_medium(kind: str, a, b) -> bool:
    """Whether two media have the same source and the same options, in whatever form each is written."""
    (a, options), (b, others) = read_medium(kind, a), read_medium(kind, b)
    return (
        same_source(a, b)
        and options.keys() == others.keys()
        and all(_same_value(options[n], others[n]) for n in options)
    )


def _same_value(a, b) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same_value, a, b))
    return a is b or bool(a == b)


def locate(kind: str, medium, folder):
    """The plain medium, with relative paths (also those of a list of frames) joined to `folder`."""
    source, options = read_medium(kind, medium)

    def located(source):
        if isinstance(source, (list, tuple)):
            return [located(one) for one in source]
        if (
            isinstance(source, (str, os.PathLike))
            and scheme_of(source) is None
            and not os.fspath(source).startswith("~")
        ):
            return os.path.join(folder, source)
        return source

    return plain_medium(kind, located(source), options)


# parts


def read_part(part, what: str = "a part of a message") -> dict:
    """The plain form of a part (see the top of this file), a new dict.

    Raises:
        ValueError: for an unknown type, a part without its text, or several media in one part.
    """
    if isinstance(part, str):
        return {"type": "text", "text": part}
    given = {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
    name = given.pop("type", next((key for key in KINDS if key in given), None))
    if not isinstance(name, str) or name not in KINDS:
        near = nearest_name(name, KINDS) if isinstance(name, str) else None
        hint = f"; did you mean {near!r}?" if near else ""
        raise ValueError(
            f"{what} is a string, or a dict with 'type' {', '.join(KINDS)} and its text or medium; got "
            f"{shorten(part)}{hint}"
        )
    kind, what = KINDS[name], f"{what} of type {name}"
    return _read_text_part(given, what, part) if kind == "text" else _read_media_part(kind, given, what)


def _read_text_part(given: dict, what: str, part) -> dict:
    text = given.pop("text", None)
    if not isinstance(text, str):
        raise ValueError(f"{what} needs a string under 'text'; got {shorten(part)}")
    if given:
        more = ", ".join(map(repr, given))
        raise ValueError(f"{what} has a text and nothing else; got {more} in {shorten(part)}")
    return {"type": "text", "text": text}


def _read_media_part(kind: str, given: dict, what: str) -> dict:
    source, options = read_medium(kind, given, what)
    if source is None:
        if options:
            raise ValueError(f"{what} has {', '.join(options)}, but no {kind}; give both in one part, or neither")
        return {"type": kind}
    if (shape := getattr(source, "shape", None)) is not None and len(shape) > MOST_AXES[kind]:
        raise ValueError(f"{what} holds one {kind}, got an array of shape {list(shape)}; write a part per {kind}")
    return {"type": kind, kind: plain_medium(kind, source, options)}


def read_messages(messages, what: str = "a conversation") -> list[dict]:
    """Messages as new dicts whose content is a string or a list of plain parts; keys that are None are dropped.

    Raises:
        ValueError: for anything but a list of messages, unreadable parts, and media outside the content.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"{what} is a list of messages, dicts with 'role' and 'content'; got {shorten(messages)}")
    out = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(
                f"{what} is a list of messages, dicts with 'role' and 'content'; got {shorten(message)} as message "
                f"{index}"
            )
        content = message.get("content")
        if content is not None and not isinstance(content, (str, list, tuple)):
            raise ValueError(
                f"content of message {index} must be a string or a list of parts, got a {type(content).__name__}"
            )
        for key in message.keys() & MESSAGE_MEDIA.keys():
            _check_empty(f"message {index}", key, message[key])
        message = {key: value for key, value in message.items() if value is not None}
        if isinstance(content, (list, tuple)):
            message["content"] = [read_part(part) for part in content]
        out.append(message)
    return out


def _check_empty(what: str, key: str, value) -> None:
    """Raises ValueError if a key outside the content of a message holds media."""
    if value is None or (isinstance(value, (str, bytes, Sequence, Mapping)) and not value):
        return
    if (kind := MESSAGE_MEDIA[key]) == "audio":
        raise ValueError(f"{what} has {key!r}; MOSS-VL takes no audio, leave it out")
    raise ValueError(
        f"{what} has {key!r} outside its content, {shorten(value)}; put each medium into the content, as a part "
        f"{{'type': {kind!r}, {kind!r}: ...}}"
    )


def read_turns(name: str, given) -> list[dict]:
    """The turns of a training record as messages: {"role", "content"} in place of {"from", "value"}, and the roles
    user and assistant in place of human and gpt. Other keys of a turn stay.

    Args:
        name: the key of the record under which the turns were given, for error messages.

    Raises:
        ValueError: for anything but a list of dicts, and for a turn in both spellings.
    """
    if not isinstance(given, list) or not all(isinstance(turn, dict) for turn in given):
        either = "{'role', 'content'} or {'from', 'value'}"
        raise ValueError(f"{name} must be a list of turns, {either} each; got {shorten(given)}")
    turns = []
    for turn in given:
        if turn.get("from") is not None:
            if clash := [key for key in ("role", "content") if turn.get(key) is not None]:
                raise ValueError(
                    f"{name}: a turn has from and value or role and content, got from and {clash[0]} in "
                    f"{shorten(turn)}"
                )
            others = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
            turn = {"role": turn["from"], "content": turn.get("value"), **others}
        if isinstance(turn.get("role"), str):
            turn = {**turn, "role": ROLE_ALIASES.get(turn["role"], turn["role"])}
        turns.append(dict(turn))
    return turns


def media_before_text(media, text: str) -> list[dict]:
    """The content of a prompt: a plain part per (kind, medium), then the text."""
    return [*({"type": kind, kind: medium} for kind, medium in media), {"type": "text", "text": text}]


def check_no_placeholder(name: str, text: str) -> None:
    """Raises ValueError if a prompt has a placeholder, as its media come before the text."""
    if found := PLACEHOLDER.search(text):
        raise ValueError(
            f"{name} holds {found[0]!r}, but its media come before the prompt automatically; for another order "
            "use 'messages'"
        )


def are_complete_parts(content) -> bool:
    """Whether `content` is a list of plain parts that all have their text or medium."""

    def is_complete(part):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind is None or part_kind(kind) != kind:
            return False
        return isinstance(part.get(kind), str) if kind == "text" else part.get(kind) is not None

    return isinstance(content, list) and all(map(is_complete, content))


def split_placeholders(parts) -> Iterator[dict]:
    """Plain parts, with each placeholder of a text as an image or video part without its medium."""
    for part in parts:
        if part["type"] != "text":
            yield part
            continue
        for index, piece in enumerate(PLACEHOLDER.split(part["text"])):  # [text, kind, text, ..., text]
            if index % 2:
                yield {"type": piece}
            elif piece or piece == part["text"]:
                yield {"type": "text", "text": piece}


def write_placeholders(parts) -> str:
    """Plain parts as one text, with a placeholder per medium (per segment of a video with segments)."""
    return "".join(
        part["text"]
        if part["type"] == "text"
        else PLACEHOLDERS[part["type"]] * count_placeholders(part["type"], part.get(part["type"]))
        for part in parts
    )


def replace_media(messages, change: Callable) -> list[dict]:
    """Messages of plain parts with `change(kind, medium)` in place of each medium, as new dicts."""

    def changed(part: dict) -> dict:
        kind = part["type"]
        return part if kind == "text" or kind not in part else {**part, kind: change(kind, part[kind])}

    return [
        {**message, "content": [changed(part) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def collect_media(messages, kind: str) -> list:
    """The media of one kind in messages of plain parts, in order."""
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part[kind] for part in parts if part["type"] == kind and part.get(kind) is not None]


# media beside the messages


def fill_placeholders(kind: str, messages: list, media: list) -> None:
    """Puts `media` of one kind, in plain form, into the parts of the messages. Changes the messages.

    The texts of the messages have no placeholders. The number of media decides, in this order:
      * one per part without a medium: they fill these parts;
      * one per part: all media were given again, and the options of both are joined;
      * one placeholder per part, no part with a medium: consecutive parts, one per segment, become one part;
      * one placeholder per placeholder of the parts: the media of the parts were given again, with other divisions
        into segments: two parts with a segment each may be one video with two segments.

    Raises:
        ValueError: for any other number, and for a medium that differs from the one in its part.
    """
    parts = [part for message in messages for part in message["content"] if part["type"] == kind]
    empty = [part for part in parts if kind not in part]
    placeholders = sum(count_placeholders(kind, medium) for medium in media)
    if len(media) == len(empty):
        for part, medium in zip(empty, media, strict=True):
            part[kind] = medium
    elif len(media) == len(parts):
        for number, (part, medium) in enumerate(zip(parts, media, strict=True)):
            part[kind] = _join_media(kind, number, part[kind], medium) if kind in part else medium
    elif len(empty) == len(parts) == placeholders:
        _fill_segments(kind, messages, media)
    elif not empty and placeholders == sum(count_placeholders(kind, part[kind]) for part in parts):
        _check_segments_again(kind, parts, media)
    else:
        filled = len(parts) - len(empty)
        also = f", and hold {filled} ({kind}s may also list all {len(parts)} again)" if filled else ""
        raise ValueError(
            f"the messages leave placeholders for {len(empty)} {kind}s{also}, but {kind}s holds {len(media)}; they "
            "must match"
        )


def _join_media(kind: str, number: int, medium, again):
    """The medium of a part, with the options of both places if it is given again in `images` or `videos`."""
    (source, options), (source_again, options_again) = read_medium(kind, medium), read_medium(kind, again)
    shared = options.keys() & options_again.keys()
    shared_options, shared_again = ({name: each[name] for name in shared} for each in (options, options_again))
    if not same_source(source, source_again):
        raise ValueError(
            f"{kind} {number} of the messages is {shorten(source)}, but {kind}s has {shorten(source_again)} at the "
            f"same index; expected the same, or no {kind}s if the messages hold all media"
        )
    if not same_medium(kind, plain_medium(kind, source, shared_options), plain_medium(kind, source, shared_again)):
        raise ValueError(
            f"{kind} {number} of the messages has the options {shorten(shared_options)}, but in {kind}s "
            f"{shorten(shared_again)}"
        )
    return plain_medium(kind, source, {**options_again, **options})


def _check_segments_again(kind: str, parts: list, media: list) -> None:
    """Raises ValueError unless `media` are the media of the parts, with segments divided differently into videos."""

    def split_segments(medium):
        source, options = read_medium(kind, medium)
        for segment in options.get("segments", [None]):
            yield plain_medium(kind, source, {**options, **({} if segment is None else {"segments": [segment]})})

    clips = [clip for part in parts for clip in split_segments(part[kind])]
    clips_again = [clip for medium in media for clip in split_segments(medium)]
    for number, (clip, again) in enumerate(zip(clips, clips_again, strict=True)):
        _join_media(kind, number, clip, again)
        if more := read_medium(kind, again)[1].keys() - read_medium(kind, clip)[1].keys():
            raise ValueError(
                f"{kind}s names {len(media)} {kind}s whose segments are {len(parts)} parts of the messages, and gives "
                f"them {', '.join(sorted(more))}; give these options in the parts"
            )


def _fill_segments(kind: str, messages: list, media: list) -> None:
    """Replaces the parts without a medium, one per segment, by one part per video. Changes the messages."""
    clips = iter([(medium, index) for medium in media for index in range(count_placeholders(kind, medium))])
    for message in messages:
        parts, previous = [], None  # previous: the video of the part before this one
        for part in message["content"]:
            if part["type"] != kind:
                parts.append(part)
                previous = None
                continue
            medium, index = next(clips)
            if index == 0:
                parts.append({"type": kind, kind: medium})
            elif previous is not medium:
                raise ValueError(
                    f"the segments of {shorten(medium)} are not consecutive in the messages; put their "
                    f"{PLACEHOLDERS[kind]} together, or give each segment as a separate video"
                )
            previous = medium
        message["content"] = parts


def for_template(messages) -> list[dict]:
    """Messages of plain parts as a chat template takes them: {"type": kind} for each placeholder of a medium."""
    out = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            parts = []
            for part in content:
                kind = part["type"]
                parts += [part] if kind == "text" else [{"type": kind}] * count_placeholders(kind, part.get(kind))
            message = {**message, "content": parts}
        out.append(message)
    return out
