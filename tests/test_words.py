"""What is said, and what is not: counts at their limit, settings without effect, templates that are not there."""

import json
import logging

import pytest
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoProcessor

from moss_vl import infer
from moss_vl.training import finetune
from moss_vl.training.records import NAMED_RECORDS, read_records
from moss_vl.video_processing_moss_vl import MossVLVideoProcessor


NANO = ROOT / "checkpoints/moss-vl-nano"


@pytest.mark.parametrize("more", [0, 1])
def test_bad_records_are_counted_only_beyond_those_that_are_named(tmp_path, more):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"response": ""}) + "\n" for _ in range(NAMED_RECORDS + more)))
    with pytest.raises(ValueError) as error:
        read_records(path)
    words = str(error.value)
    assert words.startswith(f"{NAMED_RECORDS + more} of the {NAMED_RECORDS + more} records are bad:")
    assert (
        words.count(", record ") == NAMED_RECORDS
        and ("and 1 more" in words) == bool(more)
        and "and 0 more" not in words
    )


def test_a_setting_of_a_file_without_effect_is_said_and_left_out(caplog):
    """One warning each; what means something, also to transformers, says nothing; nor does a setting that is null."""
    logging.Logger.warning_once.cache_clear()
    settings = MossVLVideoProcessor(num_frames=5).to_dict()
    with caplog.at_level(logging.WARNING):
        made = MossVLVideoProcessor.from_dict(settings | {"do_pad": None})
        assert not [message for message in caplog.messages if "no effect" in message]
        made = MossVLVideoProcessor.from_dict(settings | {"made_up": 3, "other": "x"})
    assert made.num_frames == 5 and not hasattr(made, "made_up") and "made_up" not in made.to_dict()
    said = [message for message in caplog.messages if "no effect" in message]
    assert len(said) == 2 and "made_up=3" in said[0] and "other='x'" in said[1]


@pytest.fixture(scope="module")
def loaded():
    return (
        AutoProcessor.from_pretrained(NANO, trust_remote_code=True),
        AutoModelForCausalLM.from_pretrained(NANO, trust_remote_code=True),
    )


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("asked", [True, False, None])
def test_a_template_that_is_asked_for_has_to_be_there(loaded, there, asked):
    processor, model = loaded
    if not there:
        processor = AutoProcessor.from_pretrained(NANO, trust_remote_code=True)
        processor.chat_template = processor.tokenizer.chat_template = None
    query = {"prompt": "Say", "use_template": asked, "generate_kwargs": {"max_new_tokens": 1}}
    if asked and not there:
        with pytest.raises(ValueError, match="query 0: use_template=True, but the processor has no chat template"):
            model.offline_batch_generate(processor, [query])
        return
    [result] = model.offline_batch_generate(processor, [query])["results"]
    rendered = there if asked is None else asked
    assert result["input_text"] == ("<|im_start|>user\nSay<|im_end|>\n<|im_start|>assistant\n" if rendered else "Say")


@pytest.mark.parametrize("wrong", ["yes", 2, "", []], ids=repr)
def test_whether_to_use_a_template_is_yes_no_or_nothing(loaded, wrong):
    processor, model = loaded
    with pytest.raises(ValueError, match="use_template must be True, False or None"):
        model.offline_batch_generate(processor, [{"prompt": "Say", "use_template": wrong}])


ENDS = [
    (MemoryError(), 1, "out of memory; try"),
    (RuntimeError("CUDA out of memory. Tried to allocate"), 1, "out of memory; try"),
    (RuntimeError("shapes cannot be multiplied"), None, ""),
    (KeyboardInterrupt(), 130, "interrupted"),
]


@pytest.mark.parametrize("error, code, words", ENDS, ids=repr)
@pytest.mark.parametrize("program", ["infer", "finetune"])
def test_how_the_commands_end(program, error, code, words, monkeypatch, capsys):
    """Where memory runs out a line says what to try; any other failure inside keeps its traceback."""
    module, worker, arguments = {
        "infer": (infer, "answer_one", ["-p", "a"]),
        "finetune": (finetune, "finetune", ["--checkpoint", "c", "--data", "d", "--output", "o"]),
    }[program]

    def fail(args):
        raise error

    monkeypatch.setattr(module, worker, fail)
    if code is None:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            module.main(arguments)
        return
    assert module.main(arguments) == code
    err = capsys.readouterr().err
    assert f"{program}.py: {words}" in err and len(err.splitlines()) == 1
