"""How a training uses its device: nothing here changes what is learned, but for rounding, draws and `keeps_axes`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Acceleration:
    """Ways to be faster, or to need less memory.

    Attributes:
        on_device: Synthetic anomalies are painted on the device, many at a time.
        static_steps: A training step works on buffers that stay where they are, so that a GPU can record it once as a
            graph and replay it; elsewhere the same step is called directly.
        keeps_axes: In stage 3, later looks at the references tell residuals apart along the principal axes of the first
            look instead of new ones each time: a GPU takes longer for an eigendecomposition than for many steps. All
            distances are the same.
        parts: Parts in which a batch goes through the tower, one after the other; the step is that of the whole batch.
        keeps_frozen: What the frozen blocks make of the pool is kept, so that they run once for each picture.
        checkpointing: Activations of the image tower are computed again in the backward pass instead of being kept;
            LoRA's dropout is off then, since it would be drawn anew.
    """

    on_device: bool = False
    static_steps: bool = False
    keeps_axes: bool = False
    parts: int = 1
    keeps_frozen: bool = True
    checkpointing: bool = False

    @classmethod
    def of(cls, device: torch.device) -> Acceleration:
        """What suits a device: all that saves time on a GPU, halves of a batch on a CPU, which take as long."""
        if device.type == "cuda":
            return cls(on_device=True, static_steps=True, keeps_axes=True)
        return cls(parts=2 if device.type == "cpu" else 1)

    def smaller(self, batch_size: int) -> Acceleration | None:
        """The same with less memory: twice as many parts, nothing kept, then checkpointing; None if all is done."""
        if self.parts * 2 <= min(batch_size, 4):
            return replace(self, parts=self.parts * 2, keeps_frozen=False)
        return None if self.checkpointing else replace(self, keeps_frozen=False, checkpointing=True)

    def describe(self) -> str:
        """What is done for want of memory, in words."""
        parts = f"batches in {self.parts} parts" if self.parts > 1 else "whole batches"
        return parts + (", activations computed twice" if self.checkpointing else "")
