"""`pipeline("text-generation")` for MOSS-VL, for text without media."""

from copy import copy
from typing import Any, Optional

from transformers import TextGenerationPipeline


PLACEHOLDERS = ("<|image|>", "<|video|>", "<|image_pad|>", "<|video_pad|>")


class MossVLTextGenerationPipeline(TextGenerationPipeline):
    """The pipeline of transformers with two changes. `MossVLConfig.custom_pipelines` registers it.

    It refuses media: it has a tokenizer but no processor, so the model would get the placeholder of an image, but not
    the image. And it pads batches on the left, as `generate` needs them, with a copy of the tokenizer: transformers
    4.57 keeps the padding side of the caller's tokenizer, transformers 5 changes it.
    """

    def __init__(self, model, tokenizer=None, *args, **kwargs):
        if tokenizer is None:
            tokenizer = getattr(kwargs.get("processor"), "tokenizer", None)
        if tokenizer is not None and tokenizer.padding_side != "left":
            tokenizer = copy(tokenizer)
            tokenizer.padding_side = "left"
        super().__init__(model, tokenizer, *args, **kwargs)

    def preprocess(self, prompt_text, *args, **kwargs) -> dict[str, Any]:
        """The tokens of a text or chat.

        Raises:
            ValueError: if there are media or their placeholders.
        """
        refuse_media(media_part(prompt_text))
        inputs = super().preprocess(prompt_text, *args, **kwargs)
        text = self.tokenizer.decode(inputs["input_ids"][0])
        refuse_media(next((f"the placeholder {name}" for name in PLACEHOLDERS if name in text), None))
        return inputs


def media_part(prompt_text) -> Optional[str]:
    """Describes the first content part of a chat that is not text; None if there is none."""
    for message in getattr(prompt_text, "messages", ()):
        content = message["content"]
        for part in content if isinstance(content, (list, tuple)) else ():
            if isinstance(part, dict) and part.get("type") != "text":
                return f"a content part of type {part.get('type')!r}"
    return None


def refuse_media(found: Optional[str]) -> None:
    if found is not None:
        raise ValueError(
            f"pipeline('text-generation') got {found}; expected text alone, because this pipeline passes no "
            f"media to the model. Use pipeline('image-text-to-text'), or the model with its processor."
        )
