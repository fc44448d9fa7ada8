"""Realtime sessions of tools/serve.py over a WebSocket: one session per connection. docs/serving.md has the protocol.

The steps of all sessions are taken by the scheduler of the model (realtime_scheduler.py).
"""

import asyncio
import json
import time
from contextlib import suppress

from starlette.websockets import WebSocket, WebSocketDisconnect

from moss_vl.checks import name_hint, positive_int, positive_number, shorten
from moss_vl.tools.command_line import message_of
from moss_vl.tools.live import TOKENS_PER_SECOND
from moss_vl.tools.live_sources import video_frames


MAX_FRAME_BYTES = 20 * 2**20
MAX_MESSAGE_BYTES = 2 * MAX_FRAME_BYTES  # a connection with a larger message is closed
MAX_PROMPT_TOKENS = 4096  # of a prompt, and of a system prompt
MAX_QUEUE = 256  # frames that wait: `frame_queue_size`
START_SECONDS = 30.0  # within which a client says how its session starts
CLOSE_SECONDS = 10.0  # that the end of a session waits for its current step
FRAME_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
# Close codes (RFC 6455)
DONE, GOING_AWAY, REFUSED, FAILED, NO_ROOM = 1000, 1001, 1008, 1011, 1013

KEYS = {
    "start": {
        "system_prompt",
        "prompt",
        "frame_queue_size",
        "max_tokens_per_second",
        "max_new_tokens",
        "do_sample",
        "repetition_penalty",
        "temperature",
        "top_k",
        "top_p",
    },
    "frame": {"timestamp", "prompt"},
    "prompt": {"text"},
    "video": {"path", "sample_fps", "playback_speed", "max_frames"},
    "stop_video": set(),
    "ping": set(),
    "stop": set(),
}


class RealtimeConnection:
    """One client, with its session and the video that is played to it.

    Args:
        service: the model, limits, media and the other connections.
    """

    def __init__(self, service, socket: WebSocket):
        self.service, self.socket = service, socket
        self.session = None
        self.video: asyncio.Task | None = None
        self.stop_video = asyncio.Event()
        self.going = asyncio.Event()  # the server stops
        self.sending = asyncio.Lock()  # so that no two tasks send at once

    async def run(self, subprotocol: str | None) -> None:
        """Serves the client until one side ends it, and frees its session."""
        await self.socket.accept(subprotocol)
        if len(self.service.connections) >= self.service.args.sessions or self.service.stopping:
            await self.socket.close(NO_ROOM, "no room for another session")
            return
        self.service.connections.add(self)
        code = FAILED
        try:
            code = await self._start() or await self._serve()
        except WebSocketDisconnect:
            code = None
        finally:
            await asyncio.shield(self._free())
            self.service.connections.discard(self)
            if code is not None:
                with suppress(RuntimeError, WebSocketDisconnect):  # the client has left meanwhile
                    await self.socket.close(code)

    async def _free(self) -> None:
        await self._end_video()
        if self.session is not None:
            await asyncio.to_thread(self.session.close, CLOSE_SECONDS)

    async def _start(self) -> int | None:
        """Waits for the first message, and starts the session. The close code if there is none."""
        try:
            kind, message = read_message(await asyncio.wait_for(self._receive(), START_SECONDS))
            if kind != "start":
                raise ValueError(f"the first message must be of type start, got {kind}")
            self.session = await asyncio.to_thread(self._make_session, check_fields(kind, message))
            self.session.start()
        except asyncio.TimeoutError:
            await self._fail(ValueError(f"no start within {START_SECONDS:g} seconds"))
            return REFUSED
        except ValueError as error:
            await self._fail(error)
            return REFUSED
        await self._send("ready")
        return None

    def _make_session(self, message: dict):
        limits = self.service.limits
        for name in ("prompt", "system_prompt"):
            if isinstance(message.get(name), str):  # the session refuses others
                self._check_prompt(name, message[name])
        size = at_most("frame_queue_size", message.pop("frame_queue_size", MAX_QUEUE), MAX_QUEUE)
        most = limits.max_new_tokens
        pixels = limits.defaults["max_pixels"]
        return self.service.model.create_realtime_session(
            self.service.processor,
            message.pop("prompt", ""),
            message.pop("system_prompt", None),
            frame_queue_size=size,
            max_tokens_per_turn=message.pop("max_tokens_per_second", TOKENS_PER_SECOND),
            max_new_tokens=at_most("max_new_tokens", message.pop("max_new_tokens", most), most),
            media_kwargs={} if pixels is None else {"max_pixels": pixels},
            **message,
        )

    async def _serve(self) -> int:
        """Runs the session to its end. The close code."""
        reading, writing, going = tasks = [
            asyncio.ensure_future(one) for one in (self._read(), self._write(), self.going.wait())
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                reading.result()  # it ends by an error alone: the client has left
            if writing.done():
                return writing.result()
            await self._send("stopping")
            await asyncio.to_thread(self.session.close, CLOSE_SECONDS)
            await writing
            return GOING_AWAY
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # from the session to the client

    async def _write(self) -> int:
        """Sends what the session says, until its end. The close code."""
        code = DONE
        async for event in self.session.events():
            if type(event).__name__ == "Failed":
                self.service.log_error(event.error)
                await self._send("error", message=f"the session failed: {type(event.error).__name__}")
                code = FAILED
            elif event.raw:
                await self._send("output", text=event.raw)
        await self._send("session_end")
        return code

    async def _send(self, kind: str, **fields) -> None:
        async with self.sending:
            await self.socket.send_text(json.dumps({"type": kind, **fields}, ensure_ascii=False))

    async def _fail(self, error: Exception) -> None:
        await self._send("error", message=self.service.media.clean(message_of(error)))

    # from the client to the session

    async def _receive(self) -> str | bytes:
        message = await self.socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", DONE))
        return message["bytes"] if message.get("text") is None else message["text"]

    async def _read(self) -> None:
        """Takes messages until the client leaves. A wrong message gets an error, and the session goes on."""
        following = None
        while True:
            data, following = await self._receive() if following is None else following, None
            try:
                kind, message = read_message(data)
                image = await self._receive() if kind == "frame" else None
                if isinstance(image, str):  # the next message, in place of the image
                    image, following = None, image
                await self._take(kind, check_fields(kind, message), image)
            except (ValueError, OSError) as error:
                await self._fail(error)

    async def _take(self, kind: str, message: dict, image: bytes | None) -> None:
        if kind == "start":
            raise ValueError("the session was started before; open another connection for another session")
        if kind == "ping":
            await self._send("pong")
        elif kind == "stop":
            await self._end_video()
            await self._send("stopping")
            self.session.end()
        elif kind == "prompt":
            text = require_text("text", message.get("text"))
            await asyncio.to_thread(self._check_prompt, "text", text)
            self.session.push_prompt(text)
            await self._send("prompt_ack")
        elif kind == "frame":
            dropped = await asyncio.to_thread(self._push, message, image)
            await self._send("frame_ack", dropped_oldest=dropped, pending_frames=self.session.pending_frames)
        elif kind == "video":
            await self._play(message)
        else:
            self.stop_video.set()

    def _push(self, message: dict, image: bytes | None) -> bool:
        if image is None:
            raise ValueError("a frame must be followed at once by a binary message with its JPEG or PNG")
        if len(image) > MAX_FRAME_BYTES:
            raise ValueError(f"a frame has at most {MAX_FRAME_BYTES} bytes, got {len(image)}")
        if not image.startswith(FRAME_SIGNATURES):
            raise ValueError(f"a frame must be a JPEG or PNG, got {len(image)} bytes of something else")
        seconds, prompt = message.get("timestamp"), message.get("prompt")
        if prompt is None:
            return self.session.push_frame(image, seconds)
        self._check_prompt("prompt", require_text("prompt", prompt))
        return self.session.push_prompt_frame(prompt, image, seconds)

    def _check_prompt(self, name: str, text: str) -> None:
        """Raises ValueError for a text that would keep the other sessions waiting."""
        limits = self.service.limits
        limits.check_texts(name, [text], min(MAX_PROMPT_TOKENS, limits.max_prompt_tokens))

    # a video of the server

    async def _play(self, message: dict) -> None:
        if self.video is not None and not self.video.done():
            raise ValueError("a video is being played; send stop_video first, or wait for video_end")
        path = self.service.media.local(require_text("path", message.get("path")))
        fps = positive_number("sample_fps", message.get("sample_fps", 1))
        speed = positive_number("playback_speed", message.get("playback_speed", 1))
        count = positive_int("max_frames", message.get("max_frames", 256))
        self.stop_video.clear()
        await self._send("video_started")
        self.video = asyncio.ensure_future(self._feed(str(path), fps, speed, count))

    async def _feed(self, path: str, fps: float, speed: float, count: int) -> None:
        """Pushes the frames of a video at their times. Their time stamps go on after the frames before."""
        begun, first = time.monotonic(), max(0.0, self.session.stream.inbox.latest)
        frames = video_frames(path, fps)
        try:
            for _ in range(count):
                item = await asyncio.to_thread(next, frames, None)
                if item is None or await self._is_stopped(begun + item.seconds / speed - time.monotonic()):
                    break
                await asyncio.to_thread(self.session.push_frame, item.image, first + item.seconds)
        except (ValueError, OSError) as error:
            if self.session.active:
                await self._fail(error)
        finally:
            frames.close()
        await self._send("video_end")

    async def _is_stopped(self, seconds: float) -> bool:
        """Whether the video is stopped within this time."""
        if seconds > 0:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.stop_video.wait(), seconds)
        return self.stop_video.is_set()

    async def _end_video(self) -> None:
        """Stops the video, and waits until the client knows."""
        self.stop_video.set()
        if self.video is not None:
            await asyncio.gather(self.video, return_exceptions=True)


def read_message(data: str | bytes) -> tuple[str, dict]:
    """The type and the fields of a message. Raises ValueError for anything but a JSON object of a known type."""
    if isinstance(data, bytes):
        raise ValueError(f"a binary message of {len(data)} bytes has no frame before it; send its JSON message first")
    try:
        message = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError(f"a message must be a JSON object, got {shorten(data)}") from None
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise ValueError(f"a message must be a JSON object with a type, got {shorten(message)}")
    kind = message.pop("type")
    if kind not in KEYS:
        raise ValueError(f"a message has the unknown type {kind!r}; {name_hint(kind, KEYS)}")
    return kind, message


def check_fields(kind: str, message: dict) -> dict:
    """The fields of a message that are not null. Raises ValueError for an unknown one."""
    for name in message:
        if name not in KEYS[kind]:
            raise ValueError(f"a message of type {kind} has the unknown field {name!r}; {name_hint(name, KEYS[kind])}")
    return {name: value for name, value in message.items() if value is not None}


def require_text(name: str, value) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {shorten(value)}")
    return value


def at_most(name: str, value, limit: int) -> int:
    if positive_int(name, value) > limit:
        raise ValueError(f"{name} is at most {limit} on this server, got {value}")
    return int(value)
