"""Libraries around the model: they load it twice, batch it and run its parts."""

import re
import shutil
import sys

import pytest
import torch
import transformers
from conftest import ROOT
from PIL import Image
from tiny import assorted_samples, make_model
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, pipeline

from moss_vl.tools import install_into


NANO = ROOT / "checkpoints/moss-vl-nano"
TRANSFORMERS_4 = transformers.__version__.startswith("4.")


# Two folders of one name


@pytest.fixture
def folder_named_alike(tmp_path):
    """Copies the small checkpoint to folders of one name, each with one change to its code."""

    def make(parent, file=None, old=None, new=None):
        folder = shutil.copytree(NANO, tmp_path / parent / "moss-vl-of-one-name", symlinks=False)
        if file is not None:
            text = (folder / file).read_text()
            assert old in text
            (folder / file).write_text(text.replace(old, new, 1))
        return folder

    return make


def loaded_code(folder):
    """The modules of model and processor, as the Auto classes load them."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    return sys.modules[type(model).__module__], sys.modules[type(processor).__module__]


def test_two_folders_of_one_name_have_separate_code(folder_named_alike):
    """Their configs are the same; the second load must not be given the classes of the first."""
    first = folder_named_alike("first")
    second = folder_named_alike("second", "modeling_moss_vl.py", "IGNORED = -100", "IGNORED = -101")
    third = folder_named_alike(
        "third", "processing_moss_vl.py", "class MossVLProcessor(", "CHANGED = True\n\n\nclass MossVLProcessor("
    )
    assert loaded_code(first)[0].IGNORED == -100
    assert loaded_code(second)[0].IGNORED == -101
    model, processor = loaded_code(third)
    assert model.IGNORED == -100 and processor.CHANGED
    assert loaded_code(first)[0].IGNORED == -100


@pytest.mark.skipif(
    TRANSFORMERS_4, reason="transformers 4 reads what an entry file imports once for all folders of a name"
)
def test_a_change_to_any_file_makes_another_model(folder_named_alike):
    loaded_code(folder_named_alike("first"))
    model, _ = loaded_code(
        folder_named_alike("second", "xrope.py", "import torch\n", "import torch\n\nCHANGED = True\n")
    )
    assert sys.modules[model.rotate.__module__].CHANGED


def test_the_config_names_every_code_file():
    """By these lines transformers distinguishes the code of two folders, and transformers 4 copies the files."""
    text = (ROOT / "configuration_moss_vl.py").read_text()
    named = {f"{name}.py" for name in re.findall(r"^    from \.(\w+) import", text, flags=re.MULTILINE)}
    assert named | {"configuration_moss_vl.py"} == set(install_into.code_files())


# Continuous batching


@pytest.mark.parametrize(
    "method", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"]
)
def test_continuous_batching_is_refused_before_it_starts(method):
    model = make_model()
    with pytest.raises(ValueError, match="Continuous batching .* expected `generate`"):
        getattr(model, method)([assorted_samples()[0].ids.tolist()])
    assert model.config._attn_implementation == "sdpa"


# pipeline("text-generation"), which has a tokenizer and no processor


@pytest.fixture(scope="module")
def text_pipeline():
    return pipeline("text-generation", model=str(NANO), trust_remote_code=True)


def asked(*parts):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What color is the star?"}]}]


def test_a_text_pipeline_answers_texts_as_the_model_does(text_pipeline):
    tokenizer, model = text_pipeline.tokenizer, text_pipeline.model
    for chat in (asked(), [{"role": "user", "content": "Say yes."}]):
        found = text_pipeline(chat, max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        written = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert found == tokenizer.decode(written, skip_special_tokens=True)
    assert text_pipeline("A star is", max_new_tokens=3)[0]["generated_text"].startswith("A star is")


@pytest.mark.parametrize("prompt", [
    asked({"type": "image", "image": str(ROOT / "data/example_image.jpg")}),
    asked({"type": "image"}),
    asked({"type": "video", "video": str(ROOT / "data/example_video.mp4")}),
    [{"role": "system", "content": "S"}, *asked({"type": "image_url", "image_url": {"url": "https://there/a.png"}})],
    [{"role": "user", "content": "<|image|>What color is the star?"}],
    "<|image|>What color is the star?",
    "Look: <|video|>(<|video|>)",
    "<|image_pad|>What color?",
    [asked({"type": "image"}), asked()],
], ids=range(9))  # fmt: skip
def test_a_text_pipeline_refuses_media_instead_of_guessing(text_pipeline, prompt, monkeypatch):
    monkeypatch.setattr(text_pipeline.model, "generate", None)
    with pytest.raises(
        ValueError, match=r"got (a content part of type|the placeholder) .*; expected text alone.*image-text-to-text"
    ):
        text_pipeline(prompt, max_new_tokens=2)


def test_a_pipeline_is_made_more_than_once_and_leaves_no_trace_in_the_config(text_pipeline, tmp_path):
    again = pipeline("text-generation", model=str(NANO), trust_remote_code=True)
    assert type(again).__name__ == type(text_pipeline).__name__ == "MossVLTextGenerationPipeline"
    again.model.config.save_pretrained(tmp_path)
    assert "custom_pipelines" not in (tmp_path / "config.json").read_text()
    assert (tmp_path / "pipeline_moss_vl.py").is_file(), "the code is copied too"


# Text joined after the processor, as TRL does for SFT with prompt and completion, DPO, KTO and GRPO


@pytest.mark.parametrize("grid_name", ["grid_thw", "image_grid_thw"])
def test_prompts_and_completions_joined_after_the_processor_equal_each_sample_alone(grid_name):
    """Prompts padded left, completions right, then both moved to the left; the model without its head is called, and
    the head's weights by hand."""
    settings = {"return_cross_attention_mask": False, "grid_name": grid_name}
    processor = AutoProcessor.from_pretrained(NANO, trust_remote_code=True, **settings)
    model = AutoModelForCausalLM.from_pretrained(NANO, trust_remote_code=True, dtype=torch.float32).train()
    images = [
        Image.open(ROOT / f"data/{name}.jpg").resize(size)
        for name, size in (("example_image", (96, 64)), ("sample_a", (64, 96)))
    ]
    prompts, answers = (
        ["<|image|>What color is the star?", "<|image|>How many objects are there, please?"],
        [" It is a blue one.", " 3"],
    )
    asked = processor(
        text=prompts, images=[[image] for image in images], padding=True, padding_side="left", return_tensors="pt"
    )
    answered = processor.tokenizer(answers, padding=True, padding_side="right", return_tensors="pt")
    ids, mask = (torch.cat([asked[name], answered[name]], 1) for name in ("input_ids", "attention_mask"))
    is_answer = torch.cat([torch.zeros_like(asked["attention_mask"]), answered["attention_mask"]], 1)
    order = mask.argsort(dim=1, descending=True, stable=True)
    ids, mask, is_answer = (each.gather(1, order) for each in (ids, mask, is_answer))
    labels = ids.masked_fill(is_answer == 0, -100)
    media = {name: value for name, value in asked.items() if name not in ("input_ids", "attention_mask")}
    assert "cross_attention_mask" not in media and grid_name in media

    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False, **media).last_hidden_state
        found = cross_entropy((hidden @ model.lm_head.weight.T)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        total = count = 0
        for prompt, answer, image in zip(prompts, answers, images, strict=True):
            alone, answer = (
                processor(text=[prompt], images=[image], return_tensors="pt"),
                processor.tokenizer(answer)["input_ids"],
            )
            joined = torch.cat([alone["input_ids"], torch.tensor([answer])], 1)
            logits = model.eval()(joined, pixel_values=alone["pixel_values"], **{grid_name: alone[grid_name]}).logits
            total += cross_entropy(logits[0, -len(answer) - 1 : -1], torch.tensor(answer), reduction="sum")
            count += len(answer)
        assert torch.allclose(found, total / count, atol=1e-4)
        assert torch.allclose(model(ids, mask, labels=labels, use_cache=False, **media).loss, total / count, atol=1e-4)
