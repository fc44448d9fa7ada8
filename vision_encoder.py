"""The vision encoder: a ViT over frames of any size. Attention stays within a frame.

Axes: P patches of a call, frame after frame, in merge-block order within a frame; d head size.
Source: docs/model.md, section "Vision encoder".
"""

from collections.abc import Iterable, Sequence
from typing import Optional

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from .attention import attend, usable_implementation
from .configuration_moss_vl import MossVLVisionConfig
from .media import FrameGroup, Grid, check_pixels, frame_groups
from .patches import normalise
from .pretrained_model import MossVLLayer, MossVLPreTrainedModel
from .xrope import grid_rotary, rotate


Rotary = tuple[torch.Tensor, torch.Tensor]  # (cos, sin)
MediaValues = Optional[Sequence[Sequence[float]]]  # three numbers per medium

DEFAULT_VISION_CHUNK = 64  # frames per chunk
# Without gradients:
MLP_ROWS = 4096  # patches per call of the MLP
CPU_PATCHES = 1 << 12  # most patches per chunk on a CPU, so that they stay in its caches
GPU_PATCHES = 1 << 16  # most patches per chunk on other devices: enough to keep a GPU busy, little memory


def chunk_groups(
    groups: list[FrameGroup], max_frames: int, max_patches: Optional[int] = None
) -> list[list[FrameGroup]]:
    """Divides groups into chunks of at most `max_frames` frames and `max_patches` patches, but at least one frame."""
    chunks, free_frames, free_patches = [], 0, 0  # free: space in the last chunk
    if max_patches is None:
        max_patches = sum(group.patches for group in groups)
    for group in groups:
        left, patches_per_frame = group.frames, group.rows * group.columns
        while left:
            taken = min(left, free_frames, free_patches // patches_per_frame)
            if not taken:
                chunks.append([])
                free_frames, free_patches = max_frames, max(max_patches, patches_per_frame)
                continue
            chunks[-1].append(group._replace(frames=taken))
            left, free_frames = left - taken, free_frames - taken
            free_patches -= taken * patches_per_frame
    return chunks


def patch_statistics(per_medium: MediaValues, grid: list[list[int]], sizes: list[int]) -> list:
    """Image means (or standard deviations) for each chunk, from those of each medium.

    Args:
        sizes: patches of each chunk.

    Returns:
        For each chunk three numbers if all media have the same, else [patches, 3]; None without statistics.
    """
    if per_medium is None or all(list(row) == list(per_medium[0]) for row in per_medium):
        return [None if per_medium is None else per_medium[0]] * len(sizes)
    counts = torch.tensor([t * h * w for t, h, w in grid])
    return list(torch.tensor(per_medium, dtype=torch.float64).repeat_interleave(counts, dim=0).split(sizes))


def with_separators(
    features: torch.Tensor, groups: list[FrameGroup], merge: int, separator: Optional[torch.Tensor]
) -> torch.Tensor:
    """Appends the separator [D] to the features [tokens, D] of each frame; None leaves them unchanged."""
    if separator is None:
        return features
    pieces = []
    for group, part in zip(groups, features.split([group.patches // merge**2 for group in groups]), strict=True):
        part = part.unflatten(0, (group.frames, -1))  # [frames, tokens, D]
        pieces.append(torch.cat([part, separator.to(part).expand(group.frames, 1, -1)], dim=1).flatten(0, 1))
    return concatenate(pieces)


def concatenate(parts: list[torch.Tensor]) -> torch.Tensor:
    """`torch.cat`, without a copy if there is one part."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def gather_rows(parts: Iterable[torch.Tensor], rows: int) -> torch.Tensor:
    """Concatenates tensors [n, D] into [rows, D], freeing each one before the next is computed. Without gradients."""
    out, offset = None, 0
    for part in parts:
        out = part.new_empty(rows, part.shape[1]) if out is None else out
        out[offset : offset + len(part)] = part
        offset += len(part)
    return out


class MossVLVisionPatchProjection(nn.Conv3d):
    """A convolution whose kernel and stride are one patch, computed as a linear layer."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """float [P, values] -> [P, hidden]"""
        return F.linear(pixel_values.to(self.weight), self.weight.flatten(1), self.bias)


class MossVLVisionPatchEmbed(nn.Module):
    def __init__(self, config: MossVLVisionConfig):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = MossVLVisionPatchProjection(config.in_channels, config.hidden_size, kernel, stride=kernel)

    def forward(self, pixel_values: torch.Tensor, image_mean=None, image_std=None) -> torch.Tensor:
        """[P, channels * time * row * column] -> [P, hidden]. uint8 pixels are normalised first.

        Adapters may wrap the projection, so pixels are not normalised there.

        Args:
            image_mean, image_std: for uint8 pixels, [3] or [P, 3].
        """
        if pixel_values.dtype == torch.uint8:
            device = next(self.proj.parameters()).device
            # An offloaded projection has no device until it runs; the pixels then stay where they are.
            pixels = pixel_values if device.type == "meta" else pixel_values.to(device)
            pixel_values = normalise(pixels, image_mean, image_std)
        return self.proj(pixel_values)


class MossVLVisionMLP(nn.Module):
    def __init__(self, config: MossVLVisionConfig):
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[P, hidden] -> [P, hidden]. Without gradients, `MLP_ROWS` patches at a time: the intermediate states of a
        whole chunk would be the largest tensor of the encoder."""
        if torch.is_grad_enabled():
            return self.linear_fc2(self.act_fn(self.linear_fc1(hidden_states)))
        out = torch.empty_like(hidden_states)
        for rows, out_rows in zip(hidden_states.split(MLP_ROWS), out.split(MLP_ROWS), strict=True):
            out_rows.copy_(self.linear_fc2(self.act_fn(self.linear_fc1(rows))))
        return out


class MossVLVisionAttention(nn.Module):
    def __init__(self, config: MossVLVisionConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_heads
        self.head_dim = config.hidden_size // config.num_heads
        self.num_key_value_groups = 1  # attention functions of users may read it
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, groups: list[FrameGroup], rotary: Sequence[Rotary], implementation: str
    ) -> torch.Tensor:
        """[P, hidden] -> [P, hidden], one attention call per group, with its frames as batch axis.

        Args:
            rotary: for each group, (cos, sin), [rows * columns, d] each.
        """
        groups = [FrameGroup._make(group) for group in groups]  # hooks of compressed-tensors make plain tuples of them
        qkv = self.qkv(hidden_states).split([group.patches for group in groups])  # [P, 3 * hidden]
        outs = []
        for group, part, (cos, sin) in zip(groups, qkv, rotary, strict=True):
            part = part.view(group.frames, -1, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
            query, key, value = part  # [frames, heads, rows * columns, d] each
            query, key = (rotate(states.float(), cos, sin).to(part.dtype) for states in (query, key))
            out, _ = attend(self, query, key, value, None, implementation)
            outs.append(out.reshape(group.patches, -1))
        return self.proj(concatenate(outs))


class MossVLVisionBlock(MossVLLayer):
    def __init__(self, config: MossVLVisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = MossVLVisionAttention(config)
        self.mlp = MossVLVisionMLP(config)

    def forward(
        self, hidden_states: torch.Tensor, groups: list[FrameGroup], rotary: Sequence[Rotary], implementation: str
    ) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), groups, rotary, implementation)
        return hidden_states + self.mlp(self.norm2(hidden_states))


class MossVLVisionMerger(nn.Module):
    """Merges m x m patches into one vision token, from the features of the last block and of the deepstack blocks."""

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
        """[last, deepstack...], each [P, hidden] -> [P / m^2, out]"""
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

    def get_input_embeddings(self) -> nn.Module:
        return self.patch_embed

    def forward(
        self,
        pixel_values: torch.Tensor,
        grid_thw: torch.Tensor | Sequence[Sequence[int]],
        vision_chunked_length: Optional[int] = None,
        image_mean: MediaValues = None,
        image_std: MediaValues = None,
        separator: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Encodes frames in chunks.

        Args:
            pixel_values: [P, channels * time * patch * patch], float or uint8.
            grid_thw: [media, 3], (frames, patch rows, patch columns).
            vision_chunked_length: most frames per chunk; default 64, in training all. Chunks of large frames are
                smaller.
            image_mean, image_std: for uint8 `pixel_values`, three numbers per medium.
            separator: [out_hidden_size], appended to the tokens of each frame if given.

        Returns:
            [P / m^2, out_hidden_size], frame after frame, row-major over merge blocks; with a separator one more row
            per frame.

        Raises:
            ValueError: if pixels and grid do not fit each other or the model.
        """
        grid = Grid.read(grid_thw, self.spatial_merge_size)
        check_pixels(self.config, grid, pixel_values, image_mean, image_std)
        frames = sum(t for t, _, _ in grid)
        chunk_length = self._chunk_length(vision_chunked_length, frames)
        chunks = chunk_groups(frame_groups(grid), chunk_length, self._max_patches())
        sizes = [sum(group.patches for group in chunk) for chunk in chunks]
        means, stds = (patch_statistics(per_medium, grid, sizes) for per_medium in (image_mean, image_std))
        embeddings: dict = {}
        parts = (
            with_separators(
                self._encode(pixels, chunk, mean, std, embeddings), chunk, self.spatial_merge_size, separator
            )
            for pixels, chunk, mean, std in zip(pixel_values.split(sizes), chunks, means, stds, strict=True)
        )
        if len(chunks) == 1 or torch.is_grad_enabled():
            return concatenate(list(parts))
        return gather_rows(parts, sum(sizes) // self.spatial_merge_size**2 + (0 if separator is None else frames))

    def _chunk_length(self, given: Optional[int], frames: int) -> int:
        """Most frames per chunk."""
        if given is None:
            return max(1, frames) if self.training else DEFAULT_VISION_CHUNK
        if not isinstance(given, int) or given < 1:
            raise ValueError(f"`vision_chunked_length` is {given!r}; expected a positive number of frames.")
        return given

    def _max_patches(self) -> Optional[int]:
        """Most patches per chunk; no limit if gradients are kept."""
        if torch.is_grad_enabled():
            return None
        return CPU_PATCHES if self.device.type == "cpu" else GPU_PATCHES

    def _encode(
        self, pixel_values: torch.Tensor, groups: list[FrameGroup], image_mean, image_std, embeddings: dict
    ) -> torch.Tensor:
        """Features of a chunk, [P / m^2, out].

        Args:
            embeddings: (rows, columns) -> result of `_embed_positions`, kept for the later chunks of the call.
        """
        hidden_states = self.patch_embed(pixel_values, image_mean, image_std)
        for group in groups:
            if group[1:] not in embeddings:
                embeddings[group[1:]] = self._embed_positions(group, hidden_states)
        learned, rotary = zip(*(embeddings[group[1:]] for group in groups), strict=True)
        hidden_states = concatenate(
            [
                (part.unflatten(0, (group.frames, -1)) + positions).flatten(0, 1)
                for group, part, positions in zip(
                    groups, hidden_states.split([group.patches for group in groups]), learned, strict=True
                )
            ]
        )
        implementation = usable_implementation(self.config._attn_implementation, hidden_states)
        deepstack = []
        for index, block in enumerate(self.blocks):
            hidden_states = block(hidden_states, groups, rotary, implementation)
            if index in self.config.deepstack_visual_indexes:
                deepstack.append(hidden_states)
        return self.merger([hidden_states, *deepstack])

    def _embed_positions(self, group: FrameGroup, like: torch.Tensor) -> tuple[torch.Tensor, Rotary]:
        """Learned position embeddings [rows * columns, hidden] and rotary [rows * columns, d] of a frame, in
        merge-block order. The square table of learned positions is interpolated bilinearly, end points included."""
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
        corners = torch.stack([y0 * side + x0, y0 * side + x1, y1 * side + x0, y1 * side + x1])  # [4, rows * columns]
        weights = torch.stack([(1 - dy) * (1 - dx), (1 - dy) * dx, dy * (1 - dx), dy * dx])
        learned = (self.pos_embed(corners).to(device, torch.float32) * weights).sum(0).to(like.dtype)
        return learned, grid_rotary(rows, columns, self.head_dim)
