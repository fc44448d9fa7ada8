"""Configs: the released file, older and newer spellings, contradictory settings."""

import json

import pytest
from conftest import ROOT
from tiny import make_config

from moss_vl.configuration_moss_vl import MossVLConfig, MossVLTextConfig, MossVLVisionConfig


def test_the_released_sizes():
    config = MossVLConfig(**json.loads((ROOT / "config.json").read_text()))
    assert config.text_config.cross_attention_layers == list(range(2, 48, 4))
    assert config.text_config.rope_parameters == {
        "rope_type": "default",
        "rope_theta": 5_000_000,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    }
    assert config.vision_config.deepstack_visual_indexes == [8, 16, 24]
    assert config.image_token_id == 151655 and config.tie_word_embeddings is False
    defaults = MossVLConfig()
    for part in ("text_config", "vision_config"):
        ours, released = getattr(defaults, part).to_dict(), json.loads((ROOT / "config.json").read_text())[part]
        for key in set(released) - {"dtype", "bos_token_id", "eos_token_id", "rope_theta", "rope_scaling"}:
            assert ours[key] == released[key], key


def test_old_and_new_spellings_of_the_rope():
    section = {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
    old = MossVLTextConfig(head_dim=16, rope_theta=1e4, rope_scaling=section | {"rope_type": "default"})
    older = MossVLTextConfig(head_dim=16, rope_theta=1e4, rope_scaling=section | {"type": "default"})
    new = MossVLTextConfig(head_dim=16, rope_parameters=section | {"rope_type": "default", "rope_theta": 1e4})
    assert old.rope_parameters == older.rope_parameters == new.rope_parameters
    assert new.rope_theta == 1e4 and new.rope_scaling["mrope_section"] == [4, 2, 2]


def test_dicts_of_the_caller_are_not_changed():
    rope = {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = {"head_dim": 16, "hidden_size": 64, "rope_scaling": rope}
    before = json.dumps(text)
    MossVLConfig(text_config=text, vision_config={"out_hidden_size": 64})
    assert json.dumps(text) == before


@pytest.mark.parametrize("where", ["top", "text", "both"])
def test_tied_embeddings_set_in_one_place_are_set_in_both(where):
    top = {"tie_word_embeddings": True} if where != "text" else {}
    text = {"tie_word_embeddings": True} if where != "top" else {}
    config = make_config(text=text, **top)
    assert config.tie_word_embeddings is True and config.text_config.tie_word_embeddings is True


def test_saved_and_loaded(tmp_path):
    make_config().save_pretrained(tmp_path)
    loaded = MossVLConfig.from_pretrained(tmp_path)
    assert loaded.text_config.to_dict() == make_config().text_config.to_dict()
    saved = json.loads((tmp_path / "config.json").read_text())
    models = ("", "ForCausalLM", "ForImageTextToText", "ForMultimodalLM", "ForVision2Seq")
    assert saved["auto_map"] == {"AutoConfig": "configuration_moss_vl.MossVLConfig"} | {
        f"AutoModel{name}": "modeling_moss_vl.MossVLForConditionalGeneration" for name in models
    }


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"text": {"cross_attention_layers": [0, 4]}},
            r"cross_attention_layers`, got \[0, 4\]; expected .* from 1 to 5",
        ),
        ({"text": {"cross_attention_layers": [1, 6]}}, "cross_attention_layers"),
        ({"text": {"cross_attention_layers": [4, 1]}}, "rising"),
        ({"text": {"cross_attention_layers": []}}, "at least one"),
        ({"text": {"rope_scaling": {"mrope_section": [4, 2, 1]}}}, "mrope_section.*sum to head_dim / 2 = 8"),
        ({"text": {"rope_scaling": {"mrope_section": [0, 4, 4]}}}, "mrope_section.*every third frequency"),
        ({"text": {"rope_scaling": {"rope_type": "yarn", "mrope_section": [4, 2, 2]}}}, "rope type, got 'yarn'"),
        ({"text": {"rope_scaling": {"mrope_interleaved": False, "mrope_section": [4, 2, 2]}}}, "mrope_interleaved"),
        ({"text": {"num_key_value_heads": 3}}, "whole groups"),
        ({"text": {"head_dim": 15}}, "head_dim"),
        ({"text": {"hidden_size": 0}}, "hidden_size.*positive"),
        ({"text": {"num_hidden_layers": 6.5}}, "num_hidden_layers.*positive integer"),
        ({"text": {"attention_dropout": 1.5}}, "attention_dropout"),
        ({"vision": {"num_position_embeddings": 15}}, "square"),
        ({"vision": {"hidden_size": 36}}, "multiple of 4"),
        ({"vision": {"deepstack_visual_indexes": [0, 3]}}, "from 0 to 2"),
        ({"vision": {"out_hidden_size": 32}}, "out_hidden_size`, got 32; expected `text_config.hidden_size` = 64"),
        ({"image_token_id": 200}, "below vocab_size = 200"),
        ({"image_token_id": 191}, "four different ids"),
        ({"vision_seq_pad_multiple": 0}, "vision_seq_pad_multiple"),
    ],
)
def test_contradictory_configs(change, message):
    with pytest.raises(ValueError, match=message):
        make_config(**change)


def test_a_config_object_of_the_wrong_kind():
    with pytest.raises(ValueError, match="`text_config`, got 'MossVLVisionConfig'"):
        MossVLConfig(text_config=MossVLVisionConfig())
