"""What methods do inside the blocks of a transformer image tower: extra tokens in each block, and the value path.

Both work on a copy of the tower's structure around the very same tensors, so that the shared tower never changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from fmclip.errors import TowerError
from fmclip.towers.attention import SplitAttention
from fmclip.towers.vision import share


def blocks_of(visual: Any) -> list[nn.Module]:
    """List the blocks of a transformer image tower (open_clip's own or timm's), from the input on; none for a CNN."""
    inner = getattr(visual, "transformer", None) or getattr(visual, "trunk", None)
    return list(getattr(inner, "resblocks", None) or getattr(inner, "blocks", None) or [])


def takes_tokens(visual: Any) -> bool:
    """Tell whether extra tokens fit into the blocks; positions that are rotated inside attention leave no room."""
    return bool(blocks_of(visual)) and getattr(getattr(visual, "trunk", None), "rope", None) is None


class PromptedVisual:
    """An image tower whose blocks read extra tokens (deep visual prompts, one set for each block).

    Each block gets its own tokens behind the tower's, and what it makes of them is dropped, so that the next block
    gets fresh ones.

    Args:
        visual: Transformer image tower; left untouched.
    """

    def __init__(self, visual: nn.Module) -> None:
        self._visual: Any = share(visual)
        self._tokens: ContextVar[Sequence[Tensor]] = ContextVar("tokens")  # safe where threads share the tower
        for place, block in enumerate(blocks_of(self._visual)):
            block.register_forward_pre_hook(lambda _block, args, place=place: (self._added(args[0], place), *args[1:]))
            block.register_forward_hook(lambda _block, _args, out, place=place: out[:, : -self._count(place)])

    def __call__(self, pixels: Tensor, indices: list[int], tokens: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Run the whole tower.

        Args:
            pixels: [B, 3, S, S], normalised.
            indices: Places of the levels wanted.
            tokens: For each block [T, C], or [B, T, C] where every scan has its own; T at least 1.

        Returns:
            [B, C_j, H_j, W_j] of each level, and the image embedding [B, D], not normalised.
        """
        reset = self._tokens.set(tokens)
        try:
            out = self._visual.forward_intermediates(pixels, indices=indices, output_fmt="NCHW")
        finally:
            self._tokens.reset(reset)
        return out["image_intermediates"], out["image_features"]

    def _added(self, x: Tensor, place: int) -> Tensor:
        tokens = self._tokens.get()[place]
        return torch.cat([x, tokens.to(x.dtype).expand(x.shape[0], -1, -1)], dim=1)  # [B, N + T, C]

    def _count(self, place: int) -> int:
        return self._tokens.get()[place].shape[-2]


class PlaceEmbedder:
    """An embedding in the space of the texts for each patch, without training (MaskCLIP, Zhou et al. 2022).

    The last block's attention is replaced by its value path, so that each patch keeps to itself, and the tower's own
    pooling and projection are run on one patch at a time. A convolutional tower has no such block: there only the
    latter is done (class activation map).

    Args:
        visual: Image tower; left untouched.

    Raises:
        TowerError: The last block's attention is of a kind whose value path is not known.
    """

    def __init__(self, visual: nn.Module, *, is_transformer: bool) -> None:
        self._visual: Any = share(visual)
        self._is_transformer = is_transformer
        if is_transformer:
            blocks: list[Any] = blocks_of(self._visual)
            if not blocks:
                raise TowerError("This image tower has no list of transformer blocks; choose a ViT, such as ViT-B-16.")
            blocks[-1].attn = _ValuePath(blocks[-1].attn)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Embed patches: normalised pixels [B, 3, S, S] -> [B, D, H, W], not normalised."""
        visual = self._visual
        if self._is_transformer or not hasattr(visual, "trunk"):
            out = visual.forward_intermediates(pixels, indices=[-1], intermediates_only=True, output_fmt="NCHW")
            grid = out["image_intermediates"][-1]  # [B, C, H, W]
        else:
            grid = visual.trunk.forward_features(pixels)
        b, _, h, w = grid.shape
        places = grid.permute(0, 2, 3, 1).flatten(0, 2)  # [B * H * W, C]
        return self._head(places).view(b, h, w, -1).permute(0, 3, 1, 2)

    def _head(self, places: Tensor) -> Tensor:
        """Run norm, pooling and projection of the tower on images of one patch: [P, C] -> [P, D]."""
        visual = self._visual
        if hasattr(visual, "attnpool"):  # CLIP's ResNet: the value path of its attention pooling
            return visual.attnpool.c_proj(visual.attnpool.v_proj(places))
        if hasattr(visual, "trunk"):
            trunk = visual.trunk
            if not self._is_transformer:
                return visual.head(trunk.forward_head(places[:, :, None, None]))
            tokens = trunk.norm(places)[:, None].expand(-1, 1 + trunk.num_prefix_tokens, -1)  # [P, n, C]
            return visual.head(trunk.forward_head(tokens))
        pooled, _ = visual._pool(places[:, None].expand(-1, 2, -1))  # class token and patch: the same
        return pooled if visual.proj is None else pooled @ visual.proj


class _ValuePath(nn.Module):
    """Attention in which each token attends to itself alone."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.returns_pair = isinstance(attention, SplitAttention)
        if self.returns_pair:
            self.value: nn.Module = attention.v_proj
            self.out: nn.Module = attention.out_proj
        elif getattr(attention, "v_proj", None) is not None and hasattr(attention, "proj"):
            self.value, self.out = attention.v_proj, nn.Sequential(attention.norm, attention.proj)
        elif getattr(attention, "qkv", None) is not None and getattr(attention, "q_bias", None) is None:
            self.value, self.out = _LastThird(attention.qkv), nn.Sequential(attention.norm, attention.proj)
        else:
            raise TowerError("The attention of this image tower has no value path that is known; choose another ViT.")

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Any:
        """Tokens [B, N, C] -> [B, N, C], with None beside it where the attention replaced returned a pair."""
        tokens = self.out(self.value(x))
        return (tokens, None) if self.returns_pair else tokens


class _LastThird(nn.Module):
    """The value part of a layer that makes query, key and value at once."""

    def __init__(self, packed: nn.Module) -> None:
        super().__init__()
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        return self.packed(x).chunk(3, dim=-1)[2]
