"""Masks of self-attention: ready masks of four axes, and packed rows, with every kernel."""

import pytest
import torch
import torch.nn.functional as F
from flash_kernels import IMPLEMENTATIONS, close, eager, kernels, logits, use  # noqa: F401
from tiny import assorted_samples, batch, make_model
from transformers import DynamicCache, StaticCache

from moss_vl import attention
from moss_vl.modeling_moss_vl import CACHE


# Ready masks


def written_out(inputs):
    """The mask of two axes as bool [B, 1, T, T]."""
    real = inputs["attention_mask"].bool()
    rows = torch.arange(real.shape[1])
    return (rows <= rows[:, None]) & real[:, None, None, :] | (rows == rows[:, None])


def additive(mask, dtype, lowest):
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(
        ~mask, float("-inf") if lowest == "inf" else torch.finfo(lowest or dtype).min
    )


FORMS = {
    "bool": lambda mask: mask,
    "bool of heads": lambda mask: mask.expand(-1, 8, -1, -1).contiguous(),
    "-inf": lambda mask: additive(mask, torch.float32, "inf"),
    "lowest": lambda mask: additive(mask, torch.float32, None),
    "lowest float64": lambda mask: additive(mask, torch.float64, None),
    "lowest bfloat16": lambda mask: additive(mask, torch.bfloat16, None),
    "lowest float16 in float32": lambda mask: additive(mask, torch.float32, torch.float16),
    "float of heads": lambda mask: additive(mask.expand(-1, 8, -1, -1), torch.float16, None),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_ready_masks(kernels, form, implementation):
    model, inputs = use(make_model(), implementation), batch(assorted_samples(), "left")
    expected = logits(eager(), **inputs)
    mask = FORMS[form](written_out(inputs))
    assert close(logits(model, **{**inputs, "attention_mask": mask}), expected)
    half = logits(model.bfloat16(), **{**inputs, "attention_mask": mask})
    real = inputs["attention_mask"].bool()
    assert (half[real].float() - expected[real]).norm() < 0.05 * expected[real].norm()


@pytest.mark.parametrize("form", FORMS)
def test_a_row_without_visible_tokens_attends_to_its_own(kernels, form):
    """With every kernel, so that the results are equal and finite."""
    sample = assorted_samples()[3]
    inputs = sample.inputs()
    mask = written_out(inputs)
    mask[:, :, [0, 5]] = False
    alone = mask.clone()
    alone[:, :, 0, 0] = alone[:, :, 5, 5] = True
    expected = logits(eager(), **{**inputs, "attention_mask": alone})
    assert expected.isfinite().all()
    for implementation in IMPLEMENTATIONS:
        got = logits(use(make_model(), implementation), **{**inputs, "attention_mask": FORMS[form](mask)})
        assert close(got, expected), implementation


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_bias_stays_a_bias(kernels, implementation):
    """An additive mask may also change the weights of visible tokens."""
    inputs = assorted_samples()[3].inputs()
    length = inputs["input_ids"].shape[1]
    bias = torch.randn(1, 8, length, length, generator=torch.Generator().manual_seed(0)).masked_fill(
        ~written_out(inputs), float("-inf")
    )
    model = use(make_model(), implementation)
    got = logits(model, **{**inputs, "attention_mask": bias})
    assert close(got, logits(eager(), **{**inputs, "attention_mask": bias}))
    assert not close(got, logits(model, **inputs), atol=1e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("form", ["bool", "lowest", "float of heads"])
def test_ready_masks_with_a_cache(kernels, form, static, implementation):
    """Chunks and a step, with masks as wide as the tokens so far, or as the slots of a static cache."""
    model, inputs = use(make_model(), implementation), batch(assorted_samples(), "left")
    expected, mask, length = logits(eager(), **inputs), FORMS[form](written_out(inputs)), inputs["input_ids"].shape[1]
    for slots in (False, True) if static else (False,):
        cache = StaticCache(config=model.config.text_config, max_cache_len=length + 4) if static else DynamicCache()
        media = {k: inputs[k] for k in ("pixel_values", "grid_thw", "media_nums_per_sample")}
        padded = inputs["attention_mask"]
        for first, last in ((0, 6), (6, length - 1), (length - 1, length)):
            part = mask[:, :, first:last, :last]
            if slots:
                part = F.pad(part, (0, length + 4 - last), value=False if part.dtype == torch.bool else float("-inf"))
            ids = inputs["input_ids"][:, first:last]
            got = logits(
                model,
                input_ids=ids,
                attention_mask=part,
                prompt_length=length,
                **{CACHE: cache},
                **(media if first == 0 else {}),
            )
            assert close(got, expected[:, first:last], padded[:, first:last].bool()), (first, slots)


@pytest.mark.parametrize("shape", [(5, 8, 2, 7), (1, 8, 2, 7), (1, 1, 2, 7), (1, 1, 1, 7), (5, 1, 2, 7), (1, 8, 1, 7)])
def test_each_head_of_a_group_has_its_mask(shape):
    """The heads of a group are folded into rows of one head if the mask permits."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(5, heads, rows, 16, generator=generator) for heads, rows in ((8, 2), (2, 7), (2, 7))
    )
    mask = torch.rand(shape, generator=generator) < 0.5
    mask[..., 0] = True
    module = make_model().model.language_model.layers[0].self_attn
    for rows in (1, 2):
        parts = query[:, :, :rows], key, value, mask[:, :, :rows]
        got, expected = (attention.attend(module, *parts, implementation)[0] for implementation in ("sdpa", "eager"))
        assert close(got, expected, atol=1e-6)


@pytest.mark.parametrize(
    "shape, dtype, message",
    [
        ((1, 1, 7, 8), torch.bool, r"shape \[1, 1, 7, 8\]; expected \[1 or 1, 8 or 1, 7 or 1, 7\]"),
        ((1, 1, 6, 7), torch.bool, r"shape \[1, 1, 6, 7\]"),
        ((2, 1, 7, 7), torch.bool, r"shape \[2, 1, 7, 7\]"),
        ((1, 2, 7, 7), torch.float32, r"shape \[1, 2, 7, 7\]"),
        ((1, 1, 7, 7), torch.long, r"dtype torch.int64; expected torch.bool"),
    ],
)
def test_masks_that_do_not_fit_are_refused_before_encoding(shape, dtype, message):
    model, inputs = make_model(), assorted_samples()[1].inputs()
    model.model.visual.forward = lambda *args, **kwargs: pytest.fail("the refusal came after the vision encoder")
    with pytest.raises(ValueError, match=message):
        model(**{**inputs, "attention_mask": torch.ones(shape, dtype=dtype)})


# Packed rows


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("static", [False, True])
def test_texts_of_packed_rows_are_invisible_to_each_other(kernels, implementation, static):
    model = use(make_model(), implementation).model.language_model
    generator = torch.Generator().manual_seed(0)
    texts = [[torch.randint(1, 180, (n,), generator=generator) for n in lengths] for lengths in ((5, 1, 3), (2, 7))]
    ids = torch.stack([torch.cat(row) for row in texts])
    index = torch.tensor([[0] * 5 + [1] + [2] * 3, [4] * 2 + [9] * 7])
    positions = torch.tensor([[*range(5), 0, *range(3)], [0, 1, *range(7)]])
    for rows in (slice(0, 1), slice(0, 2)):
        cache = StaticCache(config=model.config, max_cache_len=16) if static else None
        kernels.calls.clear()
        with torch.no_grad():
            got = model(
                input_ids=ids[rows], position_ids=positions[rows], text_index=index[rows], cache=cache
            ).last_hidden_state
            alone = [[model(input_ids=text[None]).last_hidden_state[0] for text in row] for row in texts[rows]]
        assert close(got, torch.stack([torch.cat(row) for row in alone]))
        packed = [call for call in kernels.calls if call.lengths]
        assert bool(packed) == (implementation == "flash_attention_2" and not static)
        assert all(
            call.causal
            and call.lengths[0] == call.lengths[1] == [5, 1, 3, 2, 7][: 3 * rows.stop - 1 + (rows.stop == 1)]
            for call in packed
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_rows_with_padding(kernels, implementation):
    model = use(make_model(), implementation).model.language_model
    ids = torch.tensor([[0, 0, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 0, 0]])
    mask = (ids > 0).long()
    index = torch.tensor([[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 0, 0, 1, 2, 0, 1], [0, 1, 2, 0, 1, 0, 0]])
    with torch.no_grad():
        got = model(input_ids=ids, attention_mask=mask, position_ids=positions, text_index=index).last_hidden_state
        for row, part in ((0, slice(2, 5)), (0, slice(5, 7)), (1, slice(0, 3)), (1, slice(3, 5))):
            assert close(got[row, part], model(input_ids=ids[row, part][None]).last_hidden_state[0])
