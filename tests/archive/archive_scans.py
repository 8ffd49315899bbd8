"""Small archives on disk. Every file name holds SECRET, so that a test can look for it where no name may be."""

import csv
import io
import json
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
from pyarrow import parquet

from fmclip.archive.manifest import Columns, Source
from fmclip.archive.parts import FAILURES, MAPS, SCORES

SECRET = "SECRET"
SCANNERS = ("Alpha", "Beta")
COUNT = 22
"""Scans in the manifest of the fixture, of which one is broken and one is not there."""
BROKEN, MISSING = 7, 12


def draw(path: Path, seed: int, *, blob: bool = False) -> Path:
    """Write a simulated scan of 40 x 50 pixels."""
    texture = cv2.GaussianBlur(np.random.default_rng(seed).normal(0, 1, (40, 50)), (0, 0), 1.5)
    pixels = np.clip(90 + 25 * texture / texture.std(), 0, 255).astype(np.uint8)
    if blob:
        cv2.circle(pixels, (35, 12), 7, 240, -1)
    cv2.imwrite(str(path), pixels)
    return path


def rows(count: int) -> list[dict[str, str]]:
    """Rows of a manifest for `count` scans: two scanners, four scans a day."""
    return [
        {
            "path": f"{SECRET}-{number:03d}.png",
            "scanner": SCANNERS[number % 2],
            "date": f"2026-01-{1 + number // 4:02d}",
            "accession": f"{SECRET}A{number}",
        }
        for number in range(count)
    ]


def write_manifest(path: Path, listed: list[dict[str, str]]) -> Path:
    """Write rows in the format that the suffix names."""
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(listed), path, row_group_size=3)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in listed) + "\n")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, listed[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(listed)
    return path


def write_shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """Write a plain tar."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def table_of(manifest: Path, **columns: str) -> Source:
    """The source of a manifest."""
    return Source(manifest, Columns(**columns))


def read_all(out: Path, kind: str) -> list[dict]:
    """All rows of the scores, maps or failures of an archive, in the order of the manifest."""
    files = sorted((out / kind).glob("*.parquet"))
    return sorted((row for file in files for row in parquet.read_table(file).to_pylist()), key=lambda row: row["row"])


def all_text(out: Path) -> str:
    """Everything that is written in the results of an archive, uncompressed, names of files too."""
    written = [str(read_all(out, kind)) for kind in (SCORES, FAILURES, MAPS)]
    for file in out.rglob("*"):
        written.append(file.relative_to(out).as_posix())
        if file.is_file():
            written.append(file.read_bytes().decode("latin-1"))
    return "\n".join(written)
