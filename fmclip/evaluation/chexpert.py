"""Read the tables of CheXpert (Irvin 2019)."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fmclip.evaluation.datasets import Case, DatasetError, Part

COLUMNS = {"Path", "No Finding", "Frontal/Lateral"}
NOT_FINDINGS = {"No Finding", "Support Devices", "Path", "Sex", "Age", "Frontal/Lateral", "AP/PA"}
"""Columns that are no finding; a pacemaker alone makes no lung abnormal, and "No Finding" allows for devices."""


def read_chexpert(folder: Path) -> tuple[list[Case], Counter[str]]:
    """`train.csv` is learned from, `valid.csv` tested on; one of them alone serves for both.

    Normal is "No Finding"; abnormal is any finding marked 1. Scans with uncertain findings (-1) only, scans with
    neither, lateral views, and rows that are too short or too long are left out. Groups are patients.

    Args:
        folder: Holds the tables.

    Returns:
        The cases, and how many scans were left out for which reason.

    Raises:
        DatasetError: A table is no text, no CSV, or holds other marks.
    """
    left_out: Counter[str] = Counter()
    cases = []
    tables = _tables(folder)
    for table in tables:
        part = None if len(tables) == 1 else Part.TRAIN if table.stem == "train" else Part.TEST
        for row in _rows(table, left_out):
            label = _label(row)
            if isinstance(label, bool):
                path = _path(folder, row["Path"])
                patient = next((name for name in path.parts if name.startswith("patient")), str(path))
                cases.append(Case(path, label, (), f"chexpert {patient}", part))
            else:
                left_out[label] += 1
    return cases, left_out


def is_chexpert(folder: Path) -> bool:
    """Whether a table of the folder has CheXpert's columns."""
    return any(set(_header(table)) >= COLUMNS for table in _tables(folder))


def _tables(folder: Path) -> list[Path]:
    return [path for path in (folder / "train.csv", folder / "valid.csv") if path.is_file()]


def _header(table: Path) -> list[str]:
    """Names of the columns; tables of other datasets may be anything."""
    with table.open("rb") as file:
        line = file.readline(10_000).decode("utf-8-sig", errors="replace")
    try:
        return next(csv.reader([line]), [])
    except csv.Error:
        return []


def _rows(table: Path, left_out: Counter[str]) -> Iterator[dict[str, str]]:
    """Yield complete rows; a table that was cut short ends in one that is not."""
    reader = csv.DictReader(_lines(table))
    try:
        if not set(reader.fieldnames or ()) >= COLUMNS:
            raise DatasetError(f"{table.name} lacks columns of CheXpert that the other table has: download it again.")
        for row in reader:
            if None in row or None in row.values():
                left_out[f"rows of {table.name} with too few or too many columns"] += 1
            else:
                yield row
    except csv.Error:
        raise DatasetError(
            f"{table.name} cannot be read from line {reader.reader.line_num} on: download it again, or save it as "
            "comma-separated UTF-8 text."
        ) from None


def _lines(table: Path) -> Iterator[str]:
    with table.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig")
            except UnicodeDecodeError:
                raise DatasetError(
                    f"Line {number} of {table.name} is not UTF-8 text: download it again, or save it as "
                    "comma-separated UTF-8 text."
                ) from None


def _label(row: dict[str, str]) -> bool | str:
    """Whether a row is abnormal, or why it is left out."""
    if row["Frontal/Lateral"].strip().lower() != "frontal":
        return "lateral views"
    try:
        marks = {name: float(mark or 0) for name, mark in row.items() if name not in NOT_FINDINGS}
        no_finding = float(row["No Finding"] or 0)
    except ValueError:
        raise DatasetError("A finding in the CheXpert table is none of 1, 0, -1 and empty.") from None
    if 1 in marks.values():
        return True
    if -1 in marks.values():
        return "scans with uncertain findings only"
    return False if no_finding == 1 else "scans with neither a finding nor its absence"


def _path(folder: Path, path: str) -> Path:
    """Drop the name of the download ("CheXpert-v1.0-small") that the paths begin with."""
    _, _, inside = path.partition("/")
    return folder / (inside if path.startswith("CheXpert") else path)
