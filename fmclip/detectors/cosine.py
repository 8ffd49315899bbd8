"""Cosine baseline: how far the embedding of a scan is from the mean embedding of the normal scans; nothing is trained.

From the README of a zero-shot baseline for brain MRI (mean of the normal CLIP embeddings, score = 1 - cosine), which
scores the reference scans against a mean that holds them; here each is compared with the mean of the others. Its
histogram of normal and abnormal scores is `fmclip.evaluation.plots.score_histograms`.

The source has no map. Ours is the same distance one patch at a time: 1 - cosine of each patch to the mean patch of the
references, averaged over the levels, so it works on every tower; it knows nothing of places, as the score does not. The
embedding says whether a scan deviates and its patches where: maps are brought to the scale of the scores (`map_scale`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fmclip.detectors.base import Detector, DetectorConfig, Prediction, forward_passes, to_pixels
from fmclip.detectors.events import OnEvent, Ready, StageStarted
from fmclip.detectors.log_odds import log_odds_predictions, map_scale, square_answer, to_probability
from fmclip.errors import CheckpointError
from fmclip.maps import average_maps
from fmclip.patch_grid import patch_content
from fmclip.scans import Scan

STAGE = "mean embedding"
EPS = 1e-6  # keeps the log-odds of a distance of 0 finite


@dataclass(frozen=True)
class CosineConfig(DetectorConfig):
    """There is nothing to set but what every detector has."""

    @classmethod
    def preset(cls, name: str = "full", **overrides: Any) -> CosineConfig:
        """Nothing is trained, so all presets are the same."""
        return cls(**overrides)


class Cosine(Detector):
    """See the module.

    Attributes:
        mean_: [D], mean embedding of the references, L2-normalised.
        mean_patches_: [C_j] for each level, mean direction of the references' patches, L2-normalised.
        map_scale_: Slope and offset of the map's log-odds, see `map_scale`.
    """

    name = "cosine"
    config_class = CosineConfig
    title = "Cosine distance"
    summary = "Distance to the mean of the references: the plainest method, for comparison."

    mean_: Tensor
    mean_patches_: list[Tensor]
    map_scale_: tuple[float, float]

    @torch.no_grad()
    def fit(
        self,
        normals: Sequence[Scan],
        abnormals: Sequence[Scan] | None = None,
        *,
        abnormal_masks: Sequence[np.ndarray | None] | None = None,
        on_event: OnEvent | None = None,
    ) -> Cosine:
        """Average the embeddings of the references; abnormal scans are not used."""
        normals, on_event = self._begin(normals, on_event)
        on_event(StageStarted(STAGE, 0))
        embeddings, sums = [], []
        for some in forward_passes(len(normals), self.tower.device):
            pixels, content, _ = to_pixels(normals[some], self.tower)
            embeddings.append(self.tower.embed_images(pixels))
            sums.append([_sum_of_patches(level, content) for level in self.tower.features(pixels)])
        every = torch.cat(embeddings)  # [k, D]
        others = F.normalize(every.sum(dim=0) - every, dim=1)  # mean of the others, up to its length
        scores = _log_odds(1 - (every * others).sum(dim=1))
        levels = [torch.cat(level) for level in zip(*sums, strict=True)]  # [k, C_j] each
        maps, masks = [], []
        for place, scan in enumerate(normals):
            pixels, content, _ = to_pixels([scan], self.tower)
            rest = [F.normalize(level.sum(dim=0) - level[place], dim=0) for level in levels]
            maps.append(self._map(self.tower.features(pixels), rest))
            masks.append(content)
        self.mean_ = F.normalize(every.mean(dim=0), dim=0)
        self.mean_patches_ = [F.normalize(level.sum(dim=0), dim=0) for level in levels]
        self.map_scale_ = map_scale(torch.cat(maps), scores, torch.cat(masks))
        self.reference_scores_ = to_probability(scores)
        on_event(Ready(STAGE, self))
        return self

    @torch.no_grad()
    def predict(self, scans: Sequence[Scan]) -> list[Prediction]:
        """Score each scan by 1 - cosine to the mean embedding, and map each patch likewise."""
        found: list[Prediction] = []
        for pixels, _, boxes in self._batches(scans):
            found += log_odds_predictions(*self._answer(pixels), boxes, self.tower.image_size)
        return found

    @torch.no_grad()
    def map_squares(self, pixels: Tensor, content: Tensor) -> tuple[Tensor, Tensor]:
        """Maps and scores by the distance to the means."""
        return square_answer(*self._answer(pixels), self.tower.image_size)

    def state(self) -> dict[str, Tensor]:
        """Mean embedding and mean patches."""
        self._require_fit()
        patches = {f"patches.{level}": mean.cpu() for level, mean in enumerate(self.mean_patches_)}
        return {"mean": self.mean_.cpu(), "map_scale": torch.tensor(self.map_scale_), **patches}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back the means."""
        shapes: dict[str, tuple[int, ...]] = {"mean": (self.tower.text_width,), "map_scale": (2,)}
        shapes |= {f"patches.{level}": (width,) for level, width in enumerate(self.tower.widths)}
        if {name: tuple(tensor.shape) for name, tensor in state.items()} != shapes:
            raise CheckpointError("The adapter file lacks means or holds means of the wrong size; adapt again.")
        device = self.tower.device
        self.mean_ = state["mean"].to(device)
        slope, offset = state["map_scale"].tolist()
        self.map_scale_ = (slope, offset)
        self.mean_patches_ = [state[f"patches.{level}"].to(device) for level in range(len(self.tower.widths))]

    def _answer(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Log-odds of the map [B, h, w] and of the picture [B]."""
        slope, offset = self.map_scale_
        scores = _log_odds(1 - self.tower.embed_images(pixels) @ self.mean_)
        return slope * self._map(self.tower.features(pixels), self.mean_patches_) + offset, scores

    def _map(self, features: Sequence[Tensor], means: Sequence[Tensor]) -> Tensor:
        """Log-odds [B, h, w] of the mean over the levels of 1 - cosine, on the grid of the finest."""
        distances = [
            1 - torch.einsum("bchw,c->bhw", F.normalize(level, dim=1), mean)
            for level, mean in zip(features, means, strict=True)
        ]
        return _log_odds(average_maps(distances, self.tower.grids[0]))


def _log_odds(distance: Tensor) -> Tensor:
    """Log-odds of a distance in [0, 2] of which 1, a right angle, counts as certain."""
    return torch.logit(distance, eps=EPS)


def _sum_of_patches(level: Tensor, content: Tensor) -> Tensor:
    """Sum the directions of the patches of each scan, letterbox bars left out: [B, C, H, W] -> [B, C]."""
    inside = patch_content(content, (level.shape[2], level.shape[3]))
    return (F.normalize(level, dim=1) * inside[:, None]).sum(dim=(2, 3))
