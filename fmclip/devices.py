"""Which device a session, the command line or a benchmark runs on."""

from __future__ import annotations


def resolve_device(device: str = "auto") -> str:
    """Name the device to use: "auto" is a GPU when there is one."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
