"""Sources of frames, and `infer.py --live`. FFmpeg's test pictures and a stub of PyAV stand in for cameras and RTSP:
no device is opened."""

import io
import json
import os
import sys
import threading
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from realtime import (
    RESPONSE,
    SILENCE,
    Script,
    make_processor,
    make_realtime_model,
    model,  # noqa: F401
    names,
    picture,
    plain_checkpoint,
    processor,  # noqa: F401
    stream,
)

from moss_vl import infer
from moss_vl.tools import live, live_sources
from moss_vl.tools.live_sources import Item, find_source, iterator_source, read_stream_records
from moss_vl.video_reading import open_video


CLIP = str(ROOT / "data/example_video.mp4")
TESTSRC = "testsrc=size=64x48:rate=10:duration=1"


class FakeClock:
    def __init__(self):
        self.time = 0.0
        self.start = 0.0

    def seconds(self):
        return self.time

    def sleep(self, seconds):
        self.time += seconds


# sources


def test_frames_of_a_video_are_those_on_screen():
    items = list(find_source(CLIP, fps=2).items())
    video = open_video(CLIP)
    assert [item.seconds for item in items] == [number / 2 for number in range(len(items))]
    assert len(items) == int(np.ceil(video.duration * 2 - 1e-6))
    numbers = video.shown_at(np.array([item.seconds for item in items])).tolist()
    shown = {number: image for number, _, image in video.frames(sorted(set(numbers)), [])}
    for item, number in zip(items, numbers, strict=True):
        assert np.array_equal(item.image, shown[number])


def test_frames_may_repeat_and_sources_may_be_read_again():
    source = find_source(CLIP, fps=100)
    for _ in range(2):
        items = [item for item, _ in zip(source.items(), range(10), strict=False)]
        assert len(items) == 10 and np.array_equal(items[0].image, items[1].image)


def test_a_device_gives_frames_at_a_rate():
    """FFmpeg's test pictures as a device: 30 frames, which come every 0.1 s by a clock of the test."""
    clock = FakeClock()
    read = clock.seconds
    clock.seconds = lambda: (clock.sleep(0.1), read())[1]
    frames = live_sources.device_frames("testsrc=size=64x48:rate=10:duration=3", 2, form="lavfi", clock=clock)
    items = list(frames)
    assert all(item.image.shape == (48, 64, 3) for item in items)
    assert [item.seconds for item in items] == pytest.approx([0.1, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0], abs=0.11)


@pytest.mark.parametrize("form, options", [("v4l2", {}), (None, {"rtsp_transport": "tcp"})])
def test_what_is_opened_for_a_camera_and_for_rtsp(monkeypatch, form, options):
    opened = []

    def stub(file, format=None, options=None):
        opened.append((file, format, options))
        return av_open(TESTSRC, format="lavfi")

    av_open = av.open
    monkeypatch.setattr(av, "open", stub)
    monkeypatch.setattr(sys, "platform", "linux")
    name, file = ("camera:1", "/dev/video1") if form else ("rtsp://camera.example/1",) * 2
    source = find_source(name)
    assert source.is_live and len([*source.items()]) >= 1
    assert opened == [(file, form, options)]


@pytest.mark.parametrize(
    "platform, kind, name, expected",
    [
        ("linux", "camera", None, ("/dev/video0", "v4l2")),
        ("darwin", "camera", None, ("0", "avfoundation")),
        ("win32", "camera", "USB Camera", ("video=USB Camera", "dshow")),
        ("linux", "screen", None, (":7", "x11grab")),
        ("darwin", "screen", None, ("Capture screen 0", "avfoundation")),
        ("win32", "screen", None, ("desktop", "gdigrab")),
    ],
)
def test_devices_of_each_platform(monkeypatch, platform, kind, name, expected):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("DISPLAY", ":7")
    assert live_sources.find_device(kind, name) == expected


def test_sources_that_cannot_be_opened(monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such source: nothing.*a video file"):
        find_source("nothing")
    with pytest.raises(ValueError, match="cannot be opened"):
        next(live_sources.device_frames(str(tmp_path / "none"), 1, form="v4l2"))
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ValueError, match="no default camera.*camera:NAME"):
        find_source("camera")
    monkeypatch.setattr(sys, "platform", "beos")
    with pytest.raises(ValueError, match="cannot be read on beos"):
        find_source("camera:1")


def test_a_folder_that_grows(tmp_path, capsys):
    def write(name, seed, written):
        Image.fromarray(picture(seed)).save(tmp_path / name)
        os.utime(tmp_path / name, (written, written))

    write("b.png", 1, 1000)
    write("a.png", 2, 1003)
    (tmp_path / "notes.txt").write_text("no image")
    clock, happenings = FakeClock(), []
    whole = io.BytesIO()
    Image.fromarray(picture(4)).save(whole, "PNG")

    def sleep(seconds):
        clock.time += 2.0
        happenings.append(clock.time)
        if len(happenings) == 1:
            write("c.png", 3, 1004.5)
            (tmp_path / "half.png").write_bytes(whole.getvalue()[:300])  # still being written
            (tmp_path / "never.jpg").write_bytes(b"no image")
        elif len(happenings) == 2:
            (tmp_path / "half.png").write_bytes(whole.getvalue())
            os.utime(tmp_path / "half.png", (1001, 1001))

    clock.sleep = sleep
    items = list(live_sources.folder_frames(tmp_path, clock, is_over=lambda: len(happenings) > 5))
    assert [item.seconds for item in items] == [0, 3, 4.5, 4.5], "times do not fall"
    for item, seed in zip(items, (1, 2, 3, 4), strict=True):
        assert np.array_equal(np.asarray(item.image), picture(seed))
    assert "never.jpg is skipped" in capsys.readouterr().err


def write_records(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def record(assistant="<|silence|><|video|><|silence|><|video|>", times=((0,), (1.5,)), later=(), **other):
    return {
        "messages": [
            {"role": "system", "content": "Look."},
            {"role": "user", "content": "Tell me."},
            {"role": "assistant", "content": assistant},
            *later,
        ],
        "images": [],
        "videos": [{"video_path": "clip.mp4", "segments": [list(time) for time in times]}],
        "id": 7,
        **other,
    }


def test_records_of_streams(tmp_path):
    (tmp_path / "clip.mp4").symlink_to(CLIP)
    later = [
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "<|silence|><|video|><|response|>a star<|silence|>"},
    ]
    [first, second] = read_stream_records(
        write_records(tmp_path / "s.jsonl", record(times=((0,), (1.5,), (2,)), later=later), record())
    )
    assert (first.system_prompt, first.prompt, first.where) == ("Look.", "Tell me.", f"{tmp_path / 's.jsonl'}:1")
    items = list(first.items())
    assert [item.prompt or item.seconds for item in items] == [0, 1.5, "And now?", 2]
    expected = {item.seconds: item.image for item in live_sources.frames_at(CLIP, [0, 1.5, 2])}
    for item in items:
        assert item.prompt or np.array_equal(item.image, expected[item.seconds])
    assert [item.seconds for item in second.items()] == [0, 1.5]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"times": ((0,),)}, "2 <.video.>, but the videos have 1 segments"),
        ({"times": ((1,), (0,))}, "seconds that do not fall"),
        ({"times": ((0, 1), (2,))}, "must be .time."),
        ({"images": ["a.png"]}, "has no images"),
        ({"videos": ["clip.mp4"]}, "a video must be"),
        ({"messages": "hello"}, "an object with messages"),
        ({"later": [{"role": "user", "content": "<|video|>"}]}, "a turn of the user has 1 frames"),
        ({"later": [{"role": "system", "content": "x"}]}, "'system' is at the wrong place"),
    ],
)
def test_wrong_records(tmp_path, change, message):
    with pytest.raises(ValueError, match=rf"s.jsonl:2: .*{message}"):
        read_stream_records(write_records(tmp_path / "s.jsonl", record(), record(**change)))


# time that is counted


def test_between_two_frames_as_much_is_written_as_their_distance_allows(model, processor):
    made, script = stream(model, processor, SILENCE, RESPONSE, *["red"] * 9, SILENCE)
    items = [Item(0.0, picture(0)), Item(1.0, picture(1)), Item(2.0, picture(2)), Item(2.0, picture(3))]
    events = list(live.play(made, items, tokens_per_second=3))
    taken = [i for i, name in enumerate(names(events)) if name == "FrameTaken"]
    written = [
        sum(name in ("Text", "ResponseBegins") for name in names(events)[a:b])
        for a, b in zip(taken, taken[1:], strict=False)
    ]
    assert written == [3, 3, 1] and names(events)[-1] == "Ended"
    assert events[-2].text == "red" * 9


def test_prompts_of_a_record_come_where_they_stand(model, processor):
    made, _ = stream(model, processor)
    items = [Item(0.0, picture(0)), Item(prompt="And now?"), Item(1.0, picture(1))]
    assert [name for name in names(live.play(made, items, 12)) if name.endswith("Taken")] == [
        "FrameTaken", "PromptTaken", "FrameTaken",
    ]  # fmt: skip


# the command


@pytest.fixture
def command(model, processor, monkeypatch, capsys):
    """Runs the command with a model that writes these words; (exit code, stdout, stderr)."""

    create = type(model).create_realtime_stream

    def call(*arguments, words=(), free=False):
        made = []

        def scripted(self, *args, **kwargs):
            made.append(kwargs)
            return create(self, *args, **kwargs, logits_processor=[Script(processor, *words, free=free)])

        monkeypatch.setattr(type(model), "create_realtime_stream", scripted)
        monkeypatch.setattr(infer, "load", lambda args: (processor, model))
        code = infer.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        call.options = made
        return code, out, err

    return call


WORDS = (SILENCE, SILENCE, RESPONSE, "red", RESPONSE, " star", SILENCE)


def test_the_command_prints_what_is_said_with_its_time(command, tmp_path):
    out = tmp_path / "out.jsonl"
    code, printed, err = command(
        "--live", CLIP, "--fast", "--pace", 1, "-p", "Tell me.", "--fps", 1, "--record", out, words=WORDS
    )
    assert code == 0 and not err
    assert printed == "[   1.0s] red star\n"
    events = [json.loads(line) for line in out.read_text().splitlines()]
    assert [event["event"] for event in events[:3]] == ["prompt_taken", "silence", "frame_taken"]
    assert events[0]["text"] == "Tell me." and events[-1]["event"] == "ended"
    [reply] = [event for event in events if event["event"] == "reply_ends"]
    assert (reply["text"], reply["reason"], reply["seconds"]) == ("red star", "silence", 5.0)


def test_the_command_live(command, tmp_path):
    """A clip of a second at its own pace."""
    clip = tmp_path / "clip.mp4"
    write_clip(clip)
    code, printed, err = command("--live", clip, "--fps", 4, "--window", 2, "--max-new-tokens", 9, words=WORDS[1:])
    assert code == 0 and not err and printed.endswith("red star\n")
    [options] = command.options
    assert (options["window_seconds"], options["max_new_tokens"], options["do_sample"]) == (2, 9, False)


def write_clip(path):
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=4)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        for number in range(4):
            for packet in video.encode(av.VideoFrame.from_ndarray(picture(number), format="rgb24")):
                container.mux(packet)
        for packet in video.encode():
            container.mux(packet)


def test_the_command_with_records(command, tmp_path):
    (tmp_path / "clip.mp4").symlink_to(CLIP)
    file, out = write_records(tmp_path / "s.jsonl", record(), record()), tmp_path / "out.jsonl"
    code, printed, err = command("--live", file, "--record", out, words=WORDS)
    assert code == 0 and not err
    assert printed == f"{file}:1:\n[   1.5s] red star\n{file}:2:\n[   1.5s] red star\n"
    assert {json.loads(line)["record"] for line in out.read_text().splitlines()} == {0, 1}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--live", CLIP, "a.png"], "images and videos cannot be given with --live"),
        (["--live", CLIP, "--frames", "3"], "--frames cannot be given with --live"),
        (["--fast", "-p", "x"], "--fast goes with --live"),
        (["--pace", "3", "-p", "x"], "--pace goes with --live"),
        (["--live", "records.jsonl", "--fps", "2"], "leave --fps out"),
        (["-p", "x", "--record", "o"], "--record goes with --live"),
        (["--live", "a.jsonl", "-p", "x"], "have their own prompts"),
        (["--live", CLIP, "--pace", "0"], "must be above 0"),
        (["--live", "nothing.mp4"], "no such source: nothing.mp4"),
        (["--live", CLIP, "--fast", "--checkpoint", "PLAIN"], "not a realtime checkpoint"),
    ],
)
def test_wrong_usage_of_the_command(arguments, message, capsys):
    """The last one loads PLAIN, which is no realtime checkpoint."""
    try:
        code = infer.main([str(plain_checkpoint()) if word == "PLAIN" else word for word in arguments])
    except SystemExit as end:
        code = end.code
    assert code == 2 and message in capsys.readouterr().err


def test_a_source_that_breaks_ends_the_command(command, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(Path(CLIP).read_bytes()[:2000])
    code, _, err = command("--live", broken)
    assert code == 2 and "broken.mp4" in err
    code, _, err = command("--live", broken, "--fast")
    assert code == 2 and "broken.mp4" in err


def test_a_record_that_breaks_does_not_end_the_others(command, tmp_path):
    (tmp_path / "clip.mp4").symlink_to(CLIP)
    lost = record()
    lost["videos"][0]["video_path"] = "lost.mp4"
    file = write_records(tmp_path / "s.jsonl", lost, record())
    code, printed, err = command("--live", file, words=WORDS)
    assert code == 1 and f"{file}:1: no such video file" in err
    assert printed == f"{file}:1:\n{file}:2:\n[   1.5s] red star\n"


def test_a_stream_that_fails_is_one_error(model, processor):
    made, _ = stream(model, processor)

    def fail(features, grids):
        raise RuntimeError("out of memory")

    made._run = fail
    events = [*live.play(made, [Item(float(i), picture(i)) for i in range(3)], 12)]
    assert names(events) == ["Failed"]


def test_a_saved_realtime_checkpoint_is_watched_with(tmp_path, capsys):
    """Loaded with the code in its folder, as users load it."""
    processor = make_processor()
    model = make_realtime_model(processor)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    processor.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "realtime_session.py").is_file()
    out = tmp_path / "out.jsonl"
    code = infer.main(
        ["--checkpoint", str(tmp_path), "--live", CLIP, "--fast", "--max-new-tokens", "3", "--record", str(out)]
    )
    assert code == 0, capsys.readouterr().err
    events = [json.loads(line)["event"] for line in out.read_text().splitlines()]
    assert events.count("frame_taken") == int(np.ceil(open_video(CLIP).duration)) and events[-1] == "ended"


def test_typed_lines_are_prompts(model, processor):
    session = model.create_realtime_session(processor, logits_processor=[Script(processor)])
    with session:
        live.push_lines(session, ["What?\n", "\n", " And?\n"])
        session.end()
        assert [event.text for event in session.events() if names([event]) == ["PromptTaken"]] == ["What?", "And?"]
    live.push_lines(session, ["Too late."])


def test_an_iterator_of_images_and_seconds(model, processor):
    session = model.create_realtime_session(processor, logits_processor=[Script(processor)])
    source = iterator_source((picture(i), i / 10) for i in range(3))
    feeder = live.Feeder(session, source)
    with session:
        feeder.start()
        taken = [event.seconds for event in session.events() if names([event]) == ["FrameTaken"]]
    feeder.stop()
    assert taken == [0, 0.1, 0.2] and feeder.error is None
    assert not any(thread is feeder.thread for thread in threading.enumerate())
