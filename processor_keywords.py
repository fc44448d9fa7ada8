"""Keyword arguments of the processor's calls: which part takes each of them, and errors for those that none takes."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from .checks import nearest_name, shorten
from .options import FIXED, FIXED_TEXT, REFUSED, drop_fixed, names_of, read_options
from .text_rows import TEXT_OPTIONS


CALL_OPTIONS = names_of("call")
NESTED_KWARGS = ("text_kwargs", "images_kwargs", "videos_kwargs", "common_kwargs")
GRID_NAMES = ("grid_thw", "image_grid_thw")
TEMPLATE_ARGUMENTS = (
    "chat_template",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "return_dict",
    "return_tensors",
    "return_assistant_tokens_mask",
    "processor_kwargs",
)
# The tags {% generation %} and {% endgeneration %} of transformers, which plain Jinja does not know.
GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


@dataclass(frozen=True)
class SortedOptions:
    """The options of a call by who takes them, under the names of options.py, without those that are None."""

    text: dict
    images: dict
    videos: dict
    call: dict


def sort_options(kwargs: Mapping, image_names: Iterable[str], video_names: Iterable[str]) -> SortedOptions:
    """Sorts the keyword arguments of a call, flat or inside `text_kwargs`, `images_kwargs`, `videos_kwargs` and
    `common_kwargs`.

    Args:
        image_names, video_names: the options that the image and the video processor take.

    Raises:
        ValueError: for an unknown keyword, and for an option that is given twice.
    """
    fixed = FIXED.keys() - set(CALL_OPTIONS)
    accepted = {
        "text_kwargs": {*TEXT_OPTIONS, *FIXED_TEXT},
        "images_kwargs": {*image_names, *fixed},
        "videos_kwargs": {*video_names, *fixed},
    }
    known = {*CALL_OPTIONS, *accepted["text_kwargs"], *accepted["images_kwargs"], *accepted["videos_kwargs"]}
    nested = {name: _nested_kwargs(kwargs, name) for name in NESTED_KWARGS}
    shared = _read_flat({name: value for name, value in kwargs.items() if name not in NESTED_KWARGS}, known)
    shared = merge_once(shared, read_options(nested.pop("common_kwargs"), known, "common_kwargs"), "common_kwargs")

    sorted_options, call = {}, {name: value for name, value in shared.items() if name in CALL_OPTIONS}
    for taker, names in accepted.items():
        of_call = {name: value for name, value in nested[taker].items() if name in CALL_OPTIONS}
        call = merge_once(call, of_call, taker)
        of_taker = {name: value for name, value in nested[taker].items() if name not in CALL_OPTIONS}
        options = {name: value for name, value in shared.items() if name in names}
        sorted_options[taker] = merge_once(options, read_options(of_taker, names, taker), taker)
    return SortedOptions(
        text=drop_fixed(sorted_options["text_kwargs"], "MossVLProcessor", FIXED_TEXT),
        images=sorted_options["images_kwargs"],
        videos=sorted_options["videos_kwargs"],
        call=call,
    )


def _nested_kwargs(kwargs: Mapping, name: str) -> Mapping:
    nested = kwargs.get(name) or {}
    if not isinstance(nested, Mapping):
        raise ValueError(f"{name} must be a dict of keyword arguments, got a {type(nested).__name__}")
    return nested


def _read_flat(flat: dict, known: set[str]) -> dict:
    for name in flat:
        if name not in known and name not in REFUSED and (hint := hint_of_generate(name)):
            raise ValueError(f"MossVLProcessor: {hint}")
    return read_options(flat, {*known, *NESTED_KWARGS}, "MossVLProcessor")


def merge_once(options: dict, others: Mapping, where: str) -> dict:
    """Joins options, without those that are None.

    Args:
        where: how the caller gave `others`, for the message.

    Raises:
        ValueError: for an option that is given in both.
    """
    for name in others:
        if others[name] is not None and options.get(name) is not None:
            raise ValueError(f"{name} is given twice, the second time as {where}")
    merged = {**options, **{name: value for name, value in others.items() if value is not None}}
    return {name: value for name, value in merged.items() if value is not None}


def read_grid_name(name) -> str:
    if name not in GRID_NAMES:
        raise ValueError(f"grid_name must be one of {', '.join(GRID_NAMES)}, got {shorten(name)}")
    return name


def read_device(device) -> torch.device | None:
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device must be that of a tensor, such as 'cuda:0', got {shorten(device)}: {error}"
        ) from error


def hint_of_generate(name: str) -> str | None:
    """A hint for a keyword that belongs to `generate`; None for other names."""
    if name not in vars(GenerationConfig()):
        return None
    return (
        f"{name} is an argument of generate, not of the processor; a pipeline takes it as "
        f"generate_kwargs={{{name!r}: ...}}"
    )


# chat templates


def check_template_variables(template: str, variables: Mapping, known: set[str], arguments: Mapping) -> None:
    """Raises ValueError for a variable or argument that the chat template does not read.

    Args:
        template: Jinja.
        variables: keyword arguments that the processor does not take.
        known: names that the processor takes, for the nearest name.
        arguments: arguments of `apply_chat_template` that only the template may use, None or empty if not given.
    """
    given = [*variables, *(name for name, value in arguments.items() if value)]
    if not given:
        return
    read = _variables_of(template)
    for name in given:
        if name in read:
            continue
        if name in arguments:
            raise ValueError(
                f"apply_chat_template: {name} is given, but the chat template does not read it; leave it out, or pass "
                "chat_template="
            )
        if name in REFUSED:
            raise ValueError(f"apply_chat_template: {name} is no option of MOSS-VL: {REFUSED[name]}")
        if hint := hint_of_generate(name):
            raise ValueError(f"apply_chat_template: {hint}")
        near = nearest_name(name, {*known, *TEMPLATE_ARGUMENTS, *read} - FIXED.keys())
        hint = f"did you mean {near!r}?" if near else "neither the processor nor the chat template reads it"
        raise ValueError(f"apply_chat_template: unknown keyword {name!r}; {hint}")


def require_generation_tags(template: str) -> None:
    """Raises ValueError if a chat template does not mark the text of the assistant."""
    if not GENERATION_TAG.search(template):
        raise ValueError(
            "return_assistant_tokens_mask needs a chat template that marks what the assistant says with "
            "{% generation %} and {% endgeneration %}; this one does not. Add the marks to chat_template.jinja, or "
            "pass chat_template="
        )


def _variables_of(template: str) -> set[str]:
    try:
        from jinja2 import Environment, meta
    except ImportError as error:
        raise ImportError("a chat template needs jinja2: pip install jinja2") from error
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    return meta.find_undeclared_variables(environment.parse(GENERATION_TAG.sub("", template)))
