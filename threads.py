"""A parallel `map` that keeps torch's inference mode, and stops its threads if one of them or the caller fails. And
functions for threads: one makes a device the current one, another frees what errors keep alive."""

import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch


class Stopped(Exception):
    """The work of this thread is no longer needed."""


class _Current(threading.local):
    stops = ()  # the events that end the work of this thread


_current = _Current()


def check_stop() -> None:
    """Raises Stopped if the work of this thread is no longer needed. Long loops call it."""
    for stop in _current.stops:
        if stop.is_set():
            raise Stopped


def stoppable(function: Callable, stop: threading.Event) -> Callable:
    """`function` for another thread: `check_stop` looks at `stop` and at the events of this thread, and torch's
    inference mode is the one of this thread."""
    stops, inference = (*_current.stops, stop), torch.is_inference_mode_enabled()

    def run(*args):
        before, _current.stops = _current.stops, stops
        try:
            with torch.inference_mode(inference):  # not inherited by threads, which write into tensors made here
                return function(*args)
        finally:
            _current.stops = before

    return run


def in_threads(threads: int, function: Callable, *columns) -> list:
    """`list(map(function, *columns))` on up to `threads` threads.

    Raises the error of the first item that failed, in the order of the items. Items that have not started are then
    cancelled, and those that run are stopped (`check_stop`), also by Ctrl-C.
    """
    rows = list(zip(*columns, strict=True))
    if threads == 1 or len(rows) < 2:
        return [function(*row) for row in rows]
    stop = threading.Event()
    run = stoppable(function, stop)
    pool = ThreadPoolExecutor(min(threads, len(rows)))
    waits = True
    try:
        futures = [pool.submit(run, *row) for row in rows]
        return [future.result() for future in futures]
    except KeyboardInterrupt:
        waits = False  # a library may be in the middle of one large image
        raise
    finally:
        stop.set()
        pool.shutdown(wait=waits, cancel_futures=True)


def clear_frames(error: BaseException) -> None:
    """Frees what the frames of an error hold, and those of the errors that caused it. The error itself may be kept for
    long, or go to another thread."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def on_device(device: torch.device) -> AbstractContextManager:
    """A context in which an accelerator (CUDA, NPU, XPU, ...) is the current device of this thread, as compiled
    kernels need it. Each thread has a current device of its own. Does nothing for a device without an index."""
    if device.index is None or device.type in ("cpu", "meta"):
        return nullcontext()
    select = getattr(torch.get_device_module(device), "device", None)  # MPS has one device and no such context
    return nullcontext() if select is None else select(device)
