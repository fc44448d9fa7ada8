"""Settings files: limits under all their names, tokenizers saved by both transformers versions, unknown classes."""

import json
import shutil

import pytest
from conftest import ROOT

from moss_vl.image_processing_moss_vl import MossVLImageProcessor
from moss_vl.processor_loading import make_tokenizer_portable
from moss_vl.tools import install_into


IN_FILE = {
    "size": {"size": {"shortest_edge": 5000, "longest_edge": 90000}},
    "top level": {"shortest_edge": 5000, "longest_edge": 90000},
    "top level, the other names": {"min_pixels": 5000, "max_pixels": 90000},
}
GIVEN = {
    "nothing": ({}, (5000, 90000)),
    "the least": ({"shortest_edge": 6000}, (6000, 90000)),
    "the least by its other name": ({"min_pixels": 6000}, (6000, 90000)),
    "the most": ({"longest_edge": 80000}, (5000, 80000)),
    "the most by its other name": ({"max_pixels": 80000}, (5000, 80000)),
    "the most in a size": ({"size": {"longest_edge": 80000}}, (5000, 80000)),
    "both in a size": ({"size": {"shortest_edge": 6000, "longest_edge": 80000}}, (6000, 80000)),
    "one that is None": ({"max_pixels": None, "min_pixels": 6000}, (6000, 90000)),
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("in_file", IN_FILE)
def test_a_given_limit_replaces_that_of_the_file_under_any_name(in_file, given):
    options, expected = GIVEN[given]
    file = json.loads(json.dumps(IN_FILE[in_file]))
    made = MossVLImageProcessor.from_dict(file, **json.loads(json.dumps(options)))
    assert (made.min_pixels, made.max_pixels) == expected
    assert file == IN_FILE[in_file], "the caller's settings stay as they are"
    again = MossVLImageProcessor.from_dict(made.to_dict())
    assert (again.min_pixels, again.max_pixels) == expected


@pytest.mark.parametrize(
    "config, expected",
    [
        (
            {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"]},
            {"tokenizer_class": "Qwen2Tokenizer", "additional_special_tokens": ["<a>"]},
        ),
        ({"tokenizer_class": "Qwen2Tokenizer"}, None),
        ({"tokenizer_class": "LlamaTokenizer", "extra_special_tokens": {"image": "<a>"}}, None),
        ({"extra_special_tokens": []}, {"additional_special_tokens": []}),
    ],
)
def test_the_config_of_a_tokenizer_is_rewritten_for_both_versions(tmp_path, config, expected):
    """Entries that both versions read do not change."""
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(config | {"model_max_length": 7, "unk": "\u00e9"}), encoding="utf-8")
    make_tokenizer_portable(str(path))
    assert json.loads(path.read_text(encoding="utf-8")) == (config if expected is None else expected) | {
        "model_max_length": 7,
        "unk": "\u00e9",
    }


@pytest.mark.parametrize(
    "foreign",
    [
        "modeling_of_the_past.MossVLModel",
        "modeling_moss_vl.OfThePast",
        "a.b.C",
        "C",
        "hub/x--modeling_moss_vl.C",
        None,
    ],
)
def test_unknown_classes_in_auto_map_are_replaced(tmp_path, foreign, capsys):
    """The file, the class in it, or the form of the name may be unknown."""
    installer = install_into
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in (
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
    ):
        shutil.copyfile(ROOT / name, folder / name)
    config = json.loads((folder / "config.json").read_text())
    ours = dict(config["auto_map"])
    config["auto_map"]["AutoModel"] = foreign
    (folder / "config.json").write_text(json.dumps(config))
    assert installer.main([str(folder), "--no-check"]) == 0, capsys.readouterr().err
    assert json.loads((folder / "config.json").read_text())["auto_map"] == ours
