"""MadCLIP: two branches of adapters, one for normal and one for abnormal scans, against two sets of learned prompts.

Shiri, Beyan and Murino, "MadCLIP: Few-shot Medical Anomaly Detection with CLIP", section 2. It learns from k normal and
k abnormal scans; masks are used where there are some. The tower stays frozen:

    features of layers i --> A_n, A_ab: shared linear + ReLU, then a detection and a segmentation head (linear + ReLU)
    prompts: [V1]..[VM] CLASS OBJECTIVE (normal), [W1]..[WM] CLASS OBJECTIVE (abnormal); means over synonyms: t_n, t_ab
    S_n = O_n t_n - O_n t_ab,  S_ab = O_ab t_ab - O_ab t_n;  softmax over the pair: map, and its mean is the score
    loss of each layer: dice + focal on the map, SigLIP between pictures and the two prompts

Where the paper is silent: features are layer-normalised before the adapters, so that one learning rate suits any tower;
the softmax has a temperature; synonyms are UMLS's, contexts are drawn as CoOp draws them; SigLIP's bias starts at 0,
since both classes are equally frequent. A CNN keeps its own scales in place of the four layers. Pictures have the
tower's input size (the paper: 240 pixels) and keep their aspect ratio: letterbox bars do not count in the score.
The six ablations of section 3 are settings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmclip.detectors.base import DetectorConfig, setting
from fmclip.detectors.manual_prompts import embed_manual_prompts
from fmclip.detectors.trained import TrainedConfig, TrainedDetector, map_losses
from fmclip.maps import average_maps, resize_map
from fmclip.patch_grid import grid_of, patch_content
from fmclip.prompts import CLASSES, umls_concepts
from fmclip.towers import Tower

DEPTHS = (1 / 4, 1 / 2, 3 / 4, 1.0)  # blocks 6, 12, 18 and 24 of 24
EPS = 1e-9


@dataclass(frozen=True)
class MadCLIPConfig(TrainedConfig):
    """Settings; the defaults are the paper's where it states them (Adam, 1e-3, batch 16, 60 epochs)."""

    context_tokens: int = setting(8, "M, learned context vectors of each class")
    synonyms: int = setting(10, "UMLS synonyms of each class in the ensemble, besides the class word")
    hidden: int = setting(256, "width of the shared linear of an adapter")
    temperature: float = setting(0.07, "temperature of the softmax over the two scores")
    prompts: Literal["learned", "fixed"] = setting(
        "learned", "ablation a: fixed takes hand-written prompts", {"fixed": "hand-written prompts"}
    )
    objective: Literal["scan_type", "generic"] = setting(
        "scan_type", 'ablation b: generic says "medical image"', {"generic": 'prompts say "medical image"'}
    )
    branches: Literal["two", "one"] = setting(
        "two", "ablation c: one set of adapters for both classes", {"one": "one set of adapters for both classes"}
    )
    opposite_signal: bool = setting(
        True,
        "ablation d: whether the similarity to the other prompt is subtracted",
        {False: "similarity to the other prompt is not subtracted"},
    )
    image_loss: Literal["siglip", "softmax"] = setting(
        "siglip", "ablation e: loss between pictures and prompts", {"softmax": "softmax in place of SigLIP"}
    )
    heads: Literal["separate", "common"] = setting(
        "separate", "ablation f: one head for score and map", {"common": "one head for score and map"}
    )

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "fast": {"epochs": 10, "folds": 0, "copies": 1, "synonyms": 2},
        "full": {"epochs": 30, "folds": 2, "copies": 2, "synonyms": 4},
        "paper": {},
    }


class MadAdapter(nn.Module):
    """A^i of one branch: shared linear + ReLU, then a head for the score and one for the map, linear + ReLU each.

    Args:
        channels: C_i.
        hidden: Width in between.
        text_width: D.
        common_head: Whether one head serves both.
        generator: Draws the start.
    """

    def __init__(self, channels: int, hidden: int, text_width: int, common_head: bool, generator: torch.Generator):
        super().__init__()
        self.shared = nn.Conv2d(channels, hidden, kernel_size=1)
        heads = ("both",) if common_head else ("detection", "segmentation")
        self.heads = nn.ModuleDict({head: nn.Conv2d(hidden, text_width, kernel_size=1) for head in heads})
        for layer in (self.shared, *self.heads.values()):
            nn.init.normal_(layer.weight, std=(2 / layer.in_channels) ** 0.5, generator=generator)  # type: ignore[arg-type, operator]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C_i, h, w] -> O for the score and O for the map, [B, D, h, w] each, unit length at each place."""
        shared = F.relu(self.shared(F.layer_norm(features.movedim(1, -1), features.shape[1:2]).movedim(-1, 1)))
        found = [F.normalize(F.relu(head(shared)), dim=1, eps=1e-6) for head in self.heads.values()]
        return found[0], found[-1]


class MadNetwork(nn.Module):
    """All that MadCLIP trains.

    Args:
        tower: Gives widths and token embeddings; not kept.
        config: Settings.
        generator: Draws the start.
    """

    def __init__(self, tower: Tower, config: MadCLIPConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        common = config.heads == "common"
        self.branches = nn.ModuleList(
            nn.ModuleList(
                MadAdapter(width, config.hidden, tower.text_width, common, generator) for width in tower.widths
            )
            for _ in range(2 if config.branches == "two" else 1)
        )
        self.log_scale, self.bias = nn.Parameter(torch.tensor(math.log(10.0))), nn.Parameter(torch.zeros(()))
        objective = config.scan_type if config.objective == "scan_type" else "medical image"
        self.fixed: Tensor | None = embed_manual_prompts(tower, objective) if config.prompts == "fixed" else None
        if self.fixed is None:
            start = torch.randn(len(CLASSES), config.context_tokens, tower.token_width, generator=generator)
            self.contexts = nn.Parameter(0.02 * start)  # [2, M, token width]
            self._words = [
                [tower.token_embeddings(f"{state} {objective}") for state in _states(name, config.synonyms)]
                for name in CLASSES
            ]
        self._learned: Tensor | None = None

    def texts(self, tower: Tower) -> Tensor:
        """t_n and t_ab: the means over the synonyms, [2, D], unit length."""
        if self.fixed is not None:
            return self.fixed
        if self._learned is not None and not self.training:
            return self._learned
        prompts = [
            torch.cat([context, words])
            for context, own in zip(self.contexts, self._words, strict=True)
            for words in own
        ]
        every = tower.embed_prompts(prompts).unflatten(0, (len(CLASSES), -1))  # [2, synonyms, D]
        texts = F.normalize(every.mean(dim=1), dim=1)
        if not self.training:  # nothing changes them any more: embedded once for all scans
            self._learned = texts
        return texts

    def forward(self, levels: Sequence[Tensor], texts: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Score each place of each level.

        Args:
            levels: [B, C_i, h_i, w_i] each.
            texts: [2, D].

        Returns:
            S^i for the score and S^i for the map, [B, 2, h_i, w_i] each (normal, abnormal), of each level.
        """
        found = []
        for place, level in enumerate(levels):
            outputs = [branch[place](level) for branch in self.branches]  # type: ignore[index]
            normal, abnormal = outputs[0], outputs[-1]
            found.append((self._contrast(normal[0], abnormal[0], texts), self._contrast(normal[1], abnormal[1], texts)))
        return found

    def _contrast(self, normal: Tensor, abnormal: Tensor, texts: Tensor) -> Tensor:
        """S_n and S_ab of O_n and O_ab [B, D, h, w]: [B, 2, h, w]."""
        own, other = texts, texts.flip(0) if self.config.opposite_signal else torch.zeros_like(texts)
        both = torch.stack([normal, abnormal], dim=1)  # [B, 2, D, h, w]
        return torch.einsum("bkdhw,kd->bkhw", both, own - other)


class MadCLIP(TrainedDetector):
    """See the module."""

    name = "madclip"
    config_class = MadCLIPConfig
    title = "MadCLIP"
    summary = "Two branches, for normal and abnormal. Needs some abnormal scans; painted masks help."
    uses_abnormals = "required"

    def __init__(self, tower: Tower, config: DetectorConfig | None = None) -> None:
        super().__init__(tower, config)
        self._levels = _quarters(tower)

    def _new_network(self, generator: torch.Generator, reads: Sequence[Tensor] | None) -> nn.Module:
        return MadNetwork(self._levels, self.config, generator)

    def _read(self, pixels: Tensor) -> list[Tensor]:
        return self._levels.features(pixels)

    def _answer(self, network: MadNetwork, reads: Sequence[Tensor], content: Tensor) -> tuple[Tensor, Tensor]:
        scored = network(reads, network.texts(self.tower))
        maps = average_maps([self._chance(segmentation) for _, segmentation in scored], self._grid)
        chances = torch.stack([_mean_inside(self._chance(detection).double(), content) for detection, _ in scored])
        return torch.logit(maps, eps=1e-6), torch.logit(chances.mean(dim=0), eps=EPS)

    def _loss(
        self, network: MadNetwork, reads: Sequence[Tensor], labels: Tensor, masks: Tensor, drawn: Tensor
    ) -> Tensor:
        loss = torch.zeros((), device=labels.device)
        for detection, segmentation in network(reads, network.texts(self.tower)):
            maps = resize_map(self._chance(segmentation), self._grid)
            similarity = network.log_scale.exp() * detection.mean(dim=(2, 3)) + network.bias  # [B, 2]
            loss = loss + image_text_loss(similarity, labels, self.config.image_loss)
            loss = loss + sum(map_losses(maps, masks, drawn))
        return loss

    def _chance(self, scores: Tensor) -> Tensor:
        """Softmax over the pair: S^i [B, 2, h, w] -> probability of "abnormal" [B, h, w]."""
        return ((scores[:, 1] - scores[:, 0]) / self.config.temperature).sigmoid()

    @property
    def _grid(self) -> tuple[int, int]:
        """Grid of the finest level but one: of a transformer, that of all."""
        return sorted(self._levels.grids)[-2:][0]


def _mean_inside(maps: Tensor, content: Tensor) -> Tensor:
    """Mean over the places of a scan, letterbox bars left out: [B, h, w] -> [B]; content [B, S, S] bool."""
    inside = patch_content(content, grid_of(maps)).to(maps)
    return (maps * inside).sum(dim=(1, 2)) / inside.sum(dim=(1, 2)).clamp_min(1)


def image_text_loss(similarity: Tensor, labels: Tensor, kind: str) -> Tensor:
    """Loss between pictures and the two prompts.

    SigLIP takes each pair of picture and prompt by itself, so that a prompt may have many pictures (section 2, Zhai et
    al. 2023); softmax makes the two prompts compete for each picture (ablation e).

    Args:
        similarity: [B, 2], scaled.
        labels: [B], 0 for normal and 1 for abnormal.
        kind: "siglip" or "softmax".

    Returns:
        Scalar.
    """
    if kind == "softmax":
        return F.cross_entropy(similarity, labels.long())
    signs = 2 * F.one_hot(labels.long(), 2).to(similarity.dtype) - 1  # [B, 2], 1 for a pair that belongs together
    return F.softplus(-signs * similarity).sum(dim=1).mean()


def _quarters(tower: Tower) -> Tower:
    """The tower with MadCLIP's layers: 1/4, 1/2, 3/4 and all of the blocks; a CNN keeps its scales."""
    if tower.kind != "transformer":
        return tower
    names = tower.all_layers
    return tower.with_layers([names[max(1, round(depth * len(names))) - 1] for depth in DEPTHS])


def _states(name: str, synonyms: int) -> list[str]:
    concept = umls_concepts()[name]
    return [concept["class_name"], *(synonym.lower() for synonym in concept["synonyms"][:synonyms])]
