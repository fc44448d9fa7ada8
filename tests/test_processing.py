"""The processor: golden values, media of a batch, uint8 pixels, encoders, options of a call."""

import copy
import hashlib
import threading

import numpy as np
import pytest
import torch
from golden_cases import (
    CLIP,
    LARGE,
    LONG,
    NAMES,
    PHOTO,
    SHORT,
    SMALL,
    SQUARE,
    Case,
    decoded_frames,
)
from PIL import Image
from processor_kit import processor, same, shared, tokens  # noqa: F401

from moss_vl import image_processing_moss_vl, image_reading, video_processing_moss_vl
from moss_vl.text_rows import frame_mask


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
    else:  # decoders may differ by up to 3
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


# samples do not affect each other


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
    options = {"multi_image_max_pixels": 150000, "video_max_pixels": 300000, "max_frames": 6, "return_tensors": "pt"}
    media = [share_out()[i] for i in order]
    texts, images, videos = (
        [TEXTS[i] for i in order],
        [m for own, _ in media for m in own],
        [m for _, own in media for m in own],
    )
    out = processor(texts, images=images, videos=videos, padding=True, padding_side=side, **options)
    patches = iter(out["pixel_values"].split(out["grid_thw"].prod(1).tolist()))
    grids = iter(out["grid_thw"])
    for row, (text, (own_images, own_videos)) in enumerate(zip(texts, media, strict=True)):
        alone = processor(text, images=own_images, videos=own_videos, **options)
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


def test_frame_mask_by_its_definition(processor):
    out = processor(TEXTS, images=IMAGES, videos=VIDEOS, padding=True, padding_side="left", return_tensors="pt")
    frames = [
        max(1, sum(grid[0].item() for grid in part)) for part in out["grid_thw"].split(out["media_nums_per_sample"])
    ]
    expected = torch.ones(6, 1, out["input_ids"].shape[1], max(frames), dtype=torch.bool)
    for row, ids in enumerate(out["input_ids"].tolist()):
        visible = 0
        for position, token in enumerate(ids):
            visible += token == processor.image_token_id
            for frame in range(visible):
                expected[row, 0, position, frame] = out["attention_mask"][row, position] == 0
    assert torch.equal(out["cross_attention_mask"], expected)


def test_text_only_batch(processor):
    out = processor(["one", "two words"], padding=True, return_tensors="pt")
    assert out["grid_thw"].tolist() == [[1, 8, 8]] * 2 and out["media_nums_per_sample"] == [1, 1]
    assert out["pixel_values"].shape == (128, 768) and not out["pixel_values"].any()
    assert out["cross_attention_mask"].shape[-1] == 1 and out["cross_attention_mask"].all()


def test_the_mask_of_a_long_video_needs_no_loop(processor):
    ids = [processor.image_token_id, 1, 2, 3] * 1000
    mask = frame_mask([ids], [[1] * 4000], processor.image_token_id, 1000)
    assert mask.shape == (1, 1, 4000, 1000) and mask.sum().item() == 4 * sum(range(1000))


# how media are given


def test_nested_bare_and_flat_media(processor):
    text = ["<|image|>", "<|video|><|image|>"]
    options = {"padding": True, "return_tensors": "pt"}
    expected = processor(text, images=[PHOTO, SMALL], videos=[CLIP], **options)
    assert same(processor(text, images=[[PHOTO], [SMALL]], videos=[[], [CLIP]], **options), expected)
    assert same(processor(text, images=([PHOTO], (SMALL,)), videos=[None, [CLIP]], **options), expected)
    assert same(processor(text, images=[PHOTO, SMALL], videos=str(CLIP), **options), expected)
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


def test_segments_may_be_split_between_two_samples(processor):
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


def test_nothing_is_decoded_if_a_later_file_is_missing(processor, monkeypatch):
    monkeypatch.setattr(image_reading, "_pil_rows", lambda *_: pytest.fail("decoded"))
    with pytest.raises(FileNotFoundError, match="gone.mp4"):
        processor(["<|image|>", "<|video|>"], images=PHOTO, videos="gone.mp4")


# options


KNOBS = [
    ("max_pixels", 16384),
    ("longest_edge", 16384),
    ("min_pixels", 1048576),
    ("shortest_edge", 1048576),
    ("size", {"longest_edge": 16384}),
    ("multi_image_max_pixels", 16384),
    ("video_max_pixels", 16384),
    ("video_fps", 0.5),
    ("num_frames", 2),
    ("min_frames", 7),
    ("max_frames", 2),
    ("patch_size", 8),
    ("merge_size", 4),
    ("image_mean", (0.1, 0.2, 0.3)),
    ("image_std", [0.5, 0.6, 0.7]),
]


@pytest.mark.parametrize("name, value", KNOBS)
def test_every_option_acts_for_its_call(processor, name, value):
    def call(**options):
        return processor("<|image|><|video|>", images=PHOTO, videos=CLIP, return_tensors="pt", **options)[
            "pixel_values"
        ]

    plain, changed = call(), call(**{name: value})
    assert plain.shape != changed.shape or not torch.equal(plain, changed)
    assert torch.equal(call(**{name: None}), plain)
    nested = {
        box: {name: value}
        for box, part in (("images_kwargs", "image_processor"), ("videos_kwargs", "video_processor"))
        if name in getattr(processor, part).option_names
    }
    assert torch.equal(call(**nested), changed)


def test_options_that_change_no_pixels(processor):
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
    "options, message",
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
def test_bad_options(processor, options, message):
    with pytest.raises(ValueError, match=message):
        processor("<|image|>", PHOTO, **options)


@pytest.mark.parametrize("text", [None, [], 3, [None], ["a", 3], [["a"]], b"a"])
def test_bad_text(processor, text):
    with pytest.raises(ValueError, match="text must be"):
        processor(text)


def test_half_a_character_is_refused_before_media_are_decoded(processor, monkeypatch):
    monkeypatch.setattr(image_reading, "_pil_rows", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"text 1 holds '.udc00' at character 2, .* half of a character"):
        processor(["<|image|> ok \U0001f600", "a \udc00"], PHOTO)


def test_threads_with_different_options(processor):
    texts = ["<|image|>a b c", "d<|video|>", "e"]
    options = [
        {"max_pixels": 16384, "padding": True, "padding_side": "left"},
        {"max_pixels": 65536, "video_fps": 2, "padding": "max_length", "max_length": 150},
        {"num_frames": 2, "padding": True, "image_mean": (0.1, 0.2, 0.3), "num_extract_threads": 2},
        {"max_frames": 3, "padding": True, "pad_to_multiple_of": 64},
    ]

    def call(i):
        return processor(
            texts, images=PHOTO, videos=CLIP, return_tensors="pt", labels_spans=[[[9, 10]], [], []], **options[i]
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
