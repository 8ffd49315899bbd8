"""Hosts that lend a GPU for single calls (`spaces.GPU`): each call runs in a process forked for it.

The page's own process then never touches CUDA: the tower, and adapters from files, are built on the CPU, and the forked
process moves its own copy of the tower. A fit that needs more memory than the GPU has begins again in the page's own
process, on the CPU and after the GPU was given back: the time that was asked for is a GPU's.

Only plain values go over and come back; errors come back as values too, because the host would replace their text. A
Stop reaches the other process through the file of `StopSignal`.

What the host asks for, and the tests hold: the functions that are lent stand at module level, so that the other process
finds them by name; the page's own process never starts CUDA, since a fork could not use it any more; graphs, rounded
weights and optimisers live and end in the forked process; what comes back is on the CPU, a `Training` among it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import gradio as gr

from fmclip.background import Ended, Put, StopSignal, stream
from fmclip.errors import DeviceShortage, FmclipError
from fmclip.job import Job
from fmclip.learning import Adapter, LearnEvent, answer, extend, learn, load_tower, start_afresh
from fmclip.scans import Scan
from fmclip.session import Session
from fmclip.shortage import ON_CPU

if TYPE_CHECKING:
    from fmclip.detectors import Prediction
    from fmclip.regions import NormalRegion

GRACE_SECONDS = 1.2
"""How long a stopped fit in another process may take to end; it gives itself less, and its last words travel."""
START_SECONDS = 20.0
"""Allowed for the fork, for moving the tower and for the memory of the references."""

_SYNTHETIC_SECONDS, _STAGE2_SECONDS, _STAGE3_SECONDS, _SCAN_SECONDS = 0.05, 0.02, 0.25, 0.2  # each, for a large tower
_STEP_SECONDS = {
    "synthetic": _SYNTHETIC_SECONDS,
    "features": _SYNTHETIC_SECONDS,
    **dict.fromkeys(("stage 3", "training", "scores"), _STAGE3_SECONDS),
}
"""Of stages by how they begin, as if each ran the tower; stage 2 reads features that were computed before."""
_TRAINS = ("stage", "training")
"""How stages begin that end in a good state."""
_NOT_LENT = (
    "The host did not lend its GPU, took it back, or your share of it is used up. What was learned until then is kept: "
    "try again in a few minutes."
)
log = logging.getLogger("fmclip.page")


def lends_gpu() -> bool:
    """Whether this host lends a GPU for single calls."""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def session_maker(tower: str, device: str) -> Callable[[], Session]:
    """Give a function that makes sessions for visitors.

    Args:
        tower: Name of the tower.
        device: "auto", "cpu", "cuda", ...; on a host that lends its GPU, where the forked process computes.
    """
    if not lends_gpu():
        return lambda: Session(tower, device)
    import spaces

    there = "cuda" if device == "auto" else device
    learn_call = partial(_learn_here, spaces.GPU(duration=learn_seconds)(_learn_there), there)
    answer_call = partial(_answer_here, spaces.GPU(duration=answer_seconds)(_answer_there), there)
    extend_call = partial(_extend_here, spaces.GPU(duration=extend_seconds)(_extend_there), there)
    return lambda: Session(tower, "cpu", learn_call=learn_call, answer_call=answer_call, extend_call=extend_call)


def learn_seconds(there: str, job: Job, stop: StopSignal | None = None) -> int:
    """Seconds of GPU time to ask for: the steps to come, and for each good state its queries and its self-check."""
    from fmclip.self_check import ANOMALIES, BUDGET_SECONDS, NORMALS

    plan = job.plan()
    states = (
        1 + sum(stage.startswith(_TRAINS) for stage, _ in plan) + any(stage.startswith("scores") for stage, _ in plan)
    )
    seconds = START_SECONDS + sum(_rate(stage) * steps for stage, steps in plan)
    seconds += _SYNTHETIC_SECONDS * (ANOMALIES + NORMALS) + _SCAN_SECONDS * len(job.regions) * states
    seconds += states * (BUDGET_SECONDS + _SCAN_SECONDS * (len(job.normals) + len(job.queries)))
    return math.ceil(seconds)


def _rate(stage: str) -> float:
    """Seconds of a step, for a large tower."""
    return next((seconds for start, seconds in _STEP_SECONDS.items() if stage.startswith(start)), _STAGE2_SECONDS)


def answer_seconds(there: str, adapter: Adapter, tower: str, scans: Sequence[Scan]) -> int:
    """Seconds of GPU time to ask for."""
    return math.ceil(START_SECONDS / 2 + _SCAN_SECONDS * len(scans))


def extend_seconds(there: str, adapter: Adapter, tower: str, regions: Sequence[NormalRegion], keep: int) -> int:
    """Seconds of GPU time to ask for."""
    return math.ceil(START_SECONDS / 2 + _SCAN_SECONDS * len(regions))


def _learn_here(lent: Callable[..., Any], there: str, job: Job, stop: StopSignal) -> Iterator[LearnEvent]:
    load_tower(job.tower, job.device)  # before the fork, so that the copy has it

    def pass_on(events: Generator[LearnEvent | FmclipError, None, None], put: Put, ended: Ended) -> None:
        with contextlib.closing(events):
            for event in events:
                if isinstance(event, FmclipError):
                    raise event
                put(event)
                if ended.is_set() and not stop.is_set():  # nobody listens; after a Stop the last words are waited for
                    return

    def work(put: Put, ended: Ended) -> None:
        from fmclip.detectors import Notice

        try:
            with _lending():
                pass_on(lent(there, replace(job, queries=tuple(job.queries), is_on_loan=True), stop), put, ended)
            return
        except DeviceShortage:
            put(Notice(ON_CPU))
        pass_on(learn(job, stop), put, ended)  # here, on the CPU: nothing is lent any more

    yield from stream(work, stop, GRACE_SECONDS)


def _answer_here(
    lent: Callable[..., Any], there: str, adapter: Adapter, tower: str, device: str, scans: Sequence[Scan]
) -> list[Prediction]:
    load_tower(tower, device)
    with _lending():
        found: list[Prediction] | FmclipError = lent(there, adapter, tower, list(scans))
    if isinstance(found, FmclipError):
        raise found
    return found


def _extend_here(
    lent: Callable[..., Any],
    there: str,
    adapter: Adapter,
    tower: str,
    device: str,
    regions: Sequence[NormalRegion],
    keep: int,
) -> Adapter:
    load_tower(tower, device)
    with _lending():
        extended: Adapter | FmclipError = lent(there, adapter, tower, regions, keep)
    if isinstance(extended, FmclipError):
        raise extended
    return extended


def _learn_there(there: str, job: Job, stop: StopSignal) -> Iterator[LearnEvent | FmclipError]:
    try:
        _settle_in(job.tower, there)
        yield from learn(job, stop)
    except Exception as error:
        yield _portable(error)


def _answer_there(there: str, adapter: Adapter, tower: str, scans: Sequence[Scan]) -> list[Prediction] | FmclipError:
    try:
        _settle_in(tower, there)
        return answer(adapter, tower, "cpu", scans)
    except Exception as error:
        return _portable(error)


def _extend_there(
    there: str, adapter: Adapter, tower: str, regions: Sequence[NormalRegion], keep: int
) -> Adapter | FmclipError:
    try:
        _settle_in(tower, there)
        return extend(adapter, tower, "cpu", regions, keep)
    except Exception as error:
        return _portable(error)


def _settle_in(tower: str, there: str) -> None:
    """Move this process's copy of the tower; threads that computed before the fork are not here and never answer."""
    import cv2
    import torch

    start_afresh()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    load_tower(tower, "cpu").to(there)


def _portable(error: Exception) -> FmclipError:
    if isinstance(error, FmclipError):
        return error
    log.error("unexpected %s on the lent GPU", type(error).__name__)
    return FmclipError(f"Something unexpected went wrong on the GPU ({type(error).__name__}). Try again.")


@contextlib.contextmanager
def _lending() -> Iterator[None]:
    try:
        yield
    except gr.Error as error:  # the host's own: no GPU free, quota used up, time over
        raise FmclipError(_NOT_LENT) from error
