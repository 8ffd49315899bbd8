"""Copies of one picture share a group, different pictures do not, however alike they are."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from fmclip.evaluation import load_datasets, looks, split_cases
from fmclip.evaluation.twins import Look, name_groups, twins_across
from fmclip.scans import Scan, read_scan

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def _pictures(kind: str, count: int = 16) -> list[np.ndarray]:
    return [read_scan(path).pixels for path in sorted((EXAMPLES / kind / "normal").glob("*.png"))[:count]]


def _groups(pictures: list[np.ndarray]) -> list[str]:
    return name_groups([Look.at(Scan(pixels)) for pixels in pictures])


def _saved_again(pixels: np.ndarray) -> np.ndarray:
    _, coded = cv2.imencode(".jpg", np.round(255 * pixels).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 60])
    return cv2.imdecode(coded, cv2.IMREAD_UNCHANGED).astype(np.float32) / 255


def _shifted(pixels: np.ndarray) -> np.ndarray:
    there = np.array([[1, 0, 4], [0, 1, -2]], np.float32)
    return cv2.warpAffine(pixels, there, pixels.shape[1::-1])


CHANGES = {
    "saved again": _saved_again,
    "mirrored": lambda pixels: np.ascontiguousarray(pixels[:, ::-1]),
    "brighter": lambda pixels: np.clip(1.15 * pixels + 0.05, 0, 1),
    "shifted": _shifted,
    "smaller": lambda pixels: cv2.resize(pixels, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["brain_mri_t1", "simulated_breast_ultrasound"])
def test_a_changed_copy_shares_the_group_of_its_original_only(kind, change):
    pictures = _pictures(kind)
    groups = _groups([*pictures, *map(CHANGES[change], pictures)])
    assert groups[:16] == groups[16:]
    assert len(set(groups)) == 16


@pytest.mark.parametrize("kind", ["brain_mri_t1", "retinal_fundus", "simulated_breast_ultrasound"])
def test_slices_of_one_head_and_scans_of_one_kind_are_no_twins(kind):
    assert len(set(_groups(_pictures(kind)))) == 16


def test_many_pictures_that_are_almost_alike_are_no_twins_of_each_other():
    """Bright discs on black, whose own textures are too faint for a bound that knows nothing of the others."""
    y, x = np.ogrid[:128, :128]
    disc = ((y - 64) ** 2 + (x - 64) ** 2 < 50**2).astype(np.float32)
    generator = np.random.default_rng(0)
    textures = [cv2.GaussianBlur(generator.normal(size=(128, 128)).astype(np.float32), (0, 0), 3) for _ in range(30)]
    discs = [disc * (0.7 + 0.03 * texture / texture.std()) for texture in textures]
    groups = _groups([*discs, _saved_again(discs[0]), *_pictures("brain_mri_t1")])
    assert groups[30] == groups[0]
    assert len(set(groups)) == 46


def test_twins_of_twins_share_a_group_whatever_the_order():
    pictures = _pictures("brain_mri_t1", 8)
    chain = [pictures[0], _saved_again(pictures[0]), _shifted(_saved_again(pictures[0]))]
    forward, backward = _groups([*pictures[1:], *chain]), _groups([*chain[::-1], *pictures[1:]])
    assert forward[7] == forward[8] == forward[9]
    assert set(forward) == set(backward)
    assert _groups(pictures)[1:] == forward[:7]  # the digest alone, as in any other dataset


def test_flat_scans_and_small_sets_are_no_problem():
    flat = [np.full((8, 8), value, np.float32) for value in (0, 0.5, 0.5, 1)]
    first, second, third, fourth = _groups(flat)
    assert second == third
    assert len({first, second, fourth}) == 3
    assert _groups([]) == []
    assert len(set(_groups(_pictures("retinal_fundus", 1)))) == 1


@pytest.mark.parametrize("seed", range(3))
def test_no_copy_of_a_reference_is_tested(tmp_path, seed):
    """Each normal scan lies in the folder twice, the copy saved again under another name."""
    for number, pixels in enumerate(_pictures("brain_mri_t1")):
        label = "no" if number < 12 else "yes"
        (tmp_path / label).mkdir(exist_ok=True)
        for name, picture in ((f"{number}", pixels), (f"copy of {number}", _saved_again(pixels))):
            cv2.imwrite(str(tmp_path / label / f"{name}.png"), np.round(255 * picture))
    (dataset,) = load_datasets(tmp_path)
    assert dataset.notes == (
        "16 scans look like copies of others (re-saved, mirrored, brighter or shifted) and share a group",
    )
    split = split_cases(dataset.cases, 4, seed)
    numbers = [case.path.stem.removeprefix("copy of ") for case in (*split.references, *split.test)]
    assert len(numbers) == len(set(numbers)) == 16


def _save(folder, pictures):
    for label in ("no", "yes"):
        (folder / label).mkdir(parents=True)
    for number, pixels in enumerate(pictures):
        path = folder / ("no" if number < len(pictures) - 3 else "yes") / f"{number}.png"
        cv2.imwrite(str(path), np.round(255 * pixels))


@pytest.fixture
def two_sets(tmp_path):
    """Three normal scans of the second set are those of the first saved again, mirrored or brighter."""
    pictures = _pictures("brain_mri_t1")
    copies = [_saved_again(pictures[0]), pictures[1][:, ::-1], np.clip(1.1 * pictures[2], 0, 1)]
    _save(tmp_path / "first", pictures[:9])
    _save(tmp_path / "second", [*copies, *pictures[9:]])
    return tmp_path


FOUND = "3 scans look like scans of first, which is learned from"


def test_copies_of_what_another_dataset_learns_from_are_not_tested(two_sets):
    second, first = load_datasets(two_sets, ["second"], fit_on="first")
    assert (second.notes, first.notes) == ((FOUND,), ())
    split = split_cases(second.cases, 6, 0, fit_on=first.cases)  # all normal scans of the first
    assert split.n_twins == 3
    assert {case.path.stem for case in split.test}.isdisjoint("012")


def test_what_is_learned_from_is_the_same_whatever_is_tested(two_sets):
    (alone,) = load_datasets(two_sets, ["first"])
    _, *beside = load_datasets(two_sets, ["second"], fit_on="first")
    _save(two_sets / "third", [_shifted(picture) for picture in _pictures("brain_mri_t1")[:9]])
    among = load_datasets(two_sets, fit_on="first")
    assert [one.name for one in among] == ["first", "second", "third"]
    assert beside == [alone] == among[:1]
    assert among[1] == load_datasets(two_sets, ["second"], fit_on="first")[0]
    assert among[2].notes == ("9 scans look like scans of first, which is learned from",)
    groups = [case.group for case in among[1].cases]
    assert groups == [case.group for case in load_datasets(two_sets, ["second"])[0].cases]  # and so the halves


@pytest.mark.parametrize("known", ["first", "second", "both"])
def test_copies_across_are_found_where_a_manifest_names_looks(two_sets, write_manifest, known):
    rows = [
        {
            "dataset": name,
            "path": f"{name}/{path.parent.name}/{path.name}",
            "label": "normal" if path.parent.name == "no" else "abnormal",
            "group": f"{name} {path.stem}",
            "look": f"{name}-{path.stem}" if known in (name, "both") else "",
        }
        for name in ("first", "second")
        for path in sorted((two_sets / name).glob("*/*.png"))
    ]
    first, second = load_datasets(write_manifest(two_sets, rows), fit_on="first")
    assert (second.notes, first.notes) == ((FOUND,), ())
    assert split_cases(second.cases, 6, 0, fit_on=first.cases).n_twins == 3


def test_twins_of_a_copy_in_its_own_dataset_are_copies_too():
    pictures = _pictures("brain_mri_t1", 8)
    source = [(f"own {place}", Look.at(Scan(pixels))) for place, pixels in enumerate(pictures)]
    pixels = [_saved_again(pictures[0]), *_pictures("simulated_breast_ultrasound", 2)]
    others = [(name, Look.at(Scan(own))) for name, own in zip(("one", "one", "two"), pixels, strict=True)]
    assert twins_across(source, others) == [("own 0",), ("own 0",), ()]
    assert twins_across(source, others[1:]) == [(), ()]  # by themselves
    assert twins_across([], others) == [()] * 3
    assert twins_across(source, []) == []


def test_many_copies_in_what_is_learned_from_hide_none_that_is_tested():
    pictures = _pictures("brain_mri_t1")
    darker = [pictures[0] * (1 - 0.002 * step) for step in range(1, 31)]
    source = [("0", Look.at(Scan(pixels))) for pixels in darker]
    source += [(str(place), Look.at(Scan(pictures[place]))) for place in range(1, 16)]
    tested = [("other", Look.at(Scan(_saved_again(pictures[0]))))]
    assert twins_across(source, tested) == [("0",)]
    assert twins_across(tested, source)[:31] == [("other",)] * 30 + [()]


def test_looks_that_a_manifest_names_are_few_enough_to_find_the_others(tmp_path, two_sets, write_manifest, monkeypatch):
    monkeypatch.setattr(looks, "MOST_COMPARED", 4)
    rows = [
        {
            "dataset": "first",
            "path": f"first/no/{n}.png",
            "label": "normal",
            "group": str(n),
            "look": "" if n < 3 else n,
        }
        for n in range(6)
    ]
    rows += [{**rows[0], "dataset": "second", "path": "second/yes/9.png"}]
    (alone,) = load_datasets(write_manifest(tmp_path, rows), ["first"])
    first, second = load_datasets(tmp_path, fit_on="first")
    assert first == alone
    assert all(case.look for case in first.cases)
    assert second.notes == ("the scans are too many to look for copies of those of first, which is learned from",)


@pytest.mark.parametrize(("most", "grouped"), [(15, False), (8, True)])
def test_very_many_scans_are_not_compared_with_another_dataset(
    tmp_path, two_sets, write_manifest, monkeypatch, most, grouped
):
    monkeypatch.setattr(looks, "MOST_COMPARED", most)
    if grouped:
        rows = [
            {"dataset": name, "path": f"{name}/no/{n}.png", "label": "normal", "group": f"{name} {n}"}
            for name, numbers in (("first", range(6)), ("second", range(3)))
            for n in numbers
        ]
        rows += [{**rows[0], "path": f"first/yes/{n}.png", "group": f"first {n}"} for n in (6, 7, 8)]
        write_manifest(tmp_path, rows)
    first, second = load_datasets(tmp_path, fit_on="first")
    assert second.notes == ("the scans are too many to look for copies of those of first, which is learned from",)
    assert bool(first.notes) == grouped  # what is too large by itself says so


def test_reading_a_dataset_shows_how_far_it_is(two_sets):
    told = []
    load_datasets(two_sets, ["second"], fit_on="first", on_progress=lambda *step: told.append(step))
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, 1)
    assert len(set(shares)) > 18
    assert "first: reading scans" in {text for _, text in told}
