"""Devices and dtypes of the weights: splits, offload, dtypes, and flash-attention that cannot run."""

import logging

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from tiny import assorted_samples, batch, make_model

from moss_vl.modeling_moss_vl import MossVLForConditionalGeneration


def answer(model):
    inputs = batch(assorted_samples(), "left")
    with torch.no_grad():
        logits = model(**inputs).logits[inputs["attention_mask"].bool()]
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    return logits, ids


@pytest.fixture
def saved(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path


SPLITS = {
    "language model on disk": {
        "model.visual": "cpu",
        "model.separator_token": "cpu",
        "model.language_model": "disk",
        "lm_head": "cpu",
    },
    "all but the head on disk": {"model": "disk", "lm_head": "cpu"},
    "vision on disk": {
        "model.visual": "disk",
        "model.separator_token": "cpu",
        "model.language_model": "cpu",
        "lm_head": "disk",
    },
    "layers alternate": {
        "model.visual": "cpu",
        "model.separator_token": "cpu",
        "lm_head": "cpu",
        **{f"model.language_model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(6)},
        "model.language_model.embed_tokens": "cpu",
        "model.language_model.norm": "disk",
    },
}


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_between_cpu_and_disk(saved, split):
    model, folder = saved
    loaded = MossVLForConditionalGeneration.from_pretrained(
        folder / "model", device_map=SPLITS[split], offload_folder=folder / "offload", dtype=torch.float32
    ).eval()
    assert any(parameter.device.type == "meta" for parameter in loaded.parameters())
    (logits, ids), (expected, expected_ids) = answer(loaded), answer(model)
    assert torch.equal(ids, expected_ids)
    assert torch.allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_every_parameter_offloaded(saved, kind):
    model, folder = saved
    expected, expected_ids = answer(model)
    offloaded = MossVLForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32).eval()
    if kind == "cpu":
        cpu_offload(offloaded, execution_device="cpu")
    else:
        disk_offload(offloaded, folder / "offload", execution_device="cpu")
    assert all(parameter.device.type == "meta" for parameter in offloaded.parameters())
    logits, ids = answer(offloaded)
    assert torch.equal(ids, expected_ids) and torch.allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("share", [1.5, 0.6, 0.4])
def test_device_map_auto(saved, share):
    """All weights fit, or the rest is on disk."""
    model, folder = saved
    max_memory = {"cpu": int(share * sum(4 * parameter.numel() for parameter in model.parameters()))}
    loaded = MossVLForConditionalGeneration.from_pretrained(
        folder / "model",
        device_map="auto",
        max_memory=max_memory,
        offload_folder=folder / "offload",
        dtype=torch.float32,
    )
    assert (share < 1) == any(parameter.device.type == "meta" for parameter in loaded.parameters())
    assert torch.equal(answer(loaded.eval())[1], answer(model)[1])


def test_flash_attention_falls_back_with_one_warning(saved, caplog):
    if torch.cuda.is_available():
        pytest.skip("flash-attention may run here")
    model, folder = saved
    library = (
        logging.getLogger("transformers_modules"),
        logging.getLogger("moss_vl"),
        logging.getLogger("transformers"),
    )
    for logger in library:
        logger.propagate = True
    from moss_vl.pretrained_model import logger as ours

    ours.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        flash = MossVLForConditionalGeneration.from_pretrained(
            folder / "model", attn_implementation="flash_attention_2", dtype=torch.float32
        ).eval()
        logits, ids = answer(flash)
        answer(flash)
    warnings = [record.getMessage() for record in caplog.records if "sdpa" in record.getMessage()]
    assert len(warnings) == 1 and "flash_attention_2" in warnings[0], warnings
    expected, expected_ids = answer(model)
    assert torch.equal(ids, expected_ids) and torch.allclose(logits, expected, atol=1e-5)


def test_attention_can_be_changed_after_construction():
    model = make_model("sdpa")
    expected = answer(model)[0]
    for name in ("eager", "flash_attention_2", "sdpa"):
        model.set_attn_implementation(name)
        assert torch.allclose(answer(model)[0], expected, atol=1e-4), name
    assert model.config.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_parameters_have_the_requested_dtype(saved, dtype):
    _, folder = saved
    for name in ("dtype", "torch_dtype"):
        model = MossVLForConditionalGeneration.from_pretrained(folder / "model", **{name: dtype})
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert model(**assorted_samples()[3].inputs()).logits.dtype == dtype


@pytest.mark.parametrize("where", ["top", "text"])
def test_tied_embeddings_survive_saving(tmp_path, where):
    config = {"tie_word_embeddings": True} if where == "top" else {"text": {"tie_word_embeddings": True}}
    model = make_model(**config)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = MossVLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(answer(loaded)[0], answer(model)[0])


def test_a_new_vocabulary_size():
    model = make_model()
    expected = answer(model)[0]
    model.resize_token_embeddings(230)
    assert model.config.text_config.vocab_size == 230
    assert torch.allclose(answer(model)[0][:, :200], expected, atol=1e-6)
