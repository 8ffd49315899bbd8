"""Image half: the conversion of attention changes nothing, and all towers give levels in one way."""

import copy

import pytest
import torch
from open_clip.transformer import VisionTransformer
from tower_models import VISION, make_tower, pixels_for

from fmclip.errors import TowerError
from fmclip.towers import get_tower
from fmclip.towers.attention import SplitAttention, split_attention
from fmclip.towers.precision import preferred_backend
from fmclip.towers.vision import Features


@pytest.fixture(scope="module", params=VISION)
def built(request):
    return make_tower(VISION[request.param])


def test_image_embeddings_are_those_of_open_clip(built):
    tower, model, _ = built
    pixels = pixels_for(tower)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)
    expected = model.encode_image((pixels - mean) / std, normalize=True)
    torch.testing.assert_close(tower.embed_images(pixels), expected, atol=1e-5, rtol=0)


def test_levels_have_the_stated_shapes(built):
    tower, _, _ = built
    maps = tower.features(pixels_for(tower, 3))
    assert len(maps) == len(tower.layers) == len(tower.widths) == len(tower.grids)
    assert [m.shape for m in maps] == [(3, c, *grid) for c, grid in zip(tower.widths, tower.grids, strict=True)]
    assert all(torch.isfinite(m).all() and m.std() > 0 for m in maps)


def test_levels_are_block_outputs_of_the_unconverted_model(tiny_tower):
    tower, model, _ = make_tower(VISION["vit"])
    pixels = tower.normalise(pixels_for(tower))
    expected = model.visual.forward_intermediates(pixels, indices=[1, 2, 3], intermediates_only=True)
    for ours, theirs in zip(tower.features(pixels_for(tower)), expected["image_intermediates"], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("custom", [{}, {"ls_init_value": 0.1}, {"pool_type": "avg", "no_ln_pre": True}])
def test_split_attention_changes_nothing(custom):
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 3, "heads": 6, "mlp_ratio": 4.0, "output_dim": 8}
    visual = VisionTransformer(**sizes, **custom).eval()
    for block in visual.transformer.resblocks:  # biases start at zero in open_clip
        torch.nn.init.normal_(block.attn.in_proj_bias)
        torch.nn.init.normal_(block.attn.out_proj.bias)
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        before = visual(pixels)
        assert split_attention(visual) == 3
        torch.testing.assert_close(visual(pixels), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("as_bool", [True, False])
def test_split_attention_honours_a_mask(as_bool):
    packed = torch.nn.MultiheadAttention(16, 4, batch_first=True).eval()
    split = SplitAttention.from_packed(copy.deepcopy(packed))
    x = torch.rand(2, 5, 16)
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)  # True: may not look there, in the packed layer
    added = torch.zeros(5, 5).masked_fill(later, float("-inf"))
    expected = packed(x, x, x, attn_mask=added, need_weights=False)[0]
    ours = split(x, x, x, attn_mask=~later if as_bool else added)[0]
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_transformer_levels_are_at_half_three_quarters_and_full_depth():
    tower, _, _ = make_tower(VISION["vit"] | {"layers": 8})
    assert tower.kind == "transformer"
    assert tower.layers == ("block 4", "block 6", "block 8")


@pytest.mark.parametrize("vision", ["resnet", "timm cnn"])
def test_cnn_levels_are_at_strides_8_16_32(vision):
    tower, _, _ = make_tower(VISION[vision])
    assert tower.kind == "cnn"
    assert tower.layers == ("stride 8", "stride 16", "stride 32")
    assert [grid[0] for grid in tower.grids] == [tower.image_size // stride for stride in (8, 16, 32)]


@pytest.mark.parametrize(("vision", "layers"), [("vit", ["block 1", "block 2"]), ("resnet", ["stride 4", "stride 16"])])
def test_other_layers_can_be_chosen(vision, layers):
    tower, _, _ = make_tower(VISION[vision])
    chosen = tower.with_layers(layers)
    pixels = pixels_for(tower)
    assert chosen.layers == tuple(layers)
    assert [m.shape[2:] for m in chosen.features(pixels)] == list(chosen.grids)
    assert chosen.identity == tower.identity
    assert len(tower.layers) == 3  # the first tower keeps its own
    adapted = chosen.with_lora(generator=torch.Generator().manual_seed(0))
    assert gradients_reach_all(adapted)


def gradients_reach_all(tower):
    for parameter in tower.lora_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    sum(m.square().mean() for m in tower.features(pixels_for(tower))).backward()
    return all(p.grad is not None and p.grad.abs().sum() > 0 for p in tower.lora_parameters())


def test_unknown_layers_are_refused(tiny_tower):
    with pytest.raises(TowerError, match=r"block 99.*this tower has block 1, block 2, block 3, block 4"):
        tiny_tower.with_layers(["block 99"])


def test_wrong_pixels_are_refused(tiny_tower):
    with pytest.raises(TowerError, match=r"\[B, 3, 64, 64\]"):
        tiny_tower.features(torch.rand(1, 3, 32, 32))


def test_non_square_input_is_refused():
    with pytest.raises(TowerError, match="64 x 32"):
        make_tower(VISION["vit"] | {"image_size": (64, 32)})


def test_a_tower_is_frozen(tiny_tower):
    pixels = pixels_for(tiny_tower).requires_grad_(False)
    assert tiny_tower.lora_parameters() == []
    assert not any(m.requires_grad for m in tiny_tower.features(pixels))


def test_random_towers_do_not_depend_on_the_global_state_or_touch_it():
    from fmclip.towers.openclip import load_random

    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = load_random("tiny-resnet")
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert load_random("tiny-resnet").identity == first.identity


def test_identity_tells_towers_apart(tiny_tower):
    one, _, _ = make_tower(VISION["vit"])
    two, _, _ = make_tower(VISION["vit"])
    changed, _, _ = make_tower(VISION["vit"])
    with torch.no_grad():
        changed._model.visual.proj[0, 0] += 1e-3
    assert one.identity == two.identity
    assert len({one.identity, changed.identity, tiny_tower.identity}) == 3
    assert get_tower("tiny").identity == tiny_tower.identity


@pytest.mark.parametrize("name", ["tiny", "tiny-resnet"])
def test_bfloat16_rounds_the_features_alone_and_leaves_the_shared_weights(name):
    tower = get_tower(name)
    pixels = torch.rand(2, 3, tower.image_size, tower.image_size, generator=torch.Generator().manual_seed(0))
    weights = {key: value.clone() for key, value in tower.model.state_dict().items()}
    half = tower.with_bf16(True)
    exact, rounded = tower.features(pixels), half.features(pixels)
    for one, other in zip(exact, rounded, strict=True):
        assert other.dtype == torch.float32
        assert 0 < (one - other).norm() < 0.02 * one.norm()
    assert torch.equal(half.embed_images(pixels), tower.embed_images(pixels))
    assert half.identity == tower.identity
    assert all(torch.equal(value, weights[key]) for key, value in tower.model.state_dict().items())
    assert all(torch.equal(*pair) for pair in zip(half.with_bf16(False).features(pixels), exact, strict=True))
    assert not tower.uses_bf16  # a CPU does not prefer it


@pytest.mark.parametrize("name", ["tiny", "timm convnext"])
def test_a_compiled_tower_gives_the_same_features(name):
    tower = get_tower("tiny") if name == "tiny" else make_tower(VISION[name])[0].for_patches()
    pixels = torch.rand(2, 3, tower.image_size, tower.image_size, generator=torch.Generator().manual_seed(0))
    compiled = tower.compiled(backend="eager")
    for _ in range(2):
        for one, other in zip(tower.features(pixels), compiled.features(pixels), strict=True):
            torch.testing.assert_close(one, other)


@torch.no_grad()
def test_a_transformer_is_compiled_in_one_piece():
    tower = get_tower("tiny")
    places = [level.place for level in tower._levels]
    whole = torch.compile(Features(tower.model.visual, places), backend="eager", fullgraph=True)
    pixels = torch.rand(1, 3, tower.image_size, tower.image_size)
    for one, other in zip(whole(tower.normalise(pixels)), tower.features(pixels), strict=True):
        torch.testing.assert_close(one, other)


def test_compiling_is_a_switch_for_a_gpu(monkeypatch):
    assert [preferred_backend(torch.device(name)) for name in ("cuda", "cpu")] == [None, None]
    monkeypatch.setenv("FMCLIP_COMPILE", "1")
    assert [preferred_backend(torch.device(name)) for name in ("cuda", "cpu")] == ["inductor", None]
