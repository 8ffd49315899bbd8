"""DICOM files are shown as a viewer shows them, and nothing but pixels leaves them."""

import gc

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_voi_lut
from pydicom.sequence import Sequence
from scan_files import PATIENT, dicom_sample, gradient, read_dicom_sample, write_dicom

from fmclip.errors import ScanError
from fmclip.scans import CT_WINDOWS, FLAT_NOTE, read_scan

HOUNSFIELD = np.linspace(-1024, 2047, 40 * 60).reshape(40, 60).round().astype(np.int16)


def sequence(**elements):
    """Return a sequence of one item."""
    item = Dataset()
    for keyword, value in elements.items():
        setattr(item, keyword, value)
    return Sequence([item])


@pytest.mark.parametrize(
    ("name", "preset"), [("soft tissue", (40, 400)), ("lung", (-600, 1500)), ("bone", (480, 2500))]
)
def test_a_window_preset_shows_its_range_of_hounsfield_units(tmp_path, name, preset):
    assert CT_WINDOWS[name] == preset
    centre, width = preset
    stored = (HOUNSFIELD + 1024).astype(np.uint16)
    write_dicom(tmp_path / "a.dcm", stored, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=0, WindowWidth=10)
    pixels = read_scan(tmp_path / "a.dcm", window=CT_WINDOWS[name]).pixels
    assert (pixels[centre + width / 2 < HOUNSFIELD] == 1).all()
    assert (pixels[centre - width / 2 > HOUNSFIELD] == 0).all()
    np.testing.assert_allclose(np.interp(centre, HOUNSFIELD.ravel(), pixels.ravel()), 0.5, atol=0.01)


def test_the_window_of_the_file_is_applied_as_pydicom_applies_it():
    dataset = read_dicom_sample("MR_small.dcm")
    scan = read_scan(dicom_sample("MR_small.dcm"))
    shown = apply_voi_lut(dataset.pixel_array, dataset)
    np.testing.assert_allclose(scan.pixels, (shown + 2**15) / (2**16 - 1), atol=1e-6)  # stored as signed 16-bit
    for twin in ("MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm", "MR_small_jp2klossless.dcm"):
        assert read_scan(dicom_sample(twin)).digest == scan.digest


def test_window_functions_of_the_standard(tmp_path):
    stored = gradient(top=1000, dtype=np.uint16)
    window = {"WindowCenter": [500, 1], "WindowWidth": [1000, 1]}
    exact = read_scan(write_dicom(tmp_path / "e.dcm", stored, **window, VOILUTFunction="LINEAR_EXACT")).pixels
    sigmoid = read_scan(write_dicom(tmp_path / "s.dcm", stored, **window, VOILUTFunction="SIGMOID")).pixels
    np.testing.assert_allclose(exact, stored / 1000, atol=1e-6)
    np.testing.assert_allclose(sigmoid, 1 / (1 + np.exp(-4 * (stored / 1000 - 0.5))), atol=1e-6)


def test_without_a_window_the_range_is_robust_and_padding_is_black(tmp_path):
    padded = HOUNSFIELD.copy()
    padded[:, :5] = -2000
    pixels = read_scan(write_dicom(tmp_path / "a.dcm", padded, PixelPaddingValue=-2000)).pixels
    assert pixels[:, :5].max() == 0
    np.testing.assert_allclose(pixels[:, 5:], (HOUNSFIELD[:, 5:] + 1024) / 3071, atol=0.02)
    ct = read_scan(dicom_sample("CT_small.dcm"))
    assert ct.pixels.shape == (128, 128)
    assert (ct.pixels.min(), ct.pixels.max()) == (0, 1)


def test_eight_bit_frames_without_a_window_keep_their_brightness(tmp_path):
    dark = gradient(top=100)
    np.testing.assert_allclose(read_scan(write_dicom(tmp_path / "a.dcm", dark)).pixels, dark / 255, atol=1e-6)


def test_monochrome1_is_inverted(tmp_path):
    stored = gradient(top=4000, dtype=np.uint16)
    plain = read_scan(write_dicom(tmp_path / "a.dcm", stored)).pixels
    inverted = read_scan(write_dicom(tmp_path / "b.dcm", stored, PhotometricInterpretation="MONOCHROME1")).pixels
    np.testing.assert_allclose(inverted, 1 - plain, atol=1e-6)


def test_lookup_tables_are_applied_modality_first(tmp_path):
    stored = np.arange(16, dtype=np.uint16).reshape(4, 4)
    shifted, shown = np.arange(100, 116, dtype="<u2"), np.array([0, 10, 20, 30, 40, 50, 60, 255], "<u2")
    modality = sequence(LUTDescriptor=[16, 0, 12], LUTData=shifted.tobytes(), ModalityLUTType="US")
    voi = sequence(LUTDescriptor=[8, 104, 8], LUTData=shown.tobytes())
    path = write_dicom(tmp_path / "a.dcm", stored, ModalityLUTSequence=modality, VOILUTSequence=voi)
    expected = np.interp(stored + 100, range(104, 112), shown) / 255
    np.testing.assert_allclose(read_scan(path).pixels, expected, atol=1e-6)


def test_frames_of_a_stack_are_chosen_and_the_middle_is_the_default(tmp_path):
    stack = np.stack([np.roll(gradient(), frame, axis=1) for frame in range(5)])
    path = write_dicom(tmp_path / "a.dcm", stack)
    for frame in range(5):
        np.testing.assert_allclose(read_scan(path, slice_index=frame).pixels, stack[frame] / 255, atol=1e-6)
    middle = read_scan(path)
    assert middle.digest == read_scan(path, slice_index=2).digest
    assert "the middle slice is shown (2 of 0 to 4)" in middle.notes
    with pytest.raises(ScanError, match=r"scan has no slice 5: its slices are 0 to 4\."):
        read_scan(path, slice_index=5)


def test_each_frame_of_an_enhanced_stack_has_its_own_rescale_and_window(tmp_path):
    stack = np.stack([gradient(top=1000, dtype=np.uint16)] * 2)
    shared = sequence(FrameVOILUTSequence=sequence(WindowCenter=1000, WindowWidth=2000, VOILUTFunction="LINEAR_EXACT"))
    per_frame = Sequence(
        sequence(PixelValueTransformationSequence=sequence(RescaleSlope=slope, RescaleIntercept=0))[0]
        for slope in (1, 2)
    )
    groups = {"SharedFunctionalGroupsSequence": shared, "PerFrameFunctionalGroupsSequence": per_frame}
    path = write_dicom(tmp_path / "a.dcm", stack, **groups)
    np.testing.assert_allclose(read_scan(path, slice_index=0).pixels, stack[0] / 2000, atol=1e-6)
    np.testing.assert_allclose(read_scan(path, slice_index=1).pixels, stack[0] / 1000, atol=1e-6)


def test_colour_frames_of_every_encoding_show_the_same_picture(tmp_path):
    colour = np.stack([gradient(), gradient()[::-1], gradient()[:, ::-1]], axis=2)
    path = write_dicom(tmp_path / "a.dcm", colour)
    np.testing.assert_array_equal(read_scan(path).pixels, colour / np.float32(255))
    plain = read_scan(dicom_sample("SC_rgb_rle.dcm")).pixels
    for name in ("SC_rgb_dcmtk_+eb+cr.dcm", "SC_ybr_full_422_uncompressed.dcm", "SC_rgb_rle_16bit.dcm"):
        np.testing.assert_allclose(read_scan(dicom_sample(name)).pixels, plain, atol=0.03, err_msg=name)


def test_equal_colours_become_grey(tmp_path):
    grey = np.repeat(gradient()[:, :, None], 3, axis=2)
    assert read_scan(write_dicom(tmp_path / "a.dcm", grey)).pixels.shape == (40, 60)


def test_a_palette_is_looked_up(tmp_path):
    table = np.arange(256, dtype="<u2") * 257
    palette = {
        f"{colour}PaletteColorLookupTable{part}": value
        for colour, data in (("Red", table), ("Green", table[::-1]), ("Blue", table * 0))
        for part, value in (("Descriptor", [256, 0, 16]), ("Data", data.tobytes()))
    }
    path = write_dicom(tmp_path / "a.dcm", gradient(), PhotometricInterpretation="PALETTE COLOR", **palette)
    pixels = read_scan(path).pixels
    np.testing.assert_allclose(pixels[..., 0], gradient() / 255, atol=1e-4)
    np.testing.assert_allclose(pixels[..., 1], 1 - gradient() / 255, atol=1e-4)


def test_a_file_without_preamble_or_meta_is_recognised(tmp_path):
    dataset = read_dicom_sample("CT_small.dcm")
    dataset.preamble, dataset.file_meta = None, FileMetaDataset()
    dataset.save_as(tmp_path / "bare", implicit_vr=True, little_endian=True)
    assert (tmp_path / "bare").read_bytes()[128:132] != b"DICM"
    assert read_scan(tmp_path / "bare").digest == read_scan(dicom_sample("CT_small.dcm")).digest


@pytest.mark.parametrize(
    ("elements", "note"),
    [
        ({"BurnedInAnnotation": "YES"}, "text is burned into the pixels"),
        ({"BurnedInAnnotation": "NO", "Modality": "US"}, None),
        ({"Modality": "US"}, "text may be burned into the pixels"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "text may be burned into the pixels"),
        ({}, None),
    ],
)
def test_burned_in_text_is_warned_about(tmp_path, elements, note):
    notes = " ".join(read_scan(write_dicom(tmp_path / "a.dcm", gradient(), **elements)).notes)
    assert ("burned" in notes) == (note is not None)
    assert (note or "") in notes


def test_a_constant_frame_is_read_with_a_note(tmp_path):
    assert FLAT_NOTE in read_scan(write_dicom(tmp_path / "a.dcm", np.full((9, 9), 700, np.uint16))).notes


def test_no_patient_data_stays_with_the_scan(tmp_path):
    scan = read_scan(write_dicom(tmp_path / f"{PATIENT}.dcm", gradient()))
    assert PATIENT not in repr(vars(scan))
    gc.collect()
    assert not any(isinstance(referred, Dataset) for referred in gc.get_referents(scan, *vars(scan).values()))


def test_jpeg_ls_is_read():
    packed, plain = (read_scan(dicom_sample(name)) for name in ("MR_small_jpeg_ls_lossless.dcm", "MR_small.dcm"))
    assert packed.digest == plain.digest


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: dicom_sample("MR_truncated.dcm"), "the file is cut short"),
        (lambda path: dicom_sample("SC_rgb_jpeg_gdcm.dcm"), r'compressed with "JPEG Lossless.*no decoder is installed'),
        (lambda path: dicom_sample("JPGExtended.dcm"), r"12-bit, say\) that needs another decoder"),
        (lambda path: dicom_sample("image_dfl.dcm"), "deflated DICOM file.*Export it uncompressed"),
        (lambda path: dicom_sample("rtplan.dcm"), "DICOM file without a picture"),
        (lambda path: write_dicom(path, gradient(), Rows=30000, Columns=30000), "30000 x 30000 pixels, more than"),
        (lambda path: write_dicom(path, gradient(), NumberOfFrames=10**6), "1000000 pictures of 60 x 40"),
        (lambda path: write_dicom(path, gradient(), NumberOfFrames=3), "the file is cut short"),
        (lambda path: write_dicom(path, gradient(), Rows=None), "declares a picture of 60 x 0"),
        (lambda path: write_dicom(path, gradient(), PhotometricInterpretation="HSV"), "stores its colours"),
    ],
)
def test_what_cannot_be_shown_is_refused_with_its_reason(tmp_path, make, message):
    with pytest.raises(ScanError, match=f"^scan 3 .*{message}"):
        read_scan(make(tmp_path / "a.dcm"), label="scan 3")


@pytest.mark.parametrize("window", [(40, 0), (40, -5), (float("nan"), 80)])
def test_an_unusable_window_is_refused(tmp_path, window):
    with pytest.raises(ScanError, match="cannot be shown with this window"):
        read_scan(write_dicom(tmp_path / "a.dcm", gradient()), window=window)
