"""Step 1: the strip of reference scans, which of them look wrong, and taking single ones away."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr
import numpy as np

from fmclip.errors import FmclipError
from fmclip.learning import load_tower
from fmclip.page import html
from fmclip.page.visitors import Visitor
from fmclip.scans import AS_STORED, Scan

if TYPE_CHECKING:
    from fmclip.calibration import ReferenceWarning

WINDOW_INFO = "For CT; references and queries alike"
WINDOW_KEPT = "Belongs to the reference scans; remove them to choose another"

LOOK_SECONDS = 20.0
"""The tower is not asked for longer: a large one on a CPU takes seconds for each scan."""

_BATCH = 8
_COPIES = ("duplicate", "near-duplicate")
_ODD = ("constant", "outlier")


def show(visitor: Visitor) -> dict[str, Any]:
    """Draw the strip, and the buttons that go with it."""
    marked, suspects, window = len(visitor.marked), visitor.suspects, visitor.window
    names = html.enumerate_labels([scan.label for scan in suspects])
    return {
        "references": html.thumbnails(visitor.references, "reference scan", selectable=True, marked=visitor.marked),
        "remove_marked": gr.update(value=f"Remove {marked} selected", visible=html.seen(marked > 0)),
        "remove_suspects": gr.update(value=f"Remove {names}", visible=html.seen(bool(suspects))),
        "clear_references": gr.update(visible=html.seen(bool(visitor.references))),
        "window": gr.update(value=window, interactive=False, info=WINDOW_KEPT)
        if window
        else gr.update(interactive=True, info=WINDOW_INFO),
    }


def remove(visitor: Visitor, scans: Sequence[Scan]) -> dict[str, Any]:
    """Take single reference scans away and say so; the others keep their numbers."""
    gone = set(scans)
    visitor.references = [scan for scan in visitor.references if scan not in gone]
    visitor.marked.clear()
    visitor.has_example = visitor.has_example and bool(visitor.references)
    names = html.enumerate_labels([scan.label for scan in scans])
    removed = f"Removed {names}. Adapt again to learn without." if names else ""
    warnings = check(visitor)
    return {
        "reference_note": html.note(removed, "warning" if warnings else "info", warnings),
        **show(visitor),
    }


def check(visitor: Visitor) -> list[html.Item]:
    """Look at the pixels of the set as it is now; gives the warnings and notes the suspects."""
    from fmclip.checks import check_pixels

    warnings = check_pixels(visitor.references) if visitor.references else []
    suspect(visitor, warnings)
    return _items(visitor.references, warnings)


def look(visitor: Visitor) -> list[html.Item]:
    """Ask the tower which scans stand apart, a forward pass for each new scan; gives the warnings, adds suspects."""
    from fmclip.checks import check_strays

    scans = list(visitor.references)
    embeddings = _embeddings(visitor, scans) if scans else None
    warnings = check_strays(scans, embeddings) if embeddings is not None else []
    odd = {scans[place] for warning in warnings if warning.kind in _ODD for place in warning.scans}
    visitor.suspects = [scan for scan in visitor.references if scan in odd or scan in visitor.suspects]
    return _items(scans, warnings)


def _items(scans: Sequence[Scan], warnings: Sequence[ReferenceWarning]) -> list[html.Item]:
    """Lines for a note, each with a button that takes away the scans which it would leave out."""
    lines = []
    for warning in warnings:
        places = _left_out(warning)
        drop = tuple(scans[place].label for place in places) if len(places) <= len(scans) // 2 else ()
        lines.append(html.Item(warning.message, drop))
    return lines


def _left_out(warning: ReferenceWarning) -> tuple[int, ...]:
    """Of copies the later one; of all else what the warning names."""
    return warning.scans[1:] if warning.kind in _COPIES else warning.scans


def _embeddings(visitor: Visitor, scans: Sequence[Scan]) -> np.ndarray | None:
    """What the tower sees in each scan [k, D]; None where it is too slow, or not there."""
    from fmclip.checks import embed_scans

    try:
        tower = load_tower(visitor.session.tower, visitor.session.device)
    except FmclipError:
        return None
    started = time.monotonic()
    missing = [scan for scan in scans if scan not in visitor.embeddings]
    for start in range(0, len(missing), _BATCH):
        if time.monotonic() - started > LOOK_SECONDS:
            return None
        some = missing[start : start + _BATCH]
        visitor.embeddings.update(zip(some, embed_scans(some, tower), strict=True))
    return np.stack([visitor.embeddings[scan] for scan in scans])


def suspect(visitor: Visitor, warnings: Sequence[ReferenceWarning]) -> None:
    """Note what could be left out: of copies the later one, and scans that are flat or far from the others."""
    places: set[int] = set()
    for warning in warnings:
        if warning.kind in (*_COPIES, *_ODD):
            places |= set(_left_out(warning))
    visitor.suspects = [scan for place, scan in enumerate(visitor.references) if place in places]


def window_for_references(visitor: Visitor, chosen: str | None) -> str:
    """The window that further reference scans are read with: that of those which are there."""
    return visitor.window or chosen or AS_STORED


def window_for_queries(visitor: Visitor, chosen: str | None) -> str:
    """The window that query scans are read with: the adapter's, then that of the reference scans."""
    return visitor.session.window or window_for_references(visitor, chosen)
