"""Session states that keep the cache of their conversation, so that the next turn costs its own tokens only.

A kept cache is used if the new prompt begins with tokens that it holds, all frames included; other tokens at its end
(an answer that is tokenised otherwise as a part of the prompt, say) are dropped from a fork of it. So the answer is
the one that a cold prefill gives, and a kept cache is never changed: any number of turns may continue one state.

    kept.text      <|im_start|>user\\n<|video|>When?<|im_end|>\\n<|im_start|>assistant\\n
    kept.expanded  <|im_start|>user\\n<|vision_start|>...<|image_pad|>...<|vision_end|>When?<|im_end|>\\n...
    new text       <|im_start|>user\\n<|video|>When?<|im_end|>\\n<|im_start|>assistant\\nNow.<|im_end|>\\n...
                   known up to here ^         the processor reads the rest, with its new media
"""

import copy
import hashlib
import json
import re
import threading
import weakref
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Optional

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import DynamicCache
from transformers.utils import logging

from .cache_layers import cache_contents, cached_length, fork_cache, install_layers, vision_cache_dtype
from .checks import check_number, shorten
from .conversation import PLACEHOLDERS, collect_media
from .generation_batches import encode_turn
from .generation_queries import Turn
from .vision_sequence import FrameSet, VisionState


logger = logging.get_logger(__name__)

PLACEHOLDER = re.compile("|".join(map(re.escape, PLACEHOLDERS.values())))
# New images are processed without the earlier ones only if all have at most this part of the pixels that images may
# have together: then the limit changes no size.
FREE_PIXELS = 1 / 16

# Of files
FILE_FORMAT = 1
STATE_TENSORS = ("rope_delta", "last_ids")
STATE_LISTS = ("row_sample", "grids", "placed", "starts", "ends", "dropped", "stored", "length")
KEPT_FIELDS = ("ids", "frames", "text", "expanded", "images_kwargs", "videos_kwargs", "fingerprint")
PACKED = "packed tensor"
PACKED_TYPES = {"bytes": (bytes, bytearray), "array": np.ndarray, "tensor": torch.Tensor}


@dataclass(eq=False)
class KeptCache:
    """The cache of a conversation up to the end of an answer. States that are shallow copies share it.

    Attributes:
        cache: one row; None after it was dropped.
        ids: the tokens that it holds.
        frames: number of frames that it holds.
        text, expanded: the prompt before the answer, with placeholders, and as it was tokenised.
        images, videos: the media of the prompt, as the messages have them.
        images_kwargs, videos_kwargs: the options of the processors for them.
        fingerprint: see `model_fingerprint`.
        budget: the budget that the cache counts for, or None.
    """

    cache: Optional[DynamicCache] = field(repr=False)
    ids: list[int] = field(repr=False)
    frames: int
    text: str = field(repr=False)
    expanded: str = field(repr=False)
    images: list = field(repr=False)
    videos: list = field(repr=False)
    images_kwargs: dict
    videos_kwargs: dict
    fingerprint: str
    budget: Optional["CacheBudget"] = None

    def __deepcopy__(self, memo: dict) -> "KeptCache":
        """An independent copy, which counts for the same budget."""
        other = copy.copy(self)
        for name in ("cache", "ids", "images", "videos", "images_kwargs", "videos_kwargs"):
            setattr(other, name, copy.deepcopy(getattr(self, name), memo))
        if self.budget is not None:
            self.budget.add(other)
        return other

    def __getstate__(self) -> dict:
        return {**self.__dict__, "budget": None}  # of a pickle

    def tensors(self) -> list[torch.Tensor]:
        """The buffers of keys and values."""
        layers = [] if self.cache is None else self.cache.layers
        names = ("keys", "values", "key_scales", "value_scales", "_key_buffer", "_value_buffer")
        parts = [getattr(layer, name, None) for layer in layers for name in names]
        return [part for part in parts if part is not None]


def storage_bytes(tensors) -> int:
    """Bytes of the memory that tensors use; memory that several share counts once."""
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())


class SessionState(dict):
    """A session state {"messages", "media_kwargs"} with the cache of its conversation. As a dict, and in JSON, it is
    the state without the cache. `copy.copy` shares the cache, which no call changes; `copy.deepcopy` copies it."""

    def __init__(self, state: dict, kept: Optional[KeptCache]):
        super().__init__(state)
        self._kept = kept

    @property
    def has_cache(self) -> bool:
        """Whether the cache is still kept; otherwise the next turn encodes text and media again."""
        return self._kept is not None and self._kept.cache is not None

    @property
    def kept(self) -> Optional[KeptCache]:
        """The cache with the tokens and media that it holds, which must not be changed; None after it was dropped."""
        return self._kept if self.has_cache else None

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values, free space included."""
        return 0 if self._kept is None else storage_bytes(self._kept.tensors())

    def drop_cache(self) -> None:
        """Frees the cache. Text and media stay."""
        if self._kept is not None:
            self._kept.cache = None

    def to(self, device) -> "SessionState":
        """Moves the cache to a device, in place. The next turn moves a copy to the devices of the model."""
        if self.has_cache:
            self._kept.cache = moved_cache(self._kept.cache, [torch.device(device)] * len(self._kept.cache.layers))
        return self

    def save(self, file) -> None:
        """Writes the state, with its cache, to a safetensors file, which `model.load_session` reads.

        Raises:
            ValueError: if the cache was dropped, or a medium is an object that no file can hold.
        """
        if not self.has_cache:
            raise ValueError("the state has no cache; write json.dumps(state) instead, which has text and media")
        save_session(self, self._kept, file)

    def __copy__(self) -> "SessionState":
        return SessionState(self, self._kept)

    def __deepcopy__(self, memo: dict) -> "SessionState":
        return SessionState(copy.deepcopy(dict(self), memo), copy.deepcopy(self._kept, memo))

    def __reduce__(self):
        return SessionState, (dict(self), self._kept)


def has_cache(state) -> bool:
    """Whether a session state keeps its cache."""
    return getattr(state, "has_cache", False)


def check_keep_cache(keep_cache):
    """`keep_cache` unchanged. Raises ValueError unless it is True, False or a budget."""
    if not isinstance(keep_cache, (bool, CacheBudget)):
        raise ValueError(
            f"keep_cache must be True, False or a budget of `model.cache_budget`, got {shorten(keep_cache)}"
        )
    return keep_cache


class CacheBudget:
    """Most bytes of the caches that session states keep. If a new one exceeds it, those that were not used for longest
    are dropped: their states go on as text and media, which the next turn encodes again.

    Raises:
        ValueError: unless `max_bytes` is a whole number of at least 0.
    """

    def __init__(self, max_bytes: int):
        check_number("max_bytes", max_bytes, int, "a whole number of bytes", lambda x: x >= 0)
        self.max_bytes = max_bytes
        self._lock = threading.RLock()
        self._kept: list[weakref.ref] = []  # the one that was used last at the end

    @property
    def caches(self) -> list[KeptCache]:
        """The caches that count, the one that was used last at the end."""
        with self._lock:
            caches = [kept for kept in (ref() for ref in self._kept) if kept is not None and kept.cache is not None]
            self._kept = [weakref.ref(kept) for kept in caches]
        return caches

    @property
    def used_bytes(self) -> int:
        return storage_bytes([tensor for kept in self.caches for tensor in kept.tensors()])

    def add(self, kept: KeptCache) -> None:
        """Counts a cache, as the one that was used last."""
        with self._lock:
            caches = [*(other for other in self.caches if other is not kept), kept]
            kept.budget, self._kept = self, [weakref.ref(one) for one in caches]
            while caches and self.used_bytes > self.max_bytes:
                caches.pop(0).cache = None


# Keeping


def keep_cache_of(model, processor, turn: Turn, row, budget: Optional[CacheBudget]) -> Optional[KeptCache]:
    """The cache of a row whose answer has ended; None if a later prompt could not be compared with it."""
    if type(row.cache) is not DynamicCache:
        logger.warning_once(
            f"The cache of a session is not kept: it is a {type(row.cache).__name__}, and only a DynamicCache can be "
            "continued. The next turn encodes the conversation again. Set cache_implementation to None to keep it."
        )
        return None
    ids = row.tokens.ids[0, : cached_length(row.cache)].tolist()
    prompt = ids[: row.prompt_length]
    expanded = processor.tokenizer.decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if tokenise(processor, expanded) != prompt:
        logger.warning_once(
            "The cache of a session is not kept: its prompt, decoded and tokenised again, is not the same. The next "
            "turn encodes the conversation again."
        )
        return None
    kept = KeptCache(
        cache=row.cache,
        ids=ids,
        frames=prompt.count(model.config.image_token_id),
        text=turn.text,
        expanded=expanded,
        images=collect_media(turn.messages, "image"),
        videos=collect_media(turn.messages, "video"),
        images_kwargs=turn.images_kwargs,
        videos_kwargs=turn.videos_kwargs,
        fingerprint=model_fingerprint(model),
    )
    if budget is not None:
        budget.add(kept)
    return kept


def tokenise(processor, text: str) -> list[int]:
    """The tokens of a text without placeholders, as the processor makes them."""
    [ids] = processor.tokenizer([text], padding=False, truncation=False, verbose=False)["input_ids"]
    return list(ids)


def model_fingerprint(model) -> str:
    """A name for the weights: a hash of names, shapes, dtypes and some values of all parameters, and of the PEFT
    adapters that are active. A cache is of no use to a model with other weights."""
    digest, values = hashlib.sha256(), {}
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        if parameter.is_floating_point() and parameter.device.type != "meta":
            flat = parameter.detach().reshape(-1)
            values.setdefault(parameter.device, []).append(flat[:: len(flat) // 4 + 1].float())
    for name, module in model.named_modules():
        active, is_off = (getattr(module, one, None) for one in ("active_adapters", "disable_adapters"))
        if isinstance(active, list) and isinstance(is_off, bool):
            digest.update(f"{name} {active} {is_off}".encode())
    for parts in values.values():
        digest.update(torch.cat(parts).cpu().numpy().tobytes())
    return digest.hexdigest()


# Continuing


class KeptPrefix(NamedTuple):
    """The beginning of a prompt that a kept cache holds.

    Attributes:
        cache: the kept cache, which is not changed.
        length: the tokens that are used; at least one token of the prompt comes after them.
    """

    cache: DynamicCache
    length: int

    def fork(self, model) -> DynamicCache:
        """A cache of `length` tokens that the next calls may change, on the devices of the model."""
        cache = moved_cache(fork_cache(self.cache), layer_devices(model, self.cache))
        if unused := cached_length(cache) - self.length:
            cache.crop(-unused)
        return cache

    def vision_tokens(self, model, inputs: dict) -> int:
        """Vision tokens of the cache whose media the inputs lack; 0 if these have the media of the whole prompt."""
        frames = sum(int(grid[0]) for grid in inputs.get("grid_thw", ()))
        if int((inputs["input_ids"] == model.config.image_token_id).sum()) == frames:
            return 0
        return sum(cache_contents(self.cache, model.config.text_config).vision_tokens)


def prepare_turn(model, processor, turn: Turn, alone: bool) -> tuple[dict, Optional[KeptPrefix]]:
    """The inputs of `generate` for one turn, batch size 1, and the part of the prompt that the state's cache holds."""
    kept = getattr(turn.state, "_kept", None)
    cache = None if kept is None else kept.cache  # another thread may drop it from `kept`
    if cache is None or not can_continue(model, turn, kept):
        return encode_turn(model, processor, turn, alone), None
    if kept.budget is not None:
        kept.budget.add(kept)
    for make in (continued_inputs, whole_inputs):
        inputs = make(model, processor, turn, kept)
        length = None if inputs is None else kept_length(model, inputs, cache, kept)
        if length is not None:
            return inputs, KeptPrefix(cache, length)
    return inputs, None


def whole_inputs(model, processor, turn: Turn, kept: KeptCache) -> dict:
    """The inputs of a turn with all media, of which those that the cache holds are not encoded."""
    return encode_turn(model, processor, turn, alone=False)


def can_continue(model, turn: Turn, kept: KeptCache) -> bool:
    """Whether the cache holds the media of the turn's conversation up to some message, as this turn would encode them,
    and `generate` takes a cache with the turn's options."""
    options = turn.generate
    implementation = options.get("cache_implementation", model.generation_config.cache_implementation)
    if options.get("use_cache") is False or implementation is not None:
        return False
    if options.get("vision_cache_dtype") != vision_cache_dtype(kept.cache, model.config.text_config):
        return False
    for kind, media, kwargs, now in (
        ("image", kept.images, kept.images_kwargs, turn.images_kwargs),
        ("video", kept.videos, kept.videos_kwargs, turn.videos_kwargs),
    ):
        found = collect_media(turn.messages, kind)[: len(media)]
        if (
            len(found) < len(media)
            or not all(map(is_same_medium, found, media))
            or (media and not is_same_medium(kwargs, now))
        ):
            return False
    return kept.fingerprint == model_fingerprint(model)


def is_same_medium(one, other) -> bool:
    """Whether two media of messages, or two dicts of options, are one object or equal in JSON."""
    if one is other:
        return True
    try:
        return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    except TypeError:  # pixels
        return False


def continued_inputs(model, processor, turn: Turn, kept: KeptCache) -> Optional[dict]:
    """The inputs of a turn whose earlier media are not processed again; None if the new media share pixel limits with
    the earlier ones, or the prompt does not begin with the earlier media."""
    ends = [match.end() for match in PLACEHOLDER.finditer(kept.text)]
    known = ends[-1] if ends else 0
    expanded = kept.expanded[: len(kept.expanded) - (len(kept.text) - known)]
    if not turn.text.startswith(kept.text[:known]) or kept.expanded[len(expanded) :] != kept.text[known:]:
        return None
    rest, inputs = turn.text[known:], {}
    images, videos = turn.images[len(kept.images) :], turn.videos[len(kept.videos) :]
    if images or videos:
        if (images and kept.images and not has_free_pixels(processor, turn)) or (videos and kept.videos):
            return None
        part = replace(turn, text=rest, images=images, videos=videos)
        inputs = dict(encode_turn(model, processor, part, alone=False))
        rest = processor.tokenizer.decode(
            inputs["input_ids"][0], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
    elif PLACEHOLDER.search(rest):
        return None
    ids = tokenise(processor, expanded + rest)
    new_frames = sum(int(grid[0]) for grid in inputs["grid_thw"]) if images or videos else 0
    if ids.count(model.config.image_token_id) != kept.frames + new_frames:
        return None
    input_ids = torch.tensor([ids])
    return {**inputs, "input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def has_free_pixels(processor, turn: Turn) -> bool:
    """Whether the images of a turn are so small that their common limit changes none."""
    limit = turn.images_kwargs.get("multi_image_max_pixels", processor.image_processor.multi_image_max_pixels)
    return sum(image.height * image.width for image in turn.images) <= FREE_PIXELS * limit


def kept_length(model, inputs: dict, cache: DynamicCache, kept: KeptCache) -> Optional[int]:
    """How many tokens of the prompt the cache holds; None if they do not place all of its frames, or the first media
    of the inputs, if these have the earlier media too, have other sizes."""
    ids = inputs["input_ids"][0].tolist()
    length = 0
    for token, held in zip(ids[:-1], kept.ids, strict=False):
        if token != held:
            break
        length += 1
    image_token = model.config.image_token_id
    if ids[:length].count(image_token) != kept.frames or not length:
        return None
    if kept.frames and ids.count(image_token) == sum(int(grid[0]) for grid in inputs.get("grid_thw", ())):
        merge = model.config.vision_config.spatial_merge_size
        grids = [(int(h) // merge, int(w) // merge) for t, h, w in inputs["grid_thw"] for _ in range(int(t))]
        layer = cache.layers[model.config.text_config.cross_attention_layers[0]]
        if grids[: kept.frames] != [tuple(grid) for grid in layer.state.grids[0]]:
            return None
    return length


# Devices


def layer_devices(model, cache: DynamicCache) -> list[torch.device]:
    """For each layer of a cache, the device of the model's layer; if its weights are offloaded, that of the keys."""
    devices = []
    for layer, kept in zip(model.model.language_model.layers, cache.layers, strict=True):
        device = next(layer.parameters()).device
        at = kept.keys.device if kept.keys is not None else torch.device("cpu")
        devices.append(at if device.type == "meta" else device)
    return devices


def moved_cache(cache: DynamicCache, devices: list[torch.device]) -> DynamicCache:
    """A cache with each layer on its device. Layers that are there already are not copied."""
    moved = copy.copy(cache)
    moved.layers = [moved_layer(layer, device) for layer, device in zip(cache.layers, devices, strict=True)]
    return moved


def moved_layer(layer, device: torch.device):
    """A copy of a layer on a device; the layer itself if it is there."""
    state = getattr(layer, "state", None)
    tensors = [layer.keys, *(() if state is None else (state.rope_delta,))]
    if all(tensor is None or same_device(tensor.device, device) for tensor in tensors):
        return layer
    moved = copy.copy(layer)
    if layer.keys is not None:
        moved.device = device
        for name in tensor_names(layer):
            setattr(moved, name, getattr(layer, name).to(device))
    for name in ("_key_buffer", "_value_buffer"):
        if hasattr(moved, name):
            setattr(moved, name, None)
    if state is not None:
        moved.state = moved_state(state, device)
    return moved


def tensor_names(layer) -> tuple[str, ...]:
    """The attributes of a layer that hold its keys and values."""
    return getattr(layer, "tensor_names", ("keys", "values"))


def same_device(one: torch.device, other: torch.device) -> bool:
    return one.type == other.type and (other.index is None or one.index == other.index)


def moved_state(state, device: torch.device):
    """A vision state with its tensors on a device. The calls that it remembers move as well."""

    def moved(value):
        return value.to(device) if isinstance(value, torch.Tensor) else value

    names = ("rope_delta", "last_ids", "token_counts")
    calls = tuple(
        replace(
            call,
            positions=moved(call.positions),
            dropped=moved(call.dropped),
            before=moved_state(call.before, device),
        )
        for call in state.past_calls
    )
    waiting = [moved(states) for states in state.waiting]
    return replace(
        state, **{name: moved(getattr(state, name)) for name in names}, waiting=waiting, past_calls=calls, step=None
    )


# Files


def save_session(state: dict, kept: KeptCache, file) -> None:
    """Writes a state and its cache to a safetensors file. Raises ValueError for media that no file can hold."""
    tensors: dict[str, torch.Tensor] = {}
    vision = None
    for index, layer in enumerate(kept.cache.layers):
        if layer.keys is not None:
            for name in tensor_names(layer):
                tensors[f"layers.{index}.{name}"] = getattr(layer, name).contiguous()
        vision = getattr(layer, "state", None) or vision
    assert not vision.is_waiting() and not any(vision.unplaced), "a kept cache holds a whole prompt"
    for name in STATE_TENSORS:
        if getattr(vision, name) is not None:
            tensors[f"state.{name}"] = getattr(vision, name)
    content = {
        "format": FILE_FORMAT,
        "session": packed(dict(state), tensors),
        "kept": packed({name: getattr(kept, name) for name in KEPT_FIELDS}, tensors),
        "state": {name: getattr(vision, name) for name in STATE_LISTS},
        "last_visible": [frames_to_list(frames) for frames in vision.last_visible],
    }
    whole = torch.contiguous_format  # files hold no views
    tensors = {name: tensor.detach().clone(memory_format=whole) for name, tensor in tensors.items()}
    save_file(tensors, file, {"moss_vl_session": json.dumps(content)})


def load_session(model, file) -> SessionState:
    """Reads a state that `SessionState.save` wrote, with its cache on the devices of the model.

    Raises:
        ValueError: if the file is no session, or of a model with other weights.
    """
    try:
        opening = safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is no session of MOSS-VL, or not whole: {error}") from error
    with opening as opened:
        content = json.loads((opened.metadata() or {}).get("moss_vl_session", "null"))
        if not isinstance(content, dict) or content.get("format") != FILE_FORMAT:
            raise ValueError(f"{file} is no session of MOSS-VL in format {FILE_FORMAT}; expected a file of state.save")
        if content["kept"]["fingerprint"] != model_fingerprint(model):
            raise ValueError(
                f"{file} was saved with other weights than those of this model; expected the model that made it, or "
                "the conversation without its cache"
            )
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no iterator
    config, cache = model.config.text_config, DynamicCache()
    is_int8 = f"layers.{config.cross_attention_layers[0]}.key_scales" in tensors
    install_layers(cache, config, "int8" if is_int8 else None)
    for index, layer in enumerate(cache.layers):
        if (keys := tensors.get(f"layers.{index}.keys")) is not None:
            for name in tensor_names(layer):
                setattr(layer, name, tensors[f"layers.{index}.{name}"])
            layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
            layer.renew_buffer(slice(0, keys.shape[-2]))
    cache.layers[config.cross_attention_layers[0]].state = replace(
        VisionState.empty(1),
        last_visible=[frames_from_list(frames) for frames in content["last_visible"]],
        **{name: tensors.get(f"state.{name}") for name in STATE_TENSORS},
        **{name: content["state"][name] for name in STATE_LISTS if name != "grids"},
        grids=[[tuple(grid) for grid in grids] for grids in content["state"]["grids"]],
    )
    cache = moved_cache(cache, layer_devices(model, cache))
    session = unpacked(content["session"], tensors)
    media = {f"{kind}s": collect_media(session["messages"], kind) for kind in PLACEHOLDERS}
    return SessionState(session, KeptCache(cache=cache, **media, **unpacked(content["kept"], tensors)))


def frames_to_list(frames: FrameSet) -> list:
    return [frames.first, frames.stop, None if frames.visible is None else frames.visible.tolist()]


def frames_from_list(values: list) -> FrameSet:
    first, stop, visible = values
    return FrameSet(first, stop, None if visible is None else np.array(visible, dtype=bool))


def packed(value, tensors: dict[str, torch.Tensor]):
    """A value for JSON. Bytes, arrays and tensors go to `tensors`, and their names stay.

    Raises:
        ValueError: for any other object.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict) and PACKED not in value and all(isinstance(key, str) for key in value):
        return {key: packed(one, tensors) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [packed(one, tensors) for one in value]
    kind = next((kind for kind, of_type in PACKED_TYPES.items() if isinstance(value, of_type)), None)
    if kind is None:
        raise ValueError(
            f"the conversation holds {shorten(value)}, which no file can hold; give media as paths, URLs, bytes, "
            "arrays or tensors"
        )
    name = f"media.{len(tensors)}"
    tensors[name] = (
        torch.frombuffer(bytearray(value), dtype=torch.uint8)
        if kind == "bytes"
        else torch.as_tensor(np.ascontiguousarray(value) if kind == "array" else value)
    )
    return {PACKED: name, "kind": kind}


def unpacked(value, tensors: dict[str, torch.Tensor]):
    """What `packed` packed."""
    if isinstance(value, list):
        return [unpacked(one, tensors) for one in value]
    if not isinstance(value, dict):
        return value
    if PACKED not in value:
        return {key: unpacked(one, tensors) for key, one in value.items()}
    tensor = tensors[value[PACKED]]
    return (
        tensor
        if value["kind"] == "tensor"
        else tensor.numpy().tobytes()
        if value["kind"] == "bytes"
        else tensor.numpy()
    )
