"""Rows of an evaluation -> mean and spread over the seeds, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from fmclip.evaluation.runner import Row

Spread: TypeAlias = tuple[float, float | None]
"""Mean and standard deviation."""


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation over the seeds of one combination.

    Attributes:
        dataset: Dataset.
        method: Detector.
        tower: Tower.
        k: Number of reference scans.
        protocol: "unique" or "raw".
        half: Part of the groups.
        seeds: Number of seeds.
        image_auroc: (mean, spread); the spread is None for a single seed.
        pixel_auroc: (mean, spread), or None without masks.
        fit_seconds: Mean.
        ms_per_scan: Mean.
    """

    dataset: str
    method: str
    tower: str
    k: int
    protocol: str
    half: str
    seeds: int
    image_auroc: Spread
    pixel_auroc: Spread | None
    fit_seconds: float
    ms_per_scan: float


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """Put the seeds of each combination together, in the order in which they first appear."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.dataset, row.method, row.tower, row.k, row.protocol, row.half), []).append(row)
    return [_summary(own) for own in groups.values()]


def to_markdown(summaries: Sequence[Summary]) -> str:
    """Format as a Markdown table; AUROC in percent, spread is the standard deviation over the seeds."""
    lines = [
        "| dataset | method | tower | k | protocol | half | image AUROC | pixel AUROC | fit s | ms per scan |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for own in summaries:
        cells = [own.dataset, own.method, own.tower, str(own.k), own.protocol, own.half]
        cells += [percent(own.image_auroc), percent(own.pixel_auroc)]
        cells += [f"{own.fit_seconds:.1f}", f"{own.ms_per_scan:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def percent(value: Spread | None) -> str:
    """Word a mean and spread: "92.4 ± 0.8", or a dash where there is none."""
    if value is None:
        return "–"
    mean, spread = value
    return f"{100 * mean:.1f}" if spread is None else f"{100 * mean:.1f} ± {100 * spread:.1f}"


def _summary(rows: Sequence[Row]) -> Summary:
    first = rows[0]
    pixels = [row.pixel_auroc for row in rows if row.pixel_auroc is not None]
    return Summary(
        dataset=first.dataset,
        method=first.method,
        tower=first.tower,
        k=first.k,
        protocol=first.protocol,
        half=first.half,
        seeds=len(rows),
        image_auroc=_spread([row.image_auroc for row in rows]),
        pixel_auroc=_spread(pixels) if pixels else None,
        fit_seconds=float(np.mean([row.fit_seconds for row in rows])),
        ms_per_scan=float(np.mean([row.ms_per_scan for row in rows])),
    )


def _spread(values: Sequence[float]) -> Spread:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None
