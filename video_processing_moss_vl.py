"""Videos to patches: which frames are taken, how large they get, and the patches of each clip.

A clip is what one `<|video|>` stands for: a whole video or one segment of it. Axes: N frames of a video, n frames of a clip,
h rows, w columns, P patches. Times are in seconds from the first frame that is shown.
"""

import math
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging
from transformers.video_processing_utils import BaseVideoProcessor

from .checks import finite_number, flag, positive_int, positive_number, shorten
from .conversation import SOURCE_KEYS, is_frames, read_medium
from .image_processing_moss_vl import (
    ANY_SIZE,
    DEFAULT_SIZE,
    SERVICE_KEYS,
    check_return_tensors,
    fixed_size,
    grow,
    in_threads,
    known_settings,
    pixel_limits,
    resize_uint8,
    settings_only,
    shrink,
    size_edge,
    split_array,
    split_keywords,
    three_floats,
    to_format,
    wants_levels,
    with_knobs,
)
from .options import drop_fixed, layered, names_of, read_options, reject_unknown
from .patches import join_patches, patchify
from .video_reading import GivenFrames, UntrueKeyframes, Video, is_pair, open_video


logger = logging.get_logger(__name__)

VIDEO_MAX_PIXELS = 201326592  # of all frames of a sample, by default
GROUP = 8  # frames in a row that are encoded together, once all of them are there


# which frames


def frame_count(seconds: float, video_fps: float | None, num_frames: int | None, low: int, high: int) -> int:
    """How many frames are taken of so many seconds: by rate, or as many as `num_frames` says, within low..high."""
    count = num_frames if num_frames is not None else math.ceil(min(seconds * video_fps - 1e-6, high))
    return max(1, min(max(count, low), high))


def sample_indices(total: int, count: int) -> np.ndarray:
    """`count` of `total` frames, the first and the last among them: sorted int64, without duplicates."""
    return np.unique(np.linspace(0, total - 1, count).astype(np.int64))


def share_frames(total: int, lengths: list[float]) -> list[int]:
    """Shares of `total`: one each, the rest in proportion to `lengths`, by largest remainder (the earlier one where equal)."""
    rest, whole = total - len(lengths), sum(lengths)
    exact = [rest * length / whole if whole else rest / len(lengths) for length in lengths]
    shares = [math.floor(x) for x in exact]
    largest = sorted(range(len(lengths)), key=lambda i: shares[i] - exact[i])
    for i in largest[: max(0, rest - sum(shares))]:
        shares[i] += 1
    return [1 + share for share in shares]


def segment_times(segment: tuple[float, ...], count: int, last: float) -> np.ndarray:
    """Seconds at which a segment, [start, end) or [time], is looked at, moved into 0..last."""
    times = np.linspace(*segment, count, endpoint=False) if len(segment) == 2 else np.array(segment)
    return np.clip(times, 0.0, last)


def fit_video_size(height, width, frames, factor, min_pixels, max_pixels, share) -> tuple[int, int]:
    """(h, w) of a clip's frames, multiples of `factor` (processing.md, section 4).

    `min_pixels` and `max_pixels` bound one frame (the former also the clip), `share` all frames of the clip.
    """
    h, w = (round(side / factor) * factor for side in (height, width))
    if h * w > max_pixels:
        h, w = shrink(height, width, factor, math.sqrt(height * width / max_pixels))
    if frames * h * w > share:
        h, w = shrink(height, width, factor, math.sqrt(frames * height * width / share))
    if frames * h * w < min_pixels:
        h, w = grow(height, width, factor, math.sqrt(min_pixels / (frames * height * width)))
    if h * w < min_pixels:
        h, w = grow(height, width, factor, math.sqrt(min_pixels / (height * width)))
    return h, w


def read_segment(segment, name: str) -> tuple[float, ...]:
    """(start, end) or (time,) of what a caller gave; ValueError unless finite numbers with start < end."""
    try:
        times = tuple(float(x) for x in segment)
    except (TypeError, ValueError):
        times = ()
    if len(times) not in (1, 2) or not all(map(math.isfinite, times)):
        raise ValueError(f"{name}: segment {segment!r}; expected [start, end] or [time], in seconds")
    if len(times) == 2 and times[0] >= times[1]:
        raise ValueError(
            f"{name}: segment {segment!r} is {'empty' if times[0] == times[1] else 'reversed'}; expected start < end"
        )
    return times


# what a caller gives


def flat_videos(videos) -> list:
    """The videos of a call as a list: one video, a list of videos, or one video as a list of its frames."""
    if isinstance(videos, (np.ndarray, torch.Tensor)) and videos.ndim == 5:
        return split_array(videos)
    if not isinstance(videos, (list, tuple)) or is_pair(videos):
        return [videos]
    if not videos:
        raise ValueError("no video given; expected at least one")
    return [videos] if is_frames(videos) else list(videos)


def _is_decoded(source) -> bool:
    return isinstance(source, (list, tuple, np.ndarray, torch.Tensor))


def _check_idle(general: Mapping, own: Mapping, name: str) -> None:
    """ValueError where the level that says how many frames are taken says all, and a number or a rate beside it."""
    for level in (own, general):
        idle = [key for key in ("video_fps", "num_frames", "min_frames", "max_frames") if key in level]
        if level.get("do_sample_frames") is False and idle:
            idle = ", ".join(idle)
            raise ValueError(
                f"{name}: do_sample_frames=False takes every frame, and leaves {idle} without effect; give one or the other"
            )
        if {"video_fps", "num_frames", "do_sample_frames"} & level.keys():
            return


def _timing(general: Mapping, own: Mapping, metadata, name: str) -> tuple[dict, Mapping | None]:
    """Options and video_metadata of frames that are decoded already.

    They are shown as video_metadata says, else sample_fps, else at the `fps` of the video itself (or of the call, if nothing is to be
    sampled): the rate at which they were taken. Frames of which such a rate is known are all looked at, unless the same level says how
    many.
    """
    general, own = dict(general), dict(own)
    if metadata is not None and ("sample_fps" in own or "sample_fps" in general):
        raise ValueError("sample_fps and video_metadata both say when decoded frames are shown; give one of them")
    for level in (own, general) if metadata is None else ():
        unsampled = level is own or {**general, **own}.get("do_sample_frames") is False
        rate = level.get("sample_fps")
        if rate is None and unsampled:
            rate = level.pop("video_fps", None)
        if rate is None:
            continue
        metadata = {"fps": positive_number("sample_fps", rate)}
        _check_idle(general, own, name)
        if not {"video_fps", "num_frames", "do_sample_frames"} & level.keys():
            level |= (
                {"video_fps": rate} if {"min_frames", "max_frames"} & level.keys() else {"do_sample_frames": False}
            )
        break
    else:
        _check_idle(general, own, name)
    for level in (own, general):
        level.pop("sample_fps", None)
    return layered(general, own), metadata


def _read_segments(segments, name: str) -> list[tuple[float, ...]]:
    if not isinstance(segments, (list, tuple, np.ndarray)) or len(segments) == 0:
        raise ValueError(
            f"{name}: segments must be a list such as [[0.5, 3.0], [4.2]] (seconds), got {shorten(segments)}"
        )
    return [read_segment(segment, name) for segment in segments]


def _short(source) -> str:
    return shorten(source, 200) if isinstance(source, (str, os.PathLike)) else f"a video in a {type(source).__name__}"


def _check_segments(name: str, duration: float, segments):
    """ValueError for a segment wholly outside a video of so many seconds."""
    for segment in segments:
        start, end = segment[0], segment[-1]
        outside = end < 0 or start > duration
        if outside or (len(segment) == 2 and (end == 0 or start == duration)):
            raise ValueError(f"{name}: segment {list(segment)} lies outside the video, which lasts {duration:g} s")


def _per_video(metadata, count: int) -> list:
    """One entry (or None) per video."""
    if metadata is None:
        return [None] * count
    entries = [metadata] if isinstance(metadata, Mapping) else list(metadata)
    if len(entries) != count:
        raise ValueError(f"video_metadata has {len(entries)} entries for {count} videos")
    return entries


# the clips


class ClipMetadata(dict):
    """Read as keys or as attributes: total_num_frames (of the clip), fps and duration (of the video), width, height,
    frames_indices (None for a segment), actual_timestamps (seconds, None where frames_indices / fps says them)."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass(frozen=True, eq=False)
class ClipPlan:
    """A clip of which no frame is read yet."""

    video: Video
    indices: np.ndarray  # int64 [n]: the video's frame for each of the clip's
    times: np.ndarray | None  # float64 [n]: of a segment, the seconds that are asked for
    height: int  # after the resize
    width: int
    knobs: "VideoKnobs"


@dataclass(frozen=True, eq=False)
class Clip:
    patches: torch.Tensor | None  # uint8 [P, 3 * p * p]; None where they are encoded
    grid: list[int]  # frames, patch rows, patch columns
    timestamps: list[float]  # seconds
    metadata: ClipMetadata
    features: torch.Tensor | None = None  # [P / m^2, D], where an encoder was given


@dataclass(frozen=True)
class VideoKnobs:
    min_pixels: int
    max_pixels: int
    video_max_pixels: int
    patch_size: int
    merge_size: int
    video_fps: float | None
    num_frames: int | None
    every: bool  # all frames are taken
    fixed: tuple[int, int] | None  # (h, w) after the resize
    min_frames: int
    max_frames: int
    num_extract_threads: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    video_backend: str | None
    allow_http: bool


@dataclass(frozen=True, eq=False)
class _Asked:
    """One video of a call, before it is opened, with all that holds for it."""

    source: object
    knobs: VideoKnobs
    given: list[tuple[float, ...]] | None  # its segments
    span: list[float | None]  # video_start, video_end
    metadata: Mapping | None  # when decoded frames are shown
    own: Mapping  # the options of this video alone
    untold: bool  # True if nobody says how many of its decoded frames are taken

    def segments(self, duration: float) -> list[tuple[float, ...]] | None:
        """Its segments in a video of so many seconds. `video_start` and `video_end` are moved into it, as qwen-vl-utils does; of a segment
        the times of its frames are."""
        if self.span == [None, None]:
            return self.given
        start, end = self.span
        start, end = 0.0 if start is None else start, duration if end is None else end
        return [(max(start, 0.0), min(end, duration)) if start < duration and end > 0 else (start, end)]

    def size(self, video: Video, frames: int, share: float) -> tuple[int, int]:
        """(h, w) of the frames of a clip, of which so many pixels are its share."""
        use = self.knobs
        low = math.prod(use.fixed) if use.fixed else use.min_pixels
        if (use.every or use.fixed) and frames * low > use.video_max_pixels:
            raise ValueError(
                f"{video.name}: {frames} frames of {'' if use.fixed else 'at least '}{low} pixels are over video_max_pixels "
                f"{use.video_max_pixels}; take fewer frames, make them smaller, or raise video_max_pixels"
            )
        if use.fixed:
            return use.fixed
        factor = use.patch_size * use.merge_size
        return fit_video_size(video.height, video.width, frames, factor, use.min_pixels, use.max_pixels, share)


def _every_frame(video: Video, segment) -> tuple[np.ndarray, np.ndarray | None]:
    """All frames of a video, or all that are on screen in a segment: their numbers, and for a segment the seconds of each."""
    if segment is None:
        return np.arange(len(video.times)), None
    start, end = max(0.0, segment[0]), segment[-1]
    first = int(video.shown_at(np.array([start]))[0])
    last = max(first + 1, int(np.searchsorted(video.times, end))) if len(segment) == 2 else first + 1
    indices = np.arange(first, last)
    return indices, np.clip(video.times[indices], start, None)


class _Assembly:
    """The patches of a clip while its frames come in, in any order and from several threads.

    With an `encoder` (see `MossVLVideoProcessor.extract`) groups of frames that are there go on `ready`, as (assembly, frames), for
    `encode`. Attention never leaves a frame, so their order does not matter.
    """

    def __init__(self, plan: ClipPlan, encoder: Callable | None = None, ready: SimpleQueue | None = None):
        self.plan, self.encoder, self.ready = plan, encoder, ready
        p = plan.knobs.patch_size
        self.grid = plan.height // p, plan.width // p
        self.patches = torch.empty(len(plan.indices), math.prod(self.grid), 3 * p * p, dtype=torch.uint8)
        self.shown = np.full(len(plan.indices), -1)
        self.features, self.encoded = None, np.zeros(len(plan.indices), bool)
        self._lock = threading.Lock()

    def put(self, slots: list[int], shown: int, image: np.ndarray):
        plan = self.plan
        frame = resize_uint8(image, plan.height, plan.width)[None]
        first = patchify(frame, plan.knobs.patch_size, plan.knobs.merge_size, out=self.patches[slots[0]])
        for slot in slots[1:]:
            self.patches[slot] = first
        with self._lock:
            self.shown[slots] = shown
            for group in {slot // GROUP for slot in slots} if self.ready is not None else ():
                frames = slice(group * GROUP, (group + 1) * GROUP)
                if (self.shown[frames] >= 0).all():
                    self.ready.put((self, frames))

    def encode(self, frames: slice):
        levels, knobs = self.patches[frames], self.plan.knobs
        features = self.encoder(levels.flatten(0, 1), [[len(levels), *self.grid]], knobs.image_mean, knobs.image_std)
        features = features.unflatten(0, (len(levels), -1))  # [frames, tokens, D]
        if self.features is None:
            self.features = features.new_empty(len(self.patches), *features.shape[1:])
        self.features[frames] = features
        self.encoded[frames] = True

    def forget(self):
        self.shown[:], self.encoded[:] = -1, False

    def finish(self) -> Clip | None:
        """The clip; None where no frame came."""
        plan, video = self.plan, self.plan.video
        keep = self.shown >= 0
        if plan.times is None:  # a frame that stood in for the next ones is there once
            keep &= np.concatenate([[True], self.shown[1:] > np.maximum.accumulate(self.shown)[:-1]])
        if not keep.any():
            return None
        indices, real = self.shown[keep], video.real_times()
        if plan.times is not None:
            timestamps = plan.times[keep]
        else:
            timestamps = indices / video.rate if real is None else real[indices]
        metadata = ClipMetadata(
            total_num_frames=len(indices),
            fps=video.rate,
            duration=video.duration,
            width=video.width,
            height=video.height,
            frames_indices=indices.tolist() if plan.times is None else None,
            actual_timestamps=timestamps.tolist() if plan.times is not None or real is not None else None,
        )
        if self.encoder is not None:
            for at in np.flatnonzero(keep & ~self.encoded).tolist():
                self.encode(slice(at, at + 1))
        rows = self.patches if self.encoder is None else self.features
        rows = (rows if keep.all() else rows[torch.from_numpy(keep).to(rows.device)]).flatten(0, 1)
        patches, features = (rows, None) if self.encoder is None else (None, rows)
        return Clip(patches, [len(indices), *self.grid], timestamps.tolist(), metadata, features)


def _encode_meanwhile(work: Callable, ready: SimpleQueue, stop: threading.Event):
    """`work()`, on another thread; what it puts on `ready` is encoded here as it comes in. `stop` is set where that fails."""
    inference = torch.is_inference_mode_enabled()  # the thread does not inherit it

    def run():
        try:
            with torch.inference_mode(inference):
                return work()
        finally:
            ready.put(None)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run)
        try:
            while (item := ready.get()) is not None:
                assembly, frames = item
                assembly.encode(frames)
        except BaseException:
            stop.set()
            raise
        return future.result()


def _report(video: Video, problems: list[str], clips: list[tuple[int, Clip | None]]):
    """One warning for a damaged video; ValueError where nothing of a clip can be decoded. `clips`: (frames asked for, clip)."""
    for asked, clip in clips:
        if clip is None:
            reason = problems[0] if problems else "the decoder gives nothing for them"
            raise ValueError(f"{video.name}: none of the {asked} frames asked for can be decoded: {reason}")
    asked, had = sum(asked for asked, _ in clips), sum(clip.grid[0] for _, clip in clips)
    if problems or had < asked:
        reason = f" ({problems[0]})" if problems else ""
        logger.warning(f"{video.name} is damaged{reason}: {had} of the {asked} frames asked for could be had")


# the processor


class MossVLVideoProcessor(BaseVideoProcessor):
    """Videos of one sample -> clips of patches.

    The options of a call are those of options.py that videos take. Args (each also per call):
        size: {"shortest_edge", "longest_edge"}, the least and most *pixels* of a resized frame. Other names:
            `min_pixels` or `shortest_edge`, `max_pixels` or `longest_edge`.
        video_max_pixels: most pixels of all frames of a sample, shared in proportion to frames * height * width.
        video_fps, num_frames: frames a second, or how many frames; not both.
        min_frames, max_frames: of a video; `max_frames` is shared by the clips of a sample.
        num_extract_threads: threads that read and resize frames.
        video_backend: "pyav" or "decord"; None takes PyAV, or decord where that alone is installed.
        patch_size, temporal_patch_size (1), merge_size: of the model; sides become multiples of patch_size * merge_size.
        image_mean, image_std: three numbers each, for levels in 0..1.
        allow_http: True allows downloads from http(s) URLs. It is not saved, and a file that says so has no effect.
    """

    _auto_class = "AutoVideoProcessor"  # save_pretrained takes the code along
    model_input_names = ["pixel_values_videos", "video_grid_thw"]
    knobs = names_of("video")
    stored = names_of("video", stored=True)
    settings = (*stored, *names_of("video", trusted=True))

    def __init__(
        self,
        size=None,
        video_max_pixels=None,
        patch_size=16,
        temporal_patch_size=1,
        merge_size=2,
        video_fps=None,
        num_frames=None,
        min_frames=1,
        max_frames=256,
        num_extract_threads=None,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        video_backend=None,
        min_pixels=None,
        max_pixels=None,
        allow_http=None,
        **kwargs,
    ):
        who = type(self).__name__
        kwargs = drop_fixed(kwargs, who)
        others = {name: kwargs.pop(name) for name in list(kwargs) if name in self.knobs}
        settings_only(others, self.settings, who)
        reject_unknown([name for name in kwargs if name not in SERVICE_KEYS and name[:1] != "_"], self.settings, who)
        BaseImageProcessor.__init__(self, **kwargs)  # past the bases in between, which set the knobs of other models
        named = {
            "video_max_pixels": video_max_pixels,
            "video_fps": video_fps,
            "num_frames": num_frames,
            "video_backend": video_backend,
        }
        named |= {"num_extract_threads": num_extract_threads, "min_pixels": min_pixels, "max_pixels": max_pixels}
        named = read_options({**named, **others}, self.settings, who)
        low, high = pixel_limits(DEFAULT_SIZE, size, named.get("min_pixels"), named.get("max_pixels"))
        video_fps, num_frames = named.get("video_fps"), named.get("num_frames")
        self.size = {"shortest_edge": low, "longest_edge": high}
        self.video_max_pixels = named.get("video_max_pixels", VIDEO_MAX_PIXELS)
        self.patch_size = patch_size
        self.temporal_patch_size = temporal_patch_size
        self.merge_size = merge_size
        self.video_fps = 1.0 if video_fps is None and num_frames is None else video_fps
        self.num_frames = num_frames
        self.min_frames = min_frames
        self.max_frames = max_frames
        self.num_extract_threads = named.get("num_extract_threads", 4)
        self.image_mean = list(three_floats("image_mean", image_mean))
        self.image_std = list(three_floats("image_std", image_std))
        self.video_backend = named.get("video_backend")
        self.allow_http = flag("allow_http", allow_http)
        self.resolve({})

    @classmethod
    def from_dict(cls, video_processor_dict, **kwargs):
        """Knobs among the keyword arguments take the place of the file's; a key of the file that means nothing here is left out."""
        kwargs, knobs = split_keywords(kwargs, cls)
        settings = known_settings(video_processor_dict, cls)
        if knobs.keys() & {"num_frames", "video_fps"}:
            settings.update(num_frames=None, video_fps=None)
        return super().from_dict(with_knobs(settings, knobs), **kwargs)

    def to_dict(self):
        return {name: value for name, value in super().to_dict().items() if name != "allow_http"}

    min_pixels, max_pixels = size_edge("shortest_edge"), size_edge("longest_edge")

    def resolve(self, knobs: dict, used: bool = True) -> VideoKnobs:
        """What a call works with: its own knobs where given and not None, else the processor's. Raises ValueError.

        `used` is False for a call without videos: what images take as well is not held against the settings of the processor.
        """
        who = type(self).__name__
        knobs = read_options(drop_fixed(knobs, who), self.knobs, who)

        def pick(name):
            return knobs.get(name, getattr(self, name, None))

        named = {name: knobs.get(name) for name in ("size", "min_pixels", "max_pixels")}
        low, high = pixel_limits(self.size if used else ANY_SIZE, **named)
        whole = ("video_max_pixels", "patch_size", "merge_size", "min_frames", "max_frames")
        counts = {name: positive_int(name, pick(name)) for name in whole}
        if positive_int("temporal_patch_size", pick("temporal_patch_size")) != 1 and used:
            raise ValueError(
                f"temporal_patch_size must be 1, got {pick('temporal_patch_size')!r}: every frame has a time of its own"
            )
        if counts["min_frames"] > counts["max_frames"]:
            raise ValueError(f"min_frames {counts['min_frames']} is above max_frames {counts['max_frames']}")
        if used and counts["video_max_pixels"] < low:
            raise ValueError(
                f"video_max_pixels {counts['video_max_pixels']} does not hold one frame of shortest_edge {low} pixels"
            )

        rate, number = knobs.get("video_fps"), knobs.get("num_frames")
        every = not flag("do_sample_frames", knobs.get("do_sample_frames", True))
        if "segments" in knobs:
            raise ValueError(
                "segments belong to one video; give that as {'video_path': ..., 'segments': [[start, end], [time], ...]}"
            )
        if rate is None and number is None:
            rate, number = self.video_fps, self.num_frames
        if rate is not None and number is not None:
            raise ValueError(
                f"video_fps {rate!r} and num_frames {number!r} both say how many frames to take; give one of them"
            )
        rate = None if rate is None else positive_number("video_fps", rate)
        number = None if number is None else positive_int("num_frames", number)
        if number is not None and not counts["min_frames"] <= number <= counts["max_frames"]:
            raise ValueError(
                f"num_frames {number} lies outside min_frames {counts['min_frames']} to max_frames {counts['max_frames']}"
            )

        backend = pick("video_backend")
        if backend not in (None, "pyav", "decord"):
            raise ValueError(f"video_backend must be 'pyav' or 'decord', got {backend!r}")
        return VideoKnobs(
            low,
            high,
            **counts,
            video_fps=rate,
            num_frames=number,
            every=every,
            fixed=fixed_size(knobs, counts["patch_size"] * counts["merge_size"], who),
            num_extract_threads=positive_int("num_extract_threads", pick("num_extract_threads")),
            **{name: three_floats(name, pick(name)) for name in ("image_mean", "image_std")},
            video_backend=backend,
            allow_http=flag("allow_http", pick("allow_http")),
        )

    def plan(self, videos, video_metadata=None, **knobs) -> list[ClipPlan]:
        """The clips of one sample: which frames, which size. Reads each file's index and decodes no more than its first frame.

        `videos`: one video or a list; a video is what `open_video` takes, or {"video_path": that, "segments": [[start, end], [time],
        ...], options of its own} with one clip a segment. `video_metadata`: for decoded frames, a mapping or one (or None) per video.
        `video_fps` may be a list, one a video. A video's own options hold for it alone; a budget of its own (`max_frames`,
        `video_max_pixels`) leaves the shares of the others as they are without it.

        Raises ValueError, FileNotFoundError for anything that is wrong with the videos, their segments or the knobs.
        """
        asked, use = self._ask_all(videos, video_metadata, knobs)
        names = ["the video" if len(asked) == 1 else f"video {i}" for i in range(len(asked))]

        def look(one, name):
            return open_video(
                one.source, one.metadata, name=name, backend=use.video_backend, allow_http=use.allow_http
            )

        opened = in_threads(use.num_extract_threads, look, asked, names)

        clips = []  # (its index in `asked`, video, segment or None)
        for index, (one, video) in enumerate(zip(asked, opened, strict=True)):
            segments = one.segments(video.duration) or ()
            _check_segments(video.name, video.duration, segments)
            beyond = [list(segment) for segment in segments if segment[0] < 0 or segment[-1] > video.duration]
            if beyond:
                logger.warning(f"{video.name} lasts {video.duration:g} s; the times of {beyond} are moved into it")
            clips += [(index, video, segment) for segment in segments or [None]]
        lengths = [video.duration if part is None else part[-1] - part[0] for _, video, part in clips]
        most = share_frames(max(use.max_frames, len(clips)), lengths)
        least, wish = [], []
        for index, one in enumerate(asked):
            spans = [part[-1] - part[0] if part else 1 for i, _, part in clips if i == index]
            least += share_frames(max(one.knobs.min_frames, len(spans)), spans)
            number = one.knobs.num_frames
            wish += [None] * len(spans) if number is None else share_frames(max(number, len(spans)), spans)
            if "max_frames" in one.own:
                first = len(least) - len(spans)
                most[first : len(least)] = share_frames(one.knobs.max_frames, lengths[first : len(least)])

        chosen = []
        for (index, video, part), length, low, high, number in zip(clips, lengths, least, most, wish, strict=True):
            mine = asked[index].knobs
            if mine.fixed is None:
                high = min(high, mine.video_max_pixels // mine.min_pixels)
            if mine.every:
                chosen.append(_every_frame(video, part))
            elif part is None:
                count = frame_count(length, mine.video_fps, number, low, min(high, len(video.times)))
                chosen.append((sample_indices(len(video.times), count), None))
                if asked[index].untold and count < len(video.times):
                    logger.warning_once(
                        f"{count} of the {len(video.times)} decoded frames are taken, by video_fps or num_frames of the processor; "
                        "pass do_sample_frames=False to take all, or fps= or num_frames= to say how many"
                    )
            else:
                count = frame_count(length, mine.video_fps, number, low, high) if len(part) == 2 else 1
                times = segment_times(part, count, float(video.times[-1]))
                chosen.append((video.shown_at(times), times))
        loads = [
            len(indices) * video.height * video.width
            for (_, video, _), (indices, _) in zip(clips, chosen, strict=True)
        ]
        plans = []
        for (index, video, _), (indices, times), load in zip(clips, chosen, loads, strict=True):
            one = asked[index]
            whole = (
                sum(loads)
                if "video_max_pixels" not in one.own
                else sum(x for (i, _, _), x in zip(clips, loads, strict=True) if i == index)
            )
            size = one.size(video, len(indices), one.knobs.video_max_pixels * (load / whole))
            plans.append(ClipPlan(video, indices, times, *size, one.knobs))
        return plans

    def check(self, videos, video_metadata=None, seconds=None, **knobs) -> None:
        """Raises ValueError for what `plan` refuses and what shows without opening a file: options that are wrong, that do not fit each
        other or the processor's settings, segments outside the video. Arguments: as for `plan`; `seconds`: how long each video lasts, None
        if unknown. Decoded frames say so themselves."""
        asked = self._ask_all(videos, video_metadata, knobs)[0]
        for one, duration in zip(asked, seconds or [None] * len(asked), strict=True):
            name = _short(one.source)
            if _is_decoded(one.source):
                duration = GivenFrames.read_times(one.metadata, len(one.source), name)[1]
            if duration is not None:
                _check_segments(name, duration, one.segments(duration) or ())

    def _ask_all(self, videos, video_metadata, knobs: dict) -> tuple[list["_Asked"], VideoKnobs]:
        """The videos of a call with what holds for each, and what holds for the call. ValueError for options that are wrong."""
        videos = flat_videos(videos)
        knobs = read_options(drop_fixed(knobs, type(self).__name__), self.knobs, type(self).__name__)
        metadata = _per_video(
            knobs.pop("video_metadata", None) if video_metadata is None else video_metadata, len(videos)
        )
        rates = knobs.get("video_fps")
        if isinstance(rates, (list, tuple)):
            if len(rates) != len(videos):
                raise ValueError(
                    f"video_fps has {len(rates)} entries for {len(videos)} videos; give one number, or one a video"
                )
            knobs = {name: value for name, value in knobs.items() if name != "video_fps"}
            each = [{**knobs, **({} if rate is None else {"video_fps": rate})} for rate in rates]
        else:
            each = [knobs] * len(videos)
        use = self.resolve(knobs)
        asked = [self._ask(*one) for one in zip(videos, each, metadata, strict=True)]
        clips = [(one, len(one.given or [None])) for one in asked]
        sharing = sum(count for one, count in clips if "max_frames" not in one.own)
        if sharing > use.max_frames:
            raise ValueError(f"{sharing} clips share max_frames {use.max_frames}; each needs at least one frame")
        for one, count in clips:
            if "max_frames" in one.own and count > one.knobs.max_frames:
                raise ValueError(
                    f"{_short(one.source)}: {count} segments share its max_frames {one.knobs.max_frames}; each needs one"
                )
        return asked, use

    def _ask(self, video, general: dict, metadata) -> "_Asked":
        """A video of a call with all that holds for it. ValueError for options that are wrong, before anything is opened."""
        source, own = read_medium("video", video)
        if is_pair(source):
            if "video_metadata" in own or metadata is not None:
                raise ValueError(
                    "a video given as (frames, metadata) has its metadata, and there is video_metadata; give one of them"
                )
            source, metadata = source
        if source is None:
            raise ValueError(
                f"a video given as a dict holds its source under {' or '.join(SOURCE_KEYS['video'])}; got {shorten(video)}"
            )
        name = _short(source)
        given = own.get("video_metadata", metadata)
        untold = False
        if _is_decoded(source):
            untold = not {"video_fps", "num_frames", "do_sample_frames", "min_frames", "max_frames"} & {*general, *own}
            knobs, given = _timing(general, own, given, name)
        else:
            if "sample_fps" in general or "sample_fps" in own:
                raise ValueError(
                    f"{name}: sample_fps is the rate of a list of frames that were sampled before; for a file give fps"
                )
            _check_idle(general, own, name)
            knobs = layered(general, own)
        knobs.pop("video_metadata", None)
        segments, span = knobs.pop("segments", None), [knobs.pop(name, None) for name in ("video_start", "video_end")]
        if span != [None, None]:
            if segments is not None:
                raise ValueError(
                    f"{name}: segments and video_start or video_end both say which part is looked at; give one of them"
                )
            span = [
                None if x is None else finite_number(key, x)
                for key, x in zip(("video_start", "video_end"), span, strict=True)
            ]
            if None not in span:
                read_segment(span, name)
        elif segments is not None:
            segments = _read_segments(segments, name)
        return _Asked(source, self.resolve(knobs), segments, span, given, own, untold)

    def extract(self, videos, video_metadata=None, encoder=None, **knobs) -> list[Clip]:
        """The clips of one sample, decoded. `videos` may also be what `plan` gave; else as there.

        Frames are resized as they come; what is kept of each is its patches. Where an `encoder` is given, it is called on this thread
        with frames that are there while others are still decoded, and what it gives is kept: a function of (levels uint8 [P, 3 * p * p],
        grid [[frames, patch rows, patch columns]], mean, std) that returns features [P / m^2, D].
        """
        ready = isinstance(videos, list) and bool(videos) and all(isinstance(x, ClipPlan) for x in videos)
        if ready and (knobs or video_metadata is not None):
            raise ValueError(f"a plan holds its knobs already, got {sorted(knobs) or ['video_metadata']}")
        plans = videos if ready else self.plan(videos, video_metadata, **knobs)
        ready, stop = SimpleQueue() if encoder is not None else None, threading.Event()
        clips = [_Assembly(plan, encoder, ready) for plan in plans]

        uses = {}  # video -> number -> [(clip, its slots)]
        for clip in clips:
            numbers = uses.setdefault(clip.plan.video, {})
            for number in np.unique(clip.plan.indices).tolist():
                slots = np.flatnonzero(clip.plan.indices == number).tolist()
                numbers.setdefault(number, []).append((clip, slots))

        def read(video, numbers, from_start=False):
            problems = []
            try:
                for number, shown, image in video.frames(numbers, problems, from_start):
                    for clip, slots in uses[video][number]:
                        clip.put(slots, shown, image)
                    if stop.is_set():
                        break
            except UntrueKeyframes:
                return None
            return problems

        threads = max(plan.knobs.num_extract_threads for plan in plans)
        jobs = [
            (video, chunk)
            for video in uses
            for chunk in video.chunks(sorted(uses[video]), max(1, threads // len(uses)))
        ]
        found = {video: list(video.problems) for video in uses}
        again = []

        def read_all():
            return in_threads(threads, read, *zip(*jobs, strict=True))

        for (video, _), problems in zip(
            jobs, read_all() if encoder is None else _encode_meanwhile(read_all, ready, stop), strict=True
        ):
            if problems is not None:
                found[video] += problems
            elif video not in again:
                again.append(video)
        for clip in clips:
            if clip.plan.video in again:
                clip.forget()
        for video, problems in zip(
            again, in_threads(threads, lambda video: read(video, sorted(uses[video]), True), again), strict=True
        ):
            found[video] = video.problems + problems

        done = [clip.finish() for clip in clips]
        for video, problems in found.items():
            _report(
                video,
                problems,
                [(len(plan.indices), clip) for plan, clip in zip(plans, done, strict=True) if plan.video is video],
            )
        return done

    def preprocess(
        self,
        videos,
        video_metadata=None,
        return_metadata=False,
        return_tensors=None,
        do_normalize=None,
        **knobs,
    ) -> BatchFeature:
        """The videos of one sample: `pixel_values_videos` float32 [P, 3 * p * p], `video_grid_thw` [clips, 3], and with
        `return_metadata` the list `video_metadata` of `ClipMetadata`.

        `videos`, `video_metadata`: as for `plan`. Other keyword arguments: the options of videos (options.py).
        `return_tensors`: "pt" (also None) or "np". With `do_normalize=False` `pixel_values_videos` are levels (uint8), beside their
        `image_mean` and `image_std`, lists of three numbers for each clip.
        """
        check_return_tensors(return_tensors)
        raw = wants_levels(do_normalize)
        colours = self.resolve({name: value for name, value in knobs.items() if name in ("image_mean", "image_std")})
        clips = self.extract(videos, video_metadata, **knobs)
        data = join_patches([(clip.patches, colours.image_mean, colours.image_std) for clip in clips], raw)
        data = {
            "pixel_values_videos": data.pop("pixel_values"),
            "video_grid_thw": torch.tensor([clip.grid for clip in clips]),
            **data,
        }
        out = BatchFeature({name: to_format(x, return_tensors) for name, x in data.items()})
        if return_metadata:
            out["video_metadata"] = [clip.metadata for clip in clips]
        return out


__all__ = ["MossVLVideoProcessor"]
