"""torch's flash-attention for several lengths, which runs on GPUs only, in plain PyTorch."""

import pytest
import torch

from moss_vl import block_attention
from moss_vl.block_attention import Borders


class VarlenKernels:
    """The contract of flash-attention for several lengths. `calls` has the number of sequences of each forward."""

    def __init__(self):
        self.calls = []

    def forward(self, query, key, value, borders, scale):
        out, lse = torch.full_like(query, float("nan")), query.new_full(query.shape[1::-1], float("nan"))
        for rows, keys in self.sequences(query, key, borders):
            scores = torch.einsum("rkd,skd->krs", query[rows], key[keys]) * scale
            lse[:, rows] = scores.logsumexp(-1)
            out[rows] = torch.einsum("krs,skd->rkd", scores.softmax(-1), value[keys])
        self.calls.append(len(borders.of_rows) - 1)
        return out, lse

    def backward(self, grad, query, key, value, out, lse, borders, scale):
        grads = [torch.full_like(part, float("nan")) for part in (query, key, value)]
        for rows, keys in self.sequences(query, key, borders):
            scores = torch.einsum("rkd,skd->krs", query[rows], key[keys]) * scale
            weights = (scores - lse[:, rows, None]).exp()
            of_weights = torch.einsum("rkd,skd->krs", grad[rows], value[keys])
            of_scores = weights * (of_weights - (grad[rows] * out[rows]).sum(-1).T[..., None]) * scale
            grads[0][rows] = torch.einsum("krs,skd->rkd", of_scores, key[keys])
            grads[1][keys] = torch.einsum("krs,rkd->skd", of_scores, query[rows])
            grads[2][keys] = torch.einsum("krs,rkd->skd", weights, grad[rows])
        return tuple(grads)

    @staticmethod
    def sequences(query, key, borders: Borders):
        for ends, most, states in (
            (borders.of_rows, borders.most_rows, query),
            (borders.of_keys, borders.most_keys, key),
        ):
            assert ends.dtype == torch.int32 and ends[0] == 0 and ends[-1] == len(states)
            assert (ends.diff() >= 0).all() and ends.diff().max() == most
        pairs = [
            [slice(*pair) for pair in zip(ends, ends[1:], strict=False)]
            for ends in map(torch.Tensor.tolist, borders[:2])
        ]
        return zip(*pairs, strict=True)


@pytest.fixture
def varlen(monkeypatch):
    kernels = VarlenKernels()
    monkeypatch.setattr(block_attention, "varlen_can_run", lambda query: True)
    monkeypatch.setattr(block_attention, "varlen_forward", kernels.forward)
    monkeypatch.setattr(block_attention, "varlen_backward", kernels.backward)
    return kernels
