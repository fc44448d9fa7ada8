"""evaluate.py: scores, questions, controls, the assignment of answers to questions, the table, and the command."""

import gc
import json
import random
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ROOT
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

from moss_vl.training.nano import evaluate, world
from moss_vl.training.nano.evaluate import (
    CLIP_TASKS,
    FRAMES_PER_QUESTION,
    TASKS,
    Examinee,
    Item,
    Question,
    ask,
    average,
    chunk_items,
    clip_items,
    edits,
    encode_media,
    events_in,
    larger,
    picture_items,
    prompt_ids,
    scores,
    shuffle_stamps,
    table,
)
from moss_vl.training.nano.world import draw_scene, write_clip


NANO = ROOT / "checkpoints/moss-vl-nano"
SHORT = (2.0, 3.0)  # duration of clips, in seconds


@pytest.fixture(scope="module")
def processor():
    """With a fifth of the checkpoint's pixels: these tests do not measure the quality of answers."""
    return AutoProcessor.from_pretrained(NANO, trust_remote_code=True, min_pixels=64 * 64, max_pixels=96 * 96)


@pytest.fixture(scope="module", autouse=True)
def one_font():
    """Only one font, so that scenes do not depend on the installed fonts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "fonts", lambda: (None,))
        yield


@pytest.fixture
def forks():
    """For tests that start workers. A forked worker that collected PyAV frames of earlier tests would wait forever."""
    gc.collect()


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(NANO, trust_remote_code=True, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def clips():
    """Three questions of two tasks, about clips sampled at both rates."""
    return clip_items(("when", "visible at"), 3, 5, SHORT)


@pytest.fixture(scope="module")
def mixed(clips):
    """Items with one image, several images, and clips (two items each). Prompts have different lengths."""
    found = [
        *picture_items("color", 2, 1),
        *picture_items("which image", 3, 1),
        *(item for task in clips.values() for item in task),
    ]
    return [
        replace(item, question=replace(item.question, prompt=number * "so " + f"question {number}?"))
        for number, item in enumerate(found)
    ]


def through_the_processor(processor, item, folder) -> dict:
    """The processor's output for one whole item, as a user would call it."""
    medium = "<|video|>" if item.fps else "<|image|>" * len(item.scenes)
    text = medium + item.question.prompt
    if item.template:
        text = processor.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    if not item.fps:
        return processor(text=text, images=[draw_scene(scene) for scene in item.scenes], return_tensors="pt")
    write_clip(item.scenes[0], folder / "clip.mp4")
    return processor(text=text, videos=str(folder / "clip.mp4"), video_fps=item.fps, return_tensors="pt")


# scores


def score(task, right, given, times=()) -> dict:
    return scores(Item(Question(task, "", right), (), True, times=times), given)


def test_an_answer_must_be_equal():
    assert score("color", "blue", "blue") == {"exact": 1.0}
    assert {score("color", "blue", given)["exact"] for given in ("Blue", "blue ", "blue.", "", "a blue star")} == {0.0}


@pytest.mark.parametrize(
    "first, second, distance",
    [
        ("", "", 0),
        ("K7Q", "K7Q", 0),
        ("K7Q", "", 3),
        ("K7Q", "K7", 1),
        ("K7Q", "XK7Q", 1),
        ("K7Q", "7KQ", 2),
        ("K7Q", "K8Q", 1),
        ("ABC", "XYZ", 3),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
    ],
)
def test_edits(first, second, distance):
    assert edits(first, second) == edits(second, first) == distance


def test_characters_of_a_sign():
    given = {"K7Q": 1.0, "K7O": 2 / 3, "K7": 2 / 3, "K7QQ": 2 / 3, "": 0.0, "nothing": 0.0}
    for answer, share in given.items():
        assert score("text", "K7Q", answer) == pytest.approx({"exact": float(answer == "K7Q"), "characters": share})
    assert score("no text", "nothing", "nothing") == {"exact": 1.0}


def test_every_object_ignores_the_sign():
    things = "a large red circle on the left, a small blue star at the top right"
    signed = f'{things}, and the text "K7Q"'
    assert score("describe picture", signed, signed) == {"exact": 1.0, "every object": 1.0}
    for given in (things, f'{things}, and the text "K7O"'):
        assert score("describe picture", signed, given) == {"exact": 0.0, "every object": 1.0}
    assert score("describe picture", things, signed) == {"exact": 0.0, "every object": 1.0}
    for given in (
        signed.replace("red", "black"),
        signed.removeprefix("a large red circle on the left, "),
        "the text",
        "",
    ):
        assert score("describe picture", signed, given) == {"exact": 0.0, "every object": 0.0}


def test_when_within_a_frame():
    times = (0.0, 0.96, 1.96, 2.96)  # stamps 0.0, 1.0, 2.0, 3.0
    given = {
        "1.0 seconds": 1.0,
        "2.0 seconds": 1.0,
        "3.0 seconds": 1.0,
        "0.0 seconds": 0.0,
        "1.5 seconds": 0.0,
        "4.0 seconds": 0.0,
        "2 seconds": 0.0,
        "soon": 0.0,
        "": 0.0,
    }
    for answer, near in given.items():
        assert score("when", "2.0 seconds", answer, times) == {
            "exact": float(answer == "2.0 seconds"),
            "within a frame": near,
        }


def test_duration_within_a_second():
    given = {
        "10 seconds": 1.0,
        "11 seconds": 1.0,
        "9 seconds": 1.0,
        "12 seconds": 0.0,
        "10.0 seconds": 0.0,
        "long": 0.0,
    }
    for answer, near in given.items():
        assert score("duration", "10 seconds", answer) == {
            "exact": float(answer == "10 seconds"),
            "within a second": near,
        }


START = "at 0.0 seconds a large red circle in the center"
APPEARS, MOVES = "a small blue star appears at the top", "the circle moves left"


def test_events_of_a_description():
    assert events_in(START) == []
    assert events_in(f"{START}; at 3.0 seconds {APPEARS}; at 12.0 seconds {MOVES}") == [
        ("3.0", APPEARS),
        ("12.0", MOVES),
    ]
    for given in (
        "",
        "a large red circle",
        f"{START}; {MOVES}",
        f"{START}; at 3 seconds {MOVES}",
        f"{START}; at 3.0 seconds",
    ):
        assert events_in(given) is None


def test_every_event():
    """Exact, every event, every event within a frame, first frame."""
    times, right = tuple(map(float, range(9))), f"{START}; at 3.0 seconds {APPEARS}; at 6.0 seconds {MOVES}"
    cases = {
        right: (1, 1, 1, 1),
        right.replace("red", "black"): (0, 1, 1, 0),  # the first clause is no event
        right.replace("6.0", "7.0").replace("3.0", "2.0"): (0, 0, 1, 1),
        right.replace("6.0", "8.0"): (0, 0, 0, 1),
        right.replace("6.0", "6.5"): (0, 0, 0, 1),  # no sampled frame
        right.replace("left", "right"): (0, 0, 0, 1),
        f"{START}; at 3.0 seconds {APPEARS}": (0, 0, 0, 1),
        f"{right}; at 8.0 seconds {MOVES}": (0, 0, 0, 1),
        f"{START}; at 6.0 seconds {MOVES}; at 3.0 seconds {APPEARS}": (0, 0, 0, 1),
        f"{START}; {APPEARS}; {MOVES}": (0, 0, 0, 1),
        START: (0, 0, 0, 1),
        "": (0, 0, 0, 0),
    }
    names = ("exact", "every event", "every event, within a frame", "first frame")
    for given, expected in cases.items():
        assert score("describe clip", right, given, times) == dict(zip(names, expected, strict=True)), given


def test_a_description_without_times_has_no_events():
    assert score("describe clip", START, START.replace("red", "blue"))["every event"] == 1.0
    for given in ("", "nothing", "the circle"):
        assert {
            score("describe clip", START, given)[name] for name in ("every event", "every event, within a frame")
        } == {0.0}


def test_average_of_scores():
    item = Item(Question("text", "", "AB"), (), True)
    assert average([(item, "AB"), (item, "AX"), (item, "A"), (item, "")]) == {"exact": 0.25, "characters": 0.5}


# questions


@pytest.mark.parametrize("task", [task for task in TASKS if task not in CLIP_TASKS])
def test_questions_about_pictures(task):
    items = picture_items(task, 12, seed=1)
    assert [item.question.task for item in items] == [task] * 12
    assert [item.template for item in items] == [True, False] * 6
    assert all(item.fps == 0 and item.times == () and item.column == "" for item in items)
    scenes = [scene for item in items for scene in item.scenes]
    assert len(set(scenes)) == len(scenes), "one question a picture"
    assert all(2 <= len(item.scenes) <= 4 if task == "which image" else len(item.scenes) == 1 for item in items)
    if task in ("text", "no text"):
        signs = [item.scenes[0].sign for item in items]
        assert [item.question.answer for item in items] == ["nothing" if sign is None else sign.text for sign in signs]
        assert all((sign is None) == (task == "no text") for sign in signs)
    assert picture_items(task, 12, seed=1) == items and picture_items(task, 3, seed=1) == items[:3]
    assert picture_items(task, 12, seed=2) != items


def test_questions_about_larger_pictures_are_the_same():
    for task in ("describe picture", "relation", "which image"):
        for item, large in zip(picture_items(task, 4, 1), picture_items(task, 4, 1, larger), strict=True):
            assert large.question == item.question and large.template == item.template
            for scene, twice in zip(item.scenes, large.scenes, strict=True):
                assert (twice.width, twice.height) == (2 * scene.width, 2 * scene.height)
                assert replace(twice, width=scene.width, height=scene.height) == scene


def test_questions_about_clips(clips, processor, tmp_path):
    assert list(clips) == ["when", "visible at"]
    for task, items in clips.items():
        assert [item.question.task for item in items] == [task] * 3
        assert [item.template for item in items] == [True, False, True]
        assert len({item.scenes for item in items}) == 3, "one question of a task a clip"
        for item in items:
            assert 2 <= item.scenes[0].seconds <= 3 and item.fps in (1, 2)
            write_clip(item.scenes[0], tmp_path / "clip.mp4")
            (clip,) = processor.video_processor.extract(str(tmp_path / "clip.mp4"), video_fps=item.fps)
            assert clip.timestamps == pytest.approx(item.times, abs=1e-3)


def test_questions_about_clips_depend_only_on_seed_and_task(clips):
    assert clip_items(("when", "visible at"), 3, 5, SHORT) == clips
    assert clip_items(("visible at",), 2, 5, SHORT) == {"visible at": clips["visible at"][:2]}
    assert clip_items(("when",), 3, 6, SHORT)["when"] != clips["when"]


def test_controls_ask_the_same_questions(monkeypatch):
    monkeypatch.setattr(evaluate, "SECONDS", SHORT)
    monkeypatch.setattr(evaluate, "LONG", (3.0, 4.0))
    asked = evaluate.examination(("shape", "when", "duration"), 3, 2, 1)
    assert {task: list(columns) for task, columns in asked.items()} == {
        "shape": ["", "blanked", "twice as large"],
        "when": ["", "blanked", "stamps shuffled", "twice as long"],
        "duration": ["", "blanked", "twice as long"],
    }
    for task, columns in asked.items():
        assert [len(items) for items in columns.values()] == [3] + [2] * (len(columns) - 1)
        for column, items in columns.items():
            assert {(item.question.task, item.column) for item in items} == {(task, column)}
            plain = [replace(item, column="") for item in items]
            if column in ("blanked", "stamps shuffled"):
                assert plain == columns[""][:2]
            if column == "twice as large":
                assert plain == picture_items(task, 2, 1, larger)
            if column == "twice as long":
                assert plain == clip_items((task,), 2, 1, (3.0, 4.0))[task]
    assert evaluate.examination(("shape",), 3, 0, 1) == {"shape": {"": picture_items("shape", 3, 1)}}


# answers


def test_questions_about_the_same_media_are_in_one_chunk():
    items = picture_items("count", 7, 1)
    blanked = [replace(item, column="blanked") for item in items[:2]]
    assert chunk_items([*items, *blanked], 3) == [
        [[items[0], blanked[0]], [items[1], blanked[1]], [items[2]]],
        [[item] for item in items[3:6]],
        [[items[6]]],
    ]


def test_chunks_of_longer_clips_are_smaller():
    rng = random.Random(0)
    (scene,) = picture_items("count", 1, 1)[0].scenes
    items = [
        Item(
            Question("when", f"{number}", ""),
            (replace(scene, grain=number % 50),),
            True,
            1 + number % 2,
            (0.0,) * (2 + number % 50),
        )
        for number in range(80)
    ]
    rng.shuffle(items)
    size = 4
    chunks = chunk_items(items, size)
    assert Counter(item for chunk in chunks for group in chunk for item in group) == Counter(items)
    groups = [group for chunk in chunks for group in chunk]
    assert len(groups) == 50 and all(len({(item.scenes, item.fps) for item in group}) == 1 for group in groups)
    lengths = [len(group[0].times) for group in groups]
    assert lengths == sorted(lengths) and max(map(len, chunks)) == size

    def fits(chunk):
        frames = len(chunk) * max(len(group[0].times) for group in chunk)
        return len(chunk) <= size and frames <= FRAMES_PER_QUESTION * size

    assert all(len(chunk) == 1 or fits(chunk) for chunk in chunks)
    assert any(len(chunk) < size for chunk in chunks[:-1])
    for one, other in pairwise(chunks):
        assert not fits([*one, other[0]]), "the next clip would have fitted"


def test_prompts_and_media_equal_the_processor_s_output(processor, mixed, tmp_path):
    for item in mixed:
        expected, inputs = through_the_processor(processor, item, tmp_path), encode_media(processor, item)
        assert prompt_ids(processor, item, inputs["input_ids"][0].tolist()) == expected["input_ids"][0].tolist()
        assert torch.equal(inputs["grid_thw"], expected["grid_thw"])
        assert inputs["pixel_values"].shape == expected["pixel_values"].shape
        # encoded twice, a clip may differ slightly
        assert (inputs["pixel_values"] - expected["pixel_values"]).abs().mean() <= (0.002 if item.fps else 0)


class Echo:
    """A model that repeats its prompt and records its inputs; all media of a prompt are encoded as one number."""

    device = torch.device("cpu")

    def __init__(self):
        self.model, self.calls = SimpleNamespace(visual=lambda pixels, grids: pixels.abs().sum()[None, None]), []

    def generate(self, input_ids, **inputs):
        self.calls.append({"input_ids": input_ids, **inputs})
        return torch.cat([input_ids, input_ids], dim=1)


@pytest.mark.parametrize("size, workers", [(1, 1), (4, 2), (4, 0)])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_every_item_gets_the_answer_to_its_prompt(processor, mixed, size, workers, on_cpu, monkeypatch, forks):
    """Also if the workers only encode media."""

    class Elsewhere(evaluate.Chunks):
        def __init__(self, *args):
            super().__init__(*args)
            self.answered = on_cpu

    monkeypatch.setattr(evaluate, "Chunks", Elsewhere)
    answers = list(ask(Echo(), processor, mixed, size, workers))
    assert Counter(item for item, _ in answers) == Counter(mixed)
    for item, given in answers:
        assert item.question.prompt in given and given.count("question") == 1
        stamps = "".join(f"{time:.1f} seconds" for time in item.times)
        assert given.removeprefix("user\n").startswith(stamps + item.question.prompt)


def test_every_row_of_a_batch_has_the_media_of_its_item(processor, mixed):
    model, size, asked = Echo(), 3, {item.question.prompt: item for item in mixed}
    list(ask(model, processor, mixed, size, 0))
    rows = 0
    for call in model.calls:
        assert (
            call["do_sample"] is False
            and call["max_new_tokens"] == evaluate.MAX_NEW_TOKENS
            and len(call["input_ids"]) <= size
        )
        grids = call["grid_thw"].split(call["media_nums_per_sample"])
        for ids, attended, row_grids, token in zip(
            call["input_ids"], call["attention_mask"], grids, call["image_features"], strict=True
        ):
            item = asked[re.search(r"(so )*question \d+\?", processor.tokenizer.decode(ids))[0]]
            padding = int((attended == 0).sum())
            assert attended.tolist() == [0] * padding + [1] * (len(ids) - padding), "padded on the left"
            inputs = encode_media(processor, item)
            assert ids[padding:].tolist() == prompt_ids(processor, item, inputs["input_ids"][0].tolist())
            assert torch.equal(row_grids, inputs["grid_thw"])
            assert token.item() == pytest.approx(
                inputs["pixel_values"].abs().sum().item(), rel=1e-3 if item.fps else 1e-6
            )
            rows += 1
    assert rows == len(mixed)


def test_answers_equal_those_to_each_item_alone(processor, model, mixed, tmp_path, monkeypatch, forks):
    """Compared with the processor and `generate` alone, for rows with different numbers of images and frames."""
    monkeypatch.setattr(evaluate, "MAX_NEW_TOKENS", 6)
    together, alone = dict(ask(model, processor, mixed, 4, 2)), {}
    for item in mixed:
        inputs = through_the_processor(processor, item, tmp_path)
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        alone[item] = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert together == alone
    assert len(set(alone.values())) > 1, "the test needs different answers"


# controls


def test_blanked_media_are_encoded_as_grey(processor, model, mixed):
    examinee = Examinee(model, processor)
    for item in (mixed[0], mixed[2], mixed[-1]):  # an image, several, a clip
        inputs = encode_media(processor, item)
        plain, blanked = examinee.rows(0, [item, replace(item, column="blanked")], inputs)
        assert blanked.ids == plain.ids and torch.equal(blanked.grids, plain.grids)
        grey = model.model.visual(torch.zeros_like(inputs["pixel_values"]), inputs["grid_thw"])
        assert torch.allclose(blanked.tokens, grey, atol=1e-4) and not torch.allclose(plain.tokens, grey, atol=1e-2)
    grey = processor.image_processor([Image.new("RGB", (224, 224), (128,) * 3)], return_tensors="pt")["pixel_values"]
    assert grey.abs().max() < 0.01, "0 stands for grey"


def cut(ids, begin, end) -> tuple[list[tuple], list]:
    """The stamps of a row, and the row without them."""
    stamps, rest, at = [], [], 0
    while begin in ids[at:]:
        start = ids.index(begin, at) + 1
        stop = ids.index(end, start)
        stamps.append(tuple(ids[start:stop]))
        rest, at = rest + ids[at:start], stop
    return stamps, rest + ids[at:]


def test_shuffling_changes_only_the_order_of_stamps(processor):
    """Stamps have one or two digits before the point, so frames between them may move."""
    marks = processor.time_start_token_id, processor.time_end_token_id
    for count in (13, 3, 1):
        video = [Image.new("RGB", (32, 32), (level,) * 3) for level in range(0, 10 * count, 10)]
        text = "<|video|>What is visible at 3.0 seconds?"
        ids = processor(text=text, videos=[video], video_metadata=[{"fps": 1.0}])["input_ids"][0]
        before, (stamps, rest) = list(ids), cut(ids, *marks)
        found = shuffle_stamps(ids, *marks, seed=1)
        assert ids == before and found == shuffle_stamps(ids, *marks, seed=1)
        moved, same = cut(found, *marks)
        assert len(stamps) == count and sorted(moved) == sorted(stamps) and same == rest
        assert len(set(map(len, stamps))) == (2 if count > 10 else 1), "the test needs stamps of two lengths"
        assert (moved != stamps) == (count > 1)


def test_stamps_are_shuffled_only_for_their_control(processor, clips):
    item, inputs = clips["when"][0], encode_media(processor, clips["when"][0])
    examinee, columns = Examinee(Echo(), processor), ("", "blanked", "stamps shuffled", "twice as long")
    ids = {
        row.item.column: row.ids
        for row in examinee.rows(0, [replace(item, column=column) for column in columns], inputs)
    }
    assert list(ids) == list(columns) and ids[""] == ids["blanked"] == ids["twice as long"] == prompt_ids(
        processor, item, inputs["input_ids"][0].tolist()
    )
    marks = processor.time_start_token_id, processor.time_end_token_id
    assert ids["stamps shuffled"] == shuffle_stamps(ids[""], *marks, seed=item.question.prompt) != ids[""]


# the table and the command


def test_table():
    result = {
        "tasks": {
            "text": {
                "n": 500,
                "exact": 0.851,
                "commonest answer": 0.004,
                "measures": {"exact": 0.851, "characters": 0.9564},
                "blanked": {"exact": 0.0, "characters": 0.05},
                "twice as large": {"exact": 0.8, "characters": 0.93},
            },
            "when": {
                "n": 7,
                "exact": 1.0,
                "commonest answer": 2 / 7,
                "measures": {"exact": 1.0, "within a frame": 1.0},
                "stamps shuffled": {"exact": 0.25, "within a frame": 0.5},
                "twice as long": {"exact": 0.5, "within a frame": 1.0},
            },
            "color": {"n": 1, "exact": 0.0, "commonest answer": 1.0, "measures": {"exact": 0.0}},
        }
    }
    assert table(result).splitlines() == [
        "| task | n | exact | commonest answer "
        "| blanked | stamps shuffled | twice as large | twice as long | other measures |",
        "|---|---|---|---|---|---|---|---|---|",
        "| text | 500 | 85.1% | 0.4% | 0.0% |  | 80.0% |  | characters 95.6% |",
        "| when | 7 | 100.0% | 28.6% |  | 25.0% |  | 50.0% | within a frame 100.0% |",
        "| color | 1 | 0.0% | 100.0% |  |  |  |  |  |",
    ]


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--n", "0"], "--n is 0; expected at least 1"),
        (["--control-n", "-1"], "--control-n is -1; expected at least 0"),
        (["--batch", "0"], "--batch is 0; expected at least 1"),
        (["--workers", "0"], "--workers is 0; expected at least 1"),
        (["--tasks", "colour"], "invalid choice: 'colour'"),
        (["--tasks"], "expected at least one argument"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--json", "{}/none/table.json"], "none/table.json does not exist; make it first"),
        (["--answers", "{}/none/answers.jsonl"], "none/answers.jsonl does not exist; make it first"),
        (["--json", "{}"], "is a folder; expected a file to write"),
        (["--json", "{}/one", "--answers", "{}/one"], "expected two files"),
    ],
)
def test_wrong_arguments_are_errors_before_loading(arguments, complaint, monkeypatch, tmp_path, capsys):
    def load(*args, **kwargs):
        raise AssertionError("loaded")

    for loader in (transformers.AutoProcessor, transformers.AutoModelForCausalLM):
        monkeypatch.setattr(loader, "from_pretrained", load)
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([argument.format(tmp_path) for argument in arguments])
    assert stopped.value.code == 2 and complaint in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


PICTURES, CLIPS = ("describe picture", "text", "which image"), ("describe clip", "when", "direction")


def test_the_command(monkeypatch, tmp_path, capsys, forks):
    monkeypatch.setattr(evaluate, "SECONDS", SHORT)
    monkeypatch.setattr(evaluate, "LONG", (3.0, 4.0))
    monkeypatch.setattr(evaluate, "MAX_NEW_TOKENS", 8)
    (tmp_path / "answers.jsonl").write_text("of a run before\n")
    options = ("--checkpoint", NANO, "--n", 2, "--control-n", 1, "--seed", 3, "--workers", 1, "--device", "cpu")
    files = ("--json", tmp_path / "table.json", "--answers", tmp_path / "answers.jsonl")
    evaluate.main([str(argument) for argument in (*options, *files, "--tasks", *PICTURES, *CLIPS)])

    result = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    tasks = result.pop("tasks")
    assert result["vision cache"] == result["dtype"] in ("bfloat16", "float32")
    assert result.pop("parameters") > 1e6 and result.pop("dtype") == result.pop("vision cache")
    assert result.pop("clips") == "h264 files"
    assert result == {"checkpoint": str(NANO), "seed": 3, "control n": 1}
    assert list(tasks) == [*PICTURES, *CLIPS]
    measures = {
        "describe picture": {"every object"},
        "text": {"characters"},
        "which image": set(),
        "when": {"within a frame"},
        "describe clip": {"every event", "every event, within a frame", "first frame"},
        "direction": set(),
    }
    asked = evaluate.examination((*PICTURES, *CLIPS), 2, 1, 3)
    items = [item for columns in asked.values() for found in columns.values() for item in found]
    expected = [
        (item.question.task, item.column, item.question.prompt, item.template, item.question.answer) for item in items
    ]
    assert [
        tuple(line[name] for name in ("task", "column", "prompt", "template", "right")) for line in lines
    ] == expected
    for task, row in tasks.items():
        columns = [column for column in asked[task] if column]
        assert list(row) == ["n", "exact", "commonest answer", "measures", *columns]
        assert row["n"] == 2 and row["commonest answer"] in (0.5, 1.0) and row["exact"] == row["measures"]["exact"]
        for measured in (row["measures"], *(row[column] for column in columns)):
            assert measured.keys() == {"exact", *measures[task]}
            assert all(0 <= score <= 1 for score in measured.values())
        for column in ("", *columns):
            exact = [
                line["given"] == line["right"] for line in lines if (line["task"], line["column"]) == (task, column)
            ]
            assert (row[column] if column else row)["exact"] == sum(exact) / len(exact)
    shown = capsys.readouterr()
    assert shown.out == table({"tasks": tasks}) + "\n"
    assert [line.split("s  ", 1)[1].split(":")[0] for line in shown.err.splitlines() if " s  " in line] == [
        *PICTURES,
        *CLIPS,
    ]
