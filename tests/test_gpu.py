"""Kernels of a GPU, in bfloat16 and float16, against float32 on the CPU: `pytest -m gpu`.

`MOSS_VL_GPU_TESTS=cpu pytest -m gpu` runs the same tests on the CPU, where flash-attention falls back to sdpa. This
checks the tests, not the GPU.
"""

import os

import pytest
import torch
from conftest import GOLDEN, ROOT
from safetensors.torch import load_file
from tiny import Sample, assorted_samples, batch, make_model
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from moss_vl.modeling_moss_vl import CACHE, MossVLForConditionalGeneration


DEVICE = os.environ.get("MOSS_VL_GPU_TESTS", "cuda")
DRY = DEVICE == "cpu"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not (DRY or torch.cuda.is_available()), reason="no CUDA device")]

with_flash = pytest.param(
    "flash_attention_2",
    marks=pytest.mark.skipif(
        not (DRY or is_flash_attn_2_available()), reason="flash-attn is not installed: pip install flash-attn"
    ),
)
implementations = pytest.mark.parametrize("implementation", ["eager", "sdpa", with_flash])
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
# Relative to the norm of all logits: bfloat16 has 8 bits, float16 has 11, and the rounding of six layers adds up.
LIMITS = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float32: 1e-4}
MEDIA = ("pixel_values", "grid_thw", "media_nums_per_sample")
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def exact_float32():
    """Switches off tf32, which has 10 bits."""
    settings = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = False
    yield
    for setting, value in zip(settings, before, strict=True):
        setting.allow_tf32 = value


@pytest.fixture
def flash_calls(monkeypatch):
    """Whether each call of flash-attention is causal; empty if other kernels run."""
    calls, function = [], ALL_ATTENTION_FUNCTIONS["flash_attention_2"]

    def counted(*args, **kwargs):
        calls.append(kwargs["is_causal"])
        return function(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", counted)
    return calls


def on_device(inputs):
    return {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def moved(model, implementation, dtype=None):
    model.set_attn_implementation(implementation)
    return model.to(DEVICE, dtype)


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def assert_near(got, expected, dtype, where=None):
    got, expected = got.float().cpu(), expected.float().cpu()
    if where is not None:
        got, expected = got[where], expected[where]
    assert got.isfinite().all()
    off = ((got - expected).norm() / expected.norm()).item()
    assert off < LIMITS[dtype], f"off by {off:.1e}"


def assert_by_flash(implementation, calls):
    """Asserts that flash-attention ran if it was requested, causal in self-attention alone."""
    if implementation == "flash_attention_2" and not DRY:
        assert True in calls and False in calls
    elif implementation != "flash_attention_2":
        assert not calls


@pytest.mark.parametrize(
    "case", sorted(path.stem for path in (GOLDEN / "model" / "tiny").glob("*.safetensors") if path.stem != "model")
)
@implementations
@pytest.mark.parametrize("dtype", LIMITS, ids=["bf16", "fp16", "fp32"])
def test_golden(case, implementation, dtype, flash_calls):
    folder = GOLDEN / "model" / "tiny"
    data = on_device(load_file(folder / f"{case}.safetensors"))
    model = (
        MossVLForConditionalGeneration.from_pretrained(folder, attn_implementation=implementation, dtype=dtype)
        .to(DEVICE)
        .eval()
    )
    ids, visual = data["input_ids"][None], {name: data[name] for name in ("pixel_values", "grid_thw") if name in data}
    with torch.no_grad():
        out = model(ids, **visual, use_cache=True)
        if "logits" in data:
            assert_near(out.logits[0], data["logits"], dtype)
        if "new_tokens" in data:
            steps = [model(token[None, None], **{CACHE: out[CACHE]}).logits[0, -1] for token in data["new_tokens"]]
            assert_near(torch.stack(steps), data["decode_logits"], dtype)
    if dtype != torch.float32 and visual:
        assert_by_flash(implementation, flash_calls)


@pytest.mark.parametrize("side", ["left", "right"])
@implementations
@dtypes
def test_padded_rows_in_chunks_and_steps(side, implementation, dtype, flash_calls):
    inputs = batch(assorted_samples(), side)
    real, length = inputs["attention_mask"].bool(), inputs["input_ids"].shape[1]
    expected = logits(make_model(), **inputs)
    model, moved_inputs = moved(make_model(), implementation, dtype), on_device(inputs)
    assert_near(logits(model, **moved_inputs), expected, dtype, real)
    assert_by_flash(implementation, flash_calls)
    for cuts in ([1, 5], [4, length - 1]):
        for cache in (DynamicCache(), StaticCache(config=model.config.text_config, max_cache_len=length + 3)):
            outs, media = [], {name: moved_inputs[name] for name in MEDIA}
            for first, last in zip([0, *cuts], [*cuts, length], strict=True):
                chunk = {
                    "input_ids": moved_inputs["input_ids"][:, first:last],
                    "attention_mask": moved_inputs["attention_mask"][:, :last],
                    **(media if first == 0 else {}),
                }
                outs.append(logits(model, **chunk, prompt_length=length, **{CACHE: cache}))
            assert_near(torch.cat(outs, dim=1), expected, dtype, real)


@implementations
@dtypes
@pytest.mark.parametrize("mask", ["holes", "bool", "float32", "empty row"])
def test_masks(mask, implementation, dtype):
    inputs = batch(assorted_samples(), "left")
    inputs.pop("cross_attention_mask")
    if mask == "holes":
        inputs["attention_mask"][2, 6] = inputs["attention_mask"][0, 7:9] = 0
    real = inputs["attention_mask"].bool()
    if mask != "holes":
        rows = torch.arange(real.shape[1])
        ready = (rows <= rows[:, None]) & real[:, None, None, :]  # nothing is visible to left padding
        if mask != "empty row":
            ready = ready | (rows == rows[:, None])
        lowest = torch.finfo(torch.float32).min
        inputs["attention_mask"] = torch.zeros(ready.shape).masked_fill(~ready, lowest) if mask == "float32" else ready
    expected = logits(make_model("eager"), **inputs)
    assert_near(
        logits(moved(make_model(), implementation, dtype), **on_device(inputs)),
        expected,
        dtype,
        real if mask == "holes" else None,
    )


@implementations
def test_packed_rows(implementation, flash_calls):
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]], device=DEVICE)
    index = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2]], device=DEVICE)
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3]], device=DEVICE)
    model = moved(make_model(), implementation, torch.bfloat16).model.language_model
    with torch.no_grad():
        got = model(input_ids=ids, position_ids=positions, text_index=index).last_hidden_state
        alone = [model(input_ids=ids[:, part]).last_hidden_state for part in (slice(0, 3), slice(3, 4), slice(4, 8))]
    assert_near(got, torch.cat(alone, dim=1), torch.bfloat16)
    assert bool(flash_calls) == (implementation == "flash_attention_2" and not DRY)


@implementations
@pytest.mark.parametrize("how", ["bf16", "autocast"])
def test_gradients(how, implementation, flash_calls):
    """Weights in bfloat16, or in float32 under autocast. Flash-attention runs in both."""
    inputs = batch(assorted_samples(), "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    reference = make_model().train()
    expected = reference(**inputs, labels=labels).loss
    expected.backward()
    model = moved(make_model(), implementation, torch.bfloat16 if how == "bf16" else None).train()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=how == "autocast"):
        loss = model(**on_device(inputs), labels=labels.to(DEVICE)).loss
    loss.backward()
    assert_by_flash(implementation, flash_calls)
    assert abs(loss.item() - expected.item()) < 0.02 * expected.item()
    got, wanted = (
        torch.cat([parameter.grad.float().cpu().flatten() for parameter in m.parameters()]) for m in (model, reference)
    )
    assert (got - wanted).norm() < 0.1 * wanted.norm()


@implementations
@dtypes
def test_beams(implementation, dtype):
    """Repeated rows and reordered caches with every kernel: shapes fit, and prompts are unchanged."""
    inputs, model = on_device(batch(assorted_samples(), "left")), moved(make_model(), implementation, dtype)
    out = model.generate(**inputs, **GREEDY, num_beams=3, num_return_sequences=3)
    assert out.shape == (15, inputs["input_ids"].shape[1] + 8)
    assert torch.equal(out[::3, : inputs["input_ids"].shape[1]], inputs["input_ids"])


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"cache_implementation": "offloaded"},
        {"cache_implementation": "offloaded_static"},
        {"use_cache": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_generate_in_float32(options, implementation):
    """The same tokens as on the CPU, with every cache of transformers."""
    if DRY and "offloaded" in str(options):
        pytest.skip("caches are offloaded from a GPU")
    inputs = batch(assorted_samples(), "left")
    expected = make_model().generate(**inputs, **GREEDY, num_beams=options.get("num_beams", 1))
    got = moved(make_model(), implementation).generate(**on_device(inputs), **GREEDY, **options)
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("part", ["visual", "language_model"])
@implementations
def test_vision_and_text_in_several_dtypes(part, implementation):
    inputs = batch(assorted_samples(), "left")
    expected, real = logits(make_model(), **inputs), inputs["attention_mask"].bool()
    model = moved(make_model(), implementation, torch.bfloat16)
    getattr(model.model, part).float()
    if part == "language_model":
        model.lm_head.float()
    assert_near(logits(model, **on_device(inputs)), expected, torch.bfloat16, real)


@pytest.mark.parametrize("side", ["left", "right"])
@dtypes
def test_many_frames(side, dtype):
    """Frames enough for blocks (block_attention.py): logits, gradients, and the vision cache in 8 bits."""
    samples = [Sample("tF" * 40 + "tt", (30, 8, 8), (10, 4, 12), seed=6), Sample("tFt" * 9, (9, 12, 8), seed=7)]
    inputs = batch([*samples, *assorted_samples()[1:3]], side)
    real, labels = (
        inputs["attention_mask"].bool(),
        inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100),
    )
    exact = make_model()
    out = exact(**inputs, labels=labels)
    out.loss.backward()
    model, moved_inputs = moved(make_model(), "sdpa", dtype), on_device(inputs)
    got = model(**moved_inputs, labels=labels.to(DEVICE))
    got.loss.backward()
    assert_near(got.logits, out.logits.detach(), dtype, real)
    grads = [torch.cat([p.grad.float().cpu().flatten() for p in one.parameters()]) for one in (model, exact)]
    assert (grads[0] - grads[1]).norm() < 2 * LIMITS[dtype] * grads[1].norm()
    assert_near(logits(model, **moved_inputs, vision_cache_dtype="int8"), out.logits.detach(), torch.bfloat16, real)
    if side == "left":
        options = {**GREEDY, "max_new_tokens": 4}
        tokens = model.generate(**moved_inputs, **options, vision_cache_dtype="int8")
        assert tokens.shape[1] == inputs["input_ids"].shape[1] + 4


@implementations
@dtypes
def test_a_window_over_appended_frames(implementation, dtype, flash_calls):
    """Kernels read parts of buffers with free space. A fork sees what the cache had when it was made."""
    blocks = [Sample("tFt", (1, 4, 4), seed=seed) for seed in range(6)]
    ids, mask = torch.cat([block.ids for block in blocks])[None], torch.ones(1, 1, 18, 6, dtype=torch.bool)
    for at in range(18):  # after each turn, two frames stay
        mask[0, 0, at, max(0, at // 3 - 2) : at // 3 + (at % 3 > 0)] = False
    pixels, grid = torch.cat([block.pixel_values for block in blocks]), torch.tensor([[1, 4, 4]] * 6)
    expected = logits(make_model(), input_ids=ids, pixel_values=pixels, grid_thw=grid, cross_attention_mask=mask)
    model, cache, outs = moved(make_model(), implementation, dtype), DynamicCache(), []
    for number, block in enumerate(blocks):
        fork = model.fork_cache(cache) if number else DynamicCache()
        inputs = {"input_ids": block.ids[None], "pixel_values": block.pixel_values, "grid_thw": grid[:1]}
        outs.append(logits(model, **on_device(inputs), **{CACHE: cache}))
        assert_near(logits(model, **on_device(inputs), **{CACHE: fork}), outs[-1], dtype)
        model.drop_frames(cache, max(0, model.cache_contents(cache).frames[0] - 2))
    assert_near(torch.cat(outs, dim=1), expected, dtype)
    assert_by_flash(implementation, flash_calls)


GPU = DEVICE if DRY else 0
HALF_OF_TEXT = {f"model.language_model.layers.{i}": "cpu" if i % 2 else GPU for i in range(6)}
MAPS = {
    "text on the CPU": {
        "model.visual": GPU,
        "model.separator_token": GPU,
        "model.language_model": "cpu",
        "lm_head": GPU,
    },
    "vision on the CPU": {
        "model.visual": "cpu",
        "model.separator_token": "cpu",
        "model.language_model": GPU,
        "lm_head": GPU,
    },
    "layers alternate": {
        "model.visual.patch_embed": GPU,
        "model.visual.pos_embed": "cpu",
        "model.visual.blocks": GPU,
        "model.visual.merger": "cpu",
        "model.separator_token": GPU,
        "model.language_model.embed_tokens": "cpu",
        **HALF_OF_TEXT,
        "model.language_model.norm": GPU,
        "lm_head": "cpu",
    },
    "auto": "auto",
}


@pytest.mark.parametrize("name", MAPS)
def test_device_maps_over_gpu_and_cpu(tmp_path, name):
    model, inputs = make_model(), batch(assorted_samples(), "left")
    model.save_pretrained(tmp_path)
    limit = {}
    if name == "auto":
        size = sum(4 * parameter.numel() for parameter in model.parameters())
        limit = {"max_memory": {"cpu": 4 * size} if DRY else {0: size // 2, "cpu": 4 * size}}
    split = MossVLForConditionalGeneration.from_pretrained(
        tmp_path, device_map=MAPS[name], dtype=torch.float32, **limit
    ).eval()
    real, moved_inputs = inputs["attention_mask"].bool(), on_device(inputs)
    assert_near(logits(split, **moved_inputs), logits(model, **inputs), torch.float32, real)
    assert torch.equal(split.generate(**moved_inputs, **GREEDY).cpu(), model.generate(**inputs, **GREEDY))


@implementations
@pytest.mark.parametrize("dtype", LIMITS, ids=["bf16", "fp16", "fp32"])
def test_joint_calls(implementation, dtype, flash_calls):
    """A token in each of several caches, two of them forks of one conversation, against each alone on the CPU."""
    model, samples = make_model(), assorted_samples()
    alone = [model(**sample.inputs(), use_cache=True)[CACHE] for sample in (*samples, samples[2])]
    expected = [
        torch.cat([model(torch.tensor([[token + row]]), **{CACHE: cache}).logits[0] for token in (5, 50)])
        for row, cache in enumerate(alone)
    ]
    model = moved(model, implementation, dtype)
    with torch.no_grad():
        caches = [model(**on_device(sample.inputs()), use_cache=True)[CACHE] for sample in samples]
    caches.append(model.fork_cache(caches[2]))
    got = [model.decode_rows([token + row for row in range(6)], caches) for token in (5, 50)]
    for row, want in enumerate(expected):
        assert_near(torch.stack([one[row] for one in got]), want, dtype)
    assert_by_flash(
        implementation if dtype != torch.float32 else "sdpa", [] if dtype == torch.float32 else flash_calls
    )


def test_streams_and_kept_caches(tmp_path):
    """On the device, through `state.to`, and through a file: the same answers."""
    from transformers import AutoModelForCausalLM, AutoProcessor

    folder = ROOT / "checkpoints/moss-vl-nano"
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).to(DEVICE)
    options = {"generate_kwargs": {"max_new_tokens": 16}}
    images = [str(ROOT / f"data/{name}.jpg") for name in ("sample_a", "example_image")]
    queries = [{"prompt": "What color is the cross?", "images": [image], **options} for image in images]
    queries.append(
        {"prompt": "When does the star appear?", "videos": [str(ROOT / "data/example_video.mp4")], **options}
    )
    alone = [model.offline_batch_generate(processor, [query])["results"][0]["text"] for query in queries]
    out = model.stream_batch(processor, queries, keep_cache=True).results()
    assert [result["text"] for result in out["results"]] == alone
    ask = [{"prompt": "And the square?", **options}] * 3
    states = out["session_states"]
    want = model.offline_batch_generate(processor, ask, session_states=list(map(dict, states)))["results"]
    assert states[0].to("cpu")._kept.cache.layers[0].keys.device.type == "cpu"
    states[1].save(tmp_path / "state.safetensors")
    states[1] = model.load_session(tmp_path / "state.safetensors")
    got = model.offline_batch_generate(processor, ask, session_states=states)["results"]
    assert [one["text"] for one in got] == [one["text"] for one in want]
