"""Which scans a detector learns from and which it is tested on."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from fmclip.evaluation.datasets import Case, DatasetError


class Protocol(str, Enum):
    """How twins are treated: `unique` tests one scan per group and no twin of a reference; `raw` ignores groups."""

    UNIQUE = "unique"
    RAW = "raw"


class Half(str, Enum):
    """Part of the groups in use: settings are chosen on `tuning` and reported on `report`."""

    TUNING = "tuning"
    REPORT = "report"
    ALL = "all"


@dataclass(frozen=True)
class Split:
    """One draw.

    Attributes:
        references: k normal cases to learn from.
        test: Cases to test on.
    """

    references: tuple[Case, ...]
    test: tuple[Case, ...]

    @property
    def n_normal(self) -> int:
        """Normal cases in the test."""
        return sum(not case.is_abnormal for case in self.test)

    @property
    def n_abnormal(self) -> int:
        """Abnormal cases in the test."""
        return sum(case.is_abnormal for case in self.test)


def split_cases(
    cases: Sequence[Case], k: int, seed: int, *, protocol: Protocol = Protocol.UNIQUE, half: Half = Half.ALL
) -> Split:
    """Draw k reference scans; the rest is the test.

    With one seed, the references for a smaller k are the first of those for a larger one.

    Args:
        cases: All cases of a dataset.
        k: Reference scans to draw from the normal ones.
        seed: Seed of the draw.
        protocol: `unique` keeps the first case of each group, so that no test scan is a twin of a reference; `raw` is
            the habit of published tables.
        half: Part of the groups that references and test come from.

    Returns:
        The split.

    Raises:
        DatasetError: Too few normal scans, or nothing to tell apart is left to test on.
    """
    usable = [case for case in cases if half is Half.ALL or _half_of(case.group) is half]
    if protocol is Protocol.UNIQUE:
        first_of: dict[str, Case] = {}
        for case in usable:
            first_of.setdefault(case.group, case)
        usable = list(first_of.values())
    normals = [case for case in usable if not case.is_abnormal]
    order = np.random.default_rng(seed).permutation(len(normals))
    references = tuple(normals[place] for place in order[:k])
    taken = set(references)
    test = tuple(case for case in usable if case not in taken)
    split = Split(references, test)
    if len(references) < k or not split.n_normal or not split.n_abnormal:
        raise DatasetError(
            f"k = {k} leaves nothing to test: there are {len(normals)} normal and {len(usable) - len(normals)} "
            "abnormal scans to draw from."
        )
    return split


def _half_of(group: str) -> Half:
    """Assign a group to a half by its name alone, so that the halves never move."""
    return Half.REPORT if zlib.crc32(group.encode()) & 1 else Half.TUNING
