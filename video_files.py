"""Video files as numbered frames with exact times, by PyAV or decord. No sampling, no target sizes, no patches.

Axes: N frames of a video, h rows, w columns. Times are in seconds from the first frame shown.
"""

import bisect
import io
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise

import numpy as np

from .colours import frame_to_rgb, tone_map_of
from .image_reading import MAX_SOURCE_PIXELS, check_aspect, load_image


SEEK_PACKETS = 200  # shorter jumps read through the packets in between
MAX_REORDER = 16  # upper limit of frames that a decoder delays to put them in order
PROBE_FRAMES = 16  # decoded to check that time stamps follow the order of frames, if the stream does not say so
MAX_FAILURES = 16  # consecutive unreadable packets after which a file is given up


class Video:
    """A video whose frames are read by number.

    Attributes:
        name: for messages.
        times: float64 [N].
        duration: seconds.
        height, width: as shown, after a rotation tag.
        problems: descriptions of damage.
        given_times: True if the caller gave the times, which are then reported unchanged.
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
        """Average frames per second."""
        return len(self.times) / self.duration

    def real_times(self) -> np.ndarray | None:
        """`times` if the caller gave them or if they differ from number / rate by more than a frame; else None."""
        error = np.abs(self.times - np.arange(len(self.times)) / self.rate).max()
        return self.times if self.given_times or error > 1 / self.rate else None

    def shown_at(self, seconds: np.ndarray) -> np.ndarray:
        """Numbers of the frames on screen at these times. Frames start up to 1 ms early: containers round times."""
        early = min(1e-3, 0.25 / self.rate)
        return np.clip(np.searchsorted(self.times, seconds + early, side="right") - 1, 0, None)

    def chunks(self, wanted: list[int], parts: int) -> list[list[int]]:
        """Splits `wanted` (sorted) into at most `parts` lists that can be read in parallel, with the same result."""
        raise NotImplementedError

    def frames(
        self, wanted: list[int], problems: list[str], from_start: bool = False
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yields (number, shown, uint8 [h, w, 3]) for each number in `wanted` (sorted), as frames are decoded.

        If frame `number` cannot be decoded, the previous frame is yielded instead and `shown` is its number. Numbers
        without any previous frame are skipped. Damage is appended to `problems`. `from_start` decodes from the first
        packet, without seeking.
        """
        raise NotImplementedError


def seconds_of(times: np.ndarray, last_length: float, rate: Fraction | None, tick: float) -> float:
    """Seconds from the first frame to the end of the last.

    N / rate if `times` are multiples of 1 / rate rounded to ticks, which avoids the rounding; else the last time +
    `last_length`.
    """
    if rate and np.abs(times - np.arange(len(times)) / float(rate)).max() <= 1.001 * tick:
        return float(len(times) / rate)
    return float(times[-1] + last_length)


# PyAV


def open_container(file: str | io.BytesIO, name: str):
    """Opens a file that `open_source` returned, with PyAV. Raises ValueError if PyAV cannot read it.

    A playlist inside the file cannot open other protocols: the whitelist holds only the one that the file itself
    needs.
    """
    import av

    if isinstance(file, str):
        file, protocol = "file:" + file, "file"  # the prefix keeps a path like "concat:a" from naming a protocol
    else:
        file, protocol = io.BytesIO(file.getvalue()), "data"  # threads must not share a position
    try:
        return av.open(file, container_options={"protocol_whitelist": protocol}, metadata_errors="ignore")
    except (av.error.FFmpegError, UnicodeError) as error:
        reason = getattr(error, "strerror", error)
        raise ValueError(f"{name} is not a video that PyAV can read: {reason}") from error


@dataclass
class _PacketScan:
    """One pass over all packets of a stream, in file order, with the first frames decoded."""

    pts: list[int | None] = field(default_factory=list)  # presentation time stamps, in ticks
    dts: list[int | None] = field(default_factory=list)  # decoding time stamps, in ticks
    durations: list[int] = field(default_factory=list)  # in ticks, 0 if unknown
    is_key: list[bool] = field(default_factory=list)
    is_discarded: list[bool] = field(default_factory=list)
    probed_pts: list[int | None] = field(default_factory=list)  # of the frames decoded so far
    first_frame: object = None

    def add_packet(self, packet) -> None:
        self.pts.append(packet.pts)
        self.dts.append(packet.dts)
        self.durations.append(max(0, packet.duration or 0))
        self.is_key.append(packet.is_keyframe)
        self.is_discarded.append(packet.is_discard)

    def add_frames(self, frames) -> None:
        for frame in frames:
            if self.first_frame is None:
                self.first_frame = frame
            self.probed_pts.append(frame.pts)

    def has_steady_stamps(self) -> bool:
        """Whether packets have complete and distinct time stamps, and ascending decoding times."""
        if None in self.pts:
            return False
        stamps = np.array(self.pts, np.int64)[~np.array(self.is_discarded)]
        dts = [x for x in self.dts if x is not None]
        return len(np.unique(stamps)) == len(stamps) and bool(np.all(np.diff(dts) >= 0))

    def frames_follow_stamps(self) -> bool:
        """Whether the time stamps of decoded frames ascend."""
        return None not in self.probed_pts and all(a < b for a, b in pairwise(self.probed_pts))


@dataclass(frozen=True)
class _StreamFacts:
    """Facts about a video stream from the header of its container."""

    codec: str
    time_base: Fraction  # seconds per tick
    rate: Fraction | None  # nominal frames per second
    listed_packets: int  # entries of an index of all packets (mov, mp4); 0 without one
    announced: float  # seconds of the container
    has_other_streams: bool

    @classmethod
    def read(cls, av, container, stream) -> "_StreamFacts":
        has_index = container.format.name.startswith("mov")
        start = max(0, container.start_time or 0) / av.time_base
        return cls(
            codec=stream.codec_context.name,
            time_base=stream.time_base,
            rate=stream.average_rate,
            listed_packets=len(getattr(stream, "index_entries", ())) if has_index else 0,
            announced=(container.duration or 0) / av.time_base - start,
            has_other_streams=len(container.streams) > 1,
        )

    def ends_early(self, packets: int, frames: int, duration: float) -> str | None:
        """What is missing if the header announces more than the file holds. `duration`: seconds of its frames."""
        slack = 1.0 + 0.1 * self.announced if self.has_other_streams else 0.0
        longest = duration + slack + 1.5 * duration / frames
        if self.listed_packets <= packets and (self.listed_packets or self.announced <= longest):
            return None
        of = f" of {self.announced:.1f}" if self.announced > duration else ""
        return f"it ends early, after {duration:.1f} s{of}"


@dataclass(frozen=True)
class _DecodeRange:
    """Frames that are decoded in one go, from a keyframe on."""

    first_packet: int
    numbers: list[int]  # sorted


class _DecodedFrame:
    """A decoded frame that is converted to RGB at most once."""

    def __init__(self, number: int, frame, to_rgb):
        self.number, self._frame, self._to_rgb = number, frame, to_rgb
        self._pixels = None

    def rgb(self) -> np.ndarray:
        if self._pixels is None:
            self._pixels, self._frame = self._to_rgb(self._frame), None
        return self._pixels


class UntrueKeyframes(Exception):
    """Packets flagged as keyframes are not keyframes: the whole video has to be decoded from its start."""


class PyAVVideo(Video):
    """A file that PyAV reads through an index of its packets. Nothing stays open between calls.

    A frame is identified by its time stamp and decoded from the keyframe before it, on one thread: the result does not
    depend on what else is decoded. If time stamps are missing or do not follow the order of frames (AVI with B-frames,
    raw streams), frames are counted from the start of the file.
    """

    def __init__(self, file: str | io.BytesIO, name: str):
        import av

        self._av, self._file, self.name = av, file, name
        problems = []
        with open_container(file, name) as container:
            stream = self._stream(container)
            scan = self._scan(container, stream, problems)
            facts = _StreamFacts.read(av, container, stream)
        if scan.first_frame is None:
            details = "; ".join([facts.codec, *problems[:1]])
            raise ValueError(f"{name}: none of its {len(scan.pts)} video packets can be decoded ({details})")
        steady = scan.has_steady_stamps()
        self._index(scan, by_stamp=steady and scan.frames_follow_stamps())
        times, duration = self._times(scan, facts, steady)
        if ends_early := facts.ends_early(len(scan.pts), len(times), duration):
            problems.insert(0, ends_early)
        # Read the side data of one frame only: it makes a reference cycle that keeps the frame until garbage is
        # collected.
        self._matrix = self._display_matrix(scan.first_frame)
        self._tone_map = tone_map_of(scan.first_frame)
        size = scan.first_frame.height, scan.first_frame.width
        if self._matrix is not None and self._matrix[0] == self._matrix[3] == 0:  # a quarter turn
            size = size[::-1]
        super().__init__(name, times, duration, *size, problems)

    def _scan(self, container, stream, problems: list[str]) -> _PacketScan:
        """Reads all packets and decodes the first frames.

        One frame is enough if packets show whether frames are reordered; else up to `PROBE_FRAMES`.
        """
        scan, context = _PacketScan(), stream.codec_context
        newest, reordered = None, not context.has_b_frames
        for packet in self._packets(container, stream, problems):
            scan.add_packet(packet)
            reordered = reordered or (newest is not None and packet.pts is not None and packet.pts < newest)
            newest = packet.pts if packet.pts is not None else newest
            if packet.is_corrupt:
                problems.append("a packet is cut short")
            probed = len(scan.probed_pts)
            if probed == 0 or (not reordered and probed < PROBE_FRAMES):
                scan.add_frames(self._decode(context, packet, problems))
        if not scan.probed_pts:
            scan.add_frames(self._decode(context, None, problems))
        return scan

    def _index(self, scan: _PacketScan, by_stamp: bool) -> None:
        """Sets the index of packets (file order) and of frames (order of showing):

        _stamps: [packets], time stamps, or positions in the file if one is missing
        _discard: [packets], whether a packet is decoded and not shown
        _keys: packets that start with a keyframe
        _shown: [N], the packet of each frame
        _pts: [N], the time stamp of each frame; None unless `by_stamp`: then frames are counted
        """
        self._stamps = np.array(range(len(scan.pts)) if None in scan.pts else scan.pts, np.int64)
        self._discard, self._keys = scan.is_discarded, np.flatnonzero(scan.is_key)
        shown = np.flatnonzero(~np.array(scan.is_discarded))
        if by_stamp:  # frames that refer to frames before the start of the file are never shown
            shown = shown[self._stamps[shown] >= scan.probed_pts[0]]
        self._shown = shown[np.argsort(self._stamps[shown], kind="stable")]
        self._pts = self._stamps[self._shown].tolist() if by_stamp else None

    def _times(self, scan: _PacketScan, facts: _StreamFacts, steady: bool) -> tuple[np.ndarray, float]:
        """(float64 [N], duration): by time stamps if they are steady, else at the nominal rate (25 without one)."""
        tick, frame_seconds = float(facts.time_base), 1 / float(facts.rate or 25)
        if not steady:
            times, last_length = np.arange(len(self._shown)) * frame_seconds, frame_seconds
        else:
            times = (self._stamps[self._shown] - self._stamps[self._shown[0]]) * tick
            last_length = scan.durations[self._shown[-1]] * tick
            if not last_length:
                last_length = float(np.median(np.diff(times))) if len(times) > 1 else frame_seconds
        return times, seconds_of(times, last_length, facts.rate, tick)

    # packets and frames

    def _stream(self, container):
        """The best video stream that is not a cover picture, with a decoder of one thread."""
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
        """Yields the packets of a stream. Continues after damaged data."""
        failures = 0
        while failures < MAX_FAILURES:
            try:
                for packet in container.demux(stream):
                    if packet.size:
                        failures = 0
                        yield packet
                return
            except self._av.error.FFmpegError as error:
                failures += 1
                problems.append(f"unreadable data: {error.strerror}")

    def _decode(self, context, packet, problems: list[str]) -> list:
        """The frames that a packet completes (None: those still in the decoder); none if it is damaged."""
        try:
            return context.decode(packet)
        except self._av.error.FFmpegError as error:
            problems.append(f"undecodable packet: {error.strerror}")
            return []

    @staticmethod
    def _display_matrix(frame) -> list[int] | None:
        """(a, b, c, d) of the display matrix: x' = a x + c y, y' = b x + d y.

        Reduced to quarter turns and mirror images: either b and c or a and d are 0.
        """
        data = frame.side_data.get("DISPLAYMATRIX")
        if data is None:
            return None
        a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
        same_axes = abs(a) + abs(d) >= abs(b) + abs(c)
        return [a, 0, 0, d] if same_axes else [0, b, c, 0]

    def _rgb(self, frame) -> np.ndarray:
        """uint8 [h, w, 3], upright, transparency on white."""
        if any(part.is_alpha for part in frame.format.components) or frame.format.name == "pal8":
            array = np.asarray(load_image(frame.to_ndarray(format="rgba"), what=self.name))
        else:
            array = frame_to_rgb(frame, self._tone_map)
        if self._matrix is not None:
            a, b, c, d = self._matrix
            if b or c:
                array, a, d = array.transpose(1, 0, 2), c, b
            array = array[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
        return array

    # frames by number

    def _ranges(self, wanted: list[int]) -> list[_DecodeRange]:
        """`wanted` as ranges that do not overlap in the file, each from the last keyframe before its first frame."""
        if self._pts is None or not len(self._keys):
            return [_DecodeRange(0, wanted)]
        key_stamps = self._stamps[self._keys]
        order = np.argsort(key_stamps, kind="stable")
        key_stamps, keys = key_stamps[order], self._keys[order]
        ranges, last_packet = [], -1  # last_packet: of the ranges so far
        for number in wanted:
            packet = int(self._shown[number])
            key = int(np.searchsorted(key_stamps, self._pts[number], side="right")) - 1
            start = int(keys[key]) if key >= 0 and keys[key] <= packet else 0
            if ranges and start <= last_packet:
                ranges[-1].numbers.append(number)
            else:
                ranges.append(_DecodeRange(start, [number]))
            last_packet = max(last_packet, packet)
        return ranges

    def chunks(self, wanted, parts):
        ranges = self._ranges(wanted)
        packets = np.cumsum([int(self._shown[r.numbers].max()) - r.first_packet + 1 for r in ranges])
        out = [[] for _ in range(parts)]
        for one, end in zip(ranges, packets, strict=True):
            out[int(min(parts - 1, (end - 1) * parts // packets[-1]))] += one.numbers
        return [chunk for chunk in out if chunk]

    def frames(self, wanted, problems, from_start=False):
        reader = _PacketReader(self)
        try:
            for one in [_DecodeRange(0, wanted)] if from_start else self._ranges(wanted):
                yield from self._range_frames(reader, one, problems)
        finally:
            reader.close()

    def _range_frames(self, reader, one: _DecodeRange, problems: list[str]):
        """As `frames`, for one range. If its first packet is not a keyframe, decodes from the keyframe before it."""
        earlier_keys = self._keys[self._keys < one.first_packet][-1:].tolist()
        for first_packet in (one.first_packet, *earlier_keys):
            found = []
            try:
                yield from self._frames_from(reader, first_packet, one.numbers, found)
                break
            except UntrueKeyframes:
                if first_packet != one.first_packet or not earlier_keys:
                    raise
        problems += found

    def _frames_from(self, reader, first_packet: int, numbers: list[int], problems: list[str]):
        """As `frames`, for the sorted `numbers` of one range. Raises UntrueKeyframes, before it yields anything, if
        `first_packet` is not a keyframe.

        A wanted frame that the decoder passed over is late: a damaged stream may still return it, out of order. After
        `MAX_REORDER` frames the frame that was newest when it was due is yielded instead.
        """
        todo, late, newest = deque(numbers), {}, None  # late: number -> _DecodedFrame or None

        def replace_late(before: float):
            for number in [number for number in late if number < before]:
                substitute = late.pop(number)
                if substitute is not None:
                    yield number, substitute.number, substitute.rgb()

        for number, frame in self._numbered_frames(reader, first_packet, numbers, problems):
            if number in late:
                del late[number]
                yield number, number, self._rgb(frame)
            if newest is not None and number <= newest.number:
                continue
            while todo and todo[0] < number:
                late[todo.popleft()] = newest
            yield from replace_late(number - MAX_REORDER)
            newest = _DecodedFrame(number, frame, self._rgb)
            if todo and todo[0] == number:
                yield todo.popleft(), number, newest.rgb()
            if not todo and not late:
                return
        late.update((number, newest) for number in todo)
        yield from replace_late(len(self._shown))

    def _numbered_frames(self, reader, first_packet: int, numbers: list[int], problems: list[str]):
        """Yields (number, frame) of what is decoded from `first_packet` to the last packet that `numbers` need.

        Raises UntrueKeyframes, before it yields anything, if `first_packet` does not decode to a keyframe.
        """
        start_pts = self._stamps[first_packet] if first_packet else self._stamps.min()
        trusted = first_packet == 0 or self._discard[first_packet]
        last_packet = len(self._stamps) - 1 if self._pts is None else int(self._shown[numbers].max())
        for count, frame in enumerate(reader.decode(first_packet, last_packet, problems)):
            if self._pts is None:
                number = count
            elif frame.pts is None or frame.pts < start_pts:  # refers to frames before the keyframe
                continue
            else:
                trusted = trusted or (frame.key_frame and frame.pts == start_pts)
                if not trusted:
                    break
                number = bisect.bisect_left(self._pts, frame.pts)
                if number == len(self._pts) or self._pts[number] != frame.pts:
                    continue
            if frame.is_corrupt:
                problems.append("a frame is damaged")
            yield number, frame
        if not trusted:
            raise UntrueKeyframes(self.name)


class _PacketReader:
    """One pass forward over the packets of a `PyAVVideo`: counts them, seeks, decodes."""

    def __init__(self, video: PyAVVideo):
        self._video = video
        self._container, self._can_seek = None, video._pts is not None

    def close(self):
        if self._container is not None:
            self._container.close()

    def decode(self, first: int, last: int, problems: list[str]):
        """Yields the frames of the packets first..last, decoded without earlier packets."""
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
            is_leading = first > 0 and packet.pts < video._stamps[first]  # its errors are expected
            yield from video._decode(self._context, packet, [] if is_leading else problems)
        yield from video._decode(self._context, None, problems)

    def _rewind(self, problems: list[str]):
        self.close()
        self._container = open_container(self._video._file, self._video.name)
        self._stream = self._video._stream(self._container)
        self._context = self._stream.codec_context
        self._packets = self._video._packets(self._container, self._stream, problems)
        self._next, self._held, self._used = 0, None, False

    def _read(self):
        packet, self._held = self._held or next(self._packets, None), None
        self._next += packet is not None
        return packet

    def _seek(self, number: int, problems: list[str]) -> bool:
        """Seeks to the keyframe in packet `number`. False if the container lands after it or before `_next`."""
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
    """A file that decord reads. decord silently returns wrong frames for open GOPs, edit lists and MPEG-TS."""

    def __init__(self, file: str | io.BytesIO, name: str):
        import decord

        self._decord, self._file, self.name = decord, file, name
        try:
            reader = self._open()
            total, rate = len(reader), float(reader.get_avg_fps())
            height, width = reader[0].shape[:2]
            stamps = np.array(reader.get_frame_timestamp(range(total)), np.float64)  # [N, 2]: start, end
        except Exception as error:  # DECORDError is not a RuntimeError; both occur
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"{name} is not a video that decord can read: {reason}") from error
        times = stamps[:, 0] - stamps[0, 0]
        if not np.all(np.diff(times) > 0):
            times = np.arange(total) / rate
        last_length = max(float(stamps[-1, 1] - stamps[-1, 0]), 0.0) or 1 / rate
        nominal = Fraction(rate).limit_denominator(1001)
        super().__init__(name, times, seconds_of(times, last_length, nominal, 1e-3), height, width)

    def _open(self):
        file = self._file if isinstance(self._file, str) else io.BytesIO(self._file.getvalue())
        return self._decord.VideoReader(file, num_threads=1)  # VP9 fails with more than 2; each thread opens a reader

    def chunks(self, wanted, parts):
        return [wanted]

    def frames(self, wanted, problems, from_start=False):
        reader = self._open()
        for number in wanted:
            try:
                frame = reader[number]
            except Exception as error:
                reason = str(error).strip().splitlines()[-1]
                raise ValueError(f"{self.name}: decord cannot decode frame {number}: {reason}") from error
            yield number, number, frame.asnumpy() if hasattr(frame, "asnumpy") else np.asarray(frame)
