"""Videos: which frames are taken, that they are the right ones in every kind of file, their size, and what is refused."""

import base64
import gc
import io
import json
import logging
import random
import sys
import threading
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import make_media
import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT
from make_media import (
    X264_CLOSED,
    X264_OPEN,
    X265_OPEN,
    copy_packets,
    decode_all,
    draw,
    read_number,
    turn,
    write_video,
)
from PIL import Image
from transformers.video_utils import VideoMetadata

from moss_vl import clip_decoding, video_files, video_reading, video_sampling
from moss_vl.resizing import fit_video_size
from moss_vl.video_processing_moss_vl import MossVLVideoProcessor
from moss_vl.video_reading import open_video
from moss_vl.video_sampling import frame_count, sample_indices, segment_times, share_frames


CLIP = GOLDEN / "processing" / "media" / "v5s_320x240_30.mp4"  # 150 frames
LONG = GOLDEN / "processing" / "media" / "v8s_426x240_2997.mp4"  # 240 frames
SMALL = {"size": {"shortest_edge": 1024, "longest_edge": 1 << 20}}


@pytest.fixture
def processor():
    return MossVLVideoProcessor()


@pytest.fixture
def warnings(monkeypatch):
    """The warnings of the two rooms, as texts."""
    texts = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())
    for room in (clip_decoding, video_sampling, video_reading):
        room.logger.addHandler(handler)
    yield texts
    for room in (clip_decoding, video_sampling, video_reading):
        room.logger.removeHandler(handler)


def numbers(clip, height, width, merge=2, patch=16):
    """What the frames of a clip of numbered frames show."""
    t, rows, columns = clip.grid
    blocks = clip.patches.view(t, rows // merge, columns // merge, merge, merge, 3, patch, patch)
    images = blocks.permute(0, 1, 3, 6, 2, 4, 7, 5).reshape(t, height, width, 3)
    return [read_number(image) for image in images.numpy()]


# which frames, how large


@pytest.mark.parametrize(
    "seconds, fps, number, low, high, expected",
    [
        (5.0, 1.0, None, 1, 256, 5),
        (5.0, 2, None, 1, 256, 10),
        (8.008, 1.0, None, 1, 256, 9),
        (8.0000005, 1.0, None, 1, 256, 8),
        (0.5, 1.0, None, 1, 256, 1),
        (0.5, 0.001, None, 1, 256, 1),
        (5.0, 1.0, None, 8, 256, 8),
        (5.0, 1.0, None, 8, 6, 6),
        (1e12, 30.0, None, 1, 256, 256),
        (5.0, None, 7, 1, 256, 7),
        (5.0, None, 7, 1, 3, 3),
    ],
)
def test_frame_count(seconds, fps, number, low, high, expected):
    assert frame_count(seconds, fps, number, low, high) == expected


@pytest.mark.parametrize(
    "total, count, expected",
    [
        (150, 5, [0, 37, 74, 111, 149]),
        (240, 9, [0, 29, 59, 89, 119, 149, 179, 209, 239]),
        (150, 10, [0, 16, 33, 49, 66, 82, 99, 115, 132, 149]),
        (15, 1, [0]),
        (1, 1, [0]),
        (2, 2, [0, 1]),
        (7, 7, [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_sample_indices(total, count, expected):
    assert sample_indices(total, count).tolist() == expected


@pytest.mark.parametrize(
    "total, lengths, expected",
    [
        (256, [5.0], [256]),
        (10, [5.0, 5.0], [5, 5]),
        (10, [1.0, 3.0], [3, 7]),
        (11, [1.0, 1.0], [6, 5]),  # the earlier one gets what is left over
        (10, [1.0, 1.0, 1.0], [4, 3, 3]),
        (3, [9.0, 1.0, 1.0], [1, 1, 1]),
        (8, [0.0, 0.0, 2.0], [1, 1, 6]),
        (5, [0.0, 0.0], [3, 2]),
    ],
)
def test_share_frames(total, lengths, expected):
    assert share_frames(total, lengths) == expected


def test_segment_times():
    assert segment_times((0.5, 3.0), 3, 149 / 30).tolist() == [0.5, 1.3333333333333335, 2.166666666666667]
    assert segment_times((4.2,), 1, 149 / 30).tolist() == [4.2]
    assert segment_times((4.0, 8.0), 4, 149 / 30).tolist() == [4.0, 149 / 30, 149 / 30, 149 / 30]
    assert segment_times((-1.0, 1.0), 2, 9.0).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "height, width, frames, low, high, share, expected",
    [
        (240, 320, 5, 4096, 16777216, 201326592, (256, 320)),
        (240, 320, 5, 4096, 16777216, 1e6 * 384000 / 1304160, (192, 256)),
        (240, 426, 9, 4096, 16777216, 1e6 * 920160 / 1304160, (192, 352)),
        (1080, 1920, 4, 4096, 500_000, 201326592, (512, 928)),  # one frame over the limit
        (10, 10, 1, 4096, 16777216, 201326592, (64, 64)),  # too small: grows
        (20, 900, 2, 4096, 16777216, 201326592, (32, 896)),
        (64, 64, 50, 4096, 16777216, 50_000, (64, 64)),  # the share would make frames too small: they grow back
    ],
)
def test_fit_video_size(height, width, frames, low, high, share, expected):
    assert fit_video_size(height, width, frames, 32, low, high, share) == expected


# golden


def golden_case(name):
    case = json.loads((GOLDEN / "processing" / f"{name}.json").read_text())
    folder = GOLDEN / "processing"
    videos = [
        {**v, "video_path": folder / v["video_path"]} if isinstance(v, dict) else folder / v for v in case["videos"]
    ]
    return case, videos, np.load(folder / f"{name}.npz")["pixel_levels_u8"]


@pytest.mark.parametrize("name", ["12_segments", "15_video_fps2", "22_video_budget_1e6"])
def test_golden_videos(name):
    case, videos, levels = golden_case(name)
    out = MossVLVideoProcessor(**case["video_config"])(videos, return_metadata=True, **case["kwargs"])
    assert out["video_grid_thw"].tolist() == case["grid_thw"]
    assert [dict(metadata) for metadata in out["video_metadata"]] == case["video_metadata"]
    off = np.abs(out["pixel_values_videos"].numpy() * 127.5 + 127.5 - levels).max()
    assert off <= 3.01, f"{off} levels off; 3 are the difference between decoders"


@pytest.mark.parametrize("video", [CLIP, LONG])
def test_pixels_are_exact_from_given_frames(processor, video):
    arrays = np.load(GOLDEN / "processing" / f"frames_{video.stem}.npz")
    frames, times = arrays["rgb_u8_thwc"], arrays["pts"].tolist()
    # the 5 frames that stand before the image of case 04, the 9 that are the end of case 05
    levels = (
        golden_case("04_mixed_video_image")[2][: 5 * 320]
        if video is CLIP
        else golden_case("05_batch_right_pad")[2][-9 * 416 :]
    )
    clip = processor.extract([frames], video_metadata={"timestamps": times})[0]
    assert clip.timestamps == times
    assert np.array_equal(clip.patches.numpy(), levels)


# kinds of files


def quiet_vfr(path):
    stamps = [0]
    for i in range(39):
        stamps.append(stamps[-1] + (20 if i % 3 else 100))
    return write_video(path, stamps=stamps, time_base=Fraction(1, 600), options={"g": "10"})


def cut(codec, options):
    return lambda path: copy_packets(
        write_video(path.with_stem("whole"), codec=codec, options=options), path, first=13
    )


def copied(name, **options):
    return lambda path: copy_packets(write_video(path.with_name(name), **options), path)


WHOLE = list(range(40))
# name: how it is made, the frames that are shown
KINDS = {
    "h264.mp4": (lambda path: write_video(path, options=X264_CLOSED), WHOLE),
    "h264_open_gop.mp4": (lambda path: write_video(path, options=X264_OPEN), WHOLE),
    "h265_open_gop.mp4": (lambda path: write_video(path, codec="libx265", options=X265_OPEN), WHOLE),
    "h265_10bit.mp4": (
        lambda path: write_video(path, codec="libx265", pixels="yuv420p10le", options=X265_OPEN),
        WHOLE,
    ),
    "h264_cut.mp4": (cut("libx264", X264_CLOSED), WHOLE[13:]),
    "h264_open_gop_cut.mp4": (cut("libx264", X264_OPEN), WHOLE[13:]),
    "h265_cut.mp4": (cut("libx265", X265_OPEN), WHOLE[13:]),
    "variable.mp4": (quiet_vfr, WHOLE),
    "variable.mkv": (quiet_vfr, WHOLE),
    "stream.ts": (lambda path: write_video(path, options=X264_CLOSED), WHOLE),
    "stream_h265.ts": (copied("source.mp4", codec="libx265", options=X265_OPEN), WHOLE),
    "late.mkv": (lambda path: write_video(path, start=75, options=X264_OPEN), WHOLE),
    "fragments.mp4": (
        lambda path: write_video(path, options=X264_OPEN, muxer={"movflags": "frag_keyframe+empty_moov"}),
        WHOLE,
    ),
    "vp9.webm": (
        lambda path: write_video(
            path, codec="libvpx-vp9", options={"g": "10", "deadline": "realtime", "cpu-used": "8"}
        ),
        WHOLE,
    ),
    "vp8.webm": (
        lambda path: write_video(path, codec="libvpx", options={"g": "10", "deadline": "realtime", "cpu-used": "8"}),
        WHOLE,
    ),
    "av1.mp4": (
        lambda path: write_video(path, count=20, codec="libsvtav1", options={"g": "10", "preset": "12"}),
        WHOLE[:20],
    ),
    "animation.gif": (lambda path: write_video(path, codec="gif", pixels="rgb8", rate=10), WHOLE),
    "mpeg4.avi": (lambda path: write_video(path, codec="mpeg4", options={"bf": "2", "g": "10"}), WHOLE),
    "h264.avi": (lambda path: write_video(path, options=X264_CLOSED), WHOLE),  # time stamps in decoding order
    "mjpeg.avi": (lambda path: write_video(path, codec="mjpeg", pixels="yuvj420p"), WHOLE),
    "mpeg2.mpg": (lambda path: write_video(path, codec="mpeg2video", options={"bf": "2", "g": "10"}), WHOLE),
    "h264.flv": (lambda path: write_video(path, options=X264_CLOSED), WHOLE),
    "raw.h264": (lambda path: write_video(path, options=X264_CLOSED), WHOLE),  # no time stamps
    "one.mp4": (lambda path: write_video(path, count=1), [0]),
    "no_b_frames.mp4": (lambda path: write_video(path, options={"bf": "0", "g": "10"}), WHOLE),
    "aspect.mp4": (lambda path: write_video(path, aspect=Fraction(2, 1)), WHOLE),
    "odd_size.mp4": (lambda path: write_video(path, size=(98, 66), options=X264_CLOSED), WHOLE),
    "with_sound.mp4": (lambda path: write_video(path, options=X264_CLOSED, sound=True), WHOLE),
}


@pytest.fixture(scope="session")
def make(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")

    def path_of(name):
        path = folder / name
        return path if path.exists() else KINDS[name][0](path)

    return path_of


@pytest.mark.parametrize("name", KINDS)
def test_right_frames_at_right_times(name, make):
    path, expected = make(name), KINDS[name][1]
    truth = decode_all(path)
    video = open_video(path)
    total = len(video.times)
    assert [read_number(image) for _, image in truth] == expected and total == len(expected)
    assert (video.height, video.width) == truth[0][1].shape[:2]
    assert video.problems == []
    times = [time for time, _ in truth]
    if times[0] is None or times != sorted(times):  # raw.h264 says 25 a second, h264.avi is constant
        times = [i / (25 if times[0] is None else 30) for i in range(total)]
    assert np.allclose(video.times, times, atol=1e-9)
    rng = random.Random(0)
    for wanted in ([*range(total)], [total - 1], [total // 2], sorted(rng.sample(range(total), min(5, total)))):
        problems = []
        got = list(video.frames(wanted, problems))
        assert [(number, shown) for number, shown, _ in got] == [(number, number) for number in wanted]
        assert all(np.array_equal(image, truth[number][1]) for number, _, image in got)
        assert problems == []


def test_duration_and_rate(make):
    expected = {
        "h264.mp4": (4 / 3, 30.0),
        "late.mkv": (4 / 3, 30.0),
        "h264_cut.mp4": (0.9, 30.0),
        "animation.gif": (4.0, 10.0),
    }
    for name, (duration, rate) in expected.items():
        video = open_video(make(name))
        assert (video.duration, video.rate) == pytest.approx((duration, rate), abs=1e-9), name


def test_real_times_of_a_variable_rate(make, processor):
    clip = processor.extract(make("variable.mp4"), num_frames=7, **SMALL)[0]
    truth = decode_all(make("variable.mp4"))
    assert clip.timestamps == pytest.approx([truth[i][0] for i in clip.metadata.frames_indices])
    assert clip.metadata.actual_timestamps == clip.timestamps
    constant = processor.extract(make("h264.mp4"), num_frames=7, **SMALL)[0]
    assert constant.metadata.actual_timestamps is None
    assert constant.timestamps == pytest.approx([i / 30 for i in constant.metadata.frames_indices])


QUARTERS = {  # display matrix -> what becomes of the stored picture
    (0, 1, -1, 0): lambda x: np.rot90(x, 3),
    (-1, 0, 0, -1): lambda x: np.rot90(x, 2),
    (0, -1, 1, 0): lambda x: np.rot90(x, 1),
    (-1, 0, 0, 1): lambda x: x[:, ::-1],
    (1, 0, 0, -1): lambda x: x[::-1],
}


@pytest.mark.parametrize("matrix", QUARTERS)
def test_rotation_tag(matrix, make, tmp_path):
    video = open_video(turn(make("h264.mp4"), tmp_path / "turned.mp4", matrix))
    upright = QUARTERS[matrix](decode_all(make("h264.mp4"))[17][1])
    ((_, _, image),) = video.frames([17], [])
    assert (video.height, video.width) == upright.shape[:2]
    assert np.array_equal(image, upright)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("codec, options", [("libx264", "open_gop=1:bframes=3:"), ("libx265", "")])
def test_jumps(codec, options, suffix, tmp_path, monkeypatch):
    """Far apart frames are reached by one jump each, or where the container jumps badly (MPEG-TS) by reading on; never decoded through."""
    key = "x264-params" if codec == "libx264" else "x265-params"
    options = {
        key: options
        + "keyint=60:min-keyint=60:scenecut=0:log-level=none"
        + (":pools=none" if codec == "libx265" else "")
    }
    path = write_video(tmp_path / "source.mp4", count=900, codec=codec, options=options)
    path = path if suffix == "mp4" else copy_packets(path, tmp_path / f"long.{suffix}")
    jumps, fed = [], []
    seek, decode = video_files._PacketReader._seek, video_files.PyAVVideo._decode
    monkeypatch.setattr(video_files._PacketReader, "_seek", lambda *args: jumps.append(seek(*args)) or jumps[-1])
    video = open_video(path)
    monkeypatch.setattr(video_files.PyAVVideo, "_decode", lambda *args: fed.append(args[2]) or decode(*args))
    wanted = [0, 62, 419, 420, 421, 899]
    problems = []
    assert [read_number(image) for _, _, image in video.frames(wanted, problems)] == wanted
    assert problems == []
    assert jumps == ([False] if suffix == "ts" else [True, True])
    assert len(fed) < 300


def test_keyframe_flags_that_lie(make, tmp_path):
    """An mp4 without its table of sync samples calls every sample a keyframe."""
    path = tmp_path / "lies.mp4"
    path.write_bytes(make("h264_open_gop.mp4").read_bytes().replace(b"stss", b"free"))
    clip = MossVLVideoProcessor(num_frames=9, **SMALL).extract(path, num_extract_threads=3)[0]
    truth = decode_all(make("h264_open_gop.mp4"))
    expected = MossVLVideoProcessor(num_frames=9, **SMALL).extract(
        np.stack([truth[i][1] for i in clip.metadata.frames_indices]), video_metadata={"timestamps": clip.timestamps}
    )[0]
    assert clip.metadata.frames_indices == sample_indices(40, 9).tolist()
    assert torch.equal(clip.patches, expected.patches)


def test_transparency_becomes_white(tmp_path):
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 32, 64))
    picture.save(tmp_path / "half.gif")
    ((_, _, image),) = open_video(tmp_path / "half.gif").frames([0], [])
    assert image[5, 50].tolist() == [255, 255, 255] and image[5, 5].tolist() == [255, 0, 0]


# truncated, damaged


def shortened(path, target, share=0.6):
    data = path.read_bytes()
    target.write_bytes(data[: int(len(data) * share)])
    return target


def damaged(path, target, at, length, seed=0):
    data, rng = bytearray(path.read_bytes()), random.Random(seed)
    start = int(len(data) * at)
    data[start : start + length] = bytes(rng.randrange(256) for _ in range(min(length, len(data) - start)))
    target.write_bytes(data)
    return target


@pytest.fixture(scope="session")
def header_first(tmp_path_factory):
    return copy_packets(LONG, tmp_path_factory.mktemp("media") / "first.mp4", muxer={"movflags": "faststart"})


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_truncated_gives_what_there_is(suffix, header_first, tmp_path, warnings):
    whole = header_first if suffix == "mp4" else copy_packets(LONG, tmp_path / "whole.mkv")
    path = shortened(whole, tmp_path / f"short.{suffix}")
    clip = MossVLVideoProcessor().extract(path)[0]
    truth = decode_all(LONG)
    assert 130 < open_video(path).times.size < 150
    assert clip.timestamps == pytest.approx([truth[i][0] for i in clip.metadata.frames_indices], abs=0.001)
    assert clip.grid[0] == 5
    whole_frames = {number: image for number, _, image in open_video(LONG).frames(clip.metadata.frames_indices, [])}
    got = {number: image for number, _, image in open_video(path).frames(clip.metadata.frames_indices[:-1], [])}
    assert all(np.array_equal(got[number], whole_frames[number]) for number in got)  # the last one may be half there
    assert len(warnings) == 1 and path.name in warnings[0] and "ends early" in warnings[0]


@pytest.mark.parametrize("at, length, seed", [(0.3, 20, 1), (0.5, 4000, 2), (0.6, 1, 3), (0.8, 30000, 4)])
def test_damaged_middle(at, length, seed, header_first, tmp_path, warnings):
    """What comes is what a plain decode salvages, whatever the number of threads, with one warning."""
    path = damaged(header_first, tmp_path / "damaged.mp4", at, length, seed)
    clips = [MossVLVideoProcessor(video_fps=4.0, **SMALL).extract(path, num_extract_threads=n)[0] for n in (1, 2, 5)]
    assert len(warnings) in (0, 3) and all(path.name in text and "damaged" in text for text in warnings)
    for clip in clips[1:]:
        assert clip.metadata == clips[0].metadata
        assert torch.equal(clip.patches, clips[0].patches)
    assert clips[0].grid[0] >= 25
    salvaged = {}
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for packet in container.demux(stream):
            try:
                salvaged.update((frame.pts, frame.to_ndarray(format="rgb24")) for frame in packet.decode())
            except av.error.FFmpegError:
                continue
    for number, shown, image in open_video(path).frames(clips[0].metadata.frames_indices, []):
        assert number == shown and np.array_equal(image, salvaged[1001 * number])


def test_damaged_keyframe(make, tmp_path, warnings):
    """The frames behind a lost keyframe are those of a plain decode; nothing wrong is put in their place."""
    with av.open(str(make("h264.mp4"))) as container:
        packets = [p for p in container.demux(container.streams.video[0]) if p.size]
    lost = [p for p in packets if p.is_keyframe][2]
    data = bytearray(make("h264.mp4").read_bytes())
    data[lost.pos + 4 : lost.pos + lost.size] = bytes(lost.size - 4)
    path = tmp_path / "lost.mp4"
    path.write_bytes(data)
    clips = [MossVLVideoProcessor(num_frames=40, **SMALL).extract(path, num_extract_threads=n)[0] for n in (1, 4)]
    assert torch.equal(clips[0].patches, clips[1].patches) and clips[0].metadata == clips[1].metadata
    assert set(range(20)) <= set(clips[0].metadata.frames_indices) and 35 in clips[0].metadata.frames_indices
    assert len(clips[0].metadata.frames_indices) < 40 and len(warnings) == 2
    shown = numbers(clips[0], *[16 * side for side in clips[0].grid[1:]])
    assert [shown[clips[0].metadata.frames_indices.index(i)] for i in (0, 7, 19, 35)] == [0, 7, 19, 35]


# encoded while others are decoded


def levels_as_features(levels, grid, mean, std):
    """An encoder that shows what it was given: the four patches of a merge block side by side."""
    assert levels.dtype == torch.uint8 and len(levels) == np.prod(grid) and mean == std == (0.5, 0.5, 0.5)
    return levels.view(-1, 4 * levels.shape[1]).float()


def same_clips(processor, video, **knobs):
    """The clips of a video whose features are those of its patches."""
    plain = processor.extract(video, **knobs)
    encoded = processor.extract(video, encoder=levels_as_features, **knobs)
    for one, other in zip(plain, encoded, strict=True):
        assert (one.grid, one.timestamps, one.metadata) == (other.grid, other.timestamps, other.metadata)
        assert other.patches is None and torch.equal(
            other.features, levels_as_features(one.patches, one.grid, (0.5,) * 3, (0.5,) * 3)
        )
    return plain


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("count", [1, 8, 21, 40])
def test_encoded_frames_are_those_of_the_patches(threads, count):
    assert (
        same_clips(MossVLVideoProcessor(num_frames=count, **SMALL), CLIP, num_extract_threads=threads)[0].grid[0]
        == count
    )
    segments = {"video_path": CLIP, "segments": [[0.5, 3.0], [2.0], [1.0, 4.0]]}
    assert (
        len(same_clips(MossVLVideoProcessor(num_frames=count + 2, **SMALL), segments, num_extract_threads=threads))
        == 3
    )


def test_damaged_frames_are_not_encoded(make, header_first, tmp_path):
    """Frames that nothing comes of, frames that stand in for others, keyframes that are none: each as without an encoder."""
    for at, length, seed in ((0.5, 4000, 2), (0.8, 30000, 4)):
        path = damaged(header_first, tmp_path / f"{seed}.mp4", at, length, seed)
        assert same_clips(MossVLVideoProcessor(video_fps=4.0, **SMALL), path, num_extract_threads=3)[0].grid[0] % 8
    path = tmp_path / "lies.mp4"
    path.write_bytes(make("h264_open_gop.mp4").read_bytes().replace(b"stss", b"free"))
    same_clips(MossVLVideoProcessor(num_frames=19, **SMALL), path, num_extract_threads=3)


@pytest.mark.parametrize("threads", [1, 2])
def test_frames_are_encoded_while_others_are_decoded(threads, monkeypatch):
    """Decoding waits in the middle of each thread's share until a group was encoded."""
    encoded, frames = threading.Event(), video_reading.GivenFrames.frames

    def waiting(self, wanted, *args):
        for number, frame in enumerate(frames(self, wanted, *args)):
            assert number != 12 or encoded.wait(20), "nothing is encoded before everything is decoded"
            yield frame

    def encoder(levels, grid, mean, std):
        encoded.set()
        return levels_as_features(levels, grid, mean, std)

    monkeypatch.setattr(video_reading.GivenFrames, "frames", waiting)
    pictures = np.random.default_rng(0).integers(0, 256, (32, 64, 64, 3), dtype=np.uint8)
    clip = MossVLVideoProcessor().extract(
        pictures, {"fps": 1.0}, encoder, num_frames=32, num_extract_threads=threads, min_pixels=1024
    )[0]
    assert clip.features.shape == (32 * 4, 4 * 768)


def test_an_encoder_that_fails_ends_the_call(monkeypatch):
    read, frames, failed = [], video_files.PyAVVideo.frames, threading.Event()

    def waiting(self, *args):
        for frame in frames(self, *args):
            if len(read) == 20:
                failed.wait(20)
            read.append(frame)
            yield frame

    def encoder(*args):
        failed.set()
        raise RuntimeError("out of memory")

    before = threading.active_count()
    monkeypatch.setattr(video_files.PyAVVideo, "frames", waiting)
    with pytest.raises(RuntimeError, match="out of memory"):
        MossVLVideoProcessor(num_frames=150, **SMALL).extract(CLIP, encoder=encoder, num_extract_threads=1)
    assert 8 <= len(read) < 150 and threading.active_count() == before


def test_nothing_to_decode(make, tmp_path):
    data = bytearray(make("h264.mp4").read_bytes())
    start = data.index(b"mdat") + 4
    data[start : data.index(b"moov") - 4] = bytes(data.index(b"moov") - 4 - start)
    (tmp_path / "zeros.mp4").write_bytes(data)
    with pytest.raises(ValueError, match="zeros.mp4.*none of its 40 video packets can be decoded"):
        MossVLVideoProcessor().plan(tmp_path / "zeros.mp4")


def test_damage_never_hangs_or_leaks_other_errors(make, tmp_path):
    rng = random.Random(7)
    processor = MossVLVideoProcessor(num_frames=6, num_extract_threads=2, **SMALL)
    for name in (
        "h264.mp4",
        "stream.ts",
        "late.mkv",
        "vp9.webm",
        "mpeg4.avi",
        "h264.avi",
        "animation.gif",
        "fragments.mp4",
    ):
        for seed in range(3):
            path = damaged(make(name), tmp_path / name, rng.random(), rng.choice([3, 60, 900]), seed)
            try:
                assert processor.extract(path)[0].grid[0] >= 1
            except ValueError as error:
                assert name in str(error)


# where a video lies


def test_sources_give_the_same(make, processor):
    path = make("late.mkv")
    data = path.read_bytes()
    url = "data:video/x-matroska;base64," + base64.b64encode(data).decode()
    expected = processor.extract(str(path), num_frames=5)[0]
    for source in (path, data, bytearray(data), memoryview(data), io.BytesIO(data), path.as_uri(), url):
        clip = processor.extract(source, num_frames=5)[0]
        assert torch.equal(clip.patches, expected.patches) and clip.timestamps == expected.timestamps


def test_file_objects_stay_open_where_they_were(make, processor):
    expected = processor.extract(make("h264.mp4"), num_frames=3)[0].patches
    memory = io.BytesIO(make("h264.mp4").read_bytes())
    memory.seek(0, io.SEEK_END)
    with open(make("h264.mp4"), "rb") as file:
        file.seek(100)
        for source, position in ((file, 100), (memory, len(memory.getvalue()))):
            clips = processor.extract([source, source], num_frames=3)
            assert all(torch.equal(clip.patches, expected) for clip in clips)
            assert source.tell() == position and not source.closed


def test_http_only_where_allowed(processor):
    with pytest.raises(ValueError, match="allow_http"):
        processor.plan("https://example.invalid/video.mp4")


def test_names_that_mean_something_to_ffmpeg(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("concat:a.mp4", "pipe:0", "-i.mp4"):
        Path(name).write_bytes(make("h264.mp4").read_bytes())
        assert len(open_video(name).times) == 40


def test_playlists_reach_nothing(tmp_path):
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nhttp://127.0.0.1:9/video.ts\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.m3u8").write_text(playlist)
    for source in (
        tmp_path / "list.m3u8",
        playlist.encode(),
        playlist.replace("http://127.0.0.1:9/video.ts", CLIP.as_posix()).encode(),
    ):
        with pytest.raises(ValueError, match="is not a video that PyAV can read"):
            open_video(source)


def bad_sources(folder):
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("no video, just words\n" * 100)
    (folder / "notes.txt").write_text("no video, just words\n" * 100)
    (folder / "folder.mp4").mkdir()
    (folder / "noise.mp4").write_bytes(bytes(random.Random(0).randrange(256) for _ in range(5000)))
    make_media.write_sound(folder / "sound.wav")
    return {
        "missing.mp4": FileNotFoundError,
        "empty.mp4": ValueError,
        "text.mp4": ValueError,
        "notes.txt": ValueError,
        "folder.mp4": ValueError,
        "noise.mp4": ValueError,
        "sound.wav": ValueError,
    }


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_not_a_video(backend, tmp_path):
    processor = MossVLVideoProcessor(video_backend=backend)
    for name, error in bad_sources(tmp_path).items():
        with pytest.raises(error, match=name):
            processor.plan(tmp_path / name)
    for source, message in (
        (b"", "of 0 bytes is empty"), (b"no video", "is not a video that"), (7, "from a int"), ({"video_path": None}, "holds its source under"),
        ({"pth": "x"}, "did you mean 'path'"), ([], "no video given"), ({"video": []}, "has no frames"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            processor.plan(source)


def test_a_cover_picture_is_no_video(tmp_path):
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000)
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 96, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic.value
        container.mux(cover.encode(av.VideoFrame.from_ndarray(draw(1), "rgb24").reformat(format="yuvj420p")))
        container.mux(cover.encode())
        make_media._write_tone(container, sound)
    with pytest.raises(ValueError, match="song.mp4.*no video"):
        open_video(path)


def test_gigantic_and_thin_frames(make, tmp_path):
    data = bytearray(make("animation.gif").read_bytes())
    data[6:10] = b"\xff\xff\xff\xff"  # the screen becomes 65535 x 65535
    (tmp_path / "huge.gif").write_bytes(data)
    with pytest.raises(ValueError, match="huge.gif"):
        open_video(tmp_path / "huge.gif")
    with pytest.raises(ValueError, match="200"):
        open_video(np.zeros((2, 2, 500, 3), np.uint8), {"fps": 1})


def test_all_videos_are_looked_at_before_one_is_decoded(make, processor, monkeypatch):
    monkeypatch.setattr(video_files.PyAVVideo, "frames", lambda *args: pytest.fail("decoded"))
    good = make("h264.mp4")
    for bad, error, message in (
        ("missing.mp4", FileNotFoundError, "no such video file: 'missing.mp4'"),
        ({"video_path": good, "segments": [[9.0, 10.0]]}, ValueError, "lies outside the video"),
    ):
        with pytest.raises(error, match=message):
            processor([good, bad])


# segments


def test_segments_show_what_is_on_screen(processor):
    segments = [[0.5, 3.0], (4.2,), [0.0, 0.1], [1.0, 1.5]]
    clips = processor.extract({"video_path": str(CLIP), "segments": segments}, video_fps=2.0)
    assert [clip.grid[0] for clip in clips] == [5, 1, 1, 1]
    assert clips[0].timestamps == [0.5, 1.0, 1.5, 2.0, 2.5] and clips[3].timestamps == [1.0]
    assert all(
        clip.metadata.frames_indices is None and clip.metadata.actual_timestamps == clip.timestamps for clip in clips
    )
    one = processor.extract(str(CLIP), num_frames=150, size=SMALL["size"])[0]
    again = processor.extract(
        {"video_path": CLIP, "segments": [[i / 30] for i in range(0, 150, 7)]}, size=SMALL["size"]
    )
    rows = one.patches.view(150, -1, 768)
    assert all(torch.equal(clip.patches, rows[number]) for clip, number in zip(again, range(0, 150, 7), strict=True))


def test_segments_between_frames(make, processor):
    spec = {"video_path": make("variable.mkv"), "segments": [[1.0], [2.2], [0.0, 3.06]]}
    clips = processor.extract(spec, video_fps=1.0, **SMALL)
    times = [time for time, _ in decode_all(make("variable.mkv"))]
    on_screen = [max(i for i, time in enumerate(times) if time <= t) for t in (1.0, 2.2)]
    height, width = (16 * side for side in clips[0].grid[1:])
    assert [numbers(clip, height, width)[0] for clip in clips[:2]] == on_screen
    assert clips[2].timestamps == pytest.approx([0.0, 0.765, 1.53, 2.295])


def test_segments_share_the_frame_limits(processor):
    spec = {"video_path": str(CLIP), "segments": [[0, 1], [1, 4], [2]]}
    assert [c.grid[0] for c in processor.extract(spec, video_fps=30, max_frames=11, **SMALL)] == [3, 7, 1]
    assert [c.grid[0] for c in processor.extract(spec, video_fps=0.1, min_frames=11, **SMALL)] == [3, 7, 1]
    assert [c.grid[0] for c in processor.extract(spec, num_frames=11, **SMALL)] == [3, 7, 1]


def test_segments_outside_are_clamped_with_one_warning(processor, warnings):
    clip, late = processor.extract({"video_path": str(CLIP), "segments": [[-1.0, 1.0], [5.0]]})
    assert clip.timestamps == [0.0, 0.0] and late.timestamps == [149 / 30]
    assert len(warnings) == 1 and "5 s" in warnings[0]


@pytest.mark.parametrize(
    "segments, message",
    [
        ([[2.0, 2.0]], "empty"),
        ([[3.0, 1.0]], "reversed"),
        ([[5.0, 8.0]], "outside"),
        ([[-3.0, 0.0]], "outside"),
        ([[9.0]], "outside"),
        ([[-0.1]], "outside"),
        ([[0.0, float("nan")]], "expected"),
        ([[0.0, float("inf")]], "expected"),
        ([[0.0, 1.0, 2.0]], "expected"),
        ([[]], "expected"),
        ([3.0], "expected"),
        (["ab"], "expected"),
        ([], "segments must be"),
        ("0-3", "segments must be"),
    ],
)
def test_impossible_segments(segments, message, processor):
    with pytest.raises(ValueError, match=message):
        processor.plan({"video_path": str(CLIP), "segments": segments})


def test_a_video_in_a_dict(processor):
    assert processor.plan({"video_path": CLIP})[0].indices.tolist() == [0, 37, 74, 111, 149]
    with pytest.raises(ValueError, match="did you mean 'segments'"):
        processor.plan({"video_path": CLIP, "segment": [[0, 1]]})


# several videos


def test_videos_of_a_sample_share_max_frames(processor):
    plans = processor.plan([CLIP, LONG], video_fps=30, max_frames=20)
    assert [len(plan.indices) for plan in plans] == share_frames(20, [5.0, 8.008]) == [8, 12]
    with pytest.raises(ValueError, match="2 clips share max_frames 1"):
        processor.plan([CLIP, LONG], max_frames=1)


def test_limits(processor):
    def count(**knobs):
        return len(processor.plan(CLIP, **knobs)[0].indices)

    assert count(video_fps=100) == 150
    assert count(video_fps=100, max_frames=12) == 12
    assert count(video_fps=0.01, min_frames=4) == 4
    assert count(video_fps=100, video_max_pixels=40960) == 10  # 4096 pixels a frame at least
    assert count(num_frames=7) == 7


def test_two_videos_are_each_alone_but_for_the_limits(processor):
    both = processor.extract([CLIP, LONG])
    alone = [processor.extract(video)[0] for video in (CLIP, LONG)]
    for a, b in zip(both, alone, strict=True):
        assert torch.equal(a.patches, b.patches) and a.metadata == b.metadata and a.timestamps == b.timestamps


# decoded frames


def test_decoded_frames_are_a_video(processor):
    frames = np.stack([draw(i, 128, 96) for i in range(30)])
    tensor = torch.from_numpy(frames)
    forms = [
        frames,
        [frames],
        list(frames),
        [list(frames)],
        [Image.fromarray(x) for x in frames],
        tensor,
        tensor.permute(0, 3, 1, 2),
    ]
    expected = None
    for form in forms:
        clip = processor.extract(form, video_metadata={"fps": 10.0}, video_fps=2.0)[0]
        assert clip.metadata.frames_indices == [0, 5, 11, 17, 23, 29]
        assert clip.timestamps == pytest.approx([0, 0.5, 1.1, 1.7, 2.3, 2.9])
        assert numbers(clip, 96, 128) == [0, 5, 11, 17, 23, 29]
        expected = clip.patches if expected is None else expected
        assert torch.equal(clip.patches, expected)


def test_times_of_decoded_frames(processor):
    frames = np.stack([draw(i) for i in range(4)])
    given = processor.extract(frames, video_metadata={"timestamps": [0.0, 0.7, 3.2, 9.0]})[0]
    assert given.timestamps == [0.0, 0.7, 3.2, 9.0] == given.metadata.actual_timestamps
    sampled = VideoMetadata(total_num_frames=120, fps=30.0, frames_indices=[0, 40, 80, 119])
    assert processor.extract([frames], video_metadata=[sampled])[0].timestamps == pytest.approx(
        [0, 4 / 3, 8 / 3, 119 / 30]
    )
    mixed = processor.extract([CLIP, frames], video_metadata=[None, {"fps": 1}])
    assert mixed[0].grid[0] == 5 and mixed[1].timestamps == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "metadata, message",
    [
        (None, "fps"),
        ({}, "fps"),
        ({"duration": 3.0}, "fps"),
        ({"fps": 0}, "above 0"),
        ({"fps": float("nan")}, "above 0"),
        ({"fsp": 2}, "did you mean 'fps'"),
        ({"timestamps": [0.0, 1.0]}, "4 timestamps"),
        ({"timestamps": [0.0, 1.0, 0.5, 2.0]}, "do not go down"),
        ([{"fps": 1}, {"fps": 1}], "2 entries for 1"),
    ],
)
def test_decoded_frames_without_times(metadata, message, processor):
    with pytest.raises(ValueError, match=message):
        processor.plan(np.stack([draw(i) for i in range(4)]), video_metadata=metadata)


def test_decoded_frames_that_do_not_fit(processor):
    frames = [draw(0), draw(1, 64, 64)]
    with pytest.raises(ValueError, match="frame 1 .*one size"):
        processor.extract([frames], video_metadata={"fps": 1})
    for bad, message in (
        (np.zeros((3, 8)), "expected .frames, height"),
        (np.zeros((0, 8, 8, 3)), "has no frames"),
        ([[]], "has no frames"),
    ):
        with pytest.raises(ValueError, match=message):
            processor.plan(bad, video_metadata={"fps": 1})
    with pytest.raises(ValueError, match="video_metadata is for decoded frames"):
        processor.plan(CLIP, video_metadata={"fps": 1})


# knobs


def test_by_hand_call(processor):
    size = {"shortest_edge": 1024, "longest_edge": 20000}
    out = processor(str(CLIP), video_fps=2, max_frames=4, size=size, return_metadata=True, return_tensors="pt")
    metadata = out["video_metadata"][0]
    assert out["video_grid_thw"].tolist() == [[4, 6, 10]]
    assert out["pixel_values_videos"].shape == (4 * 60, 768) and out["pixel_values_videos"].dtype == torch.float32
    assert (metadata["frames_indices"], metadata.total_num_frames, metadata.fps, metadata.duration) == (
        [0, 49, 99, 149],
        4,
        30.0,
        5.0,
    )
    assert "video_metadata" not in processor(str(CLIP))
    as_numpy = processor(str(CLIP), max_frames=1, return_tensors="np", image_mean=[0.0] * 3, image_std=[1.0] * 3)
    assert (
        isinstance(as_numpy["pixel_values_videos"], np.ndarray)
        and 0 <= as_numpy["pixel_values_videos"].min() < 1 / 255
    )


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"video_fps": 0}, "video_fps"),
        ({"video_fps": -1.0}, "video_fps"),
        ({"video_fps": float("nan")}, "video_fps"),
        ({"video_fps": "two"}, "video_fps"),
        ({"video_fps": True}, "video_fps"),
        ({"video_fps": 1.0, "num_frames": 4}, "both"),
        ({"num_frames": 0}, "num_frames"),
        ({"num_frames": 2.5}, "num_frames"),
        ({"num_frames": 300}, "max_frames 256"),
        ({"min_frames": 9, "max_frames": 4}, "min_frames 9 is above max_frames 4"),
        ({"max_frames": 0}, "max_frames"),
        ({"min_pixels": 100000, "max_pixels": 5000}, "min_pixels"),
        ({"size": {"height": 3}}, "height"),
        ({"video_max_pixels": 100}, "video_max_pixels"),
        ({"temporal_patch_size": 2}, "temporal_patch_size"),
        ({"num_extract_threads": 0}, "num_extract_threads"),
        ({"num_extract_threads": 2, "frame_extract_num_threads": 3}, "name the same option and disagree"),
        ({"video_backend": "torchcodec"}, "video_backend"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std"),
        ({"fps": 2, "video_fps": 3}, "name the same option and disagree"),
        ({"fps": 2, "nframes": 3}, "both say how many"),
        ({"fps": 1.0, "num_frames": 8}, "both say how many"),
        ({"rate": 2}, "unknown keyword 'rate'"),
        ({"segments": [[0, 1]]}, "segments belong to one video"),
        ({"sample_fps": 2.0}, "sample_fps is the rate of a list of frames"),
        ({"do_sample_frames": False, "fps": 2}, "do_sample_frames=False takes every frame, and leaves video_fps"),
        ({"do_sample_frames": 3}, "do_sample_frames must be True or False"),
        ({"resized_height": 64}, "make a size together"),
        ({"resized_height": 64, "resized_width": 64, "max_pixels": 5000}, "leaves max_pixels without effect"),
        ({"resized_height": 64, "resized_width": 20000}, "200 times"),
        ({"video_start": 3, "video_end": 2}, "is reversed"),
        ({"video_start": "soon"}, "video_start must be a number"),
        ({"raw_fps": 2}, "raw_fps is no option"),
        ({"max_frame": 2}, "did you mean 'max_frames'"),
        ({"do_resize": False}, "do_resize"),
        ({"return_tensors": "tf"}, "return_tensors"),
    ],
)
def test_impossible_knobs(knobs, message, processor):
    with pytest.raises(ValueError, match=message):
        processor("missing.mp4", **knobs)


def test_knobs_act_for_one_call(processor):
    before = processor.to_dict()
    options = {"size": {"shortest_edge": 1024, "longest_edge": 9000}, "num_frames": 3, "frame_extract_num_threads": 1}
    videos = [str(CLIP)]
    processor(videos, **options)
    assert (
        processor.to_dict() == before
        and videos == [str(CLIP)]
        and options["size"] == {"shortest_edge": 1024, "longest_edge": 9000}
    )
    assert processor(videos)["video_grid_thw"].tolist() == [[5, 16, 20]]


def test_threads_change_nothing(processor, make):
    videos = [
        str(LONG),
        make("stream.ts"),
        make("h265_open_gop.mp4"),
        {"video_path": CLIP, "segments": [[0, 2], [1, 4.5]]},
    ]
    runs = [processor.extract(videos, video_fps=6.0, num_extract_threads=n, **SMALL) for n in (1, 2, 7)]
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert torch.equal(a.patches, b.patches) and a.timestamps == b.timestamps


def test_two_calls_at_once(processor, make):
    file = open(make("h264.mp4"), "rb")
    expected = {n: processor.extract(make("h264.mp4"), num_frames=n, **SMALL)[0].patches for n in (3, 8)}
    wrong = []

    def work(n):
        for _ in range(5):
            if not torch.equal(processor.extract(file, num_frames=n, **SMALL)[0].patches, expected[n]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in (3, 8, 3, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    file.close()
    assert wrong == []


def test_full_frames_are_not_kept(tmp_path):
    path = write_video(tmp_path / "large.mp4", count=40, size=(960, 640), options={"preset": "ultrafast"})
    processor = MossVLVideoProcessor(
        num_frames=40, num_extract_threads=1, size={"shortest_edge": 1024, "longest_edge": 8192}
    )
    plan = processor.plan(path)
    tracemalloc.start()
    processor.extract(plan)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 960 * 640 * 3, f"{peak / (960 * 640 * 3):.1f} frames of the source were held at once"


# decord


@pytest.mark.parametrize("name", ["h264.mp4", "vp9.webm", "variable.mp4", "late.mkv", "one.mp4", "h264_open_gop.mp4"])
def test_decord(name, make):
    video = open_video(make(name), backend="decord")
    ours = open_video(make(name))
    assert np.allclose(video.times, ours.times, atol=2e-3) and video.duration == pytest.approx(ours.duration, abs=2e-3)
    if "open_gop" not in name:  # decord gets those wrong
        ends = [0, len(video.times) - 1]
        for (_, _, a), (_, _, b) in zip(video.frames(ends, []), ours.frames(ends, []), strict=True):
            assert np.array_equal(a, b)


def test_decord_meets_golden():
    case, videos, levels = golden_case("22_video_budget_1e6")
    out = MossVLVideoProcessor(**case["video_config"], video_backend="decord")(videos, return_metadata=True)
    assert [dict(metadata) for metadata in out["video_metadata"]] == case["video_metadata"]
    assert np.abs(out["pixel_values_videos"].numpy() * 127.5 + 127.5 - levels).max() <= 3.01


def test_which_decoder(monkeypatch, make):
    assert isinstance(open_video(make("h264.mp4")), video_files.PyAVVideo)
    monkeypatch.setitem(sys.modules, "av", None)
    assert isinstance(open_video(make("h264.mp4")), video_files.DecordVideo)
    with pytest.raises(ImportError, match="pip install av"):
        open_video(make("h264.mp4"), backend="pyav")
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(ImportError, match="pip install av"):
        open_video(make("h264.mp4"))
    with pytest.raises(ImportError, match="pip install decord"):
        open_video(make("h264.mp4"), backend="decord")


@pytest.mark.parametrize("threads", [1, 3])
def test_inference_mode(threads):
    """Decoding threads write into what was made in the caller's mode."""
    processor = MossVLVideoProcessor(num_frames=6, frame_extract_num_threads=threads, **SMALL)
    expected = processor(str(CLIP))
    with torch.inference_mode():
        seen = processor(str(CLIP))
    assert torch.equal(seen["pixel_values_videos"].clone(), expected["pixel_values_videos"])


def test_decoded_frames_do_not_wait_for_the_garbage_collector():
    """Each holds its picture and the threads that converted it."""

    def living():
        return sum(type(thing) is av.VideoFrame for thing in gc.get_objects())

    gc.collect()
    before = living()
    gc.disable()
    try:
        processor = MossVLVideoProcessor(num_frames=30, frame_extract_num_threads=1, video_backend="pyav", **SMALL)
        processor(str(CLIP))
        assert living() - before <= 1  # the one whose orientation was read
    finally:
        gc.enable()


# loading and saving


def test_released_file_loads():
    processor = MossVLVideoProcessor.from_pretrained(ROOT, num_frames=8, frame_extract_num_threads=1, min_pixels=2048)
    assert (processor.num_frames, processor.video_fps, processor.num_extract_threads) == (8, None, 1)
    assert processor.size == {"shortest_edge": 2048, "longest_edge": 16777216} and processor.max_frames == 256
    assert MossVLVideoProcessor.from_pretrained(ROOT).video_fps == 1.0
    with pytest.raises(ValueError, match="did you mean 'video_fps'"):
        MossVLVideoProcessor.from_pretrained(ROOT, video_fp=2)


def test_saved_and_loaded(tmp_path):
    processor = MossVLVideoProcessor(num_frames=8, max_frames=9, size={"shortest_edge": 1024, "longest_edge": 50000})
    processor.save_pretrained(tmp_path)
    again = MossVLVideoProcessor.from_pretrained(tmp_path)
    assert again.resolve({}) == processor.resolve({})
    settings = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    (tmp_path / "video_preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"video_processor": settings}))
    assert MossVLVideoProcessor.from_pretrained(tmp_path).resolve({}) == processor.resolve({})


def test_constructor_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="did you mean 'video_fps'"):
        MossVLVideoProcessor(video_fp=2)
    with pytest.raises(ValueError, match="both"):
        MossVLVideoProcessor(video_fps=2, num_frames=3)
