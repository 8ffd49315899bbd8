"""What an archive holds: rows of a table or samples of shards, cut into parts that a worker can find on its own.

| source | what is read |
|---|---|
| .csv, .tsv | UTF-8 with a header; a column with the scan's path |
| .jsonl, .ndjson | an object a line |
| .parquet | a table |
| .tar, or a folder of them | WebDataset shards; the facts of a sample are its JSON |

The source is walked once, from beginning to end and holding one row at a time: that gives the number of rows, a digest,
and for each part where it begins. The key of a scan is its row, counted from 0: nothing else of the source is kept.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from fmclip.contrastive.pairs import ImageBytes, ImageFile, ImageSource
from fmclip.errors import ArchiveError
from fmclip.scans.shards import UnclearSample, image_of, iterate_samples, read_facts, read_member

DELIMITERS = {".csv": ",", ".tsv": "\t"}
LINES = (".jsonl", ".ndjson")
TABLES = (*DELIMITERS, *LINES, ".parquet")
KEY_COLUMN = "__key__"
"""Under this name the facts of a shard's sample hold its key, as in WebDataset itself."""
_CHANGED = "The manifest or a shard has become shorter or has changed since the run began: score it anew."


@dataclass(frozen=True)
class Columns:
    """Columns of the manifest, or fields of a sample's JSON; "" for none.

    Attributes:
        path: Where the scan lies.
        scanner: Which device made it.
        date: When: YYYY-MM-DD, YYYYMMDD, or a time stamp that begins so.
        id: What to copy beside each score, to find the scan again without counting rows.
    """

    path: str = "path"
    scanner: str = "scanner"
    date: str = "date"
    id: str = ""


class Part(NamedTuple):
    """A range of rows.

    Attributes:
        number: From 0.
        first: Its first row.
        size: How many.
        shard: Which file, for shards that the part begins in.
        offset: Where its first row begins: bytes, or the row itself in a Parquet table.
        stamp: Tells the files that its rows lie in by name, size and time of change, so that no row is taken from
            others.
    """

    number: int
    first: int
    size: int
    shard: int
    offset: int
    stamp: int


class Entry(NamedTuple):
    """One row: where the scan lies, and what else the source says of it."""

    row: int
    image: ImageSource | None
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """An archive.

    Attributes:
        path: The manifest, a shard, or a folder of shards.
        columns: What its columns are called.
        root: Folder that paths are relative to; None: the manifest's.
    """

    path: Path
    columns: Columns
    root: Path | None = None

    def plan(self, part_size: int) -> tuple[list[Part], str]:
        """Walk the source once.

        Args:
            part_size: Rows of a part; the last one has fewer.

        Returns:
            The parts in order, and a digest of the source: of the manifest's bytes, or the shards' names and headers.

        Raises:
            ArchiveError: The source is not there, is damaged, has no row, lacks a column, or changes meanwhile.
        """
        digest = hashlib.sha256()
        parts: list[Part] = []
        shard, row = 0, -1
        with _readable():
            files = self._files
            before = [_state(file) for file in files]

            def end_part() -> None:
                first = parts[-1]
                parts[-1] = first._replace(size=row + 1 - first.first, stamp=_stamp(before[first.shard : shard + 1]))

            for number, (its_shard, offset) in enumerate(self._starts(files, digest)):
                if number % part_size == 0:
                    if parts:
                        end_part()
                    parts.append(Part(len(parts), number, part_size, its_shard, offset, 0))
                shard, row = its_shard, number
            if before != [_state(file) for file in files]:
                raise ArchiveError(_CHANGED)
        if not parts:
            raise ArchiveError("The manifest names no scan, or the shards hold none: nothing can be scored.")
        end_part()
        return parts, digest.hexdigest()

    def read(self, part: Part) -> Iterator[Entry]:
        """Read the rows of a part, without decoding a scan.

        Raises:
            ArchiveError: The source is gone or has changed.
        """
        with _readable():
            files = self._files
            found = islice(self._rows(files, part), part.size)
            count, last = 0, part.shard
            for shard, image, facts in found:
                yield Entry(part.first + count, image, facts)
                count, last = count + 1, shard
            if count < part.size or _stamp([_state(file) for file in files[part.shard : last + 1]]) != part.stamp:
                raise ArchiveError(_CHANGED)

    @property
    def _suffix(self) -> str:
        return self.path.suffix.lower()

    @property
    def _files(self) -> list[Path]:
        files = sorted(self.path.rglob("*.tar")) if self.path.is_dir() else [self.path]
        if not files or not all(file.is_file() for file in files):
            raise ArchiveError(
                "The archive is not there: give a manifest (.csv, .tsv, .jsonl, .parquet), a .tar shard, or a folder "
                "of .tar shards."
            )
        return files

    def _starts(self, files: Sequence[Path], digest: Any) -> Iterator[tuple[int, int]]:
        """Yield (shard, offset) of each row."""
        if self._suffix not in TABLES:
            for shard, file in enumerate(files):
                digest.update(file.name.encode(errors="surrogateescape") + b"\0")
                for sample in iterate_samples(file):
                    if image_of(sample) is not None:
                        digest.update(repr((sample.key, sample.offset, sample.members)).encode(errors="replace"))
                        yield shard, sample.offset
            return
        with self.path.open("rb") as manifest:
            while block := manifest.read(2**20):
                digest.update(block)
        if self._suffix == ".parquet":
            table = _parquet(self.path)
            self._require(table.schema_arrow.names)
            yield from ((0, row) for row in range(table.metadata.num_rows))
            return
        lines = _Lines(self.path)
        if self._suffix in LINES:
            for offset, line in lines:
                if line.strip():
                    self._require(_object(line), offset)
                    yield 0, offset
            return
        self._require(_header(self.path, DELIMITERS[self._suffix]))
        yield from ((0, offset) for offset, _ in islice(_records(lines, DELIMITERS[self._suffix]), 1, None))

    def _rows(self, files: Sequence[Path], part: Part) -> Iterator[tuple[int, ImageSource | None, Mapping[str, Any]]]:
        """Yield (shard, scan, facts) from the beginning of a part on."""
        if self._suffix not in TABLES:
            for number, file in enumerate(files[part.shard :], start=part.shard):
                for sample in iterate_samples(file, part.offset if number == part.shard else 0):
                    place = image_of(sample)
                    if place is not None:
                        key = {KEY_COLUMN: sample.key.lstrip("/")}
                        image = ImageBytes(partial(read_member, file, *place))
                        yield number, image, {**key, **read_facts(file, sample)}
            return
        for facts in self._table_rows(part):
            name = facts.get(self.columns.path)
            root = self.path.parent if self.root is None else self.root
            yield 0, (ImageFile(root / str(name)) if name else None), facts

    def _table_rows(self, part: Part) -> Iterator[Mapping[str, Any]]:
        if self._suffix == ".parquet":
            wanted = [name for name in astuple(self.columns) if name]
            yield from _parquet_rows(self.path, part.offset, part.size, wanted)
        elif self._suffix in LINES:
            yield from (_object(line) for _, line in _Lines(self.path, part.offset) if line.strip())
        else:
            delimiter = DELIMITERS[self._suffix]
            header = _header(self.path, delimiter)
            for _, values in _records(_Lines(self.path, part.offset), delimiter):
                yield dict(zip(header, values, strict=False))

    def _require(self, names: Iterable[str], offset: int | None = None) -> None:
        wanted = self.columns.path
        if wanted not in set(names):
            where = "The manifest" if offset is None else f"The line at byte {offset} of the manifest"
            raise ArchiveError(
                f"{where} has no column {wanted!r} with the paths of the scans; --path-column names another."
            )


def _state(file: Path) -> tuple[str, int, int]:
    """Name, size in bytes, and time of change in ns of a file."""
    told = file.stat()
    return file.name, told.st_size, told.st_mtime_ns


def _stamp(states: Sequence[tuple[str, int, int]]) -> int:
    """63 bits that stand for the states of some files."""
    return int.from_bytes(hashlib.sha256(repr(states).encode(errors="backslashreplace")).digest()[:8]) >> 1


class _Lines:
    """Lines of a UTF-8 file, each with the offset that it begins at; ends as they are."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path, self.offset = path, offset

    def __iter__(self) -> Iterator[tuple[int, str]]:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            offset = self.offset
            for line in file:
                start, offset = offset, offset + len(line)
                yield start, line.decode("utf-8-sig" if start == 0 else "utf-8")


def _records(lines: Iterable[tuple[int, str]], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Records of a CSV file with their offsets; one may go on over several lines, blank lines are none."""
    starts: list[int] = []  # of the record that is being read

    def fed() -> Iterator[str]:
        for start, line in lines:
            if not starts:
                starts.append(start)
            yield line

    for values in csv.reader(fed(), delimiter=delimiter, strict=True):
        start = starts.pop()
        if values:
            yield start, values


def _header(path: Path, delimiter: str) -> list[str]:
    return next((values for _, values in _records(_Lines(path), delimiter)), [])


def _object(line: str) -> Mapping[str, Any]:
    value = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value


def _parquet(path: Path) -> Any:
    from pyarrow import parquet

    return parquet.ParquetFile(path)


def _parquet_rows(path: Path, first: int, count: int, wanted: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """Rows first ... first + count - 1; of the file, only the row groups and columns that are needed are read."""
    with _parquet(path) as table:
        columns = [name for name in table.schema_arrow.names if name in wanted]
        begin = 0
        for group in range(table.metadata.num_row_groups):
            end = begin + table.metadata.row_group(group).num_rows
            if begin < first + count and end > first:
                low = begin
                for batch in table.iter_batches(1024, row_groups=[group], columns=columns):
                    high = low + batch.num_rows
                    start, stop = max(first, low) - low, min(first + count, high) - low
                    if stop > start:
                        yield from batch.slice(start, stop - start).to_pylist()
                    low = high
            begin = end


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Word what the readers raise, whose own texts may hold a path."""
    try:
        yield
    except tarfile.TarError as error:
        raise ArchiveError("A shard is damaged, cut short or compressed; shards must be plain .tar files.") from error
    except UnclearSample as error:
        raise ArchiveError(f"In a shard, {error}.") from error
    except (csv.Error, ValueError, RecursionError) as error:  # also of UTF-8, JSON (nested too deep) and Parquet
        raise ArchiveError(
            "The manifest is not readable as UTF-8 CSV, JSON lines or Parquet; save it again."
        ) from error
    except OSError as error:
        reason = error.strerror or "the system refused it"
        raise ArchiveError(f"The manifest or a shard cannot be opened here: {reason}.") from error
