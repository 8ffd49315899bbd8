"""The two small adapters of FusionMedCLIP: one aligns features with text, the other refines a block's output."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AlignmentAdapter(nn.Module):
    """phi_j: 1x1 convolution from C_j channels to the text width, L2 norm, prompts (section 3.2.3, Eq. 4 to 6).

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

    def forward(self, features: Tensor, prompts: Tensor, temperature: Tensor | float) -> Tensor:
        """Probability of "abnormal" at each place by the cosines of aligned features and prompts (Eq. 4 to 6).

        The D aligned channels are never made: their products with the prompts and their length, by the Gram matrix of
        the projection, are all that Eq. 5 and 6 need of them.

        Args:
            features: [B, C_j, H_j, W_j].
            prompts: [2, D], unit length: normal, abnormal.
            temperature: tau.

        Returns:
            S_a^j [B, H_j, W_j] in [0, 1].
        """
        weight, bias = self.projection.weight.flatten(1), cast(Tensor, self.projection.bias)  # [D, C], [D]
        patches = features.movedim(1, -1)  # [B, H, W, C]
        towards = prompts[1] - prompts[0]  # [D]
        product = patches @ (towards @ weight) + towards @ bias
        square = (patches @ (weight.T @ weight) * patches).sum(dim=-1) + 2 * (patches @ (bias @ weight)) + bias @ bias
        return (product * square.clamp_min(1e-12).rsqrt() / temperature).sigmoid()  # a softmax over two


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
