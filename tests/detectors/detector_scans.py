"""Small simulated scans: smooth textured discs, and the same with a bright lesion."""

import cv2
import numpy as np

from fmclip.scans import Scan

SIDE = 64


def normal_scan(seed: int, height: int = SIDE, width: int = SIDE) -> Scan:
    """A grey disc with soft texture; every seed differs a little."""
    rng = np.random.default_rng(seed)
    texture = cv2.GaussianBlur(rng.normal(0, 1, (height, width)).astype(np.float32), (0, 0), 3)
    image = 0.45 + 0.1 * texture / texture.std()
    rows, columns = np.mgrid[:height, :width]
    disc = ((rows - height / 2) / (0.46 * height)) ** 2 + ((columns - width / 2) / (0.46 * width)) ** 2 < 1
    return Scan((image * disc).clip(0, 1).astype(np.float32), label=f"scan {seed}")


def lesion_scan(seed: int, centre: tuple[int, int] = (24, 38), radius: int = 9) -> Scan:
    """A normal scan with a bright blob at `centre` (row, column)."""
    pixels = normal_scan(seed).pixels.copy()
    rows, columns = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
    blob = np.exp(-(((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2) / (2 * (radius / 2) ** 2)))
    return Scan((pixels + 0.6 * blob).clip(0, 1).astype(np.float32), label=f"scan {seed}")
