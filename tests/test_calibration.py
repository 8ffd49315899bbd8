"""Threshold, rank in words, and what is said about a reference set."""

import json

import cv2
import numpy as np
import pytest

from fmclip.calibration import (
    FALSE_ALARM_RATE,
    MAX_REFERENCES,
    Calibration,
    check_references,
    distinct,
    require_references,
)
from fmclip.errors import ReferenceSetError
from fmclip.prediction_interval import SpreadPrior, find_outliers
from fmclip.scans import Scan


def _scans(count: int, *, shape: tuple[int, int] = (48, 60), seed: int = 0) -> list[Scan]:
    generator = np.random.default_rng(seed)
    scans = []
    for number in range(1, count + 1):
        coarse = generator.uniform(0.2, 0.8, (6, 6)).astype(np.float32)
        scans.append(Scan(cv2.resize(coarse, shape[::-1]), f"scan {number}"))
    return scans


def _kinds(scans: list[Scan], scores: list[float] | None = None) -> list[tuple[str, tuple[int, ...]]]:
    return [(warning.kind, warning.scans) for warning in check_references(scans, _calibration(scores))]


def _calibration(scores: list[float] | None) -> Calibration | None:
    return None if scores is None else Calibration.from_scores(scores)


@pytest.mark.parametrize("k", [3, 4, 12])
def test_threshold_keeps_its_false_alarm_rate_for_any_number_of_references(k):
    generator = np.random.default_rng(k)
    alarms = []
    for _ in range(5000):
        scores = 1 / (1 + np.exp(-generator.normal(-0.5, 0.2, k + 1)))  # log-odds around -0.5
        alarms.append(Calibration.from_scores(scores[:k]).is_abnormal(scores[k]))
    assert np.mean(alarms) == pytest.approx(0.10, abs=0.015)


KNOWN = SpreadPrior(4, 0.12, contamination=0.1, shift=0.5)
SOUND = [0.40, 0.42, 0.39, 0.41, 0.43, 0.40, 0.38]


@pytest.mark.parametrize("k", [4, 8, 20])
def test_threshold_keeps_its_false_alarm_rate_where_one_reference_in_ten_is_wrong(k):
    generator = np.random.default_rng(k)
    alarms, aware, unaware = [], [], []
    for _ in range(2000):
        spread = KNOWN.spread * np.sqrt(KNOWN.scans / generator.chisquare(KNOWN.scans))
        log_odds = generator.normal(-0.5, spread, k + 1)
        wrong = generator.random(k) < KNOWN.contamination
        log_odds[:k] = np.where(wrong, -0.5 + generator.exponential(KNOWN.shift, k), log_odds[:k])
        scores = 1 / (1 + np.exp(-log_odds))
        aware.append(Calibration.from_scores(scores[:k], KNOWN).threshold)
        unaware.append(Calibration.from_scores(scores[:k], SpreadPrior(KNOWN.scans, KNOWN.spread)).threshold)
        alarms.append(scores[k] > aware[-1])
    assert np.mean(alarms) == pytest.approx(0.10, abs=0.02)
    assert np.mean(aware) < np.mean(unaware)  # a wrong reference lifts it less


def _above(distance: float, scores: list[float]) -> float:
    """A score that lies so many log-odds above the highest."""
    return 1 / (1 + np.exp(-(np.log(max(scores) / (1 - max(scores))) + distance)))


@pytest.mark.parametrize("sound", [SOUND, SOUND[:3], SOUND * 2])
def test_the_further_a_reference_lies_above_the_others_the_less_it_counts(sound):
    alone = Calibration.from_scores(sound, KNOWN).threshold
    far = [1.2, 2, 4, 6, 8, 12, 18]
    for distance in far:
        calibration = Calibration.from_scores([*sound, _above(distance, sound)], KNOWN)
        assert calibration.threshold == pytest.approx(alone, abs=0.02)
        assert find_outliers(calibration.reference_scores, KNOWN) == {len(sound)}
        assert calibration.p_values([calibration.threshold]) == pytest.approx([FALSE_ALARM_RATE])
    near = [Calibration.from_scores([*sound, _above(distance, sound)], KNOWN) for distance in (0.0, 0.05, 0.1)]
    assert not any(find_outliers(calibration.reference_scores, KNOWN) for calibration in near)
    assert near[0].threshold < near[1].threshold < near[2].threshold  # as for any score that may be sound


def test_the_worst_threshold_is_not_that_of_the_worst_reference():
    distances = np.linspace(0, 3, 61)
    found = [Calibration.from_scores([*SOUND, _above(one, SOUND)], KNOWN).threshold for one in distances]
    plain = [Calibration.from_scores([*SOUND, _above(one, SOUND)], SpreadPrior(4, 0.12)).threshold for one in distances]
    assert max(found) < max(plain) - 0.01
    assert 0 < np.argmax(found) < len(distances) / 3


@pytest.mark.parametrize("highest", [(0.6, 0.62), (0.98, 0.98), (0.7, 0.9999)])
def test_two_wrong_references_do_not_hide_each_other_where_some_are_expected(highest):
    scores = [highest[0], *SOUND, highest[1]]
    assert find_outliers(scores, KNOWN) == {0, 8}
    threshold = Calibration.from_scores(scores, KNOWN).threshold
    assert threshold == pytest.approx(Calibration.from_scores(SOUND, KNOWN).threshold, abs=0.02)


@pytest.mark.parametrize(("k", "wrong"), [(8, 2), (16, 4), (32, 8)])
def test_a_quarter_of_wrong_references_does_not_lift_the_threshold_to_their_height(k, wrong):
    quantiles = np.random.default_rng(0).normal(0, 1, 4000)
    quantiles = np.quantile(quantiles, (np.arange(k - wrong) + 0.5) / (k - wrong))
    sound = list(1 / (1 + np.exp(0.5 - 0.3 * quantiles)))  # a wide spread
    alone = _log_odds(Calibration.from_scores(sound, KNOWN).threshold)
    for distance in np.linspace(0.5, 6, 23):
        scores = [*sound, *(_above(distance + 0.1 * place / wrong, sound) for place in range(wrong))]
        assert _log_odds(Calibration.from_scores(scores, KNOWN).threshold) < alone + 1
        if distance >= 2:
            assert find_outliers(scores, KNOWN) == set(range(k - wrong, k))


def _log_odds(score: float) -> float:
    return float(np.log(score / (1 - score)))


@pytest.mark.parametrize("scores", [[], [0.4], [0.62, 0.4, 0.41], [0.4] * 8])
def test_nothing_is_odd_among_few_or_equal_scores(scores):
    assert find_outliers(scores, KNOWN) == set()


def test_a_calibration_says_whether_wrong_references_were_weighed():
    assert "weighed" in Calibration.from_scores(SOUND, KNOWN).rule
    assert "weighed" not in Calibration.from_scores(SOUND[:3], KNOWN).rule
    assert "weighed" not in Calibration.from_scores(SOUND).rule


def test_equal_scores_are_named_together_or_not_at_all():
    for highest in np.linspace(0.4, 0.6, 41):
        named = find_outliers([highest, *SOUND, highest], KNOWN)
        assert named in (set(), {0, 8})


@pytest.mark.parametrize("k", [4, 16])
def test_a_sound_set_is_seldom_asked_about(k):
    generator = np.random.default_rng(k)
    sets = [1 / (1 + np.exp(-generator.normal(-0.5, KNOWN.spread, k))) for _ in range(500)]
    assert np.mean([bool(find_outliers(list(scores), KNOWN)) for scores in sets]) < 0.05


def test_the_weight_of_a_wrong_reference_is_that_of_the_integrals():
    """Bayes' rule by brute force: a grid over the mean and the spread of the sound log-odds."""
    log_odds = np.array([-0.1, -0.35, -0.4, -0.3, -0.45, -0.38, -0.2])
    scores = 1 / (1 + np.exp(-log_odds))
    mean, variance = np.meshgrid(np.linspace(-2, 1.5, 1401), np.exp(np.linspace(np.log(1e-4), np.log(1), 1201)))
    prior = variance ** -(KNOWN.scans / 2) * np.exp(-KNOWN.scans * KNOWN.spread**2 / (2 * variance))  # times d log
    evidence = []
    for wrong in (0, 1):
        sound = np.sort(log_odds)[: len(log_odds) - wrong]
        squares = sum((one - mean) ** 2 for one in sound)
        seen = prior * (2 * np.pi * variance) ** (-len(sound) / 2) * np.exp(-squares / (2 * variance))
        distance = log_odds.max() - sound.mean()
        far = KNOWN.contamination / (1 - KNOWN.contamination) * np.exp(-distance / KNOWN.shift) / KNOWN.shift
        evidence.append(seen.sum() * far**wrong)
    wrong = evidence[1] / sum(evidence)
    bounds = [Calibration.from_scores(own, SpreadPrior(4, 0.12)) for own in (scores, np.sort(scores)[:-1])]
    threshold = Calibration.from_scores(scores, KNOWN).threshold
    tails = [float(bound.p_values([threshold])[0]) for bound in bounds]
    assert (1 - wrong) * tails[0] + wrong * tails[1] == pytest.approx(FALSE_ALARM_RATE, abs=1e-4)
    assert 0.1 < wrong < 0.9


def test_the_checks_ask_about_what_the_prior_finds():
    scans = _scans(8)
    scores = [0.40, 0.42, 0.39, 0.41, 0.58, 0.43, 0.40, 0.38]
    (warning,) = check_references(scans, Calibration.from_scores(scores, KNOWN))
    assert (warning.kind, warning.scans) == ("outlier", (4,))


@pytest.mark.parametrize("k", [3, 4, 12])
def test_threshold_keeps_its_false_alarm_rate_where_the_prior_is_right(k):
    generator = np.random.default_rng(k)
    alarms, bounds = [], {None: [], SpreadPrior(4, 0.2): []}
    for _ in range(3000):
        spread = 0.2 * np.sqrt(4 / generator.chisquare(4))  # a draw of the prior
        scores = 1 / (1 + np.exp(-generator.normal(-0.5, spread, k + 1)))
        for prior, found in bounds.items():
            found.append(Calibration.from_scores(scores[:k], prior).threshold)
        alarms.append(scores[k] > found[-1])
    assert np.mean(alarms) == pytest.approx(0.10, abs=0.02)
    assert np.std(bounds[SpreadPrior(4, 0.2)]) < np.std(bounds[None])  # a handful of scans moves it less


def test_p_value_at_the_threshold_is_the_false_alarm_rate_with_a_prior_too():
    calibration = Calibration.from_scores([0.3, 0.35, 0.42, 0.4], SpreadPrior(4, 0.15))
    assert calibration.p_values([calibration.threshold]) == pytest.approx([FALSE_ALARM_RATE])


def test_one_wrong_reference_does_not_lift_the_threshold_over_everything():
    scores = [0.40, 0.42, 0.39, 0.41, 0.43, 0.40, 0.38]
    clean = Calibration.from_scores(scores).threshold
    assert Calibration.from_scores([*scores, 0.95]).threshold == pytest.approx(clean, abs=0.01)


def test_equal_scores_leave_room_for_rounding():
    calibration = Calibration.from_scores([0.3, 0.3, 0.3, 0.3])
    assert not calibration.is_abnormal(0.3 + 1e-6)
    assert calibration.is_abnormal(0.35)


def test_threshold_stays_on_the_scale_of_the_scores():
    assert 0.9 < Calibration.from_scores([0.2, 0.9]).threshold <= 1
    assert 0 < Calibration.from_scores([0.0, 0.0]).threshold < 0.01
    assert Calibration.from_scores([1.0, 1.0]).threshold <= 1


@pytest.mark.parametrize(
    ("scores", "message"),
    [([], "at least two"), ([0.5], "at least two"), ([0.5, float("nan")], "training diverged.*smaller learning rates")],
)
def test_no_threshold_from_too_few_or_broken_scores(scores, message):
    with pytest.raises(ReferenceSetError, match=message):
        Calibration.from_scores(scores)


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (0.9, "higher than all 4 reference scans"),
        (0.25, "higher than 2 of 4 reference scans"),
        (0.1, "higher than 0 of 4 reference scans"),
        (0.05, "lower than all 4 reference scans"),
    ],
)
def test_rank_is_worded_in_counts(score, words):
    assert Calibration((0.1, 0.2, 0.3, 0.4), 0.5).describe_rank(score) == words


def test_verdict_follows_the_threshold():
    calibration = Calibration((0.1, 0.2), 0.5)
    assert calibration.verdict(0.51) == "deviates"
    assert calibration.verdict(0.5) == "within the references"


@pytest.mark.parametrize("prior", [None, SpreadPrior(4, 0.15), SpreadPrior(4, 0.12, 0.1, 0.4)])
def test_calibration_survives_json(prior):
    calibration = Calibration.from_scores([0.1, 0.25, 0.3, 0.27, 0.45], prior)
    assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration


@pytest.mark.parametrize(
    "changes",
    [
        {"threshold": None},
        {"threshold": float("inf")},
        {"reference_scores": [0.1]},
        {"reference_scores": 3},
        {"prior": 3},
        {"prior": {"scans": 4}},
        {"prior": {"scans": -4, "spread": 0.2}},
        {"prior": {"scans": 4, "spread": float("nan")}},
        {"prior": {"scans": 4, "spread": 1e200}},
        {"prior": {"scans": 4, "spread": 0.2, "contamination": 0.5}},
        {"prior": {"scans": 4, "spread": 0.2, "contamination": -0.1}},
        {"prior": {"scans": 4, "spread": 0.2, "contamination": 0.1, "shift": 0}},
        {"prior": {"scans": 10**400, "spread": 0.2}},
    ],
)
def test_damaged_calibration_is_refused(changes):
    with pytest.raises(ValueError, match="calibration"):
        Calibration.from_dict({**Calibration((0.1, 0.2), 0.5).to_dict(), **changes})


def test_a_calibration_of_an_earlier_version_is_still_read():
    values = Calibration((0.1, 0.2), 0.5).to_dict()
    del values["prior"]
    assert Calibration.from_dict(values) == Calibration((0.1, 0.2), 0.5)
    values["prior"] = {"scans": 4, "spread": 0.12}  # which knew of no wrong references
    assert Calibration.from_dict(values).prior == SpreadPrior(4, 0.12, contamination=0.0)


def test_outliers_are_found_and_do_not_hide_each_other():
    sound = [0.40, 0.42, 0.39, 0.41, 0.43, 0.40]
    assert find_outliers(sound) == set()
    assert find_outliers([*sound, 0.9, 0.92]) == {6, 7}
    assert find_outliers([0.4, 0.4, 0.9]) == set()  # three scans are too few to tell who is odd


@pytest.mark.parametrize(
    ("scans", "message"),
    [
        ([], "No normal scan"),
        (_scans(1), "Only one normal scan"),
        (_scans(MAX_REFERENCES + 1), f"{MAX_REFERENCES + 1} normal scans"),
        ([*_scans(3), Scan(np.full((9, 9), 0.5, np.float32), "scan 4")], "scan 4: the image is one flat value"),
        (_scans(1) * 3, "the same picture"),
        ([Scan(np.roll(_scans(1)[0].pixels, shift, axis=1)) for shift in (0, 2, 4)], "the same picture"),
    ],
)
def test_sets_that_nothing_can_be_learned_from_are_refused(scans, message):
    with pytest.raises(ReferenceSetError, match=message):
        require_references(scans)


def test_a_sound_set_raises_no_warning():
    scans = _scans(6)
    require_references(scans)
    assert check_references(scans, _calibration([0.4, 0.41, 0.42, 0.4, 0.39, 0.41])) == []


def test_copies_are_named():
    scans = _scans(4)
    noisy = np.clip(scans[1].pixels + np.random.default_rng(1).normal(0, 0.01, (48, 60)), 0, 1)
    mirrored = scans[2].pixels[:, ::-1]
    extended = [*scans, Scan(scans[0].pixels, "scan 5"), Scan(noisy, "scan 6"), Scan(mirrored, "scan 7")]
    assert _kinds(extended) == [("duplicate", (0, 4)), ("near-duplicate", (1, 5)), ("near-duplicate", (2, 6))]
    same, almost, _ = check_references(extended)
    assert same.message.startswith("scan 1 and scan 5 are the same picture")
    assert almost.message.startswith("scan 2 and scan 6 are almost the same picture: the second is left out")


@pytest.mark.parametrize(("right", "down", "gain"), [(0, 0, 1.1), (1, 0, 1.0), (0.5, -0.5, 0.9), (-1, 1, 1.05)])
def test_a_scan_shifted_or_brightened_a_little_is_the_same_scan(right, down, gain):
    scans = _scans(4)
    move = np.array([[1, 0, right], [0, 1, down]], np.float32)
    moved = cv2.warpAffine(scans[0].pixels, move, (60, 48), borderMode=cv2.BORDER_REPLICATE)
    extended = [*scans, Scan(np.clip(moved * gain, 0, 1), "scan 5")]
    assert [scan.label for scan in distinct(extended)] == [scan.label for scan in scans]
    assert _kinds(extended) == [("near-duplicate", (0, 4))]


def test_a_warning_names_the_scan_that_is_kept():
    scan = _scans(1)[0]
    copies = [Scan(np.clip(scan.pixels * gain, 0, 1), f"scan {place}") for place, gain in enumerate((1, 1.05, 1.1), 1)]
    assert [warning.scans for warning in check_references([*copies, *_scans(3, seed=1)])] == [(0, 1), (0, 2)]


def test_scans_of_a_phantom_are_all_alike_and_none_of_them_is_a_copy():
    phantom, generator = _scans(1)[0].pixels, np.random.default_rng(2)
    noisy = [np.clip(phantom + generator.normal(0, 0.02, phantom.shape), 0, 1) for _ in range(5)]
    scans = [Scan(pixels, f"scan {place}") for place, pixels in enumerate(noisy, 1)]
    assert distinct(scans) == scans
    (warning,) = check_references(scans)
    assert warning.message.startswith("Most of the 5 references are almost the same picture")


def test_mixed_scan_types_are_named():
    scans = _scans(6)
    tall = Scan(_scans(1, shape=(90, 40), seed=5)[0].pixels, "scan 7")
    assert _kinds([*scans, tall]) == [("size", (6,))]
    huge = Scan(_scans(1, shape=(480, 600), seed=5)[0].pixels, "scan 7")
    assert _kinds([*scans, huge]) == [("size", (6,))]
    tinted = np.stack([scans[5].pixels, scans[5].pixels * 0.5, scans[5].pixels * 0.7], axis=2)
    assert ("colour", (5,)) in _kinds([*scans[:5], Scan(tinted, "scan 6")])
    grey_in_colour = np.repeat(scans[5].pixels[..., None], 3, axis=2)
    assert _kinds([*scans[:5], Scan(grey_in_colour, "scan 6")]) == []


def test_brightness_and_contrast_outliers_are_named():
    scans = _scans(6)
    bright = Scan(scans[5].pixels * 0.2 + 0.8, "scan 6")
    kinds = _kinds([*scans[:5], bright])
    assert ("brightness", (5,)) in kinds
    assert ("contrast", (5,)) in kinds


def test_a_flat_scan_is_named():
    assert ("constant", (3,)) in _kinds([*_scans(3), Scan(np.zeros((48, 60), np.float32), "scan 4")])


def test_the_scan_unlike_the_others_is_asked_about():
    scans = _scans(8)
    scores = [0.40, 0.42, 0.39, 0.41, 0.9, 0.43, 0.40, 0.38]
    (warning,) = check_references(scans, _calibration(scores))
    assert warning.message == "scan 5 looks unlike the other 7: keep it?"
    assert warning.scans == (4,)


def test_a_copy_among_the_references_counts_once_and_the_outlier_is_still_named_by_its_place():
    scans = _scans(6)
    with_copy = [scans[0], scans[1], scans[0], *scans[2:]]
    assert [scan.label for scan in distinct(with_copy)] == [scan.label for scan in scans]
    scores = [0.40, 0.42, 0.39, 0.41, 0.43, 0.95]
    outliers = [
        warning.scans for warning in check_references(with_copy, _calibration(scores)) if warning.kind == "outlier"
    ]
    assert outliers == [(6,)]


def test_scores_far_below_the_others_do_not_lift_the_threshold_over_everything():
    assert Calibration.from_scores([0.41, 0.44, 1e-6, 1e-6, 0.43, 0.42]).threshold < 0.8


@pytest.mark.parametrize("scores", [(0.2, 0.3), (0.2, 0.25, 0.3, 0.4), (0.3,) * 16, (*np.linspace(0.2, 0.4, 15), 0.95)])
def test_p_values_fall_with_the_score_and_are_the_false_alarm_rate_at_the_threshold(scores):
    calibration = Calibration.from_scores(scores)
    below, at, above = calibration.p_values([calibration.threshold * 0.9, calibration.threshold, 0.99])
    assert at == pytest.approx(FALSE_ALARM_RATE)
    assert 1 >= below > at > above >= 0
    assert calibration.p_values([]).shape == (0,)
