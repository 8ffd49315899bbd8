"""Guided memory: the patch memory, helped by what tells the patches of a few abnormal scans from normal ones.

Open-set supervised anomaly detection (Ding et al., Catching Both Gray and Black Swans, CVPR 2022): the abnormal scans
at hand do not show all that the next one may have. So the distance to the references goes on counting, and what was
learned from the abnormal scans moves a score by about half of the references' spread for each of its own deviations,
and never by more than `MOST` of these.

What is learned is a linear discriminant (Fisher 1936) of the patches of each view that the memory scores, their
log-odds added up: in closed form, within seconds, so that the references can be scored by discriminants
that have not seen them. Where masks are drawn they say which patches are abnormal, and the discriminant helps to place;
elsewhere those that the memory finds oddest stand in, and it says only whether. The fewer scans there are, the less
it is followed. Figures are in benchmarks/NOTES.md.

Regions that a person calls normal join the memory and leave the guide as it is, which may go on calling them abnormal.
Pictures of the self-check are compared without the reference they were made from, which the guide has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fmclip.calibration import distinct
from fmclip.detectors.base import N_ABNORMALS, Prediction, batched_features, setting, to_pixels
from fmclip.detectors.events import OnEvent, Ready
from fmclip.detectors.evidence import SHARPNESS, TAIL, Evidence, image_scores, predictions, to_unit
from fmclip.detectors.log_odds import highest_mean, inside_only
from fmclip.detectors.patch_memory import PatchMemory, PatchMemoryConfig
from fmclip.detectors.samples import mask_squares
from fmclip.errors import CheckpointError
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
FEW = 2.0  # degrees of freedom of the deviation at which the guide is followed half as much
STEEPEST = 10.0  # log-odds for a deviation in any sound file
NUMBERS = ("offset", "level", "spread", "score_step", "map_step")


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
        spread: [], standard deviation of these, within normal and abnormal scans; that of the normal ones if larger.
        score_step: [], log-odds of the score for a deviation.
        map_step: [], log-odds of the map for a deviation.
    """

    weights: tuple[Tensor, ...]
    offset: Tensor
    level: Tensor
    spread: Tensor
    score_step: Tensor
    map_step: Tensor

    @classmethod
    def learn(cls, normal: Sequence[Tensor], abnormal: Sequence[Tensor], shrinkage: float) -> Guide:
        """Learn from patches, one [N, C_v] and one [M, C_v] for each view; what they mean is not known yet."""
        weights, offsets = [], []
        for own, other in zip(normal, abnormal, strict=True):
            centres = own.mean(dim=0), other.mean(dim=0)
            within = (_covariance(own, centres[0]) + _covariance(other, centres[1])) / 2
            weight = torch.linalg.solve(shrunk(within, shrinkage), centres[1] - centres[0])
            weights.append(weight)
            offsets.append(-(centres[0] + centres[1]) @ weight / 2)
        one, none = torch.ones_like(offsets[0]), torch.zeros_like(offsets[0])
        return cls(tuple(weights), torch.stack(offsets).sum(), none, one, none, none)

    def log_odds(self, looks: Sequence[Tensor]) -> Tensor:
        """Of every patch: one [B, C_v, h, w] for each view -> [B, h, w]."""
        products = [torch.einsum("bchw,c->bhw", look, own) for look, own in zip(looks, self.weights, strict=True)]
        return torch.stack(products).sum(dim=0) + self.offset

    @property
    def is_sound(self) -> bool:
        """Whether it can be reckoned with: finite numbers, no step that is none of a fit."""
        tensors = (*self.weights, *(getattr(self, name) for name in NUMBERS))
        if not all(one.is_floating_point() and bool(one.isfinite().all()) for one in tensors):
            return False
        steps = all(one.ndim == 0 and 0 <= float(one) <= STEEPEST for one in (self.score_step, self.map_step))
        return steps and self.offset.ndim == self.level.ndim == self.spread.ndim == 0 and float(self.spread) > 0

    def deviations(self, log_odds: Tensor) -> Tensor:
        """How many deviations above the references, up to `MOST` either way; any shape."""
        return ((log_odds - self.level) / self.spread).nan_to_num(0.0).clamp(-MOST, MOST)


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
        self._require_abnormals(abnormals)
        abnormals = list(abnormals or ())
        squares, _ = mask_squares(abnormals, abnormal_masks, self.tower)
        kept = _distinct_places(abnormals, squares)
        squares, abnormals = squares[kept], [abnormals[place] for place in kept]
        memory, distances, content, features = self._remember(normals, on_event)
        pixels, other_content, _ = to_pixels(abnormals, self.tower)
        other_features = batched_features(self.tower, pixels, levels_needed(memory.views))
        evidence = self._evidence(memory, distances, content)
        odd = self._evidence(memory, memory.compare(other_features)[0], other_content)
        chosen, is_drawn = _abnormal_places(squares.to(pixels), odd, other_content)  # [a, h, w], [a]
        guide, freedom, unseen = self._learn_guide(
            _scored_views(features, memory), _scored_views(other_features, memory), chosen, content, other_content
        )
        trust = freedom / (freedom + FEW)
        unit = spread_of(to_unit(image_scores(evidence.maps())).tolist(), self.spread_prior)
        guide = replace(
            guide,
            score_step=torch.full_like(guide.level, self.config.guidance * trust * unit),
            map_step=self.config.map_guidance * trust * is_drawn.to(guide.level).mean(),
        )
        self._settle(memory, self._guided(guide, evidence, unseen, content))
        self.guide_, self.n_abnormals_ = guide, len(abnormals)
        on_event(Ready("guided memory", self))
        return self

    def _learn_guide(
        self, looks: list[Tensor], others: list[Tensor], chosen: Tensor, content: Tensor, other_content: Tensor
    ) -> tuple[Guide, int, Tensor]:
        """Learn from all, and by guides that have not seen them what is normal for the references.

        Args:
            looks: What the views see of the references, one [k, C_v, h, w] for each.
            others: The same of the abnormal scans, [a, C_v, h, w].
            chosen: [a, h, w] bool, which of their patches are abnormal.
            content: [k, S, S] bool, of the references.
            other_content: [a, S, S] bool.

        Returns:
            The guide, without its steps; degrees of freedom of its spread; log-odds of the references [k, h, w], each
            by a guide that has not seen it.
        """
        inside = patch_content(content, grid_of(chosen))  # [k, h, w]

        def learn(own: Tensor, other: Tensor) -> Guide:
            normal = [_patches(look[own], inside[own]) for look in looks]
            abnormal = [_patches(look[other], chosen[other]) for look in others]
            return Guide.learn(normal, abnormal, self.config.guide_shrinkage)

        k, a = torch.arange(len(content)), torch.arange(len(other_content))
        unseen = _by_folds(looks, lambda rest: learn(rest, a))  # [k, h, w]
        highest = self._highest(unseen, content)
        squares, freedom = (highest - highest.mean()).square().sum(), len(k) - 1
        if len(a) > 1:
            other = self._highest(_by_folds(others, lambda rest: learn(k, rest)), other_content)
            squares, freedom = squares + (other - other.mean()).square().sum(), freedom + len(a) - 1
        spread = (squares / freedom).sqrt().maximum(highest.std())  # abnormal scans may be neighbouring slices
        spread = spread.clamp_min(1e-6)
        return replace(learn(k, a), level=highest.mean(), spread=spread), freedom, unseen

    def _highest(self, log_odds: Tensor, content: Tensor) -> Tensor:
        """Mean of the highest log-odds of each scan, smoothed as the memory's evidence is: [B, h, w] -> [B]."""
        inside = patch_content(content, grid_of(log_odds)).to(log_odds)
        return highest_mean(inside_only(smooth_inside(log_odds, inside, self.config.smoothing), content), TAIL)

    def _guided(self, guide: Guide, evidence: Evidence, log_odds: Tensor, content: Tensor) -> Evidence:
        """Evidence of the memory as the guide's log-odds [B, h, w] change it."""
        whole = guide.score_step * guide.deviations(self._highest(log_odds, content))  # [B]
        inside = patch_content(content, grid_of(log_odds)).to(log_odds)
        places = smooth_inside(guide.deviations(log_odds), inside, self.config.map_smoothing)  # [B, h, w]
        scored = evidence.scored * (whole / SHARPNESS).exp()[:, None, None]
        return Evidence(scored, evidence.placed * (guide.map_step * places / SHARPNESS).exp())

    @torch.no_grad()
    def predict(self, scans: Sequence[Scan]) -> list[Prediction]:
        """Score and map each scan by the memory as the guide changes it."""
        found: list[Prediction] = []
        for pixels, content, boxes in self._batches(scans):
            remembered, log_odds = self._look(pixels, content)
            maps = self._guided(self.guide_, remembered, log_odds, content).maps()
            inside = patch_content(content, grid_of(log_odds))
            taught = (self.guide_.deviations(log_odds) / SHARPNESS).exp() * inside  # shown as a probability
            found += predictions(
                {"patch memory": remembered.maps(), "abnormal scans": taught}, maps, boxes, self.tower.image_size
            )
        return found

    def _answer(self, pixels: Tensor, content: Tensor, own: Tensor | None = None) -> Tensor:
        remembered, log_odds = self._look(pixels, content, own)
        return self._guided(self.guide_, remembered, log_odds, content).maps()

    def _look(self, pixels: Tensor, content: Tensor, own: Tensor | None = None) -> tuple[Evidence, Tensor]:
        """Evidence of the memory and log-odds of the guide, [B, h, w]."""
        features = self.patch_features(pixels)
        distances, _ = self.memory_.compare(features, own)  # [B, V, h, w]
        log_odds = self.guide_.log_odds(_scored_views(features, self.memory_))
        return self._evidence(self.memory_, distances, content), log_odds

    def state(self) -> dict[str, Tensor]:
        """The memory's, and the guide."""
        state = super().state()
        guide = {f"guide.{name}": getattr(self.guide_, name).cpu() for name in NUMBERS}
        weights = {f"guide.weight.{row}": one.cpu() for row, one in enumerate(self.guide_.weights)}
        return {**state, **guide, **weights, N_ABNORMALS: torch.tensor(self.n_abnormals_)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back a memory and its guide."""
        super().load_state(state)
        views, device = [view for view in self.memory_.views if view.weight > 0], self.tower.device
        try:
            weights = tuple(state[f"guide.weight.{row}"].to(device) for row in range(len(views)))
            guide = Guide(weights, **{name: state[f"guide.{name}"].to(device) for name in NUMBERS})
            n_abnormals = int(state[N_ABNORMALS])
        except (KeyError, ValueError, OverflowError, RuntimeError) as error:
            raise CheckpointError("The adapter file lacks parts of its guide; adapt again.") from error
        widths = [(self.tower.widths[view.level],) for view in views]
        if not guide.is_sound or n_abnormals < 1 or [one.shape for one in weights] != widths:
            raise CheckpointError("The adapter file holds a guide that does not fit its memory; adapt again.")
        self.guide_, self.n_abnormals_ = guide, n_abnormals


def _scored_views(features: Sequence[Tensor], memory: ReferenceMemory) -> list[Tensor]:
    """What the views see that say whether a scan deviates: one [B, C_v, h, w] for each."""
    looks = view_features(features, memory.views)
    return [look for look, view in zip(looks, memory.views, strict=True) if view.weight > 0]


def _distinct_places(abnormals: Sequence[Scan], squares: Tensor) -> list[int]:
    """Places of the abnormal scans but for copies, which would say that abnormal scans are all alike.

    Of copies the first stays whose mask [a, S, S] marks something, or the first of all.
    """
    marked = squares.flatten(1).amax(dim=1) > 0
    order = sorted(range(len(abnormals)), key=lambda place: not marked[place])  # stable
    kept = iter(distinct([abnormals[place] for place in order]))
    places, wanted = [], next(kept, None)
    for place in order:
        if abnormals[place] is wanted:
            places.append(place)
            wanted = next(kept, None)
    return sorted(places)


def _abnormal_places(squares: Tensor, odd: Evidence, content: Tensor) -> tuple[Tensor, Tensor]:
    """Which patches of abnormal scans are abnormal, at least one of each.

    Args:
        squares: Masks [a, S, S] in [0, 1]; 0 where nobody has drawn one.
        odd: What the memory finds in the scans.
        content: [a, S, S] bool.

    Returns:
        [a, h, w] bool: those that a mask covers by half, or, of smaller ones, the most; the oddest without a mask.
        [a] bool, whether there was one.
    """
    grid = grid_of(odd.scored)
    inside = patch_content(content, grid)
    share = F.adaptive_avg_pool2d(squares[:, None], grid)[:, 0] * inside  # [a, h, w]
    most = share.flatten(1).amax(dim=1)[:, None, None]
    covered = share >= most.clamp_max(0.5)  # which bars are not, where there is a mask
    scored = odd.scored.masked_fill(~inside, -torch.inf).flatten(1)
    least = scored.topk(max(1, round(GUESSED * scored.shape[1])), dim=1).values[:, -1:]
    oddest = (scored >= least).view_as(inside) & inside
    return torch.where(most > 0, covered, oddest), most.flatten() > 0


def _by_folds(looks: Sequence[Tensor], learn: Callable[[Tensor], Guide]) -> Tensor:
    """Log-odds [n, h, w] of n scans, each by a guide that was learned without it and its neighbours in the list.

    Args:
        looks: What the views see of them, one [n, C_v, h, w] for each.
        learn: Takes the places of the scans to learn from.
    """
    found = torch.empty_like(looks[0][:, 0])
    places = torch.arange(len(found))
    for held in places.tensor_split(min(FOLDS, len(found))):
        rest = places[~torch.isin(places, held)]
        found[held] = learn(rest).log_odds([look[held] for look in looks])
    return found


def _patches(look: Tensor, chosen: Tensor) -> Tensor:
    """[B, C, h, w] at the places [B, h, w] -> [N, C]."""
    return look.permute(0, 2, 3, 1)[chosen]


def _covariance(patches: Tensor, centre: Tensor) -> Tensor:
    """[N, C] around [C] -> [C, C]."""
    apart = patches - centre
    return apart.T @ apart / len(patches)
