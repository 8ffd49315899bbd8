"""Evidence maps (1 = as odd as the oddest patch of a reference scan) and the predictions made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fmclip.detectors.base import Prediction
from fmclip.maps import resize_map
from fmclip.scans import Letterbox

TAIL = 0.03
"""Share of the places whose mean is the most that a map shows; chosen on the tuning half (benchmarks/NOTES.md)."""

SHARPNESS = 3.0  # how fast evidence moves from 0 to 1; a matter of display only, since the order never changes


def to_unit(evidence: Tensor) -> Tensor:
    """Bring evidence >= 0 to [0, 1], with 0.5 at evidence 1; strictly increasing, so ranks and AUROC stay the same."""
    power = evidence.clamp_min(0) ** SHARPNESS
    return power / (1 + power)


def cut_peaks(evidence: Tensor) -> Tensor:
    """Cut each map at the mean of its oddest places, so that the score, its maximum, hangs on no single patch.

    A smooth maximum that keeps its map: whatever lies above a threshold in the map does so in the score too. Letterbox
    bars count as places, so that of a narrow scan a larger part is averaged over.

    Args:
        evidence: [B, h, w].

    Returns:
        [B, h, w], none above the mean of the `TAIL` oddest places of its map.
    """
    flat = evidence.flatten(1)  # [B, h * w]
    most = flat.topk(max(1, round(TAIL * flat.shape[1])), dim=1).values.mean(dim=1)  # [B]
    return torch.minimum(evidence, most[:, None, None])


def image_scores(evidence: Tensor) -> Tensor:
    """Image score: maximum of the map (FusionMedCLIP Eq. 15): [B, h, w] -> [B]."""
    return evidence.flatten(1).amax(dim=1).double()  # double: large evidence must not all become 1


def square_answer(evidence: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Evidence [B, h, w] as maps [B, size, size] and scores [B], both in [0, 1]."""
    return resize_map(to_unit(evidence), (size, size)), to_unit(image_scores(evidence))


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
    full = _restore(squares, boxes)
    restored = {name: _restore(square_answer(part, size)[0], boxes) for name, part in parts.items()}
    return [
        Prediction(map=full[i], score=float(score), parts={name: maps[i] for name, maps in restored.items()})
        for i, score in enumerate(scores.tolist())
    ]


def _restore(squares: Tensor, boxes: Sequence[Letterbox]) -> list[np.ndarray]:
    return [box.restore(square) for box, square in zip(boxes, squares.cpu().numpy(), strict=True)]
