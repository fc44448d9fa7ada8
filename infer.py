"""Asks a MOSS-VL checkpoint about images and videos from the command line."""

import argparse
import json
import mimetypes
import os
import sys
from pathlib import Path

from moss_vl.checks import shorten
from moss_vl.conversation import (
    SOURCE_KEYS,
    file_of,
    kind_of,
    locate,
    plain_medium,
    read_medium,
    read_messages,
    scheme_of,
)
from moss_vl.options import ALTERNATIVES, OPTIONS


NANO = Path(__file__).resolve().parent / "checkpoints" / "moss-vl-nano"
EPILOG = """\
examples:
  python infer.py photo.jpg -p "What does the sign say?"
  python infer.py clip.mp4 -p "What happens?" --frames 16
  python infer.py before.jpg after.jpg clip.mp4 -p "Which picture shows the end of the clip?"
  python infer.py --allow-http https://example.com/photo.jpg -p "What does the sign say?"
  python infer.py --batch queries.jsonl --out results.jsonl

images and videos are paths, file: or data: URLs, or, with --allow-http, http(s): URLs.

queries.jsonl has a JSON object per line, or is a JSON list of such objects, with the keys of a query of
`offline_batch_generate` (prompt or messages, images, videos, media_kwargs, generate_kwargs, ...), and
  "media": ["a.jpg", "b.mp4"]   instead of images and videos: any files, in their order
Any other key ("id", "label", ...) is copied into the result. Training records are queries, too: their `conversations` are
messages, and the assistant's turns at the end, which answer them, are left out.
Paths, wherever they stand, are relative to queries.jsonl. The options given here hold for every line that does not say otherwise.
results.jsonl gets a line per query, in their order: {"index": 0, "id": ..., "text": ...}, or "error" in place of "text". Lines
that are there already are kept, and the run goes on after them; to try failed queries again, give another --out.

exit codes: 0 all answered, 1 some queries of a batch failed, 2 wrong usage or input, 130 interrupted
"""
# Knobs that are the checkpoint's own where no option names them (None), not the defaults of the offline methods.
CHECKPOINT_KNOBS = dict.fromkeys(
    (
        "min_pixels",
        "max_pixels",
        "multi_image_max_pixels",
        "video_max_pixels",
        "video_fps",
        "min_frames",
        "max_frames",
        "num_extract_threads",
    )
)
OWN_RATE = (
    *ALTERNATIVES[0],
    "sample_fps",
)  # options that say how many frames are taken; one of them is in place of another
ROLES = {"human": "user", "gpt": "assistant"}  # as `conversations` of training records call them


def main(argv=None) -> int:
    """Runs the command; returns the exit code, with what went wrong in one line on stderr."""
    args = parse(argv)
    try:
        return answer_many(args) if args.batch is not None else answer_one(args)
    except KeyboardInterrupt:
        return fail("interrupted" if args.batch is None else "interrupted; the same command goes on from here", 130)
    except BrokenPipeError:  # whoever read our output has gone; say nothing when stdout is closed, either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError) as error:
        return fail(message_of(error), 2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "out of memory" not in str(error):
            raise
        return fail("out of memory; try fewer --frames, a lower --max-pixels or --dtype bfloat16", 1)


def fail(message: str, code: int) -> int:
    print(f"infer.py: {message}", file=sys.stderr)
    return code


def message_of(error: Exception) -> str:
    """One line of an exception: its words if they are meant for the user, else its type too."""
    words = " ".join(str(error).removeprefix("query 0: ").split())
    return words if isinstance(error, (ValueError, OSError)) and words else f"{type(error).__name__}: {words}"


# the command line


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="infer.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("media", nargs="*", help="images and videos, in the order in which the model sees them")
    parser.add_argument("-p", "--prompt", help="what is asked about them (default: nothing, the model just goes on)")
    parser.add_argument(
        "--checkpoint",
        default=str(NANO),
        help="folder or hub name of a checkpoint (default: checkpoints/moss-vl-nano)",
    )

    many = parser.add_argument_group("many queries")
    many.add_argument("--batch", metavar="QUERIES.JSONL", type=Path, help="answer the queries of this file")
    many.add_argument("--out", metavar="RESULTS.JSONL", type=Path, help="where the answers go, each as it is ready")

    seeing = parser.add_argument_group("seeing")
    seeing.add_argument(
        "--frames",
        metavar="N",
        type=at_least(int, 1),
        help="look at N frames of each video, spread over it; with --fps, at most N of all videos of a query",
    )
    seeing.add_argument(
        "--fps",
        metavar="RATE",
        type=above_0,
        help="look at RATE frames a second (default: the checkpoint's, mostly 1)",
    )
    seeing.add_argument(
        "--min-pixels",
        metavar="N",
        type=at_least(int, 1),
        help="fewest pixels of an image or frame after its resize; smaller ones are enlarged",
    )
    seeing.add_argument(
        "--max-pixels", metavar="N", type=at_least(int, 1), help="most pixels of an image or frame after its resize"
    )
    seeing.add_argument(
        "--allow-http", action="store_true", help="download images and videos from http: and https: URLs"
    )

    saying = parser.add_argument_group("answering")
    saying.add_argument(
        "--max-new-tokens", metavar="N", type=at_least(int, 1), default=1024, help="longest answer (default: 1024)"
    )
    saying.add_argument(
        "--temperature", metavar="T", type=at_least(float, 0), default=0.0, help="above 0: sample (default: 0, greedy)"
    )
    saying.add_argument(
        "--top-p", metavar="P", type=share, help="sample from the likeliest tokens that make up P (default: 1)"
    )
    saying.add_argument(
        "--top-k",
        metavar="K",
        type=at_least(int, 0),
        help="sample from the K likeliest tokens, 0: from all (default: 50)",
    )
    saying.add_argument("--repetition-penalty", metavar="R", type=above_0, help="above 1: repeat less (default: 1)")
    saying.add_argument("--seed", metavar="N", type=int, help="make sampling repeatable")
    saying.add_argument(
        "--template",
        action=argparse.BooleanOptionalAction,
        help="render the chat template, or not (default: if there is one)",
    )
    saying.add_argument("--system", metavar="TEXT", help="system prompt")
    saying.add_argument(
        "--thinking", choices=("no_thinking", "deep_thinking"), help="ask for the answer, or for reasoning and answer"
    )

    running = parser.add_argument_group("running")
    running.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto, all GPUs if there are any, else cpu)"
    )
    running.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="default: auto, the checkpoint's",
    )
    running.add_argument("--attn", choices=("eager", "sdpa", "flash_attention_2"), help="attention (default: sdpa)")

    args = parser.parse_intermixed_args(argv)
    if args.batch is None and not args.media and args.prompt is None:
        parser.error("nothing to do: give images or videos, a prompt (-p), or --batch")
    if args.batch is None and args.out is not None:
        parser.error("--out goes with --batch")
    if args.batch is not None and args.out is None:
        parser.error("--batch needs --out")
    if args.batch is not None and args.media:
        parser.error("with --batch, images and videos are named in its lines")
    if args.temperature == 0:
        for name in ("top_p", "top_k", "seed"):
            if getattr(args, name) is not None and args.batch is None:
                parser.error(f"--{name.replace('_', '-')} is for sampling; give a --temperature above 0")
    return args


def at_least(kind, lowest):
    def convert(text):
        value = kind(text)
        if not lowest <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be at least {lowest}, got {text}")
        return value

    convert.__name__ = {int: "whole number", float: "number"}[kind]  # what argparse calls it
    return convert


def above_0(text):
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def share(text):
    value = above_0(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"must be at most 1, got {text}")
    return value


above_0.__name__ = share.__name__ = "number"  # what argparse calls them


# from options to a query


def query_from(args, query: dict, processor) -> dict:
    """The query with the options of the command line where it says nothing."""
    media_kwargs = query.get("media_kwargs") or {}
    said = {option_of(name): value for name, value in media_kwargs.items()}
    frames = {} if "size" in said else {"min_pixels": args.min_pixels, "max_pixels": args.max_pixels}
    frames |= frames_from(args, query, said, processor.video_processor)
    if args.allow_http:
        frames |= {"allow_http": True}
    frames = {name: value for name, value in {**CHECKPOINT_KNOBS, **frames}.items() if name not in said}
    sampling = {
        "temperature": args.temperature,
        "do_sample": args.temperature > 0,
        "max_new_tokens": args.max_new_tokens,
    }
    options = {
        name: getattr(args, name)
        for name in ("top_p", "top_k", "repetition_penalty")
        if getattr(args, name) is not None
    }
    chosen = {"use_template": args.template, "system_prompt": args.system, "thinking_mode": args.thinking}
    return with_own_frames(
        frames,
        {
            **chosen,
            **query,
            "media_kwargs": {**frames, **media_kwargs},
            "generate_kwargs": {**sampling, **options, **(query.get("generate_kwargs") or {})},
        },
    )


def frames_from(args, query: dict, said: dict, own) -> dict:
    """How many frames the command line asks for, as far as the query's own options, `said`, leave that to it."""
    if any(name in said for name in OWN_RATE):  # in place of ours
        return {}
    if args.frames is None:
        return {"video_fps": args.fps}
    low, high = (said[name] if is_count(said.get(name)) else None for name in ("min_frames", "max_frames"))
    frames = within(args.frames, low, high)
    if args.fps is not None:
        return {"video_fps": args.fps, "min_frames": min(frames, own.min_frames), "max_frames": frames}
    most = max(
        frames * max(1, count_videos(query)), own.max_frames
    )  # max_frames bounds the frames of all videos together
    return {"num_frames": frames, "min_frames": min(frames, own.min_frames), "max_frames": most}


def with_own_frames(ours: dict, query: dict) -> dict:
    """The query, in which videos with options of their own for the number of frames are not held to `ours`, those of the command line."""

    def freed(medium):
        source, own = read_medium("video", medium)
        low, high = (own[name] if is_count(own.get(name)) else None for name in ("min_frames", "max_frames"))
        if ours.get("num_frames") is not None and (low or high) and not any(name in own for name in OWN_RATE):
            own["num_frames"] = within(ours["num_frames"], low, high)
        wanted = max((own[name] for name in ("num_frames", "min_frames") if is_count(own.get(name))), default=0)
        if ours.get("max_frames") is not None and wanted > ours["max_frames"] and "max_frames" not in own:
            own["max_frames"] = wanted
        return plain_medium("video", source, own)

    query = dict(query)
    if (videos := query.get("videos")) is not None:
        query["videos"] = [freed(one) for one in videos] if isinstance(videos, list) else freed(videos)
    if isinstance(query.get("messages"), list):
        query["messages"] = [
            {
                **message,
                "content": [
                    {**part, "video": freed(part["video"])} if isinstance(part, dict) and "video" in part else part
                    for part in message["content"]
                ],
            }
            if isinstance(message.get("content"), list)
            else message
            for message in query["messages"]
        ]
    return query


def within(number: int, low, high) -> int:
    """The number, moved into low..high; None bounds nothing."""
    number = number if low is None else max(number, low)
    return number if high is None else min(number, high)


def is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def option_of(name: str) -> str:
    """The name that the code uses for an option with several names."""
    return next((option.name for option in OPTIONS if name == option.name or name in option.also), name)


def count_videos(query: dict) -> int:
    """At most so many videos does a query have; those that it names twice are counted twice."""
    videos = query.get("videos")
    parts = [
        part
        for message in query.get("messages") or ()
        if isinstance(message.get("content"), list)
        for part in message["content"]
    ]
    given = len(videos) if isinstance(videos, list) else videos is not None
    return given + sum(isinstance(part, dict) and "video" in part for part in parts)


def user_turn(media: list, prompt, allow_http: bool, folder=None) -> list:
    """Messages that show the media in their order, then ask. Relative paths are taken from `folder`, if it is given."""
    content = [{"type": kind, kind: medium} for kind, medium in (told_apart(one, allow_http, folder) for one in media)]
    return [{"role": "user", "content": [*content, {"type": "text", "text": prompt or ""}]}]


def told_apart(medium, allow_http: bool, folder=None) -> tuple:
    """("image" or "video", the medium) of a file, a URL, a list of frames, or a dict that says which it is. What has to be downloaded to
    tell is kept as its bytes. Raises for what can be neither."""
    kind = "video" if isinstance(medium, list) else None
    if isinstance(medium, dict):
        kind = next(
            (kind for kind, keys in SOURCE_KEYS.items() if any(key in medium for key in keys if kind in key)), None
        )
        if kind is None and kind_of(medium.get("type")) in SOURCE_KEYS:
            kind = kind_of(medium["type"])
    if kind is None and not isinstance(medium, str):
        raise ValueError(
            f"media holds {shorten(medium)}; expected a path, a URL, or a dict with 'image' or 'video', or a type of that name"
        )
    if folder is not None:
        medium = locate(kind or "video", medium, folder)
    check_http(read_medium(kind or "video", medium)[0], allow_http)
    if kind is not None:
        return kind, medium
    if scheme_of(medium) in ("data", "http", "https"):
        from moss_vl.image_reading import open_source
        from moss_vl.video_reading import DOWNLOAD_SECONDS, MAX_VIDEO_BYTES

        source, _ = open_source(
            medium, what="medium", allow_http=allow_http, max_bytes=MAX_VIDEO_BYTES, timeout=DOWNLOAD_SECONDS
        )
        return media_kind(source, shorten(medium), mimetypes.guess_type(medium)[0]), source
    return media_kind(medium), medium


def media_kind(source, name=None, mime=None) -> str:
    """ "image" for what Pillow opens, animated GIFs apart, and for what is damaged but called an image; else "video". `source`: a path, or a
    binary file with its `name` and, if that is known, its `mime` type. Raises for what can be neither."""
    from PIL import Image

    if name is None:
        source = os.fspath(file_of(source))
        name = source if len(source) < 1000 else shorten(source)
        mime = mimetypes.guess_type(name)[0]
        if not os.path.exists(source):
            raise FileNotFoundError(f"no such file: {name}")
        if not os.path.isfile(source) or os.path.getsize(source) == 0:
            raise ValueError(
                f"{name} is {'empty' if os.path.isfile(source) else 'not a file'}; expected an image or a video"
            )
    try:
        with Image.open(source) as image:
            return "video" if image.format == "GIF" and image.is_animated else "image"
    except Image.DecompressionBombError:
        return "image"  # the processor says what is wrong with it
    except (OSError, ValueError, SyntaxError):
        return "image" if (mime or "").startswith("image/") and mime != "image/gif" else "video"


def check_http(source, allow_http: bool) -> None:
    """ValueError for a URL, also in a list of frames, that may not be downloaded."""
    for one in source if isinstance(source, list) else [source]:
        if scheme_of(one) in ("http", "https") and not allow_http:
            raise ValueError(f"{shorten(one)} would be downloaded; give --allow-http to allow that")


# answering


def load(args):
    """Processor and model, as anyone loads them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        device = None if args.device == "auto" else torch.device(args.device)
    except RuntimeError as error:
        raise ValueError(f"--device {args.device}: {error}") from error
    if device is not None and device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: this torch finds no CUDA device")
    if not Path(args.checkpoint).exists() and (args.checkpoint == str(NANO) or args.checkpoint.count("/") != 1):
        raise FileNotFoundError(f"no such checkpoint folder: {args.checkpoint}")

    options = {"device_map": "auto"} if device is None and torch.cuda.is_available() else {}
    if args.attn is not None:
        options["attn_implementation"] = args.attn
    try:
        processor = AutoProcessor.from_pretrained(args.checkpoint, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(
            args.checkpoint, trust_remote_code=True, dtype=args.dtype, **options
        )
    except OSError as error:
        check_caches(error, downloads=not os.path.exists(args.checkpoint))
        raise
    return processor, model if device is None else model.to(device)


def check_caches(cause: OSError, downloads: bool) -> None:
    """Raises OSError with the name of the variable to set, if what went wrong while loading is a cache folder that cannot be written to.

    `downloads`: whether the checkpoint comes from a hub.
    """
    import tempfile

    from huggingface_hub.constants import HF_HUB_CACHE
    from transformers.utils import HF_MODULES_CACHE

    if all(getattr(error, "errno", None) is None for error in (cause, cause.__cause__)):
        return  # the libraries' own words, not those of a file system
    caches = [("HF_MODULES_CACHE", "the code of checkpoints", HF_MODULES_CACHE)]
    if downloads:
        caches.append(("HF_HUB_CACHE", "downloaded checkpoints", HF_HUB_CACHE))
    for variable, holds, folder in caches:
        try:
            os.makedirs(folder, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            reason = f"{folder}, the folder for {holds}, cannot be written to: {error.strerror or error}"
            raise OSError(f"{reason}; set {variable} or HF_HOME to a folder that can be") from cause


def answer_one(args) -> int:
    """Prints the answer as it comes."""
    messages = user_turn(args.media, args.prompt, args.allow_http)
    processor, model = load(args)
    query = query_from(args, {"messages": messages}, processor)
    from transformers import TextStreamer

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character
    query["generate_kwargs"]["streamer"] = TextStreamer(
        processor.tokenizer, skip_prompt=True, skip_special_tokens=True
    )
    answer(processor, model, query, args.seed)
    return 0


def answer(processor, model, query: dict, seed) -> str:
    import torch

    if seed is not None:
        torch.manual_seed(seed)
    return model.offline_batch_generate(processor, [query])["results"][0]["text"]


def answer_many(args) -> int:
    """Answers the lines of `args.batch` one by one into `args.out`, after those that are there."""
    lines = read_queries(args.batch)
    if args.out.resolve() == args.batch.resolve():
        raise ValueError(f"--out is the file of the queries, {args.batch}; name another one")
    done, failed = finished(args.out, lines)
    left = lines[done:]
    if left:
        with open(args.out, "a", encoding="utf-8") as out:
            failed += answer_lines(args, left, done, len(lines), out)
    print(f"{len(lines)} queries, {failed} failed: {args.out}", file=sys.stderr)
    return 1 if failed else 0


def read_queries(file: Path) -> list[str]:
    """The queries as lines of JSON: the lines of the file, or the items of the JSON list that it is, or the one object that it is."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}; expected a JSON object per line, or a JSON list") from None
    if file.suffix == ".json" and text.lstrip()[:1] == "{":
        try:
            return [json.dumps(json.loads(text))]
        except json.JSONDecodeError as error:
            if not is_json(text.lstrip().split("\n")[0]):  # lines of JSON may be called .json, too
                raise ValueError(f"{file} begins like a JSON object, but is not one: {error}") from None
    if text.lstrip()[:1] == "[":
        try:
            return [json.dumps(query) for query in json.loads(text)]
        except json.JSONDecodeError as error:
            if file.suffix == ".json":
                raise ValueError(f"{file} begins like a JSON list, but is not one: {error}") from None
    return [line for line in text.split("\n") if line.strip()]


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def answer_lines(args, lines: list, done: int, total: int, out) -> int:
    """Writes a result per line; returns how many failed."""
    from tqdm import tqdm

    processor, model = load(args)
    failed = 0
    with tqdm(total=total, initial=done, unit="query", file=sys.stderr) as progress:
        for index, line in enumerate(lines, start=done):
            result = {"index": index}
            try:
                query = parsed(line)
                result |= record_of(query)
                seed = None if args.seed is None else args.seed + index
                result["text"] = answer(processor, model, query_from(args, with_media(query, args), processor), seed)
            except Exception as error:  # whatever one query does, the next is answered
                result["error"] = message_of(error)
                failed += 1
                progress.set_postfix(failed=failed)
            out.write(json.dumps(result, ensure_ascii=False) + "\n")
            out.flush()
            progress.update()
    return failed


def finished(out: Path, lines: list) -> tuple[int, int]:
    """(results, failed ones among them) of an earlier run; the half-written line of one that was killed is cut off."""
    if not out.exists():
        return 0, 0
    data = out.read_bytes()
    whole = data.rfind(b"\n") + 1
    failed = 0
    rows = data[:whole].split(b"\n")[:-1]
    for index, row in enumerate(rows):
        try:
            result = json.loads(row)
            belongs = index < len(lines) and result["index"] == index and ("text" in result or "error" in result)
            belongs = belongs and ("id" not in result or result["id"] == parsed(lines[index]).get("id"))
        except (ValueError, KeyError, TypeError):
            belongs = False
        if not belongs:
            raise ValueError(
                f"{out}, line {index + 1}, is no result of these queries; name another --out or move the file away"
            )
        failed += "error" in result
    if whole < len(data):
        os.truncate(out, whole)
    return len(rows), failed


def parsed(line: str) -> dict:
    try:
        query = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"a query must be a JSON object, got {line:.60}: {error}") from None
    if not isinstance(query, dict):
        raise ValueError(f"a query must be a JSON object, got {line:.60}")
    return query


def record_of(query: dict) -> dict:
    """What a line says beside its query: copied into its result."""
    from moss_vl.generation_utils import QUEUE_KEYS

    own = {*QUEUE_KEYS, "media", "conversations", "index", "text", "error"}
    return {name: value for name, value in query.items() if name not in own}


def with_media(query: dict, args) -> dict:
    """The query of a line for `offline_batch_generate`: `media` as messages, paths relative to the file they stand in."""
    query = {name: value for name, value in query.items() if value is not None}
    for name in ("media_kwargs", "generate_kwargs"):
        if not isinstance(query.get(name, {}), dict):
            raise ValueError(f"{name} must be an object, got {shorten(query[name])}")
    folder, allow_http = (
        args.batch.parent,
        args.allow_http or bool((query.get("media_kwargs") or {}).get("allow_http")),
    )
    if "conversations" in query:
        if clash := [name for name in ("messages", "prompt", "media") if query.get(name, "") != ""]:
            raise ValueError(f"a query has conversations or {clash[0]}, got both")
        query["messages"] = turns_of("conversations", query.pop("conversations"))
    elif "messages" in query:
        query["messages"] = turns_of("messages", query["messages"])
    if "prompt" not in query and "messages" not in query and args.prompt is not None:
        query["prompt"] = args.prompt

    def located(kind, medium):
        medium = locate(kind, medium, folder)
        check_http(read_medium(kind, medium)[0], allow_http)
        return medium

    for kind in SOURCE_KEYS:
        if (media := query.get(f"{kind}s")) is not None:
            query[f"{kind}s"] = (
                [located(kind, one) for one in media] if isinstance(media, list) else located(kind, media)
            )
    if "media" in query:
        if clash := [name for name in ("messages", "images", "videos") if name in query]:
            raise ValueError(f"a query has media or {clash[0]}, got both")
        media = query.pop("media")
        query["messages"] = user_turn(
            media if isinstance(media, list) else [media], query.pop("prompt", None), allow_http, folder
        )
    elif "messages" in query:
        messages = read_messages(query["messages"], "messages")
        while messages and messages[-1]["role"] == "assistant":  # the answer, in a training record
            messages.pop()
        if not messages:
            raise ValueError("the messages are the assistant's alone; expected a question before the answer")
        for part in [
            part for message in messages if isinstance(message.get("content"), list) for part in message["content"]
        ]:
            kind = part["type"]
            if kind != "text" and kind in part:
                part[kind] = located(kind, part[kind])
        query["messages"] = messages
    return query


def turns_of(name: str, given) -> list:
    """`messages` or `conversations` of a training record, {"from", "value"} or {"role", "content"} each, as messages."""
    if not isinstance(given, list) or not all(isinstance(turn, dict) for turn in given):
        either = "{'role', 'content'} or {'from', 'value'}"
        raise ValueError(f"{name} must be a list of turns, {either} each; got {shorten(given)}")
    turns = []
    for turn in given:
        if turn.get("from") is not None:
            if clash := [key for key in ("role", "content") if turn.get(key) is not None]:
                raise ValueError(
                    f"{name}: a turn has from and value or role and content, got from and {clash[0]} in {shorten(turn)}"
                )
            others = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
            turn = {"role": turn["from"], "content": turn.get("value"), **others}
        turns.append(dict(turn))
    for turn in turns:
        if isinstance(turn.get("role"), str):
            turn["role"] = ROLES.get(turn["role"], turn["role"])
    return turns


if __name__ == "__main__":
    sys.exit(main())
