"""Training that runs out of memory goes on with less of it, step by step, and says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from fmclip.acceleration import Acceleration
from fmclip.detectors.events import Event, Notice, OnEvent, Training
from fmclip.errors import is_out_of_memory
from fmclip.process import free_memory

T = TypeVar("T")
GAVE_UP = (
    "The memory did not suffice for stage 3, however small its steps were: the result of stage 2 is kept. Fewer "
    "reference scans, or a smaller tower, may get further."
)
NOT_RESUMED = (
    "The memory did not suffice to go on with stage 3, however small its steps were: nothing was resumed, and what was "
    "learned before stays as it is. Wait for other visitors to finish and resume again, or resume on the CPU."
)


def train_within_memory(
    train: Callable[[Acceleration, Training | None, OnEvent], T],
    acceleration: Acceleration,
    batch_size: int,
    generator: torch.Generator,
    on_event: OnEvent,
    start: Training | None = None,
) -> T | None:
    """Train; where the memory runs out, go on from the last kept state in smaller parts, then with checkpointing.

    Args:
        train: Gets how to use the device, where to go on, and who listens. It is called again after a shortage, maybe
            from the beginning, so that it makes what it trains anew each time, by draws of `generator`.
        acceleration: How to begin.
        batch_size: Scans of a step.
        generator: Of the training; one that begins anew begins with the same draws.
        on_event: Hears of everything, and in a `Notice` of each step down.
        start: Where a former training stood.

    Returns:
        What `train` returned; None if even the smallest steps did not fit.
    """
    last = start
    draws = generator.get_state()

    def listen(event: Event) -> None:
        nonlocal last
        if isinstance(event, Training):
            last = event
        on_event(event)

    while True:
        try:
            return train(acceleration, last, listen)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            smaller = acceleration.smaller(batch_size)
        free_memory()  # outside the handler: until then the error holds on to the tensors of the failed step
        if smaller is None:
            return None
        acceleration = smaller
        if last is None:
            generator.set_state(draws)
        on_event(
            Notice(f"The memory ran out: stage 3 goes on with less of it ({acceleration.describe()}), and slower.")
        )
