"""95 % intervals and paired tests by bootstrap over scans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fmclip.evaluation.metrics import WeightedCurves

RESAMPLES = 1000
Interval = tuple[float, float]
"""Lower and upper bound of the 95 % interval."""


@dataclass(frozen=True)
class TestScores:
    """Scores of one run, without anything that names a scan.

    Attributes:
        case: [N] place of each test scan in its dataset; tells which scans two runs share.
        group: [N] number of its group; scans of a group are drawn together.
        is_abnormal: [N] answers.
        score: [N] scores.
        threshold: Calibrated threshold.
    """

    __test__ = False  # the name is no test of pytest's

    case: tuple[int, ...]
    group: tuple[int, ...]
    is_abnormal: tuple[bool, ...]
    score: tuple[float, ...]
    threshold: float


def bootstrap_weights(
    group: Sequence[int], is_abnormal: Sequence[bool], *, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Draw groups of scans with replacement, normal and abnormal ones apart, so that their numbers stay.

    Args:
        group: [N] group of each scan.
        is_abnormal: [N] answers. A group with both counts with the kind of its first scan.
        resamples: Number of draws R.
        seed: Seed of the draws.

    Returns:
        [R, N] how often each scan was drawn.
    """
    generator = np.random.default_rng(seed)
    _, first, member_of = np.unique(np.asarray(group), return_index=True, return_inverse=True)
    kind = np.asarray(is_abnormal, dtype=bool)[first]  # of each group
    drawn = np.zeros((resamples, len(first)))
    for label in (False, True):
        own = np.flatnonzero(kind == label)
        if len(own):
            drawn[:, own] = generator.multinomial(len(own), np.full(len(own), 1 / len(own)), size=resamples)
    return drawn[:, member_of]


def interval(values: np.ndarray) -> Interval:
    """Take the middle 95 % of bootstrapped values [R]; NaN among them are left out."""
    low, high = np.nanpercentile(values, (2.5, 97.5))
    return float(low), float(high)


def intervals(resampled: Mapping[str, np.ndarray]) -> dict[str, Interval]:
    """Take the interval of each metric."""
    return {name: interval(values) for name, values in resampled.items() if not np.isnan(values).all()}


def image_intervals(scores: TestScores, weights: np.ndarray) -> dict[str, Interval]:
    """Intervals of all image metrics of one run."""
    return intervals(_curves(scores, weights).metrics(scores.threshold))


@dataclass(frozen=True)
class Comparison:
    """AUROC of a method less that of another on the same scans.

    Attributes:
        difference: Mean over the seeds.
        interval: Its 95 % interval.
        p_value: Two-sided; chance of a difference as large if there were none.
    """

    difference: float
    interval: Interval
    p_value: float


def mean_auroc_interval(runs: Sequence[TestScores]) -> Interval:
    """Interval of the mean AUROC over the seeds; a scan that several seeds test is drawn for all of them at once."""
    return interval(_mean_auroc(runs, _joint_weights(runs)))


def compare(runs: Sequence[TestScores], others: Sequence[TestScores]) -> Comparison | None:
    """Paired bootstrap over scans of the difference in AUROC, averaged over the seeds.

    Args:
        runs: One of each seed.
        others: Of the method to compare with, the same seeds in the same order.

    Returns:
        The comparison; None if the two were not tested on the same scans.
    """
    if not runs or [run.case for run in runs] != [other.case for other in others]:
        return None
    weights = _joint_weights(runs)
    differences = _mean_auroc(runs, weights) - _mean_auroc(others, weights)
    ones = [np.ones((1, len(run.case))) for run in runs]
    difference = float(_mean_auroc(runs, ones)[0] - _mean_auroc(others, ones)[0])
    tail = min((differences <= 0).sum(), (differences >= 0).sum())
    p_value = min(1.0, 2 * (int(tail) + 1) / (len(differences) + 1))
    return Comparison(difference, interval(differences), p_value)


def mean_roc(runs: Sequence[TestScores], rates: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ROC averaged over the seeds: sensitivity, lower and upper bound, each [F], at false alarm rates [F]."""
    drawn = zip(runs, _joint_weights(runs), strict=True)
    band = np.mean([_curves(run, weights).roc(rates) for run, weights in drawn], axis=0)  # [R, F]
    middle = np.mean([_curves(run, np.ones((1, len(run.case)))).roc(rates)[0] for run in runs], axis=0)
    low, high = np.nanpercentile(band, (2.5, 97.5), axis=0)
    return middle, low, high


def _joint_weights(runs: Sequence[TestScores]) -> list[np.ndarray]:
    """Draw once from the scans that any run tests; return each run's share of the draw, [R, N] each."""
    known = {
        case: (group, answer)
        for run in runs
        for case, group, answer in zip(run.case, run.group, run.is_abnormal, strict=True)
    }
    place = {case: index for index, case in enumerate(known)}
    groups, answers = [group for group, _ in known.values()], [answer for _, answer in known.values()]
    weights = bootstrap_weights(groups, answers)
    return [weights[:, [place[case] for case in run.case]] for run in runs]


def _mean_auroc(runs: Sequence[TestScores], weights: Sequence[np.ndarray]) -> np.ndarray:
    drawn = zip(runs, weights, strict=True)
    return np.mean([_curves(run, own).metrics(run.threshold)["image_auroc"] for run, own in drawn], axis=0)


def _curves(run: TestScores, weights: np.ndarray) -> WeightedCurves:
    return WeightedCurves(np.asarray(run.score), np.asarray(run.is_abnormal, dtype=bool), weights)
