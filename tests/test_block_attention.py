"""Cross-attention in blocks: the plan, both kinds of kernels and their gradients against dense attention, and the
model against eager. The kernel for several lengths is the one of varlen_kernels.py.
"""

import random

import pytest
import torch
import torch.nn.functional as F
from tiny import Sample, assorted_samples, batch, make_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from varlen_kernels import varlen  # noqa: F401

from moss_vl import decoder, vision_plan
from moss_vl.block_attention import Blocks, attend_in_blocks, plan_blocks
from moss_vl.modeling_moss_vl import CACHE
from moss_vl.vision_sequence import Span


SCALE = 8**-0.5


@pytest.fixture(params=["cpu", "varlen"])
def kernels(request):
    return request.getfixturevalue("varlen") if request.param == "varlen" else None


# The plan


def frames(count, tokens=10, keys=197) -> list[Span]:
    return [Span(slice(i * tokens, (i + 1) * tokens), slice(0, (i + 1) * keys)) for i in range(count)]


def random_spans(seed: int) -> tuple[list[Span], int, int]:
    """Spans of one to three samples with gaps between them, some with a second row that sees the same; and the numbers
    of text tokens and vision tokens."""
    rng, spans, text, vision = random.Random(seed), [], 0, 0
    for _ in range(rng.randint(1, 3)):
        text, vision = text + rng.choice([0, 2]), vision + rng.choice([0, 3])
        start = vision
        for _ in range(rng.randint(1, 9)):
            count, vision = rng.randint(1, 4), vision + rng.randint(1, 6)
            spans.append(Span(slice(text, text + count), slice(start, vision)))
            text += count
        if rng.random() < 0.3:
            spans += [
                Span(slice(text, text + 1), slice(start, start + 1)),
                Span(slice(text + 1, text + 3), slice(start, vision)),
            ]
            text += 3
    return spans, text + rng.choice([0, 2]), vision + 1


def dense_mask(spans, text, vision) -> torch.Tensor:
    mask = torch.zeros(text, vision, dtype=torch.bool)
    for span in spans:
        mask[span.text, span.vision] = True
    return mask


@pytest.mark.parametrize("seed", range(30))
def test_blocks_cover_what_is_visible_once(seed):
    spans, text, vision = random_spans(seed)
    counts, calls = torch.zeros(text, vision, dtype=torch.int), plan_blocks(spans)
    for call in calls:
        assert all(
            one.text.stop <= other.text.start and one.vision.stop <= other.vision.start
            for one, other in zip(call, call[1:], strict=False)
        )
        for block in call:
            counts[block.text, block.vision] += 1
    assert torch.equal(counts, dense_mask(spans, text, vision).int())


@pytest.mark.parametrize("count, calls", [(2, 2), (16, 5), (255, 9), (256, 9), (1024, 11)])
def test_calls_grow_with_the_logarithm_of_the_frames(count, calls):
    planned = plan_blocks(frames(count))
    assert len(planned) == calls and sum(map(len, planned)) == 2 * count - 1
    rows_of_a_batch = [
        Span(slice(span.text.start + 10 * count, span.text.stop + 10 * count), slice(*shift))
        for span in frames(count)
        for shift in [(197 * count, span.vision.stop + 197 * count)]
    ]
    assert len(plan_blocks(frames(count) + rows_of_a_batch)) == calls


# Kernels against dense attention


@pytest.mark.parametrize("seed", range(20))
def test_output_and_gradients_are_those_of_dense_attention(kernels, seed):
    torch.manual_seed(seed)
    spans, text, vision = random_spans(seed)
    shapes = (text, 4, 8), (1, 2, vision, 8), (1, 2, vision, 8)
    query, key, value = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    got = attend_in_blocks(query, key, value, Blocks(plan_blocks(spans), 2), SCALE)
    mask = dense_mask(spans, text, vision)
    keys, values = (states.repeat_interleave(2, dim=1) for states in (key, value))
    dense = F.scaled_dot_product_attention(query.transpose(0, 1)[None], keys, values, mask, scale=SCALE)
    expected = torch.where(mask.any(1)[:, None, None], dense[0].transpose(0, 1), 0.0)
    assert torch.allclose(got, expected)
    grad = torch.randn_like(got)
    pairs = (torch.autograd.grad(out, (query, key, value), grad) for out in (got, expected))
    assert all(torch.allclose(one, other) for one, other in zip(*pairs, strict=True))


def test_gradients_by_differences():
    spans, text, vision = random_spans(3)
    shapes = (text, 4, 8), (1, 2, vision, 8), (1, 2, vision, 8)
    states = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    blocks = Blocks(plan_blocks(spans), 2)
    assert torch.autograd.gradcheck(lambda *states: attend_in_blocks(*states, blocks, SCALE), states, fast_mode=True)


# The model


@pytest.fixture
def used(monkeypatch):
    """No spans are joined, so that few frames make blocks. The list has an entry for each layer that used blocks."""
    calls = []
    monkeypatch.setattr(vision_plan, "JOINED_SIZE", 0)
    monkeypatch.setattr(vision_plan, "LEAST_STEPS", 2)
    of_layer = decoder.attend_in_blocks
    monkeypatch.setattr(decoder, "attend_in_blocks", lambda *args: calls.append(args[0]) or of_layer(*args))
    return calls


def samples() -> list[Sample]:
    return [*assorted_samples(), Sample("tF" * 11 + "ttt", (6, 4, 4), (1, 2, 8), (4, 4, 6), seed=6)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_and_gradients_are_those_of_eager(kernels, used, side):
    inputs = batch(samples(), side)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    models = [make_model(name).double() for name in ("sdpa", "eager")]
    inputs["pixel_values"] = inputs["pixel_values"].double()
    outs = [model(**inputs, labels=labels) for model in models]
    assert len(used) == 2
    real = inputs["attention_mask"].bool()
    assert torch.allclose(outs[0].logits[real], outs[1].logits[real], atol=1e-9)
    for out in outs:
        out.loss.backward()
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-6, atol=1e-12), name


def test_calls_of_kernels_in_a_model(varlen, used):
    count = 32
    sample = Sample("tF" * count + "t", (count, 4, 4))
    with torch.no_grad():
        make_model()(**sample.inputs())
    # Two layers; the largest block is alone in its call, which the kernel for one block computes.
    assert len(varlen.calls) == 2 * 5 and len(used) == 2


def test_chunks_and_dropped_frames(used):
    """A prompt in chunks on one cache, of which frames are dropped in between."""
    inputs = Sample("tF" * 12 + "ttt", (12, 4, 4), seed=7).inputs()
    del inputs["cross_attention_mask"], inputs["attention_mask"]
    ids, logits = inputs.pop("input_ids"), []
    for name in ("sdpa", "eager"):
        model, cache = make_model(name), DynamicCache()
        with torch.no_grad():
            out = [model(input_ids=ids[:, :10], **inputs, prompt_length=ids.shape[1], **{CACHE: cache}).logits]
            model.drop_frames(cache, 2)
            out.append(model(input_ids=ids[:, 10:], prompt_length=ids.shape[1], **{CACHE: cache}).logits)
        logits.append(torch.cat(out, dim=1))
    assert len(used) == 4 and torch.allclose(*logits, atol=2e-5)


def test_packed_texts_and_beams(used):
    one, other = Sample("tFtFtFt", (3, 4, 4), seed=8), Sample("FttFt", (1, 4, 6), (1, 4, 4), seed=9)
    length = len(one.ids) + len(other.ids)
    packed = {
        "input_ids": torch.cat([one.ids, other.ids])[None],
        "position_ids": torch.cat([torch.arange(len(one.ids)), torch.arange(len(other.ids))])[None],
        "pixel_values": torch.cat([one.pixel_values, other.pixel_values]),
        "grid_thw": torch.cat([one.grid_thw, other.grid_thw]),
    }
    beams = {**one.inputs(), "rows_per_sample": 2}
    for name in ("input_ids", "attention_mask", "cross_attention_mask"):
        beams[name] = beams[name].repeat_interleave(2, dim=0)
    for inputs in (packed, beams):
        with torch.no_grad():
            got, expected = (make_model(name)(**inputs).logits for name in ("sdpa", "eager"))
        assert got.shape[1] in (length, len(one.ids)) and torch.allclose(got, expected, atol=2e-5)
    assert len(used) == 4


def test_gradient_checkpointing(used):
    inputs, grads = batch(samples(), "right"), []
    for reentrant in (None, False, True):
        model = make_model().train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert len(used) == 2 + 4 + 4
    for others in grads[1:]:
        assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(grads[0], others, strict=True))


@pytest.mark.parametrize("way", ["dropout", "function", "weights", "mask", "math"])
def test_spans_are_computed_where_blocks_cannot_be(used, monkeypatch, way):
    """Dropout, functions of the caller, weights, frames that a mask hides, and flash-attention turned off."""
    inputs = samples()[-1].inputs()
    model = make_model(text={"attention_dropout": 0.5} if way == "dropout" else None)
    if way == "function":
        eager = ALL_ATTENTION_FUNCTIONS["sdpa"]
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "mine", lambda *args, **kw: eager(*args, **kw))
        model.config.text_config.cross_attention_implementation = "mine"
    if way == "mask":
        inputs["cross_attention_mask"][..., 6:, 1] = True
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH if way == "math" else list(SDPBackend.__members__.values())[1:]):
        out = model.train(way == "dropout")(**inputs, output_attentions=way == "weights")
        expected = make_model("eager")(**inputs)
    assert used == []
    if way == "dropout":
        assert not torch.allclose(out.logits, expected.logits, atol=1e-2)
    else:
        assert torch.allclose(out.logits, expected.logits, atol=2e-5)
