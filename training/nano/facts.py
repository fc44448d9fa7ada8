"""Facts of the drawn world that auxiliary losses of train_nano.py ask about, as classes.

Token facts say what each vision token of a picture shows, frame facts what the text token of each picture or frame
stands for. Axes: H x W merged grid of a picture, P patches.
"""

from collections import Counter

import numpy as np
import torch
from PIL import Image

from moss_vl.training.nano.questions import Event, direction_of, distance_moved, events_of, region_of
from moss_vl.training.nano.world import (
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SIGN_CHARACTERS,
    Scene,
    Sign,
    Thing,
    load_font,
    reading_order,
    text_box,
)


REGIONS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
LETTERS_PER_TOKEN = 4
SIGN_LETTERS = 5
THINGS = 6  # most things of a picture or crowd
TWINS = ("second", "third")  # things of one shape, from the left
FINE = 24  # parts of a side of the canvas, in which a thing's centre is classified
IGNORED = -100  # class of a fact that does not apply, label of a token without a loss

# (name, classes) of the facts of a vision token. They describe the thing that the token shows (its rank among all
# things and its twin number among those of its shape, both from the left), the nearest thing on each side, and the
# letters in the token, the first of them with its index in the sign.
TOKEN_FACTS = (
    ("shape", len(SHAPES) + 1),
    ("colour", len(COLOURS)),
    ("size", 2),
    ("place", len(REGIONS)),
    ("across", FINE),
    ("down", FINE),
    ("rank", THINGS),
    ("twin", len(TWINS) + 1),
    *((f"nearest shape {side}", len(SHAPES) + 1) for side in DIRECTIONS),
    *((f"nearest colour {side}", len(COLOURS)) for side in DIRECTIONS),
    *((f"nearest size {side}", 2) for side in DIRECTIONS),
    *((f"letter {i}", len(SIGN_CHARACTERS) + 1) for i in range(LETTERS_PER_TOKEN)),
    ("spelling", SIGN_LETTERS),
)
TOKEN_FACT_INDEX = {name: index for index, (name, _) in enumerate(TOKEN_FACTS)}

# (name, classes) of the facts of the text token of a picture or frame, in the order in which a model can know them.
# CONTENTS: the thing in each slot (see `assign_slots`) and the number of things. CHANGES: the event of the thing in
# each slot, the digits of the time stamp, and the index of the picture among several. COURSE: the number of events so
# far, the event that begins in this frame, the thing it concerns with its size and region, its new colour, and in a
# stream whether the standing request asks for what begins.
SLOTS = (*SHAPES, *TWINS)
EVENTS = ("appears", "disappears", "changes", *(f"moves {direction}" for direction in DIRECTIONS))
PICTURES = 4  # most pictures in a row
MOST_EVENTS = 7  # that are counted
CONTENTS = (
    *((f"colour {slot}", len(COLOURS) + 1) for slot in SLOTS),
    *((f"kind {slot}", len(SHAPES)) for slot in TWINS),
    *((f"size {slot}", 2) for slot in SLOTS),
    *((f"place {slot}", len(REGIONS)) for slot in SLOTS),
    *((f"across {slot}", FINE) for slot in SLOTS),
    *((f"down {slot}", FINE) for slot in SLOTS),
    *((f"rank {slot}", THINGS) for slot in SLOTS),
    ("count", 5),
)
CHANGES = (
    *((f"event {slot}", len(EVENTS) + 1) for slot in SLOTS),
    *((f"stamp {i}", 10) for i in range(3)),
    ("picture", PICTURES),
)
COURSE = (
    ("events", MOST_EVENTS + 1),
    ("begins", len(EVENTS) + 1),
    ("subject shape", len(SHAPES)),
    ("subject colour", len(COLOURS)),
    ("subject size", 2),
    ("subject place", len(REGIONS)),
    ("subject paint", len(COLOURS)),
    ("fires", 2),
)
FRAME_FACTS = (*CONTENTS, *CHANGES, *COURSE)


# facts of vision tokens


def thing_tokens(things, canvas: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """The index of the thing that each vision token shows, -1 for none: int [H, W].

    A token shows the thing that covers its centre, or whose centre it contains.
    """
    (width, height), (rows, columns) = canvas, grid
    out = np.full(grid, -1)
    if things:
        ys = ((np.arange(rows) + 0.5) / rows * height)[:, None]
        xs = ((np.arange(columns) + 0.5) / columns * width)[None]
        reach = np.array([thing.radius * thing.fill * min(canvas) for thing in things])
        centres = np.array([(thing.x * width, thing.y * height) for thing in things])
        distance = np.hypot(xs[..., None] - centres[:, 0], ys[..., None] - centres[:, 1])  # [H, W, things]
        out = np.where((distance / reach).min(-1) < 0.95, (distance / reach).argmin(-1), -1)
        for number, thing in enumerate(things):
            out[min(int(thing.y * rows), rows - 1), min(int(thing.x * columns), columns - 1)] = number
    return out


def letter_tokens(sign: Sign, canvas: tuple[int, int], grid: tuple[int, int]) -> list[tuple[int, int]]:
    """Row and column of the vision token that contains the centre of each letter."""
    (width, height), (rows, columns) = canvas, grid
    font = load_font(sign.font, 100)
    left, top, right, bottom = text_box(sign.font, sign.text)
    scale = sign.height * height / (bottom - top)
    row, out = min(int(sign.y * rows), rows - 1), []
    for i in range(len(sign.text)):
        centre = (font.getlength(sign.text[:i]) + font.getlength(sign.text[: i + 1]) - left - right) / 2
        out.append((row, min(max(int((sign.x * width + scale * centre) / width * columns), 0), columns - 1)))
    return out


def kind_classes(thing: Thing) -> dict[str, int]:
    return {
        "shape": SHAPES.index(thing.shape),
        "colour": list(COLOURS).index(thing.colour),
        "size": int(thing.size == "large"),
    }


def fine_classes(thing: Thing) -> dict[str, int]:
    """The position of the thing's centre, in parts of the canvas."""
    return {name: min(int(FINE * value), FINE - 1) for name, value in (("across", thing.x), ("down", thing.y))}


def token_facts(things, signs, canvas: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """The TOKEN_FACTS of each vision token of a picture: int [H * W, len(TOKEN_FACTS)]."""
    out = np.full((*grid, len(TOKEN_FACTS)), IGNORED, dtype=np.int64)
    out[..., TOKEN_FACT_INDEX["shape"]] = len(SHAPES)
    things = sorted(things, key=reading_order)
    thing_of_token = thing_tokens(things, canvas, grid)
    for number, values in enumerate(thing_facts(things, canvas)):
        for name, value in values.items():
            out[thing_of_token == number, TOKEN_FACT_INDEX[name]] = value
    write_letter_facts(out, signs, canvas)
    return out.reshape(-1, len(TOKEN_FACTS))


def thing_facts(things: list[Thing], canvas: tuple[int, int]) -> list[dict[str, int]]:
    """For each thing, in the order from left to right, the facts of the tokens that show it."""
    centres = np.array([(thing.x * canvas[0], thing.y * canvas[1]) for thing in things])
    earlier, out = Counter(), []  # shape -> number of things so far
    for number, thing in enumerate(things):
        values = {
            **kind_classes(thing),
            "place": REGIONS.index(region_of(thing)),
            **fine_classes(thing),
            "rank": number,
        }
        values["twin"] = min(earlier[thing.shape], len(TWINS))
        earlier[thing.shape] += 1
        for side, (right, down) in DIRECTIONS.items():
            ahead = (centres[:, 0] - centres[number, 0]) * right + (centres[:, 1] - centres[number, 1]) * down
            distance = np.where(ahead > 0, np.hypot(*(centres - centres[number]).T), np.inf)
            found = np.isfinite(distance).any()
            nearest = kind_classes(things[distance.argmin()]) if found else {"shape": len(SHAPES)}
            values |= {f"nearest {name} {side}": value for name, value in nearest.items()}
        out.append(values)
    return out


def write_letter_facts(out: np.ndarray, signs, canvas: tuple[int, int]) -> None:
    """Fills in the letters of the tokens of `out` [H, W, facts] in place."""
    letter, spelling = TOKEN_FACT_INDEX["letter 0"], TOKEN_FACT_INDEX["spelling"]
    grid = out.shape[:2]
    out[..., letter : letter + LETTERS_PER_TOKEN] = len(SIGN_CHARACTERS)
    filled = np.zeros(grid, dtype=int)
    for sign in signs:
        for i, (character, cell) in enumerate(zip(sign.text, letter_tokens(sign, canvas, grid), strict=True)):
            if not filled[cell]:
                out[(*cell, spelling)] = i
            if filled[cell] < LETTERS_PER_TOKEN:
                out[(*cell, letter + filled[cell])] = SIGN_CHARACTERS.index(character)
                filled[cell] += 1


def ink_patches(ink: Image.Image, grid: tuple[int, int]) -> np.ndarray:
    """The share of each 8 x 8 square that things and letters cover: [P, 64], 0 to 1, patches as in `pixel_values`.

    `ink`: the picture's `draw_ink`.
    """
    rows, columns = grid  # merged
    ink = ink.resize((16 * columns, 16 * rows), Image.Resampling.BILINEAR)
    covered = np.asarray(ink, dtype=np.float32) / 255
    # [Y, my, py, X, mx, px] -> [Y, X, my, mx, py, px]
    return covered.reshape(rows, 2, 8, columns, 2, 8).transpose(0, 3, 1, 4, 2, 5).reshape(-1, 64)


# facts of pictures and frames


def assign_slots(things: list[tuple[int, Thing]]) -> dict[str, tuple[int, Thing]]:
    """Slot -> (index, thing). The leftmost thing of a shape has the slot of the shape; its twins share two more."""
    slots, free = {}, list(TWINS)
    for number, thing in sorted(things, key=lambda pair: reading_order(pair[1])):
        slot = thing.shape if thing.shape not in slots else free.pop(0) if free else None
        if slot is not None:
            slots[slot] = number, thing
    return slots


def frame_facts(things: list[tuple[int, Thing]], picture: int | None = None) -> dict[str, int]:
    """The facts of a picture or frame with these (index, thing). `picture`: its index among several pictures."""
    facts = {f"colour {slot}": len(COLOURS) for slot in SLOTS} | {"count": len(things)}
    facts |= {} if picture is None else {"picture": picture}
    ranks = {number: rank for rank, (number, _) in enumerate(sorted(things, key=lambda pair: reading_order(pair[1])))}
    for slot, (number, thing) in assign_slots(things).items():
        values = {**kind_classes(thing), "place": REGIONS.index(region_of(thing)), **fine_classes(thing)}
        values["rank"] = ranks[number]
        shape = values.pop("shape")
        if slot in TWINS:
            values["kind"] = shape
        facts |= {f"{name} {slot}": value for name, value in values.items()}
    return facts


def event_name(event: Event) -> str:
    return f"moves {direction_of(event.thing)}" if event.kind == "moves" else event.kind


def start_facts(event: Event) -> dict[str, int]:
    """The facts of the frame in which an event begins."""
    facts = {f"subject {name}": value for name, value in kind_classes(event.thing).items()}
    facts["begins"] = EVENTS.index(event_name(event))
    if event.kind == "appears":
        facts["subject place"] = REGIONS.index(region_of(event.thing))
    if event.kind == "changes":
        facts["subject paint"] = list(COLOURS).index(event.thing.changes[1])
    return facts


def clip_facts(scene: Scene, times: list[float]) -> list[dict[str, int]]:
    """The facts of every frame. A move is an event of each frame that shows the thing further on."""
    events, facts = events_of(scene, times), []
    for time in times:
        stamp = f"{time:04.1f}".replace(".", "")
        facts.append(
            frame_facts(scene.numbered_at(time))
            | {f"event {slot}": len(EVENTS) for slot in SLOTS}
            | {f"stamp {i}": int(digit) for i, digit in enumerate(stamp)}
            | {"events": min(sum(event.time <= time for event in events), MOST_EVENTS), "begins": len(EVENTS)}
        )
    for event in reversed(events):  # the first of several events of a frame overwrites the others
        start = times.index(event.time)
        facts[start] |= start_facts(event)
        name, frames = event_name(event), [start]
        if event.kind == "moves":
            following = range(start + 1, len(times))
            frames += [i for i in following if distance_moved(event.thing, times[i - 1], times[i]) > 0]
        for frame in frames:
            time = times[max(frame - 1, 0) if name == "disappears" else frame]  # when the thing is in its slot
            slots = assign_slots(scene.numbered_at(time))
            slot = next((slot for slot, (number, _) in slots.items() if number == event.number), None)
            if slot is not None:
                facts[frame][f"event {slot}"] = EVENTS.index(name)
    return facts


def fact_rows(facts: list[dict[str, int]]) -> torch.Tensor:
    """Classes of the FRAME_FACTS: [pictures and frames, len(FRAME_FACTS)]."""
    return torch.tensor([[row.get(name, IGNORED) for name, _ in FRAME_FACTS] for row in facts])
