"""The default detector and the patch memory, through the protocol that app, command line and evaluation use."""

import numpy as np
import pytest
import torch
from detector_scans import lesion_scan, normal_scan

from fmclip.detectors import (
    DETECTORS,
    FusionMedCLIP,
    FusionMedCLIPConfig,
    PatchMemory,
    Ready,
    StageStarted,
    Step,
    SyntheticExamples,
)
from fmclip.detectors.training import STAGE2, STAGE3
from fmclip.errors import CheckpointError, NotFittedError, ReferenceSetError, Stopped, TowerError
from fmclip.towers import get_tower

REFERENCES = [normal_scan(seed) for seed in range(6)]
QUICK = {"stage2_epochs": 6, "stage3_epochs": 3, "pool_size": 16}


def quick_config(**overrides) -> FusionMedCLIPConfig:
    return FusionMedCLIPConfig(scan_type="brain MRI", **{**QUICK, **overrides})


@pytest.fixture(scope="module", params=["tiny", "tiny-resnet"])
def tower(request):
    return get_tower(request.param)


@pytest.fixture(scope="module")
def fitted(tower):
    return FusionMedCLIP(tower, quick_config()).fit(REFERENCES)


@pytest.mark.parametrize("tower_name", ["tiny-resnet", pytest.param("mini", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [FusionMedCLIP.name, PatchMemory.name])
def test_lesions_lift_the_score_of_their_scan_above_nearly_all_normal_ones_and_are_where_the_map_is_hottest(
    tower_name, name
):
    tower = get_tower(tower_name)
    config = quick_config() if name == "fusionmedclip" else None
    detector = DETECTORS[name](tower, config).fit(REFERENCES)
    seeds = range(20, 28)
    normals, lesions = (
        [one.score for one in detector.predict([*map(draw, seeds)])] for draw in (normal_scan, lesion_scan)
    )
    assert all(with_it > without for with_it, without in zip(lesions, normals, strict=True))
    assert np.mean(np.greater.outer(lesions, normals)) > 0.85
    (lesion,) = detector.predict([lesion_scan(24)])
    row, column = np.unravel_index(lesion.map.argmax(), lesion.map.shape)
    assert np.hypot(row - 24, column - 38) < 16
    assert lesion.map.dtype == np.float32
    assert lesion.map.min() >= 0
    assert lesion.map.max() <= 1


def test_maps_lie_on_the_source_pixels_of_wide_and_tall_scans(fitted):
    wide, tall = fitted.predict([normal_scan(30, 40, 120), normal_scan(31, 120, 40)])
    assert wide.map.shape == (40, 120)
    assert tall.map.shape == (120, 40)
    assert set(wide.parts) == {"patch memory", "learned"}


def test_stage_2_changes_where_a_scan_deviates_and_never_whether(tower):
    queries = [lesion_scan(24), normal_scan(25)]
    trained = FusionMedCLIP(tower, quick_config(stage3_epochs=0, learned_share=0.5)).fit(REFERENCES)
    memory = PatchMemory(tower).fit(REFERENCES)
    assert trained.reference_scores_ == pytest.approx(memory.reference_scores_, rel=1e-5)
    for one, other in zip(trained.predict(queries), memory.predict(queries), strict=True):
        assert one.score == pytest.approx(other.score, rel=1e-5)
        assert abs(one.map - other.map).max() > 0.01
        assert one.map.max() == pytest.approx(one.score, rel=1e-5)


def test_a_scan_is_scored_alone(fitted):
    query, other = lesion_scan(24), normal_scan(25)
    together = fitted.predict([other, query, other])[1]
    assert fitted.predict([query])[0].score == pytest.approx(together.score, rel=1e-4)


def test_the_same_seed_gives_the_same_map_and_another_seed_another(tower, fitted):
    query = [lesion_scan(24)]
    again = FusionMedCLIP(tower, quick_config()).fit(REFERENCES)
    other = FusionMedCLIP(tower, quick_config(seed=1)).fit(REFERENCES)
    assert np.array_equal(fitted.predict(query)[0].map, again.predict(query)[0].map)
    assert not np.array_equal(fitted.predict(query)[0].map, other.predict(query)[0].map)


def test_fitting_leaves_the_shared_tower_untouched(tower):
    pixels = torch.rand(1, 3, tower.image_size, tower.image_size, generator=torch.Generator().manual_seed(0))
    before = [level.clone() for level in tower.features(pixels)]
    FusionMedCLIP(tower, quick_config()).fit(REFERENCES)
    for old, new in zip(before, tower.features(pixels), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("name", [FusionMedCLIP.name, PatchMemory.name])
def test_what_was_learned_survives_state_and_load(tower, name):
    config = quick_config() if name == "fusionmedclip" else None
    detector = DETECTORS[name](tower, config).fit(REFERENCES)
    copy = DETECTORS[name](tower, detector.config)
    copy.reference_scores_ = detector.reference_scores_
    copy.load_state(detector.state())
    query = [lesion_scan(24)]
    np.testing.assert_allclose(copy.predict(query)[0].map, detector.predict(query)[0].map, atol=1e-5)


def test_a_state_with_a_part_missing_or_misshapen_is_refused(tower, fitted):
    whole = fitted.state()
    for name in ("memory.bank.0", "network.prompts.contexts", "learned_level"):
        part = {key: value for key, value in whole.items() if key != name}
        bent = {**whole, name: torch.zeros(3, 5)}
        for state in (part, bent):
            copy = FusionMedCLIP(tower, fitted.config)
            copy.reference_scores_ = fitted.reference_scores_
            with pytest.raises(CheckpointError):
                copy.load_state(state)


def test_events_tell_the_story_in_order(tower):
    events = []
    FusionMedCLIP(tower, quick_config()).fit(REFERENCES, on_event=events.append)
    assert [event.stage for event in events if isinstance(event, Ready)] == ["patch memory", "stage 2", "stage 3"]
    steps = [event for event in events if isinstance(event, Step) and event.stage in (STAGE2, STAGE3)]
    assert all(np.isfinite(step.loss) for step in steps)
    assert [step.step for step in steps if step.stage == STAGE2] == [1, 2, 3, 4, 5]  # 6 scans x 6 epochs / 8
    shown = [event for event in events if isinstance(event, SyntheticExamples)]
    assert shown[0].examples[0].map is None
    assert shown[-1].examples[0].map.shape == (tower.image_size, tower.image_size)
    assert any(isinstance(event, StageStarted) and event.stage == STAGE3 for event in events)


def stop_at(stage: str, step: int):
    def on_event(event):
        if isinstance(event, Step) and event.stage == stage and event.step >= step:
            raise Stopped

    return on_event


def test_a_stop_in_stage_2_leaves_the_patch_memory(tower):
    stopped = FusionMedCLIP(tower, quick_config()).fit(REFERENCES, on_event=stop_at(STAGE2, 2))
    memory = PatchMemory(tower).fit(REFERENCES)
    query = [lesion_scan(24)]
    np.testing.assert_allclose(stopped.predict(query)[0].map, memory.predict(query)[0].map, atol=1e-6)


def test_a_stop_in_stage_3_leaves_stage_2(tower):
    stopped = FusionMedCLIP(tower, quick_config()).fit(REFERENCES, on_event=stop_at(STAGE3, 2))
    stage2 = FusionMedCLIP(tower, quick_config(stage3_epochs=0)).fit(REFERENCES)
    query = [lesion_scan(24)]
    assert np.array_equal(stopped.predict(query)[0].map, stage2.predict(query)[0].map)


def test_a_stop_before_the_first_answer_is_passed_on(tower):
    def stop(event):
        raise Stopped

    with pytest.raises(Stopped):
        FusionMedCLIP(tower, quick_config()).fit(REFERENCES, on_event=stop)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("name", [FusionMedCLIP.name, PatchMemory.name])
def test_too_few_references_are_refused_with_a_reason(tower, name, count):
    with pytest.raises(ReferenceSetError, match="at least"):
        DETECTORS[name](tower).fit(REFERENCES[:count])


def test_predicting_before_fitting_says_what_to_do(tower):
    with pytest.raises(NotFittedError, match="adapt"):
        FusionMedCLIP(tower).predict(REFERENCES[:1])


def test_presets(tower):
    assert FusionMedCLIPConfig.preset("fast").stage3_epochs == 0
    paper = FusionMedCLIPConfig.preset("paper", scan_type="chest X-ray")
    assert (paper.stage2_epochs, paper.stage3_epochs, paper.lora_rank, paper.context_tokens) == (200, 200, 8, 8)
    with pytest.raises(ValueError, match="fast"):
        FusionMedCLIPConfig.preset("slow")


def test_config_survives_json_form():
    config = quick_config(seed=3)
    assert FusionMedCLIPConfig.from_dict(config.to_dict()) == config


def test_plain_features_can_be_read_instead_of_residuals(tower):
    detector = FusionMedCLIP(tower, quick_config(features="raw", stage3_epochs=0)).fit(REFERENCES)
    assert np.isfinite(detector.predict([lesion_scan(24)])[0].score)


def test_an_unknown_tower_is_named():
    with pytest.raises(TowerError):
        get_tower("no-such-tower")
