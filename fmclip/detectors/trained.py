"""Common part of the methods that train a network on pictures of both kinds: read, train, score the references.

A method says what its network is, what it reads from the frozen tower, its loss and its answer; the rest is here.

The reference scores come from networks that have not seen the scan: the references are dealt into `folds`, and for each
fold a network is trained without it (with as many folds as scans that is leave-one-out). The network that answers is
trained on all of them. Until the folds are done, the references are scored by that one, and the threshold is low.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fmclip.detectors.base import (
    N_ABNORMALS,
    Detector,
    DetectorConfig,
    Prediction,
    forward_passes,
    setting,
    to_pixels,
)
from fmclip.detectors.events import OnEvent, Ready, StageStarted, Step, ignore
from fmclip.detectors.log_odds import log_odds_predictions, map_offset, square_answer, to_probability
from fmclip.detectors.samples import SYNTHESIS, Samples, balanced_batches, from_scans, from_synthesis
from fmclip.errors import CheckpointError, Stopped
from fmclip.losses import dice_loss, focal_loss
from fmclip.maps import resize_map
from fmclip.patch_grid import grid_of
from fmclip.scans import Scan

READING = "features"
TRAINING = "training"
SCORING = "scores of the references"
MAP_OFFSET = "map_offset"


@dataclass(frozen=True)
class TrainedConfig(DetectorConfig):
    """What all trained methods can be told."""

    epochs: int = setting(60, "passes over the pictures that are learned from")
    batch_size: int = setting(16, "pictures in a training step, half of them abnormal")
    lr: float = setting(1e-3, "learning rate")
    folds: int = setting(4, "networks trained to score the references, each without a share of them; 0 trains none")
    copies: int = setting(3, "varied copies of each scan that is learned from, where abnormal scans are given")
    pool_size: int = setting(128, "synthetic pictures, where no abnormal scans are given")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}

    def plan(self, references: int) -> list[tuple[str, int]]:
        """Synthesis, features, training, and the folds that score the references."""
        steps = max(1, math.ceil(self.pool_size * self.epochs / self.batch_size))
        folds = min(self.folds, references) if self.folds > 1 else 0
        stages = [(SYNTHESIS, self.pool_size), (READING, self.pool_size), (TRAINING, steps)]
        return stages + [(f"{SCORING}, {fold + 1} of {folds}", steps) for fold in range(folds)]

    @classmethod
    def preset(cls, name: str = "full", **overrides: Any) -> TrainedConfig:
        """Settings by name: `fast` for a look, `full` as this machine can bear, `paper` as published.

        Raises:
            ValueError: There is no preset of that name.
        """
        if name not in cls.PRESETS:
            raise ValueError(f"Unknown preset {name!r}; there are {', '.join(cls.PRESETS)}.")
        return cls(**{**cls.PRESETS[name], **overrides})


class TrainedDetector(Detector):
    """See the module.

    Attributes:
        network_: What was trained; the tower stays as it is.
        map_offset_: Added to the map's log-odds, see `map_offset`.
    """

    network_: nn.Module
    map_offset_: float

    @abstractmethod
    def _new_network(self, generator: torch.Generator, reads: Sequence[Tensor] | None) -> nn.Module:
        """Make an untrained network; `reads` of what it will learn from, or None if its state will be loaded."""

    @abstractmethod
    def _read(self, pixels: Tensor) -> list[Tensor]:
        """What the network reads of pictures [B, 3, S, S], kept while it is trained: tensors [B, ...]."""

    @abstractmethod
    def _answer(self, network: Any, reads: Sequence[Tensor], content: Tensor) -> tuple[Tensor, Tensor]:
        """Log-odds of the map [B, h, w] and of the picture [B]; content [B, S, S] bool."""

    @abstractmethod
    def _loss(self, network: Any, reads: Sequence[Tensor], labels: Tensor, masks: Tensor, drawn: Tensor) -> Tensor:
        """Loss of a batch: labels [B], masks [B, m, m], drawn [B] whether the mask is known."""

    def _optimiser(self, network: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(network.parameters(), lr=self.config.lr)

    def fit(
        self,
        normals: Sequence[Scan],
        abnormals: Sequence[Scan] | None = None,
        *,
        abnormal_masks: Sequence[np.ndarray | None] | None = None,
        on_event: OnEvent | None = None,
    ) -> TrainedDetector:
        """Train on normal and abnormal scans; where the method can do without the latter, on synthetic anomalies."""
        normals, on_event = self._begin(normals, on_event)
        if self.uses_abnormals == "required":
            self._require_abnormals(abnormals)
        generator = torch.Generator().manual_seed(self.config.seed)
        try:
            pixels, content, _ = to_pixels(normals, self.tower)
            n_abnormals = len(abnormals or ()) if self.uses_abnormals != "never" else 0
            if abnormals and n_abnormals:
                copies = self.config.copies
                samples = from_scans(normals, list(abnormals), abnormal_masks, self.tower, copies, generator)
            else:
                size = self.config.pool_size
                samples = from_synthesis(pixels, content, self.config.scan_type, size, generator, on_event)
            reads = self._read_all(samples.pixels, on_event)
            network = self._train(samples, reads, torch.arange(len(samples.labels)), generator, TRAINING, on_event)
            own = self._read_all(pixels, ignore)
            self._settle(network, own, content)
            self.n_abnormals_ = n_abnormals
            on_event(Ready(TRAINING, self))
            if self.config.folds > 1:
                self._score_by_folds(samples, reads, own, content, on_event)
                on_event(Ready(SCORING, self))
        except Stopped:
            if not self.is_fitted:
                raise
        return self

    def _train(
        self,
        samples: Samples,
        reads: Sequence[Tensor],
        rows: Tensor,
        generator: torch.Generator,
        stage: str,
        on_event: OnEvent,
    ) -> nn.Module:
        """Train a network on some rows of the samples."""
        network = self._new_network(generator, [read[rows] for read in reads]).to(self.tower.device)
        self._run(network, samples, reads, rows, self.config.epochs, generator, stage, on_event)
        return network.eval().requires_grad_(False)

    def _run(
        self,
        network: nn.Module,
        samples: Samples,
        reads: Sequence[Tensor],
        rows: Tensor,
        epochs: int,
        generator: torch.Generator,
        stage: str,
        on_event: OnEvent,
    ) -> None:
        """Take the optimiser steps of some epochs; 0 takes none."""
        device, config = self.tower.device, self.config
        steps = math.ceil(len(rows) * epochs / config.batch_size)
        if steps == 0:
            return
        on_event(StageStarted(stage, steps))
        optimiser = self._optimiser(network)
        for step, batch in enumerate(balanced_batches(samples.labels[rows], config.batch_size, steps, generator), 1):
            taken = rows[batch]
            parts = (samples.labels[taken], samples.masks[taken], samples.is_drawn[taken])
            loss = self._loss(network, [read[taken].to(device) for read in reads], *(part.to(device) for part in parts))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            on_event(Step(stage, step, steps, float(loss.detach())))

    @torch.no_grad()
    def _settle(self, network: nn.Module, own: Sequence[Tensor], content: Tensor) -> None:
        """Make a network the one that answers: `own` is what it reads of the references, content [k, S, S]."""
        maps, scores = self._answer_all(network, own, content)
        self.network_, self.map_offset_ = network, map_offset(maps, scores, content)
        self.reference_scores_ = to_probability(scores)

    def _score_by_folds(
        self, samples: Samples, reads: Sequence[Tensor], own: Sequence[Tensor], content: Tensor, on_event: OnEvent
    ) -> None:
        k = len(content)
        folds = min(self.config.folds, k)
        scores, offsets = torch.zeros(k, dtype=torch.float64), []
        for fold in range(folds):
            generator = torch.Generator().manual_seed(self.config.seed + 1 + fold)
            held = list(range(fold, k, folds))
            stage = f"{SCORING}, {fold + 1} of {folds}"
            network = self._train(samples, reads, samples.rows_without(held), generator, stage, on_event)
            with torch.no_grad():
                seen = content[held]
                maps, found = self._answer_all(network, [read[held] for read in own], seen)
            scores[held] = found.double().cpu()
            offsets.append(map_offset(maps, found, seen) * len(held))
        self.map_offset_, self.reference_scores_ = sum(offsets) / k, to_probability(scores)

    @torch.no_grad()
    def predict(self, scans: Sequence[Scan]) -> list[Prediction]:
        """Map each scan by the trained network."""
        found: list[Prediction] = []
        for pixels, content, boxes in self._batches(scans):
            maps, scores = self._answer(self.network_, self._read(pixels), content)
            found += log_odds_predictions(maps + self.map_offset_, scores, boxes, self.tower.image_size)
        return found

    @torch.no_grad()
    def map_squares(self, pixels: Tensor, content: Tensor) -> tuple[Tensor, Tensor]:
        """Maps and scores of the trained network."""
        maps, scores = self._answer(self.network_, self._read(pixels), content)
        return square_answer(maps + self.map_offset_, scores, self.tower.image_size)

    def state(self) -> dict[str, Tensor]:
        """The network's weights."""
        self._require_fit()
        weights = {f"network.{name}": value.detach().cpu() for name, value in self.network_.state_dict().items()}
        own = {MAP_OFFSET: torch.tensor(self.map_offset_), N_ABNORMALS: torch.tensor(self.n_abnormals_)}
        return own | weights

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back the network."""
        network = self._new_network(torch.Generator().manual_seed(self.config.seed), None)
        try:
            weights = {name: value for name, value in state.items() if name not in (MAP_OFFSET, N_ABNORMALS)}
            network.load_state_dict({name.removeprefix("network."): value for name, value in weights.items()})
            offset, n_abnormals = float(state[MAP_OFFSET]), int(state[N_ABNORMALS])
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                "The adapter file lacks parts or holds parts of the wrong size; adapt again."
            ) from error
        self.network_ = network.to(self.tower.device).eval().requires_grad_(False)
        self.map_offset_, self.n_abnormals_ = offset, n_abnormals

    @torch.no_grad()
    def _read_all(self, pixels: Tensor, on_event: OnEvent) -> list[Tensor]:
        """Read many pictures [N, 3, S, S], a few at a time: tensors [N, ...] on the CPU."""
        on_event(StageStarted(READING, len(pixels)))
        parts = []
        for some in forward_passes(len(pixels), self.tower.device):
            parts.append([read.cpu() for read in self._read(pixels[some].to(self.tower.device))])
            on_event(Step(READING, some.stop, len(pixels), math.nan))
        return [torch.cat(read) for read in zip(*parts, strict=True)]

    def _answer_all(self, network: nn.Module, reads: Sequence[Tensor], content: Tensor) -> tuple[Tensor, Tensor]:
        """Maps [N, h, w] and scores [N] of what was read of N pictures."""
        answers = []
        for some in forward_passes(len(content), self.tower.device):
            own = [read[some].to(self.tower.device) for read in reads]
            answers.append(self._answer(network, own, content[some]))
        maps, scores = zip(*answers, strict=True)
        return torch.cat(maps), torch.cat(scores)


def map_losses(maps: Tensor, masks: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Dice and focal loss of the maps whose mask is known (FusionMedCLIP Eq. 16, MadCLIP section 2).

    Args:
        maps: Probabilities [B, h, w].
        masks: [B, m, m], shares of each cell that are abnormal.
        drawn: [B] bool.

    Returns:
        Two scalars; 0 where no mask of the batch is known.
    """
    if not drawn.any():
        nothing = maps.sum() * 0
        return nothing, nothing
    fine, truth = resize_map(maps[drawn], grid_of(masks)), (masks[drawn] > 0.5).to(maps.dtype)
    return dice_loss(fine, truth), focal_loss(fine, truth)
