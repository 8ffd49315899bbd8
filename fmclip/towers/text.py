"""The text half: words to token embeddings, token embeddings to one embedding a prompt.

Prompts come as token embeddings rather than words, so that learned contexts (CoOp, FusionMedCLIP section 3.3) go the
same way as words do. Only as many positions are run as the longest prompt needs, where that changes nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmclip.devices import constant
from fmclip.errors import TowerError


class Vocabulary:
    """Words to token numbers, and what a tower puts around them.

    Args:
        tokenizer: open_clip tokenizer: a call on texts gives [N, context] token numbers.

    Attributes:
        prefix: Token numbers before the words.
        suffix: Token numbers after the words.
        last: Token number at the very end of the context, or None where that is padding.
        pad: Token number of padding.
        context_length: Positions of the whole context.
    """

    def __init__(self, tokenizer: Any) -> None:
        inner = getattr(tokenizer, "tokenizer", None)  # the Hugging Face tokenizer inside open_clip's
        clean: Callable[[str], str] = getattr(tokenizer, "clean_fn", str)
        if inner is None:
            self._encode = tokenizer.encode
        else:
            self._encode = lambda text: inner(clean(text), add_special_tokens=False)["input_ids"]
        self.pad = int(getattr(inner, "pad_token_id", None) or 0)
        row = tokenizer(["scan"])[0].tolist()
        words = self.encode("scan")
        starts = [place for place in range(len(row)) if row[place : place + len(words)] == words]
        if not words or not starts:
            raise TowerError("This tower's tokenizer changes words by their place; prompts can't be learned for it.")
        start = starts[0]
        tail = row[start + len(words) :]
        self.context_length = len(row)
        self.prefix = row[:start]
        self.last = tail.pop() if tail[-1] != self.pad else None
        while tail and tail[-1] == self.pad:
            tail.pop()
        self.suffix = tail
        self.room = self.context_length - len(self.prefix) - len(self.suffix) - (self.last is not None)

    def encode(self, text: str) -> list[int]:
        """Return the token numbers of the words alone."""
        return list(self._encode(text))


class TextEncoder(ABC):
    """Common part of the text towers.

    Args:
        tokenizer: open_clip tokenizer of the tower.
        embedding: Token embedding layer.
    """

    def __init__(self, tokenizer: Any, embedding: nn.Module) -> None:
        self.vocabulary = Vocabulary(tokenizer)
        self.embedding = embedding
        weight: Tensor = next(embedding.parameters())
        self.token_width = weight.shape[-1]

    @property
    def device(self) -> torch.device:
        """Where the text tower is."""
        return next(self.embedding.parameters()).device

    def token_embeddings(self, text: str) -> Tensor:
        """Return the embeddings [L, token_width] of the words of `text`, without start, end or positions."""
        return self._look_up(self.vocabulary.encode(text))

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Embed texts; what does not fit the context is cut off, as the tower's tokenizer does.

        Args:
            texts: N texts.

        Returns:
            [N, D], L2-normalised.
        """
        room = self.vocabulary.room
        with torch.no_grad():
            return self.embed_prompts([self._look_up(self.vocabulary.encode(text)[:room]) for text in texts])

    def embed_prompts(self, prompts: Sequence[Tensor]) -> Tensor:
        """N tensors [L_i, token_width] -> [N, D]; `Tower.embed_prompts` says the rest."""
        room = self.vocabulary.room
        if not prompts:
            raise TowerError("No prompt given; give at least one.")
        for place, prompt in enumerate(prompts, start=1):
            if prompt.ndim != 2 or prompt.shape[1] != self.token_width:
                raise TowerError(
                    f"Prompt {place} has shape {list(prompt.shape)}; this tower needs [L, {self.token_width}]."
                )
            if len(prompt) > room:
                raise TowerError(
                    f"Prompt {place} has {len(prompt)} tokens; this tower takes at most {room}. Shorten it."
                )
        rows, used, ends = self._assemble(prompts)
        return F.normalize(self._encode(rows, used, ends), dim=-1)  # [N, D]

    def _look_up(self, tokens: list[int]) -> Tensor:
        return self.embedding(constant(tuple(tokens), self.device, torch.long)).detach()  # [L, W]

    def _assemble(self, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Put start, end and padding around the prompts.

        Returns:
            Rows [N, L, W]; where they are not padding [N, L]; the place of the first token after the words [N].
        """
        words = self.vocabulary
        length = max(map(len, prompts)) + words.context_length - words.room if self._cuts() else words.context_length
        prefix, suffix = self._look_up(words.prefix), self._look_up(words.suffix)
        padding = self._look_up([words.pad]).expand(words.context_length, -1)
        rows, used = [], []
        for prompt in prompts:
            row = torch.cat([prefix, prompt.to(prefix), suffix])  # [l, W]
            last = [] if words.last is None else [self._look_up([words.last])]
            gap = length - len(row) - len(last)
            rows.append(torch.cat([row, padding[:gap], *last]))  # [L, W]
            used.append([True] * len(row) + [False] * gap + [True] * len(last))
        ends = constant(tuple(len(words.prefix) + len(prompt) for prompt in prompts), self.device, torch.long)
        return torch.stack(rows), constant(tuple(map(tuple, used)), self.device, torch.bool), ends

    @abstractmethod
    def _cuts(self) -> bool:
        """Tell whether the context can end after the last used token without changing the embedding."""

    @abstractmethod
    def _encode(self, rows: Tensor, used: Tensor, ends: Tensor) -> Tensor:
        """Run the tower: rows [N, L, W], used [N, L] bool, ends [N] -> [N, D], not normalised."""


class ClipText(TextEncoder):
    """open_clip's own text transformer, on a CLIP itself or as the text part of a `CustomTextCLIP`.

    Args:
        tower: Module with `transformer`, `token_embedding`, `positional_embedding`, `ln_final`, `text_projection`.
        tokenizer: open_clip tokenizer of the tower.
    """

    def __init__(self, tower: Any, tokenizer: Any) -> None:
        super().__init__(tokenizer, tower.token_embedding)
        self.tower = tower
        self.pool: str = getattr(tower, "text_pool_type", None) or tower.pool_type
        self.class_token: Tensor | None = getattr(tower, "cls_emb", None)

    def _cuts(self) -> bool:
        # causal: what comes after the pooled token cannot reach it
        return self.tower.attn_mask is not None and self.pool in ("argmax", "eos") and self.class_token is None

    def _encode(self, rows: Tensor, used: Tensor, ends: Tensor) -> Tensor:
        tower, mask = self.tower, self.tower.attn_mask
        if self.class_token is not None:  # CoCa: a class token at the end, and padding is masked
            rows = torch.cat([rows, self.class_token.expand(len(rows), 1, -1)], dim=1)  # [N, L + 1, W]
        length = rows.shape[1]
        mask = None if mask is None else mask[:length, :length]
        if self.class_token is not None:
            tokens = torch.where(used, tower.pad_id + 1, tower.pad_id)  # only padding or not is read from them
            padded = tower._build_additive_mask(tokens, length, rows.dtype)
            mask = padded if mask is None else mask + padded
        x = tower.transformer(rows + tower.positional_embedding[:length], attn_mask=mask)  # [N, L, W]
        x = tower.ln_final(x)
        if self.class_token is not None or self.pool == "last":
            x = x[:, -1]
        elif self.pool == "first":
            x = x[:, 0]
        else:
            x = x[torch.arange(len(x), device=x.device), ends]  # [N, W], at the end token
        projection = tower.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Module) else x @ projection  # [N, D]


class HuggingFaceText(TextEncoder):
    """A Hugging Face text transformer inside open_clip's `HFTextEncoder` (BiomedCLIP's, and that of "mini").

    Args:
        tower: `HFTextEncoder`.
        tokenizer: open_clip tokenizer of the tower.
    """

    def __init__(self, tower: Any, tokenizer: Any) -> None:
        super().__init__(tokenizer, tower.transformer.get_input_embeddings())
        self.tower = tower

    def _cuts(self) -> bool:
        return self.vocabulary.last is None  # padding is masked in attention and in pooling

    def _encode(self, rows: Tensor, used: Tensor, ends: Tensor) -> Tensor:
        mask = used.long()
        out = self.tower.transformer(inputs_embeds=rows, attention_mask=mask)
        return self.tower.proj(self.tower.pooler(out, mask))  # [N, D]


def text_encoder(model: Any, tokenizer: Any) -> TextEncoder:
    """Choose how the text half of an open_clip model is run."""
    from open_clip.hf_model import HFTextEncoder

    text = getattr(model, "text", model)  # a plain CLIP holds the parts of its text tower itself
    return HuggingFaceText(text, tokenizer) if isinstance(text, HFTextEncoder) else ClipText(text, tokenizer)
