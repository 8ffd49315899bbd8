"""Where an image tower looks: attention rollout, and Grad-CAM of how well a picture goes with words.

Both run on a copy of the tower's structure around the very same tensors, since hooks on the shared one would be heard
by other threads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmclip.errors import TowerError
from fmclip.towers.attention import SplitAttention
from fmclip.towers.base import Tower
from fmclip.towers.blocks import blocks_of
from fmclip.towers.vision import share


@torch.no_grad()
def attention_rollout(tower: Tower, pixels: Tensor) -> Tensor:
    """Follow attention from the output back to the patches (Abnar and Zuidema 2020).

    In each block the heads' mean attention and the skip connection count the same. It tells where the image embedding
    comes from, not what is odd there.

    Args:
        tower: A transformer tower.
        pixels: [B, 3, S, S] in [0, 1].

    Returns:
        [B, h, w]: share of each patch in the class token, or where there is none in the mean token; sums to 1.

    Raises:
        TowerError: The tower is a CNN, or its attention is of a kind that is not known.
    """
    visual: Any = share(tower._visual)
    blocks: list[Any] = blocks_of(visual)
    if not blocks:
        raise TowerError("Attention is what a transformer has; this image tower is a CNN. Choose a ViT to see it.")
    weights: list[Tensor] = []
    for block in blocks:
        attention: Any = getattr(block, "attn", None)
        if not _is_known(attention) or getattr(getattr(visual, "trunk", None), "rope", None) is not None:
            raise TowerError("The attention of this image tower is of a kind that is not known; choose another ViT.")
        attention.register_forward_pre_hook(lambda module, args: weights.append(_weights(module, args)))
    visual(tower.normalise(pixels))
    eye = torch.eye(weights[0].shape[-1], device=pixels.device)
    rollout = eye.expand_as(weights[0])  # [B, N, N]
    for weight in weights:
        rollout = (weight + eye) / 2 @ rollout
    h, w = tower.grids[-1]
    prefix = rollout.shape[-1] - h * w
    asked = rollout[:, 0] if prefix else rollout.mean(dim=1)  # [B, N]
    patches = asked[:, prefix:].view(-1, h, w)
    return patches / patches.sum(dim=(1, 2), keepdim=True)


def grad_cam(tower: Tower, pixels: Tensor, direction: Tensor) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017) of the product of the image embedding with a direction among the texts.

    Args:
        tower: Any tower.
        pixels: [B, 3, S, S] in [0, 1].
        direction: [D], such as the embedding of "abnormal" minus that of "normal".

    Returns:
        [B, h, w] in [0, 1], 1 at the strongest place of each picture; all 0 where nothing speaks for the direction. Of
        a transformer the tokens that enter the last block are weighed, of a CNN its last features.
    """
    visual: Any = share(tower._visual)
    kept: list[Tensor] = []

    def keep(features: Tensor) -> Tensor:
        kept.append(features.detach().requires_grad_())
        return kept[-1]

    with torch.enable_grad():
        out = _run_from(visual, tower.normalise(pixels), keep)
        embedding = F.normalize(out[0] if isinstance(out, tuple) else out, dim=-1)  # [B, D]
        (gradient,) = torch.autograd.grad((embedding @ direction.to(embedding)).sum(), kept)
    features = kept[0].detach()
    if features.ndim == 3:  # tokens [B, N, C]: the patches come last
        h, w = tower.grids[-1]
        features, gradient = (one[:, -h * w :].transpose(1, 2).unflatten(-1, (h, w)) for one in (features, gradient))
    strength = gradient.mean(dim=(2, 3), keepdim=True)  # [B, C, 1, 1]
    cam = (strength * features).sum(dim=1).relu()  # [B, h, w]
    return cam / cam.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)


def _run_from(visual: Any, pixels: Tensor, keep: Any) -> Any:
    """Run the tower; `keep` sees, and may replace, the features that Grad-CAM weighs."""
    blocks = blocks_of(visual)
    if blocks and hasattr(blocks[-1], "attn"):
        blocks[-1].register_forward_pre_hook(lambda _block, args: (keep(args[0]), *args[1:]))
        return visual(pixels)
    if hasattr(visual, "layer4"):  # CLIP's ResNet
        visual.layer4.register_forward_hook(lambda _layer, _args, out: keep(out))
        return visual(pixels)
    trunk = visual.trunk
    return visual.head(trunk.forward_head(keep(trunk.forward_features(pixels))))


def _is_known(attention: nn.Module | None) -> bool:
    return isinstance(attention, SplitAttention) or (
        getattr(attention, "qkv", None) is not None and getattr(attention, "q_bias", None) is None
    )


def _weights(attention: Any, args: tuple[Tensor, ...]) -> Tensor:
    """Attention weights of a block, averaged over the heads: tokens [B, N, C] -> [B, N, N]."""
    if isinstance(attention, SplitAttention):
        query, key = attention.q_proj(args[0]), attention.k_proj(args[1])
        q, k = (one.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for one in (query, key))  # [B, heads, N, d]
    else:
        heads = attention.num_heads
        q, k, _ = attention.qkv(args[0]).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, N, d] each
        q, k = attention.q_norm(q), attention.k_norm(k)
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1).mean(dim=1)
