"""Reads training records from JSON lists and JSONL files. Media are probed, not decoded.

A record is an object of one of two forms:

    {"prompt": "What is this?", "response": "a star", "images": ["a.png"], "videos": [...], "system_prompt": "..."}
    {"messages": [{"role": "user", "content": "<|image|>What is this?"}, {"role": "assistant", "content": "a star"}],
     "images": ["a.png"]}

In the first form, images and then videos come before the prompt; only `response` is required. In the second form,
`conversations` is another name of `messages`, `from` and `value` of `role` and `content`, `human` and `gpt` of the
roles `user` and `assistant`. Content is a text in which `<|image|>` and `<|video|>` stand for the media in their
order, or a list of parts: strings, {"type": "text", "text"}, {"type": "image"} and {"type": "video"}. A part may hold
its medium and options of that medium, as conversation.py describes; `images` and `videos` may then list all media
again.

Images and videos are a path or a list of paths, relative to the data file. A video may be {"video_path": path,
"segments": [[start, end], [time], ...]} (seconds); one `<|video|>` stands for all of its segments, or one for each.
Keys whose value is null count as absent, and "id" is ignored.
"""

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path

from moss_vl.animations import AnimatedImage, is_animation
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
from moss_vl.options import options_of
from moss_vl.resizing import ANY_SIZE
from moss_vl.video_packets import open_container
from moss_vl.video_processing_moss_vl import MossVLVideoProcessor


logger = getLogger(__name__)

MEDIA_KEYS = ("images", "videos", "system_prompt", "id")
PAIR_KEYS = ("prompt", "response")
CHAT_KEYS = ("messages", "conversations")
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
TURN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")  # inside a text they would end its turn
PROBE_THREADS = 8  # more than cores, as probing waits for the disk
NAMED_RECORDS = 20  # most bad records that a message lists
# Processors without limits: media that they reject are bad for every checkpoint.
UNLIMITED_IMAGES = MossVLImageProcessor(size=ANY_SIZE)
UNLIMITED_VIDEOS = MossVLVideoProcessor(size=ANY_SIZE, video_max_pixels=ANY_SIZE["longest_edge"], max_frames=2**31)


@dataclass(frozen=True)
class Record:
    """One conversation.

    Attributes:
        where: file and index, for messages.
        messages: [{"role": "system", "user" or "assistant", "content": text}]. The texts hold one `<|image|>` per
            image and one `<|video|>` per video, or per segment of a video.
        images, videos: plain media (conversation.py), paths, data: URLs, or dicts of one of these with its options, in
            the order of the text.
    """

    where: str
    messages: list[dict]
    images: list[str]
    videos: list


@dataclass(frozen=True)
class Entry:
    """A record as a data file has it, not checked."""

    where: str  # file and index
    folder: Path  # of the file
    value: object  # parsed JSON; a ValueError if the line is not JSON


def read_records(files, skip_bad: bool = False, check=None) -> list[Record]:
    """The checked records of one data file or of a list of files.

    Args:
        files: paths. A file that begins with `[` is a JSON list, any other file has one JSON object per line.
        skip_bad: skip bad records with one warning.
        check: called with every record that passed all other checks; if it raises a ValueError, the record is bad.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: for a file that cannot be read; for bad records (file, index and reason of the first 20, and the
            number of the others); if no record is left.
    """
    files = [Path(file) for file in ([files] if isinstance(files, (str, os.PathLike)) else files)]
    entries = [entry for file in files for entry in _read_entries(file)]
    seconds = {}  # (kind, path) of each medium probed so far -> its duration, None if unknown

    def read(entry):
        try:
            record = _read_record(entry, seconds)
            if check is not None:
                check(record)
            return record
        except (ValueError, OSError) as error:
            return f"{entry.where}: {error}"

    with ThreadPoolExecutor(PROBE_THREADS) as pool:
        found = list(pool.map(read, entries))
    records = [one for one in found if isinstance(one, Record)]
    bad = [one for one in found if isinstance(one, str)]
    if bad:
        _report_bad(bad, len(entries), skip_bad)
    if not records:
        names = ", ".join(map(str, files))
        raise ValueError(
            f"{names}: no {'good ' if bad else ''}record; expected a JSON list of objects, or one JSON object per line"
        )
    return records


def _read_record(entry: Entry, seconds: dict) -> Record:
    """The record of an entry, its media probed. Raises ValueError or OSError for a bad one."""
    if isinstance(entry.value, ValueError):
        raise entry.value
    record = Record(entry.where, *_read_conversation(entry.value, entry.folder))
    for kind, media in (("image", record.images), ("video", record.videos)):
        for medium in media:
            _probe(kind, medium, seconds)
    sources = [read_medium("video", video)[0] for video in record.videos]
    durations = [None if isinstance(source, list) else seconds["video", source] for source in sources]
    check_media_options(record, UNLIMITED_IMAGES, UNLIMITED_VIDEOS, durations)
    return record


def _report_bad(bad: list[str], total: int, skip_bad: bool) -> None:
    """Warns of bad records if they are skipped, else raises ValueError. `bad`: file, index and reason of each."""
    lines = [f"{len(bad)} of the {total} records are bad:", *bad[:NAMED_RECORDS]]
    if len(bad) > NAMED_RECORDS:
        lines.append(f"and {len(bad) - NAMED_RECORDS} more")
    if not skip_bad:
        raise ValueError("\n  ".join(lines) + "\nFix them, or skip them with --skip-bad.")
    logger.warning("%s", "\n  ".join([*lines, "They are skipped."]))


def check_media_options(record: Record, images, videos, seconds=None, **options) -> None:
    """Raises ValueError for options of a record's media that are wrong, or contradict each other or other settings.

    Args:
        images, videos: the processors whose settings apply.
        seconds: duration of each video, None if unknown.
        **options: options of a call to the processors.
    """
    if record.images:
        images.check(record.images, **options_of("image", options))
    if record.videos:
        videos.check(record.videos, seconds=seconds, **options_of("video", options))


def _read_entries(file: Path) -> list[Entry]:
    """The records of a file. Raises ValueError or FileNotFoundError if the file as a whole cannot be read."""
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
        return [Entry(f"{file}, record {index}", file.parent, value) for index, value in enumerate(values)]
    if file.suffix == ".json" and text.lstrip()[:1] == "{":
        try:
            return [Entry(f"{file}, record 0", file.parent, json.loads(text))]
        except json.JSONDecodeError:
            pass  # JSONL with the suffix .json
    return _read_lines(file, text)


def _read_lines(file: Path, text: str) -> list[Entry]:
    """The records of JSONL, one JSON object per line."""
    entries = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                value = ValueError(
                    f"not a JSON object: {error}; expected one per line, or a JSON list as the whole file"
                )
            entries.append(Entry(f"{file}, record {len(entries)} (line {number})", file.parent, value))
    return entries


# conversations


def _read_conversation(given, folder: Path) -> tuple[list[dict], list, list]:
    """Messages, images and videos of a record. Raises ValueError for a bad one."""
    given = _check_keys("a record", given, (*MEDIA_KEYS, *PAIR_KEYS, *CHAT_KEYS))
    chat = [name for name in CHAT_KEYS if name in given]
    pair = [name for name in PAIR_KEYS if name in given and not (chat and name == "prompt" and given[name] == "")]
    if len(chat) + bool(pair) != 1:
        got = ", ".join([*pair, *chat]) or "neither"
        raise ValueError(f"expected prompt and response, or else messages or conversations; got {got}")
    media = {kind: _read_media(kind, given.get(f"{kind}s"), folder) for kind in SOURCE_KEYS}
    turns = _read_turns(given[chat[0]], chat[0], folder) if chat else _read_pair(given, media)
    for index, (role, parts) in enumerate(turns):
        if role == "assistant" and not any(part["type"] == "text" and part["text"].strip() for part in parts):
            raise ValueError("the response is empty" if pair else f"turn {index}, the assistant's, is empty")
    turns = _with_system_prompt(turns, given.get("system_prompt"))
    _check_roles([role for role, _ in turns])

    messages = [{"role": role, "content": parts} for role, parts in turns]
    images, videos = (_assign_media(kind, messages, [] if pair else media[kind]) for kind in SOURCE_KEYS)
    return [{**message, "content": write_placeholders(message["content"])} for message in messages], images, videos


def _with_system_prompt(turns: list[tuple[str, list]], system) -> list[tuple[str, list]]:
    if system is not None and not isinstance(system, str):
        raise ValueError(f"system_prompt must be a string, got {system!r:.60}")
    if not system:
        return turns
    if turns[0][0] == "system":
        raise ValueError("the messages begin with a system turn, and there is a system_prompt; leave out one of them")
    return [("system", [{"type": "text", "text": _check_text("system_prompt", system)}]), *turns]


def _read_pair(given: dict, media: dict) -> list[tuple[str, list]]:
    """The turns of {"prompt", "response"}: media, then the prompt."""
    prompt, response = given.get("prompt", ""), given.get("response")
    if response is None:
        raise ValueError("there is a prompt, but no response")
    for name, text in (("prompt", prompt), ("response", response)):
        if not isinstance(text, str):
            raise ValueError(f"{name} must be a string, got {text!r:.60}")
        if found := PLACEHOLDER.search(text):
            raise ValueError(
                f"{name} holds {found[0]!r}, but its media come before the prompt automatically; "
                "for another order use 'messages'"
            )
    media_parts = [{"type": kind, kind: medium} for kind in SOURCE_KEYS for medium in media[kind]]
    question, answer = (
        {"type": "text", "text": _check_text(*pair)} for pair in (("prompt", prompt), ("response", response))
    )
    return [("user", [*media_parts, question]), ("assistant", [answer])]


def _read_turns(messages, name: str, folder: Path) -> list[tuple[str, list]]:
    """(role, plain parts) of each message."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name} must be a list of at least one {{'role', 'content'}}, got {messages!r:.60}")
    turns = []
    for index, message in enumerate(messages):
        what = f"turn {index}"
        message = _check_keys(what, message, ("role", "content", "from", "value"))
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
        turns.append((ROLES[role], _read_parts(what, content, folder)))
    return turns


def _read_parts(what: str, content, folder: Path) -> list[dict]:
    """The plain parts of a content. Placeholders become separate parts, and relative paths start at `folder`."""
    if not isinstance(content, (str, list)):
        raise ValueError(f"{what}: content must be a string or a list of parts, got {content!r:.60}")
    parts = []
    for part in [content] if isinstance(content, str) else content:
        part = read_part(part, f"{what}: a part")
        kind = part["type"]
        if kind == "text":
            _check_text(what, part["text"])
        elif kind in part:
            part[kind] = _read_medium(kind, part[kind], folder)
        parts.append(part)
    return list(split_placeholders(parts))


def _check_roles(roles: list[str]) -> None:
    """Raises ValueError unless a user turn comes first, after a system turn if any, and an assistant turn last."""
    if "assistant" not in roles:
        raise ValueError("there is no assistant turn, so there is nothing to learn")
    if "system" in roles[1:]:
        raise ValueError(f"turn {roles.index('system', 1)} is a system turn; expected it at the beginning")
    if roles[0 if roles[0] != "system" else 1] != "user":
        raise ValueError("the conversation begins with the assistant; expected a user turn, which may be empty")
    if roles[-1] != "assistant":
        raise ValueError("the last turn is the user's; expected an assistant turn at the end")


def _assign_media(kind: str, messages: list, media: list) -> list:
    """Assigns the `media` of a record to the parts of a kind. Returns all media of the kind, in text order."""
    parts = [part for message in messages for part in message["content"] if part["type"] == kind]
    empty = [part for part in parts if kind not in part]
    if len(empty) == len(parts) == sum(count_placeholders(kind, medium) for medium in media) != len(media):
        return media  # one placeholder per segment; the placeholders need not be consecutive
    try:
        fill_placeholders(kind, messages, media)
    except ValueError as error:
        texts = (part.get("text", "") for message in messages for part in message["content"])
        hint = f"; the text has '<{kind}>', write '<|{kind}|>'" if any(f"<{kind}>" in text for text in texts) else ""
        raise ValueError(f"{error}{hint}") from None
    return [part[kind] for part in parts]


# values


def _check_keys(what: str, given, known) -> dict:
    """`given` without its nulls. Raises ValueError if it is not an object or has an unknown key."""
    if not isinstance(given, dict):
        raise ValueError(f"{what} must be an object, got {given!r:.60}")
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in known:
            near = nearest_name(name, known)
            hint = f"did you mean {near!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{what} has an unknown key {name!r}; {hint}")
    return given


def _check_text(what: str, text) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{what}: a text must be a string, got {text!r:.60}")
    for token in TURN_TOKENS:
        if token in text:
            raise ValueError(f"{what} holds {token!r}, which training adds automatically; leave it out")
    return text


def _read_media(kind: str, given, folder: Path) -> list:
    """The plain media of `images` or `videos`, which may be a list or one medium."""
    if given is None:
        return []
    several = isinstance(given, list) and not (kind == "video" and is_frames(given))
    return [_read_medium(kind, medium, folder) for medium in (given if several else [given])]


def _read_medium(kind: str, medium, folder: Path):
    """A plain medium: a path, URL or list of frames, or a dict of one and its options; relative to `folder`."""
    source, options = read_medium(kind, medium)
    frames = source if kind == "video" and isinstance(source, list) else [source]
    if not frames or not all(isinstance(one, str) and one for one in frames):
        expected = "a path" if kind == "image" else "a path, a list of frames, or {'video_path', 'segments'}"
        raise ValueError(f"expected {expected} for {kind}s, got {shorten(medium)}")
    for one in frames:
        if scheme_of(one) in ("http", "https"):
            raise ValueError(
                f"{kind} {shorten(one)} would be downloaded in every epoch; download it once and give its path"
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
            f"segments of {shorten(source)} must be a list of [start, end] with start < end, or [time], in seconds; "
            f"got {segments!r:.100}"
        )


def _probe(kind: str, medium, seconds: dict) -> None:
    """Reads the header of a medium, once per path, and stores a video's duration in `seconds`.

    Raises FileNotFoundError, or ValueError if the file is no image or video, or a segment lies after the video's end.
    """
    source, options = read_medium(kind, medium)
    if isinstance(source, list):  # frames of a video
        for frame in source:
            _probe("image", frame, seconds)
        return
    if (kind, source) not in seconds:
        if kind == "image":
            probe_image(source)
        seconds[kind, source] = _video_seconds(source) if kind == "video" else None
    duration = seconds[kind, source]
    for segment in options.get("segments") or ():
        if segment[-1] < 0 or (duration is not None and segment[0] > duration):
            lasts = f", which lasts {duration:.1f} s" if duration else ""
            raise ValueError(f"segment {segment} lies outside {shorten(source)}{lasts}")


def _video_seconds(path: str) -> float | None:
    import av

    file, name = open_source(path, what="video")
    if is_animation(file):
        return AnimatedImage(file, name).duration
    with open_container(file, name) as container:
        if not container.streams.video:
            raise ValueError(f"{name} has no video in it")
        return container.duration / av.time_base if container.duration else None
