"""Assistants and prompt lookup: greedy output does not change."""

import copy

import pytest
import torch
from tiny import Sample, assorted_samples, make_model
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from moss_vl.modeling_moss_vl import CACHE


GENERATE = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": 199}


@pytest.fixture(scope="module")
def model():
    return make_model()


def make_assistant(model, name):
    """The model itself, one with other weights that mostly agrees, a smaller one, or one for text alone."""
    if name == "near":
        near, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in near.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
        return near
    if name == "small":
        return make_model(seed=3, text={"num_hidden_layers": 4, "cross_attention_layers": [1, 3]})
    if name == "text":
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=200, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
            )
        ).eval()
    return copy.deepcopy(model)


@pytest.mark.parametrize("name", ["itself", "near", "small", "text"])
def test_with_an_assistant(model, name):
    assistant = make_assistant(model, name)
    calls = []
    hook = assistant.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    for sample in assorted_samples():
        inputs = sample.inputs()
        assert torch.equal(
            model.generate(**inputs, assistant_model=assistant, **GENERATE), model.generate(**inputs, **GENERATE)
        )
    hook.remove()
    assert calls and not any("prompt_kwargs" in call for call in calls)


def test_an_assistant_that_agrees_is_accepted(model):
    """The assistant gets the media, so it proposes what the model would write, and the model runs few times."""
    inputs, calls, assistant = assorted_samples()[3].inputs(), [], copy.deepcopy(model)
    assistant.generation_config.assistant_confidence_threshold = 0.0
    hook = model.register_forward_pre_hook(lambda *args: calls.append(1))
    model.generate(**inputs, assistant_model=assistant, **GENERATE)
    hook.remove()
    assert len(calls) <= 4


@pytest.mark.parametrize("with_mask", [True, False])
def test_with_prompt_lookup(model, with_mask):
    for sample in assorted_samples():
        inputs = sample.inputs()
        if not with_mask:
            inputs["cross_attention_mask"] = None
        inputs["input_ids"] = inputs["input_ids"].clone()
        assert torch.equal(
            model.generate(**inputs, prompt_lookup_num_tokens=3, **GENERATE), model.generate(**inputs, **GENERATE)
        )


@pytest.mark.parametrize("extra", ["lookup", "assistant"])
def test_on_a_kept_cache(model, extra):
    first, second = Sample("tFtt", (1, 4, 4), seed=1), Sample("FtttFt", (1, 4, 4), (1, 4, 6), seed=2)
    pixels, grid = (
        torch.cat([getattr(sample, name) for sample in (first, second)]) for name in ("pixel_values", "grid_thw")
    )

    def turn(pixel_values, grid_thw, **kwargs):
        cache = DynamicCache()
        out = model.generate(**first.inputs(), **{CACHE: cache}, **GENERATE)
        ids = torch.cat([out, second.ids[None]], dim=1)
        return model.generate(
            ids, pixel_values=pixel_values, grid_thw=grid_thw, **{CACHE: cache}, **GENERATE, **kwargs
        ).tolist()

    expected = turn(second.pixel_values, second.grid_thw)
    if extra == "lookup":
        got = turn(second.pixel_values, second.grid_thw, prompt_lookup_num_tokens=3)
        assert [
            row[: len(expected[0])] for row in got
        ] == expected  # transformers 4 at times writes a token beyond the last
    else:
        assistant = make_assistant(model, "near")
        assert turn(pixels, grid, assistant_model=assistant) == expected
        with pytest.raises(ValueError, match="3 `image_pad` tokens, and 2 frames were given for the assistant"):
            turn(second.pixel_values, second.grid_thw, assistant_model=assistant)


def test_an_early_exit_is_refused(model):
    with pytest.raises(ValueError, match="`assistant_early_exit` is not supported"):
        model.generate(torch.tensor([[5, 6]]), assistant_early_exit=2, **GENERATE)
