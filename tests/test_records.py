"""Training records: both forms, all spellings, relative paths, and messages about bad records."""

import json
import logging

import pytest
from make_media import write_sound, write_video
from PIL import Image

from moss_vl.training.records import NAMED_RECORDS, read_records


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images a.png and b.png, a video of 2 s, and files that are neither."""
    folder = tmp_path_factory.mktemp("records")
    for name in "ab":
        Image.new("RGB", (64, 64), "red").save(folder / f"{name}.png")
    Image.new("RGB", (1, 400), "red").save(folder / "thin.png")
    write_video(folder / "v.mp4", count=20, rate=10)
    write_sound(folder / "sound.wav")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.png").write_text("no picture")
    (folder / "text.mp4").write_text("no video" * 100)
    return folder


def write(folder, *records, name="data.json"):
    path = folder / name
    lines = name.endswith("l")
    path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(list(records)), encoding="utf-8")
    return path


def read_one(folder, record):
    [found] = read_records(write(folder, record))
    return found


def turns(*contents):
    return [
        {"role": role, "content": content}
        for role, content in zip(["user", "assistant"] * len(contents), contents, strict=False)
    ]


def test_prompt_and_response(folder):
    record = {"prompt": "What?", "response": "a star", "images": ["a.png", "b.png"], "videos": "v.mp4", "id": 7}
    found = read_one(folder, record | {"system_prompt": "Be short."})
    expected = turns("<|image|><|image|><|video|>What?", "a star")
    assert found.messages == [{"role": "system", "content": "Be short."}, *expected]
    assert read_one(folder, record).messages == expected
    assert found.images == [str(folder / "a.png"), str(folder / "b.png")] and found.videos == [str(folder / "v.mp4")]
    assert read_one(folder, {"response": "once upon a time"}).messages == turns("", "once upon a time")
    nothing = {"prompt": "", "images": None, "videos": [], "system_prompt": ""}
    assert read_one(folder, nothing | {"response": "x"}).messages == turns("", "x")


def test_all_spellings_of_a_conversation_are_equal(folder):
    media, rest = {"images": ["a.png"], "videos": ["v.mp4"]}, ("yes", "Sure?", "yes")
    expected = read_one(folder, {"messages": turns("Look: <|image|>, and <|video|>?", *rest), **media})
    first, second, third = ({"type": "text", "text": text} for text in ("Look: ", ", and ", "?"))
    image, video = {"type": "image"}, {"type": "video"}
    parts = [first, image, second, video, third]
    filled = [first, image | {"image": "a.png"}, second, video | {"path": "v.mp4"}, third]
    openai = {"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "video_url", "video_url": "v.mp4"}
    sharegpt = zip(["human", "gpt"] * 2, ["Look: <|image_pad|>, and <|video_pad|>?", *rest], strict=True)
    for record in (
        {"conversations": turns("Look: <|image|>, and <|video|>?", *rest), "images": "a.png", "videos": "v.mp4"},
        {"conversations": [{"from": role, "value": value} for role, value in sharegpt], **media},
        {"messages": turns(parts, *rest), **media},
        {"messages": [{**message, "name": None} for message in turns(filled, *rest)], "images": None},
        {"messages": turns([first, image, *filled[2:]], *rest), "images": ["a.png"]},
        {"messages": turns([first, openai[0], second, openai[1], third], *rest)},
    ):
        assert read_one(folder, record) == expected, record


def test_each_segment_has_a_placeholder(folder):
    segments = {"video_path": "v.mp4", "segments": [[0, 1], [1.5]]}
    expected = [{"video_path": str(folder / "v.mp4"), "segments": [[0, 1], [1.5]]}]
    pair = read_one(folder, {"prompt": "What?", "response": "x", "videos": segments})
    once = read_one(folder, {"messages": turns("<|video|>What?", "x"), "videos": [segments]})
    twice = read_one(folder, {"messages": turns("<|video|><|video|>What?", "x"), "videos": [segments]})
    part = read_one(
        folder, {"messages": turns([{"type": "video", "video": segments}, {"type": "text", "text": "What?"}], "x")}
    )
    apart = read_one(folder, {"messages": turns("<|video|> or <|video|>?", "x"), "videos": [segments]})
    assert pair == once == twice == part and pair.messages == turns("<|video|><|video|>What?", "x")
    assert apart.messages == turns("<|video|> or <|video|>?", "x")
    assert {repr(found.videos) for found in (pair, apart)} == {repr(expected)}
    assert read_one(folder, {"response": "x", "videos": {"video_path": "v.mp4"}}).videos == [str(folder / "v.mp4")]


def test_json_and_jsonl_and_several_files(folder, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "c.png")
    first = write(folder, {"response": "1", "images": "a.png"}, {"response": "2"})
    second = write(tmp_path, {"response": "3", "images": "c.png"}, {"response": "4"}, name="more.jsonl")
    second.write_text("\ufeff" + second.read_text().replace("\n", "\n\n") + "\n")
    found = read_records([first, str(second)])
    assert [record.messages[1]["content"] for record in found] == list("1234")
    assert [record.images for record in found] == [[str(folder / "a.png")], [], [str(tmp_path / "c.png")], []]
    places = [(first, "record 0"), (first, "record 1"), (second, "record 0 (line 1)"), (second, "record 1 (line 3)")]
    assert [record.where for record in found] == [f"{file}, {place}" for file, place in places]


CALL = {"prompt": "What?"}
BAD = [
    ("text", "a record must be an object"),
    ({}, "or else messages or conversations; got neither"),
    (CALL | {"respones": "x"}, "unknown key 'respones'; did you mean 'response'?"),
    (CALL | {"response": "x", "imges": "a.png"}, "did you mean 'images'?"),
    (CALL | {"response": "x", "image": "a.png", "images": "a.png"}, "has 'image' and 'images', which mean the same"),
    (CALL, "no response"),
    (CALL | {"response": None}, "no response"),
    (CALL | {"response": " \n"}, "the response is empty"),
    (CALL | {"response": 3}, "response must be a string, got 3"),
    (CALL | {"response": "x<|im_end|>"}, "response holds '<|im_end|>'"),
    ({"prompt": "<|image|>What?", "response": "x", "images": "a.png"}, "media come before the prompt automatically"),
    (CALL | {"response": "x", "system_prompt": ["be short"]}, "system_prompt must be a string"),
    (CALL | {"response": "x", "messages": turns("a", "b")}, "got prompt, response, messages"),
    ({"messages": turns("a", "b"), "conversations": turns("a", "b")}, "got messages, conversations"),
    ({"messages": []}, "messages must be a list of at least one"),
    ({"messages": turns("a")}, "there is no assistant turn, so there is nothing to learn"),
    ({"messages": turns("a", "b", "c")}, "the last turn is the user's"),
    ({"messages": turns("a", "b")[1:]}, "begins with the assistant"),
    ({"messages": turns("a", " <|image|> "), "images": "a.png"}, "turn 1, the assistant's, is empty"),
    (
        {"messages": [{"role": "assistent", "content": "x"}]},
        "turn 0: unknown role 'assistent'; did you mean 'assistant'?",
    ),
    (
        {"messages": [{"role": "user"}, *turns("a", "b")]},
        "turn 0: expected role and content, or from and value; got role",
    ),
    (
        {"messages": [{"role": "user", "content": "a", "weight": 1}, *turns("a", "b")]},
        "turn 0 has an unknown key 'weight'",
    ),
    (
        {"messages": [*turns("a", "b"), {"role": "system", "content": "c"}, *turns("a", "b")]},
        "turn 2 is a system turn",
    ),
    (
        {"messages": [{"role": "system", "content": "c"}, *turns("a", "b")], "system_prompt": "d"},
        "leave out one of them",
    ),
    ({"messages": turns([{"type": "audio"}], "b")}, "turn 0: a part is a string, or a dict with 'type'"),
    ({"messages": turns([{"type": "text"}], "b")}, "turn 0: a part of type text needs a string under 'text'"),
    (
        {"messages": turns([{"type": "image", "image": "a.png", "url": "b.png"}], "b")},
        "a part of type image holds one image, got two",
    ),
    ({"messages": turns([{"type": "image", "imgae": "a.png"}], "b")}, "did you mean 'image'?"),
    (
        {"messages": turns("<|image|><|image|>", "b"), "images": ["a.png"]},
        "placeholders for 2 images, but images holds 1; they must match",
    ),
    (
        {"messages": turns("<|video|>" * 3, "b"), "videos": {"video_path": "v.mp4", "segments": [[0], [1]]}},
        "placeholders for 3 videos, but videos holds 1; they must match",
    ),
    (CALL | {"response": "x", "images": "c.png"}, "no such image file"),
    (CALL | {"response": "x", "images": ["a.png", 3]}, "expected a path for images, got 3"),
    (CALL | {"response": "x", "images": "text.png"}, "is not an image that Pillow can read"),
    (CALL | {"response": "x", "images": "thin.png"}, "at most 200 times the shorter"),
    (CALL | {"response": "x", "images": "https://example.com/a.png"}, "download it once"),
    (CALL | {"response": "x", "videos": "text.mp4"}, "is not a video that PyAV can read"),
    (CALL | {"response": "x", "videos": "empty.mp4"}, "is empty"),
    (CALL | {"response": "x", "videos": "sound.wav"}, "has no video in it"),
    (
        CALL | {"response": "x", "videos": {"video_pth": "v.mp4"}},
        "unknown keyword 'video_pth'; did you mean 'video_path'?",
    ),
    (CALL | {"response": "x", "videos": {"segments": [[0, 1]]}}, "expected a path"),
    (CALL | {"response": "x", "videos": {"video_path": "v.mp4", "segments": []}}, "segments of"),
    (CALL | {"response": "x", "videos": {"video_path": "v.mp4", "segments": [[1, 0]]}}, "with start < end"),
    (CALL | {"response": "x", "videos": {"video_path": "v.mp4", "segments": [[0, float("nan")]]}}, "segments of"),
    (
        CALL | {"response": "x", "videos": {"video_path": "v.mp4", "segments": [[0, 1], [7, 9]]}},
        "segment [7, 9] lies outside",
    ),
]


@pytest.mark.parametrize("record, reason", BAD, ids=[reason for _, reason in BAD])
def test_a_bad_record_is_named(folder, record, reason):
    path = write(folder, {"response": "good"}, record)
    with pytest.raises(ValueError) as error:
        read_records(path)
    assert f"1 of the 2 records are bad:\n  {path}, record 1: " in str(error.value) and reason in str(error.value)


def test_all_bad_records_are_listed_at_once_or_skipped(folder, caplog):
    path = write(folder, *[{"response": text} for text in ("a", "", "b", "")], name="some.jsonl")
    path.write_text(path.read_text() + "\n{broken")
    with pytest.raises(ValueError) as error:
        read_records(path)
    assert all(f"record {index} (line {index + 1}): " in str(error.value) for index in (1, 3, 4))
    assert "not a JSON object" in str(error.value)
    with caplog.at_level(logging.WARNING):
        found = read_records(path, skip_bad=True)
    assert [record.messages[1]["content"] for record in found] == ["a", "b"]
    [warning] = caplog.messages
    assert all(f"record {index} " in warning for index in (1, 3, 4))

    path = write(folder, *[{"response": ""}] * (NAMED_RECORDS + 5))
    with pytest.raises(ValueError) as error:
        read_records(path)
    assert str(error.value).count(", record ") == NAMED_RECORDS and "and 5 more" in str(error.value)
    with pytest.raises(ValueError, match="no good record"):
        read_records(path, skip_bad=True)


@pytest.mark.parametrize("more", [0, 1])
def test_bad_records_beyond_the_listed_ones_are_counted(tmp_path, more):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"response": ""}) + "\n" for _ in range(NAMED_RECORDS + more)))
    with pytest.raises(ValueError) as error:
        read_records(path)
    message = str(error.value)
    assert message.startswith(f"{NAMED_RECORDS + more} of the {NAMED_RECORDS + more} records are bad:")
    assert (
        message.count(", record ") == NAMED_RECORDS
        and ("and 1 more" in message) == bool(more)
        and "and 0 more" not in message
    )


def test_a_check_can_make_a_record_bad(folder):
    def check(record):
        if record.messages[1]["content"] == "b":
            raise ValueError("not b")

    path = write(folder, {"response": "a"}, {"response": "b"})
    with pytest.raises(ValueError, match="record 1: not b"):
        read_records(path, check=check)
    assert len(read_records(path, skip_bad=True, check=check)) == 1


def test_files_that_cannot_be_read(folder):
    with pytest.raises(FileNotFoundError, match="no such data file"):
        read_records(folder / "nowhere.json")
    for content, reason in (
        (b"[1, 2", "not one"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"  \n", "no record"),
        (b"[]", "no record"),
    ):
        (folder / "bad.json").write_bytes(content)
        with pytest.raises(ValueError, match=reason):
            read_records(folder / "bad.json")


def test_videos_are_not_decoded_to_check_them(folder, monkeypatch):
    import av

    def decode(*args, **kwargs):
        raise AssertionError("decoded")

    class Opened:
        def __init__(self, *args, **kwargs):
            self.container = opened(*args, **kwargs)

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.container.close()

        def __getattr__(self, name):
            return decode if name in ("decode", "demux") else getattr(self.container, name)

    opened = av.open
    monkeypatch.setattr(av, "open", Opened)
    assert read_one(folder, {"response": "x", "videos": "v.mp4"}).videos
