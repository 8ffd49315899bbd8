"""ConRAD: text prompts that see the picture, and a vision transformer whose blocks see the prompts.

ConRAD's README is all that its authors published; it names two contributions, and leaves the rest to us:

    1. learnable text prompts, "which capture the nuances in the visual input": contexts [v1]..[vM] CLASS that start
       from UMLS and are shifted by a small network which reads the image embedding
    2. "deep prompting to the visual encoder by layer-wise projections of the static as well as learnable text prompts":
       for each block an own linear layer turns the hand-written class words and the learned contexts into extra tokens

The score of a picture is the softmax over the two prompts of its image embedding; the map is the same for the patch
tokens of the deepest level, through a linear layer to the text width, since only a tower trained on pairs would have
them there already. The image embedding that shifts the contexts is the plain tower's, read once for each picture.

It learns from abnormal scans where some are given, otherwise from anomalies synthesised on the normal ones. A CNN has
no tokens and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmclip.detectors.base import setting
from fmclip.detectors.trained import TrainedConfig, TrainedDetector, map_losses
from fmclip.losses import focal_loss
from fmclip.prompts import CLASSES, PromptLearner, umls_concepts
from fmclip.towers import Tower


@dataclass(frozen=True)
class ConRADConfig(TrainedConfig):
    """Settings; the README states none."""

    epochs: int = setting(20, "passes over the pictures that are learned from")
    batch_size: int = setting(8, "pictures in a training step, half of them abnormal")
    folds: int = setting(2, "networks trained to score the references, each without a share of them; 0 trains none")
    lr: float = setting(3e-3, "learning rate")
    context_tokens: int = setting(4, "M, learned context vectors of each class")
    bottleneck: int = setting(16, "width of the network that shifts the contexts, as a share: text width / this")
    temperature: float = setting(0.07, "temperature of the softmax over the two prompts")
    conditioned: bool = setting(
        True,
        "whether the contexts are shifted by what the picture shows",
        {False: "the same contexts for all pictures"},
    )
    visual_prompts: bool = setting(
        True, "whether the blocks of the image tower read projected prompts", {False: "no prompts in the image tower"}
    )

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "fast": {"epochs": 5, "folds": 0, "pool_size": 48, "copies": 0},
        "full": {"epochs": 10, "copies": 1},
        "paper": {},
    }


class ConRADNetwork(nn.Module):
    """All that ConRAD trains.

    Args:
        tower: Gives widths and token embeddings; not kept.
        config: Settings.
        generator: Draws the start.
    """

    def __init__(self, tower: Tower, config: ConRADConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.prompts = PromptLearner(tower, config.scan_type, config.context_tokens)
        width, hidden = tower.token_width, max(1, tower.text_width // config.bottleneck)
        self.shift = nn.Sequential(nn.Linear(tower.text_width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.projections = nn.ModuleList(nn.Linear(width, channels) for channels in tower.block_widths)
        self.to_text = nn.Conv2d(tower.widths[-1], tower.text_width, kernel_size=1)
        for layer in (self.shift[0], *self.projections, self.to_text):
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5, generator=generator)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.shift[2].weight)  # type: ignore[arg-type]  # starts as the unconditioned prompts
        nn.init.zeros_(self.shift[2].bias)  # type: ignore[arg-type]
        self.static: Tensor
        self.register_buffer("static", _static_words(tower, config.scan_type), persistent=False)  # [2, token width]

    def forward(self, tower: Tower, pixels: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Look at pictures.

        Args:
            tower: Frozen tower.
            pixels: [B, 3, S, S] in [0, 1].
            embedding: [B, D], of the plain tower.

        Returns:
            Log-odds of each place [B, h, w] and of each picture [B].
        """
        if self.config.visual_prompts:
            tokens = torch.cat([self.static, self.prompts.contexts.flatten(0, 1)])  # [2 + 2 M, token width]
            tokens = F.layer_norm(tokens, tokens.shape[1:])
            levels, seen = tower.features_with_prompts(pixels, [layer(tokens) for layer in self.projections])
        else:
            levels, seen = tower.features(pixels), embedding
        direction = self._texts(tower, embedding) / self.config.temperature  # [B, D]
        patches = F.layer_norm(levels[-1].movedim(1, -1), levels[-1].shape[1:2]).movedim(-1, 1)
        patches = F.normalize(self.to_text(patches), dim=1, eps=1e-6)  # [B, D, h, w]
        return torch.einsum("bdhw,bd->bhw", patches, direction), (seen * direction).sum(dim=1)

    def _texts(self, tower: Tower, embedding: Tensor) -> Tensor:
        """Abnormal minus normal prompt: [B, D], or [1, D] where the prompts do not see the picture."""
        if not self.config.conditioned:
            texts = self.prompts(tower)[None]  # [1, 2, D]
        else:
            shifts = self.shift(embedding)[:, None, None]  # [B, 1, 1, token width]
            contexts = self.prompts.contexts + shifts  # [B, 2, M, token width]
            texts = self.prompts.embed(tower, contexts.flatten(0, 1)).unflatten(0, (-1, len(CLASSES)))
        return texts[:, 1] - texts[:, 0]


class ConRAD(TrainedDetector):
    """See the module."""

    name = "conrad"
    config_class = ConRADConfig
    title = "ConRAD"
    summary = "Prompts that see the picture, inside a vision transformer. Abnormal scans are optional."
    uses_abnormals = "optional"
    needs_transformer = True

    def _new_network(self, generator: torch.Generator, reads: Sequence[Tensor] | None) -> nn.Module:
        return ConRADNetwork(self.tower, self.config, generator)

    def _read(self, pixels: Tensor) -> list[Tensor]:
        """The pictures themselves, since every block is run anew, and their plain embeddings."""
        return [pixels, self.tower.embed_images(pixels)]

    def _answer(self, network: ConRADNetwork, reads: Sequence[Tensor], content: Tensor) -> tuple[Tensor, Tensor]:
        return network(self.tower, *reads)

    def _loss(
        self, network: ConRADNetwork, reads: Sequence[Tensor], labels: Tensor, masks: Tensor, drawn: Tensor
    ) -> Tensor:
        maps, scores = network(self.tower, *reads)
        return focal_loss(scores.sigmoid(), labels) + sum(map_losses(maps.sigmoid(), masks, drawn))


@torch.no_grad()
def _static_words(tower: Tower, scan_type: str) -> Tensor:
    """Mean token embedding of the class words of either class: [2, token width]."""
    words = [tower.token_embeddings(f"{umls_concepts()[name]['class_name']} {scan_type}") for name in CLASSES]
    return torch.stack([one.mean(dim=0) for one in words]).float()
