"""The processes of a run, as torchrun and accelerate start them."""

import os
from collections.abc import Callable
from datetime import timedelta

import torch


LONGEST_WAIT = timedelta(days=2)  # for the checks of the main process


class FailedElsewhere(Exception):
    """The main process raised an error, and reports it."""


def is_main() -> bool:
    """Whether this is the process that writes files, among those started by torchrun or accelerate."""
    return int(os.environ.get("RANK", "0")) == 0


def in_main_process(compute: Callable):
    """What `compute()` returns in the main process, in every process. The others wait, without a limit that the
    checks of a large data file could reach.

    Raises:
        FailedElsewhere: in the other processes, if `compute` raises an error in the main process.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return compute()
    waiting = torch.distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
    failed, value = None, None
    if is_main():
        try:
            value = compute()
        except BaseException as error:
            failed = error
    message = [failed is not None, value]
    torch.distributed.broadcast_object_list(message, src=0, group=waiting)
    torch.distributed.destroy_process_group(waiting)
    if failed is not None:
        raise failed
    if message[0]:
        raise FailedElsewhere
    return message[1]
