"""DICOM objects read back: the mask on the source's pixels, what they refer to, and that nobody is named."""

from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.uid import generate_uid
from report_findings import find_square, make_scan
from scan_files import PATIENT, dicom_sample, gradient, read_dicom_sample, write_dicom

from fmclip.errors import FmclipError
from fmclip.report.dicom import can_export, save_secondary_capture, save_segmentation
from fmclip.scans import Scan, read_scan, shrink

IDENTITY = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate")
UIDS = {name: generate_uid() for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")}


def both(folder: Path, scan: Scan, score: float = 0.9) -> tuple[highdicom.seg.Segmentation, pydicom.Dataset]:
    finding = find_square(scan, score)
    save_segmentation(folder / "seg.dcm", finding)
    save_secondary_capture(folder / "sc.dcm", finding)
    return highdicom.seg.segread(folder / "seg.dcm"), pydicom.dcmread(folder / "sc.dcm")


def mask_of(segmentation: highdicom.seg.Segmentation) -> np.ndarray:
    return np.squeeze(segmentation.pixel_array) > 0


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm", "examples_palette.dcm", "examples_ybr_color.dcm"])
def test_the_segmentation_is_the_region_above_the_threshold_on_the_source(tmp_path, name):
    scan, stored = read_scan(dicom_sample(name)), read_dicom_sample(name)
    segmentation, _ = both(tmp_path, scan)
    np.testing.assert_array_equal(mask_of(segmentation), find_square(scan, 0.9).map > 0.5)
    assert segmentation.StudyInstanceUID == stored.StudyInstanceUID
    assert segmentation.SeriesInstanceUID != stored.SeriesInstanceUID
    (image,) = segmentation.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0].SourceImageSequence
    assert image.ReferencedSOPInstanceUID == stored.SOPInstanceUID
    assert image.ReferencedSOPClassUID == stored.SOPClassUID
    series = segmentation.ReferencedSeriesSequence[0]
    assert series.SeriesInstanceUID == stored.SeriesInstanceUID
    assert series.ReferencedInstanceSequence[0].ReferencedSOPInstanceUID == stored.SOPInstanceUID


def test_the_segmentation_lies_where_the_slice_lies(tmp_path):
    stored = read_dicom_sample("CT_small.dcm")
    segmentation, _ = both(tmp_path, read_scan(dicom_sample("CT_small.dcm")))
    shared, frame = segmentation.SharedFunctionalGroupsSequence[0], segmentation.PerFrameFunctionalGroupsSequence[0]
    assert segmentation.FrameOfReferenceUID == stored.FrameOfReferenceUID
    assert frame.PlanePositionSequence[0].ImagePositionPatient == stored.ImagePositionPatient
    assert shared.PlaneOrientationSequence[0].ImageOrientationPatient == stored.ImageOrientationPatient
    assert shared.PixelMeasuresSequence[0].PixelSpacing == stored.PixelSpacing


def test_the_frame_of_a_file_with_several_is_named(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", np.stack([gradient()] * 3), **UIDS)
    segmentation, capture = both(tmp_path, read_scan(path, slice_index=2))
    (image,) = segmentation.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0].SourceImageSequence
    assert image.ReferencedFrameNumber == capture.SourceImageSequence[0].ReferencedFrameNumber == 3


@pytest.mark.parametrize(
    "geometry",
    [
        {},
        {"ImagePositionPatient": [1, 2, 3], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "PixelSpacing": [1, 2]},
        {"PixelSpacing": [1, 2]},
        {"FrameOfReferenceUID": PATIENT},
    ],
    ids=["nothing known", "no thickness", "spacing alone", "damaged"],
)
def test_files_that_do_not_say_where_they_lie_get_their_segmentation_too(tmp_path, geometry):
    scan = read_scan(write_dicom(tmp_path / "a.dcm", gradient(), **UIDS | geometry))
    segmentation, capture = both(tmp_path, scan)
    np.testing.assert_array_equal(mask_of(segmentation), find_square(scan, 0.9).map > 0.5)
    if "ImageOrientationPatient" not in geometry:
        assert not capture.PatientOrientation  # better none than a guess


def test_an_answer_without_any_region_is_an_answer(tmp_path):
    segmentation, _ = both(tmp_path, read_scan(dicom_sample("CT_small.dcm")), score=0.3)
    assert mask_of(segmentation).shape == (128, 128)
    assert not mask_of(segmentation).any()


def test_a_scan_that_was_made_smaller_is_segmented_at_the_size_of_its_file(tmp_path):
    scan = shrink(read_scan(write_dicom(tmp_path / "a.dcm", gradient(2048, 1536), **UIDS)))
    segmentation, capture = both(tmp_path, scan)
    assert scan.height == 1024
    assert (capture.Rows, capture.Columns) == mask_of(segmentation).shape == (2048, 1536)
    rows, columns = np.nonzero(mask_of(segmentation))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == pytest.approx((10, 29, 16, 39), abs=1)


def test_nobody_is_named_in_either_object(tmp_path):
    elements = UIDS | {"AccessionNumber": "ACC-4711", "StudyDate": "20200101", "ReferringPhysicianName": PATIENT}
    segmentation, capture = both(tmp_path, read_scan(write_dicom(tmp_path / f"{PATIENT}.dcm", gradient(), **elements)))
    for made in (segmentation, capture):
        assert all(not made.get(name) for name in IDENTITY)
        assert PATIENT not in str(made)
        assert "ACC-4711" not in str(made)
        assert made.SeriesDescription.startswith("Research use only")


def test_the_secondary_capture_is_the_overlay_in_the_same_study(tmp_path):
    stored = read_dicom_sample("CT_small.dcm")
    _, capture = both(tmp_path, read_scan(dicom_sample("CT_small.dcm")))
    picture = capture.pixel_array  # [H, W, 3]
    assert capture.StudyInstanceUID == stored.StudyInstanceUID
    assert capture.SourceImageSequence[0].ReferencedSOPInstanceUID == stored.SOPInstanceUID
    assert (picture[5, 8:20] == 255).all()  # the contour
    assert (np.ptp(picture[25:].astype(int), axis=2) == 0).all()  # no colour where the map is low
    assert list(capture.PatientOrientation) == ["L", "P"]


@pytest.mark.parametrize("save", [save_segmentation, save_secondary_capture])
def test_scans_from_elsewhere_are_refused(tmp_path, save):
    finding = find_square(make_scan(0, "scan 3"), 0.9)
    assert not can_export(finding)
    with pytest.raises(FmclipError, match="scan 3 cannot be written as DICOM"):
        save(tmp_path / "a.dcm", finding)
