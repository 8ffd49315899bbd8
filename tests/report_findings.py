"""Findings with known maps, for the tests of what a person takes away."""

import numpy as np

from fmclip.calibration import Calibration
from fmclip.detectors import PatchMemory, Prediction
from fmclip.report import RunRecord, ScanRecord
from fmclip.scans import Scan
from fmclip.session import Finding
from fmclip.towers import get_tower

CALIBRATION = Calibration((0.3, 0.35, 0.4, 0.42), 0.5)


def make_scan(seed: int, label: str = "scan", side: int = 40) -> Scan:
    """Draw a scan of noise, `side` rows and half as many more columns."""
    pixels = np.random.default_rng(seed).random((side, side + side // 2), dtype=np.float32)
    return Scan(pixels, label)


def find_square(scan: Scan, score: float, calibration: Calibration = CALIBRATION) -> Finding:
    """Find a square of the height `score` (rows 5 to 15, columns 8 to 20) on a map of 0.1, whatever the scan shows."""
    anomaly_map = np.full((scan.height, scan.width), 0.1, np.float32)
    anomaly_map[5:15, 8:20] = score
    return Finding.of(scan, Prediction(anomaly_map, score, {}), calibration)


def describe(findings: list[Finding], references: tuple[Scan, ...] = ()) -> RunRecord:
    """Make the record that goes with findings, of a patch memory on the tiny tower."""
    detector = PatchMemory(get_tower("tiny"))
    queries = [ScanRecord.of(finding.scan, finding.score) for finding in findings]
    return RunRecord.of(detector, CALIBRATION, queries, references=references, window="lung")
