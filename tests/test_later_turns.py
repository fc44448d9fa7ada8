"""Later turns on a kept cache, as processors, trainers and servers pass them. Expected numbers are the oracle's."""

import copy

import pytest
import torch
import transformers
from tiny import IMAGE_PAD, Sample, batch
from transformers import DynamicCache
from turns import _no_gradients, close, crop, expected, frames_of, media_of, model, oracle  # noqa: F401 - fixtures

from moss_vl.modeling_moss_vl import CACHE


V5 = transformers.__version__ >= "5"
GENERATE = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


# masks of later turns


@pytest.mark.parametrize("with_mask", [True, False])
def test_a_text_turn_as_the_processor_returns_it(model, oracle, with_mask):
    """One image, then a question with a blank medium, which the whole mask hides: the image stays visible."""
    first, second = Sample("tFt", (1, 4, 4), seed=1), Sample("ttt", seed=3)
    cache = model(**first.inputs(), use_cache=True)[CACHE]
    inputs = second.inputs() | {"attention_mask": torch.ones(1, 6, dtype=torch.long)}
    if not with_mask:
        del inputs["cross_attention_mask"]
    close(model(**inputs, past_key_values=cache).logits[0], expected(oracle, first, second)[3:])
    close(model(torch.tensor([[7]]), past_key_values=cache).logits[0], expected(oracle, first, second, more=[7])[-1:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_of_the_new_turn_is_not_one_of_the_conversation(model, oracle, side):
    """Row 0 has the image of the first turn, row 1 that of the second: the new turn's mask has as many columns as
    either."""
    firsts, seconds = (
        [Sample("tFt", (1, 4, 4), seed=1), Sample("ttt", seed=2)],
        [Sample("tt", seed=3), Sample("tFt", (1, 4, 6), seed=4)],
    )
    before, inputs = batch(firsts, "left"), batch(seconds, side)
    cache = model(**before, use_cache=True)[CACHE]
    inputs["attention_mask"] = torch.cat([before["attention_mask"], inputs["attention_mask"]], dim=1)
    logits = model(**inputs, past_key_values=cache).logits
    for row, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
        real = inputs["attention_mask"][row, 3:].bool()
        close(logits[row, real], expected(oracle, first, second)[3:])


def test_a_mask_of_the_conversation_hides_frames_that_were_visible(model, oracle):
    """Without media in the call, the columns are the frames of the conversation; later tokens see the same as its last
    row."""
    sample = Sample("tFFt", (1, 4, 4), (1, 4, 6), seed=1)
    for rows in (2, 6):  # those of the call, or of the conversation
        cache = model(**sample.inputs(), use_cache=True)[CACHE]
        mask = torch.ones(1, 1, rows, 2, dtype=torch.bool)
        mask[0, 0, -1, 1] = mask[0, 0, -2] = False  # the last token sees the second frame alone
        got = model(torch.tensor([[7, 8]]), cross_attention_mask=mask, past_key_values=cache).logits[0]
        after = model(torch.tensor([[9]]), past_key_values=cache).logits[0]
        visible = [[], [0], [0, 1], [0, 1], [0, 1], [1], [1]]
        want = expected(oracle, sample, more=[7, 8, 9], visible=visible)
        close(torch.cat([got, after]), want[4:])


def test_a_mask_shorter_than_the_text(model, oracle):
    """A completion that was appended after the processor sees what the prompt's last token saw, and its frames."""
    sample = Sample("tFtFtt", (1, 4, 4), (1, 4, 6), seed=1)
    inputs = sample.inputs()
    mask = inputs["cross_attention_mask"]
    hidden = mask.clone()
    hidden[:, :, :3, 0] = True  # the first frame, up to the prompt's end
    for given, visible in (
        (mask[:, :, :3], None),
        (mask[:, :, :0], None),
        (hidden[:, :, :3], [[], [], [], [1], [1], [1]]),
    ):
        close(model(**inputs | {"cross_attention_mask": given}).logits[0], expected(oracle, sample, visible=visible))
    prompt = Sample("tFt", (1, 4, 4), seed=5)
    inputs = prompt.inputs()
    inputs["input_ids"] = torch.cat([prompt.ids, torch.tensor([7, 8])])[None]
    inputs["attention_mask"] = torch.ones(1, 5, dtype=torch.long)
    close(model(**inputs).logits[0], expected(oracle, prompt, more=[7, 8]))


@pytest.mark.parametrize("text", ["Ftt", "tFt"])
def test_a_processors_mask_of_other_padding(model, text):
    """Ids that were padded on the other side after the processor: the mask has the right shape, and is ignored."""
    samples = [Sample(text, (1, 4, 4), seed=4), Sample("FtFtttt", (1, 4, 6), (1, 2, 2), seed=3)]
    left, right = batch(samples, "left"), batch(samples, "right")
    for inputs, mask in ((left, right), (right, left)):
        real = inputs["attention_mask"].bool()
        got = model(**inputs | {"cross_attention_mask": mask["cross_attention_mask"]}).logits[real]
        assert torch.equal(got, model(**inputs | {"cross_attention_mask": None}).logits[real])


@pytest.mark.parametrize("text", ["Ftt", "tFt"])
def test_completions_joined_and_rows_shifted_to_the_left(model, oracle, text):
    """A batch of left-padded prompts gets completions, and its rows are shifted to the left: the mask is shorter, and
    for other padding."""
    samples, more = (
        [Sample(text, (1, 4, 4), seed=4), Sample("FtFtttt", (1, 4, 6), (1, 2, 2), seed=3)],
        [[7, 8, 9, 10, 11], [12]],
    )
    inputs = batch(samples, "left")
    length = max(len(sample.ids) + len(new) for sample, new in zip(samples, more, strict=True))
    ids, real = torch.zeros(2, length, dtype=torch.long), torch.zeros(2, length, dtype=torch.long)
    for row, (sample, new) in enumerate(zip(samples, more, strict=True)):
        tokens = [*sample.ids.tolist(), *new]
        ids[row, : len(tokens)], real[row, : len(tokens)] = torch.tensor(tokens), 1
    logits = model(**inputs | {"input_ids": ids, "attention_mask": real}).logits
    for row, (sample, new) in enumerate(zip(samples, more, strict=True)):
        close(logits[row, real[row].bool()], expected(oracle, sample, more=new))


def test_a_mask_that_contradicts_the_text_is_an_error(model):
    samples = [Sample("FtF", (1, 4, 4), (1, 2, 2), seed=4), Sample("FtFtttt", (1, 4, 6), (1, 2, 2), seed=3)]
    inputs = batch(samples, "left")
    mask = inputs["cross_attention_mask"]
    for row, token, frame, why in ((1, 1, 1, "before the frame's `image_pad`"), (0, 0, 0, "which is padding")):
        other = mask.clone()
        other[row, 0, -1, 0] = True  # no processor makes this mask
        other[row, 0, token, frame] = False
        with pytest.raises(
            ValueError, match=f"makes frame {frame} of sample {row} visible to token {token} of this call, {why}"
        ):
            model(**inputs | {"cross_attention_mask": other})


# padding and waiting


def test_a_row_of_padding_alone_keeps_its_frames(model, oracle):
    """Chunks of a right-padded prompt, a turn in which a row has only padding, a decode step with and without a
    mask."""
    samples = [Sample("tFt", (1, 4, 4), seed=1), Sample("ttFtttt", (1, 4, 6), seed=2)]
    inputs = batch(samples, "right")
    visual, mask = {name: inputs[name] for name in ("pixel_values", "grid_thw")}, inputs["attention_mask"]
    cache = DynamicCache()
    for part in (slice(0, 4), slice(4, 7)):
        model(inputs["input_ids"][:, part], attention_mask=mask[:, : part.stop], past_key_values=cache, **visual)
        visual = {}
    for tokens, real, frame_mask in (
        ([0, 8], [0, 1], None),
        ([0, 9], [0, 1], torch.tensor([True, False])),
        ([7, 5], [1, 1], None),
    ):
        mask = torch.cat([mask, torch.tensor(real)[:, None]], dim=1)
        frame_mask = None if frame_mask is None else frame_mask[:, None, None, None]
        logits = model(
            torch.tensor(tokens)[:, None], attention_mask=mask, past_key_values=cache, cross_attention_mask=frame_mask
        ).logits
    close(logits[0], expected(oracle, samples[0], more=[7])[-1:])
    close(logits[1], expected(oracle, samples[1], more=[8, 9, 5])[-1:])


def test_ended_rows_continue_without_their_padding(model, oracle):
    """Tokens written to a row after its end are padding in the next turn's mask: they have no effect and no
    position."""
    firsts, seconds = (
        [Sample("tFt", (1, 4, 4), seed=1), Sample("ttFtt", (1, 4, 6), seed=2)],
        [Sample("ttt", seed=3), Sample("tFt", (1, 2, 4), seed=4)],
    )
    inputs = batch(firsts, "left")
    cache = model(**inputs, use_cache=True)[CACHE]
    written, mask = torch.tensor([[7, 0, 0], [7, 8, 9]]), inputs["attention_mask"]
    mask = torch.cat([mask, torch.ones_like(written)], dim=1)
    for step in range(3):
        model(written[:, step : step + 1], attention_mask=mask[:, : 6 + step], past_key_values=cache)
    mask[0, -2:] = 0
    more = batch(seconds, "left")
    mask = torch.cat([mask, more["attention_mask"]], dim=1)
    logits = model(**more | {"attention_mask": mask}, past_key_values=cache).logits
    for row, kept in enumerate((1, 3)):
        answer = Sample("t", seed=0)
        answer.ids = written[row, :kept]
        close(logits[row], expected(oracle, firsts[row], answer, seconds[row])[-3:])
    step = torch.tensor([[5], [6]])
    logits = model(
        step, attention_mask=torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1), past_key_values=cache
    ).logits
    for row, kept in enumerate((1, 3)):
        answer = Sample("t", seed=0)
        answer.ids = written[row, :kept]
        close(logits[row], expected(oracle, firsts[row], answer, seconds[row], more=step[row].tolist())[-1:])


@pytest.mark.parametrize("length", [6, 7, 8])
def test_a_crop_into_the_turn_after_a_row_ended(model, oracle, length):
    """The padding of the ended row is subtracted once, not again after the crop."""
    first = Sample("tFt", (1, 4, 4), seed=1)
    cache = model(**first.inputs(), use_cache=True)[CACHE]
    model(torch.tensor([[7, 8]]), past_key_values=cache)
    mask = torch.tensor([[1, 1, 1, 1, 0, 1, 1, 1]])  # 8 was written after the row's end
    model(torch.tensor([[5, 6, 9]]), attention_mask=mask, past_key_values=cache)
    crop(cache, length)
    mask = torch.cat([mask[:, :length], torch.ones(1, 1, dtype=torch.long)], dim=1)
    got = model(torch.tensor([[4]]), attention_mask=mask, past_key_values=cache).logits[0]
    close(got, expected(oracle, first, more=[7, 5, 6, 9][: length - 4] + [4])[-1:])


def test_waiting_frames_change_no_other_sample(model, oracle):
    samples, late = (
        [Sample("tFt", (1, 4, 4), seed=1), Sample("ttFttt", (1, 4, 6), seed=2)],
        Sample("F", (1, 4, 8), seed=3),
    )
    inputs = batch(samples, "left")
    cache, mask = model(**inputs, use_cache=True)[CACHE], inputs["attention_mask"]
    for ids, visual in (
        ([[7, 8], [9, 10]], media_of(late) | {"media_nums_per_sample": [1, 0]}),
        ([[IMAGE_PAD], [11]], {}),
    ):
        mask = torch.cat([mask, torch.ones_like(torch.tensor(ids))], dim=1)
        logits = model(torch.tensor(ids), attention_mask=mask, past_key_values=cache, **visual).logits
    text = Sample("tt", seed=0)
    text.ids = torch.tensor([7, 8])
    close(logits[0], expected(oracle, samples[0], text, late)[-1:])
    close(logits[1], expected(oracle, samples[1], more=[9, 10, 11])[-1:])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_an_image_of_zeros_whose_text_comes_later(model, oracle, size):
    """It cannot be distinguished from a blank medium until its `image_pad` comes."""
    sample = Sample("tttFtt", (1, 4, 4), seed=1)
    sample.pixel_values = torch.zeros_like(sample.pixel_values)
    cache, rows, visual = DynamicCache(), [], {"pixel_values": sample.pixel_values, "grid_thw": sample.grid_thw}
    for first in range(0, 6, size):
        rows.append(model(sample.ids[None, first : first + size], past_key_values=cache, **visual).logits)
        visual = {}
    close(torch.cat(rows, dim=1)[0], expected(oracle, sample))


@pytest.mark.parametrize("encoded", [False, True])
def test_frames_that_come_one_by_one_before_their_text(model, oracle, encoded):
    """As pixels or encoded; each waits for its `image_pad` in the order in which it came."""
    frames, cache = [Sample("F", (1, 4, 4), seed=1), Sample("F", (1, 4, 8), seed=2)], DynamicCache()
    for token, frame in zip((5, 6), frames, strict=True):
        visual = media_of(frame)
        if encoded:
            visual["image_features"] = model.get_image_features(visual.pop("pixel_values"), frame.grid_thw)
        model(torch.tensor([[token]]), past_key_values=cache, **visual)
    logits = model(torch.tensor([[IMAGE_PAD, 7, IMAGE_PAD, 8]]), past_key_values=cache).logits[0]
    close(logits, oracle.logits([5, 6, IMAGE_PAD, 7, IMAGE_PAD, 8], frames_of(oracle, *frames))[2:])


def test_images_of_zeros_of_several_sizes_that_wait(model, oracle):
    """If all are placed together they are determined; one of them alone is not, as the other may be a blank medium."""
    frames = [Sample("F", grid, seed=1) for grid in ((1, 4, 4), (1, 2, 6))]
    for text in ([IMAGE_PAD, 7, IMAGE_PAD], [IMAGE_PAD, 7]):
        cache = DynamicCache()
        for frame in frames:
            frame.pixel_values = torch.zeros_like(frame.pixel_values)
            model(torch.tensor([[5]]), past_key_values=cache, **media_of(frame))
        if len(text) == 3:
            got = model(torch.tensor([text]), past_key_values=cache).logits[0]
            close(got, oracle.logits([5, 5, *text], frames_of(oracle, *frames))[2:])
        else:
            with pytest.raises(ValueError, match="has 2 media of zeros that came without an `image_pad`"):
                model(torch.tensor([text]), past_key_values=cache)


def test_blank_media_hold_no_pixels_of_other_media(model):
    """Another row of the batch has an image. Blank media of many turns share one copy."""
    inputs = batch([Sample("tFt", (1, 4, 4), seed=1), Sample("ttt", seed=2)], "left")
    cache = model(**inputs, use_cache=True)[CACHE]
    for _ in range(3):
        more = batch([Sample("tt", seed=3), Sample("tt", seed=4)], "left")
        model(**more | {"attention_mask": None, "cross_attention_mask": None}, past_key_values=cache)
    kept = [medium.pixel_values for media in cache.layers[1].state.unplaced for medium in media]
    assert len(kept) == 7 and len({pixels.data_ptr() for pixels in kept}) == 2
    assert all(pixels.untyped_storage().nbytes() == 16 * 48 * 4 for pixels in kept)


def test_a_blank_medium_is_no_frame_of_a_later_turn(model, oracle):
    blank, image = Sample("ttt", seed=1), Sample("tFt", (1, 4, 6), seed=2)
    cache = model(**blank.inputs(), use_cache=True)[CACHE]
    close(
        model(image.ids[None], past_key_values=cache, **media_of(image)).logits[0], expected(oracle, blank, image)[3:]
    )


def test_several_black_frames_without_an_image_pad_are_an_error(model):
    frames = Sample("ttt", seed=1).inputs() | {
        "pixel_values": torch.zeros(32, 48),
        "grid_thw": torch.tensor([[2, 4, 4]]),
    }
    del frames["cross_attention_mask"]
    with pytest.raises(ValueError, match="0 `image_pad` tokens, but its media have 2 frames"):
        model(**frames)


# generate


def greedy(oracle, samples, more=()):
    new = []
    for _ in range(GENERATE["max_new_tokens"]):
        new.append(int(expected(oracle, *samples, more=[*more, *new])[-1].argmax()))
    return new


@pytest.mark.skipif(not V5, reason="transformers 4 prefills in chunks only from an empty cache")
@pytest.mark.parametrize("size", [1, 2, 3, 64])
@pytest.mark.parametrize("with_mask", [True, False])
def test_a_second_turn_in_chunks(model, oracle, size, with_mask):
    """Its frames are in different chunks, and its mask covers only these frames."""
    first, second = Sample("tFt", (1, 4, 4), seed=1), Sample("FtttFt", (1, 4, 4), (1, 4, 6), seed=2)
    cache = DynamicCache()
    out = model.generate(**first.inputs(), **{CACHE: cache}, **GENERATE)
    written = Sample("t", seed=0)
    written.ids = out[0, 3:]
    inputs = media_of(second) | (
        {"cross_attention_mask": second.inputs()["cross_attention_mask"]} if with_mask else {}
    )
    ids = torch.cat([out, second.ids[None]], dim=1)
    got = model.generate(ids, **inputs, **{CACHE: cache}, **GENERATE, prefill_chunk_size=size)
    assert got[0, ids.shape[1] :].tolist() == greedy(oracle, [first, written, second])


@pytest.mark.parametrize("kind", ["text", "image"])
def test_a_second_turn_as_the_processor_returns_it(model, oracle, kind):
    """With its mask, and its blank medium if it has no image: the image of the first turn stays visible."""
    first, cache = Sample("tFt", (1, 4, 4), seed=1), DynamicCache()
    second = Sample("tttt", seed=2) if kind == "text" else Sample("tFtt", (1, 4, 6), seed=2)
    out = model.generate(**first.inputs(), **{CACHE: cache}, **GENERATE)
    written = Sample("t", seed=0)
    written.ids = out[0, 3:]
    inputs = second.inputs() | {"input_ids": torch.cat([out, second.ids[None]], dim=1)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    got = model.generate(**inputs, **{CACHE: cache}, **GENERATE)
    assert got[0, inputs["input_ids"].shape[1] :].tolist() == greedy(oracle, [first, written, second])


@pytest.mark.skipif(V5, reason="transformers 5 prefills a kept cache in chunks")
def test_a_second_turn_in_chunks_is_refused_by_transformers_4(model):
    cache = DynamicCache()
    out = model.generate(**Sample("tFt", (1, 4, 4)).inputs(), **{CACHE: cache}, **GENERATE)
    with pytest.raises(
        ValueError, match="`prefill_chunk_size` came with a cache that holds 6 tokens; expected an empty one"
    ):
        model.generate(
            torch.cat([out, torch.tensor([[5, 6]])], dim=1), **{CACHE: cache}, **GENERATE, prefill_chunk_size=2
        )


@pytest.mark.parametrize("side", ["left", "right"])
def test_only_left_padding_is_generated_from(model, side):
    inputs = batch([Sample("tFt", (1, 4, 4), seed=1), Sample("ttFtttt", (1, 4, 6), seed=2)], side)
    for given in (inputs, {name: value for name, value in inputs.items() if name != "attention_mask"}):
        if side == "left":
            model.generate(**given, **GENERATE)
        else:
            with pytest.raises(ValueError, match="padded on the right.*expected padding on the left"):
                model.generate(**given, **GENERATE)


def test_a_turn_without_anything_new_is_an_error(model):
    cache = DynamicCache()
    out = model.generate(**Sample("tFt", (1, 4, 4)).inputs(), **{CACHE: cache}, **GENERATE)
    ids = out[:, : cache.get_seq_length()]
    with pytest.raises(ValueError, match="at least one token that the cache does not hold"):
        model.generate(ids, **{CACHE: cache}, **GENERATE)
    if not V5:
        with pytest.raises(ValueError, match="those of the whole conversation"):
            mask = torch.ones(1, ids.shape[1] + 2, dtype=torch.long)
            model.generate(torch.tensor([[5, 6]]), attention_mask=mask, **{CACHE: cache}, **GENERATE)


def test_a_new_turn_taken_for_the_conversation_is_an_error(model):
    """A new turn alone, longer than the cache: its beginning would be cut off."""
    cache = model(**Sample("tFt", (1, 4, 4), seed=1).inputs(), use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="is not the conversation that the cache holds: token 2 is"):
        model.generate(Sample("tttttt", seed=2).ids[None], **{CACHE: cache}, **GENERATE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_that_count_tokens_are_replaced_by_xrope(model, oracle, side):
    """As trainers and servers compute them from the mask, in a prompt and in a decode step."""
    samples = [Sample("tFtt", (1, 4, 4), seed=1), Sample("ttFtttt", (1, 4, 6), seed=2)]
    inputs = batch(samples, side)
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    out = model(**inputs, position_ids=positions, use_cache=True)
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
    step = model(
        torch.tensor([[7], [8]]),
        attention_mask=mask,
        past_key_values=out[CACHE],
        position_ids=mask.sum(1, keepdim=True) - 1,
    )
    for row, sample in enumerate(samples):
        want = expected(oracle, sample, more=[7 + row])
        close(torch.cat([out.logits[row, inputs["attention_mask"][row].bool()], step.logits[row]]), want)
    by_index = model(**inputs, position_ids=torch.arange(mask.shape[1] - 1)[None]).logits  # columns of the row instead
    assert torch.allclose(by_index[mask[:, :-1].bool()], out.logits[mask[:, :-1].bool()], atol=1e-5)
    alone = samples[0].inputs() | {"position_ids": torch.arange(4)[None]}
    close(model(**alone).logits[0], expected(oracle, samples[0]))


def test_counting_rows_beside_rows_of_other_positions(model, oracle):
    """Every row is read separately: XRoPE's positions, counts, and other positions."""
    samples = [Sample("ttFtttt", (1, 4, 6), seed=1), Sample("ttFFFttttt", (3, 4, 4), seed=2), Sample("tttt", seed=3)]
    inputs = batch(samples, "right")
    del inputs["cross_attention_mask"]
    positions = torch.arange(10)[None].repeat(3, 1)
    positions[0] = model.get_rope_index(
        **{name: inputs[name] for name in ("input_ids", "grid_thw", "attention_mask", "media_nums_per_sample")}
    )[0][0, 0]
    positions[2, :4], positions[2, 4:] = torch.tensor([2, 5, 6, 9]), 500  # positions of padding have no effect
    out = model(**inputs, position_ids=positions, use_cache=True)
    for row in range(2):
        close(out.logits[row, : len(samples[row].ids)], expected(oracle, samples[row]))
    assert out.rope_deltas.tolist()[2] == 10 - 10
    moved = model(samples[2].ids[None], position_ids=positions[2:, :4]).logits[0]
    close(out.logits[2, :4], moved.double())


def test_positions_of_texts_alone_with_the_processors_blank_medium(model):
    samples = [Sample("ttttttt", seed=1), Sample("ttFtttt", (1, 4, 6), seed=2)]
    inputs = batch(samples, "left")
    names = ("input_ids", "grid_thw", "attention_mask", "media_nums_per_sample")
    positions, vision, deltas = model.get_rope_index(**{name: inputs[name] for name in names})
    assert positions[0, 0].tolist() == list(range(7)) and deltas.tolist() == [0, 3] and vision.shape[2] == 7
    with pytest.raises(ValueError, match="`grid_thw` came without `pixel_values` or `image_features`"):
        model(inputs["input_ids"], grid_thw=inputs["grid_thw"])


@pytest.mark.parametrize(
    "kwargs", [{"prompt_lookup_num_tokens": 3}, {"assistant": True}, {"num_beams": 2}, {"use_cache": False}]
)
def test_generate_with_positions(model, kwargs):
    """Positions of the prompt are continued over candidates, beams and steps."""
    sample, kwargs = Sample("tFtttFt", (1, 4, 6), (1, 4, 4), seed=5), dict(kwargs) | {"eos_token_id": 199}
    if kwargs.pop("assistant", False):
        kwargs["assistant_model"] = copy.deepcopy(model)
    positions = model.get_rope_index(sample.ids[None], sample.grid_thw)[0][:, 0]
    want = model.generate(**sample.inputs(), **GENERATE, **kwargs)
    for given in (positions, torch.arange(7)[None]):
        got = model.generate(
            **sample.inputs(),
            position_ids=given if given.ndim == 2 and len(given) == 1 else given[0][None],
            **GENERATE,
            **kwargs,
        )
        assert torch.equal(got[:, : want.shape[1]], want)


# empty and renamed


@pytest.mark.parametrize("shape", [(1, 0), (0, 3)])
def test_no_text_is_an_error(model, shape):
    with pytest.raises(ValueError, match=rf"The text has shape \[{shape[0]}, {shape[1]}\]; expected at least one"):
        model(torch.zeros(shape, dtype=torch.long))


def test_empty_media_equal_no_media(model, oracle):
    text = Sample("ttt", seed=1)
    empty = {"pixel_values": torch.zeros(0, 48), "grid_thw": torch.zeros(0, 3, dtype=torch.long)}
    for more in ({}, {"media_nums_per_sample": [0]}, {"use_cache": True}):
        close(model(text.ids[None], **empty, **more).logits[0], expected(oracle, text))


def test_the_grid_has_another_name(model):
    inputs = Sample("tFt", (1, 4, 4), seed=1).inputs()
    renamed = {name: value for name, value in inputs.items() if name != "grid_thw"} | {
        "image_grid_thw": inputs["grid_thw"]
    }
    types = {"token_type_ids": inputs["input_ids"] * 0, "mm_token_type_ids": (inputs["input_ids"] == IMAGE_PAD).long()}
    assert torch.equal(model(**renamed, **types).logits, model(**inputs).logits)
    assert torch.equal(model.generate(**renamed, **GENERATE), model.generate(**inputs, **GENERATE))
    with pytest.raises(ValueError, match="given twice, as `grid_thw` and as `image_grid_thw`"):
        model(**renamed, grid_thw=inputs["grid_thw"])
