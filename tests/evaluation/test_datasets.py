"""Datasets from a manifest and from folders."""

import cv2
import numpy as np
import pytest

from fmclip.errors import ScanError
from fmclip.evaluation.datasets import DatasetError, load_datasets, read_masks


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
    assert dataset.notes == ("1 files that cannot be read as a scan left out",)


def test_a_manifest_is_read(write_manifest, tmp_path):
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
