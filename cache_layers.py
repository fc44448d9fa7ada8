"""What a transformers cache holds of a MOSS-VL conversation: keys and values of the text, and of the vision sequence.

Axes: B text rows, K key/value heads, S text tokens, T new text tokens, V vision tokens (packed, without padding), d head size.
"""

import weakref
from typing import Optional

import torch
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

from .vision_sequence import VisionCall, VisionState


# What outputs and `generate` of this transformers call the cache: `cache` from 5.24 on, `past_key_values` before.
CACHE = "cache" if hasattr(CausalLMOutputWithCrossAttentions, "cache") else "past_key_values"

TEXT_ROOM = 256  # tokens, at least, that a text cache makes room for at once


def cache_of(cache: Optional[Cache], past_key_values: Optional[Cache]) -> Optional[Cache]:
    """The cache that a caller gave by its name, or by the one it had before transformers 5.24."""
    if cache is not None and past_key_values is not None:
        raise ValueError(
            f"The cache was given twice, as `cache` and as `past_key_values`; expected one of them. `generate` of this transformers "
            f"calls it `{CACHE}`."
        )
    cache = past_key_values if cache is None else cache
    if cache is not None and not hasattr(cache, "layers"):
        raise ValueError(
            f"The cache is a {type(cache).__name__}; expected a transformers cache such as DynamicCache or StaticCache."
        )
    return cache


def cached_length(cache: Optional[Cache]) -> int:
    """Text tokens in the cache (layer 0 is always self-attention)."""
    return 0 if cache is None else int(cache.get_seq_length())


def static_length(cache: Optional[Cache]) -> Optional[int]:
    """Slots of a static cache, which it returns all of, the empty ones too; None for a cache that grows."""
    return getattr(cache.layers[0], "max_cache_len", None) if cache is not None and cache.layers else None


class OwnMemoryLayer(DynamicLayer):
    """A layer that writes new tokens into its own memory. A shallow copy and its original could write into the same memory, so both
    allocate anew before their next write."""

    def __init__(self):
        super().__init__()
        self.shared = False

    def __copy__(self):
        copied = type(self).__new__(type(self))
        self.shared = True
        copied.__dict__.update(self.__dict__)
        return copied


class TextCacheLayer(OwnMemoryLayer):
    """Keys and values [B, K, S, d] of the text, with free space after them: a new token is written into it, and no token moves those
    before it until the space is full."""

    def __init__(self):
        super().__init__()
        self._rooms: list[Optional[torch.Tensor]] = [
            None,
            None,
        ]  # of keys and values, which are views of their beginnings

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        before = (self.keys, self.values) if self.get_seq_length() else (None, None)
        rooms = [None, None] if self.shared else self._rooms
        parts = [append(*part) for part in zip(before, rooms, (key_states, value_states), strict=True)]
        (self.keys, _), (self.values, _) = parts
        self._rooms, self.shared = [room for _, room in parts], False
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        return self.keys, self.values

    def reset(self) -> None:
        super().reset()
        self._rooms, self.shared = [None, None], False


def append(
    past: Optional[torch.Tensor], room: Optional[torch.Tensor], new: torch.Tensor
) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
    """Puts `new` [B, K, T, d] after `past` [B, K, S, d]. Writes in place if `past` is still a view of `room` and there is space;
    otherwise allocates. When gradients flow it concatenates instead.

    Returns:
        Both [B, K, S + T, d], and the memory that holds them, or None.
    """
    if torch.is_grad_enabled() and (new.requires_grad or (past is not None and past.requires_grad)):
        return (new if past is None else torch.cat([past, new], dim=-2)), None
    length = 0 if past is None else past.shape[-2]
    total = length + new.shape[-2]
    in_room = (
        room is not None
        and past is not None
        and past.data_ptr() == room.data_ptr()
        and past.shape[:-2] == room.shape[:-2]
    )
    in_room = in_room and room.dtype == new.dtype and is_writable(room)
    if not in_room or room.shape[-2] < total:
        room = new.new_empty(*new.shape[:-2], total + max(TEXT_ROOM, total // 8), new.shape[-1])
        if length:
            room[..., :length, :] = past
    room[..., length:total, :] = new
    return room[..., :total, :], room


def is_writable(memory: torch.Tensor) -> bool:
    """Whether it may be written to here: what was made in inference mode only there."""
    return torch.is_inference_mode_enabled() or not memory.is_inference()


class VisionCacheLayer(OwnMemoryLayer):
    """Keys and values [1, K, V, d] of the vision sequence at one cross-attention layer. The first such layer of a cache also holds the
    `VisionState`, and knows the cache that it belongs to."""

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
        """Whether no other living cache uses this layer; from then on it is this one's."""
        owner = None if self._cache is None else self._cache()
        if owner is not None and owner is not cache:
            return False
        self._cache = weakref.ref(cache)
        return True

    def store(self, keys: Optional[torch.Tensor], values: Optional[torch.Tensor], call: VisionCall):
        """Takes in the keys and values of the new vision tokens, returns those of the whole packed sequence."""
        if self.keys is not None and not is_writable(self.keys):  # nor can gradients flow past it
            self.keys, self.values = self.keys.clone(), self.values.clone()
        if call.writes:
            self.in_dtype(keys.dtype)
            self.keys = write_packed(self.keys, keys, call, self.shared)
            self.values = write_packed(self.values, values, call, self.shared)
            self.dtype, self.device, self.is_initialized, self.shared = self.keys.dtype, self.keys.device, True, False
        return self.keys, self.values

    def in_dtype(self, dtype: torch.dtype):
        """The keys and values, from now on in this dtype: a call under autocast may have another than the one before."""
        if self.keys is not None and self.keys.dtype != dtype:
            self.keys, self.values, self.dtype = self.keys.to(dtype), self.values.to(dtype), dtype
        return self.keys, self.values

    def prefetch(self) -> None:
        """Fetches the layer after this one. An offloading cache fetches the layer after the one in use; this layer is never offloaded,
        and its use is not told to the cache."""
        cache = None if self._cache is None else self._cache()
        if cache is not None:
            cache.layers[(self.index + 1) % len(cache.layers)].prefetch()

    def crop(self, *args, **kwargs) -> None:
        """Nothing yet: the model's next call finds the text shorter than its state says, and takes back what the state holds."""

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state = self.state.select_rows([row for row in range(len(self.state.seen)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.state is not None:
            rows = torch.arange(len(self.state.seen), device=indices.device)[
                indices
            ]  # indices, also negative ones, or a bool mask
            self.state = self.state.select_rows(rows.tolist())

    def reset(self) -> None:
        self.keys = self.values = self.state = None
        self.is_initialized = self.shared = False


def write_packed(old: Optional[torch.Tensor], new: torch.Tensor, call: VisionCall, shared: bool) -> torch.Tensor:
    """Puts new keys or values [1, K, v, d] into the packed ones; no copy if the new ones are all there is. `shared`: whether something
    else reads `old`, which is then left as it is, as it is when gradients flow."""
    if call.writes == ((slice(0, call.length), slice(0, call.length)),):
        return new
    in_graph = torch.is_grad_enabled() and (new.requires_grad or (old is not None and old.requires_grad))
    if old is None or call.moves is not None or shared or in_graph:
        grown = new.new_empty(*new.shape[:-2], call.length, new.shape[-1])
        for source, destination in (
            [(slice(0, call.length),) * 2] if call.moves is None and old is not None else call.moves or ()
        ):
            grown[..., destination, :] = old[..., source, :]
        old = grown
    for source, destination in call.writes:
        old[..., destination, :] = new[..., source, :]
    return old


def install_layers(cache: Cache, config) -> VisionCacheLayer:
    """Makes the cross-attention layers of an empty cache hold vision keys and values, and its plain layers grow in place; returns the
    one that holds the vision state. `config`: the text config."""
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
    """The state that a cache in use carries, as of its text; None if there is nothing in the cache. `config`: the text config.

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
            f"filled. Pass an empty cache, or that of an earlier output."
        )
    if not layer.belongs_to(cache):
        raise ValueError(
            "The cache is a shallow copy: it shares its layers with another cache, so both would write into one. Copy it with copy.deepcopy."
        )
    last = max(set(range(config.num_hidden_layers)) - set(config.cross_attention_layers))
    uneven = static_length(cache) is None and cache.layers[last].get_seq_length() != length
    if uneven or layer.state.length < length:
        raise ValueError(
            f"The cache holds {length} text tokens, but a call failed half-way: of its last tokens some layers know nothing. Start from an "
            f"empty cache, or from a copy.deepcopy made before that call."
        )
    if layer.state.length > length:
        layer.state = layer.state.cropped(length)
    return layer.state
