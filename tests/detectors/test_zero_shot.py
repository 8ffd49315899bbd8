"""Zero-shot use: what the prompts say, which towers are refused, and that words decide the answer."""

import copy
import json

import pytest
import torch
from detector_scans import SIDE, normal_scan
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer

from fmclip.detectors import DETECTORS
from fmclip.detectors.manual_prompts import manual_prompts
from fmclip.errors import TowerError
from fmclip.prompts import umls_concepts
from fmclip.scans import Scan
from fmclip.towers import Tower, get_tower
from fmclip.towers.tiny import TINY_CONFIGS, randomise

REFERENCES = [normal_scan(seed) for seed in range(4)]


def paired_tower(kind: str) -> Tower:
    """A random tower that says of itself that its halves belong together."""
    config = TINY_CONFIGS[kind]
    model = CLIP(**copy.deepcopy(config))
    randomise(model, torch.Generator().manual_seed(1))
    tokenizer = SimpleTokenizer(context_length=77)
    return Tower(model, tokenizer, name=kind, config=config, mean=(0.5,) * 3, std=(0.25,) * 3, paired=True)


@pytest.fixture(scope="module", params=["tiny", "tiny-resnet"])
def tower(request):
    return paired_tower(request.param)


def test_prompts_hold_every_umls_synonym_and_definition_and_the_scan_type():
    normal, abnormal = manual_prompts("brain MRI")
    for prompts, concept in ((normal, umls_concepts()["normal"]), (abnormal, umls_concepts()["abnormal"])):
        text = json.dumps(prompts).lower()
        assert all(synonym.lower() in text for synonym in [*concept["synonyms"], *concept["definitions"]])
        assert all("brain MRI" in prompt for prompt in prompts)
    assert not set(normal) & set(abnormal)


@pytest.mark.parametrize("name", ["tiny", "mini"])
def test_a_tower_whose_halves_were_not_trained_together_is_refused_with_the_reason(name):
    with pytest.raises(TowerError, match="never trained together"):
        DETECTORS["zero_shot"](get_tower(name))


def test_a_scan_like_the_abnormal_prompt_scores_higher_than_one_like_the_normal_prompt(tower, monkeypatch):
    """A stand-in image half that sees bright pictures as the words for abnormal, dark ones as those for normal."""
    detector = DETECTORS["zero_shot"](tower).fit(REFERENCES)
    normal, abnormal = detector.prompts_

    def embed(pixels):
        bright = pixels.mean(dim=(1, 2, 3))[:, None]
        return torch.nn.functional.normalize(bright * abnormal + (1 - bright) * normal, dim=1)

    monkeypatch.setattr(tower, "embed_images", embed)
    dark, bright = (Scan(torch.full((SIDE, SIDE), value).numpy()) for value in (0.1, 0.9))
    scores = [one.score for one in detector.predict([dark, bright])]
    assert scores[0] < 0.5 < scores[1]


def test_the_map_is_finite_and_differs_from_place_to_place(tower):
    detector = DETECTORS["zero_shot"](tower).fit(REFERENCES)
    prediction = detector.predict([normal_scan(9, 40, 120)])[0]
    assert prediction.map.shape == (40, 120)
    assert 0 <= prediction.map.min() < prediction.map.max() <= 1
    assert detector.predict(REFERENCES)[1].score == pytest.approx(detector.reference_scores_[1], rel=1e-4)


def test_the_scan_type_changes_the_prompts(tower):
    kind = DETECTORS["zero_shot"]
    brain, chest = (kind(tower, kind.config_class(scan_type=name)).fit(REFERENCES) for name in ("brain MRI", "chest"))
    assert brain.reference_scores_ != chest.reference_scores_


def test_prompts_survive_state_and_load(tower):
    detector = DETECTORS["zero_shot"](tower).fit(REFERENCES)
    again = DETECTORS["zero_shot"](tower, detector.config)
    again.reference_scores_ = detector.reference_scores_
    again.load_state(detector.state())
    assert (again.predict(REFERENCES[:1])[0].map == detector.predict(REFERENCES[:1])[0].map).all()
