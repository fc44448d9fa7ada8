"""Reading videos: a file, or frames already decoded, as numbered frames with exact times. No sampling, no sizes, no patches.

Axes: N frames of a video, h rows, w columns. Times are in seconds from the first frame that is shown.
"""

import bisect
import io
import os
from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import pairwise

import numpy as np
import torch
from transformers.utils import logging

from .checks import positive_int, positive_number, shorten
from .image_processing_moss_vl import (
    MAX_SOURCE_PIXELS,
    check_aspect,
    float_unit,
    load_image,
    open_source,
    reject_unknown,
    see_image,
)


logger = logging.get_logger(__name__)

MAX_VIDEO_BYTES = 2**30  # of one video that is downloaded, or inside a data: URL
DOWNLOAD_SECONDS = 300.0
SEEK_PACKETS = 200  # a jump shorter than this reads through the packets between
MAX_REORDER = 16  # frames that a decoder holds back to put them in order
PROBE_FRAMES = 16  # decoded to see whether time stamps follow the pictures, where a stream leaves that open


# what all videos have


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

    def frames(
        self, wanted: list[int], problems: list[str], from_start: bool = False
    ) -> Iterator[tuple[int, int, np.ndarray]]:
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


# PyAV


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
            raise ValueError(
                f"{name}: none of its {len(pts)} video packets can be decoded ({'; '.join([context.name, *problems[:1]])})"
            )

        # frames in the order in which they are shown: _shown their packets, _pts their time stamps (None: frames are counted)
        shown = np.flatnonzero(~np.array(discard))
        stamps = np.array(range(len(pts)) if None in pts else pts, np.int64)
        known_dts = [x for x in dts if x is not None]
        steady = (
            None not in pts and len(np.unique(stamps[shown])) == len(shown) and bool(np.all(np.diff(known_dts) >= 0))
        )
        in_order = None not in seen and all(a < b for a, b in pairwise(seen))
        if steady and in_order:  # what leans on pictures before the start of the file is never shown
            shown = shown[stamps[shown] >= seen[0]]
        self._shown = shown[np.argsort(stamps[shown], kind="stable")]
        self._pts = stamps[self._shown].tolist() if steady and in_order else None
        self._stamps, self._discard, self._keys = stamps, discard, np.flatnonzero(key)

        nominal = 1 / float(rate or 25)
        if steady:
            times = (stamps[self._shown] - stamps[self._shown[0]]) * float(time_base)
            last = length[self._shown[-1]] * float(time_base) or (
                float(np.median(np.diff(times))) if len(times) > 1 else nominal
            )
        else:
            times, last = np.arange(len(shown)) * nominal, nominal
        duration = seconds_of(times, last, rate, float(time_base))
        if listed > len(pts) or (not listed and announced > duration + slack + 1.5 * duration / len(times)):
            problems.insert(
                0, f"it ends early, after {duration:.1f} s" + (f" of {announced:.1f}" if announced > duration else "")
            )
        # Read once: a frame whose side data was read lives on, in a cycle with it, until garbage is collected.
        self._matrix = self._display_matrix(first)
        turned = self._matrix is not None and self._matrix[0] == self._matrix[3] == 0
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
            raise ValueError(
                f"{self.name} is not a video that PyAV can read: {getattr(error, 'strerror', error)}"
            ) from error

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
    def _display_matrix(frame) -> list[int] | None:
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
        if self._matrix is not None:
            a, b, c, d = self._matrix
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
        for (_, numbers), end in zip(runs, ends, strict=True):
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
        todo, late = (
            numbers[::-1],
            {},
        )  # late: number -> (number, frame) that stands in, until a damaged stream gives it after all
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
            if (
                packet.pts is None
                or (packet.is_keyframe and packet.pts > target)
                or (count == 0 and packet.pts < here)
            ):
                return False
        return False


# decord


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
            raise ValueError(
                f"{name} is not a video that decord can read: {str(error).strip().splitlines()[-1]}"
            ) from error
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
                raise ValueError(
                    f"{self.name}: decord cannot decode frame {number}: {str(error).strip().splitlines()[-1]}"
                ) from error
            yield number, number, frame.asnumpy() if hasattr(frame, "asnumpy") else np.asarray(frame)


# frames already decoded


class GivenFrames(Video):
    """Images in a list, or an array [n, h, w, 3], with the times at which they are shown.

    Floats of all frames are on one scale: 0..1 if none of them is above 1.
    """

    KEYS = (
        "fps",
        "timestamps",
        "actual_timestamps",
        "frames_indices",
        "total_num_frames",
        "duration",
        "width",
        "height",
        "video_backend",
    )

    def __init__(self, frames, metadata, name: str, allow_http: bool = False):
        if len(frames) == 0:
            raise ValueError(f"{name} has no frames")
        self._frames, self._reading = frames, {"allow_http": allow_http, "unit": float_unit(frames)}
        seen = see_image(frames[0], what=f"frame 0 of {name}", **self._reading)
        upright = (
            seen.read().shape[:2] if not isinstance(frames, (np.ndarray, torch.Tensor)) else (seen.height, seen.width)
        )
        times, duration, self.given_times = self.read_times(
            metadata, len(frames), f"{name} ({len(frames)} decoded frames)"
        )
        super().__init__(name, times, duration, *upright)

    @classmethod
    def read_times(cls, metadata, total: int, name: str) -> tuple[np.ndarray, float, bool]:
        """(seconds of each frame, duration, whether the seconds are the caller's own)."""
        metadata = dict(metadata or {})
        reject_unknown(metadata, cls.KEYS, f"video_metadata of {name}")
        metadata = {key: value for key, value in metadata.items() if value is not None}
        fps, duration = (
            positive_number(key, metadata[key]) if key in metadata else None for key in ("fps", "duration")
        )
        stamps = metadata.get("timestamps", metadata.get("actual_timestamps"))
        whole = positive_int("total_num_frames", metadata.get("total_num_frames", total))
        indices = np.asarray(metadata.get("frames_indices", range(total)))
        if indices.shape != (total,):
            raise ValueError(
                f"{name}: expected {total} frames_indices, one per frame, got {shorten(metadata['frames_indices'])}"
            )
        if "total_num_frames" in metadata and "frames_indices" in metadata and indices.max() >= whole:
            raise ValueError(f"{name}: frames_indices go up to {indices.max()}, beyond total_num_frames {whole}")
        if stamps is None and "frames_indices" in metadata and fps is not None:
            stamps = indices.astype(np.float64) / fps
            if duration is None and "total_num_frames" in metadata:
                duration = whole / fps
        if stamps is None:
            if whole != total and "frames_indices" not in metadata:
                raise ValueError(
                    f"{name}: video_metadata says total_num_frames {whole}, and not which of them these are; expected frames_indices or "
                    f"timestamps beside it, or total_num_frames {total} and the fps at which they were taken"
                )
            if fps is None:
                raise ValueError(
                    f"{name}: nothing says when they are shown; pass video_metadata={{'fps': ...}} or {{'timestamps': [...]}}, or give the "
                    "list as {'video': frames, 'fps': the rate at which they were taken}"
                )
            if duration is not None and abs(duration - total / fps) > 1 / fps:
                raise ValueError(
                    f"{name}: video_metadata says duration {duration:g}, but {total} frames at fps {fps:g} last {total / fps:g} s; expected "
                    "the fps at which these were taken, or frames_indices or timestamps beside it"
                )
            return np.arange(total) / fps, total / fps, False
        times = np.asarray(stamps, np.float64)
        if times.shape != (total,):
            got = len(times) if times.ndim == 1 else f"shape {times.shape}"
            raise ValueError(f"{name}: expected {total} timestamps, one a frame, got {got}")
        if not np.isfinite(times).all() or times[0] < 0 or np.any(np.diff(times) < 0):
            at = int(np.flatnonzero(~np.isfinite(times) | (times < 0) | (np.diff(times, prepend=0) < 0))[0])
            before = f" after {times[at - 1]:g}" if at else ""
            raise ValueError(
                f"{name}: timestamp {at} is {times[at]:g}{before}; expected seconds from 0 on that do not go down"
            )
        if duration is None or duration < times[-1]:
            gap = float(times[-1] - times[0]) / (total - 1) if total > 1 else 0.0
            duration = float(times[-1]) + (gap or 1 / (fps or 1.0))
        return times, duration, True

    def chunks(self, wanted, parts):
        return [chunk.tolist() for chunk in np.array_split(wanted, parts) if len(chunk)]

    def frames(self, wanted, problems, from_start=False):
        for number in wanted:
            image = see_image(self._frames[number], what=f"frame {number} of {self.name}", **self._reading).read()
            if image.shape[:2] != (self.height, self.width):
                raise ValueError(
                    f"frame {number} of {self.name} is {image.shape[1]} x {image.shape[0]}, frame 0 is {self.width} x {self.height}; "
                    "the frames of a video have one size"
                )
            yield number, number, image


# opening a video


def is_pair(x) -> bool:
    """Whether `x` is (decoded frames, their metadata), as `load_video` of transformers gives a video."""
    return (
        isinstance(x, tuple)
        and len(x) == 2
        and isinstance(x[1], Mapping)
        and isinstance(x[0], (list, tuple, np.ndarray, torch.Tensor))
    )


def open_video(source, metadata=None, *, name="video", backend=None, allow_http=False) -> Video:
    """Looks into a video without decoding more than its first frame, and checks its size.

    `source`: what `open_source` takes, or decoded frames (a list of what `load_image` takes, an array or tensor [n, h, w, 3] or
    [n, 3, h, w]) with `metadata`, a mapping with "fps" (frames a second) or "timestamps" (seconds).

    Raises FileNotFoundError; ValueError for what is no video or cannot be decoded at all; ImportError without a decoder.
    """
    if isinstance(source, (np.ndarray, torch.Tensor)) and source.ndim != 4:
        raise ValueError(f"{name} is an array of shape {tuple(source.shape)}; expected [frames, height, width, 3]")
    if isinstance(source, (list, tuple, np.ndarray, torch.Tensor)):
        return GivenFrames(source, metadata, name, allow_http)
    if metadata is not None:
        raise ValueError(
            f"{name} is a file, which says itself when its frames are shown; video_metadata is for decoded frames"
        )
    kind, module = video_backend(backend)
    file, name = open_source(
        _own_path(source), what="video", allow_http=allow_http, max_bytes=MAX_VIDEO_BYTES, timeout=DOWNLOAD_SECONDS
    )
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
        logger.warning_once(
            "PyAV is not installed, videos are read with decord, which gets some files wrong: pip install av"
        )
    return DecordVideo, decord
