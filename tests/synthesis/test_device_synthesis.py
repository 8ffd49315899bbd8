"""The synthesis for GPUs, run on the CPU: the same seed and the same records give the pictures of the CPU path."""

import cv2
import numpy as np
import pytest
import torch

from fmclip.synthesis import Augmentation, SynthesisConfig, replay, synthesise_pool
from fmclip.synthesis.anomaly import KINDS
from fmclip.synthesis.device import render, synthesise_on_device
from fmclip.synthesis.device.filters import box_blur, enlarge, gaussian_blur, sample
from fmclip.synthesis.device.morphology import close_with, distance_to_false, fill_holes, label_parts, part_sizes
from fmclip.synthesis.device.poisson import poisson_blend

PICTURE_BOUND = 1e-4  # of the full range: a fortieth of a grey level
MASK_BOUND = 3  # pixels of a mask that may differ: a change that is just visible, or just not
CONFIG = SynthesisConfig(scan_type="breast ultrasound", augmentation=Augmentation(mirror=True))


def tensors(images, contents) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(np.stack(contents))


@pytest.fixture(params=["head", "sonogram", "fundus", "slide"])
def normals(request, phantoms):
    return tuple(zip(*(phantoms[request.param](seed) for seed in range(4)), strict=True))


def test_one_seed_gives_one_pool_on_the_cpu_and_on_a_device(normals):
    pool = synthesise_pool(*normals, 48, torch.Generator().manual_seed(0), CONFIG)
    made = synthesise_on_device(*tensors(*normals), 48, torch.Generator().manual_seed(0), CONFIG)
    assert {scan.anomaly.kind for scan in made.scans if scan.anomaly} == set(KINDS)
    assert [scan.to_dict() for scan in made.scans] == [scan.to_dict() for scan in pool]
    for one, other in zip(pool, made.scans, strict=True):
        np.testing.assert_allclose(other.image, one.image, atol=PICTURE_BOUND)
        assert np.count_nonzero(one.mask ^ other.mask) <= MASK_BOUND
    pictures = made.pixels.permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(pictures, np.stack([scan.image for scan in made.scans]))
    np.testing.assert_array_equal(made.masks.numpy(), np.stack([scan.mask for scan in made.scans]))


def test_pairs_painted_hand_by_hand_are_those_of_one_call_of_the_cpu_for_each_hand(phantoms):
    normals = tuple(zip(*(phantoms["head"](seed) for seed in range(4)), strict=True))
    generator, told = torch.Generator().manual_seed(0), []
    pool = [scan for size in (16, 16, 8) for scan in synthesise_pool(*normals, size, generator, CONFIG)]
    seeded = torch.Generator().manual_seed(0)
    made = synthesise_on_device(*tensors(*normals), 40, seeded, CONFIG, hand=16, on_hand=told.append)
    assert told == [16, 32, 40]
    assert [scan.to_dict() for scan in made.scans] == [scan.to_dict() for scan in pool]
    for one, other in zip(pool, made.scans, strict=True):
        np.testing.assert_allclose(other.image, one.image, atol=PICTURE_BOUND)


def test_a_record_is_painted_as_it_is_replayed(normals):
    pool = synthesise_pool(*normals, 24, torch.Generator().manual_seed(5))
    pictures, masks = render(
        [scan.anomaly for scan in pool],
        [scan.source for scan in pool],
        [scan.view for scan in pool],
        *tensors(*normals),
    )
    for scan, picture, mask in zip(pool, pictures, masks, strict=True):
        again = replay(scan.to_dict(), *normals)
        np.testing.assert_allclose(picture.permute(1, 2, 0).numpy(), again.image, atol=PICTURE_BOUND)
        assert np.count_nonzero(mask.numpy() ^ again.mask) <= MASK_BOUND


def test_an_anomaly_that_hardly_shows_is_drawn_again_as_often_as_on_the_cpu(phantoms):
    images, contents = zip(*(phantoms["sonogram"](seed) for seed in range(3)), strict=True)
    shy = SynthesisConfig(visible=0.06, max_level=0.8, max_share=0.006)
    pool = synthesise_pool(images, contents, 40, torch.Generator().manual_seed(1), shy)
    made = synthesise_on_device(*tensors(images, contents), 40, torch.Generator().manual_seed(1), shy)
    assert [scan.to_dict() for scan in made.scans] == [scan.to_dict() for scan in pool]
    assert all(scan.mask.any() == (scan.anomaly is not None) for scan in made.scans)


def test_a_missing_mask_is_refused(phantoms):
    images, contents = tensors(*zip(phantoms["head"](), strict=True))
    with pytest.raises(ValueError, match="content mask"):
        synthesise_on_device(images, contents[:0], 4, torch.Generator())


SIZES = torch.tensor([[40, 33], [17, 48], [9, 5]])


@pytest.fixture
def planes() -> torch.Tensor:
    return torch.rand(len(SIZES), 40, 48, generator=torch.Generator().manual_seed(0))


def box(planes: torch.Tensor, place: int) -> np.ndarray:
    rows, columns = SIZES[place].tolist()
    return planes[place, :rows, :columns].numpy()


def test_blurs_and_enlargement_are_those_of_opencv_in_boxes_of_any_size(planes):
    sigma, width = torch.tensor([0.8, 6.0, 3.0]), torch.tensor([3, 9, 15])
    blurred, mean = gaussian_blur(planes, SIZES, sigma), box_blur(planes, SIZES, width)
    factor, coarse_sizes = torch.tensor([3.7, 1.5, 2.2]), torch.tensor([[14, 12], [15, 36], [8, 6]])
    large = enlarge(planes[:, :15, :36], coarse_sizes, factor.double(), SIZES, (40, 48))
    for place in range(len(SIZES)):
        original = np.ascontiguousarray(box(planes, place))
        expected = cv2.GaussianBlur(original, (0, 0), float(sigma[place]))
        np.testing.assert_allclose(box(blurred, place), expected, atol=1e-5)
        np.testing.assert_allclose(box(mean, place), cv2.blur(original, (int(width[place]),) * 2), atol=1e-5)
        rows, columns = coarse_sizes[place].tolist()
        coarse, times = planes[place, :rows, :columns].numpy(), float(factor[place])
        fine = cv2.resize(coarse, None, fx=times, fy=times, interpolation=cv2.INTER_CUBIC)
        height, width_ = SIZES[place].tolist()
        np.testing.assert_allclose(box(large, place), fine[:height, :width_], atol=1e-4)


def test_reading_between_pixels_mirrors_at_the_border_of_each_box(planes):
    generator = torch.Generator().manual_seed(1)
    rows, columns = (60 * torch.rand(2, len(SIZES), 8, 8, generator=generator) - 20).unbind()
    read = sample(planes[:, None], rows, columns, torch.zeros_like(SIZES), SIZES)[:, 0]
    for place in range(len(SIZES)):
        expected = cv2.remap(
            np.ascontiguousarray(box(planes, place)),
            columns[place].numpy(),
            rows[place].numpy(),
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REFLECT_101,
        )
        np.testing.assert_allclose(read[place].numpy(), expected, atol=1e-4)


def test_distances_parts_and_holes_are_those_of_opencv(planes):
    inside = torch.stack([torch.arange(40)[:, None].lt(rows) & torch.arange(48).lt(columns) for rows, columns in SIZES])
    mask = (gaussian_blur(planes, SIZES, torch.full((3,), 1.5)) > 0.5) & inside
    distances, sizes = distance_to_false(mask, inside), part_sizes(label_parts(mask))
    filled = fill_holes(torch.nn.functional.pad(mask, (1, 1, 1, 1)))[:, 1:-1, 1:-1]
    for place in range(len(SIZES)):
        own = box(mask, place).astype(np.uint8)
        np.testing.assert_allclose(box(distances, place), cv2.distanceTransform(own, cv2.DIST_L2, 3), atol=1e-4)
        _, labels, stats, _ = cv2.connectedComponentsWithStats(own, connectivity=4)
        np.testing.assert_array_equal(box(sizes, place), stats[:, cv2.CC_STAT_AREA][labels] * own)
        framed = cv2.copyMakeBorder(own, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
        cv2.floodFill(framed, None, (0, 0), 2)
        np.testing.assert_array_equal(box(filled, place), framed[1:-1, 1:-1] != 2)


def test_closing_is_that_of_opencv(planes):
    mask = torch.nn.functional.pad(planes > 0.9, (6, 6, 6, 6))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (7, 7))
    spans = torch.from_numpy((disc.sum(axis=1).astype(np.int64) - 1) // 2).expand(len(mask), -1)
    closed = close_with(mask, spans)
    for own, found in zip(mask, closed, strict=True):
        expected = cv2.morphologyEx(own.numpy().astype(np.uint8), cv2.MORPH_CLOSE, disc)
        np.testing.assert_array_equal(found.numpy(), expected.astype(bool))


def smooth(seed: int, sigma: float) -> np.ndarray:
    noise = cv2.GaussianBlur(np.random.default_rng(seed).random((64, 64), dtype=np.float32), (0, 0), sigma)
    return cv2.normalize(noise, None, 50, 200, cv2.NORM_MINMAX).round().astype(np.uint8)


def blend(target: np.ndarray, patch: np.ndarray, mask: np.ndarray, tolerance: float) -> np.ndarray:
    planes = [torch.from_numpy(one / np.float32(255))[None, None] for one in (target, patch)]
    sizes, one = torch.tensor([[64, 64]]), torch.ones(1)
    solved = poisson_blend(*planes, torch.from_numpy(mask)[None], sizes, one, one < 0, tolerance)
    return 255 * solved[0, 0].numpy()


def test_poisson_blending_solves_the_equation():
    target, patch = smooth(0, 3), smooth(1, 2)
    mask = cv2.circle(np.zeros((64, 64), np.uint8), (30, 33), 18, 1, -1).astype(bool)
    solved = blend(target, patch, mask, 1e-12)
    places = np.flatnonzero(mask)
    number = {place: row for row, place in enumerate(places)}
    matrix, right = np.zeros((len(places), len(places))), np.zeros(len(places))
    flat, guide = target.ravel().astype(float), patch.ravel().astype(float)
    for row, place in enumerate(places):
        matrix[row, row] = 4
        for other in (place - 64, place + 64, place - 1, place + 1):
            right[row] += guide[place] - guide[other]
            if other in number:
                matrix[row, number[other]] = -1
            else:
                right[row] += flat[other]
    np.testing.assert_allclose(solved.ravel()[places], np.linalg.solve(matrix, right).clip(0, 255), atol=0.05)
    np.testing.assert_allclose(solved[~mask], target[~mask], atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_poisson_blending_is_close_to_opencvs_seamless_clone(seed):
    """OpenCV solves over the whole rectangle, with the mask three pixels smaller; hence a mean, not a maximum."""
    target, patch = smooth(2 * seed, 3), smooth(2 * seed + 1, 2)
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 12:50] = 255
    three = [cv2.merge([one] * 3) for one in (patch, target)]
    expected = cv2.seamlessClone(*three, mask.copy(), (31, 32), cv2.NORMAL_CLONE)[..., 0].astype(float)
    core = cv2.erode(mask, np.ones((3, 3), np.uint8), iterations=3) > 0
    solved = blend(target, patch, core, 1e-10)
    apart = np.abs(solved - expected)[core].mean()
    assert apart < 5  # of 255
    assert apart < 0.5 * np.abs(patch - expected)[core].mean()  # a patch that is only pasted is far off
