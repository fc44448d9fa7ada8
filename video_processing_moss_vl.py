"""Video processor: videos of one sample to clips of patches.

Axes: p patch size, P patches. The steps are in docs/processing.md; sampling is in video_sampling.py, decoding in
clip_decoding.py.
"""

from collections.abc import Mapping
from dataclasses import asdict

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.video_processing_utils import BaseVideoProcessor

from .animations import AnimatedImage  # noqa: F401
from .checks import flag, positive_int, positive_number, tensor_format, three_floats
from .clip_decoding import Clip, ClipMetadata, Encoder, decode_clips  # noqa: F401
from .coded_pictures import PictureReader  # noqa: F401
from .colours import tone_map_of  # noqa: F401
from .conversation import is_frames
from .decord_video import open_decord  # noqa: F401
from .downloads import download  # noqa: F401
from .image_files import open_image  # noqa: F401
from .image_processing_moss_vl import to_format, wants_uint8
from .image_reading import split_array
from .options import drop_fixed, names_of, read_options, reject_unknown
from .patches import join_patches
from .processor_settings import (
    FixedSteps,
    is_service_key,
    known_settings,
    merge_settings,
    require_settings,
    size_edge,
    split_keywords,
)
from .resizing import ANY_SIZE, DEFAULT_SIZE, fit_video_size, pixel_limits, read_fixed_size
from .signatures import image_kind  # noqa: F401
from .threads import in_threads
from .video_files import Video
from .video_packets import DEFAULT_LIMITS, VideoLimits
from .video_reading import is_decoded, is_pair, open_video, read_frame_times
from .video_sampling import (
    ClipPlan,
    VideoItem,
    VideoOptions,
    check_segments,
    check_shares,
    plan_clips,
    read_video_item,
)


VIDEO_MAX_PIXELS = 201326592  # of all frames of a sample, by default


class MossVLVideoProcessor(FixedSteps, BaseVideoProcessor):
    """Videos of one sample -> clips of patches.

    The options of a call are the options for videos in options.py. The arguments are settings; each is also an option
    of a call:
        size: {"shortest_edge", "longest_edge"}, the minimum and maximum number of *pixels* of a resized frame. Also
            accepted: `min_pixels` or `shortest_edge`, and `max_pixels` or `longest_edge`.
        video_max_pixels: maximum pixels of all frames of a sample, shared in proportion to frames * height * width.
        video_fps, num_frames: frames per second, or the number of frames; not both.
        min_frames, max_frames: limits of the number of frames of a video. The clips of a sample share `max_frames`.
        num_extract_threads: threads that decode and resize frames.
        video_backend: "pyav" or "decord"; None takes PyAV, or decord if only that is installed.
        patch_size, temporal_patch_size (1), merge_size: as in the model; sides become multiples of patch_size *
        merge_size.
        image_mean, image_std: three numbers each, for pixel values scaled to 0..1.
        allow_http: True allows downloads from http(s) URLs. It is not saved, and ignored in a file.
        allow_private_hosts: True allows downloads from private addresses too. Also not saved.
        max_source_pixels, max_video_packets, max_animation_canvas, max_animation_pixels: limits of a file, None for
            those of `VideoLimits`. They are not saved, and ignored in a file.
    """

    _auto_class = "AutoVideoProcessor"  # save_pretrained copies the code
    model_input_names = ["pixel_values_videos", "video_grid_thw"]
    option_names = names_of("video")
    stored_names = names_of("video", stored=True)
    setting_names = (*stored_names, *names_of("video", trusted=True))

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
        allow_private_hosts=None,
        max_source_pixels=None,
        max_video_packets=None,
        max_animation_canvas=None,
        max_animation_pixels=None,
        **kwargs,
    ):
        class_name = type(self).__name__
        kwargs = drop_fixed(kwargs, class_name)
        other_names = {name: kwargs.pop(name) for name in list(kwargs) if name in self.option_names}
        require_settings(other_names, self.setting_names, class_name)
        reject_unknown([name for name in kwargs if not is_service_key(name)], self.setting_names, class_name)
        BaseImageProcessor.__init__(self, **kwargs)  # the base class would set attributes for other models
        # These arguments have several names in options.py.
        named = {
            "video_max_pixels": video_max_pixels,
            "video_fps": video_fps,
            "num_frames": num_frames,
            "video_backend": video_backend,
            "num_extract_threads": num_extract_threads,
            "min_pixels": min_pixels,
            "max_pixels": max_pixels,
        }
        named = read_options({**named, **other_names}, self.setting_names, class_name)
        low, high = pixel_limits(DEFAULT_SIZE, size, named.get("min_pixels"), named.get("max_pixels"))
        self.size = {"shortest_edge": low, "longest_edge": high}
        self.video_max_pixels = named.get("video_max_pixels", VIDEO_MAX_PIXELS)
        self.patch_size = patch_size
        self.temporal_patch_size = temporal_patch_size
        self.merge_size = merge_size
        self.num_frames = named.get("num_frames")
        self.video_fps = named.get("video_fps", 1.0 if self.num_frames is None else None)
        self.min_frames = min_frames
        self.max_frames = max_frames
        self.num_extract_threads = named.get("num_extract_threads", 4)
        self.image_mean = list(three_floats("image_mean", image_mean))
        self.image_std = list(three_floats("image_std", image_std))
        self.video_backend = named.get("video_backend")
        self.allow_http = flag("allow_http", allow_http)
        self.allow_private_hosts = flag("allow_private_hosts", allow_private_hosts)
        self.max_source_pixels = max_source_pixels
        self.max_video_packets = max_video_packets
        self.max_animation_canvas = max_animation_canvas
        self.max_animation_pixels = max_animation_pixels
        self.resolve({})

    @classmethod
    def from_dict(cls, video_processor_dict, **kwargs):
        """Keyword arguments override settings of the file. Drops unknown keys of the file with a warning."""
        kwargs, given = split_keywords(kwargs, cls)
        settings = known_settings(video_processor_dict, cls)
        if given.keys() & {"num_frames", "video_fps"}:
            settings.update(num_frames=None, video_fps=None)
        return super().from_dict(merge_settings(settings, given), **kwargs)

    def to_dict(self):
        trusted = names_of("video", trusted=True)
        return {name: value for name, value in super().to_dict().items() if name not in trusted}

    min_pixels, max_pixels = size_edge("shortest_edge"), size_edge("longest_edge")

    # options

    def resolve(self, options: dict, used: bool = True) -> VideoOptions:
        """The options of a call, completed with the settings of the processor; None means not given. Raises
        ValueError.

        `used` is False for a call without videos: options that images take too are not checked against the settings.
        """
        class_name = type(self).__name__
        options = read_options(drop_fixed(options, class_name), self.option_names, class_name)
        if "segments" in options:
            raise ValueError(
                "segments belong to one video; give that as {'video_path': ..., 'segments': [[start, end], [time], "
                "...]}"
            )

        def pick(name):
            return options.get(name, getattr(self, name, None))

        limits = {name: options.get(name) for name in ("size", "min_pixels", "max_pixels")}
        low, high = pixel_limits(self.size if used else ANY_SIZE, **limits)
        count_names = ("video_max_pixels", "patch_size", "merge_size", "min_frames", "max_frames")
        counts = {name: positive_int(name, pick(name)) for name in count_names}
        if positive_int("temporal_patch_size", pick("temporal_patch_size")) != 1 and used:
            raise ValueError(
                f"temporal_patch_size must be 1, got {pick('temporal_patch_size')!r}: every frame has one time"
            )
        if used and counts["video_max_pixels"] < low:
            raise ValueError(
                f"video_max_pixels {counts['video_max_pixels']} does not hold one frame of shortest_edge {low} pixels"
            )
        video_fps, num_frames = self._resolve_count(options, counts["min_frames"], counts["max_frames"])
        backend = pick("video_backend")
        if backend not in (None, "pyav", "decord"):
            raise ValueError(f"video_backend must be 'pyav' or 'decord', got {backend!r}")
        return VideoOptions(
            low,
            high,
            **counts,
            video_fps=video_fps,
            num_frames=num_frames,
            all_frames=not flag("do_sample_frames", options.get("do_sample_frames", True)),
            fixed_size=read_fixed_size(options, counts["patch_size"] * counts["merge_size"], class_name),
            num_extract_threads=positive_int("num_extract_threads", pick("num_extract_threads")),
            **{name: three_floats(name, pick(name)) for name in ("image_mean", "image_std")},
            video_backend=backend,
            allow_http=flag("allow_http", pick("allow_http")),
            allow_private_hosts=flag("allow_private_hosts", pick("allow_private_hosts")),
            limits=VideoLimits(
                **{
                    name: positive_int(name, default if pick(name) is None else pick(name))
                    for name, default in asdict(DEFAULT_LIMITS).items()
                }
            ),
        )

    def _resolve_count(self, options: dict, min_frames: int, max_frames: int) -> tuple[float | None, int | None]:
        """(video_fps, num_frames), one of which is None: as given, else as in the settings."""
        if min_frames > max_frames:
            raise ValueError(f"min_frames {min_frames} is above max_frames {max_frames}")
        rate, number = options.get("video_fps"), options.get("num_frames")
        if rate is None and number is None:
            rate, number = self.video_fps, self.num_frames
        if rate is not None and number is not None:
            raise ValueError(
                f"video_fps {rate!r} and num_frames {number!r} both say how many frames to take; give one of them"
            )
        if number is None:
            return None if rate is None else positive_number("video_fps", rate), None
        number = positive_int("num_frames", number)
        if not min_frames <= number <= max_frames:
            raise ValueError(f"num_frames {number} lies outside min_frames {min_frames} to max_frames {max_frames}")
        return None, number

    def _read_items(self, videos, video_metadata, options: dict) -> tuple[list[VideoItem], VideoOptions]:
        """The videos of a call with the options of each, and the options of the call. Raises ValueError."""
        videos = flat_videos(videos)
        options = read_options(drop_fixed(options, type(self).__name__), self.option_names, type(self).__name__)
        given_metadata = options.pop("video_metadata", None)
        metadata = _per_video(given_metadata if video_metadata is None else video_metadata, len(videos))
        rates = [None] * len(videos)
        if isinstance(options.get("video_fps"), (list, tuple)):
            rates = options.pop("video_fps")
            if len(rates) != len(videos):
                raise ValueError(
                    f"video_fps has {len(rates)} entries for {len(videos)} videos; give one number, or one per video"
                )
        call_options = self.resolve(options)
        items = [
            read_video_item(video, options if rate is None else {**options, "video_fps": rate}, entry, self.resolve)
            for video, rate, entry in zip(videos, rates, metadata, strict=True)
        ]
        check_shares(items, call_options.max_frames)
        return items, call_options

    # planning and decoding

    def check(self, videos, video_metadata=None, seconds=None, **options) -> None:
        """Raises the ValueErrors of `plan` that need no file to be opened: wrong options, options that do not fit each
        other or the settings, segments outside the video.

        Arguments: as for `plan`. `seconds`: the duration of each video, None if unknown; the duration of decoded
        frames is always known.
        """
        items, _ = self._read_items(videos, video_metadata, options)
        for item, duration in zip(items, seconds or [None] * len(items), strict=True):
            if is_decoded(item.source):
                duration = read_frame_times(item.metadata, len(item.source), item.name).duration
            if duration is not None:
                check_segments(item.name, duration, item.segments(duration) or ())

    def plan(self, videos, video_metadata=None, **options) -> list[ClipPlan]:
        """The clips of one sample: the frames that are taken, and their size. Reads the index of each file and decodes
        only first frames.

        Args:
            videos: one video or a list. A video is what `open_video` takes, a pair (frames, metadata), or a dict
                {"video_path": source, options of this video}. With "segments": [[start, end], [time], ...] in seconds
                it has one clip per segment.
            video_metadata: for decoded frames, one mapping, or a mapping or None per video.
            **options: the options for videos (options.py). `video_fps` may be a list with one entry per video. Options
            of one video
                hold for that video alone; a `max_frames` or `video_max_pixels` for one video does not change the
                shares of other videos.

        Raises ValueError or FileNotFoundError if a video, a segment or an option is wrong.
        """
        items, call_options = self._read_items(videos, video_metadata, options)
        names = ["the video" if len(items) == 1 else f"video {i}" for i in range(len(items))]

        def open_one(item: VideoItem, name: str) -> Video:
            return open_video(
                item.source,
                item.metadata,
                name=name,
                backend=call_options.video_backend,
                allow_http=call_options.allow_http,
                allow_private_hosts=call_options.allow_private_hosts,
                limits=call_options.limits,
            )

        opened = in_threads(call_options.num_extract_threads, open_one, items, names)
        return plan_clips(items, opened, call_options.max_frames)

    def extract(self, videos, video_metadata=None, encoder: Encoder | None = None, **options) -> list[Clip]:
        """The clips of one sample, decoded: with patches, or with the features that an `encoder` made of them.

        Args:
            videos: what `plan` takes, or the clips that it returned.
            video_metadata, **options: as for `plan`; not allowed with planned clips.
            encoder: a function of (uint8 pixels [P, 3 * p * p], grid [[frames, patch rows, patch columns]], mean, std)
                that returns features [P / merge_size^2, D]. It is called on this thread while other frames are
                decoded.
        """
        is_planned = are_planned(videos)
        if is_planned and (options or video_metadata is not None):
            raise ValueError(f"a plan holds its options already, got {sorted(options) or ['video_metadata']}")
        plans = videos if is_planned else self.plan(videos, video_metadata, **options)
        return decode_clips(plans, encoder)

    def get_num_of_video_patches(self, num_frames: int, height: int, width: int, videos_kwargs=None) -> int:
        """The patches of a clip of `num_frames` sampled frames that is alone in its sample.

        Servers call it by this name, with the options of a call as `videos_kwargs`.
        """
        options = self.resolve(videos_kwargs or {})
        limits = options.min_pixels, options.max_pixels, options.video_max_pixels
        size = options.fixed_size or fit_video_size(height, width, num_frames, options.factor, *limits)
        return num_frames * (size[0] // options.patch_size) * (size[1] // options.patch_size)

    def preprocess(
        self,
        videos,
        video_metadata=None,
        return_metadata=False,
        return_tensors=None,
        do_normalize=None,
        **options,
    ) -> BatchFeature:
        """The videos of one sample as `pixel_values_videos` float32 [P, 3 * p * p] and `video_grid_thw` [clips, 3].

        Args:
            videos, video_metadata, **options: as for `plan`.
            return_metadata: True adds the list `video_metadata`, with the `ClipMetadata` of each clip.
            return_tensors: "pt", which is also the default, or "np".
            do_normalize: False returns uint8 `pixel_values_videos`, with `image_mean` and `image_std`: lists of three
                numbers per clip.
        """
        tensor_format(return_tensors)
        as_uint8 = wants_uint8(do_normalize)
        statistics = {name: value for name, value in options.items() if name in ("image_mean", "image_std")}
        resolved = self.resolve(statistics)
        clips = self.extract(videos, video_metadata, **options)
        data = join_patches([(clip.patches, resolved.image_mean, resolved.image_std) for clip in clips], as_uint8)
        data = {
            "pixel_values_videos": data.pop("pixel_values"),
            "video_grid_thw": torch.tensor([clip.grid for clip in clips]),
            **data,
        }
        out = BatchFeature({name: to_format(x, return_tensors) for name, x in data.items()})
        if return_metadata:
            out["video_metadata"] = [clip.metadata for clip in clips]
        return out


def are_planned(videos) -> bool:
    """Whether `videos` is what `plan` returns."""
    return isinstance(videos, list) and bool(videos) and all(isinstance(x, ClipPlan) for x in videos)


def flat_videos(videos) -> list:
    """The videos of a call as a list: of one video, of several, or of one video that is given as a list of frames."""
    if isinstance(videos, (np.ndarray, torch.Tensor)) and videos.ndim == 5:
        return split_array(videos)
    if not isinstance(videos, (list, tuple)) or is_pair(videos):
        return [videos]
    if not videos:
        raise ValueError("no video given; expected at least one")
    return [videos] if is_frames(videos) else list(videos)


def _per_video(metadata, count: int) -> list[Mapping | None]:
    """One entry of `video_metadata` per video."""
    if metadata is None:
        return [None] * count
    entries = [metadata] if isinstance(metadata, Mapping) else list(metadata)
    if len(entries) != count:
        raise ValueError(f"video_metadata has {len(entries)} entries for {count} videos")
    return entries


__all__ = ["MossVLVideoProcessor"]
