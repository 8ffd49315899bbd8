"""Similar reports: a query scan finds the nearest texts of an index, and clinical phrases are scored zero-shot.

The index is a file that the visitor brings (`index.safetensors` of a run); it stays in this process and is never
written to disk again. Both need a tower whose halves were trained together.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fmclip.contrastive.index import Match, load_index
from fmclip.contrastive.runs import embed_scan
from fmclip.errors import FmclipError
from fmclip.learning import load_tower
from fmclip.page import html
from fmclip.page.similar_panel import HINT
from fmclip.page.uploads import delete
from fmclip.page.visitors import Visitor

if TYPE_CHECKING:
    from fmclip.scans import Scan
    from fmclip.towers import Tower

MAX_PHRASES = 12
SHOWN = 5
NOT_PAIRED = (
    "This tower's image and text halves were not trained together, so neither texts nor phrases can be compared with a "
    "scan. Start the page with FMCLIP_TOWER=results/RUN, or with a CLIP."
)


def take_index(visitor: Visitor, path: str) -> str:
    """Read an uploaded index for a visitor and delete the file.

    Args:
        visitor: Gets the index.
        path: The file in gradio's cache.

    Returns:
        What to say about it: HTML.

    Raises:
        FmclipError: It is no index, or was made with another tower.
    """
    try:
        visitor.index = load_index(Path(path), tower=_tower(visitor).identity)
    finally:
        delete(path)
    return html.note(f"{len(visitor.index.texts)} reports to search in. They stay in this session.", "good")


def find(visitor: Visitor, phrases: str) -> str:
    """Compare the query in view with the index and with phrases.

    Args:
        visitor: Holds queries and index.
        phrases: Clinical phrases, one a line or with semicolons between them; may be empty.

    Returns:
        What was found: HTML.

    Raises:
        FmclipError: There is no query, nothing to compare it with, or the tower cannot.
    """
    if not visitor.queries:
        raise FmclipError("There is no query scan yet: upload one in step 3, or choose an example case.")
    wanted = list(dict.fromkeys(filter(None, (part.strip() for part in re.split(r"[;\n]", phrases or "")))))
    if visitor.index is None and not wanted:
        raise FmclipError(HINT)
    if len(wanted) > MAX_PHRASES or any(len(phrase) > 300 for phrase in wanted):
        raise FmclipError(f"At most {MAX_PHRASES} phrases of 300 characters are compared at a time.")
    tower = _tower(visitor)
    if not tower.paired:
        raise FmclipError(NOT_PAIRED)
    scan = _in_view(visitor)
    parts = [f'<p class="fm-count">{escape(scan.label[:1].upper() + scan.label[1:])}</p>']
    if visitor.index is not None:
        matches = visitor.index.search(embed_scan(tower, scan, visitor.index.fit), SHOWN)
        parts.append(_matches(matches, len(visitor.index.texts)))
    if wanted:
        fit = visitor.index.fit if visitor.index is not None else "letterbox"
        parts.append(_phrases(wanted, score_phrases(tower, scan, wanted, fit)))
    return f'<div class="fm-similar">{"".join(parts)}</div>'


def score_phrases(tower: Tower, scan: Scan, phrases: list[str], fit: str) -> list[float]:
    """Score phrases zero-shot: a softmax over their cosines with the scan, at the tower's own temperature.

    Args:
        tower: Tower whose halves were trained together.
        scan: The scan.
        phrases: N phrases.
        fit: How the scan is fitted into the tower's square.

    Returns:
        N shares that add up to 1; with one phrase alone, its cosine.
    """
    cosines = tower.embed_text(phrases).cpu() @ embed_scan(tower, scan, fit)  # [N]
    if len(phrases) == 1:
        return cosines.tolist()
    scale = tower.model.logit_scale.detach().cpu().exp()
    return torch.softmax(scale * cosines, dim=0).tolist()


def _tower(visitor: Visitor) -> Tower:
    return load_tower(visitor.session.tower, visitor.session.device)


def _in_view(visitor: Visitor) -> Scan:
    if visitor.selected is not None:
        return visitor.selected
    worst = max(visitor.findings, key=lambda finding: finding.score, default=None)
    return worst.scan if worst is not None else visitor.queries[0]


def _matches(matches: list[Match], count: int) -> str:
    rows = "".join(
        f'<li><span class="fm-cosine">{match.cosine:.2f}</span><span>{escape(match.text)}'
        f"{f' <small>{match.count} images</small>' if match.count > 1 else ''}</span></li>"
        for match in matches
    )
    return f"<h4>Nearest of {count} reports, by cosine</h4><ol>{rows}</ol>"


def _phrases(phrases: list[str], shares: list[float]) -> str:
    order = sorted(range(len(phrases)), key=lambda place: -shares[place])
    rows = "".join(
        f'<li><span class="fm-cosine">{shares[place]:.2f}</span><span>{escape(phrases[place])}</span></li>'
        for place in order
    )
    kind = "Phrases, zero-shot shares" if len(phrases) > 1 else "Cosine with the phrase; give two or more to compare"
    return f"<h4>{kind}</h4><ol>{rows}</ol>"
