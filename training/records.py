"""Training records: JSON lists and JSONL files -> conversations whose media were looked at. Nothing is decoded, no tensors here.

A record is an object of one of two forms:

    {"prompt": "What is this?", "response": "a star", "images": ["a.png"], "videos": [...], "system_prompt": "..."}
    {"messages": [{"role": "user", "content": "<|image|>What is this?"}, {"role": "assistant", "content": "a star"}],
     "images": ["a.png"]}

In the first form the images, and then the videos, stand before the prompt; all but `response` may be missing. In the second,
`messages` may also be called `conversations`, `role` and `content` `from` and `value`, the roles `human` and `gpt`. Content is a
text in which `<|image|>` and `<|video|>` stand for the media in their order, or a list of parts {"type": "text", "text"},
{"type": "image"} and {"type": "video"}; a part may hold its medium itself, under "image" or "video", "url" or "path".

Images and videos are a path or a list of paths, taken from the data file's folder. A video may be {"video_path": path,
"segments": [[start, end], [time], ...]} (seconds): its segments stand one behind the other for one `<|video|>`, or have one each.
Keys whose value is null count as missing, and "id" is left to the user.
"""

import json
import math
import os
import re
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path

if "moss_vl" not in sys.modules:  # the project's files, which import each other, as a package
    sys.modules["moss_vl"] = types.ModuleType("moss_vl")
    sys.modules["moss_vl"].__path__ = [str(Path(__file__).resolve().parent.parent)]
from moss_vl.image_processing_moss_vl import nearest_name, open_source, see_image  # noqa: E402


logger = getLogger(__name__)

MEDIA_KEYS = ("images", "videos", "system_prompt", "id")
PAIR_KEYS = ("prompt", "response")
CHAT_KEYS = ("messages", "conversations")
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
PART_TYPES = {"text": "text", "image": "image", "image_url": "image", "video": "video", "video_url": "video"}
PLACEHOLDER = re.compile(r"<\|(image|video)(?:_pad)?\|>")
TURN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")  # the template's own: inside a text they would end a turn
LOOKING_THREADS = 8  # opening files waits for the disk
NAMED_RECORDS = 20  # bad ones that a message names


@dataclass(frozen=True)
class Record:
    """One conversation.

    Attributes:
        where: file and index, as messages name it.
        messages: [{"role": "system", "user" or "assistant", "content": text}]; the texts hold `<|image|>` for each image and
            `<|video|>` for each video, or for each segment of one.
        images: paths or data: URLs. videos: the same, or {"video_path", "segments"}. Both in the order of the text.
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
        raise ValueError(f"{names}: no {'good ' if bad else ''}record; expected a JSON list of objects, or a JSON object a line")
    return records


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
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                value = ValueError(f"not a JSON object: {error}; expected one a line, or a JSON list as the whole file")
            rows.append((f"{file}, record {len(rows)} (line {number})", file.parent, value))
    return rows


# ------------------------------------------------------------------------------------------------------- conversations


def _conversation(raw, folder: Path) -> tuple[list[dict], list, list]:
    """Messages, images and videos of a record. Raises ValueError."""
    raw = _keys("a record", raw, (*MEDIA_KEYS, *PAIR_KEYS, *CHAT_KEYS))
    given = [name for name in CHAT_KEYS if name in raw]
    pair = [name for name in PAIR_KEYS if name in raw]
    if len(given) + bool(pair) != 1:
        got = ", ".join([*pair, *given]) or "neither"
        raise ValueError(f"expected prompt and response, or else messages or conversations; got {got}")
    media = {kind: _media(kind, raw.get(f"{kind}s"), folder) for kind in ("image", "video")}
    turns = _turns(raw[given[0]], given[0], folder) if given else _pair(raw, media)
    for index, (role, pieces) in enumerate(turns):
        if role == "assistant" and not any(piece[0] == "text" and piece[1].strip() for piece in pieces):
            raise ValueError("the response is empty" if pair else f"turn {index}, the assistant's, is empty")
    system = raw.get("system_prompt")
    if system is not None and not isinstance(system, str):
        raise ValueError(f"system_prompt must be a string, got {system!r:.60}")
    if system:
        if turns[0][0] == "system":
            raise ValueError("the messages begin with a system turn, and there is a system_prompt; leave out one of them")
        turns = [("system", [["text", _text("system_prompt", system)]]), *turns]
    _check_roles([role for role, _ in turns])

    images, videos = (_deal(kind, turns, [] if pair else media[kind]) for kind in ("image", "video"))
    messages = []
    for role, pieces in turns:
        content = "".join(value if kind == "text" else f"<|{kind}|>" * _clips(value) for kind, value in pieces)
        messages.append({"role": role, "content": content})
    return messages, images, videos


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
    places = [[kind, medium] for kind in ("image", "video") for medium in media[kind]]
    return [("user", [*places, ["text", _text("prompt", prompt)]]), ("assistant", [["text", _text("response", response)]])]


def _turns(messages, name: str, folder: Path) -> list[tuple[str, list]]:
    """(role, pieces) of each message. A piece is ["text", text], or ["image" or "video", its medium or None]."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name} must be a list of at least one {{'role', 'content'}}, got {messages!r:.60}")
    turns = []
    for index, message in enumerate(messages):
        what = f"turn {index}"
        message = _keys(what, message, ("role", "content", "from", "value"))
        keys = ("from", "value") if "from" in message else ("role", "content")
        if message.keys() != set(keys):
            raise ValueError(f"{what}: expected role and content, or from and value; got {', '.join(message) or 'nothing'}")
        role, content = (message[key] for key in keys)
        if not isinstance(role, str) or role not in ROLES:
            near = nearest_name(role, ROLES)
            hint = f"did you mean {near!r}?" if near else f"known: {', '.join(ROLES)}"
            raise ValueError(f"{what}: unknown role {role!r}; {hint}")
        turns.append((ROLES[role], _pieces(what, content, folder)))
    return turns


def _pieces(what: str, content, folder: Path) -> list[list]:
    if not isinstance(content, (str, list)):
        raise ValueError(f"{what}: content must be a string or a list of parts, got {content!r:.60}")
    pieces = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        kind = PART_TYPES.get(part.get("type")) if isinstance(part, dict) and isinstance(part.get("type"), str) else None
        if kind is None:
            raise ValueError(f"{what}: a part is an object with type {', '.join(PART_TYPES)}; got {part!r:.100}")
        if kind == "text":
            part = _keys(f"{what}: a part of type text", part, ("type", "text"))
            for index, piece in enumerate(PLACEHOLDER.split(_text(what, part.get("text")))):  # text, kind, text, kind, ..., text
                pieces.append([piece, None] if index % 2 else ["text", piece])
            continue
        names = (kind, f"{kind}_url", "url", "path")
        part = _keys(f"{what}: a part of type {kind}", part, ("type", *names))
        media = [part[name] for name in names if name in part]
        media = [medium["url"] if isinstance(medium, dict) and medium.keys() == {"url"} else medium for medium in media]
        if len(media) > 1:
            raise ValueError(f"{what}: a part holds one {kind}, got {len(media)}")
        pieces.append([kind, _medium(kind, media[0], folder) if media else None])
    return pieces


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


def _deal(kind: str, turns: list, media: list) -> list:
    """Gives the places of `kind` without a medium theirs, in order; returns all media in the order of the text."""
    places = [piece for _, pieces in turns for piece in pieces if piece[0] == kind]
    empty = [place for place in places if place[1] is None]
    clips = sum(map(_clips, media))
    if len(empty) == len(media):
        for place, medium in zip(empty, media):
            place[1] = medium
    elif len(empty) == clips and len(empty) == len(places):
        return media  # a place for each segment, which stays as it is
    else:
        of = " (or one for each of their segments)" if clips != len(media) else ""
        texts = "".join(piece[1] for _, pieces in turns for piece in pieces if piece[0] == "text")
        hint = f"; the text says '<{kind}>', write '<|{kind}|>'" if f"<{kind}>" in texts else ""
        raise ValueError(f"the text has {len(empty)} places <|{kind}|>, but {len(media)} {kind}s{of} are given{hint}")
    return [place[1] for place in places]


# --------------------------------------------------------------------------------------------------------------- values


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


def _clips(medium) -> int:
    """How many `<|video|>` stand for a video: one, or one for each segment. One for an image, and for a place without medium."""
    return len(medium["segments"]) if isinstance(medium, dict) and "segments" in medium else 1


def _media(kind: str, given, folder: Path) -> list:
    given = [] if given is None else given if isinstance(given, list) else [given]
    return [_medium(kind, medium, folder) for medium in given]


def _medium(kind: str, medium, folder: Path):
    """An image's path, or a video's path or {"video_path", "segments"}; relative paths taken from `folder`."""
    if kind == "video" and isinstance(medium, dict):
        medium = _keys("a video", medium, ("video_path", "segments"))
        path = _medium(kind, medium.get("video_path", ""), folder)
        return path if "segments" not in medium else {"video_path": path, "segments": _segments(path, medium["segments"])}
    if not isinstance(medium, str) or not medium:
        expected = "a path" if kind == "image" else "a path, or {'video_path', 'segments'}"
        raise ValueError(f"expected {expected} for {kind}s, got {medium!r:.100}")
    if medium.startswith(("http:", "https:")):
        raise ValueError(f"{kind} {medium!r} would be downloaded at every turn; download it once and give its path")
    return medium if medium.startswith(("data:", "file:")) else str(folder / medium)


def _segments(path: str, segments) -> list:
    def is_time(x):
        return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)

    def is_segment(x):
        return isinstance(x, list) and len(x) in (1, 2) and all(map(is_time, x)) and (len(x) == 1 or x[0] < x[1])

    if not isinstance(segments, list) or not segments or not all(map(is_segment, segments)):
        raise ValueError(
            f"segments of {path!r} must be a list of [start, end] with start < end, or [time], in seconds; got {segments!r:.100}"
        )
    return segments


def _look(kind: str, medium, seconds: dict) -> None:
    """Opens a medium and reads its header. Raises FileNotFoundError, or ValueError for what is no image or video, or for a segment
    that lies behind the end by the header. Each path is looked at once."""
    path = medium["video_path"] if isinstance(medium, dict) else medium
    if (kind, path) not in seconds:
        if kind == "image":
            see_image(path)
        seconds[kind, path] = _video_seconds(path) if kind == "video" else None
    length = seconds[kind, path]
    for segment in medium["segments"] if isinstance(medium, dict) else ():
        if segment[-1] < 0 or (length is not None and segment[0] > length):
            raise ValueError(f"segment {segment} lies outside {path!r}" + (f", which lasts {length:.1f} s" if length else ""))


def _video_seconds(path: str) -> float | None:
    import av

    file, name = open_source(path, what="video")
    reach = "file" if isinstance(file, str) else "data"  # a playlist in the file must not reach further
    try:
        file = f"file:{file}" if isinstance(file, str) else file
        with av.open(file, container_options={"protocol_whitelist": reach}, metadata_errors="ignore") as container:
            if not container.streams.video:
                raise ValueError(f"{name} has no video in it")
            return container.duration / av.time_base if container.duration else None
    except (av.error.FFmpegError, UnicodeError) as error:
        raise ValueError(f"{name} is not a video that PyAV can read: {getattr(error, 'strerror', error)}") from None
