"""A stream of frames, one per call, into a cache:

    python benchmarks/stream.py --json stream.json

First with a window: after each frame the oldest one is dropped, as in two hours of video at one frame per second.
Memory should be flat, and the last frames should take the time of the first. The text of a stream grows, also if
frames are dropped. So at `--roll` text tokens the stream starts anew, as a session does: a new cache, prefilled with
the frames of the window and their text. Frames are compared between the first and the last such round, and the call
that starts a round is reported apart. With `--roll 0` one cache takes the whole stream.

Then without a window: the part of a call that is due to its frame (its encoding, its keys and values, and copies of
the cache) should not grow with the cache. It is the time of the call minus that of a call of as many words.

The weights are random. Times on a CPU are processor seconds.
"""

import argparse
import gc
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import DynamicCache


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moss_vl.benchmarks.measuring import Clock, machine, table, write_json
from moss_vl.benchmarks.random_models import PAD, WORDS, add_model_flags, make_config
from moss_vl.modeling_moss_vl import CACHE, MossVLForConditionalGeneration


class Stream:
    """Frames of `side` x `side` pixels with `tokens` text tokens each, given to a model one by one."""

    def __init__(self, model, args):
        self.model, self.args = model, args
        self.generator = torch.Generator().manual_seed(0)
        self.columns = args.side // 16
        self.cache = DynamicCache()
        self.recent: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=args.window)

    def seconds(self, call: Callable) -> float:
        """Seconds of a call on a GPU, or processor seconds of this process, which do not depend on other processes."""
        if self.args.device.startswith("cuda"):
            return Clock(self.args.device).time(call)
        begin = time.process_time()
        call()
        return time.process_time() - begin

    def next_frame(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Text [T] and pixels [P, values] of a frame."""
        ids = torch.randint(0, WORDS, (self.args.tokens,), generator=self.generator)
        ids[-1] = PAD
        pixels = torch.randn(self.columns**2, 768, generator=self.generator)
        return ids.to(self.args.device), pixels.to(self.args.device, getattr(torch, self.args.dtype))

    def give(self, *frames: tuple[torch.Tensor, torch.Tensor]) -> float:
        """Appends frames to the cache in one call. Returns its seconds."""
        ids, pixels = (torch.cat(parts) for parts in zip(*frames, strict=True))
        grid = [[1, self.columns, self.columns]] * len(frames)
        inputs = {"pixel_values": pixels, "grid_thw": grid, CACHE: self.cache, "logits_to_keep": 1}
        return self.seconds(lambda: self.model(ids[None], **inputs))

    def append(self) -> float:
        """Appends the next frame and drops those beyond the window. Returns the seconds of both."""
        frame = self.next_frame()
        self.recent.append(frame)
        seconds = self.give(frame)
        return seconds + self.seconds(lambda: self.drop(self.args.window))

    def drop(self, window: int) -> None:
        self.model.drop_frames(self.cache, max(0, self.model.cache_contents(self.cache).frames[0] - window))

    def start_anew(self) -> float:
        self.cache = DynamicCache()
        return self.give(*self.recent)

    def say(self) -> float:
        """The seconds of a call of as many words as a frame has text tokens; the cache is not changed."""
        ids = torch.randint(0, WORDS, (1, self.args.tokens), generator=self.generator).to(self.args.device)
        seconds = self.seconds(lambda: self.model(ids, **{CACHE: self.cache}, logits_to_keep=1))
        self.cache.crop(-self.args.tokens)
        return seconds


def allocated_bytes(device: str) -> int:
    """Bytes of all tensors on a GPU, or resident bytes of this process."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated()
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return 4096 * pages


def slope(points: list[tuple[float, float]]) -> float:
    """The slope of the least-squares line through points (x, y)."""
    if len(points) < 2:
        return float("nan")
    xs, ys = zip(*points, strict=True)
    return statistics.linear_regression(xs, ys).slope


@torch.no_grad()
def with_window(model, args) -> dict:
    """Seconds of the frames in each round, and bytes at the end of each."""
    stream = Stream(model, args)
    while len(stream.recent) < args.window:
        stream.recent.append(stream.next_frame())
    stream.start_anew()
    size = 0 if args.roll else args.frames // 8  # without rounds, the first and the last eighth are compared
    rounds, starts, held, resident, seconds = [], [], [], [], []
    for number in range(args.frames):
        seconds.append(stream.append())
        full = args.roll and stream.cache.get_seq_length() + args.tokens > args.roll
        if full or (size and len(seconds) == size):
            rounds.append(seconds)
            seconds = []
            held.append((number, model.cache_contents(stream.cache).vision_bytes))
            resident.append((number, allocated_bytes(args.device)))
            if full:
                starts.append(stream.start_anew())
    contents = model.cache_contents(stream.cache)
    return {
        "frames": args.frames,
        "window": args.window,
        "vision tokens": contents.vision_tokens[0],
        "dropped": contents.dropped[0],
        "rounds": len(rounds),
        "frame, first": statistics.median(rounds[0]),
        "frame, last": statistics.median(rounds[-1]),
        "start of a round": statistics.median(starts) if starts else None,
        "vision bytes": contents.vision_bytes,
        "vision slope": slope(held),
        "memory": resident[-1][1],
        "memory slope": slope(resident[len(resident) // 4 :]),  # allocators settle in the first quarter
    }


@torch.no_grad()
def without_window(model, args) -> list[dict]:
    """For growing caches: seconds of a call with a frame, and of one without."""
    args = argparse.Namespace(**{**vars(args), "window": args.most})
    stream, rows, frames, copied = Stream(model, args), [], 0, 0
    layer = model.config.text_config.cross_attention_layers[0]
    for target in args.lengths:
        calls, words = [], []
        while frames < target:
            before = stream.cache.layers[layer].keys if frames else None
            seconds = stream.append()
            frames += 1
            if before is not None and stream.cache.layers[layer].keys is not before:
                copied += before.shape[2]
            if frames > target - args.calls:
                calls.append(seconds)
                words.append(stream.say())
        tokens = model.cache_contents(stream.cache).vision_tokens[0]
        rows.append(
            {
                "frames": frames,
                "vision tokens": tokens,
                "with a frame": statistics.median(calls),
                "words alone": statistics.median(words),
                "copied per token": copied / tokens,
            }
        )
    return rows


def window_table(row: dict) -> str:
    first, last = row["frame, first"], row["frame, last"]
    start = row["start of a round"]
    lines = [
        ("frames", f"{row['frames']:,}, in {row['rounds']} rounds, {row['window']} in the window"),
        ("frame in the first round", f"{1e3 * first:.2f} ms"),
        ("frame in the last round", f"{1e3 * last:.2f} ms, {last / first:.3f} of the first"),
        ("start of a round", "none" if start is None else f"{1e3 * start:.0f} ms"),
        ("vision cache at the end", f"{row['vision bytes'] / 1e6:.2f} MB, {row['vision slope']:+.1f} bytes per frame"),
        ("memory at the end", f"{row['memory'] / 1e6:.0f} MB, {row['memory slope']:+.0f} bytes per frame"),
    ]
    return table(("with a window", ""), lines)


def growth_table(rows: list[dict]) -> str:
    lines = [
        (
            f"{row['frames']:,}",
            f"{row['vision tokens']:,}",
            *(f"{1e3 * row[name]:.2f}" for name in ("with a frame", "words alone")),
            f"{1e3 * (row['with a frame'] - row['words alone']):.2f}",
            f"{row['copied per token']:.1f}",
        )
        for row in rows
    ]
    head = ("frames", "vision tokens", "call with a frame, ms", "of words alone, ms", "difference, ms")
    return table((*head, "tokens copied per token"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.set_defaults(width=256, heads=4, vision_depth=4, vision_width=128)
    parser.add_argument(
        "--frames", type=int, default=7200, help="frames of the stream with a window, after it is full"
    )
    parser.add_argument("--window", type=int, default=120, help="frames")
    parser.add_argument("--side", type=int, default=128, help="pixels per side of a frame, a multiple of 32")
    parser.add_argument("--tokens", type=int, default=15, help="text tokens per frame")
    parser.add_argument("--roll", type=int, default=8192, help="text tokens at which the stream starts anew; 0: never")
    parser.add_argument("--lengths", type=int, nargs="*", default=[100, 400, 1600], help="frames without a window")
    parser.add_argument("--calls", type=int, default=50, help="calls at each length; their median counts")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    args.most = max(args.lengths, default=1)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = MossVLForConditionalGeneration(make_config(args)).eval().to(args.device, getattr(torch, args.dtype))
    result = {
        "machine": machine(args.device, args.threads),
        "options": {k: v for k, v in vars(args).items() if k != "json"},
    }
    print(result["machine"])
    if args.frames:
        result["window"] = with_window(model, args)
        print(f"\n{window_table(result['window'])}")
    if args.lengths:
        result["growth"] = without_window(model, args)
        print(f"\n{growth_table(result['growth'])}")
    write_json(args.json, result)


if __name__ == "__main__":
    main()
