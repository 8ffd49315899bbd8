import numpy as np
import pytest

from fmclip.synthesis.masks import MaskSpec, draw_region
from fmclip.synthesis.structural import Patch, cut_paste, fetch_patch, poisson_blend


def _ramp(size=48):
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    return (0.2 + 0.3 * x + 0.2 * y)[..., None].astype(np.float32)


@pytest.fixture
def mask():
    region = draw_region(MaskSpec("ellipse", 0.5, 0.5, 0.1), np.ones((48, 48), bool), np.random.default_rng(0))
    full = np.zeros((48, 48), bool)
    full[region.box] = region.mask
    return full


def test_paste_replaces_the_mask_only(mask):
    target, patch = _ramp(), np.full((48, 48, 1), 0.4, np.float32)
    pasted = cut_paste(target, patch, mask, gain=2.0)
    assert np.allclose(pasted[mask], 0.8)
    assert np.array_equal(pasted[~mask], target[~mask])


def test_poisson_solves_eq_12(mask):
    """Inside the mask the Laplacian is the patch's; on its border the values are the target's."""
    rng = np.random.default_rng(0)
    target = _ramp()
    patch = (0.5 + 0.05 * rng.standard_normal((48, 48, 1))).astype(np.float32)
    blended = poisson_blend(target, patch, mask)[..., 0].astype(np.float64)

    def laplacian(f):
        return f[:-2, 1:-1] + f[2:, 1:-1] + f[1:-1, :-2] + f[1:-1, 2:] - 4 * f[1:-1, 1:-1]

    error = laplacian(blended) - laplacian(patch[..., 0].astype(np.float64))
    inner = mask[1:-1, 1:-1]
    assert np.sqrt((error[inner] ** 2).mean()) < 0.01 * np.sqrt((laplacian(patch[..., 0])[inner] ** 2).mean())
    assert np.array_equal(blended[~mask], target[..., 0][~mask])


def test_poisson_of_a_flat_patch_leaves_a_harmonic_fill(mask):
    target = _ramp()  # a plane is harmonic, so the fill is the plane itself
    assert np.allclose(poisson_blend(target, np.full_like(target, 0.9), mask), target, atol=2e-3)


def test_mixed_gradients_keep_the_stronger_structure(mask):
    target = _ramp()
    target[:, 24:] += 0.3  # an edge across the mask
    flat = np.full_like(target, 0.5)
    smoothed = poisson_blend(target, flat, mask)[24, 20:28, 0]
    kept = poisson_blend(target, flat, mask, mixed=True)[24, 20:28, 0]
    assert np.diff(kept).max() > 0.25 > 2 * np.diff(smoothed).max()


@pytest.mark.parametrize("angle", [0.0, 90.0])
def test_patch_is_the_source_tissue_around_its_place(angle):
    source = np.random.default_rng(0).random((64, 64, 3)).astype(np.float32)
    foreground = np.zeros((64, 64), bool)
    foreground[32, 32] = True  # one place to choose from
    region = draw_region(MaskSpec("rectangle", 0.25, 0.25, 0.02), np.ones((64, 64), bool), np.random.default_rng(0))
    patch = fetch_patch(Patch(source=0, place=0.4, angle=angle), region, source, foreground)
    height, width = region.mask.shape
    top, left = (int(-region.offset[axis, 0, 0]) for axis in (0, 1))
    expected = source[32 - top : 32 - top + height, 32 - left : 32 - left + width]
    if angle:
        middle = patch[top, left]
        assert np.allclose(middle, source[32, 32], atol=1e-3)
        assert np.allclose(patch[top, left + 3], source[35, 32], atol=1e-3) or np.allclose(
            patch[top, left + 3], source[29, 32], atol=1e-3
        )
    else:
        assert np.allclose(patch, expected, atol=1e-3)
