"""Examining a checkpoint: marks, the questions, what the controls change, which answer is whose, the table, and the command."""

import gc
import json
import random
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

from conftest import ROOT

sys.path[:0] = [str(ROOT / "training")]
import evaluate  # noqa: E402
import world  # noqa: E402
from evaluate import (  # noqa: E402
    CLIP_TASKS,
    TASKS,
    Batches,
    Item,
    Question,
    ask,
    average,
    batches_of,
    blank,
    clip_items,
    edits,
    events_in,
    larger,
    marks,
    picture_items,
    shuffle_stamps,
    table,
)

NANO = ROOT / "checkpoints/moss-vl-nano"
BRIEF = (2.0, 3.0)  # seconds of a clip


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(NANO, trust_remote_code=True)


@pytest.fixture(scope="module", autouse=True)
def one_font():
    """The same scenes wherever the tests run: fonts are drawn by lot among those installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "fonts", lambda: (None,))
        yield


@pytest.fixture
def forks():
    """For tests that start workers: PyAV's frames that earlier tests left as garbage are freed here. A forked child that freed them
    would wait for their threads, which it does not have."""
    gc.collect()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three questions of two tasks, about clips of both rates."""
    gc.collect()  # as in `forks`
    return clip_items(("when", "visible at"), 3, 5, str(tmp_path_factory.mktemp("clips")), BRIEF, 1)


@pytest.fixture(scope="module")
def mixed(clips):
    """Items of one image, of several, and clips; each with a prompt of its own length that no other has."""
    found = [*picture_items("color", 2, 1), *picture_items("which image", 3, 1)], [item for task in clips.values() for item in task]

    def numbered(items):
        return [replace(item, question=replace(item.question, prompt=number * "so " + f"question {number}?"))
                for number, item in enumerate(items)]  # fmt: skip

    return [numbered(items) for items in found]


# ----------------------------------------------------------------------------------------------------------------------
# Marks


def mark(task, right, given, times=()) -> dict:
    return marks(Item(Question(task, "", right), (), True, times=times), given)


def test_an_answer_counts_to_the_letter():
    assert mark("color", "blue", "blue") == {"exact": 1.0}
    assert {mark("color", "blue", given)["exact"] for given in ("Blue", "blue ", "blue.", "", "a blue star")} == {0.0}


@pytest.mark.parametrize(
    "first, second, distance",
    [("", "", 0), ("K7Q", "K7Q", 0), ("K7Q", "", 3), ("K7Q", "K7", 1), ("K7Q", "XK7Q", 1), ("K7Q", "7KQ", 2), ("K7Q", "K8Q", 1),
     ("ABC", "XYZ", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2)],
)  # fmt: skip
def test_edits(first, second, distance):
    assert edits(first, second) == edits(second, first) == distance


def test_characters_of_a_sign():
    given = {"K7Q": 1.0, "K7O": 2 / 3, "K7": 2 / 3, "K7QQ": 2 / 3, "": 0.0, "nothing": 0.0}
    for answer, share in given.items():
        assert mark("text", "K7Q", answer) == pytest.approx({"exact": float(answer == "K7Q"), "characters": share})
    assert mark("no text", "nothing", "nothing") == {"exact": 1.0}


def test_every_object_whatever_the_sign_says():
    things = "a large red circle on the left, a small blue star at the top right"
    signed = f'{things}, and the text "K7Q"'
    assert mark("describe picture", signed, signed) == {"exact": 1.0, "every object": 1.0}
    for given in (things, f'{things}, and the text "K7O"'):
        assert mark("describe picture", signed, given) == {"exact": 0.0, "every object": 1.0}
    assert mark("describe picture", things, signed) == {"exact": 0.0, "every object": 1.0}
    for given in (signed.replace("red", "black"), signed.removeprefix("a large red circle on the left, "), "the text", ""):
        assert mark("describe picture", signed, given) == {"exact": 0.0, "every object": 0.0}


def test_when_within_a_frame():
    times = (0.0, 0.96, 1.96, 2.96)  # stamps 0.0, 1.0, 2.0, 3.0
    given = {"1.0 seconds": 1.0, "2.0 seconds": 1.0, "3.0 seconds": 1.0, "0.0 seconds": 0.0, "1.5 seconds": 0.0, "4.0 seconds": 0.0,
             "2 seconds": 0.0, "soon": 0.0, "": 0.0}  # fmt: skip
    for answer, near in given.items():
        assert mark("when", "2.0 seconds", answer, times) == {"exact": float(answer == "2.0 seconds"), "within a frame": near}


def test_duration_within_a_fifth_of_a_second():
    given = {"10.1 seconds": 1.0, "10.3 seconds": 1.0, "9.9 seconds": 1.0, "10.4 seconds": 0.0, "9.8 seconds": 0.0,
             "10 seconds": 0.0, "long": 0.0}  # fmt: skip
    for answer, near in given.items():
        assert mark("duration", "10.1 seconds", answer) == {"exact": float(answer == "10.1 seconds"), "within 0.2 s": near}


START = "at 0.0 seconds a large red circle in the center"
APPEARS, MOVES = "a small blue star appears at the top", "the circle moves left"


def test_events_of_a_description():
    assert events_in(START) == []
    assert events_in(f"{START}; at 3.0 seconds {APPEARS}; at 12.0 seconds {MOVES}") == [("3.0", APPEARS), ("12.0", MOVES)]
    for given in ("", "a large red circle", f"{START}; {MOVES}", f"{START}; at 3 seconds {MOVES}", f"{START}; at 3.0 seconds"):
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
        assert mark("describe clip", right, given, times) == dict(zip(names, expected)), given


def test_words_without_a_time_describe_no_clip_in_which_nothing_happens():
    assert mark("describe clip", START, START.replace("red", "blue"))["every event"] == 1.0
    for given in ("", "nothing", "the circle"):
        assert {mark("describe clip", START, given)[name] for name in ("every event", "every event, within a frame")} == {0.0}


def test_average_of_marks():
    item = Item(Question("text", "", "AB"), (), True)
    assert average([(item, "AB"), (item, "AX"), (item, "A"), (item, "")]) == {"exact": 0.25, "characters": 0.5}


# ----------------------------------------------------------------------------------------------------------------------
# The questions


@pytest.mark.parametrize("task", [task for task in TASKS if task not in CLIP_TASKS])
def test_questions_about_pictures(task):
    items = picture_items(task, 12, seed=1)
    assert [item.question.task for item in items] == [task] * 12
    assert [item.template for item in items] == [True, False] * 6
    assert all(item.path is None for item in items)
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


def test_questions_about_clips(clips, processor):
    assert list(clips) == ["when", "visible at"]
    for task, items in clips.items():
        assert [item.question.task for item in items] == [task] * 3
        assert [item.template for item in items] == [True, False, True]
        assert len({item.path for item in items}) == len({item.scenes for item in items}) == 3, "one question of a task a clip"
        for item in items:
            assert 2 <= item.scenes[0].seconds <= 3 and item.fps in (1, 2)
            clip, = processor.video_processor.extract(item.path, video_fps=item.fps)
            assert clip.timestamps == pytest.approx(item.times, abs=1e-3)


def test_questions_about_clips_depend_on_the_seed_and_their_task_alone(clips, tmp_path, forks):
    def drawn(tasks, n, seed, name):
        (tmp_path / name).mkdir()
        found = clip_items(tasks, n, seed, str(tmp_path / name), BRIEF, 1)
        written = {str(path) for path in (tmp_path / name).iterdir()}
        assert written == {item.path for items in found.values() for item in items}, "each file is asked about"
        return without_path(found)

    def without_path(found):
        return {task: [replace(item, path=None) for item in items] for task, items in found.items()}

    expected = without_path(clips)
    assert drawn(("when", "visible at"), 3, 5, "again") == expected
    assert drawn(("visible at",), 2, 5, "fewer") == {"visible at": expected["visible at"][:2]}
    assert drawn(("when",), 3, 6, "other")["when"] != expected["when"]


# ----------------------------------------------------------------------------------------------------------------------
# Batches


def test_batches_of_pictures_are_slices():
    items = picture_items("count", 7, 1)
    assert batches_of(items, 3) == [items[:3], items[3:6], items[6:]]


def test_batches_of_clips_share_a_rate_and_are_the_smaller_the_longer_they_are():
    lot = random.Random(0)
    items = [Item(Question("when", f"{number}", ""), (), True, f"{number}.mp4", lot.choice((1, 2)), (0.0,) * lot.randint(2, 60))
             for number in range(80)]  # fmt: skip
    frames, size = 48, 4
    batches = batches_of(items, size)
    assert Counter(item for batch in batches for item in batch) == Counter(items)

    def fits(batch):
        longest = max(len(item.times) for item in batch)
        return len({item.fps for item in batch}) == 1 and len(batch) <= size and len(batch) * longest <= frames

    assert all(len(batch) == 1 or fits(batch) for batch in batches)
    rates = [batch[0].fps for batch in batches]
    assert rates == sorted(rates) and max(map(len, batches)) == size
    for one, other in zip(batches, batches[1:]):
        assert not fits([*one, other[0]]), "the next clip had room"


def rows_alone(batch, inputs):
    """Each row's ids, mask, grids and pixels, without padding and without what belongs to others."""
    medium, patch, sizes = 0, 0, inputs["grid_thw"].prod(1)
    for row, (item, count) in enumerate(zip(batch, inputs["media_nums_per_sample"], strict=True)):
        attended = inputs["attention_mask"][row]
        padding = int((attended == 0).sum())
        assert attended.tolist() == [0] * padding + [1] * (len(attended) - padding), "padded on the left"
        mask, grids = inputs["cross_attention_mask"][row, 0], inputs["grid_thw"][medium : medium + count]
        frames = int(grids[:, 0].sum())
        assert mask[:padding].all() and mask[:, frames:].all(), "padding sees nothing, and nobody sees another row's frames"
        patches = int(sizes[medium : medium + count].sum())
        pixels = inputs["pixel_values"][patch : patch + patches]
        yield item, padding, inputs["input_ids"][row, padding:], mask[padding:, :frames], grids, pixels
        medium, patch = medium + count, patch + patches
    assert (medium, patch) == (len(inputs["grid_thw"]), len(inputs["pixel_values"]))


def test_an_item_in_a_batch_is_the_item_by_itself(processor, mixed):
    paddings = []
    for items in mixed:
        for batch in batches_of(items, 4):
            for item, padding, *row in rows_alone(batch, Batches(processor, [batch])[0]):
                paddings.append(padding)
                (_, none, *alone), = rows_alone([item], Batches(processor, [[item]])[0])
                assert none == 0 and all(map(torch.equal, row, alone)), item.question
                text = processor.tokenizer.decode(row[0])
                assert text.endswith(f"{item.question.prompt}" + "<|im_end|>\n<|im_start|>assistant\n" * item.template)
                assert item.path is None or text.count("<|image_pad|>") == len(item.times)
                assert item.path is not None or text.count("<|image_pad|>") == len(item.scenes)
    assert sum(map(bool, paddings)) > 2, "the test needs rows of different lengths"


class Echo:
    """A model that says again what it is told, and keeps what it gets."""

    device = torch.device("cpu")

    def __init__(self):
        self.calls = []

    def generate(self, input_ids, **inputs):
        self.calls.append({"input_ids": input_ids, **inputs})
        return torch.cat([input_ids, input_ids], dim=1)


@pytest.mark.parametrize("size, workers", [(1, 1), (4, 2)])
def test_every_item_gets_its_own_answer(processor, mixed, size, workers, forks):
    for items in mixed:
        model = Echo()
        answers = ask(model, processor, items, size, workers)
        assert Counter(item for item, _ in answers) == Counter(items)
        for item, given in answers:
            assert item.question.prompt in given and given.count("question") == 1
            stamps = "".join(f"{time:.1f} seconds" for time in item.times)
            assert given.removeprefix("user\n").startswith(stamps + item.question.prompt)
        assert len(model.calls) == len(batches_of(items, size))
        assert all(call["do_sample"] is False and call["max_new_tokens"] == evaluate.MAX_NEW_TOKENS for call in model.calls)


def test_answers_in_batches_are_those_of_each_alone(processor, mixed, monkeypatch, forks):
    """Of the checkpoint: rows with images and clips of different number and length, padded on the left."""
    monkeypatch.setattr(evaluate, "MAX_NEW_TOKENS", 6)
    model = AutoModelForCausalLM.from_pretrained(NANO, trust_remote_code=True, dtype=torch.float32).eval()
    for items in mixed:
        together, alone = (dict(ask(model, processor, items, size, 1)) for size in (4, 1))
        assert together == alone
        assert len(set(alone.values())) > 1, "the test needs different answers"


# ----------------------------------------------------------------------------------------------------------------------
# Controls


def test_blanked_pixels_are_grey_and_all_else_stays(processor, mixed, forks):
    for items in mixed:
        seen, blanked = Echo(), Echo()
        ask(seen, processor, items, 4, 1)
        ask(blanked, processor, items, 4, 1, blank)
        for before, after in zip(seen.calls, blanked.calls, strict=True):
            assert before["pixel_values"].any() and not after["pixel_values"].any()
            assert before.keys() == after.keys() and before["pixel_values"].shape == after["pixel_values"].shape
            for name in before.keys() - {"pixel_values"}:
                same = torch.equal if isinstance(before[name], torch.Tensor) else lambda a, b: a == b
                assert same(before[name], after[name]), name
    grey = processor.image_processor([Image.new("RGB", (224, 224), (128,) * 3)], return_tensors="pt")["pixel_values"]
    assert grey.abs().max() < 0.01, "0 stands for grey"


def slow_frame_mask(ids, attended, pad, frames) -> torch.Tensor:
    """bool [B, 1, T, F], True = hidden: a token sees the frames whose placeholders stand at or before it; padding sees none."""
    return torch.tensor([[[[not (on and frame < row[: at + 1].count(pad)) for frame in range(frames)] for at, on in enumerate(ons)]]
                         for row, ons in zip(ids.tolist(), attended.tolist())])  # fmt: skip


def cut(ids, begin, end) -> tuple[list[tuple], list]:
    """The stamps of a row, and the row without them."""
    stamps, rest, at = [], [], 0
    while begin in ids[at:]:
        start = ids.index(begin, at) + 1
        stop = ids.index(end, start)
        stamps.append(tuple(ids[start:stop]))
        rest, at = rest + ids[at:start], stop
    return stamps, rest + ids[at:]


def test_shuffled_stamps_change_places_and_all_else_stays(processor):
    """Stamps of one and of two digits before the point: where they change places, the frames between them move."""
    videos = [[Image.new("RGB", (32, 32), (level,) * 3) for level in range(0, 10 * count, 10)] for count in (13, 3, 1)]
    text = ["<|video|>What is visible at 3.0 seconds?", "<|video|>", "<|video|>12.0 seconds"]
    inputs = processor(text=text, videos=videos, video_metadata=[{"fps": 1.0}] * 3, padding=True, padding_side="left",
                       return_tensors="pt")  # fmt: skip
    before = {name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    pad, (_, _, _, frames) = processor.image_token_id, before["cross_attention_mask"].shape
    expected = slow_frame_mask(before["input_ids"], before["attention_mask"], pad, frames)
    assert frames == 13 and torch.equal(before["cross_attention_mask"], expected)

    shuffle_stamps(inputs, processor)
    marks = processor.time_start_token_id, processor.time_end_token_id
    for row, count in enumerate((13, 3, 1)):
        stamps, rest = cut(before["input_ids"][row].tolist(), *marks)
        shuffled, same = cut(inputs["input_ids"][row].tolist(), *marks)
        assert len(stamps) == count and sorted(shuffled) == sorted(stamps) and same == rest
        assert len(set(map(len, stamps))) == (2 if count > 10 else 1), "the test needs stamps of two lengths"
        assert (shuffled != stamps) == (count > 1)
    assert inputs["input_ids"].shape == before["input_ids"].shape
    expected = slow_frame_mask(inputs["input_ids"], inputs["attention_mask"], pad, frames)
    assert torch.equal(inputs["cross_attention_mask"], expected) and not torch.equal(expected, before["cross_attention_mask"])
    for name in before.keys() - {"input_ids", "cross_attention_mask"}:
        assert torch.equal(inputs[name], before[name]), name


# ----------------------------------------------------------------------------------------------------------------------
# The table and the command


def test_table():
    result = {"tasks": {
        "text": {"n": 500, "exact": 0.851, "commonest answer": 0.004, "measures": {"exact": 0.851, "characters": 0.9564},
                 "blanked": {"exact": 0.0, "characters": 0.05}, "twice as large": {"exact": 0.8, "characters": 0.93}},
        "when": {"n": 7, "exact": 1.0, "commonest answer": 2 / 7, "measures": {"exact": 1.0, "within a frame": 1.0},
                 "stamps shuffled": {"exact": 0.25, "within a frame": 0.5}, "twice as long": {"exact": 0.5, "within a frame": 1.0}},
        "color": {"n": 1, "exact": 0.0, "commonest answer": 1.0, "measures": {"exact": 0.0}},
    }}  # fmt: skip
    assert table(result).splitlines() == [
        "| task | n | exact | commonest answer | blanked | stamps shuffled | twice as large | twice as long | other measures |",
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
def test_wrong_arguments_are_refused_before_anything_is_loaded(arguments, complaint, monkeypatch, tmp_path, capsys):
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
    monkeypatch.setattr(evaluate, "SECONDS", BRIEF)
    monkeypatch.setattr(evaluate, "LONG", (3.0, 4.0))
    monkeypatch.setattr(evaluate, "MAX_NEW_TOKENS", 8)
    asks = []

    def noting(model, processor, items, size, workers, alter=None):
        asks.append((items[0].question.task, alter, items[0].scenes[0].width, items[0].scenes[0].seconds))
        return ask(model, processor, items, size, workers, alter)

    monkeypatch.setattr(evaluate, "ask", noting)
    (tmp_path / "answers.jsonl").write_text("of a run before\n")
    options = ("--checkpoint", NANO, "--n", 2, "--control-n", 1, "--seed", 3, "--workers", 1, "--device", "cpu")
    files = ("--json", tmp_path / "table.json", "--answers", tmp_path / "answers.jsonl")
    evaluate.main([str(argument) for argument in (*options, *files, "--tasks", *PICTURES, *CLIPS)])

    result = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    asked = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    tasks = result.pop("tasks")
    assert result.pop("parameters") > 1e6
    assert result == {"checkpoint": str(NANO), "dtype": "bfloat16", "seed": 3, "control n": 1}
    assert list(tasks) == [*PICTURES, *CLIPS]
    measures = {"describe picture": {"every object"}, "text": {"characters"}, "which image": set(), "when": {"within a frame"},
                "describe clip": {"every event", "every event, within a frame", "first frame"}, "direction": set()}  # fmt: skip
    for task, row in tasks.items():
        columns = ["blanked"] + ["stamps shuffled"] * (task in ("describe clip", "when"))
        columns.append("twice as large" if task in PICTURES else "twice as long")
        assert list(row) == ["n", "exact", "commonest answer", "measures", *columns]
        assert row["n"] == 2 and row["commonest answer"] in (0.5, 1.0) and row["exact"] == row["measures"]["exact"]
        for scores in (row["measures"], *(row[column] for column in columns)):
            assert scores.keys() == {"exact", *measures[task]} and all(0 <= score <= 1 for score in scores.values())
        alters = {"blanked": blank, "stamps shuffled": shuffle_stamps}
        calls = [call[1:] for call in asks if call[0] == task]
        assert [alter for alter, *_ in calls] == [None, *map(alters.get, columns)]
        (_, width, seconds), (_, last_width, last_seconds) = calls[0], calls[-1]
        assert (seconds == 0 and last_width == 2 * width) if task in PICTURES else (2 <= seconds <= 3 <= last_seconds <= 4)
        own = [line for line in asked if line["task"] == task]
        assert [line["column"] for line in own] == ["", "", *columns]
        for column in ("", *columns):
            exact = [line["given"] == line["right"] for line in own if line["column"] == column]
            assert (row[column] if column else row)["exact"] == sum(exact) / len(exact)
        first = {(line["prompt"], line["right"]) for line in own if line["column"] in ("", "blanked", "stamps shuffled")}
        assert len(first) <= 2, "controls ask the same questions"
        expected = picture_items(task, 2, 3) if task in PICTURES else None
        if expected is not None:
            items = [(item.question.prompt, item.question.answer, item.template) for item in (*expected, expected[0], expected[0])]
            assert [(line["prompt"], line["right"], line["template"]) for line in own] == items
    assert len(asked) == sum(len(row) - 4 + 2 for row in tasks.values())
    shown = capsys.readouterr()
    assert shown.out == table({"tasks": tasks}) + "\n"
    assert [line.split("s  ", 1)[1].split(":")[0] for line in shown.err.splitlines() if " s  " in line] == [*PICTURES, *CLIPS]
