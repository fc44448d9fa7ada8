"""Asks a MOSS-VL checkpoint about images and videos from the command line."""

import argparse
import os
import sys
from pathlib import Path

from moss_vl.tools.batch_answers import answer, answer_many
from moss_vl.tools.command_line import above_0, at_least, message_of, share
from moss_vl.tools.live import add_live_arguments, check_live_usage, watch
from moss_vl.tools.query_files import MediaReader
from moss_vl.tools.query_options import add_arguments, check_frame_options
from moss_vl.tools.ray_batches import add_ray_arguments, check_ray_usage


NANO = Path(__file__).resolve().parent / "checkpoints" / "moss-vl-nano"
EPILOG = """\
examples:
  python infer.py photo.jpg -p "What does the sign say?"
  python infer.py clip.mp4 -p "What happens?" --frames 16
  python infer.py before.jpg after.jpg clip.mp4 -p "Which picture shows the end of the clip?"
  python infer.py --allow-http https://example.com/photo.jpg -p "What does the sign say?"
  python infer.py --batch queries.jsonl --out results.jsonl
  python infer.py --batch queries.jsonl --out results.jsonl --ray
  python infer.py --checkpoint REALTIME --live camera -p "Tell me when someone comes in."

Images and videos are paths, file: or data: URLs, or, with --allow-http, http(s): URLs.

queries.jsonl has a JSON object per line, or is a JSON list of such objects. The keys are those of a query of
`offline_batch_generate` (prompt or messages, images, videos, media_kwargs, generate_kwargs, ...), and
  "media": ["a.jpg", "b.mp4"]   in place of images and videos: images and videos mixed, in order
Any other key ("id", "label", ...) is copied into the result. Training records are queries, too: their `conversations`
are the messages, and the turns of the assistant at the end are left out.
Relative paths start at the folder of queries.jsonl. A line overrides the options of the command line.
results.jsonl gets a line per query, in the order of the queries: {"index": 0, "id": ..., "text": ...}, or "error" in
place of "text". Results that are known before earlier ones wait in results.jsonl.early, until the run ends. The same
command continues an interrupted run, with --ray or without. To repeat failed queries, give another --out.

exit codes: 0 all answered, 1 some queries of a batch failed, 2 wrong usage or input, 130 interrupted
"""


def main(argv=None) -> int:
    """Runs the command and returns its exit code. An error is one line on stderr."""
    args = parse(argv)
    try:
        if args.live is not None:
            return watch(args, load)
        return answer_many(args, load) if args.batch is not None else answer_one(args)
    except KeyboardInterrupt:
        return fail("interrupted" if args.batch is None else "interrupted; run the same command to continue", 130)
    except BrokenPipeError:  # the reader of stdout is gone; the flush at exit must not fail again
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


# the command line


def parse(argv) -> argparse.Namespace:
    """The arguments of the command line. Wrong usage exits with code 2."""
    parser = argparse.ArgumentParser(
        prog="infer.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_question(parser)
    _add_batch(parser.add_argument_group("many queries"))
    add_live_arguments(parser.add_argument_group("live"))
    _add_media(parser.add_argument_group("media"))
    _add_answering(parser.add_argument_group("answering"))
    add_running_arguments(parser.add_argument_group("running"))
    args = parser.parse_intermixed_args(argv)
    _check_usage(parser, args)
    return args


def _add_question(parser) -> None:
    parser.add_argument("media", nargs="*", help="images and videos, in the order in which the model gets them")
    parser.add_argument("-p", "--prompt", help="question about them (default: empty)")
    add_checkpoint_argument(parser)


def add_checkpoint_argument(parser, note: str = "") -> None:
    """The option --checkpoint, which an installed package needs: it comes without the small checkpoint."""
    has_nano = NANO.is_dir()
    default = " (default: checkpoints/moss-vl-nano)" if has_nano else ""
    parser.add_argument(
        "--checkpoint",
        default=str(NANO) if has_nano else None,
        required=not has_nano,
        help=f"folder or hub name of a checkpoint{default}{note}",
    )


def _add_batch(group) -> None:
    group.add_argument("--batch", metavar="QUERIES.JSONL", type=Path, help="answer the queries of this file")
    group.add_argument("--out", metavar="RESULTS.JSONL", type=Path, help="file of the answers, each added when ready")
    group.add_argument(
        "--batch-size",
        metavar="N",
        type=at_least(int, 1),
        help="most answers that a model writes at once; with --seed always one (default: 8)",
    )
    add_ray_arguments(group)


def _add_media(group) -> None:
    group.add_argument(
        "--frames",
        metavar="N",
        type=at_least(int, 1),
        help="take N frames of each video, spread over it; with --fps, at most N of all videos of a query",
    )
    group.add_argument(
        "--fps",
        metavar="RATE",
        type=above_0,
        help="take RATE frames per second of video (default: the checkpoint's setting, mostly 1)",
    )
    group.add_argument(
        "--min-pixels",
        metavar="N",
        type=at_least(int, 1),
        help="least pixels of an image or frame after its resize; smaller ones are enlarged",
    )
    group.add_argument(
        "--max-pixels", metavar="N", type=at_least(int, 1), help="most pixels of an image or frame after its resize"
    )
    group.add_argument(
        "--allow-http", action="store_true", help="download images and videos from http: and https: URLs"
    )
    group.add_argument(
        "--allow-private-hosts",
        action="store_true",
        help="download from private, loopback, link-local and reserved addresses too",
    )


def _add_answering(group) -> None:
    group.add_argument(
        "--max-new-tokens",
        metavar="N",
        type=at_least(int, 1),
        default=1024,
        help="most tokens of an answer (default: 1024)",
    )
    group.add_argument(
        "--temperature", metavar="T", type=at_least(float, 0), default=0.0, help="above 0: sample (default: 0, greedy)"
    )
    group.add_argument(
        "--top-p",
        metavar="P",
        type=share,
        help="sample from the likeliest tokens with a total probability of P (default: 1)",
    )
    group.add_argument(
        "--top-k",
        metavar="K",
        type=at_least(int, 0),
        help="sample from the K likeliest tokens, 0: from all (default: 50)",
    )
    group.add_argument("--repetition-penalty", metavar="R", type=above_0, help="above 1: repeat less (default: 1)")
    group.add_argument("--seed", metavar="N", type=int, help="make sampling repeatable")
    group.add_argument(
        "--template",
        action=argparse.BooleanOptionalAction,
        help="render the chat template, or not (default: if there is one)",
    )
    group.add_argument("--system", metavar="TEXT", help="system prompt")
    group.add_argument(
        "--thinking", choices=("no_thinking", "deep_thinking"), help="ask for the answer, or for reasoning and answer"
    )


def add_running_arguments(group) -> None:
    """The options that `load` reads, apart from the checkpoint."""
    group.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, mps, npu, ... (default: auto, all accelerators if there are any, else cpu)",
    )
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="default: auto, the dtype of the checkpoint",
    )
    group.add_argument("--attn", choices=("eager", "sdpa", "flash_attention_2"), help="attention (default: sdpa)")


def _check_usage(parser, args) -> None:
    """Exits if arguments are missing or contradict each other."""
    check_live_usage(parser, args)
    if args.batch is None and args.live is None and not args.media and args.prompt is None:
        parser.error("nothing to do: give images or videos, a prompt (-p), --batch or --live")
    if args.batch is None:
        for name in ("out", "batch_size", "ray"):
            if getattr(args, name) is not None:
                parser.error(f"--{name.replace('_', '-')} goes with --batch")
    if args.batch is not None and args.out is None:
        parser.error("--batch needs --out")
    if args.batch is not None and args.media:
        parser.error("with --batch, images and videos are named in its lines")
    check_ray_usage(parser, args)
    if args.batch is None and args.live is None and not args.media:
        for name in ("frames", "fps", "min_pixels", "max_pixels"):
            if getattr(args, name) is not None:
                parser.error(f"--{name.replace('_', '-')} has no effect without images and videos")
    if args.temperature == 0 and args.batch is None:  # a line of a batch may have a temperature
        for name in ("top_p", "top_k", "seed"):
            if getattr(args, name) is not None:
                parser.error(f"--{name.replace('_', '-')} is for sampling; give a --temperature above 0")


# answering


def load(args):
    """(processor, model) of `args.checkpoint`, on `args.device`.

    Raises:
        ValueError: for a device that torch does not have.
        OSError: for a missing checkpoint, and for a cache of downloads that cannot be written to.
    """
    import torch
    from transformers.utils import logging

    from moss_vl.modeling_moss_vl import MossVLForConditionalGeneration
    from moss_vl.processing_moss_vl import MossVLProcessor

    logging.disable_progress_bar()
    try:
        device = None if args.device == "auto" else torch.device(args.device)
    except RuntimeError as error:
        raise ValueError(f"--device {args.device}: {error}") from error
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is not None and device.type not in ("cpu", accelerator and accelerator.type):
        raise ValueError(f"--device {args.device}: this torch finds no {device.type.upper()} device")
    if not Path(args.checkpoint).exists() and (args.checkpoint == str(NANO) or args.checkpoint.count("/") != 1):
        raise FileNotFoundError(f"no such checkpoint folder: {args.checkpoint}")

    options = {"device_map": "auto"} if device is None and accelerator is not None else {}
    if args.attn is not None:
        options["attn_implementation"] = args.attn
    try:
        processor = MossVLProcessor.from_pretrained(args.checkpoint)
        model = MossVLForConditionalGeneration.from_pretrained(args.checkpoint, dtype=args.dtype, **options)
    except OSError as error:
        if not os.path.exists(args.checkpoint):
            check_cache(error)
        raise
    return processor, model if device is None else model.to(device)


def check_cache(cause: OSError) -> None:
    """Raises OSError, with the variable to set, if a download failed because its folder cannot be written to.

    Args:
        cause: the error of loading.
    """
    import tempfile

    from huggingface_hub.constants import HF_HUB_CACHE

    if all(getattr(error, "errno", None) is None for error in (cause, cause.__cause__)):
        return  # an error of the libraries, not of a file system
    try:
        os.makedirs(HF_HUB_CACHE, exist_ok=True)
        tempfile.TemporaryFile(dir=HF_HUB_CACHE).close()
    except OSError as error:
        reason = f"the folder for downloaded checkpoints, cannot be written to: {error.strerror or error}"
        raise OSError(f"{HF_HUB_CACHE}, {reason}; set HF_HUB_CACHE or HF_HOME to a folder that can be") from cause


def answer_one(args) -> int:
    """Prints the answer while it is generated."""
    messages = MediaReader(args.allow_http, allow_private_hosts=args.allow_private_hosts).user_turn(
        args.media, args.prompt
    )
    check_frame_options(args, messages)
    processor, model = load(args)
    query = add_arguments(args, {"messages": messages}, processor)
    from transformers import TextStreamer

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # the terminal's encoding may lack a character
    query["generate_kwargs"]["streamer"] = TextStreamer(
        processor.tokenizer, skip_prompt=True, skip_special_tokens=True
    )
    answer(processor, model, query, args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
