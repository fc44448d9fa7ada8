"""Text in the processor: labels, padding, truncation, output formats, time stamps, tokenizers."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from golden_cases import (
    CLIP,
    FOLDER,
    LONG,
    PHOTO,
    SHORT,
    SQUARE,
    load_tokenizer,
    make_processor,
)
from processor_kit import learned, processor, same, shared, tokens  # noqa: F401
from transformers import AutoTokenizer

from moss_vl.patches import normalise
from moss_vl.processing_moss_vl import MossVLProcessor


# labels


@pytest.mark.parametrize(
    "text, spans, expected",
    [
        ("Describe the picture.", [[0, 8]], "Describe"),
        ("Describe the picture.", [[3, 4]], "Describe"),  # a token that overlaps a span is learned
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


# padding, truncation, formats


@pytest.mark.filterwarnings("ignore:.max_length. is ignored")
def test_padding_is_that_of_the_tokenizer(processor):
    texts = ["A", "Describe the picture.", "A cat"]
    for options in (
        {"padding": True},
        {"padding": "longest", "padding_side": "left"},
        {"padding": "max_length", "max_length": 20},
        {"padding": True, "pad_to_multiple_of": 16},
        {"padding": True, "truncation": True, "max_length": 2},
        {"padding": "max_length", "max_length": 3, "truncation": "longest_first", "padding_side": "left"},
        {"padding": True, "max_length": 2},
        {"max_length": 2},
        {"padding": False, "truncation": True, "max_length": 1},
        {},
        {"padding": True, "add_special_tokens": False, "return_token_type_ids": True},
        {"padding": "do_not_pad"},
    ):
        out, expected = processor(texts, **options), load_tokenizer()(texts, **options)
        for key in ("input_ids", "attention_mask", "token_type_ids"):
            assert out.get(key) == expected.get(key), (options, key)


def test_truncation_must_not_cut_frame_tokens(processor):
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
    """`pixel_values` are uint8, with the mean and std of each medium; the blank medium stays zero. The rest of the
    output does not change."""
    images, videos = (
        [SQUARE, PHOTO][: sum(map("<|image|>".__eq__, texts)) + ("<|image|>a" in texts[0])],
        [SHORT] * ("<|video|>" in texts[0]),
    )
    options = {
        "padding": True,
        "return_tensors": "pt",
        "images_kwargs": {"image_mean": (0.1, 0.2, 0.3)},
        "videos_kwargs": {"image_std": [0.5, 0.6, 0.7]},
    }
    plain = processor(texts, images=images or None, videos=videos or None, **options)
    raw = processor(texts, images=images or None, videos=videos or None, do_normalize=False, **options)
    nested = processor(
        texts, images=images or None, videos=videos or None, common_kwargs={"do_normalize": False}, **options
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
    assert all(torch.equal(values, normalise(pixels, mean, std)) for values, pixels, mean, std in parts)
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
def test_an_encoder_gives_features_instead_of_pixels(processor, texts):
    """`image_features` replace `pixel_values`, in the order of the text. The rest of the output does not change."""

    def encoder(pixels, grid, mean, std):
        assert len(pixels) == sum(t * h * w for t, h, w in grid)
        return normalise(pixels, mean, std).view(-1, 4 * pixels.shape[1])

    images, videos = (
        [SQUARE, PHOTO][: sum(map("<|image|>".__eq__, texts)) + ("<|image|>a" in texts[0])],
        [SHORT] * ("<|video|>" in texts[0]),
    )
    options = {
        "padding": True,
        "return_tensors": "pt",
        "images_kwargs": {"image_mean": (0.1, 0.2, 0.3)},
        "videos_kwargs": {"image_std": [0.5, 0.6, 0.7]},
    }
    plain = processor(texts, images=images or None, videos=videos or None, **options)
    encoded = processor(texts, images=images or None, videos=videos or None, encoder=encoder, **options)
    assert set(encoded) == {*plain, "image_features"} - {"pixel_values"}
    assert torch.equal(encoded["image_features"], plain["pixel_values"].view(len(encoded["image_features"]), -1))
    assert all(torch.equal(plain[name], encoded[name]) for name in ("input_ids", "grid_thw", "cross_attention_mask"))
    assert plain["media_nums_per_sample"] == encoded["media_nums_per_sample"]
    with pytest.raises(ValueError, match="return_tensors is 'np'; pass return_tensors='pt'"):
        processor(
            texts, images=images or None, videos=videos or None, encoder=encoder, **{**options, "return_tensors": "np"}
        )


def test_to_device_and_dtype(processor):
    out = processor("a<|image|>", SQUARE, return_tensors="pt").to("cpu", torch.bfloat16)
    assert out["pixel_values"].dtype == torch.bfloat16 and out["input_ids"].dtype == torch.long
    assert out["cross_attention_mask"].dtype == torch.bool and out["media_nums_per_sample"] == [1]
    assert out.to("meta")["input_ids"].device.type == "meta"


# time stamps


def test_calculate_timestamps(processor):
    times = processor._calculate_timestamps
    assert times([0, 37, 74, 149], 150, 30.0, 5.0) == [0.0, 37 / 30, 74 / 30, 149 / 30]
    assert times(np.array([0, 29]), 240, 240 / 8.008, 8.008) == [0.0, pytest.approx(29 * 8.008 / 240)]
    assert times([0, 30], 60, None, 4.0) == [0.0, 2.0]
    assert times([0, 1, 2], 3, 1.0, 3.0, 2) == [0.5, 2.0]
    assert times(None, 2, 30.0, 5.0, 1, [0.5, 4.0]) == [0.5, 4.0]
    assert times([0, 300], 151, 30.0, 5.0) == [0.0, 5.0]
    for arguments, message in (
        ((None, 5, 30.0, 5.0), "both are None"),
        (([0], None, None, None), "video_fps=None"),
        (([0], 5, 0, None), "video_fps=0"),
        (([0], 5, -1.0, 5.0), "video_fps=-1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            times(*arguments)


def test_calculated_time_stamps_are_those_of_the_text(processor):
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


def test_a_tokenizer_without_the_placeholders(processor, tokenizer_without):
    tokenizer = tokenizer_without("<|image|>", "<|video|>")
    assert "<|image|>" not in tokenizer.get_vocab()
    out = make_processor(tokenizer=tokenizer)("a<|image|>b<|video|>", images=SQUARE, videos=SHORT, return_tensors="pt")
    assert same(out, processor("a<|image|>b<|video|>", images=SQUARE, videos=SHORT, return_tensors="pt"))


@pytest.mark.parametrize("token", ["<|time_start|>", "<|vision_end|>", "<|image_pad|>"])
def test_a_tokenizer_without_a_special_token(tokenizer_without, token):
    with pytest.raises(ValueError, match=f"no special token '{token}'".replace("|", r"\|")):
        make_processor(tokenizer=tokenizer_without(token))


def test_parts_as_the_wrong_argument(processor):
    with pytest.raises(TypeError, match="image_processor is a MossVLVideoProcessor"):
        MossVLProcessor(processor.video_processor, processor.tokenizer, processor.image_processor)
