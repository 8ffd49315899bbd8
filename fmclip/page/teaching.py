"""Step 2's handlers beside Adapt and Stop: the choice of a method, and abnormal scans with painted masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from fmclip.page import abnormals, html, methods, references
from fmclip.page.answers import Updates
from fmclip.page.handlers import HandlerGroup, guarded, reading_note
from fmclip.page.uploads import Reading, deleted_if_refused, take_scans


class Teaching(HandlerGroup):
    """What a method learns from, and which one it is."""

    @guarded("method_note")
    def choose_method(self, method: str, token: str) -> Updates:
        """Take another method: its description, whether the tower refuses it, and what it can learn from."""
        return methods.choose(self._visitors.get(token), method)

    @guarded("abnormal_note")
    def add_abnormals(
        self, paths: Sequence[str] | None, slice_text: str | None, window: str | None, token: str
    ) -> Updates:
        """Read uploaded abnormal scans, through the window of the references."""
        with deleted_if_refused(paths):
            visitor = self._idle(token)
            reading = Reading.parse(slice_text, references.window_for_references(visitor, window))
        room = abnormals.MAX_ABNORMALS - len(visitor.abnormals)
        upload = take_scans(paths or [], visitor.next_abnormal, room, reading, abnormals.NOUN)
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
