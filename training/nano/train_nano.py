"""Trains moss-vl-nano from scratch on the drawn world: python training/nano/train_nano.py --output runs/nano

First the vision encoder alone learns to classify what each of its tokens shows. Then the language model learns to
answer questions, in turns with the encoder, which continues its classification. Worker processes draw the batches of
each step. Learning rate, stages and mixture depend only on the progress of the run, so a run may have any length, in
steps or in minutes. The same command resumes a stopped run. The output folder becomes a checkpoint; log.jsonl in it
has a line per 20 steps, and state.pt the state to resume from.
"""

import argparse
import faulthandler
import json
import math
import os
import random
import shutil
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

from moss_vl.training.nano.collation import Sizes, collate, pack, unpack
from moss_vl.training.nano.lessons import LATE, Lessons
from moss_vl.training.nano.make_nano import first_weights, write_folder
from moss_vl.training.nano.muon import Muon
from moss_vl.training.nano.steps import EagerSteps, GraphSteps
from moss_vl.training.nano.tutor import Tutor


BEGAN = time.monotonic()
SEED = 2026
WARM_UP = 50  # steps
HEADS_ALONE = 100  # steps in which trained weights do not change, while the heads of the tutor are learned anew
LOG_STEPS = 20  # per line of log.jsonl
NOTE_SECONDS = 5.0  # between lines of progress
PREFETCHED = 4  # steps that each worker draws ahead


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Attributes:
        begins: share of the run before it.
        kinds: share of each kind of batch, as `Lessons` names them.
        weights: of groups of facts and of attention targets, instead of those of tutor.py.
    """

    begins: float
    kinds: dict[str, float]
    weights: dict[str, float] = field(default_factory=dict)


MIX = {"look": 0.12, "pictures": 0.28, "images": 0.06, "clips": 0.3, "streams": 0.24}
STAGES = (
    Stage(0.0, {"look": 1.0}),
    Stage(0.08, MIX),
    Stage(LATE, MIX, {"stamp": 1.0, "frames": 0.3}),
)
DECAY = 0.4  # progress from which the learning rate falls, in a line to 0 at the end


def stage_at(progress: float) -> Stage:
    return max((stage for stage in STAGES if stage.begins <= progress), key=lambda stage: stage.begins)


def kind_at(step: int, progress: float) -> str:
    """The kind of the batches of a step: evenly mixed."""
    position, kinds = (step * 0.6180339887) % 1.0, stage_at(progress).kinds
    for kind, share in kinds.items():
        if position < share:
            return kind
        position -= share
    return next(iter(kinds))


def rate_at(step: int, progress: float) -> float:
    """The factor of the learning rate."""
    return min((step + 1) / WARM_UP, 1.0, max(0.0, (1 - progress) / (1 - DECAY)))


class Clock:
    """The progress of a run, 0 to 1: steps of `steps`, or time of `minutes`.

    Args:
        seconds: of earlier parts of the run.
        first: the progress at its beginning.
    """

    def __init__(self, steps: int | None, minutes: float | None, seconds: float = 0.0, first: float = 0.0):
        self.steps, self.minutes, self.earlier, self.began, self.first = steps, minutes, seconds, None, first

    def start(self) -> None:
        """Begins to count time, if it has not begun."""
        self.began = time.monotonic() if self.began is None else self.began

    def seconds(self) -> float:
        return self.earlier + (0.0 if self.began is None else time.monotonic() - self.began)

    def progress(self, step: int) -> float:
        """Before a step. In a run of minutes it is that of now for any step."""
        share = step / self.steps if self.minutes is None else self.seconds() / (60 * self.minutes)
        return self.first + (1 - self.first) * min(1.0, share)


# data


class Plan(torch.utils.data.Sampler):
    """(step, kind, progress, batches) of each step that is drawn, made when a worker is told to draw it.

    Args:
        batches: of each step.
        repeats: how often each is used: one of as many steps is drawn.
    """

    def __init__(self, first: int, clock: Clock, batches: int, repeats: int = 1):
        self.first, self.clock, self.batches, self.repeats = first, clock, batches, repeats

    def __iter__(self):
        step = self.first
        while (progress := self.clock.progress(step)) < 1:
            yield step, kind_at(step, progress), progress, self.batches
            step += self.repeats


class Drawing(torch.utils.data.Dataset):
    """Draws the batches of a step of a `Plan`, and joins them. They depend on nothing else."""

    def __init__(self, processor, config, size: int):
        self.lessons, self.sizes = Lessons(processor, SEED, size), Sizes.of(config)

    def __getitem__(self, place: tuple[int, str, float, int]) -> dict:
        step, kind, progress, batches = place
        drawn = [self.lessons.batch(step, kind, progress, rank) for rank in range(batches)]
        return {"step": step, "progress": progress} | pack(collate(drawn, self.sizes))


def one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def load_steps(drawing: Drawing, plan: Plan, workers: int, pinned: bool):
    return torch.utils.data.DataLoader(
        drawing,
        batch_size=None,
        sampler=plan,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # remote code cannot be pickled
        prefetch_factor=PREFETCHED if workers else None,
        pin_memory=pinned,
        worker_init_fn=one_thread,
    )


def repeated(steps, times: int, distance: int):
    """Each of `steps` as often as `times`; between two uses are about `distance` others."""
    if times == 1:
        yield from steps
        return
    rng, kept = random.Random(SEED), []  # of later uses
    for step in steps:
        yield step
        kept += [step] * (times - 1)
        while len(kept) > distance * (times - 1):
            yield kept.pop(rng.randrange(len(kept)))


# files of a run


def save(model, optimizer, output: Path, step: int, seconds: float) -> None:
    """Writes the checkpoint and state.pt. If the run is stopped meanwhile, the previous files remain."""
    shutil.copytree(output / "start", output, dirs_exist_ok=True)
    weights = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, output / "model.safetensors.new", metadata={"format": "pt"})
    state = {"step": step, "seconds": seconds, "optimizer": optimizer.state_dict()}
    torch.save(state, output / "state.pt.new")
    for name in ("model.safetensors", "state.pt"):
        os.replace(output / f"{name}.new", output / name)


def cut_log(path: Path, step: int) -> None:
    """Removes the lines after `step`, whose steps will be repeated."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step), encoding="utf-8")


def note(text: str) -> None:
    """Prints a line with the seconds since the start of the command, imports not counted."""
    print(f"{time.monotonic() - BEGAN:6.1f} s  {text}", flush=True)


class Log:
    """Writes lines of log.jsonl: means, numbers of steps of each kind, and seconds of waiting and of all."""

    def __init__(self, path: Path):
        self.path, self.kinds = path, defaultdict(int)
        self.waited, self.began = 0.0, time.monotonic()
        self.noted = 0.0

    def write(self, step: int, progress: float, sums: dict[str, tuple[float, float]]) -> None:
        """Raises FloatingPointError if a mean is not finite."""
        means = {name: round(total / number, 4) for name, (total, number) in sums.items() if number}
        seconds = {"waiting": round(self.waited, 3), "all": round(time.monotonic() - self.began, 3)}
        line = {"step": step, "progress": round(progress, 5), "time": round(time.time(), 1), **means}
        with self.path.open("a") as file:
            file.write(json.dumps(line | {"kinds": dict(self.kinds), "seconds": seconds}) + "\n")
        if time.monotonic() - self.noted > NOTE_SECONDS:
            shown = {name: value for name, value in means.items() if name.startswith(("loss", "naming"))}
            note(f"step {step}, {progress:.1%}: {shown} seconds {seconds}")
            self.noted = time.monotonic()
        if not all(math.isfinite(value) for value in means.values()):
            raise FloatingPointError(f"the loss of step {step} is not finite; resume the last state with another seed")
        self.kinds.clear()
        self.waited, self.began = 0.0, time.monotonic()


# the run


class Trainer:
    """The model with what trains it."""

    def __init__(self, args, model, device):
        self.model = model
        self.tutor = Tutor(model.config).to(device, model.dtype)
        tutored = [(f"tutor.{name}", parameter) for name, parameter in self.tutor.named_parameters()]
        self.optimizer = Muon([*model.named_parameters(), *tutored], args.rate, args.adam_rate)
        graphs = device.type == "cuda" and not args.eager
        self.steps = GraphSteps(self.compute, device, note) if graphs else EagerSteps(self.compute)
        self.stage = None

    def compute(self, step: dict):
        """One update."""
        self.optimizer.clear()
        loss, counts = self.tutor.loss(self.model, step)
        loss.backward()
        self.optimizer.step()
        return counts.joined()

    def step(self, step: dict, rate: float, progress: float, heads_alone: bool = False) -> None:
        if self.stage is not stage_at(progress):
            self.stage = stage_at(progress)
            self.tutor.weigh(**self.stage.weights)
        self.optimizer.set_scale(rate)
        self.model.requires_grad_(not heads_alone)
        if heads_alone:
            self.steps.log.add(self.compute(step))
        else:
            self.steps(step)


def train(args) -> None:
    device, output = torch.device(args.device), args.output
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    torch.set_flush_denormal(True)  # old moments decay to denormal numbers, which are slow
    processor, model = load(args)
    state = torch.load(output / "state.pt") if (output / "state.pt").exists() else {"step": 0, "seconds": 0.0}
    cut_log(output / "log.jsonl", state["step"])
    clock = Clock(args.steps, args.minutes, state["seconds"], args.progress)
    drawing = Drawing(processor, model.config, args.size)
    plan = Plan(state["step"], clock, args.batches, args.repeats)
    # the workers are forked before the device is used
    loader = iter(load_steps(drawing, plan, args.workers, pinned=device.type == "cuda"))
    note(f"{args.workers} processes draw")
    with stream_of(device):
        trainer = Trainer(args, model.to(device), device)
        if "optimizer" in state:
            trainer.optimizer.load_state_dict(state["optimizer"])
        note(f"model on {device}; begins with step {state['step']}")
        learn(args, trainer, loader, plan)


def stream_of(device):
    """The context of a stream of its own, without which a GPU records no graphs."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def learn(args, trainer: Trainer, loader, plan: Plan) -> None:
    """The steps of a run from the first one of the plan on, and its files."""
    model, optimizer, clock, done = trainer.model, trainer.optimizer, plan.clock, plan.first
    log, saved_at = Log(args.output / "log.jsonl"), time.monotonic()
    steps = repeated((unpack(packed, model.device) for packed in loader), args.repeats, args.distance)
    while (progress := clock.progress(done)) < 1:
        if args.watchdog:
            faulthandler.dump_traceback_later(args.watchdog * (1 if log.kinds else 3), exit=True)
        began = time.monotonic()
        step = next(steps, None)
        if step is None:
            break
        clock.start()
        log.waited += time.monotonic() - began
        trainer.step(step, rate_at(done, progress), progress, bool(args.weights) and done < HEADS_ALONE)
        if trainer.steps.failed:  # the host bounds the speed, so larger steps cost little
            plan.batches = 2 * args.batches
        log.kinds[step["kind"]] += 1
        done += 1
        if done % LOG_STEPS == 0:
            log.write(done, clock.progress(done), trainer.steps.log.take())
        if time.monotonic() - saved_at > 60 * args.save_minutes:
            save(model, optimizer, args.output, done, clock.seconds())
            saved_at = time.monotonic()
    faulthandler.cancel_dump_traceback_later()
    save(model, optimizer, args.output, done, clock.seconds())
    note(f"{done} steps in {clock.seconds():.0f} s; {trainer.steps}")


def load(args) -> tuple:
    """Processor, and model with its first weights: random ones, or those of `args.weights`."""
    start = args.output / "start"
    processor = AutoProcessor.from_pretrained(start, trust_remote_code=True)
    config = AutoConfig.from_pretrained(start, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True).to(getattr(torch, args.dtype))
    state = model.state_dict()
    shapes = {name: state[name].shape for name in sorted(state)}
    model.load_state_dict(load_file(args.weights) if args.weights else first_weights(shapes))
    return processor, model.train()


def faster_dtype(device: str) -> str:
    """bfloat16, or float32 on a CPU that multiplies it faster."""
    if device != "cpu":
        return "bfloat16"
    seconds = {}
    for dtype in (torch.bfloat16, torch.float32):
        factor = torch.ones(1024, 1024, dtype=dtype)
        factor @ factor
        begin = time.monotonic()
        factor @ factor
        seconds[dtype] = time.monotonic() - begin
    return "bfloat16" if seconds[torch.bfloat16] < seconds[torch.float32] else "float32"


def parse() -> argparse.Namespace:
    cpu, cores = not torch.cuda.is_available(), os.cpu_count()
    parser = argparse.ArgumentParser(
        description="Train moss-vl-nano from scratch.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the run; becomes a checkpoint")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=6240, help="of the whole run")
    length.add_argument("--minutes", type=float, help="of the whole run, in place of steps")
    parser.add_argument("--weights", type=Path, help="model.safetensors of an earlier run, to go on from")
    parser.add_argument("--progress", type=float, default=0.0, help="progress at the beginning, with --weights")
    parser.add_argument("--size", type=int, default=16, help="pictures per batch, a multiple of 8")
    parser.add_argument("--batches", type=int, default=1 if cpu else 4, help="per step")
    parser.add_argument("--repeats", type=int, default=1 if cpu else 2, help="how often each step is used")
    parser.add_argument("--distance", type=int, default=200, help="about how many steps are between two uses")
    parser.add_argument("--rate", type=float, default=0.022, help="learning rate of matrices")
    parser.add_argument("--adam-rate", type=float, default=7e-4, help="learning rate of all other parameters")
    parser.add_argument("--workers", type=int, default=max(1, cores - 1), help="processes that draw")
    parser.add_argument("--threads", type=int, default=cores, help="of the process that trains")
    parser.add_argument("--device", default="cpu" if cpu else "cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="to compute in; by default the faster one")
    parser.add_argument("--eager", action="store_true", help="record no CUDA graphs")
    parser.add_argument("--watchdog", type=float, help="end with all stacks if a step takes as many seconds")
    parser.add_argument("--save-minutes", type=float, default=10.0, help="minutes between checkpoints")
    args = parser.parse_args()
    if args.size < 8 or args.size % 8:
        parser.error(f"--size is {args.size}; expected a multiple of 8")
    if not 0 <= args.progress < 1 or args.progress and not args.weights:
        parser.error(f"--progress is {args.progress}; expected 0 to less than 1, and --weights if it is not 0")
    args.dtype = args.dtype or faster_dtype(args.device)
    return args


def main():
    args = parse()
    args.output.mkdir(parents=True, exist_ok=True)
    if not (args.output / "start" / "config.json").exists():
        write_folder(args.output / "start")
    note("start folder is there")
    train(args)


if __name__ == "__main__":
    main()
