"""Image metrics against scikit-learn, one by one and for many weightings at once."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, recall_score, roc_auc_score

from fmclip.evaluation.metrics import WeightedCurves, image_metrics


def _scores(ties: bool) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    answers = generator.random(120) < 0.6
    scores = 0.5 + 0.1 * generator.normal(0, 1, 120) + 0.08 * answers
    return (np.round(scores, 1) if ties else scores), answers


def test_auroc_counts_ties_half():
    assert image_metrics([0.1, 0.5, 0.5, 0.9], [False, False, True, True], 0.5).image_auroc == 0.875


@pytest.mark.parametrize("ties", [False, True])
def test_metrics_equal_scikit_learn(ties):
    scores, answers = _scores(ties)
    found = image_metrics(scores, answers, 0.55)
    called = scores > 0.55
    best = max(f1_score(answers, scores >= cut) for cut in scores)
    cuts = [cut for cut in (*scores, 2.0) if recall_score(~answers, scores < cut) >= 0.95]
    assert found.image_auroc == pytest.approx(roc_auc_score(answers, scores))
    assert found.average_precision == pytest.approx(average_precision_score(answers, scores))
    assert found.f1_max == pytest.approx(best)
    assert found.sensitivity_at_95_specificity == pytest.approx(recall_score(answers, scores >= min(cuts)))
    assert found.sensitivity == pytest.approx(recall_score(answers, called))
    assert found.specificity == pytest.approx(recall_score(~answers, ~called))
    assert found.f1 == pytest.approx(f1_score(answers, called))


def test_a_score_at_the_threshold_is_within_the_references():
    found = image_metrics([0.2, 0.5, 0.5, 0.8], [False, False, True, True], 0.5)
    assert (found.sensitivity, found.specificity) == (0.5, 1.0)


@pytest.mark.parametrize("ties", [False, True])
def test_weighted_metrics_equal_those_of_repeated_scans(ties):
    scores, answers = _scores(ties)
    weights = np.random.default_rng(2).integers(0, 4, (5, 120))
    found = WeightedCurves(scores, answers, weights.astype(float)).metrics(0.55)
    for row, own in enumerate(weights):
        repeated = image_metrics(np.repeat(scores, own), np.repeat(answers, own), 0.55)
        for name, values in found.items():
            assert values[row] == pytest.approx(getattr(repeated, name)), name


def test_the_curve_runs_through_the_corners_of_the_roc():
    curves = WeightedCurves(np.array([0.9, 0.8, 0.3, 0.1]), np.array([True, False, True, False]), np.ones((1, 4)))
    np.testing.assert_allclose(curves.roc(np.array([0.0, 0.25, 0.5, 1.0])), [[0.5, 0.5, 1.0, 1.0]])
