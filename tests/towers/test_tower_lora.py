"""LoRA: it reaches every layer, starts at nothing, merges exactly, and never touches the tower it came from."""

import pytest
import torch
from tower_models import VISION, make_tower, pixels_for

from fmclip.errors import TowerError
from fmclip.towers import Tower, get_tower


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def disturb(tower: Tower, seed: int = 5) -> None:
    """Give A and B values, as training would: B starts at zero and hides A."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in tower.lora_parameters():
            parameter.normal_(std=0.1, generator=generator)


@pytest.fixture(scope="module", params=VISION)
def tower(request) -> Tower:
    return make_tower(VISION[request.param])[0]


def test_every_tensor_gets_a_gradient(tower):
    adapted = tower.with_lora(generator=seeded())
    disturb(adapted)
    sum(m.square().mean() for m in adapted.features(pixels_for(adapted))).backward()
    named = dict(zip(adapted.lora_state(), adapted.lora_parameters(), strict=True))
    assert named
    assert [name for name, p in named.items() if p.grad is None or p.grad.abs().sum() == 0] == []


def test_the_base_tower_is_bit_equal_and_shares_its_storage(tower):
    pixels = pixels_for(tower)
    before = [m.clone() for m in tower.features(pixels)]
    frozen = {t.data_ptr() for t in (*tower._visual.parameters(), *tower._visual.buffers()) if t.numel()}
    adapted = tower.with_lora(generator=seeded())
    optimiser = torch.optim.SGD(adapted.lora_parameters(), lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        sum(m.square().mean() for m in adapted.features(pixels)).backward()
        optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(tower.features(pixels), before, strict=True))
    assert tower.lora_parameters() == []
    own = {id(p) for p in adapted.lora_parameters()}
    kept = [p for p in adapted._visual.parameters() if id(p) not in own] + list(adapted._visual.buffers())
    assert {t.data_ptr() for t in kept if t.numel()} == frozen
    assert not any(p.requires_grad for p in kept)


def test_it_starts_equal_to_the_base(tower):
    adapted = tower.with_lora(generator=seeded())
    pixels = pixels_for(tower)
    for ours, plain in zip(adapted.features(pixels), tower.features(pixels), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)  # batch norms are folded into the plain one


def test_merged_equals_unmerged_and_leaves_both_alone(tower):
    pixels = pixels_for(tower)
    base = [m.clone() for m in tower.features(pixels)]
    adapted = tower.with_lora(generator=seeded())
    disturb(adapted)
    expected = [m.detach() for m in adapted.features(pixels)]
    merged = adapted.merged()
    for ours, theirs, plain in zip(merged.features(pixels), expected, base, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(ours, plain, atol=1e-3)  # LoRA did something
    assert merged.lora_parameters() == []
    assert not any("lora" in name for name, _ in merged._visual.named_modules())
    assert all(torch.equal(a, b) for a, b in zip(tower.features(pixels), base, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(adapted.features(pixels), expected, strict=True))
    assert merged.identity == adapted.identity == tower.identity


def test_two_adapted_towers_do_not_see_each_other(tower):
    pixels = pixels_for(tower)
    one, two = tower.with_lora(generator=seeded(1)), tower.with_lora(generator=seeded(2))
    disturb(one, 1)
    before = [m.detach().clone() for m in one.features(pixels)]
    disturb(two, 2)
    two.train_lora(torch.Generator().manual_seed(0))
    sum(m.square().mean() for m in two.features(pixels)).backward()
    assert all(torch.equal(a, b) for a, b in zip(one.features(pixels), before, strict=True))
    assert all(p.grad is None for p in one.lora_parameters())


def test_dropout_works_only_while_training(tower):
    pixels = pixels_for(tower)
    adapted = tower.with_lora(dropout=0.5, generator=seeded())
    disturb(adapted)

    def same() -> bool:
        return all(torch.equal(a, b) for a, b in zip(adapted.features(pixels), adapted.features(pixels), strict=True))

    buffers = {name: b.clone() for name, b in tower._visual.named_buffers()}
    assert same()
    adapted.train_lora(torch.Generator().manual_seed(0))
    assert not same()
    adapted.train_lora(None)
    assert same()
    assert all(torch.equal(b, buffers[name]) for name, b in tower._visual.named_buffers())  # batch norm kept still


def test_the_state_comes_back(tower):
    pixels = pixels_for(tower)
    first, second = tower.with_lora(generator=seeded(1)), tower.with_lora(generator=seeded(2))
    disturb(first)
    second.load_lora_state(first.lora_state())
    assert all(torch.equal(a, b) for a, b in zip(first.features(pixels), second.features(pixels), strict=True))
    assert all(t.device.type == "cpu" and not t.requires_grad for t in first.lora_state().values())


def test_the_state_is_a_copy(tiny_tower):
    adapted = tiny_tower.with_lora(generator=seeded())
    state = adapted.lora_state()
    kept = {name: t.clone() for name, t in state.items()}
    disturb(adapted)
    assert all(torch.equal(state[name], kept[name]) for name in kept)


def test_the_start_comes_from_the_generator_alone(tiny_tower):
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = tiny_tower.with_lora(generator=seeded(3)).lora_state()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = (tiny_tower.with_lora(generator=seeded(s)).lora_state() for s in (3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_queries_keys_values_output_and_both_mlp_layers_are_adapted(tiny_tower):
    state = tiny_tower.with_lora(rank=4, generator=seeded()).lora_state()
    layers = {name.removesuffix(".lora_A").rsplit(".", 1)[-1] for name in state if name.endswith("lora_A")}
    assert layers == {"q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"}
    assert len(state) == 4 * 6 * 2  # blocks x layers x matrices
    assert {min(t.shape) for t in state.values()} == {4}


@pytest.mark.parametrize(("depth", "blocks"), [(1.0, {"0", "1", "2", "3"}), (0.5, {"2", "3"}), (0.1, {"3"})])
def test_depth_adapts_the_last_blocks_only(tiny_tower, depth, blocks):
    adapted = tiny_tower.with_lora(generator=seeded(), depth=depth)
    assert {name.split(".")[2] for name in adapted.lora_state()} == blocks


def test_no_autograd_below_the_first_adapted_block(tiny_tower):
    adapted = tiny_tower.with_lora(generator=seeded(), depth=0.25)
    maps = adapted.features(pixels_for(adapted))  # blocks 2, 3 and 4
    assert [m.requires_grad for m in maps] == [False, False, True]


def test_a_timm_transformer_has_all_its_linears_adapted():
    tower = make_tower(VISION["timm vit"])[0]
    state = tower.with_lora(generator=seeded()).lora_state()
    layers = {name.removesuffix(".lora_A").rsplit(".", 1)[-1] for name in state if name.endswith("lora_A")}
    assert layers == {"qkv", "proj", "fc1", "fc2"}


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"dropout": 1.0}, {"depth": 0.0}, {"depth": 1.5}])
def test_numbers_out_of_range_are_refused(tiny_tower, wrong):
    with pytest.raises(TowerError, match="rank of at least 1"):
        tiny_tower.with_lora(generator=seeded(), **wrong)


def test_lora_on_lora_is_refused(tiny_tower):
    adapted = tiny_tower.with_lora(generator=seeded())
    with pytest.raises(TowerError, match="already"):
        adapted.with_lora(generator=seeded())
    with pytest.raises(TowerError, match="before adding LoRA"):
        adapted.with_layers(["block 1"])


def test_state_of_another_tower_is_refused_and_changes_nothing(tiny_tower):
    adapted = tiny_tower.with_lora(generator=seeded())
    before = adapted.lora_state()
    for tower, rank in ((tiny_tower, 2), (get_tower("tiny-resnet"), 8)):
        other = tower.with_lora(rank=rank, generator=seeded())
        with pytest.raises(TowerError, match="another tower, rank or depth"):
            adapted.load_lora_state(other.lora_state())
    assert all(torch.equal(t, before[name]) for name, t in adapted.lora_state().items())


@pytest.mark.filterwarnings("error")
def test_a_merged_tower_can_be_adapted_again(tiny_tower):
    adapted = tiny_tower.with_lora(generator=seeded())
    disturb(adapted)
    again = adapted.merged().with_lora(generator=seeded())
    pixels = pixels_for(tiny_tower)
    for ours, theirs in zip(again.features(pixels), adapted.features(pixels), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert tiny_tower.merged() is tiny_tower
