"""An archive scored by workers of Ray Data: what is planned, done, skipped and gone on with.

Workers hand back two counts for each part; scans, maps and scores never pass through this process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fmclip import __version__
from fmclip.archive.cluster import Workers, connected, count_workers, require_ray
from fmclip.archive.manifest import TABLES, Part, Source
from fmclip.archive.parts import (
    ATTEMPTS,
    FAILURES,
    FORMAT,
    FORMAT_VERSION,
    MAP_KINDS,
    MAPS,
    RECORD,
    SCORES,
    UNFINISHED,
    count_part,
    read_record,
    write_whole,
)
from fmclip.archive.scorer import Job, Scorer
from fmclip.checkpoint import describe_adapter, read_window
from fmclip.errors import ArchiveError, CheckpointError, FmclipError
from fmclip.scans import AS_STORED, parse_window

ADAPTER, LOCK = "adapter.safetensors", ".lock"
PART_SIZE = 500


@dataclass(frozen=True)
class Progress:
    """How far it is.

    Attributes:
        parts_done: Finished, those of earlier runs too.
        parts: In all.
        scans_done: Mapped or failed.
        scans: In all.
        failed: Of those done, not mapped.
        per_second: Scans a second since this run began; 0 before the first part.
    """

    parts_done: int
    parts: int
    scans_done: int
    scans: int
    failed: int
    per_second: float

    @property
    def seconds_left(self) -> float | None:
        """At this speed; None if nothing is known yet."""
        return (self.scans - self.scans_done) / self.per_second if self.per_second else None


def score_archive(
    adapter: Path,
    source: Source,
    out: Path,
    *,
    workers: Workers | None = None,
    tower: str = "",
    slice_index: int | None = None,
    maps: str = "uint8",
    map_side: int = 64,
    part_size: int = PART_SIZE,
    retry_failures: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Progress:
    """Score an archive, or go on where an earlier run ended.

    Args:
        adapter: Adapter file.
        source: The archive; workers must be able to read it under the same path.
        out: Folder for the results; workers must be able to write it under the same path.
        workers: Who does it; None: all CPUs of this machine.
        tower: Tower, if it is a local weights file; "": the adapter names it.
        slice_index: Slice of volumes, frame of DICOM files; None: the middle one.
        maps: "uint8", "uint16", or "none".
        map_side: Longest side of the maps that are kept, in pixels; 0: the scans' own.
        part_size: Scans of a part: what is lost when a worker ends.
        retry_failures: Whether parts with failures are done again, such as after a mount was gone.
        on_progress: Called at the beginning and after each part.

    Returns:
        What was done in the end.

    Raises:
        ArchiveError: Ray is missing, the manifest cannot be read, the folder holds another run or is in use, or a
            worker could not go on, or there is no room for the workers. What is finished stays.
        CheckpointError: The adapter cannot be read.
    """
    ray = require_ray()
    workers = workers or Workers()
    if maps != "none" and maps not in MAP_KINDS:
        raise ArchiveError(f"Maps are kept as {', '.join(MAP_KINDS)} or none, not as {maps!r}.")
    source = Source(source.path.absolute(), source.columns, None if source.root is None else source.root.absolute())
    out = out.absolute()
    facts = describe_adapter(adapter)
    content = _content(adapter)
    device = "cuda" if workers.gpus else "cpu"
    parts, digest = source.plan(part_size)
    settings = {
        "fmclip": __version__,
        "adapter": hashlib.sha256(content).hexdigest(),  # it names its tower by a digest of the weights
        "manifest": digest,
        "root": _digest_of_root(source),
        "device": device,
        "columns": asdict(source.columns),
        "slice": slice_index,
        "maps": maps,
        "map_side": map_side if maps != "none" else None,
        "part_size": part_size,
    }
    for folder in (SCORES, FAILURES, MAPS, ATTEMPTS):
        (out / folder).mkdir(parents=True, exist_ok=True)
    with _alone_in(out):
        run = _begin(out, content, settings, facts, rows=sum(part.size for part in parts))
        job = Job(
            out=out,
            adapter=out / ADAPTER,
            source=source,
            run=run,
            tower=str(Path(tower).absolute()) if tower and Path(tower).exists() else tower,
            device=device,
            threads=workers.cpus,
            window=parse_window(read_window(adapter) or AS_STORED),
            slice_index=slice_index,
            maps=maps,
            map_side=map_side,
            retry_failures=retry_failures,
        )
        tally = _Tally(parts, on_progress)
        left = []
        for part in parts:
            count = count_part(out, part.number, run)
            if count is None or (count.failed and retry_failures):  # until then, what is there stays
                left.append(part)
            else:
                tally.earlier(*count)
        tally.show()
        if left:
            with connected(ray, workers):
                for receipt in _receipts(ray, job, left, workers):
                    if receipt["error"]:
                        raise ArchiveError(f"A worker could not go on: {receipt['error']} What is finished is kept.")
                    tally.add(int(receipt["scored"]), int(receipt["failed"]))
        shutil.rmtree(out / ATTEMPTS, ignore_errors=True)
    return tally.progress


class _Worker:
    """A worker as Ray Data drives it; hands back in words what goes wrong, for Ray would print it with its paths."""

    def __init__(self, job: Job) -> None:
        self.scorer: Scorer | None = None
        self.error = ""
        with self._told():
            self.scorer = Scorer(job)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        count = (0, 0)
        if self.scorer is not None:
            self.error = ""
            with self._told():
                count = self.scorer.score(Part(*(int(row[name]) for name in Part._fields)))
        return {"scored": count[0], "failed": count[1], "error": self.error}

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except FmclipError as error:
            self.error = str(error)
        except OSError as error:  # a full disk, a mount that is gone
            self.error = f"a file or folder could not be read or written ({error.strerror or 'the system refused it'})."
        except Exception as error:  # its own text may hold a path
            last = traceback.extract_tb(error.__traceback__)[-1]
            self.error = f"{type(error).__name__} in {Path(last.filename).name}, line {last.lineno}."


class _Tally:
    """Counts what is done."""

    def __init__(self, parts: Sequence[Part], on_progress: Callable[[Progress], None] | None) -> None:
        self._on_progress = on_progress or (lambda progress: None)
        self._parts, self._scans = len(parts), sum(part.size for part in parts)
        self._done = self._scored = self._failed = self._now = 0
        self._started = time.perf_counter()

    def earlier(self, scored: int, failed: int) -> None:
        """A part that is there already."""
        self._done, self._scored, self._failed = self._done + 1, self._scored + scored, self._failed + failed

    def add(self, scored: int, failed: int) -> None:
        """A part of this run."""
        self.earlier(scored, failed)
        self._now += scored + failed
        self.show()

    def show(self) -> None:
        self._on_progress(self.progress)

    @property
    def progress(self) -> Progress:
        seconds = time.perf_counter() - self._started
        done = self._scored + self._failed
        speed = self._now / seconds if self._now else 0.0
        return Progress(self._done, self._parts, done, self._scans, self._failed, speed)


def _receipts(ray: Any, job: Job, parts: Sequence[Part], workers: Workers) -> Iterator[dict[str, Any]]:
    """Send the parts to the workers; Ray starts a worker that was killed anew and gives it the same part."""
    count = count_workers(ray.nodes(), workers)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the command has its own, with scans in it
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    blocks = ray.data.from_items([part._asdict() for part in parts], override_num_blocks=len(parts))
    done = blocks.map(
        _Worker,
        fn_constructor_args=(job,),
        compute=ray.data.ActorPoolStrategy(size=min(count, len(parts)), max_tasks_in_flight_per_actor=2),
        num_cpus=workers.cpus,
        num_gpus=workers.gpus or None,
    )
    try:
        for batch in done.iter_batches(batch_size=None, prefetch_batches=0):
            for values in zip(*(batch[name] for name in ("scored", "failed", "error")), strict=True):
                yield dict(zip(("scored", "failed", "error"), values, strict=True))
    except ray.exceptions.RayError as error:
        raise ArchiveError(
            f"The workers were lost ({type(error).__name__}). What is finished is kept: the same command goes on."
        ) from None


def _begin(out: Path, adapter: bytes, settings: dict[str, Any], facts: dict[str, Any], rows: int) -> str:
    """Write what the folder is for, or see that it is for this; return the digest of the settings."""
    run = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    record = out / RECORD
    if record.exists():
        known = read_record(out)
        changed = [name for name, value in settings.items() if known["settings"].get(name) != value]
        if changed:
            raise ArchiveError(
                f"The folder holds scores of another run: {', '.join(changed)} changed. Go on with what that run was "
                "begun with, or give another --out."
            )
        if not (out / ADAPTER).is_file():
            write_whole(out / ADAPTER, adapter)
        elif _content(out / ADAPTER) != adapter:
            raise ArchiveError(
                f"{ADAPTER} in the folder is damaged or of another run. Remove that file, and it is written anew; if "
                "scores were made with it, give another --out."
            )
    else:
        if any((out / SCORES).iterdir()):
            raise ArchiveError("The folder holds scores of a run that nothing is known of; give another --out.")
        write_whole(out / ADAPTER, adapter)
        content = {"format": FORMAT, "version": FORMAT_VERSION, "settings": settings, "rows": rows, **_told(facts)}
        write_whole(record, (json.dumps(content, indent=1) + "\n").encode())
    for folder in (".", SCORES, FAILURES, MAPS):
        for file in (out / folder).glob(f"*{UNFINISHED}"):  # of workers that were killed
            file.unlink(missing_ok=True)
    return run


def _told(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: facts[name] for name in ("method", "scan_type", "tower", "window", "references", "threshold")}


@contextlib.contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Keep a second run out of the folder, where the system can; the lock ends with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows; two runs would do the same work twice, and no harm
        yield
        return
    with (out / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ArchiveError("Another score-archive is at work in this folder: wait for it, or end it.") from error
        yield


def _content(adapter: Path) -> bytes:
    try:
        return adapter.read_bytes()
    except OSError as error:
        raise CheckpointError("The adapter file was not found, or cannot be opened.") from error


def _digest_of_root(source: Source) -> str | None:
    """Tell the folder that paths are relative to from others, without naming it; None for shards."""
    if source.path.suffix.lower() not in TABLES:
        return None
    root = source.path.parent if source.root is None else source.root
    return hashlib.sha256(os.fsencode(root)).hexdigest()
