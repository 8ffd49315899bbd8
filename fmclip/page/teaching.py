"""Step 2's handlers beside Adapt and Stop: the choice of a method, and abnormal scans with painted masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from fmclip.abnormal_scans import MAX_ABNORMALS, NOUN
from fmclip.page import abnormals, gallery, html, methods, pacing, references
from fmclip.page.answers import Updates
from fmclip.page.handlers import HandlerGroup, guarded
from fmclip.page.notes import reading_note
from fmclip.page.uploads import Reading, deleted_if_refused, take_scans


class Teaching(HandlerGroup):
    """What a method learns from, and which one it is."""

    @guarded("method_note")
    def choose_method(self, method: str, token: str) -> Updates:
        """Take another method: its description, whether the tower refuses it, its trainings, what it can learn from."""
        visitor = self._visitors.get(token)
        chosen = {**methods.choose(visitor, method), **self._page.offer_presets(visitor)}
        return {**chosen, "estimate": pacing.estimate(visitor)}

    @guarded("method_note")
    def choose_variants(self, variants: list[str] | None, token: str) -> Updates:
        """Take variants of the method, for the next Adapt."""
        visitor = self._visitors.get(token)
        methods.vary(visitor, variants or [])
        return {"method_note": methods.describe(visitor)["method_note"], "estimate": pacing.estimate(visitor)}

    @guarded("abnormal_note")
    def add_abnormals(
        self, paths: Sequence[str] | None, slice_text: str | None, window: str | None, token: str
    ) -> Updates:
        """Read uploaded abnormal scans, through the window of the references."""
        with deleted_if_refused(paths):
            visitor = self._idle(token)
            reading = Reading.parse(slice_text, references.window_for_references(visitor, window))
        room = MAX_ABNORMALS - len(visitor.abnormals)
        upload = take_scans(paths or [], visitor.next_abnormal, room, reading, NOUN)
        visitor.next_abnormal += upload.taken
        visitor.windows.update(upload.windows)
        visitor.abnormals = [*visitor.abnormals, *upload.scans]
        return {"abnormal_files": None, "abnormal_note": reading_note(upload, []), **abnormals.show(visitor)}

    @guarded("abnormal_note")
    def select_abnormal(self, event: gr.EventData, token: str) -> Updates:
        """Open an abnormal scan to paint on it."""
        return abnormals.select(self._visitors.get(token), int(event._data["index"]))

    @guarded("abnormal_note")
    def keep_mask(self, painted: dict[str, Any] | None, token: str) -> Updates:
        """Take what was painted as the mask."""
        return {"abnormal_note": "", **abnormals.keep_mask(self._idle(token), painted)}

    @guarded("abnormal_note")
    def clear_abnormals(self, token: str) -> Updates:
        """Take all abnormal scans away."""
        visitor = self._idle(token)
        visitor.drop_abnormals()
        return {"abnormal_note": html.note(""), **abnormals.show(visitor)}

    @guarded("estimate")
    def choose_preset(self, preset: str, token: str) -> Updates:
        """Estimate how long it will take."""
        visitor = self._visitors.get(token)
        visitor.preset = preset
        return {"estimate": pacing.estimate(visitor)}

    @guarded("status")
    def go_on(self, token: str) -> Iterator[Updates]:
        """Resume a training that was stopped, or train on for as long again."""
        visitor = self._visitors.get(token)
        pacing.require_same(visitor)
        yield from self._page.follow(visitor, visitor.session.go_on(preview_queries=visitor.queries))

    @guarded("replay")
    def replay(self, event: gr.EventData, token: str) -> Updates:
        """Make a synthetic anomaly again from its record, and show both."""
        return {"replay": gallery.replayed(self._visitors.get(token), int(event._data["index"]))}
