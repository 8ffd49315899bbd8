"""Where the pixels of a scan lie: the affine of NIfTI slices and DICOM frames, and what is kept of a DICOM file."""

from dataclasses import replace

import nibabel
import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from scan_files import PATIENT, dicom_sample, gradient, read_dicom_sample, write_dicom, write_nifti

from fmclip.report.files import save_nifti
from fmclip.scans import Scan, read_scan, shrink

OBLIQUE = np.array([[0.0, 0.1, 1.5, -20.0], [-2.0, 0.0, 0.2, 60.0], [0.1, -3.0, 0.0, 30.0], [0.0, 0.0, 0.0, 1.0]])


@pytest.mark.parametrize("affine", [np.eye(4), np.diag([-1.0, 2.0, 3.0, 1.0]), OBLIQUE])
@pytest.mark.parametrize("slice_index", [0, 2])
def test_each_pixel_of_a_nifti_slice_lies_where_its_voxel_lies(tmp_path, affine, slice_index):
    """Every voxel has a value of its own, by which it is found again."""
    volume = np.random.default_rng(0).permutation(5 * 6 * 7).reshape(5, 6, 7).astype(np.int16)
    path = write_nifti(tmp_path / "v.nii", volume, affine)
    scan = read_scan(path, slice_index=slice_index, window=(105, 211))
    values = np.rint(scan.pixels * 210 - 0.5).astype(int)
    for row, column in ((0, 0), (0, scan.width - 1), (scan.height - 1, 1)):
        (found,) = np.argwhere(volume == values[row, column])
        expected = affine @ [*found, 1]
        np.testing.assert_allclose(scan.source.affine @ [column, row, 0, 1], expected, atol=1e-5)
    assert scan.source.slice_index == slice_index


def test_a_volume_without_orientation_has_no_place(tmp_path):
    volume = np.random.default_rng(0).random((4, 5, 6), np.float32)
    image = nibabel.Nifti1Image(volume, np.eye(4))
    image.header.set_sform(np.diag([1.0, 0.0, 1.0, 1.0]), code=1)
    nibabel.save(nibabel.Nifti1Image(volume, None, image.header), tmp_path / "v.nii")
    assert read_scan(tmp_path / "v.nii").source.affine is None


def test_a_dicom_slice_lies_where_its_file_says():
    stored, scan = read_dicom_sample("CT_small.dcm"), read_scan(dicom_sample("CT_small.dcm"))
    reference = scan.source.dicom
    assert (reference.study, reference.instance) == (stored.StudyInstanceUID, stored.SOPInstanceUID)
    x, y, z = stored.ImagePositionPatient
    np.testing.assert_allclose(scan.source.affine @ [0, 0, 0, 1], [-x, -y, z, 1])
    down, across = stored.PixelSpacing
    np.testing.assert_allclose(scan.source.affine @ [3, 5, 0, 1], [-x - 3 * across, -y - 5 * down, z, 1])


def test_frames_of_enhanced_files_have_their_own_position(tmp_path):
    def macro(name: str, **elements) -> Dataset:
        inner, outer = Dataset(), Dataset()
        for keyword, value in elements.items():
            setattr(inner, keyword, value)
        setattr(outer, name, [inner])
        return outer

    shared = macro("PixelMeasuresSequence", PixelSpacing=[2, 3], SliceThickness=5)
    shared.update(macro("PlaneOrientationSequence", ImageOrientationPatient=[1, 0, 0, 0, 1, 0]))
    frames = [macro("PlanePositionSequence", ImagePositionPatient=[10, 20, 5 * frame]) for frame in range(3)]
    path = write_dicom(
        tmp_path / "a.dcm",
        np.stack([gradient()] * 3),
        StudyInstanceUID=generate_uid(),
        SeriesInstanceUID=generate_uid(),
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=frames,
    )
    source = read_scan(path, slice_index=2).source
    assert (source.slice_index, source.dicom.frame) == (2, 3)
    np.testing.assert_allclose(source.affine @ [1, 1, 0, 1], [-13, -22, 10, 1])


@pytest.mark.parametrize("bad", [{"StudyInstanceUID": PATIENT}, {"StudyInstanceUID": None}, {"StudyInstanceUID": ""}])
def test_what_is_no_uid_is_not_kept(tmp_path, bad):
    elements = {"StudyInstanceUID": generate_uid(), "SeriesInstanceUID": generate_uid()}
    whole = read_scan(write_dicom(tmp_path / "a.dcm", gradient(), **elements))
    assert whole.source.dicom is not None
    elements |= bad
    if elements["StudyInstanceUID"] is None:
        del elements["StudyInstanceUID"]
    scan = read_scan(write_dicom(tmp_path / "a.dcm", gradient(), **elements))
    assert scan.source.dicom is None
    assert PATIENT not in repr(scan.source)


@pytest.mark.parametrize(
    "bad",
    [
        {"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]},
        {"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]},
        {"ImageOrientationPatient": [2, 0, 0, 0, 2, 0]},
        {"PixelSpacing": [0, 1]},
        {"PixelSpacing": [1, -1]},
        {"PixelSpacing": ["1e300", 1]},
    ],
)
def test_a_geometry_that_cannot_be_counts_as_missing(tmp_path, bad):
    geometry = {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "PixelSpacing": [1, 2]}
    elements = {"ImagePositionPatient": [1, 2, 3], **geometry, **bad}
    scan = read_scan(write_dicom(tmp_path / "a.dcm", gradient(), **elements))
    assert scan.source.affine is None
    save_nifti(tmp_path / "map.nii", scan, scan.pixels)
    stored = nibabel.load(tmp_path / "map.nii")
    assert stored.shape == (scan.width, scan.height, 1)
    assert stored.header.get_xyzt_units()[0] == "unknown"


def test_uids_show_neither_in_text_nor_in_the_digest():
    scan = read_scan(dicom_sample("CT_small.dcm"))
    assert scan.source.dicom.study not in repr(scan) + repr(scan.source)
    assert replace(scan, source=None).digest == scan.digest


def test_a_shrunk_scan_covers_the_same_field(tmp_path):
    path = write_nifti(tmp_path / "v.nii", np.random.default_rng(0).random((2048, 1024, 1), np.float32))
    scan = read_scan(path)
    small = shrink(scan)
    assert (small.height, small.width) == (512, 1024)
    affine = small.source.affine_for((small.height, small.width))
    edges = np.array([[-0.5, -0.5, 0, 1], [small.width - 0.5, small.height - 0.5, 0, 1]]).T
    whole = np.array([[-0.5, -0.5, 0, 1], [scan.width - 0.5, scan.height - 0.5, 0, 1]]).T
    np.testing.assert_allclose(affine @ edges, scan.source.affine @ whole)


def test_plain_pictures_lie_nowhere():
    assert Scan(gradient().astype(np.float32) / 255).source is None
