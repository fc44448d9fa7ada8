"""The recipe of moss-vl-nano: a run that was stopped goes on as if it had not been, and its optimizer does what it says."""

import argparse
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT

sys.path[:0] = [str(ROOT / "training")]
import train_nano  # noqa: E402
import world  # noqa: E402

NANO = ROOT / "checkpoints/moss-vl-nano"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One font, as drawn by lot among those installed; little of the encoder alone; no other threads or number formats for later tests."""
    monkeypatch.setattr(world, "fonts", lambda: (None,))
    monkeypatch.setattr(train_nano, "KINDS", (("pictures", 0.4), ("look", 0.6)))
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def run(folder, **options):
    if not folder.exists():
        shutil.copytree(NANO, folder / "start")
    args = {"output": folder, "steps": 4, "size": 8, "processes": 1, "threads": 1, "device": "cpu", "dtype": "float32", "save_minutes": 60}
    train_nano.train(0, argparse.Namespace(**args | options))
    return load_file(folder / "model.safetensors")


def test_a_stopped_run_goes_on_where_it_was(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    save = train_nano.save

    def save_and_stop(model, optimizer, output, step):
        save(model, optimizer, output, step)
        if step == 2:
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


def test_answers_do_not_teach_the_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(train_nano, "plan_of", lambda steps: lambda step: "pictures")
    learned, start = run(tmp_path / "run", steps=2), load_file(NANO / "model.safetensors")
    changed = {name for name in start if not torch.equal(start[name], learned[name])}
    assert changed and not any(name.startswith("model.visual") for name in changed)


def test_plan_and_rate():
    plan = train_nano.plan_of(1000)
    look = round(1000 * train_nano.LOOK_SHARE)
    kinds = [plan(step) for step in range(1000)]
    assert set(kinds[:look]) == {"look"}
    for kind, share in train_nano.KINDS:
        assert kinds[look:].count(kind) / (1000 - look) == pytest.approx(share, abs=0.01)
    rates = [train_nano.rate_of(step, 1000) for step in range(1000)]
    assert max(rates) == 1 and rates[0] < 0.1 and 0 < rates[-1] < 0.01
    assert rates[500] == 1 and rates[-100] == pytest.approx(100 / (1000 * train_nano.DECAY_SHARE))


@pytest.mark.parametrize("shape", [(3, 48, 96), (2, 96, 48), (4, 64, 64)])
def test_orthogonal(shape):
    """Singular vectors stay, singular values come near 1."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    values = (u.mT @ train_nano.orthogonal(matrices) @ v.mT).diagonal(dim1=1, dim2=2)
    assert 0.6 < values.quantile(0.1) and values.max() < 1.3
    rest = train_nano.orthogonal(matrices) - u @ torch.diag_embed(values) @ v
    assert rest.norm() < 1e-3 * matrices.norm()
