"""Scans into the square that a tower looks at, and maps back onto the source pixels. Nothing is stretched."""

from dataclasses import dataclass

import cv2
import numpy as np

from fmclip.scans.scan import Scan


@dataclass(frozen=True)
class Letterbox:
    """Where a scan lies inside its square.

    Attributes:
        size: Side of the square.
        top: First row of the scan inside the square.
        left: First column of the scan inside the square.
        height: Rows of the scan inside the square.
        width: Columns of the scan inside the square.
        source: (H, W) of the scan itself.
    """

    size: int
    top: int
    left: int
    height: int
    width: int
    source: tuple[int, int]

    @classmethod
    def of(cls, source: tuple[int, int], size: int) -> "Letterbox":
        """Fit a scan of `source` = (H, W) pixels into a square of side `size`, centred, its proportions kept."""
        if size < 1 or min(source) < 1:
            raise ValueError(f"cannot fit {source} into a square of {size}")
        scale = size / max(source)
        # A very long scan keeps at least one row or column.
        height, width = (max(1, min(size, round(side * scale))) for side in source)
        return cls(size, (size - height) // 2, (size - width) // 2, height, width, (int(source[0]), int(source[1])))

    def content_mask(self) -> np.ndarray:
        """Return bool [size, size]: True on the scan, False on the bars."""
        mask = np.zeros((self.size, self.size), bool)
        mask[self.top : self.top + self.height, self.left : self.left + self.width] = True
        return mask

    def cell_at(self, x: float, y: float, grid: tuple[int, int]) -> tuple[int, int]:
        """Find the cell of a grid over the square in which a spot of the scan lies.

        Args:
            x: Column on the source pixels; the first pixel reaches from 0 to 1.
            y: Row on the source pixels.
            grid: Rows and columns (h, w) of the grid.

        Returns:
            Row and column of the cell.
        """
        down = self.top + y * self.height / self.source[0]
        across = self.left + x * self.width / self.source[1]
        row, column = int(down * grid[0] / self.size), int(across * grid[1] / self.size)
        return min(max(row, 0), grid[0] - 1), min(max(column, 0), grid[1] - 1)

    def cell_box(self, row: int, column: int, grid: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return (left, top, right, bottom) of a cell on the source pixels, cut off at the edge of the scan."""
        (h, w), (rows, columns) = grid, self.source
        left, right = ((edge * self.size / w - self.left) * columns / self.width for edge in (column, column + 1))
        top, bottom = ((edge * self.size / h - self.top) * rows / self.height for edge in (row, row + 1))
        left, top = min(max(round(left), 0), columns - 1), min(max(round(top), 0), rows - 1)
        return left, top, max(left + 1, min(round(right), columns)), max(top + 1, min(round(bottom), rows))

    def restore(self, map2d: np.ndarray) -> np.ndarray:
        """Bring a map of the square back onto the source pixels; what lay on the bars is cut off.

        Args:
            map2d: [size, size] numbers.

        Returns:
            [H, W] float32, bilinear (averaged where the source is smaller than its place in the square).

        Raises:
            ValueError: If the map is not of this square.
        """
        if map2d.shape != (self.size, self.size):
            raise ValueError(f"the map must be {(self.size, self.size)}, not {map2d.shape}")
        inside = map2d[self.top : self.top + self.height, self.left : self.left + self.width]
        return _resize(np.ascontiguousarray(inside, dtype=np.float32), self.source)


def letterbox(scan: Scan, size: int) -> tuple[np.ndarray, Letterbox]:
    """Fit a scan into a square with black bars, its proportions kept, centred.

    Shrinking averages over areas, so that fine texture does not alias; growing is bilinear, which stays in [0, 1].

    Args:
        scan: The scan, [H, W] or [H, W, 3].
        size: Side of the square.

    Returns:
        ([size, size, 3] float32 in [0, 1], its geometry).
    """
    box = Letterbox.of((scan.height, scan.width), size)
    inside = _resize(scan.pixels, (box.height, box.width))  # [h, w] or [h, w, 3]
    if inside.ndim == 2:
        inside = np.repeat(inside[:, :, None], 3, axis=2)  # [h, w, 3]
    bars = (box.top, size - box.top - box.height, box.left, size - box.left - box.width)
    return cv2.copyMakeBorder(inside, *bars, cv2.BORDER_CONSTANT, value=(0.0, 0.0, 0.0)), box


def _resize(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resize [H, W] or [H, W, 3] float32 to `shape`: area averages when shrinking, bilinear when growing."""
    shrinks = shape[0] * shape[1] < image.shape[0] * image.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized = cv2.resize(image, (shape[1], shape[0]), interpolation=method)
    return np.clip(resized, image.min(), image.max())  # rounding must not leave [0, 1]
