"""Reads the turns of a training record, in all forms, into one: messages as a chat template takes them, and media.

Nothing is opened here: records.py probes the media. training/README.md describes the forms.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from moss_vl.checks import nearest_name, shorten
from moss_vl.conversation import (
    PLACEHOLDER,
    PLACEHOLDERS,
    SOURCE_KEYS,
    fill_placeholders,
    read_part,
    split_placeholders,
    write_placeholders,
)
from moss_vl.realtime_protocol import RESPONSE, SILENCE
from moss_vl.training.record_media import count_all, read_media, read_one_medium
from moss_vl.training.tool_turns import check_text, read_function_call, read_tool_calls, read_tools


CHAT_KEYS = ("messages", "conversations")
PAIR_KEYS = ("prompt", "response")
ALPACA_KEYS = ("instruction", "input", "output", "history")
ALIASES = {"image": "images", "video": "videos", "system": "system_prompt"}
KEYS = ("images", "videos", "system_prompt", "tools", "weight", "id", *CHAT_KEYS, *PAIR_KEYS, *ALPACA_KEYS)
TURN_KEYS = ("role", "content", "from", "value", "tool_calls", "loss", "name", "tool_call_id")
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_call": "call",
    "tool_call": "call",
}
WEIGHTS = 1e-6, 1e6  # their sums and products stay exact enough in float32
MISSPELLED = 0.8  # similarity of a key beside those of a stream; "video_id" is another key, "weigth" is not
TAG = re.compile("<(image|video)>")  # a placeholder as LLaVA, LlamaFactory and ms-swift write it


@dataclass
class Turn:
    """One turn: its role ("system", "user", "assistant" or "tool"), plain parts, and the other keys of its message.

    `loss` is False for a turn of the assistant that is not learned.
    """

    role: str
    parts: list[dict]
    others: dict = field(default_factory=dict)
    loss: bool = True

    @property
    def is_empty(self) -> bool:
        has_text = any(part["type"] == "text" and part["text"].strip() for part in self.parts)
        return not has_text and "tool_calls" not in self.others


@dataclass(frozen=True)
class Conversation:
    """What a record says; the attributes are those of `records.Record`."""

    messages: list[dict]
    images: list
    videos: list
    tools: list[dict] | None = None
    weight: float = 1.0


def read_conversation(given, folder: Path) -> Conversation:
    """The conversation of a record. Relative paths start at `folder`.

    Raises:
        ValueError: for a bad record.
    """
    given = _read_keys(given)
    media = {kind: read_media(kind, given.get(f"{kind}s"), folder) for kind in SOURCE_KEYS}
    chat = [name for name in CHAT_KEYS if name in given]
    if chat:
        turns = _read_turns(given[chat[0]], chat[0], folder)
        _replace_tags(turns, media)
    else:
        turns = _read_pair(given, media)
        if _replace_tags(turns, media):
            chat = ["prompt"]  # the placeholders take the media
        else:
            _put_media_first(turns, media)
    for turn in turns:
        turn.parts = list(split_placeholders(turn.parts))
    turns = _with_system_prompt(turns, given.get("system_prompt"))
    _check_turns(turns, is_pair=not any(name in given for name in CHAT_KEYS))
    messages = [{"role": turn.role, "content": turn.parts, **turn.others} for turn in turns]
    images, videos = (_assign_media(kind, messages, media[kind] if chat else []) for kind in SOURCE_KEYS)
    for message, turn in zip(messages, turns, strict=True):
        message["content"] = write_placeholders(message["content"])
        if not turn.loss:
            message["loss"] = False
    return Conversation(messages, images, videos, read_tools(given.get("tools")), _read_weight(given.get("weight")))


# keys


def check_keys(what: str, given, known) -> dict:
    """`given` without its nulls. Raises ValueError if it is not an object or has an unknown key."""
    if not isinstance(given, dict):
        raise ValueError(f"{what} must be an object, got {given!r:.60}")
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in known:
            near = nearest_name(name, known)
            hint = f"did you mean {near!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{what} has an unknown key {name!r}; {hint}")
    return given


def _read_keys(given) -> dict:
    """The keys of a record under their canonical names, without nulls and without keys that have no effect.

    Raises:
        ValueError: for an unknown key, for two names of one thing, and unless the turns are given in one form.
    """
    if isinstance(given, dict) and speaks_in_stream(given):
        given = {name: value for name, value in given.items() if _is_meant(name)}
    given = check_keys("a record", given, (*KEYS, *ALIASES))
    for alias, name in ALIASES.items():
        if alias in given:
            if name in given:
                raise ValueError(f"a record has {alias!r} and {name!r}, which mean the same; leave out one of them")
            given[name] = given.pop(alias)
    return _keep_one_form(given)


def _keep_one_form(given: dict) -> dict:
    """A record with the keys of one form of turns. Other forms may be there if they are empty, as in the rows of mixed
    tables. Raises ValueError unless there is one form."""
    forms = [[name for name in names if name in given] for names in (PAIR_KEYS, ALPACA_KEYS, *zip(CHAT_KEYS))]
    forms = [names for names in forms if names]
    filled = [names for names in forms if any(given[name] not in ("", []) for name in names)] or forms
    if len(filled) != 1:
        found = [name for names in filled for name in names]
        raise ValueError(
            "expected prompt and response, or instruction and output, or else messages or conversations; got "
            f"{', '.join(found) or 'neither'}"
        )
    empty = {name for names in forms if names is not filled[0] for name in names}
    return {name: value for name, value in given.items() if name not in empty}


def speaks_in_stream(record: dict) -> bool:
    """Whether an assistant of a record, as given, writes the tokens of realtime streams."""

    def texts(content):
        for part in content if isinstance(content, list) else [content]:
            yield part.get("text") if isinstance(part, dict) else part

    for name in CHAT_KEYS:
        for turn in record[name] if isinstance(record.get(name), list) else ():
            if isinstance(turn, dict) and ROLES.get(str(turn.get("role") or turn.get("from"))) == "assistant":
                content = turn.get("content") if turn.get("content") is not None else turn.get("value")
                if any(isinstance(text, str) and (SILENCE in text or RESPONSE in text) for text in texts(content)):
                    return True
    return False


def _is_meant(name: str) -> bool:
    """Whether a key of a stream record is known, or a misspelling. Streams in files have other keys beside them."""
    known = (*KEYS, *ALIASES)
    return name in known or nearest_name(name, known, MISSPELLED) is not None


def _read_weight(weight) -> float:
    if weight is None:
        return 1.0
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    least, most = WEIGHTS
    if not is_number or not least <= weight <= most:
        raise ValueError(
            f"weight must be a number above 0, got {weight!r:.60}; expected {least:g} to {most:g}. Leave out records "
            "of no weight"
        )
    return float(weight)


# turns


def _read_pair(given: dict, media: dict) -> list[Turn]:
    """The turns of {"prompt", "response"}, or of {"instruction", "input", "output", "history"}."""
    names = ALPACA_KEYS if any(name in given for name in ALPACA_KEYS) else PAIR_KEYS
    first, last = ("instruction", "output") if names is ALPACA_KEYS else PAIR_KEYS
    if given.get(last) is None:
        raise ValueError(f"a record with {first} needs {last}; got no {last}")
    texts = {name: given.get(name, "") for name in names if name != "history"}
    pairs = given.get("history", [])
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"history must be a list of [{first}, {last}], got {shorten(pairs)}")
    said = [("history", text) for pair in pairs for text in pair]
    for name, text in (*texts.items(), *said):
        if not isinstance(text, str):
            raise ValueError(f"{name} must be a string, got {text!r:.60}")
        if found := PLACEHOLDER.search(text):
            raise ValueError(
                f"{name} holds {found[0]!r}, but its media come before the prompt automatically; for another order "
                "use 'messages'"
            )
        check_text(name, text)
    prompt = "\n".join(text for text in (texts[first], texts.get("input", "")) if text)
    contents = [*(text for _, text in said), prompt, texts[last]]
    if not texts[last].strip():
        raise ValueError(f"the {last} is empty")
    return [Turn(("user", "assistant")[index % 2], [_text(content)]) for index, content in enumerate(contents)]


def _text(text: str) -> dict:
    return {"type": "text", "text": text}


def _read_turns(messages, name: str, folder: Path) -> list[Turn]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name} must be a list of at least one {{'role', 'content'}}, got {messages!r:.60}")
    turns, calling = [], False
    for index, message in enumerate(messages):
        what = f"turn {index}"
        message = check_keys(what, message, TURN_KEYS)
        role, content, others = _split_message(what, message)
        calls = ROLES[role] == "call"
        if calls:
            others["tool_calls"] = read_function_call(what, content)
            if calling:  # one turn with several calls
                turns[-1].others["tool_calls"] += others["tool_calls"]
                turns[-1].loss &= others.get("loss", True)
                continue
            content = ""
        calling = calls
        loss = _read_loss(what, ROLES[role], others.pop("loss", None))
        turns.append(Turn("assistant" if calls else ROLES[role], _read_parts(what, content, folder), others, loss))
    return turns


def _split_message(what: str, message: dict) -> tuple[str, object, dict]:
    """(role, content, other keys) of a message."""
    keys = ("from", "value") if "from" in message else ("role", "content")
    others = {name: value for name, value in message.items() if name not in keys}
    if "tool_calls" in others:
        others["tool_calls"] = read_tool_calls(what, others["tool_calls"])
        if not others["tool_calls"]:
            del others["tool_calls"]
        message.setdefault(keys[1], "")
    spelled = [name for name in message if name in ("role", "content", "from", "value")]
    if set(spelled) != set(keys):
        raise ValueError(
            f"{what}: expected role and content, or from and value; got {', '.join(message) or 'nothing'}"
        )
    role, content = (message[key] for key in keys)
    if not isinstance(role, str) or role not in ROLES:
        near = nearest_name(role, ROLES)
        hint = f"did you mean {near!r}?" if near else f"known: {', '.join(ROLES)}"
        raise ValueError(f"{what}: unknown role {role!r}; {hint}")
    for name, wanted in (("tool_calls", "assistant"), ("tool_call_id", "tool"), ("name", "tool")):
        if name in others and ROLES[role] != wanted:
            raise ValueError(f"{what}: {name} belongs into a turn of role {wanted}, got it in one of role {role}")
    return role, content, others


def _read_loss(what: str, role: str, loss) -> bool:
    if loss is None:
        return True
    if not isinstance(loss, bool):
        raise ValueError(f"{what}: loss must be true or false, got {loss!r:.60}")
    if loss and role not in ("assistant", "call"):
        raise ValueError(f"{what}: loss is true, but only turns of the assistant are learned, not of the {role}")
    return loss


def _read_parts(what: str, content, folder: Path) -> list[dict]:
    """The plain parts of a content. Relative paths start at `folder`."""
    if not isinstance(content, (str, list)):
        raise ValueError(f"{what}: content must be a string or a list of parts, got {content!r:.60}")
    parts = []
    for part in [content] if isinstance(content, str) else content:
        part = read_part(part, f"{what}: a part")
        kind = part["type"]
        if kind == "text":
            check_text(what, part["text"])
        elif kind in part:
            part[kind] = read_one_medium(kind, part[kind], folder)
        parts.append(part)
    return parts


def _with_system_prompt(turns: list[Turn], system) -> list[Turn]:
    if system is not None and not isinstance(system, str):
        raise ValueError(f"system_prompt must be a string, got {system!r:.60}")
    if not system:
        return turns
    if turns[0].role == "system":
        raise ValueError("the messages begin with a system turn, and there is a system_prompt; leave out one of them")
    return [Turn("system", [_text(check_text("system_prompt", system))]), *turns]


def _check_turns(turns: list[Turn], is_pair: bool) -> None:
    """Raises ValueError unless a user turn comes first, after a system turn if any, an assistant turn last, tool turns
    after turns of the assistant, and something is learned."""
    roles = [turn.role for turn in turns]
    for index, turn in enumerate(turns):
        if turn.role == "assistant" and turn.is_empty:
            raise ValueError("the response is empty" if is_pair else f"turn {index}, the assistant's, is empty")
        if turn.role == "tool" and roles[index - 1] not in ("assistant", "tool"):
            raise ValueError(f"turn {index} is a result of a tool; expected it after the assistant's call")
    if "assistant" not in roles:
        raise ValueError("there is no assistant turn, so there is nothing to learn")
    if not any(turn.loss for turn in turns if turn.role == "assistant"):
        raise ValueError("every turn of the assistant has loss false, so there is nothing to learn")
    if "system" in roles[1:]:
        raise ValueError(f"turn {roles.index('system', 1)} is a system turn; expected it at the beginning")
    if roles[0 if roles[0] != "system" else 1] != "user":
        raise ValueError("the conversation begins with the assistant; expected a user turn, which may be empty")
    if roles[-1] != "assistant":
        owner = "user's" if roles[-1] == "user" else "result of a tool"
        raise ValueError(f"the last turn is the {owner}; expected an assistant turn at the end")


# media


def _replace_tags(turns: list[Turn], media: dict) -> bool:
    """Writes `<|image|>` for `<image>`, and `<|video|>` for `<video>`, if the record has such media. Without them, the
    words stay text. Returns whether anything was replaced.

    Raises:
        ValueError: for a record that also has placeholders or parts of the other form.
    """
    parts = [part for turn in turns for part in turn.parts]
    given = {kind for kind in media if media[kind] or any(kind in part for part in parts)}
    texts = [part["text"] for part in parts if part["type"] == "text"]
    tags = {kind for text in texts for kind in TAG.findall(text)} & given
    if not tags:
        return False
    tag = f"<{min(tags)}>"
    other = next((found[0] for text in texts if (found := PLACEHOLDER.search(text))), None)
    if other is None and any(part["type"] != "text" for part in parts):
        other = "a part that is a medium"
    if other is not None:
        raise ValueError(
            f"the record has {tag!r} and {other}; write one form of placeholder in a record. Where {tag!r} is meant "
            "as text, write it differently"
        )
    for part in parts:
        part["text"] = TAG.sub(lambda found: PLACEHOLDERS[found[1]] if found[1] in tags else found[0], part["text"])
    return True


def _put_media_first(turns: list[Turn], media: dict) -> None:
    """Puts the media of {"prompt", "response"} before the first prompt: images, then videos."""
    turns[0].parts = [*({"type": kind, kind: medium} for kind in media for medium in media[kind]), *turns[0].parts]


def _assign_media(kind: str, messages: list, media: list) -> list:
    """Assigns the `media` of a record to the parts of a kind. Returns all media of the kind, in text order."""
    parts = [part for message in messages for part in message["content"] if part["type"] == kind]
    empty = [part for part in parts if kind not in part]
    if len(empty) == len(parts) == count_all(kind, media) != len(media):
        return media  # one placeholder per segment; the placeholders need not be consecutive
    fill_placeholders(kind, messages, media)
    return [part[kind] for part in parts]
