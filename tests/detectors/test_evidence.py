"""From evidence to scores and maps: no single patch decides, and map and score never contradict each other."""

import numpy as np
import pytest
import torch

from fmclip.detectors.evidence import Evidence, image_scores, peaks, predictions
from fmclip.scans import Letterbox


def test_one_odd_patch_counts_for_less_than_an_odd_region():
    patch, region = torch.zeros(1, 14, 14), torch.zeros(1, 14, 14)
    patch[0, 3, 3] = 1.8
    region[0, 2:4, 2:5] = 1.2
    both = torch.cat([patch, region])
    found = Evidence(both, both)
    torch.testing.assert_close(peaks(found.scored), torch.tensor([1.8 / 6, 1.2]))
    torch.testing.assert_close(image_scores(found.maps()), peaks(found.scored).double())


def test_the_map_shows_where_and_its_highest_place_is_the_score():
    generator = torch.Generator().manual_seed(0)
    scored, placed = torch.rand(3, 16, 16, generator=generator), torch.rand(3, 16, 16, generator=generator)
    found = Evidence(scored, placed)
    maps = found.maps()
    assert torch.equal(maps.flatten(1).argmax(dim=1), placed.flatten(1).argmax(dim=1))
    torch.testing.assert_close(maps.flatten(1).amax(dim=1), peaks(found.scored))
    alone = torch.cat([Evidence(one[None], other[None]).maps() for one, other in zip(scored, placed, strict=True)])
    torch.testing.assert_close(maps, alone)  # each scan by itself


def test_another_map_changes_where_and_never_the_score():
    first, second = torch.zeros(1, 14, 14), torch.zeros(1, 14, 14)
    first[0, 2, 2:8], second[0, 9, 2:8] = 1.0, 3.0
    mixed = Evidence(first, first).placed_with(second, 0.5)
    assert int(mixed.maps().flatten().argmax()) // 14 == 9
    torch.testing.assert_close(image_scores(mixed.maps()), image_scores(Evidence(first, first).maps()))


def test_a_scan_without_evidence_has_an_empty_map():
    nothing = torch.zeros(1, 8, 8)
    assert torch.equal(Evidence(nothing, nothing).maps(), nothing)


@pytest.mark.parametrize("shape", [(40, 100), (224, 224), (900, 500)])
def test_a_score_above_a_threshold_is_seen_in_the_map(shape):
    found = Evidence(torch.full((1, 14, 14), 1.1), torch.zeros(1, 14, 14))
    found.placed[0, 6, 7] = 0.7
    box = Letterbox.of(shape, 224)
    (prediction,) = predictions({}, found.maps(), [box], 224)
    assert prediction.map.shape == shape
    np.testing.assert_allclose(prediction.map.max(), prediction.score, rtol=1e-6)
