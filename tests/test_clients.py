"""Queries as clients of the released code send them: media named twice, records, aliases, defaults, ends of
answers."""

import copy
import json

import numpy as np
import pytest
import torch
from offline import (  # noqa: F401 - most are fixtures
    LONGER_VIDEO,
    RECORD,
    VIDEO,
    batch,
    calls,
    model,
    nothing_is_encoded,
    pictures,
    processor,
    query_of,
    serve,
    user,
)
from PIL import Image
from transformers import LogitsProcessorList

from moss_vl import generation_options, generation_queries
from moss_vl.generation_batches import UnpaddedPenalty, encode_turn, generate_inputs
from moss_vl.generation_queries import read_query


# media that are named again


def forms(pictures):
    """name -> (messages with their media, the media again as `images` and `videos`)."""
    a, b = pictures[:2]
    clip = {"video_path": LONGER_VIDEO, "segments": [[0, 2], [3.5]]}
    one, two, video = (
        {"type": "image", "image": a},
        {"type": "image_url", "image_url": {"url": b}},
        {"type": "video", "video": VIDEO},
    )
    pil = Image.open(a)
    frames = [pil, Image.open(a)]
    return {
        "both kinds": (user(one, video, "What?"), {"images": [a], "videos": [VIDEO]}),
        "images alone": (user(one, two, video, "What?"), {"images": [a, b]}),
        "bare": (user(one, video), {"videos": VIDEO}),
        "written otherwise": (user(one, two), {"images": [{"url": "file://" + a}, {"image": b}]}),
        "segments": (user({"type": "video", "video": clip}, "What?"), {"videos": [copy.deepcopy(clip)]}),
        "segments as tuples": (user({"type": "video", **clip}), {"videos": [{**clip, "segments": [(0, 2), (3.5,)]}]}),
        "segments given once": (user({"type": "video", "video": LONGER_VIDEO}), {"videos": [clip]}),
        "options given once": (
            user({"type": "video", "video": LONGER_VIDEO, "fps": 2}),
            {"videos": [LONGER_VIDEO]},
        ),
        "objects": (user({"type": "image", "image": pil}, "x"), {"images": [pil]}),
        "frames": (
            user({"type": "video", "video": frames, "sample_fps": 2.0}, "x"),
            {"videos": [{"video": frames, "sample_fps": 2.0}]},
        ),
        "arrays": (
            user({"type": "image", "image": np.zeros((64, 64, 3), np.uint8)}),
            {"images": [np.zeros((64, 64, 3), np.uint8)]},
        ),
        "a placeholder among them": (user(one, {"type": "image"}, "x"), {"images": [a, b]}),
    }


@pytest.mark.parametrize(
    "name, frames",
    [
        ("both kinds", [1, 1]),
        ("images alone", [1, 1, 1]),
        ("bare", [1, 1]),
        ("written otherwise", [1, 1]),
        ("segments", [2, 1]),
        ("segments as tuples", [2, 1]),
        ("segments given once", [2, 1]),
        ("options given once", [10]),
        ("objects", [1]),
        ("frames", [2]),
        ("arrays", [1]),
        ("a placeholder among them", [1, 1]),
    ],
)
def test_media_may_be_named_again_beside_messages(model, processor, pictures, calls, name, frames):
    messages, again = forms(pictures)[name]
    query = query_of(messages=messages, **again)
    model.offline_batch_generate(processor, [query])
    expected = {
        "segments given once": user(
            {"type": "video", "video": {"video_path": LONGER_VIDEO, "segments": [[0, 2], [3.5]]}}
        ),
        "a placeholder among them": user(messages[0]["content"][0], {"type": "image", "image": pictures[1]}, "x"),
    }.get(name, messages)
    model.offline_batch_generate(processor, [query_of(messages=expected)])
    first, second = calls
    assert (
        first["input_ids"].tolist() == second["input_ids"].tolist()
        and first["grid_thw"].tolist() == second["grid_thw"].tolist()
    )
    assert first["grid_thw"][:, 0].tolist() == frames
    for key in ("pixel_values", "image_features"):
        assert (key in first) == (key in second)
        if key in first:
            torch.testing.assert_close(first[key], second[key])


def test_queries_with_media_named_again_are_not_changed(model, processor, pictures):
    messages, again = forms(pictures)["segments given once"]
    query = query_of(messages=messages, **again)
    before = copy.deepcopy(query)
    result = batch(model, processor, query)["results"][0]
    assert query == before and result["messages"][0]["content"][0]["video"]["segments"] == [[0, 2], [3.5]]


NOT_THE_SAME = [
    (["b"], {}, r"image 0 of the messages is '.*64x64.png', but images has '.*128x64.png' at the same index"),
    (
        ["a", "b"],
        {},
        "leave placeholders for 0 images, and hold 1 .images may also list all 1 again., but images holds 2",
    ),
    (
        ["a"],
        {"extra": 2},
        "leave placeholders for 2 images, and hold 1 .images may also list all 3 again., but images holds 1",
    ),
    (
        [{"image": "a", "max_pixels": 5000}],
        {"max_pixels": 6000},
        "image 0 of the messages has the options .*6000.*, but in images .*5000",
    ),
    ([{"max_pixels": 5000}], {}, "images holds no image"),
]


@pytest.mark.parametrize("images, part, message", NOT_THE_SAME)
def test_other_media_beside_messages_are_an_error(
    model, processor, pictures, nothing_is_encoded, images, part, message
):
    paths = dict(zip("ab", pictures, strict=False))
    images = [
        {**one, "image": paths[one["image"]]}
        if isinstance(one, dict) and "image" in one
        else paths.get(one, one)
        if isinstance(one, str)
        else one
        for one in images
    ]
    placeholders = [{"type": "image"}] * part.get("extra", 0)
    filled = {
        "type": "image",
        "image": pictures[0],
        **{name: value for name, value in part.items() if name != "extra"},
    }
    with pytest.raises(ValueError, match=f"^query 0: .*{message}"):
        batch(model, processor, query_of(messages=user(filled, *placeholders, "x"), images=images))


def test_segments_may_have_a_placeholder_each(model, processor, calls):
    clip = {"video_path": LONGER_VIDEO, "segments": [[0, 2], [3.5]]}
    one = batch(model, processor, query_of(messages=user("a", {"type": "video", "video": clip})))["results"][0]
    each = batch(
        model, processor, query_of(messages=[{"role": "user", "content": "a<|video|><|video|>"}], videos=[clip])
    )["results"][0]
    assert (
        one["messages"] == each["messages"]
        and one["text"] == each["text"]
        and calls[0]["grid_thw"][:, 0].tolist() == [2, 1]
    )
    with pytest.raises(ValueError, match="segments of .* are not consecutive"):
        batch(model, processor, query_of(messages=[{"role": "user", "content": "<|video|>a<|video|>"}], videos=[clip]))


def test_all_forms_of_parts_give_the_same_prompt(model, processor, pictures):
    plain = batch(
        model,
        processor,
        query_of(messages=user({"type": "text", "text": "Look"}, {"type": "image", "image": pictures[0]})),
    )
    for image in (
        {"type": "image", "image_url": pictures[0]},
        {"type": "image", "image_url": {"url": "file://" + pictures[0]}},
        {"type": "image", "path": pictures[0]},
        {"type": "input_image", "image_url": pictures[0]},
    ):
        result = batch(model, processor, query_of(messages=user("Look", image)))
        assert result["results"][0]["text"] == plain["results"][0]["text"], image
        assert result["results"][0]["input_text"] == plain["results"][0]["input_text"]


def test_options_of_a_part_hold_for_its_medium_only(model, processor, calls):
    parts = [{"type": "video", "video": LONGER_VIDEO, "fps": 2.0}, {"type": "video", "video": LONGER_VIDEO}]
    state = batch(model, processor, query_of(messages=user(*parts)))["session_states"][0]
    assert json.loads(json.dumps(state)) == state
    batch(model, processor, query_of("b", media={}), session_states=[state])
    assert [call["grid_thw"][:, 0].tolist() for call in calls] == [[10, 5]] * 2


def test_a_list_of_frames_is_one_video(model, processor, pictures, calls):
    frames = [pictures[0]] * 3
    assert (
        generation_queries.list_media("video", frames) == [frames]
        and generation_queries.list_media("image", frames) == frames
    )
    model.offline_video_generate(processor, "x", frames, sample_fps=2.0, max_new_tokens=1)
    assert calls[0]["grid_thw"][:, 0].tolist() == [3]


# records of clients


def test_other_keys_of_a_query_are_copied_into_its_result(model, processor, pictures):
    query = query_of("Hi", **RECORD)
    before = copy.deepcopy(query)
    result = batch(model, processor, query, query_of("Hi", text="mine", index="mine"))
    assert {name: result["results"][0][name] for name in RECORD} == RECORD and query == before
    assert result["results"][1]["text"] == result["results"][0]["text"] and result["results"][1]["index"] == 1
    assert not RECORD.keys() & result["session_states"][0].keys()
    assert serve(model, processor, query) == [[result["results"][0]["text"]]]


@pytest.mark.parametrize(
    "key, near",
    [
        ("promt", "prompt"),
        ("prompts", "prompt"),
        ("Prompt", "prompt"),
        ("pormpt", "prompt"),
        ("image", "images"),
        ("vidoes", "videos"),
        ("message", "messages"),
        ("generate_kwarg", "generate_kwargs"),
        ("generation_kwargs", "generate_kwargs"),
        ("sytem_prompt", "system_prompt"),
        ("media-kwargs", "media_kwargs"),
        ("usetemplate", "use_template"),
        ("max_new_token", "max_new_tokens"),
        ("stop_genration", "stop_generation"),
    ],
)
def test_a_misspelled_key_is_an_error(model, processor, nothing_is_encoded, key, near):
    with pytest.raises(ValueError, match=f"query 0: query: unknown key '{key}'; did you mean '{near}'"):
        batch(model, processor, {"prompt": "a", key: "x"})
    [[error]] = serve(model, processor, {"prompt": "a", key: "x"})
    assert error.startswith("[ERROR]") and near in error


@pytest.mark.parametrize(
    "key",
    [
        "prompt_id",
        "source",
        "task",
        "answer",
        "question",
        "image_id",
        "video_id",
        "caption",
        "category",
        "split",
        "image_path",
        "conversations",
        "system",
        "n_frames",
        "url",
        "choices",
        "tools",
        "x",
        "timestamps",
    ],
)
def test_a_key_that_is_near_no_known_one_is_no_misspelling(key):
    assert generation_queries.check_query({"prompt": "a", key: 1}, generation_queries.QUERY_KEYS) == {key: 1}


def test_options_in_the_wrong_place_are_an_error(model, processor, nothing_is_encoded):
    for key, box in (
        ("max_new_tokens", "generate_kwargs"),
        ("num_beams", "generate_kwargs"),
        ("video_fps", "media_kwargs"),
        ("fps", "media_kwargs"),
    ):
        with pytest.raises(ValueError, match=f"'{key}' belongs into its {box}"):
            batch(model, processor, {"prompt": "a", key: 2})
    with pytest.raises(ValueError, match="stream_output is for the queue"):
        batch(model, processor, {"prompt": "a", "stream_output": True})
    assert generation_queries.check_query(
        {"prompt": "a", "stream_output": False, "fps": None}, generation_queries.QUERY_KEYS
    ) == {"fps": None}


def test_media_kwargs_may_hold_options_of_absent_media(model, processor, pictures, calls):
    both = {
        "min_pixels": 4096,
        "max_pixels": 16384,
        "multi_image_max_pixels": 8192,
        "video_max_pixels": 2 * 16384,
        "video_fps": 4.0,
        "min_frames": 1,
        "max_frames": 2,
        "num_extract_threads": 2,
    }
    batch(model, processor, query_of("a", images=pictures[0], media=both))
    batch(model, processor, query_of("a", videos=[VIDEO], media=both))
    batch(model, processor, query_of("a", media=both))
    assert [call["grid_thw"][:, 0].tolist() for call in calls] == [[1], [2], [1]]
    for media, message in (
        ({"multi_image_max_pixels": 0}, "multi_image_max_pixels"),
        ({"max_frames": -1}, "max_frames"),
    ):
        with pytest.raises(ValueError, match=message):
            batch(model, processor, query_of("a", images=pictures[0], media=media))
        with pytest.raises(ValueError, match=message):
            batch(model, processor, query_of("a", videos=VIDEO, media=media))


def test_options_have_aliases(model, processor, calls):
    for media in ({"fps": 2}, {"nframes": 4}, {"total_pixels": 5 * 16384}, {"longest_edge": 16384}):
        batch(model, processor, query_of("a", videos=LONGER_VIDEO, media=media))
    assert [call["grid_thw"].tolist() for call in calls] == [[[10, 16, 20]], [[4, 16, 20]], [[5, 6, 8]], [[5, 6, 8]]]
    with pytest.raises(ValueError, match="video_fps and fps are names of the same option"):
        batch(model, processor, query_of("a", videos=LONGER_VIDEO, media={"fps": 2, "video_fps": 2}))


def test_none_yields_to_a_value_under_an_alias(model, processor, calls):
    for media in ({"max_pixels": 16384, "longest_edge": None}, {"longest_edge": None, "max_pixels": 16384}):
        batch(model, processor, query_of("a", videos=LONGER_VIDEO, media={"num_frames": 1, **media}))
    assert [call["grid_thw"].tolist() for call in calls] == [[[1, 6, 8]]] * 2


def test_messages_shorten_long_strings(model, processor):
    long = "data:image/png;base64," + "A" * 5000
    for query in (
        {"prompt": "a", "images": [long]},
        {"messages": user({"type": "image", "base64": "A" * 5000, "url": "x"})},
        {"messages": user({"type": "image", "image": long}), "images": ["b.png"]},
        {"messages": user({"type": "imge", "image": long})},
        {"messages": long},
        {"prompt": "a", "images": [{"path": long, "fsp": 1}]},
        {"prompt": "a", "images": "A" * 5000},
    ):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            batch(model, processor, query)
        assert "A" * 600 not in str(error.value), query


# given options and defaults, and numbers


def test_a_given_option_must_not_contradict_another(model, processor, pictures, nothing_is_encoded):
    for arguments, message in (
        (dict(num_frames=8, video_fps=1.0), "video_fps 1.0 and num_frames 8"),
        (dict(num_frames=8, fps=1), "video_fps 1 and num_frames 8"),
        (dict(shortest_edge=4096, min_pixels=5000), "min_pixels and shortest_edge are names of the same option"),
        (dict(shortest_edge=4096, min_pixels=4096), "min_pixels and shortest_edge are names of the same option"),
        (
            dict(num_extract_threads=4, frame_extract_num_threads=2),
            "frame_extract_num_threads and num_extract_threads are names of the same option",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model.offline_video_generate(processor, "a", VIDEO, **arguments)
    with pytest.raises(ValueError, match="max_pixels and longest_edge are names of the same option"):
        model.offline_image_generate(processor, "a", pictures[0], longest_edge=16777216, max_pixels=5000)


def test_a_default_yields_to_a_given_option(model, processor, pictures, calls):
    model.offline_video_generate(processor, "a", LONGER_VIDEO, num_frames=7, max_new_tokens=1)
    model.offline_video_generate(processor, "a", LONGER_VIDEO, nframes=np.int64(7), max_pixels=16384, max_new_tokens=1)
    model.offline_video_generate(processor, "a", LONGER_VIDEO, num_frames=7, video_fps=None, max_new_tokens=1)
    assert [call["grid_thw"].tolist() for call in calls] == [[[7, 16, 20]], [[7, 6, 8]], [[7, 16, 20]]]
    model.offline_image_generate(processor, "a", pictures[0], max_length=60)
    assert calls[-1]["max_length"] == 60 and "max_new_tokens" not in calls[-1]


def test_a_fixed_size_replaces_default_limits(model, processor, pictures, calls):
    model.offline_image_generate(processor, "a", pictures[0], resized_height=64, resized_width=96, max_new_tokens=1)
    assert calls[0]["grid_thw"].tolist() == [[1, 4, 6]]
    with pytest.raises(ValueError, match="max_pixels"):
        model.offline_image_generate(
            processor, "a", pictures[0], longest_edge=16777216, resized_height=64, resized_width=96
        )


def test_numpy_numbers_are_accepted(model, processor, pictures, calls):
    media = {"max_pixels": np.int64(16384), "video_fps": np.float32(4), "max_frames": np.int32(2)}
    generate = {
        "max_new_tokens": np.int64(3),
        "top_k": np.int32(5),
        "top_p": np.float64(0.9),
        "temperature": np.float32(0.5),
        "repetition_penalty": np.float32(1.5),
        "do_sample": np.bool_(True),
        "min_new_tokens": np.int64(1),
    }
    state = batch(
        model, processor, query_of("a", videos=[VIDEO], media=media, generate=generate, use_template=np.bool_(True))
    )["session_states"][0]
    assert json.loads(json.dumps(state)) == state and calls[0]["grid_thw"].tolist() == [[2, 6, 8]]
    kinds = {
        "max_new_tokens": int,
        "top_k": int,
        "top_p": float,
        "temperature": float,
        "do_sample": bool,
        "min_new_tokens": int,
    }
    assert {name: type(calls[0][name]) for name in kinds} == kinds
    video = {"video_path": LONGER_VIDEO, "segments": [[np.float64(0), np.int64(2)]]}
    batch(model, processor, query_of("a", videos=[video]), vision_chunked_length=np.int64(2))
    assert calls[1]["grid_thw"][:, 0].tolist() == [2] and calls[1]["vision_chunked_length"] == 2
    for name, wrong in (
        ("max_new_tokens", np.float64(3)),
        ("max_new_tokens", np.bool_(True)),
        ("top_k", True),
        ("temperature", np.nan),
    ):
        with pytest.raises(ValueError, match=f"{name} must be"):
            batch(model, processor, query_of("a", generate={name: wrong}))


def test_values_at_the_edges_of_their_ranges(model, processor, nothing_is_encoded):
    for name, value in (
        ("top_p", 1),
        ("top_p", 1e-9),
        ("top_k", 0),
        ("max_new_tokens", 1),
        ("repetition_penalty", 1e-9),
    ):
        options = {"do_sample": True, name: value}
        assert generation_options.generate_arguments(model, processor.tokenizer, options, 64)[name] == value
    for name, value in (
        ("top_p", 0),
        ("top_p", 1.0000001),
        ("top_k", -1),
        ("max_new_tokens", 0),
        ("repetition_penalty", 0),
    ):
        with pytest.raises(ValueError, match=f"{name} must be"):
            generation_options.generate_arguments(model, processor.tokenizer, {name: value}, 64)


# ends and penalties


def test_eos_tokens_of_the_checkpoint_are_kept(model, processor, pictures, calls, monkeypatch):
    """Two of them, neither that of the tokenizer: an answer stops at each, and does not stop at the tokenizer's."""
    query = query_of(
        "Hi", images=pictures[0], generate={"max_new_tokens": 8, "suppress_tokens": [processor.tokenizer.eos_token_id]}
    )

    def answer():
        """The tokens that the last call writes."""
        arguments = {name: value for name, value in calls[-1].items() if name != "custom_generate"}
        return model.generate(**arguments)[0, arguments["input_ids"].shape[1] :].tolist()

    said = batch(model, processor, query) and answer()
    settings = copy.deepcopy(model.generation_config)
    monkeypatch.setattr(model, "generation_config", settings)
    for end in (said[2], said[4]):
        unused = next(i for i in range(100, 200) if i not in said)
        settings.eos_token_id = [unused, end]
        batch(model, processor, {**query, "generate_kwargs": {"max_new_tokens": 8}})
        assert (
            answer() == said[: said.index(end) + 1]
            and "eos_token_id" not in calls[-1]
            and settings.eos_token_id == [unused, end]
        )
    settings.eos_token_id = None
    batch(model, processor, query)
    assert calls[-1]["eos_token_id"] == processor.tokenizer.eos_token_id
    settings.eos_token_id = said[2]
    batch(model, processor, query_of("Hi", generate={"eos_token_id": [said[3]]}))
    assert calls[-1]["eos_token_id"] == [said[3]]


def test_the_penalty_of_each_beam_ignores_the_padding_of_its_prompt():
    """Three prompts with 2, 0 and 1 padding tokens in front, of which the padding token 0 is otherwise said by none;
    two beams each."""
    ids = torch.tensor([[0, 0, 1], [0, 0, 2], [1, 2, 3], [0, 2, 3], [0, 3, 3], [0, 0, 3]])
    scores = torch.full((6, 4), 2.0)
    out = UnpaddedPenalty(2.0, [2, 0, 1])(ids, scores)
    said = [{1}, {2}, {1, 2, 3}, {0, 2, 3}, {3}, {0, 3}]
    assert (
        out.tolist() == [[1.0 if token in row else 2.0 for token in range(4)] for row in said] and (scores == 2).all()
    )


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_the_penalty_knows_the_padding_of_each_row(model, processor, beams):
    options = dict(num_beams=beams, repetition_penalty=1.5, max_new_tokens=2)
    queries = [query_of(text, generate=options) for text in ("Hi, a much longer one", "Hi", "Hi, longer")]
    turns = [read_query(model, processor, query, None, 64) for query in queries]
    rows, arguments = generate_inputs(
        model, turns[0].generate, [encode_turn(model, processor, turn) for turn in turns]
    )
    call = {**rows, **arguments}
    [penalty] = call["logits_processor"]
    assert isinstance(call["logits_processor"], LogitsProcessorList) and call["repetition_penalty"] == 1.0
    assert (
        penalty.padding == (call["attention_mask"] == 0).sum(1).tolist()
        and len(set(penalty.padding)) == 3
        and penalty.padding[0] == 0
    )
