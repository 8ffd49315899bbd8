"""How a process treats its memory and threads; what is here is read before torch, and imports nothing large."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import sys
from typing import Any

_M_ARENA_MAX = -8  # glibc's malloc.h


def prepare_process() -> None:
    """Set what has to be set before torch is imported; call it first thing in a program, not in a library.

    Threads that wait for work sleep, since threads that spin stall each other on busy cores. All threads share one
    heap: glibc gives each thread its own otherwise, and what is freed in one serves no other (a seventh of the peak
    of a training on two cores). Both are left as they are where the environment says otherwise.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    libc = _glibc()
    settings = (*os.environ, os.environ.get("GLIBC_TUNABLES", ""))
    if libc is not None and not any("arena_max" in setting.lower() for setting in settings):
        libc.mallopt(_M_ARENA_MAX, 1)


def give_back() -> None:
    """Return to the system what was freed but lies between pieces in use; some hundredths of a second."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def free_memory() -> None:
    """Give back all that is no longer used, on the host and on a GPU."""
    import torch

    gc.collect()
    give_back()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@functools.cache
def _glibc() -> Any:
    """The C library where it is glibc, else None."""
    if not sys.platform.startswith("linux"):
        return None
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  (other C libraries lack it, and the two calls with it)
        return libc
    return None
