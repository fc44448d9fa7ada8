"""Examines a checkpoint on the drawn world: python training/nano/evaluate.py --checkpoint FOLDER --json table.json

It asks questions about new pictures and clips (written to h264 files and read back), from seeds that no training uses.
An answer counts if it equals the right one. Controls repeat questions with blanked pixels and with shuffled time
stamps, which shows how much is guessed, and ask about pictures twice as large and clips up to twice as long as in
training, which shows what generalises.

Most time goes into drawing, reading and encoding media. This is done once for all questions about the same media,
controls included, in several processes.
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

from moss_vl.training.nano.lessons import compressed
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
from moss_vl.training.nano.world import (
    Scene,
    draw_background,
    draw_scene,
    random_clip,
    random_picture,
    write_clip,
)


PROJECT = Path(__file__).resolve().parents[2]
TEXTS = ("text", "no text")  # about pictures with a sign and without
TASKS = (*(task for task in PICTURE_TASKS if task != "text"), *TEXTS, IMAGES_TASK, *CLIP_TASKS)
TIMED = ("describe clip", "when", "visible at")  # tasks that need time stamps
SECONDS, LONG = (2.0, 20.0), (20.0, 40.0)  # duration of clips: as in training, and longer
BLANKED, SHUFFLED, LARGER, LONGER = CONTROLS = ("blanked", "stamps shuffled", "twice as large", "twice as long")
FRAMES_PER_QUESTION = 12  # of a batch, at most, that are read at once
MAX_NEW_TOKENS = 160


@dataclass(frozen=True)
class Item:
    """A question with its scenes. `column` is the control that it belongs to, if any."""

    question: Question
    scenes: tuple[Scene, ...]
    template: bool
    fps: int = 0  # of the sampled frames of a clip
    times: tuple[float, ...] = ()  # of the sampled frames of a clip
    column: str = ""


# questions


def larger(scene: Scene) -> Scene:
    """The scene on a canvas of twice the width and height."""
    return replace(scene, width=2 * scene.width, height=2 * scene.height)


def picture_items(task: str, n: int, seed, scale=lambda scene: scene) -> list[Item]:
    """`n` questions of the task, each about its own pictures; every other one with the chat template."""
    rng, items = random.Random(f"pictures {task} {seed}"), []
    while len(items) < n:
        if task == IMAGES_TASK:
            scenes = [random_picture(rng) for _ in range(rng.randint(2, 4))]
            question = ask_images(scenes, rng, rng.random() < 0.5)
        else:
            scenes = [random_picture(rng, sign_share={"text": 1.0, "no text": 0.0}.get(task, 1 / 3))]
            question = ask_picture("text" if task in TEXTS else task, scenes[0], rng, rng.random() < 0.5)
        if question is not None:
            items.append(Item(replace(question, task=task), tuple(map(scale, scenes)), len(items) % 2 == 0))
    return items


def clip_items(tasks, n: int, seed, seconds) -> dict[str, list[Item]]:
    """`n` questions of each task, at most one of each about a clip."""
    rng, items = random.Random(f"clips {seed} {seconds}"), {task: [] for task in tasks}
    # with an rng per task, its questions do not depend on the other tasks
    rngs = {task: random.Random(f"{task} {seed} {seconds}") for task in tasks}
    while any(len(found) < n for found in items.values()):
        scene, fps = random_clip(rng, seconds), rng.choice((1, 2))
        times = tuple(sampled_times(scene, fps))
        for task, found in items.items():
            question = ask_clip(task, scene, list(times), rngs[task], rngs[task].random() < 0.5)
            if question is not None and len(found) < n:
                found.append(Item(question, (scene,), len(found) % 2 == 0, fps, times))
    return items


def examination(tasks, n: int, controls: int, seed) -> dict[str, dict[str, list[Item]]]:
    """Task -> column of the table -> `n` questions for the column "" without control, else `controls`."""
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


# answers


def chunk_items(items: list[Item], size: int) -> list[list[list[Item]]]:
    """Chunks of media that are read and encoded together -> groups of items about the same media -> items.

    A chunk has at most `size` groups with FRAMES_PER_QUESTION * `size` frames in all. Pictures come first, then clips
    by length.
    """
    groups: dict[tuple, list[Item]] = {}
    for item in items:
        groups.setdefault((item.scenes, item.fps), []).append(item)
    chunks: list[list[list[Item]]] = []
    for group in sorted(groups.values(), key=lambda group: len(group[0].times)):
        frames = max(len(group[0].times), 1)
        full = not chunks or len(chunks[-1]) == size
        if full or (len(chunks[-1]) + 1) * frames > FRAMES_PER_QUESTION * size:
            chunks.append([])
        chunks[-1].append(group)
    return chunks


def placeholders(item: Item) -> str:
    return "<|video|>" if item.fps else "<|image|>" * len(item.scenes)


def encode_media(processor, item: Item, drawn: bool = False):
    """`pixel_values`, `grid_thw` and `input_ids` of an item's media alone. A clip is written to a file first, unless
    its frames are to be taken as `drawn`."""
    text = placeholders(item)
    if not item.fps:
        return processor(text=text, images=[draw_scene(scene) for scene in item.scenes], return_tensors="pt")
    if drawn:
        return drawn_clip(processor, item)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "clip.mp4")
        write_clip(*item.scenes, path)
        return processor(text=text, videos=path, video_fps=float(item.fps), num_extract_threads=1, return_tensors="pt")


def drawn_clip(processor, item: Item) -> dict:
    """What `encode_media` returns for a clip, of its sampled frames as JPEG pictures."""
    [scene], videos = item.scenes, processor.video_processor
    rng, background, pictures = random.Random(scene.grain), draw_background(scene), {}  # things -> picture
    shown = [tuple(scene.at(moment)) for moment in item.times]
    for moment, things in zip(item.times, shown, strict=True):
        if things not in pictures:
            pictures[things] = compressed(rng, draw_scene(scene, moment, background))
    limits = {"min_pixels": videos.min_pixels, "max_pixels": videos.max_pixels}
    read = processor.image_processor.preprocess(list(pictures.values()), **limits, return_tensors="pt")
    patches = read["pixel_values"].unflatten(0, (len(pictures), -1))
    places = dict(zip(pictures, range(len(pictures)), strict=True))
    stamps = "".join(f"<|time_start|>{moment:.1f} seconds<|time_end|><|image_pad|>" for moment in item.times)
    return {
        "pixel_values": patches[[places[things] for things in shown]].flatten(0, 1),
        "grid_thw": torch.tensor([[len(shown), *read["image_grid_thw"][0, 1:].tolist()]]),
        "input_ids": processor.tokenizer(f"<|vision_start|>{stamps}<|vision_end|>", return_tensors="pt")["input_ids"],
    }


def prompt_ids(processor, item: Item, media_ids: list[int]) -> list[int]:
    """The tokens of the whole prompt, with `media_ids` for the media."""
    text = placeholders(item) + item.question.prompt
    if item.template:
        turn = [{"role": "user", "content": text}]
        text = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    before, after = (processor.tokenizer(part)["input_ids"] for part in text.split(placeholders(item)))
    return before + media_ids + after


def shuffle_stamps(ids: list[int], begin: int, end: int, seed) -> list[int]:
    """`ids` with its time stamps, the tokens between `begin` and `end`, in random order.

    Stamps of different lengths move the frames between them.
    """
    starts, ends = ([index for index, token in enumerate(ids) if token == mark] for mark in (begin, end))
    stamps = [ids[start + 1 : stop] for start, stop in zip(starts, ends, strict=True)]
    random.Random(seed).shuffle(stamps)
    out, done = [], 0
    for start, stop, stamp in zip(starts, ends, stamps, strict=True):
        out += [*ids[done : start + 1], *stamp]
        done = stop
    return out + ids[done:]


@dataclass(frozen=True, eq=False)
class Row:
    """A prompt with its encoded media."""

    index: tuple[int, int]  # of the group in its chunk, and of the item in its group
    item: Item
    ids: list[int]
    grids: torch.Tensor  # [media, 3]
    tokens: torch.Tensor  # [V, D], of the vision encoder


class Examinee:
    """A model with its processor."""

    def __init__(self, model, processor, vision_cache_dtype: str | None = None):
        self.model, self.processor, self.vision_cache_dtype = model, processor, vision_cache_dtype
        self.grey: dict[tuple[int, int], torch.Tensor] = {}  # patch rows and columns -> tokens of a grey frame

    @torch.inference_mode()
    def answers(self, chunk: list[list[Item]], media, size: int) -> list[tuple[int, int, str]]:
        """(index of the group, index of the item, greedy answer) of all items of a chunk, in batches of `size` rows.

        The right answers of a batch have similar lengths, because all rows wait for the longest. `media`: what
        `encode_media` returns for each group.
        """
        rows = [
            row
            for index, (group, inputs) in enumerate(zip(chunk, media, strict=True))
            for row in self.rows(index, group, inputs)
        ]
        rows.sort(key=lambda row: (len(row.item.question.answer), len(row.ids)))
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [
            (*row.index, answer) for batch in batches for row, answer in zip(batch, self.generate(batch), strict=True)
        ]

    def rows(self, index: int, group: list[Item], inputs) -> Iterator[Row]:
        """The rows of a group, whose media are encoded once. `inputs`: what `encode_media` returns."""
        pixels, grids = inputs["pixel_values"].to(self.model.device), inputs["grid_thw"]
        media_ids = inputs["input_ids"][0].tolist()
        tokens = self.model.model.visual(pixels, grids)
        for number, item in enumerate(group):
            ids = prompt_ids(self.processor, item, media_ids)
            if item.column == SHUFFLED:
                marks = self.processor.time_start_token_id, self.processor.time_end_token_id
                ids = shuffle_stamps(ids, *marks, seed=item.question.prompt)
            row_tokens = self.blank(pixels, grids) if item.column == BLANKED else tokens
            yield Row((index, number), item, ids, grids, row_tokens)

    def blank(self, pixels: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """Vision tokens [V, D] of grey frames in place of `pixels` [P, values]; each size is encoded once."""
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
        ids = torch.tensor([[pad] * count + row.ids for count, row in zip(padding, rows, strict=True)])
        mask = torch.tensor([[0] * count + [1] * len(row.ids) for count, row in zip(padding, rows, strict=True)])
        out = self.model.generate(
            input_ids=ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            image_features=torch.cat([row.tokens for row in rows]),
            grid_thw=torch.cat([row.grids for row in rows]),
            media_nums_per_sample=[len(row.grids) for row in rows],
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            vision_cache_dtype=self.vision_cache_dtype,
        )
        return self.processor.batch_decode(out[:, length:], skip_special_tokens=True)


class Chunks(torch.utils.data.Dataset):
    """The work of the loader's workers on each chunk: the answers if the model is on a CPU, else the encoded media."""

    def __init__(self, examinee: Examinee, chunks: list[list[list[Item]]], size: int, drawn: bool):
        self.examinee, self.chunks, self.size, self.drawn = examinee, chunks, size, drawn
        self.answered = examinee.model.device.type == "cpu"

    def __len__(self):
        return len(self.chunks)

    def __getitem__(self, index: int):
        chunk = self.chunks[index]
        media = (encode_media(self.examinee.processor, group[0], self.drawn) for group in chunk)
        return self.examinee.answers(chunk, media, self.size) if self.answered else list(media)


def ask(
    model,
    processor,
    items: list[Item],
    size: int,
    workers: int,
    drawn: bool = False,
    vision_cache_dtype: str | None = None,
) -> Iterator[tuple[Item, str]]:
    """The greedy answers, in batches of `size` rows. `drawn`: about clips whose frames are not read from files.

    Each worker is a process with one thread, which for so small a model is faster than a process with several.
    """
    examinee, chunks = Examinee(model, processor, vision_cache_dtype), chunk_items(items, size)
    dataset = Chunks(examinee, chunks, size, drawn)
    context = "fork" if workers else None  # remote code cannot be pickled
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=workers, multiprocessing_context=context
    )
    for chunk, found in zip(chunks, loader, strict=True):
        for group, number, answer in found if dataset.answered else examinee.answers(chunk, found, size):
            yield chunk[group][number], answer


# scores


def edits(first: str, second: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first):
        last, row[0] = row[0], i + 1
        for j, b in enumerate(second):
            last, row[j + 1] = row[j + 1], min(row[j + 1] + 1, row[j] + 1, last + (a != b))
    return row[-1]


def seconds_in(text: str) -> int | None:
    found = re.fullmatch(r"(\d+) seconds", text)
    return int(found[1]) if found else None


def within_a_frame(item: Item, given: str, right: str) -> bool:
    """Whether both are time stamps of the same sampled frame or of neighbours."""
    stamps = [f"{time:.1f}" for time in item.times]
    given, right = given.removesuffix(" seconds"), right.removesuffix(" seconds")
    return given in stamps and right in stamps and abs(stamps.index(given) - stamps.index(right)) <= 1


def events_in(description: str) -> list[tuple[str, str]] | None:
    """(time, event) of each clause of a clip's description after the first; None if a clause has no time."""
    clauses = [re.fullmatch(r"at (\d+\.\d) seconds (.*)", clause) for clause in description.split("; ")]
    return [(clause[1], clause[2]) for clause in clauses[1:]] if all(clauses) else None


def scores(item: Item, given: str) -> dict[str, float]:
    """The score of one answer by each measure, 0 to 1."""
    task, right = item.question.task, item.question.answer
    out = {"exact": float(given == right)}
    if task == "text":
        out["characters"] = max(0.0, 1 - edits(given, right) / len(right))
    elif task == "describe picture":
        out["every object"] = float(given.split(', and the text "')[0] == right.split(', and the text "')[0])
    elif task == "when":
        out["within a frame"] = float(within_a_frame(item, given, right))
    elif task == "duration":
        out["within a second"] = float(
            seconds_in(given) is not None and abs(seconds_in(given) - seconds_in(right)) <= 1
        )
    elif task == "describe clip":
        expected, found = events_in(right), events_in(given)
        out["every event"] = float(expected == found)
        same = found is not None and [event for _, event in expected] == [event for _, event in found]
        near = same and all(
            within_a_frame(item, time, right_time) for (time, _), (right_time, _) in zip(found, expected, strict=True)
        )
        out["every event, within a frame"] = float(near)
        out["first frame"] = float(given.split("; ")[0] == right.split("; ")[0])
    return out


def average(answers: list[tuple[Item, str]]) -> dict[str, float]:
    rows = [scores(item, given) for item, given in answers]
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
    """The row of a task in the result, from (item, answer) pairs of each column."""
    answers = columns[""]
    common = Counter(item.question.answer for item, _ in answers).most_common(1)[0][1] / len(answers)
    measures = average(answers)
    row = {"n": len(answers), "exact": measures["exact"], "commonest answer": common, "measures": measures}
    return row | {column: average(columns[column]) for column in columns if column}


def answer_lines(columns: dict[str, list[tuple[Item, str]]]) -> str:
    """JSONL of every question of a task with its answer."""
    lines = [
        {
            "task": item.question.task,
            "column": column,
            "prompt": item.question.prompt,
            "template": item.template,
            "right": item.question.answer,
            "given": given,
        }
        for column, answers in columns.items()
        for item, given in answers
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


# the command


class Report:
    """Collects answers, and writes the row of each task when all tasks before it are complete."""

    def __init__(self, args, asked: dict[str, dict[str, list[Item]]], result: dict):
        self.args, self.asked, self.result = args, asked, result
        self.given: dict[Item, str] = {}
        self.missing = {task: sum(map(len, columns.values())) for task, columns in asked.items()}
        self.waiting, self.began = list(asked), time.monotonic()
        if args.answers:
            args.answers.write_text("", encoding="utf-8")

    def add(self, item: Item, answer: str) -> None:
        self.given[item] = answer
        self.missing[item.question.task] -= 1
        while self.waiting and not self.missing[self.waiting[0]]:
            self.write(self.waiting.pop(0))

    def write(self, task: str) -> None:
        columns = {column: [(item, self.given[item]) for item in items] for column, items in self.asked[task].items()}
        row = self.result["tasks"][task] = row_of(columns)
        if self.args.answers:
            with self.args.answers.open("a", encoding="utf-8") as file:
                file.write(answer_lines(columns))
        print(f"{time.monotonic() - self.began:6.0f} s  {task}: {row['exact']:.1%}", file=sys.stderr, flush=True)
        if self.args.json:
            self.args.json.write_text(json.dumps(self.result, indent=2) + "\n", encoding="utf-8")


def parse(arguments) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Examine a checkpoint on the drawn world.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--checkpoint", default=str(PROJECT / "checkpoints" / "moss-vl-nano"))
    parser.add_argument("--json", type=Path, help="file to write the table to")
    parser.add_argument("--answers", type=Path, help="JSONL file to write every question with its answer to")
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=f"some of: {', '.join(TASKS)}"
    )
    parser.add_argument("--n", type=int, default=500, help="questions per task")
    parser.add_argument("--control-n", type=int, default=200, help="questions per task and control; 0: no controls")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes that draw, read and, on a CPU, answer"
    )
    parser.add_argument(
        "--drawn", action="store_true", help="take frames of clips as JPEG pictures, without h264 files and PyAV"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32", "float16"), help="to compute in; by default the faster one"
    )
    parser.add_argument("--vision-cache-dtype", choices=("int8",), help="as of `generate`: frames in 8 bits")
    args = parser.parse_args(arguments)
    check_arguments(parser, args)
    return args


def check_arguments(parser, args) -> None:
    """Ends the program with exit code 2 for numbers that are too low, or files that cannot be written."""
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


def main(arguments=None):
    args = parse(arguments)

    from transformers import AutoModelForCausalLM, AutoProcessor

    from moss_vl.training.nano.train_nano import faster_dtype

    args.dtype = args.dtype or faster_dtype(args.device)
    processor = AutoProcessor.from_pretrained(args.checkpoint, trust_remote_code=True)
    attention = "eager" if args.device.startswith("cuda") else None  # other kernels plan for each new length
    model = AutoModelForCausalLM.from_pretrained(
        args.checkpoint, trust_remote_code=True, dtype=getattr(torch, args.dtype), attn_implementation=attention
    )
    model = model.to(args.device).eval()
    controls = min(args.control_n, args.n)
    result = {
        "checkpoint": args.checkpoint,
        "parameters": model.num_parameters(),
        "dtype": args.dtype,
        "vision cache": args.vision_cache_dtype or args.dtype,
        "seed": args.seed,
        "clips": "drawn frames" if args.drawn else "h264 files",
        "control n": controls,
        "tasks": {},
    }
    asked = examination(args.tasks, args.n, controls, args.seed)
    report = Report(args, asked, result)
    everything = [item for columns in asked.values() for items in columns.values() for item in items]
    for item, answer in ask(
        model, processor, everything, args.batch, args.workers, args.drawn, args.vision_cache_dtype
    ):
        report.add(item, answer)
    print(table(result))


if __name__ == "__main__":
    main()
