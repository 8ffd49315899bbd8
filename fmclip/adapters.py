"""The two small adapters of FusionMedCLIP: one aligns features with text, the other refines a block's output."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AlignmentAdapter(nn.Module):
    """phi_j: 1x1 convolution from C_j channels to the text width, then L2 norm (section 3.2.3, Eq. 4 and 5).

    Args:
        channels: C_j.
        text_width: D, width of the prompt embeddings.
        generator: Draws the start.
    """

    def __init__(self, channels: int, text_width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.projection = nn.Conv2d(channels, text_width, kernel_size=1)
        nn.init.normal_(self.projection.weight, std=channels**-0.5, generator=generator)
        nn.init.zeros_(self.projection.bias)  # type: ignore[arg-type]

    @torch.no_grad()
    def start_between(self, prompts: Tensor) -> None:
        """Start where no residual means "normal" and a larger one turns towards "abnormal".

        For inputs |residual| / sqrt(C), whose sum is about sqrt(2 / pi) for the oddest patch of a normal scan: that
        patch gets probability 1/2. Training then finds out which channels matter. A random start would have to learn
        first that size matters, which Eq. 5 hides by its L2 norm; it ends far worse (benchmarks/NOTES.md).

        Args:
            prompts: [2, D], unit length: normal, abnormal.
        """
        towards = (prompts[1] - prompts[0]) / (2 * math.sqrt(2 / math.pi))  # [D]
        self.projection.bias.copy_(prompts[0])  # type: ignore[union-attr]
        self.projection.weight.copy_(towards[:, None, None, None].expand_as(self.projection.weight))

    def forward(self, features: Tensor) -> Tensor:
        """[B, C_j, H_j, W_j] -> [B, D, H_j, W_j], unit length at each place."""
        return F.normalize(self.projection(features), dim=1, eps=1e-6)


class BlockAdapter(nn.Module):
    """alpha_j: bottleneck MLP added to the output of a block (section 3.3.2, Eq. 9); starts as the identity.

    Args:
        channels: C_j.
        bottleneck: Width in between (Table A1: 64).
        dropout: Probability of dropping a bottleneck unit while training (Table A1: 0.1).
        generator: Draws the start.
    """

    def __init__(self, channels: int, bottleneck: int, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, bottleneck, kernel_size=1)
        self.up = nn.Conv2d(bottleneck, channels, kernel_size=1)
        self.dropout = dropout
        nn.init.normal_(self.down.weight, std=channels**-0.5, generator=generator)
        nn.init.zeros_(self.down.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """[B, C_j, H_j, W_j] -> the same shape; a generator switches dropout on and draws it."""
        hidden = F.gelu(self.down(features))  # [B, bottleneck, H_j, W_j]
        if generator is not None and self.dropout > 0:
            keep = (
                torch.rand(hidden.shape, generator=generator, device=generator.device).to(hidden.device) >= self.dropout
            )
            hidden = hidden * keep / (1 - self.dropout)
        return features + self.up(hidden)
