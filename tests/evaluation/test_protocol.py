"""No twin of a reference is ever tested, and the draw can be repeated."""

from dataclasses import replace
from pathlib import Path

import pytest

from fmclip.evaluation.datasets import Case, DatasetError, Part
from fmclip.evaluation.protocol import Half, Protocol, _half_of, split_cases


def _cases() -> list[Case]:
    """20 normal and 10 abnormal groups, each second one with a twin at the end of the list."""
    singles = [Case(Path(f"{n}.png"), n >= 20, (), f"set-{n}") for n in range(30)]
    return singles + [Case(Path(f"{n}-twin.png"), n >= 20, (), f"set-{n}") for n in range(0, 30, 2)]


@pytest.mark.parametrize("seed", range(5))
def test_unique_tests_one_scan_per_group_and_no_twin_of_a_reference(seed):
    split = split_cases(_cases(), 8, seed)
    groups = [case.group for case in (*split.references, *split.test)]
    assert len(split.references) == 8
    assert not any(case.is_abnormal for case in split.references)
    assert len(groups) == len(set(groups)) == 30
    assert (split.n_normal, split.n_abnormal) == (12, 10)
    assert not any("twin" in case.path.name for case in (*split.references, *split.test))


def _looking_alike(*names: str) -> list[Case]:
    """Those of the list with one look."""
    return [replace(case, look="one") if case.path.name in names else case for case in _cases()]


@pytest.mark.parametrize("seed", range(20))
def test_copies_that_the_groups_miss_are_never_apart(seed):
    cases = _looking_alike("3.png", "25.png")
    split = split_cases(cases, 8, seed)
    used = [case.path.name for case in (*split.references, *split.test)]
    assert ("3.png" in used, "25.png" in used) == (True, False)  # one of them, the first
    assert (split.n_normal, split.n_abnormal) == (12, 9)
    raw = split_cases(cases, 8, seed, protocol=Protocol.RAW)
    assert cases[25] in raw.test


@pytest.mark.parametrize("seed", range(20))
def test_the_group_of_a_copy_is_not_tested_where_the_copy_is_learned_from_nor_the_other_way_round(seed):
    cases = _looking_alike("4-twin.png", "25.png")  # 4.png stands for its group, the copy is of its twin
    split = split_cases(cases, 8, seed)
    used = [case.path.name for case in (*split.references, *split.test)]
    assert ("4.png" in used, "25.png" in used) == (True, False)
    fit_on = [replace(case, path=Path("other") / case.path, group=f"other {case.group}") for case in cases[:20]]
    across = split_cases(cases, 20, seed, fit_on=[replace(fit_on[0], look="one"), *fit_on[1:]])
    assert "4.png" not in [case.path.name for case in across.test]
    assert across.n_twins == 1


def test_the_other_set_does_not_join_what_is_tested():
    fit_on = [replace(case, path=Path("other") / case.path) for case in _cases()[:20]]  # groups of the same names
    fit_on += [Case(Path(f"other-{n}.png"), True, (), f"set-{n}", None, "one") for n in (25, 26, 27)]
    test = split_cases(_cases(), 8, 0, fit_on=fit_on).test
    assert sum(case.is_abnormal for case in test) == 10


def test_a_copy_of_the_other_sets_tuning_half_is_not_reported_on():
    cases = _looking_alike("24.png")  # report half, like set-4
    fit_on = [replace(case, path=Path("other") / case.path, group=f"other {case.group}") for case in _cases()[:20]]
    tuned = [replace(case, look="one") if _half_of(case.group) is Half.TUNING else case for case in fit_on]
    assert _half_of(cases[24].group) is Half.REPORT
    assert cases[24] in split_cases(cases, 3, 0, half=Half.REPORT, fit_on=fit_on).test
    assert cases[24] not in split_cases(cases, 3, 0, half=Half.REPORT, fit_on=tuned).test


def test_what_is_learned_from_does_not_depend_on_copies_of_it_that_are_tested():
    fit_on = [replace(case, path=Path("other") / case.path, group=f"other {case.group}") for case in _cases()[:20]]
    fit_on = [replace(case, look=f"look {place}") for place, case in enumerate(fit_on)]
    every = tuple(case.look for case in fit_on)
    copied = [replace(case, copies=every) if place % 5 == 0 else case for place, case in enumerate(_cases())]
    for half in Half:
        plain, beside = (split_cases(cases, 4, 0, half=half, fit_on=fit_on) for cases in (_cases(), copied))
        assert beside.references == plain.references
        assert beside.n_normal < plain.n_normal


def test_no_scan_of_the_report_half_is_a_copy_of_one_of_the_tuning_half():
    cases = _looking_alike("0.png", "4.png", "24.png")  # the first lies in the tuning half, 4 in the other
    tuning, report = (split_cases(cases, 3, 0, half=half) for half in (Half.TUNING, Half.REPORT))
    assert "0.png" in [case.path.name for case in (*tuning.references, *tuning.test)]
    assert "4.png" not in [case.path.name for case in (*report.references, *report.test)]


def test_raw_tests_twins_too():
    split = split_cases(_cases(), 8, 0, protocol=Protocol.RAW)
    assert (split.n_normal, split.n_abnormal) == (22, 15)
    tested = {case.group for case in split.test}
    assert tested & {case.group for case in split.references}
    assert not set(split.test) & set(split.references)


def test_a_group_with_both_answers_is_used_once():
    mixed = [*_cases(), Case(Path("m.png"), False, (), "mixed"), Case(Path("n.png"), True, (), "mixed")]
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


@pytest.mark.parametrize(
    ("k", "abnormal_k", "message"),
    [
        (20, 0, "k = 20 leaves nothing to test: there are 20 normal and 10 abnormal"),
        (21, 0, "k = 21 is too many: there are 20 normal scans to draw from"),
        (4, 11, "abnormal = 11 is too many: there are 10 abnormal scans to draw from"),
        (4, 10, "leaves nothing to test"),
    ],
)
def test_a_draw_that_leaves_nothing_is_refused(k, abnormal_k, message):
    with pytest.raises(DatasetError, match=message):
        split_cases(_cases(), k, 0, abnormal_k=abnormal_k)


@pytest.mark.parametrize("seed", range(3))
def test_abnormal_scans_to_learn_from_are_not_tested_nor_are_their_twins(seed):
    split = split_cases(_cases(), 8, seed, abnormal_k=3)
    assert len(split.abnormals) == 3
    assert all(case.is_abnormal for case in split.abnormals)
    assert not {case.group for case in split.abnormals} & {case.group for case in split.test}
    assert (split.n_normal, split.n_abnormal) == (12, 7)
    assert split.references == split_cases(_cases(), 8, seed).references


def test_an_official_split_is_kept():
    train = [Case(Path(f"train/{n}.png"), False, (), f"t{n}", Part.TRAIN) for n in range(6)]
    test = [Case(Path(f"test/{n}.png"), n >= 3, (), f"s{n}", Part.TEST) for n in range(6)]
    split = split_cases([*train, *test], 4, 0, abnormal_k=1)
    assert {case.part for case in split.references} == {Part.TRAIN}
    assert {case.part for case in split.test} == {Part.TEST}
    assert (split.n_normal, split.n_abnormal) == (3, 2)  # no abnormal scan to learn from in train


@pytest.mark.parametrize("seed", range(4))
def test_twins_across_an_official_split_are_not_tested(seed):
    train = [Case(Path(f"train/{n}.png"), False, (), f"t{n}", Part.TRAIN) for n in range(6)]
    test = [Case(Path(f"test/{n}.png"), n >= 6, (), f"t{n}", Part.TEST) for n in range(9)]
    split = split_cases([*train, *test], 4, seed)
    assert not {case.group for case in split.references} & {case.group for case in split.test}
    assert (split.n_normal, split.n_abnormal) == (2, 3)


def test_one_dataset_to_learn_from_and_another_to_test_on():
    other = [Case(Path(f"other/{n}.png"), n >= 5, (), f"set-{n}" if n == 0 else f"other-{n}") for n in range(10)]
    split = split_cases(_cases(), 5, 0, fit_on=other)
    assert {case.path.parent.name for case in split.references} == {"other"}
    assert (split.n_normal, split.n_abnormal) == (19, 10)  # one scan is in both datasets


def test_the_next_of_the_draw_stands_in_for_a_scan_that_cannot_be_read():
    before = split_cases(_cases(), 8, 0)
    after = split_cases(_cases(), 8, 0, unreadable={before.references[2], before.test[0]})
    assert after.references[:7] == before.references[:2] + before.references[3:]
    assert before.references[2] not in after.test
    assert before.test[0] not in after.test
