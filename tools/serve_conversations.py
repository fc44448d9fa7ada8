"""Conversations of tools/serve.py that keep their caches. A request has all messages of its conversation. If those up
to the last answer are known, only the rest is computed, and the answer is the same."""

import hashlib
import json
import os
from collections import OrderedDict
from dataclasses import dataclass

from moss_vl.conversation import collect_media, read_medium, scheme_of


MAX_REQUEST_BYTES = 512 * 2**20  # of the messages of all conversations that are kept, with their data: URLs


@dataclass(frozen=True)
class MessageKeys:
    """What messages are recognised by.

    Attributes:
        earlier: the key of the messages up to the last answer; None if there is no answer, or nothing after it.
        new: the index of the message after it; otherwise 0.
        digest: a hash of all messages and of the media options.
        size: characters of all messages.
    """

    earlier: str | None
    new: int
    digest: object
    size: int

    @classmethod
    def of(cls, messages: list[dict], media_kwargs: dict) -> "MessageKeys":
        """The keys of plain messages whose media were resolved."""
        digest = hashlib.sha256(_as_json(media_kwargs))
        earlier, new, size = None, 0, 0
        for index, message in enumerate(messages):
            data = _as_json([message["role"], _parts(message), _files_of(message)])
            digest.update(data)
            size += len(data)
            if message["role"] == "assistant" and index + 1 < len(messages):
                earlier, new = digest.hexdigest(), index + 1
        if messages[-1]["role"] == "assistant":
            earlier, new = None, 0
        return cls(earlier, new, digest, size)

    def after(self, answer: str) -> str:
        """The key of the messages with their answer."""
        message = {"role": "assistant", "content": answer}
        digest = self.digest.copy()
        digest.update(_as_json([message["role"], _parts(message), []]))
        return digest.hexdigest()


def _as_json(value) -> bytes:
    return json.dumps(value, sort_keys=True).encode() + b"\n"


def _parts(message: dict) -> list:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _files_of(message: dict) -> list:
    """Size and time of each file that a message names, so that a changed one is another file."""
    found = []
    for kind in ("image", "video"):
        for medium in collect_media([message], kind):
            source, _ = read_medium(kind, medium)
            for one in source if isinstance(source, list) else [source]:
                if scheme_of(one) is None:
                    status = os.stat(one)
                    found.append([status.st_size, status.st_mtime_ns])
    return found


class Conversations:
    """Session states with caches, by the key of their messages. The one that was used last is at the end.

    A cache is dropped by the budget of the stream that made it; its state is dropped here afterwards.
    """

    def __init__(self):
        self.states: OrderedDict[str, tuple] = OrderedDict()  # key -> (state, size)

    def find(self, keys: MessageKeys):
        """The session state of the earlier messages; None if it is not known, or its cache was dropped."""
        state, _ = self.states.get(keys.earlier, (None, 0))
        if state is None or not state.has_cache:
            return None
        self.states.move_to_end(keys.earlier)
        return state

    def keep(self, keys: MessageKeys, answer: str, state) -> None:
        """Keeps the session state after an answer, if it has a cache."""
        if getattr(state, "has_cache", False):
            self.states[keys.after(answer)] = state, keys.size
        total = 0
        for key, (one, size) in reversed(list(self.states.items())):
            total += size
            if total > MAX_REQUEST_BYTES or not one.has_cache:
                del self.states[key]
