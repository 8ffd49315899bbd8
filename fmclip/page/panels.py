"""Layout of what step 2 holds beside its buttons; each function lays out one panel and names its parts."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr

from fmclip.page.methods import BEFORE_THE_TOWER
from fmclip.page.teaching import Teaching
from fmclip.page.visitors import DEFAULT_METHOD
from fmclip.page.wiring import connect

ABNORMALS_INFO = "Scans with a finding, for methods that learn from them. Click one to paint where it is."


def method_panel(parts: dict[str, Any], pick_click: str) -> None:
    """Lay out the menu of methods, and abnormal scans for those that can use them.

    Args:
        parts: Gets the components by name.
        pick_click: What the strip of scans does in the browser when one is clicked.
    """
    parts["method"] = gr.Dropdown(
        BEFORE_THE_TOWER,
        value=DEFAULT_METHOD,
        label="Method",
        info="The methods are being loaded …",
        elem_id="method",
    )
    parts["method_note"] = gr.HTML(elem_id="method-note")
    with gr.Accordion("Abnormal scans (optional)", open=False, visible=False) as parts["abnormal_panel"]:
        parts["abnormal_files"] = gr.File(
            label=ABNORMALS_INFO, file_count="multiple", height=110, elem_id="abnormal-files", elem_classes="fm-file"
        )
        parts["abnormals"] = gr.HTML(elem_id="abnormals", js_on_load=pick_click)
        parts["abnormal_note"] = gr.HTML(elem_id="abnormal-note")
        parts["editor"] = gr.ImageEditor(
            visible=False,
            type="numpy",
            image_mode="RGBA",
            sources=(),
            transforms=(),
            brush=gr.Brush(default_size=16, colors=["#ff8c00"], color_mode="fixed"),
            layers=False,
            height=380,
            elem_id="editor",
        )
        with gr.Row(elem_classes="fm-links"):
            parts["keep_mask"] = gr.Button("Keep this mask", size="sm", visible=False, elem_id="keep-mask")
            parts["clear_abnormals"] = gr.Button(
                "Remove abnormal scans", size="sm", visible=False, elem_classes="fm-quiet", elem_id="clear-abnormals"
            )


def connect_methods(parts: dict[str, Any], teaching: Teaching, reading: list[Any]) -> None:
    """Wire `method_panel`; `reading` are the inputs for slice and window."""
    on = partial(connect, parts)
    on(parts["method"].input, teaching.choose_method, [parts["method"]])
    on(parts["abnormal_files"].upload, teaching.add_abnormals, [parts["abnormal_files"], *reading])
    on(parts["abnormals"].click, teaching.select_abnormal, takes_event=True)
    on(parts["keep_mask"].click, teaching.keep_mask, [parts["editor"]])
    on(parts["clear_abnormals"].click, teaching.clear_abnormals)
