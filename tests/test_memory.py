"""The patch memory against a plain, slow reference."""

import pytest
import torch

from fmclip.maps import smooth_inside
from fmclip.memory import ReferenceMemory
from fmclip.patch_grid import patch_content, patch_weight
from fmclip.views import View, default_views, view_features, weigh, weigh_places
from fmclip.whitening import shrunk

VIEWS = (View(0, "direction"), View(1, "direction"), View(1, "context"))


def levels(k: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(k, 6, 8, 8, generator=generator), torch.randn(k, 5, 4, 4, generator=generator)]


@pytest.fixture
def memory() -> ReferenceMemory:
    return ReferenceMemory.learn(levels(4), torch.ones(4, 32, 32, dtype=torch.bool), VIEWS)


def mean_over(patches: torch.Tensor, bank: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """Power mean with exponent -8 over the references of the distance to the nearest patch of each."""
    nearest = torch.stack([torch.cdist(patches, bank[owner == scan]).amin(dim=1) for scan in owner.unique()], dim=1)
    return nearest.double().pow(-8).mean(dim=1).pow(-1 / 8).float()


def test_distances_equal_a_brute_force_search(memory):
    query = levels(2, seed=1)
    distances, residuals = memory.compare(query, residuals=True)
    for index, look in enumerate(view_features(query, VIEWS)):
        patches = look.permute(0, 2, 3, 1).reshape(-1, look.shape[1]) @ memory.whitening[index]
        expected = mean_over(patches, memory.bank[index], memory.owner) / memory.scale[index]
        torch.testing.assert_close(distances[:, index].flatten(), expected, atol=1e-4, rtol=1e-4)
        if index < len(residuals):  # of the views that are learned from: to the nearest patch of all
            nearest = torch.cdist(patches, memory.bank[index]).amin(dim=1) / memory.scale[index]
            torch.testing.assert_close(residuals[index].norm(dim=1).flatten(), nearest, atol=1e-4, rtol=1e-4)


def test_a_reference_never_meets_itself_when_left_out(memory):
    references = levels(4)
    with_itself, _ = memory.compare(references)
    without, _ = memory.compare(references, own=torch.arange(4))
    assert with_itself.max() < 1e-2
    assert without.min() > 0.1


def test_one_means_as_far_as_the_oddest_patch_of_a_reference_that_the_memory_has_not_seen(memory):
    content = torch.ones(4, 32, 32, dtype=torch.bool)
    distances = memory.leave_one_out(levels(4), content)
    memory.calibrate(distances, content)
    largest = (distances / memory.level.view(-1, 1, 1) * patch_weight(content, (4, 4))[:, None]).flatten(2).amax(dim=2)
    torch.testing.assert_close(largest.mean(dim=0), torch.ones(3), atol=1e-4, rtol=1e-4)


def test_the_unit_of_residuals_is_the_largest_of_a_reference_and_varied_copies_do_not_count():
    content = torch.ones(8, 32, 32, dtype=torch.bool)
    references, copies = levels(4), [3 * level for level in levels(4, seed=7)]
    both = [torch.cat(pair) for pair in zip(references, copies, strict=True)]
    memory = ReferenceMemory.learn(both, content, VIEWS, references=4)
    for index, look in enumerate(view_features(both, VIEWS)):
        patches = look.permute(0, 2, 3, 1).flatten(0, 2)
        apart = ((patches - patches[memory.closest[index][:, 0]]) @ memory.whitening[index]).norm(dim=1).view(8, -1)
        torch.testing.assert_close(memory.scale[index], apart[:4].amax(dim=1).mean())


@pytest.mark.parametrize("copies", [0, 1])
def test_references_that_share_a_whitening_are_compared_with_one_that_has_seen_neither(copies):
    k = 10  # of eight groups the first two hold two scans each
    content = torch.ones(k * (1 + copies), 32, 32, dtype=torch.bool)
    features = levels(k * (1 + copies))
    memory = ReferenceMemory.learn(features, content, VIEWS[:1], references=k)
    found = memory.leave_one_out(features, content)[:, 0] * memory.scale[0]
    look = view_features(features, VIEWS[:1])[0]
    patches = look.permute(0, 2, 3, 1).flatten(1, 2)  # [n, h * w, C]
    owner = torch.arange(len(patches)) % k
    for scan in (0, 8, 3):
        kept = (owner % 8) != scan % 8
        residuals = []
        for place in kept.nonzero()[:, 0].tolist():
            for row, patch in enumerate(patches[place]):
                nearest = memory.closest[0][place * 64 + row]  # in another reference, and in yet another one
                left = [patches.flatten(0, 1)[one] for one in nearest if kept[int(one) // 64]]
                residuals += [patch - left[0]] if left else []
        stacked = torch.stack(residuals)
        covariance = shrunk(stacked.T @ stacked / len(stacked), 0.1)
        white = torch.linalg.inv(torch.linalg.cholesky(covariance)).T
        others, of = patches[owner != scan].flatten(0, 1) @ white, owner[owner != scan].repeat_interleave(64)
        expected = mean_over(patches[scan] @ white, others, of)
        torch.testing.assert_close(found[scan].flatten(), expected, atol=1e-3, rtol=1e-3)


def test_views_are_blind_to_gain_and_offset():
    references = levels(4)
    brighter = [2 * level + 0.3 for level in references]
    for one, other in zip(view_features(references, VIEWS), view_features(brighter, VIEWS), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_features_through_the_residuals(memory):
    query = [level.requires_grad_() for level in levels(1, seed=2)]
    _, residuals = memory.compare(query, residuals=True)
    sum(residual.abs().sum() for residual in residuals).backward()
    assert all(level.grad.abs().sum() > 0 for level in query)


def test_the_residuals_alone_are_those_of_the_comparison():
    views = default_views(2)
    references = [torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    memory = ReferenceMemory.learn(references, torch.ones(4, 32, 32, dtype=torch.bool), views)
    _, expected = memory.compare(references, torch.arange(4), residuals=True)
    found = memory.residuals(references, torch.arange(4))
    assert len(found) == len(expected) == sum(view.is_learned_from for view in views)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_state_round_trip_and_damage(memory):
    state = memory.state()
    back = ReferenceMemory.from_state(state, VIEWS, 4, torch.device("cpu"))
    query = levels(2, seed=1)
    assert torch.equal(back.compare(query)[0], memory.compare(query)[0])
    with pytest.raises(ValueError, match="wrong shape"):
        ReferenceMemory.from_state(state, VIEWS, 5, torch.device("cpu"))


def test_the_ends_show_surroundings_and_the_levels_between_appearance():
    assert [(view.level, view.kind, view.weight) for view in default_views(3)] == [
        (1, "direction", 1.75),
        (2, "direction", 0.25),
        (0, "context", 1.0),
        (2, "context", 1.0),
        (0, "mirror", 1.0),
        (2, "mirror", 1.0),
    ]
    for count in range(1, 6):  # a third each
        views = default_views(count)
        shares = [
            sum(view.weight for view in views if view.kind == kind) for kind in ("direction", "context", "mirror")
        ]
        assert shares == pytest.approx([min(count, 2)] * 3)
    assert [(view.level, view.kind) for view in default_views(2)] == [
        (1, "direction"),
        (0, "context"),
        (1, "context"),
        (0, "mirror"),
        (1, "mirror"),
    ]
    assert [(view.level, view.kind) for view in default_views(3, levels=[1])] == [
        (1, kind) for kind in ("direction", "context", "mirror")
    ]


def test_a_level_that_looks_ahead_says_where_and_not_whether():
    plain, views = default_views(3), default_views(4, looks_ahead=True)
    (ahead,) = (view for view in views if view.level == 3)
    assert (ahead.kind, ahead.weight, ahead.map_weight) == ("direction", 0.0, 1.75)
    assert not ahead.is_learned_from
    assert [view for view in views if view != ahead] == list(plain)
    assert default_views(4, levels=[0, 1, 2], looks_ahead=True) == plain
    assert [view.weight for view in default_views(4, levels=[3], looks_ahead=True)] == [1.0] * 3
    distances = torch.rand(2, len(views), 8, 8)
    changed = distances.clone()
    changed[:, views.index(ahead)] += 1
    torch.testing.assert_close(weigh(changed, views), weigh(distances, views))
    assert (weigh_places(changed, views) - weigh_places(distances, views)).min() > 0.2


def test_one_reference_that_is_like_the_scan_makes_it_normal_and_several_more_so():
    """A type of normal scan that few references show is no anomaly, nor is a scan that was called normal."""
    generator = torch.Generator().manual_seed(0)
    kinds = 3 * torch.randn(2, 12, 1, 1, generator=generator)
    references = kinds[[0, 0, 0, 0, 0, 0, 1]] + 0.3 * torch.randn(7, 12, 8, 8, generator=generator)
    query = kinds[[0, 1]] + 0.3 * torch.randn(2, 12, 8, 8, generator=generator)
    odd = 3 * torch.randn(1, 12, 1, 1, generator=generator) + 0.3 * torch.randn(1, 12, 8, 8, generator=generator)
    memory = ReferenceMemory.learn([references], torch.ones(7, 32, 32, dtype=torch.bool), (View(0, "direction"),))
    common, rare, anomalous = memory.compare([torch.cat([query, odd])])[0].mean(dim=(1, 2, 3))
    assert common < rare < 1.5 * common
    assert anomalous > 2 * rare


def test_the_context_view_sees_what_is_normal_elsewhere_but_not_in_this_scan():
    generator = torch.Generator().manual_seed(0)
    tissues = torch.randn(6, 12, 1, 1, generator=generator)  # each reference is of another tissue all over
    references = tissues + 0.3 * torch.randn(6, 12, 14, 14, generator=generator)
    content = torch.ones(6, 224, 224, dtype=torch.bool)
    views = (View(0, "direction"), View(0, "context"))
    memory = ReferenceMemory.learn([references], content, views)
    mixed = references[:1].clone()
    mixed[:, :, 5:8, 2:4] = references[1:2, :, 5:8, 2:4]
    (appearance, context), (was_appearance, was_context) = (
        memory.compare([scan])[0][0] for scan in (mixed, references[:1])
    )
    assert (context - was_context)[5:8, 2:4].min() > 0.3
    torch.testing.assert_close(appearance, was_appearance, atol=0.01, rtol=0)
    assert memory.compare([mixed], residuals=True)[1][0].shape == (1, 12, 14, 14)  # the direction's alone
    assert len(memory.compare([mixed], residuals=True)[1]) == 1


def test_the_mirror_view_sees_what_one_side_has_and_the_other_lacks():
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(6, 6, 14, 7, generator=generator)
    symmetric = torch.cat([half, half.flip(3)], dim=3)
    content = torch.ones(6, 224, 224, dtype=torch.bool)
    views = (View(0, "direction"), View(0, "mirror"))
    references = symmetric + 0.1 * torch.randn(6, 6, 14, 14, generator=generator)
    memory = ReferenceMemory.learn([references], content, views)
    one_sided = references[:1].clone()
    one_sided[:, :, 5:8, 1:4] = references[1:2, :, 5:8, 10:13]  # normal tissue, but on one side only
    clean, changed = (memory.compare([scan])[0][0, 1] for scan in (references[:1], one_sided))
    assert changed[6, 2] > clean[6, 2] + 0.2
    assert changed[6, 11] > clean[6, 11] + 0.2  # the other side of the pair
    torch.testing.assert_close(changed[12], clean[12])


def test_near_the_midline_the_mirror_view_is_not_asked():
    views = (View(0, "direction"), View(0, "mirror"))
    distances = torch.zeros(1, 2, 14, 14)
    distances[:, 1] = 1
    weighed = weigh(distances, views)[0, 0]
    assert weighed[5:9].tolist() == [0] * 4
    assert weighed[:5].tolist() == weighed[9:].tolist() == [0.5] * 5


def test_evidence_counts_less_beside_bars_and_not_at_all_on_them():
    content = torch.zeros(1, 80, 80, dtype=torch.bool)
    content[:, 16:64] = True
    weight = patch_weight(content, (10, 10))[0]
    assert weight[:2].eq(0).all()
    assert weight[8:].eq(0).all()
    assert weight[3:7, 1:9].eq(1).all()
    torch.testing.assert_close(weight[2], torch.full((10,), 0.8))
    torch.testing.assert_close(weight[2:8, 0], torch.full((6,), 0.8))


def test_two_identical_references_do_not_divide_by_zero():
    same = [level[:1].expand(2, -1, -1, -1) for level in levels(1)]
    memory = ReferenceMemory.learn(same, torch.ones(2, 32, 32, dtype=torch.bool), VIEWS)
    distances, _ = memory.compare(levels(1, seed=3))
    assert torch.isfinite(distances).all()


def test_letterbox_bars_are_outside():
    content = torch.zeros(1, 32, 32, dtype=torch.bool)
    content[:, 8:24] = True
    inside = patch_content(content, (4, 4))
    assert inside[0].tolist() == [[False] * 4, [True] * 4, [True] * 4, [False] * 4]


def test_leave_one_out_equals_learning_again_without_the_scan(memory):
    references, content = levels(4), torch.ones(4, 32, 32, dtype=torch.bool)
    honest = memory.leave_one_out(references, content)
    for scan in range(4):
        rest = [other for other in range(4) if other != scan]
        again = ReferenceMemory.learn([level[rest] for level in references], content[rest], VIEWS)
        again.scale = memory.scale
        expected, _ = again.compare([level[[scan]] for level in references])
        torch.testing.assert_close(honest[[scan]], expected, atol=1e-4, rtol=1e-4)


def test_axes_that_are_kept_change_no_distance_and_keep_what_a_channel_means(memory):
    content, moved = torch.ones(4, 32, 32, dtype=torch.bool), [level * 1.05 + 0.02 for level in levels(4, seed=0)]
    anew = ReferenceMemory.learn(moved, content, VIEWS)
    kept = ReferenceMemory.learn(moved, content, VIEWS, axes=memory.axes)
    query = levels(2, seed=1)
    expected, _ = anew.compare(query)
    found, residuals = kept.compare(query, residuals=True)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert [one.shape[1] for one in residuals] == [6, 5]
    for white, axes in zip(kept.whitening, memory.axes, strict=True):
        if axes is not None:
            assert ((white / white.norm(dim=0)) * axes).sum(dim=0).min() > 0.95


def test_without_shrinkage_a_flat_channel_is_no_obstacle():
    references = levels(4)
    references[1][:, 0] = 0.0
    views = (View(1, "direction"), View(1, "mirror"))
    memory = ReferenceMemory.learn(references, torch.ones(4, 32, 32, dtype=torch.bool), views, 0.0)
    distances, _ = memory.compare([level[:1] for level in references])
    assert distances.isfinite().all()


def test_smoothing_stays_inside_the_scan():
    weight = torch.ones(1, 8, 8)
    weight[:, :, :3] = 0  # a letterbox bar
    maps = torch.where(weight > 0, 1.0, 5.0)
    torch.testing.assert_close(smooth_inside(maps, weight, 0.8), weight)  # nothing of the bar, and no less beside it


def test_where_less_counts_smoothing_leaves_no_edge():
    weight = torch.full((1, 12, 12), 0.8)
    weight[:, :, 1:] = 1.0
    row = smooth_inside(torch.ones(1, 12, 12), weight, 0.8)[0, 6]
    assert 0.8 < float(row[0]) < float(row[1]) < 1.0
    assert float((row[1:] - row[:-1]).max()) < 0.5 * 0.2


def test_places_are_told_by_the_deeper_views():
    views = default_views(3)
    distances = torch.rand(2, len(views), 8, 8)
    changed = distances.clone()
    shallow = [row for row, view in enumerate(views) if view.level == 0]
    changed[:, shallow] += 1
    assert shallow
    torch.testing.assert_close(weigh_places(changed, views), weigh_places(distances, views))
    assert not torch.allclose(weigh(changed, views), weigh(distances, views))
    alone = default_views(1)
    one = torch.rand(2, len(alone), 8, 8)
    torch.testing.assert_close(weigh_places(one, alone), weigh(one, alone))
