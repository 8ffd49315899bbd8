"""Every scan of a dataset is looked at once: what cannot be read is left out, and copies that nobody named are found.

Groups that a dataset knows (patients, twins) may miss copies; where it knows none, scans of one look are a group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from fmclip.errors import ScanError
from fmclip.evaluation.datasets import Case, Dataset, OnProgress, scan_type_of
from fmclip.evaluation.twins import Look, name_groups
from fmclip.scans import read_scan

MOST_COMPARED = 20_000
"""Scans with a group, or of several datasets, that are looked at for copies which the groups miss: nine minutes beside
reading them, and time grows with the square of their number (`twins.name_groups`)."""


@dataclass(frozen=True)
class Seen:
    """A dataset before its looks have names.

    Attributes:
        dataset: Cases that can be read; without a group or look where nobody named one.
        looks: Of those that were looked at, by their place among the cases.
    """

    dataset: Dataset
    looks: dict[int, Look]


def look_at_all(
    name: str,
    cases: Iterable[Case],
    left_out: Counter[str] | None = None,
    scan_type: str = "medical scan",
    *,
    on_progress: OnProgress | None = None,
) -> Seen:
    """Look at the scans whose look is not known; what is no scan (a licence beside scans) is left out and counted."""
    left_out, cases = Counter(left_out), list(cases)
    kept: list[Case] = []
    looks: dict[int, Look] = {}
    grouped = sum(bool(case.group and not case.look) for case in cases)
    skipped = grouped if grouped > MOST_COMPARED else 0
    for place, case in enumerate(cases):
        if on_progress:
            on_progress(place / len(cases), f"{name}, looking for copies")
        if not case.group or not (case.look or skipped):
            try:
                looks[len(kept)] = Look.at(read_scan(case.path))
            except ScanError:
                if not case.group:
                    left_out["files that cannot be read as a scan"] += 1
                    continue
        kept.append(_without_missing_masks(case, left_out))
    notes = [f"{count} {reason} left out" for reason, count in left_out.items() if count]
    if skipped:
        notes.append(f"{skipped} scans are too many to look for copies that their groups miss")
    return Seen(Dataset(name, tuple(kept), scan_type_of(name, scan_type), tuple(notes)), looks)


def name_looks(seen: Sequence[Seen]) -> list[Dataset]:
    """Name the looks of datasets that are learned from and tested together; copies in two of them share a look.

    A group that nobody named is that of the copies in its own dataset: it stays, with its half, whatever else is there.
    """
    named = [_named(one, name_groups(list(one.looks.values()))) for one in seen]
    if len(seen) == 1:
        return named
    count = sum(len(one.looks) for one in seen)
    if count > MOST_COMPARED:
        note = f"{count} scans are too many to look for copies in the other dataset"
        return [replace(dataset, notes=(*dataset.notes, note)) for dataset in named]
    names = iter(name_groups(*(list(one.looks.values()) for one in seen)))
    joined = [
        _with_looks(dataset, dict(zip(one.looks, islice(names, len(one.looks)), strict=True)))
        for dataset, one in zip(named, seen, strict=True)
    ]
    return [_with_note_on_others(dataset, [other for other in joined if other is not dataset]) for dataset in joined]


def _named(seen: Seen, names: Sequence[str]) -> Dataset:
    dataset = _with_looks(seen.dataset, dict(zip(seen.looks, names, strict=True)))
    cases = tuple(case if case.group else replace(case, group=case.look) for case in dataset.cases)
    return replace(dataset, cases=cases, notes=(*dataset.notes, *_notes_on_copies(cases)))


def _with_looks(dataset: Dataset, names: dict[int, str]) -> Dataset:
    cases = (replace(case, look=names.get(place, case.look)) for place, case in enumerate(dataset.cases))
    return replace(dataset, cases=tuple(cases))


def _notes_on_copies(cases: Iterable[Case]) -> Iterator[str]:
    groups_of: dict[str, list[str]] = {}
    for case in cases:
        if case.look:
            groups_of.setdefault(case.look, []).append(case.group)
    across = sum(len(set(groups)) - 1 for groups in groups_of.values())
    alike = "look like copies of others (re-saved, mirrored, brighter or shifted)"
    if within := sum(len(groups) - 1 for groups in groups_of.values()) - across:
        yield f"{within} scans {alike} and share a group"
    if across:
        yield f"{across} scans {alike} in other groups"


def _with_note_on_others(dataset: Dataset, others: Iterable[Dataset]) -> Dataset:
    theirs = {case.look for other in others for case in other.cases if case.look}
    count = sum(case.look in theirs for case in dataset.cases)
    notes = (f"{count} scans look like scans of another dataset",) if count else ()
    return replace(dataset, notes=(*dataset.notes, *notes))


def _without_missing_masks(case: Case, left_out: Counter[str]) -> Case:
    """Drop masks that are not there, and count them."""
    there = tuple(path for path in case.masks if path.is_file())
    if len(there) == len(case.masks):
        return case
    left_out["masks that do not exist"] += len(case.masks) - len(there)
    return replace(case, masks=there)
