"""Where one more score of the same kind should lie: the one-sided prediction interval of normal log-odds.

Where something is known about such scores (`SpreadPrior`), some of them may be no sound ones: a scan that is called
normal and is not, or a kind of which there is one only. Whether the highest are such is weighed, not decided (after Box
and Tiao, A Bayesian approach to some outlier problems, Biometrika 1968, who weigh every subset).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np

_MAX_DROP = 1.5  # log-odds further below the highest that surely is sound: a copy of a scan, not variation
_MIN_SPREAD = 0.03  # log-odds closer together than this differ by rounding only
_FAR = 1.5  # log-odds above the others from which any distance speaks alike for a score that is no sound one
_FEWEST = 4  # scores among which one can be odd
_OUTLIER_RATE = 0.01  # share of sound sets in which a score may be called an outlier, where nothing is known
_CLEAR = 0.7  # probability from which a score is called one, where something is
_HALVINGS = 60  # of the stretch in which a bound lies
_MAX_SCANS, _MAX_SPREAD = 1e6, 1e3  # of a prior: what is beyond was not learned from scans


@dataclass(frozen=True)
class SpreadPrior:
    """What is known about scores of a kind before any is seen: how far they spread, and how many are no sound ones.

    The spread has a scaled inverse chi-squared prior; unsound scores lie above the sound ones by an exponential
    distance, up to `_FAR`.

    Attributes:
        scans: How many further scans it counts for, in degrees of freedom.
        spread: Their standard deviation, in log-odds.
        contamination: Share of scores that are no sound ones, below a half; 0 where none is.
        shift: How far these lie above the mean of the others, in log-odds, on average.
    """

    scans: float
    spread: float
    contamination: float = 0.0
    shift: float = 0.5

    @property
    def is_sound(self) -> bool:
        """Whether it can be reckoned with: more than nothing, and no more than scores in (0, 1) can say."""
        spreads = all(0 < value <= _MAX_SPREAD for value in (self.spread, self.shift))
        return spreads and 0 < self.scans <= _MAX_SCANS and 0 <= self.contamination < 0.5


@dataclass(frozen=True)
class _Case:
    """The highest so many scores are no sound ones: what then is known about one more sound score.

    Attributes:
        weight: Probability of the case.
        mean: Location of the t distribution of its log-odds.
        scale: Its scale.
        freedom: Its degrees of freedom.
    """

    weight: float
    mean: float
    scale: float
    freedom: float


def prediction_bound(values: Sequence[float], rate: float, prior: SpreadPrior | None = None) -> float:
    """Bound in (0, 1) that one more sound score exceeds with probability `rate`, if their log-odds are normal.

    With a prior the spread is that of the posterior (Gelman et al., Bayesian Data Analysis, 3rd ed., section 3.3, with
    nothing known about the mean).
    """
    from scipy.special import expit, stdtr, stdtrit  # here, so that the page starts without it

    cases = _cases(values, prior)
    bounds = [case.mean + stdtrit(case.freedom, 1 - rate) * case.scale for case in cases]
    low, high = min(bounds), max(bounds)  # between them lies the bound of the mixture
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        above = sum(case.weight * stdtr(case.freedom, (case.mean - middle) / case.scale) for case in cases)
        low, high = (middle, high) if above > rate else (low, middle)
    return float(expit((low + high) / 2))


def exceedance(values: Sequence[float], scores: Sequence[float], prior: SpreadPrior | None = None) -> np.ndarray:
    """Probability [n] that one more sound score exceeds each of n: the rate at which the bound gives that score."""
    from scipy.special import stdtr

    log_odds = _log_odds(scores)
    tails = [case.weight * stdtr(case.freedom, (case.mean - log_odds) / case.scale) for case in _cases(values, prior)]
    return np.asarray(sum(tails))


def spread_of(scores: Sequence[float], prior: SpreadPrior | None = None) -> float:
    """Standard deviation of the log-odds of scores in (0, 1), at least two; with a prior that of the posterior."""
    return _spread(_log_odds(scores), prior)


def find_outliers(scores: Sequence[float], prior: SpreadPrior | None = None) -> set[int]:
    """Find scores that lie far above all others; at most a quarter of the set, and none among fewer than four.

    With a prior that knows of unsound scores, those stand out that are such with a probability of `_CLEAR`. Otherwise a
    score stands out if it lies above the prediction bound of the others, at a false alarm rate for the whole set: the
    highest is looked at first, and the next one against the rest, so that two do not hide each other.

    Args:
        scores: Leave-one-out scores of the reference scans.
        prior: What is known about such scores.

    Returns:
        Places (from 0) of the outliers.
    """
    if len(scores) < _FEWEST:
        return set()
    if is_weighed(prior):
        return {place for place, probability in enumerate(_unsound(scores, prior)) if probability > _CLEAR}
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    outliers: set[int] = set()
    for count in range(1, len(scores) // 4 + 1):
        rest = [scores[place] for place in order[count:]]
        if scores[order[count - 1]] > prediction_bound(rest, _OUTLIER_RATE / len(scores)):
            outliers = set(order[:count])
    return outliers


def counted_scores(scores: Sequence[float], prior: SpreadPrior | None) -> list[float]:
    """Scores that a bound is made of: all where unsound ones are weighed, else all but those that stand out."""
    outliers = set() if is_weighed(prior) else find_outliers(scores)
    return [score for place, score in enumerate(scores) if place not in outliers]


def is_weighed(prior: SpreadPrior | None, count: int = _FEWEST) -> TypeGuard[SpreadPrior]:
    """Whether it is weighed which of so many scores are sound, rather than decided."""
    return prior is not None and prior.contamination > 0 and count >= _FEWEST


def _unsound(values: Sequence[float], prior: SpreadPrior) -> np.ndarray:
    """Probability [n] of each score that it is no sound one; equal scores share theirs, also beyond a quarter."""
    order = np.argsort(-np.asarray(values, float), kind="stable")
    found = np.zeros(len(values))
    for count, case in enumerate(_cases(values, prior)):
        found[order[:count]] += case.weight
    _, kind = np.unique(values, return_inverse=True)
    return (np.bincount(kind, found) / np.bincount(kind))[kind]


def _cases(values: Sequence[float], prior: SpreadPrior | None) -> list[_Case]:
    """Weigh how many of the highest scores are no sound ones: none, one, ... up to a quarter of them.

    That so many are unsound and not the highest is left out as unlikely, which speaks a little for none; how far they
    lie above the others is measured from the mean of these. Of more unsound ones than a quarter (two among seven) none
    is found.
    """
    from scipy.special import gammaln

    ordered = np.sort(_log_odds(values))[::-1]
    most = len(ordered) // 4 if is_weighed(prior) else 0
    ordered = np.maximum(ordered, ordered[most] - _MAX_DROP)  # for all cases alike, or they could not be compared
    students = [_student(ordered[count:], prior) for count in range(most + 1)]
    if prior is None or most == 0:
        return [_Case(1.0, *students[0])]
    likelihoods = np.zeros(most + 1)
    for count, (mean, scale, freedom) in enumerate(students):
        left = len(ordered) - count
        squares = freedom * scale**2 / (1 + 1 / left)  # of prior and scores together
        likelihoods[count] = (  # of the sound ones, the mean integrated out; what all cases share is left out
            gammaln(freedom / 2) - (freedom * math.log(squares) + (left - 1) * math.log(math.pi) + math.log(left)) / 2
        )
        distances = np.clip(ordered[:count] - mean, 0.0, _FAR)
        odds = math.log(prior.contamination / (1 - prior.contamination))
        likelihoods[count] += count * (odds - math.log(prior.shift)) - distances.sum() / prior.shift
    weights = np.exp(likelihoods - likelihoods.max())
    return [_Case(float(weight), *student) for weight, student in zip(weights / weights.sum(), students, strict=True)]


def _student(log_odds: np.ndarray, prior: SpreadPrior | None) -> tuple[float, float, float]:
    """Location, scale and degrees of freedom of the t distribution of one more score's log-odds."""
    freedom = len(log_odds) - 1 + (0.0 if prior is None else prior.scans)
    return float(np.mean(log_odds)), _spread(log_odds, prior) * math.sqrt(1 + 1 / len(log_odds)), freedom


def _spread(log_odds: np.ndarray, prior: SpreadPrior | None) -> float:
    """Standard deviation of log-odds, with what was known about it before."""
    variance = max(float(np.std(log_odds, ddof=1)), _MIN_SPREAD) ** 2
    if prior is not None:
        own = len(log_odds) - 1
        variance = (own * variance + prior.scans * prior.spread**2) / (own + prior.scans)
    return math.sqrt(variance)


def _log_odds(values: Sequence[float]) -> np.ndarray:
    from scipy.special import logit

    return logit(np.clip(values, 1e-9, 1 - 1e-9))
