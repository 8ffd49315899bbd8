"""What one visitor holds: an adapter, its calibration, and the way to a better one. No page, no shell in here.

adapt(normals) -> Progress, SyntheticExamples, Preview, SelfCheck, ..., Adapted      stop() at any time, then go_on()
query(scans)   -> Findings, as soon as the first good state is there
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from fmclip.devices import resolve_device
from fmclip.errors import FmclipError, NotFittedError
from fmclip.findings import Adapted as Adapted
from fmclip.findings import Finding as Finding
from fmclip.findings import Preview as Preview
from fmclip.findings import SessionEvent as SessionEvent
from fmclip.in_use import InUse
from fmclip.job import Job, Unfinished
from fmclip.learning import (
    Adapter,
    Learned,
    LearnEvent,
    Mapped,
    StopSignal,
    Waiting,
    answer,
    explain_spot,
    extend,
    forget,
    learn,
    load_tower,
    look_at,
)
from fmclip.progress import Progress as Progress
from fmclip.progress import Tracker
from fmclip.scans import Scan

if TYPE_CHECKING:
    from fmclip.calibration import Calibration, ReferenceWarning
    from fmclip.detectors import Detector, Prediction
    from fmclip.explain import Explanation
    from fmclip.regions import NormalRegion

LearnCall: TypeAlias = Callable[[Job, StopSignal], Iterator[LearnEvent]]
AnswerCall: TypeAlias = "Callable[[Adapter, str, str, Sequence[Scan]], list[Prediction]]"
ExtendCall: TypeAlias = "Callable[[Adapter, str, str, Sequence[NormalRegion], int], Adapter]"


class Session:
    """One visitor's adapter; visitors share nothing but the frozen tower.

    Args:
        tower: Name of the tower.
        device: "auto", "cpu", "cuda", ...
        learn_call: Runs a fit; another one than `learn` may send it to another process.
        answer_call: Maps scans, likewise.
        extend_call: Lets regions join what was learned, likewise.
    """

    def __init__(
        self,
        tower: str = "mini",
        device: str = "auto",
        *,
        learn_call: LearnCall = learn,
        answer_call: AnswerCall = answer,
        extend_call: ExtendCall = extend,
    ) -> None:
        self.tower = tower
        self._device = device
        self._learn = learn_call
        self._answer = answer_call
        self._extend = extend_call
        self._running, self._installing = threading.Lock(), threading.Lock()
        self._closed = False
        self._stop: StopSignal | None = None
        self.unfinished: Unfinished | None = None  # what `go_on` would go on with
        self._state: InUse | None = None
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
        return self._state.adapter.window if self._state else None

    @property
    def calibration(self) -> Calibration | None:
        """Threshold and reference scores; None before the first good state."""
        return self._state.calibration if self._state else None

    @property
    def adapter_key(self) -> str:
        """Name of the adapter in use, for telling whose a finding is; "" before the first good state."""
        return self._state.adapter.key if self._state else ""

    @property
    def regions(self) -> tuple[NormalRegion, ...]:
        """Regions that this session's person called normal and that the adapter in use takes into account."""
        return self._state.regions if self._state else ()

    @property
    def detector(self) -> Detector:
        """A detector with what was learned, for the checkpoint."""
        return self._require_state().adapter.build(self.tower, self.device)

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
        regions: Sequence[NormalRegion] = (),
        abnormals: Sequence[Scan] = (),
        abnormal_masks: Sequence[np.ndarray | None] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> Generator[SessionEvent, None, None]:
        """Learn from normal scans. The adapter in use is replaced when the new one reaches its first good state.

        Args:
            normals: The reference scans.
            scan_type: What they show ("brain MRI").
            preset: "fast", "full", "paper", or another that the method knows.
            seed: Start of all random draws; the same scans and seed give the same adapter.
            method: Name of the detector.
            preview_queries: Mapped at each good state; scans that are added to the sequence later are mapped too.
            window: Name of the window that the normals were read with; the adapter remembers it.
            regions: Parts of other scans that are normal too; methods without a patch memory leave them out of account.
            abnormals: Abnormal scans; methods that cannot use them leave them out of account.
            abnormal_masks: For each of them bool [H, W] on its source pixels, or None; empty for no masks at all.
            settings: Settings of the method that differ from the preset, by name.

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
                tuple(regions),
                tuple(abnormals),
                tuple(abnormal_masks) or (None,) * len(abnormals),
                settings or {},
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
        if self.unfinished is None:
            raise FmclipError("There is no training to go on with: press Adapt first.")
        yield from self._run(self.unfinished.go_on(preview_queries, self.regions))

    def _run(self, job: Job) -> Generator[SessionEvent, None, None]:
        from fmclip.calibration import check_references

        if not self._running.acquire(blocking=False):
            raise FmclipError("This session is adapting or loading already: wait, or press Stop first.")
        try:
            stop = self._stop = StopSignal()
            try:
                tracker = Tracker(time.monotonic(), what=job.what, plan=job.plan())
                self.unfinished = self.unfinished if job.start else None  # a Stop may come before the first step
                yield from self._follow(self._learn(job, stop), job, tracker)
                warnings = tuple(check_references(job.normals, self.calibration if tracker.learned else None))
                if tracker.learned:
                    self.warnings = warnings
                seconds, notices = time.monotonic() - tracker.started, tuple(tracker.notices)
                yield Adapted(
                    self.calibration, warnings, seconds, stop.is_set(), tracker.learned, notices, job.settings
                )
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
        state = self._require_state()
        predictions = self._answer(state.adapter, self.tower, self.device, list(scans))
        pairs = zip(scans, predictions, strict=True)
        return [Finding.of(scan, prediction, state.calibration, state.adapter.key) for scan, prediction in pairs]

    def mark_normal(self, regions: Sequence[NormalRegion]) -> None:
        """Let regions join what was learned, in place of those that were marked before; nothing is trained again.

        The threshold stays: it says how new normal scans score. If this fails, the adapter in use stays.

        Args:
            regions: All parts of scans that were looked at and are normal; () takes all marks back.

        Raises:
            NotFittedError: Nothing was learned or loaded yet.
            FmclipError: The session is adapting, or the method has no memory of patches.
        """
        if not self._running.acquire(blocking=False):
            raise FmclipError("This session is adapting: wait, or press Stop before you mark anything as normal.")
        try:
            state = self._require_state()
            extended = self._extend(state.adapter, self.tower, self.device, tuple(regions), state.regions_from_file)
            self._install(replace(state, adapter=extended, regions=tuple(regions)))
        finally:
            self._running.release()

    @property
    def references(self) -> tuple[Scan, ...]:
        """The scans that the adapter in use was learned from; () for one from a file, which holds no pictures."""
        return self._require_state().references

    def explain(self, scan: Scan, x: float, y: float, *, count: int = 3) -> Explanation:
        """Say why a spot of a scan is as odd as it is: the reference patches it was compared with, and the maps.

        Args:
            scan: Any scan; its features are computed again.
            x: Column of the spot on the scan's pixels.
            y: Row of the spot.
            count: Reference patches for each view, each from another reference scan.

        Returns:
            See `fmclip.explain.Explanation`.

        Raises:
            NotFittedError: Nothing was learned or loaded yet.
            FmclipError: The method compares no patches, or the spot lies outside the scan.
        """
        state = self._require_state()
        where = state.adapter, self.tower, self.device
        marked = [region.scan for region in state.regions]
        return explain_spot(*where, scan, x, y, references=state.references, regions=marked, count=count)

    def attention(self, scan: Scan) -> np.ndarray:
        """Where the image tower looks: [H, W] in [0, 1] on the scan's pixels; raises as `explain.attention_map`."""
        return look_at(self._require_state().adapter, self.tower, self.device, scan, words=False)

    def grad_cam(self, scan: Scan) -> np.ndarray:
        """What speaks for "abnormal": [H, W] in [0, 1] on the scan's pixels; raises as `explain.words_map`."""
        return look_at(self._require_state().adapter, self.tower, self.device, scan, words=True)

    def save(self, path: Path | str, name: str = "") -> None:
        """Write the adapter to one safetensors file, with what the person calls it.

        Raises:
            NotFittedError: Nothing was learned or loaded yet.
        """
        from fmclip.checkpoint import save_adapter

        state = self._require_state()
        detector, window = state.adapter.build(self.tower, self.device), state.adapter.window
        save_adapter(Path(path), detector, state.calibration, window=window, name=name)

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
            memory = getattr(detector, "memory_", None)
            adapter = Adapter.of(detector, read_window(Path(path)))
            from_file = memory.regions if memory is not None else 0
            self._install(InUse(adapter, calibration, regions_from_file=from_file))
            self.warnings, self.unfinished = (), None
        finally:
            self._running.release()

    def close(self) -> None:
        """Stop, and let go of everything."""
        self.stop()
        with self._installing:
            self._closed = True
            former, self._state, self.unfinished = self._state, None, None
        if former is not None:
            forget(former.adapter)

    def _follow(self, events: Iterator[LearnEvent], job: Job, tracker: Tracker) -> Iterator[SessionEvent]:
        """Install each good state, and tell the rest in the session's words."""
        from fmclip.detectors import Notice, StageStarted, Step, SyntheticExamples, Training
        from fmclip.self_check import SelfCheck

        calibration = self.calibration
        for event in events:
            if self._closed:
                return
            if isinstance(event, Learned):
                calibration = event.adapter.calibration()
                regions = tuple(job.regions) if "memory.owner" in event.adapter.state else ()
                self._install(InUse(event.adapter, calibration, tuple(job.normals), regions))
                tracker.learned = event.stage
                self.unfinished = self.unfinished and replace(self.unfinished, is_answering=True)
            elif isinstance(event, Training):
                self.unfinished = Unfinished(job, event)
            elif isinstance(event, Mapped) and calibration is not None:
                found = dict(zip(event.digests, event.predictions, strict=True))
                mapped = [scan for scan in job.queries if scan.digest in found]
                findings = tuple(Finding.of(one, found[one.digest], calibration, self.adapter_key) for one in mapped)
                yield Preview(event.stage, findings)
            elif isinstance(event, Waiting):
                yield tracker.wait(event.place, event.count)
            elif isinstance(event, Notice):
                yield tracker.tell(event.text)
            elif isinstance(event, StageStarted):
                yield tracker.begin(event.stage, event.steps)
            elif isinstance(event, Step):
                if tracker.count(event.step, event.steps, event.loss):
                    yield tracker.progress()
            elif isinstance(event, (SyntheticExamples, SelfCheck)):
                yield event
        tracker.finish()

    def _install(self, state: InUse) -> None:
        """Make an adapter the one in use; a session that was closed meanwhile takes none."""
        with self._installing:
            if self._closed:
                return
            former, self._state = self._state, state
        if former is not None:
            forget(former.adapter)

    def _require_state(self) -> InUse:
        if self._state is None:
            raise NotFittedError("Nothing was learned yet: adapt to normal reference scans, or load an adapter, first.")
        return self._state
