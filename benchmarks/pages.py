"""What benchmarks that ask several questions of the same kind share: to measure, to word and to write."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.quality import header
from fmclip.errors import FmclipError
from fmclip.evaluation import Results, Run, Skipped
from fmclip.evaluation.tables import Summary, percent, skipped_lines


def parser(description: str | None, *, k: int, seeds: int) -> argparse.ArgumentParser:
    """Options that such benchmarks have in common."""
    own = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("root", type=Path)
    own.add_argument("--k", type=int, default=k)
    own.add_argument("--seeds", type=int, default=seeds)
    own.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    own.add_argument("--resume", type=Path, metavar="FILE", help="keep each run here; go on after those it holds")
    return own


def collect(results: Results, measured: Iterable[Run | Skipped], word: Callable[[Run], str]) -> None:
    """Measure one run after the other and say how each went.

    Raises:
        SystemExit: There is no such data set, or nothing could be measured.
    """
    try:
        for result in measured:
            results.add(result)
            if isinstance(result, Skipped):
                print(f"{result.dataset} {result.method} seed={result.seed}: {result.reason}", flush=True)
            else:
                print(f"{result.row.dataset} {result.row.method} seed={result.row.seed}: {word(result)}", flush=True)
    except FmclipError as error:
        raise SystemExit(f"Error: {error}") from None
    if not results.runs:
        raise SystemExit("Error: Nothing was measured.")


def threshold_cells(own: Summary) -> str:
    """Cells of a table: what is told apart, and what the references' threshold makes of it."""
    mean, spread = own.metrics["specificity"]
    values = (
        own.metrics["image_auroc"],
        (1 - mean, spread),
        own.metrics["sensitivity"],
        own.metrics.get("pixel_auroc"),
    )
    return " | ".join(percent(one) for one in values)


def write_page(file: Path, title: str, command: str, table: Sequence[str], skipped: Sequence[Skipped]) -> None:
    """Write a table with its heading and what was left out, and print it."""
    left_out = [f"- {line}" for line in skipped_lines(skipped)]
    text = "\n".join([*header(title, command), *table, "", *left_out]).rstrip() + "\n"
    file.write_text(text, encoding="utf-8")
    print(text)
