"""Sources of frames for realtime sessions: video files, cameras, screens, RTSP, folders that grow, records of streams,
and iterators of (image, seconds).

A source yields `Item`s. Frames of a camera, a screen, RTSP and a folder come when they are there, and a reader that
is too slow misses some. Frames of files and records come as fast as they are read; each has the time at which it
belongs.
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moss_vl.checks import shorten
from moss_vl.conversation import read_messages, scheme_of, write_placeholders
from moss_vl.image_reading import load_image
from moss_vl.video_reading import open_video


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
POLL_SECONDS = 0.2  # how often a folder is looked at
WRITING_SECONDS = 5.0  # after which an image in a folder that cannot be read is given up
# Devices by platform: (format of FFmpeg, default name)
CAMERAS = {"linux": ("v4l2", "/dev/video0"), "darwin": ("avfoundation", "0"), "win32": ("dshow", None)}
SCREENS = {"linux": ("x11grab", None), "darwin": ("avfoundation", "Capture screen 0"), "win32": ("gdigrab", "desktop")}
KINDS = (
    "a video file, a folder of images that grows, a .jsonl file of stream records, camera, camera:NAME, screen, "
    "screen:NAME, or an rtsp:// URL"
)


@dataclass(frozen=True)
class Item:
    """A frame with its time, or a prompt that belongs after the item before it."""

    seconds: float | None = None
    image: object = None
    prompt: str | None = None


@dataclass(frozen=True)
class Source:
    """Where items come from.

    Attributes:
        items: opens the source, and yields its items.
        is_live: whether frames come when they are there. Otherwise each has a time at which it belongs.
    """

    items: Callable[[], Iterator[Item]]
    is_live: bool


@dataclass(frozen=True)
class StreamRecord:
    """A stream in a JSONL file: how the session opens, and its frames and later prompts in order."""

    where: str
    system_prompt: str | None
    prompt: str
    order: list  # "frame" or the text of a prompt
    videos: list[tuple[object, list[float]]]  # source and times of each video
    allow_http: bool = False

    def items(self) -> Iterator[Item]:
        frames = (item for video, times in self.videos for item in frames_at(video, times, self.allow_http))
        for one in self.order:
            yield next(frames) if one is FRAME else Item(prompt=one)


FRAME = object()


@dataclass
class Clock:
    """Seconds since the start. Tests replace it."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    start: float = field(init=False)

    def __post_init__(self):
        self.start = self.now()

    def seconds(self) -> float:
        return self.now() - self.start


def find_source(name: str, fps: float = 1.0, allow_http: bool = False) -> Source:
    """The source that a command names. Files of records are read with `read_stream_records`.

    Args:
        name: a file, a folder, `camera[:NAME]`, `screen[:NAME]` or an rtsp:// URL.
        fps: frames per second to take of a video, a camera, a screen or a URL.

    Raises:
        ValueError, FileNotFoundError: for a name that is none of these.
    """
    kind, _, device = name.partition(":")
    if kind in ("camera", "screen") and not os.path.exists(name):
        file, form = find_device(kind, device or None)
        return Source(lambda: device_frames(file, fps, form=form), is_live=True)
    if kind in ("rtsp", "rtsps"):
        options = {"rtsp_transport": "tcp"}
        return Source(lambda: device_frames(name, fps, options=options), is_live=True)
    if os.path.isdir(name):
        return Source(lambda: folder_frames(Path(name)), is_live=True)
    if not os.path.exists(name) and scheme_of(name) is None:
        raise FileNotFoundError(f"no such source: {name}; expected {KINDS}")
    return Source(lambda: video_frames(name, fps, allow_http), is_live=False)


def iterator_source(pairs: Iterable) -> Source:
    """The source for an iterable of (image, seconds)."""
    return Source(lambda: (Item(seconds, image) for image, seconds in pairs), is_live=False)


# video files


def video_frames(source, fps: float, allow_http: bool = False) -> Iterator[Item]:
    """`fps` frames per second of a video, at 0, 1 / fps, 2 / fps, ..."""
    video = open_video(source, allow_http=allow_http)
    count = max(1, math.ceil(video.duration * fps - 1e-6))
    yield from _frames_of(video, [number / fps for number in range(count)])


def frames_at(source, times: list[float], allow_http: bool = False) -> Iterator[Item]:
    """The frames that a video shows at these times, which must not fall."""
    yield from _frames_of(open_video(source, allow_http=allow_http), times)


def _frames_of(video, times: list[float]) -> Iterator[Item]:
    numbers = video.shown_at(np.array(times)).tolist()
    decoded, image = video.frames(sorted(set(numbers)), problems=[]), None
    following = next(decoded, None)
    for seconds, number in zip(times, numbers, strict=True):
        while following is not None and following[0] <= number:
            image, following = following[2], next(decoded, None)
        if image is not None:  # None: no frame of a damaged video could be decoded so far
            yield Item(seconds, image)


# cameras, screens, network


def find_device(kind: str, name: str | None) -> tuple[str, str]:
    """(what FFmpeg opens, its format) of a camera or a screen of this computer.

    Raises:
        ValueError: on an unknown platform, or without a name where there is no default.
    """
    table = CAMERAS if kind == "camera" else SCREENS
    if sys.platform not in table:
        raise ValueError(f"a {kind} cannot be read on {sys.platform}; expected one of {', '.join(table)}")
    form, default = table[sys.platform]
    if form == "x11grab":
        default = os.environ.get("DISPLAY")
    elif form == "dshow" and name is not None:
        name = name if name.startswith("video=") else f"video={name}"
    elif form == "v4l2" and name is not None and name.isdigit():
        name = f"/dev/video{name}"
    if (name or default) is None:
        raise ValueError(f"no default {kind} is known here; name one: {kind}:NAME")
    return name or default, form


def device_frames(
    file: str, fps: float, form: str | None = None, options: dict | None = None, clock: Clock | None = None
) -> Iterator[Item]:
    """`fps` frames per second of a device or a URL, each with the seconds since the first one came.

    All frames are decoded, so that none waits in a buffer, and the newest one is taken when its time has come.

    Raises:
        ValueError: if it cannot be opened.
        ImportError: without PyAV.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("cameras, screens and RTSP need PyAV: pip install av") from error
    try:
        container = av.open(file, format=form, options=options or {})
    except (av.error.FFmpegError, OSError, ValueError) as error:
        kind = f" as {form}" if form else ""
        raise ValueError(f"{file} cannot be opened{kind}: {getattr(error, 'strerror', None) or error}") from error
    clock = clock or Clock()
    with container:
        start, due = None, 0.0
        for frame in container.decode(video=0):
            start = clock.seconds() if start is None else start
            seconds = clock.seconds() - start
            if seconds >= due:
                yield Item(seconds, frame.to_ndarray(format="rgb24"))
                due = max(due + 1 / fps, seconds)


# a folder that grows


def folder_frames(
    folder: Path, clock: Clock | None = None, is_over: Callable[[], bool] = lambda: False
) -> Iterator[Item]:
    """The images of a folder in the order in which they were written, and those that come later, without an end.

    The time of an image is that of its file, in seconds after the first one. A file that cannot be read is tried again
    while it is written, and skipped after `WRITING_SECONDS`.
    """
    clock = clock or Clock()
    done: set[str] = set()
    since: dict[str, float] = {}  # when an unreadable file was seen first
    first, seconds = None, 0.0
    while True:
        over = is_over()
        for written, name in sorted(_images_of(folder, done)):
            try:
                image = load_image(str(folder / name))
            except (ValueError, OSError) as error:
                if clock.seconds() - since.setdefault(name, clock.seconds()) > WRITING_SECONDS:
                    print(f"{folder / name} is skipped: {error}", file=sys.stderr)
                    done.add(name)
                continue
            done.add(name)
            first = written if first is None else first
            seconds = max(seconds, written - first)
            yield Item(seconds, image)
        if over:
            return
        clock.sleep(POLL_SECONDS)


def _images_of(folder: Path, done: set[str]) -> Iterator[tuple[float, str]]:
    """(time of its last change, name) of each new image file."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name not in done and entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file():
                yield entry.stat().st_mtime, entry.name


# records of streams


def read_stream_records(file: Path, allow_http: bool = False) -> list[StreamRecord]:
    """The records of a JSONL file of streams:

        {"messages": [{"role": "system", "content": "..."}, {"role": "user", "content": "Tell me when ..."},
                      {"role": "assistant", "content": "<|silence|><|video|><|silence|><|video|>..."}],
         "videos": [{"video_path": "clip.mp4", "segments": [[0], [1], ...]}]}

    The first system and user turns open the session. Each `<|video|>` of the assistant is a frame at the time of its
    segment. Later user turns come where they stand; the words of the assistant are not used. Relative paths start at
    the folder of the file.

    Raises:
        ValueError: for the first line that is no such record.
    """
    lines = file.read_text(encoding="utf-8-sig").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                records.append(_read_record(f"{file}:{number}", json.loads(line), file.parent, allow_http))
            except ValueError as error:
                raise ValueError(f"{file}:{number}: {error}") from error
    if not records:
        raise ValueError(f"{file} has no records; expected a JSON object per line")
    return records


def _read_record(where: str, record, folder: Path, allow_http: bool) -> StreamRecord:
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise ValueError(f"a record must be an object with messages, got {shorten(record)}")
    if record.get("images"):
        raise ValueError("a record of a stream has no images; expected its frames as segments of videos")
    videos = [_read_video(video, folder) for video in record.get("videos") or []]
    system, prompt, order = None, None, []
    for message in read_messages(record["messages"]):
        role, content = message.get("role"), message.get("content")
        content = write_placeholders(content) if isinstance(content, list) else content or ""
        frames = len(re.findall(re.escape("<|video|>"), content))
        if frames and role != "assistant":
            raise ValueError(f"a turn of the {role} has {frames} frames; expected frames in turns of the assistant")
        if role == "system" and system is None and prompt is None and not order:
            system = content
        elif role == "user" and prompt is None and not order:
            prompt = content
        elif role == "user":
            order.append(content)
        elif role == "assistant":
            order += [FRAME] * frames
        else:
            raise ValueError(f"a turn of {role!r} is at the wrong place; expected system, user, assistant, ...")
    frames, segments = sum(one is FRAME for one in order), sum(len(times) for _, times in videos)
    if frames != segments:
        raise ValueError(
            f"the turns have {frames} <|video|>, but the videos have {segments} segments; expected as many"
        )
    return StreamRecord(where, system, prompt or "", order, videos, allow_http)


def _read_video(video, folder: Path) -> tuple[object, list[float]]:
    """(source, times) of a video with one time per segment."""
    if not isinstance(video, dict) or not isinstance(video.get("video_path"), str):
        raise ValueError(f"a video must be {{'video_path': ..., 'segments': [[time], ...]}}, got {shorten(video)}")
    times = []
    for segment in video.get("segments") or []:
        is_time = isinstance(segment, list) and len(segment) == 1 and isinstance(segment[0], (int, float))
        if not is_time or segment[0] < (times[-1] if times else 0):
            raise ValueError(
                f"a segment of a stream must be [time], in seconds that do not fall, got {shorten(segment)}"
            )
        times.append(float(segment[0]))
    path = video["video_path"]
    return str(folder / path) if scheme_of(path) is None else path, times
