"""Handlers for what is kept: the visitor's state over a reload, the adapter's name, and adapters on the Hub."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import gradio as gr

from fmclip.errors import FmclipError
from fmclip.page import abnormals, answers, gallery, html, methods, pacing, references
from fmclip.page.answers import Updates
from fmclip.page.cases import SCAN_TYPES
from fmclip.page.handlers import HandlerGroup, guarded
from fmclip.page.similar_panel import HINT
from fmclip.page.uploads import delete, new_file
from fmclip.page.visitors import Visitor

STOP_SECONDS = 5.0
"""How long a training that ran while the page was reloaded may take to end."""

READ_KEY = "() => sessionStorage.getItem('fmclip') || ''"
WRITE_KEY = "(key) => { sessionStorage.setItem('fmclip', key); return []; }"
"""The key lives in the tab's own store: no other address sees it, and it goes when the tab is closed. A tab that is
duplicated takes a copy of it along."""
TEXTS = (
    *("reference_note", "set_note", "query_note", "abnormal_note", "loss", "synthetic", "self_check", "replay"),
    *("overview", "cards", "verdict", "spot", "why", "why_note", "maps", "marks", "normal_note", "export_note"),
    *("adapter_name", "hub_note", "hub_token", "phrases"),
)
"""Parts of the page that tell or show something of a visitor, and are empty for a new one."""

DELETED = (
    "All scans, maps and the adapter of this session are deleted. Pictures that the viewer has shown, or that were "
    "painted on, leave the page's cache within 70 minutes."
)


class Keeping(HandlerGroup):
    """What outlives a reload, and what leaves the page."""

    @guarded("status")
    def welcome(self, key: str | None, token: str) -> Iterator[Updates]:
        """Show a visitor who has reloaded the page what they had; give a new one a key."""
        visitor, was_here = self._visitors.welcome(token, key or "")
        yield {"key": visitor.key}
        if not was_here:
            return
        if visitor.session.is_adapting:
            visitor.session.stop()
            pause = threading.Event()
            for _ in range(round(STOP_SECONDS / 0.1)):
                if not visitor.session.is_adapting:
                    break
                pause.wait(0.1)
        yield self._shown_again(visitor)
        yield from answers.fill(visitor)

    @guarded("status")
    def forget(self, token: str) -> Updates:
        """Delete all that the visitor has here; the page is as it was at first."""
        self._idle(token)
        self._visitors.forget(token)
        visitor, _ = self._visitors.welcome(token, "")
        return {
            **dict.fromkeys(TEXTS, ""),
            **abnormals.show(visitor),
            **{name: gr.update(value=None) for name in ("slider", "report_file", "everything_file")},
            **{name: gr.update(value=None, visible=False) for name in ("editor", "normal_editor")},
            "normal_painted": gr.update(visible=False),
            "similar": html.empty(HINT),
            "key": visitor.key,
            **self._page.offer_presets(visitor),
            "scan_type": SCAN_TYPES[0],
            "opacity": visitor.opacity,
            "colours": visitor.colours,
            **methods.offer(visitor),
            "download": gr.update(value=None, interactive=False),
            "records": gr.update(value=None, visible=False),
            **references.show(visitor),
            **pacing.show(visitor),
            **answers.hold(visitor),
            "status": html.note(DELETED, "good"),
        }

    @guarded("status")
    def name_adapter(self, name: str | None, token: str) -> Updates:
        """Take what the person calls the adapter; the file to be downloaded is named by it."""
        from fmclip.checkpoint import plain_name

        visitor = self._visitors.get(token)
        plain = plain_name(name or "")
        if plain == visitor.adapter_name:
            return {"adapter_name": plain}
        visitor.adapter_name = plain
        offer = self._page.offer_download(visitor) if visitor.session.is_adapted else {}
        return {"adapter_name": visitor.adapter_name, **offer}

    @guarded("hub_note")
    def push(self, repository: str, token_of_hub: str, private: bool, token: str) -> Updates:
        """Push the adapter to the Hub; the token is asked for each time."""
        from fmclip.hub import push_adapter  # with torch, which nobody should wait for before the page is there

        visitor = self._visitors.get(token)
        file = new_file(".safetensors")
        try:
            visitor.session.save(file, visitor.adapter_name)
            push_adapter(file, repository or "", token_of_hub or "", private=private)
        finally:
            delete(file)
        return {"hub_token": "", "hub_note": html.note(f"Pushed to {repository.strip()}.", "good")}

    @guarded("hub_note")
    def pull(self, repository: str, token_of_hub: str, token: str) -> Iterator[Updates]:
        """Pull an adapter from the Hub and load it like a file."""
        from fmclip.hub import pull_adapter

        if self._visitors.is_adapting(token):
            raise FmclipError("This session is adapting: wait, or press Stop before you pull an adapter.")
        file = new_file(".safetensors")
        try:
            pull_adapter(file, repository or "", token_of_hub or "")
            yield {"hub_token": "", "hub_note": html.note(f"Pulled {repository.strip()}.", "good")}
            yield from self._page.load_adapter(str(file), token)
        finally:
            delete(file)

    def _shown_again(self, visitor: Visitor) -> Updates:
        session = visitor.session
        there: Updates = {}
        if session.calibration is not None:
            count = len(session.calibration.reference_scores)
            resumable = " The training was stopped." if pacing.can_resume(visitor) else ""
            there["status"] = html.note(f"Here again after a reload: an adapter of {count} reference scans.{resumable}")
        elif visitor.references or visitor.queries:
            there["status"] = html.note("Here again after a reload.")
        if visitor.download is not None and session.is_adapted:
            there |= self._page.offer_download(visitor)
        if visitor.checks:
            there["self_check"] = html.self_check(visitor.checks)
        if visitor.examples:
            there |= gallery.offer_records(visitor)
            threshold = answers.threshold_of(visitor)
            there["synthetic"] = html.synthetic(visitor.examples, threshold, visitor.opacity)
        if visitor.scan_type:
            there["scan_type"] = visitor.scan_type
        return {
            **there,
            **self._page.offer_presets(visitor),
            "adapter_name": visitor.adapter_name,
            **references.show(visitor),
            **abnormals.show(visitor),
            **pacing.show(visitor),
        }
