"""training/finetune.py as users run it: labels, batches, parts, adapters, resuming, merging, and what it refuses."""

import copy
import gc
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from conftest import ROOT
from make_media import write_video
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

from moss_vl.training import finetune, tuning_options
from moss_vl.training.batches import BadRecord, Collator, RecordDataset, encode, render
from moss_vl.training.records import read_records


NANO = ROOT / "checkpoints/moss-vl-nano"
STEADY = ["--schedule", "constant", "--warmup", "0", "--lr", "1e-3"]
LINEAR = ["--lr", "1", "--max-grad-norm", "1e-9"]  # Adam's first step, of gradients far below its eps, goes along them
FAST = ["--cpu", "--workers", "0", "--log-steps", "1", "--min-pixels", "4096", "--max-pixels", "9216", *STEADY]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The small checkpoint with files in place of links, as a download has it, smaller still, every part of it with weight."""
    folder = shutil.copytree(NANO, tmp_path_factory.mktemp("copied") / "moss-vl", symlinks=False)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "cross_attention_layers": [1, 3],
        "rope_scaling": {"mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_type": "default"},
    }  # fmt: skip
    config["vision_config"] |= {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.8 if "gate" in name and parameter.numel() == 1 else 0, 0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def processor(checkpoint):
    return load_processor(checkpoint)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight records: images of two sizes, several images, a video, segments, a conversation, texts alone."""
    folder = tmp_path_factory.mktemp("data")
    Image.new("RGB", (96, 64), "red").save(folder / "red.png")
    Image.new("RGB", (64, 96), "blue").save(folder / "blue.png")
    write_video(folder / "v.mp4", count=30, rate=10)
    chat = [
        ("user", "And <|image|>?<|video|><|video|>"),
        ("assistant", "Red."),
        ("user", "Sure?"),
        ("assistant", "Yes, I am."),
    ]
    records = [
        {"prompt": "What color is it?", "response": "red", "images": "red.png"},
        {"prompt": "What color is it?", "response": "blue", "images": "blue.png", "system_prompt": "Be short."},
        {"prompt": "How long is it?", "response": "3.0 seconds", "videos": "v.mp4"},
        {"messages": [{"role": role, "content": text} for role, text in chat], "images": "red.png",
         "videos": {"video_path": "v.mp4", "segments": [[0, 2], [2.5]]}},
        {"prompt": "Say yes.", "response": "yes"},
        {"prompt": "Which is blue?", "response": "2", "images": ["red.png", "blue.png"]},
        {"prompt": "", "response": "a red picture", "images": "red.png"},
        {"prompt": "Say no.", "response": "no"},
    ]  # fmt: skip
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def run(checkpoint, data, output, *options) -> int:
    return finetune.main(
        ["--checkpoint", str(checkpoint), "--data", str(data), "--output", str(output), *FAST, *map(str, options)]
    )


def weights(folder) -> dict:
    return load_file(folder / "model.safetensors")


def loss_of(model, inputs) -> float:
    with torch.no_grad():
        return model(**inputs).loss.item()


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


def load_processor(folder):
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def logits_of(model, processor, data):
    dataset = RecordDataset(read_records(data), processor, min_pixels=4096, max_pixels=9216)
    batch = Collator(processor.tokenizer.pad_token_id)([dataset[index] for index in range(len(dataset))])
    with torch.no_grad():
        return model.eval()(**batch).logits


# labels


def learned(processor, sample) -> list[str]:
    """The runs of learned tokens, as text."""
    runs, before = [], False
    for label in sample["labels"].tolist():
        if label != -100:
            runs = [*runs[:-1], [*runs[-1], label]] if before else [*runs, [label]]
        before = label != -100
    return [processor.tokenizer.decode(run) for run in runs]


def test_the_assistant_alone_is_learned_with_the_end_of_each_turn(processor, data):
    records = read_records(data)
    found = [learned(processor, encode(record, processor)) for record in records]
    answers = ["red", "blue", "3.0 seconds", ["Red.", "Yes, I am."], "yes", "2", "a red picture", "no"]
    assert found == [
        [f"{text}<|im_end|>" for text in ([answer] if isinstance(answer, str) else answer)] for answer in answers
    ]
    without = [record for record in records if record.messages[0]["role"] != "system"]
    bare = [learned(processor, encode(record, processor, template=False)) for record in without]
    assert bare == [turns for record, turns in zip(records, found, strict=True) if record in without]
    base = copy.deepcopy(processor)
    base.tokenizer.eos_token = base.tokenizer.pad_token  # as base checkpoints may have it
    assert learned(base, encode(records[3], base, template=False)) == ["Red.<|endoftext|>", "Yes, I am.<|endoftext|>"]


def test_what_stands_before_an_answer_is_what_generation_is_given(processor, data):
    """The tokens up to each answer are those of the prompt alone, which `generate` would get."""
    record = read_records(data)[3]
    sample = encode(record, processor)
    media = {"images": record.images, "videos": record.videos}
    starts = [i for i, (a, b) in enumerate(pairwise(sample["labels"]), start=1) if a == -100 and b != -100]
    prompt = processor.apply_chat_template(record.messages[:1], tokenize=False, add_generation_prompt=True)
    assert sample["input_ids"][: starts[0]].tolist() == processor(prompt, **media)["input_ids"][0]
    prompt = processor.apply_chat_template(record.messages[:3], tokenize=False, add_generation_prompt=True)
    assert sample["input_ids"][: starts[1]].tolist() == processor(prompt, **media)["input_ids"][0]
    whole = processor.apply_chat_template(record.messages, tokenize=False)
    assert sample["input_ids"].tolist() == processor(whole, **media)["input_ids"][0]


def test_prompt_and_answer_share_no_token(processor, data):
    """Written one behind the other they are one word of the vocabulary; the model reads the first half and writes the second."""
    tokenizer = processor.tokenizer
    word = next(word for word in sorted(tokenizer.get_vocab()) if word.isascii() and word.isalpha() and len(word) > 5)
    text_record = read_records(data)[4]
    record = type(text_record)(
        "here", [{"role": "user", "content": word[:3]}, {"role": "assistant", "content": word[3:]}], [], []
    )
    sample = encode(record, processor, template=False)
    prompt, answer = (tokenizer(text)["input_ids"] for text in (word[:3], word[3:] + tokenizer.eos_token))
    assert len(tokenizer(word)["input_ids"]) == 1
    assert sample["input_ids"].tolist() == prompt + answer
    assert sample["labels"].tolist() == [-100] * len(prompt) + answer


def test_a_bare_text_is_learned_from_its_second_token_on(processor, data):
    record = read_records(data)[4]
    record.messages[0]["content"] = ""
    sample = encode(record, processor, template=False)
    assert sample["labels"].tolist() == [-100, *sample["input_ids"][1:].tolist()]


def test_a_template_that_rewrites_turns_is_refused(processor, data):
    class Rewriting:
        tokenizer = processor.tokenizer

        @staticmethod
        def apply_chat_template(messages, tokenize, add_generation_prompt=False):
            text = processor.apply_chat_template(
                messages, tokenize=tokenize, add_generation_prompt=add_generation_prompt
            )
            return text.replace("Red.", "") if len(messages) > 3 else text

    record = read_records(data)[3]
    assert list(render(record, processor)[1])
    with pytest.raises(ValueError, match="turn 3 differently"):
        render(record, Rewriting)


# batches


def test_a_mixed_batch_is_each_sample_alone(checkpoint, processor, data):
    model, pad = load(checkpoint), processor.tokenizer.pad_token_id
    dataset = RecordDataset(read_records(data), processor, min_pixels=4096, max_pixels=9216)
    samples = [dataset[index] for index in range(len(dataset))]
    batch = Collator(pad)(samples)
    assert set(batch) - {"logits_to_keep", "use_cache"} == {
        "input_ids", "attention_mask", "labels", "pixel_values", "grid_thw", "media_nums_per_sample",
    }  # fmt: skip
    assert batch["media_nums_per_sample"] == [1, 1, 1, 3, 1, 2, 1, 1]
    assert batch["attention_mask"].sum(1).tolist() == [len(sample["input_ids"]) for sample in samples]
    counts = [int((sample["labels"] != -100).sum()) for sample in samples]
    alone = [loss_of(model, Collator(pad)([sample])) for sample in samples]
    assert len({round(loss, 3) for loss in alone}) == len(alone)
    expected = sum(loss * count for loss, count in zip(alone, counts, strict=True)) / sum(counts)
    assert loss_of(model, batch) == pytest.approx(expected, abs=1e-5)

    del batch["logits_to_keep"]
    assert loss_of(model, batch) == pytest.approx(expected, abs=1e-5), "rows without their logits are not learned"
    assert loss_of(model, Collator(pad, vision_chunked_length=1)(samples)) == pytest.approx(expected, abs=1e-5)


def test_only_logits_that_are_learned_are_computed(checkpoint, processor, data):
    sample = encode(read_records(data)[2], processor, min_pixels=4096, max_pixels=9216)
    with torch.no_grad():
        logits = load(checkpoint)(**Collator(processor.tokenizer.pad_token_id)([sample])).logits
    first = int((sample["labels"] != -100).nonzero()[0])
    assert first > 20 and logits.shape[1] == len(sample["labels"]) - first + 1


def test_workers_give_what_the_process_itself_gives(processor, data):
    """Also where they do not inherit it (macOS, Windows): the dataset and its processor are sent to them."""
    dataset = RecordDataset(read_records(data), processor, min_pixels=4096, max_pixels=9216)
    collate = Collator(processor.tokenizer.pad_token_id)
    expected = [collate([dataset[index], dataset[index + 1]]) for index in (0, 2, 4, 6)]
    gc.collect()  # PyAV's frames, decoded here, have threads: a forked worker that collects them waits for those for ever
    for options in ({"num_workers": 2}, {"num_workers": 1, "multiprocessing_context": "spawn"}):
        found = list(DataLoader(dataset, batch_size=2, collate_fn=collate, **options))
        for ours, theirs in zip(found, expected, strict=True):
            assert all(torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name])) for name in theirs)
    assert len(pickle.dumps(collate)) < 1000


def test_a_record_that_is_too_long_is_named_or_replaced(processor, data, caplog):
    records = read_records(data)
    longest = len(encode(records[4], processor)["input_ids"])
    with pytest.raises(BadRecord, match=r"data.json, record 0: \d+ tokens are more than --max-length"):
        RecordDataset(records, processor, max_length=longest)[0]
    dataset = RecordDataset(records, processor, skip_bad=True, max_length=longest)
    for _ in range(2):
        assert torch.equal(dataset[0]["input_ids"], dataset[4]["input_ids"])
    assert ["record 0" in message for message in caplog.messages] == [True, False, False, False], (
        "each is warned of once"
    )
    with pytest.raises(BadRecord, match="none of the 8 records"):
        RecordDataset(records, processor, skip_bad=True, max_length=3)[0]


def test_a_video_that_breaks_in_a_worker_is_named(checkpoint, data, tmp_path, capfd):
    """By its header it is good, so that only decoding shows it."""
    video = bytearray((data.parent / "v.mp4").read_bytes())
    at = video.index(b"mdat")
    size = int.from_bytes(video[at - 4 : at], "big")
    video[at + 4 : at - 4 + size] = bytes(size - 8)
    (tmp_path / "v.mp4").write_bytes(video)
    (tmp_path / "data.jsonl").write_text(json.dumps({"response": "x", "videos": "v.mp4"}))
    assert run(checkpoint, tmp_path / "data.jsonl", tmp_path / "out", "--workers", 1) == 2
    assert (
        "finetune.py: " + str(tmp_path / "data.jsonl, record 0 (line 1): ") in capfd.readouterr().err.splitlines()[-1]
    )


# parts and runs


def test_every_parameter_belongs_to_one_part(checkpoint):
    model = load(checkpoint)
    config = model.config
    parts = {part: [] for part in tuning_options.PARTS}
    for name, _ in model.named_parameters():
        parts[finetune.part_of(name, config)].append(name)
    assert all(parts.values())
    crossing = {f"layers.{index}" for index in config.text_config.cross_attention_layers}
    assert {".".join(name.split(".")[2:4]) for name in parts["cross"]} == crossing
    assert any("gate" in name for name in parts["cross"]) and "model.separator_token" in parts["merger"]
    assert all("merger" in name or "separator" in name for name in parts["merger"])
    assert all(name.startswith("model.visual.") and "merger" not in name for name in parts["vision"])
    assert not any("cross_attn" in name or "visual" in name for name in parts["language"])


@pytest.mark.parametrize("parts", [["cross", "merger"], ["vision", "language"], ["head"]])
def test_only_the_parts_that_are_named_are_trained(checkpoint, data, tmp_path, parts):
    before, out = weights(checkpoint), tmp_path / "out"
    assert (
        run(checkpoint, data, out, "--train", *parts, "--steps", 2, "--batch-size", 8, "--save-dtype", "bfloat16") == 0
    )
    config, after = load(out).config, weights(out)
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {finetune.part_of(name, config) for name in changed} == set(parts)
    for name in before:
        if finetune.part_of(name, config) not in parts:
            assert before[name].dtype == after[name].dtype == torch.bfloat16 and torch.equal(
                before[name], after[name]
            ), name


@pytest.mark.parametrize("options", [
    ["--batch-size", 8],
    ["--batch-size", 4, "--accumulation", 2, "--lora-rank", 16, "--gradient-checkpointing"],
])  # fmt: skip
def test_a_few_steps_lower_the_loss(checkpoint, data, tmp_path, options):
    options = [*options, "--steps", 8, "--lr", "3e-3", "--eval-data", data, "--eval-steps", 5]
    assert run(checkpoint, data, tmp_path / "out", *options) == 0
    history = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 8 and losses[-1] < 0.9 * losses[0], losses
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [5, 8], "at the end, too"
    assert all(entry["eval_loss"] < losses[0] for entry in history if "eval_loss" in entry)


def assert_same_step(checkpoint, *folders):
    """The one step of two runs has the same size and direction in all that they train."""
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


def test_batches_that_make_a_step_count_as_one(checkpoint, data, tmp_path):
    options = ["--steps", 1, "--train", "cross", *LINEAR]
    assert run(checkpoint, data, tmp_path / "one", "--batch-size", 8, *options) == 0
    assert run(checkpoint, data, tmp_path / "four", "--batch-size", 2, "--accumulation", 4, *options) == 0
    assert_same_step(checkpoint, tmp_path / "one", tmp_path / "four")


def test_bfloat16_keeps_what_is_trained_in_float32(checkpoint, data, tmp_path, monkeypatch):
    monkeypatch.setenv(
        "ACCELERATE_MIXED_PRECISION", "no"
    )  # where transformers 4 leaves "bf16" for later runs of this process
    paths = ["--checkpoint", str(checkpoint), "--data", str(data), "--output", str(tmp_path)]
    model = finetune.load_model(finetune.parse([*paths, *FAST, "--bf16", "--train", "cross"]))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    (tmp_path / "text.json").write_text(json.dumps([{"response": "a red picture"}] * 2))
    assert (
        run(
            checkpoint,
            tmp_path / "text.json",
            tmp_path / "out",
            "--bf16",
            "--train",
            "cross",
            "language",
            "--steps",
            1,
        )
        == 0
    )
    after, before = weights(tmp_path / "out"), weights(checkpoint)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed and all("language_model" in name for name in changed)


@pytest.mark.parametrize("options", [[], ["--lora-rank", 4, "--lora-dropout", 0.3, "--accumulation", 2]])
def test_a_resumed_run_is_the_uninterrupted_one(checkpoint, data, tmp_path, options):
    options = [
        "--steps",
        4,
        "--save-steps",
        2,
        "--batch-size",
        3,
        "--schedule",
        "cosine",
        "--eval-share",
        0.2,
        *options,
    ]
    assert run(checkpoint, data, tmp_path / "out", *options) == 0
    shutil.copytree(tmp_path / "out/checkpoint-2", tmp_path / "kept/checkpoint-2")
    (tmp_path / "kept/checkpoint-3").mkdir()  # of a run that was killed while it wrote this
    state = json.loads((tmp_path / "kept/checkpoint-2/trainer_state.json").read_text())
    state["log_history"].append({"step": 2, "mark": 1})
    (tmp_path / "kept/checkpoint-2/trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "kept/finetune.json").write_bytes((tmp_path / "out/finetune.json").read_bytes())
    assert run(checkpoint, data, tmp_path / "kept", *options, "--resume") == 0
    history = json.loads((tmp_path / "kept/trainer_state.json").read_text())["log_history"]
    assert {"step": 2, "mark": 1} in history, "it went on from there"
    name = "adapter_model.safetensors" if "--lora-rank" in options else "model.safetensors"
    whole, resumed, half = (load_file(tmp_path / folder / name) for folder in ("out", "kept", "out/checkpoint-2"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert any(not torch.equal(whole[key], half[key].to(whole[key])) for key in whole)
    logits_of(load(tmp_path / "out/checkpoint-2"), load_processor(tmp_path / "out/checkpoint-2"), data)


def parsed(output, *options):
    return finetune.parse(["--checkpoint", "c", "--data", "d", "--output", str(output), "--cpu", *map(str, options)])


def test_a_run_goes_on_from_the_checkpoint_of_the_most_steps(tmp_path):
    """By number, not by text: 1000 is after 500."""
    args = parsed(tmp_path, "--resume")
    finetune.write_settings(args, tmp_path)
    assert finetune.check_output(args) is None
    for steps in (500, 1000, 90):
        (tmp_path / f"checkpoint-{steps}").mkdir()
        (tmp_path / f"checkpoint-{steps}/trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-2000").mkdir()  # of a run that was killed while it wrote this
    assert finetune.check_output(args) == str(tmp_path / "checkpoint-1000")


def test_learning_rates_that_nobody_gave(tmp_path):
    assert finetune.training_arguments(parsed(tmp_path)).learning_rate == 1e-5
    assert finetune.training_arguments(parsed(tmp_path, "--lora-rank", 4)).learning_rate == 1e-4
    assert parsed(tmp_path, "--lora-rank", 4).lora_alpha == 8


def test_options_reach_the_trainer(tmp_path):
    """Each with a value that is no default, of ours or of `TrainingArguments`."""
    arguments = finetune.training_arguments(parsed(
        tmp_path, "--epochs", 2.5, "--batch-size", 3, "--accumulation", 5, "--lr", 0.25, "--schedule", "linear", "--warmup", 7,
        "--weight-decay", 0.125, "--max-grad-norm", 0.75, "--seed", 11, "--log-steps", 13, "--save-steps", 17, "--eval-steps", 19,
        "--eval-share", 0.5, "--keep", 4, "--workers", 6, "--gradient-checkpointing",
    ))  # fmt: skip
    expected = {
        "output_dir": str(tmp_path), "num_train_epochs": 2.5, "max_steps": -1, "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 3, "gradient_accumulation_steps": 5, "learning_rate": 0.25, "warmup_steps": 7,
        "weight_decay": 0.125, "max_grad_norm": 0.75, "seed": 11, "logging_steps": 13, "save_steps": 17, "eval_steps": 19,
        "save_total_limit": 4, "dataloader_num_workers": 6, "use_cpu": True, "bf16": False, "report_to": [],
    }  # fmt: skip
    assert {name: getattr(arguments, name) for name in expected} == expected
    assert (str(arguments.lr_scheduler_type.value), str(arguments.eval_strategy.value)) == ("linear", "steps")
    assert getattr(arguments, "activation_checkpointing", arguments.gradient_checkpointing)
    plain = finetune.training_arguments(parsed(tmp_path, "--steps", 3, "--save-steps", 17))
    assert (plain.max_steps, plain.max_grad_norm, plain.save_total_limit, plain.eval_steps) == (3, 1.0, 2, 17)
    assert (
        not getattr(plain, "activation_checkpointing", plain.gradient_checkpointing)
        and plain.eval_strategy.value == "no"
    )


def test_gradients_are_cut_and_old_checkpoints_removed(checkpoint, data, tmp_path):
    """Adam's first step has the size of the gradient only where that is far below its eps: so the cut shows."""
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


def test_the_attention_that_is_asked_for_trains(checkpoint, data, tmp_path):
    paths = ["--checkpoint", str(checkpoint), "--data", str(data), "--output", str(tmp_path), *FAST]
    model = finetune.load_model(finetune.parse([*paths, "--attn", "eager"]))
    assert {
        part._attn_implementation for part in (model.config, model.config.text_config, model.config.vision_config)
    } == {"eager"}


def test_saved_loaded_and_merged_are_one_model(checkpoint, processor, data, tmp_path):
    """The trained model in memory, its folder through the Auto classes, the two ways to merge."""

    def trained(out, *options):
        paths = ["--checkpoint", str(checkpoint), "--data", str(data), "--output", str(out)]
        args = finetune.parse([*paths, *FAST, "--steps", "3", "--lr", "1e-2", *options])
        trainer, own_processor, _ = finetune.prepare(args)
        trainer.train()
        logits = logits_of(trainer.model, processor, data)
        finetune.save(args, trainer, own_processor)
        return logits

    start = logits_of(load(checkpoint), processor, data)
    for options in ([], ["--lora-rank", "4", "--train", "vision", "cross", "head"]):
        folder = tmp_path / f"out{len(options)}"
        logits = trained(folder, *options)
        assert (logits - start).abs().max() > 0.1
        assert torch.allclose(logits_of(load(folder), load_processor(folder), data), logits, atol=1e-5), options

    words = ["--merge", str(folder), "--output", str(tmp_path / "merged")]
    assert finetune.main(words) == 0
    merged = load(tmp_path / "merged"), load_processor(tmp_path / "merged")
    assert torch.allclose(logits_of(*merged, data), logits, atol=1e-4)
    assert trained(tmp_path / "both", *options, "--merge").equal(logits)
    assert torch.allclose(logits_of(load(tmp_path / "both"), processor, data), logits, atol=1e-4)
    assert torch.allclose(logits_of(load(tmp_path / "both/adapter"), processor, data), logits, atol=1e-5)
    both, merged = weights(tmp_path / "both"), weights(tmp_path / "merged")
    assert both.keys() == merged.keys() == weights(checkpoint).keys()
    assert all(torch.equal(both[name], merged[name]) for name in merged)
    assert finetune.main(words) == 2, "the folder is not empty any more"


def test_adapters_are_where_they_are_asked_for(checkpoint, data, tmp_path):
    def targets(*options):
        paths = ["--checkpoint", str(checkpoint), "--data", str(data), "--output", str(tmp_path)]
        model = finetune.load_model(finetune.parse([*paths, *FAST, "--lora-rank", "2", *options]))
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
    assert {finetune.part_of(name, config) for name in everything} == set(tuning_options.PARTS)
    assert not any("embed" in name for name in everything)


def one_of_several(rank, words, processes, port):
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": processes,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in place.items()})  # what torchrun tells each
    assert finetune.main(words) == 0


def side_by_side(words, processes):
    """The command in several processes as torchrun starts them, but forked: what takes seconds to import is there already."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    gc.collect()  # as in test_workers_give_what_the_process_itself_gives
    torch.multiprocessing.start_processes(one_of_several, (words, processes, port), processes, start_method="fork")


def test_the_command_as_a_program():
    """In a process of its own, from another folder than the project's."""
    command = [sys.executable, str(ROOT / "training/finetune.py"), "--merge", "nowhere", "--output", "nowhere-either"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 2 and "finetune.py: --merge nowhere: there is no adapter_config.json" in done.stderr


def test_processes_side_by_side_are_one_with_a_larger_batch(checkpoint, data, tmp_path):
    """As torchrun starts them; one of the two gets texts alone."""
    records = json.loads(data.read_text())
    picture, text = records[0] | {"images": str(data.parent / "red.png")}, records[4]
    (tmp_path / "two.json").write_text(json.dumps([picture, text]))
    options = ["--steps", "1", "--train", "vision", "cross", *LINEAR]
    words = ["--checkpoint", str(checkpoint), "--data", str(tmp_path / "two.json"), *FAST, *options]
    side_by_side([*words, "--output", str(tmp_path / "two")], processes=2)
    assert run(checkpoint, tmp_path / "two.json", tmp_path / "one", *options, "--batch-size", "2") == 0
    assert_same_step(checkpoint, tmp_path / "one", tmp_path / "two")


# what is refused


def test_everything_wrong_is_told_before_a_model_loads(checkpoint, data, tmp_path, monkeypatch, capsys):
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
        ([tied, data, new, "--train", "head"], "the head of this checkpoint is its embeddings"),
    ):
        assert run(*options) == 2, reason
        assert reason in capsys.readouterr().err
    assert not new.exists() and [path.name for path in (tmp_path / "full").iterdir()] == ["file.txt"]
    assert finetune.main(["--merge", str(checkpoint), "--output", str(new)]) == 2
    assert "no adapter_config.json" in capsys.readouterr().err


def test_a_resumed_run_keeps_its_settings(checkpoint, data, tmp_path, capsys):
    options = ["--steps", "1", "--train", "head", "--batch-size", "2"]
    assert run(checkpoint, data, tmp_path / "out", *options, "--resume") == 0, "nothing to go on from: it begins"
    assert run(checkpoint, data, tmp_path / "out", *options, "--resume", "--seed", "3") == 2
    assert "the run began with --seed 0, got 3" in capsys.readouterr().err


@pytest.mark.parametrize("words, reason", [
    (["--output", "o"], "nothing to do"),
    (["--output", "o", "--data", "d"], "--data needs --checkpoint"),
    (["--output", "o", "--data", "d", "--checkpoint", "c", "--merge"], "--merge is for adapters"),
    (["--output", "o", "--data", "d", "--checkpoint", "c", "--merge", "m", "--lora-rank", "2"], "trains nothing"),
    (["--output", "o", "--data", "d", "--checkpoint", "c", "--eval-data", "e", "--eval-share", "0.1"], "not both"),
    (["--output", "o", "--data", "d", "--checkpoint", "c", "--train", "all"], "invalid choice: 'all'"),
    (["--output", "o", "--data", "d", "--checkpoint", "c", "--lr", "0"], "must be above 0"),
])  # fmt: skip
def test_wrong_usage(words, reason, capsys):
    with pytest.raises(SystemExit) as error:
        finetune.main(words)
    assert error.value.code == 2 and reason in capsys.readouterr().err


def test_an_adapter_is_no_checkpoint_to_start_from(data, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    assert run(tmp_path / "adapter", data, tmp_path / "new") == 2
    assert "merge it first" in capsys.readouterr().err
