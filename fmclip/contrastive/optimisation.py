"""Learning rates: one for each depth (layer-wise decay), warm-up and cosine over the steps; and when to stop early."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from fmclip.contrastive.config import OptimisationConfig
from fmclip.contrastive.models import PairModel, is_projection, is_text
from fmclip.towers.vision import block_name


def parameter_groups(model: PairModel, config: OptimisationConfig) -> list[dict]:
    """Group what is trained by depth and by whether it decays (Table A2: layer-wise decay 0.8, weight decay 0.05).

    Within each half, depths count from the input: embeddings or stem, each block, and what comes after the blocks. The
    last depth learns with the base rate, each one before it with `layer_decay` times the next one's.

    Args:
        model: The model.
        config: Rates.

    Returns:
        Groups for AdamW; "share" is the factor on the scheduled learning rate.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for half in (False, True):
        own = {name: weight for name, weight in model.model.named_parameters() if is_text(name) == half}
        depths = layer_depths([name for name in own if not name.startswith("logit_")])
        top = max(depths.values(), default=0)
        for name, depth in depths.items():
            if own[name].requires_grad:
                decay = config.weight_decay if own[name].ndim >= 2 else 0.0
                groups.setdefault((config.layer_decay ** (top - depth), decay), []).append(own[name])
    between = [weight for weight in (model.logit_scale, model.logit_bias) if weight.requires_grad]
    if between:
        groups.setdefault((1.0, 0.0), []).extend(between)
    ordered = sorted(groups.items(), key=lambda item: item[0])
    return [{"params": weights, "share": share, "weight_decay": decay} for (share, decay), weights in ordered]


def layer_depths(names: list[str]) -> dict[str, int]:
    """Number the depth of each parameter of one half from its name.

    Args:
        names: Names in the order in which the layers are declared.

    Returns:
        0 for what comes before the blocks, 1 ... for the blocks, and one more for what comes after them.
    """
    blocks = list(dict.fromkeys(block for name in names if (block := block_name(name)) and not is_projection(name)))
    numbers = {block: place for place, block in enumerate(blocks, start=1)}
    depths, passed = {}, False
    for name in names:
        block = block_name(name)
        if is_projection(name):
            depths[name] = len(blocks) + 1
        elif block in numbers:
            depths[name], passed = numbers[block], True
        else:  # norms and heads are declared after the blocks, stems before them, and embeddings on either side
            depths[name] = len(blocks) + 1 if passed and "embedding" not in name else 0
    return depths


def learning_rate(config: OptimisationConfig, step: int, steps_per_epoch: int) -> float:
    """Return the base learning rate of a step: linear warm-up, then a cosine down to `min_lr`.

    Args:
        config: Rates and epochs.
        step: Counted from 0 over the whole run.
        steps_per_epoch: Steps of one epoch.

    Returns:
        The rate; a function of the step alone, so that a resumed run goes on with it.
    """
    total = config.epochs * steps_per_epoch
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total - 1)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, total - 1 - warmup)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def make_optimiser(model: PairModel, config: OptimisationConfig) -> torch.optim.AdamW:
    """Make AdamW over the groups; fused, which on a CPU takes a quarter of the time."""
    device = next(model.parameters()).device.type
    return torch.optim.AdamW(
        parameter_groups(model, config),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=device in ("cpu", "cuda"),
    )


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of each group from the base rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["share"]


@dataclass
class EarlyStopping:
    """Remembers the best validation loss (Table A2: patience 5, smallest change 1e-4).

    Attributes:
        patience: Epochs without a better loss before it says stop; 0: never.
        min_delta: What counts as better.
        best: The best loss so far.
        stale: Epochs since then.
    """

    patience: int
    min_delta: float
    best: float = math.inf
    stale: int = 0

    def better(self, loss: float) -> bool:
        """Take note of an epoch's loss; tell whether it is the best one."""
        if loss < self.best - self.min_delta:
            self.best, self.stale = loss, 0
            return True
        self.stale += 1
        return False

    @property
    def is_over(self) -> bool:
        """Whether to stop."""
        return 0 < self.patience <= self.stale
