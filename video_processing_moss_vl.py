"""Videos to patches: which frames are taken, how large they get, how they are read, and the patches of each clip.

A clip is what one `<|video|>` stands for: a whole video or one segment of it. Axes: N frames of a video, n frames of a clip,
h rows, w columns, P patches. Times are in seconds from the first frame that is shown.
"""

import bisect
import io
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging
from transformers.video_processing_utils import BaseVideoProcessor

from .image_processing_moss_vl import (
    FIXED,
    MAX_SOURCE_PIXELS,
    SERVICE_KEYS,
    check_aspect,
    check_return_tensors,
    drop_fixed,
    grow,
    load_image,
    nearest_name,
    normalise,
    open_source,
    patchify,
    pixel_limits,
    positive_int,
    reject_unknown,
    resize_uint8,
    see_image,
    shrink,
    three_floats,
    to_format,
    with_knobs,
)


logger = logging.get_logger(__name__)

MAX_VIDEO_BYTES = 2**30  # of one video that is downloaded, or inside a data: URL
DOWNLOAD_SECONDS = 300.0
SEEK_PACKETS = 200  # a jump shorter than this reads through the packets between
DEFAULT_SIZE = {"shortest_edge": 4096, "longest_edge": 16777216}  # pixels of a frame
SIZES = ("size", "min_pixels", "max_pixels", "shortest_edge", "longest_edge")
MAX_REORDER = 16  # frames that a decoder holds back to put them in order
PROBE_FRAMES = 16  # decoded to see whether time stamps follow the pictures, where a stream leaves that open


# ---------------------------------------------------------------------------------------------------------- which frames


def frame_count(seconds: float, video_fps: float | None, num_frames: int | None, low: int, high: int) -> int:
    """How many frames are taken of so many seconds: by rate, or as many as `num_frames` says, within low..high."""
    count = num_frames if num_frames is not None else math.ceil(min(seconds * video_fps - 1e-6, high))
    return max(1, min(max(count, low), high))


def sample_indices(total: int, count: int) -> np.ndarray:
    """`count` of `total` frames, the first and the last among them: sorted int64, without duplicates."""
    return np.unique(np.linspace(0, total - 1, count).astype(np.int64))


def share_frames(total: int, lengths: list[float]) -> list[int]:
    """Shares of `total`: one each, the rest in proportion to `lengths`, by largest remainder (the earlier one where equal)."""
    rest, whole = total - len(lengths), sum(lengths)
    exact = [rest * length / whole if whole else rest / len(lengths) for length in lengths]
    shares = [math.floor(x) for x in exact]
    largest = sorted(range(len(lengths)), key=lambda i: shares[i] - exact[i])
    for i in largest[: max(0, rest - sum(shares))]:
        shares[i] += 1
    return [1 + share for share in shares]


def segment_times(segment: tuple[float, ...], count: int, last: float) -> np.ndarray:
    """Seconds at which a segment, [start, end) or [time], is looked at, moved into 0..last."""
    times = np.linspace(*segment, count, endpoint=False) if len(segment) == 2 else np.array(segment)
    return np.clip(times, 0.0, last)


def fit_video_size(height, width, frames, factor, min_pixels, max_pixels, share) -> tuple[int, int]:
    """(h, w) of a clip's frames, multiples of `factor` (processing.md, section 4).

    `min_pixels` and `max_pixels` bound one frame (the former also the clip), `share` all frames of the clip.
    """
    h, w = (round(side / factor) * factor for side in (height, width))
    if h * w > max_pixels:
        h, w = shrink(height, width, factor, math.sqrt(height * width / max_pixels))
    if frames * h * w > share:
        h, w = shrink(height, width, factor, math.sqrt(frames * height * width / share))
    if frames * h * w < min_pixels:
        h, w = grow(height, width, factor, math.sqrt(min_pixels / (frames * height * width)))
    if h * w < min_pixels:
        h, w = grow(height, width, factor, math.sqrt(min_pixels / (height * width)))
    return h, w


def read_segment(segment, name: str) -> tuple[float, ...]:
    """(start, end) or (time,) of what a caller gave; ValueError unless finite numbers with start < end."""
    try:
        times = tuple(float(x) for x in segment)
    except (TypeError, ValueError):
        times = ()
    if len(times) not in (1, 2) or not all(map(math.isfinite, times)):
        raise ValueError(f"{name}: segment {segment!r}; expected [start, end] or [time], in seconds")
    if len(times) == 2 and times[0] >= times[1]:
        raise ValueError(f"{name}: segment {segment!r} is {'empty' if times[0] == times[1] else 'reversed'}; expected start < end")
    return times


# ------------------------------------------------------------------------------------------------------ what all videos have


class Video:
    """A video whose frames can be asked for by number.

    Attributes: name (for messages), times (float64 [N]), duration (seconds), height, width (as shown), problems (what is
    damaged, in words), given_times (True where the times are the caller's, to be repeated as they are).
    """

    given_times = False

    def __init__(self, name: str, times: np.ndarray, duration: float, height: int, width: int, problems=()):
        if height * width > MAX_SOURCE_PIXELS:
            raise ValueError(f"{name} has frames of {width} x {height} pixels, over the limit of {MAX_SOURCE_PIXELS}")
        check_aspect(height, width, name)
        self.name, self.times, self.duration = name, times, duration
        self.height, self.width, self.problems = height, width, list(problems)

    @property
    def rate(self) -> float:
        """Frames a second, on average."""
        return len(self.times) / self.duration

    def real_times(self) -> np.ndarray | None:
        """`times` where they say more than number / rate: given, or off by more than a frame somewhere (variable rate)."""
        off = np.abs(self.times - np.arange(len(self.times)) / self.rate).max()
        return self.times if self.given_times or off > 1 / self.rate else None

    def shown_at(self, seconds: np.ndarray) -> np.ndarray:
        """Numbers of the frames on screen at these times. A frame counts from a millisecond early: containers round."""
        early = min(1e-3, 0.25 / self.rate)
        return np.clip(np.searchsorted(self.times, seconds + early, side="right") - 1, 0, None)

    def chunks(self, wanted: list[int], parts: int) -> list[list[int]]:
        """`wanted` (sorted) cut into at most `parts` that can be read side by side, with the same result as in one."""
        raise NotImplementedError

    def frames(self, wanted: list[int], problems: list[str], from_start: bool = False) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yields (number, shown, uint8 [h, w, 3]) for `wanted`, sorted numbers, as they are read.

        `shown` is below `number` where that frame cannot be decoded: then it is the one before, still on screen. A number for
        which there is none is left out. What is found damaged is added to `problems`.
        """
        raise NotImplementedError


def seconds_of(times: np.ndarray, last_length: float, rate: Fraction | None, tick: float) -> float:
    """Seconds from the first frame to the end of the last.

    Where the times are those of the nominal `rate`, rounded to ticks, N / rate without the rounding; else what they say.
    """
    if rate and np.abs(times - np.arange(len(times)) / float(rate)).max() <= 1.001 * tick:
        return float(len(times) / rate)
    return float(times[-1] + last_length)


# -------------------------------------------------------------------------------------------------------------- PyAV


class PyAVVideo(Video):
    """A file that PyAV reads, by an index of its packets. Nothing stays open between calls.

    A frame is known by its time stamp and decoded from the keyframe before it, on one thread: what is decoded side by side, or
    next, changes nothing. Where time stamps are missing or do not follow the pictures (AVI with B-frames, raw streams), frames
    are counted from the start of the file.
    """

    def __init__(self, av, file, name: str):
        self._av, self._file, self.name = av, file, name
        problems = []
        pts, dts, length, key, discard = [], [], [], [], []
        with self._open() as container:
            stream = self._stream(container)
            context, time_base, rate = stream.codec_context, stream.time_base, stream.average_rate
            first, seen, newest, reordered = None, [], None, not context.has_b_frames
            for packet in self._packets(container, stream, problems):
                pts.append(packet.pts)
                dts.append(packet.dts)
                length.append(max(0, packet.duration or 0))
                key.append(packet.is_keyframe)
                discard.append(packet.is_discard)
                reordered = reordered or (newest is not None and packet.pts is not None and packet.pts < newest)
                newest = packet.pts if packet.pts is not None else newest
                if packet.is_corrupt:
                    problems.append("a packet is cut short")
                if not seen or (not reordered and len(seen) < PROBE_FRAMES):
                    for frame in self._decode(context, packet, problems):
                        first = first or frame
                        seen.append(frame.pts)
            for frame in [] if seen else self._decode(context, None, problems):
                first = first or frame
                seen.append(frame.pts)
            listed = len(getattr(stream, "index_entries", ())) if container.format.name.startswith("mov") else 0
            announced = (container.duration or 0) / av.time_base - max(0, container.start_time or 0) / av.time_base
            slack = 1.0 + 0.1 * announced if len(container.streams) > 1 else 0.0
        if first is None:
            raise ValueError(f"{name}: none of its {len(pts)} video packets can be decoded ({'; '.join([context.name, *problems[:1]])})")

        # frames in the order in which they are shown: _shown their packets, _pts their time stamps (None: frames are counted)
        shown = np.flatnonzero(~np.array(discard))
        stamps = np.array(range(len(pts)) if None in pts else pts, np.int64)
        known_dts = [x for x in dts if x is not None]
        steady = None not in pts and len(np.unique(stamps[shown])) == len(shown) and bool(np.all(np.diff(known_dts) >= 0))
        in_order = None not in seen and all(a < b for a, b in zip(seen, seen[1:]))
        if steady and in_order:  # what leans on pictures before the start of the file is never shown
            shown = shown[stamps[shown] >= seen[0]]
        self._shown = shown[np.argsort(stamps[shown], kind="stable")]
        self._pts = stamps[self._shown].tolist() if steady and in_order else None
        self._stamps, self._discard, self._keys = stamps, discard, np.flatnonzero(key)

        nominal = 1 / float(rate or 25)
        if steady:
            times = (stamps[self._shown] - stamps[self._shown[0]]) * float(time_base)
            last = length[self._shown[-1]] * float(time_base) or (float(np.median(np.diff(times))) if len(times) > 1 else nominal)
        else:
            times, last = np.arange(len(shown)) * nominal, nominal
        duration = seconds_of(times, last, rate, float(time_base))
        if listed > len(pts) or (not listed and announced > duration + slack + 1.5 * duration / len(times)):
            problems.insert(0, f"it ends early, after {duration:.1f} s" + (f" of {announced:.1f}" if announced > duration else ""))
        matrix = self._matrix(first)
        turned = matrix is not None and matrix[0] == matrix[3] == 0
        size = (first.width, first.height) if turned else (first.height, first.width)
        super().__init__(name, times, duration, *size, problems)

    # ---- reading

    def _open(self):
        av = self._av
        if isinstance(self._file, str):  # the prefix keeps "concat:" and the like from being a protocol
            file, reach = "file:" + self._file, "file"
        else:
            file, reach = io.BytesIO(self._file.getvalue()), "data"  # a position of its own
        try:  # a playlist in the file must not reach further
            return av.open(file, container_options={"protocol_whitelist": reach}, metadata_errors="ignore")
        except (av.error.FFmpegError, UnicodeError) as error:
            raise ValueError(f"{self.name} is not a video that PyAV can read: {getattr(error, 'strerror', error)}") from error

    def _stream(self, container):
        """The video stream, with a decoder of one thread; a cover picture is none."""
        cover = self._av.stream.Disposition.attached_pic
        streams = [s for s in container.streams.video if not s.disposition & cover]
        if not streams or container.format.name == "tty":
            kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
            raise ValueError(f"{self.name} has no video in it: {container.format.long_name} with {kinds}")
        best = container.streams.best("video")
        stream = best if best in streams else streams[0]
        context = stream.codec_context
        if context is None:
            raise ValueError(f"{self.name}: no decoder for its video")
        context.thread_count = 1
        context.options = {**context.options, "max_pixels": str(MAX_SOURCE_PIXELS)}
        return stream

    def _packets(self, container, stream, problems: list[str]):
        """The packets of a stream, read on past damaged places."""
        failures = 0
        while failures < 16:
            try:
                for packet in container.demux(stream):
                    if packet.size:
                        failures = 0
                        yield packet
                return
            except self._av.error.FFmpegError as error:
                failures += 1
                problems.append(f"unreadable place: {error.strerror}")

    def _decode(self, context, packet, problems: list[str]):
        """The frames that come out after `packet` (None: what is left); none where it is damaged."""
        try:
            return context.decode(packet)
        except self._av.error.FFmpegError as error:
            problems.append(f"undecodable packet: {error.strerror}")
            return []

    @staticmethod
    def _matrix(frame) -> list[int] | None:
        """(a, b, c, d) of the display matrix, x' = a x + c y and y' = b x + d y, where one axis only goes into each."""
        data = frame.side_data.get("DISPLAYMATRIX")
        if data is None:
            return None
        a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
        straight = abs(a) + abs(d) >= abs(b) + abs(c)
        return [a, 0, 0, d] if straight else [0, b, c, 0]

    def _rgb(self, frame) -> np.ndarray:
        """uint8 [h, w, 3], upright, on white where it has transparency."""
        if any(part.is_alpha for part in frame.format.components) or frame.format.name == "pal8":
            array = np.asarray(load_image(frame.to_ndarray(format="rgba"), what=self.name))
        else:
            array = frame.to_ndarray(format="rgb24")
        matrix = self._matrix(frame)
        if matrix is not None:
            a, b, c, d = matrix
            if b or c:
                array, a, d = array.transpose(1, 0, 2), c, b
            array = array[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
        return array

    # ---- frames by number

    def _runs(self, wanted: list[int]) -> list[tuple[int, list[int]]]:
        """(first packet, numbers): what is decoded in one go, from a keyframe on. Runs do not overlap in the file."""
        if self._pts is None or not len(self._keys):
            return [(0, wanted)]
        stamps = self._stamps[self._keys]
        order = np.argsort(stamps, kind="stable")
        stamps, keys = stamps[order], self._keys[order]
        runs, end = [], -1  # end: last packet of the runs so far
        for number in wanted:
            packet = int(self._shown[number])
            at = int(np.searchsorted(stamps, self._pts[number], side="right")) - 1
            start = int(keys[at]) if at >= 0 and keys[at] <= packet else 0
            if runs and start <= end:
                runs[-1][1].append(number)
            else:
                runs.append((start, [number]))
            end = max(end, packet)
        return runs

    def chunks(self, wanted, parts):
        runs = self._runs(wanted)
        ends = np.cumsum([int(self._shown[numbers].max()) - start + 1 for start, numbers in runs])
        out = [[] for _ in range(parts)]
        for (_, numbers), end in zip(runs, ends):
            out[int(min(parts - 1, (end - 1) * parts // ends[-1]))] += numbers
        return [chunk for chunk in out if chunk]

    def frames(self, wanted, problems, from_start=False):
        reader = _PacketReader(self)
        try:
            for start, numbers in [(0, wanted)] if from_start else self._runs(wanted):
                before = self._keys[self._keys < start][-1:].tolist()
                for first in (start, *before):
                    found = []
                    try:
                        yield from self._run(reader, first, numbers, found)
                        break
                    except UntrueKeyframes:
                        if first == start and before:
                            continue
                        raise
                problems += found
        finally:
            reader.close()

    def _run(self, reader, start: int, numbers: list[int], problems: list[str]):
        """As `frames`, for the numbers of one run. Raises UntrueKeyframes, before it yields anything, where the packet `start`
        does not give a keyframe."""
        first = self._stamps[start] if start else self._stamps.min()
        trusted = start == 0 or self._discard[start]
        todo, late = numbers[::-1], {}  # late: number -> (number, frame) that stands in, until a damaged stream gives it after all
        shown, image = -1, None  # the newest frame, as RGB once that was needed

        def rgb(frame):
            return frame if isinstance(frame, np.ndarray) else self._rgb(frame)

        last = len(self._stamps) - 1 if self._pts is None else int(self._shown[numbers].max())
        for count, frame in enumerate(reader.decode(start, last, problems)):
            if self._pts is None:
                number = count
            elif frame.pts is None or frame.pts < first:  # a picture that leans on what lies before the keyframe
                continue
            else:
                trusted = trusted or (frame.key_frame and frame.pts == first)
                if not trusted:
                    break
                number = bisect.bisect_left(self._pts, frame.pts)
                if number == len(self._pts) or self._pts[number] != frame.pts:
                    continue
            if frame.is_corrupt:
                problems.append("a frame is damaged")
            if number in late:
                del late[number]
                yield number, number, self._rgb(frame)
            if number <= shown:
                continue
            while todo and todo[-1] < number:
                late[todo.pop()] = shown, image
            for missing in [x for x in late if x < number - MAX_REORDER]:
                at, stand_in = late.pop(missing)
                if at >= 0:
                    yield missing, at, rgb(stand_in)
            shown, image = number, frame
            if todo and todo[-1] == number:
                image = self._rgb(frame)
                yield todo.pop(), number, image
            if not todo and not late:
                return
        if not trusted:
            raise UntrueKeyframes(self.name)
        late.update((missing, (shown, image)) for missing in reversed(todo))
        for missing, (at, stand_in) in late.items():
            if at >= 0:
                yield missing, at, rgb(stand_in)


class UntrueKeyframes(Exception):
    """Packets flagged as keyframes are none: the whole video has to be decoded from its start."""


class _PacketReader:
    """One pass over the packets of a `PyAVVideo`, forwards: counts them, jumps ahead, decodes."""

    def __init__(self, video: PyAVVideo):
        self._video = video
        self._container, self._can_seek = None, video._pts is not None

    def close(self):
        if self._container is not None:
            self._container.close()

    def decode(self, first: int, last: int, problems: list[str]):
        """Frames out of the packets first..last, decoded from scratch."""
        video = self._video
        if self._container is None or first < self._next:
            self._rewind(problems)
        if first - self._next > SEEK_PACKETS and self._can_seek and not self._seek(first, problems):
            self._can_seek = False
            self._rewind(problems)
        while self._next < first and self._read() is not None:
            pass
        if self._used:
            self._context.flush_buffers()
        self._used = True
        while self._next <= last:
            packet = self._read()
            if packet is None:
                break
            leading = first > 0 and packet.pts < video._stamps[first]
            yield from video._decode(self._context, packet, [] if leading else problems)
        yield from video._decode(self._context, None, problems)

    def _rewind(self, problems):
        self.close()
        self._container = self._video._open()
        self._stream = self._video._stream(self._container)
        self._context = self._stream.codec_context
        self._packets = self._video._packets(self._container, self._stream, problems)
        self._next, self._held, self._used = 0, None, False

    def _read(self):
        packet, self._held = self._held or next(self._packets, None), None
        self._next += packet is not None
        return packet

    def _seek(self, number: int, problems) -> bool:
        """Lets the container jump to a keyframe. False where it lands behind it, or before where we are."""
        target, here = self._video._stamps[number], self._video._stamps[self._next]
        try:
            self._container.seek(int(target), stream=self._stream)
        except self._video._av.error.FFmpegError:
            return False
        self._packets = self._video._packets(self._container, self._stream, problems)
        for count, packet in enumerate(self._packets):
            if packet.is_keyframe and packet.pts == target:
                self._next, self._held = number, packet
                return True
            if packet.pts is None or (packet.is_keyframe and packet.pts > target) or (count == 0 and packet.pts < here):
                return False
        return False


# ------------------------------------------------------------------------------------------------------------- decord


class DecordVideo(Video):
    """A file that decord reads. Without a word, it gives wrong frames for open GOPs, edit lists and MPEG-TS."""

    def __init__(self, decord, file, name: str):
        self._decord, self._file, self.name = decord, file, name
        try:
            reader = self._open()
            total, rate = len(reader), float(reader.get_avg_fps())
            height, width = reader[0].shape[:2]
            stamps = np.array(reader.get_frame_timestamp(range(total)), np.float64)  # [N, 2]: start, end
        except Exception as error:  # DECORDError is no RuntimeError; both occur
            raise ValueError(f"{name} is not a video that decord can read: {str(error).strip().splitlines()[-1]}") from error
        times = stamps[:, 0] - stamps[0, 0]
        if not np.all(np.diff(times) > 0):
            times = np.arange(total) / rate
        length = max(float(stamps[-1, 1] - stamps[-1, 0]), 0.0) or 1 / rate
        nominal = Fraction(rate).limit_denominator(1001)
        super().__init__(name, times, seconds_of(times, length, nominal, 1e-3), height, width)

    def _open(self):
        file = self._file if isinstance(self._file, str) else io.BytesIO(self._file.getvalue())
        return self._decord.VideoReader(file, num_threads=1)  # VP9 fails with more than 2; one reader a thread

    def chunks(self, wanted, parts):
        return [wanted]

    def frames(self, wanted, problems, from_start=False):
        reader = self._open()
        for number in wanted:
            try:
                frame = reader[number]
            except Exception as error:
                raise ValueError(f"{self.name}: decord cannot decode frame {number}: {str(error).strip().splitlines()[-1]}") from error
            yield number, number, frame.asnumpy() if hasattr(frame, "asnumpy") else np.asarray(frame)


# --------------------------------------------------------------------------------------------------- frames already decoded


class GivenFrames(Video):
    """Images in a list, or an array [n, h, w, 3], with the times at which they are shown."""

    KEYS = (
        "fps", "timestamps", "actual_timestamps", "frames_indices", "total_num_frames", "duration", "width", "height",
        "video_backend",
    )  # fmt: skip

    def __init__(self, frames, metadata, name: str):
        if len(frames) == 0:
            raise ValueError(f"{name} has no frames")
        self._frames = frames
        seen = see_image(frames[0], what=f"frame 0 of {name}")
        upright = seen.read().shape[:2] if not isinstance(frames, (np.ndarray, torch.Tensor)) else (seen.height, seen.width)
        times, duration, self.given_times = self._times(metadata, len(frames), f"{name} ({len(frames)} decoded frames)")
        super().__init__(name, times, duration, *upright)

    @classmethod
    def _times(cls, metadata, total: int, name: str) -> tuple[np.ndarray, float, bool]:
        """(seconds of each frame, duration, whether the seconds are the caller's own)."""
        metadata = dict(metadata or {})
        reject_unknown(metadata, cls.KEYS, f"video_metadata of {name}")
        metadata = {key: value for key, value in metadata.items() if value is not None}
        fps, duration = (positive_number(key, metadata[key]) if key in metadata else None for key in ("fps", "duration"))
        stamps = metadata.get("timestamps", metadata.get("actual_timestamps"))
        if stamps is None and "frames_indices" in metadata and fps is not None:
            stamps = np.asarray(metadata["frames_indices"], np.float64) / fps
            if duration is None and "total_num_frames" in metadata:
                duration = positive_int("total_num_frames", metadata["total_num_frames"]) / fps
        if stamps is None:
            if fps is None:
                raise ValueError(f"{name}: nothing says when they are shown; pass video_metadata={{'fps': ...}} or {{'timestamps': [...]}}")
            return np.arange(total) / fps, total / fps, False
        times = np.asarray(stamps, np.float64)
        if times.shape != (total,) or not np.isfinite(times).all() or times[0] < 0 or np.any(np.diff(times) < 0):
            raise ValueError(f"{name}: expected {total} timestamps, seconds that do not go down, got {stamps!r}")
        if duration is None or duration < times[-1]:
            gap = float(times[-1] - times[0]) / (total - 1) if total > 1 else 0.0
            duration = float(times[-1]) + (gap or 1 / (fps or 1.0))
        return times, duration, True

    def chunks(self, wanted, parts):
        return [chunk.tolist() for chunk in np.array_split(wanted, parts) if len(chunk)]

    def frames(self, wanted, problems, from_start=False):
        for number in wanted:
            image = see_image(self._frames[number], what=f"frame {number} of {self.name}").read()
            if image.shape[:2] != (self.height, self.width):
                raise ValueError(
                    f"frame {number} of {self.name} is {image.shape[1]} x {image.shape[0]}, frame 0 is {self.width} x {self.height}; "
                    "the frames of a video have one size"
                )
            yield number, number, image


# -------------------------------------------------------------------------------------------------------- opening a video


def flat_videos(videos) -> list:
    """The videos of a call as a list: one video, a list of videos, or one video as a list of its frames."""
    if isinstance(videos, (np.ndarray, torch.Tensor)) and videos.ndim == 5:
        return list(videos)
    if not isinstance(videos, (list, tuple)):
        return [videos]
    if not videos:
        raise ValueError("no video given; expected at least one")
    frames = [isinstance(x, Image.Image) or (isinstance(x, (np.ndarray, torch.Tensor)) and x.ndim < 4) for x in videos]
    return [videos] if all(frames) else list(videos)


def open_video(source, metadata=None, *, name="video", backend=None, allow_http=False) -> Video:
    """Looks into a video without decoding more than its first frame, and checks its size.

    `source`: what `open_source` takes, or decoded frames (a list of what `load_image` takes, an array or tensor [n, h, w, 3] or
    [n, 3, h, w]) with `metadata`, a mapping with "fps" (frames a second) or "timestamps" (seconds).

    Raises FileNotFoundError; ValueError for what is no video or cannot be decoded at all; ImportError without a decoder.
    """
    if isinstance(source, (np.ndarray, torch.Tensor)) and source.ndim != 4:
        raise ValueError(f"{name} is an array of shape {tuple(source.shape)}; expected [frames, height, width, 3]")
    if isinstance(source, (list, tuple, np.ndarray, torch.Tensor)):
        return GivenFrames(source, metadata, name)
    if metadata is not None:
        raise ValueError(f"{name} is a file, which says itself when its frames are shown; video_metadata is for decoded frames")
    kind, module = video_backend(backend)
    file, name = open_source(_own_path(source), what="video", allow_http=allow_http, max_bytes=MAX_VIDEO_BYTES, timeout=DOWNLOAD_SECONDS)
    return kind(module, file, name)


def _own_path(source):
    """The path of an ordinary file that is open, so that it is read anew and not into memory; else `source` itself."""
    path = getattr(source, "name", None)
    if isinstance(path, str) and hasattr(source, "fileno") and not isinstance(source, io.TextIOBase):
        try:
            source.flush()
            if os.path.isfile(path) and os.path.samestat(os.fstat(source.fileno()), os.stat(path)):
                return path
        except (AttributeError, OSError, ValueError):
            pass
    return source


def video_backend(name: str | None):
    """(class, module) of the decoder with this name; None: PyAV, or decord where that alone is installed."""
    if name not in (None, "pyav", "decord"):
        raise ValueError(f"video_backend must be 'pyav' or 'decord', got {name!r}")
    if name != "decord":
        try:
            import av

            return PyAVVideo, av
        except ImportError as error:
            if name == "pyav":
                raise ImportError("video_backend='pyav' needs PyAV: pip install av") from error
    try:
        import decord
    except ImportError as error:
        if name == "decord":
            raise ImportError("video_backend='decord' needs decord: pip install decord") from error
        raise ImportError("reading a video needs PyAV: pip install av") from error
    if name is None:
        logger.warning_once("PyAV is not installed, videos are read with decord, which gets some files wrong: pip install av")
    return DecordVideo, decord


def positive_number(name: str, value) -> float:
    """`value` as a float above 0, else a ValueError that names it."""
    number = isinstance(value, (int, float, np.integer, np.floating, Fraction)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be a number above 0, got {value!r}")
    return float(value)


def _split_segments(item) -> tuple:
    """(video, its segments or None) of what stands in the list of videos."""
    if not isinstance(item, Mapping):
        return item, None
    reject_unknown(item, ("video_path", "segments"), "a video given as a dict")
    if item.get("video_path") is None:
        raise ValueError(f"a video given as a dict needs 'video_path', got {sorted(item)}")
    segments, name = item.get("segments"), _short(item["video_path"])
    if segments is None:
        return item["video_path"], None
    if not isinstance(segments, (list, tuple, np.ndarray)) or len(segments) == 0:
        raise ValueError(f"{name}: segments must be a list such as [[0.5, 3.0], [4.2]] (seconds), got {segments!r}")
    return item["video_path"], [read_segment(segment, name) for segment in segments]


def _short(source) -> str:
    return repr(source)[:200] if isinstance(source, (str, os.PathLike)) else f"a video in a {type(source).__name__}"


def _check_segments(video: Video, segments):
    """ValueError for a segment wholly outside the video; one warning where some reach outside."""
    for segment in segments:
        start, end = segment[0], segment[-1]
        outside = end < 0 or start > video.duration
        if outside or (len(segment) == 2 and (end == 0 or start == video.duration)):
            raise ValueError(f"{video.name}: segment {list(segment)} lies outside the video, which lasts {video.duration:g} s")
    beyond = [list(segment) for segment in segments if segment[0] < 0 or segment[-1] > video.duration]
    if beyond:
        logger.warning(f"{video.name} lasts {video.duration:g} s; the times of {beyond} are moved into it")


def _per_video(metadata, count: int) -> list:
    """One entry (or None) per video."""
    if metadata is None:
        return [None] * count
    entries = [metadata] if isinstance(metadata, Mapping) else list(metadata)
    if len(entries) != count:
        raise ValueError(f"video_metadata has {len(entries)} entries for {count} videos")
    return entries


def _one_name(name: str, value, older: str, older_value):
    """The value of a knob that has two names."""
    if value is not None and older_value is not None and value != older_value:
        raise ValueError(f"{older} {older_value!r} is an older name of {name} {value!r}; give one of them")
    return older_value if value is None else value


def _in_threads(threads: int, function, *columns) -> list:
    """`list(map(function, *columns))` on so many threads."""
    rows = list(zip(*columns))
    if threads == 1 or len(rows) < 2:
        return [function(*row) for row in rows]
    with ThreadPoolExecutor(min(threads, len(rows))) as pool:
        futures = [pool.submit(function, *row) for row in rows]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()


# ------------------------------------------------------------------------------------------------------------- the clips


class ClipMetadata(dict):
    """Read as keys or as attributes: total_num_frames (of the clip), fps and duration (of the video), width, height,
    frames_indices (None for a segment), actual_timestamps (seconds, None where frames_indices / fps says them)."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass(frozen=True, eq=False)
class ClipPlan:
    """A clip of which no frame is read yet."""

    video: Video
    indices: np.ndarray  # int64 [n]: the video's frame for each of the clip's
    times: np.ndarray | None  # float64 [n]: of a segment, the seconds that are asked for
    height: int  # after the resize
    width: int
    knobs: "VideoKnobs"


@dataclass(frozen=True, eq=False)
class Clip:
    patches: torch.Tensor  # uint8 [P, 3 * p * p]
    grid: list[int]  # frames, patch rows, patch columns
    timestamps: list[float]  # seconds
    metadata: ClipMetadata


@dataclass(frozen=True)
class VideoKnobs:
    min_pixels: int
    max_pixels: int
    video_max_pixels: int
    patch_size: int
    merge_size: int
    video_fps: float | None
    num_frames: int | None
    min_frames: int
    max_frames: int
    num_extract_threads: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    video_backend: str | None
    allow_http: bool


class _Assembly:
    """The patches of a clip while its frames come in, in any order and from several threads."""

    def __init__(self, plan: ClipPlan):
        self.plan = plan
        p = plan.knobs.patch_size
        self.grid = plan.height // p, plan.width // p
        self.patches = torch.empty(len(plan.indices), math.prod(self.grid), 3 * p * p, dtype=torch.uint8)
        self.shown = np.full(len(plan.indices), -1)

    def put(self, slots: list[int], shown: int, image: np.ndarray):
        plan = self.plan
        frame = resize_uint8(image, plan.height, plan.width)[None]
        rows = patchify(frame, plan.knobs.patch_size, plan.knobs.merge_size)
        for slot in slots:
            self.patches[slot] = rows
        self.shown[slots] = shown

    def finish(self) -> Clip | None:
        """The clip; None where no frame came."""
        plan, video = self.plan, self.plan.video
        keep = self.shown >= 0
        if plan.times is None:  # a frame that stood in for the next ones is there once
            keep &= np.concatenate([[True], self.shown[1:] > np.maximum.accumulate(self.shown)[:-1]])
        if not keep.any():
            return None
        indices, real = self.shown[keep], video.real_times()
        if plan.times is not None:
            timestamps = plan.times[keep]
        else:
            timestamps = indices / video.rate if real is None else real[indices]
        metadata = ClipMetadata(
            total_num_frames=len(indices),
            fps=video.rate,
            duration=video.duration,
            width=video.width,
            height=video.height,
            frames_indices=indices.tolist() if plan.times is None else None,
            actual_timestamps=timestamps.tolist() if plan.times is not None or real is not None else None,
        )
        patches = self.patches if keep.all() else self.patches[torch.from_numpy(keep)]
        return Clip(patches.flatten(0, 1), [len(indices), *self.grid], timestamps.tolist(), metadata)


def _report(video: Video, problems: list[str], clips: list[tuple[int, Clip | None]]):
    """One warning for a damaged video; ValueError where nothing of a clip can be decoded. `clips`: (frames asked for, clip)."""
    for asked, clip in clips:
        if clip is None:
            reason = problems[0] if problems else "the decoder gives nothing for them"
            raise ValueError(f"{video.name}: none of the {asked} frames asked for can be decoded: {reason}")
    asked, had = sum(asked for asked, _ in clips), sum(clip.grid[0] for _, clip in clips)
    if problems or had < asked:
        reason = f" ({problems[0]})" if problems else ""
        logger.warning(f"{video.name} is damaged{reason}: {had} of the {asked} frames asked for could be had")


# ---------------------------------------------------------------------------------------------------------- the processor


class MossVLVideoProcessor(BaseVideoProcessor):
    """Videos of one sample -> clips of patches.

    Args (each also per call):
        size: {"shortest_edge", "longest_edge"}, the least and most *pixels* of a resized frame. Other names:
            `min_pixels` or `shortest_edge`, `max_pixels` or `longest_edge`.
        video_max_pixels: most pixels of all frames of a sample, shared in proportion to frames * height * width.
        video_fps, num_frames: frames a second, or how many frames; not both.
        min_frames, max_frames: of a video; `max_frames` is shared by the clips of a sample.
        num_extract_threads: threads that read and resize frames (`frame_extract_num_threads` is an older name).
        video_backend: "pyav" or "decord"; None takes PyAV, or decord where that alone is installed.
        patch_size, temporal_patch_size (1), merge_size: of the model; sides become multiples of patch_size * merge_size.
        image_mean, image_std: three numbers each, for levels in 0..1.
    """

    _auto_class = "AutoVideoProcessor"  # save_pretrained takes the code along
    model_input_names = ["pixel_values_videos", "video_grid_thw"]
    knobs = (
        "size", "min_pixels", "max_pixels", "shortest_edge", "longest_edge", "video_max_pixels", "patch_size",
        "temporal_patch_size", "merge_size", "video_fps", "num_frames", "min_frames", "max_frames", "num_extract_threads",
        "frame_extract_num_threads", "image_mean", "image_std", "video_backend", "allow_http",
    )  # fmt: skip

    def __init__(
        self,
        size=None,
        video_max_pixels=201326592,
        patch_size=16,
        temporal_patch_size=1,
        merge_size=2,
        video_fps=None,
        num_frames=None,
        min_frames=1,
        max_frames=256,
        num_extract_threads=None,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        video_backend=None,
        min_pixels=None,
        max_pixels=None,
        shortest_edge=None,
        longest_edge=None,
        frame_extract_num_threads=None,
        **kwargs,
    ):
        kwargs = drop_fixed(kwargs, type(self).__name__)
        reject_unknown([name for name in kwargs if name not in SERVICE_KEYS and name[:1] != "_"], self.knobs, type(self).__name__)
        BaseImageProcessor.__init__(self, **kwargs)  # past the bases in between, which set the knobs of other models
        low, high = pixel_limits(DEFAULT_SIZE, size, min_pixels, max_pixels, shortest_edge, longest_edge)
        threads = _one_name("num_extract_threads", num_extract_threads, "frame_extract_num_threads", frame_extract_num_threads)
        self.size = {"shortest_edge": low, "longest_edge": high}
        self.video_max_pixels = video_max_pixels
        self.patch_size = patch_size
        self.temporal_patch_size = temporal_patch_size
        self.merge_size = merge_size
        self.video_fps = 1.0 if video_fps is None and num_frames is None else video_fps
        self.num_frames = num_frames
        self.min_frames = min_frames
        self.max_frames = max_frames
        self.num_extract_threads = 4 if threads is None else threads
        self.image_mean = list(three_floats("image_mean", image_mean))
        self.image_std = list(three_floats("image_std", image_std))
        self.video_backend = video_backend
        self.resolve({})

    @classmethod
    def from_dict(cls, video_processor_dict, **kwargs):
        """Knobs among the keyword arguments take the place of the file's; a key of the file that means nothing here is left out."""
        knobs = {name: kwargs.pop(name) for name in cls.knobs if name in kwargs}
        knobs = {name: value for name, value in knobs.items() if value is not None}
        reject_unknown([name for name in kwargs if nearest_name(name, cls.knobs, cutoff=0.8)], cls.knobs, cls.__name__)
        settings = {}
        for name, value in video_processor_dict.items():
            if name in cls.knobs or name in SERVICE_KEYS or name in FIXED:
                settings[name] = value
            elif value is not None:
                logger.warning_once(f"{cls.__name__}: {name}={value!r} has no effect")
        for pair in (("num_frames", "video_fps"), ("num_extract_threads", "frame_extract_num_threads")):
            if knobs.keys() & set(pair):
                settings.update(dict.fromkeys(pair))
        return super().from_dict(with_knobs(settings, knobs), **kwargs)

    @property
    def min_pixels(self) -> int:
        return self.size["shortest_edge"]

    @property
    def max_pixels(self) -> int:
        return self.size["longest_edge"]

    def resolve(self, knobs: dict) -> VideoKnobs:
        """What a call works with: its own knobs where given and not None, else the processor's. Raises ValueError."""
        who = type(self).__name__
        knobs = drop_fixed(knobs, who)
        reject_unknown(knobs, self.knobs, who)
        knobs = {name: value for name, value in knobs.items() if value is not None}
        threads = _one_name(
            "num_extract_threads", knobs.get("num_extract_threads"), "frame_extract_num_threads", knobs.get("frame_extract_num_threads")
        )

        def pick(name):
            return knobs.get(name, getattr(self, name))

        low, high = pixel_limits(self.size, **{name: knobs.get(name) for name in SIZES})
        whole = ("video_max_pixels", "patch_size", "merge_size", "min_frames", "max_frames")
        counts = {name: positive_int(name, pick(name)) for name in whole}
        if positive_int("temporal_patch_size", pick("temporal_patch_size")) != 1:
            raise ValueError(f"temporal_patch_size must be 1, got {pick('temporal_patch_size')!r}: every frame has a time of its own")
        if counts["min_frames"] > counts["max_frames"]:
            raise ValueError(f"min_frames {counts['min_frames']} is above max_frames {counts['max_frames']}")
        if counts["video_max_pixels"] < low:
            raise ValueError(f"video_max_pixels {counts['video_max_pixels']} does not hold one frame of shortest_edge {low} pixels")

        rate, number = knobs.get("video_fps"), knobs.get("num_frames")
        if rate is None and number is None:
            rate, number = self.video_fps, self.num_frames
        if rate is not None and number is not None:
            raise ValueError(f"video_fps {rate!r} and num_frames {number!r} both say how many frames to take; give one of them")
        rate = None if rate is None else positive_number("video_fps", rate)
        number = None if number is None else positive_int("num_frames", number)
        if number is not None and not counts["min_frames"] <= number <= counts["max_frames"]:
            raise ValueError(f"num_frames {number} lies outside min_frames {counts['min_frames']} to max_frames {counts['max_frames']}")

        backend = pick("video_backend")
        if backend not in (None, "pyav", "decord"):
            raise ValueError(f"video_backend must be 'pyav' or 'decord', got {backend!r}")
        return VideoKnobs(
            low,
            high,
            **counts,
            video_fps=rate,
            num_frames=number,
            num_extract_threads=positive_int("num_extract_threads", self.num_extract_threads if threads is None else threads),
            **{name: three_floats(name, pick(name)) for name in ("image_mean", "image_std")},
            video_backend=backend,
            allow_http=bool(knobs.get("allow_http")),
        )

    def plan(self, videos, video_metadata=None, **knobs) -> list[ClipPlan]:
        """The clips of one sample: which frames, which size. Reads each file's index and decodes no more than its first frame.

        `videos`: one video or a list; a video is what `open_video` takes, or {"video_path": video, "segments": [[start, end],
        [time], ...]} with one clip a segment. `video_metadata`: for decoded frames, a mapping or one (or None) per video.

        Raises ValueError, FileNotFoundError for anything that is wrong with the videos, their segments or the knobs.
        """
        use = self.resolve(knobs)
        sources, segments = zip(*map(_split_segments, flat_videos(videos)))
        metadata = _per_video(video_metadata, len(sources))
        names = ["the video" if len(sources) == 1 else f"video {i}" for i in range(len(sources))]

        def look(source, metadata, name):
            return open_video(source, metadata, name=name, backend=use.video_backend, allow_http=use.allow_http)

        opened = _in_threads(use.num_extract_threads, look, sources, metadata, names)

        for video, parts in zip(opened, segments):
            _check_segments(video, parts or ())

        clips = [(video, part) for video, parts in zip(opened, segments) for part in (parts or [None])]
        if len(clips) > use.max_frames:
            raise ValueError(f"{len(clips)} clips share max_frames {use.max_frames}; each needs at least one frame")
        lengths = [video.duration if part is None else part[-1] - part[0] for video, part in clips]
        most = share_frames(use.max_frames, lengths)
        at_once = use.video_max_pixels // use.min_pixels
        least, wish = [], []
        for video, parts in zip(opened, segments):
            spans = [part[-1] - part[0] for part in parts or [(0, 1)]]
            least += share_frames(max(use.min_frames, len(spans)), spans)
            wish += [None] * len(spans) if use.num_frames is None else share_frames(max(use.num_frames, len(spans)), spans)

        chosen = []
        for (video, part), length, low, high, number in zip(clips, lengths, least, most, wish):
            high = min(high, at_once)
            if part is None:
                count = frame_count(length, use.video_fps, number, low, min(high, len(video.times)))
                chosen.append((sample_indices(len(video.times), count), None))
            else:
                count = frame_count(length, use.video_fps, number, low, high) if len(part) == 2 else 1
                times = segment_times(part, count, float(video.times[-1]))
                chosen.append((video.shown_at(times), times))
        loads = [len(indices) * video.height * video.width for (video, _), (indices, _) in zip(clips, chosen)]
        factor = use.patch_size * use.merge_size
        plans = []
        for (video, _), (indices, times), load in zip(clips, chosen, loads):
            share = use.video_max_pixels * (load / sum(loads))
            size = fit_video_size(video.height, video.width, len(indices), factor, use.min_pixels, use.max_pixels, share)
            plans.append(ClipPlan(video, indices, times, *size, use))
        return plans

    def extract(self, videos, video_metadata=None, **knobs) -> list[Clip]:
        """The clips of one sample, decoded. `videos` may also be what `plan` gave; else as there.

        Frames are resized as they come; what is kept of each is its patches.
        """
        ready = isinstance(videos, list) and bool(videos) and all(isinstance(x, ClipPlan) for x in videos)
        if ready and (knobs or video_metadata is not None):
            raise ValueError(f"a plan holds its knobs already, got {sorted(knobs) or ['video_metadata']}")
        plans = videos if ready else self.plan(videos, video_metadata, **knobs)
        clips = [_Assembly(plan) for plan in plans]

        uses = {}  # video -> number -> [(clip, its slots)]
        for clip in clips:
            numbers = uses.setdefault(clip.plan.video, {})
            for number in np.unique(clip.plan.indices).tolist():
                slots = np.flatnonzero(clip.plan.indices == number).tolist()
                numbers.setdefault(number, []).append((clip, slots))

        def read(video, numbers, from_start=False):
            problems = []
            try:
                for number, shown, image in video.frames(numbers, problems, from_start):
                    for clip, slots in uses[video][number]:
                        clip.put(slots, shown, image)
            except UntrueKeyframes:
                return None
            return problems

        threads = max(plan.knobs.num_extract_threads for plan in plans)
        jobs = [(video, chunk) for video in uses for chunk in video.chunks(sorted(uses[video]), max(1, threads // len(uses)))]
        found = {video: list(video.problems) for video in uses}
        again = []
        for (video, _), problems in zip(jobs, _in_threads(threads, read, *zip(*jobs))):
            if problems is not None:
                found[video] += problems
            elif video not in again:
                again.append(video)
        for clip in clips:
            if clip.plan.video in again:
                clip.shown[:] = -1
        for video, problems in zip(again, _in_threads(threads, lambda video: read(video, sorted(uses[video]), True), again)):
            found[video] = video.problems + problems

        done = [clip.finish() for clip in clips]
        for video, problems in found.items():
            _report(video, problems, [(len(plan.indices), clip) for plan, clip in zip(plans, done) if plan.video is video])
        return done

    def preprocess(self, videos, video_metadata=None, return_metadata=False, return_tensors=None, **knobs) -> BatchFeature:
        """The videos of one sample: `pixel_values_videos` float32 [P, 3 * p * p], `video_grid_thw` [clips, 3], and with
        `return_metadata` the list `video_metadata` of `ClipMetadata`.

        `videos`, `video_metadata`: as for `plan`. Other keyword arguments: those of the class, and `allow_http`.
        `return_tensors`: "pt" (also None) or "np".
        """
        check_return_tensors(return_tensors)
        use = self.resolve(knobs)
        clips = self.extract(videos, video_metadata, **knobs)
        pixel_values = torch.empty(sum(len(clip.patches) for clip in clips), clips[0].patches.shape[1])
        for part, clip in zip(pixel_values.split([len(clip.patches) for clip in clips]), clips):
            normalise(clip.patches, use.image_mean, use.image_std, out=part)
        data = {"pixel_values_videos": pixel_values, "video_grid_thw": torch.tensor([clip.grid for clip in clips])}
        out = BatchFeature({name: to_format(tensor, return_tensors) for name, tensor in data.items()})
        if return_metadata:
            out["video_metadata"] = [clip.metadata for clip in clips]
        return out


__all__ = ["MossVLVideoProcessor"]
