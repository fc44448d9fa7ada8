"""The kernels of the flash-attention package in plain PyTorch, called by the code of transformers, so that a CPU runs
what a GPU would. Only the kernels are replaced. Unpadding, sequence lengths, casts and causality are those of
transformers.
"""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
import transformers.modeling_flash_attention_utils as glue
from tiny import make_model
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moss_vl import attention


IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2")
NAMES = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "kernels-community/flash-attn2")
ATOL = 2e-5  # float32, two orders of summation; logits are of order 10


class FlashKernels:
    """
    Attributes:
        calls: a namespace (queries, keys, causal, dropout, lengths) per kernel call; lengths are None without
            `cu_seqlens`.
        requested: the names of the kernels that transformers requested.
        exact: float32 is accepted as well, so that results can be compared closely.
    """

    def __init__(self, exact: bool):
        self.calls, self.requested, self.exact = [], [], exact

    def flash_attn_func(
        self,
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        """q [B, T, H, d], k and v [B, S, K, d] -> [B, T, H, d]"""
        assert q.ndim == k.ndim == v.ndim == 4 and q.shape[0] == k.shape[0]
        self._check_and_log(q, k, v, causal, dropout_p, None)
        return torch.stack(
            [self._one(*parts, causal, softmax_scale, dropout_p) for parts in zip(q, k, v, strict=True)]
        )

    def flash_attn_varlen_func(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        """q [tokens, H, d], k and v [tokens, K, d] of all sequences one after the other -> [tokens, H, d]"""
        assert q.ndim == k.ndim == v.ndim == 3 and len(q) and len(k)
        for tokens, borders, longest in ((q, cu_seqlens_q, max_seqlen_q), (k, cu_seqlens_k, max_seqlen_k)):
            assert borders.dtype == torch.int32 and borders[0] == 0 and borders[-1] == len(tokens)
            assert (borders.diff() >= 0).all() and borders.diff().max() == int(longest)
        lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        self._check_and_log(q, k, v, causal, dropout_p, lengths)
        sequences = zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True)
        return torch.cat([self._one(*parts, causal, softmax_scale, dropout_p) for parts in sequences])

    def _check_and_log(self, q, k, v, causal, dropout, lengths):
        assert q.dtype == k.dtype == v.dtype, (
            f"query, key and value must have the same dtype: {q.dtype}, {k.dtype}, {v.dtype}"
        )
        assert self.exact or q.dtype in (torch.float16, torch.bfloat16), (
            f"FlashAttention only support fp16 and bf16 data type, not {q.dtype}"
        )
        assert all(x.stride(-1) == 1 for x in (q, k, v)) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
        assert k.shape == v.shape and q.shape[-2] % k.shape[-2] == 0
        self.calls.append(
            SimpleNamespace(queries=q.shape, keys=k.shape, causal=causal, dropout=dropout, lengths=lengths)
        )

    @staticmethod
    def _one(q, k, v, causal, scale, dropout):
        """One sequence: q [T, H, d], k and v [S, K, d]. If causal, the queries are the last T tokens. Zeros without
        keys."""
        if not len(k):
            return torch.zeros_like(q)
        k, v = (x.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("thd,shd->hts", q.float(), k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if causal:
            later = torch.arange(len(k)) > torch.arange(len(q))[:, None] + len(k) - len(q)
            scores = scores.masked_fill(later, float("-inf"))
        weights = torch.dropout(scores.softmax(-1).nan_to_num(0.0), dropout, train=True)
        return torch.einsum("hts,shd->thd", weights, v).to(q.dtype)

    def load(self, implementation, *args, **kwargs):
        """Replaces the import of a kernel package in transformers."""
        self.requested.append(implementation)
        with_cache = [None] if hasattr(glue, "_flash_with_kvcache_fn") else []
        return (self.flash_attn_func, self.flash_attn_varlen_func, *with_cache, glue._pad_input, glue._unpad_input)


def install(monkeypatch, exact=True) -> FlashKernels:
    """Makes transformers find these kernels, and the model accept them on this machine, until `monkeypatch` is
    undone."""
    kernels = FlashKernels(exact)
    monkeypatch.setattr(glue, "_lazy_imports", kernels.load)
    reset_glue(monkeypatch)
    for name in NAMES:
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, flash_attention_forward)
    monkeypatch.setattr(attention, "flash_can_run", lambda device, dtype: exact or dtype in attention.HALF)
    return kernels


def reset_glue(monkeypatch) -> None:
    """Makes transformers forget the kernels it loaded, until `monkeypatch` is undone."""
    for name in (
        "_loaded_implementation",
        "_flash_fn",
        "_flash_varlen_fn",
        "_flash_with_kvcache_fn",
        "_pad_fn",
        "_unpad_fn",
        "_process_flash_kwargs_fn",
    ):
        if hasattr(glue, name):
            monkeypatch.setattr(glue, name, None)


def use(model, name):
    """Sets the attention of the whole model without the check whether it is installed."""
    model.config._attn_implementation = name
    return model


@pytest.fixture
def kernels(monkeypatch):
    return install(monkeypatch)


@cache
def eager():
    """The reference that all implementations are compared with."""
    return make_model("eager")


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def close(got, expected, where=None, atol=ATOL):
    got, expected = (x if where is None else x[where] for x in (got, expected))
    return torch.allclose(got, expected, atol=atol)
