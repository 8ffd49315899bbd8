"""The patch memory of the reference scans: how far is each patch from the nearest of theirs, and in what way.

A nearest-neighbour memory (PatchCore, Roth et al. 2022, without its coreset) with four changes, each chosen on the
tuning half (benchmarks/NOTES.md):

- A patch is compared with the nearest patch of each reference, and a mean of these that leans on the smallest is taken
  (`search.soft_nearest`).
- Several views of the features are searched side by side (`fmclip.views`).
- Each view is whitened by the covariance of its *leave-one-out residuals*: what differs between a reference patch and
  its nearest patch in another reference scan is normal variation, and counts for less.
- Each view's distance is divided by the mean leave-one-out maximum of the references, so that 1 means "as far as the
  oddest patch of a normal scan" whatever the tower, the level or the scan type; then views can be averaged.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fmclip.patch_grid import grid_of, patch_content, patch_weight
from fmclip.search import Rows, Search, greedy_coreset, nearest, nearest_in_others
from fmclip.views import View, view_features
from fmclip.whitening import inverse_root, principal_whitening, shrunk, triangular_whitening

FOLDS = 8  # whitenings that are learned again for leave-one-out, at most
MAX_REGIONS = 64  # that may join after learning
SHRINKAGE = 0.1  # share of the isotropic part in the residual covariance; keeps it invertible for few references


class ReferenceMemory:
    """Whitened patches of k reference scans, ready to be searched.

    Attributes:
        views: V views.
        bank: For each view [N, C_v], whitened reference patches, scan by scan; letterbox bars are left out.
        rows: Whose patches these are.
        place: [N], where each patch lies in its scan: row * w + column on the views' common grid (h, w).
        whitening: For each view [C_v, C_v].
        scale: [V], mean over the references of the largest distance to the patch of another that is nearest before the
            whitening: a unit for the residuals.
        level: [V], mean over the references of the largest leave-one-out distance in units of `scale`, see `calibrate`.
        search: How far a patch is from the bank.
        kept: [N], rows of the bank among all patches that were learned from; None after loading.
        closest: For each view [N, 2], the nearest patches in another and in yet another reference of each patch that
            was learned from, before the whitening: found once, read by `learn` and `leave_one_out`; None after loading.
    """

    def __init__(
        self,
        views: Sequence[View],
        bank: Sequence[Tensor],
        owner: Tensor,
        place: Tensor,
        whitening: Sequence[Tensor],
        scale: Tensor,
        level: Tensor,
        references: int,
        search: Search | None = None,
        kept: Tensor | None = None,
        closest: Sequence[Tensor] | None = None,
    ) -> None:
        self.views = tuple(views)
        self.bank = list(bank)
        self.rows = Rows(owner, references)
        self.place = place
        self.whitening = list(whitening)
        self.scale = scale
        self.level = level
        self.search = search or Search()
        self.kept = kept
        self.closest = closest

    @classmethod
    def learn(
        cls,
        features: Sequence[Tensor],
        content: Tensor,
        views: Sequence[View],
        shrinkage: float = SHRINKAGE,
        *,
        references: int | None = None,
        coreset: float = 1.0,
        search: Search | None = None,
        generator: torch.Generator | None = None,
        axes: Sequence[Tensor | None] | None = None,
    ) -> ReferenceMemory:
        """Learn from the features of k reference scans and, where there are some, of a varied copies of each.

        Args:
            features: One [n, C_j, H_j, W_j] for each level, n = k * (1 + a): the k scans, then the first copy of each,
                then the second, and so on.
            content: [n, S, S] bool, False on letterbox bars.
            views: V views.
            shrinkage: Share of the isotropic part in the residual covariance.
            references: k; n if left out.
            coreset: Share of the patches that is kept (`search.greedy_coreset`).
            search: How far a patch is from the bank.
            generator: Draws the coreset.
            axes: As `axes` of a memory gives them: along these residuals are told apart instead of along new ones. No
                distance depends on it, and it saves a GPU decompositions that it is slow at.

        Returns:
            The memory; k must be at least 2, so that each scan has another to be compared with.

        Raises:
            ValueError: A coreset is to be searched reference by reference.
        """
        if coreset < 1 and (search is None or search.over == "references"):
            raise ValueError("a coreset mixes the patches of all references: search over patches")
        seen = view_features(features, views)
        n = seen[0].shape[0]
        k = references or n
        inside = patch_content(content, grid_of(seen[0]))  # [n, h, w]
        bank = [_patches(one)[inside.flatten()] for one in seen]  # [N, C_v]
        picture, place = inside.flatten(1).nonzero().unbind(dim=1)  # [N], [N]
        owner = picture % k  # [N]
        closest = [nearest_in_others(one, owner) for one in bank]  # [N, 2]
        whitening = [
            triangular_whitening(one - one[rows[:, 0]], shrinkage, along)
            if along is not None or not view.is_learned_from  # whose residuals nobody reads
            else principal_whitening(one - one[rows[:, 0]], shrinkage)
            for view, one, rows, along in zip(views, bank, closest, axes or [None] * len(views), strict=True)
        ]
        apart = [
            ((one - one[rows[:, 0]]) @ white).norm(dim=1)
            for one, rows, white in zip(bank, closest, whitening, strict=True)
        ]
        scale = torch.stack([_mean_largest(one, picture, k) for one in apart]).clamp_min(1e-6)  # [V]
        kept = owner.argsort(stable=True)  # scan by scan, with the varied copies of each
        bank = [one[kept] @ white for one, white in zip(bank, whitening, strict=True)]
        owner, place, level = owner[kept], place[kept], torch.ones_like(scale)
        memory = cls(views, bank, owner, place, whitening, scale, level, k, search, kept, closest)
        if coreset < 1:
            joined = torch.cat([one / scale for one, scale in zip(bank, memory.scale, strict=True)], dim=1)
            memory._keep(greedy_coreset(joined, math.ceil(coreset * len(owner)), generator or torch.Generator()))
        return memory

    def _keep(self, rows: Tensor) -> None:
        """Forget all patches but these rows of the bank; each reference keeps at least one, so that it can be named."""
        assert self.kept is not None
        first = [int((self.owner == scan).nonzero()[0]) for scan in range(self.references)]
        rows = torch.cat([rows, torch.tensor(first, device=rows.device)]).unique()
        self.bank = [one[rows] for one in self.bank]
        self.rows = Rows(self.owner[rows], self.references)
        self.place, self.kept = self.place[rows], self.kept[rows]

    def compare(
        self, features: Sequence[Tensor], own: Tensor | None = None, *, residuals: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Compare scans with the references.

        Args:
            features: One [B, C_j, H_j, W_j] for each level.
            own: [B] or [B, S] indices of the reference scans that each scan is or was made from (its own and the donor
                of a pasted patch); these are left out. None if none.
            residuals: Whether the residuals of the views that are learned from are wanted; gradients flow through them
                into `features`.

        Returns:
            distances [B, V, h, w] to the references, in units of `scale`; residuals, one [B, C_v, h, w] for each view
            that is learned from: whitened patch minus nearest whitened reference patch, in units of `scale`.
        """
        distances, differences = [], []
        looks = view_features(features, self.views)
        for index, (view, look, bank, scale) in enumerate(zip(self.views, looks, self.bank, self.scale, strict=True)):
            patches = _patches(look) @ self.whitening[index]  # [B * h * w, C]
            left_out = _for_each_patch(own, look)
            apart = self.search.distance(patches.detach(), bank, self.rows, left_out)  # [B * h * w]
            distances.append(_to_grid(apart / scale, look))
            if residuals and view.is_learned_from:
                differences.append(self._residual(index, look, patches, left_out))
        return torch.stack(distances, dim=1), differences

    def residuals(self, features: Sequence[Tensor], own: Tensor | None = None) -> list[Tensor]:
        """Only the residuals of `compare`: the views that are not learned from are not looked at."""
        read = [index for index, view in enumerate(self.views) if view.is_learned_from]
        looks = view_features(features, [self.views[index] for index in read])
        return [
            self._residual(index, look, _patches(look) @ self.whitening[index], _for_each_patch(own, look))
            for index, look in zip(read, looks, strict=True)
        ]

    def _residual(self, index: int, look: Tensor, patches: Tensor, left_out: Tensor | None) -> Tensor:
        """Of one view [B, C, h, w] the whitened patches [B * h * w, C] minus the nearest of all: [B, C, h, w]."""
        found = nearest(patches.detach(), self.bank[index], self.owner, left_out)
        return _to_grid((patches - self.bank[index][found]) / self.scale[index], look)

    def nearest_by_reference(self, features: Sequence[Tensor], row: int, column: int) -> tuple[Tensor, Tensor]:
        """Find the patch of each reference that is nearest to one patch of a scan.

        Args:
            features: One [1, C_j, H_j, W_j] for each level.
            row: Row of the patch on the views' common grid.
            column: Its column.

        Returns:
            distances [V, k + R] of the k references and R regions, in units of `level`; places [V, k + R], see `place`.
        """
        distances, places = [], []
        looks = view_features(features, self.views)
        for look, bank, white, unit in zip(looks, self.bank, self.whitening, self.scale * self.level, strict=True):
            apart = (look[0, :, row, column] @ white - bank).norm(dim=1) / unit  # [N]
            closest, rows = zip(*(own.min(dim=0) for own in apart.split(list(self.rows.sizes))), strict=True)
            start = torch.tensor([0, *self.rows.sizes[:-1]], device=apart.device).cumsum(dim=0)  # [k + R]
            distances.append(torch.stack(closest))
            places.append(self.place[start + torch.stack(rows)].clamp_max(look[0, 0].numel() - 1))  # of a file: any
        return torch.stack(distances), torch.stack(places)

    @property
    def axes(self) -> list[Tensor | None]:
        """The principal axes of each view that is learned from, orthonormal columns [C_v, C_v], of a memory that was
        learned without `axes`; None for the others."""
        return [
            white / white.norm(dim=0) if view.is_learned_from else None
            for view, white in zip(self.views, self.whitening, strict=True)
        ]

    @property
    def references(self) -> int:
        """Reference scans k."""
        return self.rows.references

    @property
    def owner(self) -> Tensor:
        """[N], the reference scan of each patch; from k on, the region that was marked as normal later."""
        return self.rows.owner

    @property
    def regions(self) -> int:
        """Regions that joined after learning."""
        return len(self.rows.sizes) - self.references

    def with_region(self, features: Sequence[Tensor], chosen: Tensor) -> ReferenceMemory:
        """Add some patches of one more scan; whitening, scale and level stay what the references made them.

        Args:
            features: One [1, C_j, H_j, W_j] for each level.
            chosen: [1, h, w] bool, which patches, on the views' common grid.

        Returns:
            A new memory; the added patches belong to no reference scan.
        """
        rows = chosen.flatten().nonzero()[:, 0]  # [n]
        looks = view_features(features, self.views)
        bank = [
            torch.cat([old, _patches(look)[rows] @ white])
            for old, look, white in zip(self.bank, looks, self.whitening, strict=True)
        ]
        owner = torch.cat([self.owner, torch.full_like(rows, self.references + self.regions)])
        return self._with_bank(bank, owner, torch.cat([self.place, rows]))

    def without_regions(self, keep: int = 0) -> ReferenceMemory:
        """Leave out the regions that joined after learning, but for the first `keep` of them."""
        rows = self.owner < self.references + keep
        return self._with_bank([one[rows] for one in self.bank], self.owner[rows], self.place[rows])

    def _with_bank(self, bank: list[Tensor], owner: Tensor, place: Tensor) -> ReferenceMemory:
        other = copy.copy(self)
        other.bank, other.rows, other.place = bank, Rows(owner, self.references), place
        return other

    def renew(self, other: ReferenceMemory) -> None:
        """Take over the numbers of a memory of the same patches, in place: whoever holds the tensors sees them."""
        pairs = [*zip(self.bank, other.bank, strict=True), *zip(self.whitening, other.whitening, strict=True)]
        for own, new in [*pairs, (self.scale, other.scale)]:
            own.copy_(new)

    def leave_one_out(self, features: Sequence[Tensor], content: Tensor, shrinkage: float = SHRINKAGE) -> Tensor:
        """Distances of each reference to a memory that has never seen it, its whitening included.

        `compare(own=...)` leaves out the scan's patches only: the whitening was learned from its residuals too and
        shrinks them, so that a new normal scan would score higher than any reference. Learning again without a scan
        means that the patches whose nearest neighbour lay in it turn to the next reference, and a covariance without
        its residuals and with theirs instead. Of more than `FOLDS` references several share a whitening that has seen
        none of them.

        Args:
            features: One [n, C_j, H_j, W_j] for each level, those that were learned from.
            content: [n, S, S] bool, as in `learn`.
            shrinkage: As in `learn`.

        Returns:
            [k, V, h, w], in units of `scale`. With two references only, nothing is left to learn a whitening from, and
            the one of both is used.
        """
        k = self.references
        if k < 3:
            return self.compare([level[:k] for level in features], own=torch.arange(k, device=self.owner.device))[0]
        assert self.kept is not None, "a memory from a file has no patches to learn again from"
        assert self.closest is not None
        folds, found = min(k, FOLDS), []
        looks = view_features(features, self.views)
        for look, scale, closest in zip(looks, self.scale, self.closest, strict=True):
            h, w = grid_of(look)
            every = _patches(look)  # [n * h * w, C]
            inside = patch_content(content, (h, w)).flatten()  # [n * h * w]
            patches, owner = every[inside], inside.nonzero()[:, 0] // (h * w) % k  # [N, C], [N]
            # residuals [N, C]; in double precision, since most of a sum may be taken off again
            first, second = ((patches - patches[rows]).double() for rows in closest.T)
            fold, (of_first, of_second) = owner % folds, owner[closest.T] % folds  # [N] each
            products, remembered = first.T @ first, patches[self.kept]  # [C, C], [N', C]
            own = torch.empty(k, h, w, device=patches.device)
            for left_out in range(folds):
                is_own, lost = fold == left_out, of_first == left_out  # its patches; those whose nearest is gone
                gone, instead = first[is_own | lost], second[~is_own & lost & (of_second != left_out)]
                covariance = (products - gone.T @ gone + instead.T @ instead) / (len(first) - len(gone) + len(instead))
                white = inverse_root(shrunk(covariance, max(shrinkage, 1e-8))).to(patches)  # [C, C]
                bank, scans = remembered @ white, range(left_out, k, folds)
                query = torch.cat([every[scan * h * w : (scan + 1) * h * w] for scan in scans]) @ white
                seen = torch.tensor(scans, device=query.device).repeat_interleave(h * w)  # [scans * h * w]
                apart = self.search.distance(query, bank, self.rows, seen)
                own[left_out::folds] = apart.view(-1, h, w) / scale
            found.append(own)
        return torch.stack(found, dim=1)

    def calibrate(self, distances: Tensor, content: Tensor) -> None:
        """Make 1 the evidence of the oddest patch of a reference, on average; takes what `leave_one_out` returned."""
        weighted = distances * patch_weight(content, grid_of(distances))[:, None]  # [k, V, h, w]
        self.level = weighted.flatten(2).amax(dim=2).mean(dim=0).clamp_min(1e-6)  # [V]

    def relative(self, distances: Tensor) -> Tensor:
        """Distances [B, V, h, w] in units of `level`: 1 is as far as the oddest patch of a reference, on average."""
        return distances / self.level.view(-1, 1, 1)

    def state(self) -> dict[str, Tensor]:
        """Tensors on the CPU, by name."""
        state = {
            "memory.scale": self.scale.cpu(),
            "memory.level": self.level.cpu(),
            "memory.owner": self.owner.to("cpu", torch.int32),
            "memory.place": self.place.to("cpu", torch.int32),
        }
        for index, (bank, white) in enumerate(zip(self.bank, self.whitening, strict=True)):
            state[f"memory.bank.{index}"] = bank.cpu()
            state[f"memory.whitening.{index}"] = white.cpu()
        return state

    @classmethod
    def from_state(
        cls,
        state: dict[str, Tensor],
        views: Sequence[View],
        references: int,
        device: torch.device,
        search: Search | None = None,
    ) -> ReferenceMemory:
        """Take back what `state` returned.

        Raises:
            KeyError: A tensor is missing.
            ValueError: Shapes do not fit together.
        """
        bank = [state[f"memory.bank.{index}"].to(device) for index in range(len(views))]
        whitening = [state[f"memory.whitening.{index}"].to(device) for index in range(len(views))]
        scale, level = state["memory.scale"].to(device), state["memory.level"].to(device)
        owner, place = (state[f"memory.{name}"].to(device, torch.int64) for name in ("owner", "place"))
        fits = references >= 2 and owner.ndim == 1 and place.shape == owner.shape and bool((place >= 0).all())
        fits = fits and bool((owner.diff() >= 0).all())  # scan by scan
        fits = fits and all(one.shape == (len(views),) and bool((one > 0).all()) for one in (scale, level))
        owners = set(owner.unique().tolist())
        fits = fits and owners == set(range(max(references, len(owners)))) and len(owners) <= references + MAX_REGIONS
        for one, white in zip(bank, whitening, strict=True):
            fits = fits and one.ndim == 2 and white.shape == (one.shape[1],) * 2 and len(one) == len(owner)
        if not fits:
            raise ValueError("patch memory with tensors of the wrong shape")
        return cls(views, bank, owner, place, whitening, scale, level, references, search)


def _mean_largest(distances: Tensor, picture: Tensor, references: int) -> Tensor:
    """Mean over the references of the largest distance: of each patch [N], and the picture that it is of [N] -> []."""
    largest = distances.new_zeros(references)
    own = picture < references  # varied copies do not count
    return largest.scatter_reduce(0, picture[own], distances[own], "amax").mean()


def _for_each_patch(own: Tensor | None, look: Tensor) -> Tensor | None:
    """References that are left out for each scan [B] or [B, S] -> for each patch of a view [B * h * w(, S)]."""
    return None if own is None else own.repeat_interleave(look[0, 0].numel(), dim=0)


def _patches(look: Tensor) -> Tensor:
    return look.permute(0, 2, 3, 1).flatten(0, 2)  # [B, C, h, w] -> [B * h * w, C]


def _to_grid(patches: Tensor, look: Tensor) -> Tensor:
    """Back to the grid of a view [B, ?, h, w]: [B * h * w] -> [B, h, w], [B * h * w, C] -> [B, C, h, w]."""
    B, _, h, w = look.shape
    grid = patches.unflatten(0, (B, h, w))
    return grid if patches.ndim == 1 else grid.permute(0, 3, 1, 2)
