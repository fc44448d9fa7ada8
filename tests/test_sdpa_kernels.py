"""Kernels of torch's sdpa that are called by name on a GPU, replaced by plain PyTorch that checks what they need."""

import pytest
import torch
from tiny import Sample, assorted_samples, batch, make_model

from moss_vl import attention


GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def plain(query, key, value, mask, scale):
    """query [B, H, T, d], key and value [B, K, S, d], mask bool or additive -> [B, H, T, d]"""
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ value


@pytest.fixture
def named(monkeypatch):
    """Replaces the kernels when called; returns the number of calls of each, with a mask of one row and of several."""
    calls = {"flash": 0, "one row": 0, "rows": 0}

    def flash(query, key, value, borders, other_borders, rows, length, dropout, causal, debug, *, scale):
        assert query.dtype == key.dtype == value.dtype and key.shape == value.shape
        assert (query.shape[1], key.shape[1]) == (rows, length) and (rows == length or not causal)
        assert query.shape[2] % key.shape[2] == 0 and all(part.stride(-1) == 1 for part in (query, key, value))
        assert borders is other_borders is None and not debug
        calls["flash"] += 1
        mask = torch.ones(rows, length, dtype=torch.bool).tril() if causal else None
        out = plain(*(part.transpose(1, 2) for part in (query, key, value)), mask, scale)
        return (out.transpose(1, 2).contiguous(),)

    def efficient(query, key, value, mask, needs_lse, dropout, causal, *, scale):
        assert query.dtype == key.dtype == value.dtype == mask.dtype and key.shape == value.shape
        assert query.shape[:2] == key.shape[:2] and not causal
        assert mask.shape == (*query.shape[:3], key.shape[2])
        assert mask.stride(-1) == 1 and all(
            stride % 16 == 0 or size == 1 for stride, size in zip(mask.stride()[:-1], mask.shape, strict=False)
        )
        assert needs_lse or not (torch.is_grad_enabled() and query.requires_grad)
        calls["one row" if mask.stride(2) == 0 else "rows"] += 1
        out = plain(query, key, value, mask, scale)
        return (out.transpose(1, 2).contiguous().transpose(1, 2),)

    def install():
        monkeypatch.setattr(attention, "takes_named_kernels", lambda query: True)
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
        monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", efficient)
        return calls

    return install


def results(model, samples, side):
    """Logits and gradients of real tokens."""
    inputs = batch(samples, side)
    model.zero_grad()
    logits = model(**inputs).logits[inputs["attention_mask"].bool()]
    logits.pow(2).mean().backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "samples", [assorted_samples(), [Sample("ttFFFttttt", (3, 4, 4), seed=3)]], ids=["five", "one"]
)
def test_prompts(named, samples, side):
    model = make_model(attn_implementation="sdpa").double()
    expected = results(model, samples, side)
    calls = named()
    found = results(model, samples, side)
    assert calls["flash"] and (calls["rows"] or len(samples) == 1)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_generate(named, options, rows):
    model = make_model(attn_implementation="sdpa")
    inputs = batch(assorted_samples()[-rows:], "left")
    expected = model.generate(**inputs, **GREEDY, **options)
    calls = named()
    assert torch.equal(model.generate(**inputs, **GREEDY, **options), expected)
    assert calls["flash"] and bool(calls["one row"]) == (rows > 1 or "cache_implementation" in options)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (2, 1, 3), (1, 6, 3), (2, 6, 1)])
@pytest.mark.parametrize("additive", [False, True])
def test_masks(named, shape, length, additive):
    """Masks that are shared by rows, samples or heads, of lengths that are no multiple of what the kernel reads."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 6, n, 8, generator=generator) for n in (3, length, length))
    mask = torch.rand(*shape, length, generator=generator) < 0.5
    mask[..., 0] = True
    expected = plain(query, key, value, mask, 0.3)
    if additive:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, float("-inf"))
    assert named() is not None
    torch.testing.assert_close(attention.efficient_kernel(query, key, value, mask, 0.0, 0.3), expected)


def test_a_cpu_keeps_the_choice_of_sdpa():
    assert not attention.takes_named_kernels(torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16))
