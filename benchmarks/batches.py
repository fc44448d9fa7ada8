"""Many queries at once, beside padded batches and beside each query alone.

    python benchmarks/batches.py --json batches.json

Eight queries of text, images, a video and a long text, through a checkpoint with random answers. Compares, in
alternating rounds of one run, seconds of wall clock and of all CPU cores:
  padded       the same queries in left-padded batches, one `generate` call for all with equal options
  batch        `offline_batch_generate`
  stream       `stream_batch`
  alone        `offline_batch_generate` for each query
for answers of one token ("prefill"), answers of one length ("equal") and of several lengths ("mixed"); and ten
questions about one video, whose state is given:
  cold         the state without its cache
  kept         the state with its cache
"first piece" is the time to the first piece of text, whichever query it belongs to.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moss_vl.benchmarks.end_to_end import NANO, load
from moss_vl.benchmarks.measuring import ROOT, alternate, machine, spread, summary, table, write_json
from moss_vl.benchmarks.random_models import add_model_flags
from moss_vl.processing_moss_vl import MossVLProcessor


VIDEO, IMAGES = (
    str(ROOT / "data/example_video.mp4"),
    [str(ROOT / f"data/{name}.jpg") for name in ("sample_a", "example_image")],
)


def mixed_queries(tokens: int, options: str, longest_edge: int) -> list[dict]:
    """Eight queries. With `options` "equal" all answers have `tokens` tokens; with "mixed" they have from a quarter of
    that to all; with "prefill" one."""
    lengths = {
        "prefill": [1] * 8,
        "equal": [tokens] * 8,
        "mixed": [max(1, tokens * k // 8) for k in (8, 2, 3, 8, 4, 2, 6, 3)],
    }[options]
    media = [{}, {"images": IMAGES[:1]}, {"images": IMAGES}, {"videos": [VIDEO]}, {}, {"images": IMAGES[:1]}, {}, {}]
    read = "There is a circle on the left, and a square moves past it. " * 12
    return [
        {
            "prompt": f"{read if number == 4 else ''}What happens in number {number}?",
            **medium,
            "media_kwargs": {"max_pixels": longest_edge},
            "generate_kwargs": {"max_new_tokens": length, "min_new_tokens": length},
        }
        for number, (medium, length) in enumerate(zip(media, lengths, strict=True))
    ]


PARTS = ("prefill", "equal", "mixed", "questions")


class Timer:
    """Seconds of wall clock and of all CPU cores of a call."""

    def __init__(self, device: str):
        self.device = device

    def __call__(self, call: Callable[[], dict | None]) -> dict[str, float]:
        start, cpu = time.perf_counter(), time.process_time()
        parts = call() or {}
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu, **parts}


@torch.no_grad()
def padded(model, processor, queries: list[dict]) -> None:
    """One left-padded batch for all queries with equal options of `generate`."""
    groups = {}
    for query in queries:
        groups.setdefault(tuple(query["generate_kwargs"].items()), []).append(query)
    for options, group in groups.items():
        chats = [
            [{"type": kind, kind: medium} for kind in ("image", "video") for medium in query.get(f"{kind}s", ())]
            + [{"type": "text", "text": query["prompt"]}]
            for query in group
        ]
        inputs = processor.apply_chat_template(
            [[{"role": "user", "content": parts}] for parts in chats],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            padding=True,
            return_tensors="pt",
            processor_kwargs={**group[0]["media_kwargs"], "video_fps": 1.0, "do_normalize": False},
        )
        model.generate(**inputs.to(model.device), **dict(options), do_sample=False)


def streamed(model, processor, queries: list[dict], rows: int, states=None) -> dict[str, float]:
    start, first = time.perf_counter(), None
    for _ in model.stream_batch(processor, queries, states, batch_size=rows):
        first = time.perf_counter() - start if first is None else first
    return {"first piece": first}


def measure(model, processor, args) -> dict:
    timer, seconds = Timer(args.device), {}
    for options in [part for part in args.parts if part != "questions"]:
        queries = mixed_queries(args.tokens, options, args.longest_edge)

        def alone(queries=queries) -> None:
            for query in queries:
                model.offline_batch_generate(processor, [query])

        calls = {
            "padded": lambda queries=queries: timer(lambda: padded(model, processor, queries)),
            "batch": lambda queries=queries: timer(lambda: drop(model.offline_batch_generate(processor, queries))),
            "stream": lambda queries=queries: timer(lambda: streamed(model, processor, queries, 8)),
            "alone": lambda alone=alone: timer(alone),
        }
        seconds[options] = alternate(calls, args.rounds)
        print(report(args.dtype, {options: seconds[options]}), flush=True)
    if "questions" not in args.parts:
        return seconds
    ask = {"prompt": "When?", "videos": [VIDEO], "generate_kwargs": {"max_new_tokens": 8}}
    [state] = model.offline_batch_generate(processor, [ask], keep_cache=True)["session_states"]
    questions = [
        {"prompt": f"And {n}?", "generate_kwargs": {"max_new_tokens": 8, "min_new_tokens": 8}} for n in range(10)
    ]
    states = {"cold": [dict(state)] * 10, "kept": [state] * 10}
    calls = {
        name: lambda given=given: timer(lambda: streamed(model, processor, questions, 10, given))
        for name, given in states.items()
    }
    seconds["questions"] = alternate(calls, args.rounds)
    return seconds


def drop(result) -> None:
    """Discards what a call returned."""


def report(name: str, seconds: dict) -> str:
    lines = []
    for part, calls in seconds.items():
        base = summary(next(iter(calls.values()))["cpu"])["median"]
        for call, parts in calls.items():
            lines.append(
                (
                    f"{name}, {part}, {call}",
                    spread(parts["wall"]),
                    spread(parts["cpu"]),
                    f"{base / summary(parts['cpu'])['median']:.2f}",
                    spread(parts["first piece"]) if "first piece" in parts else "",
                )
            )
    return table(("", "wall clock, s", "CPU, s", "times as fast as the first", "first piece, s"), lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("shipped", "random"), default=["shipped"])
    parser.add_argument("--tokens", type=int, default=64, help="tokens of the longest answers")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--longest-edge", type=int, default=224 * 224, help="most pixels per image or frame")
    add_model_flags(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    result = {"machine": machine(args.device, args.threads), "dtype": args.dtype, "seconds": {}}
    print(result["machine"], flush=True)
    processor = MossVLProcessor.from_pretrained(NANO)
    for name in args.models:
        model = load(name, args)
        result["seconds"][name] = measure(model, processor, args)
        write_json(args.json, result)
        print(report(name, result["seconds"][name]))


if __name__ == "__main__":
    main()
