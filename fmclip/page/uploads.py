"""Uploaded files: decoded at once and then deleted, because gradio keeps them under their own names and serves them."""

from __future__ import annotations

import contextlib
import secrets
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gradio.utils import get_upload_folder

from fmclip.errors import ScanError
from fmclip.scans import AS_STORED, CT_WINDOWS, Scan, parse_window, read_scan, shrink
from fmclip.scans.archives import gunzip, is_zip, unpack
from fmclip.scans.scan import MAX_VOLUME_BYTES, Unreadable
from fmclip.scans.series import group_series, parse_slices
from fmclip.scans.sniff import HEAD_BYTES, sniff

MAX_SECONDS = 120.0
"""Files of one upload that were not begun by then are left out."""
WINDOWS = (AS_STORED, *CT_WINDOWS)
"""Windows to choose from; the first is the file's own, or a robust range where it has none."""


@dataclass(frozen=True)
class Reading:
    """How volumes and raw intensities become pictures; other files leave it out of account.

    Attributes:
        slices: Slices of a volume or series, or frames, counted from 0; empty for the middle one of a volume, and for
            all files of a series.
        window: A name out of `WINDOWS`.
    """

    slices: tuple[int, ...] = ()
    window: str = AS_STORED

    @classmethod
    def parse(cls, slice_text: str | None, window: str) -> Reading:
        """Read what a person typed for the slices, see `parse_slices`.

        Raises:
            FmclipError: It is something else.
        """
        return cls(parse_slices(slice_text), window)


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
    """Read uploaded scans and delete the files. Archives are unpacked, and files of a DICOM series put in order.

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
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="fmclip-upload-") as folder:
            wanted = _wanted([Path(path) for path in paths], Path(folder), reading)
            if len(wanted) > limit:
                many = (
                    f"{len(wanted)} scans are too many here: upload at most {limit} at a time. None of them was read."
                )
                return Upload([], [ScanError(many)], {}, 0)
            for number, (source, index) in enumerate(wanted, start=first):
                try:
                    if isinstance(source, Unreadable):
                        raise ScanError(f"{noun} {number} {source}")
                    if time.monotonic() - started > MAX_SECONDS:
                        raise ScanError(f"{noun} {number} was left out: reading took too long. Upload fewer at a time.")
                    scan, window = _read(source, f"{noun} {number}", index, reading.window)
                except ScanError as error:
                    errors.append(error)
                    continue
                scans.append(scan)
                if window is not None:
                    windows[scan] = window
            return Upload(scans, errors, windows, len(wanted))
    finally:
        for path in paths:
            delete(path)


def _wanted(paths: Sequence[Path], folder: Path, reading: Reading) -> list[tuple[Path | Unreadable, int | None]]:
    """Every picture to be read: a file, or why an archive was refused, and the slice of it that is wanted."""
    found: list[tuple[Path | Unreadable, int | None]] = []
    files: list[Path] = []
    for number, path in enumerate(paths):
        if not path.is_file() or not is_zip(path):
            files.append(path)
            continue
        (folder / str(number)).mkdir()
        try:
            files += unpack(path, folder / str(number))
        except Unreadable as reason:
            found.append((reason, None))
    for group in group_series(files):
        if len(group) > 1:  # a series: its slices are its files
            chosen = [place for place in reading.slices if place < len(group)] if reading.slices else range(len(group))
            found += [(group[place], None) for place in chosen]
            if not chosen:
                found.append((Unreadable(f"has no such slice: this series has slices 0 to {len(group) - 1}."), None))
        elif reading.slices and _is_volume(group[0]):
            unzipped = folder / f"volume{len(found)}"
            many = len(reading.slices) > 1 and gunzip(group[0], unzipped, MAX_VOLUME_BYTES)
            found += [(unzipped if many else group[0], index) for index in reading.slices]
        else:
            found.append((group[0], None))
    return found


def _is_volume(path: Path) -> bool:
    """Whether a file is of a kind that may hold several slices."""
    try:
        with path.open("rb") as file:
            return sniff(file.read(HEAD_BYTES)) in ("DICOM", "NIfTI")
    except (OSError, Unreadable):
        return False


def describe_window(name: str) -> str:
    """Name a window with its numbers ("lung: centre -600, width 1500 HU")."""
    if name not in CT_WINDOWS:
        return name
    centre, width = CT_WINDOWS[name]
    return f"{name}: centre {centre:.0f}, width {width:.0f} HU"


def _read(path: Path, label: str, index: int | None, window: str) -> tuple[Scan, str | None]:
    """Read one file; with the name of its window if its kind has one."""
    scan = shrink(read_scan(path, label=label, slice_index=index, window=parse_window(window)))
    if not _is_volume(path):
        return scan, None
    if index is None:
        return scan, window  # the reader notes where the middle is
    return replace(scan, notes=(*scan.notes, f"slice {index} is shown")), window


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
    """Delete uploaded files that are refused, for whatever reason, before anyone has read them."""
    try:
        yield
    except Exception:
        for path in paths or []:
            delete(path)
        raise


def new_file(suffix: str, what: str = "adapter") -> Path:
    """Name a file for download that nobody can guess, in a folder of gradio's cache."""
    token = secrets.token_hex(16)
    folder = Path(get_upload_folder()) / token
    folder.mkdir(parents=True)
    return folder / f"fmclip-{what.replace(' ', '-')}-{token[:8]}{suffix}"
