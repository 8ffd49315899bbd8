"""Embeddings of many images and texts, the work shared among the processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fmclip.contrastive.batches import TEST, PairImages, load
from fmclip.contrastive.models import PairModel
from fmclip.contrastive.pairs import text_group


@torch.no_grad()
def embed_images(
    accelerator: Any,
    model: PairModel,
    images: PairImages,
    batch_size: int,
    workers: int = 0,
    encode: Callable[[Tensor], Tensor] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Embed all images as for testing.

    Args:
        accelerator: Device, precision and the other processes.
        model: The model.
        images: The images.
        batch_size: Images at a time, in each process.
        workers: Processes that read ahead.
        encode: Other than `model.encode_images`, such as `model.image_features`.
        on_progress: Called with (images done, images in all), of this process's part.

    Returns:
        [n, D], on the CPU; in the order of the pairs, the same in each process.
    """
    model.eval()
    encode = encode or model.encode_images
    rank, world, count = accelerator.process_index, accelerator.num_processes, len(images.pairs)
    each = -(-count // world)
    own = [min(place, count - 1) for place in range(rank * each, (rank + 1) * each)]  # the last ones twice, if need be
    batches = [own[first : first + batch_size] for first in range(0, len(own), batch_size)]
    found, done = [], 0
    for batch in load(images, batches, TEST, workers=workers):
        with accelerator.autocast():
            found.append(encode(batch.pixels.to(accelerator.device)))
        done += len(batch.places)
        if on_progress is not None:
            on_progress(done, len(own))
    return accelerator.gather(torch.cat(found)).float().cpu()[:count]  # [n, D]


@torch.no_grad()
def embed_texts(
    model: PairModel, texts: Sequence[str], batch_size: int, encode: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Embed texts, equal ones once.

    Args:
        model: The model.
        texts: n texts.
        batch_size: Texts at a time.
        encode: Other than `model.encode_texts`, such as `model.text_features`.

    Returns:
        [n, D], on the CPU.
    """
    model.eval()
    encode = encode or model.encode_texts
    device = model.logit_scale.device
    first: dict[str, int] = {}
    distinct: list[str] = []
    for text in texts:
        if text_group(text) not in first:
            first[text_group(text)] = len(distinct)
            distinct.append(text)
    by_length = sorted(range(len(distinct)), key=lambda place: len(distinct[place]))  # little padding in a batch
    found: list[Tensor] = [torch.empty(0)] * len(distinct)
    for start in range(0, len(distinct), batch_size):
        places = by_length[start : start + batch_size]
        embedded = encode(model.tokens([distinct[place] for place in places]).to(device)).cpu()
        for place, row in zip(places, embedded, strict=True):
            found[place] = row
    return torch.stack([found[first[text_group(text)]] for text in texts])  # [n, D]
