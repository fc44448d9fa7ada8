"""The drawn world keeps to its description: scenes at random, what their pixels show, and questions with answers written by hand."""

import math
import random
import re
from collections import Counter
from dataclasses import replace
from itertools import combinations, pairwise

import av
import numpy as np
import pytest
from PIL import Image

from moss_vl.training.nano.questions import (
    CLIP_TASKS,
    PICTURE_TASKS,
    ask_clip,
    ask_images,
    ask_picture,
    events_of,
    sampled_times,
)
from moss_vl.training.nano.world import (
    COLOURS,
    SHAPES,
    SIGN_CHARACTERS,
    Scene,
    Sign,
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


PICTURES = [random_picture(random.Random(f"picture {i}")) for i in range(300)]
CLIPS = [random_clip(random.Random(f"clip {i}")) for i in range(200)]
MORE_CLIPS = [random_clip(random.Random(f"more {i}")) for i in range(1000)]
MOVING = [clip for clip in MORE_CLIPS if any(thing.moves is not None for thing in clip.things)][:200]
NAME = re.compile(rf"\b(?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})\b")


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


def starts_of(thing) -> list[float]:
    starts = [
        thing.appears,
        thing.disappears,
        *(event[0] for event in (thing.changes, thing.moves) if event is not None),
    ]
    return [start for start in starts if 0 < start < math.inf]


# Scenes at random


def test_canvases_and_backgrounds():
    for scene in PICTURES + CLIPS:
        low, high = sorted((scene.width, scene.height))
        assert 96 <= low and high <= 320 and high <= 2 * low
        assert 0 <= scene.noise <= 12
        levels = np.array(scene.background)
        assert levels.shape == (2, 3) and levels.min() >= 0 and levels.max() <= 255
    plain = [scene.background[0] == scene.background[1] for scene in PICTURES]
    noisy = [scene.noise > 0 for scene in PICTURES]
    assert {(a, b) for a, b in zip(plain, noisy, strict=True)} == {
        (a, b) for a in (True, False) for b in (True, False)
    }
    brightness = [max(scene.background[0]) / 255 for scene in PICTURES]
    assert min(brightness) < 0.35 and max(brightness) > 0.75 and any(0.4 < value < 0.75 for value in brightness)
    assert {scene.antialias for scene in PICTURES} == {True, False}


def test_noise_stays_within_its_levels():
    scene = Scene(96, 96, ((100, 120, 140),) * 2, (), noise=12)
    off = pixels(draw_background(scene)) - (100, 120, 140)
    assert off.min() == -12 and off.max() == 12


def test_things_are_of_the_described_kinds():
    seen = Counter()
    for scene in PICTURES + CLIPS:
        assert 1 <= len(scene.things) <= (4 if scene in PICTURES else 3)
        for thing in scene.things:
            assert thing.shape in SHAPES and thing.colour in COLOURS and abs(thing.angle) <= 15
            low, high = {"small": (0.09, 0.14), "large": (0.18, 0.26)}[thing.size]
            assert low <= thing.radius <= high
            seen.update((thing.shape, thing.colour, thing.size))
    assert seen.keys() == {*SHAPES, *COLOURS, "small", "large"}
    assert Counter(len(scene.things) for scene in PICTURES).keys() == {1, 2, 3, 4}
    assert Counter(len(scene.things) for scene in CLIPS).keys() == {1, 2, 3}


def test_no_two_things_are_ever_alike():
    for scene in PICTURES + CLIPS:
        looks = [(thing.shape, thing.colour) for thing in scene.things]
        looks += [(thing.shape, thing.changes[1]) for thing in scene.things if thing.changes is not None]
        assert len(set(looks)) == len(looks)


def test_things_are_on_the_canvas_and_apart_at_every_time():
    assert len(MOVING) == 200
    for scene in PICTURES + CLIPS + MOVING:
        moves = [
            (thing.moves[0], thing.moves[0] + thing.move_seconds) for thing in scene.things if thing.moves is not None
        ]
        times = {0.0, scene.seconds, *(start for thing in scene.things for start in starts_of(thing))}
        times |= {float(time) for begin, end in moves for time in np.linspace(begin, end, 12)}
        for time in sorted(times):
            assert [thing.x for thing in scene.at(time)] == sorted(thing.x for thing in scene.at(time))
            for thing in scene.at(time):
                left, top, right, bottom = extent(thing, scene)
                assert min(left, top) > -1e-6 and right < scene.width + 1e-6 and bottom < scene.height + 1e-6, (
                    scene,
                    time,
                )
            assert all(not (a & b).any() for a, b in combinations(filled(scene, time), 2)), (scene, time)


def test_colours_stand_off_the_background():
    for scene in PICTURES + CLIPS:
        ground = pixels(draw_background(replace(scene, noise=0)))
        for thing in scene.things:
            looks = [thing, replace(thing, colour=thing.changes[1])] if thing.changes is not None else [thing]
            under = ground[on_canvas(*thing_mask(thing, scene, 1), scene)][::16].tolist()
            assert all(contrast(look.rgb, colour) > 80 for look in looks for colour in under), (scene, thing)


def test_tints_are_those_of_their_names():
    """Of the plain colours none is nearer to a tint than the one it is named after."""
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
        # In a part of them 12 to 30 % are meant of the font, whose capitals are 0.72 as high.
        assert 0.72 * 0.12 * scene.height - 3 < len(rows) < 0.30 * scene.height + 4
        assert rows[0] > 0 and rows[-1] < scene.height - 1 and columns[0] > 0 and columns[-1] < scene.width - 1, (
            "cut off"
        )
        ground = pixels(draw_background(replace(scene, noise=0)))[letters].mean(0)
        stands_out = {name: contrast(COLOURS[name], ground) for name in ("black", "white")}
        assert stands_out[scene.sign.colour] > max(max(stands_out.values()) - 20, 250)


def test_every_font_tells_all_characters_apart():
    for path in fonts():
        shapes = [
            (mask.size, bytes(mask)) for mask in (load_font(path, 40).getmask(letter) for letter in SIGN_CHARACTERS)
        ]
        assert len(set(shapes)) == len(SIGN_CHARACTERS) and all(min(size) > 0 for size, _ in shapes), path


def test_clips_and_their_events():
    """Each kind of event befalls about as many things, and a part of them nothing."""
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


def test_a_move_is_drawn_where_there_is_room_and_time_for_it():
    stage, thing = {"width": 200, "height": 160}, Thing("circle", "red", 0.5, 0.5, 0.1)
    wall = [Thing("square", "blue", 0.5, y, 0.12) for y in (0.12, 0.4, 0.68, 0.9)]
    passing = Thing("star", "green", 0.2, 0.3, 0.1, moves=(0.5, 0.6, 0.0))  # from left to right, high up

    def drawn(others, time=3.0, duration=5.0, thing=thing):
        return [random_move(random.Random(i), thing, time, duration, others, stage) for i in range(40)]

    for moved in drawn(wall):  # none comes through
        (first, last), (start, right, down) = (moved.at(0.0), moved.at(5.0)), moved.moves
        assert replace(moved, x=thing.x, y=thing.y, moves=None, move_seconds=thing.move_seconds) == thing
        assert start == 3.0 and start + moved.move_seconds <= 5.0 and (first.x < 0.5) == (last.x < 0.5)
        assert min(abs(right), abs(down)) == 0 and max(abs(right), abs(down)) >= 1 / 3
    found = [moved for moved in drawn([passing]) if moved is not None]
    assert len(found) > 30
    for moved in found:  # nor crosses the other's way, be it gone by then
        for now in (moved.at(3.0 + share * moved.move_seconds) for share in np.linspace(0, 1, 25)):
            assert all(
                math.hypot((now.x - x) * 200, (now.y - 0.3) * 160) > 0.2 * 160 for x in np.linspace(0.2, 0.8, 25)
            )
    assert drawn([], time=4.6) == [None] * 40, "no time"
    assert drawn([replace(thing, radius=0.4)], thing=replace(thing, radius=0.26)) == [None] * 40, "no room"


def test_lots_are_repeatable():
    assert all(random_picture(random.Random(f"picture {i}")) == PICTURES[i] for i in range(10))
    assert all(random_clip(random.Random(f"clip {i}")) == CLIPS[i] for i in range(10))
    assert len(set(PICTURES)) == len(PICTURES)


# Drawing


def test_things_are_drawn_where_they_are_and_nothing_else_is():
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


def test_a_rotated_thing_leans_to_the_right():
    scene = Scene(200, 200, ((200, 200, 200),) * 2, (Thing("triangle", "red", 0.5, 0.5, 0.25, angle=15),))
    top = filled(scene)[0].any(1).argmax()
    assert np.flatnonzero(filled(scene)[0][top]).mean() > 105


def test_gradient_runs_along_its_direction():
    for direction, corners in (
        ((1.0, 0.0), (0, 100, 0, 100)),
        ((0.0, 1.0), (0, 0, 100, 100)),
        ((1.0, 1.0), (0, 50, 50, 100)),
    ):
        levels = pixels(draw_background(Scene(120, 96, ((0, 0, 0), (100, 100, 100)), (), direction=direction)))[..., 0]
        assert (levels[0, 0], levels[0, -1], levels[-1, 0], levels[-1, -1]) == corners


def test_same_scene_same_pixels():
    noisy = next(scene for scene in PICTURES if scene.noise and scene.sign is not None)
    assert np.array_equal(pixels(draw_scene(noisy)), pixels(draw_scene(replace(noisy))))
    assert not np.array_equal(pixels(draw_scene(noisy)), pixels(draw_scene(replace(noisy, grain=noisy.grain + 1))))
    assert np.array_equal(pixels(draw_scene(noisy)), pixels(draw_scene(noisy, background=draw_background(noisy))))


def test_ink_is_where_things_and_letters_are():
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


# Clips through the project's video processor


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
    """Each kind of event once; sampled twice a second the move is seen on its way."""
    return Scene(
        width=160, height=128, background=((225, 225, 215), (190, 200, 205)), noise=3, seconds=4.0, fps=8,
        things=(
            Thing("circle", "red", 0.2, 0.3, 0.19, moves=(1.5, 0.4, 0.0), move_seconds=1.5),
            Thing("star", "blue", 0.85, 0.25, 0.13, appears=0.75),
            Thing("ring", "black", 0.25, 0.75, 0.18, disappears=2.6),
            Thing("square", "purple", 0.75, 0.75, 0.19, changes=(3.5, "orange")),
        ),
    )  # fmt: skip


def test_written_clip_decodes_to_what_the_scene_says(eventful, tmp_path):
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
        shown = eventful.at(time)
        for thing in shown:
            assert np.abs(frame[solid(thing, eventful)] - thing.rgb).max() < 40, (thing, time)
        states.add(tuple((thing.shape, thing.colour, round(thing.x, 3)) for thing in shown))
        for thing in eventful.things:  # and nothing is left where none is
            at = solid(thing, eventful)
            if not any(filled(replace(eventful, things=(other,)), time)[0][at] for other in shown):
                assert np.abs(frame[at] - pixels(draw_background(eventful))[at]).max() < 40, (thing, time)
    assert len(states) > 5


def test_every_frame_of_a_written_clip_is_the_scene_at_its_time(eventful, tmp_path):
    """Frames that look alike are drawn once; none is late, and none is left out."""
    write_clip(eventful, tmp_path / "clip.mp4")
    moments = {tuple(eventful.at(time)): pixels(draw_scene(eventful, time)) for time in frame_times(eventful)}
    with av.open(str(tmp_path / "clip.mp4")) as container:
        frames = [(frame.time, frame.to_ndarray(format="rgb24").astype(int)) for frame in container.decode(video=0)]
    assert [time for time, _ in frames] == pytest.approx(frame_times(eventful), abs=1e-3)
    for (_, frame), time in zip(frames, frame_times(eventful), strict=True):
        nearest = min(moments, key=lambda moment: np.abs(moments[moment] - frame).mean())
        assert nearest == tuple(eventful.at(time)), time
    assert 5 < len(moments) < len(frames)


# Questions with answers by hand


def asked(ask, tasks, draws=400) -> dict[str, str]:
    """Prompt -> answer of everything that the plain wordings ask."""
    found = {}
    for task in tasks:
        for i in range(draws):
            question = ask(task, random.Random(f"{task} {i}"))
            if question is not None:
                assert question.task == task
                assert found.setdefault(question.prompt, question.answer) == question.answer, (
                    "a question with two answers"
                )
    return found


CORNERED = Scene(
    width=300, height=200, background=((220, 220, 220),) * 2, sign=Sign("K7Q", 0.2, 0.88, 0.15, "black"),
    things=(
        Thing("star", "blue", 0.85, 0.20, 0.12),
        Thing("circle", "red", 0.20, 0.50, 0.20),
        Thing("square", "green", 0.50, 0.50, 0.18),
        Thing("star", "yellow", 0.55, 0.85, 0.10),
    ),
)  # fmt: skip


def test_questions_about_a_picture():
    tasks = [task for task in PICTURE_TASKS if task != "exists"]
    description = ('a large red circle on the left, a large green square in the center, a small yellow star at the bottom, '
                   'a small blue star at the top right, and the text "K7Q"')  # fmt: skip
    assert asked(lambda task, rng: ask_picture(task, CORNERED, rng, plain=True), tasks) == {
        "Describe the picture.": description, "": description,
        "What color is the circle?": "red", "What color is the square?": "green",
        "What shape is the red object?": "circle", "What shape is the green object?": "square",
        "What shape is the yellow object?": "star", "What shape is the blue object?": "star",
        "How many objects are there?": "4",
        "Where is the circle?": "left", "Where is the square?": "center",
        "Where is the yellow star?": "bottom", "Where is the blue star?": "top right",
        "What is to the left of the circle?": "nothing", "What is to the right of the circle?": "a large green square",
        "What is above the circle?": "a small blue star", "What is below the circle?": "a small yellow star",
        "What is to the left of the square?": "a large red circle", "What is to the right of the square?": "a small yellow star",
        "What is above the square?": "a small blue star", "What is below the square?": "a small yellow star",
        "What is to the left of the yellow star?": "a large green square",
        "What is to the right of the yellow star?": "a small blue star",
        "What is above the yellow star?": "a large green square", "What is below the yellow star?": "nothing",
        "What is to the left of the blue star?": "a large green square", "What is to the right of the blue star?": "nothing",
        "What is above the blue star?": "nothing", "What is below the blue star?": "a large green square",
        "What does the text say?": "K7Q",
    }  # fmt: skip


def test_what_there_is_and_what_not():
    there = {("red", "circle"), ("green", "square"), ("yellow", "star"), ("blue", "star")}
    expected = {}
    for colour in COLOURS:
        article = "an" if colour == "orange" else "a"
        expected |= {
            f"Is there {article} {colour} {shape}?": "yes" if (colour, shape) in there else "no" for shape in SHAPES
        }
    assert asked(lambda task, rng: ask_picture(task, CORNERED, rng, plain=True), ["exists"], draws=1500) == expected
    assert "Is there a green ring?" in expected and "Is there an orange cross?" in expected


def test_a_picture_without_sign_and_with_one_thing():
    scene = replace(CORNERED, sign=None, things=CORNERED.things[:1])
    tasks = [task for task in PICTURE_TASKS if task != "exists"]
    assert asked(lambda task, rng: ask_picture(task, scene, rng, plain=True), tasks) == {
        "Describe the picture.": "a small blue star at the top right", "": "a small blue star at the top right",
        "What color is the star?": "blue", "What shape is the blue object?": "star", "How many objects are there?": "1",
        "Where is the star?": "top right",
        "What is to the left of the star?": "nothing", "What is to the right of the star?": "nothing",
        "What is above the star?": "nothing", "What is below the star?": "nothing", "What does the text say?": "nothing",
    }  # fmt: skip


@pytest.mark.parametrize(
    "x, y, phrase",
    [
        (0.32, 0.32, "at the top left"), (0.34, 0.32, "at the top"), (0.67, 0.32, "at the top right"),
        (0.32, 0.34, "on the left"), (0.34, 0.66, "in the center"), (0.67, 0.66, "on the right"),
        (0.32, 0.67, "at the bottom left"), (0.66, 0.67, "at the bottom"), (0.67, 0.67, "at the bottom right"),
    ],
)  # fmt: skip
def test_places_are_the_canvas_in_thirds(x, y, phrase):
    scene = Scene(320, 160, ((0, 0, 0),) * 2, (Thing("ring", "white", x, y, 0.12),))
    assert ask_picture("describe picture", scene, random.Random(0)).answer == f"a small white ring {phrase}"
    assert ask_picture("place", scene, random.Random(0)).answer == phrase.split(" the ")[1]


def test_questions_about_several_images():
    circle, star, ring, square = (Thing(shape, colour, 0.5, 0.5, 0.2) for shape, colour in
                                  (("circle", "red"), ("star", "blue"), ("ring", "orange"), ("square", "green")))  # fmt: skip
    groups = (circle,), (star, replace(star, colour="red"), square), (ring, circle)
    scenes = [replace(CORNERED, things=things) for things in groups]
    found = asked(lambda task, rng: ask_images(scenes, rng, plain=True), ["which image"])
    assert found == {
        "Which image shows a star?": "2",
        "Which image shows a square?": "2",
        "Which image shows a ring?": "3",
    }
    everything = asked(lambda task, rng: ask_images(scenes, rng), ["which image"], draws=800)
    assert found.items() <= everything.items()
    assert (
        everything["Which image shows an orange ring?"] == "3" and everything["Which image shows a red star?"] == "2"
    )
    assert not any("circle" in prompt for prompt in everything)
    assert ask_images([scenes[0], scenes[0]], random.Random(0)) is None


# 101 frames: sampled once or twice a second, the stamps are whole or half seconds.
ONE_OF_EACH = Scene(
    width=240, height=240, background=((220, 220, 220),) * 2, seconds=10.1, fps=10,
    things=(
        Thing("ring", "white", 0.8, 0.5, 0.10, changes=(7.6, "orange")),
        Thing("circle", "red", 0.5, 0.5, 0.20, moves=(5.6, -0.34, 0.0)),
        Thing("star", "blue", 0.6, 0.2, 0.12, appears=3.0),
        Thing("square", "black", 0.5, 0.85, 0.11, disappears=8.9),
    ),
)  # fmt: skip
MOVES = Scene(
    width=240, height=240, background=((220, 220, 220),) * 2, seconds=10.1, fps=10,
    things=(
        Thing("star", "green", 0.5, 0.8, 0.12, moves=(6.0, 0.0, -0.5)),
        Thing("star", "purple", 0.2, 0.2, 0.12, appears=2.4),
    ),
)  # fmt: skip
STILL = replace(ONE_OF_EACH, things=(Thing("cross", "red", 0.5, 0.5, 0.2),), seconds=4.0)


def about_clip(scene, fps) -> tuple[dict[str, str], dict[float, str]]:
    """Prompt -> answer; and apart, time -> answer, what is asked about moments between two sampled frames."""
    times = sampled_times(scene, fps)
    found, between = asked(lambda task, rng: ask_clip(task, scene, times, rng, plain=True), CLIP_TASKS), {}
    for prompt in list(found):
        moment = re.fullmatch(r"What is visible at (\d+\.\d) seconds\?", prompt)
        if moment is not None and moment[1] not in {f"{time:.1f}" for time in times}:
            between[float(moment[1])] = found.pop(prompt)
    return found, between


def tenths(begin, end) -> list[float]:
    return [tenth / 10 for tenth in range(round(10 * begin), round(10 * end) + 1)]


def test_questions_about_a_clip_once_a_second():
    start = "a large red circle in the center, a small black square at the bottom, a small white ring on the right"
    appeared = ("a large red circle in the center, a small black square at the bottom, a small blue star at the top, "
                "a small white ring on the right")  # fmt: skip
    moved = ("a large red circle on the left, a small black square at the bottom, a small blue star at the top, "
             "a small {} ring on the right")  # fmt: skip
    after = "a large red circle on the left, a small blue star at the top, a small orange ring on the right"
    description = (f"at 0.0 seconds {start}; at 3.0 seconds a small blue star appears at the top; "
                   "at 6.0 seconds the circle moves left; "
                   "at 8.0 seconds the ring changes color to orange; at 9.0 seconds the square disappears")  # fmt: skip
    visible = [start] * 3 + [appeared] * 4 + [moved.format("white"), moved.format("orange"), after, after]
    found, between = about_clip(ONE_OF_EACH, 1)
    assert found == {
        "Describe the video.": description, "": description,
        "What happens first?": "a small blue star appears at the top", "What happens last?": "the square disappears",
        "When does the star appear?": "3.0 seconds", "When does the square disappear?": "9.0 seconds",
        "When does the ring change color?": "8.0 seconds", "When does the circle start moving?": "6.0 seconds",
        **{f"What is visible at {time}.0 seconds?": things for time, things in enumerate(visible)},
        "Which way does the circle move?": "left", "What color is the ring after it changes?": "orange",
        "How long is the video?": "10.1 seconds",
    }  # fmt: skip
    unchanged = {**dict.fromkeys(tenths(0, 2), start), **dict.fromkeys(tenths(3, 5), appeared),
                 **dict.fromkeys(tenths(9, 10), after)}  # fmt: skip
    assert between.items() <= unchanged.items(), "asked where two frames differ"
    assert {int(time) for time in between} == {0, 1, 3, 4, 9}


def test_questions_about_a_clip_twice_a_second():
    """A move is first seen behind the frame at which it starts; two stars are told apart by colour."""
    start, both = "a small green star at the bottom", "a small purple star at the top left, a small green star {}"
    description = (f"at 0.0 seconds {start}; at 2.5 seconds a small purple star appears at the top left; "
                   "at 6.5 seconds the green star moves up")  # fmt: skip
    visible = (
        [start] * 5
        + [both.format("at the bottom")] * 8
        + [both.format("in the center")]
        + [both.format("at the top")] * 7
    )
    found, between = about_clip(MOVES, 2)
    assert found == {
        "Describe the video.": description, "": description,
        "What happens first?": "a small purple star appears at the top left", "What happens last?": "the green star moves up",
        "When does the purple star appear?": "2.5 seconds", "When does the green star start moving?": "6.5 seconds",
        **{f"What is visible at {time / 2:.1f} seconds?": things for time, things in enumerate(visible)},
        "Which way does the green star move?": "up", "How long is the video?": "10.1 seconds",
    }  # fmt: skip
    unchanged = {**dict.fromkeys(tenths(0, 2), start), **dict.fromkeys(tenths(2.5, 6), both.format("at the bottom")),
                 **dict.fromkeys(tenths(7, 10), both.format("at the top"))}  # fmt: skip
    assert between.items() <= unchanged.items(), "asked where two frames differ"
    assert {int(time) for time in between} == {0, 1, 2, 3, 4, 5, 7, 8, 9}


def test_questions_about_a_clip_in_which_nothing_happens():
    cross = "a large red cross in the center"
    found, between = about_clip(STILL, 1)
    assert found == {
        "Describe the video.": f"at 0.0 seconds {cross}", "": f"at 0.0 seconds {cross}",
        "What happens first?": "nothing", "What happens last?": "nothing", "How long is the video?": "4.0 seconds",
        **{f"What is visible at {time} seconds?": cross for time in ("0.0", "1.3", "2.6", "3.9")},
    }  # fmt: skip
    assert between.items() <= dict.fromkeys(tenths(0, 3.9), cross).items() and {int(time) for time in between} == {
        0,
        1,
        2,
        3,
    }


def test_a_thing_with_several_events_and_one_that_no_frame_shows():
    busy = Thing("star", "red", 0.2, 0.5, 0.12, appears=2.0, moves=(4.0, 0.5, 0.0), disappears=8.5)
    brief = Thing("ring", "blue", 0.5, 0.8, 0.12, appears=5.1, disappears=5.9)
    scene = replace(ONE_OF_EACH, things=(busy, brief))
    assert [(event.time, event.clause) for event in events_of(scene, [float(time) for time in range(11)])] == [
        (2.0, "a small red star appears on the left"), (5.0, "the star moves right"), (9.0, "the star disappears")]  # fmt: skip
    assert all(ask_clip("first or last", scene, [0.0, 6.0], random.Random(i)) is None for i in range(9)), (
        "one frame shows both"
    )
    assert [(event.time, event.clause) for event in events_of(scene, [0.0, 6.0, 10.0])] == [
        (6.0, "a small red star appears on the right"), (6.0, "the star moves right"), (10.0, "the star disappears")]  # fmt: skip


def test_unknown_tasks():
    with pytest.raises(ValueError, match="no task named 'colour'; those of pictures are describe picture, color"):
        ask_picture("colour", CORNERED, random.Random(0))
    with pytest.raises(ValueError, match="no task named 'where'; those of clips are describe clip, first or last"):
        ask_clip("where", STILL, [0.0], random.Random(0))


# Questions about scenes at random


def meant(colour, shape, things) -> list[Thing]:
    return [thing for thing in things if thing.shape == shape and colour in ("", thing.colour)]


def place_by_comparison(thing) -> str:
    across = "left" if thing.x < 1 / 3 else "right" if thing.x >= 2 / 3 else ""
    down = "top" if thing.y < 1 / 3 else "bottom" if thing.y >= 2 / 3 else ""
    return f"{down} {across}".strip() or "center"


def test_every_wording_means_one_thing_and_is_asked():
    """ "The star" where there are two is never asked, in no wording; and every task has several."""
    wordings = {}
    for i, (picture, clip) in enumerate(zip(PICTURES, CLIPS, strict=False)):
        rng, times = random.Random(i), sampled_times(clip, 1 + i % 2)
        questions = [(ask_picture(task, picture, rng), picture) for task in PICTURE_TASKS for _ in range(3)]
        questions += [(ask_clip(task, clip, times, rng), clip) for task in CLIP_TASKS for _ in range(3)]
        for question, scene in questions:
            if question is not None:
                wordings.setdefault(question.task, set()).add(
                    NAME.sub("{}", re.sub(r"\d+\.\d", "{}", question.prompt))
                )
                if question.task not in ("exists", "first or last"):
                    for colour, shape in NAME.findall(question.prompt):
                        assert len(meant(colour, shape, scene.things)) == 1, (question, scene)
    assert all(len(wordings[task]) >= 5 for task in (*PICTURE_TASKS, *CLIP_TASKS)), wordings
    assert "" in wordings["describe picture"] and "" in wordings["describe clip"]


def test_answers_about_pictures_agree_with_a_slow_search():
    checked = Counter()
    for i, scene in enumerate(PICTURES):
        rng = random.Random(i)
        for task in PICTURE_TASKS:
            question = ask_picture(task, scene, rng, plain=True)
            if question is None:
                continue
            named = [meant(colour, shape, scene.things) for colour, shape in NAME.findall(question.prompt)]
            if task == "count":
                expected = str(len(scene.things))
            elif task == "color":
                expected = named[0][0].colour
            elif task == "shape":
                shapes = [thing.shape for thing in scene.things if thing.colour in question.prompt.split()]
                assert len(shapes) == 1
                expected = shapes[0]
            elif task == "place":
                expected = place_by_comparison(named[0][0])
            elif task == "exists":
                expected = "yes" if named[0] else "no"
            elif task == "text":
                expected = scene.sign.text if scene.sign is not None else "nothing"
            elif task == "relation":
                at = named[0][0]
                apart = {}
                for other in scene.things:
                    right, down = (other.x - at.x) * scene.width, (other.y - at.y) * scene.height
                    sides = {"left": right < 0, "right": right > 0, "above": down < 0, "below": down > 0}
                    if any(true for side, true in sides.items() if side in question.prompt):
                        apart[abs(complex(right, down))] = f"a {other.size} {other.colour} {other.shape}"
                expected = apart[min(apart)] if apart else "nothing"
            else:
                in_order = sorted(scene.things, key=lambda thing: thing.x)
                parts = re.fullmatch(r'(.*?)(?:, and the text "(\w+)")?', question.answer)
                assert parts[2] == (scene.sign.text if scene.sign is not None else None)
                expected = question.answer
                for thing, part in zip(in_order, parts[1].split(", "), strict=True):
                    phrase = (
                        rf"a {thing.size} {thing.colour} {thing.shape} (on|in|at) the {place_by_comparison(thing)}"
                    )
                    assert re.fullmatch(phrase, part)
            assert question.answer == expected, (question, scene)
            checked[task, expected in ("yes", "nothing")] += 1
    assert all(checked[task, False] for task in PICTURE_TASKS)
    assert all(checked[task, True] for task in ("exists", "relation", "text"))


def test_answers_about_clips_agree_with_a_slow_search():
    """Times by comparing what stands at one sampled frame with what stood at the one before."""
    checked = Counter()
    kind_of = {"direction": "start moving", "color after": "change color"}
    clauses_of = {
        "appear": "appears",
        "disappear": "disappears",
        "change color": "changes color to",
        "start moving": "moves",
    }
    for i, scene in enumerate(CLIPS + MOVING):
        times, rng = sampled_times(scene, 1 + i % 2), random.Random(i)
        before, first_seen = [], {}
        for time in times:
            now = [thing.at(time) for thing in scene.things]
            for index, (old, new) in enumerate(zip(before, now, strict=False)):
                if (old is None) != (new is None):
                    first_seen[index] = time, "appear" if old is None else "disappear"
                elif new is not None and new.colour != old.colour:
                    first_seen[index] = time, "change color"
                elif new is not None and (new.x, new.y) != (old.x, old.y):
                    first_seen.setdefault(index, (time, "start moving"))
            before = now
        assert len(first_seen) == sum(len(starts_of(thing)) for thing in scene.things), "an event that no frame shows"
        for task in CLIP_TASKS:
            question = ask_clip(task, scene, times, rng, plain=True)
            if question is None:
                stamps = [time for time, _ in first_seen.values()]
                assert not any(kind == kind_of.get(task) for _, kind in first_seen.values())
                assert task in kind_of or not stamps or task == "first or last" and len(set(stamps)) < len(stamps)
                continue
            checked[task] += 1
            named = [
                scene.things.index(thing)
                for name in NAME.findall(question.prompt)
                for thing in meant(*name, scene.things)
            ]
            if task == "when":
                time, kind = first_seen[named[0]]
                assert question.prompt.endswith(f" {kind}?") and question.answer == f"{time:.1f} seconds"
            elif task == "describe clip":
                stamps = [re.match(r"at (\d+\.\d) seconds ", clause)[1] for clause in question.answer.split("; ")]
                assert stamps == ["0.0", *(f"{time:.1f}" for time, _ in sorted(first_seen.values()))]
            elif task == "duration":
                assert question.answer == f"{scene.seconds:.1f} seconds"
            elif task == "color after":
                assert (
                    question.answer == scene.things[named[0]].at(scene.seconds).colour != scene.things[named[0]].colour
                )
            elif task == "direction":
                first, last = scene.things[named[0]], scene.things[named[0]].at(scene.seconds)
                ways = {
                    "left": last.x < first.x,
                    "right": last.x > first.x,
                    "up": last.y < first.y,
                    "down": last.y > first.y,
                }
                assert [way for way, true in ways.items() if true] == [question.answer]
            elif task == "visible at":
                moment = re.search(r"at (\d+\.\d) seconds", question.prompt)[1]
                frames = [time for time in times if f"{time:.1f}" == moment]
                if not frames:  # between two that show the same
                    later = next(index for index, time in enumerate(times) if time > float(moment))
                    frames = times[later - 1 : later + 1]
                    assert scene.at(frames[0]) == scene.at(float(moment)) == scene.at(frames[1])
                    checked["between"] += 1
                shown = [thing.at(frames[0]) for thing in scene.things if thing.at(frames[0]) is not None]
                parts = question.answer.split(", ") if shown else []
                shown.sort(key=lambda thing: thing.x)
                assert [part.split()[1:4] for part in parts] == [
                    [thing.size, thing.colour, thing.shape] for thing in shown
                ]
            else:
                order = sorted(first_seen.values(), reverse="last" in question.prompt)
                assert len(order) < 2 or order[0][0] != order[1][0], "nobody can tell which was first"
                kind = order[0][1] if order else None
                assert clauses_of.get(kind, "nothing") in question.answer
    assert all(checked[task] for task in CLIP_TASKS)
    assert 0.1 < checked["between"] / checked["visible at"] < 0.25, "a quarter, less those without such a pair"


def test_crowds_are_clear_and_on_the_canvas():
    """A crowd is drawn for its many letters and things; none may hide another, or what a vision token is asked would be wrong."""
    rng = random.Random(5)
    crowds = [random_crowd(rng) for _ in range(60)]
    assert max(len(crowd.signs) for crowd in crowds) > 2 and max(len(crowd.things) for crowd in crowds) > 2
    for crowd in crowds:
        alone = [replace(crowd, things=(), more_signs=(sign,)) for sign in crowd.signs]
        alone += [replace(crowd, things=(thing,), more_signs=()) for thing in crowd.things]
        ink = sum(np.asarray(draw_ink(scene)) > 96 for scene in alone)
        assert ink.max() == 1
        assert all((np.asarray(draw_ink(scene)) > 96).any() for scene in alone)
