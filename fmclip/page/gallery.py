"""Step 2: the synthetic anomalies that are learned from, each made again from its record, and the records as a file."""

from __future__ import annotations

import json
from typing import Any

import gradio as gr
import numpy as np

from fmclip import __version__
from fmclip.errors import FmclipError
from fmclip.page import html, pictures
from fmclip.page.uploads import delete, new_file
from fmclip.page.visitors import Visitor

_OUTLINE_SIDE = 384


def replayed(visitor: Visitor, place: int) -> str:
    """Make a synthetic anomaly again from its record and the references: HTML with the picture and the record.

    Raises:
        FmclipError: It is not there, or the references are no longer those that it was made on.
    """
    from fmclip.calibration import distinct
    from fmclip.scans import letterbox
    from fmclip.synthesis import replay

    if not 0 <= place < len(visitor.examples):
        raise FmclipError("This synthetic anomaly is no longer there: adapt again.")
    example = visitor.examples[place]
    squares = [letterbox(scan, example.image.shape[0]) for scan in distinct(visitor.references)]
    try:
        scan = replay(
            json.loads(json.dumps(example.record)),
            [square for square, _ in squares],
            [box.content_mask() for _, box in squares],
        )
    except (IndexError, ValueError) as error:
        raise FmclipError("The reference scans have changed since: adapt again to see what is made of them.") from error
    same = np.array_equal(scan.image, example.image) and np.array_equal(scan.mask, example.mask)
    verdict = (
        "Made again from this record: the same picture, bit for bit."
        if same
        else "The reference scans have changed since: made again, this is another picture."
    )
    outlined = pictures.outlined(scan.image, scan.mask, _OUTLINE_SIDE)
    return html.replay(example.description, example.strength, outlined, verdict, example.record, same)


def offer_records(visitor: Visitor) -> dict[str, Any]:
    """Write the records to a file: with the same references, `fmclip.synthesis.replay` makes the pictures again."""
    if not visitor.examples:
        return {"records": gr.update(visible=False)}
    records = {
        "fmclip": __version__,
        "replay": "fmclip.synthesis.replay(record, images, contents), on the letterboxed references in their order",
        "side": visitor.examples[0].image.shape[0],
        "anomalies": [
            {"description": one.description, "strength": one.strength, "record": one.record} for one in visitor.examples
        ],
    }
    file = new_file(".json", "synthetic")
    with visitor.writing(file):
        file.write_text(json.dumps(records, indent=1), "utf-8")
        delete(visitor.records)
        visitor.records = str(file)
    return {"records": gr.update(value=visitor.records, visible=True)}
