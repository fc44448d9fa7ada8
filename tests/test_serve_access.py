"""What tools/serve.py opens, who may ask it, and its command; by the openai client."""

import json
import signal
import subprocess
import sys
import threading
import urllib.request
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler

import pytest
import torch
from conftest import ROOT
from offline import SMALL, VIDEO, model, pictures, processor  # noqa: F401 - fixtures
from realtime import encode, make_talking_model
from serving import (  # noqa: F401 - fixtures
    ask,
    client,
    folder,
    image,
    offline,
    openai,
    post,
    running,
    served,
    text_in,
    user,
    video,
)

from moss_vl.tools import serve


KEY = "secret-key"
LONG_STREAM = 600  # tokens


# files


def test_files(client, running):
    data = open(VIDEO, "rb").read()
    made = client.files.create(file=("clip.mp4", data), purpose="vision")
    assert (made.filename, made.bytes, made.purpose) == ("clip.mp4", len(data), "vision")
    assert client.files.retrieve(made.id) == made and client.files.list().data == [made]
    assert client.files.content(made.id).read() == data
    assert client.files.delete(made.id).deleted
    assert client.files.list().data == [] and not list(running.service.store.folder.iterdir())
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(made.id)
    with pytest.raises(openai.BadRequestError, match="no such file"):
        ask(client, user(video(made.id), "What?"))


@pytest.mark.parametrize(
    "size, purpose, status",
    [(0, "vision", 400), (10, "fun", 400), (1_000_001, "vision", 413), (3_000_000, "vision", 413)],
)
def test_wrong_files(client, running, size, purpose, status):
    with pytest.raises(openai.APIStatusError) as raised:
        client.files.create(file=("a.bin", b"x" * size), purpose=purpose)
    assert raised.value.status_code == status
    assert client.files.list().data == [] and not list(running.service.store.folder.iterdir())


def test_files_together_have_a_limit(client):
    """2 MB here."""
    made = [client.files.create(file=("a.bin", b"x" * 800_000), purpose="vision") for _ in range(2)]
    with pytest.raises(openai.APIStatusError, match="delete some first"):
        client.files.create(file=("a.bin", b"x" * 800_000), purpose="vision")
    client.files.delete(made[0].id)
    made[0] = client.files.create(file=("a.bin", b"x" * 800_000), purpose="vision")
    for one in made:
        client.files.delete(one.id)


@pytest.mark.parametrize(
    "path",
    ["../other.png", "link.png", "deep", "/etc/passwd", "file:///etc/passwd", "no.png", "~/x.png", "a\0b", ""],
)
def test_only_files_of_the_folder_are_opened(client, folder, path):
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client, user(image(path), "What?"))
    message = raised.value.body["message"]
    assert "media folder" in message or "usable path" in message
    assert str(folder) not in message


def test_messages_do_not_tell_where_files_lie(client, folder, running):
    wrong = client.files.create(file=("a.mp4", b"no video"), purpose="vision")
    (folder / "wrong.mp4").write_bytes(b"no video")
    for name in (wrong.id, "wrong.mp4"):
        with pytest.raises(openai.BadRequestError) as raised:
            ask(client, user(video(name), "What?"))
        assert name in str(raised.value) and "/" not in raised.value.body["message"].split(name)[0]
    client.files.delete(wrong.id)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_nothing_by_http_unless_it_is_allowed(model, processor, pictures, client, folder, tmp_path):  # noqa: F811
    web = HTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=web.serve_forever, daemon=True).start()
    messages = user(image(f"http://127.0.0.1:{web.server_port}/picture.png"), "What?")
    try:
        with pytest.raises(openai.BadRequestError, match="--allow-http"):
            ask(client, messages)
        with served(model, processor, tmp_path, "--allow-http") as other:
            with pytest.raises(openai.BadRequestError, match="private"):
                ask(other.client(), messages)
            with pytest.raises(openai.BadRequestError, match="--media"):
                ask(other.client(), user(image("picture.png")))
        allowed = ["--allow-http", "--allow-private-hosts", "--max-pixels", SMALL["max_pixels"]]
        with served(model, processor, tmp_path, *allowed) as other:
            assert text_in(ask(other.client(), messages)) == offline(model, processor, "What?", images=[pictures[0]])
    finally:
        web.shutdown()
        web.server_close()


# who may ask


def test_keys(model, processor, tmp_path):  # noqa: F811
    with served(model, processor, tmp_path, "--api-key", KEY, "--host", "127.0.0.1") as running:
        for wrong in ("", "x", KEY + "x", KEY[:-1], "sécret"):
            status, body = post(running, "/v1/chat/completions", b"{}", Authorization=f"Bearer {wrong}")
            assert status == 401 and body["error"]["type"] == "authentication_error"
        for path in ("/v1/models", "/v1/files", "/v1/files/file-1/content", "/nothing"):
            with pytest.raises(openai.AuthenticationError):
                running.client("wrong").get(f"http://{running.address}{path}", cast_to=object)
        with pytest.raises(openai.AuthenticationError):
            running.client("wrong").files.create(file=("a.bin", b"x"), purpose="vision")
        assert not running.service.store.list()
        assert urllib.request.urlopen(f"http://{running.address}/health").status == 200
        assert text_in(ask(running.client(KEY), user("Hello."), 2)) is not None


def test_pages_of_other_sites_may_not_ask(model, processor, tmp_path, running):  # noqa: F811
    """Without a key, a page in a browser of this computer could."""
    body = json.dumps({"messages": user("Hello."), "max_tokens": 1}).encode()
    chat = partial(post, running, "/v1/chat/completions", body)
    assert chat(Origin="https://evil.example")[0] == 403
    assert chat(Origin="null")[0] == chat(Origin="http://[")[0] == chat(Host="[")[0] == 403
    assert chat(Host="evil.example", Origin="http://evil.example")[0] == 403, "its name leads to this computer"
    assert chat(Origin=f"http://{running.address}")[0] == 200
    page = "http://localhost:3000"
    with served(model, processor, tmp_path, "--allow-origin", page) as other:
        request = urllib.request.Request(
            f"http://{other.address}/v1/models", headers={"Origin": page, "Access-Control-Request-Method": "POST"}
        )
        request.method = "OPTIONS"
        with urllib.request.urlopen(request) as response:
            assert response.headers["Access-Control-Allow-Origin"] == page
        assert post(other, "/v1/chat/completions", body, Origin=page)[0] == 200


# the command


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--host", "0.0.0.0"], "--api-key"),
        (["--api-key", ""], "not empty"),
        (["--media", "no such folder"], "not a folder"),
        (["--rows", "0"], "--rows"),
        (["--port", "-1"], "--port"),
    ],
)
def test_wrong_usage(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("MOSS_VL_API_KEY", raising=False)
    with pytest.raises(SystemExit) as ended:
        serve.parse(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_the_key_may_be_in_the_environment(monkeypatch):
    monkeypatch.setenv("MOSS_VL_API_KEY", KEY)
    assert serve.parse(["--host", "0.0.0.0"]).api_key == KEY


def test_the_command_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert serve.main([]) == 2
    assert "pip install -r requirements-serve.txt" in capsys.readouterr().err


def make_star_model():
    """(processor, model) that answers "star star star ..." without an end, so that pieces come at once."""
    made, talking = make_talking_model()
    [yes], [star] = (encode(made, word) for word in ("Y", " star"))
    with torch.no_grad():
        head = talking.lm_head.weight
        head[star] += head[yes]  # what followed on a silence
        head[yes] = 0
    return made, talking


def long_stream(client):
    """A stream of that model, which has begun."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    stream = client.chat.completions.create(model="star", messages=user("Go on."), max_tokens=LONG_STREAM, **options)
    next(stream)
    return stream


def test_the_command_stops_after_its_answers(tmp_path, monkeypatch):
    """An answer that is being written is finished, and nothing is left behind."""
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.setenv("MOSS_VL_API_KEY", KEY)
    for part in make_star_model():
        part.save_pretrained(tmp_path / "star")
    command = [sys.executable, str(ROOT / "tools/serve.py"), "--port", "0", "--checkpoint", str(tmp_path / "star")]
    command += ["--grace", "600"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    server = subprocess.Popen(command, cwd=tmp_path, **pipes)
    try:
        line = server.stdout.readline()
        assert line.startswith("MOSS-VL: http://127.0.0.1:"), server.stderr.read()
        client = openai.OpenAI(base_url=line.split()[1], api_key=KEY, max_retries=0)
        client.files.create(file=("a.bin", b"x"), purpose="vision")
        stream = long_stream(client)
        server.send_signal(signal.SIGTERM)
        *_, last = stream
        assert last.usage.completion_tokens == LONG_STREAM
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
    finally:
        server.send_signal(signal.SIGTERM)
        _, errors = server.communicate(timeout=60)
    assert server.returncode == 0 and not errors


def test_answers_that_take_too_long_are_cut_at_the_end(tmp_path, caplog):
    made, talking = make_star_model()
    with served(talking, made, tmp_path, "--grace", "0", "--name", "star") as running:
        client = running.client()
        stream = long_stream(client)
        running.server.should_exit = True
        with pytest.raises(openai.APIError, match="the server stops"):
            list(stream)
    assert not caplog.text
