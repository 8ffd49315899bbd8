import json
from collections import Counter

import numpy as np
import pytest
import torch

from fmclip.synthesis import TASKS, Augmentation, SynthesisConfig, View, apply_view, replay, synthesise_pool


@pytest.fixture
def normals(phantoms):
    scans = [phantoms["sonogram"](seed) for seed in range(3)]
    return [image for image, _ in scans], [content for _, content in scans]


@pytest.mark.parametrize("augmentation", [None, Augmentation(mirror=True)])
def test_every_pair_can_be_replayed_from_its_record(normals, augmentation):
    config = SynthesisConfig("breast ultrasound", augmentation=augmentation)
    pool = synthesise_pool(*normals, 24, torch.Generator().manual_seed(0), config)
    for pair in pool:
        again = replay(json.loads(json.dumps(pair.to_dict())), *normals)
        assert np.array_equal(pair.image, again.image)
        assert np.array_equal(pair.mask, again.mask)
        assert again.anomaly == pair.anomaly
        assert pair.mask.any() == (pair.anomaly is not None)
        assert not pair.image[~normals[1][pair.source]].any()  # the bars stay black


def test_tasks_and_sources_are_dealt_evenly(normals):
    pool = synthesise_pool(*normals, 36, torch.Generator().manual_seed(0))
    tasks = Counter(pair.anomaly.task if pair.anomaly else "identity" for pair in pool)
    assert sum(tasks.values()) == 36
    assert tasks["identity"] == 9
    assert set(tasks) == set(TASKS)
    assert set(Counter(pair.source for pair in pool).values()) == {12}


def test_same_seed_same_pool_and_another_seed_another(normals):
    one, same, other = (synthesise_pool(*normals, 8, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert all(np.array_equal(a.image, b.image) for a, b in zip(one, same, strict=True))
    assert not all(np.array_equal(a.image, b.image) for a, b in zip(one, other, strict=True))


def test_augmented_normals_differ_but_stay_close(normals):
    images, contents = normals
    config = SynthesisConfig(augmentation=Augmentation())
    pool = synthesise_pool(images, contents, 40, torch.Generator().manual_seed(0), config)
    for pair in (pair for pair in pool if pair.anomaly is None):
        source = images[pair.source]
        assert not np.array_equal(pair.image, source)
        assert abs(pair.image.mean() - source.mean()) < 0.1 * source.mean()
        assert (pair.image == pair.image[..., :1]).all()
        assert not pair.view.mirror


def test_view_moves_and_mirrors_inside_the_letterbox(phantoms):
    image, content = phantoms["sonogram"]()
    assert np.allclose(apply_view(View(), image, content), image, atol=1e-6)
    mirrored = apply_view(View(mirror=True), image, content)
    assert np.allclose(mirrored, image[:, ::-1], atol=1e-6)
    shifted = apply_view(View(right=0.125), image, content)
    assert np.allclose(shifted[12:-12, 12:], image[12:-12, :-12], atol=1e-3)
    assert np.allclose(apply_view(View(gain=0.5), image, content), image / 2, atol=1e-6)


def test_no_scans_or_missing_masks_are_named(normals):
    images, contents = normals
    with pytest.raises(ValueError, match="at least one scan"):
        synthesise_pool([], [], 4, torch.Generator())
    with pytest.raises(ValueError, match="3 and 2"):
        synthesise_pool(images, contents[:2], 4, torch.Generator())
    assert synthesise_pool(images, contents, 0, torch.Generator()) == []
