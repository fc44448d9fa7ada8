"""One realtime stream, step by step: prompts and frames go in, and each step computes at most one token.

Nothing here reads a clock, starts a thread or sleeps. realtime_session.py runs streams live.

The tokens of a stream lie in one list, `ids`. The cache holds the first `fed` of them; the rest is what the next
forward feeds: the last sampled token, and the blocks of what was taken in after it.

    ids    system, user, assistant\\n | <|silence|> | frame block | <|response|> | Red | frame block | ...
                                      ^ sampled                   ^ sampled     ^ sampled
"""

import math
import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Optional

import torch
from transformers.cache_utils import Cache

from .cache_layers import drop_frames, new_cache
from .checks import finite_number, positive_int, positive_number
from .int8_states import dtype_of_settings, is_int8
from .realtime_events import (
    Ended,
    Event,
    Failed,
    FrameDropped,
    FrameTaken,
    Parked,
    PromptTaken,
    ReplyEnds,
    ResponseBegins,
    RolledOver,
    Silence,
    SpecialToken,
    Text,
)
from .realtime_protocol import SILENCE, SYSTEM_PROMPT, Protocol, TextPieces
from .realtime_sampling import Sampler, SamplingOptions
from .threads import clear_frames


FRAME_QUEUE_SIZE = 256
WINDOW_FRAMES = 256  # frames that the model sees, unless another window is given
ROLLOVER_IDLE, ROLLOVER_FORCED = 8192, 12288  # text tokens
WEIGHT_OPTIONS = {  # options of the image processor that must equal the model's
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "spatial_merge_size",
}


@dataclass(frozen=True)
class Window:
    """How many of the latest frames stay visible; None is no limit. The newest frame always stays."""

    seconds: Optional[float]
    frames: Optional[int]
    vision_tokens: Optional[int]

    @classmethod
    def read(cls, seconds, frames, vision_tokens) -> "Window":
        """Raises ValueError for a limit that is not positive. Without any limit, the default is `WINDOW_FRAMES`."""
        seconds = None if seconds is None else positive_number("window_seconds", seconds)
        frames = None if frames is None else positive_int("window_frames", frames)
        tokens = None if vision_tokens is None else positive_int("window_vision_tokens", vision_tokens)
        return cls(seconds, WINDOW_FRAMES if seconds is frames is tokens is None else frames, tokens)

    def excess(self, times: list[float], tokens: list[int]) -> int:
        """How many of the oldest frames are outside the window.

        Args:
            times, tokens: seconds and vision tokens of the frames, oldest first.
        """
        count = 0 if self.frames is None else max(0, len(times) - self.frames)
        if self.seconds is not None:
            count = max(count, sum(time < times[-1] - self.seconds for time in times))
        if self.vision_tokens is not None:
            total = sum(tokens[count:])
            while total > self.vision_tokens and count < len(tokens) - 1:
                total -= tokens[count]
                count += 1
        return count


@dataclass(frozen=True)
class Frame:
    """A frame that waits: uint8 pixels [P, values] and what the model needs to normalise them.

    `with_prompt` is True if the frame came with a prompt, so that it is not dropped.
    """

    seconds: float
    pixel_values: torch.Tensor
    grid: list[int]
    image_mean: list[float]
    image_std: list[float]
    with_prompt: bool = False


@dataclass
class SeenFrame:
    """A frame in the vision cache.

    Attributes:
        block: its text tokens.
        vision_tokens: with its separator.
        features: its encoded vision tokens, kept for a rollover; None without rollover.
    """

    seconds: float
    block: list[int]
    grid: list[int]
    vision_tokens: int
    features: Optional[torch.Tensor]


@dataclass
class Exchange:
    """A prompt of the user and the answers that followed it."""

    prompt: str
    answers: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Taken:
    """What a step takes in."""

    prompts: list[str]
    frames: list[Frame]
    dropped: list[float]

    def __bool__(self) -> bool:
        return bool(self.prompts or self.frames)


@dataclass(frozen=True)
class Work:
    """What the next forward computes: `tokens` new ids, of which `frames` place their vision tokens."""

    tokens: int
    frames: list[Frame]

    @property
    def only_writes(self) -> bool:
        """Whether the forward feeds only the last sampled token, so that streams can share it."""
        return self.tokens == 1 and not self.frames


class Inbox:
    """Prompts and frames that wait for the next step. Threads may push at once.

    Args:
        size: most waiting frames.
        read: makes a `Frame` of an image, its seconds, and whether it comes with a prompt.
    """

    def __init__(self, size: int, read: Callable):
        self.size = positive_int("frame_queue_size", size)
        self.read = read
        self.prompts: deque[str] = deque()
        self.frames: deque[Frame] = deque()
        self.dropped: list[float] = []
        self.latest = -math.inf
        self.ended = False
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.prompts) + len(self.frames)

    def push_prompt(self, prompt: str) -> None:
        with self.lock:
            self._check_open()
            self.prompts.append(prompt)

    def push_frame(self, image, seconds: float, prompt: Optional[str] = None, drop_oldest: bool = True) -> bool:
        """Adds a frame, and its prompt.

        Returns:
            True if a frame was dropped to make space: the oldest that came without a prompt.

        Raises:
            ValueError: for a time before that of an earlier frame, and for an image that cannot be read.
            QueueFull: if no frame can be dropped.
        """
        with self.lock:
            self._check_open()
            self._check_time(seconds)
            if not drop_oldest and len(self.frames) >= self.size:
                raise QueueFull(self.size)
        frame = self.read(image, seconds, prompt is not None)
        with self.lock:
            self._check_open()
            self._check_time(seconds)
            dropped = len(self.frames) >= self.size
            if dropped and not drop_oldest:
                raise QueueFull(self.size)
            self.latest = seconds
            self.frames.append(frame)
            if prompt is not None:
                self.prompts.append(prompt)
            if dropped:
                index = next((i for i, waiting in enumerate(self.frames) if not waiting.with_prompt), None)
                dropped = index is not None  # otherwise all came with prompts, which must not go
                if dropped:
                    self.dropped.append(self.frames[index].seconds)
                    del self.frames[index]
            return dropped

    def end(self) -> None:
        self.ended = True

    def take(self) -> Taken:
        """Takes out everything that waits."""
        with self.lock:
            taken = Taken(list(self.prompts), list(self.frames), self.dropped)
            self.prompts.clear()
            self.frames.clear()
            self.dropped = []
            return taken

    def _check_open(self) -> None:
        if self.ended:
            raise ValueError("the stream has ended; expected no prompt or frame after its end. Open another session")

    def _check_time(self, seconds: float) -> None:
        if seconds < self.latest:
            raise ValueError(
                f"the frame's time is {seconds:g} seconds, before that of an earlier frame, {self.latest:g} seconds; "
                "expected times that do not fall"
            )


class QueueFull(queue.Full):
    """The queue of frames is full, and no frame may be dropped."""

    def __init__(self, size: int):
        super().__init__(f"the queue holds {size} frames, as many as frame_queue_size; try again, or drop_oldest=True")


class RealtimeStream:
    """One conversation with a stream of frames.

    Args:
        processor: the processor of the checkpoint.
        initial_prompt: the first user turn; may be empty.
        system_prompt: default: the prompt that realtime checkpoints were trained with.
        frame_queue_size: most frames that wait for a step.
        window_seconds, window_frames, window_vision_tokens: how much of the stream the model sees. Older frames leave
            the cache; their text stays. Default: the latest `WINDOW_FRAMES` frames.
        rollover_idle, rollover_forced: text tokens after which the stream starts anew with its words and its window:
            when nothing waits, or at the latest. None means never.
        media_kwargs: options of the image processor.
        vision_cache_dtype: "int8" keeps frames in half the memory; default: what generation_config.json means.
        generate_kwargs: see `SamplingOptions`.

    Raises:
        ValueError: for a tokenizer that is not one of a realtime checkpoint, and for a wrong option.
    """

    def __init__(
        self,
        model,
        processor,
        initial_prompt: str = "",
        system_prompt: Optional[str] = None,
        frame_queue_size: int = FRAME_QUEUE_SIZE,
        window_seconds: Optional[float] = None,
        window_frames: Optional[int] = None,
        window_vision_tokens: Optional[int] = None,
        rollover_idle: Optional[int] = ROLLOVER_IDLE,
        rollover_forced: Optional[int] = ROLLOVER_FORCED,
        media_kwargs: Optional[dict] = None,
        vision_cache_dtype: Optional[str] = None,
        **generate_kwargs,
    ):
        is_int8(vision_cache_dtype)  # checks it
        self.vision_cache_dtype = vision_cache_dtype or dtype_of_settings(model.generation_config)
        self.model = model
        self.protocol = Protocol(processor, model.config.text_config.vocab_size)
        self.tokens = self.protocol.tokens
        self.options = SamplingOptions.read(generate_kwargs)
        self.window = Window.read(window_seconds, window_frames, window_vision_tokens)
        self.rollover_idle = None if rollover_idle is None else positive_int("rollover_idle", rollover_idle)
        self.rollover_forced = None if rollover_forced is None else positive_int("rollover_forced", rollover_forced)
        self.system_prompt = SYSTEM_PROMPT
        if system_prompt is not None:
            self.system_prompt = self.protocol.check_prompt("system_prompt", system_prompt)
        self.media_kwargs = dict(media_kwargs or {})
        check_image_options(model, processor.image_processor, self.media_kwargs)
        self.inbox = Inbox(frame_queue_size, self._read_frame)
        self.sampler = Sampler(self.options, self.protocol.tokenizer, self.tokens)
        self.pieces = TextPieces(self.protocol.tokenizer)
        # meta: the weights are offloaded
        self.device = torch.device("cpu") if model.device.type == "meta" else model.device

        self.cache: Optional[Cache] = None
        self.ids: list[int] = []
        self.fed = 0
        self.frames: deque[SeenFrame] = deque()
        self.exchanges = [Exchange(self.protocol.check_prompt("initial_prompt", initial_prompt))]
        self.written = 0  # tokens since the last input
        self.reply_ids: list[int] = []  # tokens of the reply that is being written
        self.reply_text: list[str] = []
        self.replying = False
        self.seconds: Optional[float] = None
        self.parked = False
        self.ended = False
        self.rebuilt = 0  # text tokens after the last rollover
        self.events: list[Event] = []
        self._buffer = torch.empty(0, dtype=torch.long)

    # input

    def push_prompt(self, prompt: str) -> None:
        """Adds a prompt, which the next step takes in."""
        self.inbox.push_prompt(self.protocol.check_prompt("prompt", prompt))

    def push_frame(self, image, seconds: float, prompt: Optional[str] = None, drop_oldest: bool = True) -> bool:
        """Adds a frame, which the next step takes in.

        Args:
            image: an image in any form that the processor takes. It is read now, so the caller may reuse its memory.
            seconds: time of the frame; not below that of an earlier frame.
            prompt: a prompt about it.
            drop_oldest: if the queue is full, True drops the oldest frame without a prompt; False is an error.

        Returns:
            Whether a frame was dropped.
        """
        seconds = finite_number("timestamp", seconds)
        if seconds < 0:
            raise ValueError(f"timestamp must be seconds from the start of the stream, at least 0, got {seconds:g}")
        prompt = None if prompt is None else self.protocol.check_prompt("prompt", prompt)
        return self.inbox.push_frame(image, seconds, prompt, drop_oldest)

    def end(self) -> None:
        """The source has ended: what waits is taken in, the current reply is finished, and then the stream ends."""
        self.inbox.end()

    def interrupt(self) -> bool:
        """Ends the reply that is being written, as if the model had fallen silent. Everything seen and said stays.

        Returns:
            False if no reply was being written.
        """
        if not self.replying:
            return False
        self._close_reply("interrupted")
        self._extend([self.tokens.silence])
        return True

    def _read_frame(self, image, seconds: float, with_prompt: bool) -> Frame:
        read = self.protocol.processor.image_processor.preprocess([image], do_normalize=False, **self.media_kwargs)
        grids = read["image_grid_thw"].tolist()
        if len(grids) != 1:
            raise ValueError(f"a frame is one image, got {len(grids)} images")
        pixels, mean, std = read["pixel_values"], read["image_mean"][0], read["image_std"][0]
        return Frame(seconds, pixels, grids[0], list(mean), list(std), with_prompt)

    # steps

    @property
    def is_silent(self) -> bool:
        """Whether the stream has nothing to write: it fell silent, or wrote `max_new_tokens` since the last input."""
        return self.ids[-1] == self.tokens.silence or self.written >= self.options.max_new_tokens

    def step(self) -> list[Event]:
        """Takes in everything that waits, and computes one token; or parks if there is nothing to do.

        Returns:
            What happened. An error is a `Failed`, after which the stream has ended.
        """
        try:
            work = self.take()
            if work is not None:
                self.finish(self.forward(work))
        except Exception as error:
            self.fail(error)
        return self.collect()

    def take(self) -> Optional[Work]:
        """The first part of a step: what its forward computes; None if it computes nothing."""
        if self.ended:
            return None
        if self.cache is None:
            return self._open()
        taken = self.inbox.take()
        for seconds in taken.dropped:
            self._report(FrameDropped, dropped=seconds)
        prompts = [self.protocol.prompt_block(prompt) for prompt in taken.prompts]
        frames = [self.protocol.frame_block(frame.seconds) for frame in taken.frames]
        if not taken and self._rest():
            return None
        # One token more will be written. The limit holds after that.
        added = sum(map(len, prompts + frames)) + 1
        if self._is_above(added, self.rollover_forced):
            self._roll_over("forced", added)
        if taken:
            self._take_in(taken, prompts, frames)
        self.parked = False
        return Work(len(self.ids) - self.fed, taken.frames)

    def forward(self, work: Work) -> torch.Tensor:
        """The second part of a step: logits [W] of the last token."""
        features = self._encode(work.frames)
        logits = self._run(features, [frame.grid for frame in work.frames])
        new = [self.frames[index - len(work.frames)] for index in range(len(work.frames))]
        for frame, part in zip(new, features, strict=True):
            frame.features = part if self._keeps_features else None
        if new:
            self._shrink_window(keep=1)
        return logits

    def finish(self, logits: torch.Tensor) -> None:
        """The last part of a step: samples the next token.

        Args:
            logits: [W], of the last token that was fed.
        """
        self.fed = len(self.ids)
        token = self.sampler.choose(self._buffer[: self.fed], logits)
        self._extend([token])
        self.written += 1
        self._report_token(token)
        if self.written >= self.options.max_new_tokens and self.replying:
            self._close_reply("max_new_tokens")

    def fail(self, error: BaseException) -> None:
        """Ends the stream by an error."""
        clear_frames(error)  # the error must not keep the tensors of a failed forward
        self._report(Failed, error=error)
        self.free()

    def free(self) -> None:
        """Ends the stream, and frees its memory."""
        self.ended, self.parked = True, True
        self.inbox.end()
        self.inbox.take()
        self.cache = None
        self.frames.clear()

    def collect(self) -> list[Event]:
        """The events since the last call."""
        events, self.events = self.events, []
        return events

    # parts of steps

    def _open(self) -> Work:
        """The prefill of the system prompt and the initial prompt."""
        self.cache = self._new_cache()
        self._extend(self.protocol.opening(self._messages()))
        if self.exchanges[0].prompt:
            self._report(PromptTaken, text=self.exchanges[0].prompt)
        return Work(len(self.ids), [])

    def _new_cache(self) -> Cache:
        return new_cache(self.model.config.text_config, self.model.generation_config)

    def _rest(self) -> bool:
        """If nothing is left to write: rolls over, parks or ends. Returns whether it did."""
        if self.inbox.ended and not len(self.inbox) and (self.is_silent or self.ids[-1] == self.tokens.im_end):
            self._close_reply("ended")
            self._report(Ended)
            self.free()
        elif not self.is_silent:
            return False
        elif self._is_above(1, self.rollover_idle):
            self._roll_over("idle")
        else:
            self.parked = True
            self._report(Parked)
        return True

    def _take_in(self, taken: Taken, prompts: list[list[int]], frames: list[list[int]]) -> None:
        for prompt, block in zip(taken.prompts, prompts, strict=True):
            self._close_reply("prompt")
            self.exchanges.append(Exchange(prompt))
            self._extend(block)
            self._report(PromptTaken, text=prompt)
        sizes = [vision_tokens(frame.grid, self.model.config.vision_config) for frame in taken.frames]
        for frame, block, size in zip(taken.frames, frames, sizes, strict=True):
            self._extend(block)
            self.frames.append(SeenFrame(frame.seconds, block, frame.grid, size, None))
            self.seconds = frame.seconds
            self._report(FrameTaken, vision_tokens=size)
        if taken.frames:
            self._shrink_window(keep=len(taken.frames))
        self.written = 0

    def _shrink_window(self, keep: int) -> None:
        """Drops the oldest frames outside the window from the vision cache, but none of the newest `keep`."""
        if not self.frames:
            return
        times, tokens = zip(*((frame.seconds, frame.vision_tokens) for frame in self.frames), strict=True)
        count = min(self.window.excess(times, tokens), len(times) - keep)
        if count > 0:
            drop_frames(self.cache, self.model.config.text_config, count)
            for _ in range(count):
                self.frames.popleft()

    def _encode(self, frames: list[Frame]) -> list[torch.Tensor]:
        """Vision tokens [v, D] of each frame, without separators."""
        if not frames:
            return []
        with torch.no_grad():
            features = self.model.get_image_features(
                torch.cat([frame.pixel_values for frame in frames]),
                torch.tensor([frame.grid for frame in frames]),
                image_mean=[frame.image_mean for frame in frames],
                image_std=[frame.image_std for frame in frames],
            ).pooler_output
        config = self.model.config.vision_config
        return list(features.split([vision_tokens(frame.grid, config) - 1 for frame in frames]))

    def _run(self, features: list[torch.Tensor], grids: list[list[int]]) -> torch.Tensor:
        """Feeds the ids that the cache does not hold, with the frames that they place. Logits [W] of the last one."""
        media = {}
        if features:
            media = {"image_features": torch.cat(features), "grid_thw": torch.tensor(grids)}
        ids = self._buffer[self.fed : len(self.ids)][None]
        with torch.no_grad():
            options = {"use_cache": True, "logits_to_keep": 1, "vision_cache_dtype": self.vision_cache_dtype}
            return self.model(input_ids=ids, cache=self.cache, **options, **media).logits[0, -1]

    def _report_token(self, token: int) -> None:
        if token == self.tokens.silence:
            if self.replying:
                self._close_reply("silence")
            else:
                self._report(Silence)
            return
        if token == self.tokens.im_end and self.inbox.ended and not len(self.inbox) and self.replying:
            self._close_reply("im_end")
            return
        if self.replying:
            self.reply_ids.append(token)
        else:
            self.reply_ids = [token]
        if token == self.tokens.response:
            self._report(ResponseBegins, continues=self.replying)
            self.replying = True
        elif token in self.tokens.special:
            self._report(SpecialToken, text=self.tokens.special[token])
        else:
            self.replying = True
            self._report_text(self.pieces.add(token))

    def _report_text(self, text: str) -> None:
        if text:
            self.reply_text.append(text)
            self._report(Text, text=text)

    def _close_reply(self, reason: str) -> None:
        """Ends the reply that is being written, if there is one."""
        if not self.replying:
            return
        self.pieces.drop()
        text = "".join(self.reply_text)
        if text.strip():
            self.exchanges[-1].answers.append(text)
        self.replying, self.reply_ids, self.reply_text = False, [], []
        self._report(ReplyEnds, text=text, reason=reason)

    def _report(self, kind: type[Event], **values) -> None:
        self.events.append(kind(seconds=self.seconds, **values))

    def _extend(self, ids: list[int]) -> None:
        """Appends to `ids`, and to their copy on the device."""
        length = len(self.ids) + len(ids)
        if length > len(self._buffer):
            buffer = torch.empty(max(1024, 2 * length), dtype=torch.long, device=self.device)
            buffer[: len(self.ids)] = self._buffer[: len(self.ids)]
            self._buffer = buffer
        self._buffer[len(self.ids) : length] = torch.tensor(ids, dtype=torch.long)
        self.ids += ids

    # rollover

    @property
    def _keeps_features(self) -> bool:
        return self.rollover_idle is not None or self.rollover_forced is not None

    def _is_above(self, added: int, limit: Optional[int]) -> bool:
        """Whether the text with `added` tokens is above a limit. If even a rollover left more than the limit, then a
        quarter of the limit has to be added until the next one."""
        if limit is None:
            return False
        # a rollover leaves `rebuilt` tokens and the last one; with one more, they must be within the limit
        return len(self.ids) + added > (limit if self.rebuilt + 2 <= limit else self.rebuilt + max(2, limit // 4))

    def _roll_over(self, reason: str, added: int = 0) -> None:
        """Starts anew: the cache is made again from the words of the conversation, the frames of the window, and the
        reply that is being written. The last token stays the one that comes next, so nothing is decided again.

        If all that is above the limit, or with the `added` tokens above the forced one, or if the last rollover won
        little, then the oldest words are left out until they have half of the limit, and the oldest frames until a
        quarter of the limit is free; more of both if the added tokens need it, but not for a prompt that needs nearly
        all.
        """
        before = len(self.ids)
        limit = min(limit for limit in (self.rollover_idle, self.rollover_forced) if limit is not None)
        last = self.reply_ids if self.replying else [self.tokens.silence if self.is_silent else self.ids[-1]]
        ids, dropped = self.protocol.opening(self._messages()), 0
        others = len(last) + sum(len(frame.block) for frame in self.frames)
        forced = math.inf if self.rollover_forced is None else self.rollover_forced
        if len(ids) + others > min(limit, forced - added) or self.rebuilt > limit - limit // 8:
            most = max(limit // 4, min(limit - limit // 4, forced - added))
            dropped = self._drop_words(max(most - others, min(limit // 2, most)))
            ids = self.protocol.opening(self._messages())
            while len(ids) + others > most and len(self.frames) > 1:
                others -= len(self.frames.popleft().block)
        frames = [*self.frames]

        self.cache, self.ids, self.fed = self._new_cache(), [], 0
        self._extend(ids + [token for frame in frames for token in frame.block] + last[:-1])
        self._run([frame.features for frame in frames], [frame.grid for frame in frames])
        self.fed = self.rebuilt = len(self.ids)
        self._extend(last[-1:])
        self._report(
            RolledOver,
            reason=reason,
            text_before=before,
            text_after=len(self.ids),
            frames=len(frames),
            words_dropped=dropped,
        )

    def _messages(self) -> list[dict]:
        """The conversation, which ends with a turn of the user; answers get `<|silence|>` in front."""
        messages = [{"role": "system", "content": self.system_prompt}]
        for exchange in self.exchanges:
            if messages[-1]["role"] == "user":  # a prompt without an answer
                messages.append({"role": "assistant", "content": SILENCE})
            messages.append({"role": "user", "content": exchange.prompt})
            if exchange.answers:
                messages.append({"role": "assistant", "content": "".join(SILENCE + text for text in exchange.answers)})
        if messages[-1]["role"] != "user":
            messages.append({"role": "user", "content": ""})
        return messages

    def _drop_words(self, limit: int) -> int:
        """Drops the oldest answers and prompts until the conversation has at most `limit` tokens. The first prompt
        stays, because it may be a standing request, and so does the last exchange.

        Returns:
            How many answers and prompts were dropped.
        """
        total, dropped = len(self.protocol.opening(self._messages())), 0
        first = self.exchanges[0]
        while total > limit:
            if first.answers and (len(first.answers) > 1 or len(self.exchanges) > 1):
                texts = [first.answers.pop(0)]
            elif len(self.exchanges) > 2:
                exchange = self.exchanges.pop(1)
                texts = [exchange.prompt, *exchange.answers]
            else:
                break
            total -= sum(len(self.protocol.encode(text)) for text in texts)
            dropped += len(texts)
        return dropped


def vision_tokens(grid: list[int], config) -> int:
    """Vision tokens of a frame of this grid, with its separator. `config` is the vision config."""
    return grid[1] * grid[2] // config.spatial_merge_size**2 + 1


def check_image_options(model, image_processor, media_kwargs: dict) -> None:
    """Raises ValueError for wrong options of the image processor, and for patches that do not fit the model."""
    resolved = image_processor.resolve(media_kwargs)
    for name, of_model in WEIGHT_OPTIONS.items():
        got, expected = getattr(resolved, name), getattr(model.config.vision_config, of_model)
        if got != expected:
            raise ValueError(f"{name} is {got}, but the model was trained with {expected}; take the model's processor")
