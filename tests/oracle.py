"""MOSS-VL in float64, written from its specification alone: one sample, no cache, dense masks, and loops.

Axes: T text tokens, F frames, P patches, V vision tokens with separators, H heads, d head size.
"""

import math

import torch
import torch.nn.functional as F


class Oracle:
    """Logits of whole conversations, by the weights of a `MossVLForConditionalGeneration`."""

    def __init__(self, model):
        self.weights = {name: value.detach().double() for name, value in model.state_dict().items()}
        self.config, self.text, self.vision = model.config, model.config.text_config, model.config.vision_config

    def linear(self, x, name):
        return F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))

    def layer_norm(self, x, name):
        return F.layer_norm(
            x, x.shape[-1:], self.weights[name + ".weight"], self.weights[name + ".bias"], self.vision.layer_norm_eps
        )

    def rms_norm(self, x, name):
        return x / (x.square().mean(-1, keepdim=True) + self.text.rms_norm_eps).sqrt() * self.weights[name + ".weight"]

    # vision encoder

    def encode(self, pixels, rows: int, columns: int):
        """One frame: [P, values] in merge-block order -> [P / m^2, D]."""
        m, heads = self.vision.spatial_merge_size, self.vision.num_heads
        patches = [
            (block_row * m + y, block_column * m + x)
            for block_row in range(rows // m)
            for block_column in range(columns // m)
            for y in range(m)
            for x in range(m)
        ]
        proj = self.weights["model.visual.patch_embed.proj.weight"].flatten(1)
        x = F.linear(pixels.double(), proj, self.weights["model.visual.patch_embed.proj.bias"])
        x = x + torch.stack([self.learned_position(y, column, rows, columns) for y, column in patches])
        d = self.vision.hidden_size // heads
        frequencies = [10000 ** (-4 * i / d) for i in range(d // 4)]
        angles = torch.tensor(
            [[y * f for f in frequencies] + [column * f for f in frequencies] for y, column in patches],
            dtype=torch.float64,
        )
        kept = []
        for index in range(self.vision.depth):
            name = f"model.visual.blocks.{index}."
            qkv = self.linear(self.layer_norm(x, name + "norm1"), name + "attn.qkv").view(len(x), 3, heads, d)
            q, k = turn(qkv[:, 0], angles), turn(qkv[:, 1], angles)
            x = x + self.linear(
                attention(q, k, qkv[:, 2], torch.ones(len(x), len(x), dtype=torch.bool)), name + "attn.proj"
            )
            hidden = self.linear(self.layer_norm(x, name + "norm2"), name + "mlp.linear_fc1")
            x = x + self.linear(F.gelu(hidden, approximate="tanh"), name + "mlp.linear_fc2")
            if index in self.vision.deepstack_visual_indexes:
                kept.append(x)
        name = "model.visual.merger."
        features = torch.cat(
            [self.layer_norm(feature, f"{name}norms.{i}") for i, feature in enumerate([x, *kept])], dim=-1
        )
        return self.linear(
            F.gelu(self.linear(features.view(len(x) // m**2, -1), name + "linear_fc1")), name + "linear_fc2"
        )

    def learned_position(self, row: int, column: int, rows: int, columns: int):
        table = self.weights["model.visual.pos_embed.weight"]
        side = math.isqrt(len(table))
        out = 0
        y, x = (at * (side - 1) / (count - 1) if count > 1 else 0.0 for at, count in ((row, rows), (column, columns)))
        for y0, dy in ((int(y), 1 - y % 1), (int(y) + 1, y % 1)):
            for x0, dx in ((int(x), 1 - x % 1), (int(x) + 1, x % 1)):
                out = out + dy * dx * table[min(y0, side - 1) * side + min(x0, side - 1)]
        return out

    # decoder

    def logits(self, ids: list[int], frames: list = (), pads=None, visible=None):
        """[T, vocabulary] of one conversation.

        Args:
            frames: (vision tokens [H * W, D] as `encode` returns them, H, W) of each frame.
            pads: index of the token of each frame's `image_pad`; default all `image_pad` ids.
            visible: for each token its visible frames; default those placed at or before it.
        """
        if pads is None:
            pads = [i for i, token in enumerate(ids) if token == self.config.image_token_id]
        assert len(pads) == len(frames)
        if visible is None:
            visible = [[f for f, pad in enumerate(pads) if pad <= i] for i in range(len(ids))]
        positions, vision_positions, vision, frame_of, p = [], [], [], [], 0
        for i in range(len(ids)):
            if i in pads:
                features, height, width = frames[pads.index(i)]
                vision += [features, self.weights["model.separator_token"][None]]
                vision_positions += [(p, p + y, p + x) for y in range(height) for x in range(width)]
                p += max(height, width)
                vision_positions.append((p, p, p))
                frame_of += [pads.index(i)] * (height * width + 1)
            positions.append((p, p, p))
            p += 1
        d = self.text.head_dim
        text_angles, vision_angles = self.angles(positions), self.angles(vision_positions)
        x, vision = (
            self.weights["model.language_model.embed_tokens.weight"][torch.tensor(ids)],
            torch.cat(vision) if vision else None,
        )
        causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        visible_tokens = torch.tensor(
            [[frame in frames_of_token for frame in frame_of] for frames_of_token in visible], dtype=torch.bool
        ).view(len(ids), len(frame_of))
        reads = visible_tokens.any(1)
        for index in range(self.text.num_hidden_layers):
            name = f"model.language_model.layers.{index}."
            crosses = index in self.text.cross_attention_layers
            if crosses and not reads.any():
                continue
            part = name + ("cross_attn." if crosses else "self_attn.")
            hidden = self.rms_norm(x, name + "input_layernorm")
            source, source_angles, mask = (
                (vision, vision_angles, visible_tokens) if crosses else (hidden, text_angles, causal)
            )
            q, k, v = (
                self.linear(states, part + kind).view(len(states), -1, d)
                for kind, states in (("q_proj", hidden), ("k_proj", source), ("v_proj", source))
            )
            q, k = (
                turn(self.rms_norm(q, part + "q_norm"), text_angles),
                turn(self.rms_norm(k, part + "k_norm"), source_angles),
            )
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
            rows = reads if crosses else torch.ones(len(ids), dtype=torch.bool)
            out = torch.zeros(len(ids), q.shape[1] * d, dtype=torch.float64)
            out[rows] = attention(q[rows], k, v, mask[rows])
            gates = [
                self.weights[name + f"cross_attn_{kind}_gate"].tanh() if crosses else 1.0 for kind in ("attn", "mlp")
            ]
            x = x + rows[:, None] * gates[0] * self.linear(out, part + "o_proj")
            hidden = self.rms_norm(x, name + "post_attention_layernorm")
            hidden = F.silu(self.linear(hidden, name + "mlp.gate_proj")) * self.linear(hidden, name + "mlp.up_proj")
            x = x + rows[:, None] * gates[1] * self.linear(hidden, name + "mlp.down_proj")
        return F.linear(self.rms_norm(x, "model.language_model.norm"), self.weights["lm_head.weight"])

    def angles(self, positions):
        """[(t, h, w)] -> [n, d / 2]"""
        rope, d = self.text.rope_parameters, self.text.head_dim
        section = rope["mrope_section"]
        axis = [
            1 if j % 3 == 1 and j < 3 * section[1] else 2 if j % 3 == 2 and j < 3 * section[2] else 0
            for j in range(d // 2)
        ]
        angles = [
            [position[axis[j]] * rope["rope_theta"] ** (-2 * j / d) for j in range(d // 2)] for position in positions
        ]
        return torch.tensor(angles, dtype=torch.float64).view(-1, d // 2)


def turn(x, angles):
    """[n, H, d] by angles [n, d / 2]: pairs (j, j + d / 2)."""
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attention(q, k, v, mask):
    """[T, H, d] x [S, H, d] -> [T, H * d]"""
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)
