"""Reading images: files, URLs, bytes, PIL images, arrays and tensors to uint8 RGB arrays. No target sizes, no patches.

`open_source` also serves videos: a source is opened by the same rules for both. Axes: h rows, w columns.
"""

import base64
import contextlib
import io
import math
import os
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image

from .checks import shorten, without_login
from .conversation import local_path, scheme_of
from .downloads import download
from .image_files import open_image, orientation


MAX_ASPECT = 200  # longer side : shorter side
MAX_SOURCE_PIXELS = 178_956_970  # of one image before the resize; Pillow's default limit
MAX_IMAGE_BYTES = 64 * 2**20  # of one image that is downloaded or inside a data: URL
DOWNLOAD_SECONDS = 30.0
STRIP = 64  # rows that are copied out of a Pillow image at once
DRAFT = 8  # a JPEG is decoded at half its size if it is this many times larger than needed, and so on
ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
TRANSPOSE_OF_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Which of them make rows of columns, and which begin at the last row or column.
TURNED = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)
FROM_END = (
    Image.Transpose.ROTATE_180,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)


# sources


def open_source(
    source,
    *,
    what: str,
    allow_http: bool = False,
    allow_private_hosts: bool = False,
    max_bytes: int = MAX_IMAGE_BYTES,
    timeout: float = DOWNLOAD_SECONDS,
) -> tuple[str | io.BytesIO, str]:
    """Returns (file, name): a path or a new seekable binary file, and the name of the source for messages.

    Args:
        source: a path (str or pathlib; `~` is the home folder), a `file:` or `data:` URL, bytes, or a binary file
            object. With `allow_http` also an `http:` or `https:` URL. A file object is read from its start, and its
            position is restored.
        what: "image" or "video", for messages.
        allow_private_hosts: True allows downloads from private, loopback, link-local and reserved addresses.
        max_bytes: limit for a download or a `data:` URL.
        timeout: seconds for a whole download.

    Raises FileNotFoundError if the file does not exist, and ValueError for anything else that cannot be read.
    """
    source = local_path(source)
    if isinstance(source, str):
        scheme = scheme_of(source)
        if scheme == "data":
            return _read_data_url(source, what, max_bytes)
        if scheme is None:
            return _check_path(source, what), repr(source)
        if not allow_http:
            raise ValueError(
                f"{what} {shorten(source)} would be downloaded; pass allow_http=True to allow that, in the call or to "
                "the processor's from_pretrained"
            )
        limits = {"max_bytes": max_bytes, "timeout": timeout}
        data = download(source, what=what, allow_private_hosts=allow_private_hosts, **limits)
        return io.BytesIO(data), without_login(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        data, name = bytes(source), f"{what} of {len(source)} bytes"
    elif hasattr(source, "read"):
        name = repr(getattr(source, "name", None) or f"{what} in a {type(source).__name__}")
        data = _read_all(source, name)
    else:
        raise ValueError(
            f"cannot read {what} from a {type(source).__name__}; expected a path, a file:, data: or http(s): URL, "
            "bytes or a binary file"
        )
    if not data:
        raise ValueError(f"{name} is empty")
    return io.BytesIO(data), name


def _check_path(path: str, what: str) -> str:
    if not path or "\0" in path:
        raise ValueError(f"{what} has no usable path: {shorten(path)}")
    if not os.path.exists(path):
        hint = "; base64 goes under the key 'base64', or into a data: URL" if len(path) > 1000 else ""
        raise FileNotFoundError(f"no such {what} file: {shorten(path, 500)}{hint}")
    if not os.path.isfile(path):
        raise ValueError(f"{what} {path!r} is not a file")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{what} file {path!r} is empty")
    return path


def _read_all(file, name: str) -> bytes:
    """All bytes of a file object; from a pipe, which cannot seek, the bytes that are left."""
    if isinstance(file, io.TextIOBase):
        raise ValueError(f"{name} is open as text; open it with mode 'rb'")
    try:
        return _read_file(file, name)
    except MemoryError:
        raise
    except Exception as error:  # file objects of callers raise all kinds of errors
        if isinstance(error, ValueError) and str(error).startswith(name):
            raise
        raise ValueError(f"{name} cannot be read: {error}") from error


def _read_file(file, name: str) -> bytes:
    if isinstance(file, io.BytesIO):
        return file.getvalue()
    try:
        position = file.tell()
        file.seek(0)
    except (AttributeError, OSError):
        position = None
    data = file.read()
    if position is not None:
        file.seek(position)
    if not isinstance(data, (bytes, bytearray)):
        raise ValueError(f"{name}: read() gave {type(data).__name__}, expected bytes; open it with mode 'rb'")
    return bytes(data)


def _read_data_url(url: str, what: str, max_bytes: int) -> tuple[io.BytesIO, str]:
    head, comma, body = url.partition(",")
    name = f"{what} in a data: URL ({head[5:40] or 'no type'}, {len(body)} characters)"
    if not comma:
        raise ValueError(f"{name} has no comma before its data; expected data:[type][;base64],DATA")
    is_base64 = head.lower().endswith(";base64")
    if len(body) > (max_bytes * 4 // 3 + 4 if is_base64 else max_bytes * 3):
        raise ValueError(f"{name} is over the limit of {max_bytes} bytes")
    try:
        data = urllib.parse.unquote_to_bytes(body)
    except UnicodeError:
        raise ValueError(f"{name} holds characters that no URL can hold") from None
    if is_base64:
        data = b"".join(data.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
        try:
            data = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
        except ValueError as error:
            raise ValueError(f"{name} is not base64: {error}") from None
    if not 0 < len(data) <= max_bytes:
        raise ValueError(f"{name} holds {len(data)} bytes; expected 1 to {max_bytes}")
    return io.BytesIO(data), name


# probing and decoding


@dataclass(frozen=True)
class Rows:
    """A decoded image, upright, whose rows become RGB where they are needed: in strips, so that the whole image is in
    memory once, in the mode of its file.

    Attributes:
        height, width: of what is decoded.
        full_size: (h, w) of the image; larger than what is decoded if the decoder made it smaller.
        strip: (first, end) -> these rows as uint8 [end - first, w, 3].
    """

    height: int
    width: int
    full_size: tuple[int, int]
    strip: Callable[[int, int], np.ndarray]

    @classmethod
    def of_array(cls, array: np.ndarray) -> "Rows":
        """The rows of a uint8 array [h, w, 3]."""
        return cls(*array.shape[:2], array.shape[:2], lambda first, end: array[first:end])

    def strips(self) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the first row, strip) from top to bottom."""
        for first in range(0, self.height, STRIP):
            yield first, self.strip(first, min(first + STRIP, self.height))

    def array(self) -> np.ndarray:
        """All rows: uint8 [h, w, 3]."""
        if self.height <= STRIP:
            return self.strip(0, self.height)
        out = np.empty((self.height, self.width, 3), np.uint8)
        for first, strip in self.strips():
            out[first : first + len(strip)] = strip
        return out


@dataclass(frozen=True)
class ProbedImage:
    """An image whose size is known and whose pixels are not decoded yet.

    Attributes:
        name: for messages.
        height, width: as stored: an EXIF rotation may still exchange them.
        decode: decodes the image. Its argument is the size (h, w) -> (h, w) that the image gets afterwards, or None: a
            decoder may return fewer pixels if it is far smaller.
        options: options of this image alone.
        weight: memory per pixel while it is decoded, relative to RGB.
    """

    name: str
    height: int
    width: int
    decode: Callable[[Callable[[int, int], tuple[int, int]] | None], Rows]
    options: dict = field(default_factory=dict)
    weight: float = 1.0

    @property
    def cost(self) -> float:
        """Its share of `max_source_pixels` while it is decoded."""
        return self.height * self.width * self.weight

    def read(self) -> np.ndarray:
        """The whole image: uint8 [h, w, 3], upright."""
        return self.decode(None).array()


def probe_image(
    source,
    *,
    what: str = "image",
    allow_http: bool = False,
    allow_private_hosts: bool = False,
    unit: bool | None = None,
    max_source_pixels: int = MAX_SOURCE_PIXELS,
) -> ProbedImage:
    """Reads the size of an image and checks it, without decoding pixels.

    Args:
        source: what `open_source` takes, a PIL image of any mode, or an array or tensor. Array shapes: [h, w], [h, w,
            C] or [C, h, w] with C = 1, 3 or 4; if both readings fit, the first axis of a tensor and the last axis of
            an array are the channels. Array values: uint8, bool, uint16 (65535 is white), integers 0..255, or floats
            in 0..1 or 0..255.
        what: what the image is, for messages.
        allow_http: True allows downloads.
        allow_private_hosts: True allows downloads from private addresses too.
        unit: True if floats are in 0..1, False if they are in 0..255. None: 0..1 if no value of this image is above 1.
        max_source_pixels: most pixels of the image; two thirds of it with a palette or transparency, a
            third for WebP and JPEG 2000.

    Raises FileNotFoundError, or ValueError if the source is not an image, has no pixels, is over 200:1, or has too
    many pixels.
    """
    if isinstance(source, (np.ndarray, torch.Tensor)):
        probed, limit = _probe_array(source, what, unit), max_source_pixels
    elif isinstance(source, Image.Image):
        probed, limit = _probe_pil(source, what, unit), _pixel_limit(source, max_source_pixels)
    else:
        downloads = {"allow_http": allow_http, "allow_private_hosts": allow_private_hosts}
        file, name = open_source(source, what=what, **downloads)
        with open_image(file, name) as image:
            limit = _pixel_limit(image, max_source_pixels)
            probed = ProbedImage(name, image.height, image.width, lambda fit: _decode_file(file, name, limit, fit))
    check_size(probed.height, probed.width, probed.name, limit)
    return replace(probed, weight=max_source_pixels / limit)


def check_size(height: int, width: int, name: str, limit: int) -> None:
    """ValueError for an image without pixels, over `limit` pixels, or over 200:1."""
    if min(height, width) < 1:
        raise ValueError(f"{name} has no pixels: {width} x {height}")
    if height * width > limit:
        raise ValueError(
            f"{name} has {width} x {height} pixels, over the limit of {limit}; make it smaller first, or pass "
            "a larger max_source_pixels"
        )
    check_aspect(height, width, name)


def _pixel_limit(image: Image.Image, max_source_pixels: int) -> int:
    """The limit for an image that may not be loaded yet. Decoders of some formats, and of palettes and transparency,
    need more memory: up to 18 bytes per pixel."""
    if image.format in ("JPEG2000", "WEBP"):
        return max(1, max_source_pixels // 3)
    has_extra = image.mode in ("P", *ALPHA_MODES) or image.format == "GIF" or "transparency" in image.info
    return max(1, max_source_pixels * 2 // 3) if has_extra else max_source_pixels


def load_image(source, *, what: str = "image", allow_http: bool = False) -> Image.Image:
    """The image in RGB: upright, on white, first frame of an animation. Sources and errors: `probe_image`."""
    return Image.fromarray(probe_image(source, what=what, allow_http=allow_http).read())


def check_aspect(height: int, width: int, name: str) -> None:
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(
            f"{name} is {width} x {height}; the longer side may be at most {MAX_ASPECT} times the shorter"
        )


def _probe_array(source, what: str, unit: bool | None) -> ProbedImage:
    if getattr(source, "is_nested", False):
        raise ValueError(f"{what} is a nested tensor; expected one image")
    name = f"{what}, a {type(source).__name__} of shape {tuple(source.shape)}"
    if isinstance(source, torch.Tensor) and (source.layout != torch.strided or source.is_quantized):
        source = plain_array(source, name)
    source = _channels_last(source, name)

    def decode(fit) -> Rows:
        array = plain_array(source, name)
        is_unit = _check_values(array, name, unit)
        height, width = array.shape[:2]
        return Rows(height, width, (height, width), lambda first, end: _array_rgb(array[first:end], is_unit))

    return ProbedImage(name, source.shape[0], source.shape[1], decode)


# A PIL image of the caller decodes itself on first use and may be in a list twice: one thread at a time.
_PIL_LOCK = threading.Lock()


def _probe_pil(source: Image.Image, what: str, unit: bool | None) -> ProbedImage:
    name = repr(getattr(source, "filename", "") or f"{what} of mode {source.mode}")

    def decode(fit) -> Rows:
        with _PIL_LOCK, _naming_errors(name):
            source.load()  # of a PNG also the EXIF data after the pixels
            rows = _pil_rows(source, name, orientation(source), unit=unit)

        def strip(first, end):
            with _PIL_LOCK:
                return rows.strip(first, end)

        return replace(rows, strip=strip)

    return ProbedImage(name, source.height, source.width, decode)


def _decode_file(file: str | io.BytesIO, name: str, limit: int, fit) -> Rows:
    with open_image(file, name) as image, _naming_errors(name):
        check_size(image.height, image.width, name, limit)
        size, is_jpeg = (image.height, image.width), image.format in ("JPEG", "MPO")
        if not is_jpeg:
            image.load()  # of a PNG also the EXIF data after the pixels
            if (image.height, image.width) != size:
                raise ValueError(f"it declares {size[1]} x {size[0]} pixels and holds {image.width} x {image.height}")
        turned = orientation(image)
        if fit is not None and is_jpeg:
            _draft(image, fit(*(size[::-1] if (turned or 1) > 4 else size)), (turned or 1) > 4)
        return _pil_rows(image, name, turned, size)


def _draft(image: Image.Image, size: tuple[int, int], is_turned: bool) -> None:
    """Lets the JPEG decoder halve the image (or divide it by 4 or 8) if it stays `DRAFT` / 2 times larger than the
    upright `size`.

    Against the full decode, the resized pixels of photos differ by 0.1 to 0.7 levels on average, and those of small
    black text by 3.5.
    """
    height, width = size[::-1] if is_turned else size
    image.draft(None, (math.ceil(width * DRAFT / 2), math.ceil(height * DRAFT / 2)))


# Pillow


@contextlib.contextmanager
def _naming_errors(name: str):
    """Errors of Pillow's decoders, of any class, as a ValueError that names the image."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(name):
            raise
        raise ValueError(f"{name} cannot be decoded: {error or type(error).__name__}") from error


def _pil_rows(image: Image.Image, name: str, turned: int | None, size=None, unit: bool | None = None) -> Rows:
    """Decodes an image. `turned`: its EXIF orientation. `size`: (h, w) as stored."""
    image.load()
    size = size or (image.height, image.width)
    to_rgb = _strip_to_rgb(image, name, unit)
    height, width = image.height, image.width
    transpose = TRANSPOSE_OF_ORIENTATION.get(turned)
    is_turned, from_end = transpose in TURNED, transpose in FROM_END
    length = width if is_turned else height

    def strip(first: int, end: int) -> np.ndarray:
        if from_end:
            first, end = length - end, length - first
        part = image.crop((first, 0, end, height) if is_turned else (0, first, width, end))
        return to_rgb(part if transpose is None else part.transpose(transpose))

    return Rows(*((width, height) if is_turned else (height, width)), size[::-1] if is_turned else size, strip)


def _strip_to_rgb(image: Image.Image, name: str, unit: bool | None) -> Callable[[Image.Image], np.ndarray]:
    """What makes uint8 [h, w, 3] of parts of a loaded image, transparency on white. One scale holds for all parts."""
    if image.mode.startswith("I;16"):
        return lambda part: _array_rgb(np.asarray(part).astype(np.uint16), None)
    if image.mode in ("I", "F"):
        low, high = image.getextrema()
        if image.mode == "I" and image.format in ("PNG", "PPM") and 0 <= low <= high <= 65535:  # 16 bits
            return lambda part: _array_rgb(np.asarray(part).astype(np.uint16), None)
        is_unit = _check_values(np.array([low, high], np.int64 if image.mode == "I" else np.float64), name, unit)

        def scale(part):
            array = np.asarray(part)
            if not np.isfinite(array).all():
                raise ValueError(f"{name} holds values that are not numbers")
            return _array_rgb(array, is_unit)

        return scale
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.asarray
    if image.mode in ALPHA_MODES or "transparency" in image.info:

        def flatten(part):
            part = part.convert("LA") if part.mode == "La" else part
            return np.asarray(_on_white(part.convert("RGBA")).convert("RGB"))

        return flatten
    return lambda part: np.asarray(part.convert("RGB"))


def _on_white(image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


# arrays and tensors


def float_unit(images) -> bool | None:
    """Whether the floats of `images`, an array or nested lists of arrays, are in 0..1 (True) or in 0..255 (False);
    None without floats.

    All images share one scale: 0..1 if no value of any of them is above 1. PIL images of mode F count as floats. What
    cannot be read says nothing here, and is an error of `probe_image`.
    """
    if isinstance(images, (list, tuple)):
        units = []
        for image in images:
            units.append(float_unit(image))
            if units[-1] is False:
                return False
        return True if True in units else None
    if isinstance(images, Image.Image) and images.mode == "F":
        try:
            with _PIL_LOCK:
                return bool(images.getextrema()[1] <= 1)
        except Exception:  # damaged files raise all kinds of errors
            return None
    if isinstance(images, torch.Tensor) and (images.is_nested or not _is_float(images)):
        return None
    if isinstance(images, torch.Tensor) and images.layout == torch.strided and images.ndim > 3:
        return float_unit(list(images))  # half-precision formats are converted image by image
    if isinstance(images, torch.Tensor):
        try:
            images = plain_array(images, "image")
        except ValueError:
            return None
    if isinstance(images, np.ndarray) and images.dtype.kind == "f":
        return bool(images.size == 0 or images.max() <= 1)
    return None


def _is_float(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_quantized


def plain_array(source, name: str) -> np.ndarray:
    """The numpy array of a tensor of any layout, dtype and device; an array in the byte order of this machine.

    Raises ValueError for a tensor that holds no numbers.
    """
    if not isinstance(source, torch.Tensor):
        array = np.asarray(source)
        return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    try:
        tensor = source.detach()
        if tensor.is_quantized:
            tensor = tensor.dequantize()
        if tensor.layout != torch.strided:
            tensor = tensor.to_dense()
        if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64):
            tensor = tensor.float()
        return tensor.cpu().resolve_conj().resolve_neg().numpy()
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        kind = f"{source.dtype}, {source.layout}, on {source.device}"
        raise ValueError(f"{name} ({kind}) has no values that can be read: {error}") from error


def split_array(array) -> list:
    """The images or videos along the first axis of an array or tensor.

    Floats become uint8 before the split, so that all parts share one scale. Floats out of range stay, for the error of
    `probe_image`.
    """
    if getattr(array, "is_nested", False):
        raise ValueError("images or videos are a nested tensor; expected a list, or an array of one size")
    if isinstance(array, torch.Tensor) and (array.layout != torch.strided or array.is_quantized):
        array = plain_array(array, f"a Tensor of shape {tuple(array.shape)}")
    unit = float_unit(array)
    if unit is None or array.ndim < 4 or 0 in array.shape:
        return list(array)
    parts = [plain_array(part, f"a {type(part).__name__} of shape {tuple(part.shape)}") for part in array]
    if min(part.min() for part in parts) >= 0 and max(part.max() for part in parts) <= 255:
        parts = [np.rint(part * 255 if unit else part).astype(np.uint8) for part in parts]
        return list(map(torch.from_numpy, parts)) if isinstance(array, torch.Tensor) else parts
    return list(array)


def _channels_last(source, name: str):
    """A view [h, w, 1 | 3 | 4] of a numpy array or tensor."""
    shape = tuple(source.shape)
    if len(shape) == 2:
        return source[:, :, None]
    if len(shape) == 3:
        is_tensor = isinstance(source, torch.Tensor)
        for channels_first in (is_tensor, not is_tensor):
            if channels_first and shape[0] in (1, 3, 4):
                return source.permute(1, 2, 0) if is_tensor else source.transpose(1, 2, 0)
            if not channels_first and shape[2] in (1, 3, 4):
                return source
    raise ValueError(f"{name}: expected [h, w], [h, w, channels] or [channels, h, w] with 1, 3 or 4 channels")


def _check_values(array: np.ndarray, name: str, unit: bool | None) -> bool:
    """Whether the floats of an array are in 0..1. `unit`: as for `probe_image`.

    Raises ValueError for values out of range.
    """
    if array.dtype in (np.uint8, np.bool_, np.uint16) or array.size == 0:
        return False
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name} holds {array.dtype}; expected numbers")
    low, high = array.min(), array.max()
    if not 0 <= low <= high <= 255:
        raise ValueError(f"{name} holds values from {low} to {high}; expected 0..255, or 0..1 as floats")
    if array.dtype.kind != "f":
        return False
    if unit and high > 1:
        raise ValueError(f"{name} holds values up to {high}; expected floats in 0..1 like the other frames")
    return bool(high <= 1 if unit is None else unit)


def _array_rgb(array: np.ndarray, unit: bool | None) -> np.ndarray:
    """uint8 [h, w, 3] of an array [h, w] or [h, w, 1 | 3 | 4] with checked values. `unit`: whether floats are in
    0..1."""
    if array.ndim == 2:
        array = array[:, :, None]
    array = _to_uint8(array, unit)
    if array.shape[2] == 4:
        return np.array(_on_white(Image.fromarray(np.ascontiguousarray(array))).convert("RGB"))
    if array.shape[2] == 1:
        array = np.repeat(array, 3, axis=2)
    return array


def _to_uint8(array: np.ndarray, unit: bool | None) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if array.dtype.kind == "f":
        array = np.rint(array * 255 if unit else array)
    return array.astype(np.uint8)
