"""Watched clips: what is right to say, its layout as a realtime session, lessons about it, and its examination."""

import random
from itertools import pairwise

import pytest
import torch
from nano_batches import make_processor as make_nano_processor
from nano_batches import one_font  # noqa: F401
from PIL import Image
from realtime import Script as Forced
from realtime import make_realtime_model, make_talking_model

from moss_vl.realtime_protocol import RESPONSE, SILENCE
from moss_vl.training.nano import evaluate_streams, rows, streams, watching
from moss_vl.training.nano.facts import FRAME_FACTS
from moss_vl.training.nano.lessons import Lessons
from moss_vl.training.nano.questions import name_of
from moss_vl.training.nano.rows import TASKS, visible_parts
from moss_vl.training.nano.streams import UNLIMITED, Player, QuickProtocol, paced_budgets
from moss_vl.training.nano.watching import Request, Requests, Script, Watch, random_script, watched_clip
from moss_vl.training.nano.world import Scene, Thing


STAR = Watch("appears", "star", 1)
CIRCLE = Watch("moves", "circle", 0)
SCENE = Scene(
    width=96,
    height=96,
    background=((255, 255, 255), (255, 255, 255)),
    things=(
        Thing("circle", "red", 0.3, 0.3, 0.2, moves=(3.5, 0.4, 0.0)),
        Thing("star", "blue", 0.7, 0.8, 0.1, appears=2.0, disappears=4.5),
    ),
    seconds=6.0,
    fps=24,
)
TIMES = tuple(map(float, range(6)))


@pytest.fixture(scope="module")
def processor():
    processor = make_nano_processor()
    processor.image_processor.size = {"shortest_edge": 64 * 64, "longest_edge": 96 * 96}
    return processor


@pytest.fixture(scope="module")
def model(processor):
    return make_realtime_model(processor)


@pytest.fixture(scope="module")
def protocol(processor):
    return QuickProtocol(processor, len(processor.tokenizer))


def tell(frame, *watches, with_frame=False):
    prompt = "Tell me when " + " and when ".join(watch.clause for watch in watches) + "."
    return Request(frame, "watch", prompt, watches, with_frame)


def transcript(protocol, requests, budgets=(UNLIMITED,) * 6, spoken=()) -> str:
    """What is written: after each frame its number, S for silence, R for a response; ? for a later prompt."""
    script = Script(SCENE, TIMES, tuple(requests))
    player = Player(
        protocol, script, list(budgets), spoken=[protocol.tokenizer.convert_tokens_to_ids(t) for t in spoken]
    )
    text = protocol.tokenizer.decode(player.play().ids).split("assistant\n", 1)[1]
    for request in requests[1:]:
        text = text.replace(
            f"<|im_end|>\n<|im_start|>user\n{request.prompt}<|im_end|>\n<|im_start|>assistant\n{SILENCE}", "?"
        )
    for number, time in enumerate(TIMES):
        frame = f"<|vision_start|><|time_start|>{time:.1f} seconds<|time_end|><|image_pad|><|vision_end|>"
        assert text.count(frame) == 1
        text = text.replace(frame, f" {number}")
    return text.replace(SILENCE, "S").replace(RESPONSE, "R")


STANDING = {
    "appears": ([tell(0, STAR)], "S 0S 1S 2Rthe star appearsS 3S 4S 5S"),
    "moves": ([tell(0, CIRCLE)], "S 0S 1S 2S 3S 4Rthe circle movesS 5S"),
    "never": ([tell(0, Watch("appears", "ring", None))], "S 0S 1S 2S 3S 4S 5S"),
    "two": ([tell(0, CIRCLE, STAR)], "S 0S 1S 2Rthe star appearsS 3S 4Rthe circle movesS 5S"),
    "replaced": ([tell(0, STAR), tell(1, CIRCLE)], "S 0S?S 1S 2S 3S 4Rthe circle movesS 5S"),
    "with its frame": ([tell(0, CIRCLE), tell(2, STAR, with_frame=True)], "S 0S 1S? 2Rthe star appearsS 3S 4S 5S"),
    "describe": (
        [Request(0, "describe", "Describe what happens.")],
        "S 0S 1S 2Ra small blue star appears at the bottom rightS 3S 4Rthe circle moves rightS 5Rthe star disappearsS",
    ),
    "now": (
        [tell(0, CIRCLE), Request(3, "now", "What do you see now?")],
        "S 0S 1S 2S?Ra large red circle at the top left, a small blue star at the bottom rightS 3S 4Rthe circle "
        "movesS 5S",
    ),
    "now, before any frame": (
        [Request(0, "now", "What do you see?")],
        "S 0Ra large red circle at the top leftS 1S 2S 3S 4S 5S",
    ),
    "past": (
        [tell(0, CIRCLE), Request(4, "past", "When did the star appear?", (STAR,))],
        "S 0S 1S 2S 3S?R2.0 secondsS 4Rthe circle movesS 5S",
    ),
    "not yet": (
        [tell(0, STAR), Request(2, "past", "When did the star appear?", (STAR,))],
        "S 0S 1S?Rnot yetS 2Rthe star appearsS 3S 4S 5S",
    ),
}


@pytest.mark.parametrize("name", STANDING)
def test_what_is_right_to_say(protocol, name):
    requests, expected = STANDING[name]
    assert transcript(protocol, requests) == expected


def test_frames_interrupt_a_reply(protocol):
    """A piece of the reply per frame; an event meanwhile is added; a prompt ends the reply."""
    describe = Request(0, "describe", "Describe what happens.")
    slow = transcript(protocol, [describe], [2, 2, 2, 2, 2, 2])
    assert slow.startswith("S 0S 1S 2Ra") and slow.count("R") == 4 and slow.endswith("S")
    words = slow.split(" 2R")[1].replace("R", "")
    for number in (3, 4, 5):
        words = words.replace(f" {number}", "", 1)
    assert words == "a small blue star appears at the bottom right; the circle moves right; the star disappearsS"
    asked = transcript(protocol, [describe, Request(3, "past", "When did the star appear?", (STAR,))], [3] * 6)
    assert "?R2." in asked and "bottom" not in asked


def test_what_follows_a_wrong_token(protocol):
    missed = transcript(protocol, [tell(0, STAR)], spoken=[SILENCE] * 4)
    assert missed == "S 0S 1S 2S 3S 4S 5S"
    false = transcript(protocol, [tell(0, STAR)], spoken=[SILENCE, RESPONSE, "a"])
    assert false == "S 0RaS 1S 2Rthe star appearsS 3S 4S 5S"


# sessions


def drive(stream, script, pictures, budgets, opens=True):
    """Plays a script with a `RealtimeStream`."""

    def write(budget):
        for _ in range(min(budget, streams.MOST_WRITTEN)):
            stream.step()
            if stream.is_silent:
                return

    stream.step()
    for frame, (time, picture) in enumerate(zip(script.times, pictures, strict=True)):
        for request in script.requests:
            if 0 < request.frame == frame:
                stream.push_prompt(request.prompt)
                if not request.with_frame:
                    write(budgets[frame - 1])
        stream.push_frame(picture, time)
        write(UNLIMITED if frame + 1 == len(script.times) else budgets[frame])
    return stream


def opening(script) -> str:
    return script.requests[0].prompt if script.requests and script.requests[0].frame == 0 else ""


def frames_of(scene, times) -> list[Image.Image]:
    """The pictures that `evaluate_streams.draw_frames` reads."""
    kept = []

    class Keeper:
        def preprocess(self, pictures, **options):
            kept.extend(pictures)
            return {
                "pixel_values": torch.zeros(len(pictures) * 4, 3),
                "image_grid_thw": torch.tensor([[1, 2, 2]] * len(pictures)),
            }

    moments = evaluate_streams.draw_frames(Keeper(), scene, times).moments
    return [kept[moment] for moment in moments]


def random_scripts(count, seconds=8):
    rng = random.Random(1)
    for _ in range(count):
        scene = watched_clip(rng, seconds, (96, 128))
        yield random_script(rng, scene, [float(time) for time in range(seconds)]), streams.random_budgets(rng, seconds)


@torch.no_grad()
def test_a_row_of_lessons_is_a_session(processor, model, protocol):
    """Ids are equal, and the logits of every written token."""
    for script, budgets in random_scripts(6):
        laid = Player(protocol, script, budgets).play()
        forced = Forced(processor)
        forced.tokens = list(laid.tokens)
        stream = model.create_realtime_stream(processor, opening(script), logits_processor=[forced])
        drive(stream, script, frames_of(script.scene, script.times), budgets)
        assert stream.ids == laid.ids and not forced.tokens

        drawn = evaluate_streams.draw_frames(processor.image_processor, script.scene, script.times)
        row = rows.stream_text(processor.tokenizer, laid, drawn.merged, silence=0.5, happening=set())
        half = [[0.5, 0.5, 0.5]] * len(drawn.pixels)
        features = model.get_image_features(
            drawn.pixels.flatten(0, 1),
            torch.tensor([[1, *drawn.grid]] * len(drawn.pixels)),
            image_mean=half,
            image_std=half,
        ).pooler_output.unflatten(0, (len(drawn.pixels), -1))
        logits = model(
            input_ids=torch.tensor([row.ids]),
            attention_mask=visible_parts(torch.tensor([row.parts])),
            position_ids=torch.tensor([row.positions]),
            image_features=features[drawn.moments].flatten(0, 1),
            grid_thw=torch.tensor([[len(script.times), *drawn.grid]]),
            media_nums_per_sample=[1],
        ).logits[0]
        for one, (_, seen) in zip(laid.written, forced.seen, strict=True):
            assert (logits[one.index - 1] - seen).abs().max() < 1e-4 * seen.abs().max()


@torch.no_grad()
def test_streams_in_a_batch_are_those_of_sessions():
    """With a model that says "red star" at every frame, and "Yes" to every prompt."""
    processor, model = make_talking_model()
    scripts = [script for script, _ in random_scripts(3, seconds=6)]
    items = [evaluate_streams.Item("describe", script) for script in scripts]
    found = dict(evaluate_streams.ask(model, processor, items, size=2, workers=0))
    said = 0
    for item in items:
        stream = model.create_realtime_stream(processor, opening(item.script), max_new_tokens=streams.MOST_WRITTEN)
        budgets = paced_budgets(item.script.times, evaluate_streams.TOKENS_PER_SECOND)
        drive(stream, item.script, frames_of(item.script.scene, item.script.times), budgets)
        assert stream.ids == found[item].ids
        said += len(evaluate_streams.replies(found[item], QuickProtocol(processor, len(processor.tokenizer))))
    assert said >= 6 * len(items)


# clips and requests


CLIPS = [watched_clip(random.Random(f"watched {number}"), number % 17 + 6) for number in range(120)]


def test_events_are_a_second_apart_and_of_every_kind():
    kinds, several = set(), 0
    for scene in CLIPS:
        times = [number / 8 for number in range(int(8 * scene.seconds))]
        events = watching.events_of(scene, times)
        kinds |= {event.kind for event in events}
        several += len({event.number for event in events}) < len(events)
        assert all(later.time - sooner.time > 0.7 for sooner, later in pairwise(events))
        for event in events:
            course = [other.kind for other in events if other.number == event.number]
            if len(course) > 1 and "changes" in course:
                assert name_of(event.thing, scene.things) == event.thing.shape
    assert kinds == set(watching.KINDS) and several > 10


def test_requests_are_answered_once_or_never():
    """An event that comes is said at one frame; one that does not come, at none."""
    for number, scene in enumerate(CLIPS):
        times = [float(time) for time in range(int(scene.seconds))]
        ask = Requests(random.Random(number), scene, times)
        for comes in (True, False):
            request = ask.watch(comes=comes)
            if request is None:
                assert comes and not ask.events
                continue
            script = Script(scene, tuple(times), (request,))
            said = [clause for frame in range(len(times)) for clause in script.clauses(request, frame)]
            assert said == ([request.watches[0].clause] if comes else [])
        described = Script(scene, tuple(times), (ask.describe(),))
        said = [clause for frame in range(len(times)) for clause in described.clauses(described.requests[0], frame)]
        assert said == [event.clause for event in ask.events]


def test_absent_things_are_named_without_ambiguity():
    """A name of a thing that is not there fits no thing of the clip, at any time."""
    named = 0
    for number, scene in enumerate(CLIPS):
        watch = Requests(random.Random(number), scene, [float(time) for time in range(int(scene.seconds))]).absent()
        if watch.number is None:
            *colour, shape = watch.name.split()
            fitting = [
                thing for thing in scene.things
                if thing.shape == shape and (not colour or colour[0] in watching.colours_of(thing))
            ]  # fmt: skip
            assert not fitting
            named += 1
    assert named > 20


# lessons


def test_lessons_about_streams(processor, protocol):
    """Exactly the written tokens are learned; frames attend to the standing request; due frames are told."""
    fires = [name for name, _ in FRAME_FACTS].index("fires")
    batch = Lessons(processor, seed=0, size=8).batch(0, "streams", 0.5)
    pad = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    silence, response = (processor.tokenizer.convert_tokens_to_ids(token) for token in (SILENCE, RESPONSE))
    ids, labels, weights = batch["input_ids"], batch["labels"], batch["weights"]
    learned = labels != -100
    assert torch.equal(labels[learned], ids[learned]) and (ids[learned] != processor.tokenizer.eos_token_id).all()
    assert torch.equal(weights > 0, learned) and (labels[learned] != pad).all()
    assert (ids == pad).sum() == len(batch["frame_facts"]) == sum(t for t, _, _ in batch["grid_thw"])
    assert len(batch["gather"]) == sum(t * h * w // 4 for t, h, w in batch["grid_thw"])
    assert batch["gather"].max() == sum(h * w // 4 for _, h, w in batch["picture_grids"]) - 1
    assert batch["pixel_values"].dtype == torch.uint8
    assert set(batch["frame_facts"][:, fires].tolist()) == {0, 1}
    silent = (ids == silence) & (batch["tasks"] == TASKS.index(rows.SILENT))
    assert (weights[silent] < 1).float().mean() > 0.5 and (
        weights[ids == response][learned[ids == response]] == 1
    ).all()
    for row, _, text, token, _ in batch["attention"]["request"].tolist():
        assert ids[row, text] == pad and token < text and not learned[row, token]


def test_frames_attend_to_what_the_request_names_and_to_what_shall_happen(protocol):
    """Some heads attend to the names of things, others to the verbs; all to a request without either."""
    describe = Request(0, "describe", "Describe what happens.")
    expected = {
        "two": ([tell(0, CIRCLE, STAR)], (["circle", "star"], ["moves", "appears"])),
        "color": ([tell(0, Watch("changes", "red circle", 0))], (["red", "circle"], ["changes"])),
        "replaced": ([tell(0, STAR), tell(2, CIRCLE, with_frame=True)], (["circle"], ["moves"])),
        "describe": ([describe], (["Describe", "what", "happens", "."],) * 2),
    }
    for name, (requests, words) in expected.items():
        stream = Player(protocol, Script(SCENE, TIMES, tuple(requests)), [UNLIMITED] * 6).play()
        row = rows.stream_text(protocol.tokenizer, stream, (2, 2), silence=1.0, happening=set())
        pad, *found = row.requests[-1]
        assert pad == stream.pads[-1]
        assert "".join(words[0]) == "".join(
            protocol.tokenizer.decode([row.ids[index]]).strip() for index in found[0]
        ), name
        assert "".join(words[1]) == "".join(
            protocol.tokenizer.decode([row.ids[index]]).strip() for index in found[1]
        ), name


def test_silent_decisions_weigh_more_at_the_end(processor):
    make = Lessons(processor, seed=0, size=8)
    weights = []
    for progress in (0.0, 0.6):
        batch = make.batch(0, "streams", progress)
        weights.append(batch["weights"][batch["tasks"] == TASKS.index(rows.SILENT)].unique().tolist())
    assert weights == [pytest.approx([0.2, 1.0]), pytest.approx([0.56, 1.0])]


def test_streams_are_long_only_in_the_last_third(processor):
    make = Lessons(processor, seed=0, size=8)
    short, long = (
        max(max(t for t, _, _ in make.batch(step, "streams", progress)["grid_thw"]) for step in range(12))
        for progress in (0.6, 0.7)
    )
    assert short <= 40 < long


# examination


def test_scores():
    right = [(2, "the star appears"), (5, "the circle moves")]
    late = [(3, "the star appears"), (5, "the circle moves")]
    wrong = [(2, "the star moves"), (5, "the circle moves")]
    early = [(1, "the star appears"), (5, "the circle moves")]
    score = evaluate_streams.scores
    assert score(right, right) == {"exact": 1, "false alarms": 0, "within a frame": 1, "words": 1}
    assert score(late, right) == {"exact": 0, "false alarms": 0, "within a frame": 1, "words": 1}
    assert score(wrong, right) == {"exact": 0, "false alarms": 0, "within a frame": 1, "words": 0}
    assert score(early, right) == {"exact": 0, "false alarms": 0, "within a frame": 0}
    assert score(right[:1], right) == {"exact": 0, "false alarms": 0, "within a frame": 0}
    assert score([*right, (6, "x")], right) == {"exact": 0, "false alarms": 1, "within a frame": 0}
    assert score([], []) == {"exact": 1, "false alarms": 0}
    assert score([(0, "x")], []) == {"exact": 0, "false alarms": 1}


def test_the_examination_asks_as_its_tasks_say(protocol):
    items = evaluate_streams.examination(evaluate_streams.TASKS, 3, 2, seed=1)
    count = {}
    for item in items:
        count[item.task, item.column] = count.get((item.task, item.column), 0) + 1
        script = item.script
        seconds = evaluate_streams.LONG_SECONDS if item.column == evaluate_streams.LONGER else evaluate_streams.SECONDS
        assert script.scene.seconds == seconds and script.times[0] == 0 and script.times[-1] >= seconds - 1
        right = evaluate_streams.replies(Player(protocol, script, [UNLIMITED] * len(script.times)).play(), protocol)
        if item.task in evaluate_streams.EVENT_TASKS:
            (watch,) = script.requests[0].watches
            assert [words for _, words in right] == [watch.clause] and watch.kind == evaluate_streams.EVENT_TASKS[
                item.task
            ]
        elif item.task == "never comes":
            assert right == []
        elif item.task in ("see now", "past"):
            frame = script.requests[1].frame - (not script.requests[1].with_frame)
            assert [place for place, _ in right] == [frame]
    assert count == {
        (task, column): n
        for task in evaluate_streams.TASKS
        for column, n in (("", 3), ("60 seconds", 2), ("blanked", 2))
    }


def test_the_table_of_the_examination(monkeypatch):
    """With a model that says "red star" at every frame: every answer is wrong, and there are false alarms."""
    monkeypatch.setattr(evaluate_streams, "SECONDS", 4)
    monkeypatch.setattr(evaluate_streams, "LONG_SECONDS", 5)
    processor, model = make_talking_model()
    items = evaluate_streams.examination(["never comes", "appears"], 2, 1, seed=1)
    found = evaluate_streams.examine(model, processor, items, 4, 0)
    assert list(found) == ["appears", "never comes"] and found["appears"]["n"] == 2
    assert found["never comes"] == {"n": 2, "exact": 0, "false alarms": 1} | {
        column: {"n": 1, "exact": 0, "false alarms": 1} for column in evaluate_streams.CONTROLS
    }
    lines = evaluate_streams.table({"watching": found}).splitlines()
    assert lines[2].startswith("| appears | 2 | 0.0% | 0.0% |  | 100.0% |") and len(lines) == 4
