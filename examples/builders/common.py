"""What the example cases share: the picture and case records, smooth random fields, and writing a case to disk."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

NORMAL = "normal"
LESION = "simulated lesion"


class SourceMissingError(RuntimeError):
    """A picture that a case is made from is not installed; the message says how to get it."""


@dataclass(frozen=True)
class CaseInfo:
    """What a person reads about a case.

    Attributes:
        name: Folder name.
        title: Title on the page.
        scan_type: Words for the text prompts, such as "brain MRI".
        description: One or two sentences, including what is simulated.
        source: Where the pixels come from.
        licence: Under which terms they may be shared.
    """

    name: str
    title: str
    scan_type: str
    description: str
    source: str
    licence: str


@dataclass(frozen=True, eq=False)
class Picture:
    """One finished example image.

    Attributes:
        pixels: [H, W] or [H, W, 3] uint8.
        finding: Words for what was simulated; empty for a normal picture.
        mask: [H, W] bool, where the lesion is; None for a normal picture.
    """

    pixels: np.ndarray
    finding: str = ""
    mask: np.ndarray | None = None

    @property
    def truth(self) -> str:
        """NORMAL or LESION."""
        return NORMAL if self.mask is None else LESION


@dataclass(frozen=True, eq=False)
class CasePictures:
    """The reference pictures and the query pictures of a case, in display order."""

    normals: Sequence[Picture]
    queries: Sequence[Picture]


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float | tuple[float, ...]) -> np.ndarray:
    """Make a smooth random field with zero mean and unit spread.

    Args:
        rng: Source of randomness.
        shape: Shape of the field.
        sigma: Smoothness in pixels, one for all axes or one per axis.

    Returns:
        Float field of `shape`.
    """
    field = ndimage.gaussian_filter(rng.standard_normal(shape), sigma, mode="wrap")
    return (field - field.mean()) / (field.std() + 1e-12)


def blob(
    rng: np.random.Generator,
    shape: tuple[int, int],
    centre: tuple[float, float],
    radii: tuple[float, float],
    *,
    angle: float = 0.0,
    roughness: float = 0.12,
    harmonics: int = 6,
) -> np.ndarray:
    """Measure how deep every pixel lies inside an irregular ellipse.

    The outline is an ellipse whose radius is modulated by a few random harmonics of the polar angle, the higher ones
    weaker, which looks grown rather than drawn.

    Args:
        rng: Source of randomness for the outline.
        shape: (H, W) of the picture.
        centre: (row, column) in pixels.
        radii: (across rows, across columns) in pixels, before turning.
        angle: Turn of the ellipse in radians.
        roughness: Spread of the radius as a share of it.
        harmonics: Number of harmonics; more give a finer outline.

    Returns:
        [H, W] float: normalised radius, 0 in the centre, 1 on the outline, above 1 outside.
    """
    rows, columns = np.mgrid[: shape[0], : shape[1]].astype(float)
    dy, dx = rows - centre[0], columns - centre[1]
    across = (dy * np.cos(angle) - dx * np.sin(angle)) / radii[0]
    along = (dy * np.sin(angle) + dx * np.cos(angle)) / radii[1]
    theta = np.arctan2(across, along)
    outline = np.ones(shape)
    for order in range(2, harmonics + 2):
        amplitude = roughness * rng.normal() / order**0.8
        outline += amplitude * np.cos(order * theta + rng.uniform(0, 2 * np.pi))
    return np.hypot(across, along) / np.clip(outline, 0.35, None)


def soft_step(inside: np.ndarray, width: float) -> np.ndarray:
    """Turn a normalised radius into coverage: 1 inside, 0 outside, `width` wide in between."""
    return np.clip(0.5 + (1.0 - inside) / width, 0.0, 1.0)


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    """Round [0, 1] to 8 bits."""
    return np.round(np.clip(pixels, 0.0, 1.0) * 255.0).astype(np.uint8)


def write_case(info: CaseInfo, pictures: CasePictures, root: Path) -> dict[str, object]:
    """Write a case's PNG files under neutral names and describe them.

    Args:
        info: What a person reads about the case.
        pictures: Its pictures.
        root: Folder that holds the case folders. What the case's three picture folders held before is replaced.

    Returns:
        The case's entry for cases.json; paths are relative to `root`.
    """
    folder = root / info.name
    for part in ("normal", "query", "masks"):
        shutil.rmtree(folder / part, ignore_errors=True)
        (folder / part).mkdir(parents=True)
    normals = []
    for number, picture in enumerate(pictures.normals, start=1):
        normals.append(_write(picture.pixels, root, f"{info.name}/normal/normal-{number:02d}.png"))
    queries: list[dict[str, str]] = []
    for number, picture in enumerate(pictures.queries, start=1):
        stem = f"query-{number:02d}"
        entry = {"file": _write(picture.pixels, root, f"{info.name}/query/{stem}.png"), "truth": picture.truth}
        if picture.mask is not None:
            entry["finding"] = picture.finding
            mask = picture.mask.astype(np.uint8) * 255
            entry["mask"] = _write(mask, root, f"{info.name}/masks/{stem}.png")
        queries.append(entry)
    return {
        "name": info.name,
        "title": info.title,
        "scan_type": info.scan_type,
        "description": info.description,
        "source": info.source,
        "licence": info.licence,
        "normals": normals,
        "queries": queries,
    }


def _write(pixels: np.ndarray, root: Path, name: str) -> str:
    """Write one PNG below `root` and return its relative name."""
    Image.fromarray(pixels).save(root / name, optimize=True)
    return name
