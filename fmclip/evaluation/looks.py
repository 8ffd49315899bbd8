"""Every scan of a dataset is looked at once: what cannot be read is left out, and copies that nobody named are found.

Groups that a dataset knows (patients, twins) may miss copies; where it knows none, scans of one look are a group. Where
one dataset is learned from and another tested, copies are looked for across the two as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from fmclip.errors import ScanError
from fmclip.evaluation.datasets import Case, Dataset, OnProgress, scan_type_of
from fmclip.evaluation.twins import Look, name_groups, twins_across
from fmclip.scans import read_scan

MOST_COMPARED = 20_000
"""Scans that are compared with each other though they have groups, or lie in two datasets: nine minutes beside reading
them, and time grows with the square of their number (`twins.name_groups`)."""
_READING = 0.95  # share of the time for small sets


@dataclass(frozen=True)
class Seen:
    """A dataset whose scans were looked at.

    Attributes:
        dataset: Its cases that can be read, with their groups and looks.
        looks: Of those that were looked at, by their place among the cases.
        is_whole: Whether all of them were to be looked at, those of a known look too.
    """

    dataset: Dataset
    looks: dict[int, Look]
    is_whole: bool


def look_at_all(
    name: str,
    cases: Iterable[Case],
    left_out: Counter[str] | None = None,
    scan_type: str = "medical scan",
    *,
    every: bool = False,
    on_progress: OnProgress | None = None,
) -> Seen:
    """Look at the scans of a dataset; what is no scan (a licence beside scans) is left out and counted.

    Args:
        name: Its name.
        cases: All that it lists.
        left_out: How many were left out so far, by reason.
        scan_type: What they show unless the name says otherwise.
        every: Whether those are looked at, too, whose look is known, unless there are very many: for `find_copies`.
        on_progress: Told how far it is.

    Returns:
        What was seen.
    """
    report = on_progress or (lambda share, text: None)
    left_out, cases = Counter(left_out), list(cases)
    kept: list[Case] = []
    looks: dict[int, Look] = {}
    grouped = sum(bool(case.group and not case.look) for case in cases)
    skipped = grouped if grouped > MOST_COMPARED else 0
    every = every and len(cases) <= MOST_COMPARED
    for place, case in enumerate(cases):
        report(_READING * place / len(cases), f"{name}: reading scans")
        if every or not case.group or not (case.look or skipped):
            try:
                looks[len(kept)] = Look.at(read_scan(case.path))
            except ScanError:
                if not case.group:
                    left_out["files that cannot be read as a scan"] += 1
                    continue
        kept.append(_without_missing_masks(case, left_out))
    report(_READING, f"{name}: looking for copies")
    unknown = [place for place in looks if not kept[place].look]
    for place, look in zip(unknown, name_groups([looks[place] for place in unknown]), strict=True):
        kept[place] = replace(kept[place], group=kept[place].group or look, look=look)
    notes = [f"{count} {reason} left out" for reason, count in left_out.items() if count]
    if skipped:
        notes.append(f"{skipped} scans are too many to look for copies that their groups miss")
    notes += _notes_on_copies(kept)
    return Seen(Dataset(name, tuple(kept), scan_type_of(name, scan_type), tuple(notes)), looks, every)


def find_copies(seen: Seen, source: Seen) -> Dataset:
    """Mark the cases of a dataset that are copies of scans of another one, which is learned from, and count them.

    Args:
        seen: What is tested, looked at with `every`.
        source: What is learned from, likewise.

    Returns:
        The dataset; groups and looks stay, here and there.
    """
    name = source.dataset.name
    if len(seen.looks) + len(source.looks) > MOST_COMPARED or not (seen.is_whole and source.is_whole):
        note = f"the scans are too many to look for copies of those of {name}, which is learned from"
        return _with_note(seen.dataset, note)
    named = [[(one.dataset.cases[place].look, look) for place, look in one.looks.items()] for one in (source, seen)]
    cases = list(seen.dataset.cases)
    for place, copies in zip(seen.looks, twins_across(*named), strict=True):
        cases[place] = replace(cases[place], copies=copies)
    found = sum(bool(case.copies) for case in cases)
    dataset = replace(seen.dataset, cases=tuple(cases))
    return _with_note(dataset, f"{found} scans look like scans of {name}, which is learned from") if found else dataset


def _with_note(dataset: Dataset, note: str) -> Dataset:
    return replace(dataset, notes=(*dataset.notes, note))


def _notes_on_copies(cases: Sequence[Case]) -> Iterator[str]:
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


def _without_missing_masks(case: Case, left_out: Counter[str]) -> Case:
    """Drop masks that are not there, and count them."""
    there = tuple(path for path in case.masks if path.is_file())
    if len(there) == len(case.masks):
        return case
    left_out["masks that do not exist"] += len(case.masks) - len(there)
    return replace(case, masks=there)
