"""Step 1: the strip of reference scans, which of them look wrong, and taking single ones away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

from fmclip.page import html
from fmclip.page.visitors import Visitor
from fmclip.scans import AS_STORED, Scan

if TYPE_CHECKING:
    from fmclip.calibration import ReferenceWarning

WINDOW_INFO = "For CT; references and queries alike"
WINDOW_KEPT = "Belongs to the reference scans; remove them to choose another"

_COPIES = ("duplicate", "near-duplicate")
_ODD = ("constant", "outlier")


def show(visitor: Visitor) -> dict[str, Any]:
    """Draw the strip, and the buttons that go with it."""
    marked, suspects, window = len(visitor.marked), visitor.suspects, visitor.window
    names = html.enumerate_labels([scan.label for scan in suspects])
    return {
        "references": html.thumbnails(visitor.references, "reference scan", selectable=True, marked=visitor.marked),
        "remove_marked": gr.update(value=f"Remove {marked} selected", visible=marked > 0),
        "remove_suspects": gr.update(value=f"Remove {names}", visible=bool(suspects)),
        "clear_references": gr.update(visible=bool(visitor.references)),
        "window": gr.update(value=window, interactive=False, info=WINDOW_KEPT)
        if window
        else gr.update(interactive=True, info=WINDOW_INFO),
    }


def remove(visitor: Visitor, scans: Sequence[Scan]) -> None:
    """Take single reference scans away; the others keep their numbers."""
    gone = set(scans)
    visitor.references = [scan for scan in visitor.references if scan not in gone]
    visitor.marked.clear()
    visitor.has_example = visitor.has_example and bool(visitor.references)


def check(visitor: Visitor) -> list[str]:
    """Look at the set as it is now; gives the warnings and notes the suspects."""
    from fmclip.calibration import check_references

    warnings = check_references(visitor.references) if visitor.references else []
    suspect(visitor, warnings)
    return [warning.message for warning in warnings]


def suspect(visitor: Visitor, warnings: Sequence[ReferenceWarning]) -> None:
    """Note what could be left out: of copies the later one, and scans that are flat or far from the others."""
    places: set[int] = set()
    for warning in warnings:
        if warning.kind in _COPIES:
            places |= set(warning.scans[1:])
        elif warning.kind in _ODD:
            places |= set(warning.scans)
    visitor.suspects = [scan for place, scan in enumerate(visitor.references) if place in places]


def window_for_references(visitor: Visitor, chosen: str | None) -> str:
    """The window that further reference scans are read with: that of those which are there."""
    return visitor.window or chosen or AS_STORED


def window_for_queries(visitor: Visitor, chosen: str | None) -> str:
    """The window that query scans are read with: the adapter's, then that of the reference scans."""
    return visitor.session.window or window_for_references(visitor, chosen)
