"""One fit as a stream of events, and answers from what it learned: the two calls that need the device.

Both take and give plain values with CPU tensors, so that a host that forks a process for each GPU call can run them.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from fmclip.errors import FmclipError, NotFittedError, Stopped
from fmclip.scans import Scan

if TYPE_CHECKING:
    from torch import Tensor

    from fmclip.detectors import Detector, DetectorConfig, Event, Prediction, Ready

GRACE_SECONDS = 0.5
"""How long a stopped fit may take to end by itself; after that it is left to end on its own, and its result dropped."""
BATCH = 8
"""Scans that are answered at a time: bounds the memory, and how long a Stop has to wait."""
KEPT_DETECTORS = 4
"""Detectors kept built on the device; each holds its own merged weights, an `Adapter` only what was learned."""

_POLL_SECONDS = 0.05


@dataclass(frozen=True, eq=False)
class Adapter:
    """What was learned, apart from the tower: small CPU tensors that can be kept for every visitor.

    Attributes:
        method: Name of the detector in `DETECTORS`.
        config: Its config.
        state: What its `state` returned.
        reference_scores: Leave-one-out score of each reference scan.
    """

    method: str
    config: DetectorConfig
    state: dict[str, Tensor]
    reference_scores: tuple[float, ...]

    @classmethod
    def of(cls, detector: Detector) -> Adapter:
        """Copy what a fitted detector has learned, so that it may go on learning."""
        if detector.reference_scores_ is None:
            raise NotFittedError("Adapt to normal reference scans, or load an adapter, first.")
        state = {name: tensor.detach().cpu().clone() for name, tensor in detector.state().items()}
        return cls(detector.name, detector.config, state, tuple(detector.reference_scores_))

    def build(self, tower_name: str, device: str) -> Detector:
        """Make the detector again, around the shared tower."""
        from fmclip.detectors import DETECTORS
        from fmclip.towers import get_tower

        detector = DETECTORS[self.method](get_tower(tower_name, device=device), self.config)
        detector.reference_scores_ = self.reference_scores  # first: `load_state` reads k from it
        detector.load_state(self.state)
        return detector

    def same_as(self, other: Adapter | None) -> bool:
        """Whether the other one holds the same numbers."""
        import torch

        return (
            other is not None
            and self.reference_scores == other.reference_scores
            and self.state.keys() == other.state.keys()
            and all(torch.equal(tensor, other.state[name]) for name, tensor in self.state.items())
        )


@dataclass(frozen=True, eq=False)
class Job:
    """What to learn from, and where.

    Attributes:
        tower: Name of the tower.
        device: "cpu", "cuda", ...
        method: Name of the detector.
        preset: "fast" or "full".
        scan_type: What the scans show.
        seed: Start of all random draws.
        normals: k normal scans.
        queries: Scans to be mapped at every good state; may grow while the fit goes on.
    """

    tower: str
    device: str
    method: str
    preset: str
    scan_type: str
    seed: int
    normals: Sequence[Scan]
    queries: Sequence[Scan] = ()


class StopSignal:
    """Set by the visitor, read by the fit. In another process it stays unset: there the stream is closed instead."""

    def __init__(self) -> None:
        self._at: float | None = None

    def set(self) -> None:
        """Ask the fit to end."""
        self._at = self._at or time.monotonic()

    def is_set(self) -> bool:
        """Whether the fit should end."""
        return self._at is not None

    def is_overdue(self) -> bool:
        """Whether the fit should have ended `GRACE_SECONDS` ago."""
        return self._at is not None and time.monotonic() - self._at > GRACE_SECONDS


class _Ended:
    """Whether a fit should end: the visitor pressed Stop, or nobody listens any more."""

    def __init__(self, stop: StopSignal) -> None:
        self._stop = stop
        self._left = False

    def set(self) -> None:
        self._left = True

    def is_set(self) -> bool:
        return self._left or self._stop.is_set()


@dataclass(frozen=True)
class Waiting:
    """Somebody else's fit is running on the device; this one has to wait."""


@dataclass(frozen=True, eq=False)
class Learned:
    """A good state was reached.

    Attributes:
        stage: Whose answer it is ("patch memory", "stage 2", "stage 3").
        adapter: The state.
        queries: The scans that were mapped.
        predictions: What the state makes of them.
    """

    stage: str
    adapter: Adapter
    queries: tuple[Scan, ...]
    predictions: tuple[Prediction, ...]


LearnEvent: TypeAlias = "Waiting | Learned | Event"

_turns: dict[str, threading.Lock] = {}
_detectors: OrderedDict[Adapter, Detector] = OrderedDict()
_building = threading.Lock()


def learn(job: Job, stop: StopSignal) -> Iterator[LearnEvent]:
    """Fit a detector in a thread of its own and tell what happens; fits on one device take turns.

    Args:
        job: What to learn from.
        stop: Ends the fit at its next event; the last `Learned` is then the result.

    Yields:
        The detector's events, `Ready` as `Learned`; the last `Learned` is the result.

    Raises:
        FmclipError: The fit failed for a reason that the person can understand.
    """
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    ended = _Ended(stop)
    threading.Thread(target=_work, args=(job, ended, events), name="fit", daemon=True).start()
    try:
        while not stop.is_overdue():
            with contextlib.suppress(queue.Empty):
                event = events.get(timeout=_POLL_SECONDS)
                if event is None:
                    return
                if isinstance(event, BaseException):
                    raise event
                yield event
    finally:
        ended.set()  # also when the caller closes the stream: nobody is listening any more


def answer(adapter: Adapter, tower: str, device: str, scans: Sequence[Scan]) -> list[Prediction]:
    """Map scans with what was learned.

    Args:
        adapter: What was learned.
        tower: Name of the tower that it was learned with.
        device: "cpu", "cuda", ...
        scans: Any number of scans.

    Returns:
        One prediction for each scan.
    """
    with _readable_errors():
        detector = _built(adapter, tower, device)
        chunks = [scans[start : start + BATCH] for start in range(0, len(scans), BATCH)]
        return [prediction for chunk in chunks for prediction in detector.predict(chunk)]


def forget(adapter: Adapter) -> None:
    """Free what `answer` keeps on the device for an adapter."""
    with _building:
        _detectors.pop(adapter, None)


def _built(adapter: Adapter, tower: str, device: str) -> Detector:
    with _building:
        if adapter not in _detectors:
            _detectors[adapter] = adapter.build(tower, device)
        _detectors.move_to_end(adapter)
        while len(_detectors) > KEPT_DETECTORS:
            _detectors.popitem(last=False)
        return _detectors[adapter]


def _work(job: Job, ended: _Ended, events: queue.SimpleQueue[Any]) -> None:
    """Body of the thread: everything goes into the queue, an exception too; None is the end."""
    try:
        with _readable_errors(), _turn(job.device, ended, events):
            _fit(job, ended, events)
        events.put(None)
    except Stopped:
        events.put(None)
    except Exception as error:  # raised again by `learn`, in the thread that listens
        events.put(error)


def _fit(job: Job, ended: _Ended, events: queue.SimpleQueue[Any]) -> None:
    from fmclip.detectors import DETECTORS, Ready
    from fmclip.towers import get_tower

    kind = DETECTORS[job.method]
    config_class: Any = kind.config_class
    config = config_class.preset(job.preset, scan_type=job.scan_type, seed=job.seed)
    detector = kind(get_tower(job.tower, device=job.device), config)
    last: Learned | None = None

    def listen(event: Event) -> None:
        nonlocal last
        if isinstance(event, Ready):
            last = _learned(event, job, ended)
            events.put(last)
        else:
            events.put(event)
        if ended.is_set():
            raise Stopped

    detector.fit(list(job.normals), on_event=listen)
    if ended.is_set():
        return
    final = Adapter.of(detector)
    if last is None or not final.same_as(last.adapter):
        events.put(_learned(Ready("final", detector), job, ended))


def _learned(ready: Ready, job: Job, ended: _Ended) -> Learned:
    """Copy a good state and map the queries with it; a Stop ends the mapping, the state is kept."""
    queries = tuple(job.queries)
    predictions: list[Prediction] = []
    for start in range(0, len(queries), BATCH):
        if ended.is_set():
            break
        predictions += ready.detector.predict(queries[start : start + BATCH])
    return Learned(ready.stage, Adapter.of(ready.detector), queries[: len(predictions)], tuple(predictions))


@contextlib.contextmanager
def _turn(device: str, ended: _Ended, events: queue.SimpleQueue[Any]) -> Iterator[None]:
    """Wait until no other fit runs on the device."""
    turn = _turns.setdefault(device, threading.Lock())
    if not turn.acquire(blocking=False):
        events.put(Waiting())
        while not turn.acquire(timeout=_POLL_SECONDS):
            if ended.is_set():
                raise Stopped
    try:
        yield
    finally:
        turn.release()


@contextlib.contextmanager
def _readable_errors() -> Iterator[None]:
    """Turn a device that is out of memory into an error that says what to do."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise FmclipError(
            "The graphics card ran out of memory. Wait for other visitors to finish, use fewer scans or the preset "
            "'fast', or start the page on the CPU."
        ) from error
