"""The `Scan` value, the limits on what is read, and the reason for which a file is refused."""

import hashlib
from dataclasses import dataclass, field

import numpy as np

from fmclip.scans.source import Source

MAX_SCANS = 500
"""Files read from one upload; the rest are reported, not read."""
MAX_PIXELS = 40_000_000
"""Pixels (height x width) of one scan; a mammogram has 14 million. Checked on the declared size, before decoding."""
MAX_VOLUME_BYTES = 2**30
"""Declared, uncompressed bytes of a multi-frame DICOM or of one NIfTI volume."""
MAX_FILE_BYTES = 2**30
"""Bytes of one file as uploaded."""
MAX_UPLOAD_VALUES = 2**28
"""Pixel values (height x width x channels) held by all scans of one upload together: 1 GiB as float32."""

FLAT_NOTE = "the image is one flat value"


class Unreadable(Exception):  # noqa: N818  (a reason, not yet an error: `read_scan` makes the ScanError of it)
    """Why a file is refused, worded as the rest of a sentence that begins with the scan's label ("is empty ...")."""


@dataclass(frozen=True, eq=False)
class Scan:
    """One decoded scan: pixels and where they lie, without a file name or anything else that names the patient.

    Attributes:
        pixels: [H, W] (grey) or [H, W, 3] (colour) float32 in [0, 1]; read-only.
        label: What the person sees ("scan 3"): its place in the upload.
        notes: Warnings about this scan, each a short sentence part ("the image is one flat value").
        source: Where they lie, for DICOM and NIfTI exports; None for plain pictures. No part of the digest.
        digest: SHA-256 of the decoded pixels and their shape; equal for duplicates, and a key for caches.
    """

    pixels: np.ndarray
    label: str = "scan"
    notes: tuple[str, ...] = ()
    source: Source | None = field(default=None, repr=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        pixels = np.ascontiguousarray(self.pixels, dtype=np.float32)
        if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)) or pixels.size == 0:
            raise ValueError(f"scan pixels must be [H, W] or [H, W, 3] and not empty, not {list(pixels.shape)}")
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # also False for NaN
            raise ValueError("scan pixels must lie in [0, 1]")
        if pixels.flags.writeable:
            # The caller may still write into its own array: that must not change a scan whose digest is taken.
            pixels = pixels.copy() if pixels is self.pixels else pixels
            pixels.flags.writeable = False
        object.__setattr__(self, "pixels", pixels)
        object.__setattr__(self, "notes", tuple(self.notes))
        digest = hashlib.sha256(repr(pixels.shape).encode())
        digest.update(pixels.data)
        object.__setattr__(self, "digest", digest.hexdigest())

    @property
    def height(self) -> int:
        """Rows of the source image."""
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        """Columns of the source image."""
        return int(self.pixels.shape[1])


def check_size(height: int, width: int, *, stack: int = 1, pixel_bytes: int = 1) -> None:
    """Refuse a declared size that would not fit into memory; called before anything is decoded.

    Args:
        height: Declared rows.
        width: Declared columns.
        stack: Declared frames or slices.
        pixel_bytes: Bytes per pixel, all samples together.

    Raises:
        Unreadable: If the size is not positive, or above `MAX_PIXELS` or `MAX_VOLUME_BYTES`.
    """
    if height < 1 or width < 1 or stack < 1:
        raise Unreadable(f"declares a picture of {width} x {height} x {stack} pixels: it holds nothing to look at.")
    if height * width > MAX_PIXELS:
        raise Unreadable(
            f"is {width} x {height} pixels, more than the {MAX_PIXELS // 10**6} million pixels that are read. "
            "Crop it or save it smaller."
        )
    if height * width * stack * pixel_bytes > MAX_VOLUME_BYTES:
        raise Unreadable(
            f"holds {stack} pictures of {width} x {height} pixels, more than the {MAX_VOLUME_BYTES // 2**20} MiB that "
            "are read from one file. Export fewer of them."
        )


def choose_slice(slice_index: int | None, count: int, notes: list[str]) -> int:
    """Return the slice (or frame) to read: the one asked for, else the middle one, which is then noted.

    Args:
        slice_index: Counted from 0; None: the middle.
        count: How many there are.
        notes: Gets a note when the middle one of several was taken.

    Returns:
        Index in 0 ... count - 1.

    Raises:
        Unreadable: If there is no such slice.
    """
    if slice_index is None:
        if count > 1:
            notes.append(f"the middle slice is shown ({count // 2} of 0 to {count - 1})")
        return count // 2
    if not 0 <= slice_index < count:
        raise Unreadable(f"has no slice {slice_index}: its slices are 0 to {count - 1}.")
    return int(slice_index)
