"""Ray: who works, how it is reached, and how many workers there is room for."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fmclip.errors import ArchiveError

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


def require_ray() -> Any:
    """Import Ray.

    Raises:
        ArchiveError: It is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ArchiveError("Archives are scored through Ray Data: pip install 'fmclip[archive]'.") from error
    return ray


@contextlib.contextmanager
def connected(ray: Any, workers: Workers) -> Iterator[None]:
    """Be connected to Ray: to the cluster that is named, to the one in use, or to one of this machine alone.

    Raises:
        ArchiveError: It cannot be reached or started.
    """
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


def count_workers(nodes: Sequence[Mapping[str, Any]], workers: Workers) -> int:
    """How many workers there will be.

    Args:
        nodes: As `ray.nodes()` tells of each machine: "Alive", and "Resources" with its CPUs and GPUs.
        workers: What is asked for.

    Returns:
        That many, or as many as there is room for, at least one.

    Raises:
        ArchiveError: There is not room for so many; Ray would wait for more machines without a word and without end.
    """
    room = 0
    for node in nodes:
        if node["Alive"]:
            by_cpu = int(node["Resources"].get("CPU", 0) // workers.cpus)
            by_gpu = int(node["Resources"].get("GPU", 0) / workers.gpus) if workers.gpus else by_cpu
            room += min(by_cpu, by_gpu)
    if room < max(workers.count, 1):
        each = f"{workers.cpus} CPUs" + (f" and {workers.gpus:g} GPUs" if workers.gpus else "")
        raise ArchiveError(
            f"There is room for {room} workers of {each} each, and {max(workers.count, 1)} are asked for: `ray status` "
            "tells what there is; lower --workers, --cpus or --gpus, or let more machines join first."
        )
    return workers.count or room
