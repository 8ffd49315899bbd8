"""Learned from one set, asked about another: the same scans whatever was learned from, and no reference."""

import sys

import pytest

from benchmarks import across
from fmclip.evaluation import Half, Results, load_datasets
from fmclip.evaluation.protocol import split_cases
from fmclip.towers import get_tower


def test_the_example_cases_are_data_sets_with_masks():
    found = across.example_datasets()
    assert set(across.PAIRS.values()) <= set(found)
    for dataset in found.values():
        abnormal = [case for case in dataset.cases if case.is_abnormal]
        assert len(dataset.cases) > 16 + len(abnormal)  # normal queries too
        assert abnormal
        assert all(case.path.is_file() for case in dataset.cases)
        assert all(mask.is_file() for case in abnormal for mask in case.masks)
        assert all(case.masks for case in abnormal)


def test_the_same_scans_are_asked_about_whatever_was_learned_from():
    tested, other = (across.example_datasets()[name] for name in across.PAIRS.values())
    for own, crossed in zip(*[iter(across.plans(tested, other, Half.ALL, 8, range(2)))] * 2, strict=True):
        (seed,) = own.seeds
        at_home = split_cases(tested.cases, 8, seed)
        away = split_cases(crossed.datasets[0].cases, 8, seed, fit_on=crossed.fit_on.cases)
        assert set(away.test) == set(at_home.test)
        assert not set(at_home.test) & set(at_home.references)
        assert set(away.references) <= set(other.cases)


def test_the_table_names_both_sets_and_how_many_scans_were_asked_about(make_folders, tmp_path, monkeypatch):
    root = make_folders(tmp_path / "data", normal=24, abnormal=12)
    (blobs,) = load_datasets(root)
    tiny = get_tower("tiny")
    monkeypatch.setattr(across, "PAIRS", {"blobs": "others"})
    monkeypatch.setattr(across, "METHODS", ("patch_memory",))
    monkeypatch.setattr(across, "get_tower", lambda _: tiny)
    monkeypatch.setattr(across, "example_datasets", lambda: {"others": across.replace(blobs, name="others")})
    kept: list[Results] = []
    monkeypatch.setattr(across, "Results", lambda **given: kept.append(Results(**given)) or kept[-1])
    monkeypatch.setattr(sys, "argv", ["across", str(root), "--k=4", "--seeds=1", f"--out={tmp_path / 'out'}"])
    across.main()
    asked = {(run.row.dataset, run.row.fit_on): (run.row.n_normal, run.row.n_abnormal) for run in kept[0].runs}
    assert set(asked) == {(one, other) for one in ("blobs", "others") for other in ("blobs", "others")}
    assert asked["blobs", "others"] == pytest.approx(asked["blobs", "blobs"], abs=4)  # twins of references apart
    page = (tmp_path / "out" / "across.md").read_text()
    assert "| others (20, 12) | others | patch_memory |" in page
