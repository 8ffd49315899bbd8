"""The levels of a tower at which patches are compared with patches; chosen on the tuning half (benchmarks/NOTES.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fmclip.towers.ahead import Ahead, agrees, at_every_place
from fmclip.towers.taps import SKETCH, Tap
from fmclip.towers.vision import Features, Level, block_name, blocks_in_order, is_adaptable, run_shapes, share


def patch_levels(visual: nn.Module, kind: str, levels: Sequence[Level], image_size: int) -> tuple[Level, ...]:
    """Pick the levels at which patches are compared with patches.

    Of a transformer these are `levels`. Of a pyramid all lie on one grid, that of the deepest scale that is at least
    half as fine as the finest of `levels`: its block at a quarter of its depth, that at three quarters and its last. Of
    the second the hidden activations are taken where they are wider than the output (inverted bottlenecks): a block
    hands on a narrow summary of what it sees.

    Args:
        visual: open_clip image tower.
        kind: "transformer" or "cnn".
        levels: The levels J, from shallow to deep.
        image_size: Side S of the input in pixels.

    Returns:
        The levels, from shallow to deep; where that scale has fewer than four blocks, those of `levels` that are at
        least half as fine as the finest. Of a pyramid with a scale beyond, then one that looks ahead (`towers.ahead`).
    """
    finest = max(rows for rows, _ in (level.grid for level in levels))
    scales = tuple(level for level in levels if 2 * level.grid[0] >= finest)
    last = scales[-1]
    if kind == "transformer" or not isinstance(last.place, int):
        return scales
    ahead = [_level_ahead(visual, last, level, image_size) for level in levels[len(scales) : len(scales) + 1]]
    beyond = [level for level in ahead if level is not None]
    blocks = _blocks_at(visual, last, image_size)
    if len(blocks) < 4:
        return (*scales, *beyond)
    quarter, three_quarters = (math.ceil(len(blocks) * depth) for depth in (1 / 4, 3 / 4))
    first, second = blocks[quarter - 1], blocks[three_quarters - 1]
    shallow = Level(f"{last.name}, block {quarter}", Tap(first.name, last.place), first.width, last.grid)
    if second.inner_width <= second.width:
        middle = Level(f"{last.name}, block {three_quarters}", Tap(second.name, last.place), second.width, last.grid)
    else:
        tap = Tap(second.projection, last.place, is_input=True)
        middle = Level(f"{last.name}, inside block {three_quarters}", tap, min(second.inner_width, SKETCH), last.grid)
    return (shallow, middle, last, *beyond)


def _level_ahead(visual: nn.Module, last: Level, following: Level, image_size: int) -> Level | None:
    """The first block behind `last`, on its grid; None where no block reads just that, or where it is another there."""
    assert isinstance(last.place, int)
    readers: list[tuple[str, Any]] = []
    probe = share(visual)  # other threads may be running the tower itself
    names = list(blocks_in_order(visual, [following.place], image_size))
    for name in names:
        probe.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, name=name: readers.append((name, args[0] if len(args) == 1 else None))
        )
    found = run_shapes(Features(probe, [last.place, following.place]), image_size)
    for name, given in readers:
        if given is not found[0] or any(other.startswith(f"{name}.") for other in names):  # a stage holds other blocks
            continue
        block = visual.get_submodule(name)
        if not agrees(share(block), at_every_place(share(block)), last.width):
            return None
        place = Ahead(name, last.place)
        *_, shown = run_shapes(Features(share(visual), [last.place, place]), image_size)
        return Level(f"{following.name} on the grid of {last.name}", place, shown.shape[1], last.grid)
    return None


@dataclass
class _Block:
    """A block of a CNN: its name, the width of its output, and the name and the input's width of its last 1x1 layer."""

    name: str
    width: int
    projection: str = ""
    inner_width: int = 0


def _blocks_at(visual: nn.Module, level: Level, image_size: int) -> list[_Block]:
    """List the blocks whose output has the grid of a level, in the order in which they run."""
    blocks: dict[str, _Block] = {}
    inner: dict[str, tuple[str, int]] = {}
    probe = share(visual)  # other threads may be running the tower itself

    def note_output(name: str, out: Any) -> None:
        if isinstance(out, Tensor) and out.ndim == 4 and tuple(out.shape[2:]) == level.grid:
            blocks[name] = _Block(name, out.shape[1], *inner.get(name, ("", 0)))

    def note_input(name: str, given: Tensor) -> None:
        inner[block_name(name)] = name, given.shape[1]

    for name in blocks_in_order(visual, [level.place], image_size):
        probe.get_submodule(name).register_forward_hook(lambda _m, _args, out, name=name: note_output(name, out))
    for name, module in probe.named_modules():
        if isinstance(module, nn.Conv2d) and is_adaptable(module):
            module.register_forward_pre_hook(lambda _m, args, name=name: note_input(name, args[0]))
    run_shapes(Features(probe, [level.place]), image_size)
    return list(blocks.values())
