"""Patches: from frames to rows of levels, and from levels to the values that the vision encoder takes.

Axes: n frames, h rows, w columns, p patch size, m merge size, t temporal patch size, P patches, k = t * p * p.
"""

import torch


def patchify(
    frames: torch.Tensor,
    patch_size: int,
    merge_size: int,
    temporal_patch_size: int = 1,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """[n, 3, h, w] -> [P, 3 * t * p * p], frame by frame, merge block by merge block (model.md, section 3); written to `out`, which is
    contiguous, where it is given.

    h and w are multiples of p * m. The last frame is repeated where n is no multiple of t.
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
    """uint8 [P, 3 * k] levels -> float32 (x / 255 - mean) / std, written to `out` where it is given.

    Computed as (x - 255 mean) / (255 std), which has no rounding but that of the division at mean = std = 0.5. `image_mean` and
    `image_std`: three numbers, or for each patch its own, [P, 3].
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


def join_patches(parts: list, raw: bool) -> dict:
    """Media one behind the other, each as (levels uint8 [P, values], mean, std): `pixel_values`, in float32, or where `raw` as levels
    with the `image_mean` and `image_std` of each medium. Empties `parts` on the way, so that each is let go once it is written."""
    statistics = (
        {"image_mean": [[*mean] for _, mean, _ in parts], "image_std": [[*std] for _, _, std in parts]} if raw else {}
    )
    if raw and len(parts) == 1:
        return {"pixel_values": parts.pop()[0], **statistics}
    sizes = [len(patches) for patches, *_ in parts]
    pixel_values = torch.empty(sum(sizes), parts[0][0].shape[1], dtype=torch.uint8 if raw else torch.float32)
    for out in pixel_values.split(sizes):
        patches, mean, std = parts.pop(0)
        out.copy_(patches) if raw else normalise(patches, mean, std, out=out)
    return {"pixel_values": pixel_values, **statistics}
