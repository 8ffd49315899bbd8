"""A memory that is too small: smaller steps, then the processor, then words that say what to do."""

import numpy as np
import pytest
import torch
from detectors.detector_scans import normal_scan

from fmclip import shortage
from fmclip.detectors import PatchMemory
from fmclip.errors import FmclipError
from fmclip.learning import Adapter, answer

FULL = "CUDA out of memory. Tried to allocate 20.00 MiB"


@pytest.fixture
def adapter(tiny_tower) -> Adapter:
    return Adapter.of(PatchMemory(tiny_tower).fit([normal_scan(seed) for seed in range(4)]))


def test_answers_that_do_not_fit_together_come_in_halves(adapter, monkeypatch):
    queries = [normal_scan(seed) for seed in range(10, 17)]
    expected = answer(adapter, "tiny", "cpu", queries)
    predict, sizes = PatchMemory.predict, []

    def short(self, scans):
        sizes.append(len(scans))
        if len(scans) > 2:
            raise torch.OutOfMemoryError(FULL)
        return predict(self, scans)

    monkeypatch.setattr(PatchMemory, "predict", short)
    for one, other in zip(expected, answer(adapter, "tiny", "cpu", queries), strict=True):
        np.testing.assert_allclose(other.map, one.map, atol=1e-5)
    assert max(sizes) == 7


def test_one_scan_that_does_not_fit_is_told_in_words(adapter, monkeypatch):
    def full(self, scans):
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(PatchMemory, "predict", full)
    with pytest.raises(FmclipError, match="fewer scans"):
        answer(adapter, "tiny", "cpu", [normal_scan(9)])


def test_a_processor_without_memory_has_nothing_to_fall_back_to(tiny_tower):
    told = []

    def fit(tower):
        raise torch.OutOfMemoryError(FULL)

    with pytest.raises(torch.OutOfMemoryError):
        shortage.fit_where_it_fits(fit, tiny_tower, lambda: tiny_tower, told.append)
    assert told == []


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_host_without_memory_is_not_taken_for_its_graphics_card(tiny_tower, monkeypatch, error):
    monkeypatch.setattr(shortage, "is_on_gpu", lambda tower: True)
    told = []

    def fit(tower):
        raise error

    with pytest.raises(type(error)):
        shortage.fit_where_it_fits(fit, tiny_tower, lambda: tiny_tower, told.append)
    assert told == []


def test_other_errors_of_a_gpu_are_not_taken_for_a_shortage(tiny_tower, monkeypatch):
    monkeypatch.setattr(shortage, "is_on_gpu", lambda tower: True)

    def fit(tower):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        shortage.fit_where_it_fits(fit, tiny_tower, lambda: tiny_tower, lambda event: None)
