"""Examines a checkpoint on the drawn world: python training/evaluate.py --checkpoint FOLDER --json evaluation.json

Fresh pictures and clips (written to h264 files and read back), from seeds that no training uses, are asked about; an answer counts
if it is the right one to the letter. Controls: the same questions with the pixels blanked, and clips with their time stamps
shuffled, show what is known without looking; pictures twice as large and clips up to twice as long as any in training show what
carries over.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

TRAINING = Path(__file__).resolve().parent
PROJECT = TRAINING.parent
sys.path.insert(0, str(TRAINING))
from questions import (  # noqa: E402
    CLIP_TASKS,
    IMAGES_TASK,
    PICTURE_TASKS,
    Question,
    ask_clip,
    ask_images,
    ask_picture,
    sampled_times,
)
from world import Scene, draw_scene, random_clip, random_picture, write_clip  # noqa: E402

TEXTS = ("text", "no text")  # pictures with a sign and without
TASKS = (*(task for task in PICTURE_TASKS if task != "text"), *TEXTS, IMAGES_TASK, *CLIP_TASKS)
TIMED = ("describe clip", "when", "visible at")  # what cannot be answered without time stamps
SECONDS, LONG = (2.0, 20.0), (20.0, 40.0)  # of a clip: as in training, and longer
MAX_NEW_TOKENS = 160


@dataclass(frozen=True)
class Item:
    """A question with the scenes it is about; a clip also has its file, and the rate and times of its sampled frames."""

    question: Question
    scenes: tuple[Scene, ...]
    template: bool
    path: str | None = None
    fps: int = 0
    times: tuple[float, ...] = ()


# ----------------------------------------------------------------------------------------------------------------------
# The questions


def larger(scene: Scene) -> Scene:
    """The same scene on a canvas twice as wide and high."""
    return replace(scene, width=2 * scene.width, height=2 * scene.height)


def picture_items(task: str, n: int, seed, scale=lambda scene: scene) -> list[Item]:
    """`n` questions of the task, each about pictures of its own; every other one with the chat template."""
    lot, items = random.Random(f"pictures {task} {seed}"), []
    while len(items) < n:
        if task == IMAGES_TASK:
            scenes = [random_picture(lot) for _ in range(lot.randint(2, 4))]
            question = ask_images(scenes, lot, lot.random() < 0.5)
        else:
            scenes = [random_picture(lot, sign_share={"text": 1.0, "no text": 0.0}.get(task, 1 / 3))]
            question = ask_picture("text" if task in TEXTS else task, scenes[0], lot, lot.random() < 0.5)
        if question is not None:
            items.append(Item(replace(question, task=task), tuple(map(scale, scenes)), len(items) % 2 == 0))
    return items


def clip_items(tasks, n: int, seed, folder: str, seconds, workers: int) -> dict[str, list[Item]]:
    """`n` questions of each task; a clip is asked one of each at most. Their files are written to `folder`."""
    lot, items, files = random.Random(f"clips {seed} {seconds}"), {task: [] for task in tasks}, []
    lots = {task: random.Random(f"{task} {seed} {seconds}") for task in tasks}  # a task's questions do not hang on the others
    while any(len(found) < n for found in items.values()):
        scene, fps = random_clip(lot, seconds), lot.choice((1, 2))
        times, path = tuple(sampled_times(scene, fps)), os.path.join(folder, f"{len(files)}.mp4")
        wanted = False
        for task, found in items.items():
            question = ask_clip(task, scene, list(times), lots[task], lots[task].random() < 0.5)
            if question is not None and len(found) < n:
                found.append(Item(question, (scene,), len(found) % 2 == 0, path, fps, times))
                wanted = True
        if wanted:
            files.append((scene, path))
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        pool.starmap(write_clip, files, chunksize=8)
    return items


# ----------------------------------------------------------------------------------------------------------------------
# Asking


class Batches(torch.utils.data.Dataset):
    """What the processor makes of batches of items; drawn and decoded in the loader's workers."""

    def __init__(self, processor, batches: list[list[Item]]):
        self.processor, self.batches = processor, batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index: int):
        torch.set_num_threads(1)
        items, texts, images, videos = self.batches[index], [], [], []
        for item in items:
            media = "<|video|>" if item.path else "<|image|>" * len(item.scenes)
            text = media + item.question.prompt
            if item.template:
                turn = [{"role": "user", "content": text}]
                text = self.processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            texts.append(text)
            if item.path:
                videos.append(item.path)
            else:
                images += [draw_scene(scene) for scene in item.scenes]
        rate = {"video_fps": float(items[0].fps)} if videos else {}
        media = {"images": images or None, "videos": videos or None}
        return self.processor(text=texts, **media, **rate, padding=True, padding_side="left", return_tensors="pt")


def blank(inputs, processor) -> None:
    """Every pixel grey."""
    inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])


def shuffle_stamps(inputs, processor) -> None:
    """The stamps of each clip change places; where they differ in length, frames stand elsewhere, and so the frame mask follows."""
    begin, end = processor.time_start_token_id, processor.time_end_token_id
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        starts, ends = ([at for at, token in enumerate(ids) if token == mark] for mark in (begin, end))
        stamps = [ids[start + 1 : stop] for start, stop in zip(starts, ends)]
        random.Random(row).shuffle(stamps)
        out, at = [], 0
        for start, stop, stamp in zip(starts, ends, stamps):
            out += [*ids[at : start + 1], *stamp]
            at = stop
        inputs["input_ids"][row] = torch.tensor(out + ids[at:])
    seen, frames = (inputs["input_ids"] == processor.image_token_id).cumsum(1), inputs["cross_attention_mask"].shape[-1]
    inputs["cross_attention_mask"] = (torch.arange(frames) >= seen[:, :, None])[:, None]  # padding is on the left and sees none


def batches_of(items: list[Item], size: int) -> list[list[Item]]:
    """Batches of at most `size` items; clips of one sampling rate, the longer the fewer."""
    if not items[0].path:
        return [items[at : at + size] for at in range(0, len(items), size)]
    batches: list[list[Item]] = []
    for item in sorted(items, key=lambda item: (item.fps, len(item.times))):
        batch = batches[-1] if batches else []
        if not batch or batch[0].fps != item.fps or (len(batch) + 1) * len(item.times) > 12 * size or len(batch) == size:
            batches.append([])
        batches[-1].append(item)
    return batches


def ask(model, processor, items: list[Item], size: int, workers: int, alter=None) -> list[tuple[Item, str]]:
    """The greedy answers. `alter(inputs, processor)` changes what the model gets to see."""
    batches = batches_of(items, size)
    loader = torch.utils.data.DataLoader(Batches(processor, batches), batch_size=None, num_workers=workers)
    answers = []
    for batch, inputs in zip(batches, loader):
        if alter is not None:
            alter(inputs, processor)
        length = inputs["input_ids"].shape[1]
        with torch.inference_mode():  # not around the loader, whose workers would inherit it, but not the threads that decode there
            tokens = model.generate(**inputs.to(model.device), max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answers += zip(batch, processor.batch_decode(tokens[:, length:], skip_special_tokens=True))
    return answers


# ----------------------------------------------------------------------------------------------------------------------
# Marks


def edits(first: str, second: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first):
        last, row[0] = row[0], i + 1
        for j, b in enumerate(second):
            last, row[j + 1] = row[j + 1], min(row[j + 1] + 1, row[j] + 1, last + (a != b))
    return row[-1]


def seconds_in(text: str) -> float | None:
    found = re.fullmatch(r"(\d+\.\d) seconds", text)
    return float(found[1]) if found else None


def a_frame_off(item: Item, given: str, right: str) -> bool:
    """Whether both are time stamps, and no more than one sampled frame lies between them."""
    stamps = [f"{at:.1f}" for at in item.times]
    given, right = given.removesuffix(" seconds"), right.removesuffix(" seconds")
    return given in stamps and right in stamps and abs(stamps.index(given) - stamps.index(right)) <= 1


def events_in(description: str) -> list[tuple[str, str]] | None:
    """(time, what happens) behind the first clause of a clip's description; None where a clause has no time."""
    clauses = [re.fullmatch(r"at (\d+\.\d) seconds (.*)", clause) for clause in description.split("; ")]
    return [(clause[1], clause[2]) for clause in clauses[1:]] if all(clauses) else None


def marks(item: Item, given: str) -> dict[str, float]:
    """Each measure's mark for one answer, 0 to 1."""
    task, right = item.question.task, item.question.answer
    out = {"exact": float(given == right)}
    if task == "text":
        out["characters"] = max(0.0, 1 - edits(given, right) / len(right))
    elif task == "describe picture":
        out["every object"] = float(given.split(', and the text "')[0] == right.split(', and the text "')[0])
    elif task == "when":
        out["within a frame"] = float(a_frame_off(item, given, right))
    elif task == "duration":
        out["within 0.2 s"] = float(seconds_in(given) is not None and abs(seconds_in(given) - seconds_in(right)) < 0.25)
    elif task == "describe clip":
        ours, theirs = events_in(right), events_in(given)
        out["every event"] = float(ours == theirs)
        alike = theirs is not None and [what for _, what in ours] == [what for _, what in theirs]
        near = alike and all(a_frame_off(item, told, due) for (told, _), (due, _) in zip(theirs, ours))
        out["every event, within a frame"] = float(near)
        out["first frame"] = float(given.split("; ")[0] == right.split("; ")[0])
    return out


def average(answers: list[tuple[Item, str]]) -> dict[str, float]:
    rows = [marks(item, given) for item, given in answers]
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def table(result: dict) -> str:
    """The result as Markdown."""
    columns = ("blanked", "stamps shuffled", "twice as large", "twice as long")
    head = ("task", "n", "exact", "commonest answer", *columns, "other measures")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for task, row in result["tasks"].items():
        cells = [task, str(row["n"]), f"{row['exact']:.1%}", f"{row['commonest answer']:.1%}"]
        cells += [f"{row[column]['exact']:.1%}" if column in row else "" for column in columns]
        cells.append(", ".join(f"{name} {value:.1%}" for name, value in row["measures"].items() if name != "exact"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description="Examine a checkpoint on the drawn world.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--checkpoint", default=str(PROJECT / "checkpoints" / "moss-vl-nano"))
    parser.add_argument("--json", type=Path, help="file to write the table to")
    parser.add_argument("--answers", type=Path, help="JSONL file to write every question with its answers to")
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=f"some of: {', '.join(TASKS)}"
    )
    parser.add_argument("--n", type=int, default=500, help="questions a task")
    parser.add_argument("--control-n", type=int, default=200, help="questions a task for each control; 0 leaves the controls out")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes that draw and decode")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float16"))
    args = parser.parse_args(arguments)
    for name, least in (("n", 1), ("control_n", 0), ("batch", 1), ("workers", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected at least {least}")
    for path in filter(None, (args.json, args.answers)):
        if not path.resolve().parent.is_dir():
            parser.error(f"the folder of {path} does not exist; make it first")
        if path.is_dir():
            parser.error(f"{path} is a folder; expected a file to write")
    if args.json and args.answers and args.json.resolve() == args.answers.resolve():
        parser.error(f"--json and --answers are both {args.json}; expected two files")

    from transformers import AutoModelForCausalLM, AutoProcessor

    began = time.monotonic()
    processor = AutoProcessor.from_pretrained(args.checkpoint, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, trust_remote_code=True, dtype=getattr(torch, args.dtype))
    model = model.to(args.device).eval()
    controls = min(args.control_n, args.n)
    result = {
        "checkpoint": args.checkpoint, "parameters": model.num_parameters(), "dtype": args.dtype, "seed": args.seed,
        "control n": controls, "tasks": {},
    }  # fmt: skip
    if args.answers:
        args.answers.write_text("", encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        clip_tasks = [task for task in args.tasks if task in CLIP_TASKS]
        clips, long_clips = {}, {}
        if clip_tasks:
            os.makedirs(os.path.join(folder, "long"))
            clips = clip_items(clip_tasks, args.n, args.seed, folder, SECONDS, args.workers)
            if controls:
                long_clips = clip_items(clip_tasks, controls, args.seed, os.path.join(folder, "long"), LONG, args.workers)

        def answers_to(task, column, items, alter=None):
            answers = ask(model, processor, items, args.batch, args.workers, alter)
            if args.answers:
                with args.answers.open("a", encoding="utf-8") as file:
                    for item, given in answers:
                        asked = {"task": task, "column": column, "prompt": item.question.prompt, "template": item.template}
                        file.write(json.dumps({**asked, "right": item.question.answer, "given": given}, ensure_ascii=False) + "\n")
            return average(answers)

        for task in args.tasks:
            items = clips[task] if task in clips else picture_items(task, args.n, args.seed)
            common = Counter(item.question.answer for item in items).most_common(1)[0][1] / len(items)
            measures = answers_to(task, "", items)
            row = {"n": len(items), "exact": measures["exact"], "commonest answer": common, "measures": measures}
            if controls:
                fewer = items[:controls]
                row["blanked"] = answers_to(task, "blanked", fewer, blank)
                if task in TIMED:
                    row["stamps shuffled"] = answers_to(task, "stamps shuffled", fewer, shuffle_stamps)
                if task in clips:
                    row["twice as long"] = answers_to(task, "twice as long", long_clips[task])
                else:
                    row["twice as large"] = answers_to(task, "twice as large", picture_items(task, controls, args.seed, larger))
            result["tasks"][task] = row
            print(f"{time.monotonic() - began:6.0f} s  {task}: {row['exact']:.1%}", file=sys.stderr, flush=True)
            if args.json:
                args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
