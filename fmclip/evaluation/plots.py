"""Figures of an evaluation: methods side by side, score histograms, ROC with its band, grids of scan, mask and map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fmclip.detectors import DEFAULT_DETECTOR
from fmclip.evaluation.intervals import TestScores, mean_auroc_interval, mean_roc
from fmclip.evaluation.rows import Example, Row, Run
from fmclip.evaluation.tables import Summary
from fmclip.figures import draw_outline, overlay
from fmclip.towers.registry import MINI

NORMAL_COLOUR = "#00798c"
ABNORMAL_COLOUR = "#d1495b"
_MASK_COLOUR = (0, 200, 255)


def save_curves(folder: Path, runs: Sequence[Run]) -> None:
    """Write the curves of one dataset, method and k: `..._scores.png` of the first seed, `..._roc.png` of all.

    Args:
        folder: Made if it is missing.
        runs: One of each seed.

    Raises:
        OSError: A file cannot be written.
    """
    stem, title = _names(runs[0].row)
    folder.mkdir(parents=True, exist_ok=True)
    histograms = score_histograms(runs[0].scores, f"{title}, seed {runs[0].row.seed}")
    histograms.savefig(folder / f"{stem}_scores.png", dpi=150)
    roc_curve([run.scores for run in runs], title).savefig(folder / f"{stem}_roc.png", dpi=150)


def save_comparison(folder: Path, summaries: Sequence[Summary]) -> None:
    """Write the methods that were measured on one dataset, tower and k side by side as `..._methods.png`.

    Args:
        folder: Made if it is missing.
        summaries: One of each method.

    Raises:
        OSError: The file cannot be written.
    """
    own = summaries[0]
    stem, title = _setting_names(own.dataset, own.fit_on, own.tower, f"k{own.k}", own.half)
    folder.mkdir(parents=True, exist_ok=True)
    figure = method_intervals(summaries, f"{title}, k = {own.k}, {own.tower}")
    figure.savefig(folder / f"{stem}_methods.png", dpi=150)


def save_by_k(folder: Path, summaries: Sequence[Summary]) -> None:
    """Write the methods that were measured on one dataset and tower against k as `..._by-k_methods.png`.

    Args:
        folder: Made if it is missing.
        summaries: One of each method and k.

    Raises:
        OSError: The file cannot be written.
    """
    own = summaries[0]
    stem, title = _setting_names(own.dataset, own.fit_on, own.tower, "by-k", own.half)
    folder.mkdir(parents=True, exist_ok=True)
    methods_by_k(summaries, f"{title}, {own.tower}").savefig(folder / f"{stem}_methods.png", dpi=150)


def save_examples(folder: Path, run: Run) -> None:
    """Write the examples of a run as `..._examples.png`.

    Args:
        folder: Made if it is missing.
        run: With examples.

    Raises:
        OSError: The file cannot be written.
    """
    _, title = _names(run.row)
    folder.mkdir(parents=True, exist_ok=True)
    grid = heatmap_grid(run.examples, run.row.threshold, f"{title}, seed {run.row.seed}")
    grid.savefig(examples_file(folder, run.row), dpi=110)


def examples_file(folder: Path, row: Row) -> Path:
    """Name the file that `save_examples` writes."""
    return folder / f"{_names(row)[0]}_examples.png"


def _names(row: Row) -> tuple[str, str]:
    """Beginning of the file names, and title."""
    parts = [row.method, f"k{row.k}", *([f"abnormal{row.abnormal_k}"] if row.abnormal_k else [])]
    stem, title = _setting_names(row.dataset, row.fit_on, row.tower, "_".join(parts), row.half)
    seen = f" + {row.abnormal_k} abnormal" if row.abnormal_k else ""
    return stem, f"{title}, {row.method}, k = {row.k}{seen}, {row.tower}"


def _setting_names(dataset: str, fit_on: str, tower: str, what: str, half: str) -> tuple[str, str]:
    """Beginning of file names about something on a dataset, and of titles; the embedded tower goes without saying."""
    parts = [dataset, *([f"from-{fit_on}"] if fit_on != dataset else []), *([tower] if tower != MINI else []), what]
    parts += [half] if half != "all" else []
    stem = "_".join("".join(c if c.isalnum() or c in "-_" else "-" for c in part) for part in parts)
    return stem, f"{dataset} ({half} half)" if half != "all" else dataset


def method_intervals(summaries: Sequence[Summary], title: str) -> Figure:
    """Plot the image AUROC of each method with its 95 % interval, the best on top.

    Methods that learned from abnormal scans too stand below the others: their test has fewer scans, and they are not
    ranked with those that saw normal scans only.

    Args:
        summaries: One of each method.
        title: Title.

    Returns:
        A figure outside of pyplot's registry.
    """
    ordered = sorted(summaries, key=lambda own: (own.abnormal_k == 0, own.metrics["image_auroc"][0]))
    figure, axes = _figure(title, (6.4, 1.0 + 0.34 * len(ordered)))
    for place, own in enumerate(ordered):
        low, high = (100 * bound for bound in own.interval)
        middle = 100 * own.metrics["image_auroc"][0]
        colour = ABNORMAL_COLOUR if own.abnormal_k else NORMAL_COLOUR
        axes.plot([low, high], [place, place], color=colour, linewidth=2.2, alpha=0.5, solid_capstyle="butt")
        axes.plot([middle], [place], "o", color=colour, markersize=6)
        axes.annotate(f"{middle:.1f}", (middle, place), (0, 5), textcoords="offset points", ha="center", fontsize=7)
    axes.axvline(100 * ordered[-1].metrics["image_auroc"][0], color="grey", linewidth=0.8, linestyle=":")
    names = [f"{own.method}{f' + {own.abnormal_k} abnormal' if own.abnormal_k else ''}" for own in ordered]
    axes.set_yticks(range(len(ordered)), names, fontsize=8, parse_math=False)
    axes.set_ylim(-0.6, len(ordered) - 0.3)
    axes.set_xlabel("image AUROC, %, mean of the seeds with its 95 % interval over scans", fontsize=8)
    return figure


def methods_by_k(summaries: Sequence[Summary], title: str) -> Figure:
    """Plot the image AUROC of each method against the number of normal scans that it learned from.

    Args:
        summaries: One of each method and k.
        title: Title.

    Returns:
        A figure outside of pyplot's registry; the default method is drawn thicker.
    """
    lines: dict[str, dict[int, float]] = {}
    for own in summaries:
        lines.setdefault(own.method, {})[own.k] = 100 * own.metrics["image_auroc"][0]
    ks = sorted({own.k for own in summaries})
    last = {method: values[max(values)] for method, values in lines.items()}
    figure, axes = _figure(title, (6.4, 3.8))
    for method in sorted(lines, key=lambda name: -last[name]):
        values = dict(sorted(lines[method].items()))
        width = 2.8 if method == DEFAULT_DETECTOR else 1.4
        axes.plot([*values], [*values.values()], "o-", markersize=4, linewidth=width, label=method)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.set_xlabel("normal scans learned from", fontsize=8)
    axes.set_ylabel("image AUROC, %, mean of the seeds", fontsize=8)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def score_histograms(scores: TestScores, title: str) -> Figure:
    """Plot the scores of normal and abnormal test scans with the calibrated threshold.

    Args:
        scores: Of one run.
        title: Title.

    Returns:
        A figure outside of pyplot's registry.
    """
    values, answers = np.asarray(scores.score), np.asarray(scores.is_abnormal, dtype=bool)
    figure, axes = _figure(title, (6.0, 3.4))
    low, high = min(values.min(), scores.threshold), max(values.max(), scores.threshold)
    bins = np.linspace(low, high if high > low else low + 1e-6, 41)
    for label, own, colour in (("normal", ~answers, NORMAL_COLOUR), ("abnormal", answers, ABNORMAL_COLOUR)):
        above = int((values[own] > scores.threshold).sum())
        text = f"{label}, {above} of {own.sum()} above"
        shares = np.full(own.sum(), 100 / own.sum())
        axes.hist(values[own], bins=bins.tolist(), weights=shares, color=colour, alpha=0.55, label=text)
    axes.axvline(scores.threshold, color="black", linestyle="--", linewidth=1.2, label="calibrated threshold")
    axes.set_xlabel("score")
    axes.set_ylabel("scans of each kind, %")
    axes.legend(frameon=False, fontsize=8)
    return figure


def roc_curve(runs: Sequence[TestScores], title: str) -> Figure:
    """Plot the mean ROC over the seeds with its bootstrapped 95 % band, and each seed's calibrated threshold.

    Args:
        runs: One of each seed.
        title: Title.

    Returns:
        A figure outside of pyplot's registry.
    """
    figure, axes = _figure(title, (4.6, 4.6))
    rates = np.linspace(0, 1, 201)
    middle, low, high = mean_roc(runs, rates)
    bounds = mean_auroc_interval(runs)
    text = f"95 % band; AUROC {100 * bounds[0]:.1f} to {100 * bounds[1]:.1f} %"
    axes.fill_between(rates, low, high, color=NORMAL_COLOUR, alpha=0.2, linewidth=0, label=text)
    axes.plot(rates, middle, color=NORMAL_COLOUR, linewidth=1.8, label=f"mean of {len(runs)} seeds")
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    points = np.array([_at_threshold(run) for run in runs])
    axes.plot(points[:, 0], points[:, 1], "o", color="black", markersize=4, label="calibrated threshold, each seed")
    axes.set_xlim(-0.01, 1)
    axes.set_ylim(0, 1.01)
    axes.set_aspect("equal")
    axes.set_xlabel("share of normal scans called abnormal")
    axes.set_ylabel("share of abnormal scans found")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def heatmap_grid(examples: Sequence[Example], threshold: float, title: str) -> Figure:
    """Show scan, mask and map of each example in a column of its own; without any mask, scan and map.

    Args:
        examples: Their titles become the headings.
        threshold: Calibrated threshold: the middle of the colour scale, and the contour.
        title: Title.

    Returns:
        A figure outside of pyplot's registry.
    """
    has_masks = any(example.mask is not None and example.mask.any() for example in examples)
    rows = ("scan", "mask", "map") if has_masks else ("scan", "map")
    figure = Figure(figsize=(2.0 * len(examples), 2.1 * len(rows) + 0.3), layout="constrained")
    figure.suptitle(title, fontsize=10, parse_math=False)
    grid = figure.subplots(len(rows), len(examples), squeeze=False)
    for column, example in enumerate(examples):
        verdict = "above" if example.score > threshold else "below"
        heading = f"{example.title}\n{example.score:.3f}, {verdict} {threshold:.3f}"
        grid[0, column].set_title(heading, fontsize=8, parse_math=False)
        pictures = _pictures(example, threshold)
        for axes, row in zip(grid[:, column], rows, strict=True):
            picture = pictures[row]
            if picture is None:
                axes.text(0.5, 0.5, "no mask", ha="center", va="center", fontsize=8, color="grey")
            else:
                axes.imshow(picture)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
    for axes, name in zip(grid[:, 0], rows, strict=True):
        axes.set_ylabel(name, fontsize=9)
    return figure


def _pictures(example: Example, threshold: float) -> dict[str, np.ndarray | None]:
    """Scan, mask outlined on the scan (None if unknown), and map on the scan, by name; RGB."""
    pixels = example.scan.pixels
    grey = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
    picture = np.rint(255 * grey).astype(np.uint8)  # [H, W, 3]
    mask = example.mask
    if mask is None:
        outlined = None
    else:
        tinted = np.where(mask[..., None], picture // 2 + np.array(_MASK_COLOUR, np.uint8) // 2, picture)
        outlined = draw_outline(tinted, mask, _MASK_COLOUR)
    return {"scan": picture, "mask": outlined, "map": overlay(example.scan, example.map, threshold)}


def _at_threshold(scores: TestScores) -> tuple[float, float]:
    """Share of normal and of abnormal scans above the calibrated threshold."""
    called, answers = np.asarray(scores.score) > scores.threshold, np.asarray(scores.is_abnormal, dtype=bool)
    return float(called[~answers].mean()), float(called[answers].mean())


def _figure(title: str, size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=9, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
