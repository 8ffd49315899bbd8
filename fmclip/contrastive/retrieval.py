"""Exact retrieval in chunks: metrics over millions of pairs, and the nearest entries of an index; no n x n matrix.

Which candidates are right is a matter of labels: an image and a text with the same label belong together. Texts that
stand below several images are one candidate with several right images; ties count against the model, so that equal
embeddings for everything score no better than the worst order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from fmclip.errors import PairError

CHUNK = 2048
"""Queries, and candidates, compared at a time."""
DEPTH = 10
"""Ranks that nDCG looks at."""


@dataclass(frozen=True)
class RetrievalMetrics:
    """How well queries find what belongs to them.

    Attributes:
        recall_1: Share of the queries with a right candidate at rank 1.
        recall_5: Likewise among the first 5.
        recall_10: Likewise among the first 10.
        median_rank: Median over the queries of the rank of the first right candidate; 1 is best.
        ndcg_10: Mean normalised discounted cumulative gain of the first 10.
        queries: Number of queries.
        candidates: Number of candidates.
    """

    recall_1: float
    recall_5: float
    recall_10: float
    median_rank: float
    ndcg_10: float
    queries: int
    candidates: int

    def to_dict(self) -> dict[str, float]:
        """Plain values for JSON."""
        return asdict(self)


@torch.no_grad()
def ranks_of_relevant(
    queries: Tensor,
    candidates: Tensor,
    query_labels: Tensor,
    candidate_labels: Tensor,
    *,
    depth: int = DEPTH,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Rank the right candidates of each query.

    Args:
        queries: [n, D], L2-normalised.
        candidates: [m, D], L2-normalised, on the same device.
        query_labels: Whole numbers [n].
        candidate_labels: Whole numbers [m]; right are those with the query's label.
        depth: So many best-scored right candidates are ranked.
        chunk: Queries and candidates compared at a time; memory grows with its square.

    Returns:
        Ranks [n, depth] from 1, of the best-scored right candidates in order, 0 where there are fewer; and how many
        right candidates each query has, [n]. On the CPU.

    Raises:
        PairError: Some query has no right candidate, or an embedding is not a number.
    """
    if not bool(torch.isfinite(queries).all() and torch.isfinite(candidates).all()):
        raise PairError("Some embeddings are not numbers: the tower is damaged, or its training has diverged.")
    ranks, counts = [], []
    for first in range(0, len(queries), chunk):
        own, labels = queries[first : first + chunk], query_labels[first : first + chunk]  # [c, D], [c]
        best = torch.full((len(own), depth), -math.inf, dtype=queries.dtype, device=queries.device)  # right ones
        count = torch.zeros(len(own), dtype=torch.long, device=queries.device)
        for scores, right in _scored(own, candidates, labels, candidate_labels, chunk):
            found = scores.masked_fill(~right, -math.inf)
            best = torch.cat([best, found], dim=1).topk(depth, dim=1).values  # [c, depth], descending
            count += right.sum(dim=1)
        if not bool(count.all()):
            raise PairError("Some queries have no right candidate: their labels do not occur among the candidates.")
        ahead = torch.zeros(len(own), depth, dtype=torch.long, device=queries.device)
        places = min(depth, int(count.max()))
        for scores, right in _scored(own, candidates, labels, candidate_labels, chunk):
            wrong = scores.masked_fill(right, -math.inf)
            for place in range(places):
                ahead[:, place] += (wrong >= best[:, place, None]).sum(dim=1)
        rank = ahead + torch.arange(1, depth + 1, device=queries.device)  # the better right ones are ahead as well
        rank[torch.isinf(best)] = 0
        ranks.append(rank.cpu())
        counts.append(count.cpu())
    return torch.cat(ranks), torch.cat(counts)


def retrieval_metrics(
    queries: Tensor, candidates: Tensor, query_labels: Tensor, candidate_labels: Tensor, *, chunk: int = CHUNK
) -> RetrievalMetrics:
    """Measure retrieval in one direction; see `ranks_of_relevant` for the arguments."""
    ranks, counts = ranks_of_relevant(queries, candidates, query_labels, candidate_labels, chunk=chunk)
    return _metrics(ranks, counts, len(candidates))


def both_directions(
    image: Tensor, text: Tensor, labels: Sequence[int], *, chunk: int = CHUNK
) -> dict[str, RetrievalMetrics]:
    """Measure images finding texts and texts finding images.

    Args:
        image: [n, D], one row a pair.
        text: [n, D], one row a pair.
        labels: n whole numbers; pairs with equal ones have the same text.
        chunk: As for `ranks_of_relevant`.

    Returns:
        "image_to_text" and "text_to_image"; each distinct text is one candidate, and one query.
    """
    numbers = torch.tensor(list(labels), device=image.device)
    first = _first_places(numbers)
    texts, text_labels = text[first], numbers[first]
    return {
        "image_to_text": retrieval_metrics(image, texts, numbers, text_labels, chunk=chunk),
        "text_to_image": retrieval_metrics(texts, image, text_labels, numbers, chunk=chunk),
    }


def chance(labels: Sequence[int]) -> dict[str, RetrievalMetrics]:
    """What a random order gives on average, for the same labels as `both_directions`.

    Returns:
        Expected recall, nDCG and the median rank of each direction.
    """
    numbers = torch.tensor(list(labels))
    _, counts = numbers.unique(return_counts=True)
    texts, images = len(counts), len(numbers)
    one = _expected(torch.ones(images, dtype=torch.long), texts)
    return {"image_to_text": one, "text_to_image": _expected(counts, images)}


@torch.no_grad()
def nearest(query: Tensor, index: Tensor, k: int, *, chunk: int = 65536) -> tuple[Tensor, Tensor]:
    """Find the nearest rows of an index, exactly.

    Args:
        query: [n, D], L2-normalised.
        index: [m, D], L2-normalised; may be half precision.
        k: How many.
        chunk: Rows of the index compared at a time.

    Returns:
        Cosines [n, k'] in falling order and their rows [n, k'], k' = min(k, m).
    """
    best = torch.empty(len(query), 0)
    rows = torch.empty(len(query), 0, dtype=torch.long)
    for first in range(0, len(index), chunk):
        scores = query.float() @ index[first : first + chunk].float().mT  # [n, c]
        places = torch.arange(first, first + scores.shape[1]).expand(len(query), -1)
        best, rows = torch.cat([best, scores], dim=1), torch.cat([rows, places], dim=1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        rows = rows.gather(1, order)
    return best, rows


def _scored(
    own: Tensor, candidates: Tensor, labels: Tensor, candidate_labels: Tensor, chunk: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield scores [c, d] and which are right [c, d], chunk after chunk of the candidates."""
    for start in range(0, len(candidates), chunk):
        part = slice(start, start + chunk)
        yield own @ candidates[part].mT, labels[:, None] == candidate_labels[None, part]


def _metrics(ranks: Tensor, counts: Tensor, candidates: int) -> RetrievalMetrics:
    first = ranks[:, 0]
    gains = torch.where((ranks > 0) & (ranks <= DEPTH), 1 / torch.log2(ranks.double() + 1), 0.0).sum(dim=1)  # [n]
    ideal = (1 / torch.log2(torch.arange(DEPTH).double() + 2)).cumsum(0)[counts.clamp_max(DEPTH) - 1]  # [n]
    one, five, ten = (float((first <= k).double().mean()) for k in (1, 5, 10))
    median = float(first.double().quantile(0.5)) if len(first) < 2**24 else float(first.double().median())
    return RetrievalMetrics(one, five, ten, median, float((gains / ideal).mean()), len(first), candidates)


def _expected(counts: Tensor, candidates: int) -> RetrievalMetrics:
    """Expectation over random orders, for queries with so many right ones among the candidates."""

    def miss(count: int, k: int) -> float:  # no right one among the first k
        k = min(k, candidates)
        wrong = candidates - count
        return math.prod((wrong - place) / (candidates - place) for place in range(k)) if wrong >= k else 0.0

    values, repeats = counts.unique(return_counts=True)
    weights = (repeats / repeats.sum()).tolist()
    sizes = values.tolist()
    one, five, ten = (sum(w * (1 - miss(n, k)) for n, w in zip(sizes, weights, strict=True)) for k in (1, 5, 10))
    discount = 1 / torch.log2(torch.arange(DEPTH).double() + 2)
    reachable = float(discount[: min(DEPTH, candidates)].sum())
    ndcg = sum(
        w * (n / candidates * reachable) / float(discount[: min(n, DEPTH)].sum())
        for n, w in zip(sizes, weights, strict=True)
    )
    low, high = 1, candidates
    while low < high:  # the rank that half of the queries reach
        middle = (low + high) // 2
        reached = sum(w * (1 - miss(n, middle)) for n, w in zip(sizes, weights, strict=True))
        low, high = (low, middle) if reached >= 0.5 else (middle + 1, high)
    return RetrievalMetrics(one, five, ten, float(low), ndcg, int(repeats.sum()), candidates)


def _first_places(labels: Tensor) -> Tensor:
    """Place of the first occurrence of each label, in rising order of labels."""
    values, inverse = labels.unique(return_inverse=True)
    places = torch.arange(len(labels), device=labels.device)
    first = torch.full((len(values),), len(labels), device=labels.device)
    return first.scatter_reduce(0, inverse, places, reduce="amin")
