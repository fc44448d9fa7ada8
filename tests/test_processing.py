"""The processor: tokens, masks, labels and patches of a batch, per-call knobs, conversations, and what is refused."""

import base64
import copy
import hashlib
import json
import shutil
import threading

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT
from golden_cases import (
    CLIP,
    FOLDER,
    LARGE,
    LONG,
    NAMES,
    PHOTO,
    SHORT,
    SMALL,
    SQUARE,
    Case,
    decoded_frames,
    load_tokenizer,
    make_processor,
)
from PIL import Image
from transformers import AutoTokenizer

from moss_vl import image_processing_moss_vl, image_reading, video_processing_moss_vl
from moss_vl.patches import normalise
from moss_vl.processing_moss_vl import MossVLProcessor
from moss_vl.text_rows import frame_mask


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }}{% else %}<|{{ p.type }}|>{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def shared():
    return make_processor(chat_template=CHATML)


@pytest.fixture
def processor(shared):
    """A processor that must come out of the test as it went in."""
    before = [part.to_json_string() for part in (shared.image_processor, shared.video_processor)]
    yield shared
    assert [part.to_json_string() for part in (shared.image_processor, shared.video_processor)] == before


def tokens(processor, out, row=0) -> list[str]:
    return processor.tokenizer.convert_ids_to_tokens(out["input_ids"][row])


def learned(processor, text, spans, **media) -> str:
    out = processor(text, labels_spans=spans, return_tensors="pt", **media)
    return processor.decode(out["labels"][out["labels"] >= 0])


# golden


@pytest.mark.parametrize("name", NAMES)
def test_golden(name):
    case = Case(name)
    out, expected = case.call(), case.expected
    for key in ("input_ids", "attention_mask", "grid_thw", "cross_attention_mask", "labels"):
        assert (key in out) == (key in case.arrays)
        if key in out:
            assert out[key].dtype == case.arrays[key].dtype and np.array_equal(out[key], case.arrays[key]), key
    assert out["media_nums_per_sample"] == expected["media_nums_per_sample"]
    assert [tokens(case.processor, out, row) for row in range(len(out["input_ids"]))] == expected["token_strings"]
    assert case.processor.batch_decode(out["input_ids"]) == expected["decoded"]
    assert out["video_metadata"] == expected.get("video_metadata", [])
    assert out["pixel_values"].dtype == np.float32
    if case.videos is None:
        assert hashlib.sha256(out["pixel_values"].tobytes()).hexdigest() == expected["pixel_values_sha256"]
    else:  # decoders may differ by up to 3 levels
        assert np.abs(out["pixel_values"] - case.pixel_values).max() * 127.5 <= 3.01


@pytest.mark.parametrize(
    "name", ["04_mixed_video_image", "05_batch_right_pad", "08_labels_media_inside", "22_video_budget_1e6"]
)
def test_golden_from_decoded_frames(name):
    case = Case(name)
    names = {str(path): path for path in (SHORT, CLIP, LONG)}
    frames, metadata = zip(*(decoded_frames(names[video]) for video in case.videos), strict=True)
    out = case.call(videos=list(frames), video_metadata=list(metadata))
    assert np.array_equal(out["input_ids"], case.arrays["input_ids"]) and np.array_equal(
        out["grid_thw"], case.arrays["grid_thw"]
    )
    assert hashlib.sha256(out["pixel_values"].tobytes()).hexdigest() == case.expected["pixel_values_sha256"]


# each sample is its own affair


TEXTS = [
    "<|video|>then<|image|>ok",
    "no media here",
    "<|image|>a<|image|>b<|image|>",
    "<|video|><|video|>",
    "",
    "<|image|>",
]
IMAGES = [PHOTO, SMALL, LARGE, SQUARE, PHOTO]
VIDEOS = [CLIP, SHORT, LONG]
SHARES = [(1, 1), (0, 0), (3, 0), (0, 2), (0, 0), (1, 0)]  # images and videos of each text


def share_out():
    images, videos = iter(IMAGES), iter(VIDEOS)
    return [([next(images) for _ in range(i)], [next(videos) for _ in range(v)]) for i, v in SHARES]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0), (2, 1), (5, 0, 3)])
def test_a_batch_is_each_sample_alone(processor, side, order):
    knobs = {"multi_image_max_pixels": 150000, "video_max_pixels": 300000, "max_frames": 6, "return_tensors": "pt"}
    media = [share_out()[i] for i in order]
    texts, images, videos = (
        [TEXTS[i] for i in order],
        [m for own, _ in media for m in own],
        [m for _, own in media for m in own],
    )
    out = processor(texts, images=images, videos=videos, padding=True, padding_side=side, **knobs)
    patches = iter(out["pixel_values"].split(out["grid_thw"].prod(1).tolist()))
    grids = iter(out["grid_thw"])
    for row, (text, (own_images, own_videos)) in enumerate(zip(texts, media, strict=True)):
        alone = processor(text, images=own_images, videos=own_videos, **knobs)
        keep = out["attention_mask"][row].bool()
        length, width = alone["input_ids"].shape[1], len(keep)
        parts = [[True] * length, [False] * (width - length)]
        assert keep.tolist() == (sum(parts, []) if side == "right" else parts[1] + parts[0])
        assert torch.equal(out["input_ids"][row][keep], alone["input_ids"][0])
        mask = out["cross_attention_mask"][row, 0]
        frames = alone["cross_attention_mask"].shape[-1]
        assert torch.equal(mask[keep][:, :frames], alone["cross_attention_mask"][0, 0])
        assert mask[~keep].all() and mask[:, frames:].all()
        count = alone["media_nums_per_sample"][0]
        assert out["media_nums_per_sample"][row] == count
        assert torch.equal(torch.stack([next(grids) for _ in range(count)]), alone["grid_thw"])
        assert torch.equal(torch.cat([next(patches) for _ in range(count)]), alone["pixel_values"])


def test_mask_by_its_definition(processor):
    out = processor(TEXTS, images=IMAGES, videos=VIDEOS, padding=True, padding_side="left", return_tensors="pt")
    frames = [
        max(1, sum(grid[0].item() for grid in part)) for part in out["grid_thw"].split(out["media_nums_per_sample"])
    ]
    expected = torch.ones(6, 1, out["input_ids"].shape[1], max(frames), dtype=torch.bool)
    for row, ids in enumerate(out["input_ids"].tolist()):
        seen = 0
        for position, token in enumerate(ids):
            seen += token == processor.image_token_id
            for frame in range(seen):
                expected[row, 0, position, frame] = out["attention_mask"][row, position] == 0
    assert torch.equal(out["cross_attention_mask"], expected)


def test_text_only_batch(processor):
    out = processor(["one", "two words"], padding=True, return_tensors="pt")
    assert out["grid_thw"].tolist() == [[1, 8, 8]] * 2 and out["media_nums_per_sample"] == [1, 1]
    assert out["pixel_values"].shape == (128, 768) and not out["pixel_values"].any()
    assert out["cross_attention_mask"].shape[-1] == 1 and out["cross_attention_mask"].all()


def test_long_video_mask_takes_no_loop(processor):
    ids = [processor.image_token_id, 1, 2, 3] * 1000
    mask = frame_mask([ids], [[1] * 4000], processor.image_token_id, 1000)
    assert mask.shape == (1, 1, 4000, 1000) and mask.sum().item() == 4 * sum(range(1000))


# giving the media


def same(a, b) -> bool:
    return all(
        torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key]
        for key in a.keys() | b.keys()
    )


def test_nested_bare_and_flat_media(processor):
    text = ["<|image|>", "<|video|><|image|>"]
    knobs = {"padding": True, "return_tensors": "pt"}
    expected = processor(text, images=[PHOTO, SMALL], videos=[CLIP], **knobs)
    assert same(processor(text, images=[[PHOTO], [SMALL]], videos=[[], [CLIP]], **knobs), expected)
    assert same(processor(text, images=([PHOTO], (SMALL,)), videos=[None, [CLIP]], **knobs), expected)
    assert same(processor(text, images=[PHOTO, SMALL], videos=str(CLIP), **knobs), expected)
    assert same(
        processor("<|image|>", PHOTO, return_tensors="pt"),
        processor(["<|image|>"], [[str(PHOTO)]], return_tensors="pt"),
    )
    array = np.zeros((2, 32, 32, 3), np.uint8)
    assert same(
        processor("<|image|><|image|>", array, return_tensors="pt"),
        processor("<|image|><|image|>", list(array), return_tensors="pt"),
    )


def test_pad_tokens_are_placeholders_too(processor):
    expected = processor("a<|image|>b<|video|>c", images=PHOTO, videos=SHORT, return_tensors="pt")
    assert same(processor("a<|image_pad|>b<|video_pad|>c", images=PHOTO, videos=SHORT, return_tensors="pt"), expected)


def test_decoded_frames(processor):
    frames, metadata = decoded_frames(CLIP)
    expected = processor("<|video|>", videos=frames, video_metadata=metadata, return_tensors="pt")
    pictures = [Image.fromarray(frame) for frame in frames]
    for videos in (
        pictures,
        [pictures],
        [list(frames)],
        [frames],
        frames[None],
        [[pictures]],
        torch.from_numpy(frames),
    ):
        assert same(processor("<|video|>", videos=videos, video_metadata=[metadata], return_tensors="pt"), expected)
    mixed = processor(
        "<|video|><|video|>", videos=[CLIP, frames], video_metadata=[None, metadata], return_tensors="pt"
    )
    assert mixed["grid_thw"].tolist() == [[5, 16, 20]] * 2 and torch.equal(*mixed["input_ids"].reshape(2, -1))
    with pytest.raises(ValueError, match="video_metadata"):
        processor("<|video|>", videos=frames)
    with pytest.raises(ValueError, match="2 videos are given, but 1 video_metadata"):
        processor("<|video|><|video|>", videos=[frames, frames], video_metadata=[metadata])


def test_frames_as_picture_files(processor):
    out = processor("<|video|>", videos=[str(PHOTO), str(PHOTO)], video_metadata={"fps": 1}, return_tensors="pt")
    assert out["grid_thw"].tolist() == [[2, 16, 20]]


def test_segments_may_go_to_two_samples(processor):
    video = {"video_path": str(CLIP), "segments": [[0, 1], [2.0], [3, 5]]}
    given = copy.deepcopy(video)
    out = processor(["<|video|>", "<|video|>x<|video|>"], videos=[video], padding=True, return_tensors="pt")
    assert video == given
    assert out["grid_thw"][:, 0].tolist() == [1, 1, 2] and out["media_nums_per_sample"] == [1, 2]
    assert "2.0 seconds" in processor.decode(out["input_ids"][1])


def test_counts_that_do_not_match(processor, monkeypatch):
    monkeypatch.setattr(image_processing_moss_vl, "probe_image", lambda *_, **__: pytest.fail("opened"))
    monkeypatch.setattr(video_processing_moss_vl, "open_video", lambda *_, **__: pytest.fail("opened"))
    segments = {"video_path": str(CLIP), "segments": [[0, 1], [2]]}
    for arguments, message in [
        (("<|image|>",), "1 <.image.> placeholders, but 0 images"),
        (("a", PHOTO), "0 <.image.> placeholders, but 1 images"),
        (("<|image|>" * 3, [PHOTO, SMALL]), "3 <.image.> placeholders, but 2 images"),
        (("<|image|>", [PHOTO, SMALL]), "1 <.image.> placeholders, but 2 images"),
        ((["<|image|>", "b"], [PHOTO, SMALL]), "2 texts have 1 <.image.> placeholders, but 2 images"),
        ((["<|image|>", "<|image|>"], [[PHOTO, SMALL], []]), "text 0 has 1 <.image.> placeholders, but 2 images"),
        ((["<|image|>", "b"], [[PHOTO]]), "1 lists, but there are 2 texts"),
        (("<|video|>", None, [CLIP, SHORT]), "1 <.video.> placeholders, but 2 videos"),
        (("<|video|>", PHOTO), "placeholders, but"),
        (("<|video|>", None, [segments]), "1 <.video.> placeholders, but 2 videos or segments"),
        (("<|video|>", None, [{"video_path": str(CLIP), "segments": []}]), "at least one"),
        (("<|image|>", [[[PHOTO]]]), "nested too deep"),
    ]:
        with pytest.raises(ValueError, match=message):
            processor(*arguments)


def test_nothing_is_decoded_where_a_later_file_is_missing(processor, monkeypatch):
    monkeypatch.setattr(image_reading, "_pil_rgb", lambda *_: pytest.fail("decoded"))
    with pytest.raises(FileNotFoundError, match="gone.mp4"):
        processor(["<|image|>", "<|video|>"], images=PHOTO, videos="gone.mp4")


# labels


@pytest.mark.parametrize(
    "text, spans, expected",
    [
        ("Describe the picture.", [[0, 8]], "Describe"),
        ("Describe the picture.", [[3, 4]], "Describe"),  # a token that overlaps is learned whole
        ("Describe the picture.", [[8, 9]], " the"),
        ("Describe the picture.", [[0, 0], [21, 21]], ""),
        ("Describe the picture.", [[9, 12], [20, 21]], " the."),
        ("Describe the picture.", [[20, 21], [8, 12], [9, 12]], " the."),
        ("a<|image|>b<|image|>c", [[0, 21]], "abc"),
        ("a<|image|>b<|image|>c", [[10, 11]], "b"),
        ("a<|image|>b<|image|>c", [[20, 21]], "c"),
        ("a<|image|>b<|image|>c", [[3, 5]], ""),  # inside a placeholder
        ("a<|image|>b<|image|>c", [[3, 11]], "b"),
        ("a<|image|>b<|image_pad|>c", [[10, 15]], "b"),
    ],
)
def test_labels(processor, text, spans, expected):
    images = [SQUARE] * text.count("<|image")
    assert learned(processor, text, spans, images=images) == expected
    assert learned(processor, text, [spans], images=images) == expected  # nested, as in a batch
    assert learned(processor, [text], [tuple(map(tuple, spans))], images=images) == expected


def test_labels_after_a_video(processor):
    text = "a<|video|>b<|image|>c<|vision_start|>d<|vision_end|>e"
    whole = [[0, len(text)]]
    assert learned(processor, text, whole, images=SQUARE, videos=CLIP) == "abce"
    assert learned(processor, text, [[10, 11], [20, 21]], images=SQUARE, videos=CLIP) == "bc"
    assert learned(processor, text, [[2, 9]], images=SQUARE, videos=CLIP) == ""


def test_labels_of_letters_outside_ascii(processor):
    assert learned(processor, "é<|image|>日本 ü", [[10, 13]], images=SQUARE) == "日本 "
    assert learned(processor, "e\u0301<|image|>x", [[0, 2]], images=SQUARE) == "é"


def test_labels_of_a_batch(processor):
    spans = [[[0, 1]], [], None, [[10, 11]]]
    given = copy.deepcopy(spans)
    out = processor(["abc", "abc", "abc", "a<|image|>bc"], SQUARE, None, spans, -7, padding=True, return_tensors="pt")
    kept = [processor.decode(row[row != -7]) for row in out["labels"]]
    assert kept == ["a", "", "", "b"] and spans == given
    assert (out["labels"][out["attention_mask"] == 0] == -7).all()


@pytest.mark.parametrize(
    "text, spans, message",
    [
        (["a", "b"], [[[0, 1]]], "1 entries, but there are 2 texts"),
        (["a", "b"], [[0, 1], [0, 1]], "not a .start, end."),
        ("abc", [[0, 4]], "inside a text of 3"),
        ("abc", [[-1, 2]], "inside a text of 3"),
        ("abc", [[2, 1]], "not a .start, end."),
        ("abc", [[0.5, 1]], "."),
        ("abc", [[[0, 1, 2]]], "not a .start, end."),
    ],
)
def test_bad_spans(processor, text, spans, message):
    with pytest.raises(ValueError, match=message):
        processor(text, labels_spans=spans)


# padding, cutting, formats


@pytest.mark.filterwarnings("ignore:.max_length. is ignored")
def test_padding_as_the_tokenizer_does_it(processor):
    texts = ["A", "Describe the picture.", "A cat"]
    for knobs in (
        {"padding": True}, {"padding": "longest", "padding_side": "left"}, {"padding": "max_length", "max_length": 20},
        {"padding": True, "pad_to_multiple_of": 16}, {"padding": True, "truncation": True, "max_length": 2},
        {"padding": "max_length", "max_length": 3, "truncation": "longest_first", "padding_side": "left"},
        {"padding": True, "max_length": 2}, {"max_length": 2}, {"padding": False, "truncation": True, "max_length": 1}, {},
        {"padding": True, "add_special_tokens": False, "return_token_type_ids": True}, {"padding": "do_not_pad"},
    ):  # fmt: skip
        out, expected = processor(texts, **knobs), load_tokenizer()(texts, **knobs)
        for key in ("input_ids", "attention_mask", "token_type_ids"):
            assert out.get(key) == expected.get(key), (knobs, key)


def test_truncation_must_keep_the_frames(processor):
    text = "<|image|>Describe the picture."
    out = processor(text, SQUARE, truncation=True, max_length=2, return_tensors="pt", labels_spans=[[9, 17]])
    assert tokens(processor, out) == ["<|image_pad|>", "Describe"] and out["labels"].shape == (1, 2)
    with pytest.raises(ValueError, match="text 0 keeps 0 of the 1"):
        processor("Describe<|image|>", SQUARE, truncation=True, max_length=1)
    with pytest.raises(ValueError, match="text 0 keeps 1 of the 5"):
        processor("<|video|>", videos=CLIP, max_length=10)


def test_truncation_from_the_left():
    processor = make_processor(tokenizer=load_tokenizer())
    processor.tokenizer.truncation_side = "left"
    assert processor("A cat", truncation=True, max_length=1)["input_ids"] == [processor.tokenizer(" cat")["input_ids"]]
    with pytest.raises(ValueError, match="keeps 0 of the 1"):
        processor("<|image|>A cat", SQUARE, truncation=True, max_length=1)


def test_return_types(processor):
    keys = {"input_ids", "attention_mask", "pixel_values", "grid_thw", "media_nums_per_sample", "cross_attention_mask"}
    for kind, cls in (("pt", torch.Tensor), ("np", np.ndarray), (None, list)):
        out = processor(["a<|image|>", "b"], SQUARE, padding=True, return_tensors=kind)
        assert set(out) == keys and all(isinstance(out[key], cls) for key in ("input_ids", "attention_mask"))
        assert type(out["media_nums_per_sample"]) is list and out["media_nums_per_sample"] == [1, 1]
    ragged = processor(["a b c d", "b"])
    assert [len(ids) for ids in ragged["input_ids"]] == [len(row) for row in ragged["attention_mask"]]
    with pytest.raises(ValueError, match="padding=True"):
        processor(["a b c d", "b"], return_tensors="pt")
    offsets = processor("a<|image|>b", SQUARE, return_offsets_mapping=True)["offset_mapping"]
    assert offsets == [[(0, 1), (1, 14), (14, 15)]]
    assert set(processor.model_input_names) == keys


@pytest.mark.parametrize("texts", [["<|image|>a<|video|>", "b", "<|image|>"], ["<|video|>"], ["a"]])
def test_levels_for_the_model_to_normalise(processor, texts):
    """`pixel_values` as uint8 with what normalises them; the blank medium stays zero. All else as ever, also in nested keywords."""
    images, videos = (
        [SQUARE, PHOTO][: sum(map("<|image|>".__eq__, texts)) + ("<|image|>a" in texts[0])],
        [SHORT] * ("<|video|>" in texts[0]),
    )
    knobs = {
        "padding": True,
        "return_tensors": "pt",
        "images_kwargs": {"image_mean": (0.1, 0.2, 0.3)},
        "videos_kwargs": {"image_std": [0.5, 0.6, 0.7]},
    }
    plain = processor(texts, images=images or None, videos=videos or None, **knobs)
    raw = processor(texts, images=images or None, videos=videos or None, do_normalize=False, **knobs)
    nested = processor(
        texts, images=images or None, videos=videos or None, common_kwargs={"do_normalize": False}, **knobs
    )
    assert set(raw) == {*plain, "image_mean", "image_std"} and raw["pixel_values"].dtype == torch.uint8
    assert torch.equal(nested["pixel_values"], raw["pixel_values"])
    assert all(torch.equal(plain[name], raw[name]) for name in ("input_ids", "grid_thw", "cross_attention_mask"))
    sizes = plain["grid_thw"].prod(1).tolist()
    assert len(raw["image_mean"]) == len(raw["image_std"]) == len(sizes)
    parts = zip(
        plain["pixel_values"].split(sizes),
        raw["pixel_values"].split(sizes),
        raw["image_mean"],
        raw["image_std"],
        strict=True,
    )
    assert all(torch.equal(values, normalise(levels, mean, std)) for values, levels, mean, std in parts)
    moved = raw.to("cpu", torch.bfloat16)
    assert moved["pixel_values"].dtype == torch.uint8 and moved["image_mean"] == raw["image_mean"]
    for part, media, name in (
        (processor.image_processor, images, "pixel_values"),
        (processor.video_processor, videos, "pixel_values_videos"),
    ):
        if media:
            own = part(media, do_normalize=False, return_tensors="np")
            assert (
                own[name].dtype == np.uint8
                and own["image_mean"] == [[0.5] * 3] * len(media)
                and set(own) == {*part(media), "image_mean", "image_std"}
            )


@pytest.mark.parametrize("texts", [["<|image|>a<|video|>", "b", "<|image|>"], ["<|video|>"], ["a"]])
def test_media_that_are_encoded_on_the_way(processor, texts):
    """`image_features` in place of `pixel_values`, media in the order of the text; all else as ever."""

    def encoder(levels, grid, mean, std):
        assert len(levels) == sum(t * h * w for t, h, w in grid)
        return normalise(levels, mean, std).view(-1, 4 * levels.shape[1])

    images, videos = (
        [SQUARE, PHOTO][: sum(map("<|image|>".__eq__, texts)) + ("<|image|>a" in texts[0])],
        [SHORT] * ("<|video|>" in texts[0]),
    )
    knobs = {
        "padding": True,
        "return_tensors": "pt",
        "images_kwargs": {"image_mean": (0.1, 0.2, 0.3)},
        "videos_kwargs": {"image_std": [0.5, 0.6, 0.7]},
    }
    plain = processor(texts, images=images or None, videos=videos or None, **knobs)
    encoded = processor(texts, images=images or None, videos=videos or None, encoder=encoder, **knobs)
    assert set(encoded) == {*plain, "image_features"} - {"pixel_values"}
    assert torch.equal(encoded["image_features"], plain["pixel_values"].view(len(encoded["image_features"]), -1))
    assert all(torch.equal(plain[name], encoded[name]) for name in ("input_ids", "grid_thw", "cross_attention_mask"))
    assert plain["media_nums_per_sample"] == encoded["media_nums_per_sample"]
    with pytest.raises(ValueError, match="return_tensors is 'np'; pass return_tensors='pt'"):
        processor(
            texts, images=images or None, videos=videos or None, encoder=encoder, **{**knobs, "return_tensors": "np"}
        )


def test_to_device_and_dtype(processor):
    out = processor("a<|image|>", SQUARE, return_tensors="pt").to("cpu", torch.bfloat16)
    assert out["pixel_values"].dtype == torch.bfloat16 and out["input_ids"].dtype == torch.long
    assert out["cross_attention_mask"].dtype == torch.bool and out["media_nums_per_sample"] == [1]
    assert out.to("meta")["input_ids"].device.type == "meta"


# knobs


KNOBS = [
    ("max_pixels", 16384), ("longest_edge", 16384), ("min_pixels", 1048576), ("shortest_edge", 1048576), ("size", {"longest_edge": 16384}),
    ("multi_image_max_pixels", 16384), ("video_max_pixels", 16384), ("video_fps", 0.5), ("num_frames", 2), ("min_frames", 7), ("max_frames", 2),
    ("patch_size", 8), ("merge_size", 4), ("image_mean", (0.1, 0.2, 0.3)), ("image_std", [0.5, 0.6, 0.7]),
]  # fmt: skip


@pytest.mark.parametrize("name, value", KNOBS)
def test_every_knob_acts_for_its_call(processor, name, value):
    def call(**knobs):
        return processor("<|image|><|video|>", images=PHOTO, videos=CLIP, return_tensors="pt", **knobs)["pixel_values"]

    plain, changed = call(), call(**{name: value})
    assert plain.shape != changed.shape or not torch.equal(plain, changed)
    assert torch.equal(call(**{name: None}), plain)
    nested = {box: {name: value} for box, part in (("images_kwargs", "image_processor"), ("videos_kwargs", "video_processor"))
              if name in getattr(processor, part).option_names}  # fmt: skip
    assert torch.equal(call(**nested), changed)


def test_knobs_that_change_no_pixels(processor):
    plain = processor("<|video|>", videos=CLIP, return_tensors="pt")
    for name, value in (
        ("num_extract_threads", 1),
        ("frame_extract_num_threads", 2),
        ("video_backend", "pyav"),
        ("do_resize", True),
    ):
        assert same(processor("<|video|>", videos=CLIP, return_tensors="pt", **{name: value}), plain)
    with pytest.raises(ValueError, match="num_extract_threads"):
        processor("<|video|>", videos=CLIP, frame_extract_num_threads=0)
    with pytest.raises(ValueError, match="'opencv'"):
        processor("<|video|>", videos=CLIP, video_backend="opencv")


def test_nested_text_kwargs(processor):
    flat = processor(["a", "b c"], padding=True, padding_side="left", return_tensors="pt")
    nested = processor(
        ["a", "b c"], text_kwargs={"padding": True, "padding_side": "left"}, common_kwargs={"return_tensors": "pt"}
    )
    assert same(flat, nested)


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"max_pixel": 1}, "'max_pixel'; did you mean 'max_pixels'"),
        ({"vidoe_fps": 1}, "did you mean 'video_fps'"),
        ({"fps": 1, "video_fps": 2}, "fps=1 and video_fps=2 name the same option and disagree"),
        ({"frame_rate": 1}, "unknown keyword 'frame_rate'"),
        ({"resolution": 64}, "resolution is no option of MOSS-VL: write max_pixels"),
        ({"paddign": True}, "did you mean 'padding'"),
        ({"images_kwarg": {}}, "did you mean 'images_kwargs'"),
        ({"images_kwargs": {"video_fps": 1}}, "images_kwargs: unknown keyword 'video_fps'"),
        ({"videos_kwargs": {"max_frame": 1}}, "did you mean 'max_frames'"),
        ({"text_kwargs": {"max_lenght": 1}}, "did you mean 'max_length'"),
        ({"images_kwargs": 3}, "must be a dict"),
        ({"max_pixels": 1048576, "images_kwargs": {"max_pixels": 1048576}}, "given twice"),
        ({"padding": "sideways"}, "padding must be"),
        ({"padding_side": "up"}, "padding_side must be"),
        ({"truncation": "only_second"}, "truncation must be"),
        ({"max_length": 0}, "max_length must be"),
        ({"padding": "max_length"}, "needs max_length"),
        ({"return_tensors": "tf"}, "'pt', 'np' or None"),
        ({"min_pixels": -1}, "positive whole number"),
        ({"video_fps": 0}, "video_fps"),
        ({"video_fps": 1, "num_frames": 2}, "give one"),
        ({"do_resize": False}, "always True"),
        ({"do_normalize": 3}, "do_normalize must be True or False"),
        ({"video_metadata": {"fps": 1}}, "0 videos are given"),
    ],
)
def test_bad_knobs(processor, knobs, message):
    with pytest.raises(ValueError, match=message):
        processor("<|image|>", PHOTO, **knobs)


@pytest.mark.parametrize("text", [None, [], 3, [None], ["a", 3], [["a"]], b"a"])
def test_bad_text(processor, text):
    with pytest.raises(ValueError, match="text must be"):
        processor(text)


def test_threads_with_other_knobs(processor):
    texts = ["<|image|>a b c", "d<|video|>", "e"]
    knobs = [
        {"max_pixels": 16384, "padding": True, "padding_side": "left"},
        {"max_pixels": 65536, "video_fps": 2, "padding": "max_length", "max_length": 150},
        {"num_frames": 2, "padding": True, "image_mean": (0.1, 0.2, 0.3), "num_extract_threads": 2},
        {"max_frames": 3, "padding": True, "pad_to_multiple_of": 64},
    ]

    def call(i):
        return processor(
            texts, images=PHOTO, videos=CLIP, return_tensors="pt", labels_spans=[[[9, 10]], [], []], **knobs[i]
        )

    alone, wrong = [call(i) for i in range(4)], []

    def work(i):
        for _ in range(4):
            try:
                if not same(call(i), alone[i]):
                    wrong.append(i)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


# timestamps


def test_calculate_timestamps(processor):
    times = processor._calculate_timestamps
    assert times([0, 37, 74, 149], 150, 30.0, 5.0) == [0.0, 37 / 30, 74 / 30, 149 / 30]
    assert times(np.array([0, 29]), 240, 240 / 8.008, 8.008) == [0.0, pytest.approx(29 * 8.008 / 240)]
    assert times([0, 30], 60, None, 4.0) == [0.0, 2.0]
    assert times([0, 1, 2], 3, 1.0, 3.0, 2) == [0.5, 2.0]
    assert times(None, 2, 30.0, 5.0, 1, [0.5, 4.0]) == [0.5, 4.0]
    assert times([0, 300], 151, 30.0, 5.0) == [0.0, 5.0]
    for arguments, message in (
        ((None, 5, 30.0, 5.0), "both are None"), (([0], None, None, None), "video_fps=None"), (([0], 5, 0, None), "video_fps=0"),
        (([0], 5, -1.0, 5.0), "video_fps=-1.0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            times(*arguments)


def test_timestamps_are_those_of_the_text(processor):
    out = processor("<|video|>", videos=LONG, return_metadata=True)
    metadata = out["video_metadata"][0]
    times = processor._calculate_timestamps(
        metadata.frames_indices, metadata.total_num_frames, metadata.fps, metadata.duration
    )
    assert [f"{t:.1f} seconds" in processor.decode(out["input_ids"][0]) for t in times] == [True] * 9


# tokenizers


def test_names_and_ids(processor):
    ids = processor.tokenizer.get_vocab()
    assert processor.image_token_id == ids["<|image_pad|>"] and processor.video_token_id == ids["<|video_pad|>"]
    assert (
        processor.vision_start_token_id == ids["<|vision_start|>"]
        and processor.vision_end_token_id == ids["<|vision_end|>"]
    )
    names = (
        "image_placeholder",
        "video_placeholder",
        "image_token",
        "video_token",
        "time_start_token",
        "time_end_token",
    )
    expected = ["<|image|>", "<|video|>", "<|image_pad|>", "<|video_pad|>", "<|time_start|>", "<|time_end|>"]
    assert [getattr(processor, name) for name in names] == expected


@pytest.fixture
def tokenizer_without(tmp_path):
    def make(*missing):
        shutil.copytree(FOLDER / "tokenizer", tmp_path / "tokenizer")
        path = tmp_path / "tokenizer" / "tokenizer.json"
        content = json.loads(path.read_text())
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in missing]
        path.write_text(json.dumps(content))
        path = tmp_path / "tokenizer" / "tokenizer_config.json"
        content = json.loads(path.read_text())
        content["added_tokens_decoder"] = {
            k: v for k, v in content["added_tokens_decoder"].items() if v["content"] not in missing
        }
        content["additional_special_tokens"] = [
            token for token in content["additional_special_tokens"] if token not in missing
        ]
        path.write_text(json.dumps(content))
        for name in ("added_tokens.json", "special_tokens_map.json"):
            (tmp_path / "tokenizer" / name).unlink()
        return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")

    return make


def test_a_tokenizer_that_does_not_know_the_placeholders(processor, tokenizer_without):
    tokenizer = tokenizer_without("<|image|>", "<|video|>")
    assert "<|image|>" not in tokenizer.get_vocab()
    out = make_processor(tokenizer=tokenizer)("a<|image|>b<|video|>", images=SQUARE, videos=SHORT, return_tensors="pt")
    assert same(out, processor("a<|image|>b<|video|>", images=SQUARE, videos=SHORT, return_tensors="pt"))


@pytest.mark.parametrize("token", ["<|time_start|>", "<|vision_end|>", "<|image_pad|>"])
def test_a_tokenizer_without_a_special_token(tokenizer_without, token):
    with pytest.raises(ValueError, match=f"no special token '{token}'".replace("|", r"\|")):
        make_processor(tokenizer=tokenizer_without(token))


def test_parts_in_the_wrong_place(processor):
    with pytest.raises(TypeError, match="image_processor is a MossVLVideoProcessor"):
        MossVLProcessor(processor.video_processor, processor.tokenizer, processor.image_processor)


# conversations


def test_chat_template_renders_placeholders(processor):
    messages = [
        {"role": "system", "content": "Be short."},
        {
            "role": "user",
            "content": [{"type": "image", "image": "a.png"}, {"type": "video"}, {"type": "text", "text": "Why?"}],
        },
        {"role": "assistant", "content": "So."},
    ]
    given = copy.deepcopy(messages)
    start = "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n<|image|><|video|>Why?<|im_end|>\n<|im_start|>assistant\n"
    assert processor.apply_chat_template(messages) == start + "So.<|im_end|>\n"
    assert processor.apply_chat_template(messages[:2], add_generation_prompt=True) == start
    assert processor.apply_chat_template(messages, continue_final_message=True) == start + "So."
    assert processor.apply_chat_template([messages[:2], messages[2:]])[1] == "<|im_start|>assistant\nSo.<|im_end|>\n"
    assert messages == given


def test_segments_in_a_conversation(processor):
    video = {"video_path": str(CLIP), "segments": [[0, 2], [3]]}
    messages = [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": "x"}]}]
    assert processor.apply_chat_template(messages).count("<|video|>") == 2
    assert processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")["grid_thw"][
        :, 0
    ].tolist() == [2, 1]


def test_media_of_a_conversation_are_processed(processor):
    url = "data:image/png;base64," + base64.b64encode(PHOTO.read_bytes()).decode()
    parts = [
        [{"type": "image", "image": str(PHOTO)}, {"type": "video", "video": str(SHORT)}],
        [{"type": "image_url", "image_url": {"url": url}}, {"type": "video_url", "video_url": str(SHORT)}],
        [{"type": "image", "url": PHOTO.as_uri()}, {"type": "video", "path": SHORT}],
        [{"type": "image", "image": Image.open(PHOTO)}, {"type": "video", "video": SHORT.read_bytes()}],
    ]
    knobs = {
        "add_generation_prompt": True,
        "tokenize": True,
        "return_dict": True,
        "return_tensors": "pt",
        "max_pixels": 65536,
    }
    conversations = [[{"role": "user", "content": [*own, {"type": "text", "text": "Why?"}]}] for own in parts]
    text = "<|im_start|>user\n<|image|><|video|>Why?<|im_end|>\n<|im_start|>assistant\n"
    expected = processor(text, PHOTO, SHORT, return_tensors="pt", max_pixels=65536)
    for conversation in conversations:
        assert same(processor.apply_chat_template(conversation, **knobs), expected)
    batch = processor.apply_chat_template(conversations, padding=True, **knobs)
    assert batch["media_nums_per_sample"] == [2] * 4 and torch.equal(
        batch["input_ids"], expected["input_ids"].expand(4, -1)
    )
    bare = [{"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "Why?"}]}]
    assert same(processor.apply_chat_template(bare, images=PHOTO, videos=SHORT, **knobs), expected)
    processor_kwargs = {"images": [PHOTO], "videos": [SHORT]}
    ids = processor.apply_chat_template(
        bare, add_generation_prompt=True, tokenize=True, processor_kwargs=processor_kwargs
    )
    assert ids == expected["input_ids"].tolist()


def test_assistant_mask(processor):
    answer = "{% generation %}{{ m.content }}{% endgeneration %}"
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        + answer
        + "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    )
    messages = [{"role": "user", "content": "<|image|>Describe"}, {"role": "assistant", "content": "A cat."}]
    out = processor.apply_chat_template(
        messages,
        template,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        images=SQUARE,
        return_assistant_tokens_mask=True,
    )
    assert processor.decode(out["input_ids"][out["assistant_masks"] == 1]).strip() == "A cat." and "labels" not in out


@pytest.mark.parametrize(
    "conversation, knobs, message",
    [
        ([], {}, "a conversation is a list"),
        (["hello"], {}, "a conversation is a list"),
        ([{"content": "x"}], {}, "a conversation is a list"),
        ([{"role": "user", "content": 3}], {}, "must be a string or a list"),
        ([{"role": "user", "content": [3]}], {}, "a part of a message"),
        ([{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}], {}, "a part of a message"),
        ([{"role": "user", "content": [{"type": "text"}]}], {}, "a part of a message"),
        ([{"role": "user", "content": "x"}], {"padding": True}, "tokenize=True"),
        ([{"role": "user", "content": "x"}], {"add_generation_promt": True}, "did you mean 'add_generation_prompt'"),
        ([{"role": "user", "content": "x"}], {"max_pixel": 3}, "did you mean 'max_pixels'"),
        ([{"role": "user", "content": [{"type": "image"}]}], {"tokenize": True}, "1 <.image.> placeholders, but 0"),
        (
            [{"role": "user", "content": [{"type": "image", "image": str(PHOTO)}]}],
            {"tokenize": True, "images": [PHOTO]},
            "given twice",
        ),
    ],
)
def test_bad_conversations(processor, conversation, knobs, message):
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(conversation, **knobs)


def test_no_template():
    with pytest.raises(ValueError, match="no chat template"):
        make_processor().apply_chat_template([{"role": "user", "content": "x"}])


# loading and saving


@pytest.fixture
def released(tmp_path):
    folder = tmp_path / "released"
    shutil.copytree(FOLDER / "tokenizer", folder)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_places_of_the_chat_template(released, place):
    if place.endswith("jinja"):
        (released / place).write_text(CHATML)
    else:
        content = json.loads((released / place).read_text()) if (released / place).exists() else {}
        (released / place).write_text(json.dumps({**content, "chat_template": CHATML}))
    processor = MossVLProcessor.from_pretrained(released)
    assert processor.apply_chat_template([{"role": "user", "content": "x"}]) == "<|im_start|>user\nx<|im_end|>\n"
    processor.save_pretrained(released / "again")
    assert MossVLProcessor.from_pretrained(released / "again").chat_template == CHATML


def test_keywords_of_loading(released):
    processor = MossVLProcessor.from_pretrained(
        released, frame_extract_num_threads=1, max_pixels=65536, video_fps=2, padding_side="left"
    )
    assert (processor.video_processor.num_extract_threads, processor.video_processor.video_fps) == (1, 2)
    assert processor.image_processor.max_pixels == processor.video_processor.max_pixels == 65536
    assert processor.tokenizer.padding_side == "left"
    processor.save_pretrained(released / "again")
    again = MossVLProcessor.from_pretrained(released / "again")
    assert again.video_processor.to_dict()["num_extract_threads"] == 1 and again.image_processor.max_pixels == 65536
    saved = json.loads((released / "again" / "tokenizer_config.json").read_text())
    assert not {"frame_extract_num_threads", "num_extract_threads", "max_pixels", "video_fps"} & saved.keys()
    assert saved["tokenizer_class"] == "Qwen2Tokenizer" and not isinstance(saved.get("extra_special_tokens"), list)
    with pytest.raises(ValueError, match="did you mean 'max_pixels'"):
        MossVLProcessor.from_pretrained(released, max_pixel=3)


def test_saved_with_its_code(released):
    MossVLProcessor.from_pretrained(released).save_pretrained(released / "again")
    for name in ("processing_moss_vl.py", "image_processing_moss_vl.py", "video_processing_moss_vl.py"):
        assert (released / "again" / name).read_bytes() == (ROOT / name).read_bytes()


def test_a_tokenizer_that_transformers_5_saved_alone(released):
    """It names a class, or has a list, that 4.57 does not know."""
    path = released / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.update(tokenizer_class="TokenizersBackend", extra_special_tokens=config.pop("additional_special_tokens"))
    config.pop("added_tokens_decoder")
    path.write_text(json.dumps(config))
    (released / "special_tokens_map.json").unlink()
    processor = MossVLProcessor.from_pretrained(released)
    case = Case("05_batch_right_pad")
    out = processor(case.text, case.images, case.videos, padding=True, return_tensors="np")
    assert np.array_equal(out["input_ids"], case.arrays["input_ids"])
    processor.save_pretrained(released / "again")
    assert (
        json.loads((released / "again" / "tokenizer_config.json").read_text())["tokenizer_class"] == "Qwen2Tokenizer"
    )
    assert AutoTokenizer.from_pretrained(released / "again")("<|image_pad|>")["input_ids"] == [412]


def test_golden_folder_is_found():
    assert len(NAMES) >= 10 and GOLDEN.is_dir()
