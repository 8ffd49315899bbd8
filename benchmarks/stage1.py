"""What stage 1 does to detection: every method on a tower before and after learning from image-text pairs.

    python -m benchmarks.retrieval PAIRS.csv --config roco-vit-l-14 --stem roco-mini -o start=mini ... --runs results
    python -m benchmarks.stage1 DATA results/mini-align-0 results/roco-mini-0

DATA is as for `python -m fmclip evaluate`, each RUN a folder that `python -m fmclip pretrain` or
`benchmarks.retrieval --runs` wrote. A tower that several runs start from is measured once. Same draws, same test
scans: differences are paired.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fmclip.contrastive.runs import load_run
from fmclip.detectors import DETECTORS
from fmclip.devices import resolve_device
from fmclip.evaluation import Dataset, Half, Journal, Plan, Run, Skipped, environment, load_datasets, run_plan
from fmclip.evaluation.intervals import compare
from fmclip.evaluation.tables import percent, percent_difference, percent_interval
from fmclip.towers import get_tower

METHODS = ("patch_memory", "fusionmedclip", "zero_shot")
Key = tuple[str, str, str, int]
"""Tower, dataset, method, seed."""


def main() -> None:
    """Measure and write JSON and Markdown."""
    options = _options()
    datasets = load_datasets(options.root, options.dataset)
    journal = Journal(options.resume) if options.resume else None
    befores = {run.name: load_run(run).model.start for run in options.run}
    towers = {label(start): start for start in befores.values() if not start.endswith(":random")}
    towers |= {run.name: str(run) for run in options.run}
    runs: dict[Key, Run] = {}
    skipped: list[Skipped] = []
    for name, tower in towers.items():
        for result in _measure(options, datasets, tower, journal):
            if isinstance(result, Skipped):
                skipped.append(replace(result, tower=name))
                continue
            runs[name, result.row.dataset, result.row.method, result.row.seed] = result
            print(f"{result.row.dataset} {name} {result.row.method}: {result.row.image_auroc:.3f}", flush=True)
    content: dict[str, Any] = {
        "rows": [{**asdict(run.row), "tower": name} for (name, *_), run in runs.items()],
        "skipped": [asdict(one) for one in skipped],
        "started_from": {name: label(start) for name, start in befores.items()},
        "environment": environment(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "stage1-detection.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = _page(content, options, runs)
    (options.out / "stage1-detection.md").write_text(text, encoding="utf-8")
    print(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="DATA")
    parser.add_argument("run", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--dataset", action="append", help="may be repeated; all if left out")
    parser.add_argument("--method", action="append", choices=list(DETECTORS), help=f"{', '.join(METHODS)} if left out")
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--half", default="all", choices=[half.value for half in Half])
    parser.add_argument("--preset", default="full", choices=("fast", "full"))
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--resume", type=Path, metavar="FILE", help="keep each measurement here; go on after those in it"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def label(start: str) -> str:
    """Name a tower without the folders its files lie in."""
    architecture, _, weights = start.partition(":")
    if Path(start).is_dir() or ".json:" in start:
        return Path(start.partition(".json:")[0]).name
    return f"{architecture}:local" if "/" in weights else start


def _measure(
    options: argparse.Namespace, datasets: list[Dataset], name: str, journal: Journal | None
) -> Iterator[Run | Skipped]:
    plan = Plan(
        datasets=datasets,
        methods=options.method or METHODS,
        ks=(options.k,),
        seeds=range(options.seeds),
        preset=options.preset,
        half=Half(options.half),
    )
    return run_plan(plan, get_tower(name, device=resolve_device(options.device)), journal=journal)


def _page(content: dict[str, Any], options: argparse.Namespace, runs: dict[Key, Run]) -> str:
    where, started = content["environment"], content["started_from"]
    words = [f"--dataset {one}" for one in options.dataset or ()] + [f"--method {one}" for one in options.method or ()]
    runs_in = " ".join(f"results/{name}" for name in started)
    words += [f"--k {options.k} --seeds {options.seeds} --half {options.half} --preset {options.preset}"]
    lines = [
        "# Detection before and after stage 1",
        "",
        f"In percent, k = {options.k}, preset {options.preset}, groups: {options.half}, seeds: {options.seeds}; 95 % "
        "interval by bootstrap over scans, differences paired over the same scans.",
        "",
        f"`python -m benchmarks.stage1 DATA {runs_in} {' '.join(words)}`, {where['date']}, {where['cpu']}, "
        f"commit {where['commit']}, code {where['code']}. How each run was trained stands in retrieval-NAME.md.",
        "",
        "| dataset | method | tower | image AUROC | 95 % interval | less the tower before | pixel AUROC |",
        "|---|---|---|---|---|---|---|",
    ]
    order = sorted({(dataset, method) for _, dataset, method, _ in runs})
    for dataset, method in order:
        for tower in dict.fromkeys(name for name, *_ in runs):
            own = [runs[key] for key in runs if key[:3] == (tower, dataset, method)]
            if own:
                before = [runs[key] for key in runs if key[:3] == (started.get(tower), dataset, method)]
                lines.append(_line(dataset, method, tower, own, before, started.get(tower)))
    reasons = dict.fromkeys(f"- {one['tower']}, {one['method']}: {one['reason']}" for one in content["skipped"])
    return "\n".join([*lines, *(["", "Not measured:", "", *reasons] if reasons else [])]) + "\n"


def _line(dataset: str, method: str, tower: str, own: list[Run], before: list[Run], start: str | None) -> str:
    rows = [run.row for run in own]
    image = sum(row.image_auroc for row in rows) / len(rows)
    pixels = [row.pixel_auroc for row in rows if row.pixel_auroc is not None]
    pixel = percent((sum(pixels) / len(pixels), None)) if pixels else "–"
    interval = percent_interval(rows[0].intervals["image_auroc"]) if len(rows) == 1 else "–"
    difference = percent_difference(compare([run.scores for run in own], [run.scores for run in before]))
    name = f"{tower}, from {start}" if start else tower
    return f"| {dataset} | {method} | {name} | {percent((image, None))} | {interval} | {difference} | {pixel} |"


if __name__ == "__main__":
    main()
