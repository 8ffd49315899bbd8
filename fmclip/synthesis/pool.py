"""A pool of synthetic training pairs made from a handful of normal scans.

FusionMedCLIP sections 3.4 and 4.2. Every pair can be made again from its record and the normal scans.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from fmclip.synthesis.anomaly import TASKS, Anomaly, apply
from fmclip.synthesis.augmentation import View, apply_view, draw_view
from fmclip.synthesis.sampler import AnomalySampler, SynthesisConfig, numpy_generator


@dataclass(frozen=True, eq=False)
class SyntheticScan:
    """One training pair.

    Attributes:
        image: Float32 [S, S, 3] in [0, 1]; to be read only, since the channels of a grey one may share their memory.
        mask: Bool [S, S], the anomaly's pixels; all False for a normal scan.
        anomaly: What was synthesised; None for a normal scan.
        source: Index of the normal scan it was made from.
        view: How the normal scan was varied first; None if it was not.
    """

    image: np.ndarray
    mask: np.ndarray
    anomaly: Anomaly | None
    source: int
    view: View | None = None

    @property
    def sources(self) -> tuple[int, int]:
        """Indices of the normal scans that it holds parts of: `source`, and the donor of a pasted patch or -1."""
        patch = self.anomaly.patch if self.anomaly else None
        return self.source, patch.source if patch else -1

    def to_dict(self) -> dict[str, Any]:
        """The record to `replay` the pair from: plain numbers, strings and dicts, ready for JSON."""
        return {
            "source": self.source,
            "view": asdict(self.view) if self.view else None,
            "anomaly": self.anomaly.to_dict() if self.anomaly else None,
        }


def synthesise_pool(
    images: Sequence[np.ndarray],
    contents: Sequence[np.ndarray],
    n: int,
    generator: torch.Generator,
    config: SynthesisConfig | None = None,
) -> list[SyntheticScan]:
    """Make `n` training pairs from normal scans.

    Every task of {identity, structural, density, deformation} has the same probability for each pair, and every normal
    scan likewise; both are dealt like shuffled cards, so that a small pool is balanced too.

    Args:
        images: k normal scans, float32 [S, S, 3] each, letterboxed.
        contents: Their content masks, bool [S, S] each.
        n: Number of pairs.
        generator: Source of randomness; the same seed gives the same pool, bit for bit.
        config: What to draw.

    Returns:
        `n` pairs in random order.

    Raises:
        ValueError: If there are no scans, a mask is missing, or a shape or dtype is wrong.
    """
    if len(images) == 0 or len(images) != len(contents):
        raise ValueError(f"need at least one scan and a content mask for each, got {len(images)} and {len(contents)}")
    sampler = AnomalySampler(config)
    pairs = zip(*deal(len(images), n, generator), strict=True)
    return [_make(sampler, images, contents, TASKS[task], int(source), int(seed)) for task, source, seed in pairs]


def replay(record: dict[str, Any], images: Sequence[np.ndarray], contents: Sequence[np.ndarray]) -> SyntheticScan:
    """Make a pair again from its record.

    Args:
        record: From `SyntheticScan.to_dict`, also after a round trip through JSON.
        images: The same normal scans as then.
        contents: Their content masks.

    Returns:
        The same pair, bit for bit.
    """
    source = record["source"]
    view = View(**record["view"]) if record["view"] else None
    image, content = images[source], contents[source]
    if view:
        image = apply_view(view, image, content)
    if record["anomaly"] is None:
        return SyntheticScan(image.copy(), np.zeros(content.shape, bool), None, source, view)
    anomaly = Anomaly.from_dict(record["anomaly"])
    picture, mask = apply(anomaly, image, content, images)
    return SyntheticScan(picture, mask, anomaly, source, view)


def _make(
    sampler: AnomalySampler,
    images: Sequence[np.ndarray],
    contents: Sequence[np.ndarray],
    task: str,
    source: int,
    seed: int,
) -> SyntheticScan:
    """One pair; it depends on its own seed only, not on the pairs before it."""
    rng = np.random.default_rng(seed)
    augmentation = sampler.config.augmentation
    view = draw_view(augmentation, rng) if augmentation else None
    image = apply_view(view, images[source], contents[source]) if view else images[source]
    picture, mask, anomaly = sampler.synthesise(rng, image, contents[source], images, task)
    return SyntheticScan(picture, mask, anomaly, source, view)


def deal(references: int, n: int, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `n` pairs the place of its task in `TASKS`, its normal scan and its own seed: int [n] each."""
    rng = numpy_generator(generator)
    tasks, sources = _deal(len(TASKS), n, rng), _deal(references, n, rng)
    return tasks, sources, rng.integers(2**62, size=n)


def _deal(kinds: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """`n` numbers below `kinds`, each as often as the others (give or take one, by chance), shuffled. Int [n]."""
    rounds = [rng.permutation(kinds) for _ in range(-(-n // kinds))]
    dealt = np.concatenate(rounds)[:n] if rounds else np.zeros(0, np.intp)
    return rng.permutation(dealt)
