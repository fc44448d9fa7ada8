"""MOSS-VL: a ViT encoder, and a causal decoder whose gated cross-attention layers read the vision tokens.

Axes: B text rows, T text tokens of this call, S text tokens in all (cache included), D hidden size, H query heads, K key/value
heads, d head size, F frames, P patches, m merge size, V vision tokens (the tokens of each frame and its separator, all samples one
after the other without padding), v those of them that are new in this call.
"""

import inspect
from dataclasses import dataclass, replace
from typing import NamedTuple, Optional, Union

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPooling,
    CausalLMOutputWithCrossAttentions,
)
from transformers.utils import logging

from .attention import (
    SelfAttentionMask,
    attend,
    attention_kind,
    check_implementations,
    check_ready_mask,
    compute_dtype,
    self_attention_mask,
    usable_implementation,
)
from .cache_layers import (
    CACHE,
    cache_of,
    cached_length,
    install_layers,
    static_length,
    vision_state,
)
from .call_positions import read_positions, walk_request
from .checks import nearest_name  # noqa: F401 - transformers 4.57 copies only the files that this file imports itself
from .configuration_moss_vl import MossVLConfig, MossVLTextConfig
from .conversation import PLACEHOLDERS  # noqa: F401
from .generation_hooks import MossVLGenerateHooks
from .generation_utils import MossVLGenerationMixin
from .media import Grid, Media, choose_grid, read_media
from .options import OPTIONS  # noqa: F401
from .patches import normalise  # noqa: F401
from .pretrained_model import MossVLLayer, MossVLPreTrainedModel
from .vision_encoder import MossVLVisionModel, frame_groups, with_separators
from .vision_plan import plan_call
from .vision_request import VisionRequest, count_vision_tokens, read_request
from .vision_sequence import VisionCall
from .xrope import rotate, xrope_rotary


logger = logging.get_logger(__name__)


VISION_ROWS = 4096  # vision tokens whose keys and values are computed at once when no gradients flow
IGNORED = -100  # the label that transformers' losses ignore

Rotary = tuple[
    torch.Tensor, torch.Tensor
]  # cosines and signed sines of a rotary position embedding, as `rotate` takes them


class DecoderCall(NamedTuple):
    """What all decoder layers of one call share. A tuple, as hooks of accelerate and FSDP move and cast tensors in tuples only.

    Attributes:
        rotary: of the text, each [B, 1, T, d].
        self_mask, self_implementation: of the self-attention layers.
        cross_implementation: of the cross-attention layers.
        cache_position: long [T], cache indices of the tokens of the call.
        vision_rotary: of the vision tokens that are new in this call, each [v, d]; None without any.
        vision_call: which tokens see which vision tokens.
        output_attentions: whether the layers return their weights.
    """

    rotary: Rotary
    self_mask: SelfAttentionMask
    self_implementation: str
    cross_implementation: str
    cache_position: torch.Tensor
    vision_rotary: Optional[Rotary]
    vision_call: Optional[VisionCall]
    output_attentions: bool


class MossVLRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * F.rms_norm(x, self.weight.shape, eps=self.eps)  # computed in float32 whatever the dtype

    def extra_repr(self):
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


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
        """[B, T, heads * d] -> [B, heads, T, d] in the dtype of the projection, which float32 norms and autocast would change."""
        dtype, states = projected.dtype, norm(projected.unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        del projected
        return rotate(states, *rotary).to(dtype)


class MossVLSelfAttention(MossVLTextAttention):
    is_causal = True

    def forward(
        self, hidden_states: torch.Tensor, call: DecoderCall, cache: Optional[Cache] = None
    ) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """[B, T, D] -> [B, T, D], and the weights [B, H, T, S] if the implementation is eager, else None."""
        query = self.queries(hidden_states, call.rotary)
        key, value = self.keys_values(hidden_states, call.rotary)
        if cache is not None:  # the static cache of transformers 4 needs the cache positions
            key, value = cache.update(key, value, self.layer_idx, {"cache_position": call.cache_position})
        mask, causal, texts = call.self_mask
        out, weights = attend(
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
        return self.o_proj(out.flatten(2)), weights


class MossVLCrossAttention(MossVLTextAttention):
    is_causal = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        vision_states: Optional[torch.Tensor],
        call: DecoderCall,
        cache: Optional[Cache] = None,
    ) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Attends the packed vision sequence span by span.

        Args:
            hidden_states: [B, T, D].
            vision_states: [v, D], the vision tokens that are new in this call, or None.

        Returns:
            [B, T, D], 0 at tokens that see no vision token before the output projection; and with `output_attentions` the weights
            [B, H, T, V of the longest sample], else None.
        """
        key = value = None
        if vision_states is not None:
            key, value = self.vision_keys_values(vision_states, call.vision_rotary)
        query = self.queries(hidden_states, call.rotary).transpose(1, 2).flatten(0, 1)  # [B * T, H, d]
        if cache is not None:
            layer = cache.layers[self.layer_idx]
            layer.store(key, value, call.vision_call)
            key, value = layer.in_dtype(query.dtype)
        out, weights = self._attend_spans(query, key, value, call)  # [B * T, H, d]
        out = self.o_proj(out.reshape(*hidden_states.shape[:2], -1))
        return out, self._all_weights(weights, call.vision_call, hidden_states) if call.output_attentions else None

    def _attend_spans(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: DecoderCall):
        """query [B * T, H, d], packed key and value [1, K, V, d] -> [B * T, H, d], 0 at rows in no span; and the weights of each span."""
        implementation = call.cross_implementation
        with_mask = "sdpa" if attention_kind(implementation) == "flash" else implementation
        outs, weights, row = [], [], 0
        for span in call.vision_call.spans:
            if span.rows.start > row:
                outs.append(query.new_zeros(span.rows.start - row, *query.shape[1:]))
            mask = None if span.visible is None else torch.atleast_2d(span.visible.to(query.device))[None, None]
            out, weight = attend(
                self,
                query[span.rows].transpose(0, 1)[None],  # [1, H, rows, d]
                key[:, :, span.tokens],
                value[:, :, span.tokens],
                mask,
                implementation if mask is None else with_mask,
                dropout=self.attention_dropout,
            )
            outs.append(out[0])
            weights.append(weight if call.output_attentions else None)
            row = span.rows.stop
        if row < query.shape[0]:
            outs.append(query.new_zeros(query.shape[0] - row, *query.shape[1:]))
        return (torch.cat(outs) if len(outs) > 1 else outs[0]), weights

    def vision_keys_values(self, states: torch.Tensor, rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor]:
        """[v, D] -> keys and values, each [1, K, v, d]. Without gradients they are computed in pieces, to save memory, and contiguous per
        head, as every later token reads them."""
        if torch.is_grad_enabled():
            return self.keys_values(states[None], rotary)
        shape, dtype = (1, self.num_key_value_heads, len(states), self.head_dim), compute_dtype(states)
        key, value = (states.new_empty(shape, dtype=dtype) for _ in range(2))
        for first in range(0, len(states), VISION_ROWS):
            part = slice(first, first + VISION_ROWS)
            key[:, :, part], value[:, :, part] = self.keys_values(
                states[None, part], tuple(part_of[part] for part_of in rotary)
            )
        return key, value

    def _all_weights(self, weights: list[torch.Tensor], call: VisionCall, like: torch.Tensor) -> torch.Tensor:
        """The weights of all spans, [B, H, T, longest span], 0 where a row sees nothing."""
        widest = max((span.tokens.stop - span.tokens.start for span in call.spans), default=0)
        out = like.new_zeros(like.shape[0] * like.shape[1], self.num_heads, widest)
        for span, weight in zip(call.spans, weights, strict=True):
            out[span.rows, :, : weight.shape[-1]] = weight[0].transpose(0, 1)
        return out.unflatten(0, like.shape[:2]).transpose(1, 2)


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
            layer_past: the cache. Gradient checkpointing of every transformers drops it from a layer by this name.
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
            vision_states: [v, D], the vision tokens that are new in this call, or None. An argument and not part of `call`, as reentrant
                checkpointing passes gradients to tensors among the arguments only.
            layer_past: the cache; see `MossVLSelfAttentionLayer.forward`.
        """
        attended, weights = self.cross_attn(self.input_layernorm(hidden_states), vision_states, call, layer_past)
        visible = 1.0 if call.vision_call.has_visible is None else call.vision_call.has_visible.to(hidden_states)
        hidden_states = hidden_states + visible * self.cross_attn_attn_gate.tanh() * attended
        fed = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + visible * self.cross_attn_mlp_gate.tanh() * fed, weights


@dataclass
class MossVLModelOutput(BaseModelOutputWithPastAndCrossAttentions):
    """Output of the models without a head.

    Attributes:
        last_hidden_state: [B, T, D].
        cache, before transformers 5.24 past_key_values: the cache, if one is used.
        hidden_states: input of every layer and the final norm's output, [B, T, D] each.
        attentions: weights of the self-attention layers, in order, [B, H, T, S] each.
        cross_attentions: weights of the cross-attention layers, in order, [B, H, T, V of the longest sample] each; empty if no
            token sees any frame.
        rope_deltas: [B]; the token at cache index i has position i + rope_delta.
        text_starts: bool [B, T], for packed rows True at the first token of each text; None if every row is one text.
    """

    rope_deltas: Optional[torch.LongTensor] = None
    text_starts: Optional[torch.BoolTensor] = None


@dataclass
class MossVLCausalLMOutput(CausalLMOutputWithCrossAttentions):
    """`MossVLModelOutput` with `logits` [B, kept tokens, vocab] in place of the last hidden state, and `loss` if labels are given."""

    rope_deltas: Optional[torch.LongTensor] = None


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
        cache: Optional[Cache] = None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        vision_states: Optional[torch.FloatTensor] = None,
        vision_position_ids: Optional[torch.LongTensor] = None,
        vision_call: Optional[VisionCall] = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        past_key_values: Optional[Cache] = None,
        text_index: Optional[torch.LongTensor] = None,
    ) -> MossVLModelOutput:
        """The decoder layers and the final norm.

        Args:
            input_ids: [B, T], or inputs_embeds: [B, T, D].
            attention_mask: [B, S] with 0 at padding, or a ready 4D mask, see `self_attention_mask`.
            position_ids: [B, T], or [3, B, T] for (t, h, w); default: cache indices.
            vision_states: [v, D], the vision tokens that are new in this call. vision_position_ids: [3, v].
            vision_call: which tokens see which vision tokens. The cross-attention layers are skipped if no token sees any and none is new.
            text_index: [B, T], for packed rows the index of the text that each token belongs to, rising along the row: a token sees
                tokens of its own text. Only without a filled cache. A ready 4D mask decides alone.

        Raises:
            ValueError: for masks that do not fit, and attention implementations that are not allowed.
        """
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = cache_of(cache, past_key_values)
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
    ) -> DecoderCall:
        """What the layers share, from the arguments of `forward`; hidden_states [B, T, D]."""
        config, device, past_length = self.config, hidden_states.device, cached_length(cache)
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
        self_mask, self_implementation = self_attention_mask(
            config, attention_mask, hidden_states, cache, implementation, text_index
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
        )

    def _implementation(self, name: Optional[str], states: torch.Tensor, need_weights: bool) -> str:
        """`usable_implementation`, but sdpa in training in place of a flash-attention version without dropout, if dropout is configured."""
        name = usable_implementation(name, states, need_weights)
        if (
            self.training
            and self.config.attention_dropout
            and name != "flash_attention_2"
            and attention_kind(name) == "flash"
        ):
            logger.warning_once(
                f"{name} has no dropout, but `attention_dropout` is {self.config.attention_dropout}; sdpa is used in training."
            )
            return "sdpa"
        return name


class MossVLModel(MossVLPreTrainedModel):
    """Vision encoder, separator and decoder, without a head.

    The separator is a parameter. PEFT's `modules_to_save` takes modules only and silently skips it. To train it beside adapters, call
    `model.get_base_model().model.separator_token.requires_grad_(True)` after `get_peft_model`, and save `model.merge_and_unload()`, as
    the folder of an adapter holds adapters only.
    """

    def __init__(self, config: MossVLConfig, cross_attention_implementation: Optional[str] = None):
        super().__init__(config, cross_attention_implementation)
        self.visual = MossVLVisionModel._from_config(config.vision_config)
        self.language_model = MossVLTextModel._from_config(config.text_config)
        self.separator_token = nn.Parameter(torch.zeros(config.text_config.hidden_size))
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value):
        self.language_model.embed_tokens = value

    def get_decoder(self):
        return self.language_model

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        grid_thw: torch.LongTensor,
        vision_chunked_length: Optional[int] = None,
        image_mean: Optional[list[list[float]]] = None,
        image_std: Optional[list[list[float]]] = None,
    ) -> BaseModelOutputWithPooling:
        """Vision tokens [P / m^2, D] of all frames, before separators; see `MossVLVisionModel.forward`."""
        features = self.visual(pixel_values, grid_thw, vision_chunked_length, image_mean, image_std)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=features)

    def get_rope_index(
        self,
        input_ids: torch.LongTensor,
        grid_thw: Optional[torch.LongTensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        media_nums_per_sample: Optional[list[int]] = None,
    ) -> tuple[torch.LongTensor, torch.LongTensor, torch.LongTensor]:
        """XRoPE positions of whole prompts.

        Returns:
            Text positions [3, B, T]; vision positions [3, B, longest V], 0 after the end of shorter samples; rope_deltas [B].
        """
        media = read_media(self.config.vision_config, grid_thw=grid_thw, media_nums_per_sample=media_nums_per_sample)
        request = read_request(self.config.image_token_id, None, 0, input_ids, attention_mask, media)
        positions = walk_request(request)
        lengths = [request.tokens_placed(sample) for sample in range(len(request.new_frames))]
        per_sample = [part.T for part in positions.vision.split(lengths, dim=1)]
        padded = nn.utils.rnn.pad_sequence(per_sample, batch_first=True)  # [B, V, 3]
        return positions.text.expand(3, -1, -1), padded.permute(2, 0, 1), positions.rope_delta

    def forward(
        self,
        input_ids: Optional[torch.LongTensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        cache: Optional[Cache] = None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        use_cache: Optional[bool] = None,
        pixel_values: Optional[torch.FloatTensor] = None,
        grid_thw: Optional[torch.LongTensor] = None,
        media_nums_per_sample: Optional[list[int]] = None,
        cross_attention_mask: Optional[torch.BoolTensor] = None,
        vision_chunked_length: Optional[int] = None,
        rows_per_sample: int = 1,
        prompt_length: Optional[int] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        past_key_values: Optional[Cache] = None,
        image_features: Optional[torch.FloatTensor] = None,
        image_mean: Optional[list[list[float]]] = None,
        image_std: Optional[list[list[float]]] = None,
        image_grid_thw: Optional[torch.LongTensor] = None,
    ) -> MossVLModelOutput:
        """See `MossVLForConditionalGeneration.forward`."""
        text = input_ids if input_ids is not None else inputs_embeds
        cache, grid_thw = cache_of(cache, past_key_values), choose_grid(grid_thw, image_grid_thw)
        self._check_inputs(text, attention_mask, cache, grid_thw, pixel_values, image_features)
        use_cache = self._usable_cache(cache, use_cache)
        incremental = use_cache is True or cache is not None
        media = read_media(
            self.config.vision_config,
            pixel_values,
            grid_thw,
            image_features,
            image_mean,
            image_std,
            media_nums_per_sample,
        )
        request = read_request(
            self.config.image_token_id,
            vision_state(cache, self.config.text_config),
            cached_length(cache),
            text,
            attention_mask,
            media,
            cross_attention_mask,
            rows_per_sample,
            prompt_length,
            whole_prompt=not incremental,
        )
        if self.training and not incremental:
            request = self._with_blank_media(request)
        positions = read_positions(request, position_ids, attention_mask, with_cache=incremental)
        state, call = plan_call(request, positions)
        if use_cache is None:
            use_cache = self.config.text_config.use_cache and not self.training and positions.text_starts is None
        cache = DynamicCache() if use_cache and cache is None else cache

        vision_states, waiting = self._encode(request, vision_chunked_length)
        state_layer = None if cache is None else install_layers(cache, self.config.text_config)
        is_needed = attention_mask is not None and (attention_mask.ndim == 4 or request.text.padding.anywhere)
        outputs = self.language_model(
            input_ids
            if inputs_embeds is None
            else None,  # embedded inside, as only there sharded weights are gathered
            attention_mask=attention_mask if is_needed else None,
            position_ids=positions.text,
            cache=cache,
            inputs_embeds=inputs_embeds,
            vision_states=vision_states,
            vision_position_ids=positions.vision,
            vision_call=call,
            text_index=positions.text_index,
            output_attentions=self._choose("output_attentions", output_attentions),
            output_hidden_states=self._choose("output_hidden_states", output_hidden_states),
        )
        if state_layer is not None:
            last_ids = None if input_ids is None else input_ids[:, -1].clone()
            state_layer.state = replace(state, waiting=waiting, last_ids=last_ids)
        outputs.rope_deltas, outputs.text_starts = positions.rope_delta, positions.text_starts
        return outputs

    def _choose(self, name: str, value: Optional[bool]) -> bool:
        """An argument of forward, or the config's if it is None."""
        return getattr(self.config, name) if value is None else value

    def _check_inputs(
        self,
        text: Optional[torch.Tensor],
        attention_mask: Optional[torch.Tensor],
        cache: Optional[Cache],
        grid_thw,
        pixel_values: Optional[torch.Tensor],
        image_features,
    ) -> None:
        """Refuses what is missing or does not fit the model or the cache, before anything is read.

        Raises:
            ValueError: what is wrong.
        """
        if text is None:
            raise ValueError("Neither `input_ids` nor `inputs_embeds` was given; expected one of them.")
        if grid_thw is not None:
            check_implementations(self.config)  # before the vision encoder runs; the text model checks its own
        if attention_mask is not None and attention_mask.ndim == 4:
            check_ready_mask(attention_mask, self.config.text_config.num_attention_heads, *text.shape[:2], cache)
        if grid_thw is not None and len(grid_thw) and pixel_values is None and image_features is None:
            raise ValueError(
                "`grid_thw` came without `pixel_values` or `image_features`; expected one of them, as the processor returns it."
            )
        slots, past_length, length = static_length(cache), cached_length(cache), text.shape[1]
        if slots is not None and past_length + length > slots:
            raise ValueError(
                f"The static cache has {slots} slots and holds {past_length} tokens, and the call has {length}; expected a cache "
                f"of at least {past_length + length} slots."
            )

    def _usable_cache(self, cache: Optional[Cache], use_cache: Optional[bool]) -> Optional[bool]:
        """`use_cache`, or False with gradient checkpointing in training.

        Raises:
            ValueError: if a cache is given with gradient checkpointing in training.
        """
        if not (self.training and torch.is_grad_enabled() and self.language_model.gradient_checkpointing):
            return use_cache
        if cache is not None:
            raise ValueError(
                "A cache was given to a model in training with gradient checkpointing; expected none: layers that are run again in "
                "the backward pass cannot use it. Call `model.eval()`, compute under `torch.no_grad()`, or call "
                "`model.gradient_checkpointing_disable()`."
            )
        if use_cache:
            logger.warning_once(
                "`use_cache=True` does not go with gradient checkpointing in training; no cache is returned."
            )
        return False

    def _with_blank_media(self, request: VisionRequest) -> VisionRequest:
        """The request of a training step. If it has no frames, blank media are encoded and read times 0: then every parameter gets a
        gradient on every rank, and no rank waits for another to gather the weights that are sharded among them."""
        if any(request.new_frames):
            return request
        if request.media.pixel_values is not None:
            return request.with_blank(request.media)
        return request.with_blank(self._blank_frame(request.text.is_token.device)) if has_other_ranks() else request

    def _blank_frame(self, device: torch.device) -> Media:
        """One frame of zeros, as small as a frame can be."""
        config = self.config.vision_config
        side, values = (
            config.spatial_merge_size,
            config.in_channels * config.temporal_patch_size * config.patch_size**2,
        )
        pixel_values = torch.zeros(side * side, values, device=device)
        return Media(Grid([(1, side, side)]), side, per_sample=[1], pixel_values=pixel_values)

    def _encode(
        self, request: VisionRequest, vision_chunked_length: Optional[int]
    ) -> tuple[Optional[torch.Tensor], list[Optional[torch.Tensor]]]:
        """Encodes the new frames of a call.

        Returns:
            Vision states [v, D] of the frames that the call places, those that waited first in each sample, or None; and for each sample
            the states of the frames that wait after the call.
        """
        waiting, device = request.state.waiting, request.text.is_token.device
        if request.blank is not None:
            return self._encode_media(request.blank, vision_chunked_length, device), waiting
        if not any(request.new_frames):
            return (
                self._split_placed(request, [None] * len(waiting)) if request.state.is_waiting() else (None, waiting)
            )
        states = self._encode_media(request.media, vision_chunked_length, device)
        sizes = [count_vision_tokens(frames) for frames in request.media.frames()]
        placed = [request.tokens_placed(sample) for sample in range(len(sizes))]
        if placed == sizes and not request.state.is_waiting():
            return states, waiting
        parts = states.split(sizes)
        new = [part if frames else None for part, frames in zip(parts, request.new_frames, strict=True)]
        return self._split_placed(request, new)

    def _encode_media(self, media: Media, vision_chunked_length: Optional[int], device: torch.device) -> torch.Tensor:
        """Vision states [v, D] of media, each frame with its separator. device: of media that come encoded."""
        if media.image_features is not None:
            features = media.image_features.to(device)
            return with_separators(features, frame_groups(media.grid), media.merge_size, self.separator_token)
        return self.visual(
            media.pixel_values,
            media.grid,
            vision_chunked_length,
            media.image_mean,
            media.image_std,
            self.separator_token,
        )

    @staticmethod
    def _split_placed(
        request: VisionRequest, new: list[Optional[torch.Tensor]]
    ) -> tuple[Optional[torch.Tensor], list[Optional[torch.Tensor]]]:
        """Divides vision states of waiting and `new` frames, per sample [v, D] or None, as `_encode` returns them."""
        placed, waiting = [], []
        for sample, parts in enumerate(zip(request.state.waiting, new, strict=True)):
            states = join([part for part in parts if part is not None])
            count = request.tokens_placed(sample)
            if count:
                placed.append(states[:count])
            waiting.append(states[count:] if states is not None and len(states) > count else None)
        return join(placed), waiting


def join(parts: list[torch.Tensor]) -> Optional[torch.Tensor]:
    """Concatenates tensors; no copy of a single one, None for none."""
    if not parts:
        return None
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def has_other_ranks() -> bool:
    """Whether this process trains together with others, which wait for its gradients."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def kept_rows(logits_to_keep: Union[int, torch.Tensor], length: int) -> Union[slice, torch.Tensor]:
    """The tokens of a call whose logits are computed: a slice of `length`, or indices [rows].

    Raises:
        ValueError: for indices outside the call.
    """
    if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.ndim == 1:
        if logits_to_keep.dtype == torch.bool and len(logits_to_keep) == length:
            return logits_to_keep.nonzero()[:, 0]
        if not (logits_to_keep.is_floating_point() or logits_to_keep.dtype == torch.bool) and all(
            -length <= index < length for index in logits_to_keep.tolist()
        ):
            return logits_to_keep.long()
    elif isinstance(logits_to_keep, int) and logits_to_keep >= 0:
        return slice(-logits_to_keep, None)
    raise ValueError(
        f"`logits_to_keep` is {logits_to_keep!r}; expected how many of the last rows to keep (0: all), a tensor of indices below "
        f"{length}, the tokens of this call, or a bool tensor [{length}], True at the rows to keep."
    )


def check_labels(labels: Optional[torch.Tensor], shape) -> None:
    """ValueError unless there is a label for each of [B, T] tokens, or no labels."""
    if labels is not None and tuple(labels.shape) != tuple(shape):
        raise ValueError(
            f"`labels` has shape {list(labels.shape)}; expected {list(shape)}: a label for each token of this call, -100 where there "
            f"is none, whatever `logits_to_keep` leaves out."
        )


def row_targets(
    labels: torch.Tensor, attention_mask: Optional[torch.Tensor], text_starts: Optional[torch.Tensor]
) -> torch.Tensor:
    """What each token of a call predicts, [B, T]: the label of the next token that is no padding, or -100.

    Args:
        labels, attention_mask: see `MossVLForConditionalGeneration.forward`.
        text_starts: bool [B, T], for packed rows True at the first token of each text, which no token predicts.
    """
    if text_starts is not None:
        labels = labels.masked_fill(text_starts.to(labels.device), IGNORED)
    if attention_mask is None or attention_mask.ndim != 2:
        return F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    length = labels.shape[1]
    is_token = attention_mask[:, attention_mask.shape[1] - length :].to(labels.device).bool()
    index = torch.arange(length, device=labels.device).expand(*labels.shape)
    # is_token [0 1 1 0 1] -> the first token at or after each index [1 1 2 4 4] -> the first one after it [1 2 4 4 -]
    following = index.masked_fill(~is_token, length).flip(1).cummin(1).values.flip(1)
    targets = F.pad(labels, (0, 1), value=IGNORED).gather(1, F.pad(following[:, 1:], (0, 1), value=length))
    return targets.masked_fill(~is_token, IGNORED)


MODEL_ARGUMENTS = tuple(inspect.signature(MossVLModel.forward).parameters)[1:]  # all but `self`


class MossVLForConditionalGeneration(
    MossVLPreTrainedModel, MossVLGenerationMixin, MossVLGenerateHooks, GenerationMixin
):
    """MOSS-VL with its language model head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    accepts_loss_kwargs = True

    def __init__(self, config: MossVLConfig, cross_attention_implementation: Optional[str] = None):
        super().__init__(config, cross_attention_implementation)
        self.model = MossVLModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @property
    def visual(self) -> MossVLVisionModel:
        return self.model.visual

    @property
    def language_model(self) -> MossVLTextModel:
        return self.model.language_model

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def get_decoder(self):
        return self.model.language_model

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        grid_thw: torch.LongTensor,
        vision_chunked_length: Optional[int] = None,
        image_mean: Optional[list[list[float]]] = None,
        image_std: Optional[list[list[float]]] = None,
    ) -> BaseModelOutputWithPooling:
        """See `MossVLModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, grid_thw, vision_chunked_length, image_mean, image_std)

    def get_rope_index(
        self,
        input_ids: torch.LongTensor,
        grid_thw: Optional[torch.LongTensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        media_nums_per_sample: Optional[list[int]] = None,
    ) -> tuple[torch.LongTensor, torch.LongTensor, torch.LongTensor]:
        """See `MossVLModel.get_rope_index`."""
        return self.model.get_rope_index(input_ids, grid_thw, attention_mask, media_nums_per_sample)

    def forward(
        self,
        input_ids: Optional[torch.LongTensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        cache: Optional[Cache] = None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        labels: Optional[torch.LongTensor] = None,
        use_cache: Optional[bool] = None,
        logits_to_keep: Union[int, torch.Tensor] = 0,
        pixel_values: Optional[torch.FloatTensor] = None,
        grid_thw: Optional[torch.LongTensor] = None,
        media_nums_per_sample: Optional[list[int]] = None,
        cross_attention_mask: Optional[torch.BoolTensor] = None,
        vision_chunked_length: Optional[int] = None,
        rows_per_sample: int = 1,
        prompt_length: Optional[int] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
        num_items_in_batch: Optional[Union[int, torch.Tensor]] = None,
        past_key_values: Optional[Cache] = None,
        image_features: Optional[torch.FloatTensor] = None,
        image_mean: Optional[list[list[float]]] = None,
        image_std: Optional[list[list[float]]] = None,
        image_grid_thw: Optional[torch.LongTensor] = None,
        token_type_ids: Optional[torch.LongTensor] = None,
        mm_token_type_ids: Optional[torch.LongTensor] = None,
    ) -> Union[MossVLCausalLMOutput, tuple]:
        """One pass over text and the frames that come with it.

        A prompt may come in parts: with `use_cache=True` (or a cache) frames may come before the text reaches their `image_pad`, or with
        the part that does. Without a cache, text and frames have to match.

        Args:
            input_ids: [B, T], one `image_pad` per frame. `inputs_embeds` [B, T, D] may replace the embeddings; with frames, `input_ids` is
                needed as well, to place them.
            attention_mask: [B, S], cache included, 0 at padding on either side; or a ready 4D mask for self-attention.
            position_ids: [B, T] or [3, B, T], in place of XRoPE's text positions. Positions that only count the tokens of a row are
                replaced by XRoPE's. If they start again within a row, the row holds packed texts, which see only themselves and their
                frames.
            cache: any transformers cache, empty or filled by this model.
            labels: [B, T], -100 ignored; next-token cross-entropy, shifted inside. The token before it that is no padding predicts each
                token, so that a sample's loss is the same in every batch; labels of padding are ignored.
            logits_to_keep: logits of the last n tokens only (0: all), of the tokens at these indices, or of those where a bool [T] is
                True. The loss is that of these tokens, each with the label of the next token of the whole sequence.
            pixel_values: [P, channels * time * patch * patch], the media of all samples in the order of the text; float, or uint8
                with `image_mean` and `image_std`.
            grid_thw: [media, 3], (frames, patch rows, patch columns).
            media_nums_per_sample: media of each sample; counted from the text if it is missing.
            cross_attention_mask: bool [B, 1, T, F], True = hidden; default: a token sees the frames placed at or before it. The mask may
                hide any frame, and shows none to padding or before its `image_pad`. If it has fewer rows than tokens, the default holds for
                the later tokens, and for all if a processor made it for other padding. On a filled cache, a mask of at most T rows is about
                the frames that come with the call, if it has as many columns as these; else about all.
            vision_chunked_length: frames that the vision encoder takes at once, default 64 (in training: all).
            rows_per_sample: text rows that share each sample's media, as beams do.
            prompt_length: tokens of the whole prompt; `image_pad` ids after it are text that the model wrote.
            num_items_in_batch: labels in the whole batch, by which `Trainer` wants the loss divided.
            past_key_values: the older name of `cache`.
            image_features: the output of `get_image_features`, or its `pooler_output` [P / m^2, D], in place of `pixel_values`.
            image_mean, image_std: three numbers per medium, to normalise uint8 pixels on the encoder's device.
            image_grid_thw: another name of `grid_thw`, by which generic trainers look for it.
            token_type_ids, mm_token_type_ids: accepted, as some processors return them, and not needed.

        Raises:
            ValueError: for counts and shapes that do not fit each other, before anything is computed.
        """
        arguments = locals()
        text, kept = input_ids if input_ids is not None else inputs_embeds, slice(None)
        if text is not None:
            kept = kept_rows(logits_to_keep, text.shape[1])
            check_labels(labels, text.shape[:2])
        outputs = self.model(**{name: arguments[name] for name in MODEL_ARGUMENTS})
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            targets = row_targets(labels, attention_mask, outputs.text_starts)
            kept = kept.to(targets.device) if isinstance(kept, torch.Tensor) else kept
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                shift_labels=targets[:, kept].contiguous(),
                vocab_size=self.config.text_config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        result = MossVLCausalLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            rope_deltas=outputs.rope_deltas,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return result if return_dict else result.to_tuple()

    def init_continuous_batching(self, *args, **kwargs):
        """Refused: ValueError."""
        raise ValueError(
            "Continuous batching (`generate_batch`, `init_continuous_batching`) was asked for; expected `generate` on a left-padded "
            "batch, `offline_batch_generate` or `offline_generate`. Its paged cache holds text alone, and it passes no media."
        )

    generate_batch = continuous_batching_context_manager = init_continuous_batching


MossVLForConditionalGeneration.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "MossVLForConditionalGeneration",
    "MossVLModel",
    "MossVLPreTrainedModel",
    "MossVLTextModel",
    "MossVLVisionModel",
]
