"""Learn on one data set and ask about another of the same kind (MadCLIP, Table 3), as far as sets are at hand.

    python -m benchmarks.across ROOT

ROOT holds `brainmri` and `busi`, as for `python -m fmclip evaluate`. Two sets of patients of one kind are not at hand;
the example cases beside this folder are a set of their own for two kinds: T1 slices of one healthy head, and simulated
breast ultrasound, both with simulated lesions. Each way is measured: what is learned from one head or from simulated
scans, asked about patients, and the other way round; beside it what is learned from the tested set itself. Of patients
the report half is asked about, and the same scans whatever was learned from. With two folders of one kind
`python -m fmclip evaluate ROOT --fit-on A --dataset B` measures the first way, and looks for copies across the two.

It writes results/across.json and across.md. No setting was chosen by this table; that other settings do no harm to the
example cases was looked at (benchmarks/NOTES.md).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import pages
from fmclip.evaluation import Dataset, Half, Journal, Plan, Results, Run, Skipped, load_datasets, run_plan, summarise
from fmclip.evaluation.datasets import Case
from fmclip.evaluation.protocol import split_cases
from fmclip.towers import get_tower

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PAIRS = {"brainmri": "brain_mri_t1", "busi": "simulated_breast_ultrasound"}
METHODS = ("fusionmedclip", "patch_memory", "two_layer", "cosine")


def main() -> None:
    """Measure and write JSON and Markdown."""
    options = pages.parser(__doc__, k=8, seeds=3).parse_args()
    results = Results(json_file=options.out / "across.json")
    pages.collect(results, measure(options), lambda run: f"from {run.row.fit_on}, image {run.row.image_auroc:.3f}")
    command = f"python -m benchmarks.across ROOT --k {options.k} --seeds {options.seeds}"
    pages.write_page(options.out / "across.md", "Across data sets", command, table(results.runs), results.skipped)


def measure(options: argparse.Namespace) -> Iterator[Run | Skipped]:
    """Ask about patients and about example cases, each after both."""
    tower = get_tower("mini")
    journal = Journal(options.resume) if options.resume else None
    examples = example_datasets()
    for real in load_datasets(options.root, list(PAIRS)):
        simulated = examples[PAIRS[real.name]]
        for tested, other, half in ((real, simulated, Half.REPORT), (simulated, real, Half.ALL)):
            for plan in plans(tested, other, half, options.k, range(options.seeds)):
                yield from run_plan(plan, tower, journal=journal)


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
        tested = f"{own.dataset} ({counts[own.dataset]})"
        rows.append(f"| {tested} | {own.fit_on} | {own.method} | {pages.threshold_cells(own)} |")
    return rows


if __name__ == "__main__":
    main()
