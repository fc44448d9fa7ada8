"""Checks of arguments: numbers, flags, choices, misspelled names. `shorten` writes values for error messages."""

import difflib
import math
import numbers
import re
from collections.abc import Mapping
from fractions import Fraction

import numpy as np


# Least similarity, by difflib, of an unknown name and a known one
TYPO_SIMILARITY = 0.85  # for an error: "generation_kwargs" is near "generate_kwargs", "prompt_id" is not near "prompt"
HINT_SIMILARITY = 0.7  # for a hint in another error: "seed" is not near "streamer"
# The user and password of a URL. A password may hold "/", "?" or "#", against the standard; a port has digits alone.
URL_LOGIN = re.compile(
    r"^(\s*(?:https?:[/\\]*|[a-z][a-z0-9+.-]*://))(?:[^/?#\\]*|[^/?#\\:\[]*:(?!\d*(?:[/?#]|$))[^@]*)@", re.IGNORECASE
)


def nearest_name(name: str, known, cutoff: float = 0.5) -> str | None:
    """The name in `known` whose spelling is closest to `name`; None if none is close."""
    return next(iter(difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)), None)


def shorten(value, length: int = 100) -> str:
    """A short `repr` for messages: strings, such as base64 data, are cut after `length` characters, and URLs have no
    user and password."""
    if isinstance(value, str):
        value = without_login(value)
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


def without_login(text: str) -> str:
    """A URL without its user and password; any other text unchanged."""
    return URL_LOGIN.sub(r"\1", text, count=1) if "@" in text[:4096] else text


def check_characters(name: str, text: str) -> str:
    """The text. Raises ValueError for a lone surrogate, which is half of a character: no tokenizer takes it."""
    if not text.isascii() and (found := re.search("[\ud800-\udfff]", text)):
        raise ValueError(
            f"{name} holds {found[0]!r} at character {found.start()}, which is half of a character; expected text "
            "that UTF-8 can encode: decode bytes with errors='replace', or join both halves of an escape in JSON"
        )
    return text


def positive_int(name: str, value) -> int:
    """`value` as an int. Raises ValueError unless it is a whole number of at least 1; 1e6 is accepted, True is not."""
    whole = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not whole or not is_finite(value) or value != int(value) or value < 1:
        raise ValueError(f"{name} must be a positive whole number, got {shorten(value)}")
    return int(value)


def flag(name: str, value) -> bool:
    """`value` as a bool, None as False. Raises ValueError for anything else."""
    if value not in (None, True, False):
        raise ValueError(f"{name} must be True or False, got {shorten(value)}")
    return bool(value)


def positive_number(name: str, value) -> float:
    """`value` as a float. Raises ValueError unless it is a finite number above 0 or a string of one."""
    given = value
    number = isinstance(value, (int, float, np.integer, np.floating, Fraction)) and not isinstance(value, bool)
    if isinstance(value, str):  # examples for Qwen models write numbers as strings
        try:
            value, number = float(value), True
        except ValueError:
            pass
    try:
        value = float(value) if number else math.nan
    except OverflowError:  # an int of more than 308 digits
        value = math.inf
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be a number above 0, got {shorten(given)}")
    return value


def three_floats(name: str, value) -> tuple[float, float, float]:
    """One finite number per colour channel; if `name` ends in "std", each above 0. Raises ValueError otherwise."""
    try:
        numbers = tuple(float(x) for x in value)
    except (TypeError, ValueError, OverflowError):
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
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a number, got {shorten(value)}")
    return number


def plain_number(value):
    """The Python number or bool of a numpy scalar; any other value as it is."""
    return value.item() if isinstance(value, np.generic) else value


def is_finite(value) -> bool:
    """Whether a number is finite and has a value as a float, which integers of more than 308 digits have not."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_number(name: str, value, kind, expected: str, fits) -> None:
    """ValueError unless `value` is a finite number of class `kind` (such as `numbers.Integral`) and `fits(value)`."""
    if isinstance(value, bool) or not isinstance(value, kind) or not is_finite(value) or not fits(value):
        raise ValueError(f"{name} must be {expected}, got {shorten(value)}")


def is_flag(value) -> bool:
    """Whether `value` is True, False, or a number that equals one of them."""
    return isinstance(value, (bool, np.bool_)) or (isinstance(value, (numbers.Real, np.number)) and value in (0, 1))


def flag_or(name: str, value, default: bool | None) -> bool | None:
    """`value` as a bool, `default` for None. Raises ValueError for anything else."""
    if value is not None and not is_flag(value):
        expected = "True, False or None" if default is None else "True or False"
        raise ValueError(f"{name} must be {expected}, got {shorten(value)}")
    return default if value is None else bool(value)


def check_choice(what: str, value, known) -> None:
    """Raises ValueError unless `value` is None or one of the `known` strings."""
    if value is not None and (not isinstance(value, str) or value not in known):
        raise ValueError(f"{what}: unknown value {shorten(value)}; {name_hint(value, known)}")


def name_hint(name, known) -> str:
    """The end of a message about an unknown name: the nearest known name, or all of them."""
    near = nearest_name(name, known, HINT_SIMILARITY) if isinstance(name, str) else None
    return f"did you mean {near!r}?" if near else f"known: {', '.join(sorted(known))}"


def check_misspelled(what: str, value: Mapping, known, elsewhere=()) -> None:
    """Raises ValueError for a key of `value` that is probably a misspelling of a key in `known` or `elsewhere`.

    Other unknown keys are left to the caller. Keys with a digit are never taken for misspellings: no known name has a
    digit, and "prompt_2" is one of a series.
    """
    for name in value.keys() - known:
        spelled = str(name).lower().replace("-", "_").replace(" ", "_")
        if any(letter.isdigit() for letter in spelled):
            continue
        typos = (one for one in (*sorted(known), *sorted(elsewhere)) if is_typo(spelled, one))
        near = next(typos, None) or nearest_name(spelled, known, cutoff=TYPO_SIMILARITY)
        if near is not None:
            raise ValueError(f"{what}: unknown key {name!r}; did you mean {near!r}?")


def is_typo(a: str, b: str) -> bool:
    """Whether two names differ by one letter (replaced, added or missing), or by two neighbours that are swapped.

    False if a name has fewer than five letters: short names differ by one letter too often.
    """
    if min(len(a), len(b)) < 5 or abs(len(a) - len(b)) > 1:
        return False
    i = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    swapped = a[i : i + 2] == b[i : i + 2][::-1] and a[i + 2 :] == b[i + 2 :]
    return swapped or a[i + 1 :] == b[i + 1 :] or a[i + 1 :] == b[i:] or a[i:] == b[i + 1 :]
