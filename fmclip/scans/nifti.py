"""NIfTI volumes (.nii, .nii.gz): one slice, seen the way radiologists look at it."""

import gzip
import io
import math
from pathlib import Path
from typing import BinaryIO, NamedTuple

import nibabel
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

from fmclip.scans.intensity import apply_window, fill_missing, robust_range, stretch
from fmclip.scans.scan import Unreadable, check_size, choose_slice
from fmclip.scans.source import Source

_SHORTEST_HEADER, _LONGEST_HEADER = 348, 540
_LONGEST_EXTENSION = 2**24  # bytes between header and data


class _Volume(NamedTuple):
    stored: np.ndarray  # [X, Y, Z], in the file's own number type and orientation
    affine: np.ndarray  # [4, 4], voxel to patient coordinates
    slope: float
    intercept: float
    volumes: int  # how many the file holds (time points, channels); the first is the one read


def read_nifti(
    path: Path, slice_index: int | None, window: tuple[float, float] | None
) -> tuple[np.ndarray, list[str], Source]:
    """Read one slice of a NIfTI volume.

    The volume is brought to canonical orientation and an axial slice is taken (of a volume that is one voxel thin along
    another axis, that single slice). Rows run from anterior to posterior (or superior to inferior), columns from the
    patient's right to left (or anterior to posterior), as DICOM viewers show it. Values are stretched between the 0.5
    and 99.5 percentiles of the whole volume, so that all its slices are comparable.

    Args:
        path: The file, gzipped or not.
        slice_index: Slice, counted from the feet (0) upwards; None: the middle one.
        window: (centre, width) in the volume's units, instead of the percentiles.

    Returns:
        ([H, W] float32 in [0, 1], notes, where the slice lies).

    Raises:
        Unreadable: If it is too large, cut short, has no such slice, or holds hardly any numbers.
        Exception: Whatever the libraries raise for a damaged file.
    """
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if zipped:
            with gzip.GzipFile(fileobj=file) as unzipped:
                volume = _read_volume(unzipped)  # type: ignore[arg-type]
        else:
            volume = _read_volume(file)
    notes: list[str] = []
    if volume.volumes > 1:
        notes.append(f"the file holds {volume.volumes} volumes; the first one is read")
    stored, source = _take_slice(volume, slice_index, notes)  # [H, W]
    values = fill_missing(stored * volume.slope + volume.intercept, notes)
    if window is not None:
        return apply_window(values, *window), notes, source
    low, high = robust_range(volume.stored, 0.5, 99.5)
    low, high = sorted((low * volume.slope + volume.intercept, high * volume.slope + volume.intercept))
    return stretch(values, (low, high)), notes, source


def _read_volume(file: BinaryIO) -> _Volume:
    """Read the header and, if the size it declares is acceptable, exactly the bytes of the first volume."""
    head = file.read(_LONGEST_HEADER)
    header = _read_header(head)
    shape = tuple(int(side) for side in header.get_data_shape())
    dtype = header.get_data_dtype()
    if len(shape) < 2 or dtype.kind not in "iuf":
        raise Unreadable("holds no grey picture or volume. Export it as a 3-D NIfTI volume of plain numbers.")
    sides = (*shape, 1)[:3]
    x, y, z = sorted(sides, reverse=True)  # the slice may lie in any direction: check the largest
    check_size(x, y, stack=z, pixel_bytes=dtype.itemsize)
    start = int(header.get_data_offset())
    if not _SHORTEST_HEADER <= start <= _LONGEST_EXTENSION:
        raise Unreadable("could not be decoded as NIfTI: its header is damaged. Export it again.")
    stored = np.empty(math.prod(sides), dtype)
    raw = stored.view(np.uint8)
    already = np.frombuffer(head[start:], np.uint8)[: raw.size]  # of a short header, data was read along
    raw[: already.size] = already
    file.read(max(0, start - len(head)))
    _read_exactly(file, raw.data[already.size :])
    slope, intercept = header.get_slope_inter()
    slope, intercept = (1.0, 0.0) if slope is None else (float(slope), float(intercept or 0.0))
    volumes = math.prod(shape[3:])
    return _Volume(stored.reshape(sides, order="F"), header.get_best_affine(), slope, intercept, volumes)


def _read_header(head: bytes) -> nibabel.Nifti1Header:
    """Parse the header of a NIfTI-1 or NIfTI-2 file."""
    if head[344:348] == b"n+1\x00":
        return nibabel.Nifti1Header.from_fileobj(io.BytesIO(head))
    if head[4:8] == b"n+2\x00":
        return nibabel.Nifti2Header.from_fileobj(io.BytesIO(head))
    if head[344:348] == b"ni1\x00" or head[4:8] == b"ni2\x00":
        raise Unreadable("is the header of a NIfTI pair without its data. Save it as one .nii file.")
    raise Unreadable("is a gzip archive that holds no NIfTI volume. Unpack it and upload the pictures.")


def _read_exactly(file: BinaryIO, target: memoryview) -> None:
    """Fill `target` from a stream; never reads (or unzips) more than that."""
    while len(target):
        count = file.readinto(target)  # type: ignore[attr-defined]
        if not count:
            raise Unreadable("could not be decoded as NIfTI: the file is cut short. Copy or export it again.")
        target = target[count:]


def _take_slice(volume: _Volume, slice_index: int | None, notes: list[str]) -> tuple[np.ndarray, Source]:
    """Return the stored numbers of one slice, [H, W], in canonical orientation, and where it lies."""
    stored, affine = volume.stored, None
    orientation = io_orientation(volume.affine) if np.isfinite(volume.affine).all() else np.full((3, 2), np.nan)
    if np.isfinite(orientation).all():
        affine = volume.affine @ inv_ornt_aff(orientation, stored.shape)
        stored = apply_orientation(stored, orientation)  # [right, anterior, superior]
    else:
        notes.append("the file states no usable orientation; the slice is shown as it is stored")
    thin = [axis for axis in range(3) if stored.shape[axis] == 1]
    axis = thin[0] if len(thin) == 1 else 2
    index = choose_slice(slice_index, stored.shape[axis], notes)
    plane = stored.take(index, axis=axis)  # [right or anterior, anterior or superior]
    if affine is not None:
        affine = affine @ _pixels_to_voxels(axis, index, plane.shape)
    picture = plane.T[::-1, ::-1]
    shape = (picture.shape[0], picture.shape[1])
    return picture, Source(shape, index if stored.shape[axis] > 1 else None, affine)


def _pixels_to_voxels(axis: int, index: int, plane: tuple[int, ...]) -> np.ndarray:
    """Matrix [4, 4] from (column, row, 0, 1) of the turned picture to voxels of the canonical volume."""
    first, second = (other for other in range(3) if other != axis)
    matrix = np.zeros((4, 4))
    matrix[first, 0], matrix[first, 3] = -1, plane[0] - 1
    matrix[second, 1], matrix[second, 3] = -1, plane[1] - 1
    matrix[axis, 2], matrix[axis, 3] = 1, index
    matrix[3, 3] = 1
    return matrix
