"""How fast a GPU adapts: every phase, its peak memory, and how much of what the device can do it uses.

    python -m benchmarks.gpu                                   # ViT-L/14 with random weights, k = 16, Table A1
    python -m benchmarks.gpu --preset fast --batch 32          # another preset; larger batches, as many scans
    python -m benchmarks.gpu --tower tiny --device cpu --preset fast    # a dry run anywhere

Timing does not depend on weights, nor on what the scans show. Medians of `--repeats` after one warm-up; loading is
timed once. Memory is what torch took from the device, graphs included. The roofline column divides what a phase
computes (`benchmarks.roofline`, every step counted in a run of its own) by its time and by the device's own peak for
bfloat16 matrix products, measured here; for phases that move memory rather than compute, bytes by the measured copy
peak. Without a GPU the table is written with "not measured".
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu import simulated_scans
from benchmarks.roofline import Peaks, count_flops
from fmclip.acceleration import Acceleration
from fmclip.detectors import FusionMedCLIP, FusionMedCLIPConfig, StageStarted
from fmclip.detectors.base import batched_features, to_pixels
from fmclip.detectors.events import ignore
from fmclip.detectors.network import FusionNetwork
from fmclip.detectors.training import synthesise, train_stage2, train_stage3
from fmclip.devices import tf32
from fmclip.errors import Stopped
from fmclip.evaluation import environment
from fmclip.memory import ReferenceMemory
from fmclip.towers import Tower, get_tower
from fmclip.views import tower_views

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
    "adapting, all of it",
    "merge",
    "query, single",
    "query, batched",
)
QUERIES = 32


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write JSON and a table."""
    options = _options(arguments)
    device = torch.device(options.device)
    is_there = device.type != "cuda" or torch.cuda.is_available()
    exact = tf32(False) if options.plain else contextlib.nullcontext()
    with exact:
        results = _Bench(options).run() if is_there else dict.fromkeys([*PHASES, "peak memory"], NOT_MEASURED)
    content: dict[str, Any] = {
        "results": results,
        "goals": GOALS,
        "settings": {
            name: getattr(options, name) for name in ("tower", "preset", "k", "batch", "plain", "repeats", "epochs")
        },
        "environment": environment() | {"device": _device_name(device) if is_there else NOT_MEASURED},
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
        self.config = FusionMedCLIPConfig.preset(options.preset, **overrides)
        if options.epochs:
            stage3 = options.epochs if self.config.stage3_epochs else 0
            cut = {"stage2_epochs": options.epochs, "stage3_epochs": stage3, "pool_size": options.batch}
            self.config = replace(self.config, **cut)
        self.how = Acceleration() if options.plain else Acceleration.of(self.device)
        self.normals = simulated_scans(options.k, seed=0)
        self.queries = simulated_scans(QUERIES, seed=1)
        self.peaks = Peaks.of(self.device, self._wait)

    def run(self) -> dict[str, Any]:
        """Measure every phase."""
        results: dict[str, Any] = {}
        started = time.perf_counter()
        loaded = get_tower(self.options.tower, device=self.options.device)
        tower = (loaded.with_bf16(False) if self.options.plain else loaded).for_patches()
        self._wait()
        results["load"] = {"seconds": time.perf_counter() - started}
        results["first heatmap"] = self._phase(lambda: self._first_heatmap(tower))
        results |= self._stages(tower)
        adapted = tower.with_lora(self.config.lora_rank, generator=torch.Generator())
        results["merge"] = self._phase(adapted.merged)
        detector = self._detector(tower)
        results["adapting, all of it"] = self._phase(lambda: detector.fit(self.normals))
        results["query, single"] = self._phase(lambda: detector.predict(self.queries[:1]))
        batched = self._phase(lambda: detector.predict(self.queries), flops=self._forward_flops(tower, QUERIES))
        results["query, batched"] = batched | {"seconds": batched["seconds"] / QUERIES, "scans": QUERIES}
        results["peak memory"] = results["adapting, all of it"].get("peak_bytes", NOT_MEASURED)
        results["peaks of the device"] = asdict(self.peaks)
        return results

    def _stages(self, tower: Tower) -> dict[str, Any]:
        """Synthesis and both stages, each by itself."""
        results: dict[str, Any] = {}
        pixels, content, _ = to_pixels(self.normals, tower)
        pool = self._pool(tower, pixels, content)
        results["synthesis"] = self._phase(
            lambda: self._pool(tower, pixels, content), moved=2 * pool.pixels.numel() * pool.pixels.element_size()
        )
        views = tower_views(tower)
        with torch.no_grad():
            memory = ReferenceMemory.learn(batched_features(tower, pixels), content, views)
        networks: list[FusionNetwork] = []

        def stage2() -> None:
            generator = torch.Generator().manual_seed(1)
            networks[:] = [FusionNetwork(tower, memory.views, self.config, generator)]
            train_stage2(networks[0], tower, memory, pool, self.config, generator, ignore, None, self.how)

        def stage3() -> None:
            generator = torch.Generator().manual_seed(2)
            network = networks[0].with_block_adapters(tower, self.config, generator)
            train_stage3(network, tower, pixels, content, pool, self.config, generator, ignore, None, self.how)

        results["stage 2"] = self._phase(stage2, flops=self._training_flops(stage2))
        if self.config.stage3_epochs:
            results["stage 3"] = self._phase(stage3, flops=self._training_flops(stage3))
        parts = [results[name]["seconds"] for name in ("stage 2", "stage 3") if name in results]
        return results | {"stages 2 and 3": {"seconds": sum(parts)}}

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
        if _is_gpu(self.device):
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        times = []
        for _ in range(self.options.repeats):
            started = time.perf_counter()
            call()
            self._wait()
            times.append(time.perf_counter() - started)
        seconds = statistics.median(times)
        result: dict[str, Any] = {"seconds": seconds, "all": times}
        if _is_gpu(self.device):
            result["peak_bytes"] = torch.cuda.max_memory_reserved(self.device)  # recorded graphs hold theirs
            result["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(self.device)
        if flops:
            result |= {"flops": flops, "flops_per_second": flops / seconds}
            result["share"] = flops / seconds / self.peaks.bf16_flops
        if moved:
            result |= {"bytes_per_second": moved / seconds, "share": moved / seconds / self.peaks.copy_bytes}
        return result

    def _training_flops(self, call: Callable[[], None]) -> float:
        """FLOPs of a stage, step by step: a graph hides its operations."""
        how, self.how = self.how, replace(self.how, static_steps=False)
        try:
            return count_flops(call)
        finally:
            self.how = how

    def _forward_flops(self, tower: Tower, scans: int) -> float:
        pixels = to_pixels(self.queries[:1], tower)[0]
        with torch.no_grad():
            return count_flops(lambda: tower.features(pixels)) * scans

    def _wait(self) -> None:
        if _is_gpu(self.device):
            torch.cuda.synchronize(self.device)


def _until_ready(event: Any) -> None:
    """End a fit when its memory is there."""
    if isinstance(event, StageStarted) and event.steps:
        raise Stopped


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if _is_gpu(device) else str(device)


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
        once = " (once)" if name == "load" else ""
        lines.append(f"| {name} | {_shown(result['seconds'])}{once} | {goal} | {memory} | {_share(result)} |")
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
