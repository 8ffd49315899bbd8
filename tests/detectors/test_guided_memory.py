"""The patch memory guided by abnormal scans: what these teach, and what they must not undo."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from detector_scans import SIDE, lesion_scan, normal_scan
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import roc_auc_score

from fmclip.detectors import DETECTORS
from fmclip.detectors.base import to_pixels
from fmclip.detectors.guided_memory import MOST, Guide, _by_folds
from fmclip.errors import CheckpointError
from fmclip.scans import Scan
from fmclip.towers import get_tower

REFERENCES = [normal_scan(seed) for seed in range(6)]
PLACES = [(20 + 4 * (place % 6), 44 - 5 * (place % 5)) for place in range(16)]


def faint(seed: int, centre: tuple[int, int]) -> Scan:
    """A normal scan with a rough spot at `centre`, hardly brighter than the rest."""
    rng = np.random.default_rng(900 + seed)
    pixels = normal_scan(seed).pixels.copy()
    rows, columns = np.mgrid[:SIDE, :SIDE]
    spot = np.hypot(rows - centre[0], columns - centre[1]) < 8
    rough = cv2.GaussianBlur(rng.normal(0, 1, (SIDE, SIDE)).astype(np.float32), (0, 0), 0.8)
    pixels[spot] += 0.015 * (rough / rough.std())[spot]
    return Scan(pixels.clip(0, 1).astype(np.float32), label=f"scan {seed}")


def mask_of(centre: tuple[int, int]) -> np.ndarray:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    return np.hypot(rows - centre[0], columns - centre[1]) < 8


TAUGHT = [faint(40 + place, centre) for place, centre in enumerate(PLACES[:6])]
MASKS = [mask_of(centre) for centre in PLACES[:6]]
NEW = [faint(80 + place, centre) for place, centre in enumerate(PLACES)]
NORMALS = [normal_scan(seed) for seed in range(60, 76)]


def make(name: str = "guided_memory", **settings):
    kind = DETECTORS[name]
    return kind(get_tower("mini"), kind.config_class(**settings))


@pytest.fixture(scope="module")
def memory():
    return make("patch_memory").fit(REFERENCES)


@pytest.fixture(scope="module")
def guided():
    return make().fit(REFERENCES, TAUGHT, abnormal_masks=MASKS)


@pytest.fixture(scope="module")
def unmasked():
    return make().fit(REFERENCES, TAUGHT)


def image_auroc(detector, abnormal=NEW) -> float:
    scores = [one.score for one in detector.predict([*NORMALS, *abnormal])]
    return float(roc_auc_score([0] * len(NORMALS) + [1] * len(abnormal), scores))


def pixel_auroc(detector) -> float:
    maps = [one.map for one in detector.predict(NEW)]
    return float(roc_auc_score(np.ravel([mask_of(centre) for centre in PLACES]), np.ravel(maps)))


def test_abnormal_scans_help_to_find_more_of_their_kind_and_masks_to_place_them(memory, guided, unmasked):
    assert image_auroc(guided) > image_auroc(memory) + 0.02
    assert pixel_auroc(guided) > pixel_auroc(memory) + 0.02
    assert image_auroc(unmasked) > image_auroc(memory) + 0.02
    found = [
        np.mean([one.score > each.calibration().threshold for one in each.predict(NEW)]) for each in (memory, guided)
    ]
    assert found[1] > found[0] + 0.2


def test_abnormal_scans_without_masks_leave_the_shape_of_the_map_alone(memory, guided, unmasked):
    pixels, content, _ = to_pixels(NEW[:3], memory.tower)
    plain, own, drawn = (one._answer(pixels, content).flatten(1) for one in (memory, unmasked, guided))  # [3, h * w]
    torch.testing.assert_close(own / own.amax(1, True), plain / plain.amax(1, True))
    assert not torch.allclose(drawn / drawn.amax(1, True), plain / plain.amax(1, True), rtol=0.05)
    assert float(unmasked.guide_.drawn) == 0
    assert float(make().fit(REFERENCES, TAUGHT, abnormal_masks=[*MASKS[:3], None, None, None]).guide_.drawn) == 0.5


def test_what_the_abnormal_scans_do_not_show_is_still_found(memory, guided):
    bright = [lesion_scan(120 + place, centre) for place, centre in enumerate(PLACES)]
    assert image_auroc(guided, bright) >= image_auroc(memory, bright) - 0.02


def test_new_normal_scans_score_as_the_references_do(guided):
    """The references are scored by guides that have not seen them; seen ones would score too low."""
    threshold = guided.calibration().threshold
    above = np.mean([one.score > threshold for one in guided.predict(NORMALS)])
    assert above <= 0.25
    assert all(0 < score < 1 for score in guided.reference_scores_)


def test_a_fold_knows_nothing_of_the_scans_it_scores():
    looks = [torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(0))]
    asked = []

    def learn(rest):
        asked.append(rest.tolist())
        centre = looks[0][rest].mean(dim=(0, 2, 3))
        one = torch.ones(())
        return Guide((centre,), 0 * one, 0 * one, one, one, one)

    found = _by_folds(looks, torch.arange(6), learn)
    assert sorted(len(rest) for rest in asked) == [4, 4, 5, 5]
    for place in range(6):
        rest = next(one for one in asked if place not in one)
        expected = torch.einsum("chw,c->hw", looks[0][place], looks[0][rest].mean(dim=(0, 2, 3)))
        torch.testing.assert_close(found[place], expected)


def test_the_guide_of_one_view_is_fishers_discriminant():
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(40, 5, generator=generator)
    abnormal = 0.8 + torch.randn(40, 5, generator=generator) * torch.tensor([1.0, 2, 0.5, 1, 3])
    guide = Guide.learn([normal], [abnormal], 0.3)
    judge = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.3)
    judge.fit(torch.cat([normal, abnormal]).numpy(), [0] * 40 + [1] * 40)
    np.testing.assert_allclose(guide.weights[0], judge.coef_[0], rtol=1e-3, atol=1e-4)
    assert float(guide.offset) == pytest.approx(float(judge.intercept_[0]), abs=1e-3)
    asked = torch.randn(1, 5, 2, 2, generator=generator)
    odds = judge.decision_function(asked[0].flatten(1).T.numpy())
    np.testing.assert_allclose(guide.log_odds([asked])[0].flatten(), odds, atol=1e-3)


def test_several_views_add_up_and_one_patch_is_enough():
    generator = torch.Generator().manual_seed(2)
    normal = [torch.randn(9, 4, generator=generator), torch.randn(9, 3, generator=generator)]
    abnormal = [1 + torch.randn(1, 4, generator=generator), torch.randn(1, 3, generator=generator)]
    both = Guide.learn(normal, abnormal, 0.5)
    alone = [Guide.learn([one], [other], 0.5) for one, other in zip(normal, abnormal, strict=True)]
    looks = [torch.randn(2, 4, 3, 3, generator=generator), torch.randn(2, 3, 3, 3, generator=generator)]
    expected = sum(guide.log_odds([look]) for guide, look in zip(alone, looks, strict=True))
    torch.testing.assert_close(both.log_odds(looks), expected)


def test_the_guide_is_followed_up_to_a_bound(guided):
    wild = replace(guided.guide_, offset=guided.guide_.offset + 1e9)
    assert float(wild.deviations(wild.log_odds([torch.zeros(1, len(one), 1, 1) for one in wild.weights]))) == MOST
    copy = make()
    copy.reference_scores_ = guided.reference_scores_
    copy.load_state(guided.state())
    copy.guide_ = wild
    before, after = guided.predict(NORMALS[:1])[0], copy.predict(NORMALS[:1])[0]
    assert np.isfinite(after.map).all()
    log_odds = [np.log(one.score / (1 - one.score)) for one in (before, after)]
    assert 0 < log_odds[1] - log_odds[0] <= 2 * MOST * 0.5 * float(wild.unit) + 1e-3


def test_a_mask_that_marks_nothing_counts_as_none_and_a_tiny_one_counts():
    empty = make().fit(REFERENCES, TAUGHT, abnormal_masks=[np.zeros((SIDE, SIDE), bool)] * 6)
    assert np.isfinite(empty.predict(NEW[:1])[0].map).all()
    tiny = np.zeros((SIDE, SIDE), bool)
    tiny[30, 30] = True
    assert np.isfinite(make().fit(REFERENCES, TAUGHT[:1], abnormal_masks=[tiny]).predict(NEW[:1])[0].map).all()


def test_two_references_and_one_abnormal_scan_will_do():
    detector = make().fit(REFERENCES[:2], TAUGHT[:1])
    assert detector.n_abnormals_ == 1
    assert 0 < detector.predict(NEW[:1])[0].score < 1


@pytest.mark.parametrize("settings", [{"guidance": 3.0}, {"map_guidance": -1.0}, {"guide_shrinkage": 0.0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="guidance"):
        make(**settings)


def test_a_guide_of_another_width_or_without_spread_is_refused(guided):
    state = guided.state()
    for wrong in ({"guide.weight.0": torch.zeros(2)}, {"guide.spread": torch.tensor(0.0)}):
        copy = make()
        copy.reference_scores_ = guided.reference_scores_
        with pytest.raises(CheckpointError, match="guide"):
            copy.load_state({**state, **wrong})


def test_without_guidance_it_is_the_patch_memory(memory):
    bare = make(guidance=0.0, map_guidance=0.0).fit(REFERENCES, TAUGHT, abnormal_masks=MASKS)
    assert bare.reference_scores_ == pytest.approx(memory.reference_scores_, abs=1e-6)
    np.testing.assert_allclose(bare.predict(NEW[:1])[0].map, memory.predict(NEW[:1])[0].map, atol=1e-6)
