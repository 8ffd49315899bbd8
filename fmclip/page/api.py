"""The page as a service: adapt and predict as named endpoints, for scripts (gradio_client) and for agents (MCP).

Nothing is kept between calls: `adapt` gives the adapter as a file, and `predict` takes it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import cv2
import gradio as gr
import numpy as np

from fmclip.abnormal_scans import MAX_ABNORMALS, NOUN, require_distinct, require_fitting, to_mask
from fmclip.calibration import MAX_REFERENCES
from fmclip.errors import FmclipError
from fmclip.page.handlers import MAX_QUERIES, PAPER, TowerInUse
from fmclip.page.linked_files import find_files, offer_file
from fmclip.page.uploads import Reading, delete, deleted_if_refused, new_file, take_scans
from fmclip.page.visitors import DEFAULT_METHOD, DEFAULT_PRESET, MAX_VISITORS
from fmclip.scans import AS_STORED, Scan
from fmclip.session import Adapted, Finding, Session
from fmclip.settings import in_words, presets_of, read_variants

MCP_SWITCH = "FMCLIP_MCP"
log = logging.getLogger("fmclip.page")
_Result = TypeVar("_Result")


class Service:
    """Both endpoints.

    Args:
        new_session: Makes a session for a call.
        tower: Says whether there is a GPU.
    """

    def __init__(self, new_session: Callable[[], Session], tower: TowerInUse) -> None:
        self._new_session = new_session
        self._tower = tower

    def adapt(
        self,
        normals: list[str],
        scan_type: str = "medical scan",
        method: str = DEFAULT_METHOD,
        preset: str = DEFAULT_PRESET,
        slices: str = "middle",
        window: str = AS_STORED,
        seed: float = 0,
        abnormals: list[str] | None = None,
        masks: list[str] | None = None,
        variants: list[str] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Learn from normal scans and return an adapter file. Research use only; not a medical device.

        Args:
            normals: 2 to 64 normal scans of one type and view: PNG, JPEG, TIFF, DICOM, NIfTI, or a zip of them; each
                a link to a file that was uploaded to this page, or a base64 data: URL.
            scan_type: What they show, such as "brain MRI".
            method: Name of a method, such as fusionmedclip or patch_memory.
            preset: fast, full, or paper (which needs a GPU); row1 to row5 too for the method fusionmedclip_published.
            slices: Slices of volumes, such as "middle", "40" or "40-80:5".
            window: Intensity window of CT: as stored, soft tissue, lung, brain or bone.
            seed: Start of all random draws; the same scans and seed give the same adapter.
            abnormals: Up to 64 abnormal scans, given as the normal ones, for the methods guided_memory, two_layer,
                conrad and madclip; guided_memory and madclip need some.
            masks: For each abnormal scan, in their order, a picture of the same size that is white where the scan is
                abnormal, or an empty text where nobody drew one; nothing for no masks at all.
            variants: Variants of the method, such as "heads=common" of madclip, see `python -m fmclip methods`.

        Returns:
            The adapter as a .safetensors file; threshold, reference scores and warnings about the scans.
        """
        given = normals, abnormals, masks
        return _told(lambda: self._adapt(_find_all(given), scan_type, method, preset, slices, window, seed, variants))

    def predict(self, adapter: str, scans: list[str], slices: str = "middle") -> tuple[list[dict[str, Any]], list[Any]]:
        """Show where scans deviate from the normal scans of an adapter. Research use only; not a medical device.

        Args:
            adapter: The .safetensors file from adapt; a link to it can be used again.
            scans: Up to 64 scans of the same type, given as for adapt; they are read through the window of the adapter.
            slices: Slices of volumes, such as "middle", "40" or "40-80:5".

        Returns:
            For each scan its label, score, threshold, verdict and rank among the references; overlays as PNG files.
        """
        return _told(lambda: self._predict(adapter, scans, slices))

    def _adapt(
        self,
        files: tuple[list[str], list[str], list[str]],
        scan_type: str,
        method: str,
        preset: str,
        slices: str,
        window: str,
        seed: float,
        variants: list[str] | None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        from fmclip.detectors import DETECTORS

        with deleted_if_refused([file for some in files for file in some]):
            if method not in DETECTORS:
                raise FmclipError(f"There is no such method: choose one of {', '.join(DETECTORS)}.")
            presets = presets_of(method, has_gpu=self._tower.has_gpu)
            if preset not in presets:
                raise FmclipError(
                    f"The preset must be {' or '.join(presets)}"
                    f"{'' if self._tower.has_gpu else f'; {PAPER} where there is a GPU'}."
                )
            require_fitting(method, bool(files[1] or files[2]), "give some as abnormals")
            reading = Reading.parse(slices, window)
            start, settings = _whole(seed), read_variants(method, variants or [])
            scans, windows = _read(files[0], MAX_REFERENCES, reading)
            abnormals, drawn = _read_abnormals(files[1], files[2], reading)
            require_distinct(scans, abnormals)
        session = self._new_session()
        try:
            outcome: Adapted | None = None
            learned = next(iter(windows.values()), None)
            for event in session.adapt(
                scans,
                scan_type=scan_type.strip()[:80],
                preset=preset,
                method=method,
                seed=start,
                settings=settings,
                window=learned,
                abnormals=abnormals,
                abnormal_masks=drawn,
            ):
                outcome = event if isinstance(event, Adapted) else outcome
            file = new_file(".safetensors")
            session.save(file)
            assert outcome is not None, "a fit ends with its outcome, or raises"
            assert outcome.calibration is not None, "and a fit that was not stopped has learned something"
            return offer_file(file), {
                "method": method,
                "preset": in_words(preset, settings),
                "references": len(outcome.calibration.reference_scores),
                "abnormals": len(abnormals),
                "threshold": outcome.calibration.threshold,
                "reference_scores": list(outcome.calibration.reference_scores),
                "seconds": round(outcome.seconds, 1),
                "warnings": [warning.message for warning in outcome.warnings],
            }
        finally:
            session.close()

    def _predict(
        self, adapter: Any, given: Sequence[Any], slices: str
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        scans = find_files(given)
        with deleted_if_refused(scans):
            session = self._new_session()
        try:
            with deleted_if_refused(scans):
                (file,) = find_files([adapter], keep=True)
                try:
                    session.load(file)
                finally:
                    delete(file)
                reading = Reading.parse(slices, session.window or AS_STORED)
            found = session.query(_read(scans, MAX_QUERIES, reading)[0])
            return [_row(one) for one in found], [offer_file(_overlay(one)) for one in found]
        finally:
            session.close()


def add_endpoints(service: Service) -> None:
    """Put both endpoints into the page that is being built."""
    gr.api(service.adapt, api_name="adapt", concurrency_id="tower", concurrency_limit=MAX_VISITORS)
    gr.api(service.predict, api_name="predict", concurrency_limit=4)


def wants_mcp() -> bool:
    """Whether the endpoints are to be offered to agents too, as tools of an MCP server.

    Raises:
        FmclipError: They are, and the package for it is not installed.
    """
    if os.environ.get(MCP_SWITCH, "").lower() not in ("1", "true", "yes"):
        return False
    if importlib.util.find_spec("mcp") is None:
        raise FmclipError(f"{MCP_SWITCH} is set, but gradio's MCP server is not installed: pip install 'gradio[mcp]'.")
    return True


def _told(task: Callable[[], _Result]) -> _Result:
    """Run a call; foreign errors, whose text may hold a file name, are logged by kind only."""
    try:
        return task()
    except FmclipError as error:
        raise gr.Error(str(error), print_exception=False) from None
    except Exception as error:
        log.error("unexpected %s in the service", type(error).__name__)
        raise gr.Error("Something unexpected went wrong. Try again.", print_exception=False) from None


def _whole(seed: float) -> int:
    """The start of the random draws.

    Raises:
        FmclipError: It is no whole number, or not within 0 to 2**63 - 1.
    """
    try:
        number = int(seed)
    except (TypeError, ValueError, OverflowError) as error:
        raise FmclipError("The seed must be a whole number from 0 on.") from error
    if number != seed or not 0 <= number < 2**63:
        raise FmclipError("The seed must be a whole number from 0 on.")
    return number


def _read(paths: Sequence[str], limit: int, reading: Reading, noun: str = "scan") -> tuple[list[Scan], dict[Scan, str]]:
    """Read all scans; a script would overlook that some were left out, so one that is refused refuses the call."""
    upload = take_scans(paths or [], 1, limit, reading, noun)
    if upload.errors:
        raise upload.errors[0]
    if not upload.scans:
        raise FmclipError("No scan was given.")
    return upload.scans, upload.windows


def _find_all(given: tuple[list[str] | None, ...]) -> tuple[list[str], list[str], list[str]]:
    """Find normal scans, abnormal scans and masks; one that is refused deletes them all."""
    found: list[str] = []
    lists: list[list[str]] = []
    refused: FmclipError | None = None
    with deleted_if_refused(found):
        masks = [one for one in given[2] or () if one]  # "" stands for none
        for some in (*given[:2], masks):
            try:
                own = find_files(some)
            except FmclipError as error:
                refused, own = refused or error, []
            found += own
            lists.append(own)
        if refused is not None:
            raise refused
    paths = iter(lists[2])
    return lists[0], lists[1], [next(paths) if one else "" for one in given[2] or ()]


def _read_abnormals(
    paths: Sequence[str], masks: Sequence[str], reading: Reading
) -> tuple[list[Scan], list[np.ndarray | None]]:
    """Read abnormal scans and their masks.

    Raises:
        FmclipError: One cannot be read, or the masks do not fit the scans.
    """
    if not paths and not masks:
        return [], []
    if not paths:
        raise FmclipError("Masks are those of abnormal scans: give the abnormal scans too.")
    scans = _read(paths, MAX_ABNORMALS, reading, NOUN)[0]
    if not masks:
        return scans, []
    if len(masks) != len(scans):
        raise FmclipError(
            f"{len(scans)} abnormal scans came with {len(masks)} masks: give one for each, in their order, or an empty "
            "text where there is none."
        )
    drawn: list[np.ndarray | None] = []
    plain = Reading(reading.slices)  # a window is for scans
    for path, scan in zip(masks, scans, strict=True):
        pictures = _read([path], 1, plain, f"the mask of {scan.label}: picture")[0] if path else []
        drawn.append(to_mask(pictures[0], scan) if pictures else None)
    return scans, drawn


def _row(finding: Finding) -> dict[str, Any]:
    return {
        "label": finding.label,
        "score": finding.score,
        "threshold": finding.threshold,
        "verdict": finding.verdict,
        "rank": finding.rank,
    }


def _overlay(finding: Finding) -> str:
    from fmclip.figures import overlay

    file = new_file(".png", finding.label)
    picture = overlay(finding.scan, finding.map, finding.threshold)
    cv2.imwrite(str(file), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    return str(file)
