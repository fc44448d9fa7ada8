"""Reads the query files of infer.py, and media that may be images or videos, for `offline_batch_generate`."""

import json
import mimetypes
import os
from dataclasses import dataclass
from pathlib import Path

from moss_vl.checks import shorten
from moss_vl.conversation import (
    SOURCE_KEYS,
    local_path,
    locate,
    media_before_text,
    medium_kind,
    read_medium,
    read_messages,
    read_turns,
    replace_media,
    scheme_of,
)


# files of queries


def read_lines(file: Path) -> list[str]:
    """The queries of a file as lines of JSON. The file has a query per line, or is a JSON list, or is one query.

    Raises:
        ValueError: for a file that is not UTF-8, or that ends in .json, begins like JSON and is not JSON.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}; expected a JSON object per line, or a JSON list") from None
    if file.suffix == ".json" and text.lstrip()[:1] == "{":
        try:
            return [json.dumps(json.loads(text))]
        except json.JSONDecodeError as error:
            if not _is_json(text.lstrip().split("\n")[0]):  # a .json file may hold lines of JSON, too
                raise ValueError(f"{file} begins like a JSON object, but is not one: {error}") from None
    if text.lstrip()[:1] == "[":
        try:
            return [json.dumps(query) for query in json.loads(text)]
        except json.JSONDecodeError as error:
            if file.suffix == ".json":
                raise ValueError(f"{file} begins like a JSON list, but is not one: {error}") from None
    return [line for line in text.split("\n") if line.strip()]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def parse_line(line: str) -> dict:
    """The JSON object of a line. Raises ValueError for anything else."""
    try:
        query = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"a query must be a JSON object, got {line:.60}: {error}") from None
    if not isinstance(query, dict):
        raise ValueError(f"a query must be a JSON object, got {line:.60}")
    return query


def extra_keys(query: dict) -> dict:
    """The items of a line that are copied into its result, as they are no part of its query."""
    from moss_vl.generation_queries import QUEUE_KEYS  # imports torch and transformers

    known = {*QUEUE_KEYS, "media", "conversations", "index", "text", "error"}
    return {name: value for name, value in query.items() if name not in known}


# media


@dataclass(frozen=True)
class MediaReader:
    """Reads media as a command line or a query file names them.

    Attributes:
        allow_http: whether http(s) URLs may be downloaded.
        allow_private_hosts: whether they may be at private addresses.
        folder: where relative paths start; None leaves them alone.
    """

    allow_http: bool
    folder: Path | None = None
    allow_private_hosts: bool = False

    def resolve(self, kind: str, medium):
        """The medium, relative paths joined to `folder`. Raises ValueError for a URL that must not be downloaded."""
        if self.folder is not None:
            medium = locate(kind, medium, self.folder)
        source, _ = read_medium(kind, medium)
        for one in source if isinstance(source, list) else [source]:
            if scheme_of(one) in ("http", "https") and not self.allow_http:
                raise ValueError(f"{shorten(one)} would be downloaded; give --allow-http to allow that")
        return medium

    def identify(self, medium) -> tuple:
        """(kind, medium) of a medium that may be an image or a video.

        Files and URLs are probed. If a URL was downloaded for this, the returned medium is its bytes.

        Raises:
            ValueError: for a wrong type, an empty file, or a URL that must not be downloaded.
            FileNotFoundError: for a missing file.
        """
        kind = "video" if isinstance(medium, list) else medium_kind(medium) if isinstance(medium, dict) else None
        if kind is None and not isinstance(medium, str):
            raise ValueError(
                f"media holds {shorten(medium)}; expected a path, a URL, or a dict with 'image' or 'video', or a type "
                "of that name"
            )
        medium = self.resolve(kind or "video", medium)
        if kind is not None:
            return kind, medium
        if scheme_of(medium) not in ("data", "http", "https"):
            return probe_file(medium), medium
        from moss_vl.image_reading import open_source
        from moss_vl.video_reading import DOWNLOAD_SECONDS, MAX_VIDEO_BYTES

        source, _ = open_source(
            medium,
            what="medium",
            allow_http=self.allow_http,
            allow_private_hosts=self.allow_private_hosts,
            max_bytes=MAX_VIDEO_BYTES,
            timeout=DOWNLOAD_SECONDS,
        )
        return _probe(source, mimetypes.guess_type(medium)[0]), source

    def user_turn(self, media: list, prompt: str | None) -> list[dict]:
        """Messages with one user turn: the media in their order, then the prompt."""
        return [{"role": "user", "content": media_before_text(map(self.identify, media), prompt or "")}]


def probe_file(path: str) -> str:
    """ "image" or "video", the kind of the file at a path or `file:` URL.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: for a folder or an empty file.
    """
    path = os.fspath(local_path(path))
    name = path if len(path) < 1000 else shorten(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"no such file: {name}")
    if not os.path.isfile(path):
        raise ValueError(f"{name} is not a file; expected an image or a video")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{name} is empty; expected an image or a video")
    return _probe(path, mimetypes.guess_type(name)[0])


def _probe(source, mime: str | None) -> str:
    """ "image" for still images that Pillow opens, and for unreadable ones of an image type; else "video"."""
    from moss_vl.image_files import open_image
    from moss_vl.image_reading import MAX_SOURCE_PIXELS
    from moss_vl.signatures import is_animated

    try:
        with open_image(source, "medium") as image:
            is_large = image.width * image.height > MAX_SOURCE_PIXELS  # the processor's error explains it
            return "video" if not is_large and is_animated(image) else "image"
    except ValueError:
        return "image" if (mime or "").startswith("image/") and mime != "image/gif" else "video"


# queries


def prepare_query(
    line: dict, folder: Path, allow_http: bool, prompt: str | None = None, allow_private_hosts: bool = False
) -> dict:
    """The query of a line for `offline_batch_generate`, with `media` or `conversations` as messages.

    Args:
        line: the JSON object of a line of a query file; not changed.
        folder: where relative paths start.
        allow_http: whether URLs may be downloaded. A line can allow it as well, in its media_kwargs.
        prompt: the prompt of lines that have neither prompt nor messages.
        allow_private_hosts: whether URLs may be at private addresses. A line can allow it in the same way.

    Raises:
        ValueError: for keys that exclude each other, messages without a question, or wrong media.
        FileNotFoundError: for a missing file under `media`.
    """
    query = {name: value for name, value in line.items() if value is not None}
    for name in ("media_kwargs", "generate_kwargs"):
        if not isinstance(query.get(name, {}), dict):
            raise ValueError(f"{name} must be an object, got {shorten(query[name])}")
    media_kwargs = query.get("media_kwargs", {})
    reader = MediaReader(
        allow_http or bool(media_kwargs.get("allow_http")),
        folder,
        allow_private_hosts or bool(media_kwargs.get("allow_private_hosts")),
    )
    _rename_turns(query)
    if "prompt" not in query and "messages" not in query and prompt is not None:
        query["prompt"] = prompt
    for kind in SOURCE_KEYS:
        if (media := query.get(f"{kind}s")) is not None:
            is_list = isinstance(media, list)
            query[f"{kind}s"] = (
                [reader.resolve(kind, one) for one in media] if is_list else reader.resolve(kind, media)
            )
    if "media" in query:
        if clash := [name for name in ("messages", "images", "videos") if name in query]:
            raise ValueError(f"a query has media or {clash[0]}, got both")
        media = query.pop("media")
        query["messages"] = reader.user_turn(media if isinstance(media, list) else [media], query.pop("prompt", None))
    elif "messages" in query:
        query["messages"] = replace_media(_read_question(query["messages"]), reader.resolve)
    return query


def _rename_turns(query: dict) -> None:
    """Puts the turns of a training record under `messages`. Changes the query."""
    if "conversations" in query:
        if clash := [name for name in ("messages", "prompt", "media") if query.get(name, "") != ""]:
            raise ValueError(f"a query has conversations or {clash[0]}, got both")
        query["messages"] = read_turns("conversations", query.pop("conversations"))
    elif "messages" in query:
        query["messages"] = read_turns("messages", query["messages"])


def _read_question(messages: list[dict]) -> list[dict]:
    """Plain messages without the assistant's turns at their end, which are the answer in a training record."""
    messages = read_messages(messages, "messages")
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise ValueError("the messages are the assistant's alone; expected a question before the answer")
    return messages
