"""The image processor: sources, sizes, the resize, the order of patches, options, and errors."""

import base64
import hashlib
import io
import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from PIL import Image, PngImagePlugin

from moss_vl import image_processing_moss_vl, image_reading
from moss_vl.image_processing_moss_vl import MossVLImageProcessor, MossVLImageProcessorFast
from moss_vl.image_reading import load_image
from moss_vl.patches import normalise, patchify
from moss_vl.resizing import fit_size, resize_uint8


IMAGES = GOLDEN / "processing" / "images"
PHOTO = IMAGES / "a320x240.png"
HALF = (0.5, 0.5, 0.5)


@pytest.fixture
def processor():
    return MossVLImageProcessor()


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)


def encoded(image, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# golden


@pytest.mark.parametrize("name", ["01_one_image", "02_three_images", "07_labels_basic"])
def test_golden_pixels(name):
    case = json.loads((GOLDEN / "processing" / f"{name}.json").read_text())
    out = MossVLImageProcessorFast(**case["image_config"])([IMAGES / x for x in case["images"]], return_tensors="np")
    assert out["image_grid_thw"].tolist() == case["grid_thw"]
    assert hashlib.sha256(out["pixel_values"].tobytes()).hexdigest() == case["pixel_values_sha256"]


# sizes


@pytest.mark.parametrize(
    "size, limits, expected",
    [
        ((240, 320), (4096, 16777216), (256, 320)),
        ((480, 640), (4096, 16777216), (480, 640)),
        ((37, 100), (4096, 16777216), (64, 128)),  # 32 x 96 is under 4096: beta 1.052, rounded up
        ((8, 8), (4096, 16777216), (64, 64)),
        ((10, 2000), (4096, 16777216), (32, 928)),  # 10 / 32 rounds to 0 rows: beta 0.4525
        ((80, 48), (1, 16777216), (64, 64)),  # 2.5 and 1.5 blocks round to even
        ((3000, 4000), (4096, 1000000), (864, 1152)),  # beta 3.464
        ((3200, 20), (4096, 4096), (800, 32)),  # beta 3.953, at least one block
        ((320, 320), (4096, 102400), (320, 320)),  # exactly at the limit
    ],
)
def test_fit_size(size, limits, expected):
    assert fit_size(*size, 32, *limits) == expected


def grids(processor, shapes, **options):
    images = [np.zeros((*shape, 3), np.uint8) for shape in shapes]
    return processor(images, **options)["image_grid_thw"].tolist()


def test_images_of_a_sample_share_the_budget_by_area(processor):
    shapes = [(320, 640), (320, 320)]
    assert grids(processor, shapes) == [[1, 20, 40], [1, 20, 20]]
    # 150000 pixels: 100000 for the first (beta 1.431), 50000 for the second (beta 1.431)
    assert grids(processor, shapes, multi_image_max_pixels=150000) == [[1, 12, 26], [1, 12, 12]]
    assert grids(processor, shapes[:1], multi_image_max_pixels=150000) == [[1, 16, 34]]


def test_the_share_stays_within_the_limits_of_one_image(processor):
    assert grids(processor, [(320, 320)] * 3, multi_image_max_pixels=1) == [[1, 4, 4]] * 3  # 64 x 64 = shortest_edge
    assert grids(processor, [(640, 640)], max_pixels=102400) == [[1, 20, 20]]


@pytest.mark.parametrize(
    "options",
    [{"min_pixels": 262144}, {"shortest_edge": 262144}, {"size": {"shortest_edge": 262144}}, {"min_pixels": 2.0**18}],
)
def test_names_of_the_lower_limit(processor, options):
    assert grids(processor, [(64, 64)], **options) == [[1, 32, 32]]


@pytest.mark.parametrize(
    "options", [{"max_pixels": 16384}, {"longest_edge": 16384}, {"size": {"longest_edge": 16384}}]
)
def test_names_of_the_upper_limit(processor, options):
    assert grids(processor, [(640, 640)], **options) == [[1, 8, 8]]


# resize and patches


def cubic(x, a=-0.5):
    x = abs(x)
    return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x < 1 else a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def resize_matrix(old, new):
    """[new, old] weights of an antialiased cubic resize, by its definition."""
    scale = old / new
    support = max(scale, 1.0)
    rows = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * scale
        for j in range(max(0, int(centre - 2 * support + 0.5)), min(old, int(centre + 2 * support + 0.5))):
            rows[i, j] = cubic((j + 0.5 - centre) / support)
    return rows / rows.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (32, 160)])
def test_resize_is_antialiased_bicubic(pixels, size):
    got = resize_uint8(pixels, *size).permute(1, 2, 0).numpy()
    rows = np.einsum("xw,hwc->hxc", resize_matrix(80, size[1]), pixels.astype(float)).round().clip(0, 255)
    exact = np.einsum("yh,hxc->yxc", resize_matrix(48, size[0]), rows).round().clip(0, 255)
    assert np.abs(got - exact).max() <= 1  # the weights are fixed-point numbers


def test_resize_reads_any_layout(pixels):
    expected = resize_uint8(pixels, 32, 64)
    assert torch.equal(resize_uint8(torch.from_numpy(pixels), 32, 64), expected)
    assert torch.equal(resize_uint8(np.ascontiguousarray(pixels[::-1])[::-1], 32, 64), expected)
    frozen = pixels.copy()
    frozen.flags.writeable = False
    assert torch.equal(resize_uint8(frozen, 32, 64), expected)
    assert torch.equal(resize_uint8(pixels, 48, 80).permute(1, 2, 0), torch.from_numpy(pixels))


@pytest.mark.parametrize("patch, merge, time", [(16, 2, 1), (4, 2, 2), (8, 1, 1), (4, 4, 3)])
def test_patch_order(patch, merge, time):
    frames = torch.randint(0, 256, (2, 3, 32, 64), dtype=torch.uint8)
    rows = []
    for first in range(0, 2, time):
        group = [frames[min(first + i, 1)] for i in range(time)]
        for block_y in range(32 // patch // merge):
            for block_x in range(64 // patch // merge):
                for y in range(merge):
                    for x in range(merge):
                        top, left = (block_y * merge + y) * patch, (block_x * merge + x) * patch
                        cut = [frame[:, top : top + patch, left : left + patch] for frame in group]
                        rows.append(torch.stack(cut, 1).flatten())  # channel, time, row, column
    assert torch.equal(patchify(frames, patch, merge, time), torch.stack(rows))


def test_normalise():
    values = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, -1)
    exact = (torch.arange(256, dtype=torch.float32) - 127.5) / 127.5
    assert torch.equal(normalise(values, HALF, HALF), exact.repeat(3)[None])
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    per_channel = [(torch.arange(256, dtype=torch.float64) / 255 - m) / s for m, s in zip(mean, std, strict=True)]
    torch.testing.assert_close(normalise(values, mean, std).double(), torch.cat(per_channel)[None], atol=1e-6, rtol=0)


# sources


def test_all_sources_give_the_same_pixels(pixels, tmp_path):
    image = Image.fromarray(pixels)
    data = encoded(image)
    path = tmp_path / "a picture #1 %20.png"
    path.write_bytes(data)
    at_end = io.BytesIO(data)
    at_end.seek(0, io.SEEK_END)
    base = base64.b64encode(data).decode()
    with open(path, "rb") as file:
        file.seek(7)
        sources = [
            str(path),
            path,
            path.as_uri(),
            data,
            bytearray(data),
            memoryview(data),
            io.BytesIO(data),
            at_end,
            file,
            f"data:image/png;base64,{base}",
            f"data:;base64,{base.rstrip('=')}",
            "data:image/png," + "".join(f"%{b:02x}" for b in data),
            image,
            image.convert("RGBA"),
            pixels,
            pixels.transpose(2, 0, 1),
            torch.from_numpy(pixels),
            torch.from_numpy(pixels).permute(2, 0, 1),
            pixels.astype(np.int64),
            pixels.astype(np.float32),
            pixels / 255,
            torch.from_numpy(pixels / 255).float(),
            pixels.astype(np.uint16) * 257,
            (pixels.astype(np.uint16) * 257).astype(">u2"),
            pixels[:, ::-1][:, ::-1],
            np.dstack([pixels, np.full((48, 80), 255, np.uint8)]),
        ]
        for source in sources:
            assert np.array_equal(np.asarray(load_image(source)), pixels), repr(source)[:80]
        assert file.tell() == 7 and at_end.tell() == len(data)


@pytest.mark.parametrize("strip", [1, 32, 48, 1000])
def test_pixels_are_copied_in_strips(monkeypatch, pixels, strip):
    monkeypatch.setattr(image_reading, "STRIP", strip)
    assert np.array_equal(image_reading.probe_image(Image.fromarray(pixels)).read(), pixels)


@pytest.mark.parametrize("threads", [1, 4])
def test_images_of_a_sample_are_read_in_threads(monkeypatch, processor, tmp_path, threads):
    """In their order, also if a PIL image is given several times: Pillow reads the pixels of a file on first use."""
    monkeypatch.setattr(image_processing_moss_vl, "IMAGE_THREADS", threads)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    images, rng = [], np.random.default_rng(1)
    for number in range(8):
        images.append(tmp_path / f"{number}.png")
        Image.fromarray(rng.integers(0, 256, (32 + 32 * (number % 3), 64, 3), dtype=np.uint8)).save(images[-1])
    expected = [processor([image], return_tensors="pt")["pixel_values"] for image in images]
    opened = Image.open(images[3])
    got = processor([*images, opened, opened, opened], return_tensors="pt")["pixel_values"]
    assert torch.equal(got, torch.cat([*expected, *[expected[3]] * 3]))


def test_modes():
    def first(image):
        return load_image(image).getpixel((0, 0))

    assert first(Image.new("RGBA", (8, 8), (255, 0, 0, 0))) == (255, 255, 255)
    assert first(Image.new("RGBA", (8, 8), (255, 0, 0, 51))) == (255, 204, 204)
    assert first(Image.new("LA", (8, 8), (0, 51))) == (204, 204, 204)
    assert first(Image.new("L", (8, 8), 7)) == (7, 7, 7)
    assert first(Image.new("1", (8, 8), 1)) == (255, 255, 255)
    assert first(Image.new("CMYK", (8, 8), (0, 255, 255, 0))) == (255, 0, 0)
    assert first(Image.new("I", (8, 8), 200)) == (200, 200, 200)
    assert first(Image.fromarray(np.full((8, 8), 51400, np.uint16))) == (200, 200, 200)
    assert first(encoded(Image.fromarray(np.full((8, 8), 51400, np.uint16)))) == (200, 200, 200)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert first(encoded(palette)) == (0, 0, 255)
    assert first(encoded(palette, transparency=1)) == (255, 255, 255)
    assert first(np.full((8, 8, 4), (0, 0, 0, 51), np.uint8)) == (204, 204, 204)
    assert first(np.full((8, 8), True)) == (255, 255, 255)
    assert first(torch.zeros(1, 8, 8, dtype=torch.bfloat16)) == (0, 0, 0)


def test_exif_rotation(pixels):
    upright = Image.fromarray(pixels)
    stored = {  # orientation tag -> the image as it is stored
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }
    for tag, image in stored.items():
        exif = Image.Exif()
        exif[0x0112] = tag
        for kind in ("PNG", "TIFF"):
            assert np.array_equal(np.asarray(load_image(encoded(image, kind, exif=exif))), pixels), (tag, kind)


def test_a_rotated_image_has_the_grid_of_the_upright_image(processor):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert processor(encoded(Image.new("RGB", (128, 64)), "JPEG", exif=exif))["image_grid_thw"].tolist() == [[1, 8, 4]]


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(data).getpixel((0, 0)) == (255, 0, 0)


def test_lists_and_arrays_of_images(processor, pixels):
    one = processor(pixels)["pixel_values"]
    for images in ([pixels, pixels], (pixels, pixels), np.stack([pixels] * 2), [[pixels], [pixels]]):
        out = processor(images)
        assert torch.equal(out["pixel_values"], torch.cat([one, one])) and len(out["image_grid_thw"]) == 2


# errors


def png_header(width, height) -> bytes:
    """A PNG of this size without pixels: only its header can be read."""
    file = io.BytesIO()
    PngImagePlugin.putchunk(
        file, b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    )
    PngImagePlugin.putchunk(file, b"IDAT", b"")
    return b"\x89PNG\r\n\x1a\n" + file.getvalue()


def test_bad_files(tmp_path, processor):
    with pytest.raises(FileNotFoundError, match="gone.png"):
        processor(str(tmp_path / "gone.png"))
    cases = {
        "empty.png": (b"", "empty"),
        "noise.png": (b"not an image at all" * 20, "not an image"),
        "cut.png": (PHOTO.read_bytes()[:3000], "cannot be decoded"),
        "video.mp4": ((GOLDEN / "processing/media/v05s_320x240_30.mp4").read_bytes(), "not an image"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        for source in (tmp_path / name, str(tmp_path / name)):
            with pytest.raises(ValueError, match=f"{name}.*{message}"):
                processor(source)
    with pytest.raises(ValueError, match="not a file"):
        processor(tmp_path)


@pytest.mark.parametrize(
    "source, message",
    [
        ("", "no usable path"),
        (b"", "empty"),
        (io.BytesIO(), "empty"),
        (io.StringIO("text"), "open it with mode 'rb'"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,###", "not base64"),
        ("data:image/png;base64,", "0 bytes"),
        ("http://localhost/a.png", "allow_http=True"),
        ("file://elsewhere/a.png", "another machine"),
        (3, "cannot read image from a int"),
        ({"uri": "a.png"}, "unknown keyword 'uri'; did you mean 'url'"),
        ({"max_pixels": 3}, "holds its source under image or"),
        (np.zeros((8, 8, 7), np.uint8), r"\(8, 8, 7\)"),
        (np.zeros(8, np.uint8), r"expected \[h, w\]"),
        (np.zeros((0, 8, 3), np.uint8), "no pixels"),
        (np.full((8, 8, 3), 300), "values from 300"),
        (np.full((8, 8, 3), -0.5), "values from -0.5"),
        (np.full((8, 8, 3), math.nan), "nan"),
        (np.full((8, 8, 3), "a"), "expected numbers"),
        (Image.new("RGB", (0, 5)), "no pixels"),
        (np.zeros((8, 1601, 3), np.uint8), "200 times"),
        (encoded(Image.new("RGB", (1601, 8))), "200 times"),
        (png_header(20000, 10000), "limit of 178956970"),
        (png_header(100000, 100000), "bomb|limit"),
        ([], "no image"),
    ],
)
def test_bad_images(processor, source, message):
    with pytest.raises(ValueError, match=message):
        processor(source)


def test_a_decompression_bomb_is_refused_by_its_header(monkeypatch):
    before = Image.MAX_IMAGE_PIXELS
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # some programs set this
        patch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("decoded"))
        with pytest.raises(ValueError, match="20000 x 10000"):
            load_image(png_header(20000, 10000))
    assert Image.MAX_IMAGE_PIXELS == before


def test_nothing_is_decoded_if_a_later_image_is_missing(processor, monkeypatch):
    monkeypatch.setattr(image_reading, "_pil_rows", lambda *_: pytest.fail("decoded"))
    with pytest.raises(FileNotFoundError):
        processor([PHOTO, "gone.png"])


def test_200_to_1_is_accepted(processor):
    assert processor(np.zeros((8, 1600, 3), np.uint8))["image_grid_thw"].tolist() == [[1, 2, 58]]


# options


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_pixel": 1000}, "'max_pixel'; did you mean 'max_pixels'"),
        ({"video_fps": 1}, "unknown keyword 'video_fps'"),
        ({"size": {"shortest": 1}}, "did you mean 'shortest_edge'"),
        ({"size": {"height": 224, "width": 224}}, "unknown keyword 'height'"),
        ({"min_pixels": 0}, "positive whole number"),
        ({"min_pixels": -1}, "positive whole number"),
        ({"min_pixels": 1.5}, "positive whole number"),
        ({"min_pixels": True}, "positive whole number"),
        ({"min_pixels": "4096"}, "positive whole number"),
        ({"min_pixels": math.nan}, "positive whole number"),
        ({"min_pixels": 8192, "max_pixels": 4096}, "8192 is above"),
        ({"min_pixels": 8192, "shortest_edge": 4096}, "disagree"),
        ({"multi_image_max_pixels": 0}, "multi_image_max_pixels"),
        ({"patch_size": 0}, "patch_size"),
        ({"merge_size": 1.5}, "merge_size"),
        ({"temporal_patch_size": -1}, "temporal_patch_size"),
        ({"image_mean": [0.5, 0.5]}, "three finite numbers"),
        ({"image_mean": 0.5}, "three finite numbers"),
        ({"image_std": [0.5, 0.5, 0]}, "above 0"),
        ({"image_std": [0.5, 0.5, math.inf]}, "three finite numbers"),
        ({"do_resize": False}, "do_resize is always True"),
        ({"return_tensors": "tf"}, "'pt', 'np' or None"),
    ],
)
def test_bad_options(processor, options, message):
    with pytest.raises(ValueError, match=message):
        processor(PHOTO, **options)
    if (
        "return_tensors" not in options
        and "unknown keyword 'video_fps'" != message
        and "did you mean 'max_pixels'" not in message
    ):
        with pytest.raises(ValueError, match=message):
            MossVLImageProcessor(**options)


def test_options_act_for_one_call(processor):
    before = json.loads(processor.to_json_string())
    plain = processor(PHOTO)["pixel_values"]
    changed = {
        "max_pixels": 16384,
        "multi_image_max_pixels": 16384,
        "patch_size": 8,
        "merge_size": 4,
        "temporal_patch_size": 2,
        "image_mean": (0.1, 0.2, 0.3),
        "image_std": [0.5, 0.6, 0.7],
        "min_pixels": 1048576,
    }
    for name, value in changed.items():
        other = processor(PHOTO, **{name: value})["pixel_values"]
        assert other.shape != plain.shape or not torch.equal(other, plain), name
    assert json.loads(processor.to_json_string()) == before
    assert torch.equal(processor(PHOTO, **dict.fromkeys(changed))["pixel_values"], plain)


def test_two_threads_with_different_options(processor):
    sizes = [2**i for i in range(12, 18)]
    alone = {size: processor(PHOTO, max_pixels=size)["pixel_values"] for size in sizes}
    wrong = []

    def work(size):
        for _ in range(8):
            if not torch.equal(processor(PHOTO, max_pixels=size)["pixel_values"], alone[size]):
                wrong.append(size)

    threads = [threading.Thread(target=work, args=(size,)) for size in sizes]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


def test_attributes_are_the_defaults(processor):
    processor.size = {"shortest_edge": 4096, "longest_edge": 16384}
    assert (processor.min_pixels, processor.max_pixels) == (4096, 16384)
    assert grids(processor, [(640, 640)]) == [[1, 8, 8]]


def test_return_types(processor):
    for kind, expected in (("pt", torch.Tensor), (None, torch.Tensor), ("np", np.ndarray)):
        out = processor(PHOTO, return_tensors=kind)
        assert isinstance(out["pixel_values"], expected) and isinstance(out["image_grid_thw"], expected)
    assert processor(PHOTO).to(torch.float16)["pixel_values"].dtype == torch.float16


def test_images_are_not_changed(processor, pixels):
    before = pixels.copy()
    images = [pixels, Image.fromarray(pixels)]
    processor(images, max_pixels=4096)
    processor(images)
    assert np.array_equal(pixels, before) and len(images) == 2 and images[1].mode == "RGB"


# saving and loading


@pytest.mark.parametrize("cls", [MossVLImageProcessor, MossVLImageProcessorFast])
def test_saved_and_loaded(cls, tmp_path):
    cls(max_pixels=16384, image_mean=(0.1, 0.2, 0.3)).save_pretrained(tmp_path)
    assert (tmp_path / "image_processing_moss_vl.py").is_file()
    again = cls.from_pretrained(tmp_path)
    assert again.size == {"shortest_edge": 4096, "longest_edge": 16384} and again.image_mean == [0.1, 0.2, 0.3]
    assert cls.from_pretrained(tmp_path, max_pixels=65536).size["longest_edge"] == 65536
    assert cls.from_pretrained(tmp_path, size={"longest_edge": 65536}).size == {
        "shortest_edge": 4096,
        "longest_edge": 65536,
    }
    with pytest.raises(ValueError, match="patch_size"):
        cls.from_pretrained(tmp_path, patch_size=0)


def test_released_settings():
    path = Path(__file__).resolve().parent.parent / "preprocessor_config.json"
    processor = MossVLImageProcessorFast.from_pretrained(path.parent)
    assert processor.size == {"shortest_edge": 4096, "longest_edge": 16777216}
    assert (processor.multi_image_max_pixels, processor.patch_size, processor.merge_size) == (201326592, 16, 2)


def test_settings_as_transformers_writes_them():
    nulls = {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "crop_size": None,
    }
    assert grids(MossVLImageProcessor(**nulls), [(64, 64)]) == [[1, 4, 4]]
