"""Evidence maps (1 = as odd as the oddest patch of a reference scan) and the predictions made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fmclip.detectors.base import Prediction
from fmclip.maps import resize_map
from fmclip.prediction_interval import SpreadPrior
from fmclip.scans import Letterbox

TAIL = 0.03
"""Share of the places whose mean is the most that a map shows; chosen on the tuning half (benchmarks/NOTES.md)."""

SMOOTHING = 0.4
"""Sigma of the Gaussian over the evidence that makes the score, in patches; chosen on the tuning half."""
MAP_SMOOTHING = 0.8
"""The same over what is shown."""

SHARPNESS = 3.0  # how fast evidence moves from 0 to 1; a matter of display only, since the order never changes

MEMORY_SPREAD = SpreadPrior(scans=4, spread=0.12, contamination=0.1, shift=0.5)
"""How far reference scores that rest on a patch memory lie apart: 4 % of the evidence, `SHARPNESS` times that in
log-odds; and that one reference in ten is a scan that is not normal, or the only one of its kind. Chosen on the tuning
half of two scan types, whose references spread alike (benchmarks/NOTES.md)."""


def to_unit(evidence: Tensor) -> Tensor:
    """Bring evidence >= 0 to [0, 1], with 0.5 at evidence 1; strictly increasing, so ranks and AUROC stay the same."""
    power = evidence.clamp_min(0) ** SHARPNESS
    return power / (1 + power)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What speaks for an anomaly at each place of a scan, as two questions need it.

    Attributes:
        scored: [B, h, w], whether the scan deviates: all evidence, hardly smoothed; times what a method knows of the
            whole scan.
        placed: [B, h, w], where it does: evidence that places well, smoothed more.
    """

    scored: Tensor
    placed: Tensor

    def placed_with(self, other: Tensor, share: float) -> Evidence:
        """The same score, placed by so much of another map [B, h, w] beside its own."""
        return Evidence(self.scored, (1 - share) * self.placed + share * other)

    def maps(self) -> Tensor:
        """What is shown, [B, h, w]: `placed`, with `peaks` at its highest place.

        A smooth maximum that keeps its map: a scan's score lies above a threshold if a place of its map does.
        """
        highest = self.placed.flatten(1).amax(dim=1).clamp_min(1e-12)  # [B]
        return self.placed * (peaks(self.scored) / highest)[:, None, None]


def peaks(scored: Tensor) -> Tensor:
    """Mean of the `TAIL` oddest places of each scan, so that a score hangs on no single patch: [B, h, w] -> [B].

    Letterbox bars count as places, so that of a narrow scan a larger part is averaged over.
    """
    flat = scored.flatten(1)  # [B, h * w]
    return flat.topk(max(1, round(TAIL * flat.shape[1])), dim=1).values.mean(dim=1)


def image_scores(evidence: Tensor) -> Tensor:
    """Image score: maximum of the map (FusionMedCLIP Eq. 15): [B, h, w] -> [B]."""
    return evidence.flatten(1).amax(dim=1).double()  # double: large evidence must not all become 1


def square_answer(evidence: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Evidence [B, h, w] as maps [B, size, size] and scores [B], both in [0, 1]."""
    scores = to_unit(image_scores(evidence))
    squares = resize_map(to_unit(evidence), (size, size))
    highest = squares.flatten(1).amax(dim=1).clamp_min(1e-12)  # resizing has lowered it by a little
    return squares * (scores.to(squares) / highest)[:, None, None], scores


def predictions(
    parts: Mapping[str, Tensor], evidence: Tensor, boxes: Sequence[Letterbox], size: int
) -> list[Prediction]:
    """Bring evidence maps back to the source pixels.

    Args:
        parts: Evidence maps [B, h, w] that the answer was made of, by name.
        evidence: [B, h, w], the answer.
        boxes: The way back for each scan.
        size: S, side of the letterboxed square.
    """
    squares, scores = square_answer(evidence, size)
    full = [_with_peak(one, score) for one, score in zip(_restore(squares, boxes), scores.tolist(), strict=True)]
    restored = {name: _restore(square_answer(part, size)[0], boxes) for name, part in parts.items()}
    return [
        Prediction(map=full[i], score=float(score), parts={name: maps[i] for name, maps in restored.items()})
        for i, score in enumerate(scores.tolist())
    ]


def _restore(squares: Tensor, boxes: Sequence[Letterbox]) -> list[np.ndarray]:
    return [box.restore(square) for box, square in zip(boxes, squares.cpu().numpy(), strict=True)]


def _with_peak(one: np.ndarray, score: float) -> np.ndarray:
    """Bring the highest pixel of a map back to the score, after another resizing."""
    highest = float(one.max())
    return one * np.float32(score / highest) if highest > 0 else one
