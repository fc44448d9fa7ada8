"""Configs do not change their arguments; integers of any type; Auto classes; any number of learned positions."""

import copy
import json

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT
from tiny import CONFIG, Sample, make_config, make_model

from moss_vl.configuration_moss_vl import MossVLConfig, MossVLTextConfig, MossVLVisionConfig


def test_a_config_changes_none_of_its_arguments():
    text = MossVLTextConfig(**CONFIG["text_config"], tie_word_embeddings=False)
    vision = MossVLVisionConfig(**CONFIG["vision_config"])
    top = {name: value for name, value in CONFIG.items() if not name.endswith("_config")}
    top |= {"auto_map": {"AutoModel": "modeling_moss_vl.X"}, "label2id": {"a": 0}, "tie_word_embeddings": True}
    before = copy.deepcopy((text.to_dict(), vision.to_dict(), top))
    config = MossVLConfig(text_config=text, vision_config=vision, **top)
    config.text_config.hidden_act = "gelu"
    config.text_config.rope_parameters["mrope_section"][0] = 7
    config.vision_config.deepstack_visual_indexes.append(9)
    config._attn_implementation = "eager"
    assert (text.to_dict(), vision.to_dict(), top) == before
    assert text.tie_word_embeddings is False and config.text_config.tie_word_embeddings is True
    assert text._attn_implementation != "eager"


def test_two_configs_share_nothing():
    text = MossVLTextConfig(**CONFIG["text_config"])
    rest = {name: value for name, value in CONFIG.items() if name != "text_config"}
    one, other = (MossVLConfig(text_config=text, **rest) for _ in range(2))
    one.text_config.rope_parameters["rope_theta"] = 1.0
    assert other.text_config.rope_theta == text.rope_theta == 5_000_000.0


def test_nested_dicts_are_copied():
    given = copy.deepcopy(CONFIG) | {"quantization_config": {"skip": ["a"]}}
    given["text_config"]["rope_parameters"] = {
        **given["text_config"].pop("rope_scaling"),
        "rope_theta": 1e4,
        "beta": [1, 2],
    }
    before = copy.deepcopy(given)
    config = MossVLConfig(**given)
    config.text_config.rope_parameters["beta"].append(3)
    config.quantization_config["skip"].append("b")
    assert given == before


def test_integers_of_numpy_are_accepted_and_saved(tmp_path):
    integers = {
        name: np.int64(CONFIG["text_config"][name])
        for name in ("hidden_size", "num_hidden_layers", "head_dim", "vocab_size")
    }
    rope = {"mrope_section": np.array([4, 2, 2]), "mrope_interleaved": True}
    text = integers | {"cross_attention_layers": np.array([1, 4]), "rope_scaling": rope}
    made = make_config(
        text=text,
        vision={"depth": np.int32(3), "deepstack_visual_indexes": np.array([0, 1])},
        image_token_id=np.int64(190),
    )
    assert made.to_dict() == make_config().to_dict()
    made.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["hidden_size"] == 64
    with pytest.raises(ValueError, match="hidden_size.*got True; expected a positive integer"):
        make_config(text={"hidden_size": True})


def test_saved_references_name_the_code_in_the_folder(tmp_path):
    """A config from a hub names its repository; references to code that is saved with the config drop it."""
    references = {name: f"owner/name--{reference}" for name, reference in make_config().auto_map.items()}
    config = make_config(auto_map={**references, "AutoTokenizer": ["owner/name--tokenization_x.X", None]})
    assert config.auto_map["AutoModel"].startswith("owner/name--")
    (tmp_path / "modeling_moss_vl.py").touch()  # as save_pretrained of the model does first
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert saved == {**make_config().auto_map, "AutoTokenizer": ["owner/name--tokenization_x.X", None]}


def test_saved_references_name_classes_that_are_saved(tmp_path):
    """The config of somebody else's code is saved with this code, and with classes that lie in the folder already."""
    references = {
        "AutoConfig": "configuration_x.XConfig",
        "AutoModel": "modeling_moss_vl.XModel",
        "AutoModelForCausalLM": "modeling_own.OwnModel",
        "AutoModelForSequenceClassification": "modeling_far.FarModel",
    }
    (tmp_path / "modeling_own.py").write_text("class OwnModel:\n    pass\n")
    make_config(auto_map=references).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    kept = ("AutoModelForCausalLM", "AutoModelForSequenceClassification")
    own_model = {"AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForVision2Seq"}
    assert saved == {
        **make_config().auto_map,
        **dict.fromkeys(own_model, "modeling_own.OwnModel"),
        **{name: references[name] for name in kept},
    }
    own_files = [saved[name] for name in make_config().auto_map]
    assert all((tmp_path / f"{reference.split('.')[0]}.py").is_file() for reference in own_files)


@pytest.mark.parametrize("name", ["AutoModelForMultimodalLM", "AutoModelForVision2Seq"])
def test_auto_classes_of_either_version(name):
    auto = getattr(transformers, name, None)
    assert (auto is None) == ((name == "AutoModelForVision2Seq") == (int(transformers.__version__.split(".")[0]) >= 5))
    for folder in (ROOT, ROOT / "checkpoints/moss-vl-nano"):
        assert (
            json.loads((folder / "config.json").read_text())["auto_map"][name]
            == "modeling_moss_vl.MossVLForConditionalGeneration"
        )
    if auto is not None:
        model = auto.from_pretrained(ROOT / "checkpoints/moss-vl-nano", trust_remote_code=True)
        assert type(model).__name__ == "MossVLForConditionalGeneration"


def interpolated(table, rows, columns):
    """Bilinear interpolation with end points, point by point: [side, side, D] -> float64 [rows, columns, D]."""
    side = len(table)
    out = torch.zeros(rows, columns, table.shape[-1], dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            y, x = (side - 1) * i / max(rows - 1, 1), (side - 1) * j / max(columns - 1, 1)
            for a in range(side):
                for b in range(side):
                    out[i, j] += table[a, b].double() * max(0, 1 - abs(y - a)) * max(0, 1 - abs(x - b))
    return out


@pytest.mark.parametrize("positions", [25, 9, 1], ids=["side 5", "side 3", "side 1"])
def test_learned_positions_whose_side_is_no_multiple_of_the_merge_size(positions):
    """Adding the interpolated positions to the patches by hand, with the learned ones zeroed, gives the same
    logits."""
    model = make_model(vision={"num_position_embeddings": positions})
    sample = Sample("tFttFt", (1, 4, 6), (1, 2, 2))
    inputs = sample.inputs()
    with torch.no_grad():
        expected = model(**inputs).logits
        visual = model.model.visual
        side = round(positions**0.5)
        table = visual.pos_embed.weight.detach().clone().view(side, side, -1)
        m = model.config.vision_config.spatial_merge_size
        added = []
        for _, rows, columns in inputs["grid_thw"].tolist():
            grid = interpolated(table, rows, columns).float()
            added.append(grid.view(rows // m, m, columns // m, m, -1).transpose(1, 2).flatten(0, 3))
        visual.pos_embed.weight.zero_()
        handle = visual.patch_embed.register_forward_hook(
            lambda module, args, out: out + torch.cat(added).view_as(out)
        )
        try:
            by_hand = model(**inputs).logits
        finally:
            handle.remove()
        without = model(**inputs).logits
    assert (expected - by_hand).abs().max() < 1e-5 * expected.abs().max()
    assert (expected - without).abs().max() > 1e-3 * expected.abs().max()
