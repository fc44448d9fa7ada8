"""Which frames of videos, segments and decoded frames are taken, and how large they become."""

import numpy as np
import pytest
import torch
from make_media import (
    decode_all,
    draw,
)
from PIL import Image
from transformers.video_utils import VideoMetadata
from video_kinds import CLIP, LONG, SMALL, make, numbers, processor, warnings  # noqa: F401

from moss_vl.resizing import fit_video_size
from moss_vl.video_sampling import frame_count, sample_indices, segment_times, share_frames


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
        (11, [1.0, 1.0], [6, 5]),  # ties go to the earlier one
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
        (64, 64, 50, 4096, 16777216, 50_000, (64, 64)),  # the share would make frames too small: they grow again
    ],
)
def test_fit_video_size(height, width, frames, low, high, share, expected):
    assert fit_video_size(height, width, frames, 32, low, high, share) == expected


# segments


def test_segments_take_the_frames_on_screen(processor):
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
def test_wrong_segments(segments, message, processor):
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


def test_limits_of_the_number_of_frames(processor):
    def count(**options):
        return len(processor.plan(CLIP, **options)[0].indices)

    assert count(video_fps=100) == 150
    assert count(video_fps=100, max_frames=12) == 12
    assert count(video_fps=0.01, min_frames=4) == 4
    assert count(video_fps=100, video_max_pixels=40960) == 10  # at least 4096 pixels per frame
    assert count(num_frames=7) == 7


def test_two_videos_share_only_the_limits(processor):
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
