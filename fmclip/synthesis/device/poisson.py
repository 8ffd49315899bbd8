"""Poisson blending of many boxes at once (FusionMedCLIP Eq. 12): conjugate gradients, each box with its own steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCE = 1e-5  # of the residual's energy, as on the CPU
_BETWEEN_LOOKS = 16


def poisson_blend(
    target: Tensor,
    patch: Tensor,
    mask: Tensor,
    sizes: Tensor,
    gain: Tensor,
    mixed: Tensor,
    tolerance: float = TOLERANCE,
) -> Tensor:
    """Blend patches into targets in the gradient domain, with the target's values on the border of the mask.

    Args:
        target: [B, C, H, W].
        patch: [B, C, H, W], gives the guidance field V.
        mask: [B, H, W] bool.
        sizes: [B, 2] rows and columns of each box; its rim is never solved.
        gain: [B] factor on V.
        mixed: [B] bool: keep, gradient by gradient, the stronger of both.
        tolerance: Of the residual's energy at which a box is done.

    Returns:
        [B, C, H, W] clipped to [0, 1]; equal to `target` outside the mask.
    """
    H, W = mask.shape[1:]
    rows, columns = torch.arange(H, device=mask.device)[None, :, None], torch.arange(W, device=mask.device)
    core = (rows > 0) & (columns > 0) & (rows < sizes[:, 0, None, None] - 1) & (columns < sizes[:, 1, None, None] - 1)
    inside = (mask & core)[:, None]  # [B, 1, H, W]
    divergence = _divergence(target, patch * gain.view(-1, 1, 1, 1), mixed.view(-1, 1, 1, 1))
    solved = _solve(target, divergence, inside.to(target.dtype), tolerance)
    return torch.where(inside, solved.clamp(0, 1), target)


def _divergence(target: Tensor, source: Tensor, mixed: Tensor) -> Tensor:
    """Divergence of the guidance field, [B, C, H, W]; zero on the rim of the canvas."""
    total = torch.zeros_like(target)
    for axis in (-2, -1):
        step, own = source.diff(dim=axis), target.diff(dim=axis)
        step = torch.where(mixed & (own.abs() > step.abs()), own, step)
        inner = step.narrow(-1 if axis == -2 else -2, 1, target.shape[-1 if axis == -2 else -2] - 2)
        total[..., 1:-1, 1:-1] += inner.diff(dim=axis)
    return total


def _cross(f: Tensor) -> Tensor:
    """Sum of the four neighbours, 0 beyond the canvas."""
    framed = F.pad(f, (1, 1, 1, 1))
    return framed[..., 2:, 1:-1] + framed[..., :-2, 1:-1] + framed[..., 1:-1, 2:] + framed[..., 1:-1, :-2]


def _solve(plane: Tensor, divergence: Tensor, free: Tensor, tolerance: float) -> Tensor:
    """`laplacian(f) = divergence` where `free` is 1, `f = plane` elsewhere: [B, C, H, W]."""
    solved = plane.clone()
    residual = (-divergence - 4 * plane + _cross(plane)) * free
    direction = residual.clone()
    energy = _dot(residual, residual)  # [B, C, 1, 1]
    goal = tolerance * energy.clamp_min(1e-6)
    for count in range(3 * max(plane.shape[-2:])):
        going = energy > goal
        if count % _BETWEEN_LOOKS == 0 and not bool(going.any()):
            break
        image = (4 * direction - _cross(direction)) * free
        step = torch.where(going, energy / _dot(direction, image), 0)
        solved += step * direction
        residual -= step * image
        previous, energy = energy, torch.where(going, _dot(residual, residual), energy)
        direction = torch.where(going, residual + (energy / previous) * direction, direction)
    return solved


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum(dim=(-2, -1), keepdim=True)
