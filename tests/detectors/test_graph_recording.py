"""A recorded step is the step: taped and replayed on a CPU, it trains as the plain loop does, dropout included."""

import contextlib
import logging

import pytest
import torch
from detector_scans import normal_scan
from recorded_on_cpu import Graph, record_on_cpu

from fmclip.acceleration import Acceleration
from fmclip.detectors import FusionMedCLIP, FusionMedCLIPConfig, step
from fmclip.detectors.step import TrainingStep
from fmclip.devices import tf32
from fmclip.towers import get_tower

NORMALS = [normal_scan(seed) for seed in range(4)]


@pytest.fixture
def graphs(monkeypatch) -> list[Graph]:
    return record_on_cpu(monkeypatch)


def fitted(is_static: bool, **settings) -> FusionMedCLIP:
    config = FusionMedCLIPConfig(stage2_epochs=6, pool_size=12, batch_size=4, lora_lr=1e-3, **settings)
    detector = FusionMedCLIP(get_tower("tiny"), config)
    detector.acceleration = Acceleration(static_steps=is_static)
    return detector.fit(NORMALS)


@pytest.mark.parametrize("depth", [1.0, 0.5])
def test_a_recorded_training_is_the_plain_one(graphs, depth, caplog):
    """28 steps of stage 3 look at the references twice, and see each picture of the pool many times."""
    settings = {"stage3_epochs": 28, "lora_depth": depth}
    with caplog.at_level(logging.WARNING):
        recorded, plain = fitted(True, **settings), fitted(False, **settings)
    assert not caplog.records
    assert [graph.replays for graph in graphs] == [6, 28]
    state = recorded.state()
    for name, value in plain.state().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-6, msg=name)
    assert any(float(value.abs().max()) > 1e-3 for name, value in state.items() if name.endswith("lora_B"))


def test_parts_of_a_batch_are_recorded_as_one_step(graphs):
    weight = torch.nn.Parameter(torch.ones(3))
    data = torch.arange(30.0).view(10, 3) / 30

    def losses(is_static: bool) -> list[float]:
        with torch.no_grad():
            weight.fill_(1)
        optimiser = torch.optim.AdamW([weight], lr=0.1, fused=True)
        take = TrainingStep(
            lambda rows, doubled: ((data[rows] * doubled).sum(dim=1) ** 2).mean(),
            optimiser,
            weight.device,
            is_static=is_static,
            parts=3,
            shared=lambda: 2 * weight,
        )
        return [float(take(rows)) for rows in torch.arange(10).repeat(2).view(4, 5)]

    assert losses(True) == pytest.approx(losses(False), abs=1e-6)
    assert len(graphs) == 1


def test_what_the_host_has_to_wait_for_is_not_recorded_and_training_goes_on_as_if_nothing_had_been_tried(
    graphs, monkeypatch, caplog
):
    """The recording breaks off; weights, moments and draws are those from before it, and later ones are drawn."""
    kept = []
    monkeypatch.setattr(step, "_set_states", lambda generators, states: kept.append((generators, states)) or undo())

    def undo():
        generators, states = kept[-1]
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state.get_state())

    def losses(is_static: bool) -> list[float]:
        weight, noise = torch.nn.Parameter(torch.ones(3)), torch.Generator().manual_seed(5)
        optimiser = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.01, fused=True)

        def loss(rows, _):
            scale = float(rows[0])  # waits for the device
            return (weight * torch.rand(3, generator=noise) * scale).square().sum()

        take = TrainingStep(
            loss, optimiser, weight.device, is_static=is_static, generators=[noise], shared=lambda: weight
        )
        return [float(take(torch.tensor([number]))) for number in (1, 2, 3)]

    with caplog.at_level(logging.WARNING):
        assert losses(True) == losses(False)
    assert "runs without" in caplog.text
    assert len(graphs) == 1
    assert graphs[0].replays == 0
    assert [len(generators) for generators, _ in kept] == [1, 2]  # the warm-up's draws; then torch's own one too


def test_a_recording_is_made_with_tf32_and_nothing_else_is(graphs):
    seen = []
    weight = torch.nn.Parameter(torch.ones(3))

    def loss(rows, _):
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return (weight * rows).sum()

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    optimiser = torch.optim.AdamW([weight], lr=0.1, fused=True)
    take = TrainingStep(loss, optimiser, weight.device, is_static=True, shared=lambda: weight)
    take(torch.arange(3))
    assert set(seen) == {(True, True)}
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


def test_precision_is_put_back_when_something_goes_wrong():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    for on in (False, True):
        with contextlib.suppress(KeyError), tf32(on):
            seen = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
            raise KeyError
        assert seen == (on, on)
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


def test_activations_that_are_computed_twice_are_not_recorded(graphs):
    config = FusionMedCLIPConfig(stage2_epochs=1, stage3_epochs=2, pool_size=4, batch_size=4)
    detector = FusionMedCLIP(get_tower("tiny"), config)
    detector.acceleration = Acceleration(static_steps=True, parts=4, checkpointing=True)
    detector.fit(NORMALS)
    assert len(graphs) == 1  # stage 2
