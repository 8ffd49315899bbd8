"""The page: three steps on one screen. Start it with `python app.py`.

Environment: FMCLIP_TOWER (name of the tower, "mini"), FMCLIP_DEVICE ("auto"), FMCLIP_MCP (1: MCP server),
GRADIO_SERVER_PORT, GRADIO_TEMP_DIR.
"""

from __future__ import annotations

import contextlib
import os
from functools import partial
from pathlib import Path
from typing import Any

from fmclip.process import prepare_process

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
prepare_process()
with contextlib.suppress(ImportError):
    import spaces  # noqa: F401  (hosted GPU Spaces want it before torch)

import gradio as gr

from fmclip.page import html, style
from fmclip.page.api import Service, add_endpoints, wants_mcp
from fmclip.page.cases import SCAN_TYPES, list_cases
from fmclip.page.gpu import session_maker
from fmclip.page.handlers import PRESETS, Handlers
from fmclip.page.keeping import Keeping
from fmclip.page.panels import connect_keeping, connect_teaching, keeping_panel, method_panel, training_panel
from fmclip.page.query_panel import connect_queries, query_panel
from fmclip.page.references import WINDOW_INFO
from fmclip.page.sets import DROP_CLICK, SetChecks
from fmclip.page.similar_panel import connect_similar, similar_panel
from fmclip.page.teaching import Teaching
from fmclip.page.tour import TOUR
from fmclip.page.tower import TowerLoader
from fmclip.page.uploads import AS_STORED, WINDOWS
from fmclip.page.visitors import MAX_VISITORS, Visitors
from fmclip.page.wiring import connect, token_of
from fmclip.scans.series import MIDDLE

TOWER = os.environ.get("FMCLIP_TOWER", "mini")
DEVICE = os.environ.get("FMCLIP_DEVICE", "auto")
EXAMPLES = Path(__file__).parent / "examples"
PICK_CLICK = """
const told = {};  // one object: with always_last gradio gives a late click the data of the click before it
element.addEventListener('click', (event) => {
  const pick = event.target.closest('.fm-pick');
  if (!pick) return;
  pick.setAttribute('aria-pressed', pick.getAttribute('aria-pressed') !== 'true');
  const all = [...element.querySelectorAll('.fm-pick[aria-pressed="true"]')];
  told.index = Number(pick.dataset.index);
  told.pressed = all.map((one) => Number(one.dataset.index));
  trigger('click', told);
});
"""


def build_page(loader: TowerLoader) -> gr.Blocks:
    """Lay out the page and wire it."""
    cases = list_cases(EXAMPLES)
    new_session = session_maker(loader.name, loader.device)
    handlers = Handlers(Visitors(new_session), cases, loader)
    parts: dict[str, Any] = {}

    with gr.Blocks(title="fmclip", fill_width=True, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML(html.HEADER)
        gr.HTML(TOUR, elem_id="tour")
        parts["tower"] = gr.HTML(elem_id="tower")
        with gr.Row(equal_height=True):
            with gr.Column(elem_classes="fm-panel", min_width=340):
                gr.HTML(html.step_title(1, "Reference scans", "4 to 32 normal scans of one type and view."))
                with gr.Row(elem_classes="fm-cases"):
                    for case in cases:
                        parts[f"case-{case.name}"] = gr.Button(
                            case.title, icon=case.thumbnail, elem_classes="fm-case", elem_id=f"case-{case.name}"
                        )
                parts["reference_files"] = gr.File(
                    label="Or upload your own normal scans: PNG, JPEG, TIFF, DICOM, NIfTI, or a zip of them",
                    file_count="multiple",
                    height=120,
                    elem_id="reference-files",
                    elem_classes="fm-file",
                )
                parts["reference_folder"] = gr.UploadButton(
                    "Upload a folder",
                    file_count="directory",
                    size="sm",
                    elem_classes="fm-quiet",
                    elem_id="reference-folder",
                )
                with (
                    gr.Accordion("DICOM and NIfTI: slices and window", open=False, elem_classes="fm-reading"),
                    gr.Row(),
                ):
                    slice_text = gr.Textbox(
                        MIDDLE, label="Slices", info="40, 40-60, 40-80:5, or middle", min_width=130, elem_id="slice"
                    )
                    window = parts["window"] = gr.Dropdown(
                        list(WINDOWS),
                        value=AS_STORED,
                        label="Window",
                        info=WINDOW_INFO,
                        min_width=150,
                        elem_id="window",
                    )
                parts["references"] = references = gr.HTML(elem_id="references", js_on_load=PICK_CLICK)
                parts["reference_note"] = gr.HTML(elem_id="reference-note", js_on_load=DROP_CLICK)
                parts["set_note"] = gr.HTML(elem_id="set-note", js_on_load=DROP_CLICK)
                with gr.Row(elem_classes="fm-links"):
                    for name in ("remove_suspects", "remove_marked", "clear_references"):
                        parts[name] = gr.Button(
                            "Remove all",
                            size="sm",
                            visible="hidden",
                            elem_classes="fm-quiet",
                            elem_id=name.replace("_", "-"),
                        )
            with gr.Column(elem_classes="fm-panel", min_width=340):
                gr.HTML(html.step_title(2, "Adapt", "Learns prompts and adapters from anomalies made on your scans."))
                with gr.Row():
                    scan_type = parts["scan_type"] = gr.Dropdown(
                        list(SCAN_TYPES),
                        value=SCAN_TYPES[0],
                        label="What the scans show",
                        info="Choose, or type your own",
                        allow_custom_value=True,
                        min_width=200,
                        elem_id="scan-type",
                    )
                    preset = parts["preset"] = gr.Radio(
                        PRESETS,
                        value="fast",
                        label="Training",
                        info="Times for a CPU with 2 cores",
                        min_width=200,
                        elem_id="preset",
                    )
                method_panel(parts, PICK_CLICK)
                with gr.Row():
                    adapt = parts["adapt"] = gr.Button("Adapt", variant="primary", scale=3, elem_id="adapt")
                    parts["go_on"] = gr.Button("Resume", visible="hidden", scale=2, min_width=130, elem_id="go-on")
                    stop = parts["stop"] = gr.Button("Stop", interactive=False, scale=1, min_width=90, elem_id="stop")
                parts["estimate"] = gr.HTML(elem_id="estimate")
                parts["status"] = gr.HTML(elem_id="status")
                parts["loss"] = gr.HTML(elem_id="loss")
                training_panel(parts)
                with gr.Row(elem_classes="fm-files"):
                    parts["download"] = gr.DownloadButton(
                        "Download adapter", size="sm", interactive=False, min_width=130, elem_id="download"
                    )
                    adapter_file = parts["load"] = gr.UploadButton(
                        "Load adapter", size="sm", file_types=[".safetensors"], min_width=130, elem_id="load"
                    )
                keeping_panel(parts)
        with gr.Column(elem_classes="fm-panel"):
            query_panel(parts)
        similar_panel(parts)

        on = partial(connect, parts)
        reading = [slice_text, window]
        for case in cases:
            on(parts[f"case-{case.name}"].click, partial(handlers.load_case, case.name))
        checks = SetChecks(handlers)
        added = on(parts["reference_files"].upload, handlers.add_references, [parts["reference_files"], *reading])
        on(added.then, checks.look, trigger_mode="always_last")  # the next upload may come while it looks
        folder = on(parts["reference_folder"].upload, handlers.add_references, [parts["reference_folder"], *reading])
        on(folder.then, checks.look, trigger_mode="always_last")
        for note in ("reference_note", "set_note"):
            on(parts[note].click, checks.drop, takes_event=True)
        on(references.click, handlers.mark_references, takes_event=True, trigger_mode="always_last")
        for name in ("remove_suspects", "remove_marked"):
            on(on(parts[name].click, getattr(handlers, name)).then, checks.look, trigger_mode="always_last")
        on(parts["clear_references"].click, handlers.clear_references)
        connect_teaching(parts, Teaching(handlers), reading)
        on(adapt.click, handlers.adapt, [scan_type, preset], concurrency_id="tower", concurrency_limit=MAX_VISITORS)
        on(stop.click, handlers.stop, queue=False)
        on(adapter_file.upload, handlers.load_adapter, [adapter_file], concurrency_limit=4)
        connect_queries(parts, handlers, reading)
        connect_similar(parts, handlers)
        connect_keeping(page, parts, Keeping(handlers), handlers.arrive)

        def leave(request: gr.Request) -> None:
            handlers.leave(token_of(request))

        page.unload(leave)
        add_endpoints(Service(new_session, loader))
    return page


def launch() -> None:
    """Serve the page; the tower is loaded while the first visitor looks at it."""
    loader = TowerLoader(TOWER, DEVICE)
    page = build_page(loader)
    # trainings wait in the line of `fmclip.background.Turns`, which tells the place in it; gradio's own is not shown
    page.queue(max_size=4 * MAX_VISITORS, default_concurrency_limit=4).launch(
        max_threads=3 * MAX_VISITORS,  # a training holds one
        theme=style.theme(),
        css=style.CSS,
        ssr_mode=False,
        max_file_size="512mb",
        footer_links=[],
        run_history=False,  # it would keep pictures of scans in the browser
        mcp_server=wants_mcp(),
        prevent_thread_lock=True,
    )
    loader.start()
    page.block_thread()


if __name__ == "__main__":
    launch()
