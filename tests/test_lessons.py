"""Training batches: a question in a packed row is what it is by itself, labels are answers, and tokens are asked what they show."""

import random
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from tiny import make_model
from transformers import AutoProcessor

from moss_vl.training.nano import lessons, world
from moss_vl.training.nano.lessons import (
    FACTS,
    FINE,
    HAPPENINGS,
    LETTERS_A_TOKEN,
    PLACES,
    SIGHTS,
    SLOTS,
    TASKS,
    Lessons,
    clip_facts,
    fact_rows,
    facts,
    in_slots,
    ink_patches,
    may_see,
    sights,
)
from moss_vl.training.nano.world import (
    COLOURS,
    SHAPES,
    SIGN_CHARACTERS,
    Scene,
    Sign,
    Thing,
    draw_scene,
    random_clip,
    sign_mask,
)


KINDS = ("look", "pictures", "images", "clips")
NAMES = [name for name, _ in SIGHTS]


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(
        ROOT / "checkpoints/moss-vl-nano", trust_remote_code=True, frame_extract_num_threads=1
    )


@pytest.fixture(scope="module")
def model(processor):
    """Random weights, and the checkpoint's patches and tokens."""
    tokenizer = processor.tokenizer
    tokens = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in tokens.items()}
    text = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 32768}
    return make_model(text=text, vision={"patch_size": 16}, **ids)


@pytest.fixture(autouse=True)
def one_font(monkeypatch):
    """The same scenes wherever the tests run: fonts are drawn at random among those installed."""
    monkeypatch.setattr(world, "fonts", lambda: (None,))


@pytest.fixture
def notes(monkeypatch):
    """What went into the last batch: scenes, pictures as the image processor got them, and by rows their scripts with questions."""
    notes = {"scenes": [], "pixels": [], "rows": []}

    def note_scene(make):
        def noting(*args, **kwargs):
            notes["scenes"].append(make(*args, **kwargs))
            return notes["scenes"][-1]

        return noting

    def note_question(script, question, add=lessons.Script.add):
        script.asked = [*getattr(script, "asked", []), question]
        script.clip = notes["scenes"][-1], *notes["pixels"][-1]
        add(script, question)

    def note_pixels(self, pictures, limits, pixels=Lessons.pixels):
        notes["pixels"].append((pictures, limits))
        return pixels(self, pictures, limits)

    def note_rows(scripts, pad, join=lessons.join):
        notes["rows"] = scripts
        return join(scripts, pad)

    monkeypatch.setattr(lessons, "random_picture", note_scene(lessons.random_picture))
    monkeypatch.setattr(lessons, "random_clip", note_scene(lessons.random_clip))
    monkeypatch.setattr(lessons, "join", note_rows)
    monkeypatch.setattr(lessons.Script, "add", note_question)
    monkeypatch.setattr(Lessons, "pixels", note_pixels)
    return notes


def batch_of(processor, kind, step):
    return Lessons(processor, seed=0, plan=lambda step: kind, size=8).batch(step)


def media_of(notes, batch, row) -> dict:
    """The media of a row as the processor takes them."""
    if batch["kind"] != "clips":
        pictures, (low, high) = notes["pixels"][0]
        begin = sum(batch["media_nums"][:row])
        return {"images": pictures[begin : begin + batch["media_nums"][row]], "min_pixels": low, "max_pixels": high}
    scene, pictures, (low, high) = notes["rows"][row].clip
    # Most frames are never sampled, nor is their memory touched.
    frames = np.zeros((round(scene.seconds * scene.fps), scene.height, scene.width, 3), dtype=np.uint8)
    rate = next(rate for rate in (1, 2) if len(lessons.sampled_times(scene, rate)) == batch["grid_thw"][row][0])
    moments = {}
    for time in lessons.sampled_times(scene, rate):
        moment = moments.setdefault(tuple(scene.at(time)), len(moments))
        frames[round(time * scene.fps)] = np.asarray(pictures[moment])
    return {
        "videos": [frames],
        "video_metadata": [{"fps": scene.fps}],
        "video_fps": rate,
        "min_pixels": low,
        "max_pixels": high,
    }


def alone(model, processor, script, question, media) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of the prompt with the answer, and the logits [n, V] of the answer's n tokens, of a question by itself."""
    text = "<|image|>" * len(media.get("images", ())) + "<|video|>" * len(media.get("videos", ())) + question.prompt
    if script.template:
        turn = [{"role": "user", "content": text}]
        text = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=text, return_tensors="pt", **media)
    answer = processor.tokenizer(question.answer + "<|im_end|>", return_tensors="pt")["input_ids"]
    hidden = inputs["cross_attention_mask"]
    ids = torch.cat([inputs["input_ids"], answer], dim=1)
    logits = model(
        input_ids=ids,
        cross_attention_mask=torch.cat([hidden, hidden[:, :, -1:].expand(-1, -1, answer.shape[1], -1)], dim=2),
        pixel_values=inputs["pixel_values"].bfloat16().float(),  # as the batches have them
        grid_thw=inputs["grid_thw"],
        media_nums_per_sample=inputs["media_nums_per_sample"],
    ).logits
    return ids[0], logits[0, -answer.shape[1] - 1 : -1]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_question_in_a_packed_row_is_the_question_by_itself(processor, model, notes, kind):
    wanted = {
        ("template", True),
        ("template", False),
        ("part", 2),
        ("media", 2) if kind == "images" else ("empty prompt", True),
    }
    seen = set()
    for step in range(20):
        if wanted <= seen:
            break
        notes["scenes"].clear(), notes["pixels"].clear()
        batch = batch_of(processor, kind, step)
        out = model(
            input_ids=batch["input_ids"], attention_mask=may_see(batch["parts"]), position_ids=batch["position_ids"],
            labels=batch["labels"], pixel_values=batch["pixel_values"].float(), grid_thw=batch["grid_thw"],
            media_nums_per_sample=batch["media_nums"],
        )  # fmt: skip
        losses = []
        for row, script in enumerate(notes["rows"]):
            media, parts = media_of(notes, batch, row), batch["parts"][row]
            for part, question in enumerate(script.asked, 1):
                ids, logits = alone(model, processor, script, question, media)
                assert torch.equal(batch["input_ids"][row][(parts == 0) | (parts == part)], ids), question
                answer = ((parts == part) & (batch["labels"][row] != -100)).nonzero()[:, 0]
                packed = out.logits[row, answer - 1]
                assert (packed - logits).abs().max() < 1e-4 * logits.abs().max(), (step, row, question)
                losses.append(
                    torch.nn.functional.cross_entropy(logits, batch["labels"][row, answer], reduction="none")
                )
                seen |= {("template", script.template), ("part", part)}
                seen |= {("media", batch["media_nums"][row]), ("empty prompt", question.prompt == "")}
        assert out.loss.item() == pytest.approx(torch.cat(losses).mean().item(), abs=1e-4)
    assert wanted <= seen


@pytest.mark.parametrize("kind", KINDS[1:])
def test_labels_are_the_answers(processor, notes, kind):
    batch = batch_of(processor, kind, step=5)
    assert len(notes["rows"]) == len(batch["input_ids"]) == len(batch["media_nums"])
    assert sum(batch["media_nums"]) == len(batch["grid_thw"])
    for row, script in enumerate(notes["rows"]):
        ids, labels, parts, tasks = (batch[name][row] for name in ("input_ids", "labels", "parts", "tasks"))
        learned = labels != -100
        assert torch.equal(labels[learned], ids[learned]) and torch.equal(tasks >= 0, learned)
        assert set(parts[learned].tolist()) == set(range(1, len(script.asked) + 1))
        assert (ids[parts == -1] == processor.tokenizer.pad_token_id).all()
        for part, question in enumerate(script.asked, 1):
            answer = (learned & (parts == part)).nonzero()[:, 0]
            assert processor.tokenizer.decode(ids[answer]) == question.answer + "<|im_end|>"
            assert set(tasks[answer].tolist()) == {TASKS.index(question.task)}
            assert answer.tolist() == list(range(answer[0], (parts == part).nonzero().max() + 1)), (
                "an answer ends its question"
            )
        assert len({question.prompt for question in script.asked}) == len(script.asked)


def test_who_may_see_whom():
    seen = may_see(torch.tensor([[0, 0, 1, 1, 2, -1]]))
    assert seen.shape == (1, 1, 6, 6)
    assert seen[0, 0].int().tolist() == [
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


def test_batches_depend_on_their_number_the_seed_and_the_rank_alone(processor):
    first, second, other = (Lessons(processor, seed, lambda step: KINDS[step % 4], size=8) for seed in (3, 3, 4))
    forward = [first.batch(step) for step in range(5)]
    backward = [second.batch(step) for step in reversed(range(5))][::-1]
    assert [batch["kind"] for batch in forward] == [*KINDS, "look"]
    assert all(same(*pair) for pair in zip(forward, backward, strict=True))
    assert not same(forward[0], forward[4]) and not same(forward[0], other.batch(0))
    assert same(first.batch(0, rank=0), forward[0]) and same(first.batch(1, rank=1), second.batch(1, rank=1))


@pytest.mark.parametrize("kind", KINDS)
def test_processes_side_by_side_have_batches_of_one_kind_and_no_scene_in_common(processor, notes, kind):
    batches, scenes = [], []
    for rank in range(2):
        notes["scenes"].clear()
        batches.append(
            Lessons(processor, seed=0, plan=lambda step: KINDS[step], size=8).batch(KINDS.index(kind), rank)
        )
        scenes.append(set(notes["scenes"]))
    assert [batch["kind"] for batch in batches] == [kind] * 2
    assert all(scenes) and not scenes[0] & scenes[1]


# Sights

STAGE = Scene(
    width=320, height=240, background=((220, 220, 220),) * 2, sign=Sign("K7Q", 152 / 320, 0.25, 0.2, "black"),
    things=(
        Thing("star", "blue", 290 / 320, 30 / 240, 0.10),
        Thing("circle", "red", 120 / 320, 120 / 240, 0.20),
        Thing("ring", "green", 201 / 320, 199 / 240, 0.09),
    ),
)  # fmt: skip


def named(row) -> dict:
    return dict(zip(NAMES, row.tolist(), strict=True))


def test_sights_of_things():
    """Tokens of 40 x 40 pixels. The circle (radius 48) covers the middles of four; the ring's middle lies in a token whose own
    middle it does not cover."""
    shown = sights(STAGE.things, (), (320, 240), (6, 8)).reshape(6, 8, len(SIGHTS))
    none = dict.fromkeys(NAMES, -100) | {"shape": len(SHAPES)}
    none |= {f"letter {i}": len(SIGN_CHARACTERS) for i in range(LETTERS_A_TOKEN)}
    kinds = {"circle": (0, 0, 1), "ring": (5, 1, 0), "star": (3, 2, 0)}

    def thing(name, place, x, y, rank, **nearest):
        sight = dict(zip(("shape", "colour", "size"), kinds[name], strict=True)) | {
            "place": PLACES.index(place),
            "rank": rank,
            "twin": 0,
        }
        sight |= {"across": int(x * FINE), "down": int(y * FINE)} | {
            f"nearest shape {way}": len(SHAPES) for way in world.DIRECTIONS
        }
        for way, other in nearest.items():
            sight |= dict(
                zip((f"nearest {what} {way}" for what in ("shape", "colour", "size")), kinds[other], strict=True)
            )
        return sight

    circle = thing("circle", "center", 120 / 320, 120 / 240, 0, right="ring", up="star", down="ring")
    ring = thing("ring", "bottom", 201 / 320, 199 / 240, 1, left="circle", right="star", up="circle")
    star = thing("star", "top right", 290 / 320, 30 / 240, 2, left="ring", down="ring")
    expected = {(2, 2): circle, (2, 3): circle, (3, 2): circle, (3, 3): circle, (4, 5): ring, (0, 7): star}
    for row in range(6):
        for column in range(8):
            assert named(shown[row, column]) == none | expected.get((row, column), {}), (row, column)
    assert all((shown[..., i] < classes).all() for i, (_, classes) in enumerate(SIGHTS))
    assert [classes for _, classes in SIGHTS[:8]] == [len(SHAPES) + 1, len(COLOURS), 2, 9, FINE, FINE, 6, 3]


def test_twins_are_told_apart():
    """Things of one shape, from left to right."""
    things = [Thing("star", "blue", x, 0.5, 0.1) for x in (0.9, 0.1, 0.5)]
    shown = sights(things, (), (300, 100), (1, 3))
    assert [named(row)["twin"] for row in shown] == [named(row)["rank"] for row in shown] == [0, 1, 2]


def test_sights_of_letters():
    """Against the columns in which the sign's ink stands."""
    shown = sights((), STAGE.signs, (320, 240), (6, 8)).reshape(6, 8, len(SIGHTS))
    spelling, shown = (
        shown[..., NAMES.index("spelling")],
        shown[..., NAMES.index("letter 0") : NAMES.index("spelling")],
    )
    mask, (begin, _) = sign_mask(STAGE.sign, STAGE, 1)
    ink = np.flatnonzero((np.asarray(mask) > 0).any(0)) + begin
    letters = np.split(ink, np.flatnonzero(np.diff(ink) > 1) + 1)
    assert len(letters) == 3, "the test needs letters that do not touch"
    expected, first = np.full((6, 8, LETTERS_A_TOKEN), len(SIGN_CHARACTERS)), np.full((6, 8), -100)
    for i, (letter, columns) in reversed([*enumerate(zip("K7Q", letters, strict=True))]):
        column = int((columns[0] + columns[-1]) / 2 / 40)
        expected[1, column] = [SIGN_CHARACTERS.index(letter), *expected[1, column, :-1]]
        first[1, column] = i
    assert (shown == expected).all() and (spelling == first).all()


def test_more_letters_than_a_token_is_asked():
    shown = sights((), (Sign("ABCDE", 0.25, 0.3, 0.12, "black"),), (320, 240), (2, 2))[
        :, NAMES.index("letter 0") : NAMES.index("spelling")
    ]
    assert shown.tolist() == [[0, 1, 2, 3], *[[len(SIGN_CHARACTERS)] * 4] * 3]


@torch.no_grad()
def test_sights_stand_in_the_order_of_the_vision_tokens(processor, model, notes):
    """Wherever a token is asked about a circle, pixels of that circle's colour are in it."""
    circles = 0
    for step in range(2):
        notes["scenes"].clear()
        batch = batch_of(processor, "pictures", step)
        tokens = batch["pixel_values"].float().view(-1, 4, 3, 256).transpose(1, 2).flatten(2)  # [N, 3, pixels]
        assert (
            len(batch["sights"])
            == len(tokens)
            == len(model.model.visual(batch["pixel_values"].float(), batch["grid_thw"]))
        )
        scenes = iter(sorted(notes["scenes"], key=lambda scene: scene.width / scene.height))
        ends = np.cumsum([h * w // 4 for _, h, w in batch["grid_thw"]])
        for begin, end, scene in zip([0, *ends], ends, scenes, strict=False):
            things = scene.at(0.0)
            for token, sight in zip(tokens[begin:end], batch["sights"][begin:end], strict=True):
                if sight[0] == SHAPES.index("circle"):
                    thing = things[named(sight)["rank"]]
                    assert (thing.shape, list(COLOURS).index(thing.colour)) == ("circle", sight[1])
                    levels = 127.5 * (token.T + 1)
                    assert (levels - torch.tensor(thing.rgb)).abs().amax(1).min() < 40
                    circles += 1
    assert circles > 10


def test_ink_stands_in_the_order_of_the_patches(processor):
    """White on black and not resized: an 8 x 8 square's share of ink is about the mean level of its 2 x 2 pixels."""
    things = (Thing("circle", "white", 0.35, 0.3, 0.2), Thing("square", "white", 0.7, 0.7, 0.15, angle=10))
    scene = Scene(128, 160, ((0, 0, 0),) * 2, things, sign=Sign("K7Q", 0.3, 0.85, 0.12, "white"))
    seen = processor.image_processor(draw_scene(scene), min_pixels=4096, max_pixels=1 << 20, return_tensors="pt")
    assert seen["image_grid_thw"].tolist() == [[1, 10, 8]]
    levels = (seen["pixel_values"].view(-1, 3, 8, 2, 8, 2) + 1).mean((1, 3, 5)).flatten(1).numpy() * 127.5 / 252
    ink = ink_patches(scene, (5, 4))
    assert ink.shape == levels.shape and 0.1 < ink.mean() < 0.5
    assert np.abs(ink - levels).mean() < 0.03


# Facts


def told(row) -> dict:
    return {name: value for (name, _), value in zip(FACTS, row, strict=True) if value != -100}


def test_slots():
    """A shape's first thing from the left has the slot of the shape; the others of its shape share two more, and a third has none."""
    things = [*enumerate(Thing(shape, "red", x, 0.5, 0.1) for shape, x in
                         (("star", 0.9), ("ring", 0.5), ("star", 0.1), ("ring", 0.6), ("ring", 0.7), ("ring", 0.8)))]  # fmt: skip
    slots = in_slots(things)
    assert {slot: number for slot, (number, _) in slots.items()} == {"star": 2, "ring": 1, "second": 3, "third": 4}
    assert all(slots[slot] == things[slots[slot][0]] for slot in slots)


def test_facts_of_a_picture():
    things = [*enumerate((*STAGE.things, Thing("ring", "red", 0.1, 0.5, 0.1)))]

    def known(slot, colour, size, place, x, y, rank):
        fine = {f"across {slot}": int(x * FINE), f"down {slot}": int(y * FINE)}
        return {
            f"colour {slot}": colour,
            f"size {slot}": size,
            f"place {slot}": PLACES.index(place),
            **fine,
            f"rank {slot}": rank,
        }

    absent = {f"colour {slot}": len(COLOURS) for slot in SLOTS}
    star, circle = (
        known("star", 2, 0, "top right", 290 / 320, 30 / 240, 3),
        known("circle", 0, 1, "center", 120 / 320, 120 / 240, 1),
    )
    rings = (
        known("ring", 0, 0, "left", 0.1, 0.5, 0)
        | known("second", 1, 0, "bottom", 201 / 320, 199 / 240, 2)
        | {"kind second": 5}
    )
    rows = fact_rows([facts(things, 2), facts([])])
    assert told(rows[0].tolist()) == absent | star | circle | rings | {"count": 4, "picture": 2}
    assert told(rows[1].tolist()) == absent | {"count": 0}
    assert all(value < classes for row in rows.tolist() for value, (_, classes) in zip(row, FACTS, strict=True))


def test_facts_of_a_clip():
    things = (
        Thing("star", "blue", 0.2, 0.2, 0.1, appears=2.3, moves=(5.5, 0.5, 0.0)),
        Thing("ring", "red", 0.5, 0.8, 0.1, changes=(3.0, "white"), disappears=12.2),
    )
    scene = Scene(100, 100, ((220, 220, 220),) * 2, things, seconds=14.0, fps=10)
    rows = [told(row) for row in fact_rows(clip_facts(scene, [float(second) for second in range(14)])).tolist()]
    events = {slot: [row[f"event {slot}"] for row in rows] for slot in SLOTS}
    happens = {name: HAPPENINGS.index(name) for name in HAPPENINGS}
    nothing = len(HAPPENINGS)
    assert events["star"] == [
        happens.get({3: "appears", 6: "moves right", 7: "moves right"}.get(second), nothing) for second in range(14)
    ]
    assert events["ring"] == [
        happens.get({3: "changes", 13: "disappears"}.get(second), nothing) for second in range(14)
    ]
    assert events["cross"] == events["second"] == [nothing] * 14
    assert [row["events"] for row in rows] == [0] * 3 + [2] * 3 + [3] * 7 + [4]
    assert [row["count"] for row in rows] == [1] * 3 + [2] * 10 + [1]
    assert [row["colour ring"] for row in rows] == [0] * 3 + [6] * 10 + [len(COLOURS)]
    assert [[row[f"stamp {i}"] for i in range(3)] for row in rows[9:11]] == [[0, 9, 0], [1, 0, 0]]


def test_facts_of_the_frame_in_which_an_event_begins():
    star = Thing("star", "blue", 0.5, 0.5, 0.1, appears=1.0)
    ring = Thing("ring", "red", 0.2, 0.2, 0.2, changes=(3.0, "white"), tints=())
    cross = Thing("cross", "black", 0.8, 0.8, 0.1, moves=(5.0, 0.0, -0.4))
    scene = Scene(160, 160, ((128, 128, 128),) * 2, (star, ring, cross), seconds=8.0, fps=8)
    rows = clip_facts(scene, [float(second) for second in range(8)])
    told = {
        second: {name: value for name, value in row.items() if name.split()[0] in ("begins", "subject")}
        for second, row in enumerate(rows)
    }
    colours, what = list(COLOURS), lambda name: HAPPENINGS.index(name)
    subjects = {
        1: ("appears", "star", "blue", 0, {"subject place": PLACES.index("center")}),
        3: ("changes", "ring", "red", 1, {"subject paint": colours.index("white")}),
        6: ("moves up", "cross", "black", 0, {}),
    }
    for second, row in told.items():
        if second not in subjects:
            assert row == {"begins": len(HAPPENINGS)}
            continue
        kind, shape, colour, size, more = subjects[second]
        whom = {"subject shape": SHAPES.index(shape), "subject colour": colours.index(colour), "subject size": size}
        assert row == {"begins": what(kind), **whom, **more}


def test_a_clip_that_begins_later_shows_the_same(processor, notes, monkeypatch):
    """The pixels and what happens stay; the stamps and the answers about times are those of the longer clip."""
    pad = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    scene = random_clip(random.Random(3), (4, 8))
    notes["scenes"].append(scene)
    limits = (192 * 192, 224 * 224)
    make = Lessons(processor, seed=0, plan=None, size=8).clip
    plain, later = (make(random.Random(0), scene, 1, limits, later) for later in (False, True))
    monkeypatch.setattr(lessons, "LEAPING", 0.0)
    assert plain.leaps == [0] * len(plain.moments) == make(random.Random(0), scene, 1, limits, True).leaps
    assert torch.equal(plain.pixel_values, later.pixel_values) and plain.moments == later.moments
    stamps = [digits_of(clip.facts, "stamp") for clip in (plain, later)]
    seconds = [(100 * row[:, 0] + 10 * row[:, 1] + row[:, 2]) / 10 for row in stamps]
    shift = seconds[1] - seconds[0]
    assert 0 < shift.min() and shift.max() - shift.min() < 0.11 and shift.max() <= lessons.LATEST + 0.1
    others = [index for index, (name, _) in enumerate(FACTS) if not name.startswith("stamp")]
    assert torch.equal(plain.facts[:, others], later.facts[:, others])
    text = processor.tokenizer.decode(later.script.ids)
    written = [float(stamp) for stamp in re.findall(r"<.time_start.>(.*?) seconds<.time_end.>", text)]
    assert written == pytest.approx(seconds[1].tolist(), abs=1e-4) and later.script.ids.count(pad) == len(written)
    whens = [question.answer for question in later.script.asked if question.task == "when"]
    assert all(float(answer.removesuffix(" seconds")) in written for answer in whens)


def digits_of(facts, group):
    return facts[:, [index for index, (name, _) in enumerate(FACTS) if name.startswith(group)]].float()


def test_leaps_put_frames_and_questions_farther_on(processor):
    plain = lessons.Script(processor.tokenizer, True, "a<|image_pad|>b<|image_pad|>c", [(2, 3), (2, 3)])
    torn = lessons.Script(processor.tokenizer, True, "a<|image_pad|>b<|image_pad|>c", [(2, 3), (2, 3)])
    torn.leap([5, 7])
    first, second = plain.pads
    added = [now - before for now, before in zip(torn.positions, plain.positions, strict=True)]
    assert added == [5] * (first + 1) + [7] * (len(added) - first - 1) and second > first
    assert torn.begin == plain.begin + 7
    assert all(
        sorted(leaps) == leaps and leaps[-1] <= lessons.FURTHEST
        for leaps in (lessons.random_leaps(random.Random(i), 9) for i in range(50))
    )


@pytest.mark.parametrize("kind", KINDS[1:])
def test_facts_stand_in_the_order_of_the_text_tokens(processor, notes, kind):
    batch = batch_of(processor, kind, step=1)
    pads = (batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")).sum(1).tolist()
    expected = []
    scenes = iter(notes["scenes"])
    for row, pictures in enumerate(pads):
        if kind == "clips":
            scene = notes["rows"][row].clip[0]
            rate = next(rate for rate in (1, 2) if len(lessons.sampled_times(scene, rate)) == pictures)
            expected += clip_facts(scene, lessons.sampled_times(scene, rate))
        else:
            group = [next(scenes) for _ in range(pictures)]
            expected += [
                facts(scene.numbered_at(0.0), number if kind == "images" else None)
                for number, scene in enumerate(group)
            ]
    assert torch.equal(batch["facts"], fact_rows(expected))


# Where to look


def gazes(batch, name) -> dict:
    """(row, text token) -> the tokens to look at; every head that is told so is told the same."""
    heads = {}
    for row, head, text, token, _ in batch["gaze"][name].tolist():
        heads.setdefault((row, text), {}).setdefault(head, set()).add(token)
    assert all(
        set(told) in (set(lessons.Gaze.HALF), set(range(8))) and len({*map(frozenset, told.values())}) == 1
        for told in heads.values()
    )
    return {at: told[0] for at, told in heads.items()}


@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_tokens_of_a_group_are_those_of_one_head_of_one_text_token(processor, kind):
    batch = batch_of(processor, kind, 0)
    for points in batch["gaze"].values():
        groups = {}
        for row, head, text, token, group in points.tolist():
            groups.setdefault(group, set()).add((row, head, text))
        assert sorted(groups) == list(range(len(groups))) and all(len(places) == 1 for places in groups.values())


def test_answers_look_at_tokens_that_show_what_they_say(processor, notes):
    """Colours, shapes and letters of answers against what the vision tokens show that are to be attended."""
    checked = {"colour": 0, "shape": 0, "letter": 0}
    for step in range(3):
        batch = batch_of(processor, "pictures", step)
        begins = np.cumsum([0, *(h * w // 4 for _, h, w in batch["grid_thw"])])
        for (row, text), tokens in gazes(batch, "looks").items():
            assert batch["labels"][row, text + 1] != -100
            word = processor.tokenizer.decode(batch["input_ids"][row, text + 1]).strip()
            for sight in (named(batch["sights"][begins[row] + token]) for token in tokens):
                if word in COLOURS:
                    assert list(COLOURS)[sight["colour"]] == word
                    checked["colour"] += 1
                elif word in SHAPES:
                    assert SHAPES[sight["shape"]] == word
                    checked["shape"] += 1
                elif word in SIGN_CHARACTERS and TASKS[batch["tasks"][row, text + 1]] == "text":
                    assert SIGN_CHARACTERS.index(word) in [sight[f"letter {i}"] for i in range(LETTERS_A_TOKEN)]
                    checked["letter"] += 1
    assert min(checked.values()) > 5


def test_each_question_looks_first_at_what_it_names(processor, notes):
    """Behind a question for a thing's place or colour, the answer and the thing asked about are in the same tokens; what is not there
    is looked for at the separator."""
    seen = set()
    for step in range(2):
        batch = batch_of(processor, "pictures", step)
        looks = gazes(batch, "looks")
        nothing = processor.tokenizer.encode("nothing")[0]
        for (row, text), asked in gazes(batch, "asked").items():
            task, word = TASKS[batch["tasks"][row, text + 1]], batch["input_ids"][row, text + 1]
            if task == "relation":
                assert asked.isdisjoint(looks.get((row, text), ())) or word == nothing
            elif (row, text) in looks:
                assert asked == looks[row, text]
            else:
                assert task == "exists" and word == processor.tokenizer.encode("no")[0]
                assert asked == {batch["grid_thw"][row][1] * batch["grid_thw"][row][2] // 4}
                task = "not there"
            seen.add(task)
    assert {"relation", "place", "color", "exists", "not there"} <= seen


def test_pictures_look_at_what_each_slot_holds(processor, notes):
    """A head for each slot: at tokens that show a thing of its shape, colour and place, or where it is empty at the separator."""
    batch, full = batch_of(processor, "pictures", 0), 0
    begins = np.cumsum([0, *(h * w // 4 for _, h, w in batch["grid_thw"])])
    for row, head, text, token, _ in batch["gaze"]["slots"].tolist():
        assert batch["input_ids"][row, text] == processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        known, slot = told(batch["facts"][row].tolist()), SLOTS[head]
        if known[f"colour {slot}"] == len(COLOURS):
            assert token == begins[row + 1] - begins[row]
        else:
            sight = named(batch["sights"][begins[row] + token])
            assert [sight[name] for name in ("colour", "place")] == [
                known[f"{name} {slot}"] for name in ("colour", "place")
            ]
            assert sight["shape"] == (head if head < len(SHAPES) else known[f"kind {slot}"])
            full += 1
    assert full > 8


def test_answers_about_clips_look_at_the_frame_that_shows_them(processor, notes):
    """ "When" and "visible at" at the frame whose stamp is the answer, or in the question; several pictures at the one that is the answer."""
    found = {"when": 0, "visible at": 0, "which image": 0}
    pad = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for kind, step in (("clips", 0), ("clips", 1), ("images", 0)):
        notes["pixels"].clear()
        batch = batch_of(processor, kind, step)
        frames = gazes(batch, "frames")
        for row, script in enumerate(notes["rows"]):
            pads = (batch["input_ids"][row] == pad).nonzero()[:, 0].tolist()
            for part, question in enumerate(script.asked, 1):
                if kind == "images":
                    frame = int(question.answer) - 1
                elif question.task in found:
                    scene = script.clip[0]
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


def test_frames_look_at_their_stamps_and_at_the_frame_before(processor):
    batch = batch_of(processor, "clips", 0)
    digits = {}
    for row, head, text, token, _ in batch["gaze"]["stamps"].tolist():
        digits.setdefault((row, text), {})[head] = processor.tokenizer.decode(batch["input_ids"][row, token])
    before = gazes(batch, "before")
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
    for (row, text), facts_of in zip(pads, batch["facts"].tolist(), strict=True):
        stamp = [told(facts_of)[f"stamp {i}"] for i in range(3)]
        tens = str(stamp[0]) if stamp[0] else "<|time_start|>"
        assert digits[row, text] == {0: str(stamp[2]), 1: str(stamp[1]), 2: tens}
        assert before[row, text] == {last.get(row, text)}
        last[row] = text
