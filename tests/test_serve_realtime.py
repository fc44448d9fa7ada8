"""The realtime sessions of tools/serve.py, by a WebSocket client."""

import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from offline import model, processor  # noqa: F401 - fixtures
from PIL import Image
from realtime import RESPONSE, SILENCE, make_talking_model, picture
from serving import NAME, served, user  # before websockets, which may be missing
from test_realtime_live import write_clip
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from moss_vl.tools import serve_realtime


KEY = "secret-key"
REMARK = [RESPONSE, "red", " star", SILENCE]  # what the model says about a frame
ANSWER = ["<|round_start|>", "Y", "es", SILENCE]  # and to a prompt
FAST = {"type": "start", "max_tokens_per_second": 1000}


@pytest.fixture(scope="module")
def talking():
    made, talking = make_talking_model()
    return talking, made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A media folder with a clip of a second."""
    made = tmp_path_factory.mktemp("media")
    write_clip(made / "clip.mp4")
    (made / "wrong.mp4").write_bytes(b"no video")
    return made


@pytest.fixture(scope="module")
def running(talking, folder, tmp_path_factory):
    with served(*talking, tmp_path_factory.mktemp("uploads"), "--sessions", 8, "--media", folder) as made:
        yield made


@pytest.fixture
def client(running):
    with Client(running) as made:
        yield made
    assert running.is_idle()


class Client:
    """A client that speaks the protocol."""

    def __init__(self, running, **options):
        address = f"ws://{running.address}/v1/realtime"
        self.socket = connect(address, max_size=None, compression=None, **options).__enter__()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.socket.close()

    def send(self, kind, **fields):
        self.socket.send(json.dumps({"type": kind, **fields}))

    def start(self, **fields):
        self.socket.send(json.dumps({**FAST, **fields}))
        assert self.receive() == {"type": "ready"}
        return self

    def frame(self, seed=0, form="PNG", **fields):
        self.send("frame", **fields)
        self.socket.send(encoded(seed, form))

    def receive(self):
        return json.loads(self.socket.recv(60))

    def until(self, kind) -> list[dict]:
        """Messages up to the first one of this type."""
        messages = [self.receive()]
        while messages[-1]["type"] != kind:
            messages.append(self.receive())
        return messages

    def outputs(self, count) -> list[str]:
        """The texts of the next outputs; other messages are left out."""
        texts = []
        while len(texts) < count:
            message = self.receive()
            assert message["type"] != "error", message
            texts += [message["text"]] if message["type"] == "output" else []
        return texts

    def closed(self) -> tuple[list[dict], int]:
        """(messages up to the end, close code)."""
        messages = []
        try:
            while True:
                messages.append(self.receive())
        except ConnectionClosed as closed:
            return messages, closed.rcvd.code


def encoded(seed, form="PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(seed)).save(file, form)
    return file.getvalue()


def kinds(messages) -> list[str]:
    return [message["type"] for message in messages]


# the protocol


def test_the_protocol_word_for_word(client):
    client.send(
        "start",
        system_prompt="Watch.",
        prompt="",
        frame_queue_size=256,
        max_tokens_per_second=1000,
        max_new_tokens=4096,
        do_sample=False,
        repetition_penalty=1.0,
        temperature=0.7,
        top_k=20,
        top_p=0.8,
    )
    assert client.receive() == {"type": "ready"}
    assert client.receive() == {"type": "output", "text": SILENCE}
    client.frame(1, timestamp=12.5)
    first = client.until("frame_ack")
    assert first[-1] == {"type": "frame_ack", "dropped_oldest": False, "pending_frames": first[-1]["pending_frames"]}
    assert first[-1]["pending_frames"] in (0, 1)
    said = [message["text"] for message in first if message["type"] == "output"]
    assert said + client.outputs(4 - len(said)) == REMARK
    client.send("ping")
    assert client.receive() == {"type": "pong"}
    client.send("prompt", text="Is it red?")
    answered = client.until("prompt_ack")
    assert answered[-1] == {"type": "prompt_ack"}
    said = [message["text"] for message in answered[:-1]]
    assert said + client.outputs(4 - len(said)) == ANSWER
    client.frame(2, "JPEG", timestamp=13, prompt="And this?")
    assert client.outputs(5) == ["<|round_start|>", *REMARK]
    client.send("stop")
    messages, code = client.closed()
    assert messages[-2:] == [{"type": "stopping"}, {"type": "session_end"}] and code == 1000


def test_a_prompt_at_the_start_and_the_end_of_a_reply(client):
    """What waits is taken in, and the reply is finished."""
    client.start(prompt="Tell me.", max_tokens_per_second=None)
    assert client.outputs(2) == ["<|round_start|>", SILENCE]
    client.frame(0, timestamp=0)
    client.send("stop")
    messages, _ = client.closed()
    assert [message["text"] for message in messages if message["type"] == "output"] == REMARK
    assert kinds(messages)[-1] == "session_end" and "stopping" in kinds(messages)


def test_the_options_reach_the_session(client, running, talking):
    client.start(frame_queue_size=3, max_new_tokens=9, do_sample=True, temperature=0.5, top_k=7, top_p=0.25)
    [connection] = running.service.connections
    stream = connection.session.stream
    assert (stream.inbox.size, connection.session.pause) == (3, 1 / 1000)
    options = stream.options
    assert (options.max_new_tokens, options.do_sample, options.temperature, options.top_k, options.top_p) == (
        9, True, 0.5, 7, 0.25,
    )  # fmt: skip


def test_a_full_queue_drops_its_oldest_frame(client, running, monkeypatch):
    client.start(frame_queue_size=2)
    [connection] = running.service.connections
    monkeypatch.setattr(connection.session.stream, "take", lambda: None)  # nothing is taken in
    acks = []
    for number in range(3):
        client.frame(number, timestamp=number)
        acks.append(client.until("frame_ack")[-1])
    assert [ack["dropped_oldest"] for ack in acks] == [False, False, True]
    assert [ack["pending_frames"] for ack in acks] == [1, 2, 2]


def test_many_sessions_and_answers_at_once(running):
    together = threading.Barrier(10)

    def watch(number):
        with Client(running) as client:
            together.wait(60)
            client.start()
            said = client.outputs(1)
            for second in range(3):
                client.frame(number + second, timestamp=second)
                said += client.outputs(4)
            client.send("stop")
            assert client.closed()[1] == 1000
            return said

    def ask(number):
        together.wait(60)
        got = running.client().chat.completions.create(model=NAME, messages=user("Go on."), max_tokens=40)
        return got.choices[0].message.content

    with ThreadPoolExecutor(10) as pool:
        watching = [pool.submit(watch, number) for number in range(8)]
        asking = [pool.submit(ask, number) for number in range(2)]
        assert [one.result() for one in watching] == [[SILENCE, *REMARK * 3]] * 8
        first, second = (one.result() for one in asking)
        assert first == second and "Yes" in first
    assert running.is_idle()


# videos of the server


def test_a_video_of_the_server(client, running, monkeypatch):
    """At twice its pace, after a frame of the client."""
    client.start()
    [connection] = running.service.connections
    inbox, taken = connection.session.stream.inbox, []
    take = inbox.take

    def spy():
        found = take()
        taken.extend(found.frames)
        return found

    monkeypatch.setattr(inbox, "take", spy)
    client.frame(0, timestamp=10)
    assert client.outputs(5) == [SILENCE, *REMARK]
    begin = time.monotonic()
    client.send("video", path="clip.mp4", sample_fps=4, playback_speed=2, max_frames=3)
    assert client.receive() == {"type": "video_started"}
    messages = client.until("video_end")
    assert time.monotonic() - begin >= 0.25
    assert messages[-1] == {"type": "video_end"}
    client.frame(0, timestamp=10.4)
    assert "10.5 seconds" in client.until("error")[-1]["message"]  # the last one of the video: 10 + 2 / 4 seconds
    client.frame(0, timestamp=10.5)
    client.until("frame_ack")
    client.send("stop")
    assert client.closed()[1] == 1000
    assert [frame.seconds for frame in taken] == [10, 10, 10.25, 10.5, 10.5]


def test_a_video_may_be_stopped(client, folder, running):
    client.start()
    client.outputs(1)
    client.send("stop_video")  # there is none
    client.send("video", path="clip.mp4", sample_fps=1000, playback_speed=0.01)
    assert client.receive() == {"type": "video_started"}
    client.send("video", path="clip.mp4")
    assert "is being played" in client.until("error")[-1]["message"]
    client.send("stop_video")
    client.until("video_end")
    client.send("video", path=f"file://{folder}/clip.mp4", playback_speed=0.01, sample_fps=1000)
    client.until("video_started")
    client.send("stop")
    messages, code = client.closed()
    order = [kind for kind in kinds(messages) if kind != "output"]
    assert order == ["video_end", "stopping", "session_end"] and code == 1000


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"path": "no.mp4"}, "media folder"),
        ({"path": "../clip.mp4"}, "media folder"),
        ({"path": "/etc/passwd"}, "media folder"),
        ({"path": 7}, "path must be a text"),
        ({}, "path must be a text"),
        ({"path": "clip.mp4", "sample_fps": 0}, "sample_fps"),
        ({"path": "clip.mp4", "playback_speed": -1}, "playback_speed"),
        ({"path": "clip.mp4", "max_frames": 0.5}, "max_frames"),
        ({"path": "clip.mp4", "fps": 1}, "unknown field"),
    ],
)
def test_wrong_videos(client, fields, message):
    client.start()
    client.outputs(1)
    client.send("video", **fields)
    error = client.receive()
    assert error["type"] == "error" and message in error["message"]


def test_a_video_that_cannot_be_read(client, folder):
    client.start()
    client.outputs(1)
    client.send("video", path="wrong.mp4")
    started, error, end = client.until("video_end")
    assert kinds([started, error]) == ["video_started", "error"]
    assert "wrong.mp4" in error["message"] and str(folder) not in error["message"]


# wrong messages


@pytest.mark.parametrize(
    "message, expected",
    [
        ("hello", "JSON"),
        ("[1]", "JSON object"),
        ("[" * 5000, "JSON"),
        ("{}", "with a type"),
        (b"\x00\x01", "no frame before it"),
        ('{"type": "frames"}', "did you mean 'frame'"),
        ('{"type": "prompt", "txt": "a"}', "unknown field"),
        ('{"type": "prompt"}', "text must be a text"),
        ('{"type": "prompt", "text": "<|image_pad|>"}', "stands for a medium"),
        ('{"type": "start"}', "started before"),
        ('{"type": "prompt", "text": "half \\ud83d"}', "half of a character"),
        (json.dumps({"type": "prompt", "text": "one, two, " * 3000}), "at most 4096"),
    ],
)
def test_the_session_goes_on_after_a_wrong_message(client, message, expected):
    client.start()
    client.outputs(1)
    client.socket.send(message)
    error = client.receive()
    assert error["type"] == "error" and expected in error["message"]
    client.send("prompt", text="Still there?")
    assert client.outputs(4) == ANSWER


@pytest.mark.parametrize(
    "fields, image, message",
    [
        ({"timestamp": 1}, b"no image", "JPEG or PNG"),
        ({"timestamp": 1}, b"", "JPEG or PNG"),
        ({"timestamp": 1}, encoded(0)[:100], "is not an image|cannot be|damaged|truncated"),
        ({"timestamp": "soon"}, encoded(0), "timestamp"),
        ({"timestamp": -1}, encoded(0), "at least 0"),
        ({"timestamp": 0.25}, encoded(0), "do not fall"),
        ({"timestamp": 1, "prompt": 7}, encoded(0), "prompt must be a text"),
        ({"time": 1}, encoded(0), "unknown field"),
    ],
)
def test_wrong_frames(client, fields, image, message):
    client.start()
    client.outputs(1)
    client.frame(0, timestamp=0.5)
    client.outputs(4)
    client.send("frame", **fields)
    client.socket.send(image)
    error = client.until("error")[-1]
    assert any(one in error["message"] for one in message.split("|")), error
    client.frame(0, timestamp=2)
    assert client.outputs(4) == REMARK


def test_a_frame_without_its_image(client):
    client.start()
    client.outputs(1)
    client.send("frame", timestamp=1)
    client.send("ping")
    assert kinds([client.receive(), client.receive()]) == ["error", "pong"]


@pytest.mark.parametrize(
    "first, message",
    [
        ({"type": "ping"}, "must be of type start"),
        ({"type": "start", "fps": 1}, "unknown field 'fps'"),
        ({"type": "start", "max_tokens_per_second": 0}, "max_tokens_per_turn"),
        ({"type": "start", "top_p": 2}, "top_p"),
        ({"type": "start", "frame_queue_size": 257}, "at most 256"),
        ({"type": "start", "max_new_tokens": 5000}, "at most 4096"),
        ({"type": "start", "prompt": 7}, "initial_prompt must be a string"),
        ({"type": "start", "prompt": "one, two, " * 3000}, "at most 4096"),
        ({"type": "start", "system_prompt": "half \ud83d"}, "half of a character"),
        ({"type": "start", "frame_queue_size": 10**400}, "frame_queue_size must be a positive whole number"),
        ({"type": "start", "temperature": 10**400}, "temperature"),
    ],
)
def test_wrong_starts(client, first, message):
    client.socket.send(json.dumps(first))
    [error], code = client.closed()
    assert error["type"] == "error" and message in error["message"] and code == 1008


def test_a_client_that_does_not_start_is_sent_away(running, monkeypatch):
    monkeypatch.setattr(serve_realtime, "START_SECONDS", 0.2)
    with Client(running) as client:
        [error], code = client.closed()
        assert "no start within" in error["message"] and code == 1008


def test_frames_that_are_too_large(client, running):
    client.start()
    client.outputs(1)
    client.send("frame", timestamp=1)
    client.socket.send(b"\x89PNG\r\n\x1a\n" + bytes(serve_realtime.MAX_FRAME_BYTES))
    assert "at most 20971520 bytes" in client.receive()["message"]
    client.frame(0, timestamp=1)
    assert client.outputs(4) == REMARK
    client.send("frame", timestamp=2)
    with pytest.raises(ConnectionClosed):  # while the client still sends
        client.socket.send(bytes(serve_realtime.MAX_MESSAGE_BYTES + 1))
        client.socket.recv(60)
    assert running.is_idle()


def test_a_checkpoint_without_streams(model, processor, tmp_path):  # noqa: F811
    with served(model, processor, tmp_path) as other, Client(other) as client:
        client.send("start")
        [error], code = client.closed()
        assert "not a realtime checkpoint" in error["message"] and code == 1008


# ends


def test_no_room(running):
    clients = [Client(running).start() for _ in range(8)]
    with Client(running) as refused:
        assert refused.closed() == ([], 1013)
    clients.pop().socket.close()
    while len(running.service.connections) > 7:
        time.sleep(0.01)
    clients.append(Client(running).start())
    for client in clients:
        client.socket.close()
    assert running.is_idle()


def test_a_client_that_leaves_frees_its_session(running):
    for leave in (lambda one: one.close(), lambda one: one.socket.close()):  # with a close frame, and without
        client = Client(running).start()
        client.outputs(1)
        client.frame(0, timestamp=0)
        client.send("video", path="clip.mp4", playback_speed=0.001)
        client.outputs(2)
        [connection] = running.service.connections
        leave(client.socket)
        assert running.is_idle()
        assert connection.session.stream.cache is None and connection.video.done()
    end = time.monotonic() + 30
    while any(thread.name == "moss-vl-realtime" for thread in threading.enumerate()):
        assert time.monotonic() < end, "the thread of the sessions goes on"
        time.sleep(0.01)


def test_a_session_that_fails(client, running, monkeypatch, caplog):
    client.start()
    client.outputs(1)
    [connection] = running.service.connections

    def fail(*args):
        raise RuntimeError("a secret of the server")

    monkeypatch.setattr(connection.session.stream, "forward", fail)
    client.send("prompt", text="Hello?")
    messages, code = client.closed()
    assert kinds(messages)[-2:] == ["error", "session_end"] and code == 1011
    assert "secret" not in messages[-2]["message"] and "a secret of the server" in caplog.text


def test_sessions_end_with_the_server(talking, tmp_path):
    with served(*talking, tmp_path) as other:
        with Client(other).start() as client:
            client.outputs(1)
            other.server.should_exit = True
            messages, code = client.closed()
            assert kinds(messages)[-2:] == ["stopping", "session_end"] and code == 1001


# keys


def test_keys_of_sessions(talking, tmp_path):
    with served(*talking, tmp_path, "--api-key", KEY) as other:
        protocols = ["realtime", f"openai-insecure-api-key.{KEY}"]
        with Client(other, additional_headers={"Authorization": f"Bearer {KEY}"}) as client:
            client.start()
        with Client(other, subprotocols=protocols) as client:
            assert client.start().socket.subprotocol == "realtime"
        for wrong in (
            {},
            {"additional_headers": {"Authorization": "Bearer x"}},
            {"subprotocols": ["realtime", "openai-insecure-api-key.x"]},
        ):
            with pytest.raises(InvalidStatus) as refused:
                Client(other, **wrong)
            assert refused.value.response.status_code == 401
        assert other.is_idle()


def test_pages_of_other_sites_get_no_session(running):
    with pytest.raises(InvalidStatus) as refused:
        Client(running, origin="https://evil.example")
    assert refused.value.response.status_code == 403
    with Client(running, origin=f"http://{running.address}") as client:
        client.start()
    assert running.is_idle()
