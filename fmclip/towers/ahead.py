"""What the next, coarser scale of a CNN makes of patches, without its coarser grid.

The first block of a scale halves the grid. Without that step, and with what comes behind it dilated, it gives the same
features at every place of the finer grid (Yu and Koltun 2016; DeepLab, Chen et al. 2018). They say better where an
anomaly lies than those of the scale before (benchmarks/NOTES.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

PROBED = 24  # places a side of the noise on which a block is compared with itself
MARGIN = 3  # places of the coarser grid at its edge, where paddings differ
REFUSALS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
"""What modules raise at sizes that they were not made for."""
TOLERANCE = 0.1  # of the spatial deviation: squeeze-and-excitation averages over other places, and nothing else may


@dataclass(frozen=True)
class Ahead:
    """A place behind a level: the first block of the next scale, on the grid of the level.

    Attributes:
        block: Name of the block in the image tower.
        index: The tower's intermediate features that the block reads.
    """

    block: str
    index: int


def at_every_place(block: nn.Module) -> nn.Module:
    """Take the step over every second place out of a block, in place; see `agrees` for whether that was all.

    Args:
        block: Its first convolution or pooling with a stride of 2 halves the grid; beside it there may be a shortcut.

    Returns:
        The block.
    """
    is_behind = False
    for name, module in [*block.named_modules()]:
        if isinstance(module, nn.Conv2d) and max(module.stride) > 1:
            module.stride = (1, 1)
            is_behind |= max(module.kernel_size) > 1  # a 1 x 1 convolution is the shortcut's
        elif isinstance(module, nn.Conv2d) and is_behind and max(module.kernel_size) > 1:
            module.dilation = tuple(2 * one for one in module.dilation)
            if not isinstance(module.padding, str):
                module.padding = tuple(2 * one for one in module.padding)
        elif isinstance(module, nn.AvgPool2d) and module.kernel_size == module.stride == 2:
            block.set_submodule(name, nn.Sequential(nn.ReplicationPad2d((0, 1, 0, 1)), nn.AvgPool2d(2, 1)))
            is_behind |= "." not in name  # else of the shortcut
    return block


@torch.no_grad()
def agrees(block: nn.Module, everywhere: nn.Module, width: int) -> bool:
    """Tell whether a block gives at every place what it gives at every second one, on noise and away from the edge.

    Args:
        block: As it is in the tower.
        everywhere: A copy after `at_every_place`.
        width: Channels that it reads.
    """
    device = next(block.parameters()).device
    noise = torch.randn(1, width, PROBED, PROBED, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        coarse, fine = block(noise), everywhere(noise)
    except REFUSALS:
        return False
    if coarse.ndim != 4 or 2 * coarse.shape[2] != PROBED or fine.shape[2:] != noise.shape[2:]:
        return False
    spread = _inner(coarse).std(dim=(2, 3)).mean()
    apart = [(_inner(fine[:, :, top::2, left::2]) - _inner(coarse)).abs().mean() for top in (0, 1) for left in (0, 1)]
    return bool(min(apart) <= TOLERANCE * spread)


def _inner(maps: Tensor) -> Tensor:
    return maps[:, :, MARGIN:-MARGIN, MARGIN:-MARGIN]
