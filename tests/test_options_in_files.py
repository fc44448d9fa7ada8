"""Options in settings files and as keywords of loading."""

import json

import pytest
from conftest import ROOT
from golden_cases import make_processor
from PIL import Image

from moss_vl.image_processing_moss_vl import MossVLImageProcessor
from moss_vl.processing_moss_vl import MossVLProcessor
from moss_vl.video_processing_moss_vl import MossVLVideoProcessor


NANO = ROOT / "checkpoints" / "moss-vl-nano"


def test_aliases_in_settings_files(tmp_path):
    settings = json.loads((ROOT / "video_preprocessor_config.json").read_text())
    del settings["video_fps"]
    settings |= {"nframes": 6, "total_pixels": 10**6, "video_fps": None, "fps": None}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(settings | {"video_max_pixels": None}))
    loaded = MossVLVideoProcessor.from_pretrained(tmp_path)
    assert (loaded.num_frames, loaded.video_fps, loaded.video_max_pixels) == (6, None, 10**6)
    assert MossVLVideoProcessor.from_pretrained(tmp_path, fps=3).resolve({}).video_fps == 3
    assert MossVLVideoProcessor(fps=3, total_pixels=10**6, max_pixels=9999).to_dict()["video_fps"] == 3
    loaded = MossVLVideoProcessor.from_pretrained(tmp_path, return_unused_kwargs=True, frame_rate=3)
    assert loaded[1] == {"frame_rate": 3}
    for options, message in (
        ({"frame_rate": 3}, "unknown keyword 'frame_rate'"),
        ({"fsp": 3}, "did you mean 'fps'"),
        ({"fps": 3, "nframes": 3}, "both say"),
        ({"fps": 3, "video_fps": 2}, "disagree"),
        ({"sample_fps": 3}, "an option of a call"),
        ({"do_resize": False}, "always True"),
    ):
        for make in (
            MossVLVideoProcessor,
            lambda **options: MossVLVideoProcessor.from_pretrained(tmp_path, **options),
        ):
            with pytest.raises(ValueError, match=message):
                make(**options)


def test_unknown_names_for_an_image_processor_are_an_error(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"patch_size": 8, "crop_margin": 3, "do_resize": True, "image_processor_type": "x"})
    )
    assert MossVLImageProcessor.from_pretrained(tmp_path).patch_size == 8  # unknown settings of a file are left out
    for options, message in (
        ({"max_pixel": 3}, "did you mean 'max_pixels'"),
        ({"crop_margin": 3}, "unknown keyword 'crop_margin'"),
        ({"resized_height": 3}, "an option of a call"),
        ({"do_rescale": False}, "always True"),
    ):
        for make in (
            MossVLImageProcessor,
            lambda **options: MossVLImageProcessor.from_pretrained(tmp_path, **options),
        ):
            with pytest.raises(ValueError, match=message):
                make(**options)
    with pytest.raises(ValueError, match="unknown keyword 'fps'"):
        MossVLImageProcessor()(Image.new("RGB", (40, 40)), fps=3)


@pytest.mark.parametrize("size", [{"shortest_edge": 2048, "longest_edge": 9999}, None])
def test_a_limit_in_a_settings_file_under_its_alias(tmp_path, size):
    """A keyword overrides the limit of the file, under either name of each."""
    for mine, theirs in (("min_pixels", "shortest_edge"), ("shortest_edge", "min_pixels")):
        for cls, name in (
            (MossVLImageProcessor, "preprocessor_config.json"),
            (MossVLVideoProcessor, "video_preprocessor_config.json"),
        ):
            file = {theirs: 2048} | ({} if size is None else {"size": size})
            (tmp_path / name).write_text(json.dumps(file))
            assert cls.from_pretrained(tmp_path).min_pixels == 2048
            assert cls.from_pretrained(tmp_path, **{mine: 1024}).min_pixels == 1024
            assert cls.from_pretrained(tmp_path, size={"shortest_edge": 1024}).min_pixels == 1024
    for theirs in ("max_pixels", "longest_edge"):
        for cls, name in (
            (MossVLImageProcessor, "preprocessor_config.json"),
            (MossVLVideoProcessor, "video_preprocessor_config.json"),
        ):
            (tmp_path / name).write_text(json.dumps({theirs: 9999, "min_pixels": 2048}))
            for option in ({"size": {"longest_edge": 5000}}, {"max_pixels": 5000}, {"longest_edge": 5000}):
                loaded = cls.from_pretrained(tmp_path, **option)
                assert (loaded.min_pixels, loaded.max_pixels) == (2048, 5000)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"fsp": 3}, "did you mean 'fps'"),
        ({"do_sample_frames": False}, "an option of a call, not a setting"),
        ({"padding": True}, "an option of a call"),
        ({"return_tensors": "pt"}, "an option of a call"),
        ({"total_pixels": 10}, "does not hold one frame"),
        ({"resolution": 3}, "resolution is no option"),
        ({"paddingside": "left"}, "did you mean 'padding_side'"),
        ({"do_resize": False}, "always True"),
        ({"do_rescale": False}, "always True"),
    ],
)
def test_unknown_keywords_of_loading_are_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        MossVLProcessor.from_pretrained(NANO, **options)


def test_keywords_of_loading_reach_their_processor():
    loaded = MossVLProcessor.from_pretrained(
        NANO, fps=3, total_pixels=10**6, truncation_side="left", model_max_length=99, do_resize=True
    )
    assert (loaded.video_processor.video_fps, loaded.video_processor.video_max_pixels) == (3, 10**6)
    assert loaded.tokenizer.truncation_side == "left" and loaded.tokenizer.model_max_length == 99
    ready = make_processor().tokenizer
    assert MossVLProcessor.from_pretrained(NANO, tokenizer=ready).tokenizer is ready
