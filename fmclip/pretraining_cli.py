"""Commands of image-text learning: `pretrain`, `retrieve` and `evaluate-retrieval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fmclip.cli import DeviceName, _progress, _readable_errors, _warn, app
from fmclip.contrastive.config import load_config
from fmclip.contrastive.figures import draw_run
from fmclip.contrastive.index import load_index
from fmclip.contrastive.logs import EpochDone, StepDone
from fmclip.contrastive.runs import embed_scan, evaluate_run, find_checkpoint, load_run, pretrain, run_folder, run_tower
from fmclip.devices import resolve_device
from fmclip.errors import PairError
from fmclip.scans import read_scan

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run: results/NAME.")]


@app.command("pretrain")
def pretrain_command(
    config: Annotated[str, typer.Argument(help="roco-vit-l-14, mini-align, radiology-mini, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as pairs.path=FOLDER epochs=5.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    checkpoint: Annotated[Path | None, typer.Option(help="Go on from this checkpoint of the run.")] = None,
    device: DeviceName = "auto",
) -> None:
    """Train a tower on image-text pairs; the result is results/NAME, which --tower takes."""
    with _readable_errors():
        settings = load_config(config, overrides or ())
        start = find_checkpoint(checkpoint or run_folder(settings)) if resume or checkpoint else None
        with _progress() as progress:
            checking = progress.add_task("checking images", total=None)
            training = progress.add_task("training", total=None, visible=False)

            def count(done: int, total: int) -> None:
                progress.update(checking, completed=done, total=total)

            def show(event: StepDone | EpochDone) -> None:
                progress.update(checking, visible=False)
                if isinstance(event, StepDone):
                    text = f"epoch {event.epoch + 1}, loss {event.loss:.3f}, {event.pairs_per_second:.1f} pairs/s"
                    progress.update(training, completed=event.step, total=event.steps, description=text, visible=True)
                else:
                    best = ", best so far" if event.is_best else ""
                    progress.console.print(
                        f"epoch {event.epoch + 1}: loss {event.loss:.4f}, validation {event.val_loss:.4f}{best}"
                    )

            folder = pretrain(settings, device=device, resume=start, on_count=count, on_event=show)
        facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if facts["skipped"]:
            _warn("Skipped: " + ", ".join(f"{number} {reason}" for reason, number in facts["skipped"].items()) + ".")
        typer.echo(f"Trained {facts['steps']} steps in {facts['seconds']:.0f} s; the tower is in {folder / 'tower'}.")


@app.command("evaluate-retrieval")
def evaluate_retrieval(
    run: RunFolder,
    part: Annotated[str, typer.Option(help="train, val, test or all.")] = "test",
    device: DeviceName = "auto",
) -> None:
    """Measure a run's retrieval; writes metrics.json, the search index and figures into its folder."""
    with _readable_errors():
        if part not in ("train", "val", "test", "all"):
            raise PairError("--part must be train, val, test or all.")
        with _progress() as progress:
            task = progress.add_task("embedding", total=None)

            def count(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total)

            metrics, embedded = evaluate_run(run, part=part, device=device, on_count=count)
        draw_run(run, run_tower(run), embedded, load_run(run).augment.fit)
        table = Table(title=f"{metrics['pairs']} pairs, {metrics['texts']} texts", title_justify="left", box=None)
        for title in ("direction", "R@1", "R@5", "R@10", "median rank", "nDCG@10"):
            table.add_column(title, no_wrap=True)
        names = ("recall_1", "recall_5", "recall_10", "median_rank", "ndcg_10")
        for direction in ("image_to_text", "text_to_image"):
            for label, own in ((direction, metrics[direction]), ("  by chance", metrics["chance"][direction])):
                table.add_row(label.replace("_", " "), *(f"{own[name]:.3g}" for name in names))
        Console().print(table)


@app.command()
def retrieve(
    run: RunFolder,
    query: Annotated[str, typer.Argument(help="A scan's file, or a text.")],
    k: Annotated[int, typer.Option(min=1, max=100, help="How many.")] = 5,
    among: Annotated[
        str, typer.Option(help="Compare with text (what reports say) or image (what scans show).")
    ] = "text",
    device: DeviceName = "auto",
) -> None:
    """Find the reports nearest to a scan or a text among all pairs of a run."""
    with _readable_errors():
        if among not in ("text", "image"):
            raise PairError("--among must be text or image.")
        load_run(run)
        if not (run / "index.safetensors").is_file():
            raise PairError("This run has no index yet: run `python -m fmclip evaluate-retrieval` first.")
        tower = run_tower(run, resolve_device(device))
        index = load_index(run / "index.safetensors", tower=tower.identity)
        if Path(query).is_file():
            embedded = embed_scan(tower, read_scan(query, label="query"), index.fit)
        else:
            embedded = tower.embed_text([query])[0].cpu()
        for rank, match in enumerate(index.search(embedded, k, among=among), start=1):
            typer.echo(f"{rank}. {match.cosine:.3f}  {match.text}")
