"""No twin of a reference is ever tested, and the draw can be repeated."""

from pathlib import Path

import pytest

from fmclip.evaluation.datasets import Case, DatasetError
from fmclip.evaluation.protocol import Half, Protocol, split_cases


def _cases() -> list[Case]:
    """20 normal and 10 abnormal groups, each second one with a twin at the end of the list."""
    singles = [Case(Path(f"{n}.png"), n >= 20, None, f"set-{n}") for n in range(30)]
    return singles + [Case(Path(f"{n}-twin.png"), n >= 20, None, f"set-{n}") for n in range(0, 30, 2)]


@pytest.mark.parametrize("seed", range(5))
def test_unique_tests_one_scan_per_group_and_no_twin_of_a_reference(seed):
    split = split_cases(_cases(), 8, seed)
    groups = [case.group for case in (*split.references, *split.test)]
    assert len(split.references) == 8
    assert not any(case.is_abnormal for case in split.references)
    assert len(groups) == len(set(groups)) == 30
    assert (split.n_normal, split.n_abnormal) == (12, 10)
    assert not any("twin" in case.path.name for case in (*split.references, *split.test))


def test_raw_tests_twins_too():
    split = split_cases(_cases(), 8, 0, protocol=Protocol.RAW)
    assert (split.n_normal, split.n_abnormal) == (22, 15)
    tested = {case.group for case in split.test}
    assert tested & {case.group for case in split.references}
    assert not set(split.test) & set(split.references)


def test_a_group_with_both_answers_is_used_once():
    mixed = [*_cases(), Case(Path("m.png"), False, None, "mixed"), Case(Path("n.png"), True, None, "mixed")]
    split = split_cases(mixed, 8, 0)
    assert [case.group for case in (*split.references, *split.test)].count("mixed") == 1


def test_a_seed_repeats_its_draw_and_a_larger_k_extends_it():
    four, eight = split_cases(_cases(), 4, 1), split_cases(_cases(), 8, 1)
    assert split_cases(_cases(), 4, 1) == four
    assert eight.references[:4] == four.references
    assert split_cases(_cases(), 4, 2).references != four.references


def test_halves_share_no_group():
    tuning = split_cases(_cases(), 3, 0, half=Half.TUNING)
    report = split_cases(_cases(), 3, 0, half=Half.REPORT)
    groups = [{case.group for case in (*half.references, *half.test)} for half in (tuning, report)]
    assert not groups[0] & groups[1]
    assert len(groups[0] | groups[1]) == 30
    assert "set-0" in groups[0]  # crc32 of the name: the halves of published figures must never move
    assert "set-4" in groups[1]


@pytest.mark.parametrize("k", [20, 21, 50])
def test_a_k_that_leaves_nothing_to_test_is_refused(k):
    with pytest.raises(DatasetError, match=f"k = {k} leaves nothing to test: there are 20 normal and 10 abnormal"):
        split_cases(_cases(), k, 0)
