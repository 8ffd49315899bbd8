"""Features that a fit looks at again."""

import torch

from fmclip.detectors.seen_features import SeenFeatures
from fmclip.towers import get_tower


def test_what_was_seen_is_not_computed_again_and_is_the_same(monkeypatch):
    tower = get_tower("tiny")
    seen, asked = SeenFeatures(tower), []
    features = tower.features
    monkeypatch.setattr(tower, "features", lambda pixels, levels=None: asked.append(len(pixels)) or features(pixels))
    pixels = torch.rand(3, 3, tower.image_size, tower.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = features(pixels)
    seen.features(pixels[:2])
    again = seen.features(pixels[[2, 0, 1]])  # in another order, with a new one
    assert asked == [2, 1]
    for one, other in zip(again, expected, strict=True):
        torch.testing.assert_close(one, other[[2, 0, 1]], atol=1e-5, rtol=1e-5)


def test_no_more_than_the_limit_is_kept(monkeypatch):
    from fmclip.detectors import seen_features

    monkeypatch.setattr(seen_features, "KEPT_BYTES", 0)
    tower = get_tower("tiny")
    seen = SeenFeatures(tower)
    pixels = torch.rand(2, 3, tower.image_size, tower.image_size, generator=torch.Generator().manual_seed(0))
    first, second = seen.features(pixels), seen.features(pixels)
    assert len(seen._kept) == 0
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
