"""A folded CNN answers the same from fewer layers, follows its weights, and nothing deeper than asked is run."""

import pytest
import torch
from torch import nn
from tower_models import VISION, make_tower, pixels_for

from fmclip.towers.folding import fold_batch_norms
from fmclip.towers.vision import Features


def _shake(model: nn.Module) -> None:
    """Give batch norms statistics as after a training."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(std=0.1, generator=generator)


def _norms(visual: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in visual.modules())


@pytest.fixture(params=["resnet", "timm cnn"])
def tower(request):
    tower, _, _ = make_tower(VISION[request.param])
    _shake(tower.model)
    return tower


@torch.no_grad()
def test_features_and_embeddings_are_those_of_the_plain_tower_without_its_batch_norms(tower):
    pixels = pixels_for(tower)
    plain = Features(tower._visual, tower._places)(tower.normalise(pixels))
    for ours, theirs in zip(tower.features(pixels), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    embedding = nn.functional.normalize(tower._visual(tower.normalise(pixels)), dim=-1)
    torch.testing.assert_close(tower.embed_images(pixels), embedding, rtol=1e-4, atol=1e-5)
    folded = fold_batch_norms(tower._visual, tower.image_size)
    assert _norms(tower._visual) > 0 == _norms(folded)


@torch.no_grad()
def test_a_tower_that_is_trained_further_answers_with_its_new_weights(tower):
    pixels = pixels_for(tower)
    before = tower.features(pixels)
    next(module for module in tower.model.visual.modules() if isinstance(module, nn.Conv2d)).weight.mul_(1.5)
    after = tower.features(pixels)
    plain = Features(tower._visual, tower._places)(tower.normalise(pixels))
    assert not torch.allclose(before[0], after[0], rtol=1e-3)
    torch.testing.assert_close(after[0], plain[0], rtol=1e-4, atol=1e-4)


def test_a_norm_that_reads_a_sum_is_left_alone():
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, pixels):
            return self.norm(self.one(pixels) + pixels).flatten(1)

    visual = Sums().eval()
    assert fold_batch_norms(visual, 8) is visual


def test_an_output_that_is_used_twice_is_not_folded():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, pixels):
            found = self.one(pixels)
            return (self.norm(found) + found).flatten(1)

    visual = Twice().eval()
    _shake(visual)
    assert fold_batch_norms(visual, 8) is visual


def test_only_the_levels_asked_for_are_run(tower):
    pixels = pixels_for(tower)
    ran = []
    for name, module in tower._answering.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _module, _args, _out, name=name: ran.append(name))
    every = tower.features(pixels)
    whole, ran[:] = len(ran), []
    fewer = tower.features(pixels, levels=2)
    assert [len(ran) < whole, len(fewer)] == [True, 2]
    assert all(torch.equal(a, b) for a, b in zip(fewer, every[:2], strict=True))
