"""Caches that are cropped, reordered, copied, offloaded or half-filled. Expected numbers are the oracle's."""

import copy
import io

import pytest
import torch
import transformers
from tiny import IMAGE_PAD, Sample, batch
from transformers import DynamicCache, StaticCache
from turns import _no_gradients, close, crop, expected, frames_of, media_of, model, oracle  # noqa: F401 - fixtures

from moss_vl.cache_layers import VisionCacheLayer
from moss_vl.modeling_moss_vl import CACHE
from moss_vl.vision_sequence import PAST_CALLS


V5 = transformers.__version__ >= "5"


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_crop_past_a_frame(model, oracle, length):
    """The rest of a prompt continues as if nothing had followed; new frames replace those taken back."""
    sample, more = Sample("tFtFt", (1, 4, 4), (1, 4, 6), seed=1), Sample("tFt", (1, 2, 6), seed=2)
    cache = model(**sample.inputs(), use_cache=True)[CACHE]
    model(torch.tensor([[5, 6]]), past_key_values=cache)
    crop(cache, length)
    kept = Sample("t", seed=0)
    kept.ids, kept.grids = sample.ids[:length], sample.grids[: int((sample.ids[:length] == IMAGE_PAD).sum())]
    kept.pixel_values = sample.pixel_values
    close(
        model(more.ids[None], past_key_values=cache, **media_of(more)).logits[0], expected(oracle, kept, more)[length:]
    )


def test_crop_into_padding(model, oracle):
    samples = [Sample("tFt", (1, 4, 4), seed=1), Sample("ttFtttt", (1, 4, 6), seed=2)]
    cache = model(**batch(samples, "right"), use_cache=True)[CACHE]
    cache.batch_select_indices(torch.tensor([0]))
    crop(cache, 3)
    close(model(torch.tensor([[7]]), past_key_values=cache).logits[0], expected(oracle, samples[0], more=[7])[-1:])


def test_a_crop_too_far_back_is_an_error(model):
    cache, mask = DynamicCache(), torch.ones(1, 0, dtype=torch.long)
    for step in range(PAST_CALLS + 3):  # each has padding, so the state records each
        mask = torch.cat([mask, torch.tensor([[0, 1]])], dim=1)
        model(torch.tensor([[0, 5]]), attention_mask=mask, past_key_values=cache)
    crop(cache, 5)
    with pytest.raises(
        ValueError, match=rf"cropped to 5 tokens; expected at least 6, as only the last {PAST_CALLS} calls"
    ):
        model(torch.tensor([[5]]), past_key_values=cache)


@pytest.mark.parametrize(
    "name, index, rows",
    [
        ("reorder_cache", [1, 0], [1, 0]),
        ("reorder_cache", [1, 1], [1, 1]),
        ("batch_select_indices", [True, True], [0, 1]),
        ("batch_select_indices", [False, True], [1]),
        ("batch_select_indices", [-1, 0, 0], [1, 0, 0]),
    ],
)
def test_reordered_rows_keep_their_frames(model, oracle, name, index, rows):
    samples = [Sample("ttFt", (1, 4, 4), seed=1), Sample("tFtt", (1, 4, 6), seed=2)]
    cache = model(**batch(samples, "left"), use_cache=True)[CACHE]
    getattr(cache, name)(torch.tensor(index))
    tokens = torch.arange(7, 7 + len(rows))
    logits = model(tokens[:, None], past_key_values=cache).logits
    for row, at in enumerate(rows):
        close(logits[row], expected(oracle, samples[at], more=[7 + row])[-1:])


def test_media_follow_the_order_of_the_rows(model, oracle):
    """After a reorder, and after a sample is dropped."""
    samples = [Sample("ttFt", (1, 4, 4), seed=1), Sample("tFtt", (1, 4, 6), seed=2), Sample("tttt", seed=3)]
    cache = model(**batch(samples, "left"), use_cache=True)[CACHE]
    cache.batch_select_indices(torch.tensor([2, 1]))
    more = [Sample("tF", (1, 2, 4), seed=4), Sample("Ft", (1, 4, 8), seed=5)]
    logits = model(**batch(more, "left") | {"attention_mask": None}, past_key_values=cache).logits
    for row, (at, new) in enumerate(zip((2, 1), more, strict=True)):
        close(logits[row], expected(oracle, samples[at], new)[4:])


def test_rows_of_one_sample_with_different_text_cannot_place_frames(model):
    sample = Sample("tFt", (1, 4, 4), seed=1)
    cache = model(**sample.inputs(), use_cache=True)[CACHE]
    cache.batch_repeat_interleave(2)
    visual = media_of(Sample("F", (1, 4, 6), seed=2))
    with pytest.raises(
        ValueError, match="Text rows 0 and 1 share the frames of sample 0, but have 1 and 0 `image_pad` tokens"
    ):
        model(torch.tensor([[IMAGE_PAD], [7]]), past_key_values=cache, **visual)
    with pytest.raises(
        ValueError, match="Text rows 0 and 1 share the frames of sample 0, but place them at different positions"
    ):
        model(torch.tensor([[IMAGE_PAD, 7], [7, IMAGE_PAD]]), past_key_values=cache, **visual)


@pytest.mark.parametrize("kind", ["deep", "layers", "saved"])
def test_deep_copies_of_a_cache_are_independent(model, oracle, kind):
    """Also if both write new tokens, and place a waiting frame, into the buffers that they shared."""
    sample, late = Sample("tFt", (1, 4, 4), seed=1), Sample("F", (1, 4, 6), seed=2)
    cache = model(**sample.inputs(), use_cache=True)[CACHE]
    model(torch.tensor([[5]]), past_key_values=cache, **media_of(late))
    if kind == "deep":
        other = copy.deepcopy(cache)
    elif kind == "saved":
        memory = io.BytesIO()
        torch.save(cache, memory)
        memory.seek(0)
        other = torch.load(memory, weights_only=False)
    else:
        other = DynamicCache()
        other.layers = [copy.copy(layer) for layer in cache.layers]
    for token in (8, 9):
        for one, tokens in ((cache, [7, IMAGE_PAD, token]), (other, [IMAGE_PAD, 6, token])):
            crop(one, 4)
            got = model(torch.tensor([tokens]), past_key_values=copy.deepcopy(one) if token == 8 else one).logits[0]
            ids = [*sample.ids.tolist(), 5, *tokens]
            want = oracle.logits(ids, frames_of(oracle, sample, late))
            close(got, want[4:])


def test_a_shallow_copy_of_a_cache_is_an_error(model):
    cache = model(**Sample("tFt", (1, 4, 4)).inputs(), use_cache=True)[CACHE]
    other = copy.copy(cache)
    with pytest.raises(ValueError, match="The cache is a shallow copy.*copy.deepcopy"):
        model(torch.tensor([[7]]), past_key_values=other)
    model(torch.tensor([[7]]), past_key_values=cache)
    del cache
    model(torch.tensor([[7]]), past_key_values=other)  # the other cache does not exist any more


@pytest.mark.parametrize("layer", [0, 3])
def test_a_cache_half_filled_by_a_failed_call(model, oracle, layer):
    sample = Sample("tFt", (1, 4, 4), seed=1)
    for cache in (DynamicCache(), model(**sample.inputs(), use_cache=True)[CACHE]):
        length = cache.get_seq_length()

        def fail(*args):
            raise RuntimeError("out of memory")

        hook = model.model.language_model.layers[layer].register_forward_hook(fail)
        with pytest.raises(RuntimeError):
            model(**(sample.inputs() if not length else {"input_ids": torch.tensor([[7, 8]])}), past_key_values=cache)
        hook.remove()
        with pytest.raises(ValueError, match="a call failed before its end|but not their vision sequence"):
            model(torch.tensor([[7]]), past_key_values=cache)
        if length:
            crop(cache, length)  # in transformers 5 this takes a token from the layers that lack it, too
            if V5:
                with pytest.raises(ValueError, match="a call failed before its end"):
                    model(torch.tensor([[7]]), past_key_values=cache)
            else:
                close(
                    model(torch.tensor([[7]]), past_key_values=cache).logits[0],
                    expected(oracle, sample, more=[7])[-1:],
                )


@pytest.mark.parametrize("layer", [0, 3])
def test_a_decode_step_that_fails_changes_nothing(model, oracle, layer):
    sample = Sample("tFt", (1, 4, 4), seed=1)
    cache = model(**sample.inputs(), use_cache=True)[CACHE]

    def fail(*args):
        raise RuntimeError("out of memory")

    hook = model.model.language_model.layers[layer].register_forward_hook(fail)
    with pytest.raises(RuntimeError):
        model(torch.tensor([[9]]), past_key_values=cache)
    hook.remove()
    got = model(torch.tensor([[7]]), past_key_values=cache).logits[0]
    close(got, expected(oracle, sample, more=[7])[-1:])


def test_an_offloading_cache_fetches_past_the_vision_layers():
    """`prefetch` of a vision layer fetches the next layer; after the last layer comes the first."""
    fetched, cache = [], DynamicCache()
    text = cache.layer_class_to_replicate
    cache.layers = [text(), VisionCacheLayer(1), VisionCacheLayer(2), text(), VisionCacheLayer(4)]
    for index in (0, 3):
        cache.layers[index].prefetch = lambda index=index: fetched.append(index)
    cache.layers[1].prefetch()
    assert not fetched  # of no cache yet
    assert all(cache.layers[index].claim(cache) for index in (1, 2, 4))
    for index in (1, 2, 4):
        cache.layers[index].prefetch()
    assert fetched == [3, 3, 0]


def test_a_cache_continues_outside_inference_mode_and_autocast(model, oracle):
    sample = Sample("tFt", (1, 4, 4), seed=1)
    want = expected(oracle, sample, more=[7])[-1:]
    for gradients in (False, True):
        with torch.inference_mode():
            cache = model(**sample.inputs(), use_cache=True)[CACHE]
        with torch.set_grad_enabled(gradients):
            close(model(torch.tensor([[7]]), past_key_values=cache).logits[0].detach(), want)
    with torch.autocast("cpu", torch.bfloat16):
        cache = model(**sample.inputs(), use_cache=True)[CACHE]
    got = model(torch.tensor([[7]]), past_key_values=cache).logits[0]
    assert (
        got.dtype == torch.float32 and (got - want).abs().max() < 0.03 * want.abs().max()
    )  # the prompt was read in bfloat16


def test_gradients_through_a_conversation(model):
    """Both frames come with the first call; the text places them one by one."""
    sample = Sample("tFtF", (1, 4, 4), (1, 4, 4), seed=3)
    with torch.enable_grad():
        weight = model.model.visual.blocks[0].mlp.linear_fc1.weight
        first = model(sample.ids[None, :2], **media_of(sample), use_cache=True)
        second = model(sample.ids[None, 2:], past_key_values=first[CACHE])
        gradient = torch.autograd.grad(first.logits.sum() + second.logits.sum(), weight)[0]
        whole = torch.autograd.grad(model(**sample.inputs()).logits.sum(), weight)[0]
    assert torch.allclose(gradient, whole, atol=1e-4 * whole.abs().max())


def test_a_static_cache_that_is_too_short(model):
    cache = StaticCache(config=model.config.text_config, max_cache_len=4)
    model(**Sample("tFt", (1, 4, 4)).inputs(), past_key_values=cache)
    with pytest.raises(
        ValueError, match="has 4 slots and holds 3 tokens, and the call has 2; expected a cache of at least 5 slots"
    ):
        model(torch.tensor([[7, 8]]), past_key_values=cache)


def test_other_objects_than_caches_are_refused(model):
    with pytest.raises(ValueError, match="The cache is a tuple; expected a transformers cache"):
        model(torch.tensor([[7]]), past_key_values=((torch.zeros(1), torch.zeros(1)),))
