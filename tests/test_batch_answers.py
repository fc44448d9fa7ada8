"""Results of a batch on disk, answers that are written at once, and what `--ray` needs that is no Ray."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from moss_vl import infer
from moss_vl.tools import batch_answers, ray_batches
from moss_vl.tools.batch_answers import LineAnswers
from moss_vl.tools.ray_batches import Ledger, Plan, plan_workers
from moss_vl.tools.result_files import ResultFiles


LINES = [json.dumps({"id": index, "prompt": "a"}) for index in range(5)]
IMAGE = str(ROOT / "data/example_image.jpg")


def result_of(index, **more):
    return {"index": index, "id": index, "text": f"answer {index}", **more}


def indices(path):
    return [json.loads(line)["index"] for line in path.read_text().splitlines()] if path.exists() else None


# files of results


def test_results_are_written_in_order_and_kept_meanwhile(tmp_path):
    out = tmp_path / "out.jsonl"
    early = tmp_path / "out.jsonl.early"
    with ResultFiles(out, LINES) as results:
        assert results.missing == [0, 1, 2, 3, 4]
        assert results.add(result_of(2)) and results.add(result_of(0))
        assert (indices(out), indices(early)) == ([0], [2])
        assert not results.add(result_of(2)) and not results.add(result_of(0)), "one result per query"
        assert results.add(result_of(1)) and results.add(result_of(4))
        assert (indices(out), indices(early)) == ([0, 1, 2], [2, 4])
    with ResultFiles(out, LINES) as results:
        assert results.missing == [3] and results.unanswered == 1
        assert results.add({"index": 3, "id": 3, "error": "no"}) and results.failed == 1
    assert indices(out) == [0, 1, 2, 3, 4] and not early.exists()
    assert ResultFiles(out, LINES).missing == [] and ResultFiles(out, LINES).failed == 1


@pytest.mark.parametrize("cut", range(0, 90, 7))
def test_a_run_that_is_killed_at_any_byte_is_continued(tmp_path, cut):
    """Either file may end within a line."""
    out, early = tmp_path / "out.jsonl", tmp_path / "out.jsonl.early"
    with ResultFiles(out, LINES) as results:
        for index in (3, 0, 1):
            results.add(result_of(index))
    for path in (out, early):
        path.write_bytes(path.read_bytes()[:cut])
    with ResultFiles(out, LINES) as results:
        for index in reversed(results.missing):
            assert results.add(result_of(index))
    assert [json.loads(line) for line in out.read_text().splitlines()] == [result_of(index) for index in range(5)]
    assert not early.exists()


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.early"])
@pytest.mark.parametrize(
    "line",
    [
        {"index": 0, "text": "a"},  # without the id of the query
        {"index": 0, "id": 1, "text": "a"},
        {"index": 0, "id": 0, "label": "x", "text": "a"},  # a key that the query does not have
        {"index": 5, "id": 5, "text": "a"},
        {"index": True, "id": 1, "text": "a"},
        {"index": -1, "id": 4, "text": "a"},
        {"index": 0, "id": 0},
        [],
    ],
)
def test_files_of_other_queries_are_refused(tmp_path, name, line):
    path = tmp_path / name
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=rf"{name}, line 1, is no result of these queries; name another --out"):
        ResultFiles(tmp_path / "out.jsonl", LINES)
    assert json.loads(path.read_text()) == line


# answers


@pytest.fixture(scope="module")
def loaded():
    return infer.load(infer.parse(["-p", "", "--dtype", "float32"]))


def answers_of(loaded, *more):
    arguments = ["--batch", "q.jsonl", "--out", "r.jsonl", "--max-new-tokens", "4", *map(str, more)]
    return LineAnswers(infer.parse(arguments), *loaded)


def numbered(*queries):
    return list(enumerate(query if isinstance(query, str) else json.dumps(query) for query in queries))


MIXED = numbered(
    {"prompt": "Say", "generate_kwargs": {"max_new_tokens": 30}, "label": "long"},
    {"prompt": "What is it?", "images": [IMAGE]},
    "{broken",
    {"images": ["nowhere.jpg"], "prompt": "a", "id": 3},
    {"prompt": "Why?", "generate_kwargs": {"num_beams": 2}},
    {"media": IMAGE, "prompt": "Which?"},
    {"promt": "a"},
    {"prompt": "Who?", "generate_kwargs": {"max_new_tokens": 1}},
)


@pytest.mark.parametrize("size", [2, 8])
def test_answers_at_once_are_those_of_each_query_alone(loaded, size):
    alone = list(answers_of(loaded, "--batch-size", 1)(MIXED))
    assert [result["index"] for result in alone] == list(range(8))
    assert ["text" in result for result in alone] == [True, True, False, False, True, True, False, True]
    found = list(answers_of(loaded, "--batch-size", size)(MIXED))
    assert sorted(found, key=lambda result: result["index"]) == alone
    assert found != alone, "a long answer does not hold up the others"


def test_with_a_seed_answers_are_written_one_by_one(loaded):
    sampled = ("--temperature", 8, "--seed", 3)
    lines = numbered(*({"prompt": f"Say {index}"} for index in range(3)))
    found = list(answers_of(loaded, *sampled, "--batch-size", 8)(lines))
    assert found == [next(answers_of(loaded, *sampled)([line])) for line in lines]


def test_a_query_that_lacked_memory_beside_others_is_answered_alone(loaded, monkeypatch):
    import torch

    from moss_vl import generation_streams

    prefill, alone = generation_streams.start_row, list(answers_of(loaded, "--batch-size", 1)(MIXED))
    started = []

    def short_of_memory(*arguments):
        started.append(1)
        if len(started) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prefill(*arguments)

    monkeypatch.setattr(generation_streams, "start_row", short_of_memory)
    found = list(answers_of(loaded)(MIXED))
    assert sorted(found, key=lambda result: result["index"]) == alone and found[-1]["index"] == 1


def test_a_broken_device_ends_the_run(loaded, monkeypatch):
    """Else every query after it would get an error in place of an answer."""
    import torch

    answers = answers_of(loaded)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("illegal address")))
    monkeypatch.setattr(
        type(loaded[1]), "offline_batch_generate", lambda *_: (_ for _ in ()).throw(RuntimeError("launch failure"))
    )
    with pytest.raises(RuntimeError, match="the device cpu does not work any more: .*launch failure"):
        answers._answer_alone(MIXED[0])


# workers


@pytest.mark.parametrize(
    "nodes, workers, gpus, plan",
    [
        ([{"CPU": 8.0}], None, None, Plan(1, 8, {"num_cpus": 8})),
        ([{"CPU": 8.0}], 3, None, Plan(3, 2, {"num_cpus": 2})),
        ([{"CPU": 8.0}, {"CPU": 5.0}], 4, None, Plan(4, 2, {"num_cpus": 2})),
        ([{"CPU": 2.0}], 2, None, Plan(2, 1, {"num_cpus": 1})),
        ([{"CPU": 4.0}, {"CPU": 32.0, "GPU": 8.0}] * 2, None, None, Plan(16, 4, {"num_gpus": 1})),
        ([{"CPU": 32.0, "GPU": 8.0}], None, 2, Plan(4, 8, {"num_gpus": 2})),
        ([{"CPU": 32.0, "GPU": 3.0}], None, 0.5, Plan(6, 5, {"num_gpus": 0.5})),
        ([{"CPU": 32.0, "GPU": 8.0}], None, 0, Plan(1, 32, {"num_cpus": 32})),
        ([{"CPU": 2.0, "GPU": 8.0}], None, None, Plan(2, 1, {"num_gpus": 1})),
    ],
)
def test_workers_share_the_machines(nodes, workers, gpus, plan):
    assert plan_workers(nodes, workers, gpus) == plan


@pytest.mark.parametrize(
    "nodes, workers, gpus, message",
    [
        ([{"CPU": 4.0}], 5, None, "--ray-workers 5: the Ray cluster has space for 4 workers with a CPU each"),
        (
            [{"CPU": 4.0, "GPU": 1.0}],
            2,
            None,
            "space for 1 workers with 1 GPUs each: its 1 machines have 4 CPUs",
        ),
        ([{"CPU": 4.0, "GPU": 1.0}] * 2, None, 2, "space for 0 workers with 2 GPUs each"),
        ([{"CPU": 4.0}], None, 1, "space for 0 workers with 1 GPUs each"),
        ([], None, None, "space for 0 workers"),
    ],
)
def test_more_workers_than_fit_are_refused(nodes, workers, gpus, message):
    with pytest.raises(ValueError, match=message):
        plan_workers(nodes, workers, gpus)


def test_the_ledger_counts_workers_that_died_at_a_line():
    ledger = Ledger()
    assert ledger.take([0, 1, 2]) == [(0, None)] * 3
    ledger.begin([0, 1, 2])
    assert ledger.take([0, 1, 2]) == [(1, None)] * 3, "one of the three did it"
    ledger.begin([0])
    ledger.end([0], result_of(0))
    ledger.begin([1])
    assert ledger.take([0, 1, 2]) == [(1, result_of(0)), (2, None), (1, None)]
    assert ledger.take([0, 1, 2]) == [(1, result_of(0)), (2, None), (1, None)], "nothing was begun in between"
    assert ledger.take([3]) == [(0, None)]
    assert [ledger.begin_loading("a") for _ in range(3)] == [0, 1, 2] and ledger.begin_loading("b") == 0
    ledger.end_loading("a")
    assert ledger.begin_loading("a") == 0


def test_a_refused_line_keeps_its_keys(loaded):
    answers = answers_of(loaded)
    assert answers.refuse((4, '{"id": "x", "prompt": "a"}'), "no") == {"index": 4, "id": "x", "error": "no"}
    assert answers.refuse((4, "{broken"), "no") == {"index": 4, "error": "no"}


def test_the_code_that_workers_get_is_the_package(tmp_path):
    """Only what the code needs, and it runs in a process that knows nothing of the checkout."""
    package = ray_batches.copy_package(tmp_path)
    names = {path.name for path in package.iterdir()}
    assert {"__init__.py", "infer.py", "modeling_moss_vl.py", "config.json", "tools"} <= names
    assert not names & {"setup.py", "tests", "checkpoints", "moss_vl"}
    assert sum(path.stat().st_size for path in package.rglob("*")) < 2e6
    code = "import moss_vl.tools.ray_batches, moss_vl.infer as m; print(m.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(package / "infer.py")


def test_without_ray_the_command_names_the_pip_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "q.jsonl").write_text(LINES[0])
    assert infer.main(["--batch", str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "r.jsonl"), "--ray"]) == 2
    assert "--ray needs Ray (pip install -r requirements-ray.txt)" in capsys.readouterr().err


def test_queries_without_a_result_are_an_error(tmp_path, monkeypatch, capsys):
    """Whatever a cluster gives back."""
    monkeypatch.setattr(ray_batches, "answer_with_ray", lambda args, lines: iter([result_of(0), result_of(2)]))
    (tmp_path / "q.jsonl").write_text("\n".join(LINES))
    assert infer.main(["--batch", str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "r.jsonl"), "--ray"]) == 2
    assert "3 queries got no result; run the same command to continue" in capsys.readouterr().err


def test_a_finished_batch_starts_no_cluster(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "q.jsonl").write_text(LINES[0])
    (tmp_path / "r.jsonl").write_text(json.dumps(result_of(0)) + "\n")
    assert infer.main(["--batch", str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "r.jsonl"), "--ray"]) == 0
    assert batch_answers.BATCH_SIZE == 8


def test_the_costs_of_a_million_clips_follow_from_the_sizes_of_the_model():
    """The figures of docs/scaling.md: 60 frames of 448x448 pixels, 740 text tokens, 100 of them an answer."""
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    config = json.loads((ROOT / "config.json").read_text(encoding="utf-8"))
    text, vision = config["text_config"], config["vision_config"]
    width, wide, cross = text["hidden_size"], text["intermediate_size"], len(text["cross_attention_layers"])
    layers, heads = text["num_hidden_layers"], text["num_attention_heads"] * text["head_dim"]
    keys = 2 * text["num_key_value_heads"] * text["head_dim"]
    frames, patches, prompt = 60, (448 // 16) ** 2, 640
    merged = patches // 4
    tokens = frames * (merged + 1)
    hidden, features = vision["hidden_size"], 4 * 4 * vision["hidden_size"]  # four kept layers of four patches
    block = 4 * hidden**2 + 2 * hidden * vision["intermediate_size"] + 2 * patches * hidden
    encoder = frames * (2 * patches * vision["depth"] * block + 2 * merged * features * (features + width))
    vision_keys = tokens * cross * 2 * width * keys
    weights = layers * (2 * width * heads + 3 * width * wide) + (layers - cross) * width * keys
    attention = prompt * 4 * heads * (cross * tokens + (layers - cross) * prompt) / 2
    words = prompt * 2 * weights + attention
    flops = encoder + vision_keys + words
    step = 2 * (weights + text["vocab_size"] * width)
    kept = tokens * cross * keys * 2
    read = step + 8 * kept
    prefill, decode = flops / (0.4 * 989e12), 100 * read / (0.5 * 3.35e12) / 8
    hours = round(1e6 * round(prefill + decode, 2) / 3600)
    for claim in (
        f"a separator | {tokens:,} |",
        f"{(kept + 740 * (layers - cross) * keys * 2) / 1e9:.2f} GB while",
        f"encoder and merger {encoder / 1e12:.1f} TFLOP, keys and values of vision {vision_keys / 1e12:.1f}, "
        f"text {words / 1e12:.1f} | {flops / 1e12:.0f} TFLOP | {flops * 1e6:.1e} FLOP".replace("e+", "e"),
        f"decode: {step / 1e9:.1f} GB of weights",
        f"of each, {kept / 1e9:.2f} GB | 100 steps of {read / 1e9:.1f} GB for 8 clips: {read * 100 / 8 / 1e9:.0f} GB",
        f"= {prefill:.2f} s\n",
        f"= {decode:.2f} s\n",
        f"0.35 / 3600 = {hours}",
        f"{hours} x 2.50 (*assumed*)           = {hours * 2.5:.2f} dollars",
        f"16 answers reads {(step + 16 * kept) / 1e9:.0f} GB, two for 8 read {2 * read / 1e9:.0f}",
    ):
        assert claim in page, claim
