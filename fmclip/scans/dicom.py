"""DICOM: one frame, shown as a viewer shows it. Only pixels and what is needed to show them leave this file."""

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filereader import read_file_meta_info
from pydicom.pixels import apply_color_lut, get_decoder, pixel_array
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from fmclip.scans.intensity import apply_window, collapse_grey, fill_missing, robust_range, stretch
from fmclip.scans.scan import Unreadable, check_size, choose_slice
from fmclip.scans.source import DicomReference, Source, dicom_affine

_EXPORT = "Export it uncompressed (Explicit VR Little Endian) or as PNG."
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_FUNCTIONAL_GROUP = {  # where enhanced multi-frame objects keep what older ones have at the top
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
    "WindowCenter": "FrameVOILUTSequence",
    "WindowWidth": "FrameVOILUTSequence",
    "VOILUTFunction": "FrameVOILUTSequence",
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "SliceThickness": "PixelMeasuresSequence",
}


def read_dicom(
    path: Path, slice_index: int | None, window: tuple[float, float] | None
) -> tuple[np.ndarray, list[str], Source]:
    """Read one frame of a DICOM file: modality LUT, then VOI LUT or window, then MONOCHROME1 inverted.

    Without a window in the file or from the caller, 8-bit values are shown over their full range, others between their
    0.1 and 99.9 percentiles. Padding pixels are black.

    Args:
        path: The file, with or without preamble.
        slice_index: Frame, counted from 0; None: the middle one.
        window: (centre, width) in the modality's units (Hounsfield units for CT), instead of the file's own. Colour
            frames are shown as they are.

    Returns:
        ([H, W] or [H, W, 3] float32 in [0, 1], notes, where the frame lies).

    Raises:
        Unreadable: If it holds no picture, is too large, or is compressed in a way that cannot be decoded here.
        Exception: Whatever pydicom raises for a damaged file.
    """
    dataset = _read_dataset(path)
    frames = _check_declared(dataset)
    _check_decoder(dataset.file_meta.TransferSyntaxUID)
    notes = _burned_in(dataset)
    frame = choose_slice(slice_index, frames, notes)
    stored = _decode_frame(dataset, frame)  # [H, W] or [H, W, 3]
    source = _source(dataset, frame, frames)
    photometric = str(dataset.get("PhotometricInterpretation", "MONOCHROME2"))
    if stored.ndim == 3 and photometric in _COLOUR:
        scaled = np.divide(stored, float(2 ** int(dataset.BitsStored) - 1), dtype=np.float32)
        return collapse_grey(np.clip(scaled, 0.0, 1.0)), notes, source
    if stored.ndim == 2 and photometric == "PALETTE COLOR":
        coloured = apply_color_lut(stored, dataset)  # [H, W, 3], uint8 or uint16
        return collapse_grey(np.divide(coloured, np.iinfo(coloured.dtype).max, dtype=np.float32)), notes, source
    if stored.ndim != 2 or photometric not in _GREY:
        raise Unreadable(f"stores its colours in a way that is not read. {_EXPORT}")
    return _show_grey(stored, dataset, frame, window, notes), notes, source


def _read_dataset(path: Path) -> Dataset:
    """Read the file's elements; pixel data stay encoded."""
    with path.open("rb") as file:
        has_preamble = file.read(132)[128:] == b"DICM"
    if has_preamble and read_file_meta_info(path).get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        # pydicom would inflate the whole file, however large that gets, before its size can be asked for.
        raise Unreadable(f"is a deflated DICOM file, which is not read. {_EXPORT}")
    dataset = pydicom.dcmread(path, force=True)
    if not hasattr(dataset, "file_meta"):
        dataset.file_meta = FileMetaDataset()
    if not dataset.file_meta.get("TransferSyntaxUID"):
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    return dataset


def _check_declared(dataset: Dataset) -> int:
    """Refuse what holds no picture or declares too large a one; return the number of frames."""
    if not any(keyword in dataset for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise Unreadable(
            "is a DICOM file without a picture (a report, a plan or a directory, or it is cut short). "
            "Upload the image files of the series."
        )
    frames = int(dataset.get("NumberOfFrames") or 1)
    samples, bits = int(dataset.get("SamplesPerPixel") or 1), int(dataset.get("BitsAllocated") or 8)
    pixel_bytes = max(1, samples * bits // 8)
    check_size(int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0), stack=frames, pixel_bytes=pixel_bytes)
    return frames


def _check_decoder(syntax: UID) -> None:
    """Refuse a compression for which no decoder is installed, by its public name."""
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        name = f'"{syntax.name}"' if not syntax.is_private and syntax.name != syntax else "an unknown method"
        raise Unreadable(f"is compressed with {name}, for which no decoder is installed here. {_EXPORT}")


def _decode_frame(dataset: Dataset, frame: int) -> np.ndarray:
    """Return the stored values of one frame, [H, W] or [H, W, 3]; YBR colours come as RGB."""
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        return pixel_array(dataset, index=frame)
    except Exception:
        if not syntax.is_encapsulated:
            raise
        raise Unreadable(
            f'is compressed with "{syntax.name}" and could not be decoded: it is damaged or cut short, or of a variety '
            f"(12-bit, say) that needs another decoder. {_EXPORT}"
        ) from None


def _burned_in(dataset: Dataset) -> list[str]:
    """Return the note on text in the pixels (names, dates, calipers), which no removal of tags takes away."""
    stated = str(dataset.get("BurnedInAnnotation") or "").strip().upper()
    if stated == "YES":
        return ["text is burned into the pixels, says the file: check it for patient data"]
    is_capture = str(dataset.get("SOPClassUID") or "").startswith(_SECONDARY_CAPTURE)
    if not stated and (is_capture or str(dataset.get("Modality") or "") in ("US", "SC")):
        return ["text may be burned into the pixels (ultrasound or screen capture): check it for patient data"]
    return []


def _show_grey(
    stored: np.ndarray, dataset: Dataset, frame: int, window: tuple[float, float] | None, notes: list[str]
) -> np.ndarray:
    """Return [H, W] float32 in [0, 1] of one grey frame of stored values."""
    values, rescaled = _apply_modality(stored, dataset, frame)
    values = fill_missing(values, notes)
    padding = stored == dataset.PixelPaddingValue if "PixelPaddingValue" in dataset else np.zeros(stored.shape, bool)
    centre = _number(_setting(dataset, frame, "WindowCenter"))
    width = _number(_setting(dataset, frame, "WindowWidth"))
    bits = int(dataset.get("BitsStored") or 16)
    if window is not None:
        pixels = apply_window(values, *window)
    elif dataset.get("VOILUTSequence"):
        shown, brightest = _look_up(values, dataset.VOILUTSequence[0], dataset)
        pixels = stretch(shown, (0.0, brightest))
    elif centre is not None and width is not None and width > 0:
        pixels = apply_window(values, centre, width, str(_setting(dataset, frame, "VOILUTFunction") or "LINEAR"))
    elif bits <= 8 and not rescaled and np.issubdtype(stored.dtype, np.unsignedinteger):
        pixels = stretch(values, (0.0, 2.0**bits - 1.0))
    else:
        pixels = stretch(values, robust_range(values if padding.all() else values[~padding]))
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        pixels = 1.0 - pixels
    pixels[padding] = 0.0
    return pixels


def _apply_modality(stored: np.ndarray, dataset: Dataset, frame: int) -> tuple[np.ndarray, bool]:
    """Return the values in the modality's units, and whether that changed them."""
    if dataset.get("ModalityLUTSequence"):
        return _look_up(stored, dataset.ModalityLUTSequence[0], dataset)[0], True
    slope = _number(_setting(dataset, frame, "RescaleSlope"))
    intercept = _number(_setting(dataset, frame, "RescaleIntercept"))
    if slope in (None, 0.0) or intercept is None or (slope, intercept) == (1.0, 0.0):
        return stored, False
    return stored * np.float64(slope) + intercept, True


def _look_up(values: np.ndarray, table: Dataset, dataset: Dataset) -> tuple[np.ndarray, float]:
    """Apply a lookup table (PS3.3 sections C.11.1 and C.11.2); values outside take its first or last entry.

    Returns:
        (looked-up values, the largest value that the table's depth can hold).
    """
    entries, first, bits = (int(number) for number in table.LUTDescriptor)
    data = table.LUTData
    if isinstance(data, bytes):
        order = "<u2" if dataset.original_encoding[1] else ">u2"
        data = np.frombuffer(data[: len(data) // 2 * 2], order)
    looked_up = np.atleast_1d(np.asarray(data, np.float64))[: entries or 2**16]
    index = np.clip(np.rint(values).astype(np.int64) - first, 0, looked_up.size - 1)
    return looked_up[index], float(max(2**bits - 1, looked_up.max()))


def _setting(dataset: Dataset, frame: int, keyword: str) -> Any:
    """Return an element for one frame: from its functional group, the shared one, or the data set itself."""
    for sequence, item in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        groups = dataset.get(sequence) or []
        macro = groups[item].get(_FUNCTIONAL_GROUP[keyword]) if item < len(groups) else None
        if macro and keyword in macro[0]:
            return macro[0].get(keyword)
    return dataset.get(keyword)


def _source(dataset: Dataset, frame: int, frames: int) -> Source:
    """Say where one frame lies and, if the file says so, which image it is; damaged elements count as missing."""
    shape = int(dataset.Rows), int(dataset.Columns)
    slice_index = frame if frames > 1 else None
    names = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "FrameOfReferenceUID")
    study, series, instance, sop_class, frame_of_reference = (_uid(dataset.get(name)) for name in names)
    thickness = _number(_setting(dataset, frame, "SliceThickness"))
    reference = DicomReference(
        study or "",
        series or "",
        instance or "",
        sop_class or "",
        frame=frame + 1 if frames > 1 else None,
        frame_of_reference=frame_of_reference,
        position=_numbers(_setting(dataset, frame, "ImagePositionPatient"), 3),
        orientation=_directions(_setting(dataset, frame, "ImageOrientationPatient")),
        spacing=_lengths(_setting(dataset, frame, "PixelSpacing")),
        thickness=thickness if thickness and _is_length(thickness) else None,
    )
    is_complete = bool(study and series and instance and sop_class)
    return Source(shape, slice_index, dicom_affine(reference), reference if is_complete else None)


def _uid(value: Any) -> str | None:
    """Return a well-formed UID; other text, which might be anything, is dropped."""
    return str(value) if isinstance(value, str) and UID(value).is_valid else None


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    """Return that many finite numbers of an element; None if it holds something else."""
    if not isinstance(value, (list, tuple, pydicom.multival.MultiValue)) or len(value) != count:
        return None
    numbers = tuple(_number(one) for one in value)
    return None if None in numbers else numbers  # type: ignore[return-value]


def _directions(value: Any) -> tuple[float, ...] | None:
    """Return the directions of a row and of a column; None if they are no two unit vectors at right angles."""
    numbers = _numbers(value, 6)
    if numbers is None:
        return None
    vectors = np.array(numbers).reshape(2, 3)
    return numbers if np.allclose(vectors @ vectors.T, np.eye(2), atol=0.01) else None


def _lengths(value: Any) -> tuple[float, ...] | None:
    """Return two lengths in mm; None if one of them can be none."""
    numbers = _numbers(value, 2)
    return numbers if numbers is not None and all(map(_is_length, numbers)) else None


def _is_length(value: float) -> bool:
    """Whether a pixel or slice may be so many mm long: a nanometre to a kilometre, which single precision holds."""
    return 1e-6 <= value <= 1e6


def _number(value: Any) -> float | None:
    """Return the first number of an element that may hold several, none, or something else; None without one."""
    first = value[0] if isinstance(value, (list, tuple, pydicom.multival.MultiValue)) and len(value) else value
    try:
        number = float(first)
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) else None
