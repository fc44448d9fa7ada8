"""Caches of the model, what a call allocates, copies and returns, and that it leaves no state."""

import copy
import threading

import pytest
import torch
import transformers
from tiny import Sample, assorted_samples, batch, make_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from moss_vl import attention, cache_layers
from moss_vl.cache_layers import VisionCacheLayer
from moss_vl.modeling_moss_vl import CACHE


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request):
    return make_model(request.param)


def close(got, expected, tolerance=1e-5, what=""):
    """Largest difference, relative to the largest value if that is above 1: float32 has 7 digits."""
    difference = (got - expected).abs() / expected.abs().max().clamp(min=1)
    assert got.shape == expected.shape, f"{what}: shape {list(got.shape)}, expected {list(expected.shape)}"
    worst = difference.max().item() if difference.numel() else 0.0
    assert worst <= tolerance, (
        f"{what}: off by {worst:.2e} at {torch.unravel_index(difference.argmax(), difference.shape)}"
    )


@torch.no_grad()
def test_the_cache_has_an_old_and_a_new_name(model):
    out = model(**assorted_samples()[2].inputs(), use_cache=True)
    assert out.past_key_values is getattr(out, CACHE) is out[CACHE]
    step = torch.tensor([[5]])
    for part, result in (
        (model, "logits"),
        (model.model, "last_hidden_state"),
        (model.model.language_model, "last_hidden_state"),
    ):
        caches = {name: copy.deepcopy(out.past_key_values) for name in ("cache", "past_key_values")}
        newer, older = (part(step, **{name: cache}) for name, cache in caches.items())
        assert torch.equal(newer[result], older[result])
        assert newer.past_key_values is caches["cache"] and older.past_key_values is caches["past_key_values"]
        assert all(cache.get_seq_length() == out.past_key_values.get_seq_length() + 1 for cache in caches.values())
        with pytest.raises(ValueError, match="given twice, as `cache` and as `past_key_values`"):
            part(step, **caches)


@torch.no_grad()
def test_decoding_does_not_copy_vision_keys_and_values(model):
    cache = model(**assorted_samples()[3].inputs(), use_cache=True).past_key_values
    layers = [cache.layers[index] for index in (1, 4)]
    where = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in layers]
    shapes = [layer.keys.shape for layer in layers]
    for _ in range(3):
        model(torch.tensor([[5]]), past_key_values=cache)
    assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in layers] == where
    assert shapes == [layer.keys.shape for layer in layers] == [torch.Size([1, 2, 5 + 5 + 5 + 9 + 5, 16])] * 2


class Waits(TorchDispatchMode):
    """Counts the values that Python reads from tensors: on a GPU the host waits for all earlier kernels at each."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        self.count += function in (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("padded", [False, True, "in generate"])
@torch.no_grad()
def test_a_decode_step_waits_for_no_layer(padded):
    """Only a mask of the caller is compared with the padding that the cache knows; `generate` passes none."""
    for depth in (4, 12):
        model = make_model(text={"num_hidden_layers": depth, "cross_attention_layers": list(range(1, depth, 4))})
        inputs = batch(assorted_samples()[1:4], "left")
        cache = model(**inputs, use_cache=True).past_key_values
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1) if padded else None
        step = {"input_ids": torch.tensor([[5], [6], [7]]), "past_key_values": cache, "attention_mask": mask}
        with Waits() as waits:
            if padded == "in generate":
                ids = torch.cat([inputs["input_ids"], step["input_ids"]], dim=1)
                new = {"cache_position": torch.tensor([mask.shape[1] - 1]), "next_sequence_length": 1}
                step = model.prepare_inputs_for_generation(prompt_kwargs={}, **(step | new | {"input_ids": ids}))
            model(**step)
        assert waits.count == (padded is True)


def largest_allocation(call) -> int:
    """Bytes of the largest tensor allocated during `call`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    return max(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_no_tensor_of_text_by_vision_is_made(implementation, with_mask):
    """1,000 text tokens, 100 frames of 37 tokens: not even one bit-sized mask of 1,000 x 3,700 is allocated, nor in a
    decode step a copy of the keys."""
    model = make_model(implementation, text={"num_attention_heads": 2, "num_key_value_heads": 1})
    sample = Sample("tttttttttF" * 100, (100, 12, 12))
    inputs = sample.inputs()
    if not with_mask:
        inputs["cross_attention_mask"] = None
    caches = []
    prefill = largest_allocation(
        lambda: caches.append(model(**inputs, use_cache=True, vision_chunked_length=8).past_key_values)
    )
    keys = caches[0].layers[1].keys
    assert keys.shape == (1, 1, 3700, 16)
    text_scores = 4 * 2 * 1000 * 1000 if implementation == "eager" else 0  # eager self-attention writes out T x T
    assert prefill <= max(text_scores, 1000 * 3700 / 2), prefill
    step = largest_allocation(lambda: model(torch.tensor([[5]]), past_key_values=caches[0]))
    text_keys = caches[0].layers[0].keys  # one token longer, so they are copied
    assert step <= text_keys.numel() * text_keys.element_size() < keys.numel() * keys.element_size()


@torch.no_grad()
def test_attention_weights_and_hidden_states(model):
    samples = [assorted_samples()[i] for i in (3, 0, 2)]
    inputs = batch(samples, "left")
    out = model(**inputs, output_attentions=True, output_hidden_states=True)
    length, widest = inputs["input_ids"].shape[1], 5 + 5 + 5 + 9 + 5
    assert [tuple(w.shape) for w in out.attentions] == [(3, 8, length, length)] * 4
    assert [tuple(w.shape) for w in out.cross_attentions] == [(3, 8, length, widest)] * 2
    real = inputs["attention_mask"].bool()
    for weights in out.attentions:
        close(weights.sum(-1).transpose(1, 2)[real], torch.ones(int(real.sum()), 8))
        assert torch.equal(weights, weights.tril())
    has_visible = (~inputs["cross_attention_mask"][:, 0]).any(-1)  # [B, T]
    for weights in out.cross_attentions:
        close(weights.sum(-1).transpose(1, 2), has_visible[..., None].expand(-1, -1, 8).float())
    row, frames = 4 + length - len(samples[0].ids) - 0, 3  # the fifth token has_visible three frames
    assert out.cross_attentions[0][0, :, row, : 5 * frames].min() > 0
    assert out.cross_attentions[0][0, :, row, 5 * frames :].max() == 0
    assert len(out.hidden_states) == 7 and all(state.shape == (3, length, 64) for state in out.hidden_states)
    close(model.lm_head(out.hidden_states[-1])[real], out.logits[real])
    close(out.logits[real], model(**inputs).logits[real])


@torch.no_grad()
def test_tuple_output(model):
    out = model(**assorted_samples()[1].inputs(), return_dict=False, use_cache=False)
    assert isinstance(out, tuple) and out[0].shape == (1, 7, 200)


@torch.no_grad()
def test_a_call_leaves_no_state_on_the_model(model):
    inputs = batch(assorted_samples(), "right")
    copies = {
        name: value.clone() if isinstance(value, torch.Tensor) else list(value) for name, value in inputs.items()
    }
    state = {name: set(vars(module)) for name, module in model.named_modules()}
    model(**inputs, use_cache=True)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == state
    for name, value in copies.items():
        assert torch.equal(inputs[name], value) if isinstance(value, torch.Tensor) else inputs[name] == value


def test_two_threads_share_a_model(model):
    samples = [assorted_samples()[3], assorted_samples()[2]]
    expected = [model.generate(**s.inputs(), max_new_tokens=12, do_sample=False, pad_token_id=0) for s in samples]
    got = [[], []]

    def work(index):
        for _ in range(5):
            got[index].append(
                model.generate(**samples[index].inputs(), max_new_tokens=12, do_sample=False, pad_token_id=0)
            )

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert len(got[index]) == 5 and all(torch.equal(ids, expected[index]) for ids in got[index])


@pytest.mark.parametrize("products", [False, True])
@torch.no_grad()
def test_bfloat16_follows_float32(monkeypatch, products):
    """On CPUs with bfloat16 matrix products, and without."""
    monkeypatch.setattr(attention, "CPU_BFLOAT16", products)
    inputs = batch(assorted_samples(), "left")
    real = inputs["attention_mask"].bool()
    full = make_model("sdpa")(**inputs).logits[real]
    half = make_model("sdpa").bfloat16()(**inputs).logits[real]
    assert half.dtype == torch.bfloat16
    relative = (half.float() - full).norm() / full.norm()
    assert relative < 0.05, relative  # 8 bits of mantissa through 9 layers


def random_states(length, seed, rows=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, length, 4, generator=generator), torch.randn(rows, 2, length, 4, generator=generator)


CACHE_WORK = {
    "nothing": lambda layer: None,
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([-1])),
    "crop": lambda layer: layer.crop(-3 if transformers.__version__ >= "5" else layer.get_seq_length() - 3),
}


@pytest.mark.parametrize("work", CACHE_WORK)
def test_a_text_cache_equals_a_dynamic_one(work, monkeypatch):
    monkeypatch.setattr(cache_layers, "TEXT_BUFFER", 4)
    ours, plain = cache_layers.TextCacheLayer(), DynamicLayer()
    assert ours.get_seq_length() == 0
    for step, length in enumerate([5, 1, 1, 3, 1, 40, 1, 1]):
        if step in (3, 6):
            CACHE_WORK[work](ours), CACHE_WORK[work](plain)
        states = random_states(length, step, rows=2 if step < 3 else plain.keys.shape[0])
        got, expected = ours.update(*states), plain.update(*states)
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True)), step
        assert ours.get_seq_length() == plain.get_seq_length()


def test_a_text_cache_copies_nothing_while_its_buffer_has_space(monkeypatch):
    layer = cache_layers.TextCacheLayer()
    layer.update(*random_states(10, 0))
    before, addresses = layer.keys, set()
    for step in range(cache_layers.TEXT_BUFFER):
        layer.update(*random_states(1, step))
        addresses.add((layer.keys.data_ptr(), layer.values.data_ptr()))
    assert len(addresses) == 1 and addresses.pop()[0] == before.data_ptr()
    layer.update(*random_states(1, 0))
    assert layer.keys.data_ptr() != before.data_ptr(), "the buffer is full"
    other = copy.deepcopy(layer)
    other.update(*random_states(1, 1))
    kept = layer.update(*random_states(1, 2))
    assert torch.equal(kept[0][..., -1:, :], random_states(1, 2)[0]) and torch.equal(
        other.keys[..., -1:, :], random_states(1, 1)[0]
    )


def test_a_text_cache_keeps_gradients():
    layer, states = cache_layers.TextCacheLayer(), [part.requires_grad_() for part in random_states(3, 0)]
    layer.update(*states)
    keys, values = layer.update(*random_states(1, 1))
    (keys.sum() + values.sum()).backward()
    assert all(torch.equal(part.grad, torch.ones_like(part)) for part in states)


@torch.no_grad()
def test_a_cache_is_filled_by_layers_that_grow_in_place(model):
    sample = assorted_samples()[3].inputs()
    cache = model(**sample, use_cache=True)[CACHE]
    kinds = [type(layer) for layer in cache.layers]
    crossing = model.config.text_config.cross_attention_layers
    assert all((kind is VisionCacheLayer) == (index in crossing) for index, kind in enumerate(kinds))
    assert kinds.count(cache_layers.TextCacheLayer) == len(kinds) - len(crossing)
    offloading = DynamicCache()
    offloading.offloading = True
    assert cache_layers.install_layers(offloading, model.config.text_config) is offloading.layers[crossing[0]]
    assert not any(type(layer) is cache_layers.TextCacheLayer for layer in offloading.layers)
