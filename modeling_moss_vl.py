"""MOSS-VL: a ViT encoder, and a causal decoder whose gated cross-attention layers read the vision tokens.

Axes: B text rows, T text tokens of this call, S text tokens in all (cache included), D hidden size, H query heads, K key/value
heads, G = H / K, d head size, F frames, P patches, V vision tokens (each frame's tokens and its separator, all samples one
behind the other without padding).
"""

import inspect
from dataclasses import dataclass, replace
from typing import NamedTuple, Optional, Union

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPooling,
    CausalLMOutputWithCrossAttentions,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .configuration_moss_vl import MossVLConfig, MossVLTextConfig, MossVLVisionConfig
from .conversation import PLACEHOLDERS  # noqa: F401 - for generation_utils: transformers 4.57 copies direct imports only
from .generation_utils import MossVLGenerationMixin
from .options import nearest_name
from .patches import normalise
from .vision_sequence import (
    Span,
    VisionCacheLayer,
    VisionCall,
    VisionRequest,
    VisionState,
    count_media,
    plan_call,
    read_grid,
    read_request,
)
from .xrope import frame_positions, grid_rotation, rotate, rotation, walk_text


logger = logging.get_logger(__name__)

# What outputs and `generate` of this transformers call the cache: `cache` from 5.24 on, `past_key_values` before.
CACHE = "cache" if hasattr(CausalLMOutputWithCrossAttentions, "cache") else "past_key_values"

DEFAULT_VISION_CHUNK = 64  # frames the encoder takes at once
TEXT_ROOM = 256  # tokens, at least, that a text cache makes room for at once
MLP_ROWS = 4096  # patches that its MLP takes at once where no gradient is kept
VISION_ROWS = 4096  # vision tokens whose keys and values are made at once where no gradient is kept
# Patches that the encoder takes at once, at most, where no gradient is kept: on a CPU as many as lie in its caches, elsewhere enough to
# keep any GPU busy while large frames do not fill its memory.
CPU_PATCHES, GPU_PATCHES = 1 << 12, 1 << 16
HALF = (torch.float16, torch.bfloat16)
CPU_BFLOAT16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()  # whether this CPU has products in bfloat16
CPU_SCORES = 1 << 22  # attention scores that are there at once on a CPU where they are written out


# ----------------------------------------------------------------------------------------------------------------------
# Attention, once for vision, self- and cross-attention


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0):
    """Softmax attention written out. query [B, H, T, d], key and value [B, K, S, d], mask bool (True = may see) or additive,
    [B or 1, 1, T or 1, S]. Query heads of one group are rows of one product, so keys and values are not repeated.

    Returns:
        [B, T, H, d] and the weights [B, H, T, S].
    """
    (batch, heads, rows, d), kv_heads = query.shape, key.shape[1]
    grouped = (query * scaling).reshape(batch, kv_heads, -1, d)  # [B, K, G * T, d]; scaled before the larger product
    scores = (grouped @ key.transpose(2, 3)).view(batch, heads, rows, -1)
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, float("-inf"))
        else:
            scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1)  # computed in float32 whatever the dtype, rounded at the end
    dropped = F.dropout(weights, p=dropout, training=module.training)
    out = dropped.view(batch, kv_heads, -1, key.shape[2]) @ value
    return out.view(batch, heads, rows, -1).transpose(1, 2), weights


def blockwise_attention_forward(module, query, key, value, attention_mask, scaling, causal=False):
    """`eager_attention_forward` block by block, so that at most `CPU_SCORES` scores are there at once (or a row's); without weights."""
    (batch, heads, rows, d), length = query.shape, key.shape[2]
    rows_a_block = min(rows, max(1, CPU_SCORES // (heads * length)))
    samples = max(1, CPU_SCORES // (heads * length * rows))
    out = query.new_empty(batch, rows, heads, d)
    for sample in range(0, batch, samples):
        own = slice(sample, sample + samples)
        for first in range(0, rows, rows_a_block):
            part = slice(first, min(first + rows_a_block, rows))
            seen, mask = slice(0, part.stop if causal else length), attention_mask
            if causal:
                mask = torch.ones(part.stop - first, part.stop, dtype=torch.bool, device=query.device).tril(first)[None, None]
            elif mask is not None:
                mask = mask.expand(batch, -1, rows, -1)[own, :, part]
            out[own, part], _ = eager_attention_forward(
                module, query[own, :, part], key[own, :, seen], value[own, :, seen], mask, scaling
            )
    return out


def attend(module, query, key, value, mask, implementation, *, causal=False, dropout=0.0):
    """One attention call. Shapes as in `eager_attention_forward`; `causal` where `mask` is None and T = S, or T = 1.

    Returns:
        [B, T, H, d], and the weights where the implementation is eager, else None.
    """
    scaling, dropout = module.scaling, dropout if module.training else 0.0
    (batch, heads, rows, d), kv_heads = query.shape, key.shape[1]
    causal = causal and rows > 1
    if implementation == "eager":
        if causal:
            mask = torch.ones(rows, rows, dtype=torch.bool, device=query.device).tril()[None, None]
        return eager_attention_forward(module, query, key, value, mask, scaling, dropout)
    inference = not (torch.is_grad_enabled() or dropout)
    if implementation == "sdpa" and inference and query.device.type == "cpu" and query.dtype == torch.bfloat16 and CPU_BFLOAT16 and (
        rows > 1 or key.is_contiguous()
    ):
        # torch's own kernel is no faster there in bfloat16 than in float32; two products and a softmax are.
        return blockwise_attention_forward(module, query, key, value, mask, scaling, causal), None
    groups = heads // kv_heads
    tiled = mask is not None and rows > 1 and not causal and mask.numel() * groups <= key.numel()  # the mask is less to copy than the keys
    if implementation == "sdpa" and groups > 1 and (rows == 1 or tiled or (mask is None and not causal)):
        # Nothing tells the heads of a group apart but their queries: as rows of one head they read the keys once.
        grouped = query.reshape(batch, kv_heads, -1, d)
        mask = mask.expand(-1, -1, rows, -1).repeat(1, 1, groups, 1) if tiled else mask
        out = F.scaled_dot_product_attention(grouped, key, value, mask, dropout_p=dropout, scale=scaling)
        return out.view(batch, heads, rows, -1).transpose(1, 2), None
    attention = ALL_ATTENTION_FUNCTIONS[implementation]
    out, _ = attention(module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=causal)
    return out, None


def usable_implementation(name: Optional[str], states: torch.Tensor, need_weights: bool = False) -> str:
    """The attention implementation for this call: eager where weights are asked for, sdpa where flash-attention cannot run."""
    if need_weights:
        return "eager"
    if name is None:
        return "sdpa"
    if "flash" in name and (states.device.type == "cpu" or states.dtype not in HALF):
        logger.warning_once(
            f"{name} does not run on {states.device.type} in {states.dtype}; sdpa is used. Load the model in bfloat16 on CUDA."
        )
        return "sdpa"
    return name


# ----------------------------------------------------------------------------------------------------------------------
# Vision encoder


class FrameRun(NamedTuple):
    """`frames` frames in a row that share a grid of `rows` x `columns` patches."""

    frames: int
    rows: int
    columns: int

    @property
    def patches(self) -> int:
        return self.frames * self.rows * self.columns


def frame_runs(grid_thw) -> list[FrameRun]:
    """[[t, h, w], ...] -> runs of equal grids, in order."""
    runs: list[FrameRun] = []
    for t, h, w in grid_thw:
        if runs and runs[-1][1:] == (h, w):
            runs[-1] = runs[-1]._replace(frames=runs[-1].frames + t)
        else:
            runs.append(FrameRun(t, h, w))
    return runs


def chunk_runs(runs: list[FrameRun], frames: int, patches: Optional[int] = None) -> list[list[FrameRun]]:
    """Cuts runs into chunks of at most `frames` frames, and of at most `patches` patches where more than one frame is in them."""
    chunks, room, patch_room = [], 0, 0
    patches = sum(run.patches for run in runs) if patches is None else patches
    for run in runs:
        left, of_frame = run.frames, run.rows * run.columns
        while left:
            taken = min(left, room, patch_room // of_frame)
            if not taken:
                chunks.append([])
                room, patch_room = frames, max(patches, of_frame)
                continue
            chunks[-1].append(run._replace(frames=taken))
            left, room, patch_room = left - taken, room - taken, patch_room - taken * of_frame
    return chunks


def patch_statistics(of_media, grid: list[list[int]], sizes: list[int]) -> list:
    """Three numbers for each medium -> for each chunk of `sizes` patches: three numbers where all media have the same, else
    [patches, 3]. None for each where there are none."""
    if of_media is None or all(list(row) == list(of_media[0]) for row in of_media):
        return [None if of_media is None else of_media[0]] * len(sizes)
    counts = torch.tensor([t * h * w for t, h, w in grid])
    return list(torch.tensor(of_media, dtype=torch.float64).repeat_interleave(counts, dim=0).split(sizes))


def with_separators(features: torch.Tensor, runs: list[FrameRun], merge: int, separator: Optional[torch.Tensor]) -> torch.Tensor:
    """Features [tokens, D] of frames -> the same with the separator [D] behind each frame, where one is given."""
    if separator is None:
        return features
    pieces = []
    for run, part in zip(runs, features.split([run.patches // merge**2 for run in runs])):
        part = part.unflatten(0, (run.frames, -1))  # [frames, tokens, D]
        pieces.append(torch.cat([part, separator.to(part).expand(run.frames, 1, -1)], dim=1).flatten(0, 1))
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def gather_rows(parts, rows: int) -> torch.Tensor:
    """Tensors [n, D] with `rows` rows in all -> one; each is let go before the next is asked for. Not for gradients."""
    out, at = None, 0
    for part in parts:
        out = part.new_empty(rows, part.shape[1]) if out is None else out
        out[at : at + len(part)] = part
        at += len(part)
    return out


class MossVLVisionPatchProjection(nn.Conv3d):
    """A convolution whose kernel is one patch, as the linear map it is."""

    def forward(self, pixel_values, image_mean=None, image_std=None):
        """[P, values], levels (uint8) with their means and standard deviations, [3] or [P, 3] -> [P, hidden]"""
        if pixel_values.dtype == torch.uint8:
            pixel_values = normalise(pixel_values.to(self.weight.device), image_mean, image_std)
        return F.linear(pixel_values.to(self.weight), self.weight.flatten(1), self.bias)


class MossVLVisionPatchEmbed(nn.Module):
    def __init__(self, config: MossVLVisionConfig):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = MossVLVisionPatchProjection(config.in_channels, config.hidden_size, kernel, stride=kernel)

    def forward(self, pixel_values: torch.Tensor, image_mean=None, image_std=None) -> torch.Tensor:
        """[P, channels * time * row * column] -> [P, hidden]"""
        return self.proj(pixel_values, image_mean, image_std)


class MossVLVisionMLP(nn.Module):
    def __init__(self, config: MossVLVisionConfig):
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states):
        if torch.is_grad_enabled():
            return self.linear_fc2(self.act_fn(self.linear_fc1(hidden_states)))
        out = torch.empty_like(hidden_states)  # rows by rows: the wide layer of a whole chunk is its largest tensor
        for rows, out_rows in zip(hidden_states.split(MLP_ROWS), out.split(MLP_ROWS)):
            out_rows.copy_(self.linear_fc2(self.act_fn(self.linear_fc1(rows))))
        return out


class MossVLVisionAttention(nn.Module):
    def __init__(self, config: MossVLVisionConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_heads
        self.head_dim = config.hidden_size // config.num_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, runs, rotations, implementation):
        qkv = self.qkv(hidden_states)  # [P, 3 * hidden]
        outs = []
        for run, part, (cos, sin) in zip(runs, qkv.split([run.patches for run in runs]), rotations):
            part = part.view(run.frames, -1, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
            query, key = (rotate(one.float(), cos, sin).to(part.dtype) for one in part[:2])  # [frames, heads, rows * columns, d] each
            out, _ = attend(self, query, key, part[2], None, implementation)
            outs.append(out.reshape(run.patches, -1))
        return self.proj(torch.cat(outs) if len(outs) > 1 else outs[0])


class MossVLVisionBlock(GradientCheckpointingLayer):
    def __init__(self, config: MossVLVisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = MossVLVisionAttention(config)
        self.mlp = MossVLVisionMLP(config)

    def forward(self, hidden_states, runs, rotations, implementation):
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), runs, rotations, implementation)
        return hidden_states + self.mlp(self.norm2(hidden_states))


class MossVLVisionMerger(nn.Module):
    """Last and kept features of m x m patches -> one vision token."""

    def __init__(self, config: MossVLVisionConfig):
        super().__init__()
        features = len(config.deepstack_visual_indexes) + 1
        self.merged_size = features * config.hidden_size * config.spatial_merge_size**2
        self.norms = nn.ModuleList(
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) for _ in range(features)
        )
        self.linear_fc1 = nn.Linear(self.merged_size, self.merged_size)
        self.act_fn = nn.GELU()
        self.linear_fc2 = nn.Linear(self.merged_size, config.out_hidden_size)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """[last, kept...], each [P, hidden] -> [P / m^2, out]"""
        merged = torch.cat([norm(feature) for norm, feature in zip(self.norms, features)], dim=-1)
        merged = self.linear_fc1(merged.view(-1, self.merged_size))
        return self.linear_fc2(self.act_fn(merged))


class MossVLPreTrainedModel(PreTrainedModel):
    config_class = MossVLConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MossVLVisionBlock", "MossVLSelfAttentionLayer", "MossVLCrossAttentionLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values", "layer_past"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MossVLCrossAttentionLayer):
            nn.init.zeros_(module.cross_attn_attn_gate)
            nn.init.zeros_(module.cross_attn_mlp_gate)
        elif isinstance(module, MossVLModel):
            nn.init.zeros_(module.separator_token)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # read from the config at every call

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs):
        try:
            return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)
        except (ImportError, ValueError) as error:
            if attn_implementation is None or not attn_implementation.startswith("flash_attention"):
                raise
            logger.warning_once(f"{attn_implementation} cannot be used here, sdpa is used instead. The reason: {error}")
            return super()._check_and_adjust_attn_implementation("sdpa", *args, **kwargs)


class MossVLVisionModel(MossVLPreTrainedModel):
    config_class = MossVLVisionConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["MossVLVisionBlock"]

    def __init__(self, config: MossVLVisionConfig):
        super().__init__(config)
        self.head_dim = config.hidden_size // config.num_heads
        self.spatial_merge_size = config.spatial_merge_size
        self.patch_embed = MossVLVisionPatchEmbed(config)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(MossVLVisionBlock(config) for _ in range(config.depth))
        self.merger = MossVLVisionMerger(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.patch_embed

    def forward(
        self, pixel_values: torch.Tensor, grid_thw, vision_chunked_length: Optional[int] = None, image_mean=None, image_std=None,
        separator: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:  # fmt: skip
        """Encodes frames, `vision_chunked_length` at a time; attention never leaves a frame.

        Args:
            pixel_values: [P, channels * time * patch * patch], patches merge block by merge block.
            grid_thw: [media, 3], (frames, patch rows, patch columns): a tensor or nested list.
            vision_chunked_length: frames a chunk at most; default 64, in training all at once. Large frames make smaller chunks.
            image_mean, image_std: where `pixel_values` are levels (uint8), three numbers for each medium.
            separator: [out_hidden_size], put behind each frame's tokens where it is given.

        Returns:
            [P / m^2, out_hidden_size], row-major over merge blocks, frame after frame; with a separator one row more a frame.

        Raises:
            ValueError: if pixels and grid do not fit each other, or the model.
        """
        grid = read_grid(pixel_values, grid_thw, self.config, image_mean, image_std)
        if vision_chunked_length is None:
            vision_chunked_length = max(1, sum(t for t, _, _ in grid)) if self.training else DEFAULT_VISION_CHUNK
        elif not isinstance(vision_chunked_length, int) or vision_chunked_length < 1:
            raise ValueError(f"`vision_chunked_length` is {vision_chunked_length!r}; expected a positive number of frames.")
        patches = None if torch.is_grad_enabled() else CPU_PATCHES if self.device.type == "cpu" else GPU_PATCHES
        chunks = chunk_runs(frame_runs(grid), vision_chunked_length, patches)
        sizes = [sum(run.patches for run in chunk) for chunk in chunks]
        statistics = [patch_statistics(given, grid, sizes) for given in (image_mean, image_std)]
        places = {}  # of each size of frame
        parts = (
            with_separators(self._encode(part, chunk, *own, places), chunk, self.spatial_merge_size, separator)
            for part, chunk, *own in zip(pixel_values.split(sizes), chunks, *statistics)
        )
        if len(chunks) == 1 or torch.is_grad_enabled():
            parts = list(parts)
            return torch.cat(parts) if len(parts) > 1 else parts[0]
        rows = sum(sizes) // self.spatial_merge_size**2 + (0 if separator is None else sum(t for t, _, _ in grid))
        return gather_rows(parts, rows)

    def _encode(self, pixel_values: torch.Tensor, runs: list[FrameRun], image_mean, image_std, positions: dict) -> torch.Tensor:
        """Features of a chunk [P / m^2, out]. `positions`: those worked out so far in this call, by the size of the frame."""
        hidden_states = self.patch_embed(pixel_values, image_mean, image_std)
        for run in runs:
            if run[1:] not in positions:
                positions[run[1:]] = self._positions(run, hidden_states)
        places, rotations = zip(*(positions[run[1:]] for run in runs))
        parts = hidden_states.split([run.patches for run in runs])
        parts = [part.unflatten(0, (run.frames, -1)) + place for run, part, place in zip(runs, parts, places)]
        hidden_states = torch.cat([part.flatten(0, 1) for part in parts]) if len(parts) > 1 else parts[0].flatten(0, 1)
        del parts
        implementation = usable_implementation(self.config._attn_implementation, hidden_states)
        kept = []
        for index, block in enumerate(self.blocks):
            hidden_states = block(hidden_states, runs, rotations, implementation)
            if index in self.config.deepstack_visual_indexes:
                kept.append(hidden_states)
        return self.merger([hidden_states, *kept])

    def _positions(self, run: FrameRun, like: torch.Tensor):
        """Learned positions [rows * columns, hidden] and rotations [rows * columns, d] of a frame, in merge-block order."""
        m, device = self.spatial_merge_size, like.device
        # [block rows, 1, m, 1] x [1, block columns, 1, m] -> block row, block column, row in block, column in block
        rows = torch.arange(run.rows, device=device).view(-1, 1, m, 1)
        columns = torch.arange(run.columns, device=device).view(1, -1, 1, m)
        rows, columns = (part.flatten() for part in torch.broadcast_tensors(rows, columns))

        side = round(self.config.num_position_embeddings**0.5)
        y = torch.linspace(0, side - 1, run.rows, device=device)[rows]
        x = torch.linspace(0, side - 1, run.columns, device=device)[columns]
        y0, x0 = y.long(), x.long()
        y1, x1 = (y0 + 1).clamp(max=side - 1), (x0 + 1).clamp(max=side - 1)
        dy, dx = (y - y0)[:, None], (x - x0)[:, None]
        corners = self.pos_embed(torch.stack([y0 * side + x0, y0 * side + x1, y1 * side + x0, y1 * side + x1])).float()
        weights = torch.stack([(1 - dy) * (1 - dx), (1 - dy) * dx, dy * (1 - dx), dy * dx])
        return (corners * weights).sum(0).to(like.dtype), grid_rotation(rows, columns, self.head_dim)


# ----------------------------------------------------------------------------------------------------------------------
# Decoder


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

    def queries(self, states: torch.Tensor, table) -> torch.Tensor:
        """[B, T, D] -> [B, H, T, d], normalised and rotated."""
        query = self.q_norm(self.q_proj(states).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        return rotate(query, *table)

    def keys_values(self, states: torch.Tensor, table) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, S, D] -> two of [B, K, S, d]; the keys normalised and rotated."""
        key = self.k_norm(self.k_proj(states).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        return rotate(key, *table), self.v_proj(states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MossVLSelfAttention(MossVLTextAttention):
    is_causal = True

    def forward(self, hidden_states, table, mask, implementation, cache=None, cache_position=None):
        """hidden_states [B, T, D] -> the same, and the weights [B, H, T, S] or None."""
        query = self.queries(hidden_states, table)
        key, value = self.keys_values(hidden_states, table)
        if cache is not None:
            # Where the tokens stand: the static cache of transformers 4 asks for it.
            key, value = cache.update(key, value, self.layer_idx, {"cache_position": cache_position})
        out, weights = attend(
            self, query, key, value, mask, implementation, causal=mask is None, dropout=self.attention_dropout
        )
        return self.o_proj(out.flatten(2)), weights


class MossVLCrossAttention(MossVLTextAttention):
    is_causal = False

    def forward(
        self, hidden_states, vision_states, table, vision_table, call, implementation, cache=None, output_attentions=False,
    ):  # fmt: skip
        """hidden_states [B, T, D] read the packed vision sequence, each span of rows its own tokens.

        Args:
            vision_states: [v, D], the vision tokens that are new in this call, or None.
            vision_table: their rotation, two of [v, d].

        Returns:
            [B, T, D], and where they are asked for (eager alone has them) the weights [B, H, T, longest sample's V], else None.
        """
        key = value = None
        if vision_states is not None:
            key, value = self.vision_keys_values(vision_states, vision_table)
        if cache is not None:
            key, value = cache.layers[self.layer_idx].store(key, value, call)
        query = self.queries(hidden_states, table).transpose(1, 2).flatten(0, 1)  # [B * T, H, d]
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
                "sdpa" if keep is not None and implementation != "eager" else implementation,
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

    def vision_keys_values(self, states: torch.Tensor, table) -> tuple[torch.Tensor, torch.Tensor]:
        """[v, D] -> two of [1, K, v, d]. Without gradients they are made piece by piece, and each head's lie together in memory: as every
        token to come reads them."""
        if torch.is_grad_enabled():
            return self.keys_values(states[None], table)
        key, value = (states.new_empty(1, self.num_key_value_heads, len(states), self.head_dim) for _ in range(2))
        for first in range(0, len(states), VISION_ROWS):
            part = slice(first, first + VISION_ROWS)
            key[:, :, part], value[:, :, part] = self.keys_values(states[None, part], tuple(angles[part] for angles in table))
        return key, value

    @staticmethod
    def _all_weights(weights: list[torch.Tensor], call: VisionCall, like: torch.Tensor, heads: int) -> torch.Tensor:
        widest = max((span.tokens.stop - span.tokens.start for span in call.spans), default=0)
        out = like.new_zeros(like.shape[0] * like.shape[1], heads, widest)
        for span, weight in zip(call.spans, weights):
            out[span.rows, :, : weight.shape[-1]] = weight[0].transpose(0, 1)
        return out.unflatten(0, like.shape[:2]).transpose(1, 2)


class MossVLSelfAttentionLayer(GradientCheckpointingLayer):
    def __init__(self, config: MossVLTextConfig, layer_idx: int):
        super().__init__()
        self.self_attn = MossVLSelfAttention(config, layer_idx)
        self.mlp = MossVLTextMLP(config)
        self.input_layernorm = MossVLRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = MossVLRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, table, mask, implementation, layer_past=None, cache_position=None):
        """layer_past: the cache, by the one name under which every transformers keeps it from a layer that is checkpointed."""
        attended, weights = self.self_attn(
            self.input_layernorm(hidden_states), table, mask, implementation, layer_past, cache_position
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), weights


class MossVLCrossAttentionLayer(GradientCheckpointingLayer):
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
        self, hidden_states, vision_states, table, vision_table, call, implementation, layer_past=None,
        output_attentions=False,
    ):  # fmt: skip
        attended, weights = self.cross_attn(
            self.input_layernorm(hidden_states), vision_states, table, vision_table, call, implementation, layer_past,
            output_attentions,
        )  # fmt: skip
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
    """

    rope_deltas: Optional[torch.LongTensor] = None


@dataclass
class MossVLCausalLMOutput(CausalLMOutputWithCrossAttentions):
    """`MossVLModelOutput` with `logits` [B, rows asked for, vocab] in place of the last hidden state, and `loss` where labels are
    given."""

    rope_deltas: Optional[torch.LongTensor] = None


class MossVLTextModel(MossVLPreTrainedModel):
    config_class = MossVLTextConfig
    _no_split_modules = ["MossVLSelfAttentionLayer", "MossVLCrossAttentionLayer"]

    def __init__(self, config: MossVLTextConfig):
        super().__init__(config)
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
    ) -> MossVLModelOutput:
        """The decoder layers and the final norm.

        Args:
            input_ids [B, T] or inputs_embeds [B, T, D].
            attention_mask: [B, S] with 0 at padding, or a ready 4D mask [B, 1, T, S], bool (True = may see) or additive.
            position_ids: [B, T], or [3, B, T] for t, h, w; default: counting on from the cache.
            vision_states [v, D], vision_position_ids [3, v], vision_call: the vision tokens new in this call, and who sees what;
                where nothing is seen or new, the cross-attention layers are skipped.
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
        angles = (config.head_dim, rope["rope_theta"], rope["mrope_section"], hidden_states.dtype)
        table = tuple(part[:, None] for part in rotation(position_ids.to(hidden_states.device), *angles))  # [B, 1, T, d]
        vision_table = None
        if vision_states is not None:
            vision_table = rotation(vision_position_ids.to(hidden_states.device), *angles)  # [v, d]
        implementation = usable_implementation(config._attn_implementation, hidden_states, output_attentions)
        if "flash" in implementation and static_length(cache) is not None:
            implementation = "sdpa"  # the empty slots of a static cache need a mask
        mask = causal_mask(attention_mask, hidden_states, cache, implementation)

        all_states, attentions, cross_attentions = [], [], []
        for layer in self.layers:
            if output_hidden_states:
                all_states.append(hidden_states)
            if isinstance(layer, MossVLSelfAttentionLayer):
                hidden_states, weights = layer(
                    hidden_states, table, mask, implementation, layer_past=cache, cache_position=cache_position
                )
                if output_attentions:
                    attentions.append(weights)
            elif vision_call is not None and (vision_call.spans or vision_call.writes):
                hidden_states, weights = layer(
                    hidden_states, vision_states, table, vision_table, vision_call, implementation,
                    layer_past=cache, output_attentions=output_attentions,
                )  # fmt: skip
                cross_attentions.append(weights)
        hidden_states = self.norm(hidden_states)
        return MossVLModelOutput(
            last_hidden_state=hidden_states,
            **{CACHE: cache},
            hidden_states=(*all_states, hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            cross_attentions=tuple(cross_attentions) if output_attentions else None,
        )


def cache_of(cache: Optional[Cache], past_key_values: Optional[Cache]) -> Optional[Cache]:
    """The cache that a caller gave by its name, or by the one it had before transformers 5.24."""
    if cache is not None and past_key_values is not None:
        raise ValueError(
            f"The cache was given twice, as `cache` and as `past_key_values`; expected one of them. `generate` of this transformers "
            f"calls it `{CACHE}`."
        )
    return past_key_values if cache is None else cache


def cached_length(cache: Optional[Cache]) -> int:
    """Text tokens in the cache (layer 0 is always self-attention)."""
    return 0 if cache is None else int(cache.get_seq_length())


def static_length(cache: Optional[Cache]) -> Optional[int]:
    """Slots of a static cache, which it returns all of, the empty ones too; None for a cache that grows."""
    return getattr(cache.layers[0], "max_cache_len", None) if cache is not None and cache.layers else None


def causal_mask(
    attention_mask: Optional[torch.Tensor], hidden_states: torch.Tensor, cache: Optional[Cache], implementation: str
) -> Optional[torch.Tensor]:
    """What the self-attention layers take as mask: None where plain causality says it all, a 2D padding mask for
    flash-attention, else bool [B, 1, T, S]. A token always sees itself, so that no row of a softmax is empty."""
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask.to(hidden_states.device)
    rows, past = hidden_states.shape[1], cached_length(cache)
    known = past + rows
    slots = static_length(cache) if static_length(cache) is not None else known
    padded = attention_mask is not None and not bool(attention_mask.all())
    if "flash" in implementation:
        return attention_mask if padded else None
    if not padded and slots == known and (rows == 1 or past == 0):
        return None
    at = torch.arange(slots, device=hidden_states.device)
    row_at = at[past:known, None]
    mask = (at <= row_at)[None, None]  # [1, 1, T, S]
    if padded:
        may_see = F.pad(attention_mask.to(hidden_states.device).bool(), (0, slots - known))
        mask = mask & may_see[:, None, None, :] | (at == row_at)
    return mask


# ----------------------------------------------------------------------------------------------------------------------
# The whole


class MossVLModel(MossVLPreTrainedModel):
    """Vision encoder, separator and decoder, without a head."""

    def __init__(self, config: MossVLConfig):
        super().__init__(config)
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
        self, pixel_values, grid_thw, vision_chunked_length=None, image_mean=None, image_std=None,
    ) -> BaseModelOutputWithPooling:  # fmt: skip
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
        request = read_request(
            self.config, None, 0, input_ids, attention_mask, None, grid_thw, media_nums_per_sample
        )
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
    ) -> MossVLModelOutput:
        """See `MossVLForConditionalGeneration.forward`."""
        cache = cache_of(cache, past_key_values)
        incremental = use_cache is True or cache is not None
        if use_cache is None:
            use_cache = self.config.text_config.use_cache and not self.training
        cache = DynamicCache() if use_cache and cache is None else cache
        if input_ids is None and inputs_embeds is None:
            raise ValueError("Neither `input_ids` nor `inputs_embeds` was given; expected one of them.")
        request = read_request(
            self.config,
            vision_state(cache, self.config.text_config),
            cached_length(cache),
            input_ids if input_ids is not None else inputs_embeds,
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
        state, call = plan_call(request)
        text_positions, vision_position_ids, rope_deltas = self._place(request)
        if position_ids is None:
            position_ids = text_positions
        elif position_ids.shape[-2:] != request.is_token.shape or position_ids.shape[:-2] not in ((), (3,)):
            raise ValueError(
                f"`position_ids` has shape {list(position_ids.shape)}; expected {list(request.is_token.shape)}, or the same behind a "
                f"leading 3 for (t, h, w): one position for each token of this call."
            )
        else:
            highest = position_ids if position_ids.ndim == 2 else position_ids.amax(0)
            rope_deltas = highest.amax(1) + 1 - request.past_length - request.is_token.shape[1]

        if inputs_embeds is None:
            inputs_embeds = self.language_model.embed_tokens(input_ids)
        vision_states, waiting = None, request.state.waiting
        if request.grid and any(request.new):
            if image_features is None:
                states = self.visual(pixel_values, request.grid, vision_chunked_length, image_mean, image_std, self.separator_token)
            else:
                runs, merge = frame_runs(request.grid), self.config.vision_config.spatial_merge_size
                states = with_separators(image_features.to(inputs_embeds), runs, merge, self.separator_token)
            vision_states, waiting = self._take_placed(request, states)
            del states
        elif request.state.is_waiting():
            vision_states, waiting = self._take_placed(request, None)
        elif pixel_values is not None and self.training and cache is None:
            # Blank media only. They are read all the same, times 0: every parameter gets a gradient on every rank.
            vision_states = self.visual(pixel_values, request.grid, None, image_mean, image_std, self.separator_token)
            vision_position_ids = request.is_token.new_zeros(3, len(vision_states), dtype=torch.long)
            call = VisionCall(
                spans=[Span(slice(0, request.is_token.numel()), slice(0, len(vision_states)))],
                sees=torch.zeros_like(request.is_token, dtype=vision_states.dtype)[..., None],
                length=len(vision_states),
            )
        if cache is not None:
            vision_cache_layer = install_layers(cache, self.config.text_config)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            vision_states=vision_states,
            vision_position_ids=vision_position_ids,
            vision_call=call,
            output_attentions=self.config.output_attentions if output_attentions is None else output_attentions,
            output_hidden_states=self.config.output_hidden_states if output_hidden_states is None else output_hidden_states,
        )
        if cache is not None:
            vision_cache_layer.state = replace(state, waiting=waiting, rope_delta=rope_deltas)
        outputs.rope_deltas = rope_deltas
        return outputs

    def _place(self, request: VisionRequest):
        """Text positions [B, T], positions of the frames placed in this call [3, v], rope_deltas [B]."""
        state, device = request.state, request.is_token.device
        start = torch.full((len(state.row_sample),), request.past_length, device=device)
        if state.rope_delta is not None:
            start = start + state.rope_delta.to(device)
        if request.is_token.shape[1] == 1 and not any(request.pads):
            behind = start + request.is_token[:, 0]
            return start[:, None].masked_fill(~request.is_token, 0), start.new_zeros(3, 0), behind - request.past_length - 1
        extents = [max(grid) for sample in state.row_sample for grid in request.frames_placed(sample)]
        text, origins, behind = walk_text(
            request.is_token, request.is_frame, torch.tensor(extents, dtype=torch.long, device=device), start
        )
        rope_deltas = behind - request.past_length - request.is_token.shape[1]
        origins = state.of_samples(origins.split([request.pads[sample] for sample in state.row_sample]), origins[:0])
        pieces = []
        for sample, of_sample in enumerate(origins):
            runs = frame_runs((1, h, w) for h, w in request.frames_placed(sample))
            for run, origin in zip(runs, of_sample.split([run.frames for run in runs])):
                pieces.append(frame_positions(origin, run.rows, run.columns))
        vision = torch.cat(pieces, dim=1) if pieces else torch.zeros(3, 0, dtype=torch.long, device=device)
        return text, vision, rope_deltas

    def _take_placed(self, request: VisionRequest, states: Optional[torch.Tensor]):
        """New vision states, and those that waited, -> those that this call places [v, D] or None, and those that wait on."""
        m, state = self.config.vision_config.spatial_merge_size, request.state
        new: list[Optional[torch.Tensor]] = [None] * len(request.new)
        if states is not None:
            media = iter(request.grid)
            per_sample = [
                sum(t * ((h // m) * (w // m) + 1) for t, h, w in (next(media) for _ in range(count)))
                for count in request.media_nums
            ]
            new = [part if frames else None for part, frames in zip(states.split(per_sample), request.new)]
            if not state.is_waiting() and all(request.tokens_placed(i) == n for i, n in enumerate(per_sample)):
                return states, state.waiting
        placed, waiting = [], []
        for sample, parts in enumerate(zip(state.waiting, new)):
            parts = [part for part in parts if part is not None]
            count = request.tokens_placed(sample)
            whole = torch.cat(parts) if len(parts) > 1 else parts[0] if parts else None
            if count:
                placed.append(whole[:count])
            waiting.append(whole[count:] if whole is not None and len(whole) > count else None)
        return (torch.cat(placed) if len(placed) > 1 else placed[0] if placed else None), waiting


class TextCacheLayer(DynamicLayer):
    """Keys and values [B, K, S, d] of the text, with room behind them: a new token is written into it, and no token moves those before
    it until the room is full."""

    def __init__(self):
        super().__init__()
        self._rooms: list[Optional[torch.Tensor]] = [None, None]  # of keys and values, which are views of their beginnings

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        before = (self.keys, self.values) if self.get_seq_length() else (None, None)
        parts = [append(*part) for part in zip(before, self._rooms, (key_states, value_states))]
        (self.keys, _), (self.values, _) = parts
        self._rooms = [room for _, room in parts]
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        return self.keys, self.values

    def reset(self) -> None:
        super().reset()
        self._rooms = [None, None]


def append(past: Optional[torch.Tensor], room: Optional[torch.Tensor], new: torch.Tensor) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
    """Puts `new` [B, K, T, d] behind `past` [B, K, S, d]: -> both [B, K, S + T, d], and the room they lie in. `room` is used where `past`
    lies in it (what was done to a cache in between may have put it elsewhere) and it is long enough. With gradients nothing is
    written over: without a room."""
    if torch.is_grad_enabled() and (new.requires_grad or (past is not None and past.requires_grad)):
        return (new if past is None else torch.cat([past, new], dim=-2)), None
    length = 0 if past is None else past.shape[-2]
    total = length + new.shape[-2]
    in_room = room is not None and past is not None and past.data_ptr() == room.data_ptr() and past.shape[:-2] == room.shape[:-2]
    if not in_room or room.shape[-2] < total:
        room = new.new_empty(*new.shape[:-2], total + max(TEXT_ROOM, total // 8), new.shape[-1])
        if length:
            room[..., :length, :] = past
    room[..., length:total, :] = new
    return room[..., :total, :], room


def install_layers(cache: Cache, config: MossVLTextConfig) -> VisionCacheLayer:
    """Makes the cross-attention layers of an empty cache hold vision keys and values, and its plain layers grow in place; returns the
    one that holds the vision state."""
    if cached_length(cache) == 0:
        while len(cache.layers) < config.num_hidden_layers:
            cache.layers.append(cache.layer_class_to_replicate())
        for index, layer in enumerate(cache.layers):
            if index in config.cross_attention_layers:
                cache.layers[index] = VisionCacheLayer()
            elif type(layer) is DynamicLayer and not getattr(cache, "offloading", False):
                cache.layers[index] = TextCacheLayer()
    return cache.layers[config.cross_attention_layers[0]]


def vision_state(cache: Optional[Cache], config: MossVLTextConfig) -> Optional[VisionState]:
    """The state that a cache in use carries; None where there is nothing in the cache."""
    if cached_length(cache) == 0:
        return None
    layer = cache.layers[config.cross_attention_layers[0]]
    if not isinstance(layer, VisionCacheLayer) or layer.state is None:
        raise ValueError(
            f"The cache holds {cached_length(cache)} tokens, but not their vision sequence; expected a cache that this model "
            f"filled. Pass an empty cache, or that of an earlier output."
        )
    return layer.state


class MossVLForConditionalGeneration(MossVLPreTrainedModel, MossVLGenerationMixin, GenerationMixin):
    """MOSS-VL with its language model head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    accepts_loss_kwargs = True

    def __init__(self, config: MossVLConfig):
        super().__init__(config)
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
        self, pixel_values, grid_thw, vision_chunked_length=None, image_mean=None, image_std=None,
    ) -> BaseModelOutputWithPooling:  # fmt: skip
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
    ) -> Union[MossVLCausalLMOutput, tuple]:
        """One pass over text and the frames that come with it.

        A prompt may come in pieces: with `use_cache=True` (or a cache) frames may be given before the text reaches their
        `image_pad`, or with the piece that does. Without a cache, text and frames have to match.

        Args:
            input_ids: [B, T], one `image_pad` for each frame. `inputs_embeds` [B, T, D] may replace the embeddings; frames need
                `input_ids` as well, for their places.
            attention_mask: [B, S], cache included, 0 at padding on either side; or a ready 4D mask for self-attention.
            position_ids: [B, T] or [3, B, T], in place of XRoPE's text positions.
            cache: any transformers cache, empty or filled by this model.
            labels: [B, T], -100 ignored; next-token cross-entropy, shifted inside.
            logits_to_keep: logits of the last n rows only (0: all), or of the rows at these indices.
            pixel_values: [P, channels * time * patch * patch], the media of all samples in the order of the text; float, or levels
                (uint8) with `image_mean` and `image_std`.
            grid_thw: [media, 3], (frames, patch rows, patch columns).
            media_nums_per_sample: media of each sample; told from the text where it is missing.
            cross_attention_mask: bool [B, 1, T, F], True = hidden; default: what the text says. Any mask is obeyed.
            vision_chunked_length: frames that the vision encoder takes at once, default 64 (in training: all).
            rows_per_sample: text rows that share each sample's media, as beams do.
            prompt_length: tokens of the whole prompt; `image_pad` ids behind it are text that the model wrote.
            num_items_in_batch: labels in the whole batch, by which `Trainer` wants the loss divided.
            past_key_values: the older name of `cache`.
            image_features: [P / m^2, D], what `get_image_features` gives for the media, in place of `pixel_values`.
            image_mean, image_std: three numbers for each medium, by which levels are normalised on the encoder's device.

        Raises:
            ValueError: for counts and shapes that do not fit each other, before anything is computed.
        """
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
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels[:, kept],
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

    # ------------------------------------------------------------------------------------------------------------------
    # Hooks of `generate`. What belongs to the prompt rides in one entry of the model kwargs, `prompt_kwargs`; once the prompt is
    # in the cache the entry is dropped, since the cache knows.

    def _validate_model_kwargs(self, model_kwargs):
        """Checks names, and a whole prompt against its media: forward may get it in chunks."""
        known = set(inspect.signature(self.forward).parameters)
        for name in [name for name, value in model_kwargs.items() if value is not None and name not in known]:
            near = nearest_name(name, {*known, *self.generation_config.to_dict()})
            hint = f"; did you mean `{near}`?" if near else ""
            raise ValueError(f"`{name}` is neither an input of this model nor a setting of `generate`{hint}")
        super()._validate_model_kwargs(model_kwargs)
        ids, cache = model_kwargs.get("input_ids"), model_kwargs.get(CACHE)
        if ids is not None and ids.shape[1] and cached_length(cache) == 0:
            prompt = {name: model_kwargs[name] for name in ("attention_mask", *MEDIA_KWARGS) if name in model_kwargs}
            read_request(self.config, None, 0, ids, **prompt)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Repeats text rows for beams and answers; the media stay as they are, shared by the rows of their sample."""
        prompt = {name: model_kwargs.pop(name, None) for name in ("position_ids", *MEDIA_KWARGS)}
        prompt = {name: value for name, value in prompt.items() if value is not None}
        cache = model_kwargs.get(CACHE)
        past_length, length = cached_length(cache), input_ids.shape[1] if input_ids is not None else 0
        if length and past_length == 0:
            model_kwargs["prompt_length"] = length
        if expand_size > 1:
            if past_length:
                cache.batch_repeat_interleave(expand_size)
            else:
                model_kwargs["rows_per_sample"] = expand_size
            for name, axis in (("cross_attention_mask", 0), ("position_ids", -2)):
                if name in prompt:
                    prompt[name] = prompt[name].repeat_interleave(expand_size, dim=axis)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, "prompt_kwargs": prompt}

    def _get_cache(self, cache_implementation, batch_size, max_cache_len, model_kwargs):
        """A static cache of this call's own; transformers 4 would keep one on the model, where two threads would share it."""
        offloading = "offloaded" in cache_implementation
        return StaticCache(config=self.config.text_config, max_cache_len=max_cache_len, offloading=offloading)

    def _prepare_position_ids_for_generation(self, *args, **kwargs):
        """None: positions are XRoPE's, and forward works them out."""

    def prepare_inputs_for_generation(
        self,
        input_ids,
        cache=None,
        attention_mask=None,
        inputs_embeds=None,
        cache_position=None,
        next_sequence_length=None,
        is_first_iteration=False,
        use_cache=True,
        prompt_kwargs=None,
        position_ids=None,
        past_key_values=None,
        **kwargs,
    ):
        """The inputs of the next call: the tokens that the cache does not hold yet, with the media they need.

        transformers 4 tells how many tokens are new by `cache_position`, transformers 5 by `next_sequence_length`. The positions
        that transformers makes (`position_ids`) are not XRoPE's; a caller's own are in `prompt_kwargs`.
        """
        cache = cache_of(cache, past_key_values)
        past_length = cached_length(cache)
        if inputs_embeds is not None and past_length == 0:
            kwargs["inputs_embeds"] = inputs_embeds
            kwargs["input_ids"] = input_ids if input_ids.shape[1] == inputs_embeds.shape[1] else None
            length = inputs_embeds.shape[1]
        else:
            new = cache_position.shape[0] if cache_position is not None else next_sequence_length
            kwargs["input_ids"] = input_ids if new is None else input_ids[:, -new:]
            length = kwargs["input_ids"].shape[1]
        for name in ("labels", "token_type_ids", "tokenizer", "assistant_tokenizer"):  # of `generate`, not of forward
            kwargs.pop(name, None)
        prompt = dict(prompt_kwargs or {})
        if past_length and prompt_kwargs is None:
            kwargs.setdefault("prompt_length", past_length)  # what the model writes after a later turn
        elif past_length:
            prompt = self._without_known_media(cache, kwargs["input_ids"], prompt, kwargs.get("prompt_length"))
        if "position_ids" in prompt and prompt["position_ids"].shape[-1] > length:
            prompt["position_ids"] = prompt["position_ids"][..., past_length : past_length + length]
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = attention_mask[:, : past_length + length]
        return {
            **kwargs,
            **prompt,
            CACHE: cache,
            "attention_mask": attention_mask,
            "use_cache": use_cache,
        }

    def _without_known_media(self, cache: Cache, ids: torch.Tensor, prompt: dict, prompt_length: Optional[int]) -> dict:
        """Drops the media that the cache holds already. A later turn may bring those of the whole conversation, or its own."""
        if "grid_thw" not in prompt:
            return prompt
        state, past_length = vision_state(cache, self.config.text_config), cached_length(cache)
        in_prompt = ids if prompt_length is None else ids[:, : max(prompt_length - past_length, 0)]
        pads = (in_prompt == self.config.image_token_id).sum(1).tolist()
        pads = state.of_samples(pads, 0)
        names = ("pixel_values", "grid_thw", "image_mean", "image_std")
        pixel_values, grid_thw, *statistics = (prompt.get(name) for name in names)
        grid = read_grid(pixel_values, grid_thw, self.config.vision_config, *statistics)
        nums = count_media(grid, prompt.get("media_nums_per_sample"), pads)
        kept, kept_nums, media, patch = [], [], enumerate(grid), 0  # kept: (number of the medium, its patches)
        for sample, (asked, count) in enumerate(zip(pads, nums)):
            own = [next(media) for _ in range(count)]
            known, frames = len(state.grids[sample]), sum(t for _, (t, _, _) in own)
            wanted = max(0, asked - (known - state.placed[sample]))
            if wanted and frames not in (wanted, known + wanted):
                raise ValueError(
                    f"The new text of sample {sample} asks for {wanted} frames beyond the cache, but its media have {frames}; "
                    f"expected {wanted}, or {known + wanted} with those of the earlier turns."
                )
            kept_nums.append(0)
            for number, (t, h, w) in own:
                frames -= t  # frames behind this medium
                if frames < wanted:
                    kept.append((number, slice(patch, patch + t * h * w)))
                    kept_nums[-1] += 1
                patch += t * h * w
        if not kept:
            mask = prompt.get("cross_attention_mask")
            if mask is not None and mask.shape[2] < past_length + ids.shape[1]:
                mask = None  # of the new turn alone, which has no frames
            prompt = {"position_ids": prompt.get("position_ids"), "cross_attention_mask": mask}
            return {name: value for name, value in prompt.items() if value is not None}
        if len(kept) < len(grid):
            of_media = {name: prompt[name] for name in ("image_mean", "image_std") if name in prompt} | {"grid_thw": grid}
            prompt = prompt | {name: [rows[number] for number, _ in kept] for name, rows in of_media.items()}
            for name, patches_a_row in (("pixel_values", 1), ("image_features", self.config.vision_config.spatial_merge_size**2)):
                if name in prompt:
                    rows = [slice(patches.start // patches_a_row, patches.stop // patches_a_row) for _, patches in kept]
                    prompt[name] = torch.cat([prompt[name][part] for part in rows])
        return {**prompt, "media_nums_per_sample": kept_nums}

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, is_encoder_decoder=False, num_new_tokens=1):
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder=is_encoder_decoder, num_new_tokens=num_new_tokens
        )
        if model_kwargs.get("use_cache", True):
            model_kwargs.pop("prompt_kwargs", None)
        elif model_kwargs.get("prompt_kwargs"):
            model_kwargs["prompt_kwargs"] = prompt = dict(model_kwargs["prompt_kwargs"])
            if "cross_attention_mask" in prompt:  # the new token sees what the one before it saw
                mask = prompt["cross_attention_mask"]
                prompt["cross_attention_mask"] = torch.cat([mask, mask[:, :, -1:].expand(-1, -1, num_new_tokens, -1)], dim=2)
            if "position_ids" in prompt:
                positions = prompt["position_ids"]
                steps = torch.arange(1, num_new_tokens + 1, device=positions.device)
                behind = positions.flatten(0, -2).amax(1).view(*positions.shape[:-1], 1)
                prompt["position_ids"] = torch.cat([positions, behind + steps], dim=-1)
        return model_kwargs


MEDIA_KWARGS = ("pixel_values", "image_mean", "image_std", "image_features", "grid_thw", "media_nums_per_sample", "cross_attention_mask")

# `save_pretrained` copies the code beside the weights.
MossVLForConditionalGeneration.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "MossVLForConditionalGeneration",
    "MossVLModel",
    "MossVLPreTrainedModel",
    "MossVLTextModel",
    "MossVLVisionModel",
]
