"""What `predict` writes beside scores and pictures: report, NIfTI, DICOM objects."""

from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.uid import generate_uid
from scan_files import PATIENT, gradient, write_dicom, write_nifti
from typer.testing import CliRunner

from fmclip.cli import app


def call(*arguments: object):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    return result


@pytest.fixture
def scans(tmp_path) -> Path:
    """Folders `normal` (four DICOM files) and `query` (a DICOM file, and a NIfTI volume)."""
    generator = np.random.default_rng(0)
    for folder, count in (("normal", 4), ("query", 1)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            frame = (gradient(48, 60, 200) + generator.integers(0, 50, (48, 60))).astype(np.uint8)
            uids = {name: generate_uid() for name in ("StudyInstanceUID", "SeriesInstanceUID")}
            write_dicom(tmp_path / folder / f"{PATIENT}-{number}.dcm", frame, **uids)
    write_nifti(tmp_path / "query" / "v.nii", generator.random((30, 40, 5), np.float32))
    call("adapt", tmp_path / "normal", "--out", tmp_path / "a", "--tower", "tiny", "--method", "patch_memory")
    return tmp_path


def test_report_nifti_and_dicom_are_written_on_request(scans):
    out = scans / "out"
    options = ("--report", scans / "new" / "report.pdf", "--nifti", "--dicom-seg")
    result = call("predict", scans / "a", scans / "query", "--out", out, *options)
    report = (scans / "new" / "report.pdf").read_bytes()
    assert report.startswith(b"%PDF")
    assert PATIENT.encode() not in report
    stem = f"{PATIENT}-0"
    assert nibabel.load(out / f"{stem}_map.nii.gz").shape == (60, 48, 1)
    assert nibabel.load(out / "v_map.nii.gz").shape == (30, 40, 1)
    source = pydicom.dcmread(scans / "query" / f"{stem}.dcm")
    for name in ("seg", "overlay"):
        made = pydicom.dcmread(out / f"{stem}_{name}.dcm")
        assert made.StudyInstanceUID == source.StudyInstanceUID
        assert (made.Rows, made.Columns) == (48, 60)
        assert not made.PatientName
    assert not (out / "v_seg.dcm").exists()
    assert "scan 2 is not from a DICOM file" in result.stderr


def test_without_the_options_none_of_it_is_written(scans):
    out = scans / "out"
    call("predict", scans / "a", scans / "query", "--out", out)
    assert {path.suffix for path in out.iterdir()} == {".csv", ".json", ".png"}
