"""Ctrl-C in the middle of work, for tests."""

import signal
import threading
import time

import pytest


def seconds_to_stop(work, after: float) -> float:
    """Runs `work`, sends Ctrl-C to this thread `after` seconds, and returns how long `work` then takes to raise it."""
    sent = []

    def interrupt():
        time.sleep(after)
        sent.append(time.monotonic())
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            work()
    finally:
        signal.signal(signal.SIGINT, previous)
    return time.monotonic() - sent[0]
