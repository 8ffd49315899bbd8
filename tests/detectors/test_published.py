"""The rows of the dissertation's Table 8: what each trains, and that each answers."""

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
QUERIES = [normal_scan(70), lesion_scan(71)]
QUICK = {"epochs": 3, "stage3_epochs": 1, "pool_size": 24, "context_tokens": 2}


@pytest.fixture(scope="module")
def tower() -> Tower:
    config = TINY_CONFIGS["tiny"]
    model = CLIP(**copy.deepcopy(config))
    randomise(model, torch.Generator().manual_seed(1))
    statistics = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    return Tower(model, SimpleTokenizer(), name="tiny", config=config, paired=True, **statistics)


@pytest.fixture(scope="module")
def rows(tower):
    kind = DETECTORS["fusionmedclip_published"]
    return {
        row: kind(tower, kind.config_class.preset(f"row{row}", scan_type="brain MRI", **QUICK)).fit(NORMALS)
        for row in range(1, 7)
    }


def test_every_row_gives_finite_maps_and_scores_that_survive_state_and_load(rows):
    for detector in rows.values():
        prediction = detector.predict(QUERIES)[1]
        again = type(detector)(detector.tower, detector.config)
        again.reference_scores_ = detector.reference_scores_
        again.load_state(detector.state())
        assert np.isfinite(prediction.map).all()
        np.testing.assert_allclose(again.predict(QUERIES)[1].map, prediction.map, atol=1e-6)


def test_each_row_adds_one_part(rows):
    def parts(row: int) -> set[str]:
        return {name.split(".")[1] for name in rows[row].state() if name.startswith("network.")}

    assert parts(1) == parts(2) == set()
    assert parts(3) == parts(4) == {"prompts"}
    assert parts(5) == {"prompts", "alignment"}
    assert parts(6) == {"prompts", "alignment", "lora", "block"}


def test_rows_1_and_2_differ_in_the_tower_alone_and_the_others_in_their_answer(rows):
    maps = {row: detector.predict(QUERIES)[1].map for row, detector in rows.items()}
    assert np.array_equal(maps[1], maps[2])
    assert all(not np.array_equal(maps[row], maps[row + 1]) for row in range(2, 6))


def test_row_1_is_the_zero_shot_score(rows, tower):
    kind = DETECTORS["zero_shot"]
    zero_shot = kind(tower, kind.config_class(scan_type="brain MRI", temperature=0.07)).fit(NORMALS)
    for ours, theirs in zip(rows[1].predict(QUERIES), zero_shot.predict(QUERIES), strict=True):
        assert ours.score == pytest.approx(theirs.score, rel=1e-5)


def test_stage_3_moves_every_lora_pair(rows):
    assert all(weight.abs().max() > 0 for weight in rows[6].network_.lora)  # one of each pair starts at 0


def test_row_6_trains_with_the_dropout_of_table_a1_and_answers_without(rows, tower):
    kind = DETECTORS["fusionmedclip_published"]
    assert (rows[6].config.lora_dropout, rows[6].config.block_dropout) == (0.05, 0.1)
    network = rows[6].network_
    reads = rows[6]._read(torch.rand(1, 3, tower.image_size, tower.image_size))
    network.is_end_to_end = True
    with torch.no_grad():
        assert torch.equal(network(reads)[0], network(reads)[0])
        network.drop(torch.Generator().manual_seed(0))
        assert not torch.equal(network(reads)[0], network(reads)[0])
        network.drop(None)
    for part in ("lora_dropout", "block_dropout"):
        other = kind(tower, kind.config_class.preset("row6", scan_type="brain MRI", **QUICK, **{part: 0.0})).fit(
            NORMALS
        )
        assert not np.array_equal(other.predict(QUERIES)[1].map, rows[6].predict(QUERIES)[1].map)


def test_row_6_without_epochs_end_to_end_leaves_lora_as_it_starts(tower):
    kind = DETECTORS["fusionmedclip_published"]
    config = kind.config_class.preset("row6", scan_type="brain MRI", **{**QUICK, "stage3_epochs": 0})
    network = kind(tower, config).fit(NORMALS).network_
    assert sum(bool((weight == 0).all()) for weight in network.lora) == len(network.lora) / 2


def test_hand_written_words_need_a_tower_trained_on_pairs():
    kind = DETECTORS["fusionmedclip_published"]
    with pytest.raises(TowerError, match="never trained together"):
        kind(get_tower("tiny"), kind.config_class.preset("row1"))


def test_a_row_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="1 to 6"):
        DETECTORS["fusionmedclip_published"].config_class(row=7)
