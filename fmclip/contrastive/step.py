"""One step of contrastive training: embed, gather the negatives of all processes, loss, gradients.

Each process computes the loss of the whole batch, in which its own embeddings are live and the others are numbers; the
sum of the processes' gradients is then exactly the gradient of the whole batch. With gradient caching (GradCache, Gao
et al. 2021) embeddings are first computed without a graph, and each chunk once more with one, so that the batch may be
as large as one likes at the memory of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fmclip.contrastive.config import OptimisationConfig
from fmclip.contrastive.models import PairModel, seeded
from fmclip.losses import info_nce, siglip_loss

DROPOUT, MIXUP = 3, 4  # what a generator is for


def mixup_share(alpha: float, *numbers: int) -> float:
    """Draw the share of the first image from Beta(alpha, alpha); 1 without mixup."""
    if not alpha:
        return 1.0
    return float(np.random.default_rng(np.random.SeedSequence((*numbers, MIXUP))).beta(alpha, alpha))


def partner(values: Tensor) -> Tensor:
    """What each row [n, ...] is mixed with: the row before it, within the process's part of the batch."""
    return values.roll(1, dims=0)


def contrastive_loss(
    model: PairModel, image: Tensor, text: Tensor, groups: Tensor, config: OptimisationConfig
) -> Tensor:
    """Loss of a batch.

    Args:
        model: Holds temperature and bias.
        image: [N, D], L2-normalised.
        text: [N, D], L2-normalised.
        groups: Equal numbers for equal texts, [N].
        config: Which loss, label smoothing, whether equal texts match.

    Returns:
        Scalar.
    """
    scale = model.logit_scale.exp()  # kept within limits after each step
    same = groups if config.same_text_matches else None
    if config.loss == "siglip":
        return siglip_loss(image, text, scale, model.logit_bias, groups=same)
    return info_nce(image, text, scale, label_smoothing=config.label_smoothing, groups=same)


def mixed_loss(
    accelerator: Any,
    model: PairModel,
    image: Tensor,
    text: Tensor,
    groups: Tensor,
    share: float,
    config: OptimisationConfig,
) -> Tensor:
    """Loss of the whole batch from this process's part of it.

    Args:
        accelerator: Knows the other processes.
        model: The model.
        image: Embeddings of this process's (mixed) images, [n, D], live.
        text: Embeddings of its texts, [n, D], not mixed, live where the text half is trained.
        groups: [n].
        share: Share of the first image in a mixed one; 1 where nothing is mixed.
        config: Settings.

    Returns:
        Scalar, the same in each process.
    """
    everyone = gather(accelerator, image)

    def loss(words: Tensor, numbers: Tensor) -> Tensor:
        return contrastive_loss(model, everyone, gather(accelerator, words), gather(accelerator, numbers), config)

    if share == 1:
        return loss(text, groups)
    if config.text_mixup:
        words = F.normalize(share * text + (1 - share) * partner(text), dim=-1)
        return loss(words, groups * (2**31) + partner(groups))  # alike only where both texts are
    return share * loss(text, groups) + (1 - share) * loss(partner(text), partner(groups))


def gather(accelerator: Any, own: Tensor) -> Tensor:
    """Put this process's rows [n, ...] among those of all others, [n * processes, ...]; gradients flow into its own."""
    if accelerator.num_processes == 1:
        return own
    rows = accelerator.gather(own.detach().contiguous())
    first = accelerator.process_index * len(own)
    return torch.cat([rows[:first], own, rows[first + len(own) :]])


def backward(
    accelerator: Any,
    model: PairModel,
    pixels: Tensor,
    text: Tensor | Sequence[str],
    groups: Tensor,
    config: OptimisationConfig,
    *,
    seeds: Sequence[int],
) -> Tensor:
    """Compute the loss of a batch and leave its gradients in the parameters, summed over all processes.

    Args:
        accelerator: Device, precision and the other processes.
        model: The model.
        pixels: This process's images, [n, 3, S, S] in [0, 1], or their frozen features [n, C].
        text: Their texts, or the texts' frozen features [n, C].
        groups: Equal numbers for equal texts, [n].
        config: Settings.
        seeds: Of this step (seed, epoch, step), for mixup and dropout.

    Returns:
        Loss of the whole batch, without a graph.
    """
    share = mixup_share(config.mixup_alpha, *seeds)
    if share < 1:
        pixels = share * pixels + (1 - share) * partner(pixels)
    size = config.chunk_size or len(pixels)
    parts = [slice(first, first + size) for first in range(0, len(pixels), size)]
    words = text if isinstance(text, Tensor) else model.tokens(text).to(pixels.device)

    def embed(part: slice) -> tuple[Tensor, Tensor]:
        with seeded(*seeds, DROPOUT, accelerator.process_index, part.start), accelerator.autocast():
            return model.encode_images(pixels[part]), model.encode_texts(words[part])

    if len(parts) == 1:
        image, embedded = embed(parts[0])
        loss = mixed_loss(accelerator, model, image, embedded, groups, share, config)
        accelerator.backward(loss)
    else:
        with torch.no_grad():
            found = [embed(part) for part in parts]
        image = torch.cat([one for one, _ in found]).requires_grad_(model.image_is_trained)  # [n, D], leaves
        embedded = torch.cat([one for _, one in found]).requires_grad_(model.text_is_trained)
        loss = mixed_loss(accelerator, model, image, embedded, groups, share, config)
        accelerator.backward(loss)
        for part in parts:
            again = [
                (tensor, leaf.grad[part])
                for tensor, leaf in zip(embed(part), (image, embedded), strict=True)
                if tensor.requires_grad and leaf.grad is not None
            ]
            torch.autograd.backward([tensor for tensor, _ in again], [gradient for _, gradient in again])
    sum_gradients(accelerator, model)
    return loss.detach()


def sum_gradients(accelerator: Any, model: PairModel) -> None:
    """Add up the gradients of all processes in one message; those of temperature and bias are whole in each already."""
    if accelerator.num_processes == 1:
        return
    for weight in (model.logit_scale, model.logit_bias):
        if weight.grad is not None:
            weight.grad /= accelerator.num_processes
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    flat = torch.cat([torch.zeros_like(w).flatten() if w.grad is None else w.grad.flatten() for w in weights])
    total = accelerator.reduce(flat, reduction="sum")
    for weight, part in zip(weights, total.split([weight.numel() for weight in weights]), strict=True):
        weight.grad = part.view_as(weight).clone()
