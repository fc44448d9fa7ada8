"""Which formats are opened, what each packet shows and when, in files where packets are not simply frames; limits."""

import struct
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from interrupts import seconds_to_stop
from make_media import decode_all, draw, read_number, sequential, write_edits, write_video
from PIL import Image
from video_kinds import SMALL, make, warnings  # noqa: F401

from moss_vl import decord_video
from moss_vl.coded_pictures import PictureReader
from moss_vl.decord_video import DecordVideo
from moss_vl.video_files import PyAVVideo, UntrueKeyframes
from moss_vl.video_packets import VideoLimits, _join_clocks, _spikes
from moss_vl.video_processing_moss_vl import MossVLVideoProcessor
from moss_vl.video_reading import open_video


MEDIA = Path(__file__).parent / "media"


def read(video, numbers):
    problems = []
    try:
        got = list(video.frames(numbers, problems))
    except UntrueKeyframes:
        got = list(video.frames(numbers, problems, from_start=True))
    return got, problems


def check_against_sequential(path, problems=()):
    """All frames, frames one by one, and frames read in 2 and 4 parts are those of a plain decode."""
    truth = list(sequential(path).values())
    video = open_video(path)
    total = len(video.times)
    assert total == len(truth) and video.problems == list(problems)
    parts = [[[*range(total)]], [[i] for i in range(total)], *(video.chunks([*range(total)], n) for n in (2, 4))]
    for chunks in parts:
        for chunk in chunks:
            got, found = read(video, chunk)
            assert found == [] and [(number, shown) for number, shown, _ in got] == [(i, i) for i in chunk]
            assert all(np.array_equal(image, truth[number]) for number, _, image in got)
    return video


# formats


def test_only_the_file_that_was_given(make, tmp_path):
    clip = make("h264.mp4")
    (tmp_path / "secret.mp4").write_bytes(clip.read_bytes())
    (tmp_path / "neighbour.ts").write_bytes(make("stream.ts").read_bytes())
    texts = {
        "list.mp4": "ffconcat version 1.0\nfile 'secret.mp4'\n",
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{tmp_path / 'neighbour.ts'}\n#EXT-X-ENDLIST\n",
        "list.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        "list.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"></MPD>',
        "art.ans": "\x1b[31mtext\n" * 50,
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        for source in (tmp_path / name, text.encode()):
            for backend in ("pyav", "decord"):
                with pytest.raises(ValueError, match="is not a video that PyAV can read"):
                    open_video(source, backend=backend)
        with open(tmp_path / name, "rb") as file, pytest.raises(ValueError, match=name):
            open_video(file)


@pytest.mark.parametrize("suffix", ["ppm", "jpg", "png"])
def test_patterns_in_file_names_are_only_names(suffix, make, tmp_path):
    for number in (1, 2):
        av.VideoFrame.from_ndarray(draw(number), "rgb24").to_image().save(tmp_path / f"c{number}.{suffix}")
    path = tmp_path / f"c%d.{suffix}"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a video"):
        open_video(path)
    path.write_bytes(make("h264.mp4").read_bytes())
    for backend in ("pyav", "decord"):
        video = open_video(path, backend=backend)
        assert [read_number(image) for _, _, image in video.frames([0, 17], [])] == [0, 17]


# configuration in mid-stream


@pytest.mark.parametrize("name", ["two_sample_descriptions.mp4", "flv_switch_size.flv"])
def test_a_new_configuration_in_mid_stream(name):
    check_against_sequential(MEDIA / name)


def test_a_stream_that_changes_its_size(tmp_path):
    parts = [
        write_video(tmp_path / f"{i}.ts", options={"g": "10"}, size=size)
        for i, size in enumerate([(96, 64), (160, 96)])
    ]
    path = tmp_path / "both.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))  # the clock starts again
    video = open_video(path)
    assert (
        len(video.times) == 80 and np.all(np.diff(video.times) > 0) and video.duration == pytest.approx(80 / 30, 0.05)
    )
    for wanted in ([*range(80)], [45], [79], [3, 60]):
        got, problems = read(video, wanted)
        assert [read_number(image) for _, _, image in got] == [i % 40 for i in wanted] and problems == []


@pytest.mark.parametrize("every", [1, 8])
def test_a_palette_as_side_data(every, tmp_path):
    """An avi of 8-bit palettes, whose palette comes with the first packet, or changes with every packet."""
    path = tmp_path / "pal8.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("rawvideo", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "pal8"
        for number in range(16):
            indices = np.arange(1024, dtype=np.uint8).reshape(32, 32)
            shade = 16 * (number if every == 1 else 0)
            palette = np.stack([np.full(256, 255), *[(np.arange(256) + shade) % 256] * 3], 1).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray((indices + number, palette), "pal8")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    check_against_sequential(path)


# time stamps


def jittered(path, stamps):
    return write_video(path, stamps=stamps, time_base=Fraction(1, 1000), codec="mjpeg", pixels="yuvj420p", count=40)


def test_a_doubled_time_stamp_discards_no_other(make, tmp_path):
    stamps = np.cumsum([0, *[17 if i % 3 else 1200 for i in range(39)]])
    path = jittered(tmp_path / "jitter.mkv", stamps.tolist())
    data, times = path.read_bytes(), stamps / 1000
    video = open_video(path)
    assert np.allclose(video.times, times)
    with av.open(str(path)) as container:
        position = [p.pos for p in container.demux(video=0) if p.size][11]
    assert data  # the block of frame 11 follows its position: track, 16-bit time, flags
    changed = bytearray(data)
    block = changed.index(b"\x81", position)
    old = int.from_bytes(changed[block + 1 : block + 3], "big", signed=True)
    step = int(stamps[11] - stamps[10])
    changed[block + 1 : block + 3] = (old - step).to_bytes(2, "big", signed=True)
    (tmp_path / "doubled.mkv").write_bytes(changed)
    video = check_against_sequential_doubled(tmp_path / "doubled.mkv")
    times[11] = times[10]
    assert np.allclose(video.times, times) and video.problems == []


def check_against_sequential_doubled(path):
    video = open_video(path)
    got, problems = read(video, [*range(40)])
    assert [read_number(image) for _, _, image in got] == [*range(40)] and problems == []
    assert [read_number(image) for i in range(40) for _, _, image in read(video, [i])[0]] == [*range(40)]
    return video


def test_single_wrong_stamps_are_found():
    stamps = np.arange(200) * 40
    stamps[:198] = stamps[:198].reshape(-1, 3)[:, [2, 0, 1]].ravel()  # reordered
    assert _spikes(stamps).tolist() == []
    for value in (0, 10**12, -(10**9)):
        wrong = stamps.copy()
        wrong[77] = value
        assert _spikes(wrong).tolist() == [77]
    gap = stamps + np.where(np.arange(200) >= 120, 10**7, 0)  # a still picture
    assert _spikes(gap).tolist() == []


def test_a_clock_that_starts_again_goes_on():
    pts = np.concatenate([np.arange(50) * 40 + 9000, np.arange(50) * 40])
    dts, known = pts.copy(), np.ones(100, bool)
    _join_clocks(pts, dts, known, known, None)
    assert np.all(np.diff(pts) == 40)
    pts, dts = np.arange(50) * 40, np.arange(50) * 40
    dts[13] = 10**9  # a single wrong decoding stamp
    _join_clocks(pts, dts, np.ones(50, bool), np.ones(50, bool), None)
    assert np.all(np.diff(pts) == 40)


def test_absurd_time_stamps():
    video = open_video(MEDIA / "ivf_pts_halfmax.ivf")
    assert video.duration == pytest.approx(2.4) and np.allclose(video.times, np.arange(60) / 25)
    assert "absurd" in video.problems[0]


# fields


def interlaced(path):
    options = {"x264-params": "interlaced=1:keyint=10:min-keyint=10:bframes=2:scenecut=0:log-level=none"}
    return write_video(path, options=options)


@pytest.mark.parametrize("suffix", ["mp4", "ts", "mkv"])
def test_interlaced_frames(suffix, tmp_path):
    video = check_against_sequential(interlaced(tmp_path / f"fields.{suffix}"))
    assert video.duration == pytest.approx(40 / 30, abs=0.01)


class _Writer:
    def __init__(self):
        self.bits = ""

    def put(self, value, count):
        self.bits += format(value, f"0{count}b")
        return self

    def ue(self, value):
        code = format(value + 1, "b")
        self.bits += "0" * (len(code) - 1) + code
        return self

    def unit(self, kind):
        bits = self.bits + "1"
        bits += "0" * (-len(bits) % 8)
        return (
            b"\0\0\1"
            + bytes([0x60 | kind])
            + bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
            + b"\xff" * 9
        )


def test_second_fields_of_h264():
    sps = _Writer().put(77, 8).put(0, 8).put(30, 8).ue(0).ue(0).ue(2).ue(1).put(0, 1).ue(5).ue(2).put(0, 1).unit(7)
    pps = _Writer().ue(0).ue(0).unit(8)

    def picture(number, field=None):
        slice_ = _Writer().ue(0).ue(7).ue(0).put(number, 4).put(field is not None, 1)
        return (slice_ if field is None else slice_.put(field, 1)).unit(1)

    reader = PictureReader("h264", None)
    packets = [
        (sps + pps + picture(0, 0), False),
        (picture(0, 1), True),
        (picture(1, 0), False),  # its second field is lost
        (picture(2, 0), False),
        (picture(2, 1), True),
        (picture(3), False),
        (picture(4, 0) + picture(4, 1), False),  # both fields
        (picture(5, 1), False),
        (picture(5, 0), True),
    ]
    assert [reader.is_second_field(memoryview(data), i == 0) for i, (data, _) in enumerate(packets)] == [
        second for _, second in packets
    ]
    for cut in range(1, 30):  # damaged headers are no error
        reader.is_second_field(memoryview((sps + pps + picture(0, 0))[:cut]), True)


# damage


def test_a_damaged_beginning_does_not_shift_later_times(warnings):
    path = MEDIA / "first_key_zeroed_h264_b.mp4"
    video = open_video(path)
    assert len(video.times) == 60 and np.allclose(video.times, np.arange(60) / 25)
    assert video.problems[0] == "its first 8 frames cannot be decoded"
    clip = MossVLVideoProcessor(num_frames=60, **SMALL).extract(path)[0]
    assert clip.timestamps == pytest.approx([i / 25 for i in range(8, 60)])
    assert len(warnings) == 1 and "first 8 frames" in warnings[0]


def test_side_data_that_pyav_does_not_know():
    check_against_sequential(MEDIA / "exif_mjpeg.mov")


def test_pixels_that_ffmpeg_cannot_convert():
    with pytest.raises(ValueError, match=r"rgb4.nut.*pixel format rgb4 cannot be converted"):
        MossVLVideoProcessor(**SMALL).extract(MEDIA / "rgb4.nut")


# limits


@pytest.mark.parametrize(
    "edits",
    [
        [(700, 0), (300, None), (800, 20)],
        [(500, 10), (500, 0)],
        [(520, 3), (520, 0), (640, 20.4)],
        [(200, 8), (600, 4)],
        [(760, 22), (941, 9.5), (105, 40)],
        [(301, None), (1240, 13), (357, 11.7), (105, 38)],
    ],
)
@pytest.mark.parametrize("options", [{"bf": "0", "g": "12"}, {"bf": "3", "g": "15", "x264-params": "open-gop=1"}])
def test_an_mp4_that_joins_parts_of_its_video(edits, options, tmp_path):
    source = write_video(tmp_path / "whole.mp4", count=50, rate=25, options=options, muxer={"movie_timescale": "1000"})
    path = write_edits(source, tmp_path / "edited.mp4", edits)
    expected = sorted(decode_all(path), key=lambda pair: pair[0])
    video = open_video(path)
    times = np.array([time for time, _ in expected])
    assert video.problems == [] and np.allclose(video.times, times - times[0], atol=0.001)
    for numbers in (range(len(times)), range(0, len(times), 7), [len(times) - 1]):
        found = sorted(video.frames(list(numbers), problems := []), key=lambda frame: frame[0])
        assert [frame[:2] for frame in found] == [(n, n) for n in numbers] and problems == []
        assert [read_number(x) for *_, x in found] == [read_number(expected[n][1]) for n in numbers]


def test_joined_jpegs_are_a_video_and_one_is_not(tmp_path):
    path = write_video(tmp_path / "x.mjpeg", count=6, codec="mjpeg", pixels="yuvj420p")
    for source in (path, path.read_bytes()):
        found, problems = read(open_video(source), [0, 3, 5])
        assert [read_number(image) for *_, image in found] == [0, 3, 5] and problems == []
    Image.new("RGB", (64, 64)).save(photo := tmp_path / "one.jpg")
    with pytest.raises(ValueError, match="is a still JPEG image; expected a video"):
        open_video(photo)


def test_samples_that_the_file_cannot_hold():
    began = time.monotonic()
    with pytest.raises(ValueError, match="many_1000000.mp4' names 1000000 samples, more than its 7658 bytes"):
        open_video(MEDIA / "many_1000000.mp4")
    assert time.monotonic() - began < 1


def test_boxes_nested_without_end():
    depth = 5000
    boxes = b"".join(struct.pack(">I4s", 8 * (depth - i), b"moov") for i in range(depth))
    with pytest.raises(ValueError, match="not a video that PyAV can read"):
        open_video(struct.pack(">I4s8s", 16, b"ftyp", b"isom") + boxes)


def test_limits_are_options(make, tmp_path):
    path = make("h264.mp4")
    for options, message in (
        ({"max_video_packets": 39}, "40 video packets, over max_video_packets=39"),
        ({"max_source_pixels": 96 * 64 * 8 // 3 - 3}, "96 x 64 pixels, over the limit of 6143.*max_source_pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            MossVLVideoProcessor(**options).plan(path)
        with pytest.raises(ValueError, match=message):
            MossVLVideoProcessor().plan(path, **options)
    with pytest.raises(ValueError, match="more than max_video_packets=39"):
        MossVLVideoProcessor().plan(make("stream.ts"), max_video_packets=39)
    with pytest.raises(ValueError, match="over the limit of 100000 .*max_animation_pixels"):
        MossVLVideoProcessor().plan(make("animation.gif"), max_animation_pixels=100000)
    with pytest.raises(ValueError, match="max_source_pixels must be"):
        MossVLVideoProcessor(max_source_pixels=0)
    MossVLVideoProcessor(max_source_pixels=96 * 64 * 8 // 3, max_video_packets=40).plan(path)
    assert not any("max_source_pixels" in name for name in MossVLVideoProcessor(max_source_pixels=9999).to_dict())


def test_a_canvas_over_the_limit_is_not_allocated():
    with pytest.raises(ValueError, match="gif_canvas_13k.gif.*max_animation_canvas"):
        open_video(MEDIA / "gif_canvas_13k.gif")
    assert VideoLimits().frame_pixels >= 8192 * 4320


@pytest.mark.parametrize("threads", [1, 4])
def test_an_interrupt_stops_all_threads(threads, tmp_path):
    path = write_video(tmp_path / "long.mp4", count=2000, size=(640, 360), options={"preset": "ultrafast", "g": "250"})
    processor = MossVLVideoProcessor(num_frames=200, **SMALL)

    def work():
        for _ in range(50):
            processor.extract(path, num_extract_threads=threads)

    assert seconds_to_stop(work, after=0.3) < 0.5


# decord


def test_decord_reads_only_what_it_gets_right(make, monkeypatch):
    said = []
    monkeypatch.setattr(decord_video.logger, "warning", said.append)
    for name in ("h264.mp4", "vp9.webm", "variable.mp4"):
        assert isinstance(open_video(make(name), backend="decord"), DecordVideo) and not said, name
    for name in (
        "late.mkv",
        "h264_open_gop.mp4",
        "h265_open_gop.mp4",
        "h264_cut.mp4",
        "stream.ts",
        "raw.h264",
    ):
        video = open_video(make(name), backend="decord")
        assert isinstance(video, PyAVVideo) and len(said) == 1 and name in said.pop()
        assert read_number(read(video, [len(video.times) - 1])[0][0][2]) == read_number(decode_all(make(name))[-1][1])
    video = open_video(MEDIA / "two_sample_descriptions.mp4", backend="decord")
    assert isinstance(video, PyAVVideo) and "configuration" in said.pop()


def test_decord_gets_no_keyframes_that_only_begin_a_refresh(tmp_path):
    options = {"x264-params": "keyint=10:intra-refresh=1:bframes=0:log-level=none"}
    video = open_video(write_video(tmp_path / "refresh.mp4", options=options), backend="decord")
    assert isinstance(video, PyAVVideo) and "refresh" in video.needs_pyav()
    assert [read_number(image) for _, _, image in read(video, [15, 39])[0]] == [15, 39]


def test_decord_gets_no_file_that_may_be_a_playlist(tmp_path):
    """Newer versions of FFmpeg skip a box that older ones, as in decord, take for the first line of a playlist."""
    whole = write_video(tmp_path / "a.mp4", muxer={"movflags": "frag_keyframe+empty_moov+default_base_moof"})
    path = tmp_path / "b.mp4"
    path.write_bytes(struct.pack(">I4s8x", 16, b"M3U\n") + whole.read_bytes())
    assert isinstance(open_video(whole, backend="decord"), DecordVideo)
    video = open_video(path, backend="decord")
    assert isinstance(video, PyAVVideo) and "first bytes" in video.needs_pyav() and len(video.times) == 40
