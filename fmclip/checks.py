"""What a look at the reference scans themselves tells before anything is learned: copies, strays, mixed types, text.

`fmclip.calibration.check_references` compares pixels; here the frozen tower says which scans stand apart from the rest,
and strokes are looked for that seem to be letters. All of it are hints for a person, who decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

from fmclip.calibration import ReferenceWarning, check_references, enumerate_labels
from fmclip.detectors.base import batched_features, to_pixels
from fmclip.scans import Scan
from fmclip.towers import Tower

GAP, SMALL_SET_GAP, SMALL_SET = 2.4, 3.5, 8
"""A scan, or a group, stands apart if the step to it is so many times the usual one from a scan to its like. Measured
with the embedded tower on 100 draws each of brain MRI, breast ultrasound and the three example cases: sets of 8 and 16
stay below 2.3, sets of 4 below 3.2. One ultrasound picture among 7 or 15 brain MRI slices lies above 2.4 in 95 %."""
_LEAST = 4  # scans; of three nobody can say which one is odd

_LETTER_SHARE = (0.018, 0.09)  # height of a letter as a share of the longer side
_LETTER_PIXELS = 6
_LETTERS = 4  # in a row
_STRENGTH = 0.25  # of the full range by which a letter stands out


class Box(NamedTuple):
    """Part of a picture, in its pixels: first row and column, then those behind the last."""

    top: int
    left: int
    bottom: int
    right: int


def check_pixels(scans: Sequence[Scan]) -> list[ReferenceWarning]:
    """Look for what the pixels alone tell: copies, sizes, colours, intensities, burned-in text.

    Args:
        scans: The k reference scans.

    Returns:
        Warnings, the plainest first; empty when nothing stands out.
    """
    return [
        *check_references(scans),
        *(
            ReferenceWarning(
                "text",
                f"{scan.label}: there may be text burned into the picture. Check it for patient data; letters also "
                "look like findings.",
                (place,),
            )
            for place, scan in enumerate(scans)
            if find_text(scan.pixels)
        ),
    ]


def check_strays(scans: Sequence[Scan], embeddings: np.ndarray) -> list[ReferenceWarning]:
    """Word what `find_strays` finds.

    Args:
        scans: The k reference scans.
        embeddings: [k, D] from `embed_scans`.

    Returns:
        A warning for each stray ("outlier") or group of strays ("mixed").
    """
    return [_apart(scans, group) for group in find_strays(embeddings)]


@torch.no_grad()
def embed_scans(scans: Sequence[Scan], tower: Tower) -> np.ndarray:
    """What a scan shows as a whole, in the eyes of the frozen tower.

    Args:
        scans: k scans.
        tower: The tower.

    Returns:
        [k, D] float32 of unit length: the mean of each level over the scan, standardised, side by side.
    """
    pixels, _, _ = to_pixels(scans, tower)
    means = [level.mean(dim=(2, 3)) for level in batched_features(tower, pixels)]  # [k, C_j] each
    levels = [F.normalize(F.layer_norm(mean, mean.shape[1:]), dim=1) for mean in means]
    return (torch.cat(levels, dim=1) / len(levels) ** 0.5).cpu().numpy()


def find_strays(embeddings: np.ndarray) -> list[tuple[int, ...]]:
    """Find scans that stand apart from most: single ones, and groups such as another view or type.

    Each scan is linked to its like by the shortest tree that joins all (single linkage). Where its longest link is far
    longer than the usual one, the smaller side is named, and the rest is looked at again; at most half of the set is.

    Args:
        embeddings: [k, D] of unit length.

    Returns:
        Places (from 0) of each stray or group of strays; empty for fewer than four scans.
    """
    left = np.arange(len(embeddings))
    found: list[tuple[int, ...]] = []
    while len(left) >= _LEAST:
        distances = np.clip((1 - embeddings[left] @ embeddings[left].T) / 2, 1e-9, 1)  # [n, n]
        np.fill_diagonal(distances, 0)
        tree = minimum_spanning_tree(distances).toarray()
        links = np.sort(tree[tree > 0])
        bound = GAP if len(left) >= SMALL_SET else SMALL_SET_GAP
        if links[-1] < bound * np.median(links):
            break
        _, side = connected_components(np.where(tree < links[-1], tree, 0), directed=False)
        smaller = side == np.bincount(side).argmin()
        if sum(map(len, found)) + smaller.sum() > len(embeddings) // 2:
            break
        found.append(tuple(left[smaller].tolist()))
        left = left[~smaller]
    return found


def find_text(pixels: np.ndarray) -> list[Box]:
    """Find rows of strokes that look like letters: of one height, on one line, close together, on an even ground.

    A cheap look without a model. It finds the usual captions and name plates, not every scribble; rulers and rows of
    small bright structures can look alike. So it is a hint.

    Args:
        pixels: [H, W] or [H, W, 3] in [0, 1].

    Returns:
        A box around each row of at least four letters.
    """
    grey = np.ascontiguousarray((255 * (pixels if pixels.ndim == 2 else pixels.mean(axis=2))).astype(np.uint8))
    longer = max(grey.shape)
    low = max(_LETTER_PIXELS, _LETTER_SHARE[0] * longer)
    high = max(_LETTER_SHARE[1] * longer, low + 4)
    kernel = cv2.getStructuringElement(cv2.MORPH_RECT, (int(low) | 1, int(low) | 1))  # wider than a stroke
    rows: list[Box] = []
    for operation in (cv2.MORPH_TOPHAT, cv2.MORPH_BLACKHAT):
        strokes = (cv2.morphologyEx(grey, operation, kernel) > 255 * _STRENGTH).astype(np.uint8)
        rows += _rows(_letters(grey, strokes, low, high))
    return rows


def _letters(grey: np.ndarray, strokes: np.ndarray, low: float, high: float) -> list[Box]:
    """Components of the size and the fill of a letter, on an even ground."""
    _, marks, stats, _ = cv2.connectedComponentsWithStats(strokes, connectivity=8)
    letters = []
    for mark, (left, top, width, height, area) in enumerate(stats.tolist()):
        if mark == 0 or not (low <= height <= high and 1 <= width <= 1.4 * height and area / (width * height) > 0.12):
            continue
        inside = np.s_[max(0, top - 1) : top + height + 1, max(0, left - 1) : left + width + 1]
        ground = grey[inside][marks[inside] != mark]
        if ground.size and np.std(ground) < 30:
            letters.append(Box(top, left, top + height, left + width))
    return letters


def _rows(letters: list[Box]) -> list[Box]:
    """Join letters that follow each other on a line; rows that are too short are left out."""
    rows: list[list[Box]] = []
    for letter in sorted(letters, key=lambda box: box.left):
        for row in rows:
            if _follows(row[-1], letter):
                row.append(letter)
                break
        else:
            rows.append([letter])
    return [
        Box(min(b.top for b in row), row[0].left, max(b.bottom for b in row), row[-1].right)
        for row in rows
        if len(row) >= _LETTERS
    ]


def _follows(letter: Box, other: Box) -> bool:
    height, next_height = letter.bottom - letter.top, other.bottom - other.top
    gap = other.left - letter.right
    on_line = min(abs(letter.bottom - other.bottom), abs(letter.top - other.top)) <= 0.2 * height
    return on_line and 0.55 < height / next_height < 1.8 and -0.1 * height <= gap <= 1.5 * height


def _apart(scans: Sequence[Scan], group: tuple[int, ...]) -> ReferenceWarning:
    if len(group) == 1:
        message = f"{scans[group[0]].label} looks unlike the other {len(scans) - 1}: keep it?"
        return ReferenceWarning("outlier", message, group)
    names = enumerate_labels([scans[place].label for place in group])
    message = (
        f"{names} look alike and unlike the other {len(scans) - len(group)}: another type of scan, or another view?"
    )
    return ReferenceWarning("mixed", message, group)
