"""Asks a MOSS-VL checkpoint about images and videos from the command line."""

import argparse
import json
import os
import sys
from pathlib import Path


NANO = Path(__file__).resolve().parent / "checkpoints" / "moss-vl-nano"
EPILOG = """\
examples:
  python infer.py photo.jpg -p "What does the sign say?"
  python infer.py clip.mp4 -p "What happens?" --frames 16
  python infer.py before.jpg after.jpg clip.mp4 -p "Which picture shows the end of the clip?"
  python infer.py --batch queries.jsonl --out results.jsonl

queries.jsonl has a JSON object a line, with the keys of a query of `offline_batch_generate` (prompt or messages, images,
videos, media_kwargs, generate_kwargs, ...), and
  "media": ["a.jpg", "b.mp4"]   instead of images and videos: any files, in their order
  "id": ...                     copied into the result
Paths are relative to queries.jsonl. The options given here hold for every line that does not say otherwise.
results.jsonl gets a line a query, in their order: {"index": 0, "id": ..., "text": ...}, or "error" in place of "text". Lines
that are there already are kept, and the run goes on after them; to try failed queries again, give another --out.

exit codes: 0 all answered, 1 some queries of a batch failed, 2 wrong usage or input, 130 interrupted
"""
# Knobs that are the checkpoint's own where no option names them (None), not the defaults of the offline methods.
CHECKPOINT_KNOBS = dict.fromkeys((
    "min_pixels", "max_pixels", "multi_image_max_pixels", "video_max_pixels", "video_fps", "min_frames", "max_frames",
    "num_extract_threads",
))  # fmt: skip


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


# ---------------------------------------------------------------------------------------------------------- the command line


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="infer.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("media", nargs="*", help="images and videos, in the order in which the model sees them")
    parser.add_argument("-p", "--prompt", help="what is asked about them (default: nothing, the model just goes on)")
    parser.add_argument("--checkpoint", default=str(NANO), help="folder or hub name of a checkpoint (default: checkpoints/moss-vl-nano)")

    many = parser.add_argument_group("many queries")
    many.add_argument("--batch", metavar="QUERIES.JSONL", type=Path, help="answer the queries of this file")
    many.add_argument("--out", metavar="RESULTS.JSONL", type=Path, help="where the answers go, each as it is ready")

    seeing = parser.add_argument_group("seeing")
    seeing.add_argument("--frames", metavar="N", type=at_least(int, 1),
                        help="look at N frames of a video, spread over it; with --fps, at most N")  # fmt: skip
    seeing.add_argument("--fps", metavar="RATE", type=above_0, help="look at RATE frames a second (default: the checkpoint's, mostly 1)")
    seeing.add_argument("--min-pixels", metavar="N", type=at_least(int, 1),
                        help="fewest pixels of an image or frame after its resize; smaller ones are enlarged")  # fmt: skip
    seeing.add_argument("--max-pixels", metavar="N", type=at_least(int, 1), help="most pixels of an image or frame after its resize")

    saying = parser.add_argument_group("answering")
    saying.add_argument("--max-new-tokens", metavar="N", type=at_least(int, 1), default=1024, help="longest answer (default: 1024)")
    saying.add_argument("--temperature", metavar="T", type=at_least(float, 0), default=0.0, help="above 0: sample (default: 0, greedy)")
    saying.add_argument("--top-p", metavar="P", type=share, help="sample from the likeliest tokens that make up P (default: 1)")
    saying.add_argument("--top-k", metavar="K", type=at_least(int, 0), help="sample from the K likeliest tokens, 0: from all (default: 50)")
    saying.add_argument("--repetition-penalty", metavar="R", type=above_0, help="above 1: repeat less (default: 1)")
    saying.add_argument("--seed", metavar="N", type=int, help="make sampling repeatable")
    saying.add_argument("--template", action=argparse.BooleanOptionalAction,
                        help="render the chat template, or not (default: if there is one)")  # fmt: skip
    saying.add_argument("--system", metavar="TEXT", help="system prompt")
    saying.add_argument("--thinking", choices=("no_thinking", "deep_thinking"), help="ask for the answer, or for reasoning and answer")

    running = parser.add_argument_group("running")
    running.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto, all GPUs if there are any, else cpu)")
    running.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                         help="default: auto, the checkpoint's")  # fmt: skip
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


# ----------------------------------------------------------------------------------------------------- from options to a query


def query_from(args, query: dict, processor) -> dict:
    """The query with the options of the command line where it says nothing."""
    own = processor.video_processor
    limits = {"min_pixels": args.min_pixels, "max_pixels": args.max_pixels}
    frames = {**limits, "video_fps": args.fps}
    if args.frames is not None:
        frames |= {"min_frames": min(args.frames, own.min_frames), "max_frames": args.frames}
        if args.fps is None:
            frames |= {"num_frames": args.frames, "max_frames": max(args.frames, own.max_frames)}
    media_kwargs = query.get("media_kwargs") or {}
    if {"video_fps", "num_frames"} & media_kwargs.keys():  # its own rate or number of frames, in place of ours
        frames = limits
    sampling = {"temperature": args.temperature, "do_sample": args.temperature > 0, "max_new_tokens": args.max_new_tokens}
    options = {name: getattr(args, name) for name in ("top_p", "top_k", "repetition_penalty") if getattr(args, name) is not None}
    chosen = {"use_template": args.template, "system_prompt": args.system, "thinking_mode": args.thinking}
    return {
        **chosen,
        **query,
        "media_kwargs": {**CHECKPOINT_KNOBS, **frames, **media_kwargs},
        "generate_kwargs": {**sampling, **options, **(query.get("generate_kwargs") or {})},
    }


def user_turn(files: list, prompt) -> list:
    """Messages that show the files in their order, then ask."""
    media = [(media_kind(file), str(file)) for file in files]
    content = [{"type": kind, kind: file} for kind, file in media]
    return [{"role": "user", "content": [*content, {"type": "text", "text": prompt or ""}]}]


def media_kind(path) -> str:
    """"image" for what Pillow opens, animated GIFs apart, else "video". Raises for what can be neither."""
    from PIL import Image

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if not path.is_file() or path.stat().st_size == 0:
        raise ValueError(f"{path} is {'empty' if path.is_file() else 'not a file'}; expected an image or a video")
    try:
        with Image.open(path) as image:
            return "video" if image.format == "GIF" and image.is_animated else "image"
    except Image.DecompressionBombError:
        return "image"  # the processor says what is wrong with it
    except (OSError, ValueError, SyntaxError):
        return "video"


# ---------------------------------------------------------------------------------------------------------------- answering


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
    processor = AutoProcessor.from_pretrained(args.checkpoint, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, trust_remote_code=True, dtype=args.dtype, **options)
    return processor, model if device is None else model.to(device)


def answer_one(args) -> int:
    """Prints the answer as it comes."""
    messages = user_turn(args.media, args.prompt)
    processor, model = load(args)
    query = query_from(args, {"messages": messages}, processor)
    from transformers import TextStreamer

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character
    query["generate_kwargs"]["streamer"] = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer(processor, model, query, args.seed)
    return 0


def answer(processor, model, query: dict, seed) -> str:
    import torch

    if seed is not None:
        torch.manual_seed(seed)
    return model.offline_batch_generate(processor, [query])["results"][0]["text"]


def answer_many(args) -> int:
    """Answers the lines of `args.batch` one by one into `args.out`, after those that are there."""
    lines = [line for line in args.batch.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    if args.out.resolve() == args.batch.resolve():
        raise ValueError(f"--out is the file of the queries, {args.batch}; name another one")
    done, failed = finished(args.out, lines)
    left = lines[done:]
    if left:
        with open(args.out, "a", encoding="utf-8") as out:
            failed += answer_lines(args, left, done, len(lines), out)
    print(f"{len(lines)} queries, {failed} failed: {args.out}", file=sys.stderr)
    return 1 if failed else 0


def answer_lines(args, lines: list, done: int, total: int, out) -> int:
    """Writes a result a line; returns how many failed."""
    from tqdm import tqdm

    processor, model = load(args)
    failed = 0
    with tqdm(total=total, initial=done, unit="query", file=sys.stderr) as progress:
        for index, line in enumerate(lines, start=done):
            result = {"index": index}
            try:
                query = parsed(line)
                if "id" in query:
                    result["id"] = query.pop("id")
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
            raise ValueError(f"{out}, line {index + 1}, is no result of these queries; name another --out or move the file away")
        failed += "error" in result
    if whole < len(data):
        os.truncate(out, whole)
    return len(rows), failed


def parsed(line: str) -> dict:
    try:
        query = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"a line must be a JSON object, got {line:.60}: {error}") from None
    if not isinstance(query, dict):
        raise ValueError(f"a line must be a JSON object, got {line:.60}")
    return query


def with_media(query: dict, args) -> dict:
    """The query of a line for `offline_batch_generate`: `media` as messages, paths relative to the file they stand in."""
    query = dict(query)
    if "prompt" not in query and "messages" not in query and args.prompt is not None:
        query["prompt"] = args.prompt
    for name in ("images", "videos", "media"):
        if name in query:
            query[name] = located(query[name], args.batch.parent)
    if "media" in query:
        if clash := [name for name in ("messages", "images", "videos") if name in query]:
            raise ValueError(f"a query has media or {clash[0]}, got both")
        files = query.pop("media")
        query["messages"] = user_turn(files if isinstance(files, list) else [files], query.pop("prompt", None))
    elif isinstance(query.get("messages"), list):
        query["messages"] = [located_parts(message, args.batch.parent) for message in query["messages"]]
    return query


def located_parts(message, folder: Path):
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message

    def part_of(part):
        kind = part.get("type") if isinstance(part, dict) else None
        return {**part, kind: located(part[kind], folder)} if kind in ("image", "video") and kind in part else part

    return {**message, "content": [part_of(part) for part in message["content"]]}


def located(source, folder: Path):
    """A path, a dict with `video_path`, or a list of them, with relative paths taken from `folder`."""
    if isinstance(source, list):
        return [located(one, folder) for one in source]
    if isinstance(source, dict) and "video_path" in source:
        return {**source, "video_path": located(source["video_path"], folder)}
    if isinstance(source, str) and not source.startswith(("data:", "file:", "http:", "https:")):
        return str(folder / source)
    return source


if __name__ == "__main__":
    sys.exit(main())
