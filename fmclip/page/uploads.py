"""Uploaded files: decoded at once and then deleted, because gradio keeps them under their own names and serves them."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from gradio.utils import get_upload_folder

from fmclip.errors import ScanError
from fmclip.scans import Scan, read_scans

MAX_SIDE = 1024
"""Longer sides are shrunk on the page, so that many visitors fit into memory; towers look at a few hundred pixels."""


def take_scans(paths: Sequence[str], first: int, limit: int) -> tuple[list[Scan], list[ScanError]]:
    """Read uploaded scans and delete the files.

    Args:
        paths: The files in gradio's cache.
        first: Number of the first one ("scan {first}").
        limit: Refuse to read more than this many.

    Returns:
        (scans, errors); what cannot be read is reported, the others go on.
    """
    try:
        if len(paths) > limit:
            many = f"{len(paths)} files are too many here: upload at most {limit} at a time. None of them was read."
            return [], [ScanError(many)]
        scans, errors = read_scans(paths, first=first)
        return [shrink(scan) for scan in scans], errors
    finally:
        for path in paths:
            delete(path)


def shrink(scan: Scan) -> Scan:
    """Return the scan with no side longer than `MAX_SIDE`, and a note where that changed it."""
    scale = MAX_SIDE / max(scan.height, scan.width)
    if scale >= 1:
        return scan
    size = (max(1, round(scan.width * scale)), max(1, round(scan.height * scale)))
    pixels = np.clip(cv2.resize(scan.pixels, size, interpolation=cv2.INTER_AREA), 0, 1)
    note = f"shown at {size[0]} x {size[1]} of {scan.width} x {scan.height} pixels"
    return replace(scan, pixels=pixels, notes=(*scan.notes, note))


def delete(path: str | Path | None) -> None:
    """Delete a file of gradio's cache with its folder; files elsewhere are left alone."""
    if path is None:
        return
    file, cache = Path(path).resolve(), Path(get_upload_folder()).resolve()
    if cache in file.parents:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
        if file.parent != cache:
            with contextlib.suppress(OSError):  # not empty: another visitor uploaded the same content
                file.parent.rmdir()


def new_file(suffix: str) -> Path:
    """Name a file for download that nobody can guess, in a folder of gradio's cache."""
    token = secrets.token_hex(16)
    folder = Path(get_upload_folder()) / token
    folder.mkdir(parents=True)
    return folder / f"fmclip-adapter-{token[:8]}{suffix}"
