"""Learning rates per part, and weights that training/finetune.py trains beside adapters."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tuning import (  # noqa: F401 - fixtures among them
    FAST,
    checkpoint,
    data,
    load,
    load_processor,
    logits_of,
    processor,
    run,
    weights,
)

from moss_vl.training import finetune
from moss_vl.training.parts import extra_of, load_model, part_of, plain_name
from moss_vl.training.trainer import split_groups


SGD = ["--optim", "sgd", "--max-grad-norm", 1e9, "--steps", 1, "--batch-size", 8, "--lr", 1]
EXTRAS = ["gates", "separator", "norms", "embeddings"]


# learning rates


def test_groups_are_split_by_part_and_keep_their_settings():
    a, b, c, d = (torch.nn.Parameter(torch.zeros(1)) for _ in range(4))
    groups = [{"params": [a, b, c], "weight_decay": 0.1, "lr": 1.0}, {"params": [d], "weight_decay": 0.0, "lr": 1.0}]
    parts = {id(a): "cross", id(b): "language", id(c): "vision", id(d): "vision"}
    assert split_groups(groups, parts, {"vision": 3.0, "cross": 2.0}) == [
        {"params": [b], "weight_decay": 0.1, "lr": 1.0},
        {"params": [c], "weight_decay": 0.1, "lr": 3.0},
        {"params": [a], "weight_decay": 0.1, "lr": 2.0},
        {"params": [d], "weight_decay": 0.0, "lr": 3.0},
    ]


def test_each_part_moves_by_its_own_rate(checkpoint, data, tmp_path):
    """A step of SGD is the gradient times the rate."""
    parts = ["--train", "cross", "vision", "head"]
    assert run(checkpoint, data, tmp_path / "one", *SGD, *parts) == 0
    assert run(checkpoint, data, tmp_path / "own", *SGD, *parts, "--lr-cross", 4, "--vision_tower_lr", 0.5) == 0
    before, config = weights(checkpoint), load(checkpoint).config
    one, own = ({name: w.float() - before[name].float() for name, w in weights(tmp_path / out).items()}
                for out in ("one", "own"))  # fmt: skip
    factors = {"cross": 4, "vision": 0.5, "head": 1}
    moved = dict.fromkeys(factors, 0)
    for name, step in one.items():
        if step.any():
            part = part_of(name, config)
            moved[part] += 1
            assert (own[name] - factors[part] * step).norm() < 1e-2 * factors[part] * step.norm(), name
    assert all(moved.values())


# weights beside adapters


def test_extras_are_found_under_the_names_of_wrapped_models(checkpoint):
    model = load(checkpoint)
    config, parts = model.config, ("cross", "merger")
    kinds = {name: extra_of(name, config, parts) for name, _ in model.named_parameters()}
    assert {name for name, kind in kinds.items() if kind == "separator"} == {"model.separator_token"}
    assert sum(kind == "gates" for kind in kinds.values()) == 2 * len(config.text_config.cross_attention_layers)
    assert [name for name, kind in kinds.items() if kind == "embeddings"] == [
        "model.language_model.embed_tokens.weight"
    ]
    norms = {name for name, kind in kinds.items() if kind == "norms"}
    assert {part_of(name, config) for name in norms} == set(parts)
    every = {name for name in kinds if extra_of(name, config, finetune.parse(PATHS).train + ["vision"]) == "norms"}
    modules = dict(model.named_modules())
    assert every == {name for name in kinds if "Norm" in type(modules[name.rpartition(".")[0]]).__name__}, (
        "the parameters of all norm modules, and no others"
    )
    for name in kinds:
        for prefix in ("base_model.model.", "module.base_model.model.", "_orig_mod.module."):
            assert plain_name(prefix + name.replace(".layers.", ".layers._fsdp_wrapped_module.")) == name


PATHS = ["--checkpoint", "c", "--data", "d", "--output", "o", "--train", "merger", "cross", "language", "vision"]


def test_an_adapter_with_extras_is_the_same_model_everywhere(checkpoint, processor, data, tmp_path, monkeypatch):
    """In memory, with plain PEFT, by the Auto classes, merged."""
    base = tmp_path / "base"
    shutil.copytree(checkpoint, base)
    load(checkpoint).save_pretrained(base)  # float32
    options = ["--steps", 3, "--batch-size", 8, "--lora-rank", 4, "--lora-also", *EXTRAS, "--merge"]
    options += ["--lr-cross", 3e-3, "--weight-decay", 0.1]
    trained = []
    save = finetune.save
    monkeypatch.setattr(finetune, "save", lambda args, trainer, processor: (
        trained.append(logits_of(trainer.model, processor, data)), save(args, trainer, processor)))  # fmt: skip
    assert run(base, data, tmp_path / "out", *options) == 0
    (expected,) = trained
    before, merged = weights(base), weights(tmp_path / "out")
    config = load(base).config
    for name in before:
        if extra_of(name, config, ("merger", "cross", "language")):
            assert not torch.equal(before[name], merged[name]), name
        elif part_of(name, config) in ("vision", "head"):
            assert torch.equal(before[name], merged[name]), name
    adapter = tmp_path / "out/adapter"
    for model in (
        PeftModel.from_pretrained(load(base), str(adapter)),
        load(adapter),
        load(tmp_path / "out"),
    ):
        assert torch.allclose(logits_of(model, processor, data), expected, atol=1e-4)
    assert (logits_of(load(base), processor, data) - expected).abs().max() > 0.01
    command = ["--merge", str(adapter), "--output", str(tmp_path / "again")]
    assert finetune.main(command) == 0
    again = weights(tmp_path / "again")
    assert all(torch.equal(again[name], merged[name]) for name in merged)


def test_a_run_with_extras_and_rates_resumes(checkpoint, data, tmp_path, capsys):
    options = ["--steps", 4, "--save-steps", 2, "--batch-size", 4, "--lora-rank", 2, "--lora-also", *EXTRAS]
    options += ["--lr-cross", 2e-3, "--lr-merger", 5e-4, "--schedule", "cosine", "--train", "cross", "merger"]
    assert run(checkpoint, data, tmp_path / "out", *options) == 0
    shutil.copytree(tmp_path / "out/checkpoint-2", tmp_path / "kept/checkpoint-2")
    shutil.copy(tmp_path / "out/finetune.json", tmp_path / "kept")
    assert run(checkpoint, data, tmp_path / "kept", *options, "--resume") == 0
    steps = [entry["step"] for entry in log_of(tmp_path / "kept") if "loss" in entry]
    assert steps == [1, 2, 3, 4]
    whole, resumed, half = (
        load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("out", "kept", "out/checkpoint-2")
    )
    assert whole.keys() == resumed.keys() == half.keys() and any("separator" in name for name in whole)
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name
        assert not torch.equal(whole[name], half[name]), name
    wrong = ["--lora-also", "gates"]
    assert run(checkpoint, data, tmp_path / "kept", *options, *wrong, "--resume") == 2
    assert "the run began with --lora-also" in capsys.readouterr().err
    assert run(checkpoint, data, tmp_path / "kept", *options, "--lr-cross", 1, "--resume") == 2
    assert "the run began with --lr-cross 0.002, got 1.0" in capsys.readouterr().err


def log_of(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_with_bf16_extras_are_float32(checkpoint, data, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # transformers 4 would leave "bf16" to later tests
    options = ["--bf16", "--lora-rank", 2, "--lora-also", "gates", "separator", "norms", "--train", "cross", "merger"]
    paths = ["--checkpoint", checkpoint, "--data", data, "--output", tmp_path / "out"]
    model = load_model(finetune.parse([str(word) for word in (*paths, *FAST, *options)]))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    assert run(checkpoint, data, tmp_path / "out", *options, "--steps", 1, "--batch-size", 4) == 0
    before, after = weights(checkpoint), load_file(tmp_path / "out/adapter_model.safetensors")
    extras = [name for name in after if "lora" not in name]
    assert len(extras) > 4
    for name in extras:
        assert not torch.equal(before[plain_name(name)].float(), after[name].float()), name


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--train", "vision", "language", "--lora-targets", "gate_proj", "--lr-vision", 1],
            "--lr-vision has no effect",
        ),
        (["--train", "head", "--lora-also", "norms"], "--lora-also norms has no effect"),
    ],
)
def test_options_of_adapters_that_act_on_no_weight(checkpoint, data, tmp_path, capsys, options, message):
    assert run(checkpoint, data, tmp_path / "out", "--lora-rank", 2, "--steps", 1, *options) == 2
    assert message in capsys.readouterr().err
