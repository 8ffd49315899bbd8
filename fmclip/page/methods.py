"""Step 2: which methods the page offers, what each of them needs, and why the tower in use refuses one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from fmclip.errors import FmclipError, TowerError
from fmclip.learning import load_tower
from fmclip.page import html
from fmclip.page.visitors import DEFAULT_METHOD, Visitor
from fmclip.settings import read_variants, variants_of

BEFORE_THE_TOWER = [("FusionMedCLIP (default)", DEFAULT_METHOD)]
"""Offered until the tower is there to be asked; importing the methods would keep the first visitor waiting."""


def offer(visitor: Visitor) -> dict[str, Any]:
    """Fill the menu once the tower is loaded; methods that it refuses stay in it, marked."""
    from fmclip.detectors import DETECTORS

    choices = []
    for name, detector in DETECTORS.items():
        refused = refusal(visitor, name) is not None
        choices.append((f"{detector.title or name}{' - not with this tower' if refused else ''}", name))
    updates = describe(visitor)
    return {**updates, "method": gr.update(choices=choices, value=visitor.method, info=_summary(visitor.method))}


def choose(visitor: Visitor, method: str) -> dict[str, Any]:
    """Take another method.

    Raises:
        FmclipError: There is none of that name.
    """
    from fmclip.detectors import DETECTORS

    if method not in DETECTORS:
        raise FmclipError("There is no such method. Choose one of the menu.")
    if method != visitor.method:
        visitor.method, visitor.variants = method, []
    return {**describe(visitor), "method": gr.update(info=_summary(method))}


def vary(visitor: Visitor, variants: Sequence[str]) -> None:
    """Take variants of the chosen method.

    Raises:
        FmclipError: It has no such variant.
    """
    read_variants(visitor.method, variants)
    visitor.variants = list(variants)


def describe(visitor: Visitor) -> dict[str, Any]:
    """Say whether the tower refuses the chosen method; offer its variants, and abnormal scans where it can use them."""
    from fmclip.detectors import DETECTORS

    detector: Any = DETECTORS[visitor.method]
    reason, uses = refusal(visitor, visitor.method), detector.uses_abnormals
    variants = variants_of(detector.config_class)
    label = "Abnormal scans (this method needs some)" if uses == "required" else "Abnormal scans (optional)"
    opened: dict[str, Any] = (
        {"open": True} if uses == "required" else {}
    )  # never closed: it may have been opened meanwhile
    chosen: dict[str, Any] = {"open": True} if visitor.variants else {}  # a box that is ticked is not hidden
    return {
        "method_note": html.note(reason, "warning") if reason else "",
        "variant_panel": gr.update(visible=bool(variants), **chosen),
        "variants": gr.update(
            choices=[(f"{variant}: {text}", variant) for variant, text in variants.items()], value=visitor.variants
        ),
        "abnormal_panel": gr.update(visible=uses != "never", label=label, **opened),
    }


def refusal(visitor: Visitor, method: str) -> str | None:
    """Say why the tower in use cannot work with a method; None if it can, or if there is no tower to ask."""
    from fmclip.detectors import DETECTORS

    try:
        tower = load_tower(visitor.session.tower, visitor.session.device)
    except FmclipError:
        return None
    return DETECTORS[method].refusal(tower)


def require(visitor: Visitor) -> None:
    """Refuse to adapt with a method that the tower, or the scans that are there, will not do for.

    Raises:
        TowerError: The tower cannot.
        FmclipError: The method needs abnormal scans, and there are none.
    """
    from fmclip.detectors import DETECTORS

    reason = refusal(visitor, visitor.method)
    if reason is not None:
        raise TowerError(reason)
    detector = DETECTORS[visitor.method]
    if detector.uses_abnormals == "required" and not visitor.abnormals:
        raise FmclipError(
            f"{detector.title} learns from abnormal scans too: upload some under Abnormal scans, or choose another "
            "method."
        )


def _summary(method: str) -> str:
    from fmclip.detectors import DETECTORS

    return DETECTORS[method].summary
