"""The GPU benchmark runs from one command, and writes "not measured" where there is nothing to measure on."""

import json

import pytest
import torch

from benchmarks import gpu, roofline
from benchmarks.gpu import NOT_MEASURED, PHASES, main
from benchmarks.roofline import count_flops
from fmclip.acceleration import Acceleration

GIGABYTE = 10**9


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The benchmark takes the CPU for a GPU and asks torch about it; what it asks is noted."""
    asked = []
    answers = {"max_memory_reserved": 3 * GIGABYTE, "max_memory_allocated": 2 * GIGABYTE, "get_device_name": "A GPU"}
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", *answers):
        answer = answers.get(name)
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name, answer=answer: (asked.append(name), answer)[1])
    monkeypatch.setattr(gpu, "_is_gpu", lambda device: True)
    how = Acceleration(on_device=True, static_steps=True, keeps_axes=True)
    monkeypatch.setattr(Acceleration, "of", classmethod(lambda cls, device: how))
    return asked


@pytest.mark.slow
def test_every_phase_is_measured(tmp_path, capsys, as_on_a_gpu):
    main(f"--tower tiny --device cpu --k 4 --batch 4 --repeats 2 --epochs 1 --out {tmp_path}".split())
    content = json.loads((tmp_path / "gpu.json").read_text())
    results = content["results"]
    assert all(results[phase]["seconds"] > 0 for phase in PHASES)
    parts = results["stage 2"]["seconds"] + results["stage 3"]["seconds"]
    assert results["stages 2 and 3"]["seconds"] == pytest.approx(parts)
    for phase in ("stage 2", "stage 3", "query, batched"):
        assert results[phase]["share"] == pytest.approx(
            results[phase]["flops_per_second"] / results["peaks of the device"]["bf16_flops"]
        )
    assert results["stage 3"]["flops"] > results["stage 2"]["flops"]  # the tower forward and backward
    assert results["peak memory"] == 3 * GIGABYTE
    assert results["stage 3"]["peak_allocated_bytes"] == 2 * GIGABYTE
    assert as_on_a_gpu.count("synchronize") > as_on_a_gpu.count("reset_peak_memory_stats") > 5
    table = (tmp_path / "gpu.md").read_text()
    assert capsys.readouterr().out == table
    assert "device: A GPU" in table
    assert "cut short" in table
    assert "(once) |  | " in table
    assert "| peak memory | | 8 GB | 3.0 GB | |" in table
    assert all(f"| {phase} |" in table for phase in PHASES)


def test_flops_are_those_of_the_plain_steps_each_of_them():
    side, steps = 16, 3
    weight, data = torch.randn(side, side, requires_grad=True), torch.randn(8, side)

    def train() -> None:
        for _ in range(steps):
            (data @ weight).square().sum().backward()

    assert count_flops(train) == steps * 2 * (2 * 8 * side * side)  # forward, and backward to the weight


def test_a_peak_is_that_of_the_work_and_not_of_its_launch(monkeypatch):
    """A clock that the work moves on by a second, and waiting for it by ten."""
    now = [0.0]
    monkeypatch.setattr(roofline.time, "perf_counter", lambda: now[0])

    def spend(seconds: float):
        now[0] += seconds

    assert roofline._best_seconds(lambda: spend(1.0), lambda: spend(10.0)) == pytest.approx(1.0 + 10 / roofline.CALLS)


def test_without_a_gpu_nothing_is_made_up(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main(["--out", str(tmp_path)])
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert set(content["results"].values()) == {NOT_MEASURED}
    rows = [line for line in (tmp_path / "gpu.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(PHASES) + 1
    assert all(NOT_MEASURED in row for row in rows)
    assert "| stage 2 | not measured | 2 s |" in (tmp_path / "gpu.md").read_text()
