"""Grad-CAM: where a picture makes its similarity to a text (Selvaraju et al. 2017), for CNNs and transformers.

The channels of the last feature map are weighted by their mean gradient, added up and cut at zero. In a transformer the
map is made of the patch tokens before the last block: behind it only the class token is read, and patches have no
gradient any more.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fmclip.errors import TowerError
from fmclip.towers import Tower
from fmclip.towers.blocks import blocks_of
from fmclip.towers.vision import share


def grad_cam(tower: Tower, pixels: Tensor, target: Tensor) -> Tensor:
    """Map where an image makes its cosine with an embedding.

    Args:
        tower: Frozen tower of any kind.
        pixels: [1, 3, S, S] in [0, 1].
        target: Embedding of a text or of another image, [D], L2-normalised.

    Returns:
        [S, S] in [0, 1], 1 at its highest place; zero everywhere if nothing speaks for the target.

    Raises:
        TowerError: This tower shows no feature map to weigh.
    """
    visual: Any = share(tower.model.visual)  # hooks on a copy around the same tensors: others may be using the tower
    blocks = blocks_of(visual) if tower.kind == "transformer" else []  # some CNNs call their stages blocks
    seen: list[Tensor] = []
    for module in blocks[-2:-1] or ([] if blocks else visual.modules()):
        module.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    with torch.enable_grad():
        normalised = tower.normalise(pixels.to(tower.device)).requires_grad_()
        out = visual(normalised)
        image = F.normalize(out[0] if isinstance(out, tuple) else out, dim=-1)  # [1, D]
        score = image[0] @ target.to(image)
        maps = [one for one in seen if isinstance(one, Tensor) and one.requires_grad]
        if not blocks:
            maps = [one for one in maps if one.ndim == 4 and min(one.shape[2:]) > 1]
        if not maps:
            raise TowerError("This image tower shows no feature map, so Grad-CAM cannot be drawn.")
        (gradient,) = torch.autograd.grad(score, maps[-1])
    features = maps[-1].detach()
    if blocks:
        features, gradient = (_patches(one, tower.grids[-1]) for one in (features, gradient))
    weights = gradient.mean(dim=(2, 3), keepdim=True)  # [1, C, 1, 1]
    found = (weights * features).sum(dim=1, keepdim=True).clamp_min(0)  # [1, 1, H, W]
    size = (tower.image_size, tower.image_size)
    found = F.interpolate(found.float(), size=size, mode="bilinear", align_corners=False)[0, 0]  # [S, S]
    return (found / found.max().clamp_min(1e-12)).cpu()


def _patches(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens [1, N, C] with class and register tokens in front -> patches [1, C, H, W]."""
    patches = tokens[:, -grid[0] * grid[1] :]
    return patches.mT.unflatten(2, grid)
