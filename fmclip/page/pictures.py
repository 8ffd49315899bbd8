"""Pictures for the page: overlays large enough to look at, and thumbnails that live inside the HTML itself."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import cv2
import numpy as np

from fmclip.colours import COLOURS
from fmclip.scans import Scan, resize
from fmclip.session import Finding

if TYPE_CHECKING:
    from fmclip.detectors import SyntheticExample

DETAIL_SIDE = 768
THUMBNAIL_SIDE = 160
OUTLINE = (0, 200, 255)
SURROUNDINGS = 4
"""Sides of a patch that are shown around it."""


def slider_pair(
    finding: Finding, threshold: float, opacity: float, colours: str = COLOURS
) -> tuple[np.ndarray, np.ndarray]:
    """Original and overlay of one finding, enlarged where the scan is small.

    Returns:
        Two pictures [H, W, 3] uint8 of one size.
    """
    from fmclip.figures import overlay  # brings matplotlib, for which the page need not wait

    scale = max(1.0, DETAIL_SIDE / max(finding.scan.height, finding.scan.width))
    scan, anomaly_map = resize(finding.scan.pixels, scale), resize(finding.map, scale)
    large = Scan(scan, finding.label)
    return to_picture(scan), overlay(large, anomaly_map, threshold, opacity=opacity, colours=colours)


def scan_thumbnail(scan: Scan) -> str:
    """Thumbnail of a scan as a data address."""
    return data_address(to_picture(_thumbnail(scan.pixels)))


def finding_thumbnail(finding: Finding, threshold: float, opacity: float, colours: str = COLOURS) -> str:
    """Thumbnail of an overlay as a data address."""
    return map_thumbnail(finding.scan, finding.map, threshold, opacity, colours)


def map_thumbnail(scan: Scan, anomaly_map: np.ndarray, threshold: float, opacity: float, colours: str) -> str:
    """Thumbnail of any map [H, W] of a scan laid over it, as a data address."""
    from fmclip.figures import overlay

    small = Scan(_thumbnail(scan.pixels), scan.label)
    return data_address(overlay(small, _thumbnail(anomaly_map), threshold, opacity=opacity, colours=colours))


def patch_with_surroundings(scan: Scan, box: tuple[int, int, int, int]) -> str:
    """A patch in its surroundings, outlined, as a data address: how a person compares two patches.

    Args:
        scan: The scan.
        box: (left, top, right, bottom) of the patch on its pixels.
    """
    left, top, right, bottom = box
    side = max(1, min(SURROUNDINGS * max(right - left, bottom - top), scan.height, scan.width))
    x = min(max(0, (left + right - side) // 2), scan.width - side)
    y = min(max(0, (top + bottom - side) // 2), scan.height - side)
    scale = THUMBNAIL_SIDE / side
    picture = to_picture(resize(scan.pixels[y : y + side, x : x + side], scale))
    corners = [round((edge - start) * scale) for edge, start in zip(box, (x, y, x, y), strict=True)]
    cv2.rectangle(picture, corners[:2], [corner - 1 for corner in corners[2:]], OUTLINE, 2)
    return data_address(picture)


def example_thumbnails(example: SyntheticExample, threshold: float, opacity: float) -> tuple[str, str | None]:
    """Synthetic anomaly with its outline, and the heatmap beside it once there is one."""
    from fmclip.figures import overlay

    picture = outlined(example.image, example.mask, THUMBNAIL_SIDE)
    if example.map is None:
        return picture, None
    heat = overlay(Scan(_thumbnail(example.image)), _thumbnail(example.map), threshold, opacity=opacity)
    return picture, data_address(heat)


def outlined(image: np.ndarray, mask: np.ndarray, side: int) -> str:
    """A picture [S, S, 3] with the outline of a mask [S, S], so many pixels wide, as a data address."""
    from fmclip.figures import draw_outline

    scale = side / max(image.shape[:2])
    fine = resize(mask.astype(np.float32), scale) >= 0.5
    return data_address(draw_outline(to_picture(resize(image, scale)), fine, OUTLINE))


def to_picture(pixels: np.ndarray) -> np.ndarray:
    """[H, W] or [H, W, 3] in [0, 1] -> [H, W, 3] uint8."""
    picture = np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
    return picture if picture.ndim == 3 else cv2.cvtColor(picture, cv2.COLOR_GRAY2RGB)


def data_address(picture: np.ndarray) -> str:
    """Encode [H, W, 3] uint8 so that it needs no file: nothing lies in a cache, nothing can be fetched by others."""
    done, data = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 88])
    assert done, "JPEG can encode any RGB picture"
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


def _thumbnail(image: np.ndarray) -> np.ndarray:
    return resize(image, THUMBNAIL_SIDE / max(image.shape[:2]))
