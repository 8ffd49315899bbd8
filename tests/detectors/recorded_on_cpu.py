"""A stand-in for CUDA graphs on a CPU: operations are taped once and run again on the very same memory.

Like a graph, a replay knows nothing of Python: a number that the host has computed stays what it was while recording, a
tensor is read where it lay, and whatever makes the host wait is refused.
"""

import contextlib
from typing import ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fmclip import search
from fmclip.detectors import step, training

REFUSED = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "lift_fresh"}


class Tape(TorchDispatchMode):
    """Operations below autograd, in their order: forward, backward and update."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in REFUSED:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class Graph:
    """Stands in for `torch.cuda.CUDAGraph`."""

    made: ClassVar[list["Graph"]] = []

    def __init__(self) -> None:
        self.tape, self.replays, self.generators = Tape(), 0, []
        Graph.made.append(self)

    def register_generator_state(self, generator) -> None:
        self.generators.append(generator)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        if self.replays == 1:  # here it ran while it was recorded, in a GPU it does not
            return
        for func, args, kwargs, out in self.tape.calls:
            again = func(*args, **kwargs)
            for place, value in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(place, torch.Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value.reshape(place.shape))  # `squeeze_` and the like have changed it since


class Stream:
    """Stands in for `torch.cuda.Stream`: all work is done in its order anyway."""

    def __init__(self, device=None) -> None:
        self.device = device

    def wait_stream(self, other) -> None:
        """Nothing is under way."""


def record_on_cpu(monkeypatch) -> list[Graph]:
    """Let steps be recorded here; gives the graphs as they are made."""

    @contextlib.contextmanager
    def record(graph, capture_error_mode):
        assert capture_error_mode == "thread_local"
        with graph.tape:
            yield

    def adamw(groups, weight_decay, device):
        return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)  # counts its steps in tensors

    def set_states(generators, states):
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state.get_state())

    monkeypatch.setattr(Graph, "made", [])
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda one: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(step, "records_graphs", lambda device: True)
    monkeypatch.setattr(step, "_default_generator", lambda device: torch.Generator())
    monkeypatch.setattr(step, "_set_states", set_states)
    monkeypatch.setattr(training, "adamw", adamw)
    monkeypatch.setattr(search, "_on_host", lambda tensor: False)  # as on a GPU
    return Graph.made
