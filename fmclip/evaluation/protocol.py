"""Which scans a detector learns from and which it is tested on."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from fmclip.evaluation.datasets import Case, DatasetError, Part
from fmclip.evaluation.twins import components


class Protocol(str, Enum):
    """How twins are treated: `unique` takes one scan of each twin group, so that no twin of a reference is tested.

    `raw` takes all; see `twin_groups`.
    """

    UNIQUE = "unique"
    RAW = "raw"


class Half(str, Enum):
    """Part of the groups in use: settings are chosen on `tuning` and reported on `report`.

    Under `unique`, no scan of `report` is a twin of one of `tuning`.
    """

    TUNING = "tuning"
    REPORT = "report"
    ALL = "all"


@dataclass(frozen=True)
class Split:
    """One draw.

    Attributes:
        references: k normal cases to learn from.
        abnormals: Abnormal cases to learn from, for methods that can.
        test: Cases to test on; none of the above, and under `unique` no twin of them.
        n_twins: Cases not tested as twins of one that is learned from, where these lie in another dataset (a group of
            the same name is the same patient, or a mere number) or in another part of the same.
    """

    references: tuple[Case, ...]
    abnormals: tuple[Case, ...]
    test: tuple[Case, ...]
    n_twins: int = 0

    @property
    def n_normal(self) -> int:
        """Normal cases in the test."""
        return sum(not case.is_abnormal for case in self.test)

    @property
    def n_abnormal(self) -> int:
        """Abnormal cases in the test."""
        return sum(case.is_abnormal for case in self.test)


def split_cases(
    cases: Sequence[Case],
    k: int,
    seed: int,
    *,
    abnormal_k: int = 0,
    protocol: Protocol = Protocol.UNIQUE,
    half: Half = Half.ALL,
    fit_on: Sequence[Case] | None = None,
    unreadable: Collection[Case] = (),
) -> Split:
    """Draw the scans to learn from; the rest is the test.

    With one seed, the references for a smaller k are the first of those for a larger one. Where the dataset has an
    official split, only its training part is drawn from (abnormal scans from the test part if the other has none) and
    only its test part is tested on.

    Args:
        cases: All cases of a dataset.
        k: Reference scans to draw from the normal ones.
        seed: Seed of the draw.
        abnormal_k: Abnormal scans to draw.
        protocol: `unique` keeps the first case of each twin group; `raw` is the habit of published tables.
        half: Part of the groups that references and test come from.
        fit_on: Cases of another dataset to draw from (MadCLIP, Table 3); None draws from `cases`.
        unreadable: Cases to leave out; the next of the draw take their places, and the other draws stay as they were.

    Returns:
        The split.

    Raises:
        DatasetError: Too few scans to draw from, or nothing to tell apart is left to test on.
    """
    every = list(dict.fromkeys([*cases, *(fit_on or ())]))
    twins = dict(zip(every, twin_groups(every), strict=True))
    is_unique = protocol is Protocol.UNIQUE
    is_reported = is_unique and half is Half.REPORT
    usable = _usable(_untuned(cases, every) if is_reported else cases, protocol, half)
    source = cases if fit_on is None else fit_on  # what is drawn from it does not depend on what is tested
    pool = _usable(_untuned(source, source) if is_reported else source, protocol, half)
    generator = np.random.default_rng(seed)
    references = _draw(pool, False, k, generator, unreadable)
    abnormals = _draw(pool, True, abnormal_k, generator, unreadable)
    drawn = {*references, *abnormals}
    learned = {twins[case] for case in drawn} if is_unique else set()
    testable = [case for case in usable if case.part is not Part.TRAIN and case not in drawn and case not in unreadable]
    test = tuple(case for case in testable if twins[case] not in learned)
    split = Split(references, abnormals, test, len(testable) - len(test))
    if not split.n_normal or not split.n_abnormal:
        n_normal = sum(not case.is_abnormal for case in usable)
        raise DatasetError(
            f"k = {k} leaves nothing to test: there are {n_normal} normal and {len(usable) - n_normal} abnormal scans."
        )
    return split


def twin_groups(cases: Sequence[Case]) -> list[int]:
    """Number the twin groups of cases: those of one group, of one look, and twins of twins, share a number."""
    number_of = components([(place, name) for place, case in enumerate(cases) for name in _names(case)])
    return [number_of[place] for place in range(len(cases))]


def _names(case: Case) -> list[tuple[str, str]]:
    looks = [look for look in (case.look, *case.copies) if look]
    return [("group", case.group), *(("look", look) for look in looks)]


def _untuned(cases: Sequence[Case], every: Sequence[Case]) -> list[Case]:
    """Leave out cases with a twin in the tuning half of all that are there."""
    twins = dict(zip(every, twin_groups(every), strict=True))
    tuned = {twins[case] for case in every if _half_of(case.group) is Half.TUNING}
    return [case for case in cases if twins[case] not in tuned]


def _usable(cases: Sequence[Case], protocol: Protocol, half: Half) -> list[Case]:
    """Take one half, and of each twin group the first case (in each part, so that no test scan is lost to its twin)."""
    usable = [case for case in cases if half is Half.ALL or _half_of(case.group) is half]
    if protocol is Protocol.RAW:
        return usable
    twins = dict(zip(cases, twin_groups(cases), strict=True))
    first_of: dict[tuple[int, Part | None], Case] = {}
    for case in usable:
        first_of.setdefault((twins[case], case.part), case)
    return list(first_of.values())


def _draw(
    pool: Sequence[Case], is_abnormal: bool, count: int, generator: np.random.Generator, unreadable: Collection[Case]
) -> tuple[Case, ...]:
    own = [case for case in pool if case.is_abnormal == is_abnormal]
    own = [case for case in own if case.part is not Part.TEST] or own
    order = generator.permutation(len(own))
    readable = [own[place] for place in order if own[place] not in unreadable]
    if len(readable) < count:
        name = "abnormal" if is_abnormal else "k"
        kind = "abnormal" if is_abnormal else "normal"
        raise DatasetError(f"{name} = {count} is too many: there are {len(readable)} {kind} scans to draw from.")
    return tuple(readable[:count])


def _half_of(group: str) -> Half:
    """Assign a group to a half by its name alone: halves stay as they are as long as groups keep their names."""
    return Half.REPORT if zlib.crc32(group.encode()) & 1 else Half.TUNING
