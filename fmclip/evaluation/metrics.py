"""How well scores tell abnormal scans from normal ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SPECIFICITY = 0.95
"""Specificity at which the sensitivity is read off."""


@dataclass(frozen=True)
class ImageMetrics:
    """Metrics over scans, each in [0, 1]; the first four look at the ranking of the scores only.

    Attributes:
        image_auroc: Chance that an abnormal scan scores above a normal one.
        average_precision: Mean precision over the abnormal scans, from the highest score down.
        f1_max: Best F1 over all thresholds; the threshold is chosen on the test labels.
        sensitivity_at_95_specificity: Share of abnormal scans found at the threshold that clears 95 % of the normal
            ones; the threshold is chosen on the test labels.
        sensitivity: Share of abnormal scans above the calibrated threshold, which no test label went into.
        specificity: Share of normal scans not above it.
        f1: F1 at it.
    """

    image_auroc: float
    average_precision: float
    f1_max: float
    sensitivity_at_95_specificity: float
    sensitivity: float
    specificity: float
    f1: float


def image_metrics(scores: Sequence[float], is_abnormal: Sequence[bool], threshold: float) -> ImageMetrics:
    """Measure scores against answers.

    Args:
        scores: [N], higher is more abnormal.
        is_abnormal: [N] answers, both kinds among them.
        threshold: Calibrated threshold; a scan above it is called abnormal.

    Returns:
        The metrics.
    """
    from sklearn.metrics import (  # a second to import, which `adapt` and `predict` need not wait for
        average_precision_score,
        f1_score,
        precision_recall_curve,
        roc_auc_score,
        roc_curve,
    )

    values, answers = np.asarray(scores, dtype=np.float64), np.asarray(is_abnormal, dtype=bool)
    called = values > threshold
    precision, recall, _ = precision_recall_curve(answers, values)
    false_alarms, found, _ = roc_curve(answers, values, drop_intermediate=False)
    return ImageMetrics(
        image_auroc=float(roc_auc_score(answers, values)),
        average_precision=float(average_precision_score(answers, values)),
        f1_max=float((2 * precision * recall / np.maximum(precision + recall, 1e-12)).max()),
        sensitivity_at_95_specificity=float(found[false_alarms <= 1 - SPECIFICITY + 1e-12].max()),
        sensitivity=float(called[answers].mean()),
        specificity=float((~called[~answers]).mean()),
        f1=float(f1_score(answers, called, zero_division=0.0)),
    )


class WeightedCurves:
    """The same metrics for many weightings of the scans at once, as a bootstrap needs them.

    Args:
        scores: [N].
        is_abnormal: [N].
        weights: [R, N], each row a weighting of the scans.
    """

    def __init__(self, scores: np.ndarray, is_abnormal: np.ndarray, weights: np.ndarray) -> None:
        order = np.argsort(-scores, kind="stable")
        scores, is_abnormal, weights = scores[order], is_abnormal[order], weights[:, order]
        last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))  # ends of runs of equal scores
        self._found = np.cumsum(weights * is_abnormal, axis=1)[:, last]  # [R, T] abnormal weight at or above a score
        self._alarms = np.cumsum(weights * ~is_abnormal, axis=1)[:, last]  # [R, T] normal weight
        self._thresholds = scores[last]  # [T], descending

    def metrics(self, threshold: float) -> dict[str, np.ndarray]:
        """All fields of `ImageMetrics`, each [R]; NaN where a row has weight on scans of one kind only."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._metrics(threshold)

    def _metrics(self, threshold: float) -> dict[str, np.ndarray]:
        found, alarms = self._found, self._alarms
        n_abnormal, n_normal = found[:, -1:], alarms[:, -1:]  # [R, 1]
        steps = np.diff(found, axis=1, prepend=0.0)  # [R, T]
        alarm_steps = np.diff(alarms, axis=1, prepend=0.0)
        precision = found / np.maximum(found + alarms, 1e-12)
        f1 = 2 * found / (found + alarms + n_abnormal)
        clears = alarms <= (1 - SPECIFICITY) * n_normal + 1e-9
        above = int((self._thresholds > threshold).sum())
        called = found[:, above - 1] if above else np.zeros(len(found))
        false = alarms[:, above - 1] if above else np.zeros(len(found))
        return {
            "image_auroc": ((found - steps / 2) * alarm_steps).sum(axis=1) / (n_abnormal * n_normal)[:, 0],
            "average_precision": (steps * precision).sum(axis=1) / n_abnormal[:, 0],
            "f1_max": f1.max(axis=1),
            "sensitivity_at_95_specificity": np.where(clears, found, 0.0).max(axis=1) / n_abnormal[:, 0],
            "sensitivity": called / n_abnormal[:, 0],
            "specificity": 1 - false / n_normal[:, 0],
            "f1": 2 * called / (called + false + n_abnormal[:, 0]),
        }

    def roc(self, false_alarm_rates: np.ndarray) -> np.ndarray:
        """Sensitivity [R, F] at false alarm rates [F], interpolated; NaN for rows with scans of one kind only."""
        sensitivities = np.full((len(self._found), len(false_alarm_rates)), np.nan)
        for row, (alarms, found) in enumerate(zip(self._alarms, self._found, strict=True)):
            if alarms[-1] and found[-1]:
                x, y = np.append(0.0, alarms / alarms[-1]), np.append(0.0, found / found[-1])
                sensitivities[row] = np.interp(false_alarm_rates, x, y)
        return sensitivities
