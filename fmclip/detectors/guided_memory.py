"""Guided memory: the patch memory, helped by what tells the patches of a few abnormal scans from normal ones.

Open-set supervised anomaly detection (Ding et al., Catching Both Gray and Black Swans, CVPR 2022): the abnormal scans
at hand do not show all that the next one may have. So the distance to the references goes on counting, and what was
learned from the abnormal scans moves a score by about half of the references' spread for each of its own deviations,
and never by more than `MOST` of these.

What is learned is a linear discriminant (Fisher 1936) of the patches of each view that the memory scores, their
log-odds added up: in closed form, so that it takes a second or so and the references can be scored by discriminants
that have not seen them. Where masks are drawn they say which patches are abnormal, and the discriminant helps to place;
elsewhere those that the memory finds oddest stand in, and it says only whether. Figures are in benchmarks/NOTES.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fmclip.detectors.base import Prediction, batched_features, setting, to_pixels
from fmclip.detectors.events import OnEvent, Ready
from fmclip.detectors.evidence import MEMORY_SPREAD, SHARPNESS, TAIL, Evidence, image_scores, predictions, to_unit
from fmclip.detectors.log_odds import highest_mean, inside_only
from fmclip.detectors.patch_memory import PatchMemory, PatchMemoryConfig
from fmclip.detectors.samples import mask_squares
from fmclip.detectors.trained import N_ABNORMALS
from fmclip.errors import CheckpointError, ReferenceSetError
from fmclip.maps import smooth_inside
from fmclip.memory import ReferenceMemory
from fmclip.patch_grid import grid_of, patch_content
from fmclip.prediction_interval import spread_of
from fmclip.scans import Scan
from fmclip.views import levels_needed, view_features
from fmclip.whitening import shrunk

FOLDS = 4  # discriminants that score the scans they were learned from, each without a share of them
GUESSED = 0.05  # share of the places that stand in for a mask that nobody drew
MOST = 10.0  # deviations of the references' log-odds up to which the guide is followed


@dataclass(frozen=True)
class GuidedMemoryConfig(PatchMemoryConfig):
    """Settings; those of the guide were chosen on the tuning half, for 4 and 16 scans of either kind."""

    guidance: float = setting(0.5, "weight of what the abnormal scans teach beside the memory's score, 0 to 2")
    map_guidance: float = setting(0.1, "log-odds of the map for a deviation of what they teach, 0 to 2")
    guide_shrinkage: float = setting(0.5, "isotropic share of the covariance of the discriminants, above 0 up to 1")

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ValueError: A setting is out of its range.
        """
        super().__post_init__()
        if not (0 <= self.guidance <= 2 and 0 <= self.map_guidance <= 2 and 0 < self.guide_shrinkage <= 1):
            raise ValueError("guidance and map_guidance lie between 0 and 2, guide_shrinkage above 0 and up to 1")


@dataclass(frozen=True, eq=False)
class Guide:
    """Log-odds of "abnormal" of a patch, and what they mean.

    Attributes:
        weights: For each view that the memory scores [C_v].
        offset: [], added to the products.
        level: [], mean over the references of their highest log-odds, each by a guide that has not seen it.
        spread: [], standard deviation of these, within normal and abnormal scans.
        unit: [], standard deviation of the log-odds of the memory's scores of the references.
        drawn: [], share of the abnormal scans whose mask is known.
    """

    weights: tuple[Tensor, ...]
    offset: Tensor
    level: Tensor
    spread: Tensor
    unit: Tensor
    drawn: Tensor

    @classmethod
    def learn(cls, normal: Sequence[Tensor], abnormal: Sequence[Tensor], shrinkage: float) -> Guide:
        """Learn from patches, one [N, C_v] and one [M, C_v] for each view; the level is 0 and the spread 1 yet."""
        weights, offsets = [], []
        for own, other in zip(normal, abnormal, strict=True):
            centres = own.mean(dim=0), other.mean(dim=0)
            within = (_covariance(own, centres[0]) + _covariance(other, centres[1])) / 2
            weight = torch.linalg.solve(shrunk(within, shrinkage), centres[1] - centres[0])
            weights.append(weight)
            offsets.append(-(centres[0] + centres[1]) @ weight / 2)
        one, none = torch.ones_like(offsets[0]), torch.zeros_like(offsets[0])
        return cls(tuple(weights), torch.stack(offsets).sum(), none, one, one, none)

    def log_odds(self, looks: Sequence[Tensor]) -> Tensor:
        """Of every patch: one [B, C_v, h, w] for each view -> [B, h, w]."""
        products = [torch.einsum("bchw,c->bhw", look, own) for look, own in zip(looks, self.weights, strict=True)]
        return torch.stack(products).sum(dim=0) + self.offset

    def deviations(self, log_odds: Tensor) -> Tensor:
        """How many deviations above the references, up to `MOST` either way; any shape."""
        return ((log_odds - self.level) / self.spread).clamp(-MOST, MOST)


class GuidedMemory(PatchMemory):
    """See the module.

    Attributes:
        guide_: What the abnormal scans taught, after `fit`.
    """

    name = "guided_memory"
    config_class = GuidedMemoryConfig
    title = "Guided memory"
    summary = "The patch memory, and what tells your abnormal scans from the normal ones. Answers within seconds."
    uses_abnormals = "required"

    guide_: Guide

    @torch.no_grad()
    def fit(
        self,
        normals: Sequence[Scan],
        abnormals: Sequence[Scan] | None = None,
        *,
        abnormal_masks: Sequence[np.ndarray | None] | None = None,
        on_event: OnEvent | None = None,
    ) -> GuidedMemory:
        """Remember the patches of the references, then learn what tells those of the abnormal scans from them."""
        normals, on_event = self._begin(normals, on_event)
        if not abnormals:
            raise ReferenceSetError(
                f"{self.name} learns from abnormal scans too: give some beside the normal ones, or choose a method "
                "that needs none."
            )
        squares, is_drawn = mask_squares(abnormals, abnormal_masks, self.tower)
        memory, distances, content, features = self._remember(normals, on_event)
        pixels, other_content, _ = to_pixels(abnormals, self.tower)
        other_features = batched_features(self.tower, pixels, levels_needed(memory.views))
        evidence = self._evidence(memory, distances, content)
        odd = self._evidence(memory, memory.compare(other_features)[0], other_content)
        chosen = _abnormal_places(squares.to(pixels), is_drawn.to(pixels.device), odd, other_content)  # [a, h, w]
        guide, log_odds = self._learn_guide(
            _scored_views(features, memory), _scored_views(other_features, memory), chosen, content, other_content
        )
        scores = to_unit(image_scores(evidence.maps())).tolist()
        unit = torch.tensor(spread_of(scores, MEMORY_SPREAD)).to(guide.spread)
        self.guide_ = replace(guide, unit=unit, drawn=is_drawn.float().mean().to(guide.spread))
        self._settle(memory, self._guided(evidence, log_odds, content))
        self.n_abnormals_ = len(abnormals)
        on_event(Ready("guided memory", self))
        return self

    def _learn_guide(
        self, looks: list[Tensor], others: list[Tensor], chosen: Tensor, content: Tensor, other_content: Tensor
    ) -> tuple[Guide, Tensor]:
        """Learn from all, and by guides that have not seen them what is normal for the references.

        Args:
            looks: What the views see of the references, one [k, C_v, h, w] for each.
            others: The same of the abnormal scans, [a, C_v, h, w].
            chosen: [a, h, w] bool, which of their patches are abnormal.
            content: [k, S, S] bool, of the references.
            other_content: [a, S, S] bool.

        Returns:
            The guide; log-odds of the references [k, h, w], each by one that has not seen it.
        """
        inside = patch_content(content, grid_of(chosen))  # [k, h, w]

        def learn(own: Tensor, other: Tensor) -> Guide:
            normal = [_patches(look[own], inside[own]) for look in looks]
            abnormal = [_patches(look[other], chosen[other]) for look in others]
            return Guide.learn(normal, abnormal, self.config.guide_shrinkage)

        k, a = torch.arange(len(content)), torch.arange(len(other_content))
        guide = learn(k, a)
        unseen = _by_folds(looks, k, lambda rest: learn(rest, a))  # [k, h, w]
        highest = self._highest(unseen, content)
        squares = (highest - highest.mean()).square().sum()
        freedom = len(k) - 1
        if len(a) > 1:
            other = self._highest(_by_folds(others, a, lambda rest: learn(k, rest)), other_content)
            squares, freedom = squares + (other - other.mean()).square().sum(), freedom + len(a) - 1
        spread = (squares / freedom).sqrt().clamp_min(1e-6)
        return replace(guide, level=highest.mean(), spread=spread), unseen

    def _highest(self, log_odds: Tensor, content: Tensor) -> Tensor:
        """Mean of the highest log-odds of each scan, smoothed as the memory's evidence is: [B, h, w] -> [B]."""
        inside = patch_content(content, grid_of(log_odds)).to(log_odds)
        return highest_mean(inside_only(smooth_inside(log_odds, inside, self.config.smoothing), content), TAIL)

    def _guided(self, evidence: Evidence, log_odds: Tensor, content: Tensor) -> Evidence:
        """Evidence of the memory as the guide's log-odds [B, h, w] change it."""
        guide, config = self.guide_, self.config
        whole = guide.unit * config.guidance * guide.deviations(self._highest(log_odds, content))  # [B]
        inside = patch_content(content, grid_of(log_odds)).to(log_odds)
        places = smooth_inside(guide.deviations(log_odds), inside, config.map_smoothing)  # [B, h, w]
        places = guide.drawn * config.map_guidance * places
        scored = evidence.scored * (whole / SHARPNESS).exp()[:, None, None]
        return Evidence(scored, evidence.placed * (places / SHARPNESS).exp())

    @torch.no_grad()
    def predict(self, scans: Sequence[Scan]) -> list[Prediction]:
        """Score and map each scan by the memory as the guide changes it."""
        found: list[Prediction] = []
        for pixels, content, boxes in self._batches(scans):
            remembered, log_odds = self._look(pixels, content)
            maps = self._guided(remembered, log_odds, content).maps()
            inside = patch_content(content, grid_of(log_odds))
            taught = (self.guide_.deviations(log_odds) / SHARPNESS).exp() * inside  # shown as a probability
            found += predictions(
                {"patch memory": remembered.maps(), "abnormal scans": taught}, maps, boxes, self.tower.image_size
            )
        return found

    def _answer(self, pixels: Tensor, content: Tensor, own: Tensor | None = None) -> Tensor:
        remembered, log_odds = self._look(pixels, content, own)
        return self._guided(remembered, log_odds, content).maps()

    def _look(self, pixels: Tensor, content: Tensor, own: Tensor | None = None) -> tuple[Evidence, Tensor]:
        """Evidence of the memory and log-odds of the guide, [B, h, w]."""
        features = self.patch_features(pixels)
        distances, _ = self.memory_.compare(features, own)  # [B, V, h, w]
        log_odds = self.guide_.log_odds(_scored_views(features, self.memory_))
        return self._evidence(self.memory_, distances, content), log_odds

    def state(self) -> dict[str, Tensor]:
        """The memory's, and the guide."""
        guide = {f"guide.{name}": getattr(self.guide_, name).cpu() for name in _NUMBERS} if self.is_fitted else {}
        weights = {f"guide.weight.{row}": one.cpu() for row, one in enumerate(self.guide_.weights)} if guide else {}
        return {**super().state(), **guide, **weights, N_ABNORMALS: torch.tensor(self.n_abnormals_)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back a memory and its guide."""
        super().load_state(state)
        views = [view for view in self.memory_.views if view.weight > 0]
        device = self.tower.device
        try:
            weights = tuple(state[f"guide.weight.{row}"].to(device) for row in range(len(views)))
            numbers = {name: state[f"guide.{name}"].to(device) for name in _NUMBERS}
            self.n_abnormals_ = int(state[N_ABNORMALS])
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError("The adapter file lacks parts of its guide; adapt again.") from error
        fits = all(one.shape == (self.tower.widths[view.level],) for one, view in zip(weights, views, strict=True))
        fits = fits and all(one.ndim == 0 for one in numbers.values()) and float(numbers["spread"]) > 0
        if not fits:
            raise CheckpointError("The adapter file holds a guide that does not fit its memory; adapt again.")
        self.guide_ = Guide(weights, **numbers)


_NUMBERS = ("offset", "level", "spread", "unit", "drawn")


def _scored_views(features: Sequence[Tensor], memory: ReferenceMemory) -> list[Tensor]:
    """What the views see that say whether a scan deviates: one [B, C_v, h, w] for each."""
    looks = view_features(features, memory.views)
    return [look for look, view in zip(looks, memory.views, strict=True) if view.weight > 0]


def _abnormal_places(squares: Tensor, is_drawn: Tensor, odd: Evidence, content: Tensor) -> Tensor:
    """Which patches of abnormal scans are abnormal, at least one of each.

    Args:
        squares: Masks [a, S, S] in [0, 1].
        is_drawn: [a] bool.
        odd: What the memory finds in the scans.
        content: [a, S, S] bool.

    Returns:
        [a, h, w] bool: those that a mask covers by half, or, of smaller ones, the most; the oddest without a mask.
    """
    grid = grid_of(odd.scored)
    inside = patch_content(content, grid)
    share = F.adaptive_avg_pool2d(squares[:, None], grid)[:, 0] * inside  # [a, h, w]
    most = share.flatten(1).amax(dim=1)[:, None, None]
    covered = (share >= most.clamp(1e-6, 0.5)) & inside
    scored = odd.scored.masked_fill(~inside, -torch.inf).flatten(1)
    count = max(1, round(GUESSED * scored.shape[1]))
    least = scored.topk(count, dim=1).values[:, -1:]
    oddest = (scored >= least).view_as(inside) & inside
    return torch.where((is_drawn[:, None, None] & (most > 0)), covered, oddest)


def _by_folds(looks: Sequence[Tensor], scans: Tensor, learn: Callable[[Tensor], Guide]) -> Tensor:
    """Log-odds [n, h, w] of scans [n], each by a guide that was learned without it."""
    folds = min(FOLDS, len(scans))
    found = torch.empty_like(looks[0][:, 0])
    for fold in range(folds):
        held = scans[fold::folds]
        found[held] = learn(scans[scans % folds != fold]).log_odds([look[held] for look in looks])
    return found


def _patches(look: Tensor, chosen: Tensor) -> Tensor:
    """[B, C, h, w] at the places [B, h, w] -> [N, C]."""
    return look.permute(0, 2, 3, 1)[chosen]


def _covariance(patches: Tensor, centre: Tensor) -> Tensor:
    """[N, C] around [C] -> [C, C]."""
    apart = patches - centre
    return apart.T @ apart / len(patches)
