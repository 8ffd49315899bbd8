"""The same core from a shell: `adapt`, `predict` and `methods`; others (`..._cli`) add the rest."""

from __future__ import annotations

import contextlib
import csv
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from fmclip.abnormal_scans import read_abnormals, require_fitting
from fmclip.calibration import check_references, require_references
from fmclip.checkpoint import load_adapter, read_window, save_adapter
from fmclip.detectors import DEFAULT_DETECTOR, DETECTORS, DetectorConfig, Event, Notice, OnEvent, StageStarted, Step
from fmclip.devices import resolve_device
from fmclip.errors import FmclipError, ScanError, is_out_of_memory
from fmclip.figures import overlay, save_map, save_picture
from fmclip.report import RunRecord, ScanRecord, write_report
from fmclip.report.dicom import can_export, save_secondary_capture, save_segmentation
from fmclip.report.files import save_nifti
from fmclip.scans import AS_STORED, find_scan_files, name_window, parse_window, read_scan, read_scans
from fmclip.session import Finding
from fmclip.settings import config_of, describe, presets_of, read_settings
from fmclip.shortage import fit_where_it_fits
from fmclip.towers import Tower, get_tower

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Learn from a handful of normal scans; map where new scans deviate. Research use, not a medical device.",
)


ScanPaths = Annotated[list[Path], typer.Argument(metavar="SCAN_OR_FOLDER...", help="Scans, or folders of scans.")]
TowerName = Annotated[str, typer.Option(help='"mini", or any open_clip model ("ViT-L-14:openai", "hf-hub:org/name").')]
DeviceName = Annotated[str, typer.Option(help='"auto" takes a GPU when there is one; or "cpu", "cuda", "cuda:1".')]
SliceIndex = Annotated[
    int | None,
    typer.Option(
        "--slice", min=0, help="Slice of NIfTI volumes, frame of DICOM files, from 0; the middle one if left out."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Change a setting of the method, see `methods`; may be repeated."),
]
WINDOW_HELP = "Window of DICOM and NIfTI files: soft-tissue, lung, brain, bone, as-stored, or CENTRE,WIDTH."


@app.command()
def adapt(
    scans: ScanPaths,
    out: Annotated[Path, typer.Option(help="Adapter file to write (.safetensors).")],
    scan_type: Annotated[str, typer.Option(help='What the scans show, such as "brain MRI".')] = "medical scan",
    tower: TowerName = "mini",
    preset: Annotated[str, typer.Option(help="How long to train: fast, full, paper; `methods` lists others.")] = "full",
    method: Annotated[str, typer.Option(help="Method to learn with; `methods` lists all.")] = DEFAULT_DETECTOR,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Start of all random draws.")] = 0,
    device: DeviceName = "auto",
    slice_index: SliceIndex = None,
    window: Annotated[str, typer.Option(help=f"{WINDOW_HELP} The adapter remembers it.")] = AS_STORED,
    abnormal: Annotated[
        list[Path] | None,
        typer.Option(metavar="SCAN_OR_FOLDER", help="Abnormal scans, for methods that can use them; may be repeated."),
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Masks of abnormal scans, white where abnormal: STEM or STEM_mask."),
    ] = None,
    settings: Settings = None,
) -> None:
    """Learn from normal scans, and from abnormal ones where the method can, and save an adapter."""
    with _readable_errors():
        shown = parse_window(window)
        config = _config(method, preset, settings, scan_type, seed)
        require_fitting(method, bool(abnormal or masks), "give some with --abnormal")
        if out.is_dir():
            raise FmclipError("--out is a folder: give the name of the adapter file to write.")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass  # a folder that takes no file is better told before the training than after
        normals, errors = read_scans(find_scan_files(scans), slice_index=slice_index, window=shown)
        _warn(*map(str, errors))
        require_references(normals)
        taught, notes = read_abnormals(normals, abnormal or (), masks, slice_index=slice_index, window=shown)
        _warn(*notes)
        with _progress() as progress:
            told = _shown_on(progress)
            detector = fit_where_it_fits(
                lambda own: DETECTORS[method](own, config).fit(normals, **taught, on_event=told),
                _tower(tower, device),
                lambda: _tower(tower, "cpu"),
                told,
            )
        calibration = detector.calibration()
        save_adapter(out, detector, calibration, window=name_window(shown))
        _warn(*(warning.message for warning in check_references(normals, calibration)))
        typer.echo(f"Adapter saved: {len(normals)} reference scans, threshold {calibration.threshold:.3f}.")


@app.command()
def predict(
    adapter: Annotated[Path, typer.Argument(help="Adapter file from `adapt`.")],
    scans: ScanPaths,
    out: Annotated[Path, typer.Option(help="Folder for scores.csv, run.json, overlays and maps.")],
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a PDF report with a page for each scan.")
    ] = None,
    nifti: Annotated[bool, typer.Option("--nifti", help="Write the maps as NIfTI too, where the scans lie.")] = False,
    dicom_seg: Annotated[
        bool,
        typer.Option("--dicom-seg", help="Write a DICOM Segmentation and a Secondary Capture for each DICOM scan."),
    ] = False,
    device: DeviceName = "auto",
    tower: Annotated[
        str, typer.Option(help="Tower, if it is a local weights file; else the adapter file names it.")
    ] = "",
    slice_index: SliceIndex = None,
    window: Annotated[
        str, typer.Option(help="Window of DICOM and NIfTI files; the adapter's if left out, and no other is taken.")
    ] = "",
) -> None:
    """Score scans and map where they deviate from what the adapter was learned from."""
    with _readable_errors():
        shown = _window_of(adapter, window)
        chosen = _tower(tower, device) if tower else None
        detector, calibration = load_adapter(adapter, device=resolve_device(device), tower=chosen)
        files = find_scan_files(scans)
        out.mkdir(parents=True, exist_ok=True)
        findings: list[Finding] = []  # with their maps, for a report alone: a folder may hold thousands of scans
        records: list[ScanRecord] = []
        with _progress() as progress, _new_text(out / "scores.csv") as file:
            table = csv.writer(file)
            table.writerow(["file", "score", "threshold", "verdict", "rank"])
            numbered = enumerate(zip(files, _distinct_stems(files), strict=True), start=1)
            for number, (path, stem) in progress.track(numbered, total=len(files), description="scans"):
                try:
                    # one at a time: a folder may hold thousands
                    scan = read_scan(path, label=f"scan {number}", slice_index=slice_index, window=shown)
                except ScanError as error:
                    _warn(str(error))
                    continue
                (prediction,) = detector.predict([scan])
                finding = Finding.of(scan, prediction, calibration)
                figures = f"{finding.score:.6f}", f"{finding.threshold:.6f}"
                table.writerow([path, *figures, finding.verdict, finding.rank])
                save_picture(out / f"{stem}_overlay.png", overlay(scan, finding.map, finding.threshold))
                save_map(out / f"{stem}_map.png", finding.map)
                if nifti:
                    save_nifti(out / f"{stem}_map.nii.gz", scan, finding.map)
                if dicom_seg and can_export(finding):
                    save_segmentation(out / f"{stem}_seg.dcm", finding)
                    save_secondary_capture(out / f"{stem}_overlay.dcm", finding)
                elif dicom_seg:
                    _warn(f"{scan.label} is not from a DICOM file that names its study and image: no segmentation.")
                records.append(ScanRecord.of(scan, finding.score))
                if report is not None:
                    findings.append(finding)
        if not records:
            raise ScanError("None of the files could be read as a scan; nothing was mapped.")
        record = RunRecord.of(detector, calibration, records, window=name_window(shown))
        (out / "run.json").write_text(record.to_json(), encoding="utf-8")
        if report is not None:
            report.parent.mkdir(parents=True, exist_ok=True)
            write_report(report, findings, record)
        typer.echo(f"{len(records)} of {len(files)} files mapped.")


@app.command("methods")
def list_methods(method: Annotated[str, typer.Option(help="List the settings of this one.")] = "") -> None:
    """List the methods; or the settings of one, with the defaults that a preset may change."""
    with _readable_errors():
        for name in _methods([method] if method else ["all"]):
            typer.echo(describe(name, with_settings=bool(method)))


def main() -> None:
    """Run the command line."""
    import fmclip.archive_cli
    import fmclip.evaluation_cli
    import fmclip.export_cli
    import fmclip.pretraining_cli
    import fmclip.replay_cli  # noqa: F401  (each adds its commands)

    app()


def _config(
    method: str, preset: str, settings: Sequence[str] | None, scan_type: str = "", seed: int = 0
) -> DetectorConfig:
    """Make the config of a method that is called by its name."""
    config_class = DETECTORS[_methods([method])[0]].config_class
    if preset not in presets_of(method):
        raise FmclipError(f"{method} has no preset {preset!r}; there are {', '.join(presets_of(method))}.")
    changed = read_settings(settings or (), {method: config_class})
    return config_of(method, preset, changed, scan_type=scan_type, seed=seed)


def _window_of(adapter: Path, asked: str) -> tuple[float, float] | None:
    """Return the window that the adapter's references were read with; refuse to read queries with another one."""
    learned = read_window(adapter) or AS_STORED
    if asked and name_window(parse_window(asked)) != learned:
        raise FmclipError(
            f"The adapter was learned from scans read with the window {learned}: read with --window {asked}, other "
            "scans would deviate for that alone. Leave --window out, or adapt again with it."
        )
    return parse_window(learned)


def _new_text(path: Path) -> TextIO:
    """Open a text file for writing; file names that are no text are written with escapes."""
    return path.open("w", newline="", encoding="utf-8", errors="backslashreplace")


def _tower(name: str, device: str) -> Tower:
    return get_tower(name, device=resolve_device(device))


def _methods(names: Sequence[str]) -> list[str]:
    unknown = [name for name in names if name not in DETECTORS and name != "all"]
    if unknown:
        raise FmclipError(f"No method is called {', '.join(unknown)}; there are {', '.join(DETECTORS)}.")
    if "all" in names:
        return list(DETECTORS)
    return list(dict.fromkeys(names or (DEFAULT_DETECTOR, "patch_memory")))


def _distinct_stems(files: Sequence[Path]) -> list[str]:
    """Name the outputs of each file: its stem, with a number where two would overwrite each other."""
    taken: set[str] = set()
    stems = []
    for path in files:
        stem = path.name[: -len(".nii.gz")] if path.name.lower().endswith(".nii.gz") else path.stem
        candidate, number = stem, 1
        while candidate.lower() in taken:  # some file systems do not tell upper from lower case
            number += 1
            candidate = f"{stem}-{number}"
        taken.add(candidate.lower())
        stems.append(candidate)
    return stems


def _progress() -> Progress:
    """Make a progress bar on stderr, so that stdout can be piped."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))


def _shown_on(progress: Progress) -> OnEvent:
    """Make a listener that gives each stage a bar of its own."""
    tasks: dict[str, Any] = {}

    def show(event: Event) -> None:
        if isinstance(event, StageStarted):
            tasks[event.stage] = progress.add_task(event.stage, total=event.steps or None)
        elif isinstance(event, Step):
            text = f"{event.stage}, loss {event.loss:.3f}" if math.isfinite(event.loss) else event.stage
            progress.update(tasks[event.stage], completed=event.step, description=text)
        elif isinstance(event, Notice):
            _warn(event.text)

    return show


def _warn(*texts: str) -> None:
    for text in texts:
        Console(stderr=True).print(f"[yellow]Note:[/yellow] {escape(text)}", soft_wrap=True, highlight=False)


@contextlib.contextmanager
def _readable_errors() -> Iterator[None]:
    """Show what went wrong as one line on stderr and leave with exit code 1."""
    try:
        yield
        return
    except FmclipError as error:
        text = str(error)
    except OSError as error:  # a folder that cannot be written, a full disk
        text = f"A file or folder could not be read or written: {error.strerror or 'the system refused it'}."
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        text = "The memory ran out. Use fewer or smaller scans, a smaller tower, or another --device."
    Console(stderr=True).print(f"[red]Error:[/red] {escape(text)}", soft_wrap=True, highlight=False)
    raise typer.Exit(1)
