"""Live realtime sessions: `create_realtime_session`, `online_generate`, and the session that they run.

The caller's threads push prompts and frames. One thread per model computes the steps of all its sessions
(realtime_scheduler.py). What a stream reports goes to the caller as events or as strings.
"""

import asyncio
import queue
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Optional

import torch

from .checks import check_misspelled, flag, positive_number, shorten
from .realtime_events import Ended, Event, Failed
from .realtime_scheduler import scheduler_of
from .realtime_stream import FRAME_QUEUE_SIZE, RealtimeStream, Work


TOKENS_PER_SECOND = 12
EVENTS_KEPT = 65536  # events that nobody has read; older ones are dropped
START_KEYS = {"initial_prompt", "system_prompt", "frame_queue_size", "max_tokens_per_turn"}
INPUT_KEYS = {"frame", "timestamp", "prompt", "drop_oldest"}
STOP_KEY = "stop_online_generate"


class Output:
    """The events of a session, in order. Each goes to the first reader, who may be on a thread or in an event loop."""

    def __init__(self):
        self.condition = threading.Condition()
        self.events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self.closed = False
        self.waiters: list[tuple] = []  # (event loop, future)

    def put(self, events: list[Event]) -> None:
        with self.condition:
            self.events.extend(events)
            self._notify()

    def close(self) -> None:
        """No more events come."""
        with self.condition:
            self.closed = True
            self._notify()

    def get(self, timeout: Optional[float] = None) -> Optional[Event]:
        """The next event; None after the last one.

        Raises:
            queue.Empty: if none comes within `timeout` seconds.
        """
        with self.condition:
            if not self.condition.wait_for(lambda: self.events or self.closed, timeout):
                raise queue.Empty
            return self.events.popleft() if self.events else None

    async def get_async(self) -> Optional[Event]:
        """The next event; None after the last one."""
        while True:
            with self.condition:
                if self.events:
                    return self.events.popleft()
                if self.closed:
                    return None
                loop = asyncio.get_running_loop()
                waiter = (loop, loop.create_future())
                self.waiters.append(waiter)
            try:
                await waiter[1]
            finally:
                with self.condition:
                    if waiter in self.waiters:
                        self.waiters.remove(waiter)

    def _notify(self) -> None:
        self.condition.notify_all()
        for loop, future in self.waiters:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(_set_done, future)
        self.waiters = []


def _set_done(future) -> None:
    if not future.done():
        future.set_result(None)


class Events:
    """An iterator over the events of a session, for `for` and for `async for`. It ends with the session."""

    def __init__(self, output: Output):
        self.output = output

    def __iter__(self):
        return self

    def __next__(self) -> Event:
        event = self.output.get()
        if event is None:
            raise StopIteration
        return event

    def __aiter__(self):
        return self

    async def __anext__(self) -> Event:
        event = await self.output.get_async()
        if event is None:
            raise StopAsyncIteration
        return event


class RealtimeSession:
    """A stream that runs live. Its methods may be called from any thread.

    Prompts and frames that are pushed are taken in at the next step. What the stream reports is read with `events` or
    with `poll_output`; each event goes to one reader. Use it as a context manager, or call `close`.

    Args:
        stream: the stream that it runs.
        tokens_per_second: pace of writing; None writes as fast as possible. Prompts and frames are taken in at once.
    """

    def __init__(self, stream: RealtimeStream, tokens_per_second: Optional[float] = TOKENS_PER_SECOND):
        self.stream = stream
        self.pause = 0.0  # seconds between two written tokens
        if tokens_per_second is not None:
            self.pause = 1 / positive_number("max_tokens_per_turn", tokens_per_second)
        self.output = Output()
        self.scheduler = scheduler_of(stream.model)
        self.started_at: Optional[float] = None
        self.closed = False
        self.error: Optional[BaseException] = None
        self._next_token_at = 0.0
        self._interrupted = False
        self._push_lock = threading.Lock()  # for frames whose time is now
        self._taken = threading.Condition()  # notified when the queue of frames was emptied, and at the end

    # for the caller

    def start(self) -> "RealtimeSession":
        """Starts the session, and returns it.

        Raises:
            ValueError: if it was started or closed before.
        """
        if self.started_at is not None or self.closed:
            raise ValueError("the session was started before; expected one start. Create another session")
        self.started_at = time.monotonic()
        self.scheduler.add(self)
        return self

    def push_frame(
        self, image, timestamp: Optional[float] = None, drop_oldest: bool = True, timeout: Optional[float] = 0.0
    ) -> bool:
        """Adds a frame.

        Args:
            image: an image in any form that the processor takes. It is read now, so its memory may be used again.
            timestamp: seconds; not below that of an earlier frame. Default: seconds since the session started.
            drop_oldest: if the queue is full, True drops the oldest frame that came without a prompt.
            timeout: with `drop_oldest=False`, seconds to wait for space in the queue; None waits without a limit.

        Returns:
            Whether a frame was dropped.

        Raises:
            ValueError: for an image or a time that is wrong, and if the session has ended.
            queue.Full: if there was no space within `timeout` seconds.
        """
        return self._push(None, image, timestamp, drop_oldest, timeout)

    def push_prompt(self, prompt: str) -> None:
        """Adds a prompt of the user. It is never dropped."""
        self._check_usable()
        self.stream.push_prompt(prompt)
        self.scheduler.wake()

    def push_prompt_frame(
        self,
        prompt: str,
        image,
        timestamp: Optional[float] = None,
        drop_oldest: bool = True,
        timeout: Optional[float] = 0.0,
    ) -> bool:
        """Adds a prompt with a frame, which is not dropped either. Otherwise as `push_frame`."""
        return self._push(prompt, image, timestamp, drop_oldest, timeout)

    def poll_output(self, timeout: Optional[float] = 1.0) -> Optional[str]:
        """The next string of the raw output: a piece of text, the name of a special token that the model wrote, or
        `<|round_start|>` before the answer to a prompt.

        Args:
            timeout: seconds to wait; None waits until the session ends.

        Returns:
            None if nothing came in time, or after the end.

        Raises:
            RuntimeError: once, if an error ended the session.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                event = self.output.get(None if deadline is None else max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return None
            if event is None:
                return None
            if isinstance(event, Failed):
                raise RuntimeError(f"the realtime session failed: {event.message}") from event.error
            if event.raw:
                return event.raw

    def events(self) -> Events:
        """An iterator over the events, for `for` and for `async for`, which ends with the session."""
        return Events(self.output)

    def interrupt(self) -> None:
        """Ends the reply that is being written, if there is one. Everything seen and said stays."""
        self._interrupted = True
        self.scheduler.wake()

    def end(self) -> None:
        """Nothing more comes: what waits is taken in, the current reply is finished, and the session ends."""
        self.stream.end()
        self.scheduler.wake()

    def close(self, timeout: Optional[float] = 5.0) -> bool:
        """Ends the session after its current step, and frees its memory. What waits is lost.

        Args:
            timeout: seconds to wait for the current step, and if it was the last session for the thread to end; None
                waits without a limit.

        Returns:
            False if that took longer. The session then ends after its step.
        """
        self.closed = True
        self.stream.inbox.end()
        joined = True
        if self.started_at is not None:
            joined = self.scheduler.remove(self, timeout)
        if joined and self not in self.scheduler.current:  # otherwise its step frees it
            self.stream.free()
        self._finish()
        return joined

    @property
    def pending_frames(self) -> int:
        """Frames that wait to be taken in."""
        return len(self.stream.inbox.frames)

    @property
    def active(self) -> bool:
        """Whether the session was started and has not ended."""
        return self.started_at is not None and not self.closed and not self.stream.ended

    def __enter__(self) -> "RealtimeSession":
        return self if self.started_at is not None else self.start()

    def __exit__(self, *exception) -> None:
        self.close()

    def _push(self, prompt, image, timestamp, drop_oldest, timeout) -> bool:
        self._check_usable()
        deadline = None if timeout is None else time.monotonic() + timeout
        drop_oldest = True if drop_oldest is None else flag("drop_oldest", drop_oldest)
        while True:
            try:
                dropped = self._push_once(prompt, image, timestamp, drop_oldest)
                break
            except queue.Full:
                with self._taken:
                    wait = None if deadline is None else deadline - time.monotonic()
                    if wait is not None and wait <= 0:
                        raise
                    self._taken.wait_for(lambda: self.pending_frames < self.stream.inbox.size or self._is_over(), wait)
                self._check_usable()
        self.scheduler.wake()
        return dropped

    def _push_once(self, prompt, image, timestamp, drop_oldest: bool) -> bool:
        if timestamp is not None:
            return self.stream.push_frame(image, timestamp, prompt, drop_oldest)
        with self._push_lock:
            now = 0.0 if self.started_at is None else time.monotonic() - self.started_at
            return self.stream.push_frame(image, max(now, self.stream.inbox.latest), prompt, drop_oldest)

    def _is_over(self) -> bool:
        return self.closed or self.stream.ended

    def _check_usable(self) -> None:
        """Raises ValueError if the session has ended."""
        if self.error is not None:
            raise ValueError(f"the session has ended by an error: {self.error}; create another one") from self.error
        if self._is_over():
            raise ValueError("the session has ended; create another one")

    # for the scheduler, on its thread

    def due_at(self) -> float:
        """When the next step is due, in seconds of `time.monotonic`; infinity while the stream is parked."""
        stream = self.stream
        if stream.ended:
            return float("inf")
        if self._interrupted or len(stream.inbox):
            return 0.0
        if stream.parked:
            return 0.0 if stream.inbox.ended else float("inf")
        return self._next_token_at

    def begin_step(self) -> Optional[Work]:
        """The first part of a step; None if it computes nothing more."""
        stream = self.stream
        if self.closed:
            stream.free()
            return None
        try:
            if self._interrupted:
                self._interrupted = False
                if stream.cache is not None:
                    stream.interrupt()
                if stream.parked and not len(stream.inbox) and not stream.inbox.ended:
                    return None  # there was nothing to end
            work = stream.take()
        except Exception as error:
            stream.fail(error)
            work = None
        with self._taken:
            self._taken.notify_all()
        self._deliver()
        return work

    def finish_step(self, work: Work, logits: Optional[torch.Tensor]) -> None:
        """The rest of a step.

        Args:
            logits: [W], if a joint forward computed them.
        """
        stream = self.stream
        if self.closed:  # meanwhile; `close` may not have waited
            stream.free()
            return
        try:
            stream.finish(stream.forward(work) if logits is None else logits)
        except Exception as error:
            stream.fail(error)
        if self.closed:  # by a function of the caller's that the step called
            stream.free()
        now = time.monotonic()
        self._next_token_at = max(self._next_token_at, now - self.pause) + self.pause
        self._deliver()

    def _deliver(self) -> None:
        events = self.stream.collect()
        for event in events:
            if isinstance(event, Failed):
                self.error = event.error
        self.output.put(events)
        if any(isinstance(event, (Failed, Ended)) for event in events):
            self._finish()

    def _finish(self) -> None:
        """No more events come, and nobody has to wait for space in the queue."""
        self.output.close()
        with self._taken:
            self._taken.notify_all()


class MossVLRealtimeMixin:
    """Realtime methods of `MossVLForConditionalGeneration`. `processor` is a `MossVLProcessor` of the same realtime
    checkpoint."""

    def create_realtime_session(
        self,
        processor,
        initial_prompt: str = "",
        system_prompt: Optional[str] = None,
        frame_queue_size: int = FRAME_QUEUE_SIZE,
        max_tokens_per_turn: Optional[float] = TOKENS_PER_SECOND,
        **generate_kwargs,
    ) -> RealtimeSession:
        """A session that watches frames as they come, and speaks when there is something to say. A model can have many
        sessions at once; their steps are computed in turn.

        Args:
            initial_prompt: the first user turn, such as a standing request; may be empty.
            system_prompt: default: the prompt that realtime checkpoints were trained with.
            frame_queue_size: most frames that wait to be taken in.
            max_tokens_per_turn: pace of writing in tokens per second; None writes as fast as possible.
            generate_kwargs: max_new_tokens (since the last prompt or frame), do_sample, temperature, top_k, top_p,
                repetition_penalty, logits_processor, seed (see `SamplingOptions`); window_seconds, window_frames,
                window_vision_tokens, rollover_idle, rollover_forced, media_kwargs, vision_cache_dtype (see
                `RealtimeStream`).

        Raises:
            ValueError: for a checkpoint that is no realtime one, and for a wrong option.
        """
        stream = self.create_realtime_stream(
            processor, initial_prompt, system_prompt, frame_queue_size=frame_queue_size, **generate_kwargs
        )
        return RealtimeSession(stream, max_tokens_per_turn)

    def create_realtime_stream(
        self, processor, initial_prompt: str = "", system_prompt: Optional[str] = None, **options
    ) -> RealtimeStream:
        """A session without threads and without a clock: the caller pushes prompts and frames, calls `step`, and gets
        events. For evaluation and for files. Arguments as for `create_realtime_session`, without the pace."""
        return RealtimeStream(self, processor, initial_prompt, system_prompt, **options)

    def online_generate(
        self,
        processor,
        input_queue,
        output_queue,
        frame_queue_size: int = FRAME_QUEUE_SIZE,
        max_tokens_per_turn: Optional[float] = TOKENS_PER_SECOND,
        **generate_kwargs,
    ) -> None:
        """Runs a session from a `queue.Queue` of dicts to a queue of strings, until a dict has `stop_online_generate`.

        The first dict may have `initial_prompt`, `system_prompt`, `frame_queue_size` and `max_tokens_per_turn`; the
        last two override the arguments. The next ones are {"frame", "timestamp"[, "prompt", "drop_oldest"]} or
        {"prompt"}, as `push_frame`, `push_prompt_frame` and `push_prompt` take them. After {"stop_online_generate":
        True} what waits is taken in, and the current reply is finished.

        The output is that of `poll_output`. An error is a string `[ERROR] MESSAGE`; after an error in a dict, the
        session goes on.
        """
        options = {"frame_queue_size": frame_queue_size, "max_tokens_per_turn": max_tokens_per_turn}
        try:
            message = read_message(input_queue.get(), START_KEYS | INPUT_KEYS)
            given = {name: message.pop(name, None) for name in START_KEYS}
            options |= {name: value for name, value in given.items() if value is not None}
            session = self.create_realtime_session(processor, **options, **generate_kwargs)
        except Exception as error:
            output_queue.put(error_text(error))
            return
        forward = threading.Thread(target=forward_output, args=(session, output_queue), daemon=True)
        with session:
            forward.start()
            while session.active:
                try:
                    push_message(session, message)
                except Exception as error:  # an error in one message must not end the session
                    output_queue.put(error_text(error))
                if message[STOP_KEY]:
                    break
                given = input_queue.get()
                try:
                    message = read_message(given, INPUT_KEYS)
                except ValueError as error:
                    output_queue.put(error_text(error))
                    message = {STOP_KEY: False}
            session.end()
            forward.join()


def read_message(message, known: set[str]) -> dict:
    """A copy of a dict of an input queue, with a bool under `STOP_KEY`. Raises ValueError for anything else, and for
    an unknown key."""
    if not isinstance(message, dict):
        raise ValueError(f"a message must be a dict, got {shorten(message)}")
    check_misspelled("a message", message, known | {STOP_KEY})
    if unknown := sorted(map(str, message.keys() - known - {STOP_KEY})):
        raise ValueError(f"a message has the unknown keys {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return {**message, STOP_KEY: flag(STOP_KEY, message.get(STOP_KEY))}


def push_message(session: RealtimeSession, message: dict) -> None:
    """Pushes the frame or the prompt of a dict, if it has one."""
    image, prompt = message.get("frame"), message.get("prompt")
    if image is None:
        if prompt is not None:
            session.push_prompt(prompt)
        return
    options = {"timestamp": message.get("timestamp"), "drop_oldest": message.get("drop_oldest"), "timeout": None}
    if prompt is None:
        session.push_frame(image, **options)
    else:
        session.push_prompt_frame(prompt, image, **options)


def forward_output(session: RealtimeSession, output_queue) -> None:
    """Puts the raw output of a session on a queue until the session ends."""
    for event in session.events():
        if isinstance(event, Failed):
            output_queue.put(error_text(event.error))
        elif event.raw:
            output_queue.put(event.raw)


def error_text(error: BaseException) -> str:
    return f"[ERROR] {error or type(error).__name__}"
