"""Findings on DICOM scans as DICOM objects: segmentation of the region above the threshold, and the overlay.

Both refer to the image by its UIDs, which is how a PACS shows them beside it. All attributes that name the patient or
describe the study (name, ID, birth date, sex, accession number, dates) are empty: nothing of that is ever read. A PACS
that files by patient needs them filled in on the way (coercion by the study's UID).

The map is no probability, so it is not written as a fractional segmentation; it goes out as NIfTI and 16-bit PNG.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import cv2
import highdicom
import numpy as np
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import SecondaryCaptureImageStorage

from fmclip import __version__
from fmclip.errors import FmclipError
from fmclip.figures import overlay
from fmclip.scans import DicomReference
from fmclip.session import Finding

MANUFACTURER = "fmclip"
SERIES_NUMBER = 900  # behind the scanner's own series
_RESEARCH = "Research use only"
_ORIENTATIONS = (("L", "R"), ("P", "A"), ("H", "F"))  # ends of the patient's axes x, y, z: positive, negative

logging.getLogger("highdicom").setLevel(logging.CRITICAL + 1)  # it logs UIDs


def can_export(finding: Finding) -> bool:
    """Whether a finding is on a scan from a DICOM file that says which image it is."""
    return finding.scan.source is not None and finding.scan.source.dicom is not None


def save_segmentation(path: Path, finding: Finding) -> None:
    """Write where the map lies above the threshold, as a binary DICOM Segmentation on the source's pixels.

    Args:
        path: File to write.
        finding: On a DICOM scan, see `can_export`. A scan that was made smaller is segmented at its source's size.

    Raises:
        FmclipError: The scan is not from a DICOM file that says which image it is.
        OSError: The file cannot be written.
    """
    reference, shape = _require_reference(finding)
    mask = _on_source(finding.map, shape) > finding.threshold  # [H, W]
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=MANUFACTURER, family=codes.DCM.ArtificialIntelligence, version=__version__
    )
    region = highdicom.seg.SegmentDescription(
        segment_number=1,
        segment_label="Above threshold",
        segmented_property_category=codes.SCT.SpatialAndRelationalConcept,
        segmented_property_type=codes.DCM.SelectedRegion,  # a place to look at; not yet a lesion
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an empty region, among others: nothing above the threshold is an answer
        made = highdicom.seg.Segmentation(
            source_images=[_stand_in(reference, shape)],
            pixel_array=mask.astype(np.uint8)[None],  # [1, H, W]
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[region],
            content_label="ABOVE_THRESHOLD",
            content_description=f"Score {finding.score:.3f}, threshold {finding.threshold:.3f}",
            omit_empty_frames=False,
            **_series("fmclip region above threshold", SERIES_NUMBER),
        )
    _refer(made, reference)
    made.save_as(path)


def save_secondary_capture(path: Path, finding: Finding) -> None:
    """Write the overlay as a DICOM Secondary Capture in the study of the source; colours are part of the picture.

    Args:
        path: File to write.
        finding: On a DICOM scan, see `can_export`.

    Raises:
        FmclipError: The scan is not from a DICOM file that says which image it is.
        OSError: The file cannot be written.
    """
    reference, shape = _require_reference(finding)
    picture = overlay(finding.scan, finding.map, finding.threshold)
    if picture.shape[:2] != shape:
        picture = cv2.resize(picture, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR)
    made = highdicom.sc.SCImage(
        pixel_array=picture,
        photometric_interpretation=highdicom.PhotometricInterpretationValues.RGB,
        bits_allocated=8,
        coordinate_system=highdicom.CoordinateSystemNames.PATIENT,
        study_instance_uid=reference.study,
        patient_orientation=_patient_orientation(reference) or ("L", "P"),
        pixel_spacing=reference.spacing,  # type: ignore[arg-type]  # two numbers
        **_series("fmclip overlay", SERIES_NUMBER + 1),
    )
    if _patient_orientation(reference) is None:
        made["PatientOrientation"].value = None  # highdicom wants one where nobody knows it
    made.ImageType = ["DERIVED", "SECONDARY"]
    verdict = f"score {finding.score:.3f}, threshold {finding.threshold:.3f}: {finding.verdict}"
    made.DerivationDescription = f"Overlay of an anomaly map, {verdict}. {_RESEARCH}, not a diagnosis."
    made.SourceImageSequence = [_image_item(reference)]
    made.save_as(path)


def _require_reference(finding: Finding) -> tuple[DicomReference, tuple[int, int]]:
    """The image that a finding belongs to, and its rows and columns."""
    source = finding.scan.source
    if source is None or source.dicom is None:
        raise FmclipError(
            f"{finding.label} cannot be written as DICOM: it is not from a DICOM file that says which study, series "
            "and image it is. Use the PNG or NIfTI files."
        )
    return source.dicom, source.shape


def _series(description: str, number: int) -> dict[str, Any]:
    """What every new object says of itself."""
    return {
        "series_instance_uid": highdicom.UID(),
        "series_number": number,
        "sop_instance_uid": highdicom.UID(),
        "instance_number": 1,
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": MANUFACTURER,
        "software_versions": __version__,
        "device_serial_number": "none",
        "series_description": f"{_RESEARCH}: {description}",  # at most 64 characters
    }


def _stand_in(reference: DicomReference, shape: tuple[int, int]) -> Dataset:
    """The source as highdicom wants to see it: one plane with its geometry, and nothing of the patient.

    It passes as a secondary capture, because highdicom asks of the real kinds (an enhanced MR, a CT) what their files
    need not have; `_refer` puts the real kind and frame in.
    """
    image = Dataset()
    image.StudyInstanceUID, image.SeriesInstanceUID = reference.study, reference.series
    image.SOPInstanceUID, image.SOPClassUID = reference.instance, SecondaryCaptureImageStorage
    image.Rows, image.Columns = shape
    image.Modality = "OT"
    for name in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID"):
        setattr(image, name, "")
    image.StudyDate = image.StudyTime = ""
    plane = reference.spacing, reference.thickness, reference.position, reference.orientation
    if reference.frame_of_reference is not None and None not in plane:
        # all or nothing: readers refuse half a geometry, and without one the mask still lies on the image's pixels
        image.FrameOfReferenceUID = reference.frame_of_reference
        image.PixelSpacing, image.SliceThickness = list(reference.spacing or ()), reference.thickness
        image.ImagePositionPatient = list(reference.position or ())
        image.ImageOrientationPatient = list(reference.orientation or ())
    return image


def _refer(made: Dataset, reference: DicomReference) -> None:
    """Name the source's real class and frame wherever the object refers to it."""

    def fix(item: Dataset, element: Any) -> None:
        if element.keyword == "ReferencedSOPInstanceUID" and element.value == reference.instance:
            item.ReferencedSOPClassUID = reference.sop_class
            if reference.frame is not None:
                item.ReferencedFrameNumber = reference.frame

    made.walk(fix)


def _image_item(reference: DicomReference) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = reference.sop_class, reference.instance
    if reference.frame is not None:
        item.ReferencedFrameNumber = reference.frame
    return item


def _on_source(anomaly_map: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Bring a map [h, w] back to the rows and columns of the file that the scan was read from."""
    if anomaly_map.shape == shape:
        return anomaly_map
    return cv2.resize(anomaly_map, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR)


def _patient_orientation(reference: DicomReference) -> tuple[str, str] | None:
    """Main directions of rows and columns ("L", "P"); None where they are not known (PS3.3 section C.7.6.1.1.1)."""
    if reference.orientation is None:
        return None
    ends = []
    for cosines in (reference.orientation[:3], reference.orientation[3:]):
        axis = int(np.abs(cosines).argmax())
        ends.append(_ORIENTATIONS[axis][0 if cosines[axis] > 0 else 1])
    return ends[0], ends[1]
