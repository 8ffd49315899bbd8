"""How far an adaptation is: counted steps, losses and the time that is left."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

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
        message: One line for the person at the screen.
    """

    stage: str
    step: int
    steps: int
    loss_curve: tuple[tuple[str, float], ...]
    elapsed: float
    eta_seconds: float | None
    message: str


@dataclass
class Tracker:
    """Counts steps and time of one adaptation."""

    started: float
    learned: str = ""
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
