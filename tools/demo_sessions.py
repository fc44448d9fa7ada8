"""What the visitors of the page of demo.py have: a conversation, and a live run. It works without Gradio.

The answers of all visitors are written beside each other, by one stream of the model on one thread; tools/serve.py
uses the same `AnswerWriter`. The steps of live runs are taken by the scheduler of the model.
"""

import queue
import re
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from moss_vl.tools.attention_maps import AnswerWord, FrameWeights, SeenFrames, answer_words, draw_map, word_attention
from moss_vl.tools.command_line import message_of
from moss_vl.tools.live import TOKENS_PER_SECOND, Feeder
from moss_vl.tools.live_sources import Item, Source


UPLOADS_PREFIX = "moss-vl-demo-"  # of the temporary folder


def message_for_user(error: BaseException) -> str:
    """An error as one line, without the number that a query has in the stream of all visitors, and without the folders
    of uploads."""
    message = re.sub(r"^query \d+: ", "", message_of(error))
    return re.sub(rf"[^\s'\"]*{UPLOADS_PREFIX}[^/\\]*[/\\]+\w+[/\\]+", "", message)


# answers


class AnswerWriter:
    """Writes the answers of all visitors, on a thread of its own.

    Args:
        rows: most answers that are written at once.
        cache_bytes: most bytes of the caches of all conversations. Those that were not continued for longest are
            encoded again when they go on. With 0, no caches are kept.
    """

    def __init__(self, model, processor, rows: int = 8, cache_bytes: int = 4 << 30):
        self.model = model
        self.processor = processor
        keep_cache = model.cache_budget(cache_bytes) if cache_bytes else False
        self.stream = model.stream_batch(processor, batch_size=rows, open_ended=True, keep_cache=keep_cache)
        self.lock = threading.Lock()  # so that no event comes before `begin` has its queue
        self.queues: dict[int, queue.Queue] = {}
        self.thread = threading.Thread(target=self._run, name="moss-vl-answers", daemon=True)
        self.thread.start()

    def begin(self, query: dict, state: dict | None, events=None) -> tuple[int, queue.Queue]:
        """The index of an answer, and a queue of its events. None in the queue: the writer was closed.

        Args:
            events: takes the events in place of a new queue; anything with `put`.
        """
        with self.lock:
            index = self.stream.add(query, state)
            self.queues[index] = queue.Queue() if events is None else events
            return index, self.queues[index]

    def cancel(self, index: int) -> None:
        self.stream.cancel(index)

    def close(self) -> None:
        self.stream.close()
        self.thread.join()

    def _run(self) -> None:
        try:
            for event in self.stream:
                with self.lock:
                    ended = event.kind != "piece"
                    waiting = self.queues.pop(event.index) if ended else self.queues[event.index]
                waiting.put(event)
        finally:  # also after an error that no query caused
            self.stream.close()
            with self.lock:
                for waiting in self.queues.values():
                    waiting.put(None)
                self.queues.clear()


class Conversation:
    """The questions of one visitor, with the state that keeps their cache.

    Attributes:
        state: the session state after the last answer; None before the first.
        answer: the last answer.
        reason: why it ended: "stop", "length" or "cancelled".
        words: the words of the last answer, for `look`. Empty if the conversation has no frames.
    """

    def __init__(self, writer: AnswerWriter):
        self.writer = writer
        self.lock = threading.Lock()
        self.index: int | None = None  # of the answer that is being written
        self.clear()

    def clear(self) -> None:
        """Starts a new conversation. An answer that is being written is cancelled and forgotten."""
        self.stop()
        with self.lock:
            self.index = None
            self.state, self.answer, self.reason = None, "", None
            self.words: list[AnswerWord] = []
            self._frames: SeenFrames | None = None

    @property
    def is_writing(self) -> bool:
        return self.index is not None

    def ask(self, query: dict) -> Iterator[str]:
        """Adds a turn, and yields the answer so far whenever there is more of it. If the iterator is closed before its
        end, the answer is cancelled.

        Raises:
            ValueError: if an answer is being written.
            Exception: the error of the query. The conversation is then as before.
        """
        with self.lock:
            if self.is_writing:
                raise ValueError("an answer is still being written; stop it, or wait for its end")
            index, events = self.writer.begin(query, self.state)
            self.index = index
        text, ended = "", False
        try:
            while True:
                event = events.get()
                while event is not None and event.kind == "piece" and not events.empty():  # a slow reader skips some
                    text += event.text
                    event = events.get()
                ended = event is None or event.kind != "piece"
                if event is None:
                    raise RuntimeError("the page was closed")
                if event.kind == "error":
                    raise event.error
                if event.kind == "end":
                    break
                text += event.text
                yield text
            with self.lock:
                if self.index == index:  # not cleared meanwhile
                    self._remember(event)
            yield event.text
        finally:
            if not ended:
                self.writer.cancel(index)
            with self.lock:
                if self.index == index:
                    self.index = None

    def _remember(self, event) -> None:
        self.state, self.answer, self.reason = event.session_state, event.text, event.reason
        self.words, self._frames = [], None
        kept = self._kept()
        if kept is not None and kept.frames and event.text:
            self.words = answer_words(self.writer.processor, kept, event.text)

    def stop(self) -> None:
        """Cancels the answer that is being written. What was written stays."""
        with self.lock:
            if self.is_writing:
                self.writer.cancel(self.index)

    def look(self, number: int) -> "Look":
        """What the word `number` of the last answer looked at.

        Raises:
            ValueError: if there is no such word, or the cache of the conversation was dropped.
        """
        kept = self._kept()
        if not 0 <= number < len(self.words):
            raise ValueError(f"the answer has {len(self.words)} words; got the number {number}")
        if kept is None:
            raise ValueError("the cache of this conversation was dropped to free memory; ask again")
        if self._frames is None:
            self._frames = SeenFrames.read(self.writer.processor, kept)
        word = self.words[number]
        return Look(word.text.strip(), word_attention(self.writer.model, kept, word.tokens), self._frames)

    def _kept(self):
        return getattr(self.state, "kept", None)


@dataclass(frozen=True)
class Look:
    """What a word of an answer looked at, frame by frame."""

    word: str
    weights: FrameWeights
    frames: SeenFrames

    @property
    def count(self) -> int:
        return len(self.weights.maps)

    @property
    def strongest(self) -> int:
        """The number of the frame that got most of the attention."""
        shares = self.weights.shares
        return shares.index(max(shares))

    def picture(self, number: int):
        """The frame with its weights as colours."""
        return draw_map(self.frames.image(number), self.weights.maps[number], self.weights.peak)

    def caption(self, number: int) -> str:
        seconds = self.frames.seconds[number]
        at = "" if seconds is None else f", at {seconds:.1f} s"
        return f"frame {number + 1} of {self.count}{at}: {self.weights.shares[number]:.0%} of the attention"


# live


class Remark(NamedTuple):
    """A line of a live run.

    Attributes:
        seconds: the time of the newest frame when it was said; None before the first frame.
        role: "user" or "assistant".
        text: what was said so far.
    """

    seconds: float | None
    role: str
    text: str


class LiveRun:
    """A realtime session of one visitor, with a video file that is played to it, or frames that are pushed.

    Attributes:
        remarks: what was said, in order.
        image: the newest frame of the source that the model has seen.
        seconds: the time of the newest frame that the model has seen.
        stopped: whether `stop` ended the run, and not its source.

    Args:
        source: a source of frames; None if they are pushed with `push`.
        options: as for `create_realtime_session`.

    Raises:
        ValueError: for a checkpoint that is no realtime one, and for a wrong option.
    """

    def __init__(self, model, processor, prompt: str = "", source: Source | None = None, **options):
        options.setdefault("max_tokens_per_turn", TOKENS_PER_SECOND)
        self.session = model.create_realtime_session(processor, prompt, **options)
        self.remarks: list[Remark] = []
        self.image, self.seconds, self.stopped = None, None, False
        self._waiting: deque[Item] = deque()  # frames of the source that were not taken in yet
        self._begun: float | None = None  # when the reply began that is being written
        self._writing = False
        self.feeder = None if source is None else Feeder(self.session, self._noted(source))

    def _noted(self, source: Source) -> Source:
        def items() -> Iterator[Item]:
            for item in source.items():
                self._waiting.append(item)
                yield item

        return Source(items, source.is_live)

    @property
    def active(self) -> bool:
        return self.session.active

    def push(self, image) -> None:
        """Adds a frame with the time of now. Without an effect after the end."""
        try:
            self.session.push_frame(image)
        except ValueError:
            if self.active:
                raise

    def ask(self, prompt: str) -> None:
        """Adds a question. Raises ValueError after the end."""
        self.session.push_prompt(prompt)

    def stop(self) -> None:
        """Ends the session at once, and frees its memory."""
        self.stopped = self.stopped or self.active
        self.session.close()
        if self.feeder is not None and self.feeder.thread.ident is not None:  # it was started
            self.feeder.stop()
        self._waiting.clear()

    def run(self) -> Iterator["LiveRun"]:
        """Starts the run, and yields it whenever something to show has changed, until its end. The session is closed
        then, also if the iterator is closed.

        Raises:
            Exception: what went wrong with the source or in the session.
        """
        if self.session.closed:  # stopped before it began
            return
        try:
            self.session.start()
            if self.feeder is not None:
                self.feeder.start()
            yield self
            for event in self.session.events():
                if self._take(event):
                    yield self
        finally:
            self.stop()
        if self.feeder is not None and self.feeder.error is not None:
            raise self.feeder.error

    def _take(self, event) -> bool:
        """Notes an event. Whether something to show has changed."""
        name = type(event).__name__
        if name == "Failed":
            raise event.error
        if name == "FrameTaken":
            self.seconds = event.seconds
            while self._waiting and self._waiting[0].seconds <= event.seconds:
                self.image = self._waiting.popleft().image
            return True
        if name == "PromptTaken":
            self._writing = False
            self.remarks.append(Remark(event.seconds, "user", event.text))
            return True
        if name == "ResponseBegins" and not event.continues:
            self._begun, self._writing = event.seconds, False
        elif name == "Text":
            if self._writing:
                self.remarks[-1] = self.remarks[-1]._replace(text=self.remarks[-1].text + event.text)
            else:
                begun = event.seconds if self._begun is None else self._begun
                self.remarks.append(Remark(begun, "assistant", event.text))
                self._begun, self._writing = None, True
            return True
        elif name == "ReplyEnds":
            self._writing = False
        return False


class Visitor:
    """What one browser tab has.

    Attributes:
        conversation: its questions.
        number: counts the conversations.
        messages: the conversation as the page shows it.
        look: what the chosen word looked at, or None.
        live: its live run, or None.
    """

    def __init__(self, writer: AnswerWriter):
        self.conversation = Conversation(writer)
        self.number = 0
        self.messages: list[dict] = []
        self.look: Look | None = None
        self.live: LiveRun | None = None

    def begin_anew(self) -> None:
        """Starts a new conversation."""
        self.number += 1
        self.conversation.clear()
        self.messages, self.look = [], None

    def start_live(self, run: LiveRun) -> LiveRun:
        """Replaces the live run; an earlier one is stopped."""
        self.stop_live()
        self.live = run
        return run

    def stop_live(self) -> None:
        if self.live is not None:
            self.live.stop()

    def close(self) -> None:
        """Frees what the visitor has."""
        self.begin_anew()
        self.stop_live()
        self.live = None


class Visitors:
    """The visitors by the key of their browser tab."""

    def __init__(self, writer: AnswerWriter):
        self.writer = writer
        self.lock = threading.Lock()
        self.visitors: dict[str, Visitor] = {}

    def of(self, key: str) -> Visitor:
        with self.lock:
            if key not in self.visitors:
                self.visitors[key] = Visitor(self.writer)
            return self.visitors[key]

    def leave(self, key: str) -> None:
        """The tab was closed: what its visitor had is freed."""
        with self.lock:
            visitor = self.visitors.pop(key, None)
        if visitor is not None:
            visitor.close()

    def close(self) -> None:
        for key in list(self.visitors):
            self.leave(key)
        self.writer.close()
