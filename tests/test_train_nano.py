"""Training of moss-vl-nano: resumed runs equal uninterrupted ones; drawing, stages, losses and the optimizer."""

import argparse
import json
import math
import shutil

import pytest
import torch
from conftest import ROOT
from nano_batches import make_processor, one_font  # noqa: F401
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from moss_vl.training.nano import dense, facts, lessons, make_nano, muon, rows, steps, train_nano, tutor
from moss_vl.training.nano.attention_targets import AttentionTargets
from moss_vl.training.nano.collation import Sizes, collate


NANO = ROOT / "checkpoints/moss-vl-nano"
STAGES = train_nano.STAGES


@pytest.fixture
def stages(monkeypatch):
    """The stages of the recipe, which `quick` replaces."""
    monkeypatch.setattr(train_nano, "STAGES", STAGES)
    return STAGES


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One stage; restores threads, random state and number format afterwards."""
    monkeypatch.setattr(train_nano, "STAGES", (train_nano.Stage(0.0, {"pictures": 0.4, "look": 0.6}),))
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def small_lessons(processor) -> lessons.Lessons:
    """Of small pictures, which are encoded faster."""
    out = lessons.Lessons(processor, 0, 8)
    out.frame_limits = out.picture_limits = (64 * 64, 96 * 96)
    return out


def run(folder, **options):
    if not folder.exists():
        shutil.copytree(NANO, folder / "start")
        make_processor().tokenizer.save_pretrained(folder / "start")
        for name in ("preprocessor_config.json", "video_preprocessor_config.json"):  # small pictures for fast steps
            settings = json.loads((folder / "start" / name).read_text())
            settings["size"] = {"shortest_edge": 64 * 64, "longest_edge": 96 * 96}
            (folder / "start" / name).write_text(json.dumps(settings))
    args = {
        "output": folder,
        "steps": 3,
        "weights": None,
        "progress": 0.0,
        "minutes": None,
        "size": 8,
        "batches": 1,
        "repeats": 1,
        "distance": 0,
        "rate": 0.02,
        "adam_rate": 6e-4,
        "workers": 0,
        "threads": 1,
        "device": "cpu",
        "dtype": "float32",
        "eager": False,
        "watchdog": None,
        "save_minutes": 60,
    }
    train_nano.train(argparse.Namespace(**args | options))
    return load_file(folder / "model.safetensors")


def read_log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def first_weights() -> dict[str, torch.Tensor]:
    weights = load_file(NANO / "model.safetensors")
    weights = make_nano.first_weights({name: weights[name].shape for name in sorted(weights)})
    return {name: weight.to(torch.bfloat16) for name, weight in weights.items()}


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    save = train_nano.save

    def save_and_stop(model, optimizer, output, step, seconds):
        save(model, optimizer, output, step, seconds)
        if step == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_nano, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", save_minutes=0)
    between = load_file(tmp_path / "stopped" / "model.safetensors")
    resumed = run(tmp_path / "stopped")
    start = first_weights()
    assert all(tensor.dtype == torch.bfloat16 for tensor in resumed.values())
    assert whole.keys() == resumed.keys() == start.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    changed = {name for name in start if not torch.equal(between[name], resumed[name])}
    assert any("visual" in name for name in changed) and any("cross_attn" in name for name in changed)


@pytest.mark.parametrize("kind", ["look", "pictures", "images", "clips"])
def test_every_kind_of_batch_can_be_learned(tmp_path, monkeypatch, kind):
    """Pictures train the encoder, and text the language model."""
    monkeypatch.setattr(train_nano, "kind_at", lambda step, progress: kind)
    learned, start = run(tmp_path / "run", steps=1), first_weights()
    changed = {name for name in start if not torch.equal(start[name], learned[name])}
    trained = {name.split(".")[1] for name in changed}
    assert ("visual" in trained) == (kind != "clips") and ("language_model" in trained) == (kind != "look")


def test_trained_weights_wait_for_the_heads(tmp_path, monkeypatch):
    monkeypatch.setattr(train_nano, "kind_at", lambda step, progress: "pictures")
    monkeypatch.setattr(train_nano, "HEADS_ALONE", 1)
    monkeypatch.setattr(train_nano, "LOG_STEPS", 1)
    weights = load_file(NANO / "model.safetensors")
    options = {"weights": NANO / "model.safetensors", "progress": 0.9}
    first = run(tmp_path / "first", steps=1, **options)
    assert all(torch.equal(first[name], weights[name]) for name in weights)
    second = run(tmp_path / "second", steps=2, **options)
    trained = {name.split(".")[1] for name in weights if not torch.equal(second[name], weights[name])}
    assert {"visual", "language_model"} <= trained
    assert [line["progress"] for line in read_log(tmp_path / "second")] == [0.95, 1.0]


# drawing


def test_drawn_steps_do_not_depend_on_the_number_of_workers():
    drawing = train_nano.Drawing(make_processor(), AutoConfig.from_pretrained(NANO, trust_remote_code=True), 8)
    drawing.lessons.picture_limits = drawing.lessons.frame_limits = (64 * 64, 96 * 96)
    first, again = (
        list(train_nano.load_steps(drawing, train_nano.Plan(2, train_nano.Clock(6, None), 2), workers, pinned=False))
        for workers in (1, 2)
    )
    assert [step["step"] for step in first] == [step["step"] for step in again] == [2, 3, 4, 5]
    assert all(one["layout"] == other["layout"] for one, other in zip(first, again, strict=True))
    assert all(one["bytes"].equal(other["bytes"]) for one, other in zip(first, again, strict=True))


def test_steps_are_repeated_later():
    used = list(train_nano.repeated(range(50), 3, distance=10))
    assert list(train_nano.repeated(range(5), 1, distance=10)) == [*range(5)]
    assert set(used) == set(range(50)) and max(map(used.count, used)) <= 3
    assert len(used) == 3 * 50 - 20, "those that still wait at the end are not repeated"


def test_a_run_of_minutes_ends_with_rate_0(monkeypatch):
    now = 100.0
    monkeypatch.setattr(train_nano.time, "monotonic", lambda: now)
    clock = train_nano.Clock(None, minutes=2, seconds=30.0)
    assert clock.progress(0) == 0.25, "earlier parts of the run count"
    clock.start()
    now = 145.0
    assert clock.progress(77) == 0.625
    now = 300.0
    assert train_nano.Clock(10, None, first=0.8).progress(5) == pytest.approx(0.9)
    assert clock.progress(99) == 1.0 and train_nano.rate_at(99, 1.0) == 0.0
    assert [*train_nano.Plan(99, clock, 1)] == []


def test_plan_and_rate(stages):
    count = 5000
    clock = train_nano.Clock(count, None)
    kinds = [kind for _, kind, _, _ in train_nano.Plan(0, clock, 1)]
    rates = [train_nano.rate_at(step, clock.progress(step)) for step in range(count)]
    ends = [*(stage.begins for stage in stages[1:]), 1.0]
    for stage, end in zip(stages, ends, strict=True):
        part = slice(math.ceil(stage.begins * count), math.ceil(end * count))
        assert sum(stage.kinds.values()) == pytest.approx(1.0)
        for kind, share in stage.kinds.items():
            assert kinds[part].count(kind) / len(kinds[part]) == pytest.approx(share, abs=0.02)
    assert set(kinds[: math.ceil(ends[0] * count)]) == {"look"}
    assert rates[0] < 0.1 and rates[count // 3] == 1 and 0 < rates[-1] < 0.001
    assert rates[count * 7 // 10] == pytest.approx(0.3 / (1 - train_nano.DECAY))


# losses


@torch.no_grad()
@pytest.mark.parametrize("kind", ["look", "pictures", "clips"])
def test_longer_lists_change_no_loss(kind):
    """The space of a recorded step is larger than most lists."""
    model = AutoModelForCausalLM.from_pretrained(NANO, trust_remote_code=True, dtype=torch.float32)
    taught = tutor.Tutor(model.config)
    step = collate([small_lessons(make_processor()).batch(0, kind, 0.0)], Sizes.of(model.config))
    tensors = {name: value for name, value in step.items() if isinstance(value, torch.Tensor)}
    lengths = {name: steps.list_length(name, value) for name, value in tensors.items() if steps.is_list(name)}
    recorded = steps.Recorded(step, tensors, lengths, "cpu")
    recorded.fill(tensors)
    assert all(len(recorded.inputs[name]) > len(step[name]) for name in ("pads", "learned", "answer") if name in step)
    results = []
    for inputs in (step, recorded.inputs):
        torch.manual_seed(0)
        loss, counts = taught.loss(model, inputs)
        results.append((loss, *counts.joined()))
    (loss, names, values), (other, *rest) = results
    assert loss.item() == pytest.approx(other.item(), rel=1e-5)
    assert names == rest[0] and torch.allclose(values, rest[1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_leaps_change_the_positions_of_frames(monkeypatch):
    """A leap of the whole clip changes nothing, because positions are relative; a leap inside it does."""
    model = AutoModelForCausalLM.from_pretrained(NANO, trust_remote_code=True, dtype=torch.float32)
    processor, states = make_processor(), {}
    monkeypatch.setattr(lessons, "LEAPING", 1.0)
    monkeypatch.setattr(lessons, "LATER", 1.0)
    monkeypatch.setattr(lessons, "LONG", 0.0)
    for name, leaps in {"none": (0, 0), "whole": (90, 90), "inside": (0, 90)}.items():
        leaping = lambda rng, frames: [leaps[0]] + [leaps[1]] * (frames - 1)  # noqa: B023, E731
        monkeypatch.setattr(lessons, "random_leaps", leaping)
        step = collate([small_lessons(processor).batch(0, "clips", 0.9)], Sizes.of(model.config))
        tokens, _ = dense.encode(model.model.visual, step)
        vision = dense.rows_of_vision(tokens, model.model.separator_token, step)
        states[name] = dense.decode(model.model.language_model, step, vision)[0].flatten(0, 1)[step["learned"]]
    assert torch.allclose(states["whole"], states["none"], atol=2e-3)
    assert (states["inside"] - states["none"]).abs().max() > 0.05


def test_answers_weigh_as_their_tokens():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(6, 5, generator=generator), torch.tensor([3, 2, 1, 0, 4, 2])
    weights = torch.tensor([*[2**-0.5] * 2, *[0.5] * 4])
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    expected = (2**0.5 * losses[:2].mean() + 2 * losses[2:].mean()) / (2**0.5 + 2)
    found = tutor.answer_loss(logits, {"targets": targets, "weights": weights})
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_right_answers():
    """An answer is right if all its tokens are. The first list entry stands for none."""
    targets = torch.tensor([1, 2, 0, 1, 0])
    logits = torch.nn.functional.one_hot(torch.tensor([1, 2, 0, 0, 2]), 3).float()
    step = {"targets": targets, "answer": torch.tensor([1, 1, 2, 2, 0]), "answer_tasks": torch.tensor([0, 1, 3])}
    right, number = tutor.right_answers(logits, step)
    assert right.tolist() == [1.0] + [0.0] * (len(rows.TASKS) - 1)
    assert number.tolist() == [1.0, 0.0, 1.0] + [0.0] * (len(rows.TASKS) - 3)


def test_attention_on_groups_of_targets():
    """One group has two target tokens, the other one; the last point is for none."""
    weights = torch.zeros(1, 2, 3, 4)
    weights[0, 1, 2] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    points = torch.tensor([[0, 1, 2, 1, 1], [0, 1, 2, 3, 1], [0, 1, 2, 0, 2], [0, 0, 0, 0, 0]]).T
    logarithm, share = tutor.attention_on(weights, points, torch.tensor(2))
    assert share.item() == pytest.approx((0.6 + 0.1) / 2)
    assert logarithm.item() == pytest.approx((math.log(0.6001) + math.log(0.1001)) / 2)


def test_weights_of_groups_scale_their_losses():
    torch.manual_seed(0)
    heads = tutor.FactHeads(8, (("stamp 0", 3), ("place a", 4)), {"stamp": 1.0, "place": 2.0})
    states, targets = torch.randn(5, 8), torch.tensor([[0, 1], [2, -100], [1, 1], [0, 0], [2, 2]])

    def loss(**weights):
        heads.weigh(**weights)
        return heads(states, targets)[0].item()

    scores = heads.heads(heads.norm(states)).unflatten(1, (2, 4))
    stamps = torch.nn.functional.cross_entropy(scores[:, 0, :3], targets[:, 0]).item()
    places = torch.nn.functional.cross_entropy(scores[:, 1], targets[:, 1]).item()
    assert loss() == pytest.approx(stamps + 2 * places, rel=1e-5)
    assert loss(place=4.0) == pytest.approx(stamps + 4 * places, rel=1e-5)
    assert loss(stamp=0.0) == pytest.approx(2 * places, rel=1e-5)


def test_weights_have_known_names(stages):
    known = {*tutor.FRAME_FACT_WEIGHTS, *tutor.ATTENTION_WEIGHTS}
    assert all(set(stage.weights) <= known for stage in stages)
    assert {name.split()[0] for name, _ in (*facts.CONTENTS, *facts.CHANGES, *facts.COURSE)} == set(
        tutor.FRAME_FACT_WEIGHTS
    )
    assert set(AttentionTargets.NAMES) == set(tutor.ATTENTION_WEIGHTS)


# the optimizer


def test_a_section_without_gradients_does_not_change():
    names = {"model.visual.blocks.0.a.weight": (4, 6), "model.language_model.layers.0.b.weight": (6, 4), "c": (5,)}
    parameters = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in names.items()}
    optimizer = muon.Muon(parameters.items())
    parameters["model.visual.blocks.0.a.weight"].grad = torch.randn(4, 6)
    optimizer.step()
    changed = [name for name, parameter in parameters.items() if not torch.equal(parameter, torch.ones(names[name]))]
    assert changed == ["model.visual.blocks.0.a.weight"]
    assert all(parameter.grad is None for parameter in parameters.values())
    before = parameters["model.visual.blocks.0.a.weight"].detach().clone()
    optimizer.set_scale(0.0)
    parameters["model.visual.blocks.0.a.weight"].grad = torch.randn(4, 6)
    optimizer.step()
    assert torch.equal(parameters["model.visual.blocks.0.a.weight"], before), "a rate of 0 changes nothing"


@pytest.mark.parametrize("shape", [(3, 48, 96), (2, 96, 48), (4, 64, 64)])
def test_orthogonal(shape):
    """Singular vectors do not change, and singular values become about 1."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    values = (u.mT @ muon.orthogonal(matrices) @ v.mT).diagonal(dim1=1, dim2=2)
    assert 0.6 < values.quantile(0.1) and values.max() < 1.3
    rest = muon.orthogonal(matrices) - u @ torch.diag_embed(values) @ v
    assert rest.norm() < 1e-3 * matrices.norm()
