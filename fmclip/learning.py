"""One fit as a stream of events, and answers from what it learned: the two calls that need the device.

Both take and give plain values with CPU tensors, so that a host that forks a process for each GPU call can run them.
"""

from __future__ import annotations

import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from fmclip.background import Ended, Put, StopSignal, Turns, Waiting, stream
from fmclip.errors import FmclipError, NotFittedError, Stopped, TowerError
from fmclip.job import Job, what_is_trained
from fmclip.pace import PACES
from fmclip.scans import Scan
from fmclip.shortage import fit_where_it_fits, predict_where_it_fits, readable_errors

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from fmclip.calibration import Calibration
    from fmclip.detectors import Detector, DetectorConfig, Event, Prediction, Ready
    from fmclip.explain import Explanation
    from fmclip.regions import NormalRegion
    from fmclip.self_check import SelfCheck
    from fmclip.towers import Tower

GRACE_SECONDS = 0.5
"""How long a stopped fit may take to end by itself; after that it is left to end on its own, and its result dropped."""
BATCH = 8
"""Scans that are answered at a time: bounds the memory, and how long a Stop has to wait."""
KEPT_DETECTORS = 4
"""Detectors kept built on the device; each holds its own merged weights, an `Adapter` only what was learned."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """What was learned, apart from the tower: small CPU tensors that can be kept for every visitor.

    Attributes:
        method: Name of the detector in `DETECTORS`.
        config: Its config.
        state: What its `state` returned.
        reference_scores: Leave-one-out score of each reference scan.
        window: Name of the window that the references were read with; None where there is none, or it is not known.
        key: Its own name, the same in every process.
    """

    method: str
    config: DetectorConfig
    state: dict[str, Tensor]
    reference_scores: tuple[float, ...]
    window: str | None = None
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def of(cls, detector: Detector, window: str | None = None) -> Adapter:
        """Copy what a fitted detector has learned, so that it may go on learning."""
        if detector.reference_scores_ is None:
            raise NotFittedError("Adapt to normal reference scans, or load an adapter, first.")
        state = {name: tensor.detach().cpu().clone() for name, tensor in detector.state().items()}
        return cls(detector.name, detector.config, state, tuple(detector.reference_scores_), window)

    def calibration(self) -> Calibration:
        """What the reference scores say about the score of another scan."""
        from fmclip.calibration import Calibration
        from fmclip.detectors import DETECTORS

        return Calibration.from_scores(self.reference_scores, DETECTORS[self.method].spread_prior)

    def __getstate__(self) -> dict[str, Any]:
        """Numbers instead of tensors: those would travel as handles of memory that ends with the process it is in."""
        return self.__dict__ | {"state": {name: tensor.numpy() for name, tensor in self.state.items()}}

    def __setstate__(self, values: dict[str, Any]) -> None:
        import torch

        state = {name: torch.from_numpy(array) for name, array in values["state"].items()}
        self.__dict__.update(values | {"state": state})

    def build(self, tower_name: str, device: str) -> Detector:
        """Make the detector again, around the shared tower."""
        from fmclip.detectors import DETECTORS

        detector = DETECTORS[self.method](load_tower(tower_name, device), self.config)
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
class Learned:
    """A good state was reached.

    Attributes:
        stage: Whose answer it is ("patch memory", "stage 2", "stage 3").
        adapter: The state.
    """

    stage: str
    adapter: Adapter


@dataclass(frozen=True, eq=False)
class Mapped:
    """Some queries were mapped with the last good state; none if there are no queries.

    Attributes:
        stage: Whose answer it is.
        digests: Of the scans that were mapped; a scan is another object in another process.
        predictions: What the state makes of them.
    """

    stage: str
    digests: tuple[str, ...]
    predictions: tuple[Prediction, ...]


LearnEvent: TypeAlias = "Waiting | Learned | Mapped | SelfCheck | Event"

_detectors: OrderedDict[str, Detector] = OrderedDict()
_keeping = threading.Lock()


def learn(job: Job, stop: StopSignal) -> Generator[LearnEvent, None, None]:
    """Fit a detector in a thread of its own and tell what happens; fits on one device take turns step by step.

    Args:
        job: What to learn from.
        stop: Ends the fit at its next event; the last `Learned` is then the result.

    Yields:
        The detector's events, `Ready` as `Learned` and `Mapped`; the last `Learned` is the result.

    Raises:
        FmclipError: The fit failed for a reason that the person can understand.
    """
    yield from stream(partial(_work, job), stop, GRACE_SECONDS)


def estimate_seconds(
    tower: str, device: str, method: str, preset: str, references: int, settings: Mapping[str, Any] | None = None
) -> float | None:
    """How long adapting would take here, by the steps that were measured so far; None while they are unknown."""
    from fmclip.settings import config_of

    config = config_of(method, preset, settings)
    return PACES.estimate(what_is_trained(tower, device, method, settings or {}), config.plan(references))


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
    with readable_errors():
        detector = _built(adapter, tower, device)
        chunks = [scans[start : start + BATCH] for start in range(0, len(scans), BATCH)]
        return [prediction for chunk in chunks for prediction in predict_where_it_fits(detector, chunk)]


def explain_spot(
    adapter: Adapter,
    tower: str,
    device: str,
    scan: Scan,
    x: float,
    y: float,
    *,
    references: Sequence[Scan],
    regions: Sequence[Scan],
    count: int,
) -> Explanation:
    """Say why a spot of a scan is as odd as it is, see `fmclip.explain.explain`."""
    from fmclip.explain import explain

    with readable_errors():
        detector = _built(adapter, tower, device)
        return explain(detector, scan, x, y, references=references, regions=regions, count=count)


def extend(adapter: Adapter, tower: str, device: str, regions: Sequence[NormalRegion], keep: int = 0) -> Adapter:
    """Let regions that are normal join what was learned, see `fmclip.regions.mark_normal`.

    Returns:
        Another adapter, with the same threshold; the one given stays as it is.
    """
    from fmclip.regions import mark_normal

    with readable_errors():
        detector = adapter.build(tower, device)
        mark_normal(detector, regions, keep=keep)
        return Adapter.of(detector, adapter.window)


def look_at(adapter: Adapter, tower: str, device: str, scan: Scan, *, words: bool) -> np.ndarray:
    """Say where the tower looks, or with `words` what speaks for "abnormal", see `fmclip.explain`: [H, W] in [0, 1]."""
    from fmclip.explain import attention_map, words_map

    with readable_errors():
        return (words_map if words else attention_map)(_built(adapter, tower, device), scan)


def forget(adapter: Adapter) -> None:
    """Free what `answer` keeps on the device for an adapter."""
    with _keeping:
        _detectors.pop(adapter.key, None)


def start_afresh() -> None:
    """In a forked process: forget detectors that lie where the tower lay, and threads whose turn it was over there."""
    global _keeping
    _keeping = threading.Lock()
    _detectors.clear()
    _turns.clear()


def load_tower(name: str, device: str) -> Tower:
    """Load the shared tower, or give the one that was loaded.

    Raises:
        TowerError: It cannot be loaded, whatever the reason.
    """
    from fmclip.towers import get_tower

    try:
        return get_tower(name, device=device)
    except FmclipError:
        raise
    except Exception as error:  # libraries raise anything, and the text may hold a path or an address
        raise TowerError(
            f"The tower '{name.rsplit('/', 1)[-1]}' could not be loaded ({type(error).__name__}). Check its name, the "
            "network, the space on the disk and the memory, then try again."
        ) from error


def _built(adapter: Adapter, tower: str, device: str) -> Detector:
    with _keeping:
        detector = _detectors.get(adapter.key)
    detector = detector or adapter.build(tower, device)  # takes long: nobody else should wait for it
    with _keeping:
        _detectors[adapter.key] = detector
        _detectors.move_to_end(adapter.key)
        while len(_detectors) > KEPT_DETECTORS:
            _detectors.popitem(last=False)
    return detector


_turns: dict[str, Turns] = {}


def _work(job: Job, put: Put, ended: Ended) -> None:
    """Body of the thread."""
    turns = _turns.setdefault(job.device, Turns())
    with readable_errors(), turns.taken(put, ended) as hand_over:
        tower = load_tower(job.tower, job.device)
        fit_where_it_fits(
            lambda tower: _fit(job, tower, put, ended, hand_over),
            tower,
            None if job.is_on_loan else lambda: load_tower(job.tower, "cpu"),
            put,
        )


def _fit(job: Job, tower: Tower, put: Put, ended: Ended, hand_over: Callable[[], None]) -> None:
    from fmclip.detectors import DETECTORS, Ready, StageStarted
    from fmclip.explain import HasPatchMemory
    from fmclip.regions import mark_normal
    from fmclip.self_check import HeldOut, check

    kind = DETECTORS[job.method]
    detector: Any = kind(tower, job.config())
    held: HeldOut | None = None
    last: Adapter | None = None
    are_marked = job.start is None or not job.regions  # a fresh fit marks them when its memory is ready

    def go_on() -> bool:
        if not ended.is_set():
            hand_over()
        return not ended.is_set()

    def settle(ready: Ready) -> None:
        """Give the state away first, so that no Stop can lose it; then map the queries, a few at a time."""
        nonlocal last, held
        if job.regions and isinstance(ready.detector, HasPatchMemory):
            mark_normal(ready.detector, job.regions)
        last = Adapter.of(ready.detector, job.window)
        put(Learned(ready.stage, last))
        queries = tuple(job.queries)
        if not queries:
            put(Mapped(ready.stage, (), ()))
        for start in range(0, len(queries), BATCH):
            if ended.is_set():
                return
            chunk = queries[start : start + BATCH]
            predictions = tuple(ready.detector.predict(chunk))
            put(Mapped(ready.stage, tuple(scan.digest for scan in chunk), predictions))
            hand_over()
        if go_on():
            held = held or HeldOut.make(job.normals, tower, job.scan_type, job.seed)
            found = check(ready.detector, held, ready.stage, go_on)
            if found is not None:
                held = held.first(found.anomalies + found.normals)
                put(found)

    def listen(event: Event) -> None:
        nonlocal are_marked
        if not are_marked and isinstance(event, StageStarted) and hasattr(detector, "memory_"):
            mark_normal(detector, job.regions)  # the training goes on against the memory that it began with
            are_marked = True
        if isinstance(event, Ready):
            settle(event)
        else:
            put(event)
        if ended.is_set():
            raise Stopped
        hand_over()

    examples: dict[str, Any] = {}
    if job.abnormals and kind.uses_abnormals != "never":
        examples = {"abnormals": list(job.abnormals), "abnormal_masks": list(job.abnormal_masks)}
    if job.start is not None:
        detector.resume(list(job.normals), job.start, on_event=listen)
    else:
        detector.fit(list(job.normals), **examples, on_event=listen)
    if not ended.is_set() and not Adapter.of(detector).same_as(last):
        settle(Ready("final", detector))
