"""Datasets on disk: a `manifest.csv`, or folders NAME/normal, NAME/abnormal and NAME/masks."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from fmclip.errors import FmclipError, ScanError
from fmclip.scans import find_scan_files, read_scan

MANIFEST = "manifest.csv"
SCAN_TYPES = {
    "brainmri": "brain MRI",
    "busi": "breast ultrasound",
    "chexpert": "chest X-ray",
}
"""What the scans of known datasets show; others are called "medical scan"."""


class DatasetError(FmclipError):
    """A dataset is missing, incomplete, or too small for what is asked."""


@dataclass(frozen=True)
class Case:
    """One scan with its answer.

    Attributes:
        path: The scan.
        is_abnormal: The answer.
        mask: Mask of what is abnormal, or None.
        group: Cases of one group are twins (one picture saved twice, one patient).
    """

    path: Path
    is_abnormal: bool
    mask: Path | None
    group: str


@dataclass(frozen=True)
class Dataset:
    """A named collection of cases.

    Attributes:
        name: Name of the dataset.
        cases: In the order of the manifest, or of the sorted files.
        scan_type: What the scans show, in words.
    """

    name: str
    cases: tuple[Case, ...]
    scan_type: str

    @property
    def has_masks(self) -> bool:
        """Whether pixel scores can be measured."""
        return any(case.mask is not None for case in self.cases)


def load_datasets(root: Path, names: Sequence[str] | None = None) -> list[Dataset]:
    """List the datasets of a folder.

    Args:
        root: Holds `manifest.csv` (columns dataset, path, label; mask and group if known), or folders NAME/normal,
            NAME/abnormal and, with masks of the same stem, NAME/masks. Without a manifest only exact copies are
            recognised as twins.
        names: Which ones; None or empty takes all.

    Returns:
        The datasets, in the order of `names` or as found.

    Raises:
        DatasetError: There is none, one is unknown, or the manifest cannot be used.
    """
    if not root.is_dir():
        raise DatasetError("The dataset folder was not found.")
    found = _from_manifest(root) if (root / MANIFEST).is_file() else _from_folders(root)
    if not found:
        raise DatasetError(
            f"The folder holds no dataset: neither a {MANIFEST} with normal and abnormal scans nor folders NAME/normal "
            "and NAME/abnormal."
        )
    unknown = [name for name in names or () if name not in found]
    if unknown:
        raise DatasetError(f"No dataset is called {', '.join(unknown)}; there are {', '.join(sorted(found))}.")
    return [found[name] for name in dict.fromkeys(names or found)]


def read_mask(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Read a mask.

    Args:
        path: A picture; everything above half of its range is abnormal.
        shape: (H, W) of the scan; a mask of another size is resized.

    Returns:
        bool [H, W].

    Raises:
        ScanError: It cannot be read.
    """
    pixels = read_scan(path, label="a mask").pixels
    plane = pixels if pixels.ndim == 2 else pixels.max(axis=2)
    mask = (plane > 0.5).astype(np.uint8)
    if not mask.any() and plane.any():  # masks are also saved as 0 and 1 of 255
        mask = (plane > 0).astype(np.uint8)
    if mask.shape != shape:
        mask = cv2.resize(mask, (shape[1], shape[0]), interpolation=cv2.INTER_NEAREST)
    return mask.astype(bool)


def _from_manifest(root: Path) -> dict[str, Dataset]:
    cases: dict[str, list[Case]] = {}
    with (root / MANIFEST).open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = {"dataset", "path", "label"} - set(reader.fieldnames or ())
        if missing:
            raise DatasetError(f"The manifest lacks the column {', '.join(sorted(missing))}.")
        for line, row in enumerate(reader, start=2):
            label = (row["label"] or "").strip().lower()
            if label not in ("normal", "abnormal"):
                raise DatasetError(f'Line {line} of the manifest: the label must be "normal" or "abnormal".')
            mask = root / row["mask"] if row.get("mask") else None
            case = Case(root / row["path"], label == "abnormal", mask, row.get("group") or row["path"])
            cases.setdefault(row["dataset"], []).append(case)
    return {name: Dataset(name, tuple(own), _scan_type(name)) for name, own in cases.items()}


def _from_folders(root: Path) -> dict[str, Dataset]:
    found = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if (folder / "normal").is_dir() and (folder / "abnormal").is_dir():
            found[folder.name] = Dataset(folder.name, tuple(_folder_cases(folder)), _scan_type(folder.name))
    return found


def _folder_cases(folder: Path) -> list[Case]:
    """List the readable scans of one dataset; equal pixels make a group."""
    mask_files = find_scan_files([folder / "masks"]) if (folder / "masks").is_dir() else []
    masks = {_stem(path): path for path in mask_files}
    cases = []
    for label in ("normal", "abnormal"):
        for path in find_scan_files([folder / label]):
            try:
                digest = read_scan(path).digest
            except ScanError:  # notes and licences lie beside scans
                continue
            mask = masks.get(_stem(path)) if label == "abnormal" else None
            cases.append(Case(path, label == "abnormal", mask, digest))
    return cases


def _stem(path: Path) -> str:
    return path.name.partition(".")[0]


def _scan_type(name: str) -> str:
    return SCAN_TYPES.get(name.lower(), "medical scan")
