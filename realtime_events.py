"""What a realtime stream reports: one event per thing that happened."""

from dataclasses import dataclass
from typing import Optional


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened in a stream.

    Attributes:
        seconds: the time of the newest frame that the stream has taken in; None before the first frame.
    """

    seconds: Optional[float] = None

    @property
    def raw(self) -> str:
        """What the event adds to the raw output: the text of the tokens that the model wrote, and `<|round_start|>`
        before the answer to a prompt."""
        return ""


@dataclass(frozen=True, kw_only=True)
class PromptTaken(Event):
    """A prompt of the user is in the cache. The initial prompt counts if it is not empty."""

    text: str

    @property
    def raw(self) -> str:
        return "<|round_start|>"


@dataclass(frozen=True, kw_only=True)
class FrameTaken(Event):
    """A frame is in the cache; `seconds` is its time. `vision_tokens` counts its separator as well."""

    vision_tokens: int


@dataclass(frozen=True, kw_only=True)
class FrameDropped(Event):
    """A frame was dropped before the model saw it, because the queue of frames was full. `dropped` is its time."""

    dropped: float


@dataclass(frozen=True, kw_only=True)
class Silence(Event):
    """The model decided to stay silent."""

    @property
    def raw(self) -> str:
        return "<|silence|>"


@dataclass(frozen=True, kw_only=True)
class ResponseBegins(Event):
    """The model wrote `<|response|>`. `continues` is True if it goes on with a reply that a frame interrupted."""

    continues: bool = False

    @property
    def raw(self) -> str:
        return "<|response|>"


@dataclass(frozen=True, kw_only=True)
class Text(Event):
    """A piece of a reply. Pieces end between characters, so the text of a reply is the pieces joined."""

    text: str

    @property
    def raw(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True)
class SpecialToken(Event):
    """The model wrote a special token without a meaning for an open stream, such as `<|im_end|>`."""

    text: str

    @property
    def raw(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True)
class ReplyEnds(Event):
    """A reply is over.

    Attributes:
        text: the whole reply.
        reason: "silence" or "im_end" for the token that ended it; "prompt" if a prompt of the user came;
            "interrupted"; "max_new_tokens"; "ended" if the source ended after the model had written `<|im_end|>`.
    """

    text: str
    reason: str

    @property
    def raw(self) -> str:
        return {"silence": "<|silence|>", "im_end": "<|im_end|>"}.get(self.reason, "")


@dataclass(frozen=True, kw_only=True)
class RolledOver(Event):
    """The stream started anew with the words of the conversation and the frames of its window.

    Attributes:
        reason: "idle", or "forced" if the text would have become too long.
        text_before, text_after: text tokens before and after.
        frames: frames of the window that the stream goes on with.
        words_dropped: oldest answers and prompts that were left out, because they were too long.
    """

    reason: str
    text_before: int
    text_after: int
    frames: int
    words_dropped: int = 0


@dataclass(frozen=True, kw_only=True)
class Parked(Event):
    """The stream waits, without computing, until a prompt or a frame comes."""


@dataclass(frozen=True, kw_only=True)
class Ended(Event):
    """The source has ended, the last reply is finished, and no more events come."""


@dataclass(frozen=True, kw_only=True)
class Failed(Event):
    """An error ended the stream, and no more events come."""

    error: BaseException

    @property
    def message(self) -> str:
        return str(self.error) or type(self.error).__name__
