"""What a word looked at: the weights are those of one forward over the whole conversation, and cost one token."""

import numpy as np
import pytest
import torch
from offline import SMALL, VIDEO, model, pictures, processor  # noqa: F401 - fixtures
from PIL import Image
from realtime import make_tokenizer

from moss_vl.patches import patchify
from moss_vl.tools.attention_maps import SIDE, SeenFrames, answer_words, draw_map, group_words, word_attention


def ask(model, processor, prompt, state=None, new=6, **media):
    query = {"prompt": prompt, "media_kwargs": SMALL, "generate_kwargs": {"max_new_tokens": new}, **media}
    made = model.offline_batch_generate(processor, [query], session_states=[state], keep_cache=True)
    return made["session_states"][0], made["results"][0]["text"]


@pytest.fixture(scope="module")
def state(model, processor, pictures):  # noqa: F811
    """Two turns: a video, then two pictures of other sizes."""
    first, _ = ask(model, processor, "What happens?", videos=[VIDEO])
    return ask(model, processor, "And here?", first, images=pictures[:2])


def weights_of_one_forward(model, processor, kept):
    """[T, V], averaged over layers and heads: all tokens of the conversation in one forward without a cache, eager."""
    inputs = processor(
        text=kept.text,
        images=kept.images,
        videos=kept.videos,
        images_kwargs=kept.images_kwargs,
        videos_kwargs=kept.videos_kwargs,
        return_tensors="pt",
        grid_name="grid_thw",
    )
    ids = torch.tensor([kept.ids])
    assert kept.ids[: inputs["input_ids"].shape[1]] == inputs["input_ids"][0].tolist()
    inputs = {name: inputs[name] for name in ("pixel_values", "grid_thw", "media_nums_per_sample")}
    with torch.no_grad():
        layers = model(ids, **inputs, use_cache=False, output_attentions=True).cross_attentions
    return torch.stack([weights[0].mean(0) for weights in layers]).mean(0)


def test_weights_are_those_of_one_forward(model, processor, state):  # noqa: F811
    made, answer = state
    kept = made.kept
    expected = weights_of_one_forward(model, processor, kept)
    words = answer_words(processor, kept, answer)
    assert "".join(word.text for word in words) == answer and words
    indices = [index for word in words for index in word.tokens]
    assert max(indices) == len(kept.ids)  # the last token was written, but is not in the cache
    for tokens in [[index] for index in sorted(set(indices))] + [sorted(set(indices))]:
        weights = word_attention(model, kept, tokens)
        # the token before the written one looked
        wanted = expected[torch.tensor(tokens) - 1].mean(0)
        flat = [np.append(one.ravel(), end) for one, end in zip(weights.maps, weights.separators, strict=True)]
        assert np.allclose(np.concatenate(flat), wanted.numpy(), atol=1e-6)
        assert sum(weights.shares) + weights.separators.sum() == pytest.approx(1, abs=1e-5)
        assert weights.peak == max(one.max() for one in weights.maps)


def test_maps_have_the_grids_of_the_frames(model, processor, state):  # noqa: F811
    """The pixels of the frames are multiples of 32: patches of 16 pixels, 2 x 2 of which are a vision token."""
    kept = state[0].kept
    frames = SeenFrames.read(processor, kept)
    maps = word_attention(model, kept, [len(kept.ids)]).maps
    assert len(maps) == len(frames.grids) == len(frames.seconds) == kept.frames
    for number, one in enumerate(maps):
        assert frames.image(number).size == (32 * one.shape[1], 32 * one.shape[0])
    count = kept.frames - 2
    assert frames.seconds[0] == 0.0 and frames.seconds[count:] == [None, None]
    assert frames.seconds[:count] == sorted(frames.seconds[:count])
    assert len({one.shape for one in maps[count:]}) == 2  # pictures of different shapes


def test_one_token_is_computed_and_nothing_is_changed(model, processor, state, monkeypatch):  # noqa: F811
    kept, forks, lengths = state[0].kept, [], []
    held = [part for layer in kept.cache.layers for part in (layer.keys, layer.values)]
    before = [part.clone() for part in held]
    fork_cache, forward = type(model).fork_cache, model.model.forward

    def noting_fork(self, cache):
        forks.append(fork_cache(self, cache))
        return forks[-1]

    def noting_forward(*args, **kwargs):
        lengths.append(kwargs["input_ids"].shape)
        return forward(*args, **kwargs)

    monkeypatch.setattr(type(model), "fork_cache", noting_fork)
    monkeypatch.setattr(model.model, "forward", noting_forward)
    settings = model.config.to_dict(), model.config.text_config._attn_implementation
    word_attention(model, kept, [len(kept.ids) - 2])
    assert lengths == [(1, 1)] and len(forks) == 1
    for index in model.config.text_config.cross_attention_layers:
        assert forks[0].layers[index].keys.data_ptr() == kept.cache.layers[index].keys.data_ptr()  # no copy
    assert (model.config.to_dict(), model.config.text_config._attn_implementation) == settings
    assert settings[1] == "sdpa"
    for one, other in zip(held, before, strict=True):  # free space may hold anything, also nan
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
    assert all(layer.keys is part for layer, part in zip(kept.cache.layers, held[::2], strict=True))


def test_wrong_tokens_and_conversations_without_frames_are_errors(model, processor, state):  # noqa: F811
    kept = state[0].kept
    for tokens in ([], [0], [len(kept.ids) + 1]):
        with pytest.raises(ValueError, match="indices between 1 and"):
            word_attention(model, kept, tokens)
    text_only, _ = ask(model, processor, "Hello")
    with pytest.raises(ValueError, match="no image and no video"):
        word_attention(model, text_only.kept, [len(text_only.kept.ids)])
    kept = text_only.kept
    text_only.drop_cache()
    assert text_only.kept is None
    with pytest.raises(ValueError, match="was dropped"):
        word_attention(model, kept, [2])


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("at 2.3 seconds, the ring.", ["at", " 2.3", " seconds", ",", " the", " ring", "."]),
        ("a  star;\n\nred\n", ["a", "  star", ";", "\n\nred", "\n"]),
        ("漢字。é\N{GRINNING FACE}!", ["漢", "字", "。", "é", "\N{GRINNING FACE}", "!"]),  # of several tokens each
        ("", []),
    ],
)
def test_words_join_to_the_answer(answer, words):
    tokenizer = make_tokenizer()
    prompt = tokenizer("What?", add_special_tokens=False)["input_ids"]
    ids = prompt + tokenizer(answer, add_special_tokens=False)["input_ids"]
    made = group_words(tokenizer, ids, len(prompt), answer)
    assert [word.text for word in made] == words
    tokens = [index for word in made for index in word.tokens]
    assert sorted(set(tokens)) == list(range(len(prompt), len(ids)))
    cut = group_words(tokenizer, ids[:-1], len(prompt), answer)  # its last token is not in the cache
    if answer:
        assert "".join(word.text for word in cut) == answer and cut[-1].tokens[-1] == len(ids) - 1
    end = group_words(tokenizer, [*ids, tokenizer.convert_tokens_to_ids("<|im_end|>")], len(prompt), answer)
    assert end == made or not answer


@pytest.mark.parametrize("temporal", [1, 2])
def test_frames_are_those_that_were_cut_into_patches(temporal):
    rng = np.random.default_rng(0)
    sizes, images, parts = [(64, 96), (32, 32)], [], []
    for height, width in sizes:
        frames = rng.integers(0, 256, (temporal, height, width, 3), dtype=np.uint8)
        images.append(frames[0])
        parts.append(patchify(torch.from_numpy(frames).permute(0, 3, 1, 2), 16, 2, temporal))
    grids = [(height // 16, width // 16) for height, width in sizes]
    seen = SeenFrames(torch.cat(parts), grids, [None, None], 16, 2)
    assert all(np.array_equal(np.asarray(seen.image(number)), image) for number, image in enumerate(images))


def test_colours_are_strongest_at_the_peak():
    image, weights = Image.new("RGB", (96, 64), "blue"), np.zeros((2, 3))
    weights[0, 2] = 0.5
    picture = draw_map(image, weights, peak=0.5)
    assert picture.size == (SIDE, round(SIDE * 64 / 96))
    bright, dark = (np.array(picture.getpixel(at), dtype=int) for at in ((SIDE - 5, 5), (5, picture.height - 5)))
    assert bright[0] > 200 and bright[1] > 150 and dark[0] < 40 and dark[2] > 180
    half = np.array(draw_map(image, weights, peak=1.0).getpixel((SIDE - 5, 5)), dtype=int)
    assert dark[1] < half[1] < bright[1]
    draw_map(image, np.zeros((2, 3)), peak=0.0)
