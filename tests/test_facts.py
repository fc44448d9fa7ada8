"""Facts of vision tokens, pictures and frames against literal ones, and their order in a batch."""

import numpy as np
import pytest
import torch
from nano_batches import (  # noqa: F401 - fixtures among them
    KINDS,
    NAMES,
    batch_of,
    known,
    media_inputs,
    model,
    named,
    notes,
    one_font,
    processor,
)

from moss_vl.training.nano import lessons, world
from moss_vl.training.nano.facts import (
    EVENTS,
    FINE,
    FRAME_FACTS,
    LETTERS_PER_TOKEN,
    REGIONS,
    SLOTS,
    TOKEN_FACTS,
    assign_slots,
    clip_facts,
    fact_rows,
    frame_facts,
    ink_patches,
    token_facts,
)
from moss_vl.training.nano.world import (
    COLOURS,
    SHAPES,
    SIGN_CHARACTERS,
    Scene,
    Sign,
    Thing,
    draw_ink,
    draw_scene,
    sign_mask,
)


STAGE = Scene(
    width=320,
    height=240,
    background=((220, 220, 220),) * 2,
    sign=Sign("K7Q", 152 / 320, 0.25, 0.2, "black"),
    things=(
        Thing("star", "blue", 290 / 320, 30 / 240, 0.10),
        Thing("circle", "red", 120 / 320, 120 / 240, 0.20),
        Thing("ring", "green", 201 / 320, 199 / 240, 0.09),
    ),
)


def test_token_facts_of_things():
    """Tokens of 40 x 40 pixels. The circle (radius 48) covers the centres of four tokens; the ring covers none.

    The token that contains the centre of the ring shows it.
    """
    shown = token_facts(STAGE.things, (), (320, 240), (6, 8)).reshape(6, 8, len(TOKEN_FACTS))
    none = dict.fromkeys(NAMES, -100) | {"shape": len(SHAPES)}
    none |= {f"letter {i}": len(SIGN_CHARACTERS) for i in range(LETTERS_PER_TOKEN)}
    kinds = {"circle": (0, 0, 1), "ring": (5, 1, 0), "star": (3, 2, 0)}

    def thing(name, place, x, y, rank, **nearest):
        facts = dict(zip(("shape", "colour", "size"), kinds[name], strict=True)) | {
            "place": REGIONS.index(place),
            "rank": rank,
            "twin": 0,
        }
        facts |= {"across": int(x * FINE), "down": int(y * FINE)} | {
            f"nearest shape {way}": len(SHAPES) for way in world.DIRECTIONS
        }
        for way, other in nearest.items():
            facts |= dict(
                zip((f"nearest {what} {way}" for what in ("shape", "colour", "size")), kinds[other], strict=True)
            )
        return facts

    circle = thing("circle", "center", 120 / 320, 120 / 240, 0, right="ring", up="star", down="ring")
    ring = thing("ring", "bottom", 201 / 320, 199 / 240, 1, left="circle", right="star", up="circle")
    star = thing("star", "top right", 290 / 320, 30 / 240, 2, left="ring", down="ring")
    expected = {(2, 2): circle, (2, 3): circle, (3, 2): circle, (3, 3): circle, (4, 5): ring, (0, 7): star}
    for row in range(6):
        for column in range(8):
            assert named(shown[row, column]) == none | expected.get((row, column), {}), (row, column)
    assert all((shown[..., i] < classes).all() for i, (_, classes) in enumerate(TOKEN_FACTS))
    assert [classes for _, classes in TOKEN_FACTS[:8]] == [len(SHAPES) + 1, len(COLOURS), 2, 9, FINE, FINE, 6, 3]


def test_twins_are_numbered():
    """Things of one shape, from left to right."""
    things = [Thing("star", "blue", x, 0.5, 0.1) for x in (0.9, 0.1, 0.5)]
    shown = token_facts(things, (), (300, 100), (1, 3))
    assert [named(row)["twin"] for row in shown] == [named(row)["rank"] for row in shown] == [0, 1, 2]


def test_token_facts_of_letters():
    """Compared with the columns that the ink of the sign covers."""
    shown = token_facts((), STAGE.signs, (320, 240), (6, 8)).reshape(6, 8, len(TOKEN_FACTS))
    spelling, shown = (
        shown[..., NAMES.index("spelling")],
        shown[..., NAMES.index("letter 0") : NAMES.index("spelling")],
    )
    mask, (begin, _) = sign_mask(STAGE.sign, STAGE, 1)
    ink = np.flatnonzero((np.asarray(mask) > 0).any(0)) + begin
    letters = np.split(ink, np.flatnonzero(np.diff(ink) > 1) + 1)
    assert len(letters) == 3, "the test needs letters that do not touch"
    expected, first = np.full((6, 8, LETTERS_PER_TOKEN), len(SIGN_CHARACTERS)), np.full((6, 8), -100)
    for i, (letter, columns) in reversed([*enumerate(zip("K7Q", letters, strict=True))]):
        column = int((columns[0] + columns[-1]) / 2 / 40)
        expected[1, column] = [SIGN_CHARACTERS.index(letter), *expected[1, column, :-1]]
        first[1, column] = i
    assert (shown == expected).all() and (spelling == first).all()


def test_a_token_has_a_limited_number_of_letters():
    shown = token_facts((), (Sign("ABCDE", 0.25, 0.3, 0.12, "black"),), (320, 240), (2, 2))[
        :, NAMES.index("letter 0") : NAMES.index("spelling")
    ]
    assert shown.tolist() == [[0, 1, 2, 3], *[[len(SIGN_CHARACTERS)] * 4] * 3]


@torch.no_grad()
def test_token_facts_have_the_order_of_the_vision_tokens(processor, model, notes):
    """A token that shows a circle contains pixels of the circle's colour."""
    circles = 0
    for step in range(2):
        notes["scenes"].clear()
        batch = batch_of(processor, "pictures", step)
        tokens = batch["pixel_values"].float().view(-1, 4, 3, 256).transpose(1, 2).flatten(2)  # [N, 3, pixels]
        assert len(batch["token_facts"]) == len(tokens) == len(media_inputs(model, batch)["image_features"])
        scenes = iter(sorted(notes["scenes"], key=lambda scene: scene.width / scene.height))
        ends = np.cumsum([h * w // 4 for _, h, w in batch["grid_thw"]])
        for begin, end, scene in zip([0, *ends], ends, scenes, strict=False):
            things = scene.at(0.0)
            for token, facts in zip(tokens[begin:end], batch["token_facts"][begin:end], strict=True):
                if facts[0] == SHAPES.index("circle"):
                    thing = things[named(facts)["rank"]]
                    assert (thing.shape, list(COLOURS).index(thing.colour)) == ("circle", facts[1])
                    values = token.T
                    assert (values - torch.tensor(thing.rgb)).abs().amax(1).min() < 40
                    circles += 1
    assert circles > 10


def test_ink_has_the_order_of_the_patches(processor):
    """White on black, not resized: the share of ink in a square is about the mean of its pixel values."""
    things = (Thing("circle", "white", 0.35, 0.3, 0.2), Thing("square", "white", 0.7, 0.7, 0.15, angle=10))
    scene = Scene(128, 160, ((0, 0, 0),) * 2, things, sign=Sign("K7Q", 0.3, 0.85, 0.12, "white"))
    inputs = processor.image_processor(draw_scene(scene), min_pixels=4096, max_pixels=1 << 20, return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 10, 8]]
    values = (inputs["pixel_values"].view(-1, 3, 8, 2, 8, 2) + 1).mean((1, 3, 5)).flatten(1).numpy() * 127.5 / 252
    ink = ink_patches(draw_ink(scene), (5, 4))
    assert ink.shape == values.shape and 0.1 < ink.mean() < 0.5
    assert np.abs(ink - values).mean() < 0.03


# frames


def test_slots():
    """The leftmost thing of a shape has the slot of the shape; its twins share two more slots; others have none."""
    things = [
        *enumerate(
            Thing(shape, "red", x, 0.5, 0.1)
            for shape, x in (("star", 0.9), ("ring", 0.5), ("star", 0.1), ("ring", 0.6), ("ring", 0.7), ("ring", 0.8))
        )
    ]
    slots = assign_slots(things)
    assert {slot: number for slot, (number, _) in slots.items()} == {"star": 2, "ring": 1, "second": 3, "third": 4}
    assert all(slots[slot] == things[slots[slot][0]] for slot in slots)


def test_facts_of_a_picture():
    things = [*enumerate((*STAGE.things, Thing("ring", "red", 0.1, 0.5, 0.1)))]

    def of_slot(slot, colour, size, place, x, y, rank):
        fine = {f"across {slot}": int(x * FINE), f"down {slot}": int(y * FINE)}
        return {
            f"colour {slot}": colour,
            f"size {slot}": size,
            f"place {slot}": REGIONS.index(place),
            **fine,
            f"rank {slot}": rank,
        }

    absent = {f"colour {slot}": len(COLOURS) for slot in SLOTS}
    star, circle = (
        of_slot("star", 2, 0, "top right", 290 / 320, 30 / 240, 3),
        of_slot("circle", 0, 1, "center", 120 / 320, 120 / 240, 1),
    )
    rings = (
        of_slot("ring", 0, 0, "left", 0.1, 0.5, 0)
        | of_slot("second", 1, 0, "bottom", 201 / 320, 199 / 240, 2)
        | {"kind second": 5}
    )
    rows = fact_rows([frame_facts(things, 2), frame_facts([])])
    assert known(rows[0].tolist()) == absent | star | circle | rings | {"count": 4, "picture": 2}
    assert known(rows[1].tolist()) == absent | {"count": 0}
    assert all(value < classes for row in rows.tolist() for value, (_, classes) in zip(row, FRAME_FACTS, strict=True))


def test_facts_of_a_clip():
    things = (
        Thing("star", "blue", 0.2, 0.2, 0.1, appears=2.3, moves=(5.5, 0.5, 0.0)),
        Thing("ring", "red", 0.5, 0.8, 0.1, changes=(3.0, "white"), disappears=12.2),
    )
    scene = Scene(100, 100, ((220, 220, 220),) * 2, things, seconds=14.0, fps=10)
    rows = [known(row) for row in fact_rows(clip_facts(scene, [float(second) for second in range(14)])).tolist()]
    events = {slot: [row[f"event {slot}"] for row in rows] for slot in SLOTS}
    happens = {name: EVENTS.index(name) for name in EVENTS}
    nothing = len(EVENTS)
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
    starts = {
        second: {name: value for name, value in row.items() if name.split()[0] in ("begins", "subject")}
        for second, row in enumerate(rows)
    }
    colours, what = list(COLOURS), lambda name: EVENTS.index(name)
    subjects = {
        1: ("appears", "star", "blue", 0, {"subject place": REGIONS.index("center")}),
        3: ("changes", "ring", "red", 1, {"subject paint": colours.index("white")}),
        6: ("moves up", "cross", "black", 0, {}),
    }
    for second, row in starts.items():
        if second not in subjects:
            assert row == {"begins": len(EVENTS)}
            continue
        kind, shape, colour, size, more = subjects[second]
        whom = {"subject shape": SHAPES.index(shape), "subject colour": colours.index(colour), "subject size": size}
        assert row == {"begins": what(kind), **whom, **more}


@pytest.mark.parametrize("kind", KINDS[1:])
def test_frame_facts_have_the_order_of_the_text_tokens(processor, notes, kind):
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
                frame_facts(scene.numbered_at(0.0), number if kind == "images" else None)
                for number, scene in enumerate(group)
            ]
    assert torch.equal(batch["frame_facts"], fact_rows(expected))
