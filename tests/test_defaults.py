"""Defaults: chunks of the encoder, the cache, tied weights, and weights that a checkpoint lacks."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import Sample, make_config, make_model

from moss_vl.configuration_moss_vl import MossVLConfig, MossVLTextConfig
from moss_vl.modeling_moss_vl import CACHE, MossVLForConditionalGeneration


@pytest.mark.parametrize("training, gradients, chunks", [
    (False, False, [64, 6]),
    (False, True, [64, 6]),
    (True, True, [70]),
])  # fmt: skip
def test_frames_that_the_encoder_takes_at_once(training, gradients, chunks):
    """64, and in training all. Frames have four patches, so the limit of patches is not reached."""
    model, calls = make_model().train(training), []
    model.model.visual.blocks[0].register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[0]))
    pixels = torch.randn(70 * 4, 48, generator=torch.Generator().manual_seed(0))
    with torch.set_grad_enabled(gradients):
        model.model.visual(pixels, [[30, 2, 2], [40, 2, 2]])
        assert calls == [4 * frames for frames in chunks]
        calls.clear()
        model.model.visual(pixels, [[30, 2, 2], [40, 2, 2]], vision_chunked_length=32)
        assert calls == [4 * 32, 4 * 32, 4 * 6]


@pytest.mark.parametrize("training, config, given, kept", [
    (False, True, None, True),
    (False, False, None, False),
    (True, True, None, False),
    (True, True, True, True),
    (False, True, False, False),
    (False, False, True, True),
])  # fmt: skip
def test_whether_a_cache_is_made(training, config, given, kept):
    model = make_model(text={"use_cache": config}).train(training)
    out = model(**Sample("tFt", (1, 4, 4)).inputs(), use_cache=given)
    assert (out.get(CACHE) is not None) == kept
    if kept:
        assert out[CACHE].get_seq_length() == 3


def test_embeddings_and_head_are_two_matrices():
    assert MossVLConfig().tie_word_embeddings is False and MossVLTextConfig().tie_word_embeddings is False
    assert MossVLTextConfig().to_dict()["tie_word_embeddings"] is False
    model = make_model()
    assert model.lm_head.weight is not model.get_input_embeddings().weight


def test_weights_that_a_checkpoint_lacks_start_as_in_a_new_model(tmp_path):
    """Gates and separator are 0, norms 1, matrices small: no weight is uninitialised memory."""
    make_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lacking = (
        "cross_attn_attn_gate",
        "cross_attn_mlp_gate",
        "separator_token",
        "layers.1.cross_attn.q_norm.weight",
        "layers.4.cross_attn.q_proj.weight",
        "merger.linear_fc2.bias",
        "norms.0.weight",
        "visual.pos_embed.weight",
    )
    kept = {name: tensor for name, tensor in weights.items() if not name.endswith(lacking)}
    assert len(weights) - len(kept) == 4 + 1 + 1 + 1 + 1 + 1 + 1
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = dict(MossVLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).named_parameters())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in kept.items())
    for name in weights.keys() - kept.keys():
        if "norm" in name:
            assert (loaded[name] == 1).all(), name
        elif name.endswith(("proj.weight", "pos_embed.weight")):
            assert 0.015 < loaded[name].std() < 0.025, name
        else:
            assert not loaded[name].any(), name


@torch.no_grad()
def test_a_reset_cache_equals_an_empty_one():
    """For another prompt it equals a new cache, also in transformers 4, whose own layers keep their length and have
    zeros as keys."""
    model, first, second = (
        make_model(),
        Sample("tFFt", (2, 4, 4), seed=1),
        Sample("FttFtt", (1, 4, 6), (1, 2, 4), seed=2),
    )
    cache = model(**first.inputs(), use_cache=True)[CACHE]
    cache.reset()
    assert [cache.get_seq_length(layer) for layer in range(6)] == [0] * 6
    again = model(**second.inputs(), **{CACHE: cache})
    assert torch.equal(again.logits, model(**second.inputs()).logits)
    step = model(torch.tensor([[5]]), **{CACHE: again[CACHE]}).logits
    fresh = model(**second.inputs(), use_cache=True)[CACHE]
    assert torch.equal(step, model(torch.tensor([[5]]), **{CACHE: fresh}).logits)


def test_the_initializer_range_is_the_config_s():
    for part, name in (
        ("text", "model.language_model.layers.0.mlp.up_proj.weight"),
        ("vision", "model.visual.blocks.0.mlp.linear_fc1.weight"),
    ):
        torch.manual_seed(0)
        config = make_config(**{part: {"initializer_range": 0.5}})
        weights = dict(MossVLForConditionalGeneration(config).named_parameters())
        assert 0.4 < weights[name].std() < 0.6
