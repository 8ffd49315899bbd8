"""Features of the synthetic pool while LoRA is trained: what the frozen blocks make of a picture is computed once."""

from __future__ import annotations

import torch
from torch import Tensor

from fmclip.detectors.base import forward_passes
from fmclip.towers import Tower
from fmclip.towers.norms import with_frozen_norms
from fmclip.towers.prefix import cut_tower


class PoolFeatures:
    """Features of pictures that are seen again and again.

    The pool is drawn from in shuffled passes, so that each picture comes back in every pass; LoRA and its dropout act
    behind the frozen blocks alone. Nothing is computed before it is needed. What is kept stays in place, where a
    recorded step reads it.

    Args:
        adapted: Tower with LoRA.
        pixels: [P, 3, S, S] in [0, 1] on the tower's device.
        levels: How many levels are wanted.
        keeps: Whether there is memory to keep the outputs of the frozen blocks in.

    Attributes:
        tower: The one that runs: its dropout is to be switched on and off.
    """

    def __init__(self, adapted: Tower, pixels: Tensor, levels: int, *, keeps: bool) -> None:
        self._pixels, self._levels = pixels, levels
        self._prefix = cut_tower(adapted, levels) if keeps else None
        self.tower = self._prefix.rest if self._prefix else adapted
        if adapted.device.type == "cpu":
            self.tower = with_frozen_norms(self.tower)
        if self._prefix:
            self._prefix.rest = self.tower
        self._kept: list[Tensor] = []
        self._is_kept = torch.zeros(len(pixels), dtype=torch.bool)

    def prepare(self, rows: Tensor) -> None:
        """Run the frozen blocks over those of the rows [b], on the CPU, that were not seen before."""
        new = rows[~self._is_kept[rows]].unique()
        if self._prefix is None or len(new) == 0:
            return
        for some in forward_passes(len(new), self._pixels.device):
            places = new[some].to(self._pixels.device)
            begun = self._prefix.begin(self._pixels[places])
            if not self._kept:
                self._kept = [one.new_empty(len(self._pixels), *one.shape[1:]) for one in begun]
            for kept, one in zip(self._kept, begun, strict=True):
                kept[places] = one
        self._is_kept[new] = True

    def __call__(self, rows: Tensor) -> list[Tensor]:
        """Features of rows [b], on the device, that were prepared: [b, C_j, H_j, W_j] of each level."""
        if self._prefix is None:
            return self.tower.features(self._pixels[rows], self._levels)
        return self._prefix.features(self._pixels[rows], [one[rows] for one in self._kept])
