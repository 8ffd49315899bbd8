"""Step 3's downloads: the report as PDF, or everything in one zip, made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import gradio as gr

from fmclip.errors import FmclipError
from fmclip.page import answers, html
from fmclip.page.uploads import delete, new_file
from fmclip.page.visitors import Visitor

if TYPE_CHECKING:
    from fmclip.page.handlers import Handlers

FILES = {"report": (".pdf", "Download report"), "everything": (".zip", "Download everything")}
"""Kinds of downloads: suffix of the file, and what the button says."""

_SAVE = """() => setTimeout(() => {{
  if (document.querySelector('#export-note .fm-good')) document.querySelector('#{name}-file').click();
}}, 200)"""  # the file's address reaches the hidden button a moment after the handler has ended


def lay_out(parts: dict[str, Any]) -> None:
    """Place the buttons; each has a hidden one beside it that holds the file once it is made."""
    with gr.Row(elem_classes="fm-files"):
        for name, (_, title) in FILES.items():
            parts[name] = gr.Button(title, size="sm", min_width=110, elem_id=name)
    for name, (_, title) in FILES.items():
        parts[f"{name}_file"] = gr.DownloadButton(title, elem_classes="fm-hidden", elem_id=f"{name}-file")
    parts["export_note"] = gr.HTML(elem_id="export-note")


def wire(parts: Mapping[str, Any], on: Callable[..., Any], handlers: Handlers) -> None:
    """Make the file on a click, then save it as the browser saves files."""
    for name in FILES:
        made = on(parts[name].click, partial(handlers.take_away, name), concurrency_limit=2)
        made.then(None, js=_SAVE.format(name=name), api_visibility="private")


def offer(visitor: Visitor, name: str) -> Iterator[dict[str, Any]]:
    """Make one of `FILES` of what the visitor sees, with the threshold in use.

    Yields:
        Updates of the page.

    Raises:
        FmclipError: Nothing was found yet.
    """
    from fmclip.report import RunRecord, ScanRecord, write_bundle, write_report

    findings = [finding.at(answers.threshold_of(visitor)) for finding in visitor.findings]
    calibration = visitor.session.calibration
    if not findings or calibration is None:
        raise FmclipError("There is nothing to take away yet: adapt, then add query scans.")
    yield {"export_note": html.note("Writing the files …"), name: gr.update(interactive=False)}
    session = visitor.session
    queries = [ScanRecord.of(finding.scan, finding.score) for finding in findings]
    record = RunRecord.of(session.detector, calibration, queries, references=session.references, window=session.window)
    file = new_file(FILES[name][0], f"fmclip-{name}")
    (write_report if name == "report" else write_bundle)(file, findings, record)
    delete(visitor.exports.get(name))
    visitor.exports[name] = str(file)
    yield {
        f"{name}_file": gr.update(value=str(file)),
        "export_note": html.note(_words(name), "good"),
        name: gr.update(interactive=True),
    }


def _words(name: str) -> str:
    if name == "report":
        return (
            "The report is ready: a page for each scan, worst first. It holds no file name and no tag of a file; text "
            "that is burned into the pixels is still there."
        )
    return (
        "The zip is ready: report, scores.csv, maps, run.json, and DICOM objects for scans from DICOM. These name "
        "study and image by their UIDs; nothing else says who the patient is, but for text burned into the pixels."
    )
