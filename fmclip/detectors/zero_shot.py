"""Zero-shot CLIP: each scan is compared with hand-written normal and abnormal prompts; nothing is trained.

The first row of FusionMedCLIP's Table 8 and the baseline of ConRAD ("plain CLIP with hand-written prompts"). The score
is the softmax over the two prompts of the image embedding; the map is the same for each patch embedding, from the value
path of the last block (MaskCLIP). The references are needed for the threshold alone: each is scored as any scan is.

A tower whose halves were never trained together is refused: its cosines between pictures and words mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmclip.detectors.base import Detector, DetectorConfig, Prediction, forward_passes, to_pixels
from fmclip.detectors.events import OnEvent, Ready, StageStarted
from fmclip.detectors.log_odds import log_odds_predictions, map_offset, square_answer, to_probability
from fmclip.detectors.manual_prompts import embed_manual_prompts
from fmclip.errors import CheckpointError
from fmclip.scans import Scan

STAGE = "hand-written prompts"


@dataclass(frozen=True)
class ZeroShotConfig(DetectorConfig):
    """Settings of zero-shot use."""

    temperature: float = field(
        default=0.01, metadata={"help": "temperature of the softmax over the two prompts; CLIP's own is 0.01"}
    )

    @classmethod
    def preset(cls, name: str = "full", **overrides: Any) -> ZeroShotConfig:
        """Nothing is trained, so all presets are the same."""
        return cls(**overrides)


class ZeroShot(Detector):
    """See the module.

    Attributes:
        prompts_: [2, D], embedded prompts: normal, abnormal.
        map_offset_: Added to the map's log-odds, see `map_offset`.
    """

    name = "zero_shot"
    config_class = ZeroShotConfig
    title = "Zero-shot CLIP"
    summary = "Hand-written prompts alone. Needs a tower trained on pictures and text together."
    needs_alignment = True

    prompts_: Tensor
    map_offset_: float

    @torch.no_grad()
    def fit(
        self,
        normals: Sequence[Scan],
        abnormals: Sequence[Scan] | None = None,
        *,
        abnormal_masks: Sequence[np.ndarray | None] | None = None,
        on_event: OnEvent | None = None,
    ) -> ZeroShot:
        """Embed the prompts and score the references; nothing is learned from them or from abnormal scans."""
        normals, on_event = self._begin(normals, on_event)
        on_event(StageStarted(STAGE, 0))
        prompts = embed_manual_prompts(self.tower, self.config.scan_type)
        pixels, content, _ = to_pixels(normals, self.tower)
        answers = [self._answer(pixels[some], prompts) for some in forward_passes(len(pixels), self.tower.device)]
        maps, scores = (torch.cat(part) for part in zip(*answers, strict=True))
        self.prompts_, self.map_offset_ = prompts, map_offset(maps, scores, content)
        self.reference_scores_ = to_probability(scores)
        on_event(Ready(STAGE, self))
        return self

    @torch.no_grad()
    def predict(self, scans: Sequence[Scan]) -> list[Prediction]:
        """Score and map each scan by its softmax over the prompts."""
        found: list[Prediction] = []
        for pixels, _, boxes in self._batches(scans):
            maps, scores = self._answer(pixels, self.prompts_)
            found += log_odds_predictions(maps + self.map_offset_, scores, boxes, self.tower.image_size)
        return found

    @torch.no_grad()
    def map_squares(self, pixels: Tensor, content: Tensor) -> tuple[Tensor, Tensor]:
        """Maps and scores by the softmax over the prompts."""
        maps, scores = self._answer(pixels, self.prompts_)
        return square_answer(maps + self.map_offset_, scores, self.tower.image_size)

    def state(self) -> dict[str, Tensor]:
        """The embedded prompts."""
        self._require_fit()
        return {"prompts": self.prompts_.cpu(), "map_offset": torch.tensor(self.map_offset_)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back the prompts."""
        shapes = {"prompts": (2, self.tower.text_width), "map_offset": ()}
        if {name: tuple(tensor.shape) for name, tensor in state.items()} != shapes:
            raise CheckpointError("The adapter file lacks its prompts or holds some of the wrong size; adapt again.")
        self.prompts_, self.map_offset_ = state["prompts"].to(self.tower.device), float(state["map_offset"])

    def _answer(self, pixels: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Log-odds of "abnormal" for each place [B, H, W] and each picture [B]: a softmax over two."""
        direction = (prompts[1] - prompts[0]) / self.config.temperature  # [D]
        maps = torch.einsum("bdhw,d->bhw", self.tower.embed_patches(pixels), direction)
        return maps, self.tower.embed_images(pixels) @ direction
