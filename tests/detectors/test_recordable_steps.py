"""A CUDA graph holds no copy from the host and nothing that waits for the device; seen here operation by operation."""

import pytest
import torch
from detector_scans import normal_scan
from torch.utils._python_dispatch import TorchDispatchMode

from fmclip import search
from fmclip.acceleration import Acceleration
from fmclip.detectors import FusionMedCLIP, FusionMedCLIPConfig
from fmclip.detectors.step import TrainingStep
from fmclip.towers import get_tower

WAITS = {
    "_local_scalar_dense",  # .item(), float(), bool()
    "nonzero",
    "masked_select",
    "unique2",
    "_unique2",
    "lift_fresh",  # torch.tensor(...)
}


class Watch(TorchDispatchMode):
    """Notes what a graph could not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        self.seen += 1
        if name in WAITS:
            self.found.add(name)
        if name.startswith("index") and any(one is not None and one.dtype == torch.bool for one in _rows(args)):
            self.found.add("index by a mask")
        return func(*args, **(kwargs or {}))


def _rows(args) -> list:
    return args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else []


@pytest.mark.parametrize("name", ["tiny", "tiny-resnet", pytest.param("mini", marks=pytest.mark.slow)])
def test_after_the_warm_up_forward_and_backward_can_be_recorded(name, monkeypatch):
    from transformers.utils import import_utils

    # transformers looks at its masks, unless a graph is being recorded
    monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
    monkeypatch.setattr(search, "_on_host", lambda _tensor: False)  # as on a GPU
    watches: list[Watch] = []
    taken, add_gradients = {}, TrainingStep._add_gradients

    def watched(self, rows):
        taken[id(self)] = taken.get(id(self), 0) + 1
        if taken[id(self)] == 1:  # constants go over in the warm-up
            return add_gradients(self, rows)
        with Watch() as watch:
            total = add_gradients(self, rows)
        watches.append(watch)
        return total

    monkeypatch.setattr(TrainingStep, "_add_gradients", watched)
    config = FusionMedCLIPConfig(stage2_epochs=3, stage3_epochs=3, pool_size=4, batch_size=4)
    detector = FusionMedCLIP(get_tower(name).with_bf16(True), config)
    detector.acceleration = Acceleration(static_steps=True)
    detector.fit([normal_scan(seed) for seed in range(4)])
    assert len(watches) == 4
    assert all(watch.seen > 100 for watch in watches)
    assert set().union(*(watch.found for watch in watches)) == set()
