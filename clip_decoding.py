"""From clip plans to patches, or to features: decodes the chosen frames in threads, while an encoder works on frames
that are ready.

Axes: n frames of a clip, h rows, w columns, p patch size, m merge size, P patches.
"""

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import torch
from transformers.utils import logging

from .patches import patchify
from .resizing import resize_uint8
from .threads import in_threads, stoppable
from .video_files import UntrueKeyframes, Video
from .video_sampling import ClipPlan


logger = logging.get_logger(__name__)

GROUP_FRAMES = 8  # consecutive frames that are encoded together

# (uint8 pixels [P, 3 * p * p], [[frames, patch rows, patch columns]], mean, std) -> features [P / m^2, D]
Encoder = Callable[[torch.Tensor, list[list[int]], tuple, tuple], torch.Tensor]


class ClipMetadata(dict):
    """Facts about a clip, read as keys or as attributes.

    total_num_frames of the clip; fps, duration, width and height of the video; frames_indices, None for a segment;
    actual_timestamps in seconds, None if they are frames_indices / fps.
    """

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass(frozen=True, eq=False)
class Clip:
    """A decoded clip: either its patches, or the features that an encoder made of them."""

    patches: torch.Tensor | None  # uint8 [P, 3 * p * p]
    grid: list[int]  # frames, patch rows, patch columns
    timestamps: list[float]  # seconds
    metadata: ClipMetadata
    features: torch.Tensor | None = None  # [P / m^2, D]


def decode_clips(plans: list[ClipPlan], encoder: Encoder | None = None) -> list[Clip]:
    """The clips of one sample.

    Each frame is resized as soon as it is decoded, and only its patches are kept. An `encoder` is called on this
    thread, with groups of frames that are ready while other frames are still decoded; the clips then hold features.
    Warns once per damaged video. Raises ValueError if no frame of a clip can be decoded.
    """
    ready, stop = SimpleQueue(), threading.Event()
    builders = [_ClipBuilder(plan, encoder, ready) for plan in plans]
    readers = [
        _VideoReader(video, [builder for builder in builders if builder.plan.video is video], stop)
        for video in dict.fromkeys(plan.video for plan in plans)
    ]
    threads = max(plan.options.num_extract_threads for plan in plans)
    if encoder is None:
        _read_videos(readers, threads)
    else:
        _encode_during(lambda: _read_videos(readers, threads), ready, stop)

    untrue = [reader for reader in readers if reader.untrue_keyframes]
    for reader in untrue:
        reader.forget()
    in_threads(threads, _VideoReader.read_from_start, untrue)

    clips = [builder.finish() for builder in builders]
    for reader in readers:
        _report(reader, [clip for clip, plan in zip(clips, plans, strict=True) if plan.video is reader.video])
    return clips


# decoding


class _VideoReader:
    """Decodes the frames that the clips of one video need. Its methods may run in several threads."""

    def __init__(self, video: Video, builders: list["_ClipBuilder"], stop: threading.Event):
        self.video, self.builders = video, builders
        self.problems, self.untrue_keyframes = list(video.problems), False
        self._stop = stop
        self._targets = {}  # frame number -> [(builder, positions in its clip)]
        for builder in builders:
            indices = builder.plan.indices
            for number in np.unique(indices).tolist():
                positions = np.flatnonzero(indices == number).tolist()
                self._targets.setdefault(number, []).append((builder, positions))

    @property
    def frames_wanted(self) -> int:
        return sum(len(builder.plan.indices) for builder in self.builders)

    def chunks(self, parts: int) -> list[list[int]]:
        """The frame numbers that are needed, in at most `parts` lists that can be read in parallel."""
        return self.video.chunks(sorted(self._targets), parts)

    def read(self, numbers: list[int], from_start: bool = False) -> list[str]:
        """Decodes frames into their clips until `stop` is set. Returns the damage that was found."""
        problems = []
        try:
            for number, shown, image in self.video.frames(numbers, problems, from_start):
                for builder, positions in self._targets[number]:
                    builder.put(positions, shown, image)
                if self._stop.is_set():
                    break
        except UntrueKeyframes:
            self.untrue_keyframes = True
            return []
        return problems

    def forget(self) -> None:
        """Discards what was decoded."""
        self.problems = list(self.video.problems)
        for builder in self.builders:
            builder.forget()

    def read_from_start(self) -> None:
        self.problems += self.read(sorted(self._targets), from_start=True)


def _read_videos(readers: list[_VideoReader], threads: int) -> None:
    parts = max(1, threads // len(readers))
    jobs = [(reader, chunk) for reader in readers for chunk in reader.chunks(parts)]
    found = in_threads(threads, _VideoReader.read, *zip(*jobs, strict=True))
    for (reader, _), problems in zip(jobs, found, strict=True):  # in the order of the file
        reader.problems += problems


def _encode_during(decode: Callable[[], None], ready: SimpleQueue, stop: threading.Event) -> None:
    """Runs `decode` on another thread and encodes the frame groups that it puts on `ready`. An error sets `stop`."""

    def run():
        try:
            decode()
        finally:
            ready.put(None)

    with ThreadPoolExecutor(1) as pool:
        try:
            future = pool.submit(stoppable(run, stop))
            while (group := ready.get()) is not None:
                group.builder.encode(group.frames)
            future.result()
        except BaseException:
            stop.set()
            raise


def _report(reader: _VideoReader, clips: list[Clip | None]) -> None:
    """Warns once of a damaged video. Raises ValueError if a clip has no frame."""
    video, problems = reader.video, reader.problems
    for builder, clip in zip(reader.builders, clips, strict=True):
        if clip is None:
            reason = problems[0] if problems else "the decoder gives nothing for them"
            wanted = len(builder.plan.indices)
            raise ValueError(f"{video.name}: none of the {wanted} frames asked for can be decoded: {reason}")
    wanted, decoded = reader.frames_wanted, sum(clip.grid[0] for clip in clips)
    if problems or decoded < wanted:
        reason = f" ({problems[0]})" if problems else ""
        logger.warning(f"{video.name} is damaged{reason}: {decoded} of the {wanted} frames asked for could be decoded")


# the clip


@dataclass(frozen=True, eq=False)
class _FrameGroup:
    """Consecutive frames of a clip that are ready to be encoded."""

    builder: "_ClipBuilder"
    frames: slice


class _ClipBuilder:
    """Collects the patches of a clip, whose frames come in any order and from several threads.

    With an encoder, each complete group of frames is put on `ready`. Attention in the encoder never crosses frames, so
    that groups may be encoded in any order.
    """

    def __init__(self, plan: ClipPlan, encoder: Encoder | None, ready: SimpleQueue):
        self.plan = plan
        self._encoder, self._ready, self._lock = encoder, ready, threading.Lock()
        n, p = len(plan.indices), plan.options.patch_size
        self._grid = plan.height // p, plan.width // p
        self._patches = torch.empty(n, math.prod(self._grid), 3 * p * p, dtype=torch.uint8)
        self._shown = np.full(n, -1)  # the number of the frame that was decoded; -1: none yet
        self._features, self._encoded = None, np.zeros(n, bool)

    def put(self, positions: list[int], shown: int, image: np.ndarray) -> None:
        """Stores frame `shown` of the video, uint8 [h, w, 3], at these positions of the clip."""
        plan = self.plan
        frame = resize_uint8(image, plan.height, plan.width)[None]
        first, *others = positions
        patchify(frame, plan.options.patch_size, plan.options.merge_size, out=self._patches[first])
        for position in others:
            self._patches[position] = self._patches[first]
        with self._lock:
            self._shown[positions] = shown
            if self._encoder is not None:
                self._queue_groups(positions)

    def _queue_groups(self, positions: list[int]) -> None:
        for group in {position // GROUP_FRAMES for position in positions}:
            frames = slice(group * GROUP_FRAMES, (group + 1) * GROUP_FRAMES)
            if (self._shown[frames] >= 0).all():
                self._ready.put(_FrameGroup(self, frames))

    def encode(self, frames: slice) -> None:
        pixels, options = self._patches[frames], self.plan.options
        grid = [[len(pixels), *self._grid]]
        features = self._encoder(pixels.flatten(0, 1), grid, options.image_mean, options.image_std)
        features = features.unflatten(0, (len(pixels), -1))  # [frames, tokens, D]
        if self._features is None:
            self._features = features.new_empty(len(self._patches), *features.shape[1:])
        self._features[frames] = features
        self._encoded[frames] = True

    def forget(self) -> None:
        self._shown[:], self._encoded[:] = -1, False

    def finish(self) -> Clip | None:
        """The clip; None if no frame was decoded."""
        used = self._used_frames()
        if not used.any():
            return None
        timestamps, metadata = self._describe(used)
        grid = [int(used.sum()), *self._grid]
        if self._encoder is None:
            return Clip(_select(self._patches, used), grid, timestamps, metadata)
        for position in np.flatnonzero(used & ~self._encoded).tolist():
            self.encode(slice(position, position + 1))
        return Clip(None, grid, timestamps, metadata, _select(self._features, used))

    def _used_frames(self) -> np.ndarray:
        """bool [n]. If a frame of a whole video stands in for later ones that cannot be decoded, it is used once."""
        used = self._shown >= 0
        if self.plan.times is None:
            newest = np.maximum.accumulate(self._shown)
            used &= np.concatenate([[True], self._shown[1:] > newest[:-1]])
        return used

    def _describe(self, used: np.ndarray) -> tuple[list[float], ClipMetadata]:
        plan, video, indices = self.plan, self.plan.video, self._shown[used]
        real_times, is_segment = video.real_times(), plan.times is not None
        if is_segment:
            timestamps = plan.times[used]
        else:
            timestamps = indices / video.rate if real_times is None else real_times[indices]
        metadata = ClipMetadata(
            total_num_frames=len(indices),
            fps=video.rate,
            duration=video.duration,
            width=video.width,
            height=video.height,
            frames_indices=None if is_segment else indices.tolist(),
            actual_timestamps=timestamps.tolist() if is_segment or real_times is not None else None,
        )
        return timestamps.tolist(), metadata


def _select(frames: torch.Tensor, used: np.ndarray) -> torch.Tensor:
    """[n, rows, values] -> [rows of the used frames, values]; a view if all are used."""
    if not used.all():
        frames = frames[torch.from_numpy(used).to(frames.device)]
    return frames.flatten(0, 1)
