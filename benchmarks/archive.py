"""An archive scored: throughput of one and of two workers, and a long dry run with its memory over time.

    python -m benchmarks.archive                        # 100,000 scans; about half an hour on two cores
    python -m benchmarks.archive --scans 5000           # a small one

Throughput is measured with the embedded tower on simulated DICOM files of 256 pixels, from the first finished part to
the last, one and two workers in turn; so is the processor time of the workers, which other work on the machine hardly
changes. The dry run is the command itself on shards of small DICOM files, every one with a header of its own, with the
cheapest method on the random tower `tiny`: it shows bookkeeping and memory, not the speed of a real tower. Linux only.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import uuid
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from benchmarks.cpu import ROOT, simulated_scans
from fmclip.archive.cluster import Workers
from fmclip.archive.drift import read_drift
from fmclip.archive.manifest import Columns, Source
from fmclip.archive.run import Progress, score_archive
from fmclip.calibration import Calibration
from fmclip.checkpoint import save_adapter
from fmclip.detectors import DETECTORS
from fmclip.evaluation import environment
from fmclip.towers import get_tower

SHARD = 10_000
PART = 16  # scans of a part in timed runs
PATIENT = "PATIENT-0000000"
CORE_HOUR = 0.05
"""US dollars; an assumption, for the cost of a million scans."""


def main() -> None:
    """Measure and write JSON and Markdown."""
    options = _options()
    os.environ["FMCLIP_BENCHMARK"] = token = uuid.uuid4().hex
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="fmclip-archive-") as name:
        folder = Path(name)
        throughput = _throughput(folder, options, token)
        dry_run = _dry_run(folder, options, token)
    content = {
        "throughput": throughput,
        "dry_run": dry_run,
        "environment": {**environment(), "ray": _ray_version(), "load_before": load},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "archive.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    table = _table(content)
    (options.out / "archive.md").write_text(table, encoding="utf-8")
    print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, default=100_000, help="of the dry run")
    parser.add_argument("--timed", type=int, default=480, help="scans of each timed run")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs with one and with two workers")
    parser.add_argument("--tower", default="mini", help="of the timed runs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def scoring_processes(token: str) -> Iterator[int]:
    """Processes of Ray that score, started from an environment that holds a token: not those of others."""
    for process in Path("/proc").iterdir():
        try:
            name, settings = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:  # no process, or one that has just ended
            continue
        if name.startswith(b"ray::Map") and token.encode() in settings:
            yield int(process.name)


def _throughput(folder: Path, options: argparse.Namespace, token: str) -> dict[str, Any]:
    adapter = _adapter(folder / "timed.safetensors", options.tower, "patch_memory")
    source = Source(_write_shards(folder / "timed", options.timed, side=256), Columns())
    runs: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    for number in range(options.rounds):
        for count in runs if number % 2 == 0 else reversed(runs):
            told: list[tuple[int, float, float]] = []  # scans, seconds, processor seconds of the workers

            def note(progress: Progress, told: list[tuple[int, float, float]] = told) -> None:
                if progress.scans_done:
                    used = sum(map(_processor_seconds, scoring_processes(token)))
                    told.append((progress.scans_done, time.perf_counter(), used))

            workers = Workers(count=count)
            out = folder / f"timed-{number}-{count}"
            score_archive(adapter, source, out, workers=workers, part_size=PART, on_progress=note)
            scans, seconds, used = (last - first for first, last in zip(told[0], told[-1], strict=True))
            runs[count].append({"per_second": scans / seconds, "processor_ms_a_scan": 1000 * used / scans})
    middle = {
        count: {name: statistics.median(run[name] for run in own) for name in own[0]} for count, own in runs.items()
    }
    return {
        "tower": options.tower,
        "scans": options.timed,
        "rounds": options.rounds,
        "runs": {str(count): own for count, own in runs.items()},
        "medians": {str(count): own for count, own in middle.items()},
        "ratio": middle[2]["per_second"] / middle[1]["per_second"],
    }


def _dry_run(folder: Path, options: argparse.Namespace, token: str) -> dict[str, Any]:
    adapter = _adapter(folder / "dry.safetensors", "tiny", "cosine")
    shards = _write_shards(folder / "dry", options.scans, side=64)
    out = folder / "out"
    command = [sys.executable, "-m", "fmclip", "score-archive", str(adapter), str(shards), "--out", str(out)]
    started = time.perf_counter()
    seen: list[tuple[int, float, float]] = []  # finished parts, memory of the driver and of the largest worker
    with subprocess.Popen([*command, "--workers", "2"], cwd=ROOT, stderr=subprocess.DEVNULL) as driver:
        while driver.poll() is None:
            workers = [_resident(process) for process in scoring_processes(token)]
            finished = len(list((out / "scores").glob("*.parquet")))
            seen.append((finished, _resident(driver.pid), max(workers, default=0.0)))
            time.sleep(1.0)
    seconds = time.perf_counter() - started
    parts = seen[-1][0]
    sizes = {kind: sum(file.stat().st_size for file in (out / kind).iterdir()) for kind in ("scores", "maps")}
    return {
        "scans": options.scans,
        "rows": sum(group.scores.size for group in read_drift(out).groups),
        "failures": len(list((out / "failures").iterdir())),
        "parts": parts,
        "seconds": seconds,
        "bytes_a_scan": {kind: size / options.scans for kind, size in sizes.items()},
        "memory_mb": _curve(seen, parts),
    }


def _curve(seen: list[tuple[int, float, float]], parts: int) -> list[dict[str, float]]:
    """Largest values in each tenth of a run."""
    tenths = []
    for number in range(10):
        own = [one for one in seen if number / 10 < one[0] / parts <= (number + 1) / 10]
        if own:
            driver, worker = max(one[1] for one in own), max(one[2] for one in own)
            tenths.append({"done": (number + 1) / 10, "driver": round(driver), "largest_worker": round(worker)})
    return tenths


def _processor_seconds(process: int) -> float:
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # in the program, and for it in the system


def _resident(process: int) -> float:
    """Resident memory in MB; 0 for a process that has ended."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _adapter(file: Path, tower: str, method: str) -> Path:
    detector = DETECTORS[method](get_tower(tower)).fit(simulated_scans(16, seed=0))
    assert detector.reference_scores_ is not None
    save_adapter(file, detector, Calibration.from_scores(detector.reference_scores_))
    return file


def _write_shards(folder: Path, count: int, side: int) -> Path:
    """Write simulated scans as DICOM, each with its own patient, beside JSON with scanner and day."""
    folder.mkdir()
    pictures = [_dicom(scan.pixels, side) for scan in simulated_scans(32, seed=1)]
    for shard, first in enumerate(range(0, count, SHARD)):
        with tarfile.open(folder / f"{shard:04d}.tar", "w") as tar:
            for number in range(first, min(first + SHARD, count)):
                scan = pictures[number % len(pictures)].replace(PATIENT.encode(), f"PATIENT-{number:07d}".encode())
                day = date(2026, 1, 1) + timedelta(days=60 * number // count)
                facts = {"scanner": f"scanner {number % 3 + 1}", "date": day.isoformat()}
                for suffix, content in (("dcm", scan), ("json", json.dumps(facts).encode())):
                    member = tarfile.TarInfo(f"{number:07d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def _dicom(pixels: np.ndarray, side: int) -> bytes:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = pydicom.uid.MRImageStorage, generate_uid()
    dataset.Modality, dataset.PatientID, dataset.PatientName = "MR", PATIENT, PATIENT
    step = pixels.shape[0] // side
    stored = np.rint(pixels[::step, ::step] * 4095).astype(np.uint16)
    dataset.Rows, dataset.Columns = stored.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.WindowCenter, dataset.WindowWidth = 2048, 4096
    dataset.PixelData = stored.tobytes()
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def _ray_version() -> str:
    import ray

    return ray.__version__


def _table(content: dict[str, Any]) -> str:
    where, speed, dry = content["environment"], content["throughput"], content["dry_run"]
    one = speed["medians"]["1"]
    hours = one["processor_ms_a_scan"] * 1e6 / 1000 / 3600
    kept = dry["bytes_a_scan"]
    lines = [
        "# Archive",
        "",
        f"`python -m benchmarks.archive --scans {dry['scans']} --timed {speed['scans']} --rounds {speed['rounds']}`, "
        f"{where['date']}, {where['cpu'] or where['machine']}, {where['cpu_count']} cores with a load of "
        f"{where['load_before']:.1f} from other work, Ray {where['ray']}, torch {where['torch']}, Python "
        f"{where['python']}, fmclip {where['fmclip']} ({where['commit']}).",
        "",
        f"Tower `{speed['tower']}`, `patch_memory` of 16 references, {speed['scans']} DICOM files of 256 pixels in "
        f"shards, maps of 64 pixels; from the first finished part to the last, medians of {speed['rounds']} runs each:",
        "",
        "| workers of one core | scans/s | each run | processor ms a scan |",
        "|---|---|---|---|",
        *(
            f"| {count} | {speed['medians'][count]['per_second']:.1f} | "
            f"{', '.join(format(run['per_second'], '.1f') for run in own)} | "
            f"{speed['medians'][count]['processor_ms_a_scan']:.0f} |"
            for count, own in speed["runs"].items()
        ),
        f"| ratio | {speed['ratio']:.2f} | | |",
        "",
        f"A million scans at {one['processor_ms_a_scan']:.0f} ms: {hours:.0f} core-hours, "
        f"{hours * CORE_HOUR:.2f} US dollars at an assumed {CORE_HOUR:.2f} a core-hour; "
        f"{kept['scores'] / 1e3:.2f} GB of scores and {kept['maps'] / 1e3:.1f} GB of maps, going by the dry run.",
        "",
        f"Dry run: {dry['scans']:,} DICOM files of 64 pixels, each with a header of its own, in shards of {SHARD:,}; "
        f"`cosine` on the tower `tiny`, 2 workers, {dry['parts']} parts. {dry['seconds']:.0f} s with the start of Ray, "
        f"{dry['scans'] / dry['seconds']:.0f} scans/s; {dry['rows']:,} rows of scores, {dry['failures']} parts with "
        "failures. Largest resident memory in each tenth of it, MB:",
        "",
        "| done | driver | largest worker |",
        "|---|---|---|",
        *(f"| {100 * own['done']:.0f} % | {own['driver']} | {own['largest_worker']} |" for own in dry["memory_mb"]),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
