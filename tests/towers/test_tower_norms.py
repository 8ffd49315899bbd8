"""Frozen norms in training: the same numbers and gradients, half of what is kept for the backward pass."""

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from fmclip.towers.norms import FrozenNorm, freeze_norms


def block(norm) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(6, 24, 1), norm, nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.Conv2d(24, 6, 1))
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return made.eval().requires_grad_(False)


def run(module, pixels):
    """Output, gradient of the input and the bytes that were kept, each storage once."""
    kept: dict[int, int] = {}
    pixels = pixels.clone().requires_grad_()

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = module(pixels)
    out.square().sum().backward()
    return out.detach(), pixels.grad, sum(kept.values())


@pytest.mark.parametrize(
    "norm",
    [
        BatchNormAct2d(24, act_layer=nn.ReLU6),
        BatchNormAct2d(24, act_layer=nn.SiLU),
        BatchNormAct2d(24, apply_act=False),
        nn.BatchNorm2d(24),
        nn.BatchNorm2d(24, affine=False),
    ],
    ids=["relu6", "silu", "no activation", "torch", "without weights"],
)
def test_a_frozen_norm_answers_and_hands_back_gradients_as_the_norm_does(norm):
    plain = block(norm)
    frozen = copy.deepcopy(plain)
    freeze_norms(frozen)
    assert isinstance(frozen[1], FrozenNorm)
    pixels = 3 * torch.randn(2, 6, 16, 16)
    (out, gradient, _), (found, other, _) = run(plain, pixels), run(frozen, pixels)
    torch.testing.assert_close(found, out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-4)


def test_half_as_much_is_kept_for_the_backward_pass():
    plain = block(BatchNormAct2d(24, act_layer=nn.ReLU6))
    frozen = copy.deepcopy(plain)
    freeze_norms(frozen)
    pixels = torch.randn(2, 6, 32, 32)
    assert run(frozen, pixels)[2] < 0.55 * run(plain, pixels)[2]


def test_a_norm_that_is_trained_stays():
    training = block(nn.BatchNorm2d(24)).train()
    freeze_norms(training)
    assert isinstance(training[1], nn.BatchNorm2d)
