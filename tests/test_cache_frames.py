"""Frames that are appended to a cache, dropped from it, or shared with forks. Expected numbers are the oracle's, or
those of one forward without a cache."""

import copy
import io

import pytest
import torch
from tiny import IMAGE_PAD, Sample, make_model
from transformers import DynamicCache, StaticCache
from turns import _no_gradients, close, crop, expected, frames_of, media_of, model, oracle  # noqa: F401 - fixtures

from moss_vl import vision_sequence
from moss_vl.cache_layers import cache_contents
from moss_vl.generation_hooks import TAKES_NEW_TURN
from moss_vl.modeling_moss_vl import CACHE
from moss_vl.vision_sequence import VISION_BUFFER, FrameSet


GRIDS = [(1, 4, 4), (1, 2, 4), (1, 4, 6)]


def frame_blocks(count: int, text="tFt") -> list[Sample]:
    """Turns of one frame each."""
    return [Sample(text, GRIDS[i % len(GRIDS)], seed=i) for i in range(count)]


def together(samples: list[Sample]) -> dict:
    """The media of several turns as those of one call."""
    return {
        "pixel_values": torch.cat([sample.pixel_values for sample in samples]),
        "grid_thw": torch.cat([sample.grid_thw for sample in samples]),
    }


def vision_layers(cache) -> list:
    return [cache.layers[index] for index in (1, 4)]


def where(cache) -> list[int]:
    """The addresses of the vision keys and values."""
    return [part.data_ptr() for layer in vision_layers(cache) for part in (layer.keys, layer.values)]


def say(model, cache, *tokens):
    return model(torch.tensor([tokens]), past_key_values=cache).logits[0]


@pytest.fixture(params=[VISION_BUFFER, 2])
def vision_buffer(request, monkeypatch):
    """With few free tokens, frames move often."""
    monkeypatch.setattr(vision_sequence, "VISION_BUFFER", request.param)
    return request.param


# Appending


@pytest.mark.parametrize("cuts", [(), (1, 2, 3, 4, 5, 6, 7, 8), (5,), (1, 7), (3, 4, 8)])
def test_frames_appended_in_any_cutting_equal_one_forward(model, vision_buffer, cuts):
    blocks = frame_blocks(9)
    ids = torch.cat([block.ids for block in blocks])[None]
    whole = model(ids, **together(blocks)).logits[0]
    cache, logits = DynamicCache(), []
    for first, end in zip((0, *cuts), (*cuts, len(blocks)), strict=True):
        part = blocks[first:end]
        ids = torch.cat([block.ids for block in part])[None]
        logits.append(model(ids, past_key_values=cache, **together(part)).logits[0])
    assert (torch.cat(logits) - whole).abs().max() < 1e-5 * whole.abs().max()


def test_the_first_frames_get_no_free_space(model):
    blocks = frame_blocks(3)
    cache = model(torch.cat([block.ids for block in blocks])[None], **together(blocks), use_cache=True)[CACHE]
    assert {layer.keys.shape[2] for layer in vision_layers(cache)} == {5 + 3 + 7}
    assert model.cache_contents(cache).vision_tokens == [5 + 3 + 7]


def count_copies(cache, calls) -> tuple[int, int]:
    """Runs calls. Returns how often the buffers were replaced, and the tokens of all replaced buffers."""
    times = tokens = 0
    for call in calls:
        before = [layer.keys for layer in vision_layers(cache)]  # held, so that no other tensor gets their address
        call()
        same = [layer.keys is keys for layer, keys in zip(vision_layers(cache), before, strict=True)]
        assert all(same) or not any(same)
        if not any(same):
            times, tokens = times + 1, tokens + before[0].shape[2]
    return times, tokens


def test_appended_frames_rarely_copy_the_cache(model, monkeypatch):
    """Without free space, 200 frames would copy 200 * 1,000 / 2 tokens."""
    monkeypatch.setattr(vision_sequence, "VISION_BUFFER", 16)
    blocks = [Sample("F", (1, 4, 4), seed=i) for i in range(201)]
    cache = model(**blocks[0].inputs(), use_cache=True)[CACHE]
    times, tokens = count_copies(
        cache,
        [lambda block=block: model(block.ids[None], past_key_values=cache, **media_of(block)) for block in blocks[1:]],
    )
    appended = 200 * 5
    assert times < 40 and tokens < 9 * appended


def test_frames_appended_to_one_sample_rarely_move_another(model, oracle, monkeypatch):
    """Sample 0 gets a frame per call; sample 1 once in a while. All logits are right."""
    first = [Sample("tFtt", (1, 4, 4), seed=50), Sample("tFFt", (2, 4, 4), seed=51)]
    inputs = {
        "input_ids": torch.stack([sample.ids for sample in first]),
        **together(first),
        "media_nums_per_sample": [1, 1],
    }
    cache = model(**inputs, use_cache=True)[CACHE]
    monkeypatch.setattr(vision_sequence, "VISION_BUFFER", 64)
    turns = [
        [
            Sample("Ft", (1, 4, 4), seed=i),
            Sample("Ft" if i % 4 == 0 else "tt", *[(1, 2, 4)][: i % 4 == 0], seed=60 + i),
        ]
        for i in range(40)
    ]
    logits = []

    def call(pair):
        given = [sample for sample in pair if sample.frames]
        logits.append(
            model(
                torch.stack([sample.ids for sample in pair]),
                past_key_values=cache,
                **together(given),
                media_nums_per_sample=[sample.frames for sample in pair],
            ).logits
        )

    times, _ = count_copies(cache, [lambda pair=pair: call(pair) for pair in turns])
    assert times <= 5
    for row in range(2):
        samples = [first[row], *(pair[row] for pair in turns)]
        ids = [token for sample in samples for token in sample.ids.tolist()]
        with_frames = [sample for sample in samples if sample.frames]
        want = oracle.logits(ids, frames_of(oracle, *with_frames))
        close(torch.cat([part[row] for part in logits]), want[4:])


def test_appending_computes_gradients(model, vision_buffer):
    blocks = frame_blocks(4)
    with torch.enable_grad():
        weight = model.model.visual.blocks[0].mlp.linear_fc1.weight
        cache, loss = DynamicCache(), 0.0
        for block in blocks:
            loss = loss + model(block.ids[None], past_key_values=cache, **media_of(block)).logits.sum()
        gradient = torch.autograd.grad(loss, weight)[0]
        ids = torch.cat([block.ids for block in blocks])[None]
        whole = torch.autograd.grad(model(ids, **together(blocks)).logits.sum(), weight)[0]
    assert torch.allclose(gradient, whole, atol=1e-4 * whole.abs().max())


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
@pytest.mark.parametrize("layer", ["layers.0.self_attn", "layers.1.cross_attn"])
def test_gradients_of_one_projection(layer, name):
    """Autograd keeps keys and values, also those that need no gradient themselves; later calls, with gradients or
    without, must not write into them."""
    model = make_model().requires_grad_(False)
    weight = model.model.language_model.get_submodule(f"{layer}.{name}").weight.requires_grad_(True)
    blocks = frame_blocks(4)
    with torch.enable_grad():
        cache, loss = DynamicCache(), 0.0
        for block in blocks:
            loss = loss + model(block.ids[None], past_key_values=cache, **media_of(block)).logits.sum()
        with torch.no_grad():
            model(blocks[0].ids[None], past_key_values=cache, **media_of(blocks[0]))
        gradient = torch.autograd.grad(loss, weight)[0]
        ids = torch.cat([block.ids for block in blocks])[None]
        whole = torch.autograd.grad(model(ids, **together(blocks)).logits.sum(), weight)[0]
    assert torch.allclose(gradient, whole, atol=1e-4 * whole.abs().max())


# Dropping


def windowed_mask(blocks: list[Sample], window: int) -> torch.Tensor:
    """`cross_attention_mask` in which each token sees the last `window` frames at or before its turn, without those
    that come after it."""
    lengths = [len(block.ids) for block in blocks]
    mask = torch.ones(1, 1, sum(lengths), len(blocks), dtype=torch.bool)
    start = 0
    for number, block in enumerate(blocks):
        for at, token in enumerate(block.ids.tolist()):
            placed = number + (IMAGE_PAD in block.ids[: at + 1])
            # The oldest frame is dropped after each turn, so in its turn a frame is the first beyond the window.
            mask[0, 0, start + at, max(0, number - window) : placed] = False
        start += lengths[number]
    return mask


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("window", [1, 3])
def test_a_window_equals_a_mask_that_hides_what_is_gone(model, vision_buffer, window, kind):
    blocks = frame_blocks(14)
    ids = torch.cat([block.ids for block in blocks])[None]
    whole = model(ids, **together(blocks), cross_attention_mask=windowed_mask(blocks, window)).logits[0]
    config = model.config.text_config
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=config, max_cache_len=64)
    logits = []
    for block in blocks:
        logits.append(model(block.ids[None], past_key_values=cache, **media_of(block)).logits[0])
        contents = model.cache_contents(cache)
        model.drop_frames(cache, max(0, contents.frames[0] - window))
    assert (torch.cat(logits) - whole).abs().max() < 1e-5 * whole.abs().max()
    contents = model.cache_contents(cache)
    assert (contents.frames, contents.dropped, contents.waiting) == ([window], [14 - window], [0])
    assert contents.frame_tokens == [[{0: 5, 1: 3, 2: 7}[i % 3] for i in range(14 - window, 14)]]
    assert contents.text_tokens == len(ids[0])


def test_a_window_needs_a_bounded_buffer_that_is_rarely_copied(model):
    blocks = [Sample("F", (1, 4, 4), seed=i) for i in range(400)]
    cache = model(**blocks[0].inputs(), use_cache=True)[CACHE]
    sizes = set()

    def call(block):
        model(block.ids[None], past_key_values=cache, **media_of(block))
        model.drop_frames(cache, max(0, model.cache_contents(cache).frames[0] - 40))
        sizes.add(vision_layers(cache)[0].keys.shape[2])

    times, _ = count_copies(cache, [lambda block=block: call(block) for block in blocks[1:]])
    assert max(sizes) <= 41 * 5 + VISION_BUFFER
    assert times < 12
    assert where(cache) and model.cache_contents(cache).dropped == [360]


def test_all_frames_can_be_dropped_and_their_space_is_reclaimed(model, oracle):
    sample, late = Sample("tFFFFt", (4, 4, 6), seed=1), Sample("tFt", (1, 4, 4), seed=2)
    cache = model(**sample.inputs(), use_cache=True)[CACHE]
    before = model.cache_contents(cache)
    layers, size = 2, 2 * 2 * 16 * 4  # keys and values of two heads of 16 float32
    assert before.vision_bytes == layers * size * sum(before.vision_tokens) == layers * size * 28
    assert before.text_bytes == 4 * size * (6 + 256) and before.bytes == before.text_bytes + before.vision_bytes
    model.drop_frames(cache, 3)
    assert model.cache_contents(cache).vision_bytes == layers * size * 7
    model.drop_frames(cache, [1])
    contents = model.cache_contents(cache)
    assert (contents.frames, contents.vision_tokens, contents.vision_bytes) == ([0], [0], 0)
    got = [say(model, cache, 7), model(late.ids[None], past_key_values=cache, **media_of(late)).logits[0]]
    ids = [*sample.ids.tolist(), 7, *late.ids.tolist()]
    visible = [[], [0], [0, 1], [0, 1, 2], *[[0, 1, 2, 3]] * 2, [], [], [4], [4]]
    close(torch.cat(got), oracle.logits(ids, frames_of(oracle, sample, late), visible=visible)[6:])


def test_frames_of_one_sample_are_dropped(model, oracle):
    """Rows of the sample share its frames; the other sample keeps its."""
    samples = [Sample("tFFt", (2, 4, 4), seed=1), Sample("tFtF", (1, 4, 6), (1, 2, 4), seed=2)]
    inputs = {
        "input_ids": torch.stack([sample.ids for sample in samples]),
        **together(samples),
        "media_nums_per_sample": [1, 2],
    }
    cache = model(**inputs, use_cache=True)[CACHE]
    cache.batch_repeat_interleave(2)
    model.drop_frames(cache, [2, 1])
    logits = model(torch.tensor([[5], [6], [7], [8]]), past_key_values=cache).logits
    for row, token in enumerate((5, 6, 7, 8)):
        sample = samples[row // 2]
        visible = [list(range(int((sample.ids[: at + 1] == IMAGE_PAD).sum()))) for at in range(4)]
        visible.append([] if row < 2 else [1])
        want = oracle.logits([*sample.ids.tolist(), token], frames_of(oracle, sample), visible=visible)
        close(logits[row], want[-1:])


def test_waiting_frames_are_not_dropped(model, oracle):
    sample, late = Sample("tFt", (1, 4, 4), seed=1), Sample("F", (1, 4, 6), seed=2)
    cache = model(**sample.inputs(), use_cache=True)[CACHE]
    model(torch.tensor([[5]]), past_key_values=cache, **media_of(late))
    assert model.cache_contents(cache).waiting == [1]
    with pytest.raises(ValueError, match=r"`count` is 2; expected .* at most \[1\]"):
        model.drop_frames(cache, 2)
    model.drop_frames(cache, 1)
    got = say(model, cache, 6, IMAGE_PAD)
    ids = [*sample.ids.tolist(), 5, 6, IMAGE_PAD]
    want = oracle.logits(ids, frames_of(oracle, sample, late), visible=[[], [0], [0], [0], [], [1]])
    close(got, want[-2:])


@pytest.mark.parametrize("count", [-1, 3, True, 1.0, None, [1, 1], [3], [], "1"])
def test_a_wrong_number_of_frames_changes_nothing(model, count):
    cache = model(**Sample("tFFt", (2, 4, 4)).inputs(), use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="expected how many of the oldest frames to drop.*at most \\[2\\]"):
        model.drop_frames(cache, count)
    assert model.cache_contents(cache).frames == [2]


def test_only_filled_caches_lose_frames(model):
    with pytest.raises(ValueError, match="The cache is empty"):
        model.drop_frames(DynamicCache(), 0)
    with pytest.raises(ValueError, match="The cache is a int; expected a transformers cache"):
        model.drop_frames(3, 0)
    assert model.cache_contents(DynamicCache()).bytes == 0


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7])
def test_crop_after_a_drop(model, oracle, length):
    """Dropped frames do not come back, whatever was cropped: at the crop, 0 to 4 frames remain in the text."""
    sample, more = Sample("tFtFFF", (1, 4, 4), (3, 4, 6), seed=1), Sample("tFt", (1, 2, 6), seed=2)
    cache = model(**sample.inputs(), use_cache=True)[CACHE]
    say(model, cache, 9)
    model.drop_frames(cache, 2)
    say(model, cache, 8)
    crop(cache, length)
    kept = [*sample.ids.tolist(), 9, 8][:length]
    got = model(more.ids[None], past_key_values=cache, **media_of(more)).logits[0]
    placed = kept.count(IMAGE_PAD)
    frames = [*frames_of(oracle, sample)[:placed], *frames_of(oracle, more)]
    old = list(range(2, placed))
    before = [[], [0], [0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3], [2, 3]]
    visible = [*before[:length], old, [*old, placed], [*old, placed]]
    close(got, oracle.logits([*kept, *more.ids.tolist()], frames, visible=visible)[length:])
    contents = model.cache_contents(cache)
    assert contents.dropped == [min(2, placed)] and contents.frames == [len(old) + 1]
    model.drop_frames(cache, len(old) + 1)
    crop(cache, 1)
    assert cache_contents(cache, model.config.text_config)[1:4] == ([[]], [0], [0])


@pytest.mark.parametrize("kind", ["deep", "fork", "saved"])
def test_copies_of_a_cache_that_lost_frames(model, oracle, kind):
    sample, more = Sample("tFFFt", (3, 4, 4), seed=1), Sample("tFt", (1, 2, 6), seed=2)
    cache = model(**sample.inputs(), use_cache=True)[CACHE]
    model.drop_frames(cache, 1)
    if kind == "saved":
        memory = io.BytesIO()
        torch.save(cache, memory)
        memory.seek(0)
        other = torch.load(memory, weights_only=False)
    else:
        other = copy.deepcopy(cache) if kind == "deep" else model.fork_cache(cache)
    model.drop_frames(other, 1)
    ids, frames = [*sample.ids.tolist(), *more.ids.tolist()], frames_of(oracle, sample, more)
    prompt = [[], [0], [0, 1], [0, 1, 2], [0, 1, 2]]
    for one, old in ((cache, [1, 2]), (other, [2]), (cache, None)):
        if old is not None:
            got = model(more.ids[None], past_key_values=one, **media_of(more)).logits[0]
            close(got, oracle.logits(ids, frames, visible=[*prompt, old, [*old, 3], [*old, 3]])[5:])
    assert model.cache_contents(cache).frames == [3] and model.cache_contents(other).frames == [2]


def test_masks_count_the_frames_that_remain(model, oracle):
    """Or all frames of the conversation, if the number of columns says so."""
    sample, more = Sample("tFFFt", (3, 4, 4), seed=1), Sample("tFt", (1, 2, 6), seed=2)
    cache = model(**sample.inputs(), use_cache=True)[CACHE]
    model.drop_frames(cache, 1)
    hidden = torch.tensor([[0, 1, 1], [0, 1, 0], [0, 1, 0]]).bool()  # of frames 1, 2 and 3
    frames, ids = frames_of(oracle, sample, more), [*sample.ids.tolist(), *more.ids.tolist()]
    visible = [[], [0], [0, 1], [0, 1, 2], [0, 1, 2], [1], [1, 3], [1, 3]]
    want = oracle.logits(ids, frames, visible=visible)[5:]
    gone = torch.tensor([[False], [True], [False]])  # hidden or not, frame 0 is not there any more
    for columns in (hidden, torch.cat([gone, hidden], dim=1)):
        for before in (0, 5):
            mask = torch.cat([torch.zeros(before, columns.shape[1], dtype=torch.bool), columns])[None, None]
            fork = model.fork_cache(cache)
            got = model(more.ids[None], past_key_values=fork, cross_attention_mask=mask, **media_of(more)).logits[0]
            close(got, want)
    with pytest.raises(ValueError, match=r"has 2 frame columns, and sample 0 has 3"):
        model(more.ids[None], past_key_values=cache, cross_attention_mask=mask[..., 2:], **media_of(more))


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_continues_a_cache_that_lost_frames(model, beams):
    """With the whole conversation, its media and its frame mask as a processor makes them; with the media and text of
    the new turn alone; and step by step without a cache."""
    first, second = Sample("tFFFt", (3, 4, 4), seed=1), Sample("tFtt", (1, 2, 6), seed=2)
    cache = model(**first.inputs(), use_cache=True)[CACHE]
    model.drop_frames(cache, 2)
    ids = torch.cat([first.ids, second.ids])[None]
    whole = {**together([first, second]), "cross_attention_mask": torch.ones(1, 1, 9, 4, dtype=torch.bool)}
    for at in range(9):
        whole["cross_attention_mask"][0, 0, at, : int((ids[0, : at + 1] == IMAGE_PAD).sum())] = False
    plain = {name: value for name, value in whole.items() if name != "cross_attention_mask"}
    hidden = whole["cross_attention_mask"].clone()
    hidden[:, :, 5:, :2] = True  # what is gone
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    want = model.generate(ids, **plain, cross_attention_mask=hidden, use_cache=False, **options)
    forms = [(ids, whole), (ids, plain), (ids, media_of(second))]
    forms += [(second.ids[None], media_of(second))] * TAKES_NEW_TURN
    for text, media in forms:
        inputs = {"input_ids": text, "attention_mask": torch.ones_like(ids), **media, **options}
        got = model.generate(**inputs, past_key_values=model.fork_cache(cache))
        assert torch.equal(got[:, -4:], want[:, -4:])
    wrong = together([first, first, second])
    with pytest.raises(ValueError, match="its media have 7; expected 1, or 4 with those of the earlier turns"):
        model.generate(ids, **wrong, past_key_values=model.fork_cache(cache), **options)


def test_a_call_that_fails_while_frames_move_is_noticed(model):
    """The layers then differ in where their frames are."""
    sample, more = Sample("tFFFt", (3, 4, 4), seed=1), Sample("tFt", (1, 2, 6), seed=2)
    cache = model(**sample.inputs(), use_cache=True)[CACHE]
    model.drop_frames(cache, 1)

    def fail(*args):
        raise RuntimeError("out of memory")

    hook = model.model.language_model.layers[3].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(more.ids[None], past_key_values=cache, **media_of(more))
    hook.remove()
    crop(cache, 5)
    with pytest.raises(ValueError, match="but not their vision sequence; expected a cache that this model filled, by"):
        say(model, cache, 7)


def test_frame_sets_without_their_first_frames():
    mask = torch.tensor([True, False, True, True]).numpy()
    for frames in (FrameSet(), FrameSet(1, 3), FrameSet.from_mask(mask)):
        for count in range(6):
            assert frames.without_first(count) == FrameSet.from_mask(frames.as_mask(8)[count:])


# Forks


def test_forks_share_the_frames(model, oracle):
    """Ten questions about one video copy none of its keys."""
    sample = Sample("tFFFt", (3, 4, 4), seed=1)
    cache = model(**sample.inputs(), use_cache=True)[CACHE]
    forks = [model.fork_cache(cache) for _ in range(10)]
    forks += [model.fork_cache(forks[0])]
    for number, fork in enumerate(forks):
        got = [say(model, fork, 10 + number, 5)]
        text = fork.layers[0].keys.data_ptr()  # its own since the first call
        assert text != cache.layers[0].keys.data_ptr()
        got = torch.cat([*got, say(model, fork, 6)])
        assert fork.layers[0].keys.data_ptr() == text
        close(got, expected(oracle, sample, more=[10 + number, 5, 6])[-3:])
    assert all(where(fork) == where(cache) for fork in forks)
    close(say(model, cache, 99), expected(oracle, sample, more=[99])[-1:])


def test_the_original_appends_in_place_beside_its_forks(model, oracle):
    blocks = frame_blocks(5)
    cache = DynamicCache()
    for block in blocks[:3]:
        model(block.ids[None], past_key_values=cache, **media_of(block))
    fork, buffers = model.fork_cache(cache), where(cache)
    text = cache.layers[0].keys.data_ptr()
    model(blocks[3].ids[None], past_key_values=cache, **media_of(blocks[3]))
    assert where(cache) == buffers == where(fork) and cache.layers[0].keys.data_ptr() == text
    got = model(blocks[4].ids[None], past_key_values=fork, **media_of(blocks[4])).logits[0]
    close(got, expected(oracle, *blocks[:3], blocks[4])[-3:])
    assert not set(where(fork)) & set(buffers)
    close(say(model, cache, 7), expected(oracle, *blocks[:4], more=[7])[-1:])
    close(say(model, fork, 8), expected(oracle, *blocks[:3], blocks[4], more=[8])[-1:])


@pytest.mark.parametrize("first", ["original", "fork"])
@pytest.mark.parametrize("length", [1, 6, 9])
def test_cropped_caches_do_not_write_over_their_forks(model, oracle, first, length):
    """One of the caches goes back to a part of its text, and appends another frame there."""
    blocks, more = frame_blocks(3), Sample("tFt", (1, 2, 4), seed=9)
    cache = DynamicCache()
    for block in blocks:
        model(block.ids[None], past_key_values=cache, **media_of(block))
    ids = [token for block in blocks for token in block.ids.tolist()]
    say(model, cache, 5)
    one, whole, other = cache, model.fork_cache(cache), model.fork_cache(cache)
    if first == "fork":
        one, other = other, one
    crop(one, length)
    got = model(more.ids[None], past_key_values=one, **media_of(more)).logits[0]
    kept = ids[:length]
    frames = [*frames_of(oracle, *blocks)[: kept.count(IMAGE_PAD)], *frames_of(oracle, more)]
    close(got, oracle.logits([*kept, *more.ids.tolist()], frames)[length:])
    for left in (whole, other):
        close(say(model, left, 7), expected(oracle, *blocks, more=[5, 7])[-1:])


def test_gradients_of_the_original_do_not_reach_its_fork(model):
    blocks, cache = frame_blocks(3), DynamicCache()
    for block in blocks[:2]:
        model(block.ids[None], past_key_values=cache, **media_of(block))
    fork = model.fork_cache(cache)
    with torch.enable_grad():
        model(blocks[2].ids[None], past_key_values=cache, **media_of(blocks[2]))
    assert all(layer.keys.requires_grad for layer in cache.layers)
    assert not any(layer.keys.requires_grad for layer in fork.layers)


def test_a_fork_of_a_static_cache(model, oracle):
    sample = Sample("tFt", (1, 4, 4), seed=1)
    cache = StaticCache(config=model.config.text_config, max_cache_len=16)
    model(**sample.inputs(), past_key_values=cache)
    fork = model.fork_cache(cache)
    assert where(fork) == where(cache)
    for one, tokens in ((fork, [5, 6]), (cache, [7, 8])):
        close(torch.cat([say(model, one, token) for token in tokens]), expected(oracle, sample, more=tokens)[-2:])
    close(say(model, fork, 9), expected(oracle, sample, more=[5, 6, 9])[-1:])


def test_a_reset_of_a_cache_does_not_touch_its_fork(model, oracle):
    sample = Sample("tFt", (1, 4, 4), seed=1)
    cache = model(**sample.inputs(), use_cache=True)[CACHE]
    fork = model.fork_cache(cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    close(say(model, fork, 7), expected(oracle, sample, more=[7])[-1:])
    close(model(**sample.inputs(), past_key_values=cache).logits[0], expected(oracle, sample))
