"""MadCLIP's own choices: its layers, its loss, its ablations, and that it asks for abnormal scans."""

import numpy as np
import pytest
import torch
from detector_scans import lesion_scan, normal_scan

from fmclip.detectors import DETECTORS
from fmclip.detectors.madclip import _mean_inside, image_text_loss
from fmclip.errors import ReferenceSetError
from fmclip.towers import get_tower

NORMALS = [normal_scan(seed) for seed in range(4)]
LESIONS = [lesion_scan(40 + seed, (20 + 6 * seed, 40 - 4 * seed)) for seed in range(4)]
QUICK = {"epochs": 30, "folds": 0, "copies": 1, "synonyms": 1, "hidden": 32}
ABLATIONS = {
    "a": {"prompts": "fixed"},
    "b": {"objective": "generic"},
    "c": {"branches": "one"},
    "d": {"opposite_signal": False},
    "e": {"image_loss": "softmax"},
    "f": {"heads": "common"},
}


def fit(tower_name: str = "tiny-resnet", **overrides):
    kind = DETECTORS["madclip"]
    config = kind.config_class(scan_type="brain MRI", **{**QUICK, **overrides})
    return kind(get_tower(tower_name), config).fit(NORMALS, LESIONS)


@pytest.fixture(scope="module")
def full():
    return fit()


def test_the_defaults_are_the_papers():
    config = DETECTORS["madclip"].config_class.preset("paper")
    assert (config.lr, config.batch_size, config.epochs) == (1e-3, 16, 60)
    assert {name: getattr(config, name) for one in ABLATIONS.values() for name in one} == {
        "prompts": "learned",
        "objective": "scan_type",
        "branches": "two",
        "opposite_signal": True,
        "image_loss": "siglip",
        "heads": "separate",
    }


def test_without_abnormal_scans_it_says_what_is_missing():
    for nothing in (None, []):
        with pytest.raises(ReferenceSetError, match="abnormal scans"):
            DETECTORS["madclip"](get_tower("tiny-resnet")).fit(NORMALS, nothing)


@pytest.mark.parametrize("letter", sorted(ABLATIONS))
def test_each_ablation_learns_and_answers_otherwise(full, letter):
    ablated = fit(**ABLATIONS[letter])
    normals, lesions = (ablated.predict([scan(seed) for seed in range(70, 74)]) for scan in (normal_scan, lesion_scan))
    assert all(np.isfinite(one.map).all() for one in lesions)
    assert np.mean([one.score for one in lesions]) > np.mean([one.score for one in normals])
    assert not np.array_equal(lesions[0].map, full.predict([lesion_scan(70)])[0].map)


def test_one_branch_and_a_common_head_learn_less_weights(full):
    def count(detector) -> int:
        return sum(tensor.numel() for tensor in detector.state().values())

    assert count(fit(branches="one")) < 0.7 * count(full)
    assert count(fit(heads="common")) < count(full)


def test_a_transformer_is_read_at_its_four_quarters():
    state = fit("tiny", epochs=1).state()
    assert {name.split(".")[3] for name in state if name.startswith("network.branches.")} == {"0", "1", "2", "3"}


def test_siglip_lets_one_prompt_have_many_pictures_and_matches_a_sum_over_pairs():
    similarity = torch.tensor([[2.0, -1.0], [0.5, 0.3], [-1.0, 3.0]])
    labels = torch.tensor([0.0, 0.0, 1.0])
    pairs = [
        np.log1p(np.exp(-(1 if label == kind else -1) * similarity[row, kind].item()))
        for row, label in enumerate([0, 0, 1])
        for kind in (0, 1)
    ]
    assert image_text_loss(similarity, labels, "siglip").item() == pytest.approx(sum(pairs) / 3, rel=1e-5)
    both_low = image_text_loss(torch.full((1, 2), -4.0), labels[:1], "siglip")
    assert both_low > image_text_loss(torch.tensor([[4.0, -4.0]]), labels[:1], "siglip")
    competing = image_text_loss(torch.full((1, 2), -4.0), labels[:1], "softmax")
    assert competing.item() == pytest.approx(np.log(2), rel=1e-5)


def test_letterbox_bars_do_not_count_in_the_score():
    content = torch.zeros(1, 32, 32, dtype=torch.bool)
    content[:, 8:24] = True
    maps = torch.full((1, 4, 4), 0.25)
    maps[:, 0], maps[:, 3] = 0.9, 0.9  # in the bars
    assert _mean_inside(maps, content).tolist() == pytest.approx([0.25])


def test_a_score_is_that_of_the_places_of_the_scan(full):
    side = full.tower.image_size
    pixels, content = torch.rand(1, 3, side, side), torch.ones(1, side, side, dtype=torch.bool)
    content[:, side // 2 :] = False
    whole, part = (float(full.map_squares(pixels, own)[1]) for own in (torch.ones_like(content), content))
    assert whole != part
