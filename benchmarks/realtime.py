"""Realtime sessions: how many frames per second they take in, how fast they write, and how long a decision takes:

    python benchmarks/realtime.py --sessions 1 4 16 --json realtime.json
    python benchmarks/realtime.py --hours 2 --json hours.json

With --sessions, N sessions on one model run live. At a rate, each session gets --fps frames per second, and the delay
of a frame is the time from its push to the decision about it. At most, each session gets its next frame when the last
one is decided. While writing, each session gets one frame and writes a reply without an end; joint steps are compared
with steps that are computed one by one.

With --hours, one stream at 1 fps is run as fast as possible, with its window and its rollovers. Times on a CPU are
those of the process, so that other processes do not count. Memory is that of the process, or of the GPU; its slope is
fitted to the second half.

The weights are those of a checkpoint, to which the tokens of the protocol are added if it has none. What is written is
forced: a reply of --reply tokens after every --every frames, and silence otherwise.
"""

import argparse
import gc
import statistics
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moss_vl.benchmarks.measuring import machine, table, write_json
from moss_vl.configuration_moss_vl import MossVLConfig
from moss_vl.image_processing_moss_vl import MossVLImageProcessor
from moss_vl.modeling_moss_vl import MossVLForConditionalGeneration
from moss_vl.processing_moss_vl import MossVLProcessor
from moss_vl.realtime_protocol import RESPONSE, SILENCE
from moss_vl.video_processing_moss_vl import MossVLVideoProcessor


NANO = Path(__file__).resolve().parents[1] / "checkpoints" / "moss-vl-nano"
DECISIONS = ("Silence", "ResponseBegins", "Text", "ReplyEnds", "SpecialToken")


def load(args):
    """(processor, model) of a checkpoint, with the tokens of the protocol."""
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint, trust_remote_code=True)
    tokenizer.add_tokens([SILENCE, RESPONSE], special_tokens=True)
    size = {"shortest_edge": args.side**2, "longest_edge": args.side**2}
    template = (Path(args.checkpoint) / "chat_template.jinja").read_text(encoding="utf-8")
    processor = MossVLProcessor(
        MossVLImageProcessor(size=size), tokenizer, MossVLVideoProcessor(), chat_template=template
    )
    dtype = getattr(torch, args.dtype)
    if args.layers is None:
        model = MossVLForConditionalGeneration.from_pretrained(args.checkpoint, dtype=dtype)
    else:
        config = MossVLConfig.from_pretrained(args.checkpoint).to_dict()
        config["text_config"] |= {"num_hidden_layers": args.layers, "cross_attention_layers": [1]}
        config["vision_config"] |= {"depth": 2, "deepstack_visual_indexes": [0]}
        model = MossVLForConditionalGeneration(MossVLConfig(**config)).to(dtype)
    model = model.to(args.device).eval()
    if len(tokenizer) > model.config.text_config.vocab_size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return processor, model


class Talk:
    """A logits processor that forces what is written: a reply after every `every`-th frame, else silence."""

    def __init__(self, processor, every: int, reply: int):
        ids = processor.tokenizer.convert_tokens_to_ids
        self.silence, self.response = ids(SILENCE), ids(RESPONSE)
        self.frame_end = ids("<|vision_end|>")
        self.word = processor.tokenizer(" star", add_special_tokens=False)["input_ids"][-1]
        self.every, self.reply = every, reply
        self.frames = 0
        self.left = 0  # tokens of the reply that is being written

    def __call__(self, input_ids, scores):
        if int(input_ids[0, -1]) == self.frame_end:
            self.frames += 1
            if self.frames % self.every == 0 and not self.left:
                self.left = self.reply + 1
                return self.force(scores, self.response)
        if self.left > 1:
            self.left -= 1
            return self.force(scores, self.word)
        self.left = 0
        return self.force(scores, self.silence)

    @staticmethod
    def force(scores, token: int):
        forced = torch.full_like(scores, -float("inf"))
        forced[:, token] = 0
        return forced


class Watched:
    """A live session whose events are timed when they are reported."""

    def __init__(self, model, processor, talk: Talk):
        self.session = model.create_realtime_session(
            processor, max_tokens_per_turn=None, frame_queue_size=16, logits_processor=[talk]
        )
        self.pushed: dict[float, float] = {}  # time of the frame -> when it was pushed
        self.delays: list[float] = []
        self.open: list[float] = []  # frames that were taken in, and not decided about
        self.frames = self.tokens = self.dropped = 0
        self.decided = threading.Event()
        self.session.output.put = self.watch

    def watch(self, events) -> None:
        now = time.perf_counter()
        for event in events:
            name = type(event).__name__
            if name == "FrameTaken":
                self.open.append(event.seconds)
                self.frames += 1
            elif name == "FrameDropped":
                self.dropped += 1
            elif name in DECISIONS:
                self.tokens += 1
                self.delays += [now - self.pushed[seconds] for seconds in self.open]
                if self.open:
                    self.decided.set()
                self.open = []

    def push(self, image, seconds: float) -> None:
        self.pushed[seconds] = time.perf_counter()
        self.session.push_frame(image, seconds)

    def feed(self, images, seconds: float, fps: float | None) -> None:
        """Pushes frames for some seconds: `fps` of them per second, or each when the last one is decided."""
        start = time.perf_counter()
        number = 0
        while time.perf_counter() - start < seconds:
            self.decided.clear()
            self.push(images[number % len(images)], float(number))
            number += 1
            if fps is None:
                self.decided.wait(30)
            else:
                time.sleep(max(0.0, min(number / fps, seconds) - (time.perf_counter() - start)))


def run_sessions(
    args, model, processor, count: int, fps: float | None, writes: bool = False, joint: bool = True
) -> dict:
    """Measures `count` sessions at once.

    Args:
        fps: frames per second of each; None for the next frame after the decision about the last one, 0 for one frame.
        writes: whether replies have no end.
        joint: whether steps that only write share a forward.
    """
    every, reply = (1, 10**9) if writes else (args.every, args.reply)
    fps = 1e-9 if fps == 0 else fps
    images = [
        np.random.default_rng(number).integers(0, 256, (args.side, args.side, 3), dtype=np.uint8)
        for number in range(8)
    ]
    watched = [Watched(model, processor, Talk(processor, every, reply)) for _ in range(count)]
    if not joint:
        watched[0].session.scheduler._joint_logits = lambda streams: None
    for one in watched:
        one.session.start()
    while any(not one.session.stream.parked for one in watched):
        time.sleep(0.01)
    before = sum(one.tokens for one in watched)
    start = time.perf_counter()
    threads = [threading.Thread(target=one.feed, args=(images, args.seconds, fps)) for one in watched]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lived = time.perf_counter() - start
    delays = sorted(delay for one in watched for delay in one.delays)
    result = {
        "frames_per_second": sum(one.frames for one in watched) / lived,
        "tokens_per_second": (sum(one.tokens for one in watched) - before) / lived,
        "dropped": sum(one.dropped for one in watched),
        "delay_median": statistics.median(delays),
        "delay_95": delays[int(0.95 * (len(delays) - 1))],
    }
    for one in watched:
        one.session.close(60)
    return result


def measure_sessions(args, model, processor) -> dict:
    results = {}
    run_sessions(args, model, processor, 1, None)  # warm-up
    for count in args.sessions:
        results[count] = {
            "rate": run_sessions(args, model, processor, count, args.fps),
            "most": run_sessions(args, model, processor, count, None),
            "writing": run_sessions(args, model, processor, count, 0, writes=True),
            "writing, one by one": run_sessions(args, model, processor, count, 0, writes=True, joint=False),
        }
    rows = [
        (
            count,
            way,
            *(f"{found[name]:.1f}" for name in ("frames_per_second", "tokens_per_second")),
            found["dropped"],
            *(f"{1000 * found[name]:.0f}" for name in ("delay_median", "delay_95")),
        )
        for count, ways in results.items()
        for way, found in ways.items()
    ]
    head = ("sessions", "frames", "frames/s", "tokens/s", "dropped", "delay, ms", "95 %, ms")
    print(table(head, rows))
    return results


def measure_hours(args, model, processor) -> dict:
    """One stream of --hours at 1 fps: seconds per frame, and memory, over its length."""
    stream = model.create_realtime_stream(processor, logits_processor=[Talk(processor, args.every, args.reply)])
    total = int(3600 * args.hours)
    images = [
        np.random.default_rng(number).integers(0, 256, (args.side, args.side, 3), dtype=np.uint8)
        for number in range(8)
    ]
    now = time.perf_counter if args.device.startswith("cuda") else time.process_time
    stream.step()
    seconds, resident, texts, rollovers = [], [], [], []
    for number in range(total):
        begin = now()
        stream.push_frame(images[number % len(images)], float(number))
        stream.step()
        seconds.append(now() - begin)  # until the decision
        while not stream.parked:
            rollovers += [number for event in stream.step() if type(event).__name__ == "RolledOver"]
        texts.append(len(stream.ids))
        resident.append(resident_bytes())
        if number % 600 == 599:
            print(f"{number + 1} frames, {resident[-1] / 1e6:.0f} MB, {len(rollovers)} rollovers", file=sys.stderr)
    # Compare whole periods between rollovers: within a period the text grows, and a step takes longer.
    first = slice(rollovers[0] + 1, rollovers[1] + 1)
    last = slice(rollovers[-2] + 1, rollovers[-1] + 1)
    half = total // 2
    slope = np.polyfit(np.arange(half, total), np.array(resident[half:], float), 1)[0]
    result = {
        "frames": total,
        "rollovers": len(rollovers),
        "seconds_first": statistics.median(seconds[first]),
        "seconds_last": statistics.median(seconds[last]),
        "resident_first": statistics.median(resident[first]),
        "resident_last": statistics.median(resident[last]),
        "bytes_per_frame": slope,
        "most_text": max(texts),
    }
    ratio = result["seconds_last"] / result["seconds_first"]
    row = (
        total,
        len(rollovers),
        max(texts),
        *(f"{1000 * result[f'seconds_{part}']:.1f}" for part in ("first", "last")),
        f"{ratio:.2f}",
        *(f"{result[f'resident_{part}'] / 1e6:.0f}" for part in ("first", "last")),
        f"{slope:.0f}",
    )
    head = (
        "frames", "rollovers", "most text tokens", "ms per frame, first period", "last", "ratio", "MB, first period",
        "last", "bytes per frame, second half",
    )  # fmt: skip
    print(table(head, [row]))
    return result


def resident_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("this system has no VmRSS in /proc/self/status")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, nargs="*", default=[], help="numbers of sessions at once")
    parser.add_argument("--hours", type=float, help="hours of one stream at 1 fps")
    parser.add_argument("--checkpoint", default=str(NANO))
    parser.add_argument("--layers", type=int, help="random weights with so many text layers, and two of vision")
    parser.add_argument("--seconds", type=float, default=20, help="how long each number of sessions runs")
    parser.add_argument("--fps", type=float, default=1.0, help="frames per second of each session")
    parser.add_argument("--side", type=int, default=128, help="pixels of a side of a frame")
    parser.add_argument("--every", type=int, default=4, help="frames after which there is a reply")
    parser.add_argument("--reply", type=int, default=12, help="tokens of a reply")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    processor, model = load(args)
    gc.collect()
    measured = {"machine": machine(args.device, args.threads)}
    if args.sessions:
        measured["sessions"] = measure_sessions(args, model, processor)
    if args.hours:
        measured["hours"] = measure_hours(args, model, processor)
    write_json(args.json, measured)


if __name__ == "__main__":
    main()
