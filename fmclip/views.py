"""The ways in which the patch memory looks at features, and how their distances are weighed together.

Each kind, weight and reach was chosen on the tuning half (benchmarks/NOTES.md):

- *direction*: channels standardised at each place, unit length; blind to gain and contrast, which vary among normal
  scans of mixed origin.
- *energy*: the plain features; sees echo-poor, flat regions.
- *mirror*: the direction minus the most alike direction around the place on the other side of the scan. Bodies are
  nearly symmetric and lesions seldom are. Normal asymmetry (the heart, a liver) is in the reference scans too, so the
  memory knows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fmclip.devices import constant
from fmclip.errors import TowerError


@dataclass(frozen=True)
class View:
    """One way to look at one level.

    Attributes:
        level: Index into the tower's levels.
        kind: "direction", "energy" or "mirror".
        weight: Share in the weighted mean of the distances; need not sum to 1.
    """

    level: int
    kind: Literal["direction", "energy", "mirror"]
    weight: float = 1.0


def default_views(grids: Sequence[tuple[int, int]], levels: Sequence[int] = ()) -> tuple[View, ...]:
    """Choose views for a tower.

    The direction of each of `levels`, or of each level at least half as fine as the finest; the energy of the deepest
    of these, which counts as much as its direction and twice as much as the others'; and the mirror view of the
    deepest, which counts as much as all the others together.

    Args:
        grids: (H_j, W_j) of each level, shallow to deep.
        levels: Indices into `grids`.

    Returns:
        The mirror view last.

    Raises:
        TowerError: The tower has no such level.
    """
    if any(not 0 <= level < len(grids) for level in levels):
        raise TowerError(f"The tower has the levels 0 to {len(grids) - 1}; choose among them.")
    finest = max(rows for rows, _ in grids)
    *others, deepest = sorted(set(levels)) or [level for level, (rows, _) in enumerate(grids) if 2 * rows >= finest]
    appearance = [
        *(View(level, "direction") for level in others),
        View(deepest, "direction", 2.0),
        View(deepest, "energy", 2.0),
    ]
    return (*appearance, View(deepest, "mirror", sum(view.weight for view in appearance)))


def view_features(features: Sequence[Tensor], views: Sequence[View]) -> list[Tensor]:
    """Features of each view on the coarsest of the views' grids.

    Args:
        features: One [B, C_j, H_j, W_j] for each level of the tower.
        views: V views.

    Returns:
        One [B, C_v, h, w] for each view.
    """
    h, w = min(tuple(features[view.level].shape[-2:]) for view in views)
    found = []
    for view in views:
        look = features[view.level] if view.kind == "energy" else _direction(features[view.level])
        look = F.adaptive_avg_pool2d(look, (h, w))
        found.append(look - mirror_match(look) if view.kind == "mirror" else look)
    return found


def mirror_match(look: Tensor) -> Tensor:
    """Most alike features around the mirrored place, left and right exchanged: [B, C, h, w] -> [B, C, h, w].

    The search around the mirrored place allows for a midline that is not in the middle, and for slanting heads.
    """
    h, w = look.shape[-2:]
    down, across = _reach(h, w)
    padded = F.pad(look.flip(3), (across, across, down, down), mode="replicate")
    nearest = look.new_full((look.shape[0], 1, h, w), torch.inf)
    match = torch.zeros_like(look)
    for top in range(2 * down + 1):
        for left in range(2 * across + 1):
            other = padded[:, :, top : top + h, left : left + w]
            distance = (look - other).detach().square().sum(dim=1, keepdim=True)  # [B, 1, h, w]
            match = torch.where(distance < nearest, other, match)
            nearest = torch.minimum(distance, nearest)
    return match


def weigh(distances: Tensor, views: Sequence[View]) -> Tensor:
    """Weighted mean of the views' distances: [B, V, h, w] -> [B, h, w].

    Near the midline a place is its own mirror image and its mirror view says nothing; there the mean of the other
    views stands in for it.
    """
    appearance = [index for index, view in enumerate(views) if view.kind != "mirror"]
    weights = constant(tuple(view.weight for view in views), distances.device, distances.dtype).view(-1, 1, 1)
    rows = constant(tuple(appearance), distances.device, torch.long)
    mean = (distances * weights)[:, rows].sum(dim=1) / weights[rows].sum()  # [B, h, w]
    if len(appearance) == len(views):
        return mean
    middle = midline(distances.shape[-2], distances.shape[-1], distances.device)  # [w]
    informed = torch.where(middle & _is_mirror(views, distances.device), mean[:, None], distances)
    return (informed * weights).sum(dim=1) / weights.sum()


def midline(h: int, w: int, device: torch.device | None = None) -> Tensor:
    """Columns of a grid (h, w) that are their own mirror image within the search: [w] bool."""
    columns = torch.arange(w, device=device)
    return (2 * columns - (w - 1)).abs() < 2 * _reach(h, w)[1]


def _direction(features: Tensor) -> Tensor:
    centred = features - features.mean(dim=1, keepdim=True)
    return F.normalize(centred, dim=1, eps=1e-6)  # [B, C, H, W]; unit length takes the deviation out too


def _reach(h: int, w: int) -> tuple[int, int]:
    """Places searched up and down, left and right of the mirrored place."""
    return max(1, round(h / 14)), max(1, round(w / 7))


def _is_mirror(views: Sequence[View], device: torch.device) -> Tensor:
    return torch.tensor([view.kind == "mirror" for view in views], device=device).view(-1, 1, 1)  # [V, 1, 1]
