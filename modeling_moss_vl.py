"""MOSS-VL: a ViT encoder, and a causal decoder whose gated cross-attention layers read the vision tokens.

Axes: B text rows, T text tokens of this call, S text tokens in all (cache included), D hidden size, H query heads, K key/value
heads, G = H / K, d head size, F frames, P patches, V vision tokens (each frame's tokens and its separator, all samples one
behind the other without padding).
"""

from dataclasses import dataclass, replace
from typing import Optional, Union

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
    attend,
    attention_kind,
    check_implementations,
    check_ready_mask,
    compute_dtype,
    self_attention_mask,
    usable_implementation,
)
from .cache_layers import CACHE, cache_of, cached_length, install_layers, static_length, vision_state
from .checks import nearest_name  # noqa: F401 - transformers 4.57 copies only the files that this file imports itself
from .configuration_moss_vl import MossVLConfig, MossVLTextConfig
from .conversation import PLACEHOLDERS  # noqa: F401
from .generation_batches import answer_turns  # noqa: F401
from .generation_hooks import MossVLGenerateHooks
from .generation_options import GENERATE_DEFAULTS  # noqa: F401
from .generation_queries import Turn  # noqa: F401
from .generation_queue import QueueServer  # noqa: F401
from .generation_utils import MossVLGenerationMixin
from .options import OPTIONS  # noqa: F401
from .patches import normalise  # noqa: F401
from .pretrained_model import MossVLLayer, MossVLPreTrainedModel
from .vision_encoder import MossVLVisionModel, frame_groups, with_separators
from .vision_sequence import (
    Span,
    VisionCall,
    VisionRequest,
    grid_of,
    plan_call,
    read_request,
    split_by,
)
from .xrope import count_tokens, frame_positions, rotate, text_starts, walk_text, xrope_rotary


logger = logging.get_logger(__name__)


VISION_ROWS = 4096  # vision tokens whose keys and values are made at once where no gradient is kept
IGNORED = -100  # the label of a row that predicts nothing, as transformers' losses know it


class MossVLRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
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

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MossVLTextAttention(nn.Module):
    """Projections that self- and cross-attention share."""

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

    def queries(self, states: torch.Tensor, rotary) -> torch.Tensor:
        """[B, T, D] -> [B, H, T, d], normalised and rotated."""
        return self._rotated(self.q_proj(states), self.q_norm, rotary)

    def keys_values(self, states: torch.Tensor, rotary) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, S, D] -> two of [B, K, S, d]; the keys normalised and rotated."""
        key = self._rotated(self.k_proj(states), self.k_norm, rotary)
        return key, self.v_proj(states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _rotated(self, projected: torch.Tensor, norm: nn.Module, rotary) -> torch.Tensor:
        """[B, T, heads * d] -> [B, heads, T, d], in the dtype of the projection: norms in float32, or those under autocast, change it."""
        dtype, states = projected.dtype, norm(projected.unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        del projected
        return rotate(states, *rotary).to(dtype)


class MossVLSelfAttention(MossVLTextAttention):
    is_causal = True

    def forward(self, hidden_states, rotary, self_mask, implementation, cache=None, cache_position=None):
        """hidden_states [B, T, D] -> the same, and the weights [B, H, T, S] or None. self_mask: a `SelfAttentionMask`."""
        query = self.queries(hidden_states, rotary)
        key, value = self.keys_values(hidden_states, rotary)
        if cache is not None:
            # Where the tokens stand: the static cache of transformers 4 asks for it.
            key, value = cache.update(key, value, self.layer_idx, {"cache_position": cache_position})
        mask, causal, texts = self_mask
        out, weights = attend(
            self, query, key, value, mask, implementation, causal=causal, dropout=self.attention_dropout, texts=texts
        )
        return self.o_proj(out.flatten(2)), weights


class MossVLCrossAttention(MossVLTextAttention):
    is_causal = False

    def forward(
        self,
        hidden_states,
        vision_states,
        rotary,
        vision_rotary,
        call,
        implementation,
        cache=None,
        output_attentions=False,
    ):
        """hidden_states [B, T, D] read the packed vision sequence, each span of rows its own tokens.

        Args:
            vision_states: [v, D], the vision tokens that are new in this call, or None.
            vision_rotary: their xrope_rotary, two of [v, d].

        Returns:
            [B, T, D], and where they are asked for (eager alone has them) the weights [B, H, T, longest sample's V], else None.
        """
        key = value = None
        if vision_states is not None:
            key, value = self.vision_keys_values(vision_states, vision_rotary)
        if cache is not None:
            key, value = cache.layers[self.layer_idx].store(key, value, call)
        query = self.queries(hidden_states, rotary).transpose(1, 2).flatten(0, 1)  # [B * T, H, d]
        if cache is not None:
            key, value = cache.layers[self.layer_idx].in_dtype(query.dtype)
        with_mask = "sdpa" if attention_kind(implementation) == "flash" else implementation
        outs, weights, row = [], [], 0
        for span in call.spans:
            if span.rows.start > row:  # rows that see nothing
                outs.append(query.new_zeros(span.rows.start - row, *query.shape[1:]))
            keep = None if span.keep is None else torch.atleast_2d(span.keep.to(query.device))[None, None]
            out, weight = attend(
                self,
                query[span.rows].transpose(0, 1)[None],  # [1, H, rows, d]
                key[:, :, span.tokens],
                value[:, :, span.tokens],
                keep,
                implementation if keep is None else with_mask,
                dropout=self.attention_dropout,
            )
            outs.append(out[0])
            weights.append(weight if output_attentions else None)
            row = span.rows.stop
        if row < query.shape[0]:
            outs.append(query.new_zeros(query.shape[0] - row, *query.shape[1:]))
        out = (torch.cat(outs) if len(outs) > 1 else outs[0]).reshape(*hidden_states.shape[:2], -1)
        weights = self._all_weights(weights, call, hidden_states, self.num_heads) if output_attentions else None
        return self.o_proj(out), weights

    def vision_keys_values(self, states: torch.Tensor, rotary) -> tuple[torch.Tensor, torch.Tensor]:
        """[v, D] -> two of [1, K, v, d]. Without gradients they are made piece by piece, and each head's lie together in memory: as every
        token to come reads them."""
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

    @staticmethod
    def _all_weights(weights: list[torch.Tensor], call: VisionCall, like: torch.Tensor, heads: int) -> torch.Tensor:
        widest = max((span.tokens.stop - span.tokens.start for span in call.spans), default=0)
        out = like.new_zeros(like.shape[0] * like.shape[1], heads, widest)
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

    def forward(self, hidden_states, rotary, self_mask, implementation, layer_past=None, cache_position=None):
        """layer_past: the cache, by the one name under which every transformers keeps it from a layer that is checkpointed."""
        attended, weights = self.self_attn(
            self.input_layernorm(hidden_states), rotary, self_mask, implementation, layer_past, cache_position
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), weights


class MossVLCrossAttentionLayer(MossVLLayer):
    """Gated reading of the vision sequence; a row that sees nothing passes through unchanged."""

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
        hidden_states,
        vision_states,
        rotary,
        vision_rotary,
        call,
        implementation,
        layer_past=None,
        output_attentions=False,
    ):
        attended, weights = self.cross_attn(
            self.input_layernorm(hidden_states),
            vision_states,
            rotary,
            vision_rotary,
            call,
            implementation,
            layer_past,
            output_attentions,
        )
        sees = 1.0 if call.sees is None else call.sees.to(hidden_states)
        hidden_states = hidden_states + sees * self.cross_attn_attn_gate.tanh() * attended
        fed = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + sees * self.cross_attn_mlp_gate.tanh() * fed, weights


@dataclass
class MossVLModelOutput(BaseModelOutputWithPastAndCrossAttentions):
    """Output of the models without a head.

    Attributes:
        last_hidden_state: [B, T, D].
        cache, before transformers 5.24 past_key_values: the cache, where one is used.
        hidden_states: input of every layer and the final norm's output, [B, T, D] each.
        attentions: weights of the self-attention layers, in order, [B, H, T, S] each.
        cross_attentions: weights of the cross-attention layers, in order, [B, H, T, V of the longest sample] each; empty where no
            token sees any frame.
        rope_deltas: [B]; the token at cache index i has position i + rope_delta.
        starts_text: bool [B, T], of packed rows, where each text begins; None if each row is one text.
    """

    rope_deltas: Optional[torch.LongTensor] = None
    starts_text: Optional[torch.BoolTensor] = None


@dataclass
class MossVLCausalLMOutput(CausalLMOutputWithCrossAttentions):
    """`MossVLModelOutput` with `logits` [B, rows asked for, vocab] in place of the last hidden state, and `loss` where labels are
    given."""

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
            input_ids [B, T] or inputs_embeds [B, T, D].
            attention_mask: [B, S] with 0 at padding, or a ready 4D mask, see `self_attention_mask`.
            position_ids: [B, T], or [3, B, T] for t, h, w; default: counting on from the cache.
            vision_states [v, D], vision_position_ids [3, v], vision_call: the vision tokens new in this call, and who sees what;
                where nothing is seen or new, the cross-attention layers are skipped.
            text_index: [B, T], for packed rows the index of the text that each token belongs to, rising along the row: a token sees
                those of its own text. Without a filled cache. A ready 4D mask says all, so it is not cut by texts.

        Raises:
            ValueError: for masks that do not fit, and attention implementations that are not allowed.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        config, hidden_states, cache = self.config, inputs_embeds, cache_of(cache, past_key_values)
        past_length = cached_length(cache)
        cache_position = torch.arange(past_length, past_length + hidden_states.shape[1], device=hidden_states.device)
        if position_ids is None:
            position_ids = cache_position[None]
        if position_ids.ndim == 2:
            position_ids = position_ids.expand(3, *position_ids.shape)
        rope = config.rope_parameters
        rope_args = (config.head_dim, rope["rope_theta"], rope["mrope_section"], hidden_states.dtype)
        rotary = tuple(
            part[:, None] for part in xrope_rotary(position_ids.to(hidden_states.device), *rope_args)
        )  # [B, 1, T, d]
        vision_rotary = None
        if vision_states is not None:
            vision_states = vision_states.to(
                hidden_states.device, compute_dtype(hidden_states)
            )  # the encoder may have another dtype
            vision_rotary = xrope_rotary(vision_position_ids.to(hidden_states.device), *rope_args)  # [v, d]
        implementation = crossing = self._implementation(config._attn_implementation, hidden_states, output_attentions)
        if config.cross_attention_implementation is not None:
            crossing = self._implementation(config.cross_attention_implementation, hidden_states, output_attentions)
        self_mask, implementation = self_attention_mask(
            config, attention_mask, hidden_states, cache, implementation, text_index
        )

        all_states, attentions, cross_attentions = [], [], []
        for layer in self.layers:
            if output_hidden_states:
                all_states.append(hidden_states)
            if isinstance(layer, MossVLSelfAttentionLayer):
                hidden_states, weights = layer(
                    hidden_states, rotary, self_mask, implementation, layer_past=cache, cache_position=cache_position
                )
                if output_attentions:
                    attentions.append(weights)
            elif vision_call is not None and (vision_call.spans or vision_call.writes):
                hidden_states, weights = layer(
                    hidden_states,
                    vision_states,
                    rotary,
                    vision_rotary,
                    vision_call,
                    crossing,
                    layer_past=cache,
                    output_attentions=output_attentions,
                )
                cross_attentions.append(weights)
        hidden_states = self.norm(hidden_states)
        return MossVLModelOutput(
            last_hidden_state=hidden_states,
            **{CACHE: cache},
            hidden_states=(*all_states, hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            cross_attentions=tuple(cross_attentions) if output_attentions else None,
        )

    def _implementation(self, name: Optional[str], states: torch.Tensor, need_weights: bool) -> str:
        """`usable_implementation`, and sdpa for the versions of flash-attention that would leave out a dropout in training."""
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


# The whole


class MossVLModel(MossVLPreTrainedModel):
    """Vision encoder, separator and decoder, without a head.

    The separator is a parameter. PEFT's `modules_to_save` takes modules alone and leaves it out without a word; to train it beside
    adapters call `model.get_base_model().model.separator_token.requires_grad_(True)` after `get_peft_model`, and save
    `model.merge_and_unload()`: the folder of an adapter holds adapters alone.
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
        pixel_values,
        grid_thw,
        vision_chunked_length=None,
        image_mean=None,
        image_std=None,
    ) -> BaseModelOutputWithPooling:
        """Vision tokens [P / m^2, D] of all frames, before separators; see `MossVLVisionModel.forward`."""
        features = self.visual(pixel_values, grid_thw, vision_chunked_length, image_mean, image_std)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=features)

    def get_rope_index(
        self, input_ids, grid_thw=None, attention_mask=None, media_nums_per_sample=None
    ) -> tuple[torch.LongTensor, torch.LongTensor, torch.LongTensor]:
        """XRoPE positions of whole prompts.

        Returns:
            Text positions [3, B, T]; vision positions [3, B, longest V], 0 where a sample has fewer; rope_deltas [B].
        """
        request = read_request(self.config, None, 0, input_ids, attention_mask, None, grid_thw, media_nums_per_sample)
        position_ids, vision_position_ids, rope_deltas = self._place(request)
        lengths = [request.tokens_placed(sample) for sample in range(len(request.new))]
        per_sample = vision_position_ids.split(lengths, dim=1)
        padded = nn.utils.rnn.pad_sequence([positions.T for positions in per_sample], batch_first=True)  # [B, V, 3]
        return position_ids.expand(3, -1, -1), padded.permute(2, 0, 1), rope_deltas

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
        cache, grid_thw = cache_of(cache, past_key_values), grid_of(grid_thw, image_grid_thw)
        if self.training and torch.is_grad_enabled() and self.language_model.gradient_checkpointing:
            if cache is not None:
                raise ValueError(
                    "A cache was given to a model in training with gradient checkpointing; expected none: layers that are run again "
                    "in the backward pass cannot use it. Call `model.eval()`, compute under `torch.no_grad()`, or call "
                    "`model.gradient_checkpointing_disable()`."
                )
            if use_cache:
                logger.warning_once(
                    "`use_cache=True` does not go with gradient checkpointing in training; no cache is returned."
                )
            use_cache = False
        if input_ids is None and inputs_embeds is None:
            raise ValueError("Neither `input_ids` nor `inputs_embeds` was given; expected one of them.")
        if grid_thw is not None:
            check_implementations(self.config)  # before the vision encoder runs; the text model checks its own
        text = input_ids if input_ids is not None else inputs_embeds
        if attention_mask is not None and attention_mask.ndim == 4:
            check_ready_mask(attention_mask, self.config.text_config.num_attention_heads, *text.shape[:2], cache)
        if grid_thw is not None and len(grid_thw) and pixel_values is None and image_features is None:
            raise ValueError(
                "`grid_thw` came without `pixel_values` or `image_features`; expected one of them, as the processor returns it."
            )
        past_length, slots = cached_length(cache), static_length(cache)
        if slots is not None and past_length + text.shape[1] > slots:
            raise ValueError(
                f"The static cache has {slots} slots and holds {past_length} tokens, and the call has {text.shape[1]}; expected a cache of at "
                f"least {past_length + text.shape[1]} slots."
            )
        incremental = use_cache is True or cache is not None
        request = read_request(
            self.config,
            vision_state(cache, self.config.text_config),
            past_length,
            text,
            attention_mask,
            pixel_values,
            grid_thw,
            media_nums_per_sample,
            cross_attention_mask,
            rows_per_sample,
            prompt_length,
            whole_prompt=not incremental,
            image_features=image_features,
            image_mean=image_mean,
            image_std=image_std,
        )
        ready_mask = attention_mask is not None and attention_mask.ndim == 4
        starts_text = (
            None if position_ids is None or past_length else self._packed_texts(request, position_ids, ready_mask)
        )
        if starts_text is not None and incremental:
            raise ValueError(
                "`position_ids` start again within a row, so the row holds several texts, and a cache was asked for; expected "
                "use_cache=False and no cache: a cache continues one text per row."
            )
        if use_cache is None:
            use_cache = self.config.text_config.use_cache and not self.training and starts_text is None
        cache = DynamicCache() if use_cache and cache is None else cache
        walked, vision_position_ids, rope_deltas = self._place(request, starts_text, position_ids)
        position_ids, rope_deltas, own_positions = self._text_positions(
            request, position_ids, walked, rope_deltas, starts_text, attention_mask
        )
        text_index = None if starts_text is None else starts_text.cumsum(1)
        highest = position_ids if position_ids.ndim == 2 else position_ids.amax(0)
        state, call = plan_call(
            request,
            highest.expand(request.is_token.shape),
            rope_deltas,
            own_positions,
            None if text_index is None else text_index.cpu().numpy(),
        )

        media, vision_states, waiting = request.media, None, request.state.waiting
        if request.grid and any(request.new):
            vision_states, waiting = self._take_placed(request, self._encode_media(request, vision_chunked_length))
        elif request.state.is_waiting():
            vision_states, waiting = self._take_placed(request, None)
        elif self.training and cache is None and ("pixel_values" in media or has_other_ranks()):
            # Blank media only, or none. A blank frame is read all the same, times 0: every parameter gets a gradient on every rank, and
            # no rank waits for another to read the weights that are sharded among them.
            if "pixel_values" in media:
                vision_states = self._encode_media(request, None)
            else:
                vision_states = self.visual(
                    *self._blank_frame(request.is_token.device), separator=self.separator_token
                )
            vision_position_ids = request.is_token.new_zeros(3, len(vision_states), dtype=torch.long)
            call = VisionCall(
                spans=[Span(slice(0, request.is_token.numel()), slice(0, len(vision_states)))],
                sees=torch.zeros_like(request.is_token, dtype=vision_states.dtype)[..., None],
                length=len(vision_states),
            )
        if cache is not None:
            vision_layer = install_layers(cache, self.config.text_config)
        outputs = self.language_model(
            input_ids if inputs_embeds is None else None,  # looked up inside: only there are sharded weights whole
            attention_mask=attention_mask
            if attention_mask is None or attention_mask.ndim == 4 or request.any_padded
            else None,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            vision_states=vision_states,
            vision_position_ids=vision_position_ids,
            vision_call=call,
            text_index=text_index,
            output_attentions=self.config.output_attentions if output_attentions is None else output_attentions,
            output_hidden_states=self.config.output_hidden_states
            if output_hidden_states is None
            else output_hidden_states,
        )
        if cache is not None:
            vision_layer.state = replace(
                state, waiting=waiting, last_ids=None if input_ids is None else input_ids[:, -1].clone()
            )
        outputs.rope_deltas, outputs.starts_text = rope_deltas, starts_text
        return outputs

    def _encode_media(self, request: VisionRequest, vision_chunked_length: Optional[int]) -> torch.Tensor:
        """Vision states [v, D] of the media of a call, each frame with its separator."""
        media = request.media
        if "image_features" not in media:
            statistics = media.get("image_mean"), media.get("image_std")
            return self.visual(
                media["pixel_values"], request.grid, vision_chunked_length, *statistics, self.separator_token
            )
        runs, merge = frame_groups(request.grid), self.config.vision_config.spatial_merge_size
        return with_separators(media["image_features"].to(request.is_token.device), runs, merge, self.separator_token)

    def _packed_texts(self, request: VisionRequest, position_ids, ready_mask: bool) -> Optional[torch.Tensor]:
        """Where packed texts begin: bool [B, T], or None unless the caller's `position_ids` start again within a row. Those of a row are
        counts of tokens, or XRoPE's positions, in which an `image_pad` stands after its frame. Beside a ready mask, positions may also go
        back to where a part of one text goes on; only those that start again from 0 begin another text."""
        shape, is_token = request.is_token.shape, request.is_token
        if position_ids.shape[-2:] not in (shape, (1, shape[1])):
            return None  # an error later on
        positions = (position_ids if position_ids.ndim == 2 else position_ids[0]).to(is_token.device).expand(shape)
        begins, starts = positions, text_starts(positions, positions, is_token)
        if any(request.pads):
            counts = ((count_tokens(is_token, starts, positions) == positions) | ~is_token).all(1, keepdim=True)
            begins = positions.clone()
            begins[request.is_frame] -= self._extents(request)
            begins = torch.where(counts, positions, begins)
            starts = text_starts(positions, begins, is_token)
        if ready_mask and (begins[starts] != 0).any():
            return None
        return starts if (starts.sum(1) > 1).any() else None

    @staticmethod
    def _extents(request: VisionRequest) -> torch.Tensor:
        """max(H, W) of the frames that a call places, row by row."""
        extents = [max(grid) for sample in request.state.row_sample for grid in request.frames_placed(sample)]
        return torch.tensor(extents, dtype=torch.long, device=request.is_token.device)

    def _text_positions(self, request: VisionRequest, position_ids, walked, rope_deltas, starts_text, attention_mask):
        """Positions of the text [B, T] or [3, B, T], rope_deltas [B], and whether they are the caller's. Rows whose positions only count
        their tokens, as generic code makes them, get XRoPE's."""
        if position_ids is None:
            return walked, rope_deltas, False
        shape, given = request.is_token.shape, position_ids.shape
        if given[-2:] not in (shape, (1, shape[1])) or given[:-2] not in ((), (3,)):
            raise ValueError(
                f"`position_ids` has shape {list(given)}; expected {list(shape)}, or the same after a "
                f"leading 3 for (t, h, w): one position for each token of this call."
            )
        position_ids, is_token = position_ids.to(walked.device).expand(*given[:-2], *shape), request.is_token
        own, length = (position_ids if position_ids.ndim == 3 else position_ids[None]), request.past_length + shape[1]

        def equal(positions):  # [B]
            return ((own == positions) | ~is_token).all(-1).all(0)

        index = torch.arange(length, device=walked.device)[None]
        counted = [index]
        if attention_mask is not None and attention_mask.ndim == 2:
            counted.append(attention_mask.to(walked.device).cumsum(1) - 1)
        counts = torch.stack([equal(positions[:, request.past_length :]) for positions in counted]).any(0)
        if starts_text is not None:
            counts |= equal(walked) | equal(count_tokens(is_token, starts_text, own[0]))
            if any(request.pads) and (~counts & (starts_text.sum(1) > 1)).any():
                raise ValueError(
                    "`position_ids` start again within a row that has frames, but are neither counts of tokens (0, 1, 2, ... in each "
                    "text) nor XRoPE's positions; expected one of these, or a row per text."
                )
        if counts.all():
            return walked, rope_deltas, False
        highest = own.amax(0).masked_fill(~is_token, torch.iinfo(own.dtype).min).amax(1)
        position_ids = torch.where(counts[:, None], walked, position_ids)
        own_deltas = torch.where(is_token.any(1), highest + 1 - length, rope_deltas)
        return position_ids, torch.where(counts, rope_deltas, own_deltas), True

    def _place(
        self,
        request: VisionRequest,
        starts_text: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.Tensor] = None,
    ):
        """Text positions [B, T], positions of the frames placed in this call [3, v], rope_deltas [B].

        Args:
            starts_text: bool [B, T], where packed texts begin; each counts on from its first one of `position_ids`.
        """
        state, device = request.state, request.is_token.device
        start = torch.full((len(state.row_sample),), request.past_length, device=device)
        if state.rope_delta is not None:
            start = start + state.rope_delta.to(device)
        if request.dropped is not None:
            start = start - request.dropped
        if request.is_token.shape[1] == 1 and not any(request.pads):
            end = start + request.is_token[:, 0]
            return (
                start[:, None].masked_fill(~request.is_token, 0),
                start.new_zeros(3, 0),
                end - request.past_length - 1,
            )
        first = None
        if starts_text is not None:
            first = (
                (position_ids if position_ids.ndim == 2 else position_ids[0]).to(device).expand(request.is_token.shape)
            )
        text, origins, end = walk_text(
            request.is_token, request.is_frame, self._extents(request), start, starts_text, first
        )
        rope_deltas = end - request.past_length - request.is_token.shape[1]
        of_rows = origins.split([request.pads[sample] for sample in state.row_sample])
        first_rows = state.first_rows()
        for row, sample in enumerate(state.row_sample):
            if (
                row != first_rows[sample]
                and request.pads[sample]
                and not torch.equal(of_rows[row], of_rows[first_rows[sample]])
            ):
                raise ValueError(
                    f"Text rows {first_rows[sample]} and {row} share the frames of sample {sample}, but place them differently; expected "
                    f"the same text. Give each conversation a cache of its own before new frames come."
                )
        pieces = []
        for sample, row in enumerate(first_rows):
            runs = frame_groups((1, h, w) for h, w in request.frames_placed(sample))
            for run, origin in zip(runs, of_rows[row].split([run.frames for run in runs]), strict=True):
                pieces.append(frame_positions(origin, run.rows, run.columns))
        vision = torch.cat(pieces, dim=1) if pieces else torch.zeros(3, 0, dtype=torch.long, device=device)
        return text, vision, rope_deltas

    def _blank_frame(self, device) -> tuple[torch.Tensor, list[list[int]]]:
        """Pixels and grid of one frame of zeros, as small as a frame can be."""
        config = self.config.vision_config
        values = config.in_channels * config.temporal_patch_size * config.patch_size**2
        side = config.spatial_merge_size
        return torch.zeros(side * side, values, device=device), [[1, side, side]]

    def _take_placed(self, request: VisionRequest, states: Optional[torch.Tensor]):
        """New vision states, and those that waited, -> those that this call places [v, D] or None, and those that wait on."""
        m, state = self.config.vision_config.spatial_merge_size, request.state
        new: list[Optional[torch.Tensor]] = [None] * len(request.new)
        if states is not None:
            per_sample = [
                sum(t * ((h // m) * (w // m) + 1) for t, h, w in own)
                for own in split_by(request.grid, request.media_nums)
            ]
            new = [
                part if frames else None for part, frames in zip(states.split(per_sample), request.new, strict=True)
            ]
            if not state.is_waiting() and all(request.tokens_placed(i) == n for i, n in enumerate(per_sample)):
                return states, state.waiting
        placed, waiting = [], []
        for sample, parts in enumerate(zip(state.waiting, new, strict=True)):
            parts = [part for part in parts if part is not None]
            count = request.tokens_placed(sample)
            whole = torch.cat(parts) if len(parts) > 1 else parts[0] if parts else None
            if count:
                placed.append(whole[:count])
            waiting.append(whole[count:] if whole is not None and len(whole) > count else None)
        return (torch.cat(placed) if len(placed) > 1 else placed[0] if placed else None), waiting


def has_other_ranks() -> bool:
    """Whether this process trains with others, which wait for its gradients."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def kept_rows(logits_to_keep: Union[int, torch.Tensor], length: int) -> Union[slice, torch.Tensor]:
    """The rows, of `length`, whose logits are asked for: as a slice, or as an index [rows].

    Raises:
        ValueError: for rows that are not there.
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
    labels: torch.Tensor, attention_mask: Optional[torch.Tensor], starts_text: Optional[torch.Tensor]
) -> torch.Tensor:
    """What each row of a call predicts, [B, T], -100 for nothing: the label of the next token that is no padding.

    Args:
        labels, attention_mask: see `MossVLForConditionalGeneration.forward`.
        starts_text: bool [B, T], of packed rows where each text begins: the text before it does not predict that token.
    """
    if starts_text is not None:
        labels = labels.masked_fill(starts_text.to(labels.device), IGNORED)
    if attention_mask is None or attention_mask.ndim != 2:
        return F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    length = labels.shape[1]
    is_token = attention_mask[:, attention_mask.shape[1] - length :].to(labels.device).bool()
    places = torch.arange(length, device=labels.device).expand(*labels.shape)
    # is_token [0 1 1 0 1] -> next token, from each place on [1 1 2 4 4] -> after each place [1 2 4 4 -]
    following = places.masked_fill(~is_token, length).flip(1).cummin(1).values.flip(1)
    targets = F.pad(labels, (0, 1), value=IGNORED).gather(1, F.pad(following[:, 1:], (0, 1), value=length))
    return targets.masked_fill(~is_token, IGNORED)


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
        pixel_values,
        grid_thw,
        vision_chunked_length=None,
        image_mean=None,
        image_std=None,
    ) -> BaseModelOutputWithPooling:
        """See `MossVLModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, grid_thw, vision_chunked_length, image_mean, image_std)

    def get_rope_index(self, input_ids, grid_thw=None, attention_mask=None, media_nums_per_sample=None):
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

        A prompt may come in pieces: with `use_cache=True` (or a cache) frames may be given before the text reaches their
        `image_pad`, or with the piece that does. Without a cache, text and frames have to match.

        Args:
            input_ids: [B, T], one `image_pad` for each frame. `inputs_embeds` [B, T, D] may replace the embeddings; frames need
                `input_ids` as well, for their places.
            attention_mask: [B, S], cache included, 0 at padding on either side; or a ready 4D mask for self-attention.
            position_ids: [B, T] or [3, B, T], in place of XRoPE's text positions; positions that only count the tokens of a row mean
                XRoPE's. If they start again within a row, the row holds several packed texts, each of which sees itself and its own
                frames alone.
            cache: any transformers cache, empty or filled by this model.
            labels: [B, T], -100 ignored; next-token cross-entropy, shifted inside. Each token is predicted by the token before it
                that is no padding, so that a sample's loss is the same in every batch; labels of padding are ignored.
            logits_to_keep: logits of the last n rows only (0: all), of the rows at these indices, or of those where a bool [T] is
                True. The loss is that of these rows; each is paired with the label of the next token of the whole sequence.
            pixel_values: [P, channels * time * patch * patch], the media of all samples in the order of the text; float, or levels
                (uint8) with `image_mean` and `image_std`.
            grid_thw: [media, 3], (frames, patch rows, patch columns).
            media_nums_per_sample: media of each sample; told from the text where it is missing.
            cross_attention_mask: bool [B, 1, T, F], True = hidden; default: what the text says. It may hide any frame, and shows none to
                padding or before its `image_pad`. Fewer rows than tokens leave the later tokens to the text, and all of them if the rows are those
                of a processor for other padding. On a filled cache, a mask of
                at most T rows is about the frames that come with the call, if it has as many columns as these are; else about all.
            vision_chunked_length: frames that the vision encoder takes at once, default 64 (in training: all).
            rows_per_sample: text rows that share each sample's media, as beams do.
            prompt_length: tokens of the whole prompt; `image_pad` ids after it are text that the model wrote.
            num_items_in_batch: labels in the whole batch, by which `Trainer` wants the loss divided.
            past_key_values: the older name of `cache`.
            image_features: what `get_image_features` gives for the media, or its `pooler_output` [P / m^2, D], in place of `pixel_values`.
            image_mean, image_std: three numbers for each medium, by which levels are normalised on the encoder's device.
            image_grid_thw: another name of `grid_thw`, by which generic trainers look for it.
            token_type_ids, mm_token_type_ids: taken from processors that return them; they say nothing that `input_ids` do not.

        Raises:
            ValueError: for counts and shapes that do not fit each other, before anything is computed.
        """
        text, kept = input_ids if input_ids is not None else inputs_embeds, slice(None)
        if text is not None:
            kept = kept_rows(logits_to_keep, text.shape[1])
            check_labels(labels, text.shape[:2])
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache_of(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            pixel_values=pixel_values,
            grid_thw=grid_thw,
            media_nums_per_sample=media_nums_per_sample,
            cross_attention_mask=cross_attention_mask,
            vision_chunked_length=vision_chunked_length,
            rows_per_sample=rows_per_sample,
            prompt_length=prompt_length,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            image_features=image_features,
            image_mean=image_mean,
            image_std=image_std,
            image_grid_thw=image_grid_thw,
        )
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            targets = row_targets(labels, attention_mask, outputs.starts_text)
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                shift_labels=targets[
                    :, kept.to(targets.device) if isinstance(kept, torch.Tensor) else kept
                ].contiguous(),
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
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return result if as_dict else result.to_tuple()

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
