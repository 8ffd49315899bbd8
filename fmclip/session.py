"""What one visitor holds: an adapter, its calibration, and the way to a better one. No page, no shell in here.

adapt(normals) -> Progress, SyntheticExamples, Preview, ..., Adapted      stop() at any time
query(scans)   -> Findings, as soon as the first good state is there
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from fmclip.errors import FmclipError, NotFittedError
from fmclip.learning import Adapter, Job, Learned, LearnEvent, StopSignal, Waiting, answer, forget, learn
from fmclip.scans import Scan

if TYPE_CHECKING:
    from fmclip.calibration import Calibration, ReferenceWarning
    from fmclip.detectors import Detector, Prediction, SyntheticExamples

PROGRESS_SECONDS = 0.25
"""Steps are told at most this often."""

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


@dataclass(frozen=True)
class Progress:
    """How far adapting is.

    Attributes:
        stage: What happens, in words.
        step: Steps done in this stage.
        steps: Steps of this stage; 0 if it is done in one go.
        loss_curve: (stage, loss) of every training step so far.
        elapsed: Seconds since adapting began.
        eta_seconds: Seconds until the end of this stage; None while that is unknown.
        message: One line for the person at the screen.
    """

    stage: str
    step: int
    steps: int
    loss_curve: tuple[tuple[str, float], ...]
    elapsed: float
    eta_seconds: float | None
    message: str


@dataclass(frozen=True, eq=False)
class Preview:
    """A good state was reached: queries are answered from here on, each time better.

    Attributes:
        stage: Whose answer it is ("patch memory", "stage 2", "stage 3").
        findings: The queries as this state sees them; fewer than there are if some came in meanwhile.
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
    """

    calibration: Calibration | None
    warnings: tuple[ReferenceWarning, ...]
    seconds: float
    stopped: bool


SessionEvent: TypeAlias = "Progress | SyntheticExamples | Preview | Adapted"


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
        """Whether `adapt` is running."""
        return self._running.locked()

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
    ) -> Iterator[SessionEvent]:
        """Learn from normal scans. The adapter in use is replaced when the new one reaches its first good state.

        Args:
            normals: The reference scans.
            scan_type: What they show ("brain MRI").
            preset: "fast" or "full".
            seed: Start of all random draws; the same scans and seed give the same adapter.
            method: Name of the detector.
            preview_queries: Mapped at each good state; scans that are added to the sequence later are mapped too.

        Yields:
            `Progress`, `SyntheticExamples` and `Preview`; `Adapted` at the end.

        Raises:
            ReferenceSetError: The set cannot be learned from.
            FmclipError: The session is adapting already, or the fit failed.
        """
        from fmclip.calibration import check_references, require_references

        require_references(normals)
        if not self._running.acquire(blocking=False):
            raise FmclipError("This session is adapting already: wait, or press Stop first.")
        stop = self._stop = StopSignal()
        started = time.monotonic()
        try:
            job = Job(self.tower, self.device, method, preset, scan_type, seed, tuple(normals), preview_queries)
            learned_any = False
            for event in self._follow(self._learn(job, stop), started):
                learned_any = learned_any or isinstance(event, Preview)
                yield event
            scores = self.calibration.reference_scores if self.calibration and learned_any else None
            warnings = tuple(check_references(normals, scores))
            if learned_any:
                self.warnings = warnings
            yield Adapted(self.calibration, warnings, time.monotonic() - started, stop.is_set())
        finally:
            stop.set()
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

    def save(self, path: Path | str) -> None:
        """Write the adapter to one safetensors file.

        Raises:
            NotFittedError: Nothing was learned or loaded yet.
        """
        from fmclip.checkpoint import save_adapter

        adapter, calibration = self._require_state()
        save_adapter(Path(path), adapter.build(self.tower, self.device), calibration)

    def load(self, path: Path | str) -> None:
        """Take an adapter from a file; if it is refused, the one in use stays.

        Raises:
            CheckpointError: The file is damaged or was made for another tower.
            FmclipError: The session is adapting.
        """
        from fmclip.checkpoint import load_adapter
        from fmclip.towers import get_tower

        if self.is_adapting:
            raise FmclipError("This session is adapting: wait, or press Stop before you load an adapter.")
        tower = get_tower(self.tower, device=self.device)
        detector, calibration = load_adapter(Path(path), device=self.device, tower=tower)
        self._replace(Adapter.of(detector), calibration)
        self.warnings = ()

    def close(self) -> None:
        """Stop, and let go of everything."""
        self.stop()
        self._replace(None, None)

    def _follow(self, events: Iterator[LearnEvent], started: float) -> Iterator[SessionEvent]:
        """Install each good state, and tell the rest in the session's words."""
        from fmclip.calibration import Calibration
        from fmclip.detectors import StageStarted, Step, SyntheticExamples

        tracker = _Tracker(started)
        for event in events:
            if isinstance(event, Learned):
                calibration = Calibration.from_scores(event.adapter.reference_scores)
                self._replace(event.adapter, calibration)
                pairs = zip(event.queries, event.predictions, strict=True)
                yield Preview(event.stage, tuple(_finding(*pair, calibration) for pair in pairs))
            elif isinstance(event, Waiting):
                yield tracker.progress("waiting for another training on this machine to end")
            elif isinstance(event, StageStarted):
                yield tracker.begin(event.stage, event.steps)
            elif isinstance(event, Step):
                if tracker.count(event.step, event.steps, event.loss):
                    yield tracker.progress()
            elif isinstance(event, SyntheticExamples):
                yield event

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


@dataclass
class _Tracker:
    """Counts steps and time of one adaptation."""

    started: float
    stage: str = "preparing"
    step: int = 0
    steps: int = 0
    losses: list[tuple[str, float]] = field(default_factory=list)
    first_step: int = 0
    first_done: float = 0.0
    told: float = -math.inf

    def begin(self, stage: str, steps: int) -> Progress:
        """A stage starts."""
        self.stage, self.step, self.steps = stage, 0, steps
        return self.progress()

    def count(self, step: int, steps: int, loss: float) -> bool:
        """A step is done; tells whether it is time to say so."""
        if self.step == 0:  # what came before the first step, such as caching features, is no measure for the rest
            self.first_step, self.first_done = step, time.monotonic()
        self.step, self.steps = step, steps
        if math.isfinite(loss):  # a stage that trains nothing has no loss
            self.losses.append((self.stage, loss))
        return step == steps or time.monotonic() - self.told >= PROGRESS_SECONDS

    def progress(self, message: str = "") -> Progress:
        """Say how far it is."""
        self.told = time.monotonic()
        eta = None
        if self.first_step < self.step:
            eta = (self.told - self.first_done) / (self.step - self.first_step) * (self.steps - self.step)
        done = f", step {self.step} of {self.steps}" if self.step else ""
        left = f", about {math.ceil(eta)} s left" if eta else ""
        return Progress(
            self.stage,
            self.step,
            self.steps,
            tuple(self.losses),
            self.told - self.started,
            eta,
            message or f"{self.stage}{done}{left}",
        )
