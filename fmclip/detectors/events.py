"""What a detector says while it learns: small typed values, so that a shell, a page and a test can all listen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from fmclip.detectors.base import Detector


@dataclass(frozen=True)
class StageStarted:
    """A stage of the fit begins.

    Attributes:
        stage: What happens, in words for the person at the screen ("stage 2: prompts and alignment adapters").
        steps: How many steps it will take; 0 if it is done in one go.
    """

    stage: str
    steps: int


@dataclass(frozen=True)
class Step:
    """One optimiser step is done.

    Attributes:
        stage: Same text as in `StageStarted`.
        step: Steps done in this stage, from 1.
        steps: Steps of this stage in all.
        loss: Training loss of the step.
    """

    stage: str
    step: int
    steps: int
    loss: float


@dataclass(frozen=True, eq=False)
class SyntheticExample:
    """A synthetic anomaly that the detector learns from, to be shown beside the heatmaps.

    Attributes:
        image: [S, S, 3] float32 in [0, 1].
        mask: [S, S] bool.
        map: [S, S] float32 in [0, 1], what the detector makes of it by now; None before it has looked.
        description: Kind and size in words.
        record: JSON-able; with the references in the same order it replays the picture.
        strength: How strong it is, in words; "" for an unchanged scan.
    """

    image: np.ndarray
    mask: np.ndarray
    map: np.ndarray | None
    description: str
    record: dict
    strength: str = ""


@dataclass(frozen=True)
class SyntheticExamples:
    """The anomalies that are learned from."""

    examples: tuple[SyntheticExample, ...]


@dataclass(frozen=True, eq=False)
class Ready:
    """The detector answers queries from here on; each one is better than the one before.

    Attributes:
        stage: Whose answer it is ("patch memory", "stage 2", "stage 3").
        detector: The detector itself, in a state that can be used until the handler returns.
    """

    stage: str
    detector: Detector


@dataclass(frozen=True, eq=False)
class Training:
    """Where a training stands: enough to go on, with the same references and seed, as if it had never stopped.

    Attributes:
        stage: The stage that is being trained.
        step: Steps done in it.
        steps: Steps of it in all.
        is_last: Whether no stage follows.
        weights: What is trained, by name, on the CPU.
        optimiser: The optimiser's own state.
        generator: State of the random draws [bytes] uint8.
        order: Rows of the pool that were shuffled already and wait for their turn [n].
    """

    stage: str
    step: int
    steps: int
    is_last: bool
    weights: dict[str, Tensor]
    optimiser: dict[str, Any]
    generator: Tensor
    order: Tensor

    @property
    def is_over(self) -> bool:
        """Whether only a longer training could go on from here."""
        return self.is_last and self.step >= self.steps

    def __getstate__(self) -> dict[str, Any]:
        """Numbers instead of tensors, which would travel as handles of memory that ends with its process."""
        return _each(self.__dict__, Tensor, lambda tensor: tensor.numpy())

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(_each(values, np.ndarray, torch.from_numpy))


def _each(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Change all values of a kind in nested dictionaries and lists."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: _each(one, kind, change) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_each(one, kind, change) for one in value)
    return value


@dataclass(frozen=True)
class Notice:
    """Something the person should know: what was done another way than asked for, and why.

    Attributes:
        text: In plain words.
    """

    text: str


Event: TypeAlias = Notice | StageStarted | Step | SyntheticExamples | Ready | Training
OnEvent: TypeAlias = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Listen to nothing."""
