"""What is written for each part: scores, maps and failures as Parquet, each file whole or not there.

    OUT/archive.json                  settings, threshold, digests of adapter and manifest, number of rows
    OUT/adapter.safetensors           the adapter, for workers and for the record
    OUT/scores/part-000000.parquet    a row for each scan that was mapped
    OUT/failures/part-000000.parquet  a row for each that was not, with the reason; no file where there is none
    OUT/maps/part-000000.parquet      a row for each map: a PNG of 8 or 16 bits

A part is finished once its scores are there. Its files are written beside their places and, once all of them are on the
disk, renamed into them, the scores last; so a part that is made again keeps its old files until then.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import cv2
import numpy as np

from fmclip.calibration import Calibration
from fmclip.errors import ArchiveError
from fmclip.scans import resize

RECORD, FORMAT, FORMAT_VERSION = "archive.json", "fmclip-archive", 1
SCORES, FAILURES, MAPS, ATTEMPTS = "scores", "failures", "maps", "attempts"
UNFINISHED = ".unfinished"
MAP_KINDS = {"uint8": 255, "uint16": 65535}
"""How maps are kept, and what 1 becomes."""
_RUN, _SCORED, _FAILED = b"fmclip.run", b"fmclip.scored", b"fmclip.failed"
_MAPS_A_GROUP = 64  # what has to be read to see one map


class Known(NamedTuple):
    """What the manifest says of a scan, and all that is kept of it.

    Attributes:
        row: Its row, from 0.
        id: What the id column says; None without one.
        scanner: Which device made it; None if nothing says so.
        date: The day; None likewise.
    """

    row: int
    id: str | None
    scanner: str | None
    date: datetime.date | None


class Scored(NamedTuple):
    """A scan that was mapped: score in [0, 1], (H, W) of its pixels, map from `encode_map` or nothing."""

    known: Known
    score: float
    shape: tuple[int, int]
    map: bytes


class Failure(NamedTuple):
    """A scan that was not, and why."""

    known: Known
    reason: str


class PartCount(NamedTuple):
    """How many scans of a part were mapped, and how many were not."""

    scored: int
    failed: int


def part_file(out: Path, kind: str, number: int) -> Path:
    """Name the file of a part."""
    return out / kind / f"part-{number:06d}.parquet"


def write_part(
    out: Path,
    number: int,
    run: str,
    scored: Sequence[Scored],
    failures: Sequence[Failure],
    calibration: Calibration,
    *,
    with_ids: bool,
    with_maps: bool,
) -> None:
    """Write a part, or write it again; nobody sees half of it.

    Args:
        out: Folder of the archive's results, with its subfolders.
        number: Of the part.
        run: Digest of the settings; `count_part` asks for it.
        scored: In the order of the manifest.
        failures: Likewise.
        calibration: Of the adapter.
        with_ids: Whether there is a column for ids.
        with_maps: Whether maps are kept.

    Raises:
        OSError: A file cannot be written.
    """
    import pyarrow as pa

    scores = [one.score for one in scored]
    table = pa.table(
        {
            **_known([one.known for one in scored], with_ids),
            "score": pa.array(scores, pa.float64()),
            "deviates": pa.array([calibration.is_abnormal(score) for score in scores], pa.bool_()),
            "rank": pa.array([calibration.rank(score) for score in scores], pa.int16()),
            "p_value": pa.array(calibration.p_values(scores), pa.float32()),
        }
    )
    counts = {_RUN: run.encode(), _SCORED: str(len(scored)).encode(), _FAILED: str(len(failures)).encode()}
    tables = {SCORES: table.replace_schema_metadata(counts)}
    if with_maps:
        tables[MAPS] = _map_table(scored)
    if failures:
        reasons = pa.array([failure.reason for failure in failures])
        tables[FAILURES] = pa.table({**_known([one.known for one in failures], with_ids), "reason": reasons})
    places = {kind: part_file(out, kind, number) for kind in tables}
    written: dict[str, Path] = {}
    try:
        for kind, content in tables.items():
            written[kind] = _write_beside(places[kind], _as_parquet(content))
        if not failures:  # an earlier attempt may have failed where this one did not
            part_file(out, FAILURES, number).unlink(missing_ok=True)
        for kind in reversed(tables):  # the scores last
            _move(written[kind], places[kind])
    except BaseException:
        for file in written.values():
            file.unlink(missing_ok=True)
        raise


def count_part(out: Path, number: int, run: str) -> PartCount | None:
    """Tell what a finished part holds; None if it is not finished, is damaged, or is of another run."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        metadata = parquet.read_metadata(part_file(out, SCORES, number)).metadata or {}
        count = PartCount(int(metadata[_SCORED]), int(metadata[_FAILED]))
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return None
    return count if metadata.get(_RUN) == run.encode() else None


def read_record(out: Path) -> dict[str, Any]:
    """Read archive.json.

    Raises:
        ArchiveError: It is not there, is damaged or of another version.
    """
    try:
        content = json.loads((out / RECORD).read_text(encoding="utf-8"))
        if (content["format"], content["version"]) != (FORMAT, FORMAT_VERSION):
            raise ValueError("another format")
        float(content["threshold"]), int(content["rows"]), dict(content["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArchiveError(
            "This folder holds no scores of an archive, or its archive.json is damaged or of another version."
        ) from error
    return content


def encode_map(anomaly_map: np.ndarray, kind: str, side: int) -> bytes:
    """Make a map small: area averages down to `side`, 0 ... 255 or 0 ... 65535, and PNG.

    Args:
        anomaly_map: [H, W] in [0, 1].
        kind: "uint8" or "uint16".
        side: Longest side that is kept, in pixels; 0 keeps the scan's own.

    Returns:
        A grey PNG of that depth; of these maps it is as small as zstd makes them, and every viewer opens it.
    """
    scale = side / max(anomaly_map.shape) if side else 1.0
    small = resize(anomaly_map, scale) if scale < 1 else np.clip(anomaly_map, 0, 1)
    pixels = np.rint(small * MAP_KINDS[kind]).astype(kind)
    return cv2.imencode(".png", pixels)[1].tobytes()


def read_map(out: str | os.PathLike[str], row: int) -> np.ndarray:
    """Read the map of one scan.

    Args:
        out: Folder of the archive's results.
        row: The scan's row in the manifest, from 0.

    Returns:
        [h, w] float32 in [0, 1] over the whole field of the scan.

    Raises:
        ArchiveError: No map of this row was kept.
    """
    from pyarrow import parquet

    file = part_file(Path(out), MAPS, row // int(read_record(Path(out))["settings"]["part_size"]))
    if not file.is_file():
        raise ArchiveError(f"No map of row {row} is kept here: its part is not finished, or maps were left out.")
    found = parquet.read_table(file, filters=[("row", "==", row)]).to_pylist()
    if not found:
        raise ArchiveError(f"No map of row {row} is kept here: the scan could not be read.")
    (one,) = found
    pixels = np.asarray(cv2.imdecode(np.frombuffer(one["map"], np.uint8), cv2.IMREAD_UNCHANGED))
    return pixels.astype(np.float32) / MAP_KINDS[str(pixels.dtype)]


def _known(known: Sequence[Known], with_ids: bool) -> dict[str, Any]:
    import pyarrow as pa

    columns: dict[str, Any] = {"row": pa.array([one.row for one in known], pa.int64())}
    if with_ids:
        columns["id"] = pa.array([one.id for one in known], pa.string())
    columns["scanner"] = pa.array([one.scanner for one in known], pa.string())
    columns["date"] = pa.array([one.date for one in known], pa.date32())
    return columns


def _map_table(scored: Sequence[Scored]) -> Any:
    import pyarrow as pa

    return pa.table(
        {
            "row": pa.array([one.known.row for one in scored], pa.int64()),
            "height": pa.array([one.shape[0] for one in scored], pa.int32()),
            "width": pa.array([one.shape[1] for one in scored], pa.int32()),
            "map": pa.array([one.map for one in scored], pa.binary()),
        }
    )


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after the power was cut.

    Raises:
        OSError: It cannot be written.
    """
    part = _write_beside(path, lambda file: file.write(data))
    try:
        _move(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _as_parquet(table: Any) -> Callable[[BinaryIO], object]:
    from pyarrow import parquet

    group = {"row_group_size": _MAPS_A_GROUP} if "map" in table.column_names else {}
    return lambda file: parquet.write_table(table, file, compression="zstd", **group)


def _write_beside(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """Write to the disk beside a place, under a name of its own, for two workers may be at the same part."""
    part = path.with_name(f"{path.stem}-{uuid.uuid4().hex[:12]}{UNFINISHED}")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return part


def _move(part: Path, path: Path) -> None:
    """Move a file into its place, and have the folder say so on the disk, where the system can."""
    part.replace(path)
    with contextlib.suppress(OSError):  # Windows, and some network shares
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
