"""Fit and test every combination of dataset, method, k and seed."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fmclip import __version__
from fmclip.detectors.base import Detector
from fmclip.evaluation.datasets import Case, Dataset, DatasetError, read_mask
from fmclip.evaluation.metrics import PixelAUROC, image_auroc
from fmclip.evaluation.protocol import Half, Protocol, Split, split_cases
from fmclip.scans import read_scan
from fmclip.towers import Tower

BATCH = 16
"""Scans held in memory and predicted at once."""

OnProgress = Callable[[float, str], None]
"""Called with (share of all runs done, what happens in words)."""


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    Attributes:
        datasets: On these datasets.
        methods: These detectors, by name.
        ks: With these numbers of reference scans.
        seeds: Each draws references and starts the fit.
        preset: Preset of the detectors' configs.
        protocol: How twins are treated.
        half: Part of the groups.
    """

    datasets: Sequence[Dataset]
    methods: Sequence[str]
    ks: Sequence[int]
    seeds: Sequence[int]
    preset: str
    protocol: Protocol = Protocol.UNIQUE
    half: Half = Half.ALL


@dataclass(frozen=True)
class Row:
    """One measured run.

    Attributes:
        dataset: Dataset.
        method: Detector.
        tower: Tower.
        k: Number of reference scans.
        seed: Seed of draw and fit.
        protocol: "unique" or "raw".
        image_auroc: AUROC over the test scans.
        pixel_auroc: AUROC over all pixels of the test scans whose mask is known (normal scans have none to mark);
            None without masks.
        fit_seconds: Wall time of `fit`.
        ms_per_scan: Wall time of `predict` per test scan.
        n_normal: Normal test scans.
        n_abnormal: Abnormal test scans.
        half: Part of the groups.
        preset: Preset of the config.
    """

    dataset: str
    method: str
    tower: str
    k: int
    seed: int
    protocol: str
    image_auroc: float
    pixel_auroc: float | None
    fit_seconds: float
    ms_per_scan: float
    n_normal: int
    n_abnormal: int
    half: str
    preset: str


def run_plan(
    plan: Plan, tower: Tower, *, on_progress: OnProgress | None = None, on_skip: Callable[[str], None] | None = None
) -> Iterator[Row]:
    """Run a plan, one row at a time.

    Args:
        plan: What to measure.
        tower: Tower of all runs.
        on_progress: Told how far it is.
        on_skip: Told of each combination that cannot be drawn (a k larger than the dataset allows).

    Yields:
        A row as soon as it is measured.
    """
    runs = [
        (dataset, k, seed, method)
        for dataset in plan.datasets
        for k in plan.ks
        for seed in plan.seeds
        for method in plan.methods
    ]
    report = on_progress or (lambda share, text: None)
    for done, (dataset, k, seed, method) in enumerate(runs):
        text = f"{dataset.name}, {method}, k = {k}, seed {seed}"
        report(done / len(runs), text)
        try:
            split = split_cases(dataset.cases, k, seed, protocol=plan.protocol, half=plan.half)
        except DatasetError as error:
            if on_skip is not None and seed == plan.seeds[0] and method == plan.methods[0]:
                on_skip(f"{dataset.name}: {error}")
            continue
        detector = _make_detector(method, tower, plan.preset, dataset.scan_type, seed)

        def within(share: float, done: int = done, text: str = text) -> None:
            report((done + share) / len(runs), text)

        yield Row(
            dataset=dataset.name,
            method=method,
            tower=tower.name,
            k=k,
            seed=seed,
            protocol=plan.protocol.value,
            n_normal=split.n_normal,
            n_abnormal=split.n_abnormal,
            half=plan.half.value,
            preset=plan.preset,
            **_measure(detector, split, within),
        )
    report(1.0, "done")


def environment() -> dict[str, Any]:
    """Describe machine and versions, for results that can be compared later."""
    import torch

    return {
        "machine": platform.processor() or platform.machine(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "fmclip": __version__,
        **{name: _version(name) for name in ("torch", "timm", "open_clip_torch", "peft", "numpy")},
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": _commit(),
    }


def _make_detector(method: str, tower: Tower, preset: str, scan_type: str, seed: int) -> Detector:
    from fmclip.detectors import DETECTORS

    detector_class = DETECTORS[method]
    config_class: Any = detector_class.config_class
    return detector_class(tower, config_class.preset(preset, scan_type=scan_type, seed=seed))


def _measure(detector: Detector, split: Split, on_share: Callable[[float], None]) -> dict[str, Any]:
    """Fit on the references and predict the test scans, in batches, timing both without the reading of files."""
    references = [read_scan(case.path, label=f"scan {place}") for place, case in enumerate(split.references, 1)]
    started = time.perf_counter()
    detector.fit(references)
    fit_seconds = time.perf_counter() - started
    scores: list[float] = []
    pixels = PixelAUROC()
    predict_seconds = 0.0
    for start in range(0, len(split.test), BATCH):
        cases = split.test[start : start + BATCH]
        scans = [read_scan(case.path) for case in cases]
        started = time.perf_counter()
        predictions = detector.predict(scans)
        predict_seconds += time.perf_counter() - started
        scores += [prediction.score for prediction in predictions]
        for case, prediction in zip(cases, predictions, strict=True):
            _count_pixels(pixels, case, prediction.map)
        on_share((start + len(cases)) / len(split.test))
    return {
        "image_auroc": image_auroc(scores, [case.is_abnormal for case in split.test]),
        "pixel_auroc": pixels.compute(),
        "fit_seconds": fit_seconds,
        "ms_per_scan": 1000 * predict_seconds / len(split.test),
    }


def _count_pixels(pixels: PixelAUROC, case: Case, anomaly_map: np.ndarray) -> None:
    """Add one test scan: normal scans are normal everywhere, abnormal scans without a mask say nothing."""
    shape = (anomaly_map.shape[0], anomaly_map.shape[1])
    if case.mask is not None:
        pixels.update(anomaly_map, read_mask(case.mask, shape))
    elif not case.is_abnormal:
        pixels.update(anomaly_map, np.zeros(shape, dtype=bool))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of the source tree, or None outside one."""
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        folder = Path(__file__).resolve().parent
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
