"""Where the words of an answer looked: weights of the cross-attention layers per frame, drawn over the frames.

    [state] = model.offline_batch_generate(processor, [query], keep_cache=True)["session_states"]
    word = answer_words(processor, state.kept, answer)[3]
    weights = word_attention(model, state.kept, word.tokens)
    frames = SeenFrames.read(processor, state.kept)
    picture = draw_map(frames.image(0), weights.maps[0], weights.peak)

The weights are those of the step that chose a token. One token is computed again, on a fork of the kept cache: vision
keys are neither copied nor computed, and nothing has the size text x vision.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image


SIDE = 448  # pixels of the longer side of a picture
COLOURS = ((0x2C, 0x10, 0x7E), (0xB5, 0x2A, 0x7A), (0xF9, 0x73, 0x16), (0xFD, 0xE0, 0x47))  # low to high weights
OPACITY = (0.25, 0.8)  # of the colours at weight 0 and at the peak
UNSPACED = "\u2e80"  # from here on, scripts such as Chinese write no spaces between words
TIME = re.compile(r"(\d+\.\d) seconds\D*$")


# words


class AnswerWord(NamedTuple):
    """A word of an answer.

    Attributes:
        text: the word, with the white space before it.
        tokens: indices, in the conversation, of the tokens that wrote it.
    """

    text: str
    tokens: tuple[int, ...]


def answer_words(processor, kept, answer: str) -> list[AnswerWord]:
    """The words of an answer. Their texts join to the answer.

    Args:
        kept: the kept cache that ends with the answer, `state.kept`.
        answer: the text of the answer.
    """
    [prompt] = processor.tokenizer([kept.expanded], padding=False, truncation=False, verbose=False)["input_ids"]
    return group_words(processor.tokenizer, kept.ids, len(prompt), answer)


def group_words(tokenizer, ids: Sequence[int], start: int, answer: str) -> list[AnswerWord]:
    """The words of an answer whose tokens begin at index `start` of `ids`. The last token of an answer that was cut
    off is not in the cache; it wrote what the tokens in the cache lack."""
    pieces: list[tuple[str, list[int]]] = []
    waiting: list[int] = []  # tokens that end within a character
    for index in range(start, len(ids)):
        waiting.append(index)
        text = tokenizer.decode(
            [ids[one] for one in waiting], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            pieces.append((text, waiting))
            waiting = []
    written = "".join(text for text, _ in pieces)
    pieces.append((answer[len(written) :] if answer.startswith(written) else "", waiting or [len(ids)]))

    words: list[list[tuple[str, list[int]]]] = []  # parts of each word
    for text, tokens in pieces:
        for part in re.findall(r"\s*\S+|\s+", text):
            if words and _continues(words[-1][-1][0], part):
                words[-1].append((part, tokens))
            else:
                words.append([(part, tokens)])
    return [_joined(parts) for word in words for parts in _without_punctuation(word) if parts]


def _continues(before: str, part: str) -> bool:
    """Whether a part belongs to the word that ends with `before`. Scripts without spaces have a word per part."""
    return before.isspace() or (not part[0].isspace() and before[-1] < UNSPACED and part[0] < UNSPACED)


def _without_punctuation(parts: list[tuple[str, list[int]]]) -> tuple[list, list]:
    """A word, and the punctuation at its end that has tokens of its own."""
    end = len(parts)
    while end and not any(letter.isalnum() for letter in parts[end - 1][0]):
        end -= 1
    return (parts[:end], parts[end:]) if end else (parts, [])


def _joined(parts: list[tuple[str, list[int]]]) -> AnswerWord:
    tokens = dict.fromkeys(token for _, tokens in parts for token in tokens)
    return AnswerWord("".join(text for text, _ in parts), tuple(tokens))


# weights


class FrameWeights(NamedTuple):
    """Where a word looked, averaged over its tokens, the cross-attention layers and their heads. All weights sum to 1.

    Attributes:
        maps: for each frame, the weights [H, W] of its vision tokens on the merged grid.
        separators: the weight [N] of the separator after each frame.
    """

    maps: list[np.ndarray]
    separators: np.ndarray

    @property
    def peak(self) -> float:
        """The largest weight of all maps."""
        return max(float(one.max()) for one in self.maps)

    @property
    def shares(self) -> list[float]:
        """The part of the attention that each frame got, separators left out."""
        return [float(one.sum()) for one in self.maps]


def word_attention(model, kept, tokens: Sequence[int]) -> FrameWeights:
    """Where the model looked when it chose these tokens.

    Args:
        kept: a kept cache, `state.kept`. It is not changed, and may be used by other threads meanwhile.
        tokens: indices of tokens of the conversation.

    Raises:
        ValueError: without tokens, for an index outside of the conversation, and for a conversation without frames.
    """
    cache, ids = kept.cache, kept.ids
    if cache is None:
        raise ValueError("the cache of the conversation was dropped; ask again")
    if not tokens or not all(1 <= index <= len(ids) for index in tokens):
        raise ValueError(f"tokens must be indices between 1 and {len(ids)}, the length of the text; got {tokens!r}")
    if not kept.frames:
        raise ValueError("the conversation has no image and no video, so no word looked at one")
    layer = cache.layers[model.config.text_config.cross_attention_layers[0]]
    grids = layer.state.grids[0]
    weights = torch.stack([_step_weights(model, cache, ids, index) for index in tokens]).mean(0)
    assert len(weights) == sum(height * width + 1 for height, width in grids), "an answer sees all of its frames"
    maps, separators = [], []
    for (height, width), part in zip(grids, weights.split([h * w + 1 for h, w in grids]), strict=True):
        maps.append(part[:-1].view(height, width).numpy())
        separators.append(float(part[-1]))
    return FrameWeights(maps, np.array(separators))


@torch.no_grad()
def _step_weights(model, cache, ids: Sequence[int], index: int) -> torch.Tensor:
    """The weights [V] of the step that chose token `index`: that of the token before it."""
    fork = model.fork_cache(cache)
    if unused := fork.get_seq_length() - (index - 1):
        fork.crop(-unused)
    token = torch.tensor([[ids[index - 1]]], device=model.get_input_embeddings().weight.device)
    layers = model(token, past_key_values=fork, output_attentions=True).cross_attentions
    return torch.stack([weights[0, :, 0].float().mean(0).cpu() for weights in layers]).mean(0)


# frames


class SeenFrames(NamedTuple):
    """The frames of a conversation, as the model saw them.

    Attributes:
        patches: uint8 [P, values] of all media.
        grids: patch rows and columns of each frame.
        seconds: the time of each frame; None for an image.
        patch_size, merge_size: of the patches.
    """

    patches: torch.Tensor
    grids: list[tuple[int, int]]
    seconds: list[float | None]
    patch_size: int
    merge_size: int

    @classmethod
    def read(cls, processor, kept) -> "SeenFrames":
        """Decodes the media of a kept cache again, with the options that they had."""
        inputs = processor(
            text=kept.text,
            images=kept.images or None,
            videos=kept.videos or None,
            images_kwargs=kept.images_kwargs if kept.images else {},
            videos_kwargs=kept.videos_kwargs if kept.videos else {},
            return_tensors="pt",
            grid_name="grid_thw",
            do_normalize=False,
        )
        grids = [(height, width) for t, height, width in inputs["grid_thw"].tolist() for _ in range(t)]
        times = [TIME.search(part[-40:]) for part in kept.expanded.split(processor.image_token)[:-1]]
        settings = processor.image_processor
        return cls(
            inputs["pixel_values"],
            grids,
            [None if time is None else float(time[1]) for time in times],
            settings.patch_size,
            settings.merge_size,
        )

    def image(self, number: int) -> Image.Image:
        """The frame `number`. Undoes `patchify` of patches.py for it."""
        first = sum(height * width for height, width in self.grids[:number])
        (height, width), p, m = self.grids[number], self.patch_size, self.merge_size
        blocks = self.patches[first : first + height * width].view(height // m, width // m, m, m, 3, -1, p, p)
        # [Y, X, my, mx, c, t, py, px] -> [Y, my, py, X, mx, px, c], the first of t
        pixels = blocks[:, :, :, :, :, 0].permute(0, 2, 5, 1, 3, 6, 4)
        return Image.fromarray(pixels.reshape(height * p, width * p, 3).numpy())


def draw_map(image: Image.Image, weights: np.ndarray, peak: float) -> Image.Image:
    """Weights [H, W] as colours over a frame.

    Args:
        peak: the weight that gets the brightest colour.
    """
    scale = SIDE / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    heat = Image.fromarray((weights / max(peak, 1e-12)).astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    heat = np.asarray(heat).clip(0, 1)
    steps = np.linspace(0, 1, len(COLOURS))
    colours = np.stack([np.interp(heat, steps, channel) for channel in zip(*COLOURS, strict=True)], axis=-1)
    opacity = OPACITY[0] + (OPACITY[1] - OPACITY[0]) * heat
    return Image.composite(
        Image.fromarray(colours.round().astype(np.uint8)),
        image.resize(size, Image.Resampling.BICUBIC),
        Image.fromarray((255 * opacity).round().astype(np.uint8)),
    )
