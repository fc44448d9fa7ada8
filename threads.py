"""A parallel `map` that keeps torch's inference mode."""

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
