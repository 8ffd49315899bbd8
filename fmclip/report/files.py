"""Scores as CSV, maps as NIfTI. Scans are called by their label."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np

from fmclip.scans import Scan
from fmclip.session import Finding

COLUMNS = ("scan", "score", "threshold", "verdict", "rank")


def table(findings: Sequence[Finding]) -> str:
    """Write findings as CSV, worst first: label, score, threshold, verdict, rank."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for finding in worst_first(findings):
        figures = f"{finding.score:.6f}", f"{finding.threshold:.6f}"
        writer.writerow([finding.label, *figures, finding.verdict, finding.rank])
    return text.getvalue()


def worst_first(findings: Sequence[Finding]) -> list[Finding]:
    """Order by score, highest first."""
    return sorted(findings, key=lambda finding: -finding.score)


def save_nifti(path: Path, scan: Scan, anomaly_map: np.ndarray) -> None:
    """Write a map as a NIfTI volume of one slice that lies where the scan lies.

    Args:
        path: File to write, .nii or .nii.gz.
        scan: The scan; one without a known place (a PNG) gets voxels of 1 mm, and a header that says that the place is
            unknown.
        anomaly_map: [H, W] in [0, 1] on the pixels of the scan.

    Raises:
        OSError: The file cannot be written.
    """
    affine = scan.source.affine_for((scan.height, scan.width)) if scan.source else None
    is_known = affine is not None
    if affine is None:
        affine = np.diag([-1.0, -1.0, 1.0, 1.0])  # columns to the patient's left, rows to the back: as it is shown
    image = nibabel.Nifti1Image(np.asarray(anomaly_map, np.float32).T[..., None], affine)  # [W, H, 1]
    image.header.set_xyzt_units("mm" if is_known else "unknown")
    image.set_sform(affine, code="scanner" if is_known else "unknown")
    image.set_qform(affine, code="scanner" if is_known else "unknown")
    nibabel.save(image, path)
