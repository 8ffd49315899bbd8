"""One optimiser step, as it is or on static buffers that a GPU records as a graph.

Launching the hundreds of small kernels of a step takes a CPU longer than a GPU needs to run them. A CUDA graph records
forward, backward and update once and replays them with one call; it reads its batch from a buffer that stays in place.
On other devices the same step is called directly, so that tests can tell that both are equal.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fmclip.devices import tf32
from fmclip.errors import is_out_of_memory

WARM_UP = 3  # steps before the recording, undone afterwards; libraries choose their kernels in them
_RECORDING = threading.Lock()  # one recording at a time: torch has one stream for them, and TF32 is a switch for all
log = logging.getLogger("fmclip.detectors")


def adamw(groups: list[dict[str, Any]], weight_decay: float, device: torch.device) -> torch.optim.AdamW:
    """AdamW; on a GPU as one fused kernel that a graph can record."""
    if device.type == "cuda":
        return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True, capturable=True)
    return torch.optim.AdamW(groups, weight_decay=weight_decay)


def records_graphs(device: torch.device) -> bool:
    """Whether a device can record its work and replay it."""
    return device.type == "cuda"


class TrainingStep:
    """Forward, backward and update for a batch of rows of the pool.

    Args:
        loss: Rows [b] on the device, and what the parts share -> mean loss over them; draws nothing from the host while
            it runs.
        optimiser: Over all that is trained.
        device: Where all of it lies.
        is_static: Whether the rows are read from a buffer that stays, and on a GPU the step becomes a graph.
        parts: Parts in which the batch is run; their gradients add up to those of the whole.
        generators: Draw on the device inside `loss`.
        shared: Computes what all parts of a batch share, so that it is computed once, forward and backward.
    """

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        optimiser: torch.optim.Optimizer,
        device: torch.device,
        *,
        is_static: bool = False,
        parts: int = 1,
        generators: Sequence[torch.Generator] = (),
        shared: Callable[[], Tensor],
    ) -> None:
        self._compute, self._shared, self._optimiser, self._device = loss, shared, optimiser, device
        self._parts, self._is_static = parts, is_static
        self._generators = list(generators)
        self._rows = torch.empty(0, dtype=torch.long, device=device)
        self._records = is_static and records_graphs(device)
        self._graph: Any = None
        self._loss = torch.zeros((), device=device)

    def __call__(self, rows: Tensor) -> Tensor:
        """Take a step: rows [b] on any device, as many each time -> the loss before it."""
        if not self._is_static:
            return self._run(rows.to(self._device))
        if len(self._rows) == 0:
            self._rows = rows.to(self._device, copy=True)
        self._rows.copy_(rows)
        if self._records and self._graph is None:
            self._record()
        if self._graph is None:
            return self._run(self._rows)
        self._graph.replay()
        return self._loss

    def _run(self, rows: Tensor) -> Tensor:
        self._optimiser.zero_grad(set_to_none=True)
        total = self._add_gradients(rows)
        self._optimiser.step()
        return total

    def _add_gradients(self, rows: Tensor) -> Tensor:
        """Forward and backward, part by part: rows [b] -> mean loss over them."""
        shared = self._shared()
        seen = shared.detach().requires_grad_(shared.requires_grad)
        total = torch.zeros((), device=self._device)
        for part in rows.tensor_split(min(self._parts, len(rows))):
            loss = self._compute(part, seen) * (len(part) / len(rows))
            loss.backward()
            total = total + loss.detach()
        if seen.grad is not None:
            shared.backward(seen.grad)
        return total

    def _record(self) -> None:
        """Record the graph; where a tower does something that graphs cannot hold, steps go on without one.

        Its products in float32 use TF32, which is decided here: a replay runs the kernels that were recorded.
        """
        with _RECORDING, tf32(True):
            self._warm_up()
            graph: Any = torch.cuda.CUDAGraph()
            for generator in self._generators:
                graph.register_generator_state(generator)
            everyone = [*self._generators, _default_generator(self._device)]  # which each recording takes along
            kept = [generator.clone_state() for generator in everyone]
            try:
                # other visitors' queries may run meanwhile in other threads
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    self._loss = self._run(self._rows)
            except RuntimeError as error:
                _set_states(everyone, kept)  # a recording that breaks off leaves generators that refuse to draw
                self._optimiser.zero_grad(set_to_none=True)
                if is_out_of_memory(error):
                    raise
                log.warning("this step cannot be recorded as a CUDA graph (%s); it runs without", type(error).__name__)
                self._records = False
                return
        self._graph = graph

    def _warm_up(self) -> None:
        """Take some steps on a stream of their own, as a recording does, and undo them, their draws too."""
        before, draws = self._snapshot(), [generator.clone_state() for generator in self._generators]
        stream: Any = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self._run(self._rows)
        finally:
            torch.cuda.current_stream(self._device).wait_stream(stream)
            self._restore(before)
            _set_states(self._generators, draws)
        self._optimiser.zero_grad(set_to_none=True)

    def _snapshot(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        weights = [weight for group in self._optimiser.param_groups for weight in group["params"]]
        state = self._optimiser.state
        return [
            (weight.detach().clone(), {name: value.clone() for name, value in state.get(weight, {}).items()})
            for weight in weights
        ]

    @torch.no_grad()
    def _restore(self, before: list[tuple[Tensor, dict[str, Tensor]]]) -> None:
        """Put weights and moments back in place; moments that were not there before start at zero."""
        weights = [weight for group in self._optimiser.param_groups for weight in group["params"]]
        for weight, (value, moments) in zip(weights, before, strict=True):
            weight.copy_(value)
            for name, moment in self._optimiser.state.get(weight, {}).items():
                moment.copy_(moments[name]) if name in moments else moment.zero_()


def _default_generator(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


def _set_states(generators: Sequence[torch.Generator], states: Sequence[torch.Generator]) -> None:
    """Put states from `clone_state` in the generators' place; `set_state` would go on with the former object."""
    for generator, state in zip(generators, states, strict=True):
        generator.graphsafe_set_state(state)
