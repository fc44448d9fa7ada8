"""Reads training records, and checks them. Media are probed, not decoded. training/README.md describes the forms."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path

from moss_vl.image_processing_moss_vl import MossVLImageProcessor
from moss_vl.options import options_of
from moss_vl.realtime_protocol import RESPONSE, SILENCE
from moss_vl.resizing import ANY_SIZE
from moss_vl.training.data_files import Entry, read_entries
from moss_vl.training.record_media import probe
from moss_vl.training.record_turns import read_conversation
from moss_vl.video_processing_moss_vl import MossVLVideoProcessor


logger = getLogger(__name__)

PROBE_THREADS = 8  # more than cores, as probing waits for the disk
NAMED_RECORDS = 20  # most bad records that a message lists
# Processors without limits: media that they reject are bad for every checkpoint.
UNLIMITED_IMAGES = MossVLImageProcessor(size=ANY_SIZE)
UNLIMITED_VIDEOS = MossVLVideoProcessor(size=ANY_SIZE, video_max_pixels=ANY_SIZE["longest_edge"], max_frames=2**31)


@dataclass(frozen=True)
class Record:
    """One conversation.

    Attributes:
        where: file and index, for messages.
        messages: [{"role": "system", "user", "assistant" or "tool", "content": text}]. The texts hold one `<|image|>`
            per image and one `<|video|>` per video, or per segment of a video. Turns of the assistant may have
            `tool_calls`, turns of tools `name` and `tool_call_id`. `loss` is False in turns that are not learned, and
            absent in all others.
        images, videos: plain media (conversation.py), paths, data: URLs, bytes, or dicts of one of these with its
            options, in the order of the text.
        tools: JSON schemas for the chat template, None without tools.
        weight: the weight of the record's tokens in the loss.
    """

    where: str
    messages: list[dict]
    images: list
    videos: list
    tools: list[dict] | None = None
    weight: float = 1.0

    @property
    def is_stream(self) -> bool:
        """Whether it is a realtime stream: an assistant writes the tokens of the protocol."""
        said = (message["content"] for message in self.messages if message["role"] == "assistant")
        return any(SILENCE in text or RESPONSE in text for text in said)


def read_records(files, skip_bad: bool = False, check=None, probes: bool = True) -> list[Record]:
    """The checked records of one data file or of a list of files.

    Args:
        files: paths, see data_files.py. A file that begins with `[` is a JSON list, parquet files and folders are
            tables, and any other file has one JSON object per line.
        skip_bad: skip bad records with one warning.
        check: called with every record that passed all other checks; if it raises a ValueError, the record is bad.
        probes: whether media are opened. Without this, only the form of a record is checked before `check`.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: for a file that cannot be read; for bad records (file, index and reason of the first 20, and the
            number of the others); if no record is left.
    """
    files = [Path(file) for file in ([files] if isinstance(files, (str, os.PathLike)) else files)]
    entries = [entry for file in files for entry in read_entries(file)]
    seconds = {}  # (kind, path) of each medium probed so far -> its duration, None if unknown

    def read(entry):
        try:
            return read_record(entry, seconds if probes else None, check)
        except (ValueError, OSError) as error:
            return f"{entry.where}: {error}"

    with ThreadPoolExecutor(PROBE_THREADS) as pool:
        found = list(pool.map(read, entries))
    records = [one for one in found if isinstance(one, Record)]
    bad = [one for one in found if isinstance(one, str)]
    if bad:
        _report_bad(bad, len(entries), skip_bad)
    if not records:
        names = ", ".join(map(str, files))
        raise ValueError(
            f"{names}: no {'good ' if bad else ''}record; expected a JSON list of objects, or one JSON object per line"
        )
    return records


def read_record(entry: Entry, seconds: dict | None, check=None) -> Record:
    """The record of an entry, its media probed.

    Args:
        seconds: durations of the videos that were probed before; those of this record are added. None: no medium is
            opened.
        check: see `read_records`.

    Raises:
        ValueError, OSError: for a bad one.
    """
    record = Record(entry.where, **vars(read_conversation(entry.load(), entry.folder)))
    if seconds is not None:
        for image in record.images:
            probe("image", image, seconds)
        durations = [probe("video", video, seconds) for video in record.videos]
        check_media_options(record, UNLIMITED_IMAGES, UNLIMITED_VIDEOS, durations)
    if check is not None:
        check(record)
    return record


def try_record(record: Record, function, skip_bad: bool):
    """`function(record)`; None for a bad record that is skipped. Without --skip-checks no record is bad.

    Raises:
        ValueError: for a bad one, with its place.
    """
    try:
        return function(record)
    except ValueError as error:
        if not skip_bad:
            raise ValueError(f"{record.where}: {error}. Fix it, or skip such records with --skip-bad.") from error
        return None


def _report_bad(bad: list[str], total: int, skip_bad: bool) -> None:
    """Warns of bad records if they are skipped, else raises ValueError. `bad`: file, index and reason of each."""
    lines = [f"{len(bad)} of the {total} records are bad:", *bad[:NAMED_RECORDS]]
    if len(bad) > NAMED_RECORDS:
        lines.append(f"and {len(bad) - NAMED_RECORDS} more")
    if not skip_bad:
        raise ValueError("\n  ".join(lines) + "\nFix them, or skip them with --skip-bad.")
    logger.warning("%s", "\n  ".join([*lines, "They are skipped."]))


def check_media_options(record: Record, images, videos, seconds=None, **options) -> None:
    """Raises ValueError for options of a record's media that are wrong, or contradict each other or other settings.

    Args:
        images, videos: the processors whose settings apply.
        seconds: duration of each video, None if unknown.
        **options: options of a call to the processors.
    """
    if record.images:
        images.check(record.images, **options_of("image", options))
    if record.videos:
        videos.check(record.videos, seconds=seconds, **options_of("video", options))
