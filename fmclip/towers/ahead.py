"""What the next, coarser scale of a CNN makes of patches, without its coarser grid.

The first block of a scale halves the grid. With its strides set to 1 it sees the same surroundings at every place of
the finer grid: a dilated network (Yu and Koltun 2016; DeepLab, Chen et al. 2018) that ends behind that block. Its
features say better where an anomaly lies than those of the scale before (benchmarks/NOTES.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Ahead:
    """A place behind a level: the first block of the next scale, on the grid of the level.

    Attributes:
        block: Name of the block in the image tower.
        index: The tower's intermediate features that the block reads.
    """

    block: str
    index: int


def without_strides(block: nn.Module) -> nn.Module:
    """Set all strides of a block to 1, in place; whoever does so looks whether the grid is kept then."""
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
        elif isinstance(module, (nn.AvgPool2d, nn.MaxPool2d)) and module.stride != 1:
            module.kernel_size, module.stride, module.padding = 3, 1, 1  # as wide as it was, and centred
    return block
