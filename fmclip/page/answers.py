"""Step 3: what the adapter in use says about a visitor's queries, and how it is shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import gradio as gr

from fmclip.page import explaining, html
from fmclip.page.pictures import slider_pair
from fmclip.page.score_charts import overview
from fmclip.page.uploads import describe_window
from fmclip.page.visitors import Visitor
from fmclip.scans import Scan
from fmclip.session import Finding

NO_QUERIES = "Upload scans to be looked at, or load an example case."
NOT_ADAPTED = "Adapt to reference scans first (step 2), or load an adapter: these scans are mapped once it answers."
CHUNK = 8
"""Queries that are asked for at a time: the first ones are shown while the others follow."""

Updates: TypeAlias = dict[str, Any]


def threshold_of(visitor: Visitor) -> float:
    """The threshold in use: chosen by hand, or calibrated."""
    if visitor.threshold is not None:
        return visitor.threshold
    return visitor.session.calibration.threshold if visitor.session.calibration else 0.5


def hold(visitor: Visitor) -> Updates:
    """Show queries that cannot be answered, or are not there, yet."""
    return {
        "waiting": html.thumbnails(visitor.queries, "query scan")
        + html.empty(NOT_ADAPTED if visitor.queries else NO_QUERIES),
        "answers": gr.update(visible=False),
    }


def take(visitor: Visitor, found: Sequence[Finding]) -> None:
    """Keep new findings, and let go of those that a former adapter made or that cannot be compared."""
    adapter = visitor.session.adapter_key
    known = {finding.scan: finding for finding in (*visitor.findings, *found) if finding.adapter == adapter}
    foreign = set(_foreign(visitor))
    visitor.findings = [known[scan] for scan in list(visitor.queries) if scan in known and scan not in foreign]


def fill(visitor: Visitor) -> Iterator[Updates]:
    """Ask for the findings that are missing, a few at a time, and show them as they come."""
    take(visitor, ())
    yield from _shown(visitor)
    while visitor.session.is_adapted and (missing := _missing(visitor)):
        take(visitor, visitor.session.query(missing[:CHUNK]))
        yield from _shown(visitor)


def _shown(visitor: Visitor) -> Iterator[Updates]:
    """Draw; once more if a question why was answered meanwhile: its answer may have been drawn over."""
    asked = visitor.why
    yield show(visitor)
    if visitor.why is not asked:
        yield show(visitor)


def redraw(visitor: Visitor) -> Updates:
    """Draw as the sliders stand, which are left alone; again if one was moved meanwhile, since both draw at once."""
    while True:
        looks = visitor.opacity, visitor.threshold
        drawn = show(visitor)
        if looks == (visitor.opacity, visitor.threshold):
            return {name: value for name, value in drawn.items() if name != "threshold"}


def show(visitor: Visitor) -> Updates:
    """Draw cards and detail from the maps that the visitor holds."""
    findings = visitor.findings
    if not visitor.queries or not visitor.session.is_adapted:
        return hold(visitor)
    if not findings:
        strip = html.thumbnails(visitor.queries, "query scan")
        return {"waiting": strip + _still_to_come(visitor), "answers": gr.update(visible=False)}
    threshold = threshold_of(visitor)
    worst_first = sorted(findings, key=lambda finding: -finding.score)
    selected = selected_of(visitor) or worst_first[0]
    window = visitor.windows.get(selected.scan)
    facts = {"Window": describe_window(window) if window else "", "Known truth": _truth(visitor, selected.scan)}
    if any(selected.scan.digest == scan.digest for scan in visitor.references):
        facts["Reference"] = "one of the reference scans: compared with itself, its score says nothing"
    place = worst_first.index(selected) + 1
    return {
        "waiting": _still_to_come(visitor),
        "answers": gr.update(visible=True),
        "overview": overview(findings, selected, threshold),
        "cards": html.cards(findings, selected, threshold, visitor.opacity, visitor.colours),
        "slider": slider_pair(selected, threshold, visitor.opacity, visitor.colours),
        "verdict": html.verdict(selected, threshold, facts, place, len(findings)),
        "legend": html.legend(threshold, visitor.colours),
        "threshold": round(threshold, 2),
        **closer(visitor, selected),
    }


def selected_of(visitor: Visitor) -> Finding | None:
    """The finding shown in detail: the one that was chosen, or the worst; None before there is any."""
    worst = max(visitor.findings, key=lambda finding: finding.score, default=None)
    return next((finding for finding in visitor.findings if finding.scan is visitor.selected), worst)


def closer(visitor: Visitor, selected: Finding) -> Updates:
    """Draw the closer look at one finding: the clickable scan, the answer to why, the maps, the marked regions."""
    threshold, why = threshold_of(visitor), visitor.why
    why = why if why is not None and why.is_about(selected) else None
    look = threshold, visitor.opacity, visitor.colours
    session = visitor.session
    marks = html.enumerate_labels([region.scan.label for region in session.regions])
    later = html.enumerate_labels([one.scan.label for one in visitor.regions if one not in session.regions])
    told = html.note(f"Regions called normal: on {marks}.") if marks else ""
    told += html.note(f"Called normal, for the next adapter with a patch memory: on {later}.") if later else ""
    return {
        "spot": explaining.clickable(selected, *look, why),
        "why": explaining.answer(why),
        "maps": explaining.maps(selected, *look, why),
        "normal_scan": gr.update(value=f"All of {selected.label} is normal"),
        "normal_contours": gr.update(interactive=not session.is_adapting and bool((selected.map > threshold).any())),
        "marks": told,
        "take_back": gr.update(visible=bool(told)),
    }


def _truth(visitor: Visitor, scan: Scan) -> str:
    return visitor.truths.get(scan.digest, "")


def _missing(visitor: Visitor) -> list[Scan]:
    there = {finding.scan for finding in visitor.findings} | set(_foreign(visitor))
    return [scan for scan in visitor.queries if scan not in there]


def _foreign(visitor: Visitor) -> list[Scan]:
    """Queries that were read with another window than the adapter's references."""
    window = visitor.session.window
    return [scan for scan in visitor.queries if window and visitor.windows.get(scan, window) != window]


def _still_to_come(visitor: Visitor) -> str:
    """Say which queries have no answer, and why."""
    foreign, missing = _foreign(visitor), _missing(visitor)
    notes = ""
    if foreign:
        names = html.enumerate_labels([scan.label for scan in foreign])
        notes += html.note(
            f"Not compared: {names}, read with another window than the adapter's ({visitor.session.window}). "
            "Upload again to compare.",
            "warning",
        )
    if missing:
        notes += html.note(f"{len(visitor.findings)} of {len(visitor.queries) - len(foreign)} scans mapped so far …")
    return notes
