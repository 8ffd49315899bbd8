"""An adapter, and an archive of scans in a folder."""

from pathlib import Path

import pytest
from archive_scans import BROKEN, COUNT, MISSING, SECRET, draw, rows, write_manifest

from fmclip.checkpoint import save_adapter
from fmclip.detectors import DETECTORS
from fmclip.scans import read_scans
from fmclip.towers import get_tower


@pytest.fixture(scope="session")
def adapter(tmp_path_factory) -> Path:
    """A patch memory of four scans on the tower `tiny`."""
    folder = tmp_path_factory.mktemp("adapter")
    normals, _ = read_scans([draw(folder / f"{seed}.png", seed) for seed in range(4)])
    detector = DETECTORS["patch_memory"](get_tower("tiny")).fit(normals)
    assert detector.reference_scores_ is not None
    save_adapter(folder / "adapter.safetensors", detector, detector.calibration())
    return folder / "adapter.safetensors"


@pytest.fixture
def manifest(tmp_path) -> Path:
    """A table of 22 scans, of which one is broken and one is not there."""
    folder = tmp_path / f"{SECRET}-archive"
    folder.mkdir()
    for number in range(COUNT):
        draw(folder / f"{SECRET}-{number:03d}.png", 100 + number, blob=number % 5 == 0)
    (folder / f"{SECRET}-{BROKEN:03d}.png").write_text("no picture")
    (folder / f"{SECRET}-{MISSING:03d}.png").unlink()
    return write_manifest(folder / "manifest.csv", rows(COUNT))
