"""Batch norms folded into the convolutions in front of them: the same answers from fewer steps.

In evaluation a batch norm multiplies and shifts each channel, which the convolution before it can do itself. A frozen
CNN answers in three quarters of the time without them (benchmarks/NOTES.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fmclip.towers.vision import share

TOLERANCE = 1e-3  # of the largest embedding component; rounding alone stays below a tenth of it


class Folded:
    """A folded tower, and whether it still answers as the one that it was made from.

    Args:
        visual: Image tower in evaluation mode; left untouched.
        image_size: Side S of its input in pixels.

    Attributes:
        visual: The folded tower.
    """

    def __init__(self, visual: nn.Module, image_size: int) -> None:
        self._sources = (*visual.parameters(), *visual.buffers())
        self._state = self._look()
        self.visual = fold_batch_norms(visual, image_size)

    def is_fresh(self) -> bool:
        """Whether nobody has trained or moved the tensors since."""
        return self._look() == self._state

    def _look(self) -> tuple[Any, ...]:
        return (self._sources[0].device, *(tensor._version for tensor in self._sources))


@torch.no_grad()
def fold_batch_norms(visual: nn.Module, image_size: int) -> nn.Module:
    """Fold what can be folded, and prove it on a picture of noise.

    Pairs are found by running the tower: a batch norm that was given the very output of a plain convolution. Layers
    with LoRA are left as they are, since their output is a sum.

    Args:
        visual: Image tower in evaluation mode; left untouched.
        image_size: Side S of its input in pixels.

    Returns:
        A tower whose other tensors are those of `visual`; `visual` itself where nothing can be folded, or where folding
        would change the answer.
    """
    folded: Any = share(visual)
    convolutions: dict[int, nn.Conv2d] = {}
    outputs: list[Tensor] = []  # kept alive, so that no two share an id
    pairs: list[tuple[nn.Conv2d, str, Any]] = []
    hooks = []

    def note_output(module: Any, _args: Any, out: Tensor) -> None:
        outputs.append(out)
        convolutions[id(out)] = module

    def note_input(name: str, module: Any, given: Tensor) -> None:
        if id(given) in convolutions:
            pairs.append((convolutions[id(given)], name, module))

    for name, module in folded.named_modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(note_output))
        elif isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            hooks.append(module.register_forward_pre_hook(lambda own, args, name=name: note_input(name, own, args[0])))
    pixels = torch.rand(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(next(visual.parameters()).device)
    before = _embedding(folded, pixels)
    for hook in hooks:
        hook.remove()
    if len({id(convolution) for convolution, _, _ in pairs}) < len(pairs) or not pairs:
        return visual  # none, or a layer that is used twice
    for convolution, name, norm in pairs:
        weight, bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        convolution.weight = nn.Parameter(weight, requires_grad=False)
        convolution.bias = nn.Parameter(bias, requires_grad=False)
        folded.set_submodule(name, getattr(norm, "act", nn.Identity()))  # timm's batch norms hold the activation
    apart = (_embedding(folded, pixels) - before).abs().max()
    return folded if apart <= TOLERANCE * before.abs().max() else visual


def _embedding(visual: nn.Module, pixels: Tensor) -> Tensor:
    out = visual(pixels)
    return out[0] if isinstance(out, tuple) else out
