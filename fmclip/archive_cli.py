"""Commands for archives: `score-archive` and `archive-report`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar

from fmclip.archive.cluster import Workers
from fmclip.archive.drift import read_drift, write_table
from fmclip.archive.manifest import KEY_COLUMN, Columns, Source
from fmclip.archive.run import PART_SIZE, Progress, score_archive
from fmclip.cli import _readable_errors, _warn, app

SECONDS_A_LINE = 30
"""Between two lines where nobody looks at a bar: in a log."""


@app.command("score-archive")
def score_archive_command(
    adapter: Annotated[Path, typer.Argument(help="Adapter file from `adapt`.")],
    archive: Annotated[
        Path,
        typer.Argument(help="Manifest (.csv, .tsv, .jsonl, .parquet), a .tar shard, or a folder of WebDataset shards."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for scores, maps and failures; the same again goes on.")],
    workers: Annotated[int, typer.Option(min=0, help="How many; 0: as many as there are CPUs or GPUs for.")] = 0,
    cpus: Annotated[int, typer.Option(min=1, help="CPUs of each worker.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of each worker: 1, or a share such as 0.5.")] = 0,
    address: Annotated[
        str, typer.Option(help='Ray cluster ("auto": the one of this machine); this machine alone if left out.')
    ] = "",
    root: Annotated[Path | None, typer.Option(help="Folder that paths are relative to; the manifest's.")] = None,
    path_column: Annotated[str, typer.Option(help="Column of the manifest with the scan's path.")] = "path",
    scanner_column: Annotated[str, typer.Option(help='Column, or field of a sample; "" keeps none.')] = "scanner",
    date_column: Annotated[str, typer.Option(help='Likewise; only the day is kept, with "" not even that.')] = "date",
    id_column: Annotated[
        str,
        typer.Option(help=f"Column to copy beside each score ({KEY_COLUMN} for shards); may name patients. None is."),
    ] = "",
    maps: Annotated[str, typer.Option(help="uint8, uint16, or none.")] = "uint8",
    map_side: Annotated[int, typer.Option(min=0, help="Longest side of the maps in pixels; 0: the scan's.")] = 64,
    part_size: Annotated[int, typer.Option(min=1, help="Scans of a part: what a killed worker loses.")] = PART_SIZE,
    retry_failures: Annotated[
        bool, typer.Option("--retry-failures", help="Do parts with failures again, as after a mount was gone.")
    ] = False,
    slice_index: Annotated[
        int | None, typer.Option("--slice", min=0, help="Slice of volumes, frame of DICOM files; the middle one.")
    ] = None,
    tower: Annotated[
        str, typer.Option(help="Tower, if it is a local weights file; else the adapter file names it.")
    ] = "",
) -> None:
    """Score an archive of any size with Ray, on this machine or a cluster; a run that was cut short goes on."""
    with _readable_errors():
        with _bar() as bar:
            shown = _Shown(bar)
            done = score_archive(
                adapter,
                Source(archive, Columns(path_column, scanner_column, date_column, id_column), root),
                out,
                workers=Workers(workers, cpus, gpus, address),
                tower=tower,
                slice_index=slice_index,
                maps=maps,
                map_side=map_side,
                part_size=part_size,
                retry_failures=retry_failures,
                on_progress=shown,
            )
        if done.failed:
            _warn(f"{done.failed} of {done.scans} scans could not be mapped; the folder failures says why, row by row.")
        typer.echo(f"{done.scans_done - done.failed} of {done.scans} scans mapped.")


@app.command("archive-report")
def archive_report(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that score-archive wrote.")],
) -> None:
    """Show how the scores of each scanner go from day to day: drift.png and drift.csv in the same folder."""
    with _readable_errors():
        from fmclip.archive.drift_figure import drift_figure

        drift = read_drift(out)
        write_table(out / "drift.csv", drift)
        if any(group.date is not None for group in drift.groups):
            drift_figure(drift).savefig(out / "drift.png", dpi=140)
        else:
            _warn("No scan has a date: drift.csv compares the scanners, and there is nothing to draw over time.")
        scans = sum(group.scores.size for group in drift.groups)
        deviating = sum(int((group.scores > drift.threshold).sum()) for group in drift.groups)
        share = f"{100 * deviating / scans:.1f} %" if scans else "none"
        typer.echo(f"{scans} scans of {len(drift.scanners)} scanners, {share} above the threshold.")


class _Shown:
    """Progress as a bar, or as lines where the output is a file."""

    def __init__(self, bar: Bar) -> None:
        self._bar, self._task, self._said = bar, bar.add_task("", total=None), time.monotonic()

    def __call__(self, progress: Progress) -> None:
        left = progress.seconds_left
        text = f"{progress.parts_done} of {progress.parts} parts"
        text += f", {progress.per_second:.1f} scans/s, {_duration(left)} left" if left is not None else ""
        text += f", {progress.failed} failed" if progress.failed else ""
        self._bar.update(self._task, total=progress.scans, completed=progress.scans_done, description=text)
        if not self._bar.console.is_terminal and time.monotonic() - self._said >= SECONDS_A_LINE:
            self._said = time.monotonic()
            typer.echo(text, err=True)


def _bar() -> Bar:
    return Bar(BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), console=Console(stderr=True))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
