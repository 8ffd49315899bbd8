"""A tower that is cut behind its frozen blocks gives the same features and gradients, and runs them only once."""

import pytest
import torch
from tower_models import VISION, make_tower, pixels_for

from fmclip.detectors.pool_features import PoolFeatures
from fmclip.towers import Tower, get_tower
from fmclip.towers.norms import FrozenNorm
from fmclip.towers.prefix import GLANCE, cut_tower


def adapt(tower: Tower, depth: float, dropout: float = 0.0) -> Tower:
    generator = torch.Generator().manual_seed(5)
    adapted = tower.with_lora(4, dropout=dropout, generator=generator, depth=depth)
    with torch.no_grad():
        for weight in adapted.lora_parameters():
            weight.normal_(std=0.1, generator=generator)
    return adapted


def gradients(levels, tower: Tower) -> list[torch.Tensor]:
    sum(level.square().mean() for level in levels if level.requires_grad).backward()
    found = [weight.grad.clone() for weight in tower.lora_parameters() if weight.grad is not None]
    for weight in tower.lora_parameters():
        weight.grad = None
    return found


@pytest.mark.parametrize(("name", "for_patches"), [*((name, False) for name in VISION), ("timm convnext", True)])
def test_features_and_gradients_are_those_of_the_whole_tower(name, for_patches):
    tower = make_tower(VISION[name])[0]
    tower = tower.for_patches() if for_patches else tower
    adapted = adapt(tower, 0.5)
    cut = cut_tower(adapted, len(tower.layers))
    assert cut is not None
    pixels = pixels_for(adapted)
    begun = cut.begin(pixels)
    assert not any(one.requires_grad for one in begun)
    whole, rest = adapted.features(pixels), cut.features(pixels, begun)
    assert [level.requires_grad for level in rest] == [level.requires_grad for level in whole]
    for one, other in zip(rest, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    expected = gradients(whole, adapted)
    assert len(expected) == len(adapted.lora_parameters())
    for one, other in zip(gradients(rest, adapted), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_in_bfloat16_and_with_dropout_too():
    adapted = adapt(get_tower("tiny").with_bf16(True), 0.5, dropout=0.3)
    cut, pixels = cut_tower(adapted, 3), pixels_for(adapted)
    found = []
    for tower in (adapted, cut.rest):
        tower.train_lora(torch.Generator().manual_seed(1))
        found.append(tower.features(pixels) if tower is adapted else cut.features(pixels, cut.begin(pixels)))
        tower.train_lora(None)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_tower_that_is_adapted_from_its_first_block_on_is_not_cut():
    assert cut_tower(adapt(get_tower("tiny"), 1.0), 3) is None


def test_a_cut_that_would_change_the_features_is_not_made(monkeypatch):
    """More may lie between two blocks than the output of the first: here the second adds what it got long before."""
    tower = make_tower(VISION[next(iter(VISION))])[0]
    adapted = adapt(tower, 0.5)
    visual = adapted._visual
    run = type(visual).forward_intermediates

    def with_a_shortcut(self, pixels, **settings):
        seen = []
        first, last = self.transformer.resblocks[0], self.transformer.resblocks[-1]
        hooks = [
            first.register_forward_hook(lambda _module, _args, out: seen.append(out)),
            last.register_forward_pre_hook(lambda _module, args: (args[0] + seen[0], *args[1:])),
        ]
        try:
            return run(self, pixels, **settings)
        finally:
            for hook in hooks:
                hook.remove()

    monkeypatch.setattr(type(visual), "forward_intermediates", with_a_shortcut)
    assert cut_tower(adapted, 3) is None


def test_the_frozen_blocks_see_each_picture_of_the_pool_once(monkeypatch):
    adapted = adapt(get_tower("tiny"), 0.5)
    pool = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    read = PoolFeatures(adapted, pool, 3, keeps=True)
    begin, sizes = type(read._prefix).begin, []
    monkeypatch.setattr(type(read._prefix), "begin", lambda self, some: sizes.append(len(some)) or begin(self, some))
    for rows in ([0, 1, 2], [3, 2, 1], [5, 4, 4], [0, 5, 3]):
        batch = torch.tensor(rows)
        read.prepare(batch)
        for one, other in zip(read(batch), adapted.features(pool[batch]), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert sizes == [3, 1, 2]


def test_where_memory_is_short_nothing_is_kept():
    adapted = adapt(get_tower("tiny"), 0.5)
    pool = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    read = PoolFeatures(adapted, pool, 3, keeps=False)
    batch = torch.tensor([0, 1])
    read.prepare(batch)
    assert read.tower is adapted
    assert torch.equal(read(batch)[-1], adapted.features(pool)[-1])


@pytest.mark.slow
def test_where_a_tap_lies_in_a_frozen_block_the_tower_is_not_cut():
    tower = get_tower("mini").for_patches()
    assert cut_tower(adapt(tower, 0.1), len(tower.layers)) is None


def test_a_stage_that_holds_blocks_and_layers_of_its_own_is_not_taken_for_a_block():
    """RepViT, Swin and MobileCLIP have such stages; the cut goes between their blocks."""
    vision = {"timm_model_name": "repvit_m0_9", "timm_proj": "linear", "timm_pool": "avg", "image_size": 64}
    tower = make_tower(vision)[0]
    adapted = adapt(tower, 0.5)
    cut = cut_tower(adapted, len(tower.layers))
    assert cut is not None
    pixels = pixels_for(adapted)
    for one, other in zip(cut.features(pixels, cut.begin(pixels)), adapted.features(pixels), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("depth", [0.5, 1.0])
def test_training_on_a_cpu_keeps_less_with_the_same_features_and_gradients(depth):
    """With a cut (half of the blocks) and without one (all of them): every norm is a frozen one that keeps nothing."""
    adapted = adapt(make_tower(VISION["timm cnn"])[0], depth)
    levels, pixels = len(adapted.layers), pixels_for(adapted, 3)
    read = PoolFeatures(adapted, pixels, levels, keeps=True)
    assert (read._prefix is None) == (depth == 1.0)
    kinds = [type(module) for module in read.tower._visual.modules() if "Norm" in type(module).__name__]
    assert set(kinds) == {FrozenNorm}
    rows = torch.arange(3)
    read.prepare(rows)
    kept: dict[bool, dict[int, int]] = {False: {}, True: {}}
    found = {}
    for is_lean in (False, True):

        def keep(tensor, is_lean=is_lean):
            kept[is_lean][tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found[is_lean] = read(rows) if is_lean else adapted.features(pixels)
    for one, other in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    for one, other in zip(gradients(found[True], adapted), gradients(found[False], adapted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert sum(kept[True].values()) < 0.9 * sum(kept[False].values())


def test_a_cnn_whose_first_blocks_are_known_looks_at_a_corner_only():
    adapted = adapt(make_tower(VISION["timm cnn"])[0], 0.5)
    cut, pixels = cut_tower(adapted, len(adapted.layers)), pixels_for(adapted)
    seen = []
    stem = next(module for module in cut.rest._runner.visual.modules() if isinstance(module, torch.nn.Conv2d))
    stem.register_forward_pre_hook(lambda _module, args: seen.append(tuple(args[0].shape[2:])))
    cut.features(pixels, cut.begin(pixels))
    assert max(seen[-1]) < 2 * GLANCE < adapted.image_size
