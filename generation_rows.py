"""Answers that are written token by token, beside each other: the rows of continuous batching.

transformers' `generate` prepares an answer (options, logits processors, stopping criteria, cache), and its prompt is
prefilled alone. The tokens of all rows are then computed by `decode_rows`, and chosen as `generate` chooses them. So a
row can start while others write, and leave when it ends.

Axes: R rows, T tokens of a row.
"""

from dataclasses import dataclass
from typing import Optional, Union

import torch
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TextStreamer,
)
from transformers.cache_utils import Cache, QuantizedCache
from transformers.generation import GenerationMode

from .cache_layers import CACHE, cached_length


ONE_TOKEN_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)  # those that add one token per call
JOINT_CACHES = (DynamicCache, StaticCache, QuantizedCache)
FREE_TOKENS = 256  # least number of free tokens in a new buffer of a row


class TokenBuffer:
    """The tokens of a row, `ids` [1, T], a view of a larger buffer. A new token copies earlier ones only if the buffer
    is full. `ids` of earlier times stay as they are."""

    def __init__(self, ids: torch.Tensor):
        self.ids, self._buffer = ids, None

    def append(self, token: torch.Tensor) -> torch.Tensor:
        """Appends a token [1], and returns all, [1, T]."""
        length = self.ids.shape[1]
        if self._buffer is None or self._buffer.shape[1] == length:
            self._buffer = self.ids.new_zeros(1, length + max(FREE_TOKENS, length // 4))
            self._buffer[:, :length] = self.ids
        self._buffer[:, length] = token
        self.ids = self._buffer[:, : length + 1]
        return self.ids


@dataclass
class AnswerRow:
    """An answer that is being written.

    Attributes:
        cache: the cache of the conversation; it holds all tokens but the last one.
        tokens: prompt and answer.
        prompt_length: tokens of the prompt.
        logits_processor, stopping_criteria: transformers' lists for this answer, with the caller's functions.
        do_sample: whether tokens are drawn; otherwise the most likely one is taken.
        max_length: most tokens of prompt and answer.
        eos_token_ids: tokens that end the answer.
        streamer: the caller's, or None.
        ended: whether a criterion has stopped the answer.
    """

    cache: Cache
    tokens: TokenBuffer
    prompt_length: int
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    do_sample: bool
    max_length: int
    eos_token_ids: list[int]
    streamer: Optional[object] = None
    ended: bool = False

    @property
    def answer_ids(self) -> list[int]:
        return self.tokens.ids[0, self.prompt_length :].tolist()

    def stream(self, token: int) -> None:
        """Passes a token to the caller's streamer."""
        if self.streamer is not None:
            self.streamer.put(torch.tensor([token]))
            if self.ended:
                self.streamer.end()

    def choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Chooses the next token from logits [1, vocab] and appends it.

        Returns:
            The token [1], and whether it is the last one, bool [1]. Nothing waits for the device.
        """
        ids = self.tokens.ids
        scores = self.logits_processor(ids, logits.to(copy=True, dtype=torch.float32, device=ids.device))
        if self.do_sample:
            token = torch.multinomial(scores.softmax(dim=-1), num_samples=1)[:, 0]
        else:
            token = scores.argmax(dim=-1)
        return token, self.stopping_criteria(self.tokens.append(token), None)


def start_row(model, inputs: dict, arguments: dict) -> Optional[tuple[AnswerRow, torch.Tensor]]:
    """Prefills the prompt of an answer.

    Args:
        inputs, arguments: keyword arguments of `generate`: a prompt of batch size 1, and all options.

    Returns:
        The row, and the logits [1, vocab] of its first token. None if the answer needs a method of `generate` that
        does not add one token per call to a cache (beams, assisted and contrastive decoding, `use_cache=False`, ...).

    Raises:
        ValueError: what `generate` raises for these arguments.
    """
    arguments = dict(arguments)
    streamer, tokenizer = arguments.pop("streamer", None), arguments.pop("tokenizer", None)
    stop_strings = arguments.pop("stop_strings", None)
    if stop_strings is not None:  # `generate` passes no tokenizer on with `custom_generate`
        criterion = StopStringCriteria(tokenizer=tokenizer, stop_strings=stop_strings)
        given = arguments.get("stopping_criteria", ())
        arguments["stopping_criteria"] = StoppingCriteriaList([*given, criterion])
    started = []

    def prefill(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        if not adds_single_tokens(generation_config, model_kwargs):
            return input_ids
        past_length = cached_length(model_kwargs.get(CACHE))
        call = model.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=input_ids.shape[1] - past_length,
            is_first_iteration=True,
            **model_kwargs,
        )
        outputs = model(**call, return_dict=True)
        row = AnswerRow(
            cache=outputs[CACHE],
            tokens=TokenBuffer(input_ids),
            prompt_length=input_ids.shape[1],
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            do_sample=generation_config.do_sample,
            max_length=generation_config.max_length,
            eos_token_ids=as_ids(generation_config.eos_token_id),
            streamer=streamer,
        )
        started.append((row, outputs.logits[:, -1]))
        return input_ids

    model.generate(**inputs, **arguments, custom_generate=prefill)
    if not started:
        return None
    if streamer is not None:
        streamer.put(inputs["input_ids"].cpu())
    return started[0]


def adds_single_tokens(generation_config, model_kwargs: dict) -> bool:
    """Whether `generate` would add one token per call to a cache that a joint call takes."""
    cache = model_kwargs.get(CACHE)
    return (
        generation_config.get_generation_mode() in ONE_TOKEN_MODES
        and generation_config.num_return_sequences in (None, 1)
        and model_kwargs.get("use_cache", True) is not False
        and not generation_config.prefill_chunk_size
        and (cache is None or (type(cache) in JOINT_CACHES and not getattr(cache, "offloading", False)))
    )


def as_ids(eos_token_id) -> list[int]:
    """`eos_token_id` of a generation config as a list."""
    if eos_token_id is None:
        return []
    return [int(one) for one in eos_token_id] if hasattr(eos_token_id, "__iter__") else [int(eos_token_id)]


def add_tokens(rows: list[AnswerRow], logits: list[torch.Tensor]) -> list[Union[int, Exception]]:
    """Chooses a token for each row from its logits [1, vocab], and marks the rows that end. Waits for the device once.

    Returns:
        The token of each row; or the error that a processor, a criterion or the streamer of the row raised.
    """
    results: list[Union[int, Exception, None]] = [None] * len(rows)
    chosen = {}
    for index, (row, one) in enumerate(zip(rows, logits, strict=True)):
        try:
            chosen[index] = row.choose(one)
        except Exception as error:  # it ends this row only
            results[index] = error
    if not chosen:
        return results
    device = rows[0].tokens.ids.device
    pairs = torch.cat([torch.stack([part.to(device).long() for part in parts], dim=1) for parts in chosen.values()])
    for index, (token, ended) in zip(chosen, pairs.tolist(), strict=True):
        row, results[index] = rows[index], token
        row.ended = bool(ended)
        try:
            row.stream(token)
        except Exception as error:
            results[index] = error
    return results


def next_logits(model, rows: list[AnswerRow]) -> list[torch.Tensor]:
    """The logits [1, vocab] of the next token of each row, in one joint call."""
    last = torch.cat([row.tokens.ids[:, -1:] for row in rows])
    return list(model.decode_rows(last, [row.cache for row in rows]).split(1))


class PieceStreamer(TextStreamer):
    """Collects the pieces of an answer as soon as later tokens can no longer change them. They join to the answer."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_special_tokens=True)
        self.pieces, self._taken = [], 0

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.pieces.append(text)

    def write(self, token: int) -> None:
        self.put(torch.tensor([token]))

    def take(self) -> str:
        """The text that was finalized since the last call."""
        text = "".join(self.pieces[self._taken :])
        self._taken = len(self.pieces)
        return text

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class CancelCriterion(StoppingCriteria):
    """Stops the answers that `generate` writes and whose value in `are_cancelled()` is true. The beams of an answer
    are consecutive rows."""

    def __init__(self, are_cancelled):
        self.are_cancelled = are_cancelled

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        cancelled = torch.tensor(self.are_cancelled(), device=input_ids.device)
        return cancelled.repeat_interleave(len(input_ids) // len(cancelled))
