"""Small simulated datasets: noise with or without a bright blob."""

import csv
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest


def _picture(generator: np.random.Generator, *, blob: bool) -> tuple[np.ndarray, np.ndarray]:
    texture = cv2.GaussianBlur(generator.normal(0, 1, (40, 50)), (0, 0), 1.5)
    pixels = 90 + 25 * texture / texture.std()
    mask = np.zeros((40, 50), bool)
    if blob:
        row, column = generator.integers(12, 28), generator.integers(12, 38)
        mask = _disc(row, column)
        pixels = np.where(mask, 240, pixels)
    return np.clip(pixels, 0, 255).astype(np.uint8), mask


def _disc(row: int, column: int) -> np.ndarray:
    y, x = np.ogrid[:40, :50]
    return (y - row) ** 2 + (x - column) ** 2 < 49


@pytest.fixture
def make_folders() -> Callable[..., Path]:
    """Write NAME/normal, NAME/abnormal and NAME/masks with scans 0.png, 1.png, ... in each."""

    def make(
        root: Path, name: str = "blobs", normal: int = 8, abnormal: int = 5, masks: bool = True, seed: int = 3
    ) -> Path:
        generator = np.random.default_rng(seed)
        for folder in ("normal", "abnormal", "masks"):
            (root / name / folder).mkdir(parents=True)
        for label, count in (("normal", normal), ("abnormal", abnormal)):
            for number in range(count):
                pixels, mask = _picture(generator, blob=label == "abnormal")
                cv2.imwrite(str(root / name / label / f"{number}.png"), pixels)
                if masks and label == "abnormal":
                    cv2.imwrite(str(root / name / "masks" / f"{number}.png"), mask.astype(np.uint8) * 255)
        return root

    return make


@pytest.fixture
def write_manifest() -> Callable[..., Path]:
    """Write a manifest.csv with the given rows."""

    def write(root: Path, rows: list[dict]) -> Path:
        with (root / "manifest.csv").open("w", newline="") as file:
            writer = csv.DictWriter(
                file, ["dataset", "path", "label", "subtype", "mask", "group", "look", "is_duplicate"]
            )
            writer.writeheader()
            writer.writerows(rows)
        return root

    return write
