"""AUROC of scans and of pixels: the chance that something abnormal scores above something normal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def image_auroc(scores: Sequence[float], is_abnormal: Sequence[bool]) -> float:
    """AUROC over scans.

    Args:
        scores: [N] scores, higher is more abnormal.
        is_abnormal: [N] answers, both kinds among them.

    Returns:
        AUROC in [0, 1]; ties count half.
    """
    from sklearn.metrics import roc_auc_score  # a second to import, which `adapt` and `predict` need not wait for

    return float(roc_auc_score(np.asarray(is_abnormal, dtype=bool), np.asarray(scores, dtype=np.float64)))


class PixelAUROC:
    """AUROC over all pixels of many maps, in constant memory.

    Scores in [0, 1] are counted in 2^20 equal bins; pixels of one bin count as ties, so that the result differs from
    the exact one by less than the share of pixel pairs that are closer than a millionth.
    """

    _BINS = 2**20

    def __init__(self) -> None:
        self._counts = np.zeros((2, self._BINS), dtype=np.int64)  # normal and abnormal pixels in each bin

    def update(self, anomaly_map: np.ndarray, mask: np.ndarray) -> None:
        """Add one scan.

        Args:
            anomaly_map: [H, W] in [0, 1].
            mask: bool [H, W], True where the scan is abnormal.

        Raises:
            ValueError: The shapes differ.
        """
        if anomaly_map.shape != mask.shape:
            raise ValueError(f"map and mask differ in shape: {anomaly_map.shape} and {mask.shape}")
        bins = np.minimum((anomaly_map.astype(np.float64) * self._BINS).astype(np.int64), self._BINS - 1)  # [H, W]
        for row, chosen in enumerate((bins[~mask], bins[mask])):
            np.add.at(self._counts[row], chosen, 1)

    def compute(self) -> float | None:
        """Return the AUROC, or None while pixels of either kind are missing."""
        normal, abnormal = self._counts
        pairs = float(normal.sum()) * float(abnormal.sum())
        if not pairs:
            return None
        below = np.cumsum(normal) - normal  # normal pixels in lower bins
        return float((abnormal * (below + 0.5 * normal)).sum() / pairs)
