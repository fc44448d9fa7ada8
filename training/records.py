"""Training records: JSON lists and JSONL files -> conversations whose media were looked at. Nothing is decoded, no tensors here.

A record is an object of one of two forms:

    {"prompt": "What is this?", "response": "a star", "images": ["a.png"], "videos": [...], "system_prompt": "..."}
    {"messages": [{"role": "user", "content": "<|image|>What is this?"}, {"role": "assistant", "content": "a star"}],
     "images": ["a.png"]}

In the first form the images, and then the videos, stand before the prompt; all but `response` may be missing. In the second,
`messages` may also be called `conversations`, `role` and `content` `from` and `value`, the roles `human` and `gpt`. Content is a
text in which `<|image|>` and `<|video|>` stand for the media in their order, or a list of parts: strings, {"type": "text", "text"},
{"type": "image"} and {"type": "video"}. A part may hold its medium itself and options of its own, as conversation.py says; `images`
and `videos` may then name all of them again.

Images and videos are a path or a list of paths, taken from the data file's folder. A video may be {"video_path": path,
"segments": [[start, end], [time], ...]} (seconds): its segments stand one after the other for one `<|video|>`, or have one each.
Keys whose value is null count as missing, and "id" is left to the user.
"""

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path

from moss_vl.checks import nearest_name, shorten
from moss_vl.conversation import (
    PLACEHOLDER,
    SOURCE_KEYS,
    count_placeholders,
    fill_placeholders,
    is_frames,
    locate,
    read_medium,
    read_part,
    scheme_of,
    split_placeholders,
    write_placeholders,
)
from moss_vl.image_processing_moss_vl import MossVLImageProcessor
from moss_vl.image_reading import open_source, probe_image
from moss_vl.resizing import ANY_SIZE
from moss_vl.video_files import open_container
from moss_vl.video_processing_moss_vl import MossVLVideoProcessor


logger = getLogger(__name__)

MEDIA_KEYS = ("images", "videos", "system_prompt", "id")
PAIR_KEYS = ("prompt", "response")
CHAT_KEYS = ("messages", "conversations")
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
TURN_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
)  # the template's own: inside a text they would end a turn
LOOKING_THREADS = 8  # opening files waits for the disk
NAMED_RECORDS = 20  # bad ones that a message names
# Processors that set no limits of their own: what they refuse, every checkpoint's refuse.
ANY_IMAGES = MossVLImageProcessor(size=ANY_SIZE)
ANY_VIDEOS = MossVLVideoProcessor(size=ANY_SIZE, video_max_pixels=ANY_SIZE["longest_edge"], max_frames=2**31)


@dataclass(frozen=True)
class Record:
    """One conversation.

    Attributes:
        where: file and index, as messages name it.
        messages: [{"role": "system", "user" or "assistant", "content": text}]; the texts hold `<|image|>` for each image and
            `<|video|>` for each video, or for each segment of one.
        images, videos: plain media (conversation.py): paths and data: URLs, or dicts of one and its options. In the order of the text.
    """

    where: str
    messages: list[dict]
    images: list[str]
    videos: list


def read_records(files, skip_bad: bool = False, check=None) -> list[Record]:
    """The records of one data file or a list of them, each checked.

    Args:
        files: paths. A file that begins with `[` is a JSON list, any other has a JSON object a line.
        skip_bad: leave bad records out, with one warning.
        check: called with every record that is good so far; a ValueError it raises makes the record bad.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for a file that cannot be read at all, for bad records (file, index and reason of each; the first 20, then a
            count), and where no record is left.
    """
    files = [Path(file) for file in ([files] if isinstance(files, (str, os.PathLike)) else files)]
    rows = [row for file in files for row in _rows(file)]
    seconds = {}  # what the media looked at so far last, by path; None for what does not say

    def read(row):
        where, folder, value = row
        try:
            if isinstance(value, ValueError):
                raise value
            record = Record(where, *_conversation(value, folder))
            for kind, media in (("image", record.images), ("video", record.videos)):
                for medium in media:
                    _look(kind, medium, seconds)
            sources = [read_medium("video", video)[0] for video in record.videos]
            lengths = [None if isinstance(source, list) else seconds["video", source] for source in sources]
            check_options(record, ANY_IMAGES, ANY_VIDEOS, lengths)
            if check is not None:
                check(record)
            return record
        except (ValueError, OSError) as error:
            return f"{where}: {error}"

    with ThreadPoolExecutor(LOOKING_THREADS) as pool:
        found = list(pool.map(read, rows))
    records = [one for one in found if isinstance(one, Record)]
    bad = [one for one in found if isinstance(one, str)]
    names = ", ".join(map(str, files))
    if bad:
        lines = [f"{len(bad)} of the {len(rows)} records are bad:", *bad[:NAMED_RECORDS]]
        if len(bad) > NAMED_RECORDS:
            lines.append(f"and {len(bad) - NAMED_RECORDS} more")
        if not skip_bad:
            raise ValueError("\n  ".join(lines) + "\nMend them, or leave them out with --skip-bad.")
        logger.warning("%s", "\n  ".join([*lines, "They are left out."]))
    if not records:
        raise ValueError(
            f"{names}: no {'good ' if bad else ''}record; expected a JSON list of objects, or a JSON object a line"
        )
    return records


def check_options(record: Record, images, videos, seconds=None, **options) -> None:
    """ValueError for options of a record's media that are wrong, or that do not fit each other, the settings of the processors of `images`
    and `videos`, or the `options` of a call to these. `seconds`: how long each video is, None if unknown."""
    images_options, videos_options = (
        {n: x for n, x in options.items() if n in processor.option_names} for processor in (images, videos)
    )
    if record.images:
        images.check(record.images, **images_options)
    if record.videos:
        videos.check(record.videos, seconds=seconds, **videos_options)


def _rows(file: Path) -> list[tuple]:
    """(where, folder, value) of each record of a file; the value of a line that is no JSON is a ValueError."""
    if not file.is_file():
        raise FileNotFoundError(f"no such data file: {file}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}; expected a JSON list or JSONL") from None
    if text.lstrip()[:1] == "[":
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} begins like a JSON list, but is not one: {error}") from None
        return [(f"{file}, record {index}", file.parent, value) for index, value in enumerate(values)]
    if file.suffix == ".json" and text.lstrip()[:1] == "{":
        try:
            return [(f"{file}, record 0", file.parent, json.loads(text))]
        except json.JSONDecodeError:
            pass  # lines of JSON may be called .json, too
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                value = ValueError(
                    f"not a JSON object: {error}; expected one a line, or a JSON list as the whole file"
                )
            rows.append((f"{file}, record {len(rows)} (line {number})", file.parent, value))
    return rows


# conversations


def _conversation(raw, folder: Path) -> tuple[list[dict], list, list]:
    """Messages, images and videos of a record. Raises ValueError."""
    raw = _keys("a record", raw, (*MEDIA_KEYS, *PAIR_KEYS, *CHAT_KEYS))
    given = [name for name in CHAT_KEYS if name in raw]
    pair = [name for name in PAIR_KEYS if name in raw and not (given and name == "prompt" and raw[name] == "")]
    if len(given) + bool(pair) != 1:
        got = ", ".join([*pair, *given]) or "neither"
        raise ValueError(f"expected prompt and response, or else messages or conversations; got {got}")
    media = {kind: _media(kind, raw.get(f"{kind}s"), folder) for kind in SOURCE_KEYS}
    turns = _turns(raw[given[0]], given[0], folder) if given else _pair(raw, media)
    for index, (role, parts) in enumerate(turns):
        if role == "assistant" and not any(part["type"] == "text" and part["text"].strip() for part in parts):
            raise ValueError("the response is empty" if pair else f"turn {index}, the assistant's, is empty")
    system = raw.get("system_prompt")
    if system is not None and not isinstance(system, str):
        raise ValueError(f"system_prompt must be a string, got {system!r:.60}")
    if system:
        if turns[0][0] == "system":
            raise ValueError(
                "the messages begin with a system turn, and there is a system_prompt; leave out one of them"
            )
        turns = [("system", [{"type": "text", "text": _text("system_prompt", system)}]), *turns]
    _check_roles([role for role, _ in turns])

    messages = [{"role": role, "content": parts} for role, parts in turns]
    images, videos = (_deal(kind, messages, [] if pair else media[kind]) for kind in SOURCE_KEYS)
    return [{**message, "content": write_placeholders(message["content"])} for message in messages], images, videos


def _pair(raw: dict, media: dict) -> list[tuple[str, list]]:
    """The turns of {"prompt", "response"}: media, then the prompt."""
    prompt, response = raw.get("prompt", ""), raw.get("response")
    if response is None:
        raise ValueError("there is a prompt, but no response")
    for name, text in (("prompt", prompt), ("response", response)):
        if not isinstance(text, str):
            raise ValueError(f"{name} must be a string, got {text!r:.60}")
        if found := PLACEHOLDER.search(text):
            raise ValueError(
                f"{name} holds {found[0]!r}, but media come before a prompt by themselves; for another order use 'messages'"
            )
    places = [{"type": kind, kind: medium} for kind in SOURCE_KEYS for medium in media[kind]]
    question, answer = (
        {"type": "text", "text": _text(*pair)} for pair in (("prompt", prompt), ("response", response))
    )
    return [("user", [*places, question]), ("assistant", [answer])]


def _turns(messages, name: str, folder: Path) -> list[tuple[str, list]]:
    """(role, plain parts) of each message."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name} must be a list of at least one {{'role', 'content'}}, got {messages!r:.60}")
    turns = []
    for index, message in enumerate(messages):
        what = f"turn {index}"
        message = _keys(what, message, ("role", "content", "from", "value"))
        keys = ("from", "value") if "from" in message else ("role", "content")
        if message.keys() != set(keys):
            raise ValueError(
                f"{what}: expected role and content, or from and value; got {', '.join(message) or 'nothing'}"
            )
        role, content = (message[key] for key in keys)
        if not isinstance(role, str) or role not in ROLES:
            near = nearest_name(role, ROLES)
            hint = f"did you mean {near!r}?" if near else f"known: {', '.join(ROLES)}"
            raise ValueError(f"{what}: unknown role {role!r}; {hint}")
        turns.append((ROLES[role], _parts(what, content, folder)))
    return turns


def _parts(what: str, content, folder: Path) -> list[dict]:
    """Plain parts, placeholders in texts as parts of their own, and media taken from `folder`."""
    if not isinstance(content, (str, list)):
        raise ValueError(f"{what}: content must be a string or a list of parts, got {content!r:.60}")
    parts = []
    for part in [content] if isinstance(content, str) else content:
        part = read_part(part, f"{what}: a part")
        kind = part["type"]
        if kind == "text":
            _text(what, part["text"])
        elif kind in part:
            part[kind] = _medium(kind, part[kind], folder)
        parts.append(part)
    return list(split_placeholders(parts))


def _check_roles(roles: list[str]) -> None:
    """Turns are the user's and the assistant's, the last one the assistant's; a system turn may come first."""
    if "assistant" not in roles:
        raise ValueError("there is no assistant turn, and nothing else is learned")
    if "system" in roles[1:]:
        raise ValueError(f"turn {roles.index('system', 1)} is a system turn; expected it at the beginning")
    if roles[0 if roles[0] != "system" else 1] != "user":
        raise ValueError("the conversation begins with the assistant; expected a user turn, if with empty content")
    if roles[-1] != "assistant":
        raise ValueError("the last turn is the user's, and nothing answers it; expected an assistant turn at the end")


def _deal(kind: str, messages: list, media: list) -> list:
    """Gives the places of `kind` without a medium theirs, in order; returns all media in the order of the text."""
    places = [part for message in messages for part in message["content"] if part["type"] == kind]
    empty = [place for place in places if kind not in place]
    clips = sum(count_placeholders(kind, medium) for medium in media)
    if len(empty) == len(places) == clips != len(media):
        return media  # a place for each segment, which stays as it is
    again = not empty and clips == sum(
        count_placeholders(kind, place[kind]) for place in places
    )  # each segment, otherwise divided into media
    if len(media) not in (len(empty), len(places)) and not again:
        own, of, hint = len(places) - len(empty), "", ""
        if clips != len(media) and not own:
            of = " (or one for each of their segments)"
        if own:
            of = f"; {own} more have their own, so that either {len(empty)} {kind}s are given, or all {len(places)} again"
        if any(f"<{kind}>" in part.get("text", "") for message in messages for part in message["content"]):
            hint = f"; the text says '<{kind}>', write '<|{kind}|>'"
        raise ValueError(f"the text has {len(empty)} places <|{kind}|>, but {len(media)} {kind}s{of} are given{hint}")
    fill_placeholders(kind, messages, media)
    return [place[kind] for place in places]


# values


def _keys(what: str, given, known) -> dict:
    """`given` without its nulls; ValueError where it is no object or has a key that is not known."""
    if not isinstance(given, dict):
        raise ValueError(f"{what} must be an object, got {given!r:.60}")
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in known:
            near = nearest_name(name, known)
            hint = f"did you mean {near!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{what} has an unknown key {name!r}; {hint}")
    return given


def _text(what: str, text) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{what}: a text must be a string, got {text!r:.60}")
    for token in TURN_TOKENS:
        if token in text:
            raise ValueError(f"{what} holds {token!r}, which training puts in by itself; leave it out")
    return text


def _media(kind: str, given, folder: Path) -> list:
    given = (
        []
        if given is None
        else given
        if isinstance(given, list) and not (kind == "video" and is_frames(given))
        else [given]
    )
    return [_medium(kind, medium, folder) for medium in given]


def _medium(kind: str, medium, folder: Path):
    """A plain medium: a path, a URL or a list of frames, or a dict of one and its options; relative paths taken from `folder`."""
    source, options = read_medium(kind, medium)
    frames = source if kind == "video" and isinstance(source, list) else [source]
    if not frames or not all(isinstance(one, str) and one for one in frames):
        expected = "a path" if kind == "image" else "a path, a list of frames, or {'video_path', 'segments'}"
        raise ValueError(f"expected {expected} for {kind}s, got {shorten(medium)}")
    for one in frames:
        if scheme_of(one) in ("http", "https"):
            raise ValueError(
                f"{kind} {shorten(one)} would be downloaded at every turn; download it once and give its path"
            )
    if "segments" in options:
        _check_segments(source, options["segments"])
    return locate(kind, medium, folder)


def _check_segments(source, segments) -> None:
    def is_time(x):
        return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)

    def is_segment(x):
        return isinstance(x, list) and len(x) in (1, 2) and all(map(is_time, x)) and (len(x) == 1 or x[0] < x[1])

    if not isinstance(segments, list) or not segments or not all(map(is_segment, segments)):
        raise ValueError(
            f"segments of {shorten(source)} must be a list of [start, end] with start < end, or [time], in seconds; got {segments!r:.100}"
        )


def _look(kind: str, medium, seconds: dict) -> None:
    """Opens a medium and reads its header. Raises FileNotFoundError, or ValueError for what is no image or video, or for a segment
    that lies behind the end by the header. Each path is looked at once."""
    source, options = read_medium(kind, medium)
    if isinstance(source, list):  # of frames
        for frame in source:
            _look("image", frame, seconds)
        return
    if (kind, source) not in seconds:
        if kind == "image":
            probe_image(source)
        seconds[kind, source] = _video_seconds(source) if kind == "video" else None
    length = seconds[kind, source]
    for segment in options.get("segments") or ():
        if segment[-1] < 0 or (length is not None and segment[0] > length):
            lasts = f", which lasts {length:.1f} s" if length else ""
            raise ValueError(f"segment {segment} lies outside {shorten(source)}{lasts}")


def _video_seconds(path: str) -> float | None:
    import av

    file, name = open_source(path, what="video")
    with open_container(file, name) as container:
        if not container.streams.video:
            raise ValueError(f"{name} has no video in it")
        return container.duration / av.time_base if container.duration else None
