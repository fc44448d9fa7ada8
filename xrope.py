"""XRoPE: one 3D coordinate space (t, h, w) for text and vision. Integer positions and rotation, as pure functions.

Axes: B rows, T text tokens, N frames (flat, in the order of their `image_pad` tokens), V vision tokens, d head
size. Sources: docs/model.md, sections "XRoPE" and "Vision encoder"; the rotation is that of RoFormer (Su et al.,
2021).
"""

import torch
import torch.nn.functional as F


def walk_text(
    is_token: torch.Tensor,
    is_frame: torch.Tensor,
    extents: torch.Tensor,
    start: torch.Tensor,
    text_starts: torch.Tensor | None = None,
    first_positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Walks along each row with a counter p, from which all positions follow. A text token takes position p, then p
    grows by 1. A frame of merged grid H x W starts at p; its `image_pad` takes position p + max(H, W), then p
    continues one after that position. Padding does not change p. An example row, with frames of 2 x 3 and 1 x 2 (`I`
    is an `image_pad`):

        token        a    I    b    I    c
        p before     0    1    5    6    9
        advance      1  3+1    1  2+1    1      max(H, W) = 3, 2
        position     0    4    5    8    9      p before + advance - 1
        frame p           1         6           p before
                                                p after the row: 10

    Args:
        is_token: bool [B, T], False at padding.
        is_frame: bool [B, T], True at the `image_pad` of a frame.
        extents: long [N], max(H, W) of the frames, in the row-major order of `is_frame`.
        start: long [B], p before the first token of each row.
        text_starts: bool [B, T], True at the first token of each packed text. There p restarts, so that this token
            gets its position from `first_positions` [B, T]. If that is 0 at an `image_pad`, its frame starts at p = 0.

    Returns:
        Text positions [B, T] (equal on all three axes, 0 at padding), p at each frame [N], and p after each row [B].
    """
    advance = is_token.long()
    advance[is_frame] += extents
    after = start[:, None] + advance.cumsum(dim=1)  # [B, T], p after each token
    if text_starts is not None:
        column = torch.arange(advance.shape[1], device=advance.device)
        # [B, T], the column of the first token of each token's text
        first = torch.where(text_starts, column, 0).cummax(1).values
        extent = advance - is_token.long()
        restart = torch.where(first_positions > 0, first_positions - extent, first_positions)
        before = after - advance
        after = after - before.gather(1, first) + restart.gather(1, first)
    text = (after - 1).masked_fill(~is_token, 0)
    return text, text[is_frame] - extents, after[:, -1]


def count_tokens(is_token: torch.Tensor, text_starts: torch.Tensor, first_positions: torch.Tensor) -> torch.Tensor:
    """Positions [B, T] that count the tokens of each text from the position of its first token, as if frames took no
    space; 0 at padding."""
    no_frame = torch.zeros_like(is_token)
    start = first_positions.new_zeros(len(is_token))
    return walk_text(is_token, no_frame, start[:0], start, text_starts, first_positions)[0]


def find_text_starts(positions: torch.Tensor, begins: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
    """The first token of each text in rows that may pack several texts: bool [B, T], True at the first token of each
    row, and at tokens whose `begins` [B, T] is not above the position of the previous token. Padding is skipped."""
    column = torch.arange(positions.shape[1], device=positions.device)
    # [B, T], the column of the token before each one, or -1
    previous = torch.where(is_token, column, -1).cummax(1).values.roll(1, dims=1)
    previous[:, 0] = -1
    return is_token & ((previous < 0) | (begins <= positions.gather(1, previous.clamp(min=0))))


def frame_positions(origins: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Positions of the vision tokens of frames that share a merged grid, each frame followed by its separator.

    Token (y, x) of a frame that starts at p has (p, p + y, p + x); its separator has p + max(H, W) on every axis. The
    2 x 3 frame of `walk_text`, which starts at 1:

        t   1 1 1 1 1 1 4
        h   1 1 1 2 2 2 4
        w   1 2 3 1 2 3 4

    Args:
        origins: long [n], the p of each frame.

    Returns:
        long [3, n * (height * width + 1)].
    """
    ys = torch.arange(height, device=origins.device).repeat_interleave(width)
    xs = torch.arange(width, device=origins.device).repeat(height)
    offsets = torch.stack([torch.zeros_like(ys), ys, xs])  # [3, H * W]
    offsets = F.pad(offsets, (0, 1), value=max(height, width))  # the separator
    return (origins[None, :, None] + offsets[:, None, :]).flatten(1)


def xrope_rotary(
    positions: torch.Tensor, head_dim: int, theta: float, section: list[int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotary of text and vision tokens, computed in float32 and cast at the end.

    Frequency j of d/2 is theta^(-2j/d). It is multiplied by the position on one axis: on h if j % 3 == 1 and j < 3 *
    section[1], on w if j % 3 == 2 and j < 3 * section[2], otherwise on t. The order is t h w t h w ... t t t.

    Args:
        positions: [3, ...].

    Returns:
        (cos, sin), each [..., d], as `rotate` takes them.
    """
    j = torch.arange(head_dim // 2, device=positions.device)
    frequencies = theta ** (-2.0 * j.float() / head_dim)
    axis = torch.zeros_like(j)
    axis[(j % 3 == 1) & (j < 3 * section[1])] = 1
    axis[(j % 3 == 2) & (j < 3 * section[2])] = 2
    angles = positions.float()[axis].movedim(0, -1) * frequencies  # [..., d / 2]
    return cos_sin(angles, dtype)


def text_rotary(
    positions: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """`xrope_rotary` of tokens whose position is the same on all axes, [...] -> (cos, sin), each [..., d]."""
    frequencies = theta ** (-2.0 * torch.arange(head_dim // 2, device=positions.device).float() / head_dim)
    return cos_sin(positions.float()[..., None] * frequencies, dtype)


def grid_rotary(rows: torch.Tensor, columns: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The 2D rotary of the vision encoder, in float32: d/4 frequencies 10000^(-4i/d), for the row, then for the
    column.

    Args:
        rows, columns: [P], the row and column of each patch in its frame.

    Returns:
        (cos, sin), each [P, d], as `rotate` takes them.
    """
    i = torch.arange(head_dim // 4, device=rows.device)
    frequencies = 10000.0 ** (-4.0 * i.float() / head_dim)
    angles = torch.cat([rows.float()[:, None] * frequencies, columns.float()[:, None] * frequencies], dim=-1)
    return cos_sin(angles, torch.float32)


def cos_sin(angles: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Angles [..., d / 2] -> (cos, sin), each [..., d]. The first half of the sines is negated, as `rotate` needs."""
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    # [c0 c1] -> [c0 c1 c0 c1] and [s0 s1] -> [-s0 -s1 s0 s1]
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (j, j + d/2) of x [..., d] by rotate-half:

        x * [c0 c1 c0 c1] + half * [s0 s1 s0 s1], where half: [x0 x1 x2 x3] -> [-x2 -x3 x0 x1]

    Args:
        cos, sin: broadcast to x, as `cos_sin` returns them.
    """
    # roll: [x0 x1 x2 x3] -> [x2 x3 x0 x1]; the signs of half are those of sin = [-s0 -s1 s0 s1]
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
