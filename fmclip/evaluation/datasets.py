"""Datasets on disk: cases with known answers, found by their layout."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from fmclip.errors import FmclipError
from fmclip.mask_files import marked
from fmclip.scans import read_scan

SCAN_TYPES = {
    "brain": "brain MRI",
    "brats": "brain MRI",
    "br35h": "brain MRI",
    "busi": "breast ultrasound",
    "chexpert": "chest X-ray",
    "chest": "chest X-ray",
    "rsna": "chest X-ray",
    "liver": "liver CT",
    "oct2017": "retinal OCT",
    "resc": "retinal OCT",
    "camelyon": "histopathology",
    "histopathology": "histopathology",
}
"""What the scans of a dataset show whose name contains the word; others are called "medical scan"."""


OnProgress = Callable[[float, str], None]
"""Called with (share done, what happens in words)."""


class DatasetError(FmclipError):
    """A dataset is missing, incomplete, or too small for what is asked."""


class Part(str, Enum):
    """What the makers of a dataset meant a case for."""

    TRAIN = "train"
    TEST = "test"


@dataclass(frozen=True)
class Case:
    """One scan with its answer.

    Attributes:
        path: The scan.
        is_abnormal: The answer.
        masks: Masks of what is abnormal, to be united; empty if nobody drew any.
        group: Cases of one group are twins (one picture saved twice, one patient).
        part: The official split; None where the dataset has none.
        look: Cases of one look are almost the same picture, whatever their groups say; empty where nobody looked.
        copies: Looks of a dataset to learn from that the case is a copy of, where it is tested with that one.
    """

    path: Path
    is_abnormal: bool
    masks: tuple[Path, ...]
    group: str
    part: Part | None = None
    look: str = ""
    copies: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Dataset:
    """A named collection of cases.

    Attributes:
        name: Name of the dataset.
        cases: In the order of the manifest, or of the sorted files.
        scan_type: What the scans show, in words.
        notes: What was left out and why, in words, with counts and without names.
    """

    name: str
    cases: tuple[Case, ...]
    scan_type: str
    notes: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """Hash what is known of the cases and the files' sizes and times, to tell two states of a dataset apart.

        It asks the disk about every file; one that is missing counts as missing.
        """
        digest = hashlib.sha256()
        for case in self.cases:
            files = [(path.name, *_size_and_time(path)) for path in (case.path, *case.masks)]
            digest.update(repr((files, case.is_abnormal, case.group, case.part, case.look, case.copies)).encode())
        return digest.hexdigest()[:16]


def load_datasets(
    root: Path, names: Sequence[str] | None = None, *, fit_on: str = "", on_progress: OnProgress | None = None
) -> list[Dataset]:
    """List the datasets of a folder.

    Args:
        root: Holds `manifest.csv`; or is itself laid out as one of `LAYOUTS` (the dataset's name is the folder's); or
            holds folders that are.
        names: Which ones; None or empty takes all.
        fit_on: One that is learned from to test on the others: it is listed too, and copies of its scans are looked
            for in each of the others.
        on_progress: Told how far it is.

    Returns:
        The datasets, in the order of `names` or as found.

    Raises:
        DatasetError: There is none, one is unknown, or it cannot be used.
    """
    from fmclip.evaluation.layouts import LAYOUTS, find_datasets  # both are built from the values above
    from fmclip.evaluation.looks import Seen, find_copies

    if not root.is_dir():
        raise DatasetError("The dataset folder was not found.")
    readers = find_datasets(root)
    if not readers:
        known = "; ".join(layout.description for layout in LAYOUTS)
        raise DatasetError(f"The folder holds no dataset. Layouts that are read: manifest.csv; {known}.")
    chosen = list(dict.fromkeys([*(names or readers), *([fit_on] if fit_on else [])]))
    unknown = [name for name in chosen if name not in readers]
    if unknown:
        raise DatasetError(f"No dataset is called {', '.join(unknown)}; there are {', '.join(sorted(readers))}.")
    report = on_progress or (lambda share, text: None)
    datasets: list[Dataset] = []
    source: Seen | None = None
    for done, name in enumerate(sorted(chosen, key=lambda name: name != fit_on)):  # what is learned from comes first
        seen = readers[name](every=bool(fit_on), on_progress=partial(_within, report, done, len(chosen)))
        datasets.append(seen.dataset if source is None else find_copies(seen, source))
        source = seen if name == fit_on else source
    report(1.0, "datasets")
    return sorted(datasets, key=lambda dataset: chosen.index(dataset.name))


def _within(report: OnProgress, done: int, count: int, share: float, text: str) -> None:
    """Report a share of one of several parts."""
    report((done + share) / count, text)


def read_masks(paths: Sequence[Path], shape: tuple[int, int]) -> np.ndarray:
    """Read the masks of one scan and unite them.

    Args:
        paths: Pictures; everything above half of a picture's range is abnormal.
        shape: (H, W) of the scan; a mask of another size is resized.

    Returns:
        bool [H, W].

    Raises:
        ScanError: One cannot be read.
    """
    united = np.zeros(shape, dtype=bool)
    for path in paths:
        united |= _read_mask(path, shape)
    return united


def scan_type_of(name: str, otherwise: str = "medical scan") -> str:
    """Say what the scans of a dataset of this name show."""
    return next((words for key, words in SCAN_TYPES.items() if key in name.lower()), otherwise)


def _size_and_time(path: Path) -> tuple[int, int] | tuple[()]:
    try:
        found = path.stat()
    except (OSError, ValueError):  # a name that no file can have
        return ()
    return found.st_size, found.st_mtime_ns


def _read_mask(path: Path, shape: tuple[int, int]) -> np.ndarray:
    mask = marked(read_scan(path, label="a mask").pixels)
    if mask.shape == shape:
        return mask
    return cv2.resize(mask.astype(np.uint8), (shape[1], shape[0]), interpolation=cv2.INTER_NEAREST).astype(bool)
