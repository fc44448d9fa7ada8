"""The offline methods on a tiny random model: arguments, options, wrong queries, and batches."""

import copy
import inspect

import pytest
import torch
from offline import (  # noqa: F401 - most are fixtures
    LONGER_VIDEO,
    SMALL,
    VIDEO,
    batch,
    by_hand,
    calls,
    model,
    nothing_is_encoded,
    pictures,
    processor,
    query_of,
    text_of,
)
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, TextIteratorStreamer, logging

from moss_vl.image_processing_moss_vl import MossVLImageProcessorFast
from moss_vl.patches import normalise
from moss_vl.processing_moss_vl import MossVLProcessor


# calls of the specification


def test_the_calls_of_the_specification_work_word_for_word(model, processor, pictures, calls):
    common = dict(
        shortest_edge=4096,
        longest_edge=16777216,
        patch_size=16,
        temporal_patch_size=1,
        merge_size=2,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        max_new_tokens=6,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        do_sample=False,
        vision_chunked_length=64,
        use_template=False,
    )
    image = model.offline_image_generate(
        processor, prompt="", image=pictures[0], multi_image_max_pixels=201326592, **common
    )
    video = model.offline_video_generate(
        processor,
        prompt="",
        video=VIDEO,
        video_max_pixels=201326592,
        video_fps=1.0,
        min_frames=1,
        max_frames=256,
        num_extract_threads=4,
        **common,
    )
    queries = [
        {"images": [pictures[0]], "generate_kwargs": {"max_new_tokens": 6}, "use_template": False},
        {
            "videos": [VIDEO],
            "media_kwargs": {
                "min_pixels": 4096,
                "max_pixels": 16777216,
                "video_max_pixels": 201326592,
                "video_fps": 1.0,
                "min_frames": 1,
                "max_frames": 256,
            },
            "generate_kwargs": {"max_new_tokens": 6},
            "use_template": False,
        },
    ]
    with torch.no_grad():
        result = model.offline_batch_generate(processor, queries, session_states=None, vision_chunked_length=64)
    assert [item["text"] for item in result["results"]] == [image, video]
    assert [item["index"] for item in result["results"]] == [0, 1] and len(result["session_states"]) == 2
    assert all(call["vision_chunked_length"] == 64 for call in calls)
    assert len(calls) == 4


def test_the_signatures_show_the_defaults_of_the_specification(model):
    shared = dict(
        prompt="",
        shortest_edge=4096,
        longest_edge=16777216,
        max_new_tokens=1024,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        do_sample=False,
        vision_chunked_length=64,
        use_template=None,
    )
    for method, more in (
        (model.offline_image_generate, dict(multi_image_max_pixels=201326592)),
        (
            model.offline_video_generate,
            dict(video_max_pixels=201326592, video_fps=1.0, min_frames=1, max_frames=256, num_extract_threads=4),
        ),
    ):
        parameters = inspect.signature(method).parameters
        assert {name: parameters[name].default for name in {**shared, **more}} == {**shared, **more}


def test_the_text_equals_that_of_processor_and_generate(model, processor, pictures):
    bare = model.offline_image_generate(
        processor, "Hi", pictures[:2], longest_edge=16384, use_template=False, max_new_tokens=8
    )
    assert bare == by_hand(model, processor, "<|image|><|image|>Hi", images=pictures[:2])
    chat = model.offline_video_generate(
        processor, "What happens?", VIDEO, longest_edge=16384, video_fps=4, max_new_tokens=8
    )
    text = "<|im_start|>user\n<|video|>What happens?<|im_end|>\n<|im_start|>assistant\n"
    assert chat == by_hand(model, processor, text, videos=[VIDEO], media={**SMALL, "video_fps": 4})
    result = batch(model, processor, query_of("a", images=pictures[0], videos=[VIDEO]))["results"][0]
    assert result["input_text"] == "<|im_start|>user\n<|image|><|video|>a<|im_end|>\n<|im_start|>assistant\n"
    assert result["text"] == by_hand(model, processor, result["input_text"], images=pictures[:1], videos=[VIDEO])
    assert bare and chat and result["text"] and len({bare, chat, result["text"]}) == 3


# the options

IMAGE_EFFECTS = [
    (dict(), [[1, 10, 6]]),
    (dict(longest_edge=4096), [[1, 4, 2]]),
    (dict(shortest_edge=65536), [[1, 22, 14]]),
    (dict(multi_image_max_pixels=8192), [[1, 6, 4]]),
]


@pytest.mark.parametrize("options, grid", IMAGE_EFFECTS)
def test_image_limits_have_an_effect(model, processor, pictures, calls, options, grid):
    model.offline_image_generate(processor, "", pictures[2], max_new_tokens=1, **options)
    assert calls[0]["grid_thw"].tolist() == grid


VIDEO_EFFECTS = [
    (dict(), [[5, 16, 20]]),
    (dict(video_fps=2), [[10, 16, 20]]),
    (dict(video_fps=2.0, max_frames=4), [[4, 16, 20]]),
    (dict(video_fps=0.1, min_frames=3), [[3, 16, 20]]),
    (dict(num_frames=7), [[7, 16, 20]]),
    (dict(longest_edge=16384), [[5, 6, 8]]),
    (dict(video_max_pixels=5 * 16384), [[5, 6, 8]]),
    (dict(frame_extract_num_threads=1), [[5, 16, 20]]),
]


@pytest.mark.parametrize("options, grid", VIDEO_EFFECTS)
def test_video_limits_have_an_effect(model, processor, calls, options, grid):
    model.offline_video_generate(processor, "", LONGER_VIDEO, max_new_tokens=1, **options)
    assert calls[0]["grid_thw"].tolist() == grid


def test_means_hold_for_one_call_and_do_not_change_the_processor(model, processor, pictures, calls):
    before = [copy.deepcopy(part.to_dict()) for part in (processor.image_processor, processor.video_processor)]
    means = dict(image_mean=[0.25, 0.5, 0.5], image_std=[0.25, 0.5, 0.5])
    for extra in ({}, {**means, "longest_edge": 16384}, {}):
        model.offline_image_generate(processor, "", pictures[0], max_new_tokens=1, **extra)
    assert all(call["pixel_values"].dtype == torch.uint8 for call in calls), "the model normalises"
    plain, changed, again = (
        normalise(call["pixel_values"], *call["image_mean"], *call["image_std"]) for call in calls
    )
    assert torch.equal(plain, again) and plain.shape[1] == changed.shape[1] and changed.max() > 2.9 > 1.1 > plain.max()
    calls.clear()
    for extra in ({}, means, {}):
        model.offline_video_generate(processor, "", VIDEO, max_new_tokens=1, **extra)
    for call, extra in zip(calls, ({}, means, {}), strict=True):
        inputs = processor("<|video|>", videos=VIDEO, return_tensors="pt", **extra)
        with torch.no_grad():
            expected = model.get_image_features(inputs["pixel_values"], inputs["grid_thw"]).last_hidden_state
        torch.testing.assert_close(call["image_features"], expected, atol=1e-4, rtol=1e-4)
    assert (calls[0]["image_features"] - calls[1]["image_features"]).abs().max() > 0.1
    assert [part.to_dict() for part in (processor.image_processor, processor.video_processor)] == before


@pytest.mark.parametrize("name, wrong", [("patch_size", 14), ("temporal_patch_size", 2), ("merge_size", 4)])
def test_sizes_that_do_not_fit_the_weights_are_an_error(model, processor, pictures, nothing_is_encoded, name, wrong):
    for method, medium in ((model.offline_image_generate, pictures[0]), (model.offline_video_generate, VIDEO)):
        with pytest.raises(ValueError, match=f"{name} of the call is {wrong}, but .* weights"):
            method(processor, "", medium, **{name: wrong})
    other = copy.copy(processor)
    other.image_processor = MossVLImageProcessorFast(**{name: wrong})
    with pytest.raises(ValueError, match=f"query 0: {name} of the MossVLImageProcessorFast is {wrong}"):
        batch(model, other, query_of("a", images=pictures[0]))


def test_generate_gets_sampling_options_only_if_it_samples(model, processor, calls):
    sampling = dict(do_sample=True, temperature=0.7, top_k=11, top_p=0.9, repetition_penalty=1.3, min_p=0.01)
    batch(model, processor, query_of("a", generate=sampling), query_of("a", generate={**sampling, "temperature": 0}))
    (first, second) = calls
    assert {name: first[name] for name in sampling} == sampling
    assert (
        second["do_sample"] is False
        and second["temperature"] == 1.0
        and second["top_k"] == 50
        and second["min_p"] is None
    )
    assert second["repetition_penalty"] == 1.3


@pytest.mark.parametrize(
    "generate", [dict(temperature=0), dict(temperature=-1.0, do_sample=True), dict(do_sample=False, temperature=0.3)]
)
def test_a_temperature_of_zero_or_less_is_greedy(model, processor, pictures, generate):
    assert text_of(model, processor, query_of("Hi", images=pictures[0], generate=generate)) == text_of(
        model, processor, query_of("Hi", images=pictures[0])
    )


def test_sampling_depends_on_the_seed(model, processor, pictures):
    texts = set()
    for seed in (0, 0, 1, 2):
        torch.manual_seed(seed)
        texts.add(
            model.offline_image_generate(
                processor, "Hi", pictures[0], do_sample=True, temperature=2.0, max_new_tokens=8
            )
        )
    assert len(texts) == 3
    torch.manual_seed(0)
    assert model.offline_image_generate(processor, "Hi", pictures[0], do_sample=True, top_k=1, max_new_tokens=8) == (
        model.offline_image_generate(processor, "Hi", pictures[0], max_new_tokens=8)
    )


def test_greedy_does_not_warn_about_sampling_settings(model, processor, pictures, monkeypatch, caplog):
    settings = copy.deepcopy(model.generation_config)
    settings.update(do_sample=True, temperature=0.6, top_k=5, top_p=0.8, min_p=0.1)
    monkeypatch.setattr(model, "generation_config", settings)
    logging.enable_propagation()
    try:
        for query in (query_of("Hi"), query_of("Hi", images=pictures[0], generate=dict(temperature=0, top_k=3))):
            text_of(model, processor, query)
    finally:
        logging.disable_propagation()
    assert caplog.messages == []
    monkeypatch.undo()
    assert settings.do_sample and settings.temperature == 0.6


def test_other_options_of_generate_have_an_effect(model, processor, pictures, calls):
    ask = lambda **generate: text_of(model, processor, query_of("Hi", images=pictures[0], generate=generate))  # noqa: E731
    plain = ask()
    assert ask(num_beams=3) == by_hand(
        model,
        processor,
        "<|im_start|>user\n<|image|>Hi<|im_end|>\n<|im_start|>assistant\n",
        images=pictures[:1],
        num_beams=3,
    )
    model.offline_batch_generate(processor, [{"prompt": "Hi", "generate_kwargs": {"max_length": 12}}])
    assert calls[-1]["max_length"] == 12 and "max_new_tokens" not in calls[-1]
    third = processor.tokenizer(plain, add_special_tokens=False)["input_ids"][2]
    stop = processor.tokenizer.decode([third])
    assert plain.startswith(ask(stop_strings=[stop])) and ask(stop_strings=[stop]).endswith(stop)
    assert ask(eos_token_id=third) in plain
    assert ask(no_repeat_ngram_size=1) != "" and ask(suppress_tokens=[third]) != plain

    class OnlyOne(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.ones(len(input_ids), dtype=torch.bool)

    assert plain.startswith(ask(stopping_criteria=[OnlyOne()])) and ask(stopping_criteria=[OnlyOne()]) != plain


def test_a_streamer_gets_the_text(model, processor, pictures):
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    text = model.offline_image_generate(processor, "Hi", pictures[0], max_new_tokens=40, streamer=streamer)
    assert "".join(streamer) == text


# wrong queries

WRONG_QUERIES = [
    ("promt", dict(promt="a"), "unknown key 'promt'; did you mean 'prompt'"),
    ("image", dict(prompt="a", image="x.png"), "unknown key 'image'; did you mean 'images'"),
    (
        "media_kwargs key",
        dict(prompt="a", media_kwargs={"video_fsp": 1}),
        "media_kwargs: unknown key 'video_fsp'; did you mean 'video_fps'",
    ),
    (
        "generate_kwargs key",
        dict(prompt="a", generate_kwargs={"max_new_token": 1}),
        "unknown key 'max_new_token'; did you mean 'max_new_tokens'",
    ),
    (
        "several texts",
        dict(prompt="a", generate_kwargs={"num_return_sequences": 2}),
        "num_return_sequences.* one text",
    ),
    ("generate_kwargs type", dict(prompt="a", generate_kwargs=[1]), "generate_kwargs must be a dict, got list"),
    ("nothing", {}, "needs a prompt, messages, images or videos"),
    ("nothing to continue", dict(prompt="", use_template=False), "nothing to continue from"),
    ("both", dict(prompt="a", messages=[{"role": "user", "content": "a"}]), "prompt or messages, got both"),
    ("prompt type", dict(prompt=["a"]), "prompt must be a string, got list"),
    ("placeholder", dict(prompt="<|image|>a", images=["x.png"]), r"prompt holds '<\|image\|>'"),
    ("use_template", dict(prompt="a", use_template="no"), "use_template must be True, False or None, got 'no'"),
    ("flag", dict(prompt="a", persist_session="yes"), "persist_session must be True or False, got 'yes'"),
    ("system type", dict(prompt="a", system_prompt=3), "system_prompt must be a string"),
    ("thinking", dict(prompt="a", thinking_mode="deep_thinkin"), "thinking_mode.*did you mean 'deep_thinking'"),
    ("prompt type choice", dict(prompt="a", system_prompt_type="vidoe"), "system_prompt_type.*did you mean 'video'"),
    (
        "system, no template",
        dict(prompt="a", system_prompt="b", use_template=False),
        "system turn needs the chat template",
    ),
    ("no messages", dict(messages=[]), "messages is a list of messages, .*; got "),
    (
        "message key",
        dict(messages=[{"role": "user", "contents": "a"}]),
        "unknown key 'contents'; did you mean 'content'",
    ),
    ("no role", dict(messages=[{"content": "a"}]), "dicts with 'role' and 'content'; got .* as message 0"),
    (
        "part type",
        dict(messages=[{"role": "user", "content": [{"type": "picture"}]}]),
        "'type' text, .*image, .*video",
    ),
    (
        "part key",
        dict(messages=[{"role": "user", "content": [{"type": "image", "imge": "a"}]}]),
        "unknown keyword 'imge'; did you mean 'image'",
    ),
    ("text part", dict(messages=[{"role": "user", "content": [{"type": "text"}]}]), "needs a string under 'text'"),
    (
        "too few",
        dict(messages=[{"role": "user", "content": "<|image|><|image|>"}], images=["x.png"]),
        "placeholders for 2 images, but images holds 1",
    ),
    (
        "too many",
        dict(messages=[{"role": "user", "content": "a"}], videos=["x.mp4"]),
        "placeholders for 0 videos, but videos holds 1",
    ),
    ("two systems", dict(messages=[{"role": "system", "content": "a"}], system_prompt="b"), "leave out one"),
    (
        "tokens",
        dict(prompt="a", generate_kwargs={"max_new_tokens": 0}),
        "max_new_tokens must be a whole number of at least 1, got 0",
    ),
    (
        "temperature",
        dict(prompt="a", generate_kwargs={"temperature": "hot"}),
        "temperature must be a number, got 'hot'",
    ),
    ("top_p", dict(prompt="a", generate_kwargs={"top_p": 1.5}), "top_p must be above 0 and at most 1, got 1.5"),
    ("top_k", dict(prompt="a", generate_kwargs={"top_k": -1}), "top_k must be a whole number"),
    (
        "penalty",
        dict(prompt="a", generate_kwargs={"repetition_penalty": 0}),
        "repetition_penalty must be above 0, got 0",
    ),
    ("sample", dict(prompt="a", generate_kwargs={"do_sample": 1}), "do_sample must be True or False, got 1"),
    ("no file", dict(prompt="a", images=["nowhere.png"]), "nowhere.png"),
    ("no video", dict(prompt="a", videos=["nowhere.mp4"]), "nowhere.mp4"),
    ("pixels", dict(prompt="a", media_kwargs={"min_pixels": 10**6, "max_pixels": 10**5}), "1000000.*100000"),
    ("frames", dict(prompt="a", media_kwargs={"min_frames": 9, "max_frames": 8}), "9.*8"),
    ("rates", dict(prompt="a", media_kwargs={"video_fps": 1, "num_frames": 8}), "num_frames"),
    ("twice", dict(prompt="a", media_kwargs={"min_pixels": 4096, "shortest_edge": 4097}), "same option"),
    ("query type", "a", "query must be a dict, got str"),
    ("half a character", dict(prompt="a \ud83d"), "the conversation holds '.ud83d' at character"),
    ("huge", dict(prompt="a", media_kwargs={"max_frames": 10**400}), "max_frames must be a positive whole number"),
    ("huge limit", dict(prompt="a", generate_kwargs={"max_new_tokens": 10**400}), "max_new_tokens must be"),
]


@pytest.mark.parametrize("wrong, message", [row[1:] for row in WRONG_QUERIES], ids=[row[0] for row in WRONG_QUERIES])
def test_a_wrong_query_is_an_error_before_anything_is_encoded(
    model, processor, pictures, nothing_is_encoded, wrong, message
):
    with pytest.raises((ValueError, FileNotFoundError), match=f"^query 1: .*{message}"):
        batch(model, processor, query_of("fine", images=pictures[0]), wrong)


def test_wrong_calls_are_errors(model, processor, pictures, nothing_is_encoded):
    for arguments, message in (
        (dict(max_new_token=3), "offline_image_generate: unknown key 'max_new_token'; did you mean 'max_new_tokens'"),
        (dict(longest_egde=3), "did you mean 'longest_edge'"),
        (dict(video_fps=3), "unknown key 'video_fps'"),
        (dict(vision_chunked_length=0), "vision_chunked_length must be a whole number"),
        (dict(image=[]), "image must be one image or a list"),
        (dict(image="nowhere.png"), "nowhere.png"),
        (dict(longest_edge=5000, max_pixels=6000), "max_pixels and longest_edge are names of"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            model.offline_image_generate(processor, "a", **{"image": pictures[0], **arguments})
    with pytest.raises(ValueError, match="queries must be a list of dicts, got dict"):
        model.offline_batch_generate(processor, {"prompt": "a"})
    for states, got in (([], 0), ([None, None], 2), ({}, "dict")):
        with pytest.raises(ValueError, match=f"got {got}, expected 1"):
            batch(model, processor, {"prompt": "a"}, session_states=states)
    with pytest.raises(ValueError, match="query 0: a session state is None or"):
        batch(model, processor, {"prompt": "a"}, session_states=["old"])


def test_use_template_needs_a_template(model, processor):
    bare = MossVLProcessor(processor.image_processor, processor.tokenizer, processor.video_processor)
    with pytest.raises(ValueError, match="no chat template"):
        batch(model, bare, query_of("a", use_template=True))
    assert batch(model, bare, query_of("a"))["results"][0]["input_text"] == "a"


# batches


def some_queries(pictures):
    return [
        query_of("Describe the picture, please, in a few words.", images=pictures[0]),
        query_of("Hi"),
        query_of("", images=pictures[1:], use_template=False),
        query_of("What happens?", videos=[VIDEO], media={**SMALL, "video_fps": 8}),
        query_of("a", images=pictures[2], videos=[VIDEO], media={"max_pixels": 6400}),
        query_of("", images=pictures[0], use_template=False, generate=dict(max_new_tokens=3)),
    ]


@pytest.mark.parametrize(
    "generate",
    [
        {},
        dict(repetition_penalty=1.5),
        dict(num_beams=2),
        dict(no_repeat_ngram_size=2),
        dict(repetition_penalty=3, num_beams=2),
    ],
    ids=str,
)
def test_an_answer_in_a_batch_is_the_answer_alone(model, processor, pictures, generate):
    queries = some_queries(pictures)
    for query in queries:
        query["generate_kwargs"].update(generate)
    before = copy.deepcopy(queries)
    alone = [text_of(model, processor, query) for query in queries]
    assert [item["text"] for item in batch(model, processor, *queries)["results"]] == alone
    assert [item["text"] for item in batch(model, processor, *queries[::-1])["results"]] == alone[::-1]
    assert queries == before and len(set(alone)) > 3


def test_a_batch_may_be_empty(model, processor):
    assert batch(model, processor) == {"results": [], "session_states": []}


class FavourFirst(LogitsProcessor):
    """Repeats the first token of the row, which would be padding in a padded batch."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids[:, :1], 1e4)


def test_a_logits_processor_of_the_caller_gets_no_padding(model, processor):
    options = dict(logits_processor=LogitsProcessorList([FavourFirst()]))
    short, long = batch(
        model,
        processor,
        query_of("ab", use_template=False, generate=options),
        query_of("said longer", use_template=False, generate=options),
    )["results"]
    first = processor.tokenizer.decode(processor.tokenizer("ab")["input_ids"][:1])
    assert short["text"] == first * 8 != long["text"]
