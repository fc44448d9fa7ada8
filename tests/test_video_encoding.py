"""An encoder works on frames of a video while other frames are decoded."""

import threading

import numpy as np
import pytest
import torch
from video_kinds import CLIP, SMALL, damaged, header_first, make, processor  # noqa: F401

from moss_vl import video_files, video_reading
from moss_vl.video_processing_moss_vl import MossVLVideoProcessor


def pixels_as_features(pixels, grid, mean, std):
    """An encoder that returns its input: the four patches of a merge block in one row."""
    assert pixels.dtype == torch.uint8 and len(pixels) == np.prod(grid) and mean == std == (0.5, 0.5, 0.5)
    return pixels.view(-1, 4 * pixels.shape[1]).float()


def same_clips(processor, video, **options):
    """The clips of a video, after checking that their features are made of their patches."""
    plain = processor.extract(video, **options)
    encoded = processor.extract(video, encoder=pixels_as_features, **options)
    for one, other in zip(plain, encoded, strict=True):
        assert (one.grid, one.timestamps, one.metadata) == (other.grid, other.timestamps, other.metadata)
        assert other.patches is None and torch.equal(
            other.features, pixels_as_features(one.patches, one.grid, (0.5,) * 3, (0.5,) * 3)
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
    """Missing frames, frames that stand in for others, and untrue keyframes: the result is the same as without an
    encoder."""
    for at, length, seed in ((0.5, 4000, 2), (0.8, 30000, 4)):
        path = damaged(header_first, tmp_path / f"{seed}.mp4", at, length, seed)
        assert same_clips(MossVLVideoProcessor(video_fps=4.0, **SMALL), path, num_extract_threads=3)[0].grid[0] % 8
    path = tmp_path / "lies.mp4"
    path.write_bytes(make("h264_open_gop.mp4").read_bytes().replace(b"stss", b"free"))
    same_clips(MossVLVideoProcessor(num_frames=19, **SMALL), path, num_extract_threads=3)


@pytest.mark.parametrize("threads", [1, 2])
def test_frames_are_encoded_while_others_are_decoded(threads, monkeypatch):
    """Decoding waits in the middle of each thread's frames until a group was encoded."""
    encoded, frames = threading.Event(), video_reading.GivenFrames.frames

    def waiting(self, wanted, *args):
        for number, frame in enumerate(frames(self, wanted, *args)):
            assert number != 12 or encoded.wait(20), "nothing is encoded before everything is decoded"
            yield frame

    def encoder(pixels, grid, mean, std):
        encoded.set()
        return pixels_as_features(pixels, grid, mean, std)

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
