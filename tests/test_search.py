"""Neighbours among patches, against plain and slow references."""

import pytest
import torch

from fmclip.search import (
    Rows,
    Search,
    distances_by_scan,
    greedy_coreset,
    k_nearest,
    nearest,
    nearest_in_others,
    soft_nearest,
)


@pytest.fixture
def banks() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(7, 5, generator=generator), torch.randn(20, 5, generator=generator)


def test_the_nearest_are_those_of_a_full_distance_table(banks):
    patches, bank = banks
    expected = torch.cdist(patches, bank).argsort(dim=1)
    assert torch.equal(nearest(patches, bank), expected[:, 0])
    assert torch.equal(k_nearest(patches, bank, 4), expected[:, :4])
    assert k_nearest(patches, bank, 50).shape == (7, 20)


def test_scans_that_are_left_out_are_never_found(banks):
    patches, bank = banks
    owner = torch.arange(20) % 4
    left_out = torch.tensor([[0, 1], [2, -1], [3, 3], [0, 2], [1, -1], [0, 3], [2, 1]])
    found = owner[k_nearest(patches, bank, 3, owner, left_out)]  # [7, 3]
    assert not (found[:, :, None] == left_out[:, None, :]).any()
    others = torch.cdist(patches[1:2], bank)[0].masked_fill(owner == 2, torch.inf)
    assert nearest(patches, bank, owner, left_out)[1] == others.argmin()


@pytest.mark.parametrize("scans", [2, 4])
def test_the_second_nearest_lies_in_yet_another_scan(banks, scans):
    patches, owner = banks[1], torch.arange(20) % scans
    found = nearest_in_others(patches, owner)
    table = torch.cdist(patches, patches)
    for row, (first, second) in enumerate(found.tolist()):
        others = table[row].masked_fill(owner == owner[row], torch.inf)
        assert first == others.argmin()
        if scans > 2:
            assert second == others.masked_fill(owner == owner[first], torch.inf).argmin()


def test_the_distance_is_the_mean_over_the_neighbours(banks):
    patches, bank = banks
    rows = Rows(torch.arange(20) // 5, 4)
    table = torch.cdist(patches, bank).sort(dim=1).values
    torch.testing.assert_close(Search("patches").distance(patches, bank, rows), table[:, 0])
    torch.testing.assert_close(Search("patches", 3).distance(patches, bank, rows), table[:, :3].mean(dim=1))


@pytest.mark.parametrize("sizes", [(5, 5, 5, 5), (2, 9, 3, 6)])
def test_each_scan_is_searched_by_itself(banks, sizes):
    patches, bank = banks
    expected = torch.stack([own.amin(dim=1) for own in torch.cdist(patches, bank).split(sizes, dim=1)], dim=1)
    torch.testing.assert_close(distances_by_scan(patches, bank, sizes), expected)


def test_the_mean_over_references_leans_on_the_nearest_and_does_not_fall_with_their_number(banks):
    patches, bank = banks
    rows = Rows(torch.arange(20) // 5, 4)
    apart = distances_by_scan(patches, bank, rows.sizes)
    found = Search().distance(patches, bank, rows)
    torch.testing.assert_close(found, apart.pow(-8).mean(dim=1).pow(-1 / 8))
    assert ((apart.amin(dim=1) < found) & (found < apart.mean(dim=1))).all()
    torch.testing.assert_close(soft_nearest(torch.full((3, 2), 0.7)), soft_nearest(torch.full((3, 32), 0.7)))
    left_out = torch.tensor([0, 1, 2, 3, 0, 1, -1])
    without = Search().distance(patches, bank, rows, left_out)
    for row, scan in enumerate(left_out.tolist()):
        others = [apart[row, one] for one in range(4) if one != scan]
        torch.testing.assert_close(without[row], torch.stack(others).pow(-8).mean().pow(-1 / 8))


def test_a_reference_that_is_left_out_does_not_count_even_where_it_is_the_scan_itself():
    apart = torch.tensor([[0.0, 0.5, 1.0]])
    torch.testing.assert_close(soft_nearest(apart, torch.tensor([[0, -1]])), soft_nearest(apart[:, 1:]))
    assert soft_nearest(apart)[0] < 1e-5
    none_left = torch.tensor([[0, 1, 2]])
    torch.testing.assert_close(soft_nearest(apart, none_left), soft_nearest(apart))


def test_patches_of_a_scan_that_is_left_out_do_not_count_where_the_bank_has_no_more():
    bank, rows = torch.tensor([[0.0], [0.1], [0.2], [5.0]]), Rows(torch.tensor([0, 0, 0, 1]), 2)
    patch = torch.zeros(1, 1)
    for settings in ({"neighbours": 2}, {"neighbours": 2, "reweighting": 2}):
        alone = Search("patches", **settings).distance(patch, bank[3:], Rows(torch.tensor([0]), 1))
        torch.testing.assert_close(Search("patches", **settings).distance(patch, bank, rows, torch.tensor([0])), alone)


def test_distances_of_near_twins_keep_their_digits():
    generator = torch.Generator().manual_seed(0)
    base = 100 + torch.randn(1, 8, generator=generator)
    bank = base + 0.1 * torch.randn(20, 8, generator=generator)
    patches = base + 0.1 * torch.randn(7, 8, generator=generator)
    expected = torch.cdist(patches.double(), bank.double()).unflatten(1, (4, 5)).amin(dim=2).float()
    torch.testing.assert_close(distances_by_scan(patches, bank, (5, 5, 5, 5)), expected, rtol=1e-3, atol=1e-4)


def test_a_region_that_was_called_normal_counts_by_itself(banks):
    patches, bank = banks
    plain = Search().distance(patches, bank[:15], Rows(torch.arange(15) // 5, 3))
    near = Search().distance(patches, torch.cat([bank[:15], patches[:1]]), Rows(torch.arange(16) // 5, 3))
    assert near[0] < 1e-3
    assert (near <= plain + 1e-5).all()


def test_reweighting_follows_equation_7_of_patchcore(banks):
    patches, bank = banks
    found = nearest(patches, bank)
    apart = (patches - bank[found]).norm(dim=1)
    weighed = Search("patches", reweighting=3).distance(patches, bank, Rows(torch.arange(20) // 5, 4))
    for row, patch in enumerate(patches):
        around = torch.cdist(bank[found[row]][None], bank)[0].argsort()[:4]  # m* and its three neighbours
        apart_from = (patch - bank[around]).norm(dim=1)
        expected = (1 - apart[row].exp() / apart_from.exp().sum()) * apart[row]
        torch.testing.assert_close(weighed[row], expected)


def test_a_coreset_leaves_no_patch_far_from_it():
    generator = torch.Generator().manual_seed(1)
    centres = 10 * torch.randn(8, 4, generator=generator)
    patches = (centres[:, None] + 0.01 * torch.randn(8, 50, 4, generator=generator)).flatten(0, 1)
    rows = greedy_coreset(patches, 8, generator)
    assert len(rows.unique()) == 8
    assert torch.cdist(patches, patches[rows]).amin(dim=1).max() < 1  # one for each cluster; a random draw misses some
    assert torch.equal(greedy_coreset(patches, 500, generator), torch.arange(400))
