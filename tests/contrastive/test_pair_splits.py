"""Patient-level splits: kept in a file, no patient and no image in two parts, loud where that fails."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fmclip.contrastive.config import PairsConfig
from fmclip.contrastive.pairs import ImageFile, Pair, collect
from fmclip.contrastive.runs import read_data
from fmclip.contrastive.sources import list_pairs
from fmclip.contrastive.splits import SPLITS, split_pairs
from fmclip.errors import PairError


def patients(data, part):
    return {pair.patient for pair in data.part(part)}


def test_all_pairs_of_a_patient_go_to_one_part(settings):
    data = read_data(settings())
    parts = [patients(data, name) for name in SPLITS]
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts)) == 20
    assert len(data.part("test")) == 6  # 0.15 of 40


def test_the_split_is_read_from_its_file_and_names_nobody(settings, table):
    config = settings()
    first = read_data(config)
    file = Path(config.results) / "run" / "splits.json"
    text = file.read_text()
    assert "patient" not in text
    assert ".png" not in text
    again = read_data(replace(config, pairs=replace(config.pairs, split_seed=99)))  # the file decides, not the seed
    assert [pair.key for pair in again.part("test")] == [pair.key for pair in first.part("test")]


def test_another_seed_draws_another_split(settings, tmp_path):
    keys = []
    for seed in (0, 1):
        config = settings(f"split_seed={seed}", f"split_file={tmp_path / f'{seed}.json'}")
        keys.append({pair.key for pair in read_data(config).part("test")})
    assert keys[0] != keys[1]


def test_a_patient_in_two_parts_is_refused(settings):
    config = settings()
    data = read_data(config)
    file = Path(config.results) / "run" / "splits.json"
    content = json.loads(file.read_text())
    key = next(place for place, part in content["places"].items() if part == "test")
    content["places"][key] = "train"
    file.write_text(json.dumps(content))
    with pytest.raises(PairError, match="Leak: 1 patients"):
        read_data(config)
    assert data.part("test")


def test_patients_that_share_an_image_stay_together(table, tmp_path):
    config = PairsConfig(path=str(table), val_share=0.3, test_share=0.3)
    pairs = list(list_pairs(config))
    twins = [replace(pair, key=f"twin {pair.key}", patient=f"twin of {pair.patient}") for pair in pairs]
    found, split = split_pairs(collect([*pairs, *twins]), config, tmp_path / "splits.json")
    places = {pair.key: name for name in SPLITS for pair in split.part(found, name)}
    assert all(places[f"twin {pair.key}"] == places[pair.key] for pair in pairs)


def test_one_image_in_two_parts_is_refused(table, tmp_path):
    pairs = [
        Pair("a", ImageFile(table.parent / "0.png"), "a spot", "one", "train"),
        Pair("b", ImageFile(table.parent / "0.png"), "a spot", "two", "test"),
    ]
    config = PairsConfig(path="x", val_share=0)
    with pytest.raises(PairError, match="Leak: 1 images"):
        split_pairs(collect(pairs), config, tmp_path / "splits.json")


def test_a_split_that_the_data_comes_with_is_kept(table, tmp_path):
    pairs = [
        replace(pair, split="test" if n >= 30 else "train")
        for n, pair in enumerate(list_pairs(PairsConfig(path=str(table))))
    ]
    config = PairsConfig(path="x", val_share=0)
    found, split = split_pairs(collect(pairs), config, tmp_path / "own.json")
    assert [pair.key for pair in split.part(found, "test")] == [pair.key for pair in pairs[30:]]
    drawn = replace(config, own_split=False)
    found, split = split_pairs(collect(pairs), drawn, tmp_path / "drawn.json")
    assert len(split.part(found, "test")) == 4


def test_broken_images_and_empty_texts_are_counted_and_left_out(table, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    pairs = list(list_pairs(PairsConfig(path=str(table))))
    wrong = [
        Pair("empty", pairs[0].image, "", "x"),
        Pair("gone", ImageFile(tmp_path / "gone.png"), "a text", "y"),
        Pair("bad", ImageFile(bad), "a text", "z"),
    ]
    config = PairsConfig(path="x")
    for _ in range(2):  # drawn, then read from the file
        found, _ = split_pairs(collect([*pairs, *wrong]), config, tmp_path / "splits.json")
        assert found.skipped == {"empty text": 1, "image missing": 1, "image broken": 1}
        assert len(found.pairs) == 40
        assert "skipped: 1 empty text, 1 image broken, 1 image missing" in found.describe()


def test_a_split_of_other_data_is_refused(settings, tmp_path, table):
    config = settings()
    read_data(config)
    other = tmp_path / "other.jsonl"
    rows = [{"path": str(table.parent / f"{n}.png"), "text": "a", "patientid": n} for n in range(10)]
    other.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(PairError, match="made for other data"):
        read_data(replace(config, pairs=replace(config.pairs, path=str(other))))


def test_too_few_patients_for_three_parts_say_so(table, tmp_path):
    pairs = list(list_pairs(PairsConfig(path=str(table))))[:2]
    with pytest.raises(PairError, match="is empty: there are too few patients"):
        split_pairs(collect(pairs), PairsConfig(path="x"), tmp_path / "splits.json")


def test_only_so_many_patients_are_used(settings):
    data = read_data(settings("max_patients=9", "val_share=0.2", "test_share=0.2"))
    assert len({pair.patient for pair in data.part("all")}) == 9
    assert len(read_data(settings("max_patients=9")).part("all")) == 18
