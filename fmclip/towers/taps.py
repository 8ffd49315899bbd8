"""Features from inside a CNN's stages, where its own list of intermediate features has nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmclip.towers.ahead import Ahead

SKETCH = 128
"""Channels to which hidden activations are brought; more bring nothing (benchmarks/NOTES.md)."""

_TAPPED: ContextVar[dict[str, Tensor]] = ContextVar("tapped")  # safe where threads share a tower


@dataclass(frozen=True)
class Tap:
    """A place inside a CNN.

    Attributes:
        module: Name of a module of the image tower.
        index: The first of the tower's intermediate features behind it: the tower must run that far.
        is_input: Whether the module's input is wanted, brought to `SKETCH` channels, and not its output.
    """

    module: str
    index: int
    is_input: bool = False

    def listen(self, visual: nn.Module) -> None:
        """Put a hook into an image tower, which writes to what `tapping` gives."""

        def note(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor | None = None) -> None:
            tapped = _TAPPED.get(None)  # none where activations are computed again for the backward pass
            if tapped is not None:
                tapped[self.module] = args[0] if out is None else out

        module = visual.get_submodule(self.module)
        if self.is_input:
            module.register_forward_pre_hook(note)
        else:
            module.register_forward_hook(note)

    def read(self, tapped: dict[str, Tensor]) -> Tensor:
        """Take [B, C, H, W] from what was tapped while the tower ran."""
        return sketch(tapped[self.module]) if self.is_input else tapped[self.module]


Place: TypeAlias = int | Tap | Ahead
"""Where features are taken: one of the tower's own intermediate features, a tap, or a block behind one of them."""


@contextmanager
def tapping() -> Iterator[dict[str, Tensor]]:
    """Collect what hooks see while a tower runs in this thread: outputs and inputs by the name of their module."""
    tapped: dict[str, Tensor] = {}
    reset = _TAPPED.set(tapped)
    try:
        yield tapped
    finally:
        _TAPPED.reset(reset)


def index_of(place: Place) -> int:
    """How far the tower must run: the place's own or the next of its intermediate features."""
    return place if isinstance(place, int) else place.index


def sketch(features: Tensor) -> Tensor:
    """Bring many channels to `SKETCH` by fixed orthonormal mixtures of all: [B, C, H, W] -> [B, min(C, SKETCH), H, W].

    Distances stay what they are but for a common factor and some scatter (Johnson and Lindenstrauss). The mixtures are
    cosines over the channels, whose order means nothing, and leave out their mean.
    """
    C = features.shape[1]
    if C <= SKETCH:
        return features
    place, frequency = torch.arange(C, device=features.device), torch.arange(1, SKETCH + 1, device=features.device)
    mixtures = math.sqrt(2 / C) * torch.cos(math.pi / (2 * C) * (2 * place + 1) * frequency[:, None])  # [SKETCH, C]
    return F.conv2d(features, mixtures[:, :, None, None].to(features))
