"""Answers of many queries as a stream of events, written beside each other (continuous batching).

A background thread reads queries and decodes their media, in order, within a budget. The thread that asks for events
does everything on the model: it prefills a prompt, without padding, as soon as a row is free and the limits allow it,
and adds one token to all rows at once. So memory does not grow with the number of queries.
"""

import asyncio
import numbers
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import ClassVar, Optional, Union

import torch

from .cache_layers import CACHE
from .checks import check_number, flag
from .generation_batches import (
    encode_turn,
    generate_inputs,
    longest_text,
    may_share_call,
    prompt_length,
    vision_length,
)
from .generation_queries import Turn, name_query, read_query
from .generation_rows import AnswerRow, CancelCriterion, PieceStreamer, add_tokens, as_ids, next_logits, start_row
from .generation_sessions import (
    CacheBudget,
    KeptPrefix,
    SessionState,
    check_keep_cache,
    keep_cache_of,
    prepare_turn,
)
from .threads import CallerModes, clear_frames, on_device


MOST_PADDING = 1.1  # rows x width over the tokens of a padded batch


@dataclass(frozen=True)
class BatchLimits:
    """What the answers that are written at once may need together. One answer may be written whatever the limits.

    Attributes:
        batch_size: most answers.
        max_text_tokens: most tokens of their prompts and answers.
        max_vision_tokens: most vision tokens in their caches.
        prepared_bytes: the media of the next queries are decoded while their pixels have fewer bytes than this.

    Raises:
        ValueError: for a limit that is no whole number, or too small.
    """

    batch_size: int = 8
    max_text_tokens: int = 1 << 15
    max_vision_tokens: int = 1 << 17
    prepared_bytes: int = 1 << 30

    def __post_init__(self):
        for name in ("batch_size", "max_text_tokens", "max_vision_tokens"):
            expected = "a whole number of at least 1"
            check_number(name, getattr(self, name), numbers.Integral, expected, lambda x: x >= 1)
        check_number("prepared_bytes", self.prepared_bytes, numbers.Integral, "a number of bytes", lambda x: x >= 0)


DEFAULT_LIMITS = BatchLimits()


@dataclass(frozen=True)
class AnswerPiece:
    """A piece of the answer to query `index`. The pieces of a query join to its answer."""

    kind: ClassVar[str] = "piece"
    index: int
    text: str


@dataclass(frozen=True)
class AnswerEnd:
    """The end of an answer.

    Attributes:
        index: the query.
        text: the whole answer.
        reason: "stop"; "length" if the answer has as many tokens as it may; "cancelled".
        result: the result of the query, as `offline_batch_generate` returns it. If the query was cancelled before its
            answer began, only "index" and "text".
        session_state: the state after the query.
    """

    kind: ClassVar[str] = "end"
    index: int
    text: str
    reason: str
    result: dict = field(repr=False)
    session_state: Optional[dict] = field(repr=False)


@dataclass(frozen=True)
class AnswerError:
    """An error that ends the answer to query `index`, and no other."""

    kind: ClassVar[str] = "error"
    index: int
    error: Exception


AnswerEvent = Union[AnswerPiece, AnswerEnd, AnswerError]


@dataclass(eq=False)
class _Entry:
    """A query of a stream.

    Attributes:
        query, state: as the caller gave them; the query may be a turn already.
        turn, inputs, prefix: what the background thread makes of them.
        error: why it could not.
        text_tokens, vision_tokens: what the answer adds to the limits of the stream, after it was prepared.
        prepared: whether the background thread is done.
        cancelled: whether the caller has cancelled the query.
        row, pieces: the answer that is being written; None before it begins.
    """

    index: int
    query: Union[dict, Turn]
    state: Optional[dict]
    turn: Optional[Turn] = None
    inputs: Optional[dict] = None
    prefix: Optional[KeptPrefix] = None
    error: Optional[Exception] = None
    text_tokens: int = 0
    vision_tokens: int = 0
    prepared: bool = False
    cancelled: bool = False
    row: Optional[AnswerRow] = None
    pieces: Optional[PieceStreamer] = None

    def pixel_bytes(self) -> int:
        tensors = [] if self.inputs is None else [self.inputs.get(name) for name in ("pixel_values", "image_features")]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


class BatchStream:
    """The answers to many queries, as an iterator of events; also an asynchronous one. See
    `MossVLForConditionalGeneration.stream_batch`.

    `add`, `cancel`, `finish` and `close` may be called between two events, and from other threads. Several threads may
    take events.
    """

    def __init__(
        self,
        model,
        processor,
        queries: Sequence[Union[dict, Turn]],
        session_states: Optional[list],
        *,
        limits: BatchLimits,
        vision_chunked_length: int,
        keep_cache: Union[bool, CacheBudget],
        open_ended: bool = False,
        names_queries: bool = True,
        fills_rows: bool = False,
    ):
        self._model, self._processor, self._limits = model, processor, limits
        self._vision_chunked_length, self._names_queries = vision_chunked_length, names_queries
        self._fills_rows = fills_rows  # before a token is added: fewer calls, but later first pieces
        self._open = flag("open_ended", open_ended)
        check_keep_cache(keep_cache)
        self._keeps = keep_cache is not False
        self._budget = keep_cache if isinstance(keep_cache, CacheBudget) else None
        self._modes = CallerModes(model.device)
        self._entries: list[_Entry] = []  # of all queries that have not ended, by index; None afterwards
        self._to_prepare: deque[_Entry] = deque()
        self._to_start: deque[_Entry] = deque()  # in the order of the queries, whether prepared or not
        self._rows: list[_Entry] = []
        self._events: deque[AnswerEvent] = deque()
        self._changed = threading.Condition(threading.RLock())  # guards all of these
        self._at_model = threading.Lock()  # held by the thread that uses the model
        self._preparing = self._closed = self._told = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="moss-vl-media")
        self._next: Optional[asyncio.Future] = None
        states = [None] * len(queries) if session_states is None else session_states
        for query, state in zip(queries, states, strict=True):
            self._enqueue(query, state)
        with self._changed:
            self._prepare_next()

    # what callers do

    def add(self, query: dict, session_state: Optional[dict] = None) -> int:
        """Adds a query and returns its index. If the iteration has ended, it can go on.

        Raises:
            ValueError: after `close`.
        """
        with self._changed:
            if self._closed:
                raise ValueError("the stream is closed and takes no query; call stream_batch again")
            index = self._enqueue(query, session_state)
            self._prepare_next()
            self._changed.notify_all()
        return index

    def cancel(self, index: int) -> bool:
        """Ends the answer to a query: it leaves its row before the next token, and its end event says "cancelled".

        Returns:
            False if the query had ended already.

        Raises:
            ValueError: for an index that no query has.
        """
        with self._changed:
            if not isinstance(index, int) or not 0 <= index < len(self._entries):
                raise ValueError(f"index must be that of one of the {len(self._entries)} queries, got {index!r}")
            entry = self._entries[index]
            if entry is None or self._closed:
                return False
            entry.cancelled = True
            self._changed.notify_all()
        return True

    def finish(self) -> None:
        """Ends an open-ended stream after the queries that it has."""
        with self._changed:
            self._open = False
            self._changed.notify_all()

    def close(self) -> None:
        """Drops all queries that have not ended, with their media and caches. The iteration ends, without events for
        them."""
        with self._changed:
            self._closed, self._open = True, False
            for entries in (self._to_prepare, self._to_start, self._rows, self._events):
                entries.clear()
            self._entries = [None] * len(self._entries)
            self._changed.notify_all()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def for_each(self, callback: Callable[[AnswerEvent], object]) -> None:
        """Calls `callback` with each event, until the stream ends."""
        for event in self:
            callback(event)

    def results(self) -> dict:
        """Takes all events, and returns what `offline_batch_generate` returns; for a query with an error, its result
        has the keys "index" and "error".

        Raises:
            ValueError: if events were taken before.
        """
        if self._told:
            raise ValueError("events were taken from the stream; call results() before that, or collect the events")
        ends = sorted((event for event in self if event.kind != "piece"), key=lambda event: event.index)
        return {
            "results": [
                {"index": end.index, "error": end.error} if end.kind == "error" else end.result for end in ends
            ],
            "session_states": [getattr(end, "session_state", None) for end in ends],
        }

    def __enter__(self) -> "BatchStream":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def __del__(self):
        if hasattr(self, "_pool"):
            self._pool.shutdown(wait=False, cancel_futures=True)

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> AnswerEvent:
        while self._wait():
            if (event := self._pop()) is not None:
                return event
        raise StopIteration

    def __aiter__(self) -> "BatchStream":
        return self

    async def __anext__(self) -> AnswerEvent:
        """The model runs on a thread. No event is lost if the waiting task is cancelled, or its loop ends."""
        while True:
            waiting, loop = self._next, asyncio.get_running_loop()
            if waiting is None or waiting.get_loop() is not loop:
                waiting = self._next = asyncio.ensure_future(asyncio.to_thread(self._wait))
            try:
                goes_on = await asyncio.shield(waiting)
            finally:
                if waiting.done() and self._next is waiting:
                    self._next = None
            if not goes_on:
                raise StopAsyncIteration
            if (event := self._pop()) is not None:
                return event

    # the background thread

    def _enqueue(self, query, state) -> int:
        with self._changed:
            entry = _Entry(len(self._entries), query, state)
            for entries in (self._entries, self._to_prepare, self._to_start):
                entries.append(entry)
            return entry.index

    def _prepare_next(self) -> None:
        """Has the background thread prepare the next query, if it is idle and the budget has space. At least one query
        is prepared whatever the budget."""
        ready = [entry for entry in self._to_start if entry.prepared]
        pixels = sum(map(_Entry.pixel_bytes, ready))
        full = len(ready) >= self._limits.batch_size or pixels >= self._limits.prepared_bytes
        if self._closed or self._preparing or not self._to_prepare or (ready and full):
            return
        self._preparing = True
        entry = self._to_prepare.popleft()
        self._pool.submit(self._prepare, entry, alone=len(self._entries) == 1)

    def _prepare(self, entry: _Entry, alone: bool) -> None:
        try:
            if not entry.cancelled:
                named = name_query(entry.index) if self._names_queries else nullcontext()
                with self._modes.entered(), on_device(self._model.device), named:
                    entry.turn = self._read(entry)
                    entry.inputs, entry.prefix = prepare_turn(self._model, self._processor, entry.turn, alone)
                entry.text_tokens = longest_text(entry.turn, entry.inputs)
                entry.vision_tokens = vision_length(self._model, entry.inputs)
                if entry.prefix is not None:
                    entry.vision_tokens += entry.prefix.vision_tokens(self._model, entry.inputs)
        except BaseException as error:  # also a panic of a tokenizer, which is no Exception
            entry.error = error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")
        with self._changed:
            entry.prepared, self._preparing = True, False
            self._changed.notify_all()
            self._prepare_next()

    def _read(self, entry: _Entry) -> Turn:
        if isinstance(entry.query, Turn):
            return entry.query
        return read_query(self._model, self._processor, entry.query, entry.state, self._vision_chunked_length)

    # the thread that uses the model

    def _wait(self) -> bool:
        """Works until there is an event. False at the end."""
        with self._at_model, on_device(self._model.device):
            while True:
                with self._changed:
                    if self._closed or self._events:
                        return not self._closed
                if not self._advance():
                    return False

    def _pop(self) -> Optional[AnswerEvent]:
        """The next event; None if another reader took it."""
        with self._changed:
            if not self._events:
                return None
            self._told = True
            return self._events.popleft()

    def _advance(self) -> bool:
        """Prefills the next prompts if rows are free, then adds a token to each row; waits if there is nothing to do.
        False at the end."""
        with self._changed:
            if self._end_cancelled():
                return True
            if not self._rows and not self._can_start():
                if not self._to_start and not self._open:
                    return False
                self._changed.wait()
                return True
        while (entry := self._next_to_start()) is not None:
            self._start(entry)
            if not self._fills_rows:
                break
        if self._rows:
            self._add_tokens(list(self._rows))
        if self._closed:  # meanwhile, by another thread
            self._rows.clear()
        return True

    def _can_start(self) -> bool:
        return bool(self._to_start) and self._to_start[0].prepared and self._fits(self._to_start[0])

    def _next_to_start(self) -> Optional[_Entry]:
        """Takes the next query if its media are ready and it fits."""
        with self._changed:
            if not self._can_start():
                return None
            entry = self._to_start.popleft()
            self._prepare_next()
            return entry

    def _fits(self, entry: _Entry, beside: Sequence[_Entry] = ()) -> bool:
        """Whether an answer fits into the limits, with those of the rows and the answers `beside` them."""
        entries, limits = [*self._rows, *beside, entry], self._limits
        return len(entries) == 1 or (
            len(entries) <= limits.batch_size
            and sum(one.text_tokens for one in entries) <= limits.max_text_tokens
            and sum(one.vision_tokens for one in entries) <= limits.max_vision_tokens
        )

    def _end_cancelled(self) -> bool:
        """Ends the answers that were cancelled. Whether there were any."""
        cancelled = [entry for entry in (*self._rows, *self._to_start) if entry.cancelled]
        for entry in cancelled:
            for entries in (self._to_prepare, self._to_start):
                if entry in entries:
                    entries.remove(entry)
            self._end(entry, "cancelled")
        if cancelled:
            self._prepare_next()
        return bool(cancelled)

    def _start(self, entry: _Entry) -> None:
        """Prefills a prompt, and writes the first token. An answer that needs another method of `generate` is written
        here as a whole."""
        if entry.error is not None:
            return self._fail(entry, entry.error)
        try:
            batch, arguments = generate_inputs(self._model, entry.turn.generate, [entry.inputs])
            entry.pieces = PieceStreamer(self._processor.tokenizer)
            cache = {} if entry.prefix is None else {CACHE: entry.prefix.fork(self._model)}
            started = start_row(self._model, {**batch, **cache}, arguments)
            if started is None:
                return self._start_whole(entry)
        except Exception as error:
            return self._fail(entry, error)
        except BaseException:  # an interrupt
            self._put_back([entry])
            raise
        del batch
        entry.inputs, (entry.row, logits) = None, started
        self._rows.append(entry)
        self._write([entry], [logits])

    def _start_whole(self, entry: _Entry) -> None:
        """Has `generate` write a whole answer, and with it those of other prepared queries that may share the call
        and need little padding."""
        with self._changed:
            while self._preparing and not self._closed:
                self._changed.wait()
            if self._closed:
                return
            group = [entry]
            for other in list(self._to_start):
                if self._may_join(other, group):
                    self._to_start.remove(other)
                    group.append(other)
            self._prepare_next()
        try:
            self._answer_whole(group)
        except BaseException:
            self._put_back(group[1:])
            raise

    def _put_back(self, entries: list[_Entry]) -> None:
        """Lets queries be started again, except those that have ended."""
        with self._changed:
            entries = [entry for entry in entries if self._entries[entry.index] is entry]
            for entry in entries:
                entry.pieces = None
            self._to_start.extendleft(reversed(entries))

    def _may_join(self, other: _Entry, group: list[_Entry]) -> bool:
        if not other.prepared or other.error is not None or other.prefix is not None or group[0].prefix is not None:
            return False
        lengths = [prompt_length(one.inputs) for one in (*group, other)]
        return (
            max(lengths) * len(lengths) <= MOST_PADDING * sum(lengths)
            and may_share_call(other.turn, other.inputs, group[0].turn, group[0].inputs)
            and self._fits(other, beside=group)
        )

    def _answer_whole(self, entries: list[_Entry]) -> None:
        """One `generate` call for all. If it fails, each is tried alone, so that only those that fail end."""
        turn, model = entries[0].turn, self._model
        try:
            inputs = [entry.inputs for entry in entries]
            if entries[0].prefix is not None:  # `generate` takes the whole prompt
                inputs = [encode_turn(model, self._processor, turn)]
            batch, arguments = generate_inputs(model, turn.generate, inputs)
            cancelled = CancelCriterion(lambda: [entry.cancelled for entry in entries])
            criteria = [*arguments.get("stopping_criteria", ()), cancelled]
            width = prompt_length(batch)
            ids = model.generate(**batch, **arguments | {"stopping_criteria": criteria})[:, width:]
        except Exception as error:
            if len(entries) == 1:
                return self._fail(entries[0], error)
            for entry in entries:
                self._answer_whole([entry])
            return
        eos = as_ids(arguments.get("eos_token_id", model.generation_config.eos_token_id))
        most = arguments.get("max_new_tokens")
        most = arguments["max_length"] - width if most is None else most
        full, ends = ids.shape[1] >= most, {*eos, arguments["pad_token_id"]}
        texts = self._processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        for entry, text, last in zip(entries, texts, ids[:, -1].tolist(), strict=True):
            entry.pieces = PieceStreamer(self._processor.tokenizer)
            if text:
                entry.pieces.pieces.append(text)
            self._end(entry, "cancelled" if entry.cancelled else "length" if full and last not in ends else "stop")

    def _add_tokens(self, entries: list[_Entry]) -> None:
        """One joint call for all rows. If it fails, each row is tried alone, so that only rows that fail end."""
        try:
            logits = next_logits(self._model, [entry.row for entry in entries])
        except Exception as error:
            if len(entries) == 1:
                return self._fail(entries[0], error)
            for entry in entries:
                self._add_tokens([entry])
            return
        self._write(entries, logits)

    def _write(self, entries: list[_Entry], logits: list[torch.Tensor]) -> None:
        """Adds a token to each of these rows. Rows that end leave."""
        for entry, token in zip(entries, add_tokens([entry.row for entry in entries], logits), strict=True):
            if isinstance(token, Exception):
                self._fail(entry, token)
                continue
            try:
                entry.pieces.write(token)
            except Exception as error:  # the tokenizer cannot decode it
                self._fail(entry, error)
                continue
            if entry.row.ended:
                full = entry.row.tokens.ids.shape[1] >= entry.row.max_length
                self._end(entry, "length" if full and token not in entry.row.eos_token_ids else "stop")
            else:
                self._tell_piece(entry)

    def _tell_piece(self, entry: _Entry) -> None:
        if text := entry.pieces.take():
            self._events.append(AnswerPiece(entry.index, text))

    def _end(self, entry: _Entry, reason: str) -> None:
        try:
            event = self._end_event(entry, reason)
        except Exception as error:  # no memory to keep the cache, say: it must not end the other answers
            return self._fail(entry, error)
        self._leave(entry)
        self._events.append(event)

    def _end_event(self, entry: _Entry, reason: str) -> AnswerEnd:
        text, result, state = "", {"index": entry.index, "text": ""}, entry.state
        if entry.pieces is not None:
            entry.pieces.end()
            self._tell_piece(entry)
            text, turn = entry.pieces.text, entry.turn
            messages, state = turn.finish(text)
            if self._keeps and turn.persist and entry.row is not None:
                kept = keep_cache_of(self._model, self._processor, turn, entry.row, self._budget)
                state = SessionState(state, kept)
            result = turn.result(entry.index, text, messages)
        return AnswerEnd(entry.index, text, reason, result, state)

    def _fail(self, entry: _Entry, error: Exception) -> None:
        clear_frames(error)  # else the event would keep pixels and caches alive
        self._leave(entry)
        self._events.append(AnswerError(entry.index, error))

    def _leave(self, entry: _Entry) -> None:
        """Frees what a query holds."""
        with self._changed:
            if entry in self._rows:
                self._rows.remove(entry)
            self._entries[entry.index] = None
        entry.row = entry.inputs = entry.prefix = None
