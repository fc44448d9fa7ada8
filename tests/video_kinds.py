"""Videos of numbered frames in many containers and codecs, and fixtures for tests of videos."""

import json
import logging
import random
from fractions import Fraction

import numpy as np
import pytest
from conftest import GOLDEN
from make_media import (
    X264_CLOSED,
    X264_OPEN,
    X265_OPEN,
    copy_packets,
    read_number,
    write_video,
)

from moss_vl import clip_decoding, video_reading, video_sampling
from moss_vl.video_processing_moss_vl import MossVLVideoProcessor


CLIP = GOLDEN / "processing" / "media" / "v5s_320x240_30.mp4"  # 150 frames
LONG = GOLDEN / "processing" / "media" / "v8s_426x240_2997.mp4"  # 240 frames
SMALL = {"size": {"shortest_edge": 1024, "longest_edge": 1 << 20}}


@pytest.fixture
def processor():
    return MossVLVideoProcessor()


@pytest.fixture
def warnings(monkeypatch):
    """The warnings of all modules that read videos, as texts."""
    texts = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())
    for module in (clip_decoding, video_sampling, video_reading):
        module.logger.addHandler(handler)
    yield texts
    for module in (clip_decoding, video_sampling, video_reading):
        module.logger.removeHandler(handler)


def numbers(clip, height, width, merge=2, patch=16):
    """The numbers in the frames of a clip of numbered frames."""
    t, rows, columns = clip.grid
    blocks = clip.patches.view(t, rows // merge, columns // merge, merge, merge, 3, patch, patch)
    images = blocks.permute(0, 1, 3, 6, 2, 4, 7, 5).reshape(t, height, width, 3)
    return [read_number(image) for image in images.numpy()]


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
# name: (function that writes the file, numbers of the frames shown)
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


# damage


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


# golden


def golden_case(name):
    case = json.loads((GOLDEN / "processing" / f"{name}.json").read_text())
    folder = GOLDEN / "processing"
    videos = [
        {**v, "video_path": folder / v["video_path"]} if isinstance(v, dict) else folder / v for v in case["videos"]
    ]
    return case, videos, np.load(folder / f"{name}.npz")["pixel_levels_u8"]
