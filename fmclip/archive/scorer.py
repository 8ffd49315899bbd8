"""What a worker does: load the adapter once, then map part after part. Knows nothing of Ray.

A scan that cannot be read becomes a failure with its reason. One that ends the whole process (a crash in a decoder, all
memory taken) would end every process that takes the part up again; so from the second attempt on, scans are mapped one
at a time with a note of which is next, and one that was next in two attempts becomes a failure too.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fmclip.archive.manifest import Columns, Entry, Part, Source
from fmclip.archive.parts import ATTEMPTS, Failure, Known, PartCount, Scored, count_part, encode_map, write_part
from fmclip.checkpoint import load_adapter
from fmclip.detectors import Prediction
from fmclip.errors import ScanError, is_out_of_memory
from fmclip.scans import Scan
from fmclip.towers import get_tower

READ_AT_ONCE = 8
"""Scans that are read before they are mapped together."""
MAX_VALUES = 2**25
"""Pixel values of the scans that are mapped together: 128 MiB, and what the last one is beyond that."""
ENDED_TWICE = 2
"""Attempts in which a scan was the last thing that was begun; then it is not begun again."""
_DAY = re.compile(r"(\d{4})([-/.]?)(\d{2})\2(\d{2})((?<=\d{8})\d{4}(\d{2})?)?(?!\d)")
_WHAT_ENDS = "ended the program that read it, twice. Look at the file apart, or export it again."


@dataclass(frozen=True)
class Job:
    """All that a worker is told.

    Attributes:
        out: Folder of the archive's results.
        adapter: Adapter file.
        source: The archive.
        run: Digest of the settings.
        tower: Tower, if it is a local weights file; "": the adapter names it.
        device: "cpu" or "cuda".
        threads: Of torch; 0 leaves them as they are.
        window: (centre, width) that scans are read with; None: as stored.
        slice_index: Slice of volumes; None: the middle one.
        maps: "uint8", "uint16", or "none".
        map_side: Longest side of a map; 0: the scan's.
        retry_failures: Whether finished parts with failures are done again.
    """

    out: Path
    adapter: Path
    source: Source
    run: str
    tower: str = ""
    device: str = "cpu"
    threads: int = 0
    window: tuple[float, float] | None = None
    slice_index: int | None = None
    maps: str = "uint8"
    map_side: int = 64
    retry_failures: bool = False


class Scorer:
    """Maps the parts of an archive.

    Args:
        job: What to do.

    Raises:
        CheckpointError: The adapter does not fit its tower.
        TowerError: The tower cannot be loaded here.
    """

    def __init__(self, job: Job) -> None:
        if job.threads:
            torch.set_num_threads(job.threads)
        self.job = job
        tower = get_tower(job.tower, device=job.device) if job.tower else None
        self.detector, self.calibration = load_adapter(job.adapter, device=job.device, tower=tower)

    def score(self, part: Part) -> PartCount:
        """Map a part and write it, unless that is done.

        Raises:
            ArchiveError: The manifest or a shard is gone or has changed.
            OSError: A file cannot be written.
        """
        done = count_part(self.job.out, part.number, self.job.run)
        if done is not None and not (done.failed and self.job.retry_failures):
            return done
        attempt = _Attempt(self.job.out / ATTEMPTS / f"part-{part.number:06d}")
        try:
            count = self._attempt(part, attempt, done)
        except Exception:  # no scan ended the program: a full disk, say, is no fault of the last one
            attempt.withdraw()
            raise
        attempt.end()
        return count

    def _attempt(self, part: Part, attempt: _Attempt, done: PartCount | None) -> PartCount:
        """Map a part and write it, unless it was done before and fewer scans can be mapped now."""
        scored: list[Scored] = []
        failures: list[Failure] = []
        with ThreadPoolExecutor(1) as reader:  # reads the next scans while these are mapped
            groups = self._groups(part, attempt, failures)
            coming = reader.submit(next, groups, None)
            while (group := coming.result()) is not None:
                if not attempt.is_careful:
                    coming = reader.submit(next, groups, None)
                scored += self._map(group, failures)
                if attempt.is_careful:  # the note of the next scan must not be made before this one is done
                    coming = reader.submit(next, groups, None)
        attempt.mapped()
        if done is not None and len(scored) < done.scored:  # a mount is gone that was there then
            return done
        failures.sort(key=lambda failure: failure.known.row)
        write_part(
            self.job.out,
            part.number,
            self.job.run,
            scored,
            failures,
            self.calibration,
            with_ids=bool(self.job.source.columns.id),
            with_maps=self.job.maps != "none",
        )
        return PartCount(len(scored), len(failures))

    def _groups(self, part: Part, attempt: _Attempt, failures: list[Failure]) -> Iterator[list[tuple[Known, Scan]]]:
        """Read the scans of a part, some at a time; what cannot be read goes to the failures."""
        group: list[tuple[Known, Scan]] = []
        values = 0
        for entry in self.job.source.read(part):
            known = describe(entry, self.job.source.columns)
            try:
                scan = self._read(entry, attempt)
            except ScanError as error:
                failures.append(Failure(known, _reason(error, entry.row)))
                continue
            group.append((known, scan))
            values += scan.pixels.size
            if attempt.is_careful or len(group) == READ_AT_ONCE or values > MAX_VALUES:
                yield group
                group, values = [], 0
        if group:
            yield group

    def _read(self, entry: Entry, attempt: _Attempt) -> Scan:
        label = _label(entry.row)
        if entry.image is None:
            raise ScanError(f"{label} has no path in the manifest.")
        if attempt.ended_by(entry.row):
            raise ScanError(f"{label} {_WHAT_ENDS}")
        attempt.begin(entry.row)
        return entry.image.read(label, slice_index=self.job.slice_index, window=self.job.window)

    def _map(self, group: Sequence[tuple[Known, Scan]], failures: list[Failure]) -> list[Scored]:
        try:
            predictions: Sequence[Prediction] = self.detector.predict([scan for _, scan in group])
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(group) > 1:
                return [one for single in group for one in self._map([single], failures)]
            failures.append(Failure(group[0][0], "needs more memory than a worker has. Save it smaller."))
            return []
        kind, side = self.job.maps, self.job.map_side
        return [
            Scored(
                known,
                prediction.score,
                (scan.height, scan.width),
                b"" if kind == "none" else encode_map(prediction.map, kind, side),
            )
            for (known, scan), prediction in zip(group, predictions, strict=True)
        ]


class _Attempt:
    """The notes of one part: a line for each attempt, and for each scan that was begun in those after the first."""

    def __init__(self, notes: Path) -> None:
        self._notes = notes
        lines = notes.read_text(encoding="ascii", errors="replace").splitlines() if notes.is_file() else []
        attempts = " ".join(lines).split("attempt")[1:]  # what each of them had begun
        self._size = notes.stat().st_size if lines else 0
        self._last = Counter(words.split()[-1] for words in attempts if words.split())
        self.is_careful = bool(attempts)
        self._note("attempt")

    def begin(self, row: int) -> None:
        """A scan is read and mapped next."""
        if self.is_careful:
            self._note(str(row))

    def ended_by(self, row: int) -> bool:
        """Whether a scan has ended attempts enough."""
        return self._last[str(row)] >= ENDED_TWICE

    def mapped(self) -> None:
        """All scans are mapped: what goes wrong from here on is no scan's fault."""
        if self.is_careful:
            self._note("mapped")

    def withdraw(self) -> None:
        """This attempt ended in an error that was caught: take its notes back, which needs no room on a disk."""
        with contextlib.suppress(OSError):
            os.truncate(self._notes, self._size)

    def end(self) -> None:
        """The part is finished."""
        self._notes.unlink(missing_ok=True)

    def _note(self, text: str) -> None:
        with self._notes.open("a", encoding="ascii") as file:
            file.write(text + "\n")


def describe(entry: Entry, columns: Columns) -> Known:
    """Take what is kept from a row of the manifest."""

    def named(column: str) -> str | None:
        value = entry.facts.get(column) if column else None
        text = "" if value is None else str(value).strip()
        return text.encode("utf-8", "replace").decode() or None  # half a surrogate pair is no text that can be written

    return Known(entry.row, named(columns.id), named(columns.scanner), parse_day(entry.facts.get(columns.date)))


def parse_day(value: Any) -> datetime.date | None:
    """Read the day from a date, or from text that begins with YYYY-MM-DD, YYYYMMDD or a DICOM DT; None without one."""
    if isinstance(value, datetime.datetime):
        return value.date()
    if isinstance(value, datetime.date):
        return value
    found = _DAY.match("" if value is None else str(value).strip())
    if found is None:
        return None
    with contextlib.suppress(ValueError):
        return datetime.date(int(found[1]), int(found[3]), int(found[4]))
    return None


def _label(row: int) -> str:
    return f"row {row}"


def _reason(error: ScanError, row: int) -> str:
    """Words of an error without the label, which is the row beside them."""
    return str(error).removeprefix(_label(row)).strip()
