"""Learned from scans as they are, asked about changed ones: the changes, and that no twin of a reference is asked."""

import shutil
import sys

import cv2
import numpy as np
import pytest

from benchmarks import scanner
from fmclip.evaluation import Results


@pytest.fixture
def picture():
    rng = np.random.default_rng(1)
    grey = cv2.resize(rng.integers(30, 220, (12, 12)).astype(np.uint8), (96, 96), interpolation=cv2.INTER_CUBIC)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _edges(image):
    return float(np.abs(cv2.Laplacian(image[:, :, 0].astype(np.float32), cv2.CV_32F)).mean())


def test_changes_do_what_they_are_called(picture):
    for change in scanner.CHANGES.values():
        assert change(picture).shape == picture.shape
        assert change(picture).dtype == np.uint8
    assert scanner.darker(picture).mean() < picture.mean() - 10
    assert scanner.brighter(picture).mean() > picture.mean() + 10
    assert scanner.flatter(picture).std() == pytest.approx(picture.std() / 2, rel=0.02)
    assert _edges(scanner.sharper(picture)) > 1.2 * _edges(picture)
    fine = np.where(np.indices((96, 96)).sum(0)[:, :, None] % 2, picture, 0).astype(np.uint8)
    assert scanner.coarser(fine)[:, :, 0].std() < 0.6 * fine[:, :, 0].std()
    assert abs(scanner.noisier(picture).astype(int) - picture).max() > 20


def test_the_changed_copy_is_asked_about_and_twins_of_references_are_not(
    make_folders, write_manifest, tmp_path, monkeypatch
):
    root = make_folders(tmp_path / "data", normal=24, abnormal=12)
    for number in range(6):  # copies that no group tells of
        shutil.copy(root / f"blobs/normal/{number}.png", root / f"blobs/normal/copy{number}.png")
    rows = []
    for label in ("normal", "abnormal"):
        for file in sorted((root / "blobs" / label).glob("*.png")):
            mask = f"blobs/masks/{file.name}" if label == "abnormal" else ""
            path = f"blobs/{label}/{file.name}"
            rows.append(
                {"dataset": "blobs", "path": path, "label": label, "mask": mask, "group": str(7919 * len(rows))}
            )
        write_manifest(root, rows)
    kept: list[Results] = []
    monkeypatch.setattr(scanner, "Results", lambda **given: kept.append(Results(**given)) or kept[-1])
    monkeypatch.setattr(scanner, "CHANGES", {"darker": scanner.darker})
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["scanner", str(root), "--tower=tiny", "--k=4", "--seeds=1", f"--out={out}"])
    scanner.main()
    plain, changed = kept[0].runs
    assert (plain.row.dataset, changed.row.dataset) == ("blobs", "blobs darker")
    assert changed.row.fit_on == "blobs"
    assert changed.scores.group == plain.scores.group  # the same scans are asked about
    assert changed.scores.case == plain.scores.case
    assert plain.row.n_normal == 3  # with their copies, which no group tells of, 8
    assert (plain.row.n_twins, changed.row.n_twins) == (0, 4)  # the references' own changed pictures
    assert changed.row.threshold == plain.row.threshold
    assert changed.scores.score != plain.scores.score
    assert "| blobs darker |" in (out / "scanner.md").read_text()
