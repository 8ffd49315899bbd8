"""Similar reports below step 3: layout, handlers and wiring; what they do stands in `similar`."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr

from fmclip.page import html
from fmclip.page.answers import Updates
from fmclip.page.handlers import HandlerGroup, Handlers, guarded
from fmclip.page.uploads import deleted_if_refused
from fmclip.page.wiring import connect

HINT = "Load the index.safetensors of a run (python -m fmclip evaluate-retrieval), or type phrases to be compared."


class Similar(HandlerGroup):
    """Handlers of the panel; torch is imported when one is called, so that the page starts without it."""

    @guarded("similar")
    def load_index(self, path: str, token: str) -> Updates:
        """Take an index of reports to search in."""
        with deleted_if_refused([path]):
            from fmclip.page import similar

            return {"similar": similar.take_index(self._visitors.get(token), path)}

    @guarded("similar")
    def find(self, phrases: str, token: str) -> Updates:
        """Compare the query in view with the index and with phrases."""
        from fmclip.page import similar

        return {"similar": similar.find(self._visitors.get(token), phrases)}


def similar_panel(parts: dict[str, Any]) -> None:
    """Lay out the panel."""
    with gr.Accordion("Similar reports", open=False, elem_classes="fm-panel", elem_id="similar-reports"):
        parts["phrases"] = gr.Textbox(
            label="Phrases to compare",
            info="One a line; the index of reports is a file of your own",
            lines=2,
            placeholder="no acute disease\npleural effusion",
            elem_id="phrases",
        )
        with gr.Row(elem_classes="fm-files"):
            parts["index"] = gr.UploadButton(
                "Load index of reports", size="sm", file_types=[".safetensors"], min_width=170, elem_id="index"
            )
            parts["compare"] = gr.Button("Compare the query in view", size="sm", min_width=170, elem_id="compare")
        parts["similar"] = gr.HTML(html.empty(HINT), elem_id="similar")


def connect_similar(parts: dict[str, Any], handlers: Handlers) -> None:
    """Wire the panel."""
    on, similar = partial(connect, parts), Similar(handlers)
    on(parts["index"].upload, similar.load_index, [parts["index"]], concurrency_limit=4)
    on(parts["compare"].click, similar.find, [parts["phrases"]], concurrency_limit=4)
