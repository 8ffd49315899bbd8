"""The frozen blocks in front of the first one with LoRA: training LoRA does not change what they make of a picture.

Two copies of the tower's structure around the very same tensors share the work: one ends behind the last frozen block,
in the other the frozen blocks hand on what is given instead of computing it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fmclip.towers.ahead import REFUSALS
from fmclip.towers.lora import lora_tensors
from fmclip.towers.taps import Place
from fmclip.towers.vision import Features, block_name, blocks_in_order, share

if TYPE_CHECKING:
    from fmclip.towers.base import Tower

GLANCE = 32  # pixels a side of what most stems have to run over where the blocks behind are told what they give
TOLERANCE = 1e-4  # of the largest feature, between the tower and the one that was cut


class FrozenPrefix:
    """A tower with LoRA, cut behind its frozen blocks; made by `cut_tower`.

    Args:
        head: Runs the frozen blocks.
        rest: Runs the others.
        levels: How many levels are wanted, from the shallowest on.
        side: How much of a picture the others have to be shown, in pixels from its corner.

    Attributes:
        rest: The tower to switch dropout on in, see `Tower.train_lora`; its LoRA is that of the tower that was cut. It
            may be replaced by a copy around the same tensors.
    """

    def __init__(self, head: Tower, rest: Tower, levels: int, side: int) -> None:
        self._head, self.rest, self._levels, self._side = head, rest, levels, side

    @torch.no_grad()
    def begin(self, pixels: Tensor) -> list[Tensor]:
        """Run the frozen blocks: pixels [B, 3, S, S] in [0, 1] -> [B, ...] of each block at which the tower is cut."""
        try:
            self._head.features(pixels, self._levels)
        except _Reached as reached:
            return reached.outputs
        raise AssertionError("the frozen blocks were not run")

    def features(self, pixels: Tensor, begun: Sequence[Tensor]) -> list[Tensor]:
        """Run the others: the pixels again and what `begin` gave for them -> `Tower.features` of so many levels."""
        _give(self.rest._runner.visual, begun)
        if self._side < self.rest.image_size:  # a corner that only says how many pictures there are
            return self.rest._runner(pixels[..., : self._side, : self._side], self._levels)
        return self.rest.features(pixels, self._levels)


def cut_tower(tower: Tower, levels: int) -> FrozenPrefix | None:
    """Cut a tower behind its frozen blocks, and prove the cut on a picture of noise.

    Args:
        tower: With LoRA in training; left untouched.
        levels: How many levels are wanted, from the shallowest on.

    Returns:
        None where LoRA begins in the first block, or where more lies between two blocks than the output of the former.
    """
    visual, places = tower._visual, tower._places[:levels]
    blocks = list(blocks_in_order(visual, places, tower.image_size))
    adapted = {block_name(name) for name in lora_tensors(visual)}
    frozen = blocks[: next((place for place, block in enumerate(blocks) if block in adapted), 0)]
    # a stage with layers of its own looks like a block, and holds others
    frozen = [block for block in frozen if not any(other.startswith(f"{block}.") for other in blocks)]
    if not frozen:
        return None
    pixels = torch.rand(1, 3, tower.image_size, tower.image_size, generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(tower.device)
    expected, outputs = _look(visual, places, frozen, pixels)
    if tower.kind == "transformer":
        ends = {blocks[place] for place in places if isinstance(place, int)}
    else:
        levels_at = {level.data_ptr() for level in expected}
        ends = {block for block, out in outputs.items() if out.data_ptr() in levels_at}
    cuts = [block for block in frozen if block in ends or block == frozen[-1]]  # levels, and where LoRA begins
    rest = share(visual)
    for block in frozen:
        rest.set_submodule(block, _Given() if block in cuts else _Passing())
    _give(rest, [outputs[block] for block in cuts])
    sides = (GLANCE, tower.image_size) if tower.kind != "transformer" else (tower.image_size,)
    for side in sides:
        if _agrees(rest, places, pixels[..., :side, :side], expected):
            return FrozenPrefix(tower._variant(_visual=_head(visual, cuts)), tower._variant(_visual=rest), levels, side)
    return None


class _Reached(Exception):  # noqa: N818  (a signal: the rest of the tower need not run)
    """The frozen blocks have run.

    Attributes:
        outputs: Of the blocks at which the tower is cut.
    """

    def __init__(self, outputs: list[Tensor]) -> None:
        super().__init__()
        self.outputs = outputs


class _Passing(nn.Module):
    """In place of a frozen block whose output nobody reads."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Any shape -> the same."""
        return x


class _Given(nn.Module):
    """In place of a frozen block whose output is known.

    Attributes:
        output: What it gives; set before each run.
    """

    output: Tensor

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Whatever it gets -> `output`."""
        return self.output


def _give(rest: nn.Module, outputs: Sequence[Tensor]) -> None:
    """Say what the frozen blocks would have made of the pictures to come."""
    givers = [module for module in rest.modules() if isinstance(module, _Given)]
    for module, output in zip(givers, outputs, strict=True):
        module.output = output


def _head(visual: nn.Module, cuts: Sequence[str]) -> nn.Module:
    """A tower that ends with `_Reached` behind the last of some blocks."""
    head = share(visual)
    outputs: dict[str, Tensor] = {}

    def note(block: str, out: Tensor) -> None:
        outputs[block] = out
        if block == cuts[-1]:
            found = [outputs.pop(one) for one in cuts]
            raise _Reached(found)

    for block in cuts:
        head.get_submodule(block).register_forward_hook(lambda _module, _args, out, block=block: note(block, out))
    return head


@torch.no_grad()
def _look(
    visual: nn.Module, places: Sequence[Place], blocks: Sequence[str], pixels: Tensor
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Levels of a picture, and what some blocks give for it."""
    seen = share(visual)
    outputs: dict[str, Tensor] = {}
    for block in blocks:
        seen.get_submodule(block).register_forward_hook(
            lambda _module, _args, out, block=block: outputs.update({block: out})
        )
    return Features(seen, places)(pixels), outputs


@torch.no_grad()
def _agrees(rest: nn.Module, places: Sequence[Place], pixels: Tensor, expected: Sequence[Tensor]) -> bool:
    try:
        found = Features(share(rest), places)(pixels)
    except REFUSALS:  # shapes, or a lost tap
        return False
    return all(
        one.shape == other.shape and bool((one - other).abs().max() <= TOLERANCE * other.abs().max())
        for one, other in zip(found, expected, strict=True)
    )
