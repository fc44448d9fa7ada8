"""Chat messages, their parts, and media as callers write them: to one plain form. Nothing is opened, and nothing given is changed.

A part of a message is a string or a dict with a `type`. A medium (an image or a video) is a source - a path, a URL, bytes, pixels, ... -
or a dict that holds a source under one of `SOURCE_KEYS` beside options of its own (options.py, those with `own`). A part of type image or
video is such a dict too. The plain forms are

    part      {"type": "text", "text": text}, {"type": "image", "image": medium}, {"type": "video", "video": medium};
              without its medium, a part holds the place of one that is given elsewhere
    medium    the bare source; if it has options, or is a list of frames, {"image": source, **options}, {"video_path": source, **options}
"""

import os
import re
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from PIL import Image

from .checks import nearest_name, shorten
from .options import names_of, read_options


PLACEHOLDER = re.compile(r"<\|(image|video)(?:_pad)?\|>")  # what stands for a medium in a text
PLACEHOLDERS = {"image": "<|image|>", "video": "<|video|>"}
KINDS = {
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
AXES = {"image": 3, "video": 4}  # of an array
PLAIN_KEY = {"image": "image", "video": "video_path"}
OWN_OPTIONS = {kind: names_of(kind, own=True) for kind in SOURCE_KEYS}
SCHEMES = ("data", "file", "http", "https")
# Keys of a message in which other software puts media beside the content. Nothing here reads them, so they are errors.
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
ORIENTATION = 0x0112  # the EXIF tag that says how an image is turned


# sources


def scheme_of(source) -> str | None:
    """ "data", "file", "http" or "https" of a URL; None for a path and everything else."""
    if isinstance(source, str) and ":" in source[:6]:
        scheme = source[: source.index(":")].lower()
        return scheme if scheme in SCHEMES else None
    return None


def file_of(source):
    """The path of a source that is a `file:` URL or begins with `~`; other sources as they are. ValueError for another machine's file."""
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
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
    """Whether two sources are the same one: the same object, file, URL, bytes, pixels, or lists of such. A relative path is taken from the
    working directory."""
    if a is b:
        return True
    a, b = (os.path.abspath(x) if isinstance(x, str) and scheme_of(x) is None else x for x in map(file_of, (a, b)))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same_source, a, b))
    if isinstance(a, Image.Image) and isinstance(
        b, Image.Image
    ):  # of any classes: a copy of a JpegImageFile is an Image
        return _same_image(a, b)
    if type(a) is not type(b):
        return False
    try:
        return bool(a == b)
    except (ValueError, TypeError, RuntimeError):  # arrays and tensors, whose == has many answers
        return a.shape == b.shape and bool((a == b).all())


def _same_image(a: Image.Image, b: Image.Image) -> bool:
    """Whether two Pillow images have the same mode, colours, pixels and orientation."""
    if (a.mode, a.size) != (b.mode, b.size):
        return False
    turned, transparent = (
        [one.getexif().get(ORIENTATION, 1) for one in (a, b)],
        [one.info.get("transparency") for one in (a, b)],
    )
    if turned[0] != turned[1] or transparent[0] != transparent[1] or a.getpalette() != b.getpalette():
        return False
    return a.tobytes() == b.tobytes()


def _from_base64(text) -> str:
    """The data: URL of a base64 string."""
    text = text.decode("ascii", "replace") if isinstance(text, (bytes, bytearray)) else text
    if not isinstance(text, str):
        raise ValueError(f"base64 must be a string, got {shorten(text)}")
    return text if scheme_of(text) == "data" else f"data:;base64,{text}"


# media


def is_frames(x) -> bool:
    """Whether a list is one video, of decoded frames or of picture files, rather than a list of videos."""

    def is_frame(frame) -> bool:
        if isinstance(frame, (str, os.PathLike)):
            return os.fspath(frame).lower().endswith((".jpg", ".jpeg", ".png", ".bmp", ".webp"))
        return isinstance(frame, Image.Image) or (
            isinstance(frame, (np.ndarray, torch.Tensor)) and frame.ndim in (2, 3)
        )

    return len(x) > 0 and all(map(is_frame, x))


def kind_of(name) -> str | None:
    """ "text", "image" or "video", the kind of a part whose `type` is this name; None if no part has such a type."""
    return KINDS.get(name) if isinstance(name, str) else None


def read_medium(kind: str, given, what: str | None = None) -> tuple:
    """(source, options) of a medium: the bare source with no options, or what its dict says. The source is None where the dict has none.

    `kind`: "image" or "video". `what` names the medium in messages. A dict may have the `type` of a part, which must be of this kind. Raises
    ValueError for a key that is not known, with the nearest, and for two sources. A path beside bytes says where these were, as in an
    undecoded image of datasets.
    """
    if not isinstance(given, Mapping):
        return given, {}
    what = what or f"{'an' if kind == 'image' else 'a'} {kind} given as a dict"
    if given.get("type") is not None:
        if kind_of(given["type"]) != kind:
            raise ValueError(f"{what} is of type {shorten(given['type'])}; expected {kind}")
        given = {key: value for key, value in given.items() if key != "type"}
    found, options, detail = None, {}, given.get("detail")
    if kind == "video" and isinstance(given.get("frames"), (list, tuple)):
        raise ValueError(
            f"{what}: a list of frames goes under 'video', as in {{'video': frames, 'fps': rate}}; got it under 'frames'"
        )
    if kind == "image" and detail not in (None, "auto"):
        raise ValueError(f"{what}: detail={shorten(detail)} is no option of MOSS-VL; give max_pixels, or leave it out")
    for key in SOURCE_KEYS[kind]:
        value = given.get(key)
        if value is None or (key == "path" and given.get("bytes") is not None):
            continue
        if key == "bytes" and not isinstance(value, (bytes, bytearray, memoryview)):
            raise ValueError(f"{what}: its 'bytes' must be bytes, got {shorten(value)}; a path goes under 'path'")
        if isinstance(value, Mapping):
            value, inner = read_medium(kind, value, f"{what}, its {key!r}")
            if value is None:
                raise ValueError(
                    f"{what}: its {key!r} holds no {kind}, got {shorten(given[key])}; expected one of {SOURCE_KEYS[kind]}"
                )
            options = _joined(options, inner, what)
        elif key == "base64":
            value = _from_base64(value)
        if found is not None and not same_source(found[1], value):
            raise ValueError(
                f"{what} holds one {kind}, got two: {found[0]}={shorten(found[1])} and {key}={shorten(value)}"
            )
        if kind == "image" and isinstance(value, (list, tuple)):
            raise ValueError(f"{what} holds one image, got a list of {len(value)}; give each its own")
        found = (key, value)
    own = {
        name: value
        for name, value in given.items()
        if name not in SOURCE_KEYS[kind] and not (kind == "image" and name == "detail")
    }
    options = _joined(options, read_options(own, (*SOURCE_KEYS[kind], *OWN_OPTIONS[kind]), what), what)
    return None if found is None else found[1], options


def _joined(options: dict, more: dict, what: str) -> dict:
    for name in options.keys() & more.keys():
        if options[name] is not more[name] and options[name] != more[name]:
            raise ValueError(f"{what}: {name} is given twice, as {shorten(options[name])} and {shorten(more[name])}")
    return {**options, **more}


def plain_medium(kind: str, source, options: Mapping):
    """The medium as one object: the bare source, or a dict if it has options or is a list (of a video's frames)."""
    return {PLAIN_KEY[kind]: source, **options} if options or isinstance(source, (list, tuple)) else source


def clips_of(kind: str, medium) -> int:
    """How many placeholders a medium has: one, or one for each segment of a video. ValueError for segments that are no list."""
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
    """Whether two media are the same source with the same options, however each is written."""
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
    """The medium, plain, with relative paths taken from `folder`: also those of a list of frames. URLs, `~` and all else stay."""
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
    """The plain form of a part (see the top), a new dict. Raises ValueError: what was got, what was expected."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    given = {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
    name = given.pop("type", next((key for key in KINDS if key in given), None))
    if not isinstance(name, str) or name not in KINDS:
        near = nearest_name(name, KINDS) if isinstance(name, str) else None
        hint = f"; did you mean {near!r}?" if near else ""
        raise ValueError(
            f"{what} is a string, or a dict with 'type' {', '.join(KINDS)} and its text or medium; got {shorten(part)}{hint}"
        )
    kind = KINDS[name]
    if kind == "text":
        text = given.pop("text", None)
        if not isinstance(text, str):
            raise ValueError(f"{what} of type {name} needs a string under 'text'; got {shorten(part)}")
        if given:
            raise ValueError(
                f"{what} of type {name} has a text and nothing else; got {', '.join(map(repr, given))} in {shorten(part)}"
            )
        return {"type": "text", "text": text}
    source, options = read_medium(kind, given, f"{what} of type {name}")
    if source is None:
        if options:
            raise ValueError(
                f"{what} of type {name} has {', '.join(options)}, but no {kind}; give both in one part, or neither"
            )
        return {"type": kind}
    if (shape := getattr(source, "shape", None)) is not None and len(shape) > AXES[kind]:
        raise ValueError(
            f"{what} of type {name} holds one {kind}, got an array of shape {list(shape)}; give each its own part"
        )
    return {"type": kind, kind: plain_medium(kind, source, options)}


def read_messages(messages, what: str = "a conversation") -> list[dict]:
    """Messages with content that is a string or a list of plain parts: new dicts, without keys that are None. Other keys of a message
    stay, unless they hold media: those have their place in the content, and elsewhere are a ValueError."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"{what} is a list of messages, dicts with 'role' and 'content'; got {shorten(messages)}")
    out = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(
                f"{what} is a list of messages, dicts with 'role' and 'content'; got {shorten(message)} as message {index}"
            )
        content = message.get("content")
        if content is not None and not isinstance(content, (str, list, tuple)):
            raise ValueError(
                f"content of message {index} must be a string or a list of parts, got a {type(content).__name__}"
            )
        for key in message.keys() & MESSAGE_MEDIA.keys():
            _check_beside(f"message {index}", key, message[key])
        message = {key: value for key, value in message.items() if value is not None}
        if isinstance(content, (list, tuple)):
            message["content"] = [read_part(part) for part in content]
        out.append(message)
    return out


def _check_beside(what: str, key: str, value) -> None:
    """ValueError for media that stand in a message, but not in its content. An empty value says nothing."""
    if value is None or (isinstance(value, (str, bytes, Sequence, Mapping)) and not value):
        return
    if (kind := MESSAGE_MEDIA[key]) == "audio":
        raise ValueError(f"{what} has {key!r}; MOSS-VL takes no audio, leave it out")
    raise ValueError(
        f"{what} has {key!r} beside its content, {shorten(value)}; put each medium into the content, as a part "
        f"{{'type': {kind!r}, {kind!r}: ...}}"
    )


def split_places(parts) -> Iterator[dict]:
    """Plain parts in which no text holds a placeholder: each placeholder of a text is a part without its medium."""
    for part in parts:
        if part["type"] != "text":
            yield part
            continue
        for index, piece in enumerate(PLACEHOLDER.split(part["text"])):  # text, kind, text, kind, ..., text
            if index % 2:
                yield {"type": piece}
            elif piece or piece == part["text"]:
                yield {"type": "text", "text": piece}


def media_of(messages, kind: str) -> list:
    """The media of one kind in messages of plain parts, in order."""
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part[kind] for part in parts if part["type"] == kind and part.get(kind) is not None]


def fill_places(kind: str, messages: list, media: list) -> None:
    """Gives parts of messages, changed in place, the `media` of `kind` that came beside the messages, plain and in order.

    Messages have plain parts, without placeholders in their texts. The media fill the parts without one; or name again all media of the
    messages, and what both say of one is joined; or name again all their segments, otherwise divided into media; or have one part without a
    medium for each of their segments, which become one part.
    Raises ValueError for other numbers, and for a medium that is named again but is another one.
    """
    parts = [part for message in messages for part in message["content"] if part["type"] == kind]
    empty = [part for part in parts if kind not in part]
    if len(media) == len(empty):
        for part, medium in zip(empty, media, strict=True):
            part[kind] = medium
        return
    if len(media) == len(parts):  # named again
        for number, (part, medium) in enumerate(zip(parts, media, strict=True)):
            part[kind] = _same_again(kind, number, part[kind], medium) if kind in part else medium
        return
    if len(empty) == len(parts) == sum(clips_of(kind, medium) for medium in media):
        _fill_clips(kind, messages, media)  # a place for each segment
        return
    if not empty and sum(clips_of(kind, part[kind]) for part in parts) == sum(
        clips_of(kind, medium) for medium in media
    ):
        _check_clips(kind, parts, media)
        return
    own = len(parts) - len(empty)
    also = f", and have {own} of their own ({kind}s may also name all {len(parts)} again)" if own else ""
    raise ValueError(
        f"the messages leave places for {len(empty)} {kind}s{also}, but {kind}s holds {len(media)}; they must match"
    )


def _same_again(kind: str, number: int, own, again):
    """A part's medium that `images` or `videos` names again, with the options of both."""
    (source, options), (other, others) = read_medium(kind, own), read_medium(kind, again)
    shared = options.keys() & others.keys()
    mine, theirs = ({name: each[name] for name in shared} for each in (options, others))
    if not same_source(source, other):
        raise ValueError(
            f"{kind} {number} of the messages is {shorten(source)}, but {kind}s has {shorten(other)} in its place; expected the same, or no "
            f"{kind}s beside messages that hold their own"
        )
    if not same_medium(kind, plain_medium(kind, source, mine), plain_medium(kind, source, theirs)):
        raise ValueError(
            f"{kind} {number} of the messages has the options {shorten(mine)}, but in {kind}s {shorten(theirs)}"
        )
    return plain_medium(kind, source, {**others, **options})


def _check_clips(kind: str, parts: list, media: list) -> None:
    """ValueError unless `media` are the parts' own again, their segments otherwise divided: two parts with a segment each are one video with
    both. The parts stay as they are."""

    def clips(medium):
        source, options = read_medium(kind, medium)
        for segment in options.get("segments", [None]):
            yield source, {**options, **({} if segment is None else {"segments": [segment]})}

    again = [clip for medium in media for clip in clips(medium)]
    for number, (own, other) in enumerate(
        zip([clip for part in parts for clip in clips(part[kind])], again, strict=True)
    ):
        own, other = plain_medium(kind, *own), plain_medium(kind, *other)
        _same_again(kind, number, own, other)
        if more := read_medium(kind, other)[1].keys() - read_medium(kind, own)[1].keys():
            raise ValueError(
                f"{kind}s names {len(media)} {kind}s, of which the messages show the segments in {len(parts)} parts, and says their "
                f"{', '.join(sorted(more))}; say it in the parts"
            )


def _fill_clips(kind: str, messages: list, media: list) -> None:
    """Gives the places of messages, one for each segment, to the videos: those of one video stand together, and become one part."""
    left = iter([(medium, clip) for medium in media for clip in range(clips_of(kind, medium))])
    for message in messages:
        parts, whole = [], None  # whole: the medium of which the part before is a segment
        for part in message["content"]:
            if part["type"] != kind:
                parts.append(part)
                whole = None
                continue
            medium, clip = next(left)
            if clip == 0:
                parts.append({"type": kind, kind: medium})
            elif whole is not medium:
                raise ValueError(
                    f"the segments of {shorten(medium)} stand apart in the messages; put their {PLACEHOLDERS[kind]} together, or give each "
                    "segment as a video of its own"
                )
            whole = medium
        message["content"] = parts


def for_template(messages) -> list[dict]:
    """Messages of plain parts as a chat template takes them: media parts reduced to their type, one part for each placeholder."""
    out = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            parts = []
            for part in content:
                kind = part["type"]
                parts += [part] if kind == "text" else [{"type": kind}] * clips_of(kind, part.get(kind))
            message = {**message, "content": parts}
        out.append(message)
    return out
