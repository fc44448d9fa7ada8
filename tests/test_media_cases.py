"""Small files of kinds that are easy to get wrong, with what a sequential decode by ffmpeg shows.

A frame that carries its number k shows blocks of 2 rows x 4 columns: bit b of k in block (b // 4, b % 4).
"""

import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from moss_vl.image_processing_moss_vl import MossVLImageProcessor
from moss_vl.video_files import UntrueKeyframes
from moss_vl.video_processing_moss_vl import MossVLVideoProcessor
from moss_vl.video_reading import open_video


MEDIA = Path(__file__).parent / "media"
KEEP_SIZE = {"shortest_edge": 1024, "longest_edge": 1 << 22}
NUMBERED = {  # name: (frames, seconds)
    "two_sample_descriptions.mp4": (60, 2.4),
    "flv_switch_size.flv": (60, 2.4),
    "pal8.avi": (16, 16.0),
    "vfr_one_duplicate_stamp.mkv": (30, 24.524),
    "paff50.mp4": (20, 0.8),
    "paff_pes_frame.ts": (20, 0.8),
    "exif_mjpeg.mov": (10, 1.0),
    "secret.mp4": (60, 2.4),
}


@pytest.fixture(params=["pyav", "decord"])
def backend(request):
    if request.param == "decord":
        pytest.importorskip("decord")
    return request.param


def number_of(image) -> int:
    height, width = image.shape[:2]
    points = [(height * (2 * (b // 4) + 1) // 4, width * (2 * (b % 4) + 1) // 8) for b in range(8)]
    return sum(int(image[y, x].mean() > 125) << b for b, (y, x) in enumerate(points))


def numbers(video, wanted):
    try:
        return [number_of(image) for _, _, image in video.frames(wanted, [])]
    except UntrueKeyframes:  # as the processor does
        return [number_of(image) for _, _, image in video.frames(wanted, [], from_start=True)]


@pytest.mark.parametrize("name", NUMBERED)
def test_frames_have_their_numbers(name, backend, caplog):
    count, seconds = NUMBERED[name]
    video = open_video(MEDIA / name, backend=backend)
    assert (len(video.times), video.duration, video.problems) == (count, pytest.approx(seconds, abs=2e-3), [])
    for wanted in (list(range(count)), list(range(count // 2, count, 3)), [count - 1], [0]):
        assert numbers(video, wanted) == wanted


@pytest.mark.parametrize("name", NUMBERED)
@pytest.mark.parametrize("frames", [3, 60])
def test_patches_do_not_depend_on_threads_and_backend(name, frames, backend):
    options = {"num_frames": min(frames, NUMBERED[name][0]), "size": KEEP_SIZE}
    processor = MossVLVideoProcessor()
    clips = [
        processor.extract(MEDIA / name, num_extract_threads=n, video_backend=backend, **options)[0] for n in (1, 4)
    ]
    expected = processor.extract(MEDIA / name, num_extract_threads=1, **options)[0]
    assert all(torch.equal(clip.patches, expected.patches) for clip in clips)
    assert all(clip.timestamps == expected.timestamps for clip in clips)


def test_the_times_of_a_variable_rate_with_one_doubled_stamp(backend):
    times = open_video(MEDIA / "vfr_one_duplicate_stamp.mkv", backend=backend).times
    assert times[-1] == pytest.approx(24.484) and np.count_nonzero(np.diff(times) == 0) == 1


def test_a_damaged_beginning(backend):
    video = open_video(MEDIA / "first_key_zeroed_h264_b.mp4", backend=backend)
    got = [(number, number_of(image)) for number, _, image in video.frames([0, 8, 14, 29, 59], [])]
    assert got == [(8, 8), (14, 14), (29, 29), (59, 59)]
    assert video.times[29] == pytest.approx(1.16) and "first 8 frames" in video.problems[0]


def test_a_stream_that_appears_late(backend):
    video = open_video(MEDIA / "flip2_mpeg2.ts", backend=backend)
    assert len(video.times) == 58 and numbers(video, [0, 14, 28]) == [0, 14, 28]


def test_an_animated_webp(backend):
    video = open_video(MEDIA / "anim.webp", backend=backend)
    assert video.times.tolist() == pytest.approx([0, 0.1, 0.2]) and video.duration == pytest.approx(0.3)


def test_hdr_white_is_white(backend):
    """A white of 203 cd/m2, whose code is grey 147."""
    ((_, _, image),) = open_video(MEDIA / "hdr10.mp4", backend=backend).frames([1], [])
    assert image.max() >= 225 and 147 not in np.unique(image)


REFUSED = {
    "ffconcat_as.mp4": "none of those that are read as videos",
    "gif_canvas_13k.gif": "13000 x 13000 pixels, over the limit",
    "many_1000000.mp4": "1000000 samples",
    "rgb4.nut": "pixel format rgb4",
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("form", ["path", "bytes", "file"])
def test_refused_videos_are_named(name, form, backend):
    source = MEDIA / name
    with open(source, "rb") as file:
        source = {"path": source, "bytes": source.read_bytes(), "file": file}[form]
        with pytest.raises(ValueError, match=REFUSED[name]) as error:
            MossVLVideoProcessor().extract(source, video_backend=backend)
    assert name in str(error.value) or form == "bytes"


@pytest.mark.parametrize("name", ["eps_as_jpg.jpg", "bomb13k_ptrans.png", "gif_canvas_13k.gif"])
def test_refused_images_take_neither_memory_nor_time(name):
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(ValueError, match=name):
        MossVLImageProcessor()(MEDIA / name)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB
    assert time.monotonic() - began < 5
