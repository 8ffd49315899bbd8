"""How fast a GPU adapts: every phase, its peak memory, and how much of what the device can do it uses.

    python -m benchmarks.gpu                                   # ViT-L/14 with random weights, k = 16, Table A1
    python -m benchmarks.gpu --preset fast --batch 32          # another preset; larger batches, as many scans
    python -m benchmarks.gpu --tower tiny --device cpu --preset fast    # a dry run anywhere

Timing does not depend on weights, nor on what the scans show. Medians of `--repeats` after one warm-up. The roofline
column divides what a phase computes (FLOPs by `torch.utils.flop_counter`, counted in a run of their own) by its time
and by the device's own peak for bfloat16 matrix products, measured here; for phases that move memory rather than
compute, bytes by the measured copy peak. Without a GPU the table is written with "not measured".
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cpu import simulated_scans
from fmclip.acceleration import Acceleration
from fmclip.detectors import FusionMedCLIP, FusionMedCLIPConfig, StageStarted
from fmclip.detectors.base import BATCH, batched_features, to_pixels
from fmclip.detectors.events import ignore
from fmclip.detectors.network import FusionNetwork
from fmclip.detectors.training import synthesise, train_stage2, train_stage3
from fmclip.errors import Stopped
from fmclip.evaluation import environment
from fmclip.memory import ReferenceMemory
from fmclip.towers import Tower, get_tower
from fmclip.views import default_views

NOT_MEASURED = "not measured"
GOALS = {
    "first heatmap": "0.5 s",
    "stage 2": "2 s",
    "stages 2 and 3": "10 s with Table A1, 4 s with `fast`",
    "query, single": "5 ms",
    "query, batched": "1 ms",
    "stage 3": "45 % of the bf16 peak",
    "peak memory": "8 GB",
}
PHASES = (
    "load",
    "first heatmap",
    "synthesis",
    "stage 2",
    "stage 3",
    "stages 2 and 3",
    "merge",
    "query, single",
    "query, batched",
)
QUERIES = 32
COPY_BYTES, MATMUL_SIDE = 2**28, 4096


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write JSON and a table."""
    options = _options(arguments)
    is_there = options.device != "cuda" or torch.cuda.is_available()
    content: dict[str, Any] = {
        "results": _Bench(options).run() if is_there else dict.fromkeys([*PHASES, "peak memory"], NOT_MEASURED),
        "goals": GOALS,
        "settings": {
            name: getattr(options, name) for name in ("tower", "preset", "k", "batch", "plain", "repeats", "epochs")
        },
        "environment": environment() | {"device": _device_name(options.device) if is_there else NOT_MEASURED},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    table = _table(content)
    (options.out / "gpu.md").write_text(table, encoding="utf-8")
    sys.stdout.write(table)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", default="ViT-L-14:random")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", default="paper", choices=("fast", "full", "paper"))
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8, help="scans in a step; as many scans in all")
    parser.add_argument("--plain", action="store_true", help="the plain float32 loop instead of the fast path")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=0, help="epochs of each stage and a small pool, for a dry run")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args(arguments)


class _Bench:
    """One tower, one set of references; each phase is a call that can be repeated."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        overrides: dict[str, Any] = {"scan_type": "brain MRI", "batch_size": options.batch}
        if options.epochs:
            overrides |= {"stage2_epochs": options.epochs, "pool_size": options.batch}
        self.config = FusionMedCLIPConfig.preset(options.preset, **overrides)
        self.how = Acceleration() if options.plain else Acceleration.of(self.device)
        self.normals = simulated_scans(options.k, seed=0)
        self.queries = simulated_scans(QUERIES, seed=1)
        self.matmul_peak, self.copy_peak = _peaks(self.device)

    def run(self) -> dict[str, Any]:
        """Measure every phase."""
        results: dict[str, Any] = {}
        started = time.perf_counter()
        loaded = get_tower(self.options.tower, device=self.options.device)
        tower = loaded.with_bf16(False) if self.options.plain else loaded
        self._wait()
        results["load"] = {"seconds": time.perf_counter() - started}
        self._forget_peak()

        detector = self._detector(tower)
        pixels, content, _ = to_pixels(self.normals, tower)
        results["first heatmap"] = self._phase(lambda: self._first_heatmap(tower))
        pool = self._pool(tower, pixels, content)
        results["synthesis"] = self._phase(
            lambda: self._pool(tower, pixels, content), moved=2 * pool.pixels.numel() * pool.pixels.element_size()
        )
        views = default_views(tower.grids)
        with torch.no_grad():
            memory = ReferenceMemory.learn(batched_features(tower, pixels), content, views)
        networks: list[FusionNetwork] = []

        def stage2() -> None:
            generator = torch.Generator().manual_seed(1)
            networks[:] = [FusionNetwork(tower, memory.views, self.config, generator)]
            train_stage2(networks[0], tower, memory, pool, self.config, generator, ignore, None, self.how)

        results["stage 2"] = self._phase(stage2, flops=self._training_flops(stage2, "stage2_epochs"))
        if self.config.stage3_epochs and self.options.epochs:
            self.config = replace(self.config, stage3_epochs=self.options.epochs)

        def stage3() -> None:
            generator = torch.Generator().manual_seed(2)
            network = networks[0].with_block_adapters(tower, self.config, generator)
            train_stage3(network, tower, pixels, content, pool, self.config, generator, ignore, None, self.how)

        if self.config.stage3_epochs:
            results["stage 3"] = self._phase(stage3, flops=self._training_flops(stage3, "stage3_epochs"))
        parts = [results[name]["seconds"] for name in ("stage 2", "stage 3") if name in results]
        results["stages 2 and 3"] = {"seconds": sum(parts)}
        adapted = tower.with_lora(self.config.lora_rank, generator=torch.Generator())
        results["merge"] = self._phase(adapted.merged)
        detector.fit(self.normals, on_event=_until_ready)
        results["query, single"] = self._phase(lambda: detector.predict(self.queries[:1]))
        batched = self._phase(lambda: detector.predict(self.queries), flops=self._forward_flops(tower, QUERIES))
        results["query, batched"] = batched | {"seconds": batched["seconds"] / QUERIES, "scans": QUERIES}
        peaks = [result.get("peak_bytes") or 0 for result in results.values()]
        results["peak memory"] = max(peaks) or NOT_MEASURED
        results["peaks of the device"] = {"bf16_flops": self.matmul_peak, "copy_bytes": self.copy_peak}
        return results

    def _detector(self, tower: Tower) -> FusionMedCLIP:
        detector = FusionMedCLIP(tower, self.config)
        detector.acceleration = self.how
        return detector

    def _first_heatmap(self, tower: Tower) -> None:
        detector = self._detector(tower)
        detector.fit(self.normals, on_event=_until_ready)
        detector.predict(self.queries[:1])

    def _pool(self, tower: Tower, pixels: Any, content: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        return synthesise(pixels, content, self.config, generator, ignore, self.how.on_device)

    def _phase(self, call: Callable[[], Any], *, flops: float = 0, moved: float = 0) -> dict[str, Any]:
        """Time a call: median after one warm-up, peak memory, and its share of what the device can do."""
        call()
        self._wait()
        self._forget_peak()
        times = []
        for _ in range(self.options.repeats):
            started = time.perf_counter()
            call()
            self._wait()
            times.append(time.perf_counter() - started)
        seconds = statistics.median(times)
        result: dict[str, Any] = {"seconds": seconds, "all": times}
        if self.device.type == "cuda":
            result["peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
        if flops:
            result |= {"flops_per_second": flops / seconds, "share": flops / seconds / self.matmul_peak}
        if moved:
            result |= {"bytes_per_second": moved / seconds, "share": moved / seconds / self.copy_peak}
        return result

    def _training_flops(self, call: Callable[[], None], epochs: str) -> float:
        """FLOPs of a stage, from plain runs of one and of two epochs: a graph hides its operations."""
        kept, how = self.config, self.how
        self.how = Acceleration(on_device=how.on_device)
        counts = []
        for number in (1, 2):
            self.config = replace(kept, **{epochs: number})
            with _counted() as counter:
                call()
            counts.append(counter.get_total_flops())
        self.config, self.how = kept, how
        return counts[0] + (getattr(kept, epochs) - 1) * (counts[1] - counts[0])

    def _forward_flops(self, tower: Tower, scans: int) -> float:
        pixels = to_pixels(self.queries[:BATCH], tower)[0]
        with _counted() as counter, torch.no_grad():
            tower.features(pixels)
        return counter.get_total_flops() / BATCH * scans

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _forget_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)


def _until_ready(event: Any) -> None:
    """End a fit when its memory is there."""
    if isinstance(event, StageStarted) and event.steps:
        raise Stopped


@contextmanager
def _counted() -> Iterator[FlopCounterMode]:
    with FlopCounterMode(display=False) as counter:
        yield counter


def _peaks(device: torch.device) -> tuple[float, float]:
    """What the device reaches: FLOP/s of a large bfloat16 product, and bytes/s read and written by a copy."""
    side, size = (MATMUL_SIDE, COPY_BYTES) if device.type == "cuda" else (256, 2**22)
    one = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    flops = 2 * side**3 / _best_seconds(lambda: one @ one, device)
    return flops, 2 * size / _best_seconds(lambda: target.copy_(source), device)


def _best_seconds(call: Callable[[], Any], device: torch.device, times: int = 20) -> float:
    best = float("inf")
    for _ in range(times):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def _table(content: dict[str, Any]) -> str:
    settings, where, results = content["settings"], content["environment"], content["results"]
    path = "plain float32 loop" if settings["plain"] else "fast path"
    repeats = f"{settings['repeats']}, cut short" if settings["epochs"] else settings["repeats"]
    lines = [
        "# Speed on a GPU",
        "",
        f"`python -m benchmarks.gpu`, {where['date']}, device: {where['device']}; tower `{settings['tower']}`, preset "
        f"`{settings['preset']}`, k = {settings['k']}, batches of {settings['batch']}, {path}, medians of "
        f"{repeats}; torch {where['torch']}, fmclip {where['fmclip']} ({where['commit']}).",
        "",
        "| phase | time | goal (H100 class) | peak memory | share of the device's peak |",
        "|---|---|---|---|---|",
    ]
    for name in PHASES:
        result = results.get(name, NOT_MEASURED)
        goal = GOALS.get(name, "")
        if not isinstance(result, dict):
            lines.append(f"| {name} | {NOT_MEASURED} | {goal} | {NOT_MEASURED} | {NOT_MEASURED} |")
            continue
        memory = f"{result['peak_bytes'] / 1e9:.1f} GB" if "peak_bytes" in result else ""
        lines.append(f"| {name} | {_shown(result['seconds'])} | {goal} | {memory} | {_share(result)} |")
    peak = results["peak memory"]
    shown = peak if isinstance(peak, str) else f"{peak / 1e9:.1f} GB"
    lines.append(f"| peak memory | | {GOALS['peak memory']} | {shown} | |")
    return "\n".join(lines) + "\n"


def _shown(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"


def _share(result: dict[str, Any]) -> str:
    if "flops_per_second" in result:
        return f"{100 * result['share']:.0f} % ({result['flops_per_second'] / 1e12:.2f} TFLOP/s)"
    if "bytes_per_second" in result:
        return f"{100 * result['share']:.0f} % ({result['bytes_per_second'] / 1e9:.1f} GB/s)"
    return ""


if __name__ == "__main__":
    main()
