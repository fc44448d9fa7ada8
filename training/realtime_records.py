"""Realtime streams in training records: the tokens that a session feeds and writes, their labels, and the frames.

    system, user, assistant\\n | <|silence|> | frame | <|response|> Red <|silence|> | frame | <|silence|>
    not learned                | learned     | not   | learned                      | not   | learned

A later turn of the user is fed as in a session, with a `<|silence|>` of its own that is not learned. The
`<|im_end|>` after a turn of the assistant is not learned.
"""

import re
from dataclasses import dataclass, field
from functools import partial

import torch

from moss_vl.checks import shorten
from moss_vl.conversation import PLACEHOLDER, PLACEHOLDERS, read_medium
from moss_vl.options import options_of
from moss_vl.realtime_protocol import RESPONSE, SILENCE, SYSTEM_PROMPT, Protocol
from moss_vl.tools.live_sources import frames_at
from moss_vl.training.records import Record, try_record


FRAME = PLACEHOLDERS["video"]
PIECES = re.compile("(" + "|".join(map(re.escape, (SILENCE, RESPONSE, FRAME))) + ")")
ANY_VOCABULARY = 1 << 31  # of the model, which is not loaded when records are checked
OPENS, TOLD, SEES, SILENT, REPLIES = "open", "told", "sees", "silent", "replies"  # what came before a piece


@dataclass
class StreamText:
    """The tokens of a stream: `ids`, and for each of them whether it is learned."""

    ids: list[int] = field(default_factory=list)
    learned: list[bool] = field(default_factory=list)

    def add(self, ids: list[int], learned: bool = False) -> None:
        self.ids += ids
        self.learned += [learned] * len(ids)


def read_stream(record: Record, processor, template: bool = True) -> StreamText:
    """The tokens of a record that is a stream.

    Raises:
        ValueError: for a tokenizer without the tokens of the protocol, and for a record that no session could make.
    """
    if not template:
        raise ValueError("a stream needs the chat template; leave out --no-template")
    protocol = make_protocol(processor)
    _check_turns(record, protocol)
    times = iter(frame_times(record))
    messages = [*record.messages]
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else SYSTEM_PROMPT
    opening = messages.pop(0)["content"]
    text = StreamText()
    text.add(protocol.opening([{"role": "system", "content": system}, {"role": "user", "content": opening}]))
    state, before = OPENS, "user"
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "user":
            text.add(protocol.prompt_block(content))
            state = TOLD
        elif role == before:
            raise ValueError("two turns of the assistant follow each other; expected one turn until a prompt comes")
        else:
            if state is TOLD:  # the silence after a prompt is fed, whether the record has it or not
                content = content.removeprefix(SILENCE)
            _add_turn(text, protocol, content, times, state, message.get("loss", True))
        before = role
    if not any(text.learned):
        raise ValueError("the stream has nothing to learn: no decision follows a frame or a prompt")
    return text


def make_protocol(processor) -> Protocol:
    """Raises ValueError for a tokenizer without the tokens of the protocol."""
    return Protocol(processor, ANY_VOCABULARY)


def _check_turns(record: Record, protocol: Protocol) -> None:
    """Raises ValueError for what a stream cannot have: tools, images, and media outside the assistant's turns."""
    if record.tools is not None or any(
        message["role"] == "tool" or "tool_calls" in message for message in record.messages
    ):
        raise ValueError("a stream has no tools, got tools or a turn of a tool; leave them out")
    if record.images:
        raise ValueError(
            f"a stream has no images, got {len(record.images)}; expected its frames as segments of videos"
        )
    for index, message in enumerate(record.messages):
        if message["role"] != "assistant" and (found := PLACEHOLDER.search(message["content"])):
            raise ValueError(
                f"turn {index} of a stream, the {message['role']}'s, holds {found[0]!r}; expected frames in turns of "
                "the assistant"
            )


def _add_turn(text: StreamText, protocol: Protocol, content: str, times, state: str, learned: bool) -> None:
    """Adds a turn of the assistant. Raises ValueError where a session could not write it."""
    names = {SILENCE: protocol.tokens.silence, RESPONSE: protocol.tokens.response}
    for piece in PIECES.split(content):
        if piece == FRAME:
            text.add(protocol.frame_block(next(times)))
            state = SEES
        elif piece in names:
            if state is SILENT:
                raise ValueError(
                    f"{piece} follows {SILENCE}; expected {FRAME} or the end: a silent session waits for a frame or a "
                    "prompt"
                )
            text.add([names[piece]], learned)
            state = SILENT if piece == SILENCE else REPLIES
        elif piece:
            if state is not REPLIES:
                raise ValueError(
                    f"the assistant's {shorten(piece)} does not follow {RESPONSE}; expected {SILENCE}, or {RESPONSE} "
                    "and a text, without spaces or line breaks between them and frames"
                )
            ids = protocol.encode(piece)
            if special := [protocol.tokens.special[token] for token in ids if token in protocol.tokens.special]:
                raise ValueError(f"the assistant's text holds {special[0]!r}; expected words alone")
            text.add(ids, learned)


def frame_times(record: Record) -> list[float]:
    """The seconds of all frames of a stream. Raises ValueError unless each is a segment [time], and none falls."""
    times = []
    for video in record.videos:
        source, options = read_medium("video", video)
        segments = options.pop("segments", None)
        if segments is None or options or isinstance(source, list):
            raise ValueError(
                "a video of a stream must be {'video_path', 'segments': [[time], ...]} without other options, got "
                f"{shorten(video)}"
            )
        for segment in segments:
            if len(segment) != 1 or segment[0] < (times[-1] if times else 0):
                raise ValueError(
                    f"a segment of a stream must be [time], in seconds that do not fall, got {shorten(segment)}"
                )
            times.append(float(segment[0]))
    placeholders = sum(message["content"].count(FRAME) for message in record.messages)
    if placeholders != len(times):
        raise ValueError(
            f"the assistant's turns have {placeholders} {FRAME}, but the videos have {len(times)} segments; expected "
            "as many"
        )
    return times


def read_frames(record: Record, processor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels [P, values] and grids [frames, 3] of the frames of a stream, each by the image processor, as in a
    session.

    Raises:
        ValueError: for a frame that cannot be decoded.
    """
    options, pixels, grids = options_of("image", options), [], []
    for video in record.videos:
        source, given = read_medium("video", video)
        times, found = [float(segment[0]) for segment in given["segments"]], 0
        for item in frames_at(source, times):
            frame = processor.image_processor.preprocess([item.image], **options)
            pixels.append(frame["pixel_values"])
            grids.append(frame["image_grid_thw"])
            found += 1
        if found != len(times):
            raise ValueError(f"{shorten(source)}: {len(times) - found} of its {len(times)} frames cannot be decoded")
    if not pixels:
        blank = processor("x", return_tensors="pt", grid_name="grid_thw", blank_medium=True)
        return blank["pixel_values"], blank["grid_thw"]
    return torch.cat(pixels), torch.cat(grids)


def count_decisions(records: list[Record], processor, skip_bad: bool = False) -> tuple[int, int]:
    """How many `<|silence|>` and `<|response|>` are learned in the streams among these records, without bad ones if
    they are skipped."""
    counts, tokens = [0, 0], make_protocol(processor).tokens
    for record in records:
        text = try_record(record, partial(read_stream, processor=processor), skip_bad) if record.is_stream else None
        if text is not None:
            learned = [token for token, is_learned in zip(text.ids, text.learned, strict=True) if is_learned]
            counts = [counts[0] + learned.count(tokens.silence), counts[1] + learned.count(tokens.response)]
    return counts[0], counts[1]
