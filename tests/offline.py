"""What the tests of the offline methods share: a tiny random model with its processor, queries, queue servers."""

import json
import queue
import threading

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from PIL import Image
from transformers import AutoTokenizer

from moss_vl.configuration_moss_vl import MossVLConfig
from moss_vl.image_processing_moss_vl import MossVLImageProcessorFast
from moss_vl.modeling_moss_vl import MossVLForConditionalGeneration
from moss_vl.processing_moss_vl import MossVLProcessor
from moss_vl.video_processing_moss_vl import MossVLVideoProcessor


VIDEO = str(GOLDEN / "processing/media/v05s_320x240_30.mp4")
LONGER_VIDEO = str(GOLDEN / "processing/media/v5s_320x240_30.mp4")
CHATML = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' "
    "-}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
SMALL = {"max_pixels": 16384}  # pixels; 4 to 12 vision tokens per frame
NEW = {"max_new_tokens": 8}
SEEN = ("input_ids", "pixel_values", "grid_thw")
RECORD = {
    "id": 7,
    "metadata": {"source": "web"},
    "response": "a star",
    "label": None,
    "duration": 3.5,
    "conversation_id": "x",
    "frames": 3,
}


@pytest.fixture(scope="module")
def processor():
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "processing/tokenizer")
    return MossVLProcessor(MossVLImageProcessorFast(), tokenizer, MossVLVideoProcessor(), chat_template=CHATML)


@pytest.fixture(scope="module")
def model(processor):
    """The golden tiny model with 16-pixel patches, and weights so large that no two tokens are nearly equally
    likely."""
    config = json.loads((GOLDEN / "model/tiny/config.json").read_text())
    config["text_config"]["vocab_size"] = len(processor.tokenizer)
    config["vision_config"]["patch_size"] = 16
    ids = {
        f"{kind}_token_id": getattr(processor, f"{kind}_token_id")
        for kind in ("image", "video", "vision_start", "vision_end")
    }
    made = MossVLForConditionalGeneration(MossVLConfig(**{**config, **ids})).eval()
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1 or parameter.numel() == 1 or not parameter.any():
                parameter.normal_(std=0.3, generator=noise)
    made.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    return made


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Paths of three pictures of noise: 64 x 64, 128 x 64 and 96 x 160 (width x height)."""
    folder, noise = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = []
    for width, height in ((64, 64), (128, 64), (96, 160)):
        paths.append(str(folder / f"{width}x{height}.png"))
        Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(paths[-1])
    return paths


@pytest.fixture
def calls(model, monkeypatch):
    """Keyword arguments of every `generate` call."""
    recorded, generate = [], model.generate

    def spy(**kwargs):
        recorded.append(kwargs)
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", spy)
    return recorded


@pytest.fixture
def nothing_is_encoded(monkeypatch):
    def decode(*args, **kwargs):
        raise AssertionError("media were processed although the query is wrong")

    monkeypatch.setattr(MossVLProcessor, "__call__", decode)


def by_hand(model, processor, text, images=None, videos=None, media=SMALL, **generate):
    inputs = processor(text=text, images=images, videos=videos, return_tensors="pt", **media)
    ids = model.generate(
        **inputs, **{**NEW, **generate}, do_sample=False, pad_token_id=processor.tokenizer.pad_token_id
    )
    return processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def batch(model, processor, *queries, **kwargs):
    return model.offline_batch_generate(processor, list(queries), **kwargs)


def text_of(model, processor, query, **kwargs):
    return batch(model, processor, query, **kwargs)["results"][0]["text"]


def query_of(prompt=None, media=SMALL, generate=NEW, **rest):
    query = {"media_kwargs": dict(media), "generate_kwargs": {**NEW, **generate}, **rest}
    return query if prompt is None else {"prompt": prompt, **query}


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


# the queue


def serve(model, processor, *items, stop=True):
    """The output of a server, as a list of pieces per round, for items that are queued before it starts."""
    asked, said = queue.Queue(), queue.Queue()
    for item in (*items, *([{"stop_offline_generate": True}] if stop else [])):
        asked.put(item)
    failures = []

    def run():
        try:
            model.offline_generate(processor, asked, said)
        except BaseException as error:  # on a thread it would only be a warning
            failures.append(error)

    server = threading.Thread(target=run, daemon=True)
    server.start()
    server.join(120)
    assert not server.is_alive() and not failures, failures
    rounds = [[]]
    while not said.empty():
        piece = said.get()
        if piece == "<|round_end|>":
            rounds.append([])
        else:
            rounds[-1].append(piece)
    assert rounds.pop() == []
    return rounds


def start(model, processor, asked, said):  # noqa: F811
    """Starts a server on a thread. The returned function joins it, and raises what it raised."""
    failures = []

    def run():
        try:
            model.offline_generate(processor, asked, said)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def join():
        thread.join(60)
        assert not thread.is_alive()
        if failures:
            raise failures[0]

    return join


def emptied(of):
    return [of.get_nowait() for _ in range(of.qsize())]
