"""Regions of scans that a person calls normal: their patches join the patch memory, the rest of the scan does not.

Nothing is trained again and the threshold stays: it says how new normal scans score, and one place that was marked by
hand says nothing about that. Patches like those of the region are near to the memory from then on, in all scans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fmclip.detectors import Detector
from fmclip.detectors.base import to_pixels
from fmclip.errors import FmclipError
from fmclip.explain import HasPatchMemory
from fmclip.memory import MAX_REGIONS
from fmclip.patch_grid import patch_content
from fmclip.scans import Scan

PAINTED_SHARE = 0.25
"""Share of a patch that must be painted for it to join; where no patch reaches it, those painted most join."""


@dataclass(frozen=True, eq=False)
class NormalRegion:
    """A part of a scan that was looked at and is normal.

    Attributes:
        scan: The scan.
        mask: bool [H, W] on the scan's pixels, not empty.

    Raises:
        FmclipError: Nothing is marked.
        ValueError: The mask is not on the pixels of the scan.
    """

    scan: Scan
    mask: np.ndarray

    def __post_init__(self) -> None:
        if self.mask.shape != (self.scan.height, self.scan.width):
            raise ValueError(f"the mask must be {(self.scan.height, self.scan.width)}, not {self.mask.shape}")
        if not self.mask.any():
            raise FmclipError(f"Nothing is marked on {self.scan.label}: mark the region that is normal first.")


@torch.no_grad()
def mark_normal(detector: Detector, regions: Sequence[NormalRegion], *, keep: int = 0) -> int:
    """Let the patches of regions join a detector's memory, in place of those that joined it before.

    Args:
        detector: A fitted detector with a patch memory (patch_memory, fusionmedclip, guided_memory).
        regions: All regions that are normal from now on.
        keep: Regions that stay, counted from the first that ever joined, such as those of an adapter from a file.

    Returns:
        Patches that joined.

    Raises:
        FmclipError: The detector compares no patches, there are too many regions, or one reaches no patch.
    """
    if not isinstance(detector, HasPatchMemory):
        raise FmclipError(
            f"The method {detector.name} has no memory of patches that a region could join: mark the whole scan as "
            "normal instead, or adapt with fusionmedclip, patch_memory or guided_memory."
        )
    if keep + len(regions) > MAX_REGIONS:
        raise FmclipError(f"More than {MAX_REGIONS} regions are marked as normal: adapt to more normal scans instead.")
    memory = detector.memory_.without_regions(keep)
    before = len(memory.owner)
    for region in regions:
        pixels, content, _ = to_pixels([region.scan], detector.tower)
        features = detector.patch_features(pixels)
        grid = min((int(features[view.level].shape[-2]), int(features[view.level].shape[-1])) for view in memory.views)
        memory = memory.with_region(features, _chosen(region, detector, patch_content(content, grid)))
    detector.memory_ = memory
    return len(memory.owner) - before


def _chosen(region: NormalRegion, detector: Detector, inside: Tensor) -> Tensor:
    """Patches [1, h, w] that a region marks, of those inside the scan [1, h, w]; its neighbours if it lies between."""
    square = to_pixels([Scan(region.mask.astype(np.float32))], detector.tower)[0][:, :1]  # [1, 1, S, S]
    painted = F.adaptive_avg_pool2d(square, (inside.shape[1], inside.shape[2]))[:, 0]  # [1, h, w]
    share = painted * inside
    if share.amax() > 0:
        return inside & (share >= share.amax().clamp(max=PAINTED_SHARE))
    chosen = inside & (F.max_pool2d((painted > 0).float(), 3, stride=1, padding=1) > 0)
    if not chosen.any():
        raise FmclipError(f"The marked region lies on the rim of {region.scan.label}, or is tiny: mark a larger one.")
    return chosen
