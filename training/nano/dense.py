"""The model's forward over padded tensors, for train_nano.py: a few large operations in place of many small ones.

`encode` and `decode` compute what `MossVLForConditionalGeneration` computes, with its parameters, as a test checks:
all pictures of a step (collation.py) are encoded at once, and all rows attend to their vision tokens in one operation
a layer. Nothing waits for the device.

Axes: N pictures, P patches of the largest one, B rows, T text tokens, S vision tokens of the row with the most, H
heads, K key/value heads, d head size, D channels.
"""

import functools

import torch
import torch.nn.functional as F

from moss_vl.xrope import cos_sin, rotate


HIDDEN = -1e4  # added to the scores of tokens that are not visible


def attend(query, key, value, bias, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """query [B, H, T, d], key and value [B, K, S, d], bias [B, 1, T or 1, S].

    Returns:
        [B, T, H * d], and the weights [B, H, T, S].
    """
    (batch, heads, length, d), kv_heads = query.shape, key.shape[1]
    grouped = (query * scaling).reshape(batch, kv_heads, -1, d)
    scores = (grouped @ key.transpose(2, 3)).view(batch, heads, length, -1)
    weights = F.softmax(scores + bias, dim=-1)
    out = weights.view(batch, kv_heads, -1, key.shape[2]) @ value
    return out.view(batch, heads, length, d).transpose(1, 2).flatten(2), weights


@functools.lru_cache
def rotary_table(head_dim: int, theta: float, section: tuple[int, ...], device) -> tuple[torch.Tensor, torch.Tensor]:
    """For each pair of channels, the axis of its position and its frequency: see `xrope.xrope_rotary`."""
    axes = [j % 3 if j % 3 and j < 3 * section[j % 3] else 0 for j in range(head_dim // 2)]
    frequencies = theta ** (-2.0 * torch.arange(head_dim // 2).float() / head_dim)
    return torch.tensor(axes, device=device), frequencies.to(device)


def rotary_of(positions: torch.Tensor, config, dtype) -> list[torch.Tensor]:
    """positions [3, B, T] -> cosines and sines, each [B, 1, T, d]."""
    rope = config.rope_parameters
    section = tuple(rope["mrope_section"])
    axes, frequencies = rotary_table(config.head_dim, rope["rope_theta"], section, positions.device)
    angles = positions.float().index_select(0, axes).movedim(0, -1) * frequencies
    return [part[:, None] for part in cos_sin(angles, dtype)]


def encode(visual, step: dict, record: int | None = None):
    """Vision tokens [N, P / 4, D] of all pictures, padding included; states [N, P, D] after the block `record`."""
    dtype = visual.patch_embed.proj.weight.dtype
    pixels = ((step["pixels"].float() - 127.5) / 127.5).to(dtype)
    learned = (step["interpolation"] @ visual.pos_embed.weight.float()).to(dtype)
    states = visual.patch_embed(pixels) + learned.index_select(0, step["grid"])
    cos, sin = (step[name].index_select(0, step["grid"])[:, None] for name in ("patch_cos", "patch_sin"))
    patch = torch.arange(states.shape[1], device=states.device)
    bias = ((patch >= step["patches"][:, None]) * HIDDEN).to(dtype)[:, None, None]
    kept, recorded = [], None
    for index, block in enumerate(visual.blocks):
        attn = block.attn
        qkv = attn.qkv(block.norm1(states)).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = (rotate(part.float(), cos, sin).to(dtype) for part in qkv[:2])
        out, _ = attend(query, key, qkv[2], bias, attn.scaling)
        states = states + attn.proj(out)
        states = states + block.mlp.linear_fc2(block.mlp.act_fn(block.mlp.linear_fc1(block.norm2(states))))
        if index in visual.config.deepstack_visual_indexes:
            kept.append(states)
        if index == record:
            recorded = states
    return visual.merger([states, *kept]).unflatten(0, (len(states), -1)), recorded


def self_bias(parts: torch.Tensor, dtype) -> torch.Tensor:
    """parts [B, T] -> [B, 1, T, T]: 0 where a token sees an earlier one of the media or of its part, else HIDDEN."""
    visible = (parts == 0)[:, None, :] | (parts[:, None, :] == parts[:, :, None])
    length = parts.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=parts.device).tril()
    return (~(visible & causal) * HIDDEN).to(dtype)[:, None]


def embedded(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The rows `ids` of a small table, by a matrix product, whose gradient takes no sorting."""
    return (ids[..., None] == torch.arange(len(table), device=ids.device)).to(table.dtype) @ table


def decode(language_model, step: dict, vision: torch.Tensor, states_of=(), weights_of=()):
    """The decoder over text and the vision tokens [B, S, D] of each row.

    Returns:
        Final states [B, T, D]; the outputs of the layers `states_of`; the attention weights of the layers
        `weights_of`.
    """
    config, dtype = language_model.config, language_model.embed_tokens.weight.dtype
    rotary = rotary_of(step["positions"].expand(3, -1, -1), config, dtype)
    vision_rotary = rotary_of(step["vision_positions"], config, dtype)
    bias = self_bias(step["parts"], dtype)
    hidden_frames = step["vision_frame"][:, None, :] >= step["seen"][:, :, None]
    vision_bias = (hidden_frames * HIDDEN).to(dtype)[:, None]
    sees = (step["seen"] > 0).to(dtype)[..., None]
    states, recorded, weights = embedded(language_model.embed_tokens.weight, step["ids"]), {}, {}
    for index, layer in enumerate(language_model.layers):
        crosses = hasattr(layer, "cross_attn")
        attention = layer.cross_attn if crosses else layer.self_attn
        normed = layer.input_layernorm(states)
        source, source_rotary = (vision, vision_rotary) if crosses else (normed, rotary)
        query = attention.queries(normed, rotary)
        key, value = attention.keys_values(source, source_rotary)
        mask = vision_bias if crosses else bias
        out, weight = attend(query, key, value, mask, attention.scaling)
        out = attention.o_proj(out)
        states = states + (sees * layer.cross_attn_attn_gate.tanh() * out if crosses else out)
        out = layer.mlp(layer.post_attention_layernorm(states))
        states = states + (sees * layer.cross_attn_mlp_gate.tanh() * out if crosses else out)
        if index in states_of:
            recorded[index] = states
        if index in weights_of:
            weights[index] = weight
    return language_model.norm(states), recorded, weights


def rows_of_vision(tokens: torch.Tensor, separator: torch.Tensor, step: dict, noise: float = 0.0) -> torch.Tensor:
    """Vision tokens [B, S, D] of each row, with separators, from those of the encoded frames [N, P / 4, D].

    Args:
        noise: in standard deviations of the tokens.
    """
    flat, index = tokens.flatten(0, 1), step["vision_index"]
    separates = (index == len(flat))[..., None]
    vision = F.embedding(index.clamp(max=len(flat) - 1), flat)
    if noise:
        vision = vision + noise * flat.std(0) * torch.randn_like(vision)
    return torch.where(separates, separator.to(vision), vision)
