"""The image tower in half the bits, for the GPUs that compute with them many times faster."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fmclip.towers.taps import Place, Tap
from fmclip.towers.vision import Features, share


def prefers_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 by itself, and faster."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def preferred_backend(device: torch.device) -> str | None:
    """Compiler for towers without LoRA on a device: none, unless `FMCLIP_COMPILE=1` says that waiting for it pays."""
    return "inductor" if device.type == "cuda" and os.environ.get("FMCLIP_COMPILE") == "1" else None


def rounded(visual: nn.Module) -> nn.Module:
    """Copy an image tower's structure with the frozen weights of linears and convolutions rounded to bfloat16.

    Casting them in every forward pass would cost as much memory traffic as the pass itself. What is trained (LoRA)
    stays the very same float32 tensor, norms and embeddings too.

    Args:
        visual: Image tower; left untouched.

    Returns:
        To be run under autocast.
    """
    memo: dict[int, object] = {id(tensor): tensor for tensor in (*visual.parameters(), *visual.buffers())}
    for module in visual.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            for weight in module.parameters(recurse=False):
                if not weight.requires_grad:
                    memo[id(weight)] = nn.Parameter(weight.detach().bfloat16(), requires_grad=False)
    half = copy.deepcopy(visual, memo)
    layers: list[Any] = [module for module in half.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer.cast_input_dtype_enabled = False  # autocast does; peft would go through float32
    return half


class FeatureRunner:
    """Runs an image tower to its levels, the way that was chosen for it.

    Args:
        visual: Image tower.
        places: Of the levels in use.
        bf16: Whether to compute in bfloat16; the levels come out as float32 all the same.
        backend: Compiler of `torch.compile`, or None for none; a first call then takes tens of seconds.

    Attributes:
        source: The tower that it was made for.
        visual: What is run: that tower itself or its rounded copy.
    """

    def __init__(self, visual: nn.Module, places: Sequence[Place], *, bf16: bool, backend: str | None) -> None:
        self.source = visual
        self.visual = rounded(visual) if bf16 else visual
        if self.visual is visual and any(isinstance(place, Tap) for place in places):
            self.visual = share(visual)  # it gets hooks
        self._places = places
        self._bf16 = bf16
        self._backend = backend
        self._features: dict[int, Any] = {}  # by the number of levels

    def __call__(self, pixels: Tensor, levels: int | None = None) -> list[Tensor]:
        """Normalised pixels [B, 3, S, S] -> one [B, C_j, H_j, W_j] for each of the first `levels` levels."""
        places = self._places[:levels]
        run = self._features.get(len(places))
        if run is None:
            run = Features(self.visual, places)
            run = self._features[len(places)] = (
                run if self._backend is None else torch.compile(run, backend=self._backend)
            )
        if not self._bf16:
            return run(pixels)
        with torch.autocast(pixels.device.type, torch.bfloat16):
            return [level.float() for level in run(pixels)]
