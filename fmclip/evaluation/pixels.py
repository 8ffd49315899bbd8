"""How well maps tell abnormal pixels from normal ones, in memory that does not grow with the pixels."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from scipy.integrate import trapezoid

FALSE_ALARM_LIMIT = 0.3
"""AUPRO integrates up to this share of false alarms, as usual (Bergmann 2021)."""
_BINS = 2**20
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

    Scores in [0, 1] are counted in 2^20 equal bins; pixels of one bin count as ties, so that AUROC and AUPRO differ
    from the exact ones by less than the share of pixel pairs that are closer than a millionth. The overlap of a region
    above a threshold is linear in counts, so that one histogram, each region's pixels weighted by one over its size, is
    all that AUPRO needs.

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
        _, regions = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)  # [H, W], 0 outside
        share = 1.0 / np.maximum(np.bincount(regions.ravel()), 1)  # of one pixel in its region
        own = bins[mask]
        weighted = ((self._normal, bins[~mask], None), (self._abnormal, own, None), (self._overlap, own, share))
        coarse = np.zeros((len(weighted), _COARSE), dtype=np.float32)
        for row, (histogram, chosen, shares) in enumerate(weighted):
            weights = np.ones(len(chosen)) if shares is None else shares[regions[mask]]
            np.add.at(histogram, chosen, weights)
            np.add.at(coarse[row], chosen // (_BINS // _COARSE), weights)
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


def _areas(normal: np.ndarray, abnormal: np.ndarray, overlap: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and AUPRO, each [R], from histograms [R, bins] over ascending scores."""
    above = [np.cumsum(histogram[:, ::-1], axis=1, dtype=np.float64) for histogram in (normal, abnormal, overlap)]
    alarms, found, overlaps = (rows / rows[:, -1:] for rows in above)  # each [R, bins], ascending to 1
    auroc = np.array([trapezoid(y, x) for x, y in zip(alarms, found, strict=True)])
    return auroc + alarms[:, 0] * found[:, 0] / 2, np.array(
        [_area_up_to(FALSE_ALARM_LIMIT, x, y) for x, y in zip(alarms, overlaps, strict=True)]
    )


def _area_up_to(limit: float, x: np.ndarray, y: np.ndarray) -> float:
    """Area under a curve that starts at the origin, for x from 0 to `limit`, over `limit`."""
    x, y = np.r_[0.0, x], np.r_[0.0, y]
    inside = x < limit
    end = np.interp(limit, x, y)
    return float(trapezoid(np.r_[y[inside], end], np.r_[x[inside], limit]) / limit)
