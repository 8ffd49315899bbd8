"""anomalib's models on our towers; those that need anomalib itself are skipped where it is not installed."""

import copy
import importlib.util

import numpy as np
import pytest
import torch
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer

from benchmarks.peers import PEERS
from fmclip.errors import FmclipError, TowerError
from fmclip.scans import Scan
from fmclip.towers import Tower, get_tower
from fmclip.towers.tiny import TINY_CONFIGS, randomise

HAS_ANOMALIB = importlib.util.find_spec("anomalib") is not None
needs_anomalib = pytest.mark.skipif(not HAS_ANOMALIB, reason="anomalib is not installed")


def picture(seed: int, spot: bool = False) -> Scan:
    pixels = 0.4 + 0.05 * np.random.default_rng(seed).random((64, 64), dtype=np.float32)
    if spot:
        pixels[16:28, 36:48] = 0.95
    return Scan(pixels)


@pytest.fixture(scope="module")
def paired() -> Tower:
    """A random ViT that says of itself that its halves belong together; windows of tokens need a grid of some size."""
    config = TINY_CONFIGS["tiny"]
    model = CLIP(**copy.deepcopy(config))
    randomise(model, torch.Generator().manual_seed(1))
    statistics = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    return Tower(model, SimpleTokenizer(), name="paired", config=config, paired=True, **statistics)


@needs_anomalib
@pytest.mark.parametrize(
    ("name", "tower_name"),
    [
        ("anomalib_patchcore", "tiny-resnet"),
        ("anomalib_patchcore", "tiny"),
        ("anomalib_padim", "tiny-resnet"),
        ("anomalib_anomalydino", "tiny"),
    ],
)
def test_a_spot_scores_above_plain_pictures_and_the_fit_can_be_repeated(name, tower_name):
    peer = PEERS[name](get_tower(tower_name)).fit([picture(seed) for seed in range(5)])
    queries = [*(picture(seed) for seed in range(10, 13)), picture(20, spot=True)]
    *normals, spot = peer.predict(queries)
    assert spot.score > max(one.score for one in normals)
    assert spot.map.shape == (64, 64)
    assert np.isfinite(spot.map).all()
    assert len(peer.reference_scores_) == 5
    again = PEERS[name](get_tower(tower_name)).fit([picture(seed) for seed in range(5)])
    assert again.predict(queries)[-1].score == spot.score


@needs_anomalib
def test_winclip_runs_on_a_paired_vit_and_leaves_it_as_it_was(paired):
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before = paired.embed_images(pixels)
    peer = PEERS["anomalib_winclip"](paired).fit([picture(seed) for seed in range(3)])
    prediction = peer.predict([picture(20, spot=True)])[0]
    assert np.isfinite(prediction.map).all()
    assert torch.equal(before, paired.embed_images(pixels))


@pytest.mark.parametrize(
    ("name", "tower_name", "reason"),
    [
        ("anomalib_winclip", "tiny", "never trained together"),
        ("anomalib_winclip", "mini", "never trained together"),
        ("anomalib_anomalydino", "tiny-resnet", "vision transformer"),
    ],
)
def test_a_peer_that_cannot_take_a_tower_says_why(name, tower_name, reason):
    with pytest.raises(TowerError, match=reason):
        PEERS[name](get_tower(tower_name))


@pytest.mark.skipif(HAS_ANOMALIB, reason="anomalib is installed")
def test_without_anomalib_it_says_what_to_install():
    with pytest.raises(FmclipError, match="peers"):
        PEERS["anomalib_patchcore"](get_tower("tiny")).fit([picture(seed) for seed in range(3)])
