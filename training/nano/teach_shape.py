"""A worked example of tuning: teaches moss-vl-nano a seventh shape with LoRA.

    python training/nano/teach_shape.py --output runs/heart

The checkpoint has never been trained on hearts. The script writes 200 pictures with hearts, each with one question and
its answer, and twice as many without, which prevent forgetting; data.json lists them as training/finetune.py reads it.
Then it prints and runs the tuning command, which merges the adapter, and asks the checkpoint before and after about
new pictures with hearts. training/nano/evaluate.py measures whether the other tasks suffered.
"""

import argparse
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moss_vl.training.nano.questions import PICTURE_TASKS, Question, ask_picture
from moss_vl.training.nano.world import Scene, draw_scene, random_picture


PROJECT = Path(__file__).resolve().parents[2]
SHAPE = "heart"
TASKS = ("color", "shape", "place", "exists", "describe picture")  # what is asked about hearts
OPTIONS = (
    *("--train", "vision", "merger", "cross", "language", "head"),
    *("--lora-rank", "16", "--epochs", "5", "--lr", "7e-4", "--batch-size", "8"),
    *("--merge", "--cpu", "--save-dtype", "bfloat16", "--log-steps", "25"),
)


def picture_with_heart(rng: random.Random) -> Scene:
    """A random picture in which one thing is a heart."""
    scene = random_picture(rng, sign_share=0.2)
    index = rng.randrange(len(scene.things))
    things = list(scene.things)
    things[index] = replace(things[index], shape=SHAPE, detail=None, fill=1.0)
    return replace(scene, things=tuple(things))


def question_about(scene: Scene, task: str, rng: random.Random) -> Question | None:
    """A question with the heart in the prompt or the answer; None if none was found."""
    for _ in range(20):
        question = ask_picture(task, scene, rng)
        if question is not None and (SHAPE in question.prompt + question.answer):
            return question
    return None


def examples(count: int, seed) -> list[tuple[Scene, Question]]:
    """`count` examples with hearts and twice as many without, mostly descriptions, which are forgotten first."""
    rng, out = random.Random(f"{SHAPE} {seed}"), []
    while len(out) < 3 * count:
        if len(out) % 3:
            scene = random_picture(rng)
            question = ask_picture(rng.choice((*PICTURE_TASKS, *TASKS, *["describe picture"] * 4)), scene, rng)
        else:
            scene = picture_with_heart(rng)
            question = question_about(scene, rng.choice(TASKS), rng)
        if question is not None:
            out.append((scene, question))
    return out


def write_data(folder: Path, count: int) -> Path:
    """Writes pictures and data.json; returns the path of data.json."""
    (folder / "pictures").mkdir(parents=True)
    records = []
    for number, (scene, question) in enumerate(examples(count, "lessons")):
        name = f"pictures/{number:03}.png"
        draw_scene(scene).save(folder / name)
        records.append({"prompt": question.prompt, "response": question.answer, "images": [name]})
    path = folder / "data.json"
    path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return path


def examine(checkpoint: Path, count: int) -> dict[str, float]:
    """Task -> share of right answers about hearts, in pictures that are not in the training data."""
    import torch
    from transformers import AutoModelForCausalLM, AutoProcessor

    from moss_vl.training.nano.evaluate import Item, ask, average

    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype=torch.bfloat16).eval()
    rng, shares = random.Random(f"{SHAPE} examination"), {}
    for task in TASKS:
        items = []
        while len(items) < count:
            scene = picture_with_heart(rng)
            question = question_about(scene, task, rng)
            if question is not None:
                items.append(Item(question, (scene,), template=True))
        shares[task] = average(ask(model, processor, items, size=32, workers=1))["exact"]
    return shares


def main():
    parser = argparse.ArgumentParser(
        description="Teach moss-vl-nano a seventh shape.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=PROJECT / "checkpoints" / "moss-vl-nano")
    parser.add_argument("--output", type=Path, required=True, help="new folder, for the data and the tuned checkpoint")
    parser.add_argument("--examples", type=int, default=200, help="with hearts; there are twice as many without")
    parser.add_argument("--n", type=int, default=100, help="questions per task, before and after")
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"{args.output} exists; name a new folder")
    data = write_data(args.output, args.examples)
    paths = {"--checkpoint": args.checkpoint, "--data": data, "--output": args.output / "tuned"}
    command = [sys.executable, str(PROJECT / "training/finetune.py")]
    command += [word for option, path in paths.items() for word in (option, str(path))] + list(OPTIONS)
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)
    before, after = examine(args.checkpoint, args.n), examine(args.output / "tuned", args.n)
    print(f"| about a {SHAPE} | before | after |\n|---|---|---|")
    for task in TASKS:
        print(f"| {task} | {before[task]:.0%} | {after[task]:.0%} |")


if __name__ == "__main__":
    main()
