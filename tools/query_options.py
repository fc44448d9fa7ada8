"""Turns the options of the command line of infer.py into options of a query."""

from moss_vl.conversation import collect_media, plain_medium, read_medium, replace_media
from moss_vl.options import ALTERNATIVES, canonical


# Options given as None take the checkpoint's settings; if left out, they would take defaults of the offline methods.
CHECKPOINT_OPTIONS = dict.fromkeys(
    (
        "min_pixels",
        "max_pixels",
        "multi_image_max_pixels",
        "video_max_pixels",
        "video_fps",
        "min_frames",
        "max_frames",
        "num_extract_threads",
    )
)
# Options that choose the frames of a video. One of them, given for a query or a video, replaces --frames and --fps.
FRAME_OPTIONS = (*ALTERNATIVES[0], "sample_fps")


def add_arguments(args, query: dict, processor) -> dict:
    """The query with the options of the command line; those of the query override them."""
    media_kwargs = query.get("media_kwargs") or {}
    given = {canonical(name): value for name, value in media_kwargs.items()}
    options = dict(CHECKPOINT_OPTIONS)
    if "size" not in given:
        options |= {"min_pixels": args.min_pixels, "max_pixels": args.max_pixels}
    options |= frame_options(args, query, given, processor.video_processor)
    for name in ("allow_http", "allow_private_hosts"):
        if getattr(args, name):
            options[name] = True
    options = {name: value for name, value in options.items() if name not in given}
    query = {
        "use_template": args.template,
        "system_prompt": args.system,
        "thinking_mode": args.thinking,
        **query,
        "media_kwargs": {**options, **media_kwargs},
        "generate_kwargs": {**sampling_options(args), **(query.get("generate_kwargs") or {})},
    }
    return fit_videos(options, query)


def sampling_options(args) -> dict:
    """The `generate_kwargs` of the command line."""
    options = {
        "temperature": args.temperature,
        "do_sample": args.temperature > 0,
        "max_new_tokens": args.max_new_tokens,
    }
    for name in ("top_p", "top_k", "repetition_penalty"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    return options


def frame_options(args, query: dict, given: dict, settings) -> dict:
    """The media options for --frames and --fps.

    Args:
        given: the media options of the query. Their bounds limit --frames.
        settings: the video processor. Its bounds are changed where they contradict --frames.
    """
    if any(name in given for name in FRAME_OPTIONS):
        return {}
    if args.frames is None:
        return {"video_fps": args.fps}
    frames = clamp(args.frames, *frame_bounds(given))
    min_frames = min(frames, settings.min_frames)
    if args.fps is not None:
        return {"video_fps": args.fps, "min_frames": min_frames, "max_frames": frames}
    total = frames * max(1, count_videos(query))  # max_frames bounds the frames of all videos together
    return {"num_frames": frames, "min_frames": min_frames, "max_frames": max(total, settings.max_frames)}


def check_frame_options(args, messages: list[dict]) -> None:
    """Raises ValueError if the command line has options for the frames of videos, and no medium is a video."""
    given = [f"--{name}" for name in ("frames", "fps") if getattr(args, name) is not None]
    if given and not collect_media(messages, "video"):
        raise ValueError(f"{' and '.join(given)} would have no effect: no video is given, only images")


def fit_videos(options: dict, query: dict) -> dict:
    """The query, with the options of its videos completed so that they do not contradict those of the command line."""

    def fit(medium):
        source, of_video = read_medium("video", medium)
        bounds = frame_bounds(of_video)
        if options.get("num_frames") is not None and any(bounds) and not any(n in of_video for n in FRAME_OPTIONS):
            of_video["num_frames"] = clamp(options["num_frames"], *bounds)
        wanted = max((of_video[n] for n in ("num_frames", "min_frames") if is_count(of_video.get(n))), default=0)
        if options.get("max_frames") is not None and wanted > options["max_frames"] and "max_frames" not in of_video:
            of_video["max_frames"] = wanted
        return plain_medium("video", source, of_video)

    query = dict(query)
    if (videos := query.get("videos")) is not None:
        query["videos"] = [fit(one) for one in videos] if isinstance(videos, list) else fit(videos)
    if isinstance(query.get("messages"), list):
        query["messages"] = replace_media(
            query["messages"], lambda kind, medium: fit(medium) if kind == "video" else medium
        )
    return query


def frame_bounds(options: dict) -> tuple[int | None, int | None]:
    """(min_frames, max_frames) of options. None if it is absent, or wrong: the processor reports that."""
    low, high = (options[name] if is_count(options.get(name)) else None for name in ("min_frames", "max_frames"))
    return low, high


def clamp(number: int, low: int | None, high: int | None) -> int:
    """The number, limited to [low, high]; None means no limit."""
    number = number if low is None else max(number, low)
    return number if high is None else min(number, high)


def is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def count_videos(query: dict) -> int:
    """An upper bound of the number of videos. Videos that a query lists twice are counted twice."""
    videos = query.get("videos")
    listed = len(videos) if isinstance(videos, list) else int(videos is not None)
    return listed + len(collect_media(query.get("messages") or (), "video"))
