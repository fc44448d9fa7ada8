"""What the tests of tools/serve.py share: a server on a thread, with its clients."""

import base64
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import uvicorn

from moss_vl.tools import serve
from moss_vl.tools.serve_http import Service, build_app


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
