"""The HTTP routes of tools/serve.py: who may ask, what may be asked, and the form of errors."""

import asyncio
import hmac
import json
import logging
import time
import urllib.parse
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from moss_vl.checks import shorten
from moss_vl.tools.command_line import message_of
from moss_vl.tools.demo_sessions import AnswerWriter
from moss_vl.tools.serve_chat import ChatAnswer, ChatLimits, ChatRequest, sent
from moss_vl.tools.serve_conversations import Conversations
from moss_vl.tools.serve_media import FileStore, MediaSources, TooLarge
from moss_vl.tools.serve_realtime import RealtimeConnection


logger = logging.getLogger("moss_vl.serve")

MB = 10**6
FORM_BYTES = 2**20  # of an upload beside its file
UPLOADS = 4  # at once; others wait
# A body has this time, and a second more for each of these bytes. Slower clients would hold places for ever.
BODY_SECONDS, BODY_RATE = 30.0, 2**14
DRAIN_SECONDS = 5.0  # that the rest of a body over the limit is read, so that its client reads the error
LEAVE_SECONDS = 15.0  # that realtime clients have to take the end of their session
LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1"}
KEY_PROTOCOL = "openai-insecure-api-key."  # of a WebSocket of a browser, which can send no header
REALTIME_PROTOCOL = "realtime"
OPEN_PATHS = {"/health"}  # without a key
CLIENT_CLOSED = 499  # nobody reads it
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Service:
    """What the routes share.

    Attributes:
        args: the arguments of the command.
        connections: the realtime connections.
        reading: requests whose bodies are being read.
        stopping: whether the server stops.
    """

    def __init__(self, args, model, processor, uploads: Path):
        self.args, self.model, self.processor = args, model, processor
        self.name = args.name or Path(args.checkpoint).name
        self.created = int(time.time())
        self.limits = ChatLimits.of(args, processor)
        self.store = FileStore(uploads, int(args.file_mb * MB), int(args.files_gb * 1000 * MB))
        self.media = MediaSources(self.store, args.media, args.allow_http, args.allow_private_hosts)
        self.connections: set[RealtimeConnection] = set()
        self.reading = 0
        self.stopping = False
        self.writer = AnswerWriter(model, processor, args.rows, int(args.cache_gb * 1000 * MB))
        self.conversations = Conversations()

    @property
    def model_card(self) -> dict:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "moss-vl"}

    @property
    def usable(self) -> bool:
        return self.writer.thread.is_alive() and not self.stopping

    def check_room(self) -> None:
        """Raises HTTPException if too many requests wait, or the server stops."""
        if not self.usable:
            raise HTTPException(503, "the server stops")
        if self.reading + len(self.writer.queues) >= self.args.rows + self.args.waiting:
            raise HTTPException(429, "too many requests wait; try again later", {"Retry-After": "1"})

    def begin(self, request: ChatRequest) -> ChatAnswer:
        """Adds a request to those that are answered. Raises as `check_room`."""
        self.check_room()
        state = self.conversations.find(request.keys)
        index, events = self.writer.begin(request.query_after(state), state, EventQueue())
        return ChatAnswer(request, events, lambda: self.writer.cancel(index), self.name, self.conversations)

    async def stop(self, is_urgent: Callable[[], bool]) -> None:
        """Ends realtime sessions, whose clients are told, and waits for answers, but not longer than `args.grace`
        seconds, or until `is_urgent` is true."""
        self.stopping = True
        for connection in self.connections:
            connection.going.set()
        begun = time.monotonic()
        while not is_urgent():
            seconds = time.monotonic() - begun
            leaving = self.connections and seconds < LEAVE_SECONDS
            if not leaving and not (self.writer.queues and seconds < self.args.grace):
                break
            await asyncio.sleep(0.02)
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Ends all answers."""
        self.stopping = True
        self.writer.close()

    def log_error(self, error: BaseException) -> None:
        logger.error("an error of the server", exc_info=error)


class EventQueue:
    """A queue that a thread fills and an event loop empties."""

    def __init__(self):
        self.loop, self.queue = asyncio.get_running_loop(), asyncio.Queue()

    def put(self, event) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self.queue.put_nowait, event)

    async def get(self):
        return await self.queue.get()


# who may ask


class Guard:
    """Refuses requests without the key. Without a key, it refuses those of web pages of other sites, which a browser
    on this computer may be made to send.

    Args:
        app: the ASGI application behind it.
        hosts: names of this server that requests may use; None allows any.
    """

    def __init__(self, app, api_key: str | None, hosts: set[str] | None, origins: list[str]):
        self.app, self.api_key, self.hosts, self.origins = app, api_key, hosts, origins

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if (problem := self.problem(scope, headers)) is None:
            return await self.app(scope, receive, send)
        status, message = problem
        response = error_response(status, message)
        if scope["type"] == "http":
            return await response(scope, receive, send)
        await receive()  # websocket.connect
        if "websocket.http.response" not in scope.get("extensions", {}):
            return await send({"type": "websocket.close", "code": 1008, "reason": message})
        start = {"status": status, "headers": response.raw_headers}
        await send({"type": "websocket.http.response.start", **start})
        await send({"type": "websocket.http.response.body", "body": response.body})

    def problem(self, scope, headers: dict) -> tuple[int, str] | None:
        """(status, message) of a request that is refused."""
        if self.api_key is not None:
            if scope["path"] in OPEN_PATHS or hmac.compare_digest(given_key(headers), self.api_key.encode()):
                return None
            return 401, "wrong API key; send it as 'Authorization: Bearer KEY'"
        name, place = read_place(f"//{headers.get('host', '')}")
        if self.hosts is not None and name not in self.hosts:
            return 403, f"the host {name!r} is not one of {', '.join(sorted(self.hosts))}"
        origin = headers.get("origin")
        if origin is None or origin in self.origins or read_place(origin)[1] == place:
            return None
        return 403, f"pages of {origin!r} may not ask this server; allow them with --allow-origin"


def read_place(url: str) -> tuple[str | None, str]:
    """(host, host with port) of a URL; (None, "") if it cannot be read."""
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.hostname, parts.netloc
    except ValueError:
        return None, ""


def given_key(headers: dict) -> bytes:
    """The key of a request; empty if it has none."""
    kind, _, key = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return key.strip().encode("latin-1")
    for protocol in headers.get("sec-websocket-protocol", "").split(","):
        if protocol.strip().startswith(KEY_PROTOCOL):
            return protocol.strip()[len(KEY_PROTOCOL) :].encode("latin-1")
    return b""


# errors


def error_response(status: int, message: str, headers=None, code: str | None = None) -> JSONResponse:
    """An error in OpenAI's form."""
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    error = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status, headers)


def describe_error(service: Service, error: BaseException) -> tuple[int, str]:
    """(status, message) for an error of a request."""
    if isinstance(error, HTTPException):
        return error.status_code, error.detail
    if isinstance(error, TooLarge):
        return 413, str(error)
    if isinstance(error, ConnectionAbortedError):
        return 503, str(error)
    if isinstance(error, (ValueError, FileNotFoundError)):
        message = message_of(error)
        return 400, service.media.clean(message.split(": ", 1)[1] if message.startswith("query ") else message)
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        return 503, "out of memory; try a request with fewer frames or pixels"
    return 500, "an error of the server; its log has more"


# bodies


def limited(request: Request, limit: int) -> Request:
    """The request, whose body raises HTTPException 413 if it has more than `limit` bytes, and 408 if it comes too
    slowly."""
    receive, count, waited = request.receive, 0, 0.0

    async def counted():
        nonlocal count, waited
        begun = time.monotonic()
        try:
            message = await asyncio.wait_for(receive(), max(0, BODY_SECONDS + count / BODY_RATE - waited))
        except asyncio.TimeoutError:
            waited += time.monotonic() - begun
            problem = f"the body of the request came too slowly: {count} bytes in {waited:.0f} seconds"
            raise HTTPException(408, problem, {"Connection": "close"}) from None
        waited += time.monotonic() - begun  # without the time in which the server did not wait
        count += len(message.get("body", b""))
        if count > limit:
            await drain(receive, message)
            raise HTTPException(413, f"the request has more than {limit} bytes", {"Connection": "close"})
        return message

    return Request(request.scope, counted)


async def drain(receive, message: dict) -> None:
    """Reads the rest of a body, for some time."""
    end = time.monotonic() + DRAIN_SECONDS
    while message.get("more_body") and (left := end - time.monotonic()) > 0:
        try:
            message = await asyncio.wait_for(receive(), left)
        except asyncio.TimeoutError:
            return


async def read_json(request: Request, limit: int):
    """The body of a request. Raises HTTPException 400 if it is no JSON."""
    data = await limited(request, limit).body()
    try:
        return await asyncio.to_thread(json.loads, data)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from None


async def unless_gone(request: Request, work):
    """The result of a coroutine; None, after it was cancelled, if the client has left."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_leaves(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# routes


def build_app(service: Service) -> FastAPI:
    """The application."""
    args = service.args
    app = FastAPI(title="MOSS-VL", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    async def health():
        return JSONResponse({"status": "ok" if service.usable else "stopping"}, 200 if service.usable else 503)

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [service.model_card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str):
        check_model(service, name)
        return service.model_card

    @app.post("/v1/chat/completions")
    async def chat(request: Request):
        service.check_room()
        service.reading += 1
        try:
            body = await read_json(request, int(args.request_mb * MB))
            if isinstance(body, dict) and body.get("model") is not None:
                check_model(service, body["model"])
            read = await asyncio.to_thread(ChatRequest.read, body, service.media, service.limits)
        finally:
            service.reading -= 1
        return await begin_response(service, request, service.begin(read))

    @app.websocket("/v1/realtime")
    async def realtime(socket: WebSocket):
        offered = socket.scope.get("subprotocols", ())
        await RealtimeConnection(service, socket).run(REALTIME_PROTOCOL if REALTIME_PROTOCOL in offered else None)

    add_file_routes(app, service)
    add_errors(app, service)
    local = args.host in LOCAL_HOSTS
    app.add_middleware(
        Guard, api_key=args.api_key, hosts=LOCAL_HOSTS if local else None, origins=list(args.allow_origin)
    )
    if args.allow_origin:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(args.allow_origin), allow_methods=["*"], allow_headers=["*"]
        )
    return app


def check_model(service: Service, name) -> None:
    if name != service.name:
        raise HTTPException(404, f"there is no model {shorten(name)} here; expected {service.name!r}")


async def begin_response(service: Service, request: Request, answer: ChatAnswer) -> Response:
    """The response to a chat completion. It begins with the first piece, so that earlier errors have a status."""
    texts = answer.texts()
    if not answer.request.stream:
        text = await unless_gone(request, whole_text(texts))
        return Response(status_code=CLIENT_CLOSED) if text is None else JSONResponse(answer.response(text))
    first = await unless_gone(request, first_text(texts))
    if first is None:
        return Response(status_code=CLIENT_CLOSED)
    stream = event_stream(service, answer, first, texts)
    return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def whole_text(texts) -> str:
    try:
        return "".join([text async for text in texts])
    finally:
        await texts.aclose()


async def first_text(texts) -> str:
    """The first piece; empty if there is none."""
    try:
        async for text in texts:
            return text
        return ""
    except BaseException:
        await texts.aclose()
        raise


async def event_stream(service: Service, answer: ChatAnswer, first: str, texts):
    """The server-sent events of an answer. If the client leaves, the answer is cancelled."""
    try:
        yield answer.chunk({"role": "assistant", "content": first})
        async for text in texts:
            yield answer.chunk({"content": text})
        yield answer.chunk({})
        if answer.request.include_usage:
            yield answer.chunk(None, usage=answer.request.counter.usage())
        yield "data: [DONE]\n\n"
    except Exception as error:
        status, message = describe_error(service, error)
        if status >= 500 and not isinstance(error, ConnectionAbortedError):
            service.log_error(error)
        yield sent(json.loads(error_response(status, message).body))
    finally:
        await texts.aclose()


def add_file_routes(app: FastAPI, service: Service) -> None:
    store, uploading = service.store, asyncio.Semaphore(UPLOADS)

    def find(name: str):
        try:
            return store.get(name)
        except KeyError:
            raise HTTPException(404, f"there is no file {name!r}") from None

    @app.post("/v1/files")
    async def upload(request: Request):
        body = limited(request, store.max_bytes + FORM_BYTES)
        async with uploading, body.form(max_files=1, max_fields=2) as form:
            file, unknown = form.get("file"), set(form) - {"file", "purpose"}
            if unknown or not hasattr(file, "filename"):
                raise HTTPException(400, f"a form needs 'file' and 'purpose', and nothing else; got {sorted(form)}")
            stored = await asyncio.to_thread(
                store.add, file.file, file.filename, form.get("purpose", "user_data"), file.size
            )
        return stored.as_json()

    @app.get("/v1/files")
    async def list_files():
        return {"object": "list", "data": [stored.as_json() for stored in store.list()], "has_more": False}

    @app.get("/v1/files/{name}")
    async def describe(name: str):
        return find(name).as_json()

    @app.get("/v1/files/{name}/content")
    async def content(name: str):
        return FileResponse(find(name).path, media_type="application/octet-stream")

    @app.delete("/v1/files/{name}")
    async def delete(name: str):
        await asyncio.to_thread(store.delete, find(name).id)
        return {"id": name, "object": "file", "deleted": True}


def add_errors(app: FastAPI, service: Service) -> None:
    """Answers errors in OpenAI's form."""

    async def respond(request: Request, error: Exception) -> Response:
        if isinstance(error, ClientDisconnect):
            return Response(status_code=CLIENT_CLOSED)
        status, message = describe_error(service, error)
        code = "model_not_found" if status == 404 and "no model" in message else None
        return error_response(status, message, getattr(error, "headers", None), code)

    for kind in (HTTPException, ValueError, OSError, ClientDisconnect, Exception):
        app.add_exception_handler(kind, respond)
