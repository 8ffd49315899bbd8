"""WebDataset shards: samples of plain .tar files, found by their headers and read in place, never unpacked."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

FACTS = ("json",)
TEXTS = ("txt", "caption")


@dataclass
class Sample:
    """One sample: members that lie next to each other and share a name up to the first dot (WebDataset's rule).

    Attributes:
        key: Folder and name, without a suffix.
        offset: Where its first header lies in the shard.
        members: (offset, size) in bytes of each member's content, by lower-case suffix without its first dot.
    """

    key: str
    offset: int
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


def iterate_samples(file: Path, offset: int = 0) -> Iterator[Sample]:
    """List the samples of a shard from their headers; contents are skipped.

    Args:
        file: An uncompressed .tar file.
        offset: Where to begin: 0, or the offset of a sample.

    Raises:
        tarfile.TarError: The shard is damaged or compressed.
        OSError: It cannot be opened.
    """
    with file.open("rb") as stream:
        stream.seek(offset)
        with tarfile.open(fileobj=stream, mode="r:") as tar:  # uncompressed, so that members can be read in place
            sample: Sample | None = None
            end = offset
            for member in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # it keeps every header; a shard may hold a million
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key = f"{folder}/{stem}"
                if sample is None or key != sample.key:
                    if sample is not None:
                        yield sample
                    sample = Sample(key, member.offset)
                sample.members[suffix.lower()] = (member.offset_data, member.size)
            _require_end(stream, end)
            if sample is not None:
                yield sample


def _require_end(stream: BinaryIO, end: int) -> None:
    """Refuse a shard that goes on after the last member, or ends within it: tarfile stops there without a word."""
    size = stream.seek(0, 2)
    stream.seek(min(end, size))
    if size < end or stream.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError("the shard is cut short or damaged")


def read_member(file: Path, offset: int, size: int) -> bytes:
    """Read one member's content.

    Raises:
        OSError: The shard cannot be read.
    """
    with file.open("rb") as stream:
        stream.seek(offset)
        return stream.read(size)


def read_facts(file: Path, sample: Sample) -> dict[str, Any]:
    """Read what the JSON of a sample says; {} without one, or where it is no JSON object.

    Raises:
        OSError: The shard cannot be read.
    """
    for suffix in FACTS:
        if suffix in sample.members:
            try:
                content = json.loads(read_member(file, *sample.members[suffix]))
            except ValueError:
                return {}
            return content if isinstance(content, dict) else {}
    return {}
