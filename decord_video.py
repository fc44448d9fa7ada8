"""Video files that decord reads. Only files that PyAV recognised, and that decord gets right, are given to it.

Axes: N frames of a video, h rows, w columns.
"""

import io
import os

import numpy as np
from transformers.utils import logging

from .threads import check_stop
from .video_files import PyAVVideo, Video
from .video_packets import DEFAULT_LIMITS, VideoLimits


logger = logging.get_logger(__name__)

TOLERANCE = 2e-3  # seconds between the times of PyAV and of decord


def open_decord(file: str | io.BytesIO, name: str, limits: VideoLimits = DEFAULT_LIMITS) -> Video:
    """The video read with decord, or with PyAV and one warning if decord would get it wrong.

    decord cannot be limited to formats of FFmpeg, so that PyAV has to recognise the file first. It also gives the
    times.
    """
    video = PyAVVideo(file, name, limits)
    reason = video.needs_pyav()
    if reason is None:
        try:
            return DecordVideo(file, video)
        except ValueError as error:
            reason = str(error)
    logger.warning(f"{name} is read with PyAV instead of decord: {reason}")
    return video


class DecordVideo(Video):
    """A file that decord reads, with the times that PyAV found.

    decord does not tell damage that its FFmpeg conceals: frames of a damaged file may differ from those of PyAV
    without a warning.
    """

    def __init__(self, file: str | io.BytesIO, video: PyAVVideo):
        import decord

        self._decord, self._file, self.name = decord, file, video.name
        try:
            reader = self._open()
            total, size = len(reader), reader[0].shape[:2]
            keys = set(reader.get_key_indices())
            starts = np.array(reader.get_frame_timestamp(range(total)), np.float64)[:, 0]
        except Exception as error:  # DECORDError is not a RuntimeError; both occur
            raise ValueError(f"decord cannot read it ({_last_line(error)})") from error
        if total != len(video.times) or np.abs(starts - starts[0] - video.times).max() > TOLERANCE:
            raise ValueError(f"decord finds {total} frames at other times than its {len(video.times)} packets have")
        if not keys <= video.key_numbers():
            raise ValueError("decord takes frames for keyframes that are none")
        if size != (video.height, video.width):
            raise ValueError(f"decord shows frames of {size[1]} x {size[0]} instead of {video.width} x {video.height}")
        super().__init__(video.name, video.times, video.duration, video.height, video.width)

    def _open(self):
        # An absolute path names no protocol of FFmpeg.
        file = os.path.abspath(self._file) if isinstance(self._file, str) else io.BytesIO(self._file.getvalue())
        return self._decord.VideoReader(file, num_threads=1)  # VP9 fails with more than 2; each thread opens a reader

    def chunks(self, wanted, parts):
        return [wanted]

    def frames(self, wanted, problems, from_start=False):
        reader = self._open()
        for number in wanted:
            check_stop()
            try:
                frame = reader[number]
            except Exception as error:
                raise ValueError(f"{self.name}: decord cannot decode frame {number}: {_last_line(error)}") from error
            yield number, number, frame.asnumpy() if hasattr(frame, "asnumpy") else np.asarray(frame)


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
