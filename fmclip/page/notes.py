"""What the page says after an upload and after adapting."""

from __future__ import annotations

from collections.abc import Sequence

import gradio as gr

from fmclip.page import html
from fmclip.page.uploads import Upload
from fmclip.page.visitors import Visitor
from fmclip.session import Adapted
from fmclip.settings import listed


def outcome(visitor: Visitor, event: Adapted) -> str:
    """Say how adapting ended, and what is odd about the references."""
    count = len(event.calibration.reference_scores) if event.calibration else len(visitor.references)
    if event.stopped:
        kept = f"the state after {event.stage} is kept" if event.stage else "nothing new was ready yet"
        former = "" if event.stage or event.calibration is None else "; the adapter from before still answers"
        message, kind = f"Stopped after {event.seconds:.0f} s: {kept}{former}.", "info"
    else:
        varied = f" with {listed(event.settings)}" if event.settings else ""
        message, kind = f"Adapted to {count} reference scans{varied} in {event.seconds:.0f} s.", "good"
        if event.calibration is not None:
            message += f" Scores above {event.calibration.threshold:.2f} deviate."
    return html.note(message, kind, [*event.notices, *(warning.message for warning in event.warnings)])


def reading_note(upload: Upload, warnings: Sequence[str | html.Item]) -> str:
    """Say what became of an upload: refused files, warnings about the set, notes of single scans."""
    errors = [str(error) for error in upload.errors]
    labels: dict[str, list[str]] = {}
    for scan in upload.scans:
        for text in scan.notes:
            labels.setdefault(text, []).append(scan.label)
    more = [*errors, *warnings, *(f"{html.enumerate_labels(who)}: {text}" for text, who in labels.items())]
    if errors:
        gr.Warning(" ".join(errors[:3]))
    if not more:
        return ""
    count = len(upload.scans)
    read = f"{count} scan{'' if count == 1 else 's'} read" + (f", {len(errors)} refused" if errors else "") + "."
    return html.note(read, "error" if errors else "warning", more)
