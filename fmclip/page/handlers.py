"""What happens when a visitor clicks: each handler gives a dictionary of page parts (named as in app.py) to update."""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import gradio as gr

from fmclip.errors import FmclipError
from fmclip.page import html
from fmclip.page.cases import Case
from fmclip.page.charts import loss_chart
from fmclip.page.pictures import slider_pair
from fmclip.page.uploads import delete, new_file, take_scans
from fmclip.page.visitors import Visitor, Visitors
from fmclip.scans import Scan
from fmclip.session import Adapted, Finding, Preview, Progress

MAX_REFERENCES = 64
MAX_QUERIES = 64
NO_QUERIES = "Upload scans to be looked at, or load an example case."
NOT_ADAPTED = "Adapt to reference scans first (step 2), or load an adapter: these scans are mapped once it answers."

Updates: TypeAlias = dict[str, Any]
log = logging.getLogger("fmclip.page")


def guarded(status: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Show errors in the page part `status` instead of raising them; what fails unexpectedly is logged without text.

    The text of foreign errors may hold a file name, so only its kind and place go into the log.
    """

    def decorate(handler: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(handler)
        def call(self: Handlers, *args: Any) -> Updates:
            try:
                return handler(self, *args)
            except Exception as error:
                return _failure(error, status, self.is_adapting(args[-1]))

        @functools.wraps(handler)
        def stream(self: Handlers, *args: Any) -> Iterator[Updates]:
            try:
                yield from handler(self, *args)
            except Exception as error:
                yield _failure(error, status, self.is_adapting(args[-1]))

        return stream if inspect.isgeneratorfunction(handler) else call

    return decorate


def _failure(error: Exception, status: str, busy: bool = False) -> Updates:
    if isinstance(error, FmclipError):
        message = str(error)
    else:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        place = f"{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}" if trace else "unknown place"
        log.error("unexpected %s in %s", type(error).__name__, place)
        message = "Something unexpected went wrong. Your scans are still here: try again, or reload the page."
    gr.Warning(message)
    updates: Updates = {status: html.note(message, "error")}
    if status == "status" and not busy:
        updates |= {"adapt": gr.update(interactive=True), "stop": gr.update(interactive=False)}
    return updates


class Handlers:
    """All handlers of the page.

    Args:
        visitors: Who is on the page.
        cases: Example cases.
        tower_note: Gives a sentence about the tower, once it is loaded.
    """

    def __init__(self, visitors: Visitors, cases: Sequence[Case], tower_note: Callable[[], str]) -> None:
        self._visitors = visitors
        self._cases = {case.name: case for case in cases}
        self._tower_note = tower_note

    def is_adapting(self, token: object) -> bool:
        """Whether the visitor's fit is running."""
        return self._visitors.is_adapting(str(token))

    # step 1

    @guarded("reference_note")
    def load_case(self, name: str, token: str) -> Updates:
        """Load an example case: references and queries."""
        case, visitor = self._cases[name], self._visitors.get(token)
        references, queries = case.load()
        visitor.references, visitor.queries[:], visitor.findings, visitor.has_example = references, queries, [], True
        visitor.truths = dict(zip((scan.digest for scan in queries), case.truths, strict=True))
        visitor.selected, visitor.threshold = None, None
        message = f"{case.title}. {case.description} Now press Adapt."
        return {
            "references": html.thumbnails(references, "reference scan"),
            "reference_note": html.note(message),
            "scan_type": case.scan_type,
            **self._hold_queries(visitor),
        }

    @guarded("reference_note")
    def add_references(self, paths: Sequence[str] | None, token: str) -> Updates:
        """Read uploaded normal scans; they join those that were uploaded before."""
        from fmclip.calibration import check_references

        visitor = self._visitors.get(token)
        if visitor.has_example:
            visitor.references, visitor.queries[:], visitor.findings = [], [], []
            visitor.truths, visitor.selected, visitor.has_example = {}, None, False
        before = visitor.references
        scans, errors = take_scans(paths or [], len(before) + 1, MAX_REFERENCES - len(before))
        visitor.references = [*before, *scans]
        warnings = [warning.message for warning in check_references(visitor.references)] if visitor.references else []
        notes = [f"{scan.label}: {text}" for scan in scans for text in scan.notes]
        return {
            "reference_files": None,
            "references": html.thumbnails(visitor.references, "reference scan"),
            "reference_note": _reading_note(len(scans), [str(error) for error in errors], [*warnings, *notes]),
            **({} if visitor.queries else self._hold_queries(visitor)),
        }

    @guarded("reference_note")
    def clear_references(self, token: str) -> Updates:
        """Take all reference scans away; the adapter stays."""
        visitor = self._visitors.get(token)
        visitor.references, visitor.has_example = [], False
        return {"references": "", "reference_note": ""}

    # step 2

    @guarded("status")
    def adapt(self, scan_type: str | None, preset: str, token: str) -> Iterator[Updates]:
        """Adapt, telling how it goes; queries are mapped again at every good state."""
        visitor = self._visitors.get(token)
        events = visitor.session.adapt(
            visitor.references,
            scan_type=(scan_type or "").strip()[:80] or "medical scan",
            preset=preset,
            preview_queries=visitor.queries,
        )
        yield {"status": html.note("Preparing …")}
        first = next(events)  # raises before anything else changes if the references will not do
        visitor.threshold = None  # one set by hand belongs to the adapter before
        yield {"adapt": gr.update(interactive=False), "stop": gr.update(interactive=True), "loss": "", "synthetic": ""}
        stage = ""
        for event in _chain(first, events):
            if isinstance(event, Progress):
                yield {"status": html.progress(event), "loss": loss_chart(event.loss_curve)}
            elif isinstance(event, Preview):
                stage = event.stage
                yield self._refresh(visitor, event.findings)
            elif isinstance(event, Adapted):
                yield self._finish(visitor, event, stage)
                if visitor.session.is_adapted:
                    yield self._offer_download(visitor)
            else:
                yield {"synthetic": html.synthetic(event.examples, _threshold(visitor), visitor.opacity)}

    @guarded("status")
    def stop(self, token: str) -> Updates:
        """End adapting; the running `adapt` says what was kept."""
        self._visitors.get(token).session.stop()
        return {"stop": gr.update(interactive=False)}

    @guarded("status")
    def load_adapter(self, path: str | None, token: str) -> Updates:
        """Take an adapter from a file."""
        visitor = self._visitors.get(token)
        try:
            visitor.session.load(path or "")
        finally:
            delete(path)
        visitor.threshold = None
        count = len(visitor.session.calibration.reference_scores) if visitor.session.calibration else 0
        message = f"Adapter loaded: learned from {count} reference scans. Queries are answered with it."
        return {"status": html.note(message, "good"), **self._offer_download(visitor), **self._refresh(visitor, ())}

    # step 3

    @guarded("query_note")
    def add_queries(self, paths: Sequence[str] | None, token: str) -> Updates:
        """Read uploaded query scans and map them, if there is an adapter."""
        visitor = self._visitors.get(token)
        if visitor.truths:
            visitor.queries[:], visitor.findings, visitor.truths, visitor.selected = [], [], {}, None
        scans, errors = take_scans(paths or [], len(visitor.queries) + 1, MAX_QUERIES - len(visitor.queries))
        visitor.queries.extend(scans)
        notes = [f"{scan.label}: {text}" for scan in scans for text in scan.notes]
        shown = self._refresh(visitor, ()) if visitor.session.is_adapted else self._hold_queries(visitor)
        note = _reading_note(len(scans), [str(error) for error in errors], notes)
        if not visitor.session.is_adapted and scans:
            gr.Warning(NOT_ADAPTED)
        return {"query_files": None, **shown, "query_note": note}

    @guarded("query_note")
    def clear_queries(self, token: str) -> Updates:
        """Take all query scans away."""
        visitor = self._visitors.get(token)
        visitor.queries[:], visitor.findings, visitor.selected, visitor.truths = [], [], None, {}
        return {"query_note": "", **self._hold_queries(visitor)}

    @guarded("query_note")
    def select(self, event: gr.EventData, token: str) -> Updates:
        """Show one query in detail."""
        visitor = self._visitors.get(token)
        place = int(event._data["index"])
        if 0 <= place < len(visitor.findings):
            visitor.selected = visitor.findings[place].scan
        return self._show(visitor)

    @guarded("query_note")
    def redraw(self, opacity: float, threshold: float, token: str) -> Updates:
        """Redraw with another opacity or threshold; the tower is not asked again."""
        visitor = self._visitors.get(token)
        calibrated = visitor.session.calibration
        moved = calibrated is not None and abs(threshold - round(calibrated.threshold, 2)) > 1e-6
        visitor.opacity, visitor.threshold = opacity, threshold if moved else None
        return {name: value for name, value in self._show(visitor).items() if name != "threshold"}

    @guarded("query_note")
    def reset_threshold(self, token: str) -> Updates:
        """Go back to the calibrated threshold."""
        visitor = self._visitors.get(token)
        visitor.threshold = None
        return self._show(visitor)

    # the page itself

    @guarded("tower")
    def arrive(self, token: str) -> Iterator[Updates]:
        """Welcome a visitor, and say which tower is in use, once it is loaded."""
        self._visitors.get(token)
        yield {"tower": '<p class="fm-tower">The tower is being loaded …</p>'}
        yield {"tower": f'<p class="fm-tower">{self._tower_note()}</p>'}

    def leave(self, token: str) -> None:
        """Forget a visitor; a fit that still runs ends."""
        threading.Thread(target=self._visitors.leave, args=(token,), daemon=True).start()

    def _finish(self, visitor: Visitor, event: Adapted, stage: str) -> Updates:
        count = len(event.calibration.reference_scores) if event.calibration else len(visitor.references)
        if event.stopped:
            kept = f"the state after {stage} is kept" if stage else "nothing new was ready yet"
            former = "" if stage or event.calibration is None else "; the adapter from before still answers"
            message, kind = f"Stopped after {event.seconds:.0f} s: {kept}{former}.", "info"
        else:
            message, kind = f"Adapted to {count} reference scans in {event.seconds:.0f} s.", "good"
            if event.calibration is not None:
                message += f" Scores above {event.calibration.threshold:.2f} deviate."
        return {
            "status": html.note(message, kind, [warning.message for warning in event.warnings]),
            "adapt": gr.update(interactive=True),
            "stop": gr.update(interactive=False),
        }

    def _offer_download(self, visitor: Visitor) -> Updates:
        file = new_file(".safetensors")
        visitor.session.save(file)
        delete(visitor.download)
        visitor.download = str(file)
        return {"download": gr.update(value=visitor.download, interactive=True)}

    def _hold_queries(self, visitor: Visitor) -> Updates:
        """Queries that cannot be answered, or are not there, yet."""
        if visitor.queries and visitor.session.is_adapted and not visitor.has_example:
            return self._refresh(visitor, ())
        text = NOT_ADAPTED if visitor.queries else NO_QUERIES
        return {
            "waiting": html.thumbnails(visitor.queries, "query scan") + html.empty(text),
            "query_note": "",
            "answers": gr.update(visible=False),
        }

    def _refresh(self, visitor: Visitor, found: Sequence[Finding]) -> Updates:
        """Take new findings, ask for those that are missing, and show them."""
        if not visitor.queries:
            return self._hold_queries(visitor)
        known: dict[Scan, Finding] = {finding.scan: finding for finding in found}
        missing = [scan for scan in visitor.queries if scan not in known]
        known |= {finding.scan: finding for finding in visitor.session.query(missing)} if missing else {}
        visitor.findings = [known[scan] for scan in visitor.queries if scan in known]
        return {"waiting": "", "answers": gr.update(visible=True), **self._show(visitor)}

    def _show(self, visitor: Visitor) -> Updates:
        """Draw cards and detail from the maps that the visitor holds."""
        findings = visitor.findings
        if not findings:
            return {}
        threshold = _threshold(visitor)
        worst_first = sorted(findings, key=lambda finding: -finding.score)
        selected = next((finding for finding in findings if finding.scan is visitor.selected), worst_first[0])
        truth = visitor.truths.get(selected.scan.digest)
        place = worst_first.index(selected) + 1
        return {
            "cards": html.cards(findings, selected, threshold, visitor.opacity),
            "slider": slider_pair(selected, threshold, visitor.opacity),
            "verdict": html.verdict(selected, threshold, truth, place, len(findings)),
            "legend": html.legend(threshold),
            "threshold": round(threshold, 2),
        }


def _threshold(visitor: Visitor) -> float:
    """The threshold in use: chosen by hand, or calibrated."""
    if visitor.threshold is not None:
        return visitor.threshold
    return visitor.session.calibration.threshold if visitor.session.calibration else 0.5


def _reading_note(count: int, errors: Sequence[str], warnings: Sequence[str]) -> str:
    if errors:
        gr.Warning(" ".join(errors[:3]))
    if not errors and not warnings:
        return ""
    read = f"{count} scan{'' if count == 1 else 's'} read" + (f", {len(errors)} refused" if errors else "") + "."
    return html.note(read, "error" if errors else "warning", [*errors, *warnings])


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest
