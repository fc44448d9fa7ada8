"""What the tests of realtime sessions share: a tiny random model with a tokenizer that has the tokens of the protocol,
frames, and scripts that force what the model writes."""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRATCH
from tiny import make_model
from transformers import AutoTokenizer

from moss_vl.image_processing_moss_vl import MossVLImageProcessor
from moss_vl.processing_moss_vl import MossVLProcessor
from moss_vl.realtime_stream import RealtimeStream
from moss_vl.video_processing_moss_vl import MossVLVideoProcessor


NANO = ROOT / "checkpoints/moss-vl-nano"
SILENCE, RESPONSE, IM_END = "<|silence|>", "<|response|>", "<|im_end|>"


@functools.cache
def plain_checkpoint() -> Path:
    """A copy of moss-vl-nano whose tokenizer lacks the tokens of the protocol: it is no realtime checkpoint."""
    folder = shutil.copytree(NANO, Path(tempfile.mkdtemp(dir=SCRATCH)) / "plain", symlinks=False)
    known = {SILENCE, RESPONSE}
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in known]
    path.write_text(json.dumps(content))
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text())
    decoder = content["added_tokens_decoder"]
    content["added_tokens_decoder"] = {
        index: token for index, token in decoder.items() if token["content"] not in known
    }
    content["additional_special_tokens"] = [name for name in content["additional_special_tokens"] if name not in known]
    path.write_text(json.dumps(content))
    return folder


def make_tokenizer(added=(SILENCE, RESPONSE)):
    tokenizer = AutoTokenizer.from_pretrained(plain_checkpoint(), trust_remote_code=True)
    tokenizer.add_tokens(list(added), special_tokens=True)
    return tokenizer


def make_processor(tokenizer=None):
    """Frames of 64 to 128 pixels a side: 4 to 16 vision tokens."""
    size = {"shortest_edge": 64 * 64, "longest_edge": 128 * 128}
    template = (NANO / "chat_template.jinja").read_text()
    return MossVLProcessor(
        MossVLImageProcessor(size=size), tokenizer or make_tokenizer(), MossVLVideoProcessor(), chat_template=template
    )


def make_realtime_model(processor, dtype=torch.float32, attn_implementation="sdpa", **text):
    ids = {
        f"{kind}_token_id": getattr(processor, f"{kind}_token_id")
        for kind in ("image", "video", "vision_start", "vision_end")
    }
    text = {"vocab_size": len(processor.tokenizer), "max_position_embeddings": 1 << 20, **text}
    return make_model(attn_implementation, text=text, vision={"patch_size": 16}, **ids).to(dtype)


@pytest.fixture(scope="session")
def processor():
    return make_processor()


@pytest.fixture(scope="session")
def model(processor):
    return make_realtime_model(processor)


def picture(seed: int, height: int = 64, width: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


class Script:
    """A logits processor that forces the next tokens, and records the model's logits. After its end the model stays
    silent, or is free.

    Args:
        words: token names, or texts that become several tokens.
    """

    def __init__(self, processor, *words, free=False):
        self.tokenizer = processor.tokenizer
        self.tokens = [token for word in words for token in self.encode(word)]
        self.free = free
        self.seen = []  # (ids, logits) of each step

    def encode(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def __call__(self, input_ids, scores):
        self.seen.append((input_ids[0].tolist(), scores[0].clone()))
        if self.free and not self.tokens:
            return scores
        token = self.tokens.pop(0) if self.tokens else self.encode(SILENCE)[0]
        forced = torch.full_like(scores, -float("inf"))
        forced[:, token] = 0
        return forced


def stream(model, processor, *words, free=False, **options):
    """A stream whose model writes `words`; (stream, script)."""
    script = Script(processor, *words, free=free)
    return RealtimeStream(model, processor, logits_processor=[script], **options), script


def names(events) -> list[str]:
    return [type(event).__name__ for event in events]


def run(made: RealtimeStream, limit: int = 200) -> list:
    """Steps until the stream parks or ends; all events."""
    events = []
    for _ in range(limit):
        events += made.step()
        if made.parked or made.ended:
            return events
    raise AssertionError(f"the stream did not park in {limit} steps")


def raw(events) -> str:
    return "".join(event.raw for event in events)


def encode(processor, text):
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def make_talking_model():
    """(processor, model) of a tiny realtime checkpoint that chooses each token by the last one alone. It says "red
    star" at every frame of a stream, and "Yes" to every question; outside of a stream, "Yes" without an end."""
    processor = make_processor()
    model = make_realtime_model(processor)
    follow = {
        "\n": SILENCE,
        "<|vision_end|>": RESPONSE,
        RESPONSE: "red",
        "red": " star",
        " star": SILENCE,
        SILENCE: "Y",  # the last token of a question
        "Y": "es",
        "es": SILENCE,
    }
    embedding, head = model.model.language_model.embed_tokens.weight, model.lm_head.weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")) or name.endswith("_gate"):
                parameter.zero_()  # no layer changes its input
        head.zero_()
        embedding[:, : len(follow)] = 0
        for number, words in enumerate(follow.items()):
            [token], [following] = (encode(processor, word) for word in words)
            embedding[token] = 0
            embedding[token, number] = 1
            head[following, number] = 1
    return processor, model
