"""The settings of the patch memory, and what its reference scores promise."""

import math

import numpy as np
import pytest
import torch
from detector_scans import lesion_scan, normal_scan

from fmclip.calibration import Calibration
from fmclip.checkpoint import load_adapter, save_adapter
from fmclip.detectors import PatchMemory
from fmclip.detectors.base import to_pixels
from fmclip.detectors.evidence import MEMORY_SPREAD, peaks, to_unit
from fmclip.detectors.patch_memory import PatchMemoryConfig, learn_memory, memory_scored
from fmclip.errors import TowerError
from fmclip.learning import Adapter
from fmclip.memory import ReferenceMemory
from fmclip.towers import get_tower
from fmclip.views import tower_views

REFERENCES = [normal_scan(seed) for seed in range(5)]
VARIANTS = [
    {"over": "patches"},
    {"over": "patches", "coreset": 0.25},
    {"levels": (1,)},
    {"copies": 1},
    {"over": "patches", "neighbours": 3},
    {"over": "patches", "reweighting": 4},
    {"over": "patches", "coreset": 0.5, "copies": 2, "neighbours": 2, "reweighting": 2},
]


@pytest.fixture(scope="module")
def tower():
    return get_tower("tiny-resnet")


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda settings: "-".join(settings))
def test_every_variant_finds_the_lesion_and_answers_the_same_from_a_file(tower, settings, tmp_path):
    plain = PatchMemory(tower).fit(REFERENCES)
    detector = PatchMemory(tower, PatchMemoryConfig(**settings)).fit(REFERENCES)
    scans = [normal_scan(24), lesion_scan(24)]
    normal, lesion = detector.predict(scans)
    assert lesion.score > normal.score
    row, column = np.unravel_index(lesion.map.argmax(), lesion.map.shape)
    assert np.hypot(row - 24, column - 38) < 16
    assert not np.array_equal(lesion.map, plain.predict(scans)[1].map)  # the setting does something

    save_adapter(tmp_path / "a.safetensors", detector, detector.calibration())
    back, _ = load_adapter(tmp_path / "a.safetensors", tower=tower)
    assert back.config == detector.config
    np.testing.assert_array_equal(back.predict(scans)[1].map, lesion.map)


def test_a_coreset_makes_the_memory_smaller_and_keeps_every_reference(tower):
    whole = PatchMemory(tower).fit(REFERENCES).memory_
    small = PatchMemory(tower, PatchMemoryConfig(over="patches", coreset=0.1)).fit(REFERENCES).memory_
    assert len(small.owner) <= 0.1 * len(whole.owner) + 1 + len(REFERENCES)
    assert set(small.owner.tolist()) == set(range(len(REFERENCES)))


def test_copies_are_remembered_as_parts_of_the_scan_that_they_were_made_from(tower):
    plain, varied = (PatchMemory(tower, PatchMemoryConfig(copies=copies)).fit(REFERENCES).memory_ for copies in (0, 2))
    assert torch.equal(varied.owner.bincount(), 3 * plain.owner.bincount())
    size = int((plain.owner == 0).sum())  # the first scan, then its copies
    assert not torch.allclose(varied.bank[0][:size], varied.bank[0][size : 2 * size])


@pytest.mark.parametrize("wrong", [{"coreset": 0.0}, {"coreset": 1.5}, {"neighbours": 0}, {"copies": -1}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="coreset lies above 0"):
        PatchMemoryConfig(**wrong)


@pytest.mark.parametrize("wrong", [{"coreset": 0.5}, {"neighbours": 2}, {"reweighting": 1}])
def test_what_mixes_the_patches_of_all_references_is_not_averaged_over_them(wrong):
    with pytest.raises(ValueError, match="set over=patches"):
        PatchMemoryConfig(**wrong)


def test_a_level_that_the_tower_lacks_is_refused(tower):
    with pytest.raises(TowerError, match="levels 0 to"):
        PatchMemory(tower, PatchMemoryConfig(levels=(9,))).fit(REFERENCES)


def test_scores_of_four_references_stand_for_scans_that_are_compared_with_four(tower):
    """Plain leave-one-out compares with three, and lies above what new normal scans get."""
    detector = PatchMemory(tower).fit(REFERENCES[:4])
    new = np.array([one.score for one in detector.predict([normal_scan(seed) for seed in range(40, 64)])])
    memory = detector.memory_
    assert memory.references == 4
    pixels, content, _ = to_pixels(REFERENCES[:4], detector.tower)
    honest = memory.leave_one_out(detector.tower.features(pixels), content)
    plain = float(
        to_unit(peaks(memory_scored(memory.relative(honest), memory.views, content, detector.config.smoothing))).mean()
    )
    references = np.array(detector.reference_scores_)
    assert abs(references.mean() - new.mean()) < abs(plain - new.mean())


def test_the_threshold_of_a_few_references_knows_how_far_such_scores_lie_apart(tower):
    detector = PatchMemory(tower).fit(REFERENCES)
    calibration = detector.calibration()
    assert calibration == Calibration.from_scores(detector.reference_scores_, MEMORY_SPREAD)
    assert calibration.threshold != Calibration.from_scores(detector.reference_scores_).threshold
    assert Adapter.of(detector).calibration() == calibration  # the page takes it from there


@torch.no_grad()
def test_views_that_say_only_where_do_not_change_how_scores_are_carried_on(tower):
    own = tower.for_patches()
    pixels, content, _ = to_pixels(REFERENCES, own)
    features = own.features(pixels)

    def learn(features, content, references, views):
        return ReferenceMemory.learn(features, content, views, references=references)

    views = tower_views(own)
    scored = [row for row, view in enumerate(views) if view.weight > 0]
    assert len(scored) == len(views) - 1
    memory, carried = learn_memory(features, content, learn, views, 5, 0.1, 0.4)
    _, alone = learn_memory(features, content, learn, [views[row] for row in scored], 5, 0.1, 0.4)
    torch.testing.assert_close(carried[:, scored], alone)
    logs = []
    for dropped in range(4):  # the definition, over all views
        kept = [row for row in range(5) if row != dropped]
        fewer = learn([one[kept] for one in features], content[kept], 4, views)
        longer = fewer.leave_one_out([one[kept] for one in features], content[kept])
        longer = longer * (fewer.scale / memory.scale).view(-1, 1, 1)
        nearer = memory.leave_one_out(features, content)[kept]
        near, far = (peaks(memory_scored(memory.relative(one), views, content[kept], 0.4)) for one in (nearer, longer))
        logs.append((near / far).log().mean())
    factor = (torch.stack(logs).mean().clamp_max(0) * math.log(5 / 4) / math.log(4 / 3)).exp()
    assert factor < 0.99
    torch.testing.assert_close(carried, memory.leave_one_out(features, content) * factor)
