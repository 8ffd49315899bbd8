"""Large scans made smaller, where many are held at a time."""

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
    size = (max(1, round(scan.width * scale)), max(1, round(scan.height * scale)))
    pixels = np.clip(cv2.resize(scan.pixels, size, interpolation=cv2.INTER_AREA), 0, 1)
    note = f"shown at {size[0]} x {size[1]} of {scan.width} x {scan.height} pixels"
    return replace(scan, pixels=pixels, notes=(*scan.notes, note))
