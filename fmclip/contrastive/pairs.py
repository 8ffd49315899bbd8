"""Image-text pairs: what a source lists, what of it can be used, and what was skipped and why."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fmclip.errors import PairError, ScanError
from fmclip.scans import Scan, read_scan

EMPTY, MISSING, BROKEN = "empty text", "image missing", "image broken"
READERS = 2
"""Threads that check images; decoding itself takes turns."""


class ImageSource(Protocol):
    """Where the image of a pair comes from."""

    def exists(self) -> bool:
        """Tell cheaply whether there is anything to read."""

    def read(self, label: str, **reading: Any) -> Scan:
        """Decode it, with `slice_index` and `window` as for `read_scan`; raises `ScanError`."""


@dataclass(frozen=True)
class ImageFile:
    """An image in a file of its own."""

    path: Path

    def exists(self) -> bool:
        """See `ImageSource`."""
        return self.path.is_file()

    def read(self, label: str, **reading: Any) -> Scan:
        """See `ImageSource`."""
        return read_scan(self.path, label=label, **reading)


@dataclass(frozen=True)
class ImageBytes:
    """An image inside something larger, such as a shard or a table.

    Attributes:
        load: Returns the encoded file; may raise OSError.
    """

    load: Callable[[], bytes]

    def exists(self) -> bool:
        """See `ImageSource`."""
        return True

    def read(self, label: str, **reading: Any) -> Scan:
        """See `ImageSource`."""
        try:
            content = self.load()
        except (OSError, ValueError) as error:
            raise ScanError(f"{label} could not be read from its shard or table.") from error
        try:
            with _as_file(content) as path:  # the one decoder with all limits reads files
                return read_scan(path, label=label, **reading)
        except OSError as error:
            raise ScanError(f"{label} could not be kept while it is read: memory or disk is full.") from error


@contextlib.contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """Give bytes a path. On Linux they stay in memory, so that a killed process leaves no scan on a disk."""
    if hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir():
        with os.fdopen(os.memfd_create("scan"), "wb") as file:
            file.write(content)
            file.flush()
            yield f"/proc/self/fd/{file.fileno()}"
        return
    with tempfile.NamedTemporaryFile(suffix=".scan") as file:
        file.write(content)
        file.flush()
        yield file.name


@dataclass(frozen=True)
class Pair:
    """One image with its text.

    Attributes:
        key: Names the pair within its source; the same each time the source is read.
        image: Where the image is.
        text: What is said about it, spaces tidied.
        patient: Names the patient (or article, or study) within the source.
        split: "train", "val" or "test" where the source comes with a split, else "".
    """

    key: str
    image: ImageSource
    text: str
    patient: str
    split: str = ""


@dataclass
class PairSet:
    """Pairs that can be used, and how many could not.

    Attributes:
        pairs: In the order of the source.
        skipped: Count by reason.
        digests: Content digest of each pair's image by key, where the images were decoded.
    """

    pairs: list[Pair] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    digests: dict[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        """Word what there is: "299 pairs of 160 patients; skipped: 2 image broken"."""
        patients = len({pair.patient for pair in self.pairs})
        lost = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
        return f"{len(self.pairs)} pairs of {patients} patients" + (f"; skipped: {lost}" if lost else "; none skipped")


def tidy(text: object) -> str:
    """Put a text on one line with single spaces; "" for None and for what is no text."""
    return re.sub(r"\s+", " ", text).strip() if isinstance(text, str) else ""


def anonymous(name: str) -> str:
    """Digest of a key or patient, for files that are kept: tells two apart and names neither."""
    return hashlib.sha256(name.encode()).hexdigest()[:20]


def fingerprint(pairs: Sequence[Pair]) -> str:
    """Digest of pairs in their order, keys and texts: the same for the same pairs, and it names none of them."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(f"{anonymous(pair.key)} {anonymous(pair.text)}\n".encode())
    return digest.hexdigest()


def text_group(text: str) -> str:
    """What two texts share that say the same: letters and digits only, lower case."""
    return re.sub(r"\W+", " ", text).strip().lower()


def collect(listed: Iterable[Pair]) -> PairSet:
    """Take what a source lists; empty texts and images that are not there are counted and skipped.

    Raises:
        PairError: Nothing is left, or two pairs have one key.
    """
    found = PairSet()
    seen: set[str] = set()
    for pair in listed:
        if pair.key in seen:
            raise PairError("Two pairs of the source have the same key; give each image and text one line of its own.")
        seen.add(pair.key)
        if not pair.text:
            found.skipped[EMPTY] += 1
        elif not pair.image.exists():
            found.skipped[MISSING] += 1
        else:
            found.pairs.append(pair)
    if not found.pairs:
        raise PairError(f"No pair can be used ({_reasons(found.skipped)}). Check the path, the columns and the layout.")
    return found


def check_images(found: PairSet, on_progress: Callable[[int, int], None] | None = None) -> PairSet:
    """Decode every image once; what cannot be decoded is counted and skipped.

    Args:
        found: What `collect` returned.
        on_progress: Called with (images done, images in all).

    Returns:
        The pairs whose image can be read, with the digest of each image.

    Raises:
        PairError: None can be read.
    """
    checked = PairSet(skipped=Counter(found.skipped))
    with ThreadPoolExecutor(READERS) as pool:
        for done, (pair, digest) in enumerate(zip(found.pairs, pool.map(_digest, found.pairs), strict=True), start=1):
            if digest is None:
                checked.skipped[BROKEN] += 1
            else:
                checked.pairs.append(pair)
                checked.digests[pair.key] = digest
            if on_progress is not None:
                on_progress(done, len(found.pairs))
    if not checked.pairs:
        raise PairError(f"No pair can be used ({_reasons(checked.skipped)}). Check the images.")
    return checked


def numbered(texts: Sequence[str]) -> list[int]:
    """Number the distinct texts: equal ones (`text_group`) get one number, in the order in which they appear."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(text_group(text), len(numbers)) for text in texts]


def _digest(pair: Pair) -> str | None:
    try:
        return pair.image.read("image").digest
    except ScanError:
        return None


def _reasons(skipped: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items())) or "nothing was listed"


def drop_keys(found: PairSet, keys: set[str], reason: str) -> PairSet:
    """Take pairs out by key, counted under a reason."""
    kept = [pair for pair in found.pairs if pair.key not in keys]
    skipped = Counter(found.skipped)
    if len(kept) < len(found.pairs):
        skipped[reason] += len(found.pairs) - len(kept)
    return PairSet(kept, skipped, found.digests)
