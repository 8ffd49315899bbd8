"""The command `evaluate`: methods measured on scans with known answers."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fmclip.calibration import MAX_REFERENCES, MIN_REFERENCES
from fmclip.cli import DeviceName, Settings, TowerName, _methods, _progress, _readable_errors, _tower, _warn, app
from fmclip.detectors import DETECTORS
from fmclip.errors import FmclipError
from fmclip.evaluation import Dataset, Half, Journal, Plan, Protocol, Results, Run, load_datasets, run_plan, summarise
from fmclip.evaluation.tables import percent
from fmclip.settings import config_of, read_settings


@app.command()
def evaluate(
    root: Annotated[Path, typer.Argument(help="A dataset, a folder of datasets, or a folder with manifest.csv.")],
    dataset: Annotated[list[str] | None, typer.Option(help="May be repeated; all datasets if left out.")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help='May be repeated; "all": all methods; the default and patch_memory if left out.'),
    ] = None,
    methods: Annotated[str, typer.Option(help='"all", or names with commas between them.')] = "",
    tower: TowerName = "mini",
    k: Annotated[list[int] | None, typer.Option(help="Reference scans; repeated, 4 8 16 32 if left out.")] = None,
    abnormal_k: Annotated[int, typer.Option(min=0, help="Abnormal scans to learn from, for methods that can.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Number of draws: seeds 0, 1, ...")] = 3,
    preset: Annotated[str, typer.Option(help="fast, full, paper, or another that the methods know.")] = "full",
    protocol: Annotated[
        Protocol, typer.Option(help="unique: one scan of each picture or group, no twin of a reference; raw: all.")
    ] = Protocol.UNIQUE,
    fit_on: Annotated[str, typer.Option(metavar="NAME", help="Learn from this dataset, test on the others.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the rows as JSON.")] = None,
    table: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the tables as Markdown.")] = None,
    figures: Annotated[Path | None, typer.Option(metavar="DIR", help="Draw histograms, ROC and heatmaps.")] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep each run here (JSON lines); go on after those it holds.")
    ] = None,
    half: Annotated[Half, typer.Option(help="Part of the groups: choose on tuning, report on report.")] = Half.ALL,
    device: DeviceName = "auto",
    settings: Settings = None,
) -> None:
    """Measure methods on scans with known answers: image and pixel metrics for each k and seed."""
    with _readable_errors():
        wanted = [*(method or ()), *(name.strip() for name in methods.split(",") if name.strip())]
        chosen = _methods(wanted)
        changed = read_settings(settings or (), {name: DETECTORS[name].config_class for name in chosen})
        for name in chosen:
            config_of(name, preset, changed)  # raises now what it would raise in the middle
        found = _datasets(root, dataset, fit_on)
        source = next((one for one in found if one.name == fit_on), None)
        tested = [one for one in found if (one.name in dataset if dataset else one is not source)]
        if not tested:
            raise FmclipError(f"No dataset but {fit_on} is there to test on: add another one, or leave --fit-on out.")
        plan = Plan(
            datasets=tested,
            methods=chosen,
            ks=_reference_counts(k),
            seeds=range(seeds),
            preset=preset,
            protocol=protocol,
            half=half,
            abnormal_k=abnormal_k,
            fit_on=source,
            examples=figures is not None,
            settings=changed,
        )
        _warn(*(f"{own.name}: {note}." for own in found for note in own.notes))
        journal = Journal(resume) if resume else None
        results = Results(json_file=json_file, table=table, figures=figures)
        with _progress() as progress:
            task = progress.add_task("evaluate", total=1.0)

            def show(share: float, text: str) -> None:
                progress.update(task, completed=share, description=text)

            for result in run_plan(plan, _tower(tower, device), journal=journal, on_progress=show):
                results.add(result)  # written each time: a long evaluation that is cut short keeps what it has measured
        _warn(*results.notes())
        if not results.runs:
            raise FmclipError("Nothing was measured: see the notes above.")
        results.draw()
        _print_tables(results.runs)


def _datasets(root: Path, names: Sequence[str] | None, fit_on: str) -> list[Dataset]:
    """Load the datasets to test on and the one to learn from, with a progress bar."""
    try:
        with _progress() as progress:
            task = progress.add_task("datasets", total=1.0)
            return load_datasets(
                root,
                names,
                fit_on=fit_on,
                on_progress=lambda share, text: progress.update(task, completed=share, description=text),
            )
    except (csv.Error, UnicodeError, TypeError, ValueError) as error:  # rows that are too short hold None
        raise FmclipError(
            "manifest.csv could not be read: save it as comma-separated UTF-8 text, every row with all columns."
        ) from error


def _reference_counts(ks: Sequence[int] | None) -> list[int]:
    wanted = list(dict.fromkeys(ks or (4, 8, 16, 32)))
    if not all(MIN_REFERENCES <= k <= MAX_REFERENCES for k in wanted):
        raise FmclipError(f"--k must lie between {MIN_REFERENCES} and {MAX_REFERENCES}.")
    return wanted


def _print_tables(runs: Sequence[Run]) -> None:
    """Print one table, and another for methods that learned from abnormal scans: the two are never ranked together."""
    summaries = summarise(runs)
    for abnormal_k in sorted({own.abnormal_k for own in summaries}):
        seen = f"learned from {abnormal_k} abnormal scans as well" if abnormal_k else "learned from normal scans only"
        table = Table(title=seen, title_justify="left", box=None)
        for title in ("dataset", "method", "k", "image AUROC", "pixel AUROC", "fit s", "ms/scan"):
            table.add_column(title, no_wrap=True)
        for own in (own for own in summaries if own.abnormal_k == abnormal_k):
            figures = [percent(own.metrics.get(name)) for name in ("image_auroc", "pixel_auroc")]
            figures += [f"{own.fit_seconds:.1f}", f"{own.ms_per_scan:.0f}"]
            table.add_row(own.dataset, own.method, str(own.k), *figures)
        Console().print(table)
