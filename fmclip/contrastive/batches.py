"""Batches of a run: which pairs, in which order and how changed follows from seed, epoch and step alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fmclip.contrastive.augmentation import apply_change, draw_change, fit_image, generator_for
from fmclip.contrastive.config import AugmentConfig
from fmclip.contrastive.pairs import Pair

ORDER, IMAGE = 1, 2  # what a generator is for
TEST = -1
"""Stands for the epoch where images are not changed at random."""


@dataclass(frozen=True)
class Batch:
    """One process's part of a step.

    Attributes:
        places: Places of its pairs in the list, [n].
        pixels: [n, 3, S, S] in [0, 1].
    """

    places: Tensor
    pixels: Tensor


class PairImages(Dataset):
    """Images of pairs, changed at random for an epoch of training or fitted for testing.

    Args:
        pairs: The pairs.
        config: How images are changed.
        size: Side of the images.
        seed: Draws the changes.
    """

    def __init__(self, pairs: Sequence[Pair], config: AugmentConfig, size: int, seed: int) -> None:
        self.pairs, self.config, self.size, self.seed = pairs, config, size, seed

    def __getitem__(self, wanted: tuple[int, int]) -> tuple[int, np.ndarray]:
        """(place, epoch) -> place and [S, S, 3]; the epoch `TEST` changes nothing at random."""
        place, epoch = wanted
        scan = self.pairs[place].image.read(f"pair {place + 1}")
        if epoch == TEST:
            return place, fit_image(scan, self.size, self.config.fit)
        generator = generator_for(self.seed, IMAGE, epoch, place)
        return place, apply_change(scan, draw_change(self.config, scan.height, scan.width, generator), self.size)


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Order the pairs of an epoch into batches; pairs that fill no batch are left to another epoch's order.

    Args:
        count: Number of pairs.
        batch_size: Pairs of a batch, all processes together.
        seed: Of the run.
        epoch: Counted from 0.

    Returns:
        Batches of exactly `batch_size`, or one smaller batch where there are fewer pairs than that.
    """
    order = torch.randperm(count, generator=generator_for(seed, ORDER, epoch)).tolist()
    full = count // batch_size
    if not full:
        return [order]
    return [order[step * batch_size : (step + 1) * batch_size] for step in range(full)]


def share_of(batch: Sequence[int], rank: int, world: int) -> list[int]:
    """Return the part of a batch that one of several processes computes: consecutive pairs, as even as can be."""
    return list(batch[len(batch) * rank // world : len(batch) * (rank + 1) // world])


def load(images: PairImages, batches: Sequence[Sequence[int]], epoch: int, *, workers: int = 0) -> Iterator[Batch]:
    """Load images batch by batch.

    Args:
        images: All images.
        batches: Places of each batch.
        epoch: Draws the changes, or `TEST`.
        workers: Processes that read ahead.

    Yields:
        The batches in order.
    """
    wanted = [[(place, epoch) for place in batch] for batch in batches]
    yield from DataLoader(
        images,
        batch_sampler=wanted,
        num_workers=min(workers, len(wanted)),
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
    )


def _collate(items: list[tuple[int, np.ndarray]]) -> Batch:
    pixels = torch.from_numpy(np.stack([image for _, image in items]))  # [n, S, S, 3]
    return Batch(torch.tensor([place for place, _ in items]), pixels.permute(0, 3, 1, 2).contiguous())
