"""How far an adaptation is: counted steps, losses and the time that is left."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from fmclip.pace import PACES, Plan

PROGRESS_SECONDS = 0.25
"""Steps are told at most this often."""


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
        left_seconds: Seconds until the end of all stages; None while one of them was never measured on this machine.
        message: One line for the person at the screen.
    """

    stage: str
    step: int
    steps: int
    loss_curve: tuple[tuple[str, float], ...]
    elapsed: float
    eta_seconds: float | None
    message: str
    left_seconds: float | None = None


@dataclass
class Tracker:
    """Counts steps and time of one adaptation.

    Attributes:
        started: When it began.
        what: What is trained, for `PACES`: tower, device, method.
        plan: Stages to come with their steps.
        notices: What was done another way than asked for.
        others: Trainings of other visitors that it takes turns with.
    """

    started: float
    what: tuple[str, ...] = ()
    plan: Plan = ()
    learned: str = ""
    stage: str = "preparing"
    step: int = 0
    steps: int = 0
    losses: list[tuple[str, float]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    begun: float = 0.0
    first_step: int = 0
    first_done: float = 0.0
    last_done: float = 0.0
    told: float = -math.inf
    others: int = 0

    def begin(self, stage: str, steps: int) -> Progress:
        """A stage starts."""
        self.finish()
        self.stage, self.step, self.steps, self.begun = stage, 0, steps, time.monotonic()
        return self.progress()

    def finish(self) -> None:
        """A stage is over: its pace is worth remembering."""
        taken = self.step - self.first_step
        if taken > 0:
            PACES.note(self.what, self.stage, self.last_done - self.first_done, taken)
        elif self.step:  # told in one go
            PACES.note(self.what, self.stage, self.last_done - self.begun, self.step)
        self.step = 0

    def count(self, step: int, steps: int, loss: float) -> bool:
        """A step is done; tells whether it is time to say so."""
        self.last_done = time.monotonic()
        if self.step == 0:  # what came before the first step, such as caching features, is no measure for the rest
            self.first_step, self.first_done = step, self.last_done
        self.step, self.steps = step, steps
        if math.isfinite(loss):  # a stage that trains nothing has no loss
            self.losses.append((self.stage, loss))
        return step == steps or time.monotonic() - self.told >= PROGRESS_SECONDS

    def tell(self, notice: str) -> Progress:
        """Say something that is to be read at the end too."""
        self.notices.append(notice)
        return self.progress(notice)

    def wait(self, place: int, count: int) -> Progress:
        """Say where it is in the line of trainings on this machine, see `fmclip.background.Waiting`."""
        self.others = count - 1
        return self.progress(f"waiting in the queue: place {place} of {count} on this machine" if place else "")

    def progress(self, message: str = "") -> Progress:
        """Say how far it is."""
        self.told = time.monotonic()
        eta = None
        if self.first_step < self.step:
            eta = (self.told - self.first_done) / (self.step - self.first_step) * (self.steps - self.step)
        total = self._left(eta)
        done = f", step {self.step} of {self.steps}" if self.step else ""
        left = f", about {math.ceil(eta)} s left" if eta else ""
        if total:
            left = f", about {math.ceil(total)} s left in all"
        return Progress(
            self.stage,
            self.step,
            self.steps,
            tuple(self.losses),
            self.told - self.started,
            eta,
            message or f"{self.stage}{done}{left}{self._shared()}",
            total,
        )

    def _shared(self) -> str:
        many = "another training" if self.others == 1 else f"{self.others} other trainings"
        return f", taking turns with {many} on this machine" if self.others else ""

    def _left(self, eta: float | None) -> float | None:
        """Seconds until the end of all stages, with what was measured here before."""
        stages = [stage for stage, _ in self.plan]
        if self.stage not in stages:
            return PACES.estimate(self.what, self.plan) if not self.learned else None
        here = stages.index(self.stage)
        if eta is None:
            eta = PACES.estimate(self.what, self.plan[here : here + 1])
        later = PACES.estimate(self.what, self.plan[here + 1 :]) if self.plan[here + 1 :] else 0.0
        return eta + later if eta is not None and later is not None else None
