"""Records to batches: the text with the spans that are learned, the tensors of one sample, samples of any sizes as one batch.

Axes: B samples, T tokens, P patches. Imported by the scripts beside it; `RecordDataset` does its work in data-loader workers.
"""

from logging import getLogger

import torch
from jinja2.exceptions import TemplateError

from moss_vl.training.records import Record


logger = getLogger(__name__)

TURN_END = "<|im_end|>"
IGNORED = -100  # the label of what is not learned


class BadRecord(ValueError):
    """A record that turned out bad only when it was encoded; the message names it."""


def render(record: Record, processor, template: bool = True) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and the [start, end) characters of what the assistant says, the token that ends it included.

    Args:
        template: render the chat template; without it the contents follow each other bare, and `eos_token` ends an assistant's.

    Raises ValueError where the template does not take the conversation, or writes turns otherwise when others follow; without a
    template, for a system turn.
    """
    if not template:
        return _bare(record.messages, processor.tokenizer.eos_token)

    def written(messages, **how):
        try:
            return processor.apply_chat_template(messages, tokenize=False, **how)
        except TemplateError as error:
            raise ValueError(f"the chat template does not take this conversation: {error}") from None

    text, spans = written(record.messages), []
    for turn, message in enumerate(record.messages):
        if message["role"] == "assistant":
            asked = written(record.messages[:turn], add_generation_prompt=True)
            end = text.find(TURN_END, len(asked))
            if not text.startswith(asked) or end < 0:
                raise ValueError(
                    f"the chat template writes turn {turn} otherwise than it asks for one, or does not end it with {TURN_END}, so "
                    f"that what is learned cannot be told; expected ChatML"
                )
            spans.append((len(asked), end + len(TURN_END)))
    return text, spans


def _bare(messages: list[dict], eos_token: str) -> tuple[str, list[tuple[int, int]]]:
    text, spans = "", []
    for message in messages:
        if message["role"] == "system":
            raise ValueError(
                "a system turn needs the chat template; leave out --no-template, or put its words into the prompt"
            )
        start = len(text)
        text += message["content"]
        if message["role"] == "assistant":
            text += eos_token
            spans.append((start, len(text)))
    return text, spans


def encode(
    record: Record, processor, template: bool = True, max_length: int | None = None, pixel_dtype=torch.float32, **knobs
) -> dict:
    """One sample: `input_ids` and `labels` [T], `pixel_values` [P, 3 * t * p * p] in `pixel_dtype` and `grid_thw` [media, 3] (of
    the processor's blank medium, where the record has none).

    `knobs` are the processor's, for images and videos. Raises what the processor raises, and ValueError for more than `max_length`
    tokens.
    """
    text, spans = render(record, processor, template)
    # A response is tokenised as the model will write it, behind a prompt that has ended: "?" and "blue" shall not become one
    # token. A special token before each span keeps them apart, and is taken out again.
    tokenizer = processor.tokenizer
    cut, done, pieces, moved, cuts = tokenizer.pad_token, 0, [], [], []
    for count, (start, end) in enumerate(spans, start=1):
        pieces += [text[done:start], cut]
        done = start
        moved.append((start + count * len(cut), end + count * len(cut)))
        cuts.append(sum(piece.count(cut) for piece in pieces) - 1)
    inputs = processor(
        text="".join([*pieces, text[done:]]),
        images=record.images or None,
        videos=record.videos or None,
        labels_spans=[moved],
        ignore_index=IGNORED,
        return_tensors="pt",
        grid_name="grid_thw",  # whatever the processor's own setting is
        **knobs,
    )
    ids, labels = inputs["input_ids"][0], inputs["labels"][0]
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[torch.nonzero(ids == tokenizer.pad_token_id)[cuts, 0]] = False
    ids, labels = ids[keep], labels[keep]
    if max_length is not None and len(ids) > max_length:
        raise ValueError(f"{len(ids)} tokens are more than --max-length {max_length}")
    labels[0] = IGNORED  # nothing stands before it to predict it, so that it would only be counted
    return {
        "input_ids": ids,
        "labels": labels,
        "pixel_values": inputs["pixel_values"].to(pixel_dtype),
        "grid_thw": inputs["grid_thw"],
    }


class RecordDataset(torch.utils.data.Dataset):
    """Records as samples, decoded and preprocessed when they are asked for.

    Args:
        records, processor: see `read_records` and `MossVLProcessor`. The processor is used as it is and stays as it is.
        skip_bad: a record that turns out bad only now (too long, undecodable) is replaced by the next good one, with a warning;
            else it is a BadRecord.
        **options: those of `encode`.
    """

    def __init__(self, records: list[Record], processor, skip_bad: bool = False, **options):
        self.records, self.processor, self.skip_bad, self.options = records, processor, skip_bad, options
        self.bad = set()  # that this process met: warned of once, not tried again

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        problem = ""
        for place in range(index, index + len(self.records)):
            place %= len(self.records)
            if place in self.bad:
                continue
            try:
                return encode(self.records[place], self.processor, **self.options)
            except (ValueError, OSError) as error:
                problem = f"{self.records[place].where}: {error}"
                if not self.skip_bad:
                    raise BadRecord(f"{problem}. Mend it, or leave such out with --skip-bad.") from error
                logger.warning("%s. The next record takes its place.", problem)
                self.bad.add(place)
        raise BadRecord(f"none of the {len(self.records)} records can be used. {problem}")


class Collator:
    """Samples of `encode` -> what the model takes: `input_ids`, `attention_mask`, `labels` [B, T], padded on the right with
    `pad_token_id`; `pixel_values` and `grid_thw` of all media behind each other; `media_nums_per_sample`.

    `logits_to_keep` leaves out the logits of the rows before the first learned token: of a long video's prompt they are the
    largest tensor. There is no `cross_attention_mask`, which would be T x frames: the model tells it from the text.

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
        first = int((labels != IGNORED).any(0).nonzero()[0])  # the row before it predicts it
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
        if self.vision_chunked_length is not None:
            batch["vision_chunked_length"] = self.vision_chunked_length
        return batch
