"""Opening a video: a file, or frames that are already decoded, as a `Video` (video_files.py).

Axes: N frames of a video, h rows, w columns. Times are in seconds from the first frame shown.
"""

import io
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers.utils import logging

from .animations import AnimatedImage, is_animation
from .checks import positive_int, positive_number, shorten
from .decord_video import open_decord
from .image_reading import float_unit, open_source, plain_array, probe_image
from .options import reject_unknown
from .video_files import PyAVVideo, Video
from .video_packets import DEFAULT_LIMITS, VideoLimits


logger = logging.get_logger(__name__)

PYAV = 17, 1  # the oldest version whose side data of packets can be read; those before crash
MAX_VIDEO_BYTES = 2**30  # of one video that is downloaded or inside a data: URL
DOWNLOAD_SECONDS = 300.0
MOST_SECONDS = 1e10  # of a time stamp that a caller gives; 300 years
RATE_LIMITS = 1e-6, 1e6  # frames per second that a caller gives
MOST_NUMBER = 2**53  # of a frame


# decoded frames


METADATA_KEYS = (
    "fps",
    "timestamps",
    "actual_timestamps",
    "frames_indices",
    "total_num_frames",
    "duration",
    "width",
    "height",
    "video_backend",
)


@dataclass(frozen=True, eq=False)
class FrameTimes:
    """When decoded frames are shown."""

    times: np.ndarray  # float64 [N]
    duration: float
    given: bool  # True if the caller gave the times, False if they follow from a rate


class GivenFrames(Video):
    """A list of images, or an array [n, h, w, 3], with the times at which they are shown.

    All frames share one scale of floats: 0..1 if no value of any frame is above 1.
    """

    def __init__(self, frames, metadata: Mapping | None, name: str, **reading):
        if len(frames) == 0:
            raise ValueError(f"{name} has no frames")
        frames = _readable_frames(frames, name)
        self._frames, self._reading = frames, {**reading, "unit": float_unit(frames)}
        first = probe_image(frames[0], what=f"frame 0 of {name}", **self._reading)
        is_array = isinstance(frames, (np.ndarray, torch.Tensor))
        height, width = (first.height, first.width) if is_array else first.read().shape[:2]  # EXIF may turn an image
        shown = read_frame_times(metadata, len(frames), f"{name} ({len(frames)} decoded frames)")
        self.given_times = shown.given
        super().__init__(name, shown.times, shown.duration, height, width)

    def chunks(self, wanted, parts):
        return [chunk.tolist() for chunk in np.array_split(wanted, parts) if len(chunk)]

    def frames(self, wanted, problems, from_start=False):
        for number in wanted:
            image = probe_image(self._frames[number], what=f"frame {number} of {self.name}", **self._reading).read()
            if image.shape[:2] != (self.height, self.width):
                raise ValueError(
                    f"frame {number} of {self.name} is {image.shape[1]} x {image.shape[0]}, frame 0 is {self.width} x "
                    f"{self.height}; the frames of a video have one size"
                )
            yield number, number, image


def _readable_frames(frames, name: str):
    """The frames, with a tensor that cannot be indexed (sparse, quantized, nested) as a plain one."""
    if not isinstance(frames, torch.Tensor):
        return frames
    if frames.is_nested:
        return list(frames.unbind())
    if frames.layout != torch.strided or frames.is_quantized:
        return torch.from_numpy(plain_array(frames, name))
    return frames


def read_frame_times(metadata: Mapping | None, total: int, name: str) -> FrameTimes:
    """The times of `total` decoded frames by their `video_metadata`.

    In this order: `timestamps` (or `actual_timestamps`), `frames_indices` / `fps`, number / `fps`. Raises ValueError
    if the metadata gives no times, or contradicts itself or the number of frames.
    """
    if metadata is not None and not isinstance(metadata, Mapping):
        raise ValueError(
            f"{name}: video_metadata is {shorten(metadata)}; expected a mapping such as {{'fps': 2.0}} or "
            "{'timestamps': [...]}"
        )
    metadata = dict(metadata or {})
    reject_unknown(metadata, METADATA_KEYS, f"video_metadata of {name}")
    metadata = {key: value for key, value in metadata.items() if value is not None}
    fps, duration = (positive_number(key, metadata[key]) if key in metadata else None for key in ("fps", "duration"))
    if fps is not None and not RATE_LIMITS[0] <= fps <= RATE_LIMITS[1]:
        raise ValueError(f"{name}: video_metadata has fps {fps:g}; expected {RATE_LIMITS[0]:g} to {RATE_LIMITS[1]:g}")
    if duration is not None and duration > MOST_SECONDS:
        raise ValueError(
            f"{name}: video_metadata has duration {duration:g}; expected at most {MOST_SECONDS:g} seconds"
        )
    stamps = metadata.get("timestamps", metadata.get("actual_timestamps"))
    has_indices, has_total = "frames_indices" in metadata, "total_num_frames" in metadata
    if isinstance(metadata.get("total_num_frames"), int) and metadata["total_num_frames"] > MOST_NUMBER:
        raise ValueError(f"{name}: video_metadata has a total_num_frames over {MOST_NUMBER}")
    source_total = positive_int("total_num_frames", metadata.get("total_num_frames", total))
    indices = _check_indices(metadata, total, source_total if has_total else None, name)
    if stamps is None and has_indices and fps is not None:
        stamps = indices.astype(np.float64) / fps
        if duration is None and has_total:
            duration = source_total / fps
    if stamps is not None:
        return _times_of_stamps(stamps, total, fps, duration, name)
    if source_total != total and not has_indices:
        raise ValueError(
            f"{name}: video_metadata has total_num_frames {source_total} for {total} frames, without frames_indices; "
            f"expected frames_indices or timestamps, or total_num_frames {total} and the fps at which they were taken"
        )
    return _times_of_rate(total, fps, duration, name)


def _check_indices(metadata: Mapping, total: int, source_total: int | None, name: str) -> np.ndarray:
    """The `frames_indices` [total], by default 0.. `source_total`: how many frames they index, if given."""
    indices = _numbers("frames_indices", metadata.get("frames_indices", range(total)), name)
    if indices.shape != (total,):
        raise ValueError(
            f"{name}: expected {total} frames_indices, one per frame, got {shorten(metadata['frames_indices'])}"
        )
    wrong = ~(np.isfinite(indices) & (indices >= 0) & (indices <= MOST_NUMBER) & (indices == np.rint(indices)))
    if wrong.any():
        raise ValueError(f"{name}: frames_indices hold {indices[wrong][0]:g}; expected whole numbers from 0 on")
    if np.any(np.diff(indices) < 0):
        raise ValueError(f"{name}: frames_indices go down; expected the numbers of the frames in ascending order")
    if source_total is not None and "frames_indices" in metadata and indices.max() >= source_total:
        raise ValueError(
            f"{name}: frames_indices go up to {int(indices.max())}, beyond total_num_frames {source_total}"
        )
    return indices


def _numbers(key: str, values, name: str) -> np.ndarray:
    """float64 array of a list of numbers in `video_metadata`."""
    try:
        return np.asarray(values, np.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError, NotImplementedError):
        raise ValueError(f"{name}: {key} are {shorten(values)}; expected one number per frame") from None


SINGLE = " (one image alone is given as an image, not as a video)"


def _times_of_rate(total: int, fps: float | None, duration: float | None, name: str) -> FrameTimes:
    if fps is None:
        raise ValueError(
            f"{name}: nothing says when they are shown{SINGLE if total == 1 else ''}; pass "
            "video_metadata={'fps': ...} or {'timestamps': [...]}, or give the list as {'video': frames, 'fps': the "
            "rate at which they were taken}"
        )
    if duration is not None and abs(duration - total / fps) > 1 / fps:
        raise ValueError(
            f"{name}: video_metadata has duration {duration:g}, but {total} frames at fps {fps:g} last "
            f"{total / fps:g} s; expected the fps at which these were taken, or frames_indices or timestamps"
        )
    return FrameTimes(np.arange(total) / fps, total / fps, given=False)


def _times_of_stamps(stamps, total: int, fps: float | None, duration: float | None, name: str) -> FrameTimes:
    """Without a `duration` that includes the last stamp, the last frame lasts as long as the average frame."""
    times = _numbers("timestamps", stamps, name)
    if times.shape != (total,):
        got = len(times) if times.ndim == 1 else f"shape {times.shape}"
        raise ValueError(f"{name}: expected {total} timestamps, one per frame, got {got}")
    if not np.isfinite(times).all() or times[0] < 0 or np.any(np.diff(times) < 0):
        index = int(np.flatnonzero(~np.isfinite(times) | (times < 0) | (np.diff(times, prepend=0) < 0))[0])
        before = f" after {times[index - 1]:g}" if index else ""
        raise ValueError(
            f"{name}: timestamp {index} is {times[index]:g}{before}; expected seconds from 0 on that do not go down"
        )
    if times[-1] > MOST_SECONDS:
        raise ValueError(f"{name}: the last timestamp is {times[-1]:g}; expected at most {MOST_SECONDS:g} seconds")
    if duration is None or duration < times[-1]:
        average = float(times[-1] - times[0]) / (total - 1) if total > 1 else 0.0
        duration = float(times[-1]) + (average or 1 / (fps or 1.0))
    return FrameTimes(times, duration, given=True)


# opening


def is_decoded(source) -> bool:
    """Whether a video is given as frames, in a list or array, and not as a file."""
    return isinstance(source, (list, tuple, np.ndarray, torch.Tensor))


def is_pair(x) -> bool:
    """Whether `x` is (decoded frames, metadata), as `load_video` of transformers returns a video."""
    return isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], Mapping) and is_decoded(x[0])


def open_video(
    source,
    metadata: Mapping | None = None,
    *,
    name: str = "video",
    backend: str | None = None,
    allow_http: bool = False,
    allow_private_hosts: bool = False,
    limits: VideoLimits = DEFAULT_LIMITS,
) -> Video:
    """Reads size and times of a video and checks them, decoding at most its first frames.

    Args:
        source: what `open_source` takes, an animated PIL image, or decoded frames: a list of what `load_image` takes,
            or an array or tensor [n, h, w, 3] or [n, 3, h, w].
        metadata: for decoded frames, a mapping with "fps" (frames per second) or "timestamps" (seconds).
        name: what decoded frames are called in messages.
        backend: "pyav" or "decord"; None takes PyAV. decord needs PyAV too, which recognises files for it.
        allow_http: True allows downloads.
        allow_private_hosts: True allows downloads from private addresses too.
        limits: of a file.

    Raises FileNotFoundError; ValueError if the source is not a video, cannot be decoded at all or is over a limit;
    ImportError without PyAV, or without decord if that is asked for.
    """
    if isinstance(source, torch.Tensor) and source.is_nested:
        source = _readable_frames(source, name)
    if isinstance(source, (np.ndarray, torch.Tensor)) and source.ndim != 4:
        raise ValueError(f"{name} is an array of shape {tuple(source.shape)}; expected [frames, height, width, 3]")
    downloads = {"allow_http": allow_http, "allow_private_hosts": allow_private_hosts}
    if is_decoded(source):
        return GivenFrames(source, metadata, name, **downloads, max_source_pixels=limits.max_source_pixels)
    if metadata is not None:
        raise ValueError(
            f"{name} is a file, which holds the times of its frames; video_metadata is for decoded frames"
        )
    if isinstance(source, Image.Image):
        if not is_animation(source):
            raise ValueError(f"{name} is a still PIL image; expected an animated one, or a list of frames")
        name = repr(getattr(source, "filename", "") or f"{name} in a {type(source).__name__}")
        return AnimatedImage(source, name, limits)
    file, name = open_source(
        _path_of_open_file(source),
        what="video",
        **downloads,
        max_bytes=MAX_VIDEO_BYTES,
        timeout=DOWNLOAD_SECONDS,
    )
    if is_animation(file):
        return AnimatedImage(file, name, limits)
    return _file_opener(backend)(file, name, limits)


def _path_of_open_file(source):
    """The path of an open ordinary file, so that it is not read into memory; every other source unchanged."""
    path = getattr(source, "name", None)
    if isinstance(path, str) and hasattr(source, "fileno") and not isinstance(source, io.TextIOBase):
        try:
            source.flush()
            if os.path.isfile(path) and os.path.samestat(os.fstat(source.fileno()), os.stat(path)):
                return path
        except (AttributeError, OSError, ValueError):
            pass
    return source


def _file_opener(backend: str | None) -> Callable[..., Video]:
    """What opens a file for a `video_backend`. Raises ImportError if a package is not installed."""
    if backend not in (None, "pyav", "decord"):
        raise ValueError(f"video_backend must be 'pyav' or 'decord', got {backend!r}")
    try:
        import av
    except ImportError as error:
        raise ImportError("reading a video needs PyAV, with decord too: pip install av") from error
    if tuple(map(int, re.findall(r"\d+", av.__version__)[:2])) < PYAV:
        version = ".".join(map(str, PYAV))
        raise ImportError(f"reading a video needs PyAV {version} or newer, got {av.__version__}: pip install -U av")
    if backend != "decord":
        return PyAVVideo
    try:
        import decord  # noqa: F401
    except ImportError as error:
        raise ImportError("video_backend='decord' needs decord: pip install decord") from error
    return open_decord
