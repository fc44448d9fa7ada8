"""Draws the sample pictures and clips that lie beside this file: python data/make_samples.py [--output FOLDER]

They are of a small drawn world: one to four shapes on a plain, graded or noisy background, at times with a short sign; in
clips each shape may appear, disappear, change colour or move, once. The scenes at the end of this file are the truth of the
four files: what is where, and what happens when. The same scene gives the same pixels every time.
"""

import argparse
import math
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (214, 38, 38), "green": (34, 150, 62), "blue": (36, 84, 214), "yellow": (250, 214, 36),
    "purple": (134, 52, 170), "orange": (245, 134, 24), "white": (252, 252, 252), "black": (14, 14, 14),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
MOVE_SECONDS = 1.0
SUPERSAMPLING = 4


@dataclass(frozen=True)
class Thing:
    """A shape. Places and ways are fractions of the canvas, times are seconds; every part lies within `radius` of the centre."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float  # of the shorter side: small 0.09 to 0.14, large 0.18 to 0.26
    angle: float = 0.0  # degrees, within 15 of upright
    appears: float = 0.0
    disappears: float = math.inf
    changes: tuple[float, str] | None = None  # (time, new colour)
    moves: tuple[float, float, float] | None = None  # (start, to the right, down); takes MOVE_SECONDS

    @property
    def size(self):
        return "small" if self.radius < 0.16 else "large"

    def at(self, time):
        """The thing as it stands at `time`, or None where it is not to be seen."""
        if not self.appears <= time < self.disappears:
            return None
        now = self
        if self.changes is not None and time >= self.changes[0]:
            now = replace(now, colour=self.changes[1])
        if self.moves is not None:
            start, right, down = self.moves
            done = min(max((time - start) / MOVE_SECONDS, 0.0), 1.0)
            now = replace(now, x=self.x + done * right, y=self.y + done * down)
        return now


@dataclass(frozen=True)
class Sign:
    """One to five characters of A-Z 0-9; `height` of the letters and the centre are fractions of the canvas."""

    text: str
    x: float
    y: float
    height: float  # 0.12 to 0.30
    colour: str  # black or white, whichever stands out


@dataclass(frozen=True)
class Scene:
    """A picture, or the stage of a clip. `background` runs from its first colour (top) to its second (bottom)."""

    width: int
    height: int
    background: tuple[tuple[int, int, int], tuple[int, int, int]]
    things: tuple[Thing, ...]
    sign: Sign | None = None
    noise: int = 0  # levels up or down, at most 12
    antialias: bool = True
    seconds: float = 0.0  # clips only
    fps: int = 0


def outline(thing, centre, radius):
    """Corner points, in pixels, of a shape with straight sides."""
    if thing.shape == "square":
        polar = [(45 + 90 * i, 1.0) for i in range(4)]
    elif thing.shape == "triangle":
        polar = [(-90 + 120 * i, 1.0) for i in range(3)]
    elif thing.shape == "star":
        polar = [(-90 + 36 * i, 1.0 if i % 2 == 0 else 0.4) for i in range(10)]
    elif thing.shape == "cross":
        half = math.degrees(math.atan2(0.3, 1.0))  # half the width of an arm over its length
        inner = math.hypot(0.3, 0.3) / math.hypot(0.3, 1.0)
        polar = [corner for i in range(4) for corner in
                 ((90 * i - half, 1.0), (90 * i + half, 1.0), (90 * i + 45, inner))]
    else:
        raise ValueError(f"no shape named {thing.shape!r}; the shapes are {', '.join(SHAPES)}")
    turned = [(math.radians(degrees + thing.angle), length * radius) for degrees, length in polar]
    return [(centre[0] + length * math.cos(angle), centre[1] + length * math.sin(angle)) for angle, length in turned]


def thing_mask(thing, scene, scale):
    """The thing's pixels as a grey mask of the canvas, `scale` times as large."""
    mask = Image.new("L", (scene.width * scale, scene.height * scale))
    draw = ImageDraw.Draw(mask)
    centre = (thing.x * mask.width, thing.y * mask.height)
    radius = thing.radius * min(mask.size)
    if thing.shape in ("circle", "ring"):
        draw.ellipse(box_around(centre, radius), fill=255)
        if thing.shape == "ring":
            draw.ellipse(box_around(centre, 0.58 * radius), fill=0)
    else:
        draw.polygon(outline(thing, centre, radius), fill=255)
    return mask


def box_around(centre, radius):
    return [centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius]


def sign_mask(sign, scene, scale):
    mask = Image.new("L", (scene.width * scale, scene.height * scale))
    draw = ImageDraw.Draw(mask)
    left, top, right, bottom = draw.textbbox((0, 0), sign.text, font=ImageFont.load_default(100))
    font = ImageFont.load_default(100 * sign.height * mask.height / (bottom - top))
    left, top, right, bottom = draw.textbbox((0, 0), sign.text, font=font)
    corner = (sign.x * mask.width - (left + right) / 2, sign.y * mask.height - (top + bottom) / 2)
    draw.text(corner, sign.text, font=font, fill=255)
    return mask


def draw_background(scene):
    top, bottom = (np.array(colour, dtype=np.float64) for colour in scene.background)
    down = np.linspace(0.0, 1.0, scene.height)[:, None, None]
    levels = np.broadcast_to(top + down * (bottom - top), (scene.height, scene.width, 3))
    grain = np.random.RandomState(0).randint(-scene.noise, scene.noise + 1, levels.shape)
    return Image.fromarray(np.clip(np.rint(levels + grain), 0, 255).astype(np.uint8))


def draw_scene(scene, time=0.0):
    """The scene at `time` seconds, as an RGB picture."""
    picture = draw_background(scene)
    scale = SUPERSAMPLING if scene.antialias else 1
    layers = [(thing.colour, thing_mask(thing, scene, scale))
              for thing in (thing.at(time) for thing in scene.things) if thing is not None]
    if scene.sign is not None:
        layers.append((scene.sign.colour, sign_mask(scene.sign, scene, scale)))
    for colour, mask in layers:
        picture.paste(COLOURS[colour], mask=mask.reduce(scale))
    return picture


def frame_times(scene):
    return [index / scene.fps for index in range(round(scene.seconds * scene.fps))]


def write_picture(scene, path):
    draw_scene(scene).save(path, quality=92)


def write_clip(scene, path):
    """h264 in mp4. One thread and no version strings: the same encoder writes the same bytes."""
    with av.open(str(path), "w", options={"fflags": "+bitexact", "movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=scene.fps)
        stream.width, stream.height, stream.pix_fmt = scene.width, scene.height, "yuv420p"
        stream.time_base = Fraction(1, scene.fps)
        stream.options = {"crf": "20", "g": str(2 * scene.fps), "threads": "1"}
        for time in frame_times(scene):
            container.mux(stream.encode(av.VideoFrame.from_image(draw_scene(scene, time))))
        container.mux(stream.encode(None))


SCENES = {
    "example_image.jpg": Scene(
        width=320, height=240, background=((214, 228, 240), (176, 200, 222)), noise=4,
        things=(
            Thing("circle", "red", x=0.17, y=0.50, radius=0.20),
            Thing("triangle", "green", x=0.50, y=0.28, radius=0.21, angle=8),
            Thing("star", "blue", x=0.86, y=0.18, radius=0.13, angle=-6),
            Thing("ring", "purple", x=0.86, y=0.55, radius=0.12),
        ),
        sign=Sign("MOSS", x=0.55, y=0.84, height=0.16, colour="black"),
    ),
    "sample_a.jpg": Scene(
        width=224, height=288, background=((38, 42, 62), (70, 52, 84)), noise=10,
        things=(
            Thing("cross", "yellow", x=0.27, y=0.21, radius=0.22, angle=-12),
            Thing("square", "white", x=0.78, y=0.50, radius=0.13, angle=10),
            Thing("triangle", "orange", x=0.30, y=0.62, radius=0.20),
        ),
        sign=Sign("K7Q", x=0.50, y=0.86, height=0.14, colour="white"),
    ),
    "example_video.mp4": Scene(
        width=320, height=240, background=((236, 232, 220), (216, 208, 188)), seconds=10.0, fps=24,
        things=(
            Thing("circle", "red", x=0.50, y=0.50, radius=0.20, moves=(6.0, -0.34, 0.0)),
            Thing("star", "blue", x=0.84, y=0.20, radius=0.13, angle=5, appears=3.0),
            Thing("square", "green", x=0.50, y=0.86, radius=0.12, disappears=8.0),
        ),
    ),
    "sample_b.mp4": Scene(
        width=192, height=256, background=((58, 74, 70), (58, 74, 70)), noise=6, seconds=6.0, fps=15,
        things=(
            Thing("ring", "white", x=0.30, y=0.25, radius=0.21, changes=(2.0, "orange")),
            Thing("cross", "yellow", x=0.74, y=0.82, radius=0.14, angle=-8, moves=(4.0, 0.0, -0.40)),
        ),
    ),
}


def main():
    parser = argparse.ArgumentParser(description="Draw the sample pictures and clips.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder to write into (default: this one)")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    for name, scene in SCENES.items():
        write = write_clip if name.endswith(".mp4") else write_picture
        write(scene, folder / name)
        print(f"{folder / name}: {scene.width}x{scene.height}, {(folder / name).stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
