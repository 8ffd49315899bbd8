"""The synthetic scans that a method learns from, made where its tower is, with word of the progress."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fmclip.detectors.events import OnEvent, StageStarted, Step
from fmclip.synthesis import Augmentation, SynthesisConfig, SyntheticScan, synthesise_pool
from fmclip.synthesis.device import DevicePool, synthesise_on_device

SYNTHESIS = "synthetic anomalies"
CHUNK = 32  # synthetic scans between two events


def synthesise_scans(
    pixels: Tensor,
    content: Tensor,
    scan_type: str,
    size: int,
    generator: torch.Generator,
    on_event: OnEvent,
    on_device: bool | None = None,
) -> DevicePool:
    """Synthesise anomalies on normal scans (FusionMedCLIP section 3.4); the same ones on every device, up to rounding.

    Args:
        pixels: [k, 3, S, S] references in [0, 1].
        content: [k, S, S] bool.
        scan_type: What the scans show.
        size: Number of pairs; a quarter of them stays normal.
        generator: Draws everything; on the CPU.
        on_event: Hears of the progress.
        on_device: Whether they are painted where `pixels` are, `CHUNK` at a time; if left out, on a GPU.

    Returns:
        The pairs, with their pictures and masks on the device of `pixels`, or without `on_device` on the CPU.
    """
    settings = SynthesisConfig(scan_type=scan_type, augmentation=Augmentation())
    on_event(StageStarted(SYNTHESIS, size))
    if pixels.is_cuda if on_device is None else on_device:

        def tell(painted: int) -> None:
            on_event(Step(SYNTHESIS, painted, size, math.nan))

        return synthesise_on_device(pixels, content, size, generator, settings, hand=CHUNK, on_hand=tell)
    images = [np.ascontiguousarray(one) for one in pixels.permute(0, 2, 3, 1).cpu().numpy()]
    contents = list(content.cpu().numpy())
    scans: list[SyntheticScan] = []
    while len(scans) < size:
        scans += synthesise_pool(images, contents, min(CHUNK, size - len(scans)), generator, settings)
        on_event(Step(SYNTHESIS, len(scans), size, math.nan))
    pictures = torch.from_numpy(np.stack([scan.image for scan in scans])).permute(0, 3, 1, 2).contiguous()
    return DevicePool(scans, pictures, torch.from_numpy(np.stack([scan.mask for scan in scans])))
