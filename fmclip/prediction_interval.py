"""Where one more score of the same kind should lie: the one-sided prediction interval of normal log-odds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_MAX_DROP = 1.5  # log-odds further below the highest reference come from a copy of a scan, not from variation
_MIN_SPREAD = 0.03  # log-odds closer together than this differ by rounding only


def prediction_bound(values: Sequence[float], rate: float) -> float:
    """Bound in (0, 1) that one more score exceeds with probability `rate`, if the scores' log-odds are normal."""
    from scipy.special import expit, stdtrit  # here, so that the page starts without it

    mean, scale = _location_and_scale(values)
    return float(expit(mean + stdtrit(len(values) - 1, 1 - rate) * scale))


def exceedance(values: Sequence[float], scores: Sequence[float]) -> np.ndarray:
    """Probability [n] that one more score exceeds each of n: the rate at which `prediction_bound` gives that score."""
    from scipy.special import stdtr

    mean, scale = _location_and_scale(values)
    return 1 - stdtr(len(values) - 1, (_log_odds(scores) - mean) / scale)


def _location_and_scale(values: Sequence[float]) -> tuple[float, float]:
    """Of the t distribution, with one degree of freedom less than there are values, of one more score's log-odds."""
    log_odds = _log_odds(values)
    log_odds = np.maximum(log_odds, log_odds.max() - _MAX_DROP)
    spread = max(float(np.std(log_odds, ddof=1)), _MIN_SPREAD)
    return float(np.mean(log_odds)), spread * math.sqrt(1 + 1 / len(values))


def _log_odds(values: Sequence[float]) -> np.ndarray:
    from scipy.special import logit

    return logit(np.clip(values, 1e-9, 1 - 1e-9))
