"""The square that a tower looks at keeps the scan's proportions, and maps come back onto the source pixels."""

import numpy as np
import pytest
from scan_files import gradient

from fmclip.scans import Letterbox, Scan, letterbox

SHAPES = [(300, 100), (100, 300), (224, 224), (37, 61), (5, 9), (1, 1), (1, 400), (3000, 2000), (1999, 7)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels", [(), (3,)], ids=["grey", "colour"])
def test_the_square_holds_the_scan_centred_and_in_proportion(shape, channels):
    scan = Scan(np.full((*shape, *channels), 0.5, np.float32))
    square, box = letterbox(scan, 224)
    assert square.shape == (224, 224, 3)
    assert square.dtype == np.float32
    np.testing.assert_array_equal(square[..., 0] == 0.5, box.content_mask())
    assert max(box.height, box.width) == 224
    assert abs(box.height / box.width - shape[0] / shape[1]) * min(shape) <= max(shape) / 100 or 1 in (
        box.height,
        box.width,
    )
    assert abs(box.top - (224 - box.height - box.top)) <= 1
    assert abs(box.left - (224 - box.width - box.left)) <= 1


def test_bars_are_black():
    square, box = letterbox(Scan(gradient(50, 100) / 255 * 0.5 + 0.5), 64)
    assert square[~box.content_mask()].max() == 0
    assert square[box.content_mask()].min() >= 0.5


@pytest.mark.parametrize("shape", SHAPES)
def test_a_map_comes_back_in_the_shape_of_the_scan(shape):
    restored = Letterbox.of(shape, 96).restore(np.random.default_rng(0).random((96, 96)))
    assert restored.shape == shape
    assert restored.dtype == np.float32
    assert restored.min() >= 0
    assert restored.max() <= 1


@pytest.mark.parametrize("shape", [(300, 100), (100, 300), (37, 61), (60, 80), (3000, 2000), (20, 12)])
@pytest.mark.parametrize("place", [(0.1, 0.1), (0.5, 0.5), (0.93, 0.2), (0.3, 0.8)])
def test_a_hot_spot_lands_where_it_was(shape, place):
    row, column = round(place[0] * (shape[0] - 1)), round(place[1] * (shape[1] - 1))
    rows, columns = np.mgrid[0 : shape[0], 0 : shape[1]]
    sigma = max(shape) / 40
    spot = np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * sigma**2)).astype(np.float32)
    square, box = letterbox(Scan(spot), 224)
    restored = box.restore(square[:, :, 0])
    weights = np.where(restored > 0.5 * restored.max(), restored, 0)
    expected = np.where(spot > 0.5, spot, 0)
    # Within one pixel of the source, or of the square where the source is finer than that.
    tolerance = max(1.0, max(shape) / 224)
    for axis in (rows, columns):
        assert (weights * axis).sum() / weights.sum() == pytest.approx(
            (expected * axis).sum() / expected.sum(), abs=tolerance
        )


def test_there_and_back_gives_the_scan_again():
    smooth = gradient(200, 120).astype(np.float32) / 255
    square, box = letterbox(Scan(smooth), 256)
    np.testing.assert_allclose(box.restore(square[:, :, 0]), smooth, atol=0.01)


def test_shrinking_averages_instead_of_picking_pixels():
    checkers = np.indices((512, 512)).sum(axis=0) % 2
    square, _ = letterbox(Scan(checkers.astype(np.float32)), 64)
    np.testing.assert_allclose(square, 0.5, atol=1e-6)


def test_a_map_of_another_square_is_refused():
    with pytest.raises(ValueError, match="map must be"):
        Letterbox.of((10, 10), 64).restore(np.zeros((32, 32)))
