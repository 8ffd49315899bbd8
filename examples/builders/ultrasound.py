"""Breast ultrasound, simulated from the first echo to the last: no person was scanned.

A phantom of skin, fat, glandular tissue and muscle is given echo strength and absorption per pixel. Speckle is what it
is in a scanner: random scatterers seen through the probe's point spread function, detected and compressed to decibels.
Shadows and enhancement behind a lesion follow from its absorption and are not drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from builders.common import CaseInfo, CasePictures, Picture, blob, smooth_noise, soft_step, to_bytes

HEIGHT, WIDTH = 240, 288  # pixels
SCALE = 6.0  # pixels in a millimetre: 40 mm deep, 48 mm wide
DYNAMIC_RANGE = 58.0  # dB shown between black and white
LOOKS = 3  # speckle patterns averaged, as compounding scanners do
N_NORMALS, N_QUERIES = 16, 8
SKIN, FAT, GLAND, MUSCLE, WALL = -6.0, -27.0, -15.0, -28.0, -36.0  # echo strength, dB

INFO = CaseInfo(
    name="simulated_breast_ultrasound",
    title="Breast ultrasound, fully simulated",
    scan_type="breast ultrasound",
    description=(
        "A simulated phantom of skin, fat, gland and muscle with physical speckle; no person was scanned. Half of the "
        "queries hold a simulated lesion: irregular mass with shadow, cyst with enhancement, mass with calcifications, "
        "oval solid nodule."
    ),
    source="Simulated by examples/builders/ultrasound.py",
    licence="Apache-2.0, as this project",
)


@dataclass(frozen=True, eq=False)
class Phantom:
    """Tissue as sound meets it.

    Attributes:
        echo: [HEIGHT, WIDTH] echo strength in dB.
        absorption: [HEIGHT, WIDTH] two-way loss in dB per cm beyond what the scanner makes up for.
    """

    echo: np.ndarray
    absorption: np.ndarray


Lesion = tuple[Phantom, np.ndarray, str]  # tissue, mask, finding


def build(rng: np.random.Generator) -> CasePictures:
    """Make the pictures of the case.

    Args:
        rng: Source of randomness.

    Returns:
        Reference pictures and query pictures, every one of a phantom of its own, half of the queries with a lesion.
    """
    normals = [Picture(_scan(rng, _breast(rng))) for _ in range(N_NORMALS)]
    queries = [Picture(_scan(rng, _breast(rng))) for _ in range(N_QUERIES // 2)]
    lesions: tuple[Callable[..., Lesion], ...] = (irregular_mass, cyst, calcified_mass, nodule)
    for lesion in lesions:
        phantom, mask, finding = lesion(rng, _breast(rng))
        queries.append(Picture(_scan(rng, phantom), finding, mask))
    return CasePictures(normals, [queries[place] for place in rng.permutation(N_QUERIES)])


def _wave(rng: np.random.Generator, depth: float, height: float, length: float) -> np.ndarray:
    """Draw an undulating border: [1, WIDTH] depth in pixels; arguments in mm (depth, height, length of the waves)."""
    return SCALE * (depth + height * smooth_noise(rng, (1, WIDTH), (0, length * SCALE)))


def _between(depth: np.ndarray, top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """Cover what lies between two borders, with edges 3 pixels soft."""
    return np.clip((depth - top) / 3 + 0.5, 0, 1) * np.clip((bottom - depth) / 3 + 0.5, 0, 1)


def _lobules(rng: np.random.Generator, width: float, height: float) -> np.ndarray:
    """Divide the picture into flat irregular cells, as fat is by its septa.

    Args:
        rng: Source of randomness.
        width: Mean width of a cell in mm.
        height: Mean height of a cell in mm.

    Returns:
        [HEIGHT, WIDTH] closeness to a septum, 1 on it, falling to 0 within about half a millimetre.
    """
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] / SCALE
    rows = rows + 0.5 * smooth_noise(rng, rows.shape, 9)
    columns = columns + 0.8 * smooth_noise(rng, rows.shape, 9)
    count = int(HEIGHT * WIDTH / SCALE**2 / (width * height))
    seeds = np.stack([rng.uniform(0, HEIGHT / SCALE, count) / height, rng.uniform(0, WIDTH / SCALE, count) / width])
    nearest, _ = cKDTree(seeds.T).query(np.stack([rows / height, columns / width], axis=-1), k=2)  # [H, W, 2]
    gap = (nearest[..., 1] - nearest[..., 0]) * min(width, height)
    return np.exp(-((gap / 0.28) ** 2))


def _breast(rng: np.random.Generator) -> Phantom:
    """Make a healthy phantom with its own layer depths, lobules and ducts."""
    depth = np.mgrid[:HEIGHT, :WIDTH][0].astype(float)
    skin = _wave(rng, rng.uniform(1.5, 2.2), 0.08, 8)
    fat = _wave(rng, rng.uniform(7.0, 11.0), 1.0, 5)
    gland = _wave(rng, rng.uniform(20.0, 25.0), 1.0, 6)
    deep_fat = gland + SCALE * rng.uniform(1.0, 2.5)
    muscle = deep_fat + _wave(rng, rng.uniform(6.5, 9.0), 0.4, 10)
    shape = depth.shape

    echo = np.full(shape, WALL)
    septa = rng.uniform(9.0, 13.0) * _lobules(rng, 9.0, 3.6)
    fat_echo = FAT + 2.0 * smooth_noise(rng, shape, (3, 6)) + septa
    gland_echo = GLAND + 2.5 * smooth_noise(rng, shape, (2.5, 9)) + 1.5 * smooth_noise(rng, shape, (8, 16))
    islands = np.clip(smooth_noise(rng, shape, (6, 13)) - 1.3, 0, 1)  # fat lobules and ducts between the glands
    gland_echo = gland_echo - 9.0 * islands
    fibres = smooth_noise(rng, shape, (1.0, 22))
    muscle_echo = MUSCLE + 4.5 * np.clip(fibres, -1, 3)
    surface = np.zeros_like(skin)
    layers = (
        (muscle_echo, deep_fat, muscle),
        (fat_echo, gland, deep_fat),
        (gland_echo, fat, gland),
        (fat_echo, skin, fat),
        (SKIN - 9.0, surface - 6, skin),
    )
    for tissue, top, bottom in layers:
        cover = _between(depth, top, bottom)
        echo = echo * (1 - cover) + tissue * cover
    # fasciae and the skin's two faces mirror sound: thin bright lines on top of the tissue
    mirrors = ((surface + 2, -1.0, 1.6), (skin, SKIN, 1.2), (deep_fat, -14.0, 1.1), (muscle, -11.0, 1.3))
    for border, level, thickness in mirrors:
        sheen = level + 3.0 * smooth_noise(rng, (1, WIDTH), (0, 9))
        echo = np.maximum(echo, sheen - ((depth - border) / thickness) ** 2 * 4.3)
    absorption = 1.6 + 0.8 * smooth_noise(rng, (1, WIDTH), (0, 24)) + np.zeros(shape)
    return Phantom(echo, absorption)


def _scan(rng: np.random.Generator, phantom: Phantom) -> np.ndarray:
    """Image a phantom with a linear probe: [HEIGHT, WIDTH] uint8.

    Args:
        rng: Source of the scatterers.
        phantom: The tissue.

    Returns:
        Log-compressed echo amplitude.
    """
    loss = np.cumsum(phantom.absorption, axis=0) / (10 * SCALE)  # dB down to each pixel
    loss = ndimage.gaussian_filter1d(loss, 3.0, axis=1)  # the beam is as wide as this
    strength = 10 ** ((phantom.echo - loss) / 20)
    focus = np.abs(np.linspace(-0.45, 0.55, HEIGHT))[:, None]
    seen = np.zeros(strength.shape)
    for _ in range(LOOKS):
        scatterers = rng.standard_normal((2, *strength.shape)) * strength
        sharp, wide = (_spread(scatterers, lateral) for lateral in (1.5, 2.9))
        field = sharp * (1 - 1.6 * focus) + wide * 1.6 * focus
        seen += np.hypot(field[0], field[1]) ** 2
    noise = 10 ** (-55 / 20) * (1 + np.linspace(0, 1.5, HEIGHT))[:, None] * rng.rayleigh(1.0, strength.shape)
    level = 10 * np.log10(seen / LOOKS + noise**2 + 1e-12)
    gain = rng.uniform(-1.5, 1.5)
    return to_bytes((level + gain + DYNAMIC_RANGE - 4.0) / DYNAMIC_RANGE)


def _spread(scatterers: np.ndarray, lateral: float) -> np.ndarray:
    """See scatterers through a point spread function of unit energy, `lateral` pixels wide: [2, HEIGHT, WIDTH]."""
    axial = 0.85
    blurred = ndimage.gaussian_filter(scatterers, (0, axial, lateral))
    return blurred * np.sqrt(4 * np.pi * axial * lateral) / np.sqrt(2)


def _insert(phantom: Phantom, cover: np.ndarray, echo: np.ndarray | float, absorption: float) -> Phantom:
    """Replace tissue: `cover` [HEIGHT, WIDTH] in 0 to 1, `echo` in dB, `absorption` in dB per cm."""
    return Phantom(phantom.echo * (1 - cover) + echo * cover, phantom.absorption * (1 - cover) + absorption * cover)


def _spot(rng: np.random.Generator) -> tuple[float, float]:
    """Choose where a lesion lies in the gland: (row, column) in pixels."""
    return SCALE * rng.uniform(14.0, 16.5), rng.uniform(0.32, 0.68) * WIDTH


def irregular_mass(rng: np.random.Generator, phantom: Phantom) -> Lesion:
    """Simulate a suspicious mass: taller than wide, spiculated, dark, in a bright halo, with a shadow behind.

    Args:
        rng: Source of randomness.
        phantom: Healthy tissue.

    Returns:
        The tissue with the lesion, the lesion's [HEIGHT, WIDTH] bool mask, and words for it.
    """
    shape = phantom.echo.shape
    radius = blob(rng, shape, _spot(rng), (36, 29), angle=rng.uniform(-0.3, 0.3), roughness=0.14, harmonics=8)
    radius = radius + 0.10 * smooth_noise(rng, shape, 3.2)  # spicules
    halo = np.exp(-(((radius - 1.10) / 0.12) ** 2))
    phantom = _insert(phantom, 0.7 * halo, GLAND + 4.0, 2.0)
    cover = soft_step(radius, 0.22)
    dark = -37.0 + 2.0 * smooth_noise(rng, shape, 4)
    return _insert(phantom, cover, dark, 12.0), cover > 0.5, "irregular mass with shadow"


def cyst(rng: np.random.Generator, phantom: Phantom) -> Lesion:
    """Simulate a simple cyst: echo-free, smooth thin wall, tissue behind it brighter.

    Args and returns are those of `irregular_mass`.
    """
    shape, middle = phantom.echo.shape, _spot(rng)
    radius = blob(rng, shape, middle, (27, 40), angle=rng.uniform(-0.15, 0.15), roughness=0.06, harmonics=2)
    wall = np.exp(-(((radius - 1.03) / 0.05) ** 2))
    phantom = _insert(phantom, 0.8 * wall, GLAND + 5.0, 2.0)
    cover = soft_step(radius, 0.10)
    reverberation = -46.0 - 22.0 * np.clip((np.mgrid[: shape[0], : shape[1]][0] - middle[0]) / 27 + 1, 0, 1)
    return _insert(phantom, cover, reverberation, -7.5), cover > 0.5, "cyst with enhancement"


def calcified_mass(rng: np.random.Generator, phantom: Phantom) -> Lesion:
    """Simulate a microlobulated dark mass with microcalcifications and a faint shadow.

    Args and returns are those of `irregular_mass`.
    """
    shape, spot = phantom.echo.shape, _spot(rng)
    radius = blob(rng, shape, spot, (26, 34), angle=rng.uniform(-0.4, 0.4), roughness=0.16, harmonics=10)
    cover = soft_step(radius, 0.15)
    phantom = _insert(phantom, cover, -33.0 + 2.5 * smooth_noise(rng, shape, 5), 5.5)
    grains = np.zeros(shape)
    for row, column in np.asarray(spot) + rng.normal(0, (9, 12), (9, 2)):
        grains = np.maximum(grains, soft_step(blob(rng, shape, (row, column), (1.6, 2.0)), 0.8))
    return _insert(phantom, grains * (radius < 1), -5.0, 9.0), cover > 0.5, "mass with calcifications"


def nodule(rng: np.random.Generator, phantom: Phantom) -> Lesion:
    """Simulate a fibroadenoma-like nodule: oval, wider than tall, smooth, evenly dark, slight enhancement.

    Args and returns are those of `irregular_mass`.
    """
    shape = phantom.echo.shape
    radius = blob(rng, shape, _spot(rng), (22, 44), angle=rng.uniform(-0.2, 0.2), roughness=0.06, harmonics=4)
    capsule = np.exp(-(((radius - 1.05) / 0.05) ** 2))
    phantom = _insert(phantom, 0.6 * capsule, GLAND + 3.0, 2.0)
    cover = soft_step(radius, 0.09)
    return _insert(phantom, cover, -30.0 + 1.2 * smooth_noise(rng, shape, 6), -1.5), cover > 0.5, "oval solid nodule"
