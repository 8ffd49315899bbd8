"""Bootstrap intervals cover what they should, and paired tests see what is there."""

import numpy as np
import pytest

from fmclip.evaluation.intervals import (
    TestScores,
    bootstrap_weights,
    compare,
    image_intervals,
    mean_auroc_interval,
    mean_roc,
)


def _scores(gain: float, seed: int = 0, count: int = 200, noise: float = 0.0) -> TestScores:
    generator = np.random.default_rng(seed)
    answers = np.arange(count) % 2 == 0
    values = generator.normal(0, 1, count) + gain * answers
    values = values + noise * np.random.default_rng(seed + 100).normal(0, 1, count)
    numbers = tuple(range(count))
    return TestScores(numbers, numbers, tuple(answers.tolist()), tuple(values.tolist()), 0.5)


def test_draws_keep_the_number_of_each_kind():
    answers = [True] * 5 + [False] * 3
    weights = bootstrap_weights(range(8), answers, resamples=50)
    assert (weights[:, :5].sum(axis=1) == 5).all()
    assert (weights[:, 5:].sum(axis=1) == 3).all()
    assert len(np.unique(weights, axis=0)) > 10


def test_scans_of_a_group_are_drawn_together():
    weights = bootstrap_weights([0, 0, 1, 1, 2, 2], [True, True, True, True, False, False], resamples=50)
    np.testing.assert_array_equal(weights[:, ::2], weights[:, 1::2])


def test_a_draw_repeats():
    first, second = (bootstrap_weights(range(8), [True, False] * 4) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_the_interval_covers_the_true_auroc_in_most_cases():
    truth = 0.76025  # of two normals one standard deviation apart: Phi(1 / sqrt(2))
    bounds = [image_intervals(own, bootstrap_weights(own.group, own.is_abnormal))["image_auroc"] for own in _many()]
    covered = np.mean([low <= truth <= high for low, high in bounds])
    assert 0.85 <= covered <= 1.0
    assert np.mean([high - low for low, high in bounds]) == pytest.approx(0.13, abs=0.03)


def _many() -> list[TestScores]:
    return [_scores(1.0, seed) for seed in range(60)]


def test_more_seeds_of_the_same_scans_do_not_count_as_more_scans():
    one = mean_auroc_interval([_scores(1.0)])
    assert mean_auroc_interval([_scores(1.0)] * 5) == pytest.approx(one)


def test_a_method_equals_itself():
    found = compare([_scores(1.0)], [_scores(1.0)])
    assert (found.difference, found.interval, found.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_a_clearly_worse_method_is_told_and_a_noisy_copy_is_not():
    worse = compare([_scores(1.0, count=600, noise=4.0)], [_scores(1.0, count=600)])
    assert worse.difference < -0.05
    assert worse.interval[1] < 0
    assert worse.p_value < 0.01
    assert compare([_scores(1.0, noise=0.1)], [_scores(1.0)]).p_value > 0.05


def test_methods_on_different_scans_are_not_compared():
    assert compare([_scores(1.0)], [_scores(1.0, count=100)]) is None
    assert compare([_scores(1.0)], []) is None


def test_the_roc_lies_in_its_band():
    middle, low, high = mean_roc([_scores(1.0, seed) for seed in range(3)], np.linspace(0, 1, 11))
    assert (low <= middle + 1e-9).all()
    assert (middle <= high + 1e-9).all()
    assert high[5] - low[5] > 0.02
    assert (np.diff(middle) >= 0).all()
