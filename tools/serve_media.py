"""The media of requests to tools/serve.py: uploaded files, files of one folder, data: URLs and, if allowed, http(s)
URLs. Nothing else is opened."""

import os
import re
import secrets
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from moss_vl.checks import shorten
from moss_vl.conversation import local_path, plain_medium, read_medium, scheme_of
from moss_vl.tools.query_files import MediaReader


FILE_ID = re.compile(r"file-[0-9a-f]{32}")
PURPOSES = ("assistants", "batch", "evals", "fine-tune", "user_data", "vision")  # as clients name them; without effect


class TooLarge(ValueError):
    """Something is over a limit of the server."""


@dataclass(frozen=True)
class StoredFile:
    """An uploaded file.

    Attributes:
        created_at: Unix time in seconds.
    """

    id: str
    path: Path
    filename: str
    purpose: str
    bytes: int
    created_at: int = field(default_factory=lambda: int(time.time()))

    def as_json(self) -> dict:
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
        }


class FileStore:
    """Uploaded files, by their ids. Methods may be called from any thread.

    Args:
        folder: an empty folder for them.
        max_bytes: most bytes of one file.
        max_total: most bytes of all files.
    """

    def __init__(self, folder: Path, max_bytes: int, max_total: int):
        self.folder, self.max_bytes, self.max_total = folder, max_bytes, max_total
        self.files: dict[str, StoredFile] = {}
        self.lock = threading.Lock()
        self.reserved = 0  # bytes of the files and of those that are being copied

    def add(self, source, filename: str, purpose: str, size: int) -> StoredFile:
        """Copies a binary file object of `size` bytes.

        Raises:
            TooLarge: if the file is too large, or the files together.
            ValueError: for an unknown purpose, and for an empty file.
        """
        if purpose not in PURPOSES:
            raise ValueError(f"purpose must be one of {', '.join(PURPOSES)}; got {shorten(purpose)}")
        if size == 0:
            raise ValueError(f"the file {shorten(filename)} is empty")
        if size > self.max_bytes:
            raise TooLarge(f"the file has {size} bytes, over the limit of {self.max_bytes}")
        with self.lock:
            if self.reserved + size > self.max_total:
                raise TooLarge(
                    f"the files have {self.reserved} bytes, and with this one {self.reserved + size}, over the limit "
                    f"of {self.max_total}; delete some first"
                )
            self.reserved += size
        name = f"file-{secrets.token_hex(16)}"
        stored = StoredFile(name, self.folder / name, filename, purpose, size)
        try:
            with open(stored.path, "wb") as file:
                shutil.copyfileobj(source, file)
        except BaseException:
            stored.path.unlink(missing_ok=True)
            with self.lock:
                self.reserved -= size
            raise
        with self.lock:
            self.files[name] = stored
        return stored

    def list(self) -> list[StoredFile]:
        with self.lock:
            return list(self.files.values())

    def get(self, name: str) -> StoredFile:
        """Raises KeyError for an unknown id."""
        with self.lock:
            return self.files[name]

    def delete(self, name: str) -> None:
        """Raises KeyError for an unknown id."""
        with self.lock:
            stored = self.files.pop(name)
            self.reserved -= stored.bytes
        stored.path.unlink(missing_ok=True)


class MediaSources:
    """Decides what the media of a request may be, and where they lie.

    Args:
        folder: the folder of local files; None if there is none.
        allow_http, allow_private_hosts: whether http(s) URLs may be downloaded, and from private addresses.
    """

    def __init__(
        self, store: FileStore, folder: Path | None, allow_http: bool = False, allow_private_hosts: bool = False
    ):
        self.store = store
        self.folder = None if folder is None else folder.resolve(strict=True)
        self.downloads = {"allow_http": allow_http, "allow_private_hosts": allow_private_hosts}

    def resolve(self, kind: str, medium):
        """A plain medium (conversation.py) whose sources may be opened."""
        source, options = read_medium(kind, medium)
        source = list(map(self.source, source)) if isinstance(source, list) else self.source(source)
        return plain_medium(kind, source, options)

    def source(self, source) -> str:
        """The path or URL of a source as a request names it.

        Raises:
            ValueError: for anything that requests may not open.
        """
        if not isinstance(source, str):
            raise ValueError(f"a medium must be a data: URL, a file id or a path, got {shorten(source)}")
        scheme = scheme_of(source)
        if scheme == "data":
            return source
        if scheme in ("http", "https"):
            if not self.downloads["allow_http"]:
                raise ValueError(
                    f"{shorten(source)} would be downloaded, which this server does not do; send a data: URL or a "
                    "file id, or start the server with --allow-http"
                )
            return source
        return str(self.local(source))

    def local(self, name: str) -> Path:
        """The path of an uploaded file, or of a file in the folder.

        Raises:
            ValueError: for an unknown file, and for one outside the folder.
        """
        if FILE_ID.fullmatch(name):
            try:
                return self.store.get(name).path
            except KeyError:
                raise ValueError(f"no such file: {name}; upload it to /v1/files") from None
        if self.folder is None:
            raise ValueError(
                f"{shorten(name)} would be a file of the server, which has no folder for them; send a data: URL or a "
                "file id, or start the server with --media FOLDER"
            )
        if "\0" in name:
            raise ValueError(f"{shorten(name)} is no usable path")
        given = local_path(name) if scheme_of(name) == "file" else name
        path = Path(os.path.realpath(os.path.join(self.folder, given)))
        # One message for all, so that nobody learns what exists outside the folder.
        if not path.is_relative_to(self.folder) or not path.is_file():
            raise ValueError(f"{shorten(name)} is not a file in the media folder of the server")
        return path

    def identify(self, source) -> dict:
        """The part of an uploaded or inline file that may be an image or a video."""
        kind, _ = MediaReader(**self.downloads).identify(self.source(source))
        return {"type": kind, kind: source}

    def clean(self, message: str) -> str:
        """A message without the folders of the server."""
        for folder in filter(None, (self.store.folder, self.folder)):
            message = message.replace(f"{folder}{os.sep}", "")
        return message
