"""The synthetic scans that a method learns from, made where its tower is, with word of the progress."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fmclip.detectors.events import OnEvent, StageStarted, Step
from fmclip.synthesis import Augmentation, SynthesisConfig, SyntheticScan, synthesise_pool
from fmclip.synthesis.device import DevicePool, synthesise_on_device
from fmclip.synthesis.foreground import is_grey

SYNTHESIS = "synthetic anomalies"
CHUNK = 32  # synthetic scans between two events
SHOWN_EXAMPLES = 8


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
        The pairs, with their pictures and masks on the device of `pixels`, or without `on_device` on the CPU. Pictures
        of grey scans are one channel that is shown three times there, so that they are not to be written to.
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
    channels = 1 if all(map(is_grey, images)) else 3  # what is painted on grey scans is grey
    pictures = np.empty((size, *contents[0].shape, channels), np.float32)  # [P, S, S, c]; the scans are views of it
    masks = np.empty((size, *contents[0].shape), bool)
    while len(scans) < size:
        for scan in synthesise_pool(images, contents, min(CHUNK, size - len(scans)), generator, settings):
            picture, mask = pictures[len(scans)], masks[len(scans)]
            picture[:], mask[:] = scan.image[..., :channels], scan.mask
            scans.append(replace(scan, image=np.broadcast_to(picture, scan.image.shape), mask=mask))
        on_event(Step(SYNTHESIS, len(scans), size, math.nan))
    every = torch.from_numpy(pictures).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)  # [P, 3, S, S]
    return DevicePool(scans, every, torch.from_numpy(masks))


def detached(scans: Sequence[SyntheticScan]) -> list[SyntheticScan]:
    """Copies of scans that do not hold the whole pool in memory; their pictures are read-only where they are grey."""
    copies = []
    for scan in scans:
        is_one = scan.image.strides[-1] == 0  # channel, see `synthesise_scans`
        image = np.broadcast_to(scan.image[..., :1].copy(), scan.image.shape) if is_one else scan.image.copy()
        copies.append(replace(scan, image=image, mask=scan.mask.copy()))
    return copies


def stack_pictures(scans: Sequence[SyntheticScan]) -> Tensor:
    """Pictures [N, 3, S, S] of scans; grey ones take the memory of one channel, as they do in `synthesise_scans`."""
    channels = 1 if all(scan.image.strides[-1] == 0 for scan in scans) else 3
    pictures = np.stack([scan.image[..., :channels] for scan in scans])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
