"""Trains moss-vl-nano from scratch on the drawn world: python training/nano/train_nano.py --output runs/nano

First the vision encoder alone learns to classify what each of its tokens shows. Then the language model learns to
answer questions, in turns with the encoder, which continues its classification. Every step draws new pictures and
clips. Each process trains on batches of its own, and gradients are averaged. The same command resumes a stopped run.
The output folder becomes a checkpoint; log.jsonl in it has a line per 20 steps, and state.pt the state to resume from.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoProcessor

from moss_vl.training.nano.lessons import Lessons
from moss_vl.training.nano.muon import Muon
from moss_vl.training.nano.tutor import Tutor


PROJECT = Path(__file__).resolve().parents[2]
SEED = 2026
WARM_UP = 50  # steps
LOG_STEPS = 20  # per line of log.jsonl


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Attributes:
        begins: share of all steps before it.
        kinds: share of each kind of batch, as `Lessons` names them.
        rates: factor of the learning rate at its beginning and end, linear between.
        weights: of groups of facts and of attention layers, instead of those of tutor.py.
    """

    begins: float
    kinds: dict[str, float]
    rates: tuple[float, float]
    weights: dict[str, float] = field(default_factory=dict)


MIX = {"pictures": 0.32, "clips": 0.29, "look": 0.31, "images": 0.08}
LAST_MIX = {"pictures": 0.25, "clips": 0.2, "later": 0.25, "look": 0.22, "images": 0.08}
STAGES = (
    Stage(0.0, {"look": 1.0}, (1.0, 1.0)),
    Stage(0.113, MIX, (1.0, 1.0)),
    Stage(0.3382, MIX, (1.0, 0.0)),
    Stage(0.8456, LAST_MIX, (0.4, 0.0), {"stamp": 1.0, "frames": 0.3}),
)


def stage_at(progress: float) -> int:
    """The number of the stage after the share `progress` of all steps."""
    return max(number for number, stage in enumerate(STAGES) if stage.begins <= progress)


def plan_of(steps: int):
    """step -> kind of its batch, for a run of `steps`."""

    def plan(step: int) -> str:
        position = (step * 0.6180339887) % 1.0  # evenly mixed
        kinds = STAGES[stage_at(step / steps)].kinds
        for kind, share in kinds.items():
            if position < share:
                return kind
            position -= share
        return next(iter(kinds))

    return plan


def rate_at(step: int, steps: int) -> float:
    """The factor of the learning rate: warmup, then the lines of the stages."""
    number = stage_at(step / steps)
    begin, (first, last) = STAGES[number].begins, STAGES[number].rates
    end = STAGES[number + 1].begins if number + 1 < len(STAGES) else 1.0
    return min((step + 1) / WARM_UP, first + (last - first) * (step / steps - begin) / (end - begin))


def loss_of(model, tutor, batch: dict, progress: float) -> tuple[torch.Tensor, dict]:
    """Loss of a batch, and values to log. `progress`: share of the run's steps before this one.

    Batches of kind "look" train the encoder; all others train the language model alone.
    """
    encoder = batch["kind"] == "look"
    model.model.visual.requires_grad_(encoder)
    if encoder:
        return tutor.encoder_loss(model, batch)
    return tutor.language_model_loss(model, batch, **STAGES[stage_at(progress)].weights)


def to_device(batch: dict, device) -> dict:
    """The batch with its tensors on the device, also those of nested dicts."""
    return {
        name: to_device(value, device)
        if isinstance(value, dict)
        else value.to(device)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in batch.items()
    }


def average_gradients(parameters) -> None:
    """Averages gradients over all processes. Their batches are of one kind, so the same parameters have gradients."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten().float() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


# files of a run


def save(model, optimizer, output: Path, step: int) -> None:
    """Writes the checkpoint and state.pt. If the run is stopped meanwhile, the previous files remain."""
    shutil.copytree(output / "start", output, ignore=shutil.ignore_patterns("model.safetensors"), dirs_exist_ok=True)
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, output / "model.safetensors.new", metadata={"format": "pt"})
    torch.save({"step": step, "optimizer": optimizer.state_dict()}, output / "state.pt.new")
    for name in ("model.safetensors", "state.pt"):
        os.replace(output / f"{name}.new", output / name)


def resume(optimizer, output: Path, device, rank: int) -> int:
    """Loads state.pt if there is one; returns the first step to do."""
    if not (output / "state.pt").exists():
        return 0
    state = torch.load(output / "state.pt", map_location=device)
    optimizer.load_state_dict(state["optimizer"])
    if rank == 0:
        cut_log(output / "log.jsonl", state["step"])
    return state["step"]


def cut_log(path: Path, step: int) -> None:
    """Removes the lines after `step`, whose steps will be repeated."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step), encoding="utf-8")


class Log:
    """Collects values and durations, and writes their means to log.jsonl."""

    def __init__(self, path: Path):
        self.path = path
        self.values, self.seconds = defaultdict(list), defaultdict(list)

    def add(self, values: dict[str, list], **seconds: float) -> None:
        for name, numbers in values.items():
            self.values[name] += numbers
        for name, number in seconds.items():
            self.seconds[name].append(number)

    def write(self, step: int) -> None:
        """Writes a line. Raises FloatingPointError if a mean is not finite."""
        means = {name: round(sum(values) / len(values), 4) for name, values in self.values.items() if values}
        seconds = {name: round(sum(values) / len(values), 3) for name, values in self.seconds.items()}
        line = {"step": step, "time": round(time.time(), 1), **means, "seconds": seconds}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)
        if not all(math.isfinite(value) for value in means.values()):
            raise FloatingPointError(f"the loss of step {step} is not finite; resume the last state with another seed")
        self.values.clear(), self.seconds.clear()


# the run


def train(rank: int, args) -> None:
    """One of `args.processes` processes of a run."""
    set_up_process(rank, args)
    dtype = getattr(torch, args.dtype)
    processor, model, tutor = load(args, dtype)
    tutored = [(f"tutor.{name}", parameter) for name, parameter in tutor.named_parameters()]
    optimizer = Muon([*model.named_parameters(), *tutored])
    begin = resume(optimizer, args.output, args.device, rank)
    lessons = Lessons(processor, SEED, plan_of(args.steps), args.size)
    log, saved_at, parent = Log(args.output / "log.jsonl"), time.monotonic(), torch.multiprocessing.parent_process()
    for step in range(begin, args.steps):
        if parent is not None and not parent.is_alive():
            sys.exit(f"rank {rank} stops at step {step}: the process that started it has ended")
        began = time.monotonic()
        batch = to_device(lessons.batch(step, rank), args.device)
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
        drawn = time.monotonic()
        loss, values = loss_of(model, tutor, batch, step / args.steps)
        loss.backward()
        if args.processes > 1:
            average_gradients(optimizer.parameters.values())
        optimizer.step(rate_at(step, args.steps))
        if rank:
            continue
        log.add(values, **{"drawing": drawn - began, batch["kind"]: time.monotonic() - drawn})
        if (step + 1) % LOG_STEPS == 0:
            log.write(step + 1)
        if time.monotonic() - saved_at > 60 * args.save_minutes or step + 1 == args.steps:
            save(model, optimizer, args.output, step + 1)
            saved_at = time.monotonic()


def set_up_process(rank: int, args) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    torch.set_flush_denormal(True)  # old moments decay to denormal numbers, which are slow
    if args.processes > 1:
        meeting = (args.output / "meeting").resolve().as_uri()
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=args.processes)


def load(args, dtype) -> tuple:
    """Processor, model and tutor."""
    start = args.output / "start"
    processor = AutoProcessor.from_pretrained(start, trust_remote_code=True)
    # On a CPU, the backward pass of eager attention is faster than that of sdpa, several times in bfloat16.
    attention = "eager" if args.device == "cpu" else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(
        start, trust_remote_code=True, dtype=dtype, attn_implementation=attention
    )
    model = model.train().to(args.device)
    return processor, model, Tutor(model.config).to(args.device, dtype)


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
    cpu = not torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description="Train moss-vl-nano from scratch.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the run; becomes a checkpoint")
    parser.add_argument("--steps", type=int, default=7450, help="may change when a run is resumed")
    parser.add_argument("--size", type=int, default=16, help="pictures per batch and process, a multiple of 8")
    processes = min(os.cpu_count(), 2) if cpu else 1
    parser.add_argument(
        "--processes", type=int, default=processes, help="parallel processes, each with its own batches"
    )
    threads = max(1, os.cpu_count() // 2) if cpu else os.cpu_count()
    parser.add_argument("--threads", type=int, default=threads, help="per process")
    parser.add_argument("--device", default="cpu" if cpu else "cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="to compute in; by default the faster one")
    parser.add_argument("--save-minutes", type=float, default=10.0, help="minutes between checkpoints")
    args = parser.parse_args()
    if args.size < 8 or args.size % 8:
        parser.error(f"--size is {args.size}; expected a multiple of 8")
    args.dtype = args.dtype or faster_dtype(args.device)
    return args


def main():
    args = parse()
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "meeting").unlink(missing_ok=True)
    if not (args.output / "start" / "model.safetensors").exists():
        make_nano = PROJECT / "training/nano/make_nano.py"  # in a process of its own: it changes HF_MODULES_CACHE
        subprocess.run([sys.executable, str(make_nano), "--output", str(args.output / "start")], check=True)
    if args.processes > 1:
        torch.multiprocessing.spawn(train, (args,), args.processes)
    else:
        train(0, args)


if __name__ == "__main__":
    main()
