"""What happens when a visitor clicks: each handler gives a dictionary of page parts (named as in app.py) to update."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import logging
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Protocol

import gradio as gr

from fmclip.calibration import MAX_REFERENCES
from fmclip.errors import FmclipError
from fmclip.page import abnormals, answers, exports, gallery, html, methods, pacing, references
from fmclip.page.answers import NOT_ADAPTED, Updates
from fmclip.page.cases import Case
from fmclip.page.charts import loss_chart
from fmclip.page.notes import outcome, reading_note
from fmclip.page.uploads import Reading, delete, deleted_if_refused, new_file, take_scans
from fmclip.page.visitors import DEFAULT_PRESET, Visitor, Visitors
from fmclip.session import Adapted, Preview, Progress, SessionEvent
from fmclip.settings import presets_of, read_variants

MAX_QUERIES = 64
PRESETS = [("Fast, about 10 s", "fast"), ("Full, about 1 min", "full")]
PAPER = "paper"
NORMAL_BUTTONS = ("normal_scan", "normal_contours", "normal_painted", "take_back")
GPU_PRESETS = [("Fast", "fast"), ("Full", "full"), ("As in the paper", PAPER)]

log = logging.getLogger("fmclip.page")


class TowerInUse(Protocol):
    """What the handlers ask of the tower."""

    @property
    def has_gpu(self) -> bool:
        """Whether there is a GPU to train on."""

    def describe(self) -> str:
        """Wait for the tower, and say in a sentence what it is."""


def guarded(status: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Show errors in the page part `status` instead of raising them; what fails unexpectedly is logged without text.

    The text of foreign errors may hold a file name, so only its kind and place go into the log.
    """

    def decorate(handler: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(handler)
        def call(self: Any, *args: Any) -> Updates:
            try:
                return handler(self, *args)
            except Exception as error:
                return self.failure(error, status, args[-1])

        @functools.wraps(handler)
        def stream(self: Any, *args: Any) -> Iterator[Updates]:
            try:
                yield from handler(self, *args)
            except Exception as error:
                yield self.failure(error, status, args[-1])

        return stream if inspect.isgeneratorfunction(handler) else call

    return decorate


class Handlers:
    """All handlers of the page.

    Args:
        visitors: Who is on the page.
        cases: Example cases.
        tower: The tower, which may still be loading.
    """

    def __init__(self, visitors: Visitors, cases: Sequence[Case], tower: TowerInUse) -> None:
        self._visitors = visitors
        self._cases = {case.name: case for case in cases}
        self._tower = tower

    def failure(self, error: Exception, status: str, token: str) -> Updates:
        """Say what went wrong; buttons come back unless a fit is running."""
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
        back = {} if self._visitors.is_adapting(str(token)) else self.buttons(busy=False)
        return {status: html.note(message, "error"), **back}

    # step 1

    @guarded("reference_note")
    def load_case(self, name: str, token: str) -> Updates:
        """Load an example case: references and queries."""
        case, visitor = self._cases[name], self._idle(token)
        normals, queries = case.load()
        visitor.drop_references()
        visitor.drop_queries()
        visitor.drop_abnormals()
        visitor.references, visitor.queries[:], visitor.has_example = normals, queries, True
        visitor.truths = dict(zip((scan.digest for scan in queries), case.truths, strict=True))
        visitor.threshold = None
        message = f"{case.title}. {case.description} Now press Adapt."
        return {
            "reference_note": html.note(message),
            "set_note": "",
            "query_note": "",
            "scan_type": case.scan_type,
            "abnormal_note": "",
            **references.show(visitor),
            **abnormals.show(visitor),
            **answers.hold(visitor),
        }

    @guarded("reference_note")
    def add_references(
        self, paths: Sequence[str] | None, slice_text: str | None, window: str | None, token: str
    ) -> Updates:
        """Read uploaded normal scans; they join those that were uploaded before."""
        with deleted_if_refused(paths):
            visitor = self._idle(token)
            reading = Reading.parse(slice_text, references.window_for_references(visitor, window))
        replaced = visitor.has_example
        if replaced:
            visitor.drop_references()
            visitor.drop_queries()
        upload = take_scans(paths or [], visitor.next_reference, MAX_REFERENCES - len(visitor.references), reading)
        visitor.next_reference += upload.taken
        visitor.windows.update(upload.windows)
        visitor.references = [*visitor.references, *upload.scans]
        warnings = references.check(visitor)
        return {
            "reference_files": None,
            "reference_note": reading_note(upload, warnings),
            **references.show(visitor),
            **(answers.hold(visitor) if replaced else {}),
        }

    @guarded("reference_note")
    def mark_references(self, event: gr.EventData, token: str) -> Updates:
        """Select reference scans, all that are pressed by now; the strip shows it by itself."""
        visitor = self._visitors.get(token)
        pressed = set(map(int, event._data["pressed"]))
        visitor.marked = {scan for place, scan in enumerate(visitor.references) if place in pressed}
        buttons = references.show(visitor)
        return {"remove_marked": buttons["remove_marked"]}

    @guarded("reference_note")
    def remove_marked(self, token: str) -> Updates:
        """Take the selected reference scans away."""
        visitor = self._idle(token)
        return references.remove(visitor, [scan for scan in visitor.references if scan in visitor.marked])

    @guarded("reference_note")
    def remove_suspects(self, token: str) -> Updates:
        """Take away what the warnings name: copies, flat scans, outliers."""
        visitor = self._idle(token)
        return references.remove(visitor, visitor.suspects)

    @guarded("reference_note")
    def clear_references(self, token: str) -> Updates:
        """Take all reference scans away; the adapter stays."""
        visitor = self._idle(token)
        visitor.drop_references()
        return {"reference_note": "", "set_note": "", **references.show(visitor)}

    # step 2

    @guarded("status")
    def adapt(self, scan_type: str | None, preset: str, token: str) -> Iterator[Updates]:
        """Adapt, telling how it goes; queries are mapped again at every good state."""
        visitor = self._visitors.get(token)
        if preset == PAPER and not self._tower.has_gpu:
            raise FmclipError("Training as in the paper needs a GPU, and there is none here: choose fast or full.")
        if preset not in presets_of(visitor.method, has_gpu=self._tower.has_gpu):
            raise FmclipError("The chosen method has no such training here: choose another one.")
        methods.require(visitor)
        visitor.preset, visitor.scan_type = preset, (scan_type or "").strip()[:80]
        events = visitor.session.adapt(
            visitor.references,
            scan_type=visitor.scan_type or "medical scan",
            preset=preset,
            preview_queries=visitor.queries,
            window=visitor.window,
            regions=visitor.regions,
            method=visitor.method,
            settings=read_variants(visitor.method, visitor.variants),
            abnormals=visitor.abnormals,
            abnormal_masks=[visitor.abnormal_masks.get(scan) for scan in visitor.abnormals],
        )
        yield from self.follow(visitor, events)

    def offer_presets(self, visitor: Visitor) -> Updates:
        """Offer the trainings that the chosen method has here; where the chosen one is none of them, the first."""
        titles = {name: title for title, name in (GPU_PRESETS if self._tower.has_gpu else PRESETS)}
        names = presets_of(visitor.method, has_gpu=self._tower.has_gpu)
        if visitor.preset not in names:
            visitor.preset = DEFAULT_PRESET
        return {"preset": gr.update(choices=[(titles.get(name, name), name) for name in names], value=visitor.preset)}

    def follow(self, visitor: Visitor, events: Generator[SessionEvent, None, None]) -> Iterator[Updates]:
        """Tell what a session says while it adapts; its buttons rest until it is over."""
        with contextlib.closing(events):  # whatever fails while drawing, the fit ends with it
            yield {"status": html.note("Preparing …")}
            first = next(events)  # raises before anything else changes if the references will not do
            visitor.threshold = None  # one set by hand belongs to the adapter before
            visitor.checks, visitor.examples = [], ()
            yield {**self.buttons(busy=True), "loss": "", "synthetic": "", "self_check": "", "replay": ""}
            from fmclip.self_check import SelfCheck

            for event in itertools.chain([first], events):
                if isinstance(event, Progress):
                    yield {"status": html.progress(event), "loss": loss_chart(event.loss_curve)}
                elif isinstance(event, Preview):
                    answers.take(visitor, event.findings)
                    if not visitor.session.is_stopping:  # drawing would keep a person waiting who pressed Stop
                        yield answers.show(visitor)
                elif isinstance(event, Adapted):
                    adapted = event
                elif isinstance(event, SelfCheck):
                    visitor.checks.append(event)
                    yield {"self_check": html.self_check(visitor.checks)}
                else:
                    visitor.examples = event.examples
                    threshold = answers.threshold_of(visitor)
                    yield {"synthetic": html.synthetic(event.examples, threshold, visitor.opacity)}
        references.suspect(visitor, adapted.warnings)  # before the buttons wake: places belong to these references
        awake = self.buttons(busy=False)
        # after a Stop at once; else when all is drawn: gradio hears no second click until this is over
        yield {"status": outcome(visitor, adapted), **(awake if adapted.stopped else {"stop": awake["stop"]})}
        yield {**references.show(visitor), **pacing.show(visitor)}
        if visitor.session.is_adapted:
            yield from answers.fill(visitor)
            yield {**self.offer_download(visitor), **gallery.offer_records(visitor)}
        yield awake

    @guarded("status")
    def stop(self, token: str) -> Updates:
        """End adapting; the running `adapt` says what was kept."""
        self._visitors.get(token).session.stop()
        return {"stop": gr.update(interactive=False)}

    @guarded("status")
    def load_adapter(self, path: str | None, token: str) -> Iterator[Updates]:
        """Take an adapter from a file."""
        try:
            visitor = self._visitors.get(token)
            visitor.session.load(path or "")
            from fmclip.checkpoint import describe_adapter

            visitor.adapter_name = describe_adapter(path or "")["name"]
        finally:
            delete(path)
        visitor.threshold, visitor.regions = None, []
        count = len(visitor.session.calibration.reference_scores) if visitor.session.calibration else 0
        window = f" It looks through the window {visitor.session.window}." if visitor.session.window else ""
        named = f" {visitor.adapter_name}" if visitor.adapter_name else ""
        message = f"Adapter{named} loaded: learned from {count} reference scans. Queries are answered with it.{window}"
        told = {"status": html.note(message, "good"), "adapter_name": visitor.adapter_name}
        yield {**told, **self.offer_download(visitor), **pacing.show(visitor)}
        yield from answers.fill(visitor)

    # step 3

    @guarded("query_note")
    def add_queries(
        self, paths: Sequence[str] | None, slice_text: str | None, window: str | None, token: str
    ) -> Iterator[Updates]:
        """Read uploaded query scans and map them, if there is an adapter."""
        with deleted_if_refused(paths):
            visitor = self._visitors.get(token)
            reading = Reading.parse(slice_text, references.window_for_queries(visitor, window))
        if visitor.truths:
            visitor.drop_queries()
        upload = take_scans(paths or [], visitor.next_query, MAX_QUERIES - len(visitor.queries), reading)
        visitor.next_query += upload.taken
        visitor.windows.update(upload.windows)
        visitor.queries.extend(upload.scans)
        notes = []
        if upload.windows and window and window != reading.window:
            notes.append(f"Read with the window {reading.window}, as the references were, not with {window}.")
        if not visitor.session.is_adapted and upload.scans:
            gr.Warning(NOT_ADAPTED)
        yield {"query_files": None, "query_note": reading_note(upload, notes)}
        yield from answers.fill(visitor)

    @guarded("query_note")
    def clear_queries(self, token: str) -> Updates:
        """Take all query scans away."""
        visitor = self._visitors.get(token)
        visitor.drop_queries()
        return {"query_note": "", **answers.hold(visitor)}

    @guarded("query_note")
    def select(self, event: gr.EventData, token: str) -> Updates:
        """Show one query in detail."""
        visitor = self._visitors.get(token)
        place = int(event._data["index"])
        if 0 <= place < len(visitor.findings):
            visitor.selected = visitor.findings[place].scan
        return answers.show(visitor)

    @guarded("export_note")
    def take_away(self, name: str, token: str) -> Iterator[Updates]:
        """Make the report ("report") or the zip ("everything") of what is shown."""
        visitor = self._visitors.get(token)
        try:
            yield from exports.offer(visitor, name)
        except Exception:
            yield {name: gr.update(interactive=True)}
            raise
        finally:
            if visitor.is_closed:  # once more: the file came after it
                visitor.close()

    # the page itself

    @guarded("tower")
    def arrive(self, token: str) -> Iterator[Updates]:
        """Welcome a visitor; once the tower is loaded, say which it is and offer what its device can do."""
        visitor = self._visitors.get(token)
        yield {"tower": '<p class="fm-tower">The tower is being loaded …</p>'}
        note = self._tower.describe()
        presets = {**self.offer_presets(visitor)["preset"], "info": "On a GPU"} if self._tower.has_gpu else None
        yield {"tower": f'<p class="fm-tower">{note}</p>', **({"preset": presets} if presets else {})}
        yield methods.offer(visitor)

    def leave(self, token: str) -> None:
        """Forget a visitor; a fit that still runs ends."""
        threading.Thread(target=self._visitors.leave, args=(token,), daemon=True).start()

    def _idle(self, token: str) -> Visitor:
        """The visitor, whose reference scans may be changed now.

        Raises:
            FmclipError: The fit is running.
        """
        visitor = self._visitors.get(token)
        if visitor.session.is_adapting:
            raise FmclipError("The reference scans are being learned from: wait, or press Stop before you change them.")
        return visitor

    def buttons(self, *, busy: bool) -> Updates:
        """What would change the references or the adapter rests during a fit; Stop rests otherwise."""
        resting = (
            "adapt",
            "go_on",
            "load",
            "method",
            "clear_references",
            "remove_marked",
            "remove_suspects",
            *NORMAL_BUTTONS,
        )
        names = [*resting, *(f"case-{name}" for name in self._cases)]
        return {**{name: gr.update(interactive=not busy) for name in names}, "stop": gr.update(interactive=busy)}

    def offer_download(self, visitor: Visitor) -> Updates:
        """Write the adapter in use into a new file for the download button."""
        file = new_file(".safetensors", visitor.adapter_name or "adapter")
        with visitor.writing(file):
            visitor.session.save(file, visitor.adapter_name)
            delete(visitor.download)
            visitor.download = str(file)
        return {"download": gr.update(value=visitor.download, interactive=True)}


class HandlerGroup:
    """Handlers of one part of the page in a file of their own; they share visitors and error texts with the others.

    Args:
        page: The handlers that they go with.
    """

    def __init__(self, page: Handlers) -> None:
        self._visitors, self._idle, self.failure = page._visitors, page._idle, page.failure
        self._page = page
