"""What the tests of tools/serve.py share: a server on a thread, with its clients. Tests that import it are skipped if
a package of the server is missing."""

import base64
import json
import shutil
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from offline import SMALL, VIDEO, text_of


for package in ("fastapi", "uvicorn", "websockets", "python_multipart", "openai"):
    pytest.importorskip(package, reason=f"the server is tested with {package}: pip install -r requirements-dev.txt")

import openai  # noqa: E402
import uvicorn  # noqa: E402

from moss_vl.tools import serve  # noqa: E402
from moss_vl.tools.serve_http import Service, build_app  # noqa: E402


NAME = "tiny"


@dataclass
class Served:
    """A server that runs.

    Attributes:
        address: HOST:PORT.
    """

    service: Service
    server: uvicorn.Server
    address: str

    def client(self, key: str = "no key", **options) -> openai.OpenAI:
        options = {"max_retries": 0, "timeout": 120, **options}
        return openai.OpenAI(base_url=f"http://{self.address}/v1", api_key=key, **options)

    def is_idle(self) -> bool:
        """Whether nothing is computed any more, within some time."""
        writer, end = self.service.writer, time.monotonic() + 60
        while time.monotonic() < end:
            if not writer.queues and not writer.stream._rows and not self.service.connections:
                return True
            time.sleep(0.01)
        return False


@contextmanager
def served(model, processor, uploads: Path, *arguments):
    """A server of this model, without a key unless the arguments have one."""
    args = serve.parse(["--name", NAME, "--port", "0", *map(str, arguments)])
    service = Service(args, model, processor, uploads)
    server = serve.make_server(uvicorn, service, build_app(service))
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    try:
        end = time.monotonic() + 60
        while not server.started:
            assert thread.is_alive() and time.monotonic() < end, "the server does not start"
            time.sleep(0.01)
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        yield Served(service, server, f"{host}:{port}")
    finally:
        server.should_exit = True
        thread.join(60)
        service.close()
        assert not thread.is_alive()
        assert not service.connections


def data_url(file, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(Path(file).read_bytes()).decode()}"


def user(*parts) -> list[dict]:
    """Messages with one user turn. A string is a text."""
    return [{"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}]


def image(url: str, **options) -> dict:
    return {"type": "image_url", "image_url": {"url": url, **options}}


def video(url: str, **options) -> dict:
    return {"type": "video_url", "video_url": {"url": url, **options}}


# a server of the tiny model of offline.py


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pictures):
    """The media folder of the server, and files beside it that it must not open."""
    outside = tmp_path_factory.mktemp("server")
    made = outside / "media"
    (made / "deep").mkdir(parents=True)
    shutil.copy(VIDEO, made / "deep/clip.mp4")
    shutil.copy(pictures[0], made / "picture.png")
    shutil.copy(pictures[1], outside / "other.png")
    (made / "link.png").symlink_to(outside / "other.png")
    return made


@pytest.fixture(scope="module")
def running(model, processor, folder, tmp_path_factory):
    limits = ["--rows", 4, "--waiting", 20, "--request-mb", 2, "--file-mb", 1, "--files-gb", 0.002]
    media = ["--media", folder, "--max-pixels", SMALL["max_pixels"], "--frames", 64]
    with served(model, processor, tmp_path_factory.mktemp("uploads"), *limits, *media) as made:
        yield made


@pytest.fixture
def client(running):
    yield running.client()
    assert running.is_idle()


def ask(client, messages, new=8, **options):
    return client.chat.completions.create(model=NAME, messages=messages, max_tokens=new, **options)


def text_in(response) -> str:
    return response.choices[0].message.content


def offline(model, processor, prompt, new=8, **media):
    """The answer of the offline method."""
    query = {"prompt": prompt, "media_kwargs": SMALL, "generate_kwargs": {"max_new_tokens": new}, **media}
    return text_of(model, processor, query)


def post(running, path, data, **headers):
    """(status, body) of a request by hand."""
    headers = {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(f"http://{running.address}{path}", data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
