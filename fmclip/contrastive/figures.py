"""Figures of a run: losses, retrieval in both directions, and where a picture makes its similarity to its text."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from fmclip.contrastive.augmentation import fit_image
from fmclip.contrastive.gradcam import grad_cam
from fmclip.contrastive.logs import read_log
from fmclip.contrastive.pairs import Pair, text_group
from fmclip.contrastive.retrieval import nearest
from fmclip.contrastive.runs import Embedded
from fmclip.towers import Tower

QUERIES, SHOWN = 5, 5
RIGHT, WRONG, INK = "#0f766e", "#9aa5ab", "#22313a"
CHARACTERS = 150


def draw_run(folder: Path, tower: Tower, embedded: Embedded, fit: str) -> list[Path]:
    """Draw all figures of a run into `folder/figures`.

    Args:
        folder: Folder of the run.
        tower: Its tower.
        embedded: The pairs that were measured, with their embeddings.
        fit: How images are fitted: "crop" or "letterbox".

    Returns:
        The files that were written.
    """
    target = folder / "figures"
    target.mkdir(exist_ok=True)
    drawn = {
        "losses.png": loss_curves(folder / "log.csv"),
        "image_to_text.png": text_grid(embedded, tower.image_size, fit),
        "text_to_image.png": image_grid(embedded, tower.image_size, fit),
        "grad_cam.png": cam_figure(tower, embedded, fit),
    }
    for name, figure in drawn.items():
        figure.savefig(target / name, facecolor="white")
    return [target / name for name in drawn]


def loss_curves(log: Path) -> Figure:
    """Plot the training loss of each step and the validation loss of each epoch.

    Args:
        log: log.csv of a run.

    Returns:
        A figure of its own.
    """
    rows = read_log(log)
    figure = Figure(figsize=(6.4, 3.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="step", ylabel="loss")
    steps = [(int(row["step"]), float(row["loss"])) for row in rows if row["loss"]]
    epochs = [(int(row["step"]), float(row["val_loss"])) for row in rows if row["val_loss"]]
    epochs = [(step, loss) for step, loss in epochs if math.isfinite(loss)]
    axes.plot(*zip(*steps, strict=True), color=WRONG, linewidth=1, label="training, each step")
    if epochs:
        axes.plot(*zip(*epochs, strict=True), color=RIGHT, marker="o", markersize=4, label="validation, each epoch")
        best = min(epochs, key=lambda point: point[1])
        axes.axvline(best[0], color=INK, linestyle=":", linewidth=1, label=f"kept: step {best[0]}, {best[1]:.3f}")
    axes.legend(frameon=False, fontsize=8)
    return figure


def text_grid(embedded: Embedded, size: int, fit: str) -> Figure:
    """Draw scans, each with its own text and the texts found for it; the right one is marked.

    Args:
        embedded: Pairs with embeddings.
        size: Side of the pictures.
        fit: How they are fitted.

    Returns:
        A figure of its own.
    """
    pairs = embedded.pairs
    queries = _spread(len(pairs))
    first = {text_group(pair.text): place for place, pair in reversed(list(enumerate(pairs)))}
    texts = sorted(first.values())
    cosines, rows = nearest(embedded.image[queries], embedded.text[texts], SHOWN)
    figure = Figure(figsize=(11, 2.5 * len(queries)), dpi=100, layout="constrained")
    cells = np.atleast_2d(figure.subplots(len(queries), 2, width_ratios=(1, 4)))
    for place, query in enumerate(queries):
        _show(cells[place, 0], _picture(pairs[query], query, size, fit))
        lines = [("its own text", pairs[query].text, INK)]
        for rank, (cosine, row) in enumerate(zip(cosines[place].tolist(), rows[place].tolist(), strict=True), start=1):
            is_right = text_group(pairs[texts[row]].text) == text_group(pairs[query].text)
            mark = "✓" if is_right else " "
            lines.append((f"{rank} {mark} {cosine:.2f}", pairs[texts[row]].text, RIGHT if is_right else "#5b6b75"))
        axes = cells[place, 1]
        axes.set_axis_off()
        height = 0.97
        for head, text, colour in lines:
            body = textwrap.wrap(textwrap.shorten(text, CHARACTERS, placeholder=" …"), 96)
            axes.text(0.0, height, head, color=colour, fontsize=9, va="top", transform=axes.transAxes, weight="bold")
            where = {"va": "top", "transform": axes.transAxes, "parse_math": False}
            axes.text(0.13, height, "\n".join(body), color=colour, fontsize=9, **where)
            height -= 0.085 * (len(body) + 0.6)
    figure.suptitle("Texts found for a scan (✓ its own)", fontsize=11, x=0.01, ha="left")
    return figure


def image_grid(embedded: Embedded, size: int, fit: str) -> Figure:
    """Draw texts, each with the scans found for it; those that carry the text are framed.

    Args:
        embedded: Pairs with embeddings.
        size: Side of the pictures.
        fit: How they are fitted.

    Returns:
        A figure of its own.
    """
    pairs = embedded.pairs
    queries = _spread(len(pairs))
    cosines, rows = nearest(embedded.text[queries], embedded.image, SHOWN)
    figure = Figure(figsize=(11, 2.5 * len(queries)), dpi=100, layout="constrained")
    parts = figure.subfigures(len(queries), 1, squeeze=False)[:, 0]
    for place, query in enumerate(queries):
        title = textwrap.shorten(pairs[query].text, CHARACTERS, placeholder=" …")
        parts[place].suptitle(title, fontsize=9, x=0.01, ha="left", color=INK, parse_math=False)
        cells = np.atleast_1d(parts[place].subplots(1, SHOWN))
        for cell in cells:
            cell.set_axis_off()
        for cell, cosine, row in zip(cells, cosines[place].tolist(), rows[place].tolist(), strict=False):
            is_right = text_group(pairs[row].text) == text_group(pairs[query].text)
            _show(cell, _picture(pairs[row], row, size, fit), RIGHT if is_right else None)
            cell.set_title(f"{'✓ ' if is_right else ''}{cosine:.2f}", fontsize=9, color=RIGHT if is_right else INK)
    return figure


def cam_figure(tower: Tower, embedded: Embedded, fit: str) -> Figure:
    """Draw scans beside where each makes its similarity to its own text (Grad-CAM)."""
    queries = _spread(len(embedded.pairs))
    figure = Figure(figsize=(2.4 * len(queries), 5.6), dpi=100, layout="constrained")
    cells = figure.subplots(2, len(queries), squeeze=False)
    for column, query in enumerate(queries):
        pair = embedded.pairs[query]
        picture = _picture(pair, query, tower.image_size, fit)
        pixels = torch.from_numpy(picture).permute(2, 0, 1)[None]  # [1, 3, S, S]
        _show(cells[0, column], picture)
        _show(cells[1, column], picture)
        found = grad_cam(tower, pixels, embedded.text[query]).numpy()
        cells[1, column].imshow(found, cmap="inferno", vmin=0, vmax=1, alpha=0.75 * found)
        title = "\n".join(textwrap.wrap(textwrap.shorten(pair.text, 70, placeholder=" …"), 30))
        cells[0, column].set_title(title, fontsize=8, color=INK, parse_math=False)
    figure.suptitle("Where a scan makes its similarity to its own text (Grad-CAM)", fontsize=11, x=0.01, ha="left")
    return figure


def _spread(count: int) -> list[int]:
    """Choose queries from all over the pairs."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(QUERIES, count))})


def _picture(pair: Pair, place: int, size: int, fit: str) -> np.ndarray:
    return fit_image(pair.image.read(f"pair {place + 1}"), size, fit)


def _show(axes: Any, picture: np.ndarray, frame: str | None = None) -> None:
    axes.imshow(picture, vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.axis("on" if frame else "off")
    for spine in axes.spines.values():
        spine.set(color=frame or "none", linewidth=3)
