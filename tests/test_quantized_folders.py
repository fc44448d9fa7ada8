"""Folders in the layouts of released quantized checkpoints load as they are, and compute what their dequantized
weights compute. The packages are in requirements-quantize.txt; without them the tests are skipped."""

import copy
import logging

import pytest
import quantized_layouts as layouts
import torch
import transformers
from realtime import make_processor, make_realtime_model, picture, run, stream
from safetensors.torch import load_file
from tiny import Sample, assorted_samples, make_model
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, QuantizedCache
from transformers.utils import is_hqq_available

from moss_vl import cache_layers, generation_hooks
from moss_vl.cache_layers import CACHE, cache_contents, new_cache


TRANSFORMERS_5 = transformers.__version__ >= "5"
REASON = "{} is not installed; see requirements-quantize.txt"
needs_hqq = pytest.mark.skipif(not is_hqq_available(), reason=REASON.format("hqq"))
PACKAGES = {"fp8": "compressed_tensors", "nf4": "bitsandbytes"}
MODULES = {"fp8": layouts.FP8_MODULES, "nf4": layouts.NF4_MODULES}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return layouts.write_plain(tmp_path_factory.mktemp("quantized") / "plain")


@pytest.fixture(scope="module", params=["fp8", "nf4"])
def layout(request):
    pytest.importorskip(PACKAGES[request.param], reason=REASON.format(PACKAGES[request.param]))
    return request.param


@pytest.fixture(scope="module")
def folder(layout, plain):
    return getattr(layouts, f"write_{layout}")(plain, plain.with_name(layout))


def load(folder, **arguments):
    arguments = {"dtype": torch.bfloat16, "trust_remote_code": True, **arguments}
    return AutoModelForCausalLM.from_pretrained(folder, **arguments)  # in evaluation mode


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.fixture(scope="module")
def reference(layout, folder, plain):
    """The model of the dequantized weights. FP8 quantizes the inputs of the layers as well, by a scale per token."""
    model = load(plain)
    model.load_state_dict(layouts.dequantized(folder))
    if layout == "fp8":
        for name in layouts.FP8_MODULES:
            model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: layouts.in_fp8(inputs[0]))
    return model


def logits_of(model, sample):
    with torch.no_grad():
        return model(**sample.inputs()).logits.float()


def error(got, expected) -> float:
    return float((got - expected).norm() / expected.norm())


def test_only_the_layouts_modules_are_quantized(layout, folder, plain):
    was, now = load_file(plain / "model.safetensors"), load_file(folder / "model.safetensors")
    quantized = {name.removesuffix(".weight") for name, tensor in was.items() if tensor.dtype != now[name].dtype}
    assert quantized == MODULES[layout]
    assert layouts.dequantized(folder).keys() == was.keys()


def test_all_weights_are_loaded(layout, folder):
    model, info = load(folder, output_loading_info=True)
    assert not any(info.values()), info
    quantized = {name for name, module in model.named_modules() if is_quantized(module)}
    assert quantized == MODULES[layout]


def is_quantized(module) -> bool:
    return isinstance(module, torch.nn.Linear) and module.weight.dtype in (torch.uint8, torch.float8_e4m3fn)


def test_logits_are_those_of_the_dequantized_weights(layout, model, reference, plain):
    unquantized = load(plain)
    for sample in assorted_samples():
        expected = logits_of(reference, sample)
        # FP8 is exact. bitsandbytes computes products in an order of its own, so bfloat16 rounds otherwise.
        assert error(logits_of(model, sample), expected) <= (0 if layout == "fp8" else 0.02)
        assert error(logits_of(unquantized, sample), expected) > 0.04  # the error of the format


def test_a_quantized_folder_is_saved_and_loaded(layout, folder, model, tmp_path):
    again = load(folder)  # a forward may decompress the weights of a model
    # transformers 5 cannot take back what it did to the names of NF4 tensors, and need not.
    names = {"save_original_format": False} if TRANSFORMERS_5 else {}
    again.save_pretrained(tmp_path / "again", **names)
    saved, first = load_file(tmp_path / "again/model.safetensors"), load_file(folder / "model.safetensors")
    assert saved.keys() == first.keys()
    sample = assorted_samples()[2]
    assert error(logits_of(load(tmp_path / "again"), sample), logits_of(model, sample)) < 1e-3


def test_generate_and_rows_of_a_quantized_model(model, reference):
    """A whole answer, and the tokens that a joint call adds to two caches."""
    samples = assorted_samples()[1:3]
    caches, tokens = [], []
    for sample in samples:
        got = model.generate(**sample.inputs(), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        assert got.sequences.shape[1] == len(sample.ids) + 4
        caches.append(got[CACHE] if CACHE in got else got.past_key_values)
        tokens.append(got.sequences[0, -1])
    alone = []
    for cache, token in zip(caches, tokens, strict=True):
        with torch.no_grad():
            alone.append(model(token[None, None], **{CACHE: model.fork_cache(cache)}).logits[0, -1])
    joint = model.decode_rows(torch.stack(tokens)[:, None], caches)
    assert error(joint.float(), torch.stack(alone).float()) < 0.02


# Hooks


def test_hooks_that_make_plain_tuples_of_named_ones():
    """What compressed-tensors does to every module: arguments are copied, named tuples become plain ones, dataclasses
    are made anew."""

    def sent(value):
        if isinstance(value, (list, tuple)):
            return type(value)(map(sent, value)) if type(value) in (list, tuple) else tuple(map(sent, value))
        if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
            return type(value)(**{name: sent(getattr(value, name)) for name in value.__dataclass_fields__})
        return value

    def hook(module, args, kwargs):
        return sent(args), {name: sent(value) for name, value in kwargs.items()}

    model, plain = make_model(), make_model()
    for module in model.modules():
        module.register_forward_pre_hook(hook, with_kwargs=True)
    for sample in assorted_samples():
        assert torch.equal(logits_of(model, sample), logits_of(plain, sample))
    samples = assorted_samples()[1:4]
    prefixes = [[run(**one.inputs(), use_cache=True)[CACHE] for one in samples] for run in (model, plain)]
    tokens = torch.tensor([[5], [6], [7]])
    got, expected = (run.decode_rows(tokens, caches) for run, caches in zip((model, plain), prefixes, strict=True))
    assert torch.equal(got, expected)


# 8-bit caches


class Warnings(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


@pytest.fixture
def warned():
    """The warnings of the modules that make caches, each reported anew."""
    logging.Logger.warning_once.cache_clear()
    handler = Warnings()
    loggers = [cache_layers.logger, generation_hooks.logger]
    for logger in loggers:
        logger.addHandler(handler)
    yield handler.texts
    for logger in loggers:
        logger.removeHandler(handler)


GROUPED = {"num_key_value_heads": 4}  # 64 values per token, as hqq divides the keys into groups of 64


def plain_model():
    return make_model(text=GROUPED)


def eight_bit_model(**values):
    model = plain_model()
    for name, value in copy.deepcopy(layouts.KV8 | values).items():
        setattr(model.generation_config, name, value)
    return model


def answer(model, sample, **options):
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    return model.generate(**sample.inputs(), **options, return_dict_in_generate=True, output_logits=True)


@pytest.mark.parametrize("package", ["hqq", "optimum-quanto"])
def test_without_the_package_a_text_cache_is_plain_with_one_warning(package, warned, monkeypatch):
    backend = next(name for name, (found, _) in cache_layers.CACHE_PACKAGES.items() if found == package)
    monkeypatch.setitem(cache_layers.CACHE_PACKAGES, backend, (package, lambda: False))
    model, plain = eight_bit_model(cache_config={"backend": backend, "nbits": 4}), plain_model()
    sample = assorted_samples()[3]
    for _ in range(2):
        got, expected = answer(model, sample), answer(plain, sample)
        assert type(got.get(CACHE, got.get("past_key_values"))) is DynamicCache
        assert torch.equal(torch.cat(got.logits), torch.cat(expected.logits))
    assert type(new_cache(model.config.text_config, model.generation_config)) is DynamicCache
    [text] = warned
    assert f"pip install {package}" in text
    assert model.generation_config.cache_implementation == "quantized"  # the request stays in the file


def test_a_quantized_cache_that_the_call_asks_for_is_not_replaced(monkeypatch):
    monkeypatch.setitem(cache_layers.CACHE_PACKAGES, "hqq", ("hqq", lambda: False))
    monkeypatch.setattr("transformers.cache_utils.is_hqq_available", lambda: False)
    with pytest.raises(ImportError, match="(?i)hqq"):
        answer(plain_model(), assorted_samples()[1], **copy.deepcopy(layouts.KV8))


@needs_hqq
def test_the_caches_are_quantized_as_asked(warned):
    model, plain, sample = eight_bit_model(), plain_model(), assorted_samples()[3]
    got, expected = answer(model, sample), answer(plain, sample)
    cache = got.get(CACHE, got.get("past_key_values"))
    assert type(cache) is QuantizedCache and not warned
    for index, layer in enumerate(cache.layers):
        is_text = index not in model.config.text_config.cross_attention_layers
        assert type(layer).__name__ == ("HQQQuantizedLayer" if is_text else "Int8VisionLayer")
        if is_text:
            packed, meta = layer._quantized_keys
            assert (packed.dtype, meta["nbits"], meta["group_size"], meta["axis"]) == (torch.uint8, 8, 64, 0)
            assert layer.residual_length == 128
    assert 0 < error(torch.cat(got.logits), torch.cat(expected.logits)) < 0.02


@needs_hqq
def test_the_bytes_of_a_quantized_cache():
    sample = Sample("t" * 400)
    contents = []
    for model in (eight_bit_model(), plain_model()):
        with torch.no_grad():
            cache = new_cache(model.config.text_config, model.generation_config)
            model(**sample.inputs(), **{CACHE: cache})
        contents.append(cache_contents(cache, model.config.text_config))
    config = model.config.text_config
    values = 2 * 400 * config.num_key_value_heads * config.head_dim * 4  # of the 4 text layers
    assert contents[0].text_bytes == values + 2 * 2 * 4 * values // 2 // 64  # bytes; scale and zero of groups of 64
    assert contents[1].text_bytes > 4 * values - 1


@needs_hqq
@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2, "eos_token_id": 199}])
def test_beams_and_drafts_use_a_plain_cache(options, warned):
    model, plain, sample = eight_bit_model(), plain_model(), assorted_samples()[2]
    got, expected = answer(model, sample, **options), answer(plain, sample, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert len(warned) == 1


@needs_hqq
def test_a_given_cache_is_used():
    model, sample = eight_bit_model(), assorted_samples()[1]
    cache = DynamicCache()
    got = answer(model, sample, **{CACHE: cache})
    assert got.get(CACHE, got.get("past_key_values")) is cache
    assert torch.equal(torch.cat(got.logits), torch.cat(answer(plain_model(), sample).logits))


@needs_hqq
def test_rows_of_quantized_caches_are_computed_together():
    model = eight_bit_model()
    caches = []
    for sample in assorted_samples()[1:4]:
        cache = new_cache(model.config.text_config, model.generation_config)
        with torch.no_grad():
            model(**sample.inputs(), **{CACHE: cache})
        caches.append(cache)
    tokens = torch.tensor([[5], [6], [7]])
    with torch.no_grad():
        alone = [
            model(token[None], **{CACHE: model.fork_cache(cache)}).logits[0, -1]
            for token, cache in zip(tokens, caches, strict=True)
        ]
    joint = model.decode_rows(tokens, caches)
    assert error(joint, torch.stack(alone)) < 1e-5


@needs_hqq
def test_realtime_streams_quantize_the_text():
    """The opening and the first frames are quantized, later tokens are not yet."""
    processor = make_processor()
    caches, logits = [], []
    for is_quantized in (True, False):
        model = make_realtime_model(processor, **GROUPED)
        if is_quantized:
            for name, value in copy.deepcopy(layouts.KV8).items():
                setattr(model.generation_config, name, value)
        made, script = stream(model, processor, window_frames=2)
        for second in range(3):
            made.push_frame(picture(second), second)
            run(made)
        caches.append(made.cache)
        logits.append(torch.stack([row for _, row in script.seen]))
    assert [type(cache) for cache in caches] == [QuantizedCache, DynamicCache]
    assert logits[0].shape == logits[1].shape
    assert 0 < error(*logits) < 0.02
