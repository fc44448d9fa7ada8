"""Cache layers for the keys and values of a conversation: those of the text, and those of the vision sequence. What
callers do with a whole cache is at the end: `fork_cache`, `drop_frames`, `cache_contents`.

Axes: B rows, K key/value heads, S text tokens, T new text tokens, V vision tokens (packed, without padding), d
head size.
"""

import copy
import weakref
from collections.abc import Sequence
from typing import NamedTuple, Optional, Union

import torch
from torch.utils._pytree import tree_leaves
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, QuantizedCache, StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.utils import is_hqq_available, is_optimum_quanto_available, logging

from .int8_states import Int8States, is_int8
from .static_layers import StaticTextLayer, static_zeros
from .vision_sequence import VisionCall, VisionState


logger = logging.get_logger(__name__)

# The name of the cache in outputs and in `generate`: `cache` from transformers 5.24 on, `past_key_values` before.
CACHE = "cache" if hasattr(CausalLMOutputWithCrossAttentions, "cache") else "past_key_values"

TEXT_BUFFER = 256  # least number of free tokens in a new buffer of a text cache


def cache_of(cache: Optional[Cache], past_key_values: Optional[Cache]) -> Optional[Cache]:
    """The cache, under either of its two names.

    Raises:
        ValueError: if both names were used, or it is no transformers cache.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError(
            "The cache was given twice, as `cache` and as `past_key_values`; expected one of them. `generate` of "
            f"this transformers calls it `{CACHE}`."
        )
    cache = past_key_values if cache is None else cache
    if cache is not None and not hasattr(cache, "layers"):
        raise ValueError(
            f"The cache is a {type(cache).__name__}; expected a transformers cache such as DynamicCache or "
            "StaticCache."
        )
    return cache


# Caches that quantize the text

CACHE_PACKAGES = {"hqq": ("hqq", is_hqq_available), "quanto": ("optimum-quanto", is_optimum_quanto_available)}


def can_quantize(generation_config: GenerationConfig) -> bool:
    """Whether the package of the quantized cache that `generation_config` asks for is installed; warns once if not."""
    backend = (generation_config.cache_config or {}).get("backend", "quanto")
    package, is_available = CACHE_PACKAGES.get(backend, (backend, lambda: True))
    if not is_available():
        logger.warning_once(
            f"generation_config.json asks for a cache quantized by {package}, which is not installed; the cache is "
            f"kept in the dtype of the model, which needs more memory. Install it by: pip install {package}"
        )
    return is_available()


def new_cache(config, generation_config: GenerationConfig) -> Cache:
    """An empty cache, quantized if `generation_config` asks for that and the package is installed.

    Args:
        config: the text config.
    """
    if generation_config.cache_implementation != "quantized" or not can_quantize(generation_config):
        return DynamicCache()
    options = {"backend": "quanto", **(generation_config.cache_config or {})}
    return QuantizedCache(config=config, **options)


def cached_length(cache: Optional[Cache]) -> int:
    """Text tokens in the cache (layer 0 is always self-attention)."""
    return 0 if cache is None else int(cache.get_seq_length())


def static_length(cache: Optional[Cache]) -> Optional[int]:
    """Number of slots of a static cache, whose layers return all slots, also empty ones; None for a growing cache."""
    return getattr(cache.layers[0], "max_cache_len", None) if cache is not None and cache.layers else None


class InPlaceLayer(DynamicLayer):
    """A layer that writes new tokens into a buffer. A shallow copy shares the buffer with its original: the copy
    allocates a new one before its first write, and the original before it writes over tokens that the copy has.

    Attributes:
        shared: whether any write needs a new buffer: the layer is a copy, or autograd keeps the buffer.
        written: the parts of the buffer that have tokens, as slices.
        protected: the parts that also belong to copies.
    """

    def __init__(self):
        super().__init__()
        self.renew_buffer()

    def renew_buffer(self, *written: slice) -> None:
        """To be called when the layer has a new buffer, with the parts that have tokens."""
        self.shared, self.written, self.protected = False, written, ()

    def __copy__(self):
        if not self.shared:
            self.protected = self.written
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        copied.shared = True
        return copied

    def can_write(self, *parts: slice) -> bool:
        """Whether these parts of the buffer can be written in place."""
        return not self.shared and not any(
            part.start < other.stop and other.start < part.stop for part in parts for other in self.protected
        )

    def mark_written(self, *parts: slice) -> None:
        for part in parts:
            self.written = join_slice(self.written, part)

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.renew_buffer()


def join_slice(slices: tuple[slice, ...], new: slice) -> tuple[slice, ...]:
    """Adds a slice to others, joined with those that it touches."""
    apart = tuple(part for part in slices if part.stop < new.start or new.stop < part.start)
    touching = [new, *(part for part in slices if part not in apart)]
    return (*apart, slice(min(part.start for part in touching), max(part.stop for part in touching)))


class TextCacheLayer(InPlaceLayer):
    """Keys and values [B, K, S, d] of the text. They are views of the first S tokens of larger buffers. New tokens are
    written after them; the old ones are copied only if a buffer is full."""

    def __init__(self):
        super().__init__()
        self._key_buffer: Optional[torch.Tensor] = None
        self._value_buffer: Optional[torch.Tensor] = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        length = self.get_seq_length()
        keys, values = (self.keys, self.values) if length else (None, None)
        new = slice(length, length + key_states.shape[-2])
        if not self.can_write(new):
            self._key_buffer = self._value_buffer = None
        buffer = self._key_buffer
        self.keys, self._key_buffer = append(keys, self._key_buffer, key_states)
        self.values, self._value_buffer = append(values, self._value_buffer, value_states)
        if buffer is None or self._key_buffer is not buffer:
            self.renew_buffer()
        self.mark_written(slice(0, new.stop))
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        return self.keys, self.values

    def with_token(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, K, S + 1, d] of a filled layer. The last token is yet to be written, and belongs to the
        layer after `take_token`."""
        length, buffer = self.get_seq_length(), self._key_buffer
        if not self.can_write(slice(length, length + 1)):
            self._key_buffer = self._value_buffer = None
        self._key_buffer = with_space(self.keys, self._key_buffer, self.keys, 1)
        self._value_buffer = with_space(self.values, self._value_buffer, self.values, 1)
        if self._key_buffer is not buffer:
            self.keys, self.values = (part[..., :length, :] for part in (self._key_buffer, self._value_buffer))
            self.renew_buffer(slice(0, length))
        return self._key_buffer.narrow(2, 0, length + 1), self._value_buffer.narrow(2, 0, length + 1)

    def take_token(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Takes over the keys and values of `with_token`, after the token was written."""
        self.keys, self.values = keys, values
        self.mark_written(slice(0, keys.shape[2]))

    def reset(self) -> None:
        super().reset()
        self._key_buffer = self._value_buffer = None


def append(
    past: Optional[torch.Tensor], buffer: Optional[torch.Tensor], new: torch.Tensor
) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
    """Appends `new` [B, K, T, d] to `past` [B, K, S, d]. Writes in place if `past` is still a view of `buffer` and the
    buffer has space; otherwise allocates a new buffer. With gradients it concatenates, without a buffer.

    Returns:
        `past` and `new` as one tensor [B, K, S + T, d], and the buffer that holds it, or None.
    """
    if torch.is_grad_enabled() and (new.requires_grad or (past is not None and past.requires_grad)):
        return (new if past is None else torch.cat([past, new], dim=-2)), None
    length = 0 if past is None else past.shape[-2]
    total = length + new.shape[-2]
    buffer = with_space(past, buffer, new, new.shape[-2])
    buffer[..., length:total, :] = new
    return buffer[..., :total, :], buffer


def with_space(
    past: Optional[torch.Tensor], buffer: Optional[torch.Tensor], like: torch.Tensor, tokens: int
) -> torch.Tensor:
    """The buffer if `past` [B, K, S, d] is still a view of it and it has space for more `tokens` of the form of
    `like`; otherwise a new one that begins with `past`."""
    length = 0 if past is None else past.shape[-2]
    total = length + tokens
    is_view = (
        buffer is not None
        and past is not None
        and past.data_ptr() == buffer.data_ptr()
        and past.shape[:-2] == buffer.shape[:-2]
        and buffer.dtype == like.dtype
        and is_writable(buffer)
    )
    if not is_view or buffer.shape[-2] < total:
        buffer = like.new_empty(*like.shape[:-2], total + max(TEXT_BUFFER, total // 8), like.shape[-1])
        if length:
            buffer[..., :length, :] = past
    return buffer


def is_writable(tensor: torch.Tensor) -> bool:
    """Whether a tensor can be written in place now: inference tensors can only in inference mode."""
    return torch.is_inference_mode_enabled() or not tensor.is_inference()


class VisionCacheLayer(InPlaceLayer):
    """Keys and values [1, K, V, d] of the vision sequence at one cross-attention layer, with free space where
    `VisionState` has it. The first such layer of a cache also holds the `VisionState`.

    Args:
        index: that of the layer.
        capacity: most vision tokens, for a layer whose keys and values stay at one address (`static_cache`); None for
            one that grows.

    Attributes:
        tensor_names: the attributes that hold keys and values.
        buffers: [1, K, capacity, d] each, which begin with the keys and values.
        step_mask: the latest plan of a static step, and its masks (decode_step.py).
    """

    tensor_names: tuple[str, ...] = ("keys", "values")

    def __init__(self, index: int, capacity: Optional[int] = None):
        super().__init__()
        self.index, self.capacity = index, capacity
        self.buffers: Optional[tuple[torch.Tensor, torch.Tensor]] = None
        self.step_mask: Optional[tuple] = None
        self.state: Optional[VisionState] = None
        self._cache: Optional[weakref.ref] = None

    def __getstate__(self):
        return {**self.__dict__, "_cache": None}  # a deep copy or a pickle belongs to another cache

    def __copy__(self):
        copied = super().__copy__()
        copied._cache = None
        return copied

    def claim(self, cache: Cache) -> bool:
        """Makes the layer belong to a cache. Returns False if it belongs to another cache that still exists."""
        owner = None if self._cache is None else self._cache()
        if owner is not None and owner is not cache:
            return False
        self._cache = weakref.ref(cache)
        return True

    def store(self, keys, values, call: VisionCall) -> None:
        """Stores the keys and values [1, K, v, d] of the new vision tokens, and moves those that the call moves.

        Args:
            keys, values: as `read` returns them; None without new vision tokens.
        """
        old, new = self.tensors(), self.tensors_of(keys, values)
        if self.keys is not None and torch.is_grad_enabled() and not is_writable(self.keys):
            old = [part.clone() for part in old]  # autograd cannot record inference tensors
            self.set_tensors(old)
            self.renew_buffer(*self.written)
        if call.writes and self.keys is not None:
            old = self.in_dtype_of(new)
        parts = [part for _, part in call.writes]
        if call.writes or (call.moves is not None and self.keys is not None):
            has_gradients = any(part is not None and part.requires_grad for part in (*new, *old))
            in_graph = torch.is_grad_enabled() and has_gradients
            can_write = self.keys is not None and is_writable(self.keys) and self.can_write(*parts)
            in_place = can_write and call.moves is None and not in_graph
            pairs = zip(old, new, strict=True)
            self.set_tensors([write_packed(before, after, call, in_place) for before, after in pairs])
            if not in_place:
                kept = self.written if call.moves is None else tuple(part for _, part in call.moves)
                if self.capacity is not None:
                    self._copy_to_buffers((*kept, *parts))
                self.renew_buffer(*kept)
            self.mark_written(*parts)
            self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True

    def _copy_to_buffers(self, parts: tuple[slice, ...]) -> None:
        """Copies these parts of the keys and values to the buffers of the layer, or to new ones if a copy of the layer
        has these. The rest of the buffers stays finite, as a static step multiplies it by 0."""
        if self.keys.requires_grad or self.values.requires_grad:
            self.buffers = None
            return
        length = self.keys.shape[2]
        stale = self.buffers is None or self.buffers[0].dtype != self.keys.dtype
        if stale or self.shared or self.protected or not is_writable(self.buffers[0]):
            shape = (*self.keys.shape[:2], self.capacity, self.keys.shape[3])
            self.buffers = (static_zeros(self.keys, shape), static_zeros(self.values, shape))
        for buffer, states in zip(self.buffers, (self.keys, self.values), strict=True):
            for part in parts:
                buffer[:, :, part] = states[:, :, part]
        self.keys, self.values = (buffer.narrow(2, 0, length) for buffer in self.buffers)

    def in_buffers(self) -> bool:
        """Whether the keys and values are the first tokens of `buffers`."""
        return self.buffers is not None and self.keys.data_ptr() == self.buffers[0].data_ptr()

    def tensors(self) -> list[Optional[torch.Tensor]]:
        """What is stored, or None for each if nothing is."""
        return [getattr(self, name) for name in self.tensor_names]

    def set_tensors(self, tensors: Sequence[Optional[torch.Tensor]]) -> None:
        for name, tensor in zip(self.tensor_names, tensors, strict=True):
            setattr(self, name, tensor)

    def tensors_of(self, keys, values) -> tuple[Optional[torch.Tensor], ...]:
        """Keys and values as they are stored, in the order of `tensor_names`."""
        return keys, values

    def in_dtype_of(self, new: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The stored tensors, in the dtype of new ones."""
        return list(self.read(new[0].dtype))

    def read(self, dtype: torch.dtype):
        """Keys and values [1, K, V, d] of the whole packed sequence. They are converted to a dtype, as autocast may
        differ between calls."""
        if self.keys is not None and self.keys.dtype != dtype:
            self.keys, self.values, self.dtype = self.keys.to(dtype), self.values.to(dtype), dtype
            if self.capacity is not None:
                self._copy_to_buffers(self.written)
            self.renew_buffer(*self.written)
        return self.keys, self.values

    def prefetch(self) -> None:
        """An offloading cache prefetches one layer ahead. This layer is never offloaded, so the layer after it is
        fetched instead."""
        cache = None if self._cache is None else self._cache()
        if cache is not None:
            cache.layers[(self.index + 1) % len(cache.layers)].prefetch()

    def crop(self, *args, **kwargs) -> None:
        """Does nothing. The next call of the model crops the state to the shorter text (`vision_state`)."""

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            rows = range(len(self.state.row_sample))
            self.state = self.state.select_rows([row for row in rows for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.state is not None:
            rows = torch.arange(len(self.state.row_sample), device=indices.device)
            rows = rows[indices]  # indices, also negative ones, or a bool mask
            self.state = self.state.select_rows(rows.tolist())

    def reset(self) -> None:
        if self.shared or self.protected:
            self.buffers = None  # a fork reads them
        self.set_tensors([None] * len(self.tensor_names))
        super().reset()
        self.state = None


class Int8VisionLayer(VisionCacheLayer):
    """A `VisionCacheLayer` in 8 bits: `keys` and `values` are int8, and each token and head has a scale."""

    tensor_names = ("keys", "key_scales", "values", "value_scales")

    def __init__(self, index: int):
        super().__init__(index)
        self.key_scales = self.value_scales = None

    def tensors_of(self, keys: Optional[Int8States], values: Optional[Int8States]):
        return (None,) * 4 if keys is None else (*keys, *values)

    def in_dtype_of(self, new: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return self.tensors()

    def read(self, dtype: torch.dtype) -> tuple[Optional[Int8States], Optional[Int8States]]:
        """Keys and values of the whole packed sequence, which the reader converts in pieces."""
        if self.keys is None:
            return None, None
        return Int8States(self.keys, self.key_scales), Int8States(self.values, self.value_scales)


def write_packed(
    old: Optional[torch.Tensor], new: Optional[torch.Tensor], call: VisionCall, in_place: bool
) -> torch.Tensor:
    """Writes new keys or values [1, K, v, d] into the packed ones `in_place`, or into a new tensor, and returns these.
    Returns `new` if it is all."""
    if call.writes == ((slice(0, call.length), slice(0, call.length)),):
        return new
    like = old if new is None else new
    if not in_place:
        grown = like.new_empty(*like.shape[:-2], call.length, like.shape[-1])
        if call.moves is not None:
            for source, destination in call.moves:
                grown[..., destination, :] = old[..., source, :]
        elif old is not None:
            grown.copy_(old)
        old = grown
    for source, destination in call.writes:
        old[..., destination, :] = new[..., source, :]
    return old


class JointCache:
    """The caches of several conversations, one row each, for a call of the model that adds one token to each of them
    (joint_decoding.py). It holds nothing itself.

    Args:
        caches: caches that this model filled, each with the prompt of one conversation.

    Raises:
        ValueError: without caches, and for a cache that is given twice.
    """

    def __init__(self, caches: Sequence[Cache]):
        self.caches = list(caches)
        if not self.caches:
            raise ValueError("A JointCache was made of no caches; expected at least one.")
        if len({id(cache) for cache in self.caches}) < len(self.caches):
            raise ValueError(
                "A JointCache was made of caches of which one is given twice; expected a separate cache per "
                "conversation, such as a copy."
            )


def install_layers(cache: Cache, config, vision_dtype: Optional[str] = None) -> VisionCacheLayer:
    """Puts layers for the vision sequence into an empty cache, and text layers that write in place. A filled cache has
    these layers already.

    Args:
        config: the text config.
        vision_dtype: "int8" for vision layers in 8 bits.

    Returns:
        The layer that holds the vision state.
    """
    if cached_length(cache) == 0:
        while len(cache.layers) < config.num_hidden_layers:
            cache.layers.append(cache.layer_class_to_replicate())
        for index, layer in enumerate(cache.layers):
            if index in config.cross_attention_layers:
                if getattr(layer, "capacity", None) is not None:
                    layer.reset()
                else:
                    cache.layers[index] = (Int8VisionLayer if is_int8(vision_dtype) else VisionCacheLayer)(index)
            elif type(layer) is DynamicLayer and not getattr(cache, "offloading", False):
                cache.layers[index] = TextCacheLayer()
            elif type(layer) is StaticLayer and not getattr(cache, "offloading", False):
                cache.layers[index] = StaticTextLayer(layer.max_cache_len)
    layers = [cache.layers[index] for index in config.cross_attention_layers]
    for layer in layers:
        layer.claim(cache)
    return layers[0]


def check_vision_dtype(
    cache: Optional[Cache], config, vision_dtype: Optional[str], use_cache: Optional[bool]
) -> Optional[bool]:
    """Checks the `vision_cache_dtype` of a call.

    Args:
        config: the text config.

    Returns:
        `use_cache`: True if it was None and the option needs a cache.

    Raises:
        ValueError: for an unknown dtype, without a cache, with gradients, and if the cache is static, or filled in
            another dtype.
    """
    if not is_int8(vision_dtype):
        return use_cache
    if cache is None and use_cache is False:
        raise ValueError(
            "`vision_cache_dtype` is 'int8', but the call has no cache; expected `use_cache=True` or a cache."
        )
    if any(getattr(layer, "capacity", None) is not None for layer in ([] if cache is None else cache.layers)):
        raise ValueError(
            "`vision_cache_dtype` is 'int8', and the cache is one of `static_cache`, which keeps the dtype of the "
            "model; expected another cache."
        )
    if torch.is_grad_enabled():
        raise ValueError(
            "`vision_cache_dtype` is 'int8', and rounding to 8 bits has no gradients; expected a call under "
            "`torch.no_grad()` or `torch.inference_mode()`. Leave it out to train."
        )
    if cached_length(cache) and vision_cache_dtype(cache, config) != vision_dtype:
        raise ValueError(
            "`vision_cache_dtype` is 'int8', but the cache keeps its vision tokens in the dtype of the model; "
            "expected the option at the first call of a cache, and later the same or none."
        )
    return True


def vision_cache_dtype(cache: Cache, config) -> Optional[str]:
    """The `vision_cache_dtype` of a filled cache: "int8", or None."""
    return "int8" if isinstance(cache.layers[config.cross_attention_layers[0]], Int8VisionLayer) else None


def vision_state(cache: Optional[Cache], config) -> Optional[VisionState]:
    """The vision state of a filled cache, cropped to the text that the cache holds; None if the cache is empty.

    Args:
        config: the text config.

    Raises:
        ValueError: if the cache was filled by another model, by a call that failed, or is a shallow copy.
    """
    length = cached_length(cache)
    if length == 0:
        return None
    index = config.cross_attention_layers[0]
    layer = cache.layers[index] if len(cache.layers) > index else None
    if not isinstance(layer, VisionCacheLayer) or layer.state is None:
        raise ValueError(
            f"The cache holds {length} tokens, but not their vision sequence; expected a cache that this model "
            f"filled, by calls that did not fail. Pass an empty cache, or the cache of an earlier output."
        )
    if not layer.claim(cache):
        raise ValueError(
            "The cache is a shallow copy: it shares its layers with another cache, so both would write into the same "
            "layers. Copy it with model.fork_cache, which shares the keys and values, or with copy.deepcopy."
        )
    last = max(set(range(config.num_hidden_layers)) - set(config.cross_attention_layers))
    uneven = static_length(cache) is None and cache.layers[last].get_seq_length() != length
    if uneven or layer.state.length < length:
        raise ValueError(
            f"The cache holds {length} text tokens, but a call failed before its end, so some layers lack its tokens. "
            "Start from an empty cache, or from a copy.deepcopy made before that call."
        )
    if layer.state.length > length:
        layer.state = layer.state.cropped(length)
    return layer.state


# What callers do with a whole cache


def fork_cache(cache: Cache) -> Cache:
    """A copy of a cache that shares its keys and values until one of both writes over what the other has. The original
    appends text and frames without a copy. The fork copies its text at its first call, and its vision keys and values
    at the first call that places frames. So several questions about one video cost no copy of the video.

    Text layers of static, offloading and quantized caches are copied at once.

    Raises:
        ValueError: if it is no transformers cache.
    """
    fork = copy.copy(given_cache(cache))
    fork.layers = [
        copy.copy(layer) if isinstance(layer, InPlaceLayer) else copy.deepcopy(layer) for layer in cache.layers
    ]
    return fork


def drop_frames(cache: Cache, config, count: Union[int, Sequence[int]]) -> None:
    """Drops the oldest placed frames of a cache. Later tokens do not see them. Nothing is computed again: earlier
    tokens keep what they saw, and all positions stay.

    Frames are numbered from the first that remains: the columns of a later `cross_attention_mask` are the frames that
    remain and the new ones. (A mask with a column for every frame of the conversation, as a processor makes it for the
    whole conversation, is accepted, too.) A later crop of the cache removes text and frames as without the drop, but
    does not bring dropped frames back.

    The space of dropped frames is reclaimed when new frames need it, or when it is more than half of the buffer.

    Args:
        config: the text config.
        count: number of frames for every sample, or a number per sample.

    Raises:
        ValueError: if the cache is empty or was not filled by this model, or a sample has fewer placed frames.
    """
    state = vision_state(given_cache(cache), config)
    if state is None:
        raise ValueError("The cache is empty; expected a cache that this model filled.")
    counts = read_counts(count, state)
    if not any(counts):
        return
    state = state.without_first(counts)
    layers = [cache.layers[index] for index in config.cross_attention_layers]
    used = sum(end - start for start, end in zip(state.starts, state.ends, strict=True))
    if state.stored > 2 * used:
        layers[0].state = None  # so that a cache of which only some layers were compacted is refused
        state, call = state.compacted()
        for layer in layers:
            layer.store(None, None, call)
    layers[0].state = state


def given_cache(cache: Optional[Cache]) -> Cache:
    """The cache.

    Raises:
        ValueError: if it is None or no transformers cache.
    """
    if cache is None:
        raise ValueError("The cache is None; expected a transformers cache, such as that of an earlier output.")
    return cache_of(cache, None)


def read_counts(count: Union[int, Sequence[int]], state: VisionState) -> list[int]:
    """The number of frames to drop of each sample.

    Raises:
        ValueError: if there is not one number per sample, between 0 and the sample's placed frames.
    """
    counts = list(count) if isinstance(count, (list, tuple)) else [count] * len(state.grids)
    if len(counts) != len(state.grids) or not all(map(can_drop, counts, state.placed)):
        raise ValueError(
            f"`count` is {count!r}; expected how many of the oldest frames to drop, an integer for all samples or one "
            f"per sample, at most {state.placed}: the frames of each sample whose `image_pad` is in the cache."
        )
    return counts


def can_drop(count, placed: int) -> bool:
    return isinstance(count, int) and not isinstance(count, bool) and 0 <= count <= placed


class CacheContents(NamedTuple):
    """What a cache holds.

    Attributes:
        text_tokens: tokens of each row, padding included.
        frame_tokens: for each sample, the vision tokens (separator included) of each placed frame, oldest first.
            Dropped frames are not among them.
        waiting: number of frames of each sample that were given, but whose `image_pad` did not come yet.
        dropped: number of frames of each sample that `drop_frames` dropped.
        text_bytes, vision_bytes: allocated bytes, free space included. Forks share some of them.
    """

    text_tokens: int
    frame_tokens: list[list[int]]
    waiting: list[int]
    dropped: list[int]
    text_bytes: int
    vision_bytes: int

    @property
    def frames(self) -> list[int]:
        """Number of placed frames of each sample that were not dropped."""
        return list(map(len, self.frame_tokens))

    @property
    def vision_tokens(self) -> list[int]:
        """Vision tokens of these frames, per sample."""
        return list(map(sum, self.frame_tokens))

    @property
    def bytes(self) -> int:
        return self.text_bytes + self.vision_bytes


def cache_contents(cache: Cache, config) -> CacheContents:
    """What a cache holds: text tokens, frames, vision tokens and bytes.

    Args:
        config: the text config.

    Raises:
        ValueError: if the cache was not filled by this model.
    """
    state = vision_state(given_cache(cache), config)
    text = [layer for index, layer in enumerate(cache.layers) if index not in config.cross_attention_layers]
    if state is None:
        return CacheContents(0, [], [], [], sum(map(layer_bytes, text)), 0)
    vision = [cache.layers[index] for index in config.cross_attention_layers]
    waiting = [states for states in state.waiting if states is not None]
    return CacheContents(
        text_tokens=state.length,
        frame_tokens=[
            [height * width + 1 for height, width in grids[:placed]]
            for grids, placed in zip(state.grids, state.placed, strict=True)
        ],
        waiting=[len(grids) - placed for grids, placed in zip(state.grids, state.placed, strict=True)],
        dropped=state.dropped,
        text_bytes=sum(map(layer_bytes, text)),
        vision_bytes=sum(map(layer_bytes, vision)) + sum(map(tensor_bytes, waiting)),
    )


def layer_bytes(layer) -> int:
    """Bytes of the keys and values of a layer, or of the buffers that hold them."""
    if isinstance(layer, VisionCacheLayer):
        held = layer.buffers or layer.tensors()
        return sum(tensor_bytes(part) for part in held if part is not None)
    key, value = (getattr(layer, name, None) for name in ("_key_buffer", "_value_buffer"))
    held = [layer.keys if key is None else key, layer.values if value is None else value]
    held += tree_leaves([getattr(layer, name, None) for name in ("_quantized_keys", "_quantized_values")])
    return sum(tensor_bytes(part) for part in held if isinstance(part, torch.Tensor))


def tensor_bytes(tensor: torch.Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # a subclass that holds quantized values, scales, ...
        return sum(tensor_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()
