"""Video files as numbered frames with exact times, by PyAV. No sampling, no target sizes, no patches.

Axes: N frames of a video, h rows, w columns. Times are in seconds from the first frame shown.
"""

import io
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .colours import frame_to_rgb, tone_map_of
from .image_reading import check_aspect, load_image
from .signatures import begins_as_video, read_head
from .video_packets import (
    DEFAULT_LIMITS,
    DISCARDED,
    KEY,
    MAX_CHANGES,
    MAX_REORDER,
    SHOWN,
    FrameIndex,
    PacketScan,
    Problems,
    StreamFacts,
    VideoLimits,
    check_sample_counts,
    decode,
    open_container,
    read_packets,
    size_of,
)


SEEK_PACKETS = 200  # shorter jumps read through the packets in between


DECORD_FORMATS = ("mov", "matroska", "avi")
DECORD_CODECS = ("h264", "hevc", "vp8", "vp9", "mpeg4", "mjpeg")


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
        check_aspect(height, width, name)
        self.name, self.times, self.duration = name, times, duration
        self.height, self.width, self.problems = height, width, list(problems)

    @property
    def index_bytes(self) -> int:
        """Bytes of what is kept to find frames."""
        return self.times.nbytes

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

    A frame is identified by its packet and decoded from the keyframe before it, on one thread: the result does not
    depend on what else is decoded. Exception: in a damaged part, a decoder fills what is missing from its memory, so
    that a damaged frame may differ between numbers of threads. If the order of frames does not follow from the packets
    (AVI with B-frames, raw streams), frames are counted from the start of the file.
    """

    def __init__(self, file: str | io.BytesIO, name: str, limits: VideoLimits = DEFAULT_LIMITS):
        import av

        self._av, self._file, self.name, self.limits = av, file, name, limits
        problems = Problems()
        check_sample_counts(file, name)
        with open_container(file, name, limits) as container:
            stream = self._stream(container)
            facts = StreamFacts.read(av, container, stream)
            if facts.listed_packets > limits.max_video_packets:
                self._refuse_packets(facts.listed_packets)
            scan = PacketScan.read(av, container, stream, size_of(file), limits, name, problems)
            if scan.first_frame is not None:
                self._tone_map = tone_map_of(scan.first_frame, stream.codec_context)
        if scan.first_frame is None:
            details = "; ".join([facts.codec, *problems[:1]])
            raise ValueError(
                f"{name}: none of its {len(scan)} video packets can be decoded ({details}); frames over "
                f"{limits.frame_pixels} pixels are not decoded, see max_source_pixels"
            )
        if facts.format == "mjpeg" and len(scan) == 1:
            raise ValueError(f"{name} is a still JPEG image; expected a video, or a list of images as its frames")
        self.facts, self._changes, self._refreshes = facts, scan.changes, scan.refreshes
        self._read_index(scan, problems)
        index = self.index
        self._keys = self._trusted_keys()
        if ends_early := facts.ends_early(len(scan), len(index.times), index.duration):
            problems.insert(0, ends_early)
        # Read the side data of one frame only: it makes a reference cycle that keeps the frame until garbage is
        # collected.
        self._matrix = self._display_matrix(scan.first_frame)
        size = scan.first_frame.height, scan.first_frame.width
        self._check_canvas(*size)
        if self._matrix is not None and self._matrix[0] == self._matrix[3] == 0:  # a quarter turn
            size = size[::-1]
        super().__init__(name, index.times, index.duration, *size, problems)

    def _read_index(self, scan: PacketScan, problems: list[str]) -> None:
        """Sets `index`. An edited mp4 is decoded once, because only a decoder knows which frames each part shows."""
        found = Problems(problems)
        self.index = FrameIndex.of(scan, self.facts, found)
        self._is_edited = self.facts.format.startswith("mov") and scan.is_edited
        if self._is_edited:
            found, reader = Problems(problems), _PacketReader(self)
            try:
                decoded = [frame.pts for frame in reader.decode(0, len(scan) - 1, found)]
            finally:
                reader.close()
            self.index = FrameIndex.of_parts(scan, self.facts, list(dict.fromkeys(decoded)))
        problems[:] = found

    @property
    def index_bytes(self) -> int:
        return sum(value.nbytes for value in vars(self.index).values() if isinstance(value, np.ndarray))

    def _refuse_packets(self, count: int):
        limit = self.limits.max_video_packets
        raise ValueError(f"{self.name} has {count} video packets, over max_video_packets={limit}")

    def _check_canvas(self, height: int, width: int) -> None:
        if height * width > self.limits.frame_pixels:
            raise ValueError(
                f"{self.name} has frames of {width} x {height} pixels, over the limit of {self.limits.frame_pixels}; "
                f"make it smaller first, or pass a larger max_source_pixels (now {self.limits.max_source_pixels})"
            )

    def _trusted_keys(self) -> np.ndarray:
        """Packets that start with a keyframe. Only the first one if the decoder's configuration changes too often, or
        if the parts of an edited file may overlap."""
        keys = np.flatnonzero(self.index.flags & KEY)
        return keys if len(self._changes) <= MAX_CHANGES and not self._is_edited else keys[:1]

    def configuration(self, packet: int) -> list:
        """Side data that a decoder needs before it starts at a packet, of the packets up to this one."""
        latest = {}
        for number, side_data in self._changes:
            if number > packet:
                break
            latest.update((item.data_type, item) for item in side_data)
        return list(latest.values())

    def key_numbers(self) -> set[int]:
        """Numbers of the frames whose packets start with a keyframe."""
        return set(self.index.number_of[self._keys].tolist())

    def needs_pyav(self) -> str | None:
        """Why decord would get this file wrong; None if it is right."""
        index, facts = self.index, self.facts
        if not facts.format.startswith(DECORD_FORMATS) or facts.codec not in DECORD_CODECS:
            return f"decord does not read {facts.codec} in {facts.format} reliably"
        if self.problems:
            return f"it is damaged ({self.problems[0]})"
        if self._tone_map is not None:
            return "it is HDR or has BT.2020 primaries, and decord does not convert its colours to SDR"
        if not (index.is_steady and index.is_ordered and (index.flags & SHOWN).all()) or self._changes:
            return "its packets are not one frame each, with a time stamp and one configuration"
        newest_key = np.maximum.accumulate(np.where(index.flags & KEY, index.stamps, index.stamps.min()))
        if (index.stamps < newest_key).any():
            return "frames refer to frames before their keyframe (open GOP)"
        if self._refreshes:
            return "a keyframe only begins to refresh the picture, and decord shows it unfinished"
        if not begins_as_video(read_head(self._file)):
            return "its first bytes may mean another format to the older FFmpeg of decord"
        if isinstance(self._file, str) and "%" in self._file:
            return "FFmpeg may take its name for a pattern"
        return None

    # packets and frames

    def open(self):
        return open_container(self._file, self.name, self.limits)

    def _stream(self, container):
        """The best video stream that is not a cover picture, with a decoder of one thread."""
        cover = self._av.stream.Disposition.attached_pic
        streams = [s for s in container.streams.video if not s.disposition & cover]
        if not streams:
            kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
            raise ValueError(f"{self.name} has no video in it: {container.format.long_name} with {kinds}")
        best = container.streams.best("video")
        stream = best if best in streams else streams[0]
        context = stream.codec_context
        if context is None:
            raise ValueError(f"{self.name}: no decoder for its video")
        self._check_canvas(context.height, context.width)
        context.thread_count = 1
        context.options = {**context.options, "max_pixels": str(self.limits.allocated_pixels)}
        return stream

    @staticmethod
    def _display_matrix(frame) -> list[int] | None:
        """(a, b, c, d) of the display matrix: x' = a x + c y, y' = b x + d y.

        Reduced to quarter turns and mirror images: either b and c or a and d are 0.
        """
        try:
            data = frame.side_data.get("DISPLAYMATRIX")
        except ValueError:  # PyAV: another side data type of this frame is unknown to it
            turn = {90: [0, -1, 1, 0], 180: [-1, 0, 0, -1], 270: [0, 1, -1, 0]}
            return turn.get(round(frame.rotation / 90) * 90 % 360)
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

    def _convert(self, frame) -> np.ndarray:
        try:
            return self._rgb(frame)
        except (OSError, ValueError) as error:  # FFmpeg cannot convert some formats of pixels
            raise ValueError(
                f"{self.name}: a frame of {frame.width} x {frame.height} in the pixel format {frame.format.name} "
                f"cannot be converted to RGB: {getattr(error, 'strerror', None) or error}"
            ) from error

    # frames by number

    def _ranges(self, wanted: list[int]) -> list[_DecodeRange]:
        """`wanted` as ranges that do not overlap in the file, each from the last keyframe before its first frame."""
        stamps, shown = self.index.stamps, self.index.shown
        if not self.index.is_ordered or not len(self._keys):
            return [_DecodeRange(0, wanted)]
        key_stamps = stamps[self._keys]
        order = np.argsort(key_stamps, kind="stable")
        key_stamps, keys = key_stamps[order], self._keys[order]
        ranges, last_packet = [], -1  # last_packet: of the ranges so far
        for number in wanted:
            packet = int(shown[number])
            key = int(np.searchsorted(key_stamps, stamps[packet], side="right")) - 1
            while key >= 0 and keys[key] > packet:
                key -= 1
            start = int(keys[key]) if key >= 0 else 0
            if ranges and start <= last_packet:
                ranges[-1].numbers.append(number)
            else:
                ranges.append(_DecodeRange(start, [number]))
            last_packet = max(last_packet, packet)
        return ranges

    def chunks(self, wanted, parts):
        ranges = self._ranges(wanted)
        packets = np.cumsum([int(self.index.shown[r.numbers].max()) - r.first_packet + 1 for r in ranges])
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
                yield number, number, self._convert(frame)
            if newest is not None and number <= newest.number:
                continue
            while todo and todo[0] < number:
                late[todo.popleft()] = newest
            yield from replace_late(number - MAX_REORDER)
            newest = _DecodedFrame(number, frame, self._convert)
            if todo and todo[0] == number:
                yield todo.popleft(), number, newest.rgb()
            if not todo and not late:
                return
        late.update((number, newest) for number in todo)
        yield from replace_late(len(self.times))

    def _numbered_frames(self, reader, first_packet: int, numbers: list[int], problems: list[str]):
        """Yields (number, frame) of what is decoded from `first_packet` to the last packet that `numbers` need.

        Raises UntrueKeyframes, before it yields anything, if `first_packet` does not decode to a keyframe.
        """
        index = self.index
        stamps, number_of = index.stamps, index.number_of
        start_stamp = stamps[first_packet] if first_packet else stamps.min()
        trusted = first_packet == 0 or bool(index.flags[first_packet] & DISCARDED)
        last_packet = self._last_packet(numbers) if index.is_ordered else len(stamps) - 1
        for count, frame in enumerate(reader.decode(first_packet, last_packet, problems)):
            if not index.is_ordered:
                number = count
            elif frame.pts is None or stamps[frame.pts] < start_stamp:  # refers to frames before the keyframe
                continue
            else:
                trusted = trusted or (frame.key_frame and frame.pts == first_packet)
                if not trusted:
                    break
                number = int(number_of[frame.pts])
            if not 0 <= number < len(self.times):
                continue
            if frame.is_corrupt:
                problems.append("a frame is damaged")
            yield number, frame
        if not trusted:
            raise UntrueKeyframes(self.name)

    def _last_packet(self, numbers: list[int]) -> int:
        """The last packet that completes one of these frames: with fields, the one after it."""
        flags, last = self.index.flags, int(self.index.shown[numbers].max())
        return last + 1 if last + 1 < len(flags) and not flags[last + 1] else last


class _PacketReader:
    """One pass forward over the packets of a `PyAVVideo`: counts them, seeks, decodes."""

    def __init__(self, video: PyAVVideo):
        self._video = video
        self._container, self._can_seek = None, video.index.is_steady and video.index.is_ordered

    def close(self):
        if self._container is not None:
            self._container.close()

    def decode(self, first: int, last: int, problems: list[str]):
        """Yields the frames of the packets first..last, decoded without earlier packets.

        The time stamp of a frame is the number of its packet. The first packet gets the configuration of the decoder
        that is valid there.
        """
        video, stamps = self._video, self._video.index.stamps
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
            number, packet = self._next, self._read()
            if packet is None:
                break
            if number == first:
                for side_data in video.configuration(first):
                    packet.set_sidedata(side_data)
            packet.pts = packet.dts = number
            is_leading = first > 0 and stamps[number] < stamps[first]  # its errors are expected
            yield from decode(video._av, self._context, packet, [] if is_leading else problems)
        yield from decode(video._av, self._context, None, problems)

    def _rewind(self, problems: list[str]):
        self.close()
        self._container = self._video.open()
        self._stream = self._video._stream(self._container)
        self._context = self._stream.codec_context
        self._packets = read_packets(self._video._av, self._container, self._stream, problems)
        self._next, self._held, self._used = 0, None, False

    def _read(self):
        packet, self._held = self._held or next(self._packets, None), None
        self._next += packet is not None
        return packet

    def _seek(self, number: int, problems: list[str]) -> bool:
        """Seeks to the keyframe in packet `number`. False if the container lands after it or before `_next`."""
        target, here = self._video.index.stamps[number], self._video.index.stamps[self._next]
        try:
            self._container.seek(int(target), stream=self._stream)
        except self._video._av.error.FFmpegError:
            return False
        self._packets = read_packets(self._video._av, self._container, self._stream, problems)
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
