"""Multi-level patch features of any open_clip image tower, and where LoRA can go in it."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fmclip.errors import TowerError
from fmclip.towers.ahead import Ahead, at_every_place
from fmclip.towers.taps import Place, Tap, index_of, tapping

DEPTHS = (1 / 2, 3 / 4, 1.0)  # layers J of a transformer: 12, 18 and 24 of 24 (FusionMedCLIP section 3)
N_SCALES = len(DEPTHS)


@dataclass(frozen=True)
class Level:
    """One level of patch features.

    Attributes:
        name: What a person calls it: "block 12" or "stride 8".
        place: Where in the tower.
        width: Channels C_j.
        grid: Rows and columns (H_j, W_j).
    """

    name: str
    place: Place
    width: int
    grid: tuple[int, int]


class Features(nn.Module):
    """The image tower from its input to the deepest level asked for; nothing above that is run.

    Patch tokens are the plain outputs of the blocks: no final norm, which was trained for the last block only.

    Args:
        visual: Image tower; where there are taps it gets hooks, so it must be a copy of one's own (`share`).
        places: Of the levels; None takes all that the tower itself lists.
    """

    def __init__(self, visual: nn.Module, places: Sequence[Place] | None) -> None:
        super().__init__()
        self.visual: Any = visual
        self.places = places
        self.indices = None if places is None else sorted({index_of(place) for place in places})
        self.taps = [place for place in places or () if isinstance(place, Tap)]
        for tap in self.taps:
            tap.listen(visual)
        self.ahead = nn.ModuleDict(  # names of modules hold no dots
            {
                str(row): at_every_place(share(visual.get_submodule(place.block)))
                for row, place in enumerate(places or ())
                if isinstance(place, Ahead)
            }
        )

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Return one [B, C_j, H_j, W_j] for each level, from normalised pixels [B, 3, S, S]."""
        if self.places is None or self.indices is None or not (self.taps or self.ahead):
            return self._intermediates(pixels)
        with tapping() as tapped:
            found = self._intermediates(pixels)
        own = dict(zip(self.indices, found, strict=True))
        levels = []
        for row, place in enumerate(self.places):
            if isinstance(place, Tap):
                levels.append(place.read(tapped))
            else:
                level = own[index_of(place)]
                levels.append(self.ahead[str(row)](level) if isinstance(place, Ahead) else level)
        return levels

    def _intermediates(self, pixels: Tensor) -> list[Tensor]:
        from open_clip.modified_resnet import ModifiedResNet

        # ModifiedResNet reads `stop_early` the other way round: it cuts its stages when told not to stop
        stop_early = not isinstance(self.visual, ModifiedResNet)
        out = self.visual.forward_intermediates(
            pixels, indices=self.indices, stop_early=stop_early, intermediates_only=True, output_fmt="NCHW"
        )
        return out["image_intermediates"]


def share(module: nn.Module) -> nn.Module:
    """Copy a module's structure around the very same parameters and buffers.

    Args:
        module: Any module.

    Returns:
        New modules whose tensors are those of `module`.
    """
    memo = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo)


def run_shapes(module: nn.Module, image_size: int) -> list[Tensor]:
    """Run `module` on shapes alone (meta tensors): costs milliseconds for any size of tower.

    Args:
        module: Takes pixels [1, 3, S, S].
        image_size: S.

    Returns:
        What `module` returns, without data.
    """
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    shapes = {name: torch.empty_like(t, device="meta") for name, t in tensors.items()}
    with torch.no_grad():
        return torch.func.functional_call(module, shapes, (torch.empty(1, 3, image_size, image_size, device="meta"),))


def all_levels(visual: nn.Module, image_size: int) -> tuple[Literal["transformer", "cnn"], list[Level]]:
    """List every level that a tower can give.

    Args:
        visual: open_clip image tower.
        image_size: Side S of its input in pixels.

    Returns:
        "transformer" where all levels have one grid, else "cnn" (a pyramid), and the levels from shallow to deep.

    Raises:
        TowerError: The tower gives no intermediate features.
    """
    try:
        maps = run_shapes(Features(visual, None), image_size)
    except (AttributeError, NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        raise TowerError("This image tower gives no intermediate patch features; choose another tower.") from error
    grids = [(m.shape[2], m.shape[3]) for m in maps]
    kind: Literal["transformer", "cnn"] = "transformer" if len(set(grids)) == 1 else "cnn"
    names = [f"block {i + 1}" if kind == "transformer" else f"stride {image_size // g[0]}" for i, g in enumerate(grids)]
    levels = [Level(name, i, m.shape[1], g) for i, (name, m, g) in enumerate(zip(names, maps, grids, strict=True))]
    return kind, levels


def default_levels(kind: str, levels: list[Level]) -> tuple[Level, ...]:
    """Pick the levels J: depths 1/2, 3/4 and 1 of a transformer, the last three scales of a pyramid (8, 16, 32).

    Args:
        kind: "transformer" or "cnn".
        levels: All levels, from shallow to deep.

    Returns:
        At most three levels, from shallow to deep.
    """
    if kind == "transformer":
        places = sorted({max(1, round(depth * len(levels))) - 1 for depth in DEPTHS})
        return tuple(levels[place] for place in places)
    deepest = {level.grid: level for level in levels}  # the last level of each scale
    return tuple(deepest.values())[-N_SCALES:]


def adaptable_layers(visual: nn.Module, places: Sequence[Place], image_size: int) -> list[list[str]]:
    """Find the layers that LoRA can reach, one list a block, see `blocks_in_order`."""
    return list(blocks_in_order(visual, places, image_size).values())


def blocks_in_order(visual: nn.Module, places: Sequence[Place], image_size: int) -> dict[str, list[str]]:
    """Find the blocks and their layers that LoRA can reach: linears and 1x1 convolutions that features run through.

    Layers are found by running the tower on shapes: a layer that is skipped, or whose weights are used without calling
    it, would get no gradient and is left out.

    Args:
        visual: open_clip image tower.
        places: Of the levels in use; layers above the deepest one are left out.
        image_size: Side S of the input in pixels.

    Returns:
        Names of the layers by the name of their block, in the order in which the blocks run.
    """
    blocks: dict[str, list[str]] = {}

    def note(name: str) -> None:
        layers = blocks.setdefault(block_name(name), [])
        if name not in layers:
            layers.append(name)

    probe = share(visual)  # other threads may be running the tower itself
    for name, module in probe.named_modules():
        if is_adaptable(module) and block_name(name):
            module.register_forward_pre_hook(lambda _module, _args, name=name: note(name))
    run_shapes(Features(probe, places), image_size)
    return blocks


def is_adaptable(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer or a 1x1 convolution of all channels."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def block_name(layer: str) -> str:
    """Return the block that a layer belongs to: "layer1.0" for "layer1.0.downsample.0"; "" outside the blocks."""
    found = re.match(r"(.*?\.\d+(?:\.(?:blocks\.)?\d+)*)\.", layer)
    return found[1] if found else ""


def square_side(visual: Any) -> int:
    """Side of an image tower's input in pixels.

    Raises:
        TowerError: The input is not square.
    """
    size = visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise TowerError(f"This image tower takes {height} x {width} pixels; only square inputs are supported.")
    return int(height)
