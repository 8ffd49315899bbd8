"""Nearest neighbours among patches by one matrix product, of each reference or of all; coreset and reweighting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

CHUNK = 2048  # patches searched for at a time
SOFTNESS = (
    8  # of the mean over references; 4 to infinity (the nearest alone) differ by half a point (benchmarks/NOTES.md)
)
FAR = 1e30  # how far patches of scans that are left out are
PROJECTED = 128  # width in which the coreset is chosen; more changes little (PatchCore, section 3.2)


@dataclass(frozen=True)
class Search:
    """How far a patch is from a bank of patches.

    Attributes:
        over: "references" takes the nearest patch of each reference scan and a mean of these distances that leans on
            the smallest (`soft_nearest`): what is near to several references is more normal than what one odd patch of
            one of them is near to, and more references do not make everything nearer. "patches" takes the nearest
            patches of the whole bank (PatchCore).
        neighbours: With "patches", the distance is the mean over that many nearest patches.
        reweighting: With "patches", b > 0 weighs a distance by 1 - softmax of the distances to the nearest patch and
            its b neighbours in the bank, so that patches near rare reference patches count more (PatchCore, Eq. 7); 0
            leaves it out.
    """

    over: Literal["references", "patches"] = "references"
    neighbours: int = 1
    reweighting: int = 0

    def distance(self, patches: Tensor, bank: Tensor, rows: Rows, left_out: Tensor | None = None) -> Tensor:
        """Distance of each patch to the bank.

        Args:
            patches: [P, C].
            bank: [N, C].
            rows: Whose patches the rows of the bank are.
            left_out: [P] or [P, S] references that do not count for each patch, -1 for none.

        Returns:
            [P]; where a region that was called normal is nearer, the distance to it.
        """
        if left_out is not None and left_out.ndim == 1:
            left_out = left_out[:, None]  # [P, S]
        if self.over == "references":
            apart = distances_by_scan(patches, bank, rows.sizes)  # [P, scans]
            answer = soft_nearest(apart[:, : rows.references], left_out)
            regions = apart[:, rows.references :]
            return torch.minimum(answer, regions.amin(dim=1)) if regions.shape[1] else answer
        found = k_nearest(patches, bank, self.neighbours, rows.owner, left_out)  # [P, n]
        near, counts = _norms(patches, bank, found), _counts(found, rows.owner, left_out)
        answer, apart = (near * counts).sum(dim=1) / counts.sum(dim=1), near[:, 0]
        if self.reweighting > 0:
            # [P, b + 1], the nearest patch itself among them
            around = k_nearest(bank[found[:, 0]], bank, self.reweighting + 1, rows.owner, left_out)
            other = _norms(patches, bank, around) + _counts(around, rows.owner, left_out).log()
            answer = answer * (1 - (apart - torch.logsumexp(other, dim=1)).exp())
        return answer


class Rows:
    """Whose patches the rows of a bank are.

    Args:
        owner: [N], ascending: the references from 0 on, then the regions that were called normal later.
        references: k.

    Attributes:
        owner: [N].
        references: k.
        sizes: Rows of each reference and region, as numbers of the host, so that no search waits for a GPU.
    """

    def __init__(self, owner: Tensor, references: int) -> None:
        self.owner = owner
        self.references = references
        self.sizes = tuple(torch.bincount(owner, minlength=references).tolist())


def distances_by_scan(patches: Tensor, bank: Tensor, sizes: Sequence[int]) -> Tensor:
    """Distance of each patch to the nearest patch of each scan.

    Args:
        patches: [P, C].
        bank: [N, C]; the rows of a scan stand together.
        sizes: Rows of each of S scans, none of them 0.

    Returns:
        [P, S].
    """
    centre = bank.mean(dim=0)  # what all have in common would only cost digits
    patches, bank = patches - centre, bank - centre
    squares = patches.square().sum(dim=1, keepdim=True)  # [P, 1]
    parts = []
    for closeness in _closeness(patches, bank, None, None):  # [chunk, N]
        if len(set(sizes)) == 1:
            parts.append(closeness.unflatten(1, (len(sizes), sizes[0])).amax(dim=2))
        else:
            parts.append(torch.stack([own.amax(dim=1) for own in closeness.split(list(sizes), dim=1)], dim=1))
    return (squares - 2 * torch.cat(parts)).clamp_min(0).sqrt()


def soft_nearest(apart: Tensor, left_out: Tensor | None = None) -> Tensor:
    """Power mean of distances with the exponent -`SOFTNESS`: near the smallest, and the nearer the more are as small.

    The smallest of k distances falls with k, this mean does not: k equal distances have that very mean.

    Args:
        apart: [P, k] distances to each reference.
        left_out: [P, S] references that do not count, -1 for none; where none would be left, all count.

    Returns:
        [P].
    """
    apart, count = apart.clamp_min(1e-6), torch.full_like(apart[:, 0], apart.shape[1])  # [P, k], [P]
    if left_out is not None:
        scans = torch.arange(apart.shape[1], device=apart.device)
        is_out = (left_out[:, :, None] == scans).any(dim=1)  # [P, k]
        is_out = is_out & ~is_out.all(dim=1, keepdim=True)
        apart, count = apart.masked_fill(is_out, torch.inf), count - is_out.sum(dim=1)
    smallest = apart.amin(dim=1, keepdim=True)  # [P, 1]
    share = (smallest / apart).pow(SOFTNESS).sum(dim=1) / count  # [P], from 1 / k to 1
    return smallest[:, 0] * share.pow(-1 / SOFTNESS)


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


def _counts(found: Tensor, owner: Tensor, left_out: Tensor | None) -> Tensor:
    """1 for each row [P, n] that was found and 0 where it is of a scan that is left out [P, S], since the bank had no
    more: [P, n]. The nearest always counts."""
    counts = torch.ones(found.shape, device=found.device)
    if left_out is not None:
        counts = 1 - (owner[found][:, :, None] == left_out[:, None, :]).any(dim=2).to(counts)
        counts[:, 0] = 1
    return counts


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
