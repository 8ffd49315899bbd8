"""Intensity and density variations: tumours, cysts, inflammation.

FusionMedCLIP section 3.4, task 2: Gaussian intensity change, and texture with a blurred boundary (Eq. 13).
Around the lesion there may be what such lesions bring along: a halo (oedema, an echogenic rim) and an acoustic shadow
or enhancement below it. The mask stays the lesion only.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from fmclip.synthesis.foreground import brightness
from fmclip.synthesis.masks import Region

TEXTURES = ("smooth", "mottled", "speckle", "ring")
MIN_CONTRAST = 0.05  # of the full range: even a flat scan gets a lesion that can be seen
MIN_CHANGE = 0.07  # of the full range
MAX_CHANGE = 0.65


@dataclass(frozen=True)
class Density:
    """How a lesion's intensity differs from the tissue around it.

    Attributes:
        level: Intensity factor (gamma): mean change in units of the scan's own local contrast; negative is darker.
        texture: One of `TEXTURES`; "ring" is a rim around a core of the opposite sign.
        grain: Strength of the texture, relative to the change.
        grain_size: Size of the texture's grains in lesion radii.
        beta: Mixing of Eq. 13: how much of the tissue the texture replaces.
        blur: Sigma of the boundary's Gaussian in lesion radii.
        halo: Change around the lesion, relative to `level`; 0 is none.
        halo_width: Extent of the halo in lesion radii beyond the outline.
        shadow: Share of the light lost below the lesion; negative is enhancement, 0 is none.
        tint: Factor on the change in red, green and blue; grey scans stay grey whatever it is.
    """

    level: float
    texture: str = "smooth"
    grain: float = 0.3
    grain_size: float = 0.3
    beta: float = 0.8
    blur: float = 0.15
    halo: float = 0.0
    halo_width: float = 0.5
    shadow: float = 0.0
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if self.texture not in TEXTURES:
            raise ValueError(f"unknown texture {self.texture!r}: use one of {', '.join(TEXTURES)}")


def local_contrast(pixels: np.ndarray, foreground: np.ndarray) -> float:
    """Standard deviation of the tissue in one box, never below `MIN_CONTRAST`.

    Args:
        pixels: Float32 [h, w, C].
        foreground: Bool [h, w].
    """
    tissue = brightness(pixels)[foreground]
    return max(float(tissue.std()), MIN_CONTRAST) if tissue.size else MIN_CONTRAST


def smooth_noise(height: int, width: int, size: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise filtered to grains of `size` pixels. Float32 [height, width], mean about 0, deviation about 1."""
    coarse, size, deviation = coarse_noise(height, width, size, rng)
    fine = cv2.resize(coarse, None, fx=size, fy=size, interpolation=cv2.INTER_CUBIC)
    return fine[:height, :width] / np.float32(deviation)


def coarse_noise(height: int, width: int, size: float, rng: np.random.Generator) -> tuple[np.ndarray, float, float]:
    """`smooth_noise` before it is enlarged.

    Returns:
        Float32 [H, W]; how many pixels each of its places becomes; what the enlarged noise is to be divided by.
    """
    size = max(1.5, size)
    coarse = rng.standard_normal((int(height / size) + 4, int(width / size) + 4), dtype=np.float32)
    coarse -= coarse.mean()
    return coarse, size, max(float(coarse.std()), 1e-6) * 0.8


def _change(pixels: np.ndarray, region: Region, density: Density, contrast: float) -> np.ndarray:
    """Signed mean change per channel, float32 [C], in intensity units.

    It takes at most most of the room that the tissue leaves, so that a strong lesion is no flat black or white hole.
    """
    tissue = brightness(pixels)[region.mask]
    mean = float(tissue.mean()) if tissue.size else 0.5
    room = 1 - mean if density.level > 0 else mean
    amount = min(abs(density.level) * contrast, MAX_CHANGE, 0.85 * room)
    amount = max(amount, MIN_CHANGE) * (1 if density.level > 0 else -1)
    tint = density.tint if pixels.shape[2] == 3 else (1.0,)
    return np.array([amount * factor for factor in tint], np.float32)


def intensity_change(
    pixels: np.ndarray, region: Region, density: Density, contrast: float, rng: np.random.Generator
) -> np.ndarray:
    """Add filtered Gaussian noise of mean gamma inside the mask: X + gamma * sigma.

    Args:
        pixels: Float32 [h, w, C], the region's box of the scan.
        region: The lesion.
        density: The drawn parameters (level, grain, grain_size, tint).
        contrast: Unit of `level`, from `local_contrast`.
        rng: Source of the noise.

    Returns:
        Float32 [h, w, C] in [0, 1]; equal to `pixels` outside the mask.
    """
    height, width = region.mask.shape
    noise = smooth_noise(height, width, density.grain_size * region.radius, rng)
    field = np.clip(1 + density.grain * noise, 0.1, 2.0)  # the mean keeps its sign, so a lesion is bright or dark
    field *= _inward_edge(region.mask, max(0.7, 0.12 * region.radius))
    changed = np.clip(pixels + field[..., None] * _change(pixels, region, density, contrast), 0, 1)
    return np.where(region.mask[..., None], changed, pixels)


def texture_change(
    pixels: np.ndarray, region: Region, density: Density, contrast: float, rng: np.random.Generator
) -> np.ndarray:
    """Blend a lesion texture in through a blurred mask (Eq. 13).

    X * (1 - M) + (X * (1 - beta) + beta * T) * M, with M the blurred mask and T the local mean of the tissue plus the
    lesion's change and texture.

    Args:
        pixels: Float32 [h, w, C], the region's box of the scan.
        region: The lesion.
        density: The drawn parameters.
        contrast: Unit of `level`, from `local_contrast`.
        rng: Source of the texture.

    Returns:
        Float32 [h, w, C] in [0, 1]; outside the mask it changes within the blurred boundary (3 sigma).
    """
    sigma = max(0.6, density.blur * region.radius)
    blurred = cv2.GaussianBlur(region.mask.astype(np.float32), (0, 0), sigma)
    blurred = (blurred * region.tissue)[..., None]  # [h, w, 1]; a lesion does not glow into the air
    base = _local_mean(pixels, region.radius)
    change = _change(pixels, region, density, contrast)
    texture = _textured(base, change, region, density, rng)
    inside = pixels * (1 - density.beta) + density.beta * texture
    if density.beta < 1:  # Eq. 13 alone would weaken the change by beta; the tissue's structure shows, the level stays
        inside = inside + (1 - density.beta) * change
    return np.clip(pixels * (1 - blurred) + inside * blurred, 0, 1).astype(np.float32)


def surroundings(pixels: np.ndarray, region: Region, density: Density, contrast: float) -> np.ndarray:
    """Paint the halo around a lesion; done before the lesion itself. Float32 [h, w, C] in and out, in [0, 1]."""
    if not density.halo:
        return pixels
    radius = max(1.0, density.halo_width * region.radius)
    distance = cv2.distanceTransform((~region.mask).astype(np.uint8), cv2.DIST_L2, 3)  # pixels beyond the outline
    fade = (np.exp(-((distance / radius) ** 2)) * region.tissue)[..., None]  # [h, w, 1]
    return np.clip(pixels + fade * density.halo * _change(pixels, region, density, contrast), 0, 1)


def cast_shadow(image: np.ndarray, region: Region, foreground: np.ndarray, shadow: float) -> np.ndarray:
    """Darken (or brighten, for `shadow` < 0) the tissue below a lesion, as sound does that comes from above.

    Args:
        image: Float32 [S, S, C], the lesion already in it.
        region: The lesion.
        foreground: Bool [S, S].
        shadow: Share of the light lost at the lesion's lower edge.

    Returns:
        Float32 [S, S, C] in [0, 1]; changed only below the lesion, in the foreground.
    """
    rows, columns = region.box
    below = np.zeros((image.shape[0] - rows.start, region.mask.shape[1]), np.float32)  # from the box to the bottom
    below[: region.mask.shape[0]] = region.mask
    column_hit = np.maximum.accumulate(below, axis=0)
    depth = np.cumsum(column_hit - below, axis=0)  # rows below the lesion
    length = 5 * region.radius
    fade = column_hit * np.exp(-depth / length) * np.minimum(1, depth / 2)
    fade = cv2.GaussianBlur(fade, (0, 0), sigmaX=max(0.8, 0.2 * region.radius), sigmaY=0.6)
    fade *= (below == 0) & foreground[rows.start :, columns]
    out = image.copy()
    part = out[rows.start :, columns]
    out[rows.start :, columns] = np.clip(part * (1 - shadow * fade[..., None]), 0, 1)
    return out


def _inward_edge(mask: np.ndarray, width: float) -> np.ndarray:
    """Soft edge of `width` pixels that stays inside bool [h, w]. Float32 [h, w] in [0, 1]."""
    return np.clip(cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 3) / (1 + width), 0, 1)


def _local_mean(pixels: np.ndarray, radius: float) -> np.ndarray:
    """Tissue without its structure: two box filters, as cheap at any radius. Float32 [h, w, C]."""
    side = 2 * max(1, round(0.6 * radius)) + 1
    mean = cv2.blur(cv2.blur(pixels, (side, side)), (side, side))
    return mean.reshape(pixels.shape)


def _textured(
    base: np.ndarray, change: np.ndarray, region: Region, density: Density, rng: np.random.Generator
) -> np.ndarray:
    """The lesion's texture T of Eq. 13 before mixing. Float32 [h, w, C]."""
    height, width = region.mask.shape
    if density.texture == "speckle":  # sound interference: fine, wider than high, proportional to the echo
        grains: np.ndarray = cv2.GaussianBlur(
            rng.standard_normal((height, width), dtype=np.float32), (0, 0), 1.1, sigmaY=0.6
        )
        grains = grains / max(float(grains.std()), 1e-6)
        level = np.clip(base + change, 0.02, 1)
        return level * np.clip(1 + 0.6 * density.grain * grains[..., None], 0, 2)
    noise = smooth_noise(height, width, density.grain_size * region.radius, rng)
    if density.texture == "mottled":
        noise = 0.7 * noise + 0.7 * smooth_noise(height, width, 0.4 * density.grain_size * region.radius, rng)
    field = 1 + (0.25 if density.texture == "smooth" else 1.0) * density.grain * noise
    if density.texture == "ring":
        depth: np.ndarray = cv2.distanceTransform(region.mask.astype(np.uint8), cv2.DIST_L2, 3)
        depth = depth / max(1.0, float(depth.max()))  # 0 on the outline, 1 in the core
        rim = np.exp(-(((depth - 0.22) / 0.2) ** 2))
        field = field * rim - 0.6 * (1 - rim) * (depth > 0.22)
    return base + field[..., None] * change
