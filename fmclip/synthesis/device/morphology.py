"""Shapes in batches of planes: distances, connected parts, closing. Figures agree with OpenCV's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_STRAIGHT, _SLANTED = 0.955, 1.3693  # steps of OpenCV's DIST_L2 with a mask of 3 x 3
_FAR = 1e6
_BETWEEN_LOOKS = 8  # rounds between two looks whether anything still changes, each of which waits for the device


def distance_to_false(mask: Tensor, inside: Tensor) -> Tensor:
    """Distance of each place to the nearest False of its plane (`cv2.distanceTransform`, DIST_L2, 3).

    Args:
        mask: [B, H, W] bool.
        inside: [B, H, W] bool; what lies outside counts neither as True nor as False.

    Returns:
        [B, H, W] in pixels; very large where a plane has no False.
    """
    far = torch.where(mask | ~inside, _FAR, 0.0)[:, None]  # [B, 1, H, W]
    height, width = far.shape[-2:]
    steps = [(1, 0, _STRAIGHT), (0, 1, _STRAIGHT), (1, 1, _SLANTED), (1, -1, _SLANTED)]
    while True:
        before = far
        for _ in range(_BETWEEN_LOOKS):
            framed = F.pad(far, (1, 1, 1, 1), value=_FAR)
            near = far
            for down, across, cost in steps:
                for sign in (1, -1):
                    top, left = 1 + sign * down, 1 + sign * across
                    near = torch.minimum(near, framed[..., top : top + height, left : left + width] + cost)
            far = torch.where(inside[:, None], near, _FAR)
        if torch.equal(before, far):
            return far[:, 0]


def label_parts(mask: Tensor) -> Tensor:
    """Number the connected parts of each plane (neighbours up, down, left and right).

    Args:
        mask: [B, H, W] bool.

    Returns:
        [B, H, W]: at each True place the largest place (row * W + column) of its part, elsewhere -1.
    """
    B, H, W = mask.shape
    places = torch.arange(H * W, device=mask.device).view(1, H, W)
    labels = torch.where(mask, places, -1)
    while True:
        before = labels
        for _ in range(_BETWEEN_LOOKS):
            framed = F.pad(labels, (1, 1, 1, 1), value=-1)
            for neighbour in (framed[:, 2:, 1:-1], framed[:, :-2, 1:-1], framed[:, 1:-1, 2:], framed[:, 1:-1, :-2]):
                labels = torch.where(mask, torch.maximum(labels, neighbour), -1)
            flat = labels.flatten(1)
            further = flat.gather(1, flat.clamp_min(0))  # a part's far end is known to all who know a place on the way
            labels = torch.where(mask, torch.maximum(further.view(B, H, W), labels), -1)
        if torch.equal(before, labels):
            return labels


def part_sizes(labels: Tensor) -> Tensor:
    """Places of the part that each place belongs to: [B, H, W] from `label_parts` -> [B, H, W], 0 outside."""
    flat = labels.flatten(1)
    counts = torch.zeros_like(flat).scatter_add_(1, flat.clamp_min(0), (flat >= 0).to(flat.dtype))
    return (counts.gather(1, flat.clamp_min(0)) * (flat >= 0)).view(labels.shape)


def fill_holes(mask: Tensor) -> Tensor:
    """Fill what the outside does not reach: [B, H, W] bool, whose outermost ring is False."""
    labels = label_parts(~mask)
    return labels != labels[:, :1, :1]


def close_with(mask: Tensor, spans: Tensor) -> Tensor:
    """Morphological closing with an element of each plane's own size.

    Args:
        mask: [B, H, W] bool, False on a frame as wide as the element reaches.
        spans: [B, 2 * r + 1] half width of the element's rows from -r to r; -1 where it has none.

    Returns:
        [B, H, W] bool.
    """
    return ~_dilate(~_dilate(mask, spans), spans)  # the element is symmetric


def _dilate(mask: Tensor, spans: Tensor) -> Tensor:
    B, H, W = mask.shape
    reach = spans.shape[1] // 2
    counts = F.pad(mask.to(torch.int32).cumsum(dim=2), (1, 0)).to(torch.int32)  # [B, H, W + 1]
    columns = torch.arange(W, device=mask.device)
    grown = torch.zeros_like(mask)
    for row in range(-reach, reach + 1):
        span = spans[:, row + reach, None]  # [B, 1]
        last = (columns + span + 1).clamp(0, W)  # [B, W]
        first = (columns - span).clamp(0, W)
        hit = counts.gather(2, last[:, None].expand(B, H, W)) > counts.gather(2, first[:, None].expand(B, H, W))
        hit &= (span >= 0)[..., None]
        if row < 0:
            grown[:, -row:] |= hit[:, :row]
        elif row > 0:
            grown[:, :-row] |= hit[:, row:]
        else:
            grown |= hit
    return grown
