"""Pictures for the page: overlays large enough to look at, and thumbnails that live inside the HTML itself."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import cv2
import numpy as np

from fmclip.scans import Scan
from fmclip.session import Finding

if TYPE_CHECKING:
    from fmclip.detectors import SyntheticExample

DETAIL_SIDE = 768
THUMBNAIL_SIDE = 160
OUTLINE = (0, 200, 255)


def slider_pair(finding: Finding, threshold: float, opacity: float) -> tuple[np.ndarray, np.ndarray]:
    """Original and overlay of one finding, enlarged where the scan is small.

    Returns:
        Two pictures [H, W, 3] uint8 of one size.
    """
    from fmclip.figures import overlay  # brings matplotlib, for which the page need not wait

    scale = max(1.0, DETAIL_SIDE / max(finding.scan.height, finding.scan.width))
    scan, anomaly_map = _scaled(finding.scan.pixels, scale), _scaled(finding.map, scale)
    large = Scan(scan, finding.label)
    return to_picture(scan), overlay(large, anomaly_map, threshold, opacity=opacity)


def scan_thumbnail(scan: Scan) -> str:
    """Thumbnail of a scan as a data address."""
    return data_address(to_picture(_thumbnail(scan.pixels)))


def finding_thumbnail(finding: Finding, threshold: float, opacity: float) -> str:
    """Thumbnail of an overlay as a data address."""
    from fmclip.figures import overlay

    small = Scan(_thumbnail(finding.scan.pixels), finding.label)
    return data_address(overlay(small, _thumbnail(finding.map), threshold, opacity=opacity))


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
    fine = _scaled(mask.astype(np.float32), scale) >= 0.5
    return data_address(draw_outline(to_picture(_scaled(image, scale)), fine, OUTLINE))


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
    return _scaled(image, THUMBNAIL_SIDE / max(image.shape[:2]))


def _scaled(image: np.ndarray, scale: float) -> np.ndarray:
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.clip(cv2.resize(np.ascontiguousarray(image), size, interpolation=method), 0, 1)
