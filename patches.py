"""Patches: frames -> rows of uint8 pixels -> the normalised values that the vision encoder takes.

Axes: n frames, h rows, w columns, p patch size, m merge size, t temporal patch size, P patches, k = t * p * p.
"""

from collections.abc import Sequence

import torch


def patchify(
    frames: torch.Tensor,
    patch_size: int,
    merge_size: int,
    temporal_patch_size: int = 1,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """[n, 3, h, w] -> [P, 3 * k], frame by frame, merge block by merge block (docs/model.md, section "Vision
    encoder").

    Args:
        frames: h and w are multiples of p * m. If n is not a multiple of t, the last frame is repeated.
        out: contiguous; the result is written into it if given.
    """
    n, c, height, width = frames.shape
    t, p, m = temporal_patch_size, patch_size, merge_size
    if n % t:
        frames = torch.cat([frames, frames[-1:].expand(t - n % t, -1, -1, -1)])
    blocks = frames.reshape(-1, t, c, height // (p * m), m, p, width // (p * m), m, p)
    # [T, t, c, Y, my, py, X, mx, px] -> [T, Y, X, my, mx, c, t, py, px]
    blocks = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    if out is not None:
        out.view(blocks.shape).copy_(blocks)
        return out
    return blocks.reshape(-1, c * t * p * p)


def normalise(patches: torch.Tensor, image_mean, image_std, out: torch.Tensor | None = None) -> torch.Tensor:
    """uint8 pixels [P, 3 * k] -> float32 (x / 255 - mean) / std.

    Computed as (x - 255 mean) / (255 std): for mean = std = 0.5 only the division rounds.

    Args:
        image_mean, image_std: three numbers, or [P, 3] for each patch.
        out: the result is written into it if given.
    """
    out = torch.empty(patches.shape, dtype=torch.float32, device=patches.device) if out is None else out
    out.copy_(patches)
    channels = out.view(len(out), 3, -1)
    mean, std = (
        torch.as_tensor(x, dtype=torch.float64).mul(255).float().to(out.device)[..., None]
        for x in (image_mean, image_std)
    )
    channels.sub_(mean)
    channels.div_(std)
    return out


def join_patches(
    parts: list[tuple[torch.Tensor, Sequence[float], Sequence[float]]], keep_uint8: bool
) -> dict[str, torch.Tensor | list]:
    """Concatenates the patches of media, each (uint8 pixels [P, values], mean, std).

    Empties `parts`, so that the memory of each medium is free once it is copied.

    Returns:
        `pixel_values`: normalised float32; if `keep_uint8` the uint8 pixels, with `image_mean` and `image_std` per
            medium.
    """
    statistics = {}
    if keep_uint8:
        statistics = {"image_mean": [[*mean] for _, mean, _ in parts], "image_std": [[*std] for _, _, std in parts]}
    if keep_uint8 and len(parts) == 1:
        return {"pixel_values": parts.pop()[0], **statistics}
    sizes = [len(patches) for patches, *_ in parts]
    dtype = torch.uint8 if keep_uint8 else torch.float32
    pixel_values = torch.empty(sum(sizes), parts[0][0].shape[1], dtype=dtype)
    for out in pixel_values.split(sizes):
        patches, mean, std = parts.pop(0)
        out.copy_(patches) if keep_uint8 else normalise(patches, mean, std, out=out)
    return {"pixel_values": pixel_values, **statistics}
