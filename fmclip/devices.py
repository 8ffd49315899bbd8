"""Which device a session, the command line or a benchmark runs on, and how exactly it multiplies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def resolve_device(device: str = "auto") -> str:
    """Name the device to use: "auto" is a GPU when there is one."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@lru_cache(maxsize=256)
def constant(values: tuple, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A small tensor of fixed numbers, copied to a device once: a step that is recorded there may copy nothing.

    Args:
        values: Numbers, or tuples of numbers of one length.
        device: Where it goes.
        dtype: Of the tensor.

    Returns:
        Shared by all callers, who only read it.
    """
    import torch

    with torch.inference_mode(False):
        return torch.tensor(values, device=device, dtype=dtype)


@contextlib.contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Whether a GPU multiplies float32 numbers as TF32 (10 bits instead of 23), many times faster; undone at the end.

    torch's own setting, which holds everywhere else: exact products of matrices, TF32 in convolutions. It is one for
    the whole process, so that what other threads start meanwhile follows it too.
    """
    import torch

    switches: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = on
        yield
    finally:
        for switch, was in zip(switches, before, strict=True):
            switch.allow_tf32 = was
