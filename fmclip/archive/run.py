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
from fmclip.archive.manifest import Part, Source
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
    part_file,
    read_record,
)
from fmclip.archive.scorer import Job, Scorer
from fmclip.checkpoint import describe_adapter, read_window
from fmclip.errors import ArchiveError, CheckpointError, FmclipError
from fmclip.scans import AS_STORED, parse_window

ADAPTER, LOCK = "adapter.safetensors", ".lock"
PART_SIZE = 500
OBJECT_STORE_BYTES = 100 * 2**20  # of Ray on this machine: only parts and counts pass through it, no scans


@dataclass(frozen=True)
class Workers:
    """Who does the work.

    Attributes:
        count: How many; 0: as many as there are CPUs, or GPUs, for.
        cpus: CPUs of each.
        gpus: GPUs of each, a share or a whole number; 0: they work on CPUs.
        address: Of a Ray cluster ("auto": the one that this machine belongs to); "": that of RAY_ADDRESS, which Ray
            sets in its jobs, or this machine alone.
    """

    count: int = 0
    cpus: int = 1
    gpus: float = 0.0
    address: str = ""


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
            worker could not go on. What is finished stays.
        CheckpointError: The adapter cannot be read.
    """
    ray = _require_ray()
    workers = workers or Workers()
    if maps != "none" and maps not in MAP_KINDS:
        raise ArchiveError(f"Maps are kept as {', '.join(MAP_KINDS)} or none, not as {maps!r}.")
    source = Source(source.path.absolute(), source.columns, None if source.root is None else source.root.absolute())
    out = out.absolute()
    facts = describe_adapter(adapter)
    parts, digest = source.plan(part_size)
    settings = {
        "fmclip": __version__,
        "adapter": _digest(adapter),
        "manifest": digest,
        "columns": asdict(source.columns),
        "slice": slice_index,
        "maps": maps,
        "map_side": map_side if maps != "none" else None,
        "part_size": part_size,
    }
    for folder in (SCORES, FAILURES, MAPS, ATTEMPTS):
        (out / folder).mkdir(parents=True, exist_ok=True)
    with _alone_in(out):
        run = _begin(out, adapter, settings, facts, rows=sum(part.size for part in parts))
        job = Job(
            out=out,
            adapter=out / ADAPTER,
            source=source,
            run=run,
            tower=str(Path(tower).absolute()) if tower and Path(tower).exists() else tower,
            device="cuda" if workers.gpus else "cpu",
            threads=workers.cpus,
            window=parse_window(read_window(adapter) or AS_STORED),
            slice_index=slice_index,
            maps=maps,
            map_side=map_side,
        )
        tally = _Tally(parts, on_progress)
        left = []
        for part in parts:
            count = count_part(out, part.number, run)
            if count is not None and count.failed and retry_failures:
                part_file(out, SCORES, part.number).unlink()
                count = None
            if count is None:
                left.append(part)
            else:
                tally.earlier(*count)
        tally.show()
        if left:
            with _cluster(ray, workers):
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
    count = workers.count or _most_workers(ray, workers)
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


def _most_workers(ray: Any, workers: Workers) -> int:
    resources = ray.cluster_resources()
    by_cpu = int(resources.get("CPU", 1) // workers.cpus)
    by_gpu = int(resources.get("GPU", 0) / workers.gpus) if workers.gpus else by_cpu
    return max(1, min(by_cpu, by_gpu))


@contextlib.contextmanager
def _cluster(ray: Any, workers: Workers) -> Iterator[None]:
    """Be connected to Ray: to the cluster that is named, to the one in use, or to one of this machine alone."""
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = workers.address or os.environ.get("RAY_ADDRESS", "")
    if address:
        options["address"] = address
    else:
        cpus = workers.count * workers.cpus or None
        options |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
        options |= {"object_store_memory": OBJECT_STORE_BYTES}
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ArchiveError("Ray cannot be reached or started here: check --address, and `ray status`.") from error
    try:
        yield
    finally:
        ray.shutdown()


def _require_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ArchiveError("Archives are scored through Ray Data: pip install 'fmclip[archive]'.") from error
    return ray


def _begin(out: Path, adapter: Path, settings: dict[str, Any], facts: dict[str, Any], rows: int) -> str:
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
    else:
        if any((out / SCORES).iterdir()):
            raise ArchiveError("The folder holds scores of a run that nothing is known of; give another --out.")
        _replace(out / ADAPTER, adapter.read_bytes())
        content = {"format": FORMAT, "version": FORMAT_VERSION, "settings": settings, "rows": rows, **_told(facts)}
        _replace(record, (json.dumps(content, indent=1) + "\n").encode())
    for folder in (SCORES, FAILURES, MAPS):
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


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + UNFINISHED)
    part.write_bytes(data)
    part.replace(path)


def _digest(adapter: Path) -> str:
    try:
        return hashlib.sha256(adapter.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError("The adapter file was not found, or cannot be opened.") from error
