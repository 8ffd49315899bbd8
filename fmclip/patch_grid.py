"""The grid of patches over a letterboxed scan: which patches lie on the scan, and how much they count."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

BORDER_WEIGHT = 0.8  # for evidence in the outermost ring of patches: they see padding, frames and burned-in marks


def patch_content(content: Tensor, grid: tuple[int, int]) -> Tensor:
    """Which patches lie mostly inside the scan: [B, S, S] bool -> [B, h, w] bool; never none of a scan's."""
    share = F.adaptive_avg_pool2d(content[:, None].float(), grid)[:, 0]  # [B, h, w]
    return share >= share.flatten(1).amax(dim=1).clamp_max(0.5).view(-1, 1, 1)


def patch_weight(content: Tensor, grid: tuple[int, int]) -> Tensor:
    """How much evidence counts: 0 on letterbox bars, `BORDER_WEIGHT` beside them and at the edge of the square, else 1.

    [B, S, S] bool -> [B, h, w].
    """
    inside = patch_content(content, grid).float()
    core = -F.max_pool2d(-F.pad(inside[:, None], (1, 1, 1, 1)), 3, stride=1)[:, 0]  # erosion: [B, h, w]
    return BORDER_WEIGHT * inside + (1 - BORDER_WEIGHT) * core


def grid_of(maps: Tensor) -> tuple[int, int]:
    """Rows and columns of maps [..., h, w]."""
    return maps.shape[-2], maps.shape[-1]
