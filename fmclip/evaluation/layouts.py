"""How people lay out datasets: one small reader each, and one line in `LAYOUTS`.

A reader lists the cases of one dataset folder. Readers that know no patients or twins leave the group empty; then scans
with equal pixels become one group.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fmclip.errors import ScanError
from fmclip.evaluation.datasets import Case, Dataset, DatasetError, Part, scan_type_of
from fmclip.scans import find_scan_files, read_scan

MANIFEST = "manifest.csv"
CHEXPERT_COLUMNS = {"Path", "No Finding", "Frontal/Lateral"}
CHEXPERT_NOT_FINDINGS = {"No Finding", "Support Devices", "Path", "Sex", "Age", "Frontal/Lateral", "AP/PA"}
"""Columns that are no finding; a pacemaker alone makes no lung abnormal, and "No Finding" allows for devices."""

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


def find_datasets(root: Path) -> dict[str, Callable[[], Dataset]]:
    """Find the datasets of a folder without reading their scans.

    Args:
        root: A folder with a manifest, a dataset, or a folder of datasets.

    Returns:
        What reads each, by name.

    Raises:
        DatasetError: The manifest cannot be used.
    """
    if (root / MANIFEST).is_file():
        return {name: partial(_with_twins, name, cases) for name, cases in _read_manifest(root).items()}
    inside = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    for folders in ([root], inside):
        found = {folder.resolve().name: (folder, layout) for folder in folders if (layout := _layout_of(folder))}
        if found:
            return {name: partial(_read_folder, name, *place) for name, place in found.items()}
    return {}


def _layout_of(folder: Path) -> Layout | None:
    return next((layout for layout in LAYOUTS if layout.matches(folder)), None)


def _read_folder(name: str, folder: Path, layout: Layout) -> Dataset:
    cases, left_out = layout.read(folder)
    return _with_twins(name, cases, left_out, layout.scan_type)


def _with_twins(
    name: str, cases: Iterable[Case], left_out: Counter[str] | None = None, scan_type: str = "medical scan"
) -> Dataset:
    """Group cases without a group by their pixels; what is no scan (a licence beside scans) is left out and counted."""
    left_out = Counter(left_out)
    kept = []
    for case in cases:
        if not case.group:
            try:
                case = replace(case, group=read_scan(case.path).digest)
            except ScanError:
                left_out["files that cannot be read as a scan"] += 1
                continue
        kept.append(case)
    notes = tuple(f"{count} {reason} left out" for reason, count in left_out.items())
    return Dataset(name, tuple(kept), scan_type_of(name, scan_type), notes)


def _read_manifest(root: Path) -> dict[str, list[Case]]:
    """Columns dataset, path, label ("normal" or "abnormal"); mask, group and part ("train", "test") if known."""
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
            case = Case(root / row["path"], label == "abnormal", masks, row.get("group") or "", part)
            cases.setdefault(row["dataset"], []).append(case)
    return cases


def _read_normal_abnormal(folder: Path) -> Read:
    """`normal`, `abnormal`, and `masks` with the stems of the abnormal scans."""
    masks = _by_stem(_subfolder(folder, "masks"))
    cases = [Case(path, False, (), "") for path in _files(folder, "normal")]
    return cases + [Case(path, True, masks.get(_stem(path), ()), "") for path in _files(folder, "abnormal")], Counter()


def _read_busi(folder: Path) -> Read:
    """BUSI (Al-Dhabyani 2020): `normal`, `benign`, `malignant`; `NAME_mask.png`, `NAME_mask_1.png`, ... beside each."""
    cases = []
    for label in ("normal", "benign", "malignant"):
        files = _files(folder, label)
        masks: dict[str, tuple[Path, ...]] = {}
        for path in files:
            stem, found, _ = path.stem.partition("_mask")
            if found:
                masks[stem] = (*masks.get(stem, ()), path)
        for path in files:
            if "_mask" not in path.stem:
                own = masks.get(path.stem, ()) if label != "normal" else ()  # those of normal scans are black
                cases.append(Case(path, label != "normal", own, ""))
    return cases, Counter()


def _read_yes_no(folder: Path) -> Read:
    """Kaggle's brain MRI sets: `yes` (tumour) and `no`."""
    return [Case(path, name == "yes", (), "") for name in ("no", "yes") for path in _files(folder, name)], Counter()


def _read_bmad(folder: Path) -> Read:
    """BMAD (Bao 2024): `train/good`, `valid` and `test` with `good` and `Ungood`.

    Sets with masks have `img` and `label` folders inside, sets without hold the scans directly. What is in `valid` may
    be learned from (MVFA and its followers take their few abnormal scans there), never tested on.
    """
    cases = []
    for part, names in ((Part.TRAIN, ("train", "valid", "val")), (Part.TEST, ("test",))):
        for split, label in ((split, label) for split in names for label in ("good", "ungood")):
            place = _subfolder(_subfolder(folder, split), label)
            if place is None:
                continue
            masks = _by_stem(_subfolder(place, "label")) if label == "ungood" else {}
            scans = _subfolder(place, "img") or place
            files = [path for path in find_scan_files([scans]) if "label" not in path.relative_to(scans).parts]
            cases += [Case(path, label == "ungood", masks.get(_stem(path), ()), "", part) for path in files]
    return cases, Counter()


def _read_mvtec(folder: Path) -> Read:
    """MVTec AD: `train/good`, `test/good`, `test/DEFECT`, `ground_truth/DEFECT/NAME_mask.png`."""
    cases = [Case(path, False, (), "", Part.TRAIN) for path in find_scan_files([folder / "train" / "good"])]
    for place in sorted(path for path in (folder / "test").iterdir() if path.is_dir()):
        masks = _by_stem(folder / "ground_truth" / place.name)
        for path in find_scan_files([place]):
            own = masks.get(f"{_stem(path)}_mask", ()) or masks.get(_stem(path), ())
            cases.append(Case(path, place.name != "good", own, "", Part.TEST))
    return cases, Counter()


def _read_chexpert(folder: Path) -> Read:
    """CheXpert (Irvin 2019): `train.csv` is learned from, `valid.csv` tested on; one of them alone serves for both.

    Normal is "No Finding"; abnormal is any finding marked 1. Scans with uncertain findings (-1) only, scans with
    neither, and lateral views are left out. Groups are patients.
    """
    left_out: Counter[str] = Counter()
    cases = []
    tables = [path for path in (folder / "train.csv", folder / "valid.csv") if path.is_file()]
    for table in tables:
        part = None if len(tables) == 1 else Part.TRAIN if table.stem == "train" else Part.TEST
        for row in _csv_rows(table):
            label = _chexpert_label(row)
            if isinstance(label, bool):
                path = _chexpert_path(folder, row["Path"])
                patient = next((name for name in path.parts if name.startswith("patient")), str(path))
                cases.append(Case(path, label, (), f"chexpert {patient}", part))
            else:
                left_out[label] += 1
    return cases, left_out


def _chexpert_label(row: dict[str, str]) -> bool | str:
    """Whether a row is abnormal, or why it is left out."""
    if row["Frontal/Lateral"].strip().lower() != "frontal":
        return "lateral views"
    try:
        marks = {name: float(mark or 0) for name, mark in row.items() if name not in CHEXPERT_NOT_FINDINGS}
        no_finding = float(row["No Finding"] or 0)
    except ValueError:
        raise DatasetError("A finding in the CheXpert table is none of 1, 0, -1 and empty.") from None
    if 1 in marks.values():
        return True
    if -1 in marks.values():
        return "scans with uncertain findings only"
    return False if no_finding == 1 else "scans with neither a finding nor its absence"


def _chexpert_path(folder: Path, path: str) -> Path:
    """Drop the name of the download ("CheXpert-v1.0-small") that the paths begin with."""
    _, _, inside = path.partition("/")
    return folder / (inside if path.startswith("CheXpert") else path)


def _is_chexpert(folder: Path) -> bool:
    tables = [path for path in (folder / "train.csv", folder / "valid.csv") if path.is_file()]
    return any(set(next(_csv_rows(table), {})) >= CHEXPERT_COLUMNS for table in tables)


def _csv_rows(table: Path) -> Iterator[dict[str, str]]:
    with table.open(newline="", encoding="utf-8-sig") as file:
        yield from csv.DictReader(file)


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


def _by_stem(folder: Path | None) -> dict[str, tuple[Path, ...]]:
    return {_stem(path): (path,) for path in find_scan_files([folder])} if folder and folder.is_dir() else {}


def _stem(path: Path) -> str:
    """File name without its endings: "7" of "7.nii.gz", but "scan.v2" of "scan.v2.png"."""
    return path.name[: -len(".nii.gz")] if path.name.lower().endswith(".nii.gz") else path.stem


LAYOUTS = (
    Layout("train.csv or valid.csv of CheXpert", _is_chexpert, _read_chexpert, "chest X-ray"),
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
