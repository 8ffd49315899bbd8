"""Step 2: abnormal scans for methods that learn from them, each with a mask painted over it if the person likes."""

from __future__ import annotations

from typing import Any

import gradio as gr

from fmclip.abnormal_scans import NOUN
from fmclip.errors import FmclipError
from fmclip.page import html
from fmclip.page.painting import canvas, painted_mask
from fmclip.page.visitors import Visitor


def show(visitor: Visitor) -> dict[str, Any]:
    """Draw the strip of abnormal scans; the editor holds the one that is selected."""
    masked = [scan.label for scan in visitor.abnormals if scan in visitor.abnormal_masks]
    count = html.note(f"With a mask: {html.enumerate_labels(masked)}.", "good") if masked else ""
    there = bool(visitor.abnormals)
    return {
        "abnormals": html.thumbnails(
            visitor.abnormals, NOUN, selectable=True, marked=[visitor.painted] if visitor.painted else []
        )
        + count,
        "editor": gr.update(visible=visitor.painted is not None),
        "keep_mask": gr.update(visible=visitor.painted is not None),
        "clear_abnormals": gr.update(visible=there),
    }


def select(visitor: Visitor, place: int) -> dict[str, Any]:
    """Open an abnormal scan in the editor, with the mask that it has."""
    if not 0 <= place < len(visitor.abnormals):
        return {}
    scan = visitor.painted = visitor.abnormals[place]
    return {
        **show(visitor),
        "editor": gr.update(
            value=canvas(scan, visitor.abnormal_masks.get(scan)),
            visible=True,
            label=f"Paint what is abnormal: {scan.label}",
        ),
    }


def keep_mask(visitor: Visitor, painted: dict[str, Any] | None) -> dict[str, Any]:
    """Take what was painted as the mask of the scan in the editor; nothing painted takes the mask away.

    Raises:
        FmclipError: No scan is selected.
    """
    scan = visitor.painted
    if scan is None or painted is None:
        raise FmclipError("Click one of the abnormal scans first, then paint what is abnormal on it.")
    mask = painted_mask(painted, scan)
    if mask.any():
        visitor.abnormal_masks[scan] = mask
    else:
        visitor.abnormal_masks.pop(scan, None)
    return show(visitor)
