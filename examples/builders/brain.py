"""Brain MRI (T1): oblique axial slices of one healthy head, lesions simulated.

There is a single head to slice, so that every picture gets an anatomy of its own: it is cut at its own height and tilt
from a smoothly deformed head, sometimes mirrored, then given its own contrast, coil shading and Rician noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from scipy import ndimage

from builders.common import CaseInfo, CasePictures, Picture, SourceMissingError, blob, smooth_noise, soft_step, to_bytes

SIZE = 256
FIELD_OF_VIEW = 224.0  # mm, a usual one for a head
LOWEST, HIGHEST = 80.0, 98.0  # slice heights in voxels: basal ganglia to the bodies of the ventricles
N_NORMALS, N_QUERIES = 16, 8
WHITE, GREY, FLUID = 117.0, 84.0, 26.0  # grey levels of the tissues in the source
WINDOW = 178.0  # source level shown as white
TEMPLATES = Path("/usr/share/mricron/templates")

INFO = CaseInfo(
    name="brain_mri_t1",
    title="Brain MRI (T1), simulated lesions",
    scan_type="brain MRI",
    description=(
        "Axial T1 slices of one healthy head, cut and deformed differently for every picture. The lesions of half of "
        "the queries are simulated: mass with oedema, cyst, haemorrhage, old infarct."
    ),
    source="ch2.nii.gz (T1 head) and ch2bet.nii.gz (brain only) of the Debian package mricron-data 1.2.20211006",
    licence="BSD-3-Clause, copyright 2006-2010 Chris Rorden, see brain_mri_t1/LICENSE; lesions: Apache-2.0",
)


Lesion = tuple[np.ndarray, np.ndarray, str]  # grey levels, mask, finding


@dataclass(frozen=True, eq=False)
class Slice:
    """One slice before contrast and noise.

    Attributes:
        levels: [SIZE, SIZE] source grey levels.
        brain: [SIZE, SIZE] share of brain in the pixel, 0 to 1.
    """

    levels: np.ndarray
    brain: np.ndarray


def build(rng: np.random.Generator, templates: Path = TEMPLATES) -> CasePictures:
    """Make the pictures of the case.

    Args:
        rng: Source of randomness.
        templates: Folder with the two volumes.

    Returns:
        Reference slices, and between their heights the query slices, every other one with a lesion.

    Raises:
        SourceMissingError: The volumes are not installed.
    """
    head = ndimage.spline_filter(_load(templates / "ch2.nii.gz"), order=3, mode="constant")
    brain = (_load(templates / "ch2bet.nii.gz") > 0).astype(np.float32)
    heights = np.linspace(LOWEST, HIGHEST, N_NORMALS)
    normals = [Picture(_acquire(_cut(rng, head, brain, height).levels, rng)) for height in heights]
    # query slices lie half-way between reference slices, and each kind of query spreads over the whole range
    between = np.linspace(LOWEST, HIGHEST, 2 * N_NORMALS - 1)[1::2]
    heights = between[np.round(np.linspace(0, len(between) - 1, N_QUERIES)).astype(int)]
    lesions = iter((infarct, haemorrhage, mass, cyst))
    queries = []
    for height, ill in zip(heights, (False, True, True, False, False, True, True, False), strict=True):
        section = _cut(rng, head, brain, height)
        queries.append(_with_lesion(rng, section, next(lesions)) if ill else Picture(_acquire(section.levels, rng)))
    return CasePictures(normals, [queries[place] for place in rng.permutation(N_QUERIES)])


def _load(path: Path) -> np.ndarray:
    """Read a template volume as [x, y, z] float; x grows to the person's right, y to the front, z upwards."""
    if not path.is_file():
        raise SourceMissingError("The brain case needs the Debian package mricron-data (apt-get install mricron-data).")
    return np.asarray(nibabel.load(path).dataobj, dtype=np.float32)


def _cut(rng: np.random.Generator, head: np.ndarray, brain: np.ndarray, height: float) -> Slice:
    """Cut an oblique slice of a smoothly deformed head.

    Args:
        rng: Source of randomness for position, tilt and deformation.
        head: [X, Y, Z] spline coefficients of the source grey levels (filtered once for all slices).
        brain: [X, Y, Z] 1 in the brain, 0 elsewhere.
        height: Height of the slice's middle in voxels.

    Returns:
        The slice, front up.
    """
    spacing = FIELD_OF_VIEW / SIZE
    down, across = (np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2) * spacing  # mm from the middle
    yaw, pitch, roll = np.radians(rng.normal(0, (2.5, 2.5, 1.2)))
    x = across * np.cos(yaw) - down * np.sin(yaw)
    y = -(across * np.sin(yaw) + down * np.cos(yaw))
    x = x * rng.uniform(0.95, 1.05) * rng.choice((-1.0, 1.0))
    y = y * rng.uniform(0.96, 1.05)
    z = height + y * np.tan(pitch) + x * np.tan(roll)
    shape = (SIZE, SIZE)
    amplitudes = (2.0, 2.0, 1.2)  # mm; more would bend the midline visibly
    x, y, z = (axis + size * smooth_noise(rng, shape, 34) for axis, size in zip((x, y, z), amplitudes, strict=True))
    middle = rng.normal((90.0, 106.0), 1.5)
    points = np.stack([x + middle[0], y + middle[1], z])  # [3, SIZE, SIZE] voxels
    levels = ndimage.map_coordinates(head, points, order=3, mode="constant", prefilter=False).clip(0)
    share = ndimage.map_coordinates(brain, points, order=1, mode="constant")
    inside = ndimage.binary_fill_holes(ndimage.binary_closing(share > 0.5, iterations=6))
    return Slice(levels, ndimage.gaussian_filter(inside.astype(float), 0.7))


def _acquire(levels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Give a slice its own contrast, coil shading and noise: [SIZE, SIZE] uint8."""
    signal = levels / WINDOW * rng.uniform(0.93, 1.07)
    signal = signal.clip(0) ** rng.uniform(0.93, 1.08)
    signal = signal * np.exp(0.05 * smooth_noise(rng, signal.shape, 70))
    spread = rng.uniform(0.011, 0.018)
    noise = ndimage.gaussian_filter(rng.standard_normal((2, SIZE, SIZE)), (0, 0.45, 0.45)) * 1.7 * spread
    real, imaginary = noise
    return to_bytes(np.hypot(signal + real, imaginary))


def _with_lesion(rng: np.random.Generator, section: Slice, lesion: Callable[..., Lesion]) -> Picture:
    """Put a lesion into a slice before it is acquired, so that shading and noise run through both."""
    levels, mask, finding = lesion(rng, section)
    return Picture(_acquire(levels, rng), finding, mask)


def mass(rng: np.random.Generator, section: Slice) -> Lesion:
    """Simulate a necrotic mass in the white matter, with oedema around it and mass effect.

    Args:
        rng: Source of randomness.
        section: The healthy slice.

    Returns:
        Source grey levels with the lesion, its bool mask, and words for it; both arrays [SIZE, SIZE].
    """
    centre, shape = _place(rng, section, (-0.18, 0.30), (0.34, 0.42)), section.levels.shape
    radius = blob(rng, shape, centre, (17, 21), angle=rng.uniform(0, np.pi), roughness=0.12)
    levels = _push(section, centre, 19.0, 7.0)
    levels, oedema = _oedema(rng, levels, section, radius, reach=1.05)
    solid = GREY * (1.0 + 0.06 * smooth_noise(rng, shape, 2.2))
    core = soft_step(radius / (0.62 + 0.05 * smooth_noise(rng, shape, 6)), 0.30)
    filling = solid * (1 - core) + (FLUID + 18.0) * core
    cover = soft_step(radius, 0.16) * section.brain
    return levels * (1 - cover) + filling * cover, (cover > 0.5) | oedema, "mass with oedema and mass effect"


def haemorrhage(rng: np.random.Generator, section: Slice) -> Lesion:
    """Simulate a subacute haemorrhage: bright, brightest at its edge, in a thin dark rim of oedema.

    Args and returns are those of `mass`.
    """
    centre, shape = _place(rng, section, (-0.12, 0.12), (0.36, 0.46)), section.levels.shape
    radius = blob(rng, shape, centre, (15, 10), angle=rng.uniform(-0.5, 0.5), roughness=0.14)
    levels = _push(section, centre, 12.0, 3.5)
    levels, oedema = _oedema(rng, levels, section, radius, reach=0.55)
    filling = WHITE * (1.12 + 0.22 * np.clip(radius, 0, 1) ** 2 + 0.05 * smooth_noise(rng, shape, 2.5))
    cover = soft_step(radius, 0.22) * section.brain
    return levels * (1 - cover) + filling * cover, (cover > 0.5) | oedema, "subacute haemorrhage"


def cyst(rng: np.random.Generator, section: Slice) -> Lesion:
    """Simulate an arachnoid cyst: fluid with a smooth edge against the skull, the cortex pushed inwards.

    Args and returns are those of `mass`.
    """
    centre, shape = _place(rng, section, (-0.45, -0.15), (0.74, 0.82)), section.levels.shape
    outward = np.arctan2(centre[0] - SIZE / 2, centre[1] - SIZE / 2)
    radius = blob(rng, shape, centre, (25, 15), angle=-outward, roughness=0.05, harmonics=3)
    levels = _push(section, centre, 18.0, 8.0)
    cover = soft_step(radius, 0.10) * section.brain
    return levels * (1 - cover) + FLUID * cover, cover > 0.5, "arachnoid cyst"


def infarct(rng: np.random.Generator, section: Slice) -> Lesion:
    """Simulate an old infarct: a wedge from the deep white matter to the cortex, largely fluid, gliosis at its edge.

    Args and returns are those of `mass`.
    """
    apex, shape = _place(rng, section, (0.05, 0.25), (0.40, 0.46)), section.levels.shape
    rows, columns = np.mgrid[: shape[0], : shape[1]].astype(float)
    direction = np.arctan2(apex[0] - SIZE / 2, apex[1] - SIZE / 2)
    dy, dx = rows - apex[0], columns - apex[1]
    along = dy * np.sin(direction) + dx * np.cos(direction)
    across = dy * np.cos(direction) - dx * np.sin(direction)
    ragged = 2.5 * smooth_noise(rng, shape, 5)
    depth = np.minimum(along, 4.0 + 0.50 * along - np.abs(across)) + ragged  # pixels inside the wedge
    loss = 1 / (1 + np.exp(-(depth - 2.0) / 2.0)) * section.brain
    strands = np.clip(0.88 + 0.12 * smooth_noise(rng, shape, 3.5), 0, 1)  # some tissue survives
    gliosis = np.exp(-(((depth + 2.5) / 3.5) ** 2)) * section.brain
    levels = section.levels * (1 - 0.16 * gliosis)
    levels = levels * (1 - loss * strands) + (FLUID + 10) * loss * strands
    return levels, loss > 0.35, "old infarct"


def _place(
    rng: np.random.Generator, section: Slice, down: tuple[float, float], across: tuple[float, float]
) -> tuple[float, float]:
    """Choose a point by its position relative to the brain's half axes, on a random side: (row, column)."""
    rows, columns = np.nonzero(section.brain > 0.5)
    middle_row, middle_column = (rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2
    half_height, half_width = (rows.max() - rows.min()) / 2, (columns.max() - columns.min()) / 2
    side = rng.choice((-1.0, 1.0))
    return middle_row + rng.uniform(*down) * half_height, middle_column + side * rng.uniform(*across) * half_width


def _push(section: Slice, centre: tuple[float, float], radius: float, distance: float) -> np.ndarray:
    """Displace the tissue around a growing lesion away from it; the skull stays where it is.

    Args:
        section: The slice.
        centre: (row, column) of the lesion.
        radius: Radius of the lesion in pixels.
        distance: Largest displacement in pixels, reached at the lesion's edge.

    Returns:
        [SIZE, SIZE] displaced grey levels.
    """
    rows, columns = np.mgrid[:SIZE, :SIZE].astype(float)
    dy, dx = rows - centre[0], columns - centre[1]
    away = np.hypot(dy, dx) + 1e-6
    decay = np.exp(-(np.clip(away - radius, 0, None) / 26.0)) * np.clip(away / radius, 0, 1)
    to_skull = ndimage.distance_transform_edt(section.brain > 0.5)
    shift = distance * decay * np.clip(to_skull / 14.0, 0, 1)
    origin = [rows - shift * dy / away, columns - shift * dx / away]
    return ndimage.map_coordinates(section.levels, origin, order=3).clip(0)


def _oedema(
    rng: np.random.Generator, levels: np.ndarray, section: Slice, radius: np.ndarray, reach: float
) -> tuple[np.ndarray, np.ndarray]:
    """Darken the white matter around a lesion in ragged fingers, as water spreads along its fibres.

    Args:
        rng: Source of randomness.
        levels: [SIZE, SIZE] grey levels.
        section: The slice, for the extent of the brain.
        radius: [SIZE, SIZE] normalised radius of the lesion.
        reach: How far the oedema goes, in radii of the lesion.

    Returns:
        Grey levels and the bool mask of the oedema, both [SIZE, SIZE].
    """
    ragged = 0.25 * reach * smooth_noise(rng, levels.shape, 6)
    water = np.clip(1.3 * (1 - (radius - 1 + ragged) / reach), 0, 1)
    white = np.clip((ndimage.gaussian_filter(levels, 1.0) - GREY - 8) / 14, 0, 1)
    amount = ndimage.gaussian_filter(water * white, 1.2) * section.brain
    return levels * (1 - 0.24 * amount), amount > 0.4
