"""What one run yields, and the file that lets a broken-off evaluation go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fmclip.evaluation.datasets import DatasetError
from fmclip.evaluation.intervals import Interval, TestScores
from fmclip.scans import Scan


@dataclass(frozen=True)
class Row:
    """One measured run; names no scan.

    Attributes:
        dataset: Dataset tested on.
        fit_on: Dataset learned from; the same one unless the run crosses datasets.
        method: Detector.
        tower: Tower.
        k: Number of reference scans.
        abnormal_k: Abnormal scans that the detector learned from; 0 for one that does not look at them.
        seed: Seed of draw and fit.
        protocol: "unique" or "raw".
        half: Part of the groups.
        preset: Preset of the config, and what was set otherwise where a method has it ("full, heads=common").
        image_auroc: AUROC over the test scans; this and the next six as in `ImageMetrics`.
        average_precision: Average precision.
        f1_max: Best F1.
        sensitivity_at_95_specificity: Sensitivity at 95 % specificity.
        sensitivity: At the calibrated threshold.
        specificity: At the calibrated threshold.
        f1: At the calibrated threshold.
        threshold: The calibrated threshold.
        pixel_auroc: AUROC over all pixels of the test scans whose mask is known (normal scans have none to mark);
            None without masks, as the next two.
        aupro: Per-region overlap up to 30 % false alarms.
        dice: Dice at the calibrated threshold.
        intervals: 95 % interval of each metric, by its name.
        fit_seconds: Wall time of `fit`.
        ms_per_scan: Wall time of `predict` per test scan.
        n_normal: Normal test scans.
        n_abnormal: Abnormal test scans.
        n_unreadable: Scans of the dataset that could not be read and were left out.
        n_twins: Test scans left out because they look like a scan learned from, or because the name of their group is
            that of one.
        n_unreadable_masks: Abnormal scans of this run left out of the pixel metrics, or learned from without their
            masks, because these cannot be read.
    """

    dataset: str
    fit_on: str
    method: str
    tower: str
    k: int
    abnormal_k: int
    seed: int
    protocol: str
    half: str
    preset: str
    image_auroc: float
    average_precision: float
    f1_max: float
    sensitivity_at_95_specificity: float
    sensitivity: float
    specificity: float
    f1: float
    threshold: float
    pixel_auroc: float | None
    aupro: float | None
    dice: float | None
    intervals: dict[str, Interval]
    fit_seconds: float
    ms_per_scan: float
    n_normal: int
    n_abnormal: int
    n_unreadable: int
    n_twins: int
    n_unreadable_masks: int = 0


@dataclass(frozen=True, eq=False)
class Example:
    """A test scan for the figures.

    Attributes:
        title: What it is an example of ("abnormal, worst").
        scan: The scan.
        mask: bool [H, W], or None if nobody drew one.
        map: [H, W] in [0, 1].
        score: Its score.
    """

    title: str
    scan: Scan
    mask: np.ndarray | None
    map: np.ndarray
    score: float


@dataclass(frozen=True, eq=False)
class Run:
    """A row with the scores behind it.

    Attributes:
        row: The row.
        scores: Scores of the test scans.
        examples: Scans for the figures; empty unless asked for.
    """

    row: Row
    scores: TestScores
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A run that could not be measured.

    Attributes:
        dataset: Dataset.
        method: Detector.
        tower: Tower.
        k: Number of reference scans.
        seed: Seed.
        reason: Why, in words.
    """

    dataset: str
    method: str
    tower: str
    k: int
    seed: int
    reason: str


class Journal:
    """Runs of an evaluation in a file of JSON lines, each written as soon as it is measured.

    A run is found again only under the same key, so that other code, settings or data never mix in.

    Args:
        path: The file; made when the first run is added.

    Raises:
        DatasetError: The file is something else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._runs: dict[str, Run] = {}
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        if lines and not lines[-1].endswith(b"\n"):  # cut short while it was written
            del lines[-1]
            with path.open("ab") as file:
                file.truncate(sum(map(len, lines)))
        for line in lines:
            try:
                entry = json.loads(line)
                self._runs[entry["key"]] = _run_from(entry)
            except (ValueError, KeyError, TypeError):
                raise DatasetError(
                    "The file to resume from was not written by an evaluation of this version."
                ) from None

    def find(self, key: str) -> Run | None:
        """Return an earlier run, without examples."""
        return self._runs.get(key)

    def add(self, key: str, run: Run) -> None:
        """Write a run."""
        self._runs[key] = run
        self._path.parent.mkdir(parents=True, exist_ok=True)
        entry = {"key": key, "row": asdict(run.row), "scores": asdict(run.scores)}
        with self._path.open("ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")  # at its end, whoever else writes there too


def run_key(settings: Mapping[str, Any]) -> str:
    """Hash all that a run depends on."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _run_from(entry: dict[str, Any]) -> Run:
    row, scores = entry["row"], entry["scores"]
    row["intervals"] = {name: (low, high) for name, (low, high) in row["intervals"].items()}
    listed: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in scores.items()
    }
    return Run(Row(**row), TestScores(**listed))
