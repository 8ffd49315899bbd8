"""A copy of a data set without the text and the calipers that are burned into its pictures.

    python -m benchmarks.marks ROOT OUT --dataset busi
    python -m benchmarks.quality OUT --dataset busi --half report     # what is left when the marks are gone

Calipers beside a lesion are a shortcut: a method may find the marks and not the lesion. ROOT is as for `python -m
fmclip evaluate`; masks, labels and groups are copied. Marks are painted over in every picture alike, abnormal or not;
what is as thin and as bright in tissue goes too. Faint dotted lines between calipers and rests of letters stay: what is
left is a lower bound of what marks do. OUT is yours to delete: pictures of a data set are not ours to pass on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np

from benchmarks.copies import copy_datasets
from fmclip.errors import FmclipError
from fmclip.evaluation import load_datasets
from fmclip.evaluation.datasets import DatasetError

THIN = 11
"""Marks are thinner than so many pixels of a picture of 500; tissue that is as bright is thicker."""
BRIGHT, ABOVE, COLOURED = 190, 100, 60
"""A mark is so bright (of 255) and so much brighter than what is around it, or its colours differ by so much."""


def marks(image: np.ndarray) -> np.ndarray:
    """Find burned-in marks: thin, bright and apart from what is around them, or coloured.

    Args:
        image: [H, W, 3] uint8.

    Returns:
        bool [H, W].
    """
    grey = image.max(axis=2)
    side = max(3, round(THIN * min(grey.shape) / 500)) | 1
    kernel = cv2.getStructuringElement(cv2.MORPH_RECT, (side, side))
    above = cv2.morphologyEx(grey, cv2.MORPH_TOPHAT, kernel)
    found = (above >= ABOVE) & (grey >= BRIGHT)
    found |= np.ptp(image.astype(np.int16), axis=2) >= COLOURED
    return cv2.dilate(found.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)


def without_marks(image: np.ndarray) -> np.ndarray:
    """Paint marks over with what is around them: [H, W, 3] uint8 -> the same shape."""
    return cv2.inpaint(image, marks(image).astype(np.uint8), 3, cv2.INPAINT_TELEA)


def copy_without_marks(root: Path, out: Path, datasets: list[str] | None) -> tuple[int, float]:
    """Write the copy; how many pictures, and the mean share of their pixels that was painted over.

    Raises:
        FmclipError: There is no such data set, a picture cannot be read, or `out` is not for copies.
    """
    if out.resolve().is_relative_to(root.resolve()):
        raise DatasetError("Copies would mix with the data set: give a folder outside of it.")
    shares: list[float] = []

    def change(image: np.ndarray) -> np.ndarray:
        shares.append(float(marks(image).mean()))
        return without_marks(image)

    return copy_datasets(load_datasets(root, datasets), out, change), float(np.mean(shares))


def main() -> None:
    """Write the copy and say what was painted over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dataset", action="append", help="may be repeated; all if left out")
    options = parser.parse_args()
    try:
        count, share = copy_without_marks(options.root, options.out, options.dataset)
    except FmclipError as error:
        raise SystemExit(f"Error: {error}") from None
    print(f"{count} pictures, {100 * share:.2f} % of their pixels painted over")


if __name__ == "__main__":
    main()
