"""Animated GIF, PNG and WebP images as videos, read by Pillow one frame after the other.

Frames have the times of the file; a duration of at most 10 ms counts as 100 ms, as in browsers. Frames are composed as
the file says, and transparency becomes white. Axes: N frames of a video, h rows, w columns.
"""

import contextlib
import threading
from collections.abc import Iterator

import numpy as np
from PIL import Image

from .image_files import open_image
from .image_reading import check_aspect
from .signatures import image_kind, is_animated, read_head
from .threads import check_stop
from .video_files import Video
from .video_packets import DEFAULT_LIMITS, VideoLimits


LEAST_PIXELS = 2**16  # that a frame counts
SHORTEST, REPLACEMENT = 10, 100  # ms: durations up to the first count as the second


def is_animation(source) -> bool:
    """Whether a PIL image, a path or a BytesIO is an animated image. A GIF is one also with one frame."""
    if isinstance(source, Image.Image):
        return is_animated(source) or source.format == "GIF"
    return image_kind(read_head(source)) == "animated"


class AnimatedImage(Video):
    """An animated image. Only one frame is in memory at a time.

    Args:
        source: a path, a BytesIO, or a PIL image; the current frame of the latter is the same afterwards.
        limits: of the canvas, and of all frames together.
    """

    def __init__(self, source, name: str, limits: VideoLimits = DEFAULT_LIMITS):
        self._source, self.name, self._lock = source, name, threading.Lock()
        problems = []
        with self._open() as image:
            width, height = image.size
            check_aspect(height, width, name)
            if width * height > limits.max_animation_canvas:
                raise ValueError(
                    f"{name} is an animation of {width} x {height} pixels, over the limit of "
                    f"{limits.max_animation_canvas}; make it smaller first, or pass a larger max_animation_canvas"
                )
            with self._naming_errors():
                count = getattr(image, "n_frames", 1)
            if count * max(width * height, LEAST_PIXELS) > limits.max_animation_pixels:
                raise ValueError(
                    f"{name} is an animation of {count} frames of {width} x {height} pixels, over the limit of "
                    f"{limits.max_animation_pixels} pixels in all; make it smaller first, or pass a larger "
                    "max_animation_pixels"
                )
            durations = [duration for _, duration in self._walk(image, count, problems)]
        if not durations:
            raise ValueError(f"{name}: no frame of this animation can be decoded: {'; '.join(problems[:1])}")
        ends = np.cumsum(durations) / 1000
        times = np.concatenate([[0.0], ends[:-1]])
        self.given_times = min(durations) != max(durations)  # each frame has its own duration: reported unchanged
        super().__init__(name, times, float(ends[-1]), height, width, problems)

    @contextlib.contextmanager
    def _open(self) -> Iterator[Image.Image]:
        """The image, at any frame."""
        if isinstance(self._source, Image.Image):
            with self._lock:
                with self._naming_errors():
                    position = self._source.tell()
                try:
                    yield self._source
                finally:
                    with contextlib.suppress(Exception):  # the file may be closed by now
                        self._source.seek(position)
            return
        with open_image(self._source, self.name) as image:
            yield image

    @contextlib.contextmanager
    def _naming_errors(self):
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:  # Pillow's readers raise all kinds of errors on damaged files
            raise ValueError(f"{self.name} is not an animation that Pillow can read: {error}") from error

    def _walk(self, image: Image.Image, count: int, problems: list[str]) -> Iterator[tuple[Image.Image, float]]:
        """Yields (image at this frame, its duration in ms) until the end or the first damage."""
        first = 1 if getattr(image, "default_image", False) and count > 1 else 0  # for viewers that do not animate
        for number in range(first, count):
            check_stop()
            try:
                image.seek(number)
                image.load()
                duration = float(image.info.get("duration") or 0)
            except MemoryError:
                raise
            except Exception as error:
                problems.append(f"frame {number - first} of {count - first} cannot be decoded: {error}")
                return
            yield image, duration if SHORTEST < duration < float("inf") else REPLACEMENT

    def chunks(self, wanted, parts):
        return [wanted]  # each frame is drawn over the one before

    def frames(self, wanted, problems, from_start=False):
        wanted_numbers, last = set(wanted), wanted[-1]
        with self._open() as image:
            for number, (frame, _) in enumerate(self._walk(image, getattr(image, "n_frames", 1), problems)):
                if number in wanted_numbers:
                    yield number, number, _on_white(frame)
                if number == last:
                    return


def _on_white(image: Image.Image) -> np.ndarray:
    """uint8 [h, w, 3] of the current frame."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))
