"""Media of training records in the forms of clients: all keys of a part, options, frames, and media listed twice."""

import pytest
from test_records import folder, read_one, turns  # noqa: F401 - folder is a fixture

from moss_vl.training.record_media import probe as _probe


def asked(*parts):
    return {"messages": turns([*parts, {"type": "text", "text": "?"}], "yes")}


IMAGE_PARTS = [
    {"type": "image", "image": "a.png"},
    {"type": "image", "image_url": "a.png"},
    {"type": "image", "image_url": {"url": "a.png"}},
    {"type": "image_url", "image_url": {"url": "a.png", "detail": "auto"}},
    {"type": "image", "url": "a.png"},
    {"type": "image", "path": "a.png"},
    {"type": "input_image", "image_url": "a.png"},
    {"image": "a.png"},
    {"type": "image", "image": {"path": "a.png"}},
]


@pytest.mark.parametrize("part", IMAGE_PARTS, ids=str)
def test_every_form_of_an_image(folder, part):  # noqa: F811
    found = read_one(folder, asked(part))
    assert found.images == [str(folder / "a.png")] and found.messages[0]["content"] == "<|image|>?"


def test_string_parts_urls_and_home(folder, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HOME", str(folder))
    url = (folder / "a.png").as_uri()
    found = read_one(
        folder,
        {"messages": turns(["Look: <|image|>", {"type": "image", "path": url}, "?"], "yes"), "images": ["b.png"]},
    )
    assert found.messages[0]["content"] == "Look: <|image|><|image|>?"
    assert found.images == [str(folder / "b.png"), url]


def test_options_stay_with_their_medium(folder):  # noqa: F811
    found = read_one(
        folder,
        asked(
            {"type": "video", "video": "v.mp4", "fps": 2, "max_pixels": 5000},
            {"type": "image", "image": "a.png", "min_pixels": 9},
        ),
    )
    assert found.videos == [{"video_path": str(folder / "v.mp4"), "video_fps": 2, "max_pixels": 5000}]
    assert found.images == [{"image": str(folder / "a.png"), "min_pixels": 9}]
    clip = read_one(folder, asked({"type": "video", "path": "v.mp4", "segments": [[0, 1], [1, 2]]}))
    assert clip.messages[0]["content"] == "<|video|><|video|>?"
    assert clip.videos == [{"video_path": str(folder / "v.mp4"), "segments": [[0, 1], [1, 2]]}]


def test_a_list_of_frames_is_one_video(folder):  # noqa: F811
    frames = [str(folder / name) for name in ("a.png", "b.png")]
    found = read_one(folder, asked({"type": "video", "video": ["a.png", "b.png"], "sample_fps": 2.0}))
    assert found.videos == [{"video_path": frames, "sample_fps": 2.0}] and found.messages[0]["content"] == "<|video|>?"
    with pytest.raises(ValueError, match="record 0.*nothing says when they are shown"):
        read_one(folder, {"prompt": "", "response": "x", "videos": ["a.png", "b.png"]})
    with pytest.raises(ValueError, match="no such image file"):
        read_one(folder, asked({"type": "video", "video": ["a.png", "c.png"], "fps": 2.0}))


def test_media_that_are_listed_again(folder):  # noqa: F811
    image, video = {"type": "image", "image": "a.png"}, {"type": "video", "video": "v.mp4"}
    segments = {"video_path": "v.mp4", "segments": [[0, 1], [1.5]]}
    once = read_one(folder, asked(image, video))
    for again in (
        {"images": ["a.png"]},
        {"videos": "v.mp4"},
        {"images": [(folder / "a.png").as_uri()], "videos": [{"path": "v.mp4"}]},
    ):
        found = read_one(folder, asked(image, video) | again)
        assert found.messages == once.messages and len(found.images) == len(found.videos) == 1
    clip = read_one(folder, asked({"type": "video", "video": segments}) | {"videos": [segments]})
    assert clip.videos == [{"video_path": str(folder / "v.mp4"), "segments": [[0, 1], [1.5]]}]
    for record, message in (
        (asked(image) | {"images": ["b.png"]}, "image 0 of the messages is .*a.png.*, but images has .*b.png"),
        (
            asked(image) | {"images": ["a.png", "b.png"]},
            "placeholders for 0 images, and hold 1 .images may also list all 1.*but images holds 2",
        ),
        (
            asked(image, {"type": "image"}, {"type": "image"}) | {"images": ["a.png"]},
            r"placeholders for 2 images, and hold 1 .images may also list all 3.*but images holds 1",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            read_one(folder, record)


BASE64 = "data:video/mp4;base64," + "A" * 5000


@pytest.mark.parametrize(
    "record",
    [
        {"response": "x", "videos": {"video_path": BASE64, "segments": [[1, 0]]}},
        {"response": "x", "videos": {"base64": BASE64, "segments": [3]}},
        {"response": "x", "videos": [BASE64]},
        {"response": "x", "images": ["https://example.com/" + "A" * 5000]},
        {"messages": turns([{"type": "image", "base64": BASE64, "imge": "x"}], "y")},
    ],
    ids=["segments", "base64", "video", "URL", "part"],
)
def test_no_message_quotes_a_whole_string(folder, record):  # noqa: F811
    with pytest.raises(ValueError) as error:
        read_one(folder, record)
    assert "A" * 500 not in str(error.value)


def test_segments_must_have_a_length_and_begin_before_the_end(folder):  # noqa: F811
    def video(*segments):
        return {"response": "x", "videos": {"video_path": "v.mp4", "segments": list(segments)}}

    assert read_one(folder, video([2.0])).videos and read_one(folder, video([0, 0.5], [0.5, 9])).videos
    with pytest.raises(ValueError, match="with start < end"):
        read_one(folder, video([1, 1]))
    with pytest.raises(ValueError, match=r"segment \[2.1\] lies outside"):
        read_one(folder, video([2.1]))


def test_a_file_probed_as_a_video_is_not_an_image(folder):  # noqa: F811
    seconds, path = {}, str(folder / "v.mp4")
    _probe("video", path, seconds)
    with pytest.raises(ValueError, match="not an image that Pillow can read"):
        _probe("image", path, seconds)
