"""Tools in training records: their descriptions, and the calls of the assistant, as chat templates take them."""

import json

from moss_vl.checks import shorten


TURN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")  # inside a text they would end its turn


def check_text(what: str, text) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{what}: a text must be a string, got {text!r:.60}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} holds {text[error.start]!a}, half of a surrogate pair, which is no character; write the "
            "character that was meant"
        ) from None
    for token in TURN_TOKENS:
        if token in text:
            raise ValueError(f"{what} holds {token!r}, which training adds automatically; leave it out")
    return text


def read_tools(given) -> list[dict] | None:
    """The tools of a record, {"type": "function", "function": {"name", "description", "parameters"}} each; None
    without tools.

    Args:
        given: a list of these or of bare functions {"name", ...}, any of them as JSON, or all as one JSON string.

    Raises:
        ValueError: for anything else.
    """
    if given is None or given == "":
        return None
    tools = _parse("tools", given)
    if not isinstance(tools, list):
        raise ValueError(f"tools must be a list of JSON schemas, or that as JSON, got {shorten(given)}")
    return [_read_tool(f"tool {index}", tool) for index, tool in enumerate(tools)] or None


def _read_tool(what: str, tool) -> dict:
    tool = _given(_parse(what, tool))
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(
            f"{what} must be {{'type': 'function', 'function': {{'name', 'description', 'parameters'}}}}, or that "
            f"function; got {shorten(tool)}"
        )
    _check_words(what, function)
    return tool if function is not tool else {"type": "function", "function": function}


def read_tool_calls(what: str, calls) -> list[dict]:
    """The calls of an assistant turn, {"type": "function", "function": {"name", "arguments"}} each.

    Args:
        calls: a list of these or of bare {"name", "arguments"}, or that as JSON; `arguments` may be JSON, too.

    Raises:
        ValueError: for anything else.
    """
    calls = _parse(f"{what}: tool_calls", calls)
    if not isinstance(calls, list):
        raise ValueError(f"{what}: tool_calls must be a list, got {shorten(calls)}")
    return [_read_call(what, call) for call in calls]


def _read_call(what: str, call) -> dict:
    call = _given(call)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{what}: a tool call must have name and arguments, got {shorten(call)}")
    arguments = _parse(f"{what}: the arguments of {function['name']}", function.get("arguments", {}))
    if not isinstance(arguments, dict):
        raise ValueError(f"{what}: the arguments of {function['name']} must be an object, got {shorten(arguments)}")
    function = {**function, "arguments": arguments}
    _check_words(what, function)
    others = {name: value for name, value in call.items() if name != "function"} if "function" in call else {}
    return {"type": "function", **others, "function": function}


def read_function_call(what: str, content) -> list[dict]:
    """The calls in the content of a turn of role `function_call`: JSON of a call, or of a list of calls."""
    calls = _parse(what, content)
    return read_tool_calls(what, calls if isinstance(calls, list) else [calls])


def _parse(what: str, given):
    """The value of a JSON string; anything else unchanged."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except ValueError as error:
        raise ValueError(f"{what}: {shorten(given)} is not JSON: {error}") from None


def _given(value):
    """An object without the keys whose value is null; anything else unchanged."""
    return {name: one for name, one in value.items() if one is not None} if isinstance(value, dict) else value


def _check_words(what: str, value) -> None:
    """Raises ValueError if a string anywhere in a JSON value holds a token that ends a turn."""
    if isinstance(value, str):
        check_text(what, value)
    elif isinstance(value, (dict, list)):
        for one in (*value, *value.values()) if isinstance(value, dict) else value:
            _check_words(what, one)
