"""Learned prompts: CoOp contexts that start from UMLS (FusionMedCLIP section 3.2.1, Eq. 3)."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor, nn

from fmclip.towers import Tower

CLASSES = ("normal", "abnormal")


@cache
def umls_concepts() -> dict:
    """Read the UMLS synonyms and definitions of Table A3."""
    return json.loads((files("fmclip") / "data" / "umls.json").read_text(encoding="utf-8"))


class PromptLearner(nn.Module):
    """Class-specific learned contexts in front of the class words: [v1] ... [vM] CLASS (CoOp, token position "end").

    Each context vector starts as the mean token embedding of one UMLS synonym of its class; definitions follow when
    M exceeds the number of synonyms. The text tower stays frozen.

    Args:
        tower: Gives token embeddings; not kept as a submodule.
        scan_type: Words of the person ("brain MRI"); the class words are "normal brain MRI" and "abnormal brain MRI".
        tokens: M, number of context vectors of a class.
    """

    def __init__(self, tower: Tower, scan_type: str, tokens: int = 8) -> None:
        super().__init__()
        concepts = umls_concepts()
        contexts = [_umls_context(tower, concepts[name], tokens) for name in CLASSES]
        self.contexts = nn.Parameter(torch.stack(contexts))  # [2, M, token width]
        self._class_words = [
            tower.token_embeddings(f"{concepts[name]['class_name']} {scan_type}".strip()) for name in CLASSES
        ]

    def forward(self, tower: Tower) -> Tensor:
        """Embed both prompts.

        Returns:
            [2, D] L2-normalised: normal, abnormal (Eq. 3).
        """
        return self.embed(tower, self.contexts)

    def embed(self, tower: Tower, contexts: Tensor) -> Tensor:
        """Embed both prompts with other contexts than the learned ones: [n * 2, M, token width] -> [n * 2, D]."""
        pairs = enumerate(contexts)
        return tower.embed_prompts([torch.cat([one, self._class_words[i % len(CLASSES)]]) for i, one in pairs])


def _umls_context(tower: Tower, concept: dict, tokens: int) -> Tensor:
    phrases = [*concept["synonyms"], *concept["definitions"]]
    vectors = [tower.token_embeddings(phrases[i % len(phrases)]).mean(dim=0) for i in range(tokens)]
    return torch.stack(vectors).detach().float()  # [M, token width]
