"""The command `replay`: a run.json done again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fmclip.cli import DeviceName, _progress, _readable_errors, _shown_on, _warn, app
from fmclip.devices import resolve_device
from fmclip.errors import FmclipError
from fmclip.report import RunRecord
from fmclip.report import replay as replay_run
from fmclip.scans import find_scan_files
from fmclip.towers import get_tower


@app.command()
def replay(
    run: Annotated[
        Path, typer.Argument(metavar="RUN_JSON", help="run.json of `predict` or of a download from the page.")
    ],
    references: Annotated[
        list[Path], typer.Option(help="Reference scans, or a folder of them; may be repeated. Names do not matter.")
    ],
    queries: Annotated[list[Path], typer.Option(help="Query scans, or a folder of them; may be repeated.")],
    device: DeviceName = "auto",
    slice_index: Annotated[
        int | None,
        typer.Option(
            "--slice", min=0, help="As given to `adapt`, for a run.json of `predict`; one of the page knows its slices."
        ),
    ] = None,
    tower: Annotated[str, typer.Option(help="Tower, if it is a local weights file; else run.json names it.")] = "",
) -> None:
    """Adapt and map again from a run.json, and say whether the scores agree."""
    with _readable_errors():
        record = RunRecord.from_json(run.read_text(encoding="utf-8", errors="replace"))
        with _progress() as progress:
            result = replay_run(
                record,
                find_scan_files(references),
                find_scan_files(queries),
                get_tower(tower or record.tower, device=resolve_device(device)),
                slice_index=slice_index,
                on_event=_shown_on(progress),
            )
        _warn(*result.notes)
        table = Table(box=None)
        for title in ("scan", "score then", "score now"):
            table.add_column(title)
        for label, then, now in result.scores:
            table.add_row(escape(label), f"{then:.4f}", f"{now:.4f}")
        Console().print(table)
        _warn(*(f"{label} is not among the files, or its pixels differ." for label in result.missing))
        if not result.agrees:
            raise FmclipError(f"The run does not agree: largest difference of a score {result.largest:.4f}.")
        typer.echo(f"The run agrees: largest difference of a score {result.largest:.1e}.")
