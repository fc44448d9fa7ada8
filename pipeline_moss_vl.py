"""`pipeline("text-generation")` for MOSS-VL: text alone."""

from copy import copy

from transformers import TextGenerationPipeline


PLACEHOLDERS = ("<|image|>", "<|video|>", "<|image_pad|>", "<|video_pad|>")


class MossVLTextGenerationPipeline(TextGenerationPipeline):
    """transformers' own, but for two things. `MossVLConfig.custom_pipelines` names this class.

    It refuses media: it has a tokenizer and no processor, so that of an image only the placeholder's text would reach the model, which
    would guess. It pads batches on the left, as `generate` needs them, with a tokenizer of its own: transformers 4.57 keeps the side of
    the tokenizer that it is given, transformers 5 writes the side into it.
    """

    def __init__(self, model, tokenizer=None, *args, **kwargs):
        if tokenizer is None:
            tokenizer = getattr(kwargs.get("processor"), "tokenizer", None)
        if tokenizer is not None and tokenizer.padding_side != "left":
            tokenizer = copy(tokenizer)
            tokenizer.padding_side = "left"
        super().__init__(model, tokenizer, *args, **kwargs)

    def preprocess(self, prompt_text, *args, **kwargs):
        """The tokens of a text or chat. Raises ValueError where it has media."""
        for message in getattr(prompt_text, "messages", ()):  # of a chat
            content = message["content"]
            types = (
                [part.get("type") for part in content if isinstance(part, dict)]
                if isinstance(content, (list, tuple))
                else []
            )
            self._refuse(next((f"a content part of type {kind!r}" for kind in types if kind != "text"), None))
        inputs = super().preprocess(prompt_text, *args, **kwargs)
        text = self.tokenizer.decode(inputs["input_ids"][0])
        self._refuse(next((f"the placeholder {name}" for name in PLACEHOLDERS if name in text), None))
        return inputs

    def _refuse(self, found):
        if found is not None:
            raise ValueError(
                f"pipeline('text-generation') got {found}; expected text alone, since this pipeline hands no media to the model. Use "
                f"pipeline('image-text-to-text'), or the model with its processor."
            )
