"""Edge cases of the processors: exact limits, rounding, first and last times, warnings, threads."""

import io
import logging
import threading
import time
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from make_media import draw, write_video
from PIL import Image

from moss_vl import clip_decoding, image_processing_moss_vl, video_processing_moss_vl
from moss_vl.image_processing_moss_vl import MossVLImageProcessor
from moss_vl.image_reading import load_image, open_source
from moss_vl.resizing import fit_size, fit_video_size, pixel_limits
from moss_vl.video_files import Video
from moss_vl.video_packets import seconds_of
from moss_vl.video_processing_moss_vl import MossVLVideoProcessor
from moss_vl.video_reading import open_video
from moss_vl.video_sampling import frame_count, read_segment, segment_times


# exact limits


@pytest.mark.parametrize(
    "height, width, low, high, expected",
    [
        (64, 75, 1, 4096, (64, 64)),  # rounds down to exactly the limit
        (64, 75, 1, 4095, (32, 64)),
        (75, 64, 1, 4096, (64, 64)),
        (50, 64, 4096, 9999, (64, 64)),  # rounds up to exactly the limit
        (50, 64, 4097, 9999, (64, 96)),
        (80, 80, 4096, 4096, (64, 64)),
        (300, 20, 1, 1024, (96, 32)),  # one side is the factor already
        (17, 17, 1, 9999, (32, 32)),
    ],
)
def test_an_image_at_its_limit(height, width, low, high, expected):
    assert fit_size(height, width, 32, low, high) == expected
    if high != 1024:  # for one frame, images and videos have the same rule
        assert fit_video_size(height, width, 1, 32, low, high, 10**9) == expected


@pytest.mark.parametrize(
    "height, width, frames, low, high, share, expected",
    [
        (64, 75, 3, 1, 10**6, 3 * 4096, (64, 64)),  # all frames have exactly the share
        (64, 75, 3, 1, 10**6, 3 * 4096 - 1, (32, 64)),
        (64, 75, 3, 1, 4096, 10**9, (64, 64)),
        (50, 64, 1, 4096, 10**6, 10**9, (64, 64)),
        (50, 64, 2, 2048, 10**6, 10**9, (64, 64)),
        (20, 20, 4, 1024, 10**6, 10**9, (32, 32)),  # the clip and each frame have exactly the minimum
    ],
)
def test_a_clip_at_its_limit(height, width, frames, low, high, share, expected):
    assert fit_video_size(height, width, frames, 32, low, high, share) == expected


def test_limits_may_be_equal_and_not_cross():
    assert pixel_limits({"shortest_edge": 5000, "longest_edge": 5000}) == (5000, 5000)
    with pytest.raises(ValueError, match="5001 is above longest_edge .* 5000"):
        pixel_limits({"shortest_edge": 5001, "longest_edge": 5000})
    assert (
        MossVLVideoProcessor(video_max_pixels=4096).video_max_pixels == 4096
    )  # exactly one frame of the minimum size
    with pytest.raises(ValueError, match="video_max_pixels 4095 does not hold one frame"):
        MossVLVideoProcessor(video_max_pixels=4095)
    assert MossVLVideoProcessor(min_frames=3, max_frames=3).resolve({"num_frames": 3}).num_frames == 3


def test_the_thinnest_image():
    processor = MossVLImageProcessor()
    for shape in ((1, 200, 3), (200, 1, 3), (2, 400, 3)):
        assert processor(np.zeros(shape, np.uint8))["image_grid_thw"].prod() > 0
    for shape in ((1, 201, 3), (201, 1, 3), (2, 401, 3)):
        with pytest.raises(ValueError, match="at most 200 times"):
            processor(np.zeros(shape, np.uint8))


def test_bytes_at_their_limit():
    url = "data:;base64,QUJDRA=="  # four bytes
    assert open_source(url, what="image", max_bytes=4)[0].getvalue() == b"ABCD"
    with pytest.raises(ValueError, match="expected 1 to 3|over the limit of 3"):
        open_source(url, what="image", max_bytes=3)


def test_a_rate_that_divides_the_duration():
    """It takes no extra frame; the last frame of a segment is before its end."""
    assert frame_count(5.0, 2.0, None, 1, 256) == 10 and frame_count(5.0 + 1e-7, 2.0, None, 1, 256) == 10
    assert frame_count(5.0 + 1e-5, 2.0, None, 1, 256) == 11 and frame_count(0.0, 1.0, None, 1, 256) == 1
    assert segment_times((1.0, 2.0), 2, 9.0).tolist() == [1.0, 1.5]


# times


class Still(Video):
    """A video without the frames in `missing`: nothing is yielded for them, or with `stand_in` the frame before."""

    def __init__(self, times, duration, missing=(), stand_in=False):
        super().__init__("still.mp4", np.array(times, np.float64), duration, 64, 64)
        self.missing, self.stand_in = missing, stand_in

    def chunks(self, wanted, parts):
        return [wanted]

    def frames(self, wanted, problems, from_start=False):
        for number in wanted:
            if number not in self.missing:
                yield number, number, draw(number, 64, 64)
            elif self.stand_in:
                yield number, number - 1, draw(number - 1, 64, 64)


@pytest.mark.parametrize("rate, early", [(30, 1e-3), (250, 1e-3), (1000, 0.25e-3)])
def test_a_frame_counts_from_a_millisecond_early(rate, early):
    """Containers round time stamps to milliseconds. In very fast videos a quarter of a frame counts instead."""
    video = Still(np.arange(10) / rate, 10 / rate)
    moments = np.arange(1, 10) / rate
    assert video.shown_at(moments - 0.9 * early).tolist() == list(range(1, 10))
    assert video.shown_at(moments - 1.1 * early).tolist() == list(range(9))
    assert video.shown_at(np.array([-1.0, 99.0])).tolist() == [0, 9]


def test_seconds_of_rounded_time_stamps():
    times = np.round(np.arange(30) / 29.97, 3)
    assert seconds_of(times, 0.033, Fraction(2997, 100), 1e-3) == pytest.approx(30 / 29.97, abs=1e-9)
    assert seconds_of(times + np.linspace(0, 0.003, 30), 0.033, Fraction(2997, 100), 1e-3) == pytest.approx(
        times[-1] + 0.003 + 0.033
    )
    assert seconds_of(np.array([0.0, 1.0]), 0.5, None, 1e-3) == 1.5


@pytest.mark.parametrize(
    "times, message",
    [
        ([-0.1, 0, 1], "timestamp 0 is -0.1; expected seconds from 0 on"),
        ([0, 2, 1], "timestamp 2 is 1 after 2"),
        ([0, float("nan"), 1], "timestamp 1 is nan"),
        ([0, 1], "expected 3 timestamps, one per frame, got 2"),
        ([[0], [1], [2]], "got shape .3, 1."),
    ],
)
def test_bad_time_stamps(times, message):
    with pytest.raises(ValueError, match=message):
        open_video([draw(i) for i in range(3)], {"timestamps": times})


def test_good_time_stamps():
    video = open_video([draw(i) for i in range(3)], {"timestamps": [0, 0, 0.5]})  # from 0; two may be equal
    assert video.times.tolist() == [0, 0, 0.5] and video.duration == 0.75
    assert open_video([draw(0)], {"timestamps": [2.0]}).times.tolist() == [2.0]


def test_a_file_whose_first_stamp_is_negative(tmp_path):
    """Times count from the first frame shown."""
    path = write_video(tmp_path / "early.mkv", count=10, rate=10, codec="ffv1", pixels="yuv420p", start=-3)
    video = open_video(path)
    assert video.times.tolist() == pytest.approx([i / 10 for i in range(len(video.times))]) and video.times[0] == 0


@pytest.mark.parametrize(
    "segment, message",
    [
        ([1, 1], "is empty"),
        ([2, 1], "is reversed"),
        ([], "expected .start, end"),
        ([1, 2, 3], "expected .start, end"),
        (["a"], "expected .start, end"),
        ([0, float("inf")], "expected .start, end"),
        (3, "expected .start, end"),
    ],
)
def test_malformed_segments(segment, message):
    with pytest.raises(ValueError, match=message):
        read_segment(segment, "x")


def test_segments_at_the_ends():
    frames = {"video": [draw(i) for i in range(8)], "sample_fps": 2}  # 4 seconds
    processor = MossVLVideoProcessor()
    for segment in ([3.9, 4.0], [0, 0.1], [-1, 0.1], [0], [4.0], [3.9, 9]):
        assert len(processor.plan({**frames, "segments": [segment]})) == 1
    for segment in ([4.0, 4.1], [-1, 0], [-0.1], [4.1]):
        with pytest.raises(ValueError, match="lies outside the video, which lasts 4 s"):
            processor.plan({**frames, "segments": [segment]})


# warnings


@pytest.fixture
def warnings():
    texts = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())
    clip_decoding.logger.addHandler(handler)
    yield texts
    clip_decoding.logger.removeHandler(handler)


def test_missing_frames_give_one_warning(warnings, monkeypatch):
    """The warning has both numbers, also if the decoder reports nothing."""
    processor = MossVLVideoProcessor()
    video = Still(np.arange(8), 8.0)
    monkeypatch.setattr(video_processing_moss_vl, "open_video", lambda *_, **__: video)
    assert processor.extract("still.mp4")[0].grid[0] == 8 and warnings == []
    for stand_in, timestamps in ((False, [0, 1, 2, 4, 5, 6, 7]), (True, [0, 1, 2, 4, 5, 6, 7])):
        video = Still(np.arange(8), 8.0, missing=(3,), stand_in=stand_in)
        assert processor.extract("still.mp4")[0].timestamps == timestamps
        assert warnings == ["still.mp4 is damaged: 7 of the 8 frames asked for could be decoded"]
        warnings.clear()
    video = Still(np.arange(8), 8.0, missing=range(8))
    with pytest.raises(ValueError, match="none of the 8 frames asked for can be decoded"):
        processor.extract("still.mp4")


# images


def test_sixteen_bits_are_rounded():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(values / 257).astype(np.uint8)
    assert np.array_equal(np.asarray(load_image(values))[..., 0], expected)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    assert np.array_equal(np.asarray(load_image(file))[..., 1], expected)


def test_floats_are_rounded():
    values = np.linspace(0, 1, 64 * 64).reshape(64, 64).astype(np.float32)
    assert np.array_equal(np.asarray(load_image(values))[..., 2], np.rint(values * 255).astype(np.uint8))
    for low, high in ((-1e-3, 1), (0, 255.5), (0, float("nan"))):
        with pytest.raises(ValueError, match="expected 0..255"):
            load_image(np.array([[low, high]], np.float32))


class Loading(Image.Image):
    """An image that notices when two threads load it at once, which Pillow does not support."""

    def __init__(self, picture):
        super().__init__()
        self.__dict__.update(picture.__dict__)
        self.inside, self.most, self.times = 0, 0, 0

    def load(self):
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.times += 1
        time.sleep(0.02)
        self.inside -= 1
        return super().load()


def test_an_image_that_is_given_twice_is_loaded_by_one_thread_at_a_time(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    threads = set()
    resize = image_processing_moss_vl.resize_rows

    def noted(*args):
        threads.add(threading.get_ident())
        time.sleep(0.02)
        return resize(*args)

    monkeypatch.setattr(image_processing_moss_vl, "resize_rows", noted)
    picture = Loading(Image.fromarray(draw(5)))
    out = MossVLImageProcessor()([picture] * 6)
    assert (
        picture.times >= 6 and picture.most == 1 and len(threads) > 1
    )  # several threads, of which one at a time loads
    assert len(set(map(tuple, out["image_grid_thw"].tolist()))) == 1


# playlists


def test_a_playlist_in_bytes_reaches_no_file(tmp_path, monkeypatch):
    """FFmpeg itself would open the file, as the first assert shows."""
    write_video(tmp_path / "secret.mp4", count=3)
    monkeypatch.chdir(tmp_path)
    playlist = b"ffconcat version 1.0\nfile secret.mp4\n"
    with av.open(io.BytesIO(playlist)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 3
    with pytest.raises(ValueError, match="is not a video that PyAV can read"):
        open_video(playlist)
