"""The ways in which the patch memory looks at features, and how their distances are weighed together.

Each kind, weight and reach was chosen on the tuning half (benchmarks/NOTES.md):

- *direction*: channels standardised at each place, unit length; blind to gain and contrast, which vary among normal
  scans of mixed origin.
- *mirror*: the direction minus the most alike direction around the place on the other side of the scan. Bodies are
  nearly symmetric and lesions seldom are. Normal asymmetry (the heart, a liver) is in the reference scans too, so the
  memory knows it.
- *context*: the direction minus the mean of the most alike directions elsewhere in the same scan. Tissue of a kind
  returns within a scan; what has nothing like it around is odd, however scanners and settings differ between scans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fmclip.devices import constant
from fmclip.errors import TowerError

if TYPE_CHECKING:
    from fmclip.towers import Tower


@dataclass(frozen=True)
class View:
    """One way to look at one level.

    Attributes:
        level: Index into the tower's levels.
        kind: "direction", "context" or "mirror".
        weight: Share in the weighted mean of the distances that says *whether* a scan deviates; need not sum to 1.
        map_weight: The same for the mean that says *where*.
    """

    level: int
    kind: Literal["direction", "context", "mirror"]
    weight: float = 1.0
    map_weight: float = 1.0

    @property
    def is_learned_from(self) -> bool:
        """Whether alignment adapters read its residuals: it looks at the patch alone, and the score is made of it."""
        return self.kind == "direction" and self.weight > 0


def tower_views(tower: Tower, levels: Sequence[int] = ()) -> tuple[View, ...]:
    """Choose views for a tower, see `default_views`."""
    return default_views(len(tower.layers), levels, looks_ahead=tower.looks_ahead)


def default_views(n_levels: int, levels: Sequence[int] = (), *, looks_ahead: bool = False) -> tuple[View, ...]:
    """Choose views for so many levels.

    Context and mirror at the shallowest and at the deepest level; direction at those in between and, an eighth of it,
    at the deepest (all of it where there are none in between). Direction, context and mirror count a third each.

    Where is said by the views above the shallowest level, if there are any: the shallow ones tell odd scans from normal
    ones, but light up at edges far from the lesion too. A level that looks ahead (`towers.ahead`) is asked for its
    direction, and only where: it counts as much as the directions in between.

    Args:
        n_levels: Levels of the tower.
        levels: Which of them, 0 the shallowest; none takes all.
        looks_ahead: Whether the deepest of all levels looks ahead; beside no other it is a level like any.

    Returns:
        The views: directions, then contexts, then mirrors, each from shallow to deep.

    Raises:
        TowerError: The tower has no such level.
    """
    if any(not 0 <= level < n_levels for level in levels):
        raise TowerError(f"The tower has the levels 0 to {n_levels - 1}; choose among them.")
    chosen = sorted(set(levels)) or list(range(n_levels))
    ahead = [chosen.pop()] if looks_ahead and len(chosen) > 1 and chosen[-1] == n_levels - 1 else []
    *others, deepest = chosen
    ends = [*others[:1], deepest]

    def view(level: int, kind: Literal["direction", "context", "mirror"], weight: float = 1.0) -> View:
        return View(level, kind, weight, weight if level > chosen[0] or len(chosen) == 1 else 0.0)

    between = 1.75 if others[1:] else float(len(ends))  # what the directions in between count together
    return (
        *(view(level, "direction", between / len(others[1:])) for level in others[1:]),
        view(deepest, "direction", 0.25 if others[1:] else between),
        *(View(level, "direction", 0.0, between) for level in ahead),
        *(view(level, "context") for level in ends),
        *(view(level, "mirror") for level in ends),
    )


def levels_needed(views: Sequence[View]) -> int:
    """How many levels of a tower the views read, from the shallowest on."""
    return 1 + max(view.level for view in views)


def view_features(features: Sequence[Tensor], views: Sequence[View]) -> list[Tensor]:
    """Features of each view on the coarsest of the views' grids.

    Args:
        features: One [B, C_j, H_j, W_j] for each level of the tower, at least the first `levels_needed`.
        views: V views.

    Returns:
        One [B, C_v, h, w] for each view.
    """
    h, w = min(tuple(features[view.level].shape[-2:]) for view in views)
    found = []
    for view in views:
        look = _direction(features[view.level])
        look = look if look.shape[-2:] == (h, w) else F.adaptive_avg_pool2d(look, (h, w))
        match = _MATCHES.get(view.kind)
        found.append(look - match(look) if match else look)
    return found


def context_match(look: Tensor) -> Tensor:
    """Mean of the most alike features elsewhere in the same scan: [B, C, h, w] -> [B, C, h, w].

    A twentieth of the places is averaged, so that a lesion of a few patches does not explain itself; the neighbours of
    a place, which overlap it, are taken only where there is nothing else.
    """
    h, w = look.shape[-2:]
    patches = look.flatten(2).transpose(1, 2)  # [B, h * w, C]
    places = torch.arange(h * w, device=look.device)
    rows, columns = places // w, places % w
    down, across = (max(1, round(side / 14)) for side in (h, w))
    beside = ((rows - rows[:, None]).abs() <= down) & ((columns - columns[:, None]).abs() <= across)  # [h * w, h * w]
    seen = patches.detach()
    distances = torch.cdist(seen, seen)  # [B, h * w, h * w]
    last = 1 + distances.amax(dim=(1, 2), keepdim=True)
    distances = distances + last * beside.to(distances)
    nearest = distances.topk(max(1, round(h * w / 20)), dim=2, largest=False).indices  # [B, h * w, n]
    share = torch.zeros_like(distances).scatter(2, nearest, 1 / nearest.shape[2])
    return (share @ patches).transpose(1, 2).view_as(look)


def mirror_match(look: Tensor) -> Tensor:
    """Most alike features around the mirrored place, left and right exchanged: [B, C, h, w] -> [B, C, h, w].

    The search around the mirrored place allows for a midline that is not in the middle, and for slanting heads.
    """
    h, w = look.shape[-2:]
    down, across = _reach(h, w)
    around = (across, across, down, down)
    seen = F.pad(look.detach().flip(3), around, mode="replicate")
    places = torch.arange(h * w, device=look.device, dtype=look.dtype).view(1, 1, h, w).flip(3)
    places = F.pad(places, around, mode="replicate").long()[0, 0]
    nearest = look.new_full((look.shape[0], h, w), torch.inf)
    match = torch.zeros_like(nearest, dtype=torch.long)  # [B, h, w], place of the most alike
    for top in range(2 * down + 1):
        for left in range(2 * across + 1):
            rows, columns = slice(top, top + h), slice(left, left + w)
            distance = (look.detach() - seen[:, :, rows, columns]).square().sum(dim=1)  # [B, h, w]
            match = torch.where(distance < nearest, places[rows, columns], match)
            nearest = torch.minimum(distance, nearest)
    return look.flatten(2).gather(2, match.flatten(1)[:, None].expand(-1, look.shape[1], -1)).view_as(look)


def weigh(distances: Tensor, views: Sequence[View]) -> Tensor:
    """Weighted mean of the views' distances that says *whether* a scan is odd: [B, V, h, w] -> [B, h, w].

    Near the midline a place is its own mirror image and its mirror view says nothing; there the mean of the other
    views stands in for it.
    """
    return _weigh(distances, views, [view.weight for view in views])


def weigh_places(distances: Tensor, views: Sequence[View]) -> Tensor:
    """Weighted mean of the views' distances that says *where* a scan is odd: [B, V, h, w] -> [B, h, w]."""
    return _weigh(distances, views, [view.map_weight for view in views])


def _weigh(distances: Tensor, views: Sequence[View], shares: Sequence[float]) -> Tensor:
    asked = [row for row, share in enumerate(shares) if share > 0]
    others = tuple(place for place, row in enumerate(asked) if views[row].kind != "mirror")
    distances = distances[:, constant(tuple(asked), distances.device, torch.long)]
    weights = constant(tuple(shares[row] for row in asked), distances.device, distances.dtype).view(-1, 1, 1)
    rows = constant(others, distances.device, torch.long)
    mean = (distances * weights)[:, rows].sum(dim=1) / weights[rows].sum()  # [B, h, w]
    if len(others) == len(asked):
        return mean
    middle = midline(distances.shape[-2], distances.shape[-1], distances.device)  # [w]
    is_mirror = constant(tuple(views[row].kind == "mirror" for row in asked), distances.device, torch.bool)
    informed = torch.where(middle & is_mirror.view(-1, 1, 1), mean[:, None], distances)
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


_MATCHES = {"context": context_match, "mirror": mirror_match}
"""What a view takes off the direction."""
