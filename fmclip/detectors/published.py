"""FusionMedCLIP as its dissertation has it, without a patch memory, in the six rows of its ablation (Table 8).

    row 1  plain CLIP, hand-written prompts, image embedding ("GAP")
    row 2  the same on a tower that has been through stage 1, which is a choice of the tower
    row 3  prompts learned from random contexts (CoOp)
    row 4  prompts learned from UMLS contexts (section 3.2.1)
    row 5  alignment adapters in place of the image embedding (section 3.2.3): the whole of stage 2
    row 6  LoRA and block adapters, end to end (section 3.3): stage 3

All rows learn from normal scans and the anomalies synthesised on them. In rows 1 to 4, which have no map of their own,
the map compares the patch embeddings of the value path with the prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fmclip.adapters import AlignmentAdapter, BlockAdapter
from fmclip.detectors.base import DetectorConfig, setting
from fmclip.detectors.events import OnEvent
from fmclip.detectors.manual_prompts import embed_manual_prompts
from fmclip.detectors.samples import Samples
from fmclip.detectors.trained import TrainedConfig, TrainedDetector, map_losses
from fmclip.errors import TowerError
from fmclip.losses import focal_loss
from fmclip.maps import average_maps, similarity_map
from fmclip.patch_grid import grid_of, patch_content
from fmclip.prompts import PromptLearner
from fmclip.towers import Tower

EPS = 1e-6


@dataclass(frozen=True)
class PublishedConfig(TrainedConfig):
    """Settings; the defaults are Table A1's."""

    row: int = setting(6, "row of Table 8, 1 to 6")
    epochs: int = setting(200, "epochs of stage 2 (Table A1); one epoch shows the pool once")
    stage3_epochs: int = setting(200, "epochs of stage 3, row 6 (Table A1)")
    batch_size: int = setting(8, "pictures in a training step (Table A1)")
    folds: int = setting(0, "networks trained to score the references, each without a share of them; 0 trains none")
    context_tokens: int = setting(8, "M, learned context vectors of each prompt (Table A1)")
    temperature: float = setting(0.07, "temperature of the softmax over the two prompts (Table A1)")
    weight_decay: float = setting(0.01, "weight decay of AdamW (Table A1)")
    lora_rank: int = setting(8, "rank of LoRA (Table A1)")
    lora_alpha: float = setting(16.0, "LoRA updates are scaled by alpha / rank (Table A1)")
    lora_dropout: float = setting(0.05, "dropout in front of LoRA (Table A1)")
    lora_lr: float = setting(3e-5, "learning rate of LoRA (Table A1)")
    block_bottleneck: int = setting(64, "bottleneck of the block adapters (Table A1)")
    block_dropout: float = setting(0.1, "dropout in the block adapters (Table A1)")
    block_lr: float = setting(5e-5, "learning rate of the block adapters (Table A1)")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "fast": {"row": 5, "epochs": 5, "pool_size": 64},
        "full": {"row": 6, "epochs": 20, "stage3_epochs": 2, "folds": 2},
        "paper": {},
        **{f"row{row}": {"row": row} for row in range(1, 7)},
    }

    def __post_init__(self) -> None:
        if not 1 <= self.row <= 6:
            raise ValueError(f"Table 8 has rows 1 to 6, not {self.row}.")


class PublishedNetwork(nn.Module):
    """What a row trains; nothing in rows 1 and 2.

    Args:
        tower: Gives widths and token embeddings, and the frozen weights that LoRA goes around.
        config: Settings.
        generator: Draws the start.

    Attributes:
        tower: The one in use; with LoRA in row 6.
        is_end_to_end: Whether pictures are run through the tower anew, instead of reading its kept features.
    """

    def __init__(self, tower: Tower, config: PublishedConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config, self.tower, self.is_end_to_end = config, tower, False
        self._learned: Tensor | None = None
        self._noise: torch.Generator | None = None
        self.register_buffer("manual", torch.empty(0), persistent=False)
        if config.row <= 2:
            self.manual = embed_manual_prompts(tower, config.scan_type)
            return
        self.prompts = PromptLearner(tower, config.scan_type, config.context_tokens)
        if config.row == 3:
            start = 0.02 * torch.randn(self.prompts.contexts.shape, generator=generator)
            self.prompts.contexts.data.copy_(start)
        if config.row >= 5:
            self.alignment = nn.ModuleList(AlignmentAdapter(c, tower.text_width, generator) for c in tower.widths)
        if config.row == 6:
            self.tower = tower.with_lora(config.lora_rank, config.lora_alpha, config.lora_dropout, generator=generator)
            self.lora = nn.ParameterList(self.tower.lora_parameters())
            self.block = nn.ModuleList(
                BlockAdapter(c, config.block_bottleneck, config.block_dropout, generator) for c in tower.widths
            )

    def texts(self) -> Tensor:
        """Both prompts [2, D], unit length."""
        if self.config.row <= 2:
            return self.manual
        if self.training:
            return self.prompts(self.tower)
        if self._learned is None:  # nothing changes them any more: embedded once for all scans
            self._learned = self.prompts(self.tower).detach()
        return self._learned

    def drop(self, generator: torch.Generator | None) -> None:
        """Switch the dropout of row 6 on, drawn from a generator, or off."""
        self._noise = generator
        self.tower.train_lora(generator)

    def forward(self, reads: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Probabilities of each place [B, h, w] and, in rows 1 to 4, log-odds of each picture [B]."""
        texts, temperature = self.texts(), self.config.temperature
        if self.config.row <= 4:
            embedding, patches = reads
            return similarity_map(patches, texts, temperature), embedding @ (texts[1] - texts[0]) / temperature
        levels = self.tower.features(reads[0]) if self.is_end_to_end else reads[1:]
        if self.config.row == 6:
            levels = [adapter(level, self._noise) for adapter, level in zip(self.block, levels, strict=True)]
        maps = [adapter(level, texts, temperature) for adapter, level in zip(self.alignment, levels, strict=True)]
        grids = sorted(grid_of(one) for one in maps)
        return average_maps(maps, grids[len(grids) // 2]), None


class Published(TrainedDetector):
    """See the module."""

    name = "fusionmedclip_published"
    config_class = PublishedConfig
    title = "FusionMedCLIP as published"
    summary = "The dissertation's method without the patch memory, for comparison."

    def __init__(self, tower: Tower, config: DetectorConfig | None = None) -> None:
        super().__init__(tower, config)
        if self.config.row <= 2 and not tower.paired:
            raise TowerError(
                f"Row {self.config.row} of Table 8 compares scans with hand-written words, and the two halves of the "
                f"tower {tower.name} were never trained together. Choose a CLIP (ViT-L-14:openai) or a later row."
            )

    def _new_network(self, generator: torch.Generator, reads: Sequence[Tensor] | None) -> nn.Module:
        return PublishedNetwork(self.tower, self.config, generator)

    def _read(self, pixels: Tensor) -> list[Tensor]:
        if self.config.row <= 4:
            return [self.tower.embed_images(pixels), self.tower.embed_patches(pixels)]
        return [pixels, *self.tower.features(pixels)]

    def _train(
        self,
        samples: Samples,
        reads: Sequence[Tensor],
        rows: Tensor,
        generator: torch.Generator,
        stage: str,
        on_event: OnEvent,
    ) -> nn.Module:
        """Stage 2 on kept features, then, in row 6, stage 3 end to end."""
        network: Any = PublishedNetwork(self.tower, self.config, generator).to(self.tower.device)
        if self.config.row >= 3:
            self._run(network, samples, reads, rows, self.config.epochs, generator, stage, on_event)
        if self.config.row == 6:
            network.is_end_to_end = True
            end_to_end = f"{stage}, end to end"
            network.drop(generator)
            self._run(network, samples, reads, rows, self.config.stage3_epochs, generator, end_to_end, on_event)
            network.drop(None)
        return network.eval().requires_grad_(False)

    def _answer(self, network: PublishedNetwork, reads: Sequence[Tensor], content: Tensor) -> tuple[Tensor, Tensor]:
        network.is_end_to_end = self.config.row == 6
        maps, scores = network(reads)
        if scores is None:
            inside = patch_content(content, grid_of(maps))
            scores = torch.logit((maps * inside).flatten(1).amax(dim=1).double(), eps=EPS**2)
        return torch.logit(maps, eps=EPS), scores

    def _loss(
        self, network: PublishedNetwork, reads: Sequence[Tensor], labels: Tensor, masks: Tensor, drawn: Tensor
    ) -> Tensor:
        maps, scores = network(reads)
        if scores is not None:  # CoOp on the image embedding has no map to train
            return focal_loss(scores.sigmoid(), labels)
        dice, _ = map_losses(maps, masks, drawn)
        return focal_loss(maps.flatten(1).amax(dim=1), labels) + dice

    def _optimiser(self, network: PublishedNetwork) -> torch.optim.Optimizer:
        stage2 = [weight for name, weight in network.named_parameters() if not name.startswith(("lora.", "block."))]
        groups: list[dict[str, Any]] = [{"params": stage2}]
        if network.is_end_to_end:
            groups.append({"params": list(network.lora), "lr": self.config.lora_lr})
            groups.append({"params": list(network.block.parameters()), "lr": self.config.block_lr})
        return torch.optim.AdamW(groups, lr=self.config.lr, weight_decay=self.config.weight_decay)
