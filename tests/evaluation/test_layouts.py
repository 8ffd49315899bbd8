"""Each layout is recognised and read: labels, masks, official parts, groups, and what is left out."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from fmclip.evaluation.datasets import Dataset, DatasetError, Part, load_datasets


@pytest.fixture
def write(tmp_path):
    """Write one different small picture for each path below a folder."""
    generator = np.random.default_rng(0)

    def write_all(*paths: str) -> Path:
        for path in paths:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(tmp_path / path), generator.integers(0, 255, (8, 8), dtype=np.uint8))
        return tmp_path

    return write_all


def _told(dataset: Dataset) -> list[tuple]:
    return [
        (case.path.name, case.is_abnormal, [mask.name for mask in case.masks], case.part and case.part.value)
        for case in dataset.cases
    ]


def test_a_root_that_is_a_dataset_is_called_like_its_folder(write):
    root = write("knees/normal/a.png", "knees/abnormal/b.png") / "knees"
    (dataset,) = load_datasets(root, ["knees"])
    assert _told(dataset) == [("a.png", False, [], None), ("b.png", True, [], None)]
    assert [own.name for own in load_datasets(root.parent)] == ["knees"]


def test_busi_unites_the_masks_of_a_scan_and_tests_none_of_them(write):
    names = ["benign (1).png", "benign (1)_mask.png", "benign (1)_mask_1.png", "benign (10).png"]
    root = write(
        "Dataset_BUSI/normal/normal (1).png",
        "Dataset_BUSI/normal/normal (1)_mask.png",
        "Dataset_BUSI/malignant/malignant (1).png",
        *(f"Dataset_BUSI/benign/{name}" for name in names),
    )
    (dataset,) = load_datasets(root)
    assert dataset.scan_type == "breast ultrasound"
    assert _told(dataset) == [
        ("normal (1).png", False, [], None),
        ("benign (1).png", True, ["benign (1)_mask.png", "benign (1)_mask_1.png"], None),
        ("benign (10).png", True, [], None),
        ("malignant (1).png", True, [], None),
    ]


def test_masks_of_no_scan_are_counted(write):
    names = ["a.png", "b_mask.png", "b_mask_1.png", "c_MASK_2.png", "d_mask.png", "jane.png", "n_mask.png"]
    root = write(
        "set/normal/n.png", *(f"set/abnormal/{name}.png" for name in "abc"), *(f"set/masks/{name}" for name in names)
    )
    (dataset,) = load_datasets(root)
    assert _told(dataset) == [
        ("n.png", False, [], None),
        ("a.png", True, ["a.png"], None),
        ("b.png", True, ["b_mask.png", "b_mask_1.png"], None),
        ("c.png", True, ["c_MASK_2.png"], None),
    ]
    assert dataset.notes == ("2 files among the masks that belong to no scan left out",)


@pytest.mark.parametrize(
    "paths",
    [
        ("normal/n.png", "benign/b.png", "benign/c_mask.png", "malignant/m.png", "malignant/b_mask.png"),
        (
            "train/good/t.png",
            "test/good/a.png",
            "test/Ungood/img/b.png",
            *(f"test/Ungood/label/{name}.png" for name in "cd"),
        ),
        ("train/good/t.png", "test/cut/a.png", "ground_truth/cut/b_mask.png", "ground_truth/cut/c.png"),
    ],
    ids=["BUSI", "BMAD", "MVTec"],
)
def test_other_layouts_count_them_too(write, paths):
    (dataset,) = load_datasets(write(*(f"set/{path}" for path in paths)))
    assert dataset.notes == ("2 files among the masks that belong to no scan left out",)


def test_yes_and_no_are_brain_mri(write):
    (dataset,) = load_datasets(write("archive/yes/Y1.png", "archive/no/1 no.png"))
    assert (dataset.name, dataset.scan_type) == ("archive", "brain MRI")
    assert _told(dataset) == [("1 no.png", False, [], None), ("Y1.png", True, [], None)]


@pytest.mark.parametrize("abnormal", ["Ungood", "ungood"])
def test_bmad_with_masks(write, abnormal):
    root = write(
        "BraTS2021_slice/train/good/t.png",
        "BraTS2021_slice/valid/good/img/v.png",
        f"BraTS2021_slice/valid/{abnormal}/img/w.png",
        f"BraTS2021_slice/valid/{abnormal}/label/w.png",
        "BraTS2021_slice/test/good/img/a.png",
        "BraTS2021_slice/test/good/label/a.png",
        f"BraTS2021_slice/test/{abnormal}/img/b.png",
        f"BraTS2021_slice/test/{abnormal}/label/b.png",
    )
    (dataset,) = load_datasets(root)
    assert dataset.scan_type == "brain MRI"
    assert _told(dataset) == [
        ("t.png", False, [], "train"),
        ("v.png", False, [], "train"),
        ("w.png", True, ["w.png"], "train"),
        ("a.png", False, [], "test"),
        ("b.png", True, ["b.png"], "test"),
    ]
    assert all("label" in mask.parts for case in dataset.cases for mask in case.masks)


def test_bmad_without_masks_holds_scans_directly(write):
    root = write("Chest-RSNA/train/good/t.png", "Chest-RSNA/test/good/a.png", "Chest-RSNA/test/Ungood/b.png")
    (dataset,) = load_datasets(root)
    assert dataset.scan_type == "chest X-ray"
    assert _told(dataset) == [
        ("t.png", False, [], "train"),
        ("a.png", False, [], "test"),
        ("b.png", True, [], "test"),
    ]


def test_mvtec_finds_the_masks_of_each_defect(write):
    root = write(
        "bottle/train/good/000.png",
        "bottle/test/good/000.png",
        "bottle/test/broken/000.png",
        "bottle/test/dirty/000.png",
        "bottle/ground_truth/broken/000_mask.png",
    )
    (dataset,) = load_datasets(root)
    assert _told(dataset) == [
        ("000.png", False, [], "train"),
        ("000.png", True, ["000_mask.png"], "test"),
        ("000.png", True, [], "test"),
        ("000.png", False, [], "test"),
    ]


CHEXPERT = """Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Edema,Pneumonia,Support Devices
CheXpert-v1.0-small/train/patient1/study1/view1_frontal.jpg,Female,68,Frontal,AP,1.0,,,1.0
CheXpert-v1.0-small/train/patient1/study1/view2_lateral.jpg,Female,68,Lateral,,1.0,,,
CheXpert-v1.0-small/train/patient2/study1/view1_frontal.jpg,Male,50,Frontal,PA,,1.0,-1.0,
CheXpert-v1.0-small/train/patient3/study1/view1_frontal.jpg,Male,50,Frontal,PA,,0.0,-1.0,
CheXpert-v1.0-small/train/patient4/study1/view1_frontal.jpg,Male,50,Frontal,PA,,,,1.0
CheXpert-v1.0-small/train/patient2/study2/view1_frontal.jpg,Male,50,Frontal,PA,1.0,,,
"""


def test_chexpert_takes_clear_frontal_views_and_counts_the_others(tmp_path):
    folder = tmp_path / "chest"
    folder.mkdir()
    (folder / "train.csv").write_text(CHEXPERT)
    (dataset,) = load_datasets(tmp_path)
    first, second, third = dataset.cases
    assert dataset.scan_type == "chest X-ray"
    assert [case.is_abnormal for case in dataset.cases] == [False, True, False]
    assert first.path == folder / "train/patient1/study1/view1_frontal.jpg"
    assert second.group == third.group != first.group  # a patient
    assert {case.part for case in dataset.cases} == {None}
    assert set(dataset.notes) == {
        "1 lateral views left out",
        "1 scans with uncertain findings only left out",
        "1 scans with neither a finding nor its absence left out",
    }


def test_chexpert_with_both_tables_tests_on_the_second(tmp_path):
    (tmp_path / "train.csv").write_text(CHEXPERT)
    (tmp_path / "valid.csv").write_text(CHEXPERT.replace("train/", "valid/").replace("patient", "patient6"))
    (dataset,) = load_datasets(tmp_path)
    assert [case.part for case in dataset.cases] == [Part.TRAIN] * 3 + [Part.TEST] * 3


def test_a_chexpert_table_with_other_marks_is_refused(tmp_path):
    (tmp_path / "train.csv").write_text(CHEXPERT.replace("-1.0", "maybe"))
    with pytest.raises(DatasetError, match="none of 1, 0, -1"):
        load_datasets(tmp_path)


@pytest.mark.parametrize("cut", [40, 4])  # within the path, and within the findings
def test_a_chexpert_table_that_was_cut_short_is_read_up_to_there(tmp_path, cut):
    lines = CHEXPERT.splitlines(keepends=True)
    (tmp_path / "train.csv").write_text("".join(lines[:-1]) + lines[-1][:-cut])
    (dataset,) = load_datasets(tmp_path)
    assert [case.is_abnormal for case in dataset.cases] == [False, True]
    assert "1 rows of train.csv with too few or too many columns left out" in dataset.notes


def test_rows_of_chexpert_with_too_many_columns_are_left_out(tmp_path):
    (tmp_path / "valid.csv").write_text(CHEXPERT.replace("Female,68,Frontal", "Female,6,8,Frontal"))
    (dataset,) = load_datasets(tmp_path)
    assert len(dataset.cases) == 2
    assert "1 rows of valid.csv with too few or too many columns left out" in dataset.notes


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("valid.csv", "Männlich".encode("latin-1"), r"Line 4 of valid.csv is not UTF-8 text: download it again, or"),
        ("train.csv", b"x" * 200_000, r"train.csv cannot be read from line 4 on: download it again, or"),
    ],
)
def test_a_chexpert_table_that_is_no_text_is_refused_with_its_line(tmp_path, name, value, message):
    lines = CHEXPERT.encode().splitlines(keepends=True)
    lines[3] = lines[3].replace(b"Male", value)
    (tmp_path / name).write_bytes(b"".join(lines))
    with pytest.raises(DatasetError, match=message):
        load_datasets(tmp_path)


def test_a_table_of_another_kind_beside_scans_is_passed_over(write):
    root = write("set/yes/a.png", "set/no/b.png")
    (root / "set/train.csv").write_bytes("Größe\n".encode("latin-1"))
    (dataset,) = load_datasets(root)
    assert len(dataset.cases) == 2
