"""XRoPE: one 3D coordinate space (t, h, w) for text and vision. Integer positions and rotation, as pure functions.

Axes: B text rows, T text tokens, N frames (flat, in the order of their `image_pad` tokens), V vision tokens, d head size.
Source of every formula: sections 3 and 5 of the model's specification; the rotation is RoFormer's (Su et al., 2021).
"""

import torch


def walk_text(
    is_token: torch.Tensor,
    is_frame: torch.Tensor,
    extents: torch.Tensor,
    start: torch.Tensor,
    text_starts: torch.Tensor | None = None,
    first_positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Walks the text rows with a counter p: a token takes p and moves it on by 1; a frame of merged grid H x W takes
    [p, p + max(H, W)), its `image_pad` stands at p + max(H, W), and p goes on after it. Padding moves nothing.

    Args:
        is_token: bool [B, T], False at padding.
        is_frame: bool [B, T], True where an `image_pad` stands for a frame.
        extents: long [N], max(H, W) of the frames, in the row-major order of `is_frame`.
        start: long [B], the counter before each row's first token.
        text_starts: bool [B, T], True at the first token of each text of a packed row. There p becomes `first_positions` [B, T] of that
            token, less the extent if it is an `image_pad` that does not stand at 0.

    Returns:
        Positions of the text [B, T] (the same on all three axes, 0 at padding), the first coordinate p of each frame [N], and the
        counter after each row [B].
    """
    steps = is_token.long()
    steps[is_frame] += extents
    end = start[:, None] + steps.cumsum(dim=1)  # [B, T]
    if text_starts is not None:
        row = torch.arange(steps.shape[1], device=steps.device)
        opener = torch.where(text_starts, row, 0).cummax(1).values  # the first token of each token's text
        ahead = steps - is_token.long()  # the extent of a frame
        begin = torch.where(first_positions > 0, first_positions - ahead, first_positions)
        end = (end - end.gather(1, opener) + steps.gather(1, opener)) + begin.gather(1, opener)
    text = (end - 1).masked_fill(~is_token, 0)
    return text, text[is_frame] - extents, end[:, -1]


def count_tokens(is_token: torch.Tensor, text_starts: torch.Tensor, first_positions: torch.Tensor) -> torch.Tensor:
    """Positions [B, T] that count the tokens of each text from its first one's position on, 0 at padding; frames take no space."""
    no_frame = torch.zeros_like(is_token)
    start = first_positions.new_zeros(len(is_token))
    return walk_text(is_token, no_frame, start[:0], start, text_starts, first_positions)[0]


def find_text_starts(positions: torch.Tensor, begins: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
    """Where texts begin in rows that may pack several: bool [B, T], True at each row's first token and wherever a token's `begins` [B, T]
    is not above the position [B, T] of the token before it. Padding is passed over."""
    index = torch.arange(positions.shape[1], device=positions.device)
    before = torch.where(is_token, index, -1).cummax(1).values.roll(1, dims=1)  # the token before, -1 for none
    before[:, 0] = -1
    return is_token & ((before < 0) | (begins <= positions.gather(1, before.clamp(min=0))))


def frame_positions(origins: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Positions of the vision tokens of frames that share a merged grid, each frame followed by its separator.

    Token (y, x) of a frame that starts at p has (p, p + y, p + x); its separator has p + max(H, W) on every axis.

    Args:
        origins: long [n], the p of each frame.

    Returns:
        long [3, n * (height * width + 1)].
    """
    ys = torch.arange(height, device=origins.device).repeat_interleave(width)
    xs = torch.arange(width, device=origins.device).repeat(height)
    offsets = torch.stack([torch.zeros_like(ys), ys, xs])  # [3, H * W]
    offsets = torch.nn.functional.pad(offsets, (0, 1), value=max(height, width))
    return (origins[None, :, None] + offsets[:, None, :]).flatten(1)


def xrope_rotary(
    positions: torch.Tensor, head_dim: int, theta: float, section: list[int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Interleaved XRoPE as `rotate` takes it. Frequency j of the d/2, theta^(-2j/d), turns with h if j % 3 == 1 and
    j < 3 * section[1], with w if j % 3 == 2 and j < 3 * section[2], else with t. Computed in float32, cast at the end.

    Args:
        positions: [3, ...].

    Returns:
        Cosines and signed sines, each [..., d].
    """
    j = torch.arange(head_dim // 2, device=positions.device)
    frequencies = theta ** (-2.0 * j.float() / head_dim)
    axis = torch.zeros_like(j)
    axis[(j % 3 == 1) & (j < 3 * section[1])] = 1
    axis[(j % 3 == 2) & (j < 3 * section[2])] = 2
    angles = positions.float()[axis].movedim(0, -1) * frequencies  # [..., d / 2]
    return cos_sin(angles, dtype)


def grid_rotary(rows: torch.Tensor, columns: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The vision encoder's 2D rotary positions as `rotate` takes them, in float32: d/4 frequencies 10000^(-4i/d), first of the row,
    then of the column.

    Args:
        rows, columns: [P], the place of each patch in its frame.

    Returns:
        Cosines and signed sines, each [P, d].
    """
    i = torch.arange(head_dim // 4, device=rows.device)
    frequencies = 10000.0 ** (-4.0 * i.float() / head_dim)
    angles = torch.cat([rows.float()[:, None] * frequencies, columns.float()[:, None] * frequencies], dim=-1)
    return cos_sin(angles, torch.float32)


def cos_sin(angles: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Angles [..., d / 2] -> [cos cos] and [-sin sin], each [..., d]."""
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the pairs (j, j + d/2): [x_a x_b] -> [x_a x_b] [cos cos] + [x_b x_a] [-sin sin].

    Args:
        x: [..., d]; cos, sin: broadcast to it, as `cos_sin` makes them.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
