"""A small checkpoint, data and a runner for tests of training/."""

import gc
import json
import os
import shutil
import socket

import pytest
import torch
from conftest import ROOT
from make_media import write_video
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

from moss_vl.training import finetune
from moss_vl.training.batches import Collator, RecordDataset
from moss_vl.training.records import read_records


NANO = ROOT / "checkpoints/moss-vl-nano"
STEADY = ["--schedule", "constant", "--warmup", "0", "--lr", "1e-3"]
LINEAR = ["--lr", "1", "--max-grad-norm", "1e-9"]  # Adam's first step is proportional to gradients far below its eps
FAST = ["--cpu", "--workers", "0", "--log-steps", "1", "--min-pixels", "4096", "--max-pixels", "9216", *STEADY]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The small checkpoint made smaller, with files instead of links and random weights in every part."""
    folder = shutil.copytree(NANO, tmp_path_factory.mktemp("copied") / "moss-vl", symlinks=False)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "cross_attention_layers": [1, 3],
        "rope_scaling": {"mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_type": "default"},
    }
    config["vision_config"] |= {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }
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
        {
            "messages": [{"role": role, "content": text} for role, text in chat],
            "images": "red.png",
            "videos": {"video_path": "v.mp4", "segments": [[0, 2], [2.5]]},
        },
        {"prompt": "Say yes.", "response": "yes"},
        {"prompt": "Which is blue?", "response": "2", "images": ["red.png", "blue.png"]},
        {"prompt": "", "response": "a red picture", "images": "red.png"},
        {"prompt": "Say no.", "response": "no"},
    ]
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


def tune_as_rank(rank, command):
    assert finetune.main(command) == 0


def run_parallel(function, arguments, processes):
    """Calls `function(rank, *arguments)` in several processes with the environment of torchrun. They are forked, which
    saves the imports."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    gc.collect()  # as in test_batches.py: a forked process must not collect decoded frames
    arguments = (function, arguments, processes, port)
    torch.multiprocessing.start_processes(_as_rank, arguments, processes, start_method="fork")


def _as_rank(rank, function, arguments, processes, port):
    environment = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": processes,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in environment.items()})
    function(rank, *arguments)
