"""Live sessions: the methods that callers use, threads, pace, several sessions on one model, and the queues."""

import asyncio
import copy
import gc
import inspect
import os
import queue
import re
import threading
import time
import weakref
from contextlib import contextmanager

import pytest
import torch
from conftest import ROOT
from realtime import (
    RESPONSE,
    SILENCE,
    Script,
    make_processor,
    make_realtime_model,
    make_tokenizer,
    model,  # noqa: F401
    names,
    picture,
    processor,  # noqa: F401
    raw,
    run,
    stream,
)
from tiny import close

from moss_vl.realtime_events import Failed, Parked
from moss_vl.realtime_scheduler import scheduler_of
from moss_vl.realtime_stream import RealtimeStream


DEVICE = os.environ.get("MOSS_VL_GPU_TESTS", "cuda")


@pytest.fixture(autouse=True)
def no_thread_is_left(model):
    yield
    deadline = time.monotonic() + 10
    while any(thread.name == "moss-vl-realtime" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the thread of the sessions goes on"
        time.sleep(0.01)


def open_session(model, processor, *words, free=False, pace=None, **options):
    script = Script(processor, *words, free=free)
    made = model.create_realtime_session(processor, max_tokens_per_turn=pace, logits_processor=[script], **options)
    return made, script


def until(session, kind, limit=30) -> list:
    """Events up to the first one of this kind."""
    events, deadline = [], time.monotonic() + limit
    while time.monotonic() < deadline:
        event = session.output.get(limit)
        assert event is not None, f"the session ended after {names(events)}"
        events.append(event)
        if names([event]) == [kind]:
            return events
    raise AssertionError(f"no {kind} in {names(events)}")


# the interface


def test_the_signatures_are_those_that_people_use(model, processor):
    create = inspect.signature(model.create_realtime_session)
    assert [*create.parameters] == [
        "processor", "initial_prompt", "system_prompt", "frame_queue_size", "max_tokens_per_turn", "generate_kwargs",
    ]  # fmt: skip
    defaults = {name: p.default for name, p in create.parameters.items()}
    assert (defaults["initial_prompt"], defaults["system_prompt"], defaults["frame_queue_size"]) == ("", None, 256)
    online = inspect.signature(model.online_generate)
    assert [*online.parameters] == [
        "processor", "input_queue", "output_queue", "frame_queue_size", "max_tokens_per_turn", "generate_kwargs",
    ]  # fmt: skip
    session, _ = open_session(model, processor)
    assert [*inspect.signature(session.push_frame).parameters][:3] == ["image", "timestamp", "drop_oldest"]
    assert [*inspect.signature(session.push_prompt_frame).parameters][:3] == ["prompt", "image", "timestamp"]
    assert inspect.signature(session.poll_output).parameters["timeout"].default == 1.0
    assert inspect.signature(session.close).parameters["timeout"].default == 5.0


def test_a_session_gives_the_strings_of_its_stream(model, processor):
    session, script = open_session(model, processor, SILENCE, RESPONSE, "red", SILENCE, RESPONSE, " star", SILENCE)
    assert not session.active and session.pending_frames == 0
    session.start()
    assert session.active
    assert session.poll_output(30) == SILENCE
    assert session.push_frame(picture(1), timestamp=1.0) is False
    assert [session.poll_output(30) for _ in range(3)] == [RESPONSE, "red", SILENCE]
    assert session.push_prompt_frame("What is this?", picture(2), timestamp=2.5) is False
    assert [session.poll_output(30) for _ in range(4)] == ["<|round_start|>", RESPONSE, " star", SILENCE]
    assert session.poll_output(timeout=0.01) is None
    session.push_prompt("Bye.")
    assert [session.poll_output(30) for _ in range(2)] == ["<|round_start|>", SILENCE]
    assert session.close() and not session.active
    assert session.poll_output(30) is None, "at once, after the end"


def test_live_tokens_are_those_of_the_stream_without_threads(model, processor):
    made, _ = stream(model, processor, free=True, max_new_tokens=9)
    run(made)
    made.push_prompt("What color?")
    expected = raw(run(made))
    session, _ = open_session(model, processor, free=True, max_new_tokens=9)
    with session:
        until(session, "Parked")
        session.push_prompt("What color?")
        assert raw(until(session, "Parked")) == expected


def test_times_are_counted_from_the_start_if_none_are_given(model, processor):
    session, _ = open_session(model, processor)
    with session:
        until(session, "Parked")
        begin = time.monotonic()
        session.push_frame(picture(1))
        first = until(session, "FrameTaken")[-1].seconds
        session.push_frame(picture(2), 100.0)
        session.push_frame(picture(3))
        events = until(session, "Parked")
        while sum(names([event]) == ["FrameTaken"] for event in events) < 2:
            events += until(session, "Parked")
        assert 0 <= first <= time.monotonic() - begin + 60
        assert [event.seconds for event in events if names([event]) == ["FrameTaken"]][-2:] == [100.0, 100.0]
        with pytest.raises(ValueError, match="do not fall"):
            session.push_frame(picture(1), 99.0)


def test_frames_before_the_start_are_taken_in_after_it(model, processor):
    session, _ = open_session(model, processor, frame_queue_size=2)
    assert [session.push_frame(picture(i), float(i)) for i in range(3)] == [False, False, True]
    assert session.pending_frames == 2
    with session:
        events = until(session, "Parked")
    assert names(events) == ["Silence", "FrameDropped", "FrameTaken", "FrameTaken", "Silence", "Parked"]


def test_without_dropping_a_push_waits_for_space(model, processor):
    session, _ = open_session(model, processor, frame_queue_size=1)
    session.push_frame(picture(0), 0, drop_oldest=False)
    with pytest.raises(queue.Full):
        session.push_frame(picture(1), 1, drop_oldest=False)
    with pytest.raises(queue.Full):
        session.push_frame(picture(1), 1, drop_oldest=False, timeout=0.01)
    session.start()
    for seconds in range(1, 6):
        assert session.push_frame(picture(seconds), seconds, drop_oldest=False, timeout=None) is False
    session.end()
    taken = [event.seconds for event in session.events() if names([event]) == ["FrameTaken"]]
    assert taken == [0, 1, 2, 3, 4, 5]
    session.close()


def test_events_are_iterated_and_end_with_the_source(model, processor):
    session, _ = open_session(model, processor, SILENCE, RESPONSE, "red", SILENCE, initial_prompt="Tell me.")
    session.push_frame(picture(1), 1)
    session.end()
    session.start()
    found = names(session.events())
    assert session.close(30)
    assert found == ["PromptTaken", "Silence", "FrameTaken", "ResponseBegins", "Text", "ReplyEnds", "Ended"]


def test_events_in_an_event_loop(model, processor):
    session, _ = open_session(model, processor, SILENCE, RESPONSE, "red", SILENCE)

    async def watch():
        found = []
        async for event in session.events():
            found.append(type(event).__name__)
            if isinstance(event, Parked) and "FrameTaken" not in found:
                session.push_frame(picture(1), 1)
            elif isinstance(event, Parked):
                session.end()
        return found

    async def with_a_neighbour():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                await asyncio.sleep(0)
                ticks += 1

        ticking = asyncio.ensure_future(tick())
        found = await asyncio.wait_for(watch(), 60)
        ticking.cancel()
        return found, ticks

    with session:
        found, ticks = asyncio.run(with_a_neighbour())
    assert found == [
        "Silence", "Parked", "FrameTaken", "ResponseBegins", "Text", "ReplyEnds", "Parked", "Ended",
    ]  # fmt: skip
    assert ticks > 1, "the loop went on while the session was waited for"


def test_an_interruption_from_another_thread(model, processor):
    session, script = open_session(model, processor, SILENCE, RESPONSE, *["red"] * 5000)
    with session:
        session.push_frame(picture(1), 1)
        until(session, "Text")
        session.interrupt()
        ended = until(session, "ReplyEnds")[-1]
        assert ended.reason == "interrupted" and ended.text.startswith("red")
        until(session, "Parked")
        script.tokens.clear()
        for _ in range(3):
            session.interrupt()  # there is nothing to end, and nothing is reported
            time.sleep(0.05)
        session.push_frame(picture(2), 2)
        assert names(until(session, "Parked")) == ["FrameTaken", "Silence", "Parked"], "it goes on"
    assert session.stream.cache is None


# errors and ends


def test_an_error_arrives_at_the_caller_and_ends_only_its_session(model, processor):
    def broken(input_ids, scores):
        raise RuntimeError("no luck")

    bad = model.create_realtime_session(processor, logits_processor=[broken])
    good, _ = open_session(model, processor)
    with good:
        with bad:
            [failed] = bad.events()
            assert isinstance(failed, Failed) and failed.message == "no luck" and not bad.active
            with pytest.raises(ValueError, match="ended by an error: no luck"):
                bad.push_frame(picture(1), 1)
            with pytest.raises(ValueError, match="ended by an error: no luck"):
                bad.push_prompt("What?")
        good.push_prompt("What?")
        until(good, "PromptTaken")
        assert good.active
    again = model.create_realtime_session(processor, logits_processor=[broken])
    with again, pytest.raises(RuntimeError, match="no luck"):
        again.poll_output(30)
    assert again.poll_output(0) is None


def test_a_closed_session_refuses_and_lets_nobody_wait(model, processor):
    session, _ = open_session(model, processor, frame_queue_size=1)
    session.push_frame(picture(1), 1)
    waiting = []

    def push():
        try:
            session.push_frame(picture(2), 2, drop_oldest=False, timeout=None)
        except ValueError as error:
            waiting.append(str(error))

    threads = [
        threading.Thread(target=push),
        threading.Thread(target=lambda: waiting.append(session.poll_output(None))),
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    assert session.close()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert sorted(map(str, waiting)) == ["None", "the session has ended; create another one"]
    for call in (lambda: session.push_prompt("a"), lambda: session.push_frame(picture(1), 3), session.start):
        with pytest.raises(ValueError):
            call()
    assert session.close(), "again"


def test_close_frees_the_caches_and_the_thread_while_a_reply_is_written(processor):
    model = make_realtime_model(processor)
    session, _ = open_session(model, processor, RESPONSE, *["red"] * 5000)
    session.start()
    until(session, "Text")
    cache = weakref.ref(session.stream.cache)
    assert session.close(30)
    assert session.scheduler.thread is None
    gc.collect()
    assert cache() is None
    reference = weakref.ref(model)
    del session, model
    gc.collect()
    assert reference() is None, "nothing keeps the model"


def test_close_within_a_step_frees_the_caches(model, processor):
    """A caller's function, on the thread of the sessions, closes its own session and a parked one."""
    parked, _ = open_session(model, processor)
    opened = []

    def close_all(input_ids, scores):
        for session in opened:
            assert session.close()
        return scores

    own = model.create_realtime_session(processor, logits_processor=[close_all])
    parked.start()
    until(parked, "Parked")
    opened += [own, parked]
    own.start()
    deadline = time.monotonic() + 30
    while own.scheduler.thread is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert own.stream.cache is None and parked.stream.cache is None


def test_a_close_that_does_not_wait_frees_the_caches_after_the_step(model, processor):
    begun, go_on = threading.Event(), threading.Event()

    def wait(input_ids, scores):
        begun.set()
        assert go_on.wait(30)
        return scores

    session = model.create_realtime_session(processor, logits_processor=[wait]).start()
    assert begun.wait(30) and not session.close(0)
    go_on.set()
    deadline = time.monotonic() + 30
    while session.scheduler.thread is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert session.stream.cache is None


def test_a_session_leaves_no_trace_on_the_model(model, processor):
    before = {*vars(model)}
    session, _ = open_session(model, processor)
    with session:
        until(session, "Parked")
        assert scheduler_of(model) is session.scheduler
        assert {*vars(model)} == before
        copy.deepcopy(model)
    assert model.training is False and {*vars(model)} == before


def test_an_idle_session_takes_no_processor_time(model, processor):
    """Wake-ups of the thread, not seconds: while the session is parked, the scheduler does not look at it."""
    session, _ = open_session(model, processor)
    looks = []
    due = session.due_at
    session.due_at = lambda: (looks.append(1), due())[1]
    with session:
        until(session, "Parked")
        time.sleep(0.05)
        count = len(looks)
        time.sleep(0.3)
        assert len(looks) == count
        session.push_prompt("What?")
        until(session, "Parked")


def test_the_pace_slows_writing_and_not_seeing(model, processor):
    session, script = open_session(model, processor, SILENCE, RESPONSE, "red", *["red"] * 50, pace=0.01)
    with session:
        until(session, "Parked")
        session.push_frame(picture(1), 1)
        until(session, "ResponseBegins")
        session.push_frame(picture(2), 2)  # the next token would be due in 100 seconds
        assert names(until(session, "Text")) == ["FrameTaken", "Text"]
        assert session.due_at() > time.monotonic() + 50
    fast, _ = open_session(model, processor, SILENCE, RESPONSE, *["red"] * 4, SILENCE, pace=40)
    with fast:
        until(fast, "Parked")
        begin = time.monotonic()
        fast.push_frame(picture(1), 1)
        until(fast, "ReplyEnds")
        assert time.monotonic() - begin >= 3 / 40


@pytest.mark.parametrize("pace", [0, -1, "fast", True])
def test_a_wrong_pace(model, processor, pace):
    with pytest.raises(ValueError, match="max_tokens_per_turn must be"):
        model.create_realtime_session(processor, max_tokens_per_turn=pace)


def test_the_example_of_the_documentation(model, processor, capsys):
    page = (ROOT / "docs/realtime.md").read_text()
    [code] = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    frames = [(picture(number), float(number)) for number in range(3)]
    with patched_defaults(model, processor):
        exec(compile(code, "docs/realtime.md", "exec"), {"model": model, "processor": processor, "frames": frames})
    printed = capsys.readouterr().out
    assert printed.count("FrameTaken(") == 3 and printed.rstrip().split("\n")[-1].startswith("Ended(")


@contextmanager
def patched_defaults(model, processor):
    """Sessions of a model that stays silent."""
    create = model.create_realtime_session
    model.create_realtime_session = lambda *args, **kwargs: create(
        *args, **kwargs, logits_processor=[Script(processor)]
    )
    try:
        yield
    finally:
        del model.create_realtime_session


# several sessions


class Recorder:
    """Records the logits of a free model."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append((input_ids[0].tolist(), scores[0].clone()))
        return scores


PROMPTS = ["What color?", "Where?", "", "Tell me everything that you see."]


@pytest.mark.parametrize("joint", ["joint", "joint calls fail"])
def test_sessions_at_once_each_get_what_they_get_alone(model, processor, joint, monkeypatch):
    rows, decode_rows = [], model.decode_rows

    def counted(tokens, caches):
        rows.append(len(tokens))
        if joint != "joint":
            raise torch.OutOfMemoryError("too many rows")
        return decode_rows(tokens, caches)

    monkeypatch.setattr(model, "decode_rows", counted)
    alone = []
    for number, prompt in enumerate(PROMPTS):
        recorder = Recorder()
        made = RealtimeStream(model, processor, max_new_tokens=12, logits_processor=[recorder])
        run(made)
        made.push_frame(picture(number, 64, 96), 1.0, prompt)
        run(made)
        alone.append((made.ids, recorder.seen))
    recorders = [Recorder() for _ in PROMPTS]
    options = {"max_tokens_per_turn": None, "max_new_tokens": 12}
    sessions = [
        model.create_realtime_session(processor, logits_processor=[recorder], **options) for recorder in recorders
    ]
    for session in sessions:
        session.start()
    for session in sessions:
        until(session, "Parked")
    for number, session in enumerate(sessions):
        session.push_prompt_frame(PROMPTS[number], picture(number, 64, 96), 1.0)
    for session, recorder, (ids, seen) in zip(sessions, recorders, alone, strict=True):
        until(session, "FrameTaken")
        until(session, "Parked")
        assert session.stream.ids == ids and len(seen) == 24
        for (tokens, logits), (tokens_alone, logits_alone) in zip(recorder.seen, seen, strict=True):
            assert tokens == tokens_alone
            close(logits, logits_alone)
    assert max(rows) == len(PROMPTS), "steps that only write share a forward"
    assert {id(session.scheduler) for session in sessions} == {id(scheduler_of(model))}
    for session in sessions:
        assert session.close(30)


def test_no_session_waits_for_the_reply_of_another(model, processor):
    """Fair turns: while two sessions write long replies, a third takes in its frames."""
    writers = [open_session(model, processor, RESPONSE, *["red"] * 100000, max_new_tokens=10**6)[0] for _ in range(2)]
    watcher, _ = open_session(model, processor)
    for session in (*writers, watcher):
        session.start()
    for session in writers:
        until(session, "Text")
    until(watcher, "Parked")
    for seconds in range(5):
        written = [len(session.stream.ids) for session in writers]
        watcher.push_frame(picture(seconds), seconds)
        assert names(until(watcher, "Parked")) == ["FrameTaken", "Silence", "Parked"]
        steps = [len(session.stream.ids) - before for session, before in zip(writers, written, strict=True)]
        assert abs(steps[0] - steps[1]) <= 1
    for session in (*writers, watcher):
        assert session.close(30)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_sessions_on_a_gpu(model, processor, dtype, limit):
    """Two live sessions with a window, whose frames and tokens share the device with each other's; their logits are
    those of streams in float32 on the CPU that write the same."""
    placed = make_realtime_model(processor, dtype).to(DEVICE)
    recorders = [Recorder(), Recorder()]
    for number, recorder in enumerate(recorders):
        session = placed.create_realtime_session(
            processor, max_tokens_per_turn=None, max_new_tokens=6, window_frames=2, logits_processor=[recorder]
        )
        recorder.session = session.start()
        until(session, "Parked")
    for seconds in range(4):
        for recorder in recorders:
            recorder.session.push_frame(picture(seconds, 64, 96), seconds)
        for recorder in recorders:
            until(recorder.session, "FrameTaken")
            until(recorder.session, "Parked")
    for recorder in recorders:
        ids = recorder.session.stream.ids
        assert recorder.session.close(60)
        made, script = stream(model, processor, max_new_tokens=6, window_frames=2)
        script.tokens = [ids[len(seen)] for seen, _ in recorder.seen]
        run(made)
        for seconds in range(4):
            made.push_frame(picture(seconds, 64, 96), seconds)
            run(made)
        assert made.ids == ids and len(script.seen) == len(recorder.seen)
        for (seen, expected), (same, found) in zip(script.seen, recorder.seen, strict=True):
            assert seen == same
            off = (found.float().cpu() - expected).norm() / expected.norm()
            assert off < limit, f"token {len(seen) - 1}: off by {off:.1e}"


# queues of dicts and strings


def serve(model, processor, *messages, **options):
    asked, said = queue.Queue(), queue.Queue()
    for message in messages:
        asked.put(message)
    model.online_generate(processor, asked, said, max_tokens_per_turn=None, **options)
    assert asked.empty()
    return [said.get() for _ in range(said.qsize())]


START = {"initial_prompt": "", "system_prompt": None, "frame_queue_size": 8, "max_tokens_per_turn": 10000}
STOP = {"stop_online_generate": True}


def test_a_session_over_queues(model, processor):
    script = Script(processor, SILENCE, RESPONSE, "red", SILENCE)
    said = serve(
        model,
        processor,
        START,
        {"frame": picture(1), "timestamp": 1.0, "prompt": "What?"},
        {"frame": picture(2), "timestamp": 2.0, "drop_oldest": False},
        STOP,
        logits_processor=[script],
    )
    text = "".join(said)
    assert text.startswith(f"{SILENCE}<|round_start|>{RESPONSE}") and "red" in text and text.endswith(SILENCE)
    assert processor.tokenizer.decode(script.seen[-1][0]).count("<|image_pad|>") == 2, "nothing that waits is lost"


def test_errors_in_messages_are_strings_and_the_session_goes_on(model, processor):
    said = serve(
        model,
        processor,
        {**START, "initial_prompt": "Tell me."},
        {"frames": picture(1)},
        "frame",
        {"frame": b"no image"},
        {"frame": picture(1), "timestamp": 5},
        {"frame": picture(1), "timestamp": 4},
        {"prompt": "What?"},
        STOP,
        logits_processor=[Script(processor)],
    )
    errors = [text for text in said if text.startswith("[ERROR]")]
    assert [error.split(" ", 1)[1][:20] for error in errors] == [
        "a message: unknown k",
        "a message must be a ",
        "image of 8 bytes is ",
        "the frame's time is ",
    ]
    rest = [text for text in said if not text.startswith("[ERROR]")]
    assert rest[:2] == ["<|round_start|>", SILENCE] and rest.count("<|round_start|>") == 2 and rest[-1] == SILENCE


@pytest.mark.parametrize(
    "first, error",
    [({"initial_prompt": 3}, "initial_prompt must be"), ({"system": "x"}, "unknown key"), (5, "must be a dict")],
)
def test_a_wrong_start_is_an_error_string(model, processor, first, error):
    [said] = serve(model, processor, first)
    assert said.startswith("[ERROR] ") and error in said


def test_a_failing_session_over_queues_ends(model, processor):
    def broken(input_ids, scores):
        raise RuntimeError("no luck")

    said = queue.Queue()
    asked = queue.Queue()
    thread = threading.Thread(
        target=model.online_generate, args=(processor, asked, said), kwargs={"logits_processor": [broken]}
    )
    thread.start()
    asked.put({})
    assert said.get(timeout=30) == "[ERROR] no luck"
    asked.put({"frame": picture(1)})
    thread.join(30)
    assert not thread.is_alive()


def test_another_checkpoint_is_an_error(model):
    with pytest.raises(ValueError, match="not a realtime checkpoint"):
        model.create_realtime_session(make_processor(make_tokenizer(())))
    [said] = serve(model, make_processor(make_tokenizer(())), {})
    assert said.startswith("[ERROR] the tokenizer has no special token")


def test_a_model_under_inference_mode(model, processor):
    """Callers open sessions under `torch.inference_mode`; the thread computes without gradients in any case."""
    with torch.inference_mode():
        session, _ = open_session(model, processor, free=True, max_new_tokens=3)
        with session:
            until(session, "Parked")
            session.push_frame(picture(1), 1)
            until(session, "Parked")
