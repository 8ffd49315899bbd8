"""Regions that a person calls normal: what the maps say there and elsewhere, before, after and once taken back."""

import numpy as np
import pytest

from fmclip.checkpoint import load_adapter, save_adapter
from fmclip.detectors import DETECTORS
from fmclip.errors import FmclipError
from fmclip.memory import MAX_REGIONS
from fmclip.regions import NormalRegion, mark_normal
from fmclip.scans import Scan
from fmclip.session import Adapted, Session

SIDE = 64
LEFT, RIGHT = (slice(16, 32), slice(4, 20)), (slice(36, 52), slice(44, 60))


def scan(seed: int, *spots: tuple[slice, slice]) -> Scan:
    """A striped picture with a little noise; spots on the left are checkered, those on the right plain and bright."""
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    pixels = 0.3 + 0.1 * np.sin(rows / 5) + np.random.default_rng(seed).normal(0, 0.02, (SIDE, SIDE))
    for spot in spots:
        pixels[spot] = 0.5 + 0.5 * ((rows + columns) // 4 % 2)[spot] if spot is LEFT else 0.95
    return Scan(np.clip(pixels, 0, 1).astype(np.float32), f"scan {seed}")


def region(of: Scan, spot: tuple[slice, slice]) -> NormalRegion:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[spot] = True
    return NormalRegion(of, mask)


NORMALS = [scan(seed) for seed in range(4)]
ODD = scan(9, LEFT, RIGHT)


@pytest.fixture
def session() -> Session:
    session = Session("tiny", "cpu")
    assert isinstance(list(session.adapt(NORMALS, method="patch_memory"))[-1], Adapted)
    return session


def test_a_marked_region_is_no_alarm_any_more_and_the_rest_of_the_scan_still_is(session):
    before = session.query([ODD])[0]
    threshold = session.calibration.threshold
    assert before.map[LEFT].max() > threshold < before.map[RIGHT].max()
    session.mark_normal([region(ODD, LEFT)])
    after = session.query([ODD])[0]
    assert after.map[LEFT].mean() < 0.7 * before.map[LEFT].mean()
    assert after.map[RIGHT].max() > max(threshold, 0.9 * before.map[RIGHT].max())
    assert after.is_abnormal
    assert session.calibration.threshold == threshold
    assert after.adapter != before.adapter


def test_a_mark_that_is_taken_back_leaves_nothing_behind(session):
    before = session.query([ODD])[0]
    session.mark_normal([region(ODD, LEFT)])
    session.mark_normal([region(ODD, LEFT), region(ODD, RIGHT)])
    assert session.query([ODD])[0].score < before.score
    session.mark_normal([])
    np.testing.assert_array_equal(session.query([ODD])[0].map, before.map)
    assert session.regions == ()


def test_marks_outlive_the_next_adaptation_and_reach_the_trained_map_too():
    session = Session("tiny", "cpu")
    list(session.adapt(NORMALS, preset="fast"))
    without = session.query([ODD])[0]
    list(session.adapt(NORMALS, preset="fast", regions=[region(ODD, LEFT), region(ODD, RIGHT)]))
    marked = session.query([ODD])[0]
    assert len(session.regions) == 2
    assert marked.score < without.score
    assert marked.parts["learned"][LEFT].mean() < without.parts["learned"][LEFT].mean()


def test_the_answer_to_why_names_the_region_that_is_nearest(session):
    session.mark_normal([region(ODD, LEFT)])
    view = next(view for view in session.explain(ODD, 12, 24).views if view.share and view.kind == "direction")
    assert view.matches[0].label == "normal region 1"
    assert view.matches[0].scan is ODD
    left, top, right, bottom = view.matches[0].box
    assert left <= 12 < right
    assert top <= 24 < bottom


def test_regions_are_kept_in_the_file_and_marks_of_the_next_person_come_on_top(session, tmp_path):
    session.mark_normal([region(ODD, LEFT)])
    session.save(tmp_path / "a.safetensors")
    other = Session("tiny", "cpu")
    other.load(tmp_path / "a.safetensors")
    first = other.query([ODD])[0]
    np.testing.assert_array_equal(first.map, session.query([ODD])[0].map)
    other.mark_normal([region(ODD, RIGHT)])
    assert not other.query([ODD])[0].map[RIGHT].max() > 0.9 * first.map[RIGHT].max()
    other.mark_normal([])
    np.testing.assert_array_equal(other.query([ODD])[0].map, first.map)


def test_a_method_without_a_memory_says_what_to_do_instead_and_goes_on_answering():
    session = Session("tiny", "cpu")
    list(session.adapt(NORMALS, method="cosine"))
    before = session.query([ODD])[0].score
    with pytest.raises(FmclipError, match="mark the whole scan"):
        session.mark_normal([region(ODD, LEFT)])
    assert session.query([ODD])[0].score == before
    assert not session.is_adapting


def test_a_method_without_a_memory_takes_no_region_into_account(session):
    list(session.adapt(NORMALS, method="cosine", regions=[region(ODD, LEFT)]))
    assert session.regions == ()


def test_a_strip_at_the_rim_of_a_letterboxed_scan_chooses_the_patches_beside_it(tiny_tower):
    detector = DETECTORS["patch_memory"](tiny_tower).fit(NORMALS)
    wide = Scan(ODD.pixels[:36], "scan 9")  # its last rows reach less than half into a row of patches
    mask = np.zeros((36, SIDE), bool)
    mask[-1, 10:30] = True
    assert mark_normal(detector, [NormalRegion(wide, mask)]) > 0
    assert detector.memory_.regions == 1


def test_a_mask_that_marks_nothing_or_lies_on_other_pixels_is_refused():
    with pytest.raises(FmclipError, match="Nothing is marked"):
        NormalRegion(ODD, np.zeros((SIDE, SIDE), bool))
    with pytest.raises(ValueError, match="mask must be"):
        NormalRegion(ODD, np.ones((3, 3), bool))


def test_a_spot_smaller_than_a_patch_still_counts_and_too_many_regions_do_not(tiny_tower):
    detector = DETECTORS["patch_memory"](tiny_tower).fit(NORMALS)
    spot = region(ODD, (slice(20, 22), slice(8, 10)))
    assert mark_normal(detector, [spot]) >= 1
    with pytest.raises(FmclipError, match=f"More than {MAX_REGIONS}"):
        mark_normal(detector, [spot] * (MAX_REGIONS + 1))
    assert detector.memory_.regions == 1


def test_an_adapter_file_whose_patches_skip_a_region_is_refused(tiny_tower, tmp_path):
    detector = DETECTORS["patch_memory"](tiny_tower).fit(NORMALS)
    mark_normal(detector, [region(ODD, LEFT)])
    detector.memory_.owner[-1] += 5
    save_adapter(tmp_path / "a.safetensors", detector, detector.calibration())
    with pytest.raises(FmclipError, match="damaged"):
        load_adapter(tmp_path / "a.safetensors", tower=tiny_tower)
