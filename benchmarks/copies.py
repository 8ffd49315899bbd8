"""Copies of data sets with changed pictures, for benchmarks that ask what a change does."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

import cv2
import numpy as np


def copy_datasets(
    root: Path,
    out: Path,
    datasets: Collection[str] | None,
    change: Callable[[np.ndarray], np.ndarray],
    suffix: str = "",
) -> int:
    """Copy pictures, masks, labels and groups. OUT is to be deleted: pictures of a data set are not ours to pass on.

    Args:
        root: Folder with a `manifest.csv`.
        out: An empty folder, or one to be made.
        datasets: Which of them; all if there are none.
        change: [H, W, 3] uint8 -> the same shape.
        suffix: Put behind the names of the data sets.

    Returns:
        How many pictures were written.

    Raises:
        SystemExit: There is no manifest, nothing to copy, something that cannot be read, or a picture in the way.
    """
    if not (root / "manifest.csv").is_file():
        raise SystemExit("Error: there is no manifest.csv in the folder of the data sets.")
    with (root / "manifest.csv").open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = [row for row in reader if not datasets or row["dataset"] in datasets]
        names = list(reader.fieldnames or ())
    if not rows:
        raise SystemExit("Error: the manifest has no picture of these data sets.")
    for row in rows:
        image = cv2.imread(str(root / row["path"]), cv2.IMREAD_COLOR)
        if image is None:
            raise SystemExit("Error: a picture of the manifest cannot be read.")
        target = (out / row["path"]).with_suffix(".png")
        row["path"], row["dataset"] = target.relative_to(out).as_posix(), row["dataset"] + suffix
        if target.exists():
            raise SystemExit(f"Error: a picture is there already; give an empty folder in place of {out.name}.")
        target.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(target), change(image))
        if row.get("mask"):
            (out / row["mask"]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / row["mask"], out / row["mask"])
    with (out / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    return len(rows)
