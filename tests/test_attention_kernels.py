"""Attention kernels against eager: transformers' flash-attention code over kernels in plain PyTorch, functions of
users, names that are allowed, parts in several dtypes.
"""

import logging
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.hub_kernels as hub_kernels
import transformers.modeling_utils as modeling_utils
from conftest import ROOT
from flash_kernels import (
    IMPLEMENTATIONS,
    NAMES,
    FlashKernels,
    close,
    eager,
    install,
    kernels,  # noqa: F401
    logits,
    reset_glue,
    use,
)
from peft import LoraConfig, get_peft_model
from tiny import Sample, assorted_samples, batch, make_config, make_model
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from moss_vl import attention as attention_module
from moss_vl import modeling_moss_vl as modeling
from moss_vl.modeling_moss_vl import CACHE, MossVLForConditionalGeneration


CHECKPOINT = ROOT / "checkpoints" / "moss-vl-nano"


# Flash-attention


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_padded_rows(kernels, name, side):
    """Self-attention is unpadded and causal; vision and cross-attention are not causal."""
    inputs = batch(assorted_samples(), side)
    real = inputs["attention_mask"].bool()
    assert close(logits(use(make_model(), name), **inputs), logits(eager(), **inputs), real)
    text = [call for call in kernels.calls if call.lengths is not None]
    assert len(text) == 4 and all(call.causal and call.lengths[0] == real.sum(1).tolist() for call in text)
    others = [call for call in kernels.calls if call.lengths is None]
    assert others and not any(call.causal for call in others)
    assert {call.queries[3] for call in others} == {16}
    assert {call.queries[2] for call in others} == {2, 8}  # heads of vision, and of text


def test_rows_without_padding_are_causal(kernels):
    sample = assorted_samples()[3]
    model = use(make_model(), "flash_attention_2")
    full = logits(model, **sample.inputs())
    assert close(full, logits(eager(), **sample.inputs()))
    assert sum(call.causal for call in kernels.calls) == 4
    inputs = {**sample.inputs(), "attention_mask": None}
    assert torch.equal(logits(model, **inputs), full)


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_chunks_and_steps(kernels, side):
    """A prompt in chunks of any length, also of single tokens."""
    model = use(make_model(), "flash_attention_2")
    inputs = batch(assorted_samples(), "left" if side == "holes" else side)
    if side == "holes":
        inputs["attention_mask"][2, 6] = inputs["attention_mask"][0, 7:9] = 0
        inputs.pop("cross_attention_mask")
    real, length = inputs["attention_mask"].bool(), inputs["input_ids"].shape[1]
    expected = logits(eager(), **inputs)
    assert close(logits(model, **inputs), expected, real)
    for cuts in ([4, 5, 9], [1], [7, 8], [10]):
        of_text = ("input_ids", "attention_mask", "cross_attention_mask")
        media = {name: value for name, value in inputs.items() if name not in of_text}
        cache, outs = DynamicCache(), []
        for first, last in zip([0, *cuts], [*cuts, length], strict=True):
            chunk = {
                "input_ids": inputs["input_ids"][:, first:last],
                "attention_mask": inputs["attention_mask"][:, :last],
                **(media if first == 0 else {}),
            }
            outs.append(logits(model, **chunk, prompt_length=length, **{CACHE: cache}))
        assert close(torch.cat(outs, dim=1), expected, real), cuts
    # Chunks went to the kernel.
    assert any(call.lengths and call.lengths[0] != call.lengths[1] for call in kernels.calls)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_call_of_padding_alone(kernels, tokens):
    """The kernel accepts no call without queries."""
    model, samples = use(make_model(), "flash_attention_2"), [assorted_samples()[1], assorted_samples()[4]]
    inputs = batch(samples, "left")
    after = torch.tensor([[5, 6], [7, 8]])

    def last(model):
        cache, mask = DynamicCache(), F.pad(inputs["attention_mask"], (0, tokens))
        logits(model, **inputs, **{CACHE: cache})
        logits(model, input_ids=torch.zeros(2, tokens, dtype=torch.long), attention_mask=mask, **{CACHE: cache})
        return logits(model, input_ids=after, attention_mask=F.pad(mask, (0, 2), value=1), **{CACHE: cache})

    assert close(last(model), last(eager()))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_return_sequences": 2, "num_beams": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
)
def test_generate(kernels, options):
    inputs = batch(assorted_samples(), "left")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    assert torch.equal(
        use(make_model(), "flash_attention_2").generate(**inputs, **options), eager().generate(**inputs, **options)
    )
    assert kernels.calls


def test_a_step_of_padded_rows_does_not_copy_the_cache(kernels):
    """To unpad, transformers would copy the keys and values of the whole cache at each layer, and wait for the
    device."""
    model, inputs = use(make_model(), "flash_attention_2"), batch(assorted_samples(), "left")
    with torch.no_grad():
        cache = model(**inputs, use_cache=True)[CACHE]
        kernels.calls.clear()
        mask = F.pad(inputs["attention_mask"], (0, 1), value=1)
        model(input_ids=torch.ones(5, 1, dtype=torch.long), attention_mask=mask, **{CACHE: cache})
        assert kernels.calls and not any(call.lengths or call.causal for call in kernels.calls)


def test_a_static_cache_falls_back(kernels):
    """Empty slots need a mask. Vision and cross-attention use the kernel."""
    model, inputs = use(make_model(), "flash_attention_2"), batch(assorted_samples(), "left")
    caches = [StaticCache(config=model.config.text_config, max_cache_len=40) for _ in range(2)]
    got, expected = (logits(m, **inputs, **{CACHE: cache}) for m, cache in zip((model, eager()), caches, strict=True))
    assert close(got, expected, inputs["attention_mask"].bool())
    assert kernels.calls and not any(call.causal for call in kernels.calls)


def test_gradients(kernels):
    inputs = batch(assorted_samples(), "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    models = [use(make_model(), "flash_attention_2").train(), make_model("eager").train()]
    losses = [model(**inputs, labels=labels).loss for model in models]
    assert torch.allclose(*losses, atol=1e-5)
    for loss in losses:
        loss.backward()
    for (name, got), expected in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (got.grad - expected.grad).norm() <= 1e-4 * expected.grad.norm() + 1e-7, name


@pytest.mark.parametrize("autocast", [False, True])
def test_only_half_precision_reaches_the_kernel(monkeypatch, autocast):
    """Weights in bfloat16, or in float32 under autocast, also with norms that return float32."""
    kernels = install(monkeypatch, exact=False)
    inputs, model = batch(assorted_samples(), "left"), use(make_model(), "flash_attention_2")
    expected = logits(eager(), **inputs)
    model = model if autocast else model.bfloat16()
    real = inputs["attention_mask"].bool()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = logits(model, **inputs)
        model.train()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        with torch.no_grad():
            cache = model.eval()(**inputs, use_cache=True)[CACHE]
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert (
        {layer.keys.dtype for layer in cache.layers}
        == {layer.values.dtype for layer in cache.layers}
        == {torch.bfloat16}
    )
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 3
    assert sum(call.causal for call in kernels.calls) > 8
    assert (got[real].float() - expected[real]).norm() < 0.05 * expected[real].norm()  # 8 bits
    kernels.calls.clear()
    logits(model.float(), **inputs)
    assert not kernels.calls  # float32 falls back


def test_a_cpu_falls_back_under_autocast():
    inputs, model = batch(assorted_samples(), "left"), use(make_model(), "flash_attention_2")
    with torch.autocast("cpu", torch.bfloat16):
        assert logits(model, **inputs).isfinite().all()


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", NAMES[3]])
def test_attention_dropout(kernels, name):
    """Only version 2 has dropout; the others would ignore it."""
    model = use(make_model(text={"attention_dropout": 0.5}), name)
    inputs = batch(assorted_samples(), "left")
    kept = logits(model, **inputs)
    assert close(kept, logits(eager(), **inputs), inputs["attention_mask"].bool())
    # Without training every version is used.
    assert {call.dropout for call in kernels.calls if call.queries[-2] == 8} == {0}
    kernels.calls.clear()
    assert not close(logits(model.train(), **inputs), kept, atol=1e-2)
    of_text = [call for call in kernels.calls if call.queries[-2] == 8]
    assert {call.dropout for call in of_text} == ({0.5} if name == "flash_attention_2" else set())
    assert kernels.calls  # vision has no dropout


def test_weights_are_those_of_eager(kernels):
    inputs = batch(assorted_samples(), "left")
    got, expected = (
        model(**inputs, output_attentions=True) for model in (use(make_model(), "flash_attention_2"), eager())
    )
    assert not any(call.causal for call in kernels.calls)
    for name, layers in (("attentions", 4), ("cross_attentions", 2)):
        assert len(got[name]) == len(expected[name]) == layers and all(map(close, got[name], expected[name]))


@pytest.fixture
def hub(monkeypatch):
    """A `kernels` package that loads `hub.kernel` for every repository, and appends its name to `hub.loaded`."""
    hub = SimpleNamespace(kernel=None, loaded=[])
    monkeypatch.setattr(
        hub_kernels, "get_kernel", lambda name, **kwargs: hub.loaded.append(name) or hub.kernel, raising=False
    )
    for module, name in (
        (hub_kernels, "is_kernels_available"),
        (modeling_utils, "is_kernels_available"),
        (hub_kernels, "_kernels_available"),
    ):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, True if name[0] == "_" else lambda *args, **kwargs: True)
    for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        monkeypatch.setattr(type(registry), "_global_mapping", dict(registry._global_mapping))
    return hub


@pytest.mark.parametrize("name", ["someone/some-kernel", "flash_attention_2"])
def test_a_kernel_of_the_kernels_package(monkeypatch, hub, name):
    """By its name, or as a replacement of a flash-attn package that is not installed."""
    if name == "flash_attention_2" and is_flash_attn_2_available():
        pytest.skip("flash-attn is installed")
    reset_glue(monkeypatch)
    monkeypatch.setattr(attention_module, "flash_can_run", lambda device, dtype: True)
    hub.kernel = kernels = FlashKernels(exact=True)
    model, inputs = make_model(name), batch(assorted_samples(), "left")
    expected, real = logits(eager(), **inputs), inputs["attention_mask"].bool()
    assert close(logits(model, **inputs), expected, real)
    assert hub.loaded and sum(call.causal for call in kernels.calls) == 4
    for where in ("someone/some-kernel", {"text_config": "someone/some-kernel"}):
        model = make_model()
        kernels.calls.clear()
        model.set_attn_implementation(where)
        assert close(logits(model, **inputs), expected, real)
        assert sum(call.causal for call in kernels.calls) == 4
        assert any(call.queries[-2] == 2 for call in kernels.calls) == isinstance(where, str)  # vision


def test_a_kernel_with_another_function_is_refused(hub):
    hub.kernel = SimpleNamespace(attend=lambda *args, **kwargs: None, sparse_atten_func=None)
    with pytest.raises(ValueError, match="'someone/other:attend' cannot be used"):
        make_model("someone/other:attend")
    with pytest.raises(ValueError, match="'someone/unloaded' is not loaded"):
        logits(use(make_model(), "someone/unloaded"), **assorted_samples()[1].inputs())


# Names

REFUSED = [
    "paged|eager",
    "paged|sdpa",
    "paged|flash_attention_2",
    "sdpa_paged",
    "eager_paged",
    "paged_attention",
    "flex_attention",
    "flash",
    "sdap",
    "",
]


@pytest.mark.parametrize("name", REFUSED)
def test_names_with_another_contract_are_refused(name):
    inputs, model = assorted_samples()[1].inputs(), make_model()
    visual = model.model.visual
    visual.forward = lambda *args, **kwargs: pytest.fail("the refusal came after the vision encoder")

    def by_assignment(part, attribute):
        config = getattr(model.config, part)
        before = getattr(config, attribute)
        setattr(config, attribute, name)
        try:
            model(**inputs)
        finally:
            setattr(config, attribute, before)

    for attempt in (
        lambda: MossVLForConditionalGeneration._from_config(make_config(), attn_implementation=name),
        lambda: MossVLForConditionalGeneration._from_config(make_config(), attn_implementation={"text_config": name}),
        lambda: MossVLForConditionalGeneration._from_config(
            make_config(), attn_implementation={"vision_config": name}
        ),
        lambda: MossVLForConditionalGeneration._from_config(make_config(), cross_attention_implementation=name),
        lambda: MossVLForConditionalGeneration(make_config(attn_implementation=name)),
        lambda: AutoModelForCausalLM.from_pretrained(CHECKPOINT, trust_remote_code=True, attn_implementation=name),
        lambda: AutoModelForCausalLM.from_pretrained(
            CHECKPOINT, trust_remote_code=True, cross_attention_implementation=name
        ),
        lambda: model.set_attn_implementation(name),
        lambda: model.set_attn_implementation({"text_config": "eager", "vision_config": name}),
        lambda: model.set_attn_implementation("eager", cross_attention_implementation=name),
        lambda: by_assignment("text_config", "_attn_implementation"),
        lambda: by_assignment("text_config", "cross_attention_implementation"),
        lambda: by_assignment("vision_config", "_attn_implementation"),
    ):
        with pytest.raises(
            ValueError,
            match=re.escape(
                f"The attention implementation {name!r} cannot be used by MOSS-VL; expected 'eager', 'sdpa'"
            ),
        ):
            attempt()
    text, vision = model.config.text_config, model.config.vision_config
    assert (model.config._attn_implementation, text._attn_implementation, vision._attn_implementation) == (
        "sdpa",
    ) * 3  # nothing has changed
    assert text.cross_attention_implementation is None
    del visual.forward
    visual.config._attn_implementation = name
    with pytest.raises(ValueError, match="cannot be used"):
        visual(inputs["pixel_values"], inputs["grid_thw"])


def test_unknown_parts_are_refused():
    for attempt in (
        lambda: make_model().set_attn_implementation({"text": "eager"}),
        lambda: MossVLForConditionalGeneration._from_config(make_config(), attn_implementation={"text": "eager"}),
        lambda: AutoModelForCausalLM.from_pretrained(
            CHECKPOINT, trust_remote_code=True, attn_implementation={"text": "eager"}
        ),
    ):
        with pytest.raises(
            ValueError,
            match=r"a part in `attn_implementation`, got 'text'; "
            r"expected one of \['', 'text_config', 'vision_config'\]",
        ):
            attempt()


@pytest.mark.parametrize("version", ["flash_attention_2", "flash_attention_3", "flash_attention_4"])
def test_flash_attention_falls_back_to_sdpa_with_one_warning_however_it_is_set(monkeypatch, caplog, version):
    if is_flash_attn_2_available() or torch.cuda.is_available():
        pytest.skip("flash-attention may run here")
    monkeypatch.setattr(modeling.logger, "propagate", True)
    monkeypatch.setattr(modeling.logger, "parent", logging.getLogger())
    inputs = assorted_samples()[3].inputs()
    expected = logits(make_model(), **inputs)
    makers = (
        lambda: make_model(version),
        lambda: make_model({"text_config": version, "vision_config": "eager"}),
        lambda: make_model(cross_attention_implementation=version),
        lambda: changed(version),
        lambda: changed({"text_config": version}),
        lambda: changed({"": version, "vision_config": version}),
        lambda: changed("sdpa", cross_attention_implementation=version),
    )

    def changed(*args, **kwargs):
        model = make_model()
        model.set_attn_implementation(*args, **kwargs)
        return model

    for make in makers:
        modeling.logger.warning_once.cache_clear()
        caplog.clear()
        assert close(logits(make(), **inputs), expected)
        warnings = [record.getMessage() for record in caplog.records if "sdpa is used" in record.getMessage()]
        assert len(warnings) == 1 and version in warnings[0], warnings


def test_cross_attention_can_have_another_implementation(kernels):
    """Used by the cross-attention layers alone, under its name."""
    inputs, real = batch(assorted_samples(), "left"), batch(assorted_samples(), "left")["attention_mask"].bool()
    expected = logits(eager(), **inputs)
    for crossing, rest in (
        ("flash_attention_3", "sdpa"),
        ("flash_attention_3", "eager"),
        ("flash_attention_3", "flash_attention_2"),
    ):
        model = use(make_model(), rest)
        model.config.text_config.cross_attention_implementation = crossing
        kernels.calls.clear()
        assert close(logits(model, **inputs), expected, real)
        if not rest.startswith("flash"):
            assert kernels.calls and all(call.queries[-2] == 8 and not call.causal for call in kernels.calls)
            assert kernels.requested in (["flash_attention_3"], [None])
    model.config.text_config.cross_attention_implementation = "eager"
    kernels.calls.clear()
    assert close(logits(model, **inputs), expected, real)
    assert {call.causal for call in kernels.calls if call.queries[-2] == 8} == {True}


def test_cross_attention_implementation_is_set_at_loading_or_later_and_not_saved(tmp_path):
    def of(model):
        text = model.config.text_config
        return text._attn_implementation, text.cross_attention_implementation

    load = partial(AutoModelForCausalLM.from_pretrained, trust_remote_code=True)
    model = load(CHECKPOINT, cross_attention_implementation="eager")
    assert of(model) == ("sdpa", "eager")
    assert of(load(CHECKPOINT, config=model.config, cross_attention_implementation="sdpa")) == ("sdpa", "sdpa")
    assert of(MossVLForConditionalGeneration._from_config(make_config(), cross_attention_implementation="eager")) == (
        "sdpa",
        "eager",
    )
    with pytest.raises(TypeError, match="cross_attention_implementations"):
        load(CHECKPOINT, cross_attention_implementations="eager")
    model.save_pretrained(tmp_path)
    assert "cross_attention_implementation" not in (tmp_path / "config.json").read_text()
    assert of(load(tmp_path)) == ("sdpa", None)
    model.set_attn_implementation({"vision_config": "eager"})
    assert of(model) == ("sdpa", "eager")  # a dict changes only the parts that it names
    model.set_attn_implementation("sdpa")
    assert of(model) == ("sdpa", None)
    model.set_attn_implementation("sdpa", cross_attention_implementation="eager")
    assert of(model) == ("sdpa", "eager")


# Functions of users


def test_functions_of_users(monkeypatch):
    """Called with sdpa's contract at vision, self- and cross-attention, whatever they are named."""
    calls = []

    def attention(module, query, key, value, attention_mask, scaling, dropout=0.0, is_causal=None, **kwargs):
        """As transformers documents one: no `is_causal` with a mask, groups of heads to be repeated."""
        assert attention_mask is None or (
            not is_causal and attention_mask.ndim == 4 and attention_mask.dtype == torch.bool
        )
        assert module.is_causal or not is_causal
        calls.append((type(module).__name__, attention_mask is not None, is_causal))
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        out = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, is_causal, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    for name in ("mine", "my_flash", "sdpa"):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, attention)
        model = make_model(name)
        for side in ("left", "right"):
            inputs = batch(assorted_samples(), side)
            calls.clear()
            assert close(logits(model, **inputs), logits(eager(), **inputs), inputs["attention_mask"].bool())
            kinds = [
                ("MossVLVisionAttention", False, False),
                ("MossVLSelfAttention", True, False),
                ("MossVLCrossAttention", True, False),
            ]
            assert set(kinds) <= set(calls)
        inputs = batch(assorted_samples(), "left")
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(**inputs, **options), eager().generate(**inputs, **options))
        calls.clear()
        assert close(
            logits(model, **assorted_samples()[3].inputs()), logits(eager(), **assorted_samples()[3].inputs())
        )
        assert ("MossVLSelfAttention", False, True) in calls


def test_functions_of_users_without_is_causal(monkeypatch):
    def attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        return attention_module.eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "mine", attention)
    for inputs in (assorted_samples()[3].inputs(), batch(assorted_samples(), "right")):
        assert close(logits(make_model("mine"), **inputs), logits(eager(), **inputs))


def test_functions_of_users_with_other_masks_are_refused(monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "mine", lambda *args, **kwargs: None)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "mine", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    assert attention_module.attention_kind("mine") == "function"
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "mine", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    with pytest.raises(ValueError, match="'mine' cannot be used"):
        make_model("mine")


# Parts in several dtypes


def query_key_norms(model):
    return [module for name, module in model.named_modules() if name.endswith(("q_norm", "k_norm"))]


MIXTURES = {
    "text in bfloat16": lambda model: model.bfloat16().model.visual.float(),
    "vision in bfloat16": lambda model: model.model.visual.bfloat16(),
    "separator in bfloat16": lambda model: setattr(
        model.model, "separator_token", torch.nn.Parameter(model.model.separator_token.bfloat16())
    ),
    "norms of queries and keys in float32": lambda model: [norm.float() for norm in query_key_norms(model.bfloat16())],
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("part", MIXTURES)
def test_parts_in_several_dtypes(monkeypatch, part, implementation):
    install(monkeypatch, exact=False)
    model, inputs = use(make_model(), implementation), batch(assorted_samples(), "left")
    real, expected = inputs["attention_mask"].bool(), logits(eager(), **inputs)
    MIXTURES[part](model)
    got = logits(model, **inputs)
    assert got.dtype == model.lm_head.weight.dtype
    assert (got[real].float() - expected[real]).norm() < 0.05 * expected[real].norm()
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert ids.shape[1] == real.shape[1] + 3


def test_waiting_frames_take_the_dtype_of_the_text():
    """Given before their `image_pad`, and joined with frames of a later call."""
    model = make_model()
    model.model.visual.bfloat16()
    sample = Sample("ttFtFt", (1, 4, 4), (1, 4, 6), seed=6)
    inputs, cache = sample.inputs(), DynamicCache()
    with torch.no_grad():
        model(
            input_ids=inputs["input_ids"][:, :2],
            pixel_values=sample.pixel_values[:16],
            grid_thw=sample.grid_thw[:1],
            **{CACHE: cache},
        )
        out = model(
            input_ids=inputs["input_ids"][:, 2:],
            pixel_values=sample.pixel_values[16:],
            grid_thw=sample.grid_thw[1:],
            **{CACHE: cache},
        )
    assert torch.allclose(out.logits, logits(model, **inputs)[:, 2:], atol=1e-4)


def test_training_without_media_in_several_dtypes():
    """The vision encoder runs anyway, so that its parameters have gradients on every rank."""
    model = make_model().train()
    model.model.visual.bfloat16()
    inputs = assorted_samples()[0].inputs()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# The patch projection


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_on_the_patch_projection_gets_normalised_pixels(dtype):
    torch.manual_seed(0)
    model = get_peft_model(
        make_model().to(dtype), LoraConfig(r=4, target_modules=["patch_embed.proj"], init_lora_weights=False)
    ).eval()
    inputs = Sample("tFtFt", (1, 4, 6), (1, 4, 4), seed=7).inputs()
    mean, std = [[0.5, 0.4, 0.3], [0.1, 0.2, 0.3]], [[0.2, 0.3, 0.4], [0.5, 0.5, 0.5]]
    pixels = torch.randint(
        0, 256, inputs["pixel_values"].shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    per_patch = [
        torch.tensor(x).repeat_interleave(torch.tensor([24, 16]), 0).repeat_interleave(16, 1) for x in (mean, std)
    ]
    floats = (pixels / 255 - per_patch[0]) / per_patch[1]
    got = logits(model, **{**inputs, "pixel_values": pixels}, image_mean=mean, image_std=std)
    expected = logits(model, **{**inputs, "pixel_values": floats})
    assert close(got, expected, atol=1e-4 if dtype == torch.float32 else 0.25)
    with model.disable_adapter():
        assert not close(got, logits(model, **{**inputs, "pixel_values": floats}), atol=1.0)
