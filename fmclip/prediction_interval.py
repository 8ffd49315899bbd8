"""Where one more score of the same kind should lie: the one-sided prediction interval of normal log-odds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_MAX_DROP = 1.5  # log-odds further below the highest reference come from a copy of a scan, not from variation
_MIN_SPREAD = 0.03  # log-odds closer together than this differ by rounding only
_MAX_SCANS, _MAX_SPREAD = 1e6, 1e3  # of a prior: what is beyond was not learned from scans


@dataclass(frozen=True)
class SpreadPrior:
    """What is known about the spread of scores of a kind before any is seen (a scaled inverse chi-squared prior).

    Attributes:
        scans: How many further scans it counts for, in degrees of freedom.
        spread: Their standard deviation, in log-odds.
    """

    scans: float
    spread: float

    @property
    def is_sound(self) -> bool:
        """Whether it can be reckoned with: more than nothing, and no more than scores in (0, 1) can say."""
        return 0 < self.scans <= _MAX_SCANS and 0 < self.spread <= _MAX_SPREAD


def prediction_bound(values: Sequence[float], rate: float, prior: SpreadPrior | None = None) -> float:
    """Bound in (0, 1) that one more score exceeds with probability `rate`, if the scores' log-odds are normal.

    With a prior the spread is that of the posterior (Gelman et al., Bayesian Data Analysis, 3rd ed., section 3.3, with
    nothing known about the mean).
    """
    from scipy.special import expit, stdtrit  # here, so that the page starts without it

    mean, scale, freedom = _student(values, prior)
    return float(expit(mean + stdtrit(freedom, 1 - rate) * scale))


def exceedance(values: Sequence[float], scores: Sequence[float], prior: SpreadPrior | None = None) -> np.ndarray:
    """Probability [n] that one more score exceeds each of n: the rate at which `prediction_bound` gives that score."""
    from scipy.special import stdtr

    mean, scale, freedom = _student(values, prior)
    return 1 - stdtr(freedom, (_log_odds(scores) - mean) / scale)


def _student(values: Sequence[float], prior: SpreadPrior | None) -> tuple[float, float, float]:
    """Location, scale and degrees of freedom of the t distribution of one more score's log-odds."""
    log_odds = _log_odds(values)
    log_odds = np.maximum(log_odds, log_odds.max() - _MAX_DROP)
    freedom = float(len(values) - 1)
    variance = max(float(np.std(log_odds, ddof=1)), _MIN_SPREAD) ** 2
    if prior is not None:
        own, freedom = freedom, freedom + prior.scans
        variance = (own * variance + prior.scans * prior.spread**2) / freedom
    return float(np.mean(log_odds)), math.sqrt(variance * (1 + 1 / len(values))), freedom


def _log_odds(values: Sequence[float]) -> np.ndarray:
    from scipy.special import logit

    return logit(np.clip(values, 1e-9, 1 - 1e-9))
