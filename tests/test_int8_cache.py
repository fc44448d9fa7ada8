"""The vision cache in 8 bits: the rounding, all readers against one that converts the whole, what a cache can do, and
where the option is taken."""

import copy

import pytest
import torch
from flash_kernels import install, use
from quantized_layouts import KV8
from tiny import Sample, assorted_samples, batch, make_model
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from varlen_kernels import varlen  # noqa: F401

from moss_vl import block_attention, cache_layers, vision_plan
from moss_vl.cache_layers import Int8VisionLayer
from moss_vl.int8_states import Int8States, dtype_of_settings
from moss_vl.modeling_moss_vl import CACHE


INT8 = {"vision_cache_dtype": "int8"}
ATOL = 2e-3  # logits are of order 10; states that differ in their last bit may be rounded to another number


# Rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_is_at_most_a_scale(dtype):
    states = torch.randn(1, 3, 50, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 3, 50)[:, None]
    states[:, 1, 7] = 0
    states = states.to(dtype)
    stored = Int8States.of(states)
    assert stored.numbers.dtype == torch.int8 and stored.scales.shape == (1, 3, 50, 1)
    scale = stored.scales.float()
    exact = stored.read(slice(None), torch.float32)
    assert ((exact - states.float()).abs() <= scale * 1.005).all() and (exact[:, 1, 7] == 0).all()
    assert ((exact - states.float()).abs() <= scale * 0.5 + 1e-9).float().mean() > 0.95
    read = stored.read(slice(10, 20), dtype)
    assert read.dtype == dtype and torch.equal(read.float(), exact[:, :, 10:20].to(dtype).float())


# Reading in pieces


def whole(model):
    """The same model with eager, which converts all keys and values at once."""
    model.config.text_config.cross_attention_implementation = "eager"
    return model


@pytest.fixture(params=["pieces", "blocks", "varlen"])
def small(request, monkeypatch):
    """Pieces of few tokens, so that small prompts have several; joined spans with masks, or blocks."""
    monkeypatch.setattr(block_attention, "CPU_PIECE", 7)
    if request.param == "varlen":
        request.getfixturevalue("varlen")
    if request.param != "pieces":
        monkeypatch.setattr(vision_plan, "JOINED_SIZE", 0)
        monkeypatch.setattr(vision_plan, "LEAST_STEPS", 2)


@torch.no_grad()
def run(model, inputs, steps=3, cache=None, **options):
    """The logits of a prompt and of some tokens after it, and the cache."""
    out = model(**inputs, **INT8, **({} if cache is None else {CACHE: cache}), **options)
    logits, cache, mask = [out.logits], out[CACHE], inputs.get("attention_mask")
    for step in range(steps):
        ids = torch.full((len(inputs["input_ids"]), 1), 5 + step)
        given = {}
        if mask is not None:
            mask = given["attention_mask"] = torch.nn.functional.pad(mask, (0, 1), value=1)
        logits.append(model(input_ids=ids, **given, **{CACHE: cache}).logits)
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("side", ["left", "right"])
def test_pieces_are_the_whole(small, side):
    inputs = batch(assorted_samples(), side)
    got, cache = run(make_model(), inputs, steps=3 if side == "left" else 0)
    expected, _ = run(whole(make_model()), inputs, steps=3 if side == "left" else 0)
    real = torch.nn.functional.pad(
        inputs["attention_mask"].bool(), (0, got.shape[1] - inputs["input_ids"].shape[1]), value=True
    )
    assert torch.allclose(got[real], expected[real], atol=ATOL)
    assert all(type(cache.layers[index]) is Int8VisionLayer for index in (1, 4))


def test_frames_that_a_mask_hides(small):
    inputs = assorted_samples()[3].inputs()
    inputs["cross_attention_mask"][..., 5:, 1] = True
    got, expected = run(make_model(), inputs)[0], run(whole(make_model()), inputs)[0]
    assert torch.allclose(got, expected, atol=ATOL)
    assert not torch.allclose(got, run(make_model(), assorted_samples()[3].inputs())[0], atol=1e-2)


def test_the_error_of_logits_is_small():
    """Below a hundredth of their size, in float32 and in bfloat16; and not 0."""
    for dtype, limit in ((torch.float32, 0.01), (torch.bfloat16, 0.05)):
        model = make_model().to(dtype)
        for sample in assorted_samples()[1:]:
            inputs = sample.inputs()
            inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
            with torch.no_grad():
                exact = make_model()(**sample.inputs()).logits
            off = (run(model, inputs, steps=0)[0].float() - exact).norm() / exact.norm()
            assert 0 < off < limit


@pytest.mark.parametrize("name", ["flash_attention_2", "mine"])
def test_other_implementations(monkeypatch, small, name):
    install(monkeypatch)
    calls, sdpa = [], ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping, "mine", lambda *args, **kw: calls.append(args[2]) or sdpa(*args, **kw)
    )
    inputs, model = batch(assorted_samples(), "left"), make_model()
    expected = run(whole(make_model()), inputs)[0][:, -4:]
    if name == "mine":
        model.config.text_config.cross_attention_implementation = name
    else:
        use(model, name)
    assert torch.allclose(run(model, inputs)[0][:, -4:], expected, atol=ATOL)
    assert bool(calls) == (name == "mine")


def test_weights():
    with torch.no_grad():
        inputs = assorted_samples()[3].inputs()
        exact = make_model()(**inputs, output_attentions=True).cross_attentions
        got = make_model()(**inputs, **INT8, output_attentions=True).cross_attentions
    assert all(torch.allclose(*pair, atol=0.02) for pair in zip(got, exact, strict=True))


# What a cache can do


def prompt(seed=7, frames=6):
    inputs = Sample("tF" * frames + "ttt", (frames, 4, 4), seed=seed).inputs()
    return {name: inputs[name] for name in ("input_ids", "pixel_values", "grid_thw")}


def test_chunks_static_caches_and_autocast():
    inputs = prompt()
    ids, model = inputs.pop("input_ids"), make_model()
    expected = run(model, {"input_ids": ids, **inputs})[0]
    for cache in (DynamicCache(), StaticCache(config=model.config.text_config, max_cache_len=40)):
        with torch.no_grad():
            model(input_ids=ids[:, :5], **inputs, prompt_length=ids.shape[1], **INT8, **{CACHE: cache})
        got, _ = run(model, {"input_ids": ids[:, 5:]}, cache=cache, prompt_length=ids.shape[1])
        assert torch.allclose(got, expected[:, 5:], atol=ATOL)
    with torch.autocast("cpu", torch.bfloat16):
        _, cache = run(model, {"input_ids": ids, **inputs})
    got, _ = run(
        model, {"input_ids": torch.ones_like(ids[:, :2])}, cache=cache
    )  # the cache has no dtype that autocast could change
    assert got.isfinite().all()


def test_forks_copies_crops_and_dropped_frames():
    model, inputs, later = make_model(), prompt(), prompt(seed=8, frames=3)
    _, cache = run(model, inputs, steps=0)
    before = [tensor.clone() for tensor in cache.layers[4].tensors()]
    fork, copied = model.fork_cache(cache), copy.deepcopy(cache)
    assert fork.layers[4].key_scales.data_ptr() == cache.layers[4].key_scales.data_ptr()
    answers = [run(model, later, cache=one)[0] for one in (fork, copied, cache)]
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
    # The fork did not write over tokens of the original, or the original over those of the fork.
    assert all(
        torch.equal(now[:, :, : old.shape[2]], old) for now, old in zip(cache.layers[4].tensors(), before, strict=True)
    )
    cache.crop(-(cache.get_seq_length() - inputs["input_ids"].shape[1]))
    assert torch.allclose(run(model, later, cache=cache)[0], answers[0], atol=1e-5)

    with torch.no_grad():
        windows = []
        for options in ({}, INT8):
            cache = DynamicCache()
            model(**inputs, **options, **{CACHE: cache})
            for count in (1, 3, 1):
                model.drop_frames(cache, count)
            windows.append(model(**later, **{CACHE: cache}).logits)
            assert model.cache_contents(cache).dropped == [5]
    assert torch.allclose(*windows, atol=0.1) and not torch.equal(*windows)


def test_bytes():
    model, inputs = (
        make_model(
            text={
                "head_dim": 64,
                "rope_scaling": {"mrope_section": [12, 10, 10], "mrope_interleaved": True, "rope_type": "default"},
            }
        ).bfloat16(),
        prompt(),
    )
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with torch.no_grad():
        held = [
            model.cache_contents(model(**inputs, use_cache=True, **options)[CACHE]).vision_bytes
            for options in ({}, INT8)
        ]
    assert held[1] == held[0] * (64 + 2) // 128  # a byte per number, two per token and head


def test_reordered_and_repeated_rows():
    model, inputs = make_model(), batch(assorted_samples()[1:4], "left")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **INT8}
    beams = {"num_beams": 3, "num_return_sequences": 2}
    for more in ({}, beams, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2, "eos_token_id": 1}):
        rows = slice(0, 1) if "prompt_lookup_num_tokens" in more else slice(None)
        given = assorted_samples()[3].inputs() if rows.stop else inputs
        assert torch.equal(
            model.generate(**given, **options, **more), whole(make_model()).generate(**given, **options, **more)
        )


def test_joint_decoding():
    model = make_model()
    caches = [run(model, sample.inputs(), steps=0)[1] for sample in assorted_samples()[1:4]]
    caches += [model.fork_cache(caches[0]), model(**assorted_samples()[2].inputs(), use_cache=True)[CACHE]]
    tokens = [5, 6, 7, 8, 9]
    with torch.no_grad():
        expected = [
            model(input_ids=torch.tensor([[token]]), **{CACHE: model.fork_cache(cache)}).logits[:, -1]
            for token, cache in zip(tokens, caches, strict=True)
        ]
        got = model.decode_rows(tokens, caches)
    assert torch.allclose(got, torch.cat(expected), atol=1e-4)


# Errors


def test_refusals():
    model, inputs = make_model(), prompt()
    with pytest.raises(ValueError, match="`vision_cache_dtype` is 'int4'; expected 'int8', or None"):
        model(**inputs, vision_cache_dtype="int4")
    with pytest.raises(ValueError, match="has no gradients; expected a call under `torch.no_grad"):
        model(**inputs, **INT8)
    with torch.no_grad():
        with pytest.raises(ValueError, match="the call has no cache"):
            model(**inputs, **INT8, use_cache=False)
        cache = model(**inputs, use_cache=True)[CACHE]
        with pytest.raises(ValueError, match="keeps its vision tokens in the dtype of the model"):
            model(input_ids=inputs["input_ids"][:, :1], **INT8, **{CACHE: cache})
        cache = model(**inputs, **INT8)[CACHE]
    with pytest.raises(ValueError, match="read with gradients"):
        model(input_ids=inputs["input_ids"][:, :1], **{CACHE: cache})


# Where the option is taken


def test_released_settings(monkeypatch):
    """generation_config.json of released checkpoints with a cache in 8 bits, without hqq."""
    warnings = []
    monkeypatch.setattr(cache_layers.logger, "warning_once", warnings.append)
    monkeypatch.setitem(cache_layers.CACHE_PACKAGES, "hqq", ("hqq", lambda: False))
    model, inputs = make_model(), prompt()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    expected = model.generate(**inputs, **options, **INT8)
    model.generation_config = GenerationConfig(**KV8)
    assert dtype_of_settings(model.generation_config) == "int8"
    got = model.generate(**inputs, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert type(got[CACHE].layers[1]) is Int8VisionLayer and type(got[CACHE]) is DynamicCache
    assert len(warnings) == 1 and "by hqq, which is not installed" in warnings[0]
    model.generation_config.cache_config = {**KV8["cache_config"], "nbits": 4}
    assert dtype_of_settings(model.generation_config) is None
