from dataclasses import replace

import numpy as np
import pytest

from fmclip.synthesis.density import (
    MIN_CHANGE,
    TEXTURES,
    Density,
    cast_shadow,
    intensity_change,
    local_contrast,
    smooth_noise,
    surroundings,
    texture_change,
)
from fmclip.synthesis.masks import MaskSpec, draw_region

TISSUE = np.ones((80, 80), bool)


@pytest.fixture
def region():
    return draw_region(MaskSpec("ellipse", 0.4, 0.5, 0.05), TISSUE, np.random.default_rng(0), reach=2.2)


@pytest.fixture
def pixels(region):
    noise = np.random.default_rng(1).normal(0, 0.05, (*region.mask.shape, 1))
    return np.clip(0.5 + noise, 0, 1).astype(np.float32)


@pytest.mark.parametrize("level", [2.0, -2.0])
def test_level_is_the_mean_change_in_local_contrasts(region, pixels, level):
    changed = intensity_change(pixels, region, Density(level, grain=0.1), 0.1, np.random.default_rng(0))
    core = region.rho < 0.7
    assert (changed - pixels)[core].mean() == pytest.approx(0.2 * np.sign(level), rel=0.15)
    assert np.array_equal(changed[~region.mask], pixels[~region.mask])


@pytest.mark.parametrize("texture", TEXTURES)
def test_blurred_texture_fades_beyond_the_outline(region, pixels, texture):
    density = Density(2.5, texture=texture, blur=0.1)
    changed = texture_change(pixels, region, density, 0.1, np.random.default_rng(0))
    change = np.abs(changed - pixels)[..., 0]
    assert change[region.mask].mean() > 0.08
    assert change[region.rho > 1.5].max() < 0.01
    assert changed.min() >= 0
    assert changed.max() <= 1


def test_eq_13_with_beta_one_replaces_the_tissue(region, pixels):
    """With beta = 1 and no grain the core is flat: the tissue's own structure is gone."""
    density = Density(1.5, grain=0.0, beta=1.0, blur=0.05)
    changed = texture_change(pixels, region, density, 0.1, np.random.default_rng(0))
    core = region.rho < 0.5
    assert changed[core].std() < 0.4 * pixels[core].std()


def test_ring_has_a_rim_and_a_core_of_opposite_sign(region, pixels):
    density = Density(2.0, texture="ring", grain=0.0, beta=1.0, blur=0.03)
    change = (texture_change(pixels, region, density, 0.1, np.random.default_rng(0)) - pixels)[..., 0]
    assert change[(region.rho > 0.7) & (region.rho < 0.85)].mean() > 0.1
    assert change[region.rho < 0.3].mean() < -0.05


def test_strong_change_leaves_some_room(region, pixels):
    changed = intensity_change(pixels, region, Density(-9.0, grain=0.0), 0.3, np.random.default_rng(0))
    assert changed[region.rho < 0.6].mean() > 0.02


def test_weak_change_can_still_be_seen(region, pixels):
    changed = intensity_change(pixels, region, Density(0.01, grain=0.0), 0.05, np.random.default_rng(0))
    assert (changed - pixels)[region.rho < 0.6].mean() == pytest.approx(MIN_CHANGE, rel=0.1)


def test_halo_lies_around_the_lesion_on_tissue_only(region, pixels):
    half = replace(region, tissue=region.offset[1] < 5)
    painted = surroundings(pixels, half, Density(2.0, halo=0.4), 0.1)
    change = (painted - pixels)[..., 0]
    ring = (region.rho > 1.05) & (region.rho < 1.2)
    assert change[ring & half.tissue].mean() > 0.03
    assert not change[~half.tissue].any()
    assert surroundings(pixels, region, Density(2.0), 0.1) is pixels


@pytest.mark.parametrize("shadow", [0.6, -0.6])
def test_shadow_falls_below_the_lesion_and_fades(region, shadow):
    image = np.full((80, 80, 3), 0.4, np.float32)
    change = (cast_shadow(image, region, TISSUE, shadow) - image)[..., 0] * -np.sign(shadow)
    lesion = np.zeros((80, 80), bool)
    lesion[region.box] = region.mask
    bottom = np.flatnonzero(lesion.any(axis=1))[-1]
    middle = 40
    assert change[bottom + 4, middle] > 0.1
    assert change[bottom + 4, middle] > 1.5 * change[79, middle] > 0
    assert not change[lesion].any()
    assert not change[: region.box[0].start].any()
    assert change[bottom + 4, 2] == pytest.approx(0, abs=1e-4)


def test_contrast_has_a_floor_and_noise_its_scale():
    assert local_contrast(np.full((9, 9, 3), 0.5, np.float32), np.ones((9, 9), bool)) == pytest.approx(0.05)
    assert local_contrast(np.full((9, 9, 3), 0.5, np.float32), np.zeros((9, 9), bool)) == pytest.approx(0.05)
    noise = smooth_noise(200, 180, 5, np.random.default_rng(0))
    assert noise.shape == (200, 180)
    assert noise.std() == pytest.approx(1, abs=0.25)
    assert abs(noise.mean()) < 0.15


def test_unknown_texture_is_named():
    with pytest.raises(ValueError, match="smooth, mottled, speckle, ring"):
        Density(1.0, texture="velvet")
