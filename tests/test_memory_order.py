"""Kernels of a GPU write the output of sdpa as [B, T, H, d] in memory, CPU kernels as [B, H, T, d]; both are right."""

import pytest
import torch
import torch.nn.functional as F
from tiny import Sample, assorted_samples, batch, make_model


GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def memory_order(monkeypatch):
    """Makes sdpa return tensors in the memory order of a GPU, and counts them."""
    calls, kernel = [], F.scaled_dot_product_attention

    def reordered(*args, **kwargs):
        calls.append(kernel(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2))
        return calls[-1]

    def install():
        monkeypatch.setattr(F, "scaled_dot_product_attention", reordered)
        return calls

    return install


def results(model, samples, side):
    """Logits of a prompt, tokens, and gradients."""
    inputs = batch(samples, side)
    model.zero_grad()
    logits = model(**inputs).logits
    logits.pow(2).mean().backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    tokens = model.generate(**batch(samples, "left"), **GREEDY)
    return logits.detach(), gradients, tokens


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "samples", [assorted_samples(), [Sample("ttFFFttttt", (3, 4, 4), seed=3)]], ids=["five", "one"]
)
def test_the_memory_order_of_sdpa_does_not_matter(memory_order, samples, side):
    model = make_model(attn_implementation="sdpa")
    expected = results(model, samples, side)
    calls = memory_order()
    found = results(model, samples, side)
    assert any(not out.is_contiguous() for out in calls)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str
)
def test_generate_in_the_memory_order_of_a_gpu(memory_order, options):
    model = make_model(attn_implementation="sdpa")
    inputs = batch(assorted_samples(), "left")
    expected = model.generate(**inputs, **GREEDY, **options)
    assert memory_order() == []
    assert torch.equal(model.generate(**inputs, **GREEDY, **options), expected)
