"""Extra tokens in the blocks, and embeddings of single patches, for every kind of image tower."""

import pytest
import torch
import torch.nn.functional as F
from tower_models import VISION, make_tower, pixels_for

from fmclip.errors import TowerError

TRANSFORMERS = ["vit", "timm vit"]


def prompts_for(tower, count: int, scale: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [scale * torch.randn(count, width, generator=generator) for width in tower.block_widths]


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_extra_tokens_change_features_and_embedding_but_not_their_shapes_or_the_tower(kind):
    tower, _, _ = make_tower(VISION[kind])
    pixels = pixels_for(tower)
    plain, embedding = tower.features(pixels), tower.embed_images(pixels)
    levels, prompted = tower.features_with_prompts(pixels, prompts_for(tower, 3, 2.0))

    assert [level.shape for level in levels] == [level.shape for level in plain]
    assert not torch.allclose(levels[-1], plain[-1], atol=1e-3)
    assert not torch.allclose(prompted, embedding, atol=1e-3)
    assert torch.allclose(prompted.norm(dim=1), torch.ones(len(pixels)))
    for old, new in zip(plain, tower.features(pixels), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_every_blocks_tokens_get_a_gradient_and_may_differ_between_scans(kind):
    tower, _, _ = make_tower(VISION[kind])
    pixels = pixels_for(tower)
    shared = [one.requires_grad_() for one in prompts_for(tower, 2, 1.0)]
    levels, embedding = tower.features_with_prompts(pixels, shared)
    (levels[-1].square().mean() + embedding[:, 0].sum()).backward()
    assert all(one.grad is not None and one.grad.abs().max() > 0 for one in shared)

    with torch.no_grad():
        own = [torch.stack([one, -one]) for one in shared]
        _, mixed = tower.features_with_prompts(pixels, own)
        assert torch.allclose(mixed[0], embedding[0], atol=1e-5)
        assert not torch.allclose(mixed[1], embedding[1], atol=1e-3)


@pytest.mark.parametrize("kind", ["resnet", "timm cnn"])
def test_extra_tokens_are_refused_by_a_cnn(kind):
    tower, _, _ = make_tower(VISION[kind])
    assert tower.block_widths == ()
    with pytest.raises(TowerError, match="CNN"):
        tower.features_with_prompts(pixels_for(tower), [])


def test_tokens_for_too_few_blocks_are_refused():
    tower, _, _ = make_tower(VISION["vit"])
    with pytest.raises(TowerError, match="4 such blocks"):
        tower.features_with_prompts(pixels_for(tower), prompts_for(tower, 2, 1.0)[:3])


@pytest.mark.parametrize("kind", sorted(VISION))
def test_a_patch_embedding_lies_in_the_space_of_the_texts(kind):
    tower, _, _ = make_tower(VISION[kind])
    patches = tower.embed_patches(pixels_for(tower))
    assert patches.shape[:2] == (2, tower.text_width)
    assert torch.allclose(patches.norm(dim=1), torch.ones_like(patches[:, 0]), atol=1e-5)


def test_a_convolutional_tower_embeds_a_patch_as_if_it_were_the_whole_pooled_picture():
    tower, _, _ = make_tower(VISION["timm cnn"])
    pixels, visual = pixels_for(tower), tower._visual
    corner = visual.trunk.forward_features(tower.normalise(pixels))[:, :, 0, 0]  # before the average over places
    assert torch.allclose(tower.embed_patches(pixels)[:, :, 0, 0], F.normalize(visual.head(corner), dim=1), atol=1e-5)


def test_a_patch_embedding_of_the_last_block_does_not_look_at_other_patches():
    """With the blocks before it taken out, each patch embedding follows from its own pixels alone."""
    tower, original, _ = make_tower(VISION["vit"] | {"layers": 1})
    pixels = pixels_for(tower, 1)
    changed = pixels.clone()
    changed[..., -8:, -8:] = 0
    before, after = tower.embed_patches(pixels), tower.embed_patches(changed)
    assert torch.equal(before[..., :-1, :-1], after[..., :-1, :-1])
    assert not torch.allclose(before[..., -1, -1], after[..., -1, -1], atol=1e-3)

    attention = original.visual.transformer.resblocks[0].attn  # packed weights, by hand
    visual = original.visual
    x = visual._embeds(tower.normalise(pixels))
    block = visual.transformer.resblocks[0]
    width = x.shape[-1]
    value = F.linear(block.ln_1(x), attention.in_proj_weight[2 * width :], attention.in_proj_bias[2 * width :])
    x = x + attention.out_proj(value)
    x = visual.ln_post(x + block.mlp(block.ln_2(x)))[:, 1:] @ visual.proj  # [1, N, D]
    by_hand = F.normalize(x, dim=-1).mT.unflatten(2, before.shape[2:])
    assert torch.allclose(before, by_hand, atol=1e-5)
