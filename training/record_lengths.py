"""How many tokens a record has, without decoding its media: for --max-length, before training.

An image is one token, so only frames of videos must be counted. Their number is bounded from above by the options and
the duration in the header of a file. If this bound may exceed the limit, the file is indexed, which gives the exact
number.
"""

import math

from moss_vl.conversation import PLACEHOLDER
from moss_vl.options import options_of
from moss_vl.training.batches import render, separate
from moss_vl.training.realtime_records import read_stream
from moss_vl.training.record_media import header_seconds
from moss_vl.video_reading import is_decoded
from moss_vl.video_sampling import read_video_item


LONGEST_STAMP = "99999.9"  # seconds: more than a day
DURATION_ERROR = 1.05, 1.0  # durations of headers are wrong by less than this factor and these seconds


class LengthCheck:
    """Called with a record; raises ValueError if it has more than `limit` tokens.

    Args:
        processor: of the checkpoint.
        template: whether texts are rendered with the chat template.
        options: options of the processor.
        limit: most tokens.
    """

    def __init__(self, processor, template: bool, options: dict, limit: int):
        self.processor, self.template, self.limit = processor, template, limit
        self.video_options = options_of("video", options)
        self.seconds = {}  # path -> duration in the header, None if there is none
        self.frame_tokens = self._count(self._frame(LONGEST_STAMP))

    def __call__(self, record) -> None:
        if record.is_stream:
            count = len(read_stream(record, self.processor, self.template).ids)
        else:
            count = self._count_chat(record)
        if count > self.limit:
            raise ValueError(f"{count} tokens are more than --max-length {self.limit}")

    def _count_chat(self, record) -> int:
        """The tokens of a record; fewer for one that has too many."""
        text, spans = render(record, self.processor, self.template)
        text, _, separators = separate(text, spans, self.processor.tokenizer.pad_token)
        count = self._count(self._expand(text, None)) - len(separators)
        if record.videos and count <= self.limit and self._may_exceed(record, self.limit - count):
            count = self._count(self._expand(text, self._times(record))) - len(separators)
        return count

    def _count(self, text: str) -> int:
        return len(self.processor.tokenizer(text)["input_ids"])

    def _frame(self, stamp: str) -> str:
        names = self.processor
        return f"{names.time_start_token}{stamp} seconds{names.time_end_token}{names.image_token}"

    def _expand(self, text: str, times) -> str:
        """The text with what the processor writes for each medium; `times` of the frames of each clip, None for clips
        without frames."""
        clips, names = iter(times or ()), self.processor

        def write(match) -> str:
            if match[1] == "image":
                return names.image_token
            frames = "" if times is None else "".join(self._frame(f"{t:.1f}") for t in next(clips))
            return names.vision_start_token + frames + names.vision_end_token

        return PLACEHOLDER.sub(write, text)

    # frames

    def _times(self, record) -> list[list[float]]:
        """The times of the frames of each clip, by the index of each file."""
        times = []
        for plan in self.processor.video_processor.plan(record.videos, **self.video_options):
            if plan.times is not None:
                times.append(plan.times.tolist())
                continue
            real = plan.video.real_times()
            times.append((plan.indices / plan.video.rate if real is None else real[plan.indices]).tolist())
        return times

    def _may_exceed(self, record, tokens: int) -> bool:
        """Whether the frames of a record may need more tokens: by the options alone, then by the headers too."""
        return all(self._most_frames(record, probe) * self.frame_tokens > tokens for probe in (False, True))

    def _most_frames(self, record, probe: bool) -> float:
        """At least as many frames as the videos of a record have; infinite if it is unknown."""
        resolve = self.processor.video_processor.resolve
        items = [read_video_item(video, self.video_options, None, resolve) for video in record.videos]
        total = sum(self._most_of(item, probe) for item in items)
        if any("max_frames" in item.given or item.options.all_frames for item in items):
            return total
        return min(total, max(items[0].options.max_frames, sum(item.clips for item in items)))

    def _most_of(self, item, probe: bool) -> float:
        """At least as many frames as one video has. The clips of a video share `max_frames`, `num_frames` and
        `min_frames`, with at least one frame each."""
        options = item.options
        if is_decoded(item.source):
            return len(item.source) if item.segments(0.0) is None else math.inf
        if options.all_frames:
            return math.inf
        least = max(options.min_frames, item.clips)  # the shares of clips are rounded up to at least this many
        if options.num_frames is not None:
            return max(options.num_frames, item.clips) + least
        seconds = self._seconds_of(item, probe)
        if seconds is None:
            return max(options.max_frames, item.clips)
        wanted = sum(math.ceil(length * options.video_fps) for length in seconds)
        return min(wanted + least, max(options.max_frames, item.clips))

    def _seconds_of(self, item, probe: bool) -> list[float] | None:
        """At least the seconds of each clip of a video; None if they are unknown. Reads a header only to `probe`."""
        if item.explicit_segments:
            return [segment[-1] - segment[0] for segment in item.explicit_segments]
        if not probe:
            return None
        if item.source not in self.seconds:
            self.seconds[item.source] = header_seconds(item.source)
        duration = self.seconds[item.source]
        if duration is None:
            return None
        factor, margin = DURATION_ERROR
        longest = duration * factor + margin
        return [segment[-1] - segment[0] for segment in item.segments(longest) or [(0.0, longest)]]
