"""The command `export`: an adapter as a graph for other programs."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fmclip.checkpoint import load_adapter, read_window
from fmclip.cli import _readable_errors, app
from fmclip.errors import FmclipError
from fmclip.export import export_detector
from fmclip.towers import get_tower


class Target(str, Enum):
    """What the graph is written as."""

    ONNX = "onnx"
    TORCH = "torch"


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="Adapter file from `adapt`.")],
    out: Annotated[Path, typer.Option(help="File to write: .onnx, or .pt2 for torch.")],
    to: Annotated[Target, typer.Option(help="onnx: for ONNX Runtime and others; torch: torch.export.")] = Target.ONNX,
    tower: Annotated[
        str, typer.Option(help="Tower, if it is a local weights file; else the adapter file names it.")
    ] = "",
) -> None:
    """Write an adapted detector as one graph that answers without fmclip, and check it against the detector."""
    with _readable_errors():
        suffix = ".onnx" if to is Target.ONNX else ".pt2"
        if out.suffix != suffix or out.is_dir():
            raise FmclipError(f"--out must name a file that ends in {suffix} for --to {to.value}.")
        detector, calibration = load_adapter(adapter, tower=get_tower(tower) if tower else None)
        out.parent.mkdir(parents=True, exist_ok=True)
        difference = export_detector(out, detector, calibration, kind=to.value, window=read_window(adapter))
        typer.echo(
            f"Written: {out.stat().st_size / 1e6:.1f} MB, threshold {calibration.threshold:.3f}. Largest difference to "
            f"the detector on random scans: {difference:.1e}."
        )
