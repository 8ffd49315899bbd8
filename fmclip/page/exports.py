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
    from fmclip.report import RunRecord
    from fmclip.session import Finding

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
        FmclipError: Nothing was found yet, or adapting replaced the adapter just now.
    """
    from fmclip.report import write_bundle, write_report

    findings, record = _taken(visitor)
    yield {"export_note": html.note("Writing the files …"), name: gr.update(interactive=False)}
    file = new_file(FILES[name][0], name)
    with visitor.writing(file):
        (write_report if name == "report" else write_bundle)(file, findings, record)
    delete(visitor.exports.get(name))
    visitor.exports[name] = str(file)
    yield {
        f"{name}_file": gr.update(value=str(file)),
        "export_note": html.note(_words(name, record), "good"),
        name: gr.update(interactive=True),
    }


def _taken(visitor: Visitor) -> tuple[list[Finding], RunRecord]:
    """What the adapter in use says and how it came about; a fit that goes on may replace the adapter at any moment."""
    from fmclip.report import RunRecord, ScanRecord

    session, key = visitor.session, visitor.session.adapter_key
    threshold, calibration = answers.threshold_of(visitor), visitor.session.calibration
    findings = [finding.at(threshold) for finding in visitor.findings if finding.adapter == key]
    if not findings or calibration is None:
        raise FmclipError("There is nothing to take away yet: adapt, then add query scans.")
    queries = [ScanRecord.of(finding.scan, finding.score) for finding in findings]
    detector = session.detector
    record = RunRecord.of(
        detector,
        calibration,
        queries,
        references=session.references,
        window=session.window,
        not_repeatable=_not_repeatable(visitor),
    )
    if session.adapter_key != key:
        raise FmclipError("Adapting changed the answers just now: try again.")
    return findings, record


def _not_repeatable(visitor: Visitor) -> str:
    """What the session knows that keeps a run from being done again; "" for nothing."""
    from fmclip.report import record

    if visitor.session.is_adapting:
        return record.UNDER_WAY
    unfinished = visitor.session.unfinished
    return record.STOPPED if unfinished is not None and not unfinished.is_over else ""


def _words(name: str, record: RunRecord) -> str:
    if name == "report":
        return (
            "The report is ready: a page for each scan, worst first. It holds no file name and no tag of a file; text "
            "that is burned into the pixels is still there."
        )
    again = f" The run cannot be done again from run.json: {record.not_repeatable}." if record.not_repeatable else ""
    return (
        "The zip is ready: report, scores.csv, maps, run.json, and DICOM objects for scans from DICOM. These name "
        "study and image by their UIDs; nothing else says who the patient is, but for text burned into the pixels."
        + again
    )
