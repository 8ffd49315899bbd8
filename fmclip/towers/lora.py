"""LoRA inside an image tower by peft, with the frozen weights shared and never written to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fmclip.errors import TowerError
from fmclip.towers.ahead import Ahead
from fmclip.towers.taps import Place
from fmclip.towers.vision import adaptable_layers, share


def add_lora(
    visual: nn.Module,
    places: Sequence[Place],
    image_size: int,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    depth: float,
    generator: torch.Generator,
) -> nn.Module:
    """Put LoRA on the linears and 1x1 convolutions of the last blocks (FusionMedCLIP section 3.2, Table A1).

    Args:
        visual: open_clip image tower; left untouched.
        places: Of the levels in use.
        image_size: Side S of the input in pixels.
        rank: Rank r of each update.
        alpha: The update is scaled by alpha / r.
        dropout: Probability of dropping an input of the update in training.
        depth: Share of the blocks that is adapted, counted from the last one.
        generator: Draws the A matrices; B starts at zero, so that the new tower starts equal to the old one.

    Returns:
        A new image tower around the same frozen tensors.

    Raises:
        TowerError: A number is out of range, or nothing in the tower can be adapted.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if rank < 1 or not 0 <= dropout < 1 or not 0 < depth <= 1:
        raise TowerError("LoRA needs a rank of at least 1, a dropout in [0, 1) and a depth in (0, 1].")
    own = [place for place in places if not isinstance(place, Ahead)]  # a block beyond is never trained
    blocks = adaptable_layers(visual, own, image_size)
    if not blocks:
        raise TowerError("This image tower has no linear or 1x1 convolution layer that LoRA could adapt.")
    used = blocks[-max(1, round(depth * len(blocks))) :]
    adapted = share(visual)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft only divides it by r
        lora_dropout=dropout,
        target_modules=[layer for block in used for layer in block],
    )
    with torch.random.fork_rng(devices=[]):  # peft draws a start of its own, replaced below
        inject_adapter_in_model(config, adapted)
    for name, weight in lora_tensors(adapted).items():
        if name.endswith("lora_A"):
            start = torch.empty(weight.shape)  # on the CPU, so that every device starts from the same numbers
            nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
            weight.data.copy_(start)
    layers: list[Any] = [module for module in adapted.modules() if hasattr(module, "lora_dropout")]
    for layer in layers:
        layer.lora_dropout["default"] = SeededDropout(dropout)
    return adapted.eval()


class SeededDropout(nn.Module):
    """Dropout that draws from a given generator, so that a seed decides the training whatever else runs beside it.

    The inputs are as large as the activations of the tower, and it is memory that they cost: under autocast they are
    rounded before, as the layer behind would do, and a GPU draws one byte for each instead of a float to compare.

    Args:
        probability: Of dropping a number.

    Attributes:
        generator: None switches the dropout off; one on a GPU draws there, without a copy from the host.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        if self.generator is None or self.probability == 0:
            return x
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x * self._drawn(x, self.generator) / (1 - self.probability)

    def _drawn(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """What is kept, of the shape of `x`."""
        if generator.device.type == "cpu":
            return (torch.rand(x.shape, generator=generator) >= self.probability).to(x.device)
        keep = torch.empty(x.shape, dtype=torch.bool, device=generator.device)
        return keep.bernoulli_(1 - self.probability, generator=generator)


def lora_tensors(visual: nn.Module) -> dict[str, nn.Parameter]:
    """Return the LoRA matrices by layer, such as "transformer.resblocks.0.attn.q_proj.lora_A"."""
    return {
        name.removesuffix(".default.weight"): weight
        for name, weight in visual.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }


def set_dropout(visual: nn.Module, generator: torch.Generator | None) -> None:
    """Switch the dropout inside the LoRA layers on (drawn from a generator) or off, and nothing else."""
    for module in visual.modules():
        if isinstance(module, SeededDropout):
            module.generator = generator


def merge_lora(visual: nn.Module) -> nn.Module:
    """Fold the updates into plain layers, so that a scan costs one plain forward.

    Args:
        visual: Image tower with LoRA; left untouched.

    Returns:
        A new image tower; each adapted layer holds W + alpha / r * B A as a new tensor, all else is shared.
    """
    from peft.tuners.lora import LoraLayer

    merged: Any = share(visual)
    layers: list[tuple[str, Any]] = [(n, m) for n, m in merged.named_modules() if isinstance(m, LoraLayer)]
    for name, module in layers:
        plain = module.get_base_layer()  # a module of `merged`: only its weight is replaced
        with torch.no_grad():
            weight: Tensor = plain.weight + module.get_delta_weight("default").to(plain.weight.dtype)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        merged.set_submodule(name, plain)
    del merged.peft_config  # nothing of peft is left
    return merged.eval()
