"""The video processor: golden values, options of a call, threads, memory, loading and saving."""

import gc
import json
import threading
import tracemalloc

import av
import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT
from make_media import (
    write_video,
)
from video_kinds import CLIP, LONG, SMALL, golden_case, make, processor  # noqa: F401

from moss_vl.video_processing_moss_vl import MossVLVideoProcessor


@pytest.mark.parametrize("name", ["12_segments", "15_video_fps2", "22_video_budget_1e6"])
def test_golden_videos(name):
    case, videos, pixels = golden_case(name)
    out = MossVLVideoProcessor(**case["video_config"])(videos, return_metadata=True, **case["kwargs"])
    assert out["video_grid_thw"].tolist() == case["grid_thw"]
    assert [dict(metadata) for metadata in out["video_metadata"]] == case["video_metadata"]
    difference = np.abs(out["pixel_values_videos"].numpy() * 127.5 + 127.5 - pixels).max()
    assert difference <= 3.01, f"a difference of {difference}; decoders differ by up to 3"


@pytest.mark.parametrize("video", [CLIP, LONG])
def test_pixels_are_exact_from_given_frames(processor, video):
    arrays = np.load(GOLDEN / "processing" / f"frames_{video.stem}.npz")
    frames, times = arrays["rgb_u8_thwc"], arrays["pts"].tolist()
    # the 5 frames before the image of case 04, the last 9 frames of case 05
    pixels = (
        golden_case("04_mixed_video_image")[2][: 5 * 320]
        if video is CLIP
        else golden_case("05_batch_right_pad")[2][-9 * 416 :]
    )
    clip = processor.extract([frames], video_metadata={"timestamps": times})[0]
    assert clip.timestamps == times
    assert np.array_equal(clip.patches.numpy(), pixels)


def test_decord_meets_the_golden_values():
    case, videos, pixels = golden_case("22_video_budget_1e6")
    out = MossVLVideoProcessor(**case["video_config"], video_backend="decord")(videos, return_metadata=True)
    assert [dict(metadata) for metadata in out["video_metadata"]] == case["video_metadata"]
    assert np.abs(out["pixel_values_videos"].numpy() * 127.5 + 127.5 - pixels).max() <= 3.01


# options


def test_call_of_the_video_processor(processor):
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
    "options, message",
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
def test_wrong_options(options, message, processor):
    with pytest.raises(ValueError, match=message):
        processor("missing.mp4", **options)


def test_options_act_for_one_call(processor):
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


def test_memory_holds_few_full_frames(tmp_path):
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


@pytest.mark.parametrize("threads", [1, 3])
def test_inference_mode(threads):
    """Decoding threads write into tensors that were made in the caller's mode."""
    processor = MossVLVideoProcessor(num_frames=6, frame_extract_num_threads=threads, **SMALL)
    expected = processor(str(CLIP))
    with torch.inference_mode():
        got = processor(str(CLIP))
    assert torch.equal(got["pixel_values_videos"].clone(), expected["pixel_values_videos"])


def test_decoded_frames_are_freed_without_the_garbage_collector():
    """A frame holds its pixels and the threads that converted it."""

    def living():
        return sum(type(thing) is av.VideoFrame for thing in gc.get_objects())

    gc.collect()
    before = living()
    gc.disable()
    try:
        processor = MossVLVideoProcessor(num_frames=30, frame_extract_num_threads=1, video_backend="pyav", **SMALL)
        processor(str(CLIP))
        assert living() - before <= 1  # the frame whose orientation was read
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


def test_constructor_refuses_unknown_arguments():
    with pytest.raises(ValueError, match="did you mean 'video_fps'"):
        MossVLVideoProcessor(video_fp=2)
    with pytest.raises(ValueError, match="both"):
        MossVLVideoProcessor(video_fps=2, num_frames=3)
