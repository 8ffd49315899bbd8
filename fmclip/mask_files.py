"""Masks as files: which belong to which scan, by their names, and what they mark."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fmclip.scans import find_scan_files

NO_SCAN = "files among the masks that belong to no scan"
_MASK = re.compile(r"(.+)_mask(?:_\d+)?", re.IGNORECASE)


def stem(path: Path) -> str:
    """File name without its endings: "7" of "7.nii.gz", but "scan.v2" of "scan.v2.png"."""
    return path.name[: -len(".nii.gz")] if path.name.lower().endswith(".nii.gz") else path.stem


def is_mask(path: Path) -> bool:
    """Whether a file is called NAME_mask or NAME_mask_1."""
    return _MASK.fullmatch(stem(path)) is not None


def marked(pixels: np.ndarray) -> np.ndarray:
    """What is white on the picture of a mask or, where it was saved as 0 and 1 of 255, what is not black.

    Args:
        pixels: [H, W] or [H, W, 3] in [0, 1].

    Returns:
        bool [H, W].
    """
    plane = pixels if pixels.ndim == 2 else pixels.max(axis=2)  # [H, W]
    return plane > 0.5 if plane.max() > 0.5 else plane > 0


class MaskFolder:
    """Masks in a folder of their own; a mask is called NAME, NAME_mask or NAME_mask_1 for the scan NAME.

    Args:
        folder: The folder; None or one that is not there holds nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._masks: dict[str, list[Path]] = {}
        for path in find_scan_files([folder]) if folder and folder.is_dir() else []:
            named_after = _MASK.fullmatch(stem(path))
            for name in (stem(path), *(named_after.groups() if named_after else ())):
                self._masks.setdefault(name, []).append(path)

    def of(self, scan: Path) -> tuple[Path, ...]:
        """List the masks of a scan; one that lies among the masks is not its own."""
        return tuple(path for path in self._masks.get(stem(scan), ()) if path.resolve() != scan.resolve())

    def count_strays(self, scans: Iterable[Path]) -> int:
        """Count the files that belong to none of these scans, and are none of them."""
        scans = list(scans)
        claimed = {path for scan in scans for path in self.of(scan)}
        own = {scan.resolve() for scan in scans}
        strays = {path for paths in self._masks.values() for path in paths} - claimed
        return sum(path.resolve() not in own for path in strays)
