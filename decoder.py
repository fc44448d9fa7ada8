"""The decoder: self-attention layers, gated cross-attention layers that read the vision tokens, and the model of both.

Axes: B rows, T text tokens of this call, S text tokens in all (cache included), D hidden size, H query heads, K
key/value heads, d head size, V vision tokens (the tokens of each frame and its separator, all samples one after the
other without padding), v those of them that are new in this call.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Optional, Union

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.utils import logging

from .attention import (
    SelfAttentionMask,
    attend,
    attend_token,
    attention_kind,
    compute_dtype,
    self_attention_mask,
    usable_implementation,
)
from .block_attention import Blocks, attend_in_blocks, attend_to_int8, blocks_can_run, unmasked_calls
from .cache_layers import CACHE, InPlaceLayer, Int8VisionLayer, JointCache, cache_of, cached_length
from .configuration_moss_vl import MossVLTextConfig
from .decode_step import StepCache, StepPlan
from .int8_states import Int8States
from .pretrained_model import MossVLLayer, MossVLPreTrainedModel
from .vision_sequence import Span, VisionCall
from .xrope import rotate, text_rotary, xrope_rotary


logger = logging.get_logger(__name__)

# Vision tokens whose keys and values are computed at once without gradients, on a CPU and on other devices.
CPU_VISION_PIECE, GPU_VISION_PIECE = 1 << 12, 1 << 14

# Keys or values of vision tokens, as the cache keeps them.
States = Union[torch.Tensor, Int8States]
# Cosines and signed sines of a rotary position embedding, as `rotate` takes them.
Rotary = tuple[torch.Tensor, torch.Tensor]


class RowCall(NamedTuple):
    """One row of a joint call (joint_decoding.py), whose attention reads a cache of its own.

    Attributes:
        self_mask, self_implementation, cache_position, vision_call: as in `DecoderCall`, for this row.
    """

    self_mask: SelfAttentionMask
    self_implementation: str
    cache_position: torch.Tensor
    vision_call: VisionCall


class DecoderCall(NamedTuple):
    """What all decoder layers of one call share. It is a tuple, because hooks of accelerate and FSDP move and cast
    tensors in tuples only. Hooks of compressed-tensors make plain tuples of named ones (`restored`).

    Attributes:
        rotary: rotary of the text, each [B, 1, T, d].
        self_mask, self_implementation: mask and attention implementation of the self-attention layers.
        cross_implementation: attention implementation of the cross-attention layers.
        cache_position: long [T], cache indices of the tokens of the call.
        vision_rotary: rotary of the vision tokens that are new in this call, each [v, d]; None if there are none.
        vision_call: which tokens see which vision tokens.
        output_attentions: whether the layers return their weights.
        blocks: the blocks of the vision call, if it has any.
        rows: the rows of a joint call, whose cache is a `JointCache`. The masks and cache positions of the call itself
            are not used then. None in other calls.
        step: the plan of a decode step, whose cache is a `StepCache`; the cache position and the vision call are None
            then. None in other calls.
    """

    rotary: Rotary
    self_mask: SelfAttentionMask
    self_implementation: str
    cross_implementation: str
    cache_position: torch.Tensor
    vision_rotary: Optional[Rotary]
    vision_call: Optional[VisionCall]
    output_attentions: bool
    blocks: Optional[Blocks] = None
    rows: Optional[tuple[RowCall, ...]] = None
    step: Optional[StepPlan] = None

    @classmethod
    def restored(cls, call: tuple) -> "DecoderCall":
        """The call as a module got it, with the names that a hook may have removed."""
        if isinstance(call, cls):
            return call
        call = cls(*call)
        rows = None if call.rows is None else tuple(map(RowCall._make, call.rows))
        step = None if call.step is None else StepPlan.restored(call.step)
        return call._replace(self_mask=SelfAttentionMask(*call.self_mask), rows=rows, step=step)


class MossVLRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        by_hand = x.device.type == "cpu" and x.dtype != torch.float64
        if not by_hand or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.weight * F.rms_norm(x, self.weight.shape, eps=self.eps)  # half precision in float32
        # The same by fewer operations: torch has no fused kernel for CPUs.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(cpu_constant(self.eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()
        return self.weight * (x * scale).to(x.dtype)

    def extra_repr(self):
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


@lru_cache
def cpu_constant(value: float) -> torch.Tensor:
    """A number as a tensor, float32."""
    return torch.tensor(value, dtype=torch.float32, device="cpu")


class MossVLTextMLP(nn.Module):
    def __init__(self, config: MossVLTextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MossVLTextAttention(nn.Module):
    """The projections, norms and head sizes of self- and cross-attention."""

    def __init__(self, config: MossVLTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        query_size, key_size = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)
        self.q_norm = MossVLRMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = MossVLRMSNorm(self.head_dim, config.rms_norm_eps)

    def queries(self, states: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """[B, T, D] -> [B, H, T, d], after norm and rotation."""
        return self._rotated(self.q_proj(states), self.q_norm, rotary)

    def keys_values(self, states: torch.Tensor, rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, S, D] -> keys, after norm and rotation, and values, each [B, K, S, d]."""
        key = self._rotated(self.k_proj(states), self.k_norm, rotary)
        return key, self.v_proj(states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _rotated(self, projected: torch.Tensor, norm: nn.Module, rotary: Rotary) -> torch.Tensor:
        """[B, T, heads * d] -> [B, heads, T, d], after norm and rotation, cast back to the dtype of the projection."""
        dtype, states = projected.dtype, norm(projected.unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        del projected
        return rotate(states, *rotary).to(dtype)

    def token_heads(
        self, projected: torch.Tensor, norm: Optional[nn.Module] = None, rotary: Optional[Rotary] = None
    ) -> torch.Tensor:
        """`_rotated` for one token per row: [B, 1, heads * d] -> [B, heads, 1, d]; without a norm for values."""
        states = projected.reshape(len(projected), -1, 1, self.head_dim)
        return states if norm is None else rotate(norm(states), *rotary).to(states.dtype)


def keep_for_gradients(layer, *states: Optional[torch.Tensor]) -> None:
    """Prevents later calls from writing into the keys and values of a cache layer if autograd keeps them, because the
    query, key or value (`states`) needs a gradient."""
    if isinstance(layer, InPlaceLayer) and any(part is not None and part.requires_grad for part in states):
        layer.shared = True


class MossVLSelfAttention(MossVLTextAttention):
    is_causal = True

    def forward(
        self, hidden_states: torch.Tensor, call: DecoderCall, cache: Union[Cache, JointCache, None] = None
    ) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """[B, T, D] -> [B, T, D], and the weights [B, H, T, S] if the implementation is eager, else None."""
        call = DecoderCall.restored(call)
        if call.step is not None:
            return self._step(hidden_states, call, cache), None
        query = self.queries(hidden_states, call.rotary)
        key, value = self.keys_values(hidden_states, call.rotary)
        if call.rows is None:
            out, weights = self._attend(query, key, value, call, cache)
        else:
            parts = zip(query.split(1), key.split(1), value.split(1), call.rows, cache.caches, strict=True)
            out, weights = torch.cat([self._attend(*part)[0] for part in parts]), None
        return self.o_proj(out.flatten(2)), weights

    def _step(self, hidden_states: torch.Tensor, call: DecoderCall, cache: StepCache) -> torch.Tensor:
        """One token per row of a decode step, [B, 1, D] -> [B, 1, D]. Writes its key and value into the cache."""
        query = self.token_heads(self.q_proj(hidden_states), self.q_norm, call.rotary)
        key, value, step = cache.keys[self.layer_idx], cache.values[self.layer_idx], call.step
        key.index_copy_(2, step.slot, self.token_heads(self.k_proj(hidden_states), self.k_norm, call.rotary))
        value.index_copy_(2, step.slot, self.token_heads(self.v_proj(hidden_states)))
        return self.o_proj(attend_token(self, query, key, value, call.self_mask.mask, call.self_implementation))

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: Union[DecoderCall, RowCall],
        cache: Optional[Cache],
    ) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Adds the new keys and values [B, K, T, d] to the cache, and attends to all: [B, T, H, d] and the weights."""
        if cache is not None:  # the static cache of transformers 4 needs the cache positions
            key, value = cache.update(key, value, self.layer_idx, {"cache_position": call.cache_position})
            keep_for_gradients(cache.layers[self.layer_idx], query, key, value)
        mask, causal, texts = call.self_mask
        return attend(
            self,
            query,
            key,
            value,
            mask,
            call.self_implementation,
            causal=causal,
            dropout=self.attention_dropout,
            texts=texts,
        )


class MossVLCrossAttention(MossVLTextAttention):
    is_causal = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        vision_states: Optional[torch.Tensor],
        call: DecoderCall,
        cache: Union[Cache, JointCache, None] = None,
    ) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Attends to the packed vision sequence, span by span.

        Args:
            hidden_states: [B, T, D].
            vision_states: [v, D], the vision tokens that are new in this call, or None.

        Returns:
            [B, T, D]; tokens that see no vision token enter the output projection as 0. With `output_attentions` also
            the weights [B, H, T, W], see `MossVLModelOutput`, else None.
        """
        call = DecoderCall.restored(call)
        if call.step is not None:
            return self._step(hidden_states, call, cache), None
        key = value = None
        layer = None if cache is None or call.rows is not None else cache.layers[self.layer_idx]
        if vision_states is not None:
            in_int8 = isinstance(layer, Int8VisionLayer)
            key, value = self.vision_keys_values(vision_states, call.vision_rotary, in_int8)
        query = self.queries(hidden_states, call.rotary).transpose(1, 2).flatten(0, 1)  # [B * T, H, d]
        if call.rows is not None:
            out = self._attend_rows(query, call, cache)
            return self.o_proj(out.reshape(*hidden_states.shape[:2], -1)), None
        if layer is not None:
            layer.store(key, value, call.vision_call)
            key, value = layer.read(query.dtype)
            keep_for_gradients(layer, query, *layer.tensors())
        out, weights = self._attend_spans(query, key, value, call)  # [B * T, H, d]
        out = self.o_proj(out.reshape(*hidden_states.shape[:2], -1))
        return out, self._all_weights(weights, call.vision_call, hidden_states) if call.output_attentions else None

    def _step(self, hidden_states: torch.Tensor, call: DecoderCall, cache: StepCache) -> torch.Tensor:
        """One token per row of a decode step, [B, 1, D] -> [B, 1, D]."""
        query = self.token_heads(self.q_proj(hidden_states), self.q_norm, call.rotary)  # [B, H, 1, d]
        outs, spans, implementation = [], call.step.spans, call.cross_implementation
        queries = query.split([span.rows for span in spans]) if len(spans) > 1 else (query,)
        parts = zip(queries, spans, cache.keys[self.layer_idx], cache.values[self.layer_idx], strict=True)
        for part, (rows, sees, visible), key, value in parts:
            if not sees:
                outs.append(part.new_zeros(rows, 1, self.num_heads * self.head_dim))
                continue
            name = implementation if visible is None else masked_implementation(implementation)
            outs.append(attend_token(self, part, key, value, visible, name))
        return self.o_proj(torch.cat(outs) if len(outs) > 1 else outs[0])

    def _attend_spans(self, query: torch.Tensor, key: States, value: States, call: DecoderCall):
        """query [B * T, H, d], packed key and value [1, K, V, d] -> [B * T, H, d], 0 at tokens in no span; and the
        weights of each span, if they are wanted."""
        plan, blocks = call.vision_call, call.blocks
        if isinstance(key, Int8States):
            if self._takes_blocks(call):
                masked = [] if blocks else [span for span in plan.spans if span.visible is not None]
                blocks = blocks or Blocks(unmasked_calls(plan.spans), self.num_key_value_groups)
                return attend_to_int8(query, key, value, blocks, masked, self.scaling), []
            key, value = (part.read(slice(None), query.dtype) for part in (key, value))
        elif blocks and self._takes_blocks(call) and blocks_can_run(query, key):
            return attend_in_blocks(query, key, value, blocks, self.scaling), []
        outs, weights, done = [], [], 0  # done: text tokens whose output is in outs
        for span in plan.spans:
            if span.text.start > done:
                outs.append(query.new_zeros(span.text.start - done, *query.shape[1:]))
            out, weight = self._attend_span(query[span.text], key, value, span, call)
            outs.append(out)
            weights.append(weight if call.output_attentions else None)
            done = span.text.stop
        if done < query.shape[0]:
            outs.append(query.new_zeros(query.shape[0] - done, *query.shape[1:]))
        return (torch.cat(outs) if len(outs) > 1 else outs[0]), weights

    def _attend_span(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, span: Span, call: DecoderCall
    ) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Attends to the vision tokens of one span: query [tokens, H, d] -> [tokens, H, d] and the weights."""
        mask = None if span.visible is None else torch.atleast_2d(span.visible.to(query.device))[None, None]
        implementation = call.cross_implementation
        out, weights = attend(
            self,
            query.transpose(0, 1)[None],  # [1, H, tokens, d]
            key[:, :, span.vision],
            value[:, :, span.vision],
            mask,
            implementation if mask is None else masked_implementation(implementation),
            dropout=self.attention_dropout,
        )
        return out[0], weights

    def _takes_blocks(self, call: DecoderCall) -> bool:
        """Whether blocks may be computed in place of spans. They have no dropout and no weights, and are computed by
        functions of torch, not by those of the caller."""
        has_dropout = self.training and self.attention_dropout > 0
        return attention_kind(call.cross_implementation) in ("sdpa", "flash") and not has_dropout

    def _attend_rows(self, query: torch.Tensor, call: DecoderCall, joint: JointCache) -> torch.Tensor:
        """query [B, H, d], one token for each row of a joint call -> [B, H, d], 0 at rows that see no vision token.
        Rows that see the same tokens of the same tensors, as copies of one conversation do, are one attention call, so
        keys are read once."""
        groups: dict[tuple, list[int]] = {}
        stored, queries = {}, query.split(1)
        outs = list(torch.zeros_like(query).split(1))
        for index, (row, cache) in enumerate(zip(call.rows, joint.caches, strict=True)):
            for span in row.vision_call.spans:  # one, or none
                layer = cache.layers[self.layer_idx]
                layer.store(None, None, row.vision_call)
                stored[index] = layer.read(query.dtype)
                keep_for_gradients(layer, query, *layer.tensors())
                alone = None if span.visible is None else index
                storage = tuple((part.data_ptr(), part.stride()) for part in layer.tensors())
                groups.setdefault((storage, span.vision.start, span.vision.stop, alone), []).append(index)
        for rows in groups.values():
            (key, value), [span] = stored[rows[0]], call.rows[rows[0]].vision_call.spans
            span = span._replace(text=slice(0, len(rows)))
            of_rows = call._replace(vision_call=VisionCall([span], None, 0), blocks=None)
            attended, _ = self._attend_spans(torch.cat([queries[row] for row in rows]), key, value, of_rows)
            for row, out in zip(rows, attended.split(1), strict=True):
                outs[row] = out
        return torch.cat(outs)

    def vision_keys_values(self, states: torch.Tensor, rotary: Rotary, in_int8: bool = False) -> tuple[States, States]:
        """[v, D] -> keys and values, each [1, K, v, d]. Without gradients they are computed in pieces to save memory,
        and are contiguous per head, which later tokens read faster.

        Args:
            in_int8: whether each piece is converted to 8 bits, so that the whole is never there in another dtype.
        """
        if torch.is_grad_enabled() and not in_int8:
            return self.keys_values(states[None], rotary)
        shape, dtype = (1, self.num_key_value_heads, len(states), self.head_dim), compute_dtype(states)
        if in_int8:
            key, value = (Int8States.empty(shape, states.device) for _ in range(2))
        else:
            key, value = (states.new_empty(shape, dtype=dtype) for _ in range(2))
        cos, sin = rotary
        size = CPU_VISION_PIECE if states.device.type == "cpu" else GPU_VISION_PIECE
        for first in range(0, len(states), size):
            piece = slice(first, first + size)
            for whole, part in zip(
                (key, value), self.keys_values(states[None, piece], (cos[piece], sin[piece])), strict=True
            ):
                if in_int8:
                    whole.write(piece, part)
                else:
                    whole[:, :, piece] = part
        return key, value

    def _all_weights(self, weights: list[torch.Tensor], call: VisionCall, like: torch.Tensor) -> torch.Tensor:
        """The weights of all spans, [B, H, T, longest span], 0 at tokens in no span."""
        widest = max((span.vision.stop - span.vision.start for span in call.spans), default=0)
        out = like.new_zeros(like.shape[0] * like.shape[1], self.num_heads, widest)
        for span, weight in zip(call.spans, weights, strict=True):
            out[span.text, :, : weight.shape[-1]] = weight[0].transpose(0, 1)
        return out.unflatten(0, like.shape[:2]).transpose(1, 2)


def masked_implementation(implementation: str) -> str:
    """The implementation for a span with a mask, which flash-attention does not take."""
    return "sdpa" if attention_kind(implementation) == "flash" else implementation


class MossVLSelfAttentionLayer(MossVLLayer):
    def __init__(self, config: MossVLTextConfig, layer_idx: int):
        super().__init__()
        self.self_attn = MossVLSelfAttention(config, layer_idx)
        self.mlp = MossVLTextMLP(config)
        self.input_layernorm = MossVLRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = MossVLRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, call: DecoderCall, layer_past: Optional[Cache] = None
    ) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """[B, T, D] -> [B, T, D], and the weights.

        Args:
            layer_past: the cache. transformers 4 and 5 know this name: gradient checkpointing drops the argument.
        """
        attended, weights = self.self_attn(self.input_layernorm(hidden_states), call, layer_past)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), weights


class MossVLCrossAttentionLayer(MossVLLayer):
    """Gated cross-attention to the vision sequence. A token that sees no vision token passes unchanged."""

    def __init__(self, config: MossVLTextConfig, layer_idx: int):
        super().__init__()
        self.cross_attn = MossVLCrossAttention(config, layer_idx)
        self.mlp = MossVLTextMLP(config)
        self.input_layernorm = MossVLRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = MossVLRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn_attn_gate = nn.Parameter(torch.zeros(1))
        self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        hidden_states: torch.Tensor,
        vision_states: Optional[torch.Tensor],
        call: DecoderCall,
        layer_past: Optional[Cache] = None,
    ) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """[B, T, D] -> [B, T, D], and the weights.

        Args:
            vision_states: [v, D], the vision tokens that are new in this call, or None. They are not part of `call`,
                because reentrant checkpointing passes gradients only to tensors that are arguments.
            layer_past: the cache; see `MossVLSelfAttentionLayer.forward`.
        """
        call = DecoderCall.restored(call)
        attended, weights = self.cross_attn(self.input_layernorm(hidden_states), vision_states, call, layer_past)
        # r of docs/model.md: 0 at tokens that see no vision token, else 1
        has_visible = (call.vision_call if call.step is None else call.step).has_visible
        attention_gate, mlp_gate = self.cross_attn_attn_gate.tanh(), self.cross_attn_mlp_gate.tanh()
        if has_visible is not None:
            has_visible = has_visible.to(hidden_states)
            attention_gate, mlp_gate = has_visible * attention_gate, has_visible * mlp_gate
        hidden_states = hidden_states + attention_gate * attended
        return hidden_states + mlp_gate * self.mlp(self.post_attention_layernorm(hidden_states)), weights


@dataclass
class MossVLModelOutput(BaseModelOutputWithPastAndCrossAttentions):
    """Output of the models without a head.

    Attributes:
        last_hidden_state: [B, T, D].
        cache: the cache, if one is used; before transformers 5.24 its name is past_key_values.
        hidden_states: input of every layer, then the output of the final norm, [B, T, D] each.
        attentions: weights of the self-attention layers, in order, [B, H, T, S] each.
        cross_attentions: weights of the cross-attention layers, in order, [B, H, T, W] each; empty if no token sees a
            frame. The W columns are vision tokens, from the first one that the text token sees.
        rope_deltas: [B]; the token at cache index i has position i + rope_delta.
        text_starts: bool [B, T], for packed rows True at the first token of each text; None if every row is one text.
    """

    rope_deltas: Optional[torch.LongTensor] = None
    text_starts: Optional[torch.BoolTensor] = None


class MossVLTextModel(MossVLPreTrainedModel):
    config_class = MossVLTextConfig
    _no_split_modules = ["MossVLSelfAttentionLayer", "MossVLCrossAttentionLayer"]

    def __init__(self, config: MossVLTextConfig, cross_attention_implementation: Optional[str] = None):
        super().__init__(config, cross_attention_implementation)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        crossing = set(config.cross_attention_layers)
        self.layers = nn.ModuleList(
            (MossVLCrossAttentionLayer if index in crossing else MossVLSelfAttentionLayer)(config, index)
            for index in range(config.num_hidden_layers)
        )
        self.norm = MossVLRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Optional[torch.LongTensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        cache: Union[Cache, JointCache, StepCache, None] = None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        vision_states: Optional[torch.FloatTensor] = None,
        vision_position_ids: Optional[torch.LongTensor] = None,
        vision_call: Optional[VisionCall] = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        past_key_values: Optional[Cache] = None,
        text_index: Optional[torch.LongTensor] = None,
        vision_calls_of_rows: Optional[list[VisionCall]] = None,
        step: Optional[StepPlan] = None,
    ) -> MossVLModelOutput:
        """The decoder layers and the final norm.

        Args:
            input_ids: [B, T], or inputs_embeds: [B, T, D].
            attention_mask: [B, S] with 0 at padding, or a ready 4D mask, see `self_attention_mask`.
            position_ids: [B, T], or [3, B, T] for (t, h, w); default: cache indices.
            vision_states: [v, D], the vision tokens that are new in this call.
            vision_position_ids: [3, v], their positions.
            vision_call: which tokens see which vision tokens. The cross-attention layers are skipped if no token sees
                any and none is new.
            text_index: [B, T], for packed rows the index of each token's text, rising along the row. A token sees only
                tokens of the same text. Not with a filled cache; without effect beside a ready 4D mask.
            vision_calls_of_rows: with a `JointCache`, which vision tokens of its own cache each row sees.
            step: with a `StepCache`, the plan of a decode step; besides it only the text and position_ids [B, 1].

        Raises:
            ValueError: for masks that do not fit, and attention implementations that are not allowed.
        """
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if step is not None:
            step = StepPlan.restored(step)
            return MossVLModelOutput(last_hidden_state=self._step(hidden_states, position_ids, step, cache))
        cache = cache if isinstance(cache, JointCache) else cache_of(cache, past_key_values)
        if vision_states is not None:  # the encoder may have another dtype
            vision_states = vision_states.to(hidden_states.device, compute_dtype(hidden_states))
        call = self._decoder_call(
            hidden_states,
            attention_mask,
            position_ids,
            cache,
            vision_position_ids if vision_states is not None else None,
            vision_call,
            text_index,
            output_attentions,
            vision_calls_of_rows,
        )
        reads_vision = vision_call is not None and (vision_call.spans or vision_call.writes)
        all_states, attentions, cross_attentions = [], [], []
        for layer in self.layers:
            if output_hidden_states:
                all_states.append(hidden_states)
            if isinstance(layer, MossVLSelfAttentionLayer):
                hidden_states, weights = layer(hidden_states, call, layer_past=cache)
                attentions.append(weights if output_attentions else None)
            elif reads_vision:
                hidden_states, weights = layer(hidden_states, vision_states, call, layer_past=cache)
                cross_attentions.append(weights)
        hidden_states = self.norm(hidden_states)
        return MossVLModelOutput(
            last_hidden_state=hidden_states,
            **{CACHE: cache},
            hidden_states=(*all_states, hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            cross_attentions=tuple(cross_attentions) if output_attentions else None,
        )

    def _step(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor, step: StepPlan, cache: StepCache
    ) -> torch.Tensor:
        """A decode step, [B, 1, D] at positions [B, 1] -> [B, 1, D]. It reads no tensor on the host."""
        config = self.config
        cos, sin = text_rotary(
            position_ids, config.head_dim, config.rope_parameters["rope_theta"], hidden_states.dtype
        )
        name = config._attn_implementation
        implementation = self._implementation(name, hidden_states, need_weights=False)
        cross_implementation = implementation
        if config.cross_attention_implementation is not None:
            cross_implementation = self._implementation(config.cross_attention_implementation, hidden_states, False)
        mask = step.text_mask()
        call = DecoderCall(
            rotary=(cos[:, None], sin[:, None]),
            self_mask=SelfAttentionMask(mask, causal=False),
            self_implementation=implementation if mask is None else masked_implementation(implementation),
            cross_implementation=cross_implementation,
            cache_position=None,
            vision_rotary=None,
            vision_call=None,
            output_attentions=False,
            step=step,
        )
        for layer in self.layers:
            if isinstance(layer, MossVLSelfAttentionLayer):
                hidden_states, _ = layer(hidden_states, call, layer_past=cache)
            elif step.spans:
                hidden_states, _ = layer(hidden_states, None, call, layer_past=cache)
        return self.norm(hidden_states)

    def _decoder_call(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Optional[torch.Tensor],
        position_ids: Optional[torch.Tensor],
        cache: Optional[Cache],
        vision_position_ids: Optional[torch.Tensor],
        vision_call: Optional[VisionCall],
        text_index: Optional[torch.Tensor],
        output_attentions: bool,
        vision_calls_of_rows: Optional[list[VisionCall]],
    ) -> DecoderCall:
        """What the layers share, from the arguments of `forward`; hidden_states [B, T, D]."""
        config, device, joint = self.config, hidden_states.device, vision_calls_of_rows is not None
        past_length = 0 if joint else cached_length(cache)
        cache_position = torch.arange(past_length, past_length + hidden_states.shape[1], device=device)
        position_ids = cache_position[None] if position_ids is None else position_ids
        if position_ids.ndim == 2:
            position_ids = position_ids.expand(3, *position_ids.shape)
        rope = config.rope_parameters
        rope_args = (config.head_dim, rope["rope_theta"], rope["mrope_section"], hidden_states.dtype)
        cos, sin = xrope_rotary(position_ids.to(device), *rope_args)  # [B, T, d]
        vision_rotary = None
        if vision_position_ids is not None:
            vision_rotary = xrope_rotary(vision_position_ids.to(device), *rope_args)  # [v, d]
        implementation = self._implementation(config._attn_implementation, hidden_states, output_attentions)
        cross_implementation = implementation
        if config.cross_attention_implementation is not None:
            name = config.cross_attention_implementation
            cross_implementation = self._implementation(name, hidden_states, output_attentions)
        blocks = rows = None
        if vision_call is not None and vision_call.blocks is not None:
            blocks = Blocks(vision_call.blocks, config.num_attention_heads // config.num_key_value_heads)
        if joint:
            rows = self._row_calls(hidden_states, cache, implementation, vision_calls_of_rows)
        self_mask, self_implementation = self_attention_mask(
            config, attention_mask, hidden_states, None if joint else cache, implementation, text_index
        )
        return DecoderCall(
            rotary=(cos[:, None], sin[:, None]),
            self_mask=self_mask,
            self_implementation=self_implementation,
            cross_implementation=cross_implementation,
            cache_position=cache_position,
            vision_rotary=vision_rotary,
            vision_call=vision_call,
            output_attentions=output_attentions,
            blocks=blocks,
            rows=rows,
        )

    def _row_calls(
        self, hidden_states: torch.Tensor, joint: JointCache, implementation: str, vision_calls: list[VisionCall]
    ) -> tuple[RowCall, ...]:
        """The rows of a joint call, hidden_states [B, 1, D]."""
        lengths = torch.tensor([cached_length(cache) for cache in joint.caches], device=hidden_states.device)
        parts = zip(hidden_states.split(1), joint.caches, lengths.split(1), vision_calls, strict=True)
        return tuple(
            RowCall(*self_attention_mask(self.config, None, row, cache, implementation), length, vision_call)
            for row, cache, length, vision_call in parts
        )

    def _implementation(self, name: Optional[str], states: torch.Tensor, need_weights: bool) -> str:
        """`usable_implementation`, but sdpa in training in place of a flash-attention version without dropout, if
        dropout is configured."""
        name = usable_implementation(name, states, need_weights)
        if (
            self.training
            and self.config.attention_dropout
            and name != "flash_attention_2"
            and attention_kind(name) == "flash"
        ):
            logger.warning_once(
                f"{name} has no dropout, but `attention_dropout` is {self.config.attention_dropout}; sdpa is used in "
                "training."
            )
            return "sdpa"
        return name
