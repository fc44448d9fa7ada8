"""Options of text, images and videos: the table, per call, per medium, in conversations, and their outputs."""

import base64
import copy
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from golden_cases import CLIP, FOLDER, LARGE, PHOTO, SHORT, SMALL, make_processor
from PIL import Image

from moss_vl import video_sampling
from moss_vl.checks import shorten
from moss_vl.options import FIXED_TEXT, OPTIONS, REFUSED, layered, names_of, read_options
from moss_vl.processing_moss_vl import MossVLProcessor
from moss_vl.video_processing_moss_vl import MossVLVideoProcessor


NANO = ROOT / "checkpoints" / "moss-vl-nano"
FRAMES = [Image.new("RGB", (64, 48), (i * 9, 0, 0)) for i in range(8)]
TEMPLATE = (NANO / "chat_template.jinja").read_text()


@pytest.fixture(scope="module")
def processor():
    return make_processor(chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def videos():
    return MossVLVideoProcessor(size={"shortest_edge": 1024, "longest_edge": 5000})


def grids(processor, parts, **options):
    conversation = [{"role": "user", "content": [*parts, "x"]}]
    given = copy.deepcopy(conversation)
    out = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="pt", **options)
    assert conversation == given
    return out["grid_thw"].tolist()


# the table


def test_each_name_is_in_the_table_once():
    names = names_of()
    assert len(names) == len(set(names)) and not set(names) & {*FIXED_TEXT, *REFUSED}
    assert all(option.meaning and option.takers for option in OPTIONS)
    assert {"fps", "nframes", "total_pixels", "resized_height", "video_start", "sample_fps"} <= set(
        names_of("video", per_medium=True)
    )
    assert (
        "fps" not in names_of("image")
        and "min_pixels" in names_of("image", per_medium=True)
        and "allow_http" not in names_of("image", stored=True)
    )


def test_options_are_read_by_canonical_names():
    assert read_options({"fps": 2, "nframes": None, "raw_fps": None}, names_of("video"), "x") == {"video_fps": 2}
    assert read_options({"fps": 2, "video_fps": 2}, names_of("video"), "x") == {"video_fps": 2}
    for given, message in [
        ({"fsp": 2}, "x: unknown keyword 'fsp'; did you mean 'fps'"),
        ({"zzz": 2}, "unknown keyword 'zzz'; known: "),
        ({"fsp": None}, "unknown keyword 'fsp'"),
        ({"raw_fps": 2}, "raw_fps is no option of MOSS-VL: times follow"),
        ({"max_num_frames": 3}, "write max_frames"),
        ({"shortest_edge": 5, "min_pixels": 6}, "shortest_edge=5 and min_pixels=6"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_options(given, names_of("video"), "x")


def test_a_specific_level_overrides_a_whole_group_of_alternatives():
    assert layered({"video_fps": 1, "min_frames": 2}, {"num_frames": 4}) == {"num_frames": 4, "min_frames": 2}
    assert layered({"max_pixels": 9, "num_frames": 1}, {"resized_height": 1, "resized_width": 1}) == {
        "num_frames": 1,
        "resized_height": 1,
        "resized_width": 1,
    }
    assert layered({"resized_height": 1, "resized_width": 1}, {"max_pixels": 9}) == {"max_pixels": 9}
    assert layered({"video_fps": 1}, {"do_sample_frames": True}) == {"video_fps": 1, "do_sample_frames": True}
    assert layered({"video_fps": 1}, {"do_sample_frames": False}) == {"do_sample_frames": False}


def test_messages_shorten_values():
    for value in ("QUJD" * 10000, b"x" * 10000, ["QUJD" * 10000] * 9, {"a": {"b": "QUJD" * 10000}}, np.zeros(9999)):
        assert len(shorten(value)) < 900
    assert shorten("a") == "'a'" and shorten([1, None]) == "[1, None]"


def test_messages_shorten_unreadable_base64(processor):
    long = base64.b64encode(bytes(200_000)).decode()
    for source, error in (
        (long, FileNotFoundError),
        (f"data:image/png;base64,{long}", ValueError),
        (f"http://x/{long}", ValueError),
    ):
        for call in (
            lambda: processor("<|image|>", images=source),
            lambda: processor("<|video|>", videos=source),
            lambda: grids(processor, [{"type": "image", "image_url": {"url": source}}]),
        ):
            with pytest.raises(error) as found:
                call()
            assert len(str(found.value)) < 1000


# names of other software


@pytest.mark.parametrize(
    "options, frames",
    [
        ({}, 5),
        ({"fps": 2.0}, 10),
        ({"fps": 2.0, "video_fps": 2.0}, 10),
        ({"nframes": 4}, 4),
        ({"num_frames": 4}, 4),
        ({"fps": 2, "max_frames": 3}, 3),
        ({"fps": 0.2, "min_frames": 4}, 4),
        ({"do_sample_frames": True, "fps": 2}, 10),
        ({"video_start": 1.0, "video_end": 3.0}, 2),
        ({"video_start": 2.0}, 3),
        ({"video_end": 4.0, "fps": 2}, 8),
        ({"video_start": 1, "video_end": 2, "do_sample_frames": False}, 30),
        ({"do_sample_frames": False}, 150),
    ],
)
def test_frame_options_hold_under_any_name_at_any_level(processor, options, frames):
    small = {"max_pixels": 8192, "min_pixels": 1024}
    assert grids(processor, [{"type": "video", "video": str(CLIP), **options, **small}]) == [[frames, 4, 6]]
    assert grids(processor, [{"type": "video", "video": str(CLIP)}], **options, **small) == [[frames, 4, 6]]
    assert grids(
        processor, [{"type": "video", "video": str(CLIP)}], processor_kwargs={"videos_kwargs": {**options, **small}}
    ) == [[frames, 4, 6]]
    out = processor("<|video|>", videos=[{"video": str(CLIP), **options}], return_tensors="pt", **small)
    assert out["grid_thw"].tolist() == [[frames, 4, 6]]


def test_video_start_and_video_end_give_the_same_as_a_segment(videos):
    for options, segment in (
        ({"video_start": 1, "video_end": 3.5}, [1, 3.5]),
        ({"video_start": 2}, [2, 5.0]),
        ({"video_end": 2.5}, [0, 2.5]),
    ):
        one, other = videos.extract(
            [{"video": str(CLIP), **options}, {"video": str(CLIP), "segments": [segment]}], fps=2
        )
        assert torch.equal(one.patches, other.patches) and one.timestamps == other.timestamps
    with pytest.raises(ValueError, match="lies outside the video"):
        videos.plan({"video": str(CLIP), "video_start": 5.0})
    with pytest.raises(ValueError, match="segments and video_start or video_end"):
        videos.plan({"video": str(CLIP), "video_start": 1, "segments": [[0, 1]]})


def test_do_sample_frames_false_takes_every_frame_of_a_segment(videos):
    clip = videos.extract({"video": str(CLIP), "video_start": 1.01, "video_end": 1.2, "do_sample_frames": False})[0]
    assert clip.timestamps == [1.01, *(pytest.approx(i / 30) for i in range(31, 36))]


@pytest.mark.parametrize(
    "height, width, expected", [(60, 90, (64, 96)), (1, 40, (32, 32)), (48, 80, (64, 64)), (80, 112, (64, 128))]
)
def test_a_fixed_size_is_rounded_to_the_factor(processor, height, width, expected):
    """It is rounded as in qwen-vl-utils, halves to even, and the limits of the call do not matter."""
    rows, columns = (side // 16 for side in expected)
    of_medium = {"resized_height": height, "resized_width": width}
    parts = [
        {"type": "image", "image": str(PHOTO), **of_medium},
        {"type": "video", "video": str(SHORT), "nframes": 2, **of_medium},
    ]
    assert grids(processor, parts, min_pixels=100000) == [[1, rows, columns], [2, rows, columns]]
    assert grids(processor, [{"type": "image", "image": str(PHOTO)}], **of_medium) == [[1, rows, columns]]
    with pytest.raises(ValueError, match="over video_max_pixels 5000"):
        grids(
            processor,
            [{"type": "video", "video": str(SHORT), "nframes": 2, "resized_height": 64, "resized_width": 64}],
            video_max_pixels=5000,
        )


def test_options_of_one_medium_do_not_change_the_others(processor):
    options = {"multi_image_max_pixels": 150000, "video_max_pixels": 200000, "max_frames": 6}
    images, clips = [str(PHOTO), str(LARGE), str(SMALL)], [str(CLIP), str(SHORT)]
    text = "<|image|>" * 3 + "<|video|>" * 2

    def call(images, clips):
        out = processor(text, images=images, videos=clips, return_tensors="pt", **options)
        return list(
            zip(out["grid_thw"].tolist(), out["pixel_values"].split(out["grid_thw"].prod(1).tolist()), strict=True)
        )

    def same(one, other) -> list[bool]:
        return [a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True)]

    plain = call(images, clips)
    for of_medium in (
        {"max_pixels": 8192},
        {"min_pixels": 80000},
        {"multi_image_max_pixels": 5000},
        {"resized_height": 64, "resized_width": 64},
    ):
        changed = call([{"image": images[0], **of_medium}, *images[1:]], clips)
        assert same(changed, plain) == [False, True, True, True, True]
    for of_medium in (
        {"max_pixels": 8192},
        {"total_pixels": 30000},
        {"max_frames": 2},
        {"fps": 0.5},
        {"resized_height": 64, "resized_width": 64},
    ):
        changed = call(images, [{"video": clips[0], **of_medium}, clips[1]])
        assert same(changed, plain) == [
            True,
            True,
            True,
            False,
            "fps" not in of_medium and "max_frames" not in of_medium,
        ]
        # a shared budget of pixels depends on the other video's frames, a shared budget of frames does not
        assert changed[4][0][0] == plain[4][0][0]


def test_a_budget_of_one_video_bounds_only_this_video(videos):
    def frames(*given, **options):
        return [len(plan.indices) for plan in videos.plan(list(given), **options)]

    clip = str(CLIP)
    assert frames({"video": clip, "max_frames": 8, "fps": 10}, clip, fps=10, max_frames=10) == [8, 5]
    assert frames({"video": clip, "max_frames": 5, "fps": 10, "segments": [[0, 1], [1, 4]]}, clip, max_frames=1) == [
        2,
        3,
        1,
    ]
    with pytest.raises(ValueError, match="2 segments share its max_frames 1"):
        frames({"video": clip, "max_frames": 1, "segments": [[0, 1], [1, 4]]})
    with pytest.raises(ValueError, match="2 clips share max_frames 1"):
        frames(clip, clip, {"video": clip, "max_frames": 2}, max_frames=1)
    of_medium = {"video": clip, "total_pixels": 10 * 9000, "nframes": 10, "max_pixels": 100000}
    assert [(plan.height, plan.width) for plan in videos.plan([of_medium, clip, clip])][0] == [
        (plan.height, plan.width) for plan in videos.plan(of_medium)
    ][0]
    # a budget of the video is for all its segments
    halves = videos.plan([{**of_medium, "segments": [[0, 1], [1, 2]]}, clip])
    assert sum(len(plan.indices) * plan.height * plan.width for plan in halves[:2]) <= 90000


def test_a_budget_of_one_image_bounds_only_this_image(processor):
    of_medium = {"image": str(PHOTO), "multi_image_max_pixels": 30000}
    alone = processor("<|image|>", images=of_medium, return_tensors="pt")
    among = processor("<|image|>" * 3, images=[of_medium, str(LARGE), str(SMALL)], return_tensors="pt")
    assert (
        among["grid_thw"][0].tolist() == alone["grid_thw"][0].tolist()
        and 20000 < 256 * alone["grid_thw"].prod() <= 30000
    )


# decoded frames


@pytest.mark.parametrize(
    "of_medium, options, times",
    [
        ({"fps": 2.0}, {}, [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]),
        ({"sample_fps": "4"}, {}, [i / 4 for i in range(8)]),
        ({"sample_fps": 4, "fps": 1}, {}, [0, 1.75]),
        ({"sample_fps": 4, "nframes": 3}, {}, [0, 0.75, 1.75]),
        ({"fps": 4, "max_frames": 3}, {}, [0, 0.75, 1.75]),
        ({"fps": 4}, {"video_fps": 1.0, "min_frames": 1, "max_frames": 4}, [i / 4 for i in range(8)]),
        ({"fps": 4, "do_sample_frames": False}, {}, [i / 4 for i in range(8)]),
        ({"video_metadata": {"fps": 4}}, {}, [0, 1.75]),
        ({"video_metadata": {"fps": 4}, "fps": 4}, {}, [i / 4 for i in range(8)]),
        (
            {"video_metadata": {"timestamps": [0, 1, 2, 3, 5, 8, 13, 21]}, "do_sample_frames": False},
            {},
            [0, 1, 2, 3, 5, 8, 13, 21],
        ),
        ({"video_metadata": {"fps": 4}}, {"do_sample_frames": False}, [i / 4 for i in range(8)]),
        ({}, {"do_sample_frames": False, "fps": 2}, [i / 2 for i in range(8)]),
        ({}, {"do_sample_frames": False, "fps": [2]}, [i / 2 for i in range(8)]),
        ({}, {"sample_fps": 8}, [i / 8 for i in range(8)]),
        ({}, {"sample_fps": 4, "fps": 1}, [0, 1.75]),
        ({"fps": 2, "video_start": 1, "video_end": 2.2}, {}, [1, 1.5, 2]),
    ],
)
def test_times_of_decoded_frames(videos, of_medium, options, times):
    video = {"video": FRAMES, **of_medium}
    clip = videos.extract([video] if of_medium else [FRAMES], **options)[0]
    assert clip.timestamps == times and clip.grid[0] == len(times)


def test_decoded_frames_in_a_conversation(processor, tmp_path, monkeypatch):
    for i, frame in enumerate(FRAMES):
        frame.save(tmp_path / f"{i}.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = [str(tmp_path / "0.png"), (tmp_path / "1.png").as_uri(), "~/2.png", tmp_path / "3.png"]
    expected = processor(
        "<|video|>x", videos=[FRAMES[:4]], video_metadata=[{"fps": 2}], do_sample_frames=False, return_tensors="pt"
    )
    for frames in (paths, FRAMES[:4], np.stack([np.asarray(frame) for frame in FRAMES[:4]])):
        out = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "video", "video": frames, "fps": 2.0}, "x"]}],
            "{% for p in messages[0].content %}{% if p.type == 'text' %}{{ p.text }}{% else %}<|video|>{% endif %}{% "
            "endfor %}",
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert torch.equal(out["input_ids"], expected["input_ids"]) and torch.equal(
            out["pixel_values"], expected["pixel_values"]
        )


def test_a_rate_per_video_over_a_batch(processor):
    """As qwen-vl-utils gives them: fps=[...], do_sample_frames=False."""
    clips = [np.stack([np.asarray(frame) for frame in FRAMES[:n]]).astype(np.float32) for n in (2, 3, 4)]
    text = ["<|video|>", "none", "<|video|><|video|>"]
    out = processor(
        text,
        videos=clips,
        fps=[1.0, 2.0, 4.0],
        do_sample_frames=False,
        padding=True,
        return_tensors="pt",
        return_metadata=True,
    )
    assert out["grid_thw"].tolist() == [[2, 4, 4], [1, 8, 8], [3, 4, 4], [4, 4, 4]]
    assert [metadata.fps for metadata in out["video_metadata"]] == [1.0, 2.0, 4.0]
    assert "0.8 seconds" in processor.decode(out["input_ids"][2])
    with pytest.raises(ValueError, match="video_fps has 2 entries for 3 videos"):
        processor(text, videos=clips, fps=[1.0, 2.0], do_sample_frames=False)


def test_leaving_out_decoded_frames_is_a_warning(videos, monkeypatch):
    warnings = []
    monkeypatch.setattr(video_sampling.logger, "warning_once", lambda text: warnings.append(text))
    videos.plan([FRAMES], video_metadata={"fps": 4})
    assert (
        len(warnings) == 1
        and "2 of the 8 decoded frames are taken" in warnings[0]
        and "do_sample_frames=False" in warnings[0]
    )
    for options in ({"do_sample_frames": False}, {"fps": 1}, {"nframes": 3}, {"max_frames": 2}):
        videos.plan([FRAMES], video_metadata={"fps": 4}, **options)
    videos.plan([FRAMES], video_metadata={"fps": 1})
    videos.plan(str(CLIP))
    assert len(warnings) == 1


@pytest.mark.parametrize(
    "video, options, message",
    [
        (FRAMES, {}, "nothing says when they are shown"),
        (FRAMES, {"fps": 2}, "nothing says when they are shown"),
        ({"video": FRAMES, "nframes": 2}, {}, "nothing says when they are shown"),
        ({"video": FRAMES, "sample_fps": 0}, {}, "sample_fps must be a number above 0"),
        ({"video": FRAMES, "sample_fps": "two"}, {}, "sample_fps must be a number"),
        (
            {"video": FRAMES, "sample_fps": 2, "video_metadata": {"fps": 2}},
            {},
            "sample_fps and video_metadata both say",
        ),
        (
            {"video": FRAMES, "sample_fps": 2, "fps": 2, "do_sample_frames": False},
            {},
            "leaves video_fps without effect",
        ),
        (
            {"video": FRAMES, "fps": 2, "max_frames": 2, "do_sample_frames": False},
            {},
            "leaves max_frames without effect",
        ),
        (
            {"video": FRAMES * 10, "fps": 2},
            {"video_max_pixels": 70000},
            "80 frames of at least 1024 pixels are over video_max_pixels 70000",
        ),
        ({"video": str(CLIP), "sample_fps": 2}, {}, "for a file give fps"),
        ({"video": str(CLIP), "fps": 2, "do_sample_frames": False}, {}, "leaves video_fps without effect"),
        ({"video": str(CLIP)}, {"fps": [1, 2]}, "video_fps has 2 entries for 1 videos"),
        ({"video": str(CLIP), "fps": 1.0, "nframes": 8}, {}, "both say how many"),
    ],
)
def test_options_that_contradict_each_other_are_an_error(videos, video, options, message):
    with pytest.raises(ValueError, match=message):
        videos.plan([video], **options)


def test_an_option_of_a_medium_overrides_that_of_the_call(videos):
    def frames(of_medium, **options):
        return len(videos.plan([{"video": str(CLIP), **of_medium}], **options)[0].indices)

    assert frames({"fps": 2}, nframes=3) == 10 and frames({"nframes": 3}, fps=2) == 3
    assert (
        frames({"do_sample_frames": False}, fps=2.0, max_frames=4) == 150
        and frames({"fps": 2}, do_sample_frames=False) == 10
    )


# scales of floats


def test_float_frames_of_a_clip_share_their_scale(videos):
    dark = np.zeros((4, 64, 64, 3), np.uint8)
    dark[0], dark[1], dark[2] = 128, np.random.default_rng(0).integers(0, 2, (64, 64, 3)), 200
    options = {"video_metadata": [{"fps": 1.0}]}
    expected = videos.extract([dark], **options)[0].patches
    floats = dark.astype(np.float32)
    for given in (
        floats,
        list(floats),
        torch.from_numpy(floats),
        torch.from_numpy(floats).permute(0, 3, 1, 2),
        floats / 255,
        list(floats / 255),
        torch.from_numpy(floats).bfloat16(),
        [Image.fromarray(dark[0]), *floats[1:]],
    ):
        assert torch.equal(videos.extract([given], **options)[0].patches, expected)
    both = videos.extract(np.stack([floats, floats[::-1]]), video_metadata=[{"fps": 1.0}] * 2)
    assert torch.equal(both[0].patches, expected) and len(both) == 2


def test_images_of_one_array_share_their_scale(processor):
    dark = np.zeros((2, 64, 64, 3), np.uint8)
    dark[0], dark[1] = 128, np.random.default_rng(0).integers(0, 2, (64, 64, 3))
    expected = processor("<|image|><|image|>", images=dark, return_tensors="pt")["pixel_values"]
    for given in (dark.astype(np.float32), torch.from_numpy(dark).float().permute(0, 3, 1, 2), dark / 255):
        assert torch.equal(
            processor("<|image|><|image|>", images=given, return_tensors="pt")["pixel_values"], expected
        )
        assert torch.equal(processor.image_processor(given)["pixel_values"], expected)
    with pytest.raises(ValueError, match="holds values from -1"):
        processor("<|image|><|image|>", images=dark.astype(np.float32) - 1)


# outputs


def test_rows_of_unequal_length_have_no_frame_mask(processor):
    texts = ["<|image|>a b c", "d"]
    assert "cross_attention_mask" not in processor(texts, images=PHOTO)
    assert "cross_attention_mask" in processor(texts, images=PHOTO, padding=True)
    assert "cross_attention_mask" in processor(texts[:1], images=PHOTO)
    with pytest.raises(ValueError, match="do not make one cross_attention_mask; pass padding=True"):
        processor(texts, images=PHOTO, return_cross_attention_mask=True)


def test_settings_of_the_processor_are_call_defaults(tmp_path, processor):
    folder = tmp_path / "released"
    shutil.copytree(FOLDER / "tokenizer", folder)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        shutil.copyfile(ROOT / name, folder / name)
    plain = MossVLProcessor.from_pretrained(folder)
    plain.save_pretrained(tmp_path / "plain")
    changed = MossVLProcessor.from_pretrained(
        folder, return_cross_attention_mask=False, grid_name="image_grid_thw", video_fps=2
    )
    changed.save_pretrained(tmp_path / "changed")
    again, plain = (
        MossVLProcessor.from_pretrained(tmp_path / "changed"),
        MossVLProcessor.from_pretrained(tmp_path / "plain"),
    )
    assert plain.return_cross_attention_mask is True and plain.grid_name == "grid_thw"
    for one in (changed, again):
        out = one("<|image|>", images=PHOTO, return_tensors="pt")
        assert {"cross_attention_mask", "grid_thw"}.isdisjoint(out) and out["image_grid_thw"].tolist() == [[1, 16, 20]]
        assert set(out) == {*one.model_input_names}
        back = one(
            "<|image|>", images=PHOTO, return_tensors="pt", return_cross_attention_mask=True, grid_name="grid_thw"
        )
        assert (
            set(back) == {*plain.model_input_names}
            and "cross_attention_mask" in back
            and one.video_processor.video_fps == 2
        )
    saved = (tmp_path / "changed" / "tokenizer_config.json").read_text()
    assert "grid_name" not in saved and "return_cross_attention_mask" not in saved
    assert set(processor("a", return_cross_attention_mask=False)) == {*plain.model_input_names} - {
        "cross_attention_mask"
    }
    assert "blank_medium" not in saved and plain.blank_medium is True
    for options, message in (
        ({"grid_name": "grid"}, "grid_name must be one of grid_thw, image_grid_thw"),
        ({"blank_medium": 7}, "blank_medium must be True or False"),
        ({"return_cross_attention_mask": "no"}, "must be True or False"),
    ):
        with pytest.raises(ValueError, match=message):
            processor("a", **options)
        with pytest.raises(ValueError, match=message):
            MossVLProcessor.from_pretrained(folder, **options)


def test_texts_without_media_may_have_no_blank_medium(tmp_path, processor):
    """The texts alone, or beside others with media; the setting is saved."""
    without = {"blank_medium": False, "padding": True, "return_tensors": "pt"}
    texts = processor(["a", "b c"], **without)
    assert set(texts) == {"input_ids", "attention_mask"}
    mixed, usual = (
        processor(["a", "<|image|>b"], images=PHOTO, **{**without, "blank_medium": n}) for n in (False, True)
    )
    assert mixed["media_nums_per_sample"] == [0, 1] and usual["media_nums_per_sample"] == [1, 1]
    assert mixed["grid_thw"].tolist() == usual["grid_thw"][1:].tolist()
    assert torch.equal(mixed["pixel_values"], usual["pixel_values"][64:])
    for name in ("input_ids", "attention_mask", "cross_attention_mask"):
        assert torch.equal(mixed[name], usual[name])
    saved = MossVLProcessor(
        processor.image_processor, processor.tokenizer, processor.video_processor, blank_medium=False
    )
    saved.save_pretrained(tmp_path)
    loaded = MossVLProcessor.from_pretrained(tmp_path)
    assert set(loaded("a")) == {"input_ids", "attention_mask"} and "pixel_values" in loaded("a", blank_medium=True)
    asked = loaded("a", return_cross_attention_mask=True, return_tensors="pt")["cross_attention_mask"]
    assert asked.shape == (1, 1, 1, 1) and asked.all()


def test_pixels_may_be_on_a_device(processor):
    """The meta device stands for a GPU."""
    text = {"text": "<|image|>a", "images": PHOTO, "return_tensors": "pt"}
    out = processor(**text, device="meta")
    assert {name for name in out if getattr(out[name], "is_meta", False)} == {"pixel_values"}
    assert out["pixel_values"].shape == processor(**text)["pixel_values"].shape
    assert processor(**text, images_kwargs={"device": torch.device("cpu")})["pixel_values"].device.type == "cpu"
    assert processor(**text, do_normalize=False, device="meta")["pixel_values"].dtype == torch.uint8
    for options, message in (
        ({"device": "nowhere"}, "device must be that of a tensor"),
        ({"device": "cpu", "return_tensors": "np"}, "return_tensors is 'np'"),
        ({"device": "cpu", "encoder": lambda *frames: None}, "the encoder decides"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(**text | options)


def test_outputs_that_other_processors_return(processor):
    text = ["<|image|>a<|video|>", "b"]
    out = processor(
        text,
        PHOTO,
        SHORT,
        padding=True,
        return_tensors="pt",
        return_token_type_ids=True,
        return_mm_token_type_ids=True,
        nframes=2,
    )
    pads = out["input_ids"] == processor.image_token_id
    assert (
        out["mm_token_type_ids"][pads].tolist() == [1, 2, 2]
        and not out["mm_token_type_ids"][~pads].any()
        and not out["token_type_ids"].any()
    )
    assert out["mm_token_type_ids"].shape == out["token_type_ids"].shape == out["input_ids"].shape
    plain = processor(
        text,
        PHOTO,
        SHORT,
        padding=True,
        return_tensors="pt",
        nframes=2,
        audio=None,
        audios=None,
        return_mm_token_type_ids=False,
    )
    assert {"mm_token_type_ids", "token_type_ids"}.isdisjoint(plain)
    without = processor(text, PHOTO, SHORT, padding=True, return_tensors="pt", nframes=2, return_attention_mask=False)
    assert set(plain) - set(without) == {"attention_mask"} and torch.equal(
        plain["cross_attention_mask"], without["cross_attention_mask"]
    )
    for options, message in (
        ({"audio": ["a.wav"]}, "audio is no option of MOSS-VL: MOSS-VL takes no audio"),
        ({"stride": 3}, "stride is always 0"),
        ({"return_overflowing_tokens": True}, "return_overflowing_tokens is always False"),
        ({"return_attention_mask": 3}, "must be True or False"),
    ):
        with pytest.raises(ValueError, match=message):
            processor("a", **options)
    assert set(processor("a", stride=0, is_split_into_words=False, verbose=True)) == set(processor("a"))


# conversations


CHATS = [[{"role": "user", "content": text}] for text in ("What?", "What is there to be seen in it?")]


def padded_left(out) -> bool:
    return out["attention_mask"][0].tolist()[0] == 0


def test_prompts_for_generation_are_padded_left(processor):
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "padding": True}
    assert padded_left(processor.apply_chat_template(CHATS, add_generation_prompt=True, **options))
    assert not padded_left(processor.apply_chat_template(CHATS, **options))
    answered = [[*chat, {"role": "assistant", "content": "It"}] for chat in CHATS]
    assert padded_left(processor.apply_chat_template(answered, continue_final_message=True, **options))
    for said in (
        {"padding_side": "right"},
        {"processor_kwargs": {"padding_side": "right"}},
        {"text_kwargs": {"padding_side": "right"}},
        {"common_kwargs": {"padding_side": "right"}},
    ):
        assert not padded_left(processor.apply_chat_template(CHATS, add_generation_prompt=True, **options, **said))
    assert not padded_left(processor(["a", "b c"], padding=True, return_tensors="pt"))
    assert processor.tokenizer.padding_side == "right"


def test_in_a_pipeline_padding_is_left_and_the_frame_mask_is_left_out():
    """Pipelines load the processor, with the keywords of the model among their own."""
    loaded = MossVLProcessor.from_pretrained(NANO, _from_pipeline="image-text-to-text", dtype="auto", device_map=None)
    assert (
        loaded.tokenizer.padding_side == "left"
        and not loaded.return_cross_attention_mask
        and loaded.chat_template == TEMPLATE
    )
    assert "dtype" not in loaded.tokenizer.init_kwargs
    plain = MossVLProcessor.from_pretrained(NANO)
    assert plain.tokenizer.padding_side == "right" and plain.return_cross_attention_mask
    with pytest.raises(ValueError, match="unknown keyword 'dtype'"):
        MossVLProcessor.from_pretrained(NANO, dtype="auto")


def test_the_shipped_template_marks_the_turns_of_the_assistant(processor):
    content = [{"type": "image", "image": str(PHOTO)}, " Why? "]
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": content},
        {"role": "assistant", "content": " So."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": ["no\n", {"type": "text", "text": "more"}]},
    ]
    text = (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n<|image|> Why? <|im_end|>\n<|im_start|>assistant\n "
        "So.<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nno\nmore<|im_end|>\n"
    )
    assert processor.apply_chat_template(messages) == text
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    out = processor.apply_chat_template(messages, return_tensors="pt", **options)
    assert processor.decode(out["input_ids"][out["assistant_masks"] == 1]) == " So.<|im_end|>no\nmore<|im_end|>"
    as_lists = processor.apply_chat_template(messages, **options)
    assert as_lists["assistant_masks"] == out["assistant_masks"].tolist()
    with pytest.raises(ValueError, match="needs a chat template that marks"):
        processor.apply_chat_template(messages, "{% for m in messages %}x{% endfor %}", **options)


def test_template_variables_must_be_read_by_the_template(processor):
    template = (
        "{% if mood %}{{ mood }} {% endif %}{% generation %}{{ messages[0].content }}{% endgeneration %}"
        "{% set inner = 3 %}{% for m in messages %}{% break %}{% endfor %}"
    )
    chat = [{"role": "user", "content": "x"}]
    assert processor.apply_chat_template(chat, template, mood="well") == "well x"
    for options, message in (
        ({"mod": 1}, "unknown keyword 'mod'; did you mean 'mood'"),
        ({"inner": 1}, "unknown keyword 'inner'"),
        ({"mood_": None}, "unknown keyword 'mood_'"),
        ({"tools": [{"name": "f"}]}, "tools is given, but the chat template does not read it"),
        ({"documents": [{}]}, "documents is given"),
        ({"resolution": 3}, "resolution is no option"),
        ({"sanitize_control_tokens": True}, "sanitize_control_tokens is always False"),
    ):
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(chat, template, **options)
    assert processor.apply_chat_template(chat, template, tools=None, documents=[], load_audio_from_video=False) == "x"
    assert processor.apply_chat_template(chat, "{{ tools[0].name }}", tools=[{"name": "f"}]) == "f"
