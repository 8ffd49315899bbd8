"""Losses: focal and dice of the anomaly map, InfoNCE and SigLIP of image-text pairs.

FusionMedCLIP section 3.5, Eq. 14 to 16: L = w_img * focal(max S_a, y) + w_seg * dice(S_a, Y). Those two take
probabilities, since S_a already is a softmax over {normal, abnormal}. The contrastive
losses take embeddings (Eq. 1, 2).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def image_score(maps: Tensor, top: float = 0.0) -> Tensor:
    """Image score of an anomaly map: its maximum, or a smooth maximum (Eq. 15).

    Args:
        maps: Anomaly probabilities S_a, [B, H, W].
        top: Share of the pixels whose mean is the score; 0 takes the single highest one. A small share gives
            gradients to the whole lesion and is less easily led by one patch.

    Returns:
        [B], same dtype.

    Raises:
        ValueError: If the shape is wrong or `top` is not in [0, 1].
    """
    if maps.ndim != 3:
        raise ValueError(f"maps must be [B, H, W], got {list(maps.shape)}")
    if not 0 <= top <= 1:
        raise ValueError(f"top is a share of the pixels in [0, 1], got {top}")
    flat = maps.flatten(1)  # [B, H * W]
    count = max(1, round(top * flat.shape[1]))
    return flat.topk(count, dim=1).values.mean(dim=1)  # [B]


def focal_loss(score: Tensor, target: Tensor, *, gamma: float = 2.0, alpha: float | None = None) -> Tensor:
    """Binary focal loss on probabilities, -(1 - p_t) ** gamma * log(p_t), averaged over all elements (Eq. 15).

    Args:
        score: Probability of abnormal in [0, 1], any shape, e.g. `image_score(maps)` [B].
        target: 1 for abnormal and 0 for normal, same shape, any dtype.
        gamma: Focus on the hard examples; 0 gives cross-entropy.
        alpha: Weight of the abnormal class, 1 - alpha that of the normal one; None weighs both with 1.

    Returns:
        Scalar, same dtype as `score`.

    Raises:
        ValueError: If the shapes differ or are empty, `gamma` is negative, or `alpha` is not in [0, 1].
    """
    _check_pair("score", score, "target", target)
    if gamma < 0 or (alpha is not None and not 0 <= alpha <= 1):
        raise ValueError(f"focal loss needs gamma >= 0 and alpha in [0, 1], got {gamma} and {alpha}")
    truth = target.to(score.dtype)
    right = score * truth + (1 - score) * (1 - truth)  # p_t, the probability of the true class
    floor = torch.finfo(score.dtype).eps  # keeps the logarithm finite
    loss = -((1 - right).clamp_min(0) ** gamma) * right.clamp_min(floor).log()
    if alpha is not None:
        loss = loss * (alpha * truth + (1 - alpha) * (1 - truth))
    return loss.mean()


def dice_loss(maps: Tensor, masks: Tensor, *, smooth: float = 1.0) -> Tensor:
    """Binary dice loss, 1 - (2 * sum(S Y) + smooth) / (sum(S) + sum(Y) + smooth), averaged over the batch (Eq. 16).

    A normal scan (empty mask) asks for an empty map: `smooth` keeps its loss finite and its gradient alive.

    Args:
        maps: Anomaly probabilities S_a, [B, H, W].
        masks: Ground truth Y, 0 or 1, [B, H, W], any dtype.
        smooth: Pixels added to numerator and denominator.

    Returns:
        Scalar, same dtype as `maps`; in [0, 1] for probabilities.

    Raises:
        ValueError: If the shapes are not [B, H, W], differ or are empty, or `smooth` is not above 0.
    """
    _check_pair("maps", maps, "masks", masks)
    if maps.ndim != 3:
        raise ValueError(f"maps and masks must be [B, H, W], got {list(maps.shape)}")
    if smooth <= 0:
        raise ValueError(f"smooth must be above 0, got {smooth}: normal scans have empty masks")
    # half precision cannot count the pixels of a map: sums are taken in float32 at least
    wide = torch.promote_types(maps.dtype, torch.float32)
    predicted, truth = maps.flatten(1).to(wide), masks.flatten(1).to(wide)  # [B, H * W]
    overlap = (predicted * truth).sum(dim=1)  # [B]
    total = predicted.sum(dim=1) + truth.sum(dim=1)  # [B]
    loss = 1 - (2 * overlap + smooth) / (total + smooth)
    return loss.mean().to(maps.dtype)


def _check_pair(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name} must have one shape, got {list(value.shape)} and {list(other.shape)}"
        )
    if value.numel() == 0:
        raise ValueError(f"{name} and {other_name} are empty")
    if not value.is_floating_point():
        raise ValueError(f"{name} must hold floating-point numbers, got {value.dtype}")


def info_nce(
    image: Tensor, text: Tensor, scale: Tensor, *, label_smoothing: float = 0.0, groups: Tensor | None = None
) -> Tensor:
    """Symmetric contrastive loss over all pairs of a batch (CLIP; FusionMedCLIP Eq. 2).

    Args:
        image: Image embeddings [N, D], L2-normalised; row i belongs to row i of `text`.
        text: Text embeddings [N, D], L2-normalised.
        scale: Scalar, 1 / temperature.
        label_smoothing: Share of the target that is spread over the whole batch, in [0, 1) (Table A2).
        groups: Whole numbers [N]; rows with the same number match each other as well (a sentence that stands below
            several images), and share the target equally. None: each row matches itself alone.

    Returns:
        Scalar, same dtype as `image`.

    Raises:
        ValueError: If the shapes differ or are empty.
    """
    _check_embeddings(image, text)
    logits = scale * image @ text.mT  # [N, N]
    if groups is None:
        target = torch.arange(len(logits), device=logits.device)  # [N]
    else:
        same = (groups[:, None] == groups[None, :]).to(logits.dtype)  # [N, N]
        target = same / same.sum(dim=1, keepdim=True)  # [N, N], symmetric: rows of a group have one count
    rows = F.cross_entropy(logits, target, label_smoothing=label_smoothing)
    columns = F.cross_entropy(logits.mT, target, label_smoothing=label_smoothing)
    return (rows + columns) / 2


def siglip_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, *, groups: Tensor | None = None) -> Tensor:
    """Sigmoid loss: each of the N x N pairs is a yes or no of its own (SigLIP, Zhai et al. 2023).

    Args:
        image: Image embeddings [N, D], L2-normalised; row i belongs to row i of `text`.
        text: Text embeddings [N, D], L2-normalised.
        scale: Scalar, 1 / temperature.
        bias: Scalar added to every logit; starts low, since most pairs do not match.
        groups: As for `info_nce`.

    Returns:
        Scalar, the sum over all pairs divided by N, same dtype as `image`.

    Raises:
        ValueError: If the shapes differ or are empty.
    """
    _check_embeddings(image, text)
    numbers = torch.arange(len(image), device=image.device) if groups is None else groups  # [N]
    sign = (numbers[:, None] == numbers[None, :]).to(image.dtype) * 2 - 1  # [N, N]: 1 where they match, else -1
    return -F.logsigmoid(sign * (scale * image @ text.mT + bias)).sum() / len(image)


def _check_embeddings(image: Tensor, text: Tensor) -> None:
    _check_pair("image embeddings", image, "text embeddings", text)
    if image.ndim != 2:
        raise ValueError(f"embeddings must be [N, D], got {list(image.shape)}")
