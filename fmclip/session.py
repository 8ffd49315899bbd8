"""What one visitor holds: an adapter, its calibration, and the way to a better one. No page, no shell in here.

adapt(normals) -> Progress, SyntheticExamples, Preview, SelfCheck, ..., Adapted      stop() at any time, then go_on()
query(scans)   -> Findings, as soon as the first good state is there
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from fmclip.errors import FmclipError, NotFittedError
from fmclip.learning import (
    Adapter,
    Job,
    Learned,
    LearnEvent,
    Mapped,
    StopSignal,
    Waiting,
    answer,
    forget,
    learn,
    load_tower,
)
from fmclip.progress import Progress, Tracker
from fmclip.scans import Scan

if TYPE_CHECKING:
    from fmclip.calibration import Calibration, ReferenceWarning
    from fmclip.detectors import Detector, Prediction, SyntheticExamples, Training
    from fmclip.self_check import SelfCheck

LearnCall: TypeAlias = Callable[[Job, StopSignal], Iterator[LearnEvent]]
AnswerCall: TypeAlias = "Callable[[Adapter, str, str, Sequence[Scan]], list[Prediction]]"


@dataclass(frozen=True, eq=False)
class Finding:
    """What a session says about one scan.

    Attributes:
        label: The scan's label ("scan 3").
        scan: The scan itself.
        map: [H, W] float32 in [0, 1] on the source pixels; higher is more unlike the references.
        parts: Further maps that the map was made of, by name.
        score: Score of the whole scan, on the scale of the map.
        threshold: A score above it deviates from the references.
        verdict: The comparison in words.
        rank: Place among the reference scans in words ("higher than all 16 reference scans").
        is_abnormal: Whether the score lies above the threshold.
        reference_scores: Leave-one-out score of each reference scan.
    """

    label: str
    scan: Scan
    map: np.ndarray
    parts: dict[str, np.ndarray]
    score: float
    threshold: float
    verdict: str
    rank: str
    is_abnormal: bool
    reference_scores: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Preview:
    """Queries as the newest good state sees them, a few at a time; each state sees better than the one before.

    Attributes:
        stage: Whose answer it is ("patch memory", "stage 2", "stage 3").
        findings: Of the queries that were mapped just now; none if there are none.
    """

    stage: str
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Adapted:
    """Adapting is over, by itself or by a Stop.

    Attributes:
        calibration: Threshold and reference scores of the state that is kept.
        warnings: What is odd about the reference scans.
        seconds: How long it took.
        stopped: Whether the person ended it.
        stage: The stage whose state is kept; "" if none was reached, and the former adapter still answers.
    """

    calibration: Calibration | None
    warnings: tuple[ReferenceWarning, ...]
    seconds: float
    stopped: bool
    stage: str


SessionEvent: TypeAlias = "Progress | SyntheticExamples | SelfCheck | Preview | Adapted"


def resolve_device(device: str = "auto") -> str:
    """Name the device to use: "auto" is a GPU when there is one."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


class Session:
    """One visitor's adapter; visitors share nothing but the frozen tower.

    Args:
        tower: Name of the tower.
        device: "auto", "cpu", "cuda", ...
        learn_call: Runs a fit; another one than `learn` may send it to another process.
        answer_call: Maps scans, likewise.
    """

    def __init__(
        self,
        tower: str = "mini",
        device: str = "auto",
        *,
        learn_call: LearnCall = learn,
        answer_call: AnswerCall = answer,
    ) -> None:
        self.tower = tower
        self._device = device
        self._learn = learn_call
        self._answer = answer_call
        self._running = threading.Lock()
        self._stop: StopSignal | None = None
        self._unfinished: tuple[Job, Training] | None = None
        self._state: tuple[Adapter, Calibration] | None = None  # one value, so that a query never sees half of it
        self.warnings: tuple[ReferenceWarning, ...] = ()

    @property
    def device(self) -> str:
        """Where the tower is."""
        return resolve_device(self._device)

    @property
    def is_adapted(self) -> bool:
        """Whether `query` can be called."""
        return self._state is not None

    @property
    def is_adapting(self) -> bool:
        """Whether `adapt` or `load` is running."""
        return self._running.locked()

    @property
    def is_stopping(self) -> bool:
        """Whether Stop was pressed and `adapt` is about to end."""
        return self.is_adapting and self._stop is not None and self._stop.is_set()

    @property
    def window(self) -> str | None:
        """Name of the window that the adapter's references were read with; None if there is none or it is not known."""
        return self._state[0].window if self._state else None

    @property
    def calibration(self) -> Calibration | None:
        """Threshold and reference scores; None before the first good state."""
        return self._state[1] if self._state else None

    @property
    def detector(self) -> Detector:
        """A detector with what was learned, for the checkpoint."""
        adapter, _ = self._require_state()
        return adapter.build(self.tower, self.device)

    def adapt(
        self,
        normals: Sequence[Scan],
        *,
        scan_type: str = "medical scan",
        preset: str = "full",
        seed: int = 0,
        method: str = "fusionmedclip",
        preview_queries: Sequence[Scan] = (),
        window: str | None = None,
        abnormals: Sequence[Scan] = (),
        abnormal_masks: Sequence[np.ndarray | None] = (),
    ) -> Generator[SessionEvent, None, None]:
        """Learn from normal scans. The adapter in use is replaced when the new one reaches its first good state.

        Args:
            normals: The reference scans.
            scan_type: What they show ("brain MRI").
            preset: "fast", "full" or "paper".
            seed: Start of all random draws; the same scans and seed give the same adapter.
            method: Name of the detector.
            preview_queries: Mapped at each good state; scans that are added to the sequence later are mapped too.
            window: Name of the window that the normals were read with; the adapter remembers it.
            abnormals: Abnormal scans; methods that cannot use them leave them out of account.
            abnormal_masks: For each of them bool [H, W] on its source pixels, or None; empty for no masks at all.

        Yields:
            `Progress`, `SyntheticExamples`, `Preview` and `SelfCheck`; `Adapted` at the end.

        Raises:
            ReferenceSetError: The set cannot be learned from.
            FmclipError: The session is adapting already, or the fit failed.
        """
        from fmclip.calibration import require_references

        require_references(normals)
        yield from self._run(
            Job(
                self.tower,
                self.device,
                method,
                preset,
                scan_type,
                seed,
                tuple(normals),
                preview_queries,
                window,
                tuple(abnormals),
                tuple(abnormal_masks) or (None,) * len(abnormals),
            )
        )

    def go_on(self, *, preview_queries: Sequence[Scan] = ()) -> Generator[SessionEvent, None, None]:
        """Go on with the last training: where it was stopped, or, if it was over, for as long again.

        Args:
            preview_queries: As for `adapt`.

        Yields:
            As `adapt` does.

        Raises:
            FmclipError: There is nothing to go on with, or the session is adapting already.
        """
        if self._unfinished is None:
            raise FmclipError("There is no training to go on with: press Adapt first.")
        job, training = self._unfinished
        times = job.times + 1 if training.is_over else job.times
        yield from self._run(replace(job, queries=preview_queries, start=training, times=times))

    @property
    def unfinished(self) -> tuple[tuple[Scan, ...], Training] | None:
        """References and state of the training that `go_on` would go on with; None if there is none."""
        return (tuple(self._unfinished[0].normals), self._unfinished[1]) if self._unfinished else None

    def _run(self, job: Job) -> Generator[SessionEvent, None, None]:
        from fmclip.calibration import check_references

        if not self._running.acquire(blocking=False):
            raise FmclipError("This session is adapting or loading already: wait, or press Stop first.")
        try:
            stop = self._stop = StopSignal()
            try:
                tracker = Tracker(time.monotonic(), what=(job.tower, job.device, job.method), plan=job.plan())
                self._unfinished = None
                yield from self._follow(self._learn(job, stop), job, tracker)
                scores = self.calibration.reference_scores if self.calibration and tracker.learned else None
                warnings = tuple(check_references(job.normals, scores))
                if tracker.learned:
                    self.warnings = warnings
                seconds = time.monotonic() - tracker.started
                yield Adapted(self.calibration, warnings, seconds, stop.is_set(), tracker.learned)
            finally:
                stop.set()
        finally:
            self._running.release()

    def stop(self) -> None:
        """End adapting early; the last good state is kept, and the former adapter if there was none yet."""
        if self._stop is not None:
            self._stop.set()

    def query(self, scans: Sequence[Scan]) -> list[Finding]:
        """Map scans; works while adapting goes on.

        Args:
            scans: Scans of the same type as the references.

        Returns:
            One finding for each scan, in the same order.

        Raises:
            NotFittedError: Nothing was learned or loaded yet.
        """
        adapter, calibration = self._require_state()
        predictions = self._answer(adapter, self.tower, self.device, list(scans))
        return [_finding(*pair, calibration) for pair in zip(scans, predictions, strict=True)]

    def save(self, path: Path | str, name: str = "") -> None:
        """Write the adapter to one safetensors file, with what the person calls it.

        Raises:
            NotFittedError: Nothing was learned or loaded yet.
        """
        from fmclip.checkpoint import save_adapter

        adapter, calibration = self._require_state()
        save_adapter(Path(path), adapter.build(self.tower, self.device), calibration, window=adapter.window, name=name)

    def load(self, path: Path | str) -> None:
        """Take an adapter from a file; if it is refused, the one in use stays.

        Raises:
            CheckpointError: The file is damaged or was made for another tower.
            FmclipError: The session is adapting.
        """
        from fmclip.checkpoint import load_adapter, read_window

        if not self._running.acquire(blocking=False):
            raise FmclipError("This session is adapting: wait, or press Stop before you load an adapter.")
        try:
            tower = load_tower(self.tower, self.device)
            detector, calibration = load_adapter(Path(path), device=self.device, tower=tower)
            self._replace(Adapter.of(detector, read_window(Path(path))), calibration)
            self.warnings, self._unfinished = (), None
        finally:
            self._running.release()

    def close(self) -> None:
        """Stop, and let go of everything."""
        self.stop()
        self._unfinished = None
        self._replace(None, None)

    def _follow(self, events: Iterator[LearnEvent], job: Job, tracker: Tracker) -> Iterator[SessionEvent]:
        """Install each good state, and tell the rest in the session's words."""
        from fmclip.calibration import Calibration
        from fmclip.detectors import StageStarted, Step, SyntheticExamples, Training
        from fmclip.self_check import SelfCheck

        queries = job.queries
        calibration = self.calibration
        for event in events:
            if isinstance(event, Learned):
                calibration = Calibration.from_scores(event.adapter.reference_scores)
                self._replace(event.adapter, calibration)
                tracker.learned = event.stage
            elif isinstance(event, Training):
                self._unfinished = job, event
            elif isinstance(event, Mapped) and calibration is not None:
                found = dict(zip(event.digests, event.predictions, strict=True))
                mapped = [scan for scan in queries if scan.digest in found]
                yield Preview(event.stage, tuple(_finding(scan, found[scan.digest], calibration) for scan in mapped))
            elif isinstance(event, Waiting):
                yield tracker.progress("waiting for another training on this machine")
            elif isinstance(event, StageStarted):
                yield tracker.begin(event.stage, event.steps)
            elif isinstance(event, Step):
                if tracker.count(event.step, event.steps, event.loss):
                    yield tracker.progress()
            elif isinstance(event, (SyntheticExamples, SelfCheck)):
                yield event
        tracker.finish()

    def _replace(self, adapter: Adapter | None, calibration: Calibration | None) -> None:
        former, self._state = self._state, (adapter, calibration) if adapter and calibration else None
        if former is not None:
            forget(former[0])

    def _require_state(self) -> tuple[Adapter, Calibration]:
        if self._state is None:
            raise NotFittedError("Nothing was learned yet: adapt to normal reference scans, or load an adapter, first.")
        return self._state


def _finding(scan: Scan, prediction: Prediction, calibration: Calibration) -> Finding:
    return Finding(
        label=scan.label,
        scan=scan,
        map=prediction.map,
        parts=prediction.parts,
        score=prediction.score,
        threshold=calibration.threshold,
        verdict=calibration.verdict(prediction.score),
        rank=calibration.describe_rank(prediction.score),
        is_abnormal=calibration.is_abnormal(prediction.score),
        reference_scores=tuple(calibration.reference_scores),
    )
