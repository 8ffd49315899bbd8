"""AUROC against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from fmclip.evaluation.metrics import PixelAUROC, image_auroc


def test_image_auroc_counts_ties_half():
    assert image_auroc([0.1, 0.5, 0.5, 0.9], [False, False, True, True]) == 0.875
    assert image_auroc([0.9, 0.1], [False, True]) == 0.0


@pytest.mark.parametrize("spread", [0.2, 0.001])
def test_pixel_auroc_equals_scikit_learn(spread):
    generator = np.random.default_rng(0)
    pixels = PixelAUROC()
    maps, masks = [], []
    for shape in ((30, 40), (25, 25), (50, 10)):
        mask = generator.random(shape) < 0.2
        anomaly_map = np.clip(0.5 + spread * (generator.normal(0, 1, shape) + mask), 0, 1).astype(np.float32)
        pixels.update(anomaly_map, mask)
        maps.append(anomaly_map.ravel())
        masks.append(mask.ravel())
    expected = roc_auc_score(np.concatenate(masks), np.concatenate(maps))
    assert pixels.compute() == pytest.approx(expected, abs=1e-4)


def test_pixel_auroc_counts_ties_half():
    pixels = PixelAUROC()
    pixels.update(np.array([[0.0, 1.0, 1.0, 0.3]]), np.array([[False, False, True, True]]))
    assert pixels.compute() == pytest.approx(roc_auc_score([0, 0, 1, 1], [0.0, 1.0, 1.0, 0.3]))


def test_pixel_auroc_needs_both_kinds_of_pixels():
    pixels = PixelAUROC()
    assert pixels.compute() is None
    pixels.update(np.zeros((2, 2)), np.zeros((2, 2), bool))
    assert pixels.compute() is None


def test_map_and_mask_must_match():
    with pytest.raises(ValueError, match="differ in shape"):
        PixelAUROC().update(np.zeros((2, 2)), np.zeros((2, 3), bool))
