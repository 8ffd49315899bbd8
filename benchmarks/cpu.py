"""How fast on two cores: first heatmap, presets, a query, start of the page, memory; anomalib's PatchCore beside us.

    python -m benchmarks.cpu              # --device cuda or --tower ViT-L-14:random for other machines and towers
    pip install -e '.[peers]'             # for the rows with anomalib's PatchCore, on the same tower in the same run

Simulated scans of 256 pixels (timing does not depend on what they show). Medians of five and more, except that
anomalib's fit with leave-one-out scores, which takes a minute, is timed once; every phase, and every repetition of one,
has a process of its own, so that nobody profits from another's warm caches, but for the first heatmap, whose five
visitors come to one process; "again" is a second time in the same process. anomalib's processes are prepared as ours
are (`benchmarks/__init__.py`: threads that wait asleep, one heap). CPU seconds stand beside wall time: on a machine
that does other work too, they are the steadier figure.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fmclip.towers import Tower

ROOT = Path(__file__).resolve().parent.parent
GOALS = {
    "first heatmap, s": 1.5,
    "fast, s": 10,
    "full, s": 60,
    "query: tower alone, ms": 40,
    "query: file to overlay, ms": 120,
    "page start, s": 6,
    "peak memory while adapting, MB": 1500,
}
REPEATS = 5
QUERIES = 100
PEER = "anomalib_patchcore"
BARE = f"{PEER} without scores"
HUNDREDS = {
    "patch_memory": f"patch_memory: fit + {QUERIES} queries, s",
    BARE: f"{PEER}: the same without leave-one-out scores, s",
    PEER: f"{PEER}: the same, s",
}
ONCE = ("first", PEER)  # one process is enough: several visitors in it, or a minute
PHASES = ("first", "fast", "full", *HUNDREDS)


def main() -> None:
    """Measure each phase in a process of its own and write JSON and Markdown."""
    options = _options()
    if options.phase:
        print(json.dumps(_measure(options)))
        return
    from fmclip.evaluation import environment

    load_before = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    runs: dict[str, list[dict[str, float]]] = {phase: [] for phase in PHASES}
    for repeat in range(REPEATS):  # in turn, so that a busy minute does not fall on one phase alone
        for phase in PHASES:
            if repeat == 0 or phase not in ONCE:
                runs[phase].append(_in_own_process(options, phase))
    phases = {phase: _medians(own) for phase, own in runs.items()}
    peaks = [max(run["peak_mb"] for run in pair) for pair in zip(runs["fast"], runs["full"], strict=True)]
    first, fast, full = phases["first"], phases["fast"], phases["full"]
    starts = [_page_start() for _ in range(REPEATS)]
    rows: dict[str, tuple[float, float | None]] = {
        "first heatmap, s": (first["wall"], first["cpu"]),
        "fast, s": (fast["wall"], fast["cpu"]),
        "full, s": (full["wall"], full["cpu"]),
        "query: tower alone, ms": (full["tower_ms"], full["tower_cpu_ms"]),
        "query: file to overlay, ms": (full["query_ms"], full["query_cpu_ms"]),
        "page start, s": (statistics.median(starts), None),
        "peak memory while adapting, MB": (statistics.median(peaks), None),
        "tower load, s": (full["load"], None),
    }
    for phase, row in HUNDREDS.items():
        if not phases[phase]:
            print(f"{phase} was left out: its package is missing", file=sys.stderr)
        else:
            rows[row] = (phases[phase]["wall"], phases[phase]["cpu"])
        if "again" in phases[phase]:
            rows[f"{row} (again)"] = (phases[phase]["again"], phases[phase]["again_cpu"])
    where = {**environment(), "cores_used": options.cores, "k": options.k, "tower": options.tower}
    where["load_before"] = load_before
    where["peaks_mb"] = peaks
    options.out.mkdir(parents=True, exist_ok=True)
    stem = "cpu" if options.tower == "mini" else f"cpu-{options.tower.replace(':', '-').replace('/', '-')}"
    measured = {name: {"wall": wall, "cpu": cpu} for name, (wall, cpu) in rows.items()}
    content = {"results": measured, "goals": GOALS, "environment": where}
    (options.out / f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    table = _table(rows, where)
    (options.out / f"{stem}.md").write_text(table, encoding="utf-8")
    print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", default="mini")
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)  # a process of its own
    return parser.parse_args()


def _in_own_process(options: argparse.Namespace, phase: str) -> dict[str, float]:
    """Run one phase in a fresh process, so that its memory and its first-time costs are its own."""
    command = [sys.executable, "-m", "benchmarks.cpu", "--phase", phase, "--tower", options.tower]
    command += ["--k", str(options.k), "--cores", str(options.cores), "--device", options.device]
    errors = subprocess.DEVNULL if phase in (PEER, BARE) else None  # its progress bars
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT)
    return json.loads(result.stdout.splitlines()[-1])


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Take the median of each figure over runs."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def _measure(options: argparse.Namespace) -> dict[str, float]:
    """Measure one phase in this process."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    import torch

    from fmclip.towers import get_tower

    torch.set_num_threads(options.cores)
    started = time.perf_counter()
    tower = get_tower(options.tower, device=options.device)  # the page has it loaded before anybody presses Adapt
    load = time.perf_counter() - started
    if options.phase == "first":
        return _first_heatmap(options)
    if options.phase in ("fast", "full"):
        return {"load": load, **_adapt(options)}
    return _fit_and_query(options, tower)


def _first_heatmap(options: argparse.Namespace) -> dict[str, float]:
    """From pressing Adapt to the first heatmap, each time by a new visitor with other scans."""
    from fmclip.session import Preview, Session

    clocks = []
    for visitor in range(REPEATS):
        session, clock = Session(options.tower, options.device), _Clock()
        normals, queries = simulated_scans(options.k, seed=2 * visitor), simulated_scans(1, seed=2 * visitor + 1)
        found: tuple[float, float] | None = None
        clock.start()
        for event in session.adapt(normals, scan_type="brain MRI", preset="fast", preview_queries=queries):
            if found is None and isinstance(event, Preview):
                found = clock.stop()
                session.stop()
        assert found is not None, "an adapted session has shown a heatmap"
        clocks.append(found)
    return {"wall": statistics.median(wall for wall, _ in clocks), "cpu": statistics.median(cpu for _, cpu in clocks)}


def _adapt(options: argparse.Namespace) -> dict[str, float]:
    """Adapt a session, then query it."""
    import cv2
    import numpy as np
    import torch

    from fmclip.figures import overlay, save_picture
    from fmclip.scans import read_scan
    from fmclip.session import Adapted, Session
    from fmclip.towers import get_tower

    normals, queries = simulated_scans(options.k, seed=0), simulated_scans(12, seed=1)
    session, clock, adapted = Session(options.tower, options.device), _Clock(), (0.0, 0.0)
    clock.start()
    for event in session.adapt(normals, scan_type="brain MRI", preset=options.phase, preview_queries=queries[:1]):
        if isinstance(event, Adapted):
            adapted = clock.stop()
    peak = _peak_bytes() / 1e6
    tower = get_tower(options.tower, device=options.device).for_patches()  # what a query looks at
    asked, looked = [], []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for scan in queries:
            file = Path(folder) / "scan.png"
            cv2.imwrite(str(file), np.uint8(255 * scan.pixels))
            clock.start()
            (finding,) = session.query([read_scan(file)])
            save_picture(Path(folder) / "overlay.png", overlay(finding.scan, finding.map, finding.threshold))
            asked.append(clock.stop())
            pixels = torch.rand(1, 3, tower.image_size, tower.image_size, device=tower.device)
            clock.start()
            tower.features(pixels)
            looked.append(clock.stop())
    medians = {
        name: 1000 * statistics.median(times)
        for name, times in (
            ("query_ms", [wall for wall, _ in asked]),
            ("query_cpu_ms", [cpu for _, cpu in asked]),
            ("tower_ms", [wall for wall, _ in looked]),
            ("tower_cpu_ms", [cpu for _, cpu in looked]),
        )
    }
    return {"wall": adapted[0], "cpu": adapted[1], "peak_mb": peak, **medians}


def _fit_and_query(options: argparse.Namespace, tower: Tower) -> dict[str, float]:
    """Fit a method, a peer with or without the scores that calibrate it, and map scans; nothing without its package."""
    from benchmarks.peers import PEERS, anomalib_models
    from fmclip.detectors import DETECTORS
    from fmclip.errors import FmclipError

    if options.phase in (PEER, BARE):
        try:
            anomalib_models("patchcore")  # imports are nobody's work on scans
        except FmclipError:
            return {}
    normals, queries = simulated_scans(options.k, seed=0), simulated_scans(QUERIES, seed=1)
    kind = {**DETECTORS, **PEERS}[PEER if options.phase == BARE else options.phase]
    clock, times = _Clock(), []
    for _ in range(1 if options.phase in ONCE else 2):  # the second time memory and kernels are at hand
        detector = kind(tower)
        clock.start()
        detector.fit_uncalibrated(normals) if options.phase == BARE else detector.fit(normals)
        detector.predict(queries)
        times.append(clock.stop())
    clocked = itertools.chain.from_iterable(times)
    return dict(zip(("wall", "cpu", "again", "again_cpu"), clocked, strict=False))


class _Clock:
    """Wall and CPU seconds of this process."""

    def start(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self) -> tuple[float, float]:
        return time.perf_counter() - self._wall, time.process_time() - self._cpu


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


def _table(rows: dict[str, tuple[float, float | None]], where: dict[str, Any]) -> str:
    load = where["load_before"]
    busy = f"; load average {load:.1f} when it began" if load is not None else ""
    lines = [
        "# Two cores",
        "",
        f"`python -m benchmarks.cpu`, {where['date']}, {where['machine']}, {where['cores_used']} cores{busy}, tower "
        f"`{where['tower']}`, k = {where['k']}, torch {where['torch']}, timm {where['timm']}, open_clip "
        f"{where['open_clip_torch']}, fmclip {where['fmclip']} ({where['commit']}).",
        "",
        "| | measured | CPU time | goal |",
        "|---|---|---|---|",
    ]
    for name, (wall, cpu) in rows.items():
        lines.append(f"| {name} | {_shown(wall)} | {'' if cpu is None else _shown(cpu)} | {GOALS.get(name, '')} |")
    peaks = where["peaks_mb"]
    lines += ["", f"Peak memory of single runs: {min(peaks):.0f} to {max(peaks):.0f} MB."]
    return "\n".join(lines) + "\n"


def _shown(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


if __name__ == "__main__":
    main()
