"""FusionMedCLIP: prompts and adapters learned from k normal scans and the anomalies synthesised on them.

Stage 2 (`training.train_stage2`) learns UMLS-initialised prompts and alignment adapters on the frozen tower, stage 3
(`training.train_stage3`) also LoRA and block adapters. Stage 1, the medical pre-training, is a property of the tower.

What differs from the dissertation, with figures in benchmarks/NOTES.md: the alignment adapters read the *residual* of
each patch to its nearest reference patch instead of the plain feature (`features`), and the patch memory alone says
whether a scan deviates; where it does, the learned map says together with the memory (`learned_share`).

So the reference scores are leave-one-out, and stage 2 changes none. After stage 3 the memory is that of the adapted
tower, which has seen all references; what that does to scores and thresholds is measured in benchmarks/NOTES.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from fmclip.acceleration import Acceleration
from fmclip.detectors.base import Detector, Prediction, batched_features, to_pixels
from fmclip.detectors.events import Notice, OnEvent, Ready, StageStarted, SyntheticExample, SyntheticExamples, Training
from fmclip.detectors.evidence import (
    MEMORY_SPREAD,
    SHARPNESS,
    Evidence,
    image_scores,
    predictions,
    square_answer,
    to_unit,
)
from fmclip.detectors.fallback import GAVE_UP, NOT_RESUMED, train_within_memory
from fmclip.detectors.fusionmedclip_config import PRESETS as PRESETS
from fmclip.detectors.fusionmedclip_config import FusionMedCLIPConfig as FusionMedCLIPConfig
from fmclip.detectors.network import FusionNetwork
from fmclip.detectors.patch_memory import learn_memory, memory_evidence
from fmclip.detectors.seen_features import SeenFeatures
from fmclip.detectors.synthetic import stack_pictures
from fmclip.detectors.training import (
    STAGE2,
    Pool,
    synthesise,
    train_stage2,
    train_stage3,
)
from fmclip.errors import CheckpointError, FmclipError, Stopped, TowerError
from fmclip.maps import average_maps, smooth_inside
from fmclip.memory import ReferenceMemory
from fmclip.patch_grid import grid_of, patch_content
from fmclip.process import give_back
from fmclip.scans import Scan
from fmclip.synthesis import SyntheticScan
from fmclip.towers import Tower
from fmclip.views import View, levels_needed, tower_views

References: TypeAlias = tuple[list[Tensor], ReferenceMemory, Tensor]
"""Features of the references, the memory learned from them, and their distances to it as `learn_memory` has them."""


class FusionMedCLIP(Detector):
    """See the module; `network.FusionNetwork` holds what is trained.

    Attributes:
        memory_: Patch memory of the references, under the tower in use.
        network_: Prompts, adapters and temperature; None while only the memory has been learned.
        adapted_: The tower in use: `tower` itself, or one with the LoRA of stage 3 merged.
        prompts_: [2, D], both prompts as the text tower embeds them: once for all scans; None without a network.
        is_resumed_: Whether stage 3 went on from a state, which one fit repeats nearly but not exactly.
        learned_level_: Mean over the references of the largest log-odds of the learned map.
        acceleration: How training uses the device; None takes what suits it.
    """

    name = "fusionmedclip"
    config_class = FusionMedCLIPConfig
    title = "FusionMedCLIP (default)"
    compares_patches = True
    spread_prior = MEMORY_SPREAD
    summary = (
        "A memory of your scans' patches; prompts and adapters that learn from synthetic anomalies help to map. "
        "Abnormal scans at hand too? Guided memory learns from them."
    )

    memory_: ReferenceMemory
    network_: FusionNetwork | None = None
    adapted_: Tower
    prompts_: Tensor | None = None
    is_resumed_: bool = False
    learned_level_: float = 0.0
    acceleration: Acceleration | None = None
    _seen: SeenFeatures | None = None

    def fit(
        self,
        normals: Sequence[Scan],
        abnormals: Sequence[Scan] | None = None,
        *,
        abnormal_masks: Sequence[np.ndarray | None] | None = None,
        on_event: OnEvent | None = None,
    ) -> FusionMedCLIP:
        """Learn the memory, then stage 2, then stage 3; each is announced by `Ready` and refines the same map."""
        return self._train(normals, on_event, None)

    def resume(self, normals: Sequence[Scan], start: Training, *, on_event: OnEvent | None = None) -> FusionMedCLIP:
        """Go on with a training that was stopped, or is to become longer.

        In stage 2 the result is, bit for bit, what one fit would have given; stage 3 looks at the references anew
        when it goes on, which one fit does at every 25th step only.

        Args:
            normals: The same reference scans as then; scan type and seed in the config must be the same too.
            start: Where it stood.
            on_event: As for `fit`.

        Returns:
            The detector itself.

        Raises:
            FmclipError: The memory does not suffice for stage 3. The result is then that of no training: go on with
                what there was before.
        """
        return self._train(normals, on_event, start)

    def _train(self, normals: Sequence[Scan], on_event: OnEvent | None, start: Training | None) -> FusionMedCLIP:
        normals, on_event = self._begin(normals, on_event)
        generator = torch.Generator().manual_seed(self.config.seed)
        acceleration = self.acceleration or Acceleration.of(self.tower.device)
        pixels, content, _ = to_pixels(normals, self.tower)
        self._seen = SeenFeatures(self.tower)
        try:
            on_event(StageStarted("patch memory", 0))
            looked = self._settle(self.tower, None, pixels, content)
            if start is None:
                on_event(Ready("patch memory", self))
            give_back()
            pool = synthesise(pixels, content, self.config, generator, on_event, acceleration.on_device)
            on_event(SyntheticExamples(self._examples(pool.shown, None)))
            network = FusionNetwork(self.tower, self.memory_.views, self.config, generator)
            if start is None or start.stage == STAGE2:
                train_stage2(
                    network, self.tower, self.memory_, pool, self.config, generator, on_event, start, acceleration
                )
                self._settle(self.tower, network, pixels, content, looked)  # under the same features as before
                on_event(Ready("stage 2", self))
                on_event(SyntheticExamples(self._examples(pool.shown, content)))
                start = None
            if self.config.stage3_epochs > 0:
                self._stage3(network, pixels, content, pool, generator, on_event, start, acceleration)
        except Stopped:
            if not self.is_fitted:
                raise
        finally:
            self._seen = None
        return self

    def _stage3(
        self,
        network: FusionNetwork,
        pixels: Tensor,
        content: Tensor,
        pool: Pool,
        generator: torch.Generator,
        on_event: OnEvent,
        start: Training | None,
        acceleration: Acceleration,
    ) -> None:
        went_on = False

        def train(how: Acceleration, begin: Training | None, listen: OnEvent) -> tuple[Tower, FusionNetwork]:
            nonlocal went_on
            went_on = begin is not None
            refined = network.with_block_adapters(self.tower, self.config, generator)  # a copy: it is trained in place
            tower = train_stage3(refined, self.tower, pixels, content, pool, self.config, generator, listen, begin, how)
            return tower, refined

        give_back()
        trained = train_within_memory(train, acceleration, self.config.batch_size, generator, on_event, start)
        if trained is None and start is not None:  # there is no stage 2 here to be kept, only the bare memory
            raise FmclipError(NOT_RESUMED)
        if trained is None:
            on_event(Notice(GAVE_UP))
            return
        give_back()
        self._settle(*trained, pixels, content)
        self.is_resumed_ = went_on
        on_event(Ready("stage 3", self))
        on_event(SyntheticExamples(self._examples(pool.shown, content)))

    @torch.no_grad()
    def _settle(
        self,
        tower: Tower,
        network: FusionNetwork | None,
        pixels: Tensor,
        content: Tensor,
        looked: References | None = None,
    ) -> References:
        """Make tower and network the ones that answer; returns what may be `looked` at again under the same tower."""
        if looked is None:
            features = batched_features(tower, pixels)
            features = features if network is None else network.refine(features)
            config = self.config
            learned = learn_memory(
                features,
                content,
                self._learn,
                tower_views(self.tower),
                len(content),
                config.shrinkage,
                config.smoothing,
            )
            looked = (features, *learned)
        features, memory, honest = looked
        own = torch.arange(len(content), device=pixels.device)
        prompts = None if network is None else network.prompts(self.tower)
        remembered, log_odds = self._evidence(features, content, memory, network, prompts, own, honest)
        level = float(image_scores(log_odds).mean()) if log_odds is not None else 0.0
        maps = self._combine(remembered, log_odds, level, content).maps()
        self.adapted_, self.network_, self.memory_, self.learned_level_ = tower, network, memory, level
        self.prompts_, self.is_resumed_ = prompts, False
        self.reference_scores_ = tuple(to_unit(image_scores(maps)).tolist())
        return looked

    def _learn(
        self, features: Sequence[Tensor], content: Tensor, references: int, views: Sequence[View]
    ) -> ReferenceMemory:
        return ReferenceMemory.learn(features, content, views, self.config.shrinkage, references=references)

    def _evidence(
        self,
        features: list[Tensor],
        content: Tensor,
        memory: ReferenceMemory,
        network: FusionNetwork | None,
        prompts: Tensor | None,
        own: Tensor | None = None,
        honest: Tensor | None = None,
    ) -> tuple[Evidence, Tensor | None]:
        """Evidence of the memory, and log-odds [B, h, w] of the learned map (None without a network)."""
        sigmas = self.config.smoothing, self.config.map_smoothing
        if network is None and honest is not None:
            return memory_evidence(memory, honest, content, sigmas), None
        distances, residuals = memory.compare(features, own, residuals=network is not None)
        if honest is not None:  # the references: residuals grow as distances do in a memory that has never seen them
            growth = honest / distances.clamp_min(1e-6)  # [B, V, h, w]
            shown = [place for place, view in enumerate(memory.views) if view.is_learned_from]
            residuals = [one * growth[:, place, None] for place, one in zip(shown, residuals, strict=True)]
            distances = honest
        remembered = memory_evidence(memory, distances, content, sigmas)
        if network is None or prompts is None:
            return remembered, None
        learned = network(features, residuals, prompts)  # [B, h, w]
        inside = patch_content(content, grid_of(learned)).to(learned)
        return remembered, torch.logit(smooth_inside(learned, inside, sigmas[1]), eps=1e-6)  # lowest on bars

    def _combine(self, remembered: Evidence, log_odds: Tensor | None, level: float, content: Tensor) -> Evidence:
        """What the memory scores; placed by it and by exp(slope * log-odds above the references' level)."""
        if log_odds is None:
            return remembered
        inside = patch_content(content, grid_of(log_odds)).to(log_odds)
        learned = (self.config.learned_slope * (log_odds - level)).exp() * inside
        return remembered.placed_with(learned, self.config.learned_share)

    @torch.no_grad()
    def predict(self, scans: Sequence[Scan]) -> list[Prediction]:
        """Score each scan by the memory, map it by memory and learned map together."""
        found: list[Prediction] = []
        for pixels, content, boxes in self._batches(scans):
            remembered, log_odds, maps = self._answer(pixels, content)
            parts = {"patch memory": remembered.maps()}
            if log_odds is not None:
                parts["learned"] = ((log_odds - self.learned_level_) / SHARPNESS).exp()  # shown as a probability
            found += predictions(parts, maps, boxes, self.tower.image_size)
        return found

    @torch.no_grad()
    def map_squares(self, pixels: Tensor, content: Tensor) -> tuple[Tensor, Tensor]:
        """Maps and scores of squares, as `predict` has them."""
        *_, maps = self._answer(pixels, content)
        return square_answer(maps, self.tower.image_size)

    @torch.no_grad()
    def patch_features(self, pixels: Tensor) -> list[Tensor]:
        """What the memory compares: pixels [B, 3, S, S] in [0, 1] -> one [B, C_j, H_j, W_j] for each level in use."""
        looks = self._seen if self._seen is not None and self.adapted_ is self.tower else self.adapted_
        features = looks.features(pixels, levels_needed(self.memory_.views))
        return features if self.network_ is None else self.network_.refine(features)

    def _answer(
        self, pixels: Tensor, content: Tensor, own: Tensor | None = None
    ) -> tuple[Evidence, Tensor | None, Tensor]:
        """Weigh up scans: evidence of the memory, log-odds of the learned map, and the map of both [B, h, w]."""
        features = self.patch_features(pixels)
        remembered, log_odds = self._evidence(features, content, self.memory_, self.network_, self.prompts_, own)
        return remembered, log_odds, self._combine(remembered, log_odds, self.learned_level_, content).maps()

    @torch.no_grad()
    def _examples(self, scans: Sequence[SyntheticScan], content: Tensor | None) -> tuple[SyntheticExample, ...]:
        """What is learned from; with the references' content [k, S, S] also what the detector makes of it by now."""
        heats: Sequence[np.ndarray | None] = [None] * len(scans)
        if content is not None:
            pixels = stack_pictures(scans)
            own = torch.tensor([scan.source for scan in scans], device=self.tower.device)
            *_, maps = self._answer(pixels.to(own.device), content[own], own)
            heats = list(average_maps([to_unit(maps)], self.tower.image_size).cpu().numpy())
        shown = []
        for scan, heat in zip(scans, heats, strict=True):
            text = scan.anomaly.describe() if scan.anomaly else "unchanged normal scan"
            strength = scan.anomaly.describe_strength() if scan.anomaly else ""
            shown.append(SyntheticExample(scan.image, scan.mask, heat, text, scan.to_dict(), strength))
        return tuple(shown)

    @torch.no_grad()
    def predict_synthetic(self, pixels: Tensor, content: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
        """Each picture is compared with the patches of the other references."""
        *_, maps = self._answer(pixels, content, sources)
        return to_unit(maps), to_unit(image_scores(maps))

    def state(self) -> dict[str, Tensor]:
        """Memory, prompts, adapters, temperature, and the tower's LoRA where stage 3 has run."""
        self._require_fit()
        state = self.memory_.state()
        state["learned_level"] = torch.tensor(self.learned_level_)
        state["is_resumed"] = torch.tensor(self.is_resumed_)
        if self.network_ is not None:
            state |= {f"network.{name}": value.detach().cpu() for name, value in self.network_.state_dict().items()}
            state |= {f"lora.{name}": value for name, value in self.network_.lora_state.items()}
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned."""
        assert self.reference_scores_ is not None, "the checkpoint sets the reference scores first"
        views = tower_views(self.tower)
        generator = torch.Generator().manual_seed(self.config.seed)
        network_state = _with_prefix(state, "network.")
        lora_state = _with_prefix(state, "lora.")
        try:
            memory = ReferenceMemory.from_state(state, views, len(self.reference_scores_), self.tower.device)
            level, is_resumed = float(state["learned_level"]), bool(state["is_resumed"])
            network, tower = None, self.tower
            if network_state:
                network = FusionNetwork(self.tower, views, self.config, generator)
                if any(name.startswith("block.") for name in network_state):
                    network = network.with_block_adapters(self.tower, self.config, generator)
                network.load_state_dict(network_state)
                network.lora_state = lora_state
            if lora_state:
                adapted = self.tower.with_lora(
                    self.config.lora_rank,
                    self.config.lora_alpha,
                    0.0,
                    generator=generator,
                    depth=self.config.lora_depth,
                )
                adapted.load_lora_state(lora_state)
                tower = adapted.merged()
        except (KeyError, ValueError, RuntimeError, TowerError) as error:
            raise CheckpointError(
                "The adapter file lacks parts or holds parts of the wrong size; adapt again."
            ) from error
        self.memory_, self.network_, self.adapted_, self.learned_level_ = memory, network, tower, level
        self.is_resumed_ = is_resumed
        with torch.no_grad():
            self.prompts_ = None if network is None else network.prompts(self.tower)


def _with_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
