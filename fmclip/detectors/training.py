"""Stages 2 and 3 of FusionMedCLIP (sections 3.2, 3.3 and 3.5, Table A1)."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fmclip.acceleration import Acceleration
from fmclip.detectors.base import batched_features, forward_passes
from fmclip.detectors.events import OnEvent, StageStarted, Step, Training
from fmclip.detectors.network import FusionNetwork
from fmclip.detectors.pool_features import PoolFeatures
from fmclip.detectors.step import TrainingStep, adamw
from fmclip.detectors.synthetic import SHOWN_EXAMPLES, detached, synthesise_scans
from fmclip.detectors.synthetic import SYNTHESIS as SYNTHESIS
from fmclip.errors import Stopped
from fmclip.losses import dice_loss, focal_loss, image_score
from fmclip.maps import resize_map
from fmclip.memory import ReferenceMemory
from fmclip.patch_grid import grid_of
from fmclip.synthesis import SyntheticScan
from fmclip.towers import Tower
from fmclip.views import levels_needed

if TYPE_CHECKING:
    from fmclip.detectors.fusionmedclip_config import FusionMedCLIPConfig

READING = "features of the synthetic anomalies"
STAGE2 = "stage 2: prompts and alignment adapters"
STAGE3 = "stage 3: LoRA and block adapters"
MAP_SIDE = 56  # the dice loss compares maps at this side; the patch grid is coarser still
KEEP_SECONDS = 1.0  # between two states that are kept; a stop in the middle of a long step goes back to the last one
KEEP_SHARE = 0.02  # of the time may be spent on keeping states, which are large for a large tower
_LORA = "lora."
PLAIN = Acceleration()
MEMORY_REFRESH = 25  # steps of stage 3 between two looks at the references with the tower as it is by then


@dataclass(frozen=True)
class Pool:
    """Synthetic scans to learn from.

    Attributes:
        shown: The first pairs with their records.
        pixels: [P, 3, S, S] float32 in [0, 1]; on the CPU, unless they were made on a device.
        masks: [P, m, m] share of each cell that is anomalous.
        sources: [P, 2] indices of the reference that each was made from, and of the donor of its patch or -1; [P, 1] of
            two references, where leaving out both would leave nothing to compare with.
    """

    shown: list[SyntheticScan]
    pixels: Tensor
    masks: Tensor
    sources: Tensor


def synthesise(
    pixels: Tensor,
    content: Tensor,
    config: FusionMedCLIPConfig,
    generator: torch.Generator,
    on_event: OnEvent,
    on_device: bool | None = None,
) -> Pool:
    """Make the pool (section 3.4): equal shares of identity, structural, density and deformation.

    Args:
        pixels: [k, 3, S, S] references in [0, 1].
        content: [k, S, S] bool.
        config: Pool size and scan type.
        generator: Draws everything.
        on_event: Hears of the progress.
        on_device: See `synthesise_scans`.
    """
    made = synthesise_scans(pixels, content, config.scan_type, config.pool_size, generator, on_event, on_device)
    masks = made.masks.float()  # [P, S, S]
    side = min(MAP_SIDE, masks.shape[-1])
    return Pool(
        shown=detached(made.scans[:SHOWN_EXAMPLES]),
        pixels=made.pixels,
        masks=nn.functional.adaptive_avg_pool2d(masks[:, None], side)[:, 0],
        sources=torch.tensor([scan.sources for scan in made.scans])[:, : 2 if len(pixels) > 2 else 1],
    )


def train_stage2(
    network: FusionNetwork,
    tower: Tower,
    memory: ReferenceMemory,
    pool: Pool,
    config: FusionMedCLIPConfig,
    generator: torch.Generator,
    on_event: OnEvent,
    start: Training | None = None,
    acceleration: Acceleration = PLAIN,
) -> None:
    """Train prompts, alignment adapters and temperature; the frozen tower runs once over the pool."""
    steps = count_steps(memory.references, config.stage2_epochs, config.batch_size)
    on_event(StageStarted(READING, len(pool.pixels)))
    reads = _pool_reads(network, tower, memory, pool, on_event)  # one [P, C_v, h, w] for each view
    on_event(StageStarted(STAGE2, steps))
    optimiser = adamw(_stage2_groups(network, config), config.weight_decay, tower.device)
    is_last = config.stage3_epochs == 0
    course = Course(STAGE2, steps, is_last, network, [], optimiser, generator, len(pool.pixels), on_event)
    course.start(start)
    masks = pool.masks.to(tower.device)

    def loss(rows: Tensor, prompts: Tensor) -> Tensor:
        return _loss(network.map([read[rows] for read in reads], prompts), masks[rows], config)

    step = TrainingStep(
        loss, optimiser, tower.device, is_static=acceleration.static_steps, shared=lambda: network.prompts(tower)
    )
    for batch in course.batches(config.batch_size):
        course.took(step(batch))


def train_stage3(
    network: FusionNetwork,
    tower: Tower,
    pixels: Tensor,
    content: Tensor,
    pool: Pool,
    config: FusionMedCLIPConfig,
    generator: torch.Generator,
    on_event: OnEvent,
    start: Training | None = None,
    acceleration: Acceleration = PLAIN,
) -> Tower:
    """Train everything end to end (section 3.3.3) and return the tower with its LoRA merged.

    The tower computes in bfloat16 where its device prefers that; what is trained, the memory and the losses are
    float32. The backward pass ends at the first block with LoRA, since nothing before it needs a gradient, and the
    blocks before that are run once for each picture of the pool, unless memory is short.
    """
    adapted = tower.with_lora(
        config.lora_rank, config.lora_alpha, config.lora_dropout, generator=generator, depth=config.lora_depth
    )
    groups = [
        *_stage2_groups(network, config),
        {"params": adapted.lora_parameters(), "lr": config.lora_lr},
        {"params": list(network.block.parameters()), "lr": config.block_lr},
    ]
    optimiser = adamw(groups, config.weight_decay, tower.device)
    steps = count_steps(pixels.shape[0], config.stage3_epochs, config.batch_size)
    on_event(StageStarted(STAGE3, steps))
    lora = adapted.lora_parameters()
    course = Course(STAGE3, steps, True, network, lora, optimiser, generator, len(pool.pixels), on_event)
    course.start(start)
    is_checkpointed = acceleration.checkpointing and adapted.set_checkpointing(True)
    noise = _dropout_generator(generator, tower.device)
    pictures, masks, sources = (one.to(tower.device) for one in (pool.pixels, pool.masks, pool.sources))
    memory: ReferenceMemory | None = None
    axes: list[Tensor | None] | None = None
    keeps = acceleration.keeps_frozen and not is_checkpointed
    read = PoolFeatures(adapted, pictures, levels_needed(network.views), keeps=keeps)

    def loss(rows: Tensor, prompts: Tensor) -> Tensor:
        assert memory is not None, "the references come first"
        read.tower.train_lora(None if is_checkpointed else noise)
        features = network.refine(read(rows), noise)
        residuals = memory.residuals(features, sources[rows])
        read.tower.train_lora(None)
        return _loss(network(features, residuals, prompts), masks[rows], config)

    step = TrainingStep(
        loss,
        optimiser,
        tower.device,
        is_static=acceleration.static_steps and not is_checkpointed,  # looks at the host's generators, unlike a graph
        parts=acceleration.parts,
        generators=[noise],
        shared=lambda: network.prompts(tower),
    )
    for batch in course.batches(config.batch_size):
        if memory is None:
            memory = _memory_now(network, adapted, pixels, content, config)
            axes = memory.axes if acceleration.keeps_axes else None
        elif course.step % MEMORY_REFRESH == 0:
            memory.renew(_memory_now(network, adapted, pixels, content, config, axes))
        read.prepare(batch)
        course.took(step(batch))
    if is_checkpointed:
        adapted.set_checkpointing(False)
    network.lora_state = adapted.lora_state()
    return adapted.merged()


class Course:
    """The steps of one stage: batches, updates, and a state from which to go on whenever somebody stops it.

    Args:
        stage: Name of the stage.
        steps: Steps in all.
        is_last: Whether no stage follows.
        network: What is trained.
        lora: What is trained beside it, in the tower.
        optimiser: Over both.
        generator: Shuffles the pool; what else it draws while training belongs to the state too.
        size: Of the pool.
        on_event: Hears of each step, and gets a `Training` every few seconds, at a stop and at the end.
    """

    def __init__(
        self,
        stage: str,
        steps: int,
        is_last: bool,
        network: nn.Module,
        lora: Sequence[Tensor],
        optimiser: torch.optim.Optimizer,
        generator: torch.Generator,
        size: int,
        on_event: OnEvent,
    ) -> None:
        self.stage, self.steps, self.is_last, self.step = stage, steps, is_last, 0
        self._network, self._lora, self._optimiser = network, lora, optimiser
        self._generator, self._size, self._on_event = generator, size, on_event
        self._order = torch.empty(0, dtype=torch.long)
        self._kept, self._pause = time.monotonic(), KEEP_SECONDS

    def start(self, training: Training | None) -> None:
        """Go on from a state of this stage; from the beginning without one."""
        if training is None:
            return
        with torch.no_grad():
            network = {name: value for name, value in training.weights.items() if not name.startswith(_LORA)}
            self._network.load_state_dict(network)
            for place, weight in enumerate(self._lora):
                weight.copy_(training.weights[f"{_LORA}{place}"])
        groups = self._optimiser.state_dict()["param_groups"]  # this device's own way, not that of the one it was on
        self._optimiser.load_state_dict({"state": copy.deepcopy(training.optimiser["state"]), "param_groups": groups})
        self._generator.set_state(training.generator)
        self.step, self._order = training.step, training.order

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Index batches [batch_size] from shuffled passes over the pool, until all steps are taken."""
        while self.step < self.steps:
            if len(self._order) < batch_size:
                self._order = torch.cat([self._order, torch.randperm(self._size, generator=self._generator)])
            batch, self._order = self._order[:batch_size], self._order[batch_size:]
            yield batch
        self._keep()

    def took(self, loss: Tensor) -> None:
        """Count a step that was taken, with the loss before it."""
        self.step += 1
        try:
            self._on_event(Step(self.stage, self.step, self.steps, float(loss)))
        except Stopped:
            with contextlib.suppress(Stopped):
                self._keep()
            raise
        if time.monotonic() - self._kept > self._pause:
            self._keep()

    def _keep(self) -> None:
        begun = time.monotonic()
        weights = {name: _kept(value) for name, value in self._network.state_dict().items()}
        weights |= {f"{_LORA}{place}": _kept(weight) for place, weight in enumerate(self._lora)}
        state = self._optimiser.state_dict()
        moments = {key: {name: _kept(one) for name, one in own.items()} for key, own in state["state"].items()}
        training = Training(
            self.stage,
            self.step,
            self.steps,
            self.is_last,
            weights,
            {"state": moments, "param_groups": copy.deepcopy(state["param_groups"])},
            self._generator.get_state(),
            self._order.clone(),
        )
        self._kept = time.monotonic()
        self._pause = max(KEEP_SECONDS, (self._kept - begun) / KEEP_SHARE)
        self._on_event(training)


def _kept(value: Any) -> Any:
    """A copy on the CPU that further steps do not change."""
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


@torch.no_grad()
def _memory_now(
    network: FusionNetwork,
    tower: Tower,
    pixels: Tensor,
    content: Tensor,
    config: FusionMedCLIPConfig,
    axes: Sequence[Tensor | None] | None = None,
) -> ReferenceMemory:
    features = network.refine(batched_features(tower, pixels, levels_needed(network.views)))
    return ReferenceMemory.learn(features, content, network.views, config.shrinkage, axes=axes)


@torch.no_grad()
def _pool_reads(
    network: FusionNetwork, tower: Tower, memory: ReferenceMemory, pool: Pool, on_event: OnEvent
) -> list[Tensor]:
    parts = []
    for some in forward_passes(len(pool.pixels), tower.device):
        features = tower.features(pool.pixels[some].to(tower.device), levels_needed(network.views))
        own = pool.sources[some].to(tower.device)
        parts.append(network.reads(features, memory.residuals(features, own)))
        on_event(Step(READING, some.stop, len(pool.pixels), math.nan))
    return [torch.cat(view) for view in zip(*parts, strict=True)]


def _dropout_generator(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """Where dropout is drawn: on a GPU by a generator of its own, since copies from the host would take longer."""
    if device.type == "cpu":
        return generator
    seed = int(torch.randint(2**62, (1,), generator=generator))
    return torch.Generator(device).manual_seed(seed)


def _stage2_groups(network: FusionNetwork, config: FusionMedCLIPConfig) -> list[dict]:
    return [
        {"params": list(network.prompts.parameters()), "lr": config.prompt_lr},
        {"params": list(network.alignment.parameters()), "lr": config.alignment_lr},
        {
            "params": [p for p in [network.log_temperature] if p.requires_grad],
            "lr": config.alignment_lr,
            "weight_decay": 0.0,
        },
    ]


def _loss(maps: Tensor, masks: Tensor, config: FusionMedCLIPConfig) -> Tensor:
    """w_img * focal(max S_a, y) + w_seg * dice(S_a, Y) (Eq. 14 to 16): S_a [B, h, w], masks [B, m, m]."""
    target = (masks.flatten(1).amax(dim=1) > 0).to(maps.dtype)  # [B]
    image = focal_loss(image_score(maps, top=config.score_top), target)
    return config.image_weight * image + config.pixel_weight * dice_loss(resize_map(maps, grid_of(masks)), masks)


def count_steps(references: int, epochs: int, batch_size: int) -> int:
    """An epoch shows k synthetic scans; at least one step."""
    return max(1, math.ceil(references * epochs / batch_size))
