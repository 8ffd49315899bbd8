"""Many visitors at once: do they get the answers they would get alone, how long do they wait, is memory given back.

    python -m benchmarks.load                       # 2 and 10 visitors, then 50 sessions that come and go
    python -m benchmarks.load --visitors 2 --sessions 5 --method patch_memory    # a small run

Visitors share one process and one tower, as on the page, and go through its handlers: upload, adapt, query, leave.
Simulated scans of 256 pixels; timing does not depend on what they show. Writes JSON and Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import resource
import statistics
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.cpu import ROOT

QUERIES = 4


def main() -> None:
    """Run each crowd in this process and write the results."""
    options = _options()
    with contextlib.suppress(AttributeError):
        os.sched_setaffinity(0, set(list(os.sched_getaffinity(0))[: options.cores]))
    os.environ.setdefault("OMP_NUM_THREADS", str(options.cores))
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    with tempfile.TemporaryDirectory(prefix="fmclip-load-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        results = _measure(options, Path(folder))
    from fmclip.evaluation import environment

    where = {**environment(), "cores_used": options.cores, "k": options.k, "tower": options.tower}
    where |= {"method": options.method, "preset": options.preset, "queries": QUERIES}
    options.out.mkdir(parents=True, exist_ok=True)
    content = {"results": results, "environment": where}
    (options.out / "load.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    table = _table(results, where)
    (options.out / "load.md").write_text(table, encoding="utf-8")
    print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", default="mini")
    parser.add_argument("--method", default="fusionmedclip")
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--visitors", type=int, nargs="+", default=[2, 10])
    parser.add_argument("--sessions", type=int, default=50, help="sessions that come and go, for the memory after them")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def _measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    warnings.simplefilter("ignore")  # gradio's toasts have no browser to go to
    page = _page(options)
    alone: dict[int, list[float]] = {}
    results: dict[str, Any] = {"crowds": []}
    for place in range(max(options.visitors)):
        alone[place] = _Visit(page, options, folder, place).run()
    for count in options.visitors:
        crowd = _crowd([_Visit(page, options, folder, place) for place in range(count)], alone)
        print(crowd, file=sys.stderr, flush=True)
        results["crowds"].append(crowd)
    results["memory, MB"] = _memory_of_sessions(page, options, folder)
    return results


def _crowd(visits: list[_Visit], alone: dict[int, list[float]]) -> dict[str, Any]:
    """Let visitors go their ways at the same time; `alone` holds the scores that each got alone."""
    answers: dict[int, list[float]] = {}

    def go(visit: _Visit) -> None:
        answers[visit.place] = visit.run()

    started = time.monotonic()
    threads = [threading.Thread(target=go, args=(visit,)) for visit in visits]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - started
    queries = sorted(1000 * one for visit in visits for one in visit.query_seconds)
    return {
        "visitors": len(visits),
        "same answers as alone": all(answers.get(visit.place) == alone[visit.place] for visit in visits),
        "adaptations a minute": round(60 * len(visits) / seconds, 2),
        "first heatmap, slowest, s": round(max(visit.first_seconds for visit in visits), 2),
        "query p50, ms": round(statistics.median(queries), 1),
        "query p95, ms": round(queries[min(len(queries) - 1, round(0.95 * len(queries)))], 1),
        "peak memory, MB": round(_peak_mb()),
    }


def _page(options: argparse.Namespace) -> Any:
    from fmclip.page.handlers import Handlers
    from fmclip.page.visitors import Visitors
    from fmclip.session import Session

    tower = SimpleNamespace(has_gpu=False, describe=lambda: "")
    return Handlers(Visitors(lambda: Session(options.tower, "cpu"), capacity=64), [], tower)


class _Visit:
    """One visitor's way over the page."""

    def __init__(self, page: Any, options: argparse.Namespace, folder: Path, place: int) -> None:
        self.page, self.options, self.folder, self.place = page, options, folder, place
        self.token = f"{place}-{time.monotonic_ns()}"
        self.query_seconds: list[float] = []
        self.first_seconds = 0.0

    def run(self) -> list[float]:
        """Upload, adapt, query one scan after the other, leave; gives the scores."""
        page, token = self.page, self.token
        visitor = page._visitors.get(token)
        visitor.method = self.options.method
        page.add_references(self._files(0, self.options.k), "middle", "as stored", token)
        started = time.monotonic()
        for _ in page.adapt("brain MRI", self.options.preset, token):
            if visitor.session.is_adapted and not self.first_seconds:
                self.first_seconds = time.monotonic() - started
        for query in range(QUERIES):
            files = self._files(1000 + query, 1)
            begun = time.monotonic()
            for _ in page.add_queries(files, "middle", "as stored", token):
                pass
            self.query_seconds.append(time.monotonic() - begun)
        scores = [finding.score for finding in visitor.findings]
        page._visitors.forget(token)
        assert len(scores) == QUERIES, "every query is answered"
        return scores

    def _files(self, first: int, count: int) -> list[str]:
        import numpy as np
        from PIL import Image

        paths = []
        for seed in range(first, first + count):
            rng = np.random.default_rng(10_000 * self.place + seed)
            rows, columns = np.mgrid[:256, :256] / 256
            disc = (rows - 0.5) ** 2 + (columns - 0.5) ** 2 < 0.2 + 0.01 * rng.random()
            pixels = (255 * np.clip(0.5 * disc + 0.08 * rng.standard_normal((256, 256)), 0, 1)).astype(np.uint8)
            path = self.folder / f"{self.token}-{seed}" / "scan.png"
            path.parent.mkdir()
            Image.fromarray(pixels).save(path)
            paths.append(str(path))
        return paths


def _memory_of_sessions(page: Any, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Resident memory once the tower is warm, and after many more sessions have come and gone."""
    before = _resident_mb()
    quick = argparse.Namespace(**{**vars(options), "method": "patch_memory"})
    for place in range(options.sessions):
        _Visit(page, quick, folder, place).run()
    return {"before": round(before), f"after {options.sessions} sessions": round(_resident_mb())}


def _resident_mb() -> float:
    gc.collect()
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except OSError:
        return _peak_mb()
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _table(results: dict[str, Any], where: dict[str, Any]) -> str:
    """Markdown."""
    names = list(results["crowds"][0])
    lines = [
        "# Load",
        "",
        f"{where['method']}, {where['preset']}, k = {where['k']}, tower {where['tower']}; {where['cores_used']} cores "
        f"of {where['cpu']}, {where['date']}, commit {where['commit']}. `python -m benchmarks.load`",
        "",
        "| " + " | ".join(names) + " |",
        "|" + "---|" * len(names),
    ]
    lines += ["| " + " | ".join(_word(crowd[name]) for name in names) + " |" for crowd in results["crowds"]]
    memory = ", ".join(f"{name}: {value} MB" for name, value in results["memory, MB"].items())
    return "\n".join([*lines, "", f"Memory of the process, {memory}.", ""])


def _word(value: Any) -> str:
    return {True: "yes", False: "NO"}[value] if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
