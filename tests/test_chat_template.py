"""Conversations through the chat template, and loading and saving of the processor."""

import base64
import copy
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT
from golden_cases import (
    CLIP,
    FOLDER,
    NAMES,
    PHOTO,
    SHORT,
    SQUARE,
    Case,
    make_processor,
)
from PIL import Image
from processor_kit import CHATML, processor, same, shared  # noqa: F401
from transformers import AutoTokenizer

from moss_vl.processing_moss_vl import MossVLProcessor


# conversations


def test_chat_template_renders_placeholders(processor):
    messages = [
        {"role": "system", "content": "Be short."},
        {
            "role": "user",
            "content": [{"type": "image", "image": "a.png"}, {"type": "video"}, {"type": "text", "text": "Why?"}],
        },
        {"role": "assistant", "content": "So."},
    ]
    given = copy.deepcopy(messages)
    start = (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n<|image|><|video|>Why?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert processor.apply_chat_template(messages) == start + "So.<|im_end|>\n"
    assert processor.apply_chat_template(messages[:2], add_generation_prompt=True) == start
    assert processor.apply_chat_template(messages, continue_final_message=True) == start + "So."
    assert processor.apply_chat_template([messages[:2], messages[2:]])[1] == "<|im_start|>assistant\nSo.<|im_end|>\n"
    assert messages == given


def test_segments_in_a_conversation(processor):
    video = {"video_path": str(CLIP), "segments": [[0, 2], [3]]}
    messages = [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": "x"}]}]
    assert processor.apply_chat_template(messages).count("<|video|>") == 2
    assert processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")["grid_thw"][
        :, 0
    ].tolist() == [2, 1]


def test_media_of_a_conversation_are_processed(processor):
    url = "data:image/png;base64," + base64.b64encode(PHOTO.read_bytes()).decode()
    parts = [
        [{"type": "image", "image": str(PHOTO)}, {"type": "video", "video": str(SHORT)}],
        [{"type": "image_url", "image_url": {"url": url}}, {"type": "video_url", "video_url": str(SHORT)}],
        [{"type": "image", "url": PHOTO.as_uri()}, {"type": "video", "path": SHORT}],
        [{"type": "image", "image": Image.open(PHOTO)}, {"type": "video", "video": SHORT.read_bytes()}],
    ]
    options = {
        "add_generation_prompt": True,
        "tokenize": True,
        "return_dict": True,
        "return_tensors": "pt",
        "max_pixels": 65536,
    }
    conversations = [[{"role": "user", "content": [*own, {"type": "text", "text": "Why?"}]}] for own in parts]
    text = "<|im_start|>user\n<|image|><|video|>Why?<|im_end|>\n<|im_start|>assistant\n"
    expected = processor(text, PHOTO, SHORT, return_tensors="pt", max_pixels=65536)
    for conversation in conversations:
        assert same(processor.apply_chat_template(conversation, **options), expected)
    batch = processor.apply_chat_template(conversations, padding=True, **options)
    assert batch["media_nums_per_sample"] == [2] * 4 and torch.equal(
        batch["input_ids"], expected["input_ids"].expand(4, -1)
    )
    bare = [{"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "Why?"}]}]
    assert same(processor.apply_chat_template(bare, images=PHOTO, videos=SHORT, **options), expected)
    processor_kwargs = {"images": [PHOTO], "videos": [SHORT]}
    ids = processor.apply_chat_template(
        bare, add_generation_prompt=True, tokenize=True, processor_kwargs=processor_kwargs
    )
    assert ids == expected["input_ids"].tolist()


def test_assistant_mask(processor):
    answer = "{% generation %}{{ m.content }}{% endgeneration %}"
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        + answer
        + "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    )
    messages = [{"role": "user", "content": "<|image|>Describe"}, {"role": "assistant", "content": "A cat."}]
    out = processor.apply_chat_template(
        messages,
        template,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        images=SQUARE,
        return_assistant_tokens_mask=True,
    )
    assert processor.decode(out["input_ids"][out["assistant_masks"] == 1]).strip() == "A cat." and "labels" not in out


@pytest.mark.parametrize(
    "conversation, options, message",
    [
        ([], {}, "a conversation is a list"),
        (["hello"], {}, "a conversation is a list"),
        ([{"content": "x"}], {}, "a conversation is a list"),
        ([{"role": "user", "content": 3}], {}, "must be a string or a list"),
        ([{"role": "user", "content": [3]}], {}, "a part of a message"),
        ([{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}], {}, "a part of a message"),
        ([{"role": "user", "content": [{"type": "text"}]}], {}, "a part of a message"),
        ([{"role": "user", "content": "x"}], {"padding": True}, "tokenize=True"),
        ([{"role": "user", "content": "x"}], {"add_generation_promt": True}, "did you mean 'add_generation_prompt'"),
        ([{"role": "user", "content": "x"}], {"max_pixel": 3}, "did you mean 'max_pixels'"),
        ([{"role": "user", "content": [{"type": "image"}]}], {"tokenize": True}, "1 <.image.> placeholders, but 0"),
        (
            [{"role": "user", "content": [{"type": "image", "image": str(PHOTO)}]}],
            {"tokenize": True, "images": [PHOTO]},
            "given twice",
        ),
    ],
)
def test_bad_conversations(processor, conversation, options, message):
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(conversation, **options)


def test_no_template():
    with pytest.raises(ValueError, match="no chat template"):
        make_processor().apply_chat_template([{"role": "user", "content": "x"}])


# loading and saving


@pytest.fixture
def released(tmp_path):
    folder = tmp_path / "released"
    shutil.copytree(FOLDER / "tokenizer", folder)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_files_that_may_hold_the_chat_template(released, place):
    if place.endswith("jinja"):
        (released / place).write_text(CHATML)
    else:
        content = json.loads((released / place).read_text()) if (released / place).exists() else {}
        (released / place).write_text(json.dumps({**content, "chat_template": CHATML}))
    processor = MossVLProcessor.from_pretrained(released)
    assert processor.apply_chat_template([{"role": "user", "content": "x"}]) == "<|im_start|>user\nx<|im_end|>\n"
    processor.save_pretrained(released / "again")
    assert MossVLProcessor.from_pretrained(released / "again").chat_template == CHATML


def test_keywords_of_from_pretrained(released):
    processor = MossVLProcessor.from_pretrained(
        released, frame_extract_num_threads=1, max_pixels=65536, video_fps=2, padding_side="left"
    )
    assert (processor.video_processor.num_extract_threads, processor.video_processor.video_fps) == (1, 2)
    assert processor.image_processor.max_pixels == processor.video_processor.max_pixels == 65536
    assert processor.tokenizer.padding_side == "left"
    processor.save_pretrained(released / "again")
    again = MossVLProcessor.from_pretrained(released / "again")
    assert again.video_processor.to_dict()["num_extract_threads"] == 1 and again.image_processor.max_pixels == 65536
    saved = json.loads((released / "again" / "tokenizer_config.json").read_text())
    assert not {"frame_extract_num_threads", "num_extract_threads", "max_pixels", "video_fps"} & saved.keys()
    assert saved["tokenizer_class"] == "Qwen2Tokenizer" and not isinstance(saved.get("extra_special_tokens"), list)
    with pytest.raises(ValueError, match="did you mean 'max_pixels'"):
        MossVLProcessor.from_pretrained(released, max_pixel=3)


def test_saved_with_its_code(released):
    MossVLProcessor.from_pretrained(released).save_pretrained(released / "again")
    for name in ("processing_moss_vl.py", "image_processing_moss_vl.py", "video_processing_moss_vl.py"):
        assert (released / "again" / name).read_bytes() == (ROOT / name).read_bytes()


def test_a_tokenizer_that_transformers_5_saved_alone(released):
    """Its config names a class, or has a list, that 4.57 does not know."""
    path = released / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.update(tokenizer_class="TokenizersBackend", extra_special_tokens=config.pop("additional_special_tokens"))
    config.pop("added_tokens_decoder")
    path.write_text(json.dumps(config))
    (released / "special_tokens_map.json").unlink()
    processor = MossVLProcessor.from_pretrained(released)
    case = Case("05_batch_right_pad")
    out = processor(case.text, case.images, case.videos, padding=True, return_tensors="np")
    assert np.array_equal(out["input_ids"], case.arrays["input_ids"])
    processor.save_pretrained(released / "again")
    assert (
        json.loads((released / "again" / "tokenizer_config.json").read_text())["tokenizer_class"] == "Qwen2Tokenizer"
    )
    assert AutoTokenizer.from_pretrained(released / "again")("<|image_pad|>")["input_ids"] == [412]


def test_golden_folder_is_found():
    assert len(NAMES) >= 10 and GOLDEN.is_dir()
