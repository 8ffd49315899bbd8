"""One abnormal scan among the references: which sets are learned from, which scans are asked about, what is said."""

import json
import sys

import pytest

from benchmarks import wrong_reference
from fmclip.calibration import Calibration
from fmclip.detectors import Prediction
from fmclip.detectors.patch_memory import PatchMemory

BRIGHT = 0.9  # a blob


class Looks(PatchMemory):
    """Scores a scan by its brightest pixel, and keeps what it was shown."""

    fits: list = []  # noqa: RUF012  (one list for all, read by the tests)
    asked: list = []  # noqa: RUF012

    def fit(self, normals, abnormals=None, **others):
        self.references = list(normals)
        self.fits.append(self.references)
        return self

    def predict(self, scans):
        self.asked.append((len(self.fits), list(scans)))
        return [Prediction(map=scan.pixels, score=_score(scan), parts={}) for scan in scans]

    def calibration(self):
        return Calibration.from_scores([_score(scan) for scan in self.references], self.spread_prior)


def _is_bright(scan):
    return scan.pixels.max() > BRIGHT


def _score(scan):
    return 0.9 if _is_bright(scan) else 0.40 + 0.02 * float(scan.pixels.mean())


@pytest.fixture
def measured(make_folders, tmp_path, monkeypatch):
    root = make_folders(tmp_path / "data", normal=40, abnormal=12)
    monkeypatch.setitem(wrong_reference.DETECTORS, wrong_reference.METHOD, Looks)
    monkeypatch.setattr(Looks, "fits", [])
    monkeypatch.setattr(Looks, "asked", [])
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(sys, "argv", ["wrong", str(root), "--tower=tiny", "--k", "4", "8", "--seeds=1", f"--out={out}"])
    wrong_reference.main()
    return out


def test_the_last_reference_is_replaced_and_taken_away_once_it_is_named(measured):
    drawn, mixed, left, *_ = Looks.fits
    assert [len(scans) for scans in Looks.fits] == [4, 4, 3, 8, 8, 7]
    assert not any(map(_is_bright, drawn))
    assert [scan.digest for scan in mixed[:-1]] == [scan.digest for scan in drawn[:-1]]
    assert _is_bright(mixed[-1])
    assert [scan.digest for scan in left] == [scan.digest for scan in drawn[:-1]]


def test_all_sets_of_a_draw_are_asked_about_the_same_scans_and_never_about_a_reference(measured):
    asked: dict[int, list[str]] = {}
    for number, scans in Looks.asked:
        asked.setdefault(number, []).extend(scan.digest for scan in scans)
    assert asked[1] == asked[2] == asked[3]
    assert asked[4] == asked[5] == asked[6]
    assert asked[1] != asked[4]
    for number, digests in asked.items():
        assert not {scan.digest for scan in Looks.fits[number - 1]}.intersection(digests)


def test_the_page_says_what_was_found_and_what_was_named(measured):
    page = (measured / "wrong_reference.md").read_text(encoding="utf-8")
    assert "`python -m benchmarks.wrong_reference ROOT --k 4 8 --seeds 1`" in page
    assert "| blobs | 4 | all normal | 100.0 | " in page
    assert "| blobs | 8 | one abnormal | 100.0 | 0.0 | 100.0 | 1 of 1 | 0.00 |" in page
    content = json.loads((measured / "wrong_reference.json").read_text(encoding="utf-8"))
    assert [one["named_wrong"] for one in content["answers"]] == [None, True, None] * 2
    assert content["environment"]["fmclip"]
