"""Checks of arguments, written once: numbers, flags, and names that are nearly right. Values for messages are shortened here."""

import difflib
import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np


def nearest_name(name: str, known, cutoff: float = 0.5) -> str | None:
    """The name of `known` that is spelled most like `name`, None if none is near."""
    return next(iter(difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)), None)


def shorten(value, length: int = 100) -> str:
    """`repr(value)` for a message, at most `length` characters of it: a base64 string is never quoted whole."""
    if isinstance(value, str):
        return repr(value) if len(value) <= length else f"{value[:length]!r}... ({len(value)} characters)"
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"{len(value)} bytes"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{shorten(k, length)}: {shorten(v, length)}" for k, v in list(value.items())[:8]) + "}"
    if isinstance(value, (list, tuple)):
        rest = f", ... ({len(value)} in all)" if len(value) > 4 else ""
        return "[" + ", ".join(shorten(x, length) for x in value[:4]) + rest + "]"
    text = repr(value) if isinstance(value, (int, float, type(None))) else f"a {type(value).__name__}"
    return text[:length]


def positive_int(name: str, value) -> int:
    """`value` as an int of at least 1 (1e6 is one, True is not), else a ValueError that names it."""
    whole = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not whole or not math.isfinite(value) or value != int(value) or value < 1:
        raise ValueError(f"{name} must be a positive whole number, got {value!r}")
    return int(value)


def flag(name: str, value) -> bool:
    """`value` as a bool, None as False, else a ValueError that names it."""
    if value not in (None, True, False):
        raise ValueError(f"{name} must be True or False, got {shorten(value)}")
    return bool(value)


def positive_number(name: str, value) -> float:
    """`value` (a numeric string is one) as a float above 0, else a ValueError that names it."""
    number = isinstance(value, (int, float, np.integer, np.floating, Fraction)) and not isinstance(value, bool)
    if isinstance(value, str):  # as examples of Qwen write it
        try:
            value, number = float(value), True
        except ValueError:
            pass
    if not number or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be a number above 0, got {value!r}")
    return float(value)


def finite_number(name: str, value) -> float:
    """`value` as a finite float (a numeric string is one), else a ValueError that names it."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a number, got {shorten(value)}")
    return number
