"""The check of a reference set before adapting: strays, mixed types, burned-in text, and dropping them on the page."""

import cv2
import numpy as np
import pytest
from page_scans import CPU, ME, PLAIN, event, save_picture, shown
from PIL import Image

from fmclip.checks import check_pixels, check_strays, embed_scans, find_strays, find_text
from fmclip.page import uploads
from fmclip.page.handlers import Handlers
from fmclip.page.sets import SetChecks
from fmclip.page.visitors import Visitors
from fmclip.scans import Scan
from fmclip.session import Session


def disc(seed: int, side: int = 96) -> np.ndarray:
    """A bright round organ with some texture."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side] / side
    organ = ((rows - 0.5) ** 2 + (columns - 0.5) ** 2 < (0.38 + 0.02 * rng.random()) ** 2).astype(np.float32)
    return np.clip(0.6 * organ + 0.05 * rng.standard_normal((side, side)), 0, 1).astype(np.float32)


def stripes(seed: int, side: int = 96) -> np.ndarray:
    rng = np.random.default_rng(seed)
    waves = 0.5 + 0.5 * np.sin(np.arange(side) * (0.7 + 0.02 * rng.random()))
    return np.clip(np.tile(waves[:, None], (1, side)) + 0.05 * rng.standard_normal((side, side)), 0, 1).astype(
        np.float32
    )


def make_scans(*pictures: np.ndarray) -> list[Scan]:
    return [Scan(picture, f"scan {place}") for place, picture in enumerate(pictures, start=1)]


def around(centre: int, count: int, rng: np.random.Generator) -> np.ndarray:
    points = 0.15 * rng.standard_normal((count, 16)) / 4
    points[:, centre] += 1
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def test_a_stray_and_a_group_of_another_kind_are_found_and_a_plain_set_is_left_alone():
    rng = np.random.default_rng(0)
    bulk = around(0, 9, rng)
    assert find_strays(bulk) == []
    assert find_strays(np.concatenate([bulk, around(1, 1, rng)])) == [(9,)]
    assert find_strays(np.concatenate([around(1, 3, rng), bulk])) == [(0, 1, 2)]
    both = find_strays(np.concatenate([bulk, around(1, 1, rng), around(2, 2, rng)]))
    assert sorted(both) == [(9,), (10, 11)]


def test_no_more_than_half_of_a_set_and_none_of_three_scans_is_called_odd():
    rng = np.random.default_rng(0)
    apart = np.concatenate([around(place, 2, rng) for place in range(5)])
    assert sum(map(len, find_strays(apart))) <= 5
    assert find_strays(np.concatenate([around(0, 2, rng), around(1, 1, rng)])) == []


def test_the_tower_sees_that_one_scan_is_of_another_kind(tiny_tower):
    scans = make_scans(*(disc(seed) for seed in range(7)), stripes(7))
    (warning,) = check_strays(scans, embed_scans(scans, tiny_tower))
    assert warning.kind == "outlier"
    assert warning.message == "scan 8 looks unlike the other 7: keep it?"
    mixed = make_scans(*(disc(seed) for seed in range(6)), stripes(7), stripes(8))
    (warning,) = check_strays(mixed, embed_scans(mixed, tiny_tower))
    assert "scan 7 and scan 8 look alike and unlike the other 6" in warning.message


@pytest.mark.parametrize(("text", "scale"), [("DOE JANE 12.03.71", 0.6), ("RIGHT", 0.8), ("L 4711 AP", 1.0)])
@pytest.mark.parametrize("ink", [1.0, 0.0])
def test_burned_in_text_is_found_bright_or_dark(text, scale, ink):
    picture = np.full((256, 256), 0.5, np.float32) + 0.02 * np.random.default_rng(0).standard_normal((256, 256))
    picture = (255 * np.clip(picture, 0, 1)).astype(np.uint8)
    assert find_text(picture / 255) == []
    cv2.putText(picture, text, (10, 200), cv2.FONT_HERSHEY_SIMPLEX, scale, int(255 * ink), 1, cv2.LINE_AA)
    boxes = find_text(picture / 255)
    assert boxes
    assert all(165 < box.top < box.bottom < 215 and box.left >= 8 for box in boxes)
    assert [warning.kind for warning in check_pixels(make_scans(picture / 255))] == ["text"]


def test_organs_and_stripes_are_not_text():
    for seed in range(20):
        assert find_text(disc(seed, 256)) == []
        assert find_text(stripes(seed, 256)) == []


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "get_upload_folder", lambda: str(tmp_path / "cache"))
    visitors = Visitors(lambda: Session("tiny", "cpu"))
    return Handlers(visitors, [], CPU), visitors, tmp_path / "cache"


def upload(cache, *pictures: np.ndarray) -> list[str]:
    paths = []
    for place, picture in enumerate(pictures):
        path = cache / f"u{place}" / f"Mustermann{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * picture).astype(np.uint8)).save(path)
        paths.append(str(path))
    return paths


def test_a_stray_is_named_on_the_page_and_one_click_drops_it(page):
    handlers, visitors, cache = page
    checks = SetChecks(handlers)
    handlers.add_references(upload(cache, *(disc(seed) for seed in range(7)), stripes(7)), *PLAIN, ME)
    note = checks.look(ME)["set_note"]
    assert "scan 8 looks unlike the other 7: keep it?" in note
    assert "Remove scan 8" in note
    updates = shown(checks.drop(event(labels=["scan 8"]), ME))
    assert [scan.label for scan in visitors.get(ME).references] == [f"scan {place}" for place in range(1, 8)]
    assert updates["set_note"] == ""
    assert "Removed scan 8" in updates["reference_note"]
    assert updates["references"].count("fm-pick") == 7


def test_of_two_copies_the_button_drops_the_later_one(page):
    handlers, visitors, cache = page
    files = [save_picture(cache / f"u{place}" / "x.png", seed) for place, seed in enumerate((1, 2, 3, 2))]
    note = shown(handlers.add_references(files, *PLAIN, ME))["reference_note"]
    assert "[&quot;scan 4&quot;]" in note
    shown(SetChecks(handlers).drop(event(labels=["scan 4"]), ME))
    assert [scan.label for scan in visitors.get(ME).references] == ["scan 1", "scan 2", "scan 3"]


def test_a_tower_that_is_too_slow_is_not_waited_for(page, monkeypatch):
    handlers, _, cache = page
    monkeypatch.setattr("fmclip.page.references.LOOK_SECONDS", -1)
    handlers.add_references(upload(cache, *(disc(seed) for seed in range(7)), stripes(7)), *PLAIN, ME)
    assert SetChecks(handlers).look(ME)["set_note"] == ""
