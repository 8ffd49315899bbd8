"""ConRAD's own choices: prompts that see the picture, tokens in the blocks, and towers that have no blocks."""

import copy

import numpy as np
import pytest
import torch
from detector_scans import lesion_scan, normal_scan
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer

from fmclip.detectors import DETECTORS
from fmclip.errors import TowerError
from fmclip.towers import Tower, get_tower
from fmclip.towers.tiny import TINY_CONFIGS, randomise

NORMALS = [normal_scan(seed) for seed in range(4)]
LESIONS = [lesion_scan(40 + seed, (20 + 6 * seed, 40 - 4 * seed)) for seed in range(4)]
QUICK = {"epochs": 4, "lr": 0.01, "folds": 0, "copies": 0, "context_tokens": 2}


def make(tower: Tower, **overrides):
    kind = DETECTORS["conrad"]
    return kind(tower, kind.config_class(scan_type="brain MRI", **{**QUICK, **overrides}))


@pytest.mark.parametrize("name", ["tiny-resnet", "mini"])
def test_a_cnn_is_refused_with_the_reason(name):
    with pytest.raises(TowerError, match="vision transformer"):
        DETECTORS["conrad"](get_tower(name))


def test_a_transformer_from_timm_is_taken():
    config = {
        "embed_dim": 32,
        "vision_cfg": {"timm_model_name": "test_vit", "timm_proj": "linear", "timm_pool": "token", "image_size": 160},
        "text_cfg": TINY_CONFIGS["tiny"]["text_cfg"],
    }
    model = CLIP(**copy.deepcopy(config))
    randomise(model, torch.Generator().manual_seed(1))
    statistics = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    tower = Tower(model, SimpleTokenizer(), name="timm", config=config, paired=True, **statistics)
    detector = make(tower).fit(NORMALS, LESIONS)
    assert np.isfinite(detector.predict(LESIONS[:1])[0].map).all()


def test_every_part_is_trained():
    tower = get_tower("tiny")
    detector = make(tower).fit(NORMALS, LESIONS)
    untrained = detector._new_network(torch.Generator().manual_seed(0), None)
    start, end = untrained.state_dict(), detector.network_.state_dict()
    generator_free = {"prompts.contexts", "shift.2.weight", "shift.2.bias"}  # starts that are not drawn
    assert all(not torch.equal(start[name], end[name]) for name in generator_free)
    biases = [name for name in end if name.endswith("bias")]  # all start at 0
    assert all(end[name].abs().max() > 0 for name in biases)
    assert sum(name.startswith("projections.") for name in biases) == len(tower.block_widths)


@pytest.mark.parametrize("part", ["conditioned", "visual_prompts"])
def test_either_contribution_can_be_left_out_and_changes_the_map(part):
    tower = get_tower("tiny")
    whole, without = (make(tower, **{part: value}).fit(NORMALS, LESIONS) for value in (True, False))
    before, after = whole.predict(LESIONS[:1])[0], without.predict(LESIONS[:1])[0]
    assert np.isfinite(after.map).all()
    assert not np.allclose(before.map, after.map, atol=1e-4)


def test_fitting_leaves_the_shared_tower_untouched():
    tower = get_tower("tiny")
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before = tower.embed_images(pixels)
    make(tower).fit(NORMALS, LESIONS)
    assert torch.equal(before, tower.embed_images(pixels))
