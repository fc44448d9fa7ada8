"""Examines a checkpoint on the drawn world: python training/nano/evaluate.py --checkpoint FOLDER --json evaluation.json

Fresh pictures and clips (written to h264 files and read back), from seeds that no training uses, are asked about; an answer counts
if it is the right one to the letter. Controls: the same questions with the pixels blanked, and clips with their time stamps
shuffled, show what is known without looking; pictures twice as large and clips up to twice as long as any in training show what
carries over.

Most of the time goes into drawing, reading and encoding what is to be seen. So that is done once for all that is asked about it,
controls included, and by several processes side by side.
"""

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moss_vl.training.nano.questions import (
    CLIP_TASKS,
    IMAGES_TASK,
    PICTURE_TASKS,
    Question,
    ask_clip,
    ask_images,
    ask_picture,
    sampled_times,
)
from moss_vl.training.nano.world import Scene, draw_scene, random_clip, random_picture, write_clip


PROJECT = Path(__file__).resolve().parents[2]
TEXTS = ("text", "no text")  # pictures with a sign and without
TASKS = (*(task for task in PICTURE_TASKS if task != "text"), *TEXTS, IMAGES_TASK, *CLIP_TASKS)
TIMED = ("describe clip", "when", "visible at")  # what cannot be answered without time stamps
SECONDS, LONG = (2.0, 20.0), (20.0, 40.0)  # of a clip: as in training, and longer
BLANKED, SHUFFLED, LARGER, LONGER = CONTROLS = ("blanked", "stamps shuffled", "twice as large", "twice as long")
FRAMES = 12  # for each question of a batch, at most, that are read before it is asked
MAX_NEW_TOKENS = 160


@dataclass(frozen=True)
class Item:
    """A question with the scenes it is about; a clip also has the rate and times of its sampled frames. `column` is the control that it
    is asked for, if any."""

    question: Question
    scenes: tuple[Scene, ...]
    template: bool
    fps: int = 0
    times: tuple[float, ...] = ()
    column: str = ""


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


def clip_items(tasks, n: int, seed, seconds) -> dict[str, list[Item]]:
    """`n` questions of each task; a clip is asked one of each at most."""
    lot, items = random.Random(f"clips {seed} {seconds}"), {task: [] for task in tasks}
    lots = {
        task: random.Random(f"{task} {seed} {seconds}") for task in tasks
    }  # a task's questions do not hang on the others
    while any(len(found) < n for found in items.values()):
        scene, fps = random_clip(lot, seconds), lot.choice((1, 2))
        times = tuple(sampled_times(scene, fps))
        for task, found in items.items():
            question = ask_clip(task, scene, list(times), lots[task], lots[task].random() < 0.5)
            if question is not None and len(found) < n:
                found.append(Item(question, (scene,), len(found) % 2 == 0, fps, times))
    return items


def examination(tasks, n: int, controls: int, seed) -> dict[str, dict[str, list[Item]]]:
    """Task -> column of the table ("" is the plain one) -> `n` questions, or `controls` for each control."""
    clip_tasks = [task for task in tasks if task in CLIP_TASKS]
    clips, long_clips = clip_items(clip_tasks, n, seed, SECONDS), clip_items(clip_tasks, controls, seed, LONG)
    asked = {}
    for task in tasks:
        plain = clips[task] if task in clips else picture_items(task, n, seed)
        asked[task] = {"": plain}
        if controls:
            columns = {BLANKED: plain[:controls]}
            if task in TIMED:
                columns[SHUFFLED] = plain[:controls]
            if task in clips:
                columns[LONGER] = long_clips[task]
            else:
                columns[LARGER] = picture_items(task, controls, seed, larger)
            asked[task] |= {
                column: [replace(item, column=column) for item in items] for column, items in columns.items()
            }
    return asked


# Asking


def lots_of(items: list[Item], size: int) -> list[list[list[Item]]]:
    """Lots of what is read and encoded before it is asked about: at most `size` sights (what the same items are about) of at most
    FRAMES * `size` frames in all. Pictures come first, then clips by length; a lot -> its sights -> the items about each."""
    sights: dict[tuple, list[Item]] = {}
    for item in items:
        sights.setdefault((item.scenes, item.fps), []).append(item)
    lots: list[list[list[Item]]] = []
    for about in sorted(sights.values(), key=lambda about: len(about[0].times)):
        frames = max(len(about[0].times), 1)
        if not lots or len(lots[-1]) == size or (len(lots[-1]) + 1) * frames > FRAMES * size:
            lots.append([])
        lots[-1].append(about)
    return lots


def placeholders(item: Item) -> str:
    return "<|video|>" if item.fps else "<|image|>" * len(item.scenes)


def look(processor, item: Item):
    """What the processor makes of the item's pictures, or of its clip, which is written to a file: `pixel_values`, `grid_thw`, and as
    `input_ids` what stands for them in a text."""
    text = placeholders(item)
    if not item.fps:
        return processor(text=text, images=[draw_scene(scene) for scene in item.scenes], return_tensors="pt")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "clip.mp4")
        write_clip(*item.scenes, path)
        return processor(text=text, videos=path, video_fps=float(item.fps), num_extract_threads=1, return_tensors="pt")


def prompt_ids(processor, item: Item, media_ids: list[int]) -> list[int]:
    """The tokens of the whole prompt, with `media_ids` for what is to be seen."""
    text = placeholders(item) + item.question.prompt
    if item.template:
        turn = [{"role": "user", "content": text}]
        text = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    before, behind = (processor.tokenizer(part)["input_ids"] for part in text.split(placeholders(item)))
    return before + media_ids + behind


def shuffled(ids: list[int], begin: int, end: int, seed) -> list[int]:
    """The stamps, which stand between the tokens `begin` and `end`, change places; frames move along where they differ in length."""
    starts, ends = ([at for at, token in enumerate(ids) if token == mark] for mark in (begin, end))
    stamps = [ids[start + 1 : stop] for start, stop in zip(starts, ends, strict=True)]
    random.Random(seed).shuffle(stamps)
    out, at = [], 0
    for start, stop, stamp in zip(starts, ends, stamps, strict=True):
        out += [*ids[at : start + 1], *stamp]
        at = stop
    return out + ids[at:]


@dataclass(frozen=True, eq=False)
class Row:
    """A prompt ready to be answered: its item, and whose place among the items of a lot it has."""

    place: tuple[int, int]  # sight, number among the items about it
    item: Item
    ids: list[int]
    grids: torch.Tensor  # [media, 3]
    tokens: torch.Tensor  # [V, D], of the vision encoder


class Examinee:
    """A model with its processor."""

    def __init__(self, model, processor):
        self.model, self.processor = model, processor
        self.grey: dict[tuple[int, int], torch.Tensor] = {}  # patch rows and columns -> tokens of a grey frame

    @torch.inference_mode()
    def answers(self, lot: list[list[Item]], seen, size: int) -> list[tuple[int, int, str]]:
        """The greedy answers of a lot, as (sight, number among the items about it, answer). `seen`: what `look` gives for each sight.

        The rows of a batch, at most `size`, have right answers of about one length: all wait for the longest.
        """
        rows = [
            row
            for sight, (about, inputs) in enumerate(zip(lot, seen, strict=True))
            for row in self.rows(sight, about, inputs)
        ]
        rows.sort(key=lambda row: (len(row.item.question.answer), len(row.ids)))
        batches = [rows[at : at + size] for at in range(0, len(rows), size)]
        return [
            (*row.place, answer) for batch in batches for row, answer in zip(batch, self.generate(batch), strict=True)
        ]

    def rows(self, sight: int, about: list[Item], inputs) -> Iterator[Row]:
        """What is asked about one sight, which is encoded once. `inputs`: what `look` gives."""
        pixels, grids, media_ids = (
            inputs["pixel_values"].to(self.model.device),
            inputs["grid_thw"],
            inputs["input_ids"][0].tolist(),
        )
        tokens = self.model.model.visual(pixels, grids)
        for number, item in enumerate(about):
            ids = prompt_ids(self.processor, item, media_ids)
            if item.column == SHUFFLED:
                marks = self.processor.time_start_token_id, self.processor.time_end_token_id
                ids = shuffled(ids, *marks, seed=item.question.prompt)
            yield Row(
                (sight, number), item, ids, grids, self.blank(pixels, grids) if item.column == BLANKED else tokens
            )

    def blank(self, pixels: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """Tokens [V, D] as of `pixels` [P, values], but every pixel grey. The encoder sees each frame by itself: one of a size does."""
        parts = []
        for frames, rows, columns in grids.tolist():
            if (rows, columns) not in self.grey:
                grey = pixels.new_zeros(rows * columns, pixels.shape[1])
                self.grey[rows, columns] = self.model.model.visual(grey, [[1, rows, columns]])
            parts.append(self.grey[rows, columns].repeat(frames, 1))
        return torch.cat(parts)

    def generate(self, rows: list[Row]) -> list[str]:
        """The greedy answers of one batch."""
        length, pad = max(len(row.ids) for row in rows), self.processor.tokenizer.pad_token_id
        padding = [length - len(row.ids) for row in rows]  # on the left
        ids = torch.tensor([[pad] * space + row.ids for space, row in zip(padding, rows, strict=True)])
        attended = torch.tensor([[0] * space + [1] * len(row.ids) for space, row in zip(padding, rows, strict=True)])
        out = self.model.generate(
            input_ids=ids.to(self.model.device), attention_mask=attended.to(self.model.device),
            image_features=torch.cat([row.tokens for row in rows]), grid_thw=torch.cat([row.grids for row in rows]),
            media_nums_per_sample=[len(row.grids) for row in rows], max_new_tokens=MAX_NEW_TOKENS, do_sample=False,
        )  # fmt: skip
        return self.processor.batch_decode(out[:, length:], skip_special_tokens=True)


class Lots(torch.utils.data.Dataset):
    """What the loader's workers find out about each lot: where the model is on a CPU the answers, else what is seen."""

    def __init__(self, examinee: Examinee, lots: list[list[list[Item]]], size: int):
        self.examinee, self.lots, self.size = examinee, lots, size
        self.answered = examinee.model.device.type == "cpu"

    def __len__(self):
        return len(self.lots)

    def __getitem__(self, index: int):
        lot = self.lots[index]
        seen = (look(self.examinee.processor, about[0]) for about in lot)
        return self.examinee.answers(lot, seen, self.size) if self.answered else list(seen)


def ask(model, processor, items: list[Item], size: int, workers: int) -> Iterator[tuple[Item, str]]:
    """The greedy answers, in batches of `size`, lot by lot. Each worker is a process with one thread: for so small a model several of
    them are faster than several threads."""
    examinee, lots = Examinee(model, processor), lots_of(items, size)
    dataset, context = Lots(examinee, lots, size), "fork" if workers else None  # the model's code is not to be pickled
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=workers, multiprocessing_context=context
    )
    for lot, found in zip(lots, loader, strict=True):
        for sight, number, answer in found if dataset.answered else examinee.answers(lot, found, size):
            yield lot[sight][number], answer


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
        out["within 0.2 s"] = float(
            seconds_in(given) is not None and abs(seconds_in(given) - seconds_in(right)) < 0.25
        )
    elif task == "describe clip":
        ours, theirs = events_in(right), events_in(given)
        out["every event"] = float(ours == theirs)
        alike = theirs is not None and [what for _, what in ours] == [what for _, what in theirs]
        near = alike and all(a_frame_off(item, told, due) for (told, _), (due, _) in zip(theirs, ours, strict=True))
        out["every event, within a frame"] = float(near)
        out["first frame"] = float(given.split("; ")[0] == right.split("; ")[0])
    return out


def average(answers: list[tuple[Item, str]]) -> dict[str, float]:
    rows = [marks(item, given) for item, given in answers]
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def table(result: dict) -> str:
    """The result as Markdown."""
    head = ("task", "n", "exact", "commonest answer", *CONTROLS, "other measures")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for task, row in result["tasks"].items():
        cells = [task, str(row["n"]), f"{row['exact']:.1%}", f"{row['commonest answer']:.1%}"]
        cells += [f"{row[column]['exact']:.1%}" if column in row else "" for column in CONTROLS]
        cells.append(", ".join(f"{name} {value:.1%}" for name, value in row["measures"].items() if name != "exact"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def row_of(columns: dict[str, list[tuple[Item, str]]]) -> dict:
    """A task's row of the result, of its answers in each column."""
    answers = columns[""]
    common = Counter(item.question.answer for item, _ in answers).most_common(1)[0][1] / len(answers)
    measures = average(answers)
    row = {"n": len(answers), "exact": measures["exact"], "commonest answer": common, "measures": measures}
    return row | {column: average(columns[column]) for column in columns if column}


def answer_lines(columns: dict[str, list[tuple[Item, str]]]) -> str:
    """JSONL of every question of a task with its answer."""
    return "".join(
        json.dumps({"task": item.question.task, "column": column, "prompt": item.question.prompt, "template": item.template,
                    "right": item.question.answer, "given": given}, ensure_ascii=False) + "\n"
        for column, answers in columns.items()
        for item, given in answers
    )  # fmt: skip


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
    parser.add_argument(
        "--control-n", type=int, default=200, help="questions a task for each control; 0 leaves the controls out"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes that draw, read and, on a CPU, answer"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32", "float16"), help="to compute in; by default the faster one"
    )
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

    from moss_vl.training.nano.train_nano import faster_dtype

    began = time.monotonic()
    args.dtype = args.dtype or faster_dtype(args.device)
    processor = AutoProcessor.from_pretrained(args.checkpoint, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        args.checkpoint, trust_remote_code=True, dtype=getattr(torch, args.dtype)
    )
    model = model.to(args.device).eval()
    controls = min(args.control_n, args.n)
    result = {
        "checkpoint": args.checkpoint, "parameters": model.num_parameters(), "dtype": args.dtype, "seed": args.seed,
        "control n": controls, "tasks": {},
    }  # fmt: skip
    if args.answers:
        args.answers.write_text("", encoding="utf-8")
    asked = examination(args.tasks, args.n, controls, args.seed)
    left = {task: sum(map(len, columns.values())) for task, columns in asked.items()}
    given, waiting, everything = (
        {},
        list(asked),
        [item for task in asked.values() for items in task.values() for item in items],
    )
    for item, answer in ask(model, processor, everything, args.batch, args.workers):
        given[item] = answer
        left[item.question.task] -= 1
        while waiting and not left[waiting[0]]:
            task = waiting.pop(0)
            columns = {column: [(item, given[item]) for item in items] for column, items in asked[task].items()}
            result["tasks"][task] = row_of(columns)
            if args.answers:
                with args.answers.open("a", encoding="utf-8") as file:
                    file.write(answer_lines(columns))
            print(
                f"{time.monotonic() - began:6.0f} s  {task}: {result['tasks'][task]['exact']:.1%}",
                file=sys.stderr,
                flush=True,
            )
            if args.json:
                args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
