"""From evidence to scores: no single patch decides, and the map never shows more than the score says."""

import torch

from fmclip.detectors.evidence import cut_peaks, image_scores


def test_one_odd_patch_counts_for_less_than_an_odd_region():
    patch, region = torch.zeros(1, 14, 14), torch.zeros(1, 14, 14)
    patch[0, 3, 3] = 1.8
    region[0, 2:4, 2:5] = 1.2
    cut = cut_peaks(torch.cat([patch, region]))
    scores = image_scores(cut)
    torch.testing.assert_close(scores, torch.tensor([1.8 / 6, 1.2], dtype=torch.float64))
    assert cut[0, 3, 3] == scores[0].float()
    torch.testing.assert_close(cut[1], region[0])


def test_each_scan_is_cut_by_itself():
    maps = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([cut_peaks(one[None]) for one in maps])
    assert torch.equal(cut_peaks(maps), alone)
    assert torch.equal(alone[maps < 0.9], maps[maps < 0.9])
