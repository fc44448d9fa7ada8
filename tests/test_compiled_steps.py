"""Decode steps after `torch.compile`: one graph without a break, no new graph for other prompts, the same tokens."""

from typing import Optional

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from moss_vl.cache_layers import CACHE
from moss_vl.media import frame_groups
from moss_vl.tests.tiny import Sample, assorted_samples, batch, close, make_model, media


@pytest.fixture
def model():
    torch._dynamo.reset()
    return make_model(text={"num_hidden_layers": 3, "cross_attention_layers": [1]})


def compiled(model, backend="eager") -> CompileCounterWithBackend:
    """Compiles the steps of a model without breaks; the result counts graphs."""
    counter = CompileCounterWithBackend(backend)
    model.compile_decode(backend=counter, fullgraph=True)
    return counter


@torch.no_grad()
def step_logits(model, inputs, cache=None, steps=3, rows_per_sample=1) -> torch.Tensor:
    """Logits of steps after a prompt, [B, steps, vocab]. The tokens are given, so that all calls see the same."""
    text = {name: inputs[name].repeat_interleave(rows_per_sample, 0) for name in ("input_ids", "attention_mask")}
    mask = inputs["cross_attention_mask"].repeat_interleave(rows_per_sample, 0)
    prompt = inputs | text | {"cross_attention_mask": mask, "rows_per_sample": rows_per_sample, "use_cache": True}
    cache = model(**prompt, prompt_length=mask.shape[2], **{CACHE: cache})[CACHE]
    tokens = torch.arange(1, 1 + len(mask) * steps).view(len(mask), steps)
    return torch.cat([model(token, **{CACHE: cache}).logits for token in tokens.split(1, dim=1)], dim=1)


def check(model, counter, inputs, graphs: Optional[int], what: str, static=None, **kwargs) -> None:
    """Compares compiled with uncompiled steps, and the number of graphs that were compiled for them."""
    settings, model.model.step_settings = model.model.step_settings, None
    expected = step_logits(model, inputs, static and model.static_cache(*static), **kwargs)
    model.model.step_settings, before = settings, counter.frame_count
    got = step_logits(model, inputs, static and model.static_cache(*static), **kwargs)
    close(got, expected, what)
    assert graphs is None or counter.frame_count - before == graphs, f"{what}: {counter.frame_count - before} graphs"


def test_one_row(model):
    """The first step after the first prompt compiles; other lengths of text and vision use the same graph."""
    counter, samples = compiled(model), assorted_samples()
    check(model, counter, samples[2].inputs(), 1, "first prompt")
    check(model, counter, samples[3].inputs(), 0, "other text and frames")
    check(model, counter, Sample("t" * 30 + "F", (1, 8, 8), seed=7).inputs(), 0, "longer")


def test_without_frames(model):
    counter = compiled(model)
    check(model, counter, Sample("ttttt").inputs(), 1, "first prompt")
    check(model, counter, Sample("t" * 20, seed=1).inputs(), 0, "longer")


def test_padded_batches(model):
    counter, samples = compiled(model), assorted_samples()
    check(model, counter, batch(samples[1:4], "left"), 1, "first batch")
    check(model, counter, batch([samples[3], samples[4], samples[2]], "left"), 0, "other padding and frames")
    check(model, counter, batch(samples[0:2], "left"), 1, "two rows, one without frames")


def test_beams(model):
    counter, samples = compiled(model), assorted_samples()
    check(model, counter, samples[2].inputs(), 1, "three beams", rows_per_sample=3)
    check(model, counter, samples[3].inputs(), 0, "three other beams", rows_per_sample=3)


def test_static_caches(model):
    """All prompts that fit into caches of one size use one graph, whatever they and their padding are."""
    counter, samples = compiled(model), assorted_samples()
    check(model, counter, samples[2].inputs(), 1, "first prompt", static=(40, 100))
    check(model, counter, samples[3].inputs(), 0, "other text and frames", static=(40, 100))
    check(model, counter, samples[3].inputs(), 1, "another size", static=(64, 128))
    check(model, counter, batch(samples[1:4], "left"), 1, "a batch", static=(40, 100))
    check(model, counter, batch([samples[3], samples[0], samples[4]], "left"), 0, "other padding", static=(40, 100))


def test_a_static_cache_keeps_its_addresses(model):
    """After `reset`, the next prompt uses the same memory, as CUDA graphs need."""
    cache, samples = model.static_cache(40, 100), assorted_samples()
    seen = []
    for sample in (samples[2], samples[3], samples[1]):
        cache.reset()
        expected = step_logits(model, sample.inputs())
        close(step_logits(model, sample.inputs(), cache), expected)
        text, vision = cache.layers[0], cache.layers[1]
        seen.append([part.data_ptr() for part in (text.keys, text.values, *vision.buffers)])
    assert seen[0] == seen[1] == seen[2]


@torch.no_grad()
def test_a_fork_of_a_static_cache(model):
    """A fork keeps its frames when the original takes another prompt."""
    samples, token = assorted_samples(), torch.tensor([[7]])
    cache = model.static_cache(40, 100)
    model(**samples[2].inputs(), **{CACHE: cache})
    fork, expected = model.fork_cache(cache), model(token, **{CACHE: model.fork_cache(cache)}).logits
    cache.reset()
    model(**samples[3].inputs(), **{CACHE: cache})
    model(token, **{CACHE: cache})
    close(model(token, **{CACHE: fork}).logits, expected)


@torch.no_grad()
def test_frames_in_a_later_call_of_a_static_cache(model):
    """Frames that come later move the earlier ones inside the buffers."""
    first, later = Sample("tFttt", (1, 4, 6), seed=1), Sample("ttFFtt", (2, 4, 4), seed=2)
    caches = [model.static_cache(40, 700), None]
    logits = []
    for cache in caches:
        out = model(**first.inputs(), **({} if cache is None else {CACHE: cache}), use_cache=True)
        new = {name: getattr(later, name) for name in ("pixel_values", "grid_thw")}
        model(torch.tensor([[3]]), **{CACHE: out[CACHE]})
        model(later.ids[None], **new, **{CACHE: out[CACHE]})
        logits.append(model(torch.tensor([[5]]), **{CACHE: out[CACHE]}).logits)
    close(*logits)


@torch.no_grad()
def test_too_many_vision_tokens_for_a_static_cache(model):
    with pytest.raises(ValueError, match="has space for 20 vision tokens, and needs 29"):
        model(**assorted_samples()[3].inputs(), **{CACHE: model.static_cache(40, 20)})
    for numbers in ((0, 5), (5, True), (5, 2.0)):
        with pytest.raises(ValueError, match="expected a positive number of tokens"):
            model.static_cache(*numbers)


@pytest.mark.parametrize("static", [False, True])
def test_generate(model, static):
    """The compiled steps of `generate` give the same tokens."""
    samples = assorted_samples()
    for inputs in (samples[3].inputs(), batch(samples[:3], "left")):
        settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "num_beams": 1 if static else 2}
        tokens = []
        for compiles in (False, True):
            model.compile_decode(backend="eager", fullgraph=True, disable=not compiles)
            cache = {CACHE: model.static_cache(40, 200)} if static else {}
            tokens.append(model.generate(**inputs, **settings, **cache))
        assert torch.equal(*tokens)


def test_another_backend(model):
    """As the compilers of torch see the steps: with functions of tensors in place of writes, and symbolic shapes."""
    counter, samples = compiled(model, "aot_eager"), assorted_samples()
    check(model, counter, batch(samples[1:3], "left"), None, "batch")  # it traces the first graph twice
    check(model, counter, samples[2].inputs(), None, "static", static=(40, 100))
    check(model, counter, samples[3].inputs(), 0, "other prompt", static=(40, 100))


def test_settings(model):
    with pytest.raises(ValueError, match="`modes` is no setting of torch.compile"):
        model.compile_decode(modes="default")
    model.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(ValueError, match="spread over several devices"):
        model.compile_decode()


def test_transformers_compiles_nothing_by_itself(model):
    """A compilation of the whole forward would be repeated for every prompt."""
    from transformers.generation.configuration_utils import CompileConfig

    inputs = assorted_samples()[2].inputs()
    with pytest.raises(ValueError, match="`compile_config` is not supported"):
        model.generate(**inputs, max_new_tokens=2, compile_config=CompileConfig(), cache_implementation="static")


@torch.no_grad()
def test_the_vision_encoder(model):
    """Chunks of one size use one graph; those of all other numbers of frames one more."""
    counter, visual = CompileCounterWithBackend("eager"), model.model.visual
    encode = torch.compile(visual._encode, backend=counter, fullgraph=True)
    for frames, graphs in ((4, 1), (4, 1), (3, 2), (6, 2)):
        pixels, grid = media((frames, 4, 6), seed=counter.frame_count)
        close(encode(pixels, frame_groups(grid.tolist()), None, None, {}), visual(pixels, grid.tolist()))
        assert counter.frame_count == graphs
