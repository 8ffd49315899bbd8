import math

import pytest
import torch

from fmclip.losses import dice_loss, focal_loss, image_score


def test_focal_by_hand():
    score, target = torch.tensor([0.9, 0.2]), torch.tensor([1, 0])
    expected = (0.1**2 * -math.log(0.9) + 0.2**2 * -math.log(0.8)) / 2
    assert focal_loss(score, target).item() == pytest.approx(expected, rel=1e-5)
    weighted = (0.25 * 0.1**2 * -math.log(0.9) + 0.75 * 0.2**2 * -math.log(0.8)) / 2
    assert focal_loss(score, target, alpha=0.25).item() == pytest.approx(weighted, rel=1e-5)


def test_focal_without_focus_is_cross_entropy():
    score, target = torch.rand(16, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 2
    expected = torch.nn.functional.binary_cross_entropy(score, target.float())
    assert focal_loss(score, target, gamma=0.0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_focal_stays_finite_at_certain_and_wrong_with_a_gradient_to_learn_from():
    score = torch.tensor([0.0, 1.0], requires_grad=True)
    assert focal_loss(torch.tensor([1.0, 0.0]), torch.tensor([1, 0])).item() == 0
    loss = focal_loss(score, torch.tensor([1, 0]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(score.grad).all()


def test_dice_by_hand():
    maps = torch.tensor([[[0.5, 1.0], [0.0, 0.25]]])
    masks = torch.tensor([[[1, 1], [0, 0]]])
    assert dice_loss(maps, masks).item() == pytest.approx(1 - (2 * 1.5 + 1) / (1.75 + 2 + 1))
    assert dice_loss(maps, masks, smooth=1e-6).item() == pytest.approx(1 - 3 / 3.75, rel=1e-4)


def test_dice_extremes_and_the_empty_mask():
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0, 1:3, 1:3] = True
    assert dice_loss(masks.float(), masks).item() == pytest.approx(0)
    assert dice_loss(1 - masks.float(), masks).item() > 0.8
    quiet, loud = torch.full((1, 4, 4), 0.01), torch.full((1, 4, 4), 0.5)
    empty = torch.zeros(1, 4, 4)
    assert dice_loss(quiet, empty) < dice_loss(loud, empty)


def test_dice_is_the_mean_over_the_batch_not_over_its_pixels():
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(3, 5, 5, generator=generator)
    masks = torch.rand(3, 5, 5, generator=generator) > 0.6
    each = torch.stack([dice_loss(maps[i : i + 1], masks[i : i + 1]) for i in range(3)])
    assert dice_loss(maps, masks).item() == pytest.approx(each.mean().item())


def test_image_score_is_the_maximum_or_the_mean_of_the_top():
    maps = torch.tensor([[[0.1, 0.9], [0.5, 0.3]]])
    assert image_score(maps).item() == pytest.approx(0.9)
    assert image_score(maps, top=0.5).item() == pytest.approx(0.7)
    assert image_score(maps, top=1.0).item() == pytest.approx(0.45)


def test_gradients():
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 3, 4, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    maps.requires_grad_()
    masks = torch.rand(2, 3, 4, generator=generator) > 0.5
    target = torch.tensor([0, 1])
    assert torch.autograd.gradcheck(lambda m: dice_loss(m, masks), maps)
    assert torch.autograd.gradcheck(lambda m: focal_loss(image_score(m), target, alpha=0.4), maps)
    assert torch.autograd.gradcheck(lambda m: focal_loss(image_score(m, top=0.25), target), maps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept_and_half_precision_does_not_overflow(dtype):
    maps = torch.full((2, 300, 300), 0.9, dtype=dtype)
    masks = torch.ones(2, 300, 300)
    dice, focal = dice_loss(maps, masks), focal_loss(image_score(maps), torch.tensor([1, 0]))
    assert dice.dtype == focal.dtype == dtype
    assert dice.item() == pytest.approx(1 - 1.8 / 1.9, abs=0.01)
    assert torch.isfinite(focal)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: focal_loss(torch.rand(3), torch.zeros(2)), r"\[3\] and \[2\]"),
        (lambda: focal_loss(torch.rand(0), torch.zeros(0)), "empty"),
        (lambda: focal_loss(torch.rand(2), torch.zeros(2), gamma=-1), "gamma >= 0"),
        (lambda: focal_loss(torch.tensor([1, 0]), torch.zeros(2)), "floating-point"),
        (lambda: dice_loss(torch.rand(2, 4, 4), torch.zeros(2, 4, 5)), "one shape"),
        (lambda: dice_loss(torch.rand(4, 4), torch.zeros(4, 4)), r"\[B, H, W\]"),
        (lambda: dice_loss(torch.rand(1, 4, 4), torch.zeros(1, 4, 4), smooth=0), "smooth"),
        (lambda: image_score(torch.rand(4, 4)), r"\[B, H, W\]"),
        (lambda: image_score(torch.rand(1, 4, 4), top=2), "share"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
