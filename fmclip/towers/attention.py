"""Attention with one linear layer for each of query, key, value and output.

open_clip packs query, key and value in one tensor and never calls its output layer as a module, so that LoRA put there
by peft gets no gradient, and no error says so. Blocks converted here behave the same and can be adapted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SplitAttention(nn.Module):
    """Multi-head self-attention made of plain linears, called the way `nn.MultiheadAttention` is called.

    Args:
        width: Width of a token.
        heads: Number of heads; divides `width`.
        bias: Whether the linears have a bias.
    """

    def __init__(self, width: int, heads: int, *, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, width, bias=bias)
        self.v_proj = nn.Linear(width, width, bias=bias)
        self.out_proj = nn.Linear(width, width, bias=bias)

    @classmethod
    def from_packed(cls, packed: nn.MultiheadAttention) -> SplitAttention:
        """Take over the weights of packed attention; query, key and value become views, so no memory is added.

        Args:
            packed: Batch-first self-attention whose query, key and value have one width.

        Returns:
            Attention with the same outputs up to rounding.
        """
        width = packed.embed_dim
        with torch.device("meta"):  # shapes only: the real weights follow
            split = cls(width, packed.num_heads, bias=packed.in_proj_bias is not None)
        for place, layer in enumerate((split.q_proj, split.k_proj, split.v_proj)):
            rows = slice(place * width, (place + 1) * width)
            layer.weight = nn.Parameter(packed.in_proj_weight.detach()[rows], requires_grad=False)  # [C, C]
            if packed.in_proj_bias is not None:
                layer.bias = nn.Parameter(packed.in_proj_bias.detach()[rows], requires_grad=False)  # [C]
        split.out_proj.weight = packed.out_proj.weight
        split.out_proj.bias = packed.out_proj.bias
        return split.train(packed.training)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Attend.

        Args:
            query: [B, N, C].
            key: [B, M, C].
            value: [B, M, C].
            need_weights: Accepted for the packed layer's sake; the attention weights are never returned.
            attn_mask: [N, M] added to the scores (float) or kept where True (bool), or None.

        Returns:
            Tokens [B, N, C], and None in place of the attention weights.
        """
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, N, C / heads]
            for x in (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        )
        tokens = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out_proj(tokens.transpose(1, 2).flatten(2)), None  # [B, N, C]


def split_attention(visual: nn.Module) -> int:
    """Convert the blocks of a native open_clip image tower in place; other towers are left as they are.

    Args:
        visual: Image tower.

    Returns:
        Number of blocks converted.
    """
    from open_clip.transformer import ResidualAttentionBlock

    blocks = [m for m in visual.modules() if isinstance(m, ResidualAttentionBlock)]
    packed = [b for b in blocks if type(b.attn) is nn.MultiheadAttention]
    for block in packed:
        block.attn = SplitAttention.from_packed(block.attn)
    return len(packed)
