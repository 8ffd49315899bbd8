"""NIfTI volumes: the chosen slice in canonical orientation, scaled by the whole volume."""

import gzip

import nibabel
import numpy as np
import pytest
from scan_files import write_nifti

from fmclip.errors import ScanError
from fmclip.scans import CT_WINDOWS, FLAT_NOTE, read_scan

# [right, anterior, superior] = [20, 30, 10], brighter to the right, far brighter to the front, brightest to the top.
VOLUME = np.add.outer(np.add.outer(np.arange(20.0), 20 * np.arange(30.0)), 600 * np.arange(10.0)).astype(np.int16)


def expected(index):
    """Slice seen from the feet: front on top, the patient's right on the left."""
    low, high = np.percentile(VOLUME, (0.5, 99.5))
    return np.clip((VOLUME[::-1, ::-1, index].T - low) / (high - low), 0, 1)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_slices_are_chosen_and_the_middle_is_the_default(tmp_path, name):
    path = write_nifti(tmp_path / name, VOLUME)
    for index in (0, 4, 9):
        np.testing.assert_allclose(read_scan(path, slice_index=index).pixels, expected(index), atol=1e-5)
    middle = read_scan(path)
    np.testing.assert_allclose(middle.pixels, expected(5), atol=1e-5)
    assert middle.notes == ("the middle slice is shown (5 of 0 to 9)",)
    for wrong in (-1, 10):
        with pytest.raises(ScanError, match="its slices are 0 to 9"):
            read_scan(path, slice_index=wrong)


@pytest.mark.parametrize("axes", ["LPS", "SAR", "AIL", "PRI"])
def test_every_stored_orientation_gives_the_same_picture(tmp_path, axes):
    image = nibabel.Nifti1Image(VOLUME, np.eye(4))
    turned = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(axes)
    )
    nibabel.save(image.as_reoriented(turned), tmp_path / "a.nii")
    np.testing.assert_allclose(read_scan(tmp_path / "a.nii", slice_index=7).pixels, expected(7), atol=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, ">i2", np.int32, np.float32, np.float64])
@pytest.mark.parametrize("version", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_number_types_and_versions(tmp_path, dtype, version):
    volume = (VOLUME // 40).astype(dtype)
    header = version.header_class(endianness=">" if dtype == ">i2" else "<")
    header.set_data_dtype(volume.dtype)
    nibabel.save(version(volume, np.eye(4), header), tmp_path / "a.nii")
    np.testing.assert_allclose(read_scan(tmp_path / "a.nii").pixels, expected(5), atol=0.02)


def test_slope_and_intercept_are_applied_before_the_window(tmp_path):
    hounsfield = np.linspace(-1000, 1000, 8 * 8 * 4).reshape(8, 8, 4)
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)  # stored with a slope and an intercept
    nibabel.save(nibabel.Nifti1Image(hounsfield, np.eye(4), header), tmp_path / "a.nii")
    centre, width = CT_WINDOWS["soft tissue"]
    pixels = read_scan(tmp_path / "a.nii", slice_index=1, window=CT_WINDOWS["soft tissue"]).pixels
    shown = hounsfield[::-1, ::-1, 1].T
    np.testing.assert_allclose(pixels, np.clip((shown - centre) / width + 0.5, 0, 1), atol=0.01)


def test_only_the_first_volume_of_a_series_is_read_and_it_says_so(tmp_path):
    scan = read_scan(write_nifti(tmp_path / "a.nii.gz", np.stack([VOLUME, VOLUME * 0], axis=3)))
    np.testing.assert_allclose(scan.pixels, expected(5), atol=1e-5)
    assert "the file holds 2 volumes; the first one is read" in scan.notes


@pytest.mark.parametrize(("shape", "side"), [((20, 30), (30, 20)), ((20, 1, 10), (10, 20)), ((1, 30, 10), (10, 30))])
def test_a_single_slice_is_shown_whichever_way_it_lies(tmp_path, shape, side):
    volume = VOLUME[: shape[0], : shape[1], : (shape[2] if len(shape) > 2 else 1)].reshape(shape)
    scan = read_scan(write_nifti(tmp_path / "a.nii", volume))
    assert scan.pixels.shape == side
    assert scan.pixels[0, 0] > scan.pixels[-1, -1]
    assert scan.notes == ()


def test_some_missing_values_are_filled_and_noted(tmp_path):
    volume = VOLUME.astype(np.float32)
    volume[:, :3, 5] = np.nan
    volume[0, 4, 5] = np.inf
    scan = read_scan(write_nifti(tmp_path / "a.nii", volume))
    assert scan.pixels[-3:].max() == scan.pixels.min()
    assert any("10% of the pixels held no number (NaN)" in note for note in scan.notes)
    assert len(read_scan(tmp_path / "a.nii", slice_index=6).notes) == 0


def test_mostly_missing_values_are_refused(tmp_path):
    volume = VOLUME.astype(np.float32)
    volume[:, :20, 5] = np.nan
    with pytest.raises(ScanError, match=r"^scan holds no numbers \(NaN\) in 67% of its pixels\..*another slice"):
        read_scan(write_nifti(tmp_path / "a.nii", volume))


def test_a_constant_volume_is_read_with_a_note(tmp_path):
    assert FLAT_NOTE in read_scan(write_nifti(tmp_path / "a.nii", np.full((5, 6, 7), 3, np.int16))).notes


def test_an_unusable_orientation_is_noted_and_the_slice_still_shown(tmp_path):
    image = nibabel.Nifti1Image(VOLUME, np.eye(4))
    image.header.set_sform(np.diag([1.0, 0.0, 1.0, 1.0]), code=1)
    nibabel.save(nibabel.Nifti1Image(VOLUME, None, image.header), tmp_path / "a.nii")
    scan = read_scan(tmp_path / "a.nii")
    assert scan.pixels.shape == (30, 20)
    assert any("no usable orientation" in note for note in scan.notes)


def damaged(volume_file, *, shape=None, cut=None, zipped=True, magic=None):
    """Return the bytes of a volume file with another declared shape, a cut end or another magic."""
    raw = bytearray(volume_file.read_bytes())
    if shape is not None:
        raw[40:56] = np.array([len(shape), *shape, *[1] * (7 - len(shape))], "<i2").tobytes()
    if magic is not None:
        raw[344:348] = magic
    body = gzip.compress(bytes(raw)) if zipped else bytes(raw)
    return body[: len(body) if cut is None else int(len(body) * cut)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (30000, 30000, 300)}, "30000 x 30000 pixels, more than"),
        ({"shape": (2000, 2000, 2000)}, "2000 pictures of 2000 x 2000"),
        ({"shape": (400, 400, 200)}, "cut short"),
        ({"shape": (400, 400, 200), "zipped": False}, "cut short"),
        ({"shape": (20, 0, 10)}, "it holds nothing to look at"),
        ({"shape": (20, -5, 10)}, "NIfTI|nothing to look at"),
        ({"cut": 0.5}, "could not be decoded as NIfTI: the file is cut short"),
        ({"cut": 0.5, "zipped": False}, "could not be decoded as NIfTI: the file is cut short"),
        ({"magic": b"ni1\0", "zipped": False}, "pair without its data"),
        ({"magic": b"abc\0"}, "gzip archive that holds no NIfTI volume"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_reason(tmp_path, change, message):
    whole = write_nifti(tmp_path / "whole.nii", VOLUME)
    (tmp_path / "a").write_bytes(damaged(whole, **change))
    with pytest.raises(ScanError, match=f"^scan 2 .*({message})"):
        read_scan(tmp_path / "a", label="scan 2")


def test_a_gzip_bomb_is_not_unpacked(tmp_path):
    head = write_nifti(tmp_path / "whole.nii", VOLUME).read_bytes()
    with gzip.open(tmp_path / "bomb.nii.gz", "wb", compresslevel=1) as bomb:
        bomb.write(head)
        for _ in range(64):
            bomb.write(bytes(2**20))
    np.testing.assert_allclose(read_scan(tmp_path / "bomb.nii.gz").pixels, expected(5), atol=1e-5)
