"""The sample files in data/ are small, drawn by make_samples.py, and show its scenes and their events."""

import math
from functools import lru_cache
from itertools import combinations, pairwise

import av
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from moss_vl.training.nano import make_samples
from moss_vl.training.nano.world import COLOURS, MOVE_SECONDS, SHAPES, draw_scene, frame_times, sign_mask, thing_mask


FOLDER = ROOT / "data"

PICTURES = [name for name in make_samples.SCENES if name.endswith(".jpg")]
CLIPS = [name for name in make_samples.SCENES if name.endswith(".mp4")]


@lru_cache
def decode(path):
    """Frames [n, h, w, 3] and their times in seconds."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), [frame.time for frame in frames]


def pixel_at(frame, thing):
    """The frame's colour at the centre of the thing, or in the middle of the band of a ring."""
    height, width = frame.shape[:2]
    away = 0.79 * thing.radius * min(height, width) if thing.shape == "ring" else 0.0
    return frame[round(thing.y * height), round(thing.x * width + away)].astype(int)


def shows(frame, thing):
    return np.abs(pixel_at(frame, thing) - COLOURS[thing.colour]).max() < 40


def on_canvas(mask, begin, scene):
    """The mask as bool [h, w] of the whole canvas."""
    canvas = Image.new("L", (scene.width, scene.height))
    canvas.paste(mask, begin)
    return np.asarray(canvas) > 0


def events(thing):
    """(time, thing before, thing after) of every event after the start; None if it is absent."""
    times = [(thing.appears, 0.0), (thing.disappears, 0.0)]
    times += [(thing.changes[0], 0.0)] if thing.changes is not None else []
    times += [(thing.moves[0], MOVE_SECONDS)] if thing.moves is not None else []
    return [(time, thing.at(time - 0.01), thing.at(time + lasts)) for time, lasts in times if 0 < time < math.inf]


@pytest.mark.parametrize("name", make_samples.SCENES)
def test_files_are_small_and_have_the_size_of_their_scenes(name):
    scene = make_samples.SCENES[name]
    assert (FOLDER / name).stat().st_size < 300_000
    frame = np.asarray(Image.open(FOLDER / name)) if name in PICTURES else decode(FOLDER / name)[0][0]
    assert frame.shape == (scene.height, scene.width, 3)


@pytest.mark.parametrize("name", PICTURES)
def test_committed_pictures_are_those_of_the_script(name, tmp_path):
    make_samples.write_picture(make_samples.SCENES[name], tmp_path / name)
    drawn, kept = (np.asarray(Image.open(folder / name)).astype(int) for folder in (tmp_path, FOLDER))
    assert np.abs(drawn - kept).mean() < 1  # JPEG and font libraries round differently


@pytest.mark.parametrize("name", CLIPS)
def test_committed_clips_are_those_of_the_script(name):
    scene = make_samples.SCENES[name]
    frames, times = decode(FOLDER / name)
    expected = frame_times(scene)
    assert times == pytest.approx(expected, abs=1e-3)
    assert len(frames) == scene.seconds * scene.fps
    for index in range(0, len(frames), scene.fps // 2):
        drawn = np.asarray(draw_scene(scene, expected[index])).astype(int)
        assert np.abs(frames[index] - drawn).mean() < 4, f"{name} at {expected[index]} s is not the scene"


@pytest.mark.parametrize("name", CLIPS)
def test_events_happen_at_the_times_of_the_scene(name):
    scene = make_samples.SCENES[name]
    frames, times = decode(FOLDER / name)
    happened = 0
    for thing in scene.things:
        for time, before, after in events(thing):
            earlier = max(index for index, at in enumerate(times) if at < time - 1e-6)
            later = min(index for index, at in enumerate(times) if at >= time + MOVE_SECONDS)
            if before is not None:
                assert shows(frames[earlier], before)
                assert not shows(frames[later], before)
            if after is not None:
                assert not shows(frames[earlier], after)
                assert shows(frames[later], after)
            happened += 1
    assert happened >= 2


@pytest.mark.parametrize("name", make_samples.SCENES)
def test_scenes_belong_to_the_drawn_world(name):
    scene = make_samples.SCENES[name]
    assert 96 <= min(scene.width, scene.height) and max(scene.width, scene.height) <= 320
    assert max(scene.width, scene.height) <= 2 * min(scene.width, scene.height)
    assert scene.noise <= 12
    assert len({(thing.shape, thing.colour) for thing in scene.things}) == len(scene.things)
    assert 1 <= len(scene.things) <= (4 if name in PICTURES else 3)
    for thing in scene.things:
        assert thing.shape in SHAPES and thing.colour in COLOURS and abs(thing.angle) <= 15
        low, high = {"small": (0.09, 0.14), "large": (0.18, 0.26)}[thing.size]
        assert low <= thing.radius <= high
    if scene.sign is not None:
        assert 1 <= len(scene.sign.text) <= 5 and scene.sign.text.isascii() and scene.sign.text.isalnum()
        assert scene.sign.text == scene.sign.text.upper() and 0.12 <= scene.sign.height <= 0.30
        assert scene.sign.colour in ("black", "white")
    starts = sorted(time for thing in scene.things for time, _, _ in events(thing))
    assert all(later - earlier >= 1 for earlier, later in pairwise(starts))
    for time in frame_times(scene) or [0.0]:
        masks = [thing_mask(thing, scene, 1) for thing in scene.at(time)]
        masks += [sign_mask(scene.sign, scene, 1)] if scene.sign is not None else []
        filled = [on_canvas(*mask, scene) for mask in masks]
        assert all(not (a & b).any() for a, b in combinations(filled, 2)), f"things overlap at {time} s"
        assert all(not np.concatenate([m[0], m[-1], m[:, 0], m[:, -1]]).any() for m in filled), f"cut off at {time} s"
