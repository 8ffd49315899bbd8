"""Nearest neighbours among patches: exact search as one matrix product, coreset, k-NN reweighting."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 2048  # patches searched for at a time
FAR = 1e30  # how far patches of scans that are left out are
PROJECTED = 128  # width in which the coreset is chosen; more changes little (PatchCore, section 3.2)


@dataclass(frozen=True)
class Search:
    """How far a patch is from a bank of patches.

    Attributes:
        neighbours: The distance is the mean over that many nearest patches.
        reweighting: b > 0 weighs a distance by 1 - softmax of the distances to the nearest patch and its b neighbours
            in the bank, so that patches near rare reference patches count more (PatchCore, Eq. 7); 0 leaves it out.
    """

    neighbours: int = 1
    reweighting: int = 0

    def distance(
        self,
        patches: Tensor,
        bank: Tensor,
        found: Tensor,
        apart: Tensor,
        owner: Tensor | None = None,
        left_out: Tensor | None = None,
    ) -> Tensor:
        """Distance of each patch to the bank.

        Args:
            patches: [P, C].
            bank: [N, C].
            found: [P] row of the nearest patch, as `nearest` returns it.
            apart: [P] distance to that patch.
            owner: [N], with `left_out`.
            left_out: [P] or [P, S], see `nearest`.

        Returns:
            [P].
        """
        answer = apart
        if self.neighbours > 1:
            rows = k_nearest(patches, bank, self.neighbours, owner, left_out)  # [P, n]
            answer = _norms(patches, bank, rows).mean(dim=1)
        if self.reweighting > 0:
            rows = k_nearest(bank[found], bank, self.reweighting + 1, owner, left_out)  # [P, b + 1], itself among them
            around = torch.logsumexp(_norms(patches, bank, rows), dim=1)
            answer = answer * (1 - (apart - around).exp())
        return answer


def nearest(patches: Tensor, bank: Tensor, owner: Tensor | None = None, left_out: Tensor | None = None) -> Tensor:
    """Row of the bank nearest to each patch, not counting rows of the scans that are left out for it.

    Args:
        patches: [P, C].
        bank: [N, C].
        owner: [N] scan of each row of the bank; with `left_out` only.
        left_out: [P] or [P, S] scans that are left out for each patch, -1 for none.

    Returns:
        [P].
    """
    return k_nearest(patches, bank, 1, owner, left_out)[:, 0]


def nearest_in_others(patches: Tensor, owner: Tensor) -> Tensor:
    """Rows of the patches nearest to each patch in another scan, and in yet another one: [N, C], [N] -> [N, 2].

    Where there are two scans only, both are the same.
    """
    are_two = len(owner.unique()) < 3
    found = []
    for closeness in _closeness(patches, patches, owner, owner[:, None]):
        first = _largest(closeness)  # [chunk, 1]
        if not are_two:
            closeness.masked_fill_(owner[first] == owner, -FAR)
        found.append(torch.cat([first, first if are_two else _largest(closeness)], dim=1))
    return torch.cat(found)


def k_nearest(
    patches: Tensor, bank: Tensor, k: int, owner: Tensor | None = None, left_out: Tensor | None = None
) -> Tensor:
    """Rows of the bank nearest to each patch, the nearest first: [P, min(k, N)]; see `nearest`."""
    if left_out is not None and left_out.ndim == 1:
        left_out = left_out[:, None]  # [P, S]
    k = min(k, bank.shape[0])
    found = [
        _largest(closeness) if k == 1 else closeness.topk(k, dim=1).indices
        for closeness in _closeness(patches, bank, owner, left_out)
    ]
    return torch.cat(found)


def greedy_coreset(patches: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Choose patches so that none is far from a chosen one: greedy k-centre in a random projection.

    PatchCore, Algorithm 1 (Roth et al. 2022).

    Args:
        patches: [N, C].
        size: How many to choose, 1 to N.
        generator: Draws the projection and the first patch.

    Returns:
        [size] rows, sorted.
    """
    N, C = patches.shape
    if size >= N:
        return torch.arange(N, device=patches.device)
    if C > PROJECTED:
        patches = patches @ (torch.randn(C, PROJECTED, generator=generator) / PROJECTED**0.5).to(patches)
    chosen = [int(torch.randint(N, (1,), generator=generator))]
    apart = (patches - patches[chosen[0]]).square().sum(dim=1)  # [N] to the nearest chosen one
    for _ in range(size - 1):
        chosen.append(int(apart.argmax()))
        apart = torch.minimum(apart, (patches - patches[chosen[-1]]).square().sum(dim=1))
    return torch.tensor(sorted(chosen), device=patches.device)


def _norms(patches: Tensor, bank: Tensor, rows: Tensor) -> Tensor:
    """[P, C], [N, C], rows [P, n] -> distances [P, n], row by row, so that no [P, n, C] lies in memory."""
    return torch.stack([(patches - bank[one]).norm(dim=1) for one in rows.T], dim=1)


def _closeness(patches: Tensor, bank: Tensor, owner: Tensor | None, left_out: Tensor | None) -> Iterator[Tensor]:
    """Some patches after others [chunk, N], the larger the nearer: half of minus the squared distance, but for a term
    of the patch alone. Rows of scans that are left out (`nearest`, [P, S]) are vastly far."""
    half_squares = 0.5 * bank.square().sum(dim=1)  # [N]
    if left_out is not None and owner is not None and _on_host(bank):  # by the product itself: half the time
        scans = torch.arange(int(owner.max()) + 1)
        penalty = (left_out[:, :, None] == scans).any(dim=1).to(patches) * -FAR  # [P, scans]
        patches = torch.cat([patches, penalty], dim=1)
        bank = torch.cat([bank, (owner[:, None] == scans).to(bank)], dim=1)
        left_out = None
    # a recorded graph has no loop over as many patches as there happen to be
    for number, chunk in enumerate([patches] if torch.compiler.is_exporting() else patches.split(CHUNK)):
        closeness = torch.addmm(-half_squares, chunk, bank.T)
        if left_out is not None:
            for one in left_out[number * CHUNK : (number + 1) * CHUNK].T:  # [chunk]
                closeness.masked_fill_(one[:, None] == owner, -FAR)
        yield closeness


def _on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _largest(closeness: Tensor) -> Tensor:
    """Column of the largest number of each row, the first of equal ones: [P, N] -> [P, 1]."""
    if not _on_host(closeness) or torch.compiler.is_exporting():
        return closeness.argmax(dim=1, keepdim=True)
    return torch.from_numpy(closeness.detach().numpy().argmax(axis=1))[:, None]  # six times as fast as torch's
