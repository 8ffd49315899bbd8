"""Retrieval metrics against a brute-force reference that sorts every candidate."""

import math

import pytest
import torch
import torch.nn.functional as F

from fmclip.contrastive.retrieval import both_directions, chance, nearest, ranks_of_relevant, retrieval_metrics
from fmclip.errors import PairError


def brute_force(queries, candidates, query_labels, candidate_labels):
    """Sort all candidates of each query, wrong ones first among equals, and count by hand."""
    recalls, firsts, gains = {1: [], 5: [], 10: []}, [], []
    for query, label in zip(queries, query_labels.tolist(), strict=True):
        scores = (candidates @ query).tolist()
        right = [one == label for one in candidate_labels.tolist()]
        order = sorted(range(len(scores)), key=lambda place: (-scores[place], right[place]))
        hits = [place + 1 for place, candidate in enumerate(order) if right[candidate]]
        firsts.append(hits[0])
        for k, found in recalls.items():
            found.append(any(hit <= k for hit in hits))
        ideal = sum(1 / math.log2(place + 2) for place in range(min(10, len(hits))))
        gains.append(sum(1 / math.log2(hit + 1) for hit in hits if hit <= 10) / ideal)
    firsts = sorted(firsts)
    middle = len(firsts) // 2
    median = firsts[middle] if len(firsts) % 2 else (firsts[middle - 1] + firsts[middle]) / 2
    return [sum(found) / len(found) for found in recalls.values()] + [median, sum(gains) / len(gains)]


def values(metrics):
    return [metrics.recall_1, metrics.recall_5, metrics.recall_10, metrics.median_rank, metrics.ndcg_10]


def embeddings(count: int, seed: int):
    return F.normalize(torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.double), dim=-1)


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("labels", [53, 9, 2])  # nearly all texts differ; many repeat; more than ten right candidates
def test_metrics_equal_a_brute_force_reference(labels, chunk):
    generator = torch.Generator().manual_seed(labels)
    numbers = torch.randint(0, labels, (53,), generator=generator)
    image, text = embeddings(53, 1), embeddings(53, 2)
    text = F.normalize(text + 0.7 * image, dim=-1)
    _, first = torch.unique(numbers, return_inverse=True)
    rows = [int((first == one).nonzero()[0]) for one in range(int(first.max()) + 1)]
    found = both_directions(image, text, numbers.tolist(), chunk=chunk)

    expected = brute_force(image, text[rows], numbers, numbers[rows])
    assert values(found["image_to_text"]) == pytest.approx(expected)
    expected = brute_force(text[rows], image, numbers[rows], numbers)
    assert values(found["text_to_image"]) == pytest.approx(expected)
    assert found["image_to_text"].candidates == len(rows)  # a repeated text is one candidate


def test_embeddings_that_are_no_numbers_are_refused():
    image, text = embeddings(5, 1), embeddings(5, 2)
    for broken in (image, text):
        kept = broken[2, 0].clone()
        broken[2, 0] = math.nan
        with pytest.raises(PairError, match="not numbers"):
            both_directions(image, text, range(5))
        broken[2, 0] = kept


def test_a_model_that_embeds_everything_alike_scores_no_better_than_last():
    same = F.normalize(torch.ones(20, 4), dim=-1)
    found = both_directions(same, same, range(20))
    assert found["image_to_text"].recall_10 == 0
    assert found["image_to_text"].median_rank == 20


def test_all_right_is_perfect_also_where_a_text_has_several_images():
    text = torch.eye(4).repeat_interleave(3, dim=0)
    labels = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    found = both_directions(text, text, labels)
    for own in found.values():
        assert values(own) == [1, 1, 1, 1, pytest.approx(1)]


def test_chance_is_what_random_orders_give_on_average():
    labels = [0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    trials = [both_directions(embeddings(15, 2 * n), embeddings(15, 2 * n + 1), labels) for n in range(400)]
    expected = chance(labels)
    for way, own in expected.items():
        for name in ("recall_1", "recall_5", "recall_10", "ndcg_10"):
            mean = sum(getattr(trial[way], name) for trial in trials) / len(trials)
            assert mean == pytest.approx(getattr(own, name), abs=0.03), (way, name)


def test_a_query_without_any_right_candidate_is_refused():
    rows = embeddings(3, 0)
    with pytest.raises(PairError, match="no right candidate"):
        retrieval_metrics(rows, rows, torch.tensor([0, 1, 9]), torch.tensor([0, 1, 2]))


def test_ranks_beyond_the_right_candidates_are_zero():
    ranks, counts = ranks_of_relevant(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), torch.tensor([0, 1]), depth=3)
    assert ranks.tolist() == [[1, 0, 0], [1, 0, 0]]
    assert counts.tolist() == [1, 1]


def test_nearest_equals_sorting_everything_whatever_the_chunk():
    index, query = embeddings(101, 3).float(), embeddings(4, 4).float()
    cosines, rows = nearest(query, index, 9, chunk=10)
    wanted = (query @ index.mT).sort(dim=1, descending=True)
    assert torch.equal(rows, wanted.indices[:, :9])
    assert torch.allclose(cosines, wanted.values[:, :9])
    assert nearest(query, index[:3], 9)[1].shape == (4, 3)
