"""Unusual and wrong inputs: defaults that contradict options, media given twice, keys without effect, wrong types."""

import copy
import json
import os

import numpy as np
import pytest
import torch
from offline import (  # noqa: F401 - most are fixtures
    LONGER_VIDEO,
    VIDEO,
    batch,
    calls,
    model,
    nothing_is_encoded,
    pictures,
    processor,
    query_of,
    serve,
    text_of,
    user,
)
from PIL import Image
from test_infer_cli import IMAGE, asked, infer, loaded, run  # noqa: F401 - most are fixtures
from test_infer_inputs import batch as lines  # noqa: F401 - fixtures
from test_infer_inputs import grids  # noqa: F401 - a fixture
from test_records import read_records

from moss_vl import generation_options, generation_queries
from moss_vl.conversation import read_medium, read_messages, same_medium, same_source
from moss_vl.tools import query_files
from moss_vl.video_processing_moss_vl import MossVLVideoProcessor


def frames_of(calls):
    return [call["grid_thw"][:, 0].tolist() for call in calls]


# defaults


@pytest.mark.parametrize(
    "options, frames",
    [
        ({"sample_fps": 2}, 6),
        ({"sample_fps": 2, "max_frames": 5}, 5),
        ({"sample_fps": 2, "min_frames": 2}, 6),
        ({"sample_fps": 2, "num_frames": 2}, 2),
        ({"sample_fps": 2, "fps": 1}, 3),
        ({"sample_fps": 2, "do_sample_frames": True}, 3),
        ({"sample_fps": 2, "video_fps": None}, 6),
        ({"do_sample_frames": False, "fps": 2}, 6),
        ({"do_sample_frames": False, "sample_fps": 2}, 6),
        ({"do_sample_frames": None, "sample_fps": 2}, 6),
    ],
)
def test_frame_options_act_as_in_the_processor(model, processor, pictures, calls, options, frames):
    """The default rate and bounds of the methods do not contradict given options."""
    video = [pictures[0]] * 6
    alone = processor(text="<|video|>", videos=[video], return_tensors="pt", max_pixels=16384, **options)
    assert alone["grid_thw"][:, 0].tolist() == [frames]
    batch(model, processor, query_of("x", videos=[video], media={"max_pixels": 16384, **options}))
    model.offline_video_generate(processor, "x", video, longest_edge=16384, max_new_tokens=1, **options)
    assert frames_of(calls) == [[frames]] * 2


def test_the_default_rate_of_the_methods_overrides_that_of_the_processor(model, processor, calls):
    other = copy.copy(processor)
    other.video_processor = MossVLVideoProcessor(video_fps=3.0)
    model.offline_video_generate(processor, "x", LONGER_VIDEO, longest_edge=16384, max_new_tokens=1)
    model.offline_video_generate(other, "x", LONGER_VIDEO, longest_edge=16384, max_new_tokens=1)
    batch(model, other, query_of("x", videos=[LONGER_VIDEO]))
    model.offline_video_generate(other, "x", LONGER_VIDEO, longest_edge=16384, max_new_tokens=1, video_fps=None)
    assert frames_of(calls) == [[5], [5], [5], [15]]


def test_defaults_that_contradict_nothing_stay():
    every = generation_options.MEDIA_DEFAULTS
    rate = {name: value for name, value in every.items() if name != "video_fps"}
    none = {name: value for name, value in rate.items() if name not in ("min_frames", "max_frames")}
    for given, left in (
        ({}, every),
        ({"max_frames": 3}, every),
        ({"do_sample_frames": True}, every),
        ({"sample_fps": None}, every),
        ({"do_sample_frames": False}, none),
        ({"sample_fps": 2}, none),
        ({"sample_fps": 2, "max_frames": 3}, rate),
        ({"sample_fps": 2, "do_sample_frames": True}, every),
    ):
        assert generation_options.defaults_beside(given) == left, given


def test_do_sample_frames_false_takes_every_frame_of_a_file(model, processor, calls):
    model.offline_video_generate(processor, "x", VIDEO, do_sample_frames=False, longest_edge=16384, max_new_tokens=1)
    assert frames_of(calls) == [[15]]
    with pytest.raises(
        ValueError, match="do_sample_frames=False takes every frame, and leaves max_frames without effect"
    ):
        model.offline_video_generate(processor, "x", VIDEO, do_sample_frames=False, max_frames=3)


def test_size_sets_both_limits(model, processor, pictures, calls):
    for media in (
        {"size": {"shortest_edge": 4096, "longest_edge": 16384}},
        {"size": {"longest_edge": 16384}},
        {"max_pixels": 16384, "size": None},
    ):
        batch(model, processor, query_of("a", images=pictures[2], videos=VIDEO, media={"num_frames": 1, **media}))
    first = calls[0]["grid_thw"].tolist()
    assert all(call["grid_thw"].tolist() == first for call in calls) and first[1] == [1, 6, 8]
    state = batch(model, processor, query_of("a", images=pictures[2], media={"max_pixels": 65536}))["session_states"][
        0
    ]
    state = batch(model, processor, query_of("b", media={"size": {"longest_edge": 16384}}), session_states=[state])[
        "session_states"
    ][0]
    assert state["media_kwargs"] == {"max_pixels": 16384} and json.loads(json.dumps(state)) == state
    for media, message in (
        ({"size": 5}, "size must be"),
        ({"size": {"height": 3}}, "size: unknown keyword 'height'"),
        ({"size": {"longest_edge": 0}}, "max_pixels"),
        (
            {"size": {"longest_edge": 9000}, "max_pixels": 9000},
            "size has 'longest_edge', and max_pixels, the same option",
        ),
        (
            {"size": {"shortest_edge": 9000}, "shortest_edge": 9000},
            "size has 'shortest_edge', and shortest_edge, the same option",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            batch(model, processor, query_of("a", images=pictures[0], media=media))


def test_refused_options_may_be_none(model, processor, pictures, calls):
    texts = [
        text_of(model, processor, query_of("a", images=pictures[0], media={"max_pixels": 16384, **none}))
        for none in ({}, {"audio": None, "frames": None})
    ]
    assert texts[0] == texts[1]
    model.offline_image_generate(processor, "a", pictures[0], audio=None, max_new_tokens=1)
    for media in ({"audio": "a.wav"}, {"audio": "a.wav", "max_pixels": None}):
        with pytest.raises(ValueError, match="audio is no option of MOSS-VL: MOSS-VL takes no audio"):
            batch(model, processor, query_of("a", media=media))
    with pytest.raises(ValueError, match="audio is no option of MOSS-VL"):
        model.offline_image_generate(processor, "a", pictures[0], audio="a.wav")


# media beside a content


@pytest.mark.parametrize(
    "key, value, message",
    [
        (
            "images",
            ["a.png"],
            "message 0 has 'images' outside its content, .*'a.png'.*; put each medium into the content, as a part "
            ".*'image'",
        ),
        ("image", "a.png", "message 0 has 'image'"),
        ("videos", ["a.mp4"], "a part .'type': 'video', 'video': ..."),
        ("media", ["a.png"], "'media'"),
        ("video_path", "a.mp4", "'video_path'"),
        ("image_url", {"url": "a.png"}, "'image_url'"),
        ("audios", ["a.wav"], "takes no audio"),
        ("images", [np.zeros((4, 4, 3), np.uint8)], "'images'"),
        ("image", np.zeros((4, 4, 3), np.uint8), "'image'"),
    ],
)
def test_media_beside_a_content_are_an_error(model, processor, nothing_is_encoded, key, value, message):
    messages = [{"role": "user", "content": "What?", key: value}]
    with pytest.raises(ValueError, match=f"^query 0: .*{message}"):
        batch(model, processor, {"messages": messages})
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(messages, tokenize=True)
    for nothing in (None, [], "", {}):
        assert read_messages([{"role": "user", "content": "What?", key: nothing}])[0]["content"] == "What?"


def test_tool_calls_that_no_template_reads_are_an_error(model, processor, monkeypatch):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "tool_calls": [{"name": "f"}]},
        {"role": "user", "content": "c"},
    ]
    with pytest.raises(ValueError, match="message 1 has 'tool_calls', but the chat template does not read it"):
        batch(model, processor, query_of(messages=messages))
    with pytest.raises(ValueError, match="message 1 has 'tool_calls', but there is no template"):
        batch(model, processor, query_of(messages=messages, use_template=False))
    messages[1]["tool_calls"] = []
    text_of(model, processor, query_of(messages=messages))
    messages[1]["tool_calls"] = [{"name": "f"}]
    monkeypatch.setattr(
        processor,
        "chat_template",
        "{% for message in messages %}{{ message.content ~ message.tool_calls }}{% endfor %}",
    )
    result = batch(model, processor, query_of(messages=messages))["results"][0]
    assert "b[{'name': 'f'}]" in result["input_text"]


# media that are given twice


def test_two_paths_of_one_file_are_the_same_medium(model, processor, pictures, calls, monkeypatch):
    folder, name = os.path.split(pictures[0])
    monkeypatch.chdir(folder)
    for path, again in ((name, pictures[0]), (pictures[0], f"./{name}"), (name, "file://" + pictures[0])):
        batch(model, processor, query_of(messages=user({"type": "image", "image": path}, "x"), images=[again]))
    assert frames_of(calls) == [[1]] * 3
    assert not same_source(name, os.path.join(os.path.dirname(folder), name)) and not same_source(
        "https://a/b.png", "/b.png"
    )


def test_a_copy_of_a_pillow_image_is_the_same_medium(tmp_path, pictures, model, processor, calls):
    path = tmp_path / "a.jpg"
    Image.open(pictures[2]).save(path)
    opened = Image.open(path)
    for copied in (opened.copy(), Image.open(path), Image.fromarray(np.asarray(opened))):
        assert same_medium("image", opened, copied) and same_medium("image", copied, opened)
        assert same_medium("video", [opened, opened], [copied, copied])
    batch(model, processor, query_of(messages=user({"type": "image", "image": opened}, "x"), images=[opened.copy()]))
    assert frames_of(calls) == [[1]]
    changed, turned, palette = opened.copy(), Image.open(path), [Image.new("P", (2, 2)) for _ in range(2)]
    changed.putpixel((3, 3), tuple(255 - x for x in changed.getpixel((3, 3))))
    turned.getexif()[0x0112] = 6
    for one, colours in zip(palette, ([0, 0, 0], [9, 9, 9]), strict=True):
        one.putpalette(colours)
    clear = [one.copy() for one in palette[:1] * 2]
    clear[0].info["transparency"] = 0
    assert not same_medium("image", *clear)
    for a, b in (
        (opened, changed),
        (opened, turned),
        (opened, opened.convert("L")),
        (opened, opened.resize((64, 64))),
        palette,
        (opened, str(path)),
    ):
        assert not same_medium("image", a, b) and not same_medium("image", b, a)


def test_an_empty_prompt_may_stand_beside_messages(model, processor, pictures, lines, tmp_path):
    query = query_of(messages=user({"type": "image", "image": pictures[0]}, "What?"))
    assert text_of(model, processor, {**query, "prompt": ""}) == text_of(model, processor, query)
    with pytest.raises(ValueError, match="a prompt or messages, got both"):
        batch(model, processor, {**query, "prompt": " "})
    human = [{"from": "human", "value": "Hi"}]
    code, _, results, _ = lines(
        {"prompt": "", "conversations": human},
        {"prompt": "", "messages": human},
        {"messages": human},
        {"media": "a.jpg", "prompt": ""},
    )
    assert code == 0 and len({result["text"] for result in results[:3]}) == 1, results
    turns = [*human, {"from": "gpt", "value": "Hello"}]
    (tmp_path / "records.jsonl").write_text(
        json.dumps({"prompt": "", "conversations": turns}) + "\n" + json.dumps({"messages": turns})
    )
    assert [record.messages for record in read_records(tmp_path / "records.jsonl")] == [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    ] * 2


def clip(*segments, **options):
    return {"video_path": LONGER_VIDEO, "segments": [list(segment) for segment in segments], **options}


def test_segments_may_be_named_again_as_one_video(model, processor, calls, tmp_path):
    parts = [{"type": "video", "video": clip((0, 2))}, "and", {"type": "video", **clip((3.5,))}]
    queries = [
        query_of(messages=user(*parts, "x"), **again)
        for again in ({}, {"videos": [clip((0, 2), (3.5,))]}, {"videos": clip((0, 2), (3.5,))})
    ]
    queries.append(
        query_of(
            messages=user({"type": "video", "video": clip((0, 2), (3.5,))}, "x"), videos=[clip((0, 2)), clip((3.5,))]
        )
    )
    before = copy.deepcopy(queries)
    results = [batch(model, processor, query)["results"][0] for query in queries]
    assert queries == before and frames_of(calls) == [[2, 1]] * 4
    assert [result["input_text"] for result in results[:3]] == [results[0]["input_text"]] * 3
    turns = [*queries[0]["messages"], {"role": "assistant", "content": "b"}]
    (tmp_path / "records.jsonl").write_text(json.dumps({"messages": turns, "videos": [clip((0, 2), (3.5,))]}))
    assert read_records(tmp_path / "records.jsonl")[0].videos == [clip((0, 2)), clip((3.5,))]


@pytest.mark.parametrize(
    "again, message",
    [
        ([clip((3.5,), (0, 2))], "video 0 of the messages has the options .*, but in videos"),
        (
            [clip((0, 2), (3.5,), max_frames=4)],
            "videos names 1 videos whose segments are 2 parts of the messages, and gives them max_frames",
        ),
        ([clip((0, 2), (3.5,), (4,))], "but videos holds 1"),
        ([{**clip((0, 2), (3.5,)), "video_path": VIDEO}], "at the same index"),
    ],
)
def test_other_segments_beside_messages_are_an_error(model, processor, nothing_is_encoded, again, message):
    parts = [{"type": "video", "video": clip((0, 2))}, {"type": "video", "video": clip((3.5,))}]
    with pytest.raises(ValueError, match=message):
        batch(model, processor, query_of(messages=user(*parts, "x"), videos=again))


def test_a_part_may_be_given_as_a_medium(model, processor, pictures, calls, lines, grids):
    assert read_medium("image", {"type": "image_url", "image_url": {"url": "a"}}) == ("a", {})
    batch(
        model,
        processor,
        query_of(
            "x",
            images=[{"type": "image", "image": pictures[0]}],
            videos={"type": "video", "video": VIDEO, "nframes": 2},
        ),
    )
    assert frames_of(calls) == [[1, 2]]
    with pytest.raises(ValueError, match="an image given as a dict is of type 'video'; expected image"):
        batch(model, processor, query_of("x", images=[{"type": "video", "path": pictures[0]}]))
    code, _, results, _ = lines(
        {
            "media": [
                {"type": "video", "video": "b.mp4"},
                {"type": "image", "image": "a.jpg"},
                {"type": "image_url", "image_url": {"url": "a.jpg"}},
            ]
        },
        {"media": [{"type": "video", "path": "b.mp4"}]},
        {"media": [{"type": "audio", "path": "b.mp4"}]},
        {"media": [{"type": "image", "video": "b.mp4"}]},
    )
    assert grids == [[2, 1, 1], [2]] and code == 1
    assert (
        "'image' or 'video', or a type of that name" in results[2]["error"]
        and "is of type 'image'; expected video" in results[3]["error"]
    )


# keys of a query


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("segments", [[0, 1]], "'segments' belongs to one video; write .'video_path': ..., 'segments': ..0, 1..."),
        ("video_metadata", {"fps": 2}, "'video_metadata' belongs to one video"),
        ("size", {"longest_edge": 9}, "'size' belongs into its media_kwargs"),
        ("video_start", 3, "belongs into its media_kwargs"),
        ("num_return_sequences", 2, "the offline methods return one text"),
        ("output_scores", True, "the offline methods return one text"),
        ("min_p", 0.1, "belongs into its generate_kwargs"),
        ("padding", True, "an option of the processor's call"),
        ("return_tensors", "pt", "an option of the processor's call"),
        ("audios", ["a.wav"], "takes no audio"),
        ("max_num_frames", 3, "write max_frames"),
        ("do_resize", False, "do_resize is always True"),
        ("session_states", [None], "goes beside the queries"),
        ("media", ["a.png"], "'media' is a key of lines for infer.py"),
    ],
)
def test_options_beside_the_keys_of_a_query_are_an_error(model, processor, nothing_is_encoded, key, value, message):
    query = {"prompt": "a", "videos": [VIDEO], key: value}
    with pytest.raises(ValueError, match=f"query 0: query: .*{message}"):
        batch(model, processor, query)
    [[error]] = serve(model, processor, query)
    assert error.startswith("[ERROR] query: ")
    assert generation_queries.check_query({"prompt": "a", key: None}, generation_queries.QUERY_KEYS) == {key: None}


@pytest.mark.parametrize(
    "key",
    ["prompt_2", "top_1", "videos2", "image_1", "seed", "resolution", "image_size", "frames", "raw_fps", "media_type"],
)
def test_keys_of_a_record_are_left_alone(key):
    assert generation_queries.check_query({"prompt": "a", key: 1}, generation_queries.QUERY_KEYS) == {key: 1}


@pytest.mark.parametrize(
    "owner, options, message",
    [
        ("media_kwargs", {"segments": [[0, 1]]}, "media_kwargs: 'segments' belongs to one video"),
        ("media_kwargs", {"max_new_tokens": 3}, "media_kwargs: 'max_new_tokens' belongs into its generate_kwargs"),
        ("media_kwargs", {"padding": True}, "media_kwargs: 'padding' is an option of the processor's call"),
        ("generate_kwargs", {"fps": 3}, "generate_kwargs: 'fps' belongs into its media_kwargs"),
        ("generate_kwargs", {"seed": 1}, "generate_kwargs: 'seed' is no option of generate; call torch.manual_seed"),
    ],
)
def test_options_in_the_wrong_dict_are_an_error(model, processor, nothing_is_encoded, owner, options, message):
    with pytest.raises(ValueError, match=message):
        batch(model, processor, {"prompt": "a", owner: options})


def test_the_methods_hint_at_the_right_argument(model, processor, nothing_is_encoded):
    for arguments, message in (
        (dict(segments=[[0, 1]]), "offline_video_generate: 'segments' belongs to one video"),
        (dict(seed=1), "offline_video_generate: 'seed' is no option of generate"),
        (dict(padding=True), "offline_video_generate: 'padding' is an option of the processor's call"),
        (dict(messages=[]), "offline_video_generate: unknown key 'messages'; known: "),
    ):
        with pytest.raises(ValueError, match=message):
            model.offline_video_generate(processor, "a", VIDEO, **arguments)
    with pytest.raises(ValueError, match="a list of frames goes under 'video', as in .'video': frames, 'fps': rate."):
        batch(model, processor, {"videos": {"frames": ["a.png"], "fps": 1.0}})


# wrong types


def test_an_array_of_several_media_is_an_error(model, processor, nothing_is_encoded):
    videos, images = np.zeros((2, 3, 64, 64, 3), np.uint8), torch.zeros((2, 3, 64, 64), dtype=torch.uint8)
    for call in (
        lambda: model.offline_video_generate(processor, "a", videos),
        lambda: batch(model, processor, {"videos": videos}),
    ):
        with pytest.raises(
            ValueError,
            match="videos must be one video or a list, got an array of shape .2, 3, 64, 64, 3.: 2 videos in one",
        ):
            call()
    with pytest.raises(
        ValueError, match="images must be one image or a list, got an array of shape .2, 3, 64, 64.: 2 images in one"
    ):
        model.offline_image_generate(processor, "a", images)


def test_a_list_in_place_of_one_medium_is_an_error(model, processor, pictures, nothing_is_encoded):
    for part, message in (
        (
            {"type": "image", "image": np.zeros((2, 64, 64, 3), np.uint8)},
            "of type image holds one image, got an array of shape .2, 64, 64, 3.",
        ),
        (
            {"type": "video", "video": torch.zeros(2, 3, 3, 64, 64)},
            "of type video holds one video, got an array of shape .2, 3, 3, 64, 64.",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            batch(model, processor, {"messages": user(part, "x")})
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(user(part, "x"), tokenize=True)
    with pytest.raises(ValueError, match="images is nested too deep"):
        batch(model, processor, {"prompt": "x", "images": [[pictures[0], pictures[1]]]})


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_beams", "2"),
        ("num_beams", 0),
        ("num_beams", True),
        ("max_length", "9"),
        ("min_new_tokens", -1),
        ("no_repeat_ngram_size", 1.5),
        ("eos_token_id", "a"),
        ("eos_token_id", [1, "a"]),
        ("pad_token_id", [1]),
        ("stop_strings", 3),
        ("stop_strings", ["a", 3]),
        ("streamer", 3),
        ("logits_processor", [3]),
        ("logits_processor", 3),
        ("stopping_criteria", [None]),
        ("stopping_criteria", None),
    ],
)
def test_generate_options_of_wrong_types_are_an_error(model, processor, nothing_is_encoded, name, value):
    with pytest.raises(ValueError, match=f"query 0: {name} must"):
        batch(model, processor, query_of("a", generate={name: value}))


def test_generate_options_of_all_right_types_are_accepted(model, processor):
    options = {
        "num_beams": 2,
        "max_length": np.int64(40),
        "eos_token_id": [3, np.int64(4)],
        "pad_token_id": 0,
        "stop_strings": ["a", "b"],
    }
    for extra in (
        {},
        {"stop_strings": "a"},
        {"eos_token_id": torch.tensor([3, 4])},
        {"eos_token_id": None, "stop_strings": None, "num_beams": None},
    ):
        given = {**options, **extra}
        taken = generation_options.generate_arguments(model, processor.tokenizer, given, 64)
        assert all(taken[name] is value or taken[name] == value for name, value in given.items() if value is not None)


def test_another_processor_is_an_error(model, processor):
    with pytest.raises(ValueError, match="processor must be a MossVLProcessor, got a .*Tokenizer"):
        batch(model, processor.tokenizer, {"prompt": "a"})


@pytest.mark.parametrize(
    "state",
    [
        {"messages": [{"role": "user", "content": "a"}], "media_kwargs": {}},
        {"messages": "a", "media_kwargs": {}},
        {"messages": [3], "media_kwargs": {}},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}], "media_kwargs": {}},
        {"messages": [], "media_kwargs": None},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}], "media_kwargs": {}},
        {"messages": [{"content": []}], "media_kwargs": {}},
        {"messages": [{"role": "user", "content": ["a"]}], "media_kwargs": {}},
        {"messages": [], "media_kwargs": {"fsp": 1}},
        {"messages": []},
        [],
        "a",
    ],
    ids=str,
)
def test_a_state_that_no_call_returned_is_an_error(model, processor, nothing_is_encoded, state):
    with pytest.raises(ValueError, match="query 0: .*session state"):
        batch(model, processor, query_of("b"), session_states=[state])


@pytest.mark.parametrize(
    "name", ["use_template", "reset_session", "persist_session", "thinking_mode", "system_prompt_type"]
)
@pytest.mark.parametrize("value", [np.zeros(2), torch.ones(3), ["x"], {}, "yes"], ids=str)
def test_flags_and_choices_of_wrong_types_are_an_error(model, processor, nothing_is_encoded, name, value):
    with pytest.raises(ValueError, match=f"query 0: {name}"):
        batch(model, processor, query_of("a", **{name: value}))
    with pytest.raises(ValueError, match="query 0: do_sample must be True or False"):
        batch(model, processor, query_of("a", generate={"do_sample": value}))


# infer.py


def test_frame_options_of_a_line_override_the_command_line(lines, grids, asked):
    """`lines` asks with --frames 2."""
    part = {"type": "video", "video": "b.mp4"}
    queries = {
        "bounded above": ({"videos": "b.mp4", "media_kwargs": {"max_frames": 1}}, [1]),
        "bounded below": ({"videos": "b.mp4", "media_kwargs": {"min_frames": 5}}, [5]),
        "bounded far below": ({"videos": "b.mp4", "media_kwargs": {"min_frames": 4, "max_frames": 6}}, [4]),
        "within": ({"videos": "b.mp4", "media_kwargs": {"min_frames": 1, "max_frames": 6}}, [2]),
        "bounds of a part": (
            {"messages": user({**part, "max_frames": 1}, {**part, "min_frames": 3}, part)},
            [1, 3, 2],
        ),
        "number of a part": ({"messages": user({**part, "nframes": 4}, part)}, [4, 2]),
        "rate of a part": ({"messages": user({**part, "fps": 0.5}, part)}, [5, 2]),
        "every frame of a list": (
            {"messages": user({"type": "video", "video": ["a.jpg"] * 3}), "media_kwargs": {"sample_fps": 1}},
            [3],
        ),
        "bounds of a video": ({"videos": [{"video": "b.mp4", "max_frames": 1}, "b.mp4"]}, [1, 2]),
    }
    code, _, results, _ = lines(*(query for query, _ in queries.values()))
    assert code == 0, results
    assert dict(zip(queries, grids, strict=True)) == {name: frames for name, (_, frames) in queries.items()}
    grids.clear()
    code, _, results, _ = lines(
        {"messages": user({**part, "nframes": 4})},
        {"messages": user({**part, "min_frames": 3})},
        {"videos": "b.mp4", "media_kwargs": {"min_frames": 3}},
        {"videos": "b.mp4", "media_kwargs": {"max_frames": 1}},
        {"videos": "b.mp4"},
        options=("--fps", 5),
    )
    assert code == 0 and grids == [[4], [3], [3], [1], [2]], results


def test_size_of_a_line_overrides_the_limits_of_the_command_line(lines, asked):
    code, _, results, _ = lines(
        {"images": "a.jpg", "media_kwargs": {"size": {"longest_edge": 60000}}},
        {"images": "a.jpg"},
        options=("--max-pixels", 50176),
    )
    assert code == 0, results
    assert "max_pixels" in asked[1]["media_kwargs"] and asked[0]["media_kwargs"].get("max_pixels") is None


def test_messages_with_from_and_value(lines):
    human, answer = {"from": "human", "value": "<|image|>What color is the star?"}, {"from": "gpt", "value": "a star"}
    code, _, results, asked = lines(
        {"messages": [human, answer], "images": ["a.jpg"]},
        {"conversations": [human, answer], "images": ["a.jpg"]},
        {"messages": [{"role": "user", "content": human["value"]}], "images": ["a.jpg"]},
        {"messages": [{**human, "role": "user"}]},
        {"messages": ["a"]},
    )
    assert (
        len({result["text"] for result in results[:3]}) == 1
        and asked[0]["messages"] == asked[1]["messages"] == asked[2]["messages"]
    )
    assert (
        code == 1
        and "got from and role" in results[3]["error"]
        and "messages must be a list of turns" in results[4]["error"]
    )


def test_lines_with_options_of_wrong_types_are_an_error(lines, tmp_path, run):
    code, _, results, asked = lines({"prompt": "a", "media_kwargs": 3}, {"prompt": "a", "generate_kwargs": "b"})
    assert code == 1 and not asked
    assert [result["error"] for result in results] == [
        "media_kwargs must be an object, got 3",
        "generate_kwargs must be an object, got 'b'",
    ]
    (tmp_path / "odd.jsonl").write_bytes(b"\xff")
    code, _, err = run("--batch", tmp_path / "odd.jsonl", "--out", tmp_path / "r.jsonl")
    assert code == 2 and "odd.jsonl is not UTF-8" in err


def test_a_damaged_image_is_reported_as_an_image(run, tmp_path):
    (tmp_path / "cut.jpg").write_bytes(IMAGE.read_bytes()[:10])
    (tmp_path / "cut.mp4").write_bytes(IMAGE.read_bytes()[:10])
    for medium, kind in (
        (tmp_path / "cut.jpg", "image"),
        ("data:image/jpeg;base64,/9j/4AAQSkZJRg==", "image"),
        (tmp_path / "cut.mp4", "video"),
    ):
        code, out, err = run(medium, "-p", "a")
        assert (
            (code, out) == (2, "")
            and f"{kind}" in err
            and {"image": "video", "video": "an image"}[kind] not in err.replace(str(tmp_path), "")
        ), err


def test_the_kind_of_a_damaged_file_follows_from_its_name(tmp_path):
    for name, kind in (
        ("a.PNG", "image"),
        ("a.webp", "image"),
        ("a.gif", "video"),
        ("a.mkv", "video"),
        ("a", "video"),
    ):
        (tmp_path / name).write_bytes(b"damaged")
        assert query_files.probe_file(tmp_path / name) == kind, name


def test_a_json_file_may_hold_one_object(run, asked, tmp_path):
    query = {"prompt": "Hi", "id": 3}
    file, out = tmp_path / "q.json", tmp_path / "r.jsonl"
    for text, count in (
        (json.dumps(query, indent=1), 1),
        (json.dumps(query), 1),
        (f"{json.dumps(query)}\n" * 2, 2),
        (f"{json.dumps(query)}\n[", 2),
    ):
        file.write_text(text)
        assert len(query_files.read_lines(file)) == count
    file.write_text(json.dumps(query, indent=1)[:-1])
    code, _, err = run("--batch", file, "--out", out)
    assert code == 2 and "begins like a JSON object, but is not one" in err and not out.exists()
    record = {"prompt": "a", "response": "b"}
    file.write_text(json.dumps(record, indent=1))
    assert len(read_records(file)) == 1
    file.write_text(f"{json.dumps(record)}\n" * 2)
    assert len(read_records(file)) == 2
