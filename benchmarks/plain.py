"""MOSS-VL written out plainly from docs/model.md, to be compared with the package: an attention call per frame and
layer, a dense float mask T x V, keys and values repeated over the groups of query heads and extended by concatenation,
everything at once.

Axes: T text tokens, N frames of one size, P patches, V vision tokens with separators, D hidden size, H query heads, K
key/value heads, d head size. One sample, whose only medium is a video.
"""

import torch
import torch.nn.functional as F


class PlainMossVL:
    """Shares the weights of a `MossVLForConditionalGeneration`."""

    def __init__(self, model):
        self.text, self.vision = model.config.text_config, model.config.vision_config
        self.image_token_id = model.config.image_token_id
        self.weights = dict(model.state_dict())

    # Vision encoder

    def encode(self, pixels: torch.Tensor, frames: int, rows: int, columns: int) -> torch.Tensor:
        """pixels [P, values] -> vision states [V, D]."""
        config, m, weight = self.vision, self.vision.spatial_merge_size, self._named("model.visual.")
        x = F.linear(
            pixels.to(weight("patch_embed.proj.weight")),
            weight("patch_embed.proj.weight").flatten(1),
            weight("patch_embed.proj.bias"),
        )
        x = (x.view(frames, -1, config.hidden_size) + self._learned(rows, columns)).flatten(0, 1)
        rotary, kept = self._grid_rotary(rows, columns, config.hidden_size // config.num_heads), []
        for index in range(config.depth):
            block = self._named(f"model.visual.blocks.{index}.")
            x = x + self._frame_attention(self._layer_norm(x, block, "norm1"), block, frames, rotary)
            hidden = F.linear(
                self._layer_norm(x, block, "norm2"), block("mlp.linear_fc1.weight"), block("mlp.linear_fc1.bias")
            )
            x = x + F.linear(
                F.gelu(hidden, approximate="tanh"), block("mlp.linear_fc2.weight"), block("mlp.linear_fc2.bias")
            )
            if index in config.deepstack_visual_indexes:
                kept.append(x)
        merger = self._named("model.visual.merger.")
        features = torch.cat(
            [self._layer_norm(feature, merger, f"norms.{i}") for i, feature in enumerate([x, *kept])], dim=-1
        )
        features = features.view(-1, m * m * features.shape[-1])
        features = F.gelu(F.linear(features, merger("linear_fc1.weight"), merger("linear_fc1.bias")))
        tokens = F.linear(features, merger("linear_fc2.weight"), merger("linear_fc2.bias")).view(
            frames, -1, config.out_hidden_size
        )
        separator = self.weights["model.separator_token"].expand(frames, 1, -1)
        return torch.cat([tokens, separator], dim=1).flatten(0, 1)

    def _frame_attention(self, x, block, frames, rotary):
        heads = self.vision.num_heads
        outs = []
        for frame in x.chunk(frames):
            q, k, v = (
                F.linear(frame, block("attn.qkv.weight"), block("attn.qkv.bias"))
                .view(len(frame), 3, heads, -1)
                .permute(1, 2, 0, 3)
            )
            q, k = (rotate(part.float(), *rotary).to(part.dtype) for part in (q, k))
            outs.append(F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1).flatten(1))
        return F.linear(torch.cat(outs), block("attn.proj.weight"), block("attn.proj.bias"))

    def _learned(self, rows: int, columns: int) -> torch.Tensor:
        """[rows * columns, hidden], bilinear, in merge-block order."""
        side = round(self.vision.num_position_embeddings**0.5)
        weight = self.weights["model.visual.pos_embed.weight"]
        grid = weight.float().view(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(rows, columns), mode="bilinear", align_corners=True)[0]
        return self._blocks(grid.permute(1, 2, 0)).to(weight.dtype)

    def _grid_rotary(self, rows: int, columns: int, d: int):
        frequencies = 10000.0 ** (-4.0 * torch.arange(d // 4) / d)
        grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1)
        angles = (self._blocks(grid).float()[..., None] * frequencies).flatten(1).repeat(1, 2)
        angles = angles.to(self.weights["model.separator_token"].device)
        return angles.cos(), angles.sin()

    def _blocks(self, grid: torch.Tensor) -> torch.Tensor:
        """[rows, columns, ...] -> [rows * columns, ...], merge block by merge block."""
        m = self.vision.spatial_merge_size
        rows, columns, *rest = grid.shape
        return grid.reshape(rows // m, m, columns // m, m, *rest).transpose(1, 2).reshape(rows * columns, *rest)

    def _layer_norm(self, x, weight, name):
        return F.layer_norm(
            x, x.shape[-1:], weight(f"{name}.weight"), weight(f"{name}.bias"), self.vision.layer_norm_eps
        )

    # Decoder

    @torch.no_grad()
    def prefill(self, ids: torch.Tensor, pixels: torch.Tensor, frames: int, rows: int, columns: int) -> torch.Tensor:
        """ids [1, T] -> logits [1, 1, vocab] of the last token; keys and values are kept for `decode`."""
        states = self.encode(pixels, frames, rows, columns)
        m = self.vision.spatial_merge_size
        height, width = rows // m, columns // m
        text, vision, p = [], [], 0
        for token in ids[0].tolist():
            if token == self.image_token_id:
                vision += [(p, p + y, p + x) for y in range(height) for x in range(width)]
                p += max(height, width)
                vision.append((p, p, p))
            text.append((p, p, p))
            p += 1
        self.position, self.past, device = p, {}, states.device
        text_rotary, vision_rotary = (
            self._xrope_rotary(torch.tensor(positions, device=device).T) for positions in (text, vision)
        )
        # [T], how many vision tokens are visible to each row; a row without any gets an empty mask, and r = 0 below
        visible = (ids[0] == self.image_token_id).cumsum(0) * (height * width + 1)
        masked = (torch.arange(len(states), device=device) >= visible[:, None]) & (visible > 0)[:, None]
        dense = torch.zeros(masked.shape, dtype=states.dtype, device=device).masked_fill_(masked, float("-inf"))
        causal = torch.full((len(text), len(text)), float("-inf"), dtype=states.dtype, device=device).triu(1)
        self.has_visible = (visible > 0).to(states.dtype)[:, None]  # r in docs/model.md
        x = self._layers(ids[0], text_rotary, causal, dense, states, vision_rotary)
        self.has_visible, self.last_mask = self.has_visible[-1:], dense[-1:]  # generated tokens have those of the last
        return self._logits(x)

    @torch.no_grad()
    def decode(self, token: torch.Tensor) -> torch.Tensor:
        """token [1, 1] -> logits [1, 1, vocab]."""
        rotary = self._xrope_rotary(torch.full((3, 1), self.position, device=token.device))
        self.position += 1
        return self._logits(self._layers(token[0], rotary, None, self.last_mask, None, None))

    def _layers(self, ids, rotary, causal, dense, states, vision_rotary):
        text = self._named("model.language_model.")
        x = text("embed_tokens.weight")[ids]
        for index in range(self.text.num_hidden_layers):
            layer = self._named(f"model.language_model.layers.{index}.")
            normed = self._rms_norm(x, layer("input_layernorm.weight"))
            if index in self.text.cross_attention_layers:
                attended = self._attention(layer, "cross_attn", index, normed, rotary, dense, states, vision_rotary)
                x = x + self.has_visible * layer("cross_attn_attn_gate").tanh() * attended
                fed = self._mlp(self._rms_norm(x, layer("post_attention_layernorm.weight")), layer)
                x = x + self.has_visible * layer("cross_attn_mlp_gate").tanh() * fed
            else:
                x = x + self._attention(layer, "self_attn", index, normed, rotary, causal, normed, rotary)
                x = x + self._mlp(self._rms_norm(x, layer("post_attention_layernorm.weight")), layer)
        return x

    def _attention(self, layer, name, index, x, rotary, mask, source, source_rotary):
        """x [T, D] attends to the keys and values of earlier calls, extended by those of `source` [S, D] if given."""
        d, eps = self.text.head_dim, self.text.rms_norm_eps

        def heads(states, part):
            return F.linear(states, layer(f"{name}.{part}_proj.weight")).unflatten(-1, (-1, d))

        query = rotate(self._rms_norm(heads(x, "q"), layer(f"{name}.q_norm.weight"), eps).transpose(0, 1), *rotary)
        if source is not None:
            key = rotate(
                self._rms_norm(heads(source, "k"), layer(f"{name}.k_norm.weight"), eps).transpose(0, 1), *source_rotary
            )
            value = heads(source, "v").transpose(0, 1)
            if index in self.past:
                key, value = (
                    torch.cat([old, new], dim=1) for old, new in zip(self.past[index], (key, value), strict=True)
                )
            self.past[index] = key, value
        key, value = (part.repeat_interleave(len(query) // len(part), dim=0) for part in self.past[index])
        out = F.scaled_dot_product_attention(
            query[None], key[None], value[None], None if mask is None else mask[None, None]
        )
        return F.linear(out[0].transpose(0, 1).flatten(1), layer(f"{name}.o_proj.weight"))

    def _mlp(self, x, layer):
        gate, up = (F.linear(x, layer(f"mlp.{name}_proj.weight")) for name in ("gate", "up"))
        return F.linear(F.silu(gate) * up, layer("mlp.down_proj.weight"))

    def _logits(self, x):
        return F.linear(
            self._rms_norm(x[-1:], self.weights["model.language_model.norm.weight"]), self.weights["lm_head.weight"]
        )[None]

    def _rms_norm(self, x, weight, eps=None):
        eps = self.text.rms_norm_eps if eps is None else eps
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    def _xrope_rotary(self, positions: torch.Tensor):
        """[3, n] -> (cos, sin), each [n, d]."""
        rope = self.text.rope_parameters
        j = torch.arange(self.text.head_dim // 2)
        axis = [k % 3 if k % 3 and k < 3 * rope["mrope_section"][k % 3] else 0 for k in j.tolist()]
        frequencies = (rope["rope_theta"] ** (-2.0 * j / self.text.head_dim)).to(positions.device)
        angles = (positions.float()[axis].T * frequencies).repeat(1, 2)
        dtype = self.weights["lm_head.weight"].dtype
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _named(self, prefix: str):
        return lambda name: self.weights[prefix + name]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate-half: [x_a x_b] -> [x_a x_b] cos + [-x_b x_a] sin."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin
