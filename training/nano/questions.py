"""Questions about scenes of the drawn world (world.py), in several wordings, with the right answers.

A thing is named by its shape if no other thing has that shape ("the star"), else by colour and shape ("the blue
star"). The first wording of each list is the plain one.
"""

import math
import random
from dataclasses import dataclass, replace

import numpy as np

from moss_vl.training.nano.world import COLOURS, DIRECTIONS, SHAPES, Scene, Thing, reading_order


PICTURE_TASKS = ("describe picture", "color", "shape", "count", "place", "relation", "exists", "text")
CLIP_TASKS = ("describe clip", "first or last", "when", "visible at", "direction", "color after", "duration")
IMAGES_TASK = "which image"

DESCRIBE_PICTURE = (
    "Describe the picture.",
    "",
    "Describe the image.",
    "What do you see in the picture?",
    "What is in the image?",
    "Describe what you see.",
    "What does the picture show?",
    "Which objects are in the picture?",
    "Describe this picture.",
    "Describe this image.",
    "What is shown here?",
)
COLOR = (
    "What color is the {}?",
    "What colour is the {}?",
    "Which color does the {} have?",
    "What is the color of the {}?",
    "Name the color of the {}.",
    "Tell me the color of the {}.",
    "The {} has which color?",
)
SHAPE = (
    "What shape is the {} object?",
    "Which shape is {}?",
    "What is the shape of the {} object?",
    "What is the {} object?",
    "Name the shape of the {} object.",
    "What shape does the {} object have?",
    "Which shape does the {} thing have?",
)
COUNT = (
    "How many objects are there?",
    "Count the objects.",
    "How many objects are in the picture?",
    "How many shapes can you see in the picture?",
    "How many objects do you see?",
    "What is the number of objects?",
    "How many shapes are there?",
    "How many things are in the image?",
)
PLACE = (
    "Where is the {}?",
    "In which part of the picture is the {}?",
    "Where in the picture is the {}?",
    "Where can the {} be found?",
    "What is the position of the {}?",
    "Where is the {} in the image?",
    "Where do you see the {}?",
)
RELATION = (
    "What is {} the {}?",
    "Which object is {} the {}?",
    "What object is {} the {}?",
    "What do you see {} the {}?",
    "What can be seen {} the {}?",
    "Name the object {} the {}.",
    "Which shape is {} the {}?",
)
SIDES = {"left": "to the left of", "right": "to the right of", "up": "above", "down": "below"}
EXISTS = (
    "Is there a {}?",
    "Is there a {} in the picture?",
    "Can you see a {}?",
    "Do you see a {}?",
    "Does the picture show a {}?",
    "Is a {} in the image?",
    "Does the image contain a {}?",
)
TEXT = (
    "What does the text say?",
    "What does the sign say?",
    "Read the text.",
    "What is written in the picture?",
    "What text is in the picture?",
    "Which text can you read?",
    "What is the text in the image?",
    "What is written there?",
)
WHICH_IMAGE = (
    "Which image shows a {}?",
    "In which image is a {}?",
    "Which picture shows a {}?",
    "In which picture is a {}?",
    "Which image has a {}?",
    "Which of the images shows a {}?",
    "Which image contains a {}?",
)
DESCRIBE_CLIP = (
    "Describe the video.",
    "",
    "Describe the clip.",
    "What happens in the video?",
    "What happens?",
    "Tell me what happens, in order, with times.",
    "Describe what happens in the video.",
    "What does the video show?",
    "Describe this video.",
    "What happens in this clip?",
)
FIRST_OR_LAST = (
    "What happens {}?",
    "What happens {} in the video?",
    "Which event comes {}?",
    "What is the {} event?",
    "What happens {} of all?",
    "Name the {} event.",
)
APPEAR = (
    "When does the {} appear?",
    "At what time does the {} appear?",
    "When can the {} first be seen?",
    "When does the {} come into view?",
    "When does the {} show up?",
)
DISAPPEAR = (
    "When does the {} disappear?",
    "At what time does the {} disappear?",
    "When does the {} vanish?",
    "When is the {} gone?",
    "When does the {} go away?",
)
CHANGE = (
    "When does the {} change color?",
    "At what time does the {} change color?",
    "When does the {} change its color?",
    "When does the color of the {} change?",
    "When does the {} change colour?",
)
MOVE = (
    "When does the {} start moving?",
    "At what time does the {} start moving?",
    "When does the {} start to move?",
    "When does the {} begin to move?",
    "When does the {} move?",
)
VISIBLE_AT = (
    "What is visible at {:.1f} seconds?",
    "What can be seen at {:.1f} seconds?",
    "Which objects are visible at {:.1f} seconds?",
    "What do you see at {:.1f} seconds?",
    "What is in the video at {:.1f} seconds?",
)
DIRECTION = (
    "Which way does the {} move?",
    "In which direction does the {} move?",
    "Where does the {} move to?",
    "What direction does the {} move in?",
    "Which direction does the {} go?",
    "In what direction does the {} move?",
)
COLOR_AFTER = (
    "What color is the {} after it changes?",
    "What color does the {} change to?",
    "Which color does the {} have after the change?",
    "What is the new color of the {}?",
    "What colour is the {} after it changes?",
    "What color does the {} turn?",
)
DURATION = (
    "How long is the video?",
    "How many seconds does the clip last?",
    "How long is the clip?",
    "How long does the video last?",
    "What is the length of the video?",
)


@dataclass(frozen=True)
class Evidence:
    """What shows the answer from its character `start` on: a picture or frame, and in it a thing or a letter."""

    start: int = 0
    frame: int = 0  # index among a clip's sampled frames, or among several pictures
    thing: int | None = None  # index in the scene's things
    letter: int | None = None  # index in the sign


@dataclass(frozen=True)
class Question:
    task: str
    prompt: str
    answer: str
    evidence: tuple[Evidence, ...] = ()  # in the order of `start`; empty if nothing shows the answer
    subject: Evidence | None = None  # what the prompt names; without a thing if the scene does not have it


def region_of(thing: Thing) -> str:
    """The ninth of the canvas with the thing's centre: top left, top, top right, left, center, ..."""
    row, column = min(int(3 * thing.y), 2), min(int(3 * thing.x), 2)
    return " ".join(filter(None, (("top", "", "bottom")[row], ("left", "", "right")[column]))) or "center"


def with_article(thing: Thing) -> str:
    return f"a {thing.size} {thing.colour} {thing.shape}"


def with_region(thing: Thing) -> str:
    region = region_of(thing)
    preposition = "on" if region in ("left", "right") else "in" if region == "center" else "at"
    return f"{with_article(thing)} {preposition} the {region}"


def listing(things: list[Thing]) -> str:
    """Things with their regions, in reading order."""
    return ", ".join(with_region(thing) for thing in sorted(things, key=reading_order)) or "nothing"


def listing_evidence(things: list[tuple[int, Thing]], frame: int = 0, start: int = 0) -> list[Evidence]:
    """The evidence of the `listing` of (index, thing) pairs, which begins at character `start` of the answer."""
    if not things:
        return [Evidence(start, frame)]
    evidence = []
    for number, thing in sorted(things, key=lambda pair: reading_order(pair[1])):
        evidence.append(Evidence(start, frame, number))
        start += len(with_region(thing)) + len(", ")
    return evidence


def sign_evidence(text: str, start: int = 0) -> list[Evidence]:
    return [Evidence(start + i, letter=i) for i in range(len(text))]


def name_of(thing: Thing, among) -> str:
    """The name of a thing in questions: its shape if that is unambiguous, else colour and shape."""
    same_shape = [other for other in among if other.shape == thing.shape]
    return thing.shape if len(same_shape) == 1 else f"{thing.colour} {thing.shape}"


def nearest_on_side(scene: Scene, thing: Thing, side: str) -> Thing | None:
    """The nearest thing whose centre lies on that side of `thing`."""
    right, down = DIRECTIONS[side]
    others = [other for other in scene.things if (other.x - thing.x) * right + (other.y - thing.y) * down > 0]

    def distance(other):
        return math.hypot((other.x - thing.x) * scene.width, (other.y - thing.y) * scene.height)

    return min(others, key=distance, default=None)


def choose_wording(rng: random.Random, plain: bool, wordings, *names) -> str:
    """A random wording, or with `plain` the first one, with the names filled in."""
    return (wordings[0] if plain else rng.choice(wordings)).format(*names)


# pictures


@dataclass(frozen=True)
class PictureQuestions:
    """The questions about a picture. The methods return None if the picture offers no such question."""

    task: str
    scene: Scene
    rng: random.Random
    plain: bool

    def word(self, wordings, *names) -> str:
        return choose_wording(self.rng, self.plain, wordings, *names)

    def about(self, prompt: str, answer: str, shown: Thing, named: Thing | None = None) -> Question:
        """A question that names one thing (default: the same) and whose answer another thing shows."""
        evidence = Evidence(thing=self.scene.things.index(shown))
        subject = evidence if named is None else Evidence(thing=self.scene.things.index(named))
        return Question(self.task, prompt, answer, (evidence,), subject)

    def describe(self, thing: Thing) -> Question:
        things, sign = self.scene.things, self.scene.sign
        prompt = "" if self.rng.random() < 0.3 else self.word(DESCRIBE_PICTURE)
        answer, evidence = listing(list(things)), listing_evidence(list(enumerate(things)))
        if sign is not None:
            answer += ', and the text "'
            evidence += sign_evidence(sign.text, len(answer))
            answer += f'{sign.text}"'
        return Question(self.task, prompt, answer, tuple(evidence))

    def color(self, thing: Thing) -> Question | None:
        things = self.scene.things
        unique = [thing for thing in things if name_of(thing, things) == thing.shape]
        if not unique:
            return None
        thing = self.rng.choice(unique)
        return self.about(self.word(COLOR, thing.shape), thing.colour, thing)

    def shape(self, thing: Thing) -> Question | None:
        things = self.scene.things
        unique = [thing for thing in things if sum(other.colour == thing.colour for other in things) == 1]
        if not unique:
            return None
        thing = self.rng.choice(unique)
        return self.about(self.word(SHAPE, thing.colour), thing.shape, thing)

    def count(self, thing: Thing) -> Question:
        return Question(self.task, self.word(COUNT), str(len(self.scene.things)), (Evidence(),))

    def place(self, thing: Thing) -> Question:
        return self.about(self.word(PLACE, name_of(thing, self.scene.things)), region_of(thing), thing)

    def relation(self, thing: Thing) -> Question:
        side = self.rng.choice(tuple(SIDES))
        other = nearest_on_side(self.scene, thing, side)
        prompt = self.word(RELATION, SIDES[side], name_of(thing, self.scene.things))
        if other is None:
            return self.about(prompt, "nothing", thing)
        return self.about(prompt, with_article(other), other, named=thing)

    def exists(self, thing: Thing) -> Question:
        present = {(thing.shape, thing.colour): thing for thing in self.scene.things}
        if self.rng.random() < 0.5:
            shape, colour = self.rng.choice(sorted(present))
        else:  # half of the absent things have the shape or the colour of a present one
            shape, colour = thing.shape, thing.colour
            same = self.rng.choice(("shape", "colour", "neither", "neither"))
            while (shape, colour) in present:
                shape = thing.shape if same == "shape" else self.rng.choice(SHAPES)
                colour = thing.colour if same == "colour" else self.rng.choice(tuple(COLOURS))
        prompt = self.word(EXISTS, f"{colour} {shape}").replace(" a orange", " an orange")
        if (shape, colour) in present:
            return self.about(prompt, "yes", present[shape, colour])
        return Question(self.task, prompt, "no", subject=Evidence())

    def text(self, thing: Thing) -> Question:
        if self.scene.sign is None:
            return Question(self.task, self.word(TEXT), "nothing")
        text = self.scene.sign.text
        return Question(self.task, self.word(TEXT), text, tuple(sign_evidence(text)))


def ask_picture(task: str, scene: Scene, rng: random.Random, plain: bool = False) -> Question | None:
    """A question of the task about the picture, None if the picture offers none. `plain`: in the first wording."""
    if task not in PICTURE_TASKS:
        raise ValueError(f"no task named {task!r}; those of pictures are {', '.join(PICTURE_TASKS)}")
    questions = PictureQuestions(task, scene, rng, plain)
    ask = {
        "describe picture": questions.describe,
        "color": questions.color,
        "shape": questions.shape,
        "count": questions.count,
        "place": questions.place,
        "relation": questions.relation,
        "exists": questions.exists,
        "text": questions.text,
    }
    return ask[task](rng.choice(scene.things))


def ask_images(scenes: list[Scene], rng: random.Random, plain: bool = False) -> Question | None:
    """Which of several pictures shows a thing that only one of them has; None if there is no such thing."""
    images_of = {}  # name of a thing -> indices of the pictures that have one
    for index, scene in enumerate(scenes):
        for thing in scene.things:
            for name in (thing.shape, f"{thing.colour} {thing.shape}"):
                images_of.setdefault(name, set()).add(index)
    unique = sorted(name for name, images in images_of.items() if len(images) == 1)
    shapes = [name for name in unique if name in SHAPES]
    if not unique:
        return None
    name = rng.choice(shapes if shapes and (plain or rng.random() < 0.6) else unique)
    prompt = choose_wording(rng, plain, WHICH_IMAGE, name).replace(" a orange", " an orange")
    (image,) = images_of[name]
    thing = next(
        i for i, thing in enumerate(scenes[image].things) if name in (thing.shape, f"{thing.colour} {thing.shape}")
    )
    evidence = Evidence(frame=image, thing=thing)
    return Question(IMAGES_TASK, prompt, str(image + 1), (evidence,), evidence)


# clips


@dataclass(frozen=True)
class Event:
    time: float  # the time stamp of the first sampled frame that shows it
    kind: str  # appears, disappears, changes, moves
    thing: Thing
    name: str  # of the thing, in questions
    number: int  # index in the scene's things

    def evidence(self, times: list[float], start: int = 0) -> Evidence:
        """The first frame that shows the event."""
        return Evidence(start, times.index(self.time))

    @property
    def clause(self) -> str:
        if self.kind == "appears":
            return with_region(self.thing).replace(self.thing.shape, f"{self.thing.shape} appears")
        if self.kind == "changes":
            return f"the {self.name} changes color to {self.thing.changes[1]}"
        if self.kind == "disappears":
            return f"the {self.name} disappears"
        return f"the {self.name} moves {direction_of(self.thing)}"


def direction_of(thing: Thing) -> str:
    """The direction in which a thing moves: left, right, up or down."""
    _, right, down = thing.moves
    return next(name for name, step in DIRECTIONS.items() if step[0] * right + step[1] * down > 0)


def distance_moved(thing: Thing, start: float, end: float) -> float:
    """How far a thing moves between two times, as a fraction of the canvas."""
    first, last = (replace(thing, appears=0.0, disappears=math.inf).at(time) for time in (start, end))
    return math.hypot(last.x - first.x, last.y - first.y)


def whole_seconds(seconds: float) -> str:
    """The answer about a duration. Its tenths are not asked for: the time stamps often do not tell them."""
    return f"{max(math.floor(seconds + 0.5), 1)} seconds"


def sampled_times(scene: Scene, fps: float) -> list[float]:
    """Times of the frames that the video processor samples from a clip at `fps`."""
    total = round(scene.seconds * scene.fps)
    count = min(max(math.ceil(total / scene.fps * fps - 1e-6), 1), total)
    indices = dict.fromkeys(np.linspace(0, total - 1, count).astype(int).tolist())
    return [index / scene.fps for index in indices]


def events_of(scene: Scene, times: list[float]) -> list[Event]:
    """The events of a clip, in order, without those that no sampled frame shows."""
    events = []
    for number, thing in enumerate(scene.things):
        name, present = name_of(thing, scene.things), [time for time in times if thing.at(time) is not None]
        starts = {
            "appears": thing.appears,
            "disappears": thing.disappears,
            "changes": (thing.changes or (math.inf,))[0],
            "moves": (thing.moves or (math.inf,))[0],
        }
        for kind, start in starts.items():
            candidates = times if kind == "disappears" else present
            after = [time for time in candidates if (time > start if kind == "moves" else time >= start)]
            if start > 0 and present and after:
                now = thing.at(after[0]) if kind == "appears" else thing
                events.append((start, Event(after[0], kind, now, name, number)))
    return [event for _, event in sorted(events, key=lambda pair: pair[0])]


@dataclass(frozen=True)
class ClipQuestions:
    """The questions about a clip sampled at `times`. The methods return None if the clip offers no such question."""

    task: str
    scene: Scene
    times: list[float]
    rng: random.Random
    plain: bool

    def word(self, wordings, *names) -> str:
        return choose_wording(self.rng, self.plain, wordings, *names)

    def about(self, prompt: str, answer: str, event: Event) -> Question:
        return Question(self.task, prompt, answer, (event.evidence(self.times),))

    def describe(self, events: list[Event]) -> Question:
        first = self.times[0]
        answer = f"at {first:.1f} seconds "
        evidence = listing_evidence(self.scene.numbered_at(first), start=len(answer))
        answer += listing(self.scene.at(first))
        for event in events:
            answer += "; "
            evidence.append(event.evidence(self.times, len(answer)))
            answer += f"at {event.time:.1f} seconds {event.clause}"
        prompt = "" if self.rng.random() < 0.3 else self.word(DESCRIBE_CLIP)
        return Question(self.task, prompt, answer, tuple(evidence))

    def visible_at(self, events: list[Event]) -> Question:
        frame = self.rng.choice(range(len(self.times)))
        time, answer = self.times[frame], listing(self.scene.at(self.times[frame]))
        following = self.times[frame + 1 : frame + 2]
        if following and self.rng.random() < 0.25 and self.scene.at(time) == self.scene.at(following[0]):
            time = self.rng.uniform(time, following[0])  # between two frames that show the same
            frame += f"{time:.1f}" == f"{following[0]:.1f}"
        prompt = self.word(VISIBLE_AT, time)
        evidence = listing_evidence(self.scene.numbered_at(self.times[frame]), frame)
        return Question(self.task, prompt, answer, tuple(evidence))

    def duration(self, events: list[Event]) -> Question:
        last = Evidence(frame=len(self.times) - 1)
        return Question(self.task, self.word(DURATION), whole_seconds(self.scene.seconds), (last,))

    def first_or_last(self, events: list[Event]) -> Question | None:
        which = self.rng.choice(("first", "last"))
        prompt, outermost = self.word(FIRST_OR_LAST, which), events[:2] if which == "first" else events[:-3:-1]
        if len(outermost) == 2 and outermost[0].time == outermost[1].time:
            return None  # the same frame shows both
        if not outermost:
            return Question(self.task, prompt, "nothing")
        return self.about(prompt, outermost[0].clause, outermost[0])

    def when(self, events: list[Event]) -> Question | None:
        if not events:
            return None
        event = self.rng.choice(events)
        wordings = {"appears": APPEAR, "disappears": DISAPPEAR, "changes": CHANGE, "moves": MOVE}[event.kind]
        return self.about(self.word(wordings, event.name), f"{event.time:.1f} seconds", event)

    def direction(self, events: list[Event]) -> Question | None:
        moves = [event for event in events if event.kind == "moves"]
        if not moves:
            return None
        event = self.rng.choice(moves)

        def distance(frame):
            return distance_moved(event.thing, self.times[frame - 1], self.times[frame])

        fastest = Evidence(frame=max(range(1, len(self.times)), key=distance))
        return Question(self.task, self.word(DIRECTION, event.name), direction_of(event.thing), (fastest,))

    def color_after(self, events: list[Event]) -> Question | None:
        changes = [event for event in events if event.kind == "changes"]
        if not changes:
            return None
        event = self.rng.choice(changes)
        return self.about(self.word(COLOR_AFTER, event.name), event.thing.changes[1], event)


def ask_clip(task: str, scene: Scene, times: list[float], rng: random.Random, plain: bool = False) -> Question | None:
    """A question of the task about a clip sampled at `times`, None if the clip offers none."""
    if task not in CLIP_TASKS:
        raise ValueError(f"no task named {task!r}; those of clips are {', '.join(CLIP_TASKS)}")
    questions = ClipQuestions(task, scene, times, rng, plain)
    ask = {
        "describe clip": questions.describe,
        "first or last": questions.first_or_last,
        "when": questions.when,
        "visible at": questions.visible_at,
        "direction": questions.direction,
        "color after": questions.color_after,
        "duration": questions.duration,
    }
    return ask[task](events_of(scene, times))
