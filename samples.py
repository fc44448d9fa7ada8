"""The texts of a batch with their media: finds placeholders, and assigns images and videos to the texts. No pixels, no
tokens."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from .checks import check_characters, shorten
from .conversation import PLACEHOLDER, count_placeholders, is_frames
from .image_reading import split_array
from .video_reading import is_pair


@dataclass(frozen=True)
class Placeholder:
    """An `<|image|>` or `<|video|>` in a text."""

    start: int
    end: int
    kind: str  # "image" or "video"


@dataclass
class Medium:
    """One image, or one clip of a video, as it goes into a sample."""

    patches: torch.Tensor | None  # uint8 [P, 3 * t * p * p]; None if there are only features
    grid: list[int]  # frames, patch rows, patch columns
    text: str  # replaces its placeholder
    image_mean: tuple
    image_std: tuple
    metadata: dict | None = None
    features: torch.Tensor | None = None  # [P / m^2, D], if an encoder was given


@dataclass
class Sample:
    """One text of the batch and its media, first as given (`images`, `videos`), then decoded (`media`)."""

    text: str
    placeholders: list[Placeholder]
    images: list = field(default_factory=list)
    videos: list = field(default_factory=list)
    video_metadata: list | None = None  # one entry per video
    video_fps: list | None = None  # one entry per video, if the call gives a list
    label_spans: list[tuple[int, int]] | None = None
    media: list[Medium] = field(default_factory=list)

    def count(self, kind: str) -> int:
        return sum(placeholder.kind == kind for placeholder in self.placeholders)

    @property
    def frames(self) -> int:
        return sum(medium.grid[0] for medium in self.media)


def read_samples(text, labels_spans) -> list[Sample]:
    """The samples of a call, without media.

    Raises:
        ValueError: if `text` or `labels_spans` is malformed.
    """
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(t, str) for t in texts):
        raise ValueError(f"text must be a string or a list of strings with at least one, got {text!r:.200}")
    for index, one in enumerate(texts):
        check_characters("text" if len(texts) == 1 else f"text {index}", one)
    samples = [Sample(t, [Placeholder(m.start(), m.end(), m[1]) for m in PLACEHOLDER.finditer(t)]) for t in texts]
    if labels_spans is not None:
        for sample, spans in zip(samples, _spans_per_sample(labels_spans, len(samples)), strict=True):
            sample.label_spans = _check_spans(spans, len(sample.text))
    return samples


def _spans_per_sample(labels_spans, samples: int) -> list:
    """One list of spans per sample; the spans of a single sample need no list around them."""
    spans = list(labels_spans)
    if samples == 1 and (not spans or _is_span(spans[0])):
        return [spans]
    if len(spans) != samples:
        raise ValueError(
            f"labels_spans has {len(spans)} entries, but there are {samples} texts; expected a list of [start, end] "
            "for each"
        )
    return spans


def _is_span(x) -> bool:
    return (
        isinstance(x, (list, tuple, np.ndarray)) and len(x) == 2 and all(isinstance(i, (int, np.integer)) for i in x)
    )


def _check_spans(spans: Iterable | None, length: int) -> list[tuple[int, int]]:
    spans = list(spans if spans is not None else ())
    for span in spans:
        if not _is_span(span) or not 0 <= span[0] <= span[1] <= length:
            raise ValueError(f"labels_spans: {span!r} is not a [start, end] of characters inside a text of {length}")
    return [(int(start), int(end)) for start, end in spans]


# assigning media to samples


def assign_media(samples: list[Sample], images, videos, video_metadata) -> None:
    """Gives each sample its media, in the order of its placeholders.

    Args:
        images, videos: None, one medium, a flat list over the batch, or one list (or None) per sample.
        video_metadata: None, or a dict or None for each video.

    Raises:
        ValueError: if there are more or fewer media than placeholders.
    """
    for sample, assigned in zip(samples, _assign("image", images, None, samples), strict=True):
        sample.images = [image for image, _ in assigned]
    for sample, assigned in zip(samples, _assign("video", videos, video_metadata, samples), strict=True):
        sample.videos = [video for video, _ in assigned]
        sample.video_metadata = None if video_metadata is None else [metadata for _, metadata in assigned]


def assign_rates(samples: list[Sample], video_options: dict) -> None:
    """If `video_fps` is a list with one entry per video of the batch, moves it from the options to the samples."""
    rates = video_options.get("video_fps")
    if not isinstance(rates, (list, tuple, np.ndarray, torch.Tensor)):
        return
    del video_options["video_fps"]
    rates = [None if rate is None else float(rate) for rate in rates]
    total = sum(len(sample.videos) for sample in samples)
    if len(rates) != total:
        raise ValueError(f"video_fps has {len(rates)} entries for {total} videos; give one number, or one per video")
    queue = iter(rates)
    for sample in samples:
        sample.video_fps = [next(queue) for _ in sample.videos]


def _assign(kind: str, media, metadata, samples: list[Sample]) -> list[list[tuple]]:
    """Per sample its list of (medium, metadata)."""
    wanted = [sample.count(kind) for sample in samples]
    media = [] if media is None else [media] if _is_one(kind, media) else _as_list(media)
    per_sample = any(not _is_one(kind, x) for x in media)
    groups = [_as_group(kind, x) for x in media] if per_sample else [media]
    if per_sample and len(groups) != len(samples):
        raise ValueError(
            f"{kind}s come in {len(groups)} lists, but there are {len(samples)} texts; give one list per text, or one "
            "flat list"
        )
    groups = _pair_with_metadata(kind, groups, metadata)
    if not per_sample:
        where = "the text has" if len(samples) == 1 else f"the {len(samples)} texts have"
        _check_count(kind, groups[0], sum(wanted), where)
        return [_take(kind, groups[0], count) for count in wanted]
    for index, (group, count) in enumerate(zip(groups, wanted, strict=True)):
        _check_count(kind, group, count, f"text {index} has")
    return groups


def _is_array(x) -> bool:
    return isinstance(x, (np.ndarray, torch.Tensor))


def _is_one(kind: str, x) -> bool:
    """Whether `x` is one image or video, and not a list of them."""
    if x is None:
        return False
    if kind == "image":
        return not isinstance(x, (list, tuple)) and not (_is_array(x) and x.ndim == 4)
    if isinstance(x, (list, tuple)):
        return is_pair(x) or is_frames(x)
    return not (_is_array(x) and x.ndim == 5)


def _as_list(media) -> list:
    return split_array(media) if _is_array(media) else list(media)


def _as_group(kind: str, media) -> list:
    """The media of one sample as a list."""
    if media is None:
        return []
    return [media] if _is_one(kind, media) else _as_list(media)


def _pair_with_metadata(kind: str, groups: list[list], metadata) -> list[list[tuple]]:
    """The groups, each medium with its metadata: lists of (medium, metadata)."""
    flat = [medium for group in groups for medium in group]
    for medium in flat:
        if not _is_one(kind, medium):
            raise ValueError(
                f"{kind}s are nested too deep: {shorten(medium)}; give one list per text, or one flat list"
            )
    if metadata is None:
        metadata = [None] * len(flat)
    elif isinstance(metadata, (list, tuple)):
        metadata = [m for x in metadata for m in (x if isinstance(x, (list, tuple)) else [x])]
    else:
        metadata = [metadata]
    if len(metadata) != len(flat):
        raise ValueError(
            f"{len(flat)} videos are given, but {len(metadata)} video_metadata; expected one for each, None where "
            "there is none"
        )
    pairs = iter(zip(flat, metadata, strict=True))
    return [[next(pairs) for _ in group] for group in groups]


def _check_count(kind: str, pairs: list[tuple], wanted: int, where: str) -> None:
    given = sum(count_placeholders(kind, medium) for medium, _ in pairs)
    if given != wanted:
        of = " or segments of them" if kind == "video" else ""
        raise ValueError(f"{where} {wanted} <|{kind}|> placeholders, but {given} {kind}s{of} are given")


def _take(kind: str, queue: list[tuple], wanted: int) -> list[tuple]:
    """Removes media for this many placeholders from the queue. Segments of one video may be split."""
    taken = []
    while wanted:
        (medium, metadata), clips = queue[0], count_placeholders(kind, queue[0][0])
        if clips <= wanted:
            taken.append(queue.pop(0))
        else:
            taken.append(({**medium, "segments": medium["segments"][:wanted]}, metadata))
            queue[0] = ({**medium, "segments": medium["segments"][wanted:]}, metadata)
        wanted -= min(clips, wanted)
    return taken
