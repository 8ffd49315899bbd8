import numpy as np
import pytest

from fmclip.synthesis.deformation import Warp, displace_around, guided_warp, source_warp
from fmclip.synthesis.masks import MaskSpec, draw_region

SIZE = 100


def _region(shape="ellipse", foreground=None, reach=2.2, column=0.5):
    foreground = np.ones((SIZE, SIZE), bool) if foreground is None else foreground
    return draw_region(MaskSpec(shape, 0.5, column, 0.05), foreground, np.random.default_rng(0), reach=reach)


def _radius_image(region):
    """The distance from the centre as a picture, so that a warp can be read off it."""
    return (np.hypot(*region.offset) / 50)[..., None].astype(np.float32)


@pytest.mark.parametrize("factor", [1.0, -0.5])
def test_source_warp_shows_radius_rho_to_the_power_of_one_plus_factor(factor):
    region = _region()
    image = _radius_image(region)
    warped = source_warp(image, region, factor)
    ring = (region.rho > 0.45) & (region.rho < 0.55)
    expected = (region.rho ** (1 + factor)) * region.radius / 50
    assert np.allclose(warped[ring][:, 0], expected[ring], atol=0.01)
    assert np.array_equal(warped[~region.mask], image[~region.mask])


@pytest.mark.parametrize("shape", ["ellipse", "rectangle"])
def test_source_warp_has_no_seam_at_the_outline(shape):
    region = _region(shape)
    image = _radius_image(region)
    edge = (region.rho > 0.93) & (region.rho <= 1)
    assert np.abs(source_warp(image, region, 0.8) - image)[edge].max() < 0.04


def test_source_warp_rejects_a_factor_that_turns_tissue_inside_out():
    with pytest.raises(ValueError, match="above -1"):
        source_warp(np.zeros((5, 5, 1), np.float32), _region(), -1.0)


def test_guided_warp_moves_tissue_outward_and_fades():
    region = _region()
    image = _radius_image(region)
    moved = guided_warp(image, region, Warp(0.5), np.ones((SIZE, SIZE), bool), np.random.default_rng(0))
    change = (moved - image)[..., 0]
    assert change[(region.rho > 0.5) & (region.rho < 0.8)].mean() < -0.03  # what is seen there comes from further in
    assert abs(change[region.rho > 2.1]).max() < 0.01


def test_guided_warp_keeps_the_organ_outline():
    foreground = np.zeros((SIZE, SIZE), bool)
    foreground[20:80, 20:80] = True
    region = _region(foreground=foreground, column=0.3)
    image = foreground[region.box].astype(np.float32)[..., None] * 0.6
    moved = guided_warp(image, region, Warp(0.6, sway=0.3, shift=0.3), foreground, np.random.default_rng(0))
    assert np.abs(moved - image).max() < 0.35  # at most a softened edge pixel, never a moved outline


def test_midline_shift_points_to_the_organ_centre():
    foreground = np.ones((SIZE, SIZE), bool)
    region = _region(column=0.25)
    image = (region.offset[1] / 60 + 0.5)[..., None].astype(np.float32)  # brighter to the right
    moved = guided_warp(image, region, Warp(0.0, shift=0.4), foreground, np.random.default_rng(0))
    assert (moved - image)[region.rho < 0.5].mean() < -0.02  # tissue from the left has moved right, to the centre


def test_mass_effect_pushes_tissue_aside_within_the_box():
    region = _region()
    image = _radius_image(region)
    moved = displace_around(image, region, 0.4)
    ring = (region.rho > 1.0) & (region.rho < 1.2)
    assert (moved - image)[ring].mean() < -0.03
    rim = np.ones_like(region.mask)
    rim[1:-1, 1:-1] = False
    assert np.allclose(moved[rim], image[rim], atol=1e-4)
