"""Answers as log-odds of "abnormal": from maps and image scores of any method to predictions on the source pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fmclip.detectors.base import Prediction
from fmclip.maps import resize_map
from fmclip.patch_grid import grid_of, patch_content
from fmclip.scans import Letterbox

MAX_SLOPE = 10.0  # of a few references that happen to be alike in one and not in the other


def map_offset(maps: Tensor, scores: Tensor, content: Tensor) -> float:
    """How much to add to maps so that the hottest place of a reference is, on average, as high as its image score.

    A method that scores the whole picture apart from its places has two scales; the threshold is drawn on one of them,
    and the map is read against that threshold.

    Args:
        maps: Log-odds [k, h, w] of the references.
        scores: Log-odds [k] of the references.
        content: [k, S, S] bool.
    """
    return float((scores - _hottest(maps, content)).mean())


def map_scale(maps: Tensor, scores: Tensor, content: Tensor) -> tuple[float, float]:
    """Slope and offset that give the hottest places of the references the mean and the spread of their image scores.

    As `map_offset`, for maps whose values differ less from scan to scan than the scores do: at an offset alone nothing
    of a scan would reach a threshold that its score is far above. One scale for all scans leaves their order alone.

    Args:
        maps: Log-odds [k, h, w] of the references.
        scores: Log-odds [k] of the references.
        content: [k, S, S] bool.
    """
    hottest = _hottest(maps, content)  # [k]
    slope = float((scores.std() / hottest.std().clamp_min(1e-6)).clamp(1 / MAX_SLOPE, MAX_SLOPE))
    return slope, float(scores.mean() - slope * hottest.mean())


def _hottest(maps: Tensor, content: Tensor) -> Tensor:
    """Highest value of each map [B, h, w] inside the scan: [B]."""
    return inside_only(maps, content).flatten(1).amax(dim=1)


def highest_mean(maps: Tensor, share: float) -> Tensor:
    """Mean of the highest places of each map, a maximum that hangs on no single one; of all that count if few do.

    Args:
        maps: Log-odds [B, h, w], -inf at places that do not count.
        share: Share of the h * w places.

    Returns:
        [B].
    """
    top = maps.flatten(1).topk(max(1, round(share * maps[0].numel())), dim=1).values  # [B, count]
    there = top.isfinite()
    return top.masked_fill(~there, 0).sum(dim=1) / there.sum(dim=1)


def inside_only(maps: Tensor, content: Tensor) -> Tensor:
    """Maps [B, h, w] with -inf on letterbox bars; content [B, S, S] bool."""
    return maps.masked_fill(~patch_content(content, grid_of(maps)), -torch.inf)


def log_odds_predictions(maps: Tensor, scores: Tensor, boxes: Sequence[Letterbox], size: int) -> list[Prediction]:
    """Bring maps back to the source pixels.

    Args:
        maps: Log-odds [B, h, w].
        scores: Log-odds [B].
        boxes: The way back for each scan.
        size: S, side of the letterboxed square.
    """
    squares, chances = square_answer(maps, scores, size)
    return [
        Prediction(map=box.restore(square), score=chance, parts={})
        for box, square, chance in zip(boxes, squares.cpu().numpy(), chances.tolist(), strict=True)
    ]


def square_answer(maps: Tensor, scores: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Log-odds [B, h, w] and [B] as maps [B, size, size] and scores [B] in [0, 1]; double, so that high ones differ."""
    return resize_map(maps, (size, size)).sigmoid().float(), scores.double().sigmoid()


def to_probability(scores: Tensor) -> tuple[float, ...]:
    """Log-odds [B] as plain numbers in [0, 1]; double, so that high scores stay apart."""
    return tuple(scores.double().sigmoid().tolist())
