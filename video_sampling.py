"""Which frames of a video are taken, and how large they become: from the options of each video to the plan of each
clip.

A clip is what one `<|video|>` stands for: a whole video, or one segment of it. A `VideoItem` is a video with its
options, before its file is opened; a `ClipPlan` is a clip whose frames are chosen and not decoded. Axes: N frames of a
video, n frames of a clip. Times are in seconds from the first frame shown. The rules are in docs/processing.md,
"Frames of a video".
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from transformers.utils import logging

from .checks import finite_number, positive_number, shorten
from .conversation import SOURCE_KEYS, read_medium
from .options import layered
from .resizing import fit_video_size
from .video_files import Video
from .video_packets import VideoLimits
from .video_reading import is_decoded, is_pair


logger = logging.get_logger(__name__)

# Options that set how many frames are taken, and options that limit the number.
COUNT_OPTIONS = {"video_fps", "num_frames", "do_sample_frames"}
COUNT_LIMITS = {"min_frames", "max_frames"}


@dataclass(frozen=True)
class VideoOptions:
    """The options that hold for a call or for one video, checked and complete."""

    min_pixels: int
    max_pixels: int
    video_max_pixels: int
    patch_size: int
    merge_size: int
    video_fps: float | None
    num_frames: int | None
    all_frames: bool  # every frame is taken
    fixed_size: tuple[int, int] | None  # (h, w) after the resize
    min_frames: int
    max_frames: int
    num_extract_threads: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    video_backend: str | None
    allow_http: bool
    allow_private_hosts: bool
    limits: VideoLimits

    @property
    def factor(self) -> int:
        return self.patch_size * self.merge_size


# numbers of frames and times


def frame_count(seconds: float, video_fps: float | None, num_frames: int | None, low: int, high: int) -> int:
    """How many frames are taken from this many seconds: `num_frames`, else by rate; within low..high."""
    count = num_frames if num_frames is not None else math.ceil(min(seconds * video_fps - 1e-6, high))
    return max(1, min(max(count, low), high))


def sample_indices(total: int, count: int) -> np.ndarray:
    """`count` of `total` frame numbers, evenly spaced from the first to the last: sorted int64, without duplicates."""
    return np.unique(np.linspace(0, total - 1, count).astype(np.int64))


def share_frames(total: int, lengths: list[float]) -> list[int]:
    """Shares of `total`: 1 each, the rest in proportion to `lengths`, by largest remainder (ties: the first)."""
    rest, whole = total - len(lengths), sum(lengths)
    exact = [rest * length / whole if whole else rest / len(lengths) for length in lengths]
    shares = [math.floor(x) for x in exact]
    by_remainder = sorted(range(len(lengths)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: max(0, rest - sum(shares))]:
        shares[i] += 1
    return [1 + share for share in shares]


def segment_times(segment: tuple[float, ...], count: int, last: float) -> np.ndarray:
    """`count` times in a segment, [start, end) or [time], clamped into 0..last."""
    times = np.linspace(*segment, count, endpoint=False) if len(segment) == 2 else np.array(segment)
    return np.clip(times, 0.0, last)


def read_segment(segment, name: str) -> tuple[float, ...]:
    """A segment as (start, end) or (time,). Raises ValueError unless the numbers are finite and start < end."""
    try:
        times = tuple(float(x) for x in segment)
    except (TypeError, ValueError, OverflowError):
        times = ()
    if len(times) not in (1, 2) or not all(map(math.isfinite, times)):
        raise ValueError(f"{name}: segment {segment!r}; expected [start, end] or [time], in seconds")
    if len(times) == 2 and times[0] >= times[1]:
        problem = "empty" if times[0] == times[1] else "reversed"
        raise ValueError(f"{name}: segment {segment!r} is {problem}; expected start < end")
    return times


# items


@dataclass(frozen=True, eq=False)
class VideoItem:
    """One video of a call with all options that hold for it, before its file is opened."""

    source: object
    options: VideoOptions
    given: Mapping  # the options of this video alone
    metadata: Mapping | None  # when decoded frames are shown
    explicit_segments: list[tuple[float, ...]] | None
    start: float | None  # video_start
    end: float | None  # video_end
    default_count: bool  # True if neither the call nor the video sets how many decoded frames are taken

    @property
    def name(self) -> str:
        """For messages, before the file is opened."""
        return _source_name(self.source)

    @property
    def clips(self) -> int:
        return len(self.explicit_segments) if self.explicit_segments else 1

    def segments(self, duration: float) -> list[tuple[float, ...]] | None:
        """The segments of a video of this duration; None if the whole video is one clip.

        `video_start` and `video_end` are clamped into the video, as in qwen-vl-utils. For explicit segments only the
        times of frames are clamped.
        """
        if self.start is None and self.end is None:
            return self.explicit_segments
        start = 0.0 if self.start is None else self.start
        end = duration if self.end is None else self.end
        overlaps = start < duration and end > 0
        return [(max(start, 0.0), min(end, duration)) if overlaps else (start, end)]


def read_video_item(
    video, call_options: Mapping, metadata: Mapping | None, resolve: Callable[[dict], VideoOptions]
) -> VideoItem:
    """Reads a video as the caller gave it, with its options.

    Args:
        video: a source, a dict with a source and options, or a pair (frames, metadata).
        call_options: the options of the call, under the names of options.py.
        metadata: `video_metadata` of the call for this video.
        resolve: completes and checks options, as `MossVLVideoProcessor.resolve`.

    Raises ValueError for wrong options, before anything is opened.
    """
    source, given = read_medium("video", video)
    if is_pair(source):
        if "video_metadata" in given or metadata is not None:
            raise ValueError(
                "a video given as (frames, metadata) has its metadata, and there is video_metadata; give one of them"
            )
        source, metadata = source
    if source is None:
        keys = " or ".join(SOURCE_KEYS["video"])
        raise ValueError(f"a video given as a dict holds its source under {keys}; got {shorten(video)}")
    name = _source_name(source)
    metadata = given.get("video_metadata", metadata)
    default_count = False
    if is_decoded(source):
        default_count = not (COUNT_OPTIONS | COUNT_LIMITS) & {*call_options, *given}
        options, metadata = _read_frame_options(call_options, given, metadata, name)
    else:
        if "sample_fps" in call_options or "sample_fps" in given:
            raise ValueError(
                f"{name}: sample_fps is the rate of a list of frames that were sampled before; for a file give fps"
            )
        _check_count_options(call_options, given, name)
        options = layered(call_options, given)
    options.pop("video_metadata", None)
    segments, start, end = _pop_segments(options, name)
    resolved = resolve(options)
    if default_count and _were_chosen(metadata) and len(source) <= resolved.max_frames:
        resolved = replace(resolved, all_frames=True)
    return VideoItem(source, resolved, given, metadata, segments, start, end, default_count)


def _were_chosen(metadata: Mapping | None) -> bool:
    """Whether `video_metadata` says that decoded frames were sampled from a longer video: then all are taken."""
    return isinstance(metadata, Mapping) and metadata.get("frames_indices") is not None


def _source_name(source) -> str:
    if isinstance(source, (str, os.PathLike)):
        return shorten(source, 200)
    return f"a video in a {type(source).__name__}"


def _check_count_options(call_options: Mapping, given: Mapping, name: str) -> None:
    """Raises ValueError if options take all frames and also set a number, a rate or a limit.

    Only the level that sets the number of frames counts: the video's options, else the call's."""
    for level in (given, call_options):
        without_effect = [key for key in ("video_fps", "num_frames", "min_frames", "max_frames") if key in level]
        if level.get("do_sample_frames") is False and without_effect:
            raise ValueError(
                f"{name}: do_sample_frames=False takes every frame, and leaves {', '.join(without_effect)} without "
                "effect; give one or the other"
            )
        if COUNT_OPTIONS & level.keys():
            return


def _read_frame_options(
    call_options: Mapping, given: Mapping, metadata: Mapping | None, name: str
) -> tuple[dict, Mapping | None]:
    """(options, video_metadata) of decoded frames.

    The rate at which the frames were taken is, in this order: in `metadata`; `sample_fps`; the `fps` of the video, or
    of the call if nothing is sampled. If an option gives that rate, all frames are taken, unless the same level limits
    or sets their number.
    """
    call_options, given = dict(call_options), dict(given)
    if metadata is not None and ("sample_fps" in given or "sample_fps" in call_options):
        raise ValueError("sample_fps and video_metadata both say when decoded frames are shown; give one of them")
    rate, level = (None, None) if metadata is not None else _pop_frame_rate(call_options, given)
    if rate is not None:
        metadata = {"fps": positive_number("sample_fps", rate)}
    _check_count_options(call_options, given, name)
    if rate is not None and not COUNT_OPTIONS & level.keys():
        level.update({"video_fps": rate} if COUNT_LIMITS & level.keys() else {"do_sample_frames": False})
    for options in (given, call_options):
        options.pop("sample_fps", None)
    return layered(call_options, given), metadata


def _pop_frame_rate(call_options: dict, given: dict) -> tuple[object, dict | None]:
    """(the rate at which decoded frames were taken, the level of options that gave it); (None, None) without one.

    Removes a `video_fps` that is read as this rate.
    """
    for level in (given, call_options):
        rate = level.get("sample_fps")
        is_unsampled = level is given or {**call_options, **given}.get("do_sample_frames") is False
        if rate is None and is_unsampled:
            rate = level.pop("video_fps", None)
        if rate is not None:
            return rate, level
    return None, None


def _pop_segments(options: dict, name: str) -> tuple[list[tuple[float, ...]] | None, float | None, float | None]:
    """Removes (segments, video_start, video_end) from the options and checks them."""
    segments, start, end = (options.pop(key, None) for key in ("segments", "video_start", "video_end"))
    if start is None and end is None:
        return None if segments is None else _read_segments(segments, name), None, None
    if segments is not None:
        raise ValueError(
            f"{name}: segments and video_start or video_end both say which part is taken; give one of them"
        )
    start = None if start is None else finite_number("video_start", start)
    end = None if end is None else finite_number("video_end", end)
    if start is not None and end is not None:
        read_segment([start, end], name)
    return None, start, end


def _read_segments(segments, name: str) -> list[tuple[float, ...]]:
    if not isinstance(segments, (list, tuple, np.ndarray)) or len(segments) == 0:
        raise ValueError(
            f"{name}: segments must be a list such as [[0.5, 3.0], [4.2]] (seconds), got {shorten(segments)}"
        )
    return [read_segment(segment, name) for segment in segments]


def check_shares(items: list[VideoItem], max_frames: int) -> None:
    """Raises ValueError if a limit of frames is smaller than the number of clips that share it."""
    sharing = sum(item.clips for item in items if "max_frames" not in item.given)
    if sharing > max_frames:
        raise ValueError(f"{sharing} clips share max_frames {max_frames}; each needs at least one frame")
    for item in items:
        limit = item.options.max_frames
        if "max_frames" in item.given and item.clips > limit:
            raise ValueError(f"{item.name}: {item.clips} segments share its max_frames {limit}; each needs one")


def check_segments(name: str, duration: float, segments: list[tuple[float, ...]]) -> None:
    """Raises ValueError for a segment that is entirely outside a video of this duration."""
    for segment in segments:
        start, end = segment[0], segment[-1]
        outside = end < 0 or start > duration
        if outside or (len(segment) == 2 and (end == 0 or start == duration)):
            raise ValueError(f"{name}: segment {list(segment)} lies outside the video, which lasts {duration:g} s")


# plans


@dataclass(frozen=True, eq=False)
class ClipPlan:
    """A clip whose frames are chosen and not decoded."""

    video: Video
    indices: np.ndarray  # int64 [n]: the frame of the video for each frame of the clip
    times: np.ndarray | None  # float64 [n]: for a segment, the seconds at which its frames are taken
    height: int  # after the resize
    width: int
    options: VideoOptions


@dataclass(frozen=True, eq=False)
class _Clip:
    """One clip of an item, whose frames are not chosen yet."""

    item: VideoItem
    video: Video
    segment: tuple[float, ...] | None  # None: the whole video

    @property
    def seconds(self) -> float:
        return self.video.duration if self.segment is None else self.segment[-1] - self.segment[0]


@dataclass(frozen=True)
class _FrameBudget:
    """The share of a clip in the frame limits of its sample and its video."""

    low: int
    high: int
    wanted: int | None  # its share of num_frames


@dataclass(frozen=True, eq=False)
class _ChosenFrames:
    indices: np.ndarray  # int64 [n]
    times: np.ndarray | None = None  # float64 [n], for a segment


def plan_clips(items: list[VideoItem], videos: list[Video], max_frames: int) -> list[ClipPlan]:
    """The clips of one sample. `videos`: of each item; `max_frames`: the limit that all clips share."""
    clips = [clip for item, video in zip(items, videos, strict=True) for clip in _clips_of(item, video)]
    budgets = _frame_budgets(items, clips, max_frames)
    chosen = [_choose_frames(clip, budget) for clip, budget in zip(clips, budgets, strict=True)]
    pixels = [
        len(frames.indices) * clip.video.height * clip.video.width for clip, frames in zip(clips, chosen, strict=True)
    ]
    plans = []
    for clip, frames, area in zip(clips, chosen, pixels, strict=True):
        options = clip.item.options
        limited_alone = "video_max_pixels" in clip.item.given
        sharing = [x for other, x in zip(clips, pixels, strict=True) if not limited_alone or other.item is clip.item]
        share = options.video_max_pixels * (area / sum(sharing))
        size = _frame_size(clip, len(frames.indices), share)
        plans.append(ClipPlan(clip.video, frames.indices, frames.times, *size, options))
    return plans


def _clips_of(item: VideoItem, video: Video) -> list[_Clip]:
    """The clips of an item. Raises for a segment outside the video; warns of one that is partly outside."""
    segments = item.segments(video.duration)
    if segments is None:
        return [_Clip(item, video, None)]
    check_segments(video.name, video.duration, segments)
    clamped = [list(segment) for segment in segments if segment[0] < 0 or segment[-1] > video.duration]
    if clamped:
        logger.warning(f"{video.name} lasts {video.duration:g} s; the times of {clamped} are moved into it")
    return [_Clip(item, video, segment) for segment in segments]


def _frame_budgets(items: list[VideoItem], clips: list[_Clip], max_frames: int) -> list[_FrameBudget]:
    """The budgets of all clips, in their order.

    All clips of the sample share `max_frames`; the clips of one video share its `min_frames`, its `num_frames`, and a
    `max_frames` that is given for it. The latter does not change the shares of other videos.
    """
    highs = share_frames(max(max_frames, len(clips)), [clip.seconds for clip in clips])
    budgets = []
    for item in items:
        options, seconds = item.options, [clip.seconds for clip in clips if clip.item is item]
        first, count = len(budgets), len(seconds)
        lows = share_frames(max(options.min_frames, count), seconds)
        wanted = [None] * count
        if options.num_frames is not None:
            wanted = share_frames(max(options.num_frames, count), seconds)
        high = highs[first : first + count]
        if "max_frames" in item.given:
            high = share_frames(options.max_frames, seconds)
        budgets += [_FrameBudget(*limits) for limits in zip(lows, high, wanted, strict=True)]
    return budgets


def _choose_frames(clip: _Clip, budget: _FrameBudget) -> _ChosenFrames:
    options, video, segment = clip.item.options, clip.video, clip.segment
    if options.all_frames:
        return _all_frames(video, segment)
    high, total = budget.high, len(video.times)
    if options.fixed_size is None:
        high = min(high, options.video_max_pixels // options.min_pixels)
    if segment is None:
        count = frame_count(clip.seconds, options.video_fps, budget.wanted, budget.low, min(high, total))
        if clip.item.default_count and count < total:
            logger.warning_once(
                f"{count} of the {total} decoded frames are taken, by video_fps or num_frames of the processor; "
                "pass do_sample_frames=False to take all, or fps= or num_frames= to say how many"
            )
        return _ChosenFrames(sample_indices(total, count))
    count = 1
    if len(segment) == 2:
        count = frame_count(clip.seconds, options.video_fps, budget.wanted, budget.low, high)
    times = segment_times(segment, count, float(video.times[-1]))
    return _ChosenFrames(video.shown_at(times), times)


def _all_frames(video: Video, segment: tuple[float, ...] | None) -> _ChosenFrames:
    """All frames of a video, or all that are on screen during a segment."""
    if segment is None:
        return _ChosenFrames(np.arange(len(video.times)))
    start, end = max(0.0, segment[0]), segment[-1]
    first = int(video.shown_at(np.array([start]))[0])
    last = max(first + 1, int(np.searchsorted(video.times, end))) if len(segment) == 2 else first + 1
    indices = np.arange(first, last)
    return _ChosenFrames(indices, np.clip(video.times[indices], start, None))


def _frame_size(clip: _Clip, frames: int, share: float) -> tuple[int, int]:
    """(h, w) of the frames of a clip, which may have `share` pixels in all."""
    options, video = clip.item.options, clip.video
    least = math.prod(options.fixed_size) if options.fixed_size else options.min_pixels
    if (options.all_frames or options.fixed_size) and frames * least > options.video_max_pixels:
        raise ValueError(
            f"{video.name}: {frames} frames of {'' if options.fixed_size else 'at least '}{least} pixels are over "
            f"video_max_pixels {options.video_max_pixels}; take fewer frames, make them smaller, or raise "
            "video_max_pixels"
        )
    if options.fixed_size:
        return options.fixed_size
    limits = options.min_pixels, options.max_pixels, share
    return fit_video_size(video.height, video.width, frames, options.factor, *limits)
