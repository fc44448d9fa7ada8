"""Clips that are watched frame by frame, the requests of a user meanwhile, and what is right to say at each frame.

A standing request ("Tell me when the star appears.", "Describe what happens.") stays until the next standing request,
and is answered at the first frame that shows an event it asks for. A question ("What do you see now?", "When did the
star appear?") is answered at once, or at the first frame if none has come yet, and leaves the standing request as it
is. streams.py turns this into tokens. Times are seconds.
"""

import functools
import random
from dataclasses import dataclass, replace

from moss_vl.training.nano.questions import Event, choose_wording, events_of, listing, name_of
from moss_vl.training.nano.world import (
    COLOURS,
    SHAPES,
    Scene,
    Thing,
    random_colour,
    random_move,
    random_stage,
    random_things,
    random_times,
)


KINDS = ("appears", "disappears", "changes", "moves")
CLAUSES = {  # kind of event -> what a standing request and its answer say
    "appears": "the {} appears",
    "disappears": "the {} disappears",
    "changes": "the {} changes color",
    "moves": "the {} moves",
}
TELL = (
    "Tell me when {}.",
    "Let me know when {}.",
    "Say when {}.",
    "Tell me as soon as {}.",
    "Alert me when {}.",
    "Notify me when {}.",
)
DESCRIBE = (
    "Describe what happens.",
    "Tell me what happens.",
    "Report what happens.",
    "Say what happens.",
    "Describe everything that happens.",
)
NOW = (
    "What do you see now?",
    "What do you see?",
    "What is visible now?",
    "What can you see now?",
    "What is there now?",
)
PAST = {  # kind of event -> questions about its time
    "appears": ("When did the {} appear?", "At what time did the {} appear?", "When did the {} show up?"),
    "disappears": ("When did the {} disappear?", "At what time did the {} disappear?", "When did the {} vanish?"),
    "changes": ("When did the {} change color?", "At what time did the {} change color?"),
    "moves": ("When did the {} move?", "When did the {} start moving?", "At what time did the {} start moving?"),
}
NOT_YET = "not yet"
# What happens to a thing of a watched clip, with weights; a change comes with another event only if no other thing
# has the shape, because its name would be ambiguous afterwards.
COURSES = {
    (): 1.5,
    ("appears",): 2.0,
    ("disappears",): 2.0,
    ("changes",): 2.0,
    ("moves",): 2.0,
    ("appears", "disappears"): 1.0,
    ("appears", "moves"): 0.7,
    ("moves", "disappears"): 0.7,
    ("appears", "changes"): 0.4,
    ("changes", "disappears"): 0.4,
}


# clips


def watched_clip(rng: random.Random, seconds: float, canvas: tuple[int, int] | None = None) -> Scene:
    """A random clip of 1 to 3 things with at most two events each, all at least a second apart."""
    while True:
        clip = try_watched_clip(rng, seconds, canvas)
        if clip is not None:
            return clip


def try_watched_clip(rng: random.Random, seconds: float, canvas) -> Scene | None:
    """A random clip; None if its things or events do not fit."""
    stage = random_stage(rng, canvas)
    for side in ("width", "height"):
        stage[side] -= stage[side] % 2  # h264 needs even sides
    things = random_things(rng, stage, rng.randint(1, 3), None)
    if things is None:
        return None
    courses = rng.choices(tuple(COURSES), tuple(COURSES.values()), k=len(things))
    shapes = [thing.shape for thing in things]
    if any(len(course) > 1 and "changes" in course and shapes.count(thing.shape) > 1
           for thing, course in zip(things, courses, strict=True)):  # fmt: skip
        return None
    times = random_times(rng, sum(map(len, courses)), seconds)
    if times is None:
        return None
    for index, course in enumerate(courses):
        own = sorted(times.pop() for _ in course)
        for kind, time, end in zip(course, own, [*own[1:], seconds], strict=False):
            changed = with_event(rng, things, index, kind, time, end, stage)
            if changed is None:
                return None
            things[index] = changed
    return Scene(things=tuple(things), seconds=seconds, fps=24, **stage)


def with_event(rng: random.Random, things, index: int, kind: str, time: float, end: float, stage) -> Thing | None:
    """The thing with one event more, which is over before `end`; None if a move finds no path."""
    thing = things[index]
    if kind in ("appears", "disappears"):
        return replace(thing, **{kind: time})
    others = [other for number, other in enumerate(things) if number != index]
    if kind == "moves":
        return random_move(rng, thing, time, end, others, stage)
    taken = {colour for other in others if other.shape == thing.shape for colour in colours_of(other)}
    colour, tint = random_colour(rng, stage["background"], {thing.colour, *taken})
    return replace(thing, changes=(time, colour), tints=(*thing.tints, (colour, tint)))


def colours_of(thing: Thing) -> list[str]:
    """The colours that a thing has in a clip."""
    return [thing.colour] + ([thing.changes[1]] if thing.changes else [])


# requests


@dataclass(frozen=True)
class Watch:
    """A request for one kind of event of one thing. `number`: index in the scene's things; None if it has no such."""

    kind: str
    name: str
    number: int | None

    @property
    def clause(self) -> str:
        return CLAUSES[self.kind].format(self.name)

    def asks_for(self, event: Event) -> bool:
        return (event.kind, event.number) == (self.kind, self.number)


@dataclass(frozen=True)
class Request:
    """What the user says before the frame `frame` (its index), or together with it.

    Attributes:
        kind: "watch", "describe", "now" or "past". The first two are standing requests.
        watches: the events that "watch" asks for, and the one that "past" asks about.
    """

    frame: int
    kind: str
    prompt: str
    watches: tuple[Watch, ...] = ()
    with_frame: bool = False

    @property
    def stands(self) -> bool:
        return self.kind in ("watch", "describe")


@dataclass(frozen=True)
class Script:
    """A watched clip: its frames and all that the user says. A request at frame 0 opens the stream."""

    scene: Scene
    times: tuple[float, ...]  # of the frames
    requests: tuple[Request, ...]

    @functools.cached_property
    def events(self) -> list[Event]:
        return events_of(self.scene, list(self.times))

    def clauses(self, request: Request | None, frame: int) -> list[str]:
        """What a standing request asks to be said at a frame."""
        if request is None or not request.stands:
            return []
        events = [event for event in self.events if event.time == self.times[frame]]
        if request.kind == "describe":
            return [event.clause for event in events]
        return [watch.clause for event in events for watch in request.watches if watch.asks_for(event)]

    def answer(self, request: Request, frame: int) -> tuple[str, int]:
        """The answer to a question if `frame` is the last frame, and the frame that shows it."""
        now = self.times[frame]
        if request.kind == "now":
            return listing(self.scene.at(now)), frame
        (watch,) = request.watches
        event = next((one for one in self.events if watch.asks_for(one) and one.time <= now), None)
        if event is None:
            return NOT_YET, frame
        return f"{event.time:.1f} seconds", self.times.index(event.time)


class Requests:
    """Random requests about one clip."""

    def __init__(self, rng: random.Random, scene: Scene, times: list[float]):
        self.rng, self.scene, self.times = rng, scene, times
        self.events = events_of(scene, times)

    def word(self, wordings, *names) -> str:
        return choose_wording(self.rng, self.rng.random() < 0.35, wordings, *names)

    def name(self, number: int) -> str:
        """A name of a thing: the usual one, or with the colour that it has first."""
        thing = self.scene.things[number]
        usual = name_of(thing, self.scene.things)
        if self.rng.random() < 0.25 and (thing.changes is None or thing.disappears == float("inf")):
            return f"{thing.colour} {thing.shape}"
        return usual

    def present(self, kind: str | None = None) -> Watch | None:
        """A request for an event that comes, of a random kind by default; None if there is none."""
        if not self.events:
            return None
        kind = kind or self.rng.choice(sorted({event.kind for event in self.events}))
        event = self.rng.choice([event for event in self.events if event.kind == kind])
        return Watch(kind, self.name(event.number), event.number)

    def absent(self) -> Watch:
        """A request for an event that does not come: of another kind, or of a thing that is similar or not there."""
        happening = {(event.number, event.kind) for event in self.events}
        if self.rng.random() < 0.5:  # a thing to which something else happens, or nothing
            number, kind = self.rng.randrange(len(self.scene.things)), self.rng.choice(KINDS)
            if (number, kind) not in happening:
                return Watch(kind, self.name(number), number)
        taken = {(thing.shape, colour) for thing in self.scene.things for colour in colours_of(thing)}
        model, kinds = self.rng.choice(self.scene.things), sorted({event.kind for event in self.events}) or KINDS
        while True:
            shape = model.shape if self.rng.random() < 0.4 else self.rng.choice(SHAPES)
            colour = self.rng.choice(colours_of(model)) if self.rng.random() < 0.4 else self.rng.choice(tuple(COLOURS))
            if (shape, colour) not in taken:
                break
        known = any(shape == other for other, _ in taken)
        name = f"{colour} {shape}" if known or self.rng.random() < 0.25 else shape
        return Watch(self.rng.choice(kinds if self.rng.random() < 0.6 else KINDS), name, None)

    def watch(
        self, frame: int = 0, comes: bool | None = None, count: int = 1, kind: str | None = None
    ) -> Request | None:
        """A request for `count` events.

        Args:
            comes: whether the first event comes in the clip, maybe before `frame`; None: at random.
            kind: of the first event, which then comes.

        Returns:
            None if nothing happens in the clip.
        """
        comes = kind is not None or (self.rng.random() < 0.65 if comes is None else comes)
        first = self.present(kind) if comes else self.absent()
        if first is None:
            return None
        watches = [first]
        for _ in range(20):
            if len(watches) == count:
                break
            other = (self.present() if self.rng.random() < 0.6 else None) or self.absent()
            if all((other.kind, other.name) != (one.kind, one.name) and
                   (other.number is None or (other.kind, other.number) != (one.kind, one.number))
                   for one in watches):  # fmt: skip
                watches.append(other)
        self.rng.shuffle(watches)
        joint = self.rng.choice((" and when ", " or when ", " and if "))
        said = joint.join(watch.clause for watch in watches)
        if self.rng.random() < 0.15:
            said = said.replace("the ", "a ").replace("a orange", "an orange")
        with_frame = frame > 0 and self.rng.random() < 0.5
        return Request(frame, "watch", self.word(TELL, said), tuple(watches), with_frame)

    def describe(self, frame: int = 0) -> Request:
        return Request(frame, "describe", self.word(DESCRIBE), (), frame > 0 and self.rng.random() < 0.5)

    def now(self, frame: int) -> Request:
        return Request(frame, "now", self.word(NOW), (), frame > 0 and self.rng.random() < 0.5)

    def past(self, frame: int) -> Request | None:
        """A question about the time of an event, in most cases one that has come before `frame`."""
        before = [event for event in self.events if frame > 0 and event.time <= self.times[frame - 1]]
        if before and self.rng.random() < 0.8:
            event = self.rng.choice(before)
            watch = Watch(event.kind, self.name(event.number), event.number)
        else:
            watch = (self.present() if self.rng.random() < 0.5 else None) or self.absent()
        with_frame = frame > 0 and self.rng.random() < 0.5
        return Request(frame, "past", self.word(PAST[watch.kind], watch.name), (watch,), with_frame)


def random_script(rng: random.Random, scene: Scene, times: list[float]) -> Script:
    """Random requests about a clip: one that opens the stream, and up to three later ones."""
    ask = Requests(rng, scene, times)
    draw = rng.random()
    if draw < 0.5:
        opening = ask.watch(count=1 if rng.random() < 0.75 else 2)
    elif draw < 0.75:
        opening = ask.describe()
    else:
        opening = ask.now(0) if draw < 0.85 else None
    requests = [opening] if opening is not None else []
    number = rng.choices((0, 1, 2, 3), (4, 4, 2, 1))[0]
    frames = sorted(rng.sample(range(1, len(times)), min(number, len(times) - 1)))
    for frame in frames:
        draw = rng.random()
        if draw < 0.35:
            request = ask.now(frame)
        elif draw < 0.65:
            request = ask.past(frame)
        elif draw < 0.9:
            request = ask.watch(frame, count=1 if rng.random() < 0.75 else 2)
        else:
            request = ask.describe(frame)
        requests += [request] if request is not None else []
    return Script(scene, tuple(times), tuple(requests))
