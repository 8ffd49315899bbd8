"""The sampler in front of the six anomaly generators: it draws parameters, `apply` turns them into pictures.

FusionMedCLIP sections 3.4 and 4.2: one of {identity, structural, density, deformation} with equal probability.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from typing import Any

import numpy as np
import torch

from fmclip.synthesis.anomaly import KINDS, TASK_KINDS, TASKS, VISIBLE, Anomaly, apply
from fmclip.synthesis.augmentation import Augmentation
from fmclip.synthesis.deformation import Warp
from fmclip.synthesis.density import MIN_CHANGE, Density, local_contrast
from fmclip.synthesis.foreground import check_scan, estimate_foreground, is_coloured
from fmclip.synthesis.masks import MIN_AREA, MaskSpec, lesion_radius, pick_centre
from fmclip.synthesis.structural import Patch

# Hard rectangles are for pasted patches; blended and warped ones have no visible corners. The radial warp needs a
# closed-form radius, so it has no Perlin masks (section 4.2).
_MASK_SHAPES: dict[str, dict[str, float]] = {
    "cutpaste": {"rectangle": 0.4, "ellipse": 0.2, "perlin": 0.4},
    "poisson": {"rectangle": 0.2, "ellipse": 0.3, "perlin": 0.5},
    "intensity": {"ellipse": 0.35, "perlin": 0.65},
    "texture": {"ellipse": 0.4, "perlin": 0.6},
    "source_warp": {"ellipse": 0.8, "rectangle": 0.2},
    "guided_warp": {"ellipse": 0.5, "perlin": 0.5},
}
MIN_PIXELS = 12


@dataclass(frozen=True)
class SynthesisConfig:
    """What the sampler draws.

    Attributes:
        scan_type: What the user calls the scans ("brain MRI"); chooses a profile, a generic one where none fits.
        weights: Relative weight of each kind within its task; a kind left out has weight 1 or what the profile says.
        min_share: Smallest lesion as a fraction of the foreground.
        max_share: Largest lesion as a fraction of the foreground; a profile may set a lower one.
        min_level: Weakest density change in local contrasts.
        max_level: Strongest density change in local contrasts.
        visible: Smallest change, of the full range, that counts as visible; below 0.07, the weakest change made.
        attempts: Draws before the sampler falls back to a plain intensity change.
        augmentation: How far a pool varies the normal scans themselves; None leaves them as they are.
    """

    scan_type: str = ""
    weights: Mapping[str, float] = field(default_factory=dict)
    min_share: float = 0.003
    max_share: float = 0.12
    min_level: float = 0.6
    max_level: float = 3.0
    visible: float = VISIBLE
    attempts: int = 6
    augmentation: Augmentation | None = None

    def __post_init__(self) -> None:
        if not 0 < self.visible < MIN_CHANGE:
            raise ValueError(f"visible must lie between 0 and {MIN_CHANGE}, got {self.visible}")
        unknown = sorted(set(self.weights) - set(KINDS))
        if unknown:
            raise ValueError(f"unknown anomaly kind {unknown[0]!r}: use one of {', '.join(KINDS)}")
        for task, kinds in TASK_KINDS.items():
            if kinds and not sum(self.weights.get(kind, 1.0) for kind in kinds) > 0:
                raise ValueError(f"the {task} task needs a kind with a weight above 0")
        if not 0 < self.min_share <= self.max_share <= 0.5:
            raise ValueError(
                f"lesion sizes need 0 < min_share <= max_share <= 0.5, got {self.min_share}, {self.max_share}"
            )


@lru_cache(maxsize=1)
def _profiles() -> dict[str, dict[str, Any]]:
    return json.loads(resources.files("fmclip").joinpath("data/synthesis.json").read_text(encoding="utf-8"))


def scan_profile(scan_type: str) -> dict[str, Any]:
    """The anomaly profile for what the user calls the scans; generic values where the profile says nothing.

    Args:
        scan_type: Free text, e.g. "breast ultrasound".

    Returns:
        Probabilities and ranges as in `fmclip/data/synthesis.json`, with the profile's `name`.
    """
    profiles = _profiles()
    patterns = {name: "|".join(map(re.escape, profile["words"])) for name, profile in profiles.items()}
    text = scan_type.lower()
    matches = (name for name, words in patterns.items() if words and re.search(rf"\b(?:{words})s?\b", text))
    name = next(matches, "generic")
    return {**profiles["generic"], **profiles[name], "name": name}


def numpy_generator(generator: torch.Generator) -> np.random.Generator:
    """A numpy generator seeded by one draw from `generator`, so that one torch seed decides everything."""
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    return np.random.default_rng(seed)


class AnomalySampler:
    """Draws the parameters of anomalies. It holds no state that changes, so threads may share one."""

    def __init__(self, config: SynthesisConfig | None = None) -> None:
        self.config = config or SynthesisConfig()
        self.profile = scan_profile(self.config.scan_type)
        self.weights = {kind: float(self.config.weights.get(kind, self._default_weight(kind))) for kind in KINDS}

    def _default_weight(self, kind: str) -> float:
        share = self.profile["texture_share"]
        return {"texture": 2 * share, "intensity": 2 * (1 - share)}.get(kind, 1.0)

    def sample(
        self,
        generator: torch.Generator,
        image: np.ndarray,
        content: np.ndarray,
        n_sources: int = 0,
        task: str | None = None,
    ) -> Anomaly | None:
        """Draw an anomaly for one scan; whether it can be seen is only known once it is applied (`synthesise`).

        Args:
            generator: Source of randomness; one number is drawn from it.
            image: Float32 [S, S, 3] in [0, 1], grey or colour.
            content: Bool [S, S], False on letterbox bars.
            n_sources: How many normal scans patches may come from; 0 takes them from the scan itself.
            task: One of `TASKS`; drawn with equal probability when None.

        Returns:
            The anomaly, or None for the identity task.

        Raises:
            ValueError: If the task is unknown, or a shape or dtype is wrong.
        """
        rng = numpy_generator(generator)
        task = self.draw_task(rng, task)
        if task == "identity":
            check_scan(image, content)
            return None
        return self.draw(rng, image, estimate_foreground(image, content), n_sources, task)

    def synthesise(
        self,
        generator: torch.Generator | np.random.Generator,
        image: np.ndarray,
        content: np.ndarray,
        sources: Sequence[np.ndarray] = (),
        task: str | None = None,
    ) -> tuple[np.ndarray, np.ndarray, Anomaly | None]:
        """Draw and apply until the anomaly can be seen; after `attempts` draws make a plain intensity change.

        Args:
            generator: Source of randomness.
            image: Float32 [S, S, 3] in [0, 1].
            content: Bool [S, S], False on letterbox bars.
            sources: Normal scans that patches may come from.
            task: One of `TASKS`; drawn with equal probability when None.

        Returns:
            The picture, float32 [S, S, 3]; the mask, bool [S, S]; and the anomaly. For the identity task the scan
            itself, an empty mask and None. Otherwise the mask has at least `MIN_PIXELS` pixels, unless the scan is
            only a few pixels wide.

        Raises:
            ValueError: If the task is unknown, or a shape or dtype is wrong.
        """
        rng = numpy_generator(generator) if isinstance(generator, torch.Generator) else generator
        task = self.draw_task(rng, task)
        check_scan(image, content)
        if task == "identity":
            return image.copy(), np.zeros(content.shape, bool), None
        foreground = estimate_foreground(image, content)
        for attempt in range(self.config.attempts + 1):
            anomaly = self.attempt(rng, attempt, image, foreground, len(sources), task)
            picture, mask = apply(anomaly, image, content, sources, foreground=foreground)
            if np.count_nonzero(mask) >= self.wanted_pixels(anomaly, attempt, foreground):
                break
        return picture, mask, anomaly

    def attempt(
        self,
        rng: np.random.Generator,
        attempt: int,
        image: np.ndarray,
        foreground: np.ndarray,
        n_sources: int,
        task: str,
    ) -> Anomaly:
        """Draw an anomaly for the attempt with this number, from 0; the last one, `config.attempts`, is plain."""
        if attempt == self.config.attempts:
            return self.plain(rng, image, foreground)
        return self.draw(rng, image, foreground, n_sources, task)

    def wanted_pixels(self, anomaly: Anomaly, attempt: int, foreground: np.ndarray) -> float:
        """Pixels that its mask must have to be kept; none for the last attempt."""
        if attempt == self.config.attempts:
            return 0
        # a lesion of which the smaller part can be seen is a scatter of specks, not a lesion
        return max(MIN_PIXELS, 0.4 * anomaly.mask.share * np.count_nonzero(foreground))

    def draw_task(self, rng: np.random.Generator, task: str | None) -> str:
        """`task` itself if given, else one of `TASKS` with equal probability."""
        if task is None:
            return TASKS[int(rng.integers(len(TASKS)))]
        if task not in TASKS:
            raise ValueError(f"unknown synthesis task {task!r}: use one of {', '.join(TASKS)}")
        return task

    def draw(
        self, rng: np.random.Generator, image: np.ndarray, foreground: np.ndarray, n_sources: int, task: str
    ) -> Anomaly:
        """Draw the parameters of one anomaly of `task` (not identity) for a scan with a known foreground."""
        kind = _choose(rng, {kind: self.weights[kind] for kind in TASK_KINDS[task]})
        mask = self._draw_mask(rng, kind, foreground)
        seed, visible = int(rng.integers(2**31)), self.config.visible
        if task == "structural":
            return Anomaly(kind, mask, seed, patch=_draw_patch(rng, kind, n_sources), visible=visible)
        if task == "density":
            density = self._draw_density(rng, image, foreground, mask, extras=kind == "texture")
            displaced = kind == "texture" and rng.random() < self.profile["displace"]
            displace = float(rng.uniform(0.15, 0.5)) if displaced else 0.0
            return Anomaly(kind, mask, seed, density=density, displace=displace, visible=visible)
        tinted = rng.random() < self.profile["warp_density"]
        tint = self._draw_density(rng, image, foreground, mask, extras=False) if tinted else None
        return Anomaly(kind, mask, seed, density=tint, warp=_draw_warp(rng, kind), visible=visible)

    def plain(self, rng: np.random.Generator, image: np.ndarray, foreground: np.ndarray) -> Anomaly:
        """A strong elliptic intensity change in the middle of the tissue: visible in any scan."""
        area = int(np.count_nonzero(foreground))
        share = min(1.0, max(0.02, 3 * MIN_AREA / area))
        row, column = pick_centre(foreground, max(foreground.shape), rng.random())  # the radius asks for the deepest
        mask = MaskSpec("ellipse", (row + 0.5) / foreground.shape[0], (column + 0.5) / foreground.shape[1], share)
        mean, _ = _around(image, foreground, row, column, lesion_radius(share, area))
        density = Density(3.0 if mean < 0.5 else -3.0)
        return Anomaly("intensity", mask, int(rng.integers(2**31)), density=density, visible=self.config.visible)

    def _draw_mask(self, rng: np.random.Generator, kind: str, foreground: np.ndarray) -> MaskSpec:
        largest = min(self.config.max_share, self.profile["max_share"])
        share = _log_uniform(rng, min(self.config.min_share, largest), largest)
        shape = _choose(rng, _MASK_SHAPES[kind])
        aspect = _log_uniform(rng, 1.0, 4.0 if kind == "cutpaste" else 2.0)
        radius = lesion_radius(share, int(np.count_nonzero(foreground)))
        row, column = pick_centre(foreground, radius, rng.random())
        return MaskSpec(
            shape=shape,
            row=(row + 0.5) / foreground.shape[0],
            column=(column + 0.5) / foreground.shape[1],
            share=share,
            aspect=aspect,
            angle=rng.uniform(0, 180),
            roughness=rng.uniform(0.25, 0.9) if shape == "perlin" else 0.0,
            periods=rng.uniform(1.2, 3.0),
        )

    def _draw_density(
        self, rng: np.random.Generator, image: np.ndarray, foreground: np.ndarray, mask: MaskSpec, *, extras: bool
    ) -> Density:
        level = _log_uniform(rng, self.config.min_level, self.config.max_level)
        radius = lesion_radius(mask.share, int(np.count_nonzero(foreground)))
        row, column = int(mask.row * foreground.shape[0]), int(mask.column * foreground.shape[1])
        mean, contrast = _around(image, foreground, row, column, radius)
        sign = 1 if rng.random() < self.profile["bright"] else -1
        room = {1: 1 - mean, -1: mean}
        if room[sign] < min(level * contrast, 0.15) or room[sign] < 0.1:  # black cannot get darker
            sign = 1 if room[1] > room[-1] else -1
        halo = extras and rng.random() < self.profile["halo"]
        shadow = extras and rng.random() < self.profile["shadow"] and not is_coloured(image)  # sound has no colour
        return Density(
            level=sign * level,
            texture=_choose(rng, self.profile["textures"]) if extras else "smooth",
            grain=rng.uniform(0.1, 0.6 if extras else 0.4),
            grain_size=_log_uniform(rng, 0.15 if extras else 0.25, 0.7),
            beta=rng.uniform(0.45, 1.0),
            blur=rng.uniform(*self.profile["blur"]),
            halo=rng.uniform(0.15, 0.45) * (1 if rng.random() < 0.5 else -1) if halo else 0.0,
            halo_width=rng.uniform(0.25, 0.6),
            # solid masses cast a shadow; fluid, which is dark, brightens what lies behind it
            shadow=rng.uniform(0.25, 0.75) * (-1 if sign < 0 and rng.random() < 0.45 else 1) if shadow else 0.0,
            tint=(rng.uniform(0.5, 1.5), rng.uniform(0.5, 1.5), rng.uniform(0.5, 1.5)),
        )


def _draw_patch(rng: np.random.Generator, kind: str, n_sources: int) -> Patch:
    blended = kind == "poisson"
    return Patch(
        source=int(rng.integers(n_sources)) if n_sources else -1,
        place=float(rng.random()),
        angle=float(rng.uniform(0, 360)),
        zoom=_log_uniform(rng, 0.6, 1.7),
        mirror=bool(rng.random() < 0.5),
        gain=_log_uniform(rng, 1.0, 2.2) if blended else _log_uniform(rng, 0.65, 1.6),
        mixed=bool(blended and rng.random() < 0.4),
    )


def _draw_warp(rng: np.random.Generator, kind: str) -> Warp:
    if kind == "source_warp":
        grows = rng.random() < 0.65
        return Warp(factor=_log_uniform(rng, 0.4, 1.6) if grows else -rng.uniform(0.3, 0.6))
    factor = rng.uniform(0.25, 0.6) * (1 if rng.random() < 0.7 else -1)
    return Warp(factor=factor, sway=rng.uniform(0.0, 0.3), shift=rng.uniform(0.0, 0.35))


def _around(image: np.ndarray, foreground: np.ndarray, row: int, column: int, radius: float) -> tuple[float, float]:
    """Mean at the lesion and contrast around it: the tissue within one and within two radii."""
    boxes = []
    for reach in (max(1, int(radius)), max(2, int(2 * radius))):
        boxes.append(np.s_[max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1])
    near, wide = boxes
    tissue = image[near][foreground[near]]
    return float(tissue.mean()) if tissue.size else 0.5, local_contrast(image[wide], foreground[wide])


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _choose(rng: np.random.Generator, weights: Mapping[str, float]) -> str:
    names = list(weights)
    ends = np.cumsum([weights[name] for name in names])
    return names[int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))]
