"""Animated images as videos, frames in other forms than pixels, and absurd metadata of frames."""

import base64
import io

import numpy as np
import pytest
import torch
from make_media import draw, read_number
from PIL import Image

from moss_vl.video_processing_moss_vl import MossVLVideoProcessor
from moss_vl.video_reading import open_video


COUNT = 6
DURATIONS = [40, 100, 0, 200, 10, 60]  # ms
TIMES = [0, 0.04, 0.14, 0.24, 0.44, 0.54]  # 0 and 10 ms count as 100 ms


@pytest.fixture
def processor():
    return MossVLVideoProcessor(size={"shortest_edge": 1024, "longest_edge": 1 << 20})


def animation(suffix, mode="RGB"):
    frames = [Image.fromarray(draw(number + 1)).convert(mode) for number in range(COUNT)]
    file = io.BytesIO()
    lossless = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(file, suffix, save_all=True, append_images=frames[1:], duration=DURATIONS, **lossless)
    return file.getvalue()


FORMS = {
    "path": lambda data, path: path,
    "text": lambda data, path: str(path),
    "bytes": lambda data, path: data,
    "file object": lambda data, path: io.BytesIO(data),
    "open file": lambda data, path: open(path, "rb"),
    "PIL image": lambda data, path: Image.open(path),
    "data URL": lambda data, path: "data:image/x;base64," + base64.b64encode(data).decode(),
    "list": lambda data, path: [str(path)],
    "list of PIL": lambda data, path: [Image.open(path)],
    "list of bytes": lambda data, path: [data],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_animations_are_videos_with_their_own_times(suffix, form, tmp_path, processor):
    data = animation(suffix)
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(data)
    clip = processor.extract(FORMS[form](data, path), do_sample_frames=False)[0]
    assert clip.timestamps == pytest.approx(TIMES) and clip.metadata.duration == pytest.approx(0.6)
    video = open_video(path)
    wanted = [0, 2, 3, 5]
    assert [(n, s, read_number(image)) for n, s, image in video.frames(wanted, [])] == [(n, n, n + 1) for n in wanted]


def test_a_pil_animation_stays_at_its_frame(tmp_path, processor):
    image = Image.open(io.BytesIO(animation("gif")))
    image.seek(3)
    processor.extract(image, num_frames=3)
    assert image.tell() == 3


def test_transparency_and_the_default_image_of_a_png(tmp_path):
    still, red = Image.new("RGBA", (64, 64), (0, 0, 255, 255)), Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    red.paste((255, 0, 0, 255), (0, 0, 32, 64))
    still.save(tmp_path / "x.png", save_all=True, append_images=[red, still], default_image=True, duration=50)
    video = open_video(tmp_path / "x.png")
    images = [image for _, _, image in video.frames([0, 1], [])]
    assert video.times.tolist() == [0, 0.05]
    assert images[0][5, 5].tolist() == [255, 0, 0] and images[0][5, 50].tolist() == [255, 255, 255]


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_a_large_canvas_is_refused_before_it_is_drawn(suffix, tmp_path, processor):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(animation(suffix))
    for option in ("max_animation_canvas", "max_animation_pixels"):
        with pytest.raises(ValueError, match=rf"x\.{suffix}.*over the limit.*{option}"):
            processor.extract(path, **{option: 96 * 64 - 1})
    assert processor.extract(path, max_animation_canvas=96 * 64)[0].grid[0] >= 1


def test_a_truncated_animation_keeps_its_first_frames(tmp_path, processor):
    data = animation("gif")
    path = tmp_path / "cut.gif"
    path.write_bytes(data[: len(data) * 2 // 3])
    video = open_video(path)
    assert 1 <= len(video.times) < COUNT or video.problems


def png(number):
    file = io.BytesIO()
    Image.fromarray(draw(number)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("form", ["bytes", "data", "file", "tiff"])
def test_frames_in_the_forms_of_images(form, nested, tmp_path, processor):
    frames = [png(number) for number in range(4)]
    if form == "data":
        frames = ["data:image/png;base64," + base64.b64encode(data).decode() for data in frames]
    elif form == "file":
        frames = [io.BytesIO(data) for data in frames]
    elif form == "tiff":
        frames = [tmp_path / f"{number}.tif" for number in range(4)]
        for number, path in enumerate(frames):
            Image.fromarray(draw(number)).save(path)
    clip = processor.extract([frames] if nested else frames, video_metadata={"fps": 2}, do_sample_frames=False)[0]
    expected = processor.extract(np.stack([draw(number) for number in range(4)]), sample_fps=2)[0]
    assert torch.equal(clip.patches, expected.patches) and clip.timestamps == [0, 0.5, 1, 1.5]


def test_frames_that_were_chosen_are_all_taken(processor):
    frames, metadata = np.zeros((6, 32, 32, 3), np.uint8), {"fps": 30, "frames_indices": [0, 15, 30, 45, 60, 75]}
    assert processor.extract([frames], video_metadata=[metadata])[0].timestamps == [0, 0.5, 1, 1.5, 2, 2.5]
    assert processor.extract([frames], video_metadata=[metadata], fps=1)[0].grid[0] < 6
    assert processor.extract([frames], video_metadata=[metadata], num_frames=2)[0].grid[0] == 2
    assert processor.extract([frames], video_metadata=[{"fps": 30}])[0].grid[0] == 1


def test_dark_frames_of_a_clip_stay_dark(processor):
    frames = [np.full((32, 32, 3), value, np.float32) for value in (255, 128, 1, 0)]
    for clip in (frames, np.stack(frames), torch.from_numpy(np.stack(frames))):
        patches = processor.extract([clip], sample_fps=1)[0].patches.view(4, -1)
        assert [patch.unique().tolist() for patch in patches] == [[255], [128], [1], [0]]


@pytest.mark.parametrize(
    "metadata",
    [
        {"timestamps": ["a", "b", "c", "d"]},
        {"timestamps": [0, 1, float("nan"), 3]},
        {"timestamps": [0, 2, 1, 3]},
        {"timestamps": [-1, 0, 1, 2]},
        {"timestamps": [0, 1, 2, 1e300]},
        {"timestamps": [[1], [2, 3], 3, 4]},
        {"timestamps": [1j] * 4},
        {"timestamps": 5},
        {"fps": 1e-300},
        {"fps": "x"},
        {"fps": 1, "frames_indices": ["a"] * 4},
        {"fps": 1, "frames_indices": [0, -1, 2, 3]},
        {"fps": 1, "frames_indices": [0, 3, 2, 4]},
        {"fps": 1, "frames_indices": [10**400] * 4},
        {"fps": 1, "total_num_frames": 10**400},
        "abc",
    ],
    ids=str,
)
def test_absurd_metadata_are_named_errors(metadata, processor):
    frames = np.zeros((4, 32, 32, 3), np.uint8)
    with pytest.raises(ValueError) as error:
        processor.extract([frames], video_metadata=[metadata])
    assert type(error.value) is ValueError and len(str(error.value)) < 600


def test_tensors_of_all_layouts(processor):
    frames = torch.rand(3, 3, 32, 32)
    expected = processor.extract([frames], sample_fps=1)[0].patches
    for given in (frames.to_sparse(), [x.to_sparse() for x in frames], torch.nested.nested_tensor(list(frames))):
        assert torch.equal(processor.extract([given], sample_fps=1)[0].patches, expected)
    assert processor.extract([frames.to(torch.float8_e4m3fn)], sample_fps=1)[0].grid[0] == 3
    for given in (frames.to("meta"), [x.to("meta") for x in frames]):
        with pytest.raises(ValueError, match="has no values"):
            processor.extract([given], sample_fps=1)
