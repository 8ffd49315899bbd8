"""Marks that are burned into pictures are painted over, and nothing else is."""

import csv

import cv2
import numpy as np
import pytest

from benchmarks.marks import copy_without_marks, marks, without_marks


@pytest.fixture
def tissue():
    rng = np.random.default_rng(0)
    grey = cv2.resize(rng.integers(40, 160, (24, 24)).astype(np.uint8), (256, 256), interpolation=cv2.INTER_CUBIC)
    return np.repeat(grey[:, :, None], 3, axis=2)


def test_text_calipers_and_colours_go(tissue):
    marked = tissue.copy()
    cv2.putText(marked, "RT AXILLA", (20, 240), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (250, 250, 250), 1)
    cv2.drawMarker(marked, (128, 100), (255, 255, 255), cv2.MARKER_CROSS, 9, 1)
    cv2.rectangle(marked, (200, 20), (230, 40), (0, 200, 255), -1)
    drawn = (marked != tissue).any(axis=2)
    assert marks(marked)[drawn].mean() > 0.95
    cleaned = without_marks(marked)
    assert np.abs(cleaned.astype(int) - tissue)[drawn].mean() < 0.3 * np.abs(marked.astype(int) - tissue)[drawn].mean()


def test_tissue_and_bright_lesions_stay(tissue):
    cv2.circle(tissue, (128, 128), 20, (240, 240, 240), -1)
    assert marks(tissue).mean() < 0.01


def test_the_copy_keeps_labels_groups_and_masks(tissue, tmp_path):
    root, out = tmp_path / "from", tmp_path / "to"
    (root / "set").mkdir(parents=True)
    cv2.imwrite(str(root / "set" / "a.jpg"), tissue)
    cv2.imwrite(str(root / "set" / "a_mask.png"), tissue[:, :, 0])
    names = ["dataset", "path", "label", "mask", "group"]
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [names, ["set", "set/a.jpg", "abnormal", "set/a_mask.png", "g"], ["b", "x", "", "", ""]]
        )
    count, _ = copy_without_marks(root, out, ["set"])
    with (out / "manifest.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert count == 1
    assert (row["path"], row["label"], row["group"]) == ("set/a.png", "abnormal", "g")
    assert cv2.imread(str(out / row["path"])).shape == tissue.shape
    assert (out / row["mask"]).read_bytes() == (root / row["mask"]).read_bytes()
    with pytest.raises(SystemExit, match="empty folder"):
        copy_without_marks(root, out, ["set"])
    with pytest.raises(SystemExit, match=r"no manifest\.csv"):
        copy_without_marks(tmp_path, out, None)
