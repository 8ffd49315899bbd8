"""What a detector says while it learns: small typed values, so that a shell, a page and a test can all listen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

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
    """

    image: np.ndarray
    mask: np.ndarray
    map: np.ndarray | None
    description: str
    record: dict


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


Event: TypeAlias = StageStarted | Step | SyntheticExamples | Ready
OnEvent: TypeAlias = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Listen to nothing."""
