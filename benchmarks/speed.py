"""How fast: from pressing Adapt to the first heatmap, to the end of each preset, a query, and peak memory.

    python -m benchmarks.speed            # add --page for the start of the page

Runs a visitor's session on simulated scans of 256 pixels (timing does not depend on what they show), on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {
    "first heatmap, s": 5,
    "fast, s": 30,
    "full, s": 120,
    "query, ms": 150,
    "peak memory, MB": 3000,
    "page start, s": 15,
}


def main() -> None:
    """Measure each preset in a process of its own and write JSON and Markdown."""
    options = _options()
    if options.preset:
        print(json.dumps(_measure(options)))
        return
    from fmclip.evaluation import environment

    fast, full = (_in_own_process(options, preset) for preset in ("fast", "full"))
    results = {
        "first heatmap, s": full["first"],
        "fast, s": fast["adapted"],
        "full, s": full["adapted"],
        "query, ms": full["query_ms"],
        "peak memory, MB": max(fast["peak_mb"], full["peak_mb"]),
        "tower load, s": full["load"],
    }
    if options.page:
        results["page start, s"] = _page_start()
    where = {**environment(), "cores_used": options.cores, "k": options.k, "tower": options.tower}
    options.out.mkdir(parents=True, exist_ok=True)
    stem = "speed" if options.tower == "mini" else f"speed-{options.tower.replace(':', '-').replace('/', '-')}"
    content = {"results": results, "limits": LIMITS, "environment": where}
    (options.out / f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    table = _table(results, where)
    (options.out / f"{stem}.md").write_text(table, encoding="utf-8")
    print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", default="mini")
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--page", action="store_true", help="also measure the start of the page")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--preset", choices=("fast", "full"), help=argparse.SUPPRESS)  # a process of its own
    return parser.parse_args()


def _in_own_process(options: argparse.Namespace, preset: str) -> dict[str, float]:
    """Run one preset in a fresh process, so that its memory and its first-time costs are its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.speed",
        "--preset",
        preset,
        "--tower",
        options.tower,
        "--k",
        str(options.k),
    ]
    command += ["--cores", str(options.cores), "--device", options.device]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return json.loads(result.stdout.splitlines()[-1])


def _measure(options: argparse.Namespace) -> dict[str, float]:
    """Adapt a session and query it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    import torch

    from fmclip.session import Adapted, Preview, Session
    from fmclip.towers import get_tower

    torch.set_num_threads(options.cores)
    started = time.perf_counter()
    get_tower(options.tower, device=options.device)  # the page has it loaded before anybody presses Adapt
    load = time.perf_counter() - started
    normals, queries = simulated_scans(options.k, seed=0), simulated_scans(12, seed=1)
    session = Session(options.tower, options.device)
    first = adapted = 0.0
    started = time.perf_counter()
    for event in session.adapt(normals, scan_type="brain MRI", preset=options.preset, preview_queries=queries[:1]):
        if isinstance(event, Preview) and not first:
            first = time.perf_counter() - started
        elif isinstance(event, Adapted):
            adapted = time.perf_counter() - started
    times = []
    for scan in queries:
        started = time.perf_counter()
        session.query([scan])
        times.append(1000 * (time.perf_counter() - started))
    return {
        "load": load,
        "first": first,
        "adapted": adapted,
        "query_ms": statistics.median(times),
        "peak_mb": _peak_bytes() / 1e6,
    }


def simulated_scans(count: int, seed: int) -> list[Any]:
    """Simulate scans: smooth random textures."""
    import cv2
    import numpy as np

    from fmclip.scans import Scan

    generator = np.random.default_rng(seed)
    scans = []
    for number in range(1, count + 1):
        texture = sum(
            cv2.resize(generator.random((size, size), dtype=np.float32), (256, 256), interpolation=cv2.INTER_CUBIC)
            for size in (4, 16, 64)
        )
        scans.append(Scan(np.clip(texture / 3, 0, 1), f"scan {number}"))
    return scans


def _peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes


def _page_start() -> float:
    """Seconds from starting `app.py` until it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port)}
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "app.py"], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as page:
        try:
            while time.perf_counter() - started < 120 and page.poll() is None:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10):
                        return time.perf_counter() - started
                except (urllib.error.URLError, ConnectionError, TimeoutError):
                    time.sleep(0.1)
        finally:
            page.terminate()
    raise SystemExit("The page did not start.")


def _table(results: dict[str, float], where: dict[str, Any]) -> str:
    lines = [
        "# Speed",
        "",
        f"`python -m benchmarks.speed`, {where['date']}, {where['machine']}, {where['cores_used']} cores, tower "
        f"`{where['tower']}`, k = {where['k']}, torch {where['torch']}, timm {where['timm']}, open_clip "
        f"{where['open_clip_torch']}, fmclip {where['fmclip']} ({where['commit']}).",
        "",
        "| | measured | limit |",
        "|---|---|---|",
        *(f"| {name} | {_shown(value)} | {LIMITS.get(name, '')} |" for name, value in results.items()),
    ]
    return "\n".join(lines) + "\n"


def _shown(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


if __name__ == "__main__":
    main()
