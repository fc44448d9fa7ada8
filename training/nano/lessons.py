"""Batches of the drawn world for train_nano.py: pictures and clips drawn afresh for every step, with several questions about each.

The questions about one picture or clip share its pixels and the text that stands for them: a row is [media, question 1 with its
answer, question 2 with its answer, ...], each question sees the media and itself alone, and has the positions it would have by
itself.

Axes: B rows, T text tokens, N vision tokens without separators, in the order of the media.
"""

import functools
import io
import itertools
import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from moss_vl.training.nano.questions import (
    CLIP_TASKS,
    IMAGES_TASK,
    PICTURE_TASKS,
    Look,
    ask_clip,
    ask_images,
    ask_picture,
    events_of,
    place_of,
    sampled_times,
    way_gone,
    way_of,
)
from moss_vl.training.nano.world import (
    COLOURS,
    SHAPES,
    SIGN_CHARACTERS,
    WAYS,
    Thing,
    draw_background,
    draw_ink,
    draw_scene,
    load_font,
    random_canvas,
    random_clip,
    random_crowd,
    random_picture,
    text_box,
)


TASKS = (*PICTURE_TASKS, IMAGES_TASK, *CLIP_TASKS)
CHANCES = {  # how often a picture or clip is asked the question; above 1: several times
    "describe picture": 0.7, "color": 0.4, "shape": 0.4, "count": 0.5, "place": 0.6, "relation": 1.8, "exists": 1.6, "text": 0.5,
    "describe clip": 0.7, "first or last": 0.8, "when": 1.7, "visible at": 1.7, "direction": 0.8, "color after": 0.6,
    "duration": 0.15,
}  # fmt: skip
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
LETTERS_A_TOKEN = 4
SIGN_LETTERS = 5
THINGS = 6  # of a picture or a crowd, at most
TWINS = ("second", "third")  # of one shape, from the left
FINE = 24  # parts into which a side of the canvas is divided where a thing's centre is asked
LATEST = 20.0  # seconds at which a clip begins, at most, as part of a longer one
LEAPING, FURTHEST = (
    0.5,
    600,
)  # share of those whose frames lie farther apart than their text puts them, and by how many positions at most
ALIKE = 8  # pictures of one size in a batch: kernels are prepared for every shape, and equal grids are encoded as one
WIDE_LIMITS = (4096, 1 << 24)  # pixels, those of released checkpoints

# What each vision token is asked directly, as (name, classes): of the thing that it shows (its rank from the left, and among those of
# its shape), of the nearest one on each side, and its letters, the first of them with its number in the sign. Class -100 is not asked.
SIGHTS = (
    ("shape", len(SHAPES) + 1), ("colour", len(COLOURS)), ("size", 2), ("place", 9), ("across", FINE), ("down", FINE), ("rank", THINGS),
    ("twin", len(TWINS) + 1),
    *((f"nearest shape {way}", len(SHAPES) + 1) for way in WAYS), *((f"nearest colour {way}", len(COLOURS)) for way in WAYS),
    *((f"nearest size {way}", 2) for way in WAYS), *((f"letter {i}", len(SIGN_CHARACTERS) + 1) for i in range(LETTERS_A_TOKEN)),
    ("spelling", SIGN_LETTERS),
)  # fmt: skip


# What the text token of each picture or frame is asked directly, as (name, classes), in the order in which it can be known. What is in
# it: the colour, size and place of the thing in each slot, its number from the left, and the number of things; the slots are those of
# `in_slots`. What changes: what happens to the thing of each slot, the digits of the time stamp, the number of the picture among
# several. And how many events there have been so far, which one begins here, what thing it befalls (the size and place that it has
# now) and the colour that it had or gets.
SLOTS = (*SHAPES, *TWINS)
HAPPENINGS = ("appears", "disappears", "changes", *(f"moves {way}" for way in WAYS))
PICTURES = 4  # in a row, at most
CONTENTS = (
    *((f"colour {slot}", len(COLOURS) + 1) for slot in SLOTS), *((f"kind {slot}", len(SHAPES)) for slot in TWINS),
    *((f"size {slot}", 2) for slot in SLOTS), *((f"place {slot}", 9) for slot in SLOTS),
    *((f"across {slot}", FINE) for slot in SLOTS), *((f"down {slot}", FINE) for slot in SLOTS), *((f"rank {slot}", THINGS) for slot in SLOTS),
    ("count", 5),
)  # fmt: skip
CHANGES = (
    *((f"event {slot}", len(HAPPENINGS) + 1) for slot in SLOTS), *((f"stamp {i}", 10) for i in range(3)), ("picture", PICTURES),
)  # fmt: skip
COURSE = (
    ("events", 4), ("begins", len(HAPPENINGS) + 1), ("subject shape", len(SHAPES)), ("subject colour", len(COLOURS)), ("subject size", 2),
    ("subject place", 9), ("subject paint", len(COLOURS)),
)  # fmt: skip
FACTS = (*CONTENTS, *CHANGES, *COURSE)


# Text


class Script:
    """The text of a row: the media, then questions with answers."""

    def __init__(self, tokenizer, template: bool, media: str, grids: list[tuple[int, int]]):
        self.tokenizer, self.template = tokenizer, template
        image_pad, self.point = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "."])
        self.ids = self.encode(("<|im_start|>user\n" if template else "") + media)
        self.positions, at, frames = [], 0, iter(grids)
        for token in self.ids:
            at += max(next(frames)) if token == image_pad else 0
            self.positions.append(at)
            at += 1
        self.begin = at  # of the questions
        self.labels, self.parts, self.tasks = [-100] * len(self.ids), [0] * len(self.ids), [-1] * len(self.ids)
        self.weights = [0.0] * len(self.ids)
        self.looks, self.named = (
            [],
            [],
        )  # (text token, where to look for the next one), (text token, at what is asked about)
        self.pads = [at for at, token in enumerate(self.ids) if token == image_pad]
        points = [at for at, token in enumerate(self.ids) if token == self.point]  # one in each stamp
        self.stamps = [
            (pad, self.digits(point)) for pad, point in zip(self.pads, points, strict=False)
        ]  # (text token, where its time stands)

    def leap(self, leaps: list[int]) -> None:
        """Puts each frame, from behind the one before, and the questions that much farther on."""
        before, self.begin = 0, self.begin + leaps[-1]
        for pad, leap in zip(self.pads, leaps, strict=True):
            self.positions[before : pad + 1] = [position + leap for position in self.positions[before : pad + 1]]
            before = pad + 1
        self.positions[before:] = [position + leaps[-1] for position in self.positions[before:]]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def encode_answer(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, the end of the turn behind them, and the characters that each stands for."""
        encoded = self.tokenizer(text + "<|im_end|>", add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    def add(self, question) -> None:
        """An empty prompt without template has to be the first: what it continues is the media."""
        prompt = question.prompt + ("<|im_end|>\n<|im_start|>assistant\n" if self.template else "")
        asked = self.encode(prompt)
        answered, spans = self.encode_answer(question.answer)
        part, before = self.parts[-1] + 1, len(self.ids) + len(asked) - 1
        assert asked or part == 1, question
        length = len(asked) + len(answered)
        for token, (begin, end) in enumerate(spans):
            if begin >= len(question.answer):
                continue
            look = next((look for look in reversed(question.looks) if look.start < max(end, 1)), None)
            if look is not None:
                self.looks.append((before + token, look))
            if question.asked is not None:
                self.named.append((before + token, question.asked))
            if question.task == "visible at":
                self.stamps.append((before + token, self.digits(len(self.ids) + asked.index(self.point))))
        self.ids += asked + answered
        self.labels += [-100] * len(asked) + answered
        self.positions += range(self.begin, self.begin + length)
        self.parts += [part] * length
        self.tasks += [-1] * len(asked) + [TASKS.index(question.task)] * len(answered)
        self.weights += [0.0] * len(asked) + [len(answered) ** -0.5] * len(
            answered
        )  # a word counts more where it is the whole answer

    @staticmethod
    def digits(point: int) -> list[int]:
        """Where tenths, ones and tens stand; for tens that are not written, what stands there."""
        return [point + 1, point - 1, point - 2]

    def add_all(self, questions) -> None:
        for question in sorted(questions, key=lambda question: question.prompt != ""):
            self.add(question)


def choose(lot: random.Random, tasks, ask) -> list:
    """Questions of the tasks by their chances, no two with the same prompt."""
    questions = {}
    while not questions:
        for task in tasks:
            for _ in range(int(CHANCES[task]) + (lot.random() < CHANCES[task] % 1)):
                question = ask(task, lot.random() < 0.35)
                if question is not None:
                    questions.setdefault(question.prompt, question)
    chosen = list(questions.values())
    lot.shuffle(chosen)
    return chosen


def join(scripts: list[Script], pad: int) -> dict:
    """Rows of text as tensors [B, T]."""
    length = (
        -(-max(len(script.ids) for script in scripts) // 32) * 32
    )  # few lengths: the CPU's kernels are prepared for each

    def rows(name, fill):
        return torch.tensor(
            [getattr(script, name) + [fill] * (length - len(getattr(script, name))) for script in scripts]
        )

    return {
        "input_ids": rows("ids", pad), "labels": rows("labels", -100), "position_ids": rows("positions", 0),
        "parts": rows("parts", -1), "tasks": rows("tasks", -1), "weights": rows("weights", 0.0),
    }  # fmt: skip


def may_see(parts: torch.Tensor) -> torch.Tensor:
    """[B, T] -> bool [B, 1, T, T]: what stands before in the media or in the same question."""
    same = (parts[:, None, :] == 0) | (parts[:, None, :] == parts[:, :, None])
    return (same & torch.ones(parts.shape[1], parts.shape[1], dtype=torch.bool, device=parts.device).tril())[:, None]


# Pixels


def compressed(lot: random.Random, picture: Image.Image) -> Image.Image:
    """As lossy files have it."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=lot.randint(60, 95))
    return Image.open(file).convert("RGB")


def thing_tokens(things, canvas: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """Which thing each vision token of a picture shows, [H, W], -1 for none: that on which its middle lies, or whose middle lies in it."""
    (width, height), (rows, columns) = canvas, grid
    out = np.full(grid, -1)
    if things:
        ys, xs = (
            ((np.arange(rows) + 0.5) / rows * height)[:, None],
            ((np.arange(columns) + 0.5) / columns * width)[None],
        )
        reach = np.array([thing.radius * thing.fill * min(canvas) for thing in things])
        middles = np.array([(thing.x * width, thing.y * height) for thing in things])
        away = np.hypot(xs[..., None] - middles[:, 0], ys[..., None] - middles[:, 1])  # [H, W, things]
        out = np.where((away / reach).min(-1) < 0.95, (away / reach).argmin(-1), -1)
        for number, thing in enumerate(things):
            out[min(int(thing.y * rows), rows - 1), min(int(thing.x * columns), columns - 1)] = number
    return out


def letter_tokens(sign, canvas: tuple[int, int], grid: tuple[int, int]) -> list[tuple[int, int]]:
    """Row and column of the vision token in which each letter's middle lies."""
    (width, height), (rows, columns) = canvas, grid
    font = load_font(sign.font, 100)
    left, top, right, bottom = text_box(sign.font, sign.text)
    scale = sign.height * height / (bottom - top)
    row, out = min(int(sign.y * rows), rows - 1), []
    for i in range(len(sign.text)):
        middle = (font.getlength(sign.text[:i]) + font.getlength(sign.text[: i + 1]) - left - right) / 2
        out.append((row, min(max(int((sign.x * width + scale * middle) / width * columns), 0), columns - 1)))
    return out


def what_it_is(thing) -> dict[str, int]:
    return {
        "shape": SHAPES.index(thing.shape),
        "colour": list(COLOURS).index(thing.colour),
        "size": int(thing.size == "large"),
    }


def fine(thing) -> dict[str, int]:
    """Where its centre lies, in parts of the canvas."""
    return {name: min(int(FINE * at), FINE - 1) for name, at in (("across", thing.x), ("down", thing.y))}


def sights(things, signs, canvas: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """What each vision token of a picture shows, [H * W, len(SIGHTS)].

    Of the thing it shows it is asked shape, colour, size, place, centre, its number from the left, and the same shape, colour and size
    of the nearest thing on each side; of the letters with their middles in it, which, and where in its sign the first one stands.
    """
    (width, height), (rows, columns) = canvas, grid
    names = [name for name, _ in SIGHTS]
    out = np.full((rows, columns, len(SIGHTS)), -100, dtype=np.int64)
    out[..., 0], out[..., names.index("letter 0") : names.index("spelling")] = len(SHAPES), len(SIGN_CHARACTERS)
    things, ranks = sorted(things, key=lambda thing: thing.x), Counter()
    shown, middles = (
        thing_tokens(things, canvas, grid),
        np.array([(thing.x * width, thing.y * height) for thing in things]),
    )
    for number, thing in enumerate(things):
        values = {**what_it_is(thing), "place": PLACES.index(place_of(thing)), **fine(thing), "rank": number}
        values["twin"] = min(ranks[thing.shape], len(TWINS))
        ranks[thing.shape] += 1
        for way, (right, down) in WAYS.items():
            side = (middles[:, 0] - middles[number, 0]) * right + (middles[:, 1] - middles[number, 1]) * down
            apart = np.where(side > 0, np.hypot(*(middles - middles[number]).T), np.inf)
            nearest = what_it_is(things[apart.argmin()]) if np.isfinite(apart).any() else {"shape": len(SHAPES)}
            values |= {f"nearest {name} {way}": value for name, value in nearest.items()}
        for name, value in values.items():
            out[shown == number, names.index(name)] = value
    filled = np.zeros((rows, columns), dtype=int)
    for sign in signs:
        for i, (letter, (row, column)) in enumerate(zip(sign.text, letter_tokens(sign, canvas, grid), strict=True)):
            if not filled[row, column]:
                out[row, column, names.index("spelling")] = i
            if filled[row, column] < LETTERS_A_TOKEN:
                out[row, column, names.index("letter 0") + filled[row, column]] = SIGN_CHARACTERS.index(letter)
                filled[row, column] += 1
    return out.reshape(-1, len(SIGHTS))


class Gaze:
    """Where the tokens of a batch are to look, for `points`; the heads of an attention layer that are told so, and at what.

    "stamps": each frame's text token at the digits of its stamp, and answers about a time at those of the question, a head each;
    "slots": each picture's at the thing of a slot, a head for each slot, or where there is none at the separator; "before": each
    frame's at that of the frame before; "asked": answers at the thing asked about, or where there is none at the separator; "looks":
    answers at where they are to be seen in a picture; "frames": answers at the text token of the picture or frame that shows them.
    """

    NAMES = ("stamps", "slots", "before", "asked", "looks", "frames")
    HALF = range(len(SLOTS) // 2)  # heads, of one for each slot, that are told where the others look where they like

    def __init__(self):
        self.told = {name: [] for name in self.NAMES}  # of (row, head, text token, tokens to look at, any of them)

    def tell(self, name: str, row: int, heads, text: int, tokens) -> None:
        self.told[name] += [(row, head, text, tokens) for head in heads if tokens]

    def add(self, row: int, script: Script, frames, clip: bool = False) -> None:
        """`frames`: of every picture or frame of the row, in order, (grid, [(number, thing)], sign, canvas)."""
        begins = [0, *itertools.accumulate(h * w + 1 for (h, w), *_ in frames)]
        separators = [begin - 1 for begin in begins[1:]]

        @functools.cache
        def shown(frame):
            grid, things, _, canvas = frames[frame]
            return thing_tokens([thing for _, thing in things], canvas, grid)

        @functools.cache
        def letters(frame):
            grid, _, sign, canvas = frames[frame]
            return letter_tokens(sign, canvas, grid)

        @functools.cache
        def tokens_of(frame, thing, letter):
            if letter is None and thing is None:
                return [separators[frame]]
            if letter is not None:
                cells = [letters(frame)[letter]]
            else:
                at = [number for number, _ in frames[frame][1]].index(thing)
                cells = np.argwhere(shown(frame) == at).tolist()
            columns = frames[frame][0][1]
            return [begins[frame] + y * columns + x for y, x in cells]

        def tokens(look):
            return tokens_of(look.frame, look.thing, look.letter)

        for frame, (pad, (_, things, *_)) in enumerate(zip(script.pads, frames, strict=True)):
            slots = in_slots(things)
            for head, slot in enumerate(SLOTS):
                look = Look(frame=frame, thing=slots[slot][0]) if slot in slots else Look(frame=frame)
                self.tell("slots", row, [head], pad, tokens(look))
            if clip:
                self.tell("before", row, range(len(SLOTS)), pad, [script.pads[max(frame - 1, 0)]])
        for text, digits in script.stamps:
            for head, at in enumerate(digits):
                self.tell("stamps", row, [head], text, [at])
        for text, look in script.looks:
            whole = look.thing is None and look.letter is None
            if whole or len(frames) > 1:
                self.tell("frames", row, self.HALF, text, [script.pads[look.frame]])
            if not whole and not clip:
                self.tell("looks", row, self.HALF, text, tokens(look))
        for text, look in script.named:
            self.tell("asked", row, self.HALF, text, tokens(look))

    def points(self) -> dict[str, torch.Tensor]:
        """ "gaze": name -> [points, 5]: row, head, text token, token to look at, and the number of the group of which any will do."""
        points = {}
        for name, told in self.told.items():
            if told:
                points[name] = torch.tensor(
                    [(*place, token, i) for i, (*place, tokens) in enumerate(told) for token in tokens]
                )
        return {"gaze": points}


def frame_of(scene, grid: tuple[int, int], time: float = 0.0) -> tuple:
    """A picture or frame as `Gaze.add` takes it."""
    return grid, scene.numbered_at(time), scene.sign, (scene.width, scene.height)


def in_slots(things: list[tuple[int, Thing]]) -> dict[str, tuple[int, Thing]]:
    """(number, thing) by slots: a shape's slot is that of the first of its things from the left, and those behind it share two more."""
    slots, spare = {}, list(TWINS)
    for number, thing in sorted(things, key=lambda pair: pair[1].x):
        slot = thing.shape if thing.shape not in slots else spare.pop(0) if spare else None
        if slot is not None:
            slots[slot] = number, thing
    return slots


def facts(things: list[tuple[int, Thing]], number: int | None = None) -> dict[str, int]:
    """What the text token of a picture or frame with these (number, thing) is asked; `number` is the picture's among several."""
    told = {f"colour {slot}": len(COLOURS) for slot in SLOTS} | {"count": len(things)}
    told |= {} if number is None else {"picture": number}
    ranks = {number: rank for rank, (number, _) in enumerate(sorted(things, key=lambda pair: pair[1].x))}
    for slot, (number, thing) in in_slots(things).items():
        known = {**what_it_is(thing), "place": PLACES.index(place_of(thing)), **fine(thing), "rank": ranks[number]}
        known |= {"kind": known.pop("shape")} if slot in TWINS else {}
        told |= {f"{name} {slot}": value for name, value in known.items() if name != "shape"}
    return told


def happening(event) -> str:
    return f"moves {way_of(event.thing)}" if event.kind == "moves" else event.kind


def beginning(event) -> dict[str, int]:
    """Of the frame in which an event begins."""
    told = {
        "begins": HAPPENINGS.index(happening(event)),
        **{f"subject {name}": value for name, value in what_it_is(event.thing).items()},
    }
    if event.kind == "appears":
        told["subject place"] = PLACES.index(place_of(event.thing))
    if event.kind == "changes":
        told["subject paint"] = list(COLOURS).index(event.thing.changes[1])
    return told


def clip_facts(scene, times: list[float]) -> list[dict[str, int]]:
    """Of every frame, with what happens in it; a thing that moves does so in every frame that shows it farther on."""
    events, told = events_of(scene, times), []
    for time in times:
        stamp = f"{time:04.1f}".replace(".", "")
        told.append({**facts(scene.numbered_at(time)), **{f"event {slot}": len(HAPPENINGS) for slot in SLOTS}})
        told[-1] |= {f"stamp {i}": int(digit) for i, digit in enumerate(stamp)}
        told[-1] |= {"events": sum(event.time <= time for event in events), "begins": len(HAPPENINGS)}
    for event in reversed(events):  # of several that begin in one frame, the first is told
        frames = [times.index(event.time)]
        told[frames[0]] |= beginning(event)
        if event.kind == "moves":
            later = range(frames[0] + 1, len(times))
            frames += [frame for frame in later if way_gone(event.thing, times[frame - 1], times[frame]) > 0]
        kind = happening(event)
        for frame in frames:  # what is gone stood in its slot in the frame before
            slots = in_slots(scene.numbered_at(times[max(frame - (kind == "disappears"), 0)]))
            slot = next((slot for slot, (number, _) in slots.items() if number == event.number), None)
            if slot is not None:
                told[frame][f"event {slot}"] = HAPPENINGS.index(kind)
    return told


def fact_rows(told: list[dict[str, int]]) -> torch.Tensor:
    """[pictures and frames, len(FACTS)]"""
    return torch.tensor([[row.get(name, -100) for name, _ in FACTS] for row in told])


def ink_patches(scene, grid: tuple[int, int]) -> np.ndarray:
    """How much of each of its 8 x 8 squares is covered by things and letters, for every patch of a picture: [P, 64], 0 to 1, in the
    order of `pixel_values`."""
    rows, columns = grid  # merged
    levels = (
        np.asarray(draw_ink(scene).resize((16 * columns, 16 * rows), Image.Resampling.BILINEAR), dtype=np.float32)
        / 255
    )
    # [Y, my, py, X, mx, px] -> [Y, X, my, mx, py, px]
    return levels.reshape(rows, 2, 8, columns, 2, 8).transpose(0, 3, 1, 4, 2, 5).reshape(-1, 64)


# Batches


@dataclass(frozen=True)
class Clip:
    """A row about a clip."""

    script: Script
    pixel_values: torch.Tensor
    grid: list[int]
    moments: list[int]  # of each frame; frames of one moment look the same
    leaps: list[int]  # of each frame, how much farther on it stands than its text puts it
    facts: torch.Tensor
    frames: list[tuple]  # as `frame_of` gives them


def random_leaps(lot: random.Random, frames: int) -> list[int]:
    """How much farther on each frame of a clip stands than its text puts it, the clip being torn at one to three frames: so far positions
    are known from short clips (Ruoss et al., Randomized Positional Encodings, 2023)."""
    leaps = [0] * frames
    for _ in range(lot.randint(1, 3)):
        frame, leap = lot.randrange(frames), lot.randint(1, FURTHEST // 3)
        leaps = [*leaps[:frame], *(farther + leap for farther in leaps[frame:])]
    return leaps


class Lessons:
    """The batches of a run, always the same for the same seed; `plan(step)` says of which kind they are: "look", "pictures",
    "images", "clips" or "later", clips as parts of longer ones.

    Args:
        size: how many pictures a batch has, a multiple of 8; other kinds are sized to cost about as much.
    """

    def __init__(self, processor, seed: int, plan, size: int = 16):
        self.tokenizer, self.image_processor = processor.tokenizer, processor.image_processor
        self.picture_limits = (self.image_processor.min_pixels, self.image_processor.max_pixels)
        self.frame_limits = (processor.video_processor.min_pixels, processor.video_processor.max_pixels)
        self.seed, self.plan, self.size = seed, plan, size

    def batch(self, step: int, rank: int = 0) -> dict:
        """That of one of the processes that train side by side; all have the same sizes, so that none waits for the others."""
        lot, sizes, kind = (
            random.Random(f"{self.seed} {step} {rank}"),
            random.Random(f"{self.seed} {step}"),
            self.plan(step),
        )
        if kind in ("clips", "later"):
            return {"kind": kind, **self.clips(lot, sizes, later=kind == "later")}
        make = {"look": self.look, "pictures": self.pictures, "images": self.images}[kind]
        return {"kind": kind, **make(lot, sizes)}

    def some_limits(self, sizes):
        """Mostly the checkpoint's own; at times a frame's, or hardly any: whoever asks may set others."""
        return sizes.choices((self.picture_limits, self.frame_limits, WIDE_LIMITS), (0.66, 0.2, 0.14))[0]

    def pixels(self, pictures, limits) -> tuple[torch.Tensor, list[list[int]]]:
        """pixel_values [P, 768] in bfloat16 and the grids (t, h, w) of pictures at these limits."""
        seen = self.image_processor(pictures, min_pixels=limits[0], max_pixels=limits[1], return_tensors="pt")
        return seen["pixel_values"].to(torch.bfloat16), seen["image_grid_thw"].tolist()

    def seen(self, lot, scenes, limits) -> tuple[dict, list[tuple[int, int]]]:
        """Pixels, grids and what every token and every picture shows; and the merged grids."""
        pictures = [draw_scene(scene) for scene in scenes]
        pictures = [compressed(lot, picture) if lot.random() < 0.3 else picture for picture in pictures]
        pixel_values, grids = self.pixels(pictures, limits)
        merged = [(h // 2, w // 2) for _, h, w in grids]
        shown = [
            sights(scene.things, scene.signs, (scene.width, scene.height), grid)
            for scene, grid in zip(scenes, merged, strict=True)
        ]
        shown, inks = (
            np.concatenate(shown),
            np.concatenate([ink_patches(scene, grid) for scene, grid in zip(scenes, merged, strict=True)]),
        )
        named = {"sights": torch.from_numpy(shown), "inks": torch.from_numpy(inks)}
        return {"pixel_values": pixel_values, "grid_thw": grids, **named}, merged

    def scenes(self, lot, limits, count=None, sign_share: float = 0.5) -> list:
        """As many as fill a batch; the fewer pixels each has, the more."""
        number = self.size if limits is not self.frame_limits else self.size * 2
        canvases = [random_canvas(lot) for _ in range(number // ALIKE)]
        canvases.sort(key=lambda canvas: canvas[0] / canvas[1])  # equal grids stand together
        return [random_picture(lot, count, sign_share, canvas) for canvas in canvases for _ in range(ALIKE)]

    def look(self, lot, sizes) -> dict:
        """Crowded and full pictures, without text."""
        limits = self.frame_limits if sizes.random() < 0.3 else self.some_limits(sizes)
        scenes = self.scenes(lot, limits, count=lot.choice((3, 4, 4)), sign_share=0.7)
        if lot.random() < 0.7:
            scenes = [random_crowd(lot, (scene.width, scene.height)) for scene in scenes]
        return self.seen(lot, scenes, limits)[0]

    def pictures(self, lot, sizes) -> dict:
        limits = self.some_limits(sizes)
        scenes, scripts, gaze = self.scenes(lot, limits), [], Gaze()
        seen, grids = self.seen(lot, scenes, limits)
        for scene, grid in zip(scenes, grids, strict=True):
            script = Script(self.tokenizer, lot.random() < 0.5, "<|image_pad|>", [grid])
            tasks = [task for task in PICTURE_TASKS if task != "text" or scene.sign is None and lot.random() < 0.4]
            questions = choose(lot, tasks, lambda task, plain: ask_picture(task, scene, lot, plain))
            if scene.sign is not None:
                questions.append(ask_picture("text", scene, lot))
            script.add_all(questions)
            gaze.add(len(scripts), script, [frame_of(scene, grid)])
            scripts.append(script)
        seen["facts"] = fact_rows([facts(scene.numbered_at(0.0)) for scene in scenes])
        return {**seen, **gaze.points(), **join(scripts, self.tokenizer.pad_token_id), "media_nums": [1] * len(scenes)}

    def images(self, lot, sizes) -> dict:
        """Several pictures a row, and which of them shows what."""
        limits = sizes.choices((self.picture_limits, self.frame_limits), (0.6, 0.4))[0]
        room, groups, asked = (self.size * 3 // 2 if limits is self.picture_limits else self.size * 2), [], []
        canvas = random_canvas(lot)
        while sum(map(len, groups)) < room:
            canvas = random_canvas(lot) if sum(map(len, groups)) > room // 2 else canvas
            group = [random_picture(lot, lot.randint(1, 3), 0.2, canvas) for _ in range(lot.randint(2, 4))]
            drawn = (ask_images(group, lot, lot.random() < 0.35) for _ in range(4))
            questions = {question.prompt: question for question in drawn if question is not None}
            if questions:
                groups.append(group)
                asked.append(questions.values())
        seen, grids = self.seen(lot, [scene for group in groups for scene in group], limits)
        scripts, rest, gaze = [], iter(grids), Gaze()
        for group, questions in zip(groups, asked, strict=True):
            own = [next(rest) for _ in group]
            scripts.append(Script(self.tokenizer, lot.random() < 0.5, "<|image_pad|>" * len(group), own))
            scripts[-1].add_all(questions)
            gaze.add(
                len(scripts) - 1, scripts[-1], [frame_of(scene, grid) for scene, grid in zip(group, own, strict=True)]
            )
        seen["facts"] = fact_rows(
            [facts(scene.numbered_at(0.0), number) for group in groups for number, scene in enumerate(group)]
        )
        return {
            **seen,
            **gaze.points(),
            **join(scripts, self.tokenizer.pad_token_id),
            "media_nums": [len(group) for group in groups],
        }

    def clips(self, lot, sizes, later: bool = False) -> dict:
        """Clips of about the same length, drawn at the times that the video processor takes."""
        fps, limits = sizes.choice((1, 2)), self.frame_limits if sizes.random() < 0.85 else WIDE_LIMITS
        seconds = sizes.choices(((2, 6), (4, 10), (8, 14), (13, 20)), (2, 2, 2, 3))[0]
        clips = []
        while sum(len(clip.script.pads) for clip in clips) < 8 * self.size and len(clips) < self.size * 3 // 4:
            if len(clips) % 4 == 0:
                canvas = random_canvas(lot)
            clips.append(self.clip(lot, random_clip(lot, seconds, canvas), fps, limits, later))
        clips.sort(key=lambda clip: clip.grid[1:])  # equal grids stand together
        gaze = Gaze()
        for row, clip in enumerate(clips):
            gaze.add(row, clip.script, clip.frames, clip=True)
        pixel_values, told = (torch.cat([getattr(clip, name) for clip in clips]) for name in ("pixel_values", "facts"))
        seen = {"pixel_values": pixel_values, "grid_thw": [clip.grid for clip in clips], "facts": told}
        seen |= {"moments": [clip.moments for clip in clips], "grain": lot.getrandbits(32)}
        tokens = [
            clip.grid[1] * clip.grid[2] // 4 + 1 for clip in clips for _ in clip.moments
        ]  # of each frame, its separator too
        seen["leaps"] = torch.tensor([leap for clip in clips for leap in clip.leaps]).repeat_interleave(
            torch.tensor(tokens)
        )
        rows = join([clip.script for clip in clips], self.tokenizer.pad_token_id)
        return {**seen, **gaze.points(), **rows, "media_nums": [1] * len(clips)}

    def clip(self, lot, scene, fps: int, limits, later: bool) -> Clip:
        """`later`: as part of a longer clip, at times torn."""
        times = sampled_times(scene, fps)
        background, drawn = draw_background(scene), {}  # moments that look the same are drawn once
        for time in times:
            if tuple(scene.at(time)) not in drawn:
                drawn[tuple(scene.at(time))] = len(drawn), compressed(lot, draw_scene(scene, time, background))
        pixel_values, own = self.pixels([picture for _, picture in drawn.values()], limits)
        moments = [drawn[tuple(scene.at(time))][0] for time in times]
        pixel_values = pixel_values.view(len(own), -1, pixel_values.shape[1])[moments].flatten(0, 1)
        _, h, w = own[0]
        if later:
            seconds = round(lot.uniform(0, LATEST), 1)
            scene, times = scene.later(seconds), [time + seconds for time in times]
        stamps = "".join(f"<|time_start|>{time:.1f} seconds<|time_end|><|image_pad|>" for time in times)
        media, merged = f"<|vision_start|>{stamps}<|vision_end|>", (h // 2, w // 2)
        script, leaps = Script(self.tokenizer, lot.random() < 0.5, media, [merged] * len(times)), [0] * len(times)
        if later and lot.random() < LEAPING:
            leaps = random_leaps(lot, len(times))
        script.leap(leaps)
        script.add_all(choose(lot, CLIP_TASKS, lambda task, plain: ask_clip(task, scene, times, lot, plain)))
        frames = [frame_of(scene, merged, time) for time in times]
        return Clip(
            script, pixel_values, [len(times), h, w], moments, leaps, fact_rows(clip_facts(scene, times)), frames
        )
