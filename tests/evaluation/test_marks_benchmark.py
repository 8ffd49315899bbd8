"""Marks that are burned into pictures are painted over, and nothing else is."""

import csv

import cv2
import numpy as np
import pytest

from benchmarks.copies import copy_datasets
from benchmarks.marks import copy_without_marks, marks, without_marks
from fmclip.errors import FmclipError
from fmclip.evaluation import load_datasets
from fmclip.evaluation.datasets import read_masks
from fmclip.scans import read_scan


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


def _manifest(root, *rows):
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


@pytest.fixture
def original(tissue, tmp_path):
    """A data set of two scans with names of the awkward kind, and the folder for its copy."""
    root = tmp_path / "from"
    (root / "set").mkdir(parents=True)
    cv2.imwrite(str(root / "set" / "a.jpg"), tissue)
    cv2.imwrite(str(root / "set" / "a.png"), np.zeros_like(tissue[:, :, 0]) + np.eye(256, dtype=np.uint8) * 255)
    cv2.imwrite(str(root / "set" / "b.bmp"), tissue[::-1])
    return root, tmp_path / "to"


def test_the_copy_keeps_labels_groups_and_masks(original, tissue):
    root, out = original
    names = ["dataset", "path", "label", "mask", "group"]
    _manifest(
        root, names, ["set", "set/a.jpg", "abnormal", "set/a.png", "g"], ["set", "set/b.bmp", "normal", "", "h"], ["b"]
    )
    with pytest.raises(FmclipError, match='"normal" or "abnormal"'):
        copy_without_marks(root, out, ["set"])
    _manifest(root, names, ["set", "set/a.jpg", "abnormal", "set/a.png", "g"], ["set", "set/b.bmp", "normal", "", "h"])
    assert copy_without_marks(root, out, ["set"])[0] == 2
    first, second = load_datasets(out)[0].cases
    assert (first.is_abnormal, first.group, second.is_abnormal, second.group) == (True, "g", False, "h")
    assert np.abs(read_scan(first.path).pixels * 255 - tissue[:, :, 0]).mean() < 3
    assert read_masks(first.masks, (256, 256)).sum() == 256
    assert not second.masks


def test_twins_stay_twins_where_only_their_pixels_tell(original, tissue):
    root, out = original
    cv2.imwrite(str(root / "set" / "c.png"), tissue[::-1])
    _manifest(root, ["dataset", "path", "label"], *(["set", f"set/{name}", "normal"] for name in ("b.bmp", "c.png")))
    copy_without_marks(root, out, None)
    groups = [case.group for case in load_datasets(out)[0].cases]
    assert groups == [case.group for case in load_datasets(root)[0].cases]
    looks = [[case.look for case in load_datasets(place)[0].cases] for place in (root, out)]
    assert looks[0] == looks[1]
    assert all(looks[0])
    assert len(set(groups)) == 1


def test_copies_go_nowhere_where_they_could_mix_with_something(original):
    root, out = original
    _manifest(root, ["dataset", "path", "label"], ["set", "set/b.bmp", "normal"])
    with pytest.raises(FmclipError, match="outside of it"):
        copy_without_marks(root, root / "copy", None)
    out.mkdir()
    (out / "something").touch()
    with pytest.raises(FmclipError, match="empty folder"):
        copy_without_marks(root, out, None)


def test_copies_stay_twins_however_they_are_changed(make_folders, write_manifest, tmp_path):
    root = make_folders(tmp_path / "data", normal=2, abnormal=1)
    rows = [
        {"dataset": "set", "path": f"blobs/{name}.png", "label": name.partition("/")[0], "group": str(group)}
        for group, name in enumerate(["normal/0", "normal/1", "abnormal/0", "normal/0"])
    ]
    noise = np.random.default_rng(0)
    copy_datasets(
        load_datasets(write_manifest(root, rows)), tmp_path / "to", lambda image: noise.integers(0, 255, image.shape)
    )
    first, second, third, last = (case.look for case in load_datasets(tmp_path / "to")[0].cases)
    assert first == last
    assert len({first, second, third}) == 3
