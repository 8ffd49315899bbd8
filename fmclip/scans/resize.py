"""Pictures made smaller or larger, for the screen and where many are held at a time."""

from dataclasses import replace

import cv2
import numpy as np

from fmclip.scans.scan import Scan

MAX_SIDE = 1024
"""Longer sides are shrunk on the page, so that many visitors fit into memory; towers look at a few hundred pixels."""


def shrink(scan: Scan) -> Scan:
    """Return the scan with no side longer than `MAX_SIDE`, and a note where that changed it."""
    scale = MAX_SIDE / max(scan.height, scan.width)
    if scale >= 1:
        return scan
    pixels = resize(scan.pixels, scale)
    note = f"shown at {pixels.shape[1]} x {pixels.shape[0]} of {scan.width} x {scan.height} pixels"
    return replace(scan, pixels=pixels, notes=(*scan.notes, note))


def resize(image: np.ndarray, scale: float) -> np.ndarray:
    """Resize a picture or map: area averages when shrinking, bicubic when growing.

    Args:
        image: [H, W] or [H, W, 3] in [0, 1].
        scale: Factor for both sides.

    Returns:
        The same in [0, 1]; no side below one pixel.
    """
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.clip(cv2.resize(np.ascontiguousarray(image), size, interpolation=method), 0, 1)
