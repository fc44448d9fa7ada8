"""What SGLang 0.5.23 reads of a checkpoint with our files: names, shapes and values. SGLang has a model and positions
of its own, so that a change here would break it without an error here. docs/serving.md says what was run with it."""

import copy

import pytest
import torch
from conftest import ROOT
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, BaseImageProcessor

from moss_vl.configuration_moss_vl import MossVLConfig


NANO = ROOT / "checkpoints/moss-vl-nano"
PICTURE = ROOT / "data/sample_a.jpg"
CLIP = str(ROOT / "data/sample_b.mp4")
TEXT_CONFIG = {
    "attention_bias": False,
    "cross_attention_layers": [2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 262144,
    "num_attention_heads": 32,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_theta": 5000000,
    "vocab_size": 151936,
}
VISION_CONFIG = {
    "deepstack_visual_indexes": [8, 16, 24],
    "depth": 27,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "in_channels": 3,
    "intermediate_size": 4304,
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "out_hidden_size": 4096,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
}
ROPE_SCALING = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(NANO, trust_remote_code=True)


def call(processor, text, images=None, videos=None, **options):
    """A call as SGLang makes it: one text, and media only if there are some."""
    media = {name: value for name, value in (("images", images), ("videos", videos)) if value}
    return processor(text=[text], padding=True, return_tensors="pt", **media, **options)


# the configuration


def test_the_attributes_of_the_configuration():
    config = MossVLConfig.from_json_file(ROOT / "config.json")
    assert config.model_type == "moss_vl" and config.architectures == ["MossVLForConditionalGeneration"]
    assert config.image_token_id == 151655
    for part, expected in ((config.text_config, TEXT_CONFIG), (config.vision_config, VISION_CONFIG)):
        assert {name: getattr(part, name) for name in expected} == expected
    assert config.text_config.rope_scaling.items() >= ROPE_SCALING.items()


def test_the_attributes_of_a_loaded_configuration():
    config = AutoConfig.from_pretrained(NANO, trust_remote_code=True)
    for part, names in ((config.text_config, TEXT_CONFIG), (config.vision_config, VISION_CONFIG)):
        assert [name for name in names if getattr(part, name, None) is None] == []
    assert config.text_config.rope_scaling.keys() >= ROPE_SCALING.keys()


def test_the_names_of_the_weights():
    """SGLang renames the parts before these names, and joins projections of the text's self-attention and MLP."""
    model = AutoModelForCausalLM.from_pretrained(NANO, trust_remote_code=True)
    names = list(model.state_dict())
    parts = ("lm_head.weight", "model.language_model.", "model.visual.", "model.separator_token")
    assert [name for name in names if not name.startswith(parts)] == []
    of_text = [name for name in names if ".layers." in name]
    joined = {part for name in of_text if ".cross_attn." not in name for part in name.split(".")}
    assert {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"} <= joined
    assert any(name.endswith("attn.qkv.weight") for name in names if ".visual." in name)
    crossed = {int(name.split(".layers.")[1].split(".")[0]) for name in of_text if ".cross_attn." in name}
    assert sorted(crossed) == model.config.text_config.cross_attention_layers


# prompts


def test_the_chat_template_gives_the_prompts_of_sglang(processor):
    """With a built-in template, which SGLang takes by the model's type, and with --chat-template of the folder."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A ring."},
        {"role": "user", "content": "Where?"},
    ]
    built_in = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|image|><|video|>What?<|im_end|>\n"
        "<|im_start|>assistant\nA ring.<|im_end|>\n<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"
    )
    template = (NANO / "chat_template.jinja").read_text().strip("\n").replace("\\n", "\n")  # as SGLang reads it
    for given in ({}, {"chat_template": template}):
        assert processor.apply_chat_template(messages, add_generation_prompt=True, **given) == built_in
    assert processor.tokenizer.encode("") == []  # else SGLang adds special tokens


# the processor


def test_the_outputs_for_images_and_videos(processor):
    text = "<|im_start|>user\n<|image|>and<|video|>What?<|im_end|>\n<|im_start|>assistant\n"
    out = call(processor, text, [Image.open(PICTURE)], [CLIP])
    ids, grid = out["input_ids"], out.get("grid_thw")
    assert ids.dtype == torch.long and ids.shape == out.get("attention_mask").shape == (1, ids.shape[1])
    assert grid.tolist() == [[1, 18, 14], [6, 16, 12]] and out.get("media_nums_per_sample") == [2]
    assert out.get("pixel_values").shape == (18 * 14 + 6 * 16 * 12, 3 * 16 * 16)
    assert out["pixel_values"].dtype == torch.float32 and out["pixel_values"].device.type == "cpu"
    is_frame = ids == AutoConfig.from_pretrained(NANO, trust_remote_code=True).image_token_id
    assert is_frame.sum() == grid[:, 0].sum() == 7  # as many frames as tokens for them
    mask = out.get("cross_attention_mask")
    assert mask.dtype == torch.bool and mask.shape == (1, 1, ids.shape[1], 7)  # True = hidden
    assert torch.equal((~mask).sum(-1)[0, 0], is_frame[0].cumsum(0))


def test_forms_of_videos(processor):
    whole = call(processor, "<|video|>What?", videos=[CLIP])
    assert whole["grid_thw"].tolist() == [[6, 16, 12]]
    segments = {"video_path": CLIP, "segments": [[0, 2], [3.0]]}
    out = call(processor, "<|video|><|video|>What?", videos=[segments])
    assert out["grid_thw"].tolist() == [[2, 16, 12], [1, 16, 12]] and out["media_nums_per_sample"] == [2]
    options = {"video_fps": 2, "max_frames": 3}  # of --mm-process-config
    fewer = call(processor, "<|video|>What?", videos=[CLIP], videos_kwargs=options)
    assert fewer["grid_thw"].tolist() == [[3, 16, 12]]


def test_texts_without_media(tmp_path):
    """SGLang expects a token for every frame, and a blank medium has none: the processor of the folder must leave it
    out."""
    AutoProcessor.from_pretrained(NANO, trust_remote_code=True, blank_medium=False).save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    out = call(loaded, "<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\n")
    absent = ("pixel_values", "grid_thw", "media_nums_per_sample", "cross_attention_mask")
    assert [out.get(name) for name in absent] == [None] * 4 and out["input_ids"].shape[0] == 1
    assert call(loaded, "<|image|>What?", [Image.open(PICTURE)])["media_nums_per_sample"] == [1]


def test_pixels_on_the_device_of_sglang(processor):
    """SGLang passes one for image processors of this class; the meta device stands for it."""
    assert isinstance(processor.image_processor, BaseImageProcessor)
    for media in ({"images": [Image.open(PICTURE)]}, {}):
        out = call(processor, "<|image|>What?" if media else "Hello.", **media, device="meta")
        assert out["pixel_values"].is_meta and not out["input_ids"].is_meta and not out["grid_thw"].is_meta


def test_workers_clone_the_processor(processor):
    clone = copy.deepcopy(processor)
    assert torch.equal(
        *(call(one, "<|image|>What?", [Image.open(PICTURE)])["pixel_values"] for one in (processor, clone))
    )
