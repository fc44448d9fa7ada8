"""The model against the golden numbers and against itself: every way to compute a result gives the same result, and
nothing leaks."""

import copy
import inspect
import json

import pytest
import torch
from conftest import GOLDEN, ROOT
from safetensors.torch import load_file
from tiny import IMAGE_PAD, Sample, assorted_samples, batch, make_model, row_of
from transformers import DynamicCache

from moss_vl import attention, decoder, vision_encoder
from moss_vl.configuration_moss_vl import MossVLConfig
from moss_vl.modeling_moss_vl import MossVLForConditionalGeneration


TINY = GOLDEN / "model" / "tiny"
CASES = sorted(path.stem for path in TINY.glob("*.safetensors") if path.stem != "model")


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def golden_model(request):
    return MossVLForConditionalGeneration.from_pretrained(
        TINY, attn_implementation=request.param, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request):
    return make_model(request.param)


def close(got, expected, tolerance=1e-5, what=""):
    """Largest difference, relative to the largest value if that is above 1: float32 has 7 digits."""
    difference = (got - expected).abs() / expected.abs().max().clamp(min=1)
    assert got.shape == expected.shape, f"{what}: shape {list(got.shape)}, expected {list(expected.shape)}"
    worst = difference.max().item() if difference.numel() else 0.0
    assert worst <= tolerance, (
        f"{what}: off by {worst:.2e} at {torch.unravel_index(difference.argmax(), difference.shape)}"
    )


def exactly(got, expected, what):
    assert (got - expected).abs().max() <= 1e-5, f"{what}: off by {(got - expected).abs().max():.2e}"


def test_forward_passes_each_argument_of_the_inner_model_under_its_name(model, monkeypatch):
    """A new argument of the inner model that forward does not pass on would have no effect."""

    def receive(**given):
        raise InterruptedError(given)

    names = inspect.signature(model.model.forward).parameters
    arguments = {name: f"the value of {name}" for name in names} | {"input_ids": torch.ones(1, 2)}
    monkeypatch.setattr(model.model, "forward", receive)
    with pytest.raises(InterruptedError) as raised:
        model(**arguments)
    assert raised.value.args == (arguments,)


# Golden numbers of another implementation in float32; two orders of summation differ by 1e-5.


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_golden(golden_model, case):
    data = load_file(TINY / f"{case}.safetensors")
    ids = data["input_ids"][None]
    visual = {name: data[name] for name in ("pixel_values", "grid_thw") if name in data}
    if visual:
        exactly(golden_model.model.visual(**visual), data["vision_features"], what="vision features")
        exactly(
            golden_model.get_image_features(**visual).pooler_output, data["vision_features"], what="image features"
        )
    positions, vision_positions, rope_delta = golden_model.get_rope_index(ids, visual.get("grid_thw"))
    assert torch.equal(positions[:, 0], data["position_ids"])
    assert torch.equal(rope_delta, data["rope_delta"])
    if visual:
        assert torch.equal(vision_positions[:, 0], data["vision_position_ids"])

    exactly(golden_model(ids, **visual).logits[0], data["logits"], what="logits")

    out = golden_model(ids, **visual, use_cache=True)
    tokens, logits, cache = [], [], out.past_key_values
    for _ in data["new_tokens"]:
        tokens.append(out.logits[0, -1].argmax().item())
        out = golden_model(torch.tensor([[tokens[-1]]]), past_key_values=cache)
        logits.append(out.logits[0, -1])
    assert tokens == data["new_tokens"].tolist()
    exactly(torch.stack(logits), data["decode_logits"], what="decode logits")

    whole = golden_model(torch.cat([ids, data["new_tokens"][None]], dim=1), **visual).logits[0, ids.shape[1] :]
    exactly(whole, data["decode_logits"], what="prompt and new tokens in one pass")

    generated = golden_model.generate(ids, **visual, max_new_tokens=len(tokens), do_sample=False, pad_token_id=0)
    assert generated[0, ids.shape[1] :].tolist() == tokens


def test_golden_training(golden_model):
    data = load_file(TINY / "interleaved_train.safetensors")
    golden_model.zero_grad()
    out = golden_model(
        data["input_ids"][None],
        pixel_values=data["pixel_values"],
        grid_thw=data["grid_thw"],
        labels=data["labels"][None],
    )
    out.loss.backward()
    exactly(out.loss, data["loss"][0], what="loss")
    norms = {name: parameter.grad.norm() for name, parameter in golden_model.named_parameters()}
    assert {f"grad_norm.{name}" for name in norms} == {name for name in data if name.startswith("grad_norm.")}
    for name, norm in norms.items():
        exactly(norm, data[f"grad_norm.{name}"].reshape(()), what=name)


def test_the_11b_model_has_the_released_tensors():
    config = MossVLConfig(**json.loads((ROOT / "config.json").read_text()))
    with torch.device("meta"):
        model = MossVLForConditionalGeneration(config)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert len(shapes) == 895
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_336_371_208
    assert shapes["model.separator_token"] == [4096]
    assert shapes["model.visual.patch_embed.proj.weight"] == [1152, 3, 1, 16, 16]
    assert shapes["model.visual.merger.norms.3.bias"] == [1152]
    assert shapes["model.visual.merger.linear_fc1.weight"] == [18432, 18432]
    assert shapes["model.language_model.layers.46.cross_attn_mlp_gate"] == [1]
    assert shapes["model.language_model.layers.2.cross_attn.k_norm.weight"] == [128]
    assert shapes["model.language_model.layers.47.self_attn.q_proj.weight"] == [4096, 4096]
    assert shapes["lm_head.weight"] == [151936, 4096]


# One prompt, many ways to feed it.


@pytest.mark.parametrize("index", range(5))
@torch.no_grad()
def test_token_by_token_equals_full_forward(model, index):
    sample = assorted_samples()[index]
    inputs = sample.inputs()
    full = model(**inputs).logits
    cache, rows = DynamicCache(), []
    media_inputs = {name: inputs[name] for name in ("pixel_values", "grid_thw", "media_nums_per_sample")}
    for i in range(full.shape[1]):
        extra = media_inputs if i == 0 else {}
        rows.append(model(inputs["input_ids"][:, i : i + 1], past_key_values=cache, **extra).logits)
    close(torch.cat(rows, dim=1), full, what="token by token")


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("with_mask", [True, False])
@torch.no_grad()
def test_prefill_in_chunks_equals_full_forward(model, size, with_mask):
    """All media come with the first chunk; the frames wait for their `image_pad`."""
    sample = assorted_samples()[3]
    inputs = sample.inputs()
    full = model(**inputs).logits
    mask = inputs.pop("cross_attention_mask")
    ids, cache, rows = inputs.pop("input_ids"), None, []
    inputs.pop("attention_mask")
    for start in range(0, ids.shape[1], size):
        chunk = slice(start, min(start + size, ids.shape[1]))
        masks = {"cross_attention_mask": mask[:, :, chunk]} if with_mask else {}
        out = model(ids[:, chunk], past_key_values=cache, use_cache=True, **masks, **inputs)
        inputs, cache = {}, out.past_key_values
        rows.append(out.logits)
    close(torch.cat(rows, dim=1), full, what=f"chunks of {size}")


@torch.no_grad()
def test_chunks_that_bring_their_own_media(model):
    """Later frames come with the text that places them; the packed keys and values grow in both samples of a batch."""
    first = [Sample("tFt", (1, 4, 4), seed=6), Sample("FFt", (1, 2, 4), (1, 4, 4), seed=7)]
    second = [Sample("FtFt", (1, 4, 8), (1, 4, 4), seed=8), Sample("ttFt", (1, 6, 6), seed=9)]
    out = model(**{**batch(first, "left"), "cross_attention_mask": None}, use_cache=True)
    more = batch(second, "left")
    for mask in (None, more["cross_attention_mask"]):  # over the new frames alone
        step = model(
            more["input_ids"],
            past_key_values=copy.deepcopy(out.past_key_values),
            pixel_values=more["pixel_values"],
            grid_thw=more["grid_thw"],
            media_nums_per_sample=more["media_nums_per_sample"],
            cross_attention_mask=mask,
        )
        for row in range(2):
            one = model(
                input_ids=torch.cat([first[row].ids, second[row].ids])[None],
                pixel_values=torch.cat([first[row].pixel_values, second[row].pixel_values]),
                grid_thw=torch.cat([first[row].grid_thw, second[row].grid_thw]),
            )
            close(step.logits[row], one.logits[0, 3:], what=f"row {row}")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0], [0, 3], [3, 0, 0]])
@pytest.mark.parametrize("given", ["all", "no mask", "no mask, no numbers"])
@torch.no_grad()
def test_batch_equals_each_alone(model, side, order, given):
    samples = [assorted_samples()[i] for i in order]
    inputs = batch(samples, side)
    if given != "all":
        inputs["cross_attention_mask"] = None
    if given.endswith("numbers"):
        inputs["media_nums_per_sample"] = None
    logits = model(**inputs).logits
    for row, sample in enumerate(samples):
        alone = model(**sample.inputs()).logits[0]
        close(logits[row, row_of(samples, row, side, logits.shape[1])], alone, what=f"row {row}, {side}")


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_batch_decoding_equals_each_alone(model, side):
    samples = assorted_samples()
    inputs = batch(samples, side)
    out = model(**inputs, use_cache=True)
    cache, attention_mask = out.past_key_values, inputs["attention_mask"]
    ids = torch.randint(1, 180, (3, len(samples)), generator=torch.Generator().manual_seed(5))
    rows = []
    for step in ids:
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(samples), 1)], dim=1)
        rows.append(model(step[:, None], past_key_values=cache, attention_mask=attention_mask).logits)
    rows = torch.cat(rows, dim=1)
    for row, sample in enumerate(samples):
        alone = sample.inputs() | {"cross_attention_mask": None, "attention_mask": None}
        alone["input_ids"] = torch.cat([sample.ids, ids[:, row]])[None]
        close(rows[row], model(**alone).logits[0, -3:], what=f"row {row}, {side}")


@torch.no_grad()
def test_eager_equals_sdpa():
    eager, sdpa = make_model("eager"), make_model("sdpa")
    inputs = batch(assorted_samples(), "left")
    real = inputs["attention_mask"].bool()
    close(eager(**inputs).logits[real], sdpa(**inputs).logits[real])


MASKS = {
    "none": lambda keep: None,
    "one for all": lambda keep: keep[:1, :, :1],
    "of each sample": lambda keep: keep[:, :, :1],
    "of each row": lambda keep: keep,
}


@pytest.mark.parametrize("scores", [1, 300, 1 << 22])
@pytest.mark.parametrize("mask", [*MASKS, "causal"])
@torch.no_grad()
def test_attention_by_blocks_equals_attention_at_once(monkeypatch, mask, scores):
    monkeypatch.setattr(attention, "CPU_SCORES", scores)
    generator, length = torch.Generator().manual_seed(0), 7 if mask == "causal" else 11
    query = torch.randn(3, 8, 7, 16, generator=generator)
    key, value = (torch.randn(3, 2, length, 16, generator=generator) for _ in range(2))
    keep = torch.rand(3, 1, 7, length, generator=generator) < 0.5
    keep[..., 3] = True
    given = None if mask == "causal" else MASKS[mask](keep)
    module = make_model().model.language_model.layers[0].self_attn
    expected = torch.ones(7, 7, dtype=torch.bool).tril()[None, None] if mask == "causal" else given
    expected, _ = attention.eager_attention_forward(module, query, key, value, expected, 0.25)
    got = attention.blockwise_attention_forward(module, query, key, value, given, 0.25, causal=mask == "causal")
    close(got, expected)


SIZES = {
    "no groups": {"text": {"num_attention_heads": 2, "num_key_value_heads": 2}},
    "one key head": {"text": {"num_attention_heads": 6, "num_key_value_heads": 1}},
    "wide heads, bias": {
        "text": {"head_dim": 40, "attention_bias": True, "rope_scaling": {"mrope_section": [8, 6, 6]}}
    },
    "cross-attention in a row and last": {"text": {"cross_attention_layers": [2, 3, 5]}},
    "no kept blocks": {"vision": {"deepstack_visual_indexes": []}},
    "last block kept as well": {"vision": {"deepstack_visual_indexes": [1, 2], "num_position_embeddings": 36}},
    "merge 4": {"vision": {"spatial_merge_size": 4, "num_position_embeddings": 64}},
    "merge 1": {"vision": {"spatial_merge_size": 1}},
    "two frames a patch": {"vision": {"temporal_patch_size": 2}},
    "gelu and relu": {"text": {"hidden_act": "gelu"}, "vision": {"hidden_act": "relu", "num_heads": 4}},
}


@pytest.mark.parametrize("sizes", SIZES)
@torch.no_grad()
def test_other_sizes(sizes):
    """eager = sdpa = token by token = batch of each alone."""
    config = SIZES[sizes]
    samples = [
        Sample("tFFtt", (1, 8, 4), (1, 4, 12), seed=1),
        Sample("ttttttt", seed=2),
        Sample("FFFt", (3, 4, 4), seed=3),
    ]
    if config.get("vision", {}).get("temporal_patch_size") == 2:
        for sample in samples:
            sample.pixel_values = sample.pixel_values.repeat(1, 2)
    inputs = batch(samples, "left")
    real = inputs["attention_mask"].bool()
    models = [make_model(name, **config) for name in ("eager", "sdpa")]
    eager, sdpa = (model(**inputs).logits for model in models)
    close(eager[real], sdpa[real], what="eager and sdpa")
    for row, sample in enumerate(samples):
        alone = models[1](**sample.inputs()).logits[0]
        close(sdpa[row, -len(sample.ids) :], alone, what=f"row {row}")
        cache, steps = DynamicCache(), []
        visual = {"pixel_values": sample.pixel_values, "grid_thw": sample.grid_thw}
        for i in range(len(sample.ids)):
            steps.append(
                models[1](sample.ids[None, i : i + 1], past_key_values=cache, **(visual if i == 0 else {})).logits
            )
        close(torch.cat(steps, dim=1)[0], alone, what=f"row {row}, token by token")


@pytest.mark.parametrize("length", [1, 2, 3, 64])
@torch.no_grad()
def test_vision_chunks_change_nothing(model, length):
    inputs = assorted_samples()[3].inputs()
    whole = model.model.visual(inputs["pixel_values"], inputs["grid_thw"], vision_chunked_length=1000)
    close(model.model.visual(inputs["pixel_values"], inputs["grid_thw"], vision_chunked_length=length), whole)
    close(model(**inputs, vision_chunked_length=length).logits, model(**inputs).logits)


@torch.no_grad()
def test_the_vision_encoder_is_called_by_chunks_not_by_frames(model):
    calls = []
    hook = model.model.visual.blocks[0].register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[0]))
    pixels, grid = torch.randn(10 * 16, 48), torch.tensor([[7, 4, 4], [3, 4, 4]])
    model.model.visual(pixels, grid, vision_chunked_length=4)
    hook.remove()
    assert calls == [4 * 16, 4 * 16, 2 * 16]


@pytest.mark.parametrize("patches", [1, 40, 100])
@torch.no_grad()
def test_chunks_of_few_patches_change_nothing(model, patches, monkeypatch):
    """Frames of 16 patches and of 32: no chunk is larger than `patches` unless it is one frame."""
    pixels, grid = torch.randn(5 * 16 + 4 * 32, 48), torch.tensor([[5, 4, 4], [4, 8, 4]])
    separator, calls = torch.randn(64), []
    whole = model.model.visual(pixels, grid, separator=separator)
    monkeypatch.setattr(vision_encoder, "CPU_PATCHES", patches)
    hook = model.model.visual.blocks[0].register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[0]))
    got = model.model.visual(pixels, grid, separator=separator)
    hook.remove()
    assert calls == {1: [16] * 5 + [32] * 4, 40: [32, 32, 16, 32, 32, 32, 32], 100: [80, 96, 32]}[patches]
    close(got, whole)
    assert torch.equal(got[[4, 9, 14, 19, 24, 33, 42, 51, 60]], separator.expand(9, -1))


@torch.no_grad()
def test_vision_keys_and_values_computed_in_pieces(model, monkeypatch):
    inputs = batch(assorted_samples(), "left")
    expected = model(**inputs).logits
    monkeypatch.setattr(decoder, "CPU_VISION_PIECE", 7)
    close(model(**inputs).logits, expected)


@torch.no_grad()
def test_logits_of_kept_tokens_only(model):
    inputs = assorted_samples()[2].inputs()
    full = model(**inputs).logits
    close(model(**inputs, logits_to_keep=3).logits, full[:, -3:])
    close(model(**inputs, logits_to_keep=torch.tensor([0, 4])).logits, full[:, [0, 4]])


@torch.no_grad()
def test_embeddings_in_place_of_ids(model):
    inputs = assorted_samples()[2].inputs()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    close(model(**inputs, inputs_embeds=embeds).logits, model(**inputs).logits)
    text = assorted_samples()[0].ids[None]
    close(model(inputs_embeds=model.get_input_embeddings()(text)).logits, model(text).logits)


@torch.no_grad()
def test_position_ids_of_the_caller_are_used(model):
    inputs = assorted_samples()[2].inputs()
    positions, _, delta = model.get_rope_index(inputs["input_ids"], inputs["grid_thw"])
    close(model(**inputs, position_ids=positions).logits, model(**inputs).logits)
    close(model(**inputs, position_ids=positions[0]).logits, model(**inputs).logits)
    moved = model(**inputs, position_ids=positions + 7)
    assert (moved.logits - model(**inputs).logits).abs().max() > 1e-3
    assert torch.equal(moved.rope_deltas, delta + 7)


# Nothing leaks.


def moved_rows(model, before, after):
    return ((model(**after).logits - model(**before).logits).abs().amax(-1) > 1e-6)[0].tolist()


@torch.no_grad()
def test_a_changed_token_changes_only_later_logits(model):
    before = assorted_samples()[3].inputs()
    after = before | {"input_ids": before["input_ids"].clone()}
    after["input_ids"][0, 4] = 7
    assert moved_rows(model, before, after) == [False] * 4 + [True] * 7


@pytest.mark.parametrize(
    "frame, pixels, first_row", [(0, slice(0, 16), 0), (2, slice(32, 48), 3), (4, slice(80, 96), 10)]
)
@torch.no_grad()
def test_a_changed_frame_changes_only_tokens_it_is_visible_to(model, frame, pixels, first_row):
    before = assorted_samples()[3].inputs()
    after = before | {"pixel_values": before["pixel_values"].clone()}
    after["pixel_values"][pixels] += 1
    assert moved_rows(model, before, after) == [False] * first_row + [True] * (11 - first_row)


@torch.no_grad()
def test_a_changed_sample_changes_no_other_sample(model):
    samples = assorted_samples()
    before = model(**batch(samples, "left")).logits
    samples[2] = Sample("FtttFttttttttttt", (1, 8, 8), (1, 4, 4), seed=77)
    after = model(**batch(samples, "left")).logits
    for row in (0, 1, 3, 4):
        count = len(samples[row].ids)
        close(after[row, -count:], before[row, -count:], what=f"row {row}")


@torch.no_grad()
def test_ids_of_padding_have_no_effect(model):
    samples = assorted_samples()
    for side in ("left", "right"):
        inputs = batch(samples, side)
        ids = inputs["input_ids"].clone()
        ids[inputs["attention_mask"] == 0] = IMAGE_PAD  # even this is padding
        real = inputs["attention_mask"].bool()
        close(model(**inputs | {"input_ids": ids}).logits[real], model(**inputs).logits[real], tolerance=0)


@torch.no_grad()
def test_a_mask_may_hide_the_first_frame_alone(model):
    """If frame 0 is hidden from a row, a change of frame 0 does not change the row, and a change of frame 1 does.
    Written against self-attention that would carry the change on: only the first row after the frames is compared."""
    sample = Sample("FFtt", (2, 4, 4), seed=3)
    before = sample.inputs()
    mask = before["cross_attention_mask"].clone()
    mask[0, 0, :, 0] = True  # frame 0 is hidden from every token
    before["cross_attention_mask"] = mask
    for frame, expected in ((0, [False] * 4), (1, [False, True, True, True])):
        after = before | {"pixel_values": before["pixel_values"].clone()}
        after["pixel_values"][frame * 16 : frame * 16 + 16] += 1
        assert moved_rows(model, before, after) == expected


@torch.no_grad()
def test_a_mask_with_holes_equals_dense_attention():
    """Rows that see any set of placed frames, against the plain formula with a dense mask, for one layer."""
    model = make_model("sdpa")
    sample = Sample("FFFtttttt", (3, 4, 6), seed=3)
    inputs = sample.inputs()
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(1, 1, 9, 3, generator=generator) < 0.5
    mask[0, 0, 0] = torch.tensor([False, True, True])
    mask[0, 0, 1, 2] = True
    inputs["cross_attention_mask"] = mask
    layer, found = model.model.language_model.layers[1], {}

    def keep(module, args, out):
        hidden, vision, call, _ = args
        query = module.queries(hidden, call.rotary)
        key, value = module.keys_values(vision[None], call.vision_rotary)
        tokens = (~mask).repeat_interleave(7, dim=-1)  # 2 * 3 tokens and a separator per frame
        scores = query @ key.repeat_interleave(4, dim=1).transpose(2, 3) * module.scaling
        weights = scores.masked_fill(~tokens, float("-inf")).softmax(-1).nan_to_num(0)
        dense = (weights @ value.repeat_interleave(4, dim=1)).transpose(1, 2).flatten(2)
        found["expected"], found["got"] = module.o_proj(dense), out[0]
        found["rows"] = tokens.any(-1)[0, 0]

    hook = layer.cross_attn.register_forward_hook(keep)
    model(**inputs)
    hook.remove()
    close(found["got"], found["expected"])
    assert 0 < found["rows"].sum() < 9 or found["rows"].all()


@torch.no_grad()
def test_frames_invisible_to_the_first_chunk_are_visible_to_the_second(model):
    """The mask hides both frames from the first chunk, and none from the second."""
    sample = Sample("FttFtt", (1, 4, 4), (1, 2, 4), seed=3)
    inputs = sample.inputs()
    inputs["cross_attention_mask"][:, :, :3] = True
    full = model(**inputs).logits
    visual = {name: inputs[name] for name in ("pixel_values", "grid_thw")}
    ids, mask = inputs["input_ids"], inputs["cross_attention_mask"]
    first = model(ids[:, :3], cross_attention_mask=mask[:, :, :3], **visual, use_cache=True, output_attentions=True)
    assert [weights.shape[-1] for weights in first.cross_attentions] == [0, 0]
    second = model(ids[:, 3:], cross_attention_mask=mask[:, :, 3:], past_key_values=first.past_key_values)
    close(torch.cat([first.logits, second.logits], dim=1), full)


@pytest.mark.parametrize("generated", [False, True])
@torch.no_grad()
def test_rows_of_a_cache_may_be_repeated_and_dropped(model, generated):
    samples = assorted_samples()[1:4]
    inputs = batch(samples, "left")
    step = torch.tensor([[5], [6], [7]])
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)
    cache = model(**inputs, use_cache=True).past_key_values
    if generated:  # one more token, so that the state holds the plan of a step
        model(step, past_key_values=cache, attention_mask=mask)
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
    expected = model(step, past_key_values=copy.deepcopy(cache), attention_mask=mask).logits
    twice = copy.deepcopy(cache)
    twice.batch_repeat_interleave(2)
    got = model(
        step.repeat_interleave(2, 0), past_key_values=twice, attention_mask=mask.repeat_interleave(2, 0)
    ).logits
    close(got, expected.repeat_interleave(2, 0))
    cache.batch_select_indices(torch.tensor([2, 1]))
    close(model(step[[2, 1]], past_key_values=cache, attention_mask=mask[[2, 1]]).logits, expected[[2, 1]])


@torch.no_grad()
def test_a_cache_given_with_use_cache_false_is_still_read(model):
    sample = assorted_samples()[2]
    cache = model(**sample.inputs(), use_cache=True).past_key_values
    expected = model(torch.tensor([[5]]), past_key_values=copy.deepcopy(cache)).logits
    close(model(torch.tensor([[5]]), past_key_values=cache, use_cache=False).logits, expected)


@torch.no_grad()
def test_a_row_without_visible_frames_passes_cross_attention_unchanged(model):
    layer, passes = model.model.language_model.layers[1], []
    hook = layer.register_forward_hook(lambda module, args, out: passes.append((args[0], out[0])))
    model(**assorted_samples()[2].inputs())
    hook.remove()
    (before, after), first_frame = passes[0], 2
    assert torch.equal(before[:, :first_frame], after[:, :first_frame])
    assert (before[:, first_frame:] - after[:, first_frame:]).abs().amin(-1).max() > 0


@torch.no_grad()
def test_text_alone_skips_the_vision_side(model):
    called = []
    hooks = [model.model.visual.register_forward_hook(lambda *args: called.append("visual"))]
    hooks += [model.model.language_model.layers[1].register_forward_hook(lambda *args: called.append("cross"))]
    sample = assorted_samples()[0]
    close(model(**sample.inputs()).logits, model(sample.ids[None]).logits)
    for hook in hooks:
        hook.remove()
    assert called == []
