"""`infer.py --live`: watches a source, and prints what the model says with the time at which it says it."""

import argparse
import dataclasses
import json
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from moss_vl.tools.command_line import above_0
from moss_vl.tools.live_sources import Item, Source, find_source, read_stream_records


TOKENS_PER_SECOND = 12.0
# Options of the command that have no meaning for a live source: name -> value if it is not given.
NOT_LIVE = {"media": [], "batch": None, "out": None, "frames": None, "thinking": None, "template": None}


def add_live_arguments(group) -> None:
    """The options of the command line for a live source."""
    group.add_argument(
        "--live",
        metavar="SOURCE",
        help="watch a video file, a folder of images that grows, a .jsonl file of stream records, camera[:NAME], "
        "screen[:NAME] or an rtsp:// URL; -p is the standing request. Needs a realtime checkpoint",
    )
    group.add_argument(
        "--fast",
        action="store_true",
        help="do not wait for the frames of a video file: its time is counted, not lived through",
    )
    group.add_argument(
        "--window", metavar="SECONDS", type=above_0, help="what the model still sees (default: the last 256 frames)"
    )
    group.add_argument(
        "--pace",
        metavar="RATE",
        type=above_0,
        help=f"most tokens per second that are written (default: {TOKENS_PER_SECOND:g})",
    )
    group.add_argument("--record", metavar="OUT.JSONL", type=Path, help="write each event as a line of this file")


def check_live_usage(parser: argparse.ArgumentParser, args) -> None:
    """Exits if arguments contradict each other."""
    if args.live is None:
        for name in ("fast", "window", "pace", "record"):
            if getattr(args, name):
                parser.error(f"--{name} goes with --live")
        return
    args.pace = args.pace or TOKENS_PER_SECOND
    for name, absent in NOT_LIVE.items():
        if getattr(args, name) != absent:
            what = "images and videos" if name == "media" else f"--{name}"
            parser.error(f"{what} cannot be given with --live")
    if args.live.endswith(".jsonl") and args.fps is not None:
        parser.error("the records of a .jsonl file name their own frames; leave --fps out")
    if args.live.endswith(".jsonl") and (args.prompt is not None or args.system is not None):
        parser.error("the records of a .jsonl file have their own prompts; leave -p and --system out")


def watch(args, load) -> int:
    """Runs the command, and returns its exit code.

    Args:
        load: a function of the arguments that returns (processor, model).
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # the terminal's encoding may lack a character
    is_file = args.live.endswith(".jsonl")
    records = read_stream_records(Path(args.live), args.allow_http) if is_file else []
    source = None if is_file else find_source(args.live, args.fps or 1.0, args.allow_http)
    processor, model = load(args)
    record = None if args.record is None else open(args.record, "w", encoding="utf-8")
    try:
        if records:
            failed = [_watch_record(args, model, processor, one, i, record) for i, one in enumerate(records)]
            return int(any(failed))
        return _watch_source(args, model, processor, source, record)
    finally:
        if record is not None:
            record.close()


def stream_options(args) -> dict:
    """Keyword arguments of a session from those of the command."""
    options = {
        "max_new_tokens": args.max_new_tokens,
        "do_sample": args.temperature > 0,
        "temperature": args.temperature or None,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "repetition_penalty": args.repetition_penalty,
        "seed": args.seed,
        "window_seconds": args.window,
    }
    pixels = {"min_pixels": args.min_pixels, "max_pixels": args.max_pixels}
    options["media_kwargs"] = {name: value for name, value in pixels.items() if value is not None}
    return options


def _watch_record(args, model, processor, record, index: int, out) -> int:
    stream = model.create_realtime_stream(processor, record.prompt, record.system_prompt, **stream_options(args))
    reporter = Reporter(out, {"record": index})
    print(f"{record.where}:")
    try:
        return reporter.report(play(stream, record.items(), args.pace))
    except (ValueError, OSError) as error:  # an error in one record must not end the run
        reporter.end_line()
        print(f"infer.py: {record.where}: {error}", file=sys.stderr)
        return 1


def _watch_source(args, model, processor, source: Source, out) -> int:
    prompt, reporter = args.prompt or "", Reporter(out)
    if args.fast and not source.is_live:
        stream = model.create_realtime_stream(processor, prompt, args.system, **stream_options(args))
        return reporter.report(play(stream, source.items(), args.pace))
    session = model.create_realtime_session(
        processor, prompt, args.system, max_tokens_per_turn=args.pace, **stream_options(args)
    )
    feeder = Feeder(session, source)
    with session:
        feeder.start()
        if sys.stdin is not None and sys.stdin.isatty():
            threading.Thread(target=push_lines, args=(session, sys.stdin), daemon=True).start()
        try:
            code = reporter.report(session.events())
        finally:
            feeder.stop()
    if feeder.error is not None:
        raise feeder.error
    return code


# feeding


def play(stream, items: Iterable[Item], tokens_per_second: float) -> Iterator:
    """Runs a stream over items whose time is counted, not lived through: between two frames it writes as many tokens
    as their distance allows. Each item is taken in by a step of its own.

    Yields:
        The events.
    """
    yield from stream.step()
    now, budget = 0.0, 0.0
    for item in items:
        if item.seconds is not None:
            budget = min(budget, 0.0) + (item.seconds - now) * tokens_per_second
            now = item.seconds
            while budget >= 1 and not stream.parked:
                yield from stream.step()
                budget -= 1
        if stream.ended:  # by an error
            return
        if item.seconds is None:
            stream.push_prompt(item.prompt)
        else:
            stream.push_frame(item.image, item.seconds, item.prompt)
        yield from stream.step()
        budget -= 1
    stream.end()
    while not stream.ended:
        yield from stream.step()


class Feeder:
    """A thread that pushes the items of a source to a session, at their times, and then ends the session.

    Attributes:
        error: what went wrong with the source, or None.
    """

    def __init__(self, session, source: Source):
        self.session = session
        self.source = source
        self.error: Exception | None = None
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """Ends the thread after its next item; a device that gives no frame keeps it until the program ends."""
        self.stopped.set()
        self.thread.join(1.0)

    def _run(self) -> None:
        start = time.monotonic()
        try:
            for item in self.source.items():
                wait = 0.0 if self.source.is_live or item.seconds is None else start + item.seconds - time.monotonic()
                if self.stopped.wait(max(0.0, wait)) or not self.session.active:
                    return
                self.session.push_frame(item.image, item.seconds)
        except Exception as error:
            if self.session.active:
                self.error = error
        finally:
            self.session.end()


def push_lines(session, lines: Iterable[str]) -> None:
    """Pushes each line as a prompt, so that questions can be typed meanwhile."""
    for line in lines:
        if not session.active:
            return
        if line.strip():
            session.push_prompt(line.strip())


# reporting


class Reporter:
    """Prints what is said, each reply on a line with its time, and records all events.

    Args:
        out: a file for the events, or None.
        extra: keys that each recorded line gets.
    """

    def __init__(self, out=None, extra: dict | None = None):
        self.out = out
        self.extra = extra or {}
        self.in_line = False
        self.begun = None  # seconds of the reply that is being written

    def report(self, events: Iterable) -> int:
        """Returns the exit code: 1 if the session failed."""
        code = 0
        for event in events:
            name = type(event).__name__
            if name == "ResponseBegins" and not event.continues:
                self.begun = event.seconds
            elif name == "Text":
                if not self.in_line:
                    print(f"{time_text(event.seconds if self.begun is None else self.begun)} ", end="")
                    self.in_line, self.begun = True, None
                print(event.text, end="", flush=True)
            elif name == "ReplyEnds" and self.in_line:
                self.end_line()
            elif name == "Failed":
                self.end_line()
                print(f"infer.py: {event.message}", file=sys.stderr)
                code = 1
            if self.out is not None:
                self.out.write(json.dumps({**self.extra, **event_fields(event)}, ensure_ascii=False) + "\n")
                self.out.flush()
        self.end_line()
        return code

    def end_line(self) -> None:
        if self.in_line:
            print(flush=True)
        self.in_line = False


def time_text(seconds: float | None) -> str:
    return "[ start ]" if seconds is None else f"[{seconds:6.1f}s]"


def event_fields(event) -> dict:
    """An event as a JSON object: {"event": "reply_ends", "seconds": 3.0, "text": ...}."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(event).__name__).lower()
    fields = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
    if "error" in fields:
        fields["error"] = event.message
    return {"event": name, **fields}
