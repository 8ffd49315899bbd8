"""All that a person takes away, in one zip: report, table, maps, DICOM objects, and run.json."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from fmclip import __version__
from fmclip.figures import overlay, save_map, save_picture
from fmclip.report.dicom import can_export, save_secondary_capture, save_segmentation
from fmclip.report.files import save_nifti, table
from fmclip.report.pdf import DISCLAIMER, write_report
from fmclip.report.record import RunRecord
from fmclip.session import Finding

_README = """fmclip {version}
{disclaimer}

report.pdf             a page for each scan, worst first
scores.csv             score, threshold, verdict and rank of each scan
run.json               settings, versions and digests of the pixels; `python -m fmclip replay run.json` does it again
                       with the same scans, or says why that cannot be: regions marked by hand, abnormal scans, a
                       training that was stopped, or whose stage 3 went on
overlays/              each scan with its map; the white contour is the threshold
maps/                  the maps as 16-bit grey PNG (0 to 65535 for 0 to 1) and as NIfTI, where the scan lies
dicom/                 for scans from DICOM: segmentation of the region above the threshold, and the overlay as a
                       secondary capture; both name the study and the image by their UIDs. Name, ID, birth date, sex
                       and accession number of the patient are empty: a PACS has to fill them in.

Scans are called by their place in the upload; no file here holds a file name or says who the patient is. The UIDs in
dicom/ lead to the patient wherever the images themselves are kept, and text that is burned into the pixels of a scan is
still in its pictures.
"""


def write_bundle(path: Path, findings: Sequence[Finding], record: RunRecord) -> None:
    """Write everything into one zip.

    Args:
        path: File to write.
        findings: What was found, at least one.
        record: How it was found.

    Raises:
        OSError: The file cannot be written.
    """
    with tempfile.TemporaryDirectory() as name, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        folder = Path(name)
        write_all(folder, findings, record)
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            archive.writestr(file.relative_to(folder).as_posix(), file.read_bytes())  # without its owner


def write_all(folder: Path, findings: Sequence[Finding], record: RunRecord) -> None:
    """Write everything into a folder, see `write_bundle`."""
    (folder / "README.txt").write_text(_README.format(version=__version__, disclaimer=DISCLAIMER), encoding="utf-8")
    (folder / "scores.csv").write_text(table(findings), encoding="utf-8")
    (folder / "run.json").write_text(record.to_json(), encoding="utf-8")
    write_report(folder / "report.pdf", findings, record)
    for part in ("overlays", "maps"):
        (folder / part).mkdir()
    for finding, stem in zip(findings, _stems(findings), strict=True):
        save_picture(folder / "overlays" / f"{stem}.png", overlay(finding.scan, finding.map, finding.threshold))
        save_map(folder / "maps" / f"{stem}.png", finding.map)
        save_nifti(folder / "maps" / f"{stem}.nii.gz", finding.scan, finding.map)
        if can_export(finding):
            (folder / "dicom").mkdir(exist_ok=True)
            save_segmentation(folder / "dicom" / f"{stem}_seg.dcm", finding)
            save_secondary_capture(folder / "dicom" / f"{stem}_overlay.dcm", finding)


def _stems(findings: Sequence[Finding]) -> list[str]:
    """Name the files of each finding by its label ("scan-03"), each once."""
    stems: list[str] = []
    for finding in findings:
        stem = "".join(char if char.isascii() and char.isalnum() else "-" for char in finding.label)[:40] or "scan"
        stems.append(stem if stem not in stems else f"{stem}-{len(stems) + 1}")
    return stems
