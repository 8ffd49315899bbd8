"""Hand-written prompts: UMLS synonyms and definitions of "normal" and "abnormal" in a few sentences, as an ensemble.

The words are FusionMedCLIP's Table A3 (fmclip/data/umls.json); averaging many prompts of a class is CLIP's own recipe.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fmclip.prompts import CLASSES, umls_concepts
from fmclip.towers import Tower

TEMPLATES = ("{state} {scan}", "a {scan}: {state}", "a medical image of a {scan}, {state}", "{scan}. Finding: {state}.")


def manual_prompts(scan_type: str) -> tuple[list[str], list[str]]:
    """Write the prompts: each synonym in each sentence, and each definition behind the scan type.

    Args:
        scan_type: Words of the person ("brain MRI").

    Returns:
        Normal and abnormal prompts.
    """
    normal, abnormal = (_prompts_of(umls_concepts()[name], scan_type) for name in CLASSES)
    return normal, abnormal


@torch.no_grad()
def embed_manual_prompts(tower: Tower, scan_type: str) -> Tensor:
    """Embed the ensemble: mean of the embeddings of each class, [2, D], L2-normalised: normal, abnormal."""
    means = [tower.embed_text(prompts).mean(dim=0) for prompts in manual_prompts(scan_type)]
    return F.normalize(torch.stack(means), dim=1)


def _prompts_of(concept: dict, scan_type: str) -> list[str]:
    states = [concept["class_name"], *(_as_words(synonym) for synonym in concept["synonyms"])]
    sentences = [template.format(state=state, scan=scan_type) for state in states for template in TEMPLATES]
    return [*sentences, *(f"{scan_type}. {definition}" for definition in concept["definitions"])]


def _as_words(synonym: str) -> str:
    """Lower case, as inside a sentence; abbreviations (WNL) stay."""
    return synonym if synonym.isupper() else synonym.lower()
