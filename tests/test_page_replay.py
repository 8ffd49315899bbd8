"""A download from the page done again from a shell: the run.json of the zip, with the files that were uploaded."""

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from page_scans import CPU, ME, save_picture, shown
from scan_files import write_dicom, write_nifti
from typer.testing import CliRunner

import fmclip.detectors.fusionmedclip
import fmclip.replay_cli
from fmclip.cli import app
from fmclip.page.handlers import Handlers

SHORT = {"stage2_epochs": 2, "stage3_epochs": 0, "pool_size": 4}


@pytest.fixture
def handlers(visitors, cache, monkeypatch) -> Handlers:
    monkeypatch.setitem(fmclip.detectors.fusionmedclip.PRESETS, "fast", SHORT)
    return Handlers(visitors, [], CPU)


def replayed(handlers: Handlers, folder: Path, slices: str, window: str) -> str:
    """Upload copies of normal/ and query/, adapt, download everything, and replay with the files themselves."""
    uploads = {}
    for name in ("normal", "query"):
        uploads[name] = []
        for file in sorted((folder / name).iterdir()):
            copy = folder / "cache" / f"{name}-{file.stem}" / file.name
            copy.parent.mkdir(parents=True)
            shutil.copy(file, copy)
            uploads[name].append(str(copy))
    handlers.add_references(uploads["normal"], slices, window, ME)
    assert "Adapted to 4 reference scans" in shown(handlers.adapt("brain MRI", "fast", ME))["status"]
    shown(handlers.add_queries(uploads["query"], slices, window, ME))
    file = shown(handlers.take_away("everything", ME))["everything_file"]["value"]
    with zipfile.ZipFile(file) as archive:
        archive.extract("run.json", folder)
    where = ["--references", folder / "normal", "--queries", folder / "query"]
    result = CliRunner().invoke(app, ["replay", *map(str, [folder / "run.json", *where])])
    assert result.exit_code == 0, result.output
    return result.output


def test_pictures_that_were_made_smaller_are_found_again(handlers, tmp_path):
    for name, seeds in (("normal", range(4)), ("query", (10, 11))):
        for seed in seeds:
            save_picture(tmp_path / name / f"{seed}.png", seed, side=1300)
    told = replayed(handlers, tmp_path, "middle", "as stored")
    assert "The run agrees" in told
    assert "scan 2" in told


def test_slices_of_volumes_and_dicom_files_through_a_window_are_found_again(handlers, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("normal", "query"):
        (tmp_path / name).mkdir()
    write_nifti(tmp_path / "normal" / "a.nii", rng.uniform(-900, 100, (40, 40, 9)).astype(np.float32))
    write_nifti(tmp_path / "query" / "b.nii.gz", rng.uniform(-900, 100, (40, 40, 9)).astype(np.float32))
    frames = rng.integers(0, 1000, (40, 40)).astype(np.uint16)
    write_dicom(tmp_path / "query" / "c.dcm", frames, RescaleIntercept=-900, RescaleSlope=1)
    told = replayed(handlers, tmp_path, "2-5", "lung")
    assert "The run agrees" in told
    assert told.count("scan") >= 5
