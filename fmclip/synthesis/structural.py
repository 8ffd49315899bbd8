"""Structural alterations: a patch of normal tissue in the wrong place, pasted (CutPaste) or blended (Poisson).

FusionMedCLIP section 3.4, task 1 and Eq. 12.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from fmclip.synthesis.masks import Region, pick_centre

_CROSS = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]], np.float32)


@dataclass(frozen=True)
class Patch:
    """Which piece of which normal scan is put in, and how.

    Attributes:
        source: Index of the source scan; -1 takes the scan itself.
        place: In [0, 1): which of the source's suitable tissue pixels is the patch's centre.
        angle: Rotation in degrees.
        zoom: Magnification of the patch.
        mirror: Whether the patch is mirrored.
        gain: CutPaste: factor on the patch's intensities. Poisson: factor on its gradients.
        mixed: Poisson only: keep the stronger of both gradients, so that the scan's own structure shows through.
    """

    source: int
    place: float
    angle: float = 0.0
    zoom: float = 1.0
    mirror: bool = False
    gain: float = 1.0
    mixed: bool = False


def fetch_patch(patch: Patch, region: Region, source: np.ndarray, source_foreground: np.ndarray) -> np.ndarray:
    """Cut the source tissue that lands on `region`.

    Args:
        patch: The drawn parameters.
        region: Where the patch will lie, box [h, w].
        source: Float32 [S, S, C].
        source_foreground: Bool [S, S], where the source shows tissue.

    Returns:
        Float32 [h, w, C], intensities of the source, not yet scaled by `gain`.
    """
    start = (region.offset[1, 0, 0], region.offset[0, 0, 0])  # (x, y) of the box's first pixel
    matrix = patch_matrix(patch, region.radius, start, source_foreground)
    height, width = region.mask.shape
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    patch_image = cv2.warpAffine(source, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REFLECT_101)
    return patch_image.reshape(height, width, source.shape[2])


def patch_matrix(patch: Patch, radius: float, start: tuple[float, float], source_foreground: np.ndarray) -> np.ndarray:
    """Where each pixel of a box reads the source.

    Args:
        patch: The drawn parameters.
        radius: Of the anomaly in pixels.
        start: Offset (x, y) of the box's first pixel from the anomaly's centre.
        source_foreground: Bool [S, S].

    Returns:
        Float64 [2, 3], from (x, y, 1) in the box to (x, y) in the source.
    """
    row, column = pick_centre(source_foreground, radius / patch.zoom, patch.place)
    cos, sin = math.cos(math.radians(patch.angle)) / patch.zoom, math.sin(math.radians(patch.angle)) / patch.zoom
    flip = -1.0 if patch.mirror else 1.0
    turn = np.array([[flip * cos, -sin], [flip * sin, cos]])  # offsets (x, y) in the box to offsets in the source
    return np.column_stack([turn, np.array([column, row]) + turn @ np.array(start)])


def cut_paste(target: np.ndarray, patch_image: np.ndarray, mask: np.ndarray, gain: float) -> np.ndarray:
    """Paste the patch under the mask, with a hard edge (CutPaste).

    Args:
        target: Float32 [h, w, C].
        patch_image: Float32 [h, w, C].
        mask: Bool [h, w].
        gain: Factor on the patch's intensities.

    Returns:
        Float32 [h, w, C]; equal to `target` outside the mask.
    """
    return np.where(mask[..., None], np.clip(patch_image * np.float32(gain), 0, 1), target)


def poisson_blend(
    target: np.ndarray, patch_image: np.ndarray, mask: np.ndarray, *, gain: float = 1.0, mixed: bool = False
) -> np.ndarray:
    """Blend the patch into the target in the gradient domain (Eq. 12).

    Solves the Poisson equation inside the mask, with the target's values on its border, so that the edge has no seam.

    Args:
        target: Float32 [h, w, C].
        patch_image: Float32 [h, w, C], gives the guidance field V.
        mask: Bool [h, w].
        gain: Factor on V.
        mixed: Take, gradient by gradient, the stronger of the patch's and the target's.

    Returns:
        Float32 [h, w, C], clipped to [0, 1]; equal to `target` outside the mask.
    """
    inside = mask.copy()
    inside[[0, -1], :] = False  # the box's rim must hold border values
    inside[:, [0, -1]] = False
    if not inside.any():
        return target.copy()
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    core = np.s_[rows[0] - 1 : rows[-1] + 2, columns[0] - 1 : columns[-1] + 2]  # nothing to solve beyond the mask
    blended = target.copy()
    for channel in range(target.shape[2]):
        plane, source = target[core][..., channel], patch_image[core][..., channel] * np.float32(gain)
        divergence = _guidance_divergence(plane, source, mixed)
        solved = _solve_poisson(plane, divergence, inside[core])
        blended[core][..., channel] = np.where(inside[core], np.clip(solved, 0, 1), plane)
    return blended


def _guidance_divergence(plane: np.ndarray, source: np.ndarray, mixed: bool) -> np.ndarray:
    """Divergence of the guidance field V. Float32 [h, w] in, float32 [h, w] out (zero on the rim)."""
    total = np.zeros_like(plane)
    for axis in (0, 1):
        step = np.diff(source, axis=axis)
        if mixed:
            own = np.diff(plane, axis=axis)
            step = np.where(np.abs(own) > np.abs(step), own, step)
        after, before = (step[1:, 1:-1], step[:-1, 1:-1]) if axis == 0 else (step[1:-1, 1:], step[1:-1, :-1])
        total[1:-1, 1:-1] += after - before
    return total


def _solve_poisson(plane: np.ndarray, divergence: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Conjugate gradients for `laplacian(f) = divergence` inside, `f = plane` elsewhere. Float32 [h, w]."""
    free = inside.astype(np.float32)

    def operator(f: np.ndarray) -> np.ndarray:  # minus the Laplacian, on the free pixels
        return (4 * f - cv2.filter2D(f, cv2.CV_32F, _CROSS, borderType=cv2.BORDER_CONSTANT)) * free

    solved = plane.copy()
    residual = (-divergence - 4 * plane + cv2.filter2D(plane, cv2.CV_32F, _CROSS)) * free
    direction = residual.copy()
    energy = float(np.vdot(residual, residual))
    goal = 1e-5 * max(energy, 1e-6)
    for _ in range(3 * max(plane.shape)):
        if energy <= goal:
            break
        image = operator(direction)
        step = energy / float(np.vdot(direction, image))
        solved += step * direction
        residual -= step * image
        previous, energy = energy, float(np.vdot(residual, residual))
        direction = residual + (energy / previous) * direction
    return solved
