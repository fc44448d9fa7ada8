"""Chooses the next token of a realtime stream by transformers' logits processors.

Axes: S tokens of the stream, W words of the vocabulary.
"""

import numbers
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .checks import check_number, flag, name_hint, plain_number, shorten
from .realtime_protocol import RealtimeTokens


SAMPLING_DEFAULTS = {
    "max_new_tokens": 4096,
    "do_sample": False,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "repetition_penalty": 1.0,
    "logits_processor": None,
    "seed": None,
}


@dataclass(frozen=True)
class SamplingOptions:
    """The `generate_kwargs` of a realtime session, checked and complete.

    Attributes:
        max_new_tokens: tokens since the last prompt or frame after which the stream waits for another one.
        do_sample: False takes the likeliest token, as does a temperature of 0 or less; then temperature, top_k, top_p
            and seed have no effect.
        top_k: 0 means no limit.
        logits_processor: functions of (ids [1, S], scores [1, W]) that return scores.
        seed: of a random generator of this session alone; None means torch's generator.
    """

    max_new_tokens: int
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    logits_processor: tuple
    seed: int | None

    @classmethod
    def read(cls, given: Mapping) -> "SamplingOptions":
        """Raises ValueError for an unknown name and for a wrong value. None means the default."""
        for name in given:
            if name not in SAMPLING_DEFAULTS:
                hint = name_hint(name, SAMPLING_DEFAULTS)
                raise ValueError(f"a realtime session has no option {name!r}; {hint}")
        given = {name: plain_number(value) for name, value in given.items() if value is not None}
        options = {**SAMPLING_DEFAULTS, **given}
        options["do_sample"] = flag("do_sample", options["do_sample"])
        rules = {
            "max_new_tokens": (numbers.Integral, "a whole number of at least 1", lambda x: x >= 1),
            "temperature": (numbers.Real, "a number", lambda x: True),
            "top_k": (numbers.Integral, "a whole number, 0 for no limit", lambda x: x >= 0),
            "top_p": (numbers.Real, "above 0 and at most 1", lambda x: 0 < x <= 1),
            "repetition_penalty": (numbers.Real, "above 0", lambda x: x > 0),
        }
        for name, (kind, expected, fits) in rules.items():
            check_number(name, options[name], kind, expected, fits)
        if options["seed"] is not None:
            check_number("seed", options["seed"], numbers.Integral, "a whole number", lambda x: True)
        processors = options["logits_processor"]
        listed = [processors] if callable(processors) else processors
        if listed is not None and not (isinstance(listed, (list, tuple)) and all(map(callable, listed))):
            raise ValueError(f"logits_processor must be a list of functions, got {shorten(processors)}")
        options["logits_processor"] = tuple(listed or ())
        options["do_sample"] = options["do_sample"] and options["temperature"] > 0
        return cls(**options)


class SparingPenalty(LogitsProcessor):
    """The repetition penalty for all tokens but the spared ones. A stream repeats its `<|silence|>`, its special
    tokens and its time stamps, so with a penalty on these it would never fall silent again."""

    def __init__(self, penalty: float, spared: set[int]):
        self.penalise = RepetitionPenaltyLogitsProcessor(float(penalty))
        self.spared = torch.tensor(sorted(spared))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.spared.device != input_ids.device:
            self.spared = self.spared.to(input_ids.device)
        ids = input_ids[:, ~torch.isin(input_ids[0], self.spared)]
        return self.penalise(ids, scores) if ids.shape[1] else scores


def spared_tokens(tokenizer, tokens: RealtimeTokens) -> set[int]:
    """Ids of all special tokens, of digits, and of " seconds"."""
    seconds = tokenizer(" seconds", add_special_tokens=False)["input_ids"]
    digits = [index for token, index in tokenizer.get_vocab().items() if token.isascii() and token.isdigit()]
    return {*tokens.special, *seconds, *digits}


class Sampler:
    """Chooses tokens by the options of one stream."""

    def __init__(self, options: SamplingOptions, tokenizer, tokens: RealtimeTokens):
        self.options = options
        self.generator = None
        self.suppress = list(tokens.never_written)
        self.spared = spared_tokens(tokenizer, tokens) if options.repetition_penalty != 1 else set()
        self.processors = None

    def choose(self, ids: torch.Tensor, logits: torch.Tensor) -> int:
        """The next token.

        Args:
            ids: long [S], the tokens so far.
            logits: [W], of the last of them.
        """
        if self.processors is None:
            self._prepare(logits.device)
        scores = logits[None]
        scores = scores.to(torch.float32 if scores.dtype != torch.float64 else scores.dtype, copy=True)
        scores = self.processors(ids[None], scores)
        if not self.options.do_sample:
            return int(scores[0].argmax())
        return int(torch.multinomial(scores[0].softmax(-1), 1, generator=self.generator))

    def _prepare(self, device: torch.device) -> None:
        options, made = self.options, LogitsProcessorList()
        if options.repetition_penalty != 1:
            made.append(SparingPenalty(options.repetition_penalty, self.spared))
        made.extend(options.logits_processor)
        made.append(SuppressTokensLogitsProcessor(self.suppress, device=device))
        if options.do_sample:
            if options.temperature != 1:
                made.append(TemperatureLogitsWarper(float(options.temperature)))
            if options.top_k:
                made.append(TopKLogitsWarper(top_k=int(options.top_k)))
            if options.top_p < 1:
                made.append(TopPLogitsWarper(top_p=float(options.top_p)))
            if options.seed is not None:
                self.generator = torch.Generator(device=device).manual_seed(int(options.seed))
        self.processors = made
