"""What tests of conversations share: a model, its float64 oracle, and the oracle's logits of several turns."""

import pytest
import torch
import transformers
from oracle import Oracle
from tiny import IMAGE_PAD, make_model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def oracle(model):
    return Oracle(model)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def frames_of(oracle, *samples):
    out = []
    for sample in samples:
        first = 0
        for t, h, w in sample.grids:
            for _ in range(t):
                out.append((oracle.encode(sample.pixel_values[first : first + h * w], h, w), h // 2, w // 2))
                first += h * w
    return out


def expected(oracle, *samples, more=(), **kwargs):
    """The oracle's logits of the samples, one after the other as one conversation, and of `more` tokens."""
    ids = [token for sample in samples for token in sample.ids.tolist()] + list(more)
    pads = [i for i, token in enumerate(ids[: len(ids) - len(more)]) if token == IMAGE_PAD]
    return oracle.logits(ids, frames_of(oracle, *samples), pads, **kwargs)


def close(got, want):
    error = (got.double() - want).abs().max() / want.abs().max()
    assert error < 2e-5, f"off by {error:.2g}"


def media_of(sample):
    return {
        name: value
        for name, value in sample.inputs().items()
        if name in ("pixel_values", "grid_thw", "media_nums_per_sample")
    }


def crop(cache, length):
    cache.crop(length - cache.get_seq_length() if transformers.__version__ >= "5" else length)
