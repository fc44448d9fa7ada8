"""Runs of training/finetune.py whose weights are sharded between processes, on the CPU."""

import json

import pytest
import torch
import yaml
from conftest import ROOT
from safetensors.torch import load_file
from tuning import FAST, checkpoint, data, load, run, run_parallel, tune_as_rank, weights  # noqa: F401 - fixtures among them

from moss_vl.training import finetune
from moss_vl.training.trainer_arguments import SHARDED_LAYERS, training_arguments


CONFIGS = ROOT / "training/configs"
FSDP = ["--fsdp", "--fsdp-config", CONFIGS / "fsdp.json"]


def run_two(checkpoint, data, output, *options):  # noqa: F811
    command = ["--checkpoint", checkpoint, "--data", data, "--output", output, *FAST, *options]
    run_parallel(tune_as_rank, ([str(word) for word in command],), 2)


def log_of(folder, name):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def assert_same_run(one, two, kind):
    for name, length in (("loss", 2), ("grad_norm", 2), ("eval_loss", 1)):
        assert len(log_of(one, name)) == length
        assert log_of(two, name) == pytest.approx(log_of(one, name), rel=1e-4), name
    expected, found = (load_file(folder / f"{kind}.safetensors") for folder in (one, two))
    assert expected.keys() == found.keys()
    for name in expected:
        assert expected[name].dtype == found[name].dtype
        assert torch.allclose(
            found[name].float(), expected[name].float(), atol=2e-5, rtol=1e-2 if kind == "model" else 0
        ), name


@pytest.mark.parametrize(
    "kind, options",
    [
        ("adapter_model", ["--lora-rank", 4, "--lora-also", "gates", "separator", "norms", "--lr-cross", 2e-3]),
        ("model", ["--save-dtype", "bfloat16"]),
    ],
)
def test_sharded_processes_equal_one_process(checkpoint, data, tmp_path, kind, options):  # noqa: F811
    options = [*options, "--steps", 2, "--train", "cross", "merger", "--save-steps", 2, "--eval-data", data]
    options += ["--eval-generate", 3, "--eval-tokens", 3]
    run_two(checkpoint, data, tmp_path / "two", *options, "--batch-size", 2, *FSDP)
    assert run(checkpoint, data, tmp_path / "one", *options, "--batch-size", 4) == 0
    assert_same_run(tmp_path / "one", tmp_path / "two", kind)
    if kind == "model":
        assert {tensor.dtype for tensor in weights(tmp_path / "two").values()} == {torch.bfloat16}
        assert json.loads((tmp_path / "two/config.json").read_text())["dtype"] == "bfloat16"
    answers = [(tmp_path / name / "predictions/step-2.jsonl").read_text() for name in ("one", "two")]
    assert answers[0] == answers[1] and len(answers[0].splitlines()) == 3


# configuration files


def test_configurations_shard_the_layers_that_the_model_names(checkpoint):  # noqa: F811
    names = set(load(checkpoint)._no_split_modules)
    launched = yaml.safe_load((CONFIGS / "fsdp.yaml").read_text())["fsdp_config"]
    assert set(json.loads((CONFIGS / "fsdp.json").read_text())["transformer_layer_cls_to_wrap"]) == names
    assert set(launched["fsdp_transformer_layer_cls_to_wrap"].split(",")) == names == set(SHARDED_LAYERS)
    assert launched["fsdp_version"] == 2


@pytest.mark.parametrize("stage", [2, 3])
def test_configurations_of_deepspeed_leave_the_options_to_the_command(stage):
    config = json.loads((CONFIGS / f"zero{stage}.json").read_text())
    assert config["zero_optimization"]["stage"] == stage and "optimizer" not in config and "scheduler" not in config
    assert {config[name] for name in ("train_batch_size", "gradient_clipping", "gradient_accumulation_steps")} == {
        "auto"
    }
    assert stage == 2 or config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]


def test_wrong_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    base = ["--checkpoint", str(tmp_path), "--data", "d", "--output", str(tmp_path / "out"), "--cpu"]
    for content, reason in (("[", "is not JSON"), ("[]", "must hold a JSON object")):
        (tmp_path / "file.json").write_text(content)
        with pytest.raises(ValueError, match=reason):
            training_arguments(finetune.parse([*base, "--fsdp", "--fsdp-config", str(tmp_path / "file.json")]))
        with pytest.raises(ValueError, match=reason):
            finetune.check_requirements(finetune.parse([*base, "--deepspeed", str(tmp_path / "file.json")]))
    (tmp_path / "file.json").write_text('{"optimizer": {}}')
    options = ["--deepspeed", str(tmp_path / "file.json"), "--lr-cross", "1"]
    with pytest.raises(ValueError, match="has an optimizer of its own; remove it to use --lr-cross"):
        finetune.check_requirements(finetune.parse([*base, *options]))
