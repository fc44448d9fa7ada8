"""Streamed records: the order, its parts for processes and workers, resumed runs, and bad records."""

import gc
import itertools
import json
import pickle
import random
import shutil
from functools import partial

import pytest
import torch
from tuning import NANO, checkpoint, load_processor, run, weights  # noqa: F401 - a fixture among them

from moss_vl.training import streaming
from moss_vl.training.batches import BadRecord, check_record, encode
from moss_vl.training.records import read_records
from moss_vl.training.streaming import StreamedRecords, shuffled, streaming_loader


@pytest.fixture(scope="module")
def processor():
    return load_processor(NANO)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """23 records whose answers are their numbers."""
    file = tmp_path_factory.mktemp("streamed") / "data.jsonl"
    file.write_text("".join(json.dumps({"prompt": "Say", "response": str(index)}) + "\n" for index in range(23)))
    return file


@pytest.fixture
def numbers(monkeypatch):
    """Samples are the numbers that records answer: the order needs no tensors."""
    monkeypatch.setattr(streaming, "encode", lambda record, processor, **options: int(record.messages[1]["content"]))


def first(samples, count) -> list:
    return list(itertools.islice(samples, count))


def batches(dataset, workers, count) -> list[list[int]]:
    if workers:
        gc.collect()  # as in test_batches.py
    return first(streaming_loader(dataset, list, workers), count)


def test_a_pass_has_every_record_once_in_an_order_of_its_own(file, numbers):
    dataset = StreamedRecords([file], None, batch_size=1, buffer=8, seed=5)
    found = first(dataset, 46)
    one, two = found[:23], found[23:]
    assert sorted(one) == sorted(two) == list(range(23)) and one != two != list(range(23))
    assert first(dataset, 46) == found, "the order is that of the seed"
    assert first(StreamedRecords([file], None, 1, buffer=8, seed=6), 23) != one
    assert first(StreamedRecords([file], None, 1), 30) == [*range(23), *range(7)]


def test_shuffling_draws_among_the_waiting():
    for seed in range(30):
        rng = random.Random(seed)
        count, buffer = rng.randint(0, 30), rng.randint(1, 12)
        order = list(shuffled(iter(range(count)), buffer, rng))
        assert sorted(order) == list(range(count))
        assert all(entry < place + buffer for place, entry in enumerate(order)), "none comes too early"


def test_processes_and_workers_divide_one_order(file, numbers):
    options = {"buffer": 8, "seed": 1}
    whole = first(StreamedRecords([file], None, 1, **options), 48)
    for world_size, size in ((1, 3), (2, 2), (3, 1)):
        steps = 48 // (world_size * size) // 2
        for rank in range(world_size):
            dataset = StreamedRecords([file], None, size, rank=rank, world_size=world_size, **options)
            expected = [whole[(step * world_size + rank) * size :][:size] for step in range(steps)]
            for workers in (0, 2) if world_size == 2 and rank else (0,):
                assert batches(dataset, workers, steps) == expected, (world_size, rank, workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_order_goes_on(file, numbers, workers):
    options = {"batch_size": 2, "buffer": 5, "world_size": 2, "rank": 1}
    whole = batches(StreamedRecords([file], None, **options), 0, 9)
    for done in (1, 4) if workers else range(8):
        resumed = StreamedRecords([file], None, batches_done=done, **options)
        assert batches(resumed, workers, 9 - done) == whole[done:], done


def with_bad(file, folder, *bad):
    lines = file.read_text().splitlines()
    for index in bad:
        lines[index] = "{broken" if index % 2 else json.dumps({"prompt": "Say"})
    (folder / "bad.jsonl").write_text("\n".join(lines))
    return folder / "bad.jsonl"


def test_a_bad_record_is_named_or_replaced(file, numbers, tmp_path, caplog):
    path = with_bad(file, tmp_path, 3, 4)
    with pytest.raises(BadRecord, match=r"bad.jsonl, record 3 \(line 4\): not a JSON object"):
        first(StreamedRecords([path], None, 1), 9)
    options = {"batch_size": 2, "skip_bad": True}
    expected = [[0, 1], [2, 5], [5, 5], [6, 7]]
    for workers in (0, 3):
        assert batches(StreamedRecords([path], None, **options), workers, 4) == expected, workers
    resumed = StreamedRecords([path], None, batches_done=1, **options)
    assert batches(resumed, 0, 3) == expected[1:]
    caplog.clear()
    first(StreamedRecords([path], None, **options), 60)
    assert ["record 3" in message for message in caplog.messages] == [True, False], "each is warned of once"


def test_checks_and_long_records(file, processor, tmp_path):
    check = partial(check_record, processor=processor)
    with pytest.raises(BadRecord, match="record 0 .*tokens are more than --max-length 3"):
        next(iter(StreamedRecords([file], processor, 1, check=check, max_length=3)))
    with pytest.raises(BadRecord, match="none of the records of a whole pass can be used"):
        next(iter(StreamedRecords([file], processor, 1, skip_bad=True, max_length=3)))
    tool = {"type": "function", "function": {"name": "look"}}
    (tmp_path / "tools.jsonl").write_text(json.dumps({"response": "x", "tools": [tool]}))
    with pytest.raises(BadRecord, match="tools is given, but the chat template does not read it"):
        next(iter(StreamedRecords([tmp_path / "tools.jsonl"], processor, 1, check=check)))


def test_sources_without_records(tmp_path, numbers):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="empty.jsonl has no record"):
        StreamedRecords([tmp_path / "empty.jsonl"], None, 1)
    with pytest.raises(FileNotFoundError, match="no such data file"):
        StreamedRecords([tmp_path / "nowhere.jsonl"], None, 1)
    once = iter([{"response": "1"}, {"response": "2"}])
    with pytest.raises(BadRecord, match="no record in a second pass"):
        first(StreamedRecords([once], None, 1), 9)


def test_spawned_workers_can_get_the_data_set(file, processor):
    """macOS and Windows send it to them. Its samples are those of the records."""
    dataset = StreamedRecords([file], processor, 2, check=partial(check_record, processor=processor))
    sent = pickle.loads(pickle.dumps(dataset))
    for sample, record in zip(first(sent, 2), read_records(file), strict=False):
        plain = encode(record, processor)
        assert all(torch.equal(torch.as_tensor(sample[name]), torch.as_tensor(plain[name])) for name in plain)


def test_a_file_that_breaks_off_is_named(file, numbers, tmp_path):
    (tmp_path / "cut.jsonl").write_bytes(file.read_bytes() * 2000 + b"\xff")
    with pytest.raises(BadRecord, match="the data cannot be read further: .*cut.jsonl is not UTF-8"):
        list(StreamedRecords([tmp_path / "cut.jsonl"], None, 1, batches_done=10**6))


STREAMED = ["--streaming", "--shuffle-buffer", 4, "--batch-size", 2, "--train", "language", "--workers"]


def test_a_resumed_run_on_a_stream_equals_an_uninterrupted_one(checkpoint, file, tmp_path):  # noqa: F811
    options = [*STREAMED, 1, "--steps", 4, "--save-steps", 2, "--lora-rank", 4, "--lora-dropout", 0.3]
    options += ["--eval-data", file, "--eval-steps", 4]
    assert run(checkpoint, file, tmp_path / "out", *options) == 0
    shutil.copytree(tmp_path / "out/checkpoint-2", tmp_path / "kept/checkpoint-2")
    (tmp_path / "kept/finetune.json").write_bytes((tmp_path / "out/finetune.json").read_bytes())
    assert run(checkpoint, file, tmp_path / "kept", *options, "--resume") == 0
    name = "adapter_model.safetensors"
    whole, resumed = ((tmp_path / folder / name).read_bytes() for folder in ("out", "kept"))
    assert whole == resumed
    states = [json.loads((tmp_path / folder / "trainer_state.json").read_text()) for folder in ("out", "kept")]
    losses = [[entry["loss"] for entry in state["log_history"] if "loss" in entry] for state in states]
    assert len(losses[0]) == 4 and losses[1] == losses[0]


def test_a_streamed_step_equals_one_on_the_same_records(checkpoint, file, tmp_path):  # noqa: F811
    (tmp_path / "two.jsonl").write_text("\n".join(file.read_text().splitlines()[:2]))
    options = ["--batch-size", 2, "--train", "language", "--steps", 1]
    assert run(checkpoint, tmp_path / "two.jsonl", tmp_path / "plain", *options) == 0
    assert run(checkpoint, tmp_path / "two.jsonl", tmp_path / "streamed", *options, "--streaming") == 0
    plain, streamed = (weights(tmp_path / folder) for folder in ("plain", "streamed"))
    before = weights(checkpoint)
    assert any(not torch.equal(plain[name], before[name].float()) for name in plain)
    assert all(torch.allclose(plain[name], streamed[name], atol=1e-6) for name in plain)


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "--streaming needs --steps"),
        (["--steps", 2, "--eval-share", 0.5], "--streaming cannot hold out a share"),
        (["--steps", 2, "--balance-decisions", 1], "--streaming cannot count decisions"),
        (["--steps", 2, "--data_seed", 3], "is not for --streaming: give --seed"),
        (["--steps", 2, "--ignore_data_skip", "True"], "is not for --streaming: --resume always goes on"),
        (["--steps", 2, "--auto_find_batch_size", "True"], "the order of the records depends on --batch-size"),
        (
            ["--steps", 2, "--save_strategy", "epoch"],
            "--save-strategy epoch is not for --streaming: there are no epochs",
        ),
    ],
)
def test_options_that_need_all_records(checkpoint, file, tmp_path, capsys, options, message):  # noqa: F811
    with pytest.raises(SystemExit) as error:
        run(checkpoint, file, tmp_path / "out", "--streaming", *options)
    assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--shuffle-buffer", 5], "--shuffle-buffer is for --streaming"),
        (["--balance-decisions", 1, "--silence-weight", 2], "not both"),
    ],
)
def test_options_without_effect(checkpoint, file, tmp_path, capsys, options, message):  # noqa: F811
    with pytest.raises(SystemExit):
        run(checkpoint, file, tmp_path / "out", *options)
    assert message in capsys.readouterr().err


def test_a_bad_streamed_record_ends_the_run(checkpoint, file, tmp_path, capfd):  # noqa: F811
    path = with_bad(file, tmp_path, 3)
    assert run(checkpoint, path, tmp_path / "out", *STREAMED, 1, "--steps", 20) == 2
    assert "bad.jsonl, record 3 (line 4): not a JSON object" in capfd.readouterr().err.splitlines()[-1]
