"""Shared by the commands: types of arguments for argparse, and errors as one line."""

import argparse
import re
from collections.abc import Callable


def at_least(kind: type, lowest: int) -> Callable:
    """An argparse type: finite numbers of `kind` (int or float) from `lowest` on."""

    def convert(text):
        value = kind(text)
        if not lowest <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be at least {lowest}, got {text}")
        return value

    convert.__name__ = {int: "whole number", float: "number"}[kind]  # argparse puts it into messages
    return convert


def above_0(text: str) -> float:
    """An argparse type: finite numbers above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def weight(text: str) -> float:
    """An argparse type: numbers from 1e-6 to 1e6, whose sums and products stay exact enough in float32."""
    value = float(text)
    if not 1e-6 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"must be from 1e-6 to 1e6, got {text}")
    return value


def share(text: str) -> float:
    """An argparse type: numbers above 0 and at most 1."""
    value = above_0(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"must be at most 1, got {text}")
    return value


above_0.__name__ = weight.__name__ = share.__name__ = "number"  # argparse puts it into messages


def message_of(error: Exception) -> str:
    """An exception as one line. Its type is added unless the message is meant for users."""
    if isinstance(error, FileNotFoundError) and error.filename is not None:  # raised by the operating system
        return f"no such file: {error.filename}"
    words = " ".join(re.sub(r"^query \d+: ", "", str(error)).split())
    return words if isinstance(error, (ValueError, OSError)) and words else f"{type(error).__name__}: {words}"
