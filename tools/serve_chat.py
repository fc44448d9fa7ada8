"""Chat completions of tools/serve.py: requests of OpenAI's form to queries, and answers to responses.

docs/serving.md lists the fields. A field that would have no effect is an error.
"""

import json
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moss_vl.checks import check_characters, finite_number, flag_or, name_hint, positive_int, shorten
from moss_vl.conversation import read_messages, replace_media, write_placeholders
from moss_vl.options import FIXED_SIZE, names_of, read_options
from moss_vl.tools.query_options import CHECKPOINT_OPTIONS
from moss_vl.tools.serve_conversations import Conversations, MessageKeys
from moss_vl.tools.serve_media import MediaSources


ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
ANSWER_FIELDS = {
    "model",
    "messages",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "repetition_penalty",
    "stop",
    "media_kwargs",
}
LABEL_FIELDS = {"user", "metadata", "safety_identifier", "prompt_cache_key"}  # of the caller, about the caller
# Fields of OpenAI with the values that change nothing here; others are errors.
NEUTRAL = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
MAX_STOPS = 4
MOST_CHARACTERS = 64  # of a text per token that it may have
MEDIA_OPTIONS = set(names_of(per_medium=True))  # what a request may choose
FRAME_COUNTS = ("num_frames", "min_frames", "max_frames")
PIXEL_COUNTS = ("min_pixels", "max_pixels")


@dataclass(frozen=True)
class ChatLimits:
    """What requests may ask for, and what holds if they do not.

    Attributes:
        max_new_tokens: most tokens of an answer, and their default.
        max_prompt_tokens: most tokens of the texts of a request.
        tokenizer: counts them.
        frames: most frames of all videos of a conversation.
        pixels: most pixels of an image or frame after its resize.
        totals: most pixels of all images, and of all frames, by the names of these options.
        defaults: media options.
    """

    max_new_tokens: int
    max_prompt_tokens: int
    tokenizer: object = field(repr=False)
    frames: int
    pixels: int
    totals: dict[str, int]
    defaults: dict

    @classmethod
    def of(cls, args, processor) -> "ChatLimits":
        """The limits of the command line; where it has none, those of the checkpoint."""
        images, videos = processor.image_processor, processor.video_processor
        defaults = {**CHECKPOINT_OPTIONS, "max_pixels": args.max_pixels, "video_fps": args.fps}
        if args.frames is not None:
            defaults |= {"max_frames": args.frames, "min_frames": min(args.frames, videos.min_frames)}
        return cls(
            max_new_tokens=args.max_new_tokens,
            max_prompt_tokens=args.max_prompt_tokens,
            tokenizer=processor.tokenizer,
            frames=args.frames or videos.max_frames,
            pixels=args.max_pixels or max(images.max_pixels, videos.max_pixels),
            totals={
                "multi_image_max_pixels": images.multi_image_max_pixels,
                "video_max_pixels": videos.video_max_pixels,
            },
            defaults=defaults,
        )

    def check(self, what: str, options: dict) -> None:
        """Raises ValueError for media options over the limits."""
        options = {name: value for name, value in options.items() if isinstance(value, (int, float))}
        limits = {**dict.fromkeys(FRAME_COUNTS, self.frames), **dict.fromkeys(PIXEL_COUNTS, self.pixels)}
        for name, limit in {**limits, **self.totals}.items():
            if options.get(name, 0) > limit:
                raise ValueError(f"{what}: {name} is at most {limit} on this server, got {options[name]}")
        area = math.prod(options.get(name, 1) for name in FIXED_SIZE)
        if area > self.pixels:
            raise ValueError(f"{what}: {' x '.join(FIXED_SIZE)} is at most {self.pixels} on this server, got {area}")
        if not options.get("do_sample_frames", True):
            raise ValueError(f"{what}: do_sample_frames=False takes all frames, which this server does not allow")

    def check_texts(self, what: str, texts: Iterable[str], most: int | None = None) -> None:
        """Raises ValueError for texts with more than `most` tokens together; by default `max_prompt_tokens`."""
        most, count = self.max_prompt_tokens if most is None else most, 0
        texts = [check_characters(what, text) for text in texts]
        if sum(map(len, texts)) > MOST_CHARACTERS * most:  # so long a text is not tokenised at all
            raise ValueError(f"{what}: the text has far more than {most} tokens, the most on this server")
        for text in texts:
            count += len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if count > most:
            raise ValueError(f"{what}: the text has {count} tokens; on this server it has at most {most}")


class TokenCounter:
    """A streamer for `generate_kwargs` that counts tokens.

    Attributes:
        prompt, answer: text tokens of the prompt and of the answer.
    """

    def __init__(self):
        self.prompt = self.answer = 0
        self._begun = False

    def put(self, tokens) -> None:
        if self._begun:
            self.answer += tokens.numel()
        else:
            self.prompt, self._begun = tokens.numel(), True

    def end(self) -> None:
        pass

    def usage(self) -> dict:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.answer,
            "total_tokens": self.prompt + self.answer,
        }


class SeededSampling(LogitsProcessor):
    """Draws each token with a random generator of this answer alone: to the scores, Gumbel noise is added, so that the
    likeliest token afterwards is one that was drawn from their softmax (the Gumbel-max trick)."""

    def __init__(self, seed: int, temperature: float, top_k: int, top_p: float):
        self.seed, self.generator = seed, None
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        if top_k:
            self.warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self.warpers.append(TopPLogitsWarper(top_p))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.generator is None:
            self.generator = torch.Generator(device=scores.device).manual_seed(self.seed)
        scores = self.warpers(input_ids, scores)
        noise = torch.empty_like(scores).exponential_(generator=self.generator)
        return scores - noise.log()


@dataclass(frozen=True)
class ChatRequest:
    """A request, read and checked.

    Attributes:
        query: for `stream_batch`.
        keys: what its messages are recognised by.
        stops: texts that end the answer.
    """

    query: dict
    keys: MessageKeys
    stream: bool
    include_usage: bool
    stops: tuple[str, ...]
    counter: TokenCounter

    @classmethod
    def read(cls, body, media: MediaSources, limits: ChatLimits) -> "ChatRequest":
        """Raises ValueError for an unknown field and a wrong value."""
        if not isinstance(body, dict):
            raise ValueError(f"the body must be a JSON object, got {shorten(body)}")
        body = {name: value for name, value in body.items() if value is not None}
        _check_fields(body)
        counter = TokenCounter()
        stream = flag_or("stream", body.get("stream"), False)
        query = {
            "messages": _read_messages(body.get("messages"), media, limits),
            "media_kwargs": _read_media_kwargs(body.get("media_kwargs", {}), media, limits),
            "generate_kwargs": {**_read_sampling(body, limits), "streamer": counter},
        }
        keys = MessageKeys.of(query["messages"], query["media_kwargs"])
        return cls(query, keys, stream, _wants_usage(body, stream), _read_stops(body.get("stop", [])), counter)

    def query_after(self, state) -> dict:
        """The query that continues the session state of the earlier messages; the whole one if `state` is None."""
        return self.query if state is None else {**self.query, "messages": self.query["messages"][self.keys.new :]}


def _check_fields(body: dict) -> None:
    known = ANSWER_FIELDS | LABEL_FIELDS | NEUTRAL.keys()
    for name, value in body.items():
        if name not in known:
            raise ValueError(f"unknown field {name!r}; {name_hint(name, known)}")
        if name in NEUTRAL and value not in NEUTRAL[name]:
            allowed = " or ".join(map(json.dumps, NEUTRAL[name]))
            raise ValueError(f"{name} must be {allowed} here, or left out; got {shorten(value)}")


def _wants_usage(body: dict, stream: bool) -> bool:
    options = body.get("stream_options", {})
    if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
        raise ValueError(f"stream_options must be {{'include_usage': true or false}}, got {shorten(options)}")
    if options and not stream:
        raise ValueError("stream_options goes with stream=true")
    if options.get("include_obfuscation"):
        raise ValueError("stream_options: include_obfuscation is not supported; leave it out")
    return flag_or("include_usage", options.get("include_usage"), False)


def _read_stops(stop) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, (list, tuple)) or not all(isinstance(one, str) and one for one in stops):
        raise ValueError(f"stop must be a text or a list of texts that are not empty, got {shorten(stop)}")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"stop has {len(stops)} texts; expected at most {MAX_STOPS}")
    return tuple(stops)


def _read_sampling(body: dict, limits: ChatLimits) -> dict:
    """`generate_kwargs` of a request."""
    lengths = {positive_int(name, body[name]) for name in ("max_tokens", "max_completion_tokens") if name in body}
    if len(lengths) > 1:
        raise ValueError(f"max_tokens and max_completion_tokens disagree: {lengths}; give one of them")
    length = lengths.pop() if lengths else limits.max_new_tokens
    if length > limits.max_new_tokens:
        raise ValueError(f"max_tokens is at most {limits.max_new_tokens} on this server, got {length}")
    options = {"max_new_tokens": length}
    if "repetition_penalty" in body:
        options["repetition_penalty"] = body["repetition_penalty"]
    narrow = body.get("top_p", 1) != 1 or body.get("top_k", 0) != 0
    temperature = finite_number("temperature", body.get("temperature", 1 if narrow else 0))
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    sampling = {"temperature": temperature, "top_k": body.get("top_k", 0), "top_p": body.get("top_p", 1.0)}
    if temperature == 0:
        return {**options, "do_sample": False}
    if "seed" not in body:
        return {**options, "do_sample": True, **sampling}
    _check_seeded(body["seed"], sampling)
    return {**options, "do_sample": False, "logits_processor": [SeededSampling(body["seed"], **sampling)]}


def _check_seeded(seed, sampling: dict) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"seed must be a whole number of 64 bits, got {shorten(seed)}")
    top_k, top_p = sampling["top_k"], sampling["top_p"]
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"top_k must be a whole number, 0 for no limit, got {shorten(top_k)}")
    if isinstance(top_p, bool) or not isinstance(top_p, (int, float)) or not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {shorten(top_p)}")


# messages


def _read_messages(given, media: MediaSources, limits: ChatLimits) -> list[dict]:
    """Messages of plain parts whose media may be opened."""
    if not isinstance(given, list) or not given:
        raise ValueError(f"messages must be a list of at least one message, got {shorten(given)}")
    messages = [_read_message(index, message, media) for index, message in enumerate(given)]

    def resolve(kind: str, medium):
        if isinstance(medium, dict):
            limits.check(f"a {kind}", medium)
        return media.resolve(kind, medium)

    messages = replace_media(read_messages(messages, "messages"), resolve)
    limits.check_texts("messages", (text for message in messages for text in _texts_of(message)))
    return messages


def _texts_of(message: dict) -> list[str]:
    """The texts of a plain message; a placeholder for each medium."""
    content = message["content"]
    return [content] if isinstance(content, str) else [write_placeholders(content)]


def _read_message(index: int, message, media: MediaSources) -> dict:
    if not isinstance(message, dict):
        raise ValueError(f"message {index} must be an object, got {shorten(message)}")
    message = {name: value for name, value in message.items() if value not in (None, [], {})}
    role, content = message.pop("role", None), message.pop("content", "")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"message {index} has the role {shorten(role)}; expected one of {', '.join(ROLES)}")
    if message:
        raise ValueError(f"message {index} has {next(iter(message))!r}, which the model does not read; leave it out")
    if isinstance(content, list):
        content = [_read_file_part(part, media) for part in content]
    return {"role": ROLES[role], "content": content}


def _read_file_part(part, media: MediaSources):
    """A part of type file as an image or video part, by its content; any other part as it is."""
    if not isinstance(part, dict) or part.get("type") != "file":
        return part
    file = part.get("file")
    given = {} if not isinstance(file, dict) else {name: value for name, value in file.items() if value is not None}
    sources = [given[name] for name in ("file_id", "file_data") if name in given]
    if len(sources) != 1 or given.keys() - {"file_id", "file_data", "filename"}:
        raise ValueError(
            f"a part of type file needs {{'file': {{'file_id': ...}}}} or 'file_data', got {shorten(part)}"
        )
    return media.identify(sources[0])


def _read_media_kwargs(given, media: MediaSources, limits: ChatLimits) -> dict:
    """`media_kwargs` of a query. What a request does not choose is as the checkpoint and the command say."""
    if not isinstance(given, dict):
        raise ValueError(f"media_kwargs must be an object, got {shorten(given)}")
    chosen = read_options(given, MEDIA_OPTIONS, "media_kwargs")
    limits.check("media_kwargs", chosen)
    replaced = {"video_fps": ("num_frames", "sample_fps"), "max_pixels": FIXED_SIZE}
    replaced = {name: None for name, others in replaced.items() if any(other in chosen for other in others)}
    return {**limits.defaults, **replaced, **media.downloads, **chosen}


# answers


class StopFilter:
    """Ends a text at the first of several stop texts, which are left out.

    Attributes:
        found: whether the end was reached.
    """

    def __init__(self, stops: tuple[str, ...]):
        self.stops, self.held, self.found = stops, "", False

    def add(self, text: str) -> str:
        """The text that belongs to the answer and that no later text can change."""
        self.held += text
        ends = [end for end in map(self.held.find, self.stops) if end >= 0]
        if ends:
            self.found, self.held = True, self.held[: min(ends)]
            return self.end()
        keep = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        free, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return free

    def end(self) -> str:
        """The rest, as no more text comes."""
        rest, self.held = self.held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`, and not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass
class ChatAnswer:
    """An answer to a request while it is written.

    Attributes:
        events: a queue of the events of the answer.
        cancel: ends it.
        model: the name in the responses.
        conversations: where the session state after the answer is kept.
        finish_reason: why it ended; None before.
    """

    request: ChatRequest
    events: object
    cancel: Callable[[], None]
    model: str
    conversations: Conversations
    finish_reason: str | None = None
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    async def texts(self) -> AsyncIterator[str]:
        """The pieces of the answer. If the iterator is closed before its end, the answer is cancelled.

        Raises:
            Exception: the error that ended the answer.
        """
        stops, ended = StopFilter(self.request.stops), False
        try:
            while not ended and not stops.found:
                event = await self.events.get()
                ended = event is None or event.kind != "piece"
                if event is None:
                    raise ConnectionAbortedError("the server stops")
                if event.kind == "error":
                    raise event.error
                text = stops.end() if ended else stops.add(event.text)
                if text:
                    yield text
            self.finish_reason = "stop" if stops.found else event.reason
            if not stops.found:
                self.conversations.keep(self.request.keys, event.text, event.session_state)
        finally:
            if not ended:
                self.cancel()

    def response(self, text: str) -> dict:
        """The whole answer as a `chat.completion`."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self.finish_reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self.request.counter.usage()}

    def chunk(self, delta: dict | None, **more) -> str:
        """A server-sent event with a `chat.completion.chunk`. `delta` is None in the one with the usage."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": self.finish_reason}
        return sent({**self._head("chat.completion.chunk"), "choices": [] if delta is None else [choice], **more})

    def _head(self, kind: str) -> dict:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def sent(data: dict) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
