"""Images into the square that is trained on: a random transform draws its numbers, a plain one applies them (Table A2).

Every draw belongs to (seed, epoch, pair), so that a resumed run, or one with other workers, sees the same images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from fmclip.contrastive.config import AugmentConfig
from fmclip.scans import Scan, letterbox

ASPECT = (3 / 4, 4 / 3)
"""Proportions of a random crop."""


@dataclass(frozen=True)
class Change:
    """What one draw does to an image.

    Attributes:
        crop: (top, left, height, width) of the crop in shares of the image.
        flip: Whether left and right change places.
        degrees: Rotation.
        brightness: Factor on all values.
        contrast: Factor on the distance from the mean.
        grayscale: Whether the colours are dropped.
    """

    crop: tuple[float, float, float, float]
    flip: bool
    degrees: float
    brightness: float
    contrast: float
    grayscale: bool


def generator_for(*numbers: int) -> torch.Generator:
    """Make a generator that belongs to these whole numbers (seed, epoch, place) and to no others."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) % 2**63)


def draw_change(config: AugmentConfig, height: int, width: int, generator: torch.Generator) -> Change:
    """Draw how an image is changed (RandomResizedCrop, flip, jitter, rotation, grayscale).

    Args:
        config: Strengths.
        height: Rows of the image.
        width: Columns.
        generator: Draws.

    Returns:
        The change.
    """
    area, shape, top, left, flip, turn, bright, contrast, grey = torch.rand(9, generator=generator).tolist()
    kept = (config.crop_min + (1 - config.crop_min) * area) * height * width
    ratio = math.exp(math.log(ASPECT[0]) + (math.log(ASPECT[1]) - math.log(ASPECT[0])) * shape)
    rows = min(height, math.sqrt(kept / ratio)) / height
    columns = min(width, math.sqrt(kept * ratio)) / width
    return Change(
        crop=(top * (1 - rows), left * (1 - columns), rows, columns),
        flip=flip < config.flip,
        degrees=(2 * turn - 1) * config.rotation,
        brightness=1 + (2 * bright - 1) * config.jitter,
        contrast=1 + (2 * contrast - 1) * config.jitter,
        grayscale=grey < config.grayscale,
    )


def apply_change(scan: Scan, change: Change, size: int) -> np.ndarray:
    """Change an image.

    Args:
        scan: [H, W] or [H, W, 3].
        change: What to do.
        size: Side of the result.

    Returns:
        [size, size, 3] float32 in [0, 1].
    """
    top, left, rows, columns = change.crop
    first_row, first_column = round(top * scan.height), round(left * scan.width)
    last_row = max(first_row + 1, round((top + rows) * scan.height))
    last_column = max(first_column + 1, round((left + columns) * scan.width))
    image = _resize(scan.pixels[first_row:last_row, first_column:last_column], size, size)
    if change.flip:
        image = image[:, ::-1]
    if change.degrees:
        turn = cv2.getRotationMatrix2D(((size - 1) / 2, (size - 1) / 2), change.degrees, 1.0)
        image = cv2.warpAffine(np.ascontiguousarray(image), turn, (size, size), flags=cv2.INTER_LINEAR)
    if change.grayscale and image.ndim == 3:
        image = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
    mean = float(image.mean())
    image = ((image - mean) * change.contrast + mean) * change.brightness
    return _colour(np.clip(image, 0, 1))


def fit_image(scan: Scan, size: int, fit: str) -> np.ndarray:
    """Fit an image for testing (Table A2: shorter side resized, centre crop).

    Args:
        scan: [H, W] or [H, W, 3].
        size: Side of the result.
        fit: "crop" (the centre), or "letterbox" (all of it, with bars, as detectors see it).

    Returns:
        [size, size, 3] float32 in [0, 1].
    """
    if fit == "letterbox":
        return letterbox(scan, size)[0]
    scale = size / min(scan.height, scan.width)
    height, width = max(size, round(scan.height * scale)), max(size, round(scan.width * scale))
    image = _resize(scan.pixels, height, width)
    top, left = (height - size) // 2, (width - size) // 2
    return _colour(np.clip(image[top : top + size, left : left + size], 0, 1))


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    shrinks = height * width < image.shape[0] * image.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=method)


def _colour(image: np.ndarray) -> np.ndarray:
    image = np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else image
    return np.ascontiguousarray(image, dtype=np.float32)
