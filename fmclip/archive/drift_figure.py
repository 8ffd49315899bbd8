"""The figure of an archive's drift: for each scanner, bands of scores and the share above the threshold, over time."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import matplotlib.dates as mdates
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy.stats import binomtest

from fmclip.archive.drift import Drift, Group
from fmclip.calibration import FALSE_ALARM_RATE

MAX_SCANNERS = 8
"""Shown, those with most scans; the table has all."""
MAX_SPANS = 90
"""Places along the time axis; more days than that are joined to weeks or longer."""
SPANS = ((1, "day"), (7, "week"), (30, "30 days"), (91, "quarter"), (365, "year"))
BAND_COLOUR, SHARE_COLOUR = "#00798c", "#8f4e00"


def drift_figure(drift: Drift) -> Figure:
    """Draw it.

    Args:
        drift: Groups by scanner and day; scans without a day are not drawn.

    Returns:
        A figure outside of pyplot's registry, a row for each scanner.
    """
    days = [group.date for group in drift.groups if group.date is not None]
    length = (max(days) - min(days)).days + 1 if days else 1
    span, word = next((one for one in SPANS if length <= MAX_SPANS * one[0]), SPANS[-1])
    shown = drift.joined(span)
    scanners = drift.scanners[:MAX_SCANNERS]
    figure = Figure(figsize=(11, 0.9 + 1.75 * len(scanners)), layout="constrained")
    grid = figure.subplots(len(scanners), 2, sharex=True, sharey="col", squeeze=False, width_ratios=[3, 2])
    for (left, right), scanner in zip(grid, scanners, strict=True):
        own = [group for group in shown.of(scanner) if group.date is not None and group.scores.size]
        _bands(left, own, span, drift.threshold)
        _shares(right, own, span, drift.threshold)
        scans = sum(group.scores.size for group in drift.of(scanner))
        failed = sum(group.failed for group in drift.of(scanner))
        text = f"{scanner}, {scans:,} scans" + (f" and {failed:,} that failed" if failed else "")
        left.text(0.0, 1.02, text, transform=left.transAxes, fontsize=9, weight="bold", va="bottom", parse_math=False)
        left.set_ylabel("score", fontsize=8)
    titles = (f"scores of each {word}: median, middle half, middle 90 %", "share above the threshold, 95 % interval")
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=10, pad=20, loc="left")
        axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 0.97), borderaxespad=0)
    grid[0, 1].set_ylim(0, None)  # after all of them: the axis is shared
    for axes in grid[-1]:
        locator = mdates.AutoDateLocator(minticks=3, maxticks=7)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(mdates.ConciseDateFormatter(locator))
        axes.xaxis.get_offset_text().set_size(8)
    hidden = len(drift.scanners) - len(scanners)
    if hidden:
        figure.supxlabel(f"{hidden} scanners with fewer scans are in the table only", fontsize=8)
    return figure


def _bands(axes: Axes, groups: Sequence[Group], span: int, threshold: float) -> None:
    """Steps, as wide as the span: nothing is drawn where no scan was made."""
    quantiles = np.array([group.quantiles() for group in groups]).reshape(-1, 5)  # [n, 5]
    low, lower, middle, upper, high = quantiles.T
    starts = _places(groups)
    bars: dict[str, Any] = {"width": span, "align": "edge", "color": BAND_COLOUR, "linewidth": 0}
    axes.bar(starts, high - low, bottom=low, alpha=0.22, **bars)
    axes.bar(starts, upper - lower, bottom=lower, alpha=0.5, **bars)
    axes.hlines(middle, starts, starts + span, color="#00323a", linewidth=1.6)
    axes.axhline(threshold, color="black", linestyle="--", linewidth=1, label=f"threshold {threshold:.3f}")
    _tidy(axes)


def _shares(axes: Axes, groups: Sequence[Group], span: int, threshold: float) -> None:
    counts = np.array([group.scores.size for group in groups])
    above = np.array([int((group.scores > threshold).sum()) for group in groups])
    bounds = np.array([_interval(*pair) for pair in zip(above.tolist(), counts.tolist(), strict=True)]).reshape(-1, 2)
    middles = _places(groups) + span / 2
    axes.vlines(middles, bounds[:, 0], bounds[:, 1], color=SHARE_COLOUR, alpha=0.45, linewidth=1.2)
    axes.plot(middles, above / counts, ".", color=SHARE_COLOUR, markersize=4)
    text = f"{100 * FALSE_ALARM_RATE:.0f} %: expected of normal scans"
    axes.axhline(FALSE_ALARM_RATE, color="black", linestyle=":", linewidth=1, label=text)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _tidy(axes)


def _interval(count: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    interval = binomtest(count, total).proportion_ci(method="wilson")
    return interval.low, interval.high


def _places(groups: Sequence[Group]) -> np.ndarray:
    days = [group.date for group in groups if group.date is not None]
    return np.array([mdates.date2num(datetime.datetime.combine(day, datetime.time())) for day in days])


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
