"""Pixel metrics against scikit-learn and against a brute force AUPRO."""

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import auc, f1_score, roc_auc_score

from fmclip.evaluation.pixels import PixelScores


def _maps(spread: float = 0.2, count: int = 4) -> list[tuple[np.ndarray, np.ndarray]]:
    """Maps with masks of two touching-by-corner and separate regions; the last scan is normal."""
    generator = np.random.default_rng(0)
    pairs = []
    for number in range(count):
        mask = np.zeros((20 + number, 25), bool)
        if number < count - 1:
            mask[2:5, 3 : 6 + number] = True
            mask[5, 6 + number] = True  # touches the first by a corner only: one region
            mask[12:16, 12:20] = True
        noise = generator.normal(0, 1, mask.shape) + 1.2 * mask
        pairs.append((np.clip(0.5 + spread * noise, 0, 1).astype(np.float32), mask))
    return pairs


def _collect(pairs, threshold: float = 0.6) -> PixelScores:
    pixels = PixelScores(threshold)
    for place, (anomaly_map, mask) in enumerate(pairs):
        pixels.update(anomaly_map, mask, place)
    return pixels


def _brute_force_aupro(pairs, limit: float = 0.3) -> float:
    """Overlap of every region at every threshold."""
    regions = []
    for anomaly_map, mask in pairs:
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [anomaly_map[labels == number] for number in range(1, count + 1)]
    normal = np.concatenate([anomaly_map[~mask] for anomaly_map, mask in pairs])
    thresholds = np.unique(np.concatenate([anomaly_map.ravel() for anomaly_map, _ in pairs]))[::-1]
    x = np.array([0.0, *[(normal >= cut).mean() for cut in thresholds]])
    y = np.array([0.0, *[np.mean([(own >= cut).mean() for own in regions]) for cut in thresholds]])
    kept = x < limit
    return auc(np.append(x[kept], limit), np.append(y[kept], np.interp(limit, x, y))) / limit


@pytest.mark.parametrize("spread", [0.2, 0.001])
def test_pixel_auroc_equals_scikit_learn(spread):
    pairs = _maps(spread)
    values, masks = (np.concatenate([pair[side].ravel() for pair in pairs]) for side in (0, 1))
    assert _collect(pairs).compute().pixel_auroc == pytest.approx(roc_auc_score(masks, values), abs=1e-4)


@pytest.mark.parametrize("spread", [0.2, 0.01])
def test_aupro_equals_brute_force(spread):
    pairs = _maps(spread)
    assert _collect(pairs).compute().aupro == pytest.approx(_brute_force_aupro(pairs), abs=1e-4)


def test_perfect_and_inverted_maps():
    masks = [mask for _, mask in _maps()]
    perfect = _collect([(mask * 0.9, mask) for mask in masks]).compute()
    assert (perfect.pixel_auroc, perfect.aupro, perfect.dice) == pytest.approx((1.0, 1.0, 1.0), abs=1e-6)
    inverted = _collect([(0.9 * ~mask, mask) for mask in masks]).compute()
    assert (inverted.pixel_auroc, inverted.aupro, inverted.dice) == pytest.approx((0.0, 0.0, 0.0), abs=1e-6)


def test_flat_maps_are_chance():
    flat = _collect([(np.full(mask.shape, 0.3), mask) for _, mask in _maps()]).compute()
    assert flat.pixel_auroc == pytest.approx(0.5)
    assert flat.aupro == pytest.approx(0.15)  # the diagonal up to 0.3


def test_dice_is_the_mean_f1_of_abnormal_scans_at_the_threshold():
    pairs = _maps()
    expected = np.mean([f1_score(mask.ravel(), anomaly_map.ravel() > 0.6) for anomaly_map, mask in pairs[:-1]])
    assert _collect(pairs).compute().dice == pytest.approx(expected)


def test_resampled_metrics_are_those_of_repeated_scans():
    pairs = _maps()
    weights = np.array([[1, 1, 1, 1], [2, 0, 1, 3], [0, 0, 0, 4]])
    found = _collect(pairs).resample(weights)
    for row in (0, 1):
        repeated = [pair for pair, count in zip(pairs, weights[row], strict=True) for _ in range(count)]
        expected = _collect(repeated).compute()
        for name, values in found.items():
            assert values[row] == pytest.approx(getattr(expected, name), abs=2e-3), name
    assert all(np.isnan(values[2]) for values in found.values())  # no abnormal pixel was drawn


def test_pixels_of_both_kinds_are_needed():
    pixels = PixelScores(0.5)
    assert pixels.compute() is None
    pixels.update(np.zeros((2, 2)), np.zeros((2, 2), bool))
    assert pixels.compute() is None


def test_map_and_mask_must_match():
    with pytest.raises(ValueError, match="differ in shape"):
        PixelScores(0.5).update(np.zeros((2, 2)), np.zeros((2, 3), bool))
