"""Examines a checkpoint that watches streams: python training/nano/evaluate_streams.py --checkpoint FOLDER

New clips are watched frame by frame, with requests of the user, from seeds that no training uses. What a greedy model
says in a realtime session is found in a batch: one forward over a whole stream with the right words gives what the
model writes in each place; from the first place where it writes something else, the stream is laid out anew. The last
forward agrees in all places, so that the words are those of a session that writes at the same pace. Controls are clips
of 60 instead of 20 seconds, and blanked pixels.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moss_vl.training.nano.lessons import Drawn, compressed
from moss_vl.training.nano.streams import (
    DECISION,
    Player,
    QuickProtocol,
    Stream,
    agree,
    paced_budgets,
)
from moss_vl.training.nano.watching import Request, Requests, Script, watched_clip
from moss_vl.training.nano.world import Scene, draw_background, draw_scene


PROJECT = Path(__file__).resolve().parents[2]
EVENT_TASKS = {"appears": "appears", "disappears": "disappears", "changes color": "changes", "moves": "moves"}
TASKS = (*EVENT_TASKS, "never comes", "two requests", "new request", "describe", "see now", "past")
SECONDS, LONG_SECONDS = 20, 60
LONGER, BLANKED = CONTROLS = ("60 seconds", "blanked")
TOKENS_PER_SECOND = 12.0
MEASURES = ("exact", "within a frame", "words", "false alarms")
FRAMES_PER_STREAM = 24  # of a batch, on average at most


@dataclass(frozen=True)
class Item:
    """A stream of an examination. `column`: the control that it belongs to, if any."""

    task: str
    script: Script
    column: str = ""


# streams


def task_script(task: str, rng: random.Random, scene: Scene, times: list[float]) -> Script | None:
    """A script of the task about a clip; None if the clip offers none."""
    ask, frame = Requests(rng, scene, times), rng.randrange(2, len(times))
    requests: list[Request | None] = [ask.describe()]
    if task in EVENT_TASKS:
        if EVENT_TASKS[task] not in {event.kind for event in ask.events}:
            return None
        requests = [ask.watch(kind=EVENT_TASKS[task])]
    elif task == "never comes":
        requests = [ask.watch(comes=False)]
    elif task == "two requests":
        requests = [ask.watch(count=2)]
    elif task == "new request":
        requests = [ask.watch(), ask.watch(frame)]
    elif task == "see now":
        requests = [ask.watch(comes=False), ask.now(frame)]
    elif task == "past":
        requests = [ask.watch(comes=False), ask.past(frame)]
    if None in requests or task == "two requests" and len(requests[0].watches) < 2:
        return None
    return Script(scene, tuple(times), tuple(requests))


def examination(tasks, n: int, controls: int, seed) -> list[Item]:
    """`n` streams of each task, at most one of each about a clip, and `controls` of each control."""
    items = task_items(tasks, n, seed, SECONDS, "")
    if controls:
        kept = {task: [item for item in items if item.task == task][:controls] for task in tasks}
        items += [Item(item.task, item.script, BLANKED) for some in kept.values() for item in some]
        items += task_items(tasks, controls, seed, LONG_SECONDS, LONGER)
    return items


def task_items(tasks, n: int, seed, seconds: int, column: str) -> list[Item]:
    rng, found = random.Random(f"streams {seed} {seconds}"), {task: [] for task in tasks}
    rngs = {task: random.Random(f"{task} {seed} {seconds}") for task in tasks}
    while any(len(items) < n for items in found.values()):
        scene, rate = watched_clip(rng, seconds), rng.choice((1, 2))
        times = [number / rate for number in range(seconds * rate)]
        for task, items in found.items():
            script = task_script(task, rngs[task], scene, times) if len(items) < n else None
            if script is not None:
                items.append(Item(task, script, column))
    return [item for items in found.values() for item in items]


# what a model says


def grouped(items: list[Item]) -> list[list[Item]]:
    """Items about the same clip together, short clips first."""
    groups: dict[tuple, list[Item]] = {}
    for item in items:
        groups.setdefault((item.script.scene, item.script.times), []).append(item)
    return sorted(groups.values(), key=lambda group: len(group[0].script.times))


class Clips(torch.utils.data.Dataset):
    """The drawn frames of each group's clip."""

    def __init__(self, processor, groups: list[list[Item]]):
        self.processor, self.groups = processor.image_processor, groups

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Drawn:
        script = self.groups[index][0].script
        return draw_frames(self.processor, script.scene, script.times)


def draw_frames(image_processor, scene: Scene, times) -> Drawn:
    """The frames of a clip, as JPEG files that a camera would send."""
    rng, background, drawn, moments = random.Random(scene.grain), draw_background(scene), {}, []
    for time in times:
        things = tuple(scene.at(time))
        if things not in drawn:
            drawn[things] = len(drawn), compressed(rng, draw_scene(scene, time, background))
        moments.append(drawn[things][0])
    read = image_processor.preprocess([picture for _, picture in drawn.values()], do_normalize=False)
    pixels, grids = read["pixel_values"], read["image_grid_thw"].tolist()
    return Drawn(pixels.view(len(grids), -1, pixels.shape[1]), tuple(grids[0][1:]), moments)


@dataclass(frozen=True, eq=False)
class Row:
    """A stream with its encoded frames: features [frames * tokens, D], grid of patches."""

    item: Item
    features: torch.Tensor
    grid: tuple[int, int]


class Watcher:
    """A model with its processor."""

    def __init__(self, model, processor, pace: float = TOKENS_PER_SECOND):
        self.model, self.pace = model, pace
        self.protocol = QuickProtocol(processor, model.config.text_config.vocab_size)

    def player(self, script: Script, spoken=()) -> Player:
        return Player(self.protocol, script, paced_budgets(script.times, self.pace), spoken=spoken)

    @torch.inference_mode()
    def rows(self, group: list[Item], drawn: Drawn) -> Iterator[Row]:
        """The rows of a group, whose frames are encoded once."""
        features = {}
        for item in group:
            blank = item.column == BLANKED
            if blank not in features:
                pixels = drawn.pixels[:1] * 0 + 128 if blank else drawn.pixels
                moments = [0] * len(drawn.moments) if blank else drawn.moments
                features[blank] = self.encode(pixels, drawn.grid)[moments].flatten(0, 1)
            yield Row(item, features[blank], drawn.grid)

    def encode(self, pixels: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """uint8 pixels [pictures, patches, values] -> [pictures, tokens, D]."""
        mean = [[0.5, 0.5, 0.5]] * len(pixels)
        grids = torch.tensor([[1, *grid]] * len(pixels))
        flat = pixels.flatten(0, 1).to(self.model.device)
        return self.model.get_image_features(flat, grids, image_mean=mean, image_std=mean).pooler_output.unflatten(
            0, (len(pixels), -1)
        )

    @torch.inference_mode()
    def streams(self, rows: list[Row]) -> list[Stream]:
        """What the model says, one stream per row."""
        spoken, said = dict.fromkeys(range(len(rows)), ()), {}
        while spoken:
            laid = {number: self.player(rows[number].item.script, begun).play() for number, begun in spoken.items()}
            chosen = self.choose([rows[number] for number in laid], list(laid.values()))
            begun = {
                number: agree(stream, tokens) for (number, stream), tokens in zip(laid.items(), chosen, strict=True)
            }
            said |= {number: laid[number] for number, tokens in begun.items() if tokens is None}
            spoken = {number: tokens for number, tokens in begun.items() if tokens is not None}
        return [said[number] for number in range(len(rows))]

    def choose(self, rows: list[Row], streams: list[Stream]) -> list[list[int]]:
        """For each stream, the tokens that the model writes in place of the written ones."""
        length = max(len(stream.ids) for stream in streams)
        ids = torch.tensor([stream.ids + [0] * (length - len(stream.ids)) for stream in streams])
        mask = torch.tensor([[1] * len(one.ids) + [0] * (length - len(one.ids)) for one in streams])
        grids = torch.tensor([[len(stream.pads), *row.grid] for row, stream in zip(rows, streams, strict=True)])
        out = self.model(
            input_ids=ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            image_features=torch.cat([row.features for row in rows]),
            grid_thw=grids,
            media_nums_per_sample=[1] * len(rows),
            use_cache=False,
        )
        best = out.logits.argmax(-1).cpu()
        return [
            best[number, [one.index - 1 for one in stream.written]].tolist() for number, stream in enumerate(streams)
        ]


def ask(model, processor, items: list[Item], size: int, workers: int) -> Iterator[tuple[Item, Stream]]:
    """What the model says in each stream, in batches of about `size` streams; `workers` processes draw."""
    watcher, groups = Watcher(model, processor), grouped(items)
    loader = torch.utils.data.DataLoader(
        Clips(processor, groups),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # remote code cannot be pickled
    )
    rows: list[Row] = []
    for group, drawn in zip(groups, loader, strict=True):
        rows += watcher.rows(group, drawn)
        if sum(len(row.item.script.times) for row in rows) > size * FRAMES_PER_STREAM:
            yield from zip([row.item for row in rows], watcher.streams(rows), strict=True)
            rows = []
    yield from zip([row.item for row in rows], watcher.streams(rows), strict=True)


# scores


def replies(stream: Stream, protocol) -> list[tuple[int, str]]:
    """(frame after which it begins, words) of each reply."""
    found: list[tuple[int, list[int]]] = []
    for one in stream.written:
        token = stream.ids[one.index]
        if one.role == DECISION and token != stream.silence and not one.continues:
            found.append((one.frame, []))
        if found and token not in protocol.tokens.special:
            found[-1][1].append(token)
    return [(frame, protocol.tokenizer.decode(ids)) for frame, ids in found]


def scores(given: list[tuple[int, str]], right: list[tuple[int, str]]) -> dict[str, float]:
    """The scores of the replies of a stream.

    "exact": all replies are right and at the right frames. "within a frame": there are as many replies as expected,
    none too early or more than a frame late. "words": of replies within a frame, all words are right. "false alarms":
    there are more replies than expected.
    """
    out = {"exact": float(given == right), "false alarms": float(len(given) > len(right))}
    near = len(given) == len(right) and all(
        0 <= one[0] - other[0] <= 1 for one, other in zip(given, right, strict=True)
    )
    if right:
        out["within a frame"] = float(near)
        if near:
            out["words"] = float([words for _, words in given] == [words for _, words in right])
    return out


def average(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each measure over the streams that have it."""
    values = {name: [row[name] for row in rows if name in row] for name in MEASURES}
    return {"n": len(rows)} | {name: sum(found) / len(found) for name, found in values.items() if found}


def table(result: dict) -> str:
    """The result as Markdown."""
    head = ("watching", "n", *MEASURES, *(f"{measure}, {column}" for column in CONTROLS for measure in MEASURES[:2]))
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for task, row in result["watching"].items():
        cells = [row[measure] if measure in row else None for measure in MEASURES]
        cells += [row.get(column, {}).get(measure) for column in CONTROLS for measure in MEASURES[:2]]
        lines.append(
            "| " + " | ".join([task, str(row["n"]), *("" if cell is None else f"{cell:.1%}" for cell in cells)]) + " |"
        )
    return "\n".join(lines)


def examine(model, processor, items: list[Item], size: int, workers: int, answers: Path | None = None) -> dict:
    """The rows of all tasks. `answers`: a JSONL file to write the replies to."""
    protocol = QuickProtocol(processor, model.config.text_config.vocab_size)
    rows: dict[tuple[str, str], list[dict]] = {}
    lines = []
    for item, stream in ask(model, processor, items, size, workers):
        script = item.script
        right = replies(Player(protocol, script, paced_budgets(script.times, TOKENS_PER_SECOND)).play(), protocol)
        given = replies(stream, protocol)
        rows.setdefault((item.task, item.column), []).append(scores(given, right))
        prompts = [(request.frame, request.prompt) for request in script.requests]
        lines.append({"task": item.task, "column": item.column, "prompts": prompts, "right": right, "given": given})
    if answers:
        answers.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    found = [task for task in TASKS if (task, "") in rows]
    return {
        task: average(rows[task, ""])
        | {column: average(rows[task, column]) for column in CONTROLS if (task, column) in rows}
        for task in found
    }


# the command


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Examine a checkpoint that watches streams.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--checkpoint", default=str(PROJECT / "checkpoints" / "moss-vl-nano"))
    parser.add_argument("--json", type=Path, help="file to write the table to")
    parser.add_argument("--answers", type=Path, help="JSONL file to write the replies of every stream to")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--n", type=int, default=500, help="streams per task")
    parser.add_argument("--control-n", type=int, default=200, help="streams per task and control; 0: no controls")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that draw")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="to compute in")
    args = parser.parse_args(arguments)
    for name, least in (("n", 1), ("control_n", 0), ("batch", 1), ("workers", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected at least {least}")
    for path in filter(None, (args.json, args.answers)):
        if not path.resolve().parent.is_dir():
            parser.error(f"the folder of {path} does not exist; make it first")
    return args


def main(arguments=None):
    args = parse(arguments)

    from transformers import AutoModelForCausalLM, AutoProcessor

    processor = AutoProcessor.from_pretrained(args.checkpoint, trust_remote_code=True)
    attention = "eager" if args.device.startswith("cuda") else None  # other kernels plan for each new length
    model = AutoModelForCausalLM.from_pretrained(
        args.checkpoint, trust_remote_code=True, dtype=getattr(torch, args.dtype), attn_implementation=attention
    )
    model = model.to(args.device).eval()
    items = examination(args.tasks, args.n, min(args.control_n, args.n), args.seed)
    watching = examine(model, processor, items, args.batch, args.workers, args.answers)
    result = {"checkpoint": args.checkpoint, "dtype": args.dtype, "seed": args.seed, "watching": watching}
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
