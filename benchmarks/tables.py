"""Every committed table of quality, and the figures of the methods, rebuilt by one command.

    pip install -e '.[peers]'
    python -m benchmarks.tables ROOT --transformer CONFIG.json:WEIGHTS.safetensors --keep DIR

ROOT is as for `python -m fmclip evaluate`. Each table is made by the command that stands in it, one after the other,
and takes from minutes to an hour or two on two cores; with `--keep DIR` what was measured is kept there, and a
broken-off rebuild goes on. `--only NAME` rebuilds one. Speed has commands of its own (`benchmarks.cpu`, ...).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

OURS = ("--method", "fusionmedclip", "--method", "patch_memory")
EVERY_K = ("--k", "16", "4", "8", "32")
TABLES: dict[str, tuple[str, ...]] = {
    "quality-report-brainmri": (
        "quality",
        "--dataset",
        "brainmri",
        *OURS,
        "--half",
        "report",
        *EVERY_K,
        "--seeds",
        "5",
    ),
    "quality-report-busi": ("quality", "--dataset", "busi", *OURS, "--half", "report", *EVERY_K, "--seeds", "5"),
    "quality-all-brainmri": ("quality", "--dataset", "brainmri", *OURS, "--half", "all", *EVERY_K),
    "quality-all-busi": ("quality", "--dataset", "busi", *OURS, "--half", "all", *EVERY_K),
    "quality-report-busi-without-marks": (
        *("quality", "--dataset", "busi", "--method", "patch_memory"),
        *("--half", "report", "--k", "16", "--seeds", "5"),
    ),
    "methods": ("methods", "--transformer", "TRANSFORMER", "--k", "16", "--seeds", "2"),
    "methods-by-k": (
        *(
            "methods",
            "--dataset",
            "brainmri",
            "--dataset",
            "busi",
            *OURS,
            "--method",
            "cosine",
            "--method",
            "two_layer",
        ),
        *("--method", "anomalib_patchcore", "--method", "anomalib_padim"),
        *("--name", "methods-by-k", "--k", "4", "8", "32", "--seeds", "2"),
    ),
    "with-abnormals": (
        *("quality", "--method", "guided_memory", "--method", "two_layer", "--half", "report"),
        *("--k", "16", "--abnormal-k", "16", "--seeds", "5"),
    ),
    "guided": (
        *("methods", "--method", "guided_memory", "--method", "patch_memory"),
        *("--name", "guided", "--k", "4", "8", "16", "32", "--seeds", "5"),
    ),
    "ablation": ("ablation", "--tower", "mini", "--k", "16", "--seeds", "1"),
    "wrong_reference": ("wrong_reference", "--k", "4", "8", "16", "--seeds", "5"),
    "across": ("across", "--k", "8", "--seeds", "3"),
    "scanner": ("scanner", "--tower", "mini", "--method", "patch_memory", "--k", "16", "--seeds", "3"),
}
"""Module and options of each, by the name of its files."""
WITHOUT_MARKS = "quality-report-busi-without-marks"
"""Asks about a copy of the data (`benchmarks.marks`)."""
IN_ONE_GO = ("wrong_reference",)
"""Measured without a file to resume from."""


def main() -> None:
    """Rebuild what is asked for."""
    options = _options()
    for name in options.only or TABLES:
        with tempfile.TemporaryDirectory() as scratch:
            for command in commands(name, options.root, Path(scratch), options):
                print(f"{name}: {command[0]}", flush=True)
                done = subprocess.run([sys.executable, "-m", *command], check=False)
                if done.returncode != 0:
                    raise SystemExit(f"Error: {name} could not be made; what it says stands above.")


def commands(name: str, root: Path, scratch: Path, options: argparse.Namespace) -> Iterator[list[str]]:
    """Word the commands of one table: module, data, options."""
    module, *words = TABLES[name]
    if name == WITHOUT_MARKS:
        painted = (options.keep or scratch) / "data-without-marks"
        if not (painted / "manifest.csv").exists():  # which is written last
            yield ["benchmarks.marks", str(root), str(painted), "--dataset", "busi"]
        root = painted
    if "TRANSFORMER" in words:
        words[words.index("TRANSFORMER")] = options.transformer
    if module == "quality":
        words += ["--name", name]
    if options.keep is not None and name not in IN_ONE_GO:
        words += ["--resume", str(options.keep / f"{name}.jsonl")]
    yield [f"benchmarks.{module}", str(root), *words, "--out", str(options.out)]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--only", action="append", choices=list(TABLES), help="may be repeated; all if left out")
    parser.add_argument("--transformer", help="a second tower, for the methods that need one")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep each run there; go on after those it holds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.transformer is None and "methods" in (options.only or TABLES):
        parser.error("methods needs --transformer CONFIG.json:WEIGHTS.safetensors; or choose others with --only")
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
