"""Anomaly masks: binarised Perlin noise, and ellipses and rectangles of random size and rotation.

FusionMedCLIP section 4.2 (mask Y). A `MaskSpec` holds the drawn parameters; `draw_region` turns it into pixels.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

SHAPES = ("perlin", "ellipse", "rectangle")
MIN_AREA = 16  # pixels; a smaller lesion is lost in the first stride of any tower


@dataclass(frozen=True)
class MaskSpec:
    """Where an anomaly is and what outline it has, in units that do not depend on the image size.

    Attributes:
        shape: One of `SHAPES`.
        row: Centre, fraction of the image height.
        column: Centre, fraction of the image width.
        share: Area as a fraction of the foreground's area.
        aspect: Long axis over short axis, at least 1.
        angle: Rotation of the long axis in degrees.
        roughness: Perlin only: 0 gives an ellipse, 1 a lobed outline or separate patches.
        periods: Perlin only: periods of the noise across the lesion.
    """

    shape: str
    row: float
    column: float
    share: float
    aspect: float = 1.0
    angle: float = 0.0
    roughness: float = 0.5
    periods: float = 2.0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"unknown mask shape {self.shape!r}: use one of {', '.join(SHAPES)}")
        if not 0 < self.share <= 1 or self.aspect < 1:
            raise ValueError(f"a mask needs 0 < share <= 1 and aspect >= 1, got {self.share} and {self.aspect}")


@dataclass(frozen=True, eq=False)
class Region:
    """The pixels around one anomaly: all work is done on this box of height h and width w.

    Attributes:
        box: Row and column slices of the box in the image.
        mask: Bool [h, w], the lesion; inside the foreground.
        tissue: Bool [h, w], the foreground in the box.
        rho: Float32 [h, w], elliptic (or rectangular) radius: 0 at the centre, 1 on the geometric outline.
        offset: Float32 [2, h, w], row and column distance from the centre in pixels.
        centre: Row and column in the image, pixels.
        radius: Radius of the disc of equal area, pixels.
    """

    box: tuple[slice, slice]
    mask: np.ndarray
    tissue: np.ndarray
    rho: np.ndarray
    offset: np.ndarray
    centre: tuple[float, float]
    radius: float


def perlin_noise(height: int, width: int, period: float, rng: np.random.Generator) -> np.ndarray:
    """Gradient noise after Perlin.

    Args:
        height: Rows.
        width: Columns.
        period: Distance between lattice points in pixels.
        rng: Draws the gradients and the position of the lattice.

    Returns:
        Float32 [height, width], zero mean, within about -0.7 and 0.7.
    """
    noise, step = coarse_perlin(height, width, period, rng)
    if step == 1:
        return noise[:height, :width]
    return cv2.resize(noise, None, fx=step, fy=step, interpolation=cv2.INTER_CUBIC)[:height, :width]


def coarse_perlin(height: int, width: int, period: float, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """`perlin_noise` before it is enlarged: float32 [H, W], and how many pixels each of its places becomes."""
    shift = rng.random(2)
    step = max(1.0, period / 8)  # the noise is smooth: a coarse grid and interpolation give the same outline
    grid_height, grid_width = int(height / step) + 2, int(width / step) + 2
    rows = (np.arange(grid_height) * (step / period) + shift[0]).astype(np.float32)  # [H], in lattice units
    columns = (np.arange(grid_width) * (step / period) + shift[1]).astype(np.float32)  # [W]
    top, left = rows.astype(np.intp), columns.astype(np.intp)
    angle = rng.random((top[-1] + 2, left[-1] + 2), dtype=np.float32) * np.float32(2 * math.pi)
    down, across = np.sin(angle), np.cos(angle)
    y, x = (rows - top)[:, None], (columns - left)[None, :]  # [H, 1], [1, W]: place within the lattice cell

    def corner(row: int, column: int) -> np.ndarray:
        cell = np.ix_(top + row, left + column)
        return down[cell] * (y - row) + across[cell] * (x - column)  # [H, W]

    fade_y, fade_x = (t * t * t * (t * (t * 6 - 15) + 10) for t in (y, x))
    upper = corner(0, 0) + fade_x * (corner(0, 1) - corner(0, 0))
    lower = corner(1, 0) + fade_x * (corner(1, 1) - corner(1, 0))
    return (upper + fade_y * (lower - upper)).astype(np.float32), step


def lesion_radius(share: float, foreground_area: int) -> float:
    """Radius in pixels of a disc that covers `share` of the foreground, never below `MIN_AREA`."""
    return math.sqrt(max(share * foreground_area, MIN_AREA) / math.pi)


def distance_inside(foreground: np.ndarray) -> np.ndarray:
    """Distance to the nearest pixel outside bool [S, S], the frame counting as outside. Float32 [S, S], pixels."""
    framed = cv2.copyMakeBorder(foreground.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    return cv2.distanceTransform(framed, cv2.DIST_L2, 3)[1:-1, 1:-1]


def pick_centre(foreground: np.ndarray, radius: float, place: float) -> tuple[int, int]:
    """Choose a lesion's centre so that the lesion lies mostly on the foreground.

    Args:
        foreground: Bool [S, S].
        radius: Lesion radius in pixels.
        place: In [0, 1): rank among the suitable pixels, so that a number chooses the place.

    Returns:
        Row and column in pixels.
    """
    # every other pixel is choice enough, except in a strip so thin that it falls between them
    step = 2 if max(foreground.shape) > 128 and foreground[::2, ::2].any() else 1
    inside = step * distance_inside(foreground[::step, ::step])
    # up to a third of the radius may be cut off: lesions do touch organ outlines; thin tissue takes what it has
    suitable = np.flatnonzero(inside.ravel() >= min(0.67 * radius, 0.8 * float(inside.max())))
    row, column = divmod(int(suitable[int(place * len(suitable))]), inside.shape[1])
    return step * row, step * column


@dataclass(frozen=True)
class Frame:
    """Where the box of an anomaly lies, and how large the anomaly is; all in pixels.

    Attributes:
        box: Row and column slices of the box in the image.
        centre: Row and column of the anomaly.
        radius: Radius of the disc of equal area.
        long: Long half-axis.
        short: Short half-axis.
    """

    box: tuple[slice, slice]
    centre: tuple[float, float]
    radius: float
    long: float
    short: float

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the box."""
        return self.box[0].stop - self.box[0].start, self.box[1].stop - self.box[1].start

    @classmethod
    def of(cls, spec: MaskSpec, foreground: np.ndarray, reach: float) -> "Frame":
        """Place an anomaly on a scan with a foreground, bool [S, S]; `reach` as for `draw_region`."""
        height, width = foreground.shape
        radius = lesion_radius(spec.share, int(np.count_nonzero(foreground)))
        long, short = radius * math.sqrt(spec.aspect), radius / math.sqrt(spec.aspect)
        centre = (spec.row * height, spec.column * width)
        half = reach * long + 2
        rows = slice(max(0, int(centre[0] - half)), min(height, int(centre[0] + half) + 1))
        columns = slice(max(0, int(centre[1] - half)), min(width, int(centre[1] + half) + 1))
        return cls((rows, columns), centre, radius, long, short)


def perlin_period(spec: MaskSpec, radius: float) -> float:
    """Distance between lattice points of a Perlin mask in pixels."""
    return max(2.0, 2 * radius / spec.periods)


def draw_region(spec: MaskSpec, foreground: np.ndarray, rng: np.random.Generator, *, reach: float = 1.3) -> Region:
    """Turn mask parameters into pixels.

    Args:
        spec: The drawn parameters.
        foreground: Bool [S, S], not empty.
        rng: Source of the Perlin noise.
        reach: Half side of the working box in long half-axes: 1.3 holds a rectangle's corners, 1.7 Perlin lobes, 2.2
            a halo or displaced tissue.

    Returns:
        The lesion's region; its mask is a subset of the foreground and may be empty when the centre lies outside.
    """
    frame = Frame.of(spec, foreground, reach)
    (rows, columns), centre = frame.box, frame.centre
    y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] - np.float32(centre[0])  # [h, 1]
    x = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] - np.float32(centre[1])  # [1, w]
    cos, sin = math.cos(math.radians(spec.angle)), math.sin(math.radians(spec.angle))
    along, across = (x * cos + y * sin) / frame.long, (y * cos - x * sin) / frame.short  # [h, w]
    here = foreground[rows, columns]
    if spec.shape == "rectangle":
        rho = np.maximum(np.abs(along), np.abs(across)) * (2 / math.sqrt(math.pi))  # same area as the ellipse
    else:
        rho = np.sqrt(along * along + across * across)
    mask = _perlin_mask(spec, rho, here, frame.radius, rng) if spec.shape == "perlin" else (rho <= 1) & here
    offset = np.stack(np.broadcast_arrays(y, x))  # [2, h, w]
    return Region((rows, columns), mask, here, rho.astype(np.float32), offset, centre, frame.radius)


def _perlin_mask(
    spec: MaskSpec, rho: np.ndarray, here: np.ndarray, radius: float, rng: np.random.Generator
) -> np.ndarray:
    """Binarise noise under a dome, with the threshold that gives the wanted area. Bool [h, w]."""
    height, width = rho.shape
    noise = perlin_noise(height, width, perlin_period(spec, radius), rng)
    # without the dome the noise would tile the box; with it one lesion stands around the centre
    field = np.where(here, 2.5 * spec.roughness * noise - rho * rho, -np.inf)
    area = min(round(math.pi * radius * radius), int(np.count_nonzero(here)))
    if area == 0:
        return np.zeros_like(here)
    mask = field >= np.partition(field.ravel(), -area)[-area]
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    if count > 2:  # crumbs are noise, not satellites
        size = stats[1:, cv2.CC_STAT_AREA]
        mask = np.concatenate([[False], size >= max(6, 0.08 * size.max())])[labels]
    return mask
