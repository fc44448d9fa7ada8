"""Images to patches: where a picture may come from, its size, the resize.

The first half is shared with the two video files. Axes: h rows, w columns, p patch size, t temporal patch size, P patches.
"""

import base64
import http.client
import io
import math
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from .checks import flag, positive_int, shorten
from .conversation import SOURCE_KEYS, local_path, read_medium, scheme_of
from .options import FIXED, FIXED_SIZE, canonical, drop_fixed, layered, names_of, read_options, reject_unknown
from .patches import join_patches, patchify


logger = logging.get_logger(__name__)

SIZES = ("size", "min_pixels", "max_pixels", "shortest_edge", "longest_edge")  # the names that a pixel limit goes by
DEFAULT_SIZE = {"shortest_edge": 4096, "longest_edge": 16777216}  # pixels of an image or frame
ANY_SIZE = {"shortest_edge": 1, "longest_edge": 2**63}
MAX_ASPECT = 200  # longer side : shorter side
MAX_SOURCE_PIXELS = 178_956_970  # of one picture before the resize; what Pillow refuses by default
MAX_IMAGE_BYTES = 64 * 2**20  # of one picture that is downloaded, or inside a data: URL
DOWNLOAD_SECONDS = 30.0
IMAGE_THREADS = 4  # at most, that decode and resize the images of a sample
STRIP = 64  # rows of a decoded picture that Pillow hands over at once


# checking arguments


def three_floats(name: str, value) -> tuple[float, float, float]:
    """One finite number a colour channel; of a name that ends in `std`, above 0."""
    try:
        numbers = tuple(float(x) for x in value)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3 or not all(math.isfinite(x) for x in numbers):
        raise ValueError(f"{name} must be three finite numbers, one for each of red, green and blue, got {value!r}")
    if name.endswith("std") and min(numbers) <= 0:
        raise ValueError(f"{name} divides, so each number must be above 0, got {value!r}")
    return numbers


def pixel_limits(default, size=None, min_pixels=None, max_pixels=None, shortest_edge=None, longest_edge=None):
    """(min, max) pixels: what a call names, else `default`, a dict {"shortest_edge", "longest_edge"} of pixel counts.

    `min_pixels` and `shortest_edge` are two names of one number, so are `max_pixels` and `longest_edge`, and `size` may hold
    either edge. ValueError where two of them disagree or min > max.
    """
    size = {} if size is None else {k: v for k, v in dict(size).items() if v is not None}
    reject_unknown(size, ("shortest_edge", "longest_edge"), "size")
    limits = []
    for edge, names in (
        (
            "shortest_edge",
            {
                "size['shortest_edge']": size.get("shortest_edge"),
                "shortest_edge": shortest_edge,
                "min_pixels": min_pixels,
            },
        ),
        (
            "longest_edge",
            {"size['longest_edge']": size.get("longest_edge"), "longest_edge": longest_edge, "max_pixels": max_pixels},
        ),
    ):
        given = {name: positive_int(name, value) for name, value in names.items() if value is not None}
        if len(set(given.values())) > 1:
            raise ValueError(f"these name the same limit and disagree: {given}; give one of them")
        limits.append(next(iter(given.values())) if given else positive_int(f"size[{edge!r}]", dict(default)[edge]))
    if limits[0] > limits[1]:
        raise ValueError(f"shortest_edge (min_pixels) {limits[0]} is above longest_edge (max_pixels) {limits[1]}")
    return limits[0], limits[1]


def known_settings(file: dict, cls) -> dict:
    """The settings of a processor's file by the names that this code uses; pixel limits stay as `with_knobs` reads them. What `cls` does
    not know is left out, with a warning, and so is an option's other name if the file has its own name too and they disagree."""
    settings, options = {}, {}
    for name, value in file.items():
        if name in SIZES or name in SERVICE_KEYS or name in FIXED or name[:1] == "_":
            settings[name] = value
        elif name in cls.stored:
            own = file.get(canonical(name))
            if value is not None and own is not None and value != own:
                logger.warning_once(
                    f"{cls.__name__}: {name}={value!r} has no effect, since {canonical(name)}={own!r} is there too"
                )
            else:
                options[name] = value
        elif value is not None:
            logger.warning_once(f"{cls.__name__}: {name}={value!r} has no effect")
    return {**settings, **read_options(options, cls.stored, cls.__name__)}


def split_keywords(kwargs: dict, cls) -> tuple[dict, dict]:
    """Keyword arguments of a processor's `from_dict`: (those for transformers, settings by the names that this code uses). ValueError for
    what neither takes; a pipeline passes what is meant for the model, too, and that is left out."""
    kwargs = drop_fixed(kwargs, cls.__name__)
    knobs = {name: kwargs.pop(name) for name in cls.knobs if name in kwargs}
    settings_only(knobs, cls.settings, cls.__name__)
    others = [name for name in kwargs if name not in PASSED_ON | HUB_KEYS and name[:1] != "_"]
    if kwargs.get("_from_pipeline") is not None:
        kwargs = {name: value for name, value in kwargs.items() if name not in others}
    elif not kwargs.get("return_unused_kwargs"):
        reject_unknown(others, cls.settings, cls.__name__)
    return kwargs, read_options(knobs, cls.settings, cls.__name__)


def with_knobs(settings: dict, knobs: dict) -> dict:
    """A processor file's settings under keyword arguments; a pixel limit among these replaces the file's, however it is named."""
    knobs = {name: value for name, value in knobs.items() if value is not None}
    size, given = dict(settings.get("size") or {}), dict(knobs.pop("size", None) or {})
    out = dict(settings)
    for edge, alias in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        if {edge, alias} & knobs.keys() or edge in given:
            for names in (size, out):
                names.pop(edge, None)
                names.pop(alias, None)
    return {**out, "size": {**size, **given}, **knobs}


# where bytes lie


def open_source(source, *, what, allow_http=False, max_bytes=MAX_IMAGE_BYTES, timeout=DOWNLOAD_SECONDS):
    """(file, name): a path string or a seekable binary file of its own, and what to call it in messages.

    `source`: a path (str, pathlib; `~` is the home folder), a `file:`, `data:` or - with `allow_http` - `http(s):` URL, bytes, or a
    binary file object, which is read from its start and left at the position it had. `max_bytes` bounds what is downloaded or decoded
    from a `data:` URL, `timeout` (seconds) a whole download.

    Raises FileNotFoundError where there is no such file, ValueError for anything else that cannot be read.
    """
    source = local_path(source)
    if isinstance(source, str):
        scheme = scheme_of(source)
        if scheme == "data":
            return _data_url(source, what, max_bytes)
        if scheme is not None:
            if not allow_http:
                raise ValueError(
                    f"{what} {shorten(source)} would be downloaded; pass allow_http=True to allow that, in the call or to the processor's "
                    "from_pretrained"
                )
            return io.BytesIO(_download(source, what, max_bytes, timeout)), source
        return _path(source, what), repr(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        data, name = bytes(source), f"{what} of {len(source)} bytes"
    elif hasattr(source, "read"):
        name = repr(getattr(source, "name", None) or f"{what} in a {type(source).__name__}")
        data = _read_all(source, name)
    else:
        raise ValueError(
            f"cannot read {what} from a {type(source).__name__}; expected a path, a file:, data: or http(s): URL, bytes or a binary file"
        )
    if not data:
        raise ValueError(f"{name} is empty")
    return io.BytesIO(data), name


def _path(path: str, what: str) -> str:
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
    if isinstance(file, io.TextIOBase):
        raise ValueError(f"{name} is open as text; open it with mode 'rb'")
    if isinstance(file, io.BytesIO):
        return file.getvalue()
    try:
        position = file.tell()
        file.seek(0)
    except (AttributeError, OSError):  # a pipe: what is left in it
        position = None
    data = file.read()
    if position is not None:
        file.seek(position)
    if not isinstance(data, (bytes, bytearray)):
        raise ValueError(f"{name}: read() gave {type(data).__name__}, expected bytes; open it with mode 'rb'")
    return bytes(data)


def _data_url(url: str, what: str, max_bytes: int):
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
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,  # a redirect to anything but http(s) is an error
    ):
        opener.add_handler(handler())
    deadline, data = time.monotonic() + timeout, bytearray()
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "moss-vl"})
        with opener.open(request, timeout=timeout) as response:
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


# RGB of an image


@dataclass(frozen=True)
class SeenImage:
    """An image of which only the size is known yet (rows and columns as stored, before an EXIF rotation)."""

    name: str
    height: int
    width: int
    read: Callable[[], np.ndarray]  # decodes: uint8 [h, w, 3], upright
    own: dict = field(default_factory=dict)  # options of this image alone


_GIVEN = threading.Lock()  # a caller's PIL image loads itself when it is read first, and may be in a list twice


def see_image(source, *, what="image", allow_http=False, unit=None) -> SeenImage:
    """Looks at an image without decoding it, and checks its size.

    `source`: what `open_source` takes, a PIL image of any mode, or an array or tensor [h, w], [h, w, 1 | 3 | 4] or
    [1 | 3 | 4, h, w] (a tensor's channels are looked for in front first) of uint8, bool, uint16 (65535 is white), whole numbers
    0..255, or floats in 0..1 or else 0..255. `unit` says which of the two floats are; None: 0..1 if none of this image's is above 1.

    Raises FileNotFoundError, or ValueError for anything that is not an image, has no pixels, is over 200:1, or has more than
    `MAX_SOURCE_PIXELS` by its header.
    """
    if isinstance(source, (np.ndarray, torch.Tensor)):
        name = f"{what}, a {type(source).__name__} of shape {tuple(source.shape)}"
        array = _channels_last(source, name)
        seen = SeenImage(name, array.shape[0], array.shape[1], lambda: _array_rgb(array, name, unit))
    elif isinstance(source, Image.Image):
        name = repr(getattr(source, "filename", "") or f"{what} of mode {source.mode}")

        def read():
            with _GIVEN:
                return _pil_rgb(source, name)

        seen = SeenImage(name, source.height, source.width, read)
    else:
        file, name = open_source(source, what=what, allow_http=allow_http)

        def read():
            with _pil_open(file, name) as image:
                return _pil_rgb(image, name)

        with _pil_open(file, name) as image:
            seen = SeenImage(name, image.height, image.width, read)

    short, long = sorted((seen.height, seen.width))
    if short < 1:
        raise ValueError(f"{name} has no pixels: {seen.width} x {seen.height}")
    if short * long > MAX_SOURCE_PIXELS:
        raise ValueError(
            f"{name} has {seen.width} x {seen.height} pixels, over the limit of {MAX_SOURCE_PIXELS}; make it smaller first"
        )
    check_aspect(seen.height, seen.width, name)
    return seen


def load_image(source, *, what="image", allow_http=False) -> Image.Image:
    """The image upright in RGB, transparency on white, the first frame of an animation. Sources and errors: `see_image`."""
    return Image.fromarray(see_image(source, what=what, allow_http=allow_http).read())


def check_aspect(height: int, width: int, name: str) -> None:
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(
            f"{name} is {width} x {height}; the longer side may be at most {MAX_ASPECT} times the shorter"
        )


def _pil_open(file, name: str) -> Image.Image:
    if not isinstance(file, str):
        file = io.BytesIO(file.getvalue())  # a position of its own
    try:
        return Image.open(file)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise all kinds on damaged files
        raise ValueError(f"{name} is not an image that Pillow can read: {error}") from error


def _pil_rgb(image: Image.Image, name: str) -> np.ndarray:
    """Decodes: uint8 [h, w, 3]."""
    try:
        image.load()
        upright = _ROTATIONS.get(_orientation(image))
        if upright is not None:
            image = image.transpose(upright)
        if image.mode.startswith("I;16"):
            return _array_rgb(np.asarray(image).astype(np.uint16), name)
        if image.mode in ("I", "F"):
            return _array_rgb(np.asarray(image), name)
        if image.mode == "La":
            image = image.convert("LA")
        if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return _pixels(image if image.mode == "RGB" else image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{name} cannot be decoded: {error}") from error


def _pixels(image: Image.Image) -> np.ndarray:
    """uint8 [h, w, 3] of an RGB image, strip by strip: Pillow copies what it hands over several times."""
    out = np.empty((image.height, image.width, 3), np.uint8)
    for first in range(0, image.height, STRIP):
        out[first : first + STRIP] = image.crop((0, first, image.width, min(first + STRIP, image.height)))
    return out


_ROTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image):
    try:
        return image.getexif().get(0x0112)
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return None


def _channels_last(source, name: str):
    """[h, w, 1 | 3 | 4], a view of a numpy array or tensor."""
    shape = tuple(source.shape)
    if len(shape) == 2:
        return source[:, :, None]
    if len(shape) == 3:
        front = isinstance(source, torch.Tensor)
        for channels_first in (front, not front):
            if channels_first and shape[0] in (1, 3, 4):
                return source.permute(1, 2, 0) if front else source.transpose(1, 2, 0)
            if not channels_first and shape[2] in (1, 3, 4):
                return source
    raise ValueError(f"{name}: expected [h, w], [h, w, channels] or [channels, h, w] with 1, 3 or 4 channels")


def float_unit(images) -> bool | None:
    """Whether floats of pixels that belong together, an array or a list that may hold arrays, are 0..1 (True) or 0..255: 0..1 if none of
    them all is above 1. None if there are no floats."""
    if isinstance(images, (list, tuple)):
        found = [unit for unit in map(float_unit, images) if unit is not None]
        return all(found) if found else None
    if isinstance(images, torch.Tensor):
        return bool((images <= 1).all()) if images.is_floating_point() else None
    if isinstance(images, np.ndarray):
        return bool((images <= 1).all()) if images.dtype.kind == "f" else None
    return None


def split_array(array) -> list:
    """The images or videos of one array or tensor, which have one scale: floats become uint8 here, where all of them are seen."""
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


def _array_rgb(array, name: str, unit: bool | None = None) -> np.ndarray:
    """uint8 [h, w, 3] of an array or tensor [h, w] or [h, w, 1 | 3 | 4]. `unit`: as for `see_image`."""
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.dtype in (torch.bfloat16, torch.float16) else array).numpy()
    if array.ndim == 2:
        array = array[:, :, None]
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        array = ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    elif array.dtype != np.uint8:
        if array.dtype.kind not in "iuf":
            raise ValueError(f"{name} holds {array.dtype}; expected numbers")
        low, high = array.min(), array.max()
        if not 0 <= low <= high <= 255:
            raise ValueError(f"{name} holds values from {low} to {high}; expected 0..255, or 0..1 as floats")
        if array.dtype.kind == "f":
            array = np.rint(array * 255 if (high <= 1 if unit is None else unit) else array)
        array = array.astype(np.uint8)
    if array.shape[2] == 4:
        opaque = Image.fromarray(np.ascontiguousarray(array))
        return np.array(Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque).convert("RGB"))
    if array.shape[2] == 1:
        array = np.repeat(array, 3, axis=2)
    return array


# the pixels


def fit_size(height: int, width: int, factor: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """(h, w), multiples of `factor` near the given ones, within the pixel limits (processing.md, section 3)."""
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        return shrink(height, width, factor, math.sqrt(height * width / max_pixels))
    if h * w < min_pixels:
        return grow(height, width, factor, math.sqrt(min_pixels / (height * width)))
    return h, w


def shrink(height: int, width: int, factor: int, beta: float) -> tuple[int, int]:
    """Both sides divided by `beta` and rounded down to a multiple of `factor`, at least one."""
    return (
        max(factor, math.floor(height / beta / factor) * factor),
        max(factor, math.floor(width / beta / factor) * factor),
    )


def grow(height: int, width: int, factor: int, beta: float) -> tuple[int, int]:
    """Both sides times `beta`, rounded up to a multiple of `factor`."""
    return math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor


def resize_uint8(frame, height: int, width: int) -> torch.Tensor:
    """uint8 [h, w, 3] array or tensor -> uint8 [3, height, width], antialiased bicubic (a = -0.5) in fixed point."""
    if isinstance(frame, np.ndarray):
        frame = torch.from_numpy(frame if frame.flags.writeable and min(frame.strides) >= 0 else frame.copy())
    frame = frame.permute(2, 0, 1)  # channels last in memory, as the kernel likes it
    if frame.shape[1:] == (height, width):
        return frame
    return torch.nn.functional.interpolate(frame[None], size=(height, width), mode="bicubic", antialias=True)[0]


def in_threads(threads: int, function, *columns) -> list:
    """`list(map(function, *columns))` on so many threads."""
    rows = list(zip(*columns, strict=True))
    if threads == 1 or len(rows) < 2:
        return [function(*row) for row in rows]
    inference = torch.is_inference_mode_enabled()  # threads do not inherit it, and write into tensors made here

    def run(row):
        with torch.inference_mode(inference):
            return function(*row)

    with ThreadPoolExecutor(min(threads, len(rows))) as pool:
        futures = [pool.submit(run, row) for row in rows]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()


def wants_levels(do_normalize) -> bool:
    """Whether a call asks for levels as they are, which the model normalises on its own device."""
    if do_normalize not in (None, True, False):
        raise ValueError(f"do_normalize must be True or False, got {do_normalize!r}")
    return do_normalize is False


def to_format(x, return_tensors):
    """A tensor itself for "pt" or None, the numpy array that shares its memory for "np"; what is no tensor as it is."""
    return x.numpy() if check_return_tensors(return_tensors) == "np" and isinstance(x, torch.Tensor) else x


def check_return_tensors(return_tensors):
    kind = getattr(return_tensors, "value", return_tensors)
    if kind not in (None, "pt", "np"):
        raise ValueError(f"return_tensors must be 'pt', 'np' or None, got {return_tensors!r}")
    return kind


# the processor


PASSED_ON = {
    "return_unused_kwargs",
    "use_fast",
    "backend",
    "trust_remote_code",
    "code_revision",
}  # transformers' own keywords of loading
# Those that say where a checkpoint's files are. transformers 4.57 hands them to `from_dict` too, which has no use for them.
HUB_KEYS = {
    "cache_dir",
    "force_download",
    "local_files_only",
    "token",
    "revision",
    "subfolder",
    "proxies",
    "resume_download",
    "use_auth_token",
    "_from_auto",
    "_from_pipeline",
}
SERVICE_KEYS = {
    "auto_map",
    "image_processor_type",
    "video_processor_type",
    "processor_class",
    "feature_extractor_type",
}


def fixed_size(knobs: dict, factor: int, what: str) -> tuple[int, int] | None:
    """(h, w) of `resized_height` and `resized_width`, rounded to multiples of `factor`, at least one; None where neither is given.

    ValueError where one is missing, or where limits beside them would be of no effect.
    """
    given = {name: positive_int(name, knobs[name]) for name in FIXED_SIZE if name in knobs}
    if not given:
        return None
    if len(given) == 1:
        raise ValueError(f"{what}: resized_height and resized_width make a size together; got {given} alone")
    if limits := [name for name in ("min_pixels", "max_pixels", "size") if name in knobs]:
        raise ValueError(
            f"{what}: a fixed size of {given} leaves {', '.join(limits)} without effect; give one or the other"
        )
    height, width = (max(factor, round(side / factor) * factor) for side in given.values())
    if height * width > MAX_SOURCE_PIXELS:
        raise ValueError(f"{what}: a fixed size of {given} is over the limit of {MAX_SOURCE_PIXELS} pixels")
    check_aspect(height, width, f"{what}: the fixed size")
    return height, width


def settings_only(knobs: dict, stored, what: str) -> None:
    """ValueError for an option among `knobs` that belongs to a call and is no setting of a processor."""
    for name, value in knobs.items():
        if value is not None and name not in stored:
            raise ValueError(f"{what}: {name} is an option of a call, not a setting; pass it to the call")


def size_edge(edge: str) -> property:
    """The attribute `min_pixels` or `max_pixels` of a processor: a limit of its `size` by another name. Setting it leaves dicts alone that
    others hold."""

    def get(processor) -> int:
        return processor.size[edge]

    def put(processor, value):
        processor.size = {**processor.size, edge: positive_int(edge, value)}

    return property(get, put)


@dataclass(frozen=True)
class ImageKnobs:
    min_pixels: int
    max_pixels: int
    multi_image_max_pixels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    fixed: tuple[int, int] | None
    allow_http: bool


class MossVLImageProcessor(BaseImageProcessor):
    """Images of one sample -> patches.

    The options of a call are those of options.py that images take. Args (each also per call):
        size: {"shortest_edge", "longest_edge"}, the least and most *pixels* of a resized image. Other names per call:
            `min_pixels` or `shortest_edge`, `max_pixels` or `longest_edge`.
        multi_image_max_pixels: most pixels of all images of a sample, shared in proportion to their areas.
        patch_size, temporal_patch_size, merge_size: of the model; sides become multiples of patch_size * merge_size.
        image_mean, image_std: three numbers each, for levels in 0..1.
        allow_http: True allows downloads from http(s) URLs. It is not saved, and a file that says so has no effect.
    """

    _auto_class = "AutoImageProcessor"  # save_pretrained takes the code along
    model_input_names = ["pixel_values", "image_grid_thw"]
    knobs = names_of("image")
    stored = names_of("image", stored=True)
    settings = (*stored, *names_of("image", trusted=True))

    def __init__(
        self,
        size=None,
        multi_image_max_pixels=201326592,
        patch_size=16,
        temporal_patch_size=1,
        merge_size=2,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        min_pixels=None,
        max_pixels=None,
        shortest_edge=None,
        longest_edge=None,
        allow_http=None,
        **kwargs,
    ):
        who = type(self).__name__
        kwargs = drop_fixed(kwargs, who)
        settings_only({name: value for name, value in kwargs.items() if name in self.knobs}, self.settings, who)
        given = [
            name for name, value in kwargs.items() if value is not None
        ]  # transformers writes nulls for what it does not use
        reject_unknown([name for name in given if name not in SERVICE_KEYS and name[:1] != "_"], self.settings, who)
        super().__init__(**kwargs)
        low, high = pixel_limits(DEFAULT_SIZE, size, min_pixels, max_pixels, shortest_edge, longest_edge)
        self.size = {"shortest_edge": low, "longest_edge": high}
        self.multi_image_max_pixels = multi_image_max_pixels
        self.patch_size = patch_size
        self.temporal_patch_size = temporal_patch_size
        self.merge_size = merge_size
        self.image_mean = list(three_floats("image_mean", image_mean))
        self.image_std = list(three_floats("image_std", image_std))
        self.allow_http = flag("allow_http", allow_http)
        self.resolve({})

    @classmethod
    def from_dict(cls, image_processor_dict, **kwargs):
        """Knobs among the keyword arguments take the place of the file's; a key of the file that means nothing here is left out."""
        kwargs, knobs = split_keywords(kwargs, cls)
        return super().from_dict(with_knobs(known_settings(image_processor_dict, cls), knobs), **kwargs)

    def to_dict(self):
        return {name: value for name, value in super().to_dict().items() if name != "allow_http"}

    min_pixels, max_pixels = size_edge("shortest_edge"), size_edge("longest_edge")

    def resolve(self, knobs: dict, used: bool = True) -> ImageKnobs:
        """What a call works with: its own knobs where given and not None, else the processor's. Raises ValueError.

        `used` is False for a call without images: its limits are not held against those of the processor, which may be meant for videos.
        """
        who = type(self).__name__
        knobs = read_options(drop_fixed(knobs, who), self.knobs, who)

        def pick(name):
            return knobs.get(name, getattr(self, name, None))

        named = {name: knobs.get(name) for name in ("size", "min_pixels", "max_pixels")}
        low, high = pixel_limits(self.size if used else ANY_SIZE, **named)
        counts = {
            name: positive_int(name, pick(name))
            for name in ("multi_image_max_pixels", "patch_size", "temporal_patch_size", "merge_size")
        }
        fixed = fixed_size(knobs, counts["patch_size"] * counts["merge_size"], who)
        colours = {name: three_floats(name, pick(name)) for name in ("image_mean", "image_std")}
        return ImageKnobs(
            low, high, **counts, **colours, fixed=fixed, allow_http=flag("allow_http", pick("allow_http"))
        )

    def check(self, images, **knobs) -> None:
        """Raises ValueError for options of a call, or of one of its images (a list), that are wrong or do not fit. Nothing is opened."""
        self.resolve(knobs)
        for image in images:
            self.resolve(layered(knobs, read_medium("image", image)[1]))

    def see(self, images, **knobs) -> list[SeenImage]:
        """The images of one sample, their sizes and own options checked, nothing decoded: what `extract` also takes. Errors: `see_image`."""
        self.resolve(knobs)

        def look(image):
            if isinstance(image, SeenImage):
                return image
            source, own = read_medium("image", image)
            if source is None:
                keys = " or ".join(SOURCE_KEYS["image"])
                raise ValueError(f"an image given as a dict holds its source under {keys}; got {shorten(image)}")
            use = self.resolve(layered(knobs, own))
            seen = see_image(source, allow_http=use.allow_http)
            return replace(seen, own=own) if own else seen

        return [look(image) for image in flat_images(images)]

    def extract(self, images, **knobs) -> list[tuple[torch.Tensor, list[int]]]:
        """Per image of one sample: levels uint8 [P, 3 * t * p * p], and the grid [1, patch rows, patch columns].

        Options that an image has of its own (see `read_medium`) hold for it alone; the shares of the others stay as they are without them.
        """
        seen = self.see(images, **knobs)
        area = sum(image.height * image.width for image in seen)

        def read(image):
            use = self.resolve(layered(knobs, image.own))
            pixels = image.read()  # [h, w, 3]
            height, width = pixels.shape[:2]
            budget = use.multi_image_max_pixels
            share = budget if "multi_image_max_pixels" in image.own else budget * (height * width / area)
            share = min(max(share, use.min_pixels), use.max_pixels)
            factor = use.patch_size * use.merge_size
            height, width = use.fixed or fit_size(height, width, factor, use.min_pixels, share)
            frame = resize_uint8(pixels, height, width)[None]
            patches = patchify(frame, use.patch_size, use.merge_size, use.temporal_patch_size)
            return patches, [1, height // use.patch_size, width // use.patch_size]

        return in_threads(min(IMAGE_THREADS, torch.get_num_threads()), read, seen)

    def preprocess(self, images, return_tensors=None, do_normalize=None, **knobs) -> BatchFeature:
        """The images of one sample: `pixel_values` float32 [P, 3 * t * p * p] and `image_grid_thw` [images, 3].

        `images`: one image, or a list; an image is what `see_image` takes, or a dict {"image": that, options of its own}. Keyword
        arguments: the options of images (options.py). `return_tensors`: "pt" (also None) or "np". With `do_normalize=False`
        `pixel_values` are levels (uint8), beside their `image_mean` and `image_std`, lists of three numbers for each image.
        """
        check_return_tensors(return_tensors)
        raw = wants_levels(do_normalize)
        use = self.resolve(knobs)
        seen = self.extract(images, **knobs)
        grids = torch.tensor([grid for _, grid in seen])
        parts = [(seen.pop(0)[0], use.image_mean, use.image_std) for _ in range(len(seen))]
        data = {**join_patches(parts, raw), "image_grid_thw": grids}
        return BatchFeature({name: to_format(x, return_tensors) for name, x in data.items()})


class MossVLImageProcessorFast(MossVLImageProcessor):
    """The same under the name that released files use."""

    def to_dict(self):
        """Saved under the other name: transformers 4.57 wants torchvision for one that ends in Fast. `auto_map` keeps this one."""
        return {**super().to_dict(), "image_processor_type": MossVLImageProcessor.__name__}


def flat_images(images) -> list:
    """One image, an array [n, h, w, channels] or lists of images -> a flat list, not empty."""
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        images = split_array(images)
    if not isinstance(images, (list, tuple)):
        images = [images]
    flat = [one for image in images for one in (flat_images(image) if isinstance(image, (list, tuple)) else [image])]
    if not flat:
        raise ValueError("no image given; expected at least one")
    return flat


__all__ = ["MossVLImageProcessor", "MossVLImageProcessorFast"]
