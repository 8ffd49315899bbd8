"""What makes residuals white, so that their length is a Mahalanobis distance.

Residuals of the reference patches are normal variation. Along directions in which they vary much, a difference counts
for less; an isotropic share of the covariance keeps directions in which few references do not vary from counting most.
"""

from __future__ import annotations

import torch
from torch import Tensor


def principal_whitening(residual: Tensor, shrinkage: float) -> Tensor:
    """Whiten along the principal axes.

    Args:
        residual: [N, C].
        shrinkage: Share of the isotropic part in the covariance.

    Returns:
        [C, C]: `residual @ it` is white, one principal axis a channel.
    """
    covariance = shrunk(residual.T @ residual / residual.shape[0], shrinkage)  # [C, C]
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(1e-8 * covariance.diagonal().mean()).rsqrt()


def triangular_whitening(residual: Tensor, shrinkage: float, axes: Tensor | None = None) -> Tensor:
    """Whiten by a Cholesky factor: the same distances in a fraction of the time, on a GPU even more so.

    Args:
        residual: [N, C].
        shrinkage: As for `principal_whitening`; at 0 there may be no such factor, and that is taken.
        axes: Orthonormal [C, C]: in them the result is triangular, and close to diagonal where they are the principal
            axes of similar residuals, so that a whitened channel means what it meant before. None for those as given.

    Returns:
        [C, C].
    """
    if shrinkage <= 0:
        return principal_whitening(residual, shrinkage)
    along = residual if axes is None else residual @ axes
    return inverse_root(shrunk(along.T @ along / along.shape[0], shrinkage), axes)


def shrunk(covariance: Tensor, shrinkage: float) -> Tensor:
    """Mix [C, C] with its isotropic part."""
    variance = covariance.diagonal().mean().clamp_min(1e-12)
    return (1 - shrinkage) * covariance + shrinkage * variance * torch.eye(len(covariance)).to(covariance)


def inverse_root(covariance: Tensor, axes: Tensor | None = None) -> Tensor:
    """A root W of the inverse, W @ W.T: any root gives the same distances, and this one needs no eigenvectors.

    Args:
        covariance: [C, C], positive definite; along `axes` where they are given.
        axes: Orthonormal [C, C], or None.

    Returns:
        [C, C], in the coordinates that `axes` are given in.
    """
    factor = torch.linalg.cholesky(covariance)  # L, and L @ L.T is the covariance
    axes = torch.eye(len(factor)).to(factor) if axes is None else axes
    return torch.linalg.solve_triangular(factor, axes.T, upper=False).T  # axes @ inverse(L).T
