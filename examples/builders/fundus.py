"""Retinal fundus: separate fields of one healthy eye, lesions simulated.

The photograph is divided into fields that do not overlap, so that a query shows a part of the retina that no reference
shows. The fields on the optic disc and on the macula are left out, because there is only one of each.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import ndimage

from builders.common import CaseInfo, CasePictures, Picture, SourceMissingError, blob, smooth_noise, soft_step, to_bytes

SIZE = 256
FIELD = 184  # side of a field in source pixels
CENTRE, RADIUS = (705.0, 705.0), 678.0  # of the lit disc in the 1411 x 1411 photograph
DISC, MACULA = (
    (645.0, 215.0, 240.0),
    (700.0, 708.0, 60.0),
)  # row, column, radius kept clear (disc: of its crowded vessels too)

INFO = CaseInfo(
    name="retinal_fundus",
    title="Retinal fundus, simulated lesions",
    scan_type="retinal fundus photograph",
    description=(
        "Fields of one healthy retina, none overlapping another. The lesions of half of the queries are simulated: "
        "hard exudates, blot haemorrhages, flame haemorrhages, cotton-wool spots."
    ),
    source=(
        "retina.jpg in the scikit-image wheel (skimage.data.retina): Mikael Häggström, Medical gallery of Mikael "
        "Häggström 2014, WikiJournal of Medicine 1(2), DOI 10.15347/wjm/2014.008"
    ),
    licence="CC0-1.0 (public domain dedication); lesions: Apache-2.0",
)

Lesion = tuple[np.ndarray, np.ndarray, str]  # pixels, mask, finding


def build(rng: np.random.Generator) -> CasePictures:
    """Make the pictures of the case.

    Args:
        rng: Source of randomness.

    Returns:
        Reference fields, and query fields half of which have a lesion.

    Raises:
        SourceMissingError: scikit-image or its picture is not installed.
    """
    photograph = _load()
    corners = _fields()
    fields = [_cut(rng, photograph, corner) for corner in corners]
    # every sixth field each, so that large vessels, centre and rim are found among all three kinds of picture
    well, ill = fields[4::6], fields[1::6]
    normals = [Picture(_expose(rng, field)) for place, field in enumerate(fields) if place % 6 not in (1, 4)]
    queries = [Picture(_expose(rng, field)) for field in well]
    lesions: tuple[Callable[..., Lesion], ...] = (exudates, blots, flames, cotton_wool)
    for field, lesion in zip(ill, lesions, strict=True):
        pixels, mask, finding = lesion(rng, field)
        queries.append(Picture(_expose(rng, pixels), finding, mask))
    return CasePictures(normals, [queries[place] for place in rng.permutation(len(queries))])


def _load() -> np.ndarray:
    """Read the photograph: [1411, 1411, 3] float in [0, 1]."""
    try:
        from skimage.data import retina

        return retina().astype(np.float64) / 255.0
    except (ImportError, OSError) as reason:
        raise SourceMissingError("The fundus case needs scikit-image (pip install scikit-image).") from reason


def _fields() -> list[tuple[int, int]]:
    """Tile the lit disc with fields that do not touch each other, the optic disc or the middle of the macula.

    Returns:
        (row, column) of each field's upper left corner, in reading order.
    """
    corners = []
    for step in range(-3, 4):
        top = CENTRE[0] + (step - 0.5) * FIELD
        furthest = max(abs(top - CENTRE[0]), abs(top + FIELD - CENTRE[0]))
        if furthest >= RADIUS:
            continue
        half_chord = np.sqrt(RADIUS**2 - furthest**2)
        count = int(2 * half_chord // FIELD)
        lefts = CENTRE[1] + np.linspace(-half_chord, half_chord - FIELD, count) if count else ()
        for left in lefts:
            if all(_clear(top, left, *landmark) for landmark in (DISC, MACULA)):
                corners.append((round(top), round(left)))
    return corners


def _clear(top: float, left: float, row: float, column: float, radius: float) -> bool:
    """Say whether a field keeps clear of a round landmark."""
    nearest = np.clip(row, top, top + FIELD), np.clip(column, left, left + FIELD)
    return bool(np.hypot(nearest[0] - row, nearest[1] - column) >= radius)


def _cut(rng: np.random.Generator, photograph: np.ndarray, corner: tuple[int, int]) -> np.ndarray:
    """Cut a field and turn or mirror it, as fields of the other eye would be: [SIZE, SIZE, 3]."""
    field = photograph[corner[0] : corner[0] + FIELD, corner[1] : corner[1] + FIELD]
    image = Image.fromarray(to_bytes(field)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    pixels = np.rot90(np.asarray(image, dtype=np.float64) / 255.0, rng.integers(4))
    return np.ascontiguousarray(pixels[:, ::-1] if rng.random() < 0.5 else pixels)


def _expose(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Give a field its own flash and white balance and a little grain: [SIZE, SIZE, 3] uint8."""
    gain = rng.uniform(0.94, 1.04) * (1 + rng.normal(0, 0.012, 3))
    shading = np.exp(0.02 * smooth_noise(rng, pixels.shape[:2], 80))[..., None]
    grain = 0.006 * ndimage.gaussian_filter(rng.standard_normal(pixels.shape), (0.7, 0.7, 0)) * 2.5
    return to_bytes(pixels * gain * shading + grain)


def exudates(rng: np.random.Generator, pixels: np.ndarray) -> Lesion:
    """Simulate hard exudates: waxy yellow flecks with sharp edges, in part of a ring, and a few dot haemorrhages.

    Args:
        rng: Source of randomness.
        pixels: [SIZE, SIZE, 3] healthy field.

    Returns:
        The field with the lesion, its [SIZE, SIZE] bool mask, and words for it.
    """
    middle, ring = rng.uniform(100, 156, 2), rng.uniform(38, 48)
    start = rng.uniform(0, 2 * np.pi)
    shape, cover = pixels.shape[:2], np.zeros(pixels.shape[:2])
    for _ in range(44):
        angle, away = start + abs(rng.normal(0, 1.5)), ring + rng.normal(0, 6)
        spot = middle + away * np.array((np.sin(angle), np.cos(angle)))
        radii = rng.uniform(1.4, 5.4) * rng.uniform(0.75, 1.25, 2)
        cover = np.maximum(cover, soft_step(blob(rng, shape, tuple(spot), tuple(radii), harmonics=3), 0.6))
    cover = ndimage.gaussian_filter(cover, 0.8)
    lipid = np.array((0.97, 0.84, 0.50)) + 0.03 * smooth_noise(rng, shape, 2)[..., None]
    result = pixels * (1 - 0.85 * cover[..., None]) + lipid * 0.85 * cover[..., None]
    dots = _spots(rng, shape, middle, spread=22.0, sizes=rng.uniform(2.5, 4.0, 4))
    return _blood(rng, result, dots, 1.0), (cover > 0.4) | (dots > 0.4), "hard exudates"


def blots(rng: np.random.Generator, pixels: np.ndarray) -> Lesion:
    """Simulate dot and blot haemorrhages: round, dark red, deep in the retina.

    Args and returns are those of `exudates`.
    """
    sizes = np.concatenate([rng.uniform(9, 15, 3), rng.uniform(3, 7, 7)])
    cover = _spots(rng, pixels.shape[:2], rng.uniform(95, 160, 2), spread=42.0, sizes=sizes)
    return _blood(rng, pixels, cover, 1.1), cover > 0.4, "blot haemorrhages"


def flames(rng: np.random.Generator, pixels: np.ndarray) -> Lesion:
    """Simulate flame haemorrhages: blood between the nerve fibres, streaked along them, with feathered ends.

    Args and returns are those of `exudates`.
    """
    shape, direction = pixels.shape[:2], rng.uniform(0, np.pi)
    rows, columns = np.mgrid[: shape[0], : shape[1]].astype(float)
    streaks = smooth_noise(rng, (2 * SIZE, 2 * SIZE), (1.0, 9.0))
    across = rows * np.cos(direction) - columns * np.sin(direction)
    along = rows * np.sin(direction) + columns * np.cos(direction)
    fibres = ndimage.map_coordinates(streaks, [across + SIZE, along + SIZE], order=1, mode="wrap")
    cover, middle = np.zeros(shape), rng.uniform(100, 156, 2)
    for half_length in (34.0, 24.0, 17.0):
        spot = middle + rng.normal(0, 26, 2)
        radius = blob(rng, shape, tuple(spot), (0.34 * half_length, half_length), angle=direction, roughness=0.2)
        cover = np.maximum(cover, 1 / (1 + np.exp(-(1.0 - radius + 0.20 * fibres) / 0.16)))
    return _blood(rng, pixels, cover, 1.05), cover > 0.4, "flame haemorrhages"


def cotton_wool(rng: np.random.Generator, pixels: np.ndarray) -> Lesion:
    """Simulate cotton-wool spots: pale swellings of the nerve fibres with fluffy edges that veil the vessels.

    Args and returns are those of `exudates`.
    """
    shape, middle = pixels.shape[:2], rng.uniform(90, 166, 2)
    cover = np.zeros(shape)
    for size in (23.0, 17.0, 13.0):
        spot = middle + rng.normal(0, 40, 2).clip(-65, 65)
        radii = size * np.array((0.75, 1.15))
        radius = blob(rng, shape, tuple(spot), tuple(radii), angle=rng.uniform(0, np.pi), roughness=0.2)
        fluffy = radius + 0.12 * smooth_noise(rng, shape, 3.5)
        cover = np.maximum(cover, np.exp(-(np.clip(fluffy, 0, None) ** 2.2)))
    veil = (0.72 * cover)[..., None]
    pale = np.array((0.98, 0.83, 0.66)) + 0.02 * smooth_noise(rng, shape, 2)[..., None]
    return pixels * (1 - veil) + pale * veil, cover > 0.35, "cotton-wool spots"


def _spots(
    rng: np.random.Generator, shape: tuple[int, int], middle: np.ndarray, spread: float, sizes: np.ndarray
) -> np.ndarray:
    """Scatter roundish spots around a point: [H, W] coverage; `spread` and `sizes` (radii) in pixels."""
    cover = np.zeros(shape)
    for size in sizes:
        spot = np.clip(middle + rng.normal(0, spread, 2), 24, SIZE - 24)
        radii = size * rng.uniform(0.8, 1.2, 2)
        radius = blob(rng, shape, tuple(spot), tuple(radii), angle=rng.uniform(0, np.pi), roughness=0.16, harmonics=4)
        cover = np.maximum(cover, soft_step(radius, 0.45 + 1.8 / size))
    return ndimage.gaussian_filter(cover, 0.7)


def _blood(rng: np.random.Generator, pixels: np.ndarray, cover: np.ndarray, depth: float) -> np.ndarray:
    """Lay blood over a field: light is absorbed, green most, so that vessels beneath still show faintly.

    Args:
        rng: Source of randomness for the unevenness of the layer.
        pixels: [H, W, 3] field.
        cover: [H, W] coverage, 0 to 1.
        depth: Thickness of the layer; 1 is about as dark as a large vein.

    Returns:
        [H, W, 3] field with blood.
    """
    thickness = depth * cover * (1 + 0.10 * smooth_noise(rng, cover.shape, 4))
    return pixels * np.exp(-thickness[..., None] * np.array((0.33, 0.92, 0.50)))
