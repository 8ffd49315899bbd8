"""Colour maps for anomaly maps."""

import cv2
import numpy as np

COLOUR_MAPS = {
    name: cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], code).reshape(256, 3)[:, ::-1]  # RGB
    for name, code in (
        ("inferno", cv2.COLORMAP_INFERNO),
        ("viridis", cv2.COLORMAP_VIRIDIS),
        ("cividis", cv2.COLORMAP_CIVIDIS),
        ("magma", cv2.COLORMAP_MAGMA),
    )
}
"""Colour maps to choose from, [256, 3] uint8: perceptually uniform, rising in lightness, readable with any colour
vision; cividis looks the same with and without red-green blindness."""
COLOURS = "inferno"
