"""Rows that hold several texts: `position_ids` that start again separate them, with media too."""

import pytest
import torch
from oracle import Oracle
from tiny import Sample, make_model
from transformers import DataCollatorWithFlattening

from moss_vl.xrope import find_text_starts


SAMPLES = [
    Sample("tFtt", (1, 4, 4), seed=1),
    Sample("ttt", seed=2),
    Sample("FtFt", (1, 4, 6), (1, 2, 2), seed=3),  # XRoPE begins at 3, where the text before has ended
    Sample("t", seed=4),
    Sample("FF", (2, 4, 4), seed=5),
]


@pytest.fixture(scope="module")
def expected():
    """Logits of each sample alone, one after the other."""
    oracle, rows = Oracle(make_model()), []
    for sample in SAMPLES:
        frames, first = [], 0
        for t, h, w in sample.grids:
            for _ in range(t):
                frames.append((oracle.encode(sample.pixel_values[first : first + h * w], h, w), h // 2, w // 2))
                first += h * w
        rows.append(oracle.logits(sample.ids.tolist(), frames))
    return torch.cat(rows)


def packed(samples=SAMPLES) -> dict:
    """The samples in one row, with the media of those that have any, and positions that count the tokens of each."""
    real = [sample for sample in samples if sample.grids]
    return {
        "input_ids": torch.cat([sample.ids for sample in samples])[None],
        "position_ids": torch.cat([torch.arange(len(sample.ids)) for sample in samples])[None],
        "pixel_values": torch.cat([sample.pixel_values for sample in real]),
        "grid_thw": torch.cat([sample.grid_thw for sample in real]),
    }


def close(got, want):
    error = (got.double() - want).abs().max() / want.abs().max()
    assert error < 2e-5, f"off by {error:.2g}"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("positions", ["counts", "xrope", "xrope, one axis"])
def test_packed_texts_equal_each_alone(expected, implementation, positions):
    model, inputs = make_model(implementation), packed()
    if positions != "counts":
        walked = [
            model.get_rope_index(sample.ids[None], sample.grid_thw if sample.grids else None)[0] for sample in SAMPLES
        ]
        inputs["position_ids"] = torch.cat(walked, dim=-1)[0 if "one" in positions else slice(None)]
    with torch.no_grad():
        close(model(**inputs).logits[0], expected)


def test_packed_texts_beside_a_ready_mask(expected):
    """A block-diagonal mask hides the same tokens."""
    model, inputs = make_model(), packed()
    lengths = torch.tensor([len(sample.ids) for sample in SAMPLES])
    text = torch.arange(len(SAMPLES)).repeat_interleave(lengths)
    inputs["attention_mask"] = ((text[:, None] == text) & torch.ones(len(text), len(text), dtype=torch.bool).tril())[
        None, None
    ]
    with torch.no_grad():
        close(model(**inputs).logits[0], expected)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_rows_packed_by_counts_and_by_xrope(expected, order):
    """Every row is read separately."""
    model, halves = make_model(), [packed(SAMPLES[:3]), packed(SAMPLES[2:])]
    walked = [
        model.get_rope_index(sample.ids[None], sample.grid_thw if sample.grids else None)[0][0]
        for sample in SAMPLES[:3]
    ]
    halves[0]["position_ids"] = torch.cat(walked, dim=-1)
    halves = [halves[i] for i in order]
    length = max(half["input_ids"].shape[1] for half in halves)
    inputs = {
        name: torch.cat([torch.nn.functional.pad(half[name], (0, length - half[name].shape[1])) for half in halves])
        for name in ("input_ids", "position_ids")
    }
    inputs["attention_mask"] = torch.cat(
        [(torch.arange(length) < half["input_ids"].shape[1])[None].long() for half in halves]
    )
    inputs |= {name: torch.cat([half[name] for half in halves]) for name in ("pixel_values", "grid_thw")}
    numbers = [len(half["grid_thw"]) for half in halves]
    with torch.no_grad():
        logits = model(**inputs, media_nums_per_sample=numbers).logits
    for row, half in enumerate(order):
        want = expected[:11] if half == 0 else expected[7:]
        close(logits[row, inputs["attention_mask"][row].bool()], want)


def test_packed_rows_beside_padding(expected):
    """Two rows with padding on different sides, and in the middle of a text."""
    model, halves = make_model(), [packed(SAMPLES[:2]), packed(SAMPLES[2:])]
    real = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1]])
    inputs = {
        "attention_mask": real,
        "input_ids": torch.zeros(2, 9, dtype=torch.long),
        "position_ids": torch.zeros(2, 9, dtype=torch.long),
    }
    for row, half in enumerate(halves):
        for name in ("input_ids", "position_ids"):
            inputs[name][row, real[row].bool()] = half[name][0]
    inputs |= {name: torch.cat([half[name] for half in halves]) for name in ("pixel_values", "grid_thw")}
    with torch.no_grad():
        close(model(**inputs, media_nums_per_sample=[1, 3]).logits[real.bool()], expected)


def test_loss_and_gradients_of_packed_rows():
    """What `DataCollatorWithFlattening` makes of a batch gives the mean loss of its samples."""
    model = make_model().train()
    texts = [Sample("ttttt", seed=7), Sample("ttt", seed=8)]
    features = [{"input_ids": sample.ids.tolist(), "labels": sample.ids.tolist()} for sample in texts]
    batch = DataCollatorWithFlattening(return_position_ids=True)(features)
    loss = model(**{name: batch[name] for name in ("input_ids", "labels", "position_ids")}).loss
    losses = [model(sample.ids[None], labels=sample.ids[None]).loss * (len(sample.ids) - 1) for sample in texts]
    assert torch.allclose(loss, sum(losses) / 6, atol=1e-5)
    loss.backward()
    assert model.model.language_model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_packed_rows_refuse_a_cache_and_partial_masks():
    model, inputs = make_model(), packed()
    with pytest.raises(ValueError, match="the row holds several texts, and a cache is used"):
        model(**inputs, use_cache=True)
    with pytest.raises(ValueError, match="neither token counts .* nor XRoPE's positions"):
        model(**inputs | {"position_ids": inputs["position_ids"] * 2 + 1})
    length, frames = inputs["input_ids"].shape[1], 5
    mask = torch.ones(1, 1, length, frames, dtype=torch.bool)
    mask[0, 0, -1, 0] = False  # a frame of the first text
    with pytest.raises(ValueError, match="or in another packed text"):
        model(**inputs, cross_attention_mask=mask)
    with pytest.raises(ValueError, match="tokens of packed texts; expected a row per token, or no mask"):
        model(**inputs, cross_attention_mask=mask[:, :, :3])


def test_positions_that_do_not_start_again_pack_nothing():
    """A row of rising positions is one text, whatever the positions of its padding."""
    positions, real = torch.tensor([[1, 1, 0, 1, 5, 6]]), torch.tensor([[0, 0, 1, 1, 1, 1]]).bool()
    assert find_text_starts(positions, positions, real).tolist() == [[False, False, True, False, False, False]]
    assert find_text_starts(positions, positions, ~real).tolist() == [[True, True, False, False, False, False]]
    model, sample = make_model(), Sample("tttt", seed=3)
    with torch.no_grad():
        moved = model(sample.ids[None], position_ids=torch.tensor([[3, 7, 8, 20]]), use_cache=True).logits
        assert not torch.allclose(moved, model(sample.ids[None]).logits, atol=1e-3)
