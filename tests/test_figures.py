"""Overlays, maps and plots."""

import cv2
import numpy as np
import pytest
from matplotlib.figure import Figure

from fmclip.figures import (
    CONTOUR_COLOUR,
    MASK_COLOUR,
    colour_position,
    draw_score_histogram,
    overlay,
    save_map,
    save_picture,
)
from fmclip.scans import Scan


@pytest.fixture
def scan() -> Scan:
    return Scan(np.random.default_rng(0).random((40, 60), dtype=np.float32) * 0.5)


def _bump(height: float = 0.9) -> np.ndarray:
    bump = np.zeros((40, 60), np.float32)
    bump[10:20, 30:45] = height
    return bump


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.4, 0.8, 1.0])
def test_the_colour_scale_is_tied_to_the_threshold(threshold):
    values = np.linspace(0, 1, 200)[None]
    position = colour_position(values, threshold)
    assert position[0, 0] == 0
    assert position.max() <= 1
    assert (np.diff(position) >= 0).all()
    if 0 < threshold < 1:
        assert colour_position(np.array([[threshold]]), threshold) == pytest.approx(0.5)


def test_lightness_rises_with_the_map():
    """Readable without telling hues apart."""
    black = Scan(np.zeros((9, 60), np.float32))
    ramp = np.repeat(np.linspace(0.2, 1, 60, dtype=np.float32)[None], 9, axis=0)
    picture = overlay(black, ramp, 0.5, opacity=1.0)
    values = [pixel for pixel in picture[4] if tuple(pixel) != CONTOUR_COLOUR]
    assert len(values) > 55
    lightness = cv2.cvtColor(np.array([values], np.uint8), cv2.COLOR_RGB2LAB)[0, :, 0].astype(int)
    assert (np.diff(lightness) >= -1).all()
    assert lightness[0] == 0


def test_quiet_maps_leave_the_scan_as_it_is(scan):
    picture = overlay(scan, np.full((40, 60), 0.2, np.float32), 0.5)
    expected = np.repeat(np.rint(scan.pixels * 255).astype(np.uint8)[..., None], 3, axis=2)
    np.testing.assert_array_equal(picture, expected)


def test_what_exceeds_the_threshold_is_coloured_and_outlined(scan):
    picture = overlay(scan, _bump(), 0.5)
    plain = overlay(scan, _bump(0.0), 0.5)
    changed = (picture != plain).any(axis=2)
    np.testing.assert_array_equal(changed, _bump() > 0)
    assert tuple(picture[10, 35]) == CONTOUR_COLOUR
    assert tuple(picture[15, 37]) != CONTOUR_COLOUR


def test_one_scan_does_not_change_the_colours_of_another(scan):
    alone = overlay(scan, _bump(0.6), 0.5)
    louder = _bump(0.6)
    louder[30, 5] = 1.0
    beside = overlay(scan, louder, 0.5)
    np.testing.assert_array_equal(alone[10:20, 30:45], beside[10:20, 30:45])


def test_opacity_zero_leaves_only_the_outline(scan):
    picture = overlay(scan, _bump(), 0.5, opacity=0.0)
    plain = overlay(scan, _bump(0.0), 0.5)
    np.testing.assert_array_equal(picture[12:18, 32:43], plain[12:18, 32:43])


def test_masks_are_outlined_in_their_own_colour(scan):
    mask = np.zeros((40, 60), bool)
    mask[25:35, 5:20] = True
    picture = overlay(scan, np.zeros((40, 60), np.float32), 0.5, mask=mask)
    assert tuple(picture[25, 10]) == MASK_COLOUR
    assert tuple(picture[30, 10]) != MASK_COLOUR


def test_maps_of_another_size_are_refused(scan):
    with pytest.raises(ValueError, match="pixels of the scan"):
        overlay(scan, np.zeros((8, 8), np.float32), 0.5)


def test_maps_are_written_in_16_bits_on_one_scale(tmp_path):
    ramp = np.linspace(0, 0.5, 2000, dtype=np.float32).reshape(40, 50)
    save_map(tmp_path / "map.png", ramp)
    read = cv2.imread(str(tmp_path / "map.png"), cv2.IMREAD_UNCHANGED)
    assert read.dtype == np.uint16
    np.testing.assert_allclose(read / 65535, ramp, atol=1e-5)


def test_pictures_keep_their_colours(tmp_path):
    picture = np.zeros((4, 4, 3), np.uint8)
    picture[..., 0] = 200
    save_picture(tmp_path / "p.png", picture)
    assert tuple(cv2.imread(str(tmp_path / "p.png"))[0, 0]) == (0, 0, 200)


def test_a_full_or_missing_folder_is_an_error(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        save_map(tmp_path / "missing" / "map.png", np.zeros((4, 4)))


def _draw(figure) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def test_histogram_marks_threshold_and_scans():
    figure = Figure()
    axes = figure.subplots()
    draw_score_histogram(axes, [0.2, 0.25, 0.3], 0.5, {"scan 1": 0.8, "scan 2": 0.1})
    assert axes.get_xlim() == (0, 1)  # the same for every adapter
    assert [text.get_text() for text in axes.texts] == ["scan 1", "scan 2"]
    assert sum(patch.get_height() for patch in axes.patches) == 3
    markers = [line for line in axes.lines if line.get_marker() == "v"]
    assert [line.get_xdata()[0] for line in markers] == [0.8, 0.1]
    assert markers[0].get_color() != markers[1].get_color()
    assert _draw(figure).size
