"""The vision cache in 8 bits in the offline methods and in realtime streams."""

import pytest
import torch
from offline import (  # noqa: F401 - fixtures
    batch,
    by_hand,
    model,
    nothing_is_encoded,
    pictures,
    processor,
    query_of,
    text_of,
)
from realtime import RESPONSE, SILENCE, make_processor, make_realtime_model, names, picture, run, stream

from moss_vl import cache_layers, vision_encoder
from moss_vl.cache_layers import Int8VisionLayer


INT8 = {"vision_cache_dtype": "int8"}


def layers_of(cache) -> set:
    return {type(layer) for layer in cache.layers if hasattr(layer, "state")}


def test_queries(model, processor, pictures):
    """Alone and beside others with and without the option, in a joint call and in a batch."""
    queries = [query_of("What?", images=[picture], generate=INT8) for picture in pictures]
    queries.append(query_of("What?", images=pictures[:1]))
    alone = [text_of(model, processor, query) for query in queries]
    prompt = "<|im_start|>user\n<|image|>What?<|im_end|>\n<|im_start|>assistant\n"
    assert alone[3] == by_hand(model, processor, prompt, images=pictures[:1])
    results = batch(model, processor, *queries)["results"]
    assert [result["text"] for result in results] == alone


def test_a_wrong_name_is_refused_before_media_are_read(model, processor, pictures, nothing_is_encoded):
    query = query_of("What?", images=pictures[:1], generate={"vision_cache_dtype": "fp8"})
    with pytest.raises(ValueError, match="`vision_cache_dtype` is 'fp8'; expected 'int8'"):
        batch(model, processor, query)


def test_kept_caches(model, processor, pictures, tmp_path, monkeypatch):
    """A cache is used by turns with the same option, also from a file, and by no others."""
    encoded, encode = [], vision_encoder.MossVLVisionModel.forward
    monkeypatch.setattr(
        vision_encoder.MossVLVisionModel, "forward", lambda *args, **kw: encoded.append(1) or encode(*args, **kw)
    )
    first = query_of("What?", images=pictures, generate=INT8)
    [state] = batch(model, processor, first, keep_cache=True)["session_states"]
    assert layers_of(state._kept.cache) == {Int8VisionLayer}
    state.save(tmp_path / "state.safetensors")
    loaded = model.load_session(tmp_path / "state.safetensors")
    for one, other in zip(state._kept.cache.layers, loaded._kept.cache.layers, strict=True):
        if type(one) is Int8VisionLayer:
            assert all(torch.equal(*pair) for pair in zip(one.tensors(), other.tensors(), strict=True))
    ask = query_of("And?", generate=INT8)
    cold = text_of(model, processor, ask, session_states=[dict(state)])
    encoded.clear()
    for kept in (state, loaded, state.to("cpu")):
        assert text_of(model, processor, ask, session_states=[kept]) == cold
    assert not encoded and state.cache_bytes > 0
    text_of(model, processor, query_of("And?"), session_states=[state])
    assert len(encoded) == 1


@pytest.fixture(scope="module")
def realtime():
    made = make_processor()
    return made, make_realtime_model(made)


@pytest.mark.parametrize("way", ["option", "settings"])
def test_streams(realtime, monkeypatch, way):
    """With a window that drops frames, and with a rollover."""
    made_processor, made_model = realtime
    options = {"window_frames": 3, "rollover_idle": 130, "rollover_forced": 150}
    if way == "settings":
        monkeypatch.setitem(cache_layers.CACHE_PACKAGES, "hqq", ("hqq", lambda: False))
        monkeypatch.setattr(made_model.generation_config, "cache_implementation", "quantized")
        monkeypatch.setattr(made_model.generation_config, "cache_config", {"backend": "hqq", "nbits": 8})
    else:
        options |= INT8
    words = [RESPONSE, "red", SILENCE] * 12
    made, script = stream(made_model, made_processor, *words, **options)
    events = []
    for second in range(10):
        made.push_frame(picture(second), float(second))
        events += run(made)
    assert "RolledOver" in names(events) and layers_of(made.cache) == {Int8VisionLayer}
    assert all(logits.isfinite().all() for _, logits in script.seen)
    assert made_model.cache_contents(made.cache).frames == [len(made.frames)] and 1 <= len(made.frames) <= 3
    with pytest.raises(ValueError, match="`vision_cache_dtype` is 'int2'"):
        stream(made_model, made_processor, vision_cache_dtype="int2")
