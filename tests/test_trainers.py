"""What ms-swift 4.6 and LlamaFactory 0.9.6 call of a checkpoint with our files: names, arguments and values. Both have
code for MOSS-VL, written for the released files. docs/tuning.md says what was run with them. Tests of the trainers
themselves are skipped where these are not installed."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image
from transformers import AutoProcessor
from tuning import load

from moss_vl.training.batches import Collator, encode
from moss_vl.training.records import read_records


NANO = ROOT / "checkpoints/moss-vl-nano"
PICTURES = [str(ROOT / "data" / name) for name in ("sample_a.jpg", "example_image.jpg")]
CLIP = str(ROOT / "data/sample_b.mp4")
LIMITS = {"shortest_edge": 36864, "longest_edge": 50176}  # those of the checkpoint for frames
CONVERSATIONS = {  # name -> (turns, images, videos), as both trainers write them
    "image": ([("user", "<image>What shape is red?"), ("assistant", "a circle")], PICTURES[:1], []),
    "images": (
        [
            ("system", "Answer briefly."),
            ("user", "<image><image>How many are there?"),
            ("assistant", "two"),
            ("user", "Sure?"),
            ("assistant", "yes, two"),
        ],
        PICTURES,
        [],
    ),
    "video": ([("user", "<video>What happens?"), ("assistant", "a star appears")], [], [CLIP]),
    "both": ([("user", "<image>and <video>Which is blue?"), ("assistant", "the star")], PICTURES[1:], [CLIP]),
    "text": ([("user", "Say yes."), ("assistant", "yes")], [], []),
}


@pytest.fixture(scope="module")
def model():
    return load(NANO)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(NANO, trust_remote_code=True)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """name -> the conversation as a record of ours."""
    folder = tmp_path_factory.mktemp("records")
    values = []
    for turns, images, videos in CONVERSATIONS.values():
        text = [(role, said.replace("<image>", "<|image|>").replace("<video>", "<|video|>")) for role, said in turns]
        values.append({"messages": [{"role": role, "content": said} for role, said in text]})
        values[-1] |= {key: media for key, media in (("images", images), ("videos", videos)) if media}
    (folder / "data.json").write_text(json.dumps(values))
    return dict(zip(CONVERSATIONS, read_records(folder / "data.json"), strict=True))


@pytest.fixture(scope="module")
def samples(records, processor):
    """name -> the sample of our trainer."""
    return {name: encode(record, processor) for name, record in records.items()}


@pytest.fixture(scope="module")
def losses(model, samples, processor):
    """name -> the loss of our trainer; "batch" for all samples in one batch."""
    collate = Collator(processor.tokenizer.pad_token_id)
    batches = {name: collate([sample]) for name, sample in samples.items()}
    batches["batch"] = collate([*samples.values()])
    return {name: loss_of(model, batch) for name, batch in batches.items()}


def loss_of(model, inputs) -> float:
    with torch.no_grad():
        return model(**inputs).loss.item()


def rendered(turns) -> tuple[str, list[list[int]]]:
    """ChatML as ms-swift writes it, and the characters of the assistant's turns, each with its end token."""
    text, spans = "", []
    for role, said in turns:
        text += f"<|im_start|>{role}\n"
        start = len(text)
        text += said.replace("<image>", "<|image|>").replace("<video>", "<|video|>") + "<|im_end|>"
        if role == "assistant":
            spans.append([start, len(text)])
        text += "\n"
    return text, spans


def test_the_parts_that_the_trainers_name(model):
    """Parts to freeze, to give adapters, and to checkpoint. ms-swift takes `mlp` by a pattern with layer numbers."""
    for name in (
        "model.language_model",
        "lm_head",
        "model.visual",
        "model.visual.merger",
        "model.visual.pos_embed",
        "model.visual.patch_embed",
        "model.visual.blocks",
        "model.language_model.layers.0.mlp",
    ):
        assert isinstance(model.get_submodule(name), torch.nn.Module), name
    assert isinstance(model.model.separator_token, torch.nn.Parameter)
    named = ("model.language_model.", "lm_head.", "model.visual.", "model.separator_token")
    assert [name for name, _ in model.named_parameters() if not name.startswith(named)] == []
    assert model.accepts_loss_kwargs and model.supports_gradient_checkpointing
    assert model._auto_class is not None  # `save_pretrained` writes the code files


# ms-swift


def swift_row(processor, name) -> dict:
    """A sample as `MossVLTemplate._encode` makes it: one call of the processor."""
    turns, images, videos = CONVERSATIONS[name]
    text, spans = rendered(turns)
    media = {"images": [Image.open(path).convert("RGB") for path in images], "videos": videos}
    media = {key: value for key, value in media.items() if value}
    out = processor(text=[text], padding=False, return_tensors="pt", labels_spans=[spans], **media)
    lists = {key: out[key][0].tolist() for key in ("input_ids", "labels")}
    names = ("pixel_values", "grid_thw", "cross_attention_mask", "media_nums_per_sample")
    return {**lists, **{key: out[key] for key in names}}


def swift_batch(rows, pad_token_id) -> dict:
    """A batch as `MossVLTemplate._data_collator` makes it, with masks padded by True."""
    length, frames = (max(row["cross_attention_mask"].shape[axis] for row in rows) for axis in (-2, -1))
    masks = []
    for row in rows:
        (mask,) = row["cross_attention_mask"]
        pad = (0, frames - mask.shape[-1], 0, length - mask.shape[-2])
        masks.append(torch.nn.functional.pad(mask, pad, value=True))

    def padded(lists, value):
        return torch.tensor([items + [value] * (length - len(items)) for items in lists])

    return {
        "input_ids": padded([row["input_ids"] for row in rows], pad_token_id),
        "labels": padded([row["labels"] for row in rows], -100),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
        "pixel_values": torch.cat([row["pixel_values"] for row in rows]),
        "grid_thw": torch.cat([row["grid_thw"] for row in rows]),
        "media_nums_per_sample": [count for row in rows for count in row["media_nums_per_sample"]],
        "cross_attention_mask": torch.stack(masks),
        "vision_chunked_length": 64,
    }


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_samples_of_swift_are_ours(processor, samples, name):
    row, ours = swift_row(processor, name), samples[name]
    assert row["input_ids"] == ours["input_ids"].tolist() and row["labels"] == ours["labels"].tolist()
    assert torch.equal(row["pixel_values"], ours["pixel_values"]) and torch.equal(row["grid_thw"], ours["grid_thw"])
    assert row["media_nums_per_sample"] == [len(ours["grid_thw"])]
    mask, frames = row["cross_attention_mask"], int(ours["grid_thw"][:, 0].sum())  # one frame of a blank medium
    assert mask.dtype == torch.bool and mask.shape == (1, 1, len(row["input_ids"]), frames)


def test_the_losses_of_swift_are_ours(model, processor, losses):
    rows = {name: swift_row(processor, name) for name in CONVERSATIONS}
    pad = processor.tokenizer.pad_token_id
    found = {name: loss_of(model, swift_batch([row], pad)) for name, row in rows.items()}
    found["batch"] = loss_of(model, swift_batch([*rows.values()], pad))
    assert found == pytest.approx(losses, rel=1e-5)


def test_the_losses_of_swift_from_the_logits_that_it_keeps(model, processor, losses):
    """Its default with transformers 5: labels are shortened together with the logits."""
    rows, pad = [swift_row(processor, name) for name in CONVERSATIONS], processor.tokenizer.pad_token_id
    for row, name in zip(
        rows, CONVERSATIONS, strict=True
    ):  # a row alone: the tokens before learned ones, and the last
        batch = swift_batch([row], pad)
        learned = batch["labels"][0] != -100
        labels = torch.nn.functional.pad(batch["labels"][:, learned], (1, 0), value=-100)
        kept = torch.nn.functional.pad(learned[1:], (0, 1), value=True)
        assert labels.shape[1] == kept.sum() < len(learned)
        assert loss_of(model, batch | {"labels": labels, "logits_to_keep": kept}) == pytest.approx(losses[name])
    batch = swift_batch(rows, pad)
    kept = batch["labels"].shape[1] - int((batch["labels"] != -100).int().argmax(-1).min()) + 1
    batch |= {"labels": batch["labels"][:, -kept:], "logits_to_keep": kept}
    assert loss_of(model, batch) == pytest.approx(losses["batch"], rel=1e-5)


def test_the_limits_that_swift_sets(processor):
    """VIDEO_MIN_PIXELS and VIDEO_MAX_PIXELS, FPS, FPS_MIN_FRAMES and FPS_MAX_FRAMES, --max_pixels."""
    size = {"shortest_edge": 4096, "longest_edge": 20000}
    options = {"video_fps": 2.0, "min_frames": 2, "max_frames": 6, "num_extract_threads": 2}
    out = processor(text=["<|video|>"], videos=[CLIP], videos_kwargs={"size": size}, return_tensors="pt", **options)
    assert out["grid_thw"].tolist() == [[6, 10, 6]]
    out = processor(text=["<|image|>"], images=[Image.open(PICTURES[0])], max_pixels=51000, return_tensors="pt")
    assert out["grid_thw"].prod() * 256 <= 51000


# LlamaFactory


def factory_sample(processor, name) -> dict:
    """A sample as `MossVLPlugin` and `MossVLTemplate` make it: text with expanded placeholders, encoded turn by turn;
    images and videos by the processors of images and videos; in the order in which the ids name them."""
    turns, images, videos = CONVERSATIONS[name]
    chunks = {"image": [], "video": []}
    if images:
        limits = {"min_pixels": 50176, "max_pixels": 65536}
        out = processor.image_processor(images=[Image.open(path) for path in images], return_tensors="pt", **limits)
        parts = torch.split(out["pixel_values"], out["image_grid_thw"].prod(-1).tolist())
        chunks["image"] = [*zip(parts, out["image_grid_thw"], strict=True)]
    if videos:
        options = {"video_fps": 1.0, "max_frames": 256, "size": LIMITS, "return_tensors": "pt"}
        out = dict(processor.video_processor(videos=videos, return_metadata=True, **options))
        parts = torch.split(out["pixel_values_videos"], out["video_grid_thw"].prod(-1).tolist())
        chunks["video"] = [*zip(parts, out["video_grid_thw"], strict=True)]
        (metadata,), (grid,) = out["video_metadata"], out["video_grid_thw"]
        times = processor._calculate_timestamps(
            metadata.frames_indices,
            metadata.total_num_frames,
            metadata.fps,
            metadata.duration,
            processor.video_processor.temporal_patch_size,
            actual_timestamps=getattr(metadata, "actual_timestamps", None),
        )
        frames = [f"<|time_start|>{times[i]:.1f} seconds<|time_end|><|image_pad|>" for i in range(int(grid[0]))]
        turns = [
            (role, said.replace("<video>", f"<|vision_start|>{''.join(frames)}<|vision_end|>")) for role, said in turns
        ]
    ids, labels = [], []
    for role, said in turns:
        said = said.replace("<image>", "<|image_pad|>")
        prompt = f"<|im_start|>{role}\n{said}<|im_end|>\n" + ("<|im_start|>assistant\n" if role == "user" else "")
        text = said + "<|im_end|>\n" if role == "assistant" else prompt
        tokens = processor.tokenizer.encode(text, add_special_tokens=False)
        ids += tokens
        labels += [*tokens[:-1], -100] if role == "assistant" else [-100] * len(tokens)
    order, inside = [], False
    for token in ids:
        if token == processor.vision_start_token_id:
            order.append("video")
        elif token == processor.image_token_id and not inside:
            order.append("image")
        inside = (inside or token == processor.vision_start_token_id) and token != processor.vision_end_token_id
    blank = [(torch.zeros(64, 768), torch.tensor([1, 8, 8]))]
    media = [chunks[kind].pop(0) for kind in order] or blank
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "pixel_values": torch.cat([pixels for pixels, _ in media]),
        "grid_thw": torch.stack([grid for _, grid in media]),
    }


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_samples_of_llamafactory_are_ours(processor, samples, name):
    found = factory_sample(processor, name)
    for key, value in found.items():
        assert torch.equal(value, samples[name][key]), key


def test_llamafactory_sets_its_arguments_on_the_processor(processor):
    """`patch_processor` does it, so these names must not change calls."""
    patched = copy.deepcopy(processor)
    for key, value in {
        "tokenizer": patched.tokenizer,
        "image_max_pixels": 1024,
        "image_min_pixels": 1024,
        "image_do_pan_and_scan": False,
        "video_max_pixels": 1024,
        "video_min_pixels": 1024,
        "video_fps": 9.0,
        "video_maxlen": 2,
        "use_audio_in_video": False,
        "audio_sampling_rate": 16000,
    }.items():
        setattr(patched, key, value)
    calls = [
        one(text="<|image|><|video|>", images=PICTURES[:1], videos=[CLIP], return_tensors="pt")
        for one in (processor, patched)
    ]
    assert torch.equal(calls[0]["grid_thw"], calls[1]["grid_thw"])
    assert torch.equal(calls[0]["input_ids"], calls[1]["input_ids"])


# the trainers themselves


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with the conversations as data of both trainers."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"messages": [{"role": role, "content": said} for role, said in turns], "images": images, "videos": videos}
        for turns, images, videos in CONVERSATIONS.values()
    ]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "records.json").write_text(json.dumps(rows))
    tags = {
        name: name.split("_")[0] for name in ("role_tag", "content_tag", "user_tag", "assistant_tag", "system_tag")
    }
    columns = {name: name for name in ("messages", "images", "videos")}
    info = {"file_name": "records.json", "formatting": "sharegpt", "columns": columns, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"records": info}))
    return folder


def run_trainer(folder, *command) -> list[float]:
    """Runs the command of a trainer. Returns the loss of each step, as its trainer_state.json has it."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    (state,) = folder.glob("out/checkpoint-*/trainer_state.json")
    return [step["loss"] for step in json.loads(state.read_text())["log_history"] if "loss" in step]


def test_swift_itself(tmp_path, data, losses):
    """Steps that change nothing: each reports the loss of its record."""
    pytest.importorskip("swift.template.templates.moss")
    fixed = {"learning_rate": 0, "warmup_ratio": 0, "max_steps": 5, "save_steps": 5, "logging_steps": 1}
    serial = {"dataset_shuffle": "false", "train_dataloader_shuffle": "false", "dataloader_num_workers": 0}
    others = {"gradient_accumulation_steps": 1, "split_dataset_ratio": 0, "add_version": "false", "report_to": "none"}
    where = {
        "model": NANO,
        "dataset": data / "records.jsonl",
        "output_dir": tmp_path / "out",
        "torch_dtype": "float32",
    }
    options = {**where, **fixed, **serial, **others, "tuner_type": "full", "per_device_train_batch_size": 1}
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    found = run_trainer(tmp_path, "-m", "swift.cli.main", "sft", *flags)
    assert found == pytest.approx([losses[name] for name in CONVERSATIONS], rel=1e-3)


def test_llamafactory_itself(tmp_path, data, losses):
    plugins = pytest.importorskip("llamafactory.data.mm_plugin").PLUGINS
    if "moss_vl" not in plugins:
        pytest.skip("this LlamaFactory has no MOSS-VL")
    limits = {"image_min_pixels": 50176, "image_max_pixels": 65536, "video_fps": 1.0, "video_maxlen": 256}
    limits |= {"video_min_pixels": LIMITS["shortest_edge"], "video_max_pixels": LIMITS["longest_edge"]}
    fixed = {"learning_rate": 0, "max_steps": 5, "save_steps": 5, "logging_steps": 1, "disable_shuffling": True}
    where = {"model_name_or_path": NANO, "trust_remote_code": True, "dataset_dir": data, "dataset": "records"}
    parts = {"finetuning_type": "full", "freeze_vision_tower": False, "freeze_multi_modal_projector": False}
    others = {"stage": "sft", "do_train": True, "template": "moss_vl", "use_cpu": True, "report_to": "none"}
    rows = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "preprocessing_num_workers": 1}
    options = {**where, **limits, **fixed, **parts, **others, **rows, "output_dir": tmp_path / "out"}
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(options, default=str))
    found = run_trainer(tmp_path, "-m", "llamafactory.cli", "train", settings)
    assert found == pytest.approx([losses[name] for name in CONVERSATIONS], rel=1e-3)
