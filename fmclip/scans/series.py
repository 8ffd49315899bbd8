"""Slices of one volume: which ones a person asks for, and which single DICOM files belong together."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom

from fmclip.errors import FmclipError
from fmclip.scans.sniff import HEAD_BYTES, sniff

MIDDLE = "middle"
MAX_SLICES = 64
"""Slices that are taken of one volume or series."""
_TAGS = ["SeriesInstanceUID", "InstanceNumber", "ImagePositionPatient", "ImageOrientationPatient", "NumberOfFrames"]


def parse_slices(text: str | None) -> tuple[int, ...]:
    """Read which slices a person asks for.

    Args:
        text: Numbers from 0 and ranges, with a step if wanted: "40", "40-60", "40-80:5", "10, 20-24"; "middle" or
            nothing for the middle slice.

    Returns:
        The slices in order, each once; empty for the middle one.

    Raises:
        FmclipError: It is something else, or too many.
    """
    plain = (text or "").strip().lower().replace("–", "-")
    if plain in ("", MIDDLE):
        return ()
    found: set[int] = set()
    for part in plain.split(","):
        span, _, step = part.strip().partition(":")
        first, _, last = span.partition("-")
        numbers = [
            _number(first),
            _number(last) if "-" in span else _number(first),
            _number(step) if ":" in part else 1,
        ]
        low, high, stride = numbers
        if high < low or stride < 1 or (high - low) // stride >= MAX_SLICES:
            raise FmclipError(
                f"The slices must be whole numbers from 0, upwards and at most {MAX_SLICES}, such as 40-80:5. "
                "No file was read."
            )
        found |= set(range(low, high + 1, stride))
    if len(found) > MAX_SLICES:
        raise FmclipError(
            f"These are {len(found)} slices: at most {MAX_SLICES} are read of a volume. No file was read."
        )
    return tuple(sorted(found))


def group_series(paths: Sequence[Path]) -> list[list[Path]]:
    """Put DICOM files of one series together, in the order of their slices; every other file stays alone.

    Only what says so is read of the headers, and nothing of it is kept.

    Args:
        paths: The files of an upload.

    Returns:
        Groups in the order of their first file; a series has at least two files of one picture each.
    """
    groups: dict[object, list[tuple[tuple[float, ...], Path]]] = {}
    for place, path in enumerate(paths):
        series, position = _header(path)
        groups.setdefault(series or place, []).append((position, path))
    return [[path for _, path in sorted(group, key=lambda one: one[0])] for group in groups.values()]


def _header(path: Path) -> tuple[str | None, tuple[float, ...]]:
    """Series and place within it of a single-frame DICOM file; (None, ()) for all else, damaged files too."""
    try:
        with path.open("rb") as file:
            if sniff(file.read(HEAD_BYTES)) != "DICOM":
                return None, ()
        dataset = pydicom.dcmread(path, force=True, stop_before_pixels=True, specific_tags=_TAGS)
        series = str(dataset.get("SeriesInstanceUID") or "")
        if not series or int(dataset.get("NumberOfFrames") or 1) > 1:
            return None, ()
        number = float(dataset.get("InstanceNumber") or 0)
        position, orientation = dataset.get("ImagePositionPatient"), dataset.get("ImageOrientationPatient")
        if position is None or orientation is None:
            return series, (0.0, number)
        directions = np.array([float(value) for value in orientation]).reshape(2, 3)
        normal = np.cross(directions[0], directions[1])
        height = float(normal @ np.array([float(value) for value in position]))
        return series, (height if np.isfinite(height) else 0.0, number)
    except Exception:  # the reader says later what is wrong with it
        return None, ()


def _number(text: str) -> int:
    text = text.strip()
    if not (text.isascii() and text.isdigit() and len(text) <= 6):
        raise FmclipError(
            "The slice must be a whole number from 0, a range such as 40-60 or 40-80:5, or the word middle. "
            "No file was read."
        )
    return int(text)
