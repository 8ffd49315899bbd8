"""Every method beside the default and the patch memory, through the protocol that app and command line use."""

import numpy as np
import pytest
import torch
from detector_scans import SIDE, lesion_scan, normal_scan
from sklearn.metrics import roc_auc_score

from fmclip.checkpoint import load_adapter, save_adapter
from fmclip.detectors import DETECTORS, Ready, StageStarted, Step
from fmclip.detectors.log_odds import MAX_SLOPE, map_scale
from fmclip.errors import CheckpointError, NotFittedError, ReferenceSetError, Stopped
from fmclip.scans import Scan
from fmclip.towers import get_tower

REFERENCES = [normal_scan(seed) for seed in range(6)]
CENTRES = [(20 + 4 * (place % 6), 44 - 5 * (place % 5)) for place in range(12)]
LESIONS = [lesion_scan(40 + place, centre) for place, centre in enumerate(CENTRES[:6])]
TEST_NORMALS = [normal_scan(seed) for seed in range(60, 72)]
TEST_LESIONS = [lesion_scan(80 + place, centre) for place, centre in enumerate(CENTRES)]
TRAINED = ["two_layer", "madclip", "conrad"]
WITH_ABNORMALS = ["two_layer", "madclip", "conrad", "guided_memory"]
WITHOUT = ["two_layer", "conrad"]
QUICK = {
    "cosine": {},
    "guided_memory": {},
    "two_layer": {"epochs": 60, "folds": 2, "pool_size": 64, "copies": 1},
    "madclip": {"epochs": 10, "folds": 2, "copies": 1, "synonyms": 1, "hidden": 32},
    "conrad": {"epochs": 12, "lr": 0.005, "folds": 2, "copies": 1, "pool_size": 64, "context_tokens": 2},
}
TOWERS = {**dict.fromkeys(["cosine", "two_layer", "madclip"], "tiny-resnet"), "guided_memory": "mini"}
GOOD = {
    "two_layer": 0.9,
    "madclip": 0.9,
    "guided_memory": 0.9,
    "conrad": 0.7,
}  # image AUROC; random blocks blur a lesion over the picture
SYNTHETIC_TOWERS = {
    "two_layer": "mini",
    "conrad": "tiny",
}  # a random tower hardly sees what the synthesis does to a smooth disc


def lesion_mask(centre: tuple[int, int]) -> np.ndarray:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    return np.hypot(rows - centre[0], columns - centre[1]) < 6


MASKS = [lesion_mask(centre) for centre in CENTRES[:6]]


def make(name: str, tower=None, **overrides):
    kind = DETECTORS[name]
    tower = tower or get_tower(TOWERS.get(name, "tiny"))
    return kind(tower, kind.config_class(scan_type="brain MRI", **{**QUICK[name], **overrides}))


def fit(name: str, tower=None, on_event=None, masks=MASKS, **overrides):
    detector = make(name, tower, **overrides)
    if name in WITH_ABNORMALS:
        return detector.fit(REFERENCES, LESIONS, abnormal_masks=masks, on_event=on_event)
    return detector.fit(REFERENCES, on_event=on_event)


@pytest.fixture(scope="module")
def fitted():
    """Each method learned once."""
    return {name: fit(name) for name in QUICK}


def image_auroc(detector) -> float:
    scores = [one.score for one in detector.predict([*TEST_NORMALS, *TEST_LESIONS])]
    return float(roc_auc_score([0] * len(TEST_NORMALS) + [1] * len(TEST_LESIONS), scores))


def pixel_auroc(detector) -> float:
    maps = [one.map for one in detector.predict(TEST_LESIONS)]
    truth = [lesion_mask(centre) for centre in CENTRES]
    return float(roc_auc_score(np.ravel(truth), np.ravel(maps)))


@pytest.mark.parametrize("name", sorted(QUICK))
def test_maps_and_scores_are_finite_chances_on_the_source_pixels(fitted, name):
    for prediction, shape in zip(
        fitted[name].predict([normal_scan(30, 40, 120), normal_scan(31, 120, 40)]), [(40, 120), (120, 40)], strict=True
    ):
        assert prediction.map.shape == shape
        assert prediction.map.dtype == np.float32
        assert np.isfinite(prediction.map).all()
        assert prediction.map.min() >= 0
        assert prediction.map.max() <= 1
        assert 0 <= prediction.score <= 1


@pytest.mark.parametrize("name", WITH_ABNORMALS)
def test_trained_on_lesions_it_tells_new_lesions_and_where_they_are(fitted, name):
    assert image_auroc(fitted[name]) > GOOD[name]
    assert pixel_auroc(fitted[name]) > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT)
def test_without_lesions_it_learns_from_synthetic_ones(name):
    detector = make(name, get_tower(SYNTHETIC_TOWERS[name]), folds=0).fit(REFERENCES)
    assert image_auroc(detector) > 0.65
    assert pixel_auroc(detector) > 0.8


@pytest.mark.parametrize("name", WITH_ABNORMALS)
def test_masks_may_be_missing_for_some_or_all_scans(name):
    some = fit(name, masks=[MASKS[0], *[None] * 5])
    none = fit(name, masks=None)
    assert image_auroc(some) > 0.6
    assert image_auroc(none) > 0.6
    assert np.isfinite(none.predict(TEST_LESIONS[:1])[0].map).all()


@pytest.mark.parametrize("name", WITH_ABNORMALS)
def test_masks_that_do_not_fit_the_scans_are_refused(name):
    with pytest.raises(ReferenceSetError, match="6 abnormal scans came with 1"):
        make(name).fit(REFERENCES, LESIONS, abnormal_masks=MASKS[:1])
    with pytest.raises(ReferenceSetError, match="another size"):
        make(name).fit(REFERENCES, LESIONS, abnormal_masks=[MASKS[0][:-1], *MASKS[1:]])


@pytest.mark.parametrize("name", sorted(QUICK))
def test_an_adapter_file_brings_back_the_same_map_and_threshold(fitted, name, tmp_path):
    detector = fitted[name]
    calibration = detector.calibration()
    save_adapter(tmp_path / "a.safetensors", detector, calibration)
    copy, again = load_adapter(tmp_path / "a.safetensors", tower=detector.tower)
    assert copy.config == detector.config
    assert again.threshold == calibration.threshold
    (new,), (old,) = copy.predict(TEST_LESIONS[:1]), detector.predict(TEST_LESIONS[:1])
    np.testing.assert_allclose(new.map, old.map, atol=1e-6)
    assert new.score == pytest.approx(old.score, rel=1e-4)  # 1 - cosine: a product of other alignment rounds otherwise


@pytest.mark.parametrize("name", sorted(QUICK))
def test_a_state_with_a_part_missing_or_misshapen_is_refused(fitted, name):
    whole = fitted[name].state()
    part = next(key for key in whole if whole[key].ndim)
    for state in ({k: v for k, v in whole.items() if k != part}, {**whole, part: whole[part][:-1]}):
        copy = make(name)
        copy.reference_scores_ = fitted[name].reference_scores_
        with pytest.raises(CheckpointError):
            copy.load_state(state)


@pytest.mark.parametrize("name", sorted(QUICK))
def test_a_scan_is_scored_alone(fitted, name):
    query, other = TEST_LESIONS[0], TEST_NORMALS[0]
    together = fitted[name].predict([other, query, other])[1]
    assert fitted[name].predict([query])[0].score == pytest.approx(together.score, rel=1e-4)


@pytest.mark.parametrize("name", sorted(QUICK))
def test_the_same_seed_gives_the_same_map(fitted, name):
    again = fit(name)
    assert np.array_equal(again.predict(TEST_LESIONS[:1])[0].map, fitted[name].predict(TEST_LESIONS[:1])[0].map)
    assert again.reference_scores_ == fitted[name].reference_scores_


@pytest.mark.parametrize("name", TRAINED)
def test_another_seed_gives_another_map(fitted, name):
    other = fit(name, seed=1)
    assert not np.array_equal(other.predict(TEST_LESIONS[:1])[0].map, fitted[name].predict(TEST_LESIONS[:1])[0].map)


@pytest.mark.parametrize("name", sorted(QUICK))
def test_too_few_references_are_refused_with_a_reason(name):
    with pytest.raises(ReferenceSetError, match="at least"):
        make(name).fit(REFERENCES[:1])


@pytest.mark.parametrize("name", sorted(QUICK))
def test_predicting_before_fitting_says_what_to_do(name):
    with pytest.raises(NotFittedError, match="adapt"):
        make(name).predict(TEST_LESIONS[:1])


@pytest.mark.parametrize("name", sorted(QUICK))
def test_presets_by_name(name):
    config_class = DETECTORS[name].config_class
    for preset in ("fast", "full"):
        config = config_class.preset(preset, scan_type="chest X-ray", seed=3)
        assert (config.scan_type, config.seed) == ("chest X-ray", 3)
        assert config_class.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("name", TRAINED)
def test_an_unknown_preset_is_named_with_the_known_ones(name):
    with pytest.raises(ValueError, match="fast"):
        DETECTORS[name].config_class.preset("slow")


@pytest.mark.parametrize("name", TRAINED)
def test_it_tells_what_it_does_and_counts_its_steps(name):
    events = []
    fit(name, on_event=events.append)
    started = {event.stage: event.steps for event in events if isinstance(event, StageStarted)}
    done = {event.stage: event.step for event in events if isinstance(event, Step)}
    assert {stage: steps for stage, steps in started.items() if steps} == done
    assert [event.stage for event in events if isinstance(event, Ready)] == ["training", "scores of the references"]
    assert all(np.isfinite(event.loss) for event in events if isinstance(event, Step) and event.stage == "training")


def stop_at(stage: str):
    def on_event(event):
        if isinstance(event, Step) and event.stage.startswith(stage):
            raise Stopped

    return on_event


@pytest.mark.parametrize("name", TRAINED)
def test_a_stop_before_anything_was_learned_is_passed_on(name):
    with pytest.raises(Stopped):
        fit(name, on_event=stop_at("training"))


def test_a_detector_counts_the_abnormal_scans_of_the_training_that_answers():
    detector = fit("two_layer", folds=0)
    assert detector.n_abnormals_ == len(LESIONS)
    detector.fit(REFERENCES, on_event=stop_at("training"))  # without any, and stopped: the network of before answers
    assert detector.n_abnormals_ == len(LESIONS)
    assert detector.fit(REFERENCES).n_abnormals_ == 0


@pytest.mark.parametrize("name", TRAINED)
def test_a_stop_while_the_references_are_scored_keeps_the_network(fitted, name):
    stopped = fit(name, on_event=stop_at("scores of the references"))
    unscored = fit(name, folds=0)
    assert stopped.reference_scores_ == unscored.reference_scores_
    assert stopped.predict(TEST_LESIONS[:1])[0].score == fitted[name].predict(TEST_LESIONS[:1])[0].score


@pytest.mark.parametrize("name", TRAINED)
def test_a_stop_in_a_second_fit_keeps_the_first(name):
    detector = fit(name)
    before = detector.predict(TEST_LESIONS[:1])[0]
    detector.fit(REFERENCES[:4], LESIONS, on_event=stop_at("training"))
    assert np.array_equal(detector.predict(TEST_LESIONS[:1])[0].map, before.map)


def test_cosine_scores_each_reference_against_the_mean_of_the_others(fitted):
    """The score of a reference is what a detector that never saw it gives it."""
    for place, scan in enumerate(REFERENCES):
        others = [one for one in REFERENCES if one is not scan]
        unseen = make("cosine").fit(others).predict([scan])[0].score
        assert fitted["cosine"].reference_scores_[place] == pytest.approx(unseen, rel=1e-3)


def test_maps_are_brought_to_the_scale_of_the_scores():
    generator = torch.Generator().manual_seed(0)
    scores, content = torch.randn(6, generator=generator) - 2, torch.ones(6, 8, 8, dtype=torch.bool)
    content[:, :4] = False
    maps = 0.1 * torch.randn(6, 4, 4, generator=generator)
    maps[:, :2] += 5  # hot, but in the letterbox bars
    slope, offset = map_scale(maps, scores, content)
    hottest = (slope * maps[:, 2:] + offset).flatten(1).amax(dim=1)
    assert float(hottest.mean()) == pytest.approx(float(scores.mean()), abs=1e-4)
    assert float(hottest.std()) == pytest.approx(float(scores.std()), rel=1e-4) or slope == MAX_SLOPE
    assert map_scale(torch.zeros(6, 4, 4), scores, content)[0] == MAX_SLOPE  # maps that are all alike
    assert map_scale(maps, torch.zeros(6), content)[0] == pytest.approx(1 / MAX_SLOPE)


def test_the_scale_of_cosine_maps_is_that_of_its_adapter(fitted):
    detector = make("cosine")
    detector.load_state({**fitted["cosine"].state(), "map_scale": torch.tensor([1.0, 0.0])})
    pixels, content = torch.rand(1, 3, SIDE, SIDE), torch.ones(1, SIDE, SIDE, dtype=torch.bool)
    plain, scaled = (one.map_squares(pixels, content)[0].logit() for one in (detector, fitted["cosine"]))
    slope, offset = fitted["cosine"].map_scale_
    torch.testing.assert_close(scaled, slope * plain + offset, rtol=1e-3, atol=1e-3)
    assert slope != 1


def test_cosine_ranks_a_scan_of_another_kind_above_every_reference(fitted):
    noise = Scan(np.random.default_rng(0).random((SIDE, SIDE), dtype=np.float32))
    prediction = fitted["cosine"].predict([noise])[0]
    assert prediction.score > max(fitted["cosine"].reference_scores_)
