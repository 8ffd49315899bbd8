"""Frozen batch norms and their activations for training: nothing is kept for the backward pass but what others keep.

Torch keeps the input of a batch norm, for gradients of its weights that nobody reads where it is frozen, and a copy of
the input of a ReLU6 that works in place. Without both a block of an EfficientNet keeps half as much. For CPUs:
under autocast on a GPU one fused step would become four, which nobody has measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fmclip.towers.vision import share

if TYPE_CHECKING:
    from fmclip.towers.base import Tower


class FrozenNorm(nn.Module):
    """A batch norm in evaluation mode whose tensors are not trained: a factor and a shift for each channel.

    Args:
        norm: Batch norm with running statistics; of timm's kind with its activation.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: Any) -> None:
        super().__init__()
        scale = (norm.running_var + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight
        shift = -norm.running_mean * scale
        shift = shift if norm.bias is None else shift + norm.bias
        self.register_buffer("scale", scale.detach()[:, None, None])
        self.register_buffer("shift", shift.detach()[:, None, None])
        self.act = getattr(norm, "act", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        if type(self.act) is nn.ReLU6:
            return _Clamped.apply(x, self.scale, self.shift)
        return self.act(_normalised(x, self.scale, self.shift))


def with_frozen_norms(tower: Tower) -> Tower:
    """A tower around the same tensors, LoRA included, whose batch norms cost a training less; itself without any."""
    if not any(isinstance(module, nn.BatchNorm2d) for module in tower._visual.modules()):
        return tower
    visual = share(tower._visual)
    freeze_norms(visual)
    return tower._variant(_visual=visual)


def freeze_norms(visual: nn.Module) -> None:
    """Replace the batch norms of a frozen image tower in evaluation mode, in place."""
    for name, module in list(visual.named_modules()):
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and not module.training:
            visual.set_submodule(name, FrozenNorm(module))


def _normalised(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, x, scale).to(x.dtype)


class _Clamped(torch.autograd.Function):
    """Norm and ReLU6; the backward pass looks at the result, which the layer behind keeps anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        result = _normalised(x, scale, shift).clamp_(0, 6)
        ctx.save_for_backward(result, scale)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        result, scale = ctx.saved_tensors
        gradient = torch.ops.aten.hardtanh_backward(gradients[0], result, 0, 6)
        return (gradient * scale).to(gradient.dtype), None, None
