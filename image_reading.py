"""Reading images: files, URLs, bytes, PIL images, arrays and tensors to uint8 RGB arrays. No target sizes, no patches.

`open_source` also serves videos: a source is opened by the same rules for both. Axes: h rows, w columns.
"""

import base64
import http.client
import io
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from .checks import shorten
from .conversation import local_path, scheme_of


MAX_ASPECT = 200  # longer side : shorter side
MAX_SOURCE_PIXELS = 178_956_970  # of one image before the resize; Pillow's default limit
MAX_IMAGE_BYTES = 64 * 2**20  # of one image that is downloaded or inside a data: URL
DOWNLOAD_SECONDS = 30.0
STRIP = 64  # rows that are copied out of a Pillow image at once
ORIENTATION = 0x0112  # EXIF tag
TRANSPOSE_OF_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# sources


def open_source(
    source,
    *,
    what: str,
    allow_http: bool = False,
    max_bytes: int = MAX_IMAGE_BYTES,
    timeout: float = DOWNLOAD_SECONDS,
) -> tuple[str | io.BytesIO, str]:
    """Returns (file, name): a path or a new seekable binary file, and the name of the source for messages.

    Args:
        source: a path (str or pathlib; `~` is the home folder), a `file:` or `data:` URL, bytes, or a binary file
            object. With `allow_http` also an `http:` or `https:` URL. A file object is read from its start, and its
            position is restored.
        what: "image" or "video", for messages.
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
        return io.BytesIO(_download(source, what, max_bytes, timeout)), source
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
    data = urllib.parse.unquote_to_bytes(body)
    if is_base64:
        data = b"".join(data.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
        try:
            data = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
        except ValueError as error:
            raise ValueError(f"{name} is not base64: {error}") from None
    if not 0 < len(data) <= max_bytes:
        raise ValueError(f"{name} holds {len(data)} bytes; expected 1 to {max_bytes}")
    return io.BytesIO(data), name


def _download(url: str, what: str, max_bytes: int, timeout: float) -> bytes:
    deadline, data = time.monotonic() + timeout, bytearray()
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "moss-vl"})
        with _http_opener().open(request, timeout=timeout) as response:
            size = response.headers.get("Content-Length")
            if size is not None and size.isdigit() and int(size) > max_bytes:
                raise ValueError(f"{what} {url!r} has {size} bytes, over the limit of {max_bytes}")
            while chunk := response.read1(2**16):
                data += chunk
                if len(data) > max_bytes:
                    raise ValueError(f"{what} {url!r} is over the limit of {max_bytes} bytes")
                if time.monotonic() > deadline:
                    raise ValueError(f"{what} {url!r} took longer than {timeout:g} seconds to download")
    except (OSError, urllib.error.URLError, http.client.HTTPException) as error:
        raise ValueError(f"{what} {url!r} cannot be downloaded: {error}") from error
    if not data:
        raise ValueError(f"{what} {url!r} is empty")
    return bytes(data)


def _http_opener() -> urllib.request.OpenerDirector:
    """Opens http and https only: urllib's default opener would follow a redirect to ftp."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


# probing and decoding


@dataclass(frozen=True)
class ProbedImage:
    """An image whose size is known and whose pixels are not decoded yet.

    `height` and `width` are as stored: an EXIF rotation may still exchange them.
    """

    name: str
    height: int
    width: int
    read: Callable[[], np.ndarray]  # decodes: uint8 [h, w, 3], upright
    options: dict = field(default_factory=dict)  # options of this image alone


def probe_image(source, *, what: str = "image", allow_http: bool = False, unit: bool | None = None) -> ProbedImage:
    """Reads the size of an image and checks it, without decoding pixels.

    Args:
        source: what `open_source` takes, a PIL image of any mode, or an array or tensor. Array shapes: [h, w], [h, w,
            C] or [C, h, w] with C = 1, 3 or 4; if both readings fit, the first axis of a tensor and the last axis of
            an array are the channels. Array values: uint8, bool, uint16 (65535 is white), integers 0..255, or floats
            in 0..1 or 0..255.
        what: what the image is, for messages.
        allow_http: True allows downloads.
        unit: True if floats are in 0..1, False if they are in 0..255. None: 0..1 if no value of this image is above 1.

    Raises FileNotFoundError, or ValueError if the source is not an image, has no pixels, is over 200:1, or has more
    than `MAX_SOURCE_PIXELS` pixels.
    """
    if isinstance(source, (np.ndarray, torch.Tensor)):
        image = _probe_array(source, what, unit)
    elif isinstance(source, Image.Image):
        image = _probe_pil(source, what)
    else:
        image = _probe_file(*open_source(source, what=what, allow_http=allow_http))
    short, long = sorted((image.height, image.width))
    if short < 1:
        raise ValueError(f"{image.name} has no pixels: {image.width} x {image.height}")
    if short * long > MAX_SOURCE_PIXELS:
        raise ValueError(
            f"{image.name} has {image.width} x {image.height} pixels, over the limit of {MAX_SOURCE_PIXELS}; make it "
            "smaller first"
        )
    check_aspect(image.height, image.width, image.name)
    return image


def load_image(source, *, what: str = "image", allow_http: bool = False) -> Image.Image:
    """The image in RGB: upright, on white, first frame of an animation. Sources and errors: `probe_image`."""
    return Image.fromarray(probe_image(source, what=what, allow_http=allow_http).read())


def check_aspect(height: int, width: int, name: str) -> None:
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(
            f"{name} is {width} x {height}; the longer side may be at most {MAX_ASPECT} times the shorter"
        )


def _probe_array(source, what: str, unit: bool | None) -> ProbedImage:
    name = f"{what}, a {type(source).__name__} of shape {tuple(source.shape)}"
    array = _channels_last(source, name)
    return ProbedImage(name, array.shape[0], array.shape[1], lambda: _array_rgb(array, name, unit))


# A PIL image of the caller decodes itself on first use and may be in a list twice: one thread at a time.
_PIL_LOCK = threading.Lock()


def _probe_pil(source: Image.Image, what: str) -> ProbedImage:
    name = repr(getattr(source, "filename", "") or f"{what} of mode {source.mode}")

    def read():
        with _PIL_LOCK:
            return _pil_rgb(source, name)

    return ProbedImage(name, source.height, source.width, read)


def _probe_file(file: str | io.BytesIO, name: str) -> ProbedImage:
    def read():
        with _pil_open(file, name) as image:
            return _pil_rgb(image, name)

    with _pil_open(file, name) as image:
        return ProbedImage(name, image.height, image.width, read)


# Pillow


def _pil_open(file: str | io.BytesIO, name: str) -> Image.Image:
    if not isinstance(file, str):
        file = io.BytesIO(file.getvalue())  # threads must not share a position
    try:
        return Image.open(file)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise all kinds of errors on damaged files
        raise ValueError(f"{name} is not an image that Pillow can read: {error}") from error


def _pil_rgb(image: Image.Image, name: str) -> np.ndarray:
    """Decodes to uint8 [h, w, 3]: upright, transparency on white."""
    try:
        image.load()
        transpose = TRANSPOSE_OF_ORIENTATION.get(_orientation(image))
        if transpose is not None:
            image = image.transpose(transpose)
        if image.mode.startswith("I;16"):
            return _array_rgb(np.asarray(image).astype(np.uint16), name)
        if image.mode in ("I", "F"):
            return _array_rgb(np.asarray(image), name)
        if image.mode == "La":
            image = image.convert("LA")
        if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
            image = _on_white(image.convert("RGBA"))
        return _pixels(image if image.mode == "RGB" else image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{name} cannot be decoded: {error}") from error


def _on_white(image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # a damaged EXIF block does not make the pixels unreadable
        return None


def _pixels(image: Image.Image) -> np.ndarray:
    """uint8 [h, w, 3] of an RGB image. Copies strips, because Pillow holds several copies of what it converts."""
    out = np.empty((image.height, image.width, 3), np.uint8)
    for first in range(0, image.height, STRIP):
        out[first : first + STRIP] = image.crop((0, first, image.width, min(first + STRIP, image.height)))
    return out


# arrays and tensors


def float_unit(images) -> bool | None:
    """Whether the floats of `images`, an array or nested lists of arrays, are in 0..1 (True) or in 0..255 (False);
    None without floats.

    All images share one scale: 0..1 if no value of any of them is above 1.
    """
    if isinstance(images, (list, tuple)):
        units = [unit for unit in map(float_unit, images) if unit is not None]
        return all(units) if units else None
    if isinstance(images, torch.Tensor):
        return bool((images <= 1).all()) if images.is_floating_point() else None
    if isinstance(images, np.ndarray):
        return bool((images <= 1).all()) if images.dtype.kind == "f" else None
    return None


def split_array(array) -> list:
    """The images or videos along the first axis of an array or tensor.

    Floats become uint8 before the split, so that all parts share one scale. Floats out of range stay, for the error of
    `probe_image`.
    """
    unit = float_unit(array)
    if (
        unit is not None
        and array.ndim > 3
        and 0 not in array.shape
        and float(array.min()) >= 0
        and float(array.max()) <= 255
    ):
        array = array * 255 if unit else array
        array = array.round().to(torch.uint8) if isinstance(array, torch.Tensor) else np.rint(array).astype(np.uint8)
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


def _array_rgb(array, name: str, unit: bool | None = None) -> np.ndarray:
    """uint8 [h, w, 3] of an array or tensor [h, w] or [h, w, 1 | 3 | 4]. `unit`: as for `probe_image`."""
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.dtype in (torch.bfloat16, torch.float16) else array).numpy()
    if array.ndim == 2:
        array = array[:, :, None]
    array = _to_uint8(array, name, unit)
    if array.shape[2] == 4:
        return np.array(_on_white(Image.fromarray(np.ascontiguousarray(array))).convert("RGB"))
    if array.shape[2] == 1:
        array = np.repeat(array, 3, axis=2)
    return array


def _to_uint8(array: np.ndarray, name: str, unit: bool | None) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name} holds {array.dtype}; expected numbers")
    low, high = array.min(), array.max()
    if not 0 <= low <= high <= 255:
        raise ValueError(f"{name} holds values from {low} to {high}; expected 0..255, or 0..1 as floats")
    if array.dtype.kind == "f":
        array = np.rint(array * 255 if (high <= 1 if unit is None else unit) else array)
    return array.astype(np.uint8)
