"""MOSS-VL: a ViT encoder, and a causal decoder whose gated cross-attention layers read the vision tokens.

Axes: B text rows, T text tokens of this call, S text tokens in all (cache included), D hidden size, H query heads, K key/value
heads, G = H / K, d head size, F frames, P patches, V vision tokens (each frame's tokens and its separator, all samples one
behind the other without padding).
"""

import inspect
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Optional, Union

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.modeling_layers import GradientCheckpointingLayer
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
    is_kernel_name,
    self_attention_mask,
    usable_implementation,
)
from .cache_layers import cached_length, install_layers, static_length, vision_state
from .configuration_moss_vl import MossVLConfig, MossVLTextConfig, MossVLVisionConfig, check_parts
from .conversation import PLACEHOLDERS  # noqa: F401 - for generation_utils: transformers 4.57 copies direct imports only
from .generation_utils import MossVLGenerationMixin
from .options import nearest_name
from .patches import normalise
from .vision_sequence import (
    Span,
    VisionCall,
    VisionRequest,
    VisionState,
    count_media,
    pads_of_samples,
    plan_call,
    read_grid,
    read_request,
    split_by,
    take_media,
    whole_mask,
)
from .xrope import count_tokens, frame_positions, grid_rotation, rotate, rotation, text_starts, walk_text


logger = logging.get_logger(__name__)

# What outputs and `generate` of this transformers call the cache: `cache` from 5.24 on, `past_key_values` before.
CACHE = "cache" if hasattr(CausalLMOutputWithCrossAttentions, "cache") else "past_key_values"

DEFAULT_VISION_CHUNK = 64  # frames the encoder takes at once
MLP_ROWS = 4096  # patches that its MLP takes at once where no gradient is kept
VISION_ROWS = 4096  # vision tokens whose keys and values are made at once where no gradient is kept
# Patches that the encoder takes at once, at most, where no gradient is kept: on a CPU as many as lie in its caches, elsewhere enough to
# keep any GPU busy while large frames do not fill its memory.
CPU_PATCHES, GPU_PATCHES = 1 << 12, 1 << 16
IGNORED = -100  # the label of a row that predicts nothing, as transformers' losses know it


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


def with_separators(
    features: torch.Tensor, runs: list[FrameRun], merge: int, separator: Optional[torch.Tensor]
) -> torch.Tensor:
    """Features [tokens, D] of frames -> the same with the separator [D] behind each frame, where one is given."""
    if separator is None:
        return features
    pieces = []
    for run, part in zip(runs, features.split([run.patches // merge**2 for run in runs]), strict=True):
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

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[P, values], float -> [P, hidden]"""
        return F.linear(pixel_values.to(self.weight), self.weight.flatten(1), self.bias)


class MossVLVisionPatchEmbed(nn.Module):
    def __init__(self, config: MossVLVisionConfig):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = MossVLVisionPatchProjection(config.in_channels, config.hidden_size, kernel, stride=kernel)

    def forward(self, pixel_values: torch.Tensor, image_mean=None, image_std=None) -> torch.Tensor:
        """[P, channels * time * row * column], float, or levels (uint8) with their means and standard deviations, [3] or [P, 3], ->
        [P, hidden]. Levels are normalised here and not in the projection, which adapters may wrap."""
        if pixel_values.dtype == torch.uint8:
            device = next(self.proj.parameters()).device
            pixel_values = normalise(
                pixel_values if device.type == "meta" else pixel_values.to(device), image_mean, image_std
            )
        return self.proj(pixel_values)


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
        for rows, out_rows in zip(hidden_states.split(MLP_ROWS), out.split(MLP_ROWS), strict=True):
            out_rows.copy_(self.linear_fc2(self.act_fn(self.linear_fc1(rows))))
        return out


class MossVLVisionAttention(nn.Module):
    def __init__(self, config: MossVLVisionConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_heads
        self.head_dim = config.hidden_size // config.num_heads
        self.num_key_value_groups = 1  # functions that users register may ask for it
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, runs, rotations, implementation):
        qkv = self.qkv(hidden_states)  # [P, 3 * hidden]
        outs = []
        for run, part, (cos, sin) in zip(runs, qkv.split([run.patches for run in runs]), rotations, strict=True):
            part = part.view(run.frames, -1, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
            query, key = (
                rotate(one.float(), cos, sin).to(part.dtype) for one in part[:2]
            )  # [frames, heads, rows * columns, d] each
            out, _ = attend(self, query, key, part[2], None, implementation)
            outs.append(out.reshape(run.patches, -1))
        return self.proj(torch.cat(outs) if len(outs) > 1 else outs[0])


class MossVLLayer(GradientCheckpointingLayer):
    """A layer that gradient checkpointing runs again in the backward pass."""

    def __call__(self, *args, **kwargs):
        if torch.is_grad_enabled():
            return super().__call__(*args, **kwargs)
        # There is no backward pass. transformers 4 would checkpoint all the same, and keep the cache from the layer.
        return nn.Module.__call__(self, *args, **kwargs)


class MossVLVisionBlock(MossVLLayer):
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
        merged = torch.cat([norm(feature) for norm, feature in zip(self.norms, features, strict=True)], dim=-1)
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

    def __init__(self, config, cross_attention_implementation: Optional[str] = None):
        """`cross_attention_implementation`: what `from_pretrained` and `from_config` were given, as `attn_implementation` is, but for the
        cross-attention layers alone."""
        super().__init__(config)
        text = getattr(config, "text_config", config)
        name = getattr(text, "cross_attention_implementation", None)
        name = name if cross_attention_implementation is None else cross_attention_implementation
        if name is not None:
            text.cross_attention_implementation = self._check_and_adjust_attn_implementation(name, is_init_check=True)

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MossVLCrossAttentionLayer):
            nn.init.zeros_(module.cross_attn_attn_gate)
            nn.init.zeros_(module.cross_attn_mlp_gate)
        elif isinstance(module, MossVLModel):
            nn.init.zeros_(module.separator_token)

    def enable_input_require_grads(self):
        """Makes the embeddings of text and patches require gradients, so that adapters in layers after frozen ones get theirs if
        checkpointing is reentrant. transformers 4 does so for the text alone."""
        models = [module for module in self.modules() if isinstance(module, MossVLPreTrainedModel)]
        embeddings = {id(embedding): embedding for embedding in (model.get_input_embeddings() for model in models)}
        self.disable_input_require_grads()
        hooks = [embedding.register_forward_hook(require_gradients) for embedding in embeddings.values()]
        self._require_grads_hooks, self._require_grads_hook = hooks, hooks[0]

    def disable_input_require_grads(self):
        """Takes back `enable_input_require_grads`."""
        for hook in getattr(self, "_require_grads_hooks", ()):
            hook.remove()
        self._require_grads_hooks = []

    if not hasattr(PreTrainedModel, "activation_checkpointing_enable"):  # before transformers 5.24

        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None, **kwargs):
            """Not reentrant unless it is asked for, as in transformers 5: else a trained layer after frozen ones gets no gradient."""
            if gradient_checkpointing_kwargs is None:
                gradient_checkpointing_kwargs = {"use_reentrant": False}
            super().gradient_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # read from the config at every call

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs):
        """transformers' check at construction and in `set_attn_implementation`, which may load a kernel: the name that is used."""
        loads_kernel = isinstance(attn_implementation, str) and is_kernel_name(attn_implementation)
        if attn_implementation is not None and not loads_kernel and attention_kind(attn_implementation) == "function":
            return attn_implementation  # transformers takes any name with "flash" in it for a kernel
        name = self._or_sdpa(super()._check_and_adjust_attn_implementation, attn_implementation, *args, **kwargs)
        attention_kind(name)
        return name

    def get_correct_attn_implementation(self, requested_attention, *args, **kwargs):
        """transformers' check of the parts in `set_attn_implementation`, without loading a kernel."""
        if requested_attention is not None:
            attention_kind(requested_attention)
        return self._or_sdpa(super().get_correct_attn_implementation, requested_attention, *args, **kwargs)

    @staticmethod
    def _or_sdpa(check, name: Optional[str], *args, **kwargs) -> str:
        """What `check` makes of the name; sdpa, with a warning, for a version of flash-attention that cannot be used here."""
        try:
            return check(name, *args, **kwargs)
        except (ImportError, ValueError) as error:
            if name is None or not name.startswith("flash_attention"):
                raise
            logger.warning_once(f"{name} cannot be used here, sdpa is used instead. The reason: {error}")
            return check("sdpa", *args, **kwargs)

    def set_attn_implementation(
        self, attn_implementation, *, cross_attention_implementation: Optional[str] = None, **kwargs
    ):
        """Changes the attention functions of the whole model, or by a dict those of the parts that it names.

        Args:
            attn_implementation: a name, or {"text_config": name, "vision_config": name}.
            cross_attention_implementation: another one for the cross-attention layers alone. Without it they follow a name given for the
                whole model, and keep theirs if a dict is given.

        Raises:
            ValueError: for names that are not allowed, before anything is changed.
        """
        of_parts, check = (
            isinstance(attn_implementation, dict),
            partial(self._check_and_adjust_attn_implementation, **kwargs),
        )
        if of_parts:
            check_parts(self.config, attn_implementation)
            attn_implementation = {part: check(name) for part, name in attn_implementation.items() if name is not None}
        else:
            attn_implementation = check(attn_implementation)
        text = getattr(self.config, "text_config", self.config)
        if cross_attention_implementation is not None or not of_parts:
            cross = None if cross_attention_implementation is None else check(cross_attention_implementation)
            text.cross_attention_implementation = cross
        super().set_attn_implementation(attn_implementation, **kwargs)


def require_gradients(module, args, output) -> None:
    """A forward hook: gradients reach what comes after an embedding, though its weights are frozen."""
    output.requires_grad_(True)


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
        self,
        pixel_values: torch.Tensor,
        grid_thw,
        vision_chunked_length: Optional[int] = None,
        image_mean=None,
        image_std=None,
        separator: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
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
            raise ValueError(
                f"`vision_chunked_length` is {vision_chunked_length!r}; expected a positive number of frames."
            )
        patches = None if torch.is_grad_enabled() else CPU_PATCHES if self.device.type == "cpu" else GPU_PATCHES
        chunks = chunk_runs(frame_runs(grid), vision_chunked_length, patches)
        sizes = [sum(run.patches for run in chunk) for chunk in chunks]
        statistics = [patch_statistics(given, grid, sizes) for given in (image_mean, image_std)]
        places = {}  # of each size of frame
        parts = (
            with_separators(self._encode(part, chunk, *own, places), chunk, self.spatial_merge_size, separator)
            for part, chunk, *own in zip(pixel_values.split(sizes), chunks, *statistics, strict=True)
        )
        if len(chunks) == 1 or torch.is_grad_enabled():
            parts = list(parts)
            return torch.cat(parts) if len(parts) > 1 else parts[0]
        rows = sum(sizes) // self.spatial_merge_size**2 + (0 if separator is None else sum(t for t, _, _ in grid))
        return gather_rows(parts, rows)

    def _encode(
        self, pixel_values: torch.Tensor, runs: list[FrameRun], image_mean, image_std, positions: dict
    ) -> torch.Tensor:
        """Features of a chunk [P / m^2, out]. `positions`: those worked out so far in this call, by the size of the frame."""
        hidden_states = self.patch_embed(pixel_values, image_mean, image_std)
        for run in runs:
            if run[1:] not in positions:
                positions[run[1:]] = self._positions(run, hidden_states)
        places, rotations = zip(*(positions[run[1:]] for run in runs), strict=True)
        parts = hidden_states.split([run.patches for run in runs])
        parts = [
            part.unflatten(0, (run.frames, -1)) + place for run, part, place in zip(runs, parts, places, strict=True)
        ]
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
        corners = self.pos_embed(torch.stack([y0 * side + x0, y0 * side + x1, y1 * side + x0, y1 * side + x1])).to(
            device, torch.float32
        )
        weights = torch.stack([(1 - dy) * (1 - dx), (1 - dy) * dx, dy * (1 - dx), dy * dx])
        return (corners * weights).sum(0).to(like.dtype), grid_rotation(rows, columns, self.head_dim)


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
        return self._rotated(self.q_proj(states), self.q_norm, table)

    def keys_values(self, states: torch.Tensor, table) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, S, D] -> two of [B, K, S, d]; the keys normalised and rotated."""
        key = self._rotated(self.k_proj(states), self.k_norm, table)
        return key, self.v_proj(states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _rotated(self, projected: torch.Tensor, norm: nn.Module, table) -> torch.Tensor:
        """[B, T, heads * d] -> [B, heads, T, d], in the dtype of the projection: norms in float32, or those under autocast, change it."""
        dtype, states = projected.dtype, norm(projected.unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        del projected
        return rotate(states, *table).to(dtype)


class MossVLSelfAttention(MossVLTextAttention):
    is_causal = True

    def forward(self, hidden_states, table, self_mask, implementation, cache=None, cache_position=None):
        """hidden_states [B, T, D] -> the same, and the weights [B, H, T, S] or None. self_mask: a `SelfAttentionMask`."""
        query = self.queries(hidden_states, table)
        key, value = self.keys_values(hidden_states, table)
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
        table,
        vision_table,
        call,
        implementation,
        cache=None,
        output_attentions=False,
    ):
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

    def vision_keys_values(self, states: torch.Tensor, table) -> tuple[torch.Tensor, torch.Tensor]:
        """[v, D] -> two of [1, K, v, d]. Without gradients they are made piece by piece, and each head's lie together in memory: as every
        token to come reads them."""
        if torch.is_grad_enabled():
            return self.keys_values(states[None], table)
        shape, dtype = (1, self.num_key_value_heads, len(states), self.head_dim), compute_dtype(states)
        key, value = (states.new_empty(shape, dtype=dtype) for _ in range(2))
        for first in range(0, len(states), VISION_ROWS):
            part = slice(first, first + VISION_ROWS)
            key[:, :, part], value[:, :, part] = self.keys_values(
                states[None, part], tuple(angles[part] for angles in table)
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

    def forward(self, hidden_states, table, self_mask, implementation, layer_past=None, cache_position=None):
        """layer_past: the cache, by the one name under which every transformers keeps it from a layer that is checkpointed."""
        attended, weights = self.self_attn(
            self.input_layernorm(hidden_states), table, self_mask, implementation, layer_past, cache_position
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
        table,
        vision_table,
        call,
        implementation,
        layer_past=None,
        output_attentions=False,
    ):
        attended, weights = self.cross_attn(
            self.input_layernorm(hidden_states),
            vision_states,
            table,
            vision_table,
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
        angles = (config.head_dim, rope["rope_theta"], rope["mrope_section"], hidden_states.dtype)
        table = tuple(
            part[:, None] for part in rotation(position_ids.to(hidden_states.device), *angles)
        )  # [B, 1, T, d]
        vision_table = None
        if vision_states is not None:
            vision_states = vision_states.to(
                hidden_states.device, compute_dtype(hidden_states)
            )  # the encoder may have another dtype
            vision_table = rotation(vision_position_ids.to(hidden_states.device), *angles)  # [v, d]
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
                    hidden_states, table, self_mask, implementation, layer_past=cache, cache_position=cache_position
                )
                if output_attentions:
                    attentions.append(weights)
            elif vision_call is not None and (vision_call.spans or vision_call.writes):
                hidden_states, weights = layer(
                    hidden_states,
                    vision_states,
                    table,
                    vision_table,
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
        runs, merge = frame_runs(request.grid), self.config.vision_config.spatial_merge_size
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
            runs = frame_runs((1, h, w) for h, w in request.frames_placed(sample))
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


class MossVLForConditionalGeneration(MossVLPreTrainedModel, MossVLGenerationMixin, GenerationMixin):
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

    # Hooks of `generate`. What belongs to the prompt rides in one entry of the model kwargs, `prompt_kwargs`: transformers 5 does not
    # prefill in chunks if it sees `pixel_values`. Assistants get it under its public names.

    def _validate_model_kwargs(self, model_kwargs):
        """Checks names; media are checked against the prompt in `_expand_inputs_for_generation`."""
        known = set(inspect.signature(self.forward).parameters)
        for name in [name for name, value in model_kwargs.items() if value is not None and name not in known]:
            near = nearest_name(name, {*known, *self.generation_config.to_dict()})
            hint = f"; did you mean `{near}`?" if near else ""
            raise ValueError(f"`{name}` is neither an input of this model nor a setting of `generate`{hint}")
        super()._validate_model_kwargs(model_kwargs)

    def _prepare_model_inputs(self, inputs, bos_token_id, model_kwargs):
        """Keeps the caller's `attention_mask`: transformers 5 drops one of ones, and its length says whether `input_ids` is the whole
        conversation or a new turn."""
        inputs, name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        return inputs, name, {**model_kwargs, "prompt_kwargs": {"attention_mask": model_kwargs.get("attention_mask")}}

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Checks a prompt and its media, drops the media that the cache holds already, and repeats text rows for beams and answers; the
        media stay as they are, shared by the rows of their sample."""
        prompt = {name: model_kwargs.pop(name, None) for name in PROMPT_KWARGS}
        prompt = {name: value for name, value in prompt.items() if value is not None}
        if "image_grid_thw" in prompt:
            prompt["grid_thw"] = grid_of(prompt.get("grid_thw"), prompt.pop("image_grid_thw"))
        cache, past_length = model_kwargs.get(CACHE), cached_length(model_kwargs.get(CACHE))
        given = (model_kwargs.pop("prompt_kwargs", None) or {}).get("attention_mask")
        attention_mask = model_kwargs.get("attention_mask") if given is None else given
        if attention_mask is not None and attention_mask.ndim == 2 and (attention_mask[:, -1] == 0).any():
            raise ValueError(
                "`attention_mask` ends in padding, so the rows are padded on the right, and a new token would come after the padding; "
                "expected padding on the left. Call the processor with padding_side='left'."
            )
        if input_ids is not None and input_ids.shape[1]:
            prompt = self._read_prompt(cache, past_length, input_ids, attention_mask, prompt)
        if expand_size > 1:
            if past_length:
                cache.batch_repeat_interleave(expand_size)
            else:
                prompt["rows_per_sample"] = expand_size
            for name, axis in (("cross_attention_mask", 0), ("position_ids", -2)):
                if name in prompt and prompt[name].shape[axis] == len(input_ids):  # else one for all rows
                    prompt[name] = prompt[name].repeat_interleave(expand_size, dim=axis)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, "prompt_kwargs": prompt}

    def _read_prompt(self, cache, past_length: int, input_ids, attention_mask, prompt: dict) -> dict:
        """What belongs to the prompt, checked as a whole: forward may get it in chunks.

        Adds `past_length`, the text tokens in the cache, and `prompt_length`, which tells the prompt from what the model writes. Of the
        media of the whole conversation only those of the new turn stay (`media_as_given` has all of them, for an assistant); a mask over
        these becomes one over all frames.
        """
        new = input_ids
        if past_length:
            only_new = (
                attention_mask is not None
                and attention_mask.ndim == 2
                and attention_mask.shape[1] != input_ids.shape[1]
            )
            if only_new and not NEXT_LENGTH:
                raise ValueError(
                    f"`input_ids` has {input_ids.shape[1]} tokens and `attention_mask` {attention_mask.shape[1]}; expected as many, those of "
                    f"the whole conversation: this transformers does not take the tokens of the new turn alone."
                )
            new = input_ids if only_new else input_ids[:, past_length:]
            if not new.shape[1]:
                raise ValueError(
                    f"`input_ids` has {input_ids.shape[1]} tokens, and the cache holds {past_length}; expected the whole conversation, with "
                    f"at least one token that the cache does not hold."
                )
        state = vision_state(cache, self.config.text_config)
        if state is not None and new is not input_ids and state.last_ids is not None:
            last = input_ids[:, past_length - 1].to(state.last_ids.device)
            seen = (
                True if attention_mask is None else attention_mask[:, past_length - 1].to(last.device).bool()
            )  # what padding is says nothing
            if ((last != state.last_ids) & seen).any():
                raise ValueError(
                    f"`input_ids` is not the conversation that the cache holds: token {past_length - 1} is {last.tolist()}, and the cache's "
                    f"{state.last_ids.tolist()}; expected the whole conversation, or with transformers 5 the tokens of the new turn and an "
                    f"`attention_mask` for the whole."
                )
        given = {name: prompt[name] for name in MEDIA_KWARGS if name in prompt}
        length = prompt.setdefault("prompt_length", past_length + new.shape[1])
        if state is not None and "grid_thw" in prompt:
            prompt = self._without_known_media(state, new[:, : max(length - past_length, 0)], prompt)
        names = prompt.keys() - {"position_ids", "rows_per_sample"}
        # What the model wrote last is not in the cache yet, and stands before the new turn that a mask is about.
        request = read_request(
            self.config,
            state,
            past_length,
            new,
            attention_mask,
            **{name: prompt[name] for name in names},
            mask_at_end=past_length > 0,
        )
        if past_length and request.mask is not None and not state.is_waiting():
            prompt = prompt | {"cross_attention_mask": whole_mask(request)}
        return {**prompt, "past_length": past_length, **({"media_as_given": given} if past_length else {})}

    def _get_cache(self, cache_implementation, batch_size, max_cache_len, model_kwargs):
        """A static cache of this call's own; transformers 4 would keep one on the model, where two threads would share it."""
        offloading = "offloaded" in cache_implementation
        return StaticCache(config=self.config.text_config, max_cache_len=max_cache_len, offloading=offloading)

    def _prefill_chunking(self, input_ids, generation_config, **model_kwargs):
        """Of transformers 4, which takes up the conversation from its first token, whatever the cache holds."""
        if length := cached_length(model_kwargs.get(CACHE)):
            raise ValueError(
                f"`prefill_chunk_size` came with a cache that holds {length} tokens; expected an empty one: transformers 4 prefills in chunks "
                f"from the first token on. Leave `prefill_chunk_size` out, or use transformers 5."
            )
        return super()._prefill_chunking(input_ids, generation_config, **model_kwargs)

    def _get_candidate_generator(
        self, generation_config, input_ids, *args, model_kwargs, assistant_model=None, **kwargs
    ):
        """The assistant gets what belongs to the prompt under its public names, as far as it takes them, but for the frame mask: without
        it some candidates may be rejected, and none is wrong."""
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                "`assistant_early_exit` is not supported: this model's layers differ, and an early exit would skip its cross-attention. "
                "Pass `assistant_model=` or `prompt_lookup_num_tokens=`."
            )
        public = {name: value for name, value in model_kwargs.items() if name != "prompt_kwargs"}
        prompt = model_kwargs.get("prompt_kwargs") or {}
        given = prompt.get("media_as_given", prompt)
        public |= {name: given[name] for name in given if name in MEDIA_KWARGS and name != "cross_attention_mask"}
        public |= {"position_ids": prompt["position_ids"]} if "position_ids" in prompt else {}
        if assistant_model is not None and assistant_model.config.model_type == self.config.model_type:
            public["prompt_length"] = prompt.get("prompt_length")
            pads = int((input_ids[:, : prompt.get("prompt_length")] == self.config.image_token_id).sum())
            frames = sum(int(t) for t, _, _ in given.get("grid_thw", ()))
            if prompt.get("past_length") and pads and pads != frames:
                raise ValueError(
                    f"The conversation has {pads} `image_pad` tokens, and {frames} frames were given for the assistant, which starts "
                    f"without a cache; expected the media of all turns. Pass these, or leave `assistant_model` out."
                )
        elif assistant_model is not None:
            accepted = inspect.signature(assistant_model.forward).parameters
            public = {name: value for name, value in public.items() if name in accepted or name not in MEDIA_KWARGS}
        return super()._get_candidate_generator(
            generation_config, input_ids, *args, model_kwargs=public, assistant_model=assistant_model, **kwargs
        )

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
            if (
                new is None
                and past_length
                and input_ids.shape[1] >= (prompt_kwargs or {}).get("prompt_length", past_length + 1)
            ):
                new = (
                    input_ids.shape[1] - past_length
                )  # assisted generation on a kept cache hands over the whole conversation
            kwargs["input_ids"] = input_ids if new is None else input_ids[:, -new:]
            length = kwargs["input_ids"].shape[1]
        for name in (
            "labels",
            "token_type_ids",
            "mm_token_type_ids",
            "tokenizer",
            "assistant_tokenizer",
        ):  # of `generate`, not of forward
            kwargs.pop(name, None)
        prompt = {name: value for name, value in (prompt_kwargs or {}).items() if name != "media_as_given"}
        if past_length > prompt.pop("past_length", 0):  # a later chunk of the prompt: its media came with the first
            prompt = {
                name: value
                for name, value in prompt.items()
                if name not in MEDIA_KWARGS or name == "cross_attention_mask"
            }
        if past_length:
            prompt.pop("rows_per_sample", None)
        if "position_ids" in prompt and prompt["position_ids"].shape[-1] != length:
            prompt["position_ids"] = counted_on(prompt["position_ids"], past_length + length)[
                ..., past_length : past_length + length
            ]
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = attention_mask[:, : past_length + length]
        return {
            **kwargs,
            **prompt,
            CACHE: cache,
            "attention_mask": attention_mask,
            "use_cache": use_cache,
        }

    def _without_known_media(self, state: VisionState, new: torch.Tensor, prompt: dict) -> dict:
        """Drops the media that the cache holds already. A later turn may bring those of the whole conversation, or its own.

        Args:
            new: [B, T], the text of the new turn.
        """
        pads = pads_of_samples(state, (new == self.config.image_token_id).sum(1).tolist())
        if "image_features" in prompt:
            prompt = prompt | {
                "image_features": getattr(prompt["image_features"], "pooler_output", prompt["image_features"])
            }
        media = {
            name: prompt[name]
            for name in ("pixel_values", "image_features", "image_mean", "image_std")
            if name in prompt
        }
        statistics = (prompt.get(name) for name in ("pixel_values", "grid_thw"))
        grid = read_grid(*statistics, self.config.vision_config, prompt.get("image_mean"), prompt.get("image_std"))
        nums = count_media(grid, prompt.get("media_nums_per_sample"), pads)
        kept, kept_nums, first = [], [], 0
        for sample, (asked, own) in enumerate(zip(pads, split_by(grid, nums), strict=True)):
            known, frames = len(state.grids[sample]), sum(t for t, _, _ in own)
            wanted = max(0, asked - (known - state.placed[sample]))
            if wanted and frames not in (wanted, known + wanted):
                raise ValueError(
                    f"The new text of sample {sample} asks for {wanted} frames beyond the cache, but its media have {frames}; "
                    f"expected {wanted}, or {known + wanted} with those of the earlier turns."
                )
            kept_nums.append(0)
            for number, (t, _, _) in enumerate(own, first):
                frames -= t  # frames after this medium
                if frames < wanted:
                    kept.append(number)
                    kept_nums[-1] += 1
            first += len(own)
        if len(kept) == len(grid):
            return {**prompt, "media_nums_per_sample": kept_nums}
        mask = prompt.get("cross_attention_mask")
        if not kept and mask is not None and mask.shape[2] <= new.shape[1]:
            prompt = {
                name: value for name, value in prompt.items() if name != "cross_attention_mask"
            }  # of the new turn, without frames
        prompt = {
            name: value for name, value in prompt.items() if name not in {*media, "grid_thw", "media_nums_per_sample"}
        }
        if not kept:
            return prompt
        media = take_media(media, grid, kept, self.config.vision_config.spatial_merge_size)
        return {**prompt, **media, "grid_thw": [grid[number] for number in kept], "media_nums_per_sample": kept_nums}

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, is_encoder_decoder=False, num_new_tokens=1):
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder=is_encoder_decoder, num_new_tokens=num_new_tokens
        )
        prompt = model_kwargs.get("prompt_kwargs") or {}
        if model_kwargs.get("use_cache", True):  # the cache knows the media
            model_kwargs["prompt_kwargs"] = {name: value for name, value in prompt.items() if name == "prompt_length"}
        elif "position_ids" in prompt:
            positions = prompt["position_ids"]
            model_kwargs["prompt_kwargs"] = prompt | {
                "position_ids": counted_on(positions, positions.shape[-1] + num_new_tokens)
            }
        return model_kwargs


def counted_on(positions: torch.Tensor, length: int) -> torch.Tensor:
    """Positions [..., T] of a prompt and, one by one from its last, of what is written after it: [..., length] if that is longer."""
    steps = torch.arange(1, max(0, length - positions.shape[-1]) + 1, device=positions.device, dtype=positions.dtype)
    return torch.cat([positions, positions[..., -1:] + steps], dim=-1)


def grid_of(grid_thw, image_grid_thw):
    """The grid that a caller gave by its name, or by the one that other models have."""
    if grid_thw is not None and image_grid_thw is not None:
        raise ValueError("The grid was given twice, as `grid_thw` and as `image_grid_thw`; expected one of them.")
    return image_grid_thw if grid_thw is None else grid_thw


MEDIA_KWARGS = (
    "pixel_values",
    "image_mean",
    "image_std",
    "image_features",
    "grid_thw",
    "media_nums_per_sample",
    "cross_attention_mask",
)
PROMPT_KWARGS = (*MEDIA_KWARGS, "image_grid_thw", "position_ids", "prompt_length", "rows_per_sample")
# Whether `generate` tells how many tokens are new, and so takes those of a new turn alone; transformers 4 does not.
NEXT_LENGTH = "next_sequence_length" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters

# `save_pretrained` copies the code beside the weights.
MossVLForConditionalGeneration.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "MossVLForConditionalGeneration",
    "MossVLModel",
    "MossVLPreTrainedModel",
    "MossVLTextModel",
    "MossVLVisionModel",
]
