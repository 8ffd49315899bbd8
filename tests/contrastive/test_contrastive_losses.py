"""InfoNCE and SigLIP: values by hand, gradients, equal texts, bad input."""

import math

import pytest
import torch
import torch.nn.functional as F

from fmclip.losses import info_nce, siglip_loss


def pair_of(count: int = 5, width: int = 4, dtype=torch.double):
    generator = torch.Generator().manual_seed(0)
    return [F.normalize(torch.randn(count, width, generator=generator, dtype=dtype), dim=-1) for _ in range(2)]


def test_info_nce_is_the_mean_of_both_directions():
    image, text = pair_of()
    scale = torch.tensor(7.0, dtype=torch.double)
    logits = (7 * image @ text.T).tolist()
    total = 0.0
    for i in range(5):
        total -= logits[i][i] - math.log(sum(math.exp(one) for one in logits[i]))
        total -= logits[i][i] - math.log(sum(math.exp(row[i]) for row in logits))
    assert info_nce(image, text, scale).item() == pytest.approx(total / 10)


def test_info_nce_equals_open_clips_loss():
    from open_clip.loss import ClipLoss

    image, text = pair_of(dtype=torch.float32)
    scale = torch.tensor(14.3)
    assert info_nce(image, text, scale).item() == pytest.approx(ClipLoss()(image, text, scale).item(), rel=1e-5)


def test_siglip_equals_open_clips_loss():
    from open_clip.loss import SigLipLoss

    image, text = pair_of(dtype=torch.float32)
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
    assert siglip_loss(image, text, scale, bias).item() == pytest.approx(SigLipLoss()(image, text, scale, bias).item())


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_groups_of_one_change_nothing(label_smoothing):
    image, text = pair_of()
    scale = torch.tensor(7.0, dtype=torch.double)
    alone = info_nce(image, text, scale, label_smoothing=label_smoothing)
    assert info_nce(
        image, text, scale, label_smoothing=label_smoothing, groups=torch.arange(5)
    ).item() == pytest.approx(alone.item())


def test_an_equal_text_of_another_image_is_no_negative():
    text = torch.eye(4, dtype=torch.double)[[0, 0, 1, 2]]
    image, scale = text.clone(), torch.tensor(20.0, dtype=torch.double)
    groups = torch.tensor([0, 0, 1, 2])
    # images 1 and 2 share one text: told so, the loss is that of an even split between the two, and no pull apart
    image.requires_grad_()
    loss = info_nce(image, text, scale, groups=groups)
    assert loss.item() == pytest.approx(math.log(2) / 2, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, image)
    assert gradient[:2].abs().max() < 1e-6
    bias = torch.tensor(-10.0, dtype=torch.double)
    assert siglip_loss(image, text, scale, bias, groups=groups) < siglip_loss(image, text, scale, bias) - 4


def test_gradients_are_right():
    image, text = (one.requires_grad_() for one in pair_of(4))
    scale = torch.tensor(3.0, dtype=torch.double, requires_grad=True)
    bias = torch.tensor(-2.0, dtype=torch.double, requires_grad=True)
    groups = torch.tensor([0, 1, 1, 2])
    assert torch.autograd.gradcheck(
        lambda i, t, s: info_nce(i, t, s, label_smoothing=0.1, groups=groups), (image, text, scale)
    )
    assert torch.autograd.gradcheck(lambda i, t, s, b: siglip_loss(i, t, s, b), (image, text, scale, bias))


@pytest.mark.parametrize("shapes", [((3, 4), (2, 4)), ((0, 4), (0, 4)), ((3, 4, 1), (3, 4, 1))])
def test_other_shapes_are_refused(shapes):
    image, text = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match="embeddings"):
        info_nce(image, text, torch.tensor(1.0))
