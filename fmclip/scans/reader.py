"""Any file -> `Scan`, or a `ScanError` that says what is wrong with it and what to do."""

import contextlib
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fmclip.errors import ScanError
from fmclip.scans.dicom import read_dicom
from fmclip.scans.nifti import read_nifti
from fmclip.scans.pictures import read_picture
from fmclip.scans.scan import (
    FLAT_NOTE,
    MAX_FILE_BYTES,
    MAX_PIXELS,
    MAX_SCANS,
    MAX_UPLOAD_VALUES,
    Scan,
    Unreadable,
)
from fmclip.scans.sniff import HEAD_BYTES, sniff
from fmclip.scans.source import Source
from fmclip.scans.tiff import read_tiff

# Warnings of the decoders are process-wide settings, so one file is decoded at a time; that also bounds the memory.
_DECODING = threading.Lock()
# The decoders log paths, and tags of patient data, at various levels; what a person must know is in notes and errors.
for _name in ("PIL", "pydicom", "nibabel", "nibabel.global", "tifffile"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)


def read_scan(
    path: str | os.PathLike[str],
    *,
    label: str = "scan",
    slice_index: int | None = None,
    window: tuple[float, float] | None = None,
) -> Scan:
    """Read one PNG, JPEG, TIFF, BMP, WebP, DICOM or NIfTI file; its kind is told by its content, not its name.

    Args:
        path: The file.
        label: What the person calls it; every message begins with it.
        slice_index: Frame of a DICOM or axial slice of a NIfTI file, counted from 0; None: the middle one. Files with
            one picture leave it out of account.
        window: (centre, width) for DICOM and NIfTI, in the file's units (`CT_WINDOWS` holds the usual ones); None: the
            file's own window, or a robust range. Use the same one for reference and query scans.

    Returns:
        The scan, without file name or patient data.

    Raises:
        ScanError: If the file cannot be read; says what is wrong with it and what to do, without its name.
    """
    kind = ""
    try:
        with _quietly():
            kind = _kind_of(Path(path))
            pixels, notes, source = _decode(Path(path), kind, slice_index, window)
            if pixels.min() == pixels.max():
                notes.append(FLAT_NOTE)
            pixels.flags.writeable = False
            return Scan(pixels, label, tuple(notes), source)
    except Unreadable as reason:
        text = str(reason)
    except Exception as exc:  # the decoders raise anything for damaged files, often with the path in the text
        text = _explain(exc, kind)
    raise ScanError(f"{label} {text}")


def read_scans(
    paths: Sequence[str | os.PathLike[str]],
    *,
    first: int = 1,
    slice_index: int | None = None,
    window: tuple[float, float] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Scan], list[ScanError]]:
    """Read the files of one upload; what cannot be read is reported, and the others go on.

    Args:
        paths: The files, in the order in which the person sees them.
        first: Number of the first one: its label is "scan {first}".
        slice_index: As for `read_scan`, for all of them.
        window: Likewise.
        on_progress: Called with (files done, files in all) after each file.

    Returns:
        (scans, errors), each in upload order; a label keeps the place of its file, whether or not others failed.
    """
    scans: list[Scan] = []
    errors: list[ScanError] = []
    values = 0
    for place, path in enumerate(paths[:MAX_SCANS]):
        label = f"scan {first + place}"
        try:
            scan = read_scan(path, label=label, slice_index=slice_index, window=window)
            if values + scan.pixels.size > MAX_UPLOAD_VALUES:
                raise ScanError(
                    f"{label} was left out: the scans of this upload are larger than {MAX_UPLOAD_VALUES // 10**6} "
                    "million pixels together. Upload fewer of them, or smaller ones."
                )
            values += scan.pixels.size
            scans.append(scan)
        except ScanError as error:
            errors.append(error)
        if on_progress is not None:
            on_progress(place + 1, min(len(paths), MAX_SCANS))
    if len(paths) > MAX_SCANS:
        errors.append(
            ScanError(f"only the first {MAX_SCANS} of {len(paths)} files were read. Upload the others separately.")
        )
    return scans, errors


def find_scan_files(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """List the files of a mixed list of files and folders.

    Args:
        paths: Files, kept as given, and folders, searched with all their subfolders.

    Returns:
        The files, each folder's own sorted by path; hidden files and folders inside a folder are left out.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = (file for file in path.rglob("*") if file.is_file())
            found += sorted(f for f in inside if not any(part.startswith(".") for part in f.relative_to(path).parts))
        else:
            found.append(path)
    return found


def _kind_of(path: Path) -> str:
    """Tell the kind of a file by its content; refuse what cannot be opened or is too large."""
    if not path.is_file():
        raise Unreadable("was not found, or is not a file. Upload it again.")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise Unreadable(f"is larger than {MAX_FILE_BYTES // 2**20} MiB. Upload one picture or series at a time.")
    with path.open("rb") as file:
        return sniff(file.read(HEAD_BYTES))


def _decode(
    path: Path, kind: str, slice_index: int | None, window: tuple[float, float] | None
) -> tuple[np.ndarray, list[str], Source | None]:
    """Return ([H, W] or [H, W, 3] float32 in [0, 1], notes, where it lies) from the reader for this kind."""
    if kind == "DICOM":
        return read_dicom(path, slice_index, window)
    if kind == "NIfTI":
        return read_nifti(path, slice_index, window)
    return *(read_tiff(path) if kind == "TIFF" else read_picture(path, kind)), None


def _explain(exc: Exception, kind: str) -> str:
    """Word an unexpected exception for the person; its own text may hold a path or a tag and is not shown."""
    if isinstance(exc, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"is larger than the {MAX_PIXELS // 10**6} million pixels that are read. Crop it or save it smaller."
    if isinstance(exc, MemoryError):
        return "needs more memory than there is. Crop it or save it smaller."
    if not kind:
        return "could not be opened. Check that it may be read, or upload it again."
    hints = ("truncat", "less than expected", "unexpected end", "end-of-stream", "eof")
    is_short = isinstance(exc, EOFError) or any(hint in str(exc).lower() for hint in hints)
    what = "the file is cut short" if is_short else "the file is damaged or cut short"
    return f"could not be decoded as {kind}: {what}. Copy or export it again."


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep the decoders' warnings (with paths and tags in them) off the screen; a decompression bomb is an error."""
    with _DECODING, warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield
