"""The drawn world that moss-vl-nano is trained on: scenes, their rendering, and random scenes.

A scene is a picture of plain shapes, some with a sign, or a clip in which shapes appear, disappear, change colour or
move. questions.py has the questions about scenes. Units: positions are fractions of the canvas (x to the right, y
down), radii are fractions of its shorter side, times are seconds, colours are RGB values from 0 to 255. Rendering is
deterministic: the same scene gives the same pixels.
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
    "red": (214, 38, 38),
    "green": (34, 150, 62),
    "blue": (36, 84, 214),
    "yellow": (250, 214, 36),
    "purple": (134, 52, 170),
    "orange": (245, 134, 24),
    "white": (252, 252, 252),
    "black": (14, 14, 14),
}
SIGN_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
SMALL, LARGE = (0.09, 0.14), (0.18, 0.26)  # radii
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOVE_SECONDS = 1.0
ALIGNED = 0.12  # share of things that stand exactly above or below another one
SUPERSAMPLING = 4


@dataclass(frozen=True)
class Thing:
    """A shape in a scene, with what happens to it in a clip."""

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
    fill: float = (
        1.0  # distance of the corners from the centre, in radii; at most 1.41: a square with sides 2 * radius
    )
    # In radii: the inner radius of a star or ring, half the width of a cross's arms, or the height above the centre of
    # a triangle whose base is sqrt(2) wide and sqrt(1/2) below it. None: the default, an equilateral triangle.
    detail: float | None = None
    tints: tuple[tuple[str, tuple[int, int, int]], ...] = ()  # (colour name, RGB) of colours other than the default

    @property
    def size(self) -> str:
        return "small" if self.radius < 0.16 else "large"

    @property
    def rgb(self) -> tuple[int, int, int]:
        return dict(self.tints).get(self.colour, COLOURS[self.colour])

    def at(self, time: float) -> "Thing | None":
        """The thing with its colour and position at `time`, or None if it is absent then."""
        if not self.appears <= time < self.disappears:
            return None
        changed = {}
        if self.changes is not None and time >= self.changes[0]:
            changed["colour"] = self.changes[1]
        if self.moves is not None:
            start, right, down = self.moves
            progress = min(max((time - start) / self.move_seconds, 0.0), 1.0)
            changed |= {"x": self.x + progress * right, "y": self.y + progress * down}
        return self.with_values(**changed) if changed else self

    def with_values(self, **values) -> "Thing":
        """What `dataclasses.replace` returns, in a fifth of its time."""
        new = object.__new__(Thing)
        new.__dict__.update(self.__dict__, **values)
        return new

    def later(self, seconds: float) -> "Thing":
        """The thing with its events delayed by `seconds`; a thing present from the start stays so."""
        return replace(
            self,
            appears=self.appears and self.appears + seconds,
            disappears=self.disappears + seconds,
            changes=self.changes and (self.changes[0] + seconds, *self.changes[1:]),
            moves=self.moves and (self.moves[0] + seconds, *self.moves[1:]),
        )


@dataclass(frozen=True)
class Sign:
    """One to five characters of A-Z 0-9. The centre and `height` of the letters are fractions of the canvas."""

    text: str
    x: float
    y: float
    height: float  # 0.12 to 0.30
    colour: str  # black or white, whichever has more contrast
    font: str | None = None  # a file; None is Pillow's default font


@dataclass(frozen=True)
class Scene:
    """A picture or a clip. `background` is a gradient between two colours along `direction` (right, down)."""

    width: int
    height: int
    background: tuple[tuple[int, int, int], tuple[int, int, int]]
    things: tuple[Thing, ...]
    sign: Sign | None = None
    noise: int = 0  # largest deviation of a pixel value, at most 12
    antialias: bool = True
    seconds: float = 0.0  # clips only
    fps: int = 0
    direction: tuple[float, float] = (0.0, 1.0)
    grain: int = 0  # seed of the noise
    more_signs: tuple[Sign, ...] = ()  # only in the crowds of `random_crowd`

    @property
    def signs(self) -> tuple[Sign, ...]:
        return self.more_signs if self.sign is None else (self.sign, *self.more_signs)

    def at(self, time: float) -> list[Thing]:
        """The things present at `time`, in reading order."""
        return sorted((thing for _, thing in self.numbered_at(time)), key=reading_order)

    def numbered_at(self, time: float) -> list[tuple[int, Thing]]:
        """The things present at `time`, each with its index in `things`."""
        now = ((number, thing.at(time)) for number, thing in enumerate(self.things))
        return [(number, thing) for number, thing in now if thing is not None]

    def later(self, seconds: float) -> "Scene":
        """The clip as the end of a longer one, in which it begins at `seconds`."""
        return replace(
            self, seconds=self.seconds + seconds, things=tuple(thing.later(seconds) for thing in self.things)
        )


def reading_order(thing: Thing) -> tuple[float, float]:
    """A sort key: from left to right, and from top to bottom if one thing is exactly above another."""
    return round(thing.x, 3), thing.y


# rendering


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
    elif thing.shape == "heart":  # not part of the drawn world; teach_shape.py teaches it
        angles = [2 * math.pi * i / 60 for i in range(60)]
        across = [16 * math.sin(t) ** 3 / 18 for t in angles]
        down = [
            (3 - 13 * math.cos(t) + 5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t)) / -18 for t in angles
        ]
        polar = [(math.degrees(math.atan2(-y, x)), math.hypot(x, y)) for x, y in zip(across, down, strict=True)]
    else:
        raise ValueError(f"no shape named {thing.shape!r}; the shapes are {', '.join(SHAPES)}")
    rotated = [(math.radians(degrees + thing.angle), length * radius) for degrees, length in polar]
    return [(centre[0] + length * math.cos(angle), centre[1] + length * math.sin(angle)) for angle, length in rotated]


def thing_mask(thing: Thing, scene: Scene, scale: int) -> tuple[Image.Image, tuple[int, int]]:
    """A grey mask of the thing at `scale` times the size, and the canvas pixel of the mask's top left corner."""
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
    """The font at the size that makes the letters `sign.height` high, and the text's (left, top, right, bottom)."""
    left, top, right, bottom = text_box(sign.font, sign.text)
    font = load_font(sign.font, round(100 * sign.height * canvas_height / (bottom - top), 1))
    return font, font.getbbox(sign.text)


def sign_mask(sign: Sign, scene: Scene, scale: int) -> tuple[Image.Image, tuple[int, int]]:
    """A grey mask of the letters, as `thing_mask` of a thing."""
    font, (left, top, right, bottom) = sign_font(sign, scene.height * scale)
    corner = (sign.x * scene.width * scale - (left + right) / 2, sign.y * scene.height * scale - (top + bottom) / 2)
    begin = tuple(max(math.floor((zero + low) / scale) - 1, 0) for zero, low in zip(corner, (left, top), strict=True))
    sides = (scene.width, scene.height)
    end = tuple(
        min(math.ceil((zero + high) / scale) + 2, side)
        for zero, high, side in zip(corner, (right, bottom), sides, strict=True)
    )
    mask = Image.new("L", tuple(max(stop - start, 1) * scale for start, stop in zip(begin, end, strict=True)))
    ImageDraw.Draw(mask).text(
        (corner[0] - begin[0] * scale, corner[1] - begin[1] * scale), sign.text, font=font, fill=255
    )
    return mask, begin


def draw_background(scene: Scene) -> Image.Image:
    if scene.background[0] == scene.background[1] and not scene.noise:
        return Image.new("RGB", (scene.width, scene.height), scene.background[0])
    first, second = (np.array(colour, dtype=np.float32) for colour in scene.background)
    right, down = scene.direction
    along = right * np.linspace(0.0, 1.0, scene.width)[None, :] + down * np.linspace(0.0, 1.0, scene.height)[:, None]
    pixels = first + along[..., None].astype(np.float32) / (abs(right) + abs(down)) * (second - first)
    if scene.noise:
        rng = np.random.Generator(np.random.SFC64(scene.grain))
        pixels = pixels + rng.integers(-scene.noise, scene.noise + 1, pixels.shape, dtype=np.int8)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def layers(scene: Scene, time: float):
    """Yields (colour, grey mask, the mask's box on the canvas) of all things at `time`, then of the signs."""
    scale = SUPERSAMPLING if scene.antialias else 1
    found = [(thing.rgb, *thing_mask(thing, scene, scale)) for thing in scene.at(time)]
    found += [(COLOURS[sign.colour], *sign_mask(sign, scene, scale)) for sign in scene.signs]
    for colour, mask, (left, top) in found:
        mask = mask.reduce(scale) if scale > 1 else mask
        yield colour, mask, (left, top, left + mask.width, top + mask.height)


def draw_scene(scene: Scene, time: float = 0.0, background: Image.Image | None = None) -> Image.Image:
    """The scene at `time` seconds as an RGB picture. `background` is its `draw_background`, if already drawn."""
    picture = (background if background is not None else draw_background(scene)).copy()
    for colour, mask, box in layers(scene, time):
        picture.paste(colour, box, mask=mask)
    return picture


def draw_with_ink(scene: Scene) -> tuple[Image.Image, Image.Image]:
    """`draw_scene` and `draw_ink` of a picture, with its masks drawn once."""
    picture, ink = draw_background(scene), Image.new("L", (scene.width, scene.height))
    for colour, mask, box in layers(scene, 0.0):
        picture.paste(colour, box, mask=mask)
        ink.paste(255, box, mask=mask)
    return picture, ink


def draw_ink(scene: Scene, time: float = 0.0) -> Image.Image:
    """A mask of things and letters, white on black."""
    picture = Image.new("L", (scene.width, scene.height))
    for _, mask, box in layers(scene, time):
        picture.paste(255, box, mask=mask)
    return picture


def frame_times(scene: Scene) -> list[float]:
    """The presentation time of every frame of a clip."""
    return [index / scene.fps for index in range(round(scene.seconds * scene.fps))]


def write_clip(scene: Scene, path) -> None:
    """Writes h264 in mp4, with one thread and no version strings, so that the bytes are nearly always the same.

    Only frames that differ from the previous frame are drawn and converted to yuv420p.
    """
    import av

    background, drawn, tick = draw_background(scene), None, Fraction(1, scene.fps)
    with av.open(str(path), "w", options={"fflags": "+bitexact", "movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=scene.fps)
        stream.width, stream.height, stream.pix_fmt = scene.width, scene.height, "yuv420p"
        stream.time_base = tick
        stream.options = {"crf": "20", "g": str(2 * scene.fps), "threads": "1"}
        for number, time in enumerate(frame_times(scene)):
            if scene.at(time) != drawn:
                drawn = scene.at(time)
                frame = av.VideoFrame.from_image(draw_scene(scene, time, background)).reformat(format="yuv420p")
            frame.pts, frame.time_base = number, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


# random scenes; tints, proportions and fonts vary, so that pictures drawn by other programs are recognised, too

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
FONT_PACKAGES = {  # package -> its folder of fonts
    "matplotlib": "mpl-data/fonts/ttf",
    "font_caladea": "files",
    "font_fredoka_one": "files",
    "font_hanken_grotesk": "files",
    "font_manrope": "files",
    "font_roboto": "files",
    "font_source_sans_pro": "files",
    "font_source_serif_pro": "files",
}
# Parts of names of font files without A-Z 0-9, or with strokes too thin for a few pixels.
UNUSABLE_FONTS = (
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
    """Pillow's default font (None), and the font files of the installed font packages."""
    found = []
    for package, folder in FONT_PACKAGES.items():
        spec = importlib.util.find_spec(package)
        if spec is not None:
            files = sorted(Path(spec.submodule_search_locations[0], folder).glob("*.[to]tf"))
            stems = {file.stem: file for file in files}  # one file if there are .otf and .ttf
            found += [str(file) for stem, file in stems.items() if not any(part in stem for part in UNUSABLE_FONTS)]
    return (None, *found)


def contrast(first, second) -> float:
    """Perceived distance of two colours, about 0 to 765 ("redmean"; CompuPhase, Colour metric)."""
    red = (first[0] + second[0]) / 2
    r, g, b = (x - y for x, y in zip(first, second, strict=True))
    return math.sqrt((2 + red / 256) * r * r + 4 * g * g + (2 + (255 - red) / 256) * b * b)


def random_tint(rng: random.Random, colour: str) -> tuple[int, int, int]:
    first, second = rng.choice(TINTS[colour]), rng.choice(TINTS[colour])
    share = rng.random()
    return tuple(
        min(max(round(a + share * (b - a) + rng.uniform(-6, 6)), 0), 255) for a, b in zip(first, second, strict=True)
    )


def random_background(rng: random.Random) -> tuple[int, int, int]:
    """A light, medium or dark colour."""
    low, high = rng.choice(((0.75, 1.0), (0.4, 0.75), (0.05, 0.35)))
    value, saturation = rng.uniform(low, high), rng.choice((0.0, rng.uniform(0.0, 0.3), rng.uniform(0.0, 0.6)))
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(rng.random(), saturation, value))


def random_canvas(rng: random.Random) -> tuple[int, int]:
    """Width and height."""
    while True:
        width, height = rng.randint(96, 320), rng.randint(96, 320)
        if max(width, height) <= 2 * min(width, height):
            return width, height


def random_stage(rng: random.Random, canvas: tuple[int, int] | None = None) -> dict:
    """Canvas and background, as arguments of `Scene`."""
    width, height = canvas if canvas is not None else random_canvas(rng)
    first = second = random_background(rng)
    direction = (0.0, 1.0)
    if rng.random() < 0.4:
        while second == first or contrast(first, second) > 300:
            second = random_background(rng)
        direction = rng.choice(((0.0, 1.0), (1.0, 0.0), (1.0, 1.0)))
    return {
        "width": width,
        "height": height,
        "background": (first, second),
        "direction": direction,
        "grain": rng.getrandbits(32),
        "noise": rng.randint(1, 12) if rng.random() < 0.4 else 0,
        "antialias": rng.random() < 0.75,
    }


def random_form(rng: random.Random, shape: str) -> dict:
    """Size, rotation and proportions of a shape, as arguments of `Thing`."""
    low, high = SMALL if rng.random() < 0.5 else LARGE
    fill = {"square": (1.0, 1.41), "triangle": (1.0, 1.2), "cross": (1.0, 1.05)}.get(shape, (1.0, 1.0))
    detail = {"star": (0.36, 0.52), "ring": (0.45, 0.75), "cross": (0.18, 0.4)}.get(shape)
    form = {
        "radius": rng.uniform(low, high),
        "angle": rng.uniform(-15, 15) if rng.random() < 0.7 else 0.0,
        "fill": rng.uniform(*fill),
        "detail": None if detail is None else rng.uniform(*detail),
    }
    if shape == "triangle" and rng.random() < 0.25:  # as wide as high
        form |= {"fill": 1.41, "detail": 0.7}
    return form


def random_colour(rng: random.Random, background, taken=()) -> tuple[str, tuple[int, int, int]]:
    """A colour not in `taken` and its tint, which contrasts with the background."""
    while True:
        colour = rng.choice(tuple(COLOURS))
        tint = random_tint(rng, colour)
        if colour not in taken and min(contrast(tint, other) for other in background) > 110:
            return colour, tint


def sign_box(sign: Sign, stage: dict) -> tuple[float, float]:
    """Approximate width and height of the sign in pixels: letters are measured at one size and drawn at another."""
    left, top, right, bottom = text_box(sign.font, sign.text)
    scale = sign.height * stage["height"] / (bottom - top)
    return (right - left) * scale + 1, (bottom - top) * scale + 1


def random_sign(rng: random.Random, stage: dict) -> Sign:
    first, second = stage["background"]
    for _ in range(100):
        length = rng.randint(1, 5)
        text = "".join(rng.choice(SIGN_CHARACTERS) for _ in range(length))
        sign = Sign(text, 0.5, 0.5, rng.uniform(0.12, 0.30), "black", rng.choice(fonts()))
        if rng.random() < 0.3:  # as if `height` were the font size, of which capitals are about 0.72
            sign = replace(sign, height=0.72 * sign.height)
        width, height = sign_box(sign, stage)
        right, down = 1 - (width + 6) / stage["width"], 1 - (height + 6) / stage["height"]
        if right > 0:
            x, y = 0.5 + right * rng.uniform(-0.5, 0.5), 0.5 + down * rng.uniform(-0.5, 0.5)
            to_right, to_bottom = stage["direction"]
            share = (to_right * x + to_bottom * y) / (to_right + to_bottom)
            background = [a + share * (b - a) for a, b in zip(first, second, strict=True)]
            colour = max(("black", "white"), key=lambda name: contrast(COLOURS[name], background))
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


def at_random_position(rng: random.Random, thing: Thing, stage: dict) -> Thing:
    """The thing at a random position, completely on the canvas."""
    reach = thing.radius * thing.fill * min(stage["width"], stage["height"]) + 1
    x, y = reach / stage["width"], reach / stage["height"]
    return thing.with_values(x=rng.uniform(x, max(1 - x, x)), y=rng.uniform(y, max(1 - y, y)))


def at_some_position(rng: random.Random, thing: Thing, others: list[Thing], stage: dict) -> Thing:
    """The thing at a random position, completely on the canvas; sometimes exactly above or below one of the others."""
    placed = at_random_position(rng, thing, stage)
    if others and rng.random() < ALIGNED:
        aligned = placed.with_values(x=rng.choice(others).x)
        return aligned if on_canvas(aligned, stage) else placed
    return placed


def on_canvas(thing: Thing, stage: dict) -> bool:
    reach = thing.radius * thing.fill * min(stage["width"], stage["height"])
    return all(
        reach <= centre * stage[side] <= stage[side] - reach
        for centre, side in ((thing.x, "width"), (thing.y, "height"))
    )


def random_thing(rng: random.Random, stage: dict, taken) -> Thing:
    """A thing whose (shape, colour) is not in `taken`, in the middle of the canvas."""
    while True:
        shape = rng.choice(SHAPES)
        colour, tint = random_colour(rng, stage["background"])
        if (shape, colour) not in taken:
            return Thing(shape, colour, 0.5, 0.5, tints=((colour, tint),), **random_form(rng, shape))


def random_things(rng: random.Random, stage: dict, count: int, sign: Sign | None) -> list[Thing] | None:
    """`count` things that overlap neither each other nor the sign; None if no positions were found."""
    things: list[Thing] = []
    box = sign_box(sign, stage) if sign is not None else None
    for _ in range(count):
        thing = random_thing(rng, stage, {(other.shape, other.colour) for other in things})
        for _ in range(30):
            thing = at_some_position(rng, thing, things, stage)
            if all(clear_of(thing, other, stage) for other in things) and (
                sign is None or clear_of_sign(thing, sign, box, stage)
            ):
                things.append(thing)
                break
        else:
            return None
    return things


def random_picture(
    rng: random.Random, count: int | None = None, sign_share: float = 1 / 3, canvas: tuple[int, int] | None = None
) -> Scene:
    """A picture of `count` things (default: 1 to 4) and, with probability `sign_share`, a sign.

    `canvas`: (width, height); by default random.
    """
    count = count if count is not None else rng.randint(1, 4)
    signed = rng.random() < sign_share
    while True:
        stage = random_stage(rng, canvas)
        for _ in range(8):
            sign = random_sign(rng, stage) if signed else None
            things = random_things(rng, stage, count, sign)
            if things is not None:
                return Scene(things=tuple(things), sign=sign, **stage)


def random_crowd(rng: random.Random, canvas: tuple[int, int] | None = None) -> Scene:
    """A crowded picture, only for training: as many things and signs as fit, at most six and four."""
    stage, signs, things = random_stage(rng, canvas), [], []
    for _ in range(8):
        sign = random_sign(rng, stage)
        width, height = sign_box(sign, stage)
        clear = [
            abs(sign.x - other.x) * stage["width"] > (width + other_width) / 2 + 3
            or abs(sign.y - other.y) * stage["height"] > (height + other_height) / 2 + 3
            for other, (other_width, other_height) in signs
        ]
        if all(clear) and len(signs) < 4:
            signs.append((sign, (width, height)))
    for _ in range(24):
        thing = at_random_position(
            rng, random_thing(rng, stage, {(other.shape, other.colour) for other in things}), stage
        )
        clear = [clear_of(thing, other, stage) for other in things]
        clear += [clear_of_sign(thing, sign, box, stage) for sign, box in signs]
        if all(clear) and len(things) < 6:
            things.append(thing)
    return Scene(things=tuple(things), more_signs=tuple(sign for sign, _ in signs), **stage)


def random_clip(
    rng: random.Random, seconds: tuple[float, float] = (2.0, 20.0), canvas: tuple[int, int] | None = None
) -> Scene:
    """A clip of 1 to 3 things. Each appears, disappears, changes colour or moves at most once, a second apart."""
    while True:
        clip = try_clip(rng, seconds, canvas)
        if clip is not None:
            return clip


def path_of(thing: Thing) -> list[Thing]:
    """The thing at nine points of its path; only itself if it does not move."""
    if thing.moves is None:
        return [thing]
    _, right, down = thing.moves
    return [thing.with_values(x=thing.x + share / 8 * right, y=thing.y + share / 8 * down) for share in range(9)]


def random_move(
    rng: random.Random, thing: Thing, time: float, duration: float, others: list[Thing], stage: dict
) -> Thing | None:
    """The thing at another position, from which it moves at `time` on a path clear of the others; None if none is."""
    seconds = [seconds for seconds in (0.5, 1.0, 1.0, 1.5, 2.0) if time + seconds <= duration]
    if not seconds:
        return None
    taken = [point for other in others for point in path_of(other)]
    for _ in range(40):
        right, down = (rng.uniform(0.34, 0.6) * step for step in DIRECTIONS[rng.choice(tuple(DIRECTIONS))])
        moved = at_some_position(rng, thing, others, stage)
        moving = moved.with_values(moves=(time, right, down), move_seconds=rng.choice(seconds))
        path = path_of(moving)
        if on_canvas(path[-1], stage) and all(clear_of(point, other, stage) for point in path for other in taken):
            return moving
    return None


def try_clip(rng: random.Random, seconds, canvas) -> Scene | None:
    """A random clip; None if its things or events do not fit."""
    stage = random_stage(rng, canvas)
    for side in ("width", "height"):
        stage[side] -= stage[side] % 2  # h264 needs even sides
    fps = rng.choice((8, 10, 12, 15, 20, 24, 25, 30, rng.randint(8, 30)))
    frames = round(rng.uniform(*seconds) * fps) if rng.random() < 0.5 else round(rng.uniform(*seconds)) * fps
    duration = frames / fps
    things = random_things(rng, stage, rng.randint(1, 3), None)
    if things is None:
        return None
    events = [rng.choices(("appears", "disappears", "changes", "moves", None), (2, 2, 2, 2, 1.5))[0] for _ in things]
    times = random_times(rng, sum(event is not None for event in events), duration)
    if times is None or not add_events(rng, things, events, times, duration, stage):
        return None
    if all(thing.appears > 0 for thing in things) and rng.random() < 0.7:
        return None  # few clips begin without things
    return Scene(things=tuple(things), seconds=duration, fps=fps, **stage)


def random_times(rng: random.Random, count: int, duration: float) -> list[float] | None:
    """`count` times in random order, at least a second apart; None if they do not fit into `duration`."""
    if duration < count + 1:
        return None
    times = sorted(rng.uniform(0.5, duration - 0.3) for _ in range(count))
    if rng.random() < 0.3:
        times = [float(round(time)) for time in times]
    if any(later - sooner < 1.0 for sooner, later in pairwise(times)):
        return None
    if any(not 0.3 < time < duration - 0.25 for time in times):
        return None
    rng.shuffle(times)
    return times


def add_events(rng: random.Random, things: list[Thing], events, times: list[float], duration: float, stage) -> bool:
    """Replaces each thing of `things` by one with its event (None: no event). False if a move finds no path."""
    kinds = {(thing.shape, thing.colour) for thing in things}
    for index, (thing, event) in enumerate(zip(things, events, strict=True)):
        if event is None:
            continue
        time = times.pop()
        if event in ("appears", "disappears"):
            thing = replace(thing, **{event: time})
        elif event == "changes":
            taken = {colour for shape, colour in kinds if shape == thing.shape}
            colour, tint = random_colour(rng, stage["background"], taken)
            kinds.add((thing.shape, colour))
            thing = replace(thing, changes=(time, colour), tints=(*thing.tints, (colour, tint)))
        else:
            others = [other for number, other in enumerate(things) if number != index]
            thing = random_move(rng, thing, time, duration, others, stage)
            if thing is None:
                return False
        things[index] = thing
    return True
