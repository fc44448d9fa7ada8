"""Small video files for tests. Each frame shows its number, so that a test can read which frame it got."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


WIDTH, HEIGHT = 96, 64
COLUMNS, ROWS = 4, 3  # blocks of a frame, dark or light: the 12 bits of its number, the lowest at the top left
FIXED_POINT = 65536  # 1.0 in the display matrix of an mp4 track header

X264_CLOSED = {"x264-params": "keyint=10:min-keyint=10:bframes=3:scenecut=0:log-level=none"}
X264_OPEN = {"x264-params": "keyint=10:min-keyint=10:open_gop=1:bframes=3:scenecut=0:log-level=none"}
X265_OPEN = {"x265-params": "keyint=10:min-keyint=10:scenecut=0:pools=none:log-level=none"}


def draw(number, width=WIDTH, height=HEIGHT):
    """uint8 [height, width, 3]."""
    bit = np.arange(height)[:, None] * ROWS // height * COLUMNS + np.arange(width) * COLUMNS // width
    return np.repeat((28 + 200 * ((number >> bit) & 1)).astype(np.uint8)[..., None], 3, axis=2)


def read_number(image):
    """The number that an upright frame of any size shows."""
    height, width = image.shape[:2]
    number = 0
    for bit in range(ROWS * COLUMNS):
        row, column = divmod(bit, COLUMNS)
        block = image[
            row * height // ROWS : (row + 1) * height // ROWS,
            column * width // COLUMNS : (column + 1) * width // COLUMNS,
        ]
        h, w = block.shape[:2]
        number |= int(block[h // 4 : -(h // 4), w // 4 : -(w // 4)].mean() > 128) << bit
    return number


def write_video(
    path,
    count=40,
    rate=30,
    codec="libx264",
    options=None,
    pixels="yuv420p",
    size=(WIDTH, HEIGHT),
    stamps=None,
    time_base=None,
    start=0,
    muxer=None,
    aspect=None,
    sound=False,
):
    """Encodes frames 0..count-1. `stamps`: their times in `time_base`; by default one every 1 / rate, from frame time
    `start`."""
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        audio = container.add_stream("aac", rate=16000) if sound else None
        if time_base is not None:
            stream.codec_context.time_base = time_base
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(draw(number, *size), "rgb24").reformat(format=pixels)
            frame.time_base = time_base or Fraction(1, rate)
            frame.pts = start + number if stamps is None else stamps[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio is not None:
            _write_tone(container, audio)
    return path


def write_sound(path):
    """One second of a tone, without video."""
    with av.open(str(path), "w") as container:
        _write_tone(container, container.add_stream("pcm_s16le", rate=16000))
    return path


def _write_tone(container, stream):
    for start in range(0, 16000, 1024):
        tone = (8000 * np.sin(np.arange(start, start + 1024) / 6)).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, start, Fraction(1, 16000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def copy_packets(source, path, first=None, muxer=None):
    """The same packets in another container. `first`: a frame to cut at, as `-ss ... -c copy` does; packets from the
    keyframe before it have negative times, which mp4 stores as an edit list."""
    with av.open(str(source)) as old, av.open(str(path), "w", options=muxer or {}) as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        packets = [packet for packet in old.demux(stream) if packet.size]
        if first is not None:
            shown = sorted(packet.pts for packet in packets)[first]
            start = max(i for i, packet in enumerate(packets) if packet.is_keyframe and packet.pts <= shown)
            packets = packets[start:]
        for packet in packets:
            packet.stream = copy
            if first is not None:
                packet.pts, packet.dts = packet.pts - shown, packet.dts - shown
            new.mux(packet)
    return path


def turn(source, path, matrix):
    """Writes a display matrix (a, b, c, d) into an mp4: x' = a x + c y, y' = b x + d y."""
    data = bytearray(open(source, "rb").read())
    at = data.index(b"tkhd") + 4
    at += 40 if data[at] == 0 else 52
    a, b, c, d = (FIXED_POINT * x for x in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    open(path, "wb").write(data)
    return path


def write_edits(source, path, edits):
    """An mp4 of `write_video` with other edits: (thousandths of a second, first frame or None for a gap)."""
    data = bytearray(Path(source).read_bytes())
    begin = data.find(b"elst") - 4
    size, (first,) = int.from_bytes(data[begin : begin + 4], "big"), struct.unpack_from(">i", data, begin + 20)
    with av.open(str(source)) as container:
        stream = container.streams.video[0]
        ticks = int(1 / stream.average_rate / stream.time_base)
    entries = [(length, -1 if frame is None else first + round(frame * ticks), 1, 0) for length, frame in edits]
    box = struct.pack(">I4sII", 16 + 12 * len(entries), b"elst", 0, len(entries))
    box += b"".join(struct.pack(">Iihh", *entry) for entry in entries)
    data[begin : begin + size] = box
    for parent in (b"edts", b"trak", b"moov"):  # the index is after the frames, so that no offset changes
        at = data.rfind(parent, 0, begin + 4) - 4
        data[at : at + 4] = (int.from_bytes(data[at : at + 4], "big") + len(box) - size).to_bytes(4, "big")
    Path(path).write_bytes(data)
    return path


def decode_all(path):
    """[(seconds from the first frame, uint8 [h, w, 3])] of a plain decode from the start, one thread."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
    first = frames[0][0]
    return [(None if time is None else time - first, image) for time, image in frames]


def sequential(path):
    """{time stamp in ticks: uint8 [h, w, 3]} of all packets on one thread, without seeking."""
    frames = {}
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for packet in container.demux(stream):
            try:
                frames.update((frame.pts, frame.to_ndarray(format="rgb24")) for frame in packet.decode())
            except av.error.FFmpegError:
                continue
    return frames
