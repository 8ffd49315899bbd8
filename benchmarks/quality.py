"""How well: every method on scans with known answers, beside the published rows.

    python -m benchmarks.quality ROOT

ROOT is as for `python -m fmclip evaluate`. Settings were chosen on the tuning half of the groups; the report half was
looked at afterwards only. With `--resume FILE` each run is kept there at once, and a broken-off benchmark goes on after
the runs that the same code, settings, data and machine have measured already.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from pathlib import Path

from fmclip.detectors import DETECTORS
from fmclip.devices import resolve_device
from fmclip.errors import FmclipError
from fmclip.evaluation import (
    Half,
    Journal,
    Plan,
    Protocol,
    Results,
    Skipped,
    environment,
    load_datasets,
    run_plan,
)
from fmclip.evaluation.tables import markdown
from fmclip.towers import get_tower

KS = (4, 8, 16, 32)
QUOTED = {
    "brainmri": {"FusionMedCLIP": (93.5, 94.0, 94.8, 95.4), "PatchCore": (70.8, 75.9, 79.5, 81.7)},
    "busi": {"FusionMedCLIP": (88.8, 89.6, 91.5, 92.1), "PatchCore": (81.7, 82.6, 87.6, 88.9)},
}
"""Image AUROC in percent for `KS`, as published (dissertation, Table 6: ViT-L/14 after ROCO, twins not removed)."""
_PLACES = {"root", "out", "name", "resume", "figures"}  # say where files lie, which changes no figure


def main() -> None:
    """Measure and write JSON, Markdown and figures."""
    parser = _parser()
    options = parser.parse_args()
    results = Results(json_file=options.out / f"{options.name}.json", figures=options.figures)
    try:
        datasets = load_datasets(options.root, options.dataset)
        tower = get_tower(options.tower, device=resolve_device(options.device))
        journal = Journal(options.resume) if options.resume else None
    except FmclipError as error:
        raise SystemExit(f"Error: {error}") from None
    plan = Plan(
        datasets=datasets,
        methods=options.method or list(DETECTORS),
        ks=options.k,
        seeds=range(options.seeds),
        preset=options.preset,
        protocol=Protocol(options.protocol),
        abnormal_k=options.abnormal_k,
        examples=options.figures is not None,
    )
    for half in options.half:
        for result in run_plan(replace(plan, half=Half(half)), tower, journal=journal):
            results.add(result)
            if isinstance(result, Skipped):
                print(f"{result.dataset} {half} {result.method} k={result.k} seed={result.seed}: {result.reason}")
            else:
                row = result.row
                pixels = "" if row.pixel_auroc is None else f", pixel {row.pixel_auroc:.3f}"
                text = f"{row.dataset} {row.half} {row.method} k={row.k} seed={row.seed}: image {row.image_auroc:.3f}"
                print(f"{text}{pixels}, fit {row.fit_seconds:.1f} s", flush=True)
    if not results.runs:
        raise SystemExit("Error: Nothing was measured.")
    results.draw()
    table = _page(results, _command(parser, options))
    (options.out / f"{options.name}.md").write_text(table, encoding="utf-8")
    print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--dataset", action="append", help="may be repeated; all if left out")
    parser.add_argument("--method", action="append", choices=list(DETECTORS), help="may be repeated; all if left out")
    parser.add_argument("--tower", default="mini")
    parser.add_argument("--preset", default="full", choices=("fast", "full"))
    parser.add_argument("--protocol", default="unique", choices=[protocol.value for protocol in Protocol])
    parser.add_argument("--half", nargs="+", default=["tuning", "report"], choices=[half.value for half in Half])
    parser.add_argument("--k", nargs="+", type=int, default=list(KS))
    parser.add_argument("--abnormal-k", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", default="quality", help="of the tables, without ending")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw histograms, ROC and heatmaps")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep each run here; go on after those it holds")
    return parser


def _command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """Word the command that measures the same again, without where files lie on this machine."""
    words = ["python", "-m", "benchmarks.quality", "ROOT"]
    for name, value in vars(options).items():
        if name in _PLACES or value == parser.get_default(name):
            continue
        option = f"--{name.replace('_', '-')}"
        if name in ("dataset", "method"):
            words += [word for one in value for word in (option, one)]
        else:
            words += [option, *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def header(title: str, command: str) -> list[str]:
    """Word what the figures of a table mean, and where, when and by which command they were measured."""
    where = environment()
    return [
        f"# {title}",
        "",
        "In percent, mean ± standard deviation over the seeds; 95 % interval of the mean image AUROC by bootstrap over "
        "scans; sensitivity, specificity, F1 and Dice at the calibrated threshold, which no test label went into. "
        "Settings were chosen on the tuning half; the report half was only reported.",
        "",
        f"`{command}`, {where['date']}, {where['cpu'] or where['machine']} with {where['cpu_count']} cores"
        f"{', ' + where['gpu'] if where['gpu'] else ''}, torch {where['torch']}, timm {where['timm']}, open_clip "
        f"{where['open_clip_torch']}, fmclip {where['fmclip']} ({where['commit']}, code {where['code']}).",
        "",
    ]


def _page(results: Results, command: str) -> str:
    """Lay out all tables as Markdown."""
    lines = [*header("Quality", command), markdown(results.runs, results.skipped)]
    from_normals = {run.row.dataset for run in results.runs if run.row.abnormal_k == 0}  # as the quoted figures are
    quoted = [name for name in QUOTED if name in from_normals]
    if quoted:
        lines += [
            "## Quoted, not measured here",
            "",
            "Published image AUROC on the whole datasets, twins included, with another tower (ViT-L/14 after ROCO).",
            "",
            f"| dataset | method | {' | '.join(f'k = {k}' for k in KS)} |",
            "|---" * (len(KS) + 2) + "|",
        ]
        for name in quoted:
            for method, figures in QUOTED[name].items():
                lines.append(f"| {name} | {method} | {' | '.join(map(str, figures))} |")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    main()
