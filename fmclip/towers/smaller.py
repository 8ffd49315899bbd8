"""A second look at a smaller, mirrored copy of the picture.

What a CNN makes of a picture depends on its size: in a smaller copy each patch sees more of its surroundings, and the
mirrored copy is seen with other random errors. Beside the first look it says better where an anomaly lies
(benchmarks/NOTES.md). A vision transformer, whose position embeddings are made for one size, has no such look.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor

from fmclip.towers.ahead import Ahead
from fmclip.towers.taps import Tap

SHARE = 5, 7
"""Side of the copy to that of the picture, before it is rounded up; chosen on the tuning half."""


PlainPlace: TypeAlias = int | Tap | Ahead
"""Where features are taken in one look."""


@dataclass(frozen=True)
class Smaller:
    """A place in the look at the smaller copy.

    Attributes:
        of: The same place in the look at the picture itself.
        side: Side of the copy in pixels.
        grid: Rows and columns (H_j, W_j) that the features are brought to.
    """

    of: PlainPlace
    side: int
    grid: tuple[int, int]

    def restore(self, features: Tensor) -> Tensor:
        """Mirror features back and bring them to `grid`: [B, C_j, h, w] -> [B, C_j, H_j, W_j]."""
        return F.interpolate(features.flip(3), self.grid, mode="bilinear", align_corners=False)


def smaller_side(image_size: int, stride: int) -> int | None:
    """Side of the copy in pixels, a multiple of the stride; None where that leaves the size as it is."""
    part, whole = SHARE
    side = math.ceil(image_size * part / (whole * stride)) * stride
    return side if side < image_size else None


def smaller(pixels: Tensor, side: int) -> Tensor:
    """Make pictures smaller and mirror them: [B, 3, S, S] -> [B, 3, side, side]."""
    return F.interpolate(pixels, (side, side), mode="bilinear", align_corners=False).flip(3)
