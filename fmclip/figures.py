"""Pictures of results: overlays on one fixed colour scale, the map as a 16-bit PNG, score histogram.

Overlays are NumPy and OpenCV only, so that a slider can redraw them at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fmclip.colours import COLOUR_MAPS, COLOURS
from fmclip.scans import Scan

OPACITY = 0.6
VISIBLE_FROM = 0.6
"""Share of the threshold below which a map is transparent."""
CONTOUR_COLOUR = (255, 255, 255)
MASK_COLOUR = (0, 200, 255)


def colour_position(anomaly_map: np.ndarray, threshold: float) -> np.ndarray:
    """Place map values on the colour scale: 0 at 0, the middle at the threshold, the end at twice the threshold.

    The scale depends on the threshold alone, never on the scan, so that equal colours mean equal values in all scans of
    one adapter, and the highest colour of a scan its score. From a threshold of 0.5 upward it ends at 1.

    Args:
        anomaly_map: [H, W] in [0, 1].
        threshold: Threshold of the adapter, in [0, 1].

    Returns:
        [H, W] float32 in [0, 1].
    """
    middle = float(np.clip(threshold, 1e-4, 1 - 1e-4))
    end = min(1.0, 2 * middle)
    return np.interp(anomaly_map, (0.0, middle, end), (0.0, 0.5, 1.0)).astype(np.float32)


def overlay(
    scan: Scan,
    anomaly_map: np.ndarray,
    threshold: float,
    *,
    opacity: float = OPACITY,
    mask: np.ndarray | None = None,
    colours: str = COLOURS,
) -> np.ndarray:
    """Lay a map over its scan: transparent where it is low, a contour where it crosses the threshold.

    Args:
        scan: The scan.
        anomaly_map: [H, W] in [0, 1] on the pixels of the scan.
        threshold: Threshold of the adapter, in [0, 1].
        opacity: Opacity of the colours at the threshold and above, in [0, 1].
        mask: bool [H, W] to be outlined as well, such as a synthetic anomaly; None for none.
        colours: Name of the colour map in `COLOUR_MAPS`.

    Returns:
        [H, W, 3] uint8, RGB.

    Raises:
        ValueError: The map or the mask is not on the pixels of the scan.
    """
    shape = (scan.height, scan.width)
    if anomaly_map.shape != shape or (mask is not None and mask.shape != shape):
        raise ValueError(f"map and mask must be {shape}, the pixels of the scan")
    picture = scan.pixels if scan.pixels.ndim == 3 else cv2.cvtColor(scan.pixels, cv2.COLOR_GRAY2RGB)  # [H, W, 3]
    position = colour_position(anomaly_map, threshold)  # [H, W]
    tints = COLOUR_MAPS[colours][np.rint(position * 255).astype(np.uint8)]  # [H, W, 3]
    start = VISIBLE_FROM / 2  # in colour positions, where the threshold is at one half
    ramp = np.clip((position - start) / (0.5 - start), 0, 1)[..., None]  # [H, W, 1]
    alpha = opacity * ramp**2  # squared: most of a normal scan lies not far below the threshold, and should stay clear
    blended = np.rint(picture * (255 * (1 - alpha)) + tints * alpha).astype(np.uint8)
    blended = draw_outline(blended, anomaly_map > threshold, CONTOUR_COLOUR)
    return blended if mask is None else draw_outline(blended, mask, MASK_COLOUR)


def draw_outline(picture: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Draw the outline of a mask.

    Args:
        picture: [H, W, 3] uint8, RGB.
        mask: bool [H, W].
        colour: RGB.

    Returns:
        A new [H, W, 3] uint8.
    """
    outlined = np.ascontiguousarray(picture).copy()
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(outlined, contours, -1, colour, max(1, round(max(mask.shape) / 400)))
    return outlined


def save_picture(path: Path, picture: np.ndarray) -> None:
    """Write an RGB picture [H, W, 3] uint8 as PNG.

    Raises:
        OSError: The file cannot be written.
    """
    _write_png(path, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))


def save_map(path: Path, anomaly_map: np.ndarray) -> None:
    """Write a map [H, W] in [0, 1] as 16-bit grey PNG: 0 ... 65535, the same for all scans.

    Raises:
        OSError: The file cannot be written.
    """
    _write_png(path, np.rint(np.clip(anomaly_map, 0, 1) * 65535).astype(np.uint16))


def draw_score_histogram(
    axes: Axes, reference_scores: Sequence[float], threshold: float, marked: Mapping[str, float] | None = None
) -> None:
    """Plot the scores of the reference scans with the threshold, and scans marked among them.

    Args:
        axes: Of a figure.
        reference_scores: Leave-one-out scores, in [0, 1].
        threshold: Threshold of the adapter.
        marked: Scores of scans to mark, by label.
    """
    axes.set(xlabel="score", ylabel="reference scans", xlim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    bins = np.linspace(0, 1, 41)  # one scale for all scans of all adapters
    axes.hist(np.clip(reference_scores, 0, 1), bins=bins.tolist(), color="#7f8fa6", label="reference scans")
    axes.axvline(threshold, color="black", linestyle="--", linewidth=1.2, label=f"threshold {threshold:.2f}")
    top = axes.get_ylim()[1]
    for label, score in (marked or {}).items():
        colour = "#d1495b" if score > threshold else "#00798c"
        axes.plot([score], [top * 0.08], marker="v", markersize=9, color=colour, linestyle="none", clip_on=False)
        axes.annotate(
            label,
            (score, top * 0.14),
            rotation=90,
            ha="center",
            va="bottom",
            fontsize=8,
            color=colour,
            parse_math=False,
        )
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=8)


def draw_colour_scale(axes: Axes, threshold: float) -> None:
    """Draw the colours of `overlay` as a horizontal bar: its middle is the threshold, see `colour_position`."""
    axes.imshow(COLOUR_MAPS[COLOURS][None], extent=(0, 1, 0, 1), aspect="auto")
    end = min(1.0, 2 * threshold)
    axes.set(yticks=[], xticks=[0, 0.5, 1], xlim=(0, 1))
    axes.set_xticklabels(["0\nlike the references", f"{threshold:.2f}\nthreshold, white contour", f"{end:.2f}\nunlike"])
    axes.tick_params(labelsize=7, length=2)
    left, _, right = axes.get_xticklabels()
    left.set_horizontalalignment("left")
    right.set_horizontalalignment("right")
    axes.axvline(0.5, color="white", linewidth=1)


def _write_png(path: Path, image: np.ndarray) -> None:
    done, data = cv2.imencode(".png", image)
    if not done:
        raise OSError("the picture could not be encoded as PNG")
    path.write_bytes(data.tobytes())  # imwrite only returns False when a disk is full or a folder missing
