"""A decode step: one token per row, with nothing new on the vision side.

    static_cache     a cache of a fixed size, whose steps can be CUDA graphs
    read_step        whether a call is such a step, and its plan, from what the cache holds
    StepCache        the keys and values that the step reads and writes, as tensors
    run_step         the step itself. It reads no tensor on the host, so `torch.compile` makes one graph of it
    keep_token      keeps in the cache what the next call needs

Other calls, and steps with gradients, positions or masks of the caller, take the way of a whole call
(`MossVLModel.forward`). Axes: B rows, K key/value heads, S text tokens with that of the step, or all slots of a static
cache, V vision tokens, or all for which a static cache has space, d head size.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, Optional

import torch
from torch import nn
from transformers.cache_utils import Cache, StaticCache

from .attention import compute_dtype
from .cache_layers import TextCacheLayer, VisionCacheLayer, static_length, vision_state
from .call_positions import walk_request
from .media import Grid, Media
from .static_layers import StaticTextLayer
from .vision_plan import plan_call
from .vision_request import read_request
from .vision_sequence import VisionCall, VisionState


CUDA_GRAPH_MODES = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


class StepSpan(NamedTuple):
    """Consecutive rows that see the same keys.

    Attributes:
        rows: their number.
        sees: whether they see any vision token; if not, the span has no keys.
        visible: bool [1, 1, rows or 1, V], the tokens that each row sees; None if all are visible.
    """

    rows: int
    sees: bool = True
    visible: Optional[torch.Tensor] = None


class StepPlan(NamedTuple):
    """A decode step as tensors and constants. It is a tuple, because hooks of accelerate move tensors in tuples only.

    Attributes:
        slot: long [1], where the new token is written.
        slots: S for a static cache, whose slots after `slot` are empty; None for a growing one.
        is_token: bool [B, S], False at padding; None if there is none.
        spans: the spans of all rows, in order; none if no row sees a frame.
        has_visible: as in `VisionCall`.
    """

    slot: torch.Tensor
    slots: Optional[int]
    is_token: Optional[torch.Tensor]
    spans: tuple[StepSpan, ...]
    has_visible: Optional[torch.Tensor]

    @classmethod
    def restored(cls, plan: tuple) -> "StepPlan":
        """The plan as a module got it, with the names that a hook may have removed."""
        if isinstance(plan, cls):
            return plan
        plan = cls(*plan)
        return plan._replace(spans=tuple(map(StepSpan._make, plan.spans)))

    def text_mask(self) -> Optional[torch.Tensor]:
        """The tokens that each row sees, bool [B or 1, 1, 1, S]; None if they are all."""
        mask = self.is_token
        if self.slots is not None:
            filled = (torch.arange(self.slots, device=self.slot.device) <= self.slot)[None]
            mask = filled if mask is None else filled & mask
        return None if mask is None else mask[:, None, None]


class StepCache:
    """Keys and values of a step.

    Attributes:
        keys, values: for each self-attention layer [B, K, S, d]; for each cross-attention layer [1, K, V, d] per span,
            None for a span that sees nothing.
    """

    def __init__(self, keys: list, values: list):
        self.keys, self.values = keys, values


class DecodeStep(NamedTuple):
    """A planned step: the state of the cache after it, the positions [B, 1], and what `run_step` takes besides."""

    state: VisionState
    positions: torch.Tensor
    plan: StepPlan
    cache: StepCache


def static_cache(config, text_length: int, vision_tokens: int) -> Cache:
    """An empty static cache. Its keys and values keep their addresses and shapes from prompt to prompt, also after
    `reset()`, so a compiled step is compiled once for all prompts, and CUDA graphs stay valid.

    A step reads all slots, so its cost is that of `text_length` and `vision_tokens`, whatever the cache holds.

    Args:
        config: the text config.
        text_length: most text tokens of each row, generated ones included.
        vision_tokens: most vision tokens of all samples together: height * width + 1 per frame of a merged grid
            height x width, and free space if frames come in several calls (docs/model.md, "Cache").

    Raises:
        ValueError: for numbers that are not positive.
    """
    for name, value in (("text_length", text_length), ("vision_tokens", vision_tokens)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` is {value!r}; expected a positive number of tokens.")
    cache = StaticCache(config=config, max_cache_len=text_length)
    cache.layers = [
        VisionCacheLayer(index, vision_tokens)
        if index in config.cross_attention_layers
        else StaticTextLayer(text_length)
        for index in range(config.num_hidden_layers)
    ]
    return cache


def vision_capacity(cache: Optional[Cache]) -> Optional[int]:
    """Most vision tokens of a cache of `static_cache`; None for other caches."""
    layers = [] if cache is None else cache.layers
    return next((layer.capacity for layer in layers if isinstance(layer, VisionCacheLayer)), None)


def check_capacity(cache: Optional[Cache], vision_tokens: int) -> None:
    """Refuses a call after which a static cache would hold more vision tokens than it has space for.

    Raises:
        ValueError: in that case.
    """
    capacity = vision_capacity(cache)
    if capacity is not None and vision_tokens > capacity:
        raise ValueError(
            f"The static cache has space for {capacity} vision tokens, and needs {vision_tokens} for the frames of "
            "this call and of earlier ones; expected a larger `vision_tokens` in `static_cache`, or fewer or smaller "
            "frames."
        )


def compile_settings(model: nn.Module, settings: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The settings of `compile_decode`, checked.

    Raises:
        ValueError: for unknown settings, and for a model that is spread over several devices.
    """
    known = sorted(set(inspect.signature(torch.compile).parameters) - {"model"})
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"`{unknown[0]}` is no setting of torch.compile; expected some of {known}.")
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise ValueError(
            "The model is spread over several devices by hooks, which cannot be compiled; expected one device: load "
            "it without `device_map`, or leave `compile_decode` out."
        )
    return tuple(sorted(settings.items()))


def read_step(config, cache: Optional[Cache], text: torch.Tensor, attention_mask, dtype) -> Optional[DecodeStep]:
    """The plan of a call that gives `text` [B, 1] or [B, 1, D] and `attention_mask` alone; None if it is no such step.

    The host waits for the device only to compare a mask of the caller with the padding of the cache.

    Args:
        config: the config of the whole model.
        dtype: that of the hidden states.
    """
    if text.shape[1] != 1 or torch.is_grad_enabled() or not has_own_layers(cache, config.text_config):
        return None
    if text.device.type != "meta" and compute_dtype(text.new_empty(0, dtype=dtype)) != dtype:  # autocast
        return None
    state = vision_state(cache, config.text_config)
    if state is None or len(state.row_sample) != len(text) or state.is_waiting() or any(state.unplaced):
        return None
    length, slots = state.length + 1, static_length(cache)
    if (slots is not None and length > slots) or not fits_dtype(cache, dtype):
        return None
    if attention_mask is not None and not continues_mask(state, attention_mask, length):
        return None
    state, call = with_step(config, state, text.device)
    known = state.known_mask(length if slots is None else slots)
    plan = StepPlan(
        slot=torch.full((1,), length - 1, dtype=torch.long, device=text.device),
        slots=slots,
        is_token=None if known is None else known.to(text.device),
        spans=(),
        has_visible=call.has_visible,
    )
    counts = None if state.token_counts is None else state.token_counts + 1
    positions = (state.rope_delta.to(text.device) + length - 1)[:, None]
    after = replace(state, length=length, token_counts=counts)
    return DecodeStep(after, positions, *with_keys(plan, cache, config.text_config, call, len(text)))


def has_own_layers(cache: Optional[Cache], config) -> bool:
    """Whether all text layers of a filled cache are those of this package."""
    layers = getattr(cache, "layers", ())
    return len(layers) == config.num_hidden_layers and all(
        type(layer) in (TextCacheLayer, StaticTextLayer, VisionCacheLayer) for layer in layers
    )


def fits_dtype(cache: Cache, dtype: torch.dtype) -> bool:
    """Whether the cache holds keys of this dtype: a cache that was filled under autocast may hold others."""
    return all(layer.keys is None or layer.keys.dtype == layer.values.dtype == dtype for layer in cache.layers)


def continues_mask(state: VisionState, attention_mask: torch.Tensor, length: int) -> bool:
    """Whether a mask of the caller is the padding of the cache, and tokens after it."""
    if tuple(attention_mask.shape) != (len(state.row_sample), length):
        return False
    known, is_token = state.known_mask(length), attention_mask.bool()
    return bool(is_token.all()) if known is None else torch.equal(is_token.to(known.device), known)


def with_step(config, state: VisionState, device: torch.device) -> tuple[VisionState, VisionCall]:
    """The state with the plan of its decode steps, which the first step after another call makes; and this plan."""
    if state.step is not None:
        return state, state.step
    written = torch.empty(len(state.row_sample), 1, 0, device=device)  # without ids: a written token places no frame
    nothing = Media(Grid(()), config.vision_config.spatial_merge_size)
    known = replace(state, is_token=None, token_counts=None)
    request = read_request(config.image_token_id, known, state.length, written, None, nothing, whole_prompt=False)
    _, call = plan_call(request, walk_request(request))
    return replace(state, step=call), call


def with_keys(plan: StepPlan, cache: Cache, config, call: VisionCall, rows: int) -> tuple[StepPlan, StepCache]:
    """The plan with its spans, and the keys and values of the step. Makes space for the new token in the buffers."""
    crossing = [cache.layers[index] for index in config.cross_attention_layers] if call.spans else []
    is_static = bool(crossing) and all(layer.in_buffers() for layer in crossing)
    if is_static:
        visible, has_visible = static_visible(crossing[0], call, rows, plan.slot.device)
        plan = plan._replace(spans=(StepSpan(rows, visible=visible),), has_visible=has_visible)
    elif crossing:
        plan = plan._replace(spans=growing_spans(call, rows))
    vision = [span.vision for span in call.spans]
    keys, values = [], []
    for layer in cache.layers:
        if not isinstance(layer, VisionCacheLayer):
            key, value = layer.with_token()
        elif not crossing:
            key = value = ()
        elif is_static:
            key, value = ((buffer,) for buffer in layer.buffers)
        else:
            key, value = (views(part, plan.spans, vision) for part in (layer.keys, layer.values))
        keys.append(key)
        values.append(value)
    return plan, StepCache(keys, values)


def growing_spans(call: VisionCall, rows: int) -> tuple[StepSpan, ...]:
    """The spans of a plan with one token per row, and between them those of rows that see nothing."""
    spans, done = [], 0
    for span in call.spans:
        if span.text.start > done:
            spans.append(StepSpan(span.text.start - done, sees=False))
        visible = None if span.visible is None else torch.atleast_2d(span.visible)[None, None]
        spans.append(StepSpan(span.text.stop - span.text.start, visible=visible))
        done = span.text.stop
    if done < rows:
        spans.append(StepSpan(rows - done, sees=False))
    return tuple(spans)


def views(packed: torch.Tensor, spans: tuple[StepSpan, ...], vision: list[slice]) -> tuple:
    """The keys or values of each span, from the packed ones [1, K, V, d]."""
    seen = iter(vision)
    slices = [next(seen) if span.sees else None for span in spans]
    return tuple(None if part is None else packed.narrow(2, part.start, part.stop - part.start) for part in slices)


def static_visible(layer: VisionCacheLayer, call: VisionCall, rows: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """What each row sees of a static cache, bool [1, 1, rows, C], and `has_visible` [rows, 1, 1]. A row that sees
    nothing may see all, as `has_visible` is 0 there. Kept in the layer for the later steps of the same plan."""
    if layer.step_mask is None or layer.step_mask[0] is not call or layer.step_mask[1].device != device:
        visible = torch.zeros(rows, layer.capacity, dtype=torch.bool)
        for span in call.spans:
            visible[span.text, span.vision] = True if span.visible is None else span.visible.cpu()
        sees = visible.any(1, keepdim=True)
        visible = (visible | ~sees).to(device)
        layer.step_mask = (call, visible[None, None], sees.float()[..., None].to(device))
    return layer.step_mask[1:]


def run_step(
    model: nn.Module,
    input_ids: Optional[torch.Tensor],
    inputs_embeds: Optional[torch.Tensor],
    positions: torch.Tensor,
    plan: StepPlan,
    cache: StepCache,
) -> torch.Tensor:
    """One step of the text model: the hidden states [B, 1, D]. Writes the new keys and values."""
    inputs = {"position_ids": positions, "inputs_embeds": inputs_embeds}
    return model(input_ids, **inputs, step=plan, cache=cache).last_hidden_state


@lru_cache
def compiled_step(settings: tuple[tuple[str, Any], ...], is_static: bool) -> Callable:
    """`run_step` after `torch.compile`.

    The steps of a growing cache have other lengths each time, so they are compiled for any length, and without CUDA
    graphs, which would be recorded for each.
    """
    kwargs = dict(settings)
    if not is_static:
        kwargs.setdefault("dynamic", True)
        if kwargs.get("mode") in CUDA_GRAPH_MODES:
            kwargs["mode"] = CUDA_GRAPH_MODES[kwargs["mode"]]
    return torch.compile(run_step, **kwargs)


def keep_token(config, cache: Cache, step: DecodeStep, input_ids: Optional[torch.Tensor]) -> None:
    """Makes the written token part of the cache."""
    state_layer = cache.layers[config.text_config.cross_attention_layers[0]]
    for layer, keys, values in zip(cache.layers, step.cache.keys, step.cache.values, strict=True):
        if not isinstance(layer, VisionCacheLayer):
            layer.take_token(keys, values)
    state_layer.state = replace(step.state, last_ids=None if input_ids is None else input_ids[:, -1].clone())
