"""What may be asked about a scene of the drawn world (world.py), in several wordings, and the right answers.

A thing is called by its shape where no other has it ("the star"), else by colour and shape ("the blue star"). The first wording of
each list is the plain one.
"""

import math
import random
from dataclasses import dataclass, replace

import numpy as np

from moss_vl.training.nano.world import COLOURS, SHAPES, WAYS, Scene, Thing


PICTURE_TASKS = ("describe picture", "color", "shape", "count", "place", "relation", "exists", "text")
CLIP_TASKS = ("describe clip", "first or last", "when", "visible at", "direction", "color after", "duration")
IMAGES_TASK = "which image"

DESCRIBE_PICTURE = (
    "Describe the picture.", "", "Describe the image.", "What do you see in the picture?", "What is in the image?",
    "Describe what you see.", "What does the picture show?", "Which objects are in the picture?", "Describe this picture.",
    "Describe this image.", "What is shown here?",
)  # fmt: skip
COLOR = (
    "What color is the {}?", "What colour is the {}?", "Which color does the {} have?", "What is the color of the {}?",
    "Name the color of the {}.", "Tell me the color of the {}.", "The {} has which color?",
)  # fmt: skip
SHAPE = (
    "What shape is the {} object?", "Which shape is {}?", "What is the shape of the {} object?", "What is the {} object?",
    "Name the shape of the {} object.", "What shape does the {} object have?", "Which shape does the {} thing have?",
)  # fmt: skip
COUNT = (
    "How many objects are there?", "Count the objects.", "How many objects are in the picture?",
    "How many shapes can you see in the picture?", "How many objects do you see?", "What is the number of objects?",
    "How many shapes are there?", "How many things are in the image?",
)  # fmt: skip
PLACE = (
    "Where is the {}?", "In which part of the picture is the {}?", "Where in the picture is the {}?",
    "Where can the {} be found?", "What is the position of the {}?", "Where is the {} in the image?",
    "Where do you see the {}?",
)  # fmt: skip
RELATION = (
    "What is {} the {}?", "Which object is {} the {}?", "What object is {} the {}?", "What do you see {} the {}?",
    "What can be seen {} the {}?", "Name the object {} the {}.", "Which shape is {} the {}?",
)  # fmt: skip
SIDES = {"left": "to the left of", "right": "to the right of", "up": "above", "down": "below"}
EXISTS = (
    "Is there a {}?", "Is there a {} in the picture?", "Can you see a {}?", "Do you see a {}?", "Does the picture show a {}?",
    "Is a {} in the image?", "Does the image contain a {}?",
)  # fmt: skip
TEXT = (
    "What does the text say?", "What does the sign say?", "Read the text.", "What is written in the picture?",
    "What text is in the picture?", "Which text can you read?", "What is the text in the image?", "What is written there?",
)  # fmt: skip
WHICH_IMAGE = (
    "Which image shows a {}?", "In which image is a {}?", "Which picture shows a {}?", "In which picture is a {}?",
    "Which image has a {}?", "Which of the images shows a {}?", "Which image contains a {}?",
)  # fmt: skip
DESCRIBE_CLIP = (
    "Describe the video.", "", "Describe the clip.", "What happens in the video?", "What happens?",
    "Tell me what happens, in order, with times.", "Describe what happens in the video.", "What does the video show?",
    "Describe this video.", "What happens in this clip?",
)  # fmt: skip
FIRST_OR_LAST = (
    "What happens {}?", "What happens {} in the video?", "Which event comes {}?", "What is the {} event?",
    "What happens {} of all?", "Name the {} event.",
)  # fmt: skip
APPEAR = (
    "When does the {} appear?", "At what time does the {} appear?", "When can the {} first be seen?",
    "When does the {} come into view?", "When does the {} show up?",
)  # fmt: skip
DISAPPEAR = (
    "When does the {} disappear?", "At what time does the {} disappear?", "When does the {} vanish?", "When is the {} gone?",
    "When does the {} go away?",
)  # fmt: skip
CHANGE = (
    "When does the {} change color?", "At what time does the {} change color?", "When does the {} change its color?",
    "When does the color of the {} change?", "When does the {} change colour?",
)  # fmt: skip
MOVE = (
    "When does the {} start moving?", "At what time does the {} start moving?", "When does the {} start to move?",
    "When does the {} begin to move?", "When does the {} move?",
)  # fmt: skip
VISIBLE_AT = (
    "What is visible at {:.1f} seconds?", "What can be seen at {:.1f} seconds?",
    "Which objects are visible at {:.1f} seconds?", "What do you see at {:.1f} seconds?",
    "What is in the video at {:.1f} seconds?",
)  # fmt: skip
DIRECTION = (
    "Which way does the {} move?", "In which direction does the {} move?", "Where does the {} move to?",
    "What direction does the {} move in?", "Which direction does the {} go?", "In what direction does the {} move?",
)  # fmt: skip
COLOR_AFTER = (
    "What color is the {} after it changes?", "What color does the {} change to?",
    "Which color does the {} have after the change?", "What is the new color of the {}?",
    "What colour is the {} after it changes?", "What color does the {} turn?",
)  # fmt: skip
DURATION = (
    "How long is the video?", "How many seconds does the clip last?", "How long is the clip?",
    "How long does the video last?", "What is the length of the video?",
)  # fmt: skip


@dataclass(frozen=True)
class Look:
    """Where one has to look for the answer from its character `start` on: at a picture or frame, and in it at a thing or a letter."""

    start: int = 0
    frame: int = 0  # of the clip's sampled frames, or of several pictures
    thing: int | None = None  # its number among the scene's things
    letter: int | None = None  # its number in the sign


@dataclass(frozen=True)
class Question:
    task: str
    prompt: str
    answer: str
    looks: tuple[Look, ...] = ()  # by rising start; empty where nothing is to be seen
    asked: Look | None = None  # at what the prompt names; at no thing where it is not there


def place_of(thing: Thing) -> str:
    """Its ninth of the canvas: top left, top, top right, left, center, ..."""
    row, column = min(int(3 * thing.y), 2), min(int(3 * thing.x), 2)
    return " ".join(filter(None, (("top", "", "bottom")[row], ("left", "", "right")[column]))) or "center"


def article(thing: Thing) -> str:
    return f"a {thing.size} {thing.colour} {thing.shape}"


def with_place(thing: Thing) -> str:
    place = place_of(thing)
    where = "on" if place in ("left", "right") else "in" if place == "center" else "at"
    return f"{article(thing)} {where} the {place}"


def listing(things: list[Thing]) -> str:
    """Things with their places, from left to right."""
    return ", ".join(with_place(thing) for thing in sorted(things, key=lambda thing: thing.x)) or "nothing"


def listing_looks(things: list[tuple[int, Thing]], frame: int = 0, start: int = 0) -> list[Look]:
    """For the `listing` of these (number, thing), which begins at the answer's character `start`."""
    if not things:
        return [Look(start, frame)]
    looks = []
    for number, thing in sorted(things, key=lambda pair: pair[1].x):
        looks.append(Look(start, frame, number))
        start += len(with_place(thing)) + len(", ")
    return looks


def sign_looks(text: str, start: int = 0) -> list[Look]:
    return [Look(start + i, letter=i) for i in range(len(text))]


def called(thing: Thing, among) -> str:
    """What a question calls it: the shape where that says it all."""
    alike = [other for other in among if other.shape == thing.shape]
    return thing.shape if len(alike) == 1 else f"{thing.colour} {thing.shape}"


def beside(scene: Scene, thing: Thing, way: str) -> Thing | None:
    """The nearest thing whose centre lies on that side of this one's."""
    right, down = WAYS[way]
    others = [other for other in scene.things if (other.x - thing.x) * right + (other.y - thing.y) * down > 0]
    distance = lambda other: math.hypot((other.x - thing.x) * scene.width, (other.y - thing.y) * scene.height)  # noqa: E731
    return min(others, key=distance, default=None)


# Pictures


def ask_picture(task: str, scene: Scene, lot: random.Random, plain: bool = False) -> Question | None:
    """A question of the task about the picture, or None where the picture offers none. `plain` takes the first wording."""

    def word(wordings, *names):
        return (wordings[0] if plain else lot.choice(wordings)).format(*names)

    things = scene.things
    thing = lot.choice(things)

    def about(prompt, thing, answer, asked=None):
        look = Look(thing=things.index(thing))
        return Question(task, prompt, answer, (look,), look if asked is None else Look(thing=things.index(asked)))

    if task == "describe picture":
        prompt = "" if lot.random() < 0.3 else word(DESCRIBE_PICTURE)
        answer, looks = listing(list(things)), listing_looks(list(enumerate(things)))
        if scene.sign is not None:
            answer += ', and the text "'
            looks += sign_looks(scene.sign.text, len(answer))
            answer += f'{scene.sign.text}"'
        return Question(task, prompt, answer, tuple(looks))
    if task == "color":
        single = [thing for thing in things if called(thing, things) == thing.shape]
        return about(word(COLOR, (thing := lot.choice(single)).shape), thing, thing.colour) if single else None
    if task == "shape":
        single = [thing for thing in things if sum(other.colour == thing.colour for other in things) == 1]
        return about(word(SHAPE, (thing := lot.choice(single)).colour), thing, thing.shape) if single else None
    if task == "count":
        return Question(task, word(COUNT), str(len(things)), (Look(),))
    if task == "place":
        return about(word(PLACE, called(thing, things)), thing, place_of(thing))
    if task == "relation":
        way = lot.choice(tuple(SIDES))
        other = beside(scene, thing, way)
        prompt = word(RELATION, SIDES[way], called(thing, things))
        return about(prompt, thing, "nothing") if other is None else about(prompt, other, article(other), asked=thing)
    if task == "exists":
        there = {(thing.shape, thing.colour): thing for thing in things}
        if lot.random() < 0.5:
            shape, colour = lot.choice(sorted(there))
        else:  # half of what is not there is there in shape or in colour
            shape, colour = thing.shape, thing.colour
            near = lot.choice(("shape", "colour", "neither", "neither"))
            while (shape, colour) in there:
                shape = thing.shape if near == "shape" else lot.choice(SHAPES)
                colour = thing.colour if near == "colour" else lot.choice(tuple(COLOURS))
        prompt = word(EXISTS, f"{colour} {shape}").replace(" a orange", " an orange")
        here = (shape, colour) in there
        return about(prompt, there[shape, colour], "yes") if here else Question(task, prompt, "no", asked=Look())
    if task == "text":
        text = scene.sign.text if scene.sign is not None else "nothing"
        return Question(task, word(TEXT), text, tuple(sign_looks(text)) if scene.sign is not None else ())
    raise ValueError(f"no task named {task!r}; those of pictures are {', '.join(PICTURE_TASKS)}")


def ask_images(scenes: list[Scene], lot: random.Random, plain: bool = False) -> Question | None:
    """Which of several pictures shows a thing that one of them alone has."""
    names = {}
    for index, scene in enumerate(scenes):
        for thing in scene.things:
            for name in (thing.shape, f"{thing.colour} {thing.shape}"):
                names.setdefault(name, set()).add(index)
    single = sorted(name for name, images in names.items() if len(images) == 1)
    shapes = [name for name in single if name in SHAPES]
    if not single:
        return None
    name = lot.choice(shapes if shapes and (plain or lot.random() < 0.6) else single)
    prompt = (WHICH_IMAGE[0] if plain else lot.choice(WHICH_IMAGE)).format(name).replace(" a orange", " an orange")
    image = names[name].pop()
    thing = next(
        i for i, thing in enumerate(scenes[image].things) if name in (thing.shape, f"{thing.colour} {thing.shape}")
    )
    look = Look(frame=image, thing=thing)
    return Question(IMAGES_TASK, prompt, str(image + 1), (look,), look)


# Clips


@dataclass(frozen=True)
class Event:
    time: float  # the stamp of the first sampled frame that shows it
    kind: str  # appears, disappears, changes, moves
    thing: Thing
    name: str  # what the thing is called
    number: int  # of the scene's things

    def look(self, times: list[float], start: int = 0) -> Look:
        """At the first frame that shows it."""
        return Look(start, times.index(self.time))

    @property
    def clause(self) -> str:
        if self.kind == "appears":
            return with_place(self.thing).replace(self.thing.shape, f"{self.thing.shape} appears")
        if self.kind == "changes":
            return f"the {self.name} changes color to {self.thing.changes[1]}"
        return (
            f"the {self.name} disappears"
            if self.kind == "disappears"
            else f"the {self.name} moves {way_of(self.thing)}"
        )


def way_of(thing: Thing) -> str:
    _, right, down = thing.moves
    return next(way for way, step in WAYS.items() if step[0] * right + step[1] * down > 0)


def way_gone(thing: Thing, before: float, time: float) -> float:
    """How far, in canvases, a thing moves between two times."""
    first, last = (replace(thing, appears=0.0, disappears=math.inf).at(at) for at in (before, time))
    return math.hypot(last.x - first.x, last.y - first.y)


def sampled_times(scene: Scene, fps: float) -> list[float]:
    """Times of the frames that the video processor takes of a clip, `fps` a second."""
    total = round(scene.seconds * scene.fps)
    count = min(max(math.ceil(total / scene.fps * fps - 1e-6), 1), total)
    indices = dict.fromkeys(np.linspace(0, total - 1, count).astype(int).tolist())
    return [index / scene.fps for index in indices]


def events_of(scene: Scene, times: list[float]) -> list[Event]:
    """What happens in a clip, in order; what no sampled frame shows is left out."""
    events = []
    for number, thing in enumerate(scene.things):
        name, seen = called(thing, scene.things), [time for time in times if thing.at(time) is not None]
        starts = {"appears": thing.appears, "disappears": thing.disappears, "changes": (thing.changes or (math.inf,))[0],
                  "moves": (thing.moves or (math.inf,))[0]}  # fmt: skip
        for kind, start in starts.items():
            among = times if kind == "disappears" else seen
            shown = [time for time in among if (time > start if kind == "moves" else time >= start)]
            if start > 0 and seen and shown:
                now = thing.at(shown[0]) if kind == "appears" else thing
                events.append((start, Event(shown[0], kind, now, name, number)))
    return [event for _, event in sorted(events, key=lambda pair: pair[0])]


def ask_clip(task: str, scene: Scene, times: list[float], lot: random.Random, plain: bool = False) -> Question | None:
    """A question of the task about a clip of which frames at `times` are seen, or None where the clip offers none."""

    def word(wordings, *names):
        return (wordings[0] if plain else lot.choice(wordings)).format(*names)

    events = events_of(scene, times)

    def about(prompt, answer, event, look=None):
        return Question(task, prompt, answer, (look or event.look(times),))

    if task == "describe clip":
        answer = f"at {times[0]:.1f} seconds "
        looks = listing_looks(scene.numbered_at(times[0]), start=len(answer))
        answer += listing(scene.at(times[0]))
        for event in events:
            answer += "; "
            looks.append(event.look(times, len(answer)))
            answer += f"at {event.time:.1f} seconds {event.clause}"
        return Question(task, "" if lot.random() < 0.3 else word(DESCRIBE_CLIP), answer, tuple(looks))
    if task == "visible at":
        frame = lot.choice(range(len(times)))
        time, shown = times[frame], listing(scene.at(times[frame]))
        later = times[frame + 1 : frame + 2]
        if (
            later and lot.random() < 0.25 and scene.at(time) == scene.at(later[0])
        ):  # between two frames that show the same
            time = lot.uniform(time, later[0])
            frame += f"{time:.1f}" == f"{later[0]:.1f}"
        return Question(
            task, word(VISIBLE_AT, time), shown, tuple(listing_looks(scene.numbered_at(times[frame]), frame))
        )
    if task == "duration":
        return Question(task, word(DURATION), f"{scene.seconds:.1f} seconds", (Look(frame=len(times) - 1),))
    if task == "first or last":
        which = lot.choice(("first", "last"))
        prompt, at_end = word(FIRST_OR_LAST, which), events[:2] if which == "first" else events[:-3:-1]
        if len(at_end) == 2 and at_end[0].time == at_end[1].time:
            return None  # the same frame shows both
        return about(prompt, at_end[0].clause, at_end[0]) if at_end else Question(task, prompt, "nothing")
    kinds = {
        "when": ("appears", "disappears", "changes", "moves"),
        "direction": ("moves",),
        "color after": ("changes",),
    }
    if task not in kinds:
        raise ValueError(f"no task named {task!r}; those of clips are {', '.join(CLIP_TASKS)}")
    events = [event for event in events if event.kind in kinds[task]]
    if not events:
        return None
    event = lot.choice(events)
    if task == "direction":
        most = max(range(1, len(times)), key=lambda frame: way_gone(event.thing, times[frame - 1], times[frame]))
        return about(word(DIRECTION, event.name), way_of(event.thing), event, Look(frame=most))
    if task == "color after":
        return about(word(COLOR_AFTER, event.name), event.thing.changes[1], event)
    wordings = {"appears": APPEAR, "disappears": DISAPPEAR, "changes": CHANGE, "moves": MOVE}[event.kind]
    return about(word(wordings, event.name), f"{event.time:.1f} seconds", event)
