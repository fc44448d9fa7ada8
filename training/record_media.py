"""The media of training records: reads their forms, and probes them without decoding."""

from pathlib import Path

from PIL import Image

from moss_vl.animations import AnimatedImage, is_animation
from moss_vl.checks import shorten
from moss_vl.conversation import count_placeholders, is_frames, locate, read_medium, scheme_of
from moss_vl.image_reading import open_source, probe_image
from moss_vl.video_packets import open_container


LONGEST = 1e9  # seconds; infinite and huge numbers are no times


def count_all(kind: str, media: list) -> int:
    """The number of placeholders of all media."""
    return sum(count_placeholders(kind, medium) for medium in media)


def read_media(kind: str, given, folder: Path) -> list:
    """The plain media of `images` or `videos`, which may be a list or one medium."""
    if given is None:
        return []
    several = isinstance(given, list) and not (kind == "video" and is_frames(given))
    return [read_one_medium(kind, medium, folder) for medium in (given if several else [given])]


def read_one_medium(kind: str, medium, folder: Path):
    """A plain medium: a path, URL, bytes, or list of frames, or a dict of one and its options; relative to `folder`.

    An image may also be a Pillow image, as data sets hold them in memory.
    """
    source, options = read_medium(kind, medium)
    frames = source if kind == "video" and isinstance(source, list) else [source]
    known = (str, bytes) if kind == "video" and frames is not source else (str, bytes, Image.Image)
    if not frames or not all(isinstance(one, known) and one for one in frames):
        expected = "a path" if kind == "image" else "a path, a list of frames, or {'video_path', 'segments'}"
        raise ValueError(f"expected {expected} for {kind}s, got {shorten(medium)}")
    for one in frames:
        if scheme_of(one) in ("http", "https"):
            raise ValueError(
                f"{kind} {shorten(one)} would be downloaded in every epoch; download it once and give its path"
            )
    if "segments" in options:
        _check_segments(source, options["segments"])
    return locate(kind, medium, folder)


def _check_segments(source, segments) -> None:
    def is_time(x):
        return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < LONGEST

    def is_segment(x):
        return isinstance(x, list) and len(x) in (1, 2) and all(map(is_time, x)) and (len(x) == 1 or x[0] < x[1])

    if not isinstance(segments, list) or not segments or not all(map(is_segment, segments)):
        raise ValueError(
            f"segments of {shorten(source)} must be a list of [start, end] with start < end, or [time], in seconds; "
            f"got {segments!r:.100}"
        )


def probe(kind: str, medium, seconds: dict) -> float | None:
    """Reads the header of a medium, once per path, and keeps a video's duration in `seconds`.

    Returns:
        The duration of a video, None if it is not known.

    Raises FileNotFoundError, or ValueError if the file is no image or video, or a segment lies after the video's end.
    """
    source, options = read_medium(kind, medium)
    if isinstance(source, list):  # frames of a video
        for frame in source:
            probe("image", frame, seconds)
        return None
    key = (kind, source) if isinstance(source, str) else None  # bytes are not kept
    duration = seconds.get(key)
    if key is None or key not in seconds:
        if kind == "image":
            probe_image(source)
        duration = header_seconds(source) if kind == "video" else None
        if key is not None:
            seconds[key] = duration
    for segment in options.get("segments") or ():
        if segment[-1] < 0 or (duration is not None and segment[0] > duration):
            lasts = f", which lasts {duration:.1f} s" if duration else ""
            raise ValueError(f"segment {segment} lies outside {shorten(source)}{lasts}")
    return duration


def header_seconds(source) -> float | None:
    """The duration in the header of a video, None if there is none. Raises ValueError for a file without video."""
    import av

    file, name = open_source(source, what="video")
    if is_animation(file):
        return AnimatedImage(file, name).duration
    with open_container(file, name) as container:
        if not container.streams.video:
            raise ValueError(f"{name} has no video in it")
        return container.duration / av.time_base if container.duration else None
