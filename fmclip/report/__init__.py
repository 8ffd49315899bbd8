"""What a person takes away, from what a session found. No file here names the patient or holds a file name.

record      what was done, and what keeps it from being done again: run.json    replay   does it again, compares
pdf         a page for each scan                                files    CSV, 16-bit maps, overlays, NIfTI
dicom       segmentation and secondary capture for a PACS       bundle   all of it in one zip
"""

from fmclip.report.bundle import write_bundle
from fmclip.report.pdf import write_report
from fmclip.report.record import RunRecord, ScanRecord
from fmclip.report.replay import Replay, replay

__all__ = ["Replay", "RunRecord", "ScanRecord", "replay", "write_bundle", "write_report"]
