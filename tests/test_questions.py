"""Questions about scenes of the drawn world against answers written by hand, and against a slow search."""

import random
import re
from collections import Counter
from dataclasses import replace

import pytest
from random_scenes import CLIPS, MOVING, PICTURES, starts_of

from moss_vl.training.nano.questions import (
    CLIP_TASKS,
    PICTURE_TASKS,
    ask_clip,
    ask_images,
    ask_picture,
    events_of,
    sampled_times,
)
from moss_vl.training.nano.world import COLOURS, SHAPES, Scene, Sign, Thing, reading_order


NAME = re.compile(rf"\b(?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})\b")


# answers written by hand


def asked(ask, tasks, draws=400) -> dict[str, str]:
    """Prompt -> answer of all questions in the plain wordings."""
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
    width=300,
    height=200,
    background=((220, 220, 220),) * 2,
    sign=Sign("K7Q", 0.2, 0.88, 0.15, "black"),
    things=(
        Thing("star", "blue", 0.85, 0.20, 0.12),
        Thing("circle", "red", 0.20, 0.50, 0.20),
        Thing("square", "green", 0.50, 0.50, 0.18),
        Thing("star", "yellow", 0.55, 0.85, 0.10),
    ),
)


def test_questions_about_a_picture():
    tasks = [task for task in PICTURE_TASKS if task != "exists"]
    description = (
        "a large red circle on the left, a large green square in the center, a small yellow star at the bottom, "
        'a small blue star at the top right, and the text "K7Q"'
    )
    assert asked(lambda task, rng: ask_picture(task, CORNERED, rng, plain=True), tasks) == {
        "Describe the picture.": description,
        "": description,
        "What color is the circle?": "red",
        "What color is the square?": "green",
        "What shape is the red object?": "circle",
        "What shape is the green object?": "square",
        "What shape is the yellow object?": "star",
        "What shape is the blue object?": "star",
        "How many objects are there?": "4",
        "Where is the circle?": "left",
        "Where is the square?": "center",
        "Where is the yellow star?": "bottom",
        "Where is the blue star?": "top right",
        "What is to the left of the circle?": "nothing",
        "What is to the right of the circle?": "a large green square",
        "What is above the circle?": "a small blue star",
        "What is below the circle?": "a small yellow star",
        "What is to the left of the square?": "a large red circle",
        "What is to the right of the square?": "a small yellow star",
        "What is above the square?": "a small blue star",
        "What is below the square?": "a small yellow star",
        "What is to the left of the yellow star?": "a large green square",
        "What is to the right of the yellow star?": "a small blue star",
        "What is above the yellow star?": "a large green square",
        "What is below the yellow star?": "nothing",
        "What is to the left of the blue star?": "a large green square",
        "What is to the right of the blue star?": "nothing",
        "What is above the blue star?": "nothing",
        "What is below the blue star?": "a large green square",
        "What does the text say?": "K7Q",
    }


def test_questions_whether_things_exist():
    there = {("red", "circle"), ("green", "square"), ("yellow", "star"), ("blue", "star")}
    expected = {}
    for colour in COLOURS:
        article = "an" if colour == "orange" else "a"
        expected |= {
            f"Is there {article} {colour} {shape}?": "yes" if (colour, shape) in there else "no" for shape in SHAPES
        }
    assert asked(lambda task, rng: ask_picture(task, CORNERED, rng, plain=True), ["exists"], draws=1500) == expected
    assert "Is there a green ring?" in expected and "Is there an orange cross?" in expected


def test_questions_about_a_picture_with_one_thing_and_no_sign():
    scene = replace(CORNERED, sign=None, things=CORNERED.things[:1])
    tasks = [task for task in PICTURE_TASKS if task != "exists"]
    assert asked(lambda task, rng: ask_picture(task, scene, rng, plain=True), tasks) == {
        "Describe the picture.": "a small blue star at the top right",
        "": "a small blue star at the top right",
        "What color is the star?": "blue",
        "What shape is the blue object?": "star",
        "How many objects are there?": "1",
        "Where is the star?": "top right",
        "What is to the left of the star?": "nothing",
        "What is to the right of the star?": "nothing",
        "What is above the star?": "nothing",
        "What is below the star?": "nothing",
        "What does the text say?": "nothing",
    }


@pytest.mark.parametrize(
    "x, y, phrase",
    [
        (0.32, 0.32, "at the top left"),
        (0.34, 0.32, "at the top"),
        (0.67, 0.32, "at the top right"),
        (0.32, 0.34, "on the left"),
        (0.34, 0.66, "in the center"),
        (0.67, 0.66, "on the right"),
        (0.32, 0.67, "at the bottom left"),
        (0.66, 0.67, "at the bottom"),
        (0.67, 0.67, "at the bottom right"),
    ],
)
def test_regions_are_thirds_of_the_canvas(x, y, phrase):
    scene = Scene(320, 160, ((0, 0, 0),) * 2, (Thing("ring", "white", x, y, 0.12),))
    assert ask_picture("describe picture", scene, random.Random(0)).answer == f"a small white ring {phrase}"
    assert ask_picture("place", scene, random.Random(0)).answer == phrase.split(" the ")[1]


def test_questions_about_several_images():
    circle, star, ring, square = (
        Thing(shape, colour, 0.5, 0.5, 0.2)
        for shape, colour in (("circle", "red"), ("star", "blue"), ("ring", "orange"), ("square", "green"))
    )
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
    width=240,
    height=240,
    background=((220, 220, 220),) * 2,
    seconds=10.1,
    fps=10,
    things=(
        Thing("ring", "white", 0.8, 0.5, 0.10, changes=(7.6, "orange")),
        Thing("circle", "red", 0.5, 0.5, 0.20, moves=(5.6, -0.34, 0.0)),
        Thing("star", "blue", 0.6, 0.2, 0.12, appears=3.0),
        Thing("square", "black", 0.5, 0.85, 0.11, disappears=8.9),
    ),
)
MOVES = Scene(
    width=240,
    height=240,
    background=((220, 220, 220),) * 2,
    seconds=10.1,
    fps=10,
    things=(
        Thing("star", "green", 0.5, 0.8, 0.12, moves=(6.0, 0.0, -0.5)),
        Thing("star", "purple", 0.2, 0.2, 0.12, appears=2.4),
    ),
)
STILL = replace(ONE_OF_EACH, things=(Thing("cross", "red", 0.5, 0.5, 0.2),), seconds=4.0)


def about_clip(scene, fps) -> tuple[dict[str, str], dict[float, str]]:
    """Prompt -> answer; and time -> answer of questions about times between two sampled frames."""
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
    appeared = (
        "a large red circle in the center, a small black square at the bottom, a small blue star at the top, "
        "a small white ring on the right"
    )
    moved = (
        "a large red circle on the left, a small black square at the bottom, a small blue star at the top, "
        "a small {} ring on the right"
    )
    after = "a large red circle on the left, a small blue star at the top, a small orange ring on the right"
    description = (
        f"at 0.0 seconds {start}; at 3.0 seconds a small blue star appears at the top; "
        "at 6.0 seconds the circle moves left; "
        "at 8.0 seconds the ring changes color to orange; at 9.0 seconds the square disappears"
    )
    visible = [start] * 3 + [appeared] * 4 + [moved.format("white"), moved.format("orange"), after, after]
    found, between = about_clip(ONE_OF_EACH, 1)
    assert found == {
        "Describe the video.": description,
        "": description,
        "What happens first?": "a small blue star appears at the top",
        "What happens last?": "the square disappears",
        "When does the star appear?": "3.0 seconds",
        "When does the square disappear?": "9.0 seconds",
        "When does the ring change color?": "8.0 seconds",
        "When does the circle start moving?": "6.0 seconds",
        **{f"What is visible at {time}.0 seconds?": things for time, things in enumerate(visible)},
        "Which way does the circle move?": "left",
        "What color is the ring after it changes?": "orange",
        "How long is the video?": "10 seconds",
    }
    unchanged = {
        **dict.fromkeys(tenths(0, 2), start),
        **dict.fromkeys(tenths(3, 5), appeared),
        **dict.fromkeys(tenths(9, 10), after),
    }
    assert between.items() <= unchanged.items(), "asked between two frames that differ"
    assert {int(time) for time in between} == {0, 1, 3, 4, 9}


def test_questions_about_a_clip_twice_a_second():
    """A move is first visible after the frame at which it starts; two stars are distinguished by colour."""
    start, both = "a small green star at the bottom", "a small purple star at the top left, a small green star {}"
    description = (
        f"at 0.0 seconds {start}; at 2.5 seconds a small purple star appears at the top left; "
        "at 6.5 seconds the green star moves up"
    )
    visible = (
        [start] * 5
        + [both.format("at the bottom")] * 8
        + [both.format("in the center")]
        + [both.format("at the top")] * 7
    )
    found, between = about_clip(MOVES, 2)
    assert found == {
        "Describe the video.": description,
        "": description,
        "What happens first?": "a small purple star appears at the top left",
        "What happens last?": "the green star moves up",
        "When does the purple star appear?": "2.5 seconds",
        "When does the green star start moving?": "6.5 seconds",
        **{f"What is visible at {time / 2:.1f} seconds?": things for time, things in enumerate(visible)},
        "Which way does the green star move?": "up",
        "How long is the video?": "10 seconds",
    }
    unchanged = {
        **dict.fromkeys(tenths(0, 2), start),
        **dict.fromkeys(tenths(2.5, 6), both.format("at the bottom")),
        **dict.fromkeys(tenths(7, 10), both.format("at the top")),
    }
    assert between.items() <= unchanged.items(), "asked between two frames that differ"
    assert {int(time) for time in between} == {0, 1, 2, 3, 4, 5, 7, 8, 9}


def test_questions_about_a_clip_in_which_nothing_happens():
    cross = "a large red cross in the center"
    found, between = about_clip(STILL, 1)
    assert found == {
        "Describe the video.": f"at 0.0 seconds {cross}",
        "": f"at 0.0 seconds {cross}",
        "What happens first?": "nothing",
        "What happens last?": "nothing",
        "How long is the video?": "4 seconds",
        **{f"What is visible at {time} seconds?": cross for time in ("0.0", "1.3", "2.6", "3.9")},
    }
    assert between.items() <= dict.fromkeys(tenths(0, 3.9), cross).items() and {int(time) for time in between} == {
        0,
        1,
        2,
        3,
    }


def test_several_events_of_a_thing_and_one_that_no_frame_shows():
    busy = Thing("star", "red", 0.2, 0.5, 0.12, appears=2.0, moves=(4.0, 0.5, 0.0), disappears=8.5)
    brief = Thing("ring", "blue", 0.5, 0.8, 0.12, appears=5.1, disappears=5.9)
    scene = replace(ONE_OF_EACH, things=(busy, brief))
    assert [(event.time, event.clause) for event in events_of(scene, [float(time) for time in range(11)])] == [
        (2.0, "a small red star appears on the left"),
        (5.0, "the star moves right"),
        (9.0, "the star disappears"),
    ]
    assert all(ask_clip("first or last", scene, [0.0, 6.0], random.Random(i)) is None for i in range(9)), (
        "one frame shows both"
    )
    assert [(event.time, event.clause) for event in events_of(scene, [0.0, 6.0, 10.0])] == [
        (6.0, "a small red star appears on the right"),
        (6.0, "the star moves right"),
        (10.0, "the star disappears"),
    ]


def test_unknown_tasks():
    with pytest.raises(ValueError, match="no task named 'colour'; those of pictures are describe picture, color"):
        ask_picture("colour", CORNERED, random.Random(0))
    with pytest.raises(ValueError, match="no task named 'where'; those of clips are describe clip, first or last"):
        ask_clip("where", STILL, [0.0], random.Random(0))


# random scenes


def meant(colour, shape, things) -> list[Thing]:
    return [thing for thing in things if thing.shape == shape and colour in ("", thing.colour)]


def region_by_comparison(thing) -> str:
    across = "left" if thing.x < 1 / 3 else "right" if thing.x >= 2 / 3 else ""
    down = "top" if thing.y < 1 / 3 else "bottom" if thing.y >= 2 / 3 else ""
    return f"{down} {across}".strip() or "center"


def test_every_wording_is_used_and_unambiguous():
    """No wording asks about "the star" if there are two, and every task has several wordings."""
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
                expected = region_by_comparison(named[0][0])
            elif task == "exists":
                expected = "yes" if named[0] else "no"
            elif task == "text":
                expected = scene.sign.text if scene.sign is not None else "nothing"
            elif task == "relation":
                this = named[0][0]
                apart = {}
                for other in scene.things:
                    right, down = (other.x - this.x) * scene.width, (other.y - this.y) * scene.height
                    sides = {"left": right < 0, "right": right > 0, "above": down < 0, "below": down > 0}
                    if any(true for side, true in sides.items() if side in question.prompt):
                        apart[abs(complex(right, down))] = f"a {other.size} {other.colour} {other.shape}"
                expected = apart[min(apart)] if apart else "nothing"
            else:
                in_order = sorted(scene.things, key=reading_order)
                parts = re.fullmatch(r'(.*?)(?:, and the text "(\w+)")?', question.answer)
                assert parts[2] == (scene.sign.text if scene.sign is not None else None)
                expected = question.answer
                for thing, part in zip(in_order, parts[1].split(", "), strict=True):
                    phrase = (
                        rf"a {thing.size} {thing.colour} {thing.shape} (on|in|at) the {region_by_comparison(thing)}"
                    )
                    assert re.fullmatch(phrase, part)
            assert question.answer == expected, (question, scene)
            checked[task, expected in ("yes", "nothing")] += 1
    assert all(checked[task, False] for task in PICTURE_TASKS)
    assert all(checked[task, True] for task in ("exists", "relation", "text"))


def first_changes(scene, times) -> dict[int, tuple[float, str]]:
    """Index of a thing -> (time, kind) of its event, from comparing each sampled frame with the one before."""
    before, changes = [], {}
    for time in times:
        now = [thing.at(time) for thing in scene.things]
        for index, (old, new) in enumerate(zip(before, now, strict=False)):
            if (old is None) != (new is None):
                changes[index] = time, "appear" if old is None else "disappear"
            elif new is not None and new.colour != old.colour:
                changes[index] = time, "change color"
            elif new is not None and (new.x, new.y) != (old.x, old.y):
                changes.setdefault(index, (time, "start moving"))
        before = now
    return changes


KIND_OF = {"direction": "start moving", "color after": "change color"}
CLAUSES = {"appear": "appears", "disappear": "disappears", "change color": "changes color to", "start moving": "moves"}


def check_missing_question(task, changes):
    """A clip offers no question only if it has no event for it, or if the first or last one is ambiguous."""
    stamps = [time for time, _ in changes.values()]
    assert not any(kind == KIND_OF.get(task) for _, kind in changes.values())
    assert task in KIND_OF or not stamps or task == "first or last" and len(set(stamps)) < len(stamps)


def check_clip_answer(task, question, scene, changes):
    """Of all tasks but "visible at"."""
    found = NAME.findall(question.prompt)
    named = [scene.things.index(thing) for name in found for thing in meant(*name, scene.things)]
    if task == "when":
        time, kind = changes[named[0]]
        assert question.prompt.endswith(f" {kind}?") and question.answer == f"{time:.1f} seconds"
    elif task == "describe clip":
        stamps = [re.match(r"at (\d+\.\d) seconds ", clause)[1] for clause in question.answer.split("; ")]
        assert stamps == ["0.0", *(f"{time:.1f}" for time, _ in sorted(changes.values()))]
    elif task == "duration":
        seconds = int(question.answer.removesuffix(" seconds"))
        assert abs(seconds - scene.seconds) <= 0.5
    elif task == "color after":
        first, last = scene.things[named[0]], scene.things[named[0]].at(scene.seconds)
        assert question.answer == last.colour != first.colour
    elif task == "direction":
        first, last = scene.things[named[0]], scene.things[named[0]].at(scene.seconds)
        sides = {
            "left": last.x < first.x,
            "right": last.x > first.x,
            "up": last.y < first.y,
            "down": last.y > first.y,
        }
        assert [side for side, true in sides.items() if true] == [question.answer]
    else:
        order = sorted(changes.values(), reverse="last" in question.prompt)
        assert len(order) < 2 or order[0][0] != order[1][0], "which was first is ambiguous"
        kind = order[0][1] if order else None
        assert CLAUSES.get(kind, "nothing") in question.answer


def check_visible_at(question, scene, times) -> bool:
    """Returns whether the question is about a time between two sampled frames."""
    moment = re.search(r"at (\d+\.\d) seconds", question.prompt)[1]
    frames = [time for time in times if f"{time:.1f}" == moment]
    between = not frames
    if between:
        later = next(index for index, time in enumerate(times) if time > float(moment))
        frames = times[later - 1 : later + 1]
        assert scene.at(frames[0]) == scene.at(float(moment)) == scene.at(frames[1])
    present = [thing.at(frames[0]) for thing in scene.things if thing.at(frames[0]) is not None]
    parts = question.answer.split(", ") if present else []
    present.sort(key=reading_order)
    assert [part.split()[1:4] for part in parts] == [[thing.size, thing.colour, thing.shape] for thing in present]
    return between


def test_answers_about_clips_agree_with_a_slow_search():
    checked = Counter()
    for i, scene in enumerate(CLIPS + MOVING):
        times, rng = sampled_times(scene, 1 + i % 2), random.Random(i)
        changes = first_changes(scene, times)
        assert len(changes) == sum(len(starts_of(thing)) for thing in scene.things), "an event that no frame shows"
        for task in CLIP_TASKS:
            question = ask_clip(task, scene, times, rng, plain=True)
            if question is None:
                check_missing_question(task, changes)
                continue
            checked[task] += 1
            if task == "visible at":
                checked["between"] += check_visible_at(question, scene, times)
            else:
                check_clip_answer(task, question, scene, changes)
    assert all(checked[task] for task in CLIP_TASKS)
    assert 0.1 < checked["between"] / checked["visible at"] < 0.25, "a quarter, minus clips without such a pair"
