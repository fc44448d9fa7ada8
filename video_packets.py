"""The packets of a video file: opening by a list of formats, and an index of what each packet shows and when.

Axes: K packets of a stream in file order, N frames in the order of showing.
"""

import io
import math
import os
from array import array
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from .coded_pictures import PictureReader
from .image_reading import MAX_ASPECT, MAX_SOURCE_PIXELS
from .signatures import read_head
from .threads import check_stop


# Formats of FFmpeg that are read. Those that open other files (concat, hls, dash, imf, sdp, rtsp, image2), devices,
# scripts and single pictures are not among them; animated images are read by Pillow (animations.py).
DEMUXERS = (
    "mov,matroska,avi,mpegts,mpeg,flv,live_flv,kux,asf,ogg,nut,ivf,obu,av1,h264,hevc,vvc,m4v,mpegvideo,"
    "mjpeg,mjpeg_2000,yuv4mpegpipe,mxf,gxf,rm,dv,wtv,nsv,nuv,vc1,vc1test,h261,h263,dirac,dnxhd,cavsvideo,avs2,avs3,"
    "wav,flac"  # recognised, so that the error says that they hold sound
)
MAX_FAILURES = 16  # consecutive unreadable packets after which a file is given up
MAX_UNDECODABLE = 3000  # packets at the start without a frame after which a file is given up
MAX_PROBLEMS = 20  # descriptions of damage that are kept
MAX_CHANGES = 1000  # changes of the decoder's configuration that are kept
MAX_REORDER = 16  # upper limit of frames that a decoder delays to put them in order
PROBE_FRAMES = 16  # decoded to check that time stamps follow the order of frames, if the stream does not say so
MAX_SECONDS = 10 * 366 * 86400.0  # longer videos have absurd time stamps
MAX_LAST_SECONDS = 86400.0  # of the last frame
JPEG_SIGNATURE, MULTI_PICTURE = b"\xff\xd8\xff", b"MPF\0"  # the latter marks a photograph with several pictures
CONFIGURATION = ("new_extradata", "palette", "param_change")  # side data that a decoder needs from then on
NO_STAMP = -(2**63)
ABSURD_STAMP = 2**60
KEY, DISCARDED, SHOWN = 1, 2, 4  # flags of a packet


@dataclass(frozen=True)
class VideoLimits:
    """Limits of a file. The defaults pass 12 hours at 60 frames per second, and 8192 x 8192 pixels.

    Attributes:
        max_source_pixels: height * width of an image before the resize; a frame may have three eighths of it.
        max_video_packets: packets of the video stream.
        max_animation_canvas: height * width of an animated GIF, PNG or WebP; Pillow holds several copies of it.
        max_animation_pixels: frames * height * width of an animated GIF, PNG or WebP, which bounds the time; a frame
            counts as at least 65,536 pixels.
    """

    max_source_pixels: int = MAX_SOURCE_PIXELS
    max_video_packets: int = 5_000_000
    max_animation_canvas: int = 2**24
    max_animation_pixels: int = 2**31

    @property
    def frame_pixels(self) -> int:
        """Most pixels of a frame. A decoder holds several frames, so that the limit is lower than that of images."""
        return -(-3 * self.max_source_pixels // 8)

    @property
    def allocated_pixels(self) -> int:
        """What FFmpeg may allocate for a frame: it rounds sides up to multiples of at most 128."""
        return self.frame_pixels + 128 * math.isqrt(MAX_ASPECT * self.frame_pixels) + 128**2


DEFAULT_LIMITS = VideoLimits()


# opening


class _NamelessFile:
    """A file without its name: FFmpeg takes `%` in the name of some files for a pattern."""

    def __init__(self, path: str):
        self._file = open(path, "rb")
        self.read, self.seek, self.tell, self.close = (
            self._file.read,
            self._file.seek,
            self._file.tell,
            self._file.close,
        )

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def open_container(file: str | io.BytesIO, name: str, limits: VideoLimits = DEFAULT_LIMITS):
    """Opens a file that `open_source` returned, with PyAV. Raises ValueError if it is no video of a known format.

    FFmpeg is limited to `DEMUXERS`, to the protocol that the file itself needs, and to the pixels of `limits`, before
    it allocates a frame.
    """
    import av

    head = read_head(file)
    is_jpeg = head.startswith(JPEG_SIGNATURE)  # FFmpeg recognises joined JPEGs only as a list of files
    if not isinstance(file, str):
        file, protocol = io.BytesIO(file.getvalue()), "data"  # threads must not share a position
    elif "%" in file:
        file, protocol = _NamelessFile(file), "data"
    else:
        file, protocol = "file:" + file, "file"  # the prefix keeps a path like "concat:a" from naming a protocol
    try:
        return av.open(
            file,
            format="mjpeg" if is_jpeg and MULTI_PICTURE not in head else None,
            options={"max_pixels": str(limits.allocated_pixels)},
            container_options={"format_whitelist": DEMUXERS, "protocol_whitelist": protocol},
            metadata_errors="ignore",
        )
    except av.error.ArgumentError as error:
        raise ValueError(
            f"{name} is not a video that PyAV can read: its format is none of those that are read as videos"
        ) from error
    except (av.error.FFmpegError, UnicodeError, ValueError, IndexError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{name} is not a video that PyAV can read: {reason}") from error


def size_of(file: str | io.BytesIO) -> int:
    return os.path.getsize(file) if isinstance(file, str) else file.getbuffer().nbytes


def check_sample_counts(file: str | io.BytesIO, name: str) -> None:
    """Raises ValueError if an mp4 names more samples than it has bytes, before FFmpeg allocates an index for them."""
    size = size_of(file)
    with open(file, "rb") if isinstance(file, str) else io.BytesIO(file.getvalue()) as stream:
        for kind, start, _ in _boxes(stream, 0, size):
            stream.seek(start)
            head = stream.read(16)
            at = {b"stsz": 8, b"trun": 4}[kind]
            count = int.from_bytes(head[at : at + 4], "big")
            if len(head) >= at + 4 and count > size:
                raise ValueError(f"{name} names {count} samples, more than its {size} bytes can hold")


PARENT_BOXES = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")
MAX_BOX_DEPTH = 16  # FFmpeg reads 10


def _boxes(stream, start: int, end: int, depth: int = 0):
    """Yields (kind, start of its content, end) of the boxes that count samples."""
    while start + 8 <= end:
        stream.seek(start)
        head = stream.read(16)
        length, kind, content = int.from_bytes(head[:4], "big"), head[4:8], start + 8
        if not kind.isascii() or len(head) < 8:
            return
        if length == 1:
            length, content = int.from_bytes(head[8:16], "big"), start + 16
        elif length == 0:
            length = end - start
        if length < content - start:
            return
        stop = min(end, start + length)
        if kind in PARENT_BOXES and depth < MAX_BOX_DEPTH:
            yield from _boxes(stream, content, stop, depth + 1)
        elif kind in (b"stsz", b"trun"):
            yield kind, content, stop
        start += length


class Problems(list):
    """Descriptions of damage. Keeps the first ones."""

    def append(self, text: str) -> None:
        if len(self) < MAX_PROBLEMS:
            super().append(text)


# packets and frames


@dataclass(frozen=True)
class StreamFacts:
    """Facts about a video stream from the header of its container."""

    format: str
    codec: str
    time_base: Fraction  # seconds per tick
    rate: Fraction | None  # nominal frames per second
    listed_packets: int  # entries of an index of all packets (mov, mp4); 0 without one
    announced: float  # seconds of the container
    has_other_streams: bool

    @classmethod
    def read(cls, av, container, stream) -> "StreamFacts":
        has_index = container.format.name.startswith("mov")
        start = max(0, container.start_time or 0) / av.time_base
        return cls(
            format=container.format.name,
            codec=stream.codec_context.name,
            time_base=stream.time_base or Fraction(1, av.time_base),
            rate=stream.average_rate or None,
            listed_packets=len(getattr(stream, "index_entries", ())) if has_index else 0,
            announced=(container.duration or 0) / av.time_base - start,
            has_other_streams=len(container.streams) > 1,
        )

    def ends_early(self, packets: int, frames: int, duration: float) -> str | None:
        """What is missing if the header announces more than the file holds. `duration`: seconds of its frames."""
        slack = 1.0 + 0.1 * self.announced if self.has_other_streams else 0.0
        lost = 4.5 if self.format == "avi" else 1.5  # frames: an AVI with B-frames announces their delay too
        longest = duration + slack + lost * duration / frames
        if self.listed_packets <= packets and (self.listed_packets or self.announced <= longest):
            return None
        of = f" of {self.announced:.1f}" if self.announced > duration else ""
        return f"it ends early, after {duration:.1f} s{of}"


def decode(av, context, packet, problems: list[str]) -> list:
    """The frames that a packet completes (None: those still in the decoder); none if it is damaged."""
    try:
        return context.decode(packet)
    except av.error.FFmpegError as error:
        problems.append(f"undecodable packet: {error.strerror}")
        return []


def read_packets(av, container, stream, problems: list[str]):
    """Yields the packets of a stream. Continues after damaged data."""
    failures = 0
    while failures < MAX_FAILURES:
        try:
            for packet in container.demux(stream):
                check_stop()
                if packet.size:
                    failures = 0
                    yield packet
            return
        except IndexError:  # PyAV: a packet of a stream that was not there when the file was opened
            continue
        except av.error.FFmpegError as error:
            failures += 1
            problems.append(f"unreadable data: {error.strerror}")


def _has_side_data(packet) -> bool:
    """Whether a packet has side data of any type: faster than to ask for each type."""
    try:
        return next(packet.iter_sidedata(), None) is not None
    except (ValueError, KeyError):  # PyAV: a type that it does not know
        return True


@dataclass
class PacketScan:
    """One pass over all packets of a stream, in file order, with the first frames decoded.

    Before a packet is decoded, its time stamp is replaced by its number, so that a frame tells which packet it is of.
    """

    pts: array = field(default_factory=lambda: array("q"))  # presentation time stamps, in ticks, or NO_STAMP
    dts: array = field(default_factory=lambda: array("q"))  # decoding time stamps, in ticks, or NO_STAMP
    durations: array = field(default_factory=lambda: array("q"))  # in ticks, 0 if unknown
    flags: bytearray = field(default_factory=bytearray)
    changes: list[tuple[int, list]] = field(default_factory=list)  # (packet, its CONFIGURATION side data)
    probed: list[int] = field(default_factory=list)  # the packets of the frames decoded so far
    first_frame: object = None
    reordered: bool = False  # frames are shown in another order than that of their packets
    refreshes: bool = False  # a keyframe of H.264 only begins to refresh the picture, or refers back (no IDR)

    def __len__(self) -> int:
        return len(self.flags)

    @classmethod
    def read(cls, av, container, stream, file_bytes: int, limits: VideoLimits, name: str, problems) -> "PacketScan":
        """Reads all packets and decodes the first frames.

        One frame is enough if packets show whether frames are reordered; else up to `PROBE_FRAMES`. Raises ValueError
        for more packets than `limits` allow.
        """
        scan, context, newest, held = cls(), stream.codec_context, None, 0
        reader = PictureReader(context.name, context.extradata)
        most_bytes = 4 * file_bytes + 2**20
        probing, may_expand = True, "matroska" in container.format.name
        has_b_frames = bool(context.has_b_frames)
        for packet in read_packets(av, container, stream, problems):
            number = len(scan)
            if number >= limits.max_video_packets:
                raise ValueError(f"{name} has more than max_video_packets={limits.max_video_packets} video packets")
            held += packet.size
            if held > most_bytes and not may_expand:
                raise ValueError(f"{name}: its first {number} packets share bytes of the file ({file_bytes} in all)")
            scan._add(packet, reader)
            pts = packet.pts
            if pts is not None:
                scan.reordered = scan.reordered or (newest is not None and pts < newest)
                newest = pts
            if packet.is_corrupt:
                problems.append("a packet is cut short")
            if probing:
                packet.pts = packet.dts = number
                scan._add_frames(decode(av, context, packet, problems))
                probed = len(scan.probed)
                if probed:
                    probing = has_b_frames and not scan.reordered and probed < PROBE_FRAMES
                else:
                    probing = number < MAX_UNDECODABLE
        if not scan.probed:
            scan._add_frames(decode(av, context, None, problems))
        scan.reordered = scan.reordered or has_b_frames
        scan.refreshes = reader.has_recovery_points
        return scan

    @property
    def is_edited(self) -> bool:
        """Whether an mp4 joins several parts of its video (edit list): only then decoding stamps fall back in it."""
        pts, dts = np.frombuffer(self.pts, np.int64), np.frombuffer(self.dts, np.int64)
        return bool((np.diff(dts) < 0).any() and (np.minimum(pts, dts) > -ABSURD_STAMP).all())

    def _add(self, packet, reader: PictureReader) -> None:
        pts, dts, is_key = packet.pts, packet.dts, packet.is_keyframe
        self.pts.append(NO_STAMP if pts is None else pts)
        self.dts.append(NO_STAMP if dts is None else dts)
        self.durations.append(max(0, packet.duration or 0))
        kinds = [kind for kind in CONFIGURATION if packet.has_sidedata(kind)] if _has_side_data(packet) else ()
        if side_data := [packet.get_sidedata(kind) for kind in kinds]:
            if len(self.changes) <= MAX_CHANGES:
                self.changes.append((len(self), side_data))
            for item in side_data:
                if item.data_type == "new_extradata":
                    reader.read_extradata(bytes(item))
        flags = (KEY if is_key else 0) | (DISCARDED if packet.is_discard else SHOWN)
        if is_key or reader.reads_packets:
            data = memoryview(packet)
            if reader.is_hidden(data):
                flags &= ~SHOWN
            elif reader.is_second_field(data, is_key) and len(self):
                flags = 0
                self.durations[-1] += self.durations.pop() if self.durations[-1] else 0
                self.durations.append(0)
        self.flags.append(flags)

    def _add_frames(self, frames) -> None:
        for frame in frames:
            if self.first_frame is None:
                self.first_frame = frame
            self.probed.append(frame.pts)


# order and times


@dataclass(frozen=True)
class FrameIndex:
    """Which packet each frame is of, and when it is shown.

    Attributes:
        stamps: int64 [K], comparable within the file.
        flags: uint8 [K].
        shown: [N], the packet of each frame.
        number_of: [K], the frame of each packet, or -1.
        is_ordered: False if the order of frames is not known before they are decoded: then they are counted.
        is_steady: True if the file gives every packet a stamp of its own, so that seeking by stamp is possible.
        times: float64 [N], seconds.
        duration: seconds.
    """

    stamps: np.ndarray
    flags: np.ndarray
    shown: np.ndarray
    number_of: np.ndarray
    is_ordered: bool
    is_steady: bool
    times: np.ndarray
    duration: float

    @classmethod
    def of(cls, scan: PacketScan, facts: StreamFacts, problems: list[str]) -> "FrameIndex":
        flags = np.frombuffer(bytes(scan.flags), np.uint8)
        tick, frame_seconds = float(facts.time_base), 1 / float(facts.rate or 25)
        stamps, known, is_steady = _repaired_stamps(scan, flags, facts, problems)
        has_stamps = stamps is not None
        if not has_stamps:
            stamps = np.arange(len(flags), dtype=np.int64)
        probed = [int(stamps[packet]) for packet in scan.probed if packet is not None]
        follows = len(probed) == len(scan.probed) and all(a <= b for a, b in zip(probed, probed[1:], strict=False))
        is_ordered = has_stamps and follows and (bool(known.all()) or not scan.reordered)

        shown = np.flatnonzero(flags & SHOWN)
        shown = shown[np.argsort(stamps[shown], kind="stable")]
        origin = 0
        if is_ordered:
            shown, origin = _without_lost_start(scan, facts, flags, stamps, shown, problems)
        number_of = _numbers_of(shown, len(flags))
        second = np.flatnonzero((flags & (KEY | DISCARDED | SHOWN)) == 0)  # a field whose first one is lost
        number_of[second[second > 0]] = number_of[second[second > 0] - 1]

        if has_stamps:
            times = (stamps[shown] - stamps[shown[0]] + origin) * tick
            last_length = _last_length(scan, facts, shown, times)
        else:
            times, last_length = np.arange(len(shown)) * frame_seconds, frame_seconds
        duration = seconds_of(times, last_length or frame_seconds, facts.rate, tick)
        return cls(stamps, flags, shown, number_of, is_ordered, is_steady, times, duration)

    @classmethod
    def of_parts(cls, scan: PacketScan, facts: StreamFacts, decoded: list[int]) -> "FrameIndex":
        """The index of an edited mp4, whose parts may repeat and overlap.

        Args:
            decoded: the packet of each frame that a decode of the whole file shows.
        """
        flags = np.frombuffer(bytes(scan.flags), np.uint8)
        stamps = np.frombuffer(scan.pts, np.int64)
        tick, shown = float(facts.time_base), np.array(decoded)
        shown = shown[np.argsort(stamps[shown], kind="stable")]
        times = (stamps[shown] - stamps[shown[0]]) * tick
        last_length = _last_length(scan, facts, shown, times) or 1 / float(facts.rate or 25)
        duration = seconds_of(times, last_length, facts.rate, tick)
        return cls(stamps, flags, shown, _numbers_of(shown, len(flags)), True, False, times, duration)


def _numbers_of(shown: np.ndarray, packets: int) -> np.ndarray:
    """[N], the packet of each frame -> [K], the frame of each packet, or -1."""
    numbers = np.full(packets, -1)
    numbers[shown] = np.arange(len(shown))
    return numbers


def _last_length(scan: PacketScan, facts: StreamFacts, shown: np.ndarray, times: np.ndarray) -> float:
    """Seconds of the last frame: those of its packet, else the usual distance between frames."""
    length = scan.durations[int(shown[-1])] * float(facts.time_base)
    if 0 < length <= MAX_LAST_SECONDS:
        return length
    return float(np.median(np.diff(times))) if len(times) > 1 else 1 / float(facts.rate or 25)


def seconds_of(times: np.ndarray, last_length: float, rate: Fraction | None, tick: float) -> float:
    """Seconds from the first frame to the end of the last.

    N / rate if `times` are multiples of 1 / rate rounded to ticks, which avoids the rounding; else the last time +
    `last_length`.
    """
    if rate and np.abs(times - np.arange(len(times)) / float(rate)).max() <= 1.001 * tick:
        return float(len(times) / rate)
    return float(times[-1] + last_length)


def _without_lost_start(scan, facts, flags, stamps, shown, problems) -> tuple[np.ndarray, int]:
    """(`shown` without frames before the first that can be decoded, ticks from the first packet to the first frame).

    Frames of a stream cut at a keyframe that refer to frames before the cut are never shown, and times count from the
    keyframe. A stream cut elsewhere (a broadcast) starts at the first keyframe, and its times count from the first
    packet, as those of a file whose beginning is damaged.
    """
    first = scan.probed[0]
    lost = int(np.searchsorted(stamps[shown], stamps[first], side="left"))
    if lost == 0 or lost >= len(shown):
        return shown, 0
    if shown[:lost].min() > first:
        return shown[lost:], 0
    problems.insert(0, f"its first {lost} frames cannot be decoded")
    if facts.format in STREAMS and not flags[int(shown[:lost].min())] & KEY:
        return shown[lost:], int(stamps[shown[lost]] - stamps[shown[0]])
    return shown, 0


STREAMS = ("mpegts", "mpeg", "h264", "hevc", "vvc", "m4v", "mpegvideo", "cavsvideo", "avs2", "avs3")


def _repaired_stamps(scan: PacketScan, flags, facts: StreamFacts, problems: list[str]):
    """(int64 [K] or None without usable ones, whether each is known, whether nothing had to be repaired).

    A single wrong stamp is replaced by what its neighbours say, and so is a missing one. A clock that starts again
    goes on from where it was.
    """
    pts, dts = np.frombuffer(scan.pts, np.int64).copy(), np.frombuffer(scan.dts, np.int64).copy()
    relevant = (flags & (SHOWN | DISCARDED)) > 0
    known = np.abs(pts.astype(np.float64)) < ABSURD_STAMP
    known_dts = np.abs(dts.astype(np.float64)) < ABSURD_STAMP
    if not known[relevant].any():
        if (scan.pts and scan.pts[0] != NO_STAMP) and relevant.any():
            problems.append("its time stamps are absurd, and times follow from the frame rate")
        return None, known, False
    shown = np.flatnonzero(relevant)
    spikes = shown[known[shown]][_spikes(pts[shown[known[shown]]])]
    known[spikes] = False
    if not known[shown].any():
        return None, known, False
    distinct = len(np.unique(pts[flags & SHOWN > 0])) == np.count_nonzero(flags & SHOWN)
    ascending = bool(np.all(np.diff(dts[known_dts]) >= 0))
    is_steady = bool(known.all()) and distinct and ascending
    if not ascending:
        _join_clocks(pts, dts, known, known_dts, scan)
    missing = shown[~known[shown]]
    if len(missing):
        _fill(pts, dts, known, known_dts, shown, missing, facts)
    second = np.flatnonzero(~relevant)
    pts[second[second > 0]] = pts[second[second > 0] - 1]
    known = known | ~relevant
    span = float(pts[shown].max()) - float(pts[shown].min())
    if span * float(facts.time_base) > MAX_SECONDS:
        problems.append("its time stamps are absurd, and times follow from the frame rate")
        return None, known, False
    if span == 0 and len(shown) > 1:
        return None, known, False
    return pts, known, is_steady


def _spikes(stamps: np.ndarray) -> np.ndarray:
    """Positions of single stamps that are outside those of all their neighbours, which go on as if they were not
    there."""
    count = len(stamps)
    if count < 2 * MAX_REORDER:
        return np.zeros(0, np.intp)
    step = np.diff(stamps)
    before, after = np.abs(step[:-1]), np.abs(step[1:])
    around = np.abs(stamps[2:] - stamps[:-2])
    candidates = np.flatnonzero(np.minimum(before, after) > 4 * np.maximum(around, 1)) + 1
    found = []
    for k in candidates[:10000].tolist():
        left, right = stamps[max(0, k - 2 * MAX_REORDER) : k], stamps[k + 1 : k + 1 + 2 * MAX_REORDER]
        others = np.concatenate([left, right])
        low, high = int(others.min()), int(others.max())
        value = int(stamps[k])
        returns = (value > high and len(right) > MAX_REORDER) or (value < low and len(left) > MAX_REORDER)
        if returns:  # `MAX_REORDER` packets later, a true stamp cannot be outside of those around it
            found.append(k)
    return np.array(found, np.intp)


def _join_clocks(pts, dts, known, known_dts, scan: PacketScan) -> None:
    """Shifts stamps in place, so that a clock that falls back goes on from where it was.

    If both kinds of stamps are there, both have to fall: a single wrong decoding stamp changes no times.
    """
    clock = np.where(known_dts, dts, np.where(known, pts, NO_STAMP))
    places = np.flatnonzero(clock != NO_STAMP)
    steps = np.diff(clock[places])
    usual = max(1, int(np.median(np.abs(steps)))) if len(steps) else 1
    offset = np.zeros(len(pts), np.int64)
    for i in np.flatnonzero(steps < -MAX_REORDER * usual).tolist():
        before, after = places[i], places[i + 1]
        if known[before] and known[after] and pts[after] - pts[before] >= -MAX_REORDER * usual:
            continue
        offset[after:] += usual - int(steps[i])
    pts[known] += offset[known]
    dts[known_dts] += offset[known_dts]


def _fill(pts, dts, known, known_dts, shown, missing, facts: StreamFacts) -> None:
    """Estimates missing stamps in place: by decoding stamps if there are, else by position between known ones."""
    both = known & known_dts
    lead = int(np.median(pts[both] - dts[both])) if both.any() else 0
    by_dts = missing[known_dts[missing]] if both.any() else missing[:0]
    there = shown[known[shown]]
    pts[by_dts] = dts[by_dts] + lead
    rest = np.setdiff1d(missing, by_dts)
    if len(rest):
        rank = np.full(len(pts), 0, np.int64)
        rank[shown] = np.arange(len(shown))
        step = 1 / float(facts.rate or 25) / float(facts.time_base)
        x, base = rank[there], int(pts[there[0]])
        y = (pts[there] - base).astype(np.float64)
        estimate = np.interp(rank[rest], x, y)
        estimate += step * np.maximum(0, rank[rest] - x[-1]) - step * np.maximum(0, x[0] - rank[rest])
        pts[rest] = np.rint(estimate).astype(np.int64) + base
