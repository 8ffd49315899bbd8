"""Deformation and expansion: displaced tissue, enlarged organs, mass effect.

FusionMedCLIP section 3.4, task 3: the radial source warp and the guided displacement field.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from fmclip.synthesis.density import smooth_noise
from fmclip.synthesis.masks import Region


@dataclass(frozen=True)
class Warp:
    """How tissue is moved.

    Attributes:
        factor: Deformation factor (alpha): positive pushes tissue away from the centre, negative draws it in.
        sway: Guided only: amplitude of the irregular part in lesion radii.
        shift: Guided only: push towards the organ's centre (midline shift) in lesion radii.
    """

    factor: float
    sway: float = 0.0
    shift: float = 0.0


def source_warp(pixels: np.ndarray, region: Region, factor: float) -> np.ndarray:
    """Push the pixels within the geometric mask away from its centre: a pixel at radius rho shows rho ** (1 + factor).

    Args:
        pixels: Float32 [h, w, C], the region's box of the scan.
        region: An elliptic or rectangular region.
        factor: Above -1; negative draws tissue towards the centre.

    Returns:
        Float32 [h, w, C]; equal to `pixels` outside the mask, and continuous across its outline.

    Raises:
        ValueError: If `factor` is -1 or less.
    """
    if factor <= -1:
        raise ValueError(f"the deformation factor must be above -1, got {factor}")
    rho = np.clip(region.rho, 1e-3, 1)
    scale = np.clip(rho**factor, 0, 6).astype(np.float32)
    warped = _sample(pixels, region, region.offset * scale)
    return np.where(region.mask[..., None], warped, pixels)


def guided_warp(
    pixels: np.ndarray, region: Region, warp: Warp, foreground: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Move tissue by a smooth displacement field that respects the organ: X o (p + u(p)).

    u has a part away from the lesion's centre, one towards the organ's centre and an irregular one. It fades out beyond
    the lesion and vanishes at the outline of the foreground, so that the organ keeps its border.

    Args:
        pixels: Float32 [h, w, C], the region's box of the scan.
        region: The region, of any mask shape.
        warp: The drawn parameters.
        foreground: Bool [S, S] of the whole scan.
        rng: Source of the irregular part.

    Returns:
        Float32 [h, w, C]; outside the mask it changes within the faded window (about one radius).
    """
    window = cv2.GaussianBlur(region.mask.astype(np.float32), (0, 0), max(1.0, 0.35 * region.radius))
    depth = cv2.distanceTransform(region.tissue.astype(np.uint8), cv2.DIST_L2, 3)  # pixels to the organ's outline
    guard = np.clip(depth / max(2.0, 0.6 * region.radius), 0, 1)
    organ = cv2.moments(foreground.astype(np.uint8), binaryImage=True)
    middle = np.array([organ["m01"], organ["m10"]]) / organ["m00"]
    inward = (middle - region.centre).astype(np.float32)
    inward /= max(float(np.hypot(*inward)), 1.0)
    height, width = region.mask.shape
    sway = np.stack([smooth_noise(height, width, 0.8 * region.radius, rng) for _ in range(2)])  # [2, h, w]
    outward = region.offset * np.exp(-0.5 * region.rho**2)  # strongest about one radius from the centre
    move = warp.factor * outward + region.radius * (warp.sway * 0.6 * sway + warp.shift * inward[:, None, None])
    # the picture at p comes from p - u: tissue moves along u
    return _sample(pixels, region, region.offset - (window * guard) * move)


def displace_around(pixels: np.ndarray, region: Region, amount: float) -> np.ndarray:
    """Mass effect: push the tissue outward to make room for a lesion painted afterwards.

    Args:
        pixels: Float32 [h, w, C], the region's box of the scan.
        region: The lesion.
        amount: How far tissue on the outline moves, in lesion radii; below 0.8.

    Returns:
        Float32 [h, w, C]; changed up to about two radii from the centre, nowhere at the box's rim.
    """
    fade = np.exp(-0.5 * (np.maximum(region.rho - 0.6, 0) / 0.55) ** 2) * np.clip((2.1 - region.rho) / 0.4, 0, 1)
    scale = 1 - np.float32(amount) * fade / np.maximum(region.rho, 0.8)
    return _sample(pixels, region, region.offset * scale.astype(np.float32))


def _sample(pixels: np.ndarray, region: Region, offset: np.ndarray) -> np.ndarray:
    """Read the box at `offset` [2, h, w] (rows, columns from the centre), bilinearly. Float32 [h, w, C]."""
    row_start = region.box[0].start - region.centre[0]
    column_start = region.box[1].start - region.centre[1]
    rows = (offset[0] - row_start).astype(np.float32)
    columns = (offset[1] - column_start).astype(np.float32)
    moved = cv2.remap(pixels, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return moved.reshape(pixels.shape)
