"""WebDataset shards: samples of plain .tar files, found by their headers and read in place, never unpacked."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

FACTS = ("json",)
TEXTS = ("txt", "caption")
IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "dcm", "nii", "nii.gz")
"""Suffixes of scans, without the first dot."""
SIDECARS = {*FACTS, *TEXTS, "cls", "id", "csv", "tsv", "xml", "yaml", "yml", "npy", "npz", "pt", "pth", "pkl", "pickle"}
"""Suffixes of what lies beside scans and is none."""
_UID = re.compile(r"((?:[A-Z]{2}\.)?\d+(?:\.\d+)+)(?:\.(\D.*))?")
"""A name such as DICOM's UIDs, digits and dots behind a modality or none, whose dots are no suffix; then the suffix."""


class UnclearSample(Exception):  # noqa: N818  (each caller words it as an error of its own family)
    """Which member of a sample is meant cannot be told; the text says why, without a name."""


@dataclass
class Sample:
    """One sample: members that lie next to each other and share a name.

    The name ends at the first dot (WebDataset's rule), or after a UID, whose dots are part of it.

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
        UnclearSample: Two members of a sample have the same name.
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
                stem, suffix = _split(base)
                key = f"{folder}/{stem}"
                if sample is None or key != sample.key:
                    if sample is not None:
                        yield sample
                    sample = Sample(key, member.offset)
                if suffix in sample.members:
                    raise UnclearSample(
                        f"the sample at byte {sample.offset} has two members of one name; give each scan its own"
                    )
                sample.members[suffix] = (member.offset_data, member.size)
            _require_end(stream, end)
            if sample is not None:
                yield sample


def _split(base: str) -> tuple[str, str]:
    """Cut a file name into the sample's name and a lower-case suffix; a UID without one is a DICOM file."""
    found = _UID.fullmatch(base)
    if found is not None:
        return found[1], (found[2] or "dcm").lower()
    stem, _, suffix = base.partition(".")
    return stem, suffix.lower()


def image_of(sample: Sample) -> tuple[int, int] | None:
    """Place of the scan among the members of a sample: (offset, size) in bytes; None without one.

    Of `a.png` and `a.mask.png`, the first is the scan. A suffix that is not known counts where no other can be meant:
    what a file is, its content tells when it is read.

    Raises:
        UnclearSample: Several members may be meant.
    """
    known = [suffix for suffix in sample.members if suffix in IMAGES]
    dotted = [suffix for suffix in sample.members if suffix.endswith(tuple(f".{image}" for image in IMAGES))]
    others = [suffix for suffix in sample.members if suffix.rpartition(".")[2] not in SIDECARS]
    found = known or dotted or others
    if len(found) > 1:
        raise UnclearSample(
            f"the sample at byte {sample.offset} has {len(found)} members that may be its scan; keep one in each sample"
        )
    return sample.members[found[0]] if found else None


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
            except (ValueError, RecursionError):  # no JSON, or nested beyond all reason
                return {}
            return content if isinstance(content, dict) else {}
    return {}
