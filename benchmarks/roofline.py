"""What a device can do at most, and how much of that a piece of work asks for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

MATMUL_SIDE, COPY_BYTES = 8192, 2**28  # a GPU takes 1.5 and 0.2 ms for them; a CPU gets smaller ones
SMALL_SIDE, SMALL_BYTES = 256, 2**22
CALLS, ROUNDS = 10, 5


@dataclass(frozen=True)
class Peaks:
    """What a device reaches, measured here.

    Attributes:
        bf16_flops: FLOP/s of a large product of bfloat16 matrices.
        copy_bytes: Bytes/s that a copy reads and writes.
    """

    bf16_flops: float
    copy_bytes: float

    @classmethod
    def of(cls, device: torch.device, wait: Callable[[], None]) -> Peaks:
        """Measure a device; `wait` returns when it has done what it was given."""
        side, size = (SMALL_SIDE, SMALL_BYTES) if device.type == "cpu" else (MATMUL_SIDE, COPY_BYTES)
        one = torch.randn(side, side, device=device).bfloat16()
        product = torch.empty_like(one)
        source = torch.zeros(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return cls(
            2 * side**3 / _best_seconds(lambda: torch.mm(one, one, out=product), wait),
            2 * size / _best_seconds(lambda: target.copy_(source), wait),
        )


def count_flops(call: Callable[[], Any]) -> float:
    """FLOPs of products, convolutions and attention in a call, forward and backward (2 for a multiply and add).

    Nothing is extrapolated; what is replayed from a graph is not seen, so that the call has to run step by step.
    """
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def _best_seconds(call: Callable[[], Any], wait: Callable[[], None]) -> float:
    """Seconds of a call, launched several times in a row so that launching and waiting do not count; best of some."""
    call()
    best = float("inf")
    for _ in range(ROUNDS):
        wait()
        started = time.perf_counter()
        for _ in range(CALLS):
            call()
        wait()
        best = min(best, (time.perf_counter() - started) / CALLS)
    return best
