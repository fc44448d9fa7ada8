"""Draws the sample pictures and clips in data/: python training/nano/make_samples.py [--output FOLDER]

`SCENES` defines what the files show. They belong to the drawn world (world.py).
"""

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moss_vl.training.nano.world import Scene, Sign, Thing, draw_scene, write_clip


PROJECT = Path(__file__).resolve().parents[2]
SCENES = {
    "example_image.jpg": Scene(
        width=320,
        height=240,
        background=((214, 228, 240), (176, 200, 222)),
        noise=4,
        things=(
            Thing("circle", "red", x=0.17, y=0.50, radius=0.20),
            Thing("triangle", "green", x=0.50, y=0.28, radius=0.21, angle=8),
            Thing("star", "blue", x=0.86, y=0.18, radius=0.13, angle=-6),
            Thing("ring", "purple", x=0.86, y=0.55, radius=0.12),
        ),
        sign=Sign("MOSS", x=0.55, y=0.84, height=0.16, colour="black"),
    ),
    "sample_a.jpg": Scene(
        width=224,
        height=288,
        background=((38, 42, 62), (70, 52, 84)),
        noise=10,
        things=(
            Thing("cross", "yellow", x=0.27, y=0.21, radius=0.22, angle=-12),
            Thing("square", "white", x=0.78, y=0.50, radius=0.13, angle=10),
            Thing("triangle", "orange", x=0.30, y=0.62, radius=0.20),
        ),
        sign=Sign("K7Q", x=0.50, y=0.86, height=0.14, colour="white"),
    ),
    "example_video.mp4": Scene(
        width=320,
        height=240,
        background=((236, 232, 220), (216, 208, 188)),
        seconds=10.0,
        fps=24,
        things=(
            Thing("circle", "red", x=0.50, y=0.50, radius=0.20, moves=(6.0, -0.34, 0.0)),
            Thing("star", "blue", x=0.84, y=0.20, radius=0.13, angle=5, appears=3.0),
            Thing("square", "green", x=0.50, y=0.86, radius=0.12, disappears=8.0),
        ),
    ),
    "sample_b.mp4": Scene(
        width=192,
        height=256,
        background=((58, 74, 70), (58, 74, 70)),
        noise=6,
        seconds=6.0,
        fps=15,
        things=(
            Thing("ring", "white", x=0.30, y=0.25, radius=0.21, changes=(2.0, "orange")),
            Thing("cross", "yellow", x=0.74, y=0.82, radius=0.14, angle=-8, moves=(4.0, 0.0, -0.40)),
        ),
    ),
    "watching.mp4": Scene(
        width=256,
        height=224,
        background=((228, 234, 226), (200, 214, 206)),
        seconds=20.0,
        fps=12,
        things=(
            Thing("circle", "blue", x=0.24, y=0.60, radius=0.20, changes=(5.0, "purple")),
            Thing("square", "green", x=0.74, y=0.24, radius=0.13, angle=8, disappears=15.0),
            Thing("star", "red", x=0.72, y=0.72, radius=0.20, appears=9.0),
        ),
    ),
}


def write_picture(scene: Scene, path) -> None:
    draw_scene(scene).save(path, quality=92)


def main():
    parser = argparse.ArgumentParser(description="Draw the sample pictures and clips.")
    parser.add_argument("--output", type=Path, default=PROJECT / "data", help="folder to write into (default: data/)")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    for name, scene in SCENES.items():
        write = write_clip if name.endswith(".mp4") else write_picture
        write(scene, folder / name)
        print(f"{folder / name}: {scene.width}x{scene.height}, {(folder / name).stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
