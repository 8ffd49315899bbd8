"""Layout and wiring of step 3: queries, what the adapter says about them, and the closer look."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr

from fmclip.colours import COLOUR_MAPS, COLOURS
from fmclip.page import exports, html, style
from fmclip.page.answers import NO_QUERIES
from fmclip.page.handlers import Handlers
from fmclip.page.reviewing import Reviewing
from fmclip.page.visitors import MAX_VISITORS
from fmclip.page.wiring import connect

CAUTION = (
    "Only if you know that it is normal. Whatever looks like it will not be shown any more, in any scan: an anomaly "
    "called normal here is an anomaly missed later."
)


def query_panel(parts: dict[str, Any]) -> None:
    """Lay out step 3; `parts` gets the components by name."""
    gr.HTML(html.step_title(3, "Query", "Scans to be compared with the references: overlay, score and rank."))
    parts["query_files"] = gr.File(
        label="Upload scans to be compared",
        file_count="multiple",
        height=120,
        elem_id="query-files",
        elem_classes="fm-file",
    )
    parts["query_note"] = gr.HTML(elem_id="query-note")
    parts["waiting"] = gr.HTML(html.empty(NO_QUERIES), elem_id="waiting")
    with gr.Column(visible=False) as parts["answers"]:
        parts["overview"] = gr.HTML(elem_id="overview", js_on_load=style.CARDS_JS)
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=240):
                parts["cards"] = gr.HTML(elem_id="cards", js_on_load=style.CARDS_JS)
            with gr.Column(scale=5, min_width=320):
                _viewer(parts)
            with gr.Column(scale=3, min_width=260):
                parts["verdict"] = gr.HTML(elem_id="verdict")
                exports.lay_out(parts)
        _closer_look(parts)
    parts["clear_queries"] = gr.Button("Remove query scans", size="sm", elem_classes="fm-quiet")


def _viewer(parts: dict[str, Any]) -> None:
    parts["slider"] = gr.ImageSlider(
        label="Original | overlay",
        format="png",
        interactive=False,
        slider_position=30,
        max_height=620,
        buttons=["fullscreen"],
        elem_id="slider",
    )
    parts["legend"] = gr.HTML(elem_id="legend")
    with gr.Row():
        parts["opacity"] = gr.Slider(0, 1, 0.5, step=0.05, label="Opacity", min_width=140, elem_id="opacity")
        parts["threshold"] = gr.Slider(0, 1, 0.5, step=0.01, label="Threshold", min_width=140, elem_id="threshold")
    parts["reset"] = gr.Button("Back to the calibrated threshold", size="sm", elem_id="reset", elem_classes="fm-quiet")
    parts["colours"] = gr.Radio(
        [(name.capitalize(), name) for name in COLOUR_MAPS], value=COLOURS, label="Colours", elem_id="colours"
    )


def _closer_look(parts: dict[str, Any]) -> None:
    with gr.Tabs(elem_id="closer"):
        with gr.Tab("Why here?", elem_id="tab-why"), gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=280):
                parts["spot"] = gr.HTML(elem_id="spot", js_on_load=style.SPOT_JS)
                parts["ask_highest"] = gr.Button("Ask about the highest spot", size="sm", elem_id="ask-highest")
            with gr.Column(scale=6, min_width=280):
                parts["why_note"] = gr.HTML(elem_id="why-note")
                parts["why"] = gr.HTML(elem_id="why")
        with gr.Tab("Maps side by side", elem_id="tab-maps"):
            parts["maps"] = gr.HTML(elem_id="maps")
        with gr.Tab("False alarm?", elem_id="tab-normal"):
            gr.HTML(html.note("This is normal, although it is shown as odd:", "info", [CAUTION]))
            with gr.Row(elem_classes="fm-normal"):
                parts["normal_scan"] = gr.Button("All of this scan is normal", size="sm", elem_id="normal-scan")
                parts["normal_contours"] = gr.Button(
                    "What is inside the contours is normal", size="sm", elem_id="normal-contours"
                )
                parts["normal_open"] = gr.Button("Paint a region …", size="sm", elem_id="normal-open")
            parts["normal_editor"] = gr.ImageEditor(
                visible=False,
                type="numpy",
                image_mode="RGBA",
                sources=(),
                transforms=(),
                brush=gr.Brush(default_size=16, colors=[("#00c8ff", 0.5)], color_mode="fixed"),
                layers=False,
                height=420,
                elem_id="normal-editor",
            )
            parts["normal_painted"] = gr.Button(
                "The painted region is normal", size="sm", visible=False, elem_id="normal-painted"
            )
            parts["normal_note"] = gr.HTML(elem_id="normal-note")
            parts["marks"] = gr.HTML(elem_id="marks")
            parts["take_back"] = gr.Button(
                "Take back all marked regions", size="sm", visible=False, elem_id="take-back", elem_classes="fm-quiet"
            )


def connect_queries(parts: dict[str, Any], handlers: Handlers, reading: list[Any]) -> None:
    """Wire step 3; `reading` are the inputs for slice and window."""
    on = partial(connect, parts)
    on(parts["query_files"].upload, handlers.add_queries, [parts["query_files"], *reading], concurrency_limit=4)
    on(parts["clear_queries"].click, handlers.clear_queries)
    reviewing = Reviewing(handlers)
    for name, move in (("opacity", reviewing.set_opacity), ("threshold", reviewing.set_threshold)):
        # each slider tells of itself alone: what it knew of the other may be old by the time it is heard
        on(parts[name].input, move, [parts[name]], concurrency_limit=8, trigger_mode="always_last")
    on(parts["reset"].click, reviewing.reset_threshold)
    for name in ("cards", "overview"):
        on(parts[name].click, handlers.select, takes_event=True, trigger_mode="always_last")

    exports.wire(parts, on, handlers)
    on(parts["colours"].input, reviewing.choose_colours, [parts["colours"]])
    on(parts["spot"].click, reviewing.ask, takes_event=True, concurrency_limit=4, trigger_mode="always_last")
    on(parts["ask_highest"].click, reviewing.ask_highest, concurrency_limit=4)
    training = [parts["scan_type"], parts["preset"]]
    together: dict[str, Any] = {"concurrency_id": "tower", "concurrency_limit": MAX_VISITORS}
    on(parts["normal_scan"].click, reviewing.scan_is_normal, training, **together)
    on(parts["normal_contours"].click, reviewing.contours_are_normal, concurrency_limit=4)
    on(parts["normal_open"].click, reviewing.open_editor)
    on(parts["normal_painted"].click, reviewing.painted_is_normal, [parts["normal_editor"]], concurrency_limit=4)
    on(parts["take_back"].click, reviewing.take_back, concurrency_limit=4)
