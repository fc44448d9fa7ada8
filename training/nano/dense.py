"""The model's forward over padded tensors, for train_nano.py: a few large operations in place of many small ones.

`collate` joins drawn batches of one kind (lessons.py) into the tensors of one optimizer step, without a model, in the
processes that draw. `encode` and `decode` compute what `MossVLForConditionalGeneration` computes, with its parameters,
as a test checks: all frames of a step are encoded at once, and all rows attend to their vision tokens in one operation
a layer. Nothing waits for the device.

Axes: N encoded frames, P patches of the largest one, G grids, R = m^2 patches of a vision token, B rows, T text tokens,
S vision tokens of the row with the most, H heads, K key/value heads, d head size, D channels.
"""

import itertools

import torch
import torch.nn.functional as F

from moss_vl.training.nano.facts import IGNORED
from moss_vl.xrope import frame_positions, grid_rotary, rotate, xrope_rotary


HIDDEN = -1e4  # added to the scores of tokens that are not visible
PATCH_STEP, TEXT_STEP, VISION_STEP = 16, 32, 64  # sizes of padded axes are multiples of these
MERGED = 4  # patches of a vision token


# collation


def rounded(size: int, step: int) -> int:
    return -(-size // step) * step


def padded(parts: list[torch.Tensor], length: int, fill) -> torch.Tensor:
    """Tensors [n, ...] as one [parts, length, ...]."""
    out = parts[0].new_full((len(parts), length, *parts[0].shape[1:]), fill)
    for row, part in zip(out, parts, strict=True):
        row[: len(part)] = part
    return out


def collate(batches: list[dict], side: int, head_dim: int, image_pad: int) -> dict:
    """The tensors of a step from batches of one kind.

    Args:
        side: rows of the encoder's table of learned positions.
        head_dim: of the encoder.
        image_pad: id of the text token of a frame.
    """
    frames, moments = [], []  # patches and grid of each encoded frame; for each frame of a row, its encoded frame
    for batch in batches:
        add_frames(batch, frames, moments)
    step = {"kind": batches[0]["kind"], **frame_inputs(frames, side, head_dim)}
    if "token_facts" in batches[0] and "input_ids" not in batches[0]:
        return step | look_targets(batches, frames, step["pixels"].shape[1])
    return step | text_inputs(batches, frames, moments, step["pixels"].shape[1] // MERGED, image_pad)


def uint8_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels of 0 to 255 from those, or from normalised ones."""
    return pixels if pixels.dtype == torch.uint8 else (pixels.float() * 127.5 + 127.5).round().to(torch.uint8)


def add_frames(batch: dict, frames: list, moments: list[int]) -> None:
    """Appends a batch's encoded frames, (patches [P, values], grid), and the index of the one of each of its frames."""
    sizes = [t * h * w for t, h, w in batch["grid_thw"]]
    parts = uint8_pixels(batch["pixel_values"]).split(sizes)
    media_moments = batch.get("moments") or [list(range(t)) for t, _, _ in batch["grid_thw"]]
    for pixels, (t, h, w), looks in zip(parts, batch["grid_thw"], media_moments, strict=True):
        first = len(frames)
        for moment in range(max(looks) + 1):
            frames.append((pixels.view(t, h * w, -1)[looks.index(moment)], (h, w)))
        moments += [first + moment for moment in looks]


def frame_inputs(frames: list, side: int, head_dim: int) -> dict:
    """Pixels, and for each grid its learned positions and rotary, of all frames padded to the same patches."""
    length = rounded(max(len(pixels) for pixels, _ in frames), PATCH_STEP)
    grids = list(dict.fromkeys(grid for _, grid in frames))
    rotary = [patch_rotary(*grid, head_dim) for grid in grids]
    counts = torch.tensor([len(pixels) for pixels, _ in frames])
    return {
        "pixels": padded([pixels for pixels, _ in frames], length, 0),
        "patches": counts,
        "padded": bool((counts < length).any()),
        "grid": torch.tensor([grids.index(grid) for _, grid in frames]),
        "interpolation": padded([interpolation(*grid, side) for grid in grids], length, 0.0),
        "patch_cos": padded([cos for cos, _ in rotary], length, 1.0),
        "patch_sin": padded([sin for _, sin in rotary], length, 0.0),
    }


def patch_places(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of each patch of a frame, in merge-block order: [P] each."""
    y = torch.arange(rows).view(-1, 1, 2, 1)
    x = torch.arange(columns).view(1, -1, 1, 2)
    y, x = torch.broadcast_tensors(y, x)
    return y.flatten(), x.flatten()


def patch_rotary(rows: int, columns: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    return grid_rotary(*patch_places(rows, columns), head_dim)


def interpolation(rows: int, columns: int, side: int) -> torch.Tensor:
    """[P, side^2]: the bilinear weights of the table of learned positions for each patch, end points included."""
    y, x = patch_places(rows, columns)
    return (line_weights(rows, side)[y, :, None] * line_weights(columns, side)[x, None, :]).flatten(1)


def line_weights(count: int, side: int) -> torch.Tensor:
    """[count, side]: linear interpolation at `linspace(0, side - 1, count)`."""
    places = torch.linspace(0, side - 1, count)
    return (1 - (places[:, None] - torch.arange(side)).abs()).clamp(min=0)


def look_targets(batches: list[dict], frames: list, length: int) -> dict:
    """Targets of the encoder: token facts [N, P / R, facts], and ink [N, P, 64], -1 at padding."""
    sizes = [len(pixels) for pixels, _ in frames]
    facts = torch.cat([batch["token_facts"] for batch in batches]).split([size // MERGED for size in sizes])
    ink = torch.cat([batch["ink"] for batch in batches]).float().split(sizes)
    return {"token_facts": padded(list(facts), length // MERGED, IGNORED), "ink": padded(list(ink), length, -1.0)}


def text_inputs(batches: list[dict], frames: list, moments: list[int], tokens: int, image_pad: int) -> dict:
    """Text, and which vision tokens each row sees. `tokens`: vision tokens of a padded frame."""
    length = max(batch["input_ids"].shape[1] for batch in batches)

    def joined(name, fill):
        return torch.cat([F.pad(batch[name], (0, length - batch[name].shape[1]), value=fill) for batch in batches])

    ids, positions, parts = joined("input_ids", 0), joined("position_ids", 0), joined("parts", -1)
    pads = ids == image_pad
    seen = pads.cumsum(1)
    out = {"ids": ids, "positions": positions, "parts": parts, "pads": pads.flatten().nonzero()[:, 0]}
    out["before"] = seen - pads.long()  # frames before each token
    if "seen" in batches[0]:
        seen = joined("seen", 0)
    out["seen"], out["frames"] = seen, pads.sum(1)
    origins = positions[pads].tolist()
    out |= vision_rows(out["frames"].tolist(), [frames[moment][1] for moment in moments], origins, moments, tokens, len(frames))
    out["frame_facts"] = torch.cat([batch["frame_facts"] for batch in batches])
    out |= answers(joined("labels", IGNORED), joined("weights", 0.0), joined("tasks", -1), parts)
    out["attention"] = joined_points([batch["attention"] for batch in batches], batches)
    out["noisy"] = "moments" in batches[0]
    return out


def vision_rows(counts, grids, origins, moments, tokens: int, encoded: int) -> dict:
    """For each row, its vision tokens: index in the encoder's output, number of their frame, and position.

    Args:
        counts: frames of each row.
        grids: patch rows and columns of all frames, row after row.
        origins: position of the text token of each frame.
        moments: index of the encoded frame of each frame.
        tokens, encoded: vision tokens of an encoded frame with its padding, and the number of encoded frames. The
            separator comes after the tokens of all of them.
    """
    indices, numbers, positions, first = [], [], [], 0
    for count in counts:
        index, number, position = [], [], []
        for frame in range(first, first + count):
            h, w = (size // 2 for size in grids[frame])
            begin = moments[frame] * tokens
            index += [*range(begin, begin + h * w), encoded * tokens]
            number += [frame - first] * (h * w + 1)
            position.append(frame_positions(torch.tensor([origins[frame] - max(h, w)]), h, w))
        indices.append(torch.tensor(index))
        numbers.append(torch.tensor(number))
        positions.append(torch.cat(position, 1).T)
        first += count
    length = rounded(max(map(len, indices)), VISION_STEP)
    return {
        "vision_index": padded(indices, length, encoded * tokens),
        "vision_frame": padded(numbers, length, 1 << 30),
        "vision_positions": padded(positions, length, 0).permute(2, 0, 1).contiguous(),
    }


def answers(labels, weights, tasks, parts) -> dict:
    """The tokens before those of answers (indices in the flattened batch), with targets, weights, and answers."""
    learned = labels[:, 1:] != IGNORED
    rows, columns = learned.nonzero(as_tuple=True)
    picked = [part[:, 1:][learned] for part in (labels, weights, tasks, parts)]
    keys = rows * (1 << 16) + picked[3]
    names, answer = keys.unique(return_inverse=True)
    task = torch.zeros(len(names), dtype=torch.long).scatter_(0, answer, picked[2])
    return {
        "learned": rows * labels.shape[1] + columns,
        "targets": picked[0],
        "weights": picked[1],
        "answer": answer,
        "answer_tasks": task,
    }


def joined_points(points: list[dict], batches: list[dict]) -> dict[str, tuple[torch.Tensor, int]]:
    """name -> ([5, points]: row, head, text token, target token, group; number of groups)."""
    begins = [0, *itertools.accumulate(len(batch["input_ids"]) for batch in batches)]
    out = {}
    for name in dict.fromkeys(name for part in points for name in part):
        parts, groups = [], 0
        for part, begin in zip(points, begins, strict=False):
            if name in part:
                shift = torch.tensor([begin, 0, 0, 0, groups])
                parts.append(part[name] + shift)
                groups = int(parts[-1][-1, 4]) + 1
        out[name] = torch.cat(parts).T.contiguous(), groups
    return out


# the model


def attend(query, key, value, bias, scaling: float, fused: bool):
    """query [B, H, T, d], key and value [B, K, S, d], bias [B, 1, T or 1, S] or None.

    Returns:
        [B, T, H * d], and the weights [B, H, T, S]; None in place of them if `fused`.
    """
    (batch, heads, length, d), kv_heads = query.shape, key.shape[1]
    if fused:
        if kv_heads < heads:
            key, value = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (key, value))
        bias = None if bias is None else bias.expand(-1, heads, length, -1)
        out = F.scaled_dot_product_attention(query, key, value, bias, scale=scaling)
        return out.transpose(1, 2).flatten(2), None
    grouped = (query * scaling).reshape(batch, kv_heads, -1, d)
    scores = (grouped @ key.transpose(2, 3)).view(batch, heads, length, -1)
    weights = F.softmax(scores if bias is None else scores + bias, dim=-1)
    out = weights.view(batch, kv_heads, -1, key.shape[2]) @ value
    return out.view(batch, heads, length, d).transpose(1, 2).flatten(2), weights


def encode(visual, step: dict, record: int | None = None, fused: bool = False):
    """Vision tokens [N, P / R, D] of all frames, padding included; and the states [N, P, D] after the block `record`."""
    dtype = visual.patch_embed.proj.weight.dtype
    pixels = ((step["pixels"].float() - 127.5) / 127.5).to(dtype)
    learned = (step["interpolation"] @ visual.pos_embed.weight.float()).to(dtype)
    states = visual.patch_embed(pixels) + learned.index_select(0, step["grid"])
    cos, sin = (step[name].index_select(0, step["grid"])[:, None] for name in ("patch_cos", "patch_sin"))
    bias = None
    if step["padded"]:
        patch = torch.arange(states.shape[1], device=states.device)
        bias = ((patch >= step["patches"][:, None]) * HIDDEN).to(dtype)[:, None, None]
    kept, recorded = [], None
    for index, block in enumerate(visual.blocks):
        attn = block.attn
        qkv = attn.qkv(block.norm1(states)).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = (rotate(part.float(), cos, sin).to(dtype) for part in qkv[:2])
        out, _ = attend(query, key, qkv[2], bias, attn.scaling, fused)
        states = states + attn.proj(out)
        states = states + block.mlp.linear_fc2(block.mlp.act_fn(block.mlp.linear_fc1(block.norm2(states))))
        if index in visual.config.deepstack_visual_indexes:
            kept.append(states)
        if index == record:
            recorded = states
    return visual.merger([states, *kept]).unflatten(0, (len(states), -1)), recorded


def self_bias(step: dict, dtype) -> torch.Tensor:
    """[B, 1, T, T]: 0 where a token sees an earlier one of the media or of its own question, else HIDDEN.

    A question about an earlier time sees the media up to the last of its frames.
    """
    parts, seen, before = step["parts"], step["seen"], step["before"]
    media = (parts == 0)[:, None, :]
    visible = media | (parts[:, None, :] == parts[:, :, None])
    asked_early = (parts > 0) & (seen < step["frames"][:, None])
    late = media & (before[:, None, :] >= seen[:, :, None]) & asked_early[:, :, None]
    length = parts.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=parts.device).tril()
    return ((~(visible & causal & ~late)) * HIDDEN).to(dtype)[:, None]


def decode(language_model, step: dict, vision: torch.Tensor, states_of=(), weights_of=(), fused: bool = False):
    """The decoder over text and the vision tokens [B, S, D] of each row.

    Returns:
        Final states [B, T, D]; the outputs of the layers `states_of`; the attention weights of the layers `weights_of`.
    """
    config, dtype = language_model.config, language_model.embed_tokens.weight.dtype
    rope = config.rope_parameters
    rope = (config.head_dim, rope["rope_theta"], rope["mrope_section"], dtype)
    rotary = [part[:, None] for part in xrope_rotary(step["positions"].expand(3, -1, -1), *rope)]
    vision_rotary = [part[:, None] for part in xrope_rotary(step["vision_positions"], *rope)]
    bias = self_bias(step, dtype)
    hidden_frames = step["vision_frame"][:, None, :] >= step["seen"][:, :, None]
    vision_bias = (hidden_frames * HIDDEN).to(dtype)[:, None]
    sees = (step["seen"] > 0).to(dtype)[..., None]
    states, recorded, weights = language_model.embed_tokens(step["ids"]), {}, {}
    for index, layer in enumerate(language_model.layers):
        crosses = hasattr(layer, "cross_attn")
        attention = layer.cross_attn if crosses else layer.self_attn
        normed = layer.input_layernorm(states)
        source, source_rotary = (vision, vision_rotary) if crosses else (normed, rotary)
        query = attention.queries(normed, rotary)
        key, value = attention.keys_values(source, source_rotary)
        mask = vision_bias if crosses else bias
        out, weight = attend(query, key, value, mask, attention.scaling, fused and index not in weights_of)
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
    """Vision tokens [B, S, D] of each row, with separators, from those of the encoded frames [N, P / R, D].

    Args:
        noise: of the tokens of clips, in standard deviations.
    """
    flat = torch.cat([tokens.flatten(0, 1), separator.to(tokens)[None]])
    index = step["vision_index"]
    vision = F.embedding(index, flat)
    if noise and step["noisy"]:
        spread = noise * flat[:-1].std(0) * (index < len(flat) - 1)[..., None]
        vision = vision + spread * torch.randn_like(vision)
    return vision
