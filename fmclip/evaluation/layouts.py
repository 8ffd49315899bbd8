"""How people lay out datasets: one small reader each, and one line in `LAYOUTS`.

A reader lists the cases of one dataset folder. Readers that know no patients or twins leave the group empty; then scans
that are almost the same picture become one group (`looks`).
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fmclip.evaluation.chexpert import is_chexpert, read_chexpert
from fmclip.evaluation.datasets import Case, DatasetError, OnProgress, Part
from fmclip.evaluation.looks import Seen, look_at_all
from fmclip.mask_files import NO_SCAN, MaskFolder, stem
from fmclip.scans import find_scan_files

MANIFEST = "manifest.csv"
Read = tuple[list[Case], Counter[str]]
"""Cases, and how many scans were left out for which reason ("lateral views")."""


@dataclass(frozen=True)
class Layout:
    """One way to lay out a dataset.

    Attributes:
        description: What a person would look for in the folder.
        matches: Whether a folder is laid out like this.
        read: Lists its cases.
        scan_type: What its scans show unless the name of the folder says otherwise.
    """

    description: str
    matches: Callable[[Path], bool]
    read: Callable[[Path], Read]
    scan_type: str = "medical scan"


def find_datasets(root: Path) -> dict[str, Callable[..., Seen]]:
    """Find the datasets of a folder without reading their scans.

    Args:
        root: A folder with a manifest, a dataset, or a folder of datasets.

    Returns:
        What reads each, by name; it takes `every` and `on_progress` of `look_at_all`.

    Raises:
        DatasetError: The manifest cannot be used.
    """
    if (root / MANIFEST).is_file():
        return {name: partial(look_at_all, name, cases) for name, cases in _read_manifest(root).items()}
    inside = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    for folders in ([root], inside):
        found = {folder.resolve().name: (folder, layout) for folder in folders if (layout := _layout_of(folder))}
        if found:
            return {name: partial(_read_folder, name, *place) for name, place in found.items()}
    return {}


def _layout_of(folder: Path) -> Layout | None:
    return next((layout for layout in LAYOUTS if layout.matches(folder)), None)


def _read_folder(
    name: str, folder: Path, layout: Layout, *, every: bool = False, on_progress: OnProgress | None = None
) -> Seen:
    cases, left_out = layout.read(folder)
    return look_at_all(name, cases, left_out, layout.scan_type, every=every, on_progress=on_progress)


def _read_manifest(root: Path) -> dict[str, list[Case]]:
    """Columns dataset, path, label ("normal" or "abnormal"); mask, group, look and part ("train", "test") if known.

    A group, or a look, of one name is the same in all datasets.
    """
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
            if row.get("part") not in (None, "", "train", "test"):
                raise DatasetError(f'Line {line} of the manifest: the part must be "train", "test" or empty.')
            masks = (root / row["mask"],) if row.get("mask") else ()
            part = Part(row["part"]) if row.get("part") else None
            look = row.get("look") or ""
            group = row.get("group") or look
            case = Case(root / row["path"], label == "abnormal", masks, group, part, look)
            cases.setdefault(row["dataset"], []).append(case)
    return cases


def _read_normal_abnormal(folder: Path) -> Read:
    """`normal`, `abnormal`, and `masks` named after the abnormal scans."""
    masks = MaskFolder(_subfolder(folder, "masks"))
    normal, abnormal = _files(folder, "normal"), _files(folder, "abnormal")
    cases = [Case(path, False, (), "") for path in normal]
    cases += [Case(path, True, masks.of(path), "") for path in abnormal]
    return cases, Counter({NO_SCAN: masks.count_strays([*normal, *abnormal])})


def _read_busi(folder: Path) -> Read:
    """BUSI (Al-Dhabyani 2020): `normal`, `benign`, `malignant`; `NAME_mask.png`, `NAME_mask_1.png`, ... beside each."""
    cases = []
    left_out: Counter[str] = Counter()
    for label in ("normal", "benign", "malignant"):
        masks: dict[str, tuple[Path, ...]] = {}
        scans = []
        for path in _files(folder, label):
            name, is_mask, _ = path.stem.partition("_mask")
            if is_mask:
                masks[name] = (*masks.get(name, ()), path)
            else:
                scans.append(path)
        for path in scans:
            own = masks.pop(stem(path), ())
            cases.append(Case(path, label != "normal", own if label != "normal" else (), ""))  # normal ones' are black
        left_out[NO_SCAN] += sum(map(len, masks.values()))
    return cases, left_out


def _read_yes_no(folder: Path) -> Read:
    """Kaggle's brain MRI sets: `yes` (tumour) and `no`."""
    return [Case(path, name == "yes", (), "") for name in ("no", "yes") for path in _files(folder, name)], Counter()


def _read_bmad(folder: Path) -> Read:
    """BMAD (Bao 2024): `train/good`, `valid` and `test` with `good` and `Ungood`.

    Sets with masks have `img` and `label` folders inside, sets without hold the scans directly. What is in `valid` may
    be learned from (MVFA and its followers take their few abnormal scans there), never tested on.
    """
    cases = []
    left_out: Counter[str] = Counter()
    for part, names in ((Part.TRAIN, ("train", "valid", "val")), (Part.TEST, ("test",))):
        for split, label in ((split, label) for split in names for label in ("good", "ungood")):
            place = _subfolder(_subfolder(folder, split), label)
            if place is None:
                continue
            masks = MaskFolder(_subfolder(place, "label") if label == "ungood" else None)
            scans = _subfolder(place, "img") or place
            files = [path for path in find_scan_files([scans]) if "label" not in path.relative_to(scans).parts]
            cases += [Case(path, label == "ungood", masks.of(path), "", part) for path in files]
            left_out[NO_SCAN] += masks.count_strays(files)
    return cases, left_out


def _read_mvtec(folder: Path) -> Read:
    """MVTec AD: `train/good`, `test/good`, `test/DEFECT`, `ground_truth/DEFECT/NAME_mask.png`."""
    cases = [Case(path, False, (), "", Part.TRAIN) for path in find_scan_files([folder / "train" / "good"])]
    left_out: Counter[str] = Counter()
    for place in sorted(path for path in (folder / "test").iterdir() if path.is_dir()):
        masks = MaskFolder(folder / "ground_truth" / place.name)
        files = find_scan_files([place])
        cases += [Case(path, place.name != "good", masks.of(path), "", Part.TEST) for path in files]
        left_out[NO_SCAN] += masks.count_strays(files)
    return cases, left_out


def _has_folders(*names: str) -> Callable[[Path], bool]:
    """Make a test for folders that must all be there, whatever the case of their letters."""
    return lambda folder: all(_descend(folder, name) for name in names)


def _is_mvtec(folder: Path) -> bool:
    if not (folder / "train" / "good").is_dir() or not (folder / "test").is_dir():
        return False
    return any(path.is_dir() and path.name != "good" for path in (folder / "test").iterdir())


def _descend(folder: Path, path: str) -> Path | None:
    found: Path | None = folder
    for name in path.split("/"):
        found = _subfolder(found, name)
    return found


def _subfolder(folder: Path | None, name: str) -> Path | None:
    """Find a folder inside, whatever the case of its letters: "Ungood" is also written "ungood"."""
    if folder is None:
        return None
    return next((path for path in sorted(folder.iterdir()) if path.is_dir() and path.name.lower() == name), None)


def _files(folder: Path, name: str) -> list[Path]:
    inside = _subfolder(folder, name)
    return find_scan_files([inside]) if inside else []


LAYOUTS = (
    Layout("train.csv or valid.csv of CheXpert", is_chexpert, read_chexpert, "chest X-ray"),
    Layout(
        "normal, benign and malignant (BUSI)",
        _has_folders("normal", "benign", "malignant"),
        _read_busi,
        "breast ultrasound",
    ),
    Layout("normal and abnormal, perhaps masks", _has_folders("normal", "abnormal"), _read_normal_abnormal),
    Layout("train/good and test/Ungood (BMAD)", _has_folders("train/good", "test/ungood"), _read_bmad),
    Layout("train/good and test/DEFECT (MVTec)", _is_mvtec, _read_mvtec),
    Layout("yes and no (Kaggle's brain MRI)", _has_folders("yes", "no"), _read_yes_no, "brain MRI"),
)
"""Tried in this order."""
