"""Patch memory: the distance of each patch to the nearest patch of the reference scans; nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmclip.detectors.base import Detector, DetectorConfig, Prediction, batched_features, to_pixels
from fmclip.detectors.events import OnEvent, Ready, StageStarted
from fmclip.detectors.evidence import image_scores, predictions, to_unit
from fmclip.errors import CheckpointError
from fmclip.maps import smooth_map
from fmclip.memory import SHRINKAGE, ReferenceMemory, grid_of, patch_weight
from fmclip.scans import Scan
from fmclip.views import default_views


@dataclass(frozen=True)
class PatchMemoryConfig(DetectorConfig):
    """Settings of the patch memory.

    Attributes:
        shrinkage: Share of the isotropic part in the residual covariance.
        smoothing: Sigma of the Gaussian over the patch map, in patches.
    """

    shrinkage: float = field(default=SHRINKAGE, metadata={"help": "isotropic share of the residual covariance"})
    smoothing: float = field(default=0.6, metadata={"help": "sigma of the Gaussian over the patch map, in patches"})

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
    summary = "Each patch against the nearest reference patch. Nothing is trained: answers within seconds."

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
        on_event(StageStarted("patch memory", 0))
        pixels, content, _ = to_pixels(normals, self.tower)
        features = batched_features(self.tower, pixels)
        self.memory_ = ReferenceMemory.learn(features, content, default_views(self.tower.grids), self.config.shrinkage)
        distances = self.memory_.leave_one_out(features, content, self.config.shrinkage)
        self.memory_.calibrate(distances, content)
        maps = memory_map(self.memory_, distances, content, self.config.smoothing)
        self.reference_scores_ = tuple(to_unit(image_scores(maps)).tolist())
        on_event(Ready("patch memory", self))
        return self

    @torch.no_grad()
    def predict(self, scans: Sequence[Scan]) -> list[Prediction]:
        """Map each scan by the weighted mean distance over the views."""
        found: list[Prediction] = []
        for pixels, content, boxes in self._batches(scans):
            distances, _ = self.memory_.compare(self.tower.features(pixels))  # [B, V, h, w]
            maps = memory_map(self.memory_, distances, content, self.config.smoothing)
            found += predictions({"patch memory": maps}, maps, boxes, self.tower.image_size)
        return found

    @torch.no_grad()
    def predict_synthetic(self, pixels: Tensor, content: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
        """Each picture is compared with the patches of the other references."""
        distances, _ = self.memory_.compare(self.tower.features(pixels), sources)
        maps = memory_map(self.memory_, distances, content, self.config.smoothing)
        return to_unit(maps), to_unit(image_scores(maps))

    def state(self) -> dict[str, Tensor]:
        """Whitened reference patches, whitening, scales and levels."""
        self._require_fit()
        return self.memory_.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back a memory."""
        assert self.reference_scores_ is not None, "the checkpoint sets the reference scores first"
        views = default_views(self.tower.grids)
        try:
            self.memory_ = ReferenceMemory.from_state(state, views, len(self.reference_scores_), self.tower.device)
        except (KeyError, ValueError) as error:
            raise CheckpointError("The adapter file lacks parts of its patch memory; adapt again.") from error


def memory_map(memory: ReferenceMemory, distances: Tensor, content: Tensor, smoothing: float) -> Tensor:
    """Weigh the views' distances and smooth: [B, V, h, w] and content [B, S, S] -> [B, h, w], 0 on letterbox bars."""
    maps = smooth_map(memory.evidence(distances), smoothing)
    return maps * patch_weight(content, grid_of(maps))
