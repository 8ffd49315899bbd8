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
from fmclip.detectors.base import batched_features, to_pixels
from fmclip.detectors.evidence import MEMORY_SPREAD, Evidence
from fmclip.detectors.guided_memory import MOST, Guide, _abnormal_places, _by_folds, _scored_views
from fmclip.detectors.samples import mask_squares
from fmclip.errors import CheckpointError, Stopped
from fmclip.maps import smooth_inside
from fmclip.patch_grid import patch_content
from fmclip.prediction_interval import spread_of
from fmclip.scans import Scan
from fmclip.towers import get_tower
from fmclip.views import levels_needed

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


def narrow(scans: list[Scan]) -> list[Scan]:
    """Without the outer eighths left and right."""
    return [Scan(scan.pixels[:, 8:56].copy(), label=scan.label) for scan in scans]


TAUGHT = [faint(40 + place, centre) for place, centre in enumerate(PLACES[:6])]
MASKS = [mask_of(centre) for centre in PLACES[:6]]
NEW = [faint(80 + place, centre) for place, centre in enumerate(PLACES)]
NORMALS = [normal_scan(seed) for seed in range(60, 76)]


def make(name: str = "guided_memory", **settings):
    kind = DETECTORS[name]
    return kind(get_tower("mini"), kind.config_class(**settings))


def reloaded(detector, state):
    copy = make()
    copy.reference_scores_ = detector.reference_scores_
    copy.load_state(state)
    return copy


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
    half = make().fit(REFERENCES, TAUGHT, abnormal_masks=[*MASKS[:3], None, None, None])
    assert float(unmasked.guide_.map_step) == 0
    assert float(half.guide_.map_step) == pytest.approx(float(guided.guide_.map_step) / 2)


def test_what_the_abnormal_scans_do_not_show_is_still_found(memory, guided):
    bright = [lesion_scan(120 + place, centre) for place, centre in enumerate(PLACES)]
    assert image_auroc(guided, bright) >= image_auroc(memory, bright) - 0.02


def test_references_are_scored_by_guides_that_have_not_seen_them():
    """Level, spread and scores by hand, of scans with letterbox bars; the folds of six are 0 and 1, 2 and 3, 4, 5."""
    normals, abnormals, masks = narrow(REFERENCES), narrow(TAUGHT), [mask[:, 8:56] for mask in MASKS]
    guided = make().fit(normals, abnormals, abnormal_masks=masks)
    pixels, content, _ = to_pixels([*normals, *abnormals], guided.tower)
    looks = _scored_views(batched_features(guided.tower, pixels, levels_needed(guided.memory_.views)), guided.memory_)
    shares = torch.nn.functional.adaptive_avg_pool2d(mask_squares(abnormals, masks, guided.tower)[0][:, None], 14)[:, 0]
    inside = patch_content(content, (14, 14))
    assert not inside.all()
    chosen = torch.cat([inside[:6], (shares >= 0.5) & inside[6:]])
    unseen = torch.empty(12, 14, 14)
    for held in ([0, 1], [2, 3], [4], [5]):
        for first, others in ((0, range(6, 12)), (6, range(6))):
            rows = [first + place for place in range(6) if place not in held]
            normal, abnormal = (rows, [*others]) if first == 0 else ([*others], rows)
            patches = ([look.permute(0, 2, 3, 1)[own][chosen[own]] for look in looks] for own in (normal, abnormal))
            mine = [first + place for place in held]
            unseen[mine] = Guide.learn(*patches, 0.5).log_odds([look[mine] for look in looks])

    def highest(log_odds):
        smooth = smooth_inside(log_odds, inside[: len(log_odds)].float(), 0.4)
        return torch.stack([one[own].topk(6).values.mean() for one, own in zip(smooth, inside, strict=False)])

    level, spread = highest(unseen)[:6].mean(), highest(unseen)[:6].std()
    spread = max(float(spread), float((highest(unseen)[:6].var() / 2 + highest(unseen)[6:].var() / 2).sqrt()))
    assert float(guided.guide_.level) == pytest.approx(float(level), rel=1e-3)
    assert float(guided.guide_.spread) == pytest.approx(spread, rel=1e-3)
    bare = make("patch_memory").fit(normals).reference_scores_
    assert float(guided.guide_.score_step) == pytest.approx(0.5 * 10 / 12 * spread_of(bare, MEMORY_SPREAD), rel=1e-3)
    moved = float(guided.guide_.score_step) * ((highest(unseen)[:6] - level) / spread).numpy()
    expected = 1 / (1 + np.exp(-(np.log(bare) - np.log1p(-np.array(bare)) + moved)))
    np.testing.assert_allclose(guided.reference_scores_, expected, rtol=1e-3)
    seen = highest(guided.guide_.log_odds([look[:6] for look in looks]))
    assert float(seen.mean()) < float(level) - 0.1 * spread  # these would be too low


def test_a_fold_knows_nothing_of_the_scans_it_scores():
    looks = [torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(0))]
    asked = []

    def learn(rest):
        asked.append(rest.tolist())
        centre = looks[0][rest].mean(dim=(0, 2, 3))
        one = torch.ones(())
        return Guide((centre,), 0 * one, 0 * one, one, one, one)

    found = _by_folds(looks, learn)
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


@pytest.mark.parametrize("sign", [1, -1])
def test_the_guide_is_followed_up_to_a_bound(guided, sign):
    wild = replace(guided.guide_, offset=guided.guide_.offset + sign * 1e9)
    empty = [torch.zeros(1, len(one), 1, 1) for one in wild.weights]
    assert float(wild.deviations(wild.log_odds(empty))) == sign * MOST
    copy = reloaded(guided, guided.state())
    before = copy.predict(NORMALS[:1])[0]
    copy.guide_ = wild
    after = copy.predict(NORMALS[:1])[0]
    assert np.isfinite(after.map).all()
    log_odds = [np.log(one.score / (1 - one.score)) for one in (before, after)]
    assert 0 < sign * (log_odds[1] - log_odds[0]) <= 2 * MOST * float(wild.score_step) + 1e-3


def test_a_mask_that_marks_nothing_counts_as_none(unmasked):
    nothing = np.zeros((SIDE, SIDE), bool)
    empty = make().fit(REFERENCES, TAUGHT, abnormal_masks=[nothing] * 6)
    assert empty.reference_scores_ == unmasked.reference_scores_
    np.testing.assert_array_equal(empty.predict(NEW[:1])[0].map, unmasked.predict(NEW[:1])[0].map)


def test_the_smallest_mask_marks_its_patch():
    tiny = torch.zeros(1, 224, 224)
    tiny[0, 100, 60] = 1e-5
    content = torch.ones(1, 224, 224, dtype=torch.bool)
    odd = Evidence(torch.rand(1, 14, 14), torch.rand(1, 14, 14))
    chosen, drawn = _abnormal_places(tiny, odd, content)
    assert chosen.nonzero().tolist() == [[0, 6, 3]]
    assert drawn.tolist() == [True]
    content[:, :112] = False  # what lies on a letterbox bar is none of the scan's
    chosen, drawn = _abnormal_places(tiny, odd, content)
    assert drawn.tolist() == [False]
    assert not chosen[:, :7].any()
    assert chosen.sum() == 10  # a twentieth of the places


def test_copies_of_an_abnormal_scan_teach_nothing_more(memory):
    """They would say that abnormal scans hardly differ; of a masked and a bare copy the masked one stays."""
    alone = make().fit(REFERENCES, TAUGHT[:1], abnormal_masks=MASKS[:1])
    bare = Scan(TAUGHT[0].pixels.copy())
    repeated = make().fit(REFERENCES, [bare, *TAUGHT[:1] * 8], abnormal_masks=[None, *MASKS[:1] * 8])
    assert repeated.n_abnormals_ == 1
    assert repeated.reference_scores_ == alone.reference_scores_
    assert float(repeated.guide_.map_step) == float(alone.guide_.map_step) > 0

    rng = np.random.default_rng(0)
    noise = [rng.normal(0, 0.004, (SIDE, SIDE)).astype(np.float32) for _ in range(24)]
    slices = [Scan((TAUGHT[0].pixels + one).clip(0, 1)) for one in noise]
    much_the_same = make().fit(REFERENCES, slices, abnormal_masks=MASKS[:1] * 24)
    assert float(much_the_same.guide_.spread) > 0.8 * float(alone.guide_.spread)
    assert image_auroc(much_the_same) > image_auroc(memory) - 0.05


def test_what_the_abnormal_scans_taught_is_shown_where_it_is(guided):
    for scan, centre in zip(NEW[:3], PLACES[:3], strict=True):
        part = guided.predict([scan])[0].parts["abnormal scans"]
        assert part[mask_of(centre)].max() > 0.5
        assert part[mask_of(centre)].mean() > part[~mask_of(centre)].mean() + 0.2


def test_a_fit_that_is_stopped_or_fails_leaves_the_one_before(guided, monkeypatch):
    detector = make().fit(REFERENCES, TAUGHT, abnormal_masks=MASKS)

    def stop(event):
        raise Stopped

    with pytest.raises(Stopped):
        detector.fit(REFERENCES[:4], TAUGHT[:2], on_event=stop)
    monkeypatch.setattr(detector, "_guided", None)
    with pytest.raises(TypeError):
        detector.fit(REFERENCES[:4], TAUGHT[:2])
    monkeypatch.undo()
    assert detector.reference_scores_ == guided.reference_scores_
    assert detector.predict(NEW[:1])[0].score == guided.predict(NEW[:1])[0].score


def test_two_references_and_one_abnormal_scan_will_do():
    detector = make().fit(REFERENCES[:2], TAUGHT[:1])
    assert detector.n_abnormals_ == 1
    assert 0 < detector.predict(NEW[:1])[0].score < 1


@pytest.mark.parametrize("settings", [{"guidance": 3.0}, {"map_guidance": -1.0}, {"guide_shrinkage": 0.0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="guidance"):
        make(**settings)


@pytest.mark.parametrize(
    "wrong",
    [
        {"guide.weight.0": torch.zeros(2)},
        {"guide.weight.0": torch.zeros(128, dtype=torch.int32)},
        {"guide.spread": torch.tensor(0.0)},
        {"guide.score_step": torch.tensor(1e9)},
        {"guide.map_step": torch.tensor(-0.1)},
        {"guide.level": torch.tensor(float("nan"))},
        {"guide.offset": torch.zeros(2)},
        {"n_abnormals": torch.tensor(0)},
        {"n_abnormals": torch.tensor(float("inf"))},
    ],
)
def test_a_guide_that_is_none_is_refused(guided, wrong):
    state = guided.state()
    assert wrong.keys() <= state.keys()
    with pytest.raises(CheckpointError, match="guide"):
        reloaded(guided, {**state, **wrong})


def test_weights_beyond_all_measure_give_numbers_all_the_same(guided):
    state = guided.state()
    copy = reloaded(guided, {**state, "guide.weight.0": 3e38 * (-1.0) ** torch.arange(len(state["guide.weight.0"]))})
    assert np.isfinite(copy.predict(NEW[:1])[0].map).all()


def test_without_guidance_it_is_the_patch_memory(memory):
    bare = make(guidance=0.0, map_guidance=0.0).fit(REFERENCES, TAUGHT, abnormal_masks=MASKS)
    assert bare.reference_scores_ == pytest.approx(memory.reference_scores_, abs=1e-6)
    np.testing.assert_allclose(bare.predict(NEW[:1])[0].map, memory.predict(NEW[:1])[0].map, atol=1e-6)
