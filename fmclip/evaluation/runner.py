"""Fit and test every combination of dataset, method, k and seed."""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fmclip.detectors import DETECTORS
from fmclip.detectors.base import Detector, Prediction
from fmclip.detectors.events import Event, StageStarted, Step
from fmclip.errors import FmclipError, ScanError, is_out_of_memory
from fmclip.evaluation.datasets import Case, Dataset, DatasetError, OnProgress, read_masks
from fmclip.evaluation.environment import code_digest, environment
from fmclip.evaluation.intervals import TestScores, bootstrap_weights, image_intervals, intervals
from fmclip.evaluation.metrics import image_metrics
from fmclip.evaluation.pixels import PixelScores
from fmclip.evaluation.protocol import Half, Protocol, Split, split_cases, twin_groups
from fmclip.evaluation.rows import Example, Journal, Row, Run, Skipped, run_key
from fmclip.scans import Scan, read_scan
from fmclip.settings import config_of, in_words
from fmclip.towers import Tower

BATCH = 16
"""Scans held in memory and predicted at once."""


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
        abnormal_k: Abnormal scans to learn from, for methods that can; they are taken out of the test of all methods.
        fit_on: Dataset to learn from instead of the one tested on.
        examples: Whether runs of the first seed bring scans for the figures.
        settings: Settings by name that differ from the preset, for those methods that have them.
    """

    datasets: Sequence[Dataset]
    methods: Sequence[str]
    ks: Sequence[int]
    seeds: Sequence[int]
    preset: str
    protocol: Protocol = Protocol.UNIQUE
    half: Half = Half.ALL
    abnormal_k: int = 0
    fit_on: Dataset | None = None
    examples: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


def run_plan(
    plan: Plan, tower: Tower, *, journal: Journal | None = None, on_progress: OnProgress | None = None
) -> Iterator[Run | Skipped]:
    """Run a plan, one run at a time.

    A run that cannot be measured is skipped with its reason, and the others go on: a k larger than the dataset allows,
    a tower that the method refuses, a reference set that it cannot learn from.

    Args:
        plan: What to measure.
        tower: Tower of all runs.
        journal: Runs measured before, which are not measured again; gets the new ones.
        on_progress: Told how far it is.

    Yields:
        A run as soon as it is measured, or why it was skipped.
    """
    combinations = [
        (dataset, k, seed, method)
        for dataset in plan.datasets
        for k in plan.ks
        for seed in plan.seeds
        for method in plan.methods
    ]
    report = on_progress or (lambda share, text: None)
    unreadable: set[Case] = set()
    fingerprints: dict[int, str] = {}
    for done, (dataset, k, seed, method) in enumerate(combinations):
        name = f"{dataset.name}, {method}, k = {k}, seed {seed}"

        def within(share: float, stage: str = "", done: int = done, name: str = name) -> None:
            report((done + share) / len(combinations), f"{name}{', ' if stage else ''}{stage}")

        within(0.0)
        try:
            run = _Measurement(plan, dataset, method, k, seed, tower, unreadable, fingerprints, within)
            yield _measured_once(run, journal) if journal else run.measure()
        except (FmclipError, MemoryError, RuntimeError) as error:
            if not isinstance(error, FmclipError) and not is_out_of_memory(error):
                raise
            reason = str(error) if isinstance(error, FmclipError) else "The device ran out of memory."
            yield Skipped(dataset.name, method, tower.name, k, seed, reason)
    report(1.0, "done")


def _module_digest(detector_class: type[Detector]) -> str:
    """Hash the file of a detector, which may lie outside the package."""
    return hashlib.sha256(Path(inspect.getfile(detector_class)).read_bytes()).hexdigest()[:12]


@dataclass
class _Tested:
    """What predicting the test scans yields, scan by scan."""

    pixels: PixelScores
    cases: list[Case] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    seconds: float = 0.0
    n_twins: int = 0


@dataclass
class _Measurement:
    """One run: draw, fit, predict, measure."""

    plan: Plan
    dataset: Dataset
    method: str
    k: int
    seed: int
    tower: Tower
    unreadable: set[Case]
    fingerprints: dict[int, str]  # of the datasets, by their id: taken once for all runs
    on_share: Callable[..., None]

    def __post_init__(self) -> None:
        self.source = self.plan.fit_on or self.dataset
        self.unreadable_masks: set[Case] = set()
        plan, scan_type = self.plan, self.source.scan_type
        config = config_of(self.method, plan.preset, plan.settings, scan_type=scan_type, seed=self.seed)
        self.detector: Detector = DETECTORS[self.method](self.tower, config)
        # "never", "optional" or "required"; a detector that says nothing never looks at abnormal scans.
        self.uses_abnormals = self.plan.abnormal_k > 0 and getattr(self.detector, "uses_abnormals", "never") != "never"

    def key(self) -> str:
        """Hash all that the run depends on: settings, data, code, versions and machine."""
        where = environment()
        plan = self.plan
        return run_key(
            {
                "dataset": (self.dataset.name, self._fingerprint(self.dataset)),
                "fit_on": (self.source.name, self._fingerprint(self.source)),
                "method": self.method,
                "config": self.detector.config.to_dict(),
                "tower": (self.tower.name, self.tower.identity, self.tower.image_size, str(self.tower.device)),
                "draw": (self.k, plan.abnormal_k, self.seed, plan.protocol.value, plan.half.value, plan.preset),
                "code": (where["fmclip"], code_digest(), _module_digest(type(self.detector))),
                "versions": [where[name] for name in ("torch", "timm", "open_clip_torch", "numpy", "cpu", "gpu")],
            }
        )

    @property
    def preset(self) -> str:
        """What a row says of the config."""
        return in_words(self.plan.preset, self.plan.settings)

    def _fingerprint(self, dataset: Dataset) -> str:
        if id(dataset) not in self.fingerprints:
            self.fingerprints[id(dataset)] = dataset.fingerprint()
        return self.fingerprints[id(dataset)]

    def measure(self) -> Run:
        """Measure.

        Raises:
            FmclipError: It cannot be drawn or learned.
        """
        split, normals, abnormals = self._draw()
        started = time.perf_counter()
        self._fit(normals, abnormals, split.abnormals)
        fit_seconds = time.perf_counter() - started
        threshold = self.detector.calibration().threshold
        tested = self._predict(split.test, {scan.digest for scan in (*normals, *abnormals)}, threshold)
        scores = self._scores(tested, threshold)
        n_abnormal = sum(scores.is_abnormal)
        if not 0 < n_abnormal < len(scores.is_abnormal):
            raise DatasetError("Too few test scans can be read: normal and abnormal ones are needed.")
        weights = bootstrap_weights(scores.group, scores.is_abnormal)
        pixels = tested.pixels.compute()
        row = Row(
            dataset=self.dataset.name,
            fit_on=self.source.name,
            method=self.method,
            tower=self.tower.name,
            k=self.k,
            abnormal_k=self.plan.abnormal_k if self.uses_abnormals else 0,
            seed=self.seed,
            protocol=self.plan.protocol.value,
            half=self.plan.half.value,
            preset=self.preset,
            threshold=threshold,
            **asdict(image_metrics(scores.score, scores.is_abnormal, threshold)),
            **(asdict(pixels) if pixels else dict.fromkeys(("pixel_auroc", "aupro", "dice"))),
            intervals=image_intervals(scores, weights) | (intervals(tested.pixels.resample(weights)) if pixels else {}),
            fit_seconds=fit_seconds,
            ms_per_scan=1000 * tested.seconds / len(tested.cases),
            n_normal=len(scores.is_abnormal) - n_abnormal,
            n_abnormal=n_abnormal,
            n_unreadable=len(self.unreadable.intersection((*self.dataset.cases, *self.source.cases))),
            n_twins=tested.n_twins + split.n_twins,
            n_unreadable_masks=len(self.unreadable_masks),
        )
        wants_examples = self.plan.examples and self.seed == self.plan.seeds[0]
        return Run(row, scores, self._examples(tested) if wants_examples else ())

    def _draw(self) -> tuple[Split, list[Scan], list[Scan]]:
        """Draw, and draw on until all scans to learn from can be read."""
        while True:
            split = split_cases(
                self.dataset.cases,
                self.k,
                self.seed,
                abnormal_k=self.plan.abnormal_k,
                protocol=self.plan.protocol,
                half=self.plan.half,
                fit_on=self.plan.fit_on.cases if self.plan.fit_on else None,
                unreadable=self.unreadable,
            )
            scans = [self._read(case, f"scan {place}") for place, case in enumerate(split.references, 1)]
            abnormals = [self._read(case, f"abnormal scan {place}") for place, case in enumerate(split.abnormals, 1)]
            if None not in scans and None not in abnormals:
                return split, [scan for scan in scans if scan], [scan for scan in abnormals if scan]

    def _read(self, case: Case, label: str) -> Scan | None:
        """Read a scan, or remember that it cannot be read."""
        try:
            return read_scan(case.path, label=label)
        except ScanError:
            self.unreadable.add(case)
            return None

    def _fit(self, normals: list[Scan], abnormals: list[Scan], cases: Sequence[Case]) -> None:
        if not self.uses_abnormals:
            self.detector.fit(normals, on_event=self._show_fit)
            return
        masks = [self._mask_of(case, scan) if case.masks else None for case, scan in zip(cases, abnormals, strict=True)]
        fit: Any = self.detector.fit  # only detectors that use abnormal scans take their masks
        fit(normals, abnormals, abnormal_masks=masks, on_event=self._show_fit)

    def _show_fit(self, event: Event) -> None:
        if isinstance(event, StageStarted):
            self.on_share(0.0, event.stage)
        elif isinstance(event, Step):
            self.on_share(0.0, f"{event.stage} {event.step}/{event.steps}")

    def _predict(self, cases: Sequence[Case], learned: set[str], threshold: float) -> _Tested:
        """Predict in batches, timed without the reading of files; `learned` are digests of the scans learned from."""
        tested = _Tested(PixelScores(threshold))
        for start in range(0, len(cases), BATCH):
            batch = cases[start : start + BATCH]
            pairs = [(case, scan) for case in batch if (scan := self._read(case, "a test scan"))]
            if self.plan.protocol is Protocol.UNIQUE:
                tested.n_twins += sum(scan.digest in learned for _, scan in pairs)
                pairs = [(case, scan) for case, scan in pairs if scan.digest not in learned]
            started = time.perf_counter()
            predictions = self.detector.predict([scan for _, scan in pairs]) if pairs else []
            tested.seconds += time.perf_counter() - started
            for (case, scan), prediction in zip(pairs, predictions, strict=True):
                self._count_pixels(tested, case, scan, prediction)
                tested.cases.append(case)
                tested.scores.append(float(prediction.score))
            self.on_share((start + len(batch)) / len(cases), "testing")
        return tested

    def _count_pixels(self, tested: _Tested, case: Case, scan: Scan, prediction: Prediction) -> None:
        """Add one test scan: normal scans are normal everywhere, abnormal scans without a mask say nothing."""
        if case.masks or not case.is_abnormal:
            mask = self._mask_of(case, scan)
            if mask is not None:
                tested.pixels.update(prediction.map, mask, place=len(tested.cases))

    def _mask_of(self, case: Case, scan: Scan) -> np.ndarray | None:
        """Read the masks of a scan: bool [H, W], or None, which is remembered, if one cannot be read."""
        try:
            return read_masks(case.masks, (scan.height, scan.width))
        except ScanError:
            self.unreadable_masks.add(case)
            return None

    def _scores(self, tested: _Tested, threshold: float) -> TestScores:
        places = {case: place for place, case in enumerate(self.dataset.cases)}
        twins = dict(zip(self.dataset.cases, twin_groups(self.dataset.cases), strict=True))
        return TestScores(
            case=tuple(places[case] for case in tested.cases),
            group=tuple(twins[case] for case in tested.cases),
            is_abnormal=tuple(case.is_abnormal for case in tested.cases),
            score=tuple(tested.scores),
            threshold=threshold,
        )

    def _examples(self, tested: _Tested) -> tuple[Example, ...]:
        """Map the best, median and worst answered scan of either kind once more, to keep no other map in memory."""
        found = []
        for is_abnormal in (True, False):
            own = [place for place, case in enumerate(tested.cases) if case.is_abnormal == is_abnormal]
            own.sort(key=lambda place: tested.scores[place], reverse=is_abnormal)  # the best answered first
            for title, place in (("best", own[0]), ("median", own[len(own) // 2]), ("worst", own[-1])):
                case = tested.cases[place]
                scan = read_scan(case.path)
                (prediction,) = self.detector.predict([scan])
                mask = self._mask_of(case, scan) if case.masks or not is_abnormal else None
                words = f"{'abnormal' if is_abnormal else 'normal'}, {title}"
                found.append(Example(words, scan, mask, prediction.map, float(prediction.score)))
        return tuple(found)


def _measured_once(run: _Measurement, journal: Journal) -> Run:
    key = run.key()
    found = journal.find(key)
    if found is None:
        found = run.measure()
        journal.add(key, found)
    return replace(found, row=replace(found.row, preset=run.preset))  # a setting that others have may be new
