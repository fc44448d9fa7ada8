"""training/finetune.py as users run it: parts, adapters, resuming, merging, several processes, and errors."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from tuning import (  # noqa: F401 - fixtures among them
    FAST,
    LINEAR,
    NANO,
    checkpoint,
    data,
    load,
    load_processor,
    logits_of,
    processor,
    run,
    run_parallel,
    tune_as_rank,
    weights,
)

from moss_vl.training import finetune, preflight, saving, trainer_arguments, tuning_options
from moss_vl.training.batches import check_record
from moss_vl.training.parts import load_model, part_of
from moss_vl.training.records import read_records


# parts and runs


def test_every_parameter_belongs_to_one_part(checkpoint):
    model = load(checkpoint)
    config = model.config
    parts = {part: [] for part in tuning_options.PARTS}
    for name, _ in model.named_parameters():
        parts[part_of(name, config)].append(name)
    assert all(parts.values())
    crossing = {f"layers.{index}" for index in config.text_config.cross_attention_layers}
    assert {".".join(name.split(".")[2:4]) for name in parts["cross"]} == crossing
    assert any("gate" in name for name in parts["cross"]) and "model.separator_token" in parts["merger"]
    assert all("merger" in name or "separator" in name for name in parts["merger"])
    assert all(name.startswith("model.visual.") and "merger" not in name for name in parts["vision"])
    assert not any("cross_attn" in name or "visual" in name for name in parts["language"])


@pytest.mark.parametrize("parts", [["cross", "merger"], ["vision", "language"], ["head"]])
def test_only_the_named_parts_are_trained(checkpoint, data, tmp_path, parts):
    before, out = weights(checkpoint), tmp_path / "out"
    assert (
        run(checkpoint, data, out, "--train", *parts, "--steps", 2, "--batch-size", 8, "--save-dtype", "bfloat16") == 0
    )
    config, after = load(out).config, weights(out)
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {part_of(name, config) for name in changed} == set(parts)
    for name in before:
        if part_of(name, config) not in parts:
            assert before[name].dtype == after[name].dtype == torch.bfloat16 and torch.equal(
                before[name], after[name]
            ), name


@pytest.mark.parametrize(
    "options",
    [
        ["--batch-size", 8],
        ["--batch-size", 4, "--accumulation", 2, "--lora-rank", 16, "--gradient-checkpointing"],
    ],
)
def test_a_few_steps_lower_the_loss(checkpoint, data, tmp_path, options):
    options = [*options, "--steps", 8, "--lr", "3e-3", "--eval-data", data, "--eval-steps", 5]
    assert run(checkpoint, data, tmp_path / "out", *options) == 0
    history = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 8 and losses[-1] < 0.9 * losses[0], losses
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [5, 8], "also at the end"
    assert all(entry["eval_loss"] < losses[0] for entry in history if "eval_loss" in entry)


def assert_same_step(checkpoint, *folders):
    """Asserts that the single step of two runs changed the same weights by the same amounts."""
    before = {name: tensor.float() for name, tensor in weights(checkpoint).items()}
    step, other = ({name: tensor - before[name] for name, tensor in weights(folder).items()} for folder in folders)
    moved = [name for name in step if step[name].any()]
    assert len(moved) > 10 and moved == [name for name in other if other[name].any()]
    for name in moved:
        assert (step[name] - other[name]).norm() < 1e-2 * step[name].norm(), name
    norms = [
        json.loads((folder / "trainer_state.json").read_text())["log_history"][0]["grad_norm"] for folder in folders
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_accumulated_batches_equal_one_large_batch(checkpoint, data, tmp_path):
    options = ["--steps", 1, "--train", "cross", *LINEAR]
    assert run(checkpoint, data, tmp_path / "one", "--batch-size", 8, *options) == 0
    assert run(checkpoint, data, tmp_path / "four", "--batch-size", 2, "--accumulation", 4, *options) == 0
    assert_same_step(checkpoint, tmp_path / "one", tmp_path / "four")


def test_with_bf16_trained_weights_are_float32(checkpoint, data, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # transformers 4 would leave "bf16" to later tests
    paths = ["--checkpoint", str(checkpoint), "--data", str(data), "--output", str(tmp_path)]
    model = load_model(finetune.parse([*paths, *FAST, "--bf16", "--train", "cross"]))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    (tmp_path / "text.json").write_text(json.dumps([{"response": "a red picture"}] * 2))
    options = ["--bf16", "--train", "cross", "language", "--steps", 1]
    assert run(checkpoint, tmp_path / "text.json", tmp_path / "out", *options) == 0
    after, before = weights(tmp_path / "out"), weights(checkpoint)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed and all("language_model" in name for name in changed)


@pytest.mark.parametrize("options", [[], ["--lora-rank", 4, "--lora-dropout", 0.3, "--accumulation", 2]])
def test_a_resumed_run_equals_an_uninterrupted_one(checkpoint, data, tmp_path, options):
    options = ["--steps", 4, "--save-steps", 2, "--batch-size", 3, *options]
    options += ["--schedule", "cosine", "--eval-share", 0.2]
    assert run(checkpoint, data, tmp_path / "out", *options) == 0
    shutil.copytree(tmp_path / "out/checkpoint-2", tmp_path / "kept/checkpoint-2")
    (tmp_path / "kept/checkpoint-3").mkdir()  # incomplete, of a run that was killed
    state = json.loads((tmp_path / "kept/checkpoint-2/trainer_state.json").read_text())
    state["log_history"].append({"step": 2, "mark": 1})
    (tmp_path / "kept/checkpoint-2/trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "kept/finetune.json").write_bytes((tmp_path / "out/finetune.json").read_bytes())
    assert run(checkpoint, data, tmp_path / "kept", *options, "--resume") == 0
    history = json.loads((tmp_path / "kept/trainer_state.json").read_text())["log_history"]
    assert {"step": 2, "mark": 1} in history, "resumed from checkpoint-2"
    name = "adapter_model.safetensors" if "--lora-rank" in options else "model.safetensors"
    whole, resumed, half = (load_file(tmp_path / folder / name) for folder in ("out", "kept", "out/checkpoint-2"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert any(not torch.equal(whole[key], half[key].to(whole[key])) for key in whole)
    logits_of(load(tmp_path / "out/checkpoint-2"), load_processor(tmp_path / "out/checkpoint-2"), data)


def parsed(output, *options):
    return finetune.parse(["--checkpoint", "c", "--data", "d", "--output", str(output), "--cpu", *map(str, options)])


def test_only_resolve_is_asked_of_a_checkpoint_s_processors(checkpoint, tmp_path):
    """The folder may hold another version of the code, whose attributes have other names."""
    asked = []
    parts = {name: SimpleNamespace(resolve=asked.append) for name in ("image_processor", "video_processor")}
    args = ["--checkpoint", checkpoint, "--data", "none.json", "--output", tmp_path / "out", "--fps", "2"]
    args = finetune.parse([str(arg) for arg in [*args, "--max-pixels", 4096, "--workers", 1]])
    assert preflight.processor_options(args, SimpleNamespace(**parts)) == {
        "video_fps": 2.0,
        "max_pixels": 4096,
        "num_extract_threads": 1,
    }
    assert asked == [{"max_pixels": 4096}, {"max_pixels": 4096, "video_fps": 2.0}]


def test_a_run_resumes_from_the_checkpoint_of_the_most_steps(tmp_path):
    """Sorted by number, not as text: 1000 comes after 500."""
    args = parsed(tmp_path, "--resume")
    saving.write_settings(args, tmp_path)
    assert saving.check_output(args) is None
    for steps in (500, 1000, 90):
        (tmp_path / f"checkpoint-{steps}").mkdir()
        (tmp_path / f"checkpoint-{steps}/trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-2000").mkdir()  # incomplete, of a run that was killed
    assert saving.check_output(args) == str(tmp_path / "checkpoint-1000")


def test_default_learning_rates(tmp_path):
    assert trainer_arguments.training_arguments(parsed(tmp_path)).learning_rate == 1e-5
    assert trainer_arguments.training_arguments(parsed(tmp_path, "--lora-rank", 4)).learning_rate == 1e-4
    assert parsed(tmp_path, "--lora-rank", 4).lora_alpha == 8


def test_options_reach_the_trainer(tmp_path):
    """All values differ from the defaults, those of this command and of `TrainingArguments`."""
    options = (
        "--epochs 2.5 --batch-size 3 --accumulation 5 --lr 0.25 --schedule linear --warmup 7 --weight-decay 0.125 "
        "--max-grad-norm 0.75 --seed 11 --log-steps 13 --save-steps 17 --eval-steps 19 --eval-share 0.5 --keep 4 "
        "--workers 6 --gradient-checkpointing"
    )
    arguments = trainer_arguments.training_arguments(parsed(tmp_path, *options.split()))
    expected = {
        "output_dir": str(tmp_path),
        "num_train_epochs": 2.5,
        "max_steps": -1,
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 3,
        "gradient_accumulation_steps": 5,
        "learning_rate": 0.25,
        "warmup_steps": 7,
        "weight_decay": 0.125,
        "max_grad_norm": 0.75,
        "seed": 11,
        "logging_steps": 13,
        "save_steps": 17,
        "eval_steps": 19,
        "save_total_limit": 4,
        "dataloader_num_workers": 6,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
    }
    assert {name: getattr(arguments, name) for name in expected} == expected
    assert (str(arguments.lr_scheduler_type.value), str(arguments.eval_strategy.value)) == ("linear", "steps")
    assert getattr(arguments, "activation_checkpointing", arguments.gradient_checkpointing)
    plain = trainer_arguments.training_arguments(parsed(tmp_path, "--steps", 3, "--save-steps", 17))
    assert (plain.max_steps, plain.max_grad_norm, plain.save_total_limit, plain.eval_steps) == (3, 1.0, 2, 17)
    assert (
        not getattr(plain, "activation_checkpointing", plain.gradient_checkpointing)
        and plain.eval_strategy.value == "no"
    )


def test_gradients_are_clipped_and_old_checkpoints_removed(checkpoint, data, tmp_path):
    """With gradients far below its eps, Adam's first step is proportional to them, so clipping is visible."""
    options = ["--steps", 1, "--train", "cross", "--batch-size", 8, "--lr", "1"]
    moved = []
    for norm in ("1e-9", "2e-9"):
        out = tmp_path / norm
        assert run(checkpoint, data, out, *options, "--max-grad-norm", norm) == 0
        before, after = weights(checkpoint), weights(out)
        moved.append(sum((after[name].float() - before[name].float()).square().sum() for name in before).sqrt().item())
    assert moved[1] == pytest.approx(2 * moved[0], rel=0.05)
    options = ["--steps", 4, "--save-steps", 1, "--train", "head", "--batch-size", 2, "--keep"]
    assert run(checkpoint, data, tmp_path / "kept", *options, 3) == 0
    assert {path.name for path in (tmp_path / "kept").glob("checkpoint-*")} == {
        "checkpoint-2",
        "checkpoint-3",
        "checkpoint-4",
    }


def test_the_requested_attention_is_used(checkpoint, data, tmp_path):
    paths = ["--checkpoint", str(checkpoint), "--data", str(data), "--output", str(tmp_path), *FAST]
    model = load_model(finetune.parse([*paths, "--attn", "eager"]))
    assert {
        part._attn_implementation for part in (model.config, model.config.text_config, model.config.vision_config)
    } == {"eager"}


def test_saved_loaded_and_merged_models_are_equal(checkpoint, processor, data, tmp_path):
    """The model in memory, its folder loaded by the Auto classes, and the two ways to merge."""

    def trained(out, *options):
        paths = ["--checkpoint", str(checkpoint), "--data", str(data), "--output", str(out)]
        args = finetune.parse([*paths, *FAST, "--steps", "3", "--lr", "1e-2", *options])
        trainer, new_processor, _ = finetune.prepare(args)
        trainer.train()
        logits = logits_of(trainer.model, processor, data)
        finetune.save(args, trainer, new_processor)
        return logits

    start = logits_of(load(checkpoint), processor, data)
    for options in ([], ["--lora-rank", "4", "--train", "vision", "cross", "head"]):
        folder = tmp_path / f"out{len(options)}"
        logits = trained(folder, *options)
        assert (logits - start).abs().max() > 0.1
        assert torch.allclose(logits_of(load(folder), load_processor(folder), data), logits, atol=1e-5), options

    command = ["--merge", str(folder), "--output", str(tmp_path / "merged")]
    assert finetune.main(command) == 0
    merged = load(tmp_path / "merged"), load_processor(tmp_path / "merged")
    assert torch.allclose(logits_of(*merged, data), logits, atol=1e-4)
    assert trained(tmp_path / "both", *options, "--merge").equal(logits)
    assert torch.allclose(logits_of(load(tmp_path / "both"), processor, data), logits, atol=1e-4)
    assert torch.allclose(logits_of(load(tmp_path / "both/adapter"), processor, data), logits, atol=1e-5)
    both, merged = weights(tmp_path / "both"), weights(tmp_path / "merged")
    assert both.keys() == merged.keys() == weights(checkpoint).keys()
    assert all(torch.equal(both[name], merged[name]) for name in merged)
    assert finetune.main(command) == 2, "the folder is no longer empty"


def test_adapters_are_in_the_requested_layers(checkpoint, data, tmp_path):
    def targets(*options):
        paths = ["--checkpoint", str(checkpoint), "--data", str(data), "--output", str(tmp_path)]
        model = load_model(finetune.parse([*paths, *FAST, "--lora-rank", "2", *options]))
        assert all("lora" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
        return {
            name.removeprefix("base_model.model.").split(".lora_")[0]
            for name, _ in model.named_parameters()
            if "lora" in name
        }

    config = load(checkpoint).config
    layers = config.text_config.cross_attention_layers
    names = [f"{kind}_proj" for kind in "qkvo"]
    cross = {f"model.language_model.layers.{layer}.cross_attn.{name}" for layer in layers for name in names}
    assert targets("--train", "cross", "--lora-targets", *names) == cross
    mlps = {
        f"model.language_model.layers.{layer}.mlp.{name}_proj" for layer in layers for name in ("gate", "up", "down")
    }
    assert targets("--train", "cross", "merger") == cross | mlps | {
        f"model.visual.merger.linear_fc{i}" for i in (1, 2)
    }
    everything = targets("--train", *tuning_options.PARTS)
    assert {part_of(name, config) for name in everything} == set(tuning_options.PARTS)
    assert not any("embed" in name for name in everything)


def test_the_command_runs_from_any_folder():
    command = [sys.executable, str(ROOT / "training/finetune.py"), "--merge", "nowhere", "--output", "nowhere-either"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 2 and "finetune.py: --merge nowhere: there is no adapter_config.json" in done.stderr


def test_parallel_processes_equal_one_with_a_larger_batch(checkpoint, data, tmp_path):
    """One of the two processes gets a record without media."""
    records = json.loads(data.read_text())
    picture, text = records[0] | {"images": str(data.parent / "red.png")}, records[4]
    (tmp_path / "two.json").write_text(json.dumps([picture, text]))
    options = ["--steps", "1", "--train", "vision", "cross", *LINEAR]
    command = ["--checkpoint", str(checkpoint), "--data", str(tmp_path / "two.json"), *FAST, *options]
    run_parallel(tune_as_rank, ([*command, "--output", str(tmp_path / "two")],), processes=2)
    assert run(checkpoint, tmp_path / "two.json", tmp_path / "one", *options, "--batch-size", "2") == 0
    assert_same_step(checkpoint, tmp_path / "one", tmp_path / "two")


# errors


def test_errors_are_reported_before_the_model_is_loaded(checkpoint, data, tmp_path, monkeypatch, capsys):
    def load_model(args):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(finetune, "load_model", load_model)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file.txt").write_text("mine")
    (tmp_path / "bad.json").write_text('[{"prompt": "What?"}, {"response": ""}]')
    (tmp_path / "one.json").write_text('[{"response": "x"}]')
    (tmp_path / "system.json").write_text('[{"response": "x", "system_prompt": "y"}]')
    (tmp_path / "ds.json").write_text("{")
    tied = shutil.copytree(checkpoint, tmp_path / "tied")
    config = json.loads((tied / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (tied / "config.json").write_text(json.dumps(config))
    new = tmp_path / "new"
    for options, reason in (
        ([checkpoint, data, tmp_path / "full"], "is not empty"),
        ([checkpoint, data, tmp_path / "full", "--resume"], "has no finetune.json"),
        ([checkpoint, data, tmp_path / "one.json"], "is a file"),
        ([checkpoint, tmp_path / "bad.json", new], "2 of the 2 records are bad"),
        ([checkpoint, tmp_path / "nowhere.json", new], "no such data file"),
        ([checkpoint, tmp_path / "system.json", new, "--no-template"], "a system turn needs the chat template"),
        ([tmp_path / "nowhere", data, new], "no such checkpoint folder"),
        ([checkpoint, tmp_path / "one.json", new, "--eval-share", "0.5"], "nothing is left to train on"),
        ([checkpoint, data, new, "--eval-data", tmp_path / "bad.json"], "2 of the 2 records are bad"),
        ([checkpoint, data, new, "--min-pixels", "4096", "--max-pixels", "64"], "is above longest_edge"),
        ([checkpoint, data, new, "--min-frames", "20", "--max-frames", "10"], "min_frames 20 is above max_frames 10"),
        ([checkpoint, data, new, "--schedule", "falling"], "falling"),
        (
            [checkpoint, data, new, "--lora-rank", "2", "--lora-targets", "q_prj"],
            "'q_prj' is no linear layer of merger, cross",
        ),
        ([tied, data, new, "--train", "head"], "this checkpoint ties its head to the embeddings"),
    ):
        assert run(*options) == 2, reason
        assert reason in capsys.readouterr().err
    assert not new.exists() and [path.name for path in (tmp_path / "full").iterdir()] == ["file.txt"]
    assert finetune.main(["--merge", str(checkpoint), "--output", str(new)]) == 2
    assert "no adapter_config.json" in capsys.readouterr().err


def test_resuming_with_other_settings_is_an_error(checkpoint, data, tmp_path, capsys):
    options = ["--steps", "1", "--train", "head", "--batch-size", "2"]
    assert run(checkpoint, data, tmp_path / "out", *options, "--resume") == 0, "nothing to resume: a new run"
    assert run(checkpoint, data, tmp_path / "out", *options, "--resume", "--seed", "3") == 2
    assert "the run began with --seed 0, got 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, reason",
    [
        (["--output", "o"], "nothing to do"),
        (["--output", "o", "--data", "d"], "--data needs --checkpoint"),
        (["--output", "o", "--data", "d", "--checkpoint", "c", "--merge"], "--merge is for adapters"),
        (["--output", "o", "--data", "d", "--checkpoint", "c", "--merge", "m", "--lora-rank", "2"], "trains nothing"),
        (["--output", "o", "--data", "d", "--checkpoint", "c", "--eval-data", "e", "--eval-share", "0.1"], "not both"),
        (["--output", "o", "--data", "d", "--checkpoint", "c", "--train", "all"], "invalid choice: 'all'"),
        (["--output", "o", "--data", "d", "--checkpoint", "c", "--lr", "0"], "must be above 0"),
    ],
)
def test_wrong_usage(command, reason, capsys):
    with pytest.raises(SystemExit) as error:
        finetune.main(command)
    assert error.value.code == 2 and reason in capsys.readouterr().err


def test_an_adapter_cannot_be_the_checkpoint(data, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    assert run(tmp_path / "adapter", data, tmp_path / "new") == 2
    assert "merge it first" in capsys.readouterr().err


# README


def test_commands_and_records_of_the_readme_are_valid(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "training/README.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S) for line in block.splitlines()]
    commands = [shlex.split(line.split("finetune.py", 1)[1]) for line in lines if "finetune.py" in line]
    assert len(commands) >= 4
    for command in commands:
        assert finetune.parse(command).output.name in ("tuned", "merged")
    files = [ROOT / name for line in lines for name in re.findall(r"pip install -r (\S+)", line)]
    assert files and all(file.is_file() for file in files)
    records, stream = re.findall(r"^```json\n(.*?)^```$", text, re.M | re.S)
    for name, content in (("data.json", records), ("stream.json", stream)):
        (tmp_path / name).write_text(content.replace('"data/', f'"{ROOT}/data/'))
    check = partial(check_record, processor=load_processor(NANO))
    assert len(read_records(tmp_path / "data.json", check=check)) == 3
    [found] = read_records(tmp_path / "stream.json", check=check)
    assert found.is_stream
