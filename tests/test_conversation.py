"""Chat messages and media as callers write them, read into one plain form."""

import copy
import os
from pathlib import Path

import numpy as np
import pytest

from moss_vl import conversation
from moss_vl.conversation import (
    collect_media,
    count_placeholders,
    for_template,
    local_path,
    locate,
    read_medium,
    read_messages,
    read_part,
    same_medium,
    split_placeholders,
)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"image": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "auto"}},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "image", "image_url": "a.png"},
        {"type": "image", "image_url": {"url": "a.png"}},
        {"type": "input_image", "image_url": "a.png"},
        {"type": "image", "image": "a.png", "text": None, "video": None},
        {"type": "image", "image": "a.png", "image_url": {"url": "a.png"}},
        {"image_url": "a.png"},
        {"type": "image", "image": {"path": "a.png"}},
    ],
)
def test_forms_of_an_image_part(part):
    given = copy.deepcopy(part)
    assert read_part(part) == {"type": "image", "image": "a.png"} and part == given


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video", "video": "a.mp4", "fps": 2.0, "nframes": None},
        {"type": "video", "video": "a.mp4", "video_fps": 2.0},
        {"type": "video_url", "video_url": {"url": "a.mp4"}, "fps": 2.0},
        {"type": "video", "video": {"video_path": "a.mp4", "fps": 2.0}},
        {"type": "video", "video_path": "a.mp4", "fps": 2.0},
        {"type": "video", "path": "a.mp4", "fps": 2.0, "video_fps": 2.0},
    ],
)
def test_forms_of_a_video_part_with_options(part):
    given = copy.deepcopy(part)
    assert read_part(part) == {"type": "video", "video": {"video_path": "a.mp4", "video_fps": 2.0}} and part == given


def test_strings_and_text_parts():
    expected = {"type": "text", "text": "x"}
    for part in (
        "x",
        {"type": "text", "text": "x"},
        {"text": "x"},
        {"type": "input_text", "text": "x", "image": None},
    ):
        assert read_part(part) == expected


def test_base64_is_a_data_url():
    for given in ("aGVsbG8=", "data:;base64,aGVsbG8="):
        assert read_part({"type": "image", "base64": given}) == {"type": "image", "image": "data:;base64,aGVsbG8="}


@pytest.mark.parametrize(
    "part, message",
    [
        ({"type": "audio", "audio": "a.wav"}, "a part of a message is a string, or a dict with 'type'"),
        ({"type": "imag", "imag": "a"}, "did you mean 'image'"),
        ({"type": ["image"]}, "a part of a message is"),
        (3, "a part of a message is"),
        ({}, "a part of a message is"),
        ({"type": "text"}, "needs a string under 'text'"),
        ({"type": "text", "text": 3}, "needs a string under 'text'"),
        ({"type": "text", "text": "x", "max_pixels": 3}, "nothing else"),
        ({"type": "image", "image": "a", "imagee": 3}, "unknown keyword 'imagee'; did you mean 'image'"),
        ({"type": "image", "image": "a", "max_pixel": 3}, "unknown keyword 'max_pixel'; did you mean 'max_pixels'"),
        ({"type": "image", "image": "a", "fps": 3}, "unknown keyword 'fps'"),
        ({"type": "video", "video": "a", "raw_fps": 3}, "raw_fps is no option"),
        ({"type": "image", "image": "a", "path": "b"}, "got two: image='a' and path='b'"),
        ({"type": "image", "max_pixels": 3}, "has max_pixels, but no image"),
        ({"type": "image_url", "image_url": {"uri": "a"}}, "did you mean 'url'"),
        ({"type": "image_url", "image_url": {}}, "holds no image"),
        (
            {"type": "image_url", "image_url": {"url": "a", "detail": "low"}},
            "detail='low' is no option of MOSS-VL; give max_pixels",
        ),
        (
            {"type": "video", "video": "a", "fps": 1, "video_fps": 2},
            "fps=1 and video_fps=2 name the same option and disagree",
        ),
        ({"type": "video", "video": {"video": "a", "fps": 1}, "fps": 2}, "video_fps is given twice, as 1 and 2"),
        ({"type": "image", "base64": 3}, "base64 must be a string"),
    ],
)
def test_bad_parts_are_errors(part, message):
    with pytest.raises(ValueError, match=message):
        read_part(part)


def test_messages_shorten_base64_strings():
    long = "QUJD" * 5000
    for part in (
        {"type": "image", "base64": long, "imagee": 1},
        {"type": "imge", "base64": long},
        {"type": "image", "image": "x", "base64": long},
        {"type": "text", "text": 3, "image": {"url": f"data:image/png;base64,{long}"}},
        [long],
        {"type": "image", "image_url": {"uri": long}},
        {"type": "image", "base64": [long]},
    ):
        with pytest.raises(ValueError) as error:
            read_part(part)
        assert len(str(error.value)) < 1000
    with pytest.raises(ValueError) as error:
        read_messages([{"content": long}])
    assert len(str(error.value)) < 1000


def test_messages_are_read_into_plain_parts():
    messages = (
        {
            "role": "user",
            "name": "u",
            "tool_calls": None,
            "content": ("x", {"image": "a.png", "max_pixels": 5000}, {"type": "video"}),
        },
    )
    given = copy.deepcopy(messages)
    plain = read_messages(messages)
    image = {"image": "a.png", "max_pixels": 5000}
    assert plain == [
        {
            "role": "user",
            "name": "u",
            "content": [{"type": "text", "text": "x"}, {"type": "image", "image": image}, {"type": "video"}],
        }
    ]
    assert collect_media(plain, "image") == [image] and collect_media(plain, "video") == [] and messages == given
    assert read_messages(plain) == plain


def test_each_segment_has_a_placeholder():
    messages = read_messages(
        [
            {"role": "user", "content": [{"video": "a", "segments": [[0, 1], [2]]}, {"image": "b"}, "x"]},
            {"role": "assistant", "content": "y"},
        ]
    )
    kinds = [part["type"] for part in for_template(messages)[0]["content"]]
    assert kinds == ["video", "video", "image", "text"] and for_template(messages)[1] == messages[1]
    for segments in ([], "ab", 3):
        with pytest.raises(ValueError, match="at least one"):
            count_placeholders("video", {"video_path": "a", "segments": segments})


def test_placeholders_in_texts_become_parts():
    parts = [
        {"type": "text", "text": "a<|image|>b<|video_pad|>"},
        {"type": "image", "image": "c"},
        {"type": "text", "text": ""},
    ]
    found = list(split_placeholders(parts))
    assert found == [
        {"type": "text", "text": "a"},
        {"type": "image"},
        {"type": "text", "text": "b"},
        {"type": "video"},
        *parts[1:],
    ]


def test_media_are_compared_by_source_and_options():
    array = np.zeros((4, 4, 3), np.uint8)
    for kind, a, b in [
        ("image", "x/a.png", Path("x/a.png")),
        ("image", "/x/a.png", "file:///x/a.png"),
        ("image", {"url": "x/./a.png"}, "x/a.png"),
        ("image", array, array.copy()),
        ("image", b"12", b"12"),
        ("image", "data:;base64,QQ==", {"base64": "QQ=="}),
        ("video", {"video": "a", "fps": 2}, {"video_path": "a", "video_fps": 2.0}),
        ("video", ["1.png", "2.png"], ("1.png", Path("2.png"))),
        ("video", {"video": "a", "segments": [[0, 1]]}, {"video_path": "a", "segments": ((0.0, 1.0),)}),
    ]:
        assert same_medium(kind, a, b) and same_medium(kind, b, a)
    for kind, a, b in [
        ("image", "a.png", "b.png"),
        ("image", array, array + 1),
        ("image", array, array[:2]),
        ("image", array, "a.png"),
        ("video", ["a"], ["a", "b"]),
        ("video", "a", {"video": "a", "fps": 2}),
        ("video", {"video": "a", "segments": [[0, 1]]}, {"video": "a", "segments": [[0, 2]]}),
    ]:
        assert not same_medium(kind, a, b)


def test_relative_paths_are_joined_to_a_folder(tmp_path):
    assert locate("image", {"url": "a.png"}, tmp_path) == str(tmp_path / "a.png")
    assert locate("image", Path("a.png"), str(tmp_path)) == str(tmp_path / "a.png")
    assert locate("video", {"video": ["1.png", "/x/2.png"], "fps": 2}, tmp_path) == {
        "video_path": [str(tmp_path / "1.png"), "/x/2.png"],
        "video_fps": 2,
    }
    for stays in ("/a.png", "file:///a.png", "https://a/b.png", "data:,x", "~/a.png", b"bytes"):
        assert locate("image", stays, tmp_path) == stays


def test_local_paths_of_urls_and_home_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/a.png") == str(tmp_path / "a.png") and local_path("file:///x/a%20b.png") == "/x/a b.png"
    assert (
        local_path("FILE://localhost/x") == "/x"
        and local_path(Path("x")) == "x"
        and local_path("http://x/y") == "http://x/y"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~strange").touch()
    assert local_path("~strange") == "~strange" and os.path.exists(local_path("~strange"))
    with pytest.raises(ValueError, match="another machine, 'host'"):
        local_path("file://host/x")


def test_every_option_of_a_medium_can_be_read():
    for kind, names in conversation.MEDIUM_OPTIONS.items():
        assert len(names) > 3
        for name in names:
            source, options = read_medium(kind, {kind: "a", name: [[0, 1]]})
            assert source == "a" and len(options) == 1
