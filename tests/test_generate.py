"""`generate` equals a plain loop of whole forwards, for every mode, cache and batch."""

import copy
import logging

import pytest
import torch
import transformers
from tiny import IMAGE_PAD, Sample, assorted_samples, batch, make_model
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList, TextStreamer

from moss_vl.modeling_moss_vl import CACHE


NEW = 8


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request):
    return make_model(request.param)


@torch.no_grad()
def plain_greedy(model, sample, steps=NEW):
    """Whole forwards without a cache."""
    ids, length = sample.ids[None], len(sample.ids)
    for _ in range(steps):
        visual = {"pixel_values": sample.pixel_values, "grid_thw": sample.grid_thw}
        logits = model(ids, **visual, prompt_length=length, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, length:].tolist()


def run(model, inputs, **kwargs):
    return model.generate(**inputs, **({"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | kwargs))


def continuation(model, inputs, **kwargs):
    return run(model, inputs, **kwargs)[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_batch_equals_a_plain_loop(model, use_cache):
    samples = assorted_samples()
    expected = [plain_greedy(model, sample) for sample in samples]
    assert continuation(model, batch(samples, "left"), use_cache=use_cache) == expected
    for sample, one in zip(samples, expected, strict=True):
        assert continuation(model, sample.inputs(), use_cache=use_cache) == [one]


def test_minimal_inputs(model):
    sample = assorted_samples()[2]
    inputs = {"input_ids": sample.ids[None], "pixel_values": sample.pixel_values, "grid_thw": sample.grid_thw}
    assert continuation(model, inputs) == [plain_greedy(model, sample)]
    text = assorted_samples()[0]
    assert continuation(model, {"input_ids": text.ids[None]}) == [plain_greedy(model, text)]


def encoded(model, inputs):
    """The inputs with the media encoded in place of their pixels."""
    features = model.get_image_features(inputs["pixel_values"], inputs["grid_thw"]).last_hidden_state
    return {name: value for name, value in inputs.items() if name != "pixel_values"} | {"image_features": features}


@torch.no_grad()
def test_encoded_media_in_place_of_pixels(model):
    """The encoder does not run again; a batch with a text-only row, and with beams."""
    samples = assorted_samples()
    inputs = batch(samples, "left")
    expected = [plain_greedy(model, sample) for sample in samples]
    beams = continuation(model, inputs, num_beams=2)
    logits = model(**samples[3].inputs()).logits
    features = encoded(model, inputs)
    alone = encoded(model, samples[3].inputs())
    hook = model.model.visual.register_forward_pre_hook(lambda *args: pytest.fail("encoded again"))
    try:
        assert continuation(model, features) == expected
        assert continuation(model, features, num_beams=2) == beams
        assert torch.allclose(
            model(**alone | {"image_features": alone["image_features"].double()}).logits, logits, atol=1e-5
        )
    finally:
        hook.remove()


@torch.no_grad()
def test_encoded_media_of_a_second_turn(model):
    """Media of the whole conversation: those that the cache holds are dropped."""
    first, second = Sample("tFFt", (1, 4, 4), (1, 2, 6), seed=21), Sample("tFtFFt", (1, 4, 6), (2, 4, 4), seed=22)
    out = run(model, encoded(model, first.inputs()), return_dict_in_generate=True)
    assert out.sequences[0, 4:].tolist() == plain_greedy(model, first)
    whole = Sample("t", seed=0)
    whole.ids = torch.cat([out.sequences[0], second.ids])
    whole.pixel_values, whole.grid_thw = (
        torch.cat([getattr(s, name) for s in (first, second)]) for name in ("pixel_values", "grid_thw")
    )
    inputs = encoded(model, whole.inputs() | {"cross_attention_mask": None})
    assert continuation(model, inputs, past_key_values=out[CACHE]) == [plain_greedy(model, whole)]


def uint8_inputs_of(sample, seed):
    """The sample with random uint8 pixels: its inputs with these and three numbers per medium, and normalised."""
    generator = torch.Generator().manual_seed(seed)
    inputs = sample.inputs()
    pixels = torch.randint(0, 256, inputs["pixel_values"].shape, generator=generator, dtype=torch.uint8)
    mean, std = (
        torch.rand(len(inputs["grid_thw"]), 3, generator=generator, dtype=torch.float64) + shift
        for shift in (0.1, 0.2)
    )
    per_patch = [x.repeat_interleave(inputs["grid_thw"].prod(1), dim=0)[..., None] for x in (mean, std)]
    values = ((pixels.view(len(pixels), 3, -1).double() / 255 - per_patch[0]) / per_patch[1]).flatten(1).float()
    as_uint8 = inputs | {"pixel_values": pixels, "image_mean": mean.tolist(), "image_std": std.tolist()}
    return as_uint8, inputs | {"pixel_values": values}


@torch.no_grad()
def test_uint8_pixels_equal_normalised_pixels(model):
    """Each medium has a mean and deviation, for all chunk sizes; a second turn drops those of media in the cache."""
    as_uint8, inputs = uint8_inputs_of(Sample("tFFtFt", (1, 4, 4), (1, 4, 4), (1, 2, 6), seed=5), seed=1)
    expected = model(**inputs).logits
    for length in (1, 2, 64):
        assert torch.allclose(model(**as_uint8, vision_chunked_length=length).logits, expected, atol=1e-4)
    same = as_uint8 | {name: as_uint8[name][:1] * 3 for name in ("image_mean", "image_std")}
    one_by_one = torch.cat(
        [
            model.get_image_features(
                same["pixel_values"][part], grid[None], None, as_uint8["image_mean"][:1], as_uint8["image_std"][:1]
            ).last_hidden_state
            for grid, part in zip(as_uint8["grid_thw"], (slice(0, 16), slice(16, 32), slice(32, 44)), strict=True)
        ]
    )
    whole = model.get_image_features(
        same["pixel_values"], as_uint8["grid_thw"], None, same["image_mean"], same["image_std"]
    )
    assert torch.allclose(whole.last_hidden_state, one_by_one, atol=1e-5)
    assert continuation(model, as_uint8) == continuation(model, inputs)

    out = run(model, {k: v for k, v in as_uint8.items() if k != "cross_attention_mask"}, return_dict_in_generate=True)
    more_uint8, more = uint8_inputs_of(Sample("tFt", (1, 4, 6), seed=6), seed=2)
    ids = torch.cat([out.sequences, more["input_ids"]], dim=1)
    both = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "media_nums_per_sample": [4]}
    joined = [
        both | {name: torch.cat([a[name], b[name]]) for name in ("pixel_values", "grid_thw")}
        for a, b in ((as_uint8, more_uint8), (inputs, more))
    ]
    joined[0] |= {name: as_uint8[name] + more_uint8[name] for name in ("image_mean", "image_std")}
    caches = [copy.deepcopy(out[CACHE]) for _ in joined]
    turns = [continuation(model, one, past_key_values=cache) for one, cache in zip(joined, caches, strict=True)]
    assert turns[0] == turns[1] == continuation(model, joined[1])


def test_embeddings_in_place_of_ids(model):
    text, sample = assorted_samples()[0], assorted_samples()[2]
    embed = model.get_input_embeddings()
    assert run(model, {"inputs_embeds": embed(text.ids[None])}).tolist() == [plain_greedy(model, text)]
    both = sample.inputs() | {"inputs_embeds": embed(sample.ids[None])}
    assert continuation(model, both) == [plain_greedy(model, sample)]
    with pytest.raises(ValueError, match="`input_ids` as well"):
        run(model, {name: value for name, value in both.items() if name != "input_ids"})


def test_a_written_image_pad_is_text(model):
    """The head's row of `image_pad` is the largest, so every new token is one; cached and plain decoding agree."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight[IMAGE_PAD] = 0
    samples = assorted_samples()[1:3]
    lengths = []

    def push(ids, scores):
        """Three of the tokens are `image_pad`."""
        lengths.append(ids.shape[1])
        if len(lengths) in (2, 3, 5):
            scores = torch.full_like(scores, -1e4)
            scores[:, IMAGE_PAD] = 0
        return scores

    rows = []
    for use_cache in (True, False):
        lengths.clear()
        rows.append(continuation(model, batch(samples, "left"), use_cache=use_cache, logits_processor=[push]))
    assert rows[0] == rows[1]
    assert [row.count(IMAGE_PAD) for row in rows[0]] == [3, 3]


def test_sampling_follows_the_seed_and_the_distribution(model):
    inputs = assorted_samples()[2].inputs()
    torch.manual_seed(3)
    first = continuation(model, inputs, do_sample=True, top_k=20, temperature=0.7)
    torch.manual_seed(3)
    assert continuation(model, inputs, do_sample=True, top_k=20, temperature=0.7) == first
    torch.manual_seed(3)
    assert continuation(model, inputs, do_sample=True, top_k=20, temperature=0.7, use_cache=False) == first
    assert continuation(model, inputs, do_sample=True, top_k=1) == [plain_greedy(model, assorted_samples()[2])]


@pytest.mark.parametrize("extra", [{}, {"num_return_sequences": 3}, {"length_penalty": 0.0, "early_stopping": True}])
def test_beams_with_cache_equal_beams_without(model, extra):
    inputs = batch(assorted_samples(), "left")
    cached = run(model, inputs, num_beams=3, return_dict_in_generate=True, output_scores=True, **extra)
    plain = run(model, inputs, num_beams=3, return_dict_in_generate=True, output_scores=True, use_cache=False, **extra)
    assert torch.equal(cached.sequences, plain.sequences)
    assert torch.allclose(cached.sequences_scores, plain.sequences_scores, atol=1e-5)
    greedy = run(model, inputs)
    assert cached.sequences.shape[0] == 5 * extra.get("num_return_sequences", 1)
    assert not torch.equal(cached.sequences[:: extra.get("num_return_sequences", 1)], greedy)


def test_beams_of_a_batch_equal_beams_alone(model):
    samples = assorted_samples()
    together = continuation(model, batch(samples, "left"), num_beams=3)
    assert together == [continuation(model, sample.inputs(), num_beams=3)[0] for sample in samples]


def test_beams_share_one_vision_sequence(model):
    out = run(model, assorted_samples()[3].inputs(), num_beams=4, return_dict_in_generate=True)
    assert out.past_key_values.layers[1].keys.shape == (1, 2, 29, 16)


def test_several_answers(model):
    samples = assorted_samples()[1:4]
    torch.manual_seed(0)
    out = run(model, batch(samples, "left"), do_sample=True, num_return_sequences=4)
    assert out.shape[0] == 12
    torch.manual_seed(0)
    again = run(model, batch(samples, "left"), do_sample=True, num_return_sequences=4, use_cache=False)
    assert torch.equal(out, again)


class StopAt(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


class Recorder(TextStreamer):
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_stopping_criteria_eos_and_streamer(model):
    sample = assorted_samples()[3]
    expected, streamer = plain_greedy(model, sample), Recorder()
    stopped = continuation(
        model,
        sample.inputs(),
        stopping_criteria=StoppingCriteriaList([StopAt(len(sample.ids) + 3)]),
        streamer=streamer,
    )
    assert stopped == [expected[:3]]
    assert streamer.ended and streamer.pieces == [sample.ids.tolist()] + [[token] for token in expected[:3]]
    end = expected[2]
    assert continuation(model, sample.inputs(), eos_token_id=end) == [expected[: expected.index(end) + 1]]


@pytest.mark.parametrize("with_media", ["none", "new", "all"])
def test_a_second_turn_on_a_kept_cache(model, with_media):
    """First turn, its answer, and a second turn with another question, in text or with new frames; the media of the
    new turn alone or of the whole conversation."""
    first = Sample("tFFt", (1, 4, 4), (1, 2, 6), seed=21)
    out = run(model, first.inputs(), return_dict_in_generate=True)
    second = Sample(
        "tttt" if with_media == "none" else "tFtFFt",
        *(() if with_media == "none" else ((1, 4, 6), (2, 4, 4))),
        seed=22,
    )
    ids = torch.cat([out.sequences[0], second.ids])
    whole = Sample("t" * len(ids), seed=1)
    whole.ids = ids
    new = [] if with_media == "none" else [second]
    whole.pixel_values = torch.cat([first.pixel_values] + [s.pixel_values for s in new])
    whole.grid_thw = torch.cat([first.grid_thw] + [s.grid_thw for s in new])
    visual = {
        "none": {},
        "new": {"pixel_values": second.pixel_values, "grid_thw": second.grid_thw, "media_nums_per_sample": [2]},
        "all": {"pixel_values": whole.pixel_values, "grid_thw": whole.grid_thw, "media_nums_per_sample": [4]},
    }[with_media]
    expected = plain_greedy(model, whole)
    inputs = {"input_ids": ids[None], "attention_mask": torch.ones(1, len(ids), dtype=torch.long), **visual}
    got = continuation(model, inputs, past_key_values=copy.deepcopy(out.past_key_values))
    assert got == [expected]
    if with_media == "none":  # the blank medium that a processor adds to a text is no frame
        blank = assorted_samples()[0].inputs()
        extra = {name: blank[name] for name in ("pixel_values", "grid_thw", "media_nums_per_sample")}
        assert continuation(model, inputs | extra, past_key_values=copy.deepcopy(out.past_key_values)) == [expected]
    beams = continuation(model, inputs, past_key_values=copy.deepcopy(out.past_key_values), num_beams=2)
    assert beams == continuation(model, whole.inputs() | {"cross_attention_mask": None}, num_beams=2)


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 wants the whole conversation")
def test_a_second_turn_given_by_its_new_tokens_alone(model):
    first = Sample("tF", (1, 4, 4), seed=41)
    out = run(model, first.inputs(), return_dict_in_generate=True, max_new_tokens=2)
    second = Sample("ttFtttFtttt", (1, 4, 6), (1, 4, 4), seed=42)  # longer than the first turn
    whole = Sample("t", seed=0)
    whole.ids = torch.cat([out.sequences[0], second.ids])
    whole.pixel_values = torch.cat([first.pixel_values, second.pixel_values])
    whole.grid_thw = torch.cat([first.grid_thw, second.grid_thw])
    new = whole.ids[None, out.past_key_values.get_seq_length() :]
    inputs = {"input_ids": new, "attention_mask": torch.ones(1, len(whole.ids), dtype=torch.long)}
    inputs |= {"pixel_values": second.pixel_values, "grid_thw": second.grid_thw}
    assert continuation(model, inputs, past_key_values=out.past_key_values) == [plain_greedy(model, whole)]


def test_a_second_turn_of_a_batch(model):
    firsts = [Sample("tFFt", (2, 4, 4), seed=31), Sample("tttttt", seed=32), Sample("Ft", (1, 6, 4), seed=33)]
    inputs = batch(firsts, "left")
    out = run(model, inputs, return_dict_in_generate=True)
    seconds = [Sample("ttFt", (1, 4, 8), seed=34), Sample("tFtt", (1, 4, 4), seed=35), Sample("tttt", seed=36)]
    ids = torch.cat([out.sequences, torch.stack([sample.ids for sample in seconds])], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, NEW + 4, dtype=torch.long)], dim=1)
    new = batch(seconds, "left")
    got = model.generate(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=out.past_key_values,
        **{name: new[name] for name in ("pixel_values", "grid_thw", "media_nums_per_sample")},
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
    )
    for row, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
        whole = Sample("t", seed=0)
        whole.ids = ids[row, mask[row].bool()]
        real = [sample for sample in (first, second) if sample.frames]
        whole.pixel_values = torch.cat([sample.pixel_values for sample in real])
        whole.grid_thw = torch.cat([sample.grid_thw for sample in real])
        assert got[row, ids.shape[1] :].tolist() == plain_greedy(model, whole), row


def test_a_second_turn_without_its_frames_is_an_error(model):
    out = run(model, Sample("tFt", (1, 4, 4)).inputs(), return_dict_in_generate=True)
    ids = torch.cat([out.sequences, torch.tensor([[5, IMAGE_PAD, 5]])], dim=1)
    with pytest.raises(ValueError, match="1 `image_pad` tokens, but its media have 0 frames"):
        run(model, {"input_ids": ids}, past_key_values=out.past_key_values)


@pytest.mark.parametrize("kind", ["static", "dynamic", *sorted({CACHE, "past_key_values"})])
def test_caches(model, kind):
    samples = assorted_samples()[1:4]
    expected = [plain_greedy(model, sample) for sample in samples]
    cache = {"cache_implementation": kind} if kind in ("static", "dynamic") else {kind: DynamicCache()}
    assert continuation(model, batch(samples, "left"), **cache) == expected
    if kind == "static":  # and once more: 4.57 keeps the cache it made
        assert continuation(model, batch(samples, "left"), **cache) == expected
        assert continuation(model, samples[0].inputs(), **cache) == [expected[0]]


@pytest.mark.skipif(CACHE == "cache", reason="`generate` of this transformers takes both names")
def test_a_cache_by_a_name_that_generate_does_not_know_is_an_error(model):
    with pytest.raises(ValueError, match="`generate` of this transformers calls it `past_key_values`"):
        run(model, assorted_samples()[2].inputs(), cache=DynamicCache())


@pytest.mark.filterwarnings("error:.*past_key_values")
def test_no_deprecated_name_of_the_cache_is_used(model, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers.utils.generic"), "warning_once", pytest.fail)
    run(model, assorted_samples()[2].inputs(), return_dict_in_generate=True)
    run(model, assorted_samples()[2].inputs(), num_beams=2, **{CACHE: DynamicCache()})


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_generate_with_prefill_chunks(model, size):
    samples = assorted_samples()
    expected = [plain_greedy(model, sample) for sample in samples]
    assert continuation(model, samples[3].inputs(), prefill_chunk_size=size) == [expected[3]]
    assert continuation(model, batch(samples, "left"), prefill_chunk_size=size) == expected


@pytest.mark.parametrize("extra", [{}, {"use_cache": False}, {"num_beams": 2}, {"prefill_chunk_size": 3}])
@pytest.mark.parametrize("axes", [1, 3])
def test_position_ids_of_the_caller(model, axes, extra):
    """XRoPE's positions change nothing; others do, in the prompt and after it."""
    samples = assorted_samples()[1:4]
    inputs = batch(samples, "left")
    positions, _, _ = model.get_rope_index(*(inputs[name] for name in ("input_ids", "grid_thw", "attention_mask")))
    positions = positions[0] if axes == 1 else positions
    expected = continuation(model, inputs, **extra)
    assert continuation(model, inputs | {"position_ids": positions}, **extra) == expected
    moved = continuation(model, inputs | {"position_ids": positions * 3}, **extra)
    assert moved != expected
    if not extra:
        assert moved == continuation(model, inputs | {"position_ids": positions * 3}, use_cache=False)


def test_prompt_lookup_decoding(model):
    """Several tokens per step, some of them taken back, `image_pad` among the candidates."""
    sample = assorted_samples()[2]
    assert continuation(model, sample.inputs(), prompt_lookup_num_tokens=4, eos_token_id=199) == [
        plain_greedy(model, sample)
    ]


def test_outputs_of_generate(model):
    inputs = assorted_samples()[3].inputs()
    out = run(
        model,
        inputs,
        return_dict_in_generate=True,
        output_hidden_states=True,
        output_attentions=True,
        output_logits=True,
    )
    assert len(out.hidden_states) == len(out.attentions) == NEW
    length = inputs["input_ids"].shape[1]
    assert out.attentions[0][0].shape == (1, 8, length, length)
    assert out.attentions[-1][0].shape == (1, 8, 1, length + NEW - 1)
    assert [state.shape[1] for state in (out.hidden_states[0][0], out.hidden_states[1][0])] == [length, 1]
    with torch.no_grad():
        whole = model(**inputs).logits[:, -1]
    assert torch.allclose(out.logits[0], whole, atol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input_ids": torch.tensor([[5, 5, 5]])}, "0 `image_pad` tokens, but its media have 1 frames"),
        (
            {"input_ids": torch.tensor([[IMAGE_PAD, IMAGE_PAD, 5]])},
            "2 `image_pad` tokens, but its media have 1 frames",
        ),
        ({"pixel_values": torch.zeros(15, 48)}, r"`pixel_values` has shape \[15, 48\]; expected \[16, 48\]"),
        ({"pixel_values": torch.zeros(16, 768)}, r"expected \[16, 48\]"),
        ({"grid_thw": torch.tensor([[1, 2, 8], [1, 4, 4]])}, r"expected \[32, 48\]"),
        ({"grid_thw": torch.tensor([[1, 1, 16]])}, r"the row \[1, 1, 16\]; expected .* multiples of the merge size 2"),
        ({"grid_thw": None}, "`pixel_values` came without `grid_thw`"),
        ({"image_features": torch.zeros(4, 64)}, "`image_features` and `pixel_values` were both given; expected one"),
        (
            {"image_features": torch.zeros(4, 64), "pixel_values": None, "grid_thw": None},
            "`image_features` came without `grid_thw`",
        ),
        (
            {"image_features": torch.zeros(16, 64), "pixel_values": None},
            r"`image_features` has shape \[16, 64\]; expected \[4, 64\]",
        ),
        ({"image_features": torch.zeros(4, 32), "pixel_values": None}, r"expected \[4, 64\]"),
        (
            {"pixel_values": torch.zeros(16, 48, dtype=torch.uint8)},
            r"`image_mean` has shape None; expected \[1, 3\]: `pixel_values` are uint8 pixels",
        ),
        (
            {"image_std": [[1.0, 1.0, 1.0]]},
            r"`image_std` has shape \[1, 3\]; expected none: `pixel_values` are not uint8",
        ),
        ({"media_nums_per_sample": [2]}, r"`media_nums_per_sample` is \[2\]; expected 1 numbers"),
        (
            {"attention_mask": torch.ones(1, 4, dtype=torch.long)},
            r"`attention_mask` has shape \[1, 4\]; expected \[1, 3\]",
        ),
        (
            {"cross_attention_mask": torch.ones(1, 1, 4, 1, dtype=torch.bool)},
            r"`cross_attention_mask` has shape \[1, 1, 4, 1\]",
        ),
        ({"cross_attention_mask": torch.ones(1, 1, 3, 1)}, "dtype torch.float32; expected bool"),
        (
            {"cross_attention_mask": torch.zeros(1, 1, 3, 2, dtype=torch.bool)},
            "2 frame columns, and sample 0 has 1 of these frames",
        ),
        ({"cross_attention_mask": torch.zeros(1, 1, 3, 0, dtype=torch.bool)}, "0 frame columns"),
        ({"cross_attention_mask": torch.zeros(2, 1, 3, 1, dtype=torch.bool)}, r"expected bool \[1, 1, 3, frames\]"),
        ({"vision_chunked_length": 0}, "`vision_chunked_length` is 0"),
        (
            {"position_ids": torch.zeros(1, 2, dtype=torch.long)},
            r"`position_ids` has shape \[1, 2\]; expected \[1, 3\]",
        ),
    ],
)
def test_inputs_that_do_not_fit(change, message):
    """Before the first block of the encoder is run."""
    model = make_model()
    hook = model.model.visual.blocks[0].register_forward_hook(lambda *args: pytest.fail("computed before checking"))
    inputs = Sample("tFt", (1, 4, 4)).inputs() | change
    with pytest.raises(ValueError, match=message):
        model(**inputs)
    if not {"vision_chunked_length", "position_ids"} & set(change):
        with pytest.raises(ValueError, match=message):
            run(model, inputs)
    hook.remove()


def test_a_cache_of_another_model_is_an_error(model):
    cache = DynamicCache()
    for layer in range(6):
        cache.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), layer)
    with pytest.raises(ValueError, match="a cache that this model filled"):
        model(torch.tensor([[5]]), past_key_values=cache)


@pytest.mark.parametrize(
    "name, near", [("pixle_values", "pixel_values"), ("max_new_token", "max_new_tokens"), ("zzz", "")]
)
def test_unknown_keywords(model, name, near):
    with pytest.raises(
        ValueError, match=f"`{name}` is neither .*" + (f"did you mean `{near}`" if near else "generate`$")
    ):
        run(model, assorted_samples()[1].inputs(), **{name: 1})
