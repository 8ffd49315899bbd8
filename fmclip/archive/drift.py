"""Drift: how the scores of each scanner are distributed, day by day, as a table and as a figure.

Nobody says which scans of an archive are normal, so a shift has two readings: the device or its protocol changed, or
the patients did. The figure shows when and where to look, not which of the two it was.
"""

from __future__ import annotations

import csv
import datetime
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fmclip.archive.parts import FAILURES, SCORES, read_record
from fmclip.errors import ArchiveError

NO_SCANNER = "scanner not known"
_EPOCH, _UNKNOWN_DAY = datetime.date(1970, 1, 1), -(2**31)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
COLUMNS = ("scanner", "date", "scans", "failed", "q05", "q25", "median", "q75", "q95", "deviating", "share", "distance")
"""Of the table, see `write_table`."""


@dataclass(frozen=True)
class Group:
    """The scans of one scanner on one day, or in one span of days.

    Attributes:
        scanner: Its name.
        date: First day; None for scans without one.
        scores: [n] float32, in any order.
        failed: Scans that could not be mapped.
    """

    scanner: str
    date: datetime.date | None
    scores: np.ndarray
    failed: int

    def quantiles(self) -> np.ndarray:
        """Scores at `QUANTILES`: [5]; not a number without a scan."""
        return np.quantile(self.scores, QUANTILES) if self.scores.size else np.full(len(QUANTILES), np.nan)


@dataclass(frozen=True)
class Drift:
    """Groups by scanner and day, and the threshold that they are compared with.

    Attributes:
        groups: By scanner, then by day.
        threshold: Of the adapter.
    """

    groups: tuple[Group, ...]
    threshold: float

    @property
    def scanners(self) -> list[str]:
        """By number of scans, most first."""
        counts: Counter[str] = Counter()
        for group in self.groups:
            counts[group.scanner] += len(group.scores) + group.failed
        return [name for name, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]

    def of(self, scanner: str) -> list[Group]:
        """The groups of one scanner."""
        return [group for group in self.groups if group.scanner == scanner]

    def joined(self, days: int) -> Drift:
        """Spans of so many days instead of single ones, counted from the first day of all."""
        dated = [group.date for group in self.groups if group.date is not None]
        if not dated or days == 1:
            return self
        first = min(dated)
        spans: dict[tuple[str, datetime.date | None], list[Group]] = {}
        for group in self.groups:
            start = None
            if group.date is not None:
                start = first + datetime.timedelta((group.date - first).days // days * days)
            spans.setdefault((group.scanner, start), []).append(group)
        joined = [
            Group(name, start, np.concatenate([one.scores for one in own]), sum(one.failed for one in own))
            for (name, start), own in spans.items()
        ]
        return Drift(tuple(joined), self.threshold)


def read_drift(out: Path) -> Drift:
    """Read the scores of an archive; about 50 bytes of memory for each scan at the most, 5 afterwards.

    Args:
        out: Folder of its results; an unfinished run shows what is finished.

    Returns:
        Groups by scanner and day.

    Raises:
        ArchiveError: The folder holds no scores, no scan was mapped, or a file of it is damaged.
    """
    threshold = float(read_record(out)["threshold"])
    names: dict[str, int] = {}
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for table in _tables(out, SCORES, ["scanner", "date", "score"]):
        known = table["scanner"].combine_chunks().dictionary_encode()
        codes = [names.setdefault(name, len(names)) for name in known.dictionary.to_pylist()]
        codes.append(names.setdefault(NO_SCANNER, len(names)))
        scanners = np.array(codes, np.int32)[known.indices.fill_null(len(codes) - 1).to_numpy()]
        days = table["date"].to_numpy().astype("datetime64[D]").astype(np.int64)  # the smallest number where unknown
        parts.append((scanners, days.clip(_UNKNOWN_DAY).astype(np.int32), table["score"].to_numpy().astype(np.float32)))
    if not parts:
        raise ArchiveError("No part of this archive is finished yet: run score-archive first.")
    if not any(scores.size for _, _, scores in parts):
        raise ArchiveError(
            "No scan of this archive was mapped, so that there are no scores to compare: the folder failures says why, "
            "row by row."
        )
    failed: Counter[tuple[str, datetime.date | None]] = Counter()
    for table in _tables(out, FAILURES, ["scanner", "date"]):
        named = (name or NO_SCANNER for name in table["scanner"].to_pylist())
        failed.update(zip(named, table["date"].to_pylist(), strict=True))
    groups = []
    by_code = {code: name for name, code in names.items()}
    for code, day, own in _split(*(np.concatenate(columns) for columns in zip(*parts, strict=True))):
        key = by_code[code], None if day == _UNKNOWN_DAY else _EPOCH + datetime.timedelta(day)
        groups.append(Group(*key, own, failed.pop(key, 0)))
    groups += [Group(*key, np.empty(0, np.float32), count) for key, count in failed.items()]
    groups.sort(key=lambda group: (group.scanner, group.date or datetime.date.min))
    return Drift(tuple(groups), threshold)


def _split(scanners: np.ndarray, days: np.ndarray, scores: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """Scores [n] by scanner and day."""
    order = np.lexsort((days, scanners))
    scanners, days, scores = scanners[order], days[order], scores[order]
    starts = np.flatnonzero((np.diff(scanners, prepend=-1) != 0) | (np.diff(days, prepend=days[:1]) != 0))
    for start, own in zip(starts, np.split(scores, starts[1:]), strict=True):
        yield int(scanners[start]), int(days[start]), own


def write_table(file: Path, drift: Drift) -> None:
    """Write a CSV with a row for each scanner and day.

    `deviating` counts the scores above the threshold, `share` divides by the scans that were mapped, and `distance` is
    the Kolmogorov-Smirnov distance of the day's scores to all other scores of that scanner (0: the same, 1: apart).

    Raises:
        OSError: The file cannot be written.
    """
    with file.open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        table.writerow(COLUMNS)
        for scanner in drift.scanners:
            own = drift.of(scanner)
            every = np.sort(np.concatenate([group.scores for group in own]))
            for group in own:
                count = int((group.scores > drift.threshold).sum())
                quantiles = ["" if np.isnan(value) else f"{value:.4f}" for value in group.quantiles()]
                share = f"{count / group.scores.size:.4f}" if group.scores.size else ""
                distance = ks_distance(group.scores, every)
                shown = "" if distance is None else f"{distance:.3f}"
                day = "" if group.date is None else group.date.isoformat()
                table.writerow([scanner, day, group.scores.size, group.failed, *quantiles, count, share, shown])


def ks_distance(some: np.ndarray, every: np.ndarray) -> float | None:
    """Kolmogorov-Smirnov distance of some scores to the others.

    Where n of N scores are taken out, the rest is distributed as F_rest = (N F - n F_some) / (N - n), so that the
    distance to the rest is that to all of them times N / (N - n): all are sorted once for many days.

    Args:
        some: [n].
        every: [N] in ascending order, those n among them.

    Returns:
        In [0, 1]; None where one side is empty.
    """
    n, N = some.size, every.size
    if not 0 < n < N:
        return None
    steps = np.unique(some)
    below, upto = (np.searchsorted(np.sort(some), steps, side) / n for side in ("left", "right"))
    all_below, all_upto = (np.searchsorted(every, steps, side) / N for side in ("left", "right"))
    return float(max(np.abs(upto - all_upto).max(), np.abs(below - all_below).max()) * N / (N - n))


def _tables(out: Path, kind: str, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """Tables of the finished parts, one at a time."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise ArchiveError("Scores of an archive are Parquet files: pip install 'fmclip[archive]'.") from error
    for finished in sorted((out / SCORES).glob("*.parquet")):
        file = out / kind / finished.name
        if file.is_file():
            try:
                yield parquet.read_table(file, columns=list(columns))
            except (OSError, pa.ArrowException) as error:
                raise ArchiveError(f"A part of the {kind} cannot be read; score-archive makes it again.") from error
