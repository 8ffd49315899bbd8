"""Step 3, a closer look: how maps are shown, the question why about a spot, and false alarms called normal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gradio as gr
import numpy as np

from fmclip.calibration import MAX_REFERENCES
from fmclip.colours import COLOUR_MAPS
from fmclip.errors import FmclipError, TowerError
from fmclip.page import answers, explaining, html, references
from fmclip.page.answers import Updates
from fmclip.page.handlers import HandlerGroup, guarded
from fmclip.page.painting import canvas, painted_mask
from fmclip.page.visitors import Visitor
from fmclip.session import Finding


class Reviewing(HandlerGroup):
    """Handlers of the closer look."""

    @guarded("query_note")
    def choose_colours(self, colours: str, token: str) -> Updates:
        """Draw all maps in other colours; the tower is not asked again."""
        visitor = self._visitors.get(token)
        if colours in COLOUR_MAPS:
            visitor.colours = colours
        return answers.show(visitor)

    @guarded("query_note")
    def set_opacity(self, opacity: float, token: str) -> Updates:
        """Redraw with another opacity; the tower is not asked again."""
        visitor = self._visitors.get(token)
        visitor.opacity = opacity
        return answers.redraw(visitor)

    @guarded("query_note")
    def set_threshold(self, threshold: float, token: str) -> Updates:
        """Redraw with another threshold; the tower is not asked again."""
        visitor = self._visitors.get(token)
        calibrated = visitor.session.calibration
        moved = calibrated is not None and abs(threshold - round(calibrated.threshold, 2)) > 1e-6
        visitor.threshold = threshold if moved else None
        return answers.redraw(visitor)

    @guarded("query_note")
    def reset_threshold(self, token: str) -> Updates:
        """Go back to the calibrated threshold."""
        visitor = self._visitors.get(token)
        visitor.threshold = None
        return answers.show(visitor)

    @guarded("why_note")
    def ask(self, event: gr.EventData, token: str) -> Iterator[Updates]:
        """Say what a spot was compared with; its place comes as shares of the width and the height."""
        visitor = self._visitors.get(token)
        finding = _selected(visitor)
        x, y = (min(max(float(event._data[name]), 0.0), 1.0) for name in ("x", "y"))
        yield from self._explain(visitor, finding, x * finding.scan.width, y * finding.scan.height)

    @guarded("why_note")
    def ask_highest(self, token: str) -> Iterator[Updates]:
        """Say what the highest spot of the map was compared with."""
        visitor = self._visitors.get(token)
        finding = _selected(visitor)
        yield from self._explain(visitor, finding, *explaining.highest_spot(finding))

    def _explain(self, visitor: Visitor, finding: Finding, x: float, y: float) -> Iterator[Updates]:
        yield {"why_note": html.note(f"Comparing a spot of {finding.label} with the references …")}
        adapter = visitor.session.adapter_key
        explanation = visitor.session.explain(finding.scan, x, y)
        looks = {}
        for name, look in (("Attention", visitor.session.attention), ("Words", visitor.session.grad_cam)):
            with contextlib.suppress(TowerError):  # most towers can tell one of them, or none
                looks[name] = look(finding.scan)
        if visitor.session.adapter_key != adapter:
            raise FmclipError("Another adapter has come into use meanwhile: ask again.")
        visitor.why = explaining.Why.of(explanation, adapter, looks)
        yield {"why_note": "", **answers.closer(visitor, finding)}

    @guarded("normal_note")
    def scan_is_normal(self, scan_type: str | None, preset: str, token: str) -> Iterator[Updates]:
        """Make the selected query a reference scan and adapt again; a Stop keeps the adapter from before."""
        visitor = self._idle(token)
        scan = visitor.selected = _selected(visitor).scan
        if not visitor.references:
            raise FmclipError(
                "The reference scans are not here, so that nothing can be learned again: the adapter came from a file. "
                "Mark the region that is normal instead."
            )
        if visitor.session.references != tuple(visitor.references):
            raise FmclipError(
                "The adapter was not learned from the reference scans of step 1: press Adapt to learn from them first, "
                "or mark the region that is normal."
            )
        if len(visitor.references) >= MAX_REFERENCES:
            raise FmclipError(f"There are {MAX_REFERENCES} reference scans already: remove one in step 1 first.")
        if any(scan.digest == one.digest for one in visitor.references):
            raise FmclipError(f"{scan.label.capitalize()} is one of the reference scans already.")
        numbers = [int(one.label.rpartition(" ")[2]) for one in visitor.references if one.label[-1:].isdigit()]
        number = max([visitor.next_reference, *(number + 1 for number in numbers)])
        joined = replace(scan, label=f"scan {number}")
        visitor.next_reference = number + 1
        if scan in visitor.windows:
            visitor.windows[joined] = visitor.windows[scan]
        visitor.references = [*visitor.references, joined]
        before = visitor.session.adapter_key
        text = f"{scan.label.capitalize()} is reference scan {number} now: learning again. Step 2 can stop it."
        yield {"normal_note": html.note(text), **references.show(visitor)}
        for updates in self._page.adapt(scan_type, preset, token):
            yield {**updates, "normal_note": updates["status"]} if "status" in updates else updates
        if visitor.session.adapter_key == before:
            text = f"Nothing new was learned, the adapter from before answers. Reference scan {number} is in step 1."
            yield {"normal_note": html.note(text, "warning")}

    @guarded("normal_note")
    def contours_are_normal(self, token: str) -> Iterator[Updates]:
        """Call normal what lies above the threshold in the selected query."""
        visitor = self._idle(token)
        finding = _selected(visitor)
        yield from self._mark(visitor, finding, finding.map > answers.threshold_of(visitor))

    @guarded("normal_note")
    def open_editor(self, token: str) -> Updates:
        """Put the selected query into the editor."""
        visitor = self._visitors.get(token)
        scan = visitor.in_editor = _selected(visitor).scan
        label = f"Paint the region of {scan.label} that is normal"
        return {
            "normal_editor": gr.update(value=canvas(scan), visible=True, label=label),
            "normal_painted": gr.update(visible=True),
        }

    @guarded("normal_note")
    def painted_is_normal(self, painted: dict[str, Any] | None, token: str) -> Iterator[Updates]:
        """Call normal what was painted."""
        visitor = self._idle(token)
        finding = next((finding for finding in visitor.findings if finding.scan is visitor.in_editor), None)
        if finding is None:
            raise FmclipError("The scan in the editor is not among the queries any more: open the editor again.")
        yield from self._mark(visitor, finding, painted_mask(painted, finding.scan))
        yield {"normal_editor": gr.update(visible=False, value=None), "normal_painted": gr.update(visible=False)}

    @guarded("normal_note")
    def take_back(self, token: str) -> Iterator[Updates]:
        """Forget all regions that were called normal."""
        visitor = self._idle(token)
        if visitor.session.regions:
            visitor.session.mark_normal([])
        visitor.regions = []
        yield {"normal_note": html.note("All marked regions are taken back.")}
        yield from self._answer_again(visitor)

    def _mark(self, visitor: Visitor, finding: Finding, mask: np.ndarray) -> Iterator[Updates]:
        from fmclip.regions import NormalRegion  # with torch, which the page starts without

        region = NormalRegion(finding.scan, mask)
        visitor.session.mark_normal([*visitor.session.regions, region])
        visitor.regions, visitor.selected = [*visitor.regions, region], finding.scan
        share = 100 * float(mask.mean())
        text = (
            f"A region of {finding.label} ({share:.1f} % of it) counts as normal now, and whatever looks like it in "
            "any scan. Nothing was trained again; the threshold stays. Adapt again (step 2) to train with it."
        )
        yield {"normal_note": html.note(text, "good")}
        yield from self._answer_again(visitor)

    def _answer_again(self, visitor: Visitor) -> Iterator[Updates]:
        yield self._page.offer_download(visitor)
        yield from answers.fill(visitor)


def _selected(visitor: Visitor) -> Finding:
    """The finding shown in detail.

    Raises:
        FmclipError: Nothing has been mapped yet.
    """
    finding = answers.selected_of(visitor)
    if finding is None:
        raise FmclipError("No query scan has been mapped yet: adapt first, then upload scans to be compared.")
    return finding
