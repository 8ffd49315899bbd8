"""Where the pixels of a scan lie in the patient, and which DICOM image they are of: for exports that go back there.

Nothing here names the patient. The UIDs point at the study, though, so they go into DICOM exports and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


@dataclass(frozen=True)
class DicomReference:
    """What a DICOM object must say of the image that it belongs to, and no more.

    Attributes:
        study: Study Instance UID.
        series: Series Instance UID.
        instance: SOP Instance UID.
        sop_class: SOP Class UID.
        frame: Number of the frame, from 1, of a file with several; None otherwise.
        frame_of_reference: Frame of Reference UID; None where the file has none.
        position: Image Position (Patient): centre of the first pixel, in mm; None where it is not known.
        orientation: Image Orientation (Patient): direction of a row, then of a column.
        spacing: Distance of rows and of columns, in mm.
        thickness: Slice thickness in mm.
    """

    study: str
    series: str
    instance: str
    sop_class: str
    frame: int | None = None
    frame_of_reference: str | None = None
    position: tuple[float, ...] | None = None
    orientation: tuple[float, ...] | None = None
    spacing: tuple[float, ...] | None = None
    thickness: float | None = None


@dataclass(frozen=True, eq=False)
class Source:
    """Where a scan was read from.

    Attributes:
        shape: (H, W) of the picture in the file; a scan that was made smaller later covers the same field.
        slice_index: Slice or frame, from 0; None where the file holds one picture.
        affine: [4, 4] from (column, row, 0, 1) of the picture in the file to mm, right-anterior-superior as in NIfTI;
            None where it is not known.
        dicom: For a scan from a DICOM file that says which image it is.
    """

    shape: tuple[int, int]
    slice_index: int | None = None
    affine: np.ndarray | None = None
    dicom: DicomReference | None = field(default=None, repr=False)

    def affine_for(self, shape: tuple[int, int]) -> np.ndarray | None:
        """The affine of a picture of (H, W) pixels over the same field; pixel centres stay where they belong."""
        if self.affine is None:
            return None
        (rows, columns), (height, width) = self.shape, shape
        across, down = columns / width, rows / height
        scale = np.diag([across, down, 1.0, 1.0])
        scale[:2, 3] = (across - 1) / 2, (down - 1) / 2
        return self.affine @ scale


def dicom_affine(reference: DicomReference) -> np.ndarray | None:
    """Affine [4, 4] of a DICOM image, see `Source` (PS3.3 section C.7.6.2.1.1); None without its geometry."""
    if reference.position is None or reference.orientation is None or reference.spacing is None:
        return None
    along_row, along_column = np.array(reference.orientation).reshape(2, 3)
    normal = np.cross(along_row, along_column) * (reference.thickness or 1.0)
    affine = np.eye(4)
    affine[:3] = np.column_stack(
        [along_row * reference.spacing[1], along_column * reference.spacing[0], normal, reference.position]
    )
    affine[:3] = _LPS_TO_RAS @ affine[:3]
    return affine
