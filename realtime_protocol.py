"""The token stream that realtime checkpoints were trained on: token names, the system prompt, and the blocks that a
prompt and a frame become. Deviations of a single space make such a checkpoint fall silent.
"""

from dataclasses import dataclass

from .checks import check_characters, shorten
from .conversation import PLACEHOLDER


SILENCE, RESPONSE = "<|silence|>", "<|response|>"
IM_END, IMAGE_PAD = "<|im_end|>", "<|image_pad|>"
NEVER_WRITTEN = (IMAGE_PAD, "<|video_pad|>")  # tokens that stand for media; the model cannot make a frame
SYSTEM_PROMPT = (
    "You are a helpful AI assistant specializing in real-time video analysis. The video streams to you frame by "
    "frame. At every frame, you decide independently whether to respond or stay silent \u2014 output `<|silence|>` "
    "when nothing relevant has happened, and respond when the visual content warrants it."
)
HELD_TOKENS = 4  # bytes of the longest UTF-8 character; a token has at least one byte


@dataclass(frozen=True)
class RealtimeTokens:
    """Ids of the tokens of the protocol in a tokenizer.

    Attributes:
        special: all special tokens: id -> text.
    """

    silence: int
    response: int
    im_end: int
    image_pad: int
    never_written: tuple[int, ...]
    special: dict[int, str]

    @classmethod
    def of(cls, tokenizer, vocab_size: int) -> "RealtimeTokens":
        """Looks the tokens up by name.

        Args:
            vocab_size: of the model.

        Raises:
            ValueError: for a tokenizer that is not one of a realtime checkpoint, or not one of the model.
        """
        missing = [name for name in (SILENCE, RESPONSE) if not is_token(tokenizer, name)]
        if missing:
            raise ValueError(
                f"the tokenizer has no special token {' and no '.join(missing)}, so this is not a realtime "
                "checkpoint; expected a MOSS-VL-Realtime checkpoint and its processor"
            )
        added = tokenizer.added_tokens_decoder
        special = {index: str(token) for index, token in added.items() if token.special}
        special |= {tokenizer.convert_tokens_to_ids(name): name for name in (SILENCE, RESPONSE)}
        ids = {text: index for index, text in special.items()}
        if high := [text for text, index in ids.items() if index >= vocab_size]:
            raise ValueError(
                f"the tokenizer has ids for {', '.join(high)}, but the model has a vocabulary of {vocab_size} tokens; "
                "expected model and processor of one checkpoint"
            )
        never_written = tuple(ids[name] for name in NEVER_WRITTEN)
        return cls(ids[SILENCE], ids[RESPONSE], ids[IM_END], ids[IMAGE_PAD], never_written, special)


def is_token(tokenizer, name: str) -> bool:
    """Whether the tokenizer has a token of this name, and finds it in texts."""
    index = tokenizer.convert_tokens_to_ids(name)
    return index is not None and tokenizer(name, add_special_tokens=False)["input_ids"] == [index]


class Protocol:
    """Turns prompts, frames and conversations into token ids."""

    def __init__(self, processor, vocab_size: int):
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.tokens = RealtimeTokens.of(self.tokenizer, vocab_size)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def opening(self, messages: list[dict]) -> list[int]:
        """The chat template of a conversation, with the generation prompt."""
        return self.encode(self.processor.apply_chat_template(messages, add_generation_prompt=True))

    def prompt_block(self, prompt: str) -> list[int]:
        """A prompt within an open stream. It ends the turn of the assistant, and begins the next."""
        return self.encode(
            f"<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n<|silence|>",
        )

    def frame_block(self, seconds: float) -> list[int]:
        return self.encode(
            f"<|vision_start|><|time_start|>{seconds:.1f} seconds<|time_end|><|image_pad|><|vision_end|>"
        )

    def check_prompt(self, name: str, prompt) -> str:
        """The prompt. Raises ValueError unless it is text without the tokens of media."""
        if not isinstance(prompt, str):
            raise ValueError(f"{name} must be a string, got {shorten(prompt)}")
        if found := PLACEHOLDER.search(prompt):
            raise ValueError(f"{name} holds {found[0]!r}, which stands for a medium; give frames with push_frame")
        return check_characters(name, prompt)


class TextPieces:
    """Joins tokens to text, and holds tokens back until the last character is complete."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.held: list[int] = []

    def add(self, token: int) -> str:
        """The text that is complete after this token; it may be empty."""
        self.held.append(token)
        text = self.tokenizer.decode(self.held)
        if text.endswith("\ufffd") and len(self.held) < HELD_TOKENS:
            return ""
        self.held = []
        return text

    def drop(self) -> None:
        """Drops the bytes of a character that was never completed."""
        self.held = []
