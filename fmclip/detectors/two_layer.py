"""Two layers on frozen features: the supervised baseline of ConRAD's README.

The README says no more than "a simple two-layer finetuning methodology". Here a two-layer perceptron reads the features
of all levels J at each place and says how abnormal the place is; the score of the scan is the mean of its most abnormal
places. So one head gives map and score, on any tower, with masks or without.

It learns from abnormal scans where some are given, otherwise from anomalies synthesised on the normal ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmclip.detectors.base import setting
from fmclip.detectors.log_odds import highest_mean, inside_only
from fmclip.detectors.trained import TrainedConfig, TrainedDetector, map_losses
from fmclip.losses import focal_loss


@dataclass(frozen=True)
class TwoLayerConfig(TrainedConfig):
    """Settings; the README states none."""

    hidden: int = setting(64, "width between the two layers")
    weight_decay: float = setting(1e-2, "weight decay of AdamW")
    score_top: float = setting(0.05, "share of the places whose mean is the score of the scan")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "fast": {"epochs": 20, "folds": 2, "pool_size": 64, "copies": 1},
        "full": {},
        "paper": {},
    }


class TwoLayerHead(nn.Module):
    """Linear, ReLU, linear on standardised features of one place.

    Args:
        width: Channels of all levels together.
        hidden: Channels in between.
        generator: Draws the start.
        features: [N, width, h, w] to take mean and deviation of each channel from; None if they will be loaded.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int, hidden: int, generator: torch.Generator, features: Tensor | None) -> None:
        super().__init__()
        mean, std = torch.zeros(width), torch.ones(width)
        if features is not None:
            mean, std = features.mean(dim=(0, 2, 3)), features.std(dim=(0, 2, 3)).clamp_min(1e-6)
        self.register_buffer("mean", mean.view(1, -1, 1, 1))
        self.register_buffer("std", std.view(1, -1, 1, 1))
        self.first = nn.Conv2d(width, hidden, kernel_size=1)
        self.second = nn.Conv2d(hidden, 1, kernel_size=1)
        for layer in (self.first, self.second):
            nn.init.normal_(layer.weight, std=(2 / layer.in_channels) ** 0.5, generator=generator)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        """[B, width, h, w] -> log-odds [B, h, w]."""
        return self.second(F.relu(self.first((features - self.mean) / self.std)))[:, 0]


class TwoLayer(TrainedDetector):
    """See the module."""

    name = "two_layer"
    config_class = TwoLayerConfig
    title = "Two-layer head"
    summary = "A small network on frozen features. Learns from your abnormal scans, or from synthetic anomalies."
    uses_abnormals = "optional"

    def _new_network(self, generator: torch.Generator, reads: Sequence[Tensor] | None) -> nn.Module:
        features = None if reads is None else reads[0]
        return TwoLayerHead(sum(self.tower.widths), self.config.hidden, generator, features)

    def _read(self, pixels: Tensor) -> list[Tensor]:
        """Features of all levels on the grid of the middle one: [B, sum of C_j, h, w]."""
        grids = sorted(self.tower.grids)
        size = grids[len(grids) // 2]
        levels = self.tower.features(pixels)
        same = [
            F.adaptive_avg_pool2d(level, size) if level.shape[2] >= size[0] else F.interpolate(level, size)
            for level in levels
        ]
        return [torch.cat(same, dim=1)]

    def _answer(self, network: TwoLayerHead, reads: Sequence[Tensor], content: Tensor) -> tuple[Tensor, Tensor]:
        maps = network(reads[0])
        return maps, highest_mean(inside_only(maps, content), self.config.score_top)

    def _loss(
        self, network: TwoLayerHead, reads: Sequence[Tensor], labels: Tensor, masks: Tensor, drawn: Tensor
    ) -> Tensor:
        maps = network(reads[0])
        score = highest_mean(maps, self.config.score_top)
        return focal_loss(score.sigmoid(), labels) + sum(map_losses(maps.sigmoid(), masks, drawn))

    def _optimiser(self, network: TwoLayerHead) -> torch.optim.Optimizer:
        return torch.optim.AdamW(network.parameters(), lr=self.config.lr, weight_decay=self.config.weight_decay)
