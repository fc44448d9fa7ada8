"""Less common inputs of the processors: loading, limits of one kind of media, parts of videos, metadata, padding,
pipelines."""

import functools
import http.server
import json
import shutil
import threading

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_records import folder, read_one, turns, write  # noqa: F401 - folder is a fixture
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline
from transformers.video_utils import VideoMetadata

from moss_vl.image_processing_moss_vl import MossVLImageProcessor
from moss_vl.options import names_of
from moss_vl.processing_moss_vl import MossVLProcessor
from moss_vl.training import finetune
from moss_vl.training.records import check_media_options
from moss_vl.video_processing_moss_vl import MossVLVideoProcessor


NANO = ROOT / "checkpoints" / "moss-vl-nano"
PHOTO, SAMPLE, VIDEO = (
    str(ROOT / "data" / name) for name in ("example_image.jpg", "sample_a.jpg", "example_video.mp4")
)  # the video: 10 s
QUERIES = [
    ("What color is the star?", PHOTO),
    ("How many objects are there, please?", SAMPLE),
    ("Where is the star?", PHOTO),
]
ANSWERS = ["blue", "3", "top right"]
CHATS = [
    [{"role": "user", "content": [{"type": "image", "image": i}, {"type": "text", "text": q}]}] for q, i in QUERIES
]


@pytest.fixture(scope="module")
def processor():
    return MossVLProcessor.from_pretrained(NANO)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(NANO, trust_remote_code=True, dtype=torch.float32)


def frames(count, size=(64, 64)):
    return [Image.new("RGB", size, (20 * index, 0, 0)) for index in range(count)]


# loading


@pytest.mark.parametrize(
    "given",
    [
        {"revision": "main"},
        {"cache_dir": "x"},
        {"token": "a"},
        {"local_files_only": True},
        {"force_download": False},
        {"subfolder": ""},
        {"proxies": {}},
        {"use_auth_token": None},
        {"revision": "main", "max_pixels": 60000},
    ],
    ids=str,
)
def test_keywords_of_the_hub_are_not_settings(given):
    for load in (
        functools.partial(AutoImageProcessor.from_pretrained, trust_remote_code=True),
        MossVLVideoProcessor.from_pretrained,
    ):
        loaded = load(NANO, **given)
        assert loaded.size["longest_edge"] == given.get("max_pixels", load(NANO).size["longest_edge"])
        assert not given.keys() & vars(loaded).keys() - {"max_pixels"}
        with pytest.raises(ValueError, match="unknown keyword 'revison'"):
            load(NANO, revison="main")


@pytest.mark.parametrize("make", [MossVLImageProcessor, MossVLVideoProcessor])
def test_keywords_for_the_model_are_not_settings_in_a_pipeline(make):
    loaded = make.from_dict(
        {"patch_size": 16}, _from_pipeline="image-to-text", dtype="auto", revision="main", max_pixels=60000
    )
    assert loaded.max_pixels == 60000 and not hasattr(loaded, "dtype") and not hasattr(loaded, "revision")
    with pytest.raises(ValueError, match="unknown keyword 'dtype'"):
        make.from_dict({"patch_size": 16}, dtype="auto")


def test_downloads_are_allowed_by_the_caller_and_not_by_a_file(tmp_path):
    loaded = MossVLProcessor.from_pretrained(NANO, allow_http=True)
    parts = (loaded.image_processor, loaded.video_processor)
    assert all(part.resolve({}).allow_http and not part.resolve({"allow_http": False}).allow_http for part in parts)
    loaded.save_pretrained(tmp_path)
    assert not any("allow_http" in path.read_text() for path in tmp_path.glob("*.json"))
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        settings = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(settings | {"allow_http": True}))
    again = MossVLProcessor.from_pretrained(tmp_path)
    assert not again.image_processor.resolve({}).allow_http and not again.video_processor.resolve({}).allow_http
    with pytest.raises(ValueError, match="allow_http must be True or False"):
        MossVLImageProcessor(allow_http="yes")
    assert "allow_http" not in names_of("image", per_medium=True), "a message may not allow it for itself"


def test_a_processor_that_may_download_does_so_in_a_pipeline(model, tmp_path):
    shutil.copy(PHOTO, tmp_path / "a.jpg")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/a.jpg"
    chat = [{"role": "user", "content": [{"type": "image", "url": url}, {"type": "text", "text": QUERIES[0][0]}]}]
    try:
        for allowed in (False, True):
            loaded = AutoProcessor.from_pretrained(
                NANO, trust_remote_code=True, **({"allow_http": True, "allow_private_hosts": True} if allowed else {})
            )
            pipe = pipeline("image-text-to-text", model=model, processor=loaded, device="cpu")
            if allowed:
                assert pipe(text=chat, max_new_tokens=8, return_full_text=False)[0]["generated_text"] == ANSWERS[0]
            else:
                with pytest.raises(
                    ValueError,
                    match="allow_http=True to allow that, in the call or to the processor's from_pretrained",
                ):
                    pipe(text=chat, max_new_tokens=8)
    finally:
        server.shutdown()
        server.server_close()


def test_a_file_with_both_names_of_an_option_loads(tmp_path):
    processor = MossVLVideoProcessor(num_extract_threads=2, video_fps=3)
    processor.save_pretrained(tmp_path)
    [path] = tmp_path.glob("*.json")
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"frame_extract_num_threads": 8, "fps": 1.0}))
    use = MossVLVideoProcessor.from_pretrained(tmp_path).resolve({})
    assert use.num_extract_threads == 2 and use.video_fps == 3
    path.write_text(json.dumps({**settings, "num_extract_threads": None, "frame_extract_num_threads": 8}))
    assert MossVLVideoProcessor.from_pretrained(tmp_path).resolve({}).num_extract_threads == 8
    with pytest.raises(ValueError, match="name the same option and disagree"):
        MossVLVideoProcessor(num_extract_threads=2, frame_extract_num_threads=8)


@pytest.mark.parametrize("make", [MossVLImageProcessor, MossVLVideoProcessor])
def test_a_limit_is_set_as_an_attribute(make):
    size = {"shortest_edge": 4096, "longest_edge": 65536}
    one = make(size=size)
    other = make(size=one.size)
    other.size = one.size
    other.max_pixels, other.min_pixels = 9216, 5000
    assert (other.size, other.resolve({}).max_pixels, other.min_pixels) == (
        {"shortest_edge": 5000, "longest_edge": 9216},
        9216,
        5000,
    )
    assert one.size == {"shortest_edge": 4096, "longest_edge": 65536}
    with pytest.raises(ValueError, match="longest_edge must be a positive whole number"):
        other.max_pixels = "big"
    other.max_pixels = 4000
    with pytest.raises(ValueError, match="5000 is above longest_edge"):
        other.resolve({})


# options of one kind


def test_a_limit_is_checked_only_for_media_that_are_given(processor):
    """moss-vl-nano: images of at least 50176 pixels, frames of 36864 to 50176."""
    assert processor(text="<|video|>", videos=VIDEO, num_frames=2, max_pixels=45000)["grid_thw"].tolist() == [
        [2, 12, 14]
    ]
    frugal = MossVLProcessor.from_pretrained(NANO, video_max_pixels=40000)
    assert (
        frugal(text="<|image|>", images=PHOTO, min_pixels=50176, max_pixels=60000)["pixel_values"].shape[0]
        <= 60000 // 256
    )
    assert (
        processor(text="<|image|>", images=PHOTO, min_pixels=60000, max_pixels=60000)["pixel_values"].shape[0]
        <= 60000 // 256
    )
    assert processor(text="no media", max_pixels=40960)["input_ids"]
    for text, media in (("<|image|>", {"images": PHOTO}), ("<|image|><|video|>", {"images": PHOTO, "videos": VIDEO})):
        with pytest.raises(ValueError, match="50176 is above longest_edge"):
            processor(text=text, **media, max_pixels=40960)
    for text, given, message in (
        ("no media", {"max_pixels": "big"}, "max_pixels must be a positive"),
        ("no media", {"min_pixels": 9, "max_pixels": 8}, "is above"),
        ("no media", {"resized_height": 64}, "make a size together"),
        ("no media", {"fps": 0}, "video_fps must be"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(text=text, **given)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"padding_side": "left"}, "padding_side: no effect without padding"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of: no effect"),
        ({"padding": False, "padding_side": "left"}, "no effect"),
        ({"padding": "do_not_pad", "pad_to_multiple_of": 8}, "no effect"),
        ({"do_sample": False}, "do_sample is an argument of generate.*generate_kwargs"),
        ({"top_p": 1.0}, "top_p is an argument of generate"),
        ({"do_rescal": False}, r"unknown keyword 'do_rescal'; (?!did you mean 'do_rescale')"),
    ],
    ids=str,
)
def test_text_options_without_effect_and_options_of_generate(processor, given, message):
    with pytest.raises(ValueError, match=message):
        processor(text="a", **given)
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(CHATS[0], tokenize=True, add_generation_prompt=True, **given)


def test_no_padding_side_without_padding(processor):
    out = processor.apply_chat_template(
        CHATS[0], tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    assert out["input_ids"].shape[0] == 1
    both = processor.apply_chat_template(
        CHATS[:2],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        text_kwargs={"padding": True},
    )
    assert sorted(both["attention_mask"][:, 0].tolist()) == [0, 1], "padded on the left"


def test_media_as_bytes_beside_their_path(processor):
    data = open(PHOTO, "rb").read()
    plain = processor(text="<|image|>", images=PHOTO)["pixel_values"]
    for image in (
        {"bytes": data, "path": "gone.jpg"},
        {"bytes": data, "path": None},
        {"bytes": None, "path": PHOTO},
        {"bytes": bytearray(data)},
    ):
        assert torch.equal(processor(text="<|image|>", images=[image])["pixel_values"], plain)
        for part in ({"type": "image", "image": image}, {"type": "image", **image}):
            chat = [{"role": "user", "content": [part]}]
            assert torch.equal(
                processor.apply_chat_template(chat, tokenize=True, return_dict=True)["pixel_values"], plain
            )
    with pytest.raises(ValueError, match="its 'bytes' must be bytes"):
        processor(text="<|image|>", images=[{"bytes": PHOTO}])
    with pytest.raises(ValueError, match="holds one image, got two"):
        processor(text="<|image|>", images=[{"bytes": data, "url": PHOTO}])


# videos and frames


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"video_start": 5, "video_end": 99}, [5, 6, 7, 8, 9]),
        ({"video_end": 60}, list(range(10))),
        ({"video_start": -3}, list(range(10))),
        ({"video_start": -2, "video_end": 2, "nframes": 4}, [0, 0.5, 1, 1.5]),
        ({"video_start": 9, "video_end": 10.5, "fps": 2}, [9, 9.5]),
        ({"video_start": "8", "video_end": "99", "fps": "1"}, [8, 9]),
        ({"segments": [[8, 12]], "nframes": 4}, [8, 9, 9.967, 9.967]),
    ],
    ids=str,
)
def test_start_and_end_are_clamped_before_sampling(processor, given, expected):
    """For a segment, only the times of its frames are clamped."""
    [clip] = processor.video_processor.extract({"video": VIDEO, **given})
    assert clip.timestamps == pytest.approx(expected, abs=0.05)
    if "segments" not in given:
        whole = processor(text="<|video|>", videos=VIDEO, **given, return_metadata=True)
        assert whole["video_metadata"][0]["actual_timestamps"] == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    "given",
    [{"video_start": 10}, {"video_start": 12}, {"video_end": 0}, {"video_start": -2, "video_end": -1}],
    ids=str,
)
def test_start_and_end_outside_the_video(processor, given):
    with pytest.raises(ValueError, match="lies outside the video, which lasts 10 s"):
        processor(text="<|video|>", videos=VIDEO, **given)


@pytest.mark.parametrize(
    "metadata, message",
    [
        (
            {"fps": 24.0, "duration": 10.0, "total_num_frames": 240},
            "total_num_frames 240 for 6 frames, without frames_indices",
        ),
        ({"fps": 24.0, "total_num_frames": 5}, "total_num_frames 5"),
        ({"fps": 24.0, "duration": 10.0}, "duration 10, but 6 frames at fps 24 last 0.25 s"),
        ({"fps": 1.0, "frames_indices": [0, 1, 2]}, "expected 6 frames_indices, one per frame"),
        ({"timestamps": list(range(6)), "frames_indices": [0]}, "expected 6 frames_indices"),
        (
            {"fps": 1.0, "frames_indices": [0, 1, 2, 3, 4, 9], "total_num_frames": 9},
            "go up to 9, beyond total_num_frames 9",
        ),
        ({"fps": 1.0, "total_num_frames": "six"}, "total_num_frames must be a positive"),
    ],
    ids=str,
)
def test_metadata_that_contradict_the_frames(processor, metadata, message):
    for given in (
        metadata,
        VideoMetadata(**{"total_num_frames": None, **metadata}) if "timestamps" not in metadata else metadata,
    ):
        with pytest.raises(ValueError, match=message):
            processor.video_processor(videos=[frames(6)], do_sample_frames=False, video_metadata=[given])


@pytest.mark.parametrize(
    "metadata, expected",
    [
        ({"fps": 2.0, "total_num_frames": 6, "duration": 3.0}, [0, 0.5, 1, 1.5, 2, 2.5]),
        ({"fps": 2.0, "duration": 2.8}, [0, 0.5, 1, 1.5, 2, 2.5]),
        (
            {"fps": 24.0, "duration": 10.0, "total_num_frames": 240, "frames_indices": [0, 48, 96, 144, 192, 239]},
            [0, 2, 4, 6, 8, 239 / 24],
        ),
        ({"timestamps": [0, 1, 2, 3, 4, 5], "total_num_frames": 240}, [0, 1, 2, 3, 4, 5]),
        ({"fps": "2"}, [0, 0.5, 1, 1.5, 2, 2.5]),
    ],
    ids=str,
)
def test_metadata_that_fit(processor, metadata, expected):
    [clip] = processor.video_processor.extract([frames(6)], do_sample_frames=False, video_metadata=[metadata])
    assert clip.timestamps == pytest.approx(expected)


@pytest.mark.parametrize("as_array", [False, True])
def test_frames_with_their_metadata_as_transformers_loads_them(processor, as_array):
    video = np.stack([np.asarray(frame) for frame in frames(4)]) if as_array else frames(4)
    metadata = VideoMetadata(total_num_frames=40, fps=10.0, duration=4.0, frames_indices=[0, 10, 20, 39])
    plain = processor(text="<|video|>", videos=[video], video_metadata=[metadata], do_sample_frames=False)
    for given in ([(video, metadata)], (video, metadata), [[(video, metadata)]], [{"video": (video, metadata)}]):
        out = processor(text="<|video|>", videos=given, do_sample_frames=False)
        assert out["input_ids"] == plain["input_ids"] and torch.equal(out["pixel_values"], plain["pixel_values"])
    assert processor(text="<|video|><|video|>", videos=[(video, metadata)] * 2, do_sample_frames=False)[
        "grid_thw"
    ].shape == (2, 3)
    assert len(processor.video_processor.extract((video, metadata), do_sample_frames=False)) == 1
    with pytest.raises(ValueError, match="give one of them"):
        processor(text="<|video|>", videos=[(video, metadata)], video_metadata=[{"fps": 1}])


def test_a_rate_as_a_string_and_frames_under_a_wrong_key(processor):
    chat = [{"role": "user", "content": [{"type": "video", "video": VIDEO, "fps": "0.5"}]}]
    assert processor.apply_chat_template(chat, tokenize=True, return_dict=True)["grid_thw"].tolist()[0][0] == 5
    for rate, shown in (("fast", "'fast'"), (10**400, "1000"), ("1e999", "'1e999'"), (0, "0")):
        with pytest.raises(ValueError, match=f"video_fps must be a number above 0, got {shown}"):
            processor(text="<|video|>", videos=VIDEO, fps=rate)
    with pytest.raises(ValueError, match="video_start must be a number, got 1000"):
        processor(text="<|video|>", videos={"video": VIDEO, "video_start": 10**400})
    with pytest.raises(
        ValueError,
        match=r"a list of frames goes under 'video', as in \{'video': frames, 'fps': rate\}; got it under 'frames'",
    ):
        processor(text="<|video|>", videos={"frames": frames(3), "fps": 1.0})


# pipelines


def test_a_pipeline_of_ready_objects_answers_in_batches(model):
    ready = AutoProcessor.from_pretrained(NANO, trust_remote_code=True, padding_side="left")
    pipe = pipeline("image-text-to-text", model=model, processor=ready, device="cpu")
    for batch_size in (1, 2, 3):
        out = pipe(text=CHATS, max_new_tokens=8, return_full_text=False, batch_size=batch_size)
        assert [one[0]["generated_text"] for one in out] == ANSWERS
    same = pipe(text=[CHATS[0], CHATS[0]], max_new_tokens=8, return_full_text=False, batch_size=2)
    assert [one[0]["generated_text"] for one in same] == [ANSWERS[0]] * 2


def test_a_pipeline_with_right_padding_says_how_to_mend_it(model):
    ready = AutoProcessor.from_pretrained(NANO, trust_remote_code=True)
    pipe = pipeline("image-text-to-text", model=model, processor=ready, device="cpu")
    same = pipe(text=[CHATS[0], CHATS[0]], max_new_tokens=8, return_full_text=False, batch_size=2)
    assert [one[0]["generated_text"] for one in same] == [ANSWERS[0]] * 2, "rows of one length need no padding"
    with pytest.raises(ValueError, match="expected padding on the left.*padding_side='left'"):
        pipe(text=CHATS, max_new_tokens=8, batch_size=3)
    assert ready.tokenizer.padding_side == "right" and ready.return_cross_attention_mask


def test_a_pipeline_drops_the_mask_unless_it_was_requested(processor):
    out = processor(text="a", return_tensors="pt")
    out["labels"] = out["input_ids"]
    assert "cross_attention_mask" in out and dict(**out).keys() == out.keys()
    out["text"] = "a"
    assert "cross_attention_mask" not in out and out["text"] == "a"
    asked = processor(text="a", return_tensors="pt", return_cross_attention_mask=True)
    asked["text"] = "a"
    assert "cross_attention_mask" in asked


def test_a_text_pipeline_pads_left_and_does_not_change_a_given_tokenizer():
    texts = ["A star is", "What color is it, say, in the evening of a long day?", "Say yes."]
    given = AutoTokenizer.from_pretrained(NANO)
    assert given.padding_side == "right"
    pipe = pipeline("text-generation", model=str(NANO), trust_remote_code=True, tokenizer=given)
    loaded = pipeline("text-generation", model=str(NANO), trust_remote_code=True)
    settings = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    alone = [pipe(text, **settings)[0]["generated_text"] for text in texts]
    for each in (pipe, loaded):
        assert [one[0]["generated_text"] for one in each(texts, batch_size=3, **settings)] == alone
    assert given.padding_side == "right" and given(["a", "b c"], padding=True)["attention_mask"][0][-1] == 0


# records


@pytest.mark.parametrize(
    "part, message",
    [
        ({"video": "v.mp4", "fps": 2, "nframes": 3}, "both say how many frames"),
        ({"video": "v.mp4", "video_start": 99}, "lies outside the video"),
        ({"video": "v.mp4", "video_end": -1}, "lies outside the video"),
        ({"video": "v.mp4", "video_start": "soon"}, "video_start must be a number"),
        ({"video": "v.mp4", "video_start": 0, "segments": [[0, 1]]}, "both say which part"),
        ({"video": "v.mp4", "sample_fps": 2}, "sample_fps is the rate"),
        ({"video": ["a.png", "b.png"]}, "nothing says when they are shown"),
        ({"video": ["a.png", "b.png"], "fps": 0}, "must be a number above 0"),
        ({"video": ["a.png", "b.png"], "fps": 1, "segments": [[5, 6]]}, "lies outside the video"),
        ({"video": "v.mp4", "max_pixels": "big"}, "max_pixels must be"),
        ({"video": "v.mp4", "do_sample_frames": False, "fps": 1}, "without effect"),
        ({"video": "v.mp4", "segments": [[0, 1], [1, 2]], "max_frames": 1}, "2 segments share its max_frames 1"),
        ({"image": "a.png", "max_pixels": "big"}, "max_pixels must be"),
        ({"image": "a.png", "resized_height": 64}, "make a size together"),
        ({"image": "a.png", "min_pixels": 9, "max_pixels": 8}, "is above"),
    ],
    ids=str,
)
def test_options_of_records_are_checked_before_training(folder, part, message):  # noqa: F811
    record = {"messages": turns([{"type": next(iter(part)), **part}, {"type": "text", "text": "?"}], "yes")}
    with pytest.raises(ValueError, match=f"record 0: .*{message}"):
        read_one(folder, record)


def test_options_of_records_are_checked_with_those_of_the_command(folder, processor):  # noqa: F811
    """Options that are valid alone may contradict the settings of a checkpoint."""

    def record(**part):
        return read_one(folder, {"messages": turns([{"type": next(iter(part)), **part}, "?"], "yes")})

    parts = (processor.image_processor, processor.video_processor)
    many, small = record(video="v.mp4", nframes=300), record(image="a.png", max_pixels=4096)
    for one, options, message in (
        (many, {}, "num_frames 300 lies outside"),
        (small, {}, "50176 is above longest_edge"),
        (record(image="a.png", max_pixels=60000), {"min_pixels": 62000}, "62000 is above longest_edge"),
    ):
        with pytest.raises(ValueError, match=message):
            check_media_options(one, *parts, **options)
    check_media_options(many, *parts, max_frames=300)
    check_media_options(small, *parts, min_pixels=1024, video_fps=2.0, num_extract_threads=1)


@pytest.mark.parametrize(
    "options, bad", [([], True), (["--max-frames", "300"], False), (["--max-frames", "200"], True)]
)
def test_finetune_refuses_such_records_before_it_loads_the_model(folder, processor, tmp_path, options, bad):  # noqa: F811
    path = write(folder, {"response": "x", "videos": [{"video": "v.mp4", "nframes": 300}]})
    args = finetune.parse(
        ["--checkpoint", str(NANO), "--data", str(path), "--output", str(tmp_path), "--cpu", *options]
    )
    if bad:
        with pytest.raises(ValueError, match="record 0: num_frames 300 lies outside min_frames 1 to max_frames"):
            finetune.make_datasets(args, processor)
    else:
        assert len(finetune.make_datasets(args, processor)[0]) == 1
