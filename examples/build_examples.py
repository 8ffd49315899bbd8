"""Rebuild every example case from its sources.

Run from the repository root, with the development packages installed:

    python examples/build_examples.py                                    # all cases, in place
    python examples/build_examples.py --case brain_mri_t1 --out DIR      # one case, elsewhere

The brain case also needs the Debian package mricron-data (or --templates with a folder holding its volumes).
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from pathlib import Path

import numpy as np
from builders import brain, fundus, ultrasound
from builders.common import SourceMissingError, write_case

HERE = Path(__file__).parent
SEED = 7
CASES = (brain, fundus, ultrasound)  # in the order of the page


def build(names: list[str], out: Path, templates: Path) -> list[dict[str, object]]:
    """Build the named cases below `out` and list them in its cases.json.

    Args:
        names: Case names.
        out: Folder for the case folders. Its cases.json keeps the entries of cases that are not rebuilt.
        templates: Folder with the brain volumes.

    Returns:
        The entries of cases.json.

    Raises:
        SourceMissingError: A picture that a case is made from is not installed.
    """
    listing = out / "cases.json"
    entries = {case["name"]: case for case in json.loads(listing.read_text())["cases"]} if listing.is_file() else {}
    for recipe in CASES:
        if recipe.INFO.name not in names:
            continue
        # a stream of its own for each case, so that a change to one leaves the others as they were
        rng = np.random.default_rng((SEED, zlib.crc32(recipe.INFO.name.encode())))
        pictures = recipe.build(rng, templates) if recipe is brain else recipe.build(rng)
        entries[recipe.INFO.name] = write_case(recipe.INFO, pictures, out)
    cases = [entries[recipe.INFO.name] for recipe in CASES if recipe.INFO.name in entries]
    listing.write_text(json.dumps({"cases": cases}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return cases


def main() -> int:
    """Read the command line, build, and report; 1 if a source is missing."""
    known = [recipe.INFO.name for recipe in CASES]
    parser = argparse.ArgumentParser(description="Rebuild the example cases from their sources.")
    parser.add_argument("--case", action="append", choices=known, help="only this case; may be given more than once")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the cases (default: beside this file)")
    parser.add_argument("--templates", type=Path, default=brain.TEMPLATES, help="folder with the brain volumes")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        cases = build(options.case or known, options.out, options.templates)
    except SourceMissingError as missing:
        print(missing, file=sys.stderr)
        return 1
    for case in cases:
        print(f"{case['name']}: {len(case['normals'])} normal, {len(case['queries'])} query pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
