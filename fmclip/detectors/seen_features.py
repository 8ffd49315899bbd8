"""Features of scans that a fit looks at again after each stage: queries, and the held-out scans of the self-check."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import torch
from torch import Tensor

from fmclip.towers import Tower

KEPT_BYTES = 64 * 2**20
"""The features that were asked for longest ago are dropped beyond this."""


class SeenFeatures:
    """Features of a frozen tower, kept by the content of the scans; for one fit, so that nothing outlives its visitor.

    Args:
        tower: The tower; on a GPU, where running it again takes less than reading the pixels back, nothing is kept.
    """

    def __init__(self, tower: Tower) -> None:
        self._tower = tower
        self._kept: OrderedDict[tuple[bytes, int | None], list[Tensor]] = OrderedDict()

    @torch.no_grad()
    def features(self, pixels: Tensor, levels: int | None = None) -> list[Tensor]:
        """As `Tower.features`, without gradients: [B, 3, S, S] -> one [B, C_j, H_j, W_j] for each level."""
        if pixels.device.type != "cpu":
            return self._tower.features(pixels, levels)
        keys = [(hashlib.blake2b(one.contiguous().numpy()).digest(), levels) for one in pixels]
        new = [place for place, key in enumerate(keys) if key not in self._kept]
        found = {key: self._kept[key] for key in keys if key in self._kept}
        if new:
            for place, *own in zip(new, *self._tower.features(pixels[new], levels), strict=True):
                found[keys[place]] = self._kept[keys[place]] = [level.clone() for level in own]
        for key in keys:
            self._kept.move_to_end(key)
        while sum(level.nbytes for own in self._kept.values() for level in own) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return [torch.stack(level) for level in zip(*(found[key] for key in keys), strict=True)]
