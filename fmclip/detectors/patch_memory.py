"""Patch memory: the distance of each patch to the nearest patches of the reference scans; nothing is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fmclip.detectors.base import Detector, DetectorConfig, Prediction, batched_features, setting, to_pixels
from fmclip.detectors.events import OnEvent, Ready, StageStarted
from fmclip.detectors.evidence import (
    MAP_SMOOTHING,
    MEMORY_SPREAD,
    SMOOTHING,
    Evidence,
    image_scores,
    peaks,
    predictions,
    square_answer,
    to_unit,
)
from fmclip.errors import CheckpointError
from fmclip.maps import smooth_inside, smooth_map
from fmclip.memory import SHRINKAGE, ReferenceMemory
from fmclip.patch_grid import grid_of, patch_weight
from fmclip.scans import Scan
from fmclip.search import Search
from fmclip.synthesis.augmentation import Augmentation, apply_view, draw_view
from fmclip.views import View, levels_needed, tower_views, weigh, weigh_places

Learn: TypeAlias = Callable[[Sequence[Tensor], Tensor, int, Sequence[View]], ReferenceMemory]


MOST_CARRIED = 8  # with more references one more hardly changes a distance
DROPS = 4  # references left out in turn to see what one fewer does


@dataclass(frozen=True)
class PatchMemoryConfig(DetectorConfig):
    """Settings; those from `levels` on are ideas of PatchCore and others, with figures in benchmarks/NOTES.md."""

    shrinkage: float = setting(SHRINKAGE, "isotropic share of the residual covariance")
    smoothing: float = setting(SMOOTHING, "sigma of the Gaussian over the evidence that makes the score, in patches")
    map_smoothing: float = setting(MAP_SMOOTHING, "sigma of the Gaussian over the map, in patches")
    levels: tuple[int, ...] = setting((), "which of the tower's levels for patches, 0 the shallowest; none takes all")
    coreset: float = setting(1.0, "share of the reference patches that is kept")
    copies: int = setting(0, "varied copies of each reference (moved, turned, brighter) that are remembered too")
    over: Literal["references", "patches"] = setting(
        "references",
        "nearest patch of each reference, averaged so that near ones count most, or nearest of all patches",
        {"patches": "nearest of all reference patches, as PatchCore"},
    )
    neighbours: int = setting(1, "with over=patches: reference patches over which the distance is averaged")
    reweighting: int = setting(0, "with over=patches: neighbours that weigh the distance (PatchCore, Eq. 7); 0: none")

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ValueError: A setting is out of its range.
        """
        if not 0 < self.coreset <= 1 or self.copies < 0 or self.neighbours < 1 or self.reweighting < 0:
            raise ValueError("coreset lies above 0 and up to 1, copies and reweighting from 0, neighbours from 1")
        if self.over not in ("references", "patches"):
            raise ValueError("over is references or patches")
        if self.over == "references" and (self.coreset < 1 or self.neighbours > 1 or self.reweighting > 0):
            raise ValueError("coreset, neighbours and reweighting mix the patches of all references: set over=patches")

    @classmethod
    def preset(cls, name: str = "full", **overrides: Any) -> PatchMemoryConfig:
        """Nothing is trained, so all presets are the same."""
        return cls(**overrides)


class PatchMemory(Detector):
    """See the module and `fmclip.memory`.

    Attributes:
        memory_: The patches of the references, after `fit`.
    """

    name = "patch_memory"
    config_class = PatchMemoryConfig
    title = "Patch memory"
    compares_patches = True
    spread_prior = MEMORY_SPREAD
    summary = "Each patch against the nearest patch of each reference. Nothing is trained: answers within seconds."

    memory_: ReferenceMemory

    @torch.no_grad()
    def fit(
        self,
        normals: Sequence[Scan],
        abnormals: Sequence[Scan] | None = None,
        *,
        abnormal_masks: Sequence[np.ndarray | None] | None = None,
        on_event: OnEvent | None = None,
    ) -> PatchMemory:
        """Remember the patches of the references; abnormal scans are not used."""
        normals, on_event = self._begin(normals, on_event)
        memory, distances, content, _ = self._remember(normals, on_event)
        self._settle(memory, self._evidence(memory, distances, content))
        on_event(Ready("patch memory", self))
        return self

    def _remember(
        self, normals: Sequence[Scan], on_event: OnEvent
    ) -> tuple[ReferenceMemory, Tensor, Tensor, list[Tensor]]:
        """Learn the memory: with it distances [k, V, h, w], content [k, S, S] and features of the references."""
        on_event(StageStarted("patch memory", 0))
        pixels, content, _ = to_pixels(normals, self.tower)
        everything = torch.cat([pixels, *self._copies(pixels, content)])
        features = batched_features(self.tower, everything, levels_needed(self._views()))
        memory, distances = learn_memory(
            features,
            content.repeat(1 + self.config.copies, 1, 1),
            self._learn,
            self._views(),
            len(normals),
            self.config.shrinkage,
            self.config.smoothing,
        )
        return memory, distances, content, [level[: len(normals)] for level in features]

    def _settle(self, memory: ReferenceMemory, evidence: Evidence) -> None:
        """Make a memory the one that answers; the evidence is that of its references."""
        self.memory_ = memory
        self.reference_scores_ = tuple(to_unit(image_scores(evidence.maps())).tolist())

    def _learn(
        self, features: Sequence[Tensor], content: Tensor, references: int, views: Sequence[View]
    ) -> ReferenceMemory:
        return ReferenceMemory.learn(
            features,
            content,
            views,
            self.config.shrinkage,
            references=references,
            coreset=self.config.coreset,
            search=self._search(),
            generator=torch.Generator().manual_seed(self.config.seed),
        )

    def _views(self) -> tuple[View, ...]:
        return tower_views(self.tower, self.config.levels)

    def _search(self) -> Search:
        return Search(self.config.over, self.config.neighbours, self.config.reweighting)

    def _copies(self, pixels: Tensor, content: Tensor) -> list[Tensor]:
        """Varied copies of references [k, 3, S, S], a tensor of the same shape for each round."""
        rng = np.random.default_rng(self.config.seed)
        images, insides = pixels.permute(0, 2, 3, 1).cpu().numpy(), content.cpu().numpy()
        rounds = []
        for _ in range(self.config.copies):
            varied = [
                apply_view(draw_view(Augmentation(), rng), image, inside)
                for image, inside in zip(images, insides, strict=True)
            ]
            rounds.append(torch.from_numpy(np.stack(varied)).permute(0, 3, 1, 2).to(pixels))
        return rounds

    @torch.no_grad()
    def predict(self, scans: Sequence[Scan]) -> list[Prediction]:
        """Score each scan by the weighted mean distance over all views, and map it by those that say where."""
        found: list[Prediction] = []
        for pixels, content, boxes in self._batches(scans):
            maps = self._answer(pixels, content)
            found += predictions({"patch memory": maps}, maps, boxes, self.tower.image_size)
        return found

    @torch.no_grad()
    def map_squares(self, pixels: Tensor, content: Tensor) -> tuple[Tensor, Tensor]:
        """Maps and scores by the distance to the memory."""
        return square_answer(self._answer(pixels, content), self.tower.image_size)

    def _answer(self, pixels: Tensor, content: Tensor, own: Tensor | None = None) -> Tensor:
        """Maps [B, h, w]; `own` as in `ReferenceMemory.compare`."""
        distances, _ = self.memory_.compare(self.patch_features(pixels), own)  # [B, V, h, w]
        return self._evidence(self.memory_, distances, content).maps()

    def _evidence(self, memory: ReferenceMemory, distances: Tensor, content: Tensor) -> Evidence:
        sigmas = self.config.smoothing, self.config.map_smoothing
        return memory_evidence(memory, distances, content, sigmas)

    @torch.no_grad()
    def patch_features(self, pixels: Tensor) -> list[Tensor]:
        """What the memory compares: pixels [B, 3, S, S] in [0, 1] -> one [B, C_j, H_j, W_j] for each level in use."""
        return self.tower.features(pixels, levels_needed(self.memory_.views))

    @torch.no_grad()
    def predict_synthetic(self, pixels: Tensor, content: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
        """Each picture is compared with the patches of the other references."""
        maps = self._answer(pixels, content, sources)
        return to_unit(maps), to_unit(image_scores(maps))

    def state(self) -> dict[str, Tensor]:
        """Whitened reference patches, whitening, scales and levels."""
        self._require_fit()
        return self.memory_.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back a memory."""
        assert self.reference_scores_ is not None, "the checkpoint sets the reference scores first"
        try:
            self.memory_ = ReferenceMemory.from_state(
                state, self._views(), len(self.reference_scores_), self.tower.device, self._search()
            )
        except (KeyError, ValueError) as error:
            raise CheckpointError("The adapter file lacks parts of its patch memory; adapt again.") from error


def memory_evidence(
    memory: ReferenceMemory, distances: Tensor, content: Tensor, sigmas: tuple[float, float]
) -> Evidence:
    """Weigh the views' distances and smooth them.

    Args:
        memory: What measured the distances.
        distances: [B, V, h, w].
        content: [B, S, S] bool.
        sigmas: Of the Gaussians over what is scored and what is shown, in patches.

    Returns:
        The evidence; 0 on letterbox bars.
    """
    weight = patch_weight(content, grid_of(distances))  # [B, h, w]
    placed = weigh_places(memory.relative(distances), memory.views)
    scored = memory_scored(memory.relative(distances), memory.views, content, sigmas[0])
    return Evidence(scored, smooth_inside(placed, weight, sigmas[1]))


def memory_scored(relative: Tensor, views: Sequence[View], content: Tensor, sigma: float) -> Tensor:
    """Only the half of `memory_evidence` that is scored: distances [B, V, h, w] in units of `level` -> [B, h, w]."""
    return smooth_map(weigh(relative, views), sigma) * patch_weight(content, grid_of(relative))


def learn_memory(
    features: Sequence[Tensor],
    content: Tensor,
    learn: Learn,
    views: Sequence[View],
    references: int,
    shrinkage: float,
    smoothing: float,
) -> tuple[ReferenceMemory, Tensor]:
    """Learn a memory and what its references look like to it, as if each were a new scan.

    Leave-one-out compares each reference with k - 1 others, but a query is compared with k. With few references that is
    a difference: patches find a nearer neighbour among more, and the whitening is less in-sample. How much one fewer
    lengthens the distances is measured by leaving out two at a time, and carried on from k - 1 to k as a power of the
    number of references.

    Args:
        features: One [n, C_j, H_j, W_j] for each level, as for `ReferenceMemory.learn`.
        content: [n, S, S] bool.
        learn: Takes features, content, k and views and returns the memory.
        views: V views; those that say only where are not asked what one reference fewer does to scores.
        references: k.
        shrinkage: Share of the isotropic part in the residual covariance.
        smoothing: Sigma of the Gaussian over the evidence that makes the score, in patches.

    Returns:
        The memory, calibrated; distances of the references [k, V, h, w].
    """
    memory = learn(features, content, references, views)
    distances = memory.leave_one_out(features, content, shrinkage)  # [k, V, h, w]
    memory.calibrate(distances, content[:references])
    if not 4 <= references <= MOST_CARRIED:
        return memory, distances
    pictures = torch.arange(len(content), device=content.device)
    rows = [row for row, view in enumerate(views) if view.weight > 0]
    scored, scale, level = [views[row] for row in rows], memory.scale[rows], memory.level[rows].view(-1, 1, 1)
    changes = []
    for dropped in range(min(DROPS, references)):
        rest = pictures[pictures % references != dropped]
        seen = [one[rest] for one in features]
        fewer = learn(seen, content[rest], references - 1, scored)
        longer = fewer.leave_one_out(seen, content[rest], shrinkage)
        longer = longer * (fewer.scale / scale).view(-1, 1, 1)  # [k - 1, V', h, w]
        kept = rest[: references - 1]
        nearer, farther = (
            peaks(memory_scored(one / level, scored, content[kept], smoothing))
            for one in (distances[kept][:, rows], longer)
        )
        changes.append((nearer / farther).log().mean())
    change = float(torch.stack(changes).mean().clamp_max(0))  # of the logarithm, from k - 2 to k - 1 references
    k = references
    return memory, distances * math.exp(change * math.log(k / (k - 1)) / math.log((k - 1) / (k - 2)))
