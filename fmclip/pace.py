"""How long training takes on this machine, from the steps that were taken on it: none are guessed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TypeAlias

Plan: TypeAlias = Sequence[tuple[str, int]]
"""Stages to come with their steps, in order."""

_NEW_SHARE = 0.5  # of a new measurement beside the former ones: the machine may be busier by now


class Paces:
    """Seconds a step, by what is trained and by stage; shared by all visitors of a process."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, ...], float] = {}
        self._lock = threading.Lock()

    def note(self, what: tuple[str, ...], stage: str, seconds: float, steps: int) -> None:
        """Remember how long a stage took.

        Args:
            what: What is trained: tower, device, method.
            stage: The stage.
            seconds: How long it took.
            steps: How many steps it had, at least one.
        """
        with self._lock:
            former = self._seconds.get((*what, stage))
            pace = seconds / steps
            self._seconds[(*what, stage)] = pace if former is None else former + _NEW_SHARE * (pace - former)

    def estimate(self, what: tuple[str, ...], plan: Plan) -> float | None:
        """Seconds that a plan will take; None while one of its stages was never measured."""
        with self._lock:
            paces = [self._seconds.get((*what, stage)) for stage, _ in plan]
        if not plan or any(pace is None for pace in paces):
            return None
        return sum((pace or 0.0) * steps for pace, (_, steps) in zip(paces, plan, strict=True))


PACES = Paces()
"""Of this process."""
