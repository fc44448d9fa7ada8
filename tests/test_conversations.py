"""Caches in random conversations against the float64 model, and the float64 model against the golden numbers."""

import pytest
from conftest import GOLDEN
from conversation_fuzzer import converse, make_pair
from oracle import Oracle
from safetensors.torch import load_file

from moss_vl.configuration_moss_vl import MossVLConfig
from moss_vl.modeling_moss_vl import MossVLForConditionalGeneration


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def pair(request):
    return make_pair(request.param)


@pytest.mark.parametrize("first", range(0, 100, 20))
def test_random_conversations(pair, first):
    """100 seeds per kernel; `tests/conversation_fuzzer.py` runs more."""
    operations = sum(converse(seed, *pair) for seed in range(first, first + 20))
    assert operations > 80


@pytest.mark.parametrize("case", ["text", "image", "video"])
def test_the_oracle_equals_the_golden_numbers(case):
    """So the oracle follows the specification and not the package."""
    folder = GOLDEN / "model" / "tiny"
    config = MossVLConfig.from_json_file(folder / "config.json")
    model = MossVLForConditionalGeneration._from_config(config)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    data = load_file(folder / f"{case}.safetensors")
    oracle, frames, first = Oracle(model), [], 0
    for t, h, w in data["grid_thw"].tolist() if case != "text" else ():
        for _ in range(t):
            frames.append((oracle.encode(data["pixel_values"][first : first + h * w], h, w), h // 2, w // 2))
            first += h * w
    logits = oracle.logits(data["input_ids"].tolist(), frames)
    expected = data["logits"].double()
    assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()
