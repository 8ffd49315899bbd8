"""Layout of what step 2 holds beside its buttons; each function lays out one panel and names its parts."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr

from fmclip.page.keeping import READ_KEY, WRITE_KEY, Keeping
from fmclip.page.methods import BEFORE_THE_TOWER
from fmclip.page.teaching import Teaching
from fmclip.page.visitors import DEFAULT_METHOD, MAX_VISITORS
from fmclip.page.wiring import connect

EXAMPLE_CLICK = """
element.addEventListener('click', (event) => {
  const example = event.target.closest('.fm-example');
  if (example) trigger('click', {index: Number(example.dataset.index)});
});
"""
VARIANTS_INFO = "Ablations and other ways of the method; none of them takes longer"
ABNORMALS_INFO = "Scans with a finding, for methods that learn from them. Click one to paint where it is."


def method_panel(parts: dict[str, Any], pick_click: str) -> None:
    """Lay out the menu of methods, their variants, and abnormal scans for those that can use them.

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
    with gr.Accordion("Variants of the method", open=False, visible=False) as parts["variant_panel"]:
        parts["variants"] = gr.CheckboxGroup(label="For the next Adapt", info=VARIANTS_INFO, elem_id="variants")
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


def training_panel(parts: dict[str, Any]) -> None:
    """Lay out what is seen of a training below its loss: the self-check and the gallery of synthetic anomalies."""
    parts["self_check"] = gr.HTML(elem_id="self-check")
    parts["synthetic"] = gr.HTML(elem_id="synthetic", js_on_load=EXAMPLE_CLICK)
    parts["replay"] = gr.HTML(elem_id="replay")
    with gr.Row(elem_classes="fm-links"):
        parts["records"] = gr.DownloadButton(
            "Download their records", size="sm", visible=False, elem_classes="fm-quiet", elem_id="records"
        )


def connect_teaching(parts: dict[str, Any], teaching: Teaching, reading: list[Any]) -> None:
    """Wire both panels, and the button that goes on; `reading` are the inputs for slice and window."""
    on = partial(connect, parts)
    on(parts["preset"].input, teaching.choose_preset, [parts["preset"]])
    on(parts["go_on"].click, teaching.go_on, concurrency_id="tower", concurrency_limit=MAX_VISITORS)
    on(parts["synthetic"].click, teaching.replay, takes_event=True)
    on(parts["method"].input, teaching.choose_method, [parts["method"]])
    on(parts["variants"].input, teaching.choose_variants, [parts["variants"]])
    on(parts["abnormal_files"].upload, teaching.add_abnormals, [parts["abnormal_files"], *reading])
    on(parts["abnormals"].click, teaching.select_abnormal, takes_event=True)
    on(parts["keep_mask"].click, teaching.keep_mask, [parts["editor"]])
    on(parts["clear_abnormals"].click, teaching.clear_abnormals)


def keeping_panel(parts: dict[str, Any]) -> None:
    """Lay out the adapter's name, the Hub, and the way to delete everything."""
    parts["key"] = gr.Textbox(visible="hidden", elem_id="key", container=False)
    with gr.Accordion("Name, Hugging Face Hub, delete", open=False, elem_classes="fm-reading", elem_id="keeping"):
        parts["adapter_name"] = gr.Textbox(
            label="Name of the adapter",
            info="Goes into the file and its name: no patient data, please",
            max_length=40,
            elem_id="adapter-name",
        )
        with gr.Row():
            parts["hub_repository"] = gr.Textbox(
                label="Repository on the Hub", placeholder="owner/name", min_width=150, elem_id="hub-repository"
            )
            parts["hub_token"] = gr.Textbox(
                label="Token, used once and not stored", type="password", min_width=150, elem_id="hub-token"
            )
        parts["hub_private"] = gr.Checkbox(True, label="A new repository is private", elem_id="hub-private")
        with gr.Row():
            parts["push"] = gr.Button("Push", size="sm", min_width=90, elem_id="push")
            parts["pull"] = gr.Button("Pull", size="sm", min_width=90, elem_id="pull")
        parts["hub_note"] = gr.HTML(elem_id="hub-note")
        parts["forget"] = gr.Button(
            "Delete all my scans and the adapter from this machine now",
            size="sm",
            elem_classes="fm-quiet",
            elem_id="forget",
        )


def connect_keeping(page: gr.Blocks, parts: dict[str, Any], keeping: Keeping, arrive: Any) -> None:
    """Wire `keeping_panel`; a visitor is welcomed first, then `arrive` tells what the tower is."""
    on, key = partial(connect, parts), [parts["key"]]
    welcomed = on(page.load, keeping.welcome, key, js=READ_KEY)
    welcomed.then(None, key, None, js=WRITE_KEY, api_visibility="private")
    on(welcomed.then, arrive)
    on(parts["adapter_name"].submit, keeping.name_adapter, [parts["adapter_name"]])
    on(parts["adapter_name"].blur, keeping.name_adapter, [parts["adapter_name"]])
    hub = [parts["hub_repository"], parts["hub_token"]]
    on(parts["push"].click, keeping.push, [*hub, parts["hub_private"]])
    on(parts["pull"].click, keeping.pull, hub)
    forgotten = on(parts["forget"].click, keeping.forget)
    forgotten.then(None, key, None, js=WRITE_KEY, api_visibility="private")
