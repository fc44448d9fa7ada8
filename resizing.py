"""Sizes of resized images and frames, the limits that they obey, and the resize.

Axes: h rows, w columns. `factor` is patch size * merge size: sides after the resize are multiples of it.
"""

import math

import numpy as np
import torch

from .checks import positive_int
from .image_reading import MAX_SOURCE_PIXELS, Rows, check_aspect
from .options import FIXED_SIZE, reject_unknown


DEFAULT_SIZE = {"shortest_edge": 4096, "longest_edge": 16777216}  # pixels of an image or frame
WHOLE_PIXELS = 2**26  # images up to this size are resized at once, which is faster
ANY_SIZE = {"shortest_edge": 1, "longest_edge": 2**63}
# The two pixel limits: the key in `size`, and its other name.
EDGES = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
SIZE_NAMES = ("size", *EDGES, *EDGES.values())


# limits


def pixel_limits(
    default: dict, size=None, min_pixels=None, max_pixels=None, shortest_edge=None, longest_edge=None
) -> tuple[int, int]:
    """(min, max) pixels as given, else as in `default`, a dict {"shortest_edge", "longest_edge"} of pixel counts.

    `min_pixels` and `shortest_edge` are two names of one limit, as are `max_pixels` and `longest_edge`. `size` is a
    dict that may hold either edge. Raises ValueError if two names of a limit disagree or if min > max.
    """
    size = {} if size is None else {name: value for name, value in dict(size).items() if value is not None}
    reject_unknown(size, EDGES, "size")
    by_name = {
        "shortest_edge": {"shortest_edge": shortest_edge, "min_pixels": min_pixels},
        "longest_edge": {"longest_edge": longest_edge, "max_pixels": max_pixels},
    }
    low, high = (
        _one_limit(edge, {f"size[{edge!r}]": size.get(edge), **names}, default) for edge, names in by_name.items()
    )
    if low > high:
        raise ValueError(f"shortest_edge (min_pixels) {low} is above longest_edge (max_pixels) {high}")
    return low, high


def _one_limit(edge: str, values: dict, default: dict) -> int:
    given = {name: positive_int(name, value) for name, value in values.items() if value is not None}
    if len(set(given.values())) > 1:
        raise ValueError(f"these name the same limit and disagree: {given}; give one of them")
    return next(iter(given.values())) if given else positive_int(f"size[{edge!r}]", dict(default)[edge])


def read_fixed_size(options: dict, factor: int, what: str) -> tuple[int, int] | None:
    """(h, w) of `resized_height` and `resized_width`, rounded to multiples of `factor`; None if neither is given.

    Raises ValueError if one of the two is missing, or if pixel limits are given too, which would have no effect.
    """
    given = {name: positive_int(name, options[name]) for name in FIXED_SIZE if name in options}
    if not given:
        return None
    if len(given) == 1:
        raise ValueError(f"{what}: resized_height and resized_width make a size together; got {given} alone")
    if limits := [name for name in ("min_pixels", "max_pixels", "size") if name in options]:
        raise ValueError(
            f"{what}: a fixed size of {given} leaves {', '.join(limits)} without effect; give one or the other"
        )
    height, width = (max(factor, round(side / factor) * factor) for side in given.values())
    if height * width > MAX_SOURCE_PIXELS:
        raise ValueError(f"{what}: a fixed size of {given} is over the limit of {MAX_SOURCE_PIXELS} pixels")
    check_aspect(height, width, f"{what}: the fixed size")
    return height, width


# sizes


def fit_size(height: int, width: int, factor: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """(h, w) of a resized image: multiples of `factor` near the given sides, within the pixel limits.

    The formula is in docs/processing.md, "Sizes of images".
    """
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        return _shrink(height, width, factor, math.sqrt(height * width / max_pixels))
    if h * w < min_pixels:
        return _grow(height, width, factor, math.sqrt(min_pixels / (height * width)))
    return h, w


def fit_video_size(
    height: int, width: int, frames: int, factor: int, min_pixels: float, max_pixels: float, share: float
) -> tuple[int, int]:
    """(h, w) of all resized frames of a clip: multiples of `factor`. The steps are in docs/processing.md, "Sizes of
    frames".

    `min_pixels` limits one frame and the clip, `max_pixels` one frame, `share` the clip.
    """
    h, w = (round(side / factor) * factor for side in (height, width))
    if h * w > max_pixels:
        h, w = _shrink(height, width, factor, math.sqrt(height * width / max_pixels))
    if frames * h * w > share:
        h, w = _shrink(height, width, factor, math.sqrt(frames * height * width / share))
    if frames * h * w < min_pixels:
        h, w = _grow(height, width, factor, math.sqrt(min_pixels / (frames * height * width)))
    if h * w < min_pixels:
        h, w = _grow(height, width, factor, math.sqrt(min_pixels / (height * width)))
    return h, w


def _shrink(height: int, width: int, factor: int, beta: float) -> tuple[int, int]:
    """Both sides divided by `beta` and rounded down to a multiple of `factor`, at least `factor`."""
    return (
        max(factor, math.floor(height / beta / factor) * factor),
        max(factor, math.floor(width / beta / factor) * factor),
    )


def _grow(height: int, width: int, factor: int, beta: float) -> tuple[int, int]:
    """Both sides times `beta`, rounded up to a multiple of `factor`."""
    return math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor


# the resize


def resize_uint8(frame: np.ndarray | torch.Tensor, height: int, width: int) -> torch.Tensor:
    """uint8 [h, w, 3] -> uint8 [3, height, width], antialiased bicubic (a = -0.5) in fixed point."""
    if isinstance(frame, np.ndarray):
        frame = torch.from_numpy(frame if frame.flags.writeable and min(frame.strides) >= 0 else frame.copy())
    frame = frame.permute(2, 0, 1)  # channels stay last in memory, for which the kernel is fastest
    if frame.shape[1:] == (height, width):
        return frame
    return torch.nn.functional.interpolate(frame[None], size=(height, width), mode="bicubic", antialias=True)[0]


def resize_rows(rows: Rows, height: int, width: int) -> torch.Tensor:
    """A decoded image -> uint8 [3, height, width], the values of `resize_uint8`.

    `resize_uint8` resizes rows first and columns then, with uint8 between. The rows of a large image are resized strip
    by strip, so that it is never in memory as RGB.
    """
    if rows.width == width or rows.height * rows.width <= WHOLE_PIXELS:
        return resize_uint8(rows.array(), height, width)
    narrow = np.empty((3, rows.height, width), np.uint8)  # numpy copies a strip faster than torch with its threads
    for first, strip in rows.strips():
        narrow[:, first : first + len(strip)] = resize_uint8(strip, len(strip), width).numpy()
    return resize_uint8(torch.from_numpy(narrow).permute(1, 2, 0), height, width)
