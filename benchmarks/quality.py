"""How well: image and pixel AUROC on scans with known answers, beside the published row.

    python -m benchmarks.quality ROOT

ROOT holds `manifest.csv`, or folders as for `python -m fmclip evaluate`. Settings were chosen on the tuning half of the
groups; the report half was looked at afterwards only. Each run is written at once, so that `--resume` can go on after a
break; without it everything is measured anew.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fmclip.errors import FmclipError
from fmclip.evaluation import (
    Dataset,
    Half,
    Plan,
    Protocol,
    Row,
    Summary,
    environment,
    load_datasets,
    run_plan,
    summarise,
)
from fmclip.evaluation.tables import percent
from fmclip.session import resolve_device
from fmclip.towers import Tower, get_tower

METHODS = ("fusionmedclip", "patch_memory")
KS = (4, 8, 16, 32)
QUOTED = {
    "brainmri": {"FusionMedCLIP": (93.5, 94.0, 94.8, 95.4), "PatchCore": (70.8, 75.9, 79.5, 81.7)},
    "busi": {"FusionMedCLIP": (88.8, 89.6, 91.5, 92.1), "PatchCore": (81.7, 82.6, 87.6, 88.9)},
}
"""Image AUROC in percent for `KS`, as published (dissertation, Table 6: ViT-L/14 after ROCO, twins not removed)."""


def main() -> None:
    """Measure and write JSON and Markdown."""
    options = _options()
    try:
        datasets = load_datasets(options.root, options.dataset)
        tower = get_tower(options.tower, device=resolve_device(options.device))
    except FmclipError as error:
        raise SystemExit(f"Error: {error}") from None
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "quality.json"
    rows = [Row(**row) for row in json.loads(file.read_text())["rows"]] if options.resume and file.exists() else []
    for half in options.half:
        for dataset in datasets:
            for k in options.k:
                _measure(rows, dataset, k, Half(half), tower, options, file)
    table = _page(rows, options)
    (options.out / "quality.md").write_text(table, encoding="utf-8")
    print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--dataset", action="append", help="may be repeated; all if left out")
    parser.add_argument("--tower", default="mini")
    parser.add_argument("--preset", default="full", choices=("fast", "full"))
    parser.add_argument("--protocol", default="unique", choices=[protocol.value for protocol in Protocol])
    parser.add_argument("--half", nargs="+", default=["tuning", "report"], choices=[half.value for half in Half])
    parser.add_argument("--k", nargs="+", type=int, default=list(KS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--resume", action="store_true", help="keep the rows of an earlier, broken-off run")
    return parser.parse_args()


def _measure(
    rows: list[Row], dataset: Dataset, k: int, half: Half, tower: Tower, options: argparse.Namespace, file: Path
) -> None:
    """Add the rows of one dataset, half and k that are not there yet."""
    for seed in range(options.seeds):
        for method in METHODS:
            wanted = (dataset.name, method, tower.name, k, seed, options.protocol, half.value, options.preset)
            if any(_key(row) == wanted for row in rows):
                continue
            plan = Plan([dataset], [method], [k], [seed], options.preset, Protocol(options.protocol), half)
            for row in run_plan(plan, tower, on_skip=print):
                rows.append(row)
                content = {"rows": [asdict(row) for row in rows], "environment": environment()}
                file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
                pixels = "" if row.pixel_auroc is None else f", pixel {row.pixel_auroc:.3f}"
                text = f"{row.dataset} {row.half} {row.method} k={row.k} seed={row.seed}: image {row.image_auroc:.3f}"
                print(f"{text}{pixels}, fit {row.fit_seconds:.1f} s", flush=True)


def _key(row: Row) -> tuple:
    return (row.dataset, row.method, row.tower, row.k, row.seed, row.protocol, row.half, row.preset)


def _page(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """Lay out all tables as Markdown."""
    where = environment()
    command = f"python -m benchmarks.quality ROOT --tower {options.tower} --preset {options.preset}"
    lines = [
        "# Quality",
        "",
        f"AUROC in percent, mean ± standard deviation over the seeds; protocol `{options.protocol}`, preset "
        f"`{options.preset}`, tower `{options.tower}`. Settings were chosen on the tuning half; the report half was "
        "only reported. Rows marked *quoted* are published figures on the whole datasets, twins included, with another "
        "tower.",
        "",
        f"`{command}`, {where['date']}, {where['machine']} with {where['cpu_count']} cores"
        f"{', ' + where['gpu'] if where['gpu'] else ''}, torch {where['torch']}, timm {where['timm']}, open_clip "
        f"{where['open_clip_torch']}, fmclip {where['fmclip']} ({where['commit']}).",
    ]
    summaries = summarise(rows)
    for half in dict.fromkeys(row.half for row in rows):
        for dataset in dict.fromkeys(row.dataset for row in rows):
            own = [summary for summary in summaries if summary.half == half and summary.dataset == dataset]
            if own:
                lines += ["", f"## {dataset}, {'all groups' if half == 'all' else f'{half} half'}", "", *_table(own)]
    return "\n".join(lines) + "\n"


def _table(summaries: Sequence[Summary]) -> list[str]:
    """Make the table of one dataset and half: methods down, k across."""
    ks = sorted({summary.k for summary in summaries})
    lines = [f"| | {' | '.join(f'k = {k}' for k in ks)} |", "|---" * (len(ks) + 1) + "|"]
    for method in dict.fromkeys(summary.method for summary in summaries):
        own = {summary.k: summary for summary in summaries if summary.method == method}
        image = [percent(own[k].image_auroc) if k in own else "–" for k in ks]
        lines.append(f"| {method}, image AUROC | {' | '.join(image)} |")
        if any(summary.pixel_auroc for summary in own.values()):
            pixel = [percent(own[k].pixel_auroc) if k in own else "–" for k in ks]
            lines.append(f"| {method}, pixel AUROC | {' | '.join(pixel)} |")
        seconds = [f"{own[k].fit_seconds:.1f} s, {own[k].ms_per_scan:.0f} ms" if k in own else "–" for k in ks]
        lines.append(f"| {method}, fit and time per scan | {' | '.join(seconds)} |")
    for name, figures in QUOTED.get(summaries[0].dataset, {}).items():
        by_k = dict(zip(KS, figures, strict=True))
        lines.append(f"| {name}, image AUROC, *quoted* | {' | '.join(str(by_k.get(k, '–')) for k in ks)} |")
    return lines


if __name__ == "__main__":
    main()
