"""What training/finetune.py checks before a run, and in which process."""

import json
import random

import pytest
import torch
from make_media import write_video
from PIL import Image
from tuning import NANO, checkpoint, load_processor, run, run_parallel  # noqa: F401 - a fixture among them

from moss_vl.training import finetune, preflight, record_lengths
from moss_vl.training.batches import encode
from moss_vl.training.processes import FailedElsewhere, in_main_process
from moss_vl.training.record_lengths import LengthCheck
from moss_vl.training.records import read_records


LIMITS = {"min_pixels": 4096, "max_pixels": 4096}


@pytest.fixture(scope="module")
def processor():
    return load_processor(NANO)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "short.mp4", count=12, rate=8)
    write_video(folder / "long.mp4", count=70, rate=8)
    Image.new("RGB", (40, 40), "red").save(folder / "red.png")
    return folder


def random_video(rng):
    """A video with options that set or limit the number of its frames."""
    video = {"video_path": rng.choice(["short.mp4", "long.mp4"])}
    rng.choice([
        lambda: video.update(segments=[[0.1, 1.2], [0.5]][: rng.randint(1, 2)]),
        lambda: video.update(fps=rng.choice([0.5, 2, 5])),
        lambda: video.update(num_frames=rng.randint(2, 6)),
        lambda: video.update(max_frames=rng.randint(2, 5)),
        lambda: video.update(min_frames=rng.randint(2, 9)),
        lambda: video.update(video_start=0.3, video_end=rng.choice([1.0, 60])),
        lambda: video.update(do_sample_frames=False),
        lambda: None,
    ])()  # fmt: skip
    return video


def random_record(rng):
    words = " ".join(rng.choices(["what", "is", "this", "3.5", "Ünïcode?"], k=rng.randint(1, 6)))
    record = {"prompt": words, "response": words[::-1], "images": ["red.png"] * rng.randint(0, 2)}
    videos = [random_video(rng) for _ in range(rng.randint(0, 2))]
    if rng.random() < 0.2:
        videos.append({"video": ["red.png"] * rng.randint(2, 5), "sample_fps": 2})
    return record | {"videos": videos}


@pytest.mark.parametrize("options", [{}, {"video_fps": 3.0, "max_frames": 7}, {"min_frames": 4, "video_fps": 0.5}])
def test_a_record_is_too_long_exactly_if_encoding_says_so(folder, processor, options, monkeypatch):
    rng = random.Random(repr(options))
    (folder / "data.json").write_text(json.dumps([random_record(rng) for _ in range(30)]))
    found, counts = [], []
    real = preflight.LengthCheck._times
    monkeypatch.setattr(preflight.LengthCheck, "_times", lambda *args: counts.append(1) or real(*args))
    for record in read_records(folder / "data.json"):
        try:
            length = len(encode(record, processor, **LIMITS, **options)["input_ids"])
        except ValueError:
            continue  # options that contradict each other
        for limit, fits in ((length, True), (length - 1, False), (10 * length, True)):
            check = LengthCheck(processor, True, {**LIMITS, **options}, limit)
            try:
                check(record)
                found.append(fits)
            except ValueError as error:
                found.append(not fits and str(error).startswith(f"{length} tokens are more than --max-length {limit}"))
    assert len(found) > 60 and all(found)
    assert 5 < len(counts) < 2 / 3 * len(found), "files are indexed near the limit, and not far from it"


def test_too_long_records_are_listed_before_the_model_is_loaded(folder, tmp_path, capsys, monkeypatch):
    records = [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": "b", "videos": "long.mp4"}]
    (folder / "two.json").write_text(json.dumps(records))
    opened = []
    real = record_lengths.header_seconds
    monkeypatch.setattr(record_lengths, "header_seconds", lambda path: opened.append(path) or real(path))
    monkeypatch.setattr(finetune, "load_model", lambda args: pytest.fail("the model was loaded"))
    assert run(NANO, folder / "two.json", tmp_path / "out", "--max-length", 30) == 2
    error = capsys.readouterr().err
    assert "1 of the 2 records are bad" in error and "two.json, record 1: " in error
    assert "tokens are more than --max-length 30" in error and len(opened) == 1
    opened.clear()
    with pytest.raises(pytest.fail.Exception, match="the model was loaded"):
        run(NANO, folder / "two.json", tmp_path / "out", "--max-length", 5000, "--max-frames", 8)
    assert not opened, "even the most frames fit"


def test_skipped_checks_open_no_media(folder, tmp_path, processor, monkeypatch):
    (folder / "gone.json").write_text(json.dumps([{"response": "x", "images": "gone.png"}, {"response": "y"}]))
    (folder / "bad.json").write_text(json.dumps([{"response": ""}, {"response": "y"}]))
    base = ["--checkpoint", str(NANO), "--output", str(tmp_path), "--cpu"]

    def datasets(name, *options):
        return preflight.make_datasets(finetune.parse([*base, "--data", str(folder / name), *options]), processor)

    with pytest.raises(ValueError, match="1 of the 2 records are bad:\n.*record 0: .*gone.png"):
        datasets("gone.json")
    for module in ("image_reading", "training.record_media"):
        monkeypatch.setattr(f"moss_vl.{module}.probe_image", lambda *args: pytest.fail("an image was opened"))
    train, held_out = datasets("gone.json", "--skip-checks")
    assert len(train) == 2 and held_out is None
    train, held_out = datasets("gone.json", "--skip-checks", "--eval-share", "0.5")
    assert len(train) == len(held_out) == 1
    with pytest.raises(ValueError, match="1 of the 2 records are bad:\n.*record 0: the response is empty"):
        datasets("bad.json", "--skip-checks")
    assert len(datasets("bad.json", "--skip-checks", "--skip-bad")[0]) == 1


# processes


def check_once(rank, folder):
    """What two processes do with a check that works, then with one that fails."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)

    def check():
        (folder / f"checked-{rank}").touch()
        return ["records", rank]

    assert in_main_process(check) == ["records", 0]

    def fail():
        raise ValueError("bad records")

    try:
        in_main_process(fail)
    except (ValueError, FailedElsewhere) as error:
        (folder / f"failed-{rank}").write_text(f"{type(error).__name__}: {error}")
    torch.distributed.destroy_process_group()


def test_the_main_process_checks_for_all(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    run_parallel(check_once, (tmp_path,), 2)
    assert {path.name for path in tmp_path.glob("checked*")} == {"checked-0"}
    assert (tmp_path / "failed-0").read_text() == "ValueError: bad records"
    assert (tmp_path / "failed-1").read_text() == "FailedElsewhere: "
    assert in_main_process(lambda: 3) == 3, "without processes"


def fail_in_both(rank, command):
    assert finetune.main(command) == 2


def test_an_error_of_the_checks_ends_all_processes_with_one_message(folder, tmp_path, capfd):
    (folder / "one.json").write_text(json.dumps([{"response": "x", "images": "gone.png"}]))
    command = ["--checkpoint", str(NANO), "--data", str(folder / "one.json"), "--output", str(tmp_path), "--cpu"]
    run_parallel(fail_in_both, (command,), 2)
    assert capfd.readouterr().err.count("records are bad") == 1


@pytest.mark.parametrize("kind", ["answers", "decisions"])
def test_records_that_no_check_saw_are_named_or_skipped(checkpoint, tmp_path, capsys, kind):  # noqa: F811
    def stream(said):
        return {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": said}]}

    good, bad = stream("<|response|>x<|silence|>"), stream("<|silence|>x")
    if kind == "answers":
        good, bad = {"prompt": "x", "response": "y"}, {"prompt": "x", "response": "y", "tools": [{"name": "look"}]}
    (tmp_path / "data.json").write_text(json.dumps([bad, good]))
    options = ["--skip-checks", "--steps", 1]
    options += ["--balance-decisions", 1] if kind == "decisions" else ["--eval-generate", 2, "--eval-tokens", 1]
    if kind == "answers":
        (tmp_path / "train.json").write_text(json.dumps([good]))
        options += ["--eval-data", tmp_path / "data.json"]
    file = tmp_path / ("train.json" if kind == "answers" else "data.json")
    assert run(checkpoint, file, tmp_path / "out", *options) == 2
    assert "data.json, record 0: " in capsys.readouterr().err
    assert run(checkpoint, file, tmp_path / "skipped", *options, "--skip-bad") == 0
