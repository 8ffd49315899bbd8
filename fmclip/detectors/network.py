"""What FusionMedCLIP trains outside the tower: prompts, alignment and block adapters, temperature."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from fmclip.adapters import AlignmentAdapter, BlockAdapter
from fmclip.prompts import PromptLearner
from fmclip.towers import Tower
from fmclip.views import View, view_features, weigh

if TYPE_CHECKING:
    from fmclip.detectors.fusionmedclip_config import FusionMedCLIPConfig


class FusionNetwork(nn.Module):
    """Prompts (Eq. 3), alignment adapters (Eq. 4), similarity maps (Eq. 6); block adapters (Eq. 9) from stage 3 on.

    Args:
        tower: Gives widths and token embeddings; not kept.
        views: One alignment adapter for each that shows appearance; the others speak through the memory alone.
        config: Settings.
        generator: Draws the start.

    Attributes:
        levels: Levels that are learned from, shallow to deep.
        lora_state: LoRA matrices of the tower that was trained with this network; empty before stage 3.
    """

    def __init__(
        self, tower: Tower, views: Sequence[View], config: FusionMedCLIPConfig, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.views = tuple(view for view in views if view.is_learned_from)
        self.levels = tuple(sorted({view.level for view in self.views}))
        self.reads_residuals = config.features == "residual"
        self.prompts = PromptLearner(tower, config.scan_type, config.context_tokens)
        self.alignment = nn.ModuleList(
            AlignmentAdapter(tower.widths[view.level], tower.text_width, generator) for view in self.views
        )
        self.block = nn.ModuleList()
        self.log_temperature = nn.Parameter(torch.tensor(math.log(config.temperature)), config.learn_temperature)
        self.lora_state: dict[str, Tensor] = {}
        self.to(tower.device)
        if self.reads_residuals:
            with torch.no_grad():
                prompts = self.prompts(tower)
            for adapter in self.alignment.children():
                cast(AlignmentAdapter, adapter).start_between(prompts)

    def with_block_adapters(
        self, tower: Tower, config: FusionMedCLIPConfig, generator: torch.Generator
    ) -> FusionNetwork:
        """Copy the network and add block adapters, which start as the identity."""
        network = copy.deepcopy(self)
        network.block = nn.ModuleList(
            BlockAdapter(tower.widths[level], config.block_bottleneck, config.block_dropout, generator)
            for level in network.levels
        )
        return network.to(tower.device)

    def refine(self, features: Sequence[Tensor], generator: torch.Generator | None = None) -> list[Tensor]:
        """Block adapters over the features of each level that is learned from (Eq. 9), the others as they are.

        One [B, C_j, H_j, W_j] for each level -> the same shapes.
        """
        refined = list(features)
        if len(self.block) > 0:
            for level, adapter in zip(self.levels, self.block, strict=True):
                refined[level] = adapter(features[level], generator)
        return refined

    def forward(self, features: Sequence[Tensor], residuals: Sequence[Tensor], prompts: Tensor) -> Tensor:
        """Map what the alignment adapters read.

        Args:
            features: Refined features [B, C_j, H_j, W_j] of each level.
            residuals: [B, C_v, h, w] of each view, from `ReferenceMemory.compare`.
            prompts: [2, D], from `self.prompts(tower)`.

        Returns:
            S_a [B, h, w] in [0, 1]: the views' maps, averaged by their weights (Eq. 7, where all weigh the same).
        """
        return self.map(self.reads(features, residuals), prompts)

    def map(self, reads: Sequence[Tensor], prompts: Tensor) -> Tensor:
        """Map what `reads` returned, which may have been kept: [B, C_v, h, w] each -> [B, h, w]."""
        temperature = self.log_temperature.exp()
        maps = [adapter(read, prompts, temperature) for adapter, read in zip(self.alignment, reads, strict=True)]
        return weigh(torch.stack(maps, dim=1), self.views)

    def reads(self, features: Sequence[Tensor], residuals: Sequence[Tensor]) -> list[Tensor]:
        """What the alignment adapters are given: sizes of the residuals, or the views of the plain features."""
        if self.reads_residuals:
            return [residual.abs() / residual.shape[1] ** 0.5 for residual in residuals]
        return view_features(features, self.views)
