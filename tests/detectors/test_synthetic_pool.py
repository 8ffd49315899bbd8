"""The pool of synthetic scans: one channel is kept of grey ones, and what is seen of them is the same."""

import numpy as np
import pytest
import torch
from detector_scans import normal_scan

from fmclip.detectors.base import to_pixels
from fmclip.detectors.events import ignore
from fmclip.detectors.synthetic import detached, stack_pictures, synthesise_scans
from fmclip.synthesis import Augmentation, SynthesisConfig, synthesise_pool
from fmclip.synthesis.foreground import is_grey as is_grey_picture
from fmclip.towers import get_tower

SIZE = 48


@pytest.fixture(scope="module")
def references():
    pixels, content, _ = to_pixels([normal_scan(seed) for seed in range(4)], get_tower("tiny"))
    return pixels, content


def made_of(pixels, content):
    return synthesise_scans(pixels, content, "brain MRI", SIZE, torch.Generator().manual_seed(0), ignore)


def expected(pixels, content):
    settings = SynthesisConfig(scan_type="brain MRI", augmentation=Augmentation())
    images = list(pixels.permute(0, 2, 3, 1).numpy())
    generator = torch.Generator().manual_seed(0)
    return [
        scan
        for size in (32, SIZE - 32)  # as many at a time as there
        for scan in synthesise_pool(images, list(content.numpy()), size, generator, settings)
    ]


@pytest.mark.parametrize("is_grey", [True, False])
def test_pictures_are_those_that_were_painted_and_grey_ones_take_a_third(references, is_grey):
    pixels, content = references
    if not is_grey:
        pixels = pixels * torch.tensor([1.0, 0.8, 0.6])[:, None, None]
    pool = made_of(pixels, content)
    painted = expected(pixels, content)
    assert len({scan.anomaly.kind for scan in painted if scan.anomaly}) >= 3
    for scan, other, picture in zip(pool.scans, painted, pool.pixels, strict=True):
        np.testing.assert_array_equal(scan.image, other.image)
        np.testing.assert_array_equal(picture.permute(1, 2, 0), other.image)
        np.testing.assert_array_equal(scan.mask, other.mask)
    channels = 1 if is_grey else 3
    side = pixels.shape[-1]
    assert pool.pixels.untyped_storage().nbytes() == 4 * SIZE * channels * side * side
    stacked = stack_pictures(pool.scans[:5])
    torch.testing.assert_close(stacked, pool.pixels[:5], rtol=0, atol=0)
    assert stacked.untyped_storage().nbytes() == 4 * 5 * channels * side * side


@pytest.mark.parametrize("is_grey", [True, False])
def test_copies_do_not_hold_the_pool(references, is_grey):
    pixels, content = references
    pixels = pixels if is_grey else pixels * torch.tensor([1.0, 0.8, 0.6])[:, None, None]
    pool = made_of(pixels, content)
    (copy,) = detached(pool.scans[3:4])
    np.testing.assert_array_equal(copy.image, pool.scans[3].image)
    np.testing.assert_array_equal(copy.mask, pool.scans[3].mask)
    assert not np.shares_memory(copy.image, pool.scans[3].image)
    assert not np.shares_memory(copy.mask, pool.scans[3].mask)
    assert copy.to_dict() == pool.scans[3].to_dict()


@pytest.mark.parametrize("scan_type", ["brain MRI", "breast ultrasound", "chest X-ray", "retinal fundus", "anything"])
def test_what_is_painted_on_grey_scans_is_grey(references, scan_type):
    pixels, content = references
    settings = SynthesisConfig(scan_type=scan_type, augmentation=Augmentation())
    generator = torch.Generator().manual_seed(1)
    images = list(pixels.permute(0, 2, 3, 1).numpy())
    for scan in synthesise_pool(images, list(content.numpy()), SIZE, generator, settings):
        assert is_grey_picture(scan.image)
