"""Uploaded files: decoded at once and then deleted, because gradio keeps them under their own names and serves them."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from gradio.utils import get_upload_folder

from fmclip.errors import FmclipError, ScanError
from fmclip.scans import AS_STORED, CT_WINDOWS, Scan, parse_window, read_scan
from fmclip.scans.sniff import HEAD_BYTES, sniff

MAX_SIDE = 1024
"""Longer sides are shrunk on the page, so that many visitors fit into memory; towers look at a few hundred pixels."""
MIDDLE = "middle"
WINDOWS = (AS_STORED, *CT_WINDOWS)
"""Windows to choose from; the first is the file's own, or a robust range where it has none."""


@dataclass(frozen=True)
class Reading:
    """How volumes and raw intensities become a picture; other files leave it out of account.

    Attributes:
        slice_index: Slice or frame, counted from 0; None: the middle one.
        window: A name out of `WINDOWS`.
    """

    slice_index: int | None = None
    window: str = AS_STORED

    @classmethod
    def parse(cls, slice_text: str | None, window: str) -> Reading:
        """Read what a person typed for the slice: a number from 0, "middle" or nothing.

        Raises:
            FmclipError: It is something else.
        """
        text = (slice_text or "").strip().lower()
        if text in ("", MIDDLE):
            return cls(None, window)
        if not (text.isascii() and text.isdigit() and len(text) <= 6):
            raise FmclipError("The slice must be a whole number from 0, or the word middle. No file was read.")
        return cls(int(text), window)


@dataclass(frozen=True)
class Upload:
    """What became of uploaded files.

    Attributes:
        scans: The scans that could be read, in their order.
        errors: Why the others could not; each names its place.
        windows: Name of the window that a scan was read with, for scans from DICOM and NIfTI.
        taken: How many places were given out: a refused file keeps its number.
    """

    scans: list[Scan]
    errors: list[ScanError]
    windows: dict[Scan, str]
    taken: int


_PLAIN = Reading()


def take_scans(paths: Sequence[str], first: int, limit: int, reading: Reading = _PLAIN, noun: str = "scan") -> Upload:
    """Read uploaded scans and delete the files.

    Args:
        paths: The files in gradio's cache.
        first: Number of the first one ("scan {first}").
        limit: Refuse to read more than this many.
        reading: How to read volumes.
        noun: What they are called ("scan").

    Returns:
        What became of them; what cannot be read is reported, the others go on.
    """
    scans: list[Scan] = []
    errors: list[ScanError] = []
    windows: dict[Scan, str] = {}
    try:
        if len(paths) > limit:
            many = f"{len(paths)} files are too many here: upload at most {limit} at a time. None of them was read."
            return Upload([], [ScanError(many)], {}, 0)
        for place, path in enumerate(paths):
            try:
                scan, window = _read(path, f"{noun} {first + place}", reading)
            except ScanError as error:
                errors.append(error)
                continue
            scans.append(scan)
            if window is not None:
                windows[scan] = window
        return Upload(scans, errors, windows, len(paths))
    finally:
        for path in paths:
            delete(path)


def describe_window(name: str) -> str:
    """Name a window with its numbers ("lung: centre -600, width 1500 HU")."""
    if name not in CT_WINDOWS:
        return name
    centre, width = CT_WINDOWS[name]
    return f"{name}: centre {centre:.0f}, width {width:.0f} HU"


def _read(path: str, label: str, reading: Reading) -> tuple[Scan, str | None]:
    """Read one file; with the name of its window if its kind has one."""
    scan = shrink(read_scan(path, label=label, slice_index=reading.slice_index, window=parse_window(reading.window)))
    with Path(path).open("rb") as file:
        if sniff(file.read(HEAD_BYTES)) not in ("DICOM", "NIfTI"):
            return scan, None
    if reading.slice_index is None:
        return scan, reading.window  # the reader notes where the middle is
    return replace(scan, notes=(*scan.notes, f"slice {reading.slice_index} is shown")), reading.window


def shrink(scan: Scan) -> Scan:
    """Return the scan with no side longer than `MAX_SIDE`, and a note where that changed it."""
    scale = MAX_SIDE / max(scan.height, scan.width)
    if scale >= 1:
        return scan
    size = (max(1, round(scan.width * scale)), max(1, round(scan.height * scale)))
    pixels = np.clip(cv2.resize(scan.pixels, size, interpolation=cv2.INTER_AREA), 0, 1)
    note = f"shown at {size[0]} x {size[1]} of {scan.width} x {scan.height} pixels"
    return replace(scan, pixels=pixels, notes=(*scan.notes, note))


def delete(path: str | Path | None) -> None:
    """Delete a file of gradio's cache with its folder; files elsewhere are left alone."""
    if path is None:
        return
    file, cache = Path(path).resolve(), Path(get_upload_folder()).resolve()
    if cache in file.parents:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
        if file.parent != cache:
            with contextlib.suppress(OSError):  # not empty: another visitor uploaded the same content
                file.parent.rmdir()


@contextlib.contextmanager
def deleted_if_refused(paths: Sequence[str] | None) -> Iterator[None]:
    """Delete uploaded files that are refused before anyone has read them."""
    try:
        yield
    except FmclipError:
        for path in paths or []:
            delete(path)
        raise


def new_file(suffix: str, what: str = "adapter") -> Path:
    """Name a file for download that nobody can guess, in a folder of gradio's cache."""
    token = secrets.token_hex(16)
    folder = Path(get_upload_folder()) / token
    folder.mkdir(parents=True)
    return folder / f"fmclip-{what}-{token[:8]}{suffix}"
