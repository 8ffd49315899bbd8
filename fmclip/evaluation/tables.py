"""Runs of an evaluation -> mean and spread over the seeds, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from fmclip.detectors import DEFAULT_DETECTOR
from fmclip.evaluation.intervals import Comparison, Interval, compare, mean_auroc_interval
from fmclip.evaluation.rows import Row, Run, Skipped

Spread: TypeAlias = tuple[float, float | None]
"""Mean and standard deviation."""

METRICS = {
    "image_auroc": "image AUROC",
    "average_precision": "AP",
    "f1_max": "F1-max",
    "sensitivity_at_95_specificity": "sens. at 95 % spec.",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "f1": "F1",
    "pixel_auroc": "pixel AUROC",
    "aupro": "AUPRO",
    "dice": "Dice",
}
"""Fields of `Row` that are averaged, and their headings."""


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation over the seeds of one combination.

    Attributes:
        dataset: Dataset tested on.
        fit_on: Dataset learned from.
        method: Detector.
        tower: Tower.
        k: Number of reference scans.
        abnormal_k: Abnormal scans learned from.
        protocol: "unique" or "raw".
        half: Part of the groups.
        preset: Preset of the config.
        seeds: Number of seeds.
        metrics: By the names of `METRICS`, (mean, spread); the spread is None for a single seed. Metrics over pixels
            are missing without masks.
        interval: 95 % interval of the mean image AUROC, by bootstrap over scans.
        comparison: Image AUROC less that of the default method on the same scans; None for the default itself, without
            a run of it, and for methods that saw abnormal scans.
        fit_seconds: Mean.
        ms_per_scan: Mean.
    """

    dataset: str
    fit_on: str
    method: str
    tower: str
    k: int
    abnormal_k: int
    protocol: str
    half: str
    preset: str
    seeds: int
    metrics: dict[str, Spread]
    interval: Interval
    comparison: Comparison | None
    fit_seconds: float
    ms_per_scan: float


def summarise(runs: Iterable[Run], *, default: str = DEFAULT_DETECTOR) -> list[Summary]:
    """Put the seeds of each combination together, in the order in which they first appear.

    Args:
        runs: Any runs.
        default: Method that the others are compared with.

    Returns:
        One summary for each combination.
    """
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault((*_setting(run.row), run.row.k, run.row.abnormal_k, run.row.method), []).append(run)
    found = []
    for (*shared, k, abnormal_k, method), own in groups.items():
        others = groups.get((*shared, k, 0, default), []) if abnormal_k == 0 and method != default else []
        found.append(_summary(own, others))
    return found


def markdown(runs: Sequence[Run], skipped: Sequence[Skipped] = ()) -> str:
    """Lay out all results as Markdown.

    Methods that learned from abnormal scans stand in tables of their own: they are never ranked with those that saw
    normal scans only.

    Args:
        runs: What was measured.
        skipped: What was not, and why.

    Returns:
        Headings and tables; AUROC and the like in percent.
    """
    summaries = summarise(runs)
    parts = []
    for setting in dict.fromkeys(_setting(run.row) for run in runs):
        here = [own for own in summaries if _setting(own) == setting]
        dataset, fit_on, tower, protocol, half, preset = setting
        source = "" if fit_on == dataset else f", learned from {fit_on}"
        groups = "all groups" if half == "all" else f"{half} half"
        parts += [f"## {dataset}{source}", "", f"Tower {tower}, {groups}, protocol {protocol}, preset {preset}.", ""]
        for abnormal_k in sorted({own.abnormal_k for own in here}):
            title = f"Learned from k normal and {abnormal_k} abnormal scans:" if abnormal_k else "Normal scans only:"
            parts += [title, "", *_table([own for own in here if own.abnormal_k == abnormal_k]), ""]
    lines = skipped_lines(skipped)
    if lines:
        parts += ["## Skipped", "", *(f"- {line}" for line in lines), ""]
    return "\n".join(parts)


def skipped_lines(skipped: Iterable[Skipped]) -> list[str]:
    """Say once for each dataset, method and reason what was not measured."""
    places: dict[tuple[str, str, str], list[int]] = {}
    for one in skipped:
        places.setdefault((one.dataset, one.method, one.reason), []).append(one.k)
    return [
        f"{dataset}, {method}, k = {', '.join(map(str, dict.fromkeys(ks)))}: {reason}"
        for (dataset, method, reason), ks in places.items()
    ]


def side_by_side(runs: Iterable[Run]) -> list[list[Summary]]:
    """Put together what was measured on the same dataset, tower and k, where that is more than one method."""
    groups: dict[tuple, list[Summary]] = {}
    for own in summarise(runs):
        groups.setdefault((*_setting(own), own.k), []).append(own)
    return [own for own in groups.values() if len(own) > 1]


def by_k(runs: Iterable[Run]) -> list[list[Summary]]:
    """Put together what was learned from normal scans only and measured on the same dataset and tower, where that is
    more than one k."""
    groups: dict[tuple, list[Summary]] = {}
    for own in summarise(run for run in runs if run.row.abnormal_k == 0):
        groups.setdefault(_setting(own), []).append(own)
    return [own for own in groups.values() if len({one.k for one in own}) > 1]


def percent(value: Spread | None) -> str:
    """Word a mean and spread: "92.4 ± 0.8", or a dash where there is none."""
    if value is None:
        return "–"
    mean, spread = value
    return f"{100 * mean:.1f}" if spread is None else f"{100 * mean:.1f} ± {100 * spread:.1f}"


def percent_interval(bounds: Interval) -> str:
    """Word an interval: "90.1 to 94.5"."""
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f}"


def percent_difference(comparison: Comparison | None) -> str:
    """Word a comparison: "-1.2 (p = 0.034)"."""
    if comparison is None:
        return "–"
    p_value = "p < 0.01" if comparison.p_value < 0.01 else f"p = {comparison.p_value:.2f}"
    return f"{100 * comparison.difference:+.1f} ({p_value})"


def _setting(own: Row | Summary) -> tuple[str, str, str, str, str, str]:
    """What a table has in common."""
    return own.dataset, own.fit_on, own.tower, own.protocol, own.half, own.preset


def _table(summaries: Sequence[Summary]) -> list[str]:
    """One table, by k, the best image AUROC first."""
    shown = {name: title for name, title in METRICS.items() if any(name in own.metrics for own in summaries)}
    compares = any(own.comparison for own in summaries)
    first, *others = shown.values()
    titles = ["method", "k", "seeds", first, "95 % interval", *(["less the default"] if compares else []), *others]
    titles += ["fit s", "ms per scan"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for own in sorted(summaries, key=lambda one: (one.k, -one.metrics["image_auroc"][0])):
        head, *tail = (percent(own.metrics.get(name)) for name in shown)
        cells = [own.method, str(own.k), str(own.seeds), head, percent_interval(own.interval)]
        cells += [percent_difference(own.comparison)] if compares else []
        cells += [*tail, f"{own.fit_seconds:.1f}", f"{own.ms_per_scan:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _summary(runs: Sequence[Run], others: Sequence[Run]) -> Summary:
    row = runs[0].row
    scores = [run.scores for run in runs]
    by_seed = {other.row.seed: other.scores for other in others}
    paired = [by_seed[run.row.seed] for run in runs if run.row.seed in by_seed]
    values = {name: [getattr(run.row, name) for run in runs] for name in METRICS}
    return Summary(
        dataset=row.dataset,
        fit_on=row.fit_on,
        method=row.method,
        tower=row.tower,
        k=row.k,
        abnormal_k=row.abnormal_k,
        protocol=row.protocol,
        half=row.half,
        preset=row.preset,
        seeds=len(runs),
        metrics={name: _spread(own) for name, own in values.items() if None not in own},
        interval=mean_auroc_interval(scores),
        comparison=compare(scores, paired),
        fit_seconds=float(np.mean([run.row.fit_seconds for run in runs])),
        ms_per_scan=float(np.mean([run.row.ms_per_scan for run in runs])),
    )


def _spread(values: Sequence[float]) -> Spread:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None
