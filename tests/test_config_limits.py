"""Each check of the configuration at its limit: the last value that is allowed, and the first that is not."""

import pytest
from tiny import CONFIG, make_config

from moss_vl.configuration_moss_vl import MossVLConfig, MossVLTextConfig, MossVLVisionConfig


TEXT_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
VISION_SIZES = (
    "depth",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "in_channels",
    "patch_size",
    "temporal_patch_size",
    "spatial_merge_size",
    "out_hidden_size",
    "num_position_embeddings",
)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "4"], ids=repr)
@pytest.mark.parametrize(
    "part, name", [*[("text", name) for name in TEXT_SIZES], *[("vision", name) for name in VISION_SIZES]]
)
def test_sizes_are_positive_whole_numbers(part, name, value):
    with pytest.raises(ValueError, match=f"`{part}_config.{name}`.*a positive integer"):
        make_config(**{part: {name: value}})


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"])
@pytest.mark.parametrize("value", [0, "4"], ids=repr)
def test_sizes_that_defaults_depend_on_are_checked_first(name, value):
    """Also with defaults for everything else: no division by zero, no arithmetic with strings."""
    with pytest.raises(ValueError, match=f"`text_config.{name}`.*a positive integer"):
        MossVLTextConfig(**{name: value})


# (change, part of the error message or None)
LIMITS = [
    ({"text": {"cross_attention_layers": [1]}}, None),
    ({"text": {"cross_attention_layers": [5]}}, None),
    ({"text": {"cross_attention_layers": [1, 2, 3, 4, 5]}}, None),
    ({"text": {"cross_attention_layers": [0]}}, "from 1 to 5"),
    ({"text": {"cross_attention_layers": [6]}}, "from 1 to 5"),
    ({"text": {"cross_attention_layers": [2, 2]}}, "rising"),
    ({"text": {"attention_dropout": 0.0}}, None),
    ({"text": {"attention_dropout": 0.999}}, None),
    ({"text": {"attention_dropout": 1.0}}, "0 <= p < 1"),
    ({"text": {"attention_dropout": -0.001}}, "0 <= p < 1"),
    ({"text": {"num_key_value_heads": 8}}, None),
    ({"text": {"num_key_value_heads": 16}}, "whole groups"),
    ({"text": {"rope_scaling": {"mrope_section": [6, 2, 0]}}}, None),
    ({"text": {"rope_scaling": {"mrope_section": [6, 2]}}}, "mrope_section"),
    ({"text": {"rope_scaling": {"mrope_section": [6, 2, 0, 0]}}}, "mrope_section"),
    ({"text": {"rope_scaling": {"mrope_section": [9, 0, -1]}}}, "mrope_section"),
    ({"text": {"rope_scaling": {"mrope_section": [4.0, 2, 2]}}}, "mrope_section"),
    ({"text": {"rope_scaling": {"mrope_section": [5, 2, 2]}}}, "sum to head_dim / 2 = 8"),
    ({"text": {"rope_scaling": {"mrope_section": [4, 2, 2], "mrope_interleaved": 1}}}, "mrope_interleaved"),
    ({"vision": {"hidden_size": 32, "num_heads": 8}}, None),
    ({"vision": {"hidden_size": 32, "num_heads": 16}}, "multiple of 4"),
    ({"vision": {"deepstack_visual_indexes": [0, 2]}}, None),
    ({"vision": {"deepstack_visual_indexes": [3]}}, "from 0 to 2"),
    ({"vision": {"deepstack_visual_indexes": [-1, 2]}}, "from 0 to 2"),
    ({"vision": {"deepstack_visual_indexes": [2, 1]}}, "rising"),
    ({"vision": {"deepstack_visual_indexes": [1, 1]}}, "rising"),
    ({"vision": {"num_position_embeddings": 35}}, "square"),
    ({"vision": {"num_position_embeddings": 37}}, "square"),
    ({"image_token_id": 0}, None),
    ({"image_token_id": 199}, None),
    ({"image_token_id": -1}, "below vocab_size"),
    ({"image_token_id": "190"}, "below vocab_size"),
    ({"video_token_id": 200}, "below vocab_size"),
    ({"vision_start_token_id": 200}, "below vocab_size"),
    ({"vision_end_token_id": 200}, "below vocab_size"),
    ({"vision_end_token_id": 192}, "four different"),
    ({"vision_seq_pad_multiple": 1}, None),
    ({"vision_seq_pad_multiple": 1.0}, "vision_seq_pad_multiple"),
]


@pytest.mark.parametrize("change, message", LIMITS, ids=str)
def test_limits(change, message):
    if message is None:
        config = make_config(**change)
        for part, value in change.items():
            of = {"text": config.text_config, "vision": config.vision_config}.get(part)
            for name, wanted in value.items() if of is not None else ():
                if name != "rope_scaling":
                    assert getattr(of, name) == wanted
    else:
        with pytest.raises(ValueError, match=message):
            make_config(**change)


def test_defaults_that_depend_on_other_settings():
    """The head size, as many key/value heads as query heads, every fourth layer, and the sections of the rope."""
    config = MossVLTextConfig(hidden_size=256, num_attention_heads=4, num_key_value_heads=None, num_hidden_layers=11)
    assert (config.head_dim, config.num_key_value_heads, config.cross_attention_layers) == (64, 4, [2, 6, 10])
    assert config.rope_parameters == {
        "rope_type": "default",
        "rope_theta": 5_000_000.0,
        "mrope_section": [12, 10, 10],
        "mrope_interleaved": True,
    }
    assert MossVLTextConfig(head_dim=16).rope_parameters["mrope_section"] == [4, 2, 2]
    released = MossVLConfig()
    assert released.text_config.rope_parameters["mrope_section"] == [24, 20, 20]
    assert (released.text_config.rms_norm_eps, released.vision_config.layer_norm_eps) == (1e-6, 1e-6)
    assert (
        released.text_config.attention_bias,
        released.text_config.attention_dropout,
        released.text_config.use_cache,
    ) == (False, 0.0, True)
    assert (released.text_config.hidden_act, released.vision_config.hidden_act) == ("silu", "gelu_pytorch_tanh")
    assert (released.vision_config.initializer_range, released.text_config.initializer_range) == (0.02, 0.02)


def test_the_newer_name_of_the_rope_takes_precedence():
    both = MossVLTextConfig(
        head_dim=16,
        rope_theta=1.0,
        rope_scaling={"rope_theta": 2.0, "mrope_section": [4, 2, 2]},
        rope_parameters={"rope_theta": 3.0},
    )
    assert both.rope_theta == 3.0 and both.rope_parameters["mrope_section"] == [4, 2, 2]
    assert MossVLTextConfig(head_dim=16, rope_theta=1.0, rope_scaling={"mrope_section": [4, 2, 2]}).rope_theta == 1.0
    later = MossVLTextConfig(head_dim=16, rope_theta=7.0)
    later.rope_scaling = {"mrope_section": [5, 2, 1]}
    assert later.rope_parameters["mrope_section"] == [5, 2, 1] and later.rope_theta == 7.0


def test_the_auto_map_is_completed():
    """Given classes are kept. Missing ones are that of AutoModelForCausalLM, else that of AutoModel, else the
    package's."""
    ours = "modeling_moss_vl.MossVLForConditionalGeneration"
    config = MossVLConfig(**CONFIG)
    assert config.auto_map["AutoConfig"] == "configuration_moss_vl.MossVLConfig"
    assert all(value == ours for name, value in config.auto_map.items() if name != "AutoConfig")
    named = MossVLConfig(**CONFIG, auto_map={"AutoModel": "a.B"}).auto_map
    assert {named[name] for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText")} == {"a.B"}
    named = MossVLConfig(
        **CONFIG, auto_map={"AutoModel": "a.B", "AutoModelForCausalLM": "c.D", "AutoConfig": "e.F"}
    ).auto_map
    assert (
        named["AutoModel"],
        named["AutoModelForCausalLM"],
        named["AutoModelForImageTextToText"],
        named["AutoConfig"],
    ) == (
        "a.B",
        "c.D",
        "c.D",
        "e.F",
    )


def test_parts_as_objects_or_none():
    text, vision = MossVLTextConfig(**CONFIG["text_config"]), MossVLVisionConfig(**CONFIG["vision_config"])
    as_objects = MossVLConfig(**CONFIG | {"text_config": text, "vision_config": vision})
    assert as_objects.text_config.to_dict() == make_config().text_config.to_dict()
    assert as_objects.vision_config.to_dict() == make_config().vision_config.to_dict()
    assert MossVLConfig(text_config=None).text_config.num_hidden_layers == 48
    for wrong in (7, "text", [1]):
        with pytest.raises(ValueError, match="`text_config`, got .* a dict or a MossVLTextConfig"):
            MossVLConfig(text_config=wrong)
