"""`use_template` of a query, with and without a chat template."""

import pytest
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoProcessor


NANO = ROOT / "checkpoints/moss-vl-nano"


@pytest.fixture(scope="module")
def loaded():
    return (
        AutoProcessor.from_pretrained(NANO, trust_remote_code=True),
        AutoModelForCausalLM.from_pretrained(NANO, trust_remote_code=True),
    )


@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize("use_template", [True, False, None])
def test_use_template_needs_a_chat_template(loaded, present, use_template):
    processor, model = loaded
    if not present:
        processor = AutoProcessor.from_pretrained(NANO, trust_remote_code=True)
        processor.chat_template = processor.tokenizer.chat_template = None
    query = {"prompt": "Say", "use_template": use_template, "generate_kwargs": {"max_new_tokens": 1}}
    if use_template and not present:
        with pytest.raises(ValueError, match="query 0: use_template=True, but the processor has no chat template"):
            model.offline_batch_generate(processor, [query])
        return
    [result] = model.offline_batch_generate(processor, [query])["results"]
    rendered = present if use_template is None else use_template
    assert result["input_text"] == ("<|im_start|>user\nSay<|im_end|>\n<|im_start|>assistant\n" if rendered else "Say")


@pytest.mark.parametrize("wrong", ["yes", 2, "", []], ids=repr)
def test_use_template_must_be_true_false_or_none(loaded, wrong):
    processor, model = loaded
    with pytest.raises(ValueError, match="use_template must be True, False or None"):
        model.offline_batch_generate(processor, [{"prompt": "Say", "use_template": wrong}])
