"""Cache layers for the keys and values of a conversation: those of the text, and those of the vision sequence.

Axes: B rows, K key/value heads, S text tokens, T new text tokens, V vision tokens (packed, without padding), d
head size.
"""

import weakref
from collections.abc import Sequence
from typing import Optional

import torch
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

from .vision_sequence import VisionCall, VisionState


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


def cached_length(cache: Optional[Cache]) -> int:
    """Text tokens in the cache (layer 0 is always self-attention)."""
    return 0 if cache is None else int(cache.get_seq_length())


def static_length(cache: Optional[Cache]) -> Optional[int]:
    """Number of slots of a static cache, whose layers return all slots, also empty ones; None for a growing cache."""
    return getattr(cache.layers[0], "max_cache_len", None) if cache is not None and cache.layers else None


class InPlaceLayer(DynamicLayer):
    """A layer that writes new tokens into a buffer. A shallow copy shares the buffer with its original, so both
    allocate a new one before their next write."""

    def __init__(self):
        super().__init__()
        self.shared = False

    def __copy__(self):
        copied = type(self).__new__(type(self))
        self.shared = True
        copied.__dict__.update(self.__dict__)
        return copied


class TextCacheLayer(InPlaceLayer):
    """Keys and values [B, K, S, d] of the text. They are views of the first S tokens of larger buffers. New tokens are
    written after them; the old ones are copied only if a buffer is full."""

    def __init__(self):
        super().__init__()
        self._key_buffer: Optional[torch.Tensor] = None
        self._value_buffer: Optional[torch.Tensor] = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        keys, values = (self.keys, self.values) if self.get_seq_length() else (None, None)
        if self.shared:
            self._key_buffer = self._value_buffer = None
        self.keys, self._key_buffer = append(keys, self._key_buffer, key_states)
        self.values, self._value_buffer = append(values, self._value_buffer, value_states)
        self.shared = False
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        return self.keys, self.values

    def reset(self) -> None:
        super().reset()
        self._key_buffer = self._value_buffer = None
        self.shared = False


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
    is_view = (
        buffer is not None
        and past is not None
        and past.data_ptr() == buffer.data_ptr()
        and past.shape[:-2] == buffer.shape[:-2]
        and buffer.dtype == new.dtype
        and is_writable(buffer)
    )
    if not is_view or buffer.shape[-2] < total:
        buffer = new.new_empty(*new.shape[:-2], total + max(TEXT_BUFFER, total // 8), new.shape[-1])
        if length:
            buffer[..., :length, :] = past
    buffer[..., length:total, :] = new
    return buffer[..., :total, :], buffer


def is_writable(tensor: torch.Tensor) -> bool:
    """Whether a tensor can be written in place now: inference tensors can only in inference mode."""
    return torch.is_inference_mode_enabled() or not tensor.is_inference()


class VisionCacheLayer(InPlaceLayer):
    """Keys and values [1, K, V, d] of the vision sequence at one cross-attention layer. The first such layer of a
    cache also holds the `VisionState`."""

    def __init__(self, index: int):
        super().__init__()
        self.index = index
        self.state: Optional[VisionState] = None
        self._cache: Optional[weakref.ref] = None

    def __getstate__(self):
        return {**self.__dict__, "_cache": None}  # a deep copy or a pickle belongs to another cache

    def __copy__(self):
        copied = super().__copy__()
        copied._cache = None
        return copied

    def belongs_to(self, cache: Cache) -> bool:
        """Claims the layer for a cache. False if the layer belongs to another cache that still exists."""
        owner = None if self._cache is None else self._cache()
        if owner is not None and owner is not cache:
            return False
        self._cache = weakref.ref(cache)
        return True

    def store(self, keys: Optional[torch.Tensor], values: Optional[torch.Tensor], call: VisionCall):
        """Stores the keys and values [1, K, v, d] of the new vision tokens.

        Returns:
            Keys and values [1, K, V, d] of the whole packed sequence.
        """
        if self.keys is not None and not is_writable(self.keys):  # autograd cannot record an inference tensor either
            self.keys, self.values = self.keys.clone(), self.values.clone()
        if call.writes:
            self.in_dtype(keys.dtype)
            self.keys = write_packed(self.keys, keys, call, self.shared)
            self.values = write_packed(self.values, values, call, self.shared)
            self.dtype, self.device, self.is_initialized, self.shared = self.keys.dtype, self.keys.device, True, False
        return self.keys, self.values

    def in_dtype(self, dtype: torch.dtype):
        """Converts the stored keys and values to a dtype, as autocast may differ between calls, and returns them."""
        if self.keys is not None and self.keys.dtype != dtype:
            self.keys, self.values, self.dtype = self.keys.to(dtype), self.values.to(dtype), dtype
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
        self.keys = self.values = self.state = None
        self.is_initialized = self.shared = False


def write_packed(old: Optional[torch.Tensor], new: torch.Tensor, call: VisionCall, shared: bool) -> torch.Tensor:
    """Writes new keys or values [1, K, v, d] into the packed ones, and returns these. Allocates a new tensor if tokens
    have to move, with gradients, or if `old` is `shared` with another layer. Returns `new` if it is all."""
    if call.writes == ((slice(0, call.length), slice(0, call.length)),):
        return new
    in_graph = torch.is_grad_enabled() and (new.requires_grad or (old is not None and old.requires_grad))
    if old is None or call.moves is not None or shared or in_graph:
        grown = new.new_empty(*new.shape[:-2], call.length, new.shape[-1])
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


def install_layers(cache: Cache, config) -> VisionCacheLayer:
    """Puts layers for the vision sequence into an empty cache, and text layers that write in place. A filled cache has
    these layers already.

    Args:
        config: the text config.

    Returns:
        The layer that holds the vision state.
    """
    if cached_length(cache) == 0:
        while len(cache.layers) < config.num_hidden_layers:
            cache.layers.append(cache.layer_class_to_replicate())
        for index, layer in enumerate(cache.layers):
            if index in config.cross_attention_layers:
                cache.layers[index] = VisionCacheLayer(index)
            elif type(layer) is DynamicLayer and not getattr(cache, "offloading", False):
                cache.layers[index] = TextCacheLayer()
    layers = [cache.layers[index] for index in config.cross_attention_layers]
    for layer in layers:
        layer.belongs_to(cache)
    return layers[0]


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
            f"filled. Pass an empty cache, or the cache of an earlier output."
        )
    if not layer.belongs_to(cache):
        raise ValueError(
            "The cache is a shallow copy: it shares its layers with another cache, so both would write into the same "
            "layers. Copy it with copy.deepcopy."
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
