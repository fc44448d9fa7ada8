"""The vision encoder: a ViT over frames of any size, whose attention never leaves a frame.

Axes: P patches of a call, in merge-block order frame after frame, d head size.
"""

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.utils import logging

from .attention import (
    attend,
    usable_implementation,
)
from .configuration_moss_vl import MossVLVisionConfig
from .media import Grid, check_pixels
from .patches import normalise
from .pretrained_model import MossVLLayer, MossVLPreTrainedModel
from .xrope import grid_rotary, rotate


logger = logging.get_logger(__name__)

DEFAULT_VISION_CHUNK = 64  # frames the encoder takes at once
MLP_ROWS = 4096  # patches that its MLP takes at once where no gradient is kept
# Patches that the encoder takes at once, at most, where no gradient is kept: on a CPU as many as lie in its caches, elsewhere enough to
# keep any GPU busy while large frames do not fill its memory.
CPU_PATCHES, GPU_PATCHES = 1 << 12, 1 << 16


class FrameGroup(NamedTuple):
    """`frames` frames in a row that share a grid of `rows` x `columns` patches."""

    frames: int
    rows: int
    columns: int

    @property
    def patches(self) -> int:
        return self.frames * self.rows * self.columns


def frame_groups(grid_thw) -> list[FrameGroup]:
    """[[t, h, w], ...] -> groups of equal grids, in order."""
    groups: list[FrameGroup] = []
    for t, h, w in grid_thw:
        if groups and groups[-1][1:] == (h, w):
            groups[-1] = groups[-1]._replace(frames=groups[-1].frames + t)
        else:
            groups.append(FrameGroup(t, h, w))
    return groups


def chunk_groups(groups: list[FrameGroup], frames: int, patches: Optional[int] = None) -> list[list[FrameGroup]]:
    """Cuts groups into chunks of at most `frames` frames, and of at most `patches` patches where more than one frame is in them."""
    chunks, room, patch_room = [], 0, 0
    patches = sum(group.patches for group in groups) if patches is None else patches
    for group in groups:
        left, of_frame = group.frames, group.rows * group.columns
        while left:
            taken = min(left, room, patch_room // of_frame)
            if not taken:
                chunks.append([])
                room, patch_room = frames, max(patches, of_frame)
                continue
            chunks[-1].append(group._replace(frames=taken))
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
    features: torch.Tensor, groups: list[FrameGroup], merge: int, separator: Optional[torch.Tensor]
) -> torch.Tensor:
    """Features [tokens, D] of frames -> the same with the separator [D] behind each frame, where one is given."""
    if separator is None:
        return features
    pieces = []
    for group, part in zip(groups, features.split([group.patches // merge**2 for group in groups]), strict=True):
        part = part.unflatten(0, (group.frames, -1))  # [frames, tokens, D]
        pieces.append(torch.cat([part, separator.to(part).expand(group.frames, 1, -1)], dim=1).flatten(0, 1))
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

    def forward(self, hidden_states, groups, rotary, implementation):
        qkv = self.qkv(hidden_states)  # [P, 3 * hidden]
        outs = []
        for group, part, (cos, sin) in zip(
            groups, qkv.split([group.patches for group in groups]), rotary, strict=True
        ):
            part = part.view(group.frames, -1, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
            query, key = (
                rotate(one.float(), cos, sin).to(part.dtype) for one in part[:2]
            )  # [frames, heads, rows * columns, d] each
            out, _ = attend(self, query, key, part[2], None, implementation)
            outs.append(out.reshape(group.patches, -1))
        return self.proj(torch.cat(outs) if len(outs) > 1 else outs[0])


class MossVLVisionBlock(MossVLLayer):
    def __init__(self, config: MossVLVisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = MossVLVisionAttention(config)
        self.mlp = MossVLVisionMLP(config)

    def forward(self, hidden_states, groups, rotary, implementation):
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), groups, rotary, implementation)
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
        grid = Grid.read(grid_thw, self.spatial_merge_size)
        check_pixels(self.config, grid, pixel_values, image_mean, image_std)
        if vision_chunked_length is None:
            vision_chunked_length = max(1, sum(t for t, _, _ in grid)) if self.training else DEFAULT_VISION_CHUNK
        elif not isinstance(vision_chunked_length, int) or vision_chunked_length < 1:
            raise ValueError(
                f"`vision_chunked_length` is {vision_chunked_length!r}; expected a positive number of frames."
            )
        patches = None if torch.is_grad_enabled() else CPU_PATCHES if self.device.type == "cpu" else GPU_PATCHES
        chunks = chunk_groups(frame_groups(grid), vision_chunked_length, patches)
        sizes = [sum(group.patches for group in chunk) for chunk in chunks]
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
        self, pixel_values: torch.Tensor, groups: list[FrameGroup], image_mean, image_std, positions: dict
    ) -> torch.Tensor:
        """Features of a chunk [P / m^2, out]. `positions`: those worked out so far in this call, by the size of the frame."""
        hidden_states = self.patch_embed(pixel_values, image_mean, image_std)
        for group in groups:
            if group[1:] not in positions:
                positions[group[1:]] = self._positions(group, hidden_states)
        places, rotary = zip(*(positions[group[1:]] for group in groups), strict=True)
        parts = hidden_states.split([group.patches for group in groups])
        parts = [
            part.unflatten(0, (group.frames, -1)) + place
            for group, part, place in zip(groups, parts, places, strict=True)
        ]
        hidden_states = torch.cat([part.flatten(0, 1) for part in parts]) if len(parts) > 1 else parts[0].flatten(0, 1)
        del parts
        implementation = usable_implementation(self.config._attn_implementation, hidden_states)
        kept = []
        for index, block in enumerate(self.blocks):
            hidden_states = block(hidden_states, groups, rotary, implementation)
            if index in self.config.deepstack_visual_indexes:
                kept.append(hidden_states)
        return self.merger([hidden_states, *kept])

    def _positions(self, group: FrameGroup, like: torch.Tensor):
        """Learned positions [rows * columns, hidden] and rotary [rows * columns, d] of a frame, in merge-block order."""
        m, device = self.spatial_merge_size, like.device
        # [block rows, 1, m, 1] x [1, block columns, 1, m] -> block row, block column, row in block, column in block
        rows = torch.arange(group.rows, device=device).view(-1, 1, m, 1)
        columns = torch.arange(group.columns, device=device).view(1, -1, 1, m)
        rows, columns = (part.flatten() for part in torch.broadcast_tensors(rows, columns))

        side = round(self.config.num_position_embeddings**0.5)
        y = torch.linspace(0, side - 1, group.rows, device=device)[rows]
        x = torch.linspace(0, side - 1, group.columns, device=device)[columns]
        y0, x0 = y.long(), x.long()
        y1, x1 = (y0 + 1).clamp(max=side - 1), (x0 + 1).clamp(max=side - 1)
        dy, dx = (y - y0)[:, None], (x - x0)[:, None]
        corners = self.pos_embed(torch.stack([y0 * side + x0, y0 * side + x1, y1 * side + x0, y1 * side + x1])).to(
            device, torch.float32
        )
        weights = torch.stack([(1 - dy) * (1 - dx), (1 - dy) * dx, dy * (1 - dx), dy * dx])
        return (corners * weights).sum(0).to(like.dtype), grid_rotary(rows, columns, self.head_dim)
