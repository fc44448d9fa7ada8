"""The memory formula against measurements, and the tables of docs/performance.md against their JSON."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from tiny import Sample, make_model

from moss_vl import attention, block_attention
from moss_vl.benchmarks.batches import report
from moss_vl.benchmarks.end_to_end import tokens_table
from moss_vl.benchmarks.measuring import allocation_peak
from moss_vl.benchmarks.memory import (
    fitting_table,
    frames_that_fit,
    measured_bytes,
    measured_table,
    prefill_bytes,
    released_table,
)
from moss_vl.benchmarks.model import tables
from moss_vl.benchmarks.parts import parts_table
from moss_vl.benchmarks.preprocess import files_table
from moss_vl.benchmarks.random_models import PAD
from moss_vl.benchmarks.stream import growth_table, window_table, with_window, without_window
from moss_vl.cache_layers import CACHE


def sized_model(dtype, hidden=256, layers=8, kv_heads=2, vision=128, wide=4):
    text = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2 * kv_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 64,
        "cross_attention_layers": list(range(2, layers, 4)),
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [12, 10, 10]},
    }
    return make_model(
        text=text, vision={"hidden_size": vision, "intermediate_size": wide * vision, "out_hidden_size": hidden}
    ).to(dtype)


# Name -> (model, frames, rows, columns, text tokens, chunk). The largest part is the encoder in the first two, later
# the caches or the text.
CASES = {
    "short": ({}, 8, 16, 16, 100, 64),
    "wide encoder": ({"vision": 256, "wide": 8, "hidden": 128}, 6, 24, 24, 60, 64),
    "small chunks": ({}, 32, 16, 16, 320, 4),
    "long": ({}, 64, 16, 16, 640, 8),
    "many key heads": ({"kv_heads": 4, "layers": 12}, 48, 16, 16, 480, 8),
    "much text": ({}, 8, 16, 16, 2500, 64),
}
IN_BFLOAT16 = ("short", "small chunks")  # slow on many CPUs


@pytest.mark.parametrize(
    "case, dtype", [*[(case, torch.float32) for case in CASES], *[(case, torch.bfloat16) for case in IN_BFLOAT16]]
)
def test_the_formula_is_at_most_a_fifth_above_the_measurement_and_never_below(case, dtype, monkeypatch):
    monkeypatch.setattr(attention, "CPU_BFLOAT16", False)  # else up to CPU_SCORES scores are added
    sizes, *numbers, chunk = CASES[case]
    model = sized_model(dtype, **sizes)
    formula = prefill_bytes(model.config, *numbers, dtype, chunk=chunk)
    measured = measured_bytes(model, *numbers, chunk=chunk)
    assert measured <= formula["peak"] <= 1.2 * measured, (formula, measured)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula_for_a_vision_cache_in_8_bits(dtype, monkeypatch):
    """No copy of all keys and values in another dtype, while they are computed or while they are read."""
    monkeypatch.setattr(attention, "CPU_BFLOAT16", False)
    sizes, *numbers, chunk = CASES["many key heads"]
    model = sized_model(dtype, **sizes)
    formulas = [prefill_bytes(model.config, *numbers, dtype, chunk=chunk, int8=int8) for int8 in (True, False)]
    measured = measured_bytes(model, *numbers, chunk=chunk, int8=True)
    assert measured <= formulas[0]["peak"] <= 1.2 * measured and formulas[0]["peak"] < 0.95 * formulas[1]["peak"]


@torch.no_grad()
def test_a_step_on_a_vision_cache_in_8_bits_copies_no_keys(monkeypatch):
    monkeypatch.setattr(block_attention, "CPU_PIECE", 64)
    model, inputs = sized_model(torch.float32), Sample("tF" * 60 + "t", (60, 16, 16)).inputs()
    del inputs["cross_attention_mask"]
    cache = model(**inputs, vision_cache_dtype="int8")[CACHE]
    of_layer = sum(part.numel() for part in cache.layers[2].tensors())  # bytes, nearly
    token = torch.ones(1, 1, dtype=torch.long)
    assert allocation_peak(lambda: model(token, **{CACHE: cache}), "cpu") < of_layer / 4


def test_more_frames_fit_if_there_is_more_memory():
    config = sized_model(torch.float32).config
    counts = [frames_that_fit(config, free, int8) for free in (1e9, 2e9) for int8 in (False, True)]
    assert 1 < counts[0] < counts[1] and counts[0] < counts[2] < counts[3]


def test_memory_is_linear_in_the_vision_tokens():
    model = sized_model(torch.float32)
    peaks = [measured_bytes(model, frames, 16, 16, 10 * frames, chunk=4) for frames in (16, 32, 64)]
    steps = [peaks[1] - peaks[0], peaks[2] - peaks[1]]
    assert 1.9 <= steps[1] / steps[0] <= 2.1, peaks


def test_the_tables_are_those_that_were_measured():
    document = (ROOT / "docs/performance.md").read_text(encoding="utf-8")

    def measured(name):
        return json.loads((ROOT / f"docs/performance/{name}.json").read_text(encoding="utf-8"))

    def rows(name):
        return measured(name)["rows"]

    for title, text in tables(rows("model")).items():
        assert text in document, title
    assert parts_table(rows("parts")) in document
    assert report("random", measured("batches")["seconds"]["random"]) in document
    assert measured_table(rows("memory")) in document
    assert files_table(rows("preprocess")) in document
    assert tokens_table(rows("end_to_end"), 64) in document
    assert released_table() in document
    assert fitting_table() in document


def test_the_benchmark_of_streams():
    """Its counts, for a stream that is too short for its times."""
    model = make_model(text={"vocab_size": 1000}, vision={"patch_size": 16}, image_token_id=PAD)
    args = {"device": "cpu", "dtype": "float32", "side": 64, "tokens": 4, "window": 5, "frames": 40, "roll": 60}
    args = SimpleNamespace(**args, most=30, lengths=[20, 30], calls=2)
    row = with_window(model, args)
    assert (row["vision tokens"], row["rounds"], row["vision slope"]) == (5 * 5, 4, 0)
    assert "40, in 4 rounds, 5 in the window" in window_table(row)
    rows = without_window(model, args)
    assert [(row["frames"], row["vision tokens"]) for row in rows] == [(20, 100), (30, 150)]
    assert rows[1]["copied per token"] == 5 / 150  # the first frame has no free space; after that there are 256 tokens
    assert "| 30 | 150 |" in growth_table(rows)
