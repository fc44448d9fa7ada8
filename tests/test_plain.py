"""The model against the one that benchmarks/plain.py writes out from the specification: every number of the
configuration is used.

Self-consistency cannot see a number that is ignored everywhere; the plain model reads the same configuration and
shares no code.
"""

import pytest
import torch
from tiny import IMAGE_PAD, PATCH, make_model

from moss_vl import attention, decoder, vision_encoder
from moss_vl.benchmarks.plain import PlainMossVL


def rope(*section, theta=100.0):
    return {
        "head_dim": 24,
        "rope_theta": theta,
        "rope_scaling": {"mrope_section": list(section), "mrope_interleaved": True},
    }


# Changed part -> the change. theta is small, so that every frequency rotates far enough to detect.
SETTINGS = {
    "nothing": {},
    "rms_norm_eps": {"text": {"rms_norm_eps": 0.5}},
    "layer_norm_eps": {"vision": {"layer_norm_eps": 0.5}},
    "rope_theta": {"text": rope(6, 3, 3, theta=5000.0)},
    "rope: as many of h as of w": {"text": rope(6, 3, 3)},
    "rope: more of h than of w": {"text": rope(8, 3, 1)},
    "rope: more of w than of h": {"text": rope(8, 1, 3)},
    "rope: h alone": {"text": rope(9, 3, 0)},
    "rope: w alone": {"text": rope(9, 0, 3)},
    "rope: all that fits": {"text": rope(4, 4, 4)},
    "one key head": {"text": {"num_key_value_heads": 1}},
    "cross-attention elsewhere": {"text": {"cross_attention_layers": [2, 3, 5]}},
    "no kept blocks": {"vision": {"deepstack_visual_indexes": []}},
    "other kept blocks": {"vision": {"deepstack_visual_indexes": [1, 2]}},
    "vision heads": {"vision": {"num_heads": 4}},
    "a larger table of positions": {"vision": {"num_position_embeddings": 64}},
    "merge 1": {"vision": {"spatial_merge_size": 1}},
    "merge 4": {"vision": {"spatial_merge_size": 4}},
    "two frames per patch": {"vision": {"temporal_patch_size": 2}},
    "image_token_id": {"image_token_id": 7},
}
SAME_WEIGHTS = [
    ("nothing", "rms_norm_eps"),
    ("nothing", "layer_norm_eps"),
    ("rope: as many of h as of w", "rope_theta"),
]
SAME_WEIGHTS += [("rope: as many of h as of w", name) for name in SETTINGS if name.startswith("rope: ")][1:]
# Two frames, wider than high and the reverse.
GRIDS = [(4, 12), (8, 4)]
TEXT = [5, 9, IMAGE_PAD, 11, IMAGE_PAD, 12, 13]


def inputs_of(config, rows, columns):
    ids = torch.tensor([[config.image_token_id if token == IMAGE_PAD else token for token in TEXT]])
    values = 3 * config.vision_config.temporal_patch_size * PATCH**2
    pixels = torch.randn(2 * rows * columns, values, generator=torch.Generator().manual_seed(rows))
    return ids, pixels, torch.tensor([[2, rows, columns]])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_every_number_of_the_configuration_is_used(name, grid):
    model = make_model("sdpa", **SETTINGS[name])
    ids, pixels, grid_thw = inputs_of(model.config, *grid)
    plain, steps = PlainMossVL(model), torch.tensor([[21], [22]])
    expected = [plain.prefill(ids, pixels, 2, *grid), *(plain.decode(step[None]) for step in steps)]
    out = model(ids, pixel_values=pixels, grid_thw=grid_thw, use_cache=True)
    got = [out.logits[:, -1:], *(model(step[None], past_key_values=out.past_key_values).logits for step in steps)]
    for one, other in zip(got, expected, strict=True):
        scale = other.abs().max().clamp(min=1)
        assert (one - other).abs().max() < 2e-5 * scale  # float32 in another order


@pytest.mark.parametrize("first, second", SAME_WEIGHTS)
@torch.no_grad()
def test_every_change_is_large_enough_to_detect(first, second):
    """The weights are the same, so equal logits are possible."""
    models = [make_model("sdpa", **SETTINGS[name]) for name in (first, second)]
    ids, pixels, grid_thw = inputs_of(models[0].config, *GRIDS[0])
    one, other = (model(ids, pixel_values=pixels, grid_thw=grid_thw).logits for model in models)
    assert (one - other).abs().max() > 1e-2


@pytest.mark.parametrize(
    "section, fits",
    [((4, 4, 4), True), ((3, 5, 4), False), ((3, 4, 5), False), ((12, 0, 0), True), ((0, 6, 6), False)],
)
def test_sections_have_every_third_frequency_at_most(section, fits):
    """Of twelve frequencies, h has 1, 4, 7, 10 and w has 2, 5, 8, 11."""
    if fits:
        assert make_model(text=rope(*section)).config.text_config.rope_parameters["mrope_section"] == list(section)
    else:
        with pytest.raises(ValueError, match="every third frequency"):
            make_model(text=rope(*section))


ACTIVATIONS = {"gelu": torch.nn.functional.gelu, "relu": torch.relu, "silu": torch.nn.functional.silu}


@pytest.mark.parametrize("name", ACTIVATIONS)
@torch.no_grad()
def test_activations(name):
    """Both MLPs use the config's; between the merger's layers it is always exact GELU."""
    model = make_model(text={"hidden_act": name}, vision={"hidden_act": name})
    generator = torch.Generator().manual_seed(0)
    mlp, x = model.model.language_model.layers[1].mlp, torch.randn(3, 64, generator=generator)
    assert torch.allclose(mlp(x), mlp.down_proj(ACTIVATIONS[name](mlp.gate_proj(x)) * mlp.up_proj(x)), atol=1e-6)
    mlp, x = model.model.visual.blocks[0].mlp, torch.randn(3, 32, generator=generator)
    assert torch.allclose(mlp(x), mlp.linear_fc2(ACTIVATIONS[name](mlp.linear_fc1(x))), atol=1e-6)
    merger = model.model.visual.merger
    features = [torch.randn(4, 32, generator=generator) for _ in merger.norms]
    merged = torch.cat([norm(feature) for norm, feature in zip(merger.norms, features, strict=True)], dim=-1).view(
        1, -1
    )
    expected = merger.linear_fc2(torch.nn.functional.gelu(merger.linear_fc1(merged)))
    assert torch.allclose(merger(features), expected, atol=1e-6)


def test_biases_are_where_the_config_has_them():
    for bias in (False, True):
        model = make_model(text={"attention_bias": bias})
        names = {name for name, _ in model.named_parameters() if "language_model" in name and name.endswith("bias")}
        kinds = {index: "cross" if index in (1, 4) else "self" for index in range(6)}
        layers = [f"model.language_model.layers.{index}.{kind}_attn" for index, kind in kinds.items()]
        assert names == ({f"{layer}.{part}_proj.bias" for layer in layers for part in "qkvo"} if bias else set())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dropout_of_both_kinds_of_attention(implementation, monkeypatch):
    """In training the config's share of attention weights is dropped in every decoder layer, and none in the vision
    encoder."""
    model, shares = make_model(implementation, text={"attention_dropout": 0.25}).train(), []
    attend = decoder.attend

    def spy(module, *args, **kwargs):
        shares.append((type(module).__name__, kwargs.get("dropout", 0.0)))
        return attend(module, *args, **kwargs)

    for file in (decoder, vision_encoder):
        monkeypatch.setattr(file, "attend", spy)
    ids, pixels, grid_thw = inputs_of(model.config, *GRIDS[0])
    model(ids, pixel_values=pixels, grid_thw=grid_thw)
    assert {share for name, share in shares if "Vision" in name} == {0.0}
    assert {(name, share) for name, share in shares if "Vision" not in name} == {
        ("MossVLSelfAttention", 0.25),
        ("MossVLCrossAttention", 0.25),
    }
    assert len([name for name, _ in shares if name == "MossVLSelfAttention"]) == 4


def test_dropout_drops_the_configured_share():
    """A quarter of eager's weights is 0 and the others are a third larger, so the mean is unchanged."""
    model = make_model("eager", text={"attention_dropout": 0.25}).train()
    module, generator = model.model.language_model.layers[0].self_attn, torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 8, 40, 16, generator=generator), torch.randn(1, 2, 40, 16, generator=generator)
    value = torch.eye(40).expand(1, 2, 40, 40)  # so that the output is the weights
    torch.manual_seed(0)
    out, weights = attention.eager_attention_forward(module, query, key, value, None, 0.25, dropout=0.25)
    used = out.transpose(1, 2)
    kept = used != 0
    assert 0.7 < kept.float().mean() < 0.8
    assert torch.allclose(used[kept], (weights / 0.75)[kept], atol=1e-6)
    module.eval()
    out, weights = attention.eager_attention_forward(module, query, key, value, None, 0.25, dropout=0.25)
    assert torch.allclose(out.transpose(1, 2), weights, atol=1e-6)
