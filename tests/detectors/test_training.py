"""Every part that is said to be trained gets a gradient and moves; nothing else does."""

import pytest
import torch
from detector_scans import normal_scan

from fmclip.detectors import FusionMedCLIPConfig
from fmclip.detectors.base import to_pixels
from fmclip.detectors.events import ignore
from fmclip.detectors.network import FusionNetwork
from fmclip.detectors.training import synthesise, train_stage2, train_stage3
from fmclip.memory import ReferenceMemory
from fmclip.towers import get_tower
from fmclip.views import tower_views


@pytest.fixture(scope="module", params=["tiny", "tiny-resnet"])
def setting(request):
    tower = get_tower(request.param).for_patches()
    config = FusionMedCLIPConfig(scan_type="brain MRI", stage2_epochs=8, stage3_epochs=8, pool_size=16)
    generator = torch.Generator().manual_seed(0)
    pixels, content, _ = to_pixels([normal_scan(seed) for seed in range(4)], tower)
    pool = synthesise(pixels, content, config, generator, ignore)
    views = tower_views(tower)
    memory = ReferenceMemory.learn(tower.features(pixels), content, views)
    return tower, config, generator, pixels, content, pool, memory


def moved(before: dict, after: dict) -> set[str]:
    return {name for name, value in after.items() if name not in before or not torch.equal(before[name], value)}


def test_stage_2_trains_prompts_adapters_and_temperature(setting):
    tower, config, generator, _, _, pool, memory = setting
    network = FusionNetwork(tower, memory.views, config, generator)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    train_stage2(network, tower, memory, pool, config, generator, ignore)
    assert moved(before, network.state_dict()) == set(before)


def test_stage_3_trains_everything_and_gives_every_lora_tensor_a_gradient(setting):
    tower, config, generator, pixels, content, pool, memory = setting
    network = FusionNetwork(tower, memory.views, config, generator).with_block_adapters(tower, config, generator)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    merged = train_stage3(network, tower, pixels, content, pool, config, generator, ignore)
    assert moved(before, network.state_dict()) == set(before)
    ups = {name: value for name, value in network.lora_state.items() if "lora_B" in name}
    assert ups
    reached = [name for name, value in ups.items() if value.abs().max() > 0]
    assert len(reached) >= 0.5 * len(ups)  # layers above the deepest level in use cannot matter
    assert not torch.equal(merged.features(pixels)[-2], tower.features(pixels)[-2])


def test_a_fixed_temperature_stays(setting):
    tower, _, generator, _, _, pool, memory = setting
    config = FusionMedCLIPConfig(learn_temperature=False, stage2_epochs=8, pool_size=16)
    network = FusionNetwork(tower, memory.views, config, generator)
    train_stage2(network, tower, memory, pool, config, generator, ignore)
    assert float(network.log_temperature.exp()) == pytest.approx(0.07)


def test_a_larger_residual_starts_out_more_abnormal(setting):
    tower, config, generator, *_, memory = setting
    network = FusionNetwork(tower, memory.views, config, generator)
    prompts = network.prompts(tower)
    widths = [tower.widths[view.level] for view in network.views]
    sizes = (0.1, 0.5, 1.0, 2.0)
    residuals = [torch.randn(len(sizes), width, 1, 1, generator=generator) for width in widths]
    residuals = [
        torch.stack([size * one / one.norm() for size, one in zip(sizes, view, strict=True)]) for view in residuals
    ]
    for scores in network([], residuals, prompts):
        flat = scores.flatten().tolist()
        assert flat == sorted(flat)
