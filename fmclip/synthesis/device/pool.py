"""Many pairs at once: drawn on the CPU as `synthesis.pool` draws them, painted on the device."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fmclip.synthesis.anomaly import KINDS, TASKS, Anomaly
from fmclip.synthesis.augmentation import View, apply_view, content_box, draw_view, view_matrix
from fmclip.synthesis.device.drafts import Draft
from fmclip.synthesis.device.filters import sample
from fmclip.synthesis.device.lesions import paint_kind
from fmclip.synthesis.foreground import MIN_COLOUR, estimate_foreground
from fmclip.synthesis.pool import SyntheticScan, deal
from fmclip.synthesis.sampler import AnomalySampler, SynthesisConfig

_WORKERS = 8  # drawing is short calls of OpenCV, which let go of the interpreter


@dataclass(frozen=True, eq=False)
class DevicePool:
    """What was painted.

    Attributes:
        scans: n pairs with their records, on the CPU.
        pixels: [n, 3, S, S] in [0, 1] on the device.
        masks: [n, S, S] bool on the device.
    """

    scans: list[SyntheticScan]
    pixels: Tensor
    masks: Tensor


@dataclass(eq=False)
class _Pair:
    """One pair on its way."""

    source: int
    task: str
    rng: np.random.Generator
    view: View | None
    image: np.ndarray
    foreground: np.ndarray
    attempt: int = 0
    draft: Draft | None = None


def synthesise_on_device(
    references: Tensor,
    contents: Tensor,
    n: int,
    generator: torch.Generator,
    config: SynthesisConfig | None = None,
    *,
    hand: int | None = None,
    on_hand: Callable[[int], None] | None = None,
) -> DevicePool:
    """Make `n` training pairs, as `synthesise_pool` does with the same generator; what is seen may differ by rounding.

    Args:
        references: [k, 3, S, S] normal scans in [0, 1], on the device.
        contents: [k, S, S] bool, a rectangle of True each.
        n: Number of pairs.
        generator: Source of randomness, on the CPU.
        config: What to draw.
        hand: Pairs that are dealt and painted at a time, as by calls of `synthesise_pool` one after the other; all if
            left out.
        on_hand: Hears after each hand how many are painted; what it raises ends the painting.

    Raises:
        ValueError: There are no scans, a mask is missing, or a shape is wrong.
    """
    images, squares = _on_cpu(references, contents)
    sampler = AnomalySampler(config)
    hands = [min(hand or n, n - start) for start in range(0, n, hand or n)] if n else [0]
    donors = [estimate_foreground(image, np.ones(image.shape[:2], bool)) for image in images]

    def begin(card: tuple[int, int, int]) -> _Pair:
        task, source, seed = card
        rng = np.random.default_rng(seed)
        augmentation = sampler.config.augmentation
        view = draw_view(augmentation, rng) if augmentation else None
        image = apply_view(view, images[source], squares[source]) if view else images[source]
        foreground = estimate_foreground(image, squares[source]) if TASKS[task] != "identity" else squares[source]
        return _Pair(source, TASKS[task], rng, view, image, foreground)

    def draw(pair: _Pair) -> None:
        anomaly = sampler.attempt(pair.rng, pair.attempt, pair.image, pair.foreground, len(images), pair.task)
        donor = donors[anomaly.patch.source] if anomaly.patch else None
        pair.draft = Draft.of(anomaly, pair.foreground, donor)

    def paint(size: int, workers: ThreadPoolExecutor) -> tuple[list[_Pair], Tensor, Tensor]:
        cards = zip(*map(np.ndarray.tolist, deal(len(images), size, generator)), strict=True)
        pairs = list(workers.map(begin, cards))
        varied = _views(references, contents, [pair.source for pair in pairs], [pair.view for pair in pairs])
        pixels = varied.clone()
        masks = torch.zeros(len(pairs), *contents.shape[1:], dtype=torch.bool, device=references.device)
        waiting = [place for place, pair in enumerate(pairs) if pair.task != "identity"]
        while waiting:
            list(workers.map(draw, [pairs[place] for place in waiting]))
            rows = torch.tensor(waiting, device=references.device)
            some = [pairs[place] for place in waiting]
            drafts = [pair.draft for pair in some if pair.draft is not None]
            owners = [pair.source for pair in some]
            pixels[rows], masks[rows] = _paint(drafts, varied[rows], references, contents[owners])
            counts = masks[rows].flatten(1).sum(dim=1).tolist()
            failed = []
            for place, pair, draft, count in zip(waiting, some, drafts, counts, strict=True):
                if count < sampler.wanted_pixels(draft.anomaly, pair.attempt, pair.foreground):
                    pair.attempt += 1
                    failed.append(place)
            waiting = failed
        return pairs, pixels, masks

    done: list[tuple[list[_Pair], Tensor, Tensor]] = []
    painted = 0
    with ThreadPoolExecutor(min(_WORKERS, os.cpu_count() or 1)) as workers:
        for size in hands:
            done.append(paint(size, workers))
            painted += size
            if on_hand is not None:
                on_hand(painted)
    every, pixels, masks = zip(*done, strict=True)
    return _gather([pair for some in every for pair in some], torch.cat(pixels), torch.cat(masks))


def render(
    anomalies: Sequence[Anomaly | None],
    sources: Sequence[int],
    views: Sequence[View | None],
    references: Tensor,
    contents: Tensor,
) -> tuple[Tensor, Tensor]:
    """Paint recorded pairs: the same ones as `synthesis.replay` makes on the CPU, up to rounding.

    Args:
        anomalies: What each pair shows; None for a normal scan.
        sources: The scan that each was made from.
        views: How that was varied first.
        references: [k, 3, S, S] in [0, 1].
        contents: [k, S, S] bool.

    Returns:
        Pictures [n, 3, S, S] in [0, 1] and masks [n, S, S] bool.
    """
    images, squares = _on_cpu(references, contents)
    pixels = _views(references, contents, sources, views)
    masks = torch.zeros(len(pixels), *contents.shape[1:], dtype=torch.bool, device=references.device)
    rows, drafts = [], []
    for place, (anomaly, source, view) in enumerate(zip(anomalies, sources, views, strict=True)):
        if anomaly is None:
            continue
        image = apply_view(view, images[source], squares[source]) if view else images[source]
        patch = anomaly.patch
        donor = estimate_foreground(images[patch.source], np.ones(image.shape[:2], bool)) if patch else None
        rows.append(place)
        drafts.append(Draft.of(anomaly, estimate_foreground(image, squares[source]), donor))
    if drafts:
        owners = [sources[row] for row in rows]
        pixels[rows], masks[rows] = _paint(drafts, pixels[rows], references, contents[owners])
    return pixels, masks


def _on_cpu(references: Tensor, contents: Tensor) -> tuple[list[np.ndarray], list[np.ndarray]]:
    if len(references) == 0 or len(references) != len(contents):
        raise ValueError(
            f"need at least one scan and a content mask for each, got {len(references)} and {len(contents)}"
        )
    images = [np.ascontiguousarray(one) for one in references.permute(0, 2, 3, 1).cpu().numpy()]
    return images, list(contents.cpu().numpy())


def _views(references: Tensor, contents: Tensor, sources: Sequence[int], views: Sequence[View | None]) -> Tensor:
    """Vary scans inside their letterboxes, as `apply_view`: [n, 3, S, S]."""
    device = references.device
    originals = references[torch.tensor(sources, dtype=torch.long, device=device)]
    if not any(views):
        return originals
    squares = [content_box(one) for one in contents.cpu().numpy()]
    matrices, starts, sizes, gains = [], [], [], []
    for source, view in zip(sources, views, strict=True):
        down, across = squares[source]
        height, width = down.stop - down.start, across.stop - across.start
        drawn = view or View()
        matrix = np.linalg.inv(np.vstack([view_matrix(drawn, height, width), [0, 0, 1]]))[:2]
        if drawn.mirror:
            matrix[0] = -matrix[0]
            matrix[0, 2] += width - 1
        matrices.append(matrix)
        starts.append([down.start, across.start])
        sizes.append([height, width])
        gains.append(drawn.gain)
    back = torch.tensor(np.stack(matrices), dtype=torch.float32, device=device)[..., None, None]
    start, size = torch.tensor(starts, device=device), torch.tensor(sizes, device=device)
    place = torch.arange(references.shape[-1], device=device, dtype=torch.float32)
    y = (place - start[:, :1])[:, :, None]  # [n, S, 1]
    x = (place - start[:, 1:])[:, None]  # [n, 1, S]
    columns, rows = (back[:, axis, 0] * x + back[:, axis, 1] * y + back[:, axis, 2] for axis in (0, 1))
    moved = sample(originals, rows, columns, start, size)
    moved = (moved * torch.tensor(gains, dtype=torch.float32, device=device).view(-1, 1, 1, 1)).clamp(0, 1)
    own = contents[torch.tensor(sources, dtype=torch.long, device=device)]
    varied = torch.tensor([view is not None for view in views], device=device).view(-1, 1, 1, 1)
    return torch.where(varied & own[:, None], moved, originals)


def _paint(drafts: Sequence[Draft], pictures: Tensor, references: Tensor, contents: Tensor) -> tuple[Tensor, Tensor]:
    """Put an anomaly into each picture [n, 3, S, S], kind by kind."""
    painted, masks = pictures.clone(), torch.zeros_like(contents)
    sampled = pictures[:, :, ::4, ::4]
    coloured = (sampled.amax(dim=1) - sampled.amin(dim=1)).flatten(1).mean(dim=1) > MIN_COLOUR  # [n]
    for kind in KINDS:
        some = [place for place, draft in enumerate(drafts) if draft.anomaly.kind == kind]
        if not some:
            continue
        rows = torch.tensor(some, device=pictures.device)
        chosen = [drafts[place] for place in some]
        donors = pictures[rows]
        if chosen[0].anomaly.patch is not None:
            donors = references[[draft.anomaly.patch.source for draft in chosen if draft.anomaly.patch]]
        painted[rows], masks[rows] = paint_kind(chosen, pictures[rows], contents[rows], donors, coloured[rows])
    return painted, masks


def _gather(pairs: Sequence[_Pair], pixels: Tensor, masks: Tensor) -> DevicePool:
    images, drawn = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy(), masks.cpu().numpy()
    scans = [
        SyntheticScan(images[place], drawn[place], pair.draft.anomaly if pair.draft else None, pair.source, pair.view)
        for place, pair in enumerate(pairs)
    ]
    return DevicePool(scans, pixels, masks)
