"""Training of moss-vl-nano: resumed runs equal uninterrupted ones; stages, auxiliary losses and the optimizer."""

import argparse
import json
import math
import shutil

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoProcessor

from moss_vl.training.nano import facts, lessons, muon, train_nano, tutor, world
from moss_vl.training.nano.lessons import visible_parts


NANO = ROOT / "checkpoints/moss-vl-nano"
STAGES = train_nano.STAGES


@pytest.fixture
def stages(monkeypatch):
    """The stages of the recipe, which `quick` replaces."""
    monkeypatch.setattr(train_nano, "STAGES", STAGES)
    return STAGES


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One font and one stage; restores threads, random state and number format afterwards."""
    monkeypatch.setattr(world, "fonts", lambda: (None,))
    monkeypatch.setattr(train_nano, "STAGES", (train_nano.Stage(0.0, {"pictures": 0.4, "look": 0.6}, (1.0, 0.0)),))
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def small_clips(processor, kind) -> dict:
    """A batch of clips with small frames, which are encoded faster."""
    lessons_of_kind = train_nano.Lessons(processor, 0, lambda step: kind, 8)
    lessons_of_kind.frame_limits = (64 * 64, 96 * 96)
    return lessons_of_kind.batch(0)


def run(folder, **options):
    if not folder.exists():
        shutil.copytree(NANO, folder / "start")
        for name in ("preprocessor_config.json", "video_preprocessor_config.json"):  # small pictures for fast steps
            settings = json.loads((folder / "start" / name).read_text())
            settings["size"] = {"shortest_edge": 64 * 64, "longest_edge": 96 * 96}
            (folder / "start" / name).write_text(json.dumps(settings))
    args = {
        "output": folder,
        "steps": 3,
        "size": 8,
        "processes": 1,
        "threads": 1,
        "device": "cpu",
        "dtype": "float32",
        "save_minutes": 60,
    }
    train_nano.train(0, argparse.Namespace(**args | options))
    return load_file(folder / "model.safetensors")


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    save = train_nano.save

    def save_and_stop(model, optimizer, output, step):
        save(model, optimizer, output, step)
        if step == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_nano, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", save_minutes=0)
    between = load_file(tmp_path / "stopped" / "model.safetensors")
    resumed = run(tmp_path / "stopped")
    start = load_file(NANO / "model.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for tensor in resumed.values())
    assert whole.keys() == resumed.keys() == start.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    changed = {name for name in start if not torch.equal(between[name], resumed[name])}
    assert any("visual" in name for name in changed) and any("cross_attn" in name for name in changed)


def test_answers_do_not_train_the_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(train_nano, "plan_of", lambda steps: lambda step: "pictures")
    learned, start = run(tmp_path / "run", steps=1), load_file(NANO / "model.safetensors")
    changed = {name for name in start if not torch.equal(start[name], learned[name])}
    assert changed and not any(name.startswith("model.visual") for name in changed)


@torch.no_grad()
@pytest.mark.parametrize("separators", [False, True])
def test_each_moment_is_encoded_once(monkeypatch, separators):
    """The tokens equal those of all frames encoded, from fewer patches; noise makes them differ a little."""
    processor = AutoProcessor.from_pretrained(NANO, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(NANO, trust_remote_code=True, dtype=torch.float32).model
    visual, separator = model.visual, model.separator_token if separators else None
    batch = small_clips(processor, "clips")
    inputs, grid = (batch["pixel_values"].float(), batch["grid_thw"], None, None, None, separator), batch["grid_thw"]
    assert any(len(set(moments)) < len(moments) for moments in batch["moments"])
    every, sizes = visual(*inputs), []
    visual.patch_embed.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    with tutor.encode_moments_once(visual, batch):
        noisy = visual(*inputs)
    monkeypatch.setattr(tutor, "NOISE", 0.0)
    with tutor.encode_moments_once(visual, batch):
        once = visual(*inputs)
    patches = sum(len(set(moments)) * h * w for moments, (_, h, w) in zip(batch["moments"], grid, strict=True))
    assert sizes == [patches] * 2
    assert torch.allclose(once, every, atol=1e-4)
    assert not torch.equal(noisy, once) and (noisy - once).abs().max() < 0.2 * every.std()
    if separators:
        assert (every == separator).all(1).sum() == (noisy == separator).all(1).sum() == sum(t for t, _, _ in grid)
    assert torch.equal(visual(*inputs), every), "outside of the context nothing has changed"


@pytest.mark.parametrize("kind", ["look", "pictures", "images", "clips", "later"])
def test_every_kind_of_batch_can_be_learned(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(train_nano, "plan_of", lambda steps: lambda step: kind)
    learned, start = run(tmp_path / "run", steps=1), load_file(NANO / "model.safetensors")
    assert any(not torch.equal(start[name], learned[name]) for name in start)


@torch.no_grad()
def test_leaps_change_the_positions_of_frames(monkeypatch):
    """A leap of the whole clip changes nothing, because positions are relative; a leap inside it does."""
    processor = AutoProcessor.from_pretrained(NANO, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(NANO, trust_remote_code=True, dtype=torch.float32)
    logits = {}
    for name, leaps in {"none": (0, 0), "whole": (90, 90), "inside": (0, 90)}.items():
        leaping = lambda rng, frames: [leaps[0]] + [leaps[1]] * (frames - 1)  # noqa: B023, E731
        monkeypatch.setattr(lessons, "random_leaps", leaping)
        monkeypatch.setattr(lessons, "LEAPING", 1.0)
        batch = small_clips(processor, "later")
        with tutor.leaping_frames(model.model.language_model, batch):
            logits[name] = model(
                input_ids=batch["input_ids"],
                attention_mask=visible_parts(batch["parts"]),
                position_ids=batch["position_ids"],
                pixel_values=batch["pixel_values"].float(),
                grid_thw=batch["grid_thw"],
                media_nums_per_sample=batch["media_nums"],
            ).logits[batch["labels"] != -100]
    assert torch.allclose(logits["whole"], logits["none"], atol=2e-3)
    assert (logits["inside"] - logits["none"]).abs().max() > 0.05


def test_answers_weigh_as_the_root_of_their_length():
    """The mean loss of each answer times the root of its length, divided by the sum of the roots."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(1, 8, 5, generator=generator), torch.tensor([[-100, 3, 2, -100, 1, 0, 4, 2]])
    weights = torch.tensor([[0, *[2**-0.5] * 2, 0, *[0.5] * 4]])
    losses = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="none", ignore_index=-100)
    expected = (2**0.5 * losses[:2].mean() + 2 * losses[3:].mean()) / (2**0.5 + 2)
    assert tutor.answer_loss(logits, {"labels": labels, "weights": weights}).item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_attention_on_groups_of_targets():
    """One group has two target tokens, the other one."""
    weights = torch.zeros(1, 2, 3, 4)
    weights[0, 1, 2] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    points = torch.tensor([[0, 1, 2, 1, 0], [0, 1, 2, 3, 0], [0, 1, 2, 0, 1]])
    assert tutor.attention_on(weights, points).tolist() == pytest.approx([0.6, 0.1])


def test_plan_and_rate(stages):
    steps, plan = 5000, train_nano.plan_of(5000)
    kinds, rates = [plan(step) for step in range(steps)], [train_nano.rate_at(step, steps) for step in range(steps)]
    ends = [*(stage.begins for stage in stages[1:]), 1.0]
    for stage, end in zip(stages, ends, strict=True):
        part = slice(math.ceil(stage.begins * steps), math.ceil(end * steps))
        assert sum(stage.kinds.values()) == pytest.approx(1.0)
        for kind, share in stage.kinds.items():
            assert kinds[part].count(kind) / len(kinds[part]) == pytest.approx(share, abs=0.02)
        middle = rates[(part.start + part.stop) // 2]
        assert middle == pytest.approx(sum(stage.rates) / 2, abs=0.01)
    assert set(kinds[: math.ceil(ends[0] * steps)]) == {"look"}
    assert max(rates) == 1 and rates[0] < 0.1 and 0 < rates[-1] < 0.01


def test_weights_of_groups_scale_their_losses():
    torch.manual_seed(0)
    heads = tutor.FactHeads(8, (("stamp 0", 3), ("place a", 3)), {"stamp": 1.0, "place": 2.0})
    vectors, targets = torch.randn(5, 8), torch.tensor([[0, 1], [2, -100], [1, 1], [0, 0], [2, 2]])
    whole, stamps, places = (heads(vectors, targets, **weights)[0] for weights in ({}, {"place": 0.0}, {"stamp": 0.0}))
    assert whole.item() == pytest.approx((stamps + places).item(), rel=1e-6) and min(stamps, places) > 0
    assert heads(vectors, targets, place=4.0)[0].item() == pytest.approx((stamps + 2 * places).item(), rel=1e-6)


def test_lessons_have_every_kind_of_batch(stages):
    processor = AutoProcessor.from_pretrained(NANO, trust_remote_code=True)
    for kind in {kind for stage in stages for kind in stage.kinds}:
        assert train_nano.Lessons(processor, 0, lambda step: kind, 8).batch(0)["kind"] == kind  # noqa: B023


def test_weights_have_known_names(stages):
    known = {*tutor.FRAME_FACT_WEIGHTS, *tutor.ATTENTION_WEIGHTS}
    assert all(set(stage.weights) <= known for stage in stages)
    assert {name.split()[0] for name, _ in (*facts.CONTENTS, *facts.CHANGES, *facts.COURSE)} == set(
        tutor.FRAME_FACT_WEIGHTS
    )
    assert set(lessons.AttentionTargets.NAMES) == set(tutor.ATTENTION_WEIGHTS)


@pytest.mark.parametrize("shape", [(3, 48, 96), (2, 96, 48), (4, 64, 64)])
def test_orthogonal(shape):
    """Singular vectors do not change, and singular values become about 1."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    values = (u.mT @ muon.orthogonal(matrices) @ v.mT).diagonal(dim1=1, dim2=2)
    assert 0.6 < values.quantile(0.1) and values.max() < 1.3
    rest = muon.orthogonal(matrices) - u @ torch.diag_embed(values) @ v
    assert rest.norm() < 1e-3 * matrices.norm()
