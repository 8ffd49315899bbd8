"""Learn on one data set and ask about another of the same kind (MadCLIP, Table 3), as far as sets are at hand.

    python -m benchmarks.across ROOT

ROOT holds `brainmri` and `busi`, as for `python -m fmclip evaluate`. Two sets of patients of one kind are not at hand;
the example cases beside this folder are a set of their own for two kinds: T1 slices of one healthy head, and simulated
breast ultrasound, both with simulated lesions. Each way is measured: what is learned from one head or from simulated
scans, asked about patients, and the other way round; beside it what is learned from the tested set itself. Of patients
the report half is asked about, and the same scans whatever was learned from. With two folders of one kind
`python -m fmclip evaluate ROOT --fit-on A --dataset B` does the same.

It writes results/across.json and across.md. No setting was chosen by this table; that other settings do no harm to the
example cases was looked at (benchmarks/NOTES.md).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.quality import header
from fmclip.errors import FmclipError
from fmclip.evaluation import Dataset, Half, Journal, Plan, Results, Run, Skipped, load_datasets, run_plan, summarise
from fmclip.evaluation.datasets import Case
from fmclip.evaluation.protocol import split_cases
from fmclip.evaluation.tables import percent, skipped_lines
from fmclip.towers import get_tower

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PAIRS = {"brainmri": "brain_mri_t1", "busi": "simulated_breast_ultrasound"}
METHODS = ("fusionmedclip", "patch_memory", "two_layer", "cosine")


def main() -> None:
    """Measure and write JSON and Markdown."""
    options = _options()
    results = Results(json_file=options.out / "across.json")
    try:
        tower = get_tower("mini")
        journal = Journal(options.resume) if options.resume else None
        examples = example_datasets()
        for real in load_datasets(options.root, list(PAIRS)):
            simulated = examples[PAIRS[real.name]]
            for tested, half in ((real, Half.REPORT), (simulated, Half.ALL)):
                other = simulated if tested is real else real
                for plan in plans(tested, other, half, options.k, range(options.seeds)):
                    for result in run_plan(plan, tower, journal=journal):
                        results.add(result)
                        print(_line(result), flush=True)
    except FmclipError as error:
        raise SystemExit(f"Error: {error}") from None
    if not results.runs:
        raise SystemExit("Error: Nothing was measured.")
    command = f"python -m benchmarks.across ROOT --k {options.k} --seeds {options.seeds}"
    skipped = [f"- {line}" for line in skipped_lines(results.skipped)]
    text = "\n".join([*header("Across data sets", command), *table(results.runs), "", *skipped])
    (options.out / "across.md").write_text(text.rstrip() + "\n", encoding="utf-8")
    print(text)


def plans(tested: Dataset, other: Dataset, half: Half, k: int, seeds: Sequence[int]) -> Iterator[Plan]:
    """What is learned from the tested set, and from the other one, asked about the same scans."""
    for seed in seeds:
        rest = replace(tested, cases=split_cases(tested.cases, k, seed, half=half).test)
        yield Plan([tested], METHODS, [k], [seed], "full", half=half)
        yield Plan([rest], METHODS, [k], [seed], "full", half=half, fit_on=other)


def example_datasets(folder: Path = EXAMPLES) -> dict[str, Dataset]:
    """The example cases as data sets by name: references and queries together, each scan a group of its own."""
    found = {}
    for case in json.loads((folder / "cases.json").read_text(encoding="utf-8"))["cases"]:
        normals = [Case(folder / name, False, (), name) for name in case["normals"]]
        queries = [
            Case(
                folder / query["file"],
                query["truth"] != "normal",
                (folder / query["mask"],) if "mask" in query else (),
                query["file"],
            )
            for query in case["queries"]
        ]
        found[case["name"]] = Dataset(case["name"], (*normals, *queries), case["scan_type"])
    return found


def table(runs: list[Run]) -> list[str]:
    """One row for each tested set, source and method."""
    rows = [
        "| tested on (normal, abnormal) | learned from | method | image AUROC | normal above the threshold | "
        "abnormal above it | pixel AUROC |",
        "|---|---|---|---|---|---|---|",
    ]
    counts = {run.row.dataset: f"{run.row.n_normal}, {run.row.n_abnormal}" for run in runs}
    for own in summarise(runs):
        mean, spread = own.metrics["specificity"]
        values = (own.metrics["image_auroc"], (1 - mean, spread), own.metrics["sensitivity"])
        cells = [percent(one) for one in (*values, own.metrics.get("pixel_auroc"))]
        rows.append(f"| {own.dataset} ({counts[own.dataset]}) | {own.fit_on} | {own.method} | {' | '.join(cells)} |")
    return rows


def _line(result: Run | Skipped) -> str:
    if isinstance(result, Skipped):
        return f"{result.dataset} {result.method} seed={result.seed}: {result.reason}"
    row = result.row
    return f"{row.dataset} from {row.fit_on} {row.method} seed={row.seed}: image {row.image_auroc:.3f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep each run here; go on after those it holds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
