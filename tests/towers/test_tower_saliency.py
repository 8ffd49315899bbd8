"""Attention rollout and Grad-CAM: against attention and gradients that are computed another way."""

import pytest
import torch
import torch.nn.functional as F
from tower_models import VISION, make_tower, pixels_for

from fmclip.errors import TowerError
from fmclip.towers.saliency import attention_rollout, grad_cam

SIDES = {"vit": 8, "timm vit": 10, "resnet": 2, "timm cnn": 5, "timm convnext": 5}


def test_rollout_of_a_vit_follows_the_attention_of_its_layers():
    """The packed attention of the original model says its weights itself."""
    tower, original, _ = make_tower(VISION["vit"])
    weights = []
    for block in original.visual.transformer.resblocks:
        block.attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "need_weights": True}), with_kwargs=True
        )
        block.attn.register_forward_hook(lambda _module, _args, out: weights.append(out[1]))
    pixels = pixels_for(tower)
    with torch.no_grad():
        original.visual(tower.normalise(pixels))
    rollout = torch.eye(65)
    for weight in weights:
        rollout = (weight + torch.eye(65)) / 2 @ rollout
    expected = rollout[:, 0, 1:].reshape(2, 8, 8)
    torch.testing.assert_close(attention_rollout(tower, pixels), expected / expected.sum(dim=(1, 2), keepdim=True))


@pytest.mark.parametrize("kind", ["vit", "timm vit"])
def test_rollout_is_a_share_of_each_patch_and_depends_on_the_picture(kind):
    tower, *_ = make_tower(VISION[kind])
    shares = attention_rollout(tower, pixels_for(tower))
    assert shares.shape[1:] == tower.grids[-1]
    torch.testing.assert_close(shares.sum(dim=(1, 2)), torch.ones(2))
    assert (shares >= 0).all()
    assert not torch.allclose(shares[0], shares[1])


@pytest.mark.parametrize("kind", ["resnet", "timm cnn", "timm convnext"])
def test_a_cnn_has_no_attention_to_show(kind):
    tower, *_ = make_tower(VISION[kind])
    with pytest.raises(TowerError, match=r"a CNN|not known"):
        attention_rollout(tower, pixels_for(tower))


@pytest.mark.parametrize("kind", list(VISION))
def test_grad_cam_lies_on_the_grid_and_changes_with_the_words(kind):
    tower, *_ = make_tower(VISION[kind])
    pixels = pixels_for(tower)
    directions = F.normalize(torch.randn(6, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    cams = torch.stack([grad_cam(tower, pixels, direction) for direction in directions])
    assert cams.shape[2:] == (SIDES[kind], SIDES[kind])
    assert ((cams >= 0) & (cams <= 1)).all()
    assert (cams.amax(dim=(2, 3)) > 0.999).any()
    assert not torch.allclose(cams[0], cams[1])


def test_grad_cam_weighs_the_last_features_by_their_gradients():
    tower, original, _ = make_tower(VISION["timm cnn"])
    pixels, direction = pixels_for(tower, 1), torch.randn(32, generator=torch.Generator().manual_seed(3))
    features = original.visual.trunk.forward_features(tower.normalise(pixels)).requires_grad_()
    embedding = original.visual.head(original.visual.trunk.forward_head(features))
    (F.normalize(embedding, dim=-1) @ direction).sum().backward()
    cam = (features.grad.mean(dim=(2, 3), keepdim=True) * features).sum(dim=1).relu().detach()
    torch.testing.assert_close(grad_cam(tower, pixels, direction), cam / cam.max().clamp_min(1e-12))


def test_looking_leaves_the_tower_as_it_was():
    tower, *_ = make_tower(VISION["vit"])
    pixels = pixels_for(tower)
    before = tower.embed_images(pixels)
    attention_rollout(tower, pixels)
    grad_cam(tower, pixels, torch.ones(32))
    assert torch.equal(tower.embed_images(pixels), before)
    assert not any(block._forward_pre_hooks for block in tower._visual.transformer.resblocks)
    assert not before.requires_grad
