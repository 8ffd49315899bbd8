"""Which files of a folder of masks belong to which scan."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from fmclip.evaluation.datasets import Case
from fmclip.scans import find_scan_files

NO_SCAN = "files among the masks that belong to no scan"
_MASK = re.compile(r"(.+)_mask(?:_\d+)?", re.IGNORECASE)


def stem(path: Path) -> str:
    """File name without its endings: "7" of "7.nii.gz", but "scan.v2" of "scan.v2.png"."""
    return path.name[: -len(".nii.gz")] if path.name.lower().endswith(".nii.gz") else path.stem


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
        """List the masks of a scan."""
        return tuple(self._masks.get(stem(scan), ()))

    def count_strays(self, scans: Iterable[Path]) -> int:
        """Count the files that belong to none of these scans."""
        claimed = {path for scan in scans for path in self.of(scan)}
        return len({path for own in self._masks.values() for path in own} - claimed)


def without_missing_masks(case: Case, left_out: Counter[str]) -> Case:
    """Drop masks that are not there, and count them."""
    there = tuple(path for path in case.masks if path.is_file())
    if len(there) == len(case.masks):
        return case
    left_out["masks that do not exist"] += len(case.masks) - len(there)
    return replace(case, masks=there)
