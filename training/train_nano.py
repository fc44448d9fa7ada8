"""Trains moss-vl-nano from nothing on the drawn world: python training/train_nano.py --output runs/nano

First the vision encoder alone learns to name what each of its tokens shows; then the whole model learns to answer, while the encoder goes on
naming. Pictures and clips are drawn afresh for every step. A run that was stopped goes on where it was when the same command is given
again. The output folder becomes a checkpoint; beside it lie log.jsonl, a line for every 20 steps, and state.pt.
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

TRAINING = Path(__file__).resolve().parent
PROJECT = TRAINING.parent
sys.path[:0] = [str(PROJECT / "checkpoints"), str(TRAINING)]
from lessons import SIGHTS, TASKS, Lessons, may_see  # noqa: E402
from make_nano import make  # noqa: E402
from transformers import AutoModelForCausalLM, AutoProcessor  # noqa: E402

SEED = 2026
LOOK_SHARE = 0.2  # of all steps, in which the encoder alone learns
DECAY_SHARE = 0.35  # of all steps, at the end, in which the learning rate falls to nothing
WARM_UP = 50
KINDS = (("pictures", 0.52), ("clips", 0.38), ("images", 0.10))
SIGHT_WEIGHTS = {"shape": 3.0, "colour": 0.5, "size": 0.5, "place": 0.3, "rank": 0.3, "letter": 2.0, "nearest": 0.1}
INK_WEIGHT = 4.0
SIGHT_SHARE = 0.3  # weight of naming beside answering


class Muon:
    """Momentum made orthogonal for matrices (K. Jordan and others, Muon, 2024), AdamW for everything else.

    The model computes in bfloat16; the weights that are learned are float32 copies, which `step` writes back.
    """

    def __init__(self, named_parameters, rate: float = 0.02, adam_rate: float = 6e-4, momentum: float = 0.95, decay: float = 0.02):
        self.rate, self.adam_rate, self.momentum, self.decay = rate, adam_rate, momentum, decay
        self.parameters = dict(named_parameters)
        self.weights = {name: parameter.detach().float().clone() for name, parameter in self.parameters.items()}
        self.moments = {name: [torch.zeros_like(weight) for _ in range(1 if self.is_matrix(name) else 2)] for name, weight in self.weights.items()}
        self.steps = dict.fromkeys(self.weights, 0)

    def is_matrix(self, name: str) -> bool:
        return self.parameters[name].ndim == 2 and ("blocks" in name or "layers" in name)

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update with both rates times `scale`; parameters without a gradient stay as they are."""
        alike = defaultdict(list)  # shape -> (name, update) of matrices, which are made orthogonal together
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            gradient, weight, moments = parameter.grad.float(), self.weights[name], self.moments[name]
            parameter.grad = None
            self.steps[name] += 1
            if self.is_matrix(name):
                moments[0].lerp_(gradient, 1 - self.momentum)
                update = gradient.lerp(moments[0], self.momentum)
                for part, rows in zip(update.chunk(3), weight.chunk(3)) if name.endswith("qkv.weight") else [(update, weight)]:
                    alike[part.shape].append((part, rows))
            else:
                moments[0].lerp_(gradient, 0.1)
                moments[1].lerp_(gradient.square(), 0.02)
                update = moments[0] / (1 - 0.9 ** self.steps[name]) / ((moments[1] / (1 - 0.98 ** self.steps[name])).sqrt() + 1e-8)
                weight.sub_(update, alpha=scale * self.adam_rate)
                parameter.copy_(weight)
        for shape, pairs in alike.items():
            updates = orthogonal(torch.stack([update for update, _ in pairs]))
            for update, (_, weight) in zip(updates, pairs):
                weight.mul_(1 - scale * self.rate * self.decay).sub_(update, alpha=scale * self.rate * max(1, shape[0] / shape[1]) ** 0.5)
        for name, parameter in self.parameters.items():
            if self.is_matrix(name):
                parameter.copy_(self.weights[name])

    def state_dict(self) -> dict:
        return {"weights": self.weights, "moments": self.moments, "steps": self.steps}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        self.weights, self.moments, self.steps = state["weights"], state["moments"], state["steps"]
        for name, parameter in self.parameters.items():
            parameter.copy_(self.weights[name])


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """[n, rows, columns] -> the nearest (semi-)orthogonal ones, about: five Newton-Schulz iterations in bfloat16, with Muon's coefficients."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16()
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.mT if tall else x).float()


class Namer(nn.Module):
    """Reads off each vision token what it shows, and off each patch, halfway through the encoder, where in it there is ink. Only for training; it
    is thrown away."""

    def __init__(self, width: int, vision_width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.heads = nn.Linear(width, sum(classes for _, classes in SIGHTS))
        self.ink_norm = nn.LayerNorm(vision_width)
        self.ink_head = nn.Linear(vision_width, 64)

    def ink(self, patches: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """patches [P, vision width], targets [P, 64] -> loss."""
        return F.binary_cross_entropy_with_logits(self.ink_head(self.ink_norm(patches)).float(), targets)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """tokens [N, D] and targets [N, len(SIGHTS)] -> loss, and the share named rightly."""
        logits = self.heads(self.norm(tokens)).float().split([classes for _, classes in SIGHTS], dim=1)
        total, right = 0.0, {}
        for (name, classes), scores, target in zip(SIGHTS, logits, targets.unbind(1)):
            group = name.split()[0]
            weights = torch.ones(classes)
            if group in ("shape", "letter"):
                weights[-1] = 0.3 if group == "shape" else 0.05  # most tokens show none
            asked = target >= 0
            if not asked.any():
                continue
            total = total + SIGHT_WEIGHTS[group] * F.cross_entropy(scores, target, weight=weights, ignore_index=-100)
            counted = asked & (target < classes - 1) if group in ("shape", "letter") else asked
            if counted.any() and name != "letter 3":
                right[name] = (scores.argmax(1) == target)[counted].float().mean().item()
        return total, right


def plan_of(steps: int):
    """step -> kind of its batch."""
    look = round(LOOK_SHARE * steps)

    def plan(step: int) -> str:
        if step < look:
            return "look"
        at = (step * 0.6180339887) % 1.0  # evenly mixed
        for kind, share in KINDS:
            if at < share:
                return kind
            at -= share
        return KINDS[0][0]

    return plan


def rate_of(step: int, steps: int) -> float:
    """Up, level, and down to nothing in a line."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / (DECAY_SHARE * steps))


def answers_right(logits: torch.Tensor, batch: dict) -> dict[str, list[int]]:
    """Task -> for every answer, whether each of its tokens was the likeliest one behind the right ones before it."""
    asked = batch["labels"][:, 1:] != -100
    wrong = (logits[:, :-1].argmax(-1) != batch["labels"][:, 1:]) & asked
    rows, columns = asked.nonzero(as_tuple=True)
    parts, tasks = batch["parts"][:, 1:][rows, columns], batch["tasks"][:, 1:][rows, columns]
    failed = defaultdict(int)
    for row, part, task, miss in zip(rows.tolist(), parts.tolist(), tasks.tolist(), wrong[rows, columns].tolist()):
        failed[row, part, task] |= miss
    right = defaultdict(list)
    for (_, _, task), miss in failed.items():
        right[TASKS[task]].append(1 - miss)
    return right


def learn(model, namer, batch: dict) -> tuple[torch.Tensor, dict]:
    """Loss of a batch, and what to log."""
    seen, halfway = [], []
    visual = model.model.visual
    block = visual.blocks[visual.config.deepstack_visual_indexes[0]].register_forward_hook(lambda module, args, out: halfway.append(out))
    if batch["kind"] == "look":
        seen.append(visual(batch["pixel_values"], batch["grid_thw"]))
        loss, log = 0.0, {}
    else:
        visual.requires_grad_(batch["kind"] != "clips")  # of clips, which hold few sights and many frames, the encoder learns nothing
        hook = visual.register_forward_hook(lambda module, args, out: seen.append(out))
        out = model(input_ids=batch["input_ids"], attention_mask=may_see(batch["parts"]), position_ids=batch["position_ids"], labels=batch["labels"],
                    pixel_values=batch["pixel_values"], grid_thw=batch["grid_thw"], media_nums_per_sample=batch["media_nums"])  # fmt: skip
        hook.remove()
        loss, log = out.loss, {f"loss {batch['kind']}": [out.loss.item()], **answers_right(out.logits, batch)}
    block.remove()
    if "sights" in batch:
        naming, right = namer(seen[0], batch["sights"])
        share = 1.0 if batch["kind"] == "look" else SIGHT_SHARE
        inking = namer.ink(halfway[0], batch["inks"])
        loss = loss + share * (naming + INK_WEIGHT * inking)
        log |= {"naming": [naming.item()], "inking": [inking.item()], **{f"names {name}": [value] for name, value in right.items()}}
    return loss, log


def compile_parts(model) -> None:
    """Has torch.compile join the elementwise parts of the layers, which cost a CPU more than the matrix products do."""
    for module in model.modules():
        if type(module).__name__ in ("MossVLVisionMLP", "MossVLTextMLP", "MossVLRMSNorm"):
            module.compile(dynamic=True)


def yield_to_training(worker: int) -> None:
    """Drawing takes what computing leaves of the processors."""
    os.nice(5)


def save(model, processor, namer, optimizer, output: Path, step: int) -> None:
    """The checkpoint, and what a later run goes on from; a run stopped while it saves loses neither."""
    model.save_pretrained(output)
    processor.save_pretrained(output)
    torch.save({"step": step, "optimizer": optimizer.state_dict()}, output / "state.pt.new")
    os.replace(output / "state.pt.new", output / "state.pt")


def main():
    parser = argparse.ArgumentParser(description="Train moss-vl-nano from nothing.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the run; becomes a checkpoint")
    parser.add_argument("--steps", type=int, default=6000, help="may be changed when a run goes on")
    parser.add_argument("--size", type=int, default=32, help="pictures in a batch")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads that compute")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=shutil.which("g++") is not None, help="use torch.compile")
    parser.add_argument("--save-minutes", type=float, default=10.0)
    args = parser.parse_args()

    torch.manual_seed(SEED)
    args.output.mkdir(parents=True, exist_ok=True)
    start = args.output / "start"
    if not (start / "model.safetensors").exists():
        make(start)
    processor = AutoProcessor.from_pretrained(start, trust_remote_code=True)
    # Eager attention: on a CPU its backward pass is several times as fast in bfloat16 as that of the fused one.
    model = AutoModelForCausalLM.from_pretrained(start, trust_remote_code=True, dtype=torch.bfloat16, attn_implementation="eager").train()
    namer = Namer(model.config.text_config.hidden_size, model.config.vision_config.hidden_size).to(torch.bfloat16)
    optimizer = Muon([*model.named_parameters(), *((f"namer.{name}", parameter) for name, parameter in namer.named_parameters())])
    begin = 0
    if (args.output / "state.pt").exists():
        state = torch.load(args.output / "state.pt")
        begin = state["step"]
        optimizer.load_state_dict(state["optimizer"])
        print(f"going on at step {begin}", flush=True)

    if args.compile:
        compile_parts(model)
    lessons = Lessons(processor, SEED, plan_of(args.steps), args.steps, args.size)
    loader = torch.utils.data.DataLoader(lessons, batch_size=None, sampler=range(begin, args.steps), num_workers=args.workers,
                                         prefetch_factor=8 if args.workers else None, worker_init_fn=yield_to_training)  # fmt: skip
    torch.set_num_threads(args.threads)
    logged, times, saved, clock = defaultdict(list), defaultdict(list), time.monotonic(), time.monotonic()
    for step, batch in enumerate(loader, begin):
        waited = time.monotonic()
        loss, log = learn(model, namer, batch)
        loss.backward()
        optimizer.step(rate_of(step, args.steps))
        for name, values in log.items():
            logged[name] += values
        times["waiting"].append(waited - clock)
        times[batch["kind"]].append(time.monotonic() - waited)
        clock = time.monotonic()
        if (step + 1) % 20 == 0:
            line = {"step": step + 1, "time": round(time.time(), 1), **{name: round(sum(values) / len(values), 4) for name, values in logged.items()},
                    "seconds": {name: round(sum(values) / len(values), 3) for name, values in times.items()}}  # fmt: skip
            with (args.output / "log.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)
            assert all(math.isfinite(value) for name, value in line.items() if name != "seconds"), "the loss is not finite"
            logged.clear(), times.clear()
        if clock - saved > 60 * args.save_minutes:
            save(model, processor, namer, optimizer, args.output, step + 1)
            saved = clock = time.monotonic()
    save(model, processor, namer, optimizer, args.output, args.steps)


if __name__ == "__main__":
    main()
