"""What a session tells: findings about scans, and how an adaptation goes on and ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from fmclip.progress import Progress
from fmclip.scans import Scan

if TYPE_CHECKING:
    from fmclip.calibration import Calibration, ReferenceWarning
    from fmclip.detectors import Prediction, SyntheticExamples
    from fmclip.self_check import SelfCheck


@dataclass(frozen=True, eq=False)
class Finding:
    """What a session says about one scan.

    Attributes:
        label: The scan's label ("scan 3").
        scan: The scan itself.
        map: [H, W] float32 in [0, 1] on the source pixels; higher is more unlike the references.
        parts: Further maps that the map was made of, by name.
        score: Score of the whole scan, on the scale of the map.
        threshold: A score above it deviates from the references.
        verdict: The comparison in words.
        rank: Place among the reference scans in words ("higher than all 16 reference scans").
        is_abnormal: Whether the score lies above the threshold.
        reference_scores: Leave-one-out score of each reference scan.
        adapter: Key of the adapter that says so; another one may have the same reference scores.
    """

    label: str
    scan: Scan
    map: np.ndarray
    parts: dict[str, np.ndarray]
    score: float
    threshold: float
    verdict: str
    rank: str
    is_abnormal: bool
    reference_scores: tuple[float, ...]
    adapter: str = ""

    @classmethod
    def of(cls, scan: Scan, prediction: Prediction, calibration: Calibration, adapter: str = "") -> Finding:
        """Compare a prediction of an adapter with its references."""
        return cls(
            label=scan.label,
            scan=scan,
            map=prediction.map,
            parts=prediction.parts,
            score=prediction.score,
            threshold=calibration.threshold,
            verdict=calibration.verdict(prediction.score),
            rank=calibration.describe_rank(prediction.score),
            is_abnormal=calibration.is_abnormal(prediction.score),
            reference_scores=tuple(calibration.reference_scores),
            adapter=adapter,
        )

    def at(self, threshold: float) -> Finding:
        """The same finding, judged by another threshold than the calibrated one."""
        from fmclip.calibration import DEVIATES, WITHIN

        high = self.score > threshold
        return replace(self, threshold=threshold, verdict=DEVIATES if high else WITHIN, is_abnormal=high)


@dataclass(frozen=True, eq=False)
class Preview:
    """Queries as the newest good state sees them, a few at a time; each state sees better than the one before.

    Attributes:
        stage: Whose answer it is ("patch memory", "stage 2", "stage 3").
        findings: Of the queries that were mapped just now; none if there are none.
    """

    stage: str
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Adapted:
    """Adapting is over, by itself or by a Stop.

    Attributes:
        calibration: Threshold and reference scores of the state that is kept.
        warnings: What is odd about the reference scans.
        seconds: How long it took.
        stopped: Whether the person ended it.
        stage: The stage whose state is kept; "" if none was reached, and the former adapter still answers.
        notices: What was done another way than asked for, in words.
        settings: Settings of the method that differed from the preset, by name.
    """

    calibration: Calibration | None
    warnings: tuple[ReferenceWarning, ...]
    seconds: float
    stopped: bool
    stage: str
    notices: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


SessionEvent: TypeAlias = "Progress | SyntheticExamples | SelfCheck | Preview | Adapted"
