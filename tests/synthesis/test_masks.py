import math

import numpy as np
import pytest

from fmclip.synthesis.masks import MIN_AREA, MaskSpec, distance_inside, draw_region, perlin_noise, pick_centre

EVERYWHERE = np.ones((128, 128), bool)


@pytest.mark.parametrize("shape", ["perlin", "ellipse", "rectangle"])
@pytest.mark.parametrize("share", [0.003, 0.02, 0.12])
@pytest.mark.parametrize("angle", [0.0, 37.0])
def test_mask_has_the_wanted_area_around_the_wanted_centre(shape, share, angle):
    spec = MaskSpec(shape, 0.5, 0.5, share, aspect=1.6, angle=angle, roughness=0.4)
    region = draw_region(spec, EVERYWHERE, np.random.default_rng(3), reach=1.7)
    area = region.mask.sum()
    assert area == pytest.approx(share * EVERYWHERE.size, rel=0.2)
    assert abs(region.offset[:, region.mask].mean(axis=1)).max() < region.radius


def test_angle_turns_the_long_axis():
    flat, upright = (
        draw_region(MaskSpec("ellipse", 0.5, 0.5, 0.05, aspect=3, angle=angle), EVERYWHERE, np.random.default_rng(0))
        for angle in (0.0, 90.0)
    )
    assert np.ptp(flat.offset[1][flat.mask]) > 2 * np.ptp(flat.offset[0][flat.mask])
    assert np.ptp(upright.offset[0][upright.mask]) > 2 * np.ptp(upright.offset[1][upright.mask])


def test_mask_stays_on_the_foreground_and_tiny_shares_still_give_a_lesion():
    foreground = np.zeros((128, 128), bool)
    foreground[:, :64] = True
    spec = MaskSpec("perlin", 0.5, 0.49, 0.1)
    region = draw_region(spec, foreground, np.random.default_rng(0))
    assert not (region.mask & ~foreground[region.box]).any()
    tiny = draw_region(MaskSpec("ellipse", 0.5, 0.5, 1e-6), EVERYWHERE, np.random.default_rng(0))
    assert tiny.mask.sum() == pytest.approx(MIN_AREA, abs=5)


def test_rough_perlin_outlines_are_longer_than_smooth_ones():
    def outline(roughness):
        spec = MaskSpec("perlin", 0.5, 0.5, 0.06, roughness=roughness, periods=3)
        mask = draw_region(spec, EVERYWHERE, np.random.default_rng(1), reach=1.7).mask
        return np.abs(np.diff(mask.astype(int), axis=0)).sum() + np.abs(np.diff(mask.astype(int), axis=1)).sum()

    assert outline(0.9) > 1.15 * outline(0.0)


@pytest.mark.parametrize("period", [2.0, 7.0, 40.0])
def test_perlin_noise_is_smooth_at_its_period(period):
    noise = perlin_noise(90, 120, period, np.random.default_rng(0))
    assert noise.shape == (90, 120)
    assert abs(noise).max() < 1
    assert noise.std() > 0.05
    if period > 5:
        assert abs(np.diff(noise, axis=0)).max() < 4 / period
    again = perlin_noise(90, 120, period, np.random.default_rng(0))
    assert np.array_equal(noise, again)


def test_centres_keep_their_distance_from_the_outline():
    foreground = np.zeros((200, 200), bool)
    foreground[40:160, 30:170] = True
    inside = distance_inside(foreground)
    for place in (0.0, 0.3, 0.7, 0.999):
        assert inside[pick_centre(foreground, 20, place)] >= 0.6 * 20
    row, column = pick_centre(foreground, 500, 0.5)  # larger than the tissue: as deep as it goes
    assert inside[row, column] > 0.75 * inside.max()


def test_centre_in_a_strip_of_one_pixel():
    strip = np.zeros((200, 200), bool)
    strip[:, 101] = True
    assert pick_centre(strip, 5, 0.5)[1] == 101


def test_unknown_shape_and_impossible_size_are_named():
    with pytest.raises(ValueError, match="perlin, ellipse, rectangle"):
        MaskSpec("star", 0.5, 0.5, 0.1)
    with pytest.raises(ValueError, match="share"):
        MaskSpec("ellipse", 0.5, 0.5, 0.0)
    assert math.isclose(MaskSpec("ellipse", 0.5, 0.5, 1.0).share, 1.0)
