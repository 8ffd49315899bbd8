"""From aligned features and prompts to one anomaly map (FusionMedCLIP section 3.2.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def similarity_map(aligned: Tensor, prompts: Tensor, temperature: Tensor | float) -> Tensor:
    """Probability of "abnormal" at each place (Eq. 6).

    Args:
        aligned: [B, D, H_j, W_j], unit length at each place.
        prompts: [2, D], unit length: normal, abnormal.
        temperature: tau.

    Returns:
        S_a^j [B, H_j, W_j] in [0, 1].
    """
    cosines = torch.einsum("bdhw,cd->bchw", aligned, prompts)  # [B, 2, H_j, W_j]
    return ((cosines[:, 1] - cosines[:, 0]) / temperature).sigmoid()  # a softmax over two


def average_maps(maps: Sequence[Tensor], size: int | tuple[int, int]) -> Tensor:
    """Upsample each level's map bilinearly and average over the levels (Eq. 7).

    Args:
        maps: One [B, H_j, W_j] for each level.
        size: Side of the result in pixels.

    Returns:
        S_a [B, H, W].
    """
    side = (size, size) if isinstance(size, int) else size
    return torch.stack([resize_map(one, side) for one in maps]).mean(dim=0)


def resize_map(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize: [B, h, w] -> [B, *size]."""
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def smooth_inside(maps: Tensor, weight: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of weighted evidence over the places of a scan only, so that its edge is neither dimmed nor sharp.

    Args:
        maps: [B, h, w].
        weight: [B, h, w] >= 0, 0 on letterbox bars.
        sigma: In places.

    Returns:
        [B, h, w], 0 on letterbox bars.
    """
    inside = (weight > 0).to(maps)
    return smooth_map(maps * weight, sigma) / smooth_map(inside, sigma).clamp_min(1e-6) * inside


def smooth_map(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of [B, h, w] with sigma in places; a single hot place counts for less than a hot region."""
    if sigma <= 0:
        return maps
    radius = max(1, round(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=maps.dtype, device=maps.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(maps[:, None], (radius, radius, radius, radius), mode="replicate")  # [B, 1, h + 2r, w + 2r]
    rows = F.conv2d(padded, kernel.view(1, 1, -1, 1))
    return F.conv2d(rows, kernel.view(1, 1, 1, -1))[:, 0]  # [B, h, w]
