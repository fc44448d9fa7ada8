"""Conversations of the offline methods: messages, system turns, and sessions."""

import copy
import json
import re

import pytest
from offline import (  # noqa: F401 - most are fixtures
    LONGER_VIDEO,
    SMALL,
    VIDEO,
    batch,
    by_hand,
    calls,
    model,
    pictures,
    processor,
    query_of,
    text_of,
)

from moss_vl import generation_utils


# messages and system turns


def test_messages_keep_their_order(model, processor, pictures):
    parts = [
        {"type": "text", "text": "First"},
        {"type": "image", "image": pictures[0]},
        {"type": "text", "text": "then"},
        {"type": "video", "path": VIDEO},
        {"type": "image", "url": pictures[1]},
    ]
    in_parts = query_of(messages=[{"role": "user", "content": parts}])
    from_lists = query_of(
        messages=[{"role": "user", "content": "First<|image|>then<|video|><|image_pad|>"}],
        images=pictures[:2],
        videos=VIDEO,
    )
    mixed = query_of(
        messages=[{"role": "user", "content": [parts[0], {"type": "image"}, *parts[2:4], {"type": "image"}]}],
        images=pictures[:2],
    )
    before = copy.deepcopy(mixed)
    results = batch(model, processor, in_parts, from_lists, mixed)["results"]
    expected = "<|im_start|>user\nFirst<|image|>then<|video|><|image|><|im_end|>\n<|im_start|>assistant\n"
    assert [item["input_text"] for item in results] == [expected] * 3
    assert (
        len({item["text"] for item in results}) == 1
        and results[0]["messages"] == results[1]["messages"] == results[2]["messages"]
    )
    assert (
        results[0]["text"] == by_hand(model, processor, expected, images=pictures[:2], videos=[VIDEO])
        and mixed == before
    )
    said = results[0]["messages"][-1]
    assert said == {"role": "assistant", "content": [{"type": "text", "text": results[0]["text"]}]}
    bare = batch(model, processor, {**in_parts, "use_template": False})["results"][0]
    assert bare["input_text"] == "First<|image|>then<|video|><|image|>"


def test_each_segment_has_a_placeholder(model, processor, calls):
    video = {"video_path": LONGER_VIDEO, "segments": [[0, 2], [3.5]]}
    result = batch(model, processor, query_of("a", videos=[video], use_template=False))["results"][0]
    assert result["input_text"] == "<|video|><|video|>a"
    assert calls[0]["grid_thw"][:, 0].tolist() == [2, 1]


SYSTEM_TURNS = [
    ({}, None),
    (dict(system_prompt="Be short."), "Be short."),
    (dict(system_prompt=""), ""),
    (dict(thinking_mode="no_thinking"), generation_utils.SYSTEM_PROMPTS["text_image"]),
    (dict(thinking_mode="default", system_prompt="Be short."), "Be short."),
    (dict(thinking_mode="standard", system_prompt_type="video"), generation_utils.SYSTEM_PROMPTS["video"]),
    (dict(system_prompt_type="text_image"), generation_utils.SYSTEM_PROMPTS["text_image"]),
    *(
        (dict(thinking_mode=mode, system_prompt="Be short."), f"Be short.\n{generation_utils.THINKING_PROMPT}")
        for mode in ("deep_thinking", "thinking", "reasoning")
    ),
]


@pytest.mark.parametrize("chosen, system", SYSTEM_TURNS)
def test_system_turns_are_rendered(model, processor, chosen, system):
    text = batch(model, processor, query_of("a", **chosen))["results"][0]["input_text"]
    head = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    assert text == f"{head}<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_deep_thinking_about_a_video_has_its_system_turn(model, processor, calls):
    model.offline_video_generate(processor, "a", VIDEO, thinking_mode="reasoning", max_new_tokens=1)
    text = processor.tokenizer.decode(calls[0]["input_ids"][0])
    assert generation_utils.SYSTEM_PROMPTS["video"] in text
    assert re.search("<thinking></thinking>.*<answer></answer>", text)


# sessions


def test_a_session_continues_its_conversation(model, processor, pictures):
    first = batch(
        model, processor, query_of("What is it?", images=pictures[0], system_prompt="Be short."), query_of("Hi")
    )
    states = first["session_states"]
    kept = copy.deepcopy(states)
    second = batch(model, processor, query_of("And this?", videos=[VIDEO]), query_of("Again"), session_states=states)
    answers = [item["text"] for item in first["results"]]
    text = second["results"][0]["input_text"]
    assert text == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n<|image|>What is it?<|im_end|>\n"
        f"<|im_start|>assistant\n{answers[0]}<|im_end|>\n<|im_start|>user\n<|video|>And "
        "this?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert second["results"][0]["text"] == by_hand(model, processor, text, images=pictures[:1], videos=[VIDEO])
    assert second["results"][1]["input_text"].count("<|im_start|>") == 4
    assert states == kept
    third = batch(
        model,
        processor,
        query_of("3", system_prompt="Be long."),
        query_of("3"),
        session_states=second["session_states"],
    )
    assert third["results"][0]["messages"][:1] == [
        {"role": "system", "content": [{"type": "text", "text": "Be long."}]}
    ]
    assert third["results"][0]["messages"][1:5] == second["results"][0]["messages"][1:]


def test_a_session_state_is_plain_data(model, processor, pictures):
    state = batch(model, processor, query_of("What is it?", images=pictures[0]))["session_states"][0]
    again = json.loads(json.dumps(state))
    assert again == state
    ask = query_of("And now?")
    assert text_of(model, processor, ask, session_states=[again]) == text_of(
        model, processor, ask, session_states=[state]
    )


def test_media_kwargs_of_earlier_turns_hold_until_changed(model, processor, calls):
    state = batch(model, processor, query_of("a", videos=[LONGER_VIDEO], media={**SMALL, "video_fps": 2}))[
        "session_states"
    ][0]
    batch(model, processor, query_of("b", media={}), session_states=[state])
    batch(model, processor, query_of("b", media={"num_frames": 3}), session_states=[state])
    assert [call["grid_thw"].tolist() for call in calls] == [[[10, 6, 8]], [[10, 6, 8]], [[3, 6, 8]]]


def test_reset_persist_and_append_choose_what_a_turn_continues(model, processor):
    state = batch(model, processor, query_of("one"))["session_states"][0]
    for flags, turns, kept in (
        ({}, 4, 4),
        (dict(reset_session=True), 2, 2),
        (dict(clear_history=True), 2, 2),
        (dict(persist_session=False), 4, 2),
        (dict(persist_session=False, reset_session=True), 2, None),
        (dict(append_messages_to_session=False), 2, 2),
        (dict(append_messages_to_session=False, persist_session=False), 2, 2),
    ):
        result = batch(model, processor, query_of("two", **flags), session_states=[state])
        after = result["session_states"][0]
        assert len(result["results"][0]["messages"]) == turns, flags
        assert (after and len(after["messages"])) == kept, flags
        if kept == 2 and flags.get("persist_session") is False:
            assert after == state
