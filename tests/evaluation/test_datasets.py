"""Datasets from a manifest and from folders."""

import shutil
from dataclasses import replace

import cv2
import numpy as np
import pytest

from fmclip.errors import ScanError
from fmclip.evaluation import looks
from fmclip.evaluation.datasets import DatasetError, load_datasets, read_masks
from fmclip.evaluation.protocol import split_cases


def test_folders_are_a_dataset(make_folders, tmp_path):
    (dataset,) = load_datasets(make_folders(tmp_path, normal=3, abnormal=2))
    assert dataset.name == "blobs"
    assert dataset.scan_type == "medical scan"
    assert [case.is_abnormal for case in dataset.cases] == [False, False, False, True, True]
    assert [[mask.name for mask in case.masks] for case in dataset.cases] == [[], [], [], ["0.png"], ["1.png"]]


def test_masks_may_be_missing(make_folders, tmp_path):
    (dataset,) = load_datasets(make_folders(tmp_path, masks=False))
    assert not any(case.masks for case in dataset.cases)


def test_exact_copies_in_folders_share_a_group_and_other_files_are_passed_over(make_folders, tmp_path):
    root = make_folders(tmp_path, normal=3)
    data = (root / "blobs/normal/0.png").read_bytes()
    (root / "blobs/normal/copy.png").write_bytes(data)
    (root / "blobs/normal/LICENCE.txt").write_text("free")
    (dataset,) = load_datasets(root)
    normals = [case for case in dataset.cases if not case.is_abnormal]
    assert len(normals) == 4
    assert len({case.group for case in normals}) == 3
    assert dataset.notes == (
        "1 files that cannot be read as a scan left out",
        "1 scans look like copies of others (re-saved, mirrored, brighter or shifted) and share a group",
    )


def test_a_manifest_is_read(write_manifest, tmp_path):
    (tmp_path / "m.png").touch()
    rows = [
        {"dataset": "busi", "path": "a.png", "label": "normal", "group": "g1"},
        {"dataset": "other", "path": "b.png", "label": "abnormal", "mask": "m.png", "group": "g2"},
        {"dataset": "other", "path": "c.png", "label": "Normal", "group": "g3"},
    ]
    datasets = load_datasets(write_manifest(tmp_path, rows))
    assert [dataset.name for dataset in datasets] == ["busi", "other"]
    assert datasets[0].scan_type == "breast ultrasound"
    first, second = datasets[1].cases
    assert (first.path, first.masks, first.group) == (tmp_path / "b.png", (tmp_path / "m.png",), "g2")
    assert (second.masks, second.group) == ((), "g3")
    assert (first.is_abnormal, second.is_abnormal) == (True, False)


def test_copies_in_a_manifest_without_groups_share_one(make_folders, write_manifest, tmp_path):
    make_folders(tmp_path, normal=2)
    (tmp_path / "blobs/normal/copy.png").write_bytes((tmp_path / "blobs/normal/0.png").read_bytes())
    rows = [{"dataset": "a", "path": f"blobs/normal/{name}.png", "label": "normal"} for name in ("0", "copy", "1")]
    (dataset,) = load_datasets(write_manifest(tmp_path, rows))
    first, copy, other = (case.group for case in dataset.cases)
    assert first == copy != other


def test_copies_that_the_groups_of_a_manifest_miss_are_found_and_said(make_folders, write_manifest, tmp_path):
    make_folders(tmp_path, normal=3, abnormal=2)
    shutil.copy(tmp_path / "blobs/normal/0.png", tmp_path / "blobs/abnormal/copy.png")
    shutil.copy(tmp_path / "blobs/normal/1.png", tmp_path / "blobs/normal/again.png")
    names = ["normal/0", "normal/1", "normal/2", "abnormal/0", "abnormal/copy", "normal/again", "abnormal/none"]
    groups = ["a", "b", "c", "d", "e", "b", "f"]
    rows = [
        {"dataset": "set", "path": f"blobs/{name}.png", "label": name.partition("/")[0], "group": group}
        for name, group in zip(names, groups, strict=True)
    ]
    (dataset,) = load_datasets(write_manifest(tmp_path, rows))
    assert [case.group for case in dataset.cases] == groups
    looks = [case.look for case in dataset.cases]
    assert looks[0] == looks[4]
    assert looks[1] == looks[5]
    assert len(set(looks)) == 5
    assert looks[6] == ""  # no file of that name
    assert dataset.notes == (
        "1 scans look like copies of others (re-saved, mirrored, brighter or shifted) and share a group",
        "1 scans look like copies of others (re-saved, mirrored, brighter or shifted) in other groups",
    )
    split = split_cases(dataset.cases, 2, 0)
    assert sorted(case.group for case in (*split.references, *split.test)) == ["a", "b", "c", "d", "f"]


def test_looks_of_a_manifest_are_taken_as_they_are(make_folders, write_manifest, tmp_path):
    make_folders(tmp_path, normal=3)
    rows = [
        {"dataset": "set", "path": f"blobs/normal/{n}.png", "label": "normal", "group": group, "look": look}
        for n, (group, look) in enumerate([("a", "one"), ("", "one"), ("b", "two")])
    ]
    (dataset,) = load_datasets(write_manifest(tmp_path, rows))
    assert [(case.group, case.look) for case in dataset.cases] == [("a", "one"), ("one", "one"), ("b", "two")]
    rows[2]["look"] = "one"
    (other,) = load_datasets(write_manifest(tmp_path, rows))
    assert other.fingerprint() != dataset.fingerprint()


def test_very_many_scans_with_groups_are_not_compared(make_folders, write_manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(looks, "MOST_COMPARED", 1)
    make_folders(tmp_path, normal=3)
    rows = [
        {"dataset": "set", "path": f"blobs/normal/{n}.png", "label": "normal", "group": "" if n == 2 else str(n)}
        for n in range(3)
    ]
    (dataset,) = load_datasets(write_manifest(tmp_path, rows))
    assert [bool(case.look) for case in dataset.cases] == [False, False, True]
    assert dataset.notes == ("2 scans are too many to look for copies that their groups miss",)


def test_groups_of_one_name_in_two_datasets_are_not_learned_from_and_tested(write_manifest, tmp_path):
    """They may be one patient; what is left out is counted, since they may be mere numbers too."""
    rows = [
        {"dataset": dataset, "path": f"{dataset}{n}.png", "label": "normal" if n < 8 else "abnormal", "group": str(n)}
        for dataset in "AB"
        for n in range(12)
    ]
    first, second = load_datasets(write_manifest(tmp_path, rows))
    split = split_cases(second.cases, 4, 0, fit_on=first.cases)
    assert {case.group for case in split.references}.isdisjoint(case.group for case in split.test)
    assert (len(split.test), split.n_twins) == (8, 4)
    assert split_cases(second.cases, 4, 0).n_twins == 0  # of the same data set they are no test scans anyway


def test_a_fingerprint_counts_missing_files_as_missing(make_folders, tmp_path):
    (dataset,) = load_datasets(make_folders(tmp_path))
    whole = dataset.fingerprint()
    dataset.cases[0].path.unlink()
    without_a_scan = dataset.fingerprint()
    dataset.cases[-1].masks[0].unlink()
    assert len({whole, without_a_scan, dataset.fingerprint()}) == 3
    odd = replace(dataset, cases=(replace(dataset.cases[0], path=tmp_path / "x\0.png"),))  # a name that no file has
    assert odd.fingerprint()


def test_masks_that_a_manifest_names_but_are_not_there_are_counted(make_folders, write_manifest, tmp_path):
    make_folders(tmp_path)
    rows = [
        {
            "dataset": "a",
            "path": f"blobs/abnormal/{n}.png",
            "label": "abnormal",
            "mask": f"blobs/masks/{n}{'' if n < 3 else '-jane'}.png",
            "group": str(n),
        }
        for n in range(5)
    ]
    (dataset,) = load_datasets(write_manifest(tmp_path, rows))
    assert [len(case.masks) for case in dataset.cases] == [1, 1, 1, 0, 0]
    assert dataset.notes == ("2 masks that do not exist left out",)


def test_datasets_are_chosen_by_name(make_folders, tmp_path):
    make_folders(tmp_path, "first")
    make_folders(tmp_path, "second")
    assert [dataset.name for dataset in load_datasets(tmp_path, ["second"])] == ["second"]
    with pytest.raises(DatasetError, match="No dataset is called third; there are first, second"):
        load_datasets(tmp_path, ["third"])


def test_a_folder_without_datasets_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="holds no dataset"):
        load_datasets(tmp_path)
    with pytest.raises(DatasetError, match="not found"):
        load_datasets(tmp_path / "missing")


def test_a_manifest_that_cannot_be_used_says_why(write_manifest, tmp_path):
    write_manifest(tmp_path, [{"dataset": "a", "path": "a.png", "label": "ill"}])
    with pytest.raises(DatasetError, match="Line 2 of the manifest"):
        load_datasets(tmp_path)
    (tmp_path / "manifest.csv").write_text("dataset,file\n")
    with pytest.raises(DatasetError, match="lacks the column label, path"):
        load_datasets(tmp_path)


@pytest.mark.parametrize("white", [1, 255])
def test_masks_come_back_on_the_pixels_of_the_scan(white, tmp_path):
    mask = np.zeros((10, 20), np.uint8)
    mask[:5, :10] = white
    cv2.imwrite(str(tmp_path / "m.png"), mask)
    np.testing.assert_array_equal(read_masks([tmp_path / "m.png"], (10, 20)), mask > 0)
    doubled = read_masks([tmp_path / "m.png"], (20, 40))
    assert doubled[:10, :20].all()
    assert doubled.sum() == 200


def test_a_broken_mask_is_reported(tmp_path):
    (tmp_path / "m.png").write_text("no picture")
    with pytest.raises(ScanError, match="a mask"):
        read_masks([tmp_path / "m.png"], (10, 20))


def test_several_masks_of_a_scan_are_united(tmp_path):
    for name, rows in (("a", slice(0, 3)), ("b", slice(2, 5))):
        mask = np.zeros((10, 20), np.uint8)
        mask[rows] = 255
        cv2.imwrite(str(tmp_path / f"{name}.png"), mask)
    united = read_masks([tmp_path / "a.png", tmp_path / "b.png"], (10, 20))
    assert united[:5].all()
    assert not united[5:].any()
