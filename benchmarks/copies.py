"""Copies of data sets with changed pictures, for benchmarks that ask what a change does."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np

from fmclip.evaluation import Dataset
from fmclip.evaluation.datasets import DatasetError, read_masks
from fmclip.scans import read_scan


def copy_datasets(
    datasets: Sequence[Dataset], out: Path, change: Callable[[np.ndarray], np.ndarray], suffix: str = ""
) -> int:
    """Write changed pictures, masks, labels and groups. OUT is to be deleted: the pictures are not ours to pass on.

    Groups and looks are those of the originals, so that twins stay twins however they are changed.

    Args:
        datasets: As `load_datasets` reads them, whatever their layout.
        out: An empty folder, or one to be made.
        change: [H, W, 3] uint8 -> the same shape.
        suffix: Put behind the names of the data sets.

    Returns:
        How many pictures were written.

    Raises:
        DatasetError: The folder holds something.
        ScanError: A picture or a mask cannot be read.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DatasetError(f"Copies go to an empty folder, or to one that is not there yet; {out.name} is neither.")
    rows = []
    for place, dataset in enumerate(datasets):
        folder = out / f"set-{place}"
        folder.mkdir(parents=True)
        for number, case in enumerate(dataset.cases):
            pixels = read_scan(case.path, label=f"picture {number + 1} of {dataset.name}").pixels
            _write(folder / f"{number}.png", change(_colours(pixels)))
            row = {"dataset": dataset.name + suffix, "path": f"{folder.name}/{number}.png"}
            row |= {"label": "abnormal" if case.is_abnormal else "normal", "part": case.part.value if case.part else ""}
            row |= {"group": case.group, "look": case.look}
            if case.masks:
                row["mask"] = f"{folder.name}/{number}-mask.png"
                mask = read_masks(case.masks, (pixels.shape[0], pixels.shape[1]))
                _write(out / row["mask"], mask.astype(np.uint8) * 255)
            rows.append(row)
    with (out / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["dataset", "path", "label", "mask", "group", "look", "part"])
        writer.writeheader()
        writer.writerows(rows)
    return len(rows)


def _colours(pixels: np.ndarray) -> np.ndarray:
    """Pixels [H, W] or [H, W, 3] in 0 to 1 as [H, W, 3] uint8."""
    grey = np.round(255 * pixels).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2) if grey.ndim == 2 else grey


def _write(path: Path, image: np.ndarray) -> None:
    if not cv2.imwrite(str(path), image[:, :, ::-1] if image.ndim == 3 else image):
        raise DatasetError("A copy could not be written: is there space on the disk?")
