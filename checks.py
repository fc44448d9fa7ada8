"""Checks of arguments (numbers, flags, output formats), and what messages need: nearest names, short values."""

import difflib
import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np


def nearest_name(name: str, known, cutoff: float = 0.5) -> str | None:
    """The name in `known` whose spelling is closest to `name`; None if none is close."""
    return next(iter(difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)), None)


def shorten(value, length: int = 100) -> str:
    """A short `repr` for messages: strings, such as base64 data, are cut after `length` characters."""
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
    """`value` as an int. Raises ValueError unless it is a whole number of at least 1; 1e6 is accepted, True is not."""
    whole = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not whole or not math.isfinite(value) or value != int(value) or value < 1:
        raise ValueError(f"{name} must be a positive whole number, got {value!r}")
    return int(value)


def flag(name: str, value) -> bool:
    """`value` as a bool, None as False. Raises ValueError for anything else."""
    if value not in (None, True, False):
        raise ValueError(f"{name} must be True or False, got {shorten(value)}")
    return bool(value)


def positive_number(name: str, value) -> float:
    """`value` as a float. Raises ValueError unless it is a finite number above 0 or a string of one."""
    number = isinstance(value, (int, float, np.integer, np.floating, Fraction)) and not isinstance(value, bool)
    if isinstance(value, str):  # examples for Qwen models write numbers as strings
        try:
            value, number = float(value), True
        except ValueError:
            pass
    if not number or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be a number above 0, got {value!r}")
    return float(value)


def three_floats(name: str, value) -> tuple[float, float, float]:
    """One finite number per colour channel; if `name` ends in "std", each above 0. Raises ValueError otherwise."""
    try:
        numbers = tuple(float(x) for x in value)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3 or not all(math.isfinite(x) for x in numbers):
        raise ValueError(f"{name} must be three finite numbers, one for each of red, green and blue, got {value!r}")
    if name.endswith("std") and min(numbers) <= 0:
        raise ValueError(f"{name} divides, so each number must be above 0, got {value!r}")
    return numbers


def tensor_format(return_tensors) -> str | None:
    """`return_tensors` (or the value of an enum member): "pt", "np" or None. Raises ValueError otherwise."""
    kind = getattr(return_tensors, "value", return_tensors)
    if kind not in (None, "pt", "np"):
        raise ValueError(f"return_tensors must be 'pt', 'np' or None, got {return_tensors!r}")
    return kind


def finite_number(name: str, value) -> float:
    """`value` as a float. Raises ValueError unless it is a finite number or a string of one."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a number, got {shorten(value)}")
    return number
