"""The package as users load it: from a copied folder, by the Auto classes, saved and loaded in a new process."""

import json
import logging
import re
import shutil
import subprocess
import sys

import cross_version
import pytest
import torch
from conftest import GOLDEN, ROOT
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.utils import is_flash_attn_2_available

from moss_vl.tools import install_into
from moss_vl.training.nano import make_nano


NANO = ROOT / "checkpoints/moss-vl-nano"
CODE_FILES = install_into.code_files()
SETTINGS = ("config.json", "generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
QUESTION = "<|image|><|video|>What happens?"
MEDIA = {"images": str(ROOT / "data/example_image.jpg"), "videos": str(ROOT / "data/example_video.mp4")}


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """The small checkpoint with files in place of links, as after a download."""
    return shutil.copytree(NANO, tmp_path_factory.mktemp("copied") / "moss-vl-nano", symlinks=False)


@pytest.fixture(scope="module")
def loaded(copied):
    return cross_version.load_checkpoint(copied)


@pytest.fixture
def released(tmp_path):
    """The JSON files of a released checkpoint, which name no class for image-text-to-text, with a tokenizer and the
    code."""
    folder = tmp_path / "released"
    folder.mkdir()
    for name in (*SETTINGS, *CODE_FILES):
        shutil.copyfile(ROOT / name, folder / name)
    for path in (GOLDEN / "processing/tokenizer").iterdir():
        shutil.copyfile(path, folder / path.name)
    edit_config(folder, lambda config: config["auto_map"].pop("AutoModelForImageTextToText"))
    return folder


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText])
def test_auto_models_are_one_model(copied, loaded, auto_class):
    processor, model = loaded
    other = auto_class.from_pretrained(copied, trust_remote_code=True, dtype=torch.float32)
    assert type(other).__name__ == "MossVLForConditionalGeneration"
    inputs = processor(text=QUESTION, return_tensors="pt", **MEDIA)
    assert torch.equal(logits_of(other, inputs), logits_of(model, inputs))


def test_auto_classes_of_the_parts(copied):
    config = AutoConfig.from_pretrained(copied, trust_remote_code=True)
    assert (type(config).__name__, config.model_type, config.text_config.cross_attention_layers) == (
        "MossVLConfig",
        "moss_vl",
        [2, 6],
    )
    processor = AutoProcessor.from_pretrained(copied, trust_remote_code=True, frame_extract_num_threads=1)
    assert type(processor).__name__ == "MossVLProcessor"
    assert processor.image_token_id == config.image_token_id and processor.video_token_id == config.video_token_id
    assert type(processor.video_processor).__name__ == "MossVLVideoProcessor"
    assert type(AutoImageProcessor.from_pretrained(copied, trust_remote_code=True)).__name__.startswith(
        "MossVLImageProcessor"
    )
    assert AutoTokenizer.from_pretrained(copied, trust_remote_code=True).get_vocab() == processor.tokenizer.get_vocab()


@pytest.mark.parametrize("keyword", ["dtype", "torch_dtype"])
def test_both_spellings_of_dtype(copied, keyword):
    for dtype in (torch.bfloat16, torch.float32, "auto"):
        model = AutoModelForCausalLM.from_pretrained(copied, trust_remote_code=True, **{keyword: dtype})
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16 if dtype == "auto" else dtype}


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash-attn runs here, so nothing falls back")
def test_flash_attention_falls_back_with_one_warning(copied, caplog, monkeypatch):
    for name in ("transformers", "py.warnings"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    logging.Logger.warning_once.cache_clear()  # of earlier tests
    processor = AutoProcessor.from_pretrained(copied, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        copied,
        trust_remote_code=True,
        device_map="auto",
        torch_dtype=torch.bfloat16,
        attn_implementation="flash_attention_2",
    )
    for _ in range(2):
        assert model.offline_image_generate(
            processor, prompt="What color is the star?", image=MEDIA["images"], max_new_tokens=4
        )
    assert len([message for message in caplog.messages if "flash" in message]) == 1, caplog.messages


def test_saved_and_loaded_again_by_a_fresh_process(tmp_path):
    folder = tmp_path / "saved"
    cross_version.save(folder)
    for name in CODE_FILES:
        assert not (folder / name).is_symlink() and (folder / name).read_bytes() == (ROOT / name).read_bytes()
    done = subprocess.run(
        [sys.executable, cross_version.__file__, "load", str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_loading_keywords_are_not_saved(copied, tmp_path):
    processor = AutoProcessor.from_pretrained(copied, trust_remote_code=True, frame_extract_num_threads=1)
    assert processor.video_processor.num_extract_threads == 1
    processor.save_pretrained(tmp_path)
    assert "frame_extract_num_threads" not in (tmp_path / "tokenizer_config.json").read_text()
    again = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    ours, theirs = (each(text=QUESTION, return_tensors="pt", **MEDIA) for each in (processor, again))
    assert torch.equal(ours["input_ids"], theirs["input_ids"]) and torch.equal(
        ours["pixel_values"], theirs["pixel_values"]
    )


def test_generate_with_the_output_of_the_processor(loaded):
    processor, model = loaded
    inputs = processor(text=QUESTION, return_tensors="pt", **MEDIA)
    answer = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 5


# A released folder


def tensor_names():
    """The names in the 11B checkpoint."""
    layers = {
        f"model.language_model.layers.{n}.{part}.weight"
        for n in range(48)
        for part in ("input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }
    for n in range(48):
        attention = "cross_attn" if n % 4 == 2 else "self_attn"
        layers |= {
            f"model.language_model.layers.{n}.{attention}.{part}.weight"
            for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
        }
        if n % 4 == 2:
            layers |= {f"model.language_model.layers.{n}.cross_attn_{part}_gate" for part in ("attn", "mlp")}
    modules = {
        f"blocks.{n}.{part}"
        for n in range(27)
        for part in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2")
    }
    modules |= {f"merger.norms.{k}" for k in range(4)} | {"merger.linear_fc1", "merger.linear_fc2", "patch_embed.proj"}
    vision = {f"model.visual.{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    return (
        layers
        | vision
        | {
            "model.separator_token",
            "model.visual.pos_embed.weight",
            "model.language_model.embed_tokens.weight",
            "model.language_model.norm.weight",
            "lm_head.weight",
        }
    )


def test_released_folder_builds_processor_and_model(released):
    processor = AutoProcessor.from_pretrained(released, trust_remote_code=True)
    assert (
        processor.image_processor.multi_image_max_pixels == 201326592 and processor.video_processor.max_frames == 256
    )
    config = AutoConfig.from_pretrained(released, trust_remote_code=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert set(model.state_dict()) == tensor_names()
    assert len(model.state_dict()) == 895
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_336_371_208
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == tensor_shapes(tensor_names())


def tensor_shapes(names) -> dict[str, list[int]]:
    """The shapes in the table of docs/model.md; each name matches one row."""
    document = (ROOT / "docs/model.md").read_text(encoding="utf-8")
    shapes = {}
    for pattern, shape in re.findall(r"^\| `([^`]+)`.* \| (\[[\d, ]+\]) \|$", document, re.MULTILINE):
        pattern = re.sub(
            r"\{([^}]+)\}", lambda found: f"(?:{found[1].replace(',', '|')})", pattern.replace(".", r"\.")
        )
        pattern = re.sub(r"\b[NK]\b", r"\\d+", pattern)
        found = [name for name in names if re.fullmatch(pattern, name)]
        assert found and not shapes.keys() & set(found), pattern
        shapes |= dict.fromkeys(found, json.loads(shape))
    return shapes


def test_released_folder_with_small_sizes_answers(released):
    processor = AutoProcessor.from_pretrained(released, trust_remote_code=True)

    def shrink(config):
        config["text_config"].update(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=128,
            cross_attention_layers=[1, 3],
            vocab_size=len(processor.tokenizer),
            bos_token_id=processor.tokenizer.pad_token_id,
            eos_token_id=processor.tokenizer.eos_token_id,
        )
        config["vision_config"].update(
            depth=3,
            hidden_size=32,
            intermediate_size=64,
            num_heads=2,
            out_hidden_size=64,
            deepstack_visual_indexes=[0, 1],
            num_position_embeddings=16,
        )
        config.update(
            image_token_id=processor.image_token_id,
            video_token_id=processor.video_token_id,
            vision_start_token_id=processor.vision_start_token_id,
            vision_end_token_id=processor.vision_end_token_id,
        )

    edit_config(released, shrink)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(released, trust_remote_code=True)
    AutoModelForCausalLM.from_config(config, trust_remote_code=True).save_pretrained(released)
    model = AutoModelForCausalLM.from_pretrained(released, trust_remote_code=True, dtype=torch.float32)
    inputs = processor(text=QUESTION, return_tensors="pt", **MEDIA)
    answer = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 4


# The small checkpoint in the repository


def test_checkpoint_holds_no_second_copy_of_the_code():
    python_files = sorted(path.name for path in NANO.glob("*.py"))
    assert python_files == sorted(CODE_FILES)
    assert all((NANO / name).resolve() == ROOT / name for name in python_files)


def test_checkpoint_is_small_and_bf16():
    assert (NANO / "model.safetensors").stat().st_size < 40_000_000
    with safe_open(NANO / "model.safetensors", framework="pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}


def test_script_makes_the_committed_checkpoint(tmp_path, monkeypatch):
    arguments = ["make_nano.py", "--output", str(tmp_path), "--weights", str(NANO / "model.safetensors")]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setenv("HF_MODULES_CACHE", "")  # restored after the test; the script sets it
    make_nano.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        path.name for path in NANO.iterdir() if path.is_file()
    )
    for path in tmp_path.iterdir():
        if path.suffix == ".safetensors":
            made, kept = load_file(path), load_file(NANO / path.name)
            assert made.keys() == kept.keys() and all(torch.equal(made[name], kept[name]) for name in made)
        else:
            assert path.read_text(encoding="utf-8") == (NANO / path.name).read_text(encoding="utf-8"), path.name


def test_tokenizer():
    """Ids and offsets as literal rows, the same with both versions of transformers."""
    tokenizer = AutoTokenizer.from_pretrained(NANO, trust_remote_code=True)
    special = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
        "<|time_start|>",
        "<|time_end|>",
        "<|silence|>",
        "<|response|>",
    ]
    assert tokenizer.convert_tokens_to_ids(special) == list(range(736, 747)) and len(tokenizer) == 747
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<|endoftext|>", "<|im_end|>", None)
    text = '<|time_start|>12.5 seconds<|time_end|><|image_pad|>a red star, "K7" \U0001f642'
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert list(encoded) == ["input_ids", "attention_mask", "offset_mapping"]
    assert tokenizer.convert_ids_to_tokens(encoded["input_ids"])[:11] == [
        "<|time_start|>",
        "1",
        "2",
        ".",
        "5",
        "\u0120seconds",
        "<|time_end|>",
        "<|image_pad|>",
        "a",
        "\u0120red",
        "\u0120star",
    ]
    assert encoded["offset_mapping"][:11] == [
        (0, 14),
        (14, 15),
        (15, 16),
        (16, 17),
        (17, 18),
        (18, 26),
        (26, 38),
        (38, 51),
        (51, 52),
        (52, 56),
        (56, 61),
    ]
    assert tokenizer.decode(encoded["input_ids"]) == text
    assert (
        tokenizer.decode(encoded["input_ids"], skip_special_tokens=True) == '12.5 secondsa red star, "K7" \U0001f642'
    )


def test_chat_template(loaded):
    processor, _ = loaded
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "What happens?"}]},
        {"role": "assistant", "content": "A"},
    ]
    text = (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n<|image|><|video|>What happens?<|im_end|>\n"
        "<|im_start|>assistant\nA<|im_end|>\n"
    )
    assert processor.apply_chat_template(messages, tokenize=False) == text
    assert (
        processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        == text + "<|im_start|>assistant\n"
    )
    with pytest.raises(ValueError, match="audio"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "audio"}]}], tokenize=False)
