"""One synthetic anomaly: its parameters as a JSON-able record, and the deterministic step that applies them.

FusionMedCLIP section 3.4. The sampler draws an `Anomaly`; `apply` turns it and the normal scans into a picture and a
mask, always the same ones, so that every anomaly can be shown, named and replayed.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import cv2
import numpy as np

from fmclip.synthesis.deformation import Warp, displace_around, guided_warp, source_warp
from fmclip.synthesis.density import (
    Density,
    cast_shadow,
    intensity_change,
    local_contrast,
    surroundings,
    texture_change,
)
from fmclip.synthesis.foreground import brightness, check_scan, estimate_foreground, is_coloured, is_grey
from fmclip.synthesis.masks import MaskSpec, Region, draw_region
from fmclip.synthesis.structural import Patch, cut_paste, fetch_patch, poisson_blend

TASK_KINDS = {
    "identity": (),
    "structural": ("cutpaste", "poisson"),
    "density": ("intensity", "texture"),
    "deformation": ("source_warp", "guided_warp"),
}
TASKS = tuple(TASK_KINDS)
KINDS = tuple(kind for kinds in TASK_KINDS.values() for kind in kinds)
VISIBLE = 0.03  # of the full range (about 8 grey levels): a smaller change is not called abnormal

_PARTS: dict[str, Any] = {"mask": MaskSpec, "patch": Patch, "density": Density, "warp": Warp}
_NEEDS = {
    "cutpaste": "patch",
    "poisson": "patch",
    "intensity": "density",
    "texture": "density",
    "source_warp": "warp",
    "guided_warp": "warp",
}


@dataclass(frozen=True)
class Anomaly:
    """All parameters of one synthetic anomaly.

    Attributes:
        kind: One of `KINDS`.
        mask: Where it is and its outline.
        seed: Seed of the noise fields (mask, texture, displacement).
        patch: Structural kinds: the tissue that is put in.
        density: Density kinds: the lesion; deformation kinds: an optional change of the moved tissue.
        warp: Deformation kinds: the movement.
        displace: Density kinds: mass effect, how far the tissue is pushed aside in lesion radii; 0 is none.
        visible: Smallest change, of the full range, that counts as visible.
    """

    kind: str
    mask: MaskSpec
    seed: int
    patch: Patch | None = None
    density: Density | None = None
    warp: Warp | None = None
    displace: float = 0.0
    visible: float = VISIBLE

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown anomaly kind {self.kind!r}: use one of {', '.join(KINDS)}")
        if getattr(self, _NEEDS[self.kind]) is None:
            raise ValueError(f"an anomaly of kind {self.kind!r} needs its {_NEEDS[self.kind]} parameters")

    @property
    def task(self) -> str:
        """The synthesis task that the kind belongs to, one of `TASKS`."""
        return next(task for task, kinds in TASK_KINDS.items() if self.kind in kinds)

    @property
    def strength(self) -> float:
        """Gain of a patch, level of a density (local contrasts, signed) or factor of a warp."""
        if self.patch is not None:
            return self.patch.gain
        if self.warp is not None:
            return self.warp.factor
        return self.density.level if self.density is not None else 0.0

    @property
    def reach(self) -> float:
        """Half side of the working box in long half-axes; a smaller box is a faster anomaly."""
        if self.kind in ("texture", "guided_warp"):
            return 2.2
        return 1.7 if self.mask.shape == "perlin" else 1.3

    def to_dict(self) -> dict[str, Any]:
        """The record as plain numbers, strings and dicts, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Anomaly":
        """Rebuild an anomaly from `to_dict`, also after a round trip through JSON.

        Raises:
            ValueError: If the record lacks a field, has one too many, or names an unknown kind.
        """
        fields = dict(record)
        try:
            for name, part in _PARTS.items():
                if fields.get(name) is not None:
                    fields[name] = part(**fields[name])
            if fields.get("density") is not None:  # JSON turns the tuple into a list
                fields["density"] = replace(fields["density"], tint=tuple(fields["density"].tint))
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"this is not the record of an anomaly: {error}") from None

    def describe(self) -> str:
        """Name the anomaly in words, e.g. "dark mottled lesion with a halo, 2.1 % of the tissue"."""
        size = f"{100 * self.mask.share:.1f} % of the tissue"
        if self.kind == "cutpaste":
            return f"misplaced tissue with a sharp edge, {size}"
        if self.kind == "poisson":
            return f"misplaced tissue blended in, {size}"
        if self.warp is not None:
            moved = "pushed apart" if self.warp.factor > 0 else "drawn together"
            changed = f", {_tone(self.density)}" if self.density else ""
            return f"tissue {moved}{changed}, {size}"
        return f"{self._describe_lesion()}, {size}"

    def describe_strength(self) -> str:
        """Word the strength, e.g. "2.1 local contrasts brighter", "strength of the warp 0.40"."""
        if self.patch is not None:
            return f"contrast of the inserted tissue x {self.patch.gain:.2f}"
        if self.warp is not None:
            return f"strength of the warp {abs(self.warp.factor):.2f}"
        word = "brighter" if self.strength > 0 else "darker"
        return f"{abs(self.strength):.1f} local contrasts {word}"

    def _describe_lesion(self) -> str:
        density = self.density
        if density is None:  # __post_init__ rules it out for density kinds
            return ""
        if self.kind == "intensity":
            return f"{_tone(density)} patch"
        name = {"ring": "ring-shaped", "speckle": "speckled"}.get(density.texture, density.texture)
        shadow = "an acoustic shadow" if density.shadow > 0 else "enhancement below"
        extras = [
            *(["a halo"] if density.halo else []),
            *([shadow] if density.shadow else []),
            *(["mass effect"] if self.displace else []),
        ]
        return f"{_tone(density)} {name} lesion" + (f" with {' and '.join(extras)}" if extras else "")


def _tone(density: Density) -> str:
    return "bright" if density.level > 0 else "dark"


def apply(
    anomaly: Anomaly,
    image: np.ndarray,
    content: np.ndarray,
    sources: Sequence[np.ndarray] = (),
    *,
    foreground: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Apply an anomaly to a normal scan. The same arguments give the same picture, bit for bit.

    Outside the mask the picture is unchanged for cutpaste, poisson, intensity and source_warp; the others may also
    change the blurred boundary of the lesion, its halo, the shadow below it and the tissue that was pushed aside.

    Args:
        anomaly: The drawn parameters.
        image: Float32 [S, S, 3] in [0, 1], left as it is. A grey scan stays grey.
        content: Bool [S, S], False on letterbox bars.
        sources: Normal scans, float32 [S', S', 3] each, from which structural anomalies take their patch.
        foreground: Bool [S, S], `estimate_foreground(image, content)` where the caller has it already.

    Returns:
        The picture, float32 [S, S, 3] in [0, 1], and the mask, bool [S, S]: the lesion where something visibly changed.
        The mask lies inside content and foreground; it is empty when the change cannot be seen.

    Raises:
        ValueError: If a shape or dtype is wrong, or the anomaly needs a source that is not there.
    """
    check_scan(image, content)
    if foreground is None:
        foreground = estimate_foreground(image, content)
    rng = np.random.default_rng(anomaly.seed)
    region = draw_region(anomaly.mask, foreground, rng, reach=anomaly.reach)
    pixels = np.ascontiguousarray(image[region.box])  # [h, w, C]
    if not is_coloured(image):
        anomaly = _without_tint(anomaly)
        if is_grey(pixels):  # one channel is enough, and what is grey stays grey
            pixels = np.ascontiguousarray(pixels[..., :1])
    if anomaly.patch is not None:
        changed = _structural(anomaly, anomaly.patch, pixels, region, image, sources)
    elif anomaly.warp is not None:
        changed = _deformation(anomaly, anomaly.warp, pixels, region, foreground, rng)
    else:
        changed = _density(anomaly, pixels, region, rng)
    inside = content[region.box]
    result = image.copy()
    result[region.box] = np.where(inside[..., None], changed, pixels)
    mask = np.zeros(content.shape, bool)
    mask[region.box] = _visible_part(pixels, changed, region, anomaly.visible) & inside
    if anomaly.density is not None and anomaly.density.shadow:
        result = cast_shadow(result, region, foreground, anomaly.density.shadow)
    return result, mask


def _without_tint(anomaly: Anomaly) -> Anomaly:
    """The anomaly for a scan without colour."""
    if anomaly.density is None:
        return anomaly
    return replace(anomaly, density=replace(anomaly.density, tint=(1.0, 1.0, 1.0)))


def _structural(
    anomaly: Anomaly,
    patch: Patch,
    pixels: np.ndarray,
    region: Region,
    image: np.ndarray,
    sources: Sequence[np.ndarray],
) -> np.ndarray:
    """Structural kinds on one box, float32 [h, w, C] in and out."""
    if not -1 <= patch.source < len(sources):
        raise ValueError(
            f"the anomaly takes its patch from source {patch.source}, but there are {len(sources)} sources"
        )
    source = image if patch.source == -1 else sources[patch.source]
    everywhere = np.ones(source.shape[:2], bool)  # a source's letterbox bars are black and count as background
    source_foreground = estimate_foreground(source, everywhere)
    if pixels.shape[2] == 1:
        source = source if is_grey(source) else brightness(source)[..., None]
    patch_image = fetch_patch(patch, region, source[..., : pixels.shape[2]], source_foreground)
    if anomaly.kind == "cutpaste":
        return cut_paste(pixels, patch_image, region.mask, patch.gain)
    return poisson_blend(pixels, patch_image, region.mask, gain=patch.gain, mixed=patch.mixed)


def _density(anomaly: Anomaly, pixels: np.ndarray, region: Region, rng: np.random.Generator) -> np.ndarray:
    """Density kinds on one box, float32 [h, w, C] in and out."""
    density = anomaly.density
    if density is None:  # __post_init__ rules it out
        return pixels
    contrast = local_contrast(pixels, region.tissue)
    if anomaly.kind == "intensity":
        return intensity_change(pixels, region, density, contrast, rng)
    around = displace_around(pixels, region, anomaly.displace) if anomaly.displace else pixels
    around = surroundings(around, region, density, contrast)
    return texture_change(around, region, density, contrast, rng)


def _deformation(
    anomaly: Anomaly, warp: Warp, pixels: np.ndarray, region: Region, foreground: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Deformation kinds on one box, float32 [h, w, C] in and out."""
    if anomaly.kind == "source_warp":
        moved = source_warp(pixels, region, warp.factor)
    else:
        moved = guided_warp(pixels, region, warp, foreground, rng)
    if anomaly.density is None:
        return moved
    return intensity_change(moved, region, anomaly.density, local_contrast(pixels, region.tissue), rng)


def _visible_part(before: np.ndarray, after: np.ndarray, region: Region, visible: float) -> np.ndarray:
    """The part of the region's mask where the picture visibly changed, without pinholes. Bool [h, w]."""
    change = np.abs(after - before)
    change = np.maximum.reduce([change[..., channel] for channel in range(change.shape[2])])  # [h, w]
    # warped or textured tissue crosses its old values here and there; a reader would outline the whole
    side = closing_side(region.radius)
    seen = (cv2.blur(change, (side, side)) > visible).astype(np.uint8)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * side - 1, 2 * side - 1))
    framed = cv2.copyMakeBorder(seen, side, side, side, side, cv2.BORDER_CONSTANT, value=0)
    closed = cv2.morphologyEx(framed, cv2.MORPH_CLOSE, disc)
    cv2.floodFill(closed, None, (0, 0), 2)
    filled = closed[side:-side, side:-side] != 2
    return filled & region.mask


def closing_side(radius: float) -> int:
    """Side in pixels of the blur before a change is called visible; gaps up to that width are closed."""
    return 2 * max(1, round(0.12 * radius)) + 1
