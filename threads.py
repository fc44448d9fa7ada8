"""A parallel `map` that keeps torch's inference mode, and a budget that its threads share."""

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def in_threads(threads: int, function: Callable, *columns) -> list:
    """`list(map(function, *columns))` on up to `threads` threads.

    Raises the error of the first item that failed, in the order of the items; items that have not started are
    cancelled.
    """
    rows = list(zip(*columns, strict=True))
    if threads == 1 or len(rows) < 2:
        return [function(*row) for row in rows]
    inference = torch.is_inference_mode_enabled()  # not inherited by threads, which write into tensors made here

    def run(row):
        with torch.inference_mode(inference):
            return function(*row)

    with ThreadPoolExecutor(min(threads, len(rows))) as pool:
        futures = [pool.submit(run, row) for row in rows]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()


class PixelBudget:
    """The pixels that the threads of one call may hold at once.

    A thread waits until its share is free. A share above the whole budget is reduced to it, so that it is taken alone.
    """

    def __init__(self, pixels: int):
        self._pixels, self._free, self._changed = pixels, pixels, threading.Condition()

    @contextlib.contextmanager
    def taken(self, pixels: int):
        pixels = min(pixels, self._pixels)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()
