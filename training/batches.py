"""Turns records into batches: text with the spans to learn, the tensors of a sample, and samples collated to a batch.

Axes: B samples, T tokens, P patches. `RecordDataset` works in data-loader workers.
"""

from logging import getLogger

import torch
from jinja2.exceptions import TemplateError

from moss_vl.training.realtime_records import read_frames, read_stream
from moss_vl.training.records import Record, check_media_options


logger = getLogger(__name__)

TURN_END = "<|im_end|>"
IGNORED = -100  # label of tokens without a loss


class BadRecord(ValueError):
    """A record whose error was found only when it was encoded. The message names the record."""


def report_bad(problem: str, skip_bad: bool, cause: Exception) -> None:
    """Warns of a bad record that is skipped; raises BadRecord for one that is not. `problem`: its place and error."""
    if not skip_bad:
        raise BadRecord(f"{problem}. Fix it, or skip such records with --skip-bad.") from cause
    logger.warning("%s. The next record is used instead.", problem)


def render(record: Record, processor, template: bool = True) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and the [start, end) characters of each learned turn of the assistant, with its tool
    calls and the token that ends it.

    Args:
        template: whether to render the chat template. Without it, contents are concatenated, and `eos_token` ends
            those of the assistant.

    Raises:
        ValueError: if the template does not accept the conversation, does not know tools that it has, or renders a
            turn differently when others follow; without a template, for a system turn and for tools.
    """
    if not template:
        return _concatenate(record, processor.tokenizer.eos_token)
    messages = [{name: value for name, value in message.items() if name != "loss"} for message in record.messages]
    tools = {} if record.tools is None else {"tools": record.tools}
    _check_calls(messages, processor)

    def rendered(messages, **options):
        try:
            return processor.apply_chat_template(messages, tokenize=False, **tools, **options)
        except TemplateError as error:
            raise ValueError(f"the chat template does not accept this conversation: {error}") from None

    text, spans = rendered(messages), []
    for turn, message in enumerate(record.messages):
        if message["role"] == "assistant" and message.get("loss", True):
            prompt = rendered(messages[:turn], add_generation_prompt=True)
            end = text.find(TURN_END, len(prompt))
            if not text.startswith(prompt) or end < 0:
                raise ValueError(
                    f"the chat template renders turn {turn} differently from its generation prompt, or does not end "
                    f"it with {TURN_END}, so the tokens to learn cannot be found; expected ChatML"
                )
            spans.append((len(prompt), end + len(TURN_END)))
    return text, spans


def _check_calls(messages: list[dict], processor) -> None:
    """Raises ValueError if there are tool calls and the chat template does not render them."""
    if any("tool_calls" in message for message in messages) and "tool_calls" not in str(processor.chat_template):
        raise ValueError(
            "the conversation has tool calls, but the chat template of the checkpoint does not read tool_calls; add "
            "them to chat_template.jinja"
        )


def _concatenate(record: Record, eos_token: str) -> tuple[str, list[tuple[int, int]]]:
    text, spans = "", []
    for message in record.messages:
        if message["role"] == "system":
            raise ValueError(
                "a system turn needs the chat template; leave out --no-template, or move its text into the prompt"
            )
        if record.tools is not None or message["role"] == "tool" or "tool_calls" in message:
            raise ValueError("tools need the chat template; leave out --no-template, or the tools")
        start = len(text)
        text += message["content"]
        if message["role"] == "assistant":
            text += eos_token
            if message.get("loss", True):
                spans.append((start, len(text)))
    return text, spans


def check_record(record: Record, processor, template: bool = True, **options) -> None:
    """Raises ValueError for what can be known to be bad without decoding media.

    Args:
        options: those of the processor for images and videos.
    """
    if record.is_stream:
        read_stream(record, processor, template)
        return
    render(record, processor, template)
    check_media_options(record, processor.image_processor, processor.video_processor, **options)


def encode(
    record: Record,
    processor,
    template: bool = True,
    max_length: int | None = None,
    pixel_dtype=torch.float32,
    **options,
) -> dict:
    """One sample: `input_ids` and `labels` [T], `pixel_values` [P, 3 * t * p * p], `grid_thw` [media, 3], and the
    `weight` of the record.

    A record without media gets a blank medium.

    Args:
        options: options of the processor for images and videos.

    Raises:
        ValueError: for more than `max_length` tokens.
        Errors of the processor.
    """
    make = _encode_stream if record.is_stream else _encode_chat
    sample = make(record, processor, template, **options)
    if max_length is not None and len(sample["input_ids"]) > max_length:
        raise ValueError(f"{len(sample['input_ids'])} tokens are more than --max-length {max_length}")
    sample["labels"][0] = IGNORED  # no token predicts the first one, so the mean must not count it
    return {**sample, "pixel_values": sample["pixel_values"].to(pixel_dtype), "weight": record.weight}


def _encode_stream(record: Record, processor, template: bool, **options) -> dict:
    text = read_stream(record, processor, template)
    ids, learned = torch.tensor(text.ids), torch.tensor(text.learned)
    pixels, grids = read_frames(record, processor, **options)
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(~learned, IGNORED),
        "pixel_values": pixels,
        "grid_thw": grids,
    }


def _encode_chat(record: Record, processor, template: bool, **options) -> dict:
    text, spans = render(record, processor, template)
    tokenizer = processor.tokenizer
    text, spans, separators = separate(text, spans, tokenizer.pad_token)
    inputs = processor(
        text=text,
        images=record.images or None,
        videos=record.videos or None,
        labels_spans=[spans],
        ignore_index=IGNORED,
        return_tensors="pt",
        grid_name="grid_thw",  # whatever the processor's settings are
        blank_medium=True,
        **options,
    )
    ids, labels = inputs["input_ids"][0], inputs["labels"][0]
    kept = torch.ones_like(ids, dtype=torch.bool)
    kept[torch.nonzero(ids == tokenizer.pad_token_id)[separators, 0]] = False
    return {
        "input_ids": ids[kept],
        "labels": labels[kept],
        "pixel_values": inputs["pixel_values"],
        "grid_thw": inputs["grid_thw"],
    }


def separate(text: str, spans, separator: str) -> tuple[str, list[tuple[int, int]], list[int]]:
    """Puts `separator`, a special token, before each span, so that no token crosses the start of a span.

    Generation tokenizes a response separately from its prompt, so training must do the same: "?" and "blue" must not
    become one token. The caller removes the separators after tokenization.

    Returns:
        The text, the spans in it, and for each added separator its index among all separators of the text.
    """
    pieces, moved, indices, end = [], [], [], 0
    for count, (start, stop) in enumerate(spans, start=1):
        pieces += [text[end:start], separator]
        end = start
        moved.append((start + count * len(separator), stop + count * len(separator)))
        indices.append(sum(piece.count(separator) for piece in pieces) - 1)
    return "".join([*pieces, text[end:]]), moved, indices


class RecordDataset(torch.utils.data.Dataset):
    """Records as samples, decoded and preprocessed on access.

    Args:
        records, processor: see `read_records` and `MossVLProcessor`. The processor is not changed.
        skip_bad: replace a record that encoding shows to be bad (too long, undecodable) by the next good one, with a
            warning; otherwise it is a BadRecord.
        **options: those of `encode`.
    """

    def __init__(self, records: list[Record], processor, skip_bad: bool = False, **options):
        self.records, self.processor, self.skip_bad, self.options = records, processor, skip_bad, options
        self.bad = set()  # indices of records that failed in this process; they are not tried again

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self.records):  # ends a loop over the data set
            raise IndexError(f"there is no record {index}; expected 0 to {len(self.records) - 1}")
        problem = ""
        for candidate in range(index, index + len(self.records)):
            candidate %= len(self.records)
            if candidate in self.bad:
                continue
            try:
                return encode(self.records[candidate], self.processor, **self.options)
            except (ValueError, OSError) as error:
                problem = f"{self.records[candidate].where}: {error}"
                report_bad(problem, self.skip_bad, error)
                self.bad.add(candidate)
        raise BadRecord(f"none of the {len(self.records)} records can be used. {problem}")


class Collator:
    """Collates samples of `encode` into the inputs of the model.

    These are `input_ids`, `attention_mask` and `labels` [B, T], padded on the right; `pixel_values` and `grid_thw` of
    all media, packed; `media_nums_per_sample`; and `logits_to_keep`, which omits the logits before the first learned
    token: for the prompt of a long video they would be the largest tensor. There is no `cross_attention_mask` (T x
    frames): the model derives it from the text. If a weight of a record is not 1, `record_weights` [B] is there too,
    for `record_trainer.RecordTrainer`: the model does not take it.

    Args:
        pad_token_id: the tokenizer's.
        vision_chunked_length: frames that the vision encoder takes at once; None for the model's default.
    """

    def __init__(self, pad_token_id: int, vision_chunked_length: int | None = None):
        self.pad_token_id, self.vision_chunked_length = pad_token_id, vision_chunked_length

    def __call__(self, samples: list[dict]) -> dict:
        def padded(name, value):
            rows = [sample[name] for sample in samples]
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

        labels = padded("labels", IGNORED)
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        first = int((labels != IGNORED).any(0).nonzero()[0])  # predicted by the token before it
        batch = {
            "input_ids": padded("input_ids", self.pad_token_id),
            "attention_mask": (torch.arange(labels.shape[1]) < lengths[:, None]).long(),
            "labels": labels,
            "pixel_values": torch.cat([sample["pixel_values"] for sample in samples]),
            "grid_thw": torch.cat([sample["grid_thw"] for sample in samples]),
            "media_nums_per_sample": [len(sample["grid_thw"]) for sample in samples],
            "logits_to_keep": labels.shape[1] - first + 1,
            "use_cache": False,
        }
        weights = torch.tensor([sample["weight"] for sample in samples])
        if (weights != 1).any():
            batch["record_weights"] = weights
        if self.vision_chunked_length is not None:
            batch["vision_chunked_length"] = self.vision_chunked_length
        return batch
