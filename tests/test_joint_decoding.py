"""One call for a token in each of several conversations: the same as a call for each of them alone."""

import copy

import pytest
import torch
from flash_kernels import kernels, use  # noqa: F401 - a fixture
from tiny import IMAGE_PAD, Sample, assorted_samples, batch, frame_mask, make_model
from transformers import DynamicCache, StaticCache
from turns import _no_gradients, crop, expected, media_of, model, oracle  # noqa: F401 - fixtures

from moss_vl.cache_layers import JointCache
from moss_vl.modeling_moss_vl import CACHE


def close(got, want, atol=1e-5):
    """Fails unless tensors are equal up to rounding in another order of summation."""
    off = (got - want).abs().max() / want.abs().max().clamp(min=1)
    assert got.shape == want.shape and off < atol, f"off by {off:.2e}"


def filled(model, sample, **kwargs):
    return model(**sample.inputs(), use_cache=True, **kwargs)[CACHE]


def hidden_frame(model):
    """A cache whose last token sees the first and the last of three frames: its span has a mask."""
    sample = Sample("tFFFtt", (3, 4, 4), seed=9)
    mask = frame_mask(sample.ids[None], torch.ones_like(sample.ids[None]), [3])
    mask[:, :, -1, 1] = True
    return model(**sample.inputs() | {"cross_attention_mask": mask}, use_cache=True)[CACHE]


def assorted_caches(model):
    """Caches of text alone, of one and of many frames, with a hidden frame, a frame that waits, a crop, one in static
    slots, and forks of a conversation."""
    caches = [filled(model, sample) for sample in assorted_samples()]
    waits = filled(model, Sample("tFt", (1, 4, 4), seed=6))
    model(torch.tensor([[5]]), past_key_values=waits, **media_of(Sample("F", (1, 4, 6), seed=7)))
    cropped = filled(model, Sample("ttFFtttt", (2, 4, 4), seed=8))
    crop(cropped, 3)  # before the second frame
    static = StaticCache(config=model.config.text_config, max_cache_len=40)
    model(**assorted_samples()[2].inputs(), past_key_values=static)
    forks = [fork(caches[2]) for _ in range(2)]
    return [*caches, hidden_frame(model), waits, cropped, static, *forks]


def fork(cache):
    """A copy that shares keys and values with the original until one of them writes."""
    other = DynamicCache()
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def contents(cache, length=None):
    """All tensors of a cache, and the fields of its state that later calls read."""
    tensors, state = [], None
    for layer in cache.layers:
        if layer.keys is not None:
            tensors += [part[..., :length, :] if part.shape[0] == 1 else part for part in (layer.keys, layer.values)]
        state = getattr(layer, "state", None) or state
    fields = (
        state.length,
        state.placed,
        state.grids,
        state.last_visible,
        state.starts,
        state.stored,
        state.remembered,
    )
    counters = state.counters().tolist(), None if state.last_ids is None else state.last_ids.tolist()
    return tensors, (*fields, *counters)


def check_equal_caches(caches, alone):
    for one, other in zip(caches, alone, strict=True):
        (tensors, fields), (wanted, wanted_fields) = contents(one), contents(other)
        assert fields == wanted_fields
        for tensor, want in zip(tensors, wanted, strict=True):
            close(tensor, want)


@pytest.mark.parametrize("name", ["eager", "sdpa", "flash_attention_2"])
def test_each_row_gets_what_it_gets_alone(model, kernels, name):
    model = use(make_model(), name)
    caches = assorted_caches(model)
    alone = [copy.deepcopy(cache) for cache in caches]
    for step in range(4):
        tokens = [7 + 3 * step + row for row in range(len(caches))]
        together = model.decode_rows(tokens, caches)
        for row, (token, cache) in enumerate(zip(tokens, alone, strict=True)):
            close(together[row], model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1])
    check_equal_caches(caches, alone)


def test_rows_equal_the_oracle_and_go_on_alone(model, oracle):
    samples = [one for one in assorted_samples() if one.frames]
    caches = [filled(model, sample) for sample in samples]
    more = [[] for _ in samples]
    for step in range(3):
        for row, tokens in enumerate(more):
            tokens.append(20 + 5 * step + row)
        logits = model.decode_rows(torch.tensor([tokens[-1] for tokens in more]), caches)
        for row, sample in enumerate(samples):
            close(logits[row].double(), expected(oracle, sample, more=more[row])[-1], 2e-5)
    late = Sample("tFt", (1, 4, 6), seed=11)
    for row, (sample, cache) in enumerate(zip(samples, caches, strict=True)):
        written = Sample("ttt", seed=0)
        written.ids = torch.tensor(more[row])
        got = model(late.ids[None], past_key_values=cache, **media_of(late)).logits[0]
        close(got.double(), expected(oracle, sample, written, late)[-3:], 2e-5)


def test_rows_join_and_leave_between_calls(model):
    caches = [filled(model, sample) for sample in assorted_samples()]
    alone = [copy.deepcopy(cache) for cache in caches]
    for step, rows in enumerate(([0, 2], [2], [4, 1, 2, 0], [3], [0, 1, 2, 3, 4])):
        together = model.decode_rows([30 + step] * len(rows), [caches[row] for row in rows])
        for logits, row in zip(together, rows, strict=True):
            close(logits, model(torch.tensor([[30 + step]]), past_key_values=alone[row]).logits[0, -1])
    check_equal_caches(caches, alone)


def test_forward_takes_a_joint_cache_and_embeddings(model):
    caches = [filled(model, sample) for sample in assorted_samples()]
    others = [copy.deepcopy(cache) for cache in caches]
    ids = torch.arange(11, 16)[:, None]
    want = model.decode_rows(ids, caches)
    outputs = model(inputs_embeds=model.get_input_embeddings()(ids), **{CACHE: JointCache(others)})
    close(outputs.logits[:, 0], want)
    assert outputs.rope_deltas.shape == (5,) and outputs.hidden_states is None
    hidden = model(ids, output_hidden_states=True, **{CACHE: JointCache(others)}).hidden_states
    assert len(hidden) == 7 and hidden[0].shape == (5, 1, 64)


def test_copies_of_a_conversation_read_their_frames_once(model, kernels):
    """Ten questions about one video: one call of the kernel per cross-attention layer."""
    model = use(make_model(), "flash_attention_2")
    caches = [filled(model, assorted_samples()[2])]
    caches += [fork(caches[0]) for _ in range(3)]
    caches.insert(2, filled(model, assorted_samples()[1]))
    kernels.calls.clear()
    model.decode_rows([5, 6, 7, 8, 9], caches)
    crossing = [call for call in kernels.calls if call.keys[1] in (7, 15)]  # the tokens of one frame and of three
    assert sorted(call.queries[1] for call in crossing) == [1, 1, 4, 4]


def test_a_written_image_pad_places_no_frame(model):
    cache = filled(model, Sample("tFt", (1, 4, 4), seed=6))
    model(torch.tensor([[5]]), past_key_values=cache, **media_of(Sample("F", (1, 4, 6), seed=7)))
    other = filled(model, Sample("tt", seed=1))
    model.decode_rows([IMAGE_PAD, IMAGE_PAD], [cache, other])
    states = [one.layers[1].state for one in (cache, other)]
    assert [state.placed for state in states] == [[1], [0]] and states[0].is_waiting()


def test_bfloat16_autocast_and_inference_mode(model):
    caches = [filled(model, sample) for sample in assorted_samples()]
    alone = [copy.deepcopy(cache) for cache in caches]
    for context in (torch.autocast("cpu", torch.bfloat16), torch.inference_mode()):
        with context:
            together = model.decode_rows([5, 6, 7, 8, 9], caches)
            for row, cache in enumerate(alone):
                want = model(torch.tensor([[5 + row]]), past_key_values=cache).logits[0, -1]
                close(together[row].float(), want.float(), 0.03 if want.dtype == torch.bfloat16 else 1e-5)


# Errors before harm


def unchanged(caches, before):
    for cache, (tensors, fields) in zip(caches, before, strict=True):
        now, fields_now = contents(cache)
        assert fields_now == fields
        assert all(torch.equal(one, other) for one, other in zip(now, tensors, strict=True))


def bad_caches(model):
    padded = batch(assorted_samples(), "left")
    one_row = {name: value[:1] for name, value in padded.items() if name in ("input_ids", "attention_mask")}
    beams = filled(model, Sample("tFt", (1, 4, 4)))
    beams.batch_repeat_interleave(2)
    full = StaticCache(config=model.config.text_config, max_cache_len=3)
    model(**Sample("tFt", (1, 4, 4)).inputs(), past_key_values=full)
    deep = filled(model, Sample("tFt", (1, 4, 4)))
    bad_caches.owner = deep  # the owner of the layers has to exist
    fewer_layers = make_model(text={"num_hidden_layers": 2, "cross_attention_layers": [1]})
    more_heads = make_model(text={"num_key_value_heads": 4})
    return {
        r"got a tuple; expected a cache": (),
        r"it is empty; expected one that holds a prompt": DynamicCache(),
        r"it holds padding": model(**one_row, use_cache=True)[CACHE],
        r"it holds 2 rows; expected one row per cache": beams,
        r"it has 3 slots, all filled": full,
        r"The cache is a shallow copy": copy.copy(deep),
        r"it has 2 layers, and the model 6": filled(fewer_layers, Sample("tFt", (1, 4, 4))),
        r"": filled(more_heads, Sample("tFt", (1, 4, 4))),  # fails in its layers
    }


@pytest.mark.parametrize("case", range(8))
def test_if_one_cache_is_wrong_no_cache_changes(model, case):
    message, bad = list(bad_caches(model).items())[case]
    good = [filled(model, sample) for sample in assorted_samples()[1:3]]
    before = [contents(cache) for cache in good]
    error, match = (ValueError, f"Cache 1 of a joint call: .*{message}") if message else (RuntimeError, None)
    with pytest.raises(error, match=match):
        model.decode_rows([5, 6, 7], [good[0], bad, good[1]])
    unchanged(good, before)
    model.decode_rows([5, 7], good)


@pytest.mark.parametrize("layer", [0, 1, 3, 5])
def test_a_call_that_fails_is_undone(model, layer):
    caches = [filled(model, sample) for sample in assorted_samples()]
    alone = [copy.deepcopy(cache) for cache in caches]
    before = [contents(cache) for cache in caches]

    def fail(*args):
        raise MemoryError

    hook = model.model.language_model.layers[layer].mlp.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        model.decode_rows([5, 6, 7, 8, 9], caches)
    hook.remove()
    unchanged(caches, before)
    together = model.decode_rows([5, 6, 7, 8, 9], caches)
    for row, cache in enumerate(alone):
        close(together[row], model(torch.tensor([[5 + row]]), past_key_values=cache).logits[0, -1])


def test_wrong_arguments(model):
    caches = [filled(model, sample) for sample in assorted_samples()[:2]]
    before = [contents(cache) for cache in caches]
    for tokens in ([5], [5, 6, 7], torch.zeros(2), torch.zeros(2, 2, dtype=torch.long)):
        with pytest.raises(ValueError, match="expected one id for each of the 2 caches"):
            model.decode_rows(tokens, caches)
    with pytest.raises(ValueError, match="made of no caches"):
        model.decode_rows([], [])
    with pytest.raises(ValueError, match="given twice"):
        model.decode_rows([5, 6], [caches[0], caches[0]])
    joint, ids = {CACHE: JointCache(caches)}, torch.tensor([[5], [6]])
    with pytest.raises(ValueError, match=r"shape \[2, 2\], and 2 caches were given; expected \[2, 1\]"):
        model(torch.tensor([[5, 6], [7, 8]]), **joint)
    for name, value in {
        "attention_mask": torch.ones(2, 1),
        "position_ids": ids,
        "grid_thw": torch.tensor([[1, 4, 4]]),
        "rows_per_sample": 2,
        "output_attentions": True,
        "inputs_embeds": torch.zeros(2, 1, 64),
    }.items():
        with pytest.raises(ValueError, match=f"`?{name}"):
            model(ids, **joint, **{name: value})
    unchanged(caches, before)


def test_gradients_of_a_joint_call(model):
    """Through forward, as `decode_rows` computes none; later calls do not write over what the backward pass needs."""
    samples = [one for one in assorted_samples() if one.frames][:3]
    weight = model.model.language_model.layers[1].cross_attn.q_proj.weight
    caches, alone = ([filled(model, sample) for sample in samples] for _ in range(2))
    ids = torch.arange(7, 10)[:, None]
    with torch.enable_grad():
        loss = model(ids, **{CACHE: JointCache(caches)}).logits.square().mean()
        want = torch.stack(
            [
                model(ids[row : row + 1], past_key_values=cache).logits.square().mean()
                for row, cache in enumerate(alone)
            ]
        ).mean()
        model.decode_rows([1, 2, 3], caches)
        close(*(torch.autograd.grad(one, weight)[0] for one in (loss, want)))
