"""Batches of the drawn world: packed questions equal questions alone; labels and attention targets are right."""

import random
import re

import numpy as np
import pytest
import torch
from nano_batches import (  # noqa: F401 - fixtures among them
    KINDS,
    batch_of,
    known,
    media_inputs,
    media_of,
    model,
    named,
    notes,
    one_font,
    processor,
)

from moss_vl.training.nano import lessons, rows
from moss_vl.training.nano.attention_targets import AttentionTargets
from moss_vl.training.nano.facts import FRAME_FACTS, LETTERS_PER_TOKEN, SLOTS
from moss_vl.training.nano.lessons import Lessons
from moss_vl.training.nano.rows import TASKS, visible_parts
from moss_vl.training.nano.world import COLOURS, SHAPES, SIGN_CHARACTERS, random_clip


def alone(model, processor, row_text, question, media) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of a question alone with its media and answer, and the logits [n, V] of the n tokens of the answer."""
    text = "<|image|>" * len(media.get("images", ())) + "<|video|>" * len(media.get("videos", ())) + question.prompt
    if row_text.template:
        turn = [{"role": "user", "content": text}]
        text = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=text, return_tensors="pt", **media)
    answer = processor.tokenizer(question.answer + "<|im_end|>", return_tensors="pt")["input_ids"]
    hidden = inputs["cross_attention_mask"]
    ids = torch.cat([inputs["input_ids"], answer], dim=1)
    logits = model(
        input_ids=ids,
        cross_attention_mask=torch.cat([hidden, hidden[:, :, -1:].expand(-1, -1, answer.shape[1], -1)], dim=2),
        pixel_values=inputs["pixel_values"],
        grid_thw=inputs["grid_thw"],
        media_nums_per_sample=inputs["media_nums_per_sample"],
    ).logits
    return ids[0], logits[0, -answer.shape[1] - 1 : -1]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_question_in_a_packed_row_equals_the_question_alone(processor, model, notes, kind):
    wanted = {
        ("template", True),
        ("template", False),
        ("part", 2),
        ("media", 2) if kind == "images" else ("empty prompt", True),
    }
    covered = set()
    for step in range(20):
        if wanted <= covered:
            break
        notes["scenes"].clear(), notes["pixels"].clear()
        batch = batch_of(processor, kind, step)
        out = model(
            input_ids=batch["input_ids"],
            attention_mask=visible_parts(batch["parts"]),
            position_ids=batch["position_ids"],
            labels=batch["labels"],
            **media_inputs(model, batch),
        )
        losses = []
        for row, row_text in enumerate(notes["rows"]):
            media, parts = media_of(notes, batch, row), batch["parts"][row]
            for part, question in enumerate(row_text.asked, 1):
                ids, logits = alone(model, processor, row_text, question, media)
                assert torch.equal(batch["input_ids"][row][(parts == 0) | (parts == part)], ids), question
                answer = ((parts == part) & (batch["labels"][row] != -100)).nonzero()[:, 0]
                packed = out.logits[row, answer - 1]
                assert (packed - logits).abs().max() < 1e-4 * logits.abs().max(), (step, row, question)
                losses.append(
                    torch.nn.functional.cross_entropy(logits, batch["labels"][row, answer], reduction="none")
                )
                covered |= {("template", row_text.template), ("part", part)}
                covered |= {("media", batch["media_nums"][row]), ("empty prompt", question.prompt == "")}
        assert out.loss.item() == pytest.approx(torch.cat(losses).mean().item(), abs=1e-4)
    assert wanted <= covered


@pytest.mark.parametrize("kind", KINDS[1:])
def test_labels_are_the_answers(processor, notes, kind):
    batch = batch_of(processor, kind, step=5)
    assert len(notes["rows"]) == len(batch["input_ids"]) == len(batch["media_nums"])
    assert sum(batch["media_nums"]) == len(batch["grid_thw"])
    for row, row_text in enumerate(notes["rows"]):
        ids, labels, parts, tasks = (batch[name][row] for name in ("input_ids", "labels", "parts", "tasks"))
        learned = labels != -100
        assert torch.equal(labels[learned], ids[learned]) and torch.equal(tasks >= 0, learned)
        assert set(parts[learned].tolist()) == set(range(1, len(row_text.asked) + 1))
        assert (ids[parts == -1] == processor.tokenizer.pad_token_id).all()
        for part, question in enumerate(row_text.asked, 1):
            answer = (learned & (parts == part)).nonzero()[:, 0]
            assert processor.tokenizer.decode(ids[answer]) == question.answer + "<|im_end|>"
            assert set(tasks[answer].tolist()) == {TASKS.index(question.task)}
            assert answer.tolist() == list(range(answer[0], (parts == part).nonzero().max() + 1)), (
                "an answer ends its question"
            )
        assert len({question.prompt for question in row_text.asked}) == len(row_text.asked)


def test_a_question_sees_the_media_and_itself():
    visible = visible_parts(torch.tensor([[0, 0, 1, 1, 2, -1]]))
    assert visible.shape == (1, 1, 6, 6)
    assert visible[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]


def same(one, other) -> bool:
    def equal(a, b):
        if isinstance(a, dict):
            return same(a, b)
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)


def test_batches_depend_only_on_the_seed_and_the_arguments(processor):
    first, second, other = (Lessons(processor, seed, size=8) for seed in (3, 3, 4))
    calls = [*((step, kind, 0.5) for step, kind in enumerate((*lessons.KINDS, "look"))), (2, "clips", 0.9, 1)]
    forward = [first.batch(*call) for call in calls]
    backward = [second.batch(*call) for call in reversed(calls)][::-1]
    assert [batch["kind"] for batch in forward] == [*lessons.KINDS, "look", "clips"]
    assert all(same(*pair) for pair in zip(forward, backward, strict=True))
    assert not same(forward[0], forward[5]) and not same(forward[0], other.batch(*calls[0]))
    assert same(first.batch(*calls[0], rank=0), forward[0])
    assert not same(first.batch(*calls[0], rank=1), forward[0])


def test_an_unknown_kind_of_batch_is_an_error(processor):
    with pytest.raises(ValueError, match="no kind of batch named 'later'; expected one of look"):
        Lessons(processor, seed=0, size=8).batch(0, "later", 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_parallel_processes_have_batches_of_one_kind_and_no_common_scene(processor, notes, kind):
    batches, scenes = [], []
    for rank in range(2):
        notes["scenes"].clear()
        batches.append(Lessons(processor, seed=0, size=8).batch(0, kind, 0.0, rank))
        scenes.append(set(notes["scenes"]))
    assert [batch["kind"] for batch in batches] == [kind] * 2
    assert all(scenes) and not scenes[0] & scenes[1]


def test_a_later_clip_shows_the_same(processor, notes, monkeypatch):
    """Pixels and events are equal; time stamps and answers about times are those of the longer clip."""
    pad = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    scene = random_clip(random.Random(3), (4, 8))
    notes["scenes"].append(scene)
    limits = (192 * 192, 224 * 224)
    make = Lessons(processor, seed=0, size=8).clip
    plain, later = (make(random.Random(0), scene, 1, limits, later) for later in (False, True))
    monkeypatch.setattr(lessons, "LEAPING", 0.0)
    assert plain.leaps == [0] * len(plain.frames) == make(random.Random(0), scene, 1, limits, True).leaps
    assert torch.equal(plain.drawn.pixels, later.drawn.pixels) and plain.drawn.moments == later.drawn.moments
    stamps = [digits_of(clip.facts, "stamp") for clip in (plain, later)]
    seconds = [(100 * row[:, 0] + 10 * row[:, 1] + row[:, 2]) / 10 for row in stamps]
    shift = seconds[1] - seconds[0]
    assert 0 < shift.min() and shift.max() - shift.min() < 0.11 and shift.max() <= lessons.LATEST + 0.1
    others = [index for index, (name, _) in enumerate(FRAME_FACTS) if not name.startswith("stamp")]
    assert torch.equal(plain.facts[:, others], later.facts[:, others])
    text = processor.tokenizer.decode(later.text.ids)
    written = [float(stamp) for stamp in re.findall(r"<.time_start.>(.*?) seconds<.time_end.>", text)]
    assert written == pytest.approx(seconds[1].tolist(), abs=1e-4) and later.text.ids.count(pad) == len(written)
    whens = [question.answer for question in later.text.asked if question.task == "when"]
    assert all(float(answer.removesuffix(" seconds")) in written for answer in whens)


def digits_of(facts, group):
    return facts[:, [index for index, (name, _) in enumerate(FRAME_FACTS) if name.startswith(group)]].float()


def test_leaps_move_frames_and_questions_to_later_positions(processor):
    plain = rows.RowText(processor.tokenizer, True, "a<|image_pad|>b<|image_pad|>c", [(2, 3), (2, 3)])
    leaping = rows.RowText(processor.tokenizer, True, "a<|image_pad|>b<|image_pad|>c", [(2, 3), (2, 3)])
    leaping.leap([5, 7])
    first, second = plain.pads
    added = [now - before for now, before in zip(leaping.positions, plain.positions, strict=True)]
    assert added == [5] * (first + 1) + [7] * (len(added) - first - 1) and second > first
    assert leaping.begin == plain.begin + 7
    assert all(
        sorted(leaps) == leaps and leaps[-1] <= lessons.FURTHEST
        for leaps in (lessons.random_leaps(random.Random(i), 9) for i in range(50))
    )


# attention targets


def attended(batch, name) -> dict:
    """(row, text token) -> the target tokens, which are the same for every head that has any."""
    heads = {}
    for row, head, text, token, _ in batch["attention"][name].tolist():
        heads.setdefault((row, text), {}).setdefault(head, set()).add(token)
    for targets in heads.values():
        assert set(targets) in (set(AttentionTargets.HALF), set(range(8)))
        assert len({*map(frozenset, targets.values())}) == 1
    return {place: targets[0] for place, targets in heads.items()}


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_group_belongs_to_one_head_of_one_text_token(processor, kind):
    batch = batch_of(processor, kind, 0)
    for points in batch["attention"].values():
        groups = {}
        for row, head, text, token, group in points.tolist():
            groups.setdefault(group, set()).add((row, head, text))
        assert sorted(groups) == list(range(len(groups))) and all(len(places) == 1 for places in groups.values())


def test_answers_attend_to_tokens_that_show_them(processor, notes):
    """Colours, shapes and letters of answers are those of the vision tokens to attend to."""
    checked = {"colour": 0, "shape": 0, "letter": 0}
    for step in range(3):
        batch = batch_of(processor, "pictures", step)
        begins = np.cumsum([0, *(h * w // 4 for _, h, w in batch["grid_thw"])])
        for (row, text), tokens in attended(batch, "looks").items():
            assert batch["labels"][row, text + 1] != -100
            word = processor.tokenizer.decode(batch["input_ids"][row, text + 1]).strip()
            for sight in (named(batch["token_facts"][begins[row] + token]) for token in tokens):
                if word in COLOURS:
                    assert list(COLOURS)[sight["colour"]] == word
                    checked["colour"] += 1
                elif word in SHAPES:
                    assert SHAPES[sight["shape"]] == word
                    checked["shape"] += 1
                elif word in SIGN_CHARACTERS and TASKS[batch["tasks"][row, text + 1]] == "text":
                    assert SIGN_CHARACTERS.index(word) in [sight[f"letter {i}"] for i in range(LETTERS_PER_TOKEN)]
                    checked["letter"] += 1
    assert min(checked.values()) > 5


def test_answers_attend_to_the_thing_that_the_question_names(processor, notes):
    """Answers about place or colour have the targets of the thing; answers about an absent thing, the separator."""
    covered = set()
    for step in range(2):
        batch = batch_of(processor, "pictures", step)
        looks = attended(batch, "looks")
        nothing = processor.tokenizer.encode("nothing")[0]
        for (row, text), asked in attended(batch, "asked").items():
            task, word = TASKS[batch["tasks"][row, text + 1]], batch["input_ids"][row, text + 1]
            if task == "relation":
                assert asked.isdisjoint(looks.get((row, text), ())) or word == nothing
            elif (row, text) in looks:
                assert asked == looks[row, text]
            else:
                assert task == "exists" and word == processor.tokenizer.encode("no")[0]
                assert asked == {batch["grid_thw"][row][1] * batch["grid_thw"][row][2] // 4}
                task = "not there"
            covered.add(task)
    assert {"relation", "place", "color", "exists", "not there"} <= covered


def test_pictures_attend_to_the_thing_of_each_slot(processor, notes):
    """One head per slot: tokens that show a thing of its shape, colour and place; the separator if it is empty."""
    batch, full = batch_of(processor, "pictures", 0), 0
    begins = np.cumsum([0, *(h * w // 4 for _, h, w in batch["grid_thw"])])
    for row, head, text, token, _ in batch["attention"]["slots"].tolist():
        assert batch["input_ids"][row, text] == processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        facts, slot = known(batch["frame_facts"][row].tolist()), SLOTS[head]
        if facts[f"colour {slot}"] == len(COLOURS):
            assert token == begins[row + 1] - begins[row]
        else:
            sight = named(batch["token_facts"][begins[row] + token])
            assert [sight[name] for name in ("colour", "place")] == [
                facts[f"{name} {slot}"] for name in ("colour", "place")
            ]
            assert sight["shape"] == (head if head < len(SHAPES) else facts[f"kind {slot}"])
            full += 1
    assert full > 8


def test_answers_about_clips_attend_to_the_frame_that_shows_them(processor, notes):
    """The frame with the time stamp of the answer ("when") or question ("visible at"); the picture of the answer."""
    found = {"when": 0, "visible at": 0, "which image": 0}
    pad = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for kind, step in (("clips", 0), ("clips", 1), ("images", 0)):
        notes["pixels"].clear()
        batch = batch_of(processor, kind, step)
        frames = attended(batch, "frames")
        for row, row_text in enumerate(notes["rows"]):
            pads = (batch["input_ids"][row] == pad).nonzero()[:, 0].tolist()
            for part, question in enumerate(row_text.asked, 1):
                if kind == "images":
                    frame = int(question.answer) - 1
                elif question.task in found:
                    scene = row_text.clip[0]
                    rate = next(rate for rate in (1, 2) if len(lessons.sampled_times(scene, rate)) == len(pads))
                    stamps = [f"{time:.1f} seconds" for time in lessons.sampled_times(scene, rate)]
                    frame = next(
                        (
                            frame
                            for frame, stamp in enumerate(stamps)
                            if stamp == question.answer or question.prompt[:-1].endswith(f" {stamp}")
                        ),
                        None,
                    )
                    if frame is None:
                        continue  # asked about a time between two frames
                else:
                    continue
                answer = ((batch["parts"][row] == part) & (batch["labels"][row] != -100)).nonzero()[:, 0].tolist()
                looked = {frozenset(frames[row, at - 1]) for at in answer[:-1]}  # the last is the end of the turn
                assert looked == {frozenset([pads[frame]])}, question
                found[question.task] += 1
    assert min(found.values()) > 0


def test_frames_attend_to_their_time_stamps_and_to_the_frame_before(processor):
    batch = batch_of(processor, "clips", 0)
    digits = {}
    for row, head, text, token, _ in batch["attention"]["stamps"].tolist():
        digits.setdefault((row, text), {})[head] = processor.tokenizer.decode(batch["input_ids"][row, token])
    before = attended(batch, "before")
    answers = [at for at in digits if batch["labels"][at[0], at[1] + 1] != -100]
    assert answers and {TASKS[batch["tasks"][row, text + 1]] for row, text in answers} == {"visible at"}
    for row, text in answers:
        prompt = processor.tokenizer.decode(
            batch["input_ids"][row][(batch["parts"][row] == batch["parts"][row, text])]
        ).split(" seconds")[0]
        assert (
            f"{digits[row, text][2]}{digits[row, text][1]}.{digits[row, text][0]}".strip() == prompt.split(" at ")[-1]
        )
    pads = (batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")).nonzero().tolist()
    last = {}
    for (row, text), facts_of in zip(pads, batch["frame_facts"].tolist(), strict=True):
        stamp = [known(facts_of)[f"stamp {i}"] for i in range(3)]
        tens = str(stamp[0]) if stamp[0] else "<|time_start|>"
        assert digits[row, text] == {0: str(stamp[2]), 1: str(stamp[1]), 2: tens}
        assert before[row, text] == {last.get(row, text)}
        last[row] = text
