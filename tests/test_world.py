"""Random scenes of the drawn world keep its rules, and pictures and clips show what the scenes define."""

import math
import random
from collections import Counter
from dataclasses import replace
from itertools import combinations, pairwise

import av
import numpy as np
import pytest
from PIL import Image
from random_scenes import CLIPS, MOVING, PICTURES, starts_of

from moss_vl.training.nano.questions import sampled_times
from moss_vl.training.nano.world import (
    COLOURS,
    SHAPES,
    SIGN_CHARACTERS,
    Scene,
    Thing,
    contrast,
    draw_background,
    draw_ink,
    draw_scene,
    fonts,
    frame_times,
    load_font,
    outline,
    random_clip,
    random_crowd,
    random_move,
    random_picture,
    sign_mask,
    thing_mask,
    write_clip,
)
from moss_vl.video_processing_moss_vl import MossVLVideoProcessor


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def on_canvas(mask, begin, scene) -> np.ndarray:
    """The mask as bool [h, w] of the whole canvas."""
    canvas = Image.new("L", (scene.width, scene.height))
    canvas.paste(mask, begin)
    return np.asarray(canvas) > 0


def filled(scene, time=0.0) -> list[np.ndarray]:
    """Where each thing, from left to right, and the sign are drawn, bool [h, w] each."""
    scale = 4 if scene.antialias else 1
    masks = [thing_mask(thing, scene, scale) for thing in scene.at(time)]
    masks += [sign_mask(scene.sign, scene, scale)] if scene.sign is not None else []
    return [on_canvas(mask.reduce(scale), begin, scene) for mask, begin in masks]


def extent(thing, scene) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a thing, in pixels."""
    centre, radius = (
        (thing.x * scene.width, thing.y * scene.height),
        thing.radius * thing.fill * min(scene.width, scene.height),
    )
    if thing.shape in ("circle", "ring"):
        return centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius
    xs, ys = zip(*outline(thing, centre, radius), strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def solid(thing, scene) -> tuple[int, int]:
    """Row and column of a pixel well inside: the centre, or for a ring the middle of its band."""
    inner = thing.detail if thing.detail is not None else 0.58
    away = (
        (1 + inner) / 2 * thing.radius * thing.fill * min(scene.width, scene.height) if thing.shape == "ring" else 0.0
    )
    return int(thing.y * scene.height), int(thing.x * scene.width + away)


# random scenes


def test_canvases_and_backgrounds():
    for scene in PICTURES + CLIPS:
        low, high = sorted((scene.width, scene.height))
        assert 96 <= low and high <= 320 and high <= 2 * low
        assert 0 <= scene.noise <= 12
        values = np.array(scene.background)
        assert values.shape == (2, 3) and values.min() >= 0 and values.max() <= 255
    plain = [scene.background[0] == scene.background[1] for scene in PICTURES]
    noisy = [scene.noise > 0 for scene in PICTURES]
    assert {(a, b) for a, b in zip(plain, noisy, strict=True)} == {
        (a, b) for a in (True, False) for b in (True, False)
    }
    brightness = [max(scene.background[0]) / 255 for scene in PICTURES]
    assert min(brightness) < 0.35 and max(brightness) > 0.75 and any(0.4 < value < 0.75 for value in brightness)
    assert {scene.antialias for scene in PICTURES} == {True, False}


def test_noise_is_limited():
    scene = Scene(96, 96, ((100, 120, 140),) * 2, (), noise=12)
    off = pixels(draw_background(scene)) - (100, 120, 140)
    assert off.min() == -12 and off.max() == 12


def test_things_have_known_kinds_and_sizes():
    found = Counter()
    for scene in PICTURES + CLIPS:
        assert 1 <= len(scene.things) <= (4 if scene in PICTURES else 3)
        for thing in scene.things:
            assert thing.shape in SHAPES and thing.colour in COLOURS and abs(thing.angle) <= 15
            low, high = {"small": (0.09, 0.14), "large": (0.18, 0.26)}[thing.size]
            assert low <= thing.radius <= high
            found.update((thing.shape, thing.colour, thing.size))
    assert found.keys() == {*SHAPES, *COLOURS, "small", "large"}
    assert Counter(len(scene.things) for scene in PICTURES).keys() == {1, 2, 3, 4}
    assert Counter(len(scene.things) for scene in CLIPS).keys() == {1, 2, 3}


def test_no_two_things_are_alike():
    for scene in PICTURES + CLIPS:
        looks = [(thing.shape, thing.colour) for thing in scene.things]
        looks += [(thing.shape, thing.changes[1]) for thing in scene.things if thing.changes is not None]
        assert len(set(looks)) == len(looks)


def test_things_are_on_the_canvas_and_do_not_overlap():
    assert len(MOVING) == 200
    for scene in PICTURES + CLIPS + MOVING:
        moves = [
            (thing.moves[0], thing.moves[0] + thing.move_seconds) for thing in scene.things if thing.moves is not None
        ]
        times = {0.0, scene.seconds, *(start for thing in scene.things for start in starts_of(thing))}
        times |= {float(time) for begin, end in moves for time in np.linspace(begin, end, 12)}
        for time in sorted(times):
            assert all(first.x < second.x + 0.001 for first, second in pairwise(scene.at(time)))
            for thing in scene.at(time):
                left, top, right, bottom = extent(thing, scene)
                assert min(left, top) > -1e-6 and right < scene.width + 1e-6 and bottom < scene.height + 1e-6, (
                    scene,
                    time,
                )
            assert all(not (a & b).any() for a, b in combinations(filled(scene, time), 2)), (scene, time)


def test_colours_contrast_with_the_background():
    for scene in PICTURES + CLIPS:
        ground = pixels(draw_background(replace(scene, noise=0)))
        for thing in scene.things:
            looks = [thing, replace(thing, colour=thing.changes[1])] if thing.changes is not None else [thing]
            under = ground[on_canvas(*thing_mask(thing, scene, 1), scene)][::16].tolist()
            assert all(contrast(look.rgb, colour) > 80 for look in looks for colour in under), (scene, thing)


def test_tints_are_nearest_to_their_colours():
    """No default colour is nearer to a tint than the colour of its name."""
    for scene in PICTURES + CLIPS:
        for thing in scene.things:
            for name, tint in thing.tints:
                assert min(COLOURS, key=lambda other: contrast(COLOURS[other], tint)) == name, (name, tint)


def test_signs():
    signed = [scene for scene in PICTURES if scene.sign is not None]
    assert 0.25 < len(signed) / len(PICTURES) < 0.42
    assert {len(scene.sign.text) for scene in signed} == {1, 2, 3, 4, 5}
    assert all(scene.sign is None for scene in CLIPS)
    for scene in signed:
        assert set(scene.sign.text) <= set(SIGN_CHARACTERS)
        *_, letters = filled(scene)
        rows, columns = (np.flatnonzero(letters.any(axis)) for axis in (1, 0))
        # In some of them, 12 to 30 % are the font size, and capitals are 0.72 as high.
        assert 0.72 * 0.12 * scene.height - 3 < len(rows) < 0.30 * scene.height + 4
        assert rows[0] > 0 and rows[-1] < scene.height - 1 and columns[0] > 0 and columns[-1] < scene.width - 1, (
            "cut off"
        )
        ground = pixels(draw_background(replace(scene, noise=0)))[letters].mean(0)
        stands_out = {name: contrast(COLOURS[name], ground) for name in ("black", "white")}
        assert stands_out[scene.sign.colour] > max(max(stands_out.values()) - 20, 250)


def test_every_font_distinguishes_all_characters():
    for path in fonts():
        shapes = [
            (mask.size, bytes(mask)) for mask in (load_font(path, 40).getmask(letter) for letter in SIGN_CHARACTERS)
        ]
        assert len(set(shapes)) == len(SIGN_CHARACTERS) and all(min(size) > 0 for size, _ in shapes), path


def test_clips_and_their_events():
    """All kinds of events are about equally frequent, and some things have none."""
    kinds, things = Counter(), sum(len(scene.things) for scene in CLIPS)
    for scene in CLIPS:
        assert 2 <= scene.seconds <= 20 and 8 <= scene.fps <= 30
        assert scene.seconds * scene.fps == pytest.approx(round(scene.seconds * scene.fps))
        assert scene.width % 2 == scene.height % 2 == 0, "h264 wants even sides"
        starts = sorted(start for thing in scene.things for start in starts_of(thing))
        assert all(later - sooner >= 1 for sooner, later in pairwise(starts))
        assert all(0 < start < scene.seconds for start in starts)
        for thing in scene.things:
            assert len(starts_of(thing)) <= 1
            kinds.update({"appears": thing.appears > 0, "disappears": thing.disappears < math.inf})
            kinds.update(
                {"changes": thing.changes is not None, "moves": thing.moves is not None, "rests": not starts_of(thing)}
            )
            if thing.moves is not None:
                start, right, down = thing.moves
                assert min(abs(right), abs(down)) == 0 and max(abs(right), abs(down)) >= 1 / 3
                assert start + thing.move_seconds <= scene.seconds
                kinds["left" if right < 0 else "right" if right > 0 else "up" if down < 0 else "down"] += 1
    shares = {kind: kinds[kind] / things for kind in ("appears", "disappears", "changes", "moves", "rests")}
    assert all(0.12 < share < 0.32 for share in shares.values()), shares
    assert all(kinds[way] > 0.15 * kinds["moves"] for way in ("left", "right", "up", "down")), kinds


def test_a_random_move_has_a_free_path_and_enough_time():
    stage, thing = {"width": 200, "height": 160}, Thing("circle", "red", 0.5, 0.5, 0.1)
    wall = [Thing("square", "blue", 0.5, y, 0.12) for y in (0.12, 0.4, 0.68, 0.9)]
    passing = Thing("star", "green", 0.2, 0.3, 0.1, moves=(0.5, 0.6, 0.0))  # from left to right, high up

    def drawn(others, time=3.0, duration=5.0, thing=thing):
        return [random_move(random.Random(i), thing, time, duration, others, stage) for i in range(40)]

    for moved in drawn(wall):  # no path crosses the wall
        (first, last), (start, right, down) = (moved.at(0.0), moved.at(5.0)), moved.moves
        assert replace(moved, x=thing.x, y=thing.y, moves=None, move_seconds=thing.move_seconds) == thing
        assert start == 3.0 and start + moved.move_seconds <= 5.0 and (first.x < 0.5) == (last.x < 0.5)
        assert min(abs(right), abs(down)) == 0 and max(abs(right), abs(down)) >= 1 / 3
    found = [moved for moved in drawn([passing]) if moved is not None]
    assert len(found) > 30
    for moved in found:  # nor the path of the other thing, even if it has passed
        for now in (moved.at(3.0 + share * moved.move_seconds) for share in np.linspace(0, 1, 25)):
            assert all(
                math.hypot((now.x - x) * 200, (now.y - 0.3) * 160) > 0.2 * 160 for x in np.linspace(0.2, 0.8, 25)
            )
    assert drawn([], time=4.6) == [None] * 40, "no time"
    assert drawn([replace(thing, radius=0.4)], thing=replace(thing, radius=0.26)) == [None] * 40, "no space"


def test_random_scenes_are_repeatable():
    assert all(random_picture(random.Random(f"picture {i}")) == PICTURES[i] for i in range(10))
    assert all(random_clip(random.Random(f"clip {i}")) == CLIPS[i] for i in range(10))
    assert len(set(PICTURES)) == len(PICTURES)


def test_crowds_do_not_overlap():
    """If things or signs overlapped, facts of vision tokens would be wrong."""
    rng = random.Random(5)
    crowds = [random_crowd(rng) for _ in range(60)]
    assert max(len(crowd.signs) for crowd in crowds) > 2 and max(len(crowd.things) for crowd in crowds) > 2
    for crowd in crowds:
        alone = [replace(crowd, things=(), more_signs=(sign,)) for sign in crowd.signs]
        alone += [replace(crowd, things=(thing,), more_signs=()) for thing in crowd.things]
        ink = sum(np.asarray(draw_ink(scene)) > 96 for scene in alone)
        assert ink.max() == 1
        assert all((np.asarray(draw_ink(scene)) > 96).any() for scene in alone)


# rendering


def test_only_things_and_signs_change_the_background():
    for scene in PICTURES[:120]:
        drawn, ground = pixels(draw_scene(scene)), pixels(draw_background(scene))
        assert drawn.shape == (scene.height, scene.width, 3)
        for thing in scene.things:
            ((colour, tint),) = thing.tints
            assert colour == thing.colour and tuple(drawn[solid(thing, scene)]) == tint, (scene, thing)
        assert not (drawn != ground).any(-1)[~np.any(filled(scene), axis=0)].any()
        if scene.sign is not None:
            assert (drawn[filled(scene)[-1]] == COLOURS[scene.sign.colour]).all(-1).any()


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(
    "shape, inside, outside",
    [
        ("circle", [(0, 0), (0.65, 0.65), (-0.65, 0.65)], [(0.8, 0.8), (-0.8, -0.8)]),
        ("square", [(0, 0), (0.65, 0.65), (-0.65, -0.65)], [(0.8, 0), (0, -0.8)]),
        ("triangle", [(0, 0), (0, -0.8), (0.7, 0.4), (-0.7, 0.4)], [(0.5, -0.5), (-0.5, -0.5), (0, 0.65)]),
        ("star", [(0, 0), (0, -0.8), (0.75, -0.25), (-0.75, -0.25)], [(0, 0.7), (0.6, -0.7), (-0.6, -0.7)]),
        ("cross", [(0, 0), (0, -0.9), (0.9, 0), (-0.9, 0.2)], [(0.6, 0.6), (-0.6, 0.6), (0.6, -0.6)]),
        ("ring", [(0.79, 0), (0, -0.79), (-0.56, 0.56)], [(0, 0), (0.3, -0.3), (0.8, 0.8)]),
    ],
)
def test_shapes(shape, inside, outside, antialias):
    """Points in radii from the centre, y down."""
    thing = Thing(shape, "blue", 0.4, 0.6, 0.25)
    scene = Scene(200, 160, ((200, 200, 200),) * 2, (thing,), antialias=antialias)
    drawn = pixels(draw_scene(scene))
    for points, colour in ((inside, (36, 84, 214)), (outside, (200, 200, 200))):
        for right, down in points:
            assert tuple(drawn[int(96 + 40 * down), int(80 + 40 * right)]) == colour, (right, down)


def test_rotation_is_clockwise():
    scene = Scene(200, 200, ((200, 200, 200),) * 2, (Thing("triangle", "red", 0.5, 0.5, 0.25, angle=15),))
    top = filled(scene)[0].any(1).argmax()
    assert np.flatnonzero(filled(scene)[0][top]).mean() > 105


def test_a_gradient_has_its_direction():
    for direction, corners in (
        ((1.0, 0.0), (0, 100, 0, 100)),
        ((0.0, 1.0), (0, 0, 100, 100)),
        ((1.0, 1.0), (0, 50, 50, 100)),
    ):
        values = pixels(draw_background(Scene(120, 96, ((0, 0, 0), (100, 100, 100)), (), direction=direction)))[..., 0]
        assert (values[0, 0], values[0, -1], values[-1, 0], values[-1, -1]) == corners


def test_the_same_scene_gives_the_same_pixels():
    noisy = next(scene for scene in PICTURES if scene.noise and scene.sign is not None)
    assert np.array_equal(pixels(draw_scene(noisy)), pixels(draw_scene(replace(noisy))))
    assert not np.array_equal(pixels(draw_scene(noisy)), pixels(draw_scene(replace(noisy, grain=noisy.grain + 1))))
    assert np.array_equal(pixels(draw_scene(noisy)), pixels(draw_scene(noisy, background=draw_background(noisy))))


def test_ink_covers_things_and_letters():
    for scene, time in [(scene, 0.0) for scene in PICTURES[:60]] + [
        (scene, scene.seconds / 2) for scene in CLIPS[:60]
    ]:
        ink = np.asarray(draw_ink(scene, time))
        assert np.array_equal(ink > 0, np.any([np.zeros_like(ink, dtype=bool), *filled(scene, time)], axis=0))
        for thing in scene.at(time):
            assert ink[solid(thing, scene)] == 255


def test_unknown_shape():
    with pytest.raises(ValueError, match="no shape named 'hexagon'; the shapes are circle, square"):
        draw_scene(Scene(96, 96, ((0, 0, 0),) * 2, (Thing("hexagon", "red", 0.5, 0.5, 0.2),)))


# clips read by the video processor


def test_sampled_times_are_those_of_the_video_processor():
    processor = MossVLVideoProcessor(num_extract_threads=1)
    rng = random.Random(0)
    lengths = [(2.0, 8), (20.0, 30), (40.0, 30), (10.0, 24), (6.0, 15), (10.1, 10)]
    lengths += [(rng.randint(40, 400) / fps, fps) for fps in range(8, 31)]
    for seconds, fps in lengths:
        scene = Scene(32, 32, ((0, 0, 0),) * 2, (), seconds=seconds, fps=fps)
        frames = np.broadcast_to(np.zeros(3, dtype=np.uint8), (round(seconds * fps), 32, 32, 3))
        for rate in (1, 2, 1.5):
            (clip,) = processor.extract(frames, video_metadata={"fps": fps}, video_fps=rate)
            assert sampled_times(scene, rate) == pytest.approx(clip.timestamps), (seconds, fps, rate)


@pytest.fixture(scope="module")
def eventful():
    """One event of each kind; sampled twice per second, a frame shows the thing in motion."""
    return Scene(
        width=160,
        height=128,
        background=((225, 225, 215), (190, 200, 205)),
        noise=3,
        seconds=4.0,
        fps=8,
        things=(
            Thing("circle", "red", 0.2, 0.3, 0.19, moves=(1.5, 0.4, 0.0), move_seconds=1.5),
            Thing("star", "blue", 0.85, 0.25, 0.13, appears=0.75),
            Thing("ring", "black", 0.25, 0.75, 0.18, disappears=2.6),
            Thing("square", "purple", 0.75, 0.75, 0.19, changes=(3.5, "orange")),
        ),
    )


def test_a_written_clip_decodes_to_its_scene(eventful, tmp_path):
    write_clip(eventful, tmp_path / "clip.mp4")
    (clip,) = MossVLVideoProcessor(num_extract_threads=1).extract(str(tmp_path / "clip.mp4"), video_fps=2)
    t, h, w = clip.grid
    assert (t, 16 * h, 16 * w) == (8, 128, 160), "the test needs frames that are not resized"
    assert clip.timestamps == pytest.approx(sampled_times(eventful, 2), abs=1e-3)
    # [t, Y, X, my, mx, c, py, px] -> [t, Y, my, py, X, mx, px, c]
    frames = clip.patches.view(t, h // 2, w // 2, 2, 2, 3, 16, 16).permute(0, 1, 3, 6, 2, 4, 7, 5)
    frames = frames.reshape(t, 16 * h, 16 * w, 3).int().numpy()
    states = set()
    for frame, time in zip(frames, clip.timestamps, strict=True):
        present = eventful.at(time)
        for thing in present:
            assert np.abs(frame[solid(thing, eventful)] - thing.rgb).max() < 40, (thing, time)
        states.add(tuple((thing.shape, thing.colour, round(thing.x, 3)) for thing in present))
        for thing in eventful.things:  # and the background elsewhere
            at = solid(thing, eventful)
            if not any(filled(replace(eventful, things=(other,)), time)[0][at] for other in present):
                assert np.abs(frame[at] - pixels(draw_background(eventful))[at]).max() < 40, (thing, time)
    assert len(states) > 5


def test_every_frame_of_a_written_clip_is_the_scene_at_its_time(eventful, tmp_path):
    """Equal frames are drawn once; no frame is late or missing."""
    write_clip(eventful, tmp_path / "clip.mp4")
    moments = {tuple(eventful.at(time)): pixels(draw_scene(eventful, time)) for time in frame_times(eventful)}
    with av.open(str(tmp_path / "clip.mp4")) as container:
        frames = [(frame.time, frame.to_ndarray(format="rgb24").astype(int)) for frame in container.decode(video=0)]
    assert [time for time, _ in frames] == pytest.approx(frame_times(eventful), abs=1e-3)
    for (_, frame), time in zip(frames, frame_times(eventful), strict=True):
        nearest = min(moments, key=lambda moment: np.abs(moments[moment] - frame).mean())
        assert nearest == tuple(eventful.at(time)), time
    assert 5 < len(moments) < len(frames)
