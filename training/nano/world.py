"""The drawn world that moss-vl-nano knows: scenes of plain shapes, at times with a sign, and clips in which they come, go, turn
another colour or move. Here is what a scene is, how it is drawn, and how one is drawn by lot; what may be asked about it is in
questions.py.

Places are fractions of the canvas (x to the right, y down), radii fractions of its shorter side, times seconds, colours RGB levels.
The same scene gives the same pixels every time.
"""

import colorsys
import functools
import importlib.util
import math
import random
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont


SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (214, 38, 38), "green": (34, 150, 62), "blue": (36, 84, 214), "yellow": (250, 214, 36),
    "purple": (134, 52, 170), "orange": (245, 134, 24), "white": (252, 252, 252), "black": (14, 14, 14),
}  # fmt: skip
SIGN_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
SMALL, LARGE = (0.09, 0.14), (0.18, 0.26)  # radii
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOVE_SECONDS = 1.0
SUPERSAMPLING = 4


@dataclass(frozen=True)
class Thing:
    """A shape. With `fill` 1 every part of it lies within `radius` of its centre."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    angle: float = 0.0  # degrees, within 15 of upright
    appears: float = 0.0
    disappears: float = math.inf
    changes: tuple[float, str] | None = None  # (time, new colour)
    moves: tuple[float, float, float] | None = None  # (start, to the right, down)
    move_seconds: float = MOVE_SECONDS
    fill: float = 1.0  # how far corners reach, in radii: for some a square of radius r has sides of 2 r
    # In radii: the inner radius of a star or ring, half the width of a cross's arms, or how far up a triangle reaches whose base is
    # sqrt(2) wide and sqrt(1/2) below the centre. None is the usual one, of a triangle equal sides.
    detail: float | None = None
    tints: tuple[tuple[str, tuple[int, int, int]], ...] = ()  # (colour name, RGB) where it is not the usual one

    @property
    def size(self) -> str:
        return "small" if self.radius < 0.16 else "large"

    @property
    def rgb(self) -> tuple[int, int, int]:
        return dict(self.tints).get(self.colour, COLOURS[self.colour])

    def at(self, time: float) -> "Thing | None":
        """The thing as it stands at `time`, or None where it is not to be seen."""
        if not self.appears <= time < self.disappears:
            return None
        now = self
        if self.changes is not None and time >= self.changes[0]:
            now = replace(now, colour=self.changes[1])
        if self.moves is not None:
            start, right, down = self.moves
            done = min(max((time - start) / self.move_seconds, 0.0), 1.0)
            now = replace(now, x=self.x + done * right, y=self.y + done * down)
        return now

    def later(self, seconds: float) -> "Thing":
        """The same with everything that happens to it that much later; what is there from the start on stays so."""
        return replace(
            self, appears=self.appears and self.appears + seconds, disappears=self.disappears + seconds,
            changes=self.changes and (self.changes[0] + seconds, *self.changes[1:]),
            moves=self.moves and (self.moves[0] + seconds, *self.moves[1:]),
        )  # fmt: skip


@dataclass(frozen=True)
class Sign:
    """One to five characters of A-Z 0-9; `height` of the letters and the centre are fractions of the canvas."""

    text: str
    x: float
    y: float
    height: float  # 0.12 to 0.30
    colour: str  # black or white, whichever stands out
    font: str | None = None  # a file; None is Pillow's own


@dataclass(frozen=True)
class Scene:
    """A picture, or the stage of a clip. `background` runs from its first colour to its second along `direction` (right, down)."""

    width: int
    height: int
    background: tuple[tuple[int, int, int], tuple[int, int, int]]
    things: tuple[Thing, ...]
    sign: Sign | None = None
    noise: int = 0  # levels up or down, at most 12
    antialias: bool = True
    seconds: float = 0.0  # clips only
    fps: int = 0
    direction: tuple[float, float] = (0.0, 1.0)
    grain: int = 0  # seed of the noise
    more_signs: tuple[Sign, ...] = ()  # of crowds alone: a picture of the world has one sign at most

    @property
    def signs(self) -> tuple[Sign, ...]:
        return self.more_signs if self.sign is None else (self.sign, *self.more_signs)

    def at(self, time: float) -> list[Thing]:
        """What is to be seen at `time`, from left to right."""
        return sorted((thing for _, thing in self.numbered_at(time)), key=lambda thing: thing.x)

    def numbered_at(self, time: float) -> list[tuple[int, Thing]]:
        """What is to be seen at `time`, each with its number among `things`."""
        now = ((number, thing.at(time)) for number, thing in enumerate(self.things))
        return [(number, thing) for number, thing in now if thing is not None]

    def later(self, seconds: float) -> "Scene":
        """The same clip as a part of a longer one, in which it begins at `seconds`; what it shows from its start on stays so."""
        return replace(
            self, seconds=self.seconds + seconds, things=tuple(thing.later(seconds) for thing in self.things)
        )


# Drawing


def outline(thing: Thing, centre, radius: float) -> list[tuple[float, float]]:
    """Corner points, in pixels, of a shape with straight sides."""
    if thing.shape == "square":
        polar = [(45 + 90 * i, 1.0) for i in range(4)]
    elif thing.shape == "triangle" and thing.detail is None:
        polar = [(-90 + 120 * i, 1.0) for i in range(3)]
    elif thing.shape == "triangle":
        polar = [(-90, thing.detail), (45, 1.0), (135, 1.0)]
    elif thing.shape == "star":
        inner = thing.detail if thing.detail is not None else 0.4
        polar = [(-90 + 36 * i, 1.0 if i % 2 == 0 else inner) for i in range(10)]
    elif thing.shape == "cross":
        arm = thing.detail if thing.detail is not None else 0.3
        half = math.degrees(math.atan2(arm, 1.0))  # half the width of an arm over its length
        inner = math.hypot(arm, arm) / math.hypot(arm, 1.0)
        polar = [
            corner for i in range(4) for corner in ((90 * i - half, 1.0), (90 * i + half, 1.0), (90 * i + 45, inner))
        ]
    elif thing.shape == "heart":  # not of this world; training/nano/teach_shape.py teaches it
        turns = [2 * math.pi * i / 60 for i in range(60)]
        across = [16 * math.sin(turn) ** 3 / 18 for turn in turns]
        down = [
            (3 - 13 * math.cos(t) + 5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t)) / -18 for t in turns
        ]
        polar = [(math.degrees(math.atan2(-y, x)), math.hypot(x, y)) for x, y in zip(across, down, strict=True)]
    else:
        raise ValueError(f"no shape named {thing.shape!r}; the shapes are {', '.join(SHAPES)}")
    turned = [(math.radians(degrees + thing.angle), length * radius) for degrees, length in polar]
    return [(centre[0] + length * math.cos(angle), centre[1] + length * math.sin(angle)) for angle, length in turned]


def thing_mask(thing: Thing, scene: Scene, scale: int) -> tuple[Image.Image, tuple[int, int]]:
    """The thing's pixels as a grey mask, `scale` times as large, and the pixel of the canvas where it begins."""
    centre = (thing.x * scene.width * scale, thing.y * scene.height * scale)
    radius = thing.radius * thing.fill * min(scene.width, scene.height) * scale
    left, top = (max(math.floor((middle - radius) / scale) - 1, 0) for middle in centre)
    sides = (scene.width, scene.height)
    right, bottom = (
        min(math.ceil((middle + radius) / scale) + 2, side) for middle, side in zip(centre, sides, strict=True)
    )
    mask = Image.new("L", (max(right - left, 1) * scale, max(bottom - top, 1) * scale))
    draw = ImageDraw.Draw(mask)
    centre = (centre[0] - left * scale, centre[1] - top * scale)
    if thing.shape in ("circle", "ring"):
        draw.ellipse(box_around(centre, radius), fill=255)
        if thing.shape == "ring":
            draw.ellipse(box_around(centre, (thing.detail if thing.detail is not None else 0.58) * radius), fill=0)
    else:
        draw.polygon(outline(thing, centre, radius), fill=255)
    return mask, (left, top)


def box_around(centre, radius):
    return [centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius]


@functools.lru_cache(maxsize=512)
def load_font(path: str | None, size: float):
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)


@functools.lru_cache(maxsize=512)
def text_box(path: str | None, text: str) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a text in the font at size 100."""
    return load_font(path, 100).getbbox(text)


def sign_font(sign: Sign, canvas_height: float):
    """The font at the size that makes the letters `sign.height` high, and the box (left, top, right, bottom) of the text in it."""
    left, top, right, bottom = text_box(sign.font, sign.text)
    font = load_font(sign.font, round(100 * sign.height * canvas_height / (bottom - top), 1))
    return font, font.getbbox(sign.text)


def sign_mask(sign: Sign, scene: Scene, scale: int) -> tuple[Image.Image, tuple[int, int]]:
    """The letters' pixels, as `thing_mask` has a thing's."""
    font, (left, top, right, bottom) = sign_font(sign, scene.height * scale)
    corner = (sign.x * scene.width * scale - (left + right) / 2, sign.y * scene.height * scale - (top + bottom) / 2)
    begin = tuple(max(math.floor((at + low) / scale) - 1, 0) for at, low in zip(corner, (left, top), strict=True))
    sides = (scene.width, scene.height)
    end = tuple(
        min(math.ceil((at + high) / scale) + 2, side)
        for at, high, side in zip(corner, (right, bottom), sides, strict=True)
    )
    mask = Image.new("L", tuple(max(stop - start, 1) * scale for start, stop in zip(begin, end, strict=True)))
    ImageDraw.Draw(mask).text(
        (corner[0] - begin[0] * scale, corner[1] - begin[1] * scale), sign.text, font=font, fill=255
    )
    return mask, begin


def draw_background(scene: Scene) -> Image.Image:
    first, second = (np.array(colour, dtype=np.float32) for colour in scene.background)
    right, down = scene.direction
    along = right * np.linspace(0.0, 1.0, scene.width)[None, :] + down * np.linspace(0.0, 1.0, scene.height)[:, None]
    levels = first + along[..., None].astype(np.float32) / (abs(right) + abs(down)) * (second - first)
    if scene.noise:
        grain = np.random.Generator(np.random.SFC64(scene.grain))
        levels = levels + grain.integers(-scene.noise, scene.noise + 1, levels.shape, dtype=np.int8)
    return Image.fromarray(np.clip(np.rint(levels), 0, 255).astype(np.uint8))


def layers(scene: Scene, time: float):
    """What lies on the background at `time`, the sign on top: (colour, grey mask, the mask's box on the canvas)."""
    scale = SUPERSAMPLING if scene.antialias else 1
    found = [(thing.rgb, *thing_mask(thing, scene, scale)) for thing in scene.at(time)]
    found += [(COLOURS[sign.colour], *sign_mask(sign, scene, scale)) for sign in scene.signs]
    for colour, mask, (left, top) in found:
        mask = mask.reduce(scale) if scale > 1 else mask
        yield colour, mask, (left, top, left + mask.width, top + mask.height)


def draw_scene(scene: Scene, time: float = 0.0, background: Image.Image | None = None) -> Image.Image:
    """The scene at `time` seconds, as an RGB picture. `background` saves drawing it again for each frame of a clip."""
    picture = (background if background is not None else draw_background(scene)).copy()
    for colour, mask, box in layers(scene, time):
        picture.paste(colour, box, mask=mask)
    return picture


def draw_ink(scene: Scene, time: float = 0.0) -> Image.Image:
    """Where things and letters are, white on black."""
    picture = Image.new("L", (scene.width, scene.height))
    for _, mask, box in layers(scene, time):
        picture.paste(255, box, mask=mask)
    return picture


def frame_times(scene: Scene) -> list[float]:
    """The presentation time of every frame of a clip."""
    return [index / scene.fps for index in range(round(scene.seconds * scene.fps))]


def write_clip(scene: Scene, path) -> None:
    """h264 in mp4. One thread and no version strings: the same encoder nearly always writes the same bytes.

    Nearly all frames look like the one before: only those that do not are drawn and turned into yuv420p.
    """
    import av

    background, shown, tick = draw_background(scene), None, Fraction(1, scene.fps)
    with av.open(str(path), "w", options={"fflags": "+bitexact", "movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=scene.fps)
        stream.width, stream.height, stream.pix_fmt = scene.width, scene.height, "yuv420p"
        stream.time_base = tick
        stream.options = {"crf": "20", "g": str(2 * scene.fps), "threads": "1"}
        for number, time in enumerate(frame_times(scene)):
            if scene.at(time) != shown:
                shown = scene.at(time)
                frame = av.VideoFrame.from_image(draw_scene(scene, time, background)).reformat(format="yuv420p")
            frame.pts, frame.time_base = number, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


# Scenes by lot. Colours, outlines and letters vary as those of different hands would: others draw this world too.

TINTS = {
    "red": ((255, 0, 0), (214, 38, 38), (220, 20, 60), (200, 30, 30), (230, 57, 53), (178, 24, 24)),
    "green": ((0, 255, 0), (0, 128, 0), (34, 150, 62), (50, 205, 50), (46, 180, 90), (20, 110, 40)),
    "blue": ((0, 0, 255), (36, 84, 214), (30, 120, 240), (65, 105, 225), (20, 30, 160), (40, 100, 200)),
    "yellow": ((255, 255, 0), (250, 214, 36), (255, 225, 0), (241, 206, 25), (255, 240, 60)),
    "purple": ((128, 0, 128), (134, 52, 170), (150, 80, 190), (148, 0, 211), (160, 32, 240), (100, 40, 140)),
    "orange": ((255, 165, 0), (255, 140, 0), (245, 134, 24), (230, 126, 34), (255, 120, 0)),
    "white": ((255, 255, 255), (252, 252, 252), (240, 240, 240)),
    "black": ((0, 0, 0), (14, 14, 14), (32, 32, 32)),
}
FONT_PACKAGES = {  # package -> where in it fonts lie
    "matplotlib": "mpl-data/fonts/ttf", "font_caladea": "files", "font_fredoka_one": "files", "font_hanken_grotesk": "files",
    "font_manrope": "files", "font_roboto": "files", "font_source_sans_pro": "files", "font_source_serif_pro": "files",
}  # fmt: skip
# Of these files the letters are not A-Z 0-9, or thinner than a few pixels can show.
OTHER_FONTS = (
    "Display",
    "LastResort",
    "NonUni",
    "STIXSiz",
    "cmex",
    "cmmi",
    "cmsy",
    "Thin",
    "ExtraLight",
    "VariableFont",
)


@functools.cache
def fonts() -> tuple[str | None, ...]:
    """Pillow's own font (None), and the files of the font packages that are installed."""
    found = []
    for package, folder in FONT_PACKAGES.items():
        spec = importlib.util.find_spec(package)
        if spec is not None:
            files = sorted(Path(spec.submodule_search_locations[0], folder).glob("*.[to]tf"))
            stems = {file.stem: file for file in files}  # one of .otf and .ttf
            found += [str(file) for stem, file in stems.items() if not any(part in stem for part in OTHER_FONTS)]
    return (None, *found)


def contrast(first, second) -> float:
    """How far apart two colours look, about 0 to 765 ("redmean", a low-cost approximation; CompuPhase, Colour metric)."""
    red = (first[0] + second[0]) / 2
    r, g, b = (x - y for x, y in zip(first, second, strict=True))
    return math.sqrt((2 + red / 256) * r * r + 4 * g * g + (2 + (255 - red) / 256) * b * b)


def random_tint(lot: random.Random, colour: str) -> tuple[int, int, int]:
    first, second = lot.choice(TINTS[colour]), lot.choice(TINTS[colour])
    share = lot.random()
    return tuple(
        min(max(round(a + share * (b - a) + lot.uniform(-6, 6)), 0), 255) for a, b in zip(first, second, strict=True)
    )


def random_ground(lot: random.Random) -> tuple[int, int, int]:
    """One light, mid or dark colour."""
    low, high = lot.choice(((0.75, 1.0), (0.4, 0.75), (0.05, 0.35)))
    value, saturation = lot.uniform(low, high), lot.choice((0.0, lot.uniform(0.0, 0.3), lot.uniform(0.0, 0.6)))
    return tuple(round(255 * level) for level in colorsys.hsv_to_rgb(lot.random(), saturation, value))


def random_canvas(lot: random.Random) -> tuple[int, int]:
    """Width and height."""
    while True:
        width, height = lot.randint(96, 320), lot.randint(96, 320)
        if max(width, height) <= 2 * min(width, height):
            return width, height


def random_stage(lot: random.Random, canvas: tuple[int, int] | None = None) -> dict:
    """Canvas and background."""
    width, height = canvas if canvas is not None else random_canvas(lot)
    first = second = random_ground(lot)
    direction = (0.0, 1.0)
    if lot.random() < 0.4:
        while second == first or contrast(first, second) > 300:
            second = random_ground(lot)
        direction = lot.choice(((0.0, 1.0), (1.0, 0.0), (1.0, 1.0)))
    return {
        "width": width, "height": height, "background": (first, second), "direction": direction, "grain": lot.getrandbits(32),
        "noise": lot.randint(1, 12) if lot.random() < 0.4 else 0, "antialias": lot.random() < 0.75,
    }  # fmt: skip


def random_look(lot: random.Random, shape: str) -> dict:
    """Size, rotation and proportions of a shape."""
    low, high = SMALL if lot.random() < 0.5 else LARGE
    fill = {"square": (1.0, 1.41), "triangle": (1.0, 1.2), "cross": (1.0, 1.05)}.get(shape, (1.0, 1.0))
    detail = {"star": (0.36, 0.52), "ring": (0.45, 0.75), "cross": (0.18, 0.4)}.get(shape)
    look = {
        "radius": lot.uniform(low, high), "angle": lot.uniform(-15, 15) if lot.random() < 0.7 else 0.0,
        "fill": lot.uniform(*fill), "detail": None if detail is None else lot.uniform(*detail),
    }  # fmt: skip
    if shape == "triangle" and lot.random() < 0.25:  # as high as wide
        look |= {"fill": 1.41, "detail": 0.7}
    return look


def random_colour(lot: random.Random, background, taken=()) -> tuple[str, tuple[int, int, int]]:
    """A colour and its tint, off the background and none of `taken`."""
    while True:
        colour = lot.choice(tuple(COLOURS))
        tint = random_tint(lot, colour)
        if colour not in taken and min(contrast(tint, ground) for ground in background) > 110:
            return colour, tint


def sign_box(sign: Sign, stage: dict) -> tuple[float, float]:
    """Width and height of the sign, in pixels, about: letters are measured at one size, and drawn at another."""
    left, top, right, bottom = text_box(sign.font, sign.text)
    scale = sign.height * stage["height"] / (bottom - top)
    return (right - left) * scale + 1, (bottom - top) * scale + 1


def random_sign(lot: random.Random, stage: dict) -> Sign:
    first, second = stage["background"]
    for _ in range(100):
        length = lot.randint(1, 5)
        text = "".join(lot.choice(SIGN_CHARACTERS) for _ in range(length))
        sign = Sign(text, 0.5, 0.5, lot.uniform(0.12, 0.30), "black", lot.choice(fonts()))
        if lot.random() < 0.3:  # some hands mean the size of the font, of which capitals are about 0.72
            sign = replace(sign, height=0.72 * sign.height)
        width, height = sign_box(sign, stage)
        right, down = 1 - (width + 6) / stage["width"], 1 - (height + 6) / stage["height"]
        if right > 0:
            x, y = 0.5 + right * lot.uniform(-0.5, 0.5), 0.5 + down * lot.uniform(-0.5, 0.5)
            run, fall = stage["direction"]
            share = (run * x + fall * y) / (run + fall)
            ground = [a + share * (b - a) for a, b in zip(first, second, strict=True)]
            colour = max(("black", "white"), key=lambda name: contrast(COLOURS[name], ground))
            return replace(sign, x=x, y=y, colour=colour)
    raise AssertionError("a sign of one small letter always fits")


def clear_of(thing: Thing, other: Thing, stage: dict) -> bool:
    shorter = min(stage["width"], stage["height"])
    apart = math.hypot((thing.x - other.x) * stage["width"], (thing.y - other.y) * stage["height"])
    return apart > (thing.radius * thing.fill + other.radius * other.fill + 0.02) * shorter


def clear_of_sign(thing: Thing, sign: Sign, box, stage: dict) -> bool:
    across = max(abs(thing.x - sign.x) * stage["width"] - box[0] / 2, 0)
    down = max(abs(thing.y - sign.y) * stage["height"] - box[1] / 2, 0)
    return math.hypot(across, down) > (thing.radius * thing.fill + 0.02) * min(stage["width"], stage["height"])


def random_place(lot: random.Random, thing: Thing, stage: dict) -> Thing:
    """The thing somewhere on the canvas, wholly on it."""
    reach = thing.radius * thing.fill * min(stage["width"], stage["height"]) + 1
    x, y = reach / stage["width"], reach / stage["height"]
    return replace(thing, x=lot.uniform(x, max(1 - x, x)), y=lot.uniform(y, max(1 - y, y)))


def on_canvas(thing: Thing, stage: dict) -> bool:
    reach = thing.radius * thing.fill * min(stage["width"], stage["height"])
    return all(
        reach <= at * stage[side] <= stage[side] - reach for at, side in ((thing.x, "width"), (thing.y, "height"))
    )


def random_thing(lot: random.Random, stage: dict, taken) -> Thing:
    """A thing of a shape and colour not in `taken`, without a place yet."""
    while True:
        shape = lot.choice(SHAPES)
        colour, tint = random_colour(lot, stage["background"])
        if (shape, colour) not in taken:
            return Thing(shape, colour, 0.5, 0.5, tints=((colour, tint),), **random_look(lot, shape))


def random_things(lot: random.Random, stage: dict, count: int, sign: Sign | None) -> list[Thing] | None:
    """`count` things clear of each other and of the sign; None where they found no room."""
    things: list[Thing] = []
    box = sign_box(sign, stage) if sign is not None else None
    for _ in range(count):
        thing = random_thing(lot, stage, {(other.shape, other.colour) for other in things})
        for _ in range(30):
            thing = random_place(lot, thing, stage)
            if all(clear_of(thing, other, stage) for other in things) and (
                sign is None or clear_of_sign(thing, sign, box, stage)
            ):
                things.append(thing)
                break
        else:
            return None
    return things


def random_picture(
    lot: random.Random, count: int | None = None, sign_share: float = 1 / 3, canvas: tuple[int, int] | None = None
) -> Scene:
    """A picture of `count` things (default: 1 to 4, each as likely), with a sign in `sign_share` of them; `canvas` is its size."""
    count = count if count is not None else lot.randint(1, 4)
    signed = lot.random() < sign_share
    while True:
        stage = random_stage(lot, canvas)
        for _ in range(8):
            sign = random_sign(lot, stage) if signed else None
            things = random_things(lot, stage, count, sign)
            if things is not None:
                return Scene(things=tuple(things), sign=sign, **stage)


def random_crowd(lot: random.Random, canvas: tuple[int, int] | None = None) -> Scene:
    """As many things and signs as find room, up to six things and four signs: no picture of the world, but one to learn from."""
    stage, signs, things = random_stage(lot, canvas), [], []
    for _ in range(8):
        sign = random_sign(lot, stage)
        width, height = sign_box(sign, stage)
        across, down = ([abs(getattr(sign, axis) - getattr(other, axis)) * stage[side] for other, _ in signs]
                        for axis, side in (("x", "width"), ("y", "height")))  # fmt: skip
        clear = [
            x > (width + wide) / 2 + 3 or y > (height + high) / 2 + 3
            for x, y, (_, (wide, high)) in zip(across, down, signs, strict=True)
        ]
        if all(clear) and len(signs) < 4:
            signs.append((sign, (width, height)))
    for _ in range(24):
        thing = random_place(lot, random_thing(lot, stage, {(other.shape, other.colour) for other in things}), stage)
        clear = [clear_of(thing, other, stage) for other in things]
        clear += [clear_of_sign(thing, sign, box, stage) for sign, box in signs]
        if all(clear) and len(things) < 6:
            things.append(thing)
    return Scene(things=tuple(things), more_signs=tuple(sign for sign, _ in signs), **stage)


def random_clip(
    lot: random.Random, seconds: tuple[float, float] = (2.0, 20.0), canvas: tuple[int, int] | None = None
) -> Scene:
    """A clip of 1 to 3 things; each may appear, disappear, change colour or move once, events at least a second apart."""
    while True:
        clip = try_clip(lot, seconds, canvas)
        if clip is not None:
            return clip


def halts(thing: Thing) -> list[Thing]:
    """The thing at nine points of its way; itself where it does not move."""
    if thing.moves is None:
        return [thing]
    _, right, down = thing.moves
    return [replace(thing, x=thing.x + share / 8 * right, y=thing.y + share / 8 * down) for share in range(9)]


def random_move(
    lot: random.Random, thing: Thing, time: float, duration: float, others: list[Thing], stage: dict
) -> Thing | None:
    """The thing at another place, from which it moves at `time`, on a way clear of the others'; None where none was found."""
    seconds = [seconds for seconds in (0.5, 1.0, 1.0, 1.5, 2.0) if time + seconds <= duration]
    if not seconds:
        return None
    taken = [halt for other in others for halt in halts(other)]
    for _ in range(40):
        right, down = (lot.uniform(0.34, 0.6) * step for step in WAYS[lot.choice(tuple(WAYS))])
        placed = random_place(lot, thing, stage)
        moving = replace(placed, moves=(time, right, down), move_seconds=lot.choice(seconds))
        way = halts(moving)
        if on_canvas(way[-1], stage) and all(clear_of(halt, other, stage) for halt in way for other in taken):
            return moving
    return None


def try_clip(lot: random.Random, seconds, canvas) -> Scene | None:
    stage = random_stage(lot, canvas)
    for side in ("width", "height"):
        stage[side] -= stage[side] % 2  # as h264 wants it
    fps = lot.choice((8, 10, 12, 15, 20, 24, 25, 30, lot.randint(8, 30)))
    length = round(lot.uniform(*seconds) * fps) if lot.random() < 0.5 else round(lot.uniform(*seconds)) * fps
    duration = length / fps
    things = random_things(lot, stage, lot.randint(1, 3), None)
    if things is None:
        return None
    events = [lot.choices(("appears", "disappears", "changes", "moves", None), (2, 2, 2, 2, 1.5))[0] for _ in things]
    wanted = sum(event is not None for event in events)
    if duration < wanted + 1:
        return None
    times = sorted(lot.uniform(0.5, duration - 0.3) for _ in range(wanted))
    if lot.random() < 0.3:
        times = [float(round(time)) for time in times]
    if any(later - sooner < 1.0 for sooner, later in pairwise(times)):
        return None
    if any(not 0.3 < time < duration - 0.25 for time in times):
        return None
    lot.shuffle(times)
    kinds = {(thing.shape, thing.colour) for thing in things}
    for index, (thing, event) in enumerate(zip(things, events, strict=True)):
        if event is None:
            continue
        time = times.pop()
        if event in ("appears", "disappears"):
            thing = replace(thing, **{event: time})
        elif event == "changes":
            taken = {colour for shape, colour in kinds if shape == thing.shape}
            colour, tint = random_colour(lot, stage["background"], taken)
            kinds.add((thing.shape, colour))
            thing = replace(thing, changes=(time, colour), tints=(*thing.tints, (colour, tint)))
        else:
            thing = random_move(
                lot, thing, time, duration, [other for at, other in enumerate(things) if at != index], stage
            )
            if thing is None:
                return None
        things[index] = thing
    if all(thing.appears > 0 for thing in things) and lot.random() < 0.7:
        return None  # a stage that is empty at first is rare
    return Scene(things=tuple(things), seconds=duration, fps=fps, **stage)
