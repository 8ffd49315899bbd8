"""Drawing of an explanation: the patch in question, and beside it the reference patches that it is nearest to."""

from __future__ import annotations

import textwrap

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fmclip.explain import Box, Explanation, Match, ViewExplanation
from fmclip.figures import colour_position
from fmclip.scans import Scan

CONTEXT = 3.0
"""How much of a scan is shown around a patch: a square of so many times its longer side."""
_MARK = "#00c8ff"
_TITLE_CHARS = 30  # that fit over a picture
_KINDS = {"direction": "pattern", "context": "within the scan", "mirror": "left against right"}


def explanation_figure(explanation: Explanation, threshold: float) -> Figure:
    """Draw why a spot is as odd as it is.

    Args:
        explanation: From `fmclip.explain.explain`.
        threshold: Threshold of the adapter, for the colours of the maps.

    Returns:
        A figure of its own, outside of pyplot's registry: a row for each view with its map, the patch, and the nearest
        patches of the references with their distances.
    """
    views = explanation.views
    columns = 2 + max(len(view.matches) for view in views)
    figure = Figure(figsize=(1.75 * columns, 0.5 + 1.95 * len(views)), dpi=100, layout="constrained")
    grid = figure.subplots(len(views), columns, squeeze=False)
    for row, view in zip(grid, views, strict=True):
        for axes in row:
            axes.set_axis_off()
        _draw_map(row[0], explanation, view, threshold)
        _draw_patch(row[1], explanation.scan, explanation.box, f"here: {view.distance:.2f}")
        for axes, match in zip(row[2:], view.matches, strict=False):
            _draw_match(axes, match)
        if not view.matches:
            row[2].text(0.5, 0.5, "at the midline\nleft is right", ha="center", va="center", fontsize=8)
    words = f"{explanation.scan.label}: {explanation.distance:.2f} times as far as the oddest patch of a normal scan"
    figure.suptitle(words, fontsize=10, parse_math=False)
    return figure


def crop_around(scan: Scan, box: Box) -> tuple[np.ndarray, Box]:
    """Cut out a patch with its surroundings.

    Args:
        scan: The scan.
        box: The patch, (left, top, right, bottom).

    Returns:
        Pixels [h, w] or [h, w, 3] in [0, 1], black where the scan ends; the patch within them.
    """
    left, top, right, bottom = box
    margin = round((CONTEXT - 1) / 2 * max(right - left, bottom - top))
    padded = cv2.copyMakeBorder(scan.pixels, *(margin,) * 4, cv2.BORDER_CONSTANT, value=0)
    crop = padded[top : bottom + 2 * margin, left : right + 2 * margin]
    return crop, (margin, margin, margin + right - left, margin + bottom - top)


def _draw_map(axes: Axes, explanation: Explanation, view: ViewExplanation, threshold: float) -> None:
    axes.imshow(colour_position(view.map, threshold), cmap="inferno", vmin=0, vmax=1)
    _mark(axes, explanation.box)
    title = textwrap.fill(f"{view.layer}, {_KINDS[view.kind]}", _TITLE_CHARS)
    axes.set_title(f"{title}\n{view.share:.0%} of the answer", fontsize=8)


def _draw_match(axes: Axes, match: Match) -> None:
    title = f"{match.label}: {match.distance:.2f}"
    if match.scan is None or match.box is None:
        text = f"{title}\n(no picture in\nthe adapter)"
        axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=8, parse_math=False)
    else:
        _draw_patch(axes, match.scan, match.box, title)


def _draw_patch(axes: Axes, scan: Scan, box: Box, title: str) -> None:
    crop, inner = crop_around(scan, box)
    axes.imshow(crop, cmap="gray", vmin=0, vmax=1)
    _mark(axes, inner)
    axes.set_title(title, fontsize=8, parse_math=False)


def _mark(axes: Axes, box: Box) -> None:
    left, top, right, bottom = box
    place = (left - 0.5, top - 0.5)
    axes.add_patch(Rectangle(place, right - left, bottom - top, fill=False, edgecolor=_MARK, linewidth=1.2))
