"""The GPU benchmark runs from one command, and writes "not measured" where there is nothing to measure on."""

import json

import pytest
import torch

from benchmarks.gpu import NOT_MEASURED, PHASES, main


@pytest.mark.slow
def test_every_phase_is_measured_anywhere(tmp_path, capsys):
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
    assert results["stage 3"]["share"] > 0
    assert results["peak memory"] == NOT_MEASURED  # a CPU does not tell
    table = (tmp_path / "gpu.md").read_text()
    assert capsys.readouterr().out == table
    assert "cut short" in table
    assert all(f"| {phase} |" in table for phase in PHASES)


def test_without_a_gpu_nothing_is_made_up(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main(["--out", str(tmp_path)])
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert set(content["results"].values()) == {NOT_MEASURED}
    rows = [line for line in (tmp_path / "gpu.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(PHASES) + 1
    assert all(NOT_MEASURED in row for row in rows)
    assert "| stage 2 | not measured | 2 s |" in (tmp_path / "gpu.md").read_text()
