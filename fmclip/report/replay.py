"""Do a run again from its run.json and the same scans, and say whether the scores agree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fmclip.calibration import require_references
from fmclip.detectors import DETECTORS, OnEvent
from fmclip.errors import FmclipError, ScanError
from fmclip.report.record import RunRecord, ScanRecord
from fmclip.scans import Scan, parse_window, read_scan, read_scans, shrink
from fmclip.towers import Tower

TOLERANCE = 1e-3
"""Scores further apart than this do not agree; other processors and versions of torch differ in the last digits."""


@dataclass(frozen=True)
class Replay:
    """What came out.

    Attributes:
        scores: (label, score then, score now) of each query that was found again.
        missing: Labels of the queries that were not among the files.
        largest: Largest difference of two scores, the threshold included.
        notes: What is wrong with files that were left out, by their place.
        agrees: Whether all queries were found and no score differs by more than `TOLERANCE`.
    """

    scores: tuple[tuple[str, float, float], ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]
    largest: float
    agrees: bool


def replay(
    record: RunRecord,
    references: Sequence[Path],
    queries: Sequence[Path],
    tower: Tower,
    *,
    slice_index: int | None = None,
    on_event: OnEvent | None = None,
) -> Replay:
    """Adapt and map again, and compare.

    Args:
        record: The run.
        references: Files with the reference scans among them; names and order do not matter where the record holds
            their digests. Where it does not (it was made from an adapter file), all of them are learned from.
        queries: Files with the queries among them.
        tower: The tower that the record names.
        slice_index: Slice or frame of the references, where the record does not hold their digests; None: the middle.
        on_event: Hears the events of the fit.

    Returns:
        The comparison.

    Raises:
        FmclipError: The run cannot be done again, the tower is another one, or reference scans are missing or have
            other pixels.
    """
    if record.not_repeatable:
        raise FmclipError(f"This run cannot be done again from its scans and settings: {record.not_repeatable}.")
    if tower.identity != record.tower_identity:
        raise FmclipError(
            f"This is not the tower of the run: {record.tower} has identity {record.tower_identity[:12]}, the one "
            f"given {tower.identity[:12]}. Choose the same weights with --tower."
        )
    normals, notes = _references(record, references, slice_index)
    detector = DETECTORS[record.method](tower, record.config)
    detector.fit(normals, on_event=on_event)
    found, missing = _find(record.queries, queries, record.window)
    predictions = detector.predict([scan for _, scan in found])
    scores = tuple(
        (then.label, float(then.score or 0.0), prediction.score)
        for (then, _), prediction in zip(found, predictions, strict=True)
    )
    then, now = record.calibration.reference_scores, detector.reference_scores_ or ()
    apart = [abs(one - other) for _, one, other in scores] + [abs(a - b) for a, b in zip(then, now, strict=False)]
    largest = max(apart, default=0.0)
    agrees = not missing and len(then) == len(now) and largest <= TOLERANCE
    return Replay(scores, tuple(one.label for one in missing), notes, largest, agrees)


def _references(
    record: RunRecord, files: Sequence[Path], slice_index: int | None
) -> tuple[list[Scan], tuple[str, ...]]:
    """The scans that were learned from, in their order, and what is wrong with files that were left out."""
    if not record.references:  # read as `adapt` read them
        scans, errors = read_scans(files, slice_index=slice_index, window=parse_window(record.window))
        require_references(scans)
        return scans, tuple(f"Of the references, {error}" for error in errors)
    found, missing = _find(record.references, files, record.window)
    if missing:
        labels = ", ".join(one.label for one in missing)
        raise FmclipError(
            f"Of {len(record.references)} reference scans {len(missing)} are not among the files, or their pixels "
            f"differ: {labels}. Give the folder with the very same files."
        )
    return [scan for _, scan in found], ()


def _find(
    wanted: Sequence[ScanRecord], files: Iterable[Path], window: str
) -> tuple[list[tuple[ScanRecord, Scan]], list[ScanRecord]]:
    """Find scans by the digest of their pixels: those found, in the order of the record, and those that were not."""
    slices = dict.fromkeys(one.slice_index for one in wanted)
    by_digest: dict[str, Scan] = {}
    digests = {one.digest for one in wanted}
    for path in files:
        for slice_index in slices:
            try:
                scan = read_scan(path, slice_index=slice_index, window=parse_window(window))
            except ScanError:
                continue  # no scan of this run, or no such slice: what is missing in the end is told
            for candidate in (scan, shrink(scan)):
                if candidate.digest in digests:
                    by_digest[candidate.digest] = candidate
    found = [(one, by_digest[one.digest]) for one in wanted if one.digest in by_digest]
    return found, [one for one in wanted if one.digest not in by_digest]
