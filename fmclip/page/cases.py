"""Example cases that a visitor can load with one click."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fmclip.scans import Scan, read_scans

SCAN_TYPES = (
    "brain MRI",
    "breast ultrasound",
    "chest X-ray",
    "retinal fundus photograph",
    "abdominal CT",
    "head CT",
    "chest CT",
    "knee MRI",
    "mammogram",
    "bone X-ray",
    "medical scan",
)
"""Offered in the menu; anything else may be typed."""


@dataclass(frozen=True)
class Case:
    """One example: where its scans are and what is known about them.

    Attributes:
        name: Short name, also of its folder.
        title: For the button.
        scan_type: For the prompts.
        description: What it shows and what is simulated.
        normals: Files of the reference scans.
        queries: Files of the query scans.
        truths: What is known of each query: "normal", or "simulated lesion: old infarct".
    """

    name: str
    title: str
    scan_type: str
    description: str
    normals: tuple[Path, ...]
    queries: tuple[Path, ...]
    truths: tuple[str, ...]

    @property
    def thumbnail(self) -> Path:
        """A picture for the button."""
        return self.normals[0]

    def load(self) -> tuple[list[Scan], list[Scan]]:
        """Read the scans: references and queries."""
        return read_scans(self.normals)[0], read_scans(self.queries)[0]


def list_cases(folder: Path) -> list[Case]:
    """Read `cases.json` of the examples folder; no folder, no examples."""
    index = folder / "cases.json"
    if not index.is_file():
        return []
    return [
        Case(
            name=case["name"],
            title=case["title"],
            scan_type=case["scan_type"],
            description=case["description"],
            normals=tuple(folder / name for name in case["normals"]),
            queries=tuple(folder / query["file"] for query in case["queries"]),
            truths=tuple(": ".join(filter(None, (query["truth"], query.get("finding")))) for query in case["queries"]),
        )
        for case in json.loads(index.read_text("utf-8"))["cases"]
    ]
