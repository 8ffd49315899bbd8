"""Small random towers for tests, and reproducible random weights for towers of any size."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

TINY_CONFIGS: dict[str, dict] = {
    "tiny": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 64, "layers": 4, "width": 32, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
    },
    "tiny-resnet": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "patch_size": None},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
    },
}


@torch.no_grad()
def randomise(model: nn.Module, generator: torch.Generator, names: Iterable[str] | None = None) -> None:
    """Draw weights anew from a generator, so that a random tower is the same one in every process.

    Args:
        model: Any open_clip model on the CPU.
        generator: Draws the weights.
        names: Parameters to draw; all of them if None.
    """
    wanted = None if names is None else set(names)
    for name, weight in sorted(model.named_parameters()):
        if wanted is not None and name not in wanted:
            continue
        if weight.ndim >= 2:
            weight.normal_(std=weight[0].numel() ** -0.5, generator=generator)  # keeps the scale of its input
        elif name.endswith("class_embedding"):
            weight.normal_(std=weight.numel() ** -0.5, generator=generator)
        elif name.endswith("bias"):
            weight.zero_()
        elif name.endswith(("weight", "gamma")):  # norm layers and layer scale
            weight.fill_(1.0)
