"""The image editor's paint as a mask on a scan, and a scan for the editor."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from fmclip.page.pictures import to_picture
from fmclip.scans import Scan

PAINT = (255, 140, 0, 200)  # RGBA


def canvas(scan: Scan, mask: np.ndarray | None = None) -> dict[str, Any]:
    """Put a scan into the editor, with a mask [H, W] painted on it if there is one."""
    layers = []
    if mask is not None:
        layers.append(np.where(mask[..., None], np.array(PAINT, np.uint8), np.uint8(0)))  # [H, W, 4]
    return {"background": to_picture(scan.pixels), "layers": layers, "composite": None}


def painted_mask(painted: dict[str, Any] | None, scan: Scan) -> np.ndarray:
    """Find where any layer of the editor holds paint: bool [H, W] on the scan's pixels."""
    mask = np.zeros((scan.height, scan.width), bool)
    for layer in (painted or {}).get("layers") or []:
        opacity = layer[..., 3] if layer.ndim == 3 and layer.shape[2] == 4 else np.atleast_2d(layer.max(axis=-1))
        if opacity.shape != mask.shape:
            size = (scan.width, scan.height)
            opacity = cv2.resize(np.ascontiguousarray(opacity), size, interpolation=cv2.INTER_NEAREST)
        mask |= opacity > 0
    return mask
