"""Abnormal scans and their masks as files, for the shell and for scripts: which fit, which do not, and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmclip.errors import FmclipError, ScanError
from fmclip.mask_files import MaskFolder, is_mask, marked, stem
from fmclip.scans import Scan, find_scan_files, read_scan

MAX_ABNORMALS = 64
NOUN = "abnormal scan"


def require_fitting(method: str, are_given: bool, how: str) -> None:
    """Refuse abnormal scans for a method that never learns from them, and their lack for one that has to.

    Args:
        method: Name of a detector.
        are_given: Whether there are abnormal scans.
        how: How to give some, as a half-sentence ("give some with --abnormal").

    Raises:
        FmclipError: They do not fit the method.
    """
    from fmclip.detectors import DETECTORS

    uses = DETECTORS[method].uses_abnormals
    if are_given and uses == "never":
        learners = [name for name, detector in DETECTORS.items() if detector.uses_abnormals != "never"]
        raise FmclipError(
            f"The method {method} never learns from abnormal scans: leave them out, or choose {' or '.join(learners)}."
        )
    if not are_given and uses == "required":
        raise FmclipError(f"The method {method} learns from abnormal scans too: {how}, or choose another method.")


def read_abnormals(
    normals: Sequence[Scan],
    paths: Sequence[Path],
    masks: Path | None = None,
    *,
    slice_index: int | None = None,
    window: tuple[float, float] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Read abnormal scans, and the masks that are drawn on some of them.

    Args:
        normals: The normal scans that they will go with.
        paths: Scans, or folders of scans; pictures among them whose names say that they are masks are no scans.
        masks: Folder of masks, see `MaskFolder`; several masks of one scan are united. None for no masks.
        slice_index: Slice of volumes, of scans and masks alike; None for the middle one.
        window: Window of the scans.

    Returns:
        What `Detector.fit` takes: abnormals, and for each of them bool [H, W] or None as abnormal_masks; nothing where
        nothing was given. Notes about what was left out.

    Raises:
        FmclipError: No scan can be read, there are too many, one is a normal scan too, or the masks do not fit them.
    """
    if not paths and masks is None:
        return {}, []
    if not paths:
        raise FmclipError("Masks are those of abnormal scans: give the abnormal scans too.")
    if masks is not None and not masks.is_dir():
        raise FmclipError("The folder of masks was not found.")
    folder, every = MaskFolder(masks), find_scan_files(paths)
    files = [file for file in every if not is_mask(file)]
    if len(files) > MAX_ABNORMALS:
        raise FmclipError(f"{len(files)} abnormal scans were given: give at most {MAX_ABNORMALS}.")
    places = {file: folder.of(file) for file in files}
    fitting = [place for own in places.values() for place in own]
    if masks is not None and not fitting:
        raise FmclipError(
            "No mask of the folder fits an abnormal scan: the mask of scan.png is called scan.png or scan_mask.png."
        )
    if len(set(fitting)) < len(fitting):
        raise FmclipError("Two abnormal scans have the same name, so that a mask fits both: rename one, and its mask.")
    if any(len({stem(place) for place in own}) < len(own) for own in places.values()):
        raise FmclipError("Two masks have the same name, and one scan: rename those that are not its own.")
    scans: list[Scan] = []
    found: list[np.ndarray | None] = []
    notes: list[str] = []
    named = [file for file in every if is_mask(file)]
    if elsewhere := sum(masks is None or not file.resolve().is_relative_to(masks.resolve()) for file in named):
        notes.append(
            f"{elsewhere} pictures that are called masks were left out: give their folder as that of the masks, to "
            "learn from them."
        )
    for number, (file, own) in enumerate(places.items(), start=1):
        try:
            scan = read_scan(file, label=f"{NOUN} {number}", slice_index=slice_index, window=window)
        except ScanError as error:
            notes.append(str(error))
            continue
        scans.append(scan)
        drawn = [read_scan(place, label=f"the mask of {scan.label}", slice_index=slice_index) for place in own]
        found.append(np.any([to_mask(mask, scan) for mask in drawn], axis=0) if drawn else None)
    if not scans:
        raise FmclipError("None of the abnormal scans could be read: " + (" ".join(notes) or "the folder is empty."))
    if idle := folder.count_strays(files):
        notes.append(f"{idle} of the masks fit no abnormal scan and were left out.")
    require_distinct(normals, scans)
    return {"abnormals": scans, "abnormal_masks": found}, notes


def require_distinct(normals: Sequence[Scan], abnormals: Sequence[Scan]) -> None:
    """Refuse a scan that is given as normal and as abnormal.

    Raises:
        FmclipError: There is one.
    """
    labels = {scan.digest: scan.label for scan in normals}
    for scan in abnormals:
        if scan.digest in labels:
            raise FmclipError(
                f"{labels[scan.digest]} and {scan.label} are the same picture: a scan is normal or abnormal, not both. "
                "Take it out of one of the two."
            )


def to_mask(mask: Scan, scan: Scan) -> np.ndarray:
    """Find what a mask marks on a scan, see `marked`.

    Args:
        mask: The picture.
        scan: What it is the mask of.

    Returns:
        bool [H, W] on the pixels of the scan.

    Raises:
        FmclipError: It has another size, or is black.
    """
    if mask.pixels.shape[:2] != scan.pixels.shape[:2]:
        raise FmclipError(
            f"The mask of {scan.label} has {mask.width} x {mask.height} pixels, and the scan {scan.width} x "
            f"{scan.height}: draw it on the pixels of the scan."
        )
    found = marked(mask.pixels)
    if not found.any():
        raise FmclipError(f"The mask of {scan.label} is black: paint white what is abnormal, or leave the mask out.")
    return found
