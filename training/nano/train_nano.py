"""Trains moss-vl-nano from nothing on the drawn world: python training/nano/train_nano.py --output runs/nano

First the vision encoder alone learns to name what each of its tokens shows. Then the language model learns to answer from what the encoder
gives it, in turns with the encoder, which goes on naming. Pictures and clips are drawn afresh for every step. Each processor core trains on
batches of its own; gradients are averaged. A run that was stopped goes on where it was when the same command is given again. The output
folder becomes a checkpoint; beside it lie log.jsonl, a line for every 20 steps, and state.pt.
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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoProcessor

from moss_vl.training.nano.lessons import CHANGES, CONTENTS, COURSE, SIGHTS, SLOTS, TASKS, Lessons, may_see


PROJECT = Path(__file__).resolve().parents[2]
SEED = 2026
WARM_UP = 50
FAST = 5.0  # times AdamW's rate for what it learns of the language model: attention grows sharp by its norms' gains
SIGHT_WEIGHTS = {
    "shape": 3.0, "colour": 0.5, "size": 0.5, "place": 1.0, "across": 1.0, "down": 1.0, "rank": 0.3, "twin": 0.3, "nearest": 0.2,
    "letter": 2.0, "spelling": 0.3,
}  # fmt: skip
INK_WEIGHT = 4.0
FACT_WEIGHTS = {
    "colour": 1.0, "kind": 0.5, "size": 0.3, "place": 1.0, "across": 0.1, "down": 0.1, "rank": 0.2, "count": 0.3, "event": 2.0, "stamp": 0.2,
    "picture": 1.0, "events": 0.5, "begins": 1.0, "subject": 0.5,
}  # fmt: skip
FACTS_WEIGHT = 0.2
GAZE_WEIGHTS = {
    "stamps": 0.1,
    "slots": 0.2,
    "before": 0.1,
    "asked": 0.2,
    "looks": 0.2,
    "frames": 0.2,
}  # of attention elsewhere
NOTHING = {
    "shape": 0.3,
    "letter": 0.05,
    "event": 0.03,
    "begins": 0.1,
}  # weights of the last class, where most are of it
NOISE = 0.02  # of the encoder's vectors, in their standard deviations: frames of a file that show the same are not quite equal


@dataclass(frozen=True)
class Stage:
    """A part of a run: from which share of all steps on, which kinds of batches by their shares, how the learning rate goes from its
    beginning to its end, and weights of facts and of attention in place of those above."""

    begins: float
    kinds: dict[str, float]
    rates: tuple[float, float]
    weights: dict[str, float] = field(default_factory=dict)


MIX = {"pictures": 0.32, "clips": 0.29, "look": 0.31, "images": 0.08}
STAGES = (
    Stage(0.0, {"look": 1.0}, (1.0, 1.0)),
    Stage(0.113, MIX, (1.0, 1.0)),
    Stage(0.3382, MIX, (1.0, 0.0)),
    Stage(
        0.8456,
        {"pictures": 0.25, "clips": 0.2, "later": 0.25, "look": 0.22, "images": 0.08},
        (0.4, 0.0),
        {"stamp": 1.0, "frames": 0.3},
    ),
)


class Muon:
    """Momentum made orthogonal for matrices (K. Jordan and others, Muon, 2024), AdamW for everything else.

    The model may compute in bfloat16; the weights that are learned are float32 copies, which `step` writes back.
    """

    def __init__(
        self,
        named_parameters,
        rate: float = 0.02,
        adam_rate: float = 6e-4,
        momentum: float = 0.95,
        decay: float = 0.02,
    ):
        self.rate, self.adam_rate, self.momentum, self.decay = rate, adam_rate, momentum, decay
        self.parameters = dict(named_parameters)
        self.weights = {name: parameter.detach().float().clone() for name, parameter in self.parameters.items()}
        self.moments = {
            name: [torch.zeros_like(weight) for _ in range(1 if self.is_matrix(name) else 2)]
            for name, weight in self.weights.items()
        }
        self.steps = dict.fromkeys(self.weights, 0)
        self.dtype = next(iter(self.parameters.values())).dtype

    def is_matrix(self, name: str) -> bool:
        return self.parameters[name].ndim == 2 and ("blocks" in name or "layers" in name)

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update with both rates times `scale`; parameters without a gradient stay as they are."""
        alike = defaultdict(list)  # shape -> (update, weight) of matrices, which are made orthogonal together
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            gradient, weight, moments = parameter.grad.float(), self.weights[name], self.moments[name]
            parameter.grad = None
            self.steps[name] += 1
            if self.is_matrix(name):
                moments[0].lerp_(gradient, 1 - self.momentum)
                update = gradient.lerp(moments[0], self.momentum)
                for part, rows in (
                    zip(update.chunk(3), weight.chunk(3), strict=True)
                    if name.endswith("qkv.weight")
                    else [(update, weight)]
                ):
                    alike[part.shape].append((part, rows))
            else:
                moments[0].lerp_(gradient, 0.1)
                moments[1].lerp_(gradient.square(), 0.02)
                update = (
                    moments[0]
                    / (1 - 0.9 ** self.steps[name])
                    / ((moments[1] / (1 - 0.98 ** self.steps[name])).sqrt() + 1e-8)
                )
                fast = name.startswith(
                    ("lm_head", "model.language_model", "tutor.facts")
                )  # of which matrices are Muon's
                weight.sub_(update, alpha=scale * self.adam_rate * (FAST if fast else 1))
                parameter.copy_(weight)
        for shape, pairs in alike.items():
            updates = orthogonal(torch.stack([update for update, _ in pairs]).to(self.dtype)).float()
            for update, (_, weight) in zip(updates, pairs, strict=True):
                weight.mul_(1 - scale * self.rate * self.decay).sub_(
                    update, alpha=scale * self.rate * max(1, shape[0] / shape[1]) ** 0.5
                )
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
    """[n, rows, columns] -> the nearest (semi-)orthogonal ones, about: five Newton-Schulz iterations with Muon's coefficients."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).contiguous()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


class Quiz(nn.Module):
    """Linear classifiers for `questions`, (name, classes), read off the same vectors; a name's first word is its group."""

    def __init__(self, width: int, questions, weights: dict[str, float]):
        super().__init__()
        self.questions, self.weights = questions, weights
        self.norm = nn.LayerNorm(width)
        self.heads = nn.Linear(width, sum(classes for _, classes in questions))

    def forward(
        self, vectors: torch.Tensor, targets: torch.Tensor, **weights: float
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """vectors [N, D] and targets [N, len(questions)], -100 where not asked -> loss, and the share answered rightly. `weights` of
        groups take the place of the usual ones."""
        logits = self.heads(self.norm(vectors)).float().split([classes for _, classes in self.questions], dim=1)
        groups, total, right = [name.split()[0] for name, _ in self.questions], 0.0, defaultdict(list)
        for group, (_, classes), scores, target in zip(groups, self.questions, logits, targets.unbind(1), strict=True):
            asked = target >= 0
            if not asked.any():
                continue
            of_classes = torch.ones(classes, device=scores.device)
            of_classes[-1] = NOTHING.get(group, 1.0)
            weight = weights.get(group, self.weights[group])
            total = total + weight * F.cross_entropy(scores, target, weight=of_classes, ignore_index=-100)
            counted = asked & (target < classes - 1) if group in NOTHING else asked
            right[group] += (scores.argmax(1) == target)[counted].tolist()
        return total, right


class Tutor(nn.Module):
    """Asks directly, beside the answers in words, what the model has to know on its way to them. Only for training; it is thrown away.

    Of the vision encoder: off each vision token what it shows, and off each patch, halfway, where in it there is ink. Of the
    language model: off the text token of each picture or frame, behind the first layer that sees it, what is in it, and in the
    layers after that what has changed since the one before; and heads of its attention have to look where lessons.Gaze says.
    """

    def __init__(self, config):
        super().__init__()
        text, vision = config.text_config, config.vision_config
        first, second = text.cross_attention_layers[:2]
        assert text.num_attention_heads == len(SLOTS), "each slot has a head of its own"
        self.ink_layer, self.fact_layers = vision.deepstack_visual_indexes[0], (first, first + 2, first + 3)
        self.gaze_layers = {
            "stamps": first - 1, "slots": first, "before": first + 1, "asked": first, "looks": second, "frames": second + 1,
        }  # fmt: skip
        self.sights = Quiz(vision.out_hidden_size, SIGHTS, SIGHT_WEIGHTS)
        self.ink_norm, self.inks = nn.LayerNorm(vision.hidden_size), nn.Linear(vision.hidden_size, 64)
        self.facts = nn.ModuleList(Quiz(text.hidden_size, part, FACT_WEIGHTS) for part in (CONTENTS, CHANGES, COURSE))

    def ask_encoder(self, model, batch: dict) -> tuple[torch.Tensor, dict]:
        visual = model.model.visual
        with noted(visual.blocks[self.ink_layer]) as halfway:
            tokens = visual(batch["pixel_values"], batch["grid_thw"])
        naming, right = self.sights(tokens, batch["sights"])
        inking = F.binary_cross_entropy_with_logits(self.inks(self.ink_norm(halfway[0])).float(), batch["inks"])
        log = {
            "naming": [naming.item()],
            "inking": [inking.item()],
            **{f"names {name}": values for name, values in right.items()},
        }
        return naming + INK_WEIGHT * inking, log

    def ask_language_model(self, model, batch: dict, **weights: float) -> tuple[torch.Tensor, dict]:
        """`weights`: of groups of facts and of attention, in place of the usual ones."""
        layers = model.model.language_model.layers
        with ExitStack() as stack:
            told = [stack.enter_context(noted(layers[layer])) for layer in self.fact_layers]
            attended = {name: stack.enter_context(noted(layers[layer])) for name, layer in self.gaze_layers.items()}
            stack.enter_context(each_moment_once(model.model.visual, batch))
            stack.enter_context(torn(model.model.language_model, batch))
            out = model(input_ids=batch["input_ids"], attention_mask=may_see(batch["parts"]), position_ids=batch["position_ids"],
                        pixel_values=batch["pixel_values"], grid_thw=batch["grid_thw"], media_nums_per_sample=batch["media_nums"],
                        output_attentions=True)  # fmt: skip
        loss = answer_loss(out.logits, batch)
        log = {f"loss {batch['kind']}": [loss.item()], **answers_right(out.logits, batch)}
        at = batch["input_ids"] == model.config.image_token_id
        targets = batch["facts"].split([len(quiz.questions) for quiz in self.facts], dim=1)
        for quiz, [(states, _)], target in zip(self.facts, told, targets, strict=True):
            quizzed, right = quiz(states[at], target, **weights)
            loss = loss + FACTS_WEIGHT * quizzed
            log |= {f"knows {name}": values for name, values in right.items()}
        for name, points in batch["gaze"].items():
            [(_, attention)] = attended[name]
            seen = attention_on(attention, points)
            loss = loss - weights.get(name, GAZE_WEIGHTS[name]) * (seen + 1e-4).log().mean()
            log[f"attends {name}"] = [seen.mean().item()]
        return loss, log


def attention_on(weights: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """weights [B, H, T, S], points [points, 5] as lessons.Gaze has them -> [groups]: how much of a head's attention each group gets."""
    row, head, text, token, group = points.unbind(1)
    return weights.new_zeros(int(group[-1]) + 1, dtype=torch.float32).index_add_(
        0, group, weights[row, head, text, token].float()
    )


@contextmanager
def each_moment_once(visual, batch: dict):
    """Within it, the encoder is given of every clip one frame for each moment that looks different, and all its frames get the vectors
    of theirs, with a little noise."""
    if "moments" not in batch:
        yield
        return
    sizes = [h * w for _, h, w in batch["grid_thw"]]  # patches of a frame
    firsts = [[moments.index(moment) for moment in range(max(moments) + 1)] for moments in batch["moments"]]

    def fewer(module, args):
        frames = args[0].split([t * h * w for t, h, w in batch["grid_thw"]])
        kept = [
            part.unflatten(0, (-1, size))[first].flatten(0, 1)
            for part, size, first in zip(frames, sizes, firsts, strict=True)
        ]
        grid = [[len(first), h, w] for first, (_, h, w) in zip(firsts, batch["grid_thw"], strict=True)]
        return torch.cat(kept), grid, *args[2:]

    def all_again(module, args, out):
        tokens = [size // visual.spatial_merge_size**2 for size in sizes]
        parts = out.split([len(first) * number for first, number in zip(firsts, tokens, strict=True)])
        parts = [
            part.unflatten(0, (-1, number))[moments].flatten(0, 1)
            for part, number, moments in zip(parts, tokens, batch["moments"], strict=True)
        ]
        whole, grain = torch.cat(parts), torch.Generator().manual_seed(batch["grain"])
        return whole + NOISE * whole.std(0) * torch.randn(whole.shape, generator=grain).to(whole)

    hooks = [visual.register_forward_pre_hook(fewer), visual.register_forward_hook(all_again)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def torn(language_model, batch: dict):
    """Within it, the vision tokens of clips stand farther on by `leaps`, as the text around them does in `position_ids`."""
    if "leaps" not in batch:
        yield
        return

    def farther(module, args, kwargs):
        return args, kwargs | {
            "vision_position_ids": kwargs["vision_position_ids"]
            + batch["leaps"].to(kwargs["vision_position_ids"].device)
        }

    hook = language_model.register_forward_pre_hook(farther, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def noted(module):
    """A list to which the module's outputs are added."""
    outputs = []
    hook = module.register_forward_hook(lambda module, args, out: outputs.append(out))
    try:
        yield outputs
    finally:
        hook.remove()


def stage_of(done: float) -> int:
    """Number of the stage in which a run is whose share `done` of all steps is behind it."""
    return max(number for number, stage in enumerate(STAGES) if stage.begins <= done)


def plan_of(steps: int):
    """step -> kind of its batch."""

    def plan(step: int) -> str:
        at = (step * 0.6180339887) % 1.0  # evenly mixed
        kinds = STAGES[stage_of(step / steps)].kinds
        for kind, share in kinds.items():
            if at < share:
                return kind
            at -= share
        return next(iter(kinds))

    return plan


def rate_of(step: int, steps: int) -> float:
    """Up in the first steps, then along the lines of the stages."""
    number = stage_of(step / steps)
    begin, (first, last) = STAGES[number].begins, STAGES[number].rates
    end = STAGES[number + 1].begins if number + 1 < len(STAGES) else 1.0
    return min((step + 1) / WARM_UP, first + (last - first) * (step / steps - begin) / (end - begin))


def answer_loss(logits: torch.Tensor, batch: dict) -> torch.Tensor:
    """Cross-entropy of the next token over `labels`, by `weights`."""
    labels, weights = batch["labels"][:, 1:], batch["weights"][:, 1:]
    learned = labels != -100
    losses = F.cross_entropy(logits[:, :-1][learned].float(), labels[learned], reduction="none")
    return (losses * weights[learned]).sum() / weights[learned].sum()


def answers_right(logits: torch.Tensor, batch: dict) -> dict[str, list[int]]:
    """Task -> for every answer, whether each of its tokens was the likeliest one behind the right ones before it."""
    asked = batch["labels"][:, 1:] != -100
    wrong = (logits[:, :-1].argmax(-1) != batch["labels"][:, 1:]) & asked
    rows, columns = asked.nonzero(as_tuple=True)
    parts, tasks = batch["parts"][:, 1:][rows, columns], batch["tasks"][:, 1:][rows, columns]
    failed = defaultdict(int)
    for row, part, task, miss in zip(
        rows.tolist(), parts.tolist(), tasks.tolist(), wrong[rows, columns].tolist(), strict=True
    ):
        failed[row, part, task] |= miss
    right = defaultdict(list)
    for (_, _, task), miss in failed.items():
        right[TASKS[task]].append(1 - miss)
    return right


def learn(model, tutor, batch: dict, done: float) -> tuple[torch.Tensor, dict]:
    """Loss of a batch, and what to log, `done` being the share of the run that is behind it. The encoder learns by naming what it sees;
    answering teaches the language model alone."""
    looks = batch["kind"] == "look"
    model.model.visual.requires_grad_(looks)
    weights = STAGES[stage_of(done)].weights
    return tutor.ask_encoder(model, batch) if looks else tutor.ask_language_model(model, batch, **weights)


def placed(batch: dict, device) -> dict:
    """The batch with its tensors on the device, those of dicts in it too."""
    return {
        name: placed(value, device)
        if isinstance(value, dict)
        else value.to(device)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in batch.items()
    }


def average_gradients(parameters) -> None:
    """Over all processes, which have had batches of the same kind and so gradients of the same parameters."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten().float() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def save(model, optimizer, output: Path, step: int) -> None:
    """The checkpoint, and what a later run goes on from; a run stopped while it saves loses neither."""
    shutil.copytree(output / "start", output, ignore=shutil.ignore_patterns("model.safetensors"), dirs_exist_ok=True)
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, output / "model.safetensors.new", metadata={"format": "pt"})
    torch.save({"step": step, "optimizer": optimizer.state_dict()}, output / "state.pt.new")
    for name in ("model.safetensors", "state.pt"):
        os.replace(output / f"{name}.new", output / name)


def forget_log(path: Path, step: int) -> None:
    """Leaves out the lines of steps that will be done again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step), encoding="utf-8")


def faster_dtype(device: str) -> str:
    """bfloat16, but on a CPU that multiplies float32 faster."""
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


def train(rank: int, args) -> None:
    """One of `args.processes` processes of a run."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    torch.set_flush_denormal(True)  # old moments fade into them, and they are slow
    dtype = getattr(torch, args.dtype)
    if args.processes > 1:
        meeting = (args.output / "meeting").resolve().as_uri()
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=args.processes)
    start, state = args.output / "start", args.output / "state.pt"
    processor = AutoProcessor.from_pretrained(start, trust_remote_code=True)
    # Eager attention: on a CPU its backward pass is faster, in bfloat16 several times, than that of the fused one.
    model = AutoModelForCausalLM.from_pretrained(start, trust_remote_code=True, dtype=dtype,
                                                 attn_implementation="eager" if args.device == "cpu" else "sdpa").train()  # fmt: skip
    model, tutor = model.to(args.device), Tutor(model.config).to(args.device, dtype)
    optimizer = Muon(
        [*model.named_parameters(), *((f"tutor.{name}", parameter) for name, parameter in tutor.named_parameters())]
    )
    begin = 0
    if state.exists():
        saved = torch.load(state, map_location=args.device)
        begin = saved["step"]
        optimizer.load_state_dict(saved["optimizer"])
        if rank == 0:
            forget_log(args.output / "log.jsonl", begin)
    lessons = Lessons(processor, SEED, plan_of(args.steps), args.size)
    logged, times, saved_at = defaultdict(list), defaultdict(list), time.monotonic()
    parent = torch.multiprocessing.parent_process()
    for step in range(begin, args.steps):
        if parent is not None and not parent.is_alive():
            sys.exit(f"rank {rank} stops at step {step}: the process that started it is gone")
        clock = time.monotonic()
        batch = lessons.batch(step, rank)
        batch = placed(batch, args.device)
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
        drawn = time.monotonic()
        loss, log = learn(model, tutor, batch, step / args.steps)
        loss.backward()
        if args.processes > 1:
            average_gradients(optimizer.parameters.values())
        optimizer.step(rate_of(step, args.steps))
        if rank:
            continue
        for name, values in log.items():
            logged[name] += values
        times["drawing"].append(drawn - clock)
        times[batch["kind"]].append(time.monotonic() - drawn)
        if (step + 1) % 20 == 0:
            means = {name: round(sum(values) / len(values), 4) for name, values in logged.items() if values}
            seconds = {name: round(sum(values) / len(values), 3) for name, values in times.items()}
            line = {"step": step + 1, "time": round(time.time(), 1), **means, "seconds": seconds}
            with (args.output / "log.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)
            if not all(math.isfinite(value) for value in means.values()):
                raise FloatingPointError(
                    f"the loss of step {step + 1} is not finite; go on from the last state with another seed"
                )
            logged.clear(), times.clear()
        if time.monotonic() - saved_at > 60 * args.save_minutes or step + 1 == args.steps:
            save(model, optimizer, args.output, step + 1)
            saved_at = time.monotonic()


def main():
    cpu = not torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description="Train moss-vl-nano from nothing.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the run; becomes a checkpoint")
    parser.add_argument("--steps", type=int, default=7450, help="may be changed when a run goes on")
    parser.add_argument("--size", type=int, default=16, help="pictures in a batch of each process, a multiple of 8")
    parser.add_argument(
        "--processes",
        type=int,
        default=min(os.cpu_count(), 2) if cpu else 1,
        help="side by side, each with batches of its own",
    )
    parser.add_argument(
        "--threads", type=int, default=max(1, os.cpu_count() // 2) if cpu else os.cpu_count(), help="of each process"
    )
    parser.add_argument("--device", default="cpu" if cpu else "cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="to compute in; by default the faster one")
    parser.add_argument("--save-minutes", type=float, default=10.0)
    args = parser.parse_args()
    if args.size < 8 or args.size % 8:
        parser.error(f"--size is {args.size}; expected a multiple of 8")
    args.dtype = args.dtype or faster_dtype(args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "meeting").unlink(missing_ok=True)
    if not (args.output / "start" / "model.safetensors").exists():
        # A process of its own: it sets where the loaded code is cached.
        subprocess.run(
            [sys.executable, str(PROJECT / "training/nano/make_nano.py"), "--output", str(args.output / "start")],
            check=True,
        )
    if args.processes > 1:
        torch.multiprocessing.spawn(train, (args,), args.processes)
    else:
        train(0, args)


if __name__ == "__main__":
    main()
