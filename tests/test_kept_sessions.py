"""Session states that keep their caches: the answers are those of states without, and cost only what is new."""

import copy
import functools
import json
import pickle
import queue
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from offline import (  # noqa: F401 - most are fixtures
    LONGER_VIDEO,
    SMALL,
    VIDEO,
    batch,
    by_hand,
    emptied,
    model,
    nothing_is_encoded,
    pictures,
    processor,
    query_of,
    serve,
    text_of,
    user,
)

from moss_vl.generation_sessions import SessionState
from moss_vl.processing_moss_vl import MossVLProcessor


LONG = dict(max_new_tokens=24)


@pytest.fixture
def work(model, monkeypatch):
    """What the calls cost: prefilled tokens and encoded patches per forward call of several tokens, and the numbers of
    images and videos that each call of the processor reads."""
    noted = {"tokens": [], "patches": [], "read": []}
    forward, encode, process = model.forward, model.model.visual.forward, MossVLProcessor.__call__

    @functools.wraps(forward)  # its signature is read
    def noting_forward(*args, **kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids.shape[1] > 1:
            noted["tokens"].append(ids.shape[1])
        return forward(*args, **kwargs)

    def noting_encode(pixels, *args, **kwargs):
        noted["patches"].append(len(pixels))
        return encode(pixels, *args, **kwargs)

    def noting_process(self, *args, **kwargs):
        noted["read"].append(tuple(len(kwargs.get(name) or ()) for name in ("images", "videos")))
        return process(self, *args, **kwargs)

    monkeypatch.setattr(model, "forward", noting_forward)
    monkeypatch.setattr(model.model.visual, "forward", noting_encode)
    monkeypatch.setattr(MossVLProcessor, "__call__", noting_process)
    return noted


def clear(work):
    for values in work.values():
        values.clear()


def talk(model, processor, *queries, keep_cache, state=None):
    """The answers of a conversation, and its states."""
    texts, states = [], [state]
    for query in queries:
        out = batch(model, processor, query, session_states=[states[-1]], keep_cache=keep_cache)
        texts.append(out["results"][0]["text"])
        states += out["session_states"]
    return texts, states[1:]


CONVERSATIONS = {
    "video": lambda p: [query_of("When?", videos=[LONGER_VIDEO]), query_of("And?", generate=LONG), query_of("Why?")],
    "images": lambda p: [query_of("What?", images=p, generate=LONG), query_of("And the first?"), query_of("")],
    "text": lambda p: [query_of("Hi", generate=LONG), query_of("And?"), query_of("a b c")],
    "image later": lambda p: [query_of("When?", videos=VIDEO), query_of("This?", images=p[0]), query_of("And?")],
    "images later": lambda p: [query_of("What?", images=p[0]), query_of("This?", images=p[1:]), query_of("And?")],
    "video later": lambda p: [query_of("Hi", images=p[1]), query_of("When?", videos=VIDEO), query_of("And?")],
    "two videos": lambda p: [query_of("When?", videos=VIDEO), query_of("This?", videos=[LONGER_VIDEO]), query_of("?")],
    "first image late": lambda p: [query_of("Hi"), query_of("This?", images=p[0]), query_of("And?")],
    "segments": lambda p: [
        query_of("When?", videos={"video_path": LONGER_VIDEO, "segments": [[0, 1], [2]]}),
        query_of("And?"),
        query_of("This?", images=p[2]),
    ],
    "system": lambda p: [
        query_of("Hi", images=p[0], system_prompt="Be brief."),
        query_of("And?"),
        query_of("And?", system_prompt="Be long."),
    ],
    "bare": lambda p: [query_of("Hi", images=p[0], use_template=False), query_of("a", use_template=False)],
    "penalty": lambda p: [
        query_of("Hi", images=p[0], generate=dict(repetition_penalty=1.4, **LONG)),
        query_of("And?", generate=dict(repetition_penalty=1.4, no_repeat_ngram_size=2, **LONG)),
    ],
    "options": lambda p: [
        query_of("When?", videos=[LONGER_VIDEO], media={**SMALL, "num_frames": 3}),
        query_of("And?", media={}),
        query_of("And?", media={"num_frames": 4}),
    ],
    "beams": lambda p: [query_of("Hi", images=p[0]), query_of("And?", generate=dict(num_beams=2)), query_of("?")],
    "uncached": lambda p: [query_of("Hi", images=p[0]), query_of("And?", generate=dict(use_cache=False))],
    "static": lambda p: [query_of("Hi", images=p[0]), query_of("And?", generate=dict(cache_implementation="static"))],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_answers_equal_those_without_a_cache(model, processor, pictures, name):
    queries = CONVERSATIONS[name](pictures)
    cold, states = talk(model, processor, *queries, keep_cache=False)
    kept, kept_states = talk(model, processor, *queries, keep_cache=True)
    assert kept == cold and kept_states == states
    assert all(type(state) is dict for state in states)


@pytest.mark.parametrize("name, read, encoded", [
    ("video", [(0, 0)] * 0, [0, 0]),
    ("images", [], [0, 0]),
    ("image later", [(1, 0)], [1, 0]),
    ("images later", [(2, 0)], [1, 0]),
    ("video later", [(0, 1)], [1, 0]),
    ("two videos", [(0, 2)], [1, 0]),
    ("first image late", [(1, 0)], [1, 0]),
    ("segments", [(1, 0)], [0, 1]),
])  # fmt: skip
def test_a_later_turn_costs_its_own_tokens_and_media(model, processor, pictures, work, name, read, encoded):
    """`read` are the images and videos of each processor call after the first turn, `encoded` the number of calls of
    the vision encoder in each turn. Two videos share a limit, so both are read; only the new one is encoded."""
    first, *later = CONVERSATIONS[name](pictures)
    _, [state] = talk(model, processor, first, keep_cache=True)
    prompts = []
    for query, calls in zip(later, encoded, strict=True):
        seen, before = state._kept, len(work["read"])
        work["patches"].clear(), work["tokens"].clear()
        [_], [state] = talk(model, processor, query, keep_cache=True, state=state)
        prompts += work["read"][before:]
        old, new = (len(processor.tokenizer(kept.expanded)["input_ids"]) for kept in (seen, state._kept))
        assert len(work["patches"]) == calls and len(work["tokens"]) == 1
        assert work["tokens"][0] <= new - old + 1, "at most the answer and the new question"
    assert prompts == read


def test_many_questions_may_continue_one_state(model, processor, work):
    """None of them changes the state, whether they come together or one after the other."""
    _, [state] = talk(model, processor, query_of("When?", videos=[LONGER_VIDEO]), keep_cache=True)
    plain = json.loads(json.dumps(state))
    questions = [query_of(f"And {n}?", generate=dict(max_new_tokens=4 + n)) for n in range(10)]
    want = [text_of(model, processor, question, session_states=[plain]) for question in questions]
    clear(work)
    ids = list(state._kept.ids)
    together = batch(model, processor, *questions, session_states=[state] * 10)
    assert [result["text"] for result in together["results"]] == want
    assert [text_of(model, processor, question, session_states=[state]) for question in questions] == want
    copies = [copy.copy(state), copy.deepcopy(state), pickle.loads(pickle.dumps(state))]
    assert [text_of(model, processor, questions[3], session_states=[one]) for one in copies] == [want[3]] * 3
    assert work["patches"] == work["read"] == [] and max(work["tokens"]) < 30
    assert state._kept.ids == ids and all(one == state and one.has_cache for one in copies)
    assert all(type(after) is dict for after in together["session_states"])  # keep_cache=False
    stream = model.stream_batch(processor, questions, [state] * 10, batch_size=4, keep_cache=True).results()
    assert [result["text"] for result in stream["results"]] == want
    assert all(after.has_cache for after in stream["session_states"])


def test_forks_share_the_video_in_memory(model, processor):
    _, [state] = talk(model, processor, query_of("When?", videos=[LONGER_VIDEO]), keep_cache=True)
    out = batch(model, processor, *[query_of("And?")] * 3, session_states=[state] * 3, keep_cache=True)
    vision = [one._kept.cache.layers[1].keys.data_ptr() for one in (state, *out["session_states"])]
    assert len(set(vision)) == 1
    deep = copy.deepcopy(state)
    assert deep._kept.cache.layers[1].keys.data_ptr() != vision[0] and deep.cache_bytes >= state.cache_bytes // 2


def test_a_cache_of_other_media_or_weights_is_not_used(model, processor, pictures, work):
    """A query that brings the whole conversation anew, with another picture of the same size."""
    rng = np.random.default_rng(1)
    one, other = (rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(2))
    _, [state] = talk(model, processor, query_of("What?", images=[one]), keep_cache=True)
    anew = query_of(messages=user({"type": "image", "image": other}, "What?"), append_messages_to_session=False)
    want = by_hand(model, processor, batch(model, processor, anew)["results"][0]["input_text"], images=[other])
    assert text_of(model, processor, anew, session_states=[state]) == want
    same = query_of(messages=user({"type": "image", "image": one}, "What?"), append_messages_to_session=False)
    work["patches"].clear()
    assert text_of(model, processor, same, session_states=[state]) == text_of(model, processor, same)
    assert len(work["patches"]) == 1  # the second call's
    weight = model.model.language_model.layers[3].mlp.up_proj.weight
    before = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] += 0.5
    work["patches"].clear()
    text_of(model, processor, query_of("And?"), session_states=[state])
    assert len(work["patches"]) == 1
    with torch.no_grad():
        weight[0, 0] = before


def test_a_cache_of_another_adapter_or_dtype_is_not_used(processor, pictures, model, tmp_path):
    peft = pytest.importorskip("peft")
    own = copy.deepcopy(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapters = peft.get_peft_model(own, config, adapter_name="a")
    adapters.add_adapter("b", config)
    adapters.set_adapter("a")
    _, [state] = talk(own, processor, query_of("What?", images=pictures[0]), keep_cache=True)
    state.save(tmp_path / "state.safetensors")
    own.load_session(tmp_path / "state.safetensors")
    adapters.set_adapter("b")
    with pytest.raises(ValueError, match="saved with other weights"):
        own.load_session(tmp_path / "state.safetensors")
    adapters.set_adapter("a")
    with adapters.disable_adapter(), pytest.raises(ValueError, match="saved with other weights"):
        own.load_session(tmp_path / "state.safetensors")
    half = copy.deepcopy(model).bfloat16()
    _, [state] = talk(copy.deepcopy(half).float(), processor, query_of("Hi"), keep_cache=True)
    state.save(tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match="saved with other weights"):
        half.load_session(tmp_path / "state.safetensors")


def test_persist_and_cancel(model, processor, pictures):
    _, [state] = talk(model, processor, query_of("What?", images=pictures[0]), keep_cache=True)
    _, [same] = talk(model, processor, query_of("a", persist_session=False), keep_cache=True, state=state)
    assert same is state
    eos = processor.tokenizer.eos_token_id
    stream = model.stream_batch(
        processor,
        [query_of("And?", generate=dict(max_new_tokens=500, suppress_tokens=[eos]))],
        [state],
        keep_cache=True,
    )
    next(stream), stream.cancel(0)
    after = [event for event in stream if event.kind == "end"][0].session_state
    assert after.has_cache
    plain = json.loads(json.dumps(after))
    ask = query_of("Why?")
    assert text_of(model, processor, ask, session_states=[after]) == text_of(
        model, processor, ask, session_states=[plain]
    )


# budgets


def test_a_budget_drops_the_caches_that_were_not_used_for_longest(model, processor, pictures, work):
    def ask(prompt, budget, state=None):
        return talk(
            model, processor, query_of(prompt, images=None if state else pictures[0]), keep_cache=budget, state=state
        )

    _, [alone] = ask("What?", True)
    budget = model.cache_budget(int(2.5 * alone.cache_bytes))
    (first, second) = (ask(prompt, budget)[1][0] for prompt in ("a", "b"))
    assert first.has_cache and second.has_cache and 0 < budget.used_bytes <= budget.max_bytes
    want = text_of(model, processor, query_of("And?"), session_states=[dict(second)])
    text_of(model, processor, query_of("?"), session_states=[first])  # the first is used, so the second is the oldest
    _, [third] = ask("c", budget)
    assert first.has_cache and third.has_cache and not second.has_cache and second.cache_bytes == 0
    clear(work)
    [text], [second] = ask("And?", budget, second)
    assert text == want and len(work["patches"]) == 1 and second.has_cache
    del first, third
    assert budget.used_bytes == second.cache_bytes
    copies = [copy.deepcopy(second)]
    copies.append(copy.deepcopy(copies[0]))
    assert [one.has_cache for one in (second, *copies)] == [False, True, True]
    assert not ask("d", model.cache_budget(0))[1][0].has_cache


# devices and files


def test_a_cache_moves_to_another_device_and_back(model, processor, pictures, work):
    """The meta device stands in for one that is not the model's; nothing can be read back from it."""
    _, [state] = talk(model, processor, query_of("What?", images=pictures[0]), keep_cache=True)
    other = copy.deepcopy(state).to("meta")
    assert other is not state and {one.device.type for one in other._kept.tensors()} == {"meta"}
    assert other._kept.cache.layers[1].state.rope_delta.device.type == "meta"
    want = text_of(model, processor, query_of("And?"), session_states=[dict(state)])
    clear(work)
    assert (
        text_of(model, processor, query_of("And?"), session_states=[state.to("cpu")]) == want and not work["patches"]
    )
    keys = [layer.keys for layer in state._kept.cache.layers]
    assert all(one is layer.keys for one, layer in zip(keys, state.to("cpu")._kept.cache.layers, strict=True))


@pytest.mark.parametrize("name", ["segments", "image later", "system", "text"])
def test_a_state_is_saved_and_loaded(model, processor, pictures, tmp_path, work, name):
    *queries, last = CONVERSATIONS[name](pictures)
    _, states = talk(model, processor, *queries, keep_cache=True)
    states[-1].save(tmp_path / "state.safetensors")
    loaded = model.load_session(tmp_path / "state.safetensors")
    assert isinstance(loaded, SessionState) and loaded == json.loads(json.dumps(states[-1])) and loaded.has_cache
    clear(work)
    [text], [after] = talk(model, processor, last, keep_cache=True, state=loaded)
    patches = list(work["patches"])
    assert text == text_of(model, processor, last, session_states=[dict(states[-1])])
    assert len(patches) == (name in ("segments", "system")) and after.has_cache  # a new image; another beginning


def test_pixels_in_a_conversation_are_saved_too(model, processor, tmp_path, work):
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    frames = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(3)]
    video = {"video": frames, "fps": 1.0}
    _, [state] = talk(model, processor, query_of("What?", images=[image], videos=[video]), keep_cache=True)
    state.save(tmp_path / "state.safetensors")
    loaded = model.load_session(tmp_path / "state.safetensors")
    clear(work)
    ask = query_of("And?")
    text = text_of(model, processor, ask, session_states=[loaded])
    assert not work["patches"] and text == text_of(model, processor, ask, session_states=[dict(loaded)])
    loaded.drop_cache()
    assert text_of(model, processor, ask, session_states=[loaded]) == text
    with pytest.raises(ValueError, match="the state has no cache"):
        loaded.save(tmp_path / "other.safetensors")


def test_views_of_pixels_are_saved_as_they_look(model, processor, tmp_path):
    """Channels in reverse order, and a tensor with channels first."""
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    images = [image[:, :, ::-1], torch.from_numpy(image).permute(2, 0, 1)]
    _, [state] = talk(model, processor, query_of("What?", images=images), keep_cache=True)
    state.save(tmp_path / "state.safetensors")
    loaded = model.load_session(tmp_path / "state.safetensors")
    loaded.drop_cache()
    ask = query_of("And?")
    assert text_of(model, processor, ask, session_states=[loaded]) == text_of(
        model, processor, ask, session_states=[state]
    )


def test_files_that_are_no_sessions_of_this_model(model, processor, tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is no session of MOSS-VL in format 1"):
        model.load_session(tmp_path / "other.safetensors")
    _, [state] = talk(model, processor, query_of("Hi"), keep_cache=True)
    state.save(tmp_path / "state.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "state.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match="is no session of MOSS-VL, or not whole"):
        model.load_session(tmp_path / "cut.safetensors")
    bias = model.model.language_model.norm.weight
    before = bias[0].item()
    with torch.no_grad():
        bias[0] += 1
    with pytest.raises(ValueError, match="saved with other weights"):
        model.load_session(tmp_path / "state.safetensors")
    with torch.no_grad():
        bias[0] = before
    state["messages"][0]["content"].append({"type": "image", "image": object()})
    with pytest.raises(ValueError, match="which no file can hold; give media as paths"):
        state.save(tmp_path / "state.safetensors")


def test_another_process_goes_on(tmp_path):
    """With the small checkpoint: the file is written here and read by a new interpreter."""
    root = Path(__file__).resolve().parents[1]
    code = """
import sys
from transformers import AutoModelForCausalLM, AutoProcessor
nano, file, image, ask = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(nano, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(nano, trust_remote_code=True)
options = {"generate_kwargs": {"max_new_tokens": 8}}
if ask == "first":
    query = {"images": [image], "prompt": "What color is the cross?", **options}
    out = model.offline_batch_generate(processor, [query], keep_cache=True)
    out["session_states"][0].save(file)
state = model.load_session(file)
query = [{"prompt": "And the square?", **options}]
for session in (state, dict(state)):
    print(model.offline_batch_generate(processor, query, session_states=[session])["results"][0]["text"])
"""
    arguments = [str(root / "checkpoints/moss-vl-nano"), str(tmp_path / "state"), str(root / "data/sample_a.jpg")]
    said = [
        subprocess.run(
            [sys.executable, "-c", code, *arguments, turn], capture_output=True, text=True, check=True
        ).stdout.split("\n")[:2]
        for turn in ("first", "second")
    ]
    assert said[0] == said[1] and said[0][0] == said[0][1] != ""


# the queue


def test_the_queue_goes_on_from_its_cache(model, processor, pictures, work):
    """Queries that persist; the same answers as without, and one picture is encoded once."""
    queries = [
        query_of("What?", images=pictures[0], persist_session=True),
        query_of("And?", persist_session=True),
        query_of("Why?", persist_session=True, stream_output=True),
    ]
    want = serve(model, processor, *queries)
    clear(work)
    asked, said = queue.Queue(), queue.Queue()
    for query in (*queries, {"stop_offline_generate": True}):
        asked.put(query)
    model.offline_generate(processor, asked, said, keep_cache=True)
    assert emptied(said) == [piece for pieces in want for piece in (*pieces, "<|round_end|>")]
    assert work["read"] == [(1, 0)] and len(work["tokens"]) == 3 and max(work["tokens"][1:]) < 40


# errors


def test_wrong_values_of_keep_cache(model, processor, nothing_is_encoded):
    for value in (None, 1, "yes"):
        with pytest.raises(ValueError, match="keep_cache must be True, False or a budget"):
            batch(model, processor, query_of("a"), keep_cache=value)
    for value in (-1, 1.5, True, "1GB"):
        with pytest.raises(ValueError, match="max_bytes must be a whole number of bytes"):
            model.cache_budget(value)
    with pytest.raises(ValueError, match="query 1: query: unknown key 'promt'"):
        batch(model, processor, query_of("a"), {"promt": "b"}, keep_cache=True)


def test_a_failing_query_of_a_batch_raises_its_error(model, processor, pictures, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(pictures[2]).read_bytes()[:700])
    with pytest.raises(ValueError, match="query 1: .*broken.png"):
        batch(model, processor, query_of("a"), query_of("b", images=[str(broken)]), keep_cache=True)
