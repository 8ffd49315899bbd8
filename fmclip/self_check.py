"""How well anomalies that nobody trained on are found: synthetic ones, made on the references and held out of the pool.

It says whether training helped on *synthetic* anomalies. Real findings look different: it is no estimate of how many of
those are found, and the page names it synthetic.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fmclip.calibration import distinct
from fmclip.detectors import Detector
from fmclip.detectors.base import forward_passes, to_pixels
from fmclip.detectors.events import ignore
from fmclip.detectors.synthetic import stack_pictures, synthesise_scans
from fmclip.maps import resize_map
from fmclip.patch_grid import grid_of
from fmclip.scans import Scan
from fmclip.towers import Tower

NORMALS, ANOMALIES = 8, 16
SEED_STEP = 1_000_003
"""Added to the seed of the fit, so that nothing of the training pool is drawn again."""
BUDGET_SECONDS = 8.0
"""No further batch is begun after this; what has been looked at by then counts."""


@dataclass(frozen=True)
class SelfCheck:
    """What a state makes of held-out synthetic scans.

    Attributes:
        stage: Whose answer it is ("patch memory", "stage 2", "stage 3").
        image_auroc: How well scores tell scans with an anomaly from unchanged ones: 0.5 is chance, 1 perfect.
        pixel_auroc: How well maps tell the anomaly's pixels from those around it; mean over the anomalies.
        anomalies: How many anomalies were looked at.
        normals: How many unchanged scans.
    """

    stage: str
    image_auroc: float
    pixel_auroc: float
    anomalies: int
    normals: int


@dataclass(frozen=True)
class HeldOut:
    """Synthetic scans that no training sees, normal and abnormal ones in turn.

    Attributes:
        pixels: [n, 3, S, S] in [0, 1], on the tower's device.
        content: [n, S, S] bool.
        masks: [n, S, S] bool on the CPU; empty for an unchanged scan.
        sources: [n] index of the (distinct) reference that each was made from.
    """

    pixels: Tensor
    content: Tensor
    masks: Tensor
    sources: Tensor

    @classmethod
    def make(cls, normals: Sequence[Scan], tower: Tower, scan_type: str, seed: int) -> HeldOut:
        """Synthesise them on the references of a fit.

        Args:
            normals: The reference scans.
            tower: Says how large the pictures are.
            scan_type: What the scans show.
            seed: Of the fit.
        """
        pixels, content, _ = to_pixels(distinct(normals), tower)
        generator = torch.Generator().manual_seed(seed + SEED_STEP)
        pool = synthesise_scans(pixels, content, scan_type, 4 * NORMALS, generator, ignore).scans
        normal = [scan for scan in pool if scan.anomaly is None][:NORMALS]
        abnormal = [scan for scan in pool if scan.anomaly is not None][:ANOMALIES]
        share = ANOMALIES // NORMALS
        mixed = [
            one for place, scan in enumerate(normal) for one in (scan, *abnormal[share * place : share * place + share])
        ]
        sources = torch.tensor([scan.source for scan in mixed], device=pixels.device)
        masks = torch.from_numpy(np.stack([scan.mask for scan in mixed]))
        return cls(stack_pictures(mixed).to(pixels.device), content[sources], masks, sources)

    def first(self, count: int) -> HeldOut:
        """Only the first ones: every stage is to be asked about the same scans."""
        return HeldOut(self.pixels[:count], self.content[:count], self.masks[:count], self.sources[:count])


@torch.no_grad()
def check(detector: Detector, held: HeldOut, stage: str, go_on: Callable[[], bool]) -> SelfCheck | None:
    """Look at the held-out scans with what was learned, each without its own reference where the method can do that.

    Args:
        detector: In a good state.
        held: The scans.
        stage: Whose state it is.
        go_on: Asked between batches; may hand the device over to others.

    Returns:
        The check; None if it was ended before both kinds of scans were seen.
    """
    started = time.monotonic()
    scores: list[float] = []
    found: list[float] = []
    for batch in forward_passes(len(held.masks), held.pixels.device):
        if not go_on() or (scores and time.monotonic() - started > BUDGET_SECONDS):
            break
        maps, some = detector.predict_synthetic(held.pixels[batch], held.content[batch], held.sources[batch])
        scores += some.tolist()
        for heat, mask, content in zip(maps.cpu(), held.masks[batch], held.content[batch].cpu(), strict=True):
            if mask.any():
                fine = resize_map(heat[None], grid_of(mask))[0]
                found.append(auroc(fine[content].numpy(), mask[content].numpy()))
    truth = held.masks[: len(scores)].flatten(1).any(dim=1).numpy()
    if not scores or truth.all() or not truth.any():
        return None
    return SelfCheck(
        stage, auroc(np.array(scores), truth), float(np.mean(found)), int(truth.sum()), int((~truth).sum())
    )


def auroc(scores: np.ndarray, truth: np.ndarray) -> float:
    """Area under the ROC curve, the share of pairs in order (Mann-Whitney): scores [n], truth [n] bool, both kinds."""
    normals, abnormals = np.sort(scores[~truth]), scores[truth]
    below, not_above = (np.searchsorted(normals, abnormals, side) for side in ("left", "right"))
    return float((below + not_above).mean() / (2 * len(normals)))  # ties count half
