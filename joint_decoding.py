"""Joint decoding: one call that adds one token to each of several conversations, each with its own cache.

Embeddings, projections, MLPs, norms and the head run on all rows at once. Attention runs per row, on the cache of that
row alone, so nothing is padded, and each row gets what it would get in a call of its own. Rows may have any text
length and any vision tokens, and may differ from call to call.

Axes: R rows, one per cache; D hidden size.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, Optional

import torch
from transformers.cache_utils import Cache

from .cache_layers import JointCache, cached_length, static_length, vision_state
from .call_positions import walk_request
from .media import Grid, Media
from .vision_plan import plan_call
from .vision_request import read_request
from .vision_sequence import VisionCall, VisionState


class JointStep(NamedTuple):
    """One token for each row, planned.

    Attributes:
        states: the vision state of each cache after the call.
        positions: long [R, 1].
        rope_deltas: long [R].
        rows: what the cross-attention layers need to know of each row.
        call: the same for all rows together: their spans, and which rows see vision tokens.
    """

    states: list[VisionState]
    positions: torch.Tensor
    rope_deltas: torch.Tensor
    rows: list[VisionCall]
    call: VisionCall


@dataclass(frozen=True)
class _Row:
    """A cache of a joint call, checked."""

    cache: Cache
    state: VisionState
    length: int  # text tokens in the cache


def plan_step(config, joint: JointCache, text: torch.Tensor) -> JointStep:
    """Checks a joint call and plans it. Changes no cache.

    Args:
        config: the config of the whole model.
        text: `input_ids` [R, 1]; or `inputs_embeds` [R, 1, D].

    Raises:
        ValueError: for tokens that are not one per cache, and for the first cache that cannot take a token.
    """
    if tuple(text.shape[:2]) != (len(joint.caches), 1):
        raise ValueError(
            f"The tokens have shape {list(text.shape)}, and {len(joint.caches)} caches were given; expected "
            f"[{len(joint.caches)}, 1]: one token per cache."
        )
    rows = []
    for index, cache in enumerate(joint.caches):
        try:
            rows.append(_read_row(config, cache))
        except ValueError as error:
            raise ValueError(f"Cache {index} of a joint call: {error}") from error
    planned = [_plan_row(config, row, text.device) for row in rows]
    states, calls = [state for state, _ in planned], [call for _, call in planned]
    rope_deltas = torch.cat([state.rope_delta.to(text.device) for state in states])
    lengths = torch.tensor([row.length for row in rows], device=text.device)
    sees_vision = [float(bool(call.spans)) for call in calls]
    has_visible = None if all(sees_vision) else torch.tensor(sees_vision, device=text.device)[:, None, None]
    spans = [span for call in calls for span in call.spans]
    return JointStep(states, (rope_deltas + lengths)[:, None], rope_deltas, calls, VisionCall(spans, has_visible, 0))


def _read_row(config, cache: Cache) -> _Row:
    """Raises ValueError for a cache that is empty, full, of another model, or not of one unpadded row."""
    if not hasattr(cache, "layers"):
        raise ValueError(f"got a {type(cache).__name__}; expected a cache that this model filled.")
    if cached_length(cache) and len(cache.layers) != config.text_config.num_hidden_layers:
        raise ValueError(
            f"it has {len(cache.layers)} layers, and the model {config.text_config.num_hidden_layers}; expected a "
            "cache that this model filled."
        )
    state, length, slots = vision_state(cache, config.text_config), cached_length(cache), static_length(cache)
    if state is None:
        raise ValueError("it is empty; expected one that holds a prompt: prefill each conversation alone first.")
    if len(state.row_sample) != 1:
        raise ValueError(
            f"it holds {len(state.row_sample)} rows; expected one row per cache. Beams of a conversation are rows of "
            "one cache: pass them to forward alone."
        )
    if state.token_counts is not None and int(state.token_counts) < length:
        raise ValueError("it holds padding; expected a prompt that was prefilled alone, without padding.")
    if slots is not None and length >= slots:
        raise ValueError(f"it has {slots} slots, all filled; expected a free one, or a growing cache.")
    return _Row(cache, replace(state, token_counts=None), length)  # so that the host waits for the device once


def _plan_row(config, row: _Row, device: torch.device) -> tuple[VisionState, VisionCall]:
    """The state of a row after one written token, and what that token sees. A written token places no frame, also if
    it is an `image_pad`."""
    if row.state.step is not None:
        return replace(row.state, length=row.length + 1), row.state.step
    written = torch.empty(1, 1, 0, device=device)  # embeddings of any size: a token without an id places no frame
    nothing = Media(Grid(()), config.vision_config.spatial_merge_size)
    request = read_request(config.image_token_id, row.state, row.length, written, None, nothing, whole_prompt=False)
    return plan_call(request, walk_request(request))


def finish_step(joint: JointCache, config, step: JointStep, input_ids: Optional[torch.Tensor]) -> None:
    """Stores in each cache the vision state after a joint call."""
    for index, (cache, state) in enumerate(zip(joint.caches, step.states, strict=True)):
        last_ids = None if input_ids is None else input_ids[index].clone()
        cache.layers[config.text_config.cross_attention_layers[0]].state = replace(state, last_ids=last_ids)


@contextmanager
def undone_on_error(joint: JointCache, config):
    """If the call fails, removes the tokens that it has already added to some layers, so that every cache is what it
    was. The layers of static caches cannot be shortened, and later calls refuse these caches."""
    crossing = set(config.text_config.cross_attention_layers)
    lengths = [cached_length(cache) for cache in joint.caches]
    try:
        yield
    except BaseException:
        for cache, length in zip(joint.caches, lengths, strict=True):
            if static_length(cache) is not None:
                continue
            for index, layer in enumerate(cache.layers):
                added = 0 if index in crossing else layer.get_seq_length() - length
                if added > 0:
                    layer.crop(-added)
        raise


def read_joint(cache, past_key_values, others: dict, input_ids, inputs_embeds) -> Optional[JointCache]:
    """The joint cache of a call of forward, or None.

    Args:
        others: the other arguments of the call: name -> value.

    Raises:
        ValueError: for arguments that a joint call does not take.
    """
    given = [one for one in (cache, past_key_values) if isinstance(one, JointCache)]
    if not given:
        return None
    used = [name for name, value in others.items() if value is not None and value is not False]
    if cache is not None and past_key_values is not None:
        used.append("past_key_values")
    if used:
        raise ValueError(
            f"`{used[0]}` came with a JointCache, which takes one token per cache and nothing else; expected a call "
            "for each cache alone, to prefill prompts and frames, or to get attention weights."
        )
    if input_ids is not None and inputs_embeds is not None:
        raise ValueError("A JointCache takes `input_ids` or `inputs_embeds`; got both.")
    if input_ids is None and inputs_embeds is None:
        raise ValueError("Neither `input_ids` nor `inputs_embeds` was given; expected one of them.")
    return given[0]


def read_tokens(tokens, count: int, device: torch.device) -> torch.Tensor:
    """One token id per cache as long [R, 1].

    Args:
        tokens: a list of ids, or a tensor [R] or [R, 1].

    Raises:
        ValueError: for another number or type of tokens.
    """
    ids = tokens if isinstance(tokens, torch.Tensor) else torch.tensor(list(tokens))
    if ids.numel() != count or ids.ndim not in (1, 2) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"The tokens have shape {list(ids.shape)} and dtype {ids.dtype}; expected one id for each of the {count} "
            "caches."
        )
    return ids.reshape(count, 1).to(device, torch.long)
