"""How well maps tell abnormal pixels from normal ones, in memory that does not grow with the pixels."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from scipy.integrate import trapezoid

FALSE_ALARM_LIMIT = 0.3
"""AUPRO integrates up to this share of false alarms, as usual (Bergmann 2021)."""
_BINS = 2**18
_COARSE = 2**11  # bins of the histograms kept for each scan, for the bootstrap


@dataclass(frozen=True)
class PixelMetrics:
    """Metrics over pixels, each in [0, 1].

    Attributes:
        pixel_auroc: Chance that an abnormal pixel scores above a normal one.
        aupro: Per-region overlap, averaged over the connected regions of all masks, integrated over the share of
            normal pixels above the threshold from 0 to 0.3, over 0.3.
        dice: Dice of (map above the calibrated threshold) and mask, averaged over the abnormal scans with a mask.
    """

    pixel_auroc: float
    aupro: float
    dice: float


class PixelScores:
    """Collects maps and masks.

    Scores in [0, 1] are counted in 2^18 equal bins; pixels of one bin count as ties, so that AUROC and AUPRO differ
    from the exact ones by less than the share of pixel pairs that are closer than four millionths. The overlap of a
    region above a threshold is linear in counts, so that one histogram, each region's pixels weighted by one over its
    size, is all that AUPRO needs.

    Args:
        threshold: Calibrated threshold, for Dice.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._normal = np.zeros(_BINS, dtype=np.float64)
        self._abnormal = np.zeros(_BINS, dtype=np.float64)
        self._overlap = np.zeros(_BINS, dtype=np.float64)
        self._coarse: list[np.ndarray] = []  # for each scan [3, coarse bins]
        self._dice: list[float] = []
        self._places: list[int] = []

    def update(self, anomaly_map: np.ndarray, mask: np.ndarray, place: int = -1) -> None:
        """Add one scan.

        Args:
            anomaly_map: [H, W] in [0, 1].
            mask: bool [H, W], True where the scan is abnormal.
            place: Place of the scan among those that a bootstrap draws from.

        Raises:
            ValueError: The shapes differ.
        """
        if anomaly_map.shape != mask.shape:
            raise ValueError(f"map and mask differ in shape: {anomaly_map.shape} and {mask.shape}")
        bins = np.minimum((anomaly_map.astype(np.float64) * _BINS).astype(np.int64), _BINS - 1)  # [H, W]
        coarse = np.zeros((3, _COARSE), dtype=np.float32)
        normal, abnormal = bins[~mask], bins[mask]
        _count(normal, None, self._normal, coarse[0])
        if len(abnormal):
            _, regions = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)  # [H, W], 0 outside
            share = 1.0 / np.maximum(np.bincount(regions.ravel()), 1)  # of one pixel in its region
            _count(abnormal, None, self._abnormal, coarse[1])
            _count(abnormal, share[regions[mask]], self._overlap, coarse[2])
        self._coarse.append(coarse)
        self._places.append(place)
        called = anomaly_map > self._threshold
        self._dice.append(float(2 * (called & mask).sum() / (called.sum() + mask.sum())) if mask.any() else np.nan)

    def compute(self) -> PixelMetrics | None:
        """Return the metrics, or None while pixels of either kind are missing."""
        if not self._normal.any() or not self._abnormal.any():
            return None
        auroc, aupro = _areas(self._normal[None], self._abnormal[None], self._overlap[None])
        return PixelMetrics(float(auroc[0]), float(aupro[0]), float(np.nanmean(self._dice)))

    def resample(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Measure for many weightings of the scans.

        Args:
            weights: [R, N], N scans by `place`.

        Returns:
            All fields of `PixelMetrics`, each [R]; NaN where a weighting has pixels of one kind only.
        """
        own = weights[:, self._places].astype(np.float32)  # [R, S]
        histograms = np.stack(self._coarse)  # [S, 3, bins]
        normal, abnormal, overlap = (own @ histograms[:, row] for row in range(3))  # each [R, bins]
        dice = np.array(self._dice)
        drawn = own * ~np.isnan(dice)
        with np.errstate(invalid="ignore", divide="ignore"):
            auroc, aupro = _areas(normal, abnormal, overlap)
            return {
                "pixel_auroc": auroc,
                "aupro": aupro,
                "dice": (drawn @ np.nan_to_num(dice)) / drawn.sum(axis=1),
            }


def _count(bins: np.ndarray, weights: np.ndarray | None, fine: np.ndarray, coarse: np.ndarray) -> None:
    """Add pixels to a histogram of all scans and to that of their own scan."""
    fine += np.bincount(bins, weights, minlength=_BINS)
    coarse += np.bincount(bins // (_BINS // _COARSE), weights, minlength=_COARSE)


def _areas(normal: np.ndarray, abnormal: np.ndarray, overlap: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and AUPRO, each [R], from histograms [R, bins] over ascending scores."""
    found = np.empty((2, len(normal)))
    for row, counts in enumerate(zip(normal, abnormal, overlap, strict=True)):
        above = [np.append(0.0, np.cumsum(own[::-1], dtype=np.float64)) for own in counts]  # from the highest score
        alarms, hits, overlaps = (own / own[-1] for own in above)
        found[:, row] = trapezoid(hits, alarms), _area_up_to(FALSE_ALARM_LIMIT, alarms, overlaps)
    return found[0], found[1]


def _area_up_to(limit: float, x: np.ndarray, y: np.ndarray) -> float:
    """Area under a curve for x from 0 to `limit`, over `limit`."""
    inside = x < limit
    end = np.interp(limit, x, y)
    return float(trapezoid(np.append(y[inside], end), np.append(x[inside], limit)) / limit)
