"""The levels at which patches are compared: inside a pyramid's stages, where the tower's own list has nothing."""

import threading

import pytest
import timm
import torch
from tower_models import VISION, make_tower, pixels_for

from fmclip.towers import get_tower
from fmclip.towers.ahead import agrees, at_every_place
from fmclip.towers.taps import SKETCH, sketch
from fmclip.towers.vision import share


@pytest.fixture(scope="module")
def convnext():
    return make_tower(VISION["timm convnext"])[0]


def test_a_transformer_compares_patches_at_its_own_levels(tiny_tower):
    assert tiny_tower.for_patches() is tiny_tower


def test_layers_that_were_chosen_are_kept(convnext):
    chosen = convnext.with_layers(["stride 4", "stride 8"])
    assert chosen.for_patches() is chosen


@pytest.mark.parametrize(
    ("vision", "layers"),
    [
        ("timm convnext", ("stride 16, block 1", "stride 16, block 3", "stride 16")),
        ("resnet", ("stride 8", "stride 16", "stride 32 on the grid of stride 16")),  # too few blocks to choose among
    ],
)
def test_a_pyramid_compares_patches_at_several_depths_of_one_scale(vision, layers):
    tower, _, _ = make_tower(VISION[vision])
    own = tower.for_patches()
    assert own.layers == layers
    assert [m.shape[1:] for m in own.features(pixels_for(tower))] == [
        (width, *grid) for width, grid in zip(own.widths, own.grids, strict=True)
    ]
    assert own.identity == tower.identity
    assert tower.layers == ("stride 8", "stride 16", "stride 32")


@torch.no_grad()
def test_taps_give_what_the_blocks_give(convnext):
    outputs = {}
    stage = convnext.model.visual.trunk.stages[2]
    hooks = [
        block.register_forward_hook(lambda _block, _args, out, place=place: outputs.update({place: out}))
        for place, block in enumerate(stage.blocks)
    ]
    pixels = pixels_for(convnext)
    convnext.model.visual(convnext.normalise(pixels))
    for hook in hooks:
        hook.remove()
    first, second, last = convnext.for_patches().features(pixels)
    for ours, place in ((first, 0), (second, 2), (last, len(outputs) - 1)):
        torch.testing.assert_close(ours, outputs[place], rtol=1e-4, atol=1e-5)
    assert len(convnext.for_patches().features(pixels, levels=1)) == 1


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "phase"),
    [
        ("resnet18", 0),  # a second 3 x 3 convolution behind the step
        ("resnet50", 0),
        ("resnet50d", 0),  # a pooled shortcut
        ("mobilenetv2_050", 0),
        ("tf_efficientnet_lite0", 1),
    ],
)
def test_a_level_that_looks_ahead_is_the_next_block_at_every_place(name, phase):
    trunk = timm.create_model(name, pretrained=False).eval()
    generator = torch.Generator().manual_seed(0)
    for module in trunk.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # of a fresh model they do nothing
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    block, channels = {
        "resnet18": (lambda: trunk.layer4[0], 256),
        "resnet50": (lambda: trunk.layer4[0], 1024),
        "resnet50d": (lambda: trunk.layer4[0], 1024),
        "mobilenetv2_050": (lambda: trunk.blocks[5][0], 48),
        "tf_efficientnet_lite0": (lambda: trunk.blocks[5][0], 112),
    }[name]
    features = torch.randn(1, channels, 20, 20, generator=generator)
    coarse, fine = block()(features), at_every_place(share(block()))(features)
    assert fine.shape[2:] == (20, 20)
    shared = fine[:, :, phase::2, phase::2]
    torch.testing.assert_close(shared[:, :, 2:-2, 2:-2], coarse[:, :, 2:-2, 2:-2], rtol=1e-3, atol=1e-3)
    assert agrees(block(), at_every_place(share(block())), channels)


def test_a_block_that_is_another_without_its_step_is_not_asked():
    """A convolution behind the step that is not dilated sees other surroundings."""
    block = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3, 1, 1))
    undilated = share(block)
    undilated[0].stride = (1, 1)
    assert not agrees(block, undilated, 4)
    assert agrees(block, at_every_place(share(block)), 4)


@pytest.mark.slow
@torch.no_grad()
def test_the_embedded_tower_looks_ahead():
    mini = get_tower("mini")
    own = mini.for_patches()
    assert own.looks_ahead
    assert not mini.looks_ahead
    pixels, outputs = pixels_for(mini), []
    hook = mini.model.visual.trunk.blocks[5][0].register_forward_hook(lambda _module, _args, out: outputs.append(out))
    mini.model.visual(mini.normalise(pixels))
    hook.remove()
    shared, coarse = own.features(pixels)[-1][:, :, 1::2, 1::2], outputs[0]  # [B, 208, 7, 7] both
    torch.testing.assert_close(shared[:, :, 1:-1, 1:-1], coarse[:, :, 1:-1, 1:-1], rtol=1e-3, atol=1e-3)


def test_a_stage_is_no_block():
    """Of a stage that holds blocks only the first step would be undone."""
    vision = {"timm_model_name": "fastvit_t8", "timm_proj": "linear", "timm_pool": "avg", "image_size": 64}
    assert not make_tower(vision)[0].for_patches().looks_ahead


def test_lora_leaves_the_block_ahead_alone():
    tower = make_tower(VISION["resnet"])[0].for_patches()
    adapted = tower.with_lora(2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for weight in adapted.lora_parameters():
            weight.add_(0.1)
    pixels = pixels_for(tower)
    for parameter in adapted.lora_parameters():
        parameter.grad = None
    sum(level.sum() for level in adapted.features(pixels, 2)).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapted.lora_parameters())


@pytest.mark.slow
@torch.no_grad()
def test_an_inverted_bottleneck_shows_what_is_inside():
    mini = get_tower("mini")
    own = mini.for_patches()
    ahead = "stride 32 on the grid of stride 16"
    assert own.layers == ("stride 16, block 2", "stride 16, inside block 6", "stride 16", ahead)
    assert own.widths == (88, SKETCH, 120, 208)
    hidden = []
    block = mini.model.visual.trunk.blocks[4][1]
    hook = block.conv_pwl.register_forward_pre_hook(lambda _module, args: hidden.append(args[0]))
    pixels = pixels_for(mini)
    mini.model.visual(mini.normalise(pixels))
    hook.remove()
    assert hidden[0].shape[1] == 720
    torch.testing.assert_close(own.features(pixels)[1], sketch(hidden[0]), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_what_changes_in_a_corner_changes_there_at_every_level(convnext):
    own, pixels = convnext.for_patches(), pixels_for(convnext)[:1]
    changed, size = pixels.clone(), own.image_size
    top, left = size // 8, 5 * size // 8
    changed[..., top : top + size // 8, left : left + size // 8] = (
        1 - changed[..., top : top + size // 8, left : left + size // 8]
    )
    for one, other in zip(own.features(pixels), own.features(changed), strict=True):
        difference = (one - other).norm(dim=1)[0]  # [h, w]
        row, column = divmod(int(difference.argmax()), difference.shape[1])
        middle = difference.shape[0] * 3 / 16, difference.shape[1] * 11 / 16
        assert abs(row + 0.5 - middle[0]) <= 1.5
        assert abs(column + 0.5 - middle[1]) <= 1.5


@torch.no_grad()
def test_visitors_who_share_a_tower_get_their_own_features(convnext):
    own = convnext.for_patches()
    pictures = [torch.full((1, 3, own.image_size, own.image_size), value) for value in (0.1, 0.4, 0.7, 0.9)]
    expected = [own.features(one) for one in pictures]
    found = {}

    def visit(place):
        found[place] = [own.features(pictures[place]) for _ in range(5)]

    visitors = [threading.Thread(target=visit, args=(place,)) for place in range(len(pictures))]
    for one in visitors:
        one.start()
    for one in visitors:
        one.join()
    for place, levels in enumerate(expected):
        assert all(torch.equal(a, b) for answer in found[place] for a, b in zip(answer, levels, strict=True))


def test_lora_reaches_what_is_tapped(convnext):
    adapted = convnext.for_patches().with_lora(generator=torch.Generator().manual_seed(0))
    plain = adapted.features(pixels_for(convnext))
    for parameter in adapted.lora_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    changed = adapted.features(pixels_for(convnext))
    assert not any(torch.allclose(one, other) for one, other in zip(plain, changed, strict=True))
    for ours, theirs in zip(adapted.merged().features(pixels_for(convnext)), changed, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    changed[0].sum().backward()  # the shallowest level alone
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.lora_parameters())


def test_a_sketch_keeps_distances_and_leaves_narrow_features_alone():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 720, 4, 4, generator=generator)
    short = sketch(features)
    assert short.shape == (2, SKETCH, 4, 4)
    ratio = torch.cdist(short.flatten(2).mT, short.flatten(2).mT) / torch.cdist(
        features.flatten(2).mT, features.flatten(2).mT
    )
    off_diagonal = ratio[:, ~torch.eye(16, dtype=torch.bool)]
    torch.testing.assert_close(off_diagonal.mean(), torch.tensor((SKETCH / 720) ** 0.5), rtol=0.05, atol=0)
    assert off_diagonal.std() < 0.15 * off_diagonal.mean()
    assert sketch(features[:, :100]).shape[1] == 100
    torch.testing.assert_close(sketch(torch.ones(1, 720, 2, 2)), torch.zeros(1, SKETCH, 2, 2), atol=1e-3, rtol=0)
