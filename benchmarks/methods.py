"""Every method side by side: ours, the rivals and anomalib's, on the same scans, the same tower, the same protocol.

    pip install -e '.[peers]'
    python -m benchmarks.methods ROOT --transformer CONFIG.json:WEIGHTS.safetensors --resume runs.jsonl

ROOT is as for `python -m fmclip evaluate`. All methods that learn from normal scans run on the embedded tower; those
that it cannot serve run on the one given by `--transformer`, beside ours. Methods that can learn from abnormal scans
get as many of them in a pass of their own. What cannot be measured is listed with its reason. Methods that train for
minutes run with one seed. The report half only; no setting was chosen by these tables.

It writes results/methods.json and methods.md, and to results/figures (figures/NAME with another `--name`) the
methods with their intervals, the methods against k where there are several, and the curves of the default method.
Heatmaps would show the scans, which are not ours to pass on: `fmclip evaluate --figures` draws them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.peers import PEERS
from benchmarks.quality import header
from benchmarks.stage1 import label
from fmclip.detectors import DEFAULT_DETECTOR, DETECTORS
from fmclip.errors import FmclipError
from fmclip.evaluation import Dataset, Half, Journal, Plan, Results, Run, Skipped, load_datasets, plots, run_plan
from fmclip.evaluation.tables import by_k, markdown, side_by_side
from fmclip.towers import get_tower
from fmclip.towers.registry import MINI

SLOW = ("madclip", "conrad", "fusionmedclip_published")
"""These train for minutes."""
NAME = "methods"
OURS = (DEFAULT_DETECTOR, "patch_memory")


@dataclass(frozen=True)
class Pass:
    """What is measured with the same seeds and scans to learn from."""

    tower: str
    methods: Sequence[str]
    seeds: int
    k: int
    abnormal_k: int = 0


def main() -> None:
    """Measure and write JSON, Markdown and figures."""
    options = _options()
    DETECTORS.update(PEERS)
    results = Results(json_file=options.out / f"{options.name}.json")
    try:
        datasets = load_datasets(options.root, options.dataset)
        journal = Journal(options.resume) if options.resume else None
        for one in passes(options.transformer, options.seeds, options.k, options.method):
            for result in _measure(one, datasets, journal):
                results.add(result)
                print(_line(result), flush=True)
    except FmclipError as error:
        raise SystemExit(f"Error: {error}") from None
    if not results.runs:
        raise SystemExit("Error: Nothing was measured.")
    figures = options.out / "figures"
    _draw(results.runs, figures if options.name == NAME else figures / options.name)
    text = "\n".join([*header("Methods side by side", _command(options)), markdown(results.runs, results.skipped)])
    (options.out / f"{options.name}.md").write_text(text.rstrip() + "\n", encoding="utf-8")
    print(text)


def passes(transformer: str | None, seeds: int, ks: Sequence[int], only: Sequence[str] | None = None) -> list[Pass]:
    """List what is to be measured, quick things first."""
    chosen = {name: kind for name, kind in DETECTORS.items() if only is None or name in only}
    uses = {name: getattr(kind, "uses_abnormals", "never") for name, kind in chosen.items()}
    mini = get_tower(MINI)
    refused = [name for name, kind in chosen.items() if kind.refusal(mini)]
    towers = {MINI: list(chosen)} | ({transformer: [*OURS, *refused]} if transformer else {})
    found = []
    for k in ks:
        for tower, methods, is_slow in ((*one, is_slow) for one in towers.items() for is_slow in (False, True)):
            own = [name for name in methods if (name in SLOW) == is_slow and name in chosen]
            from_normals = [name for name in own if uses[name] != "required"]
            from_both = [name for name in own if uses[name] != "never"]
            found.append(Pass(tower, from_normals, 1 if is_slow else seeds, k))
            found.append(Pass(tower, from_both, 1 if is_slow else seeds, k, abnormal_k=k))
    return sorted((one for one in found if one.methods), key=lambda one: one.methods[0] in SLOW)


def _measure(one: Pass, datasets: Sequence[Dataset], journal: Journal | None) -> Iterator[Run | Skipped]:
    tower, name = get_tower(one.tower), label(one.tower)
    plan = Plan(
        datasets=datasets,
        methods=one.methods,
        ks=[one.k],
        seeds=range(one.seeds),
        preset="full",
        half=Half.REPORT,
        abnormal_k=one.abnormal_k,
    )
    for result in run_plan(plan, tower, journal=journal):
        if isinstance(result, Skipped):
            yield replace(result, tower=name, reason=result.reason.replace(tower.name, name))
        else:
            yield replace(result, row=replace(result.row, tower=name))


def _draw(runs: Sequence[Run], folder: Path) -> None:
    for compared in side_by_side(runs):
        plots.save_comparison(folder, compared)
    for compared in by_k(runs):
        plots.save_by_k(folder, compared)
    ours: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        if run.row.method == DEFAULT_DETECTOR and run.row.tower == MINI:
            ours.setdefault((run.row.dataset, run.row.k), []).append(run)
    for same in ours.values():
        plots.save_curves(folder, same)


def _line(result: Run | Skipped) -> str:
    if isinstance(result, Skipped):
        return f"{result.dataset} {result.tower} {result.method} seed={result.seed}: {result.reason}"
    row = result.row
    pixels = "" if row.pixel_auroc is None else f", pixel {row.pixel_auroc:.3f}"
    what = f"{row.dataset} {row.tower} {row.method} k={row.k} abnormal={row.abnormal_k} seed={row.seed}"
    return f"{what}: image {row.image_auroc:.3f}{pixels}, fit {row.fit_seconds:.1f} s"


def _command(options: argparse.Namespace) -> str:
    """Word the command that measures the same again, without where files lie on this machine."""
    words = ["python -m benchmarks.methods ROOT", *(f"--dataset {name}" for name in options.dataset or ())]
    words += [f"--method {name}" for name in options.method or ()]
    words += [f"--transformer {label(options.transformer)}"] if options.transformer else []
    words += [f"--name {options.name}"] if options.name != NAME else []
    return " ".join([*words, f"--k {' '.join(map(str, options.k))}", f"--seeds {options.seeds}"])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--dataset", action="append", help="may be repeated; all if left out")
    parser.add_argument("--method", action="append", choices=[*DETECTORS, *PEERS], help="may be repeated")
    parser.add_argument("--transformer", help="a second tower, for the methods that need one")
    parser.add_argument("--k", type=int, nargs="+", default=[16])
    parser.add_argument("--seeds", type=int, default=3, help="of methods that train for minutes one is run")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", default=NAME, help="of the tables, without ending, and of the folder of the figures")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep each run here; go on after those it holds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
