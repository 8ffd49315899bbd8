"""Neighbours among patches, against plain and slow references."""

import pytest
import torch

from fmclip.search import Search, greedy_coreset, k_nearest, nearest, nearest_in_others


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
    found = nearest(patches, bank)
    apart = (patches - bank[found]).norm(dim=1)
    table = torch.cdist(patches, bank).sort(dim=1).values
    torch.testing.assert_close(Search().distance(patches, bank, found, apart), table[:, 0])
    torch.testing.assert_close(Search(3).distance(patches, bank, found, apart), table[:, :3].mean(dim=1))


def test_reweighting_follows_equation_7_of_patchcore(banks):
    patches, bank = banks
    found = nearest(patches, bank)
    apart = (patches - bank[found]).norm(dim=1)
    weighed = Search(reweighting=3).distance(patches, bank, found, apart)
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
