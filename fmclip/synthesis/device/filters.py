"""Filters over batches of boxes of different sizes: each is a product with two matrices, so that one call does all.

A box of h x w pixels lies in the upper left of a canvas of H x W, as large as the largest box of the batch. A filter
that works on rows and columns one after the other (Gaussian, box mean, cubic enlargement) is a matrix for the rows
[H, H] and one for the columns [W, W] of each box, with the border rule in it: at the size of a scan that costs a GPU
nothing, and no two boxes need the same sigma. Figures agree with OpenCV's, which the CPU path uses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_CUBIC = -0.75  # OpenCV's


def reflect(index: Tensor, size: Tensor) -> Tensor:
    """Mirror positions at the first and the last place (BORDER_REFLECT_101), as often as it takes.

    Args:
        index: Positions of any shape, whole or not.
        size: Places, at least 1; broadcasts to `index`.

    Returns:
        Positions in [0, size - 1], same shape and dtype as `index`.
    """
    last = (size - 1).to(index.dtype)
    turn = torch.remainder(index, (2 * last).clamp_min(1))
    return torch.where(turn > last, 2 * last - turn, turn) * (last > 0)


def gaussian_matrix(size: Tensor, sigma: Tensor, side: int) -> Tensor:
    """Gaussian blur along one axis, as `cv2.GaussianBlur` with the kernel's size left open.

    Args:
        size: [B] places of each box.
        sigma: [B] in places.
        side: Places of the canvas.

    Returns:
        [B, side, side]; zero rows beyond a box.
    """
    reach = torch.div(torch.round(8 * sigma + 1).long() | 1, 2, rounding_mode="floor")  # [B]
    offsets = _offsets(reach)
    weights = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2) * (offsets.abs() <= reach[:, None])  # [B, K]
    return _banded(size, weights / weights.sum(dim=1, keepdim=True), offsets, side)


def mean_matrix(size: Tensor, width: Tensor, side: int) -> Tensor:
    """Mean of `width` [B] places (odd), as `cv2.blur`; the rest as for `gaussian_matrix`."""
    reach = torch.div(width, 2, rounding_mode="floor")
    offsets = _offsets(reach)
    weights = (offsets.abs() <= reach[:, None]).float()
    return _banded(size, weights / width[:, None], offsets, side)


def cubic_matrix(size: Tensor, coarse: Tensor, factor: Tensor, side: int, coarse_side: int) -> Tensor:
    """Cubic enlargement along one axis, as `cv2.resize`, of which the first `size` places are kept.

    Args:
        size: [B] places of each box.
        coarse: [B] places before.
        factor: [B] how many places one becomes.
        side: Places of the canvas.
        coarse_side: Places of the canvas before.

    Returns:
        [B, side, coarse_side].
    """
    place = torch.arange(side, device=size.device)
    at = (place + 0.5) / factor[:, None] - 0.5  # [B, side]
    first = at.floor()
    t = (at - first).float()
    near, far = (_cubic_near(t), _cubic_near(1 - t)), (_cubic_far(1 + t), _cubic_far(2 - t))
    matrix = torch.zeros(len(size), side, coarse_side, device=size.device)
    for offset, weight in zip((-1, 0, 1, 2), (far[0], *near, far[1]), strict=True):
        column = (first.long() + offset).clamp_min(0).minimum(coarse[:, None] - 1)  # the border is repeated
        matrix.scatter_add_(2, column[..., None], weight[..., None])
    return matrix * (place < size[:, None])[..., None]


def apply_matrices(planes: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Filter rows and columns: planes [B, H, W] or [B, C, H, W], matrices [B, H', H] and [B, W', W]."""
    if planes.ndim == 4:
        rows, columns = rows[:, None], columns[:, None]
    return rows @ planes @ columns.mT


def gaussian_blur(planes: Tensor, sizes: Tensor, sigma: Tensor, sigma_rows: Tensor | None = None) -> Tensor:
    """`cv2.GaussianBlur` of every box: planes [B, (C,) H, W], sizes [B, 2] rows and columns, sigma [B]."""
    rows = gaussian_matrix(sizes[:, 0], sigma if sigma_rows is None else sigma_rows, planes.shape[-2])
    return apply_matrices(planes, rows, gaussian_matrix(sizes[:, 1], sigma, planes.shape[-1]))


def box_blur(planes: Tensor, sizes: Tensor, width: Tensor) -> Tensor:
    """`cv2.blur` of every box: planes [B, (C,) H, W], sizes [B, 2] rows and columns, width [B] odd."""
    rows = mean_matrix(sizes[:, 0], width, planes.shape[-2])
    return apply_matrices(planes, rows, mean_matrix(sizes[:, 1], width, planes.shape[-1]))


def enlarge(coarse: Tensor, coarse_sizes: Tensor, factor: Tensor, sizes: Tensor, canvas: tuple[int, int]) -> Tensor:
    """`cv2.resize(..., INTER_CUBIC)` of every coarse plane [B, g, g'], cut to sizes [B, 2] on a canvas: [B, H, W]."""
    rows, columns = (
        cubic_matrix(sizes[:, axis], coarse_sizes[:, axis], factor, canvas[axis], coarse.shape[1 + axis])
        for axis in (0, 1)
    )
    return apply_matrices(coarse, rows, columns)


def sample(planes: Tensor, rows: Tensor, columns: Tensor, start: Tensor, sizes: Tensor) -> Tensor:
    """Read pictures between their pixels, mirrored at the border of a box (`cv2.remap`, bilinear).

    Args:
        planes: [B, C, H, W].
        rows: [B, h, w] in pixels of the box.
        columns: [B, h, w].
        start: [B, 2] first row and column of the box in its picture.
        sizes: [B, 2] its rows and columns.

    Returns:
        [B, C, h, w].
    """
    height, width = planes.shape[-2:]
    rows = reflect(rows, sizes[:, 0, None, None]) + start[:, 0, None, None]
    columns = reflect(columns, sizes[:, 1, None, None]) + start[:, 1, None, None]
    grid = torch.stack([2 * columns / max(width - 1, 1) - 1, 2 * rows / max(height - 1, 1) - 1], dim=-1)
    return F.grid_sample(planes, grid, mode="bilinear", padding_mode="border", align_corners=True)


def _offsets(reach: Tensor) -> Tensor:
    widest = int(reach.max())
    return torch.arange(-widest, widest + 1, device=reach.device)


def _banded(size: Tensor, weights: Tensor, offsets: Tensor, side: int) -> Tensor:
    """Matrices [B, side, side] with `weights` [B, K] at the mirrored places around the diagonal."""
    place = torch.arange(side, device=size.device)
    column = reflect(place[None, :, None] + offsets, size[:, None, None])  # [B, side, K]
    inside = (place < size[:, None])[..., None]  # [B, side, 1]
    matrix = torch.zeros(len(size), side, side, device=size.device)
    return matrix.scatter_add_(2, column * inside, weights[:, None] * inside)


def _cubic_near(t: Tensor) -> Tensor:
    return ((_CUBIC + 2) * t - (_CUBIC + 3)) * t * t + 1


def _cubic_far(t: Tensor) -> Tensor:
    return ((_CUBIC * t - 5 * _CUBIC) * t + 8 * _CUBIC) * t - 4 * _CUBIC
