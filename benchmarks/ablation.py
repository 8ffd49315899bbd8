"""The rows of the dissertation's Table 8 on real scans: `fusionmedclip_published`, and our default beside it.

    python -m benchmarks.ablation ROOT --tower mini

ROOT is as for `python -m fmclip evaluate`. Rows 3 to 5 train as long as Table A1 has it, on kept features; row 6, whose
end-to-end stage would take hours on a CPU, is the preset `full`: a tenth of the epochs, so that it says nothing about
what it adds to row 5. Rows 1 and 2 ask with hand-written words and need a
tower whose halves were trained together: give one with `--tower`, or they are listed with the reason.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.quality import header
from benchmarks.stage1 import label
from fmclip.detectors import DEFAULT_DETECTOR
from fmclip.errors import FmclipError
from fmclip.evaluation import Dataset, Half, Journal, Plan, Results, Run, Skipped, load_datasets, run_plan
from fmclip.evaluation.tables import markdown
from fmclip.towers import Tower, get_tower

METHOD = "fusionmedclip_published"
ADDS = {
    "row1": "CLIP, manual prompts, pooling",
    "row2": "stage 1",
    "row3": "CoOp",
    "row4": "UMLS",
    "row5": "alignment adapters",
    "full": "LoRA, block adapters",
}
"""What each row adds to the one before, by the preset that is measured for it."""


def main() -> None:
    """Measure and write JSON and Markdown."""
    options = _options()
    results = Results(json_file=options.out / "ablation.json")
    try:
        datasets = load_datasets(options.root, options.dataset)
        tower = get_tower(options.tower)
        journal = Journal(options.resume) if options.resume else None
        for result in measure(datasets, tower, options, journal):
            results.add(result)
            said = result.reason if isinstance(result, Skipped) else f"image {result.row.image_auroc:.3f}"
            print(f"{(result if isinstance(result, Skipped) else result.row).method}: {said}", flush=True)
    except FmclipError as error:
        raise SystemExit(f"Error: {error}") from None
    if not results.runs:
        raise SystemExit("Error: Nothing was measured.")
    command = (
        f"python -m benchmarks.ablation ROOT --tower {label(options.tower)} --k {options.k} --seeds {options.seeds}"
    )
    command += "".join(f" --dataset {name}" for name in options.dataset or ())
    text = "\n".join([*header("Table 8 on real scans", command), markdown(results.runs, results.skipped)])
    (options.out / "ablation.md").write_text(text.rstrip() + "\n", encoding="utf-8")
    print(text)


def measure(
    datasets: Sequence[Dataset], tower: Tower, options: argparse.Namespace, journal: Journal | None
) -> Iterator[Run | Skipped]:
    """Measure the rows one after the other, each under its name, then our default."""
    for number, (preset, added) in enumerate(ADDS.items(), start=1):
        name = f"row {number}, + {added}" if number > 1 else f"row 1, {added}"
        for result in _run(METHOD, preset, datasets, tower, options, journal):
            if isinstance(result, Skipped):
                yield replace(result, method=name)
            else:
                yield replace(result, row=replace(result.row, method=name))
    yield from _run(DEFAULT_DETECTOR, "full", datasets, tower, options, journal)


def _run(
    method: str,
    preset: str,
    datasets: Sequence[Dataset],
    tower: Tower,
    options: argparse.Namespace,
    journal: Journal | None,
) -> Iterator[Run | Skipped]:
    plan = Plan(
        datasets=datasets,
        methods=[method],
        ks=[options.k],
        seeds=range(options.seeds),
        preset=preset,
        half=Half.REPORT,
    )
    return run_plan(plan, tower, journal=journal)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--dataset", action="append", help="may be repeated; all if left out")
    parser.add_argument("--tower", default="mini")
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep each run here; go on after those it holds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
