"""Takes the steps of many realtime streams on one model, in turn, on one thread.

Each turn takes one step of every session that has something to do. Steps that only write a token share one forward
(`decode_rows`); steps that take in prompts or frames are computed alone. The thread waits, without computing, while no
session has anything to do, and ends with the last session.
"""

import threading
import time
import weakref

from transformers.utils import logging

from .realtime_stream import RealtimeStream
from .threads import on_device


logger = logging.get_logger(__name__)


class Scheduler:
    """The thread that computes the sessions of a model. It exists only while there are sessions."""

    def __init__(self, model):
        self.model = model
        self.condition = threading.Condition()
        self.sessions: list = []
        self.thread: threading.Thread | None = None
        self.current: list = []  # sessions whose steps are being computed

    def add(self, session) -> None:
        with self.condition:
            self.sessions.append(session)
            if self.thread is None:
                self.thread = threading.Thread(target=self._run, name="moss-vl-realtime", daemon=True)
                self.thread.start()
            self.condition.notify_all()

    def wake(self) -> None:
        """Something has come for a session."""
        with self.condition:
            self.condition.notify_all()

    def remove(self, session, timeout: float | None) -> bool:
        """Ends the steps of a session, and the thread if it was the last one.

        Returns:
            False if its current step did not end within `timeout` seconds.
        """
        with self.condition:
            if session in self.sessions:
                self.sessions.remove(session)
            self.condition.notify_all()
            thread = self.thread
            if threading.current_thread() is thread:
                return True

            def is_done():
                return session not in self.current and (thread is None or self.sessions or self.thread is not thread)

            if not self.condition.wait_for(is_done, timeout):
                return False
            ends = thread is not None and self.thread is not thread
        if ends:
            thread.join()  # it has nothing more to do
        return True

    def _run(self) -> None:
        with on_device(self.model.device):
            while True:
                with self.condition:
                    self.current = self._wait()
                    if not self.current:
                        self.thread = None
                        self.condition.notify_all()
                        return
                try:
                    self._turn(self.current)
                finally:
                    with self.condition:
                        self.current = []
                        self.sessions = [session for session in self.sessions if not session.stream.ended]
                        self.condition.notify_all()

    def _wait(self) -> list:
        """The sessions that have something to do now; none if there are no sessions."""
        while self.sessions:
            now = time.monotonic()
            times = [session.due_at() for session in self.sessions]
            ready = [session for session, due in zip(self.sessions, times, strict=True) if due <= now]
            if ready:
                return ready
            wait = min(times) - now
            self.condition.wait(None if wait == float("inf") else wait)
        return []

    def _turn(self, sessions: list) -> None:
        """One step of each session."""
        writing, others = [], []
        for session in sessions:
            work = session.begin_step()
            if work is not None:
                (writing if work.only_writes else others).append((session, work))
        logits = self._joint_logits([session.stream for session, _ in writing])
        for row, (session, work) in enumerate(writing):
            session.finish_step(work, None if logits is None else logits[row])
        for session, work in others:
            session.finish_step(work, None)

    def _joint_logits(self, streams: list[RealtimeStream]):
        """Logits [R, W] of one forward for streams that only write; None if each has to be computed alone."""
        if len(streams) < 2:
            return None
        try:
            return self.model.decode_rows([stream.ids[-1] for stream in streams], [stream.cache for stream in streams])
        except Exception as error:  # all caches are as before; a session that fails alone ends alone
            logger.warning_once(
                f"A joint step of {len(streams)} realtime sessions failed, and is computed one by one: {error}"
            )
            return None


_lock = threading.Lock()
_schedulers = weakref.WeakKeyDictionary()  # model -> weak reference to its scheduler; sessions keep the scheduler


def scheduler_of(model) -> Scheduler:
    """The scheduler that all sessions of a model share."""
    with _lock:
        reference = _schedulers.get(model)
        scheduler = None if reference is None else reference()
        if scheduler is None:
            scheduler = Scheduler(model)
            _schedulers[model] = weakref.ref(scheduler)
        return scheduler
