"""Step 2: how long adapting will take, and whether a training can be resumed or made longer."""

from __future__ import annotations

from typing import Any

import gradio as gr

from fmclip.errors import FmclipError
from fmclip.learning import estimate_seconds
from fmclip.page import html
from fmclip.page.visitors import Visitor
from fmclip.settings import read_variants


def show(visitor: Visitor) -> dict[str, Any]:
    """The estimate, and the button that goes on with the last training."""
    unfinished = visitor.session.unfinished
    stands = unfinished is not None and unfinished.normals == tuple(visitor.references)
    is_over = unfinished is not None and unfinished.is_over
    return {
        "estimate": estimate(visitor),
        "go_on": gr.update(value="More steps" if is_over else "Resume", visible=html.seen(stands)),
    }


def can_resume(visitor: Visitor) -> bool:
    """Whether the last training was stopped before its end."""
    unfinished = visitor.session.unfinished
    return unfinished is not None and not unfinished.is_over


def estimate(visitor: Visitor) -> str:
    """Seconds for these references, once steps of this kind were measured on this machine: HTML."""
    session, count = visitor.session, len(visitor.references)
    seconds = None
    if count:
        settings = read_variants(visitor.method, visitor.variants)
        seconds = estimate_seconds(session.tower, session.device, visitor.method, visitor.preset, count, settings)
    if seconds is None:
        return ""
    words = f"{max(1, round(seconds))} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    return html.hint(f"About {words} for {count} reference scans, by the steps measured on this machine.")


def require_same(visitor: Visitor) -> None:
    """Refuse to go on with a training on other references than those that are shown.

    Raises:
        FmclipError: They have changed, or there is nothing to go on with.
    """
    unfinished = visitor.session.unfinished
    if unfinished is None:
        raise FmclipError("There is no training to go on with: press Adapt first.")
    if unfinished.normals != tuple(visitor.references):
        raise FmclipError("The reference scans have changed since: press Adapt to learn from them anew.")
