"""Light variation of a normal scan, as patients lie and scanners are set a little differently each time."""

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class Augmentation:
    """How far a normal scan may be varied and still be normal.

    Attributes:
        mirror: Whether scans may be mirrored left to right; off where the side matters (chest, abdomen).
        angle: Largest rotation in degrees.
        shift: Largest shift as a fraction of the scan's side.
        zoom: Largest magnification or reduction, e.g. 0.06 for 0.94 to 1.06.
        gain: Largest relative change of intensity.
    """

    mirror: bool = False
    angle: float = 4.0
    shift: float = 0.03
    zoom: float = 0.05
    gain: float = 0.06


@dataclass(frozen=True)
class View:
    """One drawn variation.

    Attributes:
        mirror: Mirrored left to right.
        angle: Rotation in degrees.
        down: Shift down as a fraction of the scan's height.
        right: Shift right as a fraction of the scan's width.
        zoom: Magnification.
        gain: Factor on the intensities.
    """

    mirror: bool = False
    angle: float = 0.0
    down: float = 0.0
    right: float = 0.0
    zoom: float = 1.0
    gain: float = 1.0


def draw_view(augmentation: Augmentation, rng: np.random.Generator) -> View:
    """Draw the parameters of one variation."""
    angle, down, right, zoom, gain = (float(value) for value in rng.uniform(-1, 1, 5))
    return View(
        mirror=bool(rng.random() < 0.5) and augmentation.mirror,
        angle=angle * augmentation.angle,
        down=down * augmentation.shift,
        right=right * augmentation.shift,
        zoom=1 + zoom * augmentation.zoom,
        gain=1 + gain * augmentation.gain,
    )


def apply_view(view: View, image: np.ndarray, content: np.ndarray) -> np.ndarray:
    """Vary a scan inside its letterbox; the bars stay where they are, so the content mask stays true.

    Args:
        view: The drawn parameters.
        image: Float32 [S, S, 3] in [0, 1].
        content: Bool [S, S], a rectangle of True.

    Returns:
        Float32 [S, S, 3] in [0, 1].
    """
    box = content_box(content)
    scan = np.ascontiguousarray(image[box])
    height, width = scan.shape[:2]
    matrix = view_matrix(view, height, width)
    if view.mirror:
        scan = scan[:, ::-1].copy()
    # reflection fills the corners with tissue: black wedges would be a mark that no query scan has
    moved = cv2.warpAffine(scan, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    varied = image.copy()
    varied[box] = np.clip(moved * np.float32(view.gain), 0, 1)
    return varied


def content_box(content: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of a content mask, bool [S, S], a rectangle of True."""
    rows, columns = np.flatnonzero(content.any(axis=1)), np.flatnonzero(content.any(axis=0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def view_matrix(view: View, height: int, width: int) -> np.ndarray:
    """Where a view moves the pixels of a scan of so many pixels: float64 [2, 3], from (x, y, 1) to (x, y)."""
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), view.angle, view.zoom)
    matrix[0, 2] += view.right * width
    matrix[1, 2] += view.down * height
    return matrix
