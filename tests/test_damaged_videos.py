"""Damaged and truncated videos: what can be decoded is returned, with one warning."""

import random

import av
import numpy as np
import pytest
import torch
from make_media import (
    copy_packets,
    decode_all,
    sequential,
)
from video_kinds import LONG, SMALL, damaged, header_first, make, numbers, processor, shortened, warnings  # noqa: F401

from moss_vl.video_processing_moss_vl import MossVLVideoProcessor
from moss_vl.video_reading import open_video


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_truncated_video_gives_the_frames_it_has(suffix, header_first, tmp_path, warnings):
    whole = header_first if suffix == "mp4" else copy_packets(LONG, tmp_path / "whole.mkv")
    path = shortened(whole, tmp_path / f"short.{suffix}")
    clip = MossVLVideoProcessor().extract(path)[0]
    truth = decode_all(LONG)
    assert 130 < open_video(path).times.size < 150
    assert clip.timestamps == pytest.approx([truth[i][0] for i in clip.metadata.frames_indices], abs=0.001)
    assert clip.grid[0] == 5
    whole_frames = {number: image for number, _, image in open_video(LONG).frames(clip.metadata.frames_indices, [])}
    got = {number: image for number, _, image in open_video(path).frames(clip.metadata.frames_indices[:-1], [])}
    assert all(np.array_equal(got[number], whole_frames[number]) for number in got)  # the last one may be incomplete
    assert len(warnings) == 1 and path.name in warnings[0] and "ends early" in warnings[0]


@pytest.mark.parametrize("at, length, seed", [(0.3, 20, 1), (0.5, 4000, 2), (0.6, 1, 3), (0.8, 30000, 4)])
def test_damaged_middle(at, length, seed, header_first, tmp_path, warnings):
    """With any number of threads the frames are those of a plain decode, with one warning."""
    path = damaged(header_first, tmp_path / "damaged.mp4", at, length, seed)
    clips = [MossVLVideoProcessor(video_fps=4.0, **SMALL).extract(path, num_extract_threads=n)[0] for n in (1, 2, 5)]
    assert len(warnings) in (0, 3) and all(path.name in text and "damaged" in text for text in warnings)
    for clip in clips[1:]:
        assert clip.metadata == clips[0].metadata
        assert torch.equal(clip.patches, clips[0].patches)
    assert clips[0].grid[0] >= 25
    salvaged = sequential(path)
    for number, shown, image in open_video(path).frames(clips[0].metadata.frames_indices, []):
        assert number == shown and np.array_equal(image, salvaged[1001 * number])


def test_damaged_keyframe(make, tmp_path, warnings):
    """After a lost keyframe, frames are those of a plain decode, or missing."""
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


def test_a_video_without_decodable_packets(make, tmp_path):
    data = bytearray(make("h264.mp4").read_bytes())
    start = data.index(b"mdat") + 4
    data[start : data.index(b"moov") - 4] = bytes(data.index(b"moov") - 4 - start)
    (tmp_path / "zeros.mp4").write_bytes(data)
    with pytest.raises(ValueError, match="zeros.mp4.*none of its 40 video packets can be decoded"):
        MossVLVideoProcessor().plan(tmp_path / "zeros.mp4")


def test_damage_never_hangs_and_raises_only_value_errors(make, tmp_path):
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
