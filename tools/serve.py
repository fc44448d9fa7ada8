"""An OpenAI-compatible server for a MOSS-VL checkpoint, with realtime sessions over a WebSocket.

    pip install -r requirements-serve.txt
    python tools/serve.py --checkpoint CHECKPOINT

docs/serving.md has requests, limits and the protocol of sessions.

    serve_http.py             routes, keys, errors
    serve_chat.py             chat completions: requests to queries, answers to responses
    serve_conversations.py    conversations that keep their caches
    serve_media.py            what a request may open
    serve_realtime.py         realtime sessions
"""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path


if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from moss_vl.infer import add_checkpoint_argument, add_running_arguments, load
from moss_vl.tools.command_line import above_0, at_least, message_of


UPLOADS_PREFIX = "moss-vl-serve-"  # of the temporary folder
FLUSH_SECONDS = 5  # that clients have to take the ends of their answers
KEY_VARIABLE = "MOSS_VL_API_KEY"


def main(argv=None) -> int:
    """Runs the command and returns its exit code. An error is one line on stderr."""
    args = parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as an interrupt does
    try:
        with tempfile.TemporaryDirectory(prefix=UPLOADS_PREFIX) as uploads:
            serve(args, Path(uploads).resolve())
    except KeyboardInterrupt:
        return 0  # it was told to stop
    except (ValueError, OSError, ImportError) as error:
        print(f"serve.py: {message_of(error)}", file=sys.stderr)
        return 2
    return 0


def parse(argv) -> argparse.Namespace:
    """The arguments of the command line. Wrong usage exits with code 2."""
    parser = argparse.ArgumentParser(prog="serve.py", description=__doc__.split("\n\n")[0])
    add_checkpoint_argument(parser, "; sessions need a realtime one")
    parser.add_argument("--name", help="name of the model in requests (default: the last part of --checkpoint)")
    _add_access(parser.add_argument_group("access"))
    _add_media(parser.add_argument_group("media"))
    _add_limits(parser.add_argument_group("limits"))
    add_running_arguments(parser.add_argument_group("running"))
    args = parser.parse_args(argv)
    if args.api_key is None:
        args.api_key = os.environ.get(KEY_VARIABLE)
    if args.api_key is not None and not (
        args.api_key.isascii() and args.api_key.isprintable() and args.api_key.strip()
    ):
        parser.error("the API key must be printable ASCII, and not empty")
    if args.api_key is None and args.host not in ("localhost", "127.0.0.1", "::1"):
        parser.error(f"--host {args.host} can be reached from other computers: give --api-key or set {KEY_VARIABLE}")
    if args.media is not None and not args.media.is_dir():
        parser.error(f"--media {args.media} is not a folder")
    return args


def _add_access(group) -> None:
    group.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this computer)")
    group.add_argument("--port", type=at_least(int, 0), default=8000, help="0: a free one (default: 8000)")
    group.add_argument(
        "--api-key", metavar="KEY", help=f"key that requests must have (default: ${KEY_VARIABLE}; without it, none)"
    )
    group.add_argument(
        "--allow-origin",
        metavar="URL",
        action="append",
        default=[],
        help="let pages of this origin, such as http://localhost:3000, ask from a browser; may be repeated",
    )


def _add_media(group) -> None:
    group.add_argument(
        "--media", metavar="FOLDER", type=Path, help="requests may name files of this folder (default: no files)"
    )
    group.add_argument("--allow-http", action="store_true", help="download media from http: and https: URLs")
    group.add_argument(
        "--allow-private-hosts",
        action="store_true",
        help="download from private, loopback, link-local and reserved addresses too",
    )
    group.add_argument(
        "--fps", metavar="RATE", type=above_0, help="frames per second of video (default: the checkpoint's)"
    )
    group.add_argument(
        "--frames",
        metavar="N",
        type=at_least(int, 1),
        help="most frames of the videos of a request (default: the checkpoint's)",
    )
    group.add_argument(
        "--max-pixels",
        metavar="N",
        type=at_least(int, 1),
        help="most pixels of an image or frame after its resize (default: the checkpoint's)",
    )


def _add_limits(group) -> None:
    def add(name: str, kind, default, meaning: str) -> None:
        metavar = "N" if kind is at_least_1 else name.rsplit("-", 1)[-1].upper()
        group.add_argument(name, metavar=metavar, type=kind, default=default, help=f"{meaning} (default: {default:g})")

    at_least_1 = at_least(int, 1)
    add("--max-new-tokens", at_least_1, 4096, "most tokens of an answer")
    add("--max-prompt-tokens", at_least_1, 32768, "most tokens of the texts of a request")
    add("--rows", at_least_1, 8, "answers that are written at once")
    add("--waiting", at_least(int, 0), 64, "requests that wait beside them; more get status 429")
    add("--cache-gb", at_least(float, 0), 4, "memory for the caches of conversations; 0 keeps none")
    add("--sessions", at_least(int, 0), 8, "realtime sessions at once")
    add("--request-mb", above_0, 64, "size of a request, with its data: URLs")
    add("--file-mb", above_0, 1024, "size of an uploaded file")
    add("--files-gb", above_0, 8, "size of all uploaded files")
    add("--grace", at_least(float, 0), 30, "seconds that answers have to end when the server is stopped")


def serve(args, uploads: Path) -> None:
    """Serves until an interrupt."""
    uvicorn = import_server()
    from moss_vl.tools.serve_http import Service, build_app

    processor, model = load(args)
    service = Service(args, model, processor, uploads)
    try:
        make_server(uvicorn, service, build_app(service)).run()
    finally:
        service.close()


def import_server():
    """uvicorn. Raises ImportError, with the command that installs it, if a package is missing."""
    try:
        import fastapi  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn
        import websockets  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the server needs FastAPI ({error}): pip install -r requirements-serve.txt") from error
    return uvicorn


def make_server(uvicorn, service, app):
    """The `uvicorn.Server`. When it is stopped, it takes no more requests, ends realtime sessions, and waits for
    answers."""
    from moss_vl.tools.serve_realtime import MAX_MESSAGE_BYTES

    class Server(uvicorn.Server):
        async def startup(self, sockets=None):
            await super().startup(sockets)
            for server in self.servers:
                host, port = server.sockets[0].getsockname()[:2]
                print(f"MOSS-VL: http://{f'[{host}]' if ':' in host else host}:{port}/v1 (Ctrl+C ends it)", flush=True)

        async def shutdown(self, sockets=None):
            for server in self.servers:
                server.close()
            await service.stop(lambda: self.force_exit)
            await super().shutdown(sockets)

    args = service.args
    return Server(
        uvicorn.Config(
            app,
            host=args.host,
            port=args.port,
            log_level="warning",
            access_log=False,
            server_header=False,
            ws_max_size=MAX_MESSAGE_BYTES,
            ws_per_message_deflate=False,
            timeout_graceful_shutdown=FLUSH_SECONDS,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
