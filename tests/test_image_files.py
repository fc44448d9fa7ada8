"""Image files that are not meant to be read, that are damaged, or that would need memory or time out of proportion;
and tensors and files that hold no pixels."""

import functools
import io
import random
import struct
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from interrupts import seconds_to_stop
from PIL import Image, PngImagePlugin

from moss_vl import resizing
from moss_vl.image_files import FORMATS, MAX_GIF_BLOCKS, MAX_SCANS
from moss_vl.image_processing_moss_vl import MossVLImageProcessor
from moss_vl.image_reading import (
    MAX_SOURCE_PIXELS,
    ProbedImage,
    Rows,
    float_unit,
    load_image,
    probe_image,
    split_array,
)
from moss_vl.resizing import resize_rows, resize_uint8
from moss_vl.video_reading import open_video


RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (61, 83, 3), dtype=np.uint8)


def encoded(image, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">L", len(data)) + name + data + struct.pack(">L", zlib.crc32(name + data))


def png(*chunks: bytes, size=(8, 8), mode=(8, 2), after=()) -> bytes:
    """A black PNG with further chunks before and after its pixels."""
    values = {0: 1, 2: 3, 3: 1, 6: 4}[mode[1]]
    rows = zlib.compress(bytes((1 + size[0] * values) * size[1]), 1)
    head = chunk(b"IHDR", struct.pack(">LLBBBBB", *size, *mode, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + b"".join([head, *chunks, chunk(b"IDAT", rows), *after, chunk(b"IEND", b"")])


# formats


OTHERS = {
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
    "PDF": b"%PDF-1.4\n%%EOF\n" + bytes(64),
    "FITS": b"SIMPLE  =                    T".ljust(80) + b"BITPIX  = 8".ljust(80) + b"END".ljust(2720),
    "WMF": b"\xd7\xcd\xc6\x9a\0\0" + bytes(80),
    "MPEG": b"\0\0\1\xb3\x04\x00\x40\x13" + bytes(64),
    "GRIB": b"GRIB\0\0\0\1" + bytes(64),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(64),
    "BUFR": b"BUFR" + bytes(64),
    "XPM": b'/* XPM */\nstatic char *a[] = {\n"1 1 1 1",\n"a c #ffffff",\n"a"};\n',
    "PSD": b"8BPS\0\1" + bytes(64),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_formats_are_refused(kind, tmp_path, monkeypatch):
    Image.init()
    if kind in Image.OPEN:
        monkeypatch.setitem(Image.OPEN, kind, (lambda *_: pytest.fail("opened"), Image.OPEN[kind][1]))
    path = tmp_path / "a.jpg"
    path.write_bytes(OTHERS[kind])
    for source in (path, OTHERS[kind]):
        with pytest.raises(ValueError, match="not an image that Pillow can read: expected one of JPEG"):
            load_image(source)


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind not in ("HEIF", "MPO")])
def test_formats_are_read(kind):
    Image.init()
    if kind not in Image.SAVE and kind != "QOI":
        pytest.skip("Pillow does not write it")
    image = Image.fromarray(np.full((32, 32, 3), (200, 30, 40), np.uint8))
    try:
        data = encoded(image, kind)
    except (KeyError, OSError):
        pytest.skip("Pillow does not write it")
    assert np.abs(np.asarray(load_image(data)).astype(int) - (200, 30, 40)).max() < 12


def test_16_bits_and_other_modes():
    def first(data):
        return load_image(data).getpixel((0, 0))

    assert first(encoded(Image.new("I", (8, 8), 51400), "PPM")) == (200, 200, 200)
    assert first(b"P6 2 2 65535 " + b"\xc8\xc8" * 12) == (200, 200, 200)
    assert first(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF")) == (255, 0, 0)
    assert first(encoded(Image.new("1", (8, 8), 1), "TIFF", compression="group4")) == (255, 255, 255)
    assert first(Image.new("F", (8, 8), 0.5)) == (128, 128, 128)
    assert first(Image.new("YCbCr", (8, 8), (255, 128, 128))) == (255, 255, 255)
    for bad in (Image.new("F", (8, 8), float("nan")), Image.new("I", (8, 8), 70000), Image.new("F", (8, 8), -1)):
        with pytest.raises(ValueError, match="holds values"):
            load_image(bad)


# strips


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (61, 32), (32, 83), (61, 83), (160, 320)])
@pytest.mark.parametrize("height", [1, 61, 64, 65, 200])
def test_the_resize_in_strips_has_the_values_of_the_resize(size, height, monkeypatch):
    monkeypatch.setattr(resizing, "WHOLE_PIXELS", 0)
    pixels = RNG.integers(0, 256, (height, 83, 3), dtype=np.uint8)
    assert torch.equal(resize_rows(Rows.of_array(pixels), *size), resize_uint8(pixels, *size))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "CMYK", "1", "I;16", "F"])
@pytest.mark.parametrize("turned", range(9))
def test_strips_have_the_values_of_the_whole_image(mode, turned):
    """Against Pillow's own conversion of the upright image."""
    image = Image.fromarray(RNG.integers(0, 256, (200, 83, 3), dtype=np.uint8))
    if mode == "RGBA":
        image.putalpha(Image.fromarray(RNG.integers(0, 256, (200, 83), dtype=np.uint8)))
    elif mode == "P":
        image = image.quantize(32)
        image.info["transparency"] = 3
    elif mode == "I;16":
        image = Image.fromarray(RNG.integers(0, 65536, (200, 83), dtype=np.uint16))
    elif mode == "F":
        image = Image.fromarray(RNG.random((200, 83), dtype=np.float32) * 255)
    else:
        image = image.convert(mode)
    if turned:
        image.getexif()[0x0112] = turned
    expected = image
    if turned > 1:
        ways = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
        expected = image.transpose(Image.Transpose[ways[turned - 2]])
    if mode in ("RGBA", "LA", "P"):
        expected = expected.convert("RGBA")
        expected = Image.alpha_composite(Image.new("RGBA", expected.size, "white"), expected).convert("RGB")
    elif mode == "I;16":
        expected = np.rint(np.asarray(expected) / 257).astype(np.uint8)[..., None].repeat(3, 2)
    elif mode == "F":
        expected = np.rint(np.asarray(expected)).astype(np.uint8)[..., None].repeat(3, 2)
    else:
        expected = expected.convert("RGB")
    assert np.array_equal(probe_image(image).read(), np.asarray(expected))


def test_a_large_jpeg_is_drafted_down_only_if_it_is_far_too_large():
    image = Image.fromarray(RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)).resize((1201, 803), 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    for options in ({}, {"exif": exif}):
        data = encoded(image, "JPEG", quality=95, **options)
        for ratio, scale in ((7, 1), (9, 2), (17, 4)):
            probed = probe_image(data)
            rows = probed.decode(lambda h, w, ratio=ratio: (h // ratio, w // ratio))
            full = (1201, 803) if options else (803, 1201)
            assert rows.full_size == full
            assert (rows.height, rows.width) == tuple(-(-side // scale) for side in full)
    kwargs = {"max_pixels": 12000, "do_normalize": False}
    small = MossVLImageProcessor()(data, **kwargs)
    full = MossVLImageProcessor()(load_image(data), **kwargs)
    assert torch.equal(small["image_grid_thw"], full["image_grid_thw"])
    difference = (small["pixel_values"].float() - full["pixel_values"].float()).abs()
    assert 0 < difference.mean() < 2 and difference.max() < 30


# bounds


@pytest.mark.parametrize(
    "data, message",
    [
        (png(size=(13000, 13000), mode=(1, 0))[:60], None),
        (encoded(Image.new("P", (8, 8)), "GIF")[:6] + struct.pack("<HH", 13000, 13000)
         + encoded(Image.new("P", (8, 8)), "GIF")[10:], "13000 x 13000 pixels, over the limit of 119304646"),
        (png(size=(8, 8)).replace(struct.pack(">LL", 8, 8), struct.pack(">LL", 20000, 10000)), None),
    ],
)  # fmt: skip
def test_the_canvas_is_checked_before_it_is_decoded(data, message, monkeypatch):
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("decoded"))
    if message:
        with pytest.raises(ValueError, match=message):
            probe_image(data)
        with pytest.raises(ValueError, match="over the limit of 666"):
            MossVLImageProcessor(max_source_pixels=1000)(data)


@pytest.mark.parametrize(
    "kind, share", [("JPEG", 1), ("PNG", 1), ("GIF", 2 / 3), ("JPEG2000", 1 / 3), ("WEBP", 1 / 3)]
)
def test_formats_that_need_more_memory_have_lower_limits(kind, share):
    data = encoded(Image.new("RGB", (100, 30)), kind)
    limit = round(3000 / share)
    assert probe_image(data, max_source_pixels=limit + 2).width == 100
    with pytest.raises(ValueError, match="100 x 30 pixels, over the limit"):
        probe_image(data, max_source_pixels=limit - 3)


def test_the_limit_of_source_pixels_is_an_option():
    data, palette = encoded(Image.new("RGB", (40, 40))), encoded(Image.new("P", (40, 40)), "GIF")
    processor = MossVLImageProcessor(max_source_pixels=1600)
    assert processor(data)["image_grid_thw"].tolist() == [[1, 4, 4]]
    with pytest.raises(ValueError, match="40 x 40 pixels, over the limit of 1599; .* max_source_pixels"):
        processor(data, max_source_pixels=1599)
    with pytest.raises(ValueError, match="over the limit of 1066"):
        processor(palette)
    assert processor(palette, max_source_pixels=2400)["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert "max_source_pixels" not in processor.to_dict()
    assert MossVLImageProcessor.from_dict({"max_source_pixels": 5}).resolve({}).max_source_pixels == MAX_SOURCE_PIXELS
    assert MossVLImageProcessor.from_dict({}, max_source_pixels=5).resolve({}).max_source_pixels == 5
    with pytest.raises(ValueError, match="max_source_pixels must be a positive whole number"):
        processor(data, max_source_pixels=0)


def test_pillow_s_own_limit_does_not_matter(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(encoded(Image.new("RGB", (2, 2)))).size == (2, 2)
        assert probe_image(encoded(Image.new("RGB", (40, 40)))).height == 40


def test_threads_share_a_budget_of_pixels(monkeypatch):
    """Also over time: the largest images that the threads have held fit the budget together."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    lock, held, most, largest = threading.Lock(), [0], [0], {}

    def probed(side):
        def decode(_):
            with lock:
                held[0] += side * side
                most[0] = max(most[0], held[0])
                thread = threading.get_ident()
                largest[thread] = max(largest.get(thread, 0), side * side)
            time.sleep(0.002)
            with lock:
                held[0] -= side * side
            return Rows.of_array(np.full((side, side, 3), side, np.uint8))

        return ProbedImage(f"{side}", side, side, decode)

    processor = MossVLImageProcessor(max_source_pixels=10000)
    sides = [50, 32, 100, 40, 33, 80, 57, 34, 50, 41] * 3
    extracted = processor.extract([probed(side) for side in sides])
    assert [patches.unique().tolist() for patches, _ in extracted] == [[side] for side in sides]
    assert most[0] == 10000 and len(largest) > 1
    own = largest.pop(threading.get_ident())
    assert own == 10000 and sum(largest.values()) <= 10000 * 4 / 7


def test_an_interrupt_stops_the_threads_of_images(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    data = encoded(Image.new("RGB", (3000, 3000)), "JPEG")
    assert seconds_to_stop(lambda: MossVLImageProcessor().extract([data] * 500), after=0.2) < 0.5


def tiff_directory(entries, tail=b"") -> bytes:
    body = b"".join(struct.pack("<HHLL", tag, kind, count, offset) for tag, kind, count, offset in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + bytes(4) + tail


def jpeg_segments(data: bytes, segments: bytes) -> bytes:
    return data[:2] + segments + data[2:]


BOMBS = (
    "scans",
    "segments",
    "exif segments",
    "exif",
    "mpf",
    "tiff",
    "strips",
    "png exif",
    "png exif at the end",
    "raw profile",
    "text",
    "texts",
    "profile",
    "empty chunks",
    "comments",
    "comment",
    "icon",
)


@functools.cache
def bombs():
    jpeg = encoded(Image.fromarray(PIXELS), "JPEG")
    progressive = encoded(Image.fromarray(PIXELS), "JPEG", progressive=True)
    last = progressive.rindex(b"\xff\xda")
    scans = progressive[:-2] + progressive[last:-2] * MAX_SCANS + b"\xff\xd9"
    overlapping = tiff_directory([(tag, 7, 500000, 8) for tag in range(300, 12000)], bytes(500000))
    gif = encoded(Image.new("P", (8, 8)), "GIF")
    at = gif.index(b",")
    icon = encoded(Image.new("RGBA", (16, 16)), "ICO", sizes=[(16, 16)])
    return {
        "scans": (scans, "more than 100 scans"),
        "segments": (jpeg_segments(jpeg, b"\xff\xfe\0\x03a" * 5000), "more than 4096 segments"),
        "exif segments": (jpeg_segments(jpeg, b"\xff\xe1\0\x09Exif\0\0a" * 100), "segments of EXIF data"),
        "exif": (jpeg_segments(jpeg, b"\xff\xe1\xff\xffExif\0\0" + tiff_directory(
            [(tag, 7, 65000, 8) for tag in range(300, 5700)]).ljust(65527, b"\0")), "tags declare"),
        "mpf": (jpeg_segments(jpeg, b"\xff\xe2\xff\xffMPF\0" + tiff_directory(
            [(tag, 7, 65000, 8) for tag in range(300, 5700)]).ljust(65529, b"\0")), "tags declare"),
        "tiff": (overlapping, "tags declare"),
        "strips": (tiff_directory([(273, 4, 10**6, 8)], bytes(10**6)), "tag 273 has 1000000 numbers"),
        "png exif": (png(chunk(b"eXIf", overlapping)), None),
        "png exif at the end": (png(after=[chunk(b"eXIf", overlapping)]), None),
        "raw profile": (png(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(
            b"\nexif\n 9\n" + overlapping.hex().encode()[:900000]))), None),
        "text": (png(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8), 9))), "Decompressed data too large"),
        "texts": (png(*[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**6), 9))] * 100), "text"),
        "profile": (png(chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8), 9))), "data too large"),
        "empty chunks": (png(*[chunk(b"IDAT", b"")] * 20000), None),
        "comments": (gif[:at] + b"!\xfe\1a\0" * (MAX_GIF_BLOCKS + 1) + gif[at:], "blocks before its first frame"),
        "comment": (gif[:at] + b"!\xfe" + (b"\xff" + bytes(255)) * 9000 + b"\0" + gif[at:], "1048576 bytes or"),
        "icon": (icon[:14] + struct.pack("<LL", 10**6, 22) + png(size=(13000, 2000), mode=(8, 6)), "13000 x 2000"),
    }  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_files_that_take_far_more_than_their_bytes(name):
    """Each would take more than ten seconds or gigabytes, or is held by Pillow's own limits."""
    assert set(bombs()) == set(BOMBS)
    data, message = bombs()[name]
    start = time.monotonic()
    if message is None:
        assert load_image(data).size == (8, 8)
    else:
        with pytest.raises(ValueError, match=f"image of .*({message})"):
            load_image(data)
    assert time.monotonic() - start < 5


def test_usual_files_pass_the_checks_of_the_structure():
    image, exif = Image.fromarray(PIXELS), Image.Exif()
    exif[0x0112], exif[0x010E] = 1, "a description" * 500
    profile = bytes(300000)
    for options in ({}, {"progressive": True}, {"quality": 100, "optimize": True}):
        load_image(encoded(image, "JPEG", exif=exif, icc_profile=profile, comment=b"a" * 1000, **options))
    load_image(encoded(image, "MPO", save_all=True, append_images=[image] * 3, exif=exif))
    for compression in (None, "tiff_lzw", "tiff_deflate"):
        load_image(encoded(image, "TIFF", compression=compression, exif=exif, icc_profile=profile))
    load_image(encoded(image, "TIFF", big_tiff=True))
    load_image(
        encoded(image.quantize(), "GIF", save_all=True, append_images=[image.quantize()] * 50, comment=b"a" * 9000)
    )
    load_image(encoded(image, "PNG", exif=exif, icc_profile=profile))
    load_image(encoded(image, "ICO"))


# damaged files


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "ICO", "PCX", "SGI"])
def test_a_damaged_file_is_an_image_or_a_named_error(kind):
    """The seeds of tests are fixed; larger runs are made by hand."""
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    data, rng = encoded(Image.fromarray(PIXELS[:24, :32]), kind, **options), random.Random(kind)
    read = 0
    for _ in range(40):
        broken = bytearray(data)
        for _ in range(rng.choice([1, 2, 5])):
            at = rng.randrange(rng.choice([min(60, len(data)), len(data)]))
            broken[at] = rng.choice([0, 255, rng.randrange(256)])
        if rng.random() < 0.3:
            broken = broken[: rng.randrange(len(broken))]
        try:
            MossVLImageProcessor()(bytes(broken) or b"x", max_pixels=10000)
            read += 1
        except ValueError as error:
            assert str(error).startswith(f"image of {len(broken)} bytes"), error
    assert read or kind == "PNG"


# tensors, files


def test_tensors_of_every_kind_are_images_or_named_errors():
    values = torch.rand(3, 8, 8)
    expected = probe_image(values).read()
    for same in (
        values.to_sparse(),
        values.double(),
        values.clone().requires_grad_(),
        torch.stack([values, values], -1).view(3, 8, 16)[..., ::2],
    ):
        assert np.array_equal(probe_image(same).read(), expected)
    for near, tolerance in (
        (values.half(), 1),
        (values.bfloat16(), 1),
        (torch.quantize_per_tensor(values, 1 / 255, 0, torch.quint8), 1),
        (values.to(torch.float8_e4m3fn), 9),
        (values.to(torch.float8_e5m2), 17),
    ):
        assert np.abs(probe_image(near).read().astype(int) - expected).max() <= tolerance
        batch = split_array(near[None])
        assert len(batch) == 1 and np.abs(probe_image(batch[0]).read().astype(int) - expected).max() <= tolerance
    nested = torch.nested.nested_tensor([torch.rand(3, 8, 8), torch.rand(3, 4, 8)])
    for bad in (values.to("meta"), values.to(torch.complex64), nested, np.array(["a"] * 64, object).reshape(8, 8)):
        with pytest.raises(ValueError, match="image"):
            MossVLImageProcessor()(bad)
    with pytest.raises(ValueError, match="has no values that can be read"):
        MossVLImageProcessor()(torch.rand(2, 3, 8, 8, device="meta"))


class Broken(io.BytesIO):
    def getvalue(self):
        raise RuntimeError("the disk is gone")


class NumberedPath:
    def __fspath__(self):
        return 7


def test_sources_that_raise_are_named_errors():
    with pytest.raises(ValueError, match="image in a Broken' cannot be read: the disk is gone"):
        probe_image(Broken())
    with pytest.raises(ValueError, match="a NumberedPath is not a usable path"):
        probe_image(NumberedPath())


def test_a_video_as_an_image_and_an_image_as_a_video():
    data = Path(__file__).resolve().parents[1] / "data"
    with pytest.raises(ValueError, match="sample_b.mp4' is not an image .*videos are given as videos"):
        probe_image(data / "sample_b.mp4")
    with pytest.raises(ValueError, match="one image alone is given as an image"):
        open_video([data / "sample_a.jpg"])


def test_closed_files_are_named_errors(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(Image.fromarray(PIXELS)))
    image, memory = Image.open(path), io.BytesIO(path.read_bytes())
    image.close()
    memory.close()
    with open(path, "rb") as file:
        pass
    for source, name in ((file, "a.png"), (memory, "BytesIO"), (image, "a.png")):
        with pytest.raises(ValueError, match=f"{name}.*closed"):
            load_image(source)
    with open(path, "wb") as file, pytest.raises(ValueError, match="a.png.*cannot be read"):
        load_image(file)


# the scale of floats


def test_floats_have_one_scale():
    """A fade to black in 0..255 ends with frames of 0 and 1, which must not become white."""
    fade = np.stack([np.full((8, 8, 3), value, np.float32) for value in (200, 20, 1, 0)])
    for images in (fade, torch.from_numpy(fade), list(fade), [list(fade[:2]), list(fade[2:])]):
        assert float_unit(images) is False
    assert float_unit(fade / 255) is True and float_unit(fade[2:]) is True
    assert float_unit(fade.astype(np.uint8)) is None and float_unit([]) is None
    assert float_unit([fade[0].astype(np.uint8), fade[2]]) is True
    assert float_unit([Image.new("F", (8, 8), 1), Image.new("F", (8, 8), 200)]) is False
    assert float_unit([torch.rand(3, 8, 8, device="meta"), (torch.rand(3, 8, 8) + 2).to_sparse()]) is False
    for batch in (fade, torch.from_numpy(fade).permute(0, 3, 1, 2), torch.from_numpy(fade).half()):
        shades = [int(probe_image(part).read().max()) for part in split_array(batch)]
        assert shades == [200, 20, 1, 0]
        pixels = MossVLImageProcessor()(batch, do_normalize=False)["pixel_values"]
        assert pixels.reshape(4, -1).amax(1).tolist() == [200, 20, 1, 0]
    tall = np.zeros((200, 8, 3), np.float32)
    tall[199] = 255  # the first strips hold only 0 and 1
    tall[0] = 1
    assert probe_image(tall).read()[0, 0].tolist() == [1, 1, 1]
    assert probe_image(Image.fromarray(tall[..., 0])).read()[0, 0].tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="expected floats in 0..1"):
        probe_image(fade[0], unit=True).read()
