import numpy as np
import pytest

from fmclip.synthesis import estimate_foreground


@pytest.mark.parametrize(
    ("name", "shape"),
    [("head", (0.5, 0.5, 0.44, 0.36)), ("fundus", (0.5, 0.5, 0.48, 0.48)), ("slide", (0.5, 0.5, 0.35, 0.4))],
)
def test_tissue_is_found_and_its_dark_holes_belong_to_it(phantoms, name, shape):
    foreground = estimate_foreground(*phantoms[name]())
    truth = phantoms["disc"](*shape)
    assert (foreground & truth).sum() / (foreground | truth).sum() > 0.93


def test_full_frame_scan_is_foreground_up_to_its_letterbox_bars(phantoms):
    image, content = phantoms["sonogram"]()
    foreground = estimate_foreground(image, content)
    assert not foreground[~content].any()
    assert foreground.sum() > 0.98 * content.sum()


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_flat_scan_is_foreground_all_over(phantoms, value):
    assert estimate_foreground(*phantoms["flat"](value)).all()


def test_text_beside_the_body_is_not_tissue(phantoms):
    image, content = phantoms["head"]()
    image[4:9, 4:18:3] = 1.0
    assert not estimate_foreground(image, content)[:12, :20].any()


@pytest.mark.parametrize(
    ("image", "content", "message"),
    [
        (np.zeros((8, 8), np.float32), np.ones((8, 8), bool), "S, S, 3"),
        (np.zeros((8, 8, 3)), np.ones((8, 8), bool), "float64"),
        (np.zeros((8, 8, 3), np.float32), np.ones((8, 7), bool), "content must be bool"),
        (np.zeros((8, 8, 3), np.float32), np.zeros((8, 8), bool), "False everywhere"),
    ],
)
def test_bad_input_is_named(image, content, message):
    with pytest.raises(ValueError, match=message):
        estimate_foreground(image, content)
