"""Another scanner, in small: learn from scans as they are, ask about scans with other grey values or sharpness.

    python -m benchmarks.scanner ROOT

ROOT is as for `python -m fmclip evaluate`. Of each data set a changed copy is made, all else alike; the
references, and so the threshold, come from the set as it is, and every test scan from the copy (a reference's twin is
left out there too). A stand-in for learning on one hospital's set and asking about another's, for which two sets
of one kind are needed (`python -m fmclip evaluate --fit-on`). Copies lie in a temporary folder and go with it. No
setting was chosen by this table.

It writes results/scanner.json and scanner.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import cv2
import numpy as np

from benchmarks import pages
from benchmarks.copies import copy_datasets
from benchmarks.stage1 import label
from fmclip.detectors import DETECTORS
from fmclip.evaluation import Dataset, Half, Journal, Plan, Results, Run, Skipped, load_datasets, run_plan, summarise
from fmclip.towers import get_tower

GAMMA = 1.5
NOISE = 0.15
"""Standard deviation of the speckle, as a share of the grey value."""


def main() -> None:
    """Measure and write JSON and Markdown."""
    options = _options()
    results = Results(json_file=options.out / "scanner.json")

    def word(run: Run) -> str:
        return f"image {run.row.image_auroc:.3f}, specificity {run.row.specificity:.2f}"

    pages.collect(results, measure(options), word)
    command = f"python -m benchmarks.scanner ROOT --tower {label(options.tower)} --method {options.method}"
    command += f" --k {options.k} --seeds {options.seeds}"
    command += "".join(f" --dataset {name}" for name in options.dataset or ())
    title, file = "As if from another scanner", options.out / "scanner.md"
    pages.write_page(file, title, command, table(results.runs), results.skipped)


def measure(options: argparse.Namespace) -> Iterator[Run | Skipped]:
    """Ask about each data set as it is, and about its changed copies."""
    tower = get_tower(options.tower)
    journal = Journal(options.resume) if options.resume else None
    for original in load_datasets(options.root, options.dataset):
        for dataset in chain([original], _copies(original)):  # a copy goes when the next comes
            plan = Plan(
                datasets=[dataset],
                methods=[options.method],
                ks=[options.k],
                seeds=range(options.seeds),
                preset="full",
                half=Half.REPORT,
                fit_on=original,
            )
            yield from run_plan(plan, tower, journal=journal)


def darker(image: np.ndarray) -> np.ndarray:
    """Raise grey values to the power of `GAMMA`."""
    return _grey(_unit(image) ** GAMMA)


def brighter(image: np.ndarray) -> np.ndarray:
    """Raise grey values to the power of 1 / `GAMMA`."""
    return _grey(_unit(image) ** (1 / GAMMA))


def flatter(image: np.ndarray) -> np.ndarray:
    """Halve the contrast, around the middle grey."""
    return _grey(0.5 * _unit(image) + 0.25)


def coarser(image: np.ndarray) -> np.ndarray:
    """Halve the resolution."""
    h, w = image.shape[:2]
    small = cv2.resize(image, (max(1, w // 2), max(1, h // 2)), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (w, h), interpolation=cv2.INTER_LINEAR)


def sharper(image: np.ndarray) -> np.ndarray:
    """Enhance edges as viewers do (unsharp mask)."""
    one = _unit(image)
    return _grey(2 * one - cv2.GaussianBlur(one, (0, 0), 2))


def noisier(image: np.ndarray) -> np.ndarray:
    """Multiply grains of noise; the same for pictures of the same size."""
    grains = np.random.default_rng(0).normal(1, NOISE, image.shape[:2]).astype(np.float32)
    return _grey(_unit(image) * grains[:, :, None])


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    change.__name__: change for change in (darker, brighter, flatter, coarser, sharper, noisier)
}
"""All take and return [H, W, 3] uint8."""


def table(runs: list[Run]) -> list[str]:
    """One row for each data set and change: what is told apart, and what the references' threshold makes of it."""
    rows = [
        "| scans asked about | image AUROC | normal above the threshold | abnormal above it | pixel AUROC |",
        "|---|---|---|---|---|",
    ]
    for own in summarise(runs):
        rows.append(f"| {own.dataset} | {pages.threshold_cells(own)} |")
    return rows


def _copies(original: Dataset) -> Iterator[Dataset]:
    for change in CHANGES:
        with tempfile.TemporaryDirectory() as folder:
            copy_datasets([original], Path(folder), CHANGES[change], suffix=f" {change}")
            yield from load_datasets(Path(folder))


def _unit(image: np.ndarray) -> np.ndarray:
    return image.astype(np.float32) / 255


def _grey(image: np.ndarray) -> np.ndarray:
    return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)


def _options() -> argparse.Namespace:
    parser = pages.parser(__doc__, k=16, seeds=3)
    parser.add_argument("--dataset", action="append", help="may be repeated; all if left out")
    parser.add_argument("--method", default="patch_memory", choices=[*DETECTORS])
    parser.add_argument("--tower", default="mini")
    return parser.parse_args()


if __name__ == "__main__":
    main()
