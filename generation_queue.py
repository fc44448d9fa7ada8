"""The queue interface of `offline_generate`: serves queries one by one, streams answers, cancels them."""

import queue
from collections import deque
from contextlib import suppress
from dataclasses import replace

import torch
from transformers import StoppingCriteria, TextStreamer

from .checks import is_flag
from .generation_queries import CANCEL_KEYS, QUEUE_KEYS, Turn, check_query, read_flag, read_query
from .generation_sessions import check_keep_cache
from .generation_streams import AnswerEnd, BatchLimits, BatchStream


ROUND_START, ROUND_END = "<|round_start|>", "<|round_end|>"


class QueueServer:
    """Answers the queries of `new_queries` on `output_text_queue`, until one stops it. See `offline_generate`.

    Attributes:
        waiting: queries taken from `new_queries` while an answer was generated, in their order.
        state: the session state that the next query continues.
    """

    def __init__(self, model, processor, new_queries, output_text_queue, vision_chunked_length: int, keep_cache=False):
        self.model = model
        self.processor = processor
        self.new_queries = new_queries
        self.output_text_queue = output_text_queue
        self.vision_chunked_length = vision_chunked_length
        self.keep_cache = check_keep_cache(keep_cache)
        self.waiting = deque()
        self.state = None

    def serve(self) -> None:
        """Answers queries until one has `stop_offline_generate`; then puts the waiting ones back on `new_queries`."""
        try:
            while True:
                query = self.waiting.popleft() if self.waiting else self.new_queries.get()
                try:
                    query = without_cancel(query)
                    if query is None:
                        continue
                    if read_flag(query, "stop_offline_generate"):
                        return
                    self.answer(query)
                except Exception as error:  # an error in one query must not end the service
                    self.output_text_queue.put(f"[ERROR] {error or type(error).__name__}")
                self.output_text_queue.put(ROUND_END)
        finally:
            put_back(self.new_queries, self.waiting)

    def answer(self, query: dict) -> None:
        """Puts the answer of a query on the output queue, in pieces if the query has `stream_output`."""
        stream = read_flag(query, "stream_output")
        query = {
            name: value for name, value in query.items() if name not in ("stop_offline_generate", "stream_output")
        }
        query["persist_session"] = read_flag(query, "persist_session")
        turn = read_query(self.model, self.processor, query, self.state, self.vision_chunked_length)
        cancel = CancelCriteria(self.new_queries, self.waiting)
        arguments = turn.generate | {"stopping_criteria": [*turn.generate.get("stopping_criteria", []), cancel]}
        if stream:
            if "streamer" in arguments:
                raise ValueError("a query has stream_output or a streamer in its generate_kwargs, got both")
            arguments["streamer"] = QueueStreamer(self.processor.tokenizer, self.output_text_queue)
        end = self.finish(replace(turn, generate=arguments))
        self.state = end.session_state
        if not stream:
            self.output_text_queue.put(end.text)

    def finish(self, turn: Turn) -> AnswerEnd:
        """Writes the answer of a turn. Raises the error that ends it."""
        with BatchStream(
            self.model,
            self.processor,
            [turn],
            None,
            limits=BatchLimits(batch_size=1, prepared_bytes=0),
            vision_chunked_length=self.vision_chunked_length,
            keep_cache=self.keep_cache,
            names_queries=False,
        ) as stream:
            *_, last = stream
        if last.kind == "error":
            raise last.error
        return last


class QueueStreamer(TextStreamer):
    """Puts `ROUND_START` on a queue when generation starts, and text as soon as later tokens can no longer change
    it."""

    def __init__(self, tokenizer, output_text_queue):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.output_text_queue = output_text_queue

    def put(self, value: torch.Tensor) -> None:
        if self.next_tokens_are_prompt:
            self.output_text_queue.put(ROUND_START)
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.output_text_queue.put(text)


class CancelCriteria(StoppingCriteria):
    """Moves new queries to `waiting` after each token, in their order. Stops the answer at a query that cancels it."""

    def __init__(self, new_queries, waiting: deque):
        self.new_queries = new_queries
        self.waiting = waiting
        self.cancelled = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        """True for all rows if the answer was cancelled, bool [B]."""
        while True:
            try:
                query = self.new_queries.get_nowait()
            except queue.Empty:
                break
            if is_cancel(query):
                self.cancelled = True
                query = drop_cancel_keys(query)
                if not query:
                    continue
            self.waiting.append(query)
        return torch.full((len(input_ids),), self.cancelled, dtype=torch.bool, device=input_ids.device)


def is_cancel(query) -> bool:
    return isinstance(query, dict) and any(is_flag(query.get(key)) and query.get(key) for key in CANCEL_KEYS)


def drop_cancel_keys(query: dict) -> dict:
    return {key: value for key, value in query.items() if key not in CANCEL_KEYS}


def without_cancel(query) -> dict | None:
    """The query without its cancel flags; None if it has no other keys. Raises ValueError for anything but a query."""
    check_query(query, QUEUE_KEYS)
    if not any(key in query for key in CANCEL_KEYS):
        return query
    for key in CANCEL_KEYS:
        read_flag(query, key)
    return drop_cancel_keys(query) or None


def put_back(new_queries, waiting: deque) -> None:
    """Puts the waiting queries back at the front of the queue."""
    if not waiting:
        return
    if isinstance(getattr(new_queries, "queue", None), deque):  # a queue.Queue: at its front, under its lock
        with new_queries.mutex:
            new_queries.queue.extendleft(reversed(waiting))
            new_queries.not_empty.notify_all()
        return
    with suppress(queue.Empty):  # other queues cannot insert at the front: take all out, and put all in again
        while True:
            waiting.append(new_queries.get_nowait())
    for query in reversed(waiting) if isinstance(new_queries, queue.LifoQueue) else waiting:
        new_queries.put(query)
