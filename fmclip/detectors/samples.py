"""What a detector is trained on: normal and abnormal scans of a person, or anomalies synthesised on the normal ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fmclip.detectors.base import to_pixels
from fmclip.detectors.events import OnEvent, SyntheticExample, SyntheticExamples
from fmclip.detectors.synthetic import SHOWN_EXAMPLES, detached, synthesise_scans
from fmclip.detectors.synthetic import SYNTHESIS as SYNTHESIS
from fmclip.errors import ReferenceSetError
from fmclip.scans import Scan
from fmclip.synthesis import SyntheticScan
from fmclip.towers import Tower

MASK_SIDE = 56  # masks are compared with maps at this side; the patch grid is coarser still
ANGLE, SHIFT, ZOOM = 10.0, 0.05, 0.1  # degrees and shares of the side by which a scan is varied at most


@dataclass(frozen=True)
class Samples:
    """N pictures to learn from, on the CPU.

    Attributes:
        pixels: [N, 3, S, S] in [0, 1].
        labels: [N] 1 for abnormal and 0 for normal.
        masks: [N, m, m] share of each cell that is abnormal.
        is_drawn: [N] whether the mask is known; it is for every normal scan, whose mask is empty.
        sources: [N, 2] indices of the reference scans that it is or was made from: the scan itself, and the one that an
            inserted patch was taken from; -1 for none.
    """

    pixels: Tensor
    labels: Tensor
    masks: Tensor
    is_drawn: Tensor
    sources: Tensor

    def rows_without(self, references: Sequence[int]) -> Tensor:
        """Rows that hold nothing of any of these reference scans: [n]."""
        held = torch.tensor(list(references), dtype=torch.long)
        return (~torch.isin(self.sources, held).any(dim=1)).nonzero()[:, 0]


def from_scans(
    normals: Sequence[Scan],
    abnormals: Sequence[Scan],
    masks: Sequence[np.ndarray | None] | None,
    tower: Tower,
    copies: int,
    generator: torch.Generator,
) -> Samples:
    """Take scans as they are, each with some varied copies (rotated, shifted, zoomed, mirrored).

    Args:
        normals: k normal scans.
        abnormals: Abnormal scans, at least one.
        masks: For each abnormal scan bool [H, W] on its source pixels, or None; None for no masks at all.
        tower: Says how large the pictures are.
        copies: Varied copies of each scan.
        generator: Draws the variations.

    Raises:
        ReferenceSetError: The masks are not one for each abnormal scan, or one has another size than its scan.
    """
    drawn_on, is_drawn = mask_squares(abnormals, masks, tower)
    pixels = to_pixels([*normals, *abnormals], tower)[0].cpu()
    k, side = len(normals), pixels.shape[-1]
    squares = torch.cat([torch.zeros(k, side, side), drawn_on])[:, None]  # [n, 1, S, S]
    labels = torch.tensor([0.0] * k + [1.0] * len(abnormals))
    is_drawn = torch.cat([torch.ones(k, dtype=torch.bool), is_drawn])
    sources = torch.tensor([[place, -1] for place in range(k)] + [[-1, -1]] * len(abnormals))
    layers = torch.cat([pixels, squares], dim=1)  # [n, 4, S, S]
    varied = torch.cat([layers, *(_vary(layers, generator) for _ in range(copies))])
    times = 1 + copies
    return Samples(
        pixels=varied[:, :3].contiguous(),
        labels=labels.repeat(times),
        masks=_coarse(varied[:, 3]),
        is_drawn=is_drawn.repeat(times),
        sources=sources.repeat(times, 1),
    )


def mask_squares(
    abnormals: Sequence[Scan], masks: Sequence[np.ndarray | None] | None, tower: Tower
) -> tuple[Tensor, Tensor]:
    """Letterbox the masks of abnormal scans as the scans are.

    Args:
        abnormals: a abnormal scans.
        masks: For each bool [H, W] on its source pixels, or None; None for no masks at all.
        tower: Says how large the squares are.

    Returns:
        [a, S, S] in [0, 1], 0 where nobody has drawn; [a] bool, whether somebody has. On the CPU.

    Raises:
        ReferenceSetError: The masks are not one for each abnormal scan, or one has another size than its scan.
    """
    drawn: list[np.ndarray | None] = list(masks) if masks is not None else [None] * len(abnormals)
    if len(drawn) != len(abnormals):
        raise ReferenceSetError(f"{len(abnormals)} abnormal scans came with {len(drawn)} masks: give one for each.")
    squares = torch.zeros(len(abnormals), tower.image_size, tower.image_size)
    for place, (scan, mask) in enumerate(zip(abnormals, drawn, strict=True)):
        if mask is None:
            continue
        if mask.shape != (scan.height, scan.width):
            raise ReferenceSetError(
                f"{scan.label}: its mask has another size than the scan. Draw it on the same pixels."
            )
        squares[place] = to_pixels([Scan(mask.astype(np.float32))], tower)[0].cpu()[0, 0]
    return squares, torch.tensor([mask is not None for mask in drawn])


def from_synthesis(
    pixels: Tensor, content: Tensor, scan_type: str, size: int, generator: torch.Generator, on_event: OnEvent
) -> Samples:
    """Synthesise anomalies on the normal scans (FusionMedCLIP section 3.4), for those who have no abnormal ones.

    Args:
        pixels: [k, 3, S, S] references in [0, 1].
        content: [k, S, S] bool.
        scan_type: What the scans show.
        size: Number of pictures; a quarter of them stays normal.
        generator: Draws everything.
        on_event: Hears of the progress and is shown some.
    """
    made = synthesise_scans(pixels, content, scan_type, size, generator, on_event)
    on_event(SyntheticExamples(tuple(_shown(scan) for scan in detached(made.scans[:SHOWN_EXAMPLES]))))
    masks = made.masks.cpu().float()  # [N, S, S]
    return Samples(
        pixels=made.pixels.cpu(),
        labels=masks.flatten(1).amax(dim=1),
        masks=_coarse(masks),
        is_drawn=torch.ones(len(made.scans), dtype=torch.bool),
        sources=torch.tensor([scan.sources for scan in made.scans]),
    )


def balanced_batches(labels: Tensor, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Index batches with as many normal as abnormal pictures, from shuffled passes over either.

    Args:
        labels: [n] 0 or 1; where one is missing, batches hold the other alone.
        batch_size: Even, or rounded down to it; at least 2.
        steps: Number of batches.
        generator: Shuffles.

    Yields:
        [batch_size] indices into `labels`.
    """
    kinds = [rows for label in (0, 1) if len(rows := (labels == label).nonzero()[:, 0])]
    waiting = [torch.empty(0, dtype=torch.long) for _ in kinds]
    share = max(1, batch_size // len(kinds))
    for _ in range(steps):
        taken = []
        for place, rows in enumerate(kinds):
            while len(waiting[place]) < share:
                shuffled = rows[torch.randperm(len(rows), generator=generator)]
                waiting[place] = torch.cat([waiting[place], shuffled])
            taken.append(waiting[place][:share])
            waiting[place] = waiting[place][share:]
        yield torch.cat(taken)


def _vary(layers: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, shift, zoom and mirror pictures, masks with them: [n, 4, S, S] -> the same shape."""
    n = len(layers)
    angle, zoom, right, down = (2 * torch.rand(4, n, generator=generator) - 1).unbind()  # [n] each, in [-1, 1]
    angle, zoom = torch.deg2rad(ANGLE * angle), 1 + ZOOM * zoom
    mirror = 1 - 2 * (torch.rand(n, generator=generator) < 0.5).float()
    cosine, sine = angle.cos() / zoom, angle.sin() / zoom
    rows = [cosine * mirror, -sine, 2 * SHIFT * right, sine * mirror, cosine, 2 * SHIFT * down]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(n, 2, 3), list(layers.shape), align_corners=False)
    return F.grid_sample(layers, grid, align_corners=False).clamp(0, 1)


def _coarse(masks: Tensor) -> Tensor:
    """[N, S, S] -> [N, m, m], shares."""
    return F.adaptive_avg_pool2d(masks[:, None], min(MASK_SIDE, masks.shape[-1]))[:, 0]


def _shown(scan: SyntheticScan) -> SyntheticExample:
    text = scan.anomaly.describe() if scan.anomaly else "unchanged normal scan"
    strength = scan.anomaly.describe_strength() if scan.anomaly else ""
    return SyntheticExample(scan.image, scan.mask, None, text, scan.to_dict(), strength)
