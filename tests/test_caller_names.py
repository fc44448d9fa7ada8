"""Names that servers and training software read and write on processors and configs, without the media."""

import json

import numpy as np
import pytest
from conftest import ROOT
from tiny import make_config
from transformers import AutoConfig

from moss_vl.configuration_moss_vl import MossVLConfig
from moss_vl.options import FIXED
from moss_vl.processing_moss_vl import MossVLProcessor


NANO = ROOT / "checkpoints/moss-vl-nano"


@pytest.fixture
def processor():
    return MossVLProcessor.from_pretrained(NANO)


# sizes


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_pixels": 30000, "min_pixels": 2000},
        {"size": {"longest_edge": 60000}, "merge_size": 1},
        {"multi_image_max_pixels": 52000},
        {"resized_height": 96, "resized_width": 200},
        {"patch_size": 8},
    ],
)
def test_patches_of_an_image_are_those_of_the_call(processor, options):
    for height, width in [(40, 900), (333, 247), (1000, 1000)]:
        image = np.zeros((height, width, 3), np.uint8)
        expected = len(processor.image_processor.preprocess(image, **options)["pixel_values"])
        assert processor.image_processor.get_number_of_image_patches(height, width, options) == expected
    with pytest.raises(ValueError, match="did you mean 'max_pixels'"):
        processor.image_processor.get_number_of_image_patches(64, 64, {"max_pixel": 5})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_pixels": 30000, "min_pixels": 2000},
        {"video_max_pixels": 160000},
        {"resized_height": 96, "resized_width": 64},
    ],
)
def test_patches_of_a_clip_are_those_of_the_call(processor, options):
    for frames, height, width in [(1, 40, 300), (3, 333, 247)]:
        video = list(np.zeros((frames, height, width, 3), np.uint8))
        called = processor.video_processor.preprocess([{"video": video, "fps": 1.0}], **options)
        patches = processor.video_processor.get_num_of_video_patches(frames, height, width, options)
        assert patches == len(called["pixel_values_videos"])


def test_text_tokens_are_counted_as_the_text_has_them(processor):
    sizes = {"image_sizes": [(333, 247), (64, 64)], "video_sizes": [(3, 120, 160)]}
    data = processor._get_num_multimodal_tokens(**sizes, max_pixels=30000, min_pixels=2000)
    images = [np.zeros((*size, 3), np.uint8) for size in sizes["image_sizes"]]
    videos = [{"video": list(np.zeros((3, 120, 160, 3), np.uint8)), "fps": 1.0}]
    called = processor(
        text=["<|image|>", "<|image|>", "<|video|>"],
        images=[[images[0]], [images[1]], []],
        videos=[[], [], videos],
        padding=True,
        max_pixels=30000,
        min_pixels=2000,
        return_tensors="pt",
    )
    frames = (called["input_ids"] == processor.image_token_id).sum(1).tolist()
    assert [*data["num_image_tokens"], *data["num_video_tokens"]] == frames == [1, 1, 3]
    assert data["num_image_patches"] == called["grid_thw"][:2].prod(1).tolist()
    assert "num_audio_tokens" not in data
    assert processor._get_num_multimodal_tokens(image_sizes=[(64, 64)]).num_video_tokens is None


# attributes of the processor


def test_special_tokens_are_those_of_the_tokenizer(processor, tmp_path):
    tokenizer = processor.tokenizer
    names = ("pad_token", "pad_token_id", "eos_token", "eos_token_id", "bos_token", "bos_token_id", "padding_side")
    assert [getattr(processor, name) for name in names] == [getattr(tokenizer, name) for name in names]
    assert (processor.pad_token_id, processor.padding_side) == (736, "right")
    processor.padding_side = "left"
    assert tokenizer.padding_side == "left"
    for name in names:  # as training software does
        setattr(processor, name, getattr(tokenizer, name))
    processor.pad_token = "<|im_end|>"
    assert tokenizer.pad_token_id == processor.pad_token_id == processor.eos_token_id
    processor.save_pretrained(tmp_path)
    for path in tmp_path.glob("*processor_config.json"):
        assert not {"pad_token", "padding_side"} & json.loads(path.read_text()).keys()
    again = MossVLProcessor.from_pretrained(tmp_path)
    assert (again.pad_token, again.eos_token) == ("<|im_end|>", "<|im_end|>")


def test_steps_that_are_always_done_can_be_read_but_not_changed(processor, tmp_path):
    for part in (processor.image_processor, processor.video_processor):
        assert (part.do_resize, part.do_rescale, part.do_normalize, part.resample) == (True, True, True, 3)
        assert {name: getattr(part, name) for name in FIXED if name != "data_format"}.items() <= FIXED.items()
        part.do_resize = True
        with pytest.raises(ValueError, match="do_resize is always True"):
            part.do_resize = False
        assert "do_resize" not in part.to_dict() and part.do_resize is True


# attributes of the config


def test_sizes_of_the_text_model_are_read_from_the_whole_config():
    config = make_config()
    text = config.get_text_config()
    assert text is config.text_config
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (200, 64, 6)
    config.vocab_size = 220
    assert text.vocab_size == 220
    with pytest.raises(ValueError, match="below vocab_size = 100"):
        config.vocab_size = 100
    with pytest.raises(ValueError, match="cross_attention_layers"):
        config.num_hidden_layers = 3
    assert (config.vocab_size, config.num_hidden_layers) == (220, 6)
    assert not {"vocab_size", "hidden_size", "num_hidden_layers"} & config.to_dict().keys()


def test_sizes_beside_the_text_config_must_agree_with_it():
    assert make_config(vocab_size=200).vocab_size == 200
    with pytest.raises(ValueError, match="`vocab_size`, got 300; expected `text_config.vocab_size` = 200"):
        make_config(vocab_size=300)


def test_a_size_is_overridden_on_loading():
    config = MossVLConfig.from_pretrained(NANO, vocab_size=800)
    assert config.text_config.vocab_size == 800
    config = AutoConfig.from_pretrained(NANO, trust_remote_code=True, vocab_size=800)
    assert config.get_text_config().vocab_size == 800


def test_ids_that_are_not_given_are_none():
    config = make_config(text={"pad_token_id": 3})
    assert (config.text_config.pad_token_id, config.text_config.eos_token_id) == (3, None)
    assert config.pad_token_id is config.bos_token_id is config.eos_token_id is None
    assert "pad_token_id" not in json.loads(config.to_json_string())
